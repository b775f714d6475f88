//! Dials the server, pumps the session's machine, and opens reverse connections when told.

use crate::engine::Engine;
use crate::fetch::client::Client;
use crate::host_service::Served;
use crate::state::{News, Shared, wall_now};
use berth_agent_core::ledger::{Wanted, set_id};
use berth_agent_core::session::{Dialling, Effect, Input, Session};
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
use tokio::sync::{broadcast, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

/// Connecting and shaking hands.
const CONNECT: Duration = Duration::from_secs(15);
/// Messages ahead of the wire.
const QUEUE: usize = 16;
/// A reverse connection that nobody uses closes after so long.
const IDLE: Duration = Duration::from_secs(60);
/// Windows of the control connection: sets come in pages of 256 KiB.
const WINDOW: u32 = 256 * 1024;

/// TLS with the identity that is held now.
///
/// # Errors
/// When what is stored is no identity.
pub fn tls_config(
    identity: &AgentIdentityFile,
    last_seen_unix_ms: i64,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, tls::TlsError> {
    let cluster = identity.cluster.parse().map_err(|_| tls::TlsError::NoIdentity)?;
    let trust = identity.trust.clone().unwrap_or_default();
    let credentials = Credentials {
        certificate_pem: identity.certificate_pem.clone(),
        key_pem: identity.key_pem.clone(),
    };
    let clock = Arc::new(Clock { at_least_unix_ms: last_seen_unix_ms });
    let trusted = Trusted::Roots { pem: trust.roots_pem, cluster };
    tls::client_config(trusted, Some(&credentials), alpn, Some(clock))
}

/// The greater of the system's clock and what was seen last: a clock without a battery begins in
/// 1970, before every certificate.
#[derive(Debug)]
struct Clock {
    at_least_unix_ms: i64,
}

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let ms = wall_now().0.max(self.at_least_unix_ms);
        let since = Duration::from_millis(u64::try_from(ms).ok()?);
        Some(rustls::pki_types::UnixTime::since_unix_epoch(since))
    }
}

