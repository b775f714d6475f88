//! The registry's folder: where things are, and the few ways in which it changes.
//!
//! ```text
//! format                                    "1"
//! tmp/                                      emptied at start
//! blobs/sha256/ab/<hex>                     content of layers, configs and manifests; mtime: the lease
//! uploads/<id>/{meta.json,data}             an upload under way
//! repos/<name>/_blobs/<hex>                 the blob may be read in that repository
//! repos/<name>/_manifests/revisions/<hex>   {"mediaType": ...}: so may the manifest
//! repos/<name>/_manifests/tags/<tag>        a digest
//! repos/<name>/_manifests/referrers/<hex of the subject>/<hex>   descriptor of a referrer
//! ```
//!
//! Every file but an upload's data becomes visible by rename, after its bytes are durable, and the
//! folder is made durable before anybody is told. Everything here blocks; callers come from
//! [`Registry::blocking`](super::Registry).

use super::names::{RepoName, Tag};
use berth_proto::ids::Digest;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use uuid::Uuid;

/// Number of the layout; a folder with another one is refused.
const FORMAT: &str = "1\n";
/// Where blobs are.
pub(super) const BLOBS: &str = "blobs/sha256";

/// A file system's size and what an ordinary user may still write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space {
    pub(super) free_bytes: u64,
    pub(super) total_bytes: u64,
}

impl Space {
    /// Rounded down, 0 to 100.
    pub(super) fn free_percent(self) -> u8 {
        let percent = self.free_bytes.saturating_mul(100) / self.total_bytes.max(1);
        u8::try_from(percent.min(100)).unwrap_or(100)
    }
}

/// The folder.
#[derive(Debug)]
pub(super) struct Disk {
    root: PathBuf,
    /// Changes still to be made before the crash of a test.
    #[cfg(test)]
    pub(super) until_crash: std::sync::atomic::AtomicI64,
}

