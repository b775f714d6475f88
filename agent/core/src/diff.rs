//! Steps that turn what is there into what is wanted.
//!
//! [`diff`] looks at nothing but its arguments and remembers nothing: a step that failed comes up
//! again on the next pass. It never starts a second container while one of the replica runs, never
//! stops anything while nobody has said what is wanted, and brings the bytes before it touches what
//! runs. Two replicas of which one takes the other's place never run side by side.

use crate::ledger::{Body, Wanted};
use crate::restart::{self, Next};
use berth_proto::agent::SetEntry;
use berth_proto::ids::{Mono, ReplicaUid, Wall};
use berth_proto::values::Restart;
use std::collections::BTreeMap;

/// A call to the engine is over after so long, its own deadline included.
const ASKED_MS: u64 = 60_000;

/// How a container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Made and never started.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Exited {
        /// Exit code.
        code: i32,
        /// For lack of memory.
        out_of_memory: bool,
        /// When.
        time: Wall,
    },
}

/// One of our containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// The engine's id.
    pub id: String,
    /// From its label.
    pub replica: ReplicaUid,
    /// From its label.
    pub attempt: u32,
    /// How it is.
    pub state: State,
    /// Since when it runs, by the engine's clock; `None`: it does not, or that is not known.
    pub started: Option<Wall>,
    /// How long its program has after the first signal, as it was made.
    pub grace_ms: u64,
    /// What its labels say of it, for a replica that no set names.
    pub labels: Labels,
}

/// What a container's labels say of its replica.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// The deployment's uid.
    pub deployment_uid: String,
    /// The release.
    pub release: u64,
    /// Digest of the body it was made from.
    pub body_digest: String,
}

/// Containers of each replica, newest attempt first.
pub type Seen = BTreeMap<ReplicaUid, Vec<Container>>;

/// What is remembered of a replica; `durable` parts survive the agent, times as the time left.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// Durable: greatest attempt ever made, or about to be made.
    pub attempt: u32,
    /// Durable: failures in a row.
    pub failures: u32,
    /// Durable: the attempt whose end was taken in last.
    pub exit_taken: u32,
    /// Durable: its predecessor is put away for it from now on.
    pub replacement_begun: bool,
    /// Durable: its replacement failed and the predecessor was brought back.
    pub rolled_back: bool,
    /// Durable: its replacement was ready in time.
    pub replacement_done: bool,
    /// Durable: it ended and is not started again.
    pub finished: bool,
    /// Durable: whose place it takes, past the set that said so: until it is gone, or a set names both, the
    /// two cannot stand side by side.
    pub replaces: Option<ReplicaUid>,
    /// Durable: not before then is the next attempt made.
    pub not_before: Option<Mono>,
    /// Durable: a replacement that is not ready by then has failed.
    pub replace_until: Option<Mono>,
    /// Durable: the attempt that is stopped for whoever takes its place. Its end is no failure and does
    /// not finish it, also when nobody takes the place after all.
    pub stopping: u32,
    /// Since when this life of the agent looks at a container that one before it may have had stopped.
    pub stopping_since: Option<Mono>,
    /// Durable: its check says that it must be started anew.
    pub must_restart: bool,
    /// Image and artifact are here and verified.
    pub bytes_here: bool,
    /// The present attempt has passed its check, or has none and runs.
    pub ready: bool,
    /// Since when.
    pub ready_since: Option<Mono>,
}

