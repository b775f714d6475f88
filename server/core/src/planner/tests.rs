//! Claims about rollouts, in a cluster in miniature.

use super::*;
use crate::audit;
use crate::change::Change;
use crate::decide::{self, Asked};
use crate::miniature::World;
use crate::release;
use berth_proto::api::{self, RolloutState};
use berth_proto::ids::Revision;
use berth_proto::values::Phase;

#[test]
fn a_deployment_is_placed_spread_and_complete() {
    let mut w = World::new(4);
    let mut spec = World::spec("one");
    spec.replicas = Some(4);
    spec.placement = Some(api::Placement { require: vec![], spread: "zone".into() });
    assert_eq!(w.apply(spec.clone()), api::ApplyAction::Created);
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    let hosts: BTreeSet<&HostUid> = w.running.values().map(|(host, ..)| host).collect();
    assert_eq!(hosts.len(), 4);
    assert_eq!(w.apply(spec), api::ApplyAction::Unchanged);
}

#[test]
fn a_rollout_keeps_its_floor_and_its_surge() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    (w.most_at_once, w.lowest_ready) = (0, usize::MAX);
    assert_eq!(w.apply(World::spec("two")), api::ApplyAction::Changed);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    assert!(w.most_at_once <= 3, "{}", w.most_at_once);
    assert!(w.lowest_ready >= 2, "{}", w.lowest_ready);
}

#[test]
fn without_surge_the_old_one_stops_first() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.rollout.as_mut().unwrap().max_surge = Some(0);
    spec.rollout.as_mut().unwrap().max_unavailable = Some(1);
    w.apply(spec.clone());
    w.settle();
    (w.most_at_once, w.lowest_ready) = (0, usize::MAX);
    spec.source = World::spec("two").source;
    w.apply(spec);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
    assert!(w.most_at_once <= 2, "{}", w.most_at_once);
    assert!(w.lowest_ready >= 1, "{}", w.lowest_ready);
}

#[test]
fn a_rollout_that_stands_still_does_not_stop_what_serves_for_one_that_it_displaced() {
    let mut w = World::new(1);
    w.apply(api::DeploymentSpec { replicas: Some(1), ..World::spec("one") });
    w.settle();
    w.apply(api::DeploymentSpec { replicas: Some(1), ..World::spec("two") });
    let old = Arc::clone(w.view.replicas_of(&w.uid()).next().unwrap());
    let mut new = Replica::clone(&old);
    (new.uid, new.release, new.replaces) =
        ("new".parse().unwrap(), ReleaseNumber(2), Some(old.uid.clone()));
    w.change(vec![Change::PutReplica(Arc::new(new.clone()))]);
    w.report(&old.uid, Phase::Exited, false);
    w.report(&new.uid, Phase::Running, true);
    w.now.mono = w.now.mono.plus_ms(1_000);
    let in_state = |w: &mut World, rollout: RolloutState| {
        let back = w.deployment().edited(|r| (r.release, r.rollout) = (1, rollout as i32));
        w.change(vec![Change::PutDeployment(Arc::new(back))]);
    };
    in_state(&mut w, RolloutState::Paused);
    assert_eq!(w.plan().steps, []);
    // One that goes on gives it up: both have one place.
    in_state(&mut w, RolloutState::Rolling);
    let plan = w.plan();
    assert_eq!(plan.steps.iter().map(|s| s.kind).collect::<Vec<_>>(), [PlannedStepKind::Stop]);
}

