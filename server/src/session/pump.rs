//! Feeds one session's machine and carries out its effects.
//!
//! One task a session. What is to be sent waits in a queue of the task's own (one set at a time, and
//! what is answered), so that reading never waits for writing and two full windows cannot lock each
//! other; an agent that lets it grow beyond its bound is sent away.

use super::desk::{Desk, Ended, Later};
use crate::error::Error;
use berth_proto::agent::{SessionRequest, SessionResponse};
use berth_proto::farewell::Farewell;
use berth_proto::ids::{HostUid, Now};
use berth_server_core::farewell::Words;
use berth_server_core::session::{Closed, Effect, Input, Session, Terms};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

/// Messages handed to tonic ahead of the wire.
const WIRE_QUEUE: usize = 8;
/// Statuses being kept, and answers of the desk under way; the machine bounds what it leaves untaken.
const TAKEN_QUEUE: usize = 32;

/// Messages for an agent that wait for the wire. A set has some hundred pages; more means that the agent
/// says things which ask for an answer, and reads none.
const UNSENT: usize = 2048;

/// What a session's response stream is fed from.
pub type Outgoing = mpsc::Receiver<Result<SessionResponse, Status>>;

/// Starts a session of the host that the certificate names.
pub fn start<S>(desk: Arc<dyn Desk>, host: HostUid, terms: Terms, incoming: S) -> Outgoing
where
    S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static,
{
    let (tx, rx) = mpsc::channel(WIRE_QUEUE);
    tokio::spawn(run(desk, host, terms, incoming, tx));
    rx
}

struct Pump {
    desk: Arc<dyn Desk>,
    machine: Session,
    id: u64,
    queue: VecDeque<SessionResponse>,
    over: Option<Ended>,
    registered: bool,
    /// Status messages that are being kept, for [`keep`].
    taking: mpsc::Sender<(u64, Later<bool>)>,
}

/// Keeps a session's status messages one after the other, so that none undoes a later one, and tells
/// which are kept; `false`: this one could not be, and none after it is.
async fn keep(mut taking: mpsc::Receiver<(u64, Later<bool>)>, taken: mpsc::Sender<(u64, bool)>) {
    while let Some((sequence, later)) = taking.recv().await {
        let kept = later.await;
        // A session that has ended needs no answer; what it said is kept all the same.
        let _ = taken.send((sequence, kept)).await;
        if !kept {
            return;
        }
    }
}

async fn run<S>(
    desk: Arc<dyn Desk>,
    host: HostUid,
    terms: Terms,
    mut incoming: S,
    out: mpsc::Sender<Result<SessionResponse, Status>>,
) where
    S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static,
{
    let mut lines = desk.open(&host);
    let (taken, mut taken_rx) = mpsc::channel(TAKEN_QUEUE);
    let (taking, taking_rx) = mpsc::channel(TAKEN_QUEUE);
    tokio::spawn(keep(taking_rx, taken));
    let now = desk.now();
    let mut pump = Pump {
        machine: Session::new(host.clone(), terms, now.mono),
        id: lines.id,
        desk: Arc::clone(&desk),
        queue: VecDeque::new(),
        over: None,
        registered: false,
        taking,
    };
    // The newest set is a level: looked at once now, then whenever it changes.
    lines.sets.mark_changed();
    while pump.over.is_none() {
        let due = pump.machine.deadline().map(|at| at.since_ms(desk.now().mono));
        tokio::select! {
            // The time comes last: where a write took long, what the agent said meanwhile waits here,
            // and is no silence. Messages come before it alone, so that they hold up nothing else.
            biased;
            // Cancel-safe, all of them: what was not taken stays where it is.
            permit = out.reserve(), if !pump.queue.is_empty() => match permit {
                Ok(permit) => {
                    if let Some(message) = pump.queue.pop_front() {
                        permit.send(Ok(message));
                    }
                }
                Err(_) => pump.over = Some(Ended::Lost),
            },
            changed = lines.sets.changed() => match changed {
                Ok(()) => {
                    let newest = lines.sets.borrow_and_update().clone();
                    if let Some(newest) = newest {
                        pump.step(Input::Newest(newest)).await;
                    }
                }
                Err(_) => pump.over = Some(Ended::Stopping),
            },
            Some((sequence, kept)) = taken_rx.recv() => if kept {
                pump.step(Input::Taken(sequence)).await;
            } else {
                // Acknowledging a later one would acknowledge this one: the next hello says it all.
                pump.over = Some(Ended::Unavailable);
            },
            Some(open) = lines.tickets.recv() => pump.step(Input::Open(open)).await,
            Some(order) = lines.orders.recv() => match order {
                super::desk::Order::Removed { wipe } => pump.step(Input::Removed { wipe }).await,
                super::desk::Order::Trust(newer) => pump.step(Input::Trust(newer)).await,
                super::desk::Order::End(why) => pump.over = Some(why),
            },
            message = incoming.next() => match message {
                Some(Ok(message)) => pump.step(Input::Message(Box::new(message))).await,
                Some(Err(_)) | None => pump.over = Some(Ended::Lost),
            },
            () = wait(due) => pump.step(Input::Tick).await,
        }
    }
    // Last words (a removal) still go out, but a peer that does not read is not waited for.
    let last = async {
        for message in pump.queue.drain(..) {
            if out.send(Ok(message)).await.is_err() {
                return;
            }
        }
        if let Some(status) = pump.over.as_ref().and_then(last_words) {
            let _ = out.send(Err(Status::from(status))).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), last).await;
    let ended = pump.over.unwrap_or(Ended::Lost);
    if pump.registered {
        tracing::info!(%host, session = lines.id, reason = %ended, "a session ended");
    } else {
        tracing::warn!(%host, session = lines.id, reason = %ended, "a session ended before its hello");
    }
    desk.close(&host, lines.id).await;
}

