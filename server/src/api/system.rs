//! The server itself: how it is, its backups, its house.

use super::{Api, audit, auth};
use crate::backup::{self, BackupError, Contents, PrivateFile, Recovery};
use crate::error::{Chain, Error, Kind};
use crate::ledger::refused;
use crate::registry::RegistryError;
use crate::store::StoreError;
use berth_proto::api::system_service_server::SystemService;
use berth_proto::api::*;
use berth_proto::convert::timestamp;
use berth_proto::words::counted;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::view::View;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Bytes of a backup in one message, as the contract says.
const PIECE: usize = 64 * 1024;
/// Messages of a backup ahead of the wire.
const PIECES: usize = 8;
/// A caller that takes nothing for so long has gone.
const STALL: Duration = Duration::from_secs(60);

/// What a backup will hold. One is made at a time: each holds the ledger in memory.
struct Taken {
    contents: Contents,
    recovery: Recovery,
    running: OwnedMutexGuard<()>,
}

fn not_written(error: BackupError) -> Error {
    if let BackupError::File { source, .. } = &error
        && source.kind() == std::io::ErrorKind::StorageFull
    {
        let message = "the server's disk is full; no backup was written".to_owned();
        return Error::Exhausted { reason: "DISK_FULL", message };
    }
    Error::precondition("BACKUP_FILE", Chain(&error).to_string())
}

fn not_collected(error: RegistryError) -> Error {
    if matches!(error, RegistryError::TooMany(_)) {
        let words = "a collection is under way; ask again when it is done";
        return Error::unavailable("COLLECTION_RUNNING", words);
    }
    Error::internal("cannot collect", error)
}

/// Sends what is written to it as messages, and waits for a slow caller within bounds.
struct Pieces {
    tx: mpsc::Sender<Result<StreamBackupResponse, Status>>,
    held: Vec<u8>,
    handle: Handle,
}

impl Pieces {
    fn send(&self, item: stream_backup_response::Item) -> std::io::Result<()> {
        let message = Ok(StreamBackupResponse { item: Some(item) });
        let sent = async { tokio::time::timeout(STALL, self.tx.send(message)).await };
        match self.handle.block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(std::io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }
}

impl std::io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = bytes.len().min(PIECE - self.held.len());
        self.held.extend_from_slice(&bytes[..n]);
        if self.held.len() == PIECE {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.held);
        self.send(stream_backup_response::Item::Data(piece))
    }
}

impl Api {
    /// Takes together what a backup holds, as of one revision.
    async fn take_backup(&self, new_key: bool) -> Result<Taken, Error> {
        let running = Arc::clone(&self.0.backing_up).try_lock_owned().map_err(|_| {
            Error::unavailable("BACKUP_RUNNING", "another backup is being made; ask again")
        })?;
        let cluster = self.0.ledger.ahead().cluster.clone();
        let recovery = Recovery::of(&cluster, new_key)
            .map_err(|e| Error::precondition("RECOVERY_KEY", Chain(&e).to_string()))?;
        let unread = |e: StoreError| Error::internal("cannot read the ledger", e);
        // Blobs after the ledger: what it names is then listed.
        let (revision, entries) = self.0.ledger.snapshot().await.map_err(unread)?;
        let blobs = self
            .0
            .registry
            .all_blobs()
            .await
            .map_err(|e| Error::internal("cannot list the registry's blobs", e))?;
        let header = backup::header(&self.0.roots, revision, cluster.epoch);
        let contents = Contents::new(header, entries, blobs, &recovery);
        Ok(Taken { contents, recovery, running })
    }

    /// Writes down who takes a backup, before a byte of it is written: it holds the CA's key, also
    /// where its end is never seen.
    async fn note_backup(&self, caller: &auth::Caller, method: &str) -> Result<(), Error> {
        let entry = audit(caller, method, "", vec!["backup".to_owned()]);
        self.keep_of_backup(caller, vec![entry]).await
    }

    /// Has the key it is encrypted to count when that is new: there is a backup that it opens.
    async fn keep_key(&self, caller: &auth::Caller, recovery: &Recovery) -> Result<(), Error> {
        let _one = self.0.recording.lock().await;
        let cluster = self.0.ledger.ahead().cluster.clone();
        match recovery.recorded(&cluster) {
            Some(change) => self.keep_of_backup(caller, vec![change]).await,
            None => Ok(()),
        }
    }

