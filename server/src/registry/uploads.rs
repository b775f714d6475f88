//! Uploads: bytes on their way to become a blob.
//!
//! Bytes go to the disk as they come and are hashed on the way; when the server was restarted in
//! between, the file is hashed again at the end, so what is kept is always what was verified. One
//! request at a time writes to an upload. A request that is dropped leaves the upload whole: the
//! lock travels with the write, so nobody sees it half done.

use super::disk::read_small;
use super::errors::{RegistryError, io};
use super::names::RepoName;
use super::{Inner, Registry, add};
use berth_proto::ids::Digest;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// A write this large is worth a job of its own.
const BATCH_BYTES: usize = 256 << 10;
/// A batch never grows past this while the write before it is under way.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Nor past this many pieces: a client that sends single bytes must not grow the list.
const BATCH_PIECES_MAX: usize = 256;
/// How much may wait in the page cache before the disk is set to work, so that the last fsync of a
/// large blob is short.
const FLUSH_BYTES: u64 = 32 << 20;
/// Another request holding the upload longer than this is a client talking to itself.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// One upload, for whoever holds its lock.
pub(super) type Slot = Arc<Mutex<State>>;
type Guard = OwnedMutexGuard<State>;

/// An upload under way.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    slot: Slot,
    /// Who began it; nobody of those from before the start, and of the server's own.
    by: Option<String>,
}

/// What this process knows of an upload.
#[derive(Debug, Default)]
pub(super) enum State {
    /// Nothing but that its folder was there at the start.
    #[default]
    OnDisk,
    /// Read or written since.
    Open(Session),
    /// A blob now, or given up; whoever waited for the lock is told so.
    Ended,
}

#[derive(Debug)]
pub(super) struct Session {
    repo: RepoName,
    /// Bytes held.
    offset: u64,
    /// Over all bytes held; `None` when they came before the start.
    hasher: Option<Sha256>,
    /// The data file, while a request writes.
    file: Option<Arc<File>>,
    /// Bytes written since the last flush began.
    unflushed: u64,
    flush: Option<JoinHandle<std::io::Result<()>>>,
    active: Instant,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Meta {
    repository: String,
}

/// Bytes that wait to be written, with the memory they were given.
#[derive(Default)]
struct Batch {
    pieces: Vec<Bytes>,
    bytes: usize,
    budget: Vec<OwnedSemaphorePermit>,
}

/// Who holds the upload's lock: we, or the write under way.
enum Writer {
    Idle(Guard),
    Busy(JoinHandle<Result<Guard, RegistryError>>),
}

impl Registry {
    /// Begins an upload of the server's own into `repo`.
    ///
    /// # Errors
    /// Those of [`Self::begin_upload_by`].
    pub async fn begin_upload(&self, repo: &RepoName) -> Result<Uuid, RegistryError> {
        self.begin_upload_by(repo, None).await
    }

    /// Begins an upload into `repo`, by whom.
    ///
    /// # Errors
    /// [`RegistryError::DiskFull`], [`RegistryError::TooMany`], [`RegistryError::Io`].
    pub async fn begin_upload_by(
        &self,
        repo: &RepoName,
        by: Option<&str>,
    ) -> Result<Uuid, RegistryError> {
        let id = Uuid::new_v4();
        let session = Session {
            repo: repo.clone(),
            offset: 0,
            hasher: Some(Sha256::new()),
            file: None,
            unflushed: 0,
            flush: None,
            active: Instant::now(),
        };
        {
            let mut uploads = self.0.uploads.lock();
            if uploads.len() >= self.0.settings.uploads_max {
                return Err(RegistryError::TooMany("too many uploads are under way, try again"));
            }
            let own = |held: &&UnderWay| by.is_some() && held.by.as_deref() == by;
            if uploads.values().filter(own).count() >= self.0.settings.uploads_of_one {
                return Err(RegistryError::TooMany(
                    "too many uploads of yours are under way; end some, or wait until they are \
                     given up",
                ));
            }
            let slot = Arc::new(Mutex::new(State::Open(session)));
            uploads.insert(id, UnderWay { slot, by: by.map(str::to_owned) });
        }
        let meta = serde_json::json!(Meta { repository: repo.as_str().to_owned() }).to_string();
        let made = self
            .blocking_with("beginning an upload", move |inner| {
                inner.check_room(0)?;
                // Not made durable: an upload that a power cut takes is begun again.
                let folder = inner.disk.upload(id);
                (|| {
                    inner.disk.change()?;
                    std::fs::create_dir(&folder)?;
                    std::fs::write(folder.join("meta.json"), meta)?;
                    File::create_new(folder.join("data")).map(drop)
                })()
                .map_err(io("beginning an upload"))
            })
            .await;
        if let Err(error) = made {
            self.0.uploads.lock().remove(&id);
            return Err(error);
        }
        add(&self.0.stats.uploads_begun, 1);
        Ok(id)
    }

