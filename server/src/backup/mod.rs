//! Backups: the ledger and the CA's key in one encrypted file, and the way back.
//!
//! A backup holds everything a server needs to be the same cluster again but the registry's blobs,
//! which it names. It is encrypted to the cluster's recovery key: the public half is kept in the
//! ledger, the private half is shown once, when it is made, and is nowhere afterwards. `file` is the
//! format, `restore` the way back; what is here makes them, offline and while the server runs.
//!
//! A restore never stops anything that runs: it raises the epoch, and the server then only observes a
//! host until all it runs is known or decided about.

mod file;
mod restore;

pub use file::{Contents, read, write};
pub use restore::{Restored, restore};

use crate::cluster::wall_now;
use crate::identity::ca::{Ca, CaError};
use crate::identity::roots::Roots;
use crate::registry;
use crate::store::embedded::Embedded;
use crate::store::folder::{FORMAT, Folder};
use crate::store::{Store, StoreError};
use age::secrecy::ExposeSecret as _;
use age::x25519::{Identity, Recipient};
use berth_proto::ids::{Digest, Revision};
use berth_proto::record::{AuditRecord, BackupHeader, ClusterRecord};
use berth_server_core::batching::Batch;
use berth_server_core::change::Change;
use berth_server_core::view::{LoadError, View};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Why there is no backup, or no way back from it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is nothing to back up.
    #[error("{} holds no server's data; --data-dir names the folder", .0.display())]
    NoServer(PathBuf),
    /// The server runs.
    #[error("a server runs on {}; `berth backup` takes a backup of a running one", .0.display())]
    Running(PathBuf),
    /// Writes were lost, and the server has not yet taken note of it.
    #[error(
        "the ledger in {} was damaged and has lost writes; start berthd on it once, so that hosts \
         are asked what they run, then back it up", .0.display()
    )]
    FellBack(PathBuf),
    /// The data folder cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The CA cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A file cannot be used.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nothing is ever overwritten.
    #[error("{} exists already; a backup overwrites nothing", .0.display())]
    Exists(PathBuf),
    /// The recovery key is none.
    #[error("this is no recovery key: one begins with AGE-SECRET-KEY-1")]
    BadKey,
    /// It is the key of other backups.
    #[error(
        "this recovery key does not open the backup; it needs the one that was shown when the key \
         was made"
    )]
    WrongKey,
    /// The file is something else.
    #[error("the file is no backup of a Berth server")]
    NotABackup,
    /// The file is not what was written.
    #[error("the backup is damaged or cut off ({0}); nothing was touched")]
    Damaged(&'static str),
    /// A newer server made it.
    #[error(
        "the backup has format {found}, this server knows formats up to {known}; restore it with the \
         server that made it, version {version}"
    )]
    NewerFormat {
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
        /// The server's that made it.
        version: String,
    },
    /// What it holds is no ledger of this server.
    #[error("the backup's ledger cannot be read; nothing was touched")]
    Ledger(#[from] LoadError),
    /// The stored recovery key is none.
    #[error("the ledger's recovery key cannot be read; --new-recovery-key makes a new one")]
    Recipient,
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::File { doing, path, source }
}

/// The recovery key that a backup is encrypted to.
pub struct Recovery {
    /// Its public half.
    pub recipient: Recipient,
    /// Its private half, when it was made just now.
    pub shown: Option<String>,
}

impl Recovery {
    /// The ledger's, or a new one where it has none or a new one is asked for.
    ///
    /// # Errors
    /// When what the ledger has is none.
    pub fn of(cluster: &ClusterRecord, new: bool) -> Result<Self, BackupError> {
        if !new && !cluster.recovery_recipient.is_empty() {
            let recipient =
                cluster.recovery_recipient.parse().map_err(|_| BackupError::Recipient)?;
            return Ok(Self { recipient, shown: None });
        }
        let identity = Identity::generate();
        let shown = Some(identity.to_string().expose_secret().to_owned());
        Ok(Self { recipient: identity.to_public(), shown })
    }

    /// The cluster's record with it, when it is new.
    #[must_use]
    pub fn recorded(&self, cluster: &ClusterRecord) -> Option<Change> {
        self.shown.as_ref().map(|_| {
            let recovery_recipient = self.recipient.to_string();
            Change::PutCluster(ClusterRecord { recovery_recipient, ..cluster.clone() })
        })
    }
}

/// What a backup's header says of a server.
#[must_use]
pub fn header(roots: &Roots, revision: Revision, epoch: u64) -> BackupHeader {
    let (ca, next) = roots.both();
    let of_next = |text: fn(&Ca) -> &str| next.as_deref().map(text).unwrap_or_default().to_owned();
    BackupHeader {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: roots.cluster().to_string(),
        revision: revision.0,
        epoch,
        create_unix_ms: wall_now().0,
        ca_certificate: ca.root_pem().to_owned(),
        ca_key: ca.key_pem().to_owned(),
        next_ca_certificate: of_next(Ca::root_pem),
        next_ca_key: of_next(Ca::key_pem),
    }
}

