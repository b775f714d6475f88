//! Makes of a host what is wanted of it.
//!
//! A machine without I/O: what the engine shows, what the disk has taken, how steps and checks ended
//! and the time go in; looks at the engine, steps, checks, writes and reports come out. It waits for
//! nothing and holds nothing up; every wait, retry and bound is decided here, and whoever carries the
//! effects out answers each step ([`Input::StepDone`], [`Input::StepFailed`]) and each look exactly
//! once, in any order.
//!
//! What always holds:
//!
//! - Nothing is done before the engine was looked at, nor while it does not answer.
//! - A replica has at most one step under way, and the next one is worked out from what was seen
//!   *after* the last one ended: a look that began earlier says nothing of it.
//! - An attempt's number is durable before its container is made, and is never used twice. That a
//!   replacement begins, or has failed, is durable before anything is stopped for it.
//! - A step that failed is tried again for ever, with a wait that doubles up to a bound; an engine
//!   that is away is asked again the same way, and what was to be done is done when it is back.

mod engine;
mod words;
mod works;

pub use words::{Cause, Done, Effect, Input, Look, Outcome, StepId, Token};

use crate::diff::{self, Container, Memory, Places, Seen, State, Step, diff};
use crate::ledger::{HeldSet, Wanted};
use crate::lifecycle::{Life, Reason};
use crate::probe::Probing;
use crate::restart::Backoff;
use berth_proto::agent::{ReplicaReport, SetEntry};
use berth_proto::api;
use berth_proto::convert::timestamp;
use berth_proto::ids::{Digest, Mono, Now, ReplicaUid, Wall};
use berth_proto::values::AssignmentBody;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The wait before a step that failed is tried again, doubled while it fails.
pub const RETRY_MS: u64 = 1_000;
/// The longest wait of a step: a minute after a cause is gone at the latest, all is tried.
pub const MAX_RETRY_MS: u64 = 60_000;
/// Rounds of working out steps in one go. Each remembers something that the next one builds on (an
/// end was taken in, a replacement begins): no replica needs more than three.
const ROUNDS: usize = 8;
/// While a replacement has its time, what is left of it is written so often: a restart of the agent
/// adds at most so much to it.
const COUNT_DOWN_MS: u64 = 5_000;
/// What is said of a replacement that has failed.
const NOT_IN_TIME: &str = "it was not ready in time, its predecessor is brought back";
/// Checks under way at once: each costs a connection.
const PROBES: usize = 32;

/// The check of a running attempt.
#[derive(Debug)]
struct Checked {
    attempt: u32,
    probing: Probing,
    /// One is under way.
    busy: bool,
    /// That one asks the program that was there before, or one that is being stopped: its answer says
    /// nothing.
    stale: bool,
}

/// What is under way or known of one replica, beside its memory and its containers.
#[derive(Debug, Default)]
struct Desk {
    /// The step under way.
    step: Option<StepId>,
    /// Only a look after this one tells its containers.
    look_after: Look,
    /// A step ended without saying how it left things: nothing is done before the next look.
    unsure: bool,
    /// The next attempt's number, and the write it waits for.
    reserved: Option<(u32, Token)>,
    /// Nothing is done for it before this write.
    hold: Option<Token>,
    /// The write with which its time as a replacement begins, and how long that is in milliseconds.
    time: Option<(Token, u64)>,
    /// When making and starting, which failed, is tried again; the same of stopping and removing. What is
    /// not wanted any more goes at once, however often it could not be started.
    retry: Backoff,
    retry_end: Backoff,
    probing: Option<Checked>,
    /// What an attempt's program wrote last.
    last_words: Option<(u32, String)>,
    life: Life,
    told: Option<ReplicaReport>,
}

impl Desk {
    /// What an attempt's program wrote last; empty: that is not known.
    fn wrote(&self, attempt: u32) -> String {
        let known = self.last_words.as_ref().filter(|(of, _)| *of == attempt);
        known.map(|(_, line)| line.clone()).unwrap_or_default()
    }
}

/// Writes of what is remembered: one at a time, each holding all of it.
#[derive(Debug, Default)]
struct Disk {
    issued: Token,
    done: Token,
    under_way: bool,
    dirty: bool,
    retry: Backoff,
    written: Mono,
}

