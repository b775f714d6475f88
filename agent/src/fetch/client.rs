//! A client of the registry door.

use berth_proto::tls::{self, TlsError};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use parking_lot::RwLock;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// Reaching the registry and getting the head of an answer.
const HEAD: Duration = Duration::from_secs(20);
/// Bytes must keep coming: pulls are limited by stall, never in total.
const STALL: Duration = Duration::from_secs(30);
/// A manifest has at most so many bytes.
const MANIFEST: usize = 4 * 1024 * 1024;
/// Tries of one blob before the caller's own backoff takes over.
const TRIES: u32 = 8;

/// Media types of what may be asked for.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// Why bytes did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection.
    #[error("the registry cannot be reached")]
    Connect(#[from] TlsError),
    /// It broke.
    #[error("the connection to the registry broke")]
    Broke(#[source] hyper::Error),
    /// No bytes for too long.
    #[error("the registry sent nothing for {} s", .0.as_secs())]
    Stalled(Duration),
    /// It says no.
    #[error("the registry answered {status} for {what}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// What was asked for.
        what: String,
    },
    /// What came is not what was asked for.
    #[error("{0} is not what its digest says")]
    Wrong(String),
    /// Too large.
    #[error("{0} is larger than allowed")]
    TooLarge(String),
    /// A file.
    #[error("cannot write what was fetched")]
    Disk(#[from] std::io::Error),
    /// What came cannot be used.
    #[error("{0}")]
    Unusable(String),
}

/// Where a blob's bytes go.
pub trait Into: Send {
    /// Takes the next piece.
    fn take(&mut self, piece: Bytes) -> impl Future<Output = Result<(), FetchError>> + Send;
}

impl Into for tokio::sync::mpsc::Sender<Result<Bytes, std::io::Error>> {
    async fn take(&mut self, piece: Bytes) -> Result<(), FetchError> {
        let gone = |_| FetchError::Unusable("the engine has hung up".to_owned());
        self.send(Ok(piece)).await.map_err(gone)
    }
}

/// The registry's address and the credentials, which are renewed.
#[derive(Clone)]
pub struct Client {
    target: Arc<RwLock<(String, Arc<ClientConfig>)>>,
}

impl Client {
    /// A client of `host:port`.
    #[must_use]
    pub fn new(address: String, config: Arc<ClientConfig>) -> Self {
        Self { target: Arc::new(RwLock::new((address, config))) }
    }

    /// New credentials or another address from now on.
    pub fn retarget(&self, address: String, config: Arc<ClientConfig>) {
        *self.target.write() = (address, config);
    }

    /// Sends one request and answers with the head and the streamed body.
    ///
    /// # Errors
    /// When the registry cannot be reached or says no.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        from: u64,
    ) -> Result<Response<Incoming>, FetchError> {
        let (address, config) = self.target.read().clone();
        let stream = tls::connect(&address, config, HEAD).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(FetchError::Broke)?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &address)
            .header(header::ACCEPT, ACCEPT);
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|_| FetchError::Unusable(format!("{path} is not a path")))?;
        let response = tokio::time::timeout(HEAD, sender.send_request(request))
            .await
            .map_err(|_| FetchError::Stalled(HEAD))?
            .map_err(FetchError::Broke)?;
        let good = response.status() == StatusCode::OK
            || (from > 0 && response.status() == StatusCode::PARTIAL_CONTENT);
        if !good {
            let what = path.to_owned();
            return Err(FetchError::Refused { status: response.status(), what });
        }
        Ok(response)
    }

    /// A manifest, verified.
    ///
    /// # Errors
    /// When it does not come or is another.
    pub async fn manifest(
        &self,
        repository: &str,
        digest: &berth_proto::ids::Digest,
    ) -> Result<Bytes, FetchError> {
        let path = format!("/v2/{repository}/manifests/{digest}");
        let body = self.ask(Method::GET, &path, 0).await?.into_body();
        let bytes =
            tokio::time::timeout(STALL, http_body_util::Limited::new(body, MANIFEST).collect())
                .await
                .map_err(|_| FetchError::Stalled(STALL))?
                .map_err(|_| FetchError::TooLarge(path.clone()))?
                .to_bytes();
        if berth_proto::ids::Digest::of(&bytes) != *digest {
            return Err(FetchError::Wrong(path));
        }
        Ok(bytes)
    }

    /// A blob from byte `from` on, handed over piece by piece. A stream that breaks is gone on with.
    ///
    /// # Errors
    /// When it cannot be had after some tries, or `into` says so.
    pub async fn blob(
        &self,
        repository: &str,
        digest: &str,
        mut from: u64,
        size: u64,
        into: &mut impl Into,
    ) -> Result<(), FetchError> {
        let path = format!("/v2/{repository}/blobs/{digest}");
        let mut failures = 0;
        while from < size {
            let broke = match self.ask(Method::GET, &path, from).await {
                Err(error @ FetchError::Refused { .. }) => return Err(error),
                Err(error) => error,
                Ok(response) => {
                    let mut body = response.into_body();
                    loop {
                        match tokio::time::timeout(STALL, body.frame()).await {
                            Err(_) => break FetchError::Stalled(STALL),
                            Ok(None) => {
                                if from >= size {
                                    return Ok(());
                                }
                                break FetchError::Stalled(STALL);
                            }
                            Ok(Some(Err(error))) => break FetchError::Broke(error),
                            Ok(Some(Ok(frame))) => {
                                if let Ok(data) = frame.into_data() {
                                    from += data.len() as u64;
                                    if from > size {
                                        return Err(FetchError::TooLarge(path));
                                    }
                                    failures = 0;
                                    into.take(data).await?;
                                }
                            }
                        }
                    }
                }
            };
            failures += 1;
            if failures >= TRIES {
                return Err(broke);
            }
            tracing::debug!(path, from, error = %broke, "a transfer broke and goes on");
            // Not a wait for something, but a pause so as not to ask a struggling server at once.
            tokio::time::sleep(Duration::from_millis(100 << failures.min(6))).await;
        }
        Ok(())
    }
}
