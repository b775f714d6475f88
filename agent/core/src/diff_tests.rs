use super::*;
use crate::ledger::HeldSet;
use berth_proto::agent::{self, Replaces};
use berth_proto::api;
use berth_proto::ids::Digest;
use prost::Message as _;
use std::sync::Arc;

fn body(never: bool) -> Vec<u8> {
    let digest = Digest::of(b"image").to_string();
    let mut spec = api::DeploymentSpec {
        source: Some(api::deployment_spec::Source::Image("i".into())),
        ..Default::default()
    };
    if never {
        spec.restart = Some(api::RestartPolicy { condition: 3, ..Default::default() });
    }
    agent::AssignmentBody {
        deployment_uid: "d".into(),
        deployment: "d".into(),
        namespace: "default".into(),
        release: 1,
        source: Some(api::ResolvedSource {
            image: Some(api::ResolvedImage { digest, ..Default::default() }),
            ..Default::default()
        }),
        spec: Some(spec),
        ..Default::default()
    }
    .encode_to_vec()
}

fn set(entries: &[(&str, Option<&str>)], never: bool) -> Wanted {
    let bytes = body(never);
    let digest = Digest::of(&bytes);
    let entries = entries
        .iter()
        .map(|(uid, replaces)| SetEntry {
            replica_uid: (*uid).into(),
            body_digest: digest.to_string(),
            replaces: replaces
                .map(|old| Replaces { replica_uid: old.into(), ready_within_ms: 1_000 }),
            ..Default::default()
        })
        .collect();
    let sent = BTreeMap::from([(digest, bytes)]);
    let set = crate::ledger::build(
        Default::default(),
        String::new(),
        entries,
        sent,
        &Wanted::NotYetKnown,
    );
    Wanted::Set(Arc::new(set.unwrap()))
}

fn uid(text: &str) -> ReplicaUid {
    text.parse().unwrap()
}

fn container(replica: &str, attempt: u32, state: State) -> Container {
    Container {
        id: format!("{replica}-{attempt}"),
        replica: uid(replica),
        attempt,
        state,
        started: None,
        grace_ms: 10_000,
        labels: Labels::default(),
    }
}

fn exited(code: i32) -> State {
    State::Exited { code, out_of_memory: false, time: Wall(0) }
}

fn here() -> Memory {
    Memory { bytes_here: true, ..Memory::default() }
}

fn seen(containers: &[Container]) -> Seen {
    let mut all = Seen::new();
    for c in containers.iter().rev() {
        all.entry(c.replica.clone()).or_default().push(c.clone());
    }
    for list in all.values_mut() {
        list.sort_by_key(|c| std::cmp::Reverse(c.attempt));
    }
    all
}

fn with(list: &[(&str, Memory)]) -> BTreeMap<ReplicaUid, Memory> {
    list.iter().map(|(name, memory)| (uid(name), memory.clone())).collect()
}

fn steps(
    wanted: &Wanted,
    containers: &[Container],
    memory: &[(&str, Memory)],
    now: u64,
) -> Vec<Step> {
    diff(wanted, &seen(containers), &with(memory), Mono(now)).steps
}

#[test]
fn silence_removes_nothing_and_the_empty_set_does() {
    let running = [container("a", 1, State::Running)];
    assert!(steps(&Wanted::NotYetKnown, &running, &[], 0).is_empty());
    let empty = Wanted::Set(Arc::new(HeldSet::default()));
    assert_eq!(
        steps(&empty, &running, &[], 0),
        [Step::Stop { replica: uid("a"), id: "a-1".into() }]
    );
    assert_eq!(
        steps(&empty, &[container("a", 1, exited(0))], &[], 0),
        [Step::Remove { replica: uid("a"), id: "a-1".into() }]
    );
    assert_eq!(steps(&empty, &[], &[("a", here())], 0), [Step::Absent(uid("a"))]);
}

#[test]
fn bytes_come_before_the_container_and_one_that_was_made_is_started() {
    let a = set(&[("a", None)], false);
    assert_eq!(steps(&a, &[], &[], 0), [Step::Fetch(uid("a"))]);
    assert_eq!(
        steps(&a, &[], &[("a", here())], 0),
        [Step::Create { replica: uid("a"), attempt: 1 }]
    );
    assert_eq!(
        steps(&a, &[container("a", 1, State::Created)], &[("a", here())], 0),
        [Step::Start { replica: uid("a"), id: "a-1".into() }]
    );
    assert!(steps(&a, &[container("a", 1, State::Running)], &[("a", here())], 0).is_empty());
}

