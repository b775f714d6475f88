//! Dials the server, pumps the session's machine, and opens reverse connections when told.

use crate::busy::{Busy, Counted};
use crate::clock::Clock;
use crate::engine::Engine;
use crate::fetch::client::Client;
use crate::host_service::Served;
use crate::link::{self, Link};
use crate::state::{News, Shared, wall_now};
use berth_agent_core::board::Who;
use berth_agent_core::ledger::Wanted;
use berth_agent_core::session::{self, Dialling, Effect, Input, Session};
use berth_proto::agent::agent_service_client::AgentServiceClient;
use berth_proto::agent::host_service_server::HostServiceServer;
use berth_proto::agent::{Hello, OpenReverse, ReverseHello, Trust};
use berth_proto::record::AgentIdentityFile;
use berth_proto::tls::{self, ALPN_H2, ALPN_REVERSE, Credentials, Trusted};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Notify, broadcast, mpsc};
use tokio::task::spawn_blocking;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Connecting and shaking hands.
const CONNECT: Duration = Duration::from_secs(15);
/// How long the first session waits for the first look at the engine, which takes tens of
/// milliseconds unless the engine is away.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// How long it waits then for the host's facts. Podman takes up to a second for each question.
const FIRST_FACTS: Duration = Duration::from_secs(10);
/// Messages ahead of the wire.
const QUEUE: usize = 16;
/// A reverse connection that nobody uses closes after so long.
const IDLE: Duration = Duration::from_secs(60);
/// Looks whether it is used: an idle connection says nothing to the network more often.
const ALIVE: Duration = Duration::from_secs(30);
/// How often a session that stands looks whether the certificate is to be renewed, which is due for
/// months before it ends.
const RENEWAL_LOOK: Duration = Duration::from_secs(3600);
/// Windows of the control connection: sets come in pages of 256 KiB.
const WINDOW: u32 = 256 * 1024;

/// TLS with the identity that is held now.
///
/// # Errors
/// When what is stored is no identity.
pub fn tls_config(
    identity: &AgentIdentityFile,
    clock: Arc<Clock>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, tls::TlsError> {
    let cluster = identity.cluster.parse().map_err(|_| tls::TlsError::NoIdentity)?;
    let trust = identity.trust.clone().unwrap_or_default();
    let credentials = Credentials {
        certificate_pem: identity.certificate_pem.clone(),
        key_pem: identity.key_pem.clone(),
    };
    let trusted = Trusted::Roots { pem: trust.roots_pem, cluster };
    tls::client_config(trusted, Some(&credentials), alpn, Some(clock))
}

/// Keeps a session for ever.
pub async fn run(shared: Arc<Shared>, engine: Arc<dyn Engine>, client: Client) {
    let mut dialling = Dialling::default();
    let mut told = link::Told::begin(shared.store.folder());
    let mut sequence = 0;
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    // A session begins with all that is on the host: better a moment later than twice.
    let (mut observed, mut gathered) = (shared.observed.subscribe(), shared.gathered.subscribe());
    let seen = tokio::time::timeout(FIRST_LOOK, observed.wait_for(|seen| *seen)).await.is_ok();
    if seen {
        let _ = tokio::time::timeout(FIRST_FACTS, gathered.wait_for(|told| *told)).await;
    }
    loop {
        if shared.identity.lock().removed {
            tracing::warn!("this host was removed from its cluster; nothing is dialled any more");
            return;
        }
        let endpoints = shared.identity.lock().trust.clone().unwrap_or_default().endpoints;
        let Some(endpoint) = dialling.endpoint(&endpoints).cloned() else {
            tracing::error!("no server is known; `berth-agent set-server HOST:PORT` names one");
            return;
        };
        if let Err(error) = crate::join::renew_if_due(&shared, &client, &endpoint).await {
            tracing::warn!(
                error = crate::chain(&*error),
                "the certificate could not be renewed yet"
            );
        }
        if shared.identity.lock().removed {
            // Learnt just now: a host whose certificate has ended gets no session that tells it.
            continue;
        }
        let state = Dials { nonce: &nonce, sequence: &mut sequence, dialling: &mut dialling };
        let ended = attempt(&shared, &engine, &client, &endpoint, state, &mut told).await;
        let how = match &ended {
            Ended::Told(status) => {
                let (how, code) = (session::Ended::told(status.code().into()), status.code());
                let message = status.message();
                match how {
                    session::Ended::Refused { .. } => {
                        tracing::warn!(server = endpoint, ?code, message, "the session was refused")
                    }
                    session::Ended::Lost | session::Ended::Again | session::Ended::AtOnce => {
                        tracing::info!(
                            server = endpoint,
                            ?code,
                            message,
                            "the session ended; what runs goes on"
                        )
                    }
                }
                how
            }
            Ended::Lost(why) => {
                tracing::info!(server = endpoint, why, "the session ended; what runs goes on");
                session::Ended::Lost
            }
            Ended::Again => session::Ended::Again,
            Ended::AtOnce => session::Ended::AtOnce,
        };
        let why = match &ended {
            Ended::Told(status) => Some(format!("{:?}: {}", status.code(), status.message())),
            Ended::Lost(why) => Some(why.clone()),
            // A moment, and by our own wish.
            Ended::Again | Ended::AtOnce => None,
        };
        // Of a host that is being wiped nothing is to be left.
        let wiped = {
            let identity = shared.identity.lock();
            identity.removed && identity.wipe
        };
        if let Some(why) = why.filter(|_| !wiped) {
            told.tell(shared.store.folder(), Link::now(&endpoint, Some(&why)));
        }
        let draw = u64::from(uuid::Uuid::new_v4().as_bytes()[0]) * 4;
        // Paced by the server's window or by backoff.
        tokio::time::sleep(Duration::from_millis(dialling.ended(how, draw))).await;
    }
}

/// What it means that the server's certificate is not believed.
const DISTRUST: &str = "its root is not one that this host knows; where the cluster's root was changed while \
                        this host was away, it has to join again (`berth host token create --rejoin NAME`)";

/// Whether a connection failed because the server's certificate is not believed.
fn is_distrust(error: &tls::TlsError) -> bool {
    let tls::TlsError::Connect { source, .. } = error else { return false };
    let inner = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        inner,
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer))
    )
}

