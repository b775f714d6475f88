//! The registry door: an OCI distribution v1.1 registry over one folder, for `docker`, `podman`,
//! `skopeo`, our own client and agents.
//!
//! It knows repositories, tags, manifests and blobs; what a model or a version is the rest of the
//! server knows and says through [`access::Access`] and [`access::Protected`]. It never holds a blob in memory,
//! never shows content whose digest it did not verify, and never reads outside of its folder.
//!
//! What always holds:
//! - A blob or manifest can be read in a repository only when it was pushed or mounted there.
//! - A manifest that can be read has everything it names: it is linked last and unlinked first.
//! - What was pushed, asked for by HEAD or mounted within the lease (24 h) is not collected; the
//!   check and the renewal of a lease exclude the deletion of what they looked at (`gate`).
//! - After a crash at any point the folder is consistent; what was acknowledged is there.

pub mod access;
pub mod blobs;
mod disk;
pub mod errors;
pub mod gc;
mod handlers;
mod listing;
pub mod manifests;
pub mod names;
pub mod router;
pub mod uploads;

#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod door_tests;
#[cfg(test)]
mod gc_tests;

pub use access::{
    Access, AccessError, Action, Credentials, Noted, Noting, PeerCertificates, Principal,
    Protected, Reach,
};
pub use errors::{RegistryError, ended};
pub use names::{Reference, RepoName, Tag};
pub use router::router;

use berth_proto::ids::Digest;
use disk::Disk;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, Semaphore};
use uuid::Uuid;

/// Waiting for a place among the disk jobs longer than this means that the disk is stuck.
const JOB_WAIT: Duration = Duration::from_secs(30);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Uploads stop below this share of free disk, in percent.
    pub min_free_percent: u8,
    /// An upload that got no byte for this long ends.
    pub abandoned_after: Duration,
    /// What was pushed, asked for by HEAD or mounted is kept at least this long.
    pub lease: Duration,
    /// A client that sends nothing for this long in the middle of a body is given up.
    pub stall: Duration,
    /// Uploads under way at once; each costs a folder and some hundred bytes of memory.
    pub uploads_max: usize,
    /// The same of one user: nobody can take all of them. A client has about five.
    pub uploads_of_one: usize,
    /// Disk operations at once: more do not make a disk faster, and each may hold a thread.
    pub disk_jobs_max: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_free_percent: 10,
            abandoned_after: Duration::from_secs(24 * 3600),
            lease: Duration::from_secs(24 * 3600),
            stall: Duration::from_secs(60),
            uploads_max: 1000,
            uploads_of_one: 200,
            disk_jobs_max: 32,
        }
    }
}

/// Counters since the start, for metrics.
#[derive(Debug, Default)]
pub struct RegistryStats {
    /// Uploads begun.
    pub uploads_begun: AtomicU64,
    /// Uploads that became a blob.
    pub uploads_finished: AtomicU64,
    /// Uploads cancelled, given up, or whose content was not what the digest said.
    pub uploads_ended: AtomicU64,
    /// Uploads and manifests refused because the disk is near full.
    pub uploads_refused: AtomicU64,
    /// Blob bytes received.
    pub bytes_in: AtomicU64,
    /// Blob bytes sent.
    pub bytes_out: AtomicU64,
    /// Blobs mounted from another repository.
    pub blobs_mounted: AtomicU64,
    /// Manifests put.
    pub manifests_put: AtomicU64,
    /// Manifests read.
    pub manifests_read: AtomicU64,
    /// Requests without valid credentials.
    pub unauthorized: AtomicU64,
    /// Collections that ended well (dry runs not counted).
    pub collections: AtomicU64,
    /// Bytes given back by collections.
    pub collected_bytes: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// What is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blobs, manifests among them.
    pub blobs: u64,
    /// Their bytes.
    pub blob_bytes: u64,
    /// Uploads under way.
    pub uploads: u64,
    /// Their bytes so far.
    pub upload_bytes: u64,
    /// Bytes that may still be written to the file system.
    pub free_bytes: u64,
    /// The same in percent.
    pub free_percent: u8,
}

/// The registry. Cheap to clone; all clones are one registry.
///
/// One process per folder: the server's lock on its data folder sees to that.
#[derive(Debug, Clone)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    disk: Disk,
    settings: Settings,
    stats: RegistryStats,
    /// Shared: whoever checks that something is there, renews its lease or links it. Alone: whoever
    /// deletes. Never held while a client is waited for.
    gate: Arc<RwLock<()>>,
    /// All uploads under way, also those of before the start; the map is the truth about which are.
    uploads: parking_lot::Mutex<HashMap<Uuid, uploads::UnderWay>>,
    /// Places for disk jobs.
    jobs: Arc<Semaphore>,
    /// Memory for bytes received and not yet written, in KiB, over all uploads.
    budget: Arc<Semaphore>,
    /// Held by the collection under way.
    collecting: tokio::sync::Mutex<()>,
    /// Places for blobs being sent.
    sending: Arc<Semaphore>,
}

