//! The engine behind a Unix socket: Docker from API 1.41 on, or podman's compatible socket.
//!
//! The only file that knows the client library. It keeps nothing but a connection's agreed API
//! version, which it agrees on anew after the engine was away (it may have been upgraded). What an
//! error means is decided by status code; the few places where engines say it in words only
//! (`by_words`) are together, with the reason.

use super::{
    BindMount, CLUSTER_LABEL, Call, ContainerSpec, ContainerState, ContainerStats, Credentials,
    DiskUsage, Engine, EngineError, EngineEvent, EngineInfo, EventKind, EventStream, Exec,
    ExecSpec, ImageInfo, LogChunk, LogQuery, LogStream, NetworkMode, ObservedContainer, PULL_STALL,
    PullProgress, PullStream, STOP_MARGIN, Source, stamp,
};
use async_trait::async_trait;
use berth_proto::ids::{ClusterUid, Wall};
use bollard::auth::DockerCredentials;
use bollard::container::LogOutput;
use bollard::errors::Error as ClientError;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, DeviceMapping,
    EventMessage, ExecConfig, HostConfig, HostConfigLogConfig, Mount, MountType,
    NetworkCreateRequest, PortBinding, RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters as query;
use bollard::{API_DEFAULT_VERSION, Docker};
use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The library wants one limit for all answers. Ours are per kind of call, so this is only "never".
const CLIENT_TIMEOUT_S: u64 = 365 * 24 * 3600;

/// Containers looked at in one observation at the same time: more gains nothing on an engine that
/// takes a lock per container, fewer makes 500 containers slow.
const INSPECTS_AT_ONCE: usize = 8;

/// Turns traffic between containers of a bridge off.
const ICC_OPTION: &str = "com.docker.network.bridge.enable_icc";

/// An engine behind a Unix socket. Cheap to make: it connects at the first call.
#[derive(Debug)]
pub struct DockerEngine {
    socket: PathBuf,
    client: Mutex<Option<Docker>>,
}

impl DockerEngine {
    /// The engine at `socket`, e.g. `/var/run/docker.sock`. It need not be there yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), client: Mutex::new(None) }
    }

    /// A client whose API version is agreed on.
    async fn client(&self) -> Result<Docker, EngineError> {
        let held = self.client.lock().clone();
        if let Some(client) = held {
            return Ok(client);
        }
        let socket = self.socket.to_string_lossy();
        let client = Docker::connect_with_unix(&socket, CLIENT_TIMEOUT_S, API_DEFAULT_VERSION)
            .map_err(|e| translate(Call::Info, "", e))?;
        let client = within(Call::Info, Call::Info.deadline(), client.negotiate_version())
            .await?
            .map_err(|e| translate(Call::Info, "", e))?;
        *self.client.lock() = Some(client.clone());
        Ok(client)
    }

    /// Forgets what was agreed on when the engine turned out to be away.
    fn seen<T>(&self, result: Result<T, EngineError>) -> Result<T, EngineError> {
        if let Err(EngineError::Unreachable(_)) = &result {
            *self.client.lock() = None;
        }
        result
    }

    /// One call with the deadline of its kind; `what` names its object in errors.
    async fn call<T, F>(
        &self,
        call: Call,
        what: &str,
        make: impl FnOnce(Docker) -> F,
    ) -> Result<T, EngineError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        self.call_for(call, call.deadline(), what, make).await
    }

    async fn call_for<T, F>(
        &self,
        call: Call,
        deadline: Duration,
        what: &str,
        make: impl FnOnce(Docker) -> F,
    ) -> Result<T, EngineError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let result = async {
            let client = self.client().await?;
            within(call, deadline, make(client)).await?.map_err(|e| translate(call, what, e))
        };
        let result = result.await;
        self.seen(result)
    }
}

/// `future` within `after`.
async fn within<T>(
    call: Call,
    after: Duration,
    future: impl Future<Output = T>,
) -> Result<T, EngineError> {
    tokio::time::timeout(after, future).await.map_err(|_| EngineError::Timeout { call, after })
}

