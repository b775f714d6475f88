//! Steps that turn what is there into what is wanted.
//!
//! [`diff`] looks at nothing but its arguments and remembers nothing: a step that failed comes up
//! again on the next pass. It never starts a second container while one of the replica runs, never
//! stops anything while nobody has said what is wanted, and brings the bytes before it touches what
//! runs.

use crate::ledger::{Body, Wanted};
use crate::restart::{self, Next};
use berth_proto::agent::SetEntry;
use berth_proto::ids::{Mono, ReplicaUid, Wall};
use std::collections::{BTreeMap, BTreeSet};

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
}

/// What is remembered of a replica; `durable` parts survive the agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// Durable: greatest attempt ever made.
    pub attempt: u32,
    /// Durable: failures in a row.
    pub failures: u32,
    /// Durable: the attempt whose end was taken in last.
    pub exit_taken: u32,
    /// Durable: its replacement failed and the predecessor was brought back.
    pub rolled_back: bool,
    /// Durable: its replacement was ready in time.
    pub replacement_done: bool,
    /// Durable: it ended and is not started again.
    pub finished: bool,
    /// Not before then is the next attempt made.
    pub not_before: Option<Mono>,
    /// Image and artifact are here and verified.
    pub bytes_here: bool,
    /// The policy forbids it.
    pub forbidden: bool,
    /// The present attempt has passed its check.
    pub ready: bool,
    /// Since when, for the backoff.
    pub ready_since: Option<Mono>,
    /// When the first attempt was started in this life of the agent, for the replacement's deadline.
    pub first_started: Option<Mono>,
    /// Its check says that it must be started anew.
    pub must_restart: bool,
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

/// Works out the steps.
#[must_use]
pub fn diff(
    wanted: &Wanted,
    containers: &[Container],
    memory: &BTreeMap<ReplicaUid, Memory>,
    now: Mono,
) -> Diff {
    let mut out = Diff::default();
    // Nobody has said what is wanted: silence stops nothing.
    let Some(set) = wanted.set() else { return out };
    let mut by_replica: BTreeMap<&ReplicaUid, Vec<&Container>> = BTreeMap::new();
    for container in containers {
        by_replica.entry(&container.replica).or_default().push(container);
    }
    for list in by_replica.values_mut() {
        list.sort_by_key(|c| std::cmp::Reverse(c.attempt));
    }
    let blank = Memory::default();
    let remembered = |uid: &ReplicaUid| memory.get(uid).unwrap_or(&blank);

    // Whose place is taken by a replacement that is under way or done.
    let mut replaced: BTreeSet<ReplicaUid> = BTreeSet::new();
    for (uid, entry) in &set.entries {
        let memory = remembered(uid);
        if let Some(old) = entry.replaces.as_ref().and_then(|r| r.replica_uid.parse().ok())
            && (memory.bytes_here || memory.replacement_done)
            && !memory.rolled_back
            && !memory.forbidden
        {
            replaced.insert(old);
        }
    }

    let nothing = Vec::new();
    for (uid, entry) in &set.entries {
        let here = by_replica.get(uid).unwrap_or(&nothing);
        if replaced.contains(uid) {
            put_away(uid, here, false, &mut out);
            continue;
        }
        let Some(body) = set.body(entry) else { continue };
        let old = entry.replaces.as_ref().and_then(|r| r.replica_uid.parse::<ReplicaUid>().ok());
        let old_here = old.as_ref().and_then(|old| by_replica.get(old)).unwrap_or(&nothing);
        keep(uid, entry, body, here, old_here, remembered(uid), now, &mut out);
    }
    for (uid, here) in &by_replica {
        if !set.entries.contains_key(*uid) {
            put_away(uid, here, true, &mut out);
        }
    }
    for uid in memory.keys() {
        if !set.entries.contains_key(uid) && !by_replica.contains_key(uid) {
            out.steps.push(Step::Absent(uid.clone()));
        }
    }
    out
}

