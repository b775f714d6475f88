//! Pushing to the server's registry: blobs streamed from disk, manifests by digest or tag.

use crate::client::{Context, Door};
use crate::error::{Error, Kind, Result};
use crate::progress::{Board, Line};
use crate::style::Ink;
use berth_proto::ids::Digest;
use berth_proto::quantity::human_bytes;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, Request, StatusCode, header};
use http_body_util::{Empty, Full, StreamBody};
use hyper::body::Frame;
use sha2::Digest as _;
use std::cell::RefCell;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncSeekExt as _;
use tokio_util::io::ReaderStream;

/// Names of a list in one answer.
const PAGE: usize = 1000;
/// Small requests.
const SHORT: Duration = Duration::from_secs(60);
/// The end of an upload: the registry may have to read gigabytes once more to verify them.
const FINISH: Duration = Duration::from_secs(600);
/// A blob in all: a day, which carries 8 GB over 1 Mbit/s; [`STALL`] ends it long before.
const LONG: Duration = Duration::from_secs(86_400);
/// Without one byte taken for so long a transfer is broken and begun again from where it was.
const STALL: Duration = Duration::from_secs(60);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Between two tries of a transfer that broke off.
const AGAIN: Duration = Duration::from_secs(1);
/// Tries of one blob end after this without one byte more; the same command goes on later.
const GIVE_UP: Duration = Duration::from_secs(300);
/// Pieces that a file is read in.
const PIECE: usize = 256 * 1024;
/// What an image's manifest is.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Work that takes long and waits for nothing, on a thread of its own: what else goes on here goes on.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::user(e.to_string()))?
}

/// The digest and size of a file.
pub async fn digest_of(path: &Path) -> Result<(String, u64)> {
    let path = path.to_owned();
    aside(move || {
        let mut hash = sha2::Sha256::new();
        let size = std::io::copy(&mut std::fs::File::open(path)?, &mut hash)?;
        Ok((format!("sha256:{}", hex::encode(hash.finalize())), size))
    })
    .await
}

/// The registry that a context names, over one connection.
pub struct Registry<'a> {
    context: &'a Context,
    door: Door,
}

impl<'a> Registry<'a> {
    /// Not connected yet.
    pub fn of(context: &'a Context) -> Result<Self> {
        Ok(Self { context, door: Door::new(context, &context.registry)? })
    }

    /// All pages of a list of names, which answers hold under `field`.
    pub async fn list(&self, path: &str, field: &str) -> Result<Vec<String>> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let after = all.last().map(|last| format!("&last={last}")).unwrap_or_default();
            let ask = self
                .request(Method::GET, &format!("{path}?n={PAGE}{after}"))
                .body(Empty::<Bytes>::new())?;
            let answer = self.door.ask(ask, SHORT).await?;
            if answer.status() != StatusCode::OK {
                return Err(refused("the list", &answer));
            }
            let page = names_in(&serde_json::from_slice(answer.body())?, field);
            let whole = page.len() < PAGE;
            all.extend(page);
            if whole {
                return Ok(all);
            }
        }
    }

    /// What a tag names, if it is there and may be read.
    pub async fn named(&self, repository: &str, tag: &str) -> Result<Option<String>> {
        let head = self
            .request(Method::HEAD, &format!("/v2/{repository}/manifests/{tag}"))
            .body(Empty::<Bytes>::new())?;
        let answer = self.door.ask(head, SHORT).await?;
        let digest = answer.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        Ok(digest.filter(|_| answer.status() == StatusCode::OK).map(str::to_owned))
    }

    /// Whether pushes to a repository are permitted: an upload is begun and given up.
    async fn may_push(&self, repository: &str) -> Result<bool> {
        let begin = self
            .request(Method::POST, &format!("/v2/{repository}/blobs/uploads/"))
            .header(header::CONTENT_LENGTH, 0)
            .body(Empty::<Bytes>::new())?;
        let begun = self.door.ask(begin, SHORT).await?;
        if let Some(location) = path_of(&begun) {
            let end = self.request(Method::DELETE, &location).body(Empty::<Bytes>::new())?;
            self.door.ask(end, SHORT).await?;
        }
        Ok(begun.status() == StatusCode::ACCEPTED)
    }

    fn request(&self, method: Method, uri: &str) -> http::request::Builder {
        Request::builder().method(method).uri(uri).header(header::HOST, &self.door.address)
    }
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

