//! Compares what is wanted with what the engine shows, and carries out the steps.
//!
//! Woken by a new set, by the engine's events and by time, whether or not a server is there. Nothing
//! is remembered of a step that failed: it comes up again. Steps of different replicas run at the
//! same time, within a bound; a replica has at most one under way.

use crate::engine::{
    BindMount, ContainerSpec, ContainerState, Engine, EngineError, NETWORK, NetworkMode,
    ObservedContainer, PortSpec,
};
use crate::fetch::artifact;
use crate::fetch::client::Client;
use crate::fetch::door::Door;
use crate::state::{Running, Shared, moment, set_phase, wall_now};
use berth_agent_core::diff::{Container, Memory, State, Step, diff};
use berth_agent_core::policy;
use berth_agent_core::probe::Probing;
use berth_proto::api::{self, ReplicaPhase};
use berth_proto::ids::{ClusterUid, Mono, ReplicaUid};
use berth_proto::values::{AssignmentBody, PlatformImage};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Looks at the engine at least so often, as a check on its events.
const PERIOD: Duration = Duration::from_secs(10);
/// Engine calls at once: the engine starts no more in parallel than this on two cores.
const STEPS: usize = 16;
/// Pulls and transfers at once, so that one big one does not block the others.
const FETCHES: usize = 3;
/// The pause before a step that failed is tried again, doubled up to the bound while it fails.
const RETRY_MS: u64 = 1_000;
const MAX_RETRY_MS: u64 = 60_000;
/// Between two progress reports of a transfer.
const PROGRESS_MS: u64 = 500;

/// Labels of our containers.
pub const LABEL_REPLICA: &str = "io.berth.replica";
/// The attempt's label.
pub const LABEL_ATTEMPT: &str = "io.berth.attempt";

/// Everything the reconciler needs.
pub struct Reconciler {
    shared: Arc<Shared>,
    engine: Arc<dyn Engine>,
    client: Client,
    door: Door,
    steps: Semaphore,
    fetches: Semaphore,
    busy: Mutex<BTreeSet<ReplicaUid>>,
    fetching: Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>,
    retries: Mutex<BTreeMap<ReplicaUid, (u32, Mono)>>,
    probes: Mutex<BTreeMap<ReplicaUid, (u32, Probing)>>,
}

/// The name of a cluster's own bridge: engines let two networks have one name, and two clusters may
/// share an engine.
#[must_use]
pub fn bridge(cluster: &ClusterUid) -> String {
    let text = cluster.as_str();
    format!("{NETWORK}-{}", &text[text.len().saturating_sub(12)..])
}

fn container(observed: &ObservedContainer) -> Option<Container> {
    let state = match &observed.state {
        ContainerState::Created => State::Created,
        ContainerState::Running { .. } => State::Running,
        ContainerState::Exited { code, out_of_memory, finished_at, .. } => State::Exited {
            code: *code,
            out_of_memory: *out_of_memory,
            time: finished_at.unwrap_or_else(wall_now),
        },
        ContainerState::Removing => return None,
    };
    Some(Container {
        id: observed.id.clone(),
        replica: observed.labels.get(LABEL_REPLICA)?.parse().ok()?,
        attempt: observed.labels.get(LABEL_ATTEMPT)?.parse().ok()?,
        state,
    })
}

impl Reconciler {
    /// A reconciler.
    #[must_use]
    pub fn new(shared: Arc<Shared>, engine: Arc<dyn Engine>, client: Client, door: Door) -> Self {
        Self {
            shared,
            engine,
            client,
            door,
            steps: Semaphore::new(STEPS),
            fetches: Semaphore::new(FETCHES),
            busy: Mutex::default(),
            fetching: Mutex::default(),
            retries: Mutex::default(),
            probes: Mutex::default(),
        }
    }