#[test]
fn attempts_only_grow_whatever_was_lost() {
    let a = set(&[("a", None)], false);
    let forgot = Memory { exit_taken: 3, ..here() };
    assert_eq!(
        steps(&a, &[container("a", 3, exited(1))], &[("a", forgot)], 0),
        [Step::Create { replica: uid("a"), attempt: 4 }]
    );
    let engine_forgot = Memory { attempt: 7, exit_taken: 7, ..here() };
    assert_eq!(
        steps(&a, &[], &[("a", engine_forgot)], 0),
        [Step::Create { replica: uid("a"), attempt: 8 }]
    );
}

#[test]
fn two_that_run_become_one() {
    let a = set(&[("a", None)], false);
    let both = [container("a", 1, State::Running), container("a", 2, State::Running)];
    assert_eq!(
        steps(&a, &both, &[("a", here())], 0),
        [Step::Stop { replica: uid("a"), id: "a-1".into() }]
    );
}

#[test]
fn an_end_is_taken_in_once_and_waited_for() {
    let a = set(&[("a", None)], false);
    let dead = [container("a", 1, exited(1))];
    let taken = steps(&a, &dead, &[("a", here())], 100);
    let [Step::TakeExit { attempt: 1, memory, .. }] = taken.as_slice() else { panic!("{taken:?}") };
    assert_eq!(memory.not_before, Some(Mono(1_100)));
    let waits = diff(&a, &seen(&dead), &with(&[("a", memory.clone())]), Mono(500));
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(Mono(1_100))));
    assert_eq!(
        steps(&a, &dead, &[("a", memory.clone())], 1_100),
        [Step::Create { replica: uid("a"), attempt: 2 }]
    );
}

#[test]
fn what_shall_not_be_started_again_is_left() {
    let a = set(&[("a", None)], true);
    let dead = [container("a", 1, exited(0))];
    let taken = steps(&a, &dead, &[("a", here())], 0);
    let [Step::TakeExit { memory, .. }] = taken.as_slice() else { panic!("{taken:?}") };
    assert!(memory.finished);
    assert!(steps(&a, &dead, &[("a", memory.clone())], 999_999).is_empty());
}

#[test]
fn what_its_check_ended_is_started_again_even_when_its_policy_is_never() {
    let a = set(&[("a", None)], true);
    let sick = Memory { must_restart: true, ..here() };
    let taken = steps(&a, &[container("a", 1, exited(0))], &[("a", sick)], 0);
    let [Step::TakeExit { memory, .. }] = taken.as_slice() else { panic!("{taken:?}") };
    assert!(!memory.finished && memory.not_before.is_some() && !memory.must_restart);
}

#[test]
fn one_dead_predecessor_is_kept_for_its_logs() {
    let a = set(&[("a", None)], false);
    let dead = |n| container("a", n, exited(1));
    let memory = Memory { exit_taken: 3, attempt: 3, ..here() };
    let all = [dead(1), dead(2), dead(3), container("a", 4, State::Running)];
    assert_eq!(
        steps(&a, &all, &[("a", memory)], 0),
        [
            Step::Remove { replica: uid("a"), id: "a-2".into() },
            Step::Remove { replica: uid("a"), id: "a-1".into() },
        ]
    );
}

#[test]
fn one_that_was_made_late_is_removed_and_never_started_beside_the_one_that_runs() {
    let a = set(&[("a", None)], false);
    for late in [1, 3] {
        let both = [container("a", 2, State::Running), container("a", late, State::Created)];
        assert_eq!(
            steps(&a, &both, &[("a", here())], 0),
            [Step::Remove { replica: uid("a"), id: format!("a-{late}") }]
        );
    }
}

fn replacing() -> Memory {
    Memory { replacement_begun: true, replace_until: Some(Mono(1_100)), ..here() }
}

