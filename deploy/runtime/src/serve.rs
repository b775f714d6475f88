//! The server's life: listen, load, answer, drain, end.
//!
//! The port is open before the model is loaded, so that health checks get an answer and not a
//! refusal. Once told to stop, the server says "not ready", takes no new connection, finishes the
//! requests it has, and ends, at the latest when the grace period is over.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};
use tracing::{debug, info, warn};

use crate::args::Serve;
use crate::batch::{self, Limits, Queue};
use crate::error::Chain;
use crate::model::{LoadError, Model};
use crate::service::{Service, Settings};
use crate::{grpc, http};

/// Connections at once. Each costs some tens of kilobytes; callers are one gateway or a few programs
/// of the same host, so this is far above what is meant.
const CONNECTIONS: usize = 1024;

/// How long a connection may be silent before its first byte or between two HTTP/1 requests. Longer
/// than the minute after which most clients drop a connection themselves, so that it is theirs to do.
const IDLE: Duration = Duration::from_secs(75);

/// Requests at once on one HTTP/2 connection; more wait at the caller.
const STREAMS: u32 = 256;

/// Why the server ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The port is not to be had.
    #[error("cannot listen on {address}; is another server running there?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no model to serve.
    #[error("cannot load the model")]
    Load(#[from] LoadError),
    /// The system gave no thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// Reflection's descriptors are damaged.
    #[error("this build's gRPC descriptors are damaged")]
    Descriptors(#[source] tonic_reflection::server::Error),
    /// Requests were cut off at the end of the grace period.
    #[error("{requests} requests were not finished within {} ms", grace.as_millis())]
    Cut {
        /// How many.
        requests: usize,
        /// How long they had.
        grace: Duration,
    },
}

/// A server that listens; [`Bound::run`] makes it answer.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
    args: Serve,
    service: Arc<Service>,
    ready: watch::Sender<bool>,
}

/// Opens the port.
///
/// # Errors
///
/// When the port cannot be had.
pub async fn bind(args: Serve) -> Result<Bound, ServeError> {
    let address = args.listen;
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let service = Arc::new(Service::new(Settings {
        model: args.model_name.clone(),
        version: args.model_version.clone(),
        max_body: args.max_body,
        timeout: args.request_timeout,
        limit: args.queue as usize,
    }));
    Ok(Bound { listener, address, args, service, ready: watch::Sender::new(false) })
}

impl Bound {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Becomes `true` when the model is loaded and warm.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Loads the model and answers until `stop` ends, then drains.
    ///
    /// # Errors
    ///
    /// When the model cannot be loaded, or when requests had to be cut off at the end.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { listener, address, args, service, ready } = self;
        let health = HealthReporter::new();
        report(&health, ServingStatus::NotServing).await;
        let router = http::routes(service.clone()).merge(
            grpc::routes(service.clone(), HealthService::from_health_reporter(health.clone()))
                .map_err(ServeError::Descriptors)?,
        );
        info!(%address, model = args.model_name, version = args.model_version, "listening");

        let connections = GracefulShutdown::new();
        let stopping = watch::Sender::new(false);
        let mut loading = Some(start_loading(args.clone(), service.clone())?);
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        tokio::pin!(stop);
        loop {
            tokio::select! {
                // Cancel-safe: a connection that was not accepted stays in the backlog.
                accepted = accept(&listener, &places) => {
                    let (stream, place) = accepted;
                    let watcher = connections.watcher();
                    let connection = serve(stream, router.clone(), watcher, stopping.subscribe());
                    tokio::spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                // Cancel-safe: the answer of a oneshot stays until it is taken.
                loaded = wait(&mut loading) => {
                    loading = None;
                    loaded?;
                    report(&health, ServingStatus::Serving).await;
                    ready.send_replace(true);
                }
                // Cancel-safe: it is pinned outside of the loop.
                () = &mut stop => break,
            }
        }

        drop(listener);
        service.stop();
        stopping.send_replace(true);
        report(&health, ServingStatus::NotServing).await;
        ready.send_replace(false);
        info!(requests = service.in_progress(), "stopping");
        let drained = tokio::time::timeout(args.shutdown_grace, connections.shutdown()).await;
        service.close();
        match (drained, service.in_progress()) {
            (Ok(()), _) | (Err(_), 0) => Ok(()),
            (Err(_), requests) => Err(ServeError::Cut { requests, grace: args.shutdown_grace }),
        }
    }
}

