//! What a rollout comes to, foreseen: plan after plan, each carried out as one hopes.

use super::{MAX_STEPS, Plan, Step, plan};
use crate::change::Change;
use crate::live::Live;
use crate::objects::{Deployment, Replica};
use crate::view::View;
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{DeploymentUid, Now, ReplicaUid};
use berth_proto::values::{Phase, ReplicaStatus};
use std::sync::Arc;

/// Plans of one deployment that are looked ahead at the most.
const MAX_PLANS: u32 = 100;
/// What one look ahead may cost at the most, in replicas and hosts that are planned over: some
/// microseconds each.
const MAX_COST: usize = 100_000;

/// What is left to look ahead for all that one caller asks.
#[derive(Debug)]
pub struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_COST)
    }
}

impl Budget {
    fn take(&mut self, cost: usize) -> bool {
        let enough = self.0 >= cost;
        self.0 = self.0.saturating_sub(cost);
        enough
    }
}

/// The steps of a deployment's rollout in their order, at most [`MAX_STEPS`], supposing that hosts stay
/// as they are and that all that is new becomes healthy; and the report of the last plan: what still
/// waits then, and in [`Report::more`](super::Report::more) that there is more than was looked at.
/// Changes nothing. The first plan is made whatever is left of the budget.
pub fn foresee(
    view: &View,
    live: &Live,
    uid: &DeploymentUid,
    now: Now,
    mint: &mut dyn FnMut() -> ReplicaUid,
    budget: &mut Budget,
) -> Plan {
    let (mut view, mut live) = (view.clone(), live.clone());
    ready_at_once(&mut view, uid);
    let mut steps: Vec<Step> = Vec::new();
    let mut last = plan(&view, &live, uid, now, mint);
    let mut plans = 0;
    while !last.changes.is_empty() {
        let cost = 1 + view.replicas_of(uid).count() + view.hosts().count();
        if plans == MAX_PLANS || steps.len() >= MAX_STEPS || !budget.take(cost) {
            last.report.more = true;
            break;
        }
        plans += 1;
        steps.append(&mut last.steps);
        carry_out(&mut view, &mut live, uid, &last, now);
        last = plan(&view, &live, uid, now, mint);
    }
    steps.append(&mut last.steps);
    last.report.more |= steps.len() > MAX_STEPS;
    steps.truncate(MAX_STEPS);
    last.steps = steps;
    last
}

/// Being ready is waited for in no time, so that none of the time passes in which hosts get lost.
fn ready_at_once(view: &mut View, uid: &DeploymentUid) {
    let Some(deployment) = view.deployment(uid) else { return };
    let mut at_once = Deployment::clone(deployment);
    at_once.spec.rollout.ready_for_ms = 0;
    let revision = view.revision.next();
    view.apply(&Change::PutDeployment(Arc::new(at_once)), revision);
}

fn carry_out(view: &mut View, live: &mut Live, uid: &DeploymentUid, plan: &Plan, now: Now) {
    let revision = view.revision.next();
    for change in plan.all_changes() {
        view.apply(change, revision);
    }
    ready_at_once(view, uid);
    live.set_clock(uid, plan.clock.clone());
    let newest = view.deployment(uid).map(|deployment| deployment.release());
    let present = |r: &&Arc<Replica>| live.is_present(&r.host);
    let replicas: Vec<Arc<Replica>> = view.replicas_of(uid).filter(present).cloned().collect();
    for replica in &replicas {
        if replica.intent == ReplicaIntent::Stop {
            live.remove_replica(&replica.uid);
            view.apply(&Change::DeleteReplica(replica.uid.clone()), revision);
        } else if replica.runs() && !replica.failed && newest == Some(replica.release) {
            if let Some(old) = &replica.replaces {
                let attempt = live.replica(old).map_or(0, |known| known.status.attempt);
                live.take(old, status(attempt, Phase::Exited, false), now.mono);
            }
            let known = live.replica(&replica.uid).map(|known| &known.status);
            if replica.first_ready.is_some() && known.is_some_and(|status| status.ready) {
                continue;
            }
            // One that has ended has another attempt.
            let attempt = known.map_or(1, |status| {
                status.attempt + u32::from(status.phase > Some(Phase::Running))
            });
            live.take(&replica.uid, status(attempt, Phase::Running, true), now.mono);
            let ready = Replica {
                first_ready: replica.first_ready.or(Some(now.wall)),
                ..Replica::clone(replica)
            };
            view.apply(&Change::PutReplica(Arc::new(ready)), revision);
        }
    }
}

