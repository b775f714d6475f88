//! Reverse connections: the agent dials, the server calls.
//!
//! A host needs no open port. When the server has something to ask of a host (logs, a command, a
//! request for a replica) it sends a one-use ticket down the session; the agent answers by dialling
//! a second connection that begins with that ticket, and then *serves* gRPC on it. Each
//! [`ReverseKind`] has its own connection, so that bulk of one does not hold up the other, and none
//! shares a window with the session.
//!
//! The hub never keeps a connection alive by force: the agent closes an idle one, and the next call
//! asks for another. A ticket is good once, for [`TICKET_MS`], and only for the host it was made for.

use berth_proto::agent::host_service_client::HostServiceClient;
use berth_proto::agent::{OpenReverse, ReverseHello, ReverseKind};
use berth_proto::ids::HostUid;
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, Endpoint};

/// How long a ticket is good, as the contract says.
pub const TICKET_MS: u64 = 10_000;
/// How long the first bytes of a reverse connection may take.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// The contract's bound on the first message.
const MAX_HELLO: u32 = 1024;
/// Window of one stream: a screenful of logs or a small tensor without waiting for the other end.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Window of the whole connection: sixteen full streams. An unread stream then cannot starve the
/// others, which is what HTTP/2's default of one shared 64 KiB window does.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Largest message on a reverse connection; data frames have 64 KiB, log pages 256 lines of 64 KiB
/// at the very most.
const MAX_MESSAGE: usize = 20 * 1024 * 1024;

/// Why a host cannot be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReverseError {
    /// There is no session to send a ticket down.
    #[error("the host is away")]
    Away,
    /// The session's queue is full.
    #[error("the host's session is busy")]
    Busy,
    /// The agent did not dial in time.
    #[error("the host's agent did not open a connection in time")]
    TimedOut,
    /// HTTP/2 did not come up.
    #[error("the host's connection broke while it was opened")]
    Broken,
}

/// Why an incoming reverse connection was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The first bytes did not come, or not in time.
    #[error("the connection said nothing in time")]
    Silent,
    /// The first message is not one.
    #[error("the first message cannot be read")]
    Malformed,
    /// Another host than the certificate's.
    #[error("the first message names another host than the certificate")]
    WrongHost,
    /// No such ticket, used before, or too old.
    #[error("the ticket is not known, used or over")]
    Ticket,
}

/// A client of one host's agent.
pub type HostClient = HostServiceClient<Channel>;

type Key = (HostUid, i32);

impl State {
    /// Tells those who wait for tickets of these sessions that nobody will come.
    fn give_up(&mut self, host: &HostUid, of: impl Fn(u64) -> bool) {
        self.links.retain(|(owner, _), link| match link {
            // A spent ticket means that the agent has come.
            Link::Opening { ticket, session, outcome, .. }
                if owner == host && of(*session) && !ticket.is_empty() =>
            {
                outcome.send_replace(Some(Err(ReverseError::Away)));
                false
            }
            Link::Opening { .. } | Link::Open { .. } => true,
        });
    }
}

#[derive(Default)]
struct State {
    sessions: HashMap<HostUid, (u64, mpsc::Sender<OpenReverse>)>,
    links: BTreeMap<Key, Link>,
}

enum Link {
    Opening {
        ticket: String,
        session: u64,
        until: Instant,
        outcome: watch::Sender<Option<Outcome>>,
    },
    Open {
        channel: Channel,
        state: LinkState,
        cut: CancellationToken,
    },
}

type Outcome = Result<(Channel, LinkState), ReverseError>;

/// Whether a reverse connection stands, as far as this end knows.
#[derive(Debug, Clone, Default)]
pub struct LinkState(Arc<AtomicBool>);

impl LinkState {
    /// It is gone: what was under way on it is lost, whatever became of it at the other end.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn close(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// All reverse connections.
#[derive(Clone, Default)]
pub struct ReverseHub {
    state: Arc<Mutex<State>>,
}

impl ReverseHub {
    /// A session of `host` can carry tickets. The newest session wins; a ticket that went down an
    /// older one is not waited for.
    pub fn attach(&self, host: HostUid, session: u64, tickets: mpsc::Sender<OpenReverse>) {
        let mut state = self.state.lock();
        state.give_up(&host, |asked| asked != session);
        state.sessions.insert(host, (session, tickets));
    }