/// Ends after so many milliseconds; never when there is nothing to wait for.
async fn wait(ms: Option<u64>) {
    match ms {
        Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        None => std::future::pending().await,
    }
}

impl Pump {
    async fn step(&mut self, input: Input) {
        let now: Now = self.desk.now();
        let host = self.machine.host().clone();
        let mut effects = VecDeque::from(self.machine.step(now, input));
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Send(message) => {
                    self.queue.push_back(*message);
                    if self.queue.len() > UNSENT {
                        self.over = Some(Ended::Machine(Closed::Overrun));
                        return;
                    }
                }
                Effect::Register(registration) => {
                    match self.desk.register(&host, self.id, *registration).await {
                        Ok(newest) => {
                            self.registered = true;
                            let kept = Input::Registered(newest);
                            effects.extend(self.machine.step(self.desk.now(), kept));
                        }
                        Err(why) => {
                            // Not welcome: the agent must not take what follows for a session.
                            self.over = Some(why);
                            return;
                        }
                    }
                }
                Effect::Take { sequence, reports, absent } => {
                    let later = self.desk.take(&host, self.id, sequence, reports, absent);
                    // Not waited for: who keeps them may wait until an answer is taken here. The
                    // machine closes a session that leaves more untaken than there is room for.
                    if self.taking.try_send((sequence, later)).is_err() {
                        self.over = Some(Ended::Unavailable);
                        return;
                    }
                }
                Effect::Facts(facts) => {
                    let kept = self.desk.facts(&host, self.id, *facts).await;
                    self.ends_unless(kept);
                }
                Effect::Acknowledged { number, known } => {
                    let kept = self.desk.acknowledged(&host, self.id, number, known).await;
                    self.ends_unless(kept);
                }
                Effect::Refused { offered, held, verdict, message } => {
                    tracing::error!(
                        %host, ?offered, ?held, ?verdict, message,
                        "a host refused its set; it keeps what it runs"
                    );
                    self.desk.refused(&host, self.id, offered, held, verdict);
                }
                Effect::TrustAcknowledged(version) => {
                    let kept = self.desk.trusts(&host, version).await;
                    self.ends_unless(kept);
                }
                Effect::ClockOffset(ms) => self.desk.clock(&host, self.id, ms),
                Effect::Close(why) => self.over = Some(Ended::of_machine(why)),
            }
        }
    }

    /// What the agent said is not said again in this session: the next one's hello says it all.
    fn ends_unless(&mut self, kept: bool) {
        if !kept && self.over.is_none() {
            self.over = Some(Ended::Unavailable);
        }
    }
}

