//! Exports: all entries in one file, with a checksum, from which the materialised store is made anew.

use super::memory::Memory;
use super::{Entry, StoreError};
use berth_proto::ids::Revision;
use std::fs;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"BRTHEXP1";

fn broken(error: impl std::fmt::Display) -> StoreError {
    StoreError::Materialised(error.to_string())
}

/// All entries as one file's bytes.
///
/// # Errors
/// When a key or value is too long for its length to be told.
pub(super) fn encode(entries: &Memory) -> Result<Vec<u8>, StoreError> {
    let mut plain = entries.revision().0.to_le_bytes().to_vec();
    for entry in entries.load(b"") {
        for bytes in [&entry.key[..], &entry.revision.0.to_le_bytes(), &entry.value[..]] {
            plain.extend_from_slice(&u32::try_from(bytes.len()).map_err(broken)?.to_le_bytes());
            plain.extend_from_slice(bytes);
        }
    }
    let packed = zstd::bulk::compress(&plain, 3).map_err(broken)?;
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&crc32c::crc32c(&plain).to_le_bytes());
    out.extend_from_slice(&(plain.len() as u64).to_le_bytes());
    out.extend_from_slice(&packed);
    Ok(out)
}

/// The entries of an export's file, before they are read; `None`: it is damaged.
fn plain(bytes: &[u8]) -> Option<Vec<u8>> {
    let head = bytes.get(..20)?;
    if &head[..8] != MAGIC {
        return None;
    }
    let crc = u32::from_le_bytes(head[8..12].try_into().ok()?);
    let length = usize::try_from(u64::from_le_bytes(head[12..20].try_into().ok()?)).ok()?;
    let plain = zstd::bulk::decompress(&bytes[20..], length).ok()?;
    (crc32c::crc32c(&plain) == crc).then_some(plain)
}

/// The revision of an export that is whole; `None`: it is damaged.
pub(super) fn revision(bytes: &[u8]) -> Option<Revision> {
    let plain = plain(bytes)?;
    Some(Revision(u64::from_le_bytes(plain.get(..8)?.try_into().ok()?)))
}

/// What an export holds; `None`: it is damaged.
pub(super) fn decode(bytes: &[u8]) -> Option<Memory> {
    let plain = plain(bytes)?;
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

/// The exports in a folder, oldest first.
///
/// # Errors
/// Never so far: a folder that is not there has none.
pub(super) fn list(folder: &Path) -> Result<Vec<(Revision, PathBuf)>, StoreError> {
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

/// The newest export that is not damaged.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn newest(folder: &Path) -> Result<Option<Memory>, StoreError> {
    for (_, path) in list(folder)?.into_iter().rev() {
        match fs::read(&path).ok().as_deref().and_then(decode) {
            Some(entries) => return Ok(Some(entries)),
            None => {
                tracing::error!(path = %path.display(), "an export is damaged; trying an older one")
            }
        }
    }
    Ok(None)
}