    /// That session is over. Its open connections go on until they close by themselves: a control
    /// connection that blips must not cut a log stream.
    pub fn detach(&self, host: &HostUid, session: u64) {
        let mut state = self.state.lock();
        if state.sessions.get(host).is_some_and(|(held, _)| *held == session) {
            state.sessions.remove(host);
        }
        state.give_up(host, |asked| asked == session);
    }

    /// Drops a host's connections at once: it was removed or its key revoked.
    pub fn cut(&self, host: &HostUid) {
        let mut state = self.state.lock();
        state.sessions.remove(host);
        state.links.retain(|(owner, _), link| {
            let cut_now = owner == host;
            // Calls under way hold the channel, too: the stream itself has to end.
            if let Link::Open { cut, .. } = link
                && cut_now
            {
                cut.cancel();
            }
            !cut_now
        });
    }

    /// A client of the host's agent: the open connection, or a new one within `deadline`.
    ///
    /// # Errors
    /// When the host has no session, does not dial in time, or the connection breaks.
    pub async fn client(
        &self,
        host: &HostUid,
        kind: ReverseKind,
        deadline: Duration,
    ) -> Result<HostClient, ReverseError> {
        self.link(host, kind, deadline).await.map(|(client, _)| client)
    }

    /// The same, with the state of the connection that carries the client's calls.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub async fn link(
        &self,
        host: &HostUid,
        kind: ReverseKind,
        deadline: Duration,
    ) -> Result<(HostClient, LinkState), ReverseError> {
        let mut outcome = match self.open_or_ask(host, kind)? {
            Found::Open(channel, state) => return Ok((client(channel), state)),
            Found::Wait(outcome) => outcome,
        };
        let waited = tokio::time::timeout(deadline, async {
            match outcome.wait_for(Option::is_some).await {
                Ok(value) => value.clone().unwrap_or(Err(ReverseError::Broken)),
                Err(_) => Err(ReverseError::TimedOut),
            }
        })
        .await;
        match waited {
            Ok(outcome) => outcome.map(|(channel, state)| (client(channel), state)),
            Err(_) => Err(ReverseError::TimedOut),
        }
    }

    fn open_or_ask(&self, host: &HostUid, kind: ReverseKind) -> Result<Found, ReverseError> {
        let mut state = self.state.lock();
        let key = (host.clone(), kind as i32);
        match state.links.get(&key) {
            Some(Link::Open { channel, state, .. }) if !state.is_closed() => {
                return Ok(Found::Open(channel.clone(), state.clone()));
            }
            Some(Link::Opening { until, outcome, .. }) if *until > Instant::now() => {
                return Ok(Found::Wait(outcome.subscribe()));
            }
            Some(Link::Open { .. } | Link::Opening { .. }) | None => {}
        }
        let (session, tickets) = state.sessions.get(host).ok_or(ReverseError::Away)?;
        let ticket = ticket();
        let open = OpenReverse { ticket: ticket.clone(), kind: kind as i32 };
        tickets.try_send(open).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ReverseError::Busy,
            mpsc::error::TrySendError::Closed(_) => ReverseError::Away,
        })?;
        let session = *session;
        let (outcome, wait) = watch::channel(None);
        let until = Instant::now() + Duration::from_millis(TICKET_MS);
        state.links.insert(key, Link::Opening { ticket, session, until, outcome });
        Ok(Found::Wait(wait))
    }

    /// Takes in a connection that the agent of `peer` has opened.
    ///
    /// # Errors
    /// When its first message is not a good ticket of that host; the connection is then dropped.
    pub async fn accept<S>(&self, peer: &HostUid, mut stream: S) -> Result<(), Refused>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let hello = tokio::time::timeout(HELLO_DEADLINE, read_hello(&mut stream))
            .await
            .map_err(|_| Refused::Silent)??;
        if hello.host_uid != peer.as_str() {
            return Err(Refused::WrongHost);
        }
        let (key, outcome) = self.redeem(peer, &hello.ticket)?;
        let state = LinkState::default();
        let cut = CancellationToken::new();
        let ended = Box::pin(cut.clone().cancelled_owned());
        let channel = over(Guarded { stream, state: state.clone(), ended }).await;
        let result = match channel {
            Ok(channel) => {
                let link = Link::Open { channel: channel.clone(), state: state.clone(), cut };
                self.state.lock().links.insert(key, link);
                Ok((channel, state))
            }
            Err(error) => {
                tracing::warn!(host = %peer, %error, "a reverse connection did not come up");
                self.state.lock().links.remove(&key);
                Err(ReverseError::Broken)
            }
        };
        outcome.send_replace(Some(result));
        Ok(())
    }

    fn redeem(
        &self,
        peer: &HostUid,
        ticket: &str,
    ) -> Result<(Key, watch::Sender<Option<Outcome>>), Refused> {
        let mut state = self.state.lock();
        let now = Instant::now();
        let key = state.links.iter().find_map(|(key, link)| match link {
            Link::Opening { ticket: held, until, .. }
                if key.0 == *peer && *until > now && held == ticket =>
            {
                Some(key.clone())
            }
            Link::Opening { .. } | Link::Open { .. } => None,
        });
        let key = key.ok_or(Refused::Ticket)?;
        match state.links.remove(&key) {
            Some(Link::Opening { outcome, session, until, .. }) => {
                // Whoever asks meanwhile waits for the same outcome; the ticket itself is spent.
                let (ticket, waits) = (String::new(), outcome.clone());
                let spent = Link::Opening { ticket, session, until, outcome: waits };
                state.links.insert(key.clone(), spent);
                Ok((key, outcome))
            }
            Some(Link::Open { .. }) | None => Err(Refused::Ticket),
        }
    }
}

