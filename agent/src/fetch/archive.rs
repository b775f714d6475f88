//! Unpacks a model's archive into a folder, by its own reading of tar.
//!
//! Written for bytes that nobody vouches for: names stay inside the folder, nothing but files and
//! folders is made, nothing is overwritten, and whatever an archive says of an entry ahead of it (long
//! names, extended attributes) is bounded before it is read. A library that reads those whole would
//! take as much memory as the archive claims. No file is left out in silence: an archive ends with a
//! block of zeros, and no other begins behind it.

use super::artifact::{MAX_FILES, inside, readable};
use super::client::FetchError;
use berth_agent_core::transfer::Failure;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};
use tar::{EntryType, Header, PaxExtensions};

/// Of what an archive says of one entry ahead of it. A path on Linux has 4 KiB.
const MAX_SAID: u64 = 64 * 1024;
/// Headers and padding come in blocks of so many bytes.
const BLOCK: u64 = 512;

/// How many bytes may come out of an archive, and why no more.
#[derive(Debug, Clone, Copy)]
pub struct Most {
    /// More than that is a bomb.
    pub bytes: u64,
    /// More than that the disk does not take.
    pub room_bytes: u64,
}

/// The bytes of an archive, counted.
struct Bounded<R> {
    inner: R,
    most: Most,
    came: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.came = self.came.saturating_add(n as u64);
        if self.came > self.most.bytes.min(self.most.room_bytes) {
            return Err(io::Error::other("the model's archive holds more than it may"));
        }
        Ok(n)
    }
}