/// What an error of the library means for `call` on `what`.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors, most of which cannot come"
)]
fn translate(call: Call, what: &str, error: ClientError) -> EngineError {
    match error {
        ClientError::DockerResponseServerError { status_code, message } => {
            by_status(call, what, status_code, message)
        }
        ClientError::DockerStreamError { error } => by_words(call, what, 0, error),
        ClientError::SocketNotFoundError(path) => {
            EngineError::Unreachable(format!("there is no socket {path}"))
        }
        ClientError::IOError { err } => EngineError::Unreachable(err.to_string()),
        ClientError::HyperResponseError { err } => EngineError::Unreachable(chain(&err)),
        ClientError::HyperLegacyError { err } => EngineError::Unreachable(chain(&err)),
        ClientError::RequestTimeoutError => {
            EngineError::Timeout { call, after: Duration::from_secs(CLIENT_TIMEOUT_S) }
        }
        other => EngineError::Other { status: 0, message: chain(&other) },
    }
}

/// An error and its causes in one line, for a message: the library's own error says no cause.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = next.source();
    }
    text
}

fn by_status(call: Call, what: &str, status: u16, message: String) -> EngineError {
    match (status, call) {
        (401 | 403, _) => EngineError::Denied(message),
        // A create's 404 is about its image: name, labels and options cannot be "not found".
        (404, Call::Create) => EngineError::NoSuchImage(what.into()),
        (404, Call::Pull) => by_words(call, what, status, message),
        (404, Call::Image) => EngineError::NoSuchImage(what.into()),
        (404, _) => EngineError::NotFound(format!("{what} ({message})")),
        (409, Call::Create) => EngineError::NameTaken(what_name(&message, what)),
        _ => by_words(call, what, status, message),
    }
}

/// What engines say in words only: a port in use is a 500 (Docker) or 500 (podman) of `start`; a
/// name that is taken is a 500 of podman; the registry's refusals come as 404, as 500 or inside
/// the stream.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the calls that have words of their own are named"
)]
fn by_words(call: Call, what: &str, status: u16, message: String) -> EngineError {
    let lower = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    match call {
        Call::Start | Call::Create
            if says(&[
                "port is already allocated",
                "address already in use",
                "ports are not available",
            ]) =>
        {
            EngineError::PortInUse(message)
        }
        Call::Create if says(&["name is already in use", "already in use by"]) => {
            EngineError::NameTaken(what_name(&message, what))
        }
        Call::Pull
            if says(&[
                "unauthorized",
                "no basic auth",
                "access denied",
                "authentication required",
            ]) =>
        {
            EngineError::Denied(message)
        }
        Call::Pull if status == 404 || says(&["manifest unknown", "not found", "name unknown"]) => {
            EngineError::NoSuchImage(what.into())
        }
        _ => EngineError::Other { status, message },
    }
}

/// The name in an engine's words about a conflict, else `what`.
fn what_name(message: &str, what: &str) -> String {
    message.split('"').nth(1).map_or(what, |name| name.trim_start_matches('/')).into()
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn label_filter(cluster: &ClusterUid) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{CLUSTER_LABEL}={cluster}")])])
}

fn create_body(spec: &ContainerSpec) -> ContainerCreateBody {
    let some = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
    let mut bindings = HashMap::new();
    for port in &spec.ports {
        if let Some(at) = port.publish {
            let binding = PortBinding {
                host_ip: Some(at.ip().to_string()),
                host_port: Some(at.port().to_string()),
            };
            bindings
                .entry(format!("{}/tcp", port.container))
                .or_insert_with(|| Some(Vec::new()))
                .get_or_insert_default()
                .push(binding);
        }
    }
    let mount = |m: &BindMount| Mount {
        typ: Some(MountType::BIND),
        source: Some(m.source.clone()),
        target: Some(m.target.clone()),
        read_only: Some(!m.writable),
        ..Mount::default()
    };
    let device = |path: &String| DeviceMapping {
        path_on_host: Some(path.clone()),
        path_in_container: Some(path.clone()),
        cgroup_permissions: Some("rwm".into()),
    };
    let memory = spec.memory_bytes.map(|b| i64::try_from(b).unwrap_or(i64::MAX));
    let host = HostConfig {
        memory,
        // The same as the memory: no swap beyond it.
        memory_swap: memory,
        nano_cpus: spec
            .cpu_millis
            .map(|m| i64::try_from(m).unwrap_or(i64::MAX).saturating_mul(1_000_000)),
        mounts: Some(spec.mounts.iter().map(mount).collect()),
        port_bindings: Some(bindings),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".into()),
            config: Some(HashMap::from([
                ("max-size".into(), spec.log.max_size_bytes.to_string()),
                ("max-file".into(), spec.log.max_files.max(1).to_string()),
            ])),
        }),
        network_mode: Some(match &spec.network {
            NetworkMode::Bridge(name) => name.clone(),
            NetworkMode::Host => "host".into(),
            NetworkMode::None => "none".into(),
        }),
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            maximum_retry_count: None,
        }),
        auto_remove: Some(false),
        cap_add: Some(spec.cap_add.iter().cloned().collect()),
        cap_drop: Some(spec.cap_drop.iter().cloned().collect()),
        devices: Some(spec.devices.iter().map(device).collect()),
        privileged: Some(spec.privileged),
        readonly_rootfs: Some(spec.read_only_root),
        security_opt: spec.no_new_privileges.then(|| vec!["no-new-privileges".into()]),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: Some(spec.image_id.clone()),
        labels: Some(spec.labels.clone().into_iter().collect()),
        env: Some(spec.env.iter().map(|(k, v)| format!("{k}={v}")).collect()),
        cmd: some(&spec.command),
        entrypoint: some(&spec.entrypoint),
        user: spec.user.clone(),
        exposed_ports: Some(spec.ports.iter().map(|p| format!("{}/tcp", p.container)).collect()),
        stop_timeout: Some(i64::from(spec.stop_grace_s)),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    }
}

