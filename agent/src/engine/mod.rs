//! The container engine, as the agent sees it.
//!
//! [`Engine`] speaks containers and nothing else: it knows no deployment and no release, and takes no
//! decision. Its types are its own, so that only [`docker`] knows which library talks to the engine
//! and so that [`fake`] can stand in for it.
//!
//! What always holds:
//!
//! - Only containers with the label [`CLUSTER_LABEL`] of one's own cluster are ever shown.
//! - The engine's own restart policy is `no`: restarting is the agent's business.
//! - Every call ends within the deadline of its kind ([`Call::deadline`]). A stream has a deadline
//!   for its beginning; a pull has besides a limit on silence ([`PULL_STALL`]) and none in total.
//! - All calls may be dropped at any point; what they asked for may or may not have been done then,
//!   which the next [`Engine::observe`] shows.

pub mod docker;
pub mod fake;
pub mod stamp;

use async_trait::async_trait;
use berth_proto::ids::{ClusterUid, Wall};
use berth_proto::values::HostPolicy;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The label whose value is the cluster's uid. A container without ours does not exist for us.
pub const CLUSTER_LABEL: &str = "io.berth.cluster";

/// The name of Berth's own bridge. Traffic between its containers is off.
pub const NETWORK: &str = "berth";

/// A pull that shows no progress for so long is given up.
///
/// Long enough for the engine to verify and unpack a layer of several gigabytes on a slow disk,
/// during which it says nothing new; a pull has no total limit.
pub const PULL_STALL: Duration = Duration::from_secs(180);

/// What a stop may take beyond its grace: the engine kills, waits and tears the network down.
pub const STOP_MARGIN: Duration = Duration::from_secs(20);

/// The kinds of call, each with a deadline of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// Is it there?
    Ping,
    /// Version and machine.
    Info,
    /// All of our containers.
    Observe,
    /// One container.
    Inspect,
    /// Make a container.
    Create,
    /// Start a container.
    Start,
    /// Stop a container; the grace comes on top.
    Stop,
    /// Remove a container.
    Remove,
    /// Look an image up, tag or untag it.
    Image,
    /// Bring an image: the limit is on silence.
    Pull,
    /// The beginning of a stream of logs.
    Logs,
    /// The beginning of a command in a container.
    Exec,
    /// The beginning of the stream of events.
    Events,
    /// One sample of a container's figures.
    Stats,
    /// Look a network up or make it.
    Network,
    /// What is used on disk.
    DiskUsage,
}

impl Call {
    /// How long the engine may take.
    #[must_use]
    pub const fn deadline(self) -> Duration {
        Duration::from_secs(match self {
            // Answered from memory; an engine that needs longer hangs.
            Self::Ping => 5,
            Self::Info | Self::Inspect | Self::Logs | Self::Events | Self::Exec => 15,
            // A sample takes one second on older engines, which wait for a second reading.
            Self::Stats => 10,
            // Some engines hold their list's lock while they start others: measured at seconds
            // under 16 concurrent starts on two cores.
            Self::Observe => 30,
            // File system and network set-up under load: 0.2 s alone, some seconds with 50 at once.
            Self::Create | Self::Start | Self::Remove | Self::Network => 60,
            // Beyond the grace, which the caller names.
            Self::Stop => STOP_MARGIN.as_secs(),
            // Untagging the last name deletes layers, which is disk work.
            Self::Image => 60,
            Self::Pull => PULL_STALL.as_secs(),
            // Walks all layers and volumes.
            Self::DiskUsage => 120,
        })
    }
}

/// Why the engine did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// No connection, or it broke: the engine is away. Whatever was asked may have been done.
    #[error("the container engine cannot be reached: {0}")]
    Unreachable(String),
    /// It did not answer in time.
    #[error("the container engine did not answer {call:?} within {} s", .after.as_secs())]
    Timeout {
        /// What it was asked.
        call: Call,
        /// The limit.
        after: Duration,
    },
    /// No such container, network or command.
    #[error("the engine has no {0}")]
    NotFound(String),
    /// A container of that name exists.
    #[error("the container name {0} is taken")]
    NameTaken(String),
    /// The image is not there, neither here nor at the registry that was asked.
    #[error("there is no image {0}")]
    NoSuchImage(String),
    /// A host port is in use.
    #[error("a host port is in use: {0}")]
    PortInUse(String),
    /// The engine or the registry refuses these credentials.
    #[error("denied: {0}")]
    Denied(String),
    /// Anything else it said.
    #[error("the engine answered {status}: {message}")]
    Other {
        /// HTTP status; 0: the error came inside a stream or before there was an answer.
        status: u16,
        /// The engine's words: escape before showing.
        message: String,
    },
}

