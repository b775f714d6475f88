//! What all parts of the server share, and the desk that sessions speak to.

use crate::identity::ca::Ca;
use crate::ledger::Ledger;
use crate::registry::Registry;
use crate::session::desk::{Desk, Ended, Later, Lines, Newest, Order};
use crate::session::reverse::ReverseHub;
use arc_swap::ArcSwap;
use berth_proto::agent::{ReplicaReport, SetVerdict, Trust};
use berth_proto::api::{self, EventSeverity, ReplicaIntent};
use berth_proto::convert;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, Revision, SetNumber, Wall};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::dispatch::host_set;
use berth_server_core::live::{Live, Presence, Taken};
use berth_server_core::objects::{Host, MAX_EXITS, Replica};
use berth_server_core::planner::Report;
use berth_server_core::session::Registration;
use berth_server_core::takeover::{Boots, Takeover};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// Orders and tickets waiting for one session.
const LINE: usize = 16;
/// Changes proposed at once from one status message, below what one commit holds.
const CHUNK: usize = 40;

/// The live sessions of one host: their numbers, and where they take orders.
type SessionLines = Vec<(u64, mpsc::Sender<Order>)>;

/// What all parts of the server share.
pub struct Cluster {
    /// The ledger.
    pub ledger: Ledger,
    /// The certificate authority.
    pub ca: Ca,
    /// The registry.
    pub registry: Registry,
    /// Reverse connections.
    pub hub: ReverseHub,
    /// What is known and not stored.
    pub live: ArcSwap<Live>,
    /// The newest plan's report of each deployment.
    pub reports: Mutex<BTreeMap<DeploymentUid, Report>>,
    /// Addresses that agents and clients are told for control and API.
    pub endpoints: Vec<String>,
    /// The registry's address, `host:port`.
    pub registry_address: String,
    /// The gateway's.
    pub gateway_address: String,
    /// The page's.
    pub page_address: String,
    /// The settings.
    pub settings: crate::config::Settings,
    /// When the process started.
    pub started: Wall,
    origin: Instant,
    live_lock: Mutex<()>,
    live_changed: watch::Sender<u64>,
    sessions: Mutex<HashMap<HostUid, SessionLines>>,
    sets: Mutex<HashMap<HostUid, watch::Sender<Newest>>>,
    boots: Mutex<HashMap<HostUid, Boots>>,
    next_session: AtomicU64,
}

