//! The agent's end of one session, and when to dial again.
//!
//! A machine without I/O, the counterpart of the server's. What always holds: a set is made durable
//! before it is acknowledged and acted on only then; the newest status of each replica is sent at
//! most once an interval and again in the next session's hello; silence of the server ends the
//! session and stops nothing.

use crate::ledger::{Assembly, HeldSet, Wanted, judge, number, set_id};
use crate::report::{MAX_REPORTS, Reporter};
use berth_proto::agent::{
    self, Hello, ObservedPage, ReplicaReport, SetAck, SetVerdict, session_request, session_response,
};
use berth_proto::farewell::{self, Farewell};
use berth_proto::ids::{Mono, Now, SetNumber};
use berth_proto::{api, convert};

/// The first wait before dialling again; doubled up to [`MAX_DIAL_MS`] while dialling fails.
pub const MIN_DIAL_MS: u64 = 500;
/// The longest wait: a fleet of 50,000 then asks 1,700 times a second at worst.
pub const MAX_DIAL_MS: u64 = 30_000;
/// After being told to stay away (removed, quarantined).
pub const LONG_DIAL_MS: u64 = 300_000;

/// Endpoints an agent keeps: a server that has moved more often was moved long ago.
pub const MAX_ENDPOINTS: usize = 16;

/// The endpoints to try, in order: those of the newest bundle, then the old ones, because a bundle
/// that names a wrong address must not lock a host out.
#[must_use]
pub fn endpoints(newest: &[String], old: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for endpoint in newest.iter().chain(old) {
        if !all.contains(endpoint) && all.len() < MAX_ENDPOINTS {
            all.push(endpoint.clone());
        }
    }
    all
}

/// Whoever always has something to say pings all the same, each time so many intervals have passed: a ping
/// tells of the host's clock, which may have jumped.
pub const BUSY_PINGS: u64 = 4;

/// How a dial or a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The server was reached and refused.
    Refused {
        /// For good, as far as it goes: removed, quarantined, not known.
        stay_away: bool,
    },
    /// It was not reached, or the connection is gone.
    Lost,
    /// By our own wish, to say hello anew.
    Again,
    /// The engine was looked at for the first time: say hello with what it shows, at once.
    AtOnce,
}

impl Ended {
    /// What the status means with which the server has refused or ended a session; `code` is gRPC's
    /// number of it.
    #[must_use]
    pub fn told(code: i32) -> Self {
        let is = |farewell: Farewell| code == farewell.code();
        if is(Farewell::Again) || code == farewell::UNKNOWN {
            Self::Lost
        } else {
            let for_good = is(Farewell::Denied) || is(Farewell::Invalid);
            Self::Refused { stay_away: for_good && !bug!(NeverStaysAway) }
        }
    }
}

/// Whom to dial, and when.
#[derive(Debug, Clone, Default)]
pub struct Dialling {
    failures: u32,
    window_ms: u64,
    turn: usize,
    stood: bool,
}

impl Dialling {
    /// A session was welcomed; it says how to come back.
    pub fn welcomed(&mut self, window_ms: u64) {
        self.failures = 0;
        self.stood = true;
        self.window_ms = window_ms.min(600_000);
    }

    /// The endpoint whose turn it is; `None`: none is known.
    #[must_use]
    pub fn endpoint<'a>(&self, endpoints: &'a [String]) -> Option<&'a String> {
        endpoints.get(self.turn % endpoints.len().max(1))
    }

    /// A dial or a session has ended: how long to wait before the next, `draw` being random in 0..1000.
    pub fn ended(&mut self, how: Ended, draw: u64) -> u64 {
        let stood = std::mem::take(&mut self.stood);
        if stood {
            // The newest endpoints first, also after a session on an old one.
            self.turn = 0;
        }
        let stay_away = match how {
            Ended::Refused { stay_away } => {
                self.turn += 1;
                if bug!(RefusedNeverDialsAgain) {
                    return 1 << 40;
                }
                stay_away
            }
            Ended::Lost => {
                self.turn += usize::from(!stood);
                false
            }
            Ended::Again => false,
            Ended::AtOnce => return 0,
        };
        self.wait_ms(stay_away, draw)
    }

    /// How long to wait, `draw` being random in 0..1000.
    fn wait_ms(&mut self, stay_away: bool, draw: u64) -> u64 {
        let draw = draw % 1000;
        let jittered = |ms: u64| ms / 2 + ms / 2 * draw / 1000;
        if stay_away {
            return jittered(LONG_DIAL_MS);
        }
        if self.failures == 0 {
            self.failures = 1;
            // The server paces the first wave of a whole fleet.
            return self.window_ms * draw / 1000;
        }
        let doublings = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let most = if bug!(DialsSeldom) { u64::MAX } else { MAX_DIAL_MS };
        jittered((MIN_DIAL_MS << doublings).min(most))
    }
}

