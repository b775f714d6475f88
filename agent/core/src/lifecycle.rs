//! How far a replica is, as it is told.
//!
//! Within one attempt the phase only grows, a greater attempt begins anew, and nothing of a smaller
//! one is ever told again. Readiness, progress and reason move both ways.

use berth_proto::api::{self, ReplicaPhase};
use berth_proto::convert;
use berth_proto::ids::Wall;

/// Longest message for people, in bytes, as the contract says.
const MAX_MESSAGE_BYTES: usize = 1024;

/// The newest status of one replica.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Life {
    status: api::ReplicaStatus,
}

/// Why a replica waits, or why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub &'static str);

impl Reason {
    /// It ended and is started again after a while.
    pub const BACKOFF: Self = Self("BACKOFF");
    /// It ended and is left.
    pub const FINISHED: Self = Self("FINISHED");
    /// Another replica is tried in its place.
    pub const REPLACED: Self = Self("REPLACED");
    /// It was not ready in time.
    pub const REPLACEMENT_FAILED: Self = Self("REPLACEMENT_FAILED");
    /// Its check fails.
    pub const NOT_READY: Self = Self("NOT_READY");
    /// Its bytes do not come just now.
    pub const FETCH_WAITS: Self = Self("FETCH_WAITS");
    /// Somebody removed its container.
    pub const CONTAINER_GONE: Self = Self("CONTAINER_GONE");
    /// The engine is away or hangs.
    pub const ENGINE_AWAY: Self = Self("ENGINE_AWAY");
    /// There is no bridge for its container, and none can be made.
    pub const NO_NETWORK: Self = Self("NO_NETWORK");
    /// The agent's disk does not take what must be remembered.
    pub const DISK_FAILED: Self = Self("DISK_FAILED");
}

impl Life {
    /// A replica that is wanted or was found; `attempt` is the greatest that is known. How far one of
    /// an earlier life of the agent is, only a look can tell.
    #[must_use]
    pub fn new(attempt: u32) -> Self {
        let known = if attempt == 0 { ReplicaPhase::Accepted } else { ReplicaPhase::Unspecified };
        let phase = known as i32;
        Self { status: api::ReplicaStatus { attempt, phase, ..Default::default() } }
    }

    /// As it is told.
    #[must_use]
    pub fn status(&self) -> &api::ReplicaStatus {
        &self.status
    }

    /// Goes on to a phase; one that would go back is not taken.
    fn reach(&mut self, attempt: u32, phase: ReplicaPhase) -> bool {
        let status = &mut self.status;
        if attempt < status.attempt || (attempt == status.attempt && (phase as i32) < status.phase)
        {
            return false;
        }
        if attempt > status.attempt {
            status.attempt = attempt;
            status.container_id.clear();
            status.start_time = None;
            status.ready = false;
        }
        status.phase = phase as i32;
        true
    }

    /// Its bytes are on their way.
    pub fn fetching(&mut self, progress: Option<api::Progress>) {
        self.reach(self.status.attempt, ReplicaPhase::Fetching);
        self.status.progress = progress;
        self.clear_reason();
    }

    /// Its bytes are here, or nothing is moved any more.
    pub fn fetched(&mut self) {
        self.status.progress = None;
    }

    /// Its container is being made.
    pub fn creating(&mut self, attempt: u32) {
        if self.reach(attempt, ReplicaPhase::Creating) {
            self.status.next_attempt_time = None;
            self.status.progress = None;
            self.clear_reason();
        }
    }

    /// Its container is being started.
    pub fn starting(&mut self, attempt: u32, container: &str) {
        if self.reach(attempt, ReplicaPhase::Starting) {
            container.clone_into(&mut self.status.container_id);
        }
    }

