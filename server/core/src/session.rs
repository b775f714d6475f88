//! The server's end of one session with one agent.
//!
//! A machine without I/O: messages, the newest set and the time go in, effects come out. It never
//! decides what a host shall run; it makes sure that what was decided arrives whole, once, and that
//! what the agent says is taken in before it is acknowledged.
//!
//! What always holds:
//!
//! 1. Nothing is taken from an agent before its hello and every page of its observed set are here.
//! 2. One set at a time is on its way; while it is, only the newest of those that follow is kept.
//! 3. A body the agent holds is not sent again.
//! 4. A status is acknowledged only after [`Input::Taken`] has said that it and all before it are kept.
//! 5. Silence for longer than the idle timeout ends the session, and nothing else.
//! 6. No set is offered, and nobody is welcome, before the hello is kept: a set that was worked out
//!    without what the hello has told may lack what only this copy of the host runs.
//! 7. Whoever has just been heard is not asked whether it is there: an idle session costs one ping of
//!    the agent and its answer in each interval.

use berth_proto::agent::{
    self, Hello, ReplicaReport, SetAck, SetBegin, SetEnd, SetEntry, SetId, SetPage, SetVerdict,
    session_request, session_response,
};
use berth_proto::convert::{timestamp, wall};
use berth_proto::ids::{Digest, Epoch, Generation, HostUid, Mono, Now, SetNumber, Wall};
use prost::Message as _;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Encoded bytes of entries and bodies in one page. A quarter of the 1 MiB a message may have, so
/// that a page is never refused for its framing.
pub const PAGE_BYTES: usize = 256 * 1024;
/// Pages of an observed set: at 500 reports each this is 50,000 replicas on one host, far above
/// what an engine runs.
pub const MAX_OBSERVED_PAGES: u32 = 100;
/// Encoded bytes of a hello with all its pages: 50,000 reports of some 600 bytes. Held in memory until
/// the last page is here, by whoever has a host's certificate.
pub const MAX_HELLO_BYTES: usize = 32 * 1024 * 1024;
/// Reports in one message, as the contract says.
pub const MAX_REPORTS: usize = 500;
/// Characters of a join's instance and of a boot's nonce: both are random numbers of at most 36, and are
/// remembered.
pub const MAX_ID_BYTES: usize = 64;
/// Replicas remembered as what an agent may have something of: as many as a hello may tell, twice.
const MAX_KNOWN: usize = 2 * MAX_OBSERVED_PAGES as usize * MAX_REPORTS;
/// How long a hello with its pages may take: a slow link carries 1 MiB in 30 s at 280 kbit/s.
pub const HELLO_DEADLINE_MS: u64 = 30_000;
/// Wait before a set that the agent could not make durable is sent again.
pub const RETRY_SET_MS: u64 = 5_000;
/// A set that is not acknowledged for so long will not be: 2 MiB in that time take 30 kbit/s. Silence
/// ends a session sooner; this is for an agent that speaks and does not answer.
pub const SET_DEADLINE_MS: u64 = 600_000;
/// Status messages that may wait to be kept. The agent sends the next only every 100 ms, so this is
/// two seconds of them; more means that the ledger has stopped.
pub const MAX_UNTAKEN: usize = 20;
/// A clock's offset that has changed by less is not told again: a person who compares logs does not
/// see it, and each telling costs everybody who watches hosts.
pub const CLOCK_STEP_MS: i64 = 500;

/// A host's whole set, ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct HostSet {
    /// Its number.
    pub number: SetNumber,
    /// Its entries, in order of replica uid.
    pub entries: Vec<SetEntry>,
    /// The bytes of each body the entries name.
    pub bodies: BTreeMap<Digest, Arc<[u8]>>,
    /// Digest over the entries.
    pub digest: Digest,
}

impl HostSet {
    /// A set of `entries`; `bodies` must hold the bytes each entry names.
    #[must_use]
    pub fn new(
        number: SetNumber,
        mut entries: Vec<SetEntry>,
        bodies: BTreeMap<Digest, Arc<[u8]>>,
    ) -> Self {
        entries.sort_by(|a, b| a.replica_uid.cmp(&b.replica_uid));
        let digest = berth_proto::sets::set_digest(&entries);
        Self { number, entries, bodies, digest }
    }
}

