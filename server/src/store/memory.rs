//! A store in memory, for tests and simulation. Deterministic; fails and is full when told so.

use super::{Entry, Store, StoreError};
use berth_proto::ids::Revision;
use berth_server_core::batching::{Batch, Limits};
pub use berth_server_core::memory::Memory;
use berth_server_core::memory::{self, NotTaken};

impl From<NotTaken> for StoreError {
    fn from(why: NotTaken) -> Self {
        match why {
            NotTaken::Full => Self::Full,
            NotTaken::OutOfOrder { held, offered } => Self::OutOfOrder { held, offered },
        }
    }
}

/// Whether batches follow a revision.
///
/// # Errors
/// When one does not.
pub(super) fn check(held: Revision, batches: &[Batch]) -> Result<(), StoreError> {
    Ok(memory::follows(held, batches)?)
}

impl Store for Memory {
    fn revision(&self) -> Revision {
        self.revision()
    }

    fn limits(&self) -> Limits {
        Limits::JOURNAL
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        Ok(self.commit(batches)?)
    }

    fn load(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        Ok(self.load(prefix).collect())
    }

    fn newest(
        &self,
        prefix: &[u8],
        below: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        Ok(self.newest(prefix, below).take(limit).collect())
    }

    fn beyond(&self, prefix: &[u8], keep: usize, limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        Ok(self.beyond(prefix, keep, limit))
    }

    fn checkpoint(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