/// 24 MiB for bytes between network and disk: enough to keep a disk busy, and the rest of the
/// server is promised 100 MiB in all.
const BUDGET_KIB: usize = 24 * 1024;

impl Registry {
    /// Opens the registry in `root`, making it when the folder is empty. Blocks.
    ///
    /// # Errors
    /// When the folder cannot be written, is another program's, or of a newer format.
    pub fn open(root: impl Into<PathBuf>, settings: Settings) -> io::Result<Self> {
        let disk = Disk::open(root.into())?;
        let mut uploads = HashMap::new();
        for name in disk::names_in(&disk.uploads())? {
            if let Ok(id) = Uuid::try_parse(&name) {
                uploads.insert(id, uploads::UnderWay::default());
            }
        }
        Ok(Self(Arc::new(Inner {
            jobs: Arc::new(Semaphore::new(settings.disk_jobs_max.max(1))),
            budget: Arc::new(Semaphore::new(BUDGET_KIB)),
            gate: Arc::new(RwLock::new(())),
            uploads: parking_lot::Mutex::new(uploads),
            stats: RegistryStats::default(),
            collecting: tokio::sync::Mutex::default(),
            sending: Arc::new(Semaphore::new(blobs::SENDING_MAX)),
            disk,
            settings,
        })))
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &RegistryStats {
        &self.0.stats
    }

    /// Settings it was opened with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// What is stored; walks the folder, so once a minute is often enough.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn usage(&self) -> Result<Usage, RegistryError> {
        self.blocking("measuring the registry", |inner| {
            let mut usage = Usage::default();
            let files = |folder: &std::path::Path| -> io::Result<(u64, u64)> {
                let (mut files, mut bytes) = (0, 0);
                for name in disk::names_in(folder)? {
                    // What is deleted meanwhile does not count.
                    if let Ok(found) = std::fs::metadata(folder.join(name)) {
                        files += 1;
                        bytes += found.len();
                    }
                }
                Ok((files, bytes))
            };
            for folder in disk::names_in(&inner.disk.blobs())? {
                let (blobs, bytes) = files(&inner.disk.blobs().join(folder))?;
                usage.blobs += blobs;
                usage.blob_bytes += bytes;
            }
            for upload in disk::names_in(&inner.disk.uploads())? {
                usage.uploads += 1;
                usage.upload_bytes += files(&inner.disk.uploads().join(upload))?.1;
            }
            let space = inner.disk.space()?;
            usage.free_percent = space.free_percent();
            usage.free_bytes = space.free_bytes;
            Ok(usage)
        })
        .await
    }

    /// Runs `job` where it may block, in its turn.
    async fn blocking<T: Send + 'static>(
        &self,
        doing: &'static str,
        job: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> Result<T, RegistryError> {
        self.blocking_with(doing, move |inner| job(inner).map_err(errors::io(doing))).await
    }

    /// The same for a job with errors of its own.
    async fn blocking_with<T: Send + 'static>(
        &self,
        doing: &'static str,
        job: impl FnOnce(&Inner) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let permit = tokio::time::timeout(JOB_WAIT, Arc::clone(&self.0.jobs).acquire_owned())
            .await
            .map_err(|_| RegistryError::Unavailable("the registry's disk is too busy"))?
            .map_err(|closed| errors::io(doing)(io::Error::other(closed)))?;
        let inner = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            job(&inner)
        })
        .await
        .map_err(|ended| errors::io(doing)(io::Error::other(ended)))?
    }

    /// The gate, shared. Taken before a job's permit, never after.
    async fn shared(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.0.gate).read_owned().await
    }

    /// The gate, alone.
    async fn alone(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.0.gate).write_owned().await
    }
}

impl Inner {
    /// Refuses when less disk is free than the rule keeps, or would be after `coming` more bytes.
    fn check_room(&self, coming: u64) -> Result<(), RegistryError> {
        let floor = self.settings.min_free_percent;
        let space = self.disk.space().map_err(errors::io("asking how much disk is free"))?;
        let after = disk::Space { free_bytes: space.free_bytes.saturating_sub(coming), ..space };
        if after.free_percent() < floor {
            add(&self.stats.uploads_refused, 1);
            return Err(RegistryError::DiskFull { min_free_percent: floor });
        }
        Ok(())
    }

    /// Renews the lease of a blob unless that was just done; whether it is stored.
    ///
    /// Five minutes of slack keep a client that asks again and again from writing each time.
    fn renew(&self, digest: &Digest) -> io::Result<bool> {
        const SLACK: Duration = Duration::from_secs(300);
        let found = match std::fs::metadata(self.disk.blob(digest)) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if !found.modified()?.elapsed().is_ok_and(|age| age < SLACK) {
            self.disk.touch(digest, SystemTime::now())?;
        }
        Ok(true)
    }
}
