//! What to do for one deployment.
//!
//! [`plan`] is a pure function: a view, what is known live, the time and new ids in, changes and a
//! report out. It is run whenever a deployment is woken, and now and then for all of them, with
//! nothing remembered in between: what was missed comes up again. [`plan_host`] is the same for one
//! host of a deployment that runs on every host, as long as no rollout is under way.
//!
//! Three rules hold for every plan:
//!
//! 1. A plan leaves no choice to whoever carries it out: it names the host, the replica and the
//!    release.
//! 2. Planning the same view at the same time with the same ids gives the same plan.
//! 3. Every prefix of a plan is safe: starting comes before stopping, and each step alone keeps the
//!    rollout's bounds.
//!
//! Hosts that are away block nothing: their replicas are *deferred*, neither healthy nor failed.
//! Silence stops nothing: a replica of an away host is only ever stopped by name, once it is back.
//!
//! `roll` decides what starts and stops, `every_host` lists the slots of deployments without a number,
//! `judge` says whether a rollout is complete or has failed, `cause` what kept it from being complete,
//! `commit` cuts a plan into what the ledger takes.

mod cause;
mod commit;
mod every_host;
mod foresee;
mod judge;
mod roll;

pub use commit::STEPS_PER_COMMIT;
pub use foresee::{Budget, foresee};
pub use roll::{GIVEN_BACK, UNDECIDED};

use crate::capacity::HostUse;
use crate::change::Change;
use crate::decide::{self, Asked};
use crate::live::{Live, Presence, RolloutClock};
use crate::objects::{Deployment, Release, Replica};
use crate::orphans;
use crate::placement::{Rejection, Unplaceable, WaitsFor};
use crate::view::View;
use berth_proto::api::{EventSeverity, PlannedStepKind, ReplicaIntent};
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, ReleaseNumber, ReplicaUid};
use berth_proto::values::HostLossAction;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Steps of one plan at the most: bounds how long one deployment keeps all others waiting (some ten
/// milliseconds); the next pass goes on.
pub const MAX_STEPS: usize = 1000;

/// What a plan says besides what to change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Slots wanted.
    pub wanted: u32,
    /// Why slots are empty, or are not moved, with how many.
    pub pending: BTreeMap<String, u32>,
    /// Those of them whose slot is a host.
    pub pending_on: BTreeMap<HostUid, String>,
    /// Slots that get a replica once the one before is gone from this host, which takes its grace.
    pub until_gone: BTreeMap<HostUid, u32>,
    /// What would have to change of some host for an empty slot to be filled.
    pub waits_for: BTreeSet<WaitsFor>,
    /// Hosts that are away and hold or would get a replica.
    pub deferred: BTreeSet<HostUid>,
    /// When to plan again even if nothing happens.
    pub wake: Option<Mono>,
    /// There is more to do at once: the plan was cut at [`MAX_STEPS`].
    pub more: bool,
    /// The plan of one host is not enough: the whole deployment must be looked at.
    pub whole: bool,
    /// Something old is left: what happens on one host may let another's go.
    pub unsettled: bool,
    /// A slot found no host, and some were not heard of since the server's start: until they are, no time
    /// is counted.
    pub unheard: bool,
}

impl Report {
    /// Takes in what the plan of one host says.
    pub fn merge_host(&mut self, host: &HostUid, plan: &Plan) {
        let of_host = &plan.report;
        let placed = plan.steps.iter().any(|step| step.kind == PlannedStepKind::Place);
        if self.wanted == 0 && placed {
            // That no host takes it is true no more.
            self.pending.clear();
            self.pending_on.clear();
        }
        if of_host.deferred.contains(host) {
            self.deferred.insert(host.clone());
        } else {
            self.deferred.remove(host);
        }
        for step in &plan.steps {
            match step.kind {
                PlannedStepKind::Place => self.wanted = self.wanted.saturating_add(1),
                PlannedStepKind::Stop => self.wanted = self.wanted.saturating_sub(1),
                PlannedStepKind::Unspecified | PlannedStepKind::Replace => {}
            }
        }
        if let Some(words) = self.pending_on.remove(host)
            && let Some(slots) = self.pending.get_mut(&words)
        {
            *slots = slots.saturating_sub(1);
            self.pending.retain(|_, slots| *slots > 0);
        }
        if let Some(words) = of_host.pending_on.get(host) {
            *self.pending.entry(words.clone()).or_default() += 1;
            self.pending_on.insert(host.clone(), words.clone());
        }
        self.until_gone.remove(host);
        self.until_gone.extend(of_host.until_gone.get(host).map(|slots| (host.clone(), *slots)));
        self.waits_for.extend(of_host.waits_for.iter().copied());
    }
}

