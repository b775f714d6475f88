//! Bugs planted on purpose, one at a time, to see that the simulator finds them.
//!
//! Compiled in only with the feature `bugs`, which the simulator alone asks for: without it `bug!` is
//! `false`, and `bound!` the bound. Each bug stands where the line is whose loss it plays.

use std::cell::Cell;

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    static SMALL: Cell<bool> = const { Cell::new(false) };
}

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "their words are in ALL")]
pub enum Bug {
    OlderSetTaken,
    EpochUnasked,
    ActsBeforeDurable,
    UndurableAcknowledged,
    EmptySetForNoNews,
    HeldBodiesForgotten,
    CreatedBeforeRecorded,
    NumberUsedTwice,
    FailedWriteTaken,
    LateLookBelieved,
    AwayMeansEmpty,
    BothSideBySide,
    BytesNotFirst,
    NeverRolledBack,
    SameContainerAgain,
    BackoffForgotten,
    ReportsOutliveReplicas,
    HelloLacksReports,
    WipeForgotten,
    RefusedNeverDialsAgain,
    NeverStaysAway,
    EngineAwayUntold,
    RemovalWaitsForRetry,
    ReadinessNotTold,
    RemovedByHandForgotten,
    RollbackWakeLost,
    PlaceTakenAtOnce,
    NeverUnready,
    StopForgotten,
    OwnEndCounted,
    FinishedStartedAgain,
    HeldByNothing,
    LogsThrownAway,
    NoGrace,
    HungTakenForEnded,
    BackoffUnbounded,
    DialsSeldom,
    FollowsNoMore,
    KeptUnverified,
    DurableForgotten,
    DurableBehindAsked,
    BytesBeforeRoom,
    ChunkBegunAnew,
    WholeThrownAway,
    WrongSourceBelieved,
    OtherBytesTaken,
    UnaskedNotDropped,
    SilenceWithoutEnd,
    PauseUnbounded,
    PauseCutShort,
    BlobsUncapped,
    AskedAtOnce,
    StoppingAsked,
    AbsenceTarries,
    UnwantedGoesOn,
    ReadOnUndurable,
    RottenNotMissed,
    BrokenIsForGood,
}

/// Every bug, with what goes wrong.
pub const ALL: &[(Bug, &str)] = &[
    (Bug::OlderSetTaken, "an older set is taken"),
    (Bug::EpochUnasked, "only the generations of sets are compared"),
    (Bug::ActsBeforeDurable, "a set is acted on before it is durable"),
    (Bug::UndurableAcknowledged, "a set that the disk did not take is acknowledged"),
    (Bug::EmptySetForNoNews, "no news is taken for the empty set"),
    (Bug::HeldBodiesForgotten, "a body that was held already is missing in the next set"),
    (Bug::CreatedBeforeRecorded, "a container is made before its number is durable"),
    (Bug::NumberUsedTwice, "an attempt's number is taken from what is seen alone"),
    (Bug::FailedWriteTaken, "a failed write is taken for a durable one"),
    (Bug::LateLookBelieved, "a look that began before a step ended is believed"),
    (Bug::AwayMeansEmpty, "an engine that does not answer is taken for one without containers"),
    (Bug::BothSideBySide, "a replacement is started beside the one it replaces"),
    (Bug::BytesNotFirst, "the old one is stopped before the new one's image is here"),
    (Bug::NeverRolledBack, "a replacement that is not ready in time stays"),
    (Bug::SameContainerAgain, "a program that ended is started in the same container"),
    (Bug::BackoffForgotten, "a program that ended is started again at once"),
    (Bug::ReportsOutliveReplicas, "a replica of which nothing is left is still reported"),
    (Bug::HelloLacksReports, "a hello does not say what is there"),
    (Bug::WipeForgotten, "a host that is to be wiped keeps what it runs"),
    (Bug::RemovalWaitsForRetry, "what could not be started is removed when it is tried again"),
    (Bug::EngineAwayUntold, "an engine that is away is not told of"),
    (Bug::NeverStaysAway, "an agent that is told to stay away dials on"),
    (Bug::RefusedNeverDialsAgain, "an agent that was refused never dials again"),
    (Bug::ReadinessNotTold, "a replica's readiness is not reported when only that changes"),
    (Bug::RemovedByHandForgotten, "a container that somebody removed is never made anew"),
    (Bug::RollbackWakeLost, "a replacement that is late wakes nobody"),
    (Bug::PlaceTakenAtOnce, "a replacement that has just started has taken the place"),
    (Bug::NeverUnready, "a program that does not answer any more stays ready"),
    (
        Bug::OwnEndCounted,
        "one that was stopped for another that is not wanted any more passes for ended",
    ),
    (Bug::StopForgotten, "an agent that dies takes an end by its own hand for the program's"),
    (
        Bug::FinishedStartedAgain,
        "a program that ended well is started again whatever its policy is",
    ),
    (Bug::HeldByNothing, "what is being remembered is acted on before it is durable"),
    (Bug::LogsThrownAway, "the last attempt's container is removed with its logs"),
    (Bug::NoGrace, "a program is given no time to end"),
    (Bug::HungTakenForEnded, "a program that was stopped for its check passes for ended"),
    (Bug::BackoffUnbounded, "the wait before a start has no bound"),
    (Bug::DialsSeldom, "the wait before dialling has no bound"),
    (Bug::FollowsNoMore, "an engine's events are followed once only"),
    (Bug::KeptUnverified, "a blob is kept that was not compared with its digest"),
    (Bug::DurableForgotten, "what a transfer has brought before a crash is brought again"),
    (Bug::DurableBehindAsked, "what is durable behind a chunk that is missing is asked for again"),
    (Bug::BytesBeforeRoom, "bytes are asked for before there is room for them"),
    (Bug::ChunkBegunAnew, "a connection that broke costs the chunk under way"),
    (Bug::WholeThrownAway, "a blob of which one chunk has changed is thrown away"),
    (
        Bug::WrongSourceBelieved,
        "a blob whose source is wrong is compared again though nothing came",
    ),
    (Bug::OtherBytesTaken, "bytes behind those that were asked for are taken for them"),
    (Bug::UnaskedNotDropped, "bytes before those that were asked for are taken for them"),
    (Bug::SilenceWithoutEnd, "a connection on which nothing comes is never given up"),
    (Bug::PauseUnbounded, "the pause of a transfer has no bound"),
    (Bug::PauseCutShort, "a transfer goes on before its pause is over"),
    (Bug::AskedAtOnce, "under a cap all that is missing is asked for at once (mended)"),
    (
        Bug::AbsenceTarries,
        "what was gone before a set is told after that was acknowledged (mended)",
    ),
    (
        Bug::StoppingAsked,
        "a program that is being stopped is still checked, and told ready (mended)",
    ),
    (Bug::BlobsUncapped, "the first bytes of each blob are read whatever the cap is (mended)"),
    (Bug::UnwantedGoesOn, "a transfer that nobody wants any more goes on"),
    (Bug::ReadOnUndurable, "a chunk is read before the last one is durable"),
    (Bug::RottenNotMissed, "a chunk that has changed on the disk is not brought again"),
    (Bug::BrokenIsForGood, "a transfer whose connection broke is given up"),
];

/// From now on this one is planted in this thread's machines, and no other.
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// From now on pages, groups and what is done at once are small in this thread's machines, or not.
pub fn make_small(small: bool) {
    SMALL.set(small);
}

pub(crate) fn is_small() -> bool {
    SMALL.get()
}
