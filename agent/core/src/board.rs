//! What an agent knows of its host, as it is told to a server.
//!
//! What is worked off, the newest report of each replica, the host's facts, and whether the engine was
//! looked at. A session begins with all of it ([`Board::hello`]); what changes meanwhile is news for
//! the session that stands. Nothing here waits or writes.

use crate::ledger::{Wanted, set_id};
use berth_proto::agent::{Hello, ReplicaReport};
use berth_proto::api;
use berth_proto::convert::timestamp;
use berth_proto::ids::{ReplicaUid, Wall};
use std::collections::BTreeMap;
use std::sync::Arc;

/// News for the session.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// A replica's newest report.
    Report(Box<ReplicaReport>),
    /// Nothing is left of a replica.
    Absent(ReplicaUid),
    /// The host's facts.
    Facts(Box<api::HostFacts>),
}

/// Who says hello.
#[derive(Debug, Clone, Default)]
pub struct Who {
    /// The host.
    pub host_uid: String,
    /// The join.
    pub instance: String,
    /// The machine's boot.
    pub boot_id: String,
    /// Random number of this boot of this copy.
    pub boot_nonce: String,
    /// Number of this start of the agent.
    pub agent_start: u64,
    /// Its version.
    pub agent_version: String,
    /// Features it knows.
    pub features: Vec<String>,
    /// Newest roots and endpoints it holds.
    pub trust_version: u64,
}

/// What is known.
#[derive(Debug, Clone, Default)]
pub struct Board {
    /// What is worked off.
    pub wanted: Wanted,
    /// The newest report of each replica.
    pub reports: BTreeMap<ReplicaUid, ReplicaReport>,
    /// The engine was looked at in this start of the agent.
    pub engine_observed: bool,
    /// The host's facts.
    pub facts: api::HostFacts,
    /// The host was removed, and nothing is to stay.
    wiping: bool,
}

/// A set of nothing, which is not the same as not knowing what is wanted.
#[must_use]
pub fn nothing() -> Wanted {
    Wanted::Set(Arc::default())
}

impl Board {
    /// At the start of an agent that holds this set; `wiping`: the host was removed and nothing is to
    /// stay.
    #[must_use]
    pub fn new(wanted: Wanted, wiping: bool, facts: api::HostFacts) -> Self {
        let wanted = if wiping && !bug!(WipeForgotten) { nothing() } else { wanted };
        Self { wanted, wiping, facts, ..Self::default() }
    }

    /// A set is durable and is worked off from now on; `false`: nothing is any more.
    pub fn act_on(&mut self, wanted: Wanted) -> bool {
        if !self.wiping {
            self.wanted = wanted;
        }
        !self.wiping
    }

    /// The host was removed, and nothing is to stay: whatever comes later.
    pub fn wipe(&mut self) {
        if !bug!(WipeForgotten) {
            self.wanted = nothing();
        }
        self.wiping = true;
    }

    /// A replica's newest report.
    pub fn report(&mut self, report: ReplicaReport) -> Option<News> {
        let uid = report.replica_uid.parse::<ReplicaUid>().ok()?;
        if self.reports.get(&uid) == Some(&report) {
            return None;
        }
        self.reports.insert(uid, report.clone());
        Some(News::Report(Box::new(report)))
    }

    /// Nothing is left of a replica.
    pub fn absent(&mut self, uid: &ReplicaUid) -> News {
        if !bug!(ReportsOutliveReplicas) {
            self.reports.remove(uid);
        }
        News::Absent(uid.clone())
    }

    /// The engine answers, or does not any more.
    pub fn engine_is(&mut self, available: bool) -> Option<News> {
        if self.facts.engine_available == available {
            return None;
        }
        self.facts.engine_available = available;
        Some(News::Facts(Box::new(self.facts.clone())))
    }

    /// The host's facts were gathered, which takes a while: whether the engine answers was told
    /// meanwhile by whoever looks at it all the time.
    pub fn gathered(&mut self, facts: api::HostFacts) -> &api::HostFacts {
        let engine_available = self.facts.engine_available;
        self.facts = api::HostFacts { engine_available, ..facts };
        &self.facts
    }

    /// The engine has answered a look, and what it showed was reported.
    pub fn looked(&mut self) {
        self.engine_observed = true;
    }

    /// What a session begins with.
    #[must_use]
    pub fn hello(&self, who: &Who, now: Wall) -> Hello {
        let set = self.wanted.set();
        Hello {
            host_uid: who.host_uid.clone(),
            instance: who.instance.clone(),
            boot_id: who.boot_id.clone(),
            agent_start: who.agent_start,
            agent_version: who.agent_version.clone(),
            features: who.features.clone(),
            held: set.map(|s| set_id(s.number)),
            held_digest: set.map(|s| s.digest.clone()).unwrap_or_default(),
            bodies: set
                .map(|s| s.bodies.keys().map(ToString::to_string).collect())
                .unwrap_or_default(),
            observed: self.reports.values().filter(|_| !bug!(HelloLacksReports)).cloned().collect(),
            observed_pages: 0,
            facts: Some(self.facts.clone()),
            time: Some(timestamp(now)),
            boot_nonce: who.boot_nonce.clone(),
            trust_version: who.trust_version,
            engine_observed: self.engine_observed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(slot: u32) -> ReplicaReport {
        ReplicaReport { replica_uid: "r".into(), slot, ..ReplicaReport::default() }
    }

    #[test]
    fn only_what_has_changed_is_news_and_a_hello_says_all_of_it() {
        let mut board = Board::default();
        assert!(board.report(report(1)).is_some() && board.report(report(1)).is_none());
        assert!(board.report(report(2)).is_some());
        assert!(board.engine_is(true).is_some() && board.engine_is(true).is_none());
        let hello = board.hello(&Who::default(), Wall(0));
        assert_eq!(hello.observed, [report(2)]);
        assert!(hello.held.is_none() && !hello.engine_observed);
        board.absent(&"r".parse().unwrap());
        board.looked();
        let hello = board.hello(&Who::default(), Wall(0));
        assert!(hello.observed.is_empty() && hello.engine_observed);
        // Gathered before the engine was found away, told after it.
        let gathered =
            api::HostFacts { arch: "riscv64".into(), engine_available: true, ..Default::default() };
        board.engine_is(false);
        let told = board.gathered(gathered);
        assert_eq!((told.arch.as_str(), told.engine_available), ("riscv64", false));
    }

    #[test]
    fn a_host_that_is_wiped_works_no_set_off_any_more() {
        let mut board = Board::default();
        assert!(board.wanted.set().is_none(), "no news is not the empty set");
        board.wipe();
        assert!(!board.act_on(Wanted::NotYetKnown));
        assert!(board.wanted.set().is_some_and(|set| set.entries.is_empty()));
        assert!(Board::new(Wanted::NotYetKnown, true, Default::default()).wanted.set().is_some());
    }
}