/// One placement or removal, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub kind: PlannedStepKind,
    /// Slot.
    pub slot: u32,
    /// Host.
    pub host: HostUid,
    /// Release.
    pub release: ReleaseNumber,
}

/// What to do for one deployment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Replicas to put and to forget, and old releases; every prefix of them is safe.
    pub changes: Vec<Change>,
    /// What this makes of the deployment itself; after the changes, and all of it together.
    pub verdict: Vec<Change>,
    /// The steps for people.
    pub steps: Vec<Step>,
    /// What else there is to say.
    pub report: Report,
    /// The rollout's clock from now on.
    pub clock: Option<RolloutClock>,
}

impl Plan {
    /// Nothing is to be changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.verdict.is_empty()
    }

    /// Everything that is to be changed, in order.
    pub fn all_changes(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter().chain(&self.verdict)
    }
}

/// How a replica counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    /// Ready for long enough.
    Healthy,
    /// On its way, or unready; healthy at that time if it goes on being ready.
    NotYet(Option<Mono>),
    /// Its host cannot be spoken to.
    Deferred,
}

struct Planning<'a> {
    view: &'a View,
    live: &'a Live,
    deployment: &'a Arc<Deployment>,
    now: Now,
    mint: &'a mut dyn FnMut() -> ReplicaUid,
    plan: Plan,
    /// What this plan has placed on each host.
    placed: BTreeMap<HostUid, HostUse>,
    /// Hosts not heard of since the server's start that may be slots.
    unheard: u32,
}

/// Works out what to do for one deployment.
pub fn plan(
    view: &View,
    live: &Live,
    uid: &DeploymentUid,
    now: Now,
    mint: &mut dyn FnMut() -> ReplicaUid,
) -> Plan {
    let Some(deployment) = view.deployment(uid) else { return Plan::default() };
    let mut p = Planning::new(view, live, deployment, now, mint);
    let mine: Vec<Arc<Replica>> = view.replicas_of(uid).cloned().collect();
    if deployment.is_deleted() {
        p.delete(&mine);
        return p.plan;
    }
    let Some(release) = view.release(uid, deployment.release()) else { return p.plan };
    p.forget_removed_hosts(&mine);
    match deployment.wanted() {
        Some(wanted) => p.replicated(release, &mine, wanted),
        None => p.every_host(release, &mine),
    }
    p.plan
}

/// Works out what to do on one host for a deployment that runs on every host. Where that cannot be
/// said without the others (a rollout is under way, something old is there),
/// [`Report::whole`] asks for the whole deployment to be planned, and nothing is changed.
pub fn plan_host(
    view: &View,
    live: &Live,
    uid: &DeploymentUid,
    host: &HostUid,
    now: Now,
    mint: &mut dyn FnMut() -> ReplicaUid,
) -> Plan {
    let Some(deployment) = view.deployment(uid) else { return Plan::default() };
    let mut p = Planning::new(view, live, deployment, now, mint);
    p.one_host(host);
    p.plan
}

impl<'a> Planning<'a> {
    fn new(
        view: &'a View,
        live: &'a Live,
        deployment: &'a Arc<Deployment>,
        now: Now,
        mint: &'a mut dyn FnMut() -> ReplicaUid,
    ) -> Self {
        let clock = live.clock(&deployment.uid).map(|c| RolloutClock::clone(c));
        let plan = Plan { clock, ..Plan::default() };
        Self { view, live, deployment, now, mint, plan, placed: BTreeMap::new(), unheard: 0 }
    }

