//! The embedded default: the journal is the durable truth, sled the materialised store behind it.
//!
//! A commit is durable when the journal has it; sled follows, with the revision it has applied in the
//! same batch. At a checkpoint sled is flushed and `fdatasync`ed (its own flush does not survive a
//! power cut), an export of all entries is written, read back and verified, and the journal's older
//! segments go. A start replays what the journal has after sled's revision; a sled that does not open
//! (it may panic on damage) or whose checksum is wrong is thrown away, loudly, and made anew from the
//! newest good export and the journal.

use super::folder::{io, sync_folder, write_whole};
use super::journal::Journal;
use super::memory::Memory;
use super::{Entry, Opened, Store, StoreError};
use berth_proto::ids::Revision;
use berth_server_core::batching::Batch;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// sled writes larger values to files that it never syncs; they are split over keys instead.
const CHUNK: usize = 4000;
/// Batches between two checkpoints.
const CHECKPOINT_EVERY: u64 = 10_000;
/// Exports kept: the newest may be the one that is damaged.
const EXPORTS: usize = 2;
const EXPORT_MAGIC: &[u8; 8] = b"BRTHEXP1";

/// The embedded default store.
pub struct Embedded {
    folder: PathBuf,
    journal: Journal,
    db: sled::Db,
    /// What sled holds, for reading: the ledger is small, and sled's reads are not needed twice.
    entries: Memory,
    checkpointed: Revision,
}

fn broken(error: impl std::fmt::Display) -> StoreError {
    StoreError::Materialised(error.to_string())
}

impl Embedded {
    /// Opens the store in a folder.
    ///
    /// # Errors
    /// When neither sled nor an export can be read, or files cannot be written.
    pub fn open(folder: &Path) -> Result<(Self, Opened), StoreError> {
        fs::create_dir_all(folder).map_err(io("make the folder", folder))?;
        let sled_path = folder.join("sled");
        let mut opened = Opened::default();
        let (db, mut entries) = match open_sled(&sled_path) {
            Ok(found) => found,
            Err(why) => {
                tracing::error!(%why, "the materialised store is damaged and is made anew");
                if sled_path.exists() {
                    fs::remove_dir_all(&sled_path).map_err(io("remove", &sled_path))?;
                }
                let entries = newest_export(&folder.join("exports"))?.unwrap_or_default();
                opened.rebuilt = Some(why.to_string());
                let (db, _) = open_sled(&sled_path)?;
                fill(&db, &entries)?;
                (db, entries)
            }
        };
        let held = entries.revision();
        let (journal, read) = Journal::open(&folder.join("journal"), held)?;
        for batch in &read.batches {
            apply(&db, batch)?;
            entries.apply(batch);
        }
        opened.fell_back = read.damaged_from;
        let checkpointed = held;
        let mut store = Self { folder: folder.to_owned(), journal, db, entries, checkpointed };
        if opened.rebuilt.is_some() || opened.fell_back.is_some() || !read.batches.is_empty() {
            store.checkpoint()?;
        }
        Ok((store, opened))
    }
}

