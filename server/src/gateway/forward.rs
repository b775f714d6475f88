//! One request to one of several replicas.

use super::body::{BUDGET_KIB, BodyError, Payload};
use super::dial::{self, DialError, DialIo};
use super::grpc;
use super::names::{self, Naming};
use super::reply::{Placed, Reply};
use super::route::{Backend, Chosen, REQUESTS_OF_ONE, Routes};
use crate::session::reverse::ReverseHub;
use axum::body::Body;
use berth_proto::ids::ReplicaUid;
use http::{HeaderMap, Method, Request, Response, Uri, header};
use hyper::client::conn::TrySendError;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// How long reaching a replica may take before the next one is tried.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a request may wait for the head of its answer, its own body included. A guess that fits
/// models; callers with a shorter patience say so (`grpc-timeout`) or end the request themselves.
const REQUEST_DEADLINE: Duration = Duration::from_secs(300);
/// Replicas tried for one request at the most: beyond that the deployment has another problem.
const MAX_TRIES: usize = 16;
/// Waits for a replica that is ready and can be reached while a rollout, or a restart of an agent or of
/// this server, leaves none for a moment: an agent is back and has looked at its containers within some
/// seconds. Reaching the last one may take its own time beyond that.
const WAIT_FOR_READY: Duration = Duration::from_secs(20);
/// Pause before replicas that could not be reached are tried once more, when the table stays as it is.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Requests under way at once; more wait. Each holds some 100 KiB of buffers between two connections.
const REQUESTS: usize = 4 * REQUESTS_OF_ONE;

/// Why a request was not answered by a replica.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No such deployment.
    #[error("{nothing} \"{0}\"", nothing = berth_proto::words::NO_DEPLOYMENT)]
    UnknownModel(String),
    /// It has no replica of that version.
    #[error("no ready replica serves model \"{model}\" in version \"{version}\"")]
    UnknownVersion {
        /// The model.
        model: String,
        /// The version.
        version: String,
    },
    /// It has no ready replica.
    #[error("model \"{0}\" has no ready replica")]
    NoneReady(String),
    /// None of those tried could be reached; nothing was sent.
    #[error("no replica of model \"{model}\" could be reached")]
    Unreachable {
        /// The model.
        model: String,
        /// The last failure.
        #[source]
        source: DialError,
    },
    /// A replica broke the connection after the request was sent.
    #[error("the replica of model \"{model}\" broke the connection")]
    Broken {
        /// The model.
        model: String,
        /// How.
        #[source]
        source: hyper::Error,
    },
    /// The caller's body.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The caller's path or headers.
    #[error("the request's path or headers are not valid")]
    Head(#[from] http::Error),
    /// No answer in time.
    #[error("model \"{0}\" did not answer in time")]
    TimedOut(String),
}

/// HTTP/1.1 or HTTP/2 towards the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// For OIP over HTTP.
    Http1,
    /// For OIP over gRPC.
    Http2,
}

/// Whether a request that was sent may be sent again when not one byte of an answer came, because
/// the replica was being stopped or its host's link broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// It changes nothing: inference, metadata, readiness, what HTTP calls safe.
    Harmless,
    /// Unknown: only what was not sent is sent again.
    Never,
}

/// A request as a replica gets it.
pub struct Onward {
    /// The deployment, by the name callers use.
    pub model: String,
    /// The model's version; empty: any.
    pub version: String,
    /// How to speak to the replica.
    pub wire: Wire,
    /// May it be sent twice.
    pub repeat: Repeat,
    /// Where it names the model.
    pub naming: Naming,
    /// Method.
    pub method: Method,
    /// Path and query, the model by the name callers use; with scheme and authority for HTTP/2.
    pub uri: Uri,
    /// Headers; the body's length is added.
    pub headers: HeaderMap,
    /// Body.
    pub payload: Payload,
    /// How long the caller waits.
    pub patience: Option<Duration>,
}

