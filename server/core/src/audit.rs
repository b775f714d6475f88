//! What must hold of any view and of what is known live, as findings.
//!
//! [`host`] and [`deployment`] look at one object and cost what it holds; [`everything`] looks at all
//! and compares the capacity index with a rebuilt one; [`step`] compares two moments. None of them
//! changes or mends anything: a finding is a mistake of ours, for a test, a simulation or an operator's
//! report. What may be wrong for the time of one planning pass ([`Finding::is_passing`]) counts only
//! where nothing is left to plan.

use crate::change::{Change, Subject};
use crate::live::{Live, Presence};
use crate::objects::{Deployment, Replica};
use crate::orphans;
use crate::view::View;
use berth_proto::api::{ReplicaIntent, RolloutState};
use berth_proto::ids::{DeploymentUid, HostUid, Mono, ReleaseNumber, ReplicaUid};
use berth_proto::values::{HostLossAction, Scale};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Finding {
    #[error("the capacity index is not what is rebuilt from the objects")]
    IndexDiffers,
    #[error("host {host} has {what} reserved beyond what it has")]
    Overcommitted { host: HostUid, what: &'static str },
    #[error("host port {port} of host {host} is given to two replicas")]
    PortTwice { host: HostUid, port: u16 },
    #[error("replica {replica} names {what}, which is not there")]
    Dangling { replica: ReplicaUid, what: &'static str },
    #[error("replica {replica} takes the place of one on another host")]
    ReplacesElsewhere { replica: ReplicaUid },
    #[error(
        "deployment {deployment} has {count} live replicas of one release in slot {slot} on hosts in reach"
    )]
    SlotTwice { deployment: DeploymentUid, slot: u32, count: usize },
    #[error("deployment {deployment} has {existing} replicas on hosts in reach, {most} at most")]
    BeyondSurge { deployment: DeploymentUid, existing: usize, most: usize },
    #[error("{what} of {object} went backwards")]
    Backwards { object: String, what: &'static str },
    #[error("replica {replica} is stopped by a plan, and its host is only out of reach")]
    StoppedUnheard { replica: ReplicaUid },
    #[error("replica {replica} is placed in {why}")]
    Misplaced { replica: ReplicaUid, why: &'static str },
    #[error(
        "deployment {deployment} is given {existing} replicas on hosts in reach, {most} at most"
    )]
    Surged { deployment: DeploymentUid, existing: usize, most: usize },
    #[error(
        "deployment {deployment} has {after} healthy replicas after a plan and had {before}; its floor is {floor}"
    )]
    BelowFloor { deployment: DeploymentUid, before: usize, after: usize, floor: usize },
}

impl Finding {
    /// It may be so until the next planning pass: after the return of a host that was replaced, after
    /// fewer replicas were asked for.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::SlotTwice { .. } | Self::BeyondSurge { .. } => true,
            Self::IndexDiffers
            | Self::Overcommitted { .. }
            | Self::PortTwice { .. }
            | Self::Dangling { .. }
            | Self::ReplacesElsewhere { .. }
            | Self::Backwards { .. }
            | Self::BelowFloor { .. }
            | Self::Misplaced { .. }
            | Self::StoppedUnheard { .. }
            | Self::Surged { .. } => false,
        }
    }
}

