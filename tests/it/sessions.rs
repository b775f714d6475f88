//! Both ends of a session together, over a link that loses, delays, cuts and swallows.
//!
//! The two real machines talk through a small world: an agent's disk that may fail, a ledger that is
//! slow, agent and server that are killed, connections of before that still deliver. A run is a
//! function of its script; after the script faults end and both sides must agree within a bound.

use berth_agent_core::ledger::{HeldSet, Wanted, set_id};
use berth_agent_core::session as agent_end;
use berth_proto::agent::{
    AssignmentBody, Hello, ReplicaReport, SessionRequest, SessionResponse, SetEntry, SetVerdict,
    session_request,
};
use berth_proto::api;
use berth_proto::ids::{Digest, Epoch, Generation, Mono, Now, SetNumber, Wall};
use berth_server_core::session as server_end;
use proptest::prelude::*;
use prost::Message as _;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Replicas a script speaks of.
const REPLICAS: u8 = 5;
/// After the last fault everything agrees within this: an idle timeout for a link that swallows, a
/// dial, and a set that was not durable.
const SETTLE_MS: u64 = 90_000;

#[derive(Debug, Clone)]
enum Op {
    /// A newer set of these replicas (a bit each).
    NewSet(u8),
    /// A replica's status changes.
    Report(u8),
    /// Nothing is left of a replica.
    Gone(u8),
    /// So many messages reach the server.
    Up(u8),
    /// So many messages reach the agent.
    Down(u8),
    /// So many messages of connections the agent has left reach the server.
    Late(u8),
    /// The agent dials.
    Dial,
    /// The connection breaks; what was said is still under way to the server.
    Leave,
    /// The connection breaks; what was under way is lost.
    Cut,
    /// The connection swallows everything from now on, and nobody knows.
    Swallow,
    /// The agent's disk is done, well or not.
    Disk(bool),
    /// The ledger has kept so many statuses.
    Keep(u8),
    /// `kill -9`.
    KillAgent,
    /// `kill -9`.
    KillServer,
    /// Time passes.
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..1_u8 << REPLICAS).prop_map(Op::NewSet),
        6 => (0..REPLICAS).prop_map(Op::Report),
        2 => (0..REPLICAS).prop_map(Op::Gone),
        8 => (1..6_u8).prop_map(Op::Up),
        8 => (1..6_u8).prop_map(Op::Down),
        3 => (1..6_u8).prop_map(Op::Late),
        6 => Just(Op::Dial),
        2 => Just(Op::Leave),
        1 => Just(Op::Cut),
        1 => Just(Op::Swallow),
        4 => prop::bool::weighted(0.8).prop_map(Op::Disk),
        4 => (1..4_u8).prop_map(Op::Keep),
        1 => Just(Op::KillAgent),
        1 => Just(Op::KillServer),
        6 => (1..3_000_u16).prop_map(Op::Pass),
    ]
}

/// One connection.
struct Link {
    id: u64,
    server: Option<server_end::Session>,
    /// The agent is still at the other end.
    agent: bool,
    swallows: bool,
    up: VecDeque<SessionRequest>,
    down: VecDeque<SessionResponse>,
    /// Statuses given to the ledger and not kept yet.
    taking: VecDeque<u64>,
    /// The start of the agent that dialled.
    start: u64,
}

#[derive(Default)]
struct Counts {
    up_messages: u64,
    up_bytes: u64,
    down_messages: u64,
}

struct World {
    now: u64,
    links: Vec<Link>,
    next_link: u64,
    /// Every set there ever was, by generation.
    sets: Vec<Arc<server_end::HostSet>>,
    /// The newest session that said hello.
    current: u64,
    /// What the server knows of replicas: the number of the status.
    known: BTreeMap<String, u32>,
    /// Statuses the server took: (agent start, sequence).
    kept: BTreeSet<(u64, u64)>,
    agent: Option<agent_end::Session>,
    persisting: Option<HeldSet>,
    disk: Wanted,
    /// Every number that was ever durable.
    durable: BTreeSet<SetNumber>,
    acted: Option<SetNumber>,
    start: u64,
    sequence: u64,
    /// How replicas are: the number of the status.
    truth: BTreeMap<String, u32>,
    /// The newest number given.
    status: u32,
    /// When status messages of the present session went out.
    statuses: VecDeque<u64>,
    counts: Counts,
}

