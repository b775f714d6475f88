//! A store in memory, for tests and simulation. Deterministic; fails and is full when told so.

use super::{Entry, Store, StoreError};
use berth_proto::ids::Revision;
use berth_server_core::batching::Batch;
use std::collections::BTreeMap;

/// A store in memory.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    entries: BTreeMap<Vec<u8>, (Revision, Vec<u8>)>,
    revision: Revision,
    /// Commits fail with [`StoreError::Full`] while this is set.
    pub full: bool,
}

impl Memory {
    pub(super) fn apply(&mut self, batch: &Batch) {
        for (key, value) in &batch.ops {
            match value {
                Some(value) => self.entries.insert(key.clone(), (batch.revision, value.clone())),
                None => self.entries.remove(key),
            };
        }
        self.revision = batch.revision;
    }

    pub(super) fn put(&mut self, entry: Entry) {
        self.entries.insert(entry.key, (entry.revision, entry.value));
    }

    pub(super) fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }
}

/// Whether batches follow a revision.
///
/// # Errors
/// When one does not.
pub(super) fn check(held: Revision, batches: &[Batch]) -> Result<(), StoreError> {
    let mut held = held;
    for batch in batches {
        if batch.revision != held.next() {
            return Err(StoreError::OutOfOrder { held, offered: batch.revision });
        }
        held = batch.revision;
    }
    Ok(())
}

impl Store for Memory {
    fn revision(&self) -> Revision {
        self.revision
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        check(self.revision, batches)?;
        if self.full {
            return Err(StoreError::Full);
        }
        for batch in batches {
            self.apply(batch);
        }
        Ok(())
    }

    fn load(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        Ok(self
            .entries
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (revision, value))| Entry {
                key: key.clone(),
                revision: *revision,
                value: value.clone(),
            })
            .collect())
    }

    fn checkpoint(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
