//! The rollout: what starts and what stops, slot by slot, within its bounds.
//!
//! The floor is what must stay healthy: the wanted number less the slots that are deferred and those
//! that may be unavailable. The room is what may still be started: the wanted number and the surge
//! less what exists. A replica that is being stopped exists until its absence is known.

use super::{Health, Planning};
use crate::change::Change;
use crate::live::Presence;
use crate::objects::{Release, Replica};
use crate::placement::{Need, Pool, Unplaceable, has_room_after};
use berth_proto::api::{ReplicaIntent, RolloutState};
use berth_proto::ids::{HostUid, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What is said of replicas on a draining host that a rollout which stands still does not move.
const UNMOVED: &str = "on a draining host, and not moved while the rollout is paused: undo it, or apply \
                       what works";
/// What is said of a slot whose host has brought back what runs there.
pub const GIVEN_BACK: &str = "its release did not become ready in the place of what runs on its host: apply what \
                          works, or restart it";
/// What is said of a slot whose replica was found after a restore.
pub const UNDECIDED: &str = "found on its host and not decided about (berth orphan list)";

/// A place the deployment fills.
pub(super) struct Slot<'a> {
    /// Its number; 0 where the host is the slot.
    pub(super) slot: u32,
    /// The host that it is.
    pub(super) host: Option<HostUid>,
    /// What shall run in it now.
    pub(super) replicas: Vec<&'a Arc<Replica>>,
    /// The host of an orphan that may still be adopted into it.
    pub(super) undecided: Option<&'a HostUid>,
}

/// A slot's replicas, sorted out.
pub(super) struct SlotWork<'a> {
    slot: u32,
    host: Option<HostUid>,
    /// Nothing is placed in it before its orphan is decided about; whether that one's host is in reach.
    undecided: Option<bool>,
    /// Of the wanted release, and to stay.
    pub(super) new: Vec<(&'a Arc<Replica>, Health)>,
    /// All others.
    pub(super) old: Vec<(&'a Arc<Replica>, Health)>,
}

impl<'a> SlotWork<'a> {
    pub(super) fn all(&self) -> impl Iterator<Item = &(&'a Arc<Replica>, Health)> {
        self.new.iter().chain(&self.old)
    }

    /// An orphan on a host in reach may still be adopted into it.
    pub(super) fn is_undecided(&self) -> bool {
        self.undecided == Some(true)
    }

    /// Its orphan's host is away, which holds up nothing.
    pub(super) fn is_undecided_away(&self) -> bool {
        self.undecided == Some(false)
    }

    /// Of the wanted release, and one too many in this slot.
    fn surplus(&self, release: &Release) -> impl Iterator<Item = &(&'a Arc<Replica>, Health)> {
        let number = release.number;
        self.old.iter().filter(move |(r, _)| !self.new.is_empty() && r.release == number)
    }

    fn is_empty(&self) -> bool {
        self.new.is_empty() && self.old.is_empty()
    }

    fn is_reached(&self) -> bool {
        self.all().any(|(_, health)| *health != Health::Deferred)
    }

    fn all_deferred(&self) -> bool {
        !self.is_empty() && self.all().all(|(_, health)| *health == Health::Deferred)
    }
}

/// What the slots come to.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) wanted: u32,
    pub(super) new_healthy: u32,
    /// Replicas on hosts not heard of since the server's start.
    pub(super) unknown: u32,
    old_healthy: u32,
    existing: u32,
    deferred_slots: u32,
    replacing: u32,
}

/// What starting what is missing comes to.
struct Started {
    /// Replicas that are healthy, less those that give their place away.
    healthy: u32,
    /// What may still be started.
    surge_room: u32,
    /// Slots in which nothing is in reach and that got one.
    begun: u32,
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

impl<'a> Planning<'a> {
    pub(super) fn roll(
        &mut self,
        release: &Arc<Release>,
        mine: &[Arc<Replica>],
        slots: Vec<Slot<'_>>,
    ) {
        let mut tally = Tally { unknown: self.unheard, ..Tally::default() };
        tally.wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let work: Vec<SlotWork<'_>> =
            slots.into_iter().map(|slot| self.sort_out(release, slot, &mut tally)).collect();
        // Those that are being stopped exist until their absence is known.
        let stopping: Vec<&Arc<Replica>> = mine
            .iter()
            .filter(|r| r.intent == ReplicaIntent::Stop && self.live.is_present(&r.host))
            .collect();
        if !bug!(EndingNotCounted) {
            tally.existing += count(stopping.iter());
        }
        let started = self.start(release, mine, &work, &stopping, &tally);
        self.stop_old(release, &work, &stopping, &started, &tally);
        self.plan.report.unsettled = work.iter().any(|item| !item.old.is_empty());
        self.judge(release, &work, &tally);
    }

