//! The journal of batches: the durable truth.
//!
//! A folder of segments. A segment is a header (magic, format, the revision before its first) and
//! records: length, CRC-32C over all that follows, revision, the place in the segment where the
//! record's group begins, operations. A group is what one `fdatasync` makes durable: it is appended,
//! then synced, then acknowledged. What a power cut leaves of the last group nobody was told of is a
//! torn tail, and is cut off. A bad record before the last group, which the later groups tell, was
//! acknowledged: that is damage, as is a bad record in any but the last segment, and is said so.

use super::folder::{io, is_full, sync_folder};
use super::{StoreError, memory};
use berth_proto::ids::Revision;
use berth_server_core::batching::Batch;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"BRTHJRN2";
const HEADER: u64 = 16;
/// A new segment begins after so many bytes: a checkpoint then frees disk in useful pieces.
const SEGMENT: u64 = 16 * 1024 * 1024;
/// No record is longer: a batch has at most 3 MiB, and its lengths fit beside it.
const MAX_RECORD: u32 = 4 * 1024 * 1024;

/// The journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    file: File,
    path: PathBuf,
    length: u64,
    revision: Revision,
}

/// What was found when a journal was read.
#[derive(Debug, Default)]
pub struct Read {
    /// Batches after the asked-for revision, in order.
    pub batches: Vec<Batch>,
    /// There is damage, and batches from this revision on are missing or unreadable.
    pub damaged_from: Option<Revision>,
}

fn encode(batch: &Batch, group: u64, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&batch.revision.0.to_le_bytes());
    out.extend_from_slice(&group.to_le_bytes());
    let put = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(bytes);
    };
    for (key, value) in &batch.ops {
        out.push(u8::from(value.is_some()));
        put(out, key);
        if let Some(value) = value {
            put(out, value);
        }
    }
    let crc = crc32c::crc32c(&out[start + 8..]);
    let length = u32::try_from(out.len() - start - 8).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

fn decode(payload: &[u8]) -> Option<Batch> {
    fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
        let (head, tail) = bytes.split_at_checked(n)?;
        *bytes = tail;
        Some(head)
    }
    fn sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let n = u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?);
        take(bytes, n as usize)
    }
    let mut rest = payload;
    let revision = Revision(u64::from_le_bytes(take(&mut rest, 8)?.try_into().ok()?));
    take(&mut rest, 8)?;
    let mut ops = Vec::new();
    while !rest.is_empty() {
        let put = take(&mut rest, 1)?[0] == 1;
        let key = sized(&mut rest)?.to_vec();
        let value = if put { Some(sized(&mut rest)?.to_vec()) } else { None };
        ops.push((key, value));
    }
    Some(Batch { revision, ops })
}

/// The payload of the record that begins at `at`, when it is whole.
fn record(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let head = bytes.get(at..at + 8)?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let crc = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    if !(16..=MAX_RECORD).contains(&length) {
        return None;
    }
    let payload = bytes.get(at + 8..at + 8 + length as usize)?;
    (crc32c::crc32c(payload) == crc).then_some(payload)
}

/// Records of a segment's bytes after its header: batches, each with where it ends.
fn records(bytes: &[u8]) -> Vec<(Batch, usize)> {
    let mut batches = Vec::new();
    let mut at = 0;
    while let Some(payload) = record(bytes, at) {
        let Some(batch) = decode(payload) else { break };
        at += 8 + payload.len();
        batches.push((batch, at));
    }
    batches
}

/// Whether a later group stands behind a bad place, so that what was there had been acknowledged.
fn is_followed(bytes: &[u8], bad: usize) -> bool {
    (bad + 1..bytes.len().saturating_sub(24)).any(|at| {
        // The group is looked at before the checksum is worked out: this runs over every byte.
        let group = bytes[at + 16..at + 24].try_into().map_or(0, u64::from_le_bytes);
        let begins = HEADER + (bad as u64) < group && group <= HEADER + at as u64;
        begins && record(bytes, at).is_some()
    })
}

