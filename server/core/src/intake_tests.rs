//! Claims about what of an agent's words is kept.

use super::*;
use crate::batching::{Batching, Effect, Limits, Refusal};
use crate::miniature::World;
use berth_proto::ids::ReplicaUid;

fn h0() -> HostUid {
    "h0".parse().unwrap()
}

/// Nothing is said to be gone.
const NONE: Absent<'_> = Absent { uids: &[], held: None };

/// These are gone, as a host tells that holds its newest set.
fn told<'a>(w: &World, uids: &'a [String]) -> Absent<'a> {
    let (epoch, generation) = (w.view.epoch(), w.view.generation(&h0()));
    Absent { uids, held: Some(SetNumber { epoch, generation }) }
}

/// A deployment of two replicas that run on one host.
fn running() -> World {
    let mut w = World::new(1);
    w.apply(World::spec("one"));
    w.settle();
    assert_eq!(w.view.replicas_on(&h0()).count(), 2);
    w
}

fn first(w: &World) -> Arc<Replica> {
    w.view.replicas_on(&h0()).next().unwrap().clone()
}

fn report(replica: &Replica, status: api::ReplicaStatus) -> ReplicaReport {
    ReplicaReport {
        replica_uid: replica.uid.to_string(),
        deployment_uid: replica.deployment.to_string(),
        release: replica.release.0,
        slot: replica.slot,
        status: Some(status),
        ..ReplicaReport::default()
    }
}

fn exited(attempt: u32) -> api::ReplicaStatus {
    let exit = api::Exit {
        attempt,
        code: 3,
        out_of_memory: attempt == 2,
        last_line: if attempt == 3 {
            format!("no\tmodule{}", "!".repeat(300))
        } else {
            String::new()
        },
        ..api::Exit::default()
    };
    api::ReplicaStatus { attempt, last_exit: Some(exit), ..Default::default() }
}

fn events(changes: &[Change]) -> Vec<(String, String)> {
    let event = |change: &Change| match change {
        Change::AppendEvent(event) => Some((event.reason.clone(), event.message.clone())),
        _ => None,
    };
    changes.iter().filter_map(event).collect()
}

fn deleted(changes: &[Change]) -> Vec<ReplicaUid> {
    let deletion = |change: &Change| match change {
        Change::DeleteReplica(uid) => Some(uid.clone()),
        _ => None,
    };
    changes.iter().filter_map(deletion).collect()
}

fn mark(w: &mut World, intent: ReplicaIntent) -> Arc<Replica> {
    let marked = Arc::new(Replica { intent, ..Replica::clone(&first(w)) });
    w.change(vec![Change::PutReplica(Arc::clone(&marked))]);
    marked
}

fn hello(observed: Vec<ReplicaReport>, engine_observed: bool) -> Registration {
    Registration {
        instance: "i".to_owned(),
        boot_nonce: "n".to_owned(),
        agent_start: 1,
        agent_version: "0".to_owned(),
        facts: None,
        held: None,
        observed,
        engine_observed,
        trust_version: 0,
    }
}

#[test]
fn each_exit_is_kept_once_and_the_oldest_give_way() {
    let mut w = running();
    let replica = first(&w);
    for attempt in 1..=u32::try_from(MAX_EXITS).unwrap() + 2 {
        let said = [report(&replica, exited(attempt))];
        let changes = statuses(&w.view, &h0(), &said, NONE, w.now.wall);
        let why = if attempt == 2 { " for lack of memory" } else { "" };
        let mut words = format!("attempt {attempt} ended with code 3{why}");
        if attempt == 3 {
            // A host's words: one line of bounded length.
            words.push_str(&format!("; it wrote last: no module{}", "!".repeat(191)));
        }
        assert_eq!(events(&changes), [("REPLICA_EXITED".to_owned(), words)]);
        w.change(changes);
        assert!(statuses(&w.view, &h0(), &said, NONE, w.now.wall).is_empty());
    }
    let kept = &first(&w).exits;
    assert_eq!(kept.len(), MAX_EXITS);
    assert_eq!(kept[0].attempt, 3);
    // An older one that comes late is not taken for a new one.
    let late = [report(&replica, exited(1))];
    assert!(statuses(&w.view, &h0(), &late, NONE, w.now.wall).is_empty());
}

