//! An engine in memory, for tests and the simulator.
//!
//! It does what it is told, at once, in an order that depends on its calls alone: ids are counted,
//! time is a number the test sets ([`FakeEngine::set_time`]), nothing sleeps. Failures are scripted:
//! the next call of a kind fails or hangs, a container ends, a container is lost, the engine goes
//! away and comes back. What it holds is what a real one would hold: names are unique, a create
//! needs its image, a start needs its host ports.

use super::{
    CLUSTER_LABEL, Call, ContainerSpec, ContainerState, ContainerStats, Credentials, DiskUsage,
    Engine, EngineError, EngineEvent, EngineInfo, EventKind, EventStream, Exec, ExecSpec,
    ImageInfo, LogChunk, LogQuery, LogStream, ObservedContainer, PullProgress, PullStream, Source,
    Traffic,
};
use async_trait::async_trait;
use berth_proto::ids::{ClusterUid, Wall};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// Events a reader may be behind: as many as Docker itself keeps.
const EVENTS_KEPT: usize = 256;

/// What the next call of a kind meets.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    Fail(EngineError),
    /// Never answers: the caller sees the call's deadline, at once.
    Hang,
    /// Does it, and the answer is lost.
    LoseAnswer,
}

#[derive(Debug, Clone)]
struct Container {
    spec: ContainerSpec,
    state: ContainerState,
    ip: Ipv4Addr,
    log: Vec<LogChunk>,
}

#[derive(Debug)]
struct State {
    up: bool,
    time: Wall,
    made: u64,
    containers: BTreeMap<String, Container>,
    /// Image id to its names.
    images: BTreeMap<String, BTreeSet<String>>,
    /// What a registry would give: name to image id.
    registry: BTreeMap<String, String>,
    networks: BTreeSet<String>,
    gateway: Option<IpAddr>,
    data_root: String,
    faults: BTreeMap<Call, VecDeque<Fault>>,
    calls: Vec<(Call, String)>,
    execs: BTreeMap<String, i32>,
    exec_code: i32,
    /// Commands that have not ended.
    hung: BTreeSet<String>,
    events: Option<broadcast::Sender<EngineEvent>>,
}

/// An engine in memory. Clones are the same engine.
#[derive(Debug, Clone)]
pub struct FakeEngine {
    state: Arc<Mutex<State>>,
    /// Grows with every line of output, for those who follow.
    written: Arc<watch::Sender<u64>>,
    /// How many read the output of a command that hangs.
    attached: Arc<AtomicUsize>,
}