/// Sends requests on.
#[derive(Clone)]
pub struct Forwarder {
    /// Who is ready.
    pub routes: Arc<Routes>,
    /// How hosts are reached.
    pub hub: ReverseHub,
    /// Memory for bodies that can be sent again.
    pub budget: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Forwarder {
    /// Sends by this table, through these connections.
    #[must_use]
    pub fn new(routes: Arc<Routes>, hub: ReverseHub) -> Self {
        let budget = Arc::new(Semaphore::new(BUDGET_KIB));
        Self { routes, hub, budget, places: Arc::new(Semaphore::new(REQUESTS)) }
    }

    /// Sends a request to a ready replica and answers with its response's head and streamed body.
    ///
    /// Another replica is tried when nothing was sent; or, for a request that changes nothing, when
    /// not one byte of an answer came and the one asked has left the table or its host's link broke.
    /// One that breaks by itself is not blamed on others: a request that kills a replica must not
    /// kill them all.
    ///
    /// # Errors
    /// See [`ForwardError`].
    pub async fn send(&self, onward: Onward) -> Result<Response<Body>, ForwardError> {
        let model = onward.model.clone();
        let patience = onward.patience.map_or(REQUEST_DEADLINE, |p| p.min(REQUEST_DEADLINE));
        tokio::time::timeout(patience, async {
            let Some(backend) = self.routes.backend(&onward.model) else {
                return Err(ForwardError::UnknownModel(onward.model));
            };
            // Never closed. Held until the answer has gone by: one that is read slowly costs memory.
            // The deployment's first: whoever waits for that must not hold one of all.
            let own = backend.places.0.clone().acquire_owned().await.ok();
            let any = Arc::clone(&self.places).acquire_owned().await.ok();
            let answer = self.attempts(onward).await?;
            Ok(answer.map(|body| Body::new(Placed { body, _places: [own, any] })))
        })
        .await
        .map_err(|_| ForwardError::TimedOut(model))?
    }

    async fn attempts(&self, mut onward: Onward) -> Result<Response<Body>, ForwardError> {
        let model = onward.model.clone();
        let mut tried: Vec<ReplicaUid> = Vec::new();
        let mut tries = 0;
        let mut last: Option<ForwardError> = None;
        let mut patience = Instant::now() + WAIT_FOR_READY;
        let mut table = self.routes.changes();
        while tries < MAX_TRIES {
            table.borrow_and_update();
            let Some(backend) = self.routes.backend(&model) else {
                return Err(ForwardError::UnknownModel(model));
            };
            let Some(chosen) = self.routes.choose(&model, &onward.version, &tried) else {
                self.judge_absence(&backend, &onward)?;
                if Instant::now() >= patience {
                    break;
                }
                if tried.is_empty() {
                    // Cancel-safe: a change that was not seen stays one.
                    let _ = tokio::time::timeout_at(patience, table.changed()).await;
                } else {
                    // What could not be reached a moment ago may be reachable again.
                    let _ = tokio::time::timeout(RETRY_PAUSE, table.changed()).await;
                    tried.clear();
                }
                continue;
            };
            let replica = chosen.target.replica.clone();
            match self.attempt(&backend, chosen, &mut onward).await {
                Ok(response) => return Ok(response),
                Err(Failure::Final(why)) => return Err(why),
                // Reaching is tried for as long as patience lasts, however many there are.
                Err(Failure::NotReached(why)) => {
                    last = Some(why);
                    if Instant::now() >= patience {
                        break;
                    }
                }
                // What was sent counts, and its time is the replica's own.
                Err(Failure::MayRepeat(why)) => {
                    tries += 1;
                    last = Some(why);
                    patience = Instant::now() + WAIT_FOR_READY;
                }
            }
            tracing::debug!(%replica, error = last.as_ref().map(tracing::field::display), "again");
            tried.push(replica);
        }
        Err(last.unwrap_or(ForwardError::NoneReady(model)))
    }

    /// Says at once what waiting would not change.
    fn judge_absence(&self, backend: &Backend, onward: &Onward) -> Result<(), ForwardError> {
        let (model, version) = (&onward.model, &onward.version);
        if !version.is_empty()
            && !backend.targets.is_empty()
            && backend.targets.iter().all(|t| t.version != *version)
        {
            let (model, version) = (model.clone(), version.clone());
            return Err(ForwardError::UnknownVersion { model, version });
        }
        if backend.targets.is_empty() && !self.routes.was_ready_lately(backend) {
            return Err(ForwardError::NoneReady(model.clone()));
        }
        Ok(())
    }

    async fn attempt(
        &self,
        backend: &Backend,
        chosen: Chosen,
        onward: &mut Onward,
    ) -> Result<Response<Body>, Failure> {
        let target = chosen.target.clone();
        let model = onward.model.clone();
        let port = match onward.wire {
            Wire::Http1 => &backend.http_port,
            Wire::Http2 => &backend.grpc_port,
        };
        let stream = dial::dial(&self.hub, &target.host, &target.replica, port, DIAL_DEADLINE)
            .await
            .map_err(|source| {
                Failure::NotReached(ForwardError::Unreachable { model: model.clone(), source })
            })?;
        let link = stream.link();
        let request = onward.request(&target.served)?;
        let broken = |source| ForwardError::Broken { model: model.clone(), source };
        match exchange(stream, onward.wire, request).await {
            // The replica counts as busy until its body has gone by.
            Ok(response) => {
                let response = response.map(|body| Body::new(Reply::new(body, chosen)));
                Ok(names::answered(response, &onward.naming, &target.served, &model).await)
            }
            Err(Unanswered { error, unsent }) => {
                if let Some(unsent) = unsent {
                    onward.payload.give_back(unsent.into_body());
                    return Err(Failure::MayRepeat(broken(error)));
                }
                if let Some(fault) = onward.payload.fault() {
                    return Err(Failure::Final(fault.into()));
                }
                let excused = link.is_closed() || !self.routes.serves(&model, &target.replica);
                let error = broken(error);
                if excused && onward.repeat == Repeat::Harmless && onward.payload.is_whole() {
                    Err(Failure::MayRepeat(error))
                } else {
                    Err(Failure::Final(error))
                }
            }
        }
    }
}

/// Why one replica did not answer.
enum Failure {
    /// Nothing was sent.
    NotReached(ForwardError),
    /// Another one may be asked, a bounded number of times.
    MayRepeat(ForwardError),
    /// Tell the caller.
    Final(ForwardError),
}

impl Onward {
    /// The request for a replica that knows the model by this name.
    fn request(&mut self, served: &str) -> Result<Request<Body>, Failure> {
        let fail = |error: http::Error| Failure::Final(error.into());
        let mut uri = self.uri.clone();
        match &mut self.naming {
            Naming::Nowhere => {}
            Naming::Path if served == self.model => {}
            Naming::Path => uri = names::in_path(&uri, served).map_err(fail)?,
            Naming::Field { written } if written == served => {}
            Naming::Field { written } => {
                grpc::rename(&mut self.payload, served);
                served.clone_into(written);
            }
        }
        let renamed = self.naming != Naming::Nowhere && served != self.model;
        let mut builder = Request::builder().method(self.method.clone()).uri(uri);
        if let Some(headers) = builder.headers_mut() {
            headers.clone_from(&self.headers);
            if renamed {
                // The name in the answer is to be found.
                headers.remove(header::ACCEPT_ENCODING);
                headers.remove("grpc-accept-encoding");
            }
            let bodiless = matches!(self.method, Method::GET | Method::HEAD);
            if let Some(length) = self.payload.length()
                && self.wire == Wire::Http1
                && !(bodiless && length == 0)
            {
                headers.insert(header::CONTENT_LENGTH, length.into());
            }
        }
        // It is here: what was sent and cannot be sent again was told before.
        builder.body(self.payload.take().unwrap_or_default()).map_err(fail)
    }
}

/// What became of a request that got no answer.
struct Unanswered {
    error: hyper::Error,
    /// The request, when nothing of it was sent.
    unsent: Option<Request<Body>>,
}

impl From<TrySendError<Request<Body>>> for Unanswered {
    fn from(mut failed: TrySendError<Request<Body>>) -> Self {
        let unsent = failed.take_message();
        Self { error: failed.into_error(), unsent }
    }
}

async fn exchange(
    stream: DialIo,
    wire: Wire,
    request: Request<Body>,
) -> Result<Response<hyper::body::Incoming>, Unanswered> {
    let io = TokioIo::new(stream);
    Ok(match wire {
        Wire::Http1 => match http1::handshake(io).await {
            Ok((mut sender, connection)) => {
                tokio::spawn(connection);
                sender.try_send_request(request).await?
            }
            Err(error) => return Err(Unanswered { error, unsent: Some(request) }),
        },
        Wire::Http2 => match http2::handshake(TokioExecutor::new(), io).await {
            Ok((mut sender, connection)) => {
                tokio::spawn(connection);
                sender.try_send_request(request).await?
            }
            Err(error) => return Err(Unanswered { error, unsent: Some(request) }),
        },
    })
}