impl Memory {
    /// Its predecessor is to be down.
    fn takes_the_place(&self) -> bool {
        (self.replacement_begun || self.replacement_done) && !self.rolled_back
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Bring image and artifact.
    Fetch(ReplicaUid),
    /// Make a container of this attempt and start it.
    Create {
        /// Whose.
        replica: ReplicaUid,
        /// The number.
        attempt: u32,
    },
    /// Start a container that was made.
    Start {
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
    },
    /// Stop a container with the grace of its replica.
    Stop {
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
    },
    /// Remove a container that does not run.
    Remove {
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
    },
    /// Take in an end: `memory` is to be remembered durably.
    TakeExit {
        /// Whose.
        replica: ReplicaUid,
        /// Which attempt.
        attempt: u32,
        /// How.
        state: State,
        /// Remembered from now on.
        memory: Memory,
        /// Its place is taken: it is not started again, unless it has to come back.
        put_down: bool,
    },
    /// Remember durably.
    Remember {
        /// Whose.
        replica: ReplicaUid,
        /// What.
        memory: Memory,
    },
    /// Nothing is left of a replica that is not wanted.
    Absent(ReplicaUid),
}

impl Step {
    /// Whose step it is.
    #[must_use]
    pub fn replica(&self) -> &ReplicaUid {
        match self {
            Self::Fetch(replica)
            | Self::Absent(replica)
            | Self::Create { replica, .. }
            | Self::Start { replica, .. }
            | Self::Stop { replica, .. }
            | Self::Remove { replica, .. }
            | Self::TakeExit { replica, .. }
            | Self::Remember { replica, .. } => replica,
        }
    }
}

/// Steps, and when to look again if nothing happens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Diff {
    /// What to do; steps of different replicas may be done at the same time.
    pub steps: Vec<Step>,
    /// When to look again.
    pub wake: Option<Mono>,
}

impl Diff {
    fn wake(&mut self, at: Mono) {
        self.wake = Some(self.wake.map_or(at, |held| held.min(at)));
    }
}

/// The predecessor an entry takes the place of.
#[must_use]
pub fn predecessor(entry: &SetEntry) -> Option<ReplicaUid> {
    entry.replaces.as_ref()?.replica_uid.parse().ok()
}

/// Replicas of which at most one may run: each takes the place of another one, by the set or, unless a set
/// names both side by side, by what is remembered of it.
#[derive(Debug, Default)]
pub struct Places {
    first: BTreeMap<ReplicaUid, ReplicaUid>,
    members: BTreeMap<ReplicaUid, Vec<ReplicaUid>>,
}

impl Places {
    /// Of all that is wanted or remembered.
    #[must_use]
    pub fn of(wanted: &Wanted, memory: &BTreeMap<ReplicaUid, Memory>) -> Self {
        // A set that names both and says nothing of it has room for both: so it is after a restore.
        let both = |uid: &ReplicaUid, old: &ReplicaUid| {
            let named = |of| wanted.set().is_some_and(|set| set.entries.contains_key(of));
            named(uid) && named(old)
        };
        let remembered = memory.iter().filter_map(|(uid, m)| Some((uid, m.replaces.clone()?)));
        let remembered = remembered.filter(|(uid, old)| !both(uid, old));
        let said = wanted.set().into_iter().flat_map(|set| &set.entries);
        let said = said.filter_map(|(uid, entry)| Some((uid, predecessor(entry)?)));
        // What the set says counts.
        let before: BTreeMap<&ReplicaUid, ReplicaUid> = remembered.chain(said).collect();
        let mut all = Self::default();
        for (uid, old) in &before {
            let mut first = old;
            // No more links than there are replicas: a ring ends, too.
            for _ in 0..before.len() {
                let Some(earlier) = before.get(first) else { break };
                first = earlier;
            }
            all.join(uid, first);
            all.join(old, first);
        }
        all
    }

    fn join(&mut self, uid: &ReplicaUid, first: &ReplicaUid) {
        if self.first.insert(uid.clone(), first.clone()).is_none() {
            self.members.entry(first.clone()).or_default().push(uid.clone());
        }
    }

    /// Those that cannot stand beside it.
    pub fn others<'a>(&'a self, uid: &'a ReplicaUid) -> impl Iterator<Item = &'a ReplicaUid> {
        let first = self.first.get(uid);
        let members = first.and_then(|first| self.members.get(first));
        members.into_iter().flatten().filter(move |other| *other != uid)
    }
}

