//! What all parts of the server share, and the desk that sessions speak to.

use crate::doors::DoorTls;
use crate::doors::certificates::{CertificateError, Internal};
use crate::identity::roots::Roots;
use crate::ledger::Ledger;
use crate::registry::Registry;
use crate::session::desk::{Desk, Ended, Later, Lines, Newest, Order};
use crate::session::reverse::ReverseHub;
use arc_swap::ArcSwap;
use berth_proto::agent::{ReplicaReport, SetVerdict, Trust};
use berth_proto::api::{self, EventSeverity};
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, SetNumber, Wall};
use berth_proto::record::ClusterRecord;
use berth_proto::tls::TlsError;
use berth_server_core::batching::{Proposal, Refusal};
use berth_server_core::change::Change;
use berth_server_core::desk::{self, Admission, Admitted};
use berth_server_core::dispatch::{host_set, is_news};
use berth_server_core::intake::{self, Absent};
use berth_server_core::keeping::{Keeping, Next};
use berth_server_core::live::Live;
use berth_server_core::objects::Host;
use berth_server_core::planner::Report;
use berth_server_core::session::Registration;
use berth_server_core::view::View;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// Orders and tickets waiting for one session.
const LINE: usize = 16;
/// The open sessions, and how to say something to each.
#[derive(Default)]
struct Sessions {
    desk: desk::Desk,
    orders: HashMap<u64, mpsc::Sender<Order>>,
}

/// What all parts of the server share.
pub struct Cluster {
    /// The ledger.
    pub ledger: Ledger,
    /// The certificate authority.
    pub roots: Roots,
    /// The registry.
    pub registry: Registry,
    /// Reverse connections.
    pub hub: ReverseHub,
    /// What is known and not stored.
    pub live: ArcSwap<Live>,
    /// The newest plan's report of each deployment.
    pub reports: Mutex<BTreeMap<DeploymentUid, Report>>,
    /// One-time links to the page.
    pub links: crate::page::Links,
    /// The ballast was given up: of what people ask for only what makes room is taken.
    pub cramped: std::sync::atomic::AtomicBool,
    /// Held while the roots change.
    pub rotating: tokio::sync::Mutex<()>,
    /// Held while the cluster's own record is read and written.
    pub recording: tokio::sync::Mutex<()>,
    /// Held while a backup is made.
    pub backing_up: Arc<tokio::sync::Mutex<()>>,
    /// Views of lists that callers walk through.
    pub walked: Mutex<crate::api::lists::Walked>,
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
    shown: OnceLock<Shown>,
    live_lock: Mutex<()>,
    live_changed: watch::Sender<u64>,
    revoked: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    news: Mutex<crate::planning::News>,
    sessions: Mutex<Sessions>,
    sets: Mutex<HashMap<HostUid, watch::Sender<Newest>>>,
}

