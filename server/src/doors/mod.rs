//! The doors: TLS listeners that tell who knocks.
//!
//! Handshakes run on tasks of their own with a deadline and a bound on how many are under way, so
//! that a slow or silent peer holds up nobody. A client certificate is asked for and optional; one
//! that is expired or of another cluster ends the handshake, and the log says why.

pub mod certificates;
mod unread;

use arc_swap::ArcSwap;
use axum::Router;
use berth_proto::tls::{self, TlsError};
use certificates::Certificates;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::Service as _;
use unread::Lent;

/// How long a handshake may take: three round trips of a bad mobile link.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way at once; a whole fleet that comes back waits in the kernel's queue.
const HANDSHAKES: usize = 1024;
/// Handshakes at once from one address: half of all, so that no single one keeps others out, and a
/// fleet behind one address comes in.
const HANDSHAKES_OF_ONE: usize = HANDSHAKES / 2;
/// How long a peer that is turned away may take to hear why: a round trip of a bad mobile link.
const FAREWELL: Duration = Duration::from_secs(2);
/// What such a peer may have sent meanwhile: the first requests of an HTTP/2 client.
const FAREWELL_BYTES: u64 = 64 * 1024;
/// A connection whose first request does not come within this is closed: it holds a place.
const FIRST: Duration = Duration::from_secs(60);
/// Connections of one door at once.
const CONNECTIONS: usize = 65_536;
/// How long the head of an HTTP/1 request may take (slow loris).
const HEAD: Duration = Duration::from_secs(15);
/// Connections handed over and not yet taken.
const QUEUE: usize = 64;

/// Why a door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr} ({flag}); is another server running there?")]
    Bind {
        /// The flag that sets it.
        flag: &'static str,
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS of the door cannot be set up")]
    Tls(#[from] TlsError),
}

/// The client's certificates, in a request's extensions; absent: it showed none.
#[derive(Debug, Clone)]
pub struct PeerCerts(pub Arc<Vec<CertificateDer<'static>>>);

/// The client's address, in a request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddr(pub SocketAddr);

/// Who speaks to a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// Our own agents and command line, and gRPC clients: TLS 1.3.
    Ours,
    /// Engines, scripts and browsers as well, which may be older: TLS 1.2 or 1.3.
    Anybody,
}

static NEWEST: [&rustls::SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
static NEWEST_TWO: [&rustls::SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];

impl Speaks {
    fn versions(self) -> &'static [&'static rustls::SupportedProtocolVersion] {
        match self {
            Self::Ours => &NEWEST,
            Self::Anybody => &NEWEST_TWO,
        }
    }
}

/// TLS of a door: what it shows, and the roots of clients' certificates.
///
/// # Errors
/// When PEM does not hold what it should.
fn server_config(
    certificates: Certificates,
    client_roots_pem: &str,
    alpn: &[&[u8]],
    speaks: Speaks,
) -> Result<Arc<ServerConfig>, TlsError> {
    let roots = Arc::new(tls::roots(client_roots_pem)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, tls::provider())
        .allow_unauthenticated()
        .build()
        .map_err(|_| TlsError::Pem { what: "root" })?;
    let mut config = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(speaks.versions())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// TLS of a door, whose clients' roots may change while it is open.
pub struct DoorTls {
    certificates: Certificates,
    alpn: Vec<Vec<u8>>,
    speaks: Speaks,
    config: ArcSwap<ServerConfig>,
}

impl DoorTls {
    /// What it shows, and the roots (PEM) of its clients' certificates.
    ///
    /// # Errors
    /// When PEM does not hold what it should.
    pub fn new(
        certificates: Certificates,
        client_roots_pem: &str,
        alpn: &[&[u8]],
        speaks: Speaks,
    ) -> Result<Self, TlsError> {
        let config = server_config(certificates.clone(), client_roots_pem, alpn, speaks)?;
        let alpn = alpn.iter().map(|a| a.to_vec()).collect();
        Ok(Self { certificates, alpn, speaks, config: ArcSwap::new(config) })
    }

    /// From the next handshake on these are the roots of clients' certificates.
    ///
    /// # Errors
    /// When PEM holds none; then they are as before.
    pub fn trust(&self, client_roots_pem: &str) -> Result<(), TlsError> {
        let alpn: Vec<&[u8]> = self.alpn.iter().map(Vec::as_slice).collect();
        let certificates = self.certificates.clone();
        self.config.store(server_config(certificates, client_roots_pem, &alpn, self.speaks)?);
        Ok(())
    }

    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }
}

/// Listens.
///
/// # Errors
/// When the address is taken or not ours.
pub async fn bind(flag: &'static str, addr: SocketAddr) -> Result<TcpListener, DoorError> {
    TcpListener::bind(addr).await.map_err(|source| DoorError::Bind { flag, addr, source })
}

/// A connection that was let in.
pub struct Entered {
    /// The stream.
    pub stream: TlsStream<TcpStream>,
    /// Whence.
    pub addr: SocketAddr,
}

/// Accepts and shakes hands until `stop`, handing connections over.
pub fn accept(
    name: &'static str,
    listener: TcpListener,
    tls: Arc<DoorTls>,
    mut stop: watch::Receiver<bool>,
) -> mpsc::Receiver<Entered> {
    let (tx, rx) = mpsc::channel(QUEUE);
    let shaking = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        let crowd = Arc::new(Crowd::default());
        loop {
            // The place first, then the connection: what waits waits in the kernel.
            let Ok(place) = Arc::clone(&shaking).acquire_owned().await else { return };
            let accepted = tokio::select! {
                // Cancel-safe, both.
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            let (tcp, addr) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of handles: the next connection may be served after others have ended.
                    tracing::warn!(door = name, %error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(guest) = crowd.enter(addr.ip()) else {
                tracing::info!(door = name, %addr, "too many handshakes from one address");
                continue;
            };
            let (acceptor, tx) = (tls.acceptor(), tx.clone());
            tokio::spawn(async move {
                let _ = tcp.set_nodelay(true);
                let shaken = acceptor.accept(tcp).into_fallible();
                match tokio::time::timeout(HANDSHAKE, shaken).await {
                    Ok(Ok(stream)) => {
                        let _ = tx.send(Entered { stream, addr }).await;
                    }
                    Ok(Err((error, tcp))) => {
                        tracing::info!(door = name, %addr, %error, "a handshake failed");
                        farewell(tcp).await;
                    }
                    Err(_) => tracing::info!(door = name, %addr, "a handshake took too long"),
                }
                drop((place, guest));
            });
        }
    });
    rx
}

/// Lets a peer hear why it is turned away. In TLS 1.3 it may be sending already: closed with that unread, the
/// connection would be reset, and the peer might see no more than that.
async fn farewell(mut tcp: TcpStream) {
    let heard = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut tcp.take(FAREWELL_BYTES), &mut tokio::io::sink()).await
    };
    // A peer that is gone, or stays silent, needs no more words.
    let _ = tokio::time::timeout(FAREWELL, heard).await;
}

