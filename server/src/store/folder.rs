//! The data folder: whose it is, its format, and the ballast.

use super::StoreError;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The format this server writes.
pub const FORMAT: u32 = 1;

/// What may be in a folder that holds nothing: of a start that ended early, or of a file system's root.
const EMPTY: [&str; 3] = ["lock", "FORMAT.partial", "lost+found"];

/// A data folder that is ours alone as long as this value lives.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _lock: File,
}

pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| {
        if is_full(&source) { StoreError::Full } else { StoreError::Io { doing, path, source } }
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes a folder that nobody else on this machine may look into, and its parents as they are usual. One
/// that is there is made so: what is stored holds the environment of containers, and models.
///
/// # Errors
/// When it cannot be made, or is another user's.
pub(crate) fn private(path: &Path) -> io::Result<()> {
    // What is there and is no folder is told as such by what follows.
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made,
    }
    // What a link leads to, a mount perhaps, is somebody else's to close.
    let held = fs::symlink_metadata(path)?;
    let mode = held.permissions().mode();
    if held.is_dir() && mode & 0o077 != 0 {
        let closed = fs::Permissions::from_mode(mode & 0o7700);
        if let Err(error) = fs::set_permissions(path, closed) {
            tracing::warn!(folder = %path.display(), %error, "others can read what is stored here");
        }
    }
    Ok(())
}

/// Makes a data folder. One that somebody has made keeps their rights: others may have to find the
/// certificate in it.
fn make(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    private(path).map_err(io("make the folder", path))
}

/// Makes a rename or a new file durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(io("sync the folder", path))
}

/// Writes a file whole: a reader sees the old one or the new one.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let partial = path.with_extension("partial");
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(error) = written {
        let _ = fs::remove_file(&partial);
        return Err(io("write", &partial)(error));
    }
    fs::rename(&partial, path).map_err(io("rename", path))?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Whether a start has taken a folder into possession before.
pub fn is_begun(path: &Path) -> bool {
    path.join("FORMAT").exists()
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let lock_path = path.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(io("open", &lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| StoreError::InUse(path.to_owned()))?;
    Ok(lock)
}

impl Folder {
    /// Takes a folder into possession, making it when it does not exist.
    ///
    /// # Errors
    /// When it is in use, foreign, of a newer format, or cannot be written.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        make(path)?;
        let format = path.join("FORMAT");
        if format.exists() {
            let text = fs::read_to_string(&format).map_err(io("read", &format))?;
            let found: u32 =
                text.trim().parse().map_err(|_| StoreError::Foreign(path.to_owned()))?;
            if found > FORMAT {
                let path = path.to_owned();
                return Err(StoreError::NewerFormat { path, found, known: FORMAT });
            }
        } else {
            let foreign = fs::read_dir(path)
                .map_err(io("read the folder", path))?
                .filter_map(Result::ok)
                .any(|entry| !EMPTY.iter().any(|name| entry.file_name() == *name));
            if foreign {
                return Err(StoreError::Foreign(path.to_owned()));
            }
        }
        let lock = lock(path)?;
        if !format.exists() {
            write_whole(&format, format!("{FORMAT}\n").as_bytes())?;
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Takes an empty folder into possession, making it when it does not exist, for a server's data
    /// that is put there. Until [`Folder::finish`] no server takes it for a data folder.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`]; when it is in use or cannot be written.
    pub fn fresh(path: &Path) -> Result<Self, StoreError> {
        make(path)?;
        let empty = || -> Result<bool, StoreError> {
            let mut entries = fs::read_dir(path).map_err(io("read the folder", path))?;
            Ok(entries.all(|e| e.is_ok_and(|e| EMPTY.iter().any(|name| e.file_name() == *name))))
        };
        if !empty()? {
            return Err(StoreError::NotEmpty(path.to_owned()));
        }
        let lock = lock(path)?;
        // Somebody may have been faster.
        if !empty()? {
            return Err(StoreError::NotEmpty(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Whether a server's data is here.
    #[must_use]
    pub fn is_one(path: &Path) -> bool {
        path.join("FORMAT").exists()
    }

    /// What was put into a fresh folder is whole: servers take it from now on.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&self) -> Result<(), StoreError> {
        write_whole(&self.path.join("FORMAT"), format!("{FORMAT}\n").as_bytes())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the ballast file of so many bytes, when there is room for it beside as much again; answers
    /// whether it is there.
    ///
    /// # Errors
    /// When the file cannot be written for another reason than a full disk.
    pub fn ballast(&self, bytes: u64) -> Result<bool, StoreError> {
        let path = self.path.join("ballast");
        if bytes == 0 || fs::metadata(&path).is_ok_and(|m| m.len() == bytes) {
            return Ok(true);
        }
        if free_bytes(&self.path)? < bytes.saturating_mul(2) {
            return Ok(false);
        }
        let file = File::create(&path).map_err(io("make", &path))?;
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(true),
            Err(error) => {
                let _ = fs::remove_file(&path);
                let error = io::Error::from(error);
                if is_full(&error) { Ok(false) } else { Err(io("make", &path)(error)) }
            }
        }
    }

    /// Gives the ballast up, so that deleting and cleaning have room.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn release_ballast(&self) -> Result<bool, StoreError> {
        let path = self.path.join("ballast");
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io("remove", &path)(error)),
        }
    }
}

/// Bytes free for us where `path` is.
///
/// # Errors
/// When the file system does not say.
pub fn free_bytes(path: &Path) -> Result<u64, StoreError> {
    let stat = rustix::fs::statvfs(path).map_err(|e| io("measure", path)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_a_newer_format_and_a_foreign_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let held = Folder::open(dir.path()).unwrap();
        assert!(matches!(Folder::open(dir.path()), Err(StoreError::InUse(_))));
        drop(held);
        fs::write(dir.path().join("FORMAT"), "99\n").unwrap();
        let refused = Folder::open(dir.path()).unwrap_err();
        assert!(matches!(refused, StoreError::NewerFormat { found: 99, known: FORMAT, .. }));
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("thesis.txt"), "x").unwrap();
        assert!(matches!(Folder::open(other.path()), Err(StoreError::Foreign(_))));
    }

    #[test]
    fn what_is_stored_is_nobody_elses_to_read() {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let dir = tempfile::tempdir().unwrap();
        let (new, there) = (dir.path().join("a/b"), dir.path().join("there"));
        Folder::open(&new).unwrap();
        assert_eq!(mode(&new), 0o700);
        // Of an older version, or of somebody who wants the certificate to be found.
        fs::create_dir(&there).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).unwrap();
        Folder::open(&there).unwrap();
        assert_eq!(mode(&there), 0o755);
        let ledger = there.join("ledger");
        fs::create_dir(&ledger).unwrap();
        fs::set_permissions(&ledger, fs::Permissions::from_mode(0o755)).unwrap();
        private(&ledger).unwrap();
        assert_eq!(mode(&ledger), 0o700);
    }

    #[test]
    fn a_folder_below_a_file_is_told_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let told = private(&dir.path().join("file/data")).unwrap_err();
        assert_eq!(told.kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn the_ballast_can_be_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        assert!(folder.ballast(4096).unwrap());
        assert_eq!(fs::metadata(dir.path().join("ballast")).unwrap().len(), 4096);
        assert!(folder.release_ballast().unwrap());
        assert!(!folder.release_ballast().unwrap());
    }
}
