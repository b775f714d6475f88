//! A folder of blobs: those that are whole under their digest, those on their way beside a journal of
//! the chunks that are durable.
//!
//! A journal's record is the chunk's number and the CRC of its bytes as they came; it is written after
//! the chunk was synced, and believed only when the chunk still has that CRC. So neither a kill nor a
//! power cut nor a rotten sector makes a wrong byte count as held. Everything here blocks: it is
//! called on threads where that is allowed.

use berth_agent_core::transfer::{Blob, CHUNK_BYTES, Held};
use berth_proto::ids::Digest;
use bytes::Bytes;
use sha2::Digest as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// What is read at once when a file is checked.
const READ: usize = 256 * 1024;
/// A journal's record: chunk, CRC of the chunk, CRC of both.
const RECORD: usize = 12;

/// A folder of blobs.
#[derive(Debug, Clone)]
pub struct Spool {
    folder: PathBuf,
}

/// A blob that is being written.
#[derive(Debug)]
pub struct Writing {
    data: File,
    journal: File,
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn gone_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn record(chunk: u64, crc: u32) -> io::Result<[u8; RECORD]> {
    let chunk = u32::try_from(chunk).map_err(io::Error::other)?;
    let mut bytes = [0; RECORD];
    bytes[..4].copy_from_slice(&chunk.to_le_bytes());
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    let sum = crc32c::crc32c(&bytes[..8]).to_le_bytes();
    bytes[8..].copy_from_slice(&sum);
    Ok(bytes)
}

fn records(bytes: &[u8]) -> BTreeMap<u64, u32> {
    let mut found = BTreeMap::new();
    for record in bytes.chunks_exact(RECORD) {
        let word = |at: usize| {
            u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        if crc32c::crc32c(&record[..8]) == word(8) {
            found.insert(u64::from(word(0)), word(4));
        }
    }
    found
}

impl Spool {
    /// The folder, made when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Where a whole blob is.
    #[must_use]
    pub fn whole(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    /// Where a blob's bytes are while they come.
    #[must_use]
    pub fn partial(&self, digest: &Digest) -> PathBuf {
        self.folder.join(format!("{}.partial", digest.hex()))
    }

    fn journal(&self, digest: &Digest) -> PathBuf {
        self.folder.join(format!("{}.chunks", digest.hex()))
    }

    /// The folder itself.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What is held of a blob: chunks that have changed since they came are not. The journal may be
    /// replaced: whoever has the blob open for writing opens it again.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn look(&self, blob: &Blob) -> io::Result<Held> {
        let whole = self.whole(&blob.digest);
        match fs::metadata(&whole) {
            Ok(meta) if meta.len() == blob.size_bytes => return Ok(Held::Whole),
            Ok(_) => fs::remove_file(&whole)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let journal = self.journal(&blob.digest);
        let (Ok(said), Ok(data)) = (fs::read(&journal), File::open(self.partial(&blob.digest)))
        else {
            return Ok(Held::Chunks(BTreeSet::new()));
        };
        let (said, length) = (records(&said), said.len());
        let mut good = BTreeMap::new();
        let mut buffer = vec![0; READ];
        for (chunk, crc) in &said {
            let start = chunk * CHUNK_BYTES;
            if start < blob.size_bytes {
                let end = (start + CHUNK_BYTES).min(blob.size_bytes);
                if crc_of(&data, start, end, &mut buffer)? == Some(*crc) {
                    good.insert(*chunk, *crc);
                }
            }
        }
        // Also what a torn record has left at the end: nothing behind it could be read.
        if good.len() * RECORD != length {
            let fresh = journal.with_extension("fresh");
            let mut file = File::create(&fresh)?;
            for (chunk, crc) in &good {
                file.write_all(&record(*chunk, *crc)?)?;
            }
            file.sync_all()?;
            fs::rename(&fresh, &journal)?;
        }
        Ok(Held::Chunks(good.into_keys().collect()))
    }

    /// Opens a blob for writing; what it holds stays.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&self, digest: &Digest) -> io::Result<Writing> {
        let open = |path: PathBuf, append: bool| {
            let mut options = OpenOptions::new();
            options.create(true).read(true);
            if append {
                options.append(true)
            } else {
                options.write(true)
            };
            options.open(path)
        };
        let data = open(self.partial(digest), false)?;
        let journal = open(self.journal(digest), true)?;
        sync_folder(&self.folder)?;
        Ok(Writing { data, journal })
    }

    /// Whether a blob's bytes are what its digest says.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn verify(&self, blob: &Blob) -> io::Result<bool> {
        let mut data = match File::open(self.partial(&blob.digest)) {
            Ok(data) => data,
            // A blob of no bytes was never written.
            Err(error) if error.kind() == io::ErrorKind::NotFound && blob.size_bytes == 0 => {
                self.write(&blob.digest)?.data
            }
            Err(error) => return Err(error),
        };
        let mut hash = sha2::Sha256::new();
        let mut buffer = vec![0; READ];
        let mut size = 0;
        loop {
            match data.read(&mut buffer)? {
                0 => break,
                n => {
                    size += n as u64;
                    hash.update(&buffer[..n]);
                }
            }
        }
        let right = Digest::from_sha256(&hash.finalize().into()) == blob.digest;
        Ok(right && size == blob.size_bytes)
    }

    /// Gives a verified blob its final name.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn keep(&self, digest: &Digest) -> io::Result<()> {
        let partial = self.partial(digest);
        File::open(&partial)?.sync_all()?;
        fs::rename(&partial, self.whole(digest))?;
        gone_is_done(fs::remove_file(self.journal(digest)))?;
        sync_folder(&self.folder)
    }