#[test]
fn an_exit_that_was_asked_for_is_no_warning() {
    let severity = |w: &World, replica: &Replica| {
        let changes = statuses(&w.view, &h0(), &[report(replica, exited(1))], NONE, w.now.wall);
        changes.iter().find_map(|change| match change {
            Change::AppendEvent(event) => Some((event.severity(), event.message.clone())),
            _ => None,
        })
    };
    let mut w = running();
    let (told, _) = severity(&w, &first(&w)).unwrap();
    assert_eq!(told, EventSeverity::Warning);
    let stopped = mark(&mut w, ReplicaIntent::Stop);
    let (told, words) = severity(&w, &stopped).unwrap();
    assert_eq!(told, EventSeverity::Info);
    assert_eq!(words, "attempt 1 ended with code 3: it was to be stopped");
}

#[test]
fn the_first_readiness_is_kept_and_a_second_is_not() {
    let mut w = running();
    let fresh = Arc::new(Replica { first_ready: None, ..Replica::clone(&first(&w)) });
    w.change(vec![Change::PutReplica(Arc::clone(&fresh))]);
    let said = [report(&fresh, api::ReplicaStatus { ready: true, ..Default::default() })];
    let changes = statuses(&w.view, &h0(), &said, NONE, Wall(77));
    assert_eq!(events(&changes)[0].0, "REPLICA_READY");
    w.change(changes);
    assert_eq!(first(&w).first_ready, Some(Wall(77)));
    assert!(statuses(&w.view, &h0(), &said, NONE, Wall(99)).is_empty());
}

#[test]
fn a_host_tells_of_its_own_replicas_only() {
    let mut w = running();
    w.host(1, 1 << 30, "b");
    let other: HostUid = "h1".parse().unwrap();
    let stopped = mark(&mut w, ReplicaIntent::Stop);
    let said = [report(&stopped, exited(9))];
    let gone = [stopped.uid.to_string(), "not a uid!".to_owned()];
    assert!(statuses(&w.view, &other, &said, told(&w, &gone), w.now.wall).is_empty());
    let ended = deleted(&statuses(&w.view, &h0(), &said, told(&w, &gone), w.now.wall));
    assert_eq!(ended, vec![stopped.uid.clone()]);
    // Nor does it reach what is known live: another host's replica would look ready, or gone.
    let before = w.live.replica(&stopped.uid).cloned();
    let liar = api::ReplicaStatus { attempt: 99, ready: true, ..Default::default() };
    let said = [report(&stopped, liar)];
    w.live.take_reports(&w.view, &other, (&said, &gone), w.now.mono);
    assert_eq!(w.live.replica(&stopped.uid).cloned(), before);
    w.live.take_reports(&w.view, &h0(), (&said, &gone), w.now.mono);
    assert!(w.live.replica(&stopped.uid).is_none());
}

#[test]
fn absence_deletes_what_was_to_stop_and_never_what_is_wanted() {
    for (intent, ends) in [
        (ReplicaIntent::Stop, true),
        (ReplicaIntent::Orphan, true),
        (ReplicaIntent::Run, false),
        (ReplicaIntent::Unspecified, false),
    ] {
        let mut w = running();
        let replica = mark(&mut w, intent);
        let gone = [replica.uid.to_string()];
        let found = deleted(&statuses(&w.view, &h0(), &[], told(&w, &gone), w.now.wall));
        assert_eq!(found.contains(&replica.uid), ends, "{intent:?}");
        // The same said by a complete hello.
        let changes = registration(&w.view, &h0(), &hello(vec![], true), w.now.wall);
        assert_eq!(deleted(&changes).contains(&replica.uid), ends, "{intent:?}");
    }
}

#[test]
fn what_was_gone_under_an_earlier_set_may_have_been_made_again_by_the_one_before_the_newest() {
    let mut w = running();
    let replica = mark(&mut w, ReplicaIntent::Stop);
    let gone = [replica.uid.to_string()];
    let early = told(&w, &gone);
    w.change(vec![Change::SetGeneration(h0(), berth_proto::ids::Generation(500))]);
    for held in [early.held, None] {
        let early = Absent { held, ..early };
        assert!(statuses(&w.view, &h0(), &[], early, w.now.wall).is_empty());
    }
    let ended = deleted(&statuses(&w.view, &h0(), &[], told(&w, &gone), w.now.wall));
    assert_eq!(ended, std::slice::from_ref(&replica.uid));
}

#[test]
fn an_orphan_that_is_gone_is_forgotten_whatever_set_its_host_holds() {
    let mut w = running();
    let replica = mark(&mut w, ReplicaIntent::Orphan);
    let gone = [replica.uid.to_string()];
    // Its host gets no set before people have decided: none can have had it made again.
    let early = Absent { held: None, ..told(&w, &gone) };
    let ended = deleted(&statuses(&w.view, &h0(), &[], early, w.now.wall));
    assert_eq!(ended, std::slice::from_ref(&replica.uid));
}