impl EngineError {
    /// Whether the engine is away or hangs: whatever was asked may have been done.
    #[must_use]
    pub fn is_engine_away(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            // A pull's limit is on silence, mostly the registry's or the disk's.
            Self::Timeout { call, .. } => *call != Call::Pull,
            Self::NotFound(_)
            | Self::NameTaken(_)
            | Self::NoSuchImage(_)
            | Self::PortInUse(_)
            | Self::Denied(_)
            | Self::Other { .. } => false,
        }
    }
}

/// A file or folder of the host, shown to the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Absolute path on the host; must exist, nothing is made.
    pub source: String,
    /// Absolute path in the container.
    pub target: String,
    /// Writing is allowed; models are always shown read-only.
    pub writable: bool,
}

/// A TCP port of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortSpec {
    /// In the container.
    pub container: u16,
    /// Where it is published on the host; `None`: nowhere. Port 0 lets the engine choose.
    pub publish: Option<SocketAddr>,
}

/// Which network the program is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkMode {
    /// A bridge by its name; normally [`NETWORK`].
    Bridge(String),
    /// The host's own.
    Host,
    /// None but loopback.
    None,
}

/// Traffic between the containers of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// They are kept apart.
    Off,
    /// As the engine does it: the host's own policy allows it.
    Allowed,
}

impl Traffic {
    /// What the host's own policy says.
    #[must_use]
    pub fn by(policy: &HostPolicy) -> Self {
        if policy.allow_container_traffic { Self::Allowed } else { Self::Off }
    }
}

/// What the engine keeps of a program's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogFiles {
    /// Bytes of one file.
    pub max_size_bytes: u64,
    /// How many.
    pub max_files: u32,
}

impl Default for LogFiles {
    /// 3 files of 10 MB.
    fn default() -> Self {
        Self { max_size_bytes: 10_000_000, max_files: 3 }
    }
}

/// All that is said about a container when it is made. It is never changed later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Its name, unique in the engine.
    pub name: String,
    /// The image's id, never a name that could move.
    pub image_id: String,
    /// Labels; [`CLUSTER_LABEL`] must be among them.
    pub labels: BTreeMap<String, String>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Replaces the image's command; empty: the image's own.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint; empty: the image's own.
    pub entrypoint: Vec<String>,
    /// `user[:group]`; `None`: the image's own.
    pub user: Option<String>,
    /// Files and folders of the host.
    pub mounts: Vec<BindMount>,
    /// Ports.
    pub ports: Vec<PortSpec>,
    /// Bytes of memory, no swap beyond; `None`: no limit.
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU; `None`: no limit.
    pub cpu_millis: Option<u64>,
    /// Output kept.
    pub log: LogFiles,
    /// Programs gain no rights by set-uid files.
    pub no_new_privileges: bool,
    /// The container's own files cannot be written.
    pub read_only_root: bool,
    /// Capabilities taken away; `ALL` takes all.
    pub cap_drop: BTreeSet<String>,
    /// Capabilities added, where the host's policy allows.
    pub cap_add: BTreeSet<String>,
    /// Device files shown, where the host's policy allows.
    pub devices: BTreeSet<String>,
    /// All rights, where the host's policy allows.
    pub privileged: bool,
    /// Network.
    pub network: NetworkMode,
    /// How long the program has after the first signal, in seconds, when the engine itself stops.
    pub stop_grace_s: u32,
}

impl ContainerSpec {
    /// A container with nothing but what it must have: no-new-privileges, Berth's bridge, bounded
    /// logs, 10 s of grace.
    #[must_use]
    pub fn new(cluster: &ClusterUid, name: &str, image_id: &str) -> Self {
        Self {
            name: name.into(),
            image_id: image_id.into(),
            labels: BTreeMap::from([(CLUSTER_LABEL.into(), cluster.to_string())]),
            env: BTreeMap::new(),
            command: Vec::new(),
            entrypoint: Vec::new(),
            user: None,
            mounts: Vec::new(),
            ports: Vec::new(),
            memory_bytes: None,
            cpu_millis: None,
            log: LogFiles::default(),
            no_new_privileges: true,
            read_only_root: false,
            cap_drop: BTreeSet::new(),
            cap_add: BTreeSet::new(),
            devices: BTreeSet::new(),
            privileged: false,
            network: NetworkMode::Bridge(NETWORK.into()),
            stop_grace_s: 10,
        }
    }
}

