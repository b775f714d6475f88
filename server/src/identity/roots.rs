//! The cluster's roots: the one that all know, and during a rotation the one that comes after it.
//!
//! A rotation overlaps. It begins with a second root, which agents and clients are told beside the first; from
//! then on it signs what hosts and users are given, and certificates of both are let in. The server
//! itself goes on showing one of the first root, which all know. The end makes the second root the only one.
//!
//! The files in the data folder are what counts; the number of the bundle in the ledger follows them.

use super::ca::{Ca, CaError, is_there, read_pem, write_private};
use arc_swap::ArcSwap;
use berth_proto::ids::ClusterUid;
use berth_proto::tls;
use rustls::pki_types::CertificateDer;
use sha2::Digest as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The roots at one time.
#[derive(Clone)]
struct Held {
    current: Arc<Ca>,
    next: Option<Arc<Ca>>,
    /// A root was retired while this process ran: connections of before may still be open.
    retired: bool,
}

/// The cluster's roots.
pub struct Roots {
    folder: PathBuf,
    cluster: ClusterUid,
    held: ArcSwap<Held>,
    /// Held while they change.
    turning: parking_lot::Mutex<()>,
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    fn current(folder: &Path) -> Self {
        Self { certificate: folder.join("ca.crt"), key: folder.join("ca.key") }
    }

    fn next(folder: &Path) -> Self {
        Self { certificate: folder.join("ca.next.crt"), key: folder.join("ca.next.key") }
    }
}

/// Makes the next root the current one on the disk. Each step can be the last of a crash: while the next
/// certificate is there and the current key is its own, [`Roots::open`] does the rest.
fn put_in_place(folder: &Path, key_pem: &str, root_pem: &str) -> Result<(), CaError> {
    let (current, next) = (Files::current(folder), Files::next(folder));
    write_private(&current.key, key_pem)?;
    write_private(&current.certificate, root_pem)?;
    remove(&next.key)?;
    remove(&next.certificate)?;
    sync(folder)
}

