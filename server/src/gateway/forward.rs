//! One request to one of several replicas.

use super::dial::{self, DialError};
use super::route::Routes;
use crate::session::reverse::ReverseHub;
use berth_proto::ids::ReplicaUid;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::Arc;
use std::time::Duration;

/// How long reaching a replica may take before the next one is tried.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a whole request may take. A guess that fits models; callers with a shorter patience end
/// the request themselves.
const REQUEST_DEADLINE: Duration = Duration::from_secs(300);
/// Replicas tried for one request at the most: beyond that the deployment has another problem.
const MAX_TRIES: usize = 8;
/// Waits for a ready replica while a rollout leaves none for a moment (a host restarts its only one).
const WAIT_FOR_READY: Duration = Duration::from_secs(5);
/// Pause before replicas that could not be reached are tried once more, when the table stays as it is.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A body that is passed on as it comes.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Why a request was not answered by a replica.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No such deployment.
    #[error("no deployment serves a model \"{0}\"")]
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

/// Sends requests on.
#[derive(Clone)]
pub struct Forwarder {
    /// Who is ready.
    pub routes: Arc<Routes>,
    /// How hosts are reached.
    pub hub: ReverseHub,
}

impl Forwarder {
    /// Sends a request to a ready replica and answers with its response's head and streamed body.
    ///
    /// Another replica is tried when nothing was sent; or when the one asked has left the table and
    /// not one byte of an answer came: it was being stopped, and inference changes nothing, so
    /// asking again is safe.
    ///
    /// # Errors
    /// See [`ForwardError`].
    pub async fn send(
        &self,
        model: &str,
        version: &str,
        wire: Wire,
        request: Request<Bytes>,
    ) -> Result<Response<Body>, ForwardError> {
        tokio::time::timeout(REQUEST_DEADLINE, self.attempts(model, version, wire, request))
            .await
            .map_err(|_| ForwardError::TimedOut(model.to_owned()))?
    }

    async fn attempts(
        &self,
        model: &str,
        version: &str,
        wire: Wire,
        request: Request<Bytes>,
    ) -> Result<Response<Body>, ForwardError> {
        let mut tried: Vec<ReplicaUid> = Vec::new();
        let mut last: Option<ForwardError> = None;
        let patience = tokio::time::Instant::now() + WAIT_FOR_READY;
        let mut table = self.routes.changes();
        while tried.len() < MAX_TRIES {
            table.borrow_and_update();
            let Some(backend) = self.routes.backend(model) else {
                return Err(ForwardError::UnknownModel(model.to_owned()));
            };
            let Some(chosen) = self.routes.choose(model, version, &tried) else {
                if tokio::time::Instant::now() >= patience {
                    break;
                }
                if !version.is_empty()
                    && !backend.targets.is_empty()
                    && backend.targets.iter().all(|t| t.version != version)
                {
                    return Err(ForwardError::UnknownVersion {
                        model: model.to_owned(),
                        version: version.to_owned(),
                    });
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
            let target = chosen.target.clone();
            let port = match wire {
                Wire::Http1 => &backend.http_port,
                Wire::Http2 => &backend.grpc_port,
            };
            let stream =
                dial::dial(&self.hub, &target.host, &target.replica, port, DIAL_DEADLINE).await;
            match stream {
                Err(source) => {
                    tracing::debug!(replica = %target.replica, error = %source, "not reached");
                    last = Some(ForwardError::Unreachable { model: model.to_owned(), source });
                }
                Ok(stream) => match exchange(stream, wire, copy(&request)).await {
                    Ok(response) => {
                        return Ok(response.map(|body| {
                            // The replica counts as busy until its body has gone by.
                            body.map_frame(move |frame| {
                                let _busy = &chosen;
                                frame
                            })
                            .boxed_unsync()
                        }));
                    }
                    Err(source) => {
                        let stopping = !self.routes.serves(model, &target.replica);
                        let error = ForwardError::Broken { model: model.to_owned(), source };
                        if !stopping {
                            return Err(error);
                        }
                        last = Some(error);
                    }
                },
            }
            tried.push(target.replica);
        }
        Err(last.unwrap_or_else(|| ForwardError::NoneReady(model.to_owned())))
    }
}

fn copy(request: &Request<Bytes>) -> Request<Full<Bytes>> {
    let mut copy = Request::new(Full::new(request.body().clone()));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

async fn exchange(
    stream: dial::DialIo,
    wire: Wire,
    request: Request<Full<Bytes>>,
) -> Result<Response<hyper::body::Incoming>, hyper::Error> {
    let io = TokioIo::new(stream);
    match wire {
        Wire::Http1 => {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await
        }
        Wire::Http2 => {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await
        }
    }
}
