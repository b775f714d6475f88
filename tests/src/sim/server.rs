//! The server's pumps for sessions, as `berthd` drives them.

use super::check::word;
use super::clock::Clock;
use super::events::{Event, Life, LinkId, early};
use super::planning::Planner;
use super::world::World;
use berth_agent_core::session::Ended;
use berth_proto::agent::{Trust, session_request, session_response};
use berth_proto::ids::HostUid;
use berth_proto::record::ClusterRecord;
use berth_server_core::batching::{Batching, Limits};
use berth_server_core::desk::{Admission, Admitted, Desk};
use berth_server_core::dispatch::{Newest, host_set, is_news};
use berth_server_core::farewell::Ended as Over;
use berth_server_core::live::{Live, Moved, Presence};
use berth_server_core::memory::Memory;
use berth_server_core::queue::Queue;
use berth_server_core::restore;
use berth_server_core::session::{Closed, Effect, Input, Registration, Session, Terms};
use berth_server_core::view::View;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::ledger::{Jobs, Then, What};

/// What an agent shall make of the end of its session.
fn shall(why: &Over) -> Ended {
    match why {
        Over::Removed
        | Over::Unknown
        | Over::Quarantined
        | Over::Machine(Closed::Protocol(_) | Closed::WrongHost) => {
            Ended::Refused { stay_away: true }
        }
        Over::Superseded => Ended::Refused { stay_away: false },
        Over::Lost
        | Over::Stopping
        | Over::Unavailable
        | Over::Machine(
            Closed::Removed
            | Closed::Idle(_)
            | Closed::NoHello
            | Closed::Overrun
            | Closed::Unanswered(_),
        ) => Ended::Lost,
    }
}

/// A session as its pump holds it.
#[derive(Debug)]
pub(super) struct ServerSession {
    machine: Session,
    pub(super) host: HostUid,
    /// Its number at the desk.
    pub(super) id: u64,
    effects: VecDeque<Effect>,
    inbox: VecDeque<Input>,
    newest: Option<Newest>,
    /// It is to end.
    order: Option<Over>,
    /// Waits for the ledger.
    busy: bool,
    tick: u64,
    hello: Option<Box<Registration>>,
    /// It has said hello, and no newer one has.
    counts: bool,
}

/// The server: what is on its disk, and the process while it runs.
pub(super) struct Server {
    pub(super) store: Memory,
    pub(super) life: Life,
    pub(super) per_mille: u64,
    pub(super) wall_ahead: i64,
    pub(super) full_until: u64,
    pub(super) slow_until: u64,
    pub(super) arm: Option<(super::script::Moment, u64)>,
    pub(super) process: Option<Process>,
    pub(super) rng: fastrand::Rng,
    /// Its roots and addresses change.
    pub(super) moves: bool,
    /// How often they have changed under what ran.
    pub(super) turned: u64,
}

/// A running server.
pub(super) struct Process {
    pub(super) clock: Clock,
    pub(super) machine: Batching,
    pub(super) live: Live,
    pub(super) desk: Desk,
    pub(super) sessions: BTreeMap<LinkId, ServerSession>,
    pub(super) sets: BTreeMap<HostUid, Newest>,
    pub(super) jobs: Jobs,
    pub(super) planner: Planner,
    pub(super) news: BTreeSet<Moved>,
}

impl Server {
    /// The number of its roots and addresses: newer ones at every start and with every backup, in some of
    /// the runs.
    pub(super) fn trust(&self) -> u64 {
        if self.moves { 1 + u64::from(self.life) + self.turned } else { 1 }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }
}

