//! What the agent's tasks share: what is wanted, what was seen, and how each replica is.

use crate::clock::Clock;
use crate::store::{self, Store, StoreError};
use berth_agent_core::board::{Board, nothing};
use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::Wanted;
use berth_proto::agent::ReplicaReport;
use berth_proto::api;
use berth_proto::ids::{ClusterUid, Mono, Now, ReplicaUid, Wall};
use berth_proto::record::{AgentIdentityFile, AgentSetFile};
use berth_proto::values::{AssignmentBody, HostPolicy};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

/// Reports a slow session may fall behind before it says hello anew.
const BEHIND: usize = 4096;

pub use berth_agent_core::board::News;

/// A running container, as the dialler and the logs need it.
#[derive(Debug, Clone)]
pub struct Running {
    /// The engine's id.
    pub id: String,
    /// Its address.
    pub ip: Option<IpAddr>,
    /// What it runs.
    pub body: Arc<AssignmentBody>,
    /// Which attempt.
    pub attempt: u32,
}

/// The containers of one replica, newest attempt first: engine's id and attempt.
pub type Attempts = Vec<(String, u32)>;

/// The parts under one lock, held for moments only.
#[derive(Default)]
pub struct Inner {
    /// What a session begins with.
    pub board: Board,
    /// Running containers.
    pub running: BTreeMap<ReplicaUid, Running>,
    /// All containers.
    pub containers: BTreeMap<ReplicaUid, Attempts>,
}

/// What the file of the set holds; whoever changes a part of it writes the other along.
struct OnDisk {
    wanted: Wanted,
    memory: BTreeMap<ReplicaUid, Memory>,
}

/// What the agent's tasks share.
pub struct Shared {
    /// Under one lock.
    pub inner: Mutex<Inner>,
    /// Held while the file is written.
    on_disk: Mutex<OnDisk>,
    /// The disk.
    pub store: Store,
    /// Who the agent is; renewed now and then, by [`Shared::change_identity`].
    pub identity: Mutex<AgentIdentityFile>,
    /// Held while it is changed and written.
    identity_turn: Mutex<()>,
    /// The cluster.
    pub cluster: ClusterUid,
    /// The host's own policy.
    pub policy: HostPolicy,
    /// The time for certificates.
    pub clock: Arc<Clock>,
    /// Number of this start.
    pub agent_start: u64,
    /// Wakes the reconciler.
    pub wake: Notify,
    /// News for the session.
    pub news: broadcast::Sender<News>,
    /// The engine was looked at in this start of the agent.
    pub observed: watch::Sender<bool>,
    /// The host's facts were gathered in this start of the agent.
    pub gathered: watch::Sender<bool>,
    /// The host was removed from its cluster, and nothing of it is to stay here.
    pub wiping: watch::Sender<bool>,
    origin: Instant,
}