/// What goes in.
#[derive(Debug)]
pub enum Input {
    /// The server said this.
    Message(Box<agent::SessionResponse>),
    /// The set is durable, or could not be made so.
    Persisted(Result<(), String>),
    /// Roots and endpoints of this number are durable.
    Trusted(u64),
    /// The newest report of a replica.
    Report(Box<ReplicaReport>),
    /// Nothing is left of a replica.
    Absent(String),
    /// The host's facts have changed.
    Facts(Box<api::HostFacts>),
    /// Time has passed.
    Tick,
}

/// What comes out.
#[derive(Debug)]
pub enum Effect {
    /// Say this.
    Send(Box<agent::SessionRequest>),
    /// The server has answered the hello.
    Welcomed(Box<agent::Welcome>),
    /// Make this durable, then [`Input::Persisted`].
    Persist(Box<HeldSet>),
    /// This is durable: act on it.
    Act(Box<HeldSet>),
    /// Make these roots and endpoints durable, then [`Input::Trusted`].
    Trust(Box<agent::Trust>),
    /// Dial a reverse connection.
    Open(agent::OpenReverse),
    /// The host was removed.
    Removed {
        /// Delete what is ours.
        wipe: bool,
    },
    /// Statuses up to this sequence are kept by the server.
    Kept(u64),
    /// The session is over.
    Close(&'static str),
}

/// One session.
#[derive(Debug)]
pub struct Session {
    wanted: Wanted,
    assembly: Assembly,
    persisting: Option<Box<HeldSet>>,
    welcomed: bool,
    /// Newer than the hello's, for when the server has answered it.
    facts: Option<Box<api::HostFacts>>,
    heard: Mono,
    said: Mono,
    pinged: Mono,
    ping_id: u64,
    ping_ms: u64,
    idle_ms: u64,
    reporter: Reporter,
}

impl Session {
    /// A session that begins with this hello; `sequence` goes on from the last one used in this
    /// start of the agent. The pages follow the hello.
    #[must_use]
    pub fn begin(
        mut hello: Hello,
        wanted: Wanted,
        sequence: u64,
        now: Mono,
    ) -> (Self, Vec<agent::SessionRequest>) {
        let mut pages = Vec::new();
        let most = bound!(MAX_REPORTS, 2);
        if hello.observed.len() > most {
            let rest = hello.observed.split_off(most);
            for (i, chunk) in rest.chunks(most).enumerate() {
                pages.push(ObservedPage {
                    number: u32::try_from(i + 1).unwrap_or(u32::MAX),
                    observed: chunk.to_vec(),
                    bodies: Vec::new(),
                });
            }
        }
        hello.observed_pages = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        let mut messages = vec![request(session_request::Item::Hello(hello))];
        messages
            .extend(pages.into_iter().map(|page| request(session_request::Item::Observed(page))));
        let session = Self {
            wanted,
            assembly: Assembly::default(),
            persisting: None,
            welcomed: false,
            facts: None,
            heard: now,
            said: now,
            pinged: now,
            ping_id: 0,
            ping_ms: 10_000,
            idle_ms: 30_000,
            reporter: Reporter::after(sequence, 100),
        };
        (session, messages)
    }

    /// The sequence used last.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.reporter.sequence()
    }