fn name(replica: u8) -> String {
    format!("r{replica}")
}

fn body(n: u8) -> Vec<u8> {
    let image =
        api::ResolvedImage { digest: Digest::of(b"image").to_string(), ..Default::default() };
    AssignmentBody {
        deployment_uid: "d".into(),
        deployment: "d".into(),
        namespace: "default".into(),
        release: u64::from(n) + 1,
        source: Some(api::ResolvedSource { image: Some(image), ..Default::default() }),
        spec: Some(api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".into())),
            ..Default::default()
        }),
        ..Default::default()
    }
    .encode_to_vec()
}

fn set(generation: usize, mask: u8) -> Arc<server_end::HostSet> {
    let mut entries = Vec::new();
    let mut bodies: BTreeMap<Digest, Arc<[u8]>> = BTreeMap::new();
    for replica in (0..REPLICAS).filter(|r| mask & (1 << r) != 0) {
        // Two replicas share a body, so that bodies are held from before now and then.
        let bytes = body(replica / 2);
        let digest = Digest::of(&bytes);
        entries.push(SetEntry {
            replica_uid: name(replica),
            body_digest: digest.to_string(),
            release: u64::from(replica / 2) + 1,
            ..Default::default()
        });
        bodies.insert(digest, bytes.into());
    }
    let generation = Generation(u64::try_from(generation).unwrap());
    let number = SetNumber { epoch: Epoch(7), generation };
    Arc::new(server_end::HostSet::new(number, entries, bodies))
}

fn report(replica: &str, status: u32) -> ReplicaReport {
    // The slot stands for all of the status: the machines do not look into it.
    ReplicaReport { replica_uid: replica.to_owned(), slot: status, ..Default::default() }
}

impl World {
    fn new() -> Self {
        Self {
            now: 1,
            links: Vec::new(),
            next_link: 1,
            sets: vec![set(0, 0)],
            current: 0,
            known: BTreeMap::new(),
            kept: BTreeSet::new(),
            agent: None,
            persisting: None,
            disk: Wanted::NotYetKnown,
            durable: BTreeSet::new(),
            acted: None,
            start: 1,
            sequence: 0,
            truth: BTreeMap::new(),
            status: 1,
            statuses: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    fn at(&self) -> Now {
        Now {
            mono: Mono(self.now),
            wall: Wall(1_800_000_000_000 + i64::try_from(self.now).unwrap()),
        }
    }

    fn newest(&self) -> &Arc<server_end::HostSet> {
        self.sets.last().unwrap()
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::NewSet(mask) => {
                self.sets.push(set(self.sets.len(), *mask));
                for id in self.ids() {
                    self.server(id, server_end::Input::Newest(Ok(Arc::clone(self.newest()))));
                }
            }
            Op::Report(replica) => {
                self.status += 1;
                self.truth.insert(name(*replica), self.status);
                let report = report(&name(*replica), self.status);
                self.agent(agent_end::Input::Report(Box::new(report)));
            }
            Op::Gone(replica) => {
                self.truth.remove(&name(*replica));
                self.agent(agent_end::Input::Absent(name(*replica)));
            }
            Op::Up(n) => {
                if let Some(id) = self.links.last().filter(|l| l.agent).map(|l| l.id) {
                    self.up(id, usize::from(*n));
                }
            }
            Op::Down(n) => self.down(usize::from(*n)),
            Op::Late(n) => {
                let left: Vec<u64> = self.links.iter().filter(|l| !l.agent).map(|l| l.id).collect();
                for id in left {
                    self.up(id, usize::from(*n));
                }
            }
            Op::Dial => self.dial(),
            Op::Leave => self.leave(false),
            Op::Cut => self.leave(true),
            Op::Swallow => {
                if let Some(link) = self.links.last_mut() {
                    link.swallows = true;
                    link.up.clear();
                    link.down.clear();
                }
            }
            Op::Disk(well) => self.written(*well),
            Op::Keep(n) => {
                for _ in 0..*n {
                    for id in self.ids() {
                        let link = self.links.iter_mut().find(|l| l.id == id).unwrap();
                        if let Some(sequence) = link.taking.pop_front() {
                            self.server(id, server_end::Input::Taken(sequence));
                        }
                    }
                }
            }
            Op::KillAgent => {
                self.leave(false);
                self.persisting = None;
                self.start += 1;
                self.sequence = 0;
            }
            Op::KillServer => {
                self.leave(true);
                self.links.clear();
                // Liveness is not stored.
                self.known.clear();
                self.current = 0;
            }
            Op::Pass(ms) => self.pass(u64::from(*ms)),
        }
        self.links.retain(|link| link.agent || (link.server.is_some() && !link.up.is_empty()));
    }

    fn ids(&self) -> Vec<u64> {
        self.links.iter().map(|l| l.id).collect()
    }

    /// Time passes; every machine is ticked when it wants to be.
    fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        loop {
            let agent = self.agent.as_ref().map(|a| a.deadline().0);
            let servers = self.links.iter().filter_map(|l| l.server.as_ref()?.deadline());
            let due = servers.map(|d| d.0).chain(agent).min().unwrap_or(end).max(self.now + 1);
            if due > end {
                break;
            }
            self.now = due;
            self.agent(agent_end::Input::Tick);
            for id in self.ids() {
                self.server(id, server_end::Input::Tick);
            }
        }
        self.now = end;
    }

