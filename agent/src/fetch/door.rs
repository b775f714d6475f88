//! The engine's way to images: a small registry on 127.0.0.1.
//!
//! GET and HEAD only, one password per start of the agent, and only the manifest, the config and the
//! layers of images that are being pulled for the current set. Blobs come by the same transfers as
//! models: into a spool, where what is durable is never fetched again, whatever the engine or the
//! agent goes through; the engine reads the spool. What it asks for and nobody has brought ahead comes
//! while it reads. What the engine has is dropped from it.
//!
//! What the engine reads may not be verified yet: it verifies itself before it uses anything.

use super::client::{Client, FetchError};
use super::spool::Spool;
use super::transfer::{Job, Room, Seen, Transfers};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use berth_agent_core::transfer::{Blob, Failure};
use berth_proto::ids::Digest;
use bytes::Bytes;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// Read from the spool and handed to the engine at once.
const PIECE: u64 = 64 * 1024;
/// Connections at once, so that no program of this machine takes the agent's file handles. An engine
/// has a few for each pull.
const CONNECTIONS: usize = 128;
/// A connection on which no request comes for so long is closed. Engines open another one then.
const SILENT: Duration = Duration::from_secs(15);
/// Between two tries to take a connection when there are no file handles.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The first segment of every repository here: whoever finds an image under
/// `127.0.0.1:<port>/berth-pull/..` knows that it is the left-over of a pull of ours.
pub const MARK: &str = "berth-pull";

/// How far a blob is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Flow {
    /// Written, from its beginning on.
    pub here_bytes: u64,
    /// Bytes a second.
    pub rate: u64,
    /// Why it does not go on just now, and when it is tried again.
    pub trouble: Option<(String, u64)>,
    /// How it ended.
    pub ended: Option<Result<(), String>>,
}

/// An image that is being pulled.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its repository at the registry.
    pub repository: String,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// The manifest's media type.
    pub media_type: String,
    /// Config and layers.
    pub blobs: BTreeMap<Digest, u64>,
}

struct Inner {
    transfers: Arc<Transfers>,
    room: Arc<dyn Room>,
    spool: Spool,
    password: String,
    address: SocketAddr,
    /// Manifests of the current set.
    wanted: Mutex<BTreeSet<Digest>>,
    /// By manifest; how many pulls there are of each.
    images: Mutex<BTreeMap<Digest, (Image, u32)>>,
    flows: Mutex<BTreeMap<Digest, watch::Receiver<Flow>>>,
}

/// The door. Clones are the same door.
#[derive(Clone)]
pub struct Door(Arc<Inner>);

/// While it lives an image can be pulled through the door.
pub struct Opened {
    door: Door,
    manifest: Digest,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut images = self.door.0.images.lock();
        if let Some((_, pulls)) = images.get_mut(&self.manifest) {
            *pulls -= 1;
            if *pulls == 0 {
                images.remove(&self.manifest);
            }
        }
    }
}

/// Config and layers of an image's manifest, in their order.
pub(super) fn blobs_of(manifest: &[u8]) -> Result<Vec<Blob>, FetchError> {
    let unusable = || FetchError::Unusable("the image's manifest is not one".to_owned());
    let json: serde_json::Value = serde_json::from_slice(manifest).map_err(|_| unusable())?;
    let layers = json["layers"].as_array().ok_or_else(unusable)?;
    std::iter::once(&json["config"])
        .chain(layers)
        .map(|one| {
            Ok(Blob {
                digest: one["digest"].as_str().and_then(|d| d.parse().ok()).ok_or_else(unusable)?,
                size_bytes: one["size"].as_u64().ok_or_else(unusable)?,
            })
        })
        .collect()
}

/// A password of `[A-Za-z0-9_-]`: others are mangled on their way to the engine.
fn password() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

impl Door {
    /// Opens the door on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When nothing can be listened on, or there is no randomness for the password.
    pub async fn open(
        transfers: Arc<Transfers>,
        room: Arc<dyn Room>,
        spool: Spool,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let door = Self(Arc::new(Inner {
            transfers,
            room,
            spool,
            password: password()?,
            address: listener.local_addr()?,
            wanted: Mutex::default(),
            images: Mutex::default(),
            flows: Mutex::default(),
        }));
        let router = Router::new()
            .route("/v2/", axum::routing::any(base))
            .route("/v2/{*rest}", axum::routing::any(serve))
            .with_state(door.clone());
        tokio::spawn(answer(listener, router));
        Ok(door)
    }

    /// Only images with these manifests may be read from now on.
    pub fn allow(&self, manifests: BTreeSet<Digest>) {
        *self.0.wanted.lock() = manifests;
    }

    /// Whether an image is part of the current set.
    #[must_use]
    pub fn is_wanted(&self, manifest: &Digest) -> bool {
        self.0.wanted.lock().contains(manifest)
    }

