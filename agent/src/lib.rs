//! The Berth agent: pumps around the decisions of `berth-agent-core`.
//!
//! Nothing here decides what shall run; it feeds the core with what the engine, the disk, the clock
//! and the server say, and carries out the steps it answers with. It works the same without a server.
#![cfg_attr(test, allow(clippy::wildcard_enum_match_arm, reason = "tests pick one variant out"))]

pub mod args;
pub mod busy;
pub mod claim;
pub mod clock;
pub mod config;
pub mod containers;
#[cfg(test)]
mod disk_tests;
pub mod engine;
pub mod facts;
pub mod fetch;
pub mod host_service;
pub mod join;
pub mod link;
pub mod local;
pub mod probes;
pub mod reach;
pub mod reconciler;
pub mod refusal;
pub mod retire;
pub mod run;
pub mod session;
pub mod state;
pub mod store;

/// An error and its causes, each once: `a: b: c`.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