    fn dial(&mut self) {
        if self.agent.is_some() {
            return;
        }
        // What was being written when the session ended is written or not; here it is.
        self.written(true);
        let held = self.disk.set();
        let hello = Hello {
            host_uid: "h".into(),
            instance: "i".into(),
            agent_start: self.start,
            held: held.map(|s| set_id(s.number)),
            held_digest: held.map(|s| s.digest.clone()).unwrap_or_default(),
            bodies: held
                .map(|s| s.bodies.keys().map(ToString::to_string).collect())
                .unwrap_or_default(),
            observed: self.truth.iter().map(|(uid, status)| report(uid, *status)).collect(),
            engine_observed: true,
            ..Default::default()
        };
        let (machine, first) =
            agent_end::Session::begin(hello, self.disk.clone(), self.sequence, Mono(self.now));
        let terms = server_end::Terms {
            epoch: Epoch(7),
            cluster: "c".into(),
            ping_interval_ms: 10_000,
            idle_timeout_ms: 30_000,
            status_interval_ms: 100,
            reconnect_window_ms: 1_000,
            version: "0".into(),
            features: vec![],
            trust: berth_proto::agent::Trust::default(),
        };
        let server = server_end::Session::new("h".parse().unwrap(), terms, Mono(self.now));
        let id = self.next_link;
        self.next_link += 1;
        self.agent = Some(machine);
        self.statuses.clear();
        self.links.push(Link {
            id,
            server: Some(server),
            agent: true,
            swallows: false,
            up: first.into(),
            down: VecDeque::new(),
            taking: VecDeque::new(),
            start: self.start,
        });
        self.server(id, server_end::Input::Newest(Ok(Arc::clone(self.newest()))));
    }

    /// The agent's end of the connection is gone.
    fn leave(&mut self, lost: bool) {
        if let Some(machine) = self.agent.take() {
            self.sequence = machine.sequence();
        }
        for link in self.links.iter_mut().filter(|l| l.agent) {
            link.agent = false;
            link.down.clear();
            if lost || link.swallows {
                link.up.clear();
            }
        }
    }

    fn up(&mut self, id: u64, n: usize) {
        for _ in 0..n {
            let Some(link) = self.links.iter_mut().find(|l| l.id == id) else { return };
            let Some(message) = link.up.pop_front() else { return };
            self.server(id, server_end::Input::Message(Box::new(message)));
        }
    }

