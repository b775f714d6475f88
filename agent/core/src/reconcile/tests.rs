//! What the machine does with what is wanted, by scenario.

use super::test_world::*;
use super::*;
use berth_proto::api::ReplicaPhase;

#[test]
fn what_is_wanted_is_brought_made_started_and_told() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(100);
    assert_eq!(w.running(), ["a"]);
    let status = w.status("a");
    assert_eq!((status.attempt, status.phase(), status.ready), (1, ReplicaPhase::Running, true));
    let steps: Vec<&Effect> = w.log.iter().filter(|e| is_step(e)).collect();
    assert!(matches!(steps[..], [Effect::Create { attempt: 1, .. }, Effect::Start { .. }]));
    w.want(&[]);
    w.run_for(100);
    assert!(w.containers.is_empty() && w.absent.contains(&uid("a")));
    // It is stopped with the grace it was made with, though no set names it any more.
    assert!(w.log.iter().any(|e| matches!(e, Effect::Stop { grace_ms: 7_000, .. })));
}

#[test]
fn what_could_not_be_started_for_long_goes_at_once_when_it_is_not_wanted_any_more() {
    let mut w = World::new();
    w.unstartable = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert_eq!((w.running().len(), w.containers.len()), (0, 1));
    w.want(&[]);
    w.run_for(1_000);
    assert!(w.containers.is_empty() && w.absent.contains(&uid("a")));
}

#[test]
fn silence_removes_nothing_and_the_empty_set_does() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(100);
    // The disk is lost: nobody has said what is wanted.
    w.disk = (Wanted::NotYetKnown, BTreeMap::new());
    w.restart();
    w.log.clear();
    w.run_for(3_600_000);
    assert!(!w.log.iter().any(is_step));
    assert!(!w.reports[&uid("a")].assigned);
    w.want(&[]);
    w.run_for(100);
    assert!(w.containers.is_empty());
}

#[test]
fn a_running_container_is_adopted_after_a_restart_of_the_agent() {
    let mut w = World::new();
    w.want(&[want("a"), Want { checked: true, ..want("b") }]);
    w.run_for(1_000);
    w.log.clear();
    w.restart();
    w.run_for(600_000);
    assert!(!w.log.iter().any(is_step), "{:?}", w.log);
    assert!(w.status("a").ready && w.status("b").ready);
}

#[test]
fn a_look_that_began_before_a_step_ended_says_nothing_of_it() {
    let mut w = World::new();
    w.settle();
    w.want(&[want("a")]);
    // All but the looks is carried out; one that saw nothing comes in late.
    let mut late = Vec::new();
    for _ in 0..50 {
        if let Some(effect) = (!w.asked.is_empty()).then(|| w.asked.remove(0)) {
            let is_look = matches!(effect, Effect::Observe(_));
            w.carry_out(effect, Luck::Good);
            if is_look {
                late.extend(w.answers.pop());
            }
        }
        w.tell(Input::Happened { urgent: true });
        w.now += 25;
        if let Some(input) = w.answers.pop() {
            w.tell(input);
        }
        if !w.running().is_empty() {
            break;
        }
    }
    assert!(!late.is_empty() && w.running() == ["a"]);
    for input in late {
        w.tell(input);
    }
    w.run_for(60_000);
    assert_eq!((w.running(), w.containers.len()), (vec!["a"], 1));
}

#[test]
fn fifty_are_made_in_parallel_within_the_bound_after_one_fetch_and_one_write() {
    let names: Vec<&'static str> =
        (0..50).map(|n| &*Box::leak(format!("r{n}").into_boxed_str())).collect();
    let mut w = World::new();
    w.settle();
    w.log.clear();
    w.want(&names.iter().map(|n| want(n)).collect::<Vec<_>>());
    let mut most = 0;
    while let Some(effect) = (!w.asked.is_empty()).then(|| w.asked.remove(0)) {
        let under_way =
            w.asked.iter().filter(|e| is_step(e)).count() + usize::from(is_step(&effect));
        most = most.max(under_way);
        w.carry_out(effect, Luck::Good);
        while let Some(input) = w.answers.pop() {
            w.tell(input);
        }
    }
    w.run_for(1_000);
    assert_eq!((w.running().len(), most), (50, 16));
    let count = |f: fn(&Effect) -> bool| w.log.iter().filter(|e| f(e)).count();
    assert_eq!(count(|e| matches!(e, Effect::Fetch { .. })), 1);
    assert_eq!(count(|e| matches!(e, Effect::Persist { .. })), 1);
}