fn status(attempt: u32, phase: Phase, ready: bool) -> ReplicaStatus {
    ReplicaStatus { attempt, phase: Some(phase), ready, ..ReplicaStatus::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::World;
    use berth_proto::api::{self, PlannedStepKind};

    fn foreseen(w: &World) -> (Vec<(PlannedStepKind, u32, u64)>, Plan) {
        let mut ids = 0;
        let mut mint = || -> ReplicaUid {
            ids += 1;
            format!("foreseen{ids}").parse().unwrap()
        };
        let plan = foresee(&w.view, &w.live, &w.uid(), w.now, &mut mint, &mut Budget::default());
        (plan.steps.iter().map(|s| (s.kind, s.slot, s.release.0)).collect(), plan)
    }

    fn spec(image: &str, surge: u32, unavailable: u32) -> api::DeploymentSpec {
        let mut spec = World::spec(image);
        if let Some(rollout) = spec.rollout.as_mut() {
            rollout.max_surge = Some(surge);
            rollout.max_unavailable = Some(unavailable);
            rollout.ready_for = Some(berth_proto::convert::duration(60_000));
        }
        spec
    }

    #[test]
    fn all_of_a_rollout_is_foreseen_in_its_order_and_nothing_is_done() {
        use PlannedStepKind::{Place, Stop};
        let mut w = World::new(3);
        w.apply(spec("one", 1, 0));
        let (steps, _) = foreseen(&w);
        assert_eq!(steps, [(Place, 0, 1), (Place, 1, 1)]);
        for _ in 0..3 {
            w.pass(61_000);
        }
        w.apply(spec("two", 1, 0));
        let before = w.view.revision;
        let (steps, plan) = foreseen(&w);
        assert_eq!(steps, [(Place, 0, 2), (Stop, 0, 1), (Place, 1, 2), (Stop, 1, 1)]);
        assert!(plan.report.pending.is_empty(), "{:?}", plan.report);
        assert_eq!(w.view.revision, before);
        w.apply(spec("three", 0, 1));
        let (steps, _) = foreseen(&w);
        let kinds: Vec<_> = steps.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [Stop, Place, Stop, Place]);
    }

    #[test]
    fn what_is_not_looked_at_is_told_to_be_more_and_costs_nothing() {
        let mut w = World::new(3);
        w.apply(spec("one", 1, 0));
        for _ in 0..3 {
            w.pass(61_000);
        }
        w.apply(spec("two", 1, 0));
        let mut mint = || -> ReplicaUid { "foreseen".parse().unwrap() };
        let mut budget = Budget(6);
        let plan = foresee(&w.view, &w.live, &w.uid(), w.now, &mut mint, &mut budget);
        assert_eq!((plan.steps.len(), plan.report.more), (2, true));
        let plan = foresee(&w.view, &w.live, &w.uid(), w.now, &mut mint, &mut budget);
        assert_eq!((plan.steps.len(), plan.report.more), (1, true));
        assert!(!foreseen(&w).1.report.more);
    }

    #[test]
    fn a_full_host_is_foreseen_to_change_places_and_what_fits_nowhere_to_wait() {
        let mut w = World::new(1);
        let big = |image: &str, replicas| api::DeploymentSpec {
            replicas: Some(replicas),
            resources: Some(api::Resources { memory_bytes: 700 << 20, ..Default::default() }),
            ..spec(image, 1, 0)
        };
        w.apply(big("one", 1));
        for _ in 0..3 {
            w.pass(61_000);
        }
        w.apply(big("two", 2));
        let (steps, plan) = foreseen(&w);
        assert_eq!(
            steps.iter().map(|s| s.0).collect::<Vec<_>>(),
            [PlannedStepKind::Replace, PlannedStepKind::Stop]
        );
        assert_eq!(plan.report.pending.values().sum::<u32>(), 1, "{:?}", plan.report);
    }
}