/// The wall clock.
#[must_use]
pub fn wall_now() -> Wall {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Wall(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// What a cluster is made of.
pub struct Parts {
    /// The ledger.
    pub ledger: Ledger,
    /// The certificate authority.
    pub ca: Ca,
    /// The registry.
    pub registry: Registry,
    /// The settings.
    pub settings: crate::config::Settings,
    /// The ports the doors listen on: control, registry, gateway, page.
    pub ports: [u16; 4],
}

impl Cluster {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { ledger, ca, registry, settings, ports } = parts;
        let told = |port: u16| -> Vec<String> {
            let name = |host: &String| {
                if host.contains(':') {
                    format!("[{host}]:{port}")
                } else {
                    format!("{host}:{port}")
                }
            };
            settings.advertise.iter().map(name).collect()
        };
        let first = |port: u16| told(port).into_iter().next().unwrap_or_default();
        Self {
            endpoints: told(ports[0]),
            registry_address: first(ports[1]),
            gateway_address: first(ports[2]),
            page_address: first(ports[3]),
            ledger,
            ca,
            registry,
            hub: ReverseHub::default(),
            live: ArcSwap::default(),
            reports: Mutex::default(),
            settings,
            started: wall_now(),
            origin: Instant::now(),
            live_lock: Mutex::new(()),
            live_changed: watch::channel(0).0,
            sessions: Mutex::default(),
            sets: Mutex::default(),
            boots: Mutex::default(),
            next_session: AtomicU64::new(1),
        }
    }

    /// The time.
    #[must_use]
    pub fn time(&self) -> Now {
        let mono = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        // Never 0, so that "since 0" cannot be mistaken for "never".
        Now { mono: Mono(mono + 1), wall: wall_now() }
    }

    /// Tells when what is known live has changed.
    #[must_use]
    pub fn live_changes(&self) -> watch::Receiver<u64> {
        self.live_changed.subscribe()
    }

    /// Changes what is known live.
    pub fn edit_live<T>(&self, edit: impl FnOnce(&mut Live) -> T) -> T {
        let result = {
            let _one = self.live_lock.lock();
            let mut live = Live::clone(&self.live.load());
            let result = edit(&mut live);
            self.live.store(Arc::new(live));
            result
        };
        self.live_changed.send_modify(|n| *n += 1);
        result
    }

    /// Roots and endpoints, as agents are told.
    #[must_use]
    pub fn trust(&self) -> Trust {
        let view = self.ledger.view();
        Trust {
            version: view.cluster.trust_version,
            roots_pem: self.ca.root_pem().to_owned(),
            endpoints: self.endpoints.clone(),
        }
    }

    /// Works out the sets of these hosts anew and hands them to their sessions.
    pub fn refresh_sets<'a>(&self, hosts: impl IntoIterator<Item = &'a HostUid>) {
        let view = self.ledger.view();
        let sets = self.sets.lock();
        for host in hosts {
            if let Some(line) = sets.get(host) {
                let newest = host_set(&view, host).map(|set| set.map(Arc::new));
                line.send_if_modified(|held| {
                    let number = |n: &Newest| {
                        n.as_ref().map(|n| n.as_ref().map(|s| s.number).map_err(|h| *h))
                    };
                    let changed = number(held) != number(&newest);
                    if changed {
                        *held = newest;
                    }
                    changed
                });
            }
        }
    }

    /// Says something to all sessions of a host.
    pub fn order(&self, host: &HostUid, order: &Order) {
        let sessions = self.sessions.lock();
        for (_, line) in sessions.get(host).into_iter().flatten() {
            let _ = line.try_send(order.clone());
        }
    }

    /// Forgets the boots of a host: its quarantine was released.
    pub fn forget_boots(&self, host: &HostUid) {
        if let Some(boots) = self.boots.lock().get_mut(host) {
            boots.forget();
        }
    }

    /// An event about a host.
    #[must_use]
    pub fn host_event(
        &self,
        host: &Host,
        severity: EventSeverity,
        reason: &str,
        message: String,
    ) -> Change {
        Change::AppendEvent(api::Event {
            sequence: 0,
            time: Some(convert::timestamp(wall_now())),
            severity: severity as i32,
            kind: "host".to_owned(),
            name: host.name.to_string(),
            namespace: String::new(),
            uid: host.uid.to_string(),
            reason: reason.to_owned(),
            message,
            actor: "server".to_owned(),
            host: host.name.to_string(),
            deployment: String::new(),
        })
    }

    /// What of a host's statuses must be durable.
    fn durable_parts(
        &self,
        host: &HostUid,
        reports: &[ReplicaReport],
        absent: &[String],
    ) -> Vec<Change> {
        let view = self.ledger.ahead();
        let mut changes = Vec::new();
        for report in reports {
            let Ok(uid) = report.replica_uid.parse() else { continue };
            let Some(replica) = view.replica(&uid).filter(|r| r.host == *host) else { continue };
            let status = report.status.clone().unwrap_or_default();
            let mut next = Replica::clone(replica);
            if let Some(exit) = status.last_exit
                && next.exits.iter().all(|known| known.attempt < exit.attempt)
            {
                next.exits.push(exit);
                let extra = next.exits.len().saturating_sub(MAX_EXITS);
                next.exits.drain(..extra);
                changes.push(self.replica_event(
                    &view,
                    replica,
                    EventSeverity::Warning,
                    "REPLICA_EXITED",
                    {
                        let why = if exit.out_of_memory { " for lack of memory" } else { "" };
                        format!("attempt {} ended with code {}{why}", exit.attempt, exit.code)
                    },
                ));
            }
            if status.ready && next.first_ready.is_none() {
                next.first_ready = Some(wall_now());
                changes.push(self.replica_event(
                    &view,
                    replica,
                    EventSeverity::Info,
                    "REPLICA_READY",
                    format!("slot {} of release {} is ready", replica.slot, replica.release),
                ));
            }
            if status.reason == "REPLACEMENT_FAILED" && !next.failed {
                next.failed = true;
                next.reason.clone_from(&status.message);
            }
            if next != **replica {
                changes.push(Change::PutReplica(Arc::new(next)));
            }
        }
        for uid in absent {
            let Ok(uid) = uid.parse() else { continue };
            if let Some(replica) = view.replica(&uid)
                && replica.host == *host
                && replica.intent == ReplicaIntent::Stop
            {
                changes.push(Change::DeleteReplica(uid));
            }
        }
        changes
    }

    fn replica_event(
        &self,
        view: &berth_server_core::view::View,
        replica: &Replica,
        severity: EventSeverity,
        reason: &str,
        message: String,
    ) -> Change {
        let deployment = view.deployment(&replica.deployment);
        let name = deployment.map(|d| d.name.to_string()).unwrap_or_default();
        Change::AppendEvent(api::Event {
            sequence: 0,
            time: Some(convert::timestamp(wall_now())),
            severity: severity as i32,
            kind: "replica".to_owned(),
            name: format!("{name}/{}", replica.slot),
            namespace: deployment.map(|d| d.namespace.to_string()).unwrap_or_default(),
            uid: replica.uid.to_string(),
            reason: reason.to_owned(),
            message,
            actor: format!("host/{}", replica.host),
            host: view.host(&replica.host).map(|h| h.name.to_string()).unwrap_or_default(),
            deployment: name,
        })
    }

    async fn keep(&self, changes: Vec<Change>) -> bool {
        for chunk in changes.chunks(CHUNK) {
            let proposal = Proposal { preconditions: Vec::new(), changes: chunk.to_vec() };
            if self.ledger.propose(proposal).await.is_err() {
                return false;
            }
        }
        true
    }

    fn take_live(&self, reports: &[ReplicaReport], absent: &[String]) {
        let now = self.time().mono;
        self.edit_live(|live| {
            for report in reports {
                if let (Ok(uid), Some(status)) = (report.replica_uid.parse(), &report.status) {
                    live.take(&uid, convert::replica_status_from_api(status), now);
                }
            }
            for uid in absent {
                if let Ok(uid) = uid.parse() {
                    live.remove_replica(&uid);
                }
            }
        });
    }

    /// Facts as stored, when they differ in more than what changes all the time.
    fn facts_change(&self, host: &HostUid, facts: &api::HostFacts) -> Option<Change> {
        let view = self.ledger.ahead();
        let held = view.host(host)?;
        let calm = |f: &api::HostFacts| api::HostFacts { disk_free_bytes: 0, ..f.clone() };
        if held.record.facts.as_ref().map(calm) == Some(calm(facts)) {
            return None;
        }
        let next = held.edited(|record| record.facts = Some(facts.clone())).ok()?;
        Some(Change::PutHost(Arc::new(next)))
    }
}