/// Handshakes under way, by address.
#[derive(Debug, Default)]
struct Crowd(Mutex<HashMap<IpAddr, usize>>);

/// What counts as one address: of IPv6 its first 64 bits, of which whoever has one has all.
fn household(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// One of them.
struct Guest(Arc<Crowd>, IpAddr);

impl Crowd {
    /// `None`: this address has its share.
    fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Guest> {
        let from = household(from);
        let mut all = self.0.lock();
        let held = all.entry(from).or_default();
        if *held >= HANDSHAKES_OF_ONE {
            return None;
        }
        *held += 1;
        Some(Guest(Arc::clone(self), from))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = self.0.0.lock();
        if let Some(held) = all.get_mut(&self.1) {
            *held -= 1;
            if *held == 0 {
                all.remove(&self.1);
            }
        }
    }
}

/// Serves HTTP/1.1 and HTTP/2 on connections until `stop`; then lets those under way end for a
/// moment.
pub async fn serve_http(
    name: &'static str,
    mut entered: mpsc::Receiver<Entered>,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let unread = Arc::new(Semaphore::new(unread::AT_ONCE));
    let graceful = hyper_util::server::graceful::GracefulShutdown::new();
    loop {
        let next = tokio::select! {
            // Cancel-safe, both.
            next = entered.recv() => next,
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(Entered { stream, addr }) = next else { break };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(door = name, "too many connections; one is turned away");
            continue;
        };
        let certs = stream.get_ref().1.peer_certificates().map(|certs| {
            PeerCerts(Arc::new(certs.iter().map(|c| c.clone().into_owned()).collect()))
        });
        let (router, unread) = (router.clone(), Arc::clone(&unread));
        let (asked, mut first) = watch::channel(false);
        let service =
            hyper::service::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
                if let Some(certs) = &certs {
                    request.extensions_mut().insert(certs.clone());
                }
                request.extensions_mut().insert(PeerAddr(addr));
                asked.send_if_modified(|asked| !std::mem::replace(asked, true));
                router.clone().call(Lent::of(request, &unread))
            });
        let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(256)
            .keep_alive_interval(Duration::from_secs(30));
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let connection = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let begun = async { first.wait_for(|asked| *asked).await.is_ok() };
            let begun = tokio::time::timeout(FIRST, begun);
            let ended = tokio::select! {
                // Cancel-safe: the connection is polled on below.
                ended = connection.as_mut() => ended,
                begun = begun => {
                    if begun.is_err() {
                        tracing::info!(door = name, %addr, "a connection asked for nothing");
                        return;
                    }
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(door = name, %addr, %error, "a connection ended badly");
            }
            drop(place);
        });
    }
    let _ = tokio::time::timeout(Duration::from_secs(5), graceful.shutdown()).await;
}

#[cfg(test)]
mod tests;