/// What the server tells every agent at the welcome.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The server's epoch.
    pub epoch: Epoch,
    /// The cluster's uid.
    pub cluster: String,
    /// How often to ping.
    pub ping_interval_ms: u64,
    /// Silence for longer ends the session.
    pub idle_timeout_ms: u64,
    /// Shortest time between two status messages.
    pub status_interval_ms: u64,
    /// Window for dialling again.
    pub reconnect_window_ms: u64,
    /// The server's version.
    pub version: String,
    /// Features the server knows.
    pub features: Vec<String>,
    /// Roots and addresses; told to an agent that holds an older bundle.
    pub trust: agent::Trust,
}

/// Why a session gets no sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Since a restore; not all that runs is known and decided about.
    Observing,
    /// Two boots share the identity.
    Quarantined,
    /// The join waits for approval.
    WaitingForApproval,
}

impl Hold {
    /// Words for the agent's log and its operator.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Observing => {
                "the server was restored from a backup; nothing changes here until all that runs is \
                 known and decided about"
            }
            Self::Quarantined => {
                "two hosts use this identity; an operator has to release the quarantine"
            }
            Self::WaitingForApproval => "an operator has to approve this host",
        }
    }
}

/// What goes in.
#[derive(Debug, Clone)]
pub enum Input {
    /// The agent said this.
    Message(Box<agent::SessionRequest>),
    /// What of the hello must be durable is: answers [`Effect::Register`]. With the host's newest set,
    /// worked out since; what was told before counts no more. `None`: there is no such host.
    Registered(Option<Result<Arc<HostSet>, Hold>>),
    /// The newest set of this host, or why it gets none.
    Newest(Result<Arc<HostSet>, Hold>),
    /// The statuses of this sequence are kept; in whatever order they are.
    Taken(u64),
    /// The host was removed.
    Removed {
        /// Its containers, artifacts and keys shall go.
        wipe: bool,
    },
    /// A ticket for a reverse connection.
    Open(agent::OpenReverse),
    /// Roots or addresses that agents are told have changed.
    Trust(Box<agent::Trust>),
    /// Time has passed.
    Tick,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Say this to the agent.
    Send(Box<agent::SessionResponse>),
    /// The agent has introduced itself; comes once, before anything else of it. Answer with
    /// [`Input::Registered`]; until then it is given nothing else to take.
    Register(Box<Registration>),
    /// Keep these; answer with [`Input::Taken`].
    Take {
        /// The message's number.
        sequence: u64,
        /// Newest statuses.
        reports: Vec<ReplicaReport>,
        /// Replicas of which nothing is left.
        absent: Vec<String>,
    },
    /// The host's facts have changed.
    Facts(Box<berth_proto::api::HostFacts>),
    /// The agent has made this set durable.
    Acknowledged {
        /// Which.
        number: SetNumber,
        /// Every replica that it may have something of: it was there at the hello, or was in a set that
        /// it took since. `None`: that is not known, because the hello did not tell what the engine shows.
        known: Option<BTreeSet<String>>,
    },
    /// The agent refused a set. What it holds is in `held`; a person must look when `held` is newer
    /// than anything this server made.
    Refused {
        /// What was refused.
        offered: SetNumber,
        /// What the agent holds.
        held: Option<SetNumber>,
        /// Why.
        verdict: SetVerdict,
        /// The agent's words, not to be trusted.
        message: String,
    },
    /// Roots and endpoints of this number are durable there.
    TrustAcknowledged(u64),
    /// The host's clock is so far ahead, in milliseconds.
    ClockOffset(i64),
    /// The session is over; nothing is to be sent after what was sent before.
    Close(Closed),
}

