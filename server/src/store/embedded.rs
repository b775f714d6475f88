//! The embedded default: the journal is the durable truth, sled the materialised store behind it.
//!
//! A commit is durable when the journal has it; sled follows on a thread of its own, with the revision
//! it has applied in the same batch. At a checkpoint sled is flushed and `fdatasync`ed (its own flush
//! does not survive a power cut), an export of all entries is written, read back and verified, and the
//! journal's older segments go. A start replays what the journal has after sled's revision; a sled that
//! does not open (it may panic on damage) or whose checksum is wrong is thrown away, loudly, and made
//! anew from the newest good export and the journal. So is one that fails while the server runs, as on
//! a full disk: it is put out of use, the journal and what is in memory hold, and the next checkpoint
//! makes it anew. One that hangs may still write to its files and is made anew at the next start.

use super::export;
use super::folder::{io, private, sync_folder, write_whole};
use super::follower::{Follower, Stopped};
use super::journal::{self, Journal};
use super::memory::Memory;
use super::sled::{OpenError, Sled};
use super::{Entry, Opened, Store, StoreError};
use berth_proto::ids::Revision;
use berth_server_core::batching::{Batch, Limits};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes committed between two checkpoints at the least, a segment of the journal; and as many as the
/// ledger has, so that what a checkpoint costs is spread over as much that was written. A start replays
/// no more than that.
const CHECKPOINT_BYTES: u64 = 16 * 1024 * 1024;
/// Exports kept: the newest may be the one that is damaged.
const EXPORTS: usize = 2;
/// sled takes so many times the bytes it holds while it is filled (measured: up to 30 in the long run).
const ROOM: u64 = 4;
/// A call of sled's that takes longer hangs. Less than a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Opening reads all that sled has.
const OPENING: Duration = Duration::from_secs(120);

/// The store behind the journal.
enum Behind {
    /// It follows.
    Follows(Follower),
    /// There is none, or what is there is of no use; it may be made anew.
    Out,
    /// It hangs, and its files are not to be touched while this process lives.
    Hung,
}

impl From<Stopped> for Behind {
    fn from(why: Stopped) -> Self {
        match why {
            Stopped::Failed => Self::Out,
            Stopped::Hung => Self::Hung,
        }
    }
}

impl Behind {
    fn start(sled: Sled) -> Self {
        match Follower::start(sled, PATIENCE) {
            Ok(follower) => Self::Follows(follower),
            Err(error) => {
                tracing::error!(%error, "sled has no thread");
                Self::Out
            }
        }
    }

    /// Does something with the store, if it is of use, and puts it out of use if that fails.
    fn with(&mut self, job: impl FnOnce(&Follower) -> Result<(), Stopped>) {
        let Self::Follows(follower) = self else { return };
        if let Err(why) = job(follower) {
            tracing::error!(%why, "the materialised store is out of use; the journal holds");
            *self = why.into();
        }
    }
}

/// Puts all entries in.
fn fill(follower: &Follower, entries: Vec<Entry>, revision: Revision) -> Result<(), Stopped> {
    for entry in entries {
        // Each under the revision that wrote it; the last word is the whole's own.
        let ops = vec![(entry.key, Some(entry.value))];
        follower.push(Batch { revision: entry.revision, ops })?;
    }
    follower.push(Batch { revision, ops: Vec::new() })
}

