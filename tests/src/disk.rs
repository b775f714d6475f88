//! A small disk of its own, for tests that fill it.

use anyhow::{Context as _, Result, ensure};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop-mounted ext4 file system; gone when it is dropped.
pub struct Disk {
    mount: PathBuf,
    /// Holds the mount and its bytes.
    _dir: tempfile::TempDir,
}

impl Disk {
    /// One of so many MiB that is reached by a link at `at`. `None`, and said so, where none can be
    /// made.
    pub fn mount(test: &str, at: &Path, mib: u64) -> Option<Self> {
        match Self::try_mount(at, mib) {
            Ok(disk) => Some(disk),
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "{test}: {error:#}");
                println!("{test}: skipped, no loop-mounted ext4 can be made here: {error:#}");
                None
            }
        }
    }

    fn try_mount(at: &Path, mib: u64) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-disk-").tempdir()?;
        let (image, mount) = (dir.path().join("image"), dir.path().join("mount"));
        std::fs::create_dir(&mount)?;
        File::create(&image)?.set_len(mib << 20)?;
        let run = |command: &mut Command| -> Result<()> {
            let output = command.output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{command:?}: {said}");
            Ok(())
        };
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount))?;
        let disk = Self { mount, _dir: dir };
        std::os::unix::fs::symlink(&disk.mount, at)?;
        Ok(disk)
    }

    fn filler(&self) -> PathBuf {
        self.mount.join("filler")
    }

    /// Fills it to its last block.
    ///
    /// # Errors
    /// When it fails otherwise than for lack of room.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::options().create(true).append(true).open(self.filler())?;
        let mut size = 1 << 20;
        let block = vec![7; size];
        while size > 0 {
            match file.write_all(&block[..size]).and_then(|()| file.sync_all()) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => size /= 2,
                Err(error) => return Err(error).context("cannot fill the disk"),
            }
        }
        Ok(())
    }

    /// Fills it but for so many bytes.
    ///
    /// # Errors
    /// As [`Disk::fill`].
    pub fn fill_but(&self, bytes: u64) -> Result<()> {
        self.fill()?;
        let file = File::options().write(true).open(self.filler())?;
        let filled = file.metadata()?.len();
        file.set_len(filled.saturating_sub(bytes)).context("cannot leave room on the disk")
    }

    /// Gives back what [`Disk::fill`] took.
    ///
    /// # Errors
    /// When it cannot be given back.
    pub fn free(&self) -> Result<()> {
        std::fs::remove_file(self.filler()).context("cannot free the disk")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever used it was ended before, but its last files may still be going.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).output();
    }
}
