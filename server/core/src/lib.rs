//! What the server decides.
//!
//! Everything here is a function of its arguments or a step machine: a view of the cluster, a policy,
//! the time and new ids in, plans and effects out. It does no I/O, reads no clock and draws no random
//! number, so that every decision can be replayed.
#![cfg_attr(test, allow(clippy::wildcard_enum_match_arm, reason = "tests pick one variant out"))]

/// Whether a bug is planted here; never, but in the simulator.
#[cfg(feature = "bugs")]
macro_rules! bug {
    ($name:ident) => {
        crate::bugs::is_planted(crate::bugs::Bug::$name)
    };
}
#[cfg(not(feature = "bugs"))]
macro_rules! bug {
    ($name:ident) => {
        false
    };
}

/// A bound, or the small one in its place that the simulator asks for now and then, to get beyond it.
#[cfg(feature = "bugs")]
macro_rules! bound {
    ($bound:expr, $small:expr) => {
        if crate::bugs::is_small() { $small } else { $bound }
    };
}
#[cfg(not(feature = "bugs"))]
macro_rules! bound {
    ($bound:expr, $small:expr) => {
        $bound
    };
}

#[cfg(feature = "bugs")]
pub mod bugs;

pub mod audit;
pub mod batching;
pub mod capacity;
pub mod change;
pub mod decide;
pub mod desk;
pub mod dispatch;
pub mod farewell;
pub mod intake;
pub mod keeping;
pub mod live;
pub mod memory;
#[cfg(test)]
mod miniature;
pub mod objects;
pub mod orphans;
pub mod placement;
pub mod planner;
pub mod queue;
pub mod release;
pub mod restore;
pub mod round;
pub mod session;
pub mod status;
pub mod takeover;
pub mod versions;
pub mod view;
