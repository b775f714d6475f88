//! What a plan may do at once, and what it must have done by now: counted from the ledger's records.

use super::fit;
use super::world::World;
use berth_proto::api::{ReplicaIntent, RolloutState};
use berth_proto::ids::{DeploymentUid, Mono, ReplicaUid};
use berth_proto::values::HostLossAction;
use berth_server_core::live::{Live, Presence};
use berth_server_core::objects::{Deployment, Replica};
use berth_server_core::orphans;
use berth_server_core::view::View;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is due is planned within this.
const PLANNED_MS: u64 = 2_000;

/// Replicas of the newest release that take another's place on their host and are not ready yet, on
/// hosts in reach: away ones hold up nobody.
fn changing(view: &View, live: &Live, deployment: &Deployment) -> usize {
    let changes = |replica: &&Arc<Replica>| {
        let old = replica.replaces.as_ref().and_then(|old| view.replica(old));
        let ready = live.replica(&replica.uid).is_some_and(|l| l.status.ready);
        // A host of a deployment without a number that takes no part is none of its places.
        let counts = view.host(&replica.host).is_some_and(|host| {
            let part = deployment.wanted().is_some() || !fit::is_shut(host);
            let release = view.release(&deployment.uid, deployment.release());
            let starts = release.is_some_and(|release| fit::can_start(host, release))
                && (deployment.wanted().is_some() || !view.is_held_back(&host.uid));
            part && !fit::is_draining(host) && starts
        });
        let current = replica.release == deployment.release() && counts;
        let reached = live.is_present(&replica.host);
        replica.runs() && current && reached && !replica.failed && old.is_some() && !ready
    };
    view.replicas_of(&deployment.uid).filter(changes).count()
}

/// What there is of a deployment on hosts in reach: wanted in one of its slots, or on its way out.
fn existing(view: &View, live: &Live, deployment: &Deployment, wanted: u32) -> usize {
    let counts = |r: &&Arc<Replica>| match r.intent {
        ReplicaIntent::Run => r.slot < wanted && fit::is_there(view, r),
        ReplicaIntent::Stop => true,
        ReplicaIntent::Orphan | ReplicaIntent::Unspecified => false,
    };
    let all = view.replicas_of(&deployment.uid).filter(counts);
    all.filter(|r| live.is_present(&r.host)).count()
}

