//! What to do for one deployment.
//!
//! The one entry point, [`plan`], is a pure function: a view, what is known live, the time and new
//! ids in, changes and a report out. It is run whenever a deployment is woken, and now and then for
//! all of them, with nothing remembered in between: what was missed comes up again.
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

use crate::change::Change;
use crate::live::{Live, Presence, RolloutClock};
use crate::objects::{Deployment, Release, Replica};
use crate::placement::{self, Pool, Rejection, Unplaceable};
use crate::view::View;
use berth_proto::api::{
    Event, EventSeverity, PlannedStepKind, ReleaseState, ReplicaIntent, RolloutState,
};
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, ReleaseNumber, ReplicaUid};
use berth_proto::values::{HostLossAction, OnRolloutFailure};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Changes of one plan at the most, so that it fits one commit with its events and generations; the
/// next pass goes on.
pub const MAX_STEPS: usize = 30;

/// What a plan says besides what to change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Slots wanted.
    pub wanted: u32,
    /// Why slots are empty, with how many.
    pub pending: BTreeMap<String, u32>,
    /// Hosts that are away and hold or would get a replica.
    pub deferred: BTreeSet<HostUid>,
    /// When to plan again even if nothing happens.
    pub wake: Option<Mono>,
    /// There is more to do at once: the plan was cut at [`MAX_STEPS`].
    pub more: bool,
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
    /// To be committed together.
    pub changes: Vec<Change>,
    /// The same for people.
    pub steps: Vec<Step>,
    /// What else there is to say.
    pub report: Report,
    /// The rollout's clock from now on.
    pub clock: Option<RolloutClock>,
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
    deployment: &'a Deployment,
    now: Now,
    mint: &'a mut dyn FnMut() -> ReplicaUid,
    plan: Plan,
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
    let clock = live.clock(uid).map(|c| RolloutClock::clone(c));
    let plan = Plan { clock, ..Plan::default() };
    let mut p = Planning { view, live, deployment, now, mint, plan };
    if deployment.is_deleted() {
        p.delete();
        return p.plan;
    }
    let Some(release) = view.release(uid, deployment.release()).cloned() else { return p.plan };
    p.forget_removed_hosts();
    match deployment.wanted() {
        Some(wanted) => p.replicated(&release, wanted),
        None => p.every_host(&release),
    }
    p.plan
}

impl<'a> Planning<'a> {
    fn room(&mut self) -> bool {
        let room = self.plan.changes.len() < MAX_STEPS;
        if !room {
            self.plan.report.more = true;
        }
        room
    }

    fn wake(&mut self, at: Mono) {
        let wake = self.plan.report.wake.map_or(at, |held| held.min(at));
        self.plan.report.wake = Some(wake);
    }

    fn step(&mut self, kind: PlannedStepKind, replica: &Replica) {
        self.plan.steps.push(Step {
            kind,
            slot: replica.slot,
            host: replica.host.clone(),
            release: replica.release,
        });
    }