    fn room(&mut self) -> bool {
        let room = self.plan.changes.len() < bound!(MAX_STEPS, 3);
        if !room {
            self.plan.report.more = true;
        }
        room
    }

    fn wake(&mut self, at: Mono) {
        let wake = self.plan.report.wake.map_or(at, |held| held.min(at));
        self.plan.report.wake = Some(wake);
    }

    fn pending(&mut self, why: &Unplaceable, slots: u32) {
        // Nor is time counted while a host waits for people to decide about what it runs.
        if [Rejection::Unknown, Rejection::HeldBack].iter().any(|r| why.0.contains_key(r)) {
            self.plan.report.unheard = true;
        }
        *self.plan.report.pending.entry(why.to_string()).or_default() += slots;
        self.waits_for(why);
    }

    fn waits_for(&mut self, why: &Unplaceable) {
        self.plan.report.waits_for.extend(why.0.keys().map(|r| r.waits_for()));
        if why.0.is_empty() {
            // No host at all: the first one has everything to offer.
            self.plan.report.waits_for.insert(WaitsFor::Record);
        }
    }

    fn pending_on(&mut self, host: &HostUid, why: &Unplaceable) {
        self.pending(why, 1);
        self.plan.report.pending_on.insert(host.clone(), why.to_string());
    }

    fn step(&mut self, kind: PlannedStepKind, replica: &Replica) {
        self.plan.steps.push(Step {
            kind,
            slot: replica.slot,
            host: replica.host.clone(),
            release: replica.release,
        });
    }

    fn event(&mut self, severity: EventSeverity, reason: &str, message: String) {
        let asked = Asked { actor: "server", now: self.now.wall };
        let event = decide::event(self.deployment, &asked, severity, reason, message);
        self.plan.verdict.push(event);
    }

    fn place(
        &mut self,
        slot: u32,
        host: HostUid,
        release: &Release,
        replaces: Option<&Replica>,
        stands_in_for: Option<&Replica>,
    ) {
        let replica = Replica {
            uid: (self.mint)(),
            deployment: self.deployment.uid.clone(),
            slot,
            release: release.number,
            host,
            intent: ReplicaIntent::Run,
            replaces: replaces.map(|r| r.uid.clone()),
            stands_in_for: stands_in_for.map(|r| r.uid.clone()),
            created: self.now.wall,
            first_ready: None,
            attempt_floor: 0,
            exits: Vec::new(),
            failed: false,
            reason: String::new(),
            given_back: None,
            found_body: None,
            found_as: None,
            revision: Default::default(),
        };
        let kind =
            if replaces.is_some() { PlannedStepKind::Replace } else { PlannedStepKind::Place };
        self.step(kind, &replica);
        self.placed.entry(replica.host.clone()).or_default().add(&release.spec);
        self.plan.changes.push(Change::PutReplica(Arc::new(replica)));
    }

    fn stop(&mut self, replica: &Replica) {
        self.step(PlannedStepKind::Stop, replica);
        self.plan.changes.push(Change::PutReplica(Arc::new(replica.stopped())));
    }

    /// Stops everything; ends when every host has confirmed that nothing is left.
    fn delete(&mut self, mine: &[Arc<Replica>]) {
        self.plan.clock = None;
        for replica in mine {
            if !self.room() {
                return;
            }
            if self.is_gone(replica) {
                self.plan.changes.push(Change::DeleteReplica(replica.uid.clone()));
            } else if replica.intent != ReplicaIntent::Stop {
                self.stop(replica);
            }
        }
        let stopping = |r: &Arc<Replica>| r.intent == ReplicaIntent::Stop;
        if mine.is_empty() || (bug!(DeletionEndsEarly) && mine.iter().all(stopping)) {
            let uid = &self.deployment.uid;
            for release in self.view.releases_of(uid) {
                self.plan.changes.push(Change::DeleteRelease(uid.clone(), release.number));
            }
            self.plan.verdict.push(Change::DeleteDeployment(uid.clone()));
            self.event(EventSeverity::Info, "DEPLOYMENT_DELETED", "nothing of it is left".into());
        }
    }