    async fn keep_of_backup(
        &self,
        caller: &auth::Caller,
        changes: Vec<Change>,
    ) -> Result<(), Error> {
        let proposal = Proposal { preconditions: Vec::new(), changes };
        let written = self.0.ledger.propose(proposal).await;
        written.map(|_| ()).map_err(|why| refused(why, Kind::User, &caller.subject))
    }

    /// Writes a backup into a file of the server's. `asked` is closed when nobody waits for it.
    async fn back_up_to(
        &self,
        caller: &auth::Caller,
        path: PathBuf,
        new_key: bool,
        asked: &oneshot::Sender<()>,
    ) -> Result<BackupResponse, Error> {
        let Taken { contents, recovery, running } = self.take_backup(new_key).await?;
        self.note_backup(caller, "SystemService/Backup").await?;
        let revision = contents.header.revision;
        let recipient = recovery.recipient.clone();
        let file = path.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut out = PrivateFile::create(&path)?;
            let size = backup::write(&contents, &recipient, &mut out).map_err(|source| {
                BackupError::File { doing: "write", path: path.clone(), source }
            })?;
            out.finish()?;
            Ok(size)
        });
        let size_bytes = written
            .await
            .map_err(|e| Error::internal("cannot write the backup", e))?
            .map_err(not_written)?;
        if recovery.shown.is_some() && asked.is_closed() {
            // A key that nobody was shown must not count, and opens this backup alone.
            let removed = tokio::fs::remove_file(&file).await;
            tracing::warn!(?removed, "whoever asked for a backup with a new key has gone");
            return Err(Error::unavailable("CALLER_GONE", "whoever asked has gone"));
        }
        self.keep_key(caller, &recovery).await?;
        drop(running);
        Ok(BackupResponse {
            size_bytes,
            revision,
            recovery_recipient: recovery.recipient.to_string(),
            recovery_key: recovery.shown.unwrap_or_default(),
        })
    }

    /// What an operator still has to look at since a restore.
    fn since_a_restore(&self, view: &View) -> Vec<String> {
        let mut words = Vec::new();
        if !view.cluster.observing {
            return words;
        }
        let orphans = view.hosts().map(|host| view.orphans_on(&host.uid).count()).sum::<usize>();
        if orphans > 0 {
            let runs = if orphans == 1 { "runs" } else { "run" };
            words.push(format!(
                "{} {runs} that the restored ledger does not know: `berth orphan list` shows what to \
                 decide about",
                counted(orphans, "replica")
            ));
        }
        let unheard = view.hosts().filter(|host| view.is_unobserved(&host.uid)).count();
        if unheard > 0 {
            let (have, they) = if unheard == 1 { ("has", "it has") } else { ("have", "they have") };
            words.push(format!(
                "{} {have} not said what runs there since the ledger was restored; nothing is changed \
                 there before {they}",
                counted(unheard, "host")
            ));
        }
        words
    }
}

