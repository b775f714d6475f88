use super::*;
use berth_proto::ids::Wall;

fn at(ms: u64) -> Now {
    Now { mono: Mono(ms), wall: Wall(1_000_000 + i64::try_from(ms).unwrap()) }
}

fn terms() -> Terms {
    Terms {
        epoch: Epoch(7),
        cluster: "c".into(),
        ping_interval_ms: 10_000,
        idle_timeout_ms: 30_000,
        status_interval_ms: 100,
        reconnect_window_ms: 1_000,
        version: "0".into(),
        features: vec![],
        trust: agent::Trust::default(),
    }
}

fn session() -> Session {
    Session::new("h1".parse().unwrap(), terms(), Mono(0))
}

fn message(item: session_request::Item) -> Input {
    Input::Message(Box::new(agent::SessionRequest { item: Some(item) }))
}

fn hello() -> Hello {
    Hello { host_uid: "h1".into(), instance: "i".into(), ..Hello::default() }
}

fn set(generation: u64, replicas: &[&str]) -> Arc<HostSet> {
    let body: Arc<[u8]> = Arc::from(&b"body"[..]);
    let digest = Digest::of(&body);
    let entries = replicas
        .iter()
        .map(|r| SetEntry {
            replica_uid: (*r).into(),
            body_digest: digest.to_string(),
            ..SetEntry::default()
        })
        .collect();
    let number = SetNumber { epoch: Epoch(7), generation: Generation(generation) };
    Arc::new(HostSet::new(number, entries, BTreeMap::from([(digest, body)])))
}

fn sets_sent(effects: &[Effect]) -> Vec<u64> {
    effects
        .iter()
        .filter_map(|e| match e {
            Effect::Send(m) => match &m.item {
                Some(session_response::Item::SetEnd(end)) => end.id.map(|id| id.generation),
                Some(_) | None => None,
            },
            Effect::Register(_)
            | Effect::Take { .. }
            | Effect::Facts(_)
            | Effect::Acknowledged { .. }
            | Effect::Refused { .. }
            | Effect::TrustAcknowledged(_)
            | Effect::ClockOffset(_)
            | Effect::Close(_) => None,
        })
        .collect()
}

fn bodies_sent(effects: &[Effect]) -> usize {
    effects
        .iter()
        .filter_map(|e| match e {
            Effect::Send(m) => Some(m),
            _ => None,
        })
        .filter_map(|m| match &m.item {
            Some(session_response::Item::SetPage(page)) => Some(page.bodies.len()),
            Some(_) | None => None,
        })
        .sum()
}

fn ack(generation: u64, verdict: SetVerdict) -> Input {
    let id = Some(SetId { epoch: 7, generation });
    message(session_request::Item::SetAck(SetAck {
        id,
        verdict: verdict as i32,
        message: String::new(),
        held: id,
    }))
}

/// Says hello, which is kept while `newest` is the newest set.
fn greet(
    s: &mut Session,
    ms: u64,
    hello: Hello,
    newest: Option<Result<Arc<HostSet>, Hold>>,
) -> Vec<Effect> {
    let out = s.step(at(ms), message(session_request::Item::Hello(hello)));
    assert!(matches!(out.as_slice(), [Effect::Register(_)]), "{out:?}");
    s.step(at(ms), Input::Registered(newest))
}

fn live() -> Session {
    let mut s = session();
    greet(&mut s, 0, hello(), None);
    s
}

#[test]
fn nothing_is_taken_before_the_hello() {
    let mut s = session();
    let out = s.step(at(1), message(session_request::Item::Statuses(agent::Statuses::default())));
    assert!(matches!(out.as_slice(), [Effect::Close(Closed::Protocol(_))]));
    assert!(s.step(at(2), message(session_request::Item::Hello(hello()))).is_empty());
}

#[test]
fn a_hello_for_another_host_is_refused() {
    let mut s = session();
    let other = Hello { host_uid: "h2".into(), ..hello() };
    let out = s.step(at(1), message(session_request::Item::Hello(other)));
    assert_eq!(out, [Effect::Close(Closed::WrongHost)]);
}

