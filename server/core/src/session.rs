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
//! 4. A status is acknowledged only after [`Input::Taken`] has said that it is kept.
//! 5. Silence for longer than the idle timeout ends the session, and nothing else.

use berth_proto::agent::{
    self, Hello, ReplicaReport, SetAck, SetBegin, SetEnd, SetEntry, SetId, SetPage, SetVerdict,
    session_request, session_response,
};
use berth_proto::ids::{Digest, Epoch, Generation, HostUid, Mono, Now, SetNumber};
use prost::Message as _;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Encoded bytes of entries and bodies in one page. A quarter of the 1 MiB a message may have, so
/// that a page is never refused for its framing.
pub const PAGE_BYTES: usize = 256 * 1024;
/// Pages of an observed set: at 500 reports each this is 50,000 replicas on one host, far above
/// what an engine runs.
pub const MAX_OBSERVED_PAGES: u32 = 100;
/// Reports in one message, as the contract says.
pub const MAX_REPORTS: usize = 500;
/// How long a hello with its pages may take: a slow link carries 1 MiB in 30 s at 280 kbit/s.
pub const HELLO_DEADLINE_MS: u64 = 30_000;
/// Wait before a set that the agent could not make durable is sent again.
pub const RETRY_SET_MS: u64 = 5_000;
/// Status messages that may wait to be kept. The agent sends the next only every 100 ms, so this is
/// two seconds of them; more means that the ledger has stopped.
pub const MAX_UNTAKEN: usize = 20;

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
}

/// Why a session gets no sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Since a restore; an operator has to decide about orphans.
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
                "the server was restored from a backup; an operator has to decide about orphans"
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
    /// The newest set of this host; `None`: it gets no sets for this reason.
    Newest(Result<Arc<HostSet>, Hold>),
    /// The statuses up to this sequence are kept.
    Taken(u64),
    /// Roots or endpoints have changed.
    Trust(agent::Trust),
    /// The host was removed.
    Removed {
        /// Its containers, artifacts and keys shall go.
        wipe: bool,
    },
    /// A ticket for a reverse connection.
    Open(agent::OpenReverse),
    /// Time has passed.
    Tick,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Say this to the agent.
    Send(Box<agent::SessionResponse>),
    /// The agent has introduced itself; comes once, before anything else of it.
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
    Acknowledged(SetNumber),
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
    /// The boot, for telling a cloned disk.
    pub boot_id: String,
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
}

#[derive(Debug)]
enum State {
    AwaitHello,
    AwaitPages { hello: Box<Hello>, next: u32 },
    Live,
    Over,
}

