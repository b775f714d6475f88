//! Validated values: what the rest of the code works with instead of wire messages.
//!
//! A value that exists is within its bounds; defaults are filled in where they are known. Reading a
//! wire message into a value (see `convert`) or a manifest (see `manifest`) lists
//! every problem at once. Units stand in the names: `_ms`, `_bytes`, `_millis`.

use crate::ids::{Digest, Name};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a version's record: half of what one write of the ledger holds.
pub const MAX_VERSION_BYTES: usize = 512 * 1024;
/// Files of a version, each of which may be a layer of its artifact. In the record a file takes some 85
/// bytes beside its path: so many leave 45 for the path of each.
pub const MAX_MODEL_FILES: usize = 4_000;

/// What a deployment wants: the manifest's `spec`, validated, with defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct DeploymentSpec {
    /// What is served.
    pub source: Source,
    /// Runtime image's reference or short name; `None`: chosen by the model's format.
    pub runtime: Option<String>,
    /// The model's name as the program knows it; `None`: the deployment's.
    pub served_model: Option<String>,
    /// How many, and of what kind.
    pub scale: Scale,
    /// Where replicas may go.
    pub placement: Placement,
    /// What a replica reserves and is limited to; 0 means neither.
    pub resources: Resources,
    /// Ports the program listens on, names unique.
    pub ports: Vec<Port>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Files of the host shown to the program.
    pub mounts: Vec<Mount>,
    /// How to tell that it can serve; `None`: running for `ready_for_ms` (for a model the server
    /// fills in the Open Inference Protocol's ready check when it makes the release).
    pub health: Option<HealthCheck>,
    /// What the agent does when the program ends.
    pub restart: Restart,
    /// Bounds of a rollout.
    pub rollout: Rollout,
    /// What happens to replicas of a host that stays away.
    pub on_host_loss: OnHostLoss,
    /// Milliseconds between SIGTERM and SIGKILL.
    pub stop_grace_ms: u64,
    /// Entry point; empty: the image's own.
    pub command: Vec<String>,
    /// Arguments; empty: the image's own.
    pub args: Vec<String>,
    /// User to run as; `None`: the image's own.
    pub user: Option<String>,
    /// Read-only root file system.
    pub read_only_root: bool,
    /// What the engine keeps of the output.
    pub log: LogOptions,
    /// What is asked of the host's policy.
    pub privileges: Privileges,
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A model reference as written.
    Model(String),
    /// An image reference as written.
    Image(String),
}

/// How many replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// As many as now; 1 at the creation.
    Keep,
    /// So many.
    Replicas(u32),
    /// One on each host that fits.
    EveryHost,
}

/// Where replicas may go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// All must hold.
    pub require: Vec<Requirement>,
    /// Label key over whose values replicas are spread.
    pub spread: Option<String>,
}

/// One requirement on a host's labels. `arch`, `os` and `host` are labels every host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requirement {
    /// `key=value`.
    Equals(String, String),
    /// `key!=value`; also holds where the key is absent.
    NotEquals(String, String),
    /// `key in (a, b)`.
    In(String, BTreeSet<String>),
    /// `key notin (a, b)`; also holds where the key is absent.
    NotIn(String, BTreeSet<String>),
    /// `key`.
    Exists(String),
    /// `!key`.
    Absent(String),
}

/// Amounts of what replicas use and hosts have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Resources {
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes of GPU memory.
    pub gpu_memory_bytes: u64,
}

/// A port the program listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Port in the container.
    pub container: u16,
    /// Where it is published on the host.
    pub publish: Option<Publish>,
}

/// Where a port is published.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Publish {
    /// Address on the host.
    pub bind: std::net::IpAddr,
    /// Port on the host.
    pub port: u16,
}

/// A file or folder of the host shown to the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Absolute path on the host.
    pub source: String,
    /// Absolute path in the container.
    pub target: String,
    /// Writing is allowed.
    pub writable: bool,
}

/// How to tell that a replica can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// How it is asked.
    pub probe: Probe,
    /// From one check's end to the next one's start.
    pub interval_ms: u64,
    /// How long one check may take.
    pub timeout_ms: u64,
    /// Failures in a row that make it unready, at least 1.
    pub failures: u32,
    /// How long after its start failures do not count.
    pub startup_ms: u64,
    /// Unready for so long restarts it; `None`: never.
    pub restart_after_ms: Option<u64>,
}

