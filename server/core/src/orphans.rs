//! What hosts run and a restored ledger does not know.
//!
//! A restore (or a fallback to an older export) turns the ledger back; what runs goes on. Each host
//! therefore gets no set before its complete observed set was taken in once in the new epoch
//! ([`View::is_held_back`]); what the ledger does not know of it is kept as orphans, in the same write
//! that says so, and as long as one of them is not decided about the host still gets no set. So no
//! set that lacks what runs is ever sent, whatever the order of things.
//!
//! Adopting takes an orphan into its deployment as it is: the very same body, in its own slot. Nothing
//! is restarted by it. Releasing lets it be stopped.

use crate::capacity::HostUse;
use crate::change::Change;
use crate::decide::{self, Asked};
use crate::objects::{Deployment, Replica};
use crate::placement::has_room_after;
use crate::view::View;
use berth_proto::agent::ReplicaReport;
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{DeploymentUid, HostUid, ReleaseNumber, ReplicaUid, Revision, Wall};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Changes of one decision: what one write of the ledger holds, with room for the rest of it.
pub const MAX_CHANGES: usize = 80;

impl View {
    /// Since a restore: the host's complete observed set was not taken in yet.
    #[must_use]
    pub fn is_unobserved(&self, host: &HostUid) -> bool {
        let seen = |epoch: u64| self.host(host).is_some_and(|h| h.record.observed_epoch >= epoch);
        self.cluster.observing && !seen(self.cluster.epoch)
    }

    /// Since a restore: the host gets no sets, because not all of what it runs is known and decided
    /// about.
    #[must_use]
    pub fn is_held_back(&self, host: &HostUid) -> bool {
        self.cluster.observing
            && (self.is_unobserved(host)
                || (self.orphans_on(host).next().is_some() && !bug!(OrphansUndecided)))
    }

    /// The orphans on a host.
    pub fn orphans_on(&self, host: &HostUid) -> impl Iterator<Item = &Arc<Replica>> {
        self.replicas_on(host).filter(|r| r.intent == ReplicaIntent::Orphan)
    }
}

/// Releases of one deployment at the most, a thousand a second for a month: a greater number is not one
/// that a server has given, and would spoil the numbers that follow ([`decide::apply`]).
const MAX_RELEASE: u64 = u32::MAX as u64;

/// What a host runs and the ledger does not know.
#[must_use]
pub fn found(view: &View, host: &HostUid, observed: &[ReplicaReport], now: Wall) -> Vec<Change> {
    let mut changes = Vec::new();
    if bug!(OrphansForgotten) {
        return changes;
    }
    for report in observed {
        let (Ok(uid), Ok(deployment)) = (report.replica_uid.parse(), report.deployment_uid.parse())
        else {
            continue;
        };
        if view.replica(&uid).is_some() || report.release > MAX_RELEASE {
            continue;
        }
        changes.push(Change::PutReplica(Arc::new(Replica {
            uid,
            deployment,
            slot: report.slot,
            release: ReleaseNumber(report.release),
            host: host.clone(),
            intent: ReplicaIntent::Orphan,
            replaces: None,
            stands_in_for: None,
            created: now,
            first_ready: report.status.as_ref().is_some_and(|s| s.ready).then_some(now),
            attempt_floor: 0,
            exits: Vec::new(),
            failed: false,
            reason: "found on its host, and not in the ledger".to_owned(),
            given_back: None,
            found_body: report.body_digest.parse().ok(),
            found_as: report.namespace.parse().ok().zip(report.deployment.parse().ok()),
            revision: Revision(0),
        })));
    }
    changes
}

/// Why an orphan cannot be adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unadoptable {
    /// There is no such deployment.
    #[error(
        "its deployment is not known, and one that is applied anew is another one, which finds no room on this host before: release this one, then apply the manifest"
    )]
    DeploymentUnknown,
    /// The deployment is being deleted.
    #[error("its deployment is being deleted; release it")]
    Deleting,
    /// There is no such release, or it has another body.
    #[error("its release is not known; it can only be released")]
    ReleaseUnknown,
    /// Something else runs in its place.
    #[error(
        "its slot is filled by another replica: release one of the two, and if hosts were not heard of since the restore, wait for them or remove them first"
    )]
    SlotFilled,
    /// Its host was given other replicas meanwhile, or before.
    #[error(
        "its host has no room for it beside what else it is given; release it, or drain the host"
    )]
    NoRoom,
}

