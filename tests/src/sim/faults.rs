//! What goes wrong.

use super::agent::{Disk, Node};
use super::bring::Registry;
use super::clock::Clock;
use super::engine::Engine;
use super::events::{Event, NodeId};
use super::net::Net;
use super::script::{Action, Moment};
use super::specs;
use super::world::World;
use berth_proto::ids::Revision;
use berth_server_core::memory::Memory;
use berth_server_core::restore;
use berth_server_core::view::View;

/// An engine that does not answer is told of by then: looks are half a minute apart, one that hangs takes
/// 15 s, and an agent's clock may run slow.
pub(super) const AWAY_TOLD_MS: u64 = 90_000;

impl World<'_> {
    /// An entry of the script.
    pub(super) fn happens(&mut self, action: &Action) {
        self.note(|_| format!("* {action}"));
        let now = self.now;
        match action {
            Action::Apply { .. }
            | Action::Scale { .. }
            | Action::Restart { .. }
            | Action::Undo { .. }
            | Action::Delete { .. }
            | Action::Cordon { .. }
            | Action::Drain { .. }
            | Action::Relabel { .. }
            | Action::Remove { .. }
            | Action::Rejoin { .. }
            | Action::ReleaseQuarantine { .. }
            | Action::ResolveOrphans { .. } => self.ask(action),
            Action::Backup => {
                let acknowledged = self.book.acknowledged;
                self.backup = Some((self.server.store.clone(), acknowledged));
                // Whoever changes the root backs up.
                self.turn_root();
            }
            Action::Restore { down_ms } => self.restore(*down_ms),
            Action::KillServer { when: Moment::Now, down_ms } => self.kill_server(*down_ms),
            Action::KillServer { when, down_ms } => self.server.arm = Some((*when, *down_ms)),
            Action::ServerDiskFull { for_ms } => self.server.full_until = now + for_ms,
            Action::ServerDiskSlow { for_ms } => self.server.slow_until = now + for_ms,
            Action::ServerClock { ahead_ms } => {
                self.server.wall_ahead = *ahead_ms;
                if let Some(process) = &mut self.server.process {
                    process.clock.wall_ahead = *ahead_ms;
                }
            }
            Action::KillAgent { host, when, down_ms } => {
                let node = self.machine(*host);
                if *when == Moment::Now {
                    self.kill_agent(node, *down_ms);
                } else {
                    self.nodes[node].arm = Some((*when, *down_ms));
                }
            }
            Action::Reboot { host, down_ms } => {
                let node = self.machine(*host);
                // Whoever loses power starts with what was installed meanwhile.
                self.nodes[node].facts.kernel = format!("6.{}", self.nodes[node].boots);
                let ids: Vec<u32> = self.nodes[node].engine.containers.keys().copied().collect();
                self.kill_agent(node, *down_ms);
                for id in ids {
                    self.end_program(node, id, 137);
                }
            }
            Action::CloneDisk { host } => self.clone_disk(self.machine(*host)),
            Action::EndClone { host } => self.end_clones(*host),
            Action::Cut { host } => self.cut(self.machine(*host)),
            Action::Partition { host, up, down, for_ms } => {
                let node = self.machine(*host);
                let net = &mut self.nodes[node].net;
                if *up {
                    net.up_blocked_until = now + for_ms;
                }
                if *down {
                    net.down_blocked_until = now + for_ms;
                }
            }
            Action::SlowLink { host, by_ms, for_ms } => {
                let node = self.machine(*host);
                let net = &mut self.nodes[node].net;
                (net.slow_by_ms, net.slow_until) = (*by_ms, now + for_ms);
            }
            Action::Doubles { host, messages } => {
                let node = self.machine(*host);
                self.nodes[node].net.doubles = *messages;
            }
            Action::EngineAway { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                self.goes_away(node, *for_ms);
                self.nodes[node].engine.away_until = now + for_ms;
                self.follow_ends(node);
            }
            Action::EngineSlow { host, by_ms, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                let engine = &mut self.nodes[node].engine;
                (engine.slow_by_ms, engine.slow_until) = (*by_ms, now + for_ms);
            }
            Action::EngineFails { host, calls } => {
                let node = self.machine(*host);
                self.nodes[node].engine.fails = *calls;
            }
            Action::EngineLosesAnswers { host, calls } => {
                let node = self.machine(*host);
                self.nodes[node].engine.loses = *calls;
            }
            Action::EngineLate { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                self.nodes[node].engine.late_until = now + for_ms;
            }
            Action::EngineHangs { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                self.goes_away(node, *for_ms);
                self.nodes[node].engine.hangs_until = now + for_ms;
            }
            Action::EngineRestarts { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                self.goes_away(node, *for_ms);
                let ids: Vec<u32> = self.nodes[node].engine.containers.keys().copied().collect();
                self.nodes[node].engine.away_until = now + for_ms;
                self.follow_ends(node);
                for id in ids {
                    self.end_program(node, id, 137);
                }
            }
            Action::ContainerRenamed { host, which } => {
                let node = self.machine(*host);
                let id = self.nth(node, *which).map(|(id, _)| id);
                let containers = &mut self.nodes[node].engine.containers;
                if let Some(made) = id.and_then(|id| containers.get_mut(&id)) {
                    made.renamed = true;
                }
            }
            Action::PortTaken { host, for_ms } => {
                let node = self.machine(*host);
                self.port_taken(node, *for_ms);
            }
            Action::NetworkUnreached { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].facts.container_network_reachable = false;
                self.gather(node);
                self.events.push(now + for_ms, Event::FactsChange { node });
            }
            Action::Upgrade { host, down_ms } => {
                let node = self.machine(*host);
                let held = &mut self.nodes[node];
                held.machine.old = false;
                held.facts.features = specs::facts(&held.machine).features;
                self.kill_agent(node, *down_ms);
            }
            Action::HostRate { host, per_mille } => {
                let node = self.machine(*host);
                let held = &mut self.nodes[node];
                held.machine.per_mille = *per_mille;
                held.clock = held.clock.at_rate(now, *per_mille);
            }
            Action::ContainerEnds { host, which, code } => {
                let node = self.machine(*host);
                if let Some((id, true)) = self.nth(node, *which) {
                    self.end_program(node, id, *code);
                }
            }
            Action::ContainerRemoved { host, which } => {
                let node = self.machine(*host);
                if let Some((id, _)) = self.nth(node, *which) {
                    let made = self.nodes[node].engine.containers.remove(&id);
                    self.book.removed.extend(made.map(|made| made.shown.replica));
                    self.happened(node, true);
                }
            }
            Action::ContainerStartedByHand { host, which } => {
                let node = self.machine(*host);
                self.start_by_hand(node, *which);
            }
            Action::Sick { host, which, for_ms } => {
                let node = self.machine(*host);
                self.falls_sick(node, *which, *for_ms);
            }
            Action::FollowEnds { host } => self.follow_ends(self.machine(*host)),
            Action::RegistryAway { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.registry_away_until = now + for_ms;
            }
            Action::RegistryTroubled { host, what, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].registry.troubled(*what, now + for_ms);
            }
            Action::ChunkRots { host, which } => {
                let node = self.machine(*host);
                self.nodes[node].spool.rot(*which);
            }
            Action::ImagesPruned { host } => {
                let node = self.machine(*host);
                self.nodes[node].engine.images.clear();
                self.book.pruned = true;
            }
            Action::AgentDiskFull { host, for_ms } => {
                let node = self.machine(*host);
                self.nodes[node].engine.troubled(now + for_ms);
                self.nodes[node].disk_full_until = now + for_ms;
            }
            Action::HostClock { host, ahead_ms } => {
                let node = self.machine(*host);
                self.nodes[node].wall_ahead = *ahead_ms;
                self.nodes[node].clock.wall_ahead = *ahead_ms;
            }
        }
    }

    /// An engine is about to be away.
    fn goes_away(&mut self, node: NodeId, for_ms: u64) {
        let now = self.now;
        let engine = &mut self.nodes[node].engine;
        if engine.is_up(now) {
            engine.down_since = now;
        }
        if for_ms > AWAY_TOLD_MS {
            let life = self.nodes[node].life;
            self.events.push(self.now + AWAY_TOLD_MS, Event::CheckAway { node, life });
        }
    }

    /// Another program takes the port that programs here publish, unless one of them has it.
    fn port_taken(&mut self, node: NodeId, for_ms: u64) {
        let until = self.now + for_ms;
        let held = &mut self.nodes[node];
        if held.engine.publishes() {
            return;
        }
        held.engine.port_taken_until = until;
        held.facts.used_ports = vec![specs::HOST_PORT];
        self.gather(node);
        self.events.push(until, Event::FactsChange { node });
    }

    /// What was so for a while is over.
    pub(super) fn facts_change(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        if self.now >= held.engine.port_taken_until {
            held.facts.used_ports.clear();
        }
        held.facts.container_network_reachable = true;
        self.gather(node);
    }

    fn follow_ends(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        let Some(life) = held.engine.follower.take() else { return };
        let input = Box::new(berth_agent_core::reconcile::Input::FollowEnded);
        let at = self.now.max(held.engine.followed_at) + 1;
        self.events.push(at, Event::Tell { node, life, input });
    }

    /// The server goes back to its newest backup.
    fn restore(&mut self, down_ms: u64) {
        // Nobody does it again in a moment, nor by a clock that is behind the last time's: restores of one
        // backup are told apart by the clock's seconds alone.
        let clock = Clock::new(0, 1000, self.server.wall_ahead).wall(self.now);
        if self.book.restored && clock.0 / 1000 <= self.book.epoch.cast_signed() {
            return;
        }
        let Some((mut store, acknowledged)) = self.backup.clone() else { return };
        self.kill_server(down_ms);
        // One that was down already comes back later, with what is on the disk then.
        let Some((mut batches, revision)) = self.turned(&store) else { return };
        store.full = false;
        if let Err(why) = store.commit(&batches) {
            return self.broke(format!("what a restore writes is not taken: {why:?}"));
        }
        batches.clear();
        self.server.store = store;
        self.book.acknowledged = acknowledged.min(revision);
        self.book.durable = None;
        (self.book.restored, self.book.turned) = (true, true);
        self.book.rollouts.forget();
        // One backup may be restored twice.
        if self.server.rng.u8(0..3) != 0 {
            self.backup = None;
        }
    }

    fn turned(
        &mut self,
        store: &Memory,
    ) -> Option<(Vec<berth_server_core::batching::Batch>, Revision)> {
        let entries = store.load(b"").map(|e| (e.key, e.revision, e.value));
        let mut view = match View::load(entries) {
            Ok(view) => view,
            Err(error) => {
                self.broke(format!("a backup cannot be read: {error}"));
                return None;
            }
        };
        view.revision = store.revision();
        let wall = Clock::new(0, 1000, self.server.wall_ahead).wall(self.now);
        let turned = restore::turned_back(&view, wall, wall);
        Some((turned.batches, store.revision()))
    }

    /// A new machine begins with a copy of this one's disk.
    fn clone_disk(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        if held.disk.removed || self.book.cloned.contains(&held.uid) {
            return;
        }
        let seed = held.rng.u64(..);
        let copy = Node {
            host: held.host,
            uid: held.uid.clone(),
            machine: held.machine,
            facts: held.facts.clone(),
            disk: Disk::clone(&held.disk),
            disk_full_until: 0,
            spool: held.spool.clone(),
            registry: Registry::default(),
            agent: None,
            life: 0,
            engine: Engine::default(),
            net: Net::default(),
            clock: held.clock,
            wall_ahead: held.wall_ahead,
            rng: fastrand::Rng::with_seed(seed),
            bring_rng: fastrand::Rng::with_seed(seed ^ 1),
            arm: None,
            is_clone: true,
            gone: false,
            boots: 0,
        };
        let uid = held.uid.clone();
        self.book.cloned.insert(uid);
        self.nodes.push(copy);
        let node = self.nodes.len() - 1;
        self.events.push(self.now + 1, Event::AgentStarts { node });
    }

    pub(super) fn end_clones(&mut self, host: u8) {
        for node in 0..self.nodes.len() {
            if self.nodes[node].host == host && self.nodes[node].is_clone && !self.nodes[node].gone
            {
                self.kill_agent(node, 1);
                let held = &mut self.nodes[node];
                held.gone = true;
                held.engine.containers.clear();
            }
        }
    }

    /// Nothing goes wrong from now on, and what did is mended.
    pub(super) fn faults_end(&mut self) {
        let now = self.now;
        for host in 0..self.script.machines.len() {
            let host = u8::try_from(host).unwrap_or(u8::MAX);
            self.end_clones(host);
        }
        self.server.arm = None;
        // What it refused just now is planned again in a moment.
        self.server.full_until = self.server.full_until.min(now);
        self.server.slow_until = 0;
        if !self.server.is_up() {
            self.events.push(now + 1, Event::ServerStarts);
        }
        for node in 0..self.nodes.len() {
            let held = &mut self.nodes[node];
            if held.gone {
                continue;
            }
            held.arm = None;
            held.disk_full_until = 0;
            held.net = Net::default();
            held.registry = Registry::default();
            held.spool.is_sound_from_now_on();
            held.facts.container_network_reachable = true;
            held.facts.used_ports.clear();
            let engine = &mut held.engine;
            (engine.away_until, engine.registry_away_until) = (0, 0);
            engine.hangs_until = engine.hangs_until.min(now);
            engine.port_taken_until = 0;
            (engine.slow_until, engine.late_until) = (0, 0);
            (engine.fails, engine.loses) = (0, 0);
            for made in engine.containers.values_mut() {
                if let Some((_, until)) = made.sick.last_mut() {
                    *until = now.min(*until);
                }
            }
            if held.agent.is_none() {
                self.events.push(now + 1, Event::AgentStarts { node });
            }
            self.gather(node);
        }
    }
}
