//! Claims about hosts that are away, lost, drained, new or not heard of.

use super::tests::edit_host;
use super::*;
use crate::change::Change;
use crate::decide::{self, Asked};
use crate::miniature::World;
use berth_proto::api::{self, RolloutState};

#[test]
fn a_short_absence_changes_nothing_and_a_lost_host_is_replaced_once() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let on: HostUid = w.running.values().next().unwrap().0.clone();
    let n: u32 = on.as_str()[1..].parse().unwrap();
    let at = w.now.mono;
    w.presence(n, Presence::Away(at));
    for _ in 0..20 {
        assert!(w.pass(100).is_empty());
    }
    w.now.mono = at.plus_ms(6_000);
    w.settle();
    assert_eq!(w.view.replicas_of(&w.uid()).filter(|r| r.runs()).count(), 3);
    // It returns: one of the two goes, and the slot has one again.
    w.presence(n, Presence::Present);
    w.settle();
    assert_eq!(w.running.len(), 2);
    let slots: BTreeSet<u32> = w.running.values().map(|(_, _, slot)| *slot).collect();
    assert_eq!(slots.len(), 2);
}

#[test]
fn after_a_server_start_nothing_happens_until_hosts_have_spoken() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    w.apply(World::spec("two"));
    w.live = Live::default();
    for _ in 0..200 {
        assert!(w.pass(1000).is_empty());
    }
    for n in 0..3 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
}

#[test]
fn an_away_host_is_deferred_and_does_not_hold_up_the_rollout() {
    let mut w = World::new(2);
    w.apply(World::spec("one"));
    w.settle();
    let at = w.now.mono;
    w.presence(0, Presence::Away(at));
    let mut spec = World::spec("two");
    spec.on_host_loss = Some(api::HostLossPolicy { after: None, action: 2 });
    w.apply(spec);
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    assert_eq!(w.releases_running(), [1, 2]);
    w.presence(0, Presence::Present);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
}

#[test]
fn every_host_gets_one_and_a_new_host_too() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.replicas = None;
    spec.every_host = true;
    w.apply(spec.clone());
    w.settle();
    assert_eq!(w.running.len(), 3);
    w.host(3, 1 << 30, "a");
    w.settle();
    assert_eq!(w.running.len(), 4);
    spec.source = World::spec("two").source;
    w.apply(spec);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2, 2, 2]);
}

#[test]
fn where_no_host_takes_part_it_is_said_why() {
    let mut w = World::new(0);
    let mut spec = World::spec("one");
    (spec.replicas, spec.every_host) = (None, true);
    w.apply(spec);
    let words = |w: &mut World| w.plan().report.pending.into_keys().collect::<Vec<_>>();
    assert_eq!(words(&mut w), ["no host fits: there are none"]);
    w.host(0, 1 << 30, "a");
    let host: HostUid = "h0".parse().unwrap();
    let cordoned = w.view.host(&host).unwrap().edited(|r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: false });
    });
    w.change(vec![Change::PutHost(Arc::new(cordoned.unwrap()))]);
    assert_eq!(words(&mut w), ["no host fits: 1 cordoned"]);
    // One that is away gets it on return.
    let open = w.view.host(&host).unwrap().edited(|r| r.spec = None);
    w.change(vec![Change::PutHost(Arc::new(open.unwrap()))]);
    let at = w.now.mono;
    w.presence(0, Presence::Away(at));
    assert!(words(&mut w).is_empty());
    assert_eq!(w.plan().report.deferred.len(), 1);
}

#[test]
fn a_drained_host_is_left_without_going_below_the_floor() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let on: HostUid = w.running.values().next().unwrap().0.clone();
    let drained = w.view.host(&on).unwrap().edited(|r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: true });
    });
    w.change(vec![Change::PutHost(Arc::new(drained.unwrap()))]);
    w.lowest_ready = usize::MAX;
    w.settle();
    assert!(w.running.values().all(|(host, ..)| *host != on));
    assert_eq!(w.running.len(), 2);
    assert!(w.lowest_ready >= 2);
}

#[test]
fn scaling_and_deleting_end_when_absence_is_confirmed() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let asked = Asked { actor: "user/test", now: w.now.wall };
    let scaled = decide::scale(w.deployment(), 5, &asked).unwrap();
    w.change(scaled.proposal.changes);
    w.settle();
    assert_eq!(w.running.len(), 5);
    let scaled = decide::scale(w.deployment(), 1, &asked).unwrap();
    w.change(scaled.proposal.changes);
    w.settle();
    assert_eq!(w.running.len(), 1);
    let deleted = decide::delete(w.deployment(), &asked).unwrap();
    w.change(deleted.proposal.changes);
    w.presence(0, Presence::Away(Mono(0)));
    w.presence(1, Presence::Away(Mono(0)));
    w.presence(2, Presence::Away(Mono(0)));
    for _ in 0..5 {
        w.pass(100);
    }
    assert!(w.view.deployment(&w.uid()).is_some(), "no host has confirmed absence");
    for n in 0..3 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert!(w.view.deployment(&w.uid()).is_none());
    assert_eq!(w.view.releases_of(&w.uid()).count(), 0);
}

#[test]
fn with_no_host_in_reach_nothing_is_complete_and_nothing_fails() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    w.pass(100);
    let at = w.now.mono;
    for n in 0..2 {
        w.presence(n, Presence::Away(at));
    }
    let mut spec = World::spec("one");
    spec.on_host_loss = Some(api::HostLossPolicy { after: None, action: 2 });
    w.apply(spec);
    for _ in 0..200 {
        w.pass(1000);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
    w.broken.clear();
    for n in 0..2 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
}