#[test]
fn no_container_is_made_while_the_disk_does_not_take_its_number() {
    let mut w = World::new();
    w.disk_full = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert!(w.containers.is_empty());
    assert_eq!(w.status("a").reason, "DISK_FAILED");
    let writes = w.log.iter().filter(|e| matches!(e, Effect::Persist { .. })).count();
    assert!((8..30).contains(&writes), "{writes} writes in ten minutes");
    w.disk_full = false;
    w.run_for(60_000);
    assert_eq!(w.running(), ["a"]);
}

#[test]
fn what_waits_for_a_bridge_that_cannot_be_made_says_so() {
    let mut w = World::new();
    w.no_bridge = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert!(w.containers.is_empty());
    let status = w.status("a");
    let told = (status.reason.as_str(), status.message.as_str());
    assert_eq!(told, ("NO_NETWORK", "they cannot be kept apart"));
    w.no_bridge = false;
    w.run_for(60_000);
    assert_eq!((w.running(), w.status("a").reason.as_str()), (vec!["a"], ""));
}

#[test]
fn an_engine_that_is_away_is_told_asked_for_ever_and_loses_nothing() {
    let mut w = World::new();
    w.up = false;
    w.want(&[want("a")]);
    w.run_for(3_600_000);
    assert_eq!((w.engine_is, w.status("a").reason.as_str()), (Some(false), "ENGINE_AWAY"));
    let looks = w.log.iter().filter(|e| matches!(e, Effect::Observe(_))).count();
    assert!((350..400).contains(&looks), "{looks} looks in an hour");
    w.up = true;
    w.run_for(11_000);
    assert_eq!((w.engine_is, w.running()), (Some(true), vec!["a"]));
    assert_eq!(w.status("a").reason, "");
    // It goes while something runs: that is left alone, and still told as it was.
    w.up = false;
    w.log.clear();
    w.tell(Input::FollowEnded);
    w.run_for(600_000);
    assert_eq!((w.engine_is, w.status("a").ready), (Some(false), true));
    assert!(!w.log.iter().any(is_step));
}

#[test]
fn a_program_that_ends_is_started_again_with_doubling_waits_and_no_server() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    let mut waits = Vec::new();
    for _ in 0..9 {
        w.end("a", 1);
        w.settle();
        w.run_for(50);
        assert_eq!(w.status("a").reason, "BACKOFF");
        let (ended, attempt) = (w.now, w.of("a").unwrap().attempt);
        while w.of("a").unwrap().attempt == attempt {
            w.run_for(100);
        }
        waits.push((w.now - ended).div_ceil(1_000));
        assert!(w.containers.len() <= 2, "one dead predecessor is kept, no more");
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    assert_eq!(w.containers.values().filter(|c| c.state != State::Running).count(), 1);
    // The wait goes on over a restart of the agent.
    w.end("a", 1);
    w.run_for(50);
    w.restart();
    w.run_for(50_000);
    assert!(w.running().is_empty());
    w.run_for(11_000);
    assert_eq!(w.running(), ["a"]);
}

#[test]
fn what_shall_not_run_again_does_not_even_after_a_restart_of_the_agent() {
    let mut w = World::new();
    w.want(&[Want { never: true, ..want("a") }]);
    w.run_for(10);
    w.end("a", 0);
    w.run_for(1_000);
    w.restart();
    w.run_for(3_600_000);
    assert_eq!((w.running().len(), w.starts.len()), (0, 1));
    assert_eq!(w.status("a").phase(), ReplicaPhase::Exited);
}

#[test]
fn an_end_is_told_with_what_its_program_wrote_last_from_the_first_report_on() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(1_000);
    w.log.clear();
    let line = "no module named iris".to_owned();
    w.tell(Input::LastWords { replica: uid("a"), attempt: 1, line: line.clone() });
    w.end("a", 1);
    w.run_for(500);
    let told: Vec<String> = w
        .log
        .iter()
        .filter_map(|effect| match effect {
            Effect::Report(report) => report.status.as_ref()?.last_exit.clone(),
            _ => None,
        })
        .map(|exit| exit.last_line)
        .collect();
    assert!(!told.is_empty() && told.iter().all(|told| *told == line), "{told:?}");
}