/// How a health check asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// HTTP GET, 200 to 399 is healthy.
    Http {
        /// Path with a leading '/'.
        path: String,
        /// Name of a port.
        port: String,
    },
    /// A TCP connection.
    Tcp {
        /// Name of a port.
        port: String,
    },
    /// grpc.health.v1.
    Grpc {
        /// Name of a port.
        port: String,
        /// Service; empty: the whole server.
        service: String,
    },
    /// A program in the container, exit code 0 is healthy.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
    },
}

/// What the agent does when the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// When to start again.
    pub condition: RestartCondition,
    /// First wait.
    pub min_backoff_ms: u64,
    /// Longest wait.
    pub max_backoff_ms: u64,
}

/// After which ends a program is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartCondition {
    /// All.
    Always,
    /// Those with another code than 0.
    OnFailure,
    /// None.
    Never,
}

/// Bounds of a rollout; both of the first two being 0 is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rollout {
    /// Replicas beyond the wanted number.
    pub max_surge: u32,
    /// Replicas that may be missing.
    pub max_unavailable: u32,
    /// How long healthy before it counts.
    pub ready_for_ms: u64,
    /// No progress for so long fails the rollout.
    pub progress_deadline_ms: u64,
    /// What a failed rollout does.
    pub on_failure: OnRolloutFailure,
}

/// What a failed rollout does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRolloutFailure {
    /// Go back to the newest complete release.
    Rollback,
    /// Wait for a person.
    Pause,
}

/// What happens to replicas of a host that stays away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnHostLoss {
    /// Away for longer than this is lost.
    pub after_ms: u64,
    /// What is done then.
    pub action: HostLossAction,
}

/// What is done for replicas of a lost host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostLossAction {
    /// Place a replacement elsewhere.
    Replace,
    /// Wait.
    Keep,
}

/// What the engine keeps of a program's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    /// Bytes of one file.
    pub max_size_bytes: u64,
    /// How many files.
    pub max_files: u32,
}

/// What a program asks of its host beyond the ordinary.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Privileges {
    /// All of the host's rights.
    pub privileged: bool,
    /// Share the host's network.
    pub host_network: bool,
    /// Capabilities to add.
    pub add_capabilities: BTreeSet<String>,
    /// Device files to show.
    pub devices: BTreeSet<String>,
}

/// A host's own policy, from the agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostPolicy {
    /// Folders below which mounts are allowed.
    pub mount_folders: Vec<String>,
    /// Privileged containers are allowed.
    pub allow_privileged: bool,
    /// Host network is allowed.
    pub allow_host_network: bool,
    /// Capabilities that may be added.
    pub allow_capabilities: BTreeSet<String>,
    /// Devices that may be shown.
    pub allow_devices: BTreeSet<String>,
    /// Running commands in containers is refused.
    pub forbid_exec: bool,
    /// Addresses ports may be published on; empty: any, unless none may be at all.
    pub publish_addresses: BTreeSet<std::net::IpAddr>,
    /// No port may be published, on no address.
    pub forbid_publish: bool,
    /// Containers may talk to each other.
    pub allow_container_traffic: bool,
}

impl HostPolicy {
    /// A port may be published on this address.
    #[must_use]
    pub fn may_publish(&self, on: std::net::IpAddr) -> bool {
        let listed = &self.publish_addresses;
        !self.forbid_publish && (listed.is_empty() || listed.contains(&on))
    }
}

/// What an agent reports of its host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// GOARCH name.
    pub arch: String,
    /// GOOS name.
    pub os: String,
    /// What replicas may reserve in all.
    pub capacity: Resources,
    /// Labels from the agent's configuration.
    pub labels: BTreeMap<String, String>,
    /// Engine's name and version.
    pub engine: String,
    /// The engine answers.
    pub engine_available: bool,
    /// Agent's version.
    pub agent_version: String,
    /// Features the agent knows.
    pub features: BTreeSet<String>,
    /// The host's own policy.
    pub policy: HostPolicy,
    /// Bytes free where images and artifacts are kept.
    pub disk_free_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Container addresses can be reached.
    pub container_network_reachable: bool,
    /// Host ports something else uses.
    pub used_ports: BTreeSet<u16>,
}