fn observed(it: ContainerInspectResponse) -> Option<ObservedContainer> {
    let config = it.config.unwrap_or_default();
    let network = it.network_settings.unwrap_or_default();
    let ip = network
        .networks
        .unwrap_or_default()
        .into_iter()
        .collect::<BTreeMap<_, _>>()
        .into_values()
        .find_map(|n| n.ip_address.and_then(|ip| ip.parse().ok()));
    let mut published = BTreeMap::new();
    for (port, bindings) in network.ports.unwrap_or_default() {
        let number = port.split('/').next().and_then(|p| p.parse::<u16>().ok());
        let at = bindings.unwrap_or_default().into_iter().find_map(|b| {
            let ip = b.host_ip.filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some(SocketAddr::new(ip.parse().ok()?, b.host_port?.parse().ok()?))
        });
        if let (Some(number), Some(at)) = (number, at) {
            published.insert(number, at);
        }
    }
    let state = it.state.unwrap_or_default();
    let started_at = state.started_at.as_deref().and_then(stamp::wall);
    let ended = |state: bollard::models::ContainerState| ContainerState::Exited {
        code: state.exit_code.and_then(|c| i32::try_from(c).ok()).unwrap_or(-1),
        out_of_memory: state.oom_killed.unwrap_or(false),
        finished_at: state.finished_at.as_deref().and_then(stamp::wall),
        error: state.error.unwrap_or_default(),
    };
    let running = |paused| ContainerState::Running { started_at, ip, paused };
    let status = state.status.unwrap_or(ContainerStateStatusEnum::EMPTY);
    let state = match status {
        // A start that failed leaves "created" with a code and an error: it was never started, and
        // whoever reads the error of the failed start knows why.
        ContainerStateStatusEnum::CREATED => ContainerState::Created,
        ContainerStateStatusEnum::RUNNING
        | ContainerStateStatusEnum::RESTARTING
        | ContainerStateStatusEnum::STOPPING => running(false),
        ContainerStateStatusEnum::PAUSED => running(true),
        ContainerStateStatusEnum::EXITED => ended(state),
        ContainerStateStatusEnum::REMOVING | ContainerStateStatusEnum::DEAD => {
            ContainerState::Removing
        }
        ContainerStateStatusEnum::EMPTY if state.running == Some(true) => running(false),
        ContainerStateStatusEnum::EMPTY if started_at.is_none() => ContainerState::Created,
        ContainerStateStatusEnum::EMPTY => ended(state),
    };
    Some(ObservedContainer {
        id: it.id?,
        name: it.name.unwrap_or_default().trim_start_matches('/').into(),
        labels: config.labels.unwrap_or_default().into_iter().collect(),
        image_id: it.image.map(|id| if id.contains(':') { id } else { format!("sha256:{id}") })?,
        state,
        published,
    })
}

