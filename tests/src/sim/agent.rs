//! An agent's pumps: its session, its reconciler and its disk, as `berth-agent` drives them.

use super::bring::{Brings, Registry};
use super::check::{Started, word};
use super::clock::Clock;
use super::engine::{Engine, number};
use super::events::{Event, Life, LinkId, NodeId, Write, early};
use super::net::Net;
use super::script::{Machine, Moment};
use super::spool::Spool;
use super::world::World;
use berth_agent_core::board::{Board, News, Who, nothing};
use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::{HeldSet, Wanted, set_id};
use berth_agent_core::reconcile::{self, Reconcile, StepId};
use berth_agent_core::session::{self, Dialling, Ended, Session};
use berth_proto::agent::session_request::Item;
use berth_proto::agent::{SessionRequest, SetId};
use berth_proto::ids::{HostUid, Now, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How long the first session waits for the first look at the engine.
const FIRST_LOOK_MS: u64 = 3_000;

/// What is not wanted any more is gone within this: its program ends in 1.5 s.
const GONE_MS: u64 = 6_000;

/// What survives an agent.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    pub(super) wanted: Wanted,
    pub(super) memory: BTreeMap<ReplicaUid, Memory>,
    pub(super) start: u64,
    pub(super) instance: String,
    pub(super) trust: u64,
    pub(super) removed: bool,
    pub(super) wipe: bool,
}

/// A session as its pump holds it.
#[derive(Debug)]
pub(super) struct AgentSession {
    pub(super) machine: Session,
    pub(super) link: LinkId,
    /// The hello told what the engine shows.
    complete: bool,
    /// A set is being written: nothing else is done meanwhile.
    writing: bool,
    /// Something is being done: what that brings comes after what waits already.
    stepping: bool,
    inbox: VecDeque<Result<session::Input, Ended>>,
    /// The set that it has acknowledged last.
    acknowledged: Option<SetId>,
}

/// A running agent.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) machine: Reconcile,
    pub(super) board: Board,
    pub(super) dialling: Dialling,
    pub(super) session: Option<AgentSession>,
    pub(super) dial_at: Option<u64>,
    nonce: String,
    sequence: u64,
    session_tick: u64,
    reconcile_tick: u64,
    pub(super) brings: Brings,
    /// How far each replica was told to be, and whether it was ready.
    pub(super) told: BTreeMap<ReplicaUid, ((u32, i32), bool)>,
    /// Whose container it has asked to be stopped, and has no answer yet.
    pub(super) stopping: BTreeMap<StepId, (ReplicaUid, u32)>,
    /// Under which set a replica was gone last.
    gone: BTreeMap<ReplicaUid, Option<SetId>>,
}

/// A machine with its disk, its engine and perhaps an agent.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) host: u8,
    pub(super) uid: HostUid,
    pub(super) machine: Machine,
    pub(super) facts: berth_proto::api::HostFacts,
    pub(super) disk: Disk,
    pub(super) disk_full_until: u64,
    /// The bytes that were brought, and what is on its way.
    pub(super) spool: Spool,
    pub(super) registry: Registry,
    pub(super) agent: Option<Agent>,
    pub(super) life: Life,
    pub(super) engine: Engine,
    pub(super) net: Net,
    pub(super) clock: Clock,
    pub(super) wall_ahead: i64,
    pub(super) rng: fastrand::Rng,
    pub(super) bring_rng: fastrand::Rng,
    pub(super) arm: Option<(Moment, u64)>,
    pub(super) is_clone: bool,
    /// Switched off for good.
    pub(super) gone: bool,
    /// Agent starts of this machine, whatever its disk says; for nonces.
    pub(super) boots: u32,
}

impl Node {
    pub(super) fn now(&self, at: u64) -> Now {
        self.clock.now(at)
    }
}