    fn down(&mut self, n: usize) {
        for _ in 0..n {
            let Some(link) = self.links.last_mut().filter(|l| l.agent) else { return };
            let Some(message) = link.down.pop_front() else { return };
            self.agent(agent_end::Input::Message(Box::new(message)));
        }
    }

    fn written(&mut self, well: bool) {
        let Some(set) = self.persisting.take() else { return };
        if well {
            let held = self.disk.set().map(|s| s.number);
            assert!(held.is_none_or(|held| held < set.number), "the disk went backwards");
            self.durable.insert(set.number);
            self.disk = Wanted::Set(Arc::new(set));
            self.agent(agent_end::Input::Persisted(Ok(())));
        } else {
            self.agent(agent_end::Input::Persisted(Err("the disk is full".into())));
        }
    }

    fn server(&mut self, id: u64, input: server_end::Input) {
        let at = self.at();
        let Some(link) = self.links.iter_mut().find(|l| l.id == id) else { return };
        let (start, swallows) = (link.start, link.swallows);
        let Some(machine) = &mut link.server else { return };
        for effect in machine.step(at, input) {
            use server_end::Effect;
            match effect {
                Effect::Send(message) => {
                    assert!(message.encoded_len() <= 1024 * 1024, "a message is too large");
                    let link = self.links.iter_mut().find(|l| l.id == id).unwrap();
                    if link.agent && !swallows {
                        link.down.push_back(*message);
                        self.counts.down_messages += 1;
                    }
                }
                Effect::Register(registration) => {
                    if self.current > id {
                        // A newer session was faster: this one is superseded.
                        self.end(id);
                        return;
                    }
                    self.current = id;
                    for link in self.links.iter_mut().filter(|l| l.id < id) {
                        link.server = None;
                    }
                    self.known = registration
                        .observed
                        .into_iter()
                        .map(|r| (r.replica_uid, r.slot))
                        .collect();
                    let newest = Some(Ok(Arc::clone(self.newest())));
                    self.server(id, server_end::Input::Registered(newest));
                }
                Effect::Take { sequence, reports, absent } => {
                    if id != self.current {
                        continue;
                    }
                    assert!(self.kept.insert((start, sequence)), "a sequence was used twice");
                    for report in reports {
                        let held = self.known.insert(report.replica_uid, report.slot);
                        assert!(
                            held.is_none_or(|held| held <= report.slot),
                            "an older status came"
                        );
                    }
                    for uid in absent {
                        self.known.remove(&uid);
                    }
                    self.links.iter_mut().find(|l| l.id == id).unwrap().taking.push_back(sequence);
                }
                Effect::Acknowledged { number, .. } => {
                    assert!(self.durable.contains(&number), "acknowledged and not durable");
                }
                Effect::Refused { verdict, message, .. } => {
                    assert_eq!(verdict, SetVerdict::NotDurable, "{message}");
                }
                Effect::Close(_) => {
                    self.end(id);
                    return;
                }
                Effect::Facts(_) | Effect::TrustAcknowledged(_) | Effect::ClockOffset(_) => {}
            }
        }
    }

    /// The server ends a session; the agent sees it unless the link swallows.
    fn end(&mut self, id: u64) {
        let Some(link) = self.links.iter_mut().find(|l| l.id == id) else { return };
        link.server = None;
        if link.agent && !link.swallows {
            self.leave(true);
        }
    }