/// One host: nobody has more of it than there is, and no port is given twice.
#[must_use]
pub fn host(view: &View, uid: &HostUid) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(host) = view.host(uid).filter(|h| !h.is_removed()) else { return found };
    // What was found there after a restore and is let go was never asked whether it fits.
    let was_found = |r: &Arc<Replica>| r.intent == ReplicaIntent::Stop && r.found_body.is_some();
    let judged = !view.replicas_on(uid).any(was_found);
    let (used, have) = (view.host_use(uid).used, host.facts.capacity);
    for (what, used, have) in [
        ("memory", used.memory_bytes, have.memory_bytes),
        ("cpu", used.cpu_millis, have.cpu_millis),
        ("GPU memory", used.gpu_memory_bytes, have.gpu_memory_bytes),
    ] {
        if used > have && judged {
            found.push(Finding::Overcommitted { host: uid.clone(), what });
        }
    }
    let replaced: BTreeSet<&ReplicaUid> =
        view.replicas_on(uid).filter_map(|r| r.replaces.as_ref()).collect();
    let mut ports = BTreeSet::new();
    for replica in view.replicas_on(uid).filter(|r| !replaced.contains(&r.uid)) {
        if replica.intent == ReplicaIntent::Orphan || was_found(replica) {
            continue;
        }
        let Some(release) = view.release(&replica.deployment, replica.release) else { continue };
        for port in release.spec.ports.iter().filter_map(|p| Some(p.publish.as_ref()?.port)) {
            if !ports.insert(port) {
                found.push(Finding::PortTwice { host: uid.clone(), port });
            }
        }
    }
    found
}

/// One deployment: what its replicas name is there, and no slot is filled twice beyond the surge.
#[must_use]
pub fn deployment(view: &View, live: &Live, uid: &DeploymentUid) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut slots: BTreeMap<(u32, ReleaseNumber), usize> = BTreeMap::new();
    let mut existing = 0;
    for replica in view.replicas_of(uid) {
        if replica.intent == ReplicaIntent::Orphan {
            continue;
        }
        let dangling = |what| Finding::Dangling { replica: replica.uid.clone(), what };
        // One that was found after a restore and is let go names what was lost with it.
        let was_found = replica.intent == ReplicaIntent::Stop && replica.found_body.is_some();
        if view.release(uid, replica.release).is_none() && !was_found {
            found.push(dangling("a release"));
        }
        if view.host(&replica.host).is_none() {
            found.push(dangling("a host"));
        }
        let old = replica.replaces.as_ref().and_then(|old| view.replica(old));
        if old.is_some_and(|old| old.host != replica.host) {
            found.push(Finding::ReplacesElsewhere { replica: replica.uid.clone() });
        }
        if stands(view, live, replica) {
            existing += 1;
            *slots.entry((replica.slot, replica.release)).or_default() += 1;
        }
    }
    let Some(deployment) = view.deployment(uid) else {
        found.extend(
            view.replicas_of(uid)
                .filter(|r| r.runs() || (r.intent == ReplicaIntent::Stop && r.found_body.is_none()))
                .map(|r| Finding::Dangling { replica: r.uid.clone(), what: "a deployment" }),
        );
        return found;
    };
    if let (Some(wanted), false) = (deployment.wanted(), deployment.is_deleted()) {
        let surge = deployment.spec.rollout.max_surge as usize;
        let most = wanted as usize + surge;
        if existing > most {
            found.push(Finding::BeyondSurge { deployment: uid.clone(), existing, most });
        }
        for ((slot, _), count) in slots.into_iter().filter(|(_, count)| *count > 1) {
            found.push(Finding::SlotTwice { deployment: uid.clone(), slot, count });
        }
    }
    found
}

/// It counts as one of its deployment on a host in reach. One that changes places is there once,
/// whichever of the two runs; one that moves off a drained host is there twice until it has.
fn stands(view: &View, live: &Live, replica: &Replica) -> bool {
    let old = replica.replaces.as_ref().and_then(|old| view.replica(old));
    let stays = view.host(&replica.host).is_some_and(|h| !h.is_draining() && !h.is_removed());
    let release = view.release(&replica.deployment, replica.release);
    replica.runs()
        && !replica.failed
        && stays
        && live.is_present(&replica.host)
        && old.is_none_or(|old| !old.runs())
        && release.is_some_and(|r| r.spec.scale != Scale::EveryHost)
}

/// How many of a deployment's replicas count.
fn standing(view: &View, live: &Live, uid: &DeploymentUid) -> usize {
    view.replicas_of(uid).filter(|r| stands(view, live, r)).count()
}