enum Ended {
    /// The server has said why.
    Told(tonic::Status),
    Lost(String),
    Again,
    /// The engine was looked at for the first time: say hello with what it shows.
    AtOnce,
}

fn hello(shared: &Shared, nonce: &str) -> (Hello, Wanted) {
    let identity = shared.identity.lock().clone();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let who = Who {
        host_uid: identity.host_uid,
        instance: identity.instance,
        boot_id: boot_id.trim().to_owned(),
        boot_nonce: nonce.to_owned(),
        agent_start: shared.agent_start,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        features: crate::facts::FEATURES.map(str::to_owned).to_vec(),
        trust_version: identity.trust.map(|t| t.version).unwrap_or_default(),
    };
    let inner = shared.inner.lock();
    (inner.board.hello(&who, wall_now()), inner.board.wanted.clone())
}

/// What goes on from one session to the next.
struct Dials<'a> {
    nonce: &'a str,
    sequence: &'a mut u64,
    dialling: &'a mut Dialling,
}

async fn attempt(
    shared: &Arc<Shared>,
    engine: &Arc<dyn Engine>,
    client: &Client,
    endpoint: &str,
    Dials { nonce, sequence, dialling }: Dials<'_>,
    told_here: &mut link::Told,
) -> Ended {
    let lost = |error: &dyn std::error::Error| Ended::Lost(crate::chain(error));
    let identity = shared.identity.lock().clone();
    let config = match tls_config(&identity, Arc::clone(&shared.clock), &[ALPN_H2]) {
        Ok(config) => config,
        Err(error) => return lost(&error),
    };
    let tune = |e: tonic::transport::Endpoint| {
        e.initial_connection_window_size(WINDOW).initial_stream_window_size(WINDOW)
    };
    let channel = match tls::channel(endpoint, config, CONNECT, tune).await {
        Ok(channel) => channel,
        Err(error) if is_distrust(&error) => {
            return Ended::Lost(format!("{}: {DISTRUST}", crate::chain(&error)));
        }
        Err(error) => return lost(&error),
    };
    // Subscribed before the hello, so that nothing falls between the two.
    let mut news = shared.news.subscribe();
    let (hello, wanted) = hello(shared, nonce);
    let complete = hello.engine_observed;
    let mut observed = shared.observed.subscribe();
    let (mut machine, first) = Session::begin(hello, wanted, *sequence, shared.now().mono);
    let (tx, rx) = mpsc::channel(QUEUE);
    let mut queue: std::collections::VecDeque<_> = first.into();
    let mut service = AgentServiceClient::new(channel);
    let opening = tokio::time::timeout(CONNECT, service.session(ReceiverStream::new(rx)));
    // The hello must be on its way for the server to answer.
    let feeding = async {
        while let Some(message) = queue.pop_front() {
            if tx.send(message).await.is_err() {
                break;
            }
        }
    };
    let (opened, ()) = tokio::join!(opening, feeding);
    let mut incoming = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Ended::Told(status),
        Err(_) => return Ended::Lost("the server did not answer in time".to_owned()),
    };
    let mut queue = std::collections::VecDeque::new();
    let told = Notify::new();
    let renewed = crate::join::renewed(shared, client, endpoint, RENEWAL_LOOK, &told);
    let mut renewed = std::pin::pin!(renewed);
    loop {
        let due = machine.deadline().since_ms(shared.now().mono);
        let input = tokio::select! {
            // Cancel-safe, all of them.
            message = incoming.next() => match message {
                Some(Ok(message)) => Input::Message(Box::new(message)),
                Some(Err(status)) => return Ended::Told(status),
                None => return Ended::Lost("the server ended the session".to_owned()),
            },
            permit = tx.reserve(), if !queue.is_empty() => match permit {
                Ok(permit) => {
                    if let Some(message) = queue.pop_front() {
                        permit.send(message);
                    }
                    continue;
                }
                Err(_) => return Ended::Lost("the connection broke".to_owned()),
            },
            next = news.recv() => match next {
                Ok(next) => heard(next),
                // Too much at once: say hello anew, with all of it.
                Err(broadcast::error::RecvError::Lagged(_)) => return Ended::Again,
                Err(broadcast::error::RecvError::Closed) => return Ended::Again,
            },
            _ = observed.wait_for(|seen| *seen), if !complete => return Ended::AtOnce,
            // What this session shook hands with ends some day; the next one shows the new one.
            () = &mut renewed => return Ended::Again,
            () = tokio::time::sleep(Duration::from_millis(due)) => Input::Tick,
        };
        let (mut inputs, mut lagged) = (vec![input], false);
        while let Some(input) = inputs.pop() {
            for effect in machine.step(shared.now(), input) {
                match effect {
                    Effect::Send(message) => queue.push_back(*message),
                    Effect::Welcomed(welcome) => {
                        dialling.welcomed(welcome.reconnect_window_ms);
                        told_here.tell(shared.store.folder(), Link::now(endpoint, None));
                        tracing::info!(
                            server = endpoint,
                            version = welcome.server_version,
                            observe_only = welcome.observe_only,
                            reason = welcome.reason,
                            "the session stands"
                        );
                    }
                    Effect::Persist(set) => {
                        let (shared, wanted) = (Arc::clone(shared), Wanted::Set(Arc::new(*set)));
                        // The session waits, as what the server says next may build on this set.
                        let write = move || shared.persist(&wanted).map_err(|e| crate::chain(&e));
                        let result = spawn_blocking(write)
                            .await
                            .unwrap_or_else(|error| Err(error.to_string()));
                        if let Err(why) = &result {
                            tracing::error!(why, "a set could not be made durable");
                        }
                        inputs.push(Input::Persisted(result));
                        // What was found out under the set before comes before this one counts.
                        let before = heard_so_far(&mut news);
                        lagged = before.is_none();
                        inputs.extend(before.into_iter().flatten().rev());
                    }
                    Effect::Act(set) => {
                        shared.act_on(Wanted::Set(Arc::new(*set)));
                    }
                    Effect::Trust(trust) => {
                        if let Some(version) = take_trust(shared, client, *trust).await {
                            inputs.push(Input::Trusted(version));
                            told.notify_one();
                        }
                    }
                    Effect::Open(open) => {
                        let served =
                            Served { shared: Arc::clone(shared), engine: Arc::clone(engine) };
                        let endpoint = endpoint.to_owned();
                        tokio::spawn(async move {
                            if let Err(error) = reverse(served, &endpoint, open).await {
                                tracing::warn!(
                                    error = crate::chain(&*error),
                                    "a reverse connection could not be served"
                                );
                            }
                        });
                    }
                    Effect::Removed { wipe } => {
                        tracing::warn!(wipe, "this host was removed from its cluster");
                        let shared = Arc::clone(shared);
                        if let Ok(Err(error)) = spawn_blocking(move || shared.removed(wipe)).await {
                            tracing::error!(error = crate::chain(&error), "cannot be remembered");
                        }
                    }
                    Effect::Kept(_) => *sequence = machine.sequence(),
                    Effect::Close(why) => return Ended::Lost(why.to_owned()),
                }
            }
        }
        *sequence = machine.sequence();
        if lagged {
            // Too much at once, and the set counts all the same.
            return Ended::Again;
        }
    }
}