#[test]
fn registers_only_when_every_page_is_here_and_in_order() {
    let report = |r: &str| ReplicaReport { replica_uid: r.into(), ..ReplicaReport::default() };
    let mut s = session();
    let first = Hello { observed_pages: 2, observed: vec![report("a")], ..hello() };
    assert!(s.step(at(1), message(session_request::Item::Hello(first.clone()))).is_empty());
    let page = |number, r: &str| {
        message(session_request::Item::Observed(agent::ObservedPage {
            number,
            observed: vec![report(r)],
            bodies: vec![],
        }))
    };
    assert!(s.step(at(2), page(1, "b")).is_empty());
    let out = s.step(at(3), page(2, "c"));
    let registered = out.iter().find_map(|e| match e {
        Effect::Register(r) => Some(r.observed.iter().map(|o| o.replica_uid.clone()).collect()),
        _ => None,
    });
    assert_eq!(registered, Some(vec!["a".to_owned(), "b".into(), "c".into()]));

    let mut s = session();
    s.step(at(1), message(session_request::Item::Hello(first)));
    let out = s.step(at(2), page(2, "c"));
    assert!(matches!(out.as_slice(), [Effect::Close(Closed::Protocol(_))]));
}

#[test]
fn nobody_is_welcome_and_no_set_is_offered_before_the_hello_is_kept() {
    let mut s = session();
    // Worked out before anybody knew what this copy of the host runs.
    s.step(at(0), Input::Newest(Ok(set(1, &["a"]))));
    let out = s.step(at(1), message(session_request::Item::Hello(hello())));
    assert!(matches!(out.as_slice(), [Effect::Register(_)]), "{out:?}");
    assert!(s.step(at(2), Input::Newest(Ok(set(1, &["a"])))).is_empty());
    // The ledger's disk may take its time.
    assert!(s.step(at(20_000), Input::Tick).is_empty());
    // What the hello has told holds the host back: that counts, and not what was told before.
    let out = s.step(at(20_001), Input::Registered(Some(Err(Hold::Observing))));
    assert_eq!(sets_sent(&out), Vec::<u64>::new());
    let welcomes = out.iter().filter(|e| match e {
        Effect::Send(m) => {
            matches!(&m.item, Some(session_response::Item::Welcome(w)) if w.observe_only)
        }
        _ => false,
    });
    assert_eq!(welcomes.count(), 1);
    assert_eq!(sets_sent(&s.step(at(20_002), Input::Newest(Ok(set(2, &["a", "b"]))))), [2]);
    // It is kept once.
    assert!(s.step(at(20_003), Input::Registered(Some(Err(Hold::Observing)))).is_empty());
    assert_eq!(sets_sent(&s.step(at(20_004), ack(2, SetVerdict::Broken))), Vec::<u64>::new());
    assert_eq!(sets_sent(&s.step(at(20_004 + RETRY_SET_MS), Input::Tick)), [2]);
}

#[test]
fn who_speaks_before_its_welcome_breaks_the_protocol() {
    let mut s = session();
    s.step(at(0), message(session_request::Item::Hello(hello())));
    let out = s.step(at(1), message(session_request::Item::Statuses(agent::Statuses::default())));
    assert!(matches!(out.as_slice(), [Effect::Close(Closed::Protocol(_))]), "{out:?}");
    assert!(s.step(at(2), Input::Registered(Some(Ok(set(1, &[]))))).is_empty());
}

#[test]
fn one_set_is_on_its_way_and_only_the_newest_follows() {
    let mut s = live();
    assert_eq!(sets_sent(&s.step(at(1), Input::Newest(Ok(set(1, &["a"]))))), [1]);
    assert!(sets_sent(&s.step(at(2), Input::Newest(Ok(set(2, &["a"]))))).is_empty());
    assert!(sets_sent(&s.step(at(3), Input::Newest(Ok(set(3, &["b"]))))).is_empty());
    let out = s.step(at(4), ack(1, SetVerdict::Taken));
    assert_eq!(sets_sent(&out), [3]);
    assert!(
        out.iter()
            .any(|e| matches!(e, Effect::Acknowledged { number, .. } if number.generation.0 == 1))
    );
    assert!(sets_sent(&s.step(at(5), ack(3, SetVerdict::Taken))).is_empty());
}

