//! The Berth agent: pumps around the decisions of `berth-agent-core`.

pub mod engine;