/// The wall clock.
#[must_use]
pub fn wall_now() -> Wall {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Wall(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

impl Shared {
    /// Reads the disk and counts this start.
    ///
    /// # Errors
    /// When the disk is damaged or cannot be written.
    pub fn open(store: Store, policy: HostPolicy) -> Result<Self, StoreError> {
        let identity = store.identity()?;
        let mut file = store.set_of(&identity.cluster)?;
        file.cluster.clone_from(&identity.cluster);
        file.agent_start += 1;
        let clock = Clock::new(file.last_seen_unix_ms);
        file.last_seen_unix_ms = clock.to_write().0;
        store.put_set(&file)?;
        let path = store.folder().join("set");
        let (wanted, memory) =
            store::from_file(&file).map_err(|_| StoreError::Damaged(path.clone()))?;
        let cluster = identity.cluster.parse().map_err(|_| StoreError::Damaged(path))?;
        let wiping = identity.removed && identity.wipe;
        let board = Board::new(wanted.clone(), wiping, api::HostFacts::default());
        let inner = Inner { board, ..Inner::default() };
        Ok(Self {
            inner: Mutex::new(inner),
            on_disk: Mutex::new(OnDisk { wanted, memory }),
            store,
            identity: Mutex::new(identity),
            identity_turn: Mutex::new(()),
            cluster,
            policy,
            clock: Arc::new(clock),
            agent_start: file.agent_start,
            wake: Notify::new(),
            news: broadcast::channel(BEHIND).0,
            observed: watch::channel(false).0,
            gathered: watch::channel(false).0,
            wiping: watch::channel(wiping).0,
            origin: Instant::now(),
        })
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Now {
        let mono = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { mono: Mono(mono + 1), wall: wall_now() }
    }

    fn file(&self, wanted: &Wanted, memory: &BTreeMap<ReplicaUid, Memory>) -> AgentSetFile {
        let seen_unix_ms = self.clock.to_write().0;
        store::to_file(&self.cluster, wanted, memory, self.agent_start, seen_unix_ms)
    }

    /// Makes a set durable, beside what is remembered.
    ///
    /// # Errors
    /// When the disk does not take it; what was there stays.
    pub fn persist(&self, wanted: &Wanted) -> Result<(), StoreError> {
        let mut disk = self.on_disk.lock();
        let file = self.file(wanted, &disk.memory);
        self.store.put_set(&file)?;
        disk.wanted = wanted.clone();
        Ok(())
    }

    /// Has the reconciler work off a set that is durable.
    pub fn act_on(&self, wanted: Wanted) {
        if self.inner.lock().board.act_on(wanted) {
            self.wake.notify_one();
        }
    }

    /// Makes what is remembered durable, beside the set that is.
    ///
    /// # Errors
    /// When the disk does not take it; what was there stays.
    pub fn remember(&self, memory: BTreeMap<ReplicaUid, Memory>) -> Result<(), StoreError> {
        let mut disk = self.on_disk.lock();
        let file = self.file(&disk.wanted, &memory);
        self.store.put_set(&file)?;
        disk.memory = memory;
        Ok(())
    }

    /// Changes who the agent is: durable first, then seen, one change after the other. Waits for the
    /// disk.
    ///
    /// # Errors
    /// When the disk does not take it; nothing has changed then.
    pub fn change_identity(
        &self,
        change: impl FnOnce(&mut AgentIdentityFile),
    ) -> Result<AgentIdentityFile, StoreError> {
        let _turn = self.identity_turn.lock();
        let mut next = self.identity.lock().clone();
        change(&mut next);
        self.store.put_identity(&next)?;
        *self.identity.lock() = next.clone();
        Ok(next)
    }

    /// The host was removed from its cluster, which may want nothing of it to stay here.
    ///
    /// # Errors
    /// When the disk does not take it; it holds for this life of the agent all the same.
    pub fn removed(&self, wipe: bool) -> Result<(), StoreError> {
        let _turn = self.identity_turn.lock();
        let identity = {
            let mut held = self.identity.lock();
            (held.removed, held.wipe) = (true, wipe);
            held.clone()
        };
        let mut kept = self.store.put_identity(&identity);
        if wipe {
            // So that no late write of what is remembered brings the old set back.
            kept = kept.and(self.persist(&nothing()));
            self.inner.lock().board.wipe();
            self.wake.notify_one();
            self.wiping.send_replace(true);
        }
        kept
    }

    /// What was remembered durably, times as the time left.
    #[must_use]
    pub fn remembered(&self) -> BTreeMap<ReplicaUid, Memory> {
        self.on_disk.lock().memory.clone()
    }

    /// Tells the session how a replica is, when that has changed.
    pub fn report(&self, report: ReplicaReport) {
        let news = self.inner.lock().board.report(report);
        if let Some(news) = news {
            // No session listening is no error: the next one says all of it.
            let _ = self.news.send(news);
        }
    }

    /// The engine has answered a look.
    pub fn looked(&self) {
        self.inner.lock().board.looked();
        self.observed.send_replace(true);
    }

    /// Forgets a replica of which nothing is left, and says so.
    pub fn absent(&self, uid: &ReplicaUid) {
        let news = {
            let mut inner = self.inner.lock();
            inner.running.remove(uid);
            inner.containers.remove(uid);
            inner.board.absent(uid)
        };
        let _ = self.news.send(news);
    }

    /// The body of a replica that is wanted.
    #[must_use]
    pub fn body(&self, uid: &ReplicaUid) -> Option<Arc<AssignmentBody>> {
        let inner = self.inner.lock();
        let set = inner.board.wanted.set()?;
        Some(Arc::clone(&set.body(set.entries.get(uid)?)?.value))
    }
}