/// The names in an answer.
fn names_in(answer: &serde_json::Value, field: &str) -> Vec<String> {
    let names = answer[field].as_array().into_iter().flatten();
    names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// What is told while bytes move: how many are there, and of how many.
pub type Report<'a> = &'a dyn Fn(u64, u64);

/// Pushes a file as a blob unless it is there; answers whether it was sent. What breaks off goes on
/// where the registry says it was, also by another call later.
pub async fn blob(
    registry: &Registry<'_>,
    repository: &str,
    path: &Path,
    digest: &str,
    size: u64,
    report: Report<'_>,
) -> Result<bool> {
    let head = registry
        .request(Method::HEAD, &format!("/v2/{repository}/blobs/{digest}"))
        .body(Empty::<Bytes>::new())?;
    if registry.door.ask(head, SHORT).await?.status() == StatusCode::OK {
        return Ok(false);
    }
    let kept = Kept::of(registry.context, repository, digest);
    let upload = Upload { registry, repository, path, size, report };
    // Where an earlier try left off, if the registry still knows it.
    let mut place = match kept.read() {
        Some(location) => upload.offset(&location).await?.map(|offset| (location, offset)),
        None => None,
    };
    let mut patience = Patience::new(tokio::time::Instant::now());
    let mut tries = 0_u32;
    let location = loop {
        let (location, offset) = match place.take() {
            Some(place) => place,
            None => (upload.begin().await?, 0),
        };
        kept.write(&location);
        let error = match upload.send(&location, offset).await {
            Ok(location) => break location,
            Err(error) => error,
        };
        tries += 1;
        let later = "the same command goes on where it was, while the registry keeps the part";
        if error.kind != Kind::Unavailable {
            return Err(error.hint(later));
        }
        if tries == 1 {
            eprintln!("{}; going on where it was", error.message);
        }
        tokio::time::sleep(AGAIN).await;
        // Not answered is not gone: the part may still be there when the registry is back.
        place = match upload.offset(&location).await {
            Ok(found) => found.map(|offset| (location, offset)),
            Err(error) if error.kind == Kind::Unavailable => Some((location, offset)),
            Err(error) => return Err(error),
        };
        let there = place.as_ref().map_or(0, |(_, offset)| *offset);
        if !patience.goes_on(there, tokio::time::Instant::now()) {
            return Err(error.hint(later));
        }
    };
    // The answer may have named another place.
    kept.write(&location);
    let joiner = if location.contains('?') { '&' } else { '?' };
    let put = registry
        .request(Method::PUT, &format!("{location}{joiner}digest={digest}"))
        .header(header::CONTENT_LENGTH, 0)
        .body(Empty::<Bytes>::new())?;
    let done = registry.door.ask(put, FINISH).await?;
    // A registry in trouble still has the part; only an answer says that it is of no use any more.
    if done.status() == StatusCode::CREATED || done.status().is_client_error() {
        kept.forget();
    }
    if done.status() != StatusCode::CREATED {
        return Err(refused("the blob", &done));
    }
    Ok(true)
}

/// Only the path of a location: we stay with the door we trust.
fn path_of(response: &http::Response<Bytes>) -> Option<String> {
    let location = response.headers().get(header::LOCATION)?.to_str().ok()?;
    Some(match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]).to_owned(),
        None => location.to_owned(),
    })
}