    /// The registry's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        self.0.transfers.client()
    }

    /// Whoever asks with it may read.
    #[must_use]
    pub fn password(&self) -> &str {
        &self.0.password
    }

    /// What the engine pulls an image by. The port is part of no name that is kept.
    #[must_use]
    pub fn reference(&self, repository: &str, manifest: &Digest) -> String {
        format!("{}/{MARK}/{repository}@{manifest}", self.0.address)
    }

    /// Lets an image be pulled as long as the answer lives.
    #[must_use]
    pub fn begin(&self, manifest: &Digest, image: Image) -> Opened {
        self.0.images.lock().entry(manifest.clone()).or_insert((image, 0)).1 += 1;
        Opened { door: self.clone(), manifest: manifest.clone() }
    }

    /// Where blobs are that the engine reads.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.0.spool
    }

    /// Brings a blob of an image before the engine asks for it, as long as the image is part of the
    /// current set.
    ///
    /// # Errors
    /// When it will not get better by itself.
    pub async fn ahead(
        &self,
        repository: &str,
        manifest: &Digest,
        blob: &Blob,
        tell: &(dyn Fn(Seen) + Send + Sync),
    ) -> Result<(), Failure> {
        let job = Job {
            spool: self.0.spool.clone(),
            repository,
            blobs: vec![blob.clone()],
            room: &*self.0.room,
            wanted: &|| self.is_wanted(manifest),
            tell,
        };
        self.0.transfers.run(job).await
    }

    /// How far a blob is; `None`: nobody has asked for it.
    #[must_use]
    pub fn flow(&self, digest: &Digest) -> Option<Flow> {
        self.0.flows.lock().get(digest).map(|rx| rx.borrow().clone())
    }

    /// The engine has these: they are dropped, but for what another pull still reads.
    pub async fn drop_blobs(&self, blobs: Vec<Digest>) {
        let needed: BTreeSet<Digest> = {
            let images = self.0.images.lock();
            images.values().flat_map(|(image, _)| image.blobs.keys().cloned()).collect()
        };
        let spool = self.0.spool.clone();
        let dropped: Vec<Digest> = blobs.into_iter().filter(|b| !needed.contains(b)).collect();
        for digest in &dropped {
            self.0.flows.lock().remove(digest);
        }
        let work = move || dropped.iter().try_for_each(|digest| spool.drop_blob(digest));
        if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
            tracing::warn!(%error, "an image's blobs could not be dropped");
        }
    }

    fn in_use(&self, digest: &Digest) -> bool {
        self.0.images.lock().values().any(|(image, _)| image.blobs.contains_key(digest))
    }

    fn knows(&self, headers: &HeaderMap) -> bool {
        let expected =
            base64::engine::general_purpose::STANDARD.encode(format!("berth:{}", self.0.password));
        headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Basic "))
            .is_some_and(|given| same(given.as_bytes(), expected.as_bytes()))
    }

    /// What a digest is in an image that is wanted and being pulled.
    fn find(&self, repository: &str, digest: &Digest) -> Option<Found> {
        let wanted = self.0.wanted.lock();
        let images = self.0.images.lock();
        images
            .iter()
            .filter(|(m, (i, _))| wanted.contains(*m) && i.repository == repository)
            .find_map(|(manifest, (image, _))| {
                if manifest == digest {
                    return Some(Found::Manifest(image.manifest.clone(), image.media_type.clone()));
                }
                image.blobs.get(digest).map(|size| Found::Blob(*size))
            })
    }

    /// The flow of a blob, which is begun when there is none.
    fn bring(&self, repository: &str, blob: Blob) -> watch::Receiver<Flow> {
        let mut flows = self.0.flows.lock();
        if let Some(rx) = flows.get(&blob.digest)
            && rx.borrow().ended.is_none()
        {
            return rx.clone();
        }
        let (tx, rx) = watch::channel(Flow::default());
        flows.insert(blob.digest.clone(), rx.clone());
        let (door, repository) = (self.clone(), repository.to_owned());
        tokio::spawn(async move {
            let tell = |seen: Seen| {
                tx.send_modify(|flow| match seen {
                    Seen::Prefix(bytes) => {
                        flow.here_bytes = bytes;
                        flow.trouble = None;
                    }
                    Seen::Progress(progress) => flow.rate = progress.rate_bytes_per_second,
                    Seen::Trouble { why, retry_ms } => {
                        flow.rate = 0;
                        flow.trouble = Some((why, retry_ms));
                    }
                });
            };
            let digest = blob.digest.clone();
            let wanted = || door.in_use(&digest);
            let result = door
                .0
                .transfers
                .run(Job {
                    spool: door.0.spool.clone(),
                    repository: &repository,
                    blobs: vec![blob],
                    room: &*door.0.room,
                    wanted: &wanted,
                    tell: &tell,
                })
                .await;
            if let Err(error) = &result {
                tracing::warn!(%digest, %error, "an image's blob could not be brought");
            }
            tx.send_modify(|flow| {
                flow.rate = 0;
                flow.trouble = None;
                flow.ended = Some(result.map_err(|e| e.to_string()));
            });
        });
        rx
    }
}