    /// Nobody will ever report for a removed host.
    fn forget_removed_hosts(&mut self, mine: &[Arc<Replica>]) {
        for replica in mine {
            if self.is_gone(replica) && self.room() {
                self.plan.changes.push(Change::DeleteReplica(replica.uid.clone()));
            }
        }
    }

    fn is_gone(&self, replica: &Replica) -> bool {
        self.view.host(&replica.host).is_none_or(|h| h.is_removed())
    }

    fn health(&self, replica: &Replica) -> Health {
        if !self.live.is_present(&replica.host) {
            return Health::Deferred;
        }
        let ready_for = self.deployment.spec.rollout.ready_for_ms;
        match self.live.replica(&replica.uid).and_then(|l| l.ready_since) {
            None => Health::NotYet(None),
            // What was healthy once and is ready again need not wait anew.
            Some(_)
                if replica.first_ready.is_some()
                    && replica.release != self.deployment.release() =>
            {
                Health::Healthy
            }
            Some(since) => {
                let healthy_at = since.plus_ms(ready_for);
                if self.now.mono >= healthy_at {
                    Health::Healthy
                } else {
                    Health::NotYet(Some(healthy_at))
                }
            }
        }
    }

    /// Away for longer than the deployment's policy allows, which asks for a replacement; or when
    /// it will be.
    fn lost(&self, host: &HostUid) -> Result<(), Option<Mono>> {
        let policy = &self.deployment.spec.on_host_loss;
        match (self.live.presence(host), policy.action) {
            (Presence::Present | Presence::Unknown, _) | (_, HostLossAction::Keep) => Err(None),
            (Presence::Away(since), HostLossAction::Replace) => {
                let lost_at = since.plus_ms(policy.after_ms);
                if self.now.mono >= lost_at || bug!(LostAtOnce) {
                    Ok(())
                } else {
                    Err(Some(lost_at))
                }
            }
        }
    }

    fn leaving(&self, replica: &Replica) -> bool {
        self.view.host(&replica.host).is_some_and(|h| h.is_draining())
    }

    /// Slots of orphans that may still be adopted, each with its host; one on a host that is lost by the
    /// deployment's own policy holds none.
    fn undecided_slots(&mut self) -> BTreeMap<u32, &'a HostUid> {
        let view = self.view;
        let mut slots = BTreeMap::new();
        if !view.cluster.observing || bug!(OrphanHoldsNothing) {
            return slots;
        }
        for (slot, orphan) in orphans::holding(view, self.deployment) {
            match self.lost(&orphan.host) {
                Ok(()) => continue,
                Err(at) => at.into_iter().for_each(|at| self.wake(at)),
            }
            slots.insert(slot, &orphan.host);
        }
        slots
    }

    fn replicated(&mut self, release: &Arc<Release>, mine: &[Arc<Replica>], wanted: u32) {
        self.plan.report.wanted = wanted;
        let mut slots: BTreeMap<u32, Vec<&Arc<Replica>>> = BTreeMap::new();
        for replica in mine.iter().filter(|r| r.runs() && !self.is_gone(r)) {
            slots.entry(replica.slot).or_default().push(replica);
        }
        // Scale down: what is beyond the wanted number goes, wherever it is.
        for (_, replicas) in slots.range(wanted..) {
            for replica in replicas {
                if self.room() {
                    self.stop(replica);
                }
            }
        }
        let mut undecided = self.undecided_slots();
        let slots = (0..wanted)
            .map(|slot| roll::Slot {
                slot,
                host: None,
                replicas: slots.remove(&slot).unwrap_or_default(),
                undecided: undecided.remove(&slot),
            })
            .collect();
        self.roll(release, mine, slots);
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod placed_tests;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod spread_tests;
