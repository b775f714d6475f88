//! The agent's own disk: who it is, and what it shall run.
//!
//! Each is a file of a CRC and a message, replaced by tmp + fsync + rename + fsync of the folder. A
//! file that is damaged is said so by name; it is never taken for an empty one, because that would
//! mean "nothing wanted".

use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::{self, HeldSet, Wanted};
use berth_proto::agent::SetEntry;
use berth_proto::ids::{ClusterUid, Digest, Mono, ReplicaUid};
use berth_proto::record::{AgentIdentityFile, AgentJoinFile, AgentReplicaMemory, AgentSetFile};
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
        "this host has not joined a cluster, or not with {} (--data-dir names another folder): \
         `berth-agent join --server HOST:PORT --token ...`", .0.display()
    )]
    NotJoined(PathBuf),
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
    sync(path.parent().unwrap_or(Path::new(".")))
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
        read_whole(&self.folder.join("identity"))?
            .ok_or_else(|| StoreError::NotJoined(self.folder.clone()))
    }

    /// Makes an identity durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_identity(&self, identity: &AgentIdentityFile) -> Result<(), StoreError> {
        write_whole(&self.folder.join("identity"), identity)
    }

    /// The join whose answer has not come yet.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn joining(&self) -> Result<Option<AgentJoinFile>, StoreError> {
        read_whole(&self.folder.join("joining"))
    }

    /// Makes a join durable that is about to be asked for.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_joining(&self, joining: &AgentJoinFile) -> Result<(), StoreError> {
        write_whole(&self.folder.join("joining"), joining)
    }

    /// Its answer is durable, or will never come.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn forget_joining(&self) -> Result<(), StoreError> {
        self.forget("joining")
    }

    /// What was made durable last.
    ///
    /// # Errors
    /// When the file is damaged.
    fn set(&self) -> Result<AgentSetFile, StoreError> {
        Ok(read_whole(&self.folder.join("set"))?.unwrap_or_default())
    }

    /// What was made durable last for `cluster`. Of another cluster's, left by whatever, only what
    /// says nothing of a cluster counts.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn set_of(&self, cluster: &str) -> Result<AgentSetFile, StoreError> {
        let file = self.set()?;
        if file.cluster.is_empty() || file.cluster == cluster {
            return Ok(file);
        }
        tracing::warn!(of = file.cluster, "a set of another cluster is on the disk; it is ignored");
        Ok(AgentSetFile {
            agent_start: file.agent_start,
            last_seen_unix_ms: file.last_seen_unix_ms,
            ..AgentSetFile::default()
        })
    }

    /// Makes what is wanted and remembered durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_set(&self, file: &AgentSetFile) -> Result<(), StoreError> {
        write_whole(&self.folder.join("set"), file)
    }

    /// Forgets what is wanted and remembered, durably.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn forget_set(&self) -> Result<(), StoreError> {
        self.forget("set")
    }

    /// Forgets the cluster, durably. What it wanted goes first: a set that is left alone would be taken
    /// for the next cluster's, while an identity alone knows of nothing and removes nothing.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn forget_cluster(&self) -> Result<(), StoreError> {
        self.forget_set()?;
        self.forget_joining()?;
        crate::link::forget(&self.folder);
        self.forget("identity")
    }

    fn forget(&self, name: &str) -> Result<(), StoreError> {
        let path = self.folder.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io("remove", &path)(error));
            }
            Ok(()) | Err(_) => {}
        }
        sync(&self.folder)
    }
}

fn sync(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(io("sync", folder))
}

/// What a cluster wants and what is remembered, as a file.
#[must_use]
pub fn to_file(
    cluster: &ClusterUid,
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
                replacement_begun: m.replacement_begun,
                replaces: m.replaces.as_ref().map(ToString::to_string).unwrap_or_default(),
                // Time left, as the machine gives it: a stored deadline means nothing to another boot.
                replacement_left_ms: m.replace_until.map(|left| left.0),
                backoff_left_ms: m.not_before.map(|left| left.0),
                must_restart: m.must_restart,
                stopping: m.stopping,
            })
            .collect(),
        agent_start,
        last_seen_unix_ms,
        cluster: cluster.to_string(),
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
                replacement_begun: m.replacement_begun,
                replaces: m.replaces.parse().ok(),
                replace_until: m.replacement_left_ms.map(Mono),
                not_before: m.backoff_left_ms.map(Mono),
                must_restart: m.must_restart,
                stopping: m.stopping,
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

    fn cluster() -> ClusterUid {
        "c".parse().unwrap()
    }

    #[test]
    fn a_set_of_another_cluster_is_no_set_and_one_of_no_cluster_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let empty = Wanted::Set(std::sync::Arc::new(HeldSet::default()));
        let file = to_file(&cluster(), &empty, &BTreeMap::new(), 3, 5);
        store.put_set(&file).unwrap();
        assert_eq!(store.set_of("c").unwrap(), file);
        let none = store.set_of("other").unwrap();
        assert_eq!((none.id, none.agent_start, none.last_seen_unix_ms), (None, 3, 5));
        let old = AgentSetFile { cluster: String::new(), ..file };
        store.put_set(&old).unwrap();
        assert_eq!(store.set_of("other").unwrap(), old);
        store.put_identity(&AgentIdentityFile::default()).unwrap();
        store.put_joining(&AgentJoinFile::default()).unwrap();
        store.forget_cluster().unwrap();
        assert!(store.joining().unwrap().is_none(), "it holds a key");
        assert_eq!(store.set().unwrap(), AgentSetFile::default());
        assert!(matches!(store.identity(), Err(StoreError::NotJoined(_))));
    }

    #[test]
    fn a_damaged_file_is_named_and_not_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(matches!(store.identity(), Err(StoreError::NotJoined(_))));
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
    fn what_is_remembered_of_a_replica_survives_the_disk_with_times_as_the_time_left() {
        let memory = Memory {
            attempt: 7,
            failures: 3,
            exit_taken: 6,
            replacement_begun: true,
            replaces: Some("before".parse().unwrap()),
            rolled_back: true,
            replacement_done: true,
            finished: true,
            stopping: 5,
            must_restart: true,
            not_before: Some(Mono(1_500)),
            replace_until: Some(Mono(2_500)),
            ..Memory::default()
        };
        let all = BTreeMap::from([("r".parse().unwrap(), memory)]);
        let file = to_file(&cluster(), &Wanted::NotYetKnown, &all, 1, 0);
        assert_eq!(from_file(&file).unwrap().1, all);
    }

    #[test]
    fn no_news_and_the_empty_set_stay_different_on_disk() {
        let none = to_file(&cluster(), &Wanted::NotYetKnown, &BTreeMap::new(), 1, 0);
        assert!(from_file(&none).unwrap().0.set().is_none());
        let empty = Wanted::Set(std::sync::Arc::new(HeldSet::default()));
        let empty = to_file(&cluster(), &empty, &BTreeMap::new(), 1, 0);
        assert!(from_file(&empty).unwrap().0.set().is_some());
    }
}