#[derive(Debug)]
struct Flight {
    number: SetNumber,
    bodies: BTreeSet<String>,
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
    newest: Option<Result<Arc<HostSet>, Hold>>,
    held: Option<(SetNumber, String)>,
    held_bodies: BTreeSet<String>,
    flight: Option<Flight>,
    not_before: Mono,
    refused: Option<SetNumber>,
    untaken: VecDeque<u64>,
    trust: Option<agent::Trust>,
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
            newest: None,
            held: None,
            held_bodies: BTreeSet::new(),
            flight: None,
            not_before: now,
            refused: None,
            untaken: VecDeque::new(),
            trust: None,
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
            State::Live => idle.min(self.pinged.plus_ms(self.terms.ping_interval_ms)),
            State::Over => return None,
        };
        if self.wants_to_send() {
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
            Input::Newest(newest) => {
                self.newest = Some(newest);
            }
            Input::Taken(sequence) => {
                while self.untaken.front().is_some_and(|s| *s <= sequence) {
                    self.untaken.pop_front();
                }
                send(&mut out, session_response::Item::StatusAck(agent::StatusAck { sequence }));
            }
            Input::Trust(trust) => {
                if self.is_live() {
                    send(&mut out, session_response::Item::Trust(trust));
                } else {
                    self.trust = Some(trust);
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
            Input::Tick => self.tick(now, &mut out),
        }
        self.offer(now, &mut out);
        out
    }

    fn is_live(&self) -> bool {
        matches!(self.state, State::Live)
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
                if now.mono.since_ms(self.pinged) >= self.terms.ping_interval_ms {
                    self.pinged = now.mono;
                    self.ping_id += 1;
                    let ping = agent::Ping { id: self.ping_id, time: Some(timestamp(now)) };
                    send(out, session_response::Item::Ping(ping));
                }
            }
            State::Over => {}
        }
    }

    fn message(&mut self, now: Now, message: agent::SessionRequest, out: &mut Vec<Effect>) {
        use session_request::Item;
        let Some(item) = message.item else {
            // A newer agent may say what this server does not know: hearing it is enough.
            return;
        };
        match (&mut self.state, item) {
            (State::AwaitHello, Item::Hello(hello)) => self.hello(now, hello, out),
            (State::AwaitHello, _) => {
                self.close(Closed::Protocol("the first message was not a hello"), out);
            }
            (State::AwaitPages { hello, next }, Item::Observed(page)) => {
                if page.number != *next || page.observed.len() > MAX_REPORTS {
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
                    self.register(now, hello, out);
                }
            }
            (State::AwaitPages { .. }, _) => {
                self.close(Closed::Protocol("the observed set was interrupted"), out);
            }
            (State::Live, item) => self.live(now, item, out),
            (State::Over, _) => {}
        }
    }

    fn hello(&mut self, now: Now, hello: Hello, out: &mut Vec<Effect>) {
        if hello.host_uid != self.host.as_str() {
            return self.close(Closed::WrongHost, out);
        }
        if hello.observed_pages > MAX_OBSERVED_PAGES || hello.observed.len() > MAX_REPORTS {
            return self.close(Closed::Protocol("the observed set is too large"), out);
        }
        if hello.observed_pages == 0 {
            return self.register(now, hello, out);
        }
        self.state = State::AwaitPages { hello: Box::new(hello), next: 1 };
    }

    fn register(&mut self, now: Now, hello: Hello, out: &mut Vec<Effect>) {
        self.state = State::Live;
        self.pinged = now.mono;
        let held = hello.held.as_ref().map(number);
        self.held = held.map(|number| (number, hello.held_digest.clone()));
        self.held_bodies = hello.bodies.into_iter().collect();
        if let Some(time) = &hello.time {
            out.push(Effect::ClockOffset(millis(time) - now.wall.0));
        }
        out.push(Effect::Register(Box::new(Registration {
            instance: hello.instance,
            boot_id: hello.boot_id,
            boot_nonce: hello.boot_nonce,
            agent_start: hello.agent_start,
            agent_version: hello.agent_version,
            facts: hello.facts,
            held,
            observed: hello.observed,
            engine_observed: hello.engine_observed,
            trust_version: hello.trust_version,
        })));
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
                time: Some(timestamp(now)),
                cluster: self.terms.cluster.clone(),
                observe_only: hold.is_some(),
                reason: hold.map(|h| h.words().to_owned()).unwrap_or_default(),
                server_version: self.terms.version.clone(),
                features: self.terms.features.clone(),
            }),
        );
        if let Some(trust) = self.trust.take()
            && trust.version > hello.trust_version
        {
            send(out, session_response::Item::Trust(trust));
        }
    }

    fn live(&mut self, now: Now, item: session_request::Item, out: &mut Vec<Effect>) {
        use session_request::Item;
        match item {
            Item::Hello(_) => self.close(Closed::Protocol("a second hello"), out),
            Item::Observed(_) => self.close(Closed::Protocol("a page without its hello"), out),
            Item::SetAck(ack) => self.set_ack(now, ack, out),
            Item::Statuses(statuses) => {
                if statuses.reports.len() > MAX_REPORTS || statuses.absent.len() > MAX_REPORTS {
                    return self.close(Closed::Protocol("a status message is too long"), out);
                }
                if self.untaken.len() >= MAX_UNTAKEN {
                    return self.close(Closed::Overrun, out);
                }
                self.untaken.push_back(statuses.sequence);
                out.push(Effect::Take {
                    sequence: statuses.sequence,
                    reports: statuses.reports,
                    absent: statuses.absent,
                });
            }
            Item::Facts(facts) => out.push(Effect::Facts(Box::new(facts))),
            Item::Ping(ping) => {
                let pong = agent::Pong { id: ping.id, time: Some(timestamp(now)) };
                send(out, session_response::Item::Pong(pong));
            }
            Item::Pong(pong) => {
                // Half the round trip is within the resolution that matters to a person.
                if let Some(time) = &pong.time
                    && pong.id == self.ping_id
                {
                    let half = i64::try_from(now.mono.since_ms(self.pinged) / 2).unwrap_or(0);
                    out.push(Effect::ClockOffset(millis(time) + half - now.wall.0));
                }
            }
            Item::TrustAck(ack) => out.push(Effect::TrustAcknowledged(ack.version)),
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
                out.push(Effect::Acknowledged(flight.number));
            }
            SetVerdict::NotDurable | SetVerdict::Broken => {
                // A body it said to hold may be what was missing: send all of them next time.
                if ack.verdict() == SetVerdict::Broken {
                    self.held_bodies.clear();
                }
                self.not_before = now.mono.plus_ms(RETRY_SET_MS);
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
        if !self.is_live() || self.flight.is_some() || self.refused == Some(set.number) {
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
            bodies: set.bodies.keys().map(ToString::to_string).collect(),
        });
    }
}

fn pages(entries: &[SetEntry], bodies: &[&Arc<[u8]>]) -> Vec<SetPage> {
    let mut pages = Vec::new();
    let mut page = SetPage::default();
    let mut size = 0;
    let mut room = |page: &mut SetPage, more: usize| {
        if size > 0 && size + more > PAGE_BYTES {
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
    if !page.entries.is_empty() || !page.bodies.is_empty() {
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

fn timestamp(now: Now) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: now.wall.0.div_euclid(1000),
        nanos: i32::try_from(now.wall.0.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

fn millis(time: &prost_types::Timestamp) -> i64 {
    time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos) / 1_000_000)
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