    /// Throws away all that is held of a blob on its way.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn discard(&self, digest: &Digest) -> io::Result<()> {
        gone_is_done(fs::remove_file(self.journal(digest)))?;
        gone_is_done(fs::remove_file(self.partial(digest)))
    }

    /// Throws away a blob, whole or not.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn drop_blob(&self, digest: &Digest) -> io::Result<()> {
        self.discard(digest)?;
        gone_is_done(fs::remove_file(self.whole(digest)))
    }
}

/// The CRC of a part of a file; `None`: it ends before.
fn crc_of(data: &File, start: u64, end: u64, buffer: &mut [u8]) -> io::Result<Option<u32>> {
    let (mut at, mut crc) = (start, 0);
    while at < end {
        let most = usize::try_from(end - at).unwrap_or(READ).min(buffer.len());
        match data.read_at(&mut buffer[..most], at)? {
            0 => return Ok(None),
            n => {
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                at += n as u64;
            }
        }
    }
    Ok(Some(crc))
}

impl Writing {
    /// Writes pieces one behind the other from `at` on.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn pieces(&self, mut at: u64, pieces: &[Bytes]) -> io::Result<()> {
        for piece in pieces {
            self.data.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a chunk durable, whose bytes have this CRC.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn persist(&self, chunk: u64, crc: u32) -> io::Result<()> {
        self.data.sync_data()?;
        (&self.journal).write_all(&record(chunk, crc)?)?;
        self.journal.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_it_came_counts_as_held() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        let bytes: Vec<u8> = (0..CHUNK_BYTES + 100).map(|i| (i % 251) as u8).collect();
        let blob = Blob { digest: Digest::of(&bytes), size_bytes: bytes.len() as u64 };
        let writing = spool.write(&blob.digest).unwrap();
        let (first, second) = bytes.split_at(CHUNK_BYTES as usize);
        let both = [Bytes::copy_from_slice(first), Bytes::copy_from_slice(second)];
        writing.pieces(0, &both).unwrap();
        writing.persist(0, crc32c::crc32c(first)).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0].into()));
        writing.persist(1, crc32c::crc32c(second)).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0, 1].into()));
        assert!(spool.verify(&blob).unwrap());

        writing.data.write_all_at(b"!", 17).unwrap();
        assert!(!spool.verify(&blob).unwrap());
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([1].into()));
        let writing = spool.write(&blob.digest).unwrap();
        writing.pieces(0, &both[..1]).unwrap();
        writing.persist(0, crc32c::crc32c(first)).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0, 1].into()));
        // A torn record at the end is no record, and what comes after it is read.
        spool.discard(&blob.digest).unwrap();
        let writing = spool.write(&blob.digest).unwrap();
        writing.pieces(0, &both).unwrap();
        writing.persist(0, crc32c::crc32c(first)).unwrap();
        (&writing.journal).write_all(&[1, 2, 3]).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0].into()));
        let writing = spool.write(&blob.digest).unwrap();
        writing.persist(1, crc32c::crc32c(second)).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0, 1].into()));
        spool.keep(&blob.digest).unwrap();
        assert_eq!(spool.look(&blob).unwrap(), Held::Whole);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
