//! Claims about rollouts, in a cluster in miniature.

use super::*;
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
fn a_rollout_that_is_undone_goes_back_to_what_still_runs_and_starts_nothing_anew() {
    // While it goes on, and once it stands still.
    for (passes, state, ends) in [
        (1, RolloutState::Rolling, RolloutState::Complete),
        (200, RolloutState::Paused, RolloutState::RolledBack),
    ] {
        let mut w = World::new(3);
        let mut spec = World::spec("one");
        spec.rollout.as_mut().unwrap().on_failure = api::RolloutFailureAction::Pause as i32;
        w.apply(spec.clone());
        w.settle();
        let before: BTreeSet<ReplicaUid> = w.running.keys().cloned().collect();
        w.broken.insert(2);
        spec.source = World::spec("two").source;
        w.apply(spec);
        for _ in 0..passes {
            w.pass(150);
        }
        assert_eq!(w.deployment().rollout(), state);
        let asked = Asked { actor: "user/test", now: w.now.wall };
        let back = decide::undo(&w.view, w.deployment(), ReleaseNumber(0), &asked).unwrap();
        assert_eq!(back.deployment.release().0, 1);
        let reason = &back.deployment.record.reason;
        assert_eq!(reason, "release 2 was undone; back to release 1");
        w.change(back.proposal.changes);
        w.settle();
        assert_eq!(w.running.keys().cloned().collect::<BTreeSet<_>>(), before);
        assert_eq!(w.deployment().rollout(), ends);
        let given_up = w.view.releases_of(&w.uid()).last().unwrap().state();
        let expected = match state {
            RolloutState::Paused => api::ReleaseState::Failed,
            _ => api::ReleaseState::Superseded,
        };
        assert_eq!(given_up, expected);
        // Nothing served before that.
        assert!(decide::undo(&w.view, w.deployment(), ReleaseNumber(0), &asked).is_err());
        // What is written is what runs: applied again it changes nothing, and something else does.
        let mut spec = World::spec("one");
        spec.rollout.as_mut().unwrap().on_failure = api::RolloutFailureAction::Pause as i32;
        assert_eq!(w.apply(spec.clone()), api::ApplyAction::Unchanged);
        spec.source = World::spec("two").source;
        assert_eq!(w.apply(spec), api::ApplyAction::Changed);
    }
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