/// What a release pins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedSource {
    /// Image or runtime image.
    pub image: ResolvedImage,
    /// The model's artifact.
    pub artifact: Option<ResolvedArtifact>,
    /// Name of the model's registered version, whatever its kind.
    pub model_version: Option<String>,
}

/// An image pinned for each platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// `host:port` of the registry; empty: Berth's own.
    pub registry: String,
    /// Repository.
    pub repository: String,
    /// Digest of the index, or of the manifest when there is no index.
    pub digest: Digest,
    /// One for each platform.
    pub platforms: Vec<PlatformImage>,
}

/// One platform's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformImage {
    /// GOARCH name.
    pub arch: String,
    /// GOOS name.
    pub os: String,
    /// Digest of the manifest.
    pub manifest_digest: Digest,
    /// Digest of the config: the engine's image id.
    pub config_digest: Digest,
    /// Sum of its layers as transferred.
    pub size_bytes: u64,
}

/// Where a model's files are shown to its runtime.
pub const ARTIFACT_TARGET: &str = "/model";

/// A model's files, pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedArtifact {
    /// Model's name.
    pub model: String,
    /// Version's name.
    pub version: String,
    /// Repository in Berth's registry.
    pub repository: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Sum of its layers as transferred.
    pub size_bytes: u64,
    /// Format, e.g. onnx.
    pub format: String,
}

/// What all replicas of one release have in common, read from the body's bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct AssignmentBody {
    /// The deployment.
    pub deployment_uid: crate::ids::DeploymentUid,
    /// The deployment's name.
    pub deployment: Name,
    /// The deployment's namespace.
    pub namespace: crate::ids::Namespace,
    /// The release.
    pub release: crate::ids::ReleaseNumber,
    /// Features an agent must know.
    pub requires: BTreeSet<String>,
    /// Pins.
    pub source: ResolvedSource,
    /// What to run; `scale`, `placement` and `rollout` mean nothing here but `ready_for_ms`.
    pub spec: DeploymentSpec,
    /// Environment the server adds.
    pub system_env: BTreeMap<String, String>,
    /// Where the artifact is shown.
    pub artifact_target: Option<String>,
}

/// How far an attempt of a replica is; the order is the order of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The assignment is durable at the agent.
    Accepted,
    /// Bytes are on their way.
    Fetching,
    /// The container is being made.
    Creating,
    /// The container is being started.
    Starting,
    /// The program runs.
    Running,
    /// The program has ended.
    Exited,
    /// Nothing is left on the host.
    Removed,
}

/// What an agent says of one replica.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Which container: 1, 2, 3...; 0 before the first.
    pub attempt: u32,
    /// How far that attempt is; `None`: no news.
    pub phase: Option<Phase>,
    /// It can serve.
    pub ready: bool,
    /// Stable word; empty: nothing to say.
    pub reason: String,
    /// Words for people, from the host: escape before showing.
    pub message: String,
    /// What is being fetched.
    pub progress: Option<Progress>,
    /// How the last ended attempt ended.
    pub last_exit: Option<Exit>,
    /// When the present attempt started to run.
    pub start_time: Option<crate::ids::Wall>,
    /// When the next attempt is due.
    pub next_attempt_time: Option<crate::ids::Wall>,
    /// The engine's id of the container; empty: none.
    pub container_id: String,
}

/// Progress of a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Bytes here.
    pub done_bytes: u64,
    /// Bytes in all; 0: not known.
    pub total_bytes: u64,
    /// Bytes a second.
    pub rate_bytes_per_second: u64,
    /// `image` or `artifact`.
    pub what: String,
    /// Which part is on its way, from 1 on; 0: not known.
    pub part: u32,
    /// How many parts there are; 0: not known.
    pub parts: u32,
    /// Time left at the present rate; 0: not known.
    pub time_left_ms: u64,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Which attempt.
    pub attempt: u32,
    /// Exit code.
    pub code: i32,
    /// For lack of memory.
    pub out_of_memory: bool,
    /// When.
    pub time: crate::ids::Wall,
    /// What its program wrote last, where it failed; at most [`crate::convert::MAX_LAST_LINE`] characters.
    pub last_line: String,
}