/// Stops what runs; with `remove` also removes what does not.
fn put_away(uid: &ReplicaUid, here: &[&Container], remove: bool, out: &mut Diff) {
    for container in here {
        let (replica, id) = (uid.clone(), container.id.clone());
        match container.state {
            State::Running => out.steps.push(Step::Stop { replica, id }),
            State::Created | State::Exited { .. } if remove => {
                out.steps.push(Step::Remove { replica, id });
            }
            State::Created | State::Exited { .. } => {}
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "all of one replica, named at the only call")]
fn keep(
    uid: &ReplicaUid,
    entry: &SetEntry,
    body: &Body,
    here: &[&Container],
    old_here: &[&Container],
    memory: &Memory,
    now: Mono,
    out: &mut Diff,
) {
    if memory.forbidden || memory.rolled_back {
        put_away(uid, here, memory.rolled_back, out);
        return;
    }
    let (replica, spec) = (uid.clone(), &body.value.spec);
    // Of several that run, the newest stays.
    let mut running = here.iter().filter(|c| c.state == State::Running);
    let newest_running = running.next();
    for older in running {
        out.steps.push(Step::Stop { replica: replica.clone(), id: older.id.clone() });
    }
    // One dead predecessor is kept for its logs.
    let dead = here.iter().filter(|c| matches!(c.state, State::Exited { .. }));
    let keep_dead = if newest_running.is_some() { 1 } else { 2 };
    for old in dead.skip(keep_dead) {
        out.steps.push(Step::Remove { replica: replica.clone(), id: old.id.clone() });
    }
    if let Some(replaces) = entry.replaces.as_ref().filter(|_| !memory.replacement_done) {
        if memory.ready {
            let memory = Memory { replacement_done: true, ..memory.clone() };
            out.steps.push(Step::Remember { replica: replica.clone(), memory });
        } else if let Some(started) = memory.first_started {
            let deadline = started.plus_ms(replaces.ready_within_ms);
            if now >= deadline {
                let memory = Memory { rolled_back: true, ..memory.clone() };
                out.steps.push(Step::Remember { replica, memory });
                return;
            }
            out.wake(deadline);
        }
    }
    if let Some(running) = newest_running {
        if memory.must_restart {
            out.steps.push(Step::Stop { replica, id: running.id.clone() });
        }
        return;
    }
    if let Some(made) = here.iter().find(|c| c.state == State::Created) {
        // Only the newest may be started; an older one is what a crash has left.
        if here.iter().all(|c| c.attempt <= made.attempt) {
            out.steps.push(Step::Start { replica, id: made.id.clone() });
        } else {
            out.steps.push(Step::Remove { replica, id: made.id.clone() });
        }
        return;
    }
    if let Some(last) = here.first()
        && last.attempt > memory.exit_taken
        && let State::Exited { code, .. } = last.state
    {
        let ready_for = memory.ready_since.map_or(0, |since| now.since_ms(since));
        let failures = restart::count(&spec.restart, memory.failures, ready_for);
        let mut next = Memory {
            exit_taken: last.attempt,
            attempt: memory.attempt.max(last.attempt),
            failures,
            ready: false,
            ready_since: None,
            must_restart: false,
            ..memory.clone()
        };
        match restart::next(&spec.restart, code, failures) {
            Next::Finished => next.finished = true,
            Next::After { wait_ms } => next.not_before = Some(now.plus_ms(wait_ms)),
        }
        out.steps.push(Step::TakeExit {
            replica,
            attempt: last.attempt,
            state: last.state.clone(),
            memory: next,
        });
        return;
    }
    if memory.finished {
        return;
    }
    if let Some(not_before) = memory.not_before.filter(|at| now < *at) {
        out.wake(not_before);
        return;
    }
    if !memory.bytes_here {
        out.steps.push(Step::Fetch(replica));
        return;
    }
    // The predecessor of a replacement is down before the new one is made.
    if old_here.iter().any(|c| c.state == State::Running) {
        return;
    }
    let greatest = here.iter().map(|c| c.attempt).max().unwrap_or(0);
    let attempt = 1 + greatest.max(memory.attempt).max(entry.attempt_floor);
    out.steps.push(Step::Create { replica, attempt });
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