#[test]
fn a_body_the_agent_holds_is_not_sent_again() {
    let mut s = live();
    assert_eq!(bodies_sent(&s.step(at(1), Input::Newest(Ok(set(1, &["a"]))))), 1);
    s.step(at(2), ack(1, SetVerdict::Taken));
    assert_eq!(bodies_sent(&s.step(at(3), Input::Newest(Ok(set(2, &["a", "b"]))))), 0);
    // A broken set means that what it was thought to hold may be missing.
    s.step(at(4), ack(2, SetVerdict::Broken));
    assert_eq!(bodies_sent(&s.step(at(4 + RETRY_SET_MS), Input::Tick)), 1);
}

#[test]
fn a_set_that_is_held_already_is_not_sent() {
    let held = set(4, &["a"]);
    let mut s = session();
    let hello = Hello {
        held: Some(SetId { epoch: 7, generation: 4 }),
        held_digest: held.digest.to_string(),
        ..hello()
    };
    let out = greet(&mut s, 1, hello, Some(Ok(held)));
    assert!(sets_sent(&out).is_empty());
    assert_eq!(sets_sent(&s.step(at(2), Input::Newest(Ok(set(5, &[]))))), [5]);
}

#[test]
fn the_empty_set_is_sent_to_an_agent_that_holds_none() {
    let mut s = live();
    assert_eq!(sets_sent(&s.step(at(1), Input::Newest(Ok(set(0, &[]))))), [0]);
}

#[test]
fn a_held_host_gets_no_set_until_the_hold_ends() {
    let mut s = session();
    let out = greet(&mut s, 1, hello(), Some(Err(Hold::Observing)));
    let welcome = out.iter().find_map(|e| match e {
        Effect::Send(m) => match &m.item {
            Some(session_response::Item::Welcome(w)) => Some(w.observe_only),
            Some(_) | None => None,
        },
        _ => None,
    });
    assert_eq!(welcome, Some(true));
    assert!(sets_sent(&out).is_empty());
    assert_eq!(sets_sent(&s.step(at(2), Input::Newest(Ok(set(1, &[]))))), [1]);
}

#[test]
fn a_refused_older_set_is_not_sent_again_but_a_newer_one_is() {
    let mut s = live();
    s.step(at(1), Input::Newest(Ok(set(1, &["a"]))));
    let out = s.step(at(2), ack(1, SetVerdict::Older));
    assert!(out.iter().any(|e| matches!(e, Effect::Refused { .. })));
    assert!(sets_sent(&out).is_empty());
    assert!(sets_sent(&s.step(at(20_000), Input::Tick)).is_empty());
    assert_eq!(sets_sent(&s.step(at(20_001), Input::Newest(Ok(set(9, &["a"]))))), [9]);
}

#[test]
fn a_set_that_was_not_durable_is_sent_again_after_a_pause() {
    let mut s = live();
    s.step(at(1), Input::Newest(Ok(set(1, &["a"]))));
    assert!(sets_sent(&s.step(at(2), ack(1, SetVerdict::NotDurable))).is_empty());
    assert!(sets_sent(&s.step(at(100), Input::Tick)).is_empty());
    assert_eq!(s.deadline(), Some(Mono(2 + RETRY_SET_MS)));
    assert_eq!(sets_sent(&s.step(at(2 + RETRY_SET_MS), Input::Tick)), [1]);
}

#[test]
fn a_status_is_acknowledged_only_after_it_is_kept() {
    let mut s = live();
    let statuses = agent::Statuses { sequence: 5, ..agent::Statuses::default() };
    let out = s.step(at(1), message(session_request::Item::Statuses(statuses)));
    assert!(matches!(out.as_slice(), [Effect::Take { sequence: 5, .. }]));
    let out = s.step(at(2), Input::Taken(5));
    assert_eq!(
        out,
        [Effect::Send(Box::new(agent::SessionResponse {
            item: Some(session_response::Item::StatusAck(agent::StatusAck { sequence: 5 }))
        }))]
    );
}

