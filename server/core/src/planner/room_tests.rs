//! Claims about what is placed, kept and moved where there is hardly room, or none.

use super::tests::edit_host;
use super::*;
use crate::audit;
use crate::change::Change;
use crate::miniature::World;
use berth_proto::api::{self, RolloutState};
use berth_proto::values::Phase;

#[test]
fn a_release_that_fits_nowhere_fails_with_the_words_of_the_hosts() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    spec.placement = Some(api::Placement { require: vec!["zone=x".into()], spread: String::new() });
    w.apply(spec);
    for _ in 0..200 {
        w.pass(150);
    }
    let reason = &w.deployment().record.reason;
    assert!(reason.ends_with("(2 slots: no host fits: 2 without label zone=x)"), "{reason}");
}

#[test]
fn what_cannot_stand_side_by_side_is_replaced_in_place() {
    let mut w = World::new(1);
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    spec.ports = vec![api::Port {
        name: "http".into(),
        container: 80,
        host_port: 8080,
        bind: "127.0.0.1".into(),
    }];
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec.clone());
    let plan = w.plan();
    assert!(plan.steps.iter().any(|s| s.kind == PlannedStepKind::Replace), "{:?}", plan.steps);
    w.agents();
    w.settle();
    assert_eq!(w.releases_running(), [2]);
    // And when the new one fails, the old one stays.
    w.broken.insert(3);
    spec.source = World::spec("three").source;
    w.apply(spec);
    for _ in 0..20 {
        w.pass(150);
    }
    assert_eq!(w.releases_running(), [2]);
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
}

#[test]
fn a_replacement_that_was_given_back_fails_its_rollout_though_a_host_is_silent() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 900 << 20, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    w.presence(1, Presence::Unknown);
    w.broken.insert(2);
    spec.source = World::spec("two").source;
    w.apply(spec);
    for _ in 0..20 {
        w.pass(150);
    }
    let reason = &w.deployment().record.reason;
    assert!(reason.contains("a replacement did not become ready in time"), "{reason}");
    assert_eq!(w.deployment().release().0, 1);
    assert_eq!(w.releases_running(), [1, 1]);
}

#[test]
fn what_a_late_host_has_given_back_once_is_not_tried_in_its_place_again() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 900 << 20, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    w.presence(1, Presence::Away(w.now.mono));
    spec.source = World::spec("two").source;
    w.apply(spec.clone());
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    // Its rollout is over when the host returns, on which the release does not come up.
    w.broken.insert(2);
    w.presence(1, Presence::Present);
    for _ in 0..20 {
        w.pass(150);
        // Also while what was brought back is not ready yet, and the failed one is still ending.
        w.plan();
    }
    let replaced =
        |w: &World| w.view.replicas_of(&w.uid()).filter(|r| r.replaces.is_some()).count();
    assert_eq!(replaced(&w), 1, "the one on h0");
    let plan = w.plan();
    assert!(plan.is_empty(), "{:?}", plan.steps);
    let words: Vec<&String> = plan.report.pending.keys().collect();
    assert!(matches!(words[..], [one] if one.contains("in the place of what runs")), "{words:?}");
    assert_eq!(w.releases_running(), [1, 2]);
    // What is applied next is tried there.
    spec.source = World::spec("three").source;
    w.apply(spec);
    w.settle();
    assert_eq!(w.releases_running(), [3, 3]);
}

#[test]
fn what_serves_does_not_give_its_place_back_while_another_slot_changes_places() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 900 << 20, ..Default::default() });
    spec.replicas = Some(1);
    // Two that change places stand in the ledger for so long.
    spec.rollout.as_mut().unwrap().ready_for = Some(berth_proto::convert::duration(5_000));
    w.apply(spec.clone());
    for _ in 0..40 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    // More than there is room for.
    spec.source = World::spec("two").source;
    spec.replicas = Some(4);
    w.apply(spec);
    // The one in the place of the first serves, the other one does not.
    let unready = |w: &mut World| {
        let second = w.view.replicas_of(&w.uid()).find(|r| r.slot == 1).unwrap().uid.clone();
        w.report(&second, Phase::Running, false);
    };
    for _ in 0..4 {
        w.pass(150);
        unready(&mut w);
    }
    let serves = w.view.replicas_of(&w.uid()).find(|r| r.replaces.is_some()).unwrap().clone();
    assert!(serves.first_ready.is_some());
    let asked = crate::decide::Asked { actor: "user/test", now: w.now.wall };
    let back = crate::decide::undo(&w.view, w.deployment(), ReleaseNumber(0), &asked).unwrap();
    w.change(back.proposal.changes);
    let plan = w.plan();
    let kinds: Vec<_> = plan.steps.iter().map(|s| (s.kind, s.slot)).collect();
    assert_eq!(kinds, [(PlannedStepKind::Replace, 1)], "and {} stays for now", serves.uid);
    for _ in 0..80 {
        w.pass(150);
    }
    assert_eq!(w.releases_running(), [1, 1]);
}

