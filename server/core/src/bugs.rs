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
    SupersededStatusBelieved,
    SupersededHelloBelieved,
    StatusAcknowledgedUnkept,
    WriteAcknowledgedUndurable,
    SubmittedTakenForKept,
    FullDiskForgotten,
    PreconditionsUnasked,
    GenerationNotRaised,
    CapacityNotGivenBack,
    CapacityGivenBackEarly,
    RoomUnasked,
    CordonUnasked,
    LabelsUnasked,
    FloorIgnored,
    SurgeIgnored,
    OldHealthCounted,
    RollbackForgotten,
    DeadlineStandsStill,
    LostAtOnce,
    DeletionEndsEarly,
    ReplacedChain,
    SuccessorBeside,
    StoppedStaysInSet,
    EpochKept,
    RestoreDoesNotObserve,
    OrphansForgotten,
    OrphansUndecided,
    OrphanHoldsNothing,
    OthersPortsUnasked,
    NetworkUnasked,
    ClockToldOnce,
    QuarantinedDialsOn,
    BusyIsForGood,
    GoneStayInLedger,
    NeverThereStays,
    CloneNumbersKept,
    BodiesTakenForHeld,
    SetsInterleaved,
    HostWakeLost,
    RoomWakeLost,
    ReadinessNotStored,
    TwoBootsWelcome,
    WantedForgotten,
    SurplusUnasked,
    SetRetryForgotten,
    EarlierTakenForKept,
    LastPageLost,
    CompleteInPart,
    DeadlineRunsUnheard,
    OldFailureCounted,
    BesideDeferred,
    EngineUnasked,
    LostNeverReplaced,
    PauseGoesBack,
    WipedUnasked,
    TrustNeverTold,
    NewerTrustNeverTold,
    NeverFewer,
    UndoneToAny,
    NewModelKept,
    AllChangeAtOnce,
    AnyArchitecture,
    EndingNotCounted,
    SetAtOnceAgain,
    PausedGoesOn,
    HostNotHeld,
    UnseenIsGone,
    StartUpForgotten,
    EpochAgain,
    AdoptedBeyond,
    NeverGivenUp,
}

