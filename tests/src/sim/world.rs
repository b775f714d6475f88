//! The world: everything there is, and its loop.

use super::agent::{Disk, Node};
use super::bring::Registry;
use super::check::Book;
use super::clock::Clock;
use super::engine::Engine;
use super::events::{Event, Events, NodeId};
use super::net::{Link, Net};
use super::operator::{Operation, joined};
use super::script::{Program, Script};
use super::server::Server;
use super::specs;
use super::spool::Spool;
use berth_proto::ids::{Digest, Revision};
use berth_server_core::batching::Batch;
use berth_server_core::change::Change;
use berth_server_core::memory::Memory;
use berth_server_core::objects::Host;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

static PROGRAMS: LazyLock<BTreeMap<Digest, Program>> = LazyLock::new(specs::programs);

/// Events of one run at most: a fleet that is busier than this for its script is in a loop.
const MAX_EVENTS: u64 = 1_000_000;

/// Everything there is.
pub(super) struct World<'s> {
    pub(super) script: &'s Script,
    pub(super) now: u64,
    pub(super) events: Events,
    pub(super) steps: u64,
    pub(super) broken: Option<String>,
    pub(super) server: Server,
    pub(super) nodes: Vec<Node>,
    pub(super) links: Vec<Link>,
    pub(super) operations: Vec<Operation>,
    pub(super) book: Book,
    pub(super) backup: Option<(Memory, Revision)>,
    /// Uids given so far.
    pub(super) minted: u64,
    pub(super) programs: &'static BTreeMap<Digest, Program>,
    /// What happened, when somebody wants to read it.
    pub(super) told: Option<Vec<(u64, String)>>,
    handled: u64,
    /// Orphans were to be adopted the last time.
    pub(super) mended: bool,
}

impl<'s> World<'s> {
    pub(super) fn new(script: &'s Script) -> Self {
        let seeded =
            |n: u64| fastrand::Rng::with_seed(script.seed.wrapping_mul(31).wrapping_add(n));
        let nodes = script.machines.iter().zip(0_u8..).map(|(machine, host)| Node {
            host,
            #[expect(clippy::expect_used, reason = "a letter and a number are a uid")]
            uid: format!("h{host}").parse().expect("a uid"),
            machine: *machine,
            facts: specs::facts(machine),
            disk: Disk { instance: "i0".into(), ..Disk::default() },
            disk_full_until: 0,
            spool: Spool::default(),
            registry: Registry::default(),
            agent: None,
            life: 0,
            engine: Engine::default(),
            net: Net::default(),
            clock: Clock::new(0, machine.per_mille, 0),
            wall_ahead: 0,
            rng: seeded(100 + u64::from(host)),
            bring_rng: seeded(1_000 + u64::from(host)),
            arm: None,
            is_clone: false,
            gone: false,
            boots: 0,
        });
        let mut world = Self {
            script,
            now: 0,
            events: Events::default(),
            steps: 0,
            broken: None,
            server: Server {
                store: Memory::default(),
                life: 0,
                per_mille: script.server_per_mille,
                wall_ahead: 0,
                full_until: 0,
                slow_until: 0,
                arm: None,
                process: None,
                rng: seeded(1),
                moves: script.seed % 4 == 1,
                turned: 0,
            },
            nodes: nodes.collect(),
            links: Vec::new(),
            operations: Vec::new(),
            book: Book::default(),
            backup: None,
            minted: 0,
            programs: &PROGRAMS,
            told: None,
            handled: 0,
            mended: false,
        };
        berth_server_core::bugs::make_small(script.small);
        berth_agent_core::bugs::make_small(script.small);
        world.begin();
        world
    }

    /// A cluster whose hosts have joined, and everything that is going to happen.
    fn begin(&mut self) {
        let cluster = self.cluster_record().map(Change::PutCluster);
        let hosts = self.nodes.iter().filter_map(|node| {
            let record = joined(node.host, &node.machine, None, &node.uid, "i0");
            Some(Change::PutHost(Arc::new(Host::new(record).ok()?)))
        });
        let ops = cluster.into_iter().chain(hosts).map(|change| change.encode()).collect();
        let taken = self.server.store.commit(&[Batch { revision: Revision(1), ops }]);
        if let Err(why) = taken {
            self.broke(format!("the first records are not taken: {why:?}"));
        }
        self.events.push(0, Event::ServerStarts);
        for node in 0..self.nodes.len() {
            let at = self.nodes[node].rng.u64(0..500);
            self.events.push(at, Event::AgentStarts { node });
        }
        for (entry, (at, _)) in self.script.actions.iter().enumerate() {
            self.events.push(*at, Event::Script(entry));
        }
    }