    fn event(
        &mut self,
        severity: EventSeverity,
        reason: &str,
        message: String,
        host: Option<&HostUid>,
    ) {
        let host = host.and_then(|uid| self.view.host(uid)).map(|h| h.name.to_string());
        self.plan.changes.push(Change::AppendEvent(Event {
            sequence: 0,
            time: Some(berth_proto::convert::timestamp(self.now.wall)),
            severity: severity as i32,
            kind: "deployment".to_owned(),
            name: self.deployment.name.to_string(),
            namespace: self.deployment.namespace.to_string(),
            uid: self.deployment.uid.to_string(),
            reason: reason.to_owned(),
            message,
            actor: "server".to_owned(),
            host: host.unwrap_or_default(),
            deployment: self.deployment.name.to_string(),
        }));
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
            revision: Default::default(),
        };
        let kind =
            if replaces.is_some() { PlannedStepKind::Replace } else { PlannedStepKind::Place };
        self.step(kind, &replica);
        self.plan.changes.push(Change::PutReplica(Arc::new(replica)));
    }

    fn stop(&mut self, replica: &Replica) {
        self.step(PlannedStepKind::Stop, replica);
        self.plan.changes.push(Change::PutReplica(Arc::new(replica.stopped())));
    }

    fn mine(&self) -> Vec<Arc<Replica>> {
        self.view.replicas_of(&self.deployment.uid).cloned().collect()
    }

    /// Stops everything; ends when every host has confirmed that nothing is left.
    fn delete(&mut self) {
        let mine = self.mine();
        for replica in &mine {
            if !self.room() {
                return;
            }
            if self.view.host(&replica.host).is_none_or(|h| h.is_removed()) {
                self.plan.changes.push(Change::DeleteReplica(replica.uid.clone()));
            } else if replica.intent != ReplicaIntent::Stop {
                self.stop(replica);
            }
        }
        if mine.is_empty() {
            let uid = &self.deployment.uid;
            let releases: Vec<ReleaseNumber> =
                self.view.releases_of(uid).map(|r| r.number).collect();
            for number in releases {
                if !self.room() {
                    return;
                }
                self.plan.changes.push(Change::DeleteRelease(uid.clone(), number));
            }
            self.plan.changes.push(Change::DeleteDeployment(uid.clone()));
            self.event(
                EventSeverity::Info,
                "DEPLOYMENT_DELETED",
                "nothing of it is left".into(),
                None,
            );
        }
    }

    /// Nobody will ever report for a removed host.
    fn forget_removed_hosts(&mut self) {
        for replica in self.mine() {
            if self.view.host(&replica.host).is_none_or(|h| h.is_removed()) && self.room() {
                self.plan.changes.push(Change::DeleteReplica(replica.uid.clone()));
            }
        }
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
                if self.now.mono >= lost_at { Ok(()) } else { Err(Some(lost_at)) }
            }
        }
    }

    fn leaving(&self, replica: &Replica) -> bool {
        self.view.host(&replica.host).is_some_and(|h| h.is_draining())
    }

    fn replicated(&mut self, release: &Arc<Release>, wanted: u32) {
        self.plan.report.wanted = wanted;
        let mine = self.mine();
        let running: Vec<&Arc<Replica>> =
            mine.iter().filter(|r| r.runs() && !self.is_gone(r)).collect();
        let mut slots: BTreeMap<u32, Vec<&Arc<Replica>>> = BTreeMap::new();
        for replica in &running {
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
        let slots: BTreeMap<u32, Vec<&Arc<Replica>>> =
            (0..wanted).map(|slot| (slot, slots.remove(&slot).unwrap_or_default())).collect();
        self.roll(release, &mine, slots, None);
    }

    fn every_host(&mut self, release: &Arc<Release>) {
        let mine = self.mine();
        let pool_release = Arc::clone(release);
        // What a host has of this deployment does not speak against it.
        let placement = &self.deployment.spec.placement;
        let requires = crate::release::requires(&pool_release);
        let mut slots: BTreeMap<HostUid, Vec<&Arc<Replica>>> = BTreeMap::new();
        let mut rejected: BTreeMap<Rejection, u32> = BTreeMap::new();
        for host in self.view.hosts() {
            let here: Vec<&Arc<Replica>> =
                mine.iter().filter(|r| r.host == host.uid && r.runs()).collect();
            match placement::fits_at_all(host, self.live, release, &placement.require, &requires) {
                Ok(()) => {
                    slots.insert(host.uid.clone(), here);
                }
                Err(why @ (Rejection::Away | Rejection::Unknown | Rejection::EngineAway)) => {
                    if matches!(why, Rejection::Away | Rejection::Unknown)
                        && placement.require.iter().all(|r| r.matches(&host.labels))
                        && !host.is_cordoned()
                    {
                        self.plan.report.deferred.insert(host.uid.clone());
                    }
                }
                // A cordon keeps what is there; a drain or a lost label does not.
                Err(Rejection::Cordoned) if !host.is_draining() => {
                    if !here.is_empty() {
                        slots.insert(host.uid.clone(), here);
                    }
                }
                Err(why) => {
                    *rejected.entry(why).or_default() += 1;
                    for replica in here {
                        if self.room() {
                            self.stop(replica);
                        }
                    }
                }
            }
        }
        self.plan.report.wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        if slots.is_empty() && !rejected.is_empty() {
            self.plan.report.pending.insert(Unplaceable(rejected).to_string(), 1);
        }
        let hosts: Vec<HostUid> = slots.keys().cloned().collect();
        let numbered = slots
            .into_values()
            .enumerate()
            .map(|(i, here)| (u32::try_from(i).unwrap_or(u32::MAX), here))
            .collect();
        self.roll(release, &mine, numbered, Some(&hosts));
    }

    fn is_gone(&self, replica: &Replica) -> bool {
        self.view.host(&replica.host).is_none_or(|h| h.is_removed())
    }

    /// The rollout: `slots` hold the running replicas of each wanted slot. With `hosts` the n-th slot
    /// is that host.
    fn roll(
        &mut self,
        release: &Arc<Release>,
        mine: &[Arc<Replica>],
        slots: BTreeMap<u32, Vec<&Arc<Replica>>>,
        hosts: Option<&[HostUid]>,
    ) {
        let rollout = self.deployment.spec.rollout;
        let wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let mut same: BTreeMap<HostUid, u32> = BTreeMap::new();
        for replica in mine.iter().filter(|r| r.runs()) {
            *same.entry(replica.host.clone()).or_default() += 1;
        }
        // --- Count.
        let mut new_healthy = 0_u32;
        let mut old_healthy = 0_u32;
        let mut existing = 0_u32;
        let mut unknown = 0_u32;
        let mut deferred_slots = 0_u32;
        let mut replacing = 0_u32;
        let mut work: Vec<SlotWork<'_>> = Vec::new();
        for (slot, replicas) in &slots {
            let mut new = Vec::new();
            let mut old = Vec::new();
            for replica in replicas {
                if self.live.presence(&replica.host) == Presence::Unknown {
                    unknown += 1;
                }
                let current = replica.release == release.number && !replica.failed;
                if current && !self.leaving(replica) { &mut new } else { &mut old }
                    .push((*replica, self.health(replica)));
            }
            // Two of one slot on hosts that are back: one goes, the stand-in stays if it is healthy.
            if new.len() > 1 {
                new.sort_by_key(|(r, health)| {
                    let rank = match health {
                        Health::Healthy => 0,
                        Health::NotYet(_) => 1,
                        Health::Deferred => 2,
                    };
                    (rank, r.created, r.uid.clone())
                });
                let reachable = new[0].1 != Health::Deferred;
                for (replica, health) in new.split_off(1) {
                    // An away host's replica is left alone until it can be told.
                    if reachable && health != Health::Deferred && self.room() {
                        self.stop(replica);
                    }
                }
            }
            for (_, health) in &new {
                match health {
                    Health::Healthy => new_healthy += 1,
                    Health::NotYet(Some(at)) => self.wake(*at),
                    Health::NotYet(None) | Health::Deferred => {}
                }
            }
            old_healthy +=
                u32::try_from(old.iter().filter(|(_, health)| *health == Health::Healthy).count())
                    .unwrap_or(0);
            let alive = |list: &[(&Arc<Replica>, Health)]| {
                u32::try_from(list.iter().filter(|(_, h)| *h != Health::Deferred).count())
                    .unwrap_or(0)
            };
            existing += alive(&new) + alive(&old);
            replacing += u32::try_from(
                new.iter()
                    .filter(|(r, h)| {
                        r.replaces.is_some() && *h != Health::Healthy && self.old_of(r).is_some()
                    })
                    .count(),
            )
            .unwrap_or(0);
            for (replica, health) in new.iter().chain(&old) {
                if *health == Health::Deferred {
                    self.plan.report.deferred.insert(replica.host.clone());
                }
            }
            let all_deferred = !new.is_empty() || !old.is_empty();
            let all_deferred =
                all_deferred && new.iter().chain(&old).all(|(_, h)| *h == Health::Deferred);
            if all_deferred {
                deferred_slots += 1;
            }
            work.push(SlotWork { slot: *slot, new, old });
        }
        // Those that are being stopped exist until their absence is known.
        let stopping: Vec<&Arc<Replica>> = mine
            .iter()
            .filter(|r| r.intent == ReplicaIntent::Stop && self.live.is_present(&r.host))
            .collect();
        existing += u32::try_from(stopping.len()).unwrap_or(u32::MAX);
        let floor = wanted.saturating_sub(deferred_slots).saturating_sub(rollout.max_unavailable);
        let mut healthy = new_healthy + old_healthy;
        let mut surge_room =
            (wanted.saturating_add(rollout.max_surge)).saturating_sub(existing + deferred_slots);
        // A single slot that cannot stand side by side must be allowed to change places.
        let replace_at_most = rollout.max_unavailable.max(1);
        let halted =
            matches!(self.deployment.rollout(), RolloutState::Paused | RolloutState::Failed);

        // --- Start.
        let mut pool: Option<Pool<'_>> = None;
        let release_ref: &Release = release;
        // Lifetimes: the pool borrows the release for as long as this function.
        let mut unplaced: BTreeMap<String, u32> = BTreeMap::new();
        for item in &work {
            let stand_in_for = self.needs_stand_in(item);
            let has_new = item.new.iter().any(|(_, h)| *h != Health::Deferred);
            let waits =
                item.new.iter().any(|(_, h)| *h == Health::Deferred) && stand_in_for.is_none();
            let old_deferred = !item.old.is_empty()
                && item.old.iter().all(|(_, h)| *h == Health::Deferred)
                && stand_in_for.is_none()
                && !self.drained_away(item);
            if has_new || waits || old_deferred {
                continue;
            }
            let first_fill = item.old.is_empty() && item.new.is_empty();
            // A halted rollout still fills what is empty, with the stable release when there is one.
            if halted && !first_fill && stand_in_for.is_none() {
                continue;
            }
            if !self.room() {
                break;
            }
            let empty_slot = first_fill || stand_in_for.is_some();
            let still_stopping = stopping.iter().any(|r| match hosts {
                Some(hosts) => r.host == hosts[item.slot as usize],
                None => r.slot == item.slot,
            });
            if surge_room == 0 && (!empty_slot || still_stopping) {
                continue;
            }
            let pool = pool.get_or_insert_with(|| {
                let placement = &self.deployment.spec.placement;
                Pool::new(
                    self.view,
                    self.live,
                    release_ref,
                    &placement.require,
                    placement.spread.as_deref(),
                    &crate::release::requires(release_ref),
                    &same,
                )
            });
            let chosen = match hosts {
                None => pool.take(),
                Some(hosts) => {
                    let host = hosts[item.slot as usize].clone();
                    pool.take_host(&host).map(|()| host)
                }
            };
            match chosen {
                Ok(host) => {
                    let slot = if hosts.is_some() { 0 } else { item.slot };
                    self.place(slot, host, release_ref, None, stand_in_for);
                    if !empty_slot || stand_in_for.is_none() {
                        surge_room = surge_room.saturating_sub(1);
                    }
                }
                Err(why) => {
                    // In place of the old one, on its host.
                    let candidate = item.old.iter().find(|(r, h)| {
                        *h != Health::Deferred
                            && !r.failed
                            && !self.leaving(r)
                            && self.fits_instead(release_ref, r)
                    });
                    match candidate {
                        Some((old, health)) if replacing < replace_at_most => {
                            replacing += 1;
                            if *health == Health::Healthy {
                                healthy = healthy.saturating_sub(1);
                            }
                            let slot = if hosts.is_some() { 0 } else { item.slot };
                            self.place(slot, old.host.clone(), release_ref, Some(old), None);
                        }
                        Some(_) => {}
                        None => *unplaced.entry(why.to_string()).or_default() += 1,
                    }
                }
            }
        }
        // Surge is used up, but the bounds let some be missing: replace by stopping first (below).

        // --- Stop.
        let mut spare = healthy.saturating_sub(floor);
        for item in &work {
            let new_is_healthy = item.new.iter().any(|(_, h)| *h == Health::Healthy);
            let new_exists = !item.new.is_empty();
            for (old, health) in &item.old {
                if *health == Health::Deferred {
                    continue;
                }
                // The agent itself stops the old one of a replacement, and brings it back.
                let replaced_by =
                    item.new.iter().find(|(r, _)| r.replaces.as_ref() == Some(&old.uid));
                let may = if old.failed {
                    true
                } else if let Some((_, h)) = replaced_by {
                    *h == Health::Healthy
                } else if halted {
                    false
                } else if *health == Health::Healthy {
                    // Stopping a healthy one must not go below the floor.
                    spare > 0
                        && (new_is_healthy
                            || (rollout.max_unavailable > 0 && (new_exists || surge_room == 0)))
                } else {
                    // Unhealthy ones serve nobody and go first.
                    new_is_healthy || new_exists || surge_room == 0
                };
                if may && self.room() {
                    if *health == Health::Healthy && replaced_by.is_none() && !old.failed {
                        spare = spare.saturating_sub(1);
                    }
                    self.stop(old);
                }
            }
        }
        for (why, count) in unplaced {
            *self.plan.report.pending.entry(why).or_default() += count;
        }
        self.judge(release, &work, wanted, new_healthy, unknown);
    }

    fn old_of(&self, replica: &Replica) -> Option<&Arc<Replica>> {
        self.view.replica(replica.replaces.as_ref()?)
    }

    /// The slot's replicas are all on lost hosts: whom a stand-in would stand in for.
    fn needs_stand_in<'b>(&mut self, item: &SlotWork<'b>) -> Option<&'b Replica> {
        let all = item.new.iter().chain(&item.old);
        let mut first: Option<&'b Replica> = None;
        for (replica, health) in all {
            if *health != Health::Deferred {
                return None;
            }
            match self.lost(&replica.host) {
                Ok(()) => first = first.or(Some(replica)),
                Err(at) => {
                    if let Some(at) = at {
                        self.wake(at);
                    }
                    return None;
                }
            }
        }
        first
    }

    /// A drained host that is away is left by placing elsewhere without waiting for it.
    fn drained_away(&self, item: &SlotWork<'_>) -> bool {
        item.old.iter().all(|(r, _)| self.leaving(r))
    }

    /// Whether the new release fits on the old one's host once the old one is gone.
    fn fits_instead(&self, release: &Release, old: &Replica) -> bool {
        let Some(host) = self.view.host(&old.host) else { return false };
        let requires = crate::release::requires(release);
        let require = &self.deployment.spec.placement.require;
        if placement::fits_at_all(host, self.live, release, require, &requires).is_err() {
            return false;
        }
        let mut used = crate::view::HostUse::clone(&self.view.host_use(&old.host));
        if let Some(before) = self.view.release(&old.deployment, old.release) {
            let amounts = &before.spec.resources;
            used.used.cpu_millis = used.used.cpu_millis.saturating_sub(amounts.cpu_millis);
            used.used.memory_bytes = used.used.memory_bytes.saturating_sub(amounts.memory_bytes);
            used.used.gpu_memory_bytes =
                used.used.gpu_memory_bytes.saturating_sub(amounts.gpu_memory_bytes);
            for publish in before.spec.ports.iter().filter_map(|p| p.publish.as_ref()) {
                used.ports.remove(&publish.port);
            }
        }
        // The ports the host itself sees in use are the old one's own.
        let mut host = crate::objects::Host::clone(host);
        host.facts.used_ports.clear();
        placement::has_room(&host, &used, &release.spec).is_ok()
    }

    /// Completion, progress and failure.
    fn judge(
        &mut self,
        release: &Arc<Release>,
        work: &[SlotWork<'_>],
        wanted: u32,
        new_healthy: u32,
        unknown: u32,
    ) {
        let state = self.deployment.rollout();
        if matches!(state, RolloutState::Complete | RolloutState::Paused | RolloutState::RolledBack)
        {
            self.plan.clock = None;
            return;
        }
        let done = work.iter().all(|item| {
            let reachable =
                |list: &[(&Arc<Replica>, Health)]| list.iter().any(|(_, h)| *h != Health::Deferred);
            let healthy = item.new.iter().any(|(_, h)| *h == Health::Healthy);
            let away = !item.new.is_empty() || !item.old.is_empty();
            let away = away && !reachable(&item.new) && !reachable(&item.old);
            (healthy && !reachable(&item.old)) || away
        });
        if unknown > 0 {
            // Rollouts and their deadlines stand still until every host has spoken.
            if let Some(clock) = &mut self.plan.clock {
                clock.at = self.now.mono;
            }
            return;
        }
        // With no host in reach nothing is done and nothing fails: the clock stands still.
        let in_reach = work.iter().any(|item| {
            item.new.iter().chain(&item.old).any(|(_, h)| *h != Health::Deferred)
                || (item.new.is_empty() && item.old.is_empty())
        });
        if wanted > 0 && !in_reach {
            if let Some(clock) = &mut self.plan.clock {
                clock.at = self.now.mono;
            }
            return;
        }
        if done && (new_healthy > 0 || (wanted == 0 && self.plan.report.pending.is_empty())) {
            self.complete(release);
            return;
        }
        let deadline = self.deployment.spec.rollout.progress_deadline_ms;
        let clock = match self.plan.clock.take() {
            Some(clock) if clock.release == release.number => {
                if new_healthy > clock.best {
                    RolloutClock {
                        best: new_healthy,
                        left_ms: deadline,
                        at: self.now.mono,
                        ..clock
                    }
                } else {
                    let left_ms = clock.left_ms.saturating_sub(self.now.mono.since_ms(clock.at));
                    RolloutClock { left_ms, at: self.now.mono, ..clock }
                }
            }
            Some(_) | None => {
                let stored = self.deployment.record.progress_left_ms;
                let left_ms = if stored == 0 { deadline } else { stored.min(deadline) };
                RolloutClock {
                    release: release.number,
                    best: new_healthy,
                    left_ms,
                    at: self.now.mono,
                }
            }
        };
        let failed_for_good = work
            .iter()
            .flat_map(|item| &item.old)
            .any(|(r, _)| r.failed && r.release == release.number);
        if clock.left_ms == 0 || failed_for_good {
            let why = if failed_for_good {
                "a replacement did not become ready in time on its host".to_owned()
            } else {
                format!(
                    "no replica became healthy within {}",
                    berth_proto::quantity::format_duration_ms(deadline)
                )
            };
            self.fail(release, &why);
            return;
        }
        self.wake(self.now.mono.plus_ms(clock.left_ms));
        self.plan.clock = Some(clock);
    }

    fn put(&mut self, edit: impl FnOnce(&mut berth_proto::record::DeploymentRecord)) {
        let edited = self.deployment.edited(edit);
        self.plan.changes.push(Change::PutDeployment(Arc::new(edited)));
    }

    fn complete(&mut self, release: &Arc<Release>) {
        self.plan.clock = None;
        let (number, now) = (release.number.0, self.now.wall.0);
        // A rollback that is complete keeps saying what happened: there is a newer release, which failed.
        let newest = self.view.releases_of(&self.deployment.uid).last().map(|r| r.number);
        let rolled_back = newest > Some(release.number);
        self.put(|record| {
            record.rollout = if rolled_back {
                RolloutState::RolledBack as i32
            } else {
                RolloutState::Complete as i32
            };
            record.stable_release = number;
            record.rollout_unix_ms = now;
            record.progress_left_ms = 0;
            if !rolled_back {
                record.reason.clear();
            }
        });
        self.plan
            .changes
            .push(Change::PutRelease(Arc::new(release.in_state(ReleaseState::Complete))));
        self.event(
            EventSeverity::Info,
            "ROLLOUT_COMPLETE",
            format!("release {number} is complete"),
            None,
        );
    }

    fn fail(&mut self, release: &Arc<Release>, why: &str) {
        self.plan.clock = None;
        let number = release.number;
        let now = self.now.wall;
        let stable = self.deployment.stable();
        let rollback = self.deployment.spec.rollout.on_failure == OnRolloutFailure::Rollback;
        let back_to = (rollback && stable.0 != 0 && stable != number)
            .then(|| self.view.release(&self.deployment.uid, stable).cloned())
            .flatten();
        self.plan
            .changes
            .push(Change::PutRelease(Arc::new(release.in_state(ReleaseState::Failed))));
        match back_to {
            // Back to the stable release itself, not to a copy under a new number: its replicas that
            // still run are then what is wanted, and nothing good is restarted.
            Some(stable) => {
                let reason = format!(
                    "release {number} failed: {why}; rolled back to release {}",
                    stable.number
                );
                self.put(|record| {
                    record.release = stable.number.0;
                    record.rollout = RolloutState::Rolling as i32;
                    record.reason.clone_from(&reason);
                    record.rollout_unix_ms = now.0;
                    record.progress_left_ms = 0;
                });
                self.event(EventSeverity::Error, "ROLLOUT_FAILED", reason, None);
            }
            None => {
                let reason = format!("release {number} failed: {why}");
                self.put(|record| {
                    record.rollout = RolloutState::Paused as i32;
                    record.reason.clone_from(&reason);
                    record.rollout_unix_ms = now.0;
                    record.progress_left_ms = 0;
                });
                self.event(EventSeverity::Error, "ROLLOUT_FAILED", reason, None);
            }
        }
    }
}

struct SlotWork<'a> {
    slot: u32,
    new: Vec<(&'a Arc<Replica>, Health)>,
    old: Vec<(&'a Arc<Replica>, Health)>,
}

#[cfg(test)]
#[path = "planner_tests.rs"]
mod tests;
