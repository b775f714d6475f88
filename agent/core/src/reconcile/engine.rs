//! What is seen of the engine, and when it is looked at again.

use super::{Effect, Look, Reconcile};
use crate::diff::{self, Container, Seen, State};
use crate::lifecycle::{Life, Reason};
use crate::restart::Backoff;
use berth_proto::api::{self, ReplicaPhase};
use berth_proto::convert::timestamp;
use berth_proto::ids::{Mono, Now, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet};

/// Looks at the engine at least so often while its events are followed, as a check on them.
const PERIOD_MS: u64 = 30_000;
/// The same while they are not.
const BLIND_PERIOD_MS: u64 = 5_000;
/// After a start of our own, which tells nothing new: by then the rest of a burst is over, too.
const CALM_MS: u64 = 1_000;
/// The least pause between two looks; besides, at most half of the time is spent on looking.
const PAUSE_MS: u64 = 20;
/// The wait before an engine that does not answer is asked again, doubled while it does not.
pub(super) const ASK_MS: u64 = 250;
/// The longest: ten seconds after it is back at the latest, work goes on.
pub(super) const MAX_ASK_MS: u64 = 10_000;

/// What is known of a thing the engine has to be asked for.
#[derive(Debug, Default)]
struct Asked {
    here: bool,
    asking: bool,
    retry: Backoff,
}

impl Asked {
    fn answered(&mut self, here: bool, now: Mono) {
        *self = Self { here, asking: false, retry: std::mem::take(&mut self.retry) };
        if here {
            self.retry.succeeded();
        } else {
            self.retry.failed(ASK_MS, MAX_ASK_MS, now);
        }
    }
}

/// What is seen of the engine.
#[derive(Debug, Default)]
pub(super) struct Sight {
    /// It answered the last look.
    here: Option<bool>,
    /// The look under way, and since when.
    looking: Option<(Look, Mono)>,
    looks: Look,
    /// When the next look is due; `None`: at once.
    due: Option<Mono>,
    /// Not before then, whatever happens.
    pause: Option<Mono>,
    retry: Backoff,
    events: Asked,
    network: Asked,
    /// Why the bridge was not there when it was asked for last.
    no_network: Option<String>,
}

impl Sight {
    /// It was looked at and answers.
    pub(super) fn is_here(&self) -> bool {
        self.here == Some(true)
    }

    /// The bridge is there; else why not, once that is known.
    pub(super) fn network_is_here(&self) -> Result<(), Option<&str>> {
        if self.network.here { Ok(()) } else { Err(self.no_network.as_deref()) }
    }

    /// The last look that has begun.
    pub(super) fn last(&self) -> Look {
        self.looks
    }

    pub(super) fn happened(&mut self, urgent: bool, now: Mono) {
        let at = if urgent { now } else { now.plus_ms(CALM_MS) };
        self.due = Some(self.due.map_or(now, |due| due.min(at)));
        if urgent {
            // It speaks: no need to wait until it is asked again.
            self.retry.succeeded();
        }
    }

    pub(super) fn followed(&mut self, now: Mono) {
        self.events.answered(true, now);
        self.events.asking = true;
        // What happened before is not told.
        self.happened(true, now);
    }

    pub(super) fn follow_ended(&mut self, now: Mono) {
        if !bug!(FollowsNoMore) {
            self.events.answered(false, now);
        }
        self.due = Some(self.due.map_or(now, |due| due.min(now)));
    }

    pub(super) fn network(&mut self, result: Result<(), String>, now: Mono) {
        self.network.answered(result.is_ok(), now);
        self.no_network = result.err();
    }

    /// A container could not be made or started: perhaps for lack of its network.
    pub(super) fn doubt(&mut self, now: Mono) {
        self.network.here = false;
        self.due = Some(now);
    }
}

impl Reconcile {
    /// Asks for what is due of the engine.
    pub(super) fn look(&mut self, now: Mono, out: &mut Vec<Effect>) {
        let mut wakes = Vec::new();
        let sight = &mut self.engine;
        if sight.looking.is_none() {
            let due = sight.due.unwrap_or(now).max(sight.pause.unwrap_or(now));
            match sight.retry.waits(now).unwrap_or(due).max(due) {
                at if at > now => wakes.push(at),
                _ => {
                    sight.looks.0 += 1;
                    sight.looking = Some((sight.looks, now));
                    // Something that happens from now on asks for another.
                    sight.due = Some(Mono(u64::MAX));
                    out.push(Effect::Observe(sight.looks));
                }
            }
        }
        let here = sight.here == Some(true);
        for (asked, effect, needed) in [
            (&mut sight.events, Effect::Follow, true),
            (&mut sight.network, Effect::EnsureNetwork, here),
        ] {
            if asked.here || asked.asking || !needed {
                continue;
            }
            match asked.retry.waits(now) {
                Some(at) => wakes.push(at),
                None => {
                    asked.asking = true;
                    out.push(effect);
                }
            }
        }
        for at in wakes {
            self.wake_at(at);
        }
    }