#[test]
fn an_acknowledgement_waits_for_all_statuses_before_it() {
    let mut s = live();
    for sequence in 5..8 {
        let statuses = agent::Statuses { sequence, ..agent::Statuses::default() };
        s.step(at(1), message(session_request::Item::Statuses(statuses)));
    }
    let acknowledged = |out: Vec<Effect>| match out.as_slice() {
        [] => None,
        [Effect::Send(sent)] => match sent.item {
            Some(session_response::Item::StatusAck(ack)) => Some(ack.sequence),
            _ => panic!("{sent:?}"),
        },
        other => panic!("{other:?}"),
    };
    assert_eq!(acknowledged(s.step(at(2), Input::Taken(6))), None);
    assert_eq!(acknowledged(s.step(at(2), Input::Taken(5))), Some(6));
    assert_eq!(acknowledged(s.step(at(2), Input::Taken(7))), Some(7));
}

#[test]
fn an_identity_of_no_sane_length_is_not_remembered() {
    let long = "x".repeat(MAX_ID_BYTES + 1);
    let hellos =
        [Hello { instance: long.clone(), ..hello() }, Hello { boot_nonce: long, ..hello() }];
    for hello in hellos {
        let mut s = session();
        let out = s.step(at(1), message(session_request::Item::Hello(hello)));
        assert!(matches!(out.as_slice(), [Effect::Close(Closed::Protocol(_))]), "{out:?}");
    }
}

#[test]
fn statuses_that_nobody_keeps_end_the_session_instead_of_filling_memory() {
    let mut s = live();
    for sequence in 0..MAX_UNTAKEN as u64 {
        let statuses = agent::Statuses { sequence, ..agent::Statuses::default() };
        s.step(at(1), message(session_request::Item::Statuses(statuses)));
    }
    let out = s.step(at(2), message(session_request::Item::Statuses(agent::Statuses::default())));
    assert_eq!(out, [Effect::Close(Closed::Overrun)]);
}

#[test]
fn silence_ends_the_session_and_speech_keeps_it() {
    let mut s = live();
    // The agent pings every 10 s; only one that is late is asked.
    assert_eq!(s.deadline(), Some(Mono(15_000)));
    s.step(at(9_000), message(session_request::Item::Ping(agent::Ping::default())));
    assert_eq!(s.deadline(), Some(Mono(24_000)));
    let out = s.step(at(24_000), Input::Tick);
    assert!(matches!(out.as_slice(), [Effect::Send(_)]));
    s.step(at(26_000), message(session_request::Item::Ping(agent::Ping::default())));
    let closes = |out: Vec<Effect>| out.iter().any(|e| matches!(e, Effect::Close(_)));
    assert!(!closes(s.step(at(55_999), Input::Tick)));
    assert!(closes(s.step(at(56_000), Input::Tick)));
    assert_eq!(s.deadline(), None);
}

