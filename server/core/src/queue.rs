//! Which deployments are to be planned, and when.
//!
//! A queue without duplicates, keyed by deployment, or by deployment and host where a deployment runs
//! on every host and only that host has changed. What happens in the ledger and to what is known live
//! goes in; it wakes the deployments it concerns and no others:
//!
//! - a deployment's own objects, and the hosts its replicas are on, wake that deployment;
//! - a host that was heard of, whose record has changed or that has room again wakes the deployments
//!   that wait for just that, found by an index, and only if one more replica would fit there now;
//! - a time that a plan asked for wakes its deployment.
//!
//! It never plans itself and never forgets: whatever a pass over all deployments would change has been
//! woken (property-tested beside the planner). A pass over all still runs now and then with the same
//! functions, as a check: what it finds that was not woken is reported as [`Why::Check`].

use crate::change::Change;
use crate::live::{Live, Moved};
use crate::objects::Replica;
use crate::placement::{Need, WaitsFor};
use crate::planner::Report;
use crate::view::View;
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What is to be planned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A whole deployment.
    Whole(DeploymentUid),
    /// One host of a deployment that runs on every host.
    OnHost(DeploymentUid, HostUid),
}

impl Key {
    /// The deployment.
    #[must_use]
    pub fn deployment(&self) -> &DeploymentUid {
        match self {
            Self::Whole(uid) | Self::OnHost(uid, _) => uid,
        }
    }
}

/// Why something is to be planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Something happened.
    Woken,
    /// Nothing that the queue knows of; a plan that changes something means that a wake was missed.
    Check,
}

/// The queue. Bounded by the view: one entry for each deployment and each of its hosts.
#[derive(Debug, Default)]
pub struct Queue {
    order: VecDeque<Key>,
    why: BTreeMap<Key, Why>,
    timers: BTreeSet<(Mono, DeploymentUid)>,
    timer_of: BTreeMap<DeploymentUid, Mono>,
    /// Who waits for what of any host.
    waiting: BTreeMap<WaitsFor, BTreeSet<DeploymentUid>>,
    waits: BTreeMap<DeploymentUid, BTreeSet<WaitsFor>>,
    every_host: BTreeSet<DeploymentUid>,
    /// Of those the ones that are planned as a whole, whichever host has changed.
    unsettled: BTreeSet<DeploymentUid>,
    /// Whose time is not counted until all hosts were heard of.
    unheard: BTreeSet<DeploymentUid>,
    /// Where each replica is, since a deletion names only the replica; and whether it is an orphan.
    placed: BTreeMap<ReplicaUid, (DeploymentUid, HostUid, bool)>,
}

impl Queue {
    /// A queue that has seen nothing yet: everything is to be planned.
    #[must_use]
    pub fn new(view: &View) -> Self {
        let mut queue = Self::default();
        for replica in view.replicas() {
            queue.placed.insert(replica.uid.clone(), placed(replica));
        }
        for deployment in view.deployments() {
            if deployment.wanted().is_none() {
                queue.every_host.insert(deployment.uid.clone());
            }
            queue.wake(Key::Whole(deployment.uid.clone()));
        }
        queue
    }

    /// Puts something into the queue, once.
    pub fn wake(&mut self, key: Key) {
        self.put(key, Why::Woken);
    }

    fn put(&mut self, key: Key, why: Why) {
        if let Key::OnHost(uid, _) = &key
            && self.why.get(&Key::Whole(uid.clone())) == Some(&Why::Woken)
        {
            return;
        }
        match self.why.get(&key) {
            Some(Why::Woken) => {}
            Some(Why::Check) => {
                self.why.insert(key, why);
            }
            None => {
                self.why.insert(key.clone(), why);
                self.order.push_back(key);
            }
        }
    }

    /// Puts everything that does not wait in the queue already, as a check.
    pub fn check_all(&mut self, view: &View) {
        for deployment in view.deployments() {
            let key = Key::Whole(deployment.uid.clone());
            if !self.why.contains_key(&key) {
                self.put(key, Why::Check);
            }
        }
    }

    /// Takes what is to be planned next.
    pub fn next(&mut self, now: Mono) -> Option<(Key, Why)> {
        while let Some((at, uid)) = self.timers.first().cloned()
            && at <= now
        {
            self.timers.pop_first();
            self.timer_of.remove(&uid);
            self.wake(Key::Whole(uid));
        }
        let key = self.order.pop_front()?;
        let why = self.why.remove(&key).unwrap_or(Why::Woken);
        Some((key, why))
    }

