//! That a rollout ends when its replicas say so, and not before: asked of what runs, not of the planner.

use super::fit;
use super::world::World;
use berth_proto::api::RolloutState;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, ReleaseNumber};
use berth_proto::values::OnRolloutFailure;
use berth_server_core::live::{Live, Presence};
use berth_server_core::objects::{Deployment, Release, Replica};
use berth_server_core::orphans;
use berth_server_core::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What was not durable yet when the server died was said at most so long before.
const UNSAID_MS: u64 = 30_000;

/// How long a rollout has gone on without progress, as a watcher counts it.
#[derive(Debug)]
struct Progress {
    /// Most slots of it that were healthy at once.
    best: u32,
    /// Time counted since then.
    counted_ms: u64,
    /// Time counted when the last progress was made, and when that was.
    before: (u64, u64),
    /// The shortest deadline that it had.
    deadline_ms: u64,
    /// When it was looked at last, by the server's clock, and whether time counts since.
    last: Option<(Mono, bool)>,
    /// Since then it is sure that time counts: as long as it is not, progress begins with whoever is
    /// healthy.
    sure: bool,
}

/// All rollouts under way. What was submitted and is taken back goes on where it was.
#[derive(Debug, Default)]
pub(super) struct Rollouts {
    all: BTreeMap<(DeploymentUid, ReleaseNumber), Progress>,
    /// When the server was gone last.
    gone: u64,
}

/// A place that a deployment fills.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Slot(u32),
    Host(HostUid),
}

fn is_under_way(state: RolloutState) -> bool {
    match state {
        RolloutState::Complete | RolloutState::Paused | RolloutState::RolledBack => false,
        RolloutState::Unspecified
        | RolloutState::Rolling
        | RolloutState::Failed
        | RolloutState::Deleting => true,
    }
}

/// Where a replica stands; `None`: beyond what is wanted.
fn place(deployment: &Deployment, replica: &Replica) -> Option<Place> {
    match deployment.wanted() {
        Some(wanted) => (replica.slot < wanted).then_some(Place::Slot(replica.slot)),
        None => Some(Place::Host(replica.host.clone())),
    }
}

/// One that is to stay.
fn is_current(view: &View, deployment: &Deployment, replica: &Replica) -> bool {
    let stays = view.host(&replica.host).is_some_and(|host| !fit::is_draining(host));
    replica.release == deployment.release() && !replica.failed && stays
}

/// What of it is wanted and stands in one of its places.
fn standing<'a>(
    view: &'a View,
    deployment: &'a Deployment,
) -> impl Iterator<Item = (Place, &'a Arc<Replica>)> {
    let mine = view.replicas_of(&deployment.uid).filter(|r| fit::is_there(view, r));
    mine.filter_map(|r| Some((place(deployment, r)?, r)))
}

/// A host that takes part: where it is a slot, that is one of those that count.
fn takes_part(view: &View, deployment: &Deployment, release: &Release, host: &HostUid) -> bool {
    deployment.wanted().is_some()
        || view.host(host).is_some_and(|host| {
            !fit::is_shut(host) && fit::is_of_its_kind(host, deployment, release)
        })
}

/// A host of a deployment without a number counts: it takes part, or keeps what is new already.
fn is_counted(view: &View, deployment: &Deployment, release: &Release, host: &HostUid) -> bool {
    let Some(host) = view.host(host).filter(|_| deployment.wanted().is_none()) else { return true };
    let there = || standing(view, deployment).filter(|(_, r)| r.host == host.uid);
    let keeps = || there().all(|(_, r)| is_current(view, deployment, r));
    let open =
        !fit::is_shut(host) && fit::can_start(host, release) && !view.is_held_back(&host.uid);
    fit::is_of_its_kind(host, deployment, release)
        && !host.record.waiting_for_approval
        && (open || keeps())
}

/// Places with a healthy one of the release.
fn healthy(view: &View, live: &Live, deployment: &Deployment, now: Mono) -> u32 {
    let Some(release) = view.release(&deployment.uid, deployment.release()) else { return 0 };
    let places: BTreeSet<Place> = standing(view, deployment)
        .filter(|(_, r)| is_current(view, deployment, r))
        .filter(|(_, r)| fit::is_healthy(live, deployment, r, now))
        .filter(|(_, r)| is_counted(view, deployment, release, &r.host))
        .map(|(place, _)| place)
        .collect();
    u32::try_from(places.len()).unwrap_or(u32::MAX)
}