    /// Sorts out one slot and counts it; two of one slot on hosts in reach become one.
    fn sort_out<'b>(
        &mut self,
        release: &Release,
        slot: Slot<'b>,
        tally: &mut Tally,
    ) -> SlotWork<'b> {
        let Slot { slot, host, replicas, undecided } = slot;
        let (mut new, mut old) = (Vec::new(), Vec::new());
        for replica in replicas {
            if self.live.presence(&replica.host) == Presence::Unknown {
                tally.unknown += 1;
            }
            let current = replica.release == release.number && !replica.failed;
            let list = if current && !self.leaving(replica) { &mut new } else { &mut old };
            list.push((replica, self.health(replica)));
        }
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
                // An away host's replica is left alone until it can be told. Another one goes as what is
                // old does: as far as the floor allows.
                if health == Health::Deferred {
                    self.plan.report.deferred.insert(replica.host.clone());
                } else if reachable && bug!(SurplusUnasked) {
                    self.stop(replica);
                } else if reachable {
                    old.push((replica, health));
                }
            }
        }
        for (_, health) in &new {
            match health {
                Health::Healthy => tally.new_healthy += 1,
                Health::NotYet(Some(at)) => self.wake(*at),
                Health::NotYet(None) | Health::Deferred => {}
            }
        }
        // It exists, though nobody knows whether it serves.
        let here = undecided.map(|on| self.live.is_present(on));
        match here {
            Some(true) => tally.existing += 1,
            Some(false) => {
                tally.deferred_slots += 1;
                self.plan.report.deferred.extend(undecided.cloned());
            }
            None => {}
        }
        let work = SlotWork { slot, host, undecided: here, new, old };
        tally.old_healthy += count(work.old.iter().filter(|(_, h)| *h == Health::Healthy));
        for (_, health) in &work.old {
            // One that is drained may become healthy, which makes room to stop it.
            if let Health::NotYet(Some(at)) = health {
                self.wake(*at);
            }
        }
        tally.existing += count(work.all().filter(|(_, h)| *h != Health::Deferred));
        // One whose host is away holds up nobody.
        tally.replacing += count(work.new.iter().filter(|(r, h)| {
            matches!(h, Health::NotYet(_))
                && r.replaces.as_ref().is_some_and(|old| self.view.replica(old).is_some())
        }));
        for (replica, health) in work.all() {
            if *health == Health::Deferred {
                self.plan.report.deferred.insert(replica.host.clone());
            }
        }
        if work.all_deferred() {
            tally.deferred_slots += 1;
        }
        work
    }

    /// Starts what is missing.
    fn start(
        &mut self,
        release: &Arc<Release>,
        mine: &[Arc<Replica>],
        work: &[SlotWork<'_>],
        stopping: &[&Arc<Replica>],
        tally: &Tally,
    ) -> Started {
        let rollout = self.deployment.spec.rollout;
        let (view, live) = (self.view, self.live);
        let mut healthy = tally.new_healthy + tally.old_healthy;
        let mut begun = 0;
        let mut surge_room = tally
            .wanted
            .saturating_add(rollout.max_surge)
            .saturating_sub(tally.existing + tally.deferred_slots);
        if bug!(SurgeIgnored) {
            surge_room = u32::MAX;
        }
        // A single slot that cannot stand side by side must be allowed to change places.
        let all_at_once = if bug!(AllChangeAtOnce) { tally.wanted } else { 1 };
        let replace_at_most = rollout.max_unavailable.max(all_at_once);
        let mut replacing = tally.replacing;
        let halted =
            matches!(self.deployment.rollout(), RolloutState::Paused | RolloutState::Failed);
        let stopping_slots: BTreeMap<u32, &HostUid> =
            stopping.iter().map(|r| (r.slot, &r.host)).collect();
        let stopping_hosts: BTreeMap<&HostUid, &HostUid> =
            stopping.iter().map(|r| (&r.host, &r.host)).collect();
        let mut displaced: BTreeSet<&ReplicaUid> =
            mine.iter().filter_map(|r| r.replaces.as_ref()).collect();
        // Spread over what stays: beside one that is about to go there is a place, and not a crowd.
        let mut held: BTreeMap<HostUid, u32> = BTreeMap::new();
        for item in work {
            let old = if halted { &item.old[..] } else { &[] };
            for (replica, _) in item.new.iter().chain(old) {
                *held.entry(replica.host.clone()).or_default() += 1;
            }
        }
        let need = Need::new(self.deployment, release);
        let mut pool: Option<Pool<'_>> = None;
        // Once no host fits, none will for the rest of this plan.
        let mut full: Option<Unplaceable> = None;
        let mut unplaced: Vec<(Unplaceable, u32)> = Vec::new();
        // Nearly always none.
        let surplus: Vec<&(&Arc<Replica>, Health)> =
            work.iter().flat_map(|item| item.surplus(release)).collect();
        // Empty slots first: what is missing goes before what is only to be renewed.
        let (empty, filled): (Vec<_>, Vec<_>) = work.iter().partition(|item| item.is_empty());
        for item in empty.into_iter().chain(filled) {
            if item.undecided.is_some() {
                *self.plan.report.pending.entry(UNDECIDED.to_owned()).or_default() += 1;
                continue;
            }
            let stand_in_for = self.needs_stand_in(item);
            let has_new = item.new.iter().any(|(_, h)| *h != Health::Deferred);
            let waits =
                item.new.iter().any(|(_, h)| *h == Health::Deferred) && stand_in_for.is_none();
            let old_deferred = !bug!(BesideDeferred)
                && !item.old.is_empty()
                && item.old.iter().all(|(_, h)| *h == Health::Deferred)
                && stand_in_for.is_none()
                && !item.old.iter().all(|(r, _)| self.leaving(r));
            if has_new || waits || old_deferred {
                continue;
            }
            let first_fill = item.is_empty();
            // A halted rollout still fills what is empty.
            if halted && !first_fill && stand_in_for.is_none() {
                continue;
            }
            if !self.room() {
                break;
            }
            let empty_slot = first_fill || stand_in_for.is_some();
            let still_stopping = match &item.host {
                Some(host) => stopping_hosts.get(host).copied(),
                None => stopping_slots.get(&item.slot).copied(),
            };
            // Where the host is the slot, its place is free once the one before is gone, whatever the
            // surge: the same whether the host is looked at alone or with all.
            let its_place = item.host.is_some() && first_fill;
            match still_stopping {
                Some(on) if its_place || surge_room == 0 => {
                    if empty_slot {
                        *self.plan.report.until_gone.entry(on.clone()).or_default() += 1;
                    }
                    continue;
                }
                None if surge_room == 0 && !empty_slot => continue,
                Some(_) | None => {}
            }
            let chosen = match (&item.host, &full) {
                (Some(host), _) => match view.host(host).map(|h| need.fits(view, live, h)) {
                    Some(Ok(())) => Ok(host.clone()),
                    Some(Err(why)) => Err(Unplaceable(BTreeMap::from([(why, 1)]))),
                    None => Err(Unplaceable::default()),
                },
                (None, Some(_)) if item.old.is_empty() && surplus.is_empty() => {
                    if let Some((_, slots)) = unplaced.last_mut() {
                        *slots += 1;
                    }
                    continue;
                }
                (None, Some(why)) => Err(why.clone()),
                (None, None) => {
                    pool.get_or_insert_with(|| Pool::new(view, live, &need, &held)).take()
                }
            };
            match chosen {
                Ok(host) => {
                    self.place(item.slot, host, release, None, stand_in_for);
                    begun += u32::from(!item.is_reached());
                    if stand_in_for.is_none() {
                        surge_room = surge_room.saturating_sub(1);
                    }
                }
                Err(why) => {
                    // In place of the old one, on its host. An empty slot has none: there one may give
                    // way that another slot has too many, which else would keep the room for ever.
                    let surplus = surplus
                        .iter()
                        .copied()
                        .filter(|_| first_fill && item.host.is_none())
                        .filter(|(r, _)| !displaced.contains(&r.uid));
                    let candidate = item.old.iter().chain(surplus).find(|(r, h)| {
                        *h != Health::Deferred
                            && !r.failed
                            && r.given_back != Some(release.number)
                            && !self.changes_places(r)
                            && !self.leaving(r)
                            && self.fits_instead(&need, r)
                    });
                    match candidate {
                        Some((old, health)) if replacing < replace_at_most => {
                            replacing += 1;
                            displaced.insert(&old.uid);
                            if *health == Health::Healthy {
                                healthy = healthy.saturating_sub(1);
                            }
                            begun += u32::from(!item.is_reached());
                            self.place(item.slot, old.host.clone(), release, Some(old), None);
                        }
                        // Too many change places just now. Room may come before its turn does.
                        Some(_) => self.waits_for(&why),
                        None if item
                            .old
                            .iter()
                            .any(|(r, _)| r.given_back == Some(release.number)) =>
                        {
                            *self.plan.report.pending.entry(GIVEN_BACK.to_owned()).or_default() +=
                                1;
                            self.waits_for(&why);
                        }
                        None => match (&item.host, unplaced.last_mut()) {
                            (Some(host), _) => self.pending_on(host, &why),
                            (None, Some((same, slots))) if *same == why => *slots += 1,
                            (None, Some(_) | None) => unplaced.push((why.clone(), 1)),
                        },
                    }
                    if item.host.is_none() {
                        full = Some(why);
                    }
                }
            }
        }
        for (why, slots) in unplaced {
            self.pending(&why, slots);
        }
        Started { healthy, surge_room, begun }
    }

    /// Stops what is old, as far as the floor allows.
    fn stop_old(
        &mut self,
        release: &Release,
        work: &[SlotWork<'_>],
        stopping: &[&Arc<Replica>],
        &Started { healthy, surge_room, begun }: &Started,
        tally: &Tally,
    ) {
        let current = release.number;
        let rollout = self.deployment.spec.rollout;
        let halted =
            matches!(self.deployment.rollout(), RolloutState::Paused | RolloutState::Failed);
        let floor = tally
            .wanted
            .saturating_sub(tally.deferred_slots)
            .saturating_sub(rollout.max_unavailable);
        let mut spare = healthy.saturating_sub(if bug!(FloorIgnored) { 0 } else { floor });
        // Slots in which nothing serves and something soon may: what they have is not ready, they have just
        // been given something, or get it once what is being stopped is gone. As many at once as may change
        // places; what finds no room keeps nobody waiting.
        let (ending, ending_on): (BTreeSet<u32>, BTreeSet<&HostUid>) =
            stopping.iter().map(|r| (r.slot, &r.host)).unzip();
        let mut recovering = begun
            + count(work.iter().filter(|item| {
                let serves = item.all().any(|(_, h)| *h == Health::Healthy);
                let ends = match &item.host {
                    Some(host) => ending_on.contains(host),
                    None => ending.contains(&item.slot),
                };
                let until_gone = item.is_empty() && ends;
                !serves && (item.is_reached() || until_gone)
            }));
        // Mostly of the same slot; one that a slot has too many gives way to one of another.
        let successors: BTreeMap<&ReplicaUid, Health> = work
            .iter()
            .flat_map(SlotWork::all)
            .filter(|(r, _)| !r.failed)
            .filter_map(|(r, health)| Some((r.replaces.as_ref()?, *health)))
            .collect();
        let given = self.give_back(work);
        let mut unmoved = 0;
        for item in work {
            let new_is_healthy = item.new.iter().any(|(_, h)| *h == Health::Healthy);
            let new_exists = !item.new.is_empty();
            // A rollout that another one took the place of may have left two that serve in one slot. The
            // one of the stable release goes last: it is what a failure goes back to.
            let mut serving = count(item.all().filter(|(_, h)| *h == Health::Healthy));
            let mut old: Vec<_> = item.old.iter().collect();
            old.sort_by_key(|(r, _)| r.release == self.deployment.stable());
            for (old, health) in old {
                if *health == Health::Deferred {
                    continue;
                }
                // The agent itself stops the old one of a replacement, and brings it back.
                let replaced_by = successors.get(&old.uid);
                // It took the place of one that is wanted again: that one can only run once it is gone. What
                // stands still does not give up what serves for it.
                let displaces = item.new.iter().any(|(r, _)| old.replaces.as_ref() == Some(&r.uid));
                // Its host has just started it again, or is about to: it is all the slot has, and what would
                // be started in its stead has failed there.
                let brought_back = old.given_back == Some(current) || given.contains(&old.uid);
                let may = if old.failed {
                    true
                } else if given.contains(&old.uid) {
                    false
                } else if displaces && *health == Health::Healthy && spare == 0 {
                    let may = !halted && recovering < rollout.max_unavailable.max(1);
                    recovering += u32::from(may);
                    may
                } else if let Some(successor) = replaced_by {
                    *successor == Health::Healthy
                } else if halted
                    && (old.release != current || self.leaving(old))
                    && !bug!(PausedGoesOn)
                {
                    unmoved += u32::from(self.leaving(old));
                    false
                } else if *health == Health::Healthy {
                    // Stopping a healthy one must not go below the floor.
                    spare > 0
                        && (new_is_healthy
                            || serving > 1
                            || (rollout.max_unavailable > 0
                                && !brought_back
                                && (new_exists || surge_room == 0)))
                } else {
                    // Unhealthy ones serve nobody and go first.
                    new_is_healthy || (!brought_back && (new_exists || surge_room == 0))
                };
                if may && self.room() {
                    if *health == Health::Healthy && replaced_by.is_none() && !old.failed {
                        // What is given up here may not be given up for a place that is changed back.
                        recovering += u32::from(spare > 0 && serving == 1);
                        spare = spare.saturating_sub(1);
                        serving = serving.saturating_sub(1);
                    }
                    self.stop(old);
                }
            }
        }
        if unmoved > 0 {
            *self.plan.report.pending.entry(UNMOVED.to_owned()).or_default() += unmoved;
        }
    }

    /// What one that failed was to take the place of, and was brought back, does not give way to that release
    /// again: it would serve half of the time, for as long as nobody looks. Answers with all of these.
    fn give_back(&mut self, work: &[SlotWork<'_>]) -> BTreeSet<ReplicaUid> {
        let mut given = BTreeSet::new();
        let view = self.view;
        for (failed, health) in work.iter().flat_map(|item| &item.old) {
            let back = failed.replaces.as_ref().and_then(|uid| view.replica(uid));
            let Some(back) =
                back.filter(|back| failed.failed && *health != Health::Deferred && back.runs())
            else {
                continue;
            };
            given.insert(back.uid.clone());
            if back.given_back != Some(failed.release) && self.room() {
                let back = Replica { given_back: Some(failed.release), ..Replica::clone(back) };
                self.plan.changes.push(Change::PutReplica(Arc::new(back)));
            }
        }
        given
    }

    /// It has itself not yet taken the place it was given: one change at a time, since the one that gave
    /// way first would stand beside the third.
    fn changes_places(&self, replica: &Replica) -> bool {
        let still = |old| self.view.replica(old).is_some() && !bug!(ReplacedChain);
        replica.replaces.as_ref().is_some_and(still)
    }

    /// The slot's replicas are all on lost hosts: whom a stand-in would stand in for. Where the host
    /// is the slot, nothing can stand in.
    fn needs_stand_in<'b>(&mut self, item: &SlotWork<'b>) -> Option<&'b Replica> {
        if item.host.is_some() {
            return None;
        }
        let mut first: Option<&'b Replica> = None;
        for (replica, health) in item.all() {
            if *health != Health::Deferred {
                return None;
            }
            match self.lost(&replica.host) {
                Ok(()) if bug!(LostNeverReplaced) => return None,
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

    /// Whether the new release fits on the old one's host once the old one is gone.
    fn fits_instead(&self, need: &Need<'_>, old: &Replica) -> bool {
        let Some(host) = self.view.host(&old.host) else { return false };
        if need.suits(host, self.live).is_err() {
            return false;
        }
        let mut beside = self.view.use_beside(&old.host, &old.uid);
        if let Some(placed) = self.placed.get(&old.host) {
            beside.add_all(placed);
        }
        // Either of the two may run, so there must be room for either.
        let before = self.view.release(&old.deployment, old.release);
        has_room_after(host, &beside, &need.release.spec, before.map(|b| &b.spec)).is_ok()
            && before.is_none_or(|b| has_room_after(host, &beside, &b.spec, Some(&b.spec)).is_ok())
    }
}