/// Who the agent said it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration {
    /// The join's instance.
    pub instance: String,
    /// Random number of this boot of this copy.
    pub boot_nonce: String,
    /// Start of the agent.
    pub agent_start: u64,
    /// Version of the agent.
    pub agent_version: String,
    /// Facts, when it gave any.
    pub facts: Option<berth_proto::api::HostFacts>,
    /// The set it holds; `None`: none.
    pub held: Option<SetNumber>,
    /// The complete observed set.
    pub observed: Vec<ReplicaReport>,
    /// The engine was asked; `false`: `observed` is only what the agent remembers.
    pub engine_observed: bool,
    /// Newest roots and endpoints it holds.
    pub trust_version: u64,
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// It said something before its hello, or a second hello.
    #[error("the agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// The hello names another host than the certificate.
    #[error("the agent's hello names another host than its certificate")]
    WrongHost,
    /// Nothing was heard for too long.
    #[error("nothing was heard from the agent for {0} ms")]
    Idle(u64),
    /// The hello did not come in time.
    #[error("the agent's hello was not complete in time")]
    NoHello,
    /// The host was removed, and has been told.
    #[error("the host was removed")]
    Removed,
    /// Too many statuses wait to be kept.
    #[error("too many statuses wait to be kept")]
    Overrun,
    /// A set was neither acknowledged nor refused.
    #[error("the agent has not answered a set for {0} ms")]
    Unanswered(u64),
}

#[derive(Debug)]
enum State {
    AwaitHello,
    AwaitPages { hello: Box<Hello>, next: u32, bytes: usize },
    Registering { time: Option<Wall>, trust_version: u64 },
    Live,
    Over,
}

#[derive(Debug)]
struct Flight {
    number: SetNumber,
    since: Mono,
    bodies: BTreeSet<String>,
    replicas: Vec<String>,
}

/// The server's end of one session.
#[derive(Debug)]
pub struct Session {
    host: HostUid,
    terms: Terms,
    state: State,
    started: Mono,
    heard: Mono,
    pinged: Mono,
    ping_id: u64,
    clock: Option<i64>,
    newest: Option<Result<Arc<HostSet>, Hold>>,
    held: Option<(SetNumber, String)>,
    held_bodies: BTreeSet<String>,
    /// Replicas that the agent may have something of; `None`: not known.
    known: Option<BTreeSet<String>>,
    flight: Option<Flight>,
    not_before: Mono,
    refused: Option<SetNumber>,
    /// Number of the newest roots and addresses that the agent has said it holds.
    trusted: u64,
    /// Statuses in the order in which they came, and whether they are kept.
    untaken: VecDeque<(u64, bool)>,
}

impl Session {
    /// A session of the host that the certificate names.
    #[must_use]
    pub fn new(host: HostUid, terms: Terms, now: Mono) -> Self {
        Self {
            host,
            terms,
            state: State::AwaitHello,
            started: now,
            heard: now,
            pinged: now,
            ping_id: 0,
            clock: None,
            newest: None,
            held: None,
            held_bodies: BTreeSet::new(),
            known: None,
            flight: None,
            not_before: now,
            refused: None,
            trusted: 0,
            untaken: VecDeque::new(),
        }
    }

    /// The host this session is of.
    #[must_use]
    pub fn host(&self) -> &HostUid {
        &self.host
    }