    /// When [`Input::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        let mut due = self.heard.plus_ms(self.idle_ms);
        if self.welcomed {
            due = due.min(self.said.plus_ms(self.ping_ms));
            due = due.min(self.pinged.plus_ms(BUSY_PINGS * self.ping_ms));
            if let Some(report) = self.reporter.due() {
                due = due.min(report);
            }
        }
        due
    }

    /// One step.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        match input {
            Input::Message(message) => {
                self.heard = now.mono;
                if let Some(item) = message.item {
                    self.message(now, item, &mut out);
                }
            }
            Input::Persisted(result) => self.persisted(result, &mut out),
            Input::Trusted(version) => {
                send(&mut out, session_request::Item::TrustAck(agent::TrustAck { version }));
            }
            Input::Report(report) => self.reporter.changed(*report),
            Input::Absent(uid) => self.reporter.absent(uid),
            Input::Facts(facts) if self.welcomed => {
                send(&mut out, session_request::Item::Facts(*facts));
            }
            Input::Facts(facts) => self.facts = Some(facts),
            Input::Tick => {}
        }
        self.on_time(now, &mut out);
        if out.iter().any(|effect| matches!(effect, Effect::Send(_))) {
            self.said = now.mono;
        }
        out
    }

    fn on_time(&mut self, now: Now, out: &mut Vec<Effect>) {
        if now.mono.since_ms(self.heard) >= self.idle_ms {
            out.push(Effect::Close("the server has said nothing for too long"));
            return;
        }
        if !self.welcomed {
            return;
        }
        // Whoever says something says that it is there.
        let silent = !out.iter().any(|effect| matches!(effect, Effect::Send(_)));
        let silent = silent && now.mono.since_ms(self.said) >= self.ping_ms;
        if silent || now.mono.since_ms(self.pinged) >= BUSY_PINGS * self.ping_ms {
            self.pinged = now.mono;
            self.ping_id += 1;
            let time = Some(convert::timestamp(now.wall));
            let ping = agent::Ping { id: self.ping_id, time };
            send(out, session_request::Item::Ping(ping));
        }
        if let Some(statuses) = self.reporter.next(now.mono) {
            send(out, session_request::Item::Statuses(statuses));
        }
    }

    fn message(&mut self, now: Now, item: session_response::Item, out: &mut Vec<Effect>) {
        use session_response::Item;
        match item {
            Item::Welcome(welcome) => {
                self.welcomed = true;
                self.ping_ms = welcome.ping_interval_ms.clamp(100, 3_600_000);
                self.idle_ms = welcome.idle_timeout_ms.clamp(1_000, 7_200_000);
                self.reporter.pace(welcome.status_interval_ms.clamp(10, 60_000));
                out.push(Effect::Welcomed(Box::new(welcome)));
                if let Some(facts) = self.facts.take() {
                    send(out, session_request::Item::Facts(*facts));
                }
            }
            Item::SetBegin(begin) => self.assembly.begin(begin),
            Item::SetPage(page) => self.assembly.page(page),
            Item::SetEnd(end) => {
                let offered = number(end.id.unwrap_or_default());
                match self.assembly.end(&end, &self.wanted) {
                    Err(broken) => {
                        self.ack(offered, SetVerdict::Broken, broken.to_string(), out);
                    }
                    Ok(set) => {
                        let held = self.wanted.set().map(|s| (s.number, s.digest.as_str()));
                        match judge(held, (offered, &end.digest)) {
                            Ok(SetVerdict::Same) => {
                                self.ack(offered, SetVerdict::Same, String::new(), out);
                            }
                            Ok(_) => {
                                let set = Box::new(set);
                                self.persisting = Some(set.clone());
                                if bug!(ActsBeforeDurable) {
                                    out.push(Effect::Act(set.clone()));
                                }
                                out.push(Effect::Persist(set));
                            }
                            Err(refusal) => {
                                let message = "this host holds a newer or other set".to_owned();
                                self.ack(offered, refusal, message, out);
                            }
                        }
                    }
                }
            }
            Item::Open(open) => out.push(Effect::Open(open)),
            Item::StatusAck(ack) => {
                self.reporter.kept(ack.sequence);
                out.push(Effect::Kept(ack.sequence));
            }
            Item::Ping(ping) => {
                let time = Some(convert::timestamp(now.wall));
                send(out, session_request::Item::Pong(agent::Pong { id: ping.id, time }));
            }
            Item::Pong(_) => {}
            Item::Removed(removed) => {
                out.push(Effect::Removed { wipe: removed.wipe });
                out.push(Effect::Close("this host was removed"));
            }
            Item::Trust(trust) => out.push(Effect::Trust(Box::new(trust))),
        }
    }

    fn persisted(&mut self, result: Result<(), String>, out: &mut Vec<Effect>) {
        let Some(set) = self.persisting.take() else { return };
        match result {
            Ok(()) => {
                self.wanted = Wanted::Set(std::sync::Arc::new((*set).clone()));
                // Found out under the set before: what was made again for this one is not meant.
                if !bug!(AbsenceTarries) {
                    for statuses in self.reporter.absences() {
                        send(out, session_request::Item::Statuses(statuses));
                    }
                }
                self.ack(set.number, SetVerdict::Taken, String::new(), out);
                out.push(Effect::Act(set));
            }
            Err(_) if bug!(UndurableAcknowledged) => {
                self.ack(set.number, SetVerdict::Taken, String::new(), out);
            }
            Err(why) => self.ack(set.number, SetVerdict::NotDurable, why, out),
        }
    }

    fn ack(&self, offered: SetNumber, verdict: SetVerdict, message: String, out: &mut Vec<Effect>) {
        let ack = SetAck {
            id: Some(set_id(offered)),
            verdict: verdict as i32,
            message,
            held: self.wanted.set().map(|s| set_id(s.number)),
        };
        send(out, session_request::Item::SetAck(ack));
    }
}