    /// Runs for ever.
    pub async fn run(self: Arc<Self>) {
        tokio::spawn(Arc::clone(&self).follow_events());
        let mut network = false;
        loop {
            if !network {
                network = match self
                    .engine
                    .ensure_network(&self.shared.cluster, &bridge(&self.shared.cluster))
                    .await
                {
                    Ok(()) => true,
                    Err(error) => {
                        tracing::debug!(%error, "the bridge cannot be made yet");
                        false
                    }
                };
            }
            let wait = self.pass(network).await;
            tokio::select! {
                // Cancel-safe: a permit that was not taken stays.
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn follow_events(self: Arc<Self>) {
        use futures_util::StreamExt as _;
        let mut failures = 0_u32;
        loop {
            if let Ok(mut events) = self.engine.events(&self.shared.cluster).await {
                failures = 0;
                self.shared.wake.notify_one();
                while let Some(Ok(_)) = events.next().await {
                    self.shared.wake.notify_one();
                }
            }
            failures = failures.saturating_add(1).min(6);
            // The engine is away: a pause before it is asked again.
            tokio::time::sleep(Duration::from_millis(250 << failures)).await;
            self.shared.wake.notify_one();
        }
    }

    fn engine_is(&self, available: bool) {
        let news = {
            let mut inner = self.shared.inner.lock();
            let changed = inner.facts.engine_available != available;
            inner.facts.engine_available = available;
            changed.then(|| inner.facts.clone())
        };
        if let Some(facts) = news {
            if available {
                tracing::info!("the engine answers");
            } else {
                tracing::warn!(
                    "the engine does not answer; what runs is left alone, it is asked again"
                );
            }
            let _ = self.shared.news.send(crate::state::News::Facts(Box::new(facts)));
        }
    }

    async fn pass(self: &Arc<Self>, network: bool) -> Duration {
        let observed = match self.engine.observe(&self.shared.cluster).await {
            Ok(observed) => observed,
            Err(error) => {
                tracing::debug!(%error, "the engine cannot be asked");
                self.engine_is(false);
                return Duration::from_secs(2);
            }
        };
        self.engine_is(true);
        let containers: Vec<Container> = observed.iter().filter_map(container).collect();
        self.take_in(&observed, &containers);
        let now = self.shared.now().mono;
        let (wanted, memory) = {
            let inner = self.shared.inner.lock();
            (inner.wanted.clone(), inner.memory.clone())
        };
        if let Some(set) = wanted.set() {
            let bodies = set.bodies.values();
            self.door.allow(bodies.map(|b| b.value.source.image.repository.clone()).collect());
        }
        let plan = diff(&wanted, &containers, &memory, now);
        let mut wake = plan.wake;
        let mut sooner = |at: Mono| wake = Some(wake.map_or(at, |held: Mono| held.min(at)));
        for step in plan.steps {
            let replica = step_replica(&step).clone();
            if let Some((_, at)) = self.retries.lock().get(&replica).filter(|(_, at)| now < *at) {
                sooner(*at);
                continue;
            }
            if !network && matches!(step, Step::Create { .. }) {
                continue;
            }
            if !self.busy.lock().insert(replica.clone()) {
                continue;
            }
            let this = Arc::clone(self);
            tokio::spawn(async move {
                let result = this.carry_out(&step).await;
                this.after(&replica, &step, result);
                this.busy.lock().remove(&replica);
                this.shared.wake.notify_one();
            });
        }
        self.probe(now, &mut sooner);
        let until = wake.map_or(PERIOD, |at| Duration::from_millis(at.since_ms(now).max(1)));
        until.min(PERIOD)
    }

    /// What the engine shows, as what others need of it.
    fn take_in(&self, observed: &[ObservedContainer], containers: &[Container]) {
        let mut running = BTreeMap::new();
        let mut all: BTreeMap<ReplicaUid, Vec<(String, u32)>> = BTreeMap::new();
        for (seen, c) in observed.iter().filter_map(|o| Some((o, container(o)?))) {
            all.entry(c.replica.clone()).or_default().push((c.id.clone(), c.attempt));
            if let ContainerState::Running { ip, .. } = &seen.state
                && let Some(body) = self.shared.body(&c.replica)
            {
                let one = Running { id: c.id.clone(), ip: *ip, body, attempt: c.attempt };
                running.insert(c.replica.clone(), one);
            }
        }
        for list in all.values_mut() {
            list.sort_by_key(|(_, attempt)| std::cmp::Reverse(*attempt));
        }
        {
            let mut inner = self.shared.inner.lock();
            inner.engine_observed = true;
            inner.running = running;
            inner.containers = all;
            // Whoever is wanted has a memory, so that its end is noticed.
            let wanted: Vec<ReplicaUid> =
                inner.wanted.set().map(|s| s.entries.keys().cloned().collect()).unwrap_or_default();
            for uid in wanted {
                inner.memory.entry(uid).or_default();
            }
            for c in containers {
                inner.memory.entry(c.replica.clone()).or_default();
            }
        }
        for (seen, c) in observed.iter().filter_map(|o| Some((o, container(o)?))) {
            if let ContainerState::Running { started_at, .. } = &seen.state {
                let now = self.shared.now().mono;
                let body = self.shared.body(&c.replica);
                let ready = {
                    let mut inner = self.shared.inner.lock();
                    let memory = inner.memory.entry(c.replica.clone()).or_default();
                    memory.attempt = memory.attempt.max(c.attempt);
                    memory.first_started.get_or_insert(now);
                    // An adopted container's bytes are here: it runs.
                    memory.bytes_here = true;
                    let unchecked = body.as_ref().is_some_and(|b| b.spec.health.is_none());
                    if unchecked && !memory.ready {
                        memory.ready = true;
                        memory.ready_since = Some(now);
                    }
                    memory.ready
                };
                let started = started_at.and_then(moment);
                self.shared.edit_report(&c.replica, |s| {
                    set_phase(s, c.attempt, ReplicaPhase::Running);
                    s.container_id.clone_from(&c.id);
                    s.start_time = started;
                    s.ready = ready;
                    s.progress = None;
                    if ready {
                        s.reason.clear();
                        s.message.clear();
                    }
                });
            }
        }
    }

    /// Starts the checks that are due.
    fn probe(self: &Arc<Self>, now: Mono, sooner: &mut impl FnMut(Mono)) {
        let running = self.shared.inner.lock().running.clone();
        let mut probes = self.probes.lock();
        probes.retain(|uid, (attempt, _)| running.get(uid).is_some_and(|r| r.attempt == *attempt));
        for (uid, one) in running {
            let Some(check) = one.body.spec.health.clone() else { continue };
            let (_, probing) =
                probes.entry(uid.clone()).or_insert_with(|| (one.attempt, Probing::new(now)));
            if probing.due() > now {
                sooner(probing.due());
                continue;
            }
            // Not before this one's result.
            let mut waiting = probing.clone();
            let at = now.plus_ms(check.timeout_ms + check.interval_ms);
            std::mem::swap(&mut waiting, probing);
            *probing = waiting.clone();
            let this = Arc::clone(self);
            if !this.busy_probe(&uid) {
                continue;
            }
            sooner(at);
            tokio::spawn(async move {
                let outcome = crate::probes::check(&*this.engine, &one, &check).await;
                let now = this.shared.now().mono;
                let (ready, changed, why) = {
                    let mut probes = this.probes.lock();
                    let Some((_, probing)) =
                        probes.get_mut(&uid).filter(|(attempt, _)| *attempt == one.attempt)
                    else {
                        this.done_probe(&uid);
                        return;
                    };
                    let before = probing.is_ready();
                    probing.result(&check, outcome, now);
                    let must = probing.must_restart(&check, now);
                    let mut inner = this.shared.inner.lock();
                    let memory = inner.memory.entry(uid.clone()).or_default();
                    memory.ready = probing.is_ready();
                    memory.must_restart = must;
                    memory.ready_since =
                        if probing.is_ready() { memory.ready_since.or(Some(now)) } else { None };
                    (
                        probing.is_ready(),
                        before != probing.is_ready() || must,
                        probing.last_failure.clone(),
                    )
                };
                this.shared.edit_report(&uid, |s| {
                    s.ready = ready;
                    if ready {
                        s.reason.clear();
                        s.message.clear();
                    } else {
                        "NOT_READY".clone_into(&mut s.reason);
                        s.message = format!("its health check fails: {why}");
                    }
                });
                this.done_probe(&uid);
                let _ = changed;
                this.shared.wake.notify_one();
            });
        }
    }

    fn busy_probe(&self, uid: &ReplicaUid) -> bool {
        let key = probe_key(uid);
        key.is_some_and(|key| self.busy.lock().insert(key))
    }

    fn done_probe(&self, uid: &ReplicaUid) {
        if let Some(key) = probe_key(uid) {
            self.busy.lock().remove(&key);
        }
    }

    fn after(&self, replica: &ReplicaUid, step: &Step, result: Result<(), Failed>) {
        let failed = match result {
            Ok(()) => {
                self.retries.lock().remove(replica);
                return;
            }
            Err(failed) => failed,
        };
        let wait_ms = {
            let mut retries = self.retries.lock();
            let (count, at) = retries.entry(replica.clone()).or_insert((0, Mono(0)));
            *count = count.saturating_add(1);
            let wait = (RETRY_MS << count.saturating_sub(1).min(16)).min(MAX_RETRY_MS);
            *at = self.shared.now().mono.plus_ms(wait);
            wait
        };
        let words = crate::chain(&failed);
        tracing::warn!(%replica, ?step, error = words, retry_ms = wait_ms, "a step failed");
        self.shared.edit_report(replica, |s| {
            failed.reason().clone_into(&mut s.reason);
            s.message.clone_from(&words);
            s.progress = None;
        });
    }

    async fn carry_out(&self, step: &Step) -> Result<(), Failed> {
        match step {
            Step::Fetch(uid) => self.fetch(uid).await,
            Step::Create { replica, attempt } => {
                let _place = self.steps.acquire().await.map_err(|_| Failed::Stopping)?;
                self.create(replica, *attempt).await
            }
            Step::Start { replica, id } => {
                let _place = self.steps.acquire().await.map_err(|_| Failed::Stopping)?;
                Ok(self.start(replica, id).await?)
            }
            Step::Stop { replica, id } => {
                let _place = self.steps.acquire().await.map_err(|_| Failed::Stopping)?;
                let grace = self.shared.body(replica).map_or(10_000, |b| b.spec.stop_grace_ms);
                self.shared.edit_report(replica, |s| s.ready = false);
                Ok(self.engine.stop(id, Duration::from_millis(grace)).await?)
            }
            Step::Remove { id, .. } => {
                let _place = self.steps.acquire().await.map_err(|_| Failed::Stopping)?;
                Ok(self.engine.remove(id, false).await?)
            }
            Step::TakeExit { replica, attempt, state, memory } => {
                self.put_memory(replica, memory)?;
                if let State::Exited { code, out_of_memory, time } = state {
                    let next = memory.not_before.map(|at| {
                        let wait = at.since_ms(self.shared.now().mono);
                        berth_proto::ids::Wall(wall_now().0 + i64::try_from(wait).unwrap_or(0))
                    });
                    self.shared.edit_report(replica, |s| {
                        set_phase(s, *attempt, ReplicaPhase::Exited);
                        s.ready = false;
                        s.last_exit = Some(api::Exit {
                            attempt: *attempt,
                            code: *code,
                            out_of_memory: *out_of_memory,
                            time: moment(*time),
                        });
                        s.next_attempt_time = next.and_then(moment);
                        let (reason, words) = if memory.finished {
                            (
                                "FINISHED",
                                "its program has ended and its policy is not to start it again",
                            )
                        } else {
                            ("BACKOFF", "its program has ended and will be started again")
                        };
                        reason.clone_into(&mut s.reason);
                        s.message = format!("{words} (exit code {code})");
                    });
                }
                Ok(())
            }
            Step::Remember { replica, memory } => {
                self.put_memory(replica, memory)?;
                if memory.rolled_back {
                    self.shared.edit_report(replica, |s| {
                        s.ready = false;
                        "REPLACEMENT_FAILED".clone_into(&mut s.reason);
                        s.message = format!(
                            "it was not ready in time, its predecessor was brought back; last: {}",
                            s.message
                        );
                    });
                }
                Ok(())
            }
            Step::Absent(uid) => {
                self.shared.absent(uid);
                self.shared.remember().map_err(Failed::Disk)
            }
        }
    }

    fn put_memory(&self, uid: &ReplicaUid, memory: &Memory) -> Result<(), Failed> {
        self.shared.inner.lock().memory.insert(uid.clone(), memory.clone());
        self.shared.remember().map_err(Failed::Disk)
    }

    fn platform(&self, body: &AssignmentBody) -> Option<PlatformImage> {
        let inner = self.shared.inner.lock();
        let (os, arch) = (&inner.facts.os, &inner.facts.arch);
        body.source.image.platforms.iter().find(|p| p.os == *os && p.arch == *arch).cloned()
    }

    fn forbid(&self, uid: &ReplicaUid, why: &str) {
        self.shared.inner.lock().memory.entry(uid.clone()).or_default().forbidden = true;
        self.shared.edit_report(uid, |s| {
            "FORBIDDEN".clone_into(&mut s.reason);
            why.clone_into(&mut s.message);
        });
    }

    async fn fetch(&self, uid: &ReplicaUid) -> Result<(), Failed> {
        let Some(body) = self.shared.body(uid) else { return Ok(()) };
        let features: BTreeSet<String> = crate::facts::FEATURES.map(str::to_owned).into();
        let (os, arch) = {
            let inner = self.shared.inner.lock();
            (inner.facts.os.clone(), inner.facts.arch.clone())
        };
        let resolved =
            |path: &str| std::fs::canonicalize(path).ok().map(|p| p.to_string_lossy().into_owned());
        let judged = policy::judge(&body, &self.shared.policy, &features, (&os, &arch), resolved);
        if let Err(why) = judged {
            self.forbid(uid, &why.to_string());
            return Ok(());
        }
        let Some(platform) = self.platform(&body) else { return Ok(()) };
        self.shared.edit_report(uid, |s| {
            set_phase(s, s.attempt, ReplicaPhase::Fetching);
            s.reason.clear();
        });
        // One transfer of the same bytes at a time; whoever waits finds them here and takes no place
        // among the transfers meanwhile.
        let mut same = vec![self.one_at_a_time(platform.config_digest.as_str())];
        same.extend(body.source.artifact.iter().map(|a| self.one_at_a_time(a.digest.as_str())));
        let mut turns = Vec::new();
        for one in &same {
            turns.push(one.lock().await);
        }
        let _place = self.fetches.acquire().await.map_err(|_| Failed::Stopping)?;
        let last = Mutex::new((Mono(0), 0_u64));
        let progress = |what: &'static str| {
            let (shared, last) = (&self.shared, &last);
            move |done: u64, total: u64| {
                let now = shared.now().mono;
                let mut held = last.lock();
                let since = now.since_ms(held.0);
                if since < PROGRESS_MS && done < total {
                    return;
                }
                let rate = done.saturating_sub(held.1).saturating_mul(1000) / since.max(1);
                *held = (now, done);
                shared.edit_report(uid, |s| {
                    s.progress = Some(api::Progress {
                        done_bytes: done,
                        total_bytes: total,
                        rate_bytes_per_second: rate,
                        what: what.to_owned(),
                    });
                });
            }
        };
        let name = body.deployment.as_str();
        self.door
            .ensure(&*self.engine, name, &body.source.image, &platform, progress("image"))
            .await
            .map_err(Failed::Image)?;
        if let Some(artifact) = &body.source.artifact {
            let root = self.models();
            tokio::fs::create_dir_all(root.join("trees")).await.map_err(Failed::File)?;
            artifact::fetch(
                &self.client,
                &root,
                &artifact.repository,
                &artifact.digest,
                progress("artifact"),
            )
            .await
            .map_err(Failed::Artifact)?;
        }
        self.shared.inner.lock().memory.entry(uid.clone()).or_default().bytes_here = true;
        self.shared.edit_report(uid, |s| s.progress = None);
        Ok(())
    }

    /// The lock of what is fetched under a digest.
    fn one_at_a_time(&self, digest: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.fetching.lock();
        all.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = all.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        all.insert(digest.to_owned(), Arc::downgrade(&lock));
        lock
    }

    fn models(&self) -> PathBuf {
        self.shared.store.folder().join("models")
    }

    async fn create(&self, uid: &ReplicaUid, attempt: u32) -> Result<(), Failed> {
        let Some(body) = self.shared.body(uid) else { return Ok(()) };
        let Some(platform) = self.platform(&body) else { return Ok(()) };
        let Some(image) =
            self.engine.image(platform.config_digest.as_str()).await.map_err(Failed::Engine)?
        else {
            // Somebody removed it: bring it again.
            self.shared.inner.lock().memory.entry(uid.clone()).or_default().bytes_here = false;
            return Ok(());
        };
        let spec_digest = {
            let inner = self.shared.inner.lock();
            let entry = inner.wanted.set().and_then(|s| s.entries.get(uid).cloned());
            entry.map(|e| e.body_digest).unwrap_or_default()
        };
        // Durable before the container: an attempt's number is never used twice.
        {
            let mut inner = self.shared.inner.lock();
            let memory = inner.memory.entry(uid.clone()).or_default();
            memory.attempt = memory.attempt.max(attempt);
            memory.ready = false;
            memory.ready_since = None;
            memory.not_before = None;
        }
        self.shared.remember().map_err(Failed::Disk)?;
        self.shared.edit_report(uid, |s| {
            set_phase(s, attempt, ReplicaPhase::Creating);
            s.next_attempt_time = None;
            s.reason.clear();
            s.message.clear();
        });
        let spec = self.container_spec(uid, attempt, &body, &image.id, &spec_digest);
        let id = match self.engine.create(&spec).await {
            Ok(id) => id,
            // Left by a crash between making and noticing: it is ours, by its name.
            Err(EngineError::NameTaken(_)) => return Ok(()),
            Err(error) => return Err(Failed::Engine(error)),
        };
        Ok(self.start(uid, &id).await?)
    }

    async fn start(&self, uid: &ReplicaUid, id: &str) -> Result<(), EngineError> {
        self.shared.edit_report(uid, |s| {
            let attempt = s.attempt;
            set_phase(s, attempt, ReplicaPhase::Starting);
        });
        self.engine.start(id).await
    }

    fn container_spec(
        &self,
        uid: &ReplicaUid,
        attempt: u32,
        body: &AssignmentBody,
        image: &str,
        spec_digest: &str,
    ) -> ContainerSpec {
        let want = &body.spec;
        let name = format!("berth-{}-{uid}-{attempt}", body.deployment);
        let mut spec = ContainerSpec::new(&self.shared.cluster, &name, image);
        for (key, value) in [
            ("namespace", body.namespace.to_string()),
            ("deployment", body.deployment_uid.to_string()),
            ("release", body.release.to_string()),
            ("replica", uid.to_string()),
            ("attempt", attempt.to_string()),
            ("spec", spec_digest.to_owned()),
        ] {
            spec.labels.insert(format!("io.berth.{key}"), value);
        }
        spec.env = want.env.clone();
        // What the server adds is not the operator's to override.
        spec.env.extend(body.system_env.clone());
        spec.entrypoint.clone_from(&want.command);
        spec.command.clone_from(&want.args);
        spec.user.clone_from(&want.user);
        spec.mounts = want
            .mounts
            .iter()
            .map(|m| BindMount {
                source: m.source.clone(),
                target: m.target.clone(),
                writable: m.writable,
            })
            .collect();
        if let (Some(artifact), Some(target)) = (&body.source.artifact, &body.artifact_target) {
            let tree = absolute(&self.models().join("trees").join(artifact.digest.hex()));
            spec.mounts.push(BindMount {
                source: tree.to_string_lossy().into_owned(),
                target: target.clone(),
                writable: false,
            });
        }
        spec.ports = want
            .ports
            .iter()
            .map(|p| PortSpec {
                container: p.container,
                publish: p.publish.as_ref().map(|at| SocketAddr::new(at.bind, at.port)),
            })
            .collect();
        let some = |n: u64| (n > 0).then_some(n);
        spec.memory_bytes = some(want.resources.memory_bytes);
        spec.cpu_millis = some(want.resources.cpu_millis);
        spec.log.max_size_bytes = want.log.max_size_bytes;
        spec.log.max_files = want.log.max_files;
        spec.read_only_root = want.read_only_root;
        spec.cap_add = want.privileges.add_capabilities.clone();
        spec.devices = want.privileges.devices.clone();
        spec.privileged = want.privileges.privileged;
        spec.network = if want.privileges.host_network {
            NetworkMode::Host
        } else {
            NetworkMode::Bridge(bridge(&self.shared.cluster))
        };
        spec.stop_grace_s = u32::try_from(want.stop_grace_ms.div_ceil(1000)).unwrap_or(10);
        spec
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn probe_key(uid: &ReplicaUid) -> Option<ReplicaUid> {
    format!("{uid}-probe").parse().ok()
}

fn step_replica(step: &Step) -> &ReplicaUid {
    match step {
        Step::Fetch(replica)
        | Step::Absent(replica)
        | Step::Create { replica, .. }
        | Step::Start { replica, .. }
        | Step::Stop { replica, .. }
        | Step::Remove { replica, .. }
        | Step::TakeExit { replica, .. }
        | Step::Remember { replica, .. } => replica,
    }
}

/// Why a step was not carried out.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the image cannot be brought")]
    Image(#[source] crate::fetch::door::ImageError),
    #[error("the model cannot be brought")]
    Artifact(#[source] crate::fetch::client::FetchError),
    #[error("the agent's disk does not take it")]
    Disk(#[source] crate::store::StoreError),
    #[error("a folder cannot be made")]
    File(#[source] std::io::Error),
    #[error("the agent stops")]
    Stopping,
}

impl Failed {
    fn reason(&self) -> &'static str {
        match self {
            Self::Engine(EngineError::PortInUse(_)) => "PORT_IN_USE",
            Self::Engine(error) if error.is_engine_away() => "ENGINE_AWAY",
            Self::Engine(_) => "START_FAILED",
            Self::Image(_) => "PULL_FAILED",
            Self::Artifact(_) => "FETCH_FAILED",
            Self::Disk(_) | Self::File(_) => "DISK_FAILED",
            Self::Stopping => "STOPPING",
        }
    }
}