impl Unadoptable {
    /// The stable word for it.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::DeploymentUnknown => "DEPLOYMENT_UNKNOWN",
            Self::Deleting => "DEPLOYMENT_DELETING",
            Self::ReleaseUnknown => "RELEASE_UNKNOWN",
            Self::SlotFilled => "SLOT_FILLED",
            Self::NoRoom => "NO_ROOM",
        }
    }
}

/// What a decision comes to.
#[derive(Debug, Clone, Default)]
pub struct Resolution {
    /// What to write.
    pub changes: Vec<Change>,
    /// Orphans decided about.
    pub resolved: u32,
    /// Those that cannot be adopted.
    pub kept: Vec<(ReplicaUid, Unadoptable)>,
    /// The deployments whose number is changed, as seen: they must still be so.
    pub seen: Vec<Arc<Deployment>>,
}

/// Lets orphans go: they will be stopped. At most [`MAX_CHANGES`]; the rest is for the next call.
#[must_use]
pub fn release(which: &[Arc<Replica>]) -> Resolution {
    let mut done = Resolution::default();
    for replica in which.iter().take(MAX_CHANGES) {
        done.changes.push(Change::PutReplica(Arc::new(replica.stopped())));
        done.resolved += 1;
    }
    done
}

/// What is forgotten with a host that is removed: replicas of deployments that are not known. Those of
/// known ones go with the next plan. At most [`MAX_CHANGES`].
#[must_use]
pub fn forgotten_with(view: &View, host: &HostUid) -> Vec<Change> {
    let nobodys = |r: &&Arc<Replica>| view.deployment(&r.deployment).is_none();
    let gone = view.replicas_on(host).filter(nobodys).take(MAX_CHANGES);
    gone.map(|r| Change::DeleteReplica(r.uid.clone())).collect()
}

/// Takes orphans into their deployments, lowest slots first. A deployment with a number gets as many
/// replicas as it takes for their slots to be wanted. At most [`MAX_CHANGES`] are made; the rest is for
/// the next call.
#[must_use]
pub fn adopt(view: &View, which: &[Arc<Replica>], asked: &Asked<'_>) -> Resolution {
    let mut done = Resolution::default();
    let mut places: BTreeMap<DeploymentUid, Places> = BTreeMap::new();
    let mut beside: BTreeMap<HostUid, HostUse> = BTreeMap::new();
    let mut wanted: BTreeMap<DeploymentUid, u32> = BTreeMap::new();
    let mut which: Vec<&Arc<Replica>> = which.iter().collect();
    which.sort_by_key(|r| (r.deployment.clone(), r.slot, r.uid.clone()));
    for replica in which {
        // Each deployment may need two more: itself, and an event.
        if done.changes.len() + 1 + 2 * (wanted.len() + 1) > MAX_CHANGES {
            break;
        }
        let deployment = match adoptable(view, replica) {
            Ok(found) => found,
            Err(why) => {
                done.kept.push((replica.uid.clone(), why));
                continue;
            }
        };
        let mine = places.entry(deployment.uid.clone());
        let mine = mine.or_insert_with(|| Places::new(view, deployment));
        let Some(slot) = mine.give(replica) else {
            done.kept.push((replica.uid.clone(), Unadoptable::SlotFilled));
            continue;
        };
        if !finds_room(view, replica, &mut beside) {
            mine.give_back(replica, slot);
            done.kept.push((replica.uid.clone(), Unadoptable::NoRoom));
            continue;
        }
        if let Some(number) = deployment.wanted() {
            let least = wanted.entry(deployment.uid.clone()).or_insert(number);
            *least = (*least).max(slot.saturating_add(u32::from(!bug!(AdoptedBeyond))));
        }
        done.changes.push(Change::PutReplica(Arc::new(Replica {
            slot,
            intent: ReplicaIntent::Run,
            reason: String::new(),
            found_body: None,
            found_as: None,
            ..Replica::clone(replica)
        })));
        done.resolved += 1;
    }
    for (uid, number) in wanted {
        let Some(deployment) = view.deployment(&uid) else { continue };
        if deployment.wanted() != Some(number)
            && let Ok(decision) = decide::scale(deployment, number, asked)
        {
            done.changes.extend(decision.proposal.changes);
            done.seen.push(Arc::clone(deployment));
        }
    }
    done
}