/// Tells the standard health service.
async fn report(health: &HealthReporter, status: ServingStatus) {
    for service in ["", "inference.GRPCInferenceService"] {
        health.set_service_status(service, status).await;
    }
}

/// The next connection and its place; errors of accepting are logged and do not end the server.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<tokio::sync::OwnedSemaphorePermit>) {
    // The semaphore is never closed; without a place the backlog waits.
    let place = places.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                warn!("cannot accept a connection: {error}");
                // Out of file descriptors, mostly: trying again at once would only burn the processor.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Serves one connection until it ends or the server stops.
async fn serve(
    stream: TcpStream,
    router: Router,
    watcher: Watcher,
    mut stopping: watch::Receiver<bool>,
) {
    // Small answers go at once.
    let _ = stream.set_nodelay(true);
    // The protocol is known from the first bytes; who sends none must not hold a place for ever, and
    // has nothing that the stop would have to wait for.
    tokio::select! {
        // What was sent before the stop is answered.
        biased;
        // Cancel-safe: it only waits.
        first = tokio::time::timeout(IDLE, stream.readable()) => {
            if !matches!(first, Ok(Ok(()))) {
                return;
            }
        }
        // Cancel-safe: it only reads.
        _ = stopping.wait_for(|stop| *stop) => return,
    }
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        // Room for a picture per stream and for several streams on the connection.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        // Finds callers that vanished without a word.
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        // Callers that go away are no news.
        debug!("a connection ended early: {error}");
    }
}

type Loading = oneshot::Receiver<Result<(), ServeError>>;

/// Waits for the model; for ever when it is loaded already.
async fn wait(loading: &mut Option<Loading>) -> Result<(), ServeError> {
    match loading {
        Some(answer) => answer.await.unwrap_or_else(|_| {
            Err(ServeError::Thread(io::Error::other("the loading thread ended without a word")))
        }),
        None => std::future::pending().await,
    }
}

/// Loads the model on a thread of its own, since it takes the processor for seconds.
fn start_loading(args: Serve, service: Arc<Service>) -> Result<Loading, ServeError> {
    let (done, loading) = oneshot::channel();
    std::thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || {
            // Nobody listens when the server was stopped meanwhile.
            let _ = done.send(load(&args, &service));
        })
        .map_err(ServeError::Thread)?;
    Ok(loading)
}

fn load(args: &Serve, service: &Service) -> Result<(), ServeError> {
    let start = std::time::Instant::now();
    let threads = args.threads.map_or_else(processors, usize::from);
    let model = Arc::new(Model::open(&args.model_dir, threads)?);
    for (kind, specs) in
        [("input", &model.signature().inputs), ("output", &model.signature().outputs)]
    {
        for spec in specs {
            info!("{kind} {spec}");
        }
    }
    let trial = model.try_out()?;
    if let Some(why) = &trial.untried {
        warn!("no input could be made up to warm the model up with; the first request will: {why}");
    }
    let max_rows = match (&trial.joinable, args.max_batch) {
        (Ok(()), rows) => rows as usize,
        (Err(why), 2..) => {
            info!("requests are not joined: {why}");
            1
        }
        (Err(_), _) => 1,
    };
    let queue = Arc::new(Queue::new(Limits {
        max_rows,
        max_delay: args.max_delay,
        capacity: args.queue as usize,
    }));
    batch::start_worker(queue.clone(), model.clone(), service.metrics().clone())
        .map_err(ServeError::Thread)?;
    info!(
        parameters = model.parameters(),
        threads,
        max_batch = max_rows,
        milliseconds = start.elapsed().as_millis(),
        "ready"
    );
    service.load(model, queue, max_rows > 1);
    Ok(())
}

/// The processors this container may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Logs why the server ended.
pub(crate) fn describe(error: &ServeError) -> String {
    Chain(error).to_string()
}