    fn agent(&mut self, input: agent_end::Input) {
        let at = self.at();
        let Some(machine) = &mut self.agent else { return };
        for effect in machine.step(at, input) {
            use agent_end::Effect;
            match effect {
                Effect::Send(message) => {
                    assert!(message.encoded_len() <= 1024 * 1024, "a message is too large");
                    self.counts.up_messages += 1;
                    self.counts.up_bytes += message.encoded_len() as u64;
                    if matches!(message.item, Some(session_request::Item::Statuses(_))) {
                        self.statuses.push_back(self.now);
                        while self.statuses.front().is_some_and(|t| t + 1000 <= self.now) {
                            self.statuses.pop_front();
                        }
                        assert!(self.statuses.len() <= 10, "more than 10 status messages a second");
                    }
                    if let Some(link) = self.links.last_mut().filter(|l| l.agent && !l.swallows) {
                        link.up.push_back(*message);
                    }
                }
                Effect::Persist(set) => {
                    assert!(self.persisting.is_none(), "two sets are written at once");
                    let made = &self.sets[usize::try_from(set.number.generation.0).unwrap()];
                    assert_eq!(set.digest, made.digest.as_str());
                    assert_eq!(set.entries.len(), made.entries.len());
                    for (digest, bytes) in &made.bodies {
                        assert_eq!(set.bodies[digest].bytes, *bytes, "a body is not verbatim");
                    }
                    self.persisting = Some(*set);
                }
                Effect::Act(set) => {
                    assert_eq!(self.disk.set().map(|s| s.number), Some(set.number), "not durable");
                    assert!(self.acted.is_none_or(|acted| acted <= set.number), "went back");
                    self.acted = Some(set.number);
                }
                Effect::Kept(sequence) => {
                    assert!(self.kept.contains(&(self.start, sequence)), "nobody kept it");
                }
                Effect::Close(_) => {
                    self.leave(false);
                    return;
                }
                Effect::Welcomed(_)
                | Effect::Trust(_)
                | Effect::Open(_)
                | Effect::Removed { .. } => {}
            }
        }
    }

    fn agrees(&self) -> bool {
        self.agent.is_some()
            && self.disk.set().map(|s| s.number) == Some(self.newest().number)
            && self.known == self.truth
    }

    /// Faults end; answers in how many milliseconds both sides agree.
    fn settle(&mut self) -> Option<u64> {
        let begun = self.now;
        while self.now - begun <= SETTLE_MS {
            for _ in 0..6 {
                for op in [
                    Op::Late(100),
                    Op::Dial,
                    Op::Up(100),
                    Op::Disk(true),
                    Op::Keep(100),
                    Op::Down(100),
                ] {
                    self.run(&op);
                }
            }
            if self.agrees() {
                return Some(self.now - begun);
            }
            self.pass(250);
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn both_ends_agree_after_any_faults_and_never_go_back(script in prop::collection::vec(op(), 1..200)) {
        let mut world = World::new();
        for op in &script {
            world.run(op);
        }
        let settled = world.settle();
        prop_assert!(
            settled.is_some(),
            "not settled: newest {:?}, on disk {:?}; known {:?}, true {:?}",
            world.newest().number, world.disk.set().map(|s| s.number), world.known, world.truth
        );
    }
}

/// Bytes around a message on the wire: HTTP/2 frame 9, gRPC 5, TLS 1.3 record 22, TCP with its
/// timestamps over IPv4 52; and a bare acknowledgement of TCP.
const AROUND: u64 = 9 + 5 + 22 + 52;
const TCP_ACK: u64 = 52;
/// The server's HTTP/2 keep-alive each 30 s: the answer (17 and what is around it) and a bare ack.
const KEEP_ALIVE_PER_HOUR: u64 = 120 * (17 + 22 + 52 + TCP_ACK);

#[test]
fn an_idle_session_says_less_than_a_quarter_of_a_kilobit_a_second() {
    let mut world = World::new();
    for replica in 0..20 {
        world.truth.insert(format!("idle{replica}"), 1);
    }
    assert!(world.settle().is_some());
    world.counts = Counts::default();
    for _ in 0..36_000 {
        world.pass(100);
        world.run(&Op::Up(100));
        world.run(&Op::Down(100));
    }
    assert!(world.agrees(), "an idle session must stand");
    let c = &world.counts;
    let bytes =
        c.up_bytes + c.up_messages * AROUND + c.down_messages * TCP_ACK + KEEP_ALIVE_PER_HOUR;
    let bits_per_second = bytes * 8 / 3600;
    println!("{} messages up, {} down, {bits_per_second} bit/s up", c.up_messages, c.down_messages);
    assert!(bits_per_second < 250, "{bits_per_second} bit/s");
    assert!(c.up_messages >= 359, "an agent must be heard");
}