/// Every bug, with what goes wrong.
pub const ALL: &[(Bug, &str)] = &[
    (
        Bug::SupersededStatusBelieved,
        "a status of a session that another has taken over from is believed",
    ),
    (
        Bug::SupersededHelloBelieved,
        "a hello that took long to keep counts though a newer session has said hello meanwhile",
    ),
    (Bug::StatusAcknowledgedUnkept, "statuses are acknowledged before the ledger keeps them"),
    (Bug::WriteAcknowledgedUndurable, "a write is acknowledged before it is durable"),
    (
        Bug::SubmittedTakenForKept,
        "what is submitted and not yet durable is taken for kept (mended)",
    ),
    (Bug::FullDiskForgotten, "what a full disk refused stays in the view that is planned over"),
    (Bug::PreconditionsUnasked, "a proposal is taken whatever has changed since it was made"),
    (Bug::GenerationNotRaised, "a replica that is to stop does not raise its host's generation"),
    (Bug::CapacityNotGivenBack, "a replica that is gone goes on taking its host's memory"),
    (
        Bug::CapacityGivenBackEarly,
        "a replica that is being stopped takes nothing of its host any more",
    ),
    (Bug::RoomUnasked, "a host's room is not asked before a replica is placed there"),
    (Bug::CordonUnasked, "replicas are placed on cordoned hosts"),
    (Bug::LabelsUnasked, "the labels that a deployment requires are not asked"),
    (Bug::FloorIgnored, "a rollout stops what is old whatever its floor is"),
    (Bug::SurgeIgnored, "a rollout starts as many as it likes at once"),
    (Bug::OldHealthCounted, "a rollout is complete when the old release is healthy"),
    (Bug::RollbackForgotten, "a rollout that fails is paused where it should roll back"),
    (Bug::DeadlineStandsStill, "the time a rollout has left never passes"),
    (Bug::LostAtOnce, "a host that is away is lost at once"),
    (Bug::DeletionEndsEarly, "a deployment's deletion ends while its hosts still stop it"),
    (Bug::ReplacedChain, "a replica that changes places is itself replaced (mended)"),
    (Bug::SuccessorBeside, "a set does not say that one replica takes another's place"),
    (Bug::StoppedStaysInSet, "a replica that is to stop stays in its host's set"),
    (Bug::EpochKept, "a restore keeps the epoch"),
    (Bug::RestoreDoesNotObserve, "a restored server sends sets before it knows what runs"),
    (Bug::OrphansForgotten, "what a host runs and a restored ledger does not know is forgotten"),
    (Bug::QuarantinedDialsOn, "a quarantined agent is told to dial on"),
    (Bug::BusyIsForGood, "an agent that came while the ledger was busy is told to stay away"),
    (Bug::OthersPortsUnasked, "a port that another program has is taken for free"),
    (Bug::NetworkUnasked, "what is checked by network is placed where it cannot be checked"),
    (Bug::ClockToldOnce, "the offset of a host's clock is told once only"),
    (Bug::OrphanHoldsNothing, "the place of an orphan that nobody has decided about is filled"),
    (Bug::OrphansUndecided, "a host with orphans gets sets before anybody has decided about them"),
    (Bug::GoneStayInLedger, "what a complete hello lacks stays in the ledger"),
    (Bug::NeverThereStays, "a replica that was given up before it got to its host stays (mended)"),
    (Bug::CloneNumbersKept, "the numbers of another copy of an agent outlive it (mended)"),
    (Bug::BodiesTakenForHeld, "bodies of a set that was not durable are taken for held"),
    (Bug::SetsInterleaved, "a newer set is sent before the last one is answered"),
    (Bug::HostWakeLost, "a host that comes back wakes nobody"),
    (Bug::RoomWakeLost, "room that is given back wakes nobody"),
    (Bug::ReadinessNotStored, "the first readiness of a replica is not written to disk"),
    (Bug::TwoBootsWelcome, "two boots of one identity take the session from each other for ever"),
    (Bug::WantedForgotten, "a wanted replica is forgotten when its host has nothing of it"),
    (Bug::SurplusUnasked, "of two in one slot one is stopped whatever the floor is (mended)"),
    (Bug::SetRetryForgotten, "nobody wakes a session that has a refused set to send again"),
    (Bug::EarlierTakenForKept, "a status is acknowledged with a later one that was kept first"),
    (Bug::LastPageLost, "a set of several pages is sent without its last one"),
    (Bug::CompleteInPart, "a slot that is healthy is done whatever old is left in it"),
    (Bug::DeadlineRunsUnheard, "time counts and rollouts end while hosts are not heard of yet"),
    (Bug::OldFailureCounted, "a rollout fails because one of an older release has"),
    (Bug::BesideDeferred, "a slot whose replica is only out of reach gets another one"),
    (Bug::EngineUnasked, "replicas are placed on hosts whose engine does not answer"),
    (Bug::LostNeverReplaced, "a replica whose host stays away is never replaced"),
    (Bug::PauseGoesBack, "a failed rollout goes back though it is to pause"),
    (Bug::WipedUnasked, "a host that is removed is wiped whatever was asked"),
    (Bug::TrustNeverTold, "newer roots and addresses never reach an agent"),
    (
        Bug::NewerTrustNeverTold,
        "roots that change while a session stands are told to the next one only",
    ),
    (Bug::NeverFewer, "an apply with a smaller number is taken and not done"),
    (Bug::UndoneToAny, "an undo goes back to a release that failed"),
    (Bug::NewModelKept, "a new version of a model with the same runtime makes no release"),
    (Bug::AllChangeAtOnce, "all replicas change places at once"),
    (Bug::AnyArchitecture, "a replica is placed where its image does not run"),
    (Bug::EndingNotCounted, "what is being stopped does not count for the surge"),
    (Bug::SetAtOnceAgain, "a set that a full disk refused is sent again at once"),
    (Bug::PausedGoesOn, "a rollout that is paused goes on stopping what is old"),
    (Bug::HostNotHeld, "a replica is placed on a host that was cordoned meanwhile"),
    (Bug::UnseenIsGone, "what an agent has not looked for yet is taken for gone"),
    (Bug::StartUpForgotten, "a replacement has no time to start up"),
    (Bug::EpochAgain, "restored twice from one backup, a ledger takes an epoch again"),
    (Bug::AdoptedBeyond, "an orphan is adopted into a slot beyond the number"),
    (Bug::NeverGivenUp, "a host that never comes back is waited for for ever"),
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