#[test]
fn a_check_that_fails_while_the_program_starts_up_restarts_nothing() {
    let mut w = World::new();
    w.healthy = false;
    w.want(&[Want { checked: true, ..want("a") }]);
    w.run_for(14_000);
    let status = w.status("a");
    assert_eq!((status.attempt, status.ready, status.reason.as_str()), (1, false, "NOT_READY"));
    // Ten seconds of start-up and five of being unready are over: it is started anew.
    w.run_for(4_000);
    assert_eq!(w.status("a").attempt, 2);
    w.healthy = true;
    w.run_for(2_000);
    assert!(w.status("a").ready);
    // A check nobody could ask is no failed one.
    let Some((replica, attempt)) = Some((uid("a"), 2)) else { return };
    for _ in 0..10 {
        w.tell(Input::ProbeResult {
            replica: replica.clone(),
            attempt,
            outcome: Outcome::NotAsked,
        });
    }
    assert!(w.status("a").ready);
}

#[test]
fn a_container_somebody_removed_is_made_anew_after_a_wait() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    w.containers.clear();
    w.tell(Input::Happened { urgent: true });
    w.run_for(100);
    assert_eq!(w.status("a").reason, "CONTAINER_GONE");
    assert!(w.containers.is_empty());
    w.run_for(2_000);
    assert_eq!((w.running(), w.of("a").unwrap().attempt), (vec!["a"], 2));
}

#[test]
fn one_that_is_wanted_again_after_somebody_started_it_anew_is_told_of_truly() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    w.want(&[]);
    // It is stopped, and the engine goes before it is removed.
    while w.of("a").unwrap().state == State::Running {
        let effect = w.asked.remove(0);
        w.carry_out(effect, Luck::Good);
    }
    for answer in std::mem::take(&mut w.answers) {
        w.tell(answer);
    }
    w.up = false;
    w.run_for(100);
    let id = w.of("a").unwrap().id.clone();
    w.containers.get_mut(&id).unwrap().state = State::Running;
    w.want(&[want("a")]);
    w.up = true;
    w.run_for(120_000);
    assert_eq!((w.running(), w.of("a").unwrap().attempt), (vec!["a"], 2));
    assert!(w.status("a").ready);
}

#[test]
fn an_attempt_that_has_ended_is_not_ready_whatever_its_check_says_and_is_not_asked_any_more() {
    let mut w = World::new();
    w.want(&[Want { checked: true, never: true, ..want("a") }]);
    w.run_for(5_000);
    assert!(w.status("a").ready);
    // It ends, and somebody starts it again, while its check is under way.
    let check = w.until_asked(|effect| matches!(effect, Effect::Probe { .. }));
    w.end("a", 0);
    w.look();
    let id = w.of("a").unwrap().id.clone();
    w.containers.get_mut(&id).unwrap().state = State::Running;
    w.look();
    w.carry_out(check, Luck::Good);
    let passed = w.answers.pop().unwrap();
    w.tell(passed);
    assert_eq!((w.status("a").phase(), w.status("a").ready), (ReplicaPhase::Exited, false));
    assert!(!w.asked.iter().any(|effect| matches!(effect, Effect::Probe { .. })));
    w.run_for(5_000);
    assert_eq!((w.running().len(), w.status("a").ready), (0, false));
}

#[test]
fn a_program_that_was_started_anew_unseen_is_not_ready_before_its_own_check_says_so() {
    let mut w = World::new();
    w.want(&[Want { checked: true, ..want("a") }]);
    w.run_for(5_000);
    assert!(w.status("a").ready);
    // The engine ends with it, and somebody has started it again before anyone looks; the answer of the one
    // before is still on its way.
    let check = w.until_asked(|effect| matches!(effect, Effect::Probe { .. }));
    let id = w.of("a").unwrap().id.clone();
    let now = w.now().wall;
    w.containers.get_mut(&id).unwrap().started = Some(now);
    w.look();
    assert!(!w.status("a").ready);
    w.carry_out(check, Luck::Good);
    let passed = w.answers.pop().unwrap();
    w.healthy = false;
    w.tell(passed);
    assert!(!w.status("a").ready, "that was the one before");
    w.run_for(2_000);
    assert!(!w.status("a").ready);
    w.healthy = true;
    w.run_for(2_000);
    assert!(w.status("a").ready);
}