/// Everything.
#[must_use]
pub fn everything(view: &View, live: &Live) -> Vec<Finding> {
    let mut found = Vec::new();
    if view.capacity().contents() != view.rebuilt_capacity().contents() {
        found.push(Finding::IndexDiffers);
    }
    found.extend(view.hosts().flat_map(|h| host(view, &h.uid)));
    let mut deployments: BTreeSet<DeploymentUid> =
        view.deployments().map(|d| d.uid.clone()).collect();
    deployments.extend(view.replicas().map(|r| r.deployment.clone()));
    found.extend(deployments.iter().flat_map(|uid| deployment(view, live, uid)));
    found
}

/// Two moments: what must never go backwards has not.
#[must_use]
pub fn step(before: (&View, &Live), after: (&View, &Live)) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut back = |object: String, what| found.push(Finding::Backwards { object, what });
    if after.0.epoch() < before.0.epoch() {
        back("the cluster".to_owned(), "epoch");
    }
    if after.0.revision < before.0.revision {
        back("the view".to_owned(), "revision");
    }
    for host in before.0.hosts() {
        if after.0.generation(&host.uid) < before.0.generation(&host.uid) {
            back(format!("host {}", host.uid), "generation");
        }
    }
    for old in before.0.replicas() {
        if let Some(new) = after.0.replica(&old.uid) {
            if let Some(what) = turned_back(old, new) {
                back(format!("replica {}", old.uid), what);
            }
            let order =
                |live: &Live| live.replica(&old.uid).map(|l| (l.status.attempt, l.status.phase));
            if let (Some(old_order), Some(new_order)) = (order(before.1), order(after.1))
                && new_order < old_order
            {
                back(format!("replica {}", old.uid), "attempt and phase");
            }
        }
    }
    found
}

/// One change between two moments: the same as [`step`], at the cost of the change alone.
#[must_use]
pub fn change(before: &View, after: &View, change: &Change) -> Vec<Finding> {
    let back = |object: String, what| Finding::Backwards { object, what };
    let mut found = Vec::new();
    match change.subject() {
        Subject::Replica(uid) => {
            if let (Some(old), Some(new)) = (before.replica(uid), after.replica(uid))
                && let Some(what) = turned_back(old, new)
            {
                found.push(back(format!("replica {uid}"), what));
            }
        }
        Subject::HostSet(host) => {
            if after.generation(host) < before.generation(host) {
                found.push(back(format!("host {host}"), "generation"));
            }
        }
        Subject::Cluster => {
            if after.epoch() < before.epoch() {
                found.push(back("the cluster".to_owned(), "epoch"));
            }
        }
        Subject::Deployment(_)
        | Subject::Release(_)
        | Subject::Host(_)
        | Subject::Models
        | Subject::Access
        | Subject::Past => {}
    }
    found
}

