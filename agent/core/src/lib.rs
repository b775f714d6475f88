//! What the agent decides.
//!
//! Everything here is a function of its arguments or a step machine: what is wanted, what the engine
//! shows, what is remembered and the time in, steps and messages out. It does no I/O, reads no clock
//! and draws no random number. It works the same whether or not a server is there.
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

pub mod board;
pub mod diff;
pub mod gc;
pub mod ledger;
pub mod lifecycle;
pub mod policy;
pub mod probe;
pub mod reconcile;
pub mod report;
pub mod restart;
pub mod session;
pub mod transfer;