/// Time may count: no replica's host is unknown, and something of it can be spoken to.
fn counts(view: &View, live: &Live, deployment: &Deployment) -> bool {
    let Some(release) = view.release(&deployment.uid, deployment.release()) else { return false };
    let mut places = BTreeSet::new();
    let mut reached = false;
    for (place, replica) in standing(view, deployment) {
        let presence = live.presence(&replica.host);
        let part = takes_part(view, deployment, release, &replica.host);
        if presence == Presence::Unknown && part {
            return false;
        }
        reached |= presence == Presence::Present;
        // What is left on a host that takes no part is not waited for.
        if part {
            places.insert(place);
        }
    }
    match deployment.wanted() {
        Some(wanted) => reached || places.len() < wanted as usize,
        None => reached || view.hosts().any(|host| live.is_present(&host.uid)) || places.is_empty(),
    }
}

impl Rollouts {
    /// A deployment is being planned: who is healthy now, and whether time counts from here on.
    pub(super) fn planned(
        &mut self,
        view: &View,
        live: &Live,
        uid: &DeploymentUid,
        (now, at): (Mono, u64),
    ) {
        let Some(deployment) = view.deployment(uid) else { return };
        if deployment.is_deleted() || !is_under_way(deployment.rollout()) {
            return;
        }
        let deadline_ms = deployment.spec.rollout.progress_deadline_ms;
        let healthy = healthy(view, live, deployment, now);
        let counts = counts(view, live, deployment);
        let fresh = || Progress {
            best: healthy,
            counted_ms: 0,
            before: (0, 0),
            deadline_ms,
            last: None,
            sure: false,
        };
        let held = self.all.entry((uid.clone(), deployment.release())).or_insert_with(fresh);
        let counted = held.last.filter(|(_, counts)| *counts);
        held.counted_ms += counted.map_or(0, |(since, _)| now.since_ms(since));
        held.deadline_ms = held.deadline_ms.min(deadline_ms);
        // A slot that finds no host waits for those that were not heard of yet.
        let heard = view.hosts().all(|host| live.presence(&host.uid) != Presence::Unknown);
        if healthy > held.best && held.sure && counts && heard {
            held.before = (held.counted_ms, at);
            (held.counted_ms, held.deadline_ms) = (0, deadline_ms);
        }
        held.best = held.best.max(healthy);
        held.sure = counts && heard;
        held.last = Some((now, counts));
    }

    /// The server is gone, and with it what it had not written down by now.
    pub(super) fn gone(&mut self, at: u64) {
        self.gone = at;
    }

    /// The server begins anew, with what it had written down.
    pub(super) fn restarted(&mut self) {
        for held in self.all.values_mut() {
            (held.last, held.sure) = (None, false);
            let (counted_ms, made) = held.before;
            if self.gone.saturating_sub(made) < UNSAID_MS {
                held.counted_ms += counted_ms;
            }
        }
    }

    /// This is durable.
    pub(super) fn written(&mut self, deployment: &Deployment) {
        if deployment.is_deleted() || !is_under_way(deployment.rollout()) {
            // A newer release may have been submitted already.
            let over = |uid: &DeploymentUid, release: ReleaseNumber| {
                *uid == deployment.uid && release <= deployment.release()
            };
            self.all.retain(|(uid, release), _| !over(uid, *release));
        }
    }

    pub(super) fn forget(&mut self) {
        self.all.clear();
    }
}