impl Default for FakeEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeEngine {
    /// An engine with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        let state = State {
            up: true,
            time: Wall(0),
            made: 0,
            containers: BTreeMap::new(),
            images: BTreeMap::new(),
            registry: BTreeMap::new(),
            networks: BTreeSet::new(),
            gateway: Some(Ipv4Addr::LOCALHOST.into()),
            data_root: "/".to_owned(),
            faults: BTreeMap::new(),
            calls: Vec::new(),
            execs: BTreeMap::new(),
            exec_code: 0,
            hung: BTreeSet::new(),
            events: Some(broadcast::channel(EVENTS_KEPT).0),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            written: Arc::new(watch::channel(0).0),
            attached: Arc::default(),
        }
    }

    /// Sets the host's address in every network.
    pub fn set_gateway(&self, gateway: Option<IpAddr>) {
        self.state.lock().gateway = gateway;
    }

    /// Sets where images and containers are kept.
    pub fn set_data_root(&self, folder: &str) {
        folder.clone_into(&mut self.state.lock().data_root);
    }

    /// Sets the time that stamps show.
    pub fn set_time(&self, time: Wall) {
        self.state.lock().time = time;
    }

    /// The engine holds this image, under these names.
    pub fn add_image(&self, id: &str, names: &[&str]) {
        let names = names.iter().map(|n| (*n).to_owned());
        self.state.lock().images.entry(id.into()).or_default().extend(names);
    }

    /// A pull of `reference` will bring the image `id`.
    pub fn offer_image(&self, reference: &str, id: &str) {
        self.state.lock().registry.insert(reference.into(), id.into());
    }

    /// The image is gone, whoever uses it.
    pub fn lose_image(&self, id: &str) {
        self.state.lock().images.remove(id);
    }

    /// The next call of this kind fails. Several are met in order.
    pub fn fail_next(&self, call: Call, error: EngineError) {
        self.state.lock().faults.entry(call).or_default().push_back(Fault::Fail(error));
    }

    /// The next call of this kind is not answered: it ends as timed out, without any waiting.
    pub fn hang_next(&self, call: Call) {
        self.state.lock().faults.entry(call).or_default().push_back(Fault::Hang);
    }

    /// The next call of this kind is done, and its answer lost.
    pub fn lose_next_answer(&self, call: Call) {
        self.state.lock().faults.entry(call).or_default().push_back(Fault::LoseAnswer);
    }

    /// The engine goes away: calls fail, event streams end. Containers run on (live restore).
    pub fn go_away(&self) {
        let mut state = self.state.lock();
        state.up = false;
        state.events = None;
    }

    /// The engine is back.
    pub fn come_back(&self) {
        let mut state = self.state.lock();
        state.up = true;
        state.events.get_or_insert_with(|| broadcast::channel(EVENTS_KEPT).0);
    }

    /// The machine boots: every running container has ended, the engine is back.
    pub fn reboot(&self) {
        self.go_away();
        {
            let mut state = self.state.lock();
            let now = state.time;
            for container in state.containers.values_mut() {
                if matches!(container.state, ContainerState::Running { .. }) {
                    container.state = exited(255, false, now);
                }
            }
        }
        self.come_back();
    }

    /// The program of a container ends by itself.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn crash(&self, id: &str, code: i32, out_of_memory: bool) {
        let mut state = self.state.lock();
        let now = state.time;
        let container = state.containers.get_mut(id).expect("a container to crash");
        container.state = exited(code, out_of_memory, now);
        if out_of_memory {
            state.tell(id, EventKind::OutOfMemory);
        }
        state.tell(id, EventKind::Die { code: Some(code) });
        drop(state);
        self.written.send_modify(|n| *n += 1);
    }

    /// Somebody removed the container behind our back; nothing is told.
    pub fn lose_container(&self, id: &str) {
        self.state.lock().containers.remove(id);
    }

    /// The program of a container writes `text`.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn write_log(&self, id: &str, source: Source, text: &str) {
        let mut state = self.state.lock();
        let stamp_ns = Some(i128::from(state.time.0) * 1_000_000);
        let container = state.containers.get_mut(id).expect("a container that writes");
        let bytes = Bytes::copy_from_slice(text.as_bytes());
        container.log.push(LogChunk { source, stamp_ns, bytes });
        drop(state);
        self.written.send_modify(|n| *n += 1);
    }

    /// The code with which commands end from now on.
    pub fn set_exec_code(&self, code: i32) {
        self.state.lock().exec_code = code;
    }

    /// Commands that hang (`["hang"]`) end.
    pub fn end_hung(&self) {
        self.state.lock().hung.clear();
    }

    /// How many read the output of a command that hangs.
    #[must_use]
    pub fn attached(&self) -> usize {
        self.attached.load(Ordering::Relaxed)
    }

    /// All calls so far: kind and what they were about.
    #[must_use]
    pub fn calls(&self) -> Vec<(Call, String)> {
        self.state.lock().calls.clone()
    }

    /// All containers there are, of all clusters, whether the engine answers or not.
    #[must_use]
    pub fn containers(&self) -> Vec<ObservedContainer> {
        let state = self.state.lock();
        state.containers.iter().map(|(id, c)| shown(id, c)).collect()
    }

    /// What a container was made with.
    #[must_use]
    pub fn spec(&self, id: &str) -> Option<ContainerSpec> {
        self.state.lock().containers.get(id).map(|c| c.spec.clone())
    }

    /// One call: meets its fault, or is done.
    fn call<T>(
        &self,
        call: Call,
        what: &str,
        work: impl FnOnce(&mut State) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let mut state = self.state.lock();
        state.calls.push((call, what.into()));
        if !state.up {
            return Err(away());
        }
        match state.faults.get_mut(&call).and_then(VecDeque::pop_front) {
            None => work(&mut state),
            Some(Fault::Fail(error)) => Err(error),
            Some(Fault::Hang) => Err(EngineError::Timeout { call, after: call.deadline() }),
            Some(Fault::LoseAnswer) => {
                let _: Result<T, EngineError> = work(&mut state);
                Err(EngineError::Unreachable("connection reset".into()))
            }
        }
    }
}

impl State {
    fn tell(&self, id: &str, kind: EventKind) {
        if let Some(events) = &self.events {
            // No reader is no error.
            let _: Result<usize, _> =
                events.send(EngineEvent { container: id.into(), kind, time: Some(self.time) });
        }
    }