impl World<'_> {
    pub(super) fn agent_starts(&mut self, node: NodeId) {
        let now = self.now;
        let held = &mut self.nodes[node];
        if held.gone || held.agent.is_some() {
            return;
        }
        held.life += 1;
        held.boots += 1;
        held.disk.start += 1;
        held.clock = Clock::new(now, held.machine.per_mille, held.wall_ahead);
        let wiping = held.disk.removed && held.disk.wipe;
        let mut facts = held.facts.clone();
        facts.engine_available = held.engine.is_up(now);
        let board = Board::new(held.disk.wanted.clone(), wiping, facts);
        let mono = held.now(now).mono;
        let machine = Reconcile::new(&board.wanted, held.disk.memory.clone(), mono);
        let dial_at = now + FIRST_LOOK_MS;
        held.agent = Some(Agent {
            machine,
            board,
            dialling: Dialling::default(),
            session: None,
            dial_at: Some(dial_at),
            nonce: format!("{node}-{}", held.boots),
            sequence: 0,
            session_tick: u64::MAX,
            reconcile_tick: u64::MAX,
            brings: Brings::new(held.machine.capped),
            told: BTreeMap::new(),
            stopping: BTreeMap::new(),
            gone: BTreeMap::new(),
        });
        let life = held.life;
        self.events.push(dial_at, Event::Dial { node, life });
        self.note(|w| format!("the agent of {} starts", w.nodes[node].uid));
        self.reconcile(node, reconcile::Input::Tick);
    }

    /// The agent gathers the facts of its host.
    pub(super) fn gather(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        let Some(agent) = &mut held.agent else { return };
        let before = agent.board.facts.clone();
        let facts = agent.board.gathered(held.facts.clone()).clone();
        if facts != before {
            self.session_input(node, session::Input::Facts(Box::new(facts)));
        }
    }

    /// The agent is gone at once. What it asked for may still be done.
    pub(super) fn kill_agent(&mut self, node: NodeId, down_ms: u64) {
        let held = &mut self.nodes[node];
        held.arm = None;
        let Some(agent) = held.agent.take() else { return };
        held.engine.follower = None;
        held.life += 1;
        if let Some(session) = agent.session {
            self.close_up(session.link);
        }
        self.forget_failures(node);
        self.note(|w| format!("the agent of {} is gone", w.nodes[node].uid));
        self.events.push(self.now + down_ms.max(1), Event::AgentStarts { node });
    }

    /// Dies here, if this is the moment it was told to.
    pub(super) fn dies_at(&mut self, node: NodeId, moment: Moment) -> bool {
        match self.nodes[node].arm {
            Some((when, down_ms)) if when == moment => {
                self.kill_agent(node, down_ms);
                true
            }
            _ => false,
        }
    }

    pub(super) fn lives(&self, node: NodeId, life: Life) -> bool {
        self.nodes[node].life == life && self.nodes[node].agent.is_some()
    }

    // ---- the session ----

    pub(super) fn begin_session(&mut self, node: NodeId, link: LinkId) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let at = held.now(now);
        let Some(agent) = &mut held.agent else { return };
        let who = Who {
            host_uid: held.uid.to_string(),
            instance: held.disk.instance.clone(),
            boot_id: String::new(),
            boot_nonce: agent.nonce.clone(),
            agent_start: held.disk.start,
            agent_version: "0".into(),
            features: agent.board.facts.features.clone(),
            trust_version: held.disk.trust,
        };
        let hello = agent.board.hello(&who, at.wall);
        let complete = hello.engine_observed;
        let wanted = agent.board.wanted.clone();
        let (machine, first) = Session::begin(hello, wanted, agent.sequence, at.mono);
        agent.session = Some(AgentSession {
            machine,
            link,
            complete,
            writing: false,
            stepping: false,
            inbox: VecDeque::new(),
            acknowledged: None,
        });
        agent.session_tick = u64::MAX;
        for message in first {
            self.send_up(link, Box::new(message));
        }
        self.plan_session_tick(node);
    }

    pub(super) fn session_input(&mut self, node: NodeId, input: session::Input) {
        self.session_hears(node, Ok(input));
    }

    /// In the order things come, as far as nothing has to be waited for.
    fn session_hears(&mut self, node: NodeId, what: Result<session::Input, Ended>) {
        if let Some(session) = self.session_of(node) {
            session.inbox.push_back(what);
            self.session_goes_on(node);
        }
    }

    fn session_of(&mut self, node: NodeId) -> Option<&mut AgentSession> {
        self.nodes[node].agent.as_mut()?.session.as_mut()
    }

    fn session_goes_on(&mut self, node: NodeId) {
        while let Some(session) = self.session_of(node) {
            if session.writing || session.stepping {
                return;
            }
            match session.inbox.pop_front() {
                Some(Ok(input)) => {
                    session.stepping = true;
                    let link = session.link;
                    self.session_step(node, input);
                    if let Some(session) = self.session_of(node).filter(|s| s.link == link) {
                        session.stepping = false;
                    }
                }
                Some(Err(how)) => self.session_ends(node, how),
                None => break,
            }
        }
        self.plan_session_tick(node);
    }

    /// What is gone is told before the set is acknowledged that came after it was.
    fn check_said(&mut self, node: NodeId, message: &SessionRequest) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let Some(session) = &mut agent.session else { return };
        let absent = match &message.item {
            Some(Item::SetAck(ack)) => {
                session.acknowledged = ack.held;
                return;
            }
            Some(Item::Statuses(statuses)) => &statuses.absent,
            _ => return,
        };
        let (gone, acknowledged) = (&agent.gone, session.acknowledged);
        let late = absent.iter().find(|uid| {
            let under = uid.parse().ok().and_then(|uid: ReplicaUid| gone.get(&uid).copied());
            under.is_some_and(|under| acknowledged.is_some() && under != acknowledged)
        });
        if let Some(uid) = late {
            self.broke(format!("{uid} is told to be gone under a set that came later"));
        }
    }

    fn session_step(&mut self, node: NodeId, input: session::Input) {
        use session::Effect;
        self.steps += 1;
        let now = self.now;
        let held = &mut self.nodes[node];
        let at = held.now(now);
        let Some(agent) = &mut held.agent else { return };
        let Some(session) = agent.session.as_mut() else { return };
        let link = session.link;
        let effects = session.machine.step(at, input);
        agent.sequence = session.machine.sequence();
        for effect in effects {
            match effect {
                Effect::Send(message) => {
                    self.check_said(node, &message);
                    self.send_up(link, message);
                }
                Effect::Welcomed(welcome) => {
                    if let Some(agent) = &mut self.nodes[node].agent {
                        agent.dialling.welcomed(welcome.reconnect_window_ms);
                    }
                }
                Effect::Persist(set) => {
                    let held = &mut self.nodes[node];
                    let (life, at) = (held.life, now + held.rng.u64(1..20));
                    if let Some(session) = held.agent.as_mut().and_then(|a| a.session.as_mut()) {
                        session.writing = true;
                    }
                    let write = Write::Set(set);
                    self.events.push(at, Event::Written { node, life, write });
                }
                Effect::Act(set) => self.act(node, *set),
                Effect::Trust(trust) => {
                    let held = &mut self.nodes[node];
                    if trust.version > held.disk.trust {
                        held.disk.trust = trust.version;
                        self.session_step(node, session::Input::Trusted(trust.version));
                    }
                }
                Effect::Removed { wipe } => self.removed(node, wipe),
                Effect::Close(_) => return self.session_ends(node, Ended::Lost),
                Effect::Open(_) => {}
                Effect::Kept(sequence) => self.kept(link, sequence),
            }
        }
    }

    fn plan_session_tick(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        let life = held.life;
        let Some(agent) = &mut held.agent else { return };
        let Some(session) = &agent.session else { return };
        let at = held.clock.when(session.machine.deadline()).max(self.now);
        if at < agent.session_tick {
            agent.session_tick = at;
            self.events.push(at, Event::SessionTick { node, life });
        }
        if let Some(at) = early(&mut held.rng, self.now, at) {
            self.events.push(at, Event::EarlySessionTick { node, life });
        }
    }

    /// Nothing is due, whatever the time is.
    pub(super) fn early_session_tick(&mut self, node: NodeId, life: Life) {
        let (now, held) = (self.now, &mut self.nodes[node]);
        let at = held.now(now);
        if held.life != life {
            return;
        }
        let Some(session) = held.agent.as_mut().and_then(|a| a.session.as_mut()) else { return };
        if session.writing || !session.inbox.is_empty() || session.machine.deadline() <= at.mono {
            return;
        }
        let effects = session.machine.step(at, session::Input::Tick);
        if let Some(effect) = effects.first() {
            let words = format!("the session of {} said that nothing was due", held.uid);
            self.broke(format!("{words}, and something was: {}", word(effect)));
        }
    }

    pub(super) fn session_tick(&mut self, node: NodeId, life: Life) {
        if !self.lives(node, life) {
            return;
        }
        let (now, held) = (self.now, &mut self.nodes[node]);
        let mono = held.now(now).mono;
        let Some(agent) = &mut held.agent else { return };
        if now < agent.session_tick {
            return;
        }
        agent.session_tick = u64::MAX;
        let Some(session) = &agent.session else { return };
        if session.writing {
            return;
        }
        if session.machine.deadline() <= mono {
            self.session_input(node, session::Input::Tick);
        } else {
            self.plan_session_tick(node);
        }
    }

    pub(super) fn down_closed(&mut self, link: LinkId, how: Ended) {
        let node = self.links[link].node;
        if !self.links[link].agent_open || self.link_of(node) != Some(link) {
            return;
        }
        self.session_hears(node, Err(how));
    }

    fn session_ends(&mut self, node: NodeId, how: Ended) {
        let held = &mut self.nodes[node];
        let life = held.life;
        let Some(agent) = &mut held.agent else { return };
        let Some(session) = agent.session.take() else { return };
        let away = matches!(how, Ended::Refused { stay_away: true });
        let wait_ms = agent.dialling.ended(how, held.rng.u64(0..1000));
        let at = self.now + wait_ms;
        agent.dial_at = Some(at);
        self.events.push(at, Event::Dial { node, life });
        self.close_up(session.link);
        self.check_dials(node, wait_ms, away);
    }

    /// The host was removed from its cluster.
    fn removed(&mut self, node: NodeId, wipe: bool) {
        let held = &mut self.nodes[node];
        if !self.book.wipes.get(&held.uid).is_some_and(|asked| asked.contains(&wipe)) {
            let words = format!("{} hears that it is removed, wiped: {wipe}", held.uid);
            return self.broke(format!("{words}, and nobody has said so"));
        }
        (held.disk.removed, held.disk.wipe) = (true, wipe);
        if !wipe {
            return;
        }
        held.disk.wanted = nothing();
        let Some(agent) = &mut held.agent else { return };
        agent.board.wipe();
        if let Some(set) = agent.board.wanted.set().cloned() {
            self.reconcile(node, reconcile::Input::SetTaken(set));
        }
    }

    fn act(&mut self, node: NodeId, set: HeldSet) {
        let held = &self.nodes[node];
        if held.disk.wanted.set().is_none_or(|disk| disk.number < set.number) {
            let words =
                format!("{} acts on set {} before it is durable", held.uid, set.number.generation);
            return self.broke(words);
        }
        self.note(|w| {
            let names: Vec<&str> = set.entries.keys().map(ReplicaUid::as_str).collect();
            let number = set.number;
            format!(
                "{} takes set {}.{}: {names:?}",
                w.nodes[node].uid, number.epoch, number.generation
            )
        });
        let held = &self.nodes[node];
        let (life, since) = (held.life, self.now);
        let shown = held.engine.containers.values().map(|made| &made.shown.replica);
        let gone: BTreeSet<ReplicaUid> =
            shown.filter(|uid| !set.entries.contains_key(*uid)).cloned().collect();
        self.book.unwanted.retain(|(on, uid), _| *on != node || !set.entries.contains_key(uid));
        for replica in gone {
            self.book.unwanted.entry((node, replica.clone())).or_insert(since);
            self.events.push(since + GONE_MS, Event::CheckGone { node, life, replica, since });
        }
        let set = Arc::new(set);
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if agent.board.act_on(Wanted::Set(Arc::clone(&set))) {
            self.reconcile(node, reconcile::Input::SetTaken(set));
        }
    }

    // ---- the disk ----

    pub(super) fn written(&mut self, node: NodeId, life: Life, write: Write) {
        if !self.lives(node, life) || self.dies_at(node, Moment::BeforeWrite) {
            return;
        }
        self.steps += 1;
        let now = self.now;
        let held = &mut self.nodes[node];
        let full = now < held.disk_full_until;
        let at = now + held.rng.u64(0..3);
        let no = || "the disk is full".to_owned();
        match write {
            Write::Set(set) => {
                let result = if full { Err(no()) } else { Ok(set) };
                if let Ok(set) = &result {
                    let before = held.disk.wanted.set().map(|s| s.number);
                    held.disk.wanted = Wanted::Set(Arc::new((**set).clone()));
                    let number = set.number;
                    if before.is_some_and(|before| before >= number) {
                        let words =
                            format!("the set of {} went from {before:?} to {number:?}", held.uid);
                        return self.broke(words);
                    }
                }
                self.events.push(at, Event::SetPersisted { node, life, result });
            }
            Write::Memory(token, memory) => {
                let result = if full { Err(no()) } else { Ok(()) };
                if !full {
                    held.disk.memory = memory;
                }
                let input = Box::new(reconcile::Input::Persisted { token, result });
                self.events.push(at, Event::Tell { node, life, input });
            }
        }
        if !full {
            self.dies_at(node, Moment::AfterWrite);
        }
    }

    pub(super) fn set_persisted(
        &mut self,
        node: NodeId,
        life: Life,
        result: Result<Box<HeldSet>, String>,
    ) {
        if !self.lives(node, life) {
            return;
        }
        if let Some(session) = self.session_of(node) {
            session.writing = false;
            let persisted = session::Input::Persisted(result.map(|_| ()));
            // What was found out meanwhile comes first; what is said next may build on it.
            let is_news = |input: &Result<session::Input, Ended>| match input {
                Ok(
                    session::Input::Report(_)
                    | session::Input::Absent(_)
                    | session::Input::Facts(_),
                ) => true,
                Ok(
                    session::Input::Message(_)
                    | session::Input::Persisted(_)
                    | session::Input::Trusted(_)
                    | session::Input::Tick,
                )
                | Err(_) => false,
            };
            let waiting = std::mem::take(&mut session.inbox).into_iter();
            let (news, rest): (Vec<_>, Vec<_>) = waiting.partition(is_news);
            session.inbox.extend(news.into_iter().chain([Ok(persisted)]).chain(rest));
            self.session_goes_on(node);
        }
    }

    // ---- the reconciler ----

    pub(super) fn reconcile(&mut self, node: NodeId, input: reconcile::Input) {
        use reconcile::{Effect, Input};
        self.steps += 1;
        let now = self.now;
        let held = &mut self.nodes[node];
        let (at, life) = (held.now(now), held.life);
        let Some(agent) = &mut held.agent else { return };
        let looked = matches!(input, reconcile::Input::Observed { .. });
        if let Input::StepDone { step, .. } | Input::StepFailed { step, .. } = &input {
            agent.stopping.remove(step);
        }
        let effects = agent.machine.step(at, input);
        for effect in &effects {
            if let Effect::Stop { step, replica, id, .. } = effect
                && let Some(made) = held.engine.containers.get(&number(id))
            {
                agent.stopping.insert(*step, (replica.clone(), made.shown.attempt));
            }
        }
        for effect in &effects {
            match effect {
                Effect::Persist { memory, .. } => self.check_remembered(node, memory),
                Effect::Report(report) => self.check_told(node, report),
                _ => {}
            }
        }
        for effect in &effects {
            if let Effect::Remove { replica, id, .. } = effect {
                self.ended_unwanted(node, replica, id);
            }
        }
        let held = &mut self.nodes[node];
        let Some(agent) = &mut held.agent else { return };
        let (mut news, mut stopped) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                Effect::Persist { token, memory } => {
                    let at = now + held.rng.u64(1..20);
                    let write = Write::Memory(token, memory);
                    self.events.push(at, Event::Written { node, life, write });
                }
                Effect::Report(report) => news.extend(agent.board.report(*report)),
                Effect::Absent(uid) => {
                    agent.told.remove(&uid);
                    let under = agent.board.wanted.set().map(|set| set_id(set.number));
                    agent.gone.insert(uid.clone(), under);
                    self.book.failures.remove(&(node, uid.clone()));
                    news.push(agent.board.absent(&uid));
                }
                Effect::EngineIs { available, .. } => news.extend(agent.board.engine_is(available)),
                Effect::StopFetch(step) => stopped.push(step),
                call @ (Effect::Observe(_)
                | Effect::Follow
                | Effect::EnsureNetwork
                | Effect::Fetch { .. }
                | Effect::Create { .. }
                | Effect::Start { .. }
                | Effect::Stop { .. }
                | Effect::Remove { .. }
                | Effect::Probe { .. }) => {
                    if let Effect::Remove { replica, id, .. } = &call {
                        let set = agent.board.wanted.set();
                        let unasked = set.is_some_and(|set| !set.entries.contains_key(replica));
                        let asked_for = (node, id.clone());
                        if unasked {
                            self.book.put_away.insert(asked_for);
                        } else {
                            self.book.put_away.remove(&asked_for);
                        }
                    }
                    let at = now + held.rng.u64(0..4);
                    self.events.push(at, Event::Call { node, life, effect: Box::new(call) });
                }
            }
        }
        for step in stopped {
            self.stop_fetch(node, step);
        }
        for news in news {
            let input = match news {
                News::Report(report) => session::Input::Report(report),
                News::Absent(uid) => session::Input::Absent(uid.to_string()),
                News::Facts(facts) => session::Input::Facts(facts),
            };
            self.session_input(node, input);
        }
        if looked {
            self.looked(node);
        }
        self.plan_reconcile_tick(node);
    }

    /// The engine was looked at, and what it showed is on the board.
    fn looked(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        let life = held.life;
        let Some(agent) = &mut held.agent else { return };
        let first = !agent.board.engine_observed;
        agent.board.looked();
        if !first {
            return;
        }
        match &mut agent.session {
            Some(session) if !session.complete => self.session_hears(node, Err(Ended::AtOnce)),
            Some(_) => {}
            None if agent.dial_at.is_some() && agent.sequence == 0 => {
                agent.dial_at = Some(self.now);
                self.events.push(self.now, Event::Dial { node, life });
            }
            None => {}
        }
    }

    fn plan_reconcile_tick(&mut self, node: NodeId) {
        let held = &mut self.nodes[node];
        let life = held.life;
        let Some(agent) = &mut held.agent else { return };
        let due = agent.machine.deadline();
        let at = due.map_or(u64::MAX, |due| held.clock.when(due).max(self.now));
        if at < agent.reconcile_tick {
            agent.reconcile_tick = at;
            self.events.push(at, Event::ReconcileTick { node, life });
        }
        if let Some(at) = early(&mut held.rng, self.now, at) {
            self.events.push(at, Event::EarlyReconcileTick { node, life });
        }
    }

    /// Nothing is due, whatever the time is.
    pub(super) fn early_reconcile_tick(&mut self, node: NodeId, life: Life) {
        let (now, held) = (self.now, &mut self.nodes[node]);
        let at = held.now(now);
        if held.life != life {
            return;
        }
        let Some(agent) = &mut held.agent else { return };
        if agent.machine.deadline().is_some_and(|due| due <= at.mono) {
            return;
        }
        let effects = agent.machine.step(at, reconcile::Input::Tick);
        if let Some(effect) = effects.first() {
            let words = format!("the reconciler of {} said that nothing was due", held.uid);
            self.broke(format!("{words}, and something was: {}", word(effect)));
        }
    }

    pub(super) fn reconcile_tick(&mut self, node: NodeId, life: Life) {
        if !self.lives(node, life) {
            return;
        }
        let (now, held) = (self.now, &mut self.nodes[node]);
        let mono = held.now(now).mono;
        let Some(agent) = &mut held.agent else { return };
        if now < agent.reconcile_tick {
            return;
        }
        agent.reconcile_tick = u64::MAX;
        if agent.machine.deadline().is_some_and(|due| due <= mono) {
            self.reconcile(node, reconcile::Input::Tick);
        } else {
            self.plan_reconcile_tick(node);
        }
    }

    pub(super) fn tell(&mut self, node: NodeId, life: Life, input: reconcile::Input) {
        if self.lives(node, life) {
            self.reconcile(node, input);
        }
    }

    /// A container runs from now on.
    pub(super) fn container_runs(&mut self, started: Started) {
        self.check_started(&started);
    }
}