    /// When [`Input::Tick`] is due at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let idle = self.heard.plus_ms(self.terms.idle_timeout_ms);
        let mut due = match &self.state {
            State::AwaitHello | State::AwaitPages { .. } => {
                idle.min(self.started.plus_ms(HELLO_DEADLINE_MS))
            }
            State::Registering { .. } => idle,
            State::Live => {
                let answer = self.flight.as_ref().map(|f| f.since.plus_ms(SET_DEADLINE_MS));
                idle.min(self.ping_due()).min(answer.unwrap_or(idle))
            }
            State::Over => return None,
        };
        if self.wants_to_send() && !bug!(SetRetryForgotten) {
            due = due.min(self.not_before);
        }
        Some(due)
    }

    /// One step.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        if matches!(self.state, State::Over) {
            return out;
        }
        match input {
            Input::Message(message) => {
                self.heard = now.mono;
                self.message(now, *message, &mut out);
            }
            Input::Registered(newest) => self.registered(now, newest, &mut out),
            Input::Newest(newest) => self.newest = Some(newest),
            Input::Taken(sequence) => {
                for (of, taken) in &mut self.untaken {
                    *taken |= *of == sequence || (bug!(EarlierTakenForKept) && *of < sequence);
                }
                // An acknowledgement speaks for all before it: none of them may still be waited for.
                let mut last = None;
                while let Some((sequence, true)) = self.untaken.front() {
                    last = Some(*sequence);
                    self.untaken.pop_front();
                }
                if let Some(sequence) = last {
                    let ack = agent::StatusAck { sequence };
                    send(&mut out, session_response::Item::StatusAck(ack));
                }
            }
            Input::Removed { wipe } => {
                send(&mut out, session_response::Item::Removed(agent::Removed { wipe }));
                self.close(Closed::Removed, &mut out);
            }
            Input::Open(open) => {
                // Before the welcome there is nobody to serve it; the ticket then simply ends.
                if self.is_live() {
                    send(&mut out, session_response::Item::Open(open));
                }
            }
            Input::Trust(newer) => self.trust(*newer, &mut out),
            Input::Tick => self.tick(now, &mut out),
        }
        self.offer(now, &mut out);
        out
    }

    fn is_live(&self) -> bool {
        matches!(self.state, State::Live)
    }

    /// The agent pings first; half an interval late it is asked.
    fn ping_due(&self) -> Mono {
        let interval = self.terms.ping_interval_ms;
        self.heard.plus_ms(interval + interval / 2).max(self.pinged.plus_ms(interval))
    }

    /// Tells the offset of the agent's clock when it has changed.
    fn clock(&mut self, offset_ms: i64, out: &mut Vec<Effect>) {
        if bug!(ClockToldOnce) && self.clock.is_some() {
            return;
        }
        if self.clock.is_none_or(|told| told.abs_diff(offset_ms) >= CLOCK_STEP_MS.unsigned_abs()) {
            self.clock = Some(offset_ms);
            out.push(Effect::ClockOffset(offset_ms));
        }
    }

    fn close(&mut self, why: Closed, out: &mut Vec<Effect>) {
        self.state = State::Over;
        out.push(Effect::Close(why));
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Effect>) {
        let silent = now.mono.since_ms(self.heard);
        if silent >= self.terms.idle_timeout_ms {
            return self.close(Closed::Idle(silent), out);
        }
        match self.state {
            State::AwaitHello | State::AwaitPages { .. } => {
                if now.mono.since_ms(self.started) >= HELLO_DEADLINE_MS {
                    self.close(Closed::NoHello, out);
                }
            }
            State::Live => {
                let unanswered = self.flight.as_ref().map_or(0, |f| now.mono.since_ms(f.since));
                if unanswered >= SET_DEADLINE_MS {
                    return self.close(Closed::Unanswered(unanswered), out);
                }
                if now.mono >= self.ping_due() {
                    self.pinged = now.mono;
                    self.ping_id += 1;
                    let ping = agent::Ping { id: self.ping_id, time: Some(timestamp(now.wall)) };
                    send(out, session_response::Item::Ping(ping));
                }
            }
            State::Registering { .. } | State::Over => {}
        }
    }

    fn message(&mut self, now: Now, message: agent::SessionRequest, out: &mut Vec<Effect>) {
        use session_request::Item;
        let Some(item) = message.item else {
            // A newer agent may say what this server does not know: hearing it is enough.
            return;
        };
        match (&mut self.state, item) {
            (State::AwaitHello, Item::Hello(hello)) => self.hello(hello, out),
            (State::AwaitHello, _) => {
                self.close(Closed::Protocol("the first message was not a hello"), out);
            }
            (State::AwaitPages { hello, next, bytes }, Item::Observed(page)) => {
                *bytes += page.encoded_len();
                if *bytes > MAX_HELLO_BYTES {
                    return self.close(Closed::Protocol("the observed set is too large"), out);
                }
                if page.number != *next || page.observed.len() > bound!(MAX_REPORTS, 2) {
                    return self.close(
                        Closed::Protocol("the observed set's pages are out of order or too long"),
                        out,
                    );
                }
                hello.observed.extend(page.observed);
                hello.bodies.extend(page.bodies);
                *next += 1;
                if *next > hello.observed_pages {
                    let hello = std::mem::take(hello.as_mut());
                    self.register(hello, out);
                }
            }
            (State::AwaitPages { .. }, _) => {
                self.close(Closed::Protocol("the observed set was interrupted"), out);
            }
            (State::Registering { .. }, _) => {
                self.close(Closed::Protocol("it spoke before its welcome"), out);
            }
            (State::Live, item) => self.live(now, item, out),
            (State::Over, _) => {}
        }
    }

    fn hello(&mut self, hello: Hello, out: &mut Vec<Effect>) {
        if hello.host_uid != self.host.as_str() {
            return self.close(Closed::WrongHost, out);
        }
        if hello.instance.len() > MAX_ID_BYTES || hello.boot_nonce.len() > MAX_ID_BYTES {
            return self
                .close(Closed::Protocol("the instance or the boot's nonce is too long"), out);
        }
        if hello.observed_pages > MAX_OBSERVED_PAGES
            || hello.observed.len() > bound!(MAX_REPORTS, 2)
        {
            return self.close(Closed::Protocol("the observed set is too large"), out);
        }
        if hello.observed_pages == 0 {
            return self.register(hello, out);
        }
        let bytes = hello.encoded_len();
        self.state = State::AwaitPages { hello: Box::new(hello), next: 1, bytes };
    }

    fn register(&mut self, hello: Hello, out: &mut Vec<Effect>) {
        let time = hello.time.as_ref().map(wall);
        self.state = State::Registering { time, trust_version: hello.trust_version };
        let held = hello.held.as_ref().map(number);
        self.held = held.map(|number| (number, hello.held_digest.clone()));
        self.held_bodies = hello.bodies.into_iter().collect();
        let observed = || hello.observed.iter().map(|r| r.replica_uid.clone()).collect();
        self.known = hello.engine_observed.then(observed);
        out.push(Effect::Register(Box::new(Registration {
            instance: hello.instance,
            boot_nonce: hello.boot_nonce,
            agent_start: hello.agent_start,
            agent_version: hello.agent_version,
            facts: hello.facts,
            held,
            observed: hello.observed,
            engine_observed: hello.engine_observed,
            trust_version: hello.trust_version,
        })));
    }

    fn registered(
        &mut self,
        now: Now,
        newest: Option<Result<Arc<HostSet>, Hold>>,
        out: &mut Vec<Effect>,
    ) {
        let State::Registering { time, trust_version } = self.state else { return };
        self.state = State::Live;
        self.trusted = trust_version;
        self.pinged = now.mono;
        self.newest = newest;
        if let Some(time) = time {
            self.clock(time.0.saturating_sub(now.wall.0), out);
        }
        let hold = match &self.newest {
            Some(Err(hold)) => Some(*hold),
            Some(Ok(_)) | None => None,
        };
        send(
            out,
            session_response::Item::Welcome(agent::Welcome {
                epoch: self.terms.epoch.0,
                ping_interval_ms: self.terms.ping_interval_ms,
                idle_timeout_ms: self.terms.idle_timeout_ms,
                status_interval_ms: self.terms.status_interval_ms,
                reconnect_window_ms: self.terms.reconnect_window_ms,
                time: Some(timestamp(now.wall)),
                cluster: self.terms.cluster.clone(),
                observe_only: hold.is_some(),
                reason: hold.map(|h| h.words().to_owned()).unwrap_or_default(),
                server_version: self.terms.version.clone(),
                features: self.terms.features.clone(),
            }),
        );
        if self.terms.trust.version > trust_version && !bug!(TrustNeverTold) {
            send(out, session_response::Item::Trust(self.terms.trust.clone()));
        }
    }

    /// Roots or addresses have changed: the agent is told now, or with its welcome. Again, as long as it has
    /// not said that it holds them: it may not have been able to keep them.
    fn trust(&mut self, newest: agent::Trust, out: &mut Vec<Effect>) {
        if newest.version < self.terms.trust.version {
            return;
        }
        self.terms.trust = newest;
        if self.terms.trust.version <= self.trusted {
            return;
        }
        match self.state {
            State::Live if bug!(NewerTrustNeverTold) => {}
            State::Live => {
                send(out, session_response::Item::Trust(self.terms.trust.clone()));
            }
            State::AwaitHello
            | State::AwaitPages { .. }
            | State::Registering { .. }
            | State::Over => {}
        }
    }

    fn live(&mut self, now: Now, item: session_request::Item, out: &mut Vec<Effect>) {
        use session_request::Item;
        match item {
            Item::Hello(_) => self.close(Closed::Protocol("a second hello"), out),
            Item::Observed(_) => self.close(Closed::Protocol("a page without its hello"), out),
            Item::SetAck(ack) => self.set_ack(now, ack, out),
            Item::Statuses(statuses) => {
                let most = bound!(MAX_REPORTS, 2);
                if statuses.reports.len() > most || statuses.absent.len() > most {
                    return self.close(Closed::Protocol("a status message is too long"), out);
                }
                if self.untaken.len() >= MAX_UNTAKEN {
                    return self.close(Closed::Overrun, out);
                }
                self.untaken.push_back((statuses.sequence, false));
                if let Some(known) = &mut self.known {
                    known.extend(statuses.reports.iter().map(|r| r.replica_uid.clone()));
                    for gone in &statuses.absent {
                        known.remove(gone);
                    }
                }
                // Nobody has so many: whatever is named, memory stays bounded.
                self.known = self.known.take().filter(|known| known.len() <= MAX_KNOWN);
                if bug!(StatusAcknowledgedUnkept) {
                    let sequence = statuses.sequence;
                    let ack = agent::StatusAck { sequence };
                    send(out, session_response::Item::StatusAck(ack));
                }
                out.push(Effect::Take {
                    sequence: statuses.sequence,
                    reports: statuses.reports,
                    absent: statuses.absent,
                });
            }
            Item::Facts(facts) => out.push(Effect::Facts(Box::new(facts))),
            Item::Ping(ping) => {
                // Late by the way here, which is within the resolution that matters to a person.
                if let Some(time) = ping.time {
                    self.clock(wall(&time).0.saturating_sub(now.wall.0), out);
                }
                let pong = agent::Pong { id: ping.id, time: Some(timestamp(now.wall)) };
                send(out, session_response::Item::Pong(pong));
            }
            Item::Pong(pong) => {
                // Half the round trip is within the resolution that matters to a person.
                if let Some(time) = pong.time
                    && pong.id == self.ping_id
                {
                    let half = i64::try_from(now.mono.since_ms(self.pinged) / 2).unwrap_or(0);
                    let offset = wall(&time).0.saturating_add(half).saturating_sub(now.wall.0);
                    self.clock(offset, out);
                }
            }
            Item::TrustAck(ack) => {
                self.trusted = self.trusted.max(ack.version);
                out.push(Effect::TrustAcknowledged(ack.version));
            }
        }
    }

    fn set_ack(&mut self, now: Now, ack: SetAck, out: &mut Vec<Effect>) {
        let Some(flight) = self.flight.take() else {
            return self.close(Closed::Protocol("an acknowledgement of no set"), out);
        };
        if ack.id.as_ref().map(number) != Some(flight.number) {
            return self.close(Closed::Protocol("an acknowledgement of another set"), out);
        }
        let held = ack.held.as_ref().map(number);
        match ack.verdict() {
            SetVerdict::Taken | SetVerdict::Same => {
                let digest = match &self.newest {
                    Some(Ok(set)) if set.number == flight.number => set.digest.to_string(),
                    Some(_) | None => String::new(),
                };
                self.held = Some((flight.number, digest));
                self.held_bodies = flight.bodies;
                self.refused = None;
                if let Some(known) = &mut self.known {
                    known.extend(flight.replicas);
                }
                let (number, known) = (flight.number, self.known.clone());
                out.push(Effect::Acknowledged { number, known });
            }
            SetVerdict::NotDurable | SetVerdict::Broken => {
                // A body it said to hold may be what was missing: send all of them next time.
                if bug!(BodiesTakenForHeld) {
                    self.held_bodies.clone_from(&flight.bodies);
                }
                if ack.verdict() == SetVerdict::Broken {
                    self.held_bodies.clear();
                }
                self.not_before =
                    now.mono.plus_ms(if bug!(SetAtOnceAgain) { 0 } else { RETRY_SET_MS });
                out.push(refusal(&flight, held, ack));
            }
            SetVerdict::Older | SetVerdict::Changed | SetVerdict::Unspecified => {
                // The same set would be refused again; only a newer one may be accepted.
                self.refused = Some(flight.number);
                out.push(refusal(&flight, held, ack));
            }
        }
    }

    fn wants_to_send(&self) -> bool {
        let Some(Ok(set)) = &self.newest else { return false };
        if !self.is_live()
            || (self.flight.is_some() && !bug!(SetsInterleaved))
            || self.refused == Some(set.number)
        {
            return false;
        }
        match &self.held {
            None => true,
            Some((held, digest)) => {
                *held != set.number || (!digest.is_empty() && *digest != set.digest.as_str())
            }
        }
    }

    /// Sends the newest set when there is one to send.
    fn offer(&mut self, now: Now, out: &mut Vec<Effect>) {
        if !self.wants_to_send() || now.mono < self.not_before {
            return;
        }
        let Some(Ok(set)) = &self.newest else { return };
        let set = Arc::clone(set);
        let missing: Vec<&Arc<[u8]>> = set
            .bodies
            .iter()
            .filter(|(digest, _)| !self.held_bodies.contains(digest.as_str()))
            .map(|(_, bytes)| bytes)
            .collect();
        let id = Some(set_id(set.number));
        send(
            out,
            session_response::Item::SetBegin(SetBegin {
                id,
                entries: u32::try_from(set.entries.len()).unwrap_or(u32::MAX),
                bodies: u32::try_from(missing.len()).unwrap_or(u32::MAX),
            }),
        );
        for page in pages(&set.entries, &missing) {
            send(out, session_response::Item::SetPage(page));
        }
        send(out, session_response::Item::SetEnd(SetEnd { id, digest: set.digest.to_string() }));
        self.flight = Some(Flight {
            number: set.number,
            since: now.mono,
            bodies: set.bodies.keys().map(ToString::to_string).collect(),
            replicas: set.entries.iter().map(|entry| entry.replica_uid.clone()).collect(),
        });
    }
}