impl World<'_> {
    /// A plan changes a deployment itself: it may say that its rollout is complete or has failed.
    pub(super) fn check_verdict(&mut self, view: &View, live: &Live, next: &Deployment, now: Mono) {
        let Some(held) = view.deployment(&next.uid).cloned() else { return };
        if held.is_deleted() || !is_under_way(held.rollout()) {
            return;
        }
        let uid = &held.uid;
        match next.rollout() {
            RolloutState::Complete | RolloutState::RolledBack => {
                if let Some(why) = unfinished(view, live, &held, now) {
                    return self.broke(format!("the rollout of {uid} is complete {why}"));
                }
                if next.stable() != next.release() || next.release() != held.release() {
                    self.broke(format!("the rollout of {uid} is complete and not what is stable"));
                }
            }
            _ if next.release() != held.release() && !goes_back(&held, next) => {
                self.broke(format!("{uid} goes back to a release, and is not to"));
            }
            _ if next.rollout() == RolloutState::Paused || next.release() != held.release() => {
                let failed =
                    |(_, r): (Place, &Arc<Replica>)| r.failed && r.release == held.release();
                let for_good = standing(view, &held).any(failed);
                let Some(progress) = self.book.rollouts.all.get(&(uid.clone(), held.release()))
                else {
                    return;
                };
                let early = progress.counted_ms < progress.deadline_ms * 9 / 10;
                if early && !for_good && !self.book.restored {
                    let words = format!(
                        "the rollout of {uid} has failed after {} ms of {} without progress",
                        progress.counted_ms, progress.deadline_ms
                    );
                    self.broke(words);
                }
            }
            _ => {}
        }
    }
}

/// It is to go back when its rollout fails, and does so to what is stable.
fn goes_back(held: &Deployment, next: &Deployment) -> bool {
    held.spec.rollout.on_failure == OnRolloutFailure::Rollback && next.release() == held.stable()
}

/// Why a rollout is not complete.
fn unfinished(view: &View, live: &Live, deployment: &Deployment, now: Mono) -> Option<String> {
    let release = view.release(&deployment.uid, deployment.release())?;
    let mut places: BTreeMap<Place, Vec<&Arc<Replica>>> = BTreeMap::new();
    for (place, replica) in standing(view, deployment) {
        places.entry(place).or_default().push(replica);
    }
    match deployment.wanted() {
        Some(wanted) => (0..wanted).for_each(|slot| {
            places.entry(Place::Slot(slot)).or_default();
        }),
        None => {
            for host in view.hosts() {
                if fit::suits(live, deployment, release, host) && !view.is_held_back(&host.uid) {
                    places.entry(Place::Host(host.uid.clone())).or_default();
                }
            }
            // What is old on a host that takes no part for now waits, and holds up nothing.
            places.retain(|place, _| match place {
                Place::Slot(_) => true,
                Place::Host(uid) => view.host(uid).is_some_and(|host| {
                    takes_part(view, deployment, release, uid)
                        && fit::can_start(host, release)
                        && !view.is_held_back(uid)
                }),
            });
        }
    }
    // The place of an orphan on a host that is away is deferred.
    for (slot, orphan) in orphans::holding(view, deployment) {
        if !live.is_present(&orphan.host) {
            places.remove(&Place::Slot(slot));
        }
    }
    let mut ready = false;
    for (place, replicas) in &places {
        if replicas.iter().any(|r| live.presence(&r.host) == Presence::Unknown)
            && replicas.iter().all(|r| takes_part(view, deployment, release, &r.host))
        {
            return Some(format!("and nobody knows of {place:?}"));
        }
        let reached: Vec<_> = replicas.iter().filter(|r| live.is_present(&r.host)).collect();
        if reached.is_empty() && !replicas.is_empty() {
            continue;
        }
        let is_healthy = |r: &&&Arc<Replica>| {
            is_current(view, deployment, r) && fit::is_healthy(live, deployment, r, now)
        };
        if !reached.iter().any(is_healthy) {
            return Some(format!("and nothing of it is ready in {place:?}"));
        }
        ready = true;
        if reached.iter().any(|r| !is_current(view, deployment, r)) {
            return Some(format!("and something old is left in {place:?}"));
        }
    }
    // A cordoned host keeps what it has.
    let ready = ready
        || standing(view, deployment).any(|(_, r)| {
            is_current(view, deployment, r) && fit::is_healthy(live, deployment, r, now)
        });
    let wants_none = deployment.wanted() == Some(0);
    // A host that is none of its places, for a reason that people can change, is told of and waited for.
    let refused = view.hosts().any(|host| {
        let spec = host.record.spec.unwrap_or_default();
        let open = !host.record.quarantined && !spec.cordoned && !host.is_removed();
        let other = !fit::is_of_its_kind(host, deployment, release);
        open && !host.record.waiting_for_approval && live.is_present(&host.uid) && other
    });
    (!ready && !wants_none && (refused || deployment.wanted().is_some()))
        .then(|| "and nothing of it was ever ready".to_owned())
}
