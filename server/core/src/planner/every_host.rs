//! Deployments that run on every host that suits them: each such host is a slot.

use super::Planning;
use super::roll::Slot;
use crate::live::Presence;
use crate::objects::{Host, Release, Replica};
use crate::placement::{Need, Rejection, Unplaceable};
use berth_proto::api::RolloutState;
use berth_proto::ids::HostUid;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a host means to a deployment that runs on every host.
enum Standing {
    /// It is a slot.
    Slot,
    /// It cannot be spoken to; it would be one otherwise.
    Deferred,
    /// What is there stays, nothing new comes, for this reason.
    Left(Rejection),
    /// It is none.
    Not(Rejection),
}

impl<'a> Planning<'a> {
    fn standing(&self, need: &Need<'_>, host: &Host) -> Standing {
        match need.suits(host, self.live) {
            // It gets no sets before people have decided.
            Ok(()) if self.view.is_held_back(&host.uid) => Standing::Left(Rejection::HeldBack),
            Ok(()) => Standing::Slot,
            Err(Rejection::Away | Rejection::Unknown) => {
                match need.require.iter().find(|r| !r.matches(&host.labels)) {
                    None => Standing::Deferred,
                    Some(requirement) => Standing::Left(Rejection::Label(requirement.to_string())),
                }
            }
            Err(
                why @ (Rejection::EngineAway
                | Rejection::ContainersUnreached
                | Rejection::Quarantined
                | Rejection::HeldBack),
            ) => Standing::Left(why),
            // A cordon keeps what is there; a drain or a lost label does not.
            Err(why @ Rejection::Cordoned) if !host.is_draining() => Standing::Left(why),
            Err(
                why @ (Rejection::Cordoned
                | Rejection::WaitingForApproval
                | Rejection::Label(_)
                | Rejection::Platform(_)
                | Rejection::Memory
                | Rejection::Cpu
                | Rejection::GpuMemory
                | Rejection::Port(_)
                | Rejection::Policy(_)
                | Rejection::Feature(_)),
            ) => Standing::Not(why),
        }
    }

    pub(super) fn every_host(&mut self, release: &Arc<Release>, mine: &[Arc<Replica>]) {
        let need = Need::new(self.deployment, release);
        let mut here: BTreeMap<&HostUid, Vec<&Arc<Replica>>> = BTreeMap::new();
        for replica in mine.iter().filter(|r| r.runs()) {
            here.entry(&replica.host).or_default().push(replica);
        }
        let mut slots = Vec::new();
        let mut rejected: BTreeMap<Rejection, u32> = BTreeMap::new();
        for host in self.view.hosts() {
            let replicas = here.remove(&host.uid).unwrap_or_default();
            let slot = |replicas| Slot {
                slot: 0,
                host: Some(host.uid.clone()),
                replicas,
                undecided: None,
            };
            match self.standing(&need, host) {
                Standing::Slot => slots.push(slot(replicas)),
                Standing::Deferred => {
                    self.plan.report.deferred.insert(host.uid.clone());
                    if !replicas.is_empty() {
                        slots.push(slot(replicas));
                    } else if self.live.presence(&host.uid) == Presence::Unknown {
                        self.unheard += 1;
                    }
                }
                // Something old there waits until the host takes part again, and holds up nothing.
                Standing::Left(why) => {
                    if replicas.is_empty() {
                        *rejected.entry(why).or_default() += 1;
                    }
                    let current = |r: &&Arc<Replica>| r.release == release.number && !r.failed;
                    let (some, all) = (!replicas.is_empty(), replicas.iter().all(current));
                    if some && all {
                        slots.push(slot(replicas));
                    } else if some {
                        self.plan.report.deferred.insert(host.uid.clone());
                    }
                }
                Standing::Not(why) => {
                    *rejected.entry(why).or_default() += 1;
                    for replica in replicas {
                        if self.room() {
                            self.stop(replica);
                        }
                    }
                }
            }
        }
        self.plan.report.wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        // Those that are away get it on return. Without them nobody does, and that is said with the reason,
        // as a rollout with no slot at all is complete at once.
        if slots.is_empty() && self.plan.report.deferred.is_empty() {
            self.pending(&Unplaceable(rejected), 1);
        }
        self.roll(release, mine, slots);
    }

    /// One host alone, while no rollout is under way.
    pub(super) fn one_host(&mut self, uid: &HostUid) {
        let deployment = self.deployment;
        let settled = match deployment.rollout() {
            RolloutState::Complete | RolloutState::RolledBack => true,
            RolloutState::Unspecified
            | RolloutState::Rolling
            | RolloutState::Paused
            | RolloutState::Failed
            | RolloutState::Deleting => false,
        };
        let release = self.view.release(&deployment.uid, deployment.release());
        let (Some(release), true, None, false) =
            (release, settled, deployment.wanted(), deployment.is_deleted())
        else {
            self.plan.report.whole = true;
            return;
        };
        let here: Vec<&Arc<Replica>> =
            self.view.replicas_on(uid).filter(|r| r.deployment == deployment.uid).collect();
        let current = |r: &&&Arc<Replica>| r.release == release.number && !r.failed;
        let running: Vec<&&Arc<Replica>> = here.iter().filter(|r| r.runs()).collect();
        let Some(host) = self.view.host(uid).filter(|h| !h.is_removed()) else {
            self.plan.report.whole = !here.is_empty();
            return;
        };
        let need = Need::new(deployment, release);
        match self.standing(&need, host) {
            Standing::Slot if running.is_empty() && here.is_empty() => {
                match need.fits(self.view, self.live, host) {
                    Ok(()) => self.place(0, uid.clone(), release, None, None),
                    Err(why) => {
                        self.pending_on(uid, &Unplaceable(BTreeMap::from([(why, 1)])));
                    }
                }
            }
            // One that is being stopped must be gone first; anything but one of the release is for
            // the rollout to judge.
            Standing::Slot => {
                let good = running.len() == 1 && running.iter().all(current);
                self.plan.report.whole = !running.is_empty() && !good;
            }
            Standing::Deferred => {
                self.plan.report.deferred.insert(uid.clone());
            }
            // As when all are looked at: what is old there waits, and too many in the slot are for the
            // rollout to judge.
            Standing::Left(_) => {
                let all = running.iter().all(current);
                self.plan.report.whole = all && running.len() > 1;
                if !all {
                    self.plan.report.deferred.insert(uid.clone());
                }
            }
            Standing::Not(_) => {
                for replica in running {
                    self.stop(replica);
                }
            }
        }
    }
}
