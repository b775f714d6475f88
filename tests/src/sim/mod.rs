//! Berth in one process, without real time.
//!
//! The step machines of both cores as they are shipped, over the memory store and an engine in memory,
//! under a virtual clock and a seeded schedule of faults. A run is a function of its seed: the fleet,
//! what people do and what goes wrong are drawn before it (`script`), every delay from it. After each
//! event the invariants are checked (`check`), and after the faults end everything wanted must run
//! within a bound, nothing else, and the books balance.
//!
//! What is here is only the world around the machines: links, disks, engines, programs and people. What
//! decides is in the cores; a pump of the programs that decided something would escape the simulator.

#![expect(clippy::wildcard_enum_match_arm, reason = "the world looks at what it knows of")]

mod agent;
mod agree;
mod asked;
mod check;
mod clock;
mod engine;
mod events;
mod faults;
mod fit;
mod floors;
#[cfg(test)]
mod golden;
mod ledger;
mod net;
mod operator;
mod owners;
mod planning;
mod remembered;
mod rollouts;
mod script;
mod server;
mod settle;
mod shrink;
mod specs;
mod world;

pub mod bugs;

pub use shrink::Story;

use script::Script;
use world::World;

/// How one run went.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Events handled.
    pub steps: u64,
    /// What did not hold.
    pub broken: Option<String>,
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64) -> Run {
    play(&Script::of(seed))
}

fn play(script: &Script) -> Run {
    let mut world = World::new(script);
    world.run();
    Run { steps: world.steps, broken: world.broken.take() }
}

/// The kind of a finding: its words without names and numbers.
#[must_use]
pub fn kind(broken: &str) -> String {
    shrink::kind(broken)
}

/// The shortest story of a seed that breaks something; `None`: it breaks nothing.
#[must_use]
pub fn story(seed: u64) -> Option<Story> {
    shrink::story(&Script::of(seed))
}