#[test]
fn what_serves_gives_its_place_back_only_when_the_other_slots_serve() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host, and the first release suits h0 alone.
    spec.resources = Some(api::Resources { memory_bytes: 900 << 20, ..Default::default() });
    spec.placement = Some(api::Placement { require: vec!["zone=a".into()], spread: String::new() });
    spec.replicas = Some(1);
    spec.rollout.as_mut().unwrap().ready_for = Some(berth_proto::convert::duration(5_000));
    w.apply(spec.clone());
    for _ in 0..40 {
        w.pass(150);
    }
    spec.source = World::spec("two").source;
    spec.placement = None;
    spec.replicas = Some(4);
    w.apply(spec);
    let second = |w: &mut World, ready| {
        let uid = w.view.replicas_of(&w.uid()).find(|r| r.slot == 1).unwrap().uid.clone();
        w.report(&uid, Phase::Running, ready);
    };
    for _ in 0..4 {
        w.pass(150);
        second(&mut w, false);
    }
    let asked = crate::decide::Asked { actor: "user/test", now: w.now.wall };
    let back = crate::decide::undo(&w.view, w.deployment(), ReleaseNumber(0), &asked).unwrap();
    w.change(back.proposal.changes);
    assert_eq!(w.plan().steps, [], "or nothing would serve for a while");
    second(&mut w, true);
    let kinds: Vec<_> = w.plan().steps.iter().map(|s| (s.kind, s.slot)).collect();
    assert_eq!(kinds, [(PlannedStepKind::Stop, 0)]);
}

#[test]
fn why_nothing_is_placed_is_said_in_words() {
    let mut w = World::new(3);
    let host = w.view.host(&"h0".parse().unwrap()).unwrap();
    let cordoned = host.edited(|r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: false });
    });
    w.change(vec![Change::PutHost(Arc::new(cordoned.unwrap()))]);
    w.presence(1, Presence::Away(Mono(0)));
    let mut spec = World::spec("one");
    spec.placement = Some(api::Placement { require: vec!["zone=b".into()], spread: String::new() });
    w.apply(spec);
    let plan = w.plan();
    let words: Vec<&String> = plan.report.pending.keys().collect();
    assert_eq!(words, ["no host fits: 1 away, 1 cordoned, 1 without label zone=b"]);
}

#[test]
fn one_too_many_in_a_slot_gives_way_to_a_slot_that_finds_no_room() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 900 << 20, ..Default::default() });
    w.apply(spec);
    w.settle();
    let number = |host: &HostUid| host.as_str()[1..].parse::<u32>().unwrap();
    let on: Vec<(u32, u32)> = w.running.values().map(|(h, _, slot)| (number(h), *slot)).collect();
    let (stays, leaves) = (on[0].0, on[1].0);
    w.presence(leaves, Presence::Away(w.now.mono));
    w.now.mono = w.now.mono.plus_ms(6_000);
    w.settle();
    // It returns just as the other one's host goes for good: both that are left are in one slot.
    edit_host(&mut w, stays, |r| r.removed = true);
    w.live.remove_host(&format!("h{stays}").parse().unwrap());
    w.presence(leaves, Presence::Present);
    let plan = w.plan();
    let kinds: Vec<_> = plan.steps.iter().map(|s| (s.kind, s.slot)).collect();
    assert_eq!(kinds, [(PlannedStepKind::Replace, on[0].1)]);
    w.settle();
    assert_eq!(audit::deployment(&w.view, &w.live, &w.uid()), []);
    let slots: BTreeSet<u32> = w
        .view
        .replicas_of(&w.uid())
        .filter(|r| r.runs() && number(&r.host) != stays)
        .map(|r| r.slot)
        .collect();
    assert_eq!(slots, BTreeSet::from([0, 1]));
}