    /// Bytes an upload holds.
    ///
    /// # Errors
    /// [`RegistryError::UploadUnknown`], [`RegistryError::TooMany`] while another request writes.
    pub async fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<u64, RegistryError> {
        let mut guard = self.lock_upload(repo, id).await?;
        Ok(guard.session()?.offset)
    }

    /// Appends `body` to an upload and answers with the bytes it holds then.
    ///
    /// `at`: where the body must begin and, when announced, its length. What came of a body that
    /// ends early is kept.
    ///
    /// # Errors
    /// [`RegistryError::UploadRange`] and those of [`Self::upload_offset`] and
    /// [`Self::begin_upload`]; [`RegistryError::BodyBroken`].
    pub async fn append_upload<S, E>(
        &self,
        repo: &RepoName,
        id: Uuid,
        at: Placement,
        body: S,
    ) -> Result<u64, RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let guard = self.lock_upload(repo, id).await?;
        let mut guard = self.receive(guard, id, at, body).await?;
        Ok(guard.session()?.offset)
    }

    /// Appends `body`, and makes the upload a blob of its repository when its content has the
    /// digest `expected`; otherwise it ends. Answers with the blob's digest and size.
    ///
    /// # Errors
    /// [`RegistryError::DigestMismatch`] and those of [`Self::append_upload`].
    pub async fn finish_upload<S, E>(
        &self,
        repo: &RepoName,
        id: Uuid,
        at: Placement,
        body: S,
        expected: Option<&Digest>,
    ) -> Result<(Digest, u64), RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let guard = self.lock_upload(repo, id).await?;
        let mut guard = self.receive(guard, id, at, body).await?;
        let (digest, size) = self.verify(&mut guard, id).await?;
        if let Some(expected) = expected
            && *expected != digest
        {
            let error = RegistryError::DigestMismatch { expected: expected.clone(), found: digest };
            self.end(guard, id).await?;
            return Err(error);
        }
        let gate = self.shared().await;
        let (repo, blob) = (repo.clone(), digest.clone());
        self.blocking("storing a blob", move |inner| {
            let _gate = gate;
            // The link, which needs room, before the bytes leave the upload: a full disk leaves it as
            // it was. A link whose blob is not there leads to nothing.
            inner.link_blob(&repo, &blob)?;
            inner.store_blob(&inner.disk.upload(id).join("data"), &blob)?;
            *guard = State::Ended;
            inner.uploads.lock().remove(&id);
            inner.disk.remove_upload(id)
        })
        .await?;
        add(&self.0.stats.uploads_finished, 1);
        Ok((digest, size))
    }

    /// Takes a whole blob at once, with an upload that nobody else knows of: it is given up when the
    /// blob is not taken, also when this is dropped in the middle.
    ///
    /// # Errors
    /// Those of [`Self::begin_upload_by`] and [`Self::finish_upload`].
    pub async fn take_whole<S, E>(
        &self,
        repo: &RepoName,
        by: Option<&str>,
        at: Placement,
        body: S,
        expected: Option<&Digest>,
    ) -> Result<(Digest, u64), RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let id = self.begin_upload_by(repo, by).await?;
        let mut unfinished = Unfinished(Some((self.clone(), repo.clone(), id)));
        let stored = self.finish_upload(repo, id, at, body, expected).await;
        let _ = unfinished.0.take();
        if stored.is_err() {
            let _ = self.cancel_upload(repo, id).await;
        }
        stored
    }

    /// Gives an upload up.
    ///
    /// # Errors
    /// Those of [`Self::upload_offset`].
    pub async fn cancel_upload(&self, repo: &RepoName, id: Uuid) -> Result<(), RegistryError> {
        let guard = self.lock_upload(repo, id).await?;
        self.end(guard, id).await
    }

    /// Ends uploads that got no byte for [`Settings::abandoned_after`](super::Settings); how many.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn end_abandoned_uploads(&self) -> Result<u64, RegistryError> {
        let all: Vec<(Uuid, Slot)> =
            self.0.uploads.lock().iter().map(|(id, held)| (*id, Arc::clone(&held.slot))).collect();
        let limit = self.0.settings.abandoned_after;
        let mut ended = 0;
        for (id, slot) in all {
            // One that is written to just now is not abandoned.
            let Ok(guard) = slot.try_lock_owned() else { continue };
            let age = match &*guard {
                State::Open(session) => Some(session.active.elapsed()),
                State::Ended => None,
                State::OnDisk => {
                    self.blocking("looking at an upload", move |inner| {
                        let folder = inner.disk.upload(id);
                        let found = std::fs::metadata(folder.join("data"))
                            .or_else(|_| std::fs::metadata(&folder));
                        // Without a folder there is nothing to wait for.
                        let Ok(found) = found else { return Ok(Some(Duration::MAX)) };
                        Ok(found.modified()?.elapsed().ok())
                    })
                    .await?
                }
            };
            if age.is_some_and(|age| age >= limit) {
                self.end(guard, id).await?;
                ended += 1;
            }
        }
        Ok(ended)
    }

    /// The upload's lock, with its state read from disk when this process has not yet.
    async fn lock_upload(&self, repo: &RepoName, id: Uuid) -> Result<Guard, RegistryError> {
        let slot = self.0.uploads.lock().get(&id).map(|held| Arc::clone(&held.slot));
        let slot = slot.ok_or(RegistryError::UploadUnknown)?;
        let guard = tokio::time::timeout(LOCK_WAIT, slot.lock_owned())
            .await
            .map_err(|_| RegistryError::TooMany("another request writes to this upload"))?;
        let guard = if matches!(*guard, State::OnDisk) {
            self.blocking("reading an upload", move |inner| {
                let mut guard = guard;
                let found = inner.load(id)?;
                if let Some(session) = found {
                    *guard = State::Open(session);
                }
                Ok(guard)
            })
            .await?
        } else {
            guard
        };
        match &*guard {
            State::Open(session) if session.repo == *repo => Ok(guard),
            State::Open(_) | State::OnDisk | State::Ended => Err(RegistryError::UploadUnknown),
        }
    }

    /// Ends an upload: its folder goes.
    async fn end(&self, guard: Guard, id: Uuid) -> Result<(), RegistryError> {
        self.blocking("ending an upload", move |inner| {
            let mut guard = guard;
            *guard = State::Ended;
            inner.uploads.lock().remove(&id);
            inner.disk.remove_upload(id)
        })
        .await?;
        add(&self.0.stats.uploads_ended, 1);
        Ok(())
    }

    /// Takes `body` to the disk. Memory: one batch being written and one being filled, both out of
    /// the budget all uploads share.
    async fn receive<S, E>(
        &self,
        mut guard: Guard,
        id: Uuid,
        at: Placement,
        mut body: S,
    ) -> Result<Guard, RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let session = guard.session()?;
        if at.start.is_some_and(|start| start != session.offset) {
            return Err(RegistryError::UploadRange {
                offset: session.offset,
                location: upload_location(&session.repo, id),
            });
        }
        if let Some(coming) = at.length {
            self.blocking_with("asking how much disk is free", move |inner| {
                inner.check_room(coming)
            })
            .await?;
        }
        let mut writer = Writer::Idle(guard);
        let mut batch = Batch::default();
        let mut got = 0_u64;
        let ended = loop {
            let bytes = match tokio::time::timeout(self.0.settings.stall, body.next()).await {
                Ok(None) => break Ok(()),
                Ok(Some(Ok(bytes))) => bytes,
                Ok(Some(Err(_))) | Err(_) => break Err(RegistryError::BodyBroken),
            };
            got += bytes.len() as u64;
            if at.length.is_some_and(|length| got > length) {
                break Err(RegistryError::UploadInvalid(
                    "the body is longer than its Content-Range".to_owned(),
                ));
            }
            let kib = bytes.len().div_ceil(1024).min(super::BUDGET_KIB);
            let kib = u32::try_from(kib).unwrap_or(u32::MAX);
            let budget = if let Ok(at_once) = Arc::clone(&self.0.budget).try_acquire_many_owned(kib)
            {
                at_once
            } else {
                // What we hold goes first: two that wait for each other's memory would wait long.
                writer = self.submit(writer, std::mem::take(&mut batch), id).await?;
                let wait = Arc::clone(&self.0.budget).acquire_many_owned(kib);
                match tokio::time::timeout(self.0.settings.stall, wait).await {
                    Ok(Ok(permit)) => permit,
                    Ok(Err(_)) | Err(_) => {
                        break Err(RegistryError::Unavailable("the registry's disk is too busy"));
                    }
                }
            };
            batch.bytes += bytes.len();
            batch.pieces.push(bytes);
            batch.budget.push(budget);
            // When memory is short nobody waits for a batch to be worth it.
            let short = self.0.budget.available_permits() < super::BUDGET_KIB / 2;
            let worth = if short { 1 } else { BATCH_BYTES };
            let idle = match &writer {
                Writer::Idle(_) => true,
                Writer::Busy(job) => job.is_finished(),
            };
            if (idle && batch.bytes >= worth)
                || batch.bytes >= BATCH_BYTES_MAX
                || batch.pieces.len() >= BATCH_PIECES_MAX
            {
                writer = self.submit(writer, std::mem::take(&mut batch), id).await?;
            }
        };
        writer = self.submit(writer, batch, id).await?;
        let mut guard = match writer {
            Writer::Idle(guard) => guard,
            Writer::Busy(job) => joined(job).await?,
        };
        guard.session()?.active = Instant::now();
        guard.session()?.file = None;
        ended.map(|()| guard)
    }

    /// Waits for the write under way and starts the next.
    async fn submit(
        &self,
        writer: Writer,
        batch: Batch,
        id: Uuid,
    ) -> Result<Writer, RegistryError> {
        let mut guard = match writer {
            Writer::Idle(guard) => guard,
            Writer::Busy(job) => joined(job).await?,
        };
        if batch.bytes == 0 {
            return Ok(Writer::Idle(guard));
        }
        guard.session()?.start_flush();
        add(&self.0.stats.bytes_in, batch.bytes as u64);
        let registry = self.clone();
        // On its own task, so that the write goes on, and the lock with it, when we are dropped.
        Ok(Writer::Busy(tokio::spawn(async move {
            registry
                .blocking_with("writing an upload", move |inner| {
                    let written = inner.append(&mut guard, id, &batch);
                    drop(batch.budget);
                    written.map(|()| guard)
                })
                .await
        })))
    }

    /// The digest of what an upload holds, which is durable then.
    async fn verify(&self, guard: &mut Guard, id: Uuid) -> Result<(Digest, u64), RegistryError> {
        let session = guard.session()?;
        let flush = session.flush.take();
        let (hasher, offset) = (session.hasher.clone(), session.offset);
        if let Some(flush) = flush {
            let flushed = flush.await.map_err(std::io::Error::other).and_then(|done| done);
            if let Err(source) = flushed {
                // The kernel reports a failed write once: a later fsync would say all is well.
                session.hasher = None;
                return Err(io("writing an upload")(source));
            }
        }
        self.blocking("storing a blob", move |inner| {
            let path = inner.disk.upload(id).join("data");
            let mut file = File::options().read(true).write(true).open(path)?;
            let hasher = match hasher {
                Some(hasher) => hasher,
                None => hash_file(&mut file)?,
            };
            file.set_modified(SystemTime::now())?;
            file.sync_all()?;
            Ok((Digest::from_sha256(&hasher.finalize().into()), offset))
        })
        .await
    }
}