#[test]
fn a_replacement_stops_the_old_one_only_once_its_bytes_are_here_and_that_is_remembered() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let old = [container("old", 1, State::Running)];
    let memory = |new: Memory| [("old", here()), ("new", new)];
    assert_eq!(steps(&both, &old, &memory(Memory::default()), 0), [Step::Fetch(uid("new"))]);
    let begins = steps(&both, &old, &memory(here()), 0);
    let [Step::Remember { replica, memory: begun }] = begins.as_slice() else {
        panic!("{begins:?}")
    };
    assert!(*replica == uid("new") && begun.replacement_begun && begun.replace_until.is_some());
    // That it is stopped for another is remembered as well.
    let stopping = Memory { stopping: 1, ..here() };
    let first = steps(&both, &old, &memory(begun.clone()), 0);
    assert_eq!(first, [Step::Remember { replica: uid("old"), memory: stopping.clone() }]);
    // After a restart of the agent, too: the bytes are looked for again, the old one stays down.
    let again = Memory { bytes_here: false, ..begun.clone() };
    for new in [begun.clone(), again] {
        let all = steps(&both, &old, &[("old", stopping.clone()), ("new", new)], 0);
        assert!(all.contains(&Step::Stop { replica: uid("old"), id: "old-1".into() }), "{all:?}");
        assert!(!all.iter().any(|s| matches!(s, Step::Create { .. })), "{all:?}");
    }
    let down = [container("old", 1, exited(0))];
    let taken = [("old", Memory { exit_taken: 1, ..here() }), ("new", begun.clone())];
    assert_eq!(steps(&both, &down, &taken, 0), [Step::Create { replica: uid("new"), attempt: 1 }]);
}

#[test]
fn a_replacement_that_was_made_before_all_memory_was_lost_goes_on() {
    let wanted = set(&[("old", None), ("new", Some("old"))], false);
    let containers = [container("old", 1, State::Running), container("new", 1, State::Created)];
    assert_eq!(steps(&wanted, &containers, &[], 0), [Step::Fetch(uid("new"))]);
    let begun = steps(&wanted, &containers, &[("new", here())], 0);
    let remembers =
        |step: &Step| matches!(step, Step::Remember { memory, .. } if memory.replacement_begun);
    assert!(begun.iter().any(remembers), "{begun:?}");
}

#[test]
fn being_put_down_for_another_is_no_failure_and_finishes_nothing() {
    let both = set(&[("old", None), ("new", Some("old"))], true);
    let down = [container("old", 1, exited(0))];
    let all = steps(&both, &down, &[("old", here()), ("new", replacing())], 0);
    let taken = all.iter().find_map(|s| match s {
        Step::TakeExit { memory, .. } => Some(memory),
        _ => None,
    });
    assert_eq!(taken, Some(&Memory { exit_taken: 1, attempt: 1, ..here() }));
}

#[test]
fn one_that_failed_by_itself_before_it_was_put_down_is_waited_after_when_it_comes_back() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let down = [container("old", 1, exited(1))];
    let taken = |old: Memory| {
        let all = steps(&both, &down, &[("old", old), ("new", replacing())], 0);
        let taken = all.iter().find_map(|step| match step {
            Step::TakeExit { memory, .. } => Some(memory.clone()),
            _ => None,
        });
        taken.unwrap()
    };
    let failed = taken(here());
    assert!(failed.failures == 1 && failed.not_before.is_some() && !failed.finished);
    let stopped = taken(Memory { stopping: 1, ..here() });
    assert!(stopped.failures == 0 && stopped.not_before.is_none());
}

#[test]
fn one_that_was_stopped_for_another_that_is_not_wanted_any_more_is_started_again() {
    // Its policy is not to start again, which speaks of ends of its own.
    let alone = set(&[("old", None)], true);
    let stopped = Memory { stopping: 1, ..here() };
    let down = [container("old", 1, exited(0))];
    let all = steps(&alone, &down, &[("old", stopped.clone())], 0);
    let [Step::TakeExit { memory, .. }] = all.as_slice() else { panic!("{all:?}") };
    assert!(!memory.finished && memory.failures == 0 && memory.not_before.is_none());
    // One that was not stopped after all may end by itself.
    let runs = [container("old", 1, State::Running)];
    let cleared = Memory { stopping: 0, ..here() };
    assert_eq!(
        steps(&alone, &runs, &[("old", stopped.clone())], 0),
        [Step::Remember { replica: uid("old"), memory: cleared.clone() }]
    );
    // A stop that an agent has asked for which died since may still come.
    let since = Memory { stopping_since: Some(Mono(0)), ..stopped };
    assert_eq!(steps(&alone, &runs, &[("old", since.clone())], 1_000), []);
    assert_eq!(steps(&alone, &runs, &[("old", since)], 600_000).len(), 1);
    let all = steps(&alone, &down, &[("old", cleared)], 0);
    let [Step::TakeExit { memory, .. }] = all.as_slice() else { panic!("{all:?}") };
    assert!(memory.finished);
}