/// The desk of a cluster.
pub struct ClusterDesk(pub Arc<Cluster>);

#[async_trait::async_trait]
impl Desk for ClusterDesk {
    fn now(&self) -> Now {
        self.0.time()
    }

    fn open(&self, host: &HostUid) -> Lines {
        let c = &self.0;
        let id = c.next_session.fetch_add(1, Ordering::Relaxed);
        let (orders_tx, orders) = mpsc::channel(LINE);
        let (tickets_tx, tickets) = mpsc::channel(LINE);
        c.sessions.lock().entry(host.clone()).or_default().push((id, orders_tx));
        let view = c.ledger.view();
        let newest = host_set(&view, host).map(|set| set.map(Arc::new));
        let sets = {
            let mut all = c.sets.lock();
            let line = all.entry(host.clone()).or_insert_with(|| watch::channel(None).0);
            line.send_replace(newest);
            line.subscribe()
        };
        c.hub.attach(host.clone(), id, tickets_tx);
        Lines { id, sets, tickets, orders }
    }

    async fn register(
        &self,
        host: &HostUid,
        session: u64,
        registration: Registration,
    ) -> Result<(), Ended> {
        let c = &self.0;
        let view = c.ledger.view();
        let Some(record) = view.host(host).cloned() else { return Err(Ended::Unknown) };
        if record.is_removed() {
            c.order(host, &Order::Removed { wipe: record.record.wipe });
            return Ok(());
        }
        if record.record.quarantined {
            return Err(Ended::Quarantined);
        }
        let now = c.time();
        let judged = c
            .boots
            .lock()
            .entry(host.clone())
            .or_default()
            .judge(&registration.boot_nonce, now.mono);
        if judged == Takeover::TwoBoots {
            tracing::error!(host = %record.name, "two boots use one identity; the host is quarantined");
            let quarantined =
                record.edited(|r| r.quarantined = true).map_err(|_| Ended::Unavailable)?;
            let event = c.host_event(
                &record,
                EventSeverity::Error,
                "HOST_QUARANTINED",
                "two boots use this identity; what runs is kept, no new sets are sent".to_owned(),
            );
            c.keep(vec![Change::PutHost(Arc::new(quarantined)), event]).await;
            c.order(host, &Order::End(Ended::Quarantined));
            return Err(Ended::Quarantined);
        }
        // Older sessions of the host end here.
        {
            let mut sessions = c.sessions.lock();
            if let Some(list) = sessions.get_mut(host) {
                for (id, line) in list.iter() {
                    if *id < session {
                        let _ = line.try_send(Order::End(Ended::Superseded));
                    }
                }
                list.retain(|(id, _)| *id >= session);
            }
        }
        // What must be durable, before the host counts as present.
        let mut changes = Vec::new();
        if let Some(facts) = &registration.facts {
            changes.extend(c.facts_change(host, facts));
        }
        changes.extend(c.durable_parts(host, &registration.observed, &[]));
        let observed: std::collections::BTreeSet<&str> =
            registration.observed.iter().map(|r| r.replica_uid.as_str()).collect();
        if registration.engine_observed {
            for replica in view.replicas_on(host) {
                // Complete means that what is not in it is not there.
                if replica.intent == ReplicaIntent::Stop && !observed.contains(replica.uid.as_str())
                {
                    changes.push(Change::DeleteReplica(replica.uid.clone()));
                }
            }
        }
        if view.cluster.observing {
            changes.extend(orphans(&view, host, &registration.observed));
        }
        if !c.keep(changes).await {
            return Err(Ended::Unavailable);
        }
        c.edit_live(|live| {
            live.admit(host, &registration.instance, registration.agent_start, 0);
            live.edit_host(host, |h| {
                h.presence = Presence::Present;
                h.acknowledged = registration.held;
                h.last_seen = Some(now.wall);
                h.refusal.clear();
            });
            for replica in view.replicas_on(host) {
                if registration.engine_observed && !observed.contains(replica.uid.as_str()) {
                    live.remove_replica(&replica.uid);
                }
            }
        });
        c.take_live(&registration.observed, &[]);
        tracing::info!(host = %record.name, session, version = registration.agent_version, "a host is present");
        Ok(())
    }