fn chunk(output: LogOutput, stamped: bool) -> LogChunk {
    let (source, mut bytes) = match output {
        LogOutput::StdErr { message } => (Source::Stderr, message),
        LogOutput::StdOut { message }
        | LogOutput::StdIn { message }
        | LogOutput::Console { message } => (Source::Stdout, message),
    };
    let mut stamp_ns = None;
    if stamped && let Some(space) = bytes.iter().take(40).position(|b| *b == b' ') {
        stamp_ns = std::str::from_utf8(&bytes[..space]).ok().and_then(stamp::nanoseconds);
        if stamp_ns.is_some() {
            bytes = bytes.slice(space + 1..);
        }
    }
    LogChunk { source, stamp_ns, bytes }
}

fn event(message: EventMessage, cluster: &ClusterUid) -> Option<EngineEvent> {
    let actor = message.actor?;
    let attributes = actor.attributes.unwrap_or_default();
    if attributes.get(CLUSTER_LABEL).map(String::as_str) != Some(cluster.as_str()) {
        return None;
    }
    let action = message.action.unwrap_or_default();
    let kind = match action.as_str() {
        "create" => EventKind::Create,
        "start" => EventKind::Start,
        "die" | "died" => {
            let code = attributes.get("exitCode").or_else(|| attributes.get("containerExitCode"));
            EventKind::Die { code: code.and_then(|c| c.parse().ok()) }
        }
        "oom" => EventKind::OutOfMemory,
        "destroy" | "remove" => EventKind::Destroy,
        // Our own probes and commands: nothing changes by them.
        other if other.starts_with("exec") || other.starts_with("archive") => return None,
        "attach" | "resize" | "top" | "copy" | "export" => return None,
        _ => EventKind::Other,
    };
    let time =
        message.time_nano.map(|n| Wall(n / 1_000_000)).or(message.time.map(|s| Wall(s * 1000)));
    Some(EngineEvent { container: actor.id?, kind, time })
}