/// Works out the steps.
#[must_use]
pub fn diff(
    wanted: &Wanted,
    seen: &Seen,
    memory: &BTreeMap<ReplicaUid, Memory>,
    now: Mono,
) -> Diff {
    let mut out = Diff::default();
    // Nobody has said what is wanted: silence stops nothing.
    let Some(set) = wanted.set() else { return out };
    let blank = Memory::default();
    let remembered = |uid: &ReplicaUid| memory.get(uid).unwrap_or(&blank);
    let here = |uid: &ReplicaUid| seen.get(uid).map_or(&[][..], Vec::as_slice);

    // Whose place is taken, and by whom.
    let successors: BTreeMap<ReplicaUid, &ReplicaUid> =
        set.entries.iter().filter_map(|(uid, entry)| Some((predecessor(entry)?, uid))).collect();
    let places = Places::of(wanted, memory);

    for (uid, entry) in &set.entries {
        let successor = successors.get(uid).copied();
        if successor.is_some_and(|new| remembered(new).takes_the_place()) {
            let restart = set.body(entry).map(|body| &body.value.spec.restart);
            put_down(uid, here(uid), remembered(uid), restart, now, &mut out);
            continue;
        }
        let Some(body) = set.body(entry) else { continue };
        let beside = places.others(uid).any(|other| here(other).iter().any(is_running))
            && !bug!(BothSideBySide);
        let gives_way = predecessor(entry).is_some_and(|old| set.entries.contains_key(&old));
        let (here, memory) = (here(uid), remembered(uid));
        One { uid, entry, body, here, memory, beside, gives_way }.keep(now, &mut out);
    }
    for (uid, here) in seen {
        if !set.entries.contains_key(uid) {
            put_away(uid, here, &mut out);
        }
    }
    for uid in memory.keys() {
        if !set.entries.contains_key(uid) && here(uid).is_empty() {
            out.steps.push(Step::Absent(uid.clone()));
        }
    }
    out
}

fn is_running(container: &Container) -> bool {
    matches!(container.state, State::Running)
}

/// Stops what runs of a replica that is not wanted, and removes the rest.
fn put_away(uid: &ReplicaUid, here: &[Container], out: &mut Diff) {
    for container in here {
        let (replica, id) = (uid.clone(), container.id.clone());
        out.steps.push(match container.state {
            State::Running => Step::Stop { replica, id },
            State::Created | State::Exited { .. } => Step::Remove { replica, id },
        });
    }
}

/// Stops what runs of a replica whose place is taken. It may have to come back, so that an end by
/// our own hand is no failure and does not finish it.
fn put_down(
    uid: &ReplicaUid,
    here: &[Container],
    memory: &Memory,
    restart: Option<&Restart>,
    now: Mono,
    out: &mut Diff,
) {
    for container in here {
        let (replica, id) = (uid.clone(), container.id.clone());
        match container.state {
            State::Running if container.attempt > memory.stopping => {
                let memory = Memory { stopping: container.attempt, ..memory.clone() };
                out.steps.push(Step::Remember { replica, memory });
                return;
            }
            State::Running => out.steps.push(Step::Stop { replica, id }),
            State::Created => out.steps.push(Step::Remove { replica, id }),
            State::Exited { code, .. } if container.attempt > memory.exit_taken => {
                // A failure of its own is waited after, should it come back. That it has finished is not
                // concluded here: nobody may remember that it was stopped.
                let by_itself = restart
                    .filter(|_| container.attempt != memory.stopping)
                    .map(|restart| ended(memory, restart, container.attempt, code, now))
                    .filter(|after| !after.finished);
                let memory = by_itself.unwrap_or_else(|| put_aside(memory, container.attempt));
                let (attempt, state) = (container.attempt, container.state.clone());
                out.steps.push(Step::TakeExit { replica, attempt, state, memory, put_down: true });
                // Older ones are taken in with it.
                return;
            }
            State::Exited { .. } => {}
        }
    }
}

/// What is remembered after an end that counts for nothing.
fn put_aside(memory: &Memory, attempt: u32) -> Memory {
    Memory {
        exit_taken: attempt,
        attempt: memory.attempt.max(attempt),
        ready: false,
        ready_since: None,
        must_restart: false,
        ..memory.clone()
    }
}