#[test]
fn no_host_is_given_more_than_it_has() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    spec.replicas = Some(20);
    spec.resources =
        Some(api::Resources { cpu_millis: 100, memory_bytes: 300 << 20, gpu_memory_bytes: 0 });
    w.apply(spec);
    for _ in 0..10 {
        w.pass(150);
    }
    // 1 GiB holds three of 300 MiB.
    assert_eq!(w.running.len(), 6);
    let plan = w.plan();
    assert_eq!(plan.report.pending.keys().collect::<Vec<_>>(), ["no host fits: 2 short of memory"]);
}

/// One host with room for one of 600 MiB and hardly more.
fn tight() -> (World, api::DeploymentSpec) {
    let mut w = World::new(1);
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    let memory_bytes = 600 << 20;
    spec.resources = Some(api::Resources { memory_bytes, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    (w, spec)
}

/// Two hosts, each filled by one of the first release, and a second release that was just applied.
fn renewed_where_one_fills_a_host() -> World {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 600 << 20, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec);
    w
}

#[test]
fn one_that_has_not_yet_taken_its_place_is_not_itself_replaced() {
    let (mut w, mut spec) = tight();
    spec.source = World::spec("two").source;
    w.apply(spec.clone());
    w.plan();
    spec.source = World::spec("three").source;
    w.apply(spec);
    w.plan();
    let replacing = w.view.replicas().filter(|r| r.replaces.is_some()).count();
    assert_eq!(replacing, 1, "the third waits until the first is gone");
    w.settle();
    assert_eq!(w.releases_running(), [3]);
}

#[test]
fn the_last_that_serves_keeps_its_place_while_what_is_missing_is_only_just_started() {
    let mut w = renewed_where_one_fills_a_host();
    let replaced = w.plan().steps;
    assert_eq!(replaced.iter().map(|s| s.kind).collect::<Vec<_>>(), [PlannedStepKind::Replace]);
    w.agents();
    // The host of the other slot goes for good, another one comes, and the rollout goes back.
    let left = replaced[0].host.clone();
    let gone = w.view.hosts().find(|h| h.uid != left).unwrap().clone();
    let removed = gone.edited(|r| r.removed = true).unwrap();
    w.change(vec![Change::PutHost(Arc::new(removed))]);
    w.live.remove_host(&gone.uid);
    w.running.retain(|_, (host, ..)| *host != gone.uid);
    w.host(2, 1 << 30, "a");
    let back = w.deployment().edited(|r| {
        (r.release, r.rollout) = (1, RolloutState::Rolling as i32);
    });
    w.change(vec![Change::PutDeployment(Arc::new(back))]);
    let before = w.view.clone();
    let kinds: Vec<_> = w.plan().steps.iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [PlannedStepKind::Place], "what serves waits for it");
    let floor = |after: &View| audit::floor(&before, after, &w.live, &w.uid(), w.now.mono);
    assert_eq!(floor(&w.view), None);
    let mut stopped = w.view.clone();
    let serves = w.view.replicas().find(|r| r.replaces.is_some()).unwrap();
    let revision = stopped.revision.next();
    stopped.apply(&Change::PutReplica(Arc::new(serves.stopped())), revision);
    assert!(floor(&stopped).is_some(), "else nobody serves");
    w.settle();
    assert_eq!(w.releases_running(), [1, 1]);
}