/// Gives an upload up with whoever would have finished it.
struct Unfinished(Option<(Registry, RepoName, Uuid)>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some((registry, repo, id)) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                // One that is stored by now is no upload any more.
                let _ = registry.cancel_upload(&repo, id).await;
            });
        }
    }
}

impl State {
    fn session(&mut self) -> Result<&mut Session, RegistryError> {
        match self {
            Self::Open(session) => Ok(session),
            Self::OnDisk | Self::Ended => Err(RegistryError::UploadUnknown),
        }
    }
}

impl Session {
    /// Sets the disk to work on what was written, beside the upload. One at a time.
    fn start_flush(&mut self) {
        let idle = self.flush.is_none();
        if let Some(file) = &self.file
            && self.unflushed >= FLUSH_BYTES
            && idle
        {
            let file = Arc::clone(file);
            self.unflushed = 0;
            self.flush = Some(tokio::task::spawn_blocking(move || file.sync_data()));
        }
    }
}

impl Inner {
    fn load(&self, id: Uuid) -> std::io::Result<Option<Session>> {
        let folder = self.disk.upload(id);
        let Some(meta) = read_small(&folder.join("meta.json"))? else { return Ok(None) };
        // A crash may have left the file half written.
        let Ok(meta) = serde_json::from_slice::<Meta>(&meta) else { return Ok(None) };
        let Ok(repo) = RepoName::parse(&meta.repository) else { return Ok(None) };
        let Ok(data) = std::fs::metadata(folder.join("data")) else { return Ok(None) };
        Ok(Some(Session {
            repo,
            offset: data.len(),
            hasher: (data.len() == 0).then(Sha256::new),
            file: None,
            unflushed: 0,
            flush: None,
            active: Instant::now(),
        }))
    }

