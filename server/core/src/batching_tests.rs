use super::*;
use crate::objects::Replica;
use berth_proto::record;
use std::sync::Arc;

fn replica(uid: &str, host: &str) -> Change {
    Change::PutReplica(Arc::new(
        Replica::new(&record::ReplicaRecord {
            uid: uid.into(),
            deployment_uid: "d".into(),
            host_uid: host.into(),
            intent: 1,
            ..Default::default()
        })
        .unwrap(),
    ))
}

fn change(changes: Vec<Change>) -> Proposal {
    Proposal { preconditions: vec![], changes }
}

fn persist_token(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|e| match e {
        Effect::Persist { token, .. } => Some(*token),
        Effect::Acknowledge { .. } | Effect::Reject { .. } | Effect::Publish { .. } => None,
    })
}

fn acknowledged(effects: &[Effect]) -> Vec<u64> {
    effects
        .iter()
        .filter_map(|e| match e {
            Effect::Acknowledge { id, .. } => Some(*id),
            Effect::Persist { .. } | Effect::Reject { .. } | Effect::Publish { .. } => None,
        })
        .collect()
}

#[test]
fn nothing_is_acknowledged_before_it_is_durable_and_a_group_gathers_meanwhile() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let first = b.propose(1, change(vec![replica("a", "h")]));
    let token = persist_token(&first).unwrap();
    assert!(acknowledged(&first).is_empty());
    for id in 2..5 {
        assert!(b.propose(id, change(vec![replica(&format!("r{id}"), "h")])).is_empty());
    }
    assert_eq!(b.durable().revision, Revision(0));
    assert_eq!(b.ahead().revision, Revision(4));
    let out = b.persisted(token);
    assert_eq!(acknowledged(&out), [1]);
    let out = b.persisted(persist_token(&out).unwrap());
    assert_eq!(acknowledged(&out), [2, 3, 4]);
    assert_eq!(b.durable().revision, Revision(4));
}

#[test]
fn a_change_of_a_hosts_replicas_raises_its_generation_in_the_same_batch() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let host: HostUid = "h".parse().unwrap();
    b.propose(1, change(vec![replica("a", "h"), replica("b", "h")]));
    assert_eq!(b.ahead().generation(&host), Generation(1));
    // The same again changes no set.
    b.propose(2, change(vec![replica("a", "h")]));
    assert_eq!(b.ahead().generation(&host), Generation(1));
    b.propose(3, change(vec![Change::DeleteReplica("a".parse().unwrap())]));
    assert_eq!(b.ahead().generation(&host), Generation(2));
}

#[test]
fn a_precondition_is_checked_against_what_was_submitted() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let key = ObjectKey::Replica("a".parse().unwrap());
    let create = |id: u64, b: &mut Batching| {
        b.propose(
            id,
            Proposal {
                preconditions: vec![Precondition::At(key.clone(), Revision(0))],
                changes: vec![replica("a", "h")],
            },
        )
    };
    assert!(persist_token(&create(1, &mut b)).is_some());
    assert!(matches!(
        create(2, &mut b).as_slice(),
        [Effect::Reject { id: 2, why: Refusal::Conflict { found: Revision(1), .. } }]
    ));
}

#[test]
fn a_proposal_too_large_for_one_commit_is_refused_and_changes_nothing() {
    let changes = || (0..=Limits::ANY.ops).map(|i| replica(&format!("r{i}"), "h")).collect();
    let mut b = Batching::new(View::default(), Limits::ANY);
    assert!(matches!(
        b.propose(1, change(changes())).as_slice(),
        [Effect::Reject { why: Refusal::TooLarge { .. }, .. }]
    ));
    assert_eq!(b.ahead().revision, Revision(0));
    // The same fits where the store takes more.
    let mut b = Batching::new(View::default(), Limits::JOURNAL);
    assert!(persist_token(&b.propose(1, change(changes()))).is_some());
    let large = berth_proto::api::Event {
        message: "x".repeat(Limits::JOURNAL.bytes),
        ..Default::default()
    };
    assert!(matches!(
        b.propose(2, change(vec![Change::AppendEvent(large)])).as_slice(),
        [Effect::Reject { id: 2, why: Refusal::TooLarge { .. } }]
    ));
}