/// A replica that is wanted, with what is known of it.
struct One<'a> {
    uid: &'a ReplicaUid,
    entry: &'a SetEntry,
    body: &'a Body,
    here: &'a [Container],
    memory: &'a Memory,
    /// One that it cannot stand beside runs.
    beside: bool,
    /// Its predecessor is wanted, too.
    gives_way: bool,
}

impl One<'_> {
    fn replica(&self) -> ReplicaUid {
        self.uid.clone()
    }

    fn remember(&self, memory: Memory) -> Step {
        Step::Remember { replica: self.replica(), memory }
    }

    fn keep(&self, now: Mono, out: &mut Diff) {
        if self.memory.rolled_back && self.gives_way {
            put_away(self.uid, self.here, out);
            return;
        }
        if self.memory.rolled_back {
            // A set that names it and not its predecessor wants it after all.
            let memory =
                Memory { rolled_back: false, replacement_done: true, ..self.memory.clone() };
            out.steps.push(self.remember(memory));
            return;
        }
        let running = self.tidy(out);
        if running.is_some_and(|running| running.attempt == self.memory.stopping) {
            // It was to be stopped, and was not: whatever ends it now is not our doing. What an agent has
            // asked for that died meanwhile may still come.
            let grace_ms = running.map_or(0, |running| running.grace_ms) + ASKED_MS;
            match self.memory.stopping_since.map(|since| since.plus_ms(grace_ms)) {
                Some(until) if now < until => out.wake(until),
                Some(_) | None => {
                    let memory =
                        Memory { stopping: 0, stopping_since: None, ..self.memory.clone() };
                    out.steps.push(self.remember(memory));
                    return;
                }
            }
        }
        if self.replaces(running, now, out) {
            return;
        }
        match running {
            // Somebody started a container whose end was taken in: nothing can be told of that attempt any
            // more, and the next one has a container of its own.
            Some(running) if running.attempt <= self.memory.exit_taken => {
                out.steps.push(Step::Stop { replica: self.replica(), id: running.id.clone() });
            }
            Some(running) if self.memory.must_restart => {
                out.steps.push(Step::Stop { replica: self.replica(), id: running.id.clone() });
            }
            Some(_) => {}
            None => self.start(now, out),
        }
    }

    /// Of several that run the newest stays, and one dead predecessor is kept for its logs.
    fn tidy(&self, out: &mut Diff) -> Option<&Container> {
        let mut running = self.here.iter().filter(|c| is_running(c));
        let newest = running.next();
        for older in running {
            out.steps.push(Step::Stop { replica: self.replica(), id: older.id.clone() });
        }
        let dead = self.here.iter().filter(|c| matches!(c.state, State::Exited { .. }));
        for old in
            dead.skip(if bug!(LogsThrownAway) { 0 } else { 1 + usize::from(newest.is_none()) })
        {
            out.steps.push(Step::Remove { replica: self.replica(), id: old.id.clone() });
        }
        // Left by a call that was done after all: it was never started and never will be.
        for made in self.here.iter().filter(|c| c.state == State::Created && newest.is_some()) {
            out.steps.push(Step::Remove { replica: self.replica(), id: made.id.clone() });
        }
        newest
    }

    /// The course of a replacement; `true`: something has to be remembered first.
    fn replaces(&self, running: Option<&Container>, now: Mono, out: &mut Diff) -> bool {
        let Some(replaces) = &self.entry.replaces else { return false };
        let (memory, spec) = (self.memory, &self.body.value.spec);
        if memory.replacement_done {
            return false;
        }
        if !memory.replacement_begun {
            if !memory.bytes_here && running.is_none() && !bug!(BytesNotFirst) {
                return false;
            }
            // The predecessor's end comes on top; the first attempt sets its own deadline.
            let until = now.plus_ms(replaces.ready_within_ms.saturating_add(spec.stop_grace_ms));
            let begun =
                Memory { replacement_begun: true, replace_until: Some(until), ..memory.clone() };
            out.steps.push(self.remember(begun));
            return true;
        }
        // Without a check: ready when it has run for a while, at most half of the time it has.
        let steady_ms = match spec.health {
            Some(_) => 0,
            None => spec.rollout.ready_for_ms.min(replaces.ready_within_ms / 2),
        };
        if let Some(since) = memory.ready_since.filter(|_| memory.ready && running.is_some()) {
            if now.since_ms(since) >= steady_ms || bug!(PlaceTakenAtOnce) {
                let done = Memory { replacement_done: true, replace_until: None, ..memory.clone() };
                out.steps.push(self.remember(done));
                return true;
            }
            out.wake(since.plus_ms(steady_ms));
        }
        let Some(until) = memory.replace_until.filter(|_| !bug!(NeverRolledBack)) else {
            return false;
        };
        if now >= until {
            let back = Memory { rolled_back: true, replace_until: None, ..memory.clone() };
            out.steps.push(self.remember(back));
            return true;
        }
        if !bug!(RollbackWakeLost) {
            out.wake(until);
        }
        false
    }

    /// Nothing of it runs.
    fn start(&self, now: Mono, out: &mut Diff) {
        let (replica, memory) = (self.replica(), self.memory);
        if let Some(made) = self.here.iter().find(|c| c.state == State::Created) {
            // Only the newest may be started; an older one is what a crash has left.
            if self.here.iter().any(|c| c.attempt > made.attempt) {
                out.steps.push(Step::Remove { replica, id: made.id.clone() });
            } else if !self.beside {
                out.steps.push(Step::Start { replica, id: made.id.clone() });
            } else if !memory.bytes_here {
                // Made, and all that was remembered is lost: its time begins once its bytes are known to be
                // here, as that of any other.
                out.steps.push(Step::Fetch(replica));
            }
            return;
        }
        if let Some(last) = self.here.first()
            && last.attempt > memory.exit_taken
            && let State::Exited { code, .. } = last.state
        {
            if bug!(SameContainerAgain) {
                out.steps.push(Step::Start { replica, id: last.id.clone() });
                return;
            }
            let (attempt, state) = (last.attempt, last.state.clone());
            // Nobody takes its place after all, and it was stopped already.
            let own = attempt == memory.stopping && !memory.must_restart && !bug!(OwnEndCounted);
            let memory =
                if own { put_aside(memory, attempt) } else { self.ended(attempt, code, now) };
            out.steps.push(Step::TakeExit { replica, attempt, state, memory, put_down: false });
            return;
        }
        if memory.finished {
            return;
        }
        if let Some(not_before) =
            memory.not_before.filter(|at| now < *at && !bug!(BackoffForgotten))
        {
            out.wake(not_before);
            return;
        }
        if !memory.bytes_here {
            out.steps.push(Step::Fetch(replica));
            return;
        }
        // One of two that cannot stand side by side is down before the other is made.
        if self.beside {
            return;
        }
        let greatest = self.here.iter().map(|c| c.attempt).max().unwrap_or(0);
        let known = if bug!(NumberUsedTwice) { 0 } else { memory.attempt };
        let attempt = 1 + greatest.max(known).max(self.entry.attempt_floor);
        out.steps.push(Step::Create { replica, attempt });
    }

    fn ended(&self, attempt: u32, code: i32, now: Mono) -> Memory {
        ended(self.memory, &self.body.value.spec.restart, attempt, code, now)
    }
}

/// What is remembered after an end.
#[must_use]
pub fn ended(memory: &Memory, policy: &Restart, attempt: u32, code: i32, now: Mono) -> Memory {
    let ready_for_ms = memory.ready_since.map_or(0, |since| now.since_ms(since));
    let failures = restart::count(policy, memory.failures, ready_for_ms);
    let mut after = Memory {
        exit_taken: attempt,
        attempt: memory.attempt.max(attempt),
        failures,
        ready: false,
        ready_since: None,
        must_restart: false,
        ..memory.clone()
    };
    // Ended by its failing check, whatever the code: that is a failure, and asks for a new start.
    let next = if memory.must_restart && !bug!(HungTakenForEnded) {
        Next::After { wait_ms: restart::wait_ms(policy, failures) }
    } else {
        restart::next(policy, code, failures)
    };
    match next {
        Next::Finished => after.finished = true,
        Next::After { wait_ms } => after.not_before = Some(now.plus_ms(wait_ms)),
    }
    after
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