fn heard(news: News) -> Input {
    match news {
        News::Report(report) => Input::Report(report),
        News::Absent(uid) => Input::Absent(uid.to_string()),
        News::Facts(facts) => Input::Facts(facts),
    }
}

/// All the news there is, oldest first; `None`: too much at once.
fn heard_so_far(news: &mut broadcast::Receiver<News>) -> Option<Vec<Input>> {
    use broadcast::error::TryRecvError;
    let mut all = Vec::new();
    loop {
        match news.try_recv() {
            Ok(next) => all.push(heard(next)),
            Err(TryRecvError::Empty | TryRecvError::Closed) => return Some(all),
            Err(TryRecvError::Lagged(_)) => return None,
        }
    }
}

/// Takes newer roots and addresses over; the server's that were held before stay behind the new ones.
pub(crate) fn take_over(identity: &mut AgentIdentityFile, newer: Trust) {
    let held = identity.trust.take().unwrap_or_default();
    identity.trust = Some(if newer.version > held.version {
        if !newer.registry.is_empty() {
            identity.registry.clone_from(&newer.registry);
        }
        Trust { endpoints: session::endpoints(&newer.endpoints, &held.endpoints), ..newer }
    } else {
        held
    });
}

/// Makes newer roots and endpoints durable.
async fn take_trust(shared: &Arc<Shared>, client: &Client, trust: Trust) -> Option<u64> {
    let held = shared.identity.lock().trust.as_ref().map_or(0, |t| t.version);
    if trust.version <= held {
        return None;
    }
    let version = trust.version;
    match change(shared, client, move |identity| take_over(identity, trust)).await {
        Ok(()) => Some(version),
        Err(error) => {
            tracing::error!(
                error = crate::chain(&*error),
                "roots and addresses are not taken over"
            );
            None
        }
    }
}

