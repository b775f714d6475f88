//! The bugs that can be planted, one at a time, to see that the checker bites.
//!
//! Each stands in one of the cores (`bugs.rs` there), where the line is whose loss it plays; the cores
//! are built with them for the simulator alone.

use berth_agent_core::bugs as agent;
use berth_server_core::bugs as server;

#[derive(Debug, Clone, Copy)]
enum Side {
    Server(server::Bug),
    Agent(agent::Bug),
}

/// A bug that can be planted.
#[derive(Debug, Clone, Copy)]
pub struct Bug {
    side: Side,
    words: &'static str,
}

impl Bug {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        match self.side {
            Side::Server(bug) => format!("{bug:?}"),
            Side::Agent(bug) => format!("{bug:?}"),
        }
    }

    /// What goes wrong with it.
    #[must_use]
    pub fn words(&self) -> &'static str {
        self.words
    }
}

/// All of them, those of the server first.
#[must_use]
pub fn all() -> Vec<Bug> {
    let servers = server::ALL.iter().map(|(bug, words)| Bug { side: Side::Server(*bug), words });
    let agents = agent::ALL.iter().map(|(bug, words)| Bug { side: Side::Agent(*bug), words });
    servers.chain(agents).collect()
}

/// The bug of this name.
#[must_use]
pub fn named(name: &str) -> Option<Bug> {
    all().into_iter().find(|bug| bug.name() == name)
}

/// From now on this thread's runs have this bug, or none.
pub fn plant(bug: Option<&Bug>) {
    let side = bug.map(|bug| bug.side);
    server::plant(match side {
        Some(Side::Server(bug)) => Some(bug),
        Some(Side::Agent(_)) | None => None,
    });
    agent::plant(match side {
        Some(Side::Agent(bug)) => Some(bug),
        Some(Side::Server(_)) | None => None,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_bug_has_a_name_of_its_own_and_words() {
        let names: BTreeSet<String> = all().iter().map(Bug::name).collect();
        assert_eq!(names.len(), all().len());
        assert!(all().iter().all(|bug| !bug.words().is_empty()) && names.len() >= 30);
    }

    #[test]
    fn a_planted_bug_is_found_and_told_and_nothing_is_without_one() {
        let bug = named("GenerationNotRaised");
        let broken = |bug: Option<&Bug>| {
            plant(bug);
            let found = (0..60).find(|seed| super::super::run(*seed).broken.is_some());
            let story = found.and_then(super::super::story);
            plant(None);
            story.map(|story| story.to_string())
        };
        assert_eq!(broken(None), None);
        let story = broken(bug.as_ref());
        assert!(story.is_some_and(|story| story.contains("the script, made as short")));
    }
}