    fn looked(&mut self, look: Look, now: Mono) -> bool {
        let Some((_, since)) = self.engine.looking.take_if(|(held, _)| *held == look) else {
            return false;
        };
        let took_ms = now.since_ms(since);
        self.engine.pause = Some(now.plus_ms(took_ms.max(PAUSE_MS)));
        let period = if self.engine.events.here { PERIOD_MS } else { BLIND_PERIOD_MS };
        let next = now.plus_ms(period);
        self.engine.due = Some(self.engine.due.map_or(next, |due| due.min(next)));
        true
    }

    pub(super) fn engine_away(&mut self, now: Mono, look: Look, why: &str, out: &mut Vec<Effect>) {
        if !self.looked(look, now) {
            return;
        }
        if bug!(AwayMeansEmpty) {
            self.seen.clear();
            self.engine.here = Some(true);
            return;
        }
        self.engine.due = Some(now);
        self.engine.retry.failed(ASK_MS, MAX_ASK_MS, now);
        if self.engine.here != Some(false) && !bug!(EngineAwayUntold) {
            out.push(Effect::EngineIs { available: false, why: why.to_owned() });
        }
        self.engine.here = Some(false);
        let wanted = self.wanted.set().cloned();
        for (uid, desk) in &mut self.desks {
            // What runs goes on; whoever waits does so for the engine now.
            let waits = desk.life.status().phase() != ReplicaPhase::Running;
            if waits && wanted.as_ref().is_some_and(|set| set.entries.contains_key(uid)) {
                desk.life.because(Reason::ENGINE_AWAY, why);
                self.changed.insert(uid.clone());
            }
        }
    }

    pub(super) fn observed(
        &mut self,
        now: Now,
        look: Look,
        containers: Vec<Container>,
        out: &mut Vec<Effect>,
    ) {
        if !self.looked(look, now.mono) {
            return;
        }
        self.engine.retry.succeeded();
        if self.engine.here != Some(true) {
            out.push(Effect::EngineIs { available: true, why: String::new() });
            for (uid, desk) in &mut self.desks {
                desk.life.no_longer(Reason::ENGINE_AWAY);
                self.changed.insert(uid.clone());
            }
        }
        self.engine.here = Some(true);
        let mut fresh = Seen::new();
        for container in containers {
            fresh.entry(container.replica.clone()).or_default().push(container);
        }
        for list in fresh.values_mut() {
            list.sort_by(|a, b| b.attempt.cmp(&a.attempt).then_with(|| a.id.cmp(&b.id)));
        }
        let mut before = std::mem::take(&mut self.seen);
        let known: BTreeSet<ReplicaUid> =
            before.keys().chain(fresh.keys()).chain(self.desks.keys()).cloned().collect();
        for uid in known {
            let stale = self
                .desks
                .get(&uid)
                .is_some_and(|desk| desk.step.is_some() || look <= desk.look_after)
                && !bug!(LateLookBelieved);
            let (old, new) = (before.remove(&uid), fresh.remove(&uid));
            if stale {
                // What is known of it is newer than this look.
                if let Some(old) = old {
                    self.seen.insert(uid, old);
                }
                continue;
            }
            let (old, found) = (old.unwrap_or_default(), new.as_deref().unwrap_or(&[]));
            self.lost(now, &uid, &old, found);
            self.started_anew(&uid, &old, found);
            self.see(now, &uid, new.unwrap_or_default());
        }
    }

    /// A container that ran is not there any more, and nobody told how it ended.
    fn lost(&mut self, now: Now, uid: &ReplicaUid, old: &[Container], new: &[Container]) {
        let Some(gone) = old.iter().find(|c| c.state == State::Running) else { return };
        if new.iter().any(|c| c.attempt >= gone.attempt) {
            return;
        }
        let Some(body) = self.body(uid) else { return };
        let memory = self.memory.get(uid).cloned().unwrap_or_default();
        if memory.exit_taken >= gone.attempt {
            return;
        }
        let mut after = diff::ended(&memory, &body.spec.restart, gone.attempt, -1, now.mono);
        after.finished |= bug!(RemovedByHandForgotten);
        self.remember(uid, after);
        let desk = self.desk(uid);
        desk.probing = None;
        let time = Some(timestamp(now.wall));
        let exit = api::Exit { attempt: gone.attempt, code: -1, time, ..api::Exit::default() };
        desk.life.exited(exit, None);
        desk.life.because(Reason::CONTAINER_GONE, "somebody removed its container");
    }