/// A file that becomes visible under its name when it is whole, readable by its owner alone.
pub struct PrivateFile {
    file: Option<File>,
    partial: PathBuf,
    path: PathBuf,
}

impl PrivateFile {
    /// Begins one; a file of that name must not be there.
    ///
    /// # Errors
    /// [`BackupError::Exists`], [`BackupError::File`].
    pub fn create(path: &Path) -> Result<Self, BackupError> {
        if path.exists() {
            return Err(BackupError::Exists(path.to_owned()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(failed("make", &partial))?;
        Ok(Self { file: Some(file), partial, path: path.to_owned() })
    }

    /// Makes it durable and gives it its name.
    ///
    /// # Errors
    /// As [`PrivateFile::create`].
    pub fn finish(mut self) -> Result<(), BackupError> {
        if let Some(file) = self.file.take() {
            file.sync_all().map_err(failed("write", &self.partial))?;
        }
        // Not by rename, which would overwrite what came meanwhile.
        let linked = std::fs::hard_link(&self.partial, &self.path);
        match linked {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(BackupError::Exists(self.path.clone()));
            }
            // A file system without links.
            Err(_) => {
                std::fs::rename(&self.partial, &self.path).map_err(failed("make", &self.path))?;
            }
        }
        let folder = match self.path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            Some(_) | None => Path::new("."),
        };
        File::open(folder).and_then(|f| f.sync_all()).map_err(failed("sync the folder", folder))
    }
}

impl std::io::Write for PrivateFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().map_or(Ok(()), |file| file.flush())
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// What was backed up.
pub struct Made {
    /// Bytes of the file.
    pub size_bytes: u64,
    /// The revision it holds.
    pub revision: Revision,
    /// What it is encrypted to.
    pub recovery: Recovery,
    /// Blobs it names.
    pub blobs: usize,
}

/// Backs up a server that does not run.
///
/// # Errors
/// When it runs, when its data cannot be read, or the file cannot be written.
pub fn make(data: &Path, path: &Path, new_key: bool) -> Result<Made, BackupError> {
    if !Folder::is_one(data) {
        return Err(BackupError::NoServer(data.to_owned()));
    }
    let mut out = PrivateFile::create(path)?;
    let folder = Folder::open(data).map_err(|error| {
        if let StoreError::InUse(path) = error {
            BackupError::Running(path)
        } else {
            BackupError::Store(error)
        }
    })?;
    let roots = Roots::open(folder.path())?;
    let (mut store, opened) = Embedded::open(&folder.path().join("ledger"))?;
    if opened.fell_back.is_some() {
        return Err(BackupError::FellBack(data.to_owned()));
    }
    let load = |store: &Embedded| -> Result<View, BackupError> {
        let entries = store.load(b"")?.into_iter().map(|e| (e.key, e.revision, e.value));
        Ok(View::load(entries)?)
    };
    let view = load(&store)?;
    roots.current().belongs_to(&view.cluster.uid)?;
    let recovery = Recovery::of(&view.cluster, new_key)?;
    let revision = store.revision();
    let blobs = registry::blobs::blobs_of(&folder.path().join("registry"))
        .map_err(failed("list the blobs of", folder.path()))?;
    let header = header(&roots, revision, view.cluster.epoch);
    let contents = Contents::new(header, store.load(b"")?, blobs, &recovery);
    let size_bytes =
        write(&contents, &recovery.recipient, &mut out).map_err(failed("write", path))?;
    out.finish()?;
    // A new key counts once there is a backup that it opens.
    let noted = note(&view.cluster, &recovery, "berthd backup", revision.next());
    if let Err(error) = store.commit(&[noted]).and_then(|()| store.checkpoint()) {
        let _ = std::fs::remove_file(path);
        return Err(error.into());
    }
    Ok(Made { size_bytes, revision, recovery, blobs: contents.blobs.len() })
}

/// Who took a backup, for the audit log, and the key it was encrypted to.
fn note(cluster: &ClusterRecord, recovery: &Recovery, actor: &str, revision: Revision) -> Batch {
    let audit = Change::AppendAudit(AuditRecord {
        revision: revision.0,
        time: Some(berth_proto::convert::timestamp(wall_now())),
        actor: actor.to_owned(),
        objects: vec!["backup".to_owned()],
        ..AuditRecord::default()
    });
    let changes = recovery.recorded(cluster).into_iter().chain([audit]);
    Batch { revision, ops: changes.map(|change| change.encode()).collect() }
}

/// The blobs of a backup, summed up.
#[must_use]
pub fn total(blobs: &[(Digest, u64)]) -> u64 {
    blobs.iter().map(|(_, size)| size).sum()
}

#[cfg(test)]
mod tests;
