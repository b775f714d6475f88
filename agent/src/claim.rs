//! One agent of a cluster for each engine.
//!
//! An agent takes whatever of its cluster it finds in the engine for its own. Two of them would take each
//! other's containers away, and no server would see why. The claim is a lock that ends with the process,
//! on a file that a boot removes; where no such file can be made nothing is claimed.

use berth_proto::ids::ClusterUid;
use rustix::fs::{FlockOperation, flock};
use sha2::Digest as _;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where claims are made: emptied by every boot.
pub const FOLDER: &str = "/run";

/// Another agent has the engine.
#[derive(Debug, thiserror::Error)]
#[error(
    "another agent of this cluster drives the engine at {} already: one agent serves one engine. \
     `berth-agent status --data-dir FOLDER` shows what each is; give this host an engine of its own \
     (`--engine`)",
    .0.display()
)]
pub struct Claimed(PathBuf);

/// Claims an engine until what is answered is dropped; `None`: no claim can be made in this folder.
///
/// # Errors
/// [`Claimed`].
pub fn claim(folder: &Path, cluster: &ClusterUid, socket: &Path) -> Result<Option<File>, Claimed> {
    // By whatever link it is named, also before the engine is there.
    let engine = std::fs::canonicalize(socket).unwrap_or_else(|_| {
        let folder = socket.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
        let name = socket.file_name().map(PathBuf::from);
        folder.zip(name).map_or_else(|| socket.to_owned(), |(folder, name)| folder.join(name))
    });
    let of = sha2::Sha256::digest(format!("{cluster}\0{}", engine.display()));
    let path = folder.join(format!("berth-agent-{}.lock", hex::encode(&of[..8])));
    let file = match File::options().write(true).create(true).truncate(false).open(&path) {
        Ok(file) => file,
        Err(error) => {
            let path = path.display();
            tracing::info!(%path, %error, "a second agent on this engine would not be noticed");
            return Ok(None);
        }
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Claimed(engine)),
        Err(error) => {
            let path = path.display();
            tracing::info!(%path, %error, "a second agent on this engine would not be noticed");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_one_agents_of_a_cluster_by_whatever_name_and_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("docker.sock"), "").unwrap();
        std::os::unix::fs::symlink(path("docker.sock"), path("link.sock")).unwrap();
        let (ours, theirs): (ClusterUid, ClusterUid) =
            ("c1".parse().unwrap(), "c2".parse().unwrap());
        let claims = |cluster, name: &str| claim(dir.path(), cluster, &path(name));
        let first = claims(&ours, "docker.sock").unwrap();
        assert!(first.is_some());
        let refused = claims(&ours, "link.sock").unwrap_err().to_string();
        assert!(refused.contains("docker.sock already: one agent serves one engine"), "{refused}");
        assert!(claims(&theirs, "docker.sock").unwrap().is_some(), "another cluster's");
        assert!(claims(&ours, "podman.sock").unwrap().is_some(), "another engine");
        drop(first);
        assert!(claims(&ours, "link.sock").unwrap().is_some());
        let nowhere = claim(&path("no/such/folder"), &ours, &path("docker.sock")).unwrap();
        assert!(nowhere.is_none());
    }
}