#[test]
fn a_standing_deadline_counts_no_time_and_goes_on_where_it_stood() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    w.pass(100);
    w.pass(4_000);
    let left = w.live.clock(&w.uid()).unwrap().left_ms;
    let at = w.now.mono;
    (0..2).for_each(|n| w.presence(n, Presence::Away(at)));
    w.pass(0);
    let standing = w.live.clock(&w.uid()).unwrap().clone();
    assert_eq!((standing.left_ms, standing.running), (left, None));
    // Nothing plans in the meantime, and much of it goes by.
    w.now.mono = w.now.mono.plus_ms(4_000);
    (0..2).for_each(|n| w.presence(n, Presence::Present));
    w.pass(0);
    assert_eq!(w.live.clock(&w.uid()).unwrap().left_ms, left);
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
}

#[test]
fn a_server_that_restarts_does_not_grant_the_deadline_anew() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    let begun = w.now.mono;
    while w.now.mono.since_ms(begun) < 5_000 {
        w.pass(500);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
    // Nothing but the ledger is left, and every host is there again.
    w.live = Live::default();
    (0..2).for_each(|n| w.presence(n, Presence::Present));
    let restarted = w.now.mono;
    while w.deployment().rollout() == RolloutState::Rolling {
        w.pass(500);
        assert!(w.now.mono.since_ms(restarted) < 10_000, "the deadline was granted anew");
    }
    // A restart gives back an eighth of it at the most, and the hosts take a pass to be heard of.
    let took = w.now.mono.since_ms(restarted);
    assert!((4_500..=5_000 + 1_250 + 1_000).contains(&took), "{took}");
    let reason = &w.deployment().record.reason;
    assert!(reason.contains("no replica became healthy within 10s"), "{reason}");
}

#[test]
fn a_slot_that_waits_for_hosts_not_heard_of_fails_no_rollout() {
    let mut w = World::new(2);
    (0..2).for_each(|n| w.presence(n, Presence::Unknown));
    w.apply(World::spec("one"));
    for _ in 0..3 {
        w.pass(20_000);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
    let at = w.now.mono;
    (0..2).for_each(|n| w.presence(n, Presence::Away(at)));
    w.presence(0, Presence::Present);
    w.settle();
    assert_eq!(w.releases_running(), [1, 1]);
}

#[test]
fn a_paused_rollout_says_that_it_moves_nothing_off_a_draining_host() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Paused);
    let on = w.running.values().next().unwrap().0.as_str()[1..].parse().unwrap();
    edit_host(&mut w, on, |r| r.spec = Some(api::HostSpec { cordoned: true, draining: true }));
    let said: Vec<String> = w.plan().report.pending.into_keys().collect();
    assert!(said.iter().any(|why| why.contains("paused")), "{said:?}");
}

#[test]
fn a_rollout_on_every_host_is_not_complete_while_one_that_takes_no_part_has_something_old() {
    let mut w = World::new(1);
    let mut spec = World::spec("one");
    (spec.replicas, spec.every_host) = (None, true);
    w.apply(spec.clone());
    w.settle();
    let host = w.view.hosts().next().unwrap().clone();
    let away = host.edited(|r| r.facts.as_mut().unwrap().engine_available = false).unwrap();
    w.change(vec![Change::PutHost(Arc::new(away))]);
    spec.source = World::spec("two").source;
    w.apply(spec);
    for _ in 0..20 {
        w.pass(100);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
    w.change(vec![Change::PutHost(Arc::new(host.edited(|_| ()).unwrap()))]);
    w.settle();
    assert_eq!((w.deployment().rollout(), w.releases_running()), (RolloutState::Complete, vec![2]));
}

#[test]
fn a_host_that_takes_part_again_gets_its_next_one_only_when_the_one_before_is_gone() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    (spec.replicas, spec.every_host) = (None, true);
    spec.rollout.as_mut().unwrap().max_surge = Some(1);
    w.apply(spec);
    w.settle();
    let drain = |yes| api::HostSpec { cordoned: yes, draining: yes };
    edit_host(&mut w, 0, |r| r.spec = Some(drain(true)));
    let stops = |plan: &Plan| plan.steps.iter().map(|s| s.kind).collect::<Vec<_>>();
    assert_eq!(stops(&w.plan()), [PlannedStepKind::Stop]);
    edit_host(&mut w, 0, |r| r.spec = Some(drain(false)));
    assert_eq!(stops(&w.plan()), [], "the one before still runs there");
    w.agents();
    assert_eq!(stops(&w.plan()), [PlannedStepKind::Place]);
    w.settle();
    assert_eq!(w.releases_running(), [1, 1]);
}

#[test]
fn too_many_on_a_cordoned_host_that_returns_are_looked_at_with_all() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    (spec.replicas, spec.every_host) = (None, true);
    w.apply(spec);
    w.settle();
    // Left by a release that ran several there.
    let one = w.view.replicas_on(&"h0".parse().unwrap()).next().unwrap().clone();
    let uid: ReplicaUid = "second".parse().unwrap();
    w.change(vec![Change::PutReplica(Arc::new(Replica { uid, ..Replica::clone(&one) }))]);
    w.agents();
    edit_host(&mut w, 0, |r| r.spec = Some(api::HostSpec { cordoned: true, draining: false }));
    let host = "h0".parse().unwrap();
    let on_host = plan_host(&w.view, &w.live, &w.uid(), &host, w.now, &mut || unreachable!());
    assert!(on_host.report.whole, "it alone says nothing of the floor");
    w.settle();
    assert_eq!(w.releases_running(), [1, 1]);
}
