//! Pushing to the server's registry: blobs streamed from disk, manifests by digest or tag.

use crate::client::{Context, https};
use crate::error::{Error, Kind, Result};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, Request, StatusCode, header};
use http_body_util::{Empty, Full, StreamBody};
use hyper::body::Frame;
use sha2::Digest as _;
use std::path::Path;
use std::time::Duration;
use tokio_util::io::ReaderStream;

/// Small requests.
const SHORT: Duration = Duration::from_secs(60);
/// A blob: a day, which carries 8 GB over 1 Mbit/s.
const LONG: Duration = Duration::from_secs(86_400);
/// Pieces that a file is read in.
const PIECE: usize = 256 * 1024;

/// The digest and size of a file.
pub fn digest_of(path: &Path) -> Result<(String, u64)> {
    let mut hash = sha2::Sha256::new();
    let size = std::io::copy(&mut std::fs::File::open(path)?, &mut hash)?;
    Ok((format!("sha256:{}", hex::encode(hash.finalize())), size))
}

fn refused(what: &str, response: &http::Response<Bytes>) -> Error {
    let text = String::from_utf8_lossy(response.body());
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let words = json["errors"][0]["message"].as_str().unwrap_or(text.trim()).to_owned();
    let kind = match response.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Kind::Denied,
        status if status.is_server_error() => Kind::Unavailable,
        _ => Kind::User,
    };
    Error::new(
        kind,
        format!(
            "the registry refused {what} ({}): {}",
            response.status().as_u16(),
            berth_proto::escape::for_terminal(&words)
        ),
    )
}

/// Pushes a file as a blob unless it is there; answers whether it was sent.
pub async fn blob(
    context: &Context,
    repository: &str,
    path: &Path,
    digest: &str,
    size: u64,
) -> Result<bool> {
    let door = &context.registry;
    let head = Request::builder()
        .method(Method::HEAD)
        .uri(format!("/v2/{repository}/blobs/{digest}"))
        .header(header::HOST, door)
        .body(Empty::<Bytes>::new())?;
    if https(context, door, head, SHORT).await?.status() == StatusCode::OK {
        return Ok(false);
    }
    let begin = Request::builder()
        .method(Method::POST)
        .uri(format!("/v2/{repository}/blobs/uploads/"))
        .header(header::HOST, door)
        .header(header::CONTENT_LENGTH, 0)
        .body(Empty::<Bytes>::new())?;
    let begun = https(context, door, begin, SHORT).await?;
    let location =
        begun.headers().get(header::LOCATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let Some(location) = location.filter(|_| begun.status() == StatusCode::ACCEPTED) else {
        return Err(refused("the upload", &begun));
    };
    // Only the path: we stay with the door we trust.
    let place = match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]).to_owned(),
        None => location,
    };
    let joiner = if place.contains('?') { '&' } else { '?' };
    let file = tokio::fs::File::open(path).await?;
    let stream = ReaderStream::with_capacity(file, PIECE).map(|piece| piece.map(Frame::data));
    let put = Request::builder()
        .method(Method::PUT)
        .uri(format!("{place}{joiner}digest={digest}"))
        .header(header::HOST, door)
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, size)
        .body(StreamBody::new(stream))?;
    let done = https(context, door, put, LONG).await?;
    if done.status() != StatusCode::CREATED {
        return Err(refused("the blob", &done));
    }
    Ok(true)
}

/// Puts a manifest under a tag; answers with its digest.
pub async fn manifest(
    context: &Context,
    repository: &str,
    tag: &str,
    media_type: &str,
    bytes: Vec<u8>,
) -> Result<String> {
    let door = &context.registry;
    let digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(&bytes)));
    let put = Request::builder()
        .method(Method::PUT)
        .uri(format!("/v2/{repository}/manifests/{tag}"))
        .header(header::HOST, door)
        .header(header::CONTENT_TYPE, media_type)
        .body(Full::new(Bytes::from(bytes)))?;
    let done = https(context, door, put, SHORT).await?;
    if done.status() != StatusCode::CREATED {
        return Err(refused("the manifest", &done));
    }
    Ok(digest)
}

/// Pushes an image of the local engine; answers with the manifest's digest and the bytes sent.
pub async fn image(
    context: &Context,
    local: &str,
    repository: &str,
    tag: &str,
) -> Result<(String, u64)> {
    let engine = bollard::Docker::connect_with_unix(
        "/var/run/docker.sock",
        600,
        bollard::API_DEFAULT_VERSION,
    )?
    .negotiate_version()
    .await?;
    let folder = TempFolder::new()?;
    let archive = folder.path().join("image.tar");
    let mut file = tokio::fs::File::create(&archive).await?;
    let mut stream = engine.export_image(local);
    while let Some(piece) = stream.next().await {
        tokio::io::AsyncWriteExt::write_all(&mut file, &piece?).await?;
    }
    tokio::io::AsyncWriteExt::flush(&mut file).await?;
    drop(file);
    let into = folder.path().join("image");
    let (from, to) = (archive.clone(), into.clone());
    tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        tar::Archive::new(std::fs::File::open(from)?).unpack(to)
    })
    .await
    .map_err(|e| Error::user(e.to_string()))??;
    let list: serde_json::Value =
        serde_json::from_slice(&std::fs::read(into.join("manifest.json"))?)?;
    let inside = |name: &str| -> Result<std::path::PathBuf> {
        let path = into.join(name).canonicalize()?;
        if path.starts_with(into.canonicalize()?) {
            Ok(path)
        } else {
            Err(Error::user("the engine's archive names a file outside of it"))
        }
    };
    let config = inside(list[0]["Config"].as_str().unwrap_or_default())?;
    let (config_digest, config_size) = digest_of(&config)?;
    let mut sent = 0;
    let mut layers = Vec::new();
    for (i, layer) in list[0]["Layers"].as_array().into_iter().flatten().enumerate() {
        let plain = inside(layer.as_str().unwrap_or_default())?;
        let packed = folder.path().join(format!("layer-{i}.gz"));
        let out = packed.clone();
        tokio::task::spawn_blocking(move || -> std::io::Result<()> {
            let file = std::fs::File::create(out)?;
            let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::default());
            std::io::copy(&mut std::fs::File::open(plain)?, &mut gz)?;
            gz.finish()?.sync_all()
        })
        .await
        .map_err(|e| Error::user(e.to_string()))??;
        let (digest, size) = digest_of(&packed)?;
        if blob(context, repository, &packed, &digest, size).await? {
            sent += size;
        }
        layers.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": digest,
            "size": size,
        }));
    }
    if blob(context, repository, &config, &config_digest, config_size).await? {
        sent += config_size;
    }
    let media = "application/vnd.oci.image.manifest.v1+json";
    let body = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest,
            "size": config_size,
        },
        "layers": layers,
    });
    let digest = manifest(context, repository, tag, media, serde_json::to_vec(&body)?).await?;
    Ok((digest, sent))
}

/// A folder that is gone when it is dropped.
pub struct TempFolder(std::path::PathBuf);

impl TempFolder {
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("berth-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