/// What the agent is told, when there is anything to tell.
fn last_words(ended: &Ended) -> Option<Error> {
    let Words { farewell, reason, message } = ended.words()?;
    Some(match farewell {
        Farewell::Again => Error::unavailable(reason, message),
        Farewell::Superseded => Error::precondition(reason, message),
        Farewell::Denied => Error::denied(reason, message),
        Farewell::Invalid => Error::field("item", message),
    })
}

#[cfg(test)]
mod tests {
    use super::super::desk::{Later, Lines, Newest};
    use super::*;
    use berth_proto::agent::{self, ReplicaReport, SetVerdict, session_request, session_response};
    use berth_proto::api;
    use berth_proto::ids::{Epoch, Generation, Mono, SetNumber, Wall};
    use berth_server_core::session::{HostSet, Registration};
    use std::collections::{BTreeMap, BTreeSet};
    use tokio::sync::{oneshot, watch};

    /// A desk that keeps all it is told, after a while, or no more than the hello.
    struct Told {
        begun: tokio::time::Instant,
        keeps: bool,
        /// How long facts take.
        facts: Duration,
        newest: Newest,
        lines: parking_lot::Mutex<Option<Lines>>,
        /// The other ends of what a session listens to.
        _held: Box<dyn std::any::Any + Send + Sync>,
    }

    impl Told {
        fn new(keeps: bool, facts: Duration) -> Arc<Self> {
            let set = HostSet::new(
                SetNumber { epoch: Epoch(1), generation: Generation(1) },
                Vec::new(),
                BTreeMap::new(),
            );
            let newest: Newest = Some(Ok(Arc::new(set)));
            let (sets_tx, sets) = watch::channel(newest.clone());
            let (tickets_tx, tickets) = mpsc::channel(1);
            let (orders_tx, orders) = mpsc::channel(1);
            let lines = Lines { id: 1, sets, tickets, orders };
            Arc::new(Self {
                begun: tokio::time::Instant::now(),
                keeps,
                facts,
                newest,
                lines: parking_lot::Mutex::new(Some(lines)),
                _held: Box::new((sets_tx, tickets_tx, orders_tx)),
            })
        }
    }

    #[async_trait::async_trait]
    impl Desk for Told {
        fn now(&self) -> Now {
            let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap();
            Now { mono: Mono(ms + 1), wall: Wall(0) }
        }
        fn open(&self, _: &HostUid) -> Lines {
            self.lines.lock().take().unwrap()
        }
        async fn register(&self, _: &HostUid, _: u64, _: Registration) -> Result<Newest, Ended> {
            Ok(self.newest.clone())
        }
        fn take(
            &self,
            _: &HostUid,
            _: u64,
            _: u64,
            _: Vec<ReplicaReport>,
            _: Vec<String>,
        ) -> Later<bool> {
            let keeps = self.keeps;
            Box::pin(async move { keeps })
        }
        async fn facts(&self, _: &HostUid, _: u64, _: api::HostFacts) -> bool {
            tokio::time::sleep(self.facts).await;
            self.keeps
        }
        async fn acknowledged(
            &self,
            _: &HostUid,
            _: u64,
            _: SetNumber,
            _: Option<BTreeSet<String>>,
        ) -> bool {
            self.keeps
        }
        fn refused(&self, _: &HostUid, _: u64, _: SetNumber, _: Option<SetNumber>, _: SetVerdict) {}
        async fn trusts(&self, _: &HostUid, _: u64) -> bool {
            self.keeps
        }
        fn clock(&self, _: &HostUid, _: u64, _: i64) {}
        async fn close(&self, _: &HostUid, _: u64) {}
    }

    fn terms() -> Terms {
        Terms {
            epoch: Epoch(1),
            cluster: String::new(),
            ping_interval_ms: 10_000,
            idle_timeout_ms: 30_000,
            status_interval_ms: 100,
            reconnect_window_ms: 0,
            version: String::new(),
            features: Vec::new(),
            trust: agent::Trust::default(),
        }
    }

    fn hello() -> session_request::Item {
        let hello = agent::Hello { host_uid: "h1".into(), ..agent::Hello::default() };
        session_request::Item::Hello(hello)
    }