/// How many bytes a `Range: 0-N` header says are there. Of `0-0`, which is said of none and of one,
/// none is taken: the registry refuses a wrong offset, and the upload begins anew.
fn range_end(response: &http::Response<Bytes>) -> u64 {
    response
        .headers()
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.trim_start_matches("bytes=").strip_prefix("0-")?.parse::<u64>().ok())
        .map_or(0, |last| if last == 0 { 0 } else { last + 1 })
}

/// For how long an upload that breaks off again and again is gone on with: as long as it gets further.
struct Patience {
    end: tokio::time::Instant,
    most: u64,
}

impl Patience {
    fn new(now: tokio::time::Instant) -> Self {
        Self { end: now + GIVE_UP, most: 0 }
    }

    /// So many bytes are there now.
    fn goes_on(&mut self, there: u64, now: tokio::time::Instant) -> bool {
        if there > self.most {
            *self = Self { end: now + GIVE_UP, most: there };
        }
        now < self.end
    }
}

/// One blob on its way.
struct Upload<'a> {
    registry: &'a Registry<'a>,
    repository: &'a str,
    path: &'a Path,
    size: u64,
    report: Report<'a>,
}

impl Upload<'_> {
    async fn begin(&self) -> Result<String> {
        let begin = self
            .registry
            .request(Method::POST, &format!("/v2/{}/blobs/uploads/", self.repository))
            .header(header::CONTENT_LENGTH, 0)
            .body(Empty::<Bytes>::new())?;
        let begun = self.registry.door.ask(begin, SHORT).await?;
        path_of(&begun)
            .filter(|_| begun.status() == StatusCode::ACCEPTED)
            .ok_or_else(|| refused("the upload", &begun))
    }

    /// How many bytes of an upload are there; `None`: the registry does not know it.
    async fn offset(&self, location: &str) -> Result<Option<u64>> {
        let ask = self.registry.request(Method::GET, location).body(Empty::<Bytes>::new())?;
        let answer = self.registry.door.ask(ask, SHORT).await?;
        if answer.status() == StatusCode::NO_CONTENT {
            return Ok(Some(range_end(&answer)).filter(|offset| *offset <= self.size));
        }
        if answer.status().is_server_error() {
            return Err(refused("the upload", &answer));
        }
        Ok(None)
    }

    /// The bytes from an offset on, in one streamed request; fails when none moves for a while.
    async fn send(&self, location: &str, offset: u64) -> Result<String> {
        (self.report)(offset, self.size);
        if offset >= self.size {
            return Ok(location.to_owned());
        }
        let mut file = tokio::fs::File::open(self.path).await?;
        file.seek(std::io::SeekFrom::Start(offset)).await?;
        let moved = Arc::new(AtomicU64::new(offset));
        let counter = Arc::clone(&moved);
        let stream = ReaderStream::with_capacity(file, PIECE).map(move |piece| {
            piece.map(|bytes| {
                counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Frame::data(bytes)
            })
        });
        let patch = self
            .registry
            .request(Method::PATCH, location)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_RANGE, format!("{offset}-{}", self.size - 1))
            .header(header::CONTENT_LENGTH, self.size - offset)
            .body(StreamBody::new(stream))?;
        let mut sending = std::pin::pin!(self.registry.door.ask(patch, LONG));
        let mut seen = (offset, tokio::time::Instant::now());
        let answer = loop {
            tokio::select! {
                // Polled on, never dropped half-way but on a stall.
                answer = &mut sending => break answer?,
                () = tokio::time::sleep(LOOK) => {
                    let now = moved.load(Ordering::Relaxed);
                    (self.report)(now, self.size);
                    if now != seen.0 {
                        seen = (now, tokio::time::Instant::now());
                    } else if seen.1.elapsed() > STALL {
                        return Err(Error::new(
                            Kind::Unavailable,
                            "the registry has taken nothing for a minute",
                        ));
                    }
                }
            }
        };
        match answer.status() {
            StatusCode::ACCEPTED => {
                (self.report)(self.size, self.size);
                Ok(path_of(&answer).unwrap_or_else(|| location.to_owned()))
            }
            // Another offset, or gone: look again.
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::NOT_FOUND => {
                Err(Error::new(Kind::Unavailable, "the registry has another part of the upload"))
            }
            _ => Err(refused("the blob", &answer)),
        }
    }
}