    fn append(&self, state: &mut State, id: Uuid, batch: &Batch) -> Result<(), RegistryError> {
        self.check_room(0)?;
        let session = state.session()?;
        let written = (|| {
            let file = match &session.file {
                Some(file) => Arc::clone(file),
                None => {
                    let path = self.disk.upload(id).join("data");
                    let file = Arc::new(File::options().write(true).open(path)?);
                    session.file = Some(Arc::clone(&file));
                    file
                }
            };
            for piece in &batch.pieces {
                if let Err(error) = file.write_all_at(piece, session.offset) {
                    // Bytes past the offset must not be taken for held ones after a restart.
                    let _ = file.set_len(session.offset);
                    session.file = None;
                    return Err(error);
                }
                session.offset += piece.len() as u64;
                session.unflushed += piece.len() as u64;
                if let Some(hasher) = &mut session.hasher {
                    hasher.update(piece);
                }
            }
            Ok(())
        })();
        written.map_err(io("writing an upload"))
    }

    /// Makes a durable file, whose content was verified, a blob. It takes the place of one that is
    /// there: whether that is damaged is not known, and this one is not.
    pub(super) fn store_blob(
        &self,
        from: &std::path::Path,
        digest: &Digest,
    ) -> std::io::Result<()> {
        self.disk.adopt(from, &self.disk.blob(digest))
    }
}

fn hash_file(file: &mut File) -> std::io::Result<Sha256> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher),
            n => hasher.update(&buffer[..n]),
        }
    }
}

async fn joined(job: JoinHandle<Result<Guard, RegistryError>>) -> Result<Guard, RegistryError> {
    job.await.map_err(|ended| io("writing an upload")(std::io::Error::other(ended)))?
}

/// Where the bytes of a request belong in an upload.
#[derive(Debug, Clone, Copy, Default)]
pub struct Placement {
    /// Offset of the first byte; `None`: wherever the upload is.
    pub start: Option<u64>,
    /// How many bytes; `None`: until the body ends.
    pub length: Option<u64>,
}

/// The path an upload is continued at.
pub(super) fn upload_location(repo: &RepoName, id: Uuid) -> String {
    format!("/v2/{repo}/blobs/uploads/{}", id.simple())
}
