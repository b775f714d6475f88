//! sled as the materialised store: readable entries behind the journal, with the revision applied and
//! a checksum over all in the same batch.

use super::folder::io;
use super::follower::Materialised;
use super::memory::Memory;
use super::{Entry, StoreError};
use berth_proto::ids::Revision;
use berth_server_core::batching::Batch;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// sled writes larger values to files that it never syncs; they are split over keys instead.
const CHUNK: usize = 4000;

fn broken(error: impl std::fmt::Display) -> StoreError {
    StoreError::Materialised(error.to_string())
}

/// An open sled.
pub(super) struct Sled {
    db: sled::Db,
    folder: PathBuf,
}

/// Why sled did not open.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// It is damaged, or the disk is.
    #[error(transparent)]
    Broken(#[from] StoreError),
    /// It is still at it, and may still use its files.
    #[error("it does not open within {0:?}")]
    Hung(Duration),
}

impl Sled {
    /// Opens it, on a thread of its own because a damaged file makes it panic, and reads all it has.
    ///
    /// # Errors
    /// When it does not open, does not verify, or is not done within `patience`.
    pub(super) fn open(folder: &Path, patience: Duration) -> Result<(Self, Memory), OpenError> {
        let folder = folder.to_owned();
        let (done, opened) = channel();
        let opening = std::thread::Builder::new().name("sled-open".to_owned()).spawn(move || {
            // Nobody waits any more: it is closed again.
            let _ = done.send(open(folder));
        });
        opening.map_err(broken)?;
        match opened.recv_timeout(patience) {
            Ok(result) => Ok(result?),
            Err(RecvTimeoutError::Timeout) => Err(OpenError::Hung(patience)),
            Err(RecvTimeoutError::Disconnected) => {
                Err(broken("sled panicked while it opened").into())
            }
        }
    }
}

fn open(folder: PathBuf) -> Result<(Sled, Memory), StoreError> {
    let db = sled::Config::new()
        .path(&folder)
        .cache_capacity(16 * 1024 * 1024)
        .flush_every_ms(None)
        .open()
        .map_err(broken)?;
    let entries = read_all(&db)?;
    Ok((Sled { db, folder }, entries))
}

impl Materialised for Sled {
    fn apply(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        apply(&self.db, batches)?;
        // Few writes of its own are under way at a time then: when more of its threads wait for its
        // segment lock than it has, nobody is left to end what the holder waits for (sled 0.34.7,
        // `SegmentAccountant::next`).
        self.db.flush().map_err(broken)?;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.db.flush().map_err(broken)?;
        // Its own flush does not survive a power cut.
        let file = self.folder.join("db");
        File::open(&file).and_then(|f| f.sync_data()).map_err(io("sync", &file))?;
        let blobs = self.folder.join("blobs");
        if fs::read_dir(&blobs).is_ok_and(|mut d| d.next().is_some()) {
            tracing::error!(
                "sled has made files that it does not sync; the journal and the exports hold"
            );
        }
        Ok(())
    }
}

fn meta_key() -> &'static [u8] {
    b"\0applied"
}

/// The checksum over all entries: order-independent, so that it can be kept up to date by itself.
fn sum_of(key: &[u8], value: &[u8]) -> u64 {
    let mut crc = crc32c::crc32c(key);
    crc = crc32c::crc32c_append(crc, value);
    (u64::from(crc) << 32) | u64::from(crc32c::crc32c_append(!crc, key))
}

fn read_all(db: &sled::Db) -> Result<Memory, StoreError> {
    let mut entries = Memory::default();
    let mut sum = 0_u64;
    let mut applied = (0_u64, 0_u64);
    let mut pending: Option<(Vec<u8>, Revision, usize, Vec<u8>)> = None;
    for item in db.iter() {
        let (key, value) = item.map_err(broken)?;
        if key.as_ref() == meta_key() {
            let number = |at: usize| -> Option<u64> {
                Some(u64::from_le_bytes(value.get(at..at + 8)?.try_into().ok()?))
            };
            applied = number(0).zip(number(8)).ok_or_else(|| broken("its revision is torn"))?;
            continue;
        }
        sum = sum.wrapping_add(sum_of(&key, &value));
        // Keys: the entry's, a zero byte, and the chunk's number. Chunk 0 begins with revision and length.
        let split = key.len().checked_sub(5).ok_or_else(|| broken("a key is torn"))?;
        let (name, number) = (&key[..split], &key[split + 1..]);
        let number = u32::from_be_bytes(number.try_into().map_err(broken)?);
        if number == 0 {
            if let Some((key, ..)) = &pending {
                return Err(broken(format!("entry {} is cut", String::from_utf8_lossy(key))));
            }
            let head = value.get(..12).ok_or_else(|| broken("an entry is torn"))?;
            let revision = Revision(u64::from_le_bytes(head[..8].try_into().map_err(broken)?));
            let length = u32::from_le_bytes(head[8..12].try_into().map_err(broken)?) as usize;
            pending = Some((name.to_vec(), revision, length, value[12..].to_vec()));
        } else if let Some((held, _, _, bytes)) = &mut pending
            && held == name
        {
            bytes.extend_from_slice(&value);
        } else {
            return Err(broken("a chunk without its entry"));
        }
        if let Some((key, revision, _, value)) =
            pending.take_if(|(_, _, length, bytes)| bytes.len() >= *length)
        {
            entries.put(Entry { key, revision, value });
        }
    }
    if pending.is_some() || sum != applied.1 {
        return Err(broken("its checksum is wrong"));
    }
    entries.set_revision(Revision(applied.0));
    Ok(entries)
}

fn chunk_key(key: &[u8], number: u32) -> Vec<u8> {
    [key, &[0], &number.to_be_bytes()].concat()
}

fn apply(db: &sled::Db, batches: &[Batch]) -> Result<(), StoreError> {
    let Some(newest) = batches.last() else { return Ok(()) };
    let held = db.get(meta_key()).map_err(broken)?;
    let mut sum = held
        .and_then(|v| Some(u64::from_le_bytes(v.get(8..16)?.try_into().ok()?)))
        .unwrap_or_default();
    // Of several writes of one key the last one counts.
    let mut last = BTreeMap::new();
    for batch in batches {
        for (key, value) in &batch.ops {
            last.insert(key, (batch.revision, value));
        }
    }
    let mut out = sled::Batch::default();
    for (key, (revision, value)) in last {
        for old in db.scan_prefix([key.as_slice(), &[0]].concat()) {
            let (old_key, old_value) = old.map_err(broken)?;
            if old_key.len() == key.len() + 5 {
                sum = sum.wrapping_sub(sum_of(&old_key, &old_value));
                out.remove(old_key);
            }
        }
        if let Some(value) = value {
            let length = u32::try_from(value.len()).map_err(broken)?;
            let head = [&revision.0.to_le_bytes()[..], &length.to_le_bytes()].concat();
            let first = value.len().min(CHUNK);
            let mut put = |number: u32, bytes: Vec<u8>| {
                let key = chunk_key(key, number);
                sum = sum.wrapping_add(sum_of(&key, &bytes));
                out.insert(key, bytes);
            };
            put(0, [&head, &value[..first]].concat());
            for (n, chunk) in value[first..].chunks(CHUNK).enumerate() {
                put(u32::try_from(n + 1).map_err(broken)?, chunk.to_vec());
            }
        }
    }
    let meta = [newest.revision.0.to_le_bytes(), sum.to_le_bytes()].concat();
    out.insert(meta_key(), meta);
    db.apply_batch(out).map_err(broken)
}