/// Answers whoever connects, for ever.
async fn answer(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed. Without a place connections wait in the kernel's queue.
        let place = Arc::clone(&places).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the engine's registry door cannot take a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(SILENT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the engine's registry door ended early");
            }
            drop(place);
        });
    }
}

enum Found {
    Manifest(Bytes, String),
    Blob(u64),
}

/// Compares in a time that does not tell where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y)) == 0
}

fn refuse(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn unauthorized() -> Response {
    let mut response =
        refuse(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "for this host's engine only");
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"berth-agent\""));
    response
}

async fn base(State(door): State<Door>, headers: HeaderMap) -> Response {
    if !door.knows(&headers) {
        return unauthorized();
    }
    ([("docker-distribution-api-version", "registry/2.0")], "{}").into_response()
}

async fn serve(
    State(door): State<Door>,
    method: Method,
    Path(rest): Path<String>,
    headers: HeaderMap,
) -> Response {
    if !door.knows(&headers) {
        return unauthorized();
    }
    if method != Method::GET && method != Method::HEAD {
        return refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "nothing can be written here",
        );
    }
    let split = rest.rsplit_once("/manifests/").or(rest.rsplit_once("/blobs/"));
    let marked = split.and_then(|(repo, d)| Some((repo.strip_prefix(MARK)?.strip_prefix('/')?, d)));
    let Some((repository, digest)) = marked.and_then(|(r, d)| Some((r, d.parse::<Digest>().ok()?)))
    else {
        return refuse(StatusCode::NOT_FOUND, "UNSUPPORTED", "things are asked for by digest here");
    };
    let mut answer = Response::new(Body::empty());
    if let Ok(value) = HeaderValue::from_str(digest.as_str()) {
        answer.headers_mut().insert("docker-content-digest", value);
    }
    match door.find(repository, &digest) {
        None => refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "this host has no use for it"),
        Some(Found::Manifest(bytes, media_type)) => {
            if let Ok(value) = HeaderValue::from_str(&media_type) {
                answer.headers_mut().insert(header::CONTENT_TYPE, value);
            }
            answer.headers_mut().insert(header::CONTENT_LENGTH, bytes.len().into());
            if method == Method::GET {
                *answer.body_mut() = Body::from(bytes);
            }
            answer
        }
        Some(Found::Blob(size)) => {
            let from = headers
                .get(header::RANGE)
                .and_then(|v| v.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-'))
                .and_then(|from| from.parse::<u64>().ok())
                .filter(|from| *from < size)
                .unwrap_or(0);
            let head = answer.headers_mut();
            head.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            head.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            head.insert(header::CONTENT_LENGTH, (size - from).into());
            if from > 0 {
                let range = format!("bytes {from}-{}/{size}", size - 1);
                head.extend(HeaderValue::from_str(&range).ok().map(|v| (header::CONTENT_RANGE, v)));
                *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
            if method == Method::GET {
                let flow =
                    door.bring(repository, Blob { digest: digest.clone(), size_bytes: size });
                *answer.body_mut() = Body::from_stream(reader(door, digest, from, size, flow));
            }
            answer
        }
    }
}

/// A blob's bytes as they come. It waits as long as the transfer goes on, which ends by itself.
fn reader(
    door: Door,
    digest: Digest,
    from: u64,
    size: u64,
    flow: watch::Receiver<Flow>,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send {
    let begun = (door, digest, from, flow, None::<tokio::fs::File>);
    futures_util::stream::try_unfold(
        begun,
        move |(door, digest, mut at, mut flow, mut file)| async move {
            loop {
                if at >= size {
                    return Ok(None);
                }
                let now = flow.borrow_and_update().clone();
                if now.here_bytes > at {
                    let most = (now.here_bytes - at).min(PIECE);
                    let mut open = match file.take() {
                        Some(open) => open,
                        None => {
                            let mut open =
                                match tokio::fs::File::open(door.0.spool.partial(&digest)).await {
                                    Ok(open) => open,
                                    // It was finished meanwhile.
                                    Err(_) => {
                                        tokio::fs::File::open(door.0.spool.whole(&digest)).await?
                                    }
                                };
                            open.seek(io::SeekFrom::Start(at)).await?;
                            open
                        }
                    };
                    let mut piece =
                        bytes::BytesMut::with_capacity(usize::try_from(most).unwrap_or(0));
                    if (&mut open).take(most).read_buf(&mut piece).await? == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                    }
                    at += piece.len() as u64;
                    return Ok(Some((piece.freeze(), (door, digest, at, flow, Some(open)))));
                }
                match now.ended {
                    Some(Err(why)) => return Err(io::Error::other(why)),
                    Some(Ok(())) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                    None => flow.changed().await.map_err(io::Error::other)?,
                }
            }
        },
    )
}

#[cfg(test)]
#[path = "door_tests.rs"]
mod tests;