#[test]
fn a_full_disk_takes_back_what_was_submitted_and_the_machine_goes_on() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let token = persist_token(&b.propose(1, change(vec![replica("a", "h")]))).unwrap();
    b.propose(2, change(vec![replica("b", "h")]));
    let out = b.full(token);
    assert_eq!(out.len(), 2);
    assert_eq!(b.ahead().revision, Revision(0));
    let token = persist_token(&b.propose(3, change(vec![replica("c", "h")]))).unwrap();
    // Still full: whoever waited is told as well.
    assert!(matches!(b.full(token).as_slice(), [Effect::Reject { id: 3, why: Refusal::Full }]));
    let token = persist_token(&b.propose(4, change(vec![replica("c", "h")]))).unwrap();
    let out = b.persisted(token);
    let token = persist_token(&out).unwrap();
    assert!(acknowledged(&out).is_empty());
    assert_eq!(acknowledged(&b.persisted(token)), [4]);
    assert!(b.durable().replica(&"c".parse().unwrap()).is_some());
}

#[test]
fn what_was_decided_by_something_a_full_disk_has_taken_back_is_refused() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let of = |uid: &str| ObjectKey::Replica(uid.parse().unwrap());
    let first = b.propose(1, change(vec![replica("a", "h")]));
    let token = persist_token(&first).unwrap();
    b.propose(2, change(vec![replica("b", "h")]));
    // Somebody reads it, and is slow.
    let read = b.ahead().revision_of(&of("b"));
    let late = Proposal {
        preconditions: vec![Precondition::At(of("b"), read)],
        changes: vec![replica("b", "elsewhere")],
    };
    b.full(token);
    // Meanwhile others write as many objects, among them that one.
    let out = b.propose(3, change(vec![replica("x", "h")]));
    b.propose(4, change(vec![replica("b", "other")]));
    let (mut out, mut done) = (out, Vec::new());
    while let Some(token) = persist_token(&out) {
        out = b.persisted(token);
        done.extend(acknowledged(&out));
    }
    assert_eq!(done, [3, 4]);
    assert!(b.durable().revision_of(&of("b")) > read);
    let out = b.propose(5, late);
    let refused = |e: &Effect| matches!(e, Effect::Reject { why: Refusal::Conflict { .. }, .. });
    assert!(out.iter().all(refused) && !out.is_empty(), "{out:?}");
}

#[test]
fn a_revision_is_given_once_however_often_the_disk_is_full() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let mut greatest = Revision(0);
    for round in 0..5 {
        let out = b.propose(2 * round, change(vec![replica("a", "h")]));
        let mut token = persist_token(&out).unwrap();
        if round > 0 {
            // Those of before are passed over first, and then the disk is full again.
            token = persist_token(&b.persisted(token)).unwrap();
        }
        assert!(b.ahead().revision > greatest, "a number is given once");
        greatest = b.ahead().revision;
        b.full(token);
    }
}

#[test]
fn what_was_decided_from_what_a_full_disk_took_back_is_refused_and_what_is_newer_is_not() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let decided = |seen: Revision, name: &str| Proposal {
        preconditions: vec![Precondition::Standing(seen)],
        changes: vec![replica(name, "h")],
    };
    let before = b.ahead().revision;
    let token = persist_token(&b.propose(1, change(vec![replica("a", "h")]))).unwrap();
    let seen = b.ahead().revision;
    b.full(token);
    // Both wait until the number that is gone is passed over.
    let token = persist_token(&b.propose(2, decided(seen, "b"))).unwrap();
    assert!(b.propose(3, decided(before, "c")).is_empty());
    let out = b.persisted(token);
    let refused = |id| {
        out.iter()
            .any(|e| matches!(e, Effect::Reject { id: of, why: Refusal::TakenBack } if *of == id))
    };
    assert!(refused(2) && !refused(3), "{out:?}");
    // No view that is there now has the number of one that is gone.
    assert!(b.durable().revision > seen && b.ahead().revision > seen);
    let names: Vec<_> = b.ahead().replicas().map(|r| r.uid.to_string()).collect();
    assert_eq!(names, ["c"]);
    let now = b.ahead().revision;
    let out = b.propose(4, decided(now, "d"));
    assert!(!out.iter().any(|e| matches!(e, Effect::Reject { .. })), "{out:?}");
}