#[test]
fn a_hello_without_the_engine_says_nothing_about_what_is_not_there() {
    let mut w = running();
    mark(&mut w, ReplicaIntent::Stop);
    let blind = hello(vec![], false);
    assert!(deleted(&registration(&w.view, &h0(), &blind, w.now.wall)).is_empty());
    let known = first(&w);
    assert!(w.live.replica(&known.uid).is_some());
    let view = w.view.clone();
    w.live.registered(&view, &h0(), &blind, w.now);
    assert!(w.live.replica(&known.uid).is_some());
    w.live.registered(&view, &h0(), &hello(vec![], true), w.now);
    assert!(w.live.replica(&known.uid).is_none());
}

#[test]
fn what_changes_all_the_time_is_not_written() {
    let w = running();
    let known = w.view.host(&h0()).unwrap().record.facts.clone().unwrap();
    let less = api::HostFacts { disk_free_bytes: 1, ..known.clone() };
    assert!(facts(&w.view, &h0(), &less).is_none());
    let moved = api::HostFacts { kernel: "6.1".to_owned(), ..known };
    assert!(matches!(facts(&w.view, &h0(), &moved), Some(Change::PutHost(_))));
}

#[test]
fn trust_only_grows() {
    let mut w = running();
    let change = trusts(&w.view, &h0(), 3).unwrap();
    w.change(vec![change]);
    assert!(trusts(&w.view, &h0(), 3).is_none() && trusts(&w.view, &h0(), 2).is_none());
    assert!(trusts(&w.view, &"nobody".parse().unwrap(), 9).is_none());
}

#[test]
fn a_hello_says_what_of_trust_was_told_and_not_kept() {
    let mut w = running();
    let holds = |trust_version| Registration { trust_version, ..hello(Vec::new(), false) };
    let changes = registration(&w.view, &h0(), &holds(3), w.now.wall);
    assert!(matches!(&changes[..], [Change::PutHost(host)] if host.record.trust_version == 3));
    w.change(changes);
    assert!(registration(&w.view, &h0(), &holds(2), w.now.wall).is_empty());
}

#[test]
fn what_was_found_from_an_older_view_undoes_no_newer_write() {
    let mut w = running();
    let replica = first(&w);
    let said = [report(&replica, exited(1))];
    let stale = seen(&w.view, &statuses(&w.view, &h0(), &said, NONE, w.now.wall));
    mark(&mut w, ReplicaIntent::Stop);
    let mut ledger = Batching::new(w.view.clone(), Limits::ANY);
    let effects = ledger.propose(1, stale);
    assert!(
        matches!(effects.as_slice(), [Effect::Reject { why: Refusal::Conflict { .. }, .. }]),
        "{effects:?}"
    );
    let fresh = seen(&w.view, &statuses(&w.view, &h0(), &said, NONE, w.now.wall));
    assert!(matches!(ledger.propose(2, fresh).as_slice(), [Effect::Persist { .. }]));
}

#[test]
fn a_quarantined_host_keeps_what_it_has_and_a_person_is_told() {
    let mut w = running();
    let changes = quarantine(&w.view, &h0(), "two boots", w.now.wall);
    let words = "two boots; what runs is kept, no new sets are sent".to_owned();
    assert_eq!(events(&changes), [("HOST_QUARANTINED".to_owned(), words)]);
    w.change(changes);
    assert!(w.view.host(&h0()).unwrap().record.quarantined);
    assert!(quarantine(&w.view, &h0(), "again", w.now.wall).is_empty());
    assert_eq!(w.view.replicas_on(&h0()).count(), 2);
}