/// Keeps a session for ever.
pub async fn run(shared: Arc<Shared>, engine: Arc<dyn Engine>, client: Client) {
    let mut dialling = Dialling::default();
    let mut sequence = 0;
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let mut turn = 0_usize;
    loop {
        if shared.identity.lock().removed {
            tracing::warn!("this host was removed from its cluster; nothing is dialled any more");
            return;
        }
        if let Err(error) = crate::join::renew_if_due(&shared, &client).await {
            tracing::warn!(
                error = crate::chain(&*error),
                "the certificate could not be renewed yet"
            );
        }
        let endpoints = shared.identity.lock().trust.clone().unwrap_or_default().endpoints;
        let Some(endpoint) = endpoints.get(turn % endpoints.len().max(1)).cloned() else {
            tracing::error!("no server is known; `berth-agent set-server HOST:PORT` names one");
            return;
        };
        let ended =
            one(&shared, &engine, &client, &endpoint, &nonce, &mut sequence, &mut dialling).await;
        let stay_away = match &ended {
            Ended::Refused(status) => {
                tracing::warn!(
                    server = endpoint, code = ?status.code(), message = status.message(),
                    "the session was refused"
                );
                turn += 1;
                matches!(status.code(), Code::PermissionDenied | Code::InvalidArgument)
            }
            Ended::Lost(why) => {
                tracing::info!(server = endpoint, why, "the session ended; what runs goes on");
                turn += 1;
                false
            }
            Ended::Again => false,
        };
        let draw = u64::from(uuid::Uuid::new_v4().as_bytes()[0]) * 4;
        let wait = dialling.wait_ms(stay_away, draw);
        // Paced by the server's window or by backoff.
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

enum Ended {
    Refused(tonic::Status),
    Lost(String),
    Again,
}

fn hello(shared: &Shared, nonce: &str) -> (Hello, Wanted) {
    let identity = shared.identity.lock().clone();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let inner = shared.inner.lock();
    let set = inner.wanted.set();
    let hello = Hello {
        host_uid: identity.host_uid,
        instance: identity.instance,
        boot_id: boot_id.trim().to_owned(),
        agent_start: shared.agent_start,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        features: crate::facts::FEATURES.map(str::to_owned).to_vec(),
        held: set.map(|s| set_id(s.number)),
        held_digest: set.map(|s| s.digest.clone()).unwrap_or_default(),
        bodies: set.map(|s| s.bodies.keys().map(ToString::to_string).collect()).unwrap_or_default(),
        observed: inner.reports.values().cloned().collect(),
        observed_pages: 0,
        facts: Some(inner.facts.clone()),
        time: crate::state::moment(wall_now()),
        boot_nonce: nonce.to_owned(),
        trust_version: identity.trust.map(|t| t.version).unwrap_or_default(),
        engine_observed: inner.engine_observed,
    };
    (hello, inner.wanted.clone())
}

async fn one(
    shared: &Arc<Shared>,
    engine: &Arc<dyn Engine>,
    client: &Client,
    endpoint: &str,
    nonce: &str,
    sequence: &mut u64,
    dialling: &mut Dialling,
) -> Ended {
    let lost = |error: &dyn std::error::Error| Ended::Lost(crate::chain(error));
    let seen = shared.store.set().map(|s| s.last_seen_unix_ms).unwrap_or(0);
    let identity = shared.identity.lock().clone();
    let config = match tls_config(&identity, seen, &[ALPN_H2]) {
        Ok(config) => config,
        Err(error) => return lost(&error),
    };
    let tune = |e: tonic::transport::Endpoint| {
        e.initial_connection_window_size(WINDOW).initial_stream_window_size(WINDOW)
    };
    let channel = match tls::channel(endpoint, config, CONNECT, tune).await {
        Ok(channel) => channel,
        Err(error) => return lost(&error),
    };
    // Subscribed before the hello, so that nothing falls between the two.
    let mut news = shared.news.subscribe();
    let (hello, wanted) = hello(shared, nonce);
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
        Ok(Err(status)) => return Ended::Refused(status),
        Err(_) => return Ended::Lost("the server did not answer in time".to_owned()),
    };
    let mut queue = std::collections::VecDeque::new();
    loop {
        let due = machine.deadline().since_ms(shared.now().mono);
        let input = tokio::select! {
            // Cancel-safe, all of them.
            message = incoming.next() => match message {
                Some(Ok(message)) => Input::Message(Box::new(message)),
                Some(Err(status)) if status.code() == Code::Unavailable || status.code() == Code::Unknown =>
                    return Ended::Lost(status.message().to_owned()),
                Some(Err(status)) => return Ended::Refused(status),
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
                Ok(News::Report(report)) => Input::Report(report),
                Ok(News::Absent(uid)) => Input::Absent(uid.to_string()),
                Ok(News::Facts(facts)) => Input::Facts(facts),
                // Too much at once: say hello anew, with all of it.
                Err(broadcast::error::RecvError::Lagged(_)) => return Ended::Again,
                Err(broadcast::error::RecvError::Closed) => return Ended::Again,
            },
            () = tokio::time::sleep(Duration::from_millis(due)) => Input::Tick,
        };
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for effect in machine.step(shared.now(), input) {
                match effect {
                    Effect::Send(message) => queue.push_back(*message),
                    Effect::Welcomed(welcome) => {
                        dialling.welcomed(welcome.reconnect_window_ms);
                        tracing::info!(
                            server = endpoint,
                            version = welcome.server_version,
                            observe_only = welcome.observe_only,
                            reason = welcome.reason,
                            "the session stands"
                        );
                    }
                    Effect::Persist(set) => {
                        let wanted = Wanted::Set(Arc::new(*set));
                        let result = shared.persist(&wanted).map_err(|e| crate::chain(&e));
                        if let Err(why) = &result {
                            tracing::error!(why, "a set could not be made durable");
                        }
                        inputs.push(Input::Persisted(result));
                    }
                    Effect::Act(set) => {
                        shared.inner.lock().wanted = Wanted::Set(Arc::new(*set));
                        shared.wake.notify_one();
                    }
                    Effect::Trust(trust) => {
                        if let Some(version) = take_trust(shared, *trust) {
                            inputs.push(Input::Trusted(version));
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
                        let mut identity = shared.identity.lock().clone();
                        identity.removed = true;
                        if let Err(error) = shared.store.put_identity(&identity) {
                            tracing::error!(error = crate::chain(&error), "cannot be remembered");
                        }
                        *shared.identity.lock() = identity;
                        if wipe {
                            crate::run::wipe(shared, engine.as_ref()).await;
                        }
                    }
                    Effect::Kept(_) => *sequence = machine.sequence(),
                    Effect::Close(why) => return Ended::Lost(why.to_owned()),
                }
            }
        }
        *sequence = machine.sequence();
        let _ = client;
    }
}

/// Makes newer roots and endpoints durable.
fn take_trust(shared: &Shared, trust: Trust) -> Option<u64> {
    let mut identity = shared.identity.lock().clone();
    let held = identity.trust.as_ref().map_or(0, |t| t.version);
    if trust.version <= held {
        return None;
    }
    let version = trust.version;
    identity.trust = Some(trust);
    match shared.store.put_identity(&identity) {
        Ok(()) => {
            *shared.identity.lock() = identity;
            Some(version)
        }
        Err(error) => {
            tracing::error!(error = crate::chain(&error), "roots could not be made durable");
            None
        }
    }
}

/// Dials a second connection and serves on it until it is idle.
async fn reverse(
    served: Served,
    endpoint: &str,
    open: OpenReverse,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let identity = served.shared.identity.lock().clone();
    let config = tls_config(&identity, 0, &[ALPN_REVERSE])?;
    let mut stream = tls::connect(endpoint, config, CONNECT).await?;
    let hello = ReverseHello { ticket: open.ticket, host_uid: identity.host_uid }.encode_to_vec();
    stream.write_u32(u32::try_from(hello.len())?).await?;
    stream.write_all(&hello).await?;
    stream.flush().await?;
    let service = HostServiceServer::new(served);
    let service = hyper_util::service::TowerToHyperService::new(service);
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(hyper_util::rt::TokioTimer::new())
        .keep_alive_interval(IDLE / 2)
        .keep_alive_timeout(IDLE / 2)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(4 * WINDOW);
    builder.serve_connection(TokioIo::new(stream), service).await?;
    Ok(())
}