/// Opens sled on a thread of its own, because a damaged file makes it panic.
fn open_sled(path: &Path) -> Result<(sled::Db, Memory), StoreError> {
    let path = path.to_owned();
    let opening = std::thread::Builder::new().name("sled-open".to_owned()).spawn(move || {
        let db = sled::Config::new()
            .path(&path)
            .cache_capacity(16 * 1024 * 1024)
            .flush_every_ms(None)
            .open()
            .map_err(broken)?;
        let entries = read_all(&db)?;
        Ok((db, entries))
    });
    match opening.map_err(broken)?.join() {
        Ok(result) => result,
        Err(_) => Err(StoreError::Materialised("sled panicked while it opened".to_owned())),
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

fn apply(db: &sled::Db, batch: &Batch) -> Result<(), StoreError> {
    let held = db.get(meta_key()).map_err(broken)?;
    let mut sum = held
        .and_then(|v| Some(u64::from_le_bytes(v.get(8..16)?.try_into().ok()?)))
        .unwrap_or_default();
    let mut out = sled::Batch::default();
    for (i, (key, value)) in batch.ops.iter().enumerate() {
        // Of several writes of one key the last one counts.
        if batch.ops[i + 1..].iter().any(|(later, _)| later == key) {
            continue;
        }
        for old in db.scan_prefix([key.as_slice(), &[0]].concat()) {
            let (old_key, old_value) = old.map_err(broken)?;
            if old_key.len() == key.len() + 5 {
                sum = sum.wrapping_sub(sum_of(&old_key, &old_value));
                out.remove(old_key);
            }
        }
        if let Some(value) = value {
            let length = u32::try_from(value.len()).map_err(broken)?;
            let head = [&batch.revision.0.to_le_bytes()[..], &length.to_le_bytes()].concat();
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
    let meta = [batch.revision.0.to_le_bytes(), sum.to_le_bytes()].concat();
    out.insert(meta_key(), meta);
    db.apply_batch(out).map_err(broken)
}

fn fill(db: &sled::Db, entries: &Memory) -> Result<(), StoreError> {
    let all = entries.load(b"")?;
    for entry in all {
        // Each under the revision that wrote it; the last word is the export's own revision.
        apply(db, &Batch { revision: entry.revision, ops: vec![(entry.key, Some(entry.value))] })?;
    }
    apply(db, &Batch { revision: entries.revision(), ops: Vec::new() })
}

fn flush(db: &sled::Db, folder: &Path) -> Result<(), StoreError> {
    db.flush().map_err(broken)?;
    let file = folder.join("sled").join("db");
    File::open(&file).and_then(|f| f.sync_data()).map_err(io("sync", &file))?;
    let blobs = folder.join("sled").join("blobs");
    if fs::read_dir(&blobs).is_ok_and(|mut d| d.next().is_some()) {
        tracing::error!(
            "sled has made files that it does not sync; the journal and the exports hold"
        );
    }
    Ok(())
}

fn encode_export(entries: &Memory) -> Result<Vec<u8>, StoreError> {
    let mut plain = entries.revision().0.to_le_bytes().to_vec();
    for entry in entries.load(b"")? {
        for bytes in [&entry.key[..], &entry.revision.0.to_le_bytes(), &entry.value[..]] {
            plain.extend_from_slice(&u32::try_from(bytes.len()).map_err(broken)?.to_le_bytes());
            plain.extend_from_slice(bytes);
        }
    }
    let packed = zstd::bulk::compress(&plain, 3).map_err(broken)?;
    let mut out = EXPORT_MAGIC.to_vec();
    out.extend_from_slice(&crc32c::crc32c(&plain).to_le_bytes());
    out.extend_from_slice(&(plain.len() as u64).to_le_bytes());
    out.extend_from_slice(&packed);
    Ok(out)
}

fn decode_export(bytes: &[u8]) -> Option<Memory> {
    let head = bytes.get(..20)?;
    if &head[..8] != EXPORT_MAGIC {
        return None;
    }
    let crc = u32::from_le_bytes(head[8..12].try_into().ok()?);
    let length = usize::try_from(u64::from_le_bytes(head[12..20].try_into().ok()?)).ok()?;
    let plain = zstd::bulk::decompress(&bytes[20..], length).ok()?;
    if crc32c::crc32c(&plain) != crc {
        return None;
    }
    let mut rest = &plain[..];
    let mut take = |n: usize| -> Option<Vec<u8>> {
        let (head, tail) = rest.split_at_checked(n)?;
        rest = tail;
        Some(head.to_vec())
    };
    let revision = Revision(u64::from_le_bytes(take(8)?.try_into().ok()?));
    let mut entries = Memory::default();
    while let Some(length) = take(4) {
        let mut sized = |length: Option<Vec<u8>>| {
            let n = u32::from_le_bytes(length?.try_into().ok()?) as usize;
            take(n)
        };
        let key = sized(Some(length))?;
        let length = take(4);
        let written: Vec<u8> = {
            let n = u32::from_le_bytes(length?.try_into().ok()?) as usize;
            take(n)?
        };
        let length = take(4);
        let value = {
            let n = u32::from_le_bytes(length?.try_into().ok()?) as usize;
            take(n)?
        };
        let revision = Revision(u64::from_le_bytes(written.try_into().ok()?));
        entries.put(Entry { key, revision, value });
    }
    entries.set_revision(revision);
    Some(entries)
}

fn exports(folder: &Path) -> Result<Vec<(Revision, PathBuf)>, StoreError> {
    let mut all = Vec::new();
    if let Ok(list) = fs::read_dir(folder) {
        for path in list.filter_map(|e| Some(e.ok()?.path())) {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if let Some(number) = name.strip_suffix(".export").and_then(|n| n.parse().ok()) {
                all.push((Revision(number), path));
            }
        }
    }
    all.sort();
    Ok(all)
}

fn newest_export(folder: &Path) -> Result<Option<Memory>, StoreError> {
    for (_, path) in exports(folder)?.into_iter().rev() {
        match fs::read(&path).ok().as_deref().and_then(decode_export) {
            Some(entries) => return Ok(Some(entries)),
            None => {
                tracing::error!(path = %path.display(), "an export is damaged; trying an older one")
            }
        }
    }
    Ok(None)
}

impl Store for Embedded {
    fn revision(&self) -> Revision {
        self.journal.revision()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        self.journal.append(batches)?;
        for batch in batches {
            apply(&self.db, batch)?;
            self.entries.apply(batch);
        }
        if self.journal.revision().0.saturating_sub(self.checkpointed.0) >= CHECKPOINT_EVERY
            && let Err(error) = self.checkpoint()
        {
            // The journal holds; the next checkpoint may have room.
            tracing::warn!(error = %crate::error::Chain(&error), "a checkpoint failed");
            self.checkpointed = self.journal.revision();
        }
        Ok(())
    }

    fn load(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        self.entries.load(prefix)
    }

    fn checkpoint(&mut self) -> Result<(), StoreError> {
        flush(&self.db, &self.folder)?;
        let folder = self.folder.join("exports");
        fs::create_dir_all(&folder).map_err(io("make the folder", &folder))?;
        let revision = self.entries.revision();
        let path = folder.join(format!("{:020}.export", revision.0));
        write_whole(&path, &encode_export(&self.entries)?)?;
        let good = fs::read(&path).ok().as_deref().and_then(decode_export);
        if good.map(|e| e.revision()) != Some(revision) {
            return Err(StoreError::Materialised("an export does not read back".to_owned()));
        }
        let all = exports(&folder)?;
        let keep_from = all.len().saturating_sub(EXPORTS);
        for (_, old) in &all[..keep_from] {
            fs::remove_file(old).map_err(io("remove", old))?;
        }
        sync_folder(&folder)?;
        // The journal goes back to the older export, in case the newer one is damaged later.
        if let Some((oldest, _)) = all.get(keep_from)
            && all.len() - keep_from == EXPORTS
        {
            self.journal.forget(*oldest)?;
        }
        self.checkpointed = revision;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(revision: u64) -> Batch {
        Batch {
            revision: Revision(revision),
            ops: vec![(
                format!("k/{:03}", revision % 50).into_bytes(),
                Some(vec![
                    u8::try_from(revision % 251).unwrap();
                    10 + (revision as usize * 37) % 9000
                ]),
            )],
        }
    }

    fn filled(dir: &Path, to: u64) -> Vec<Entry> {
        let (mut store, _) = Embedded::open(dir).unwrap();
        for revision in store.revision().0 + 1..=to {
            store.commit(&[batch(revision)]).unwrap();
        }
        store.load(b"").unwrap()
    }

    #[test]
    fn a_damaged_sled_is_made_anew_from_export_and_journal() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 60);
        {
            let (mut store, _) = Embedded::open(dir.path()).unwrap();
            store.checkpoint().unwrap();
        }
        let before = filled(dir.path(), 120);
        let file = dir.path().join("sled/db");
        let mut bytes = fs::read(&file).unwrap();
        let len = bytes.len();
        for byte in &mut bytes[len / 4..len / 2] {
            *byte ^= 0x5a;
        }
        fs::write(&file, bytes).unwrap();
        let (store, opened) = Embedded::open(dir.path()).unwrap();
        assert!(opened.rebuilt.is_some() || store.load(b"").unwrap() == before);
        assert_eq!(opened.fell_back, None);
        assert_eq!(store.load(b"").unwrap(), before);
        assert_eq!(store.revision(), Revision(120));
    }

    #[test]
    fn a_missing_sled_and_a_damaged_newest_export_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for to in [30, 60, 90] {
            filled(dir.path(), to);
            let (mut store, _) = Embedded::open(dir.path()).unwrap();
            store.checkpoint().unwrap();
        }
        let before = filled(dir.path(), 100);
        fs::remove_dir_all(dir.path().join("sled")).unwrap();
        let newest = exports(&dir.path().join("exports")).unwrap().pop().unwrap().1;
        fs::write(newest, b"nothing").unwrap();
        let (store, opened) = Embedded::open(dir.path()).unwrap();
        assert_eq!(store.load(b"").unwrap(), before);
        assert_eq!(opened.fell_back, None);
    }
}
