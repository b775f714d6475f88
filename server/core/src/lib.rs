//! What the server decides.
//!
//! Everything here is a function of its arguments or a step machine: a view of the cluster, a policy,
//! the time and new ids in, plans and effects out. It does no I/O, reads no clock and draws no random
//! number, so that every decision can be replayed.
#![cfg_attr(test, allow(clippy::wildcard_enum_match_arm, reason = "tests pick one variant out"))]

pub mod batching;
pub mod change;
pub mod decide;
pub mod dispatch;
pub mod live;
pub mod objects;
pub mod placement;
pub mod planner;
pub mod release;
pub mod session;
pub mod status;
pub mod takeover;
pub mod view;
