//! The agent's own disk: who it is, and what it shall run.
//!
//! Each is a file of a CRC and a message, replaced by tmp + fsync + rename + fsync of the folder. A
//! file that is damaged is said so by name; it is never taken for an empty one, because that would
//! mean "nothing wanted".

use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::{self, HeldSet, Wanted};
use berth_proto::agent::SetEntry;
use berth_proto::ids::{Digest, ReplicaUid};
use berth_proto::record::{AgentIdentityFile, AgentReplicaMemory, AgentSetFile};
use prost::Message;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Why the agent's disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or folder.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was done.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is damaged.
    #[error(
        "{} is damaged; what runs is left alone. Move it away to start without it", .0.display()
    )]
    Damaged(PathBuf),
    /// Another agent.
    #[error("{} is in use by another agent", .0.display())]
    InUse(PathBuf),
    /// Nobody has joined here.
    #[error(
        "this host has not joined a cluster: `berth-agent join --server HOST:PORT --token ...`"
    )]
    NotJoined,
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::Io { doing, path, source }
}

/// The agent's folder.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    lock: Option<File>,
}

fn write_whole(path: &Path, message: &impl Message) -> Result<(), StoreError> {
    let body = message.encode_to_vec();
    let mut bytes = crc32c::crc32c(&body).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    let partial = path.with_extension("partial");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
    if let Err(error) = written {
        let _ = fs::remove_file(&partial);
        return Err(io("write", &partial)(error));
    }
    fs::rename(&partial, path).map_err(io("rename", path))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io("sync", folder))
}

fn read_whole<M: Message + Default>(path: &Path) -> Result<Option<M>, StoreError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", path)(error)),
    };
    let damaged = || StoreError::Damaged(path.to_owned());
    let (crc, body) = bytes.split_at_checked(4).ok_or_else(damaged)?;
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return Err(damaged());
    }
    M::decode(body).map(Some).map_err(|_| damaged())
}

impl Store {
    /// Opens the folder for one agent alone.
    ///
    /// # Errors
    /// When another agent has it, or it cannot be made.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(folder).map_err(io("make", folder))?;
        let path = folder.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io("open", &path))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StoreError::InUse(folder.to_owned()))?;
        Ok(Self { folder: folder.to_owned(), lock: Some(lock) })
    }

    /// Reads beside a running agent; never writes.
    #[must_use]
    pub fn peek(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), lock: None }
    }

    /// Whether this value holds the folder alone.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.lock.is_some()
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Who the agent is.
    ///
    /// # Errors
    /// When nobody has joined, or the file is damaged.
    pub fn identity(&self) -> Result<AgentIdentityFile, StoreError> {
        read_whole(&self.folder.join("identity"))?.ok_or(StoreError::NotJoined)
    }

    /// Makes an identity durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_identity(&self, identity: &AgentIdentityFile) -> Result<(), StoreError> {
        write_whole(&self.folder.join("identity"), identity)
    }

    /// What was made durable last.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn set(&self) -> Result<AgentSetFile, StoreError> {
        Ok(read_whole(&self.folder.join("set"))?.unwrap_or_default())
    }

    /// Makes what is wanted and remembered durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_set(&self, file: &AgentSetFile) -> Result<(), StoreError> {
        write_whole(&self.folder.join("set"), file)
    }
}

/// What is wanted and remembered, as a file.
#[must_use]
pub fn to_file(
    wanted: &Wanted,
    memory: &BTreeMap<ReplicaUid, Memory>,
    agent_start: u64,
    last_seen_unix_ms: i64,
) -> AgentSetFile {
    let set = wanted.set();
    AgentSetFile {
        id: set.map(|s| ledger::set_id(s.number)),
        digest: set.map(|s| s.digest.clone()).unwrap_or_default(),
        entries: set.map(|s| s.entries.values().cloned().collect()).unwrap_or_default(),
        bodies: set
            .map(|s| s.bodies.values().map(|b| b.bytes.to_vec()).collect())
            .unwrap_or_default(),
        replicas: memory
            .iter()
            .map(|(uid, m)| AgentReplicaMemory {
                replica_uid: uid.to_string(),
                attempt: m.attempt,
                failures: m.failures,
                last_exit: (m.exit_taken > 0).then(|| berth_proto::api::Exit {
                    attempt: m.exit_taken,
                    ..Default::default()
                }),
                rolled_back: m.rolled_back,
                replacement_done: m.replacement_done,
                finished: m.finished,
            })
            .collect(),
        agent_start,
        last_seen_unix_ms,
    }
}

/// What is wanted and remembered, from a file.
///
/// # Errors
/// When a body is missing or cannot be read.
pub fn from_file(
    file: &AgentSetFile,
) -> Result<(Wanted, BTreeMap<ReplicaUid, Memory>), ledger::Broken> {
    let wanted = match file.id {
        None => Wanted::NotYetKnown,
        Some(id) => {
            let bodies: BTreeMap<Digest, Vec<u8>> =
                file.bodies.iter().map(|b| (Digest::of(b), b.clone())).collect();
            let entries: Vec<SetEntry> = file.entries.clone();
            let set: HeldSet = ledger::build(
                ledger::number(id),
                file.digest.clone(),
                entries,
                bodies,
                &Wanted::NotYetKnown,
            )?;
            Wanted::Set(std::sync::Arc::new(set))
        }
    };
    let memory = file
        .replicas
        .iter()
        .filter_map(|m| {
            let memory = Memory {
                attempt: m.attempt,
                failures: m.failures,
                exit_taken: m.last_exit.as_ref().map_or(0, |e| e.attempt),
                rolled_back: m.rolled_back,
                replacement_done: m.replacement_done,
                finished: m.finished,
                ..Memory::default()
            };
            Some((m.replica_uid.parse().ok()?, memory))
        })
        .collect();
    Ok((wanted, memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_named_and_not_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(matches!(store.identity(), Err(StoreError::NotJoined)));
        let file = AgentSetFile { agent_start: 3, ..Default::default() };
        store.put_set(&file).unwrap();
        assert_eq!(store.set().unwrap(), file);
        let path = dir.path().join("set");
        let mut bytes = fs::read(&path).unwrap();
        bytes[4] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(store.set(), Err(StoreError::Damaged(_))));
        assert!(matches!(Store::open(dir.path()), Err(StoreError::InUse(_))));
    }

    #[test]
    fn no_news_and_the_empty_set_stay_different_on_disk() {
        let none = to_file(&Wanted::NotYetKnown, &BTreeMap::new(), 1, 0);
        assert!(from_file(&none).unwrap().0.set().is_none());
        let empty = Wanted::Set(std::sync::Arc::new(HeldSet::default()));
        let empty = to_file(&empty, &BTreeMap::new(), 1, 0);
        assert!(from_file(&empty).unwrap().0.set().is_some());
    }
}