/// Removes a file; one that is not there is no error.
fn remove(path: &Path) -> Result<(), CaError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(CaError::File { path: path.to_owned(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn sync(folder: &Path) -> Result<(), CaError> {
    std::fs::File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(|source| CaError::File { path: folder.to_owned(), source })
}

/// Ends a change of roots that a crash has cut off.
fn mend(folder: &Path) -> Result<(), CaError> {
    let (current, next) = (Files::current(folder), Files::next(folder));
    if !is_there(&next.certificate)? || !is_there(&current.key)? {
        return Ok(());
    }
    let (key_pem, root_pem) = (read_pem(&current.key)?, read_pem(&next.certificate)?);
    if Ca::is_pair(&root_pem, &key_pem)? {
        tracing::warn!("a rotation of the root was cut off at its end, and is ended now");
        put_in_place(folder, &key_pem, &root_pem)?;
    }
    Ok(())
}

impl Roots {
    /// Opens the roots in a folder, or makes the first one there, as [`Ca::open`] does.
    ///
    /// # Errors
    /// As [`Ca::open`]; [`CaError::OtherCluster`] when the two are of two clusters.
    pub fn open(folder: &Path) -> Result<Self, CaError> {
        mend(folder)?;
        let current = Ca::open(folder)?;
        let files = Files::next(folder);
        let next = match is_there(&files.certificate)? {
            true => Some(Ca::from_pem(read_pem(&files.certificate)?, read_pem(&files.key)?)?),
            false => None,
        };
        Self::of(folder, current, next)
    }

    fn of(folder: &Path, current: Ca, next: Option<Ca>) -> Result<Self, CaError> {
        let cluster = current.cluster().clone();
        if let Some(next) = &next {
            next.belongs_to(cluster.as_str())?;
        }
        let held = Held { current: Arc::new(current), next: next.map(Arc::new), retired: false };
        Ok(Self {
            folder: folder.to_owned(),
            cluster,
            held: ArcSwap::from_pointee(held),
            turning: parking_lot::Mutex::default(),
        })
    }

    /// Writes roots into a folder that has none: those of a backup.
    ///
    /// # Errors
    /// When files cannot be written; [`CaError::OtherCluster`].
    pub fn save(folder: &Path, current: Ca, next: Option<Ca>) -> Result<Self, CaError> {
        let roots = Self::of(folder, current, next)?;
        let held = roots.held.load();
        if let Some(next) = &held.next {
            let files = Files::next(folder);
            write_private(&files.key, next.key_pem())?;
            write_private(&files.certificate, next.root_pem())?;
        }
        held.current.save(folder)?;
        drop(held);
        Ok(roots)
    }

    /// The cluster they belong to.
    #[must_use]
    pub fn cluster(&self) -> &ClusterUid {
        &self.cluster
    }

    /// The one that all know: signs what the server shows.
    #[must_use]
    pub fn current(&self) -> Arc<Ca> {
        Arc::clone(&self.held.load().current)
    }

    /// The one that comes after it, during a rotation.
    #[must_use]
    pub fn next(&self) -> Option<Arc<Ca>> {
        self.held.load().next.clone()
    }

    /// The one that all know, and the next one, of one moment.
    #[must_use]
    pub fn both(&self) -> (Arc<Ca>, Option<Arc<Ca>>) {
        let held = self.held.load();
        (Arc::clone(&held.current), held.next.clone())
    }

    /// The newest: signs what hosts and users are given.
    #[must_use]
    pub fn signing(&self) -> Arc<Ca> {
        let held = self.held.load();
        Arc::clone(held.next.as_ref().unwrap_or(&held.current))
    }

    /// All of them in PEM, the newest last.
    #[must_use]
    pub fn pem(&self) -> String {
        let held = self.held.load();
        bundle(&held.current, held.next.as_deref())
    }

    /// What tells one bundle from another: its sha256.
    #[must_use]
    pub fn digest(&self) -> Vec<u8> {
        sha2::Sha256::digest(self.pem()).to_vec()
    }

    /// Whether a certificate that was let in with its connection would be let in now.
    #[must_use]
    pub fn stand_for(&self, leaf: &CertificateDer<'_>) -> bool {
        let held = self.held.load();
        // Whoever came in showed a certificate of a root that was known then.
        !held.retired || {
            drop(held);
            tls::is_signed_by(leaf, &self.pem())
        }
    }

    /// Makes the next root, durable and then known; `false`: there is one. `trusted` is told the bundle before
    /// anything is signed by the new root.
    ///
    /// # Errors
    /// When it cannot be made or written, or by `trusted`.
    pub fn begin<E: From<CaError>>(
        &self,
        trusted: impl FnOnce(&str) -> Result<(), E>,
    ) -> Result<bool, E> {
        let _one = self.turning.lock();
        let held = Held::clone(&self.held.load());
        if held.next.is_some() {
            return Ok(false);
        }
        let next = Ca::another(self.cluster.as_str())?;
        let files = Files::next(&self.folder);
        // What an earlier try has left, before its key is overwritten.
        remove(&files.certificate)?;
        sync(&self.folder)?;
        // The key first: a certificate without its key would look like a whole root.
        write_private(&files.key, next.key_pem())?;
        write_private(&files.certificate, next.root_pem())?;
        trusted(&bundle(&held.current, Some(&next)))?;
        self.held.store(Arc::new(Held { next: Some(Arc::new(next)), ..held }));
        Ok(true)
    }

    /// Retires the current root for the next one, and destroys its key; `false`: there is no next one.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn finish(&self) -> Result<bool, CaError> {
        let _one = self.turning.lock();
        let Some(next) = self.next() else { return Ok(false) };
        put_in_place(&self.folder, next.key_pem(), next.root_pem())?;
        self.held.store(Arc::new(Held { current: next, next: None, retired: true }));
        Ok(true)
    }
}

fn bundle(current: &Ca, next: Option<&Ca>) -> String {
    let next = next.map(Ca::root_pem).unwrap_or_default();
    format!("{}{next}", current.root_pem())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::tls::Subject;

    fn nothing(_: &str) -> Result<(), CaError> {
        Ok(())
    }

    fn leaf(ca: &Ca) -> CertificateDer<'static> {
        let (_, request) = tls::key_and_request().unwrap();
        let pem = ca.sign(&request, Subject::Host("h1".parse().unwrap()), 90).unwrap();
        tls::certificates(&pem).unwrap().remove(0)
    }

    #[test]
    fn a_rotation_overlaps_and_ends_with_the_second_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::open(dir.path()).unwrap();
        let (first, before) = (roots.current(), roots.digest());
        assert!(!roots.finish().unwrap(), "none has begun");
        let mut told = String::new();
        let begin = |told: &mut String| {
            roots.begin(|bundle| {
                *told = bundle.to_owned();
                nothing(bundle)
            })
        };
        assert!(begin(&mut told).unwrap());
        assert!(!begin(&mut String::new()).unwrap(), "one at a time");
        assert_eq!(told, roots.pem());
        assert_ne!(roots.digest(), before);
        assert_eq!(roots.current().root_pem(), first.root_pem());
        let second = roots.signing();
        assert_ne!(second.root_pem(), first.root_pem());
        assert_eq!(second.cluster(), first.cluster());
        assert!(roots.pem().ends_with(second.root_pem()), "the newest is the last");
        let (old, new) = (leaf(&first), leaf(&second));
        assert!(tls::is_signed_by(&old, &roots.pem()) && tls::is_signed_by(&new, &roots.pem()));
        assert!(roots.stand_for(&old));
        // A start in between goes on with both.
        let again = Roots::open(dir.path()).unwrap();
        assert_eq!((again.pem(), again.digest()), (roots.pem(), roots.digest()));
        assert!(roots.finish().unwrap());
        for roots in [&roots, &Roots::open(dir.path()).unwrap()] {
            assert_eq!(roots.pem(), second.root_pem());
            assert!(roots.next().is_none());
        }
        assert!(!roots.stand_for(&old) && roots.stand_for(&new));
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2, "the next root's files are gone");
    }

    #[test]
    fn an_end_that_was_cut_off_anywhere_is_ended_at_the_next_start() {
        let whole = tempfile::tempdir().unwrap();
        let roots = Roots::open(whole.path()).unwrap();
        roots.begin(nothing).unwrap();
        let next = roots.signing();
        let files = ["ca.key", "ca.crt", "ca.next.key", "ca.next.crt"];
        // How many of the end's four steps were done.
        for steps in 0..=4 {
            let cut = tempfile::tempdir().unwrap();
            for file in files {
                std::fs::copy(whole.path().join(file), cut.path().join(file)).unwrap();
            }
            for (step, file) in files.iter().enumerate().take(steps) {
                let path = cut.path().join(file);
                match step {
                    0 => std::fs::write(path, next.key_pem()).unwrap(),
                    1 => std::fs::write(path, next.root_pem()).unwrap(),
                    _ => std::fs::remove_file(path).unwrap(),
                }
            }
            let opened = Roots::open(cut.path()).unwrap();
            if steps == 0 {
                assert_eq!(opened.pem(), roots.pem(), "nothing was begun");
            } else {
                assert_eq!(opened.pem(), next.root_pem(), "{steps}");
                assert_eq!(std::fs::read_dir(cut.path()).unwrap().count(), 2, "{steps}");
            }
        }
    }

    #[test]
    fn a_next_root_whose_certificate_was_never_written_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("ca.next.key"), "half a k").unwrap();
        let roots = [roots, Roots::open(dir.path()).unwrap()];
        assert!(roots.iter().all(|roots| roots.next().is_none()));
        assert!(roots[1].begin(nothing).unwrap());
        assert!(Roots::open(dir.path()).unwrap().next().is_some());
    }

    #[test]
    fn a_next_root_of_another_cluster_is_refused() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Roots::open(ours.path()).unwrap();
        Roots::open(theirs.path()).unwrap();
        for (from, to) in [("ca.key", "ca.next.key"), ("ca.crt", "ca.next.crt")] {
            std::fs::copy(theirs.path().join(from), ours.path().join(to)).unwrap();
        }
        assert!(matches!(Roots::open(ours.path()), Err(CaError::OtherCluster { .. })));
    }
}
