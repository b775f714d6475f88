//! Where the ledger's batches are kept.
//!
//! A store knows keys and bytes, nothing of deployments. It has one writer. What [`Store::commit`]
//! has returned from survives `kill -9` and a power cut.
//!
//! The trait is blocking: the ledger gives its store a thread of its own, because sled's calls must
//! not run on the runtime's workers and a journal's `fdatasync` blocks anyway.

pub mod conformance;
pub mod embedded;
mod export;
pub mod folder;
mod follower;
pub mod journal;
pub mod memory;
mod sled;

use berth_proto::ids::Revision;
use berth_server_core::batching::{Batch, Limits};
use std::path::PathBuf;

pub use berth_server_core::memory::Entry;

/// Why a store cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing was written; there may be room later.
    #[error("the disk is full; free some space, nothing is lost")]
    Full,
    /// A batch does not follow the last one: another writer, or a mistake of ours.
    #[error("batch {offered} does not follow {held}")]
    OutOfOrder {
        /// The newest held.
        held: Revision,
        /// The batch's.
        offered: Revision,
    },
    /// A file cannot be used.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The folder was made by a newer server.
    #[error(
        "{} has format {found}, this server knows formats up to {known}; use the newer server, or \
         restore a backup that this one made", path.display()
    )]
    NewerFormat {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// Another server uses the folder.
    #[error("{} is in use by another server", .0.display())]
    InUse(PathBuf),
    /// The folder holds something else.
    #[error("{} is not empty and was not made by a Berth server; choose another folder", .0.display())]
    Foreign(PathBuf),
    /// The folder holds something already.
    #[error("{} is not empty; choose another folder, or move aside what is there", .0.display())]
    NotEmpty(PathBuf),
    /// The materialised store failed; the journal is whole.
    #[error("the materialised store failed: {0}")]
    Materialised(String),
    /// Neither the materialised store nor an export can be read.
    #[error(
        "no good copy of the ledger is left in {}: {why}; restore a backup into an empty folder \
         (berthd restore FILE --data-dir DIR)", path.display()
    )]
    Lost {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        why: String,
    },
}

/// What had to be done to open a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// The materialised store was made anew from an export and the journal.
    pub rebuilt: Option<String>,
    /// Acknowledged revisions from here on may be missing: the epoch must be raised.
    pub fell_back: Option<Revision>,
}

/// Where batches are kept.
pub trait Store: Send {
    /// The newest revision held.
    fn revision(&self) -> Revision;

    /// How much one batch may hold; never less than [`Limits::ANY`].
    fn limits(&self) -> Limits;

    /// Makes batches durable, all or (when the disk is full) none. Revisions must follow each other.
    ///
    /// # Errors
    /// [`StoreError::Full`] when nothing was written and writing may go on later; any other error
    /// means that the process must stop.
    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError>;

    /// All entries whose keys begin so, in order of keys.
    ///
    /// # Errors
    /// When they cannot be read.
    fn load(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError>;

    /// The last `limit` entries whose keys begin so and are less than `below`, from the last to the
    /// first.
    ///
    /// # Errors
    /// When they cannot be read.
    fn newest(
        &self,
        prefix: &[u8],
        below: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Of the keys that begin so all but the last `keep`, the first of them, at most `limit`.
    ///
    /// # Errors
    /// When they cannot be read.
    fn beyond(&self, prefix: &[u8], keep: usize, limit: usize) -> Result<Vec<Vec<u8>>, StoreError>;

    /// Puts what is only in the journal into the materialised store and writes an export; called now
    /// and then, and before a clean end.
    ///
    /// # Errors
    /// When it cannot be written; the journal is then kept.
    fn checkpoint(&mut self) -> Result<(), StoreError>;
}