    /// Its program runs.
    pub fn running(&mut self, attempt: u32, container: &str, started: Option<Wall>, ready: bool) {
        let news = self.status.attempt < attempt || self.status.phase() != ReplicaPhase::Running;
        if self.reach(attempt, ReplicaPhase::Running) {
            if news {
                self.clear_reason();
            }
            container.clone_into(&mut self.status.container_id);
            self.status.start_time = started.map(convert::timestamp);
            self.status.next_attempt_time = None;
            self.status.progress = None;
            self.set_ready(ready);
        }
    }

    /// How far it is is known.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.status.phase() != ReplicaPhase::Unspecified
    }

    /// The last attempt is over and left nothing that says how.
    pub fn left_nothing(&mut self) {
        self.reach(self.status.attempt, ReplicaPhase::Exited);
    }

    /// Whether the end of an attempt has been told.
    #[must_use]
    pub fn tells_end_of(&self, attempt: u32) -> bool {
        self.status.attempt > attempt || self.has_ended(attempt)
    }

    /// Whether an attempt is the last one known, and has ended.
    #[must_use]
    pub fn has_ended(&self, attempt: u32) -> bool {
        self.status.attempt == attempt && self.status.phase() == ReplicaPhase::Exited
    }

    /// Its program has ended.
    pub fn exited(&mut self, exit: api::Exit, next_attempt: Option<Wall>) {
        if self.reach(exit.attempt, ReplicaPhase::Exited) {
            self.status.ready = false;
            self.status.last_exit = Some(exit);
            self.status.next_attempt_time = next_attempt.map(convert::timestamp);
        }
    }

    /// Whether an attempt's program runs, as far as is known.
    #[must_use]
    pub fn runs(&self, attempt: u32) -> bool {
        self.status.attempt == attempt && self.status.phase() == ReplicaPhase::Running
    }

    /// It can serve, or not (any more).
    pub fn set_ready(&mut self, ready: bool) {
        self.status.ready = ready;
        if ready {
            self.clear_reason();
        }
    }

    /// Why it waits.
    pub fn because(&mut self, reason: Reason, message: &str) {
        reason.0.clone_into(&mut self.status.reason);
        let mut end = message.len().min(MAX_MESSAGE_BYTES);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message[..end].clone_into(&mut self.status.message);
    }

    /// It does not wait for this any more.
    pub fn no_longer(&mut self, reason: Reason) {
        if self.status.reason == reason.0 {
            self.clear_reason();
        }
    }

    fn clear_reason(&mut self) {
        self.status.reason.clear();
        self.status.message.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(life: &Life) -> (u32, ReplicaPhase) {
        (life.status().attempt, life.status().phase())
    }

    #[test]
    fn within_an_attempt_a_phase_only_grows_and_an_old_attempt_is_never_told_again() {
        let mut life = Life::new(0);
        life.fetching(None);
        life.creating(1);
        life.running(1, "c", Some(Wall(5)), true);
        life.starting(1, "c");
        life.fetching(None);
        assert_eq!(phase(&life), (1, ReplicaPhase::Running));
        life.creating(2);
        assert_eq!(phase(&life), (2, ReplicaPhase::Creating));
        assert_eq!((life.status().ready, life.status().container_id.as_str()), (false, ""));
        life.running(1, "c", Some(Wall(5)), true);
        life.exited(api::Exit { attempt: 1, ..Default::default() }, None);
        assert_eq!(phase(&life), (2, ReplicaPhase::Creating));
    }

    #[test]
    fn readiness_moves_both_ways_and_takes_its_reason_along() {
        let mut life = Life::new(0);
        life.running(1, "c", None, true);
        life.set_ready(false);
        life.because(Reason::NOT_READY, &"é".repeat(1000));
        assert!(life.status().message.len() <= MAX_MESSAGE_BYTES);
        life.no_longer(Reason::ENGINE_AWAY);
        assert_eq!(life.status().reason, "NOT_READY");
        life.set_ready(true);
        assert_eq!((life.status().reason.as_str(), life.status().ready), ("", true));
    }
}