/// The embedded default store.
pub struct Embedded {
    folder: PathBuf,
    journal: Journal,
    behind: Behind,
    /// What sled holds, for reading: the ledger is small, and sled's reads are not needed twice.
    entries: Memory,
    /// Bytes committed since a checkpoint was made or tried.
    since: u64,
    /// Bytes after which the next one is due.
    due: u64,
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
        private(folder).map_err(io("make the folder", folder))?;
        let sled_path = folder.join("sled");
        let mut opened = Opened::default();
        // A checkpoint syncs sled before it writes the export: a sled behind an export has lost what
        // it had, or is not the one that was here.
        let exported = export::list(&folder.join("exports"))?.last().map(|(revision, _)| *revision);
        let current = |found: (Sled, Memory)| match exported {
            Some(revision) if found.1.revision() < revision => {
                let why = format!("it ends at {}, before export {revision}", found.1.revision());
                Err(OpenError::Broken(broken(why)))
            }
            Some(_) | None => Ok(found),
        };
        let (mut behind, mut entries) = match Sled::open(&sled_path, OPENING).and_then(current) {
            Ok((sled, entries)) => (Behind::start(sled), entries),
            Err(why) => {
                let export = export::newest(&folder.join("exports"))?;
                // Without one, only a journal from the very first revision makes it anew.
                let begun = exported.is_some() || journal::goes_on(&folder.join("journal"))?;
                if export.is_none() && begun {
                    let why = format!("{why}; and no export of it can be read");
                    return Err(StoreError::Lost { path: folder.to_owned(), why });
                }
                tracing::error!(%why, "the materialised store is damaged and is made anew");
                opened.rebuilt = Some(why.to_string());
                let entries = export.unwrap_or_default();
                let behind = match why {
                    OpenError::Broken(_) => anew(&sled_path, &entries)?,
                    OpenError::Hung(_) => Behind::Hung,
                };
                (behind, entries)
            }
        };
        let held = entries.revision();
        let mark = folder.join(FELL_BACK);
        let before_damage = |from: Revision| {
            write_whole(&mark, from.0.to_string().as_bytes()).and_then(|()| sync_folder(folder))
        };
        let (journal, read) = Journal::open(&folder.join("journal"), held, before_damage)?;
        for batch in &read.batches {
            behind.with(|follower| follower.push(batch.clone()));
            entries.apply(batch);
        }
        opened.fell_back = read.damaged_from.or(marked(&mark)?);
        let due = entries.size_bytes().max(CHECKPOINT_BYTES);
        let mut store = Self { folder: folder.to_owned(), journal, behind, entries, since: 0, due };
        if opened.rebuilt.is_some() || opened.fell_back.is_some() || !read.batches.is_empty() {
            match store.checkpoint() {
                // The journal holds; a start with a full disk is one all the same.
                Err(StoreError::Full) => tracing::warn!("the disk is full: no checkpoint was made"),
                made => made?,
            }
        }
        Ok((store, opened))
    }
}

/// A new sled with these entries in place of what is there.
///
/// # Errors
/// When what is there cannot be removed; that the new one is of no use is no error.
fn anew(path: &Path, entries: &Memory) -> Result<Behind, StoreError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(io("remove", path))?;
    }
    let mut behind = match Sled::open(path, OPENING) {
        Ok((sled, _)) => Behind::start(sled),
        Err(OpenError::Broken(error)) => {
            tracing::error!(error = %crate::error::Chain(&error), "sled cannot be made anew");
            Behind::Out
        }
        Err(hung @ OpenError::Hung(_)) => {
            tracing::error!(error = %hung, "sled cannot be made anew");
            Behind::Hung
        }
    };
    let all: Vec<Entry> = entries.load(b"").collect();
    behind.with(|follower| fill(follower, all, entries.revision()));
    Ok(behind)
}

/// That acknowledged writes were lost, from this revision on, until the epoch that tells of it is kept:
/// the damage itself is seen once only.
const FELL_BACK: &str = "fell-back";

fn marked(mark: &Path) -> Result<Option<Revision>, StoreError> {
    match fs::read_to_string(mark) {
        // Whatever is in it: it is there.
        Ok(text) => Ok(Some(Revision(text.trim().parse().unwrap_or_default()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", mark)(error)),
    }
}

/// The epoch that tells of a fall back is durable: the next start need not say it again.
///
/// # Errors
/// When the mark cannot be removed.
pub fn told_of_fall_back(folder: &Path) -> Result<(), StoreError> {
    let mark = folder.join(FELL_BACK);
    match fs::remove_file(&mark) {
        Ok(()) => sync_folder(folder),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io("remove", &mark)(error)),
    }
}

impl Embedded {
    /// Makes a store that holds these entries, as of a revision, in a folder that has none.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn create(folder: &Path, revision: Revision, all: Vec<Entry>) -> Result<Self, StoreError> {
        private(folder).map_err(io("make the folder", folder))?;
        let mut entries = Memory::default();
        for entry in all {
            entries.put(entry);
        }
        entries.set_revision(revision);
        let behind = anew(&folder.join("sled"), &entries)?;
        let (journal, _) = Journal::open(&folder.join("journal"), revision, |_| Ok(()))?;
        let due = entries.size_bytes().max(CHECKPOINT_BYTES);
        let mut store = Self { folder: folder.to_owned(), journal, behind, entries, since: 0, due };
        store.checkpoint()?;
        Ok(store)
    }

    /// Makes sled hold, durably, what the journal does.
    fn materialise(&mut self) -> Result<(), StoreError> {
        self.behind.with(Follower::sync);
        match self.behind {
            Behind::Follows(_) => return Ok(()),
            Behind::Hung => return Err(broken("it hangs; the next start makes it anew")),
            Behind::Out => {}
        }
        let path = self.folder.join("sled");
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        }
        let room = super::folder::free_bytes(&self.folder)?;
        if room < self.entries.size_bytes().saturating_mul(ROOM) {
            return Err(StoreError::Full);
        }
        self.behind = anew(&path, &self.entries)?;
        self.behind.with(Follower::sync);
        match self.behind {
            Behind::Follows(_) => {
                tracing::warn!("the materialised store was made anew");
                Ok(())
            }
            Behind::Out | Behind::Hung => Err(broken("it cannot be made anew")),
        }
    }
}

