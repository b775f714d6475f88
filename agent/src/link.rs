//! How it stands with the server, for whoever asks on the host itself: a file beside the agent's own,
//! written when that changes. Nothing else is decided by it; a lost one costs a line of `berth-agent
//! status`, so that nothing waits for the disk.

use crate::state::wall_now;
use berth_proto::escape::for_terminal;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Its name in the agent's folder.
const FILE: &str = "link.json";
/// What is kept of a reason, in characters.
const MAX_WHY: usize = 500;

/// How it stands with the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// A session stands.
    pub stands: bool,
    /// The server it is with, or was tried with last.
    pub server: String,
    /// Why none stands; empty: one does.
    pub why: String,
    /// Since when, milliseconds since 1970 by the host's clock.
    pub since_unix_ms: i64,
}

impl Link {
    /// As it is from now on.
    #[must_use]
    pub fn now(server: &str, why: Option<&str>) -> Self {
        let why = why.unwrap_or_default();
        Self {
            stands: why.is_empty(),
            server: server.to_owned(),
            why: for_terminal(why).chars().take(MAX_WHY).collect(),
            since_unix_ms: wall_now().0,
        }
    }

    /// What was written last.
    #[must_use]
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(FILE)).ok()?).ok()
    }
}

/// Who writes it.
#[derive(Debug, Default)]
pub struct Told {
    last: Option<Link>,
}

impl Told {
    /// An agent begins: what stood ended with the one before; since when none stands is known, if it wrote
    /// that down.
    #[must_use]
    pub fn begin(folder: &Path) -> Self {
        let last = Link::read(folder).filter(|last| !last.stands);
        let mut told = Self { last };
        told.tell(folder, Link::now("no server", Some("not tried since the agent's start")));
        told
    }

    /// Writes how it is, unless that is what was written last. Since when no session stands is kept over
    /// tries that fail in different ways.
    pub fn tell(&mut self, folder: &Path, mut link: Link) {
        if let Some(last) = self.last.as_ref().filter(|last| last.stands == link.stands) {
            link.since_unix_ms = last.since_unix_ms;
            if *last == link {
                return;
            }
        }
        let partial = folder.join("link.partial");
        let written = serde_json::to_vec(&link)
            .map_err(std::io::Error::other)
            .and_then(|text| std::fs::write(&partial, text))
            .and_then(|()| std::fs::rename(&partial, folder.join(FILE)));
        match written {
            Ok(()) => self.last = Some(link),
            Err(error) => tracing::debug!(%error, "how it stands with the server is not written"),
        }
    }
}

/// Forgets it, with the cluster.
pub fn forget(folder: &Path) {
    let _ = std::fs::remove_file(folder.join(FILE));
}

/// Whether an agent runs here: somebody holds its folder's lock (`/proc/locks`, without taking it, which
/// could keep an agent from starting). `None`: that cannot be told.
#[must_use]
pub fn agent_runs(folder: &Path) -> Option<bool> {
    let inode = match std::fs::metadata(folder.join("lock")) {
        Ok(lock) => lock.ino(),
        Err(_) => return Some(false),
    };
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    Some(is_locked(&locks, inode))
}

/// Whether a list of locks has one of flock(2) on a file, by its inode's number: the sixth word is
/// `MAJOR:MINOR:INODE`. Devices are left out, since some file systems have another one there.
fn is_locked(locks: &str, inode: u64) -> bool {
    locks.lines().any(|line| {
        let mut words = line.split_whitespace();
        let is_flock = words.nth(1) == Some("FLOCK");
        let file = words.nth(3).and_then(|file| file.rsplit(':').next());
        is_flock && file.is_some_and(|file| file.parse() == Ok(inode))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn since_when_no_session_stands_is_kept_over_other_failures() {
        let folder = tempfile::tempdir().unwrap();
        let at = |link: Link, ms| Link { since_unix_ms: ms, ..link };
        let mut told = Told::default();
        assert_eq!(Link::read(folder.path()), None);
        told.tell(folder.path(), at(Link::now("a:1", None), 1));
        told.tell(folder.path(), at(Link::now("a:1", Some("refused")), 2));
        told.tell(folder.path(), at(Link::now("b:1", Some("timed \u{1b}out")), 3));
        let read = Link::read(folder.path()).unwrap();
        assert_eq!((read.stands, read.since_unix_ms, read.server.as_str()), (false, 2, "b:1"));
        assert!(!read.why.contains('\u{1b}'), "{}", read.why);
        told.tell(folder.path(), at(Link::now("b:1", None), 4));
        assert_eq!(Link::read(folder.path()).unwrap().since_unix_ms, 4);
        forget(folder.path());
        assert_eq!(Link::read(folder.path()), None);
    }

    #[test]
    fn an_agent_that_begins_has_no_session_whatever_the_one_before_wrote() {
        let folder = tempfile::tempdir().unwrap();
        Told::default().tell(folder.path(), Link::now("a:1", None));
        let _ = Told::begin(folder.path());
        let down = Link::read(folder.path()).unwrap();
        assert!(!down.stands);
        // Since when is kept over another start.
        let long = Link { since_unix_ms: down.since_unix_ms - 90_000, ..down };
        Told::default().tell(folder.path(), long.clone());
        let _ = Told::begin(folder.path());
        assert_eq!(Link::read(folder.path()).unwrap().since_unix_ms, long.since_unix_ms);
    }

    #[test]
    fn an_agent_that_runs_is_seen_without_taking_its_lock() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(agent_runs(folder.path()), Some(false));
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(agent_runs(folder.path()), Some(true));
        drop(store);
        assert_eq!(agent_runs(folder.path()), Some(false));
    }
}