/// Whether a plan for one deployment, from `before` to `after`, keeps its floor: as many replicas
/// healthy as are wanted, less those whose hosts are away and those that may be unavailable; or as many
/// as there were, where that was less already. One that changes places with another counts as healthy
/// for as long as it may: two of a slot share one place. A slot that finds no room keeps no other one
/// from changing back, as it keeps none from changing places: that may be what makes the room.
#[must_use]
pub fn floor(
    before: &View,
    after: &View,
    live: &Live,
    uid: &DeploymentUid,
    now: Mono,
) -> Option<Finding> {
    let deployment = before.deployment(uid)?;
    let wanted = deployment.wanted().filter(|_| !deployment.is_deleted())?;
    let rollout = deployment.spec.rollout;
    let healthy = |replica: &Replica| {
        let since = live.replica(&replica.uid).and_then(|l| l.ready_since);
        since.is_some_and(|since| {
            let known = replica.first_ready.is_some() && replica.release != deployment.release();
            known || now >= since.plus_ms(rollout.ready_for_ms)
        })
    };
    let stays = |view: &View, r: &Replica| view.host(&r.host).is_some_and(|h| !h.is_removed());
    let counts = |view: &View, uid: &ReplicaUid| {
        let there = |r: &Replica| live.is_present(&r.host) && stays(view, r);
        view.replica(uid).filter(|r| r.runs() && r.slot < wanted && there(r)).cloned()
    };
    let (mut had, mut have) = (0, 0);
    // All that is stopped gives its place back.
    let mut back = true;
    let mut reachable: BTreeSet<u32> = BTreeSet::new();
    let mut filled: BTreeSet<u32> = BTreeSet::new();
    for replica in before.replicas_of(uid).filter(|r| r.runs() && r.slot < wanted) {
        if stays(before, replica) {
            filled.insert(replica.slot);
        }
        let Some(replica) = counts(before, &replica.uid) else { continue };
        reachable.insert(replica.slot);
        if !healthy(&replica) {
            continue;
        }
        had += 1;
        let new = counts(after, &replica.uid);
        // Its successor is healthy, or it failed for good: it serves nobody any more.
        let done = replica.failed
            || before
                .replicas_of(uid)
                .any(|r| r.replaces.as_ref() == Some(&replica.uid) && healthy(r));
        have += usize::from(new.is_some() || done);
        let old = replica.replaces.as_ref().and_then(|old| counts(after, old));
        back &= new.is_some() || done || old.is_some_and(|old| old.slot == replica.slot);
    }
    // The place of an orphan on a host that is away is deferred, as any other there.
    for (slot, orphan) in orphans::holding(before, deployment) {
        if slot < wanted && filled.insert(slot) && live.is_present(&orphan.host) {
            reachable.insert(slot);
        }
    }
    let empty = if back {
        let filled = after.replicas_of(uid).filter(|r| r.runs() && r.slot < wanted);
        wanted as usize - filled.map(|r| r.slot).collect::<BTreeSet<_>>().len()
    } else {
        0
    };
    let deferred = filled.difference(&reachable).count();
    // A place that is changed within one host, and one that is changed back, cost what may change
    // places at once beside the floor.
    let changing = before.replicas_of(uid).any(|r| r.replaces.is_some());
    let spare = rollout.max_unavailable.max(u32::from(changing)) as usize;
    let floor = (wanted as usize).saturating_sub(deferred + empty + spare);
    let broken = have < had && have < floor;
    broken.then(|| Finding::BelowFloor { deployment: uid.clone(), before: had, after: have, floor })
}

/// Whether what a plan for one deployment places stands where it may, and when.
#[must_use]
pub fn placed(
    before: &View,
    after: &View,
    live: &Live,
    uid: &DeploymentUid,
    changes: &[Change],
    now: Mono,
) -> Vec<Finding> {
    let Some(deployment) = before.deployment(uid) else { return Vec::new() };
    let mut found = Vec::new();
    let mut any = false;
    for change in changes {
        let Change::PutReplica(replica) = change else { continue };
        let there = before.host(&replica.host).is_some_and(|host| !host.is_removed());
        let wanted = deployment.wanted().is_some_and(|wanted| replica.slot < wanted);
        if replica.intent == ReplicaIntent::Stop
            && (wanted && there && !deployment.is_deleted())
            && !live.is_present(&replica.host)
        {
            found.push(Finding::StoppedUnheard { replica: replica.uid.clone() });
        }
        if before.replica(&replica.uid).is_some() || !replica.runs() {
            continue;
        }
        any = true;
        let mut misplaced = |why| {
            found.push(Finding::Misplaced { replica: replica.uid.clone(), why });
        };
        let Some(host) = before.host(&replica.host).filter(|h| !h.is_removed()) else {
            misplaced("a host that is not there");
            continue;
        };
        let said = host.record.spec.unwrap_or_default();
        if said.cordoned || said.draining {
            misplaced("a cordoned host");
        }
        if !host.facts.engine_available {
            misplaced("a host without an engine that answers");
        }
        let release = before.release(uid, replica.release);
        let requires = release.map(|release| crate::release::requires(release));
        if requires.is_some_and(|all| all.iter().any(|f| !host.facts.features.contains(f))) {
            misplaced("a host whose agent does not know what it needs");
        }
        if host.record.quarantined || host.record.waiting_for_approval {
            misplaced("a host that takes no part yet");
        }
        if !live.is_present(&host.uid) {
            misplaced("a host that is away");
        }
        if !deployment.spec.placement.require.iter().all(|r| r.matches(&host.labels)) {
            misplaced("a host without the labels that are required");
        }
        let stood = replica.stands_in_for.as_ref().and_then(|old| before.replica(old));
        if stood.is_some_and(|old| !is_lost(live, deployment, &old.host, now)) {
            misplaced("the place of one whose host is not lost");
        }
        if replica.stands_in_for.is_none()
            && let Some(why) = beside(before, live, deployment, replica)
        {
            misplaced(why);
        }
    }
    let (had, have) = (standing(before, live, uid), standing(after, live, uid));
    // Two of one slot, of a host that came back or of another kind of deployment, are not of this plan;
    // nor is one of them that is there once this plan has ended a change of places.
    let mut slots = BTreeSet::new();
    let stays = |uid| after.replica(uid).is_some_and(|r| stands(after, live, r));
    let mut held = before.replicas_of(uid).filter(|r| stands(before, live, r) || stays(&r.uid));
    let once = held.all(|r| slots.insert(r.slot));
    if let Some(wanted) = deployment.wanted().filter(|_| any && once) {
        let most = wanted as usize + deployment.spec.rollout.max_surge as usize;
        if have > most && have > had {
            found.push(Finding::Surged { deployment: uid.clone(), existing: have, most });
        }
    }
    found
}

