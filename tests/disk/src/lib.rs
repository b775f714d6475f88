//! A disk of its own for tests that fill it or cut its power.
//!
//! It is an ext4 file system in a loop-mounted file. When the power goes, the file system is shut down
//! without flushing its log: what was not synced is gone. It needs root and loop devices; where they
//! are missing a test is skipped and says so, but not in CI.

mod power;

pub use power::{Load, Part, acknowledge, cuts, is_carried_into_a_namespace, mixed, noise, part};

use anyhow::{Context as _, Result, ensure};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop-mounted ext4 file system; gone when it is dropped.
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
    /// Holds the mount and its bytes.
    _dir: tempfile::TempDir,
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

impl Disk {
    /// One of so many MiB. `None`, and said so, where none can be made.
    ///
    /// # Panics
    /// In CI, where one can be made.
    #[must_use]
    pub fn new(test: &str, mib: u64) -> Option<Self> {
        match Self::try_new(mib) {
            Ok(disk) => Some(disk),
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "{test}: {error:#}");
                println!("{test}: skipped, no loop-mounted ext4 can be made here: {error:#}");
                None
            }
        }
    }

    /// The same, reached by a link at `at`.
    ///
    /// # Panics
    /// When there can be no link.
    #[must_use]
    pub fn mount(test: &str, at: &Path, mib: u64) -> Option<Self> {
        let disk = Self::new(test, mib)?;
        let linked = std::os::unix::fs::symlink(&disk.mount, at);
        assert!(linked.is_ok(), "{test}: {linked:?}");
        Some(disk)
    }

    fn try_new(mib: u64) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-disk-").tempdir()?;
        let (image, mount) = (dir.path().join("image"), dir.path().join("mount"));
        std::fs::create_dir(&mount)?;
        File::create(&image)?.set_len(mib << 20)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        let disk = Self { image, mount, _dir: dir };
        disk.try_mount()?;
        Ok(disk)
    }

    fn try_mount(&self) -> Result<()> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mount))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount
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

    /// The power goes: nothing that was not synced stays, and nothing can be written any more.
    fn cut(&self) -> Result<()> {
        let words = "use Fcntl; sysopen(my $f, $ARGV[0], O_RDONLY) or die $!; \
                     my $how = pack('L', 2); ioctl($f, 0x8004587d, $how) or die $!;";
        run(Command::new("perl").args(["-e", words]).arg(&self.mount))
    }

    /// The power is back. Nobody may have a file of it open.
    fn mount_again(&self) -> Result<()> {
        run(Command::new("umount").arg(&self.mount))?;
        self.try_mount()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever used it was ended before, but its last files may still be going.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).output();
    }
}