    /// When a time that was asked for comes next.
    #[must_use]
    pub fn due(&self) -> Option<Mono> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Nothing is to be planned before [`Queue::due`].
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.order.is_empty()
    }

    /// Whether a deployment, or a host of it, is in the queue or due by then.
    #[cfg(test)]
    pub(crate) fn holds(&self, uid: &DeploymentUid, now: Mono) -> bool {
        self.why.keys().any(|key| key.deployment() == uid)
            || self.timer_of.get(uid).is_some_and(|at| *at <= now)
    }

    /// What a plan of this key said.
    pub fn planned(&mut self, key: &Key, report: &Report) {
        let uid = key.deployment();
        match key {
            Key::Whole(_) => {
                self.forget_waits(uid);
                self.set_timer(uid, report.wake);
                if report.unsettled {
                    self.unsettled.insert(uid.clone());
                } else {
                    self.unsettled.remove(uid);
                }
                if report.unheard {
                    self.unheard.insert(uid.clone());
                } else {
                    self.unheard.remove(uid);
                }
            }
            Key::OnHost(..) => {}
        }
        for what in &report.waits_for {
            self.wait(uid, *what);
        }
        if report.more || report.whole {
            self.wake(Key::Whole(uid.clone()));
        }
    }

    /// Plan it again at that time, if nothing wakes it sooner.
    pub fn retry(&mut self, uid: &DeploymentUid, at: Mono) {
        let at = self.timer_of.get(uid).map_or(at, |held| at.min(*held));
        self.set_timer(uid, Some(at));
    }

    fn set_timer(&mut self, uid: &DeploymentUid, at: Option<Mono>) {
        if let Some(old) = self.timer_of.remove(uid) {
            self.timers.remove(&(old, uid.clone()));
        }
        if let Some(at) = at {
            self.timer_of.insert(uid.clone(), at);
            self.timers.insert((at, uid.clone()));
        }
    }

    fn wait(&mut self, uid: &DeploymentUid, what: WaitsFor) {
        self.waits.entry(uid.clone()).or_default().insert(what);
        self.waiting.entry(what).or_default().insert(uid.clone());
    }

    fn forget_waits(&mut self, uid: &DeploymentUid) {
        for what in self.waits.remove(uid).unwrap_or_default() {
            if let Some(all) = self.waiting.get_mut(&what) {
                all.remove(uid);
            }
        }
    }

    fn forget(&mut self, uid: &DeploymentUid) {
        self.forget_waits(uid);
        self.set_timer(uid, None);
        self.every_host.remove(uid);
        self.unsettled.remove(uid);
        self.unheard.remove(uid);
        let gone: Vec<Key> = self.why.keys().filter(|k| k.deployment() == uid).cloned().collect();
        for key in gone {
            self.why.remove(&key);
        }
        self.order.retain(|key| key.deployment() != uid);
    }

    /// Something was written. `view` has it in.
    pub fn changed(&mut self, view: &View, live: &Live, change: &Change) {
        match change {
            Change::PutDeployment(deployment) => {
                let uid = &deployment.uid;
                if deployment.wanted().is_none() {
                    self.every_host.insert(uid.clone());
                } else {
                    self.every_host.remove(uid);
                }
                self.wake(Key::Whole(uid.clone()));
            }
            Change::DeleteDeployment(uid) => self.forget(uid),
            Change::PutRelease(release) => self.wake(Key::Whole(release.deployment.clone())),
            Change::PutReplica(replica) => {
                let before = self.placed.insert(replica.uid.clone(), placed(replica));
                self.wake_replica(view, &replica.deployment, &replica.host);
                // An orphan that was decided about may let its host be used again, by whoever stayed away.
                let decided = before.as_ref().is_some_and(|(_, _, orphan)| *orphan);
                if let Some((deployment, host, _)) = before
                    && (deployment != replica.deployment || host != replica.host)
                {
                    self.wake_replica(view, &deployment, &host);
                    self.host_may_take(view, live, &host, &[WaitsFor::Room]);
                }
                if decided {
                    self.host_changed(view, live, &replica.host);
                } else if replica.replaces.is_some() || replica.failed || !replica.runs() {
                    // What it takes of its host may be less than before.
                    self.host_may_take(view, live, &replica.host, &[WaitsFor::Room]);
                }
            }
            Change::DeleteReplica(uid) => {
                if let Some((deployment, host, orphan)) = self.placed.remove(uid) {
                    self.wake_replica(view, &deployment, &host);
                    if orphan {
                        // As one that was decided about.
                        self.host_changed(view, live, &host);
                    } else if !bug!(RoomWakeLost) {
                        self.host_may_take(view, live, &host, &[WaitsFor::Room]);
                    }
                }
            }
            Change::PutHost(host) => self.host_changed(view, live, &host.uid),
            Change::DeleteRelease(..)
            | Change::PutCluster(_)
            | Change::SetGeneration(..)
            | Change::PutModel(_)
            | Change::PutVersion(_)
            | Change::DeleteVersion(..)
            | Change::AppendAliasMove(_)
            | Change::PutJoinToken(_)
            | Change::DeleteJoinToken(_)
            | Change::PutUser(_)
            | Change::PutUserToken(_)
            | Change::DeleteUserToken(_)
            | Change::PutRequest(_)
            | Change::DeleteRequest(_)
            | Change::AppendEvent(_)
            | Change::DeleteEvent(_)
            | Change::DeleteAudit(_)
            | Change::AppendAudit(_) => {}
        }
    }

    /// What is known live has moved. `live` has it in.
    pub fn moved(&mut self, view: &View, live: &Live, moved: &Moved) {
        match moved {
            Moved::Host(host) if !bug!(HostWakeLost) => self.host_changed(view, live, host),
            Moved::Host(_) => {}
            Moved::Replica(uid) => {
                let known = self.placed.get(uid).cloned();
                let known = known.or_else(|| view.replica(uid).map(|r| placed(r)));
                if let Some((deployment, host, _)) = known {
                    self.wake_replica(view, &deployment, &host);
                }
            }
        }
    }

    /// A replica of a deployment has changed; an orphan's deployment may not be there.
    fn wake_replica(&mut self, view: &View, deployment: &DeploymentUid, host: &HostUid) {
        if self.every_host.contains(deployment) && !self.unsettled.contains(deployment) {
            self.wake(Key::OnHost(deployment.clone(), host.clone()));
        } else if view.deployment(deployment).is_some() {
            self.wake(Key::Whole(deployment.clone()));
        }
    }

    /// A host's record or presence has changed: all that have something there look at it, and all that
    /// wait and would fit.
    fn host_changed(&mut self, view: &View, live: &Live, host: &HostUid) {
        let here: BTreeSet<DeploymentUid> =
            view.replicas_on(host).map(|r| r.deployment.clone()).collect();
        for uid in here.union(&self.every_host.clone()) {
            self.wake_replica(view, uid, host);
        }
        for uid in self.unheard.clone() {
            self.wake(Key::Whole(uid));
        }
        self.host_may_take(
            view,
            live,
            host,
            &[WaitsFor::Presence, WaitsFor::Record, WaitsFor::Room],
        );
    }

    /// Wakes those that wait for one of these and would fit on the host now. Those that would not wait
    /// from now on for what is against them there as well.
    fn host_may_take(&mut self, view: &View, live: &Live, uid: &HostUid, reasons: &[WaitsFor]) {
        let Some(host) = view.host(uid).filter(|h| !h.is_removed()) else { return };
        let waiting: BTreeSet<DeploymentUid> =
            reasons.iter().filter_map(|r| self.waiting.get(r)).flatten().cloned().collect();
        for deployment_uid in waiting {
            if self.why.get(&Key::Whole(deployment_uid.clone())) == Some(&Why::Woken) {
                continue;
            }
            let Some(deployment) = view.deployment(&deployment_uid) else { continue };
            let Some(release) = view.release(&deployment_uid, deployment.release()) else {
                continue;
            };
            if deployment.wanted().is_none() {
                self.wake(Key::OnHost(deployment_uid, uid.clone()));
                continue;
            }
            // Where it has a replica, the room may do for changing places.
            let here = view.replicas_on(uid).any(|r| r.deployment == deployment_uid);
            match Need::new(deployment, release).fits(view, live, host) {
                Ok(()) => self.wake(Key::Whole(deployment_uid)),
                Err(_) if here => self.wake(Key::Whole(deployment_uid)),
                Err(why) => self.wait(&deployment_uid, why.waits_for()),
            }
        }
    }
}

fn placed(replica: &Replica) -> (DeploymentUid, HostUid, bool) {
    let orphan = replica.intent == ReplicaIntent::Orphan;
    (replica.deployment.clone(), replica.host.clone(), orphan)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