    fn take(
        &self,
        host: &HostUid,
        _session: u64,
        sequence: u64,
        reports: Vec<ReplicaReport>,
        absent: Vec<String>,
    ) -> Later<bool> {
        let c = Arc::clone(&self.0);
        let host = host.clone();
        let admitted = c.edit_live(|live| {
            let known = live.host(&host).cloned().unwrap_or_default();
            let (instance, start) = (known.instance.clone(), known.agent_start);
            live.edit_host(&host, |h| h.last_seen = Some(wall_now()));
            live.admit(&host, &instance, start, sequence)
        });
        if admitted != Taken::Newer {
            return Box::pin(async { true });
        }
        let changes = c.durable_parts(&host, &reports, &absent);
        c.take_live(&reports, &absent);
        Box::pin(async move { c.keep(changes).await })
    }

    async fn facts(&self, host: &HostUid, _session: u64, facts: api::HostFacts) {
        if let Some(change) = self.0.facts_change(host, &facts) {
            self.0.keep(vec![change]).await;
        }
    }

    fn acknowledged(&self, host: &HostUid, _session: u64, number: SetNumber) {
        self.0.edit_live(|live| {
            live.edit_host(host, |h| {
                h.acknowledged = Some(number);
                h.refusal.clear();
            });
        });
    }