#[test]
fn a_failed_rollout_goes_back_without_touching_the_good_ones() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let good: Vec<ReplicaUid> = w.running.keys().cloned().collect();
    w.broken.insert(2);
    w.apply(World::spec("two"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
    assert!(w.deployment().record.reason.contains("release 2 failed"));
    assert_eq!(w.running.keys().cloned().collect::<Vec<_>>(), good);
    // The same spec again is another try.
    w.broken.clear();
    assert_eq!(w.apply(World::spec("two")), api::ApplyAction::Changed);
    w.settle();
    assert_eq!(w.releases_running(), [3, 3]);
}

#[test]
fn a_restart_after_a_rollback_repeats_what_runs_and_not_what_has_failed() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.env.insert("A".into(), "good".into());
    w.apply(spec.clone());
    w.settle();
    w.broken.insert(2);
    spec.env.insert("A".into(), "bad".into());
    w.apply(spec.clone());
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
    let asked = Asked { actor: "user/test", now: w.now.wall };
    let again = decide::restart(&w.view, w.deployment(), &asked).unwrap();
    assert_eq!(again.deployment.record.spec.as_ref().unwrap().env["A"], "good");
    w.change(again.proposal.changes);
    w.settle();
    assert_eq!(w.releases_running(), [3, 3]);
}

#[test]
fn what_was_written_changes_nothing_once_going_back_has_led_to_it() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    w.apply(World::spec("two"));
    w.settle();
    let asked = Asked { actor: "user/test", now: w.now.wall };
    let back = decide::undo(&w.view, w.deployment(), ReleaseNumber(1), &asked).unwrap();
    w.change(back.proposal.changes);
    w.settle();
    let told = w.deployment().record.resolved.clone();
    assert_eq!(told, release::source_words(w.view.release(&w.uid(), ReleaseNumber(1)).unwrap()));
    assert_eq!(w.apply(World::spec("one")), api::ApplyAction::Unchanged);
    let mut spec = World::spec("one");
    spec.rollout.as_mut().unwrap().max_surge = Some(2);
    assert_eq!(w.apply(spec), api::ApplyAction::Adjusted);
}

#[test]
fn applying_what_fails_once_more_while_it_goes_back_is_another_try() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    w.broken.insert(2);
    w.apply(World::spec("two"));
    while w.deployment().release().0 != 1 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling, "on its way back");
    assert_eq!(w.apply(World::spec("two")), api::ApplyAction::Changed);
    w.settle();
    assert_eq!(w.releases_running(), [3, 3]);
}

#[test]
fn a_first_release_that_fails_waits_for_a_person() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Paused);
    let reason = &w.deployment().record.reason;
    let why = "no replica became healthy within";
    assert!(reason.starts_with(&format!("release 1 failed: {why}")), "{reason}");
    let cause = "(2 replicas: it runs and has not passed its health check)";
    assert!(reason.ends_with(cause), "{reason}");
}

#[test]
fn a_rollout_begun_while_another_one_is_at_its_surge_goes_on_from_there() {
    for passes in 0..8 {
        let mut w = World::new(3);
        w.apply(World::spec("one"));
        w.settle();
        w.apply(World::spec("two"));
        // However far it has come: the one that it has started beside the others may serve already.
        for _ in 0..passes {
            w.pass(150);
        }
        (w.most_at_once, w.lowest_ready) = (0, usize::MAX);
        w.apply(World::spec("three"));
        w.settle();
        assert_eq!(w.releases_running(), [3, 3], "after {passes} passes");
        assert_eq!(w.deployment().rollout(), RolloutState::Complete);
        assert!(w.most_at_once <= 3 && w.lowest_ready >= 2, "{passes}");
    }
}