fn pages(entries: &[SetEntry], bodies: &[&Arc<[u8]>]) -> Vec<SetPage> {
    let mut pages = Vec::new();
    let mut page = SetPage::default();
    let mut size = 0;
    let mut room = |page: &mut SetPage, more: usize| {
        if size > 0 && size + more > bound!(PAGE_BYTES, 1) {
            pages.push(std::mem::take(page));
            size = 0;
        }
        size += more;
    };
    for entry in entries {
        room(&mut page, entry.encoded_len() + 8);
        page.entries.push(entry.clone());
    }
    for body in bodies {
        room(&mut page, body.len() + 8);
        page.bodies.push(body.to_vec());
    }
    let rest = !page.entries.is_empty() || !page.bodies.is_empty();
    if rest && (pages.is_empty() || !bug!(LastPageLost)) {
        pages.push(page);
    }
    pages
}

fn refusal(flight: &Flight, held: Option<SetNumber>, ack: SetAck) -> Effect {
    Effect::Refused { offered: flight.number, held, verdict: ack.verdict(), message: ack.message }
}

fn send(out: &mut Vec<Effect>, item: session_response::Item) {
    out.push(Effect::Send(Box::new(agent::SessionResponse { item: Some(item) })));
}

fn number(id: &SetId) -> SetNumber {
    SetNumber { epoch: Epoch(id.epoch), generation: Generation(id.generation) }
}

fn set_id(number: SetNumber) -> SetId {
    SetId { epoch: number.epoch.0, generation: number.generation.0 }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