/// Where an upload is kept between two runs of this program: a file of its own, named by what is
/// uploaded where. Losing it costs bytes and nothing else, so failures to keep it are no errors.
struct Kept(Option<std::path::PathBuf>);

impl Kept {
    fn of(context: &Context, repository: &str, digest: &str) -> Self {
        let what = format!("{}\n{}\n{repository}\n{digest}", context.cluster, context.registry);
        let name = hex::encode(sha2::Sha256::digest(what.as_bytes()));
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let base = std::env::var_os("XDG_CACHE_HOME").map(Into::into).or(home);
        Self(base.map(|base: std::path::PathBuf| base.join("berth").join("uploads").join(name)))
    }

    fn read(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.0.as_ref()?).ok()?;
        let text = text.trim();
        text.starts_with("/v2/").then(|| text.to_owned())
    }

    fn write(&self, location: &str) {
        if let Some(path) = &self.0
            && let Some(folder) = path.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            let _ = std::fs::write(path, location);
        }
    }

    fn forget(&self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Puts a manifest under a tag; answers with its digest.
pub async fn manifest(
    registry: &Registry<'_>,
    repository: &str,
    tag: &str,
    media_type: &str,
    bytes: Vec<u8>,
) -> Result<String> {
    let digest = Digest::of(&bytes).to_string();
    let put = registry
        .request(Method::PUT, &format!("/v2/{repository}/manifests/{tag}"))
        .header(header::CONTENT_TYPE, media_type)
        .body(Full::new(Bytes::from(bytes)))?;
    let done = registry.door.ask(put, SHORT).await?;
    if done.status() != StatusCode::CREATED {
        let mut error = refused("the manifest", &done);
        // The registry has one word for "you may not" and for "nobody may", as of a version that never
        // changes; whoever may push there hears the latter.
        if error.kind == Kind::Denied && registry.may_push(repository).await? {
            error.kind = Kind::User;
        }
        return Err(error);
    }
    Ok(digest)
}

/// An image as it was pushed.
pub struct Pushed {
    /// The manifest's digest.
    pub digest: String,
    /// Bytes of configuration and layers.
    pub size: u64,
    /// Of those, bytes that were not there yet.
    pub sent: u64,
}

/// A layer of an export as it is pushed, and its media type: an engine with containerd's store exports
/// layers as they were pulled, packed already, and packed again nothing could read them; one that is
/// plain is packed into `scratch`.
fn packed(layer: &Path, scratch: PathBuf) -> Result<(PathBuf, &'static str)> {
    use std::io::Read as _;
    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    let mut magic = Vec::new();
    std::fs::File::open(layer)?.take(4).read_to_end(&mut magic)?;
    // The first bytes of a tar are a path's: never one of these.
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Ok((layer.to_owned(), GZIP));
    }
    if magic == [0x28, 0xb5, 0x2f, 0xfd] {
        return Ok((layer.to_owned(), "application/vnd.oci.image.layer.v1.tar+zstd"));
    }
    let file = std::fs::File::create(&scratch)?;
    let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::default());
    std::io::copy(&mut std::fs::File::open(layer)?, &mut gz)?;
    gz.finish()?.sync_all()?;
    Ok((scratch, GZIP))
}

/// A blob of an image, as it goes to a registry.
struct Blob {
    path: PathBuf,
    digest: String,
    size: u64,
}

/// An image of the local engine, in a folder of its own and ready to be pushed. The same image gives the
/// same digest each time.
pub struct Image {
    /// Holds the blobs.
    _folder: TempFolder,
    layers: Vec<Blob>,
    config: Blob,
    manifest: Vec<u8>,
    /// The manifest's digest.
    pub digest: String,
}