#[test]
fn the_last_that_serves_keeps_its_place_while_the_others_change_theirs() {
    let mut w = renewed_where_one_fills_a_host();
    w.plan();
    w.agents();
    // What is old in the other slot serves no more, and the one that takes its place does not yet.
    let serves = w.view.replicas().find(|r| r.replaces.is_some()).unwrap().clone();
    let other = w.view.replicas().find(|r| r.slot != serves.slot).unwrap().clone();
    w.report(&other.uid, Phase::Running, false);
    let release = w.view.release(&w.uid(), serves.release).unwrap().number;
    let old = Replica { release, ..Replica::clone(&other) };
    let next = Replica {
        uid: "next".parse().unwrap(),
        replaces: Some(other.uid.clone()),
        first_ready: None,
        ..Replica::clone(&other)
    };
    let back = w.deployment().edited(|r| {
        (r.release, r.rollout) = (1, RolloutState::Rolling as i32);
    });
    w.change(vec![
        Change::PutReplica(Arc::new(old)),
        Change::PutReplica(Arc::new(next)),
        Change::PutDeployment(Arc::new(back)),
    ]);
    let stopped: Vec<_> = w.plan().steps.iter().map(|s| (s.kind, s.slot)).collect();
    assert!(!stopped.contains(&(PlannedStepKind::Stop, serves.slot)), "{stopped:?}");
}

#[test]
fn a_slot_that_finds_no_room_keeps_no_other_from_changing_back() {
    let (mut w, mut spec) = tight();
    spec.source = World::spec("two").source;
    w.apply(spec.clone());
    w.plan();
    w.agents();
    // Two of that size find no room on the one host there is.
    spec.replicas = Some(2);
    w.apply(spec);
    let back = w.deployment().edited(|r| {
        (r.release, r.rollout) = (1, RolloutState::Rolling as i32);
    });
    w.change(vec![Change::PutDeployment(Arc::new(back))]);
    let before = w.view.clone();
    let kinds: Vec<_> = w.plan().steps.iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [PlannedStepKind::Stop]);
    assert_eq!(audit::floor(&before, &w.view, &w.live, &w.uid(), w.now.mono), None);
    w.agents();
    assert_eq!(w.releases_running(), [1]);
}

#[test]
fn a_plan_gives_up_either_what_may_be_unavailable_or_a_place_to_change_back() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.replicas = Some(3);
    let (max_surge, max_unavailable) = (Some(1), Some(1));
    spec.rollout = Some(api::RolloutPolicy { max_surge, max_unavailable, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec);
    // In one slot both releases share a place, the others have the newer one alone.
    let held: Vec<Arc<Replica>> = w.view.replicas().cloned().collect();
    let displaced = held.iter().find(|r| r.slot == 1).unwrap();
    let mut newer: Vec<Replica> = held.iter().map(|r| Replica::clone(r)).collect();
    for replica in &mut newer {
        replica.release = ReleaseNumber(2);
        if replica.slot == 1 {
            replica.uid = "next".parse().unwrap();
            replica.replaces = Some(displaced.uid.clone());
        }
    }
    w.change(newer.iter().map(|r| Change::PutReplica(Arc::new(r.clone()))).collect());
    w.report(&displaced.uid, Phase::Exited, false);
    newer.iter().for_each(|r| w.report(&r.uid, Phase::Running, true));
    w.now.mono = w.now.mono.plus_ms(60_000);
    let back = w.deployment().edited(|r| {
        (r.release, r.rollout) = (1, RolloutState::Rolling as i32);
    });
    w.change(vec![Change::PutDeployment(Arc::new(back))]);
    for what in ["what may be unavailable", "and nothing more until it is gone"] {
        let before = w.view.clone();
        w.plan();
        assert_eq!(audit::floor(&before, &w.view, &w.live, &w.uid(), w.now.mono), None);
        let stopping: Vec<u32> = w.view.replicas().filter(|r| !r.runs()).map(|r| r.slot).collect();
        assert_eq!(stopping, [0], "{what}");
    }
}

#[test]
fn a_change_of_places_on_a_host_that_is_away_holds_up_no_other_one() {
    let mut w = renewed_where_one_fills_a_host();
    let first = w.plan().steps;
    assert_eq!(first.iter().map(|s| s.kind).collect::<Vec<_>>(), [PlannedStepKind::Replace]);
    assert_eq!(w.plan().steps, [], "one after the other");
    let number = first[0].host.as_str()[1..].parse().unwrap();
    w.presence(number, Presence::Away(w.now.mono));
    let next: Vec<_> = w.plan().steps.iter().map(|s| (s.kind, s.slot)).collect();
    assert_eq!(next, [(PlannedStepKind::Replace, 1 - first[0].slot)]);
}
