//! The Berth server: pumps around the decisions of `berth-server-core`.
//!
//! Nothing here decides; it feeds the core's machines with what the network, the store and the
//! clock say, and carries out the effects they answer with.
#![cfg_attr(test, allow(clippy::wildcard_enum_match_arm, reason = "tests pick one variant out"))]

pub mod api;
pub mod args;
pub mod backup;
pub mod cluster;
pub mod config;
pub mod doors;
pub mod error;
pub mod gateway;
pub mod history;
pub mod identity;
pub mod ledger;
pub mod page;
pub mod planning;
pub mod registry;
pub mod resolve;
pub mod run;
pub mod session;
pub mod store;
pub mod tasks;