    fn ping(id: u64) -> session_request::Item {
        session_request::Item::Ping(agent::Ping { id, ..agent::Ping::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_ends_when_anything_it_was_told_cannot_be_kept() {
        use session_request::Item;
        let taken = agent::SetAck {
            id: Some(agent::SetId { epoch: 1, generation: 1 }),
            verdict: SetVerdict::Taken as i32,
            ..agent::SetAck::default()
        };
        for said in [
            Item::Statuses(agent::Statuses { sequence: 1, ..Default::default() }),
            Item::Facts(api::HostFacts::default()),
            Item::SetAck(taken),
            Item::TrustAck(agent::TrustAck { version: 1 }),
        ] {
            let desk = Told::new(false, Duration::ZERO);
            let (says, said_rx) = mpsc::channel(4);
            let incoming = tokio_stream::wrappers::ReceiverStream::new(said_rx);
            let mut out = start(desk, "h1".parse().unwrap(), terms(), incoming);
            says.send(Ok(SessionRequest { item: Some(hello()) })).await.unwrap();
            // The set is on its way from its end on.
            while let Some(message) = out.recv().await {
                if matches!(message.unwrap().item, Some(session_response::Item::SetEnd(_))) {
                    break;
                }
            }
            let words = format!("{said:?}");
            says.send(Ok(SessionRequest { item: Some(said) })).await.unwrap();
            let last = tokio::time::timeout(Duration::from_secs(5), out.recv()).await;
            let code = last.map(|message| message.unwrap().map_err(|s| s.code()));
            assert_eq!(code, Ok(Err(tonic::Code::Unavailable)), "{words}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_takes_longer_than_silence_may_last_does_not_make_an_agent_silent() {
        // Often, because what is ready together is taken in any order where none is said.
        for _ in 0..16 {
            let desk = Told::new(true, Duration::from_secs(40));
            let (agent, incoming) = mpsc::channel(8);
            let say = |item| agent.try_send(Ok(SessionRequest { item: Some(item) })).unwrap();
            say(hello());
            say(session_request::Item::Facts(api::HostFacts::default()));
            say(ping(7));
            let incoming = tokio_stream::wrappers::ReceiverStream::new(incoming);
            let mut out = start(desk, "h1".parse().unwrap(), terms(), incoming);
            loop {
                let said = out.recv().await.expect("the session ended").expect("it ended");
                if let Some(session_response::Item::Pong(pong)) = said.item {
                    assert_eq!(pong.id, 7);
                    break;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_asks_and_never_reads_is_sent_away() {
        let desk = Told::new(true, Duration::ZERO);
        let (agent, incoming) = mpsc::channel(8);
        let incoming = tokio_stream::wrappers::ReceiverStream::new(incoming);
        let _unread = start(desk, "h1".parse().unwrap(), terms(), incoming);
        agent.send(Ok(SessionRequest { item: Some(hello()) })).await.unwrap();
        let mut asked = 0;
        while agent.send(Ok(SessionRequest { item: Some(ping(1)) })).await.is_ok() {
            asked += 1;
            assert!(asked < 2 * UNSENT, "its answers pile up");
        }
    }

    #[tokio::test]
    async fn a_status_is_kept_only_after_those_before_it_and_not_after_one_that_could_not_be() {
        let (taking, taking_rx) = mpsc::channel(TAKEN_QUEUE);
        let (taken, mut taken_rx) = mpsc::channel(TAKEN_QUEUE);
        let worker = tokio::spawn(keep(taking_rx, taken));
        let (done, mut begun) =
            (0..3).fold((Vec::new(), Vec::new()), |(mut done, mut begun), n| {
                let (done_tx, done_rx) = oneshot::channel::<bool>();
                let (begun_tx, begun_rx) = oneshot::channel();
                let later: Later<bool> = Box::pin(async move {
                    let _ = begun_tx.send(());
                    done_rx.await.unwrap_or(false)
                });
                taking.try_send((n, later)).unwrap();
                done.push(done_tx);
                begun.push(begun_rx);
                (done, begun)
            });
        let mut done = done.into_iter();
        (&mut begun[0]).await.unwrap();
        tokio::task::yield_now().await;
        assert!(begun[1].try_recv().is_err(), "the second overtook the first");
        done.next().unwrap().send(true).unwrap();
        assert_eq!(taken_rx.recv().await, Some((0, true)));
        (&mut begun[1]).await.unwrap();
        done.next().unwrap().send(false).unwrap();
        assert_eq!(taken_rx.recv().await, Some((1, false)));
        worker.await.unwrap();
        assert!(begun[2].try_recv().is_err(), "one was kept past one that was not");
    }
}