    /// Has what happens written down.
    pub(super) fn listen(&mut self) {
        self.told = Some(Vec::new());
    }

    pub(super) fn note(&mut self, words: impl FnOnce(&Self) -> String) {
        if let Some(mut told) = self.told.take() {
            told.push((self.now, words(self)));
            self.told = Some(told);
        }
    }

    /// The machine of this number, which is not its clone.
    pub(super) fn machine(&self, host: u8) -> NodeId {
        usize::from(host) % self.script.machines.len()
    }

    /// Everything up to a moment; `false`: something is broken.
    pub(super) fn run_until(&mut self, until: u64) -> bool {
        while let Some((at, event)) = self.events.pop(until) {
            self.now = self.now.max(at);
            self.handled += 1;
            if self.handled > MAX_EVENTS {
                let what = format!("{event:?}");
                let what: String = what.chars().take(300).collect();
                self.broke(format!("it goes round and round, with {what}"));
            }
            self.handle(event);
            if self.broken.is_some() {
                return false;
            }
        }
        self.now = self.now.max(until);
        true
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Script(entry) => {
                let script = self.script;
                self.happens(&script.actions[entry].1);
            }
            Event::AgentStarts { node } => self.agent_starts(node),
            Event::Dial { node, life } => self.dial(node, life),
            Event::NotReached { node, life } => self.not_reached(node, life),
            Event::Accept { link } => self.accept(link),
            Event::Up { link, message } => self.up(link, message),
            Event::Down { link, message } => self.down(link, message),
            Event::UpClosed { link } => self.up_closed(link),
            Event::DownClosed { link, how } => self.down_closed(link, how),
            Event::SessionTick { node, life } => self.session_tick(node, life),
            Event::ReconcileTick { node, life } => self.reconcile_tick(node, life),
            Event::EarlySessionTick { node, life } => self.early_session_tick(node, life),
            Event::EarlyReconcileTick { node, life } => self.early_reconcile_tick(node, life),
            Event::Written { node, life, write } => self.written(node, life, write),
            Event::SetPersisted { node, life, result } => self.set_persisted(node, life, result),
            Event::Call { node, life, effect } => self.call(node, life, *effect),
            Event::Tell { node, life, input } => self.tell(node, life, *input),
            Event::Brings { node, life, step, call } => self.brings(node, life, step, *call),
            Event::FetchStops { node, life, step } => self.fetch_stops(node, life, step),
            Event::Stopped { node, life, stop } => self.stopped(node, life, &stop),
            Event::ProgramEnds { node, container, start } => {
                self.program_ends(node, container, start);
            }
            Event::SickEnds { node, life, container, for_ms } => {
                self.check_sick(node, life, container, for_ms);
            }
            Event::CheckGone { node, life, replica, since } => {
                self.check_gone(node, life, &replica, since);
            }
            Event::CheckAway { node, life } => self.check_away(node, life),
            Event::FactsChange { node } => self.facts_change(node),
            Event::ServerStarts => self.server_starts(),
            Event::Commit { life, token, batches } => self.commit(life, token, &batches),
            Event::Committed { life, token } => self.committed(life, token, false),
            Event::CommitFull { life, token } => self.committed(life, token, true),
            Event::ServerTick { life, link } => self.server_tick(life, link),
            Event::EarlyServerTick { life, link } => self.early_server_tick(life, link),
            Event::Plan { life } => self.plan(life),
            Event::PlansSent { life, sent } => self.plans_sent(life, sent),
            Event::Sent { life, waiter, proposal } => {
                if self.server.life == life {
                    self.propose(waiter, *proposal);
                }
            }
            Event::Order { life, link, why } => self.ordered(life, link, why),
            Event::Again { operation } => self.again(operation),
        }
    }

    /// All of it: the script, then peace.
    pub(super) fn run(&mut self) {
        let end = self.script.actions.last().map_or(0, |(at, _)| *at) + 1_000;
        if self.run_until(end) {
            self.settle();
        }
    }
}