/// How a container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerState {
    /// Made, never started.
    Created,
    /// Its program runs.
    Running {
        /// Since when; `None`: the engine's stamp could not be read.
        started_at: Option<Wall>,
        /// Its address; `None`: no network of its own.
        ip: Option<IpAddr>,
        /// Frozen by somebody; it still counts as running.
        paused: bool,
    },
    /// Its program has ended, or the engine tried to remove it and failed (`dead`).
    Exited {
        /// Exit code.
        code: i32,
        /// For lack of memory.
        out_of_memory: bool,
        /// When; `None`: the engine's stamp could not be read.
        finished_at: Option<Wall>,
        /// What the engine says of it, for people; often empty.
        error: String,
    },
    /// The engine is removing it.
    Removing,
}

/// One of our containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedContainer {
    /// The engine's id.
    pub id: String,
    /// Its name, without a leading slash.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The image's id.
    pub image_id: String,
    /// How it is.
    pub state: ContainerState,
    /// Ports published: container port to where it really is.
    pub published: BTreeMap<u16, SocketAddr>,
    /// How long its program has after the first signal, as it was made; `None`: the engine's default.
    pub stop_grace_s: Option<u32>,
    /// Paths of the host that it is shown, as it was made with them.
    pub mount_sources: Vec<String>,
}

/// An image the engine holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// `sha256:..`: the digest of the config on engines with the classic store, of the manifest or
    /// index on those with the containerd store.
    pub id: String,
    /// Names it has.
    pub tags: Vec<String>,
    /// `repository@sha256:..` it was pulled by.
    pub repo_digests: Vec<String>,
    /// GOARCH name; empty: not said.
    pub arch: String,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// The user it runs as; empty: root.
    pub user: String,
    /// Its layers by the digests of their unpacked bytes, the lowest first.
    pub layers: Vec<String>,
}

/// User and password for a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User.
    pub username: String,
    /// Password: only `[A-Za-z0-9_-]`, because the way to the engine mangles others.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({}, ..)", self.username)
    }
}

/// One step of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullProgress {
    /// Short id of the layer; empty: the whole image.
    pub layer: String,
    /// The engine's word, e.g. `Downloading`.
    pub status: String,
    /// Bytes so far; `None`: not said (podman never does).
    pub current_bytes: Option<u64>,
    /// Bytes in all.
    pub total_bytes: Option<u64>,
}

/// Where a line of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output: at most one line; a line longer than the engine's 16 KiB comes in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// From where.
    pub source: Source,
    /// When the engine took it, nanoseconds since 1970; `None`: stamps were not asked for or not given.
    pub stamp_ns: Option<i128>,
    /// The bytes with their line end, as the program wrote them: escape before showing.
    pub bytes: Bytes,
}

/// Which output is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogQuery {
    /// Go on with what comes.
    pub follow: bool,
    /// Nothing stamped before, nanoseconds since 1970. Exact, though engines only know seconds.
    pub since_ns: Option<i128>,
    /// Only the last so many lines; `None`: all.
    pub tail: Option<u32>,
    /// Stamps are given. (They are always asked of the engine when `since_ns` is set.)
    pub timestamps: bool,
}

/// A command to run in a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecSpec {
    /// Program and arguments.
    pub command: Vec<String>,
    /// With a terminal: output is one stream, and it can be resized.
    pub tty: bool,
    /// Input will be given.
    pub stdin: bool,
    /// Further environment.
    pub env: BTreeMap<String, String>,
    /// `None`: the container's own user.
    pub user: Option<String>,
}

/// A running command: its ends.
pub struct Exec {
    /// The engine's id, for [`Engine::exec_resize`] and [`Engine::exec_exit`].
    pub id: String,
    /// Output until the command ends.
    pub output: BoxStream<'static, Result<LogChunk, EngineError>>,
    /// Input; dropping it closes it.
    pub input: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>,
}

impl std::fmt::Debug for Exec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Exec({})", self.id)
    }
}

/// What happened to one of our containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was made.
    Create,
    /// It was started.
    Start,
    /// Its program ended.
    Die {
        /// Exit code; `None`: not said.
        code: Option<i32>,
    },
    /// For lack of memory.
    OutOfMemory,
    /// It is gone.
    Destroy,
    /// Anything else worth a look: paused, renamed, updated.
    Other,
}

/// Something happened: a hint to look, never the truth itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineEvent {
    /// The engine's id of the container.
    pub container: String,
    /// What.
    pub kind: EventKind,
    /// When, by the engine's clock; `None`: not said.
    pub time: Option<Wall>,
}

/// Figures of one container at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ContainerStats {
    /// CPU time used since its start, nanoseconds.
    pub cpu_total_ns: u64,
    /// Memory used without page cache.
    pub memory_bytes: u64,
    /// Its limit; 0: none said.
    pub memory_limit_bytes: u64,
    /// Bytes in over all its networks.
    pub rx_bytes: u64,
    /// Bytes out.
    pub tx_bytes: u64,
    /// Processes; 0: not said.
    pub pids: u64,
}

