//! What a store keeps, in memory: entries by key, each with the revision that wrote it.
//!
//! Deterministic, and full when told so. The server's stores are built around it or tested against
//! it, and the simulator keeps its ledger in it.

use crate::batching::Batch;
use berth_proto::ids::Revision;
use std::collections::BTreeMap;
use std::ops::Bound;

/// A stored entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: Vec<u8>,
    /// The revision that wrote it.
    pub revision: Revision,
    /// Its bytes.
    pub value: Vec<u8>,
}

/// Entries in memory.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    entries: BTreeMap<Vec<u8>, (Revision, Vec<u8>)>,
    revision: Revision,
    /// Commits are refused with [`NotTaken::Full`] while this is set.
    pub full: bool,
}

/// Why batches were not taken; nothing of them was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotTaken {
    /// There is no room.
    Full,
    /// A batch does not follow the last one.
    OutOfOrder {
        /// The newest held.
        held: Revision,
        /// The batch's.
        offered: Revision,
    },
}

impl Memory {
    /// The newest revision held.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Sets the revision, of entries that came by [`Memory::put`].
    pub fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }

    /// Takes batches in, all or none.
    ///
    /// # Errors
    /// When it is full, or they do not follow.
    pub fn commit(&mut self, batches: &[Batch]) -> Result<(), NotTaken> {
        follows(self.revision, batches)?;
        if self.full {
            return Err(NotTaken::Full);
        }
        for batch in batches {
            self.apply(batch);
        }
        Ok(())
    }

    /// Takes one batch in, whatever came before.
    pub fn apply(&mut self, batch: &Batch) {
        for (key, value) in &batch.ops {
            match value {
                Some(value) => self.entries.insert(key.clone(), (batch.revision, value.clone())),
                None => self.entries.remove(key),
            };
        }
        self.revision = batch.revision;
    }

    /// Puts one entry.
    pub fn put(&mut self, entry: Entry) {
        self.entries.insert(entry.key, (entry.revision, entry.value));
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.entries.iter().map(|(key, (_, value))| (key.len() + value.len()) as u64).sum()
    }

    /// All entries whose keys begin so, in order of keys.
    pub fn load<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = Entry> + use<'a> {
        self.from(prefix).map(entry)
    }

    /// Of the keys that begin so all but the last `keep`, the first of them, at most `limit`.
    #[must_use]
    pub fn beyond(&self, prefix: &[u8], keep: usize, limit: usize) -> Vec<Vec<u8>> {
        let over = self.from(prefix).count().saturating_sub(keep).min(limit);
        self.from(prefix).take(over).map(|(key, _)| key.clone()).collect()
    }

    fn from<'a>(
        &'a self,
        prefix: &'a [u8],
    ) -> impl Iterator<Item = (&'a Vec<u8>, &'a (Revision, Vec<u8>))> + use<'a> {
        let from = self.entries.range(prefix.to_vec()..);
        from.take_while(move |(key, _)| key.starts_with(prefix))
    }

    /// The entries whose keys begin so and are less than `below`, from the last to the first.
    pub fn newest<'a>(
        &'a self,
        prefix: &'a [u8],
        below: Option<&[u8]>,
    ) -> impl Iterator<Item = Entry> + use<'a> {
        let end = match (below, after(prefix)) {
            (Some(below), _) => Bound::Excluded(below.to_vec()),
            (None, Some(after)) => Bound::Excluded(after),
            (None, None) => Bound::Unbounded,
        };
        let nothing = matches!(&end, Bound::Excluded(end) if end.as_slice() < prefix);
        let end = if nothing { Bound::Excluded(prefix.to_vec()) } else { end };
        self.entries
            .range((Bound::Included(prefix.to_vec()), end))
            .rev()
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(entry)
    }
}

fn entry((key, (revision, value)): (&Vec<u8>, &(Revision, Vec<u8>))) -> Entry {
    Entry { key: key.clone(), revision: *revision, value: value.clone() }
}

/// The least key that is greater than all that begin so; `None`: there is none.
fn after(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

/// Whether batches follow a revision.
///
/// # Errors
/// [`NotTaken::OutOfOrder`] when one does not.
pub fn follows(mut held: Revision, batches: &[Batch]) -> Result<(), NotTaken> {
    for batch in batches {
        if batch.revision != held.next() {
            return Err(NotTaken::OutOfOrder { held, offered: batch.revision });
        }
        held = batch.revision;
    }
    Ok(())
}
