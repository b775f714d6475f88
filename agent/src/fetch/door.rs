//! The engine's way to images: a small registry on 127.0.0.1.
//!
//! GET and HEAD only, one password per start of the agent, only repositories of the current set.
//! Blobs are fetched from the server's registry with the host's certificate and handed on; a stream
//! that breaks behind us is gone on with, so that the engine's own lack of resume does not matter.

use super::client::{Client, FetchError, Into as _};
use crate::engine::{Credentials, Engine, EngineError};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use berth_proto::values::{PlatformImage, ResolvedImage};
use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::RwLock;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Pieces on their way from the registry to the engine.
const QUEUE: usize = 8;

/// The door.
#[derive(Clone)]
pub struct Door {
    client: Client,
    password: Arc<str>,
    allowed: Arc<RwLock<BTreeSet<String>>>,
    address: SocketAddr,
}

/// Why an image is not here.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine says it is there and does not find it.
    #[error("the engine has pulled {0} and does not find it under its id")]
    Missing(String),
}

impl Door {
    /// Opens the door on a free port.
    ///
    /// # Errors
    /// When nothing can be listened on.
    pub async fn open(client: Client) -> std::io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let door = Self {
            client,
            password: uuid::Uuid::new_v4().simple().to_string().into(),
            allowed: Arc::default(),
            address: listener.local_addr()?,
        };
        let router = Router::new()
            .route("/v2/", axum::routing::any(base))
            .route("/v2/{*rest}", axum::routing::any(serve))
            .with_state(door.clone());
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the engine's registry door has ended");
            }
        });
        Ok(door)
    }

    /// Only these repositories may be read from now on.
    pub fn allow(&self, repositories: BTreeSet<String>) {
        *self.allowed.write() = repositories;
    }

    fn knows(&self, headers: &HeaderMap) -> bool {
        let expected =
            base64::engine::general_purpose::STANDARD.encode(format!("berth:{}", self.password));
        headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Basic "))
            .is_some_and(|given| given == expected)
    }

    /// Makes sure that an image is here; answers with its id. The registry is not asked when it is.
    ///
    /// # Errors
    /// When the engine cannot bring it.
    pub async fn ensure(
        &self,
        engine: &dyn Engine,
        name: &str,
        image: &ResolvedImage,
        platform: &PlatformImage,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<String, ImageError> {
        let id = platform.config_digest.to_string();
        // A name keeps it from the first `docker image prune`, also when somebody else brought it.
        let keep = format!("berth.local/{name}");
        if engine.image(&id).await?.is_some() {
            engine.tag(&id, &keep, platform.config_digest.short()).await?;
            return Ok(id);
        }
        // Through our own address: its port is no part of any name that is kept.
        let through = format!("{}/{}@{}", self.address, image.repository, platform.manifest_digest);
        let credentials =
            Credentials { username: "berth".to_owned(), password: self.password.to_string() };
        let mut pull = engine.pull(&through, Some(credentials));
        let mut layers: std::collections::BTreeMap<String, u64> = Default::default();
        while let Some(step) = pull.next().await {
            let step = step?;
            if let Some(here) = step.current_bytes
                && step.status.starts_with("Downloading")
            {
                layers.insert(step.layer, here);
                progress(layers.values().sum(), platform.size_bytes);
            }
        }
        let found = engine.image(&through).await?.or(engine.image(&id).await?);
        let found = found.ok_or_else(|| ImageError::Missing(through.clone()))?;
        engine.tag(&found.id, &keep, platform.config_digest.short()).await?;
        engine.remove_image(&through).await?;
        Ok(found.id)
    }
}

fn refuse(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn unauthorized() -> Response {
    let mut response =
        refuse(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "for this host's engine only");
    response.headers_mut().insert(
        header::WWW_AUTHENTICATE,
        header::HeaderValue::from_static("Basic realm=\"berth-agent\""),
    );
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
    let split = rest
        .rsplit_once("/manifests/")
        .map(|(repo, what)| (repo, "manifests", what))
        .or(rest.rsplit_once("/blobs/").map(|(repo, what)| (repo, "blobs", what)));
    let Some((repository, kind, digest)) = split else {
        return refuse(StatusCode::NOT_FOUND, "UNSUPPORTED", "only manifests and blobs are here");
    };
    if !digest.starts_with("sha256:") || !door.allowed.read().contains(repository) {
        return refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "this host has no use for it");
    }
    let path = format!("/v2/{repository}/{kind}/{digest}");
    let response = match door.client.ask(method.clone(), &path, 0).await {
        Ok(response) => response,
        Err(FetchError::Refused { status, .. }) => {
            return refuse(status, "MANIFEST_UNKNOWN", "the server's registry says no");
        }
        Err(error) => {
            tracing::warn!(path, %error, "an image cannot be fetched");
            return refuse(
                StatusCode::BAD_GATEWAY,
                "UNAVAILABLE",
                "the registry cannot be reached",
            );
        }
    };
    let mut answer = Response::new(Body::empty());
    for name in [header::CONTENT_TYPE, header::CONTENT_LENGTH, header::ETAG] {
        if let Some(value) = response.headers().get(&name) {
            answer.headers_mut().insert(name, value.clone());
        }
    }
    if let Ok(value) = header::HeaderValue::from_str(digest) {
        answer.headers_mut().insert("docker-content-digest", value);
    }
    let size: Option<u64> =
        response.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if method == Method::HEAD {
        return answer;
    }
    drop(response);
    let (tx, rx) = mpsc::channel::<Result<Bytes, std::io::Error>>(QUEUE);
    let client = door.client.clone();
    let (repository, digest, kind) = (repository.to_owned(), digest.to_owned(), kind.to_owned());
    tokio::spawn(async move {
        let mut into = tx.clone();
        let result = if kind == "manifests" {
            match digest.parse() {
                Ok(digest) => match client.manifest(&repository, &digest).await {
                    Ok(bytes) => into.take(bytes).await,
                    Err(error) => Err(error),
                },
                Err(_) => Err(FetchError::Wrong(digest)),
            }
        } else {
            client.blob(&repository, &digest, 0, size.unwrap_or(u64::MAX), &mut into).await
        };
        if let Err(error) = result {
            tracing::warn!(%error, "an image's bytes stopped");
            let _ = tx.send(Err(std::io::Error::other(error.to_string()))).await;
        }
    });
    *answer.body_mut() = Body::from_stream(ReceiverStream::new(rx));
    answer
}