enum Found {
    Open(Channel, LinkState),
    Wait(watch::Receiver<Option<Outcome>>),
}

fn client(channel: Channel) -> HostClient {
    HostServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE)
}

fn ticket() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

async fn read_hello<S: AsyncRead + Unpin>(stream: &mut S) -> Result<ReverseHello, Refused> {
    let length = stream.read_u32().await.map_err(|_| Refused::Silent)?;
    if length > MAX_HELLO {
        return Err(Refused::Malformed);
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).await.map_err(|_| Refused::Silent)?;
    let hello = ReverseHello::decode(bytes.as_slice()).map_err(|_| Refused::Malformed)?;
    // An empty ticket is what a spent one looks like here.
    if hello.ticket.is_empty() { Err(Refused::Ticket) } else { Ok(hello) }
}

/// HTTP/2 as the client over a stream that the other side has opened. The connector gives the
/// stream once: a broken connection is not dialled again, the hub asks for another.
async fn over<S>(stream: S) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let once = Arc::new(Mutex::new(Some(stream)));
    Endpoint::from_static("http://berth-reverse")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = once.lock().take();
            async move {
                stream
                    .map(hyper_util::rt::TokioIo::new)
                    .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))
            }
        }))
        .await
}

/// A stream that says when it is gone, so that the next call does not use a dead connection.
struct Guarded<S> {
    stream: S,
    state: LinkState,
    /// The host was removed: the connection ends, whoever still uses it.
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Drop for Guarded<S> {
    fn drop(&mut self) {
        self.state.close();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            self.state.close();
            return Poll::Ready(Err(std::io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let ended = match &polled {
            Poll::Ready(Ok(())) => buf.filled().len() == before && buf.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.state.close();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    fn host() -> HostUid {
        "h1".parse().unwrap()
    }

    async fn present(hub: &ReverseHub, ticket: &str, host_uid: &str) -> Result<(), Refused> {
        let hello = ReverseHello { ticket: ticket.into(), host_uid: host_uid.into() };
        let bytes = hello.encode_to_vec();
        let (mut agent, server) = tokio::io::duplex(64 * 1024);
        agent.write_u32(u32::try_from(bytes.len()).unwrap()).await.unwrap();
        agent.write_all(&bytes).await.unwrap();
        // The other end goes away after the hello: HTTP/2 then does not come up, which is the
        // hub's business and not the ticket's.
        drop(agent);
        hub.accept(&host(), server).await
    }

    #[tokio::test]
    async fn without_a_session_the_host_is_away() {
        let hub = ReverseHub::default();
        let error = hub
            .client(&host(), ReverseKind::Operate, Duration::from_secs(1))
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error, ReverseError::Away);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_is_good_once_in_time_and_for_its_host_only() {
        let hub = ReverseHub::default();
        let (tx, mut rx) = mpsc::channel(4);
        hub.attach(host(), 1, tx);
        let asking = hub.clone();
        let asked = tokio::spawn(async move {
            asking.client(&host(), ReverseKind::Operate, Duration::from_secs(30)).await.map(|_| ())
        });
        let open = rx.recv().await.unwrap();
        assert_eq!(present(&hub, "wrong", "h1").await, Err(Refused::Ticket));
        assert_eq!(present(&hub, &open.ticket, "h2").await, Err(Refused::WrongHost));
        assert_eq!(present(&hub, &open.ticket, "h1").await, Ok(()));
        assert_eq!(present(&hub, &open.ticket, "h1").await, Err(Refused::Ticket));
        // The waiter has an outcome, whatever became of HTTP/2 on the cut stream.
        let _outcome = asked.await.unwrap();

        let asking = hub.clone();
        tokio::spawn(async move {
            asking.client(&host(), ReverseKind::Gateway, Duration::from_secs(30)).await.map(|_| ())
        });
        let open = rx.recv().await.unwrap();
        tokio::time::advance(Duration::from_millis(TICKET_MS + 1)).await;
        assert_eq!(present(&hub, &open.ticket, "h1").await, Err(Refused::Ticket));
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_does_not_dial_is_said_so_in_time() {
        let hub = ReverseHub::default();
        let (tx, _rx) = mpsc::channel(4);
        hub.attach(host(), 1, tx);
        let error = hub
            .client(&host(), ReverseKind::Operate, Duration::from_secs(2))
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error, ReverseError::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_on_a_session_that_ends_is_told_at_once_and_the_next_one_is_asked() {
        let hub = ReverseHub::default();
        let ask = |hub: &ReverseHub| {
            let hub = hub.clone();
            tokio::spawn(async move {
                let patience = Duration::from_secs(30);
                hub.client(&host(), ReverseKind::Gateway, patience).await.map(|_| ())
            })
        };
        let begun = Instant::now();
        let (old, mut old_rx) = mpsc::channel(4);
        hub.attach(host(), 1, old);
        let waiting = ask(&hub);
        assert!(old_rx.recv().await.is_some());
        hub.detach(&host(), 1);
        assert_eq!(waiting.await.unwrap(), Err(ReverseError::Away));

        let (old, mut old_rx) = mpsc::channel(4);
        hub.attach(host(), 2, old);
        let waiting = ask(&hub);
        assert!(old_rx.recv().await.is_some());
        let (new, mut new_rx) = mpsc::channel(4);
        hub.attach(host(), 3, new);
        assert_eq!(waiting.await.unwrap(), Err(ReverseError::Away));
        let _waiting = ask(&hub);
        assert!(new_rx.recv().await.is_some());
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test]
    async fn what_a_removed_host_has_open_is_cut_while_it_is_read() {
        let cut = CancellationToken::new();
        let (_agent, server) = tokio::io::duplex(64);
        let state = LinkState::default();
        let ended = Box::pin(cut.clone().cancelled_owned());
        let mut guarded = Guarded { stream: server, state: state.clone(), ended };
        let reading = tokio::spawn(async move { guarded.read_u8().await });
        cut.cancel();
        let wait = tokio::time::timeout(Duration::from_secs(10), reading).await;
        let error = wait.expect("it is still read").unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
        assert!(state.is_closed());
    }

    #[tokio::test]
    async fn a_first_message_that_is_too_long_is_refused() {
        let hub = ReverseHub::default();
        let (mut agent, server) = tokio::io::duplex(64);
        agent.write_u32(MAX_HELLO + 1).await.unwrap();
        assert_eq!(hub.accept(&host(), server).await, Err(Refused::Malformed));
    }

    #[tokio::test]
    async fn an_older_session_does_not_detach_the_newer_one() {
        let hub = ReverseHub::default();
        let (old, _old_rx) = mpsc::channel(4);
        let (new, mut new_rx) = mpsc::channel(4);
        hub.attach(host(), 1, old);
        hub.attach(host(), 2, new);
        hub.detach(&host(), 1);
        let asking = hub.clone();
        tokio::spawn(async move {
            asking.client(&host(), ReverseKind::Operate, Duration::from_secs(5)).await.map(|_| ())
        });
        assert!(new_rx.recv().await.is_some());
    }
}
