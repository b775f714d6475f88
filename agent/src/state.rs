//! What the agent's tasks share: what is wanted, what was seen, and how each replica is.

use crate::store::{self, Store, StoreError};
use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::Wanted;
use berth_proto::agent::ReplicaReport;
use berth_proto::ids::{ClusterUid, Mono, Now, ReplicaUid, Wall};
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::{AssignmentBody, HostPolicy};
use berth_proto::{api, convert};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, broadcast};

/// Reports a slow session may fall behind before it says hello anew.
const BEHIND: usize = 4096;

/// News for the session.
#[derive(Debug, Clone)]
pub enum News {
    /// A replica's newest report.
    Report(Box<ReplicaReport>),
    /// Nothing is left of a replica.
    Absent(ReplicaUid),
    /// The host's facts.
    Facts(Box<api::HostFacts>),
}

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
    /// What is wanted.
    pub wanted: Wanted,
    /// What is remembered.
    pub memory: BTreeMap<ReplicaUid, Memory>,
    /// The newest report of each replica.
    pub reports: BTreeMap<ReplicaUid, ReplicaReport>,
    /// Running containers.
    pub running: BTreeMap<ReplicaUid, Running>,
    /// All containers.
    pub containers: BTreeMap<ReplicaUid, Attempts>,
    /// The engine was asked at least once.
    pub engine_observed: bool,
    /// The host's facts.
    pub facts: api::HostFacts,
}

/// What the agent's tasks share.
pub struct Shared {
    /// Under one lock.
    pub inner: Mutex<Inner>,
    /// The disk.
    pub store: Store,
    /// Who the agent is; renewed now and then.
    pub identity: Mutex<AgentIdentityFile>,
    /// The cluster.
    pub cluster: ClusterUid,
    /// The host's own policy.
    pub policy: HostPolicy,
    /// Number of this start.
    pub agent_start: u64,
    /// Wakes the reconciler.
    pub wake: Notify,
    /// News for the session.
    pub news: broadcast::Sender<News>,
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
        let mut file = store.set()?;
        file.agent_start += 1;
        file.last_seen_unix_ms = file.last_seen_unix_ms.max(wall_now().0);
        store.put_set(&file)?;
        let path = store.folder().join("set");
        let (wanted, memory) =
            store::from_file(&file).map_err(|_| StoreError::Damaged(path.clone()))?;
        let cluster = identity.cluster.parse().map_err(|_| StoreError::Damaged(path))?;
        let inner = Inner { wanted, memory, ..Inner::default() };
        Ok(Self {
            inner: Mutex::new(inner),
            store,
            identity: Mutex::new(identity),
            cluster,
            policy,
            agent_start: file.agent_start,
            wake: Notify::new(),
            news: broadcast::channel(BEHIND).0,
            origin: Instant::now(),
        })
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Now {
        let mono = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { mono: Mono(mono + 1), wall: wall_now() }
    }

    /// Makes a set and what is remembered durable.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn persist(&self, wanted: &Wanted) -> Result<(), StoreError> {
        let file = {
            let inner = self.inner.lock();
            store::to_file(wanted, &inner.memory, self.agent_start, wall_now().0)
        };
        self.store.put_set(&file)
    }

    /// Makes what is remembered durable beside the set that is held.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn remember(&self) -> Result<(), StoreError> {
        let wanted = self.inner.lock().wanted.clone();
        self.persist(&wanted)
    }

    /// Tells the session how a replica is, when that has changed.
    pub fn report(&self, report: ReplicaReport) {
        let Ok(uid) = report.replica_uid.parse::<ReplicaUid>() else { return };
        let changed = {
            let mut inner = self.inner.lock();
            let changed = inner.reports.get(&uid) != Some(&report);
            inner.reports.insert(uid, report.clone());
            changed
        };
        if changed {
            // No session listening is no error: the next one says all of it.
            let _ = self.news.send(News::Report(Box::new(report)));
        }
    }

    /// Changes a replica's newest status.
    pub fn edit_report(&self, uid: &ReplicaUid, edit: impl FnOnce(&mut api::ReplicaStatus)) {
        let report = {
            let inner = self.inner.lock();
            let mut report = inner.reports.get(uid).cloned().unwrap_or_else(|| {
                let entry = inner.wanted.set().and_then(|s| s.entries.get(uid).cloned());
                let entry = entry.unwrap_or_default();
                ReplicaReport {
                    replica_uid: uid.to_string(),
                    deployment_uid: entry.deployment_uid,
                    release: entry.release,
                    body_digest: entry.body_digest,
                    status: Some(api::ReplicaStatus {
                        phase: api::ReplicaPhase::Accepted as i32,
                        attempt: inner.memory.get(uid).map_or(0, |m| m.attempt),
                        ..Default::default()
                    }),
                    assigned: true,
                    slot: entry.slot,
                }
            });
            edit(report.status.get_or_insert_default());
            report
        };
        self.report(report);
    }

    /// Forgets a replica of which nothing is left, and says so.
    pub fn absent(&self, uid: &ReplicaUid) {
        {
            let mut inner = self.inner.lock();
            inner.memory.remove(uid);
            inner.reports.remove(uid);
            inner.running.remove(uid);
            inner.containers.remove(uid);
        }
        let _ = self.news.send(News::Absent(uid.clone()));
    }

    /// The body of a replica that is wanted.
    #[must_use]
    pub fn body(&self, uid: &ReplicaUid) -> Option<Arc<AssignmentBody>> {
        let inner = self.inner.lock();
        let set = inner.wanted.set()?;
        Some(Arc::clone(&set.body(set.entries.get(uid)?)?.value))
    }
}

/// A phase with what goes with it, for a status.
pub fn set_phase(status: &mut api::ReplicaStatus, attempt: u32, phase: api::ReplicaPhase) {
    // Within an attempt a phase only grows; a new attempt begins anew.
    if attempt > status.attempt || phase as i32 >= status.phase {
        if attempt > status.attempt {
            status.container_id.clear();
            status.start_time = None;
        }
        status.attempt = attempt;
        status.phase = phase as i32;
    }
}

/// A moment as told on the wire.
#[must_use]
pub fn moment(wall: Wall) -> Option<prost_types::Timestamp> {
    Some(convert::timestamp(wall))
}
