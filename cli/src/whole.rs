//! Files for their owner alone: whole, or not there; and never over one that is there.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

fn failed(doing: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let words = format!("cannot {doing} {}", path.display());
    move |error| Error::user(format!("{words}: {error}"))
}

/// What is there until the file is whole; gone when it does not become so.
pub struct Whole {
    /// Where it will be.
    pub path: PathBuf,
    partial: PathBuf,
    file: File,
}

impl Drop for Whole {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

impl Whole {
    /// Begins the file, which must not be there.
    pub fn begin(path: &Path) -> Result<Self> {
        // Also a link that leads nowhere is there.
        if path.symlink_metadata().is_ok() {
            return Err(Error::user(format!("{} exists already", path.display()))
                .hint("nothing is overwritten; name another file"));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(failed("make", &partial))?;
        Ok(Self { path: path.to_owned(), partial, file })
    }

    /// More of what it will hold.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(failed("write", &self.path))
    }

    /// Gives it its name, once everything is on the disk.
    pub fn finish(self) -> Result<()> {
        let path = &self.path;
        self.file.sync_all().map_err(failed("write", path))?;
        rename(&self.partial, path).map_err(failed("make", path))?;
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            Some(_) | None => Path::new("."),
        };
        File::open(folder).and_then(|f| f.sync_all()).map_err(failed("sync", folder))
    }
}

/// Gives a file its name and overwrites nothing.
fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that does not know of that may know of links, as NFS does; FAT, on a stick,
        // knows of no links.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(from, to),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_name_without_a_link_and_overwrites_nothing() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("monday.age");
        let begun = |bytes: &[u8]| {
            let mut whole = Whole::begin(&path).unwrap();
            whole.write(bytes).unwrap();
            whole
        };
        drop(begun(b"given up"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        begun(b"x").finish().unwrap();
        // Moved, not linked: FAT has no links.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // Neither one that was there nor one that came meanwhile is written over.
        assert!(Whole::begin(&path).is_err_and(|e| e.message.contains("exists already")));
        let second = dir.path().join("second");
        std::fs::write(&second, "y").unwrap();
        assert_eq!(rename(&second, &path).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }
}