fn segments(folder: &Path) -> Result<Vec<(Revision, PathBuf)>, StoreError> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).map_err(io("read the folder", folder))? {
        let path = entry.map_err(io("read the folder", folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(number) = name.strip_suffix(".journal").and_then(|n| n.parse().ok()) {
            all.push((Revision(number), path));
        }
    }
    all.sort();
    Ok(all)
}

/// Leaves what is damaged, and what follows it, for a person to look at under another name. The good
/// beginning of the damaged segment stays under its own: what was acknowledged and is read now must be
/// there to be read at every later start, too.
fn put_aside(
    all: &[(Revision, PathBuf)],
    damaged: &Path,
    good_bytes: u64,
) -> Result<(), StoreError> {
    for (_, path) in all.iter().skip_while(|(_, path)| path != damaged) {
        let aside = path.with_extension("damaged");
        if path == damaged && good_bytes > HEADER {
            fs::copy(path, &aside).map_err(io("copy", path))?;
            let file = OpenOptions::new().write(true).open(path).map_err(io("open", path))?;
            file.set_len(good_bytes)
                .and_then(|()| file.sync_all())
                .map_err(io("cut the damaged end of", path))?;
        } else {
            fs::rename(path, &aside).map_err(io("put aside", path))?;
        }
    }
    Ok(())
}

/// Whether there is a journal that does not begin with the first revision: it goes on from something
/// that was there.
///
/// # Errors
/// When the folder cannot be read.
pub fn goes_on(folder: &Path) -> Result<bool, StoreError> {
    if !folder.exists() {
        return Ok(false);
    }
    Ok(segments(folder)?.first().is_some_and(|(first, _)| *first > Revision(0)))
}

impl Journal {
    /// Reads all batches after `after`, cuts a torn tail off, and opens for appending. Where something
    /// acknowledged is damaged, `before_damage` is called before anything is changed; what follows the
    /// damage is then put aside, and the good beginning stays to be read again.
    ///
    /// # Errors
    /// When files cannot be read or written.
    pub fn open(
        folder: &Path,
        after: Revision,
        before_damage: impl FnOnce(Revision) -> Result<(), StoreError>,
    ) -> Result<(Self, Read), StoreError> {
        fs::create_dir_all(folder).map_err(io("make the folder", folder))?;
        let all = segments(folder)?;
        let mut read = Read::default();
        let mut revision = after;
        let mut last_good: Option<(PathBuf, u64)> = None;
        let mut damaged: Option<(PathBuf, u64)> = None;
        for (i, (first, path)) in all.iter().enumerate() {
            let is_last = i + 1 == all.len();
            let mut bytes = Vec::new();
            File::open(path)
                .and_then(|mut f| f.read_to_end(&mut bytes))
                .map_err(io("read", path))?;
            let header_good = bytes.len() as u64 >= HEADER
                && &bytes[..8] == MAGIC
                && bytes[8..16] == first.0.to_le_bytes();
            if !header_good {
                if is_last && bytes.len() as u64 <= HEADER {
                    // Made, and not yet written, when the power went: nothing was in it.
                    fs::remove_file(path).map_err(io("remove", path))?;
                    continue;
                }
                read.damaged_from = Some(revision.next());
                damaged = Some((path.clone(), 0));
                break;
            }
            let mut whole = HEADER;
            for (batch, end) in records(&bytes[16..]) {
                if batch.revision > revision.next() {
                    read.damaged_from = Some(revision.next());
                    break;
                }
                whole = HEADER + end as u64;
                if batch.revision > revision {
                    revision = batch.revision;
                    read.batches.push(batch);
                }
            }
            if read.damaged_from.is_some() {
                damaged = Some((path.clone(), whole));
                break;
            }
            let torn = whole < bytes.len() as u64;
            if torn && (!is_last || is_followed(&bytes[16..], (whole - HEADER) as usize)) {
                read.damaged_from = Some(revision.next());
                damaged = Some((path.clone(), whole));
                break;
            }
            last_good = Some((path.clone(), whole));
        }
        let journal = match (last_good, read.damaged_from) {
            (Some((path, length)), None) => {
                let mut file =
                    OpenOptions::new().write(true).open(&path).map_err(io("open", &path))?;
                file.set_len(length)
                    .and_then(|()| file.sync_all())
                    .and_then(|()| file.seek(SeekFrom::Start(length)))
                    .map_err(io("cut the torn end of", &path))?;
                Self { folder: folder.to_owned(), file, path, length, revision }
            }
            (_, Some(from)) => {
                before_damage(from)?;
                let (bad, good) = damaged.unwrap_or_default();
                put_aside(&all, &bad, good)?;
                Self::fresh(folder, revision)?
            }
            (None, None) => Self::fresh(folder, revision)?,
        };
        Ok((journal, read))
    }

    fn fresh(folder: &Path, revision: Revision) -> Result<Self, StoreError> {
        let path = folder.join(format!("{:020}.journal", revision.0));
        if path.exists() {
            let aside = path.with_extension("damaged");
            fs::rename(&path, &aside).map_err(io("put aside", &path))?;
        }
        let mut file = File::create(&path).map_err(io("make", &path))?;
        let written = file
            .write_all(MAGIC)
            .and_then(|()| file.write_all(&revision.0.to_le_bytes()))
            .and_then(|()| file.sync_all());
        if let Err(error) = written {
            let _ = fs::remove_file(&path);
            return Err(io("write", &path)(error));
        }
        sync_folder(folder)?;
        Ok(Self { folder: folder.to_owned(), file, path, length: HEADER, revision })
    }

    /// The newest revision in it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Appends batches and makes them durable.
    ///
    /// # Errors
    /// [`StoreError::Full`] when nothing of them is left in the file.
    pub fn append(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        memory::check(self.revision, batches)?;
        if self.length >= SEGMENT {
            *self = Self::fresh(&self.folder, self.revision)?;
        }
        let mut bytes = Vec::new();
        for batch in batches {
            encode(batch, self.length, &mut bytes);
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => {
                self.length += bytes.len() as u64;
                self.revision = batches.last().map_or(self.revision, |b| b.revision);
                Ok(())
            }
            Err(error) if is_full(&error) => {
                // Take back what did get in, so that the next append stands at a record's edge.
                self.file
                    .set_len(self.length)
                    .and_then(|()| self.file.seek(SeekFrom::Start(self.length)))
                    .and_then(|_| self.file.sync_data())
                    .map_err(|source| StoreError::Io {
                        doing: "take back a write to",
                        path: self.path.clone(),
                        source,
                    })?;
                Err(StoreError::Full)
            }
            Err(source) => {
                Err(StoreError::Io { doing: "append to", path: self.path.clone(), source })
            }
        }
    }

    /// Removes segments that hold nothing after `revision`.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn forget(&mut self, revision: Revision) -> Result<(), StoreError> {
        let all = segments(&self.folder)?;
        for pair in all.windows(2) {
            // A segment ends where the next one begins.
            if pair[1].0 <= revision && pair[0].1 != self.path {
                fs::remove_file(&pair[0].1).map_err(io("remove", &pair[0].1))?;
            }
        }
        sync_folder(&self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(folder: &Path, after: u64) -> Result<(Journal, Read), StoreError> {
        Journal::open(folder, Revision(after), |_| Ok(()))
    }

    fn batch(revision: u64, size: usize) -> Batch {
        Batch {
            revision: Revision(revision),
            ops: vec![
                (format!("k{revision}").into_bytes(), Some(vec![7; size])),
                (b"x".to_vec(), None),
            ],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_torn_tail_loses_only_what_is_torn(sizes in prop::collection::vec(0_usize..300, 1..12), cut in 0_u64..5_000) {
            let dir = tempfile::tempdir().unwrap();
            let (mut journal, _) = open(dir.path(), 0).unwrap();
            let mut ends = vec![HEADER];
            for (i, size) in sizes.iter().enumerate() {
                journal.append(&[batch(i as u64 + 1, *size)]).unwrap();
                ends.push(journal.length);
            }
            let path = journal.path.clone();
            drop(journal);
            let cut = cut.min(*ends.last().unwrap()).max(HEADER);
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            let (mut journal, read) = open(dir.path(), 0).unwrap();
            prop_assert_eq!(read.batches.len(), whole);
            prop_assert_eq!(read.damaged_from, None);
            // And it goes on from there.
            journal.append(&[batch(whole as u64 + 1, 3)]).unwrap();
            drop(journal);
            let (_, read) = open(dir.path(), 0).unwrap();
            prop_assert_eq!(read.batches.len(), whole + 1);
        }
    }

    #[test]
    fn damage_before_the_last_group_is_no_torn_tail() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 0).unwrap();
        journal.append(&[batch(1, 100)]).unwrap();
        let second = journal.length;
        journal.append(&[batch(2, 100)]).unwrap();
        let third = journal.length;
        journal.append(&[batch(3, 100), batch(4, 100)]).unwrap();
        let path = journal.path.clone();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        let damaged_at = |at: u64| {
            let mut bytes = whole.clone();
            bytes[usize::try_from(at).unwrap() + 40] ^= 1;
            fs::write(&path, bytes).unwrap();
            let (_, read) = open(dir.path(), 0).unwrap();
            for entry in fs::read_dir(dir.path()).unwrap() {
                fs::remove_file(entry.unwrap().path()).unwrap();
            }
            (read.batches.len(), read.damaged_from)
        };
        // Group 3 tells that group 2 was acknowledged.
        assert_eq!(damaged_at(second), (1, Some(Revision(2))));
        // Of the last group nobody was told, wherever in it the power went.
        assert_eq!(damaged_at(third), (2, None));
    }

    #[test]
    fn damage_before_the_last_segment_is_named_and_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 0).unwrap();
        journal.append(&[batch(1, 10), batch(2, 10)]).unwrap();
        let first = journal.path.clone();
        journal = Journal::fresh(dir.path(), Revision(2)).unwrap();
        journal.append(&[batch(3, 10)]).unwrap();
        drop(journal);
        let mut bytes = fs::read(&first).unwrap();
        let end = bytes.len() - 1;
        bytes[end] ^= 1;
        fs::write(&first, bytes).unwrap();
        let mut told = None;
        let told_first = |from| {
            told = Some((from, segments(dir.path()).unwrap().len()));
            Ok(())
        };
        let (mut journal, read) = Journal::open(dir.path(), Revision(0), told_first).unwrap();
        assert_eq!(read.damaged_from, Some(Revision(2)));
        assert_eq!(told, Some((Revision(2), 2)), "told before anything was put aside");
        assert_eq!((read.batches.len(), journal.revision()), (1, Revision(1)));
        // What is acknowledged from now on is there at the next start, and so is what was good.
        journal.append(&[batch(2, 20)]).unwrap();
        drop(journal);
        for _ in 0..2 {
            let (journal, read) = open(dir.path(), 0).unwrap();
            assert_eq!(read.damaged_from, None);
            assert_eq!((read.batches.len(), journal.revision()), (2, Revision(2)));
        }
        let aside = |entry: std::io::Result<fs::DirEntry>| {
            entry.is_ok_and(|e| e.path().extension().is_some_and(|e| e == "damaged"))
        };
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().filter_map(|e| aside(e).then_some(())).count(),
            2
        );
    }

    #[test]
    fn a_journal_that_cannot_be_marked_as_damaged_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 0).unwrap();
        journal.append(&[batch(1, 10)]).unwrap();
        drop(journal);
        let refuses = |_| Err(StoreError::Full);
        assert!(
            matches!(Journal::open(dir.path(), Revision(0), refuses), Ok((_, read)) if read.damaged_from.is_none())
        );
        // It goes on from revision 5, and 2 to 5 are nowhere.
        fs::rename(dir.path().join(format!("{:020}.journal", 0)), dir.path().join("elsewhere"))
            .unwrap();
        let (mut journal, _) = open(dir.path(), 5).unwrap();
        journal.append(&[batch(6, 10)]).unwrap();
        drop(journal);
        let refuses = |_| Err(StoreError::Full);
        assert!(matches!(Journal::open(dir.path(), Revision(1), refuses), Err(StoreError::Full)));
        let (journal, read) = open(dir.path(), 5).unwrap();
        assert_eq!((read.batches.len(), journal.revision()), (1, Revision(6)));
        assert!(goes_on(dir.path()).unwrap());
    }

    #[test]
    fn a_batch_that_does_not_follow_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 0).unwrap();
        assert!(matches!(journal.append(&[batch(2, 1)]), Err(StoreError::OutOfOrder { .. })));
    }

    #[test]
    fn segments_before_an_export_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 0).unwrap();
        journal.append(&[batch(1, 10)]).unwrap();
        journal = Journal::fresh(dir.path(), Revision(1)).unwrap();
        journal.append(&[batch(2, 10)]).unwrap();
        journal.forget(Revision(1)).unwrap();
        assert_eq!(segments(dir.path()).unwrap().len(), 1);
        let (_, read) = open(dir.path(), 1).unwrap();
        assert_eq!(read.batches.len(), 1);
    }
}
