//! That both ends know the same: what an agent shows of its host, what the server has heard of it, and
//! what the ledger keeps.

use super::agent::Node;
use super::world::World;
use berth_proto::api;
use berth_proto::convert::replica_status_from_api;
use berth_proto::ids::{HostUid, ReplicaUid};
use berth_server_core::live::Live;
use berth_server_core::session::Registration;
use berth_server_core::view::View;
use std::collections::BTreeSet;

/// A clock's offset is known as well as this: a step that is not told, and a slow message.
const OFFSET_MS: u64 = 2_000;

/// What changes all the time is left out.
fn calm(facts: &api::HostFacts) -> api::HostFacts {
    api::HostFacts { disk_free_bytes: 0, ..facts.clone() }
}

impl World<'_> {
    /// What the ends of a host that is present know differently; settled, they do not.
    pub(super) fn disagreement(&self, node: &Node, view: &View, live: &Live) -> Option<String> {
        let agent = node.agent.as_ref()?;
        let uid = &node.uid;
        let host = view.host(uid)?;
        // Another copy of the agent has told of its own.
        let cloned = self.book.cloned.contains(uid);
        if host.record.facts.as_ref().map(calm) != Some(calm(&agent.board.facts)) && !cloned {
            return Some(format!("the facts of {uid} are others than its agent's"));
        }
        if let (Some(process), Some(known)) = (&self.server.process, live.host(uid)) {
            let ahead = node.clock.wall_ahead - process.clock.wall_ahead;
            if ahead.abs_diff(known.clock_offset_ms) > OFFSET_MS && !cloned {
                let told = known.clock_offset_ms;
                return Some(format!("the clock of {uid} is {ahead} ms ahead, known as {told}"));
            }
        }
        for replica in view.replicas_on(uid) {
            let told = agent.board.reports.get(&replica.uid).and_then(|r| r.status.as_ref());
            let known = live.replica(&replica.uid);
            let told = told.map(replica_status_from_api);
            if known.map(|known| &known.status) != told.as_ref() {
                return Some(format!("{} is known otherwise than {uid} tells of it", replica.uid));
            }
            let (Some(known), Some(told)) = (known, told) else { continue };
            if told.ready && replica.first_ready.is_none() {
                return Some(format!("{} is ready and was never ready", replica.uid));
            }
            if let Some(exit) = &told.last_exit
                && replica.exits.last().is_none_or(|last| last.attempt < exit.attempt)
                && !self.book.restored
            {
                let words = format!("the end of attempt {} of", exit.attempt);
                return Some(format!("{words} {} is not kept", replica.uid));
            }
            let memory = node.disk.memory.get(&replica.uid);
            if memory.is_some_and(|m| m.rolled_back) && !replica.failed {
                return Some(format!("{} failed and is not known to have", replica.uid));
            }
            let made = node.engine.running().find(|c| {
                c.shown.replica == replica.uid && c.shown.attempt == known.status.attempt
            });
            if let (Some(since), Some(made), Some(process)) =
                (known.ready_since, made, &self.server.process)
                && process.clock.when(since) + 2 < made.running_since
                && !self.book.by_hand.contains(&replica.uid)
                && !cloned
            {
                return Some(format!("{} is ready since before it was started", replica.uid));
            }
        }
        None
    }

    /// A hello was taken in: all that it says is so, and what it does not say is not known.
    pub(super) fn check_heard(&mut self, host: &HostUid, said: &Registration) {
        let Some(process) = &self.server.process else { return };
        let (view, live) = (process.machine.durable(), &process.live);
        // It was removed while it said so: what it runs is nobody's any more.
        if view.host(host).is_none_or(|host| host.is_removed()) {
            return;
        }
        let mut told = BTreeSet::new();
        let mut wrong = None;
        for report in &said.observed {
            let Ok(uid) = report.replica_uid.parse::<ReplicaUid>() else { continue };
            let mine = view.replica(&uid).is_some_and(|r| r.host == *host);
            let status = report.status.as_ref().map(replica_status_from_api);
            if mine && live.replica(&uid).map(|l| &l.status) != status.as_ref() {
                wrong = Some(format!("{uid} is known otherwise than the hello of {host} tells"));
            }
            told.insert(uid);
        }
        // What an earlier join had may be gone with its disk.
        let before = self.book.instances.insert(host.clone(), said.instance.clone());
        let whole = said.engine_observed || before.is_some_and(|before| before != said.instance);
        for replica in view.replicas_on(host).filter(|_| whole) {
            if !told.contains(&replica.uid) && live.replica(&replica.uid).is_some() {
                wrong = Some(format!("{} is known and {host} has nothing of it", replica.uid));
            }
        }
        if let Some(wrong) = wrong {
            self.broke(wrong);
        }
    }
}