#[tonic::async_trait]
impl SystemService for Api {
    async fn get_server_info(
        &self,
        _request: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let view = self.0.ledger.view();
        let mut warnings = Vec::new();
        warnings.extend(self.since_a_restore(&view));
        warnings.extend(self.about_roots());
        if self.0.cramped.load(Ordering::Relaxed) {
            warnings.push(
                "the disk is full: only deleting and cleaning are taken until there is room"
                    .to_owned(),
            );
        }
        // A disk may take long to say it.
        let folder = self.0.settings.data_dir.clone();
        let free = tokio::task::spawn_blocking(move || crate::store::folder::free_bytes(&folder));
        let free = free.await.ok().and_then(Result::ok).unwrap_or(u64::MAX);
        if free < 1 << 30 {
            warnings.push(format!("the disk has only {} MiB left", free >> 20));
        }
        Ok(Response::new(GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster: self.0.roots.cluster().to_string(),
            epoch: view.cluster.epoch,
            revision: view.revision.0,
            start_time: Some(timestamp(self.0.started)),
            endpoints: self.0.endpoints.clone(),
            registry: self.0.registry_address.clone(),
            gateway: self.0.gateway_address.clone(),
            page: self.0.page_address.clone(),
            warnings,
            roots_pem: self.0.roots.pem(),
        }))
    }

    async fn get_roots(
        &self,
        _request: Request<GetRootsRequest>,
    ) -> Result<Response<GetRootsResponse>, Status> {
        Ok(Response::new(GetRootsResponse { state: Some(self.roots_state()?) }))
    }

    async fn begin_root_rotation(
        &self,
        request: Request<BeginRootRotationRequest>,
    ) -> Result<Response<BeginRootRotationResponse>, Status> {
        let (api, caller) = (self.clone(), auth::of(&request));
        // A task of its own: with a caller that goes away it is not cut off in the middle.
        let begun = tokio::spawn(async move { api.begin_rotation(&caller).await });
        let begun = begun.await.map_err(|e| Error::internal("cannot change the roots", e))?;
        Ok(Response::new(BeginRootRotationResponse { state: Some(begun?) }))
    }

    async fn finish_root_rotation(
        &self,
        request: Request<FinishRootRotationRequest>,
    ) -> Result<Response<FinishRootRotationResponse>, Status> {
        let (api, caller) = (self.clone(), auth::of(&request));
        let r = request.into_inner();
        let done = tokio::spawn(async move { api.finish_rotation(&caller, &r.pin, r.force).await });
        let done = done.await.map_err(|e| Error::internal("cannot change the roots", e))?;
        Ok(Response::new(FinishRootRotationResponse { state: Some(done?) }))
    }

    async fn create_page_link(
        &self,
        request: Request<CreatePageLinkRequest>,
    ) -> Result<Response<CreatePageLinkResponse>, Status> {
        let code = self.0.links.make(auth::of(&request));
        let url = format!("https://{}/login?code={code}", self.0.page_address);
        Ok(Response::new(CreatePageLinkResponse { url }))
    }

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<BackupResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let path = PathBuf::from(&r.path);
        if !path.is_absolute() {
            let words =
                "must be an absolute path on the server; `berth backup` sends the file here";
            return Err(Error::field("path", words).into());
        }
        // A task of its own: with a caller that goes away the file is written to its end, and nobody
        // takes another backup meanwhile.
        let api = self.clone();
        let (asked, _waits) = oneshot::channel();
        let made =
            tokio::spawn(
                async move { api.back_up_to(&caller, path, r.new_recovery_key, &asked).await },
            );
        let made = made.await.map_err(|e| Error::internal("cannot write the backup", e))?;
        Ok(Response::new(made?))
    }

    type StreamBackupStream = ReceiverStream<Result<StreamBackupResponse, Status>>;

    async fn stream_backup(
        &self,
        request: Request<StreamBackupRequest>,
    ) -> Result<Response<Self::StreamBackupStream>, Status> {
        use stream_backup_response::Item;
        let caller = auth::of(&request);
        let Taken { contents, recovery, running } =
            self.take_backup(request.into_inner().new_recovery_key).await?;
        self.note_backup(&caller, "SystemService/StreamBackup").await?;
        let head = BackupHead {
            revision: contents.header.revision,
            recovery_recipient: recovery.recipient.to_string(),
            // Before it counts: a link that breaks takes no key with it that is used from then on.
            recovery_key: recovery.shown.clone().unwrap_or_default(),
        };
        let (tx, rx) = mpsc::channel(PIECES);
        let api = self.clone();
        tokio::spawn(async move {
            let _running = running;
            let mut out = Pieces { tx: tx.clone(), held: Vec::new(), handle: Handle::current() };
            let recipient = recovery.recipient.clone();
            let written = tokio::task::spawn_blocking(move || {
                out.send(Item::Head(head))?;
                let size = backup::write(&contents, &recipient, &mut out)?;
                out.flush()?;
                Ok::<u64, std::io::Error>(size)
            });
            let size_bytes = match written.await {
                Ok(Ok(size)) => size,
                // Whoever does not read any more needs no answer.
                Ok(Err(error)) => {
                    tracing::warn!(%error, "a backup was not taken by its caller");
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "a backup ended");
                    return;
                }
            };
            // What waits in the queue was taken by nobody: a link that breaks would lose it.
            let taken = tokio::time::timeout(STALL, tx.reserve_many(PIECES)).await;
            if !matches!(taken, Ok(Ok(_))) {
                tracing::warn!("a backup's last pieces were not taken by its caller");
                return;
            }
            drop(taken);
            let kept = api.keep_key(&caller, &recovery).await;
            let last = kept.map_err(Status::from).map(|()| StreamBackupResponse {
                item: Some(Item::Tail(BackupTail { size_bytes })),
            });
            let _ = tokio::time::timeout(STALL, tx.send(last)).await;
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if !r.dry_run {
            let entry = audit(&caller, "SystemService/CollectGarbage", "", Vec::new());
            let proposal = Proposal { preconditions: Vec::new(), changes: vec![entry] };
            let kept = self.0.ledger.propose(proposal).await;
            kept.map_err(|why| refused(why, Kind::Image, ""))?;
        }
        let view = self.0.ledger.view();
        let mut roots = Vec::new();
        let digests =
            view.versions().filter_map(|v| v.record.version.as_ref()?.digest.parse().ok());
        roots.extend(digests);
        for deployment in view.deployments() {
            for release in view.releases_of(&deployment.uid) {
                roots.push(release.source.image.digest.clone());
                roots.extend(release.source.artifact.as_ref().map(|a| a.digest.clone()));
            }
        }
        let done = self.0.registry.collect(roots, r.dry_run).await.map_err(not_collected)?;
        if !done.missing_roots.is_empty() {
            let missing: Vec<&str> = done.missing_roots.iter().map(|d| d.as_str()).collect();
            tracing::warn!(?missing, "versions or releases name what is not in the registry");
        }
        Ok(Response::new(CollectGarbageResponse {
            digests: done.blobs.iter().map(|(digest, _)| digest.to_string()).collect(),
            count: done.blobs_total,
            size_bytes: done.bytes,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{call, served};
    use super::*;
    use berth_proto::api::event_service_server::EventService as _;
    use tokio_stream::StreamExt as _;
    use tonic::Code;

    async fn audited(api: &Api) -> Vec<String> {
        let log = api.list_audit(call(ListAuditRequest::default())).await.unwrap().into_inner();
        log.entries.into_iter().map(|entry| entry.method).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_backup_is_written_down_before_its_first_byte_and_its_new_key_counts_at_the_end() {
        let (dir, api) = served();
        let asked = StreamBackupRequest::default();
        let mut stream = api.stream_backup(call(asked)).await.unwrap().into_inner();
        assert_eq!(audited(&api).await, ["SystemService/StreamBackup"]);
        let kept = || api.0.ledger.view().cluster.recovery_recipient.clone();
        assert_eq!(kept(), "", "nothing was taken yet");
        let mut recipient = String::new();
        while let Some(piece) = stream.next().await {
            if let Some(stream_backup_response::Item::Head(head)) = piece.unwrap().item {
                recipient = head.recovery_recipient;
            }
        }
        assert_eq!(kept(), recipient);
        // The same of one that cannot be written to its end.
        let path = dir.path().join("not-there/b.age").display().to_string();
        let asked = BackupRequest { path, ..Default::default() };
        assert!(api.backup(call(asked)).await.is_err());
        assert_eq!(audited(&api).await.len(), 2);
    }

    #[tokio::test]
    async fn a_backups_new_key_that_nobody_was_shown_does_not_count() {
        let (dir, api) = served();
        let path = dir.path().join("b.age");
        let ask = || {
            let path = path.display().to_string();
            api.backup(call(BackupRequest { path, ..BackupRequest::default() }))
        };
        // Begun, and nobody waits for it any more.
        assert!(tokio::time::timeout(Duration::ZERO, ask()).await.is_err());
        tokio::task::yield_now().await;
        drop(Arc::clone(&api.0.backing_up).lock_owned().await);
        assert_eq!(audited(&api).await, ["SystemService/Backup"]);
        assert_eq!(api.0.ledger.view().cluster.recovery_recipient, "");
        assert!(!path.exists());
        let made = ask().await.unwrap().into_inner();
        assert!(!made.recovery_key.is_empty() && path.exists());
        assert_eq!(api.0.ledger.view().cluster.recovery_recipient, made.recovery_recipient);
    }

    #[test]
    fn a_second_collection_at_once_is_told_to_ask_again() {
        let busy = not_collected(RegistryError::TooMany("a collection is under way"));
        assert_eq!(
            (busy.code(), busy.reason().as_str()),
            (Code::Unavailable, "COLLECTION_RUNNING")
        );
        let broken = not_collected(RegistryError::BodyBroken);
        assert_eq!(broken.code(), Code::Internal);
    }
}
