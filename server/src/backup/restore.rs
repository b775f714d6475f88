//! The way back: a fresh data folder from a backup.
//!
//! All of the backup is read, checked and understood before the folder is touched, and the folder
//! becomes a server's by its last write: a restore that ends half-way leaves nothing that starts.

use super::file::{self, Contents};
use super::{BackupError, failed, total};
use crate::identity::ca::Ca;
use crate::identity::roots::Roots;
use crate::store::Store as _;
use crate::store::embedded::Embedded;
use crate::store::folder::Folder;
use berth_proto::ids::{Revision, Wall};
use berth_server_core::restore::{Turned, turned_back};
use berth_server_core::view::View;
use std::fs::File;
use std::path::Path;

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The cluster.
    pub cluster: String,
    /// When the backup was made.
    pub made: Wall,
    /// Version of the server that made it.
    pub version: String,
    /// The epoch from now on.
    pub epoch: u64,
    /// The revision the backup held.
    pub revision: Revision,
    /// Entries of the ledger.
    pub entries: usize,
    /// Join tokens that are void now.
    pub void_tokens: usize,
    /// Blobs that the registry had, and their bytes; they are not in the backup.
    pub blobs: (usize, u64),
}

/// Puts a backup into a fresh folder.
///
/// # Errors
/// When the backup cannot be read whole, is a newer server's, or the folder is not empty or cannot be
/// written. Before the folder is begun nothing is touched.
pub fn restore(path: &Path, key: &str, data: &Path, now: Wall) -> Result<Restored, BackupError> {
    let opened = File::open(path).map_err(failed("open", path))?;
    let Contents { header, entries, blobs } = file::read(opened, key)?;
    let mut view =
        View::load(entries.iter().map(|e| (e.key.clone(), e.revision, e.value.clone())))?;
    view.revision = Revision(header.revision);
    let ca = Ca::from_pem(header.ca_certificate, header.ca_key)?;
    let next = match header.next_ca_certificate.is_empty() {
        true => None,
        false => Some(Ca::from_pem(header.next_ca_certificate, header.next_ca_key)?),
    };
    let same = view.cluster.uid == header.cluster && ca.cluster().as_str() == header.cluster;
    if !same {
        return Err(BackupError::Damaged("its ledger and its CA are of two clusters"));
    }
    let Turned { batches, epoch, void_tokens } =
        turned_back(&view, Wall(header.create_unix_ms), now);
    let held = entries.len();

    let folder = Folder::fresh(data)?;
    let mut store =
        Embedded::create(&folder.path().join("ledger"), Revision(header.revision), entries)?;
    store.commit(&batches)?;
    store.checkpoint()?;
    drop(store);
    Roots::save(folder.path(), ca, next)?;
    folder.finish()?;
    Ok(Restored {
        cluster: header.cluster,
        made: Wall(header.create_unix_ms),
        version: header.version,
        epoch,
        revision: Revision(header.revision),
        entries: held,
        void_tokens,
        blobs: (blobs.len(), total(&blobs)),
    })
}