/// Takes an image out of the local engine.
pub async fn export(local: &str) -> Result<Image> {
    let engine = crate::engine::connect().await?;
    let folder = TempFolder::new()?;
    let archive = folder.path().join("image.tar");
    let mut file = tokio::fs::File::create(&archive).await?;
    let mut stream = engine.export_image(local);
    while let Some(piece) = stream.next().await {
        tokio::io::AsyncWriteExt::write_all(&mut file, &piece.map_err(crate::engine::explain)?)
            .await?;
    }
    tokio::io::AsyncWriteExt::flush(&mut file).await?;
    drop(file);
    let to = folder.path().join("image");
    aside(move || Ok(tar::Archive::new(std::fs::File::open(archive)?).unpack(to)?)).await?;
    ready(folder).await
}

/// The image that is unpacked in a folder, as it is pushed.
async fn ready(folder: TempFolder) -> Result<Image> {
    let from = folder.path().join("image");
    let list: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join("manifest.json"))?)?;
    let inside = |name: &str| -> Result<PathBuf> {
        let path = from.join(name).canonicalize()?;
        if path.starts_with(from.canonicalize()?) {
            Ok(path)
        } else {
            Err(Error::user("the engine's archive names a file outside of it"))
        }
    };
    let path = inside(list[0]["Config"].as_str().unwrap_or_default())?;
    let (digest, size) = digest_of(&path).await?;
    let config = Blob { path, digest, size };
    let (mut layers, mut described) = (Vec::new(), Vec::new());
    for (i, layer) in list[0]["Layers"].as_array().into_iter().flatten().enumerate() {
        let plain = inside(layer.as_str().unwrap_or_default())?;
        let scratch = folder.path().join(format!("layer-{i}.gz"));
        let (path, media_type) = aside(move || packed(&plain, scratch)).await?;
        let (digest, size) = digest_of(&path).await?;
        described.push(serde_json::json!({
            "mediaType": media_type,
            "digest": digest,
            "size": size,
        }));
        layers.push(Blob { path, digest, size });
    }
    let body = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest,
            "size": config.size,
        },
        "layers": described,
    });
    let manifest = serde_json::to_vec(&body)?;
    let digest = Digest::of(&manifest).to_string();
    Ok(Image { _folder: folder, layers, config, manifest, digest })
}

/// Pushes an image that was taken out of the local engine.
pub async fn image(context: &Context, image: Image, repository: &str, tag: &str) -> Result<Pushed> {
    let registry = Registry::of(context)?;
    let (mut size, mut sent) = (image.config.size, 0);
    let board = RefCell::new(Board::new());
    for (i, layer) in image.layers.iter().enumerate() {
        let name = format!("layer {}", i + 1);
        let report = |done, all| board.borrow_mut().show(0, vec![moving(&name, done, all)]);
        let Blob { path, digest, size: bytes } = layer;
        let new = blob(&registry, repository, path, digest, *bytes, &report).await?;
        let what = if new { "pushed" } else { "there already" };
        board.borrow_mut().end(0, &format!("{name}: {}, {what}", human_bytes(*bytes)));
        size += bytes;
        if new {
            sent += bytes;
        }
    }
    let Blob { path, digest, size: bytes } = &image.config;
    if blob(&registry, repository, path, digest, *bytes, &|_, _| {}).await? {
        sent += bytes;
    }
    let digest = manifest(&registry, repository, tag, MANIFEST, image.manifest).await?;
    Ok(Pushed { digest, size, sent })
}

/// How far a transfer is, in a line.
pub fn moving(name: &str, done: u64, all: u64) -> Line {
    let percent = done.saturating_mul(100).checked_div(all).unwrap_or(100);
    let name = berth_proto::escape::for_terminal(name);
    Line {
        key: name.clone(),
        text: format!("{name}: {} of {}, {percent} %", human_bytes(done), human_bytes(all)),
        // A line each quarter is enough for a file.
        coarse: format!("{}", percent / 25),
        ink: Ink::Busy,
    }
}

/// A folder that is gone when it is dropped.
pub struct TempFolder(std::path::PathBuf);