/// The engine and its machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EngineInfo {
    /// `Docker` or `Podman`.
    pub name: String,
    /// The engine's version.
    pub version: String,
    /// The API that was agreed on.
    pub api_version: String,
    /// GOARCH name.
    pub arch: String,
    /// GOOS name.
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Containers survive the engine's restart.
    pub live_restore: bool,
    /// Where it keeps images and containers.
    pub data_root: String,
}

impl EngineInfo {
    /// Whether a network's bridge comes only with its first container, as podman's does.
    #[must_use]
    pub fn makes_bridges_late(&self) -> bool {
        self.name == "Podman"
    }
}

/// What the engine uses on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskUsage {
    /// Bytes of all images' layers.
    pub images_bytes: u64,
    /// Bytes containers have written.
    pub containers_bytes: u64,
}

/// A pull: ends after the last piece, or with an error.
pub type PullStream = BoxStream<'static, Result<PullProgress, EngineError>>;
/// Output: ends when the program's output ends, or with an error.
pub type LogStream = BoxStream<'static, Result<LogChunk, EngineError>>;
/// Events: ends when the engine goes away; the caller then observes again.
pub type EventStream = BoxStream<'static, Result<EngineEvent, EngineError>>;

/// A container engine.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Whether it answers.
    async fn ping(&self) -> Result<(), EngineError>;
    /// Engine and machine.
    async fn info(&self) -> Result<EngineInfo, EngineError>;
    /// All containers of `cluster`, ended ones too, in order of id.
    async fn observe(&self, cluster: &ClusterUid) -> Result<Vec<ObservedContainer>, EngineError>;
    /// One container by id or name; `NotFound` also when it is not of `cluster`.
    async fn inspect(
        &self,
        cluster: &ClusterUid,
        container: &str,
    ) -> Result<ObservedContainer, EngineError>;
    /// Makes a container and gives its id. It is not started.
    async fn create(&self, spec: &ContainerSpec) -> Result<String, EngineError>;
    /// Starts it; starting one that runs is done.
    async fn start(&self, id: &str) -> Result<(), EngineError>;
    /// Asks its program to end, kills it after `grace`; stopping one that does not run is done.
    async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError>;
    /// Removes it and its anonymous volumes, with `force` even while it runs; removing what is not
    /// there is done.
    async fn remove(&self, id: &str, force: bool) -> Result<(), EngineError>;

    /// An image by id or name; `None`: not here.
    async fn image(&self, reference: &str) -> Result<Option<ImageInfo>, EngineError>;
    /// Brings an image. It is here when the stream has ended without an error.
    fn pull(&self, reference: &str, credentials: Option<Credentials>) -> PullStream;
    /// Gives an image a further name, `repository:tag`.
    async fn tag(&self, image: &str, repository: &str, tag: &str) -> Result<(), EngineError>;
    /// Takes a name away; an image without names and containers is deleted. Names that are not there
    /// are done. Never forced: an image that a container uses stays.
    async fn remove_image(&self, reference: &str) -> Result<(), EngineError>;
    /// All names that begin with `prefix`, with the id of each one's image.
    async fn images_named(&self, prefix: &str) -> Result<Vec<(String, String)>, EngineError>;

    /// A container's output.
    fn logs(&self, id: &str, query: LogQuery) -> LogStream;
    /// Runs a command in a container.
    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Exec, EngineError>;
    /// Sets the size of a command's terminal.
    async fn exec_resize(&self, exec: &str, rows: u16, columns: u16) -> Result<(), EngineError>;
    /// The exit code of a command; `None`: it runs still.
    async fn exec_exit(&self, exec: &str) -> Result<Option<i32>, EngineError>;
    /// What happens to containers of `cluster` from now on.
    async fn events(&self, cluster: &ClusterUid) -> Result<EventStream, EngineError>;
    /// Figures of a container.
    async fn stats(&self, id: &str) -> Result<ContainerStats, EngineError>;

    /// Makes Berth's own bridge `name` when it is not there. With [`Traffic::Off`] a network of that
    /// name that lets its containers talk to each other is refused, and none is left behind by an
    /// engine that cannot keep them apart.
    async fn ensure_network(
        &self,
        cluster: &ClusterUid,
        name: &str,
        traffic: Traffic,
    ) -> Result<(), EngineError>;
    /// The host's own address in a network; `None`: the engine does not say.
    async fn gateway(&self, network: &str) -> Result<Option<IpAddr>, EngineError>;
    /// Removes a network; one that is not there is done.
    async fn remove_network(&self, name: &str) -> Result<(), EngineError>;
    /// What is used on disk.
    async fn disk_usage(&self) -> Result<DiskUsage, EngineError>;
}