impl Store for Embedded {
    fn revision(&self) -> Revision {
        self.journal.revision()
    }

    fn limits(&self) -> Limits {
        Limits::JOURNAL
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        self.journal.append(batches)?;
        // From here on it is acknowledged, whatever becomes of sled.
        for batch in batches {
            self.behind.with(|follower| follower.push(batch.clone()));
            self.entries.apply(batch);
            let size = |(key, value): &(Vec<u8>, Option<Vec<u8>>)| {
                key.len() + value.as_ref().map_or(0, Vec::len)
            };
            self.since += batch.ops.iter().map(size).sum::<usize>() as u64;
        }
        if self.since >= self.due
            && let Err(error) = self.checkpoint()
        {
            // The journal holds; the next checkpoint may have room.
            tracing::warn!(error = %crate::error::Chain(&error), "a checkpoint failed");
        }
        Ok(())
    }

    fn load(&self, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        Ok(self.entries.load(prefix).collect())
    }

    fn newest(
        &self,
        prefix: &[u8],
        below: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        Ok(self.entries.newest(prefix, below).take(limit).collect())
    }

    fn beyond(&self, prefix: &[u8], keep: usize, limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        Ok(self.entries.beyond(prefix, keep, limit))
    }

    fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.since = 0;
        self.due = self.entries.size_bytes().max(CHECKPOINT_BYTES);
        // Without sled the export holds what it would; a start then makes sled anew from it.
        if let Err(error) = self.materialise() {
            tracing::error!(error = %crate::error::Chain(&error), "there is no materialised store");
        }
        let folder = self.folder.join("exports");
        fs::create_dir_all(&folder).map_err(io("make the folder", &folder))?;
        let revision = self.entries.revision();
        let path = folder.join(format!("{:020}.export", revision.0));
        write_whole(&path, &export::encode(&self.entries)?)?;
        // By its checksum: what was encoded from memory need not be read into it again.
        if fs::read(&path).ok().as_deref().and_then(export::revision) != Some(revision) {
            return Err(StoreError::Materialised("an export does not read back".to_owned()));
        }
        let all = export::list(&folder)?;
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

    fn flip(path: &Path, at: usize) {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_checkpoint_comes_with_the_bytes_that_were_written_and_not_with_their_number() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Embedded::open(dir.path()).unwrap();
        let exports = || export::list(&dir.path().join("exports")).unwrap().len();
        let write = |revision, size| Batch {
            revision: Revision(revision),
            ops: vec![(format!("k/{}", revision % 9).into_bytes(), Some(vec![7; size]))],
        };
        let many: Vec<Batch> = (1..=20_000).map(|n| write(n, 9)).collect();
        store.commit(&many).unwrap();
        assert_eq!(exports(), 0);
        let mut last = 20_000;
        let mut large = |store: &mut Embedded, count| {
            let some: Vec<Batch> = (last + 1..=last + count).map(|n| write(n, 1 << 20)).collect();
            store.commit(&some).unwrap();
            last += count;
        };
        large(&mut store, 15);
        assert_eq!(exports(), 0);
        large(&mut store, 1);
        assert_eq!(exports(), 1);
        large(&mut store, 15);
        assert_eq!(exports(), 1, "it counts from the last one");
        large(&mut store, 1);
        assert_eq!(exports(), 2);
    }