/// Makes a changed identity durable, off the runtime's only thread, and uses it towards the registry
/// from then on.
pub(crate) async fn change(
    shared: &Arc<Shared>,
    client: &Client,
    edit: impl FnOnce(&mut AgentIdentityFile) + Send + 'static,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let changing = Arc::clone(shared);
    let next = spawn_blocking(move || changing.change_identity(edit)).await??;
    let config = tls_config(&next, Arc::clone(&shared.clock), &[b"http/1.1"])?;
    client.retarget(next.registry, config);
    Ok(())
}

/// Dials a second connection and serves on it until it is idle.
async fn reverse(
    served: Served,
    endpoint: &str,
    open: OpenReverse,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let identity = served.shared.identity.lock().clone();
    let config = tls_config(&identity, Arc::clone(&served.shared.clock), &[ALPN_REVERSE])?;
    let mut stream = tls::connect(endpoint, config, CONNECT).await?;
    let hello = ReverseHello { ticket: open.ticket, host_uid: identity.host_uid }.encode_to_vec();
    stream.write_u32(u32::try_from(hello.len())?).await?;
    stream.write_all(&hello).await?;
    stream.flush().await?;
    let busy = Busy::default();
    let service = Counted { service: HostServiceServer::new(served), busy: busy.clone() };
    let service = hyper_util::service::TowerToHyperService::new(service);
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(hyper_util::rt::TokioTimer::new())
        .keep_alive_interval(ALIVE)
        .keep_alive_timeout(ALIVE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(4 * WINDOW);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        // Cancel-safe: the connection is polled on below.
        ended = connection.as_mut() => return Ok(ended?),
        () = busy.idle(IDLE) => {}
    }
    tracing::debug!("a reverse connection is idle and closes");
    connection.as_mut().graceful_shutdown();
    // A call that came at that moment is still served; a peer that does not close is left.
    let _ = tokio::time::timeout(IDLE, connection).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_news_there_is_is_heard_in_order_and_a_loss_is_told() {
        let (tx, mut rx) = broadcast::channel(2);
        let gone = |uid: &str| News::Absent(uid.parse().unwrap());
        assert_eq!(heard_so_far(&mut rx).map(|all| all.len()), Some(0));
        for uid in ["a", "b"] {
            tx.send(gone(uid)).unwrap();
        }
        let all = heard_so_far(&mut rx).unwrap();
        let uids: Vec<_> = all
            .iter()
            .map(|input| match input {
                Input::Absent(uid) => uid.as_str(),
                _ => "else",
            })
            .collect();
        assert_eq!(uids, ["a", "b"]);
        for uid in ["c", "d", "e"] {
            tx.send(gone(uid)).unwrap();
        }
        assert!(heard_so_far(&mut rx).is_none());
    }

    #[test]
    fn newer_addresses_come_before_the_old_ones_and_older_ones_change_nothing() {
        let trust = |version, endpoint: &str, registry: &str| Trust {
            version,
            endpoints: vec![endpoint.to_owned()],
            registry: registry.to_owned(),
            ..Trust::default()
        };
        let mut identity = AgentIdentityFile::default();
        take_over(&mut identity, trust(3, "a:1", "r:1"));
        take_over(&mut identity, trust(2, "never:1", "never:1"));
        take_over(&mut identity, trust(3, "never:1", "never:1"));
        assert_eq!(identity.registry, "r:1");
        take_over(&mut identity, trust(9, "b:2", "r:2"));
        take_over(&mut identity, trust(10, "c:3", ""));
        assert_eq!(identity.trust.unwrap().endpoints, ["c:3", "b:2", "a:1"]);
        assert_eq!(identity.registry, "r:2", "an older server does not tell it");
    }
}