/// What an archive has said of the next entry.
#[derive(Default)]
struct Said {
    name: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Said {
    /// Takes the records of an extended header.
    fn extended(&mut self, records: &[u8]) -> Result<(), FetchError> {
        for one in PaxExtensions::new(records) {
            let one = one?;
            match one.key() {
                // A name of GNU's own goes before.
                Ok("path") if self.name.is_none() => self.name = Some(one.value_bytes().to_vec()),
                Ok("size") => {
                    let size = one.value().ok().and_then(|v| v.parse().ok());
                    self.size = Some(size.ok_or_else(|| unusable("has an entry of no size"))?);
                }
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }
}

fn unusable(what: &str) -> FetchError {
    FetchError::Unusable(format!("the model's archive {what}"))
}

/// Unpacks an archive; `files` counts over all archives of a model.
///
/// # Errors
/// When it is none, leaves the folder, holds more than it may, or the disk does not take it.
pub fn unpack(
    archive: impl Read,
    most: Most,
    folder: &Path,
    files: &mut usize,
) -> Result<(), FetchError> {
    let mut archive = Bounded { inner: archive, most, came: 0 };
    let unpacked = all(&mut archive, folder, files);
    match unpacked {
        Err(FetchError::Disk(_)) if archive.came > most.room_bytes => {
            let (need_bytes, free_bytes) = (archive.came, most.room_bytes);
            Err(FetchError::Transfer(Failure::NoRoom { need_bytes, free_bytes }))
        }
        other => other,
    }
}

fn all(archive: &mut impl Read, folder: &Path, files: &mut usize) -> Result<(), FetchError> {
    let mut said = Said::default();
    while let Some(header) = header(archive)? {
        let size = header.entry_size()?;
        let kind = header.entry_type();
        if kind.is_gnu_longname() {
            let mut name = small(archive, size)?;
            while name.last() == Some(&0) {
                name.pop();
            }
            said.name = Some(name);
        } else if kind.is_pax_local_extensions() {
            said.extended(&small(archive, size)?)?;
        } else if kind.is_gnu_longlink() || kind.is_pax_global_extensions() {
            // Said of a link, which is refused when it comes, or of all entries and of no use here.
            small(archive, size)?;
        } else {
            let said = std::mem::take(&mut said);
            let name = said.name.unwrap_or_else(|| header.path_bytes().into_owned());
            one(archive, &name, kind, said.size.unwrap_or(size), folder, files)?;
        }
    }
    // Two blocks of zeros are the end, after which anything may fill the last record. One is taken as
    // well, as other programs do: it stands for no file.
    while let Some(block) = block(archive)? {
        if is_header(&block) {
            return Err(unusable("has another one behind its end"));
        }
    }
    Ok(())
}

/// One file or folder.
fn one(
    archive: &mut impl Read,
    name: &[u8],
    kind: EntryType,
    size: u64,
    folder: &Path,
    files: &mut usize,
) -> Result<(), FetchError> {
    let named = Path::new(OsStr::from_bytes(name));
    let leaves = || {
        FetchError::Unusable(format!(
            "the model's archive has an entry that leaves its folder or is no file: {}",
            named.display()
        ))
    };
    let Some(path) = named.to_str().and_then(inside) else {
        // The folder itself is no way out.
        if named.components().all(|c| c == Component::CurDir) && kind.is_dir() {
            return Ok(skip_padded(archive, size)?);
        }
        return Err(leaves());
    };
    let to = folder.join(path);
    if kind.is_dir() {
        std::fs::create_dir_all(&to)?;
        return Ok(skip_padded(archive, size)?);
    }
    if !kind.is_file() {
        return Err(leaves());
    }
    *files += 1;
    if *files > MAX_FILES {
        return Err(FetchError::Unusable("the model has too many files".to_owned()));
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // Made anew: nothing is followed, nothing is overwritten.
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&to)?;
    if io::copy(&mut archive.take(size), &mut file)? != size {
        return Err(unusable("ends in the middle of a file"));
    }
    skip(archive, padding(size))?;
    Ok(readable(&to)?)
}

/// Bytes up to the next block.
fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}

/// Skips an entry's content and what fills its last block.
fn skip_padded(archive: &mut impl Read, size: u64) -> io::Result<()> {
    skip(archive, size)?;
    skip(archive, padding(size))
}

fn skip(archive: &mut impl Read, bytes: u64) -> io::Result<()> {
    match io::copy(&mut archive.take(bytes), &mut io::sink())? == bytes {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The next block; `None`: no whole one is left.
fn block(archive: &mut impl Read) -> io::Result<Option<Header>> {
    let mut block = Header::new_old();
    match archive.read_exact(block.as_mut_bytes()) {
        Ok(()) => Ok(Some(block)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a block says of itself that it is a header.
fn is_header(block: &Header) -> bool {
    // The sum counts its own field as spaces.
    let sum = block.as_bytes().iter().enumerate().map(|(i, byte)| match i {
        148..156 => u32::from(b' '),
        _ => u32::from(*byte),
    });
    let sum = sum.sum::<u32>();
    block.cksum().is_ok_and(|said| said == sum)
}

/// The next header; `None`: the archive says that it is over.
fn header(archive: &mut impl Read) -> Result<Option<Header>, FetchError> {
    let header = block(archive)?.ok_or_else(|| unusable("ends without saying that it does"))?;
    if header.as_bytes().iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    if !is_header(&header) {
        return Err(unusable("is none"));
    }
    Ok(Some(header))
}

/// What is said of an entry ahead of it.
fn small(archive: &mut impl Read, size: u64) -> Result<Vec<u8>, FetchError> {
    if size > MAX_SAID {
        return Err(unusable("says more of an entry than it may"));
    }
    let mut bytes = Vec::new();
    archive.take(size).read_to_end(&mut bytes)?;
    skip(archive, padding(size))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(path: &str, kind: EntryType) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(2);
        header.set_mode(0o644);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &b"hi"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    const ANY: Most = Most { bytes: u64::MAX, room_bytes: u64::MAX };

    #[test]
    fn an_archive_cannot_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        for (path, kind) in [
            ("../escape", EntryType::Regular),
            ("/absolute", EntryType::Regular),
            ("a/../../b", EntryType::Regular),
            ("link", EntryType::Symlink),
            ("hard", EntryType::Link),
            ("device", EntryType::Char),
            ("sparse", EntryType::GNUSparse),
        ] {
            let bytes = archive(path, kind);
            assert!(unpack(&bytes[..], ANY, dir.path(), &mut 0).is_err(), "{path}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let good = archive("./sub/file", EntryType::Regular);
        unpack(&good[..], ANY, dir.path(), &mut 0).unwrap();
        assert_eq!(std::fs::read(dir.path().join("sub/file")).unwrap(), b"hi");
        assert!(unpack(&good[..], ANY, dir.path(), &mut 0).is_err(), "it is there");
        assert!(unpack(&good[..700], ANY, dir.path(), &mut 0).is_err());
        // A size that no number of blocks holds.
        let mut folder = Header::new_gnu();
        folder.set_path("folder").unwrap();
        folder.set_entry_type(EntryType::Directory);
        folder.set_size(u64::MAX);
        folder.set_cksum();
        assert!(unpack(&folder.as_bytes()[..], ANY, dir.path(), &mut 0).is_err());
        assert!(unpack(&[b'x'; 1024][..], ANY, dir.path(), &mut 0).is_err());
    }

    #[test]
    fn long_names_and_sizes_said_ahead_are_taken_and_bounded_before_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/file", "d".repeat(200));
        let mut header = Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o644);
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header, &long, &b"gnu"[..]).unwrap();
        let said = [("path", &b"pax/file"[..]), ("size", &b"5"[..])];
        builder.append_pax_extensions(said).unwrap();
        let mut bytes = builder.into_inner().unwrap();
        bytes.truncate(bytes.len() - 1024);
        // As other programs write it: what does not fit its header is said ahead of it alone.
        let mut header = Header::new_ustar();
        header.set_path("short").unwrap();
        header.set_mode(0o644);
        header.set_size(0);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(b"12345");
        bytes.resize(bytes.len() + 507 + 1024, 0);
        unpack(&bytes[..], ANY, dir.path(), &mut 0).unwrap();
        assert_eq!(std::fs::read(dir.path().join(&long)).unwrap(), b"gnu");
        assert_eq!(std::fs::read(dir.path().join("pax/file")).unwrap(), b"12345");

        for kind in [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
        ] {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(MAX_SAID + 1);
            header.set_cksum();
            // Reading on would fail otherwise: nothing follows the header.
            let refused = unpack(&header.as_bytes()[..], ANY, dir.path(), &mut 0).unwrap_err();
            assert!(refused.to_string().contains("than it may"), "{refused}");
        }
    }

    #[test]
    fn an_archive_that_is_cut_off_between_files_or_goes_on_behind_its_end_is_refused() {
        let into = |bytes: &[u8]| {
            let dir = tempfile::tempdir().unwrap();
            let unpacked = unpack(bytes, ANY, dir.path(), &mut 0);
            unpacked.map(|()| std::fs::read_dir(dir.path()).unwrap().count())
        };
        let whole = archive("f", EntryType::Regular);
        let entry = whole.len() - 1024;
        for refused in [&whole[..entry], &whole[..entry + 100], b""] {
            let error = into(refused).unwrap_err().to_string();
            assert!(error.contains("without saying"), "{error}");
        }
        // One block of zeros stands for no file, and the last record may be filled with anything.
        assert_eq!(into(&whole[..entry + 512]).unwrap(), 1);
        assert_eq!(into(&[&whole[..], &[b'x'; 8 * 512], &[0; 100]].concat()).unwrap(), 1);
        let second = archive("g", EntryType::Regular);
        let error = into(&[&whole[..], &[0; 3 * 512], &second].concat()).unwrap_err();
        assert!(error.to_string().contains("another one"), "{error}");
        // As one archive both are there.
        assert_eq!(into(&[&whole[..entry], &second].concat()).unwrap(), 2);
    }

    #[test]
    fn what_is_more_than_it_may_be_ends_and_what_the_disk_does_not_take_is_told_so() {
        let whole = archive("f", EntryType::Regular);
        let into = |bytes, room_bytes| {
            let dir = tempfile::tempdir().unwrap();
            unpack(&whole[..], Most { bytes, room_bytes }, dir.path(), &mut 0)
        };
        // Exactly at an archive's end is no bomb; less is.
        let len = whole.len() as u64;
        assert!(into(len, len).is_ok());
        assert!(matches!(into(600, len), Err(FetchError::Disk(_))));
        let full = into(len, 600).unwrap_err();
        assert!(matches!(full, FetchError::Transfer(Failure::NoRoom { .. })), "{full}");
    }
}
