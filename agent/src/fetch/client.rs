//! A client of the registry door: one request at a time over a connection that is used again.
//!
//! It knows neither what is wanted nor where bytes go, and tries nothing twice, but for a request whose
//! kept connection had gone meanwhile.

use berth_agent_core::transfer::Failure;
use berth_proto::ids::Digest;
use berth_proto::tls::{self, TlsError};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use parking_lot::RwLock;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// Reaching the registry and getting the head of an answer.
const HEAD: Duration = Duration::from_secs(20);
/// For a kept connection to take the next request.
const FREE: Duration = Duration::from_secs(1);
/// All of a manifest, which is small.
const SMALL: Duration = Duration::from_secs(30);
/// A manifest has at most so many bytes: as much as the registry takes.
const MANIFEST: usize = 4 * 1024 * 1024;
/// What a connection reads ahead: pieces of this size are written to the disk soon after.
const READ_AHEAD: usize = 128 * 1024;

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
    /// No answer for too long.
    #[error("the registry did not answer within {} s", .0.as_secs())]
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
    /// A transfer was given up.
    #[error(transparent)]
    Transfer(#[from] Failure),
}

impl FetchError {
    /// Whether the same may go well a little later, by itself.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Broke(_) | Self::Stalled(_) => true,
            Self::Refused { status, .. } => {
                status.is_server_error()
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || *status == StatusCode::REQUEST_TIMEOUT
            }
            Self::Wrong(_)
            | Self::TooLarge(_)
            | Self::Disk(_)
            | Self::Unusable(_)
            | Self::Transfer(_) => false,
        }
    }
}

/// A connection that is kept between two requests.
#[derive(Default)]
pub struct Link(Option<SendRequest<Empty<Bytes>>>);

/// A blob's or manifest's answer: from which byte on, and the body.
pub struct Answer {
    /// The first byte that comes.
    pub from: u64,
    /// The media type it says.
    pub media_type: String,
    /// The bytes.
    pub body: Incoming,
}

/// The registry's address and the credentials, which are renewed.
#[derive(Clone)]
pub struct Client {
    target: Arc<RwLock<(String, Arc<ClientConfig>)>>,
}

/// Whether a kept connection takes another request. The end of the last answer may not have been seen by
/// the connection's own task yet; a connection whose last answer was dropped half-way has ended.
async fn is_free(sender: &mut SendRequest<Empty<Bytes>>) -> bool {
    matches!(tokio::time::timeout(FREE, sender.ready()).await, Ok(Ok(())))
}

impl Client {
    /// A client of `host:port`.
    #[must_use]
    pub fn new(address: String, config: Arc<ClientConfig>) -> Self {
        Self { target: Arc::new(RwLock::new((address, config))) }
    }

    /// New credentials or another address from the next connection on.
    pub fn retarget(&self, address: String, config: Arc<ClientConfig>) {
        *self.target.write() = (address, config);
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, FetchError> {
        let (address, config) = self.target.read().clone();
        let stream = tls::connect(&address, config, HEAD).await?;
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(READ_AHEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(FetchError::Broke)?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(
        &self,
        sender: &mut SendRequest<Empty<Bytes>>,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Response<Incoming>, FetchError> {
        let mut request = Request::builder()
            .method(Method::GET)
            .uri(path)
            .header(header::HOST, &self.target.read().0)
            .header(header::ACCEPT, ACCEPT);
        if let Some((from, to)) = range {
            request = request.header(header::RANGE, format!("bytes={from}-{}", to - 1));
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|_| FetchError::Unusable(format!("{path} is not a path")))?;
        tokio::time::timeout(HEAD, sender.send_request(request))
            .await
            .map_err(|_| FetchError::Stalled(HEAD))?
            .map_err(FetchError::Broke)
    }

    /// Asks for `path`, or for its bytes `range.0..range.1`, which are at least one.
    ///
    /// # Errors
    /// When the registry cannot be reached or says no.
    pub async fn ask(
        &self,
        link: &mut Link,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Answer, FetchError> {
        let kept = link.0.take();
        let mut response = None;
        if let Some(mut sender) = kept
            && is_free(&mut sender).await
            && let Ok(answer) = self.send(&mut sender, path, range).await
        {
            // A kept connection may have gone at the moment it was used: then a new one is tried.
            link.0 = Some(sender);
            response = Some(answer);
        }
        let response = match response {
            Some(response) => response,
            None => {
                let mut sender = self.connect().await?;
                let response = self.send(&mut sender, path, range).await?;
                link.0 = Some(sender);
                response
            }
        };
        let status = response.status();
        let from = match (status, range) {
            (StatusCode::OK, _) => 0,
            (StatusCode::PARTIAL_CONTENT, Some((from, _))) => {
                let said = response.headers().get(header::CONTENT_RANGE);
                let said = said.and_then(|v| v.to_str().ok()?.strip_prefix("bytes "));
                let first = said.and_then(|v| v.split_once('-')?.0.parse().ok());
                first.unwrap_or(from)
            }
            _ => {
                link.0 = None;
                return Err(FetchError::Refused { status, what: path.to_owned() });
            }
        };
        let media_type = response.headers().get(header::CONTENT_TYPE);
        let media_type = media_type.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        Ok(Answer { from, media_type, body: response.into_body() })
    }

    /// A manifest, verified, and its media type.
    ///
    /// # Errors
    /// When it does not come or is another.
    pub async fn manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<(Bytes, String), FetchError> {
        let path = format!("/v2/{repository}/manifests/{digest}");
        let answer = self.ask(&mut Link::default(), &path, None).await?;
        let body = http_body_util::Limited::new(answer.body, MANIFEST);
        let bytes = tokio::time::timeout(SMALL, body.collect())
            .await
            .map_err(|_| FetchError::Stalled(SMALL))?
            .map_err(|_| FetchError::TooLarge(path.clone()))?
            .to_bytes();
        if Digest::of(&bytes) != *digest {
            return Err(FetchError::Wrong(path));
        }
        Ok((bytes, answer.media_type))
    }
}