#[test]
fn a_clocks_offset_is_told_once_and_again_when_it_changes() {
    let mut s = live();
    let mut told = |ms: u64, ahead: i64| {
        let wall = at(ms).wall.0 + ahead;
        let time = Some(prost_types::Timestamp {
            seconds: wall.div_euclid(1000),
            nanos: i32::try_from(wall.rem_euclid(1000) * 1_000_000).unwrap(),
        });
        let ping = message(session_request::Item::Ping(agent::Ping { id: 1, time }));
        s.step(at(ms), ping)
            .into_iter()
            .filter_map(|e| match e {
                Effect::ClockOffset(ms) => Some(ms),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(told(1, 60_000), [60_000]);
    assert!(told(2, 60_000 + CLOCK_STEP_MS - 1).is_empty());
    assert_eq!(told(3, 60_000 - CLOCK_STEP_MS), [60_000 - CLOCK_STEP_MS]);
}

#[test]
fn a_set_larger_than_a_message_is_paged() {
    let names: Vec<String> = (0..20_000).map(|i| format!("replica-{i:06}")).collect();
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut s = live();
    let out = s.step(at(1), Input::Newest(Ok(set(1, &refs))));
    let mut entries = 0;
    let mut pages = 0;
    for effect in &out {
        if let Effect::Send(m) = effect {
            assert!(m.encoded_len() < 1024 * 1024);
            if let Some(session_response::Item::SetPage(page)) = &m.item {
                pages += 1;
                entries += page.entries.len();
            }
        }
    }
    assert_eq!(entries, 20_000);
    assert!(pages > 1);
}

#[test]
fn a_removed_host_is_told_once_and_the_session_ends() {
    let mut s = live();
    let out = s.step(at(1), Input::Removed { wipe: true });
    assert!(matches!(out.as_slice(), [Effect::Send(_), Effect::Close(Closed::Removed)]));
    assert!(s.step(at(2), Input::Removed { wipe: true }).is_empty());
}

#[test]
fn an_agent_with_older_roots_and_addresses_is_told_the_newer_after_the_welcome() {
    let trust = agent::Trust { version: 5, registry: "r:1".into(), ..Default::default() };
    for (held, told) in [(0, true), (4, true), (5, false), (6, false)] {
        let terms = Terms { trust: trust.clone(), ..terms() };
        let mut session = Session::new("h1".parse().unwrap(), terms, Mono(0));
        let hello = Hello { trust_version: held, ..hello() };
        let out = greet(&mut session, 1, hello, None);
        let sent: Vec<_> = out
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Send(m) => m.item,
                _ => None,
            })
            .filter(|item| !matches!(item, session_response::Item::Ping(_)))
            .collect();
        assert!(matches!(sent.first(), Some(session_response::Item::Welcome(_))));
        let trusts = sent.iter().filter(|i| matches!(i, session_response::Item::Trust(_))).count();
        assert_eq!(trusts == 1, told, "{held}");
    }
}

#[test]
fn newer_roots_are_told_at_once_where_a_session_stands_and_else_with_its_welcome() {
    let trust = |version| Box::new(agent::Trust { version, ..Default::default() });
    let told = |effects: Vec<Effect>| -> Vec<u64> {
        let version = |effect| match effect {
            Effect::Send(message) => match message.item {
                Some(session_response::Item::Trust(trust)) => Some(trust.version),
                _ => None,
            },
            _ => None,
        };
        effects.into_iter().filter_map(version).collect()
    };
    let mut standing = live();
    assert_eq!(told(standing.step(at(1), Input::Trust(trust(7)))), [7]);
    assert_eq!(told(standing.step(at(2), Input::Trust(trust(7)))), [7], "until it holds them");
    let ack = session_request::Item::TrustAck(agent::TrustAck { version: 7 });
    standing.step(at(2), Input::Message(Box::new(agent::SessionRequest { item: Some(ack) })));
    assert!(told(standing.step(at(2), Input::Trust(trust(7)))).is_empty());
    assert!(told(standing.step(at(3), Input::Trust(trust(6)))).is_empty(), "never an older one");
    let mut early = Session::new("h1".parse().unwrap(), terms(), Mono(0));
    assert!(told(early.step(at(1), Input::Trust(trust(9)))).is_empty());
    assert_eq!(told(greet(&mut early, 2, hello(), None)), [9]);
}

#[test]
fn an_acknowledgement_says_all_that_the_agent_may_have_something_of() {
    let known = |effects: &[Effect]| {
        effects.iter().find_map(|e| match e {
            Effect::Acknowledged { known, .. } => Some(known.clone()),
            _ => None,
        })
    };
    let set_of = |generation, names: &[&str]| {
        let entry = |name: &&str| SetEntry { replica_uid: (*name).into(), ..SetEntry::default() };
        let generation = Generation(generation);
        let number = SetNumber { epoch: Epoch(7), generation };
        let entries = names.iter().map(entry).collect();
        Input::Newest(Ok(Arc::new(HostSet::new(number, entries, BTreeMap::new()))))
    };
    let observed = ReplicaReport { replica_uid: "seen".into(), ..ReplicaReport::default() };
    for engine_observed in [true, false] {
        let mut s = session();
        let hello = Hello { observed: vec![observed.clone()], engine_observed, ..hello() };
        greet(&mut s, 0, hello, None);
        s.step(at(1), set_of(1, &["lost"]));
        s.step(at(2), ack(1, SetVerdict::NotDurable));
        s.step(at(3), set_of(2, &["taken"]));
        s.step(at(10_000), Input::Tick);
        let out = s.step(at(10_001), ack(2, SetVerdict::Taken));
        let all = ["seen", "taken"].map(str::to_owned).into();
        assert_eq!(
            known(&out),
            Some(engine_observed.then_some(all)),
            "what it did not take is not there"
        );
    }
}