impl Disk {
    /// Makes the folder what it must be, and empties `tmp`.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        crate::store::folder::private(&root)?;
        let format = root.join("format");
        match fs::read_to_string(&format) {
            Ok(text) if text == FORMAT => {}
            Ok(text) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "the registry's folder {} has format {:?}, this server knows {:?}",
                        root.display(),
                        text.trim(),
                        FORMAT.trim()
                    ),
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::read_dir(&root)?.next().is_some() && !root.join("tmp").exists() {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{} holds files that are not a registry's", root.display()),
                    ));
                }
            }
            Err(error) => return Err(error),
        }
        let disk = Self {
            root,
            #[cfg(test)]
            until_crash: i64::MAX.into(),
        };
        let tmp = disk.root.join("tmp");
        if tmp.exists() {
            fs::remove_dir_all(&tmp)?;
        }
        fs::create_dir(&tmp)?;
        for name in ["uploads", "repos"] {
            fs::create_dir_all(disk.root.join(name))?;
        }
        for byte in 0..=u8::MAX {
            fs::create_dir_all(disk.root.join("blobs/sha256").join(format!("{byte:02x}")))?;
        }
        for folder in ["blobs/sha256", "blobs", ""] {
            sync_dir(&disk.root.join(folder))?;
        }
        if !disk.root.join("format").exists() {
            disk.write(&disk.root.join("format"), FORMAT.as_bytes())?;
        }
        Ok(disk)
    }

    /// Comes before every change of the folder, so that a test can end the process, as it were,
    /// between any two.
    pub(super) fn change(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.until_crash.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) <= 0 {
            return Err(io::Error::other("the test's crash"));
        }
        Ok(())
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join(BLOBS)
    }
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.blobs().join(&hex[..2]).join(hex)
    }
    pub(super) fn uploads(&self) -> PathBuf {
        self.root.join("uploads")
    }
    pub(super) fn upload(&self, id: Uuid) -> PathBuf {
        self.uploads().join(id.simple().to_string())
    }
    pub(super) fn repos(&self) -> PathBuf {
        self.root.join("repos")
    }
    fn repo(&self, repo: &RepoName) -> PathBuf {
        self.repos().join(repo.as_str())
    }
    pub(super) fn blob_links(&self, repo: &RepoName) -> PathBuf {
        self.repo(repo).join("_blobs")
    }
    pub(super) fn blob_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.blob_links(repo).join(digest.hex())
    }
    pub(super) fn revisions(&self, repo: &RepoName) -> PathBuf {
        self.repo(repo).join("_manifests/revisions")
    }
    pub(super) fn revision(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.revisions(repo).join(digest.hex())
    }
    pub(super) fn tags(&self, repo: &RepoName) -> PathBuf {
        self.repo(repo).join("_manifests/tags")
    }
    pub(super) fn tag(&self, repo: &RepoName, tag: &Tag) -> PathBuf {
        self.tags(repo).join(tag.as_str())
    }
    pub(super) fn all_referrers(&self, repo: &RepoName) -> PathBuf {
        self.repo(repo).join("_manifests/referrers")
    }
    pub(super) fn referrers(&self, repo: &RepoName, subject: &Digest) -> PathBuf {
        self.all_referrers(repo).join(subject.hex())
    }

    /// Writes a small file whole: it is there with all its bytes, durably, or not at all.
    pub(super) fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let tmp = self.root.join("tmp").join(Uuid::new_v4().simple().to_string());
        let written = (|| {
            self.change()?;
            let mut file = File::create_new(&tmp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            self.adopt(&tmp, path)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&tmp);
        }
        written
    }

    /// Moves a file whose bytes are durable to where it is seen.
    pub(super) fn adopt(&self, from: &Path, to: &Path) -> io::Result<()> {
        let folder = to.parent().unwrap_or(&self.root);
        self.ensure_dir(folder)?;
        self.change()?;
        fs::rename(from, to)?;
        sync_dir(folder)
    }

    /// Makes a folder and those above it, durably.
    pub(super) fn ensure_dir(&self, folder: &Path) -> io::Result<()> {
        if folder.is_dir() {
            return Ok(());
        }
        let above = folder.parent().unwrap_or(&self.root);
        self.ensure_dir(above)?;
        self.change()?;
        match fs::create_dir(folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        sync_dir(above)
    }

    /// Removes a file durably; whether it was there.
    pub(super) fn remove(&self, path: &Path) -> io::Result<bool> {
        self.change()?;
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
        path.parent().map_or(Ok(()), sync_dir)?;
        Ok(true)
    }

    /// Removes an upload and what came of it.
    pub(super) fn remove_upload(&self, id: Uuid) -> io::Result<()> {
        self.change()?;
        match fs::remove_dir_all(self.upload(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The blob's size, when it is stored.
    pub(super) fn size(&self, digest: &Digest) -> io::Result<Option<u64>> {
        match fs::metadata(self.blob(digest)) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Renews a blob's lease.
    pub(super) fn touch(&self, digest: &Digest, now: SystemTime) -> io::Result<()> {
        self.change()?;
        File::open(self.blob(digest))?.set_modified(now)
    }

    /// How full the file system is.
    pub(super) fn space(&self) -> io::Result<Space> {
        let found = rustix::fs::statvfs(&self.root)?;
        Ok(Space {
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        })
    }

    /// All repositories, sorted.
    pub(super) fn repositories(&self) -> io::Result<Vec<RepoName>> {
        let mut found = Vec::new();
        let mut open = vec![String::new()];
        while let Some(above) = open.pop() {
            for name in names_in(&self.repos().join(&above))? {
                if name == "_manifests" {
                    // A push that ended early leaves the folder without a manifest.
                    let revisions = self.repos().join(&above).join("_manifests/revisions");
                    if !above.is_empty() && !names_in(&revisions)?.is_empty() {
                        found.extend(RepoName::parse(&above));
                    }
                } else if !name.starts_with('_') {
                    open.push(if above.is_empty() { name } else { format!("{above}/{name}") });
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// All repositories, also those without a manifest, for the collection.
    pub(super) fn all_repositories(&self) -> io::Result<Vec<RepoName>> {
        let mut found = Vec::new();
        let mut open = vec![String::new()];
        while let Some(above) = open.pop() {
            let mut ours = false;
            for name in names_in(&self.repos().join(&above))? {
                if name.starts_with('_') {
                    ours = true;
                } else {
                    open.push(if above.is_empty() { name } else { format!("{above}/{name}") });
                }
            }
            if ours {
                found.extend(RepoName::parse(&above));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The names in a folder; none when there is no such folder.
pub(super) fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        // What is not text was not put there by us.
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

/// The digests that are file names of a folder.
pub(super) fn digests_in(folder: &Path) -> io::Result<Vec<Digest>> {
    let names = names_in(folder)?;
    Ok(names.iter().filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
}

/// Reads a small file; `None` when there is none.
pub(super) fn read_small(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn sync_dir(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