fn request(item: session_request::Item) -> agent::SessionRequest {
    agent::SessionRequest { item: Some(item) }
}

fn send(out: &mut Vec<Effect>, item: session_request::Item) {
    out.push(Effect::Send(Box::new(request(item))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::MAX_UNKEPT;
    use berth_proto::agent::{SetBegin, SetEnd};
    use berth_proto::ids::Wall;
    use berth_proto::sets::set_digest;

    fn at(ms: u64) -> Now {
        Now { mono: Mono(ms), wall: Wall(0) }
    }

    fn say(item: session_response::Item) -> Input {
        Input::Message(Box::new(agent::SessionResponse { item: Some(item) }))
    }

    fn begun() -> Session {
        Session::begin(Hello::default(), Wanted::NotYetKnown, 0, Mono(0)).0
    }

    fn welcome() -> Input {
        say(session_response::Item::Welcome(agent::Welcome {
            ping_interval_ms: 10_000,
            idle_timeout_ms: 30_000,
            status_interval_ms: 100,
            ..Default::default()
        }))
    }

    fn live() -> Session {
        let mut s = begun();
        s.step(at(0), welcome());
        s
    }

    fn offer(s: &mut Session, generation: u64) -> Vec<Effect> {
        let id = Some(set_id(SetNumber {
            generation: berth_proto::ids::Generation(generation),
            ..Default::default()
        }));
        s.step(at(1), say(session_response::Item::SetBegin(SetBegin { id, ..Default::default() })));
        let end = SetEnd { id, digest: set_digest(&[]).to_string() };
        s.step(at(1), say(session_response::Item::SetEnd(end)))
    }

    fn verdicts(effects: &[Effect]) -> Vec<SetVerdict> {
        effects
            .iter()
            .filter_map(|e| match e {
                Effect::Send(m) => match &m.item {
                    Some(session_request::Item::SetAck(ack)) => Some(ack.verdict()),
                    Some(_) | None => None,
                },
                _ => None,
            })
            .collect()
    }

    #[test]
    fn acts_and_acknowledges_only_after_the_set_is_durable() {
        let mut s = live();
        let out = offer(&mut s, 1);
        assert!(matches!(out.as_slice(), [Effect::Persist(_)]), "{out:?}");
        let out = s.step(at(2), Input::Persisted(Ok(())));
        assert_eq!(verdicts(&out), [SetVerdict::Taken]);
        assert!(matches!(out.last(), Some(Effect::Act(_))));
    }

    #[test]
    fn what_is_gone_is_told_before_a_set_is_acknowledged_that_may_want_it_again() {
        let mut s = live();
        s.step(at(1), Input::Absent("first".to_owned()));
        offer(&mut s, 1);
        // The pace would have it wait.
        s.step(at(2), Input::Absent("gone".to_owned()));
        let out = s.step(at(2), Input::Persisted(Ok(())));
        let sent = out.iter().filter_map(|effect| match effect {
            Effect::Send(m) => m.item.as_ref(),
            _ => None,
        });
        let told: Vec<&str> = sent
            .map(|item| match item {
                session_request::Item::Statuses(statuses) => statuses.absent[0].as_str(),
                session_request::Item::SetAck(_) => "acknowledged",
                _ => "else",
            })
            .collect();
        assert_eq!(told, ["gone", "acknowledged"]);
    }

    #[test]
    fn a_set_that_could_not_be_made_durable_is_not_acted_on() {
        let mut s = live();
        offer(&mut s, 1);
        let out = s.step(at(2), Input::Persisted(Err("disk full".into())));
        assert_eq!(verdicts(&out), [SetVerdict::NotDurable]);
        assert!(!out.iter().any(|e| matches!(e, Effect::Act(_))));
        assert!(matches!(offer(&mut s, 1).as_slice(), [Effect::Persist(_)]));
    }

    #[test]
    fn facts_that_change_before_the_welcome_follow_it_the_newest_once() {
        let facts = |kernel: &str| {
            Input::Facts(Box::new(api::HostFacts { kernel: kernel.into(), ..Default::default() }))
        };
        let sent = |effects: &[Effect]| -> Vec<String> {
            let told = effects.iter().filter_map(|e| match e {
                Effect::Send(m) => match &m.item {
                    Some(session_request::Item::Facts(facts)) => Some(facts.kernel.clone()),
                    Some(_) | None => None,
                },
                _ => None,
            });
            told.collect()
        };
        let mut s = begun();
        assert!(s.step(at(0), facts("old")).is_empty());
        assert!(s.step(at(0), facts("new")).is_empty());
        let out = s.step(at(1), welcome());
        assert!(matches!(out.first(), Some(Effect::Welcomed(_))), "{out:?}");
        assert_eq!(sent(&out), ["new"]);
        assert!(sent(&s.step(at(2), welcome())).is_empty());
        assert_eq!(sent(&s.step(at(3), facts("newer"))), ["newer"]);
    }

    #[test]
    fn who_always_has_something_to_say_pings_now_and_then_so_that_its_clock_is_known() {
        let mut s = live();
        let mut pinged = Vec::new();
        for second in 1..=100 {
            let mut out = s.step(at(second * 1_000), welcome());
            out.extend(s.step(at(second * 1_000), Input::Facts(Box::default())));
            let is_ping = |effect: &Effect| match effect {
                Effect::Send(m) => matches!(&m.item, Some(session_request::Item::Ping(_))),
                _ => false,
            };
            pinged.extend(out.iter().any(is_ping).then_some(second));
        }
        assert_eq!(pinged, [40, 80]);
    }

    #[test]
    fn each_status_that_ends_a_session_is_read_as_it_is_meant() {
        let told = |farewell: Farewell| Ended::told(farewell.code());
        assert_eq!(told(Farewell::Again), Ended::Lost);
        assert_eq!(Ended::told(farewell::UNKNOWN), Ended::Lost);
        assert_eq!(told(Farewell::Superseded), Ended::Refused { stay_away: false });
        assert_eq!(told(Farewell::Denied), Ended::Refused { stay_away: true });
        assert_eq!(told(Farewell::Invalid), Ended::Refused { stay_away: true });
        // One of a server that is newer.
        assert_eq!(Ended::told(8), Ended::Refused { stay_away: false });
    }

    #[test]
    fn an_older_set_is_refused_and_the_same_is_not_written_again() {
        let mut s = live();
        offer(&mut s, 2);
        s.step(at(2), Input::Persisted(Ok(())));
        assert_eq!(verdicts(&offer(&mut s, 1)), [SetVerdict::Older]);
        assert_eq!(verdicts(&offer(&mut s, 2)), [SetVerdict::Same]);
    }

    #[test]
    fn statuses_are_coalesced_and_paced() {
        let mut s = live();
        let report = |attempt| {
            Input::Report(Box::new(ReplicaReport {
                replica_uid: "r".into(),
                slot: attempt,
                ..Default::default()
            }))
        };
        let sent = |effects: Vec<Effect>| {
            effects
                .into_iter()
                .filter_map(|e| match e {
                    Effect::Send(m) => match m.item {
                        Some(session_request::Item::Statuses(s)) => Some(s),
                        Some(_) | None => None,
                    },
                    _ => None,
                })
                .collect::<Vec<_>>()
        };
        let first = sent(s.step(at(1000), report(1)));
        assert_eq!(first.len(), 1);
        assert!(sent(s.step(at(1010), report(2))).is_empty());
        assert!(sent(s.step(at(1020), report(3))).is_empty());
        assert_eq!(s.deadline(), Mono(1100));
        let second = sent(s.step(at(1100), Input::Tick));
        assert_eq!((second.len(), second[0].sequence, second[0].reports[0].slot), (1, 2, 3));
    }

    #[test]
    fn a_server_that_keeps_nothing_slows_statuses_and_the_newest_goes_when_it_does() {
        let mut s = live();
        let report = |slot| {
            let report =
                ReplicaReport { replica_uid: "r".into(), slot, ..ReplicaReport::default() };
            Input::Report(Box::new(report))
        };
        let sent = |effects: Vec<Effect>| {
            effects.into_iter().find_map(|e| match e {
                Effect::Send(m) => match m.item {
                    Some(session_request::Item::Statuses(s)) => Some(s.reports[0].slot),
                    Some(_) | None => None,
                },
                _ => None,
            })
        };
        for n in 0..MAX_UNKEPT as u32 {
            assert_eq!(sent(s.step(at(1000 + 100 * u64::from(n)), report(n))), Some(n));
        }
        assert_eq!(sent(s.step(at(5_000), report(98))), None);
        assert!(s.deadline() > Mono(5_000), "nothing is due that may not be sent");
        assert_eq!(sent(s.step(at(5_100), report(99))), None);
        let kept = session_response::Item::StatusAck(agent::StatusAck { sequence: 1 });
        assert_eq!(sent(s.step(at(5_200), say(kept))), Some(99));
    }

    #[test]
    fn silence_of_the_server_ends_the_session() {
        let mut s = live();
        s.step(at(10_000), Input::Tick);
        let out = s.step(at(30_000), Input::Tick);
        assert!(out.iter().any(|e| matches!(e, Effect::Close(_))));
    }

    #[test]
    fn old_endpoints_are_tried_last_and_none_twice() {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(endpoints(&list("c b"), &list("a b")), list("c b a"));
        assert_eq!(endpoints(&[], &list("a")), list("a"));
        let many: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        assert_eq!(endpoints(&many, &list("a")).len(), MAX_ENDPOINTS);
    }

    #[test]
    fn each_endpoint_has_its_turn_and_the_newest_is_first_after_a_session() {
        let list: Vec<String> = ["a", "b"].map(str::to_owned).to_vec();
        let mut d = Dialling::default();
        assert_eq!(d.endpoint(&[]), None);
        d.ended(Ended::Lost, 0);
        assert_eq!(d.endpoint(&list), Some(&list[1]));
        d.welcomed(0);
        assert_eq!(d.ended(Ended::AtOnce, 999), 0);
        assert_eq!(d.endpoint(&list), Some(&list[0]));
        d.welcomed(0);
        d.ended(Ended::Lost, 0);
        assert_eq!(d.endpoint(&list), Some(&list[0]), "it stood: the same again first");
        assert!(d.ended(Ended::Refused { stay_away: true }, 0) >= LONG_DIAL_MS / 2);
        assert_eq!(d.endpoint(&list), Some(&list[1]));
    }

    #[test]
    fn dialling_is_paced_by_the_server_first_and_backs_off_after() {
        let mut d = Dialling::default();
        d.welcomed(10_000);
        assert_eq!(d.wait_ms(false, 500), 5_000);
        let waits: Vec<u64> = (0..12).map(|_| d.wait_ms(false, 999)).collect();
        assert!(waits.windows(2).all(|w| w[0] <= w[1]));
        assert!(waits.iter().all(|w| *w <= MAX_DIAL_MS));
        assert!(d.wait_ms(true, 0) >= LONG_DIAL_MS / 2);
    }
}