/// The orphans that may still be taken into this deployment, each with the slot it would get. Until somebody
/// decides, they hold those: what the planner put there would have to run beside them, or them be stopped
/// for it.
#[must_use]
pub fn holding<'a>(view: &'a View, deployment: &Deployment) -> Vec<(u32, &'a Arc<Replica>)> {
    let mut orphans: Vec<_> = undecided(view, &deployment.uid).collect();
    orphans.sort_by_key(|r| (r.slot, r.uid.clone()));
    let mut places = Places::new(view, deployment);
    places.all_told = true;
    orphans.into_iter().filter_map(|r| Some((places.give(r)?, r))).collect()
}

/// The orphans that may be adopted into a deployment.
fn undecided<'a, 'b>(
    view: &'a View,
    deployment: &'b DeploymentUid,
) -> impl Iterator<Item = &'a Arc<Replica>> + use<'a, 'b> {
    view.replicas_of(deployment).filter(|r| {
        r.intent == ReplicaIntent::Orphan && is_there(view, r) && adoptable(view, r).is_ok()
    })
}

fn is_there(view: &View, replica: &Replica) -> bool {
    view.host(&replica.host).is_some_and(|h| !h.is_removed())
}

/// The places of a deployment that orphans are given.
struct Places {
    /// Hosts are its places.
    on_hosts: bool,
    wanted: u32,
    filled: BTreeSet<Place>,
    /// Slots that orphans tell of themselves.
    told: BTreeSet<u32>,
    /// Every host has said what it runs: no other orphan may turn up.
    all_told: bool,
}

impl Places {
    fn new(view: &View, deployment: &Deployment) -> Self {
        let on_hosts = deployment.wanted().is_none();
        let runs = view.replicas_of(&deployment.uid).filter(|r| r.runs() && is_there(view, r));
        Self {
            on_hosts,
            wanted: deployment.wanted().unwrap_or(0),
            filled: runs.map(|r| place(on_hosts, r)).collect(),
            told: undecided(view, &deployment.uid).map(|r| r.slot).collect(),
            all_told: !view.hosts().any(|h| !h.is_removed() && view.is_unobserved(&h.uid)),
        }
    }

    /// The slot of an orphan: the one it tells, or the lowest that is free. A host that has joined anew has
    /// forgotten which they were, and tells 0 of all of them. `None`: there is none.
    fn give(&mut self, orphan: &Replica) -> Option<u32> {
        if self.filled.insert(place(self.on_hosts, orphan)) {
            return Some(orphan.slot);
        }
        // Who has not spoken yet may tell the slot that seems to be free.
        if self.on_hosts || !self.all_told {
            return None;
        }
        let free =
            |slot: &u32| !self.told.contains(slot) && !self.filled.contains(&Place::Slot(*slot));
        let slot = (0..self.wanted).find(free)?;
        self.filled.insert(Place::Slot(slot));
        Some(slot)
    }

    fn give_back(&mut self, orphan: &Replica, slot: u32) {
        let mine = if self.on_hosts { place(true, orphan) } else { Place::Slot(slot) };
        self.filled.remove(&mine);
    }
}

/// What only one replica can fill.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Slot(u32),
    Host(HostUid),
}

fn place(on_hosts: bool, replica: &Replica) -> Place {
    if on_hosts { Place::Host(replica.host.clone()) } else { Place::Slot(replica.slot) }
}

/// Whether a host has room for what it runs already, beside what it is given and what was adopted there
/// before; what an orphan takes is not counted as long as it is one.
fn finds_room(view: &View, orphan: &Replica, beside: &mut BTreeMap<HostUid, HostUse>) -> bool {
    let release = view.release(&orphan.deployment, orphan.release);
    let (Some(host), Some(release)) = (view.host(&orphan.host), release) else { return false };
    let used = beside
        .entry(orphan.host.clone())
        .or_insert_with(|| HostUse::clone(&view.host_use(&orphan.host)));
    let room = has_room_after(host, used, &release.spec, Some(&release.spec)).is_ok();
    if room {
        used.add(&release.spec);
    }
    room
}

fn adoptable<'a>(view: &'a View, orphan: &Replica) -> Result<&'a Arc<Deployment>, Unadoptable> {
    let deployment = view.deployment(&orphan.deployment).ok_or(Unadoptable::DeploymentUnknown)?;
    if deployment.is_deleted() {
        return Err(Unadoptable::Deleting);
    }
    // A number that was given again since is another release.
    let release = view.release(&orphan.deployment, orphan.release);
    let same = release.is_some_and(|r| orphan.found_body.as_ref() == Some(&r.body_digest));
    if !same {
        return Err(Unadoptable::ReleaseUnknown);
    }
    Ok(deployment)
}

#[cfg(test)]
#[path = "orphans_tests.rs"]
mod tests;