impl World<'_> {
    /// The server starts from what is on its disk.
    pub(super) fn server_starts(&mut self) {
        if self.server.is_up() {
            return;
        }
        self.steps += 1;
        let now = self.now;
        let store = &self.server.store;
        let entries = store.load(b"").map(|e| (e.key, e.revision, e.value));
        let mut view = match View::load(entries) {
            Ok(view) => view,
            Err(error) => return self.broke(format!("the ledger cannot be read: {error}")),
        };
        view.revision = store.revision();
        self.check_loaded(&view);
        self.server.life += 1;
        let clock = Clock::new(now, self.server.per_mille, self.server.wall_ahead);
        let machine = Batching::new(view.clone(), Limits::JOURNAL);
        let queue = Queue::new(machine.ahead());
        self.server.process = Some(Process {
            clock,
            machine,
            live: Live::default(),
            desk: Desk::default(),
            sessions: BTreeMap::new(),
            sets: BTreeMap::new(),
            jobs: Jobs::default(),
            planner: Planner::new(queue, clock.now(now).mono),
            news: BTreeSet::new(),
        });
        self.note(|w| format!("the server starts at revision {}", w.server.store.revision()));
        self.plan_soon();
    }

    /// The server is gone at once, and with it what was not durable.
    pub(super) fn kill_server(&mut self, down_ms: u64) {
        self.server.arm = None;
        let Some(process) = self.server.process.take() else { return };
        self.server.life += 1;
        self.book.rollouts.gone(self.now);
        self.note(|_| "the server is gone".to_owned());
        for link in process.sessions.keys() {
            self.close_down(*link, Ended::Lost);
        }
        self.events.push(self.now + down_ms.max(1), Event::ServerStarts);
    }

    /// The first records of a cluster.
    pub(super) fn cluster_record(&self) -> Option<ClusterRecord> {
        let uid = "c1".parse().ok()?;
        let wall = Clock::new(0, 1000, 0).wall(0);
        restore::begun(&ClusterRecord::default(), &uid, false, wall)
    }

    fn bundle(&self) -> Trust {
        Trust { version: self.server.trust(), ..Trust::default() }
    }

    /// The root is changed under what runs, and whoever has a session is told.
    pub(super) fn turn_root(&mut self) {
        let Some(process) = &self.server.process else { return };
        if !self.server.moves {
            return;
        }
        let links: Vec<LinkId> = process.sessions.keys().copied().collect();
        self.server.turned += 1;
        self.note(|w| format!("the server tells other roots, number {}", w.server.trust()));
        let newer = self.bundle();
        for link in links {
            self.server_input(link, Input::Trust(Box::new(newer.clone())));
        }
    }

    fn terms(&self, process: &Process) -> Terms {
        let ping = self.script.ping_ms;
        Terms {
            epoch: process.machine.durable().epoch(),
            cluster: "c1".into(),
            ping_interval_ms: ping,
            idle_timeout_ms: 3 * ping,
            status_interval_ms: 100,
            reconnect_window_ms: 1_000,
            version: "0".into(),
            features: Vec::new(),
            trust: self.bundle(),
        }
    }

    /// Changes what is known live.
    pub(super) fn edit_live<T>(
        &mut self,
        edit: impl FnOnce(&mut Live, &Desk, &View) -> T,
    ) -> Option<T> {
        let process = self.server.process.as_mut()?;
        let result = edit(&mut process.live, &process.desk, process.machine.durable());
        let moved = process.live.take_moved();
        if !moved.is_empty() {
            process.news.extend(moved);
            self.plan_soon();
        }
        Some(result)
    }

    // ---- sessions ----

    pub(super) fn open_session(&mut self, link: LinkId) {
        let now = self.now;
        let host = self.nodes[self.links[link].node].uid.clone();
        let Some(process) = &self.server.process else { return };
        let terms = self.terms(process);
        let Some(process) = self.server.process.as_mut() else { return };
        let mono = process.clock.now(now).mono;
        let newest = host_set(process.machine.durable(), &host).map(|set| set.map(Arc::new));
        process.sets.insert(host.clone(), newest.clone());
        let session = ServerSession {
            machine: Session::new(host.clone(), terms, mono),
            id: process.desk.open(&host),
            host: host.clone(),
            effects: VecDeque::new(),
            inbox: VecDeque::new(),
            newest: None,
            order: None,
            busy: false,
            tick: u64::MAX,
            hello: None,
            counts: false,
        };
        process.sessions.insert(link, session);
        self.hand_out(&host, &newest);
    }

    /// Tells all sessions of a host of its newest set.
    fn hand_out(&mut self, host: &HostUid, newest: &Newest) {
        for link in self.links_of(host) {
            let Some(session) = self.server_session(link) else { continue };
            session.newest = Some(newest.clone());
            self.go_on(link);
        }
    }

    pub(super) fn links_of(&self, host: &HostUid) -> Vec<LinkId> {
        let Some(process) = &self.server.process else { return Vec::new() };
        process.sessions.iter().filter(|(_, s)| s.host == *host).map(|(link, _)| *link).collect()
    }

    fn server_session(&mut self, link: LinkId) -> Option<&mut ServerSession> {
        self.server.process.as_mut()?.sessions.get_mut(&link)
    }

    /// Works out the sets of these hosts anew.
    pub(super) fn refresh_sets(&mut self, hosts: &BTreeSet<HostUid>) {
        for host in hosts {
            let Some(process) = self.server.process.as_mut() else { return };
            let Some(held) = process.sets.get_mut(host) else { continue };
            let newest = host_set(process.machine.durable(), host).map(|set| set.map(Arc::new));
            if is_news(held, &newest) {
                held.clone_from(&newest);
                self.hand_out(host, &newest);
            }
        }
    }

    pub(super) fn server_input(&mut self, link: LinkId, input: Input) {
        if let Some(session) = self.server_session(link) {
            session.inbox.push_back(input);
            self.go_on(link);
        }
    }

    /// Carries out what waits, as far as nothing has to be waited for.
    fn go_on(&mut self, link: LinkId) {
        loop {
            let now = self.now;
            let Some(process) = self.server.process.as_mut() else { return };
            let at = process.clock.now(now);
            let Some(session) = process.sessions.get_mut(&link) else { return };
            if session.busy {
                return;
            }
            if let Some(effect) = session.effects.pop_front() {
                self.server_effect(link, effect);
                continue;
            }
            if let Some(why) = session.order.clone()
                && (session.inbox.is_empty() || self.server.rng.bool())
            {
                return self.over(link, why);
            }
            let input = match session.newest.take() {
                Some(Some(newest)) => Input::Newest(newest),
                Some(None) => continue,
                None => match session.inbox.pop_front() {
                    Some(input) => input,
                    None => break,
                },
            };
            self.steps += 1;
            if let Input::Message(message) = &input
                && let Some(session_request::Item::SetAck(_)) = &message.item
            {
                self.links[link].unanswered = false;
            }
            session.effects.extend(session.machine.step(at, input));
        }
        self.plan_server_tick(link);
    }

    fn plan_server_tick(&mut self, link: LinkId) {
        let now = self.now;
        let life = self.server.life;
        let Some(process) = self.server.process.as_mut() else { return };
        let Some(session) = process.sessions.get_mut(&link) else { return };
        // One that waits for the ledger is looked after when it has waited.
        let Some(due) = session.machine.deadline().filter(|_| !session.busy) else { return };
        let at = process.clock.when(due).max(now);
        if at < session.tick {
            session.tick = at;
            self.events.push(at, Event::ServerTick { life, link });
        }
        if let Some(at) = early(&mut self.server.rng, now, at) {
            self.events.push(at, Event::EarlyServerTick { life, link });
        }
    }

    /// Nothing is due, whatever the time is.
    pub(super) fn early_server_tick(&mut self, life: Life, link: LinkId) {
        let now = self.now;
        if self.server.life != life {
            return;
        }
        let Some(process) = self.server.process.as_mut() else { return };
        let at = process.clock.now(now);
        let Some(session) = process.sessions.get_mut(&link) else { return };
        let waits = session.busy || !session.inbox.is_empty() || !session.effects.is_empty();
        if waits || session.machine.deadline().is_none_or(|due| due <= at.mono) {
            return;
        }
        let effects = session.machine.step(at, Input::Tick);
        if let Some(effect) = effects.first() {
            let words = format!("the session of {} said that nothing was due", session.host);
            self.broke(format!("{words}, and something was: {}", word(effect)));
        }
    }

    pub(super) fn server_tick(&mut self, life: Life, link: LinkId) {
        let now = self.now;
        if self.server.life != life {
            return;
        }
        let Some(process) = self.server.process.as_mut() else { return };
        let mono = process.clock.now(now).mono;
        let Some(session) = process.sessions.get_mut(&link) else { return };
        if now < session.tick {
            return;
        }
        session.tick = u64::MAX;
        if session.machine.deadline().is_some_and(|due| due <= mono) && !session.busy {
            session.inbox.push_back(Input::Tick);
            self.go_on(link);
        } else {
            self.plan_server_tick(link);
        }
    }

    pub(super) fn server_effect(&mut self, link: LinkId, effect: Effect) {
        let now = self.now;
        let Some(process) = self.server.process.as_mut() else { return };
        let at = process.clock.now(now);
        let Some(session) = process.sessions.get_mut(&link) else { return };
        let (host, id) = (session.host.clone(), session.id);
        match effect {
            Effect::Send(message) => {
                if let Some(session_response::Item::SetBegin(_)) = &message.item {
                    self.check_offered(link);
                }
                self.send_down(link, message);
            }
            Effect::Register(said) => {
                let view = process.machine.durable();
                let admission = process.desk.judge(view, &host, id, &said.boot_nonce, at.mono);
                match admission {
                    Admission::Welcome { ends } => {
                        session.busy = true;
                        session.hello = Some(said.clone());
                        session.counts = true;
                        for other in process.sessions.values_mut().filter(|s| s.host == host) {
                            other.counts &= other.id >= id;
                        }
                        let hello = self.book.hello.entry(host.clone()).or_default();
                        *hello = (*hello).max(id);
                        for older in ends {
                            if let Some(older) = self.link_at(older) {
                                self.order(older, Over::Superseded);
                            }
                        }
                        self.check_boot(&host, &said.boot_nonce);
                        let what = What::Registration(said);
                        self.keep(host, what, at.wall, Then::Registered(link));
                    }
                    Admission::Removed { wipe } => {
                        for link in self.links_of(&host) {
                            self.server_input_later(link, Input::Removed { wipe });
                        }
                    }
                    Admission::Unknown => self.over(link, Over::Unknown),
                    Admission::Quarantined => self.over(link, Over::Quarantined),
                    Admission::TwoBoots => {
                        if !self.book.cloned.contains(&host) {
                            self.broke(format!("{host} is taken for two machines and is one"));
                        }
                        let Some(process) = self.server.process.as_mut() else { return };
                        let Some(session) = process.sessions.get_mut(&link) else { return };
                        session.busy = true;
                        let why = "two boots use this identity".to_owned();
                        self.keep(host, What::Quarantine(why), at.wall, Then::Quarantined(link));
                    }
                    Admission::Superseded => self.over(link, Over::Superseded),
                }
            }
            Effect::Take { sequence, reports, absent } => {
                self.book.taken.entry(link).or_default().insert(sequence);
                let of = (&host, id, sequence);
                let admitted = self.edit_live(|live, desk, view| {
                    desk.statuses(live, view, of, (&reports, &absent), at)
                });
                match admitted {
                    Some(Admitted::News { held }) => {
                        self.check_believed(&host, id);
                        let what = What::Statuses(reports, absent, held);
                        self.keep(host, what, at.wall, Then::Taken(link, sequence));
                    }
                    Some(Admitted::Known) => self.server_input_later(link, Input::Taken(sequence)),
                    Some(Admitted::Superseded) | None => self.over(link, Over::Unavailable),
                }
            }
            Effect::Facts(facts) => {
                if process.desk.is_current(&host, id) {
                    self.wait_for(link);
                    self.keep(host, What::Facts(facts), at.wall, Then::Resume(link));
                }
            }
            Effect::Acknowledged { number, known } => {
                self.check_acknowledged(link, number);
                let current =
                    self.edit_live(|live, desk, _| desk.acknowledged(live, &host, id, number));
                if let Some(known) = known.filter(|_| current == Some(true)) {
                    self.wait_for(link);
                    let what = What::NeverThere(number, known);
                    self.keep(host, what, at.wall, Then::Resume(link));
                }
            }
            Effect::Refused { offered, held, verdict, .. } => {
                self.check_refused(link, offered, held, verdict);
                self.edit_live(|live, desk, _| {
                    desk.refused(live, (&host, id), offered, held, verdict);
                });
            }
            Effect::TrustAcknowledged(version) => {
                self.wait_for(link);
                self.keep(host, What::Trusts(version), at.wall, Then::Resume(link));
            }
            Effect::ClockOffset(ms) => {
                self.edit_live(|live, desk, _| desk.clock(live, (&host, id), ms, at.wall));
            }
            Effect::Close(why) => {
                if let Closed::Protocol(what) = &why
                    && !self.links[link].doubled
                {
                    self.broke(format!("a session of {host} breaks the protocol: {what}"));
                }
                self.over(link, Over::of_machine(why));
            }
        }
    }

    /// Nothing more is done for a session until the ledger has answered.
    fn wait_for(&mut self, link: LinkId) {
        if let Some(session) = self.server_session(link) {
            session.busy = true;
        }
    }

    /// A session is told that it is over. It hears of it a moment later, and of what else waits for it
    /// in any order.
    pub(super) fn order(&mut self, link: LinkId, why: Over) {
        let at = self.now + self.a_moment_ms();
        self.events.push(at, Event::Order { life: self.server.life, link, why });
    }

    pub(super) fn ordered(&mut self, life: Life, link: LinkId, why: Over) {
        if self.server.life != life {
            return;
        }
        if let Some(session) = self.server_session(link) {
            session.order.get_or_insert(why);
            self.go_on(link);
        }
    }

    /// After what is being carried out now.
    fn server_input_later(&mut self, link: LinkId, input: Input) {
        if let Some(session) = self.server_session(link) {
            session.inbox.push_back(input);
        }
    }

    fn link_at(&self, id: u64) -> Option<LinkId> {
        let sessions = &self.server.process.as_ref()?.sessions;
        sessions.iter().find(|(_, s)| s.id == id).map(|(link, _)| *link)
    }

    /// A session ends at the server.
    pub(super) fn over(&mut self, link: LinkId, why: Over) {
        let now = self.now;
        let Some(process) = self.server.process.as_mut() else { return };
        let Some(session) = process.sessions.remove(&link) else { return };
        let at = process.clock.now(now);
        let before = process.live.presence(&session.host);
        process.desk.closed(&mut process.live, &session.host, session.id, at);
        self.edit_live(|_, _, _| ());
        let how = why.words().map_or(Ended::Lost, |words| Ended::told(words.farewell.code()));
        if how != shall(&why) {
            let words = format!("{} is told {how:?}", session.host);
            return self.broke(format!("{words}, and its session has ended because {why}"));
        }
        self.close_down(link, how);
        self.check_presence(&session.host, before);
    }

    /// A session is over, or its hello was taken in: its host is present as long as one of them counts,
    /// and away since the last of them ended.
    fn check_presence(&mut self, host: &HostUid, before: Presence) {
        let Some(process) = &self.server.process else { return };
        let presence = process.live.presence(host);
        let counts = process.sessions.values().any(|s| s.host == *host && s.counts);
        let present = counts && self.book.present.contains(host);
        if !present {
            self.book.present.remove(host);
        }
        if present != (presence == Presence::Present) {
            return self.broke(format!("{host} is {presence:?}, with a session: {present}"));
        }
        if let (Presence::Away(since), Presence::Away(later)) = (before, presence)
            && since != later
        {
            self.broke(format!("{host} was away since {since:?} and is since {later:?}"));
        }
    }

    pub(super) fn up_closed(&mut self, link: LinkId) {
        // Whoever waits for the ledger sees it afterwards.
        self.ordered(self.links[link].server_life, link, Over::Lost);
    }

    /// The ledger has kept, or has not, what a session waits for.
    pub(super) fn resumed(&mut self, then: Then, host: &HostUid, kept: bool) {
        match then {
            Then::Registered(link) => {
                let now = self.now;
                let Some(process) = self.server.process.as_mut() else { return };
                let at = process.clock.now(now);
                let Some(session) = process.sessions.get_mut(&link) else { return };
                session.busy = false;
                let (id, said) = (session.id, session.hello.take());
                if !kept {
                    return self.over(link, Over::Unavailable);
                }
                self.refresh_sets(&BTreeSet::from([host.clone()]));
                let Some(said) = said else { return };
                let current = self.edit_live(|live, desk, view| {
                    desk.registered(live, view, (host, id), &said, at)
                });
                if current == Some(true) {
                    self.book.present.insert(host.clone());
                    self.check_registered(host, id);
                    self.check_heard(host, &said);
                    self.check_presence(host, Presence::Unknown);
                    let newest = |p: &Process| p.sets.get(host).cloned().flatten();
                    let newest = self.server.process.as_ref().and_then(newest);
                    let Some(session) = self.server_session(link) else { return };
                    session.inbox.push_front(Input::Registered(newest));
                    self.go_on(link);
                } else {
                    self.over(link, Over::Superseded);
                }
            }
            Then::Taken(link, sequence) => {
                if kept {
                    self.check_kept(link, sequence);
                    self.server_input(link, Input::Taken(sequence));
                } else {
                    self.over(link, Over::Unavailable);
                }
            }
            Then::Resume(link) => {
                if let Some(session) = self.server_session(link) {
                    session.busy = false;
                    if kept {
                        self.go_on(link);
                    } else {
                        self.over(link, Over::Unavailable);
                    }
                }
            }
            Then::Quarantined(_) => {
                if !kept {
                    // It is seen again when the other boot comes back.
                    self.book.boots.remove(host);
                }
                for link in self.links_of(host) {
                    self.order(link, Over::Quarantined);
                }
                // The one that has shown it is not welcome in any case.
                if let Then::Quarantined(link) = then {
                    self.over(link, Over::Quarantined);
                }
            }
        }
    }
}