#[test]
fn a_replaced_replica_comes_back_when_the_new_one_is_down_after_not_being_ready_in_time() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let there = [container("old", 1, exited(0)), container("new", 1, State::Running)];
    let old = Memory { exit_taken: 1, ..here() };
    let memory = |new: &Memory| with(&[("old", old.clone()), ("new", new.clone())]);
    let waits = diff(&both, &seen(&there), &memory(&replacing()), Mono(500));
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(Mono(1_100))));
    let late = diff(&both, &seen(&there), &memory(&replacing()), Mono(1_100)).steps;
    let [Step::Remember { memory: failed, .. }] = late.as_slice() else { panic!("{late:?}") };
    assert!(failed.rolled_back);
    assert_eq!(
        diff(&both, &seen(&there), &memory(failed), Mono(1_101)).steps,
        [Step::Stop { replica: uid("new"), id: "new-1".into() }]
    );
    let down = [container("old", 1, exited(0)), container("new", 1, exited(1))];
    assert_eq!(
        diff(&both, &seen(&down), &memory(failed), Mono(1_102)).steps,
        [
            Step::Remove { replica: uid("new"), id: "new-1".into() },
            Step::Create { replica: uid("old"), attempt: 2 },
        ]
    );
}

#[test]
fn a_replacement_that_never_gets_to_start_fails_as_well() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let down = [container("old", 1, exited(0))];
    let memory = [("old", Memory { exit_taken: 1, ..here() }), ("new", replacing())];
    let all = steps(&both, &down, &memory, 1_100);
    let [Step::Remember { memory, .. }] = all.as_slice() else { panic!("{all:?}") };
    assert!(memory.rolled_back);
}

#[test]
fn a_replacement_that_was_ready_in_time_is_done_for_good() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let there = [container("new", 1, State::Running)];
    // Without a check it has to have run for half of its time.
    let ready = Memory { ready_since: Some(Mono(100)), ready: true, ..replacing() };
    let waits = diff(&both, &seen(&there), &with(&[("new", ready.clone())]), Mono(599));
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(Mono(600))));
    let done = steps(&both, &there, &[("new", ready)], 600);
    let [Step::Remember { memory, .. }] = done.as_slice() else { panic!("{done:?}") };
    assert!(memory.replacement_done);
    let later = Memory { ready: false, ..memory.clone() };
    assert!(steps(&both, &there, &[("new", later)], 99_999).is_empty());
}

#[test]
fn one_that_comes_back_waits_for_its_withdrawn_replacement_to_be_gone() {
    // `new` took the place of `old` and is not wanted any more: only its memory tells of the pair.
    let there = [container("old", 1, exited(0)), container("new", 1, State::Running)];
    let new = Memory { replaces: Some(uid("old")), replacement_done: true, ..here() };
    let old = Memory { exit_taken: 1, ..here() };
    let memory = [("old", old.clone()), ("new", new.clone())];
    let stop = Step::Stop { replica: uid("new"), id: "new-1".into() };
    let alone = set(&[("old", None)], false);
    assert_eq!(steps(&alone, &there, &memory, 0), std::slice::from_ref(&stop));
    // Nor does another one that takes the same place start beside it.
    let next = set(&[("old", None), ("next", Some("old"))], false);
    let begun = [("old", old), ("new", new), ("next", replacing())];
    assert_eq!(steps(&next, &there, &begun, 0), std::slice::from_ref(&stop));
    let gone = [container("old", 1, exited(0))];
    let create = Step::Create { replica: uid("next"), attempt: 1 };
    assert!(steps(&next, &gone, &begun, 0).contains(&create));
}

#[test]
fn two_that_a_set_names_side_by_side_run_so_whatever_is_remembered_of_them() {
    // A restored ledger wants again what had been replaced, and the other was adopted.
    let both = set(&[("old", None), ("new", None)], false);
    let there = [container("old", 1, State::Running), container("new", 1, exited(0))];
    let new = Memory {
        replaces: Some(uid("old")),
        replacement_done: true,
        attempt: 1,
        exit_taken: 1,
        ..here()
    };
    let create = Step::Create { replica: uid("new"), attempt: 2 };
    assert_eq!(steps(&both, &there, &[("new", new)], 0), [create]);
}

#[test]
fn one_that_somebody_started_again_after_its_end_was_taken_in_is_stopped() {
    let a = set(&[("a", None)], false);
    let again = [container("a", 1, State::Running)];
    let taken = Memory { attempt: 1, exit_taken: 1, ..here() };
    let stop = [Step::Stop { replica: uid("a"), id: "a-1".into() }];
    assert_eq!(steps(&a, &again, &[("a", taken.clone())], 0), stop);
    let next = [container("a", 2, State::Running)];
    assert!(steps(&a, &next, &[("a", taken)], 0).is_empty());
}