/// The machine.
#[derive(Debug)]
pub struct Reconcile {
    wanted: Wanted,
    memory: BTreeMap<ReplicaUid, Memory>,
    seen: Seen,
    desks: BTreeMap<ReplicaUid, Desk>,
    places: Places,
    engine: engine::Sight,
    works: works::Works,
    disk: Disk,
    changed: BTreeSet<ReplicaUid>,
    wake: Option<Mono>,
}

impl Reconcile {
    /// A machine with what was durable, times as the time left. Its first step is [`Input::Tick`].
    #[must_use]
    pub fn new(wanted: &Wanted, mut memory: BTreeMap<ReplicaUid, Memory>, now: Mono) -> Self {
        for one in memory.values_mut() {
            one.not_before = one.not_before.map(|left| now.plus_ms(left.0));
            one.replace_until = one.replace_until.map(|left| now.plus_ms(left.0));
            one.stopping_since = (one.stopping != 0).then_some(now);
        }
        let mut machine = Self {
            wanted: Wanted::NotYetKnown,
            memory,
            seen: Seen::new(),
            desks: BTreeMap::new(),
            places: Places::default(),
            engine: engine::Sight::default(),
            works: works::Works::default(),
            disk: Disk::default(),
            changed: BTreeSet::new(),
            wake: None,
        };
        if let Some(set) = wanted.set() {
            machine.take(Arc::clone(set));
        } else if bug!(EmptySetForNoNews) {
            machine.take(Arc::default());
        }
        machine
    }

