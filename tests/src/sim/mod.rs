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
mod bring;
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
mod spool;
mod watched;
mod world;

pub mod bugs;

pub use shrink::Story;

use script::Script;
use std::cell::Cell;
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
    let broken = catch(|| world.run()).err().or_else(|| world.broken.take());
    Run { steps: world.steps, broken }
}

thread_local! {
    static PANICKED: Cell<Option<String>> = const { Cell::new(None) };
}

/// Keeps the words of panics, with their places, for the findings they are; nothing is printed.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|panic| PANICKED.set(Some(panic.to_string()))));
}

/// Code that panics has broken something, as much as code that does wrong.
fn catch<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|panic| {
        let kept = PANICKED.take().map(|words| words.replace('\n', " "));
        let words = kept.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
        let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
        format!("it panicked: {}", words.unwrap_or_else(|| "without words".to_owned()))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_panics_is_a_finding_of_its_own() {
        assert_eq!(catch(|| 3), Ok(3));
        let broken = |words: &str| Err(format!("it panicked: {words}"));
        assert_eq!(catch(|| panic!("no host {}", 1)), broken("no host 1"));
        assert_eq!(catch(|| panic!("no host")), broken("no host"));
    }

    #[test]
    fn two_runs_of_a_seed_are_the_same_in_every_step() {
        let told = |seed: u64| {
            let script = Script::of(seed);
            let mut world = World::new(&script);
            world.listen();
            world.run();
            (world.steps, world.told.take(), world.broken.take())
        };
        for seed in 0..200 {
            let first = told(seed);
            assert!(first.1.as_ref().is_some_and(|lines| !lines.is_empty()));
            assert_eq!(first, told(seed), "seed {seed}");
        }
    }
}
