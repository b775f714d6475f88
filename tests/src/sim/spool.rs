//! A host's disk as far as transfers fill it: which chunks of which blobs are durable, and whether they
//! are right. Counts, and no bytes.

use berth_agent_core::transfer::{Blob, CHUNK_BYTES, Held};
use berth_proto::ids::Digest;
use std::collections::{BTreeMap, BTreeSet};

/// What a durable chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Right,
    /// As it came; and it came wrong.
    Wrong,
    /// It has changed since it came.
    Rotten,
}

#[derive(Debug, Clone, Default)]
struct Stored {
    whole: bool,
    /// All of it was compared with its digest, and nothing was written since.
    verified: bool,
    chunks: BTreeMap<u64, Chunk>,
}

/// What survives an agent of the bytes it has brought.
#[derive(Debug, Clone, Default)]
pub(super) struct Spool {
    blobs: BTreeMap<Digest, Stored>,
    /// Models whose files are laid out.
    trees: BTreeSet<Digest>,
    /// So many of the next chunks change as soon as they are durable.
    rots: u8,
}

/// How many chunks a blob has.
pub(super) fn chunks(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CHUNK_BYTES)
}

/// The byte behind a chunk.
pub(super) fn chunk_end(chunk: u64, size_bytes: u64) -> u64 {
    ((chunk + 1) * CHUNK_BYTES).min(size_bytes)
}

impl Spool {
    /// What is held, as the agent's spool tells it: chunks that are not as they came are not.
    pub(super) fn look(&mut self, blob: &Blob) -> Held {
        let Some(stored) = self.blobs.get_mut(&blob.digest) else {
            return Held::Chunks(BTreeSet::new());
        };
        if stored.whole {
            return Held::Whole;
        }
        stored.verified = false;
        let as_it_came = stored.chunks.iter().filter(|(_, chunk)| **chunk != Chunk::Rotten);
        Held::Chunks(as_it_came.map(|(at, _)| *at).collect())
    }

    /// A chunk is durable from now on.
    pub(super) fn persist(&mut self, digest: &Digest, chunk: u64, right: bool) {
        let rots = self.rots > 0;
        self.rots = self.rots.saturating_sub(1);
        let came = if right { Chunk::Right } else { Chunk::Wrong };
        let stored = self.blobs.entry(digest.clone()).or_default();
        stored.verified = false;
        stored.chunks.insert(chunk, if rots { Chunk::Rotten } else { came });
    }

    pub(super) fn verify(&mut self, blob: &Blob) -> bool {
        let stored = self.blobs.entry(blob.digest.clone()).or_default();
        let right = |at: u64| stored.chunks.get(&at) == Some(&Chunk::Right);
        stored.verified = (0..chunks(blob.size_bytes)).all(right);
        stored.verified
    }

    pub(super) fn is_verified(&self, digest: &Digest) -> bool {
        self.blobs.get(digest).is_some_and(|stored| stored.verified)
    }

    pub(super) fn keep(&mut self, digest: &Digest) {
        let stored = Stored { whole: true, ..Stored::default() };
        self.blobs.insert(digest.clone(), stored);
    }

    pub(super) fn is_whole(&self, digest: &Digest) -> bool {
        self.blobs.get(digest).is_some_and(|stored| stored.whole)
    }

    /// Nothing is left of it.
    pub(super) fn discard(&mut self, digest: &Digest) {
        self.blobs.remove(digest);
    }

    /// A chunk of these bytes that is durable and as it came.
    pub(super) fn held_of(&self, blob: &Blob, from: u64, to: u64) -> Option<u64> {
        let stored = self.blobs.get(&blob.digest)?;
        if stored.whole {
            return Some(from / CHUNK_BYTES);
        }
        let range = from / CHUNK_BYTES..to.div_ceil(CHUNK_BYTES);
        let mut held = stored.chunks.range(range);
        held.find(|(_, chunk)| **chunk != Chunk::Rotten).map(|(at, _)| *at)
    }

    /// All these bytes have their place already.
    pub(super) fn has_place(&self, blob: &Blob, from: u64, to: u64) -> bool {
        let stored = self.blobs.get(&blob.digest);
        let has = |at: u64| stored.is_some_and(|stored| stored.chunks.contains_key(&at));
        (from / CHUNK_BYTES..to.div_ceil(CHUNK_BYTES)).all(has)
    }

    /// Something of it came wrong.
    pub(super) fn came_wrong(&self, digest: &Digest) -> bool {
        let stored = self.blobs.get(digest);
        stored.is_some_and(|stored| stored.chunks.values().any(|chunk| *chunk == Chunk::Wrong))
    }

    /// A chunk of a blob that is on its way changes, or the next one that is durable does.
    pub(super) fn rot(&mut self, which: u8) {
        let under_way = self.blobs.values_mut().filter(|stored| !stored.whole && !stored.verified);
        let mut all: Vec<&mut Chunk> = under_way.flat_map(|s| s.chunks.values_mut()).collect();
        let at = usize::from(which) % all.len().max(1);
        match all.get_mut(at) {
            Some(chunk) => **chunk = Chunk::Rotten,
            None => self.rots += 1,
        }
    }

    /// Nothing changes any more by itself.
    pub(super) fn is_sound_from_now_on(&mut self) {
        self.rots = 0;
    }

    /// A model's files are laid out.
    pub(super) fn lay_out(&mut self, model: &Digest) {
        self.trees.insert(model.clone());
    }

    pub(super) fn has_tree(&self, model: &Digest) -> bool {
        self.trees.contains(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_neither_held_nor_verified_and_has_its_place() {
        let blob = Blob { digest: Digest::of(b"x"), size_bytes: 2 * CHUNK_BYTES + 1 };
        let mut spool = Spool::default();
        for chunk in 0..3 {
            spool.persist(&blob.digest, chunk, true);
        }
        assert!(spool.verify(&blob) && spool.is_verified(&blob.digest));
        // What was verified a moment ago is kept as it was; the next chunk changes in its place.
        spool.rot(1);
        assert_eq!(spool.look(&blob), Held::Chunks([0, 1, 2].into()));
        spool.persist(&blob.digest, 1, true);
        assert!(!spool.verify(&blob));
        assert_eq!(spool.look(&blob), Held::Chunks([0, 2].into()));
        let middle = (CHUNK_BYTES, 2 * CHUNK_BYTES);
        assert_eq!(spool.held_of(&blob, middle.0, middle.1), None);
        assert_eq!(spool.held_of(&blob, middle.0, middle.1 + 1), Some(2));
        assert!(spool.has_place(&blob, middle.0, middle.1));
        spool.persist(&blob.digest, 1, false);
        assert!(!spool.verify(&blob) && spool.came_wrong(&blob.digest));
        assert_eq!(spool.look(&blob), Held::Chunks([0, 1, 2].into()));
        spool.keep(&blob.digest);
        assert_eq!(spool.look(&blob), Held::Whole);
    }
}