#[test]
fn an_agent_that_forgot_its_attempts_goes_on_above_those_that_ended() {
    let mut w = running();
    let replica = first(&w);
    let ended = statuses(&w.view, &h0(), &[report(&replica, exited(7))], NONE, w.now.wall);
    w.change(ended);
    // Whoever remembers is not told: each raise makes another set.
    let knows = vec![report(&replica, api::ReplicaStatus { attempt: 7, ..Default::default() })];
    let known = registration(&w.view, &h0(), &hello(knows, true), w.now.wall);
    assert!(known.iter().all(|change| change.replica() != Some(&replica.uid)), "{known:?}");
    // An agent that keeps its set and has not seen its engine yet has forgotten nothing.
    let held = Some(berth_proto::ids::SetNumber::default());
    let blind = Registration { held, ..hello(Vec::new(), false) };
    assert!(registration(&w.view, &h0(), &blind, w.now.wall).is_empty());

    for empty in [hello(Vec::new(), false), hello(Vec::new(), true)] {
        let changes = registration(&w.view, &h0(), &empty, w.now.wall);
        let mut ledger = Batching::new(w.view.clone(), Limits::ANY);
        let before = ledger.ahead().generation(&h0());
        ledger.propose(1, seen(&w.view, &changes));
        assert!(ledger.ahead().generation(&h0()) > before, "the agent gets a set that tells it");
        let Some(Ok(set)) = crate::dispatch::host_set(ledger.ahead(), &h0()) else {
            panic!("the host has a set");
        };
        let floor = |uid: &ReplicaUid| {
            set.entries.iter().find(|e| e.replica_uid == uid.as_str()).unwrap().attempt_floor
        };
        assert_eq!(floor(&replica.uid), 7);
        // Told once, and the ends of its next attempt are news.
        let view = ledger.ahead();
        assert!(registration(view, &h0(), &empty, w.now.wall).is_empty());
        let next = statuses(view, &h0(), &[report(&replica, exited(8))], NONE, w.now.wall);
        assert_eq!(events(&next)[0].0, "REPLICA_EXITED");
    }
}

#[test]
fn an_end_told_by_the_very_hello_that_raises_the_floor_is_kept_with_it() {
    let mut w = running();
    let replica = first(&w);
    w.change(statuses(&w.view, &h0(), &[report(&replica, exited(7))], NONE, w.now.wall));
    let ready = api::ReplicaStatus {
        attempt: 1,
        reason: "REPLACEMENT_FAILED".into(),
        ..Default::default()
    };
    let said = hello(vec![report(&replica, ready)], true);
    let changes = registration(&w.view, &h0(), &said, w.now.wall);
    w.change(changes);
    let kept = w.view.replica(&replica.uid).unwrap();
    assert_eq!((kept.failed, kept.attempt_floor), (true, 7));
}

#[test]
fn the_newest_hello_is_right_whatever_another_copy_of_the_agent_had_got_to() {
    let mut w = running();
    let replica = first(&w);
    let status = |attempt| api::ReplicaStatus {
        attempt,
        phase: api::ReplicaPhase::Running as i32,
        ready: true,
        ..Default::default()
    };
    let (view, now) = (w.view.clone(), w.now);
    let said = |attempt| hello(vec![report(&replica, status(attempt))], true);
    w.live.registered(&view, &replica.host, &said(4), now);
    w.live.admit(&replica.host, "", 0, 9);
    // Of the same join and the same start, as a cloned disk has it.
    w.live.registered(&view, &replica.host, &said(2), now);
    assert_eq!(w.live.replica(&replica.uid).unwrap().status.attempt, 2);
    assert_eq!(w.live.host(&replica.host).unwrap().sequence, 0, "its numbers begin anew");
    assert!(w.live.replica(&replica.uid).unwrap().ready_since.is_some());
}

#[test]
fn what_an_earlier_join_had_is_not_taken_for_ready_before_the_new_one_tells_of_it() {
    let mut w = running();
    let replica = first(&w);
    let status = api::ReplicaStatus {
        attempt: 1,
        phase: api::ReplicaPhase::Running as i32,
        ready: true,
        ..Default::default()
    };
    let (view, now) = (w.view.clone(), w.now);
    let told = hello(vec![report(&replica, status)], true);
    w.live.registered(&view, &replica.host, &told, now);
    // An agent that starts before its engine does has the same replicas as before.
    w.live.registered(&view, &replica.host, &hello(vec![], false), now);
    assert!(w.live.replica(&replica.uid).unwrap().ready_since.is_some());
    let mut joined = hello(vec![], false);
    joined.instance = "j".to_owned();
    w.live.registered(&view, &replica.host, &joined, now);
    assert!(w.live.replica(&replica.uid).is_none());
}

#[test]
fn what_never_got_to_its_host_is_forgotten_when_the_host_holds_the_set_that_lacks_it() {
    let mut w = running();
    let replica = mark(&mut w, ReplicaIntent::Stop);
    w.change(vec![Change::SetGeneration(replica.host.clone(), berth_proto::ids::Generation(5))]);
    let number = |generation| SetNumber {
        epoch: w.view.epoch(),
        generation: berth_proto::ids::Generation(generation),
    };
    let there = BTreeSet::from([replica.uid.to_string()]);
    let nothing = BTreeSet::new();
    assert!(never_there(&w.view, &replica.host, number(5), &there).is_empty());
    assert!(never_there(&w.view, &replica.host, number(4), &nothing).is_empty(), "an older set");
    let gone = never_there(&w.view, &replica.host, number(5), &nothing);
    assert_eq!(deleted(&gone), std::slice::from_ref(&replica.uid));
}