#[test]
fn one_that_failed_and_whose_place_is_taken_is_not_said_to_be_started_again() {
    let mut w = World::new();
    w.want(&[want("old")]);
    w.run_for(10);
    w.want(&replaced());
    // That its place is taken is remembered, and before anything comes of it it fails.
    while !w.disk.1.get(&uid("new")).is_some_and(|new| new.replacement_begun) {
        match w.answers.pop() {
            Some(answer) => w.tell(answer),
            None => {
                let effect = w.asked.remove(0);
                w.carry_out(effect, Luck::Good);
            }
        }
    }
    w.end("old", 1);
    w.look();
    w.run_for(1_000);
    let told = w.status("old");
    assert_eq!((told.reason.as_str(), told.next_attempt_time), ("REPLACED", None));
}

#[test]
fn a_transfer_nobody_waits_for_any_more_is_ended() {
    let mut w = World::new();
    w.settle();
    w.want(&[want("a")]);
    let fetch = w.asked.iter().find_map(|e| match e {
        Effect::Fetch { step, .. } => Some(*step),
        _ => None,
    });
    w.want(&[]);
    assert!(w.asked.contains(&Effect::StopFetch(fetch.unwrap())));
    assert!(w.absent.contains(&uid("a")));
}

#[test]
fn what_is_being_stopped_is_not_ready_whatever_its_check_says_and_is_not_asked() {
    let mut w = World::new();
    w.want(&[Want { checked: true, ..want("a") }]);
    w.run_for(5_000);
    assert!(w.status("a").ready);
    // Another one takes its place while its check is under way; it takes all of its grace to end.
    let check = w.until_asked(|effect| matches!(effect, Effect::Probe { .. }));
    w.want(&[
        Want { checked: true, ..want("a") },
        Want { checked: true, replaces: Some("a"), ..want("b") },
    ]);
    let stop = loop {
        if let Some(at) = w.asked.iter().position(|e| matches!(e, Effect::Stop { .. })) {
            break w.asked.remove(at);
        }
        let effect = w.asked.remove(0);
        w.carry_out(effect, Luck::Good);
        let answer = w.answers.pop().unwrap();
        w.tell(answer);
    };
    assert!(!w.status("a").ready);
    w.carry_out(check, Luck::Good);
    let passed = w.answers.pop().unwrap();
    w.tell(passed);
    assert!(!w.status("a").ready);
    let asked = |w: &World| w.log.iter().filter(|e| matches!(e, Effect::Probe { .. })).count();
    let before = asked(&w);
    w.run_for(7_000);
    assert_eq!((asked(&w), w.status("a").ready), (before, false));
    // The engine did not stop it, and nobody knows how it is.
    w.carry_out(stop, Luck::Fails);
    let failed = w.answers.pop().unwrap();
    w.tell(failed);
    w.look();
    assert_eq!((w.status("a").phase(), w.status("a").ready), (ReplicaPhase::Running, false));
    w.run_for(10_000);
    assert_eq!((w.running(), w.status("b").ready), (vec!["b"], true));
}

#[test]
fn one_that_serves_stays_ready_while_an_older_one_of_it_is_stopped() {
    let mut w = World::new();
    w.want(&[Want { checked: true, ..want("a") }]);
    w.run_for(2_000);
    w.end("a", 1);
    w.run_for(20_000);
    let newest = w.of("a").unwrap().clone();
    assert!(newest.attempt == 2 && w.status("a").ready);
    // Somebody starts a copy of the one before.
    let older = Container { id: "older".into(), attempt: 1, ..newest };
    w.containers.insert(older.id.clone(), older);
    w.look();
    let is_stop = |e: &Effect| matches!(e, Effect::Stop { id, .. } if id == "older");
    let stop = w.asked.iter().position(is_stop).map(|at| w.asked.remove(at)).unwrap();
    assert!(w.status("a").ready);
    w.run_for(10_000);
    assert!(w.status("a").ready, "and goes on being asked");
    w.carry_out(stop, Luck::Good);
    w.run_for(5_000);
    assert_eq!((w.running(), w.status("a").ready), (vec!["a"], true));
}
