//! Blobs: content that was verified, readable in the repositories it is linked in.

use super::disk::{BLOBS, digests_in, names_in};
use super::errors::{RegistryError, io};
use super::names::RepoName;
use super::uploads::Placement;
use super::{Inner, Registry, add};
use berth_proto::ids::Digest;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::io::ReaderStream;

/// What is read at once for one of few receivers.
const READ_BYTES: u64 = 512 << 10;
/// What is read at once when there are many: each holds about two of them in memory.
const READ_BYTES_MANY: u64 = 64 << 10;
/// From here on there are many receivers; 32 times 1 MiB is what few may hold.
const MANY: usize = 32;
/// Blobs sent at once; more wait. Each holds an open file and some 200 KiB.
pub(super) const SENDING_MAX: usize = 512;

/// All blobs of a registry that nobody has open, with their sizes, in order of digest; none where
/// there is no registry.
///
/// # Errors
/// When the folder cannot be read.
pub fn blobs_of(registry: &Path) -> std::io::Result<Vec<(Digest, u64)>> {
    blobs_below(&registry.join(BLOBS))
}

fn blobs_below(blobs: &Path) -> std::io::Result<Vec<(Digest, u64)>> {
    let mut all = Vec::new();
    for folder in names_in(blobs)? {
        let folder = blobs.join(folder);
        for digest in digests_in(&folder)? {
            match std::fs::metadata(folder.join(digest.hex())) {
                Ok(found) => all.push((digest, found.len())),
                // Collected meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    all.sort();
    Ok(all)
}

impl Registry {
    /// Where a blob's file is, for a server that reads it itself. It may not exist, and may be
    /// collected unless a root or a lease keeps it.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.0.disk.blob(digest)
    }

    /// All blobs that are stored, with their sizes, in order of digest.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn all_blobs(&self) -> Result<Vec<(Digest, u64)>, RegistryError> {
        self.blocking("listing the blobs", |inner| blobs_below(&inner.disk.blobs())).await
    }

    /// A blob's size in a repository; with `renew` its lease is renewed.
    ///
    /// # Errors
    /// [`RegistryError::BlobUnknown`], [`RegistryError::Io`].
    pub async fn blob_size(
        &self,
        repo: &RepoName,
        digest: &Digest,
        renew: bool,
    ) -> Result<u64, RegistryError> {
        let gate = self.shared().await;
        let (repo, digest) = (repo.clone(), digest.clone());
        self.blocking_with("looking for a blob", move |inner| {
            let _gate = gate;
            let size = inner.linked_blob(&repo, &digest)?;
            if renew {
                inner.renew(&digest).map_err(io("renewing a lease"))?;
            }
            Ok(size)
        })
        .await
    }

    /// A blob of a repository, open for reading, and its size.
    ///
    /// # Errors
    /// [`RegistryError::BlobUnknown`], [`RegistryError::Io`].
    pub async fn open_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<(File, u64), RegistryError> {
        let (repo, digest) = (repo.clone(), digest.clone());
        self.blocking_with("opening a blob", move |inner| {
            let size = inner.linked_blob(&repo, &digest)?;
            let file = File::open(inner.disk.blob(&digest)).map_err(io("opening a blob"))?;
            Ok((file, size))
        })
        .await
    }

    /// Links a blob of `from` in `to` as well; false when `from` does not have it.
    ///
    /// Whether the caller may read `from` is for the caller of this to ask.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn mount_blob(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let gate = self.shared().await;
        let (from, to, digest) = (from.clone(), to.clone(), digest.clone());
        let mounted = self
            .blocking("mounting a blob", move |inner| {
                let _gate = gate;
                if !inner.disk.blob_link(&from, &digest).exists() || !inner.renew(&digest)? {
                    return Ok(false);
                }
                inner.link_blob(&to, &digest)?;
                Ok(true)
            })
            .await?;
        add(&self.0.stats.blobs_mounted, u64::from(mounted));
        Ok(mounted)
    }

    /// Takes a blob out of a repository; its bytes go with the next collection.
    ///
    /// # Errors
    /// [`RegistryError::BlobUnknown`]; [`RegistryError::Unsupported`] while a manifest of that
    /// repository names it.
    pub async fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<(), RegistryError> {
        let gate = self.alone().await;
        let (repo, digest) = (repo.clone(), digest.clone());
        self.blocking_with("deleting a blob", move |inner| {
            let _gate = gate;
            inner.linked_blob(&repo, &digest)?;
            if let Some(by) = inner.named_by(&repo, &digest)? {
                return Err(RegistryError::Unsupported(format!(
                    "blob {digest} is part of manifest {by}; delete that first"
                )));
            }
            inner
                .disk
                .remove(&inner.disk.blob_link(&repo, &digest))
                .map(drop)
                .map_err(io("deleting a blob"))
        })
        .await
    }

    /// Stores what `reader` yields as a blob of `repo`; its digest and size. With `expected`, only
    /// that content is stored.
    ///
    /// # Errors
    /// [`RegistryError::DigestMismatch`], [`RegistryError::BodyBroken`] when the reader fails,
    /// [`RegistryError::DiskFull`], [`RegistryError::Io`].
    pub async fn put_blob_from_reader(
        &self,
        repo: &RepoName,
        reader: impl AsyncRead + Unpin,
        expected: Option<&Digest>,
    ) -> Result<(Digest, u64), RegistryError> {
        let body = ReaderStream::with_capacity(reader, 128 << 10);
        self.take_whole(repo, None, Placement::default(), body, expected).await
    }

    /// A place among the blobs that are sent at once, in turn.
    ///
    /// # Errors
    /// [`RegistryError::TooMany`] when none is free for long.
    pub(super) async fn place_to_send(&self) -> Result<OwnedSemaphorePermit, RegistryError> {
        let many = RegistryError::TooMany("too many blobs are being sent, try again");
        let place = Arc::clone(&self.0.sending).acquire_owned();
        // Never closed.
        tokio::time::timeout(super::JOB_WAIT, place).await.ok().and_then(Result::ok).ok_or(many)
    }

    /// `length` bytes of `file` from `start` on. Whoever passes them on holds one read ahead.
    pub(super) fn read_stream(
        &self,
        file: File,
        start: u64,
        length: u64,
        place: OwnedSemaphorePermit,
    ) -> impl Stream<Item = Result<Bytes, RegistryError>> + Send + 'static {
        // This one's own place among them.
        let sent = SENDING_MAX - self.0.sending.available_permits().min(SENDING_MAX);
        let step = if sent <= MANY { READ_BYTES } else { READ_BYTES_MANY };
        let file = Arc::new(file);
        let registry = self.clone();
        let starts = (0..length.div_ceil(step)).map(move |n| n * step);
        futures_util::stream::iter(starts)
            .map(move |at| {
                let (registry, file) = (registry.clone(), Arc::clone(&file));
                // The place is held until the last read is done.
                let _ = &place;
                let size = usize::try_from(step.min(length - at)).unwrap_or(0);
                async move {
                    let bytes = registry
                        .blocking("reading a blob", move |_| {
                            let mut buffer = BytesMut::zeroed(size);
                            file.read_exact_at(&mut buffer, start + at)?;
                            Ok(buffer.freeze())
                        })
                        .await?;
                    add(&registry.0.stats.bytes_out, bytes.len() as u64);
                    Ok(bytes)
                }
            })
            .buffered(1)
    }
}

impl Inner {
    /// The size of a blob that is linked in `repo` and stored.
    pub(super) fn linked_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<u64, RegistryError> {
        let unknown = || RegistryError::BlobUnknown(digest.clone());
        if !self.disk.blob_link(repo, digest).exists() {
            return Err(unknown());
        }
        self.disk.size(digest).map_err(io("looking for a blob"))?.ok_or_else(unknown)
    }

    /// Makes a stored blob readable in `repo`.
    pub(super) fn link_blob(&self, repo: &RepoName, digest: &Digest) -> std::io::Result<()> {
        let link = self.disk.blob_link(repo, digest);
        if link.exists() { Ok(()) } else { self.disk.write(&link, b"") }
    }
}