    /// The engine or somebody has started a program anew, and nobody has seen it end: whether it can serve
    /// is not known yet.
    fn started_anew(&mut self, uid: &ReplicaUid, old: &[Container], new: &[Container]) {
        let runs = |c: &&Container| c.state == State::Running;
        let anew = new.iter().filter(runs).any(|is| {
            let was = old.iter().filter(runs).find(|was| was.id == is.id);
            was.and_then(|was| was.started).zip(is.started).is_some_and(|(was, is)| was != is)
        });
        if !anew {
            return;
        }
        self.forget_readiness(uid);
    }

    /// Whether it can serve is not known any more: what its check has found, or is about to find, is of no
    /// account.
    pub(super) fn forget_readiness(&mut self, uid: &ReplicaUid) {
        if let Some(memory) = self.memory.get_mut(uid) {
            (memory.ready, memory.ready_since) = (false, None);
        }
        if let Some(desk) = self.desks.get_mut(uid) {
            match &mut desk.probing {
                Some(checked) if checked.busy => checked.stale = true,
                Some(_) | None => desk.probing = None,
            }
        }
    }

    /// What a replica's containers are from now on, newest first.
    pub(super) fn see(&mut self, now: Now, uid: &ReplicaUid, list: Vec<Container>) {
        let wanted = self.entry(uid).is_some();
        let unchecked = self.body(uid).is_some_and(|b| b.spec.health.is_none());
        if !list.is_empty() || wanted {
            let memory = self.memory.entry(uid.clone()).or_default();
            let greatest = list.iter().map(|c| c.attempt).max().unwrap_or(0);
            memory.attempt = memory.attempt.max(greatest);
            let attempt = memory.attempt;
            let desk = self.desks.entry(uid.clone()).or_default();
            if desk.life == Life::default() {
                desk.life = Life::new(attempt);
            }
        }
        if let Some(running) = list.iter().find(|c| c.state == State::Running) {
            let memory = self.memory.entry(uid.clone()).or_default();
            // An adopted container's bytes are here: it runs.
            memory.bytes_here = true;
            // Started by somebody after its end was seen, also while nobody wanted it: its end counts as
            // taken in, since nothing more can be told of that attempt.
            if self.desks.get(uid).is_some_and(|d| d.life.has_ended(running.attempt)) {
                memory.exit_taken = memory.exit_taken.max(running.attempt);
            }
            if unchecked && !memory.ready {
                memory.ready = true;
                memory.ready_since = Some(now.mono);
            }
            let ready = memory.ready;
            let desk = self.desks.entry(uid.clone()).or_default();
            desk.life.running(running.attempt, &running.id, running.started, ready);
        }
        if let Some(desk) = self.desks.get_mut(uid) {
            if let Some(last) = list.first() {
                let attempt = last.attempt;
                match last.state {
                    State::Created => desk.life.starting(attempt, &last.id),
                    State::Exited { code, out_of_memory, time }
                        if !desk.life.tells_end_of(attempt) =>
                    {
                        let time = Some(timestamp(time));
                        let last_line = desk.wrote(attempt);
                        let exit = api::Exit { attempt, code, out_of_memory, time, last_line };
                        desk.life.exited(exit, None);
                    }
                    State::Running | State::Exited { .. } => {}
                }
            }
            if !desk.life.is_known() {
                desk.life.left_nothing();
            }
            desk.unsure = false;
            self.changed.insert(uid.clone());
        }
        if list.is_empty() {
            self.seen.remove(uid);
        } else {
            self.seen.insert(uid.clone(), list);
        }
    }

    /// A container is like this now, as a step of ours has shown.
    pub(super) fn see_one(&mut self, now: Now, uid: &ReplicaUid, container: Container) {
        let mut list = self.seen.get(uid).cloned().unwrap_or_default();
        list.retain(|c| c.id != container.id);
        list.push(container);
        list.sort_by(|a, b| b.attempt.cmp(&a.attempt).then_with(|| a.id.cmp(&b.id)));
        self.see(now, uid, list);
    }

    /// A container is gone, as a step of ours has shown.
    pub(super) fn see_gone(&mut self, now: Now, uid: &ReplicaUid, id: &str) {
        let mut list = self.seen.get(uid).cloned().unwrap_or_default();
        list.retain(|c| c.id != id);
        self.see(now, uid, list);
    }

    /// Containers of each replica, as known now.
    #[must_use]
    pub fn seen(&self) -> &BTreeMap<ReplicaUid, Vec<Container>> {
        &self.seen
    }
}