    fn refused(
        &self,
        host: &HostUid,
        _session: u64,
        offered: SetNumber,
        held: Option<SetNumber>,
        verdict: SetVerdict,
    ) {
        let words = format!(
            "it refused set {}.{} ({}); it holds {}",
            offered.epoch,
            offered.generation,
            verdict.as_str_name(),
            held.map_or_else(|| "none".to_owned(), |h| format!("{}.{}", h.epoch, h.generation)),
        );
        self.0.edit_live(|live| live.edit_host(host, |h| h.refusal = words));
    }

    async fn trusts(&self, host: &HostUid, version: u64) {
        let view = self.0.ledger.ahead();
        if let Some(held) = view.host(host)
            && held.record.trust_version < version
            && let Ok(next) = held.edited(|r| r.trust_version = version)
        {
            self.0.keep(vec![Change::PutHost(Arc::new(next))]).await;
        }
    }

    fn clock(&self, host: &HostUid, _session: u64, offset_ms: i64) {
        self.0.edit_live(|live| {
            live.edit_host(host, |h| {
                h.clock_offset_ms = offset_ms;
                h.last_seen = Some(wall_now());
            });
        });
    }

    async fn close(&self, host: &HostUid, session: u64) {
        let c = &self.0;
        c.hub.detach(host, session);
        let last = {
            let mut sessions = c.sessions.lock();
            let list = sessions.entry(host.clone()).or_default();
            list.retain(|(id, _)| *id != session);
            let last = list.is_empty();
            if last {
                sessions.remove(host);
            }
            last
        };
        if last {
            let now = c.time().mono;
            c.edit_live(|live| {
                if live.presence(host) == Presence::Present {
                    live.edit_host(host, |h| h.presence = Presence::Away(now));
                }
            });
        }
    }
}

/// Since a restore: what a host runs and the ledger does not know is kept as an orphan.
fn orphans(
    view: &berth_server_core::view::View,
    host: &HostUid,
    observed: &[ReplicaReport],
) -> Vec<Change> {
    let mut changes = Vec::new();
    for report in observed {
        let (Ok(uid), Ok(deployment)) = (report.replica_uid.parse(), report.deployment_uid.parse())
        else {
            continue;
        };
        if view.replica(&uid).is_some() {
            continue;
        }
        changes.push(Change::PutReplica(Arc::new(Replica {
            uid,
            deployment,
            slot: report.slot,
            release: berth_proto::ids::ReleaseNumber(report.release),
            host: host.clone(),
            intent: ReplicaIntent::Orphan,
            replaces: None,
            stands_in_for: None,
            created: wall_now(),
            first_ready: None,
            attempt_floor: 0,
            exits: Vec::new(),
            failed: false,
            reason: "found after a restore".to_owned(),
            revision: Revision(0),
        })));
    }
    changes
}