#[test]
fn of_two_that_serve_in_one_slot_the_one_to_go_back_to_stays() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let good: Vec<ReplicaUid> = w.running.keys().cloned().collect();
    w.apply(World::spec("two"));
    w.pass(150);
    w.broken.insert(3);
    w.apply(World::spec("three"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
    assert_eq!(w.running.keys().cloned().collect::<Vec<_>>(), good);
}

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
fn a_plan_is_the_same_for_the_same_view() {
    let mut w = World::new(5);
    let mut spec = World::spec("one");
    spec.replicas = Some(9);
    w.apply(spec);
    let make = |w: &World| {
        let mut n = 0;
        plan(&w.view, &w.live, &w.uid(), w.now, &mut || {
            n += 1;
            format!("x{n}").parse().unwrap()
        })
    };
    assert_eq!(make(&w), make(&w));
    assert_eq!(w.view.revision, Revision(6));
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

/// What the planner says of one replica on hosts that were edited.
pub(super) fn one_on(
    w: &mut World,
    edit: impl FnOnce(&mut api::DeploymentSpec),
) -> (Vec<String>, Vec<String>) {
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    edit(&mut spec);
    w.apply(spec);
    let plan = w.plan();
    let hosts = plan.steps.iter().map(|s| s.host.to_string()).collect();
    (hosts, plan.report.pending.into_keys().collect())
}

pub(super) fn edit_host(
    w: &mut World,
    n: u32,
    edit: impl FnOnce(&mut berth_proto::record::HostRecord),
) {
    let host = w.view.host(&format!("h{n}").parse().unwrap()).unwrap().edited(edit).unwrap();
    w.change(vec![Change::PutHost(Arc::new(host))]);
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
fn a_placement_is_refused_when_its_host_was_written_meanwhile() {
    let mut w = World::new(1);
    w.apply(World::spec("one"));
    let made = plan(&w.view, &w.live, &w.uid(), w.now, &mut || {
        w.ids += 1;
        format!("n{}", w.ids).parse().unwrap()
    });
    let all = made.proposals(&w.view, &Arc::clone(w.deployment()));
    edit_host(&mut w, 0, |r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: false });
    });
    let mut ledger = crate::batching::Batching::new(w.view.clone(), crate::batching::Limits::ANY);
    for (id, proposal) in (0..).zip(all) {
        let effects = ledger.propose(id, proposal);
        assert!(matches!(effects[0], crate::batching::Effect::Reject { .. }));
    }
}

#[test]
fn what_one_host_says_of_itself_changes_its_own_part_of_the_reasons_alone() {
    let words = |host: &str, why: &str| Plan {
        report: Report {
            pending: BTreeMap::from([(why.to_owned(), 1)]),
            pending_on: BTreeMap::from([(host.parse().unwrap(), why.to_owned())]),
            ..Report::default()
        },
        ..Plan::default()
    };
    let uid = |n: &str| n.parse::<HostUid>().unwrap();
    let mut all = Report::default();
    for host in ["a", "b", "c"] {
        all.merge_host(&uid(host), &words(host, "short"));
    }
    all.merge_host(&uid("b"), &words("b", "short"));
    assert_eq!(all.pending, BTreeMap::from([("short".to_owned(), 3)]));
    all.merge_host(&uid("b"), &words("b", "away"));
    all.merge_host(&uid("c"), &Plan::default());
    let left = BTreeMap::from([("away".to_owned(), 1), ("short".to_owned(), 1)]);
    assert_eq!(all.pending, left);
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
fn a_plan_cut_into_commits_names_what_it_was_made_on_and_fits_each() {
    let mut w = World::new(5);
    let mut spec = World::spec("one");
    spec.replicas = Some(130);
    w.apply(spec);
    let made = plan(&w.view, &w.live, &w.uid(), w.now, &mut || {
        w.ids += 1;
        format!("n{}", w.ids).parse().unwrap()
    });
    let deployment = Arc::clone(w.deployment());
    let all = made.clone().proposals(&w.view, &deployment);
    assert_eq!(all.len(), 130_usize.div_ceil(STEPS_PER_COMMIT));
    let mut ledger = crate::batching::Batching::new(w.view.clone(), crate::batching::Limits::ANY);
    for (id, proposal) in (0..).zip(all.clone()) {
        let refused = ledger
            .propose(id, proposal)
            .into_iter()
            .any(|e| matches!(e, crate::batching::Effect::Reject { .. }));
        assert!(!refused);
    }
    assert_eq!(ledger.ahead().replicas().count(), 130);
    // Once more: everything it was made on has changed.
    for (id, proposal) in (100..).zip(all) {
        let effects = ledger.propose(id, proposal);
        assert!(matches!(effects[0], crate::batching::Effect::Reject { .. }));
    }
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
fn the_last_that_serves_keeps_its_place_while_what_is_missing_is_only_just_started() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 600 << 20, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec);
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
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    // One fills a host.
    spec.resources = Some(api::Resources { memory_bytes: 600 << 20, ..Default::default() });
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec);
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
