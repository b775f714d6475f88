//! What goes into the machine and what comes out.

use crate::diff::{Container, Memory};
use crate::ledger::HeldSet;
use crate::lifecycle::Reason;
use berth_proto::agent::ReplicaReport;
use berth_proto::api;
use berth_proto::ids::ReplicaUid;
use berth_proto::values::HealthCheck;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A write that was asked for; a later one holds all that earlier ones held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Token(pub u64);

/// A step that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct StepId(pub u64);

/// A look at the engine that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Look(pub u64);

/// How a step was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// Image and artifact are here and verified.
    Fetched,
    /// The container was made.
    Created {
        /// The engine's id.
        id: String,
    },
    /// It was started or stopped, and this is how it is now.
    Seen(Container),
    /// It was started or stopped, and was not looked at since.
    Unseen,
    /// It is gone.
    Removed,
}

/// Why a step was not done, as far as what follows depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The engine is away or did not answer in time; whatever was asked may have been done.
    EngineAway,
    /// A host port is in use.
    PortInUse,
    /// The image is not here any more.
    BytesGone,
    /// The host's own policy forbids it.
    Forbidden,
    /// Image or artifact could not be brought, for this reason.
    Bytes(&'static str),
    /// The agent's disk.
    Disk,
    /// The engine refused.
    Engine,
}

impl Cause {
    pub(super) fn reason(self) -> Reason {
        match self {
            Self::EngineAway => Reason::ENGINE_AWAY,
            Self::PortInUse => Reason("PORT_IN_USE"),
            Self::BytesGone => Reason("IMAGE_GONE"),
            Self::Forbidden => Reason("FORBIDDEN"),
            Self::Bytes(reason) => Reason(reason),
            Self::Disk => Reason::DISK_FAILED,
            Self::Engine => Reason("START_FAILED"),
        }
    }
}

/// What a check said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It can serve.
    Healthy,
    /// It cannot, in words.
    Unhealthy(String),
    /// It could not be asked, e.g. because the engine is away: that says nothing of the program.
    NotAsked,
}

/// What goes in.
#[derive(Debug)]
pub enum Input {
    /// A set is durable: act on it.
    SetTaken(Arc<HeldSet>),
    /// All of our containers, as an answer to a look.
    Observed {
        /// Which look.
        look: Look,
        /// In any order.
        containers: Vec<Container>,
    },
    /// A look was not answered.
    EngineAway {
        /// Which look.
        look: Look,
        /// Why, in words.
        why: String,
    },
    /// Something happened to a container. A hint: the next look shows what.
    Happened {
        /// Worth an immediate look: an end, not a start of our own.
        urgent: bool,
    },
    /// The engine's events are followed.
    Followed,
    /// They are not (any more).
    FollowEnded,
    /// The bridge is there, or could not be made.
    Network(Result<(), String>),
    /// A write is durable, or failed.
    Persisted {
        /// Which.
        token: Token,
        /// Why not.
        result: Result<(), String>,
    },
    /// A step was done.
    StepDone {
        /// Which.
        step: StepId,
        /// How.
        done: Done,
    },
    /// A step was not done.
    StepFailed {
        /// Which.
        step: StepId,
        /// Why.
        cause: Cause,
        /// In words.
        words: String,
    },
    /// How far a transfer is.
    Progress {
        /// Whose.
        replica: ReplicaUid,
        /// How far.
        progress: api::Progress,
    },
    /// What a program that has ended wrote last; comes before the look or the step that shows its end.
    LastWords {
        /// Whose.
        replica: ReplicaUid,
        /// Of which attempt.
        attempt: u32,
        /// Its last line that is not empty.
        line: String,
    },
    /// A transfer does not go on just now and will by itself.
    FetchWaits {
        /// Whose.
        replica: ReplicaUid,
        /// Why, in words.
        words: String,
    },
    /// A check has ended.
    ProbeResult {
        /// Of which replica.
        replica: ReplicaUid,
        /// Of which attempt.
        attempt: u32,
        /// With what.
        outcome: Outcome,
    },
    /// Time has passed.
    Tick,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Make this durable, then [`Input::Persisted`].
    Persist {
        /// Which write.
        token: Token,
        /// All that is remembered; only its durable parts, times as the time left.
        memory: BTreeMap<ReplicaUid, Memory>,
    },
    /// Look at all of our containers, then [`Input::Observed`] or [`Input::EngineAway`].
    Observe(Look),
    /// Follow the engine's events; [`Input::FollowEnded`] when that ends or cannot begin.
    Follow,
    /// See to it that the bridge is there, then [`Input::Network`].
    EnsureNetwork,
    /// Bring image and artifact of a replica's body.
    Fetch {
        /// To be answered.
        step: StepId,
        /// Whose.
        replica: ReplicaUid,
    },
    /// Nobody wants these bytes any more; the fetch needs no answer.
    StopFetch(StepId),
    /// Make a container, without starting it.
    Create {
        /// To be answered.
        step: StepId,
        /// Whose.
        replica: ReplicaUid,
        /// Its number, which is durable.
        attempt: u32,
    },
    /// Start a container that was made.
    Start {
        /// To be answered.
        step: StepId,
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
    },
    /// Stop a container.
    Stop {
        /// To be answered.
        step: StepId,
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
        /// How long its program has.
        grace_ms: u64,
    },
    /// Remove a container that does not run.
    Remove {
        /// To be answered.
        step: StepId,
        /// Whose.
        replica: ReplicaUid,
        /// Which.
        id: String,
    },
    /// Check a running program once, within the check's timeout.
    Probe {
        /// Which replica.
        replica: ReplicaUid,
        /// Which attempt.
        attempt: u32,
        /// How.
        check: HealthCheck,
    },
    /// A replica's newest report.
    Report(Box<ReplicaReport>),
    /// Nothing is left of a replica.
    Absent(ReplicaUid),
    /// The engine answers, or does not any more.
    EngineIs {
        /// It answers.
        available: bool,
        /// Why not.
        why: String,
    },
}