    #[test]
    fn a_fall_back_is_told_at_every_start_until_it_is_taken_note_of() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 60);
        flip(&dir.path().join(format!("journal/{:020}.journal", 0)), 100);
        for _ in 0..3 {
            let (store, opened) = Embedded::open(dir.path()).unwrap();
            assert!(opened.fell_back.is_some());
            assert_eq!(store.revision(), Revision(60), "sled had it all");
        }
        told_of_fall_back(dir.path()).unwrap();
        told_of_fall_back(dir.path()).unwrap();
        filled(dir.path(), 70);
        let (store, opened) = Embedded::open(dir.path()).unwrap();
        assert_eq!((opened.fell_back, store.revision()), (None, Revision(70)));
    }

    #[test]
    fn a_ledger_of_which_no_copy_is_good_is_not_taken_for_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        for to in [20, 40, 60] {
            filled(dir.path(), to);
            Embedded::open(dir.path()).unwrap().0.checkpoint().unwrap();
        }
        fs::remove_dir_all(dir.path().join("sled")).unwrap();
        for (_, export) in export::list(&dir.path().join("exports")).unwrap() {
            flip(&export, 30);
        }
        for _ in 0..2 {
            let lost = Embedded::open(dir.path()).map(|_| ()).unwrap_err();
            assert!(matches!(lost, StoreError::Lost { .. }));
            assert!(lost.to_string().contains("berthd restore"), "{lost}");
        }
        assert!(!fs::read_dir(dir.path().join("journal")).unwrap().any(|entry| {
            entry.is_ok_and(|e| e.path().extension().is_some_and(|e| e == "damaged"))
        }));
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
        let newest = export::list(&dir.path().join("exports")).unwrap().pop().unwrap().1;
        fs::write(newest, b"nothing").unwrap();
        let (store, opened) = Embedded::open(dir.path()).unwrap();
        assert_eq!(store.load(b"").unwrap(), before);
        assert_eq!(opened.fell_back, None);
    }

    #[test]
    fn a_sled_that_hangs_holds_up_no_commit_and_is_made_anew_at_the_next_start() {
        use crate::store::follower::tests::{SHORT, puppet};
        let dir = tempfile::tempdir().unwrap();
        let before = filled(dir.path(), 60);
        let (mut store, _) = Embedded::open(dir.path()).unwrap();
        assert_eq!(store.load(b"").unwrap(), before);
        store.checkpoint().unwrap();
        let (hangs, _say, calls) = puppet();
        store.behind = Behind::Follows(Follower::start(hangs, SHORT).unwrap());
        store.commit(&[batch(61)]).unwrap();
        assert_eq!(calls.recv().unwrap(), [61]);
        let left = fs::metadata(dir.path().join("sled/db")).unwrap().modified().unwrap();
        store.checkpoint().unwrap();
        assert!(matches!(store.behind, Behind::Hung));
        for revision in 62..=80 {
            store.commit(&[batch(revision)]).unwrap();
        }
        store.checkpoint().unwrap();
        let file = fs::metadata(dir.path().join("sled/db")).unwrap();
        assert_eq!(file.modified().unwrap(), left, "its files are not touched");
        let all = store.load(b"").unwrap();
        drop(store);
        let (store, opened) = Embedded::open(dir.path()).unwrap();
        assert!(opened.rebuilt.is_some());
        assert_eq!((opened.fell_back, store.revision()), (None, Revision(80)));
        assert_eq!(store.load(b"").unwrap(), all);
    }

    #[test]
    fn a_sled_that_failed_is_made_anew_at_the_next_checkpoint() {
        use crate::store::follower::tests::{SHORT, puppet};
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Embedded::open(dir.path()).unwrap();
        let (fails, say, _calls) = puppet();
        say.send(Err(StoreError::Full)).unwrap();
        store.behind = Behind::Follows(Follower::start(fails, SHORT).unwrap());
        for revision in 1..=30 {
            store.commit(&[batch(revision)]).unwrap();
        }
        store.checkpoint().unwrap();
        assert!(matches!(store.behind, Behind::Follows(_)));
        let all = store.load(b"").unwrap();
        drop(store);
        let (_, sled) =
            Sled::open(&dir.path().join("sled"), OPENING).map(|(s, e)| (drop(s), e)).unwrap();
        assert_eq!(sled.load(b"").collect::<Vec<_>>(), all);
    }
}