#[test]
fn numbers_that_were_taken_back_are_passed_over_in_groups_and_who_waits_is_answered_in_order() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let token = persist_token(&b.propose(0, change(vec![replica("a", "h")]))).unwrap();
    // More than two groups of numbers are given, and taken back.
    let given = 2 * MAX_GROUP as u64 + 10;
    for id in 1..given {
        b.propose(id, change(vec![replica(&format!("r{id}"), "h")]));
    }
    assert_eq!(b.full(token).len() as u64, given, "each is told");
    let mut out = b.propose(9_001, change(vec![replica("x", "h")]));
    out.extend(b.propose(9_002, change(vec![replica("y", "h")])));
    let (mut groups, mut done) = (0, Vec::new());
    while let Some(token) = persist_token(&out) {
        groups += 1;
        out = b.persisted(token);
        done.extend(acknowledged(&out));
    }
    assert_eq!(done, [9_001, 9_002]);
    // Three of nothing, one with the first, and one with what came while it was written.
    assert_eq!(groups, 5);
    assert_eq!(b.durable().revision, Revision(given + 3));
}

#[test]
fn those_who_wait_behind_a_full_disk_are_bounded_and_told_when_the_store_fails() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let token = persist_token(&b.propose(0, change(vec![replica("a", "h")]))).unwrap();
    b.full(token);
    let refused = |out: &[Effect], reason: &Refusal| {
        out.iter().filter(|e| matches!(e, Effect::Reject { why, .. } if why == reason)).count()
    };
    for id in 1..=MAX_WAITING as u64 {
        let out = b.propose(id, change(vec![replica("b", "h")]));
        assert_eq!(refused(&out, &Refusal::Busy), 0);
    }
    let more = b.propose(u64::MAX, change(vec![replica("b", "h")]));
    assert_eq!(refused(&more, &Refusal::Busy), 1);
    assert_eq!(refused(&b.failed(), &Refusal::Failed), MAX_WAITING);
}

#[test]
fn after_a_failed_store_nobody_is_acknowledged() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    b.propose(1, change(vec![replica("a", "h")]));
    let out = b.failed();
    assert!(matches!(out.as_slice(), [Effect::Reject { id: 1, why: Refusal::Failed }]));
    assert!(acknowledged(&b.persisted(1)).is_empty());
    assert!(matches!(
        b.propose(2, change(vec![])).as_slice(),
        [Effect::Reject { why: Refusal::Failed, .. }]
    ));
}

#[test]
fn what_is_stored_loads_back_to_the_same_view() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let event = berth_proto::api::Event::default();
    let token = persist_token(&b.propose(
        1,
        change(vec![replica("a", "h"), replica("b", "g"), Change::AppendEvent(event)]),
    ))
    .unwrap();
    let mut stored: std::collections::BTreeMap<Vec<u8>, (Revision, Vec<u8>)> = Default::default();
    for effect in b.persisted(token) {
        if let Effect::Publish { changes, .. } = effect {
            for (revision, change) in changes {
                let (key, value) = change.encode();
                match value {
                    Some(value) => stored.insert(key, (revision, value)),
                    None => stored.remove(&key),
                };
            }
        }
    }
    let view = View::load(stored.into_iter().map(|(k, (r, v))| (k, r, v))).unwrap();
    let all = |v: &View| v.replicas().cloned().collect::<Vec<_>>();
    assert_eq!(all(&view), all(b.durable()));
    assert_eq!(view.next_event, b.durable().next_event);
    assert_eq!(view.generation(&"h".parse().unwrap()), Generation(1));
    assert_eq!(view.rebuilt_capacity().contents().used.len(), 2);
}

#[test]
fn two_moves_of_an_alias_in_one_millisecond_are_two() {
    let mut b = Batching::new(View::default(), Limits::ANY);
    let moved = |to: &str| {
        let time = Some(berth_proto::convert::timestamp(berth_proto::ids::Wall(9)));
        let to_version = to.to_owned();
        let moved = berth_proto::api::AliasMove {
            alias: "a".into(),
            to_version,
            time,
            ..Default::default()
        };
        let record =
            record::AliasMoveRecord { model_uid: "m".into(), r#move: Some(moved), revision: 0 };
        change(vec![Change::AppendAliasMove(record)])
    };
    let first = b.propose(1, moved("1"));
    b.propose(2, moved("2"));
    let second = b.persisted(persist_token(&first).unwrap());
    let keys: Vec<Vec<u8>> = [first, second]
        .iter()
        .flatten()
        .filter_map(|e| if let Effect::Persist { batches, .. } = e { Some(batches) } else { None })
        .flatten()
        .flat_map(|batch| batch.ops.iter().map(|(key, _)| key.clone()))
        .collect();
    assert_eq!(keys.len(), 2);
    assert!(keys[0] < keys[1], "in the order of their moves: {keys:?}");
}