/// A host that a deployment's policy gives up.
fn is_lost(live: &Live, deployment: &Deployment, host: &HostUid, now: Mono) -> bool {
    let policy = &deployment.spec.on_host_loss;
    match live.presence(host) {
        Presence::Present | Presence::Unknown => false,
        Presence::Away(since) => {
            policy.action == HostLossAction::Replace && now >= since.plus_ms(policy.after_ms)
        }
    }
}

/// Why one that stands in for nobody may not be placed beside what its slot has already.
fn beside(
    view: &View,
    live: &Live,
    deployment: &Deployment,
    new: &Replica,
) -> Option<&'static str> {
    let same = |r: &&Arc<Replica>| match deployment.wanted() {
        Some(_) => r.slot == new.slot,
        None => r.host == new.host,
    };
    let host = |r: &Replica| view.host(&r.host).filter(|host| !host.is_removed());
    let drained =
        |r: &Replica| host(r).is_none_or(|host| host.record.spec.is_some_and(|spec| spec.draining));
    let there: Vec<&Arc<Replica>> = view
        .replicas_of(&deployment.uid)
        .filter(|r| r.runs() && host(r).is_some())
        .filter(same)
        .collect();
    if there.is_empty() {
        return None;
    }
    match deployment.rollout() {
        RolloutState::Paused | RolloutState::Failed => {
            return Some("a slot that has one, while its rollout stands still");
        }
        RolloutState::Unspecified
        | RolloutState::Rolling
        | RolloutState::Complete
        | RolloutState::RolledBack
        | RolloutState::Deleting => {}
    }
    if there.iter().any(|r| r.release == new.release && !r.failed && !drained(r)) {
        return Some("a slot that has one of its release");
    }
    let unreached = there.iter().all(|r| !live.is_present(&r.host));
    (unreached && !there.iter().all(|r| drained(r)))
        .then_some("a slot whose own one is only out of reach")
}

/// What of a replica went back.
fn turned_back(old: &Replica, new: &Replica) -> Option<&'static str> {
    let fixed = |r: &Replica| (r.deployment.clone(), r.slot, r.release, r.host.clone());
    if old.intent == ReplicaIntent::Stop && new.intent == ReplicaIntent::Run {
        return Some("intent");
    }
    if new.attempt_floor < old.attempt_floor {
        return Some("attempt floor");
    }
    if old.first_ready.is_some() && new.first_ready != old.first_ready {
        return Some("first ready time");
    }
    if new.exits.last().map(|e| e.attempt) < old.exits.last().map(|e| e.attempt) {
        return Some("exits");
    }
    if old.failed && !new.failed {
        return Some("failure");
    }
    (old.intent != ReplicaIntent::Orphan && fixed(old) != fixed(new)).then_some("place")
}