    /// Ids and names mean containers, as with a real engine.
    fn id_of(&self, container: &str) -> Result<String, EngineError> {
        if self.containers.contains_key(container) {
            return Ok(container.into());
        }
        let named = self.containers.iter().find(|(_, c)| c.spec.name == container);
        named.map(|(id, _)| id.clone()).ok_or_else(|| EngineError::NotFound(container.into()))
    }

    fn get(&mut self, id: &str) -> Result<&mut Container, EngineError> {
        self.containers.get_mut(id).ok_or_else(|| EngineError::NotFound(id.into()))
    }

    fn image_id(&self, reference: &str) -> Option<String> {
        if self.images.contains_key(reference) {
            return Some(reference.into());
        }
        self.images.iter().find(|(_, names)| names.contains(reference)).map(|(id, _)| id.clone())
    }
}

/// Counted as long as it lives.
struct Attached(Arc<AtomicUsize>);

impl Attached {
    fn to(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn away() -> EngineError {
    EngineError::Unreachable("the engine is stopped".into())
}

fn exited(code: i32, out_of_memory: bool, at: Wall) -> ContainerState {
    ContainerState::Exited { code, out_of_memory, finished_at: Some(at), error: String::new() }
}

fn is_of(cluster: &ClusterUid, container: &Container) -> bool {
    container.spec.labels.get(CLUSTER_LABEL).map(String::as_str) == Some(cluster.as_str())
}

fn published(spec: &ContainerSpec) -> BTreeMap<u16, SocketAddr> {
    spec.ports.iter().filter_map(|p| p.publish.map(|at| (p.container, at))).collect()
}

fn shown(id: &str, container: &Container) -> ObservedContainer {
    ObservedContainer {
        id: id.into(),
        name: container.spec.name.clone(),
        labels: container.spec.labels.clone(),
        image_id: container.spec.image_id.clone(),
        state: container.state.clone(),
        stop_grace_s: Some(container.spec.stop_grace_s),
        mount_sources: container.spec.mounts.iter().map(|m| m.source.clone()).collect(),
        published: match container.state {
            ContainerState::Running { .. } => published(&container.spec),
            ContainerState::Created | ContainerState::Exited { .. } | ContainerState::Removing => {
                BTreeMap::new()
            }
        },
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn ping(&self) -> Result<(), EngineError> {
        self.call(Call::Ping, "", |_| Ok(()))
    }

    async fn info(&self) -> Result<EngineInfo, EngineError> {
        self.call(Call::Info, "", |state| {
            Ok(EngineInfo {
                name: "Fake".into(),
                version: "1.0".into(),
                api_version: "1.41".into(),
                arch: "amd64".into(),
                os: "linux".into(),
                kernel: "0".into(),
                cpus: 4,
                memory_bytes: 8 << 30,
                live_restore: true,
                data_root: state.data_root.clone(),
            })
        })
    }

    async fn observe(&self, cluster: &ClusterUid) -> Result<Vec<ObservedContainer>, EngineError> {
        self.call(Call::Observe, "", |state| {
            let ours = state.containers.iter().filter(|(_, c)| is_of(cluster, c));
            Ok(ours.map(|(id, c)| shown(id, c)).collect())
        })
    }

    async fn inspect(
        &self,
        cluster: &ClusterUid,
        container: &str,
    ) -> Result<ObservedContainer, EngineError> {
        self.call(Call::Inspect, container, |state| {
            let id = state.id_of(container)?;
            let found = state.get(&id)?;
            if is_of(cluster, found) {
                Ok(shown(&id, found))
            } else {
                Err(EngineError::NotFound(container.into()))
            }
        })
    }

    async fn create(&self, spec: &ContainerSpec) -> Result<String, EngineError> {
        self.call(Call::Create, &spec.name, |state| {
            if !state.images.contains_key(&spec.image_id) {
                return Err(EngineError::NoSuchImage(spec.image_id.clone()));
            }
            if state.containers.values().any(|c| c.spec.name == spec.name) {
                return Err(EngineError::NameTaken(spec.name.clone()));
            }
            state.made += 1;
            let id = format!("{:064x}", state.made);
            let [.., high, low] = state.made.to_be_bytes();
            let container = Container {
                spec: spec.clone(),
                state: ContainerState::Created,
                ip: Ipv4Addr::new(172, 31, high, low),
                log: Vec::new(),
            };
            state.containers.insert(id.clone(), container);
            state.tell(&id, EventKind::Create);
            Ok(id)
        })
    }

    async fn start(&self, id: &str) -> Result<(), EngineError> {
        self.call(Call::Start, id, |state| {
            let wanted = published(&state.get(id)?.spec);
            let taken = state.containers.iter().any(|(other, c)| {
                other != id
                    && matches!(c.state, ContainerState::Running { .. })
                    && published(&c.spec).values().any(|at| wanted.values().any(|w| w == at))
            });
            if taken {
                return Err(EngineError::PortInUse("port is already allocated".into()));
            }
            let now = state.time;
            let container = state.get(id)?;
            if !matches!(container.state, ContainerState::Running { .. }) {
                let ip = Some(IpAddr::V4(container.ip));
                container.state =
                    ContainerState::Running { started_at: Some(now), ip, paused: false };
                state.tell(id, EventKind::Start);
            }
            Ok(())
        })
    }

    async fn stop(&self, id: &str, _grace: Duration) -> Result<(), EngineError> {
        let done = self.call(Call::Stop, id, |state| {
            let now = state.time;
            let container = state.get(id)?;
            if matches!(container.state, ContainerState::Running { .. }) {
                container.state = exited(143, false, now);
                state.tell(id, EventKind::Die { code: Some(143) });
            }
            Ok(())
        });
        self.written.send_modify(|n| *n += 1);
        done
    }

    async fn remove(&self, id: &str, force: bool) -> Result<(), EngineError> {
        let done = self.call(Call::Remove, id, |state| {
            let Some(container) = state.containers.get(id) else { return Ok(()) };
            if matches!(container.state, ContainerState::Running { .. }) && !force {
                let message = "You cannot remove a running container".into();
                return Err(EngineError::Other { status: 409, message });
            }
            state.containers.remove(id);
            state.tell(id, EventKind::Destroy);
            Ok(())
        });
        self.written.send_modify(|n| *n += 1);
        done
    }

    async fn image(&self, reference: &str) -> Result<Option<ImageInfo>, EngineError> {
        self.call(Call::Image, reference, |state| {
            Ok(state.image_id(reference).map(|id| {
                let names = &state.images[&id];
                let (repo_digests, tags) = names.iter().cloned().partition(|n| n.contains('@'));
                ImageInfo {
                    id,
                    tags,
                    repo_digests,
                    arch: "amd64".into(),
                    size_bytes: 1 << 20,
                    user: String::new(),
                    layers: Vec::new(),
                }
            }))
        })
    }

    fn pull(&self, reference: &str, _credentials: Option<Credentials>) -> PullStream {
        let pulled = self.call(Call::Pull, reference, |state| {
            let id = state.registry.get(reference).cloned();
            let id = id.ok_or_else(|| EngineError::NoSuchImage(reference.into()))?;
            state.images.entry(id).or_default().insert(reference.into());
            Ok(())
        });
        let step = |status: &str, current_bytes| {
            Ok(PullProgress {
                layer: "0123456789ab".into(),
                status: status.into(),
                current_bytes: Some(current_bytes),
                total_bytes: Some(1 << 20),
            })
        };
        match pulled {
            Ok(()) => {
                stream::iter([step("Downloading", 1 << 19), step("Pull complete", 1 << 20)]).boxed()
            }
            Err(error) => stream::iter([Err(error)]).boxed(),
        }
    }

    async fn tag(&self, image: &str, repository: &str, tag: &str) -> Result<(), EngineError> {
        self.call(Call::Image, image, |state| {
            let id = state.image_id(image).ok_or_else(|| EngineError::NoSuchImage(image.into()))?;
            let name = format!("{repository}:{tag}");
            for names in state.images.values_mut() {
                names.remove(&name);
            }
            state.images.entry(id).or_default().insert(name);
            Ok(())
        })
    }

    async fn remove_image(&self, reference: &str) -> Result<(), EngineError> {
        self.call(Call::Image, reference, |state| {
            let Some(id) = state.image_id(reference) else { return Ok(()) };
            let used = state.containers.values().any(|c| c.spec.image_id == id);
            let names = state.images.entry(id.clone()).or_default();
            if id == reference {
                names.clear();
            } else {
                names.remove(reference);
            }
            if names.is_empty() && !used {
                state.images.remove(&id);
            }
            Ok(())
        })
    }

    async fn images_named(&self, prefix: &str) -> Result<Vec<(String, String)>, EngineError> {
        self.call(Call::Image, prefix, |state| {
            let all = state.images.iter();
            let mut named: Vec<_> = all
                .flat_map(|(id, names)| names.iter().map(move |n| (n.clone(), id.clone())))
                .filter(|(name, _)| name.starts_with(prefix) && !name.contains('@'))
                .collect();
            named.sort();
            Ok(named)
        })
    }

    fn logs(&self, id: &str, query: LogQuery) -> LogStream {
        let first = self.call(Call::Logs, id, |state| {
            let log = &state.get(id)?.log;
            let recent = log.iter().filter(|c| c.stamp_ns >= query.since_ns).count();
            let tail = query.tail.map_or(usize::MAX, |t| t as usize);
            Ok(log.len() - recent.min(tail))
        });
        let at = match first {
            Ok(at) => at,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let (engine, id, changed) = (self.clone(), id.to_owned(), self.written.subscribe());
        stream::unfold((engine, changed, at), move |(engine, mut changed, at)| {
            let id = id.clone();
            async move {
                loop {
                    changed.mark_unchanged();
                    let (next, running) = {
                        let state = engine.state.lock();
                        let container = state.containers.get(&id)?;
                        let running = matches!(container.state, ContainerState::Running { .. });
                        (container.log.get(at).cloned(), running)
                    };
                    if let Some(mut next) = next {
                        if !query.timestamps && query.since_ns.is_none() {
                            next.stamp_ns = None;
                        }
                        return Some((Ok(next), (engine, changed, at + 1)));
                    }
                    if !query.follow || !running || changed.changed().await.is_err() {
                        return None;
                    }
                }
            }
        })
        .boxed()
    }

    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Exec, EngineError> {
        let exec = self.call(Call::Exec, id, |state| {
            if !matches!(state.get(id)?.state, ContainerState::Running { .. }) {
                let message = "the container is not running".into();
                return Err(EngineError::Other { status: 409, message });
            }
            state.made += 1;
            let exec = format!("exec-{}", state.made);
            let code = state.exec_code;
            state.execs.insert(exec.clone(), code);
            if spec.command == ["hang"] {
                state.hung.insert(exec.clone());
            }
            Ok(exec)
        })?;
        if spec.command == ["hang"] {
            let attached = Attached::to(&self.attached);
            let output = stream::pending().map(move |never| {
                let _ = &attached;
                never
            });
            let input = Box::pin(tokio::io::sink());
            return Ok(Exec { id: exec, output: output.boxed(), input });
        }
        if spec.command == ["cat"] {
            // What comes in goes out, until it is ended.
            let (ours, programs) = tokio::io::duplex(1024);
            let (read, write) = tokio::io::split(programs);
            drop(write);
            let output = tokio_util::io::ReaderStream::new(read).map(|bytes| {
                let bytes = bytes.map_err(|e| EngineError::Unreachable(e.to_string()))?;
                Ok(LogChunk { source: Source::Stdout, stamp_ns: None, bytes })
            });
            return Ok(Exec { id: exec, output: output.boxed(), input: Box::pin(ours) });
        }
        let words = Bytes::from(format!("{}\n", spec.command.join(" ")));
        let said = LogChunk { source: Source::Stdout, stamp_ns: None, bytes: words };
        Ok(Exec {
            id: exec,
            output: stream::iter([Ok(said)]).boxed(),
            input: Box::pin(tokio::io::sink()),
        })
    }

    async fn exec_resize(&self, exec: &str, _rows: u16, _columns: u16) -> Result<(), EngineError> {
        self.exec_exit(exec).await.map(drop)
    }

    async fn exec_exit(&self, exec: &str) -> Result<Option<i32>, EngineError> {
        self.call(Call::Exec, exec, |state| {
            if state.hung.contains(exec) {
                return Ok(None);
            }
            let code = state.execs.get(exec).copied();
            code.map(Some).ok_or_else(|| EngineError::NotFound(exec.into()))
        })
    }

    async fn events(&self, cluster: &ClusterUid) -> Result<EventStream, EngineError> {
        let events = self.call(Call::Events, "", |state| {
            state.events.as_ref().map(broadcast::Sender::subscribe).ok_or_else(away)
        })?;
        let (state, cluster) = (self.state.clone(), cluster.clone());
        Ok(stream::unfold(events, move |mut events| {
            let (state, cluster) = (state.clone(), cluster.clone());
            async move {
                loop {
                    let event = match events.recv().await {
                        Ok(event) => event,
                        // Events are hints: one that stands for those that were missed.
                        Err(broadcast::error::RecvError::Lagged(_)) => EngineEvent {
                            container: String::new(),
                            kind: EventKind::Other,
                            time: None,
                        },
                        Err(broadcast::error::RecvError::Closed) => return None,
                    };
                    let other = {
                        let state = state.lock();
                        state.containers.get(&event.container).is_some_and(|c| !is_of(&cluster, c))
                    };
                    if !other {
                        return Some((Ok(event), events));
                    }
                }
            }
        })
        .boxed())
    }

    async fn stats(&self, id: &str) -> Result<ContainerStats, EngineError> {
        self.call(Call::Stats, id, |state| {
            let limit = state.get(id)?.spec.memory_bytes.unwrap_or(0);
            Ok(ContainerStats {
                memory_bytes: 1 << 20,
                memory_limit_bytes: limit,
                pids: 1,
                ..ContainerStats::default()
            })
        })
    }

    async fn ensure_network(
        &self,
        _cluster: &ClusterUid,
        name: &str,
        _traffic: Traffic,
    ) -> Result<(), EngineError> {
        self.call(Call::Network, name, |state| {
            state.networks.insert(name.into());
            Ok(())
        })
    }

    async fn gateway(&self, network: &str) -> Result<Option<IpAddr>, EngineError> {
        self.call(Call::Network, network, |state| Ok(state.gateway))
    }

    async fn remove_network(&self, name: &str) -> Result<(), EngineError> {
        self.call(Call::Network, name, |state| {
            state.networks.remove(name);
            Ok(())
        })
    }

    async fn disk_usage(&self) -> Result<DiskUsage, EngineError> {
        self.call(Call::DiskUsage, "", |state| {
            Ok(DiskUsage { images_bytes: (state.images.len() as u64) << 20, containers_bytes: 0 })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> ClusterUid {
        "c".parse().unwrap()
    }

    async fn running(engine: &FakeEngine, name: &str) -> String {
        engine.add_image("sha256:i", &[]);
        let id = engine.create(&ContainerSpec::new(&cluster(), name, "sha256:i")).await.unwrap();
        engine.start(&id).await.unwrap();
        id
    }

    #[tokio::test]
    async fn a_lost_answer_is_done_and_a_failed_call_is_not() {
        let engine = FakeEngine::new();
        engine.add_image("sha256:i", &[]);
        let spec = ContainerSpec::new(&cluster(), "n", "sha256:i");
        engine.hang_next(Call::Create);
        assert!(matches!(engine.create(&spec).await, Err(EngineError::Timeout { .. })));
        assert!(engine.containers().is_empty());
        engine.lose_next_answer(Call::Create);
        assert!(matches!(engine.create(&spec).await, Err(EngineError::Unreachable(_))));
        assert_eq!(engine.create(&spec).await, Err(EngineError::NameTaken("n".into())));
    }

    #[tokio::test]
    async fn events_end_when_the_engine_goes_and_containers_stay() {
        let engine = FakeEngine::new();
        let mut events = engine.events(&cluster()).await.unwrap();
        let id = running(&engine, "n").await;
        engine.go_away();
        let kinds: Vec<_> =
            std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten())
                .map(|e| e.unwrap().kind)
                .collect();
        assert_eq!(kinds, [EventKind::Create, EventKind::Start]);
        assert!(engine.observe(&cluster()).await.unwrap_err().is_engine_away());
        engine.come_back();
        assert_eq!(engine.observe(&cluster()).await.unwrap()[0].id, id);
    }

    #[tokio::test]
    async fn followers_get_every_line_and_end_with_the_program() {
        let engine = FakeEngine::new();
        let id = running(&engine, "n").await;
        engine.write_log(&id, Source::Stdout, "one\n");
        let query = LogQuery { follow: true, ..LogQuery::default() };
        let lines =
            tokio::spawn(engine.logs(&id, query).map(|c| c.unwrap().bytes).collect::<Vec<_>>());
        tokio::task::yield_now().await;
        engine.write_log(&id, Source::Stderr, "two\n");
        engine.crash(&id, 1, false);
        assert_eq!(lines.await.unwrap(), ["one\n", "two\n"]);
    }
}
