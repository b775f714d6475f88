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
            artifact: None,
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
    Container { id: format!("{replica}-{attempt}"), replica: uid(replica), attempt, state }
}

fn exited(code: i32) -> State {
    State::Exited { code, out_of_memory: false, time: Wall(0) }
}

fn here() -> Memory {
    Memory { bytes_here: true, ..Memory::default() }
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
    diff(wanted, containers, &with(memory), Mono(now)).steps
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
    let waits = diff(&a, &dead, &with(&[("a", memory.clone())]), Mono(500));
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
fn a_replacement_stops_the_old_one_only_once_its_bytes_are_here() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let old = [container("old", 1, State::Running)];
    assert_eq!(steps(&both, &old, &[("old", here())], 0), [Step::Fetch(uid("new"))]);
    assert_eq!(
        steps(&both, &old, &[("old", here()), ("new", here())], 0),
        [Step::Stop { replica: uid("old"), id: "old-1".into() }]
    );
    assert_eq!(
        steps(&both, &[container("old", 1, exited(0))], &[("old", here()), ("new", here())], 0),
        [Step::Create { replica: uid("new"), attempt: 1 }]
    );
}

#[test]
fn a_replaced_replica_comes_back_when_the_new_one_is_not_ready_in_time() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let there = [container("old", 1, exited(0)), container("new", 1, State::Running)];
    let started = Memory { first_started: Some(Mono(100)), ..here() };
    let old = Memory { exit_taken: 1, ..here() };
    let waits =
        diff(&both, &there, &with(&[("old", old.clone()), ("new", started.clone())]), Mono(500));
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(Mono(1_100))));
    let late = steps(&both, &there, &[("old", old.clone()), ("new", started)], 1_100);
    let [Step::Remember { memory, .. }] = late.as_slice() else { panic!("{late:?}") };
    assert!(memory.rolled_back);
    let back = steps(&both, &there, &[("old", old), ("new", memory.clone())], 1_101);
    assert_eq!(
        back,
        [
            Step::Stop { replica: uid("new"), id: "new-1".into() },
            Step::Create { replica: uid("old"), attempt: 2 },
        ]
    );
}

#[test]
fn a_replacement_that_was_ready_in_time_is_done_for_good() {
    let both = set(&[("old", None), ("new", Some("old"))], false);
    let there = [container("new", 1, State::Running)];
    let ready = Memory { first_started: Some(Mono(0)), ready: true, ..here() };
    let done = steps(&both, &there, &[("new", ready)], 10);
    let [Step::Remember { memory, .. }] = done.as_slice() else { panic!("{done:?}") };
    assert!(memory.replacement_done);
    let later = Memory { ready: false, ..memory.clone() };
    assert!(steps(&both, &there, &[("new", later)], 99_999).is_empty());
}