/// `stream` with a limit for its first item and between items; it ends after the first error.
fn limited<T: Send + 'static>(
    call: Call,
    stream: impl Stream<Item = Result<T, EngineError>> + Send + 'static,
    between: Duration,
) -> stream::BoxStream<'static, Result<T, EngineError>> {
    stream::unfold(Some(stream.boxed()), move |stream| async move {
        let mut stream = stream?;
        match within(call, between, stream.next()).await {
            Ok(None) => None,
            Ok(Some(Ok(item))) => Some((Ok(item), Some(stream))),
            Ok(Some(Err(error))) | Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

#[async_trait]
impl Engine for DockerEngine {
    async fn ping(&self) -> Result<(), EngineError> {
        self.call(Call::Ping, "", |d| async move { d.ping().await.map(drop) }).await
    }

    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let version = self.call(Call::Info, "", |d| async move { d.version().await }).await?;
        let info = self.call(Call::Info, "", |d| async move { d.info().await }).await?;
        let component = version.components.unwrap_or_default().into_iter().next();
        let podman = component.is_some_and(|c| c.name.to_ascii_lowercase().contains("podman"));
        Ok(EngineInfo {
            name: if podman { "Podman" } else { "Docker" }.into(),
            version: version.version.unwrap_or_default(),
            api_version: version.api_version.unwrap_or_default(),
            arch: version.arch.unwrap_or_default(),
            os: version.os.unwrap_or_default(),
            kernel: version.kernel_version.unwrap_or_default(),
            cpus: info.ncpu.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            memory_bytes: info.mem_total.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
            live_restore: info.live_restore_enabled.unwrap_or(false),
            data_root: info.docker_root_dir.unwrap_or_default(),
        })
    }

    async fn observe(&self, cluster: &ClusterUid) -> Result<Vec<ObservedContainer>, EngineError> {
        let options = query::ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&label_filter(cluster));
        let options = options.build();
        let list = self.call(Call::Observe, "", |d| async move {
            let list = d.list_containers(Some(options)).await?;
            let one = |id: String| {
                let d = d.clone();
                async move { d.inspect_container(&id, None).await }
            };
            let ids: Vec<String> = list.into_iter().filter_map(|c| c.id).collect();
            let mut looked =
                stream::iter(ids.into_iter().map(one)).buffer_unordered(INSPECTS_AT_ONCE);
            let mut found = Vec::new();
            while let Some(one) = looked.next().await {
                match one {
                    Ok(one) => found.push(one),
                    // It went between the two calls.
                    Err(ClientError::DockerResponseServerError { status_code: 404, .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(found)
        });
        let mut list: Vec<_> = list.await?.into_iter().filter_map(observed).collect();
        // The engine filtered already; this is the promise itself.
        list.retain(|c| c.labels.get(CLUSTER_LABEL).map(String::as_str) == Some(cluster.as_str()));
        list.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(list)
    }

    async fn inspect(
        &self,
        cluster: &ClusterUid,
        container: &str,
    ) -> Result<ObservedContainer, EngineError> {
        self.call(Call::Inspect, container, |d| async move {
            d.inspect_container(container, None).await
        })
        .await
        .map(observed)?
        .filter(|c| c.labels.get(CLUSTER_LABEL).map(String::as_str) == Some(cluster.as_str()))
        .ok_or_else(|| EngineError::NotFound(container.into()))
    }

    async fn create(&self, spec: &ContainerSpec) -> Result<String, EngineError> {
        let body = create_body(spec);
        let options = query::CreateContainerOptionsBuilder::default().name(&spec.name).build();
        let result = self
            .call(Call::Create, &spec.image_id, |d| {
                // Boxed: the request is large, and many are made at once.
                Box::pin(async move { d.create_container(Some(options), body).await })
            })
            .await;
        match result {
            Ok(made) => Ok(made.id),
            Err(EngineError::NameTaken(_)) => Err(EngineError::NameTaken(spec.name.clone())),
            Err(error) => Err(error),
        }
    }

    async fn start(&self, id: &str) -> Result<(), EngineError> {
        self.call(Call::Start, id, |d| async move { d.start_container(id, None).await }).await
    }

    async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = query::StopContainerOptionsBuilder::default().t(seconds).build();
        let deadline = grace.saturating_add(STOP_MARGIN);
        self.call_for(Call::Stop, deadline, id, |d| async move {
            d.stop_container(id, Some(options)).await
        })
        .await
    }

    async fn remove(&self, id: &str, force: bool) -> Result<(), EngineError> {
        let options = query::RemoveContainerOptionsBuilder::default().v(true).force(force).build();
        let result = self
            .call(Call::Remove, id, |d| async move { d.remove_container(id, Some(options)).await })
            .await;
        match result {
            Err(EngineError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    async fn image(&self, reference: &str) -> Result<Option<ImageInfo>, EngineError> {
        let found = self
            .call(Call::Image, reference, |d| async move { d.inspect_image(reference).await })
            .await;
        match found {
            Ok(it) => Ok(Some(ImageInfo {
                id: it.id.unwrap_or_default(),
                tags: it.repo_tags.unwrap_or_default(),
                repo_digests: it.repo_digests.unwrap_or_default(),
                arch: it.architecture.unwrap_or_default(),
                size_bytes: it.size.and_then(|s| u64::try_from(s).ok()).unwrap_or(0),
                user: it.config.and_then(|c| c.user).unwrap_or_default(),
            })),
            Err(EngineError::NoSuchImage(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn pull(&self, reference: &str, credentials: Option<Credentials>) -> PullStream {
        let socket =
            Self { socket: self.socket.clone(), client: Mutex::new(self.client.lock().clone()) };
        let reference = reference.to_owned();
        let begun = async move {
            let client = match socket.client().await {
                Ok(client) => client,
                Err(error) => return stream::once(async { Err(error) }).boxed(),
            };
            let options =
                query::CreateImageOptionsBuilder::default().from_image(&reference).build();
            let credentials = credentials.map(|c| DockerCredentials {
                username: Some(c.username),
                password: Some(c.password),
                serveraddress: reference.split('/').next().map(str::to_owned),
                ..DockerCredentials::default()
            });
            client
                .create_image(Some(options), None, credentials)
                .map(move |item| {
                    let item = item.map_err(|e| translate(Call::Pull, &reference, e))?;
                    if let Some(error) = item.error_detail {
                        let words = error.message.unwrap_or_default();
                        return Err(by_words(Call::Pull, &reference, 0, words));
                    }
                    let bytes = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
                    let detail = item.progress_detail.unwrap_or_default();
                    Ok(PullProgress {
                        layer: item.id.unwrap_or_default(),
                        status: item.status.unwrap_or_default(),
                        current_bytes: bytes(detail.current),
                        total_bytes: bytes(detail.total).filter(|t| *t > 0),
                    })
                })
                .boxed()
        };
        limited(Call::Pull, stream::once(begun).flatten(), PULL_STALL)
    }

    async fn tag(&self, image: &str, repository: &str, tag: &str) -> Result<(), EngineError> {
        let options = query::TagImageOptionsBuilder::default().repo(repository).tag(tag).build();
        self.call(Call::Image, image, |d| async move { d.tag_image(image, Some(options)).await })
            .await
    }

    async fn remove_image(&self, reference: &str) -> Result<(), EngineError> {
        let none = None::<query::RemoveImageOptions>;
        let result = self
            .call(Call::Image, reference, |d| async move {
                d.remove_image(reference, none, None).await.map(drop)
            })
            .await;
        match result {
            Err(EngineError::NoSuchImage(_)) => Ok(()),
            other => other,
        }
    }

    async fn images_named(&self, prefix: &str) -> Result<Vec<(String, String)>, EngineError> {
        let none = None::<query::ListImagesOptions>;
        let list =
            self.call(Call::Image, prefix, |d| async move { d.list_images(none).await }).await?;
        let mut named: Vec<(String, String)> = list
            .into_iter()
            .flat_map(|image| image.repo_tags.into_iter().map(move |tag| (tag, image.id.clone())))
            .filter(|(tag, _)| tag.starts_with(prefix))
            .collect();
        named.sort();
        Ok(named)
    }

    fn logs(&self, id: &str, wanted: LogQuery) -> LogStream {
        let socket =
            Self { socket: self.socket.clone(), client: Mutex::new(self.client.lock().clone()) };
        let id = id.to_owned();
        let begun = async move {
            let client = match socket.client().await {
                Ok(client) => client,
                Err(error) => return stream::once(async { Err(error) }).boxed(),
            };
            let stamped = wanted.timestamps || wanted.since_ns.is_some();
            // Engines know whole seconds only: ask from the second before, then drop what is older.
            let since_s = wanted.since_ns.map_or(0, |ns| ns.div_euclid(1_000_000_000));
            let tail = wanted.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
            let options = query::LogsOptionsBuilder::default()
                .follow(wanted.follow)
                .stdout(true)
                .stderr(true)
                .timestamps(stamped)
                .since(i32::try_from(since_s).unwrap_or(i32::MAX))
                .tail(&tail)
                .build();
            client
                .logs(&id, Some(options))
                .map(move |item| {
                    let output = item.map_err(|e| translate(Call::Logs, &id, e))?;
                    Ok(chunk(output, stamped))
                })
                .filter(move |item| {
                    let old = matches!((item, wanted.since_ns), (Ok(LogChunk { stamp_ns: Some(at), .. }), Some(since)) if *at < since);
                    std::future::ready(!old)
                })
                .boxed()
        };
        stream::once(begun).flatten().boxed()
    }

    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Exec, EngineError> {
        let config = ExecConfig {
            attach_stdin: Some(spec.stdin),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(spec.tty),
            env: Some(spec.env.iter().map(|(k, v)| format!("{k}={v}")).collect()),
            cmd: Some(spec.command.clone()),
            user: spec.user.clone(),
            ..ExecConfig::default()
        };
        let made =
            self.call(Call::Exec, id, |d| async move { d.create_exec(id, config).await }).await?;
        let options = StartExecOptions { detach: false, tty: spec.tty, output_capacity: None };
        let exec = &made.id;
        let begun = self
            .call(Call::Exec, id, |d| async move { d.start_exec(exec, Some(options)).await })
            .await?;
        let StartExecResults::Attached { output, input } = begun else {
            let message = "the engine detached from the command".into();
            return Err(EngineError::Other { status: 0, message });
        };
        let name = id.to_owned();
        let output = output.map(move |item| {
            item.map(|o| chunk(o, false)).map_err(|e| translate(Call::Exec, &name, e))
        });
        Ok(Exec { id: made.id, output: output.boxed(), input })
    }

    async fn exec_resize(&self, exec: &str, rows: u16, columns: u16) -> Result<(), EngineError> {
        let size = query::ResizeExecOptionsBuilder::default().h(rows.into()).w(columns.into());
        let size = size.build();
        self.call(Call::Exec, exec, |d| async move { d.resize_exec(exec, size).await }).await
    }

    async fn exec_exit(&self, exec: &str) -> Result<Option<i32>, EngineError> {
        let it = self.call(Call::Exec, exec, |d| async move { d.inspect_exec(exec).await }).await?;
        if it.running == Some(true) {
            return Ok(None);
        }
        Ok(it.exit_code.and_then(|code| i32::try_from(code).ok()))
    }

    async fn events(&self, cluster: &ClusterUid) -> Result<EventStream, EngineError> {
        let client = self.client().await;
        let client = self.seen(client)?;
        let mut filters = label_filter(cluster);
        filters.insert("type".into(), vec!["container".into()]);
        // The request goes out at the first poll, which may be later than this call: what happens
        // in between is asked for by its time. Told twice is harmless, never told is not.
        let options = query::EventsOptionsBuilder::default()
            .since(&now_s().to_string())
            .filters(&filters)
            .build();
        let cluster = cluster.clone();
        Ok(client
            .events(Some(options))
            .filter_map(move |item| {
                std::future::ready(match item {
                    Ok(message) => event(message, &cluster).map(Ok),
                    Err(error) => Some(Err(translate(Call::Events, "", error))),
                })
            })
            .boxed())
    }

    async fn stats(&self, id: &str) -> Result<ContainerStats, EngineError> {
        let options = query::StatsOptionsBuilder::default().stream(false).one_shot(true).build();
        let sample = self
            .call(Call::Stats, id, |d| async move {
                let mut samples = Box::pin(d.stats(id, Some(options)));
                samples.next().await.transpose()
            })
            .await?
            .ok_or_else(|| EngineError::NotFound(id.into()))?;
        let cpu = sample.cpu_stats.and_then(|c| c.cpu_usage).and_then(|u| u.total_usage);
        let memory = sample.memory_stats.unwrap_or_default();
        let cache = memory.stats.as_ref().and_then(|s| {
            // cgroup v2 calls it inactive_file, v1 total_inactive_file.
            s.get("inactive_file").or_else(|| s.get("total_inactive_file")).copied()
        });
        let networks = sample.networks.unwrap_or_default();
        Ok(ContainerStats {
            cpu_total_ns: cpu.unwrap_or(0),
            memory_bytes: memory.usage.unwrap_or(0).saturating_sub(cache.unwrap_or(0)),
            memory_limit_bytes: memory.limit.unwrap_or(0),
            rx_bytes: networks.values().filter_map(|n| n.rx_bytes).sum(),
            tx_bytes: networks.values().filter_map(|n| n.tx_bytes).sum(),
            pids: sample.pids_stats.and_then(|p| p.current).unwrap_or(0),
        })
    }

    async fn ensure_network(&self, cluster: &ClusterUid, name: &str) -> Result<(), EngineError> {
        let inspect = |d: Docker| async move { d.inspect_network(name, None).await };
        match self.call(Call::Network, name, inspect).await {
            Ok(found) => {
                let icc = found.options.unwrap_or_default().get(ICC_OPTION).cloned();
                if found.driver.as_deref() == Some("bridge") && icc.as_deref() == Some("false") {
                    return Ok(());
                }
                let message = format!(
                    "network {name} exists and allows traffic between containers: remove it, or \
                     name another in the agent's configuration"
                );
                return Err(EngineError::Other { status: 409, message });
            }
            Err(EngineError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let request = NetworkCreateRequest {
            name: name.into(),
            driver: Some("bridge".into()),
            options: Some(HashMap::from([(ICC_OPTION.into(), "false".into())])),
            labels: Some(HashMap::from([(CLUSTER_LABEL.into(), cluster.to_string())])),
            ..NetworkCreateRequest::default()
        };
        let made = self
            .call(Call::Network, name, |d| async move { d.create_network(request).await })
            .await;
        let id = match made {
            Ok(made) => made.id,
            // Another agent on this machine was quicker.
            Err(EngineError::Other { status: 409, .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Older engines let two be made under one name at the same moment, after which the name is
        // of no use. All but the one with the least id withdraw.
        let mut filters = HashMap::new();
        filters.insert("name", vec![name]);
        let options = query::ListNetworksOptionsBuilder::default().filters(&filters).build();
        let all = self
            .call(Call::Network, name, |d| async move { d.list_networks(Some(options)).await })
            .await?;
        let least =
            all.into_iter().filter(|n| n.name.as_deref() == Some(name)).filter_map(|n| n.id).min();
        if least.is_some_and(|least| least != id) {
            self.remove_network(&id).await?;
        }
        Ok(())
    }

    async fn remove_network(&self, name: &str) -> Result<(), EngineError> {
        let removed =
            self.call(Call::Network, name, |d| async move { d.remove_network(name).await }).await;
        match removed {
            Err(EngineError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    async fn disk_usage(&self) -> Result<DiskUsage, EngineError> {
        let none = None::<query::DataUsageOptions>;
        let used = self.call(Call::DiskUsage, "", |d| async move { d.df(none).await }).await?;
        let bytes = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
        let images = used.image_usage.and_then(|u| bytes(u.total_size));
        let images_bytes = match images {
            Some(total) => total,
            // Engines before API 1.52 answer in another form: sum up what the list says, which
            // counts shared layers more than once.
            None => {
                let none = None::<query::ListImagesOptions>;
                let list = self
                    .call(Call::DiskUsage, "", |d| async move { d.list_images(none).await })
                    .await?;
                list.iter().filter_map(|image| bytes(Some(image.size))).sum()
            }
        };
        let containers = used.container_usage.and_then(|u| bytes(u.total_size));
        Ok(DiskUsage { images_bytes, containers_bytes: containers.unwrap_or(0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn answer(status_code: u16, message: &str) -> ClientError {
        ClientError::DockerResponseServerError { status_code, message: message.into() }
    }

    #[test]
    fn answers_of_both_engines_mean_the_same() {
        let taken = EngineError::NameTaken("b".into());
        let docker = r#"Conflict. The container name "/b" is already in use by container "c"."#;
        let podman = r#"container create: creating container storage: the container name "b" is already in use by c."#;
        assert_eq!(translate(Call::Create, "i", answer(409, docker)), taken);
        assert_eq!(translate(Call::Create, "i", answer(500, podman)), taken);

        let port = "driver failed: Bind for 0.0.0.0:80 failed: port is already allocated";
        assert!(matches!(
            translate(Call::Start, "c", answer(500, port)),
            EngineError::PortInUse(_)
        ));
        assert!(matches!(
            translate(Call::Pull, "i", answer(404, "pull access denied for x")),
            EngineError::Denied(_)
        ));
        assert_eq!(
            translate(
                Call::Pull,
                "i",
                ClientError::DockerStreamError { error: "manifest unknown".into() }
            ),
            EngineError::NoSuchImage("i".into())
        );
        assert_eq!(
            translate(Call::Create, "i", answer(404, "No such image: i")),
            EngineError::NoSuchImage("i".into())
        );
    }

    #[test]
    fn a_stamp_is_taken_off_only_when_it_is_one() {
        let out =
            |text: &'static str| LogOutput::StdOut { message: Bytes::from_static(text.as_bytes()) };
        let stamped = chunk(out("2026-11-23T19:13:00.5Z hello\n"), true);
        assert_eq!(stamped.stamp_ns, Some(1_795_461_180_500_000_000));
        assert_eq!(stamped.bytes, "hello\n");
        let not = chunk(out("hello world\n"), true);
        assert_eq!((not.stamp_ns, not.bytes), (None, Bytes::from_static(b"hello world\n")));
    }

    #[test]
    fn a_container_never_gets_a_restart_policy_or_more_rights_than_said() {
        let cluster: ClusterUid = "c".parse().unwrap();
        let body = create_body(&ContainerSpec::new(&cluster, "n", "sha256:0"));
        let host = body.host_config.unwrap();
        assert_eq!(host.restart_policy.unwrap().name, Some(RestartPolicyNameEnum::NO));
        assert_eq!(host.privileged, Some(false));
        assert_eq!(host.security_opt, Some(vec!["no-new-privileges".to_owned()]));
        assert_eq!(host.network_mode.as_deref(), Some("berth"));
        assert_eq!(body.labels.unwrap().get(CLUSTER_LABEL).map(String::as_str), Some("c"));
    }

    #[test]
    fn events_of_another_cluster_are_not_seen() {
        let cluster: ClusterUid = "ours".parse().unwrap();
        let of = |cluster: &str, action: &str| EventMessage {
            action: Some(action.into()),
            actor: Some(bollard::models::EventActor {
                id: Some("x".into()),
                attributes: Some(HashMap::from([
                    (CLUSTER_LABEL.into(), cluster.into()),
                    ("exitCode".into(), "137".into()),
                ])),
            }),
            ..EventMessage::default()
        };
        assert_eq!(event(of("theirs", "die"), &cluster), None);
        assert_eq!(event(of("ours", "exec_create: ls"), &cluster), None);
        let seen = event(of("ours", "die"), &cluster).unwrap();
        assert_eq!(seen.kind, EventKind::Die { code: Some(137) });
    }
}