    /// When [`Input::Tick`] is due; `None`: not before something else comes in.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.wake
    }

    /// One step.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        self.input(now, input, &mut out);
        self.wake = None;
        self.work(now, &mut out);
        self.probe(now, &mut out);
        self.persist(now.mono, &mut out);
        self.look(now.mono, &mut out);
        self.tell(&mut out);
        out
    }

    fn wake_at(&mut self, at: Mono) {
        self.wake = Some(self.wake.map_or(at, |held| held.min(at)));
    }

    fn input(&mut self, now: Now, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::SetTaken(set) => self.take(set),
            Input::Observed { look, containers } => self.observed(now, look, containers, out),
            Input::EngineAway { look, why } => self.engine_away(now.mono, look, &why, out),
            Input::Happened { urgent } => self.engine.happened(urgent, now.mono),
            Input::Followed => self.engine.followed(now.mono),
            Input::FollowEnded => self.engine.follow_ended(now.mono),
            Input::Network(result) => self.engine.network(result, now.mono),
            Input::Persisted { token, result } => self.persisted(now.mono, token, result),
            Input::StepDone { step, done } => self.step_done(now, step, done),
            Input::StepFailed { step, cause, words } => {
                self.step_failed(now.mono, step, cause, &words);
            }
            Input::Progress { replica, progress } => self.progress(&replica, &progress),
            Input::LastWords { replica, attempt, line } => {
                let known =
                    |desk: &Desk| desk.last_words.as_ref().is_some_and(|(of, _)| *of > attempt);
                let newer = self.desks.get(&replica).is_some_and(known);
                if self.entry(&replica).is_some() && !newer {
                    self.desk(&replica).last_words = Some((attempt, line));
                }
            }
            Input::FetchWaits { replica, words } => self.fetch_waits(&replica, &words),
            Input::ProbeResult { replica, attempt, outcome } => {
                self.probed(now.mono, &replica, attempt, outcome);
            }
            Input::Tick => {}
        }
    }

    fn take(&mut self, set: Arc<HeldSet>) {
        for (uid, entry) in &set.entries {
            // Whoever is wanted has a memory, so that its end is noticed.
            let memory = self.memory.entry(uid.clone()).or_default();
            memory.replaces = diff::predecessor(entry).or(memory.replaces.take());
            let attempt = memory.attempt;
            self.desks
                .entry(uid.clone())
                .or_insert_with(|| Desk { life: Life::new(attempt), ..Desk::default() });
        }
        self.wanted = Wanted::Set(set);
        self.places = Places::of(&self.wanted, &self.memory);
        self.changed.extend(self.desks.keys().cloned());
    }

    fn entry(&self, uid: &ReplicaUid) -> Option<&SetEntry> {
        self.wanted.set()?.entries.get(uid)
    }

    fn body(&self, uid: &ReplicaUid) -> Option<Arc<AssignmentBody>> {
        let set = self.wanted.set()?;
        Some(Arc::clone(&set.body(set.entries.get(uid)?)?.value))
    }

    fn body_digest(&self, uid: &ReplicaUid) -> Option<Digest> {
        self.entry(uid)?.body_digest.parse().ok()
    }

    fn desk(&mut self, uid: &ReplicaUid) -> &mut Desk {
        self.changed.insert(uid.clone());
        self.desks.entry(uid.clone()).or_default()
    }

    // ---- memory ----

    /// What is remembered has changed; answers with the write that will hold it.
    fn remember(&mut self, uid: &ReplicaUid, memory: Memory) -> Token {
        self.memory.insert(uid.clone(), memory);
        self.disk.dirty = true;
        Token(self.disk.issued.0 + 1)
    }

    fn durable(&self, token: Token) -> bool {
        token <= self.disk.done
    }

    fn persist(&mut self, now: Mono, out: &mut Vec<Effect>) {
        // What is stored is the time left: it has to be told that time passes, or an agent that is
        // restarted again and again would wait for ever.
        let counts_down = self.memory.values().any(|m| m.replace_until.is_some());
        if counts_down && !self.disk.under_way {
            let again = self.disk.written.plus_ms(COUNT_DOWN_MS);
            if now < again {
                self.wake_at(again);
            } else {
                self.disk.dirty = true;
            }
        }
        if !self.disk.dirty || self.disk.under_way {
            return;
        }
        if let Some(at) = self.disk.retry.waits(now) {
            self.wake_at(at);
            return;
        }
        // A write that was refused is asked for again up to a minute later: nothing was done for a
        // replacement meanwhile, and its time begins with the write that is taken.
        let done = self.disk.done;
        let waits = |uid: &ReplicaUid| {
            self.desks.get(uid).is_some_and(|desk| desk.hold.is_some_and(|token| token > done))
        };
        for (uid, desk) in &self.desks {
            // Nor is anything done for it while what gives way to it waits for the disk.
            let mate = || self.places.others(uid).any(waits);
            if let Some((_, time_ms)) = desk.time.filter(|(token, _)| *token > done || mate())
                && let Some(until) = self.memory.get_mut(uid).and_then(|m| m.replace_until.as_mut())
            {
                *until = now.plus_ms(time_ms);
            }
        }
        self.disk.issued.0 += 1;
        self.disk.dirty = false;
        self.disk.under_way = true;
        self.disk.written = now;
        let left = |at: Option<Mono>| at.map(|at| Mono(at.since_ms(now)));
        let memory = self.memory.iter().map(|(uid, m)| {
            let durable = Memory {
                not_before: left(m.not_before),
                replace_until: left(m.replace_until),
                stopping_since: None,
                bytes_here: false,
                ready: false,
                ready_since: None,
                must_restart: m.must_restart && !bug!(StopForgotten),
                ..m.clone()
            };
            (uid.clone(), durable)
        });
        out.push(Effect::Persist { token: self.disk.issued, memory: memory.collect() });
    }

    fn persisted(&mut self, now: Mono, token: Token, result: Result<(), String>) {
        self.disk.under_way = false;
        match result {
            Ok(()) => {
                self.disk.done = self.disk.done.max(token);
                self.disk.retry.succeeded();
            }
            Err(_) if bug!(FailedWriteTaken) => self.disk.done = self.disk.done.max(token),
            Err(why) => {
                self.disk.dirty = true;
                self.disk.retry.failed(RETRY_MS, MAX_RETRY_MS, now);
                let done = self.disk.done;
                for (uid, desk) in &mut self.desks {
                    let waits = desk.reserved.map(|(_, token)| token).max(desk.hold);
                    if waits.is_some_and(|token| token > done) {
                        desk.life.because(Reason::DISK_FAILED, &why);
                        self.changed.insert(uid.clone());
                    }
                }
            }
        }
    }

    // ---- steps ----

    /// Works out what to do and asks for it.
    fn work(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.drop_fetches(out);
        if !self.engine.is_here() {
            return;
        }
        for _ in 0..ROUNDS {
            let plan = diff(&self.wanted, &self.seen, &self.memory, now.mono);
            if let Some(at) = plan.wake {
                self.wake_at(at);
            }
            // What was begun is ended before anything else is begun.
            let (later, first): (Vec<Step>, Vec<Step>) =
                plan.steps.into_iter().partition(|s| matches!(s, Step::Create { .. }));
            let mut remembered = false;
            for step in first.into_iter().chain(later) {
                remembered |= self.one(now, step, out);
            }
            if !remembered {
                return;
            }
        }
    }

    /// One step of the plan; `true`: something is remembered that the plan did not know.
    fn one(&mut self, now: Now, step: Step, out: &mut Vec<Effect>) -> bool {
        let replica = step.replica().clone();
        if !self.may_act(&replica) {
            return false;
        }
        match step {
            Step::TakeExit { attempt, state, memory, put_down, .. } => {
                self.take_exit(now, &replica, attempt, &state, memory, put_down);
                true
            }
            Step::Remember { memory, .. } => {
                if memory.rolled_back {
                    let life = &mut self.desk(&replica).life;
                    life.set_ready(false);
                    let last = life.status().message.clone();
                    let said = if last.is_empty() { last } else { format!("; last: {last}") };
                    life.because(Reason::REPLACEMENT_FAILED, &format!("{NOT_IN_TIME}{said}"));
                }
                let begins = self.memory.get(&replica).is_none_or(|m| !m.replacement_begun);
                let time = memory.replace_until.filter(|_| begins);
                let token = self.remember(&replica, memory);
                let desk = self.desk(&replica);
                desk.hold = Some(token);
                desk.time = time.map(|until| (token, until.since_ms(now.mono))).or(desk.time);
                true
            }
            Step::Absent(_) => {
                self.memory.remove(&replica);
                self.desks.remove(&replica);
                self.changed.remove(&replica);
                self.disk.dirty = true;
                out.push(Effect::Absent(replica));
                false
            }
            Step::Fetch(_) => {
                self.fetch(now, &replica, out);
                false
            }
            Step::Create { attempt, .. } => {
                self.create(now, &replica, attempt, out);
                false
            }
            Step::Start { id, .. } => {
                if self.has_place(now, &replica, works::Kind::Start) {
                    let attempt = self.container(&replica, &id).map_or(0, |c| c.attempt);
                    let step = self.begin(&replica, works::Kind::Start, &id, attempt);
                    self.desk(&replica).life.starting(attempt, &id);
                    out.push(Effect::Start { step, replica, id });
                }
                false
            }
            Step::Stop { id, .. } => {
                if self.has_place(now, &replica, works::Kind::Stop) {
                    let found = self.container(&replica, &id);
                    let (attempt, grace_ms) =
                        found.map_or((0, works::GRACE_MS), |c| (c.attempt, c.grace_ms));
                    let grace_ms = if bug!(NoGrace) { 0 } else { grace_ms };
                    let step = self.begin(&replica, works::Kind::Stop, &id, attempt);
                    // An older one that somebody has started beside it is none of its readiness.
                    if self.newest_running(&replica).is_none_or(|newest| newest == id) {
                        self.desk(&replica).life.set_ready(false);
                        if !bug!(StoppingAsked) {
                            self.forget_readiness(&replica);
                        }
                    }
                    out.push(Effect::Stop { step, replica, id, grace_ms });
                }
                false
            }
            Step::Remove { id, .. } => {
                if self.has_place(now, &replica, works::Kind::Remove) {
                    let step = self.begin(&replica, works::Kind::Remove, &id, 0);
                    out.push(Effect::Remove { step, replica, id });
                }
                false
            }
        }
    }

    fn container(&self, uid: &ReplicaUid, id: &str) -> Option<&Container> {
        self.seen.get(uid)?.iter().find(|c| c.id == id)
    }

    /// Neither it nor one that it cannot stand beside has anything under way or to be found out.
    fn may_act(&self, uid: &ReplicaUid) -> bool {
        let calm = |uid: &ReplicaUid| {
            self.desks.get(uid).is_none_or(|desk| {
                desk.step.is_none()
                    && !desk.unsure
                    && desk.hold.is_none_or(|token| self.durable(token) || bug!(HeldByNothing))
            })
        };
        calm(uid) && self.places.others(uid).all(calm)
    }

    fn take_exit(
        &mut self,
        now: Now,
        uid: &ReplicaUid,
        attempt: u32,
        state: &State,
        memory: Memory,
        put_down: bool,
    ) {
        let State::Exited { code, out_of_memory, time } = *state else { return };
        // It is waited after only when it comes back.
        let next = memory.not_before.filter(|_| !put_down).map(|at| {
            let wait_ms = i64::try_from(at.since_ms(now.mono)).unwrap_or(i64::MAX);
            Wall(now.wall.0.saturating_add(wait_ms))
        });
        let (reason, words) = if memory.finished {
            let words = "its program has ended and its policy is not to start it again";
            (Reason::FINISHED, words)
        } else if next.is_some() {
            (Reason::BACKOFF, "its program has ended and will be started again")
        } else if memory.not_before.is_some() {
            (Reason::REPLACED, "its program has ended, and another one takes its place")
        } else {
            (Reason::REPLACED, "it was stopped for the one that takes its place")
        };
        self.remember(uid, memory);
        let desk = self.desk(uid);
        desk.probing = None;
        let last_line = desk.wrote(attempt);
        let time = Some(timestamp(time));
        let exit = api::Exit { attempt, code, out_of_memory, time, last_line };
        desk.life.exited(exit, next);
        desk.life.because(reason, &format!("{words} (exit code {code})"));
    }

    fn create(&mut self, now: Now, uid: &ReplicaUid, attempt: u32, out: &mut Vec<Effect>) {
        let greatest = self.seen.get(uid).into_iter().flatten().map(|c| c.attempt).max();
        let reserved = self.desk(uid).reserved.filter(|(number, _)| Some(*number) > greatest);
        let Some((number, token)) = reserved else {
            let memory = self.memory.get(uid).cloned().unwrap_or_default();
            let mut next = Memory {
                attempt,
                ready: false,
                ready_since: None,
                not_before: None,
                must_restart: false,
                ..memory
            };
            // The first attempt of a replacement: from here on it has its time.
            let first = self.memory.get(uid).is_none_or(|m| m.attempt == 0);
            let replaces = self.entry(uid).and_then(|e| e.replaces.as_ref());
            let time_ms = replaces
                .filter(|_| first && next.replace_until.is_some())
                .map(|replaces| replaces.ready_within_ms);
            if let Some(time_ms) = time_ms {
                next.replace_until = Some(now.mono.plus_ms(time_ms));
            }
            let token = self.remember(uid, next);
            let desk = self.desk(uid);
            desk.reserved = Some((attempt, token));
            if let Some(time_ms) = time_ms {
                desk.time = Some((token, time_ms));
                // Nor is it given up before it could begin.
                desk.hold = Some(token);
            }
            return;
        };
        if !self.durable(token) && !bug!(CreatedBeforeRecorded) {
            return;
        }
        let host_network = self.body(uid).is_some_and(|b| b.spec.privileges.host_network);
        if !host_network && let Err(why) = self.engine.network_is_here() {
            if let Some(why) = why.map(str::to_owned) {
                self.desk(uid).life.because(Reason::NO_NETWORK, &why);
            }
            return;
        }
        if self.has_place(now, uid, works::Kind::Create) {
            let step = self.begin(uid, works::Kind::Create, "", number);
            let desk = self.desk(uid);
            desk.reserved = None;
            desk.life.creating(number);
            out.push(Effect::Create { step, replica: uid.clone(), attempt: number });
        }
    }

    // ---- checks ----

    fn probe(&mut self, now: Now, out: &mut Vec<Effect>) {
        let mut under_way =
            self.desks.values().filter(|d| d.probing.as_ref().is_some_and(|p| p.busy)).count();
        let uids: Vec<ReplicaUid> = self.seen.keys().cloned().collect();
        for uid in uids {
            let running = self.seen[&uid].iter().find(|c| c.state == State::Running);
            let found = running.map(|c| (c.attempt, c.started));
            let check = self.body(&uid).and_then(|b| b.spec.health.clone());
            let (Some((attempt, started)), Some(check)) = (found, check) else {
                if let Some(desk) = self.desks.get_mut(&uid) {
                    desk.probing = None;
                }
                continue;
            };
            // Whatever it answers while it is being stopped, it is to serve nobody.
            if self.is_stopping(&uid) && !bug!(StoppingAsked) {
                continue;
            }
            let desk = self.desks.entry(uid.clone()).or_default();
            // Its end has been seen, and somebody has started its container since: nothing is told of it any
            // more, and it is being stopped.
            if !desk.life.runs(attempt) {
                desk.probing = None;
                continue;
            }
            if desk.probing.as_ref().is_none_or(|probing| probing.attempt != attempt) {
                let ran_ms = started.map_or(0, |at| now.wall.0.saturating_sub(at.0));
                let ran_ms = u64::try_from(ran_ms).unwrap_or(0);
                let since = Mono(now.mono.0.saturating_sub(ran_ms));
                let probing = Probing::adopted(since, now.mono);
                desk.probing = Some(Checked { attempt, probing, busy: false, stale: false });
            }
            let Some(checked) = &mut desk.probing else { continue };
            if checked.busy {
                continue;
            }
            let due = checked.probing.due();
            if due > now.mono || under_way >= bound!(PROBES, 1) {
                // With all places taken, the next result makes room.
                if due > now.mono {
                    self.wake_at(due);
                }
                continue;
            }
            checked.busy = true;
            under_way += 1;
            out.push(Effect::Probe { replica: uid, attempt, check });
        }
    }

    fn probed(&mut self, now: Mono, uid: &ReplicaUid, attempt: u32, outcome: Outcome) {
        let Some(check) = self.body(uid).and_then(|b| b.spec.health.clone()) else { return };
        let Some(desk) = self.desks.get_mut(uid) else { return };
        let Some(checked) = desk.probing.as_mut().filter(|checked| checked.attempt == attempt)
        else {
            return;
        };
        // Of a program that has ended, or of the one before it in the same container.
        if checked.stale || !desk.life.runs(attempt) {
            desk.probing = None;
            return;
        }
        checked.busy = false;
        let probing = &mut checked.probing;
        match outcome {
            Outcome::Healthy => probing.result(&check, Ok(()), now),
            Outcome::Unhealthy(why) => probing.result(&check, Err(why), now),
            Outcome::NotAsked => {
                probing.not_asked(&check, now);
                return;
            }
        }
        let ready = probing.is_ready();
        desk.life.set_ready(ready);
        if !ready {
            let words = format!("its health check fails: {}", probing.last_failure);
            desk.life.because(Reason::NOT_READY, &words);
        }
        let memory = self.memory.entry(uid.clone()).or_default();
        memory.ready = ready;
        memory.ready_since = if ready { memory.ready_since.or(Some(now)) } else { None };
        // Decided once, it stands until the program answers; and whatever it answers while it is stopped.
        let decided = memory.must_restart && (desk.step.is_some() || !ready);
        let must_restart = decided || probing.must_restart(&check, now);
        if memory.must_restart != must_restart {
            memory.must_restart = must_restart;
            self.disk.dirty = true;
            // Durable before it is stopped: its end would else pass for its own, and a program that is not
            // started again after ending well would stay down.
            if must_restart {
                desk.hold = Some(Token(self.disk.issued.0 + 1));
            }
        }
        self.changed.insert(uid.clone());
    }

    // ---- reports ----

    /// Tells of those that have changed.
    fn tell(&mut self, out: &mut Vec<Effect>) {
        for uid in std::mem::take(&mut self.changed) {
            let entry = self.entry(&uid).cloned();
            let container = self.seen.get(&uid).and_then(|list| list.first());
            let labels = container.map(|c| c.labels.clone());
            let failed = self.memory.get(&uid).is_some_and(|m| m.rolled_back);
            let name = self
                .body(&uid)
                .map(|body| (body.deployment.to_string(), body.namespace.to_string()));
            let (deployment, namespace) = name.unwrap_or_default();
            let Some(desk) = self.desks.get_mut(&uid) else { continue };
            // Whatever else is found out of it: this is what the server has to know.
            if failed && desk.life.status().reason != Reason::REPLACEMENT_FAILED.0 {
                desk.life.set_ready(false);
                desk.life.because(Reason::REPLACEMENT_FAILED, NOT_IN_TIME);
            }
            if (entry.is_none() && labels.is_none()) || !desk.life.is_known() {
                continue;
            }
            let assigned = entry.is_some();
            let entry = entry.unwrap_or_else(|| {
                let labels = labels.unwrap_or_default();
                SetEntry {
                    body_digest: labels.body_digest,
                    deployment_uid: labels.deployment_uid,
                    release: labels.release,
                    ..SetEntry::default()
                }
            });
            let report = ReplicaReport {
                replica_uid: uid.to_string(),
                deployment_uid: entry.deployment_uid,
                release: entry.release,
                body_digest: entry.body_digest,
                status: Some(desk.life.status().clone()),
                assigned,
                slot: entry.slot,
                deployment,
                namespace,
            };
            let unready = |report: &ReplicaReport| {
                let mut report = report.clone();
                if let Some(status) = &mut report.status {
                    status.ready = false;
                }
                report
            };
            if bug!(ReadinessNotTold) && desk.told.as_ref().map(unready) == Some(unready(&report)) {
                continue;
            }
            if desk.told.as_ref() != Some(&report) {
                desk.told = Some(report.clone());
                out.push(Effect::Report(Box::new(report)));
            }
        }
    }
}

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod replace_tests;
#[cfg(test)]
mod test_world;
#[cfg(test)]
mod tests;