impl World<'_> {
    /// A plan of one deployment.
    pub(super) fn check_at_once(
        &mut self,
        before: &View,
        after: &View,
        live: &Live,
        uid: &DeploymentUid,
    ) {
        let Some(deployment) = before.deployment(uid).filter(|d| !d.is_deleted()) else { return };
        let rollout = deployment.spec.rollout;
        let at_once = rollout.max_unavailable.max(1) as usize;
        let had = changing(before, live, deployment);
        let have = changing(after, live, deployment);
        if have > had.max(at_once) {
            let words = format!("{have} of {uid} change places at once");
            return self.broke(format!("{words}, and {at_once} may"));
        }
        // What the one before has, its successor may have.
        let new = after.replicas_of(uid).filter(|r| r.runs() && before.replica(&r.uid).is_none());
        let new = new.filter(|r| r.replaces.is_none());
        if let Some(words) = { new }.find_map(|r| fit::shut_out(before, after, r)) {
            return self.broke(words);
        }
        let Some(wanted) = deployment.wanted() else { return };
        let filled: BTreeSet<u32> =
            before.replicas_of(uid).filter(|r| fit::is_there(before, r)).map(|r| r.slot).collect();
        let placed: Vec<&Arc<Replica>> = after
            .replicas_of(uid)
            .filter(|r| r.runs() && before.replica(&r.uid).is_none())
            .filter(|r| r.replaces.is_none() && r.stands_in_for.is_none())
            .collect();
        let most = (wanted + rollout.max_surge) as usize;
        let there = existing(before, live, deployment, wanted) + placed.len();
        if there > most && placed.iter().any(|r| filled.contains(&r.slot)) {
            return self
                .broke(format!("{uid} has {there} with those that end, and may have {most}"));
        }
        let undecided = orphans::holding(before, deployment).into_iter();
        let undecided = undecided.filter(|(_, r)| live.is_present(&r.host)).map(|(slot, _)| slot);
        let held: BTreeSet<u32> = undecided.filter(|slot| !filled.contains(slot)).collect();
        if let Some(taken) = placed.iter().find(|r| held.contains(&r.slot)) {
            let words = format!("slot {} of {uid} is filled", taken.slot);
            return self.broke(format!("{words}, and what was found in it is not decided about"));
        }
        let paused = |view: &View| {
            view.deployment(uid).is_some_and(|held| {
                held.rollout() == RolloutState::Paused && held.release() == deployment.release()
            })
        };
        if !paused(before) || !paused(after) {
            return;
        }
        // What stands still stops nothing that is older and is alone in its slot.
        for old in before.replicas_of(uid).filter(|r| r.slot < wanted && fit::is_there(before, r)) {
            let stops = after.replica(&old.uid).is_some_and(|r| r.intent == ReplicaIntent::Stop);
            let older = old.release != deployment.release() && !old.failed;
            let other = |r: &&Arc<Replica>| r.uid != old.uid && fit::is_there(before, r);
            let mut others = before.replicas_of(uid).filter(other);
            let alone = others.all(|r| {
                r.slot != old.slot
                    && r.replaces.as_ref() != Some(&old.uid)
                    && old.replaces.as_ref() != Some(&r.uid)
            });
            if stops && older && alone {
                return self.broke(format!("{} is stopped, and its rollout is paused", old.uid));
            }
        }
    }

    /// All is planned that was due: a slot whose hosts are lost for good has another one, where a host
    /// has room.
    pub(super) fn check_lost(&mut self, view: &View, live: &Live, now: Mono) {
        let unknown = |uid| live.presence(uid) == Presence::Unknown;
        if self.book.restored || view.hosts().any(|host| unknown(&host.uid)) {
            return;
        }
        let lost = view.deployments().find_map(|d| self.kept_lost(view, live, d, now));
        if let Some(uid) = lost {
            self.broke(format!("{uid} is lost with its host, and nothing stands in for it"));
        }
    }

    fn kept_lost(
        &self,
        view: &View,
        live: &Live,
        deployment: &Deployment,
        now: Mono,
    ) -> Option<ReplicaUid> {
        let policy = deployment.spec.on_host_loss;
        let HostLossAction::Replace = policy.action else { return None };
        let wanted = deployment.wanted().filter(|_| !deployment.is_deleted())?;
        // What is on its way out may have to be gone first.
        let ends = |r: &Arc<Replica>| r.intent == ReplicaIntent::Stop && live.is_present(&r.host);
        if view.replicas_of(&deployment.uid).any(ends) {
            return None;
        }
        let release = view.release(&deployment.uid, deployment.release())?;
        let gone = |replica: &Replica| match live.presence(&replica.host) {
            Presence::Away(since) => now.since_ms(since) > policy.after_ms + PLANNED_MS,
            Presence::Present | Presence::Unknown => false,
        };
        let slots = (0..wanted).filter_map(|slot| {
            let mut mine = view.replicas_of(&deployment.uid).filter(|r| r.slot == slot && r.runs());
            let first = mine.next()?;
            (gone(first) && mine.all(|r| gone(r))).then_some(first)
        });
        let mut lost = slots.filter(|r| fit::is_there(view, r));
        let first = lost.next()?;
        let fits = |host: &&Arc<berth_server_core::objects::Host>| {
            fit::suits(live, deployment, release, host) && fit::has_room(view, host, release)
        };
        view.hosts().find(fits).map(|_| first.uid.clone())
    }
}