impl TempFolder {
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("berth-{}", uuid::Uuid::new_v4().simple()));
        // An image's layers are its owner's to read.
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(name: header::HeaderName, value: &str) -> http::Response<Bytes> {
        http::Response::builder().header(name, value).body(Bytes::new()).unwrap()
    }

    #[test]
    fn where_an_upload_is_is_read_from_its_range() {
        assert_eq!(range_end(&answer(header::RANGE, "0-9")), 10);
        assert_eq!(range_end(&answer(header::RANGE, "bytes=0-9")), 10);
        // Said of nothing and of one byte alike.
        assert_eq!(range_end(&answer(header::RANGE, "0-0")), 0);
        assert_eq!(range_end(&answer(header::RANGE, "nonsense")), 0);
    }

    #[test]
    fn a_layer_that_is_packed_already_goes_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (layer, scratch) = (dir.path().join("layer"), dir.path().join("scratch"));
        for (bytes, name) in
            [(&[0x1f, 0x8b, 8, 0, 1][..], "tar+gzip"), (&[0x28, 0xb5, 0x2f, 0xfd, 1], "tar+zstd")]
        {
            std::fs::write(&layer, bytes).unwrap();
            let (path, media_type) = packed(&layer, scratch.clone()).unwrap();
            assert_eq!((&path, media_type.ends_with(name)), (&layer, true), "{media_type}");
        }
        for plain in [&b""[..], b"a tar's bytes"] {
            std::fs::write(&layer, plain).unwrap();
            let (path, media_type) = packed(&layer, scratch.clone()).unwrap();
            assert_eq!((&path, media_type.ends_with("tar+gzip")), (&scratch, true));
            let mut back = Vec::new();
            let mut gz = flate2::read::GzDecoder::new(std::fs::File::open(&path).unwrap());
            std::io::Read::read_to_end(&mut gz, &mut back).unwrap();
            assert_eq!(back, plain);
        }
    }

    #[tokio::test]
    async fn an_images_digest_is_known_before_it_is_pushed_and_the_same_each_time() {
        let of = async |layer: &str| {
            let folder = TempFolder::new().unwrap();
            let into = folder.path().join("image");
            std::fs::create_dir(&into).unwrap();
            let list = r#"[{"Config": "config.json", "Layers": ["layer.tar"]}]"#;
            for (name, text) in
                [("manifest.json", list), ("config.json", "{}"), ("layer.tar", layer)]
            {
                std::fs::write(into.join(name), text).unwrap();
            }
            let image = ready(folder).await.unwrap();
            assert_eq!(image.digest, Digest::of(&image.manifest).to_string());
            // Still there to be pushed.
            assert!(image.layers.iter().chain([&image.config]).all(|blob| blob.path.is_file()));
            image.digest
        };
        assert_eq!(of("a tar's bytes").await, of("a tar's bytes").await);
        assert_ne!(of("a tar's bytes").await, of("another's").await);
    }

    #[test]
    fn an_upload_that_gets_further_is_never_given_up() {
        let mut now = tokio::time::Instant::now();
        let mut patience = Patience::new(now);
        for there in 1..100 {
            now += GIVE_UP * 2;
            assert!(patience.goes_on(there, now));
        }
        assert!(patience.goes_on(50, now + GIVE_UP / 2));
        assert!(!patience.goes_on(99, now + GIVE_UP));
    }

    #[test]
    fn what_is_packed_for_a_push_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = TempFolder::new().unwrap();
        let mode = std::fs::metadata(folder.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn an_upload_stays_with_the_door_that_is_trusted() {
        let at = |value| path_of(&answer(header::LOCATION, value));
        assert_eq!(at("/v2/a/blobs/uploads/1?x=y").as_deref(), Some("/v2/a/blobs/uploads/1?x=y"));
        assert_eq!(at("https://elsewhere/v2/a").as_deref(), Some("/v2/a"));
        assert_eq!(at("https://elsewhere").as_deref(), Some("/"));
    }
}