/// The wall clock.
#[must_use]
pub fn wall_now() -> Wall {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Wall(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// What shows the roots to whoever comes, and asks for certificates of them.
pub struct Shown {
    /// The server's own certificate.
    pub internal: Arc<Internal>,
    /// All doors.
    pub doors: Vec<Arc<DoorTls>>,
}

/// What a cluster is made of.
pub struct Parts {
    /// The ledger.
    pub ledger: Ledger,
    /// The certificate authority.
    pub roots: Roots,
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
        let Parts { ledger, roots, registry, settings, ports } = parts;
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
            roots,
            registry,
            hub: ReverseHub::default(),
            live: ArcSwap::default(),
            reports: Mutex::default(),
            links: crate::page::Links::default(),
            cramped: std::sync::atomic::AtomicBool::default(),
            rotating: tokio::sync::Mutex::default(),
            recording: tokio::sync::Mutex::default(),
            backing_up: Arc::default(),
            walked: Mutex::default(),
            settings,
            started: wall_now(),
            origin: Instant::now(),
            shown: OnceLock::new(),
            live_lock: Mutex::new(()),
            live_changed: watch::channel(0).0,
            revoked: watch::channel(0).0,
            stopping: watch::channel(false).0,
            news: Mutex::default(),
            sessions: Mutex::default(),
            sets: Mutex::default(),
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

    /// Tells when a user's standing may have changed.
    #[must_use]
    pub fn revocations(&self) -> watch::Receiver<u64> {
        self.revoked.subscribe()
    }

    /// A user or token was written: whoever goes on calling is judged again.
    pub fn judge_again(&self) {
        self.revoked.send_modify(|n| *n += 1);
    }

    /// Tells when the server stops.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// The server stops: calls that would go on end now.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Changes what is known live.
    pub fn edit_live<T>(&self, edit: impl FnOnce(&mut Live) -> T) -> T {
        let result = {
            let _one = self.live_lock.lock();
            let mut live = Live::clone(&self.live.load());
            let result = edit(&mut live);
            let moved = live.take_moved();
            self.live.store(Arc::new(live));
            // After the store: whoever takes the news finds what they tell of.
            self.news.lock().extend(moved);
            result
        };
        self.live_changed.send_modify(|n| *n += 1);
        result
    }

    /// What has moved among what is known live since this was last asked. For planning alone.
    pub fn take_moved(&self) -> crate::planning::News {
        std::mem::take(&mut *self.news.lock())
    }

    /// Roots and endpoints, as agents are told.
    #[must_use]
    pub fn trust(&self) -> Trust {
        let view = self.ledger.view();
        Trust {
            version: view.cluster.trust_version,
            roots_pem: self.roots.pem(),
            endpoints: self.endpoints.clone(),
            registry: self.registry_address.clone(),
        }
    }

    /// Tells roots and addresses again to whoever has not said that it holds them, and first writes their
    /// number where that was not done: a step of a rotation may have been cut off behind its files.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn tell_trust_again(&self) -> Result<(), Refusal> {
        self.tell_trust(Vec::new()).await?;
        let view = self.ledger.view();
        let version = view.cluster.trust_version;
        if view.hosts().any(|host| !host.is_removed() && host.record.trust_version < version) {
            self.order_all(&Order::Trust(Box::new(self.trust())));
        }
        Ok(())
    }

    /// Whether the ledger's number is that of the roots there are.
    pub fn roots_are_told(&self, told: &ClusterRecord) -> bool {
        let first = told.roots_sha256.is_empty() && self.roots.next().is_none();
        first || told.roots_sha256 == self.roots.digest()
    }

    /// Raises the number of what agents are told when addresses or roots are others than before, and
    /// tells those that are there. `noted` is written with it, or alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn tell_trust(&self, noted: Vec<Change>) -> Result<(), Refusal> {
        let _one = self.recording.lock().await;
        let told = self.ledger.ahead().cluster.clone();
        let same = told.endpoints == self.endpoints
            && told.registry == self.registry_address
            && self.roots_are_told(&told);
        let mut changes = noted;
        if !same {
            let seconds = u64::try_from(wall_now().0 / 1000).unwrap_or(0);
            changes.push(Change::PutCluster(ClusterRecord {
                // Past what was told before a restored backup, as the epoch is.
                trust_version: (told.trust_version + 1).max(seconds),
                endpoints: self.endpoints.clone(),
                registry: self.registry_address.clone(),
                roots_sha256: self.roots.digest(),
                ..told
            }));
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await?;
        self.order_all(&Order::Trust(Box::new(self.trust())));
        Ok(())
    }

    /// What shows the roots, and asks for certificates of them; once the doors are open.
    pub fn show_with(&self, shown: Shown) {
        // There is one set of doors.
        let _ = self.shown.set(shown);
    }

    /// Has the doors go by the roots (PEM) that there will be, before anything is signed by them.
    ///
    /// # Errors
    /// When it is not PEM of roots.
    pub fn trust_roots(&self, roots_pem: &str) -> Result<(), TlsError> {
        let doors = self.shown.get().map(|shown| shown.doors.as_slice()).unwrap_or_default();
        doors.iter().try_for_each(|door| door.trust(roots_pem))
    }

    /// Has the doors show the present root, and let in none but certificates of the present roots. Who came in
    /// with another one ends with [`Self::judge_again`].
    ///
    /// # Errors
    /// When the server's certificate cannot be made.
    pub fn show_roots(&self) -> Result<(), CertificateError> {
        if let Some(shown) = self.shown.get() {
            shown.internal.make_anew(&self.roots.current())?;
        }
        Ok(self.trust_roots(&self.roots.pem())?)
    }

    /// Works out the sets of these hosts anew and hands them to their sessions.
    pub fn refresh_sets<'a>(&self, hosts: impl IntoIterator<Item = &'a HostUid>) {
        let sets = self.sets.lock();
        // Under the lock: whoever comes later has a view that is not older.
        let view = self.ledger.view();
        for host in hosts {
            if let Some(line) = sets.get(host) {
                let newest = host_set(&view, host).map(|set| set.map(Arc::new));
                line.send_if_modified(|held| {
                    let changed = is_news(held, &newest);
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
        for line in sessions.desk.sessions_of(host) {
            sessions.say(line, order);
        }
    }

    /// Says something to all sessions.
    fn order_all(&self, order: &Order) {
        let sessions = self.sessions.lock();
        for session in sessions.orders.keys() {
            sessions.say(*session, order);
        }
    }

    /// Forgets the boots of a host: its quarantine was released.
    pub fn forget_boots(&self, host: &HostUid) {
        self.sessions.lock().desk.forget_boots(host);
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
        intake::host_event(host, severity, reason, message, wall_now())
    }

    /// Quarantines a host whose identity is used twice, as `why` says, and ends its sessions.
    pub async fn quarantine(&self, host: &HostUid, why: &str) {
        tracing::error!(%host, why, "a host is quarantined");
        let now = wall_now();
        self.keep_made(|view| intake::quarantine(view, host, why, now)).await;
        self.order(host, &Order::End(Ended::Quarantined));
    }

    /// Keeps what `make` finds to be written. Each object must be as `make` saw it; where the planner
    /// or an operator was faster, it is made anew from what is there then, so that none of them undoes
    /// another's write.
    pub async fn keep_made(&self, make: impl Fn(&View) -> Vec<Change>) -> bool {
        self.keep_as(Keeping::begin(), make).await
    }

    async fn keep_as(
        &self,
        (mut keeping, mut next): (Keeping, Next),
        make: impl Fn(&View) -> Vec<Change>,
    ) -> bool {
        loop {
            next = match next {
                Next::Make => {
                    let view = self.ledger.ahead();
                    keeping.made(&view, &make(&view), || make(&self.ledger.view()))
                }
                Next::Propose(proposal) => {
                    keeping.answered(self.ledger.propose(proposal).await.err().as_ref())
                }
                Next::Over(kept) => return kept,
            };
        }
    }
}

impl Sessions {
    /// A line that is full, or whose session has just ended, is no error.
    fn say(&self, session: u64, order: &Order) {
        if let Some(orders) = self.orders.get(&session) {
            let _ = orders.try_send(order.clone());
        }
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
        let (orders_tx, orders) = mpsc::channel(LINE);
        let (tickets_tx, tickets) = mpsc::channel(LINE);
        let id = {
            let mut sessions = c.sessions.lock();
            let id = sessions.desk.open(host);
            sessions.orders.insert(id, orders_tx);
            id
        };
        let sets = {
            let mut all = c.sets.lock();
            // Under the lock: whoever comes later has a view that is not older.
            let newest = host_set(&c.ledger.view(), host).map(|set| set.map(Arc::new));
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
    ) -> Result<Newest, Ended> {
        let c = &self.0;
        let view = c.ledger.view();
        let now = c.time();
        let admission = {
            let mut sessions = c.sessions.lock();
            let nonce = &registration.boot_nonce;
            let admission = sessions.desk.judge(&view, host, session, nonce, now.mono);
            if let Admission::Welcome { ends } = &admission {
                for older in ends {
                    sessions.say(*older, &Order::End(Ended::Superseded));
                }
            }
            admission
        };
        match admission {
            Admission::Welcome { .. } => {}
            Admission::Removed { wipe } => {
                c.order(host, &Order::Removed { wipe });
                return Ok(None);
            }
            Admission::Unknown => return Err(Ended::Unknown),
            Admission::Quarantined => return Err(Ended::Quarantined),
            Admission::TwoBoots => {
                c.quarantine(host, "two boots use this identity").await;
                return Err(Ended::Quarantined);
            }
            Admission::Superseded => return Err(Ended::Superseded),
        }
        // What must be durable, before the host counts as present.
        let make = |view: &View| {
            // A newer session has said hello meanwhile: what this one tells is older.
            let current = c.sessions.lock().desk.is_current(host, session);
            let registration = Some(&registration).filter(|_| current);
            registration.map_or_else(Vec::new, |r| intake::registration(view, host, r, now.wall))
        };
        // Nor may what an older session has told, and the ledger still holds, come after it.
        if !c.keep_as(Keeping::behind(), make).await {
            return Err(Ended::Unavailable);
        }
        c.refresh_sets([host]);
        let newest = c.sets.lock().get(host).and_then(|line| line.borrow().clone());
        // Asked under the lock of what is known live, so that whichever session is newer has the last
        // word. The view is newer than what was kept just now: it holds the orphans, too.
        let current = c.edit_live(|live| {
            let sessions = c.sessions.lock();
            let view = c.ledger.view();
            sessions.desk.registered(live, &view, (host, session), &registration, now)
        });
        if !current {
            return Err(Ended::Superseded);
        }
        tracing::info!(%host, session, version = registration.agent_version, "a host is present");
        Ok(newest)
    }

    fn take(
        &self,
        host: &HostUid,
        session: u64,
        sequence: u64,
        reports: Vec<ReplicaReport>,
        absent: Vec<String>,
    ) -> Later<bool> {
        let c = Arc::clone(&self.0);
        let host = host.clone();
        let now = c.time();
        // One edit for the whole message, however many replicas it tells of. Whether the session is
        // still the host's is asked under the same lock: an older one's numbers mean nothing to a
        // newer one's.
        let admitted = c.edit_live(|live| {
            let sessions = c.sessions.lock();
            let of = (&host, session, sequence);
            sessions.desk.statuses(live, &c.ledger.view(), of, (&reports, &absent), now)
        });
        let held = match admitted {
            Admitted::News { held } => held,
            Admitted::Known => return Box::pin(async { true }),
            Admitted::Superseded => return Box::pin(async { false }),
        };
        Box::pin(async move {
            let make = |view: &View| {
                let absent = Absent { uids: &absent, held };
                intake::statuses(view, &host, &reports, absent, now.wall)
            };
            c.keep_made(make).await
        })
    }

    async fn facts(&self, host: &HostUid, session: u64, facts: api::HostFacts) -> bool {
        let make = |view: &View| {
            let current = self.0.sessions.lock().desk.is_current(host, session);
            let facts = Some(&facts).filter(|_| current);
            facts.and_then(|facts| intake::facts(view, host, facts)).into_iter().collect()
        };
        self.0.keep_made(make).await
    }

    async fn acknowledged(
        &self,
        host: &HostUid,
        session: u64,
        number: SetNumber,
        known: Option<BTreeSet<String>>,
    ) -> bool {
        let current = self.0.edit_live(|live| {
            self.0.sessions.lock().desk.acknowledged(live, host, session, number)
        });
        let Some(known) = known.filter(|_| current) else { return true };
        let make = |view: &View| intake::never_there(view, host, number, &known);
        self.0.keep_made(make).await
    }

    fn refused(
        &self,
        host: &HostUid,
        session: u64,
        offered: SetNumber,
        held: Option<SetNumber>,
        verdict: SetVerdict,
    ) {
        self.0.edit_live(|live| {
            let sessions = self.0.sessions.lock();
            sessions.desk.refused(live, (host, session), offered, held, verdict);
        });
    }

    async fn trusts(&self, host: &HostUid, version: u64) -> bool {
        let make = |view: &View| intake::trusts(view, host, version).into_iter().collect();
        self.0.keep_made(make).await
    }

    fn clock(&self, host: &HostUid, session: u64, offset_ms: i64) {
        self.0.edit_live(|live| {
            self.0.sessions.lock().desk.clock(live, (host, session), offset_ms, wall_now());
        });
    }

    async fn close(&self, host: &HostUid, session: u64) {
        let c = &self.0;
        c.hub.detach(host, session);
        let now = c.time();
        c.edit_live(|live| {
            // Under the lock of what is known live: a session that registers meanwhile has the last
            // word.
            let mut sessions = c.sessions.lock();
            sessions.orders.remove(&session);
            sessions.desk.closed(live, host, session, now);
        });
    }
}
