//! The engine behind a Unix socket: Docker from API 1.41 on, or podman's compatible socket.
//!
//! This folder is the only place that knows the client library. It keeps nothing but a connection's agreed API
//! version, which it agrees on anew after the engine was away (it may have been upgraded). What an
//! error means stands in `errors`, how things are written and read in `shape`.

mod errors;
mod shape;

use super::{
    CLUSTER_LABEL, Call, ContainerSpec, ContainerStats, Credentials, DiskUsage, Engine,
    EngineError, EngineInfo, EventStream, Exec, ExecSpec, ImageInfo, LogChunk, LogQuery, LogStream,
    ObservedContainer, PULL_STALL, PullProgress, PullStream, STOP_MARGIN, Traffic,
};
use async_trait::async_trait;
use berth_proto::ids::ClusterUid;
use bollard::auth::DockerCredentials;
use bollard::errors::Error as ClientError;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::{ExecConfig, NetworkCreateRequest};
use bollard::query_parameters as query;
use bollard::{API_DEFAULT_VERSION, Docker};
use errors::{by_words, translate};
use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use shape::{chunk, create_body, event, observed};
use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
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
    /// Held while a network is made: older engines make two under one name.
    making: tokio::sync::Mutex<()>,
}

impl DockerEngine {
    /// The engine at `socket`, e.g. `/var/run/docker.sock`. It need not be there yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self::with(socket.into(), None)
    }

    fn with(socket: PathBuf, client: Option<Docker>) -> Self {
        Self { socket, client: Mutex::new(client), making: tokio::sync::Mutex::default() }
    }

    /// The same engine, for a stream that outlives the call.
    fn again(&self) -> Self {
        Self::with(self.socket.clone(), self.client.lock().clone())
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

impl DockerEngine {
    /// Whether a network is a bridge that does with traffic what is wanted.
    async fn network_is_good(&self, name: &str, traffic: Traffic) -> Result<bool, EngineError> {
        let inspect = |d: Docker| async move { d.inspect_network(name, None).await };
        let found = self.call(Call::Network, name, inspect).await?;
        let icc = found.options.unwrap_or_default().get(ICC_OPTION).cloned();
        let apart = icc.as_deref() == Some("false");
        Ok(found.driver.as_deref() == Some("bridge") && (apart || traffic == Traffic::Allowed))
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

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn label_filter(cluster: &ClusterUid) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{CLUSTER_LABEL}={cluster}")])])
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
        // Only a look, unlike the other calls about images.
        let deadline = Call::Inspect.deadline();
        let look = |d: Docker| async move { d.inspect_image(reference).await };
        let found = self.call_for(Call::Image, deadline, reference, look).await;
        match found {
            Ok(it) => Ok(Some(ImageInfo {
                id: it.id.unwrap_or_default(),
                tags: it.repo_tags.unwrap_or_default(),
                repo_digests: it.repo_digests.unwrap_or_default(),
                arch: it.architecture.unwrap_or_default(),
                size_bytes: it.size.and_then(|s| u64::try_from(s).ok()).unwrap_or(0),
                user: it.config.and_then(|c| c.user).unwrap_or_default(),
                layers: it.root_fs.and_then(|fs| fs.layers).unwrap_or_default(),
            })),
            Err(EngineError::NoSuchImage(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn pull(&self, reference: &str, credentials: Option<Credentials>) -> PullStream {
        let socket = self.again();
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
        let socket = self.again();
        let follow = wanted.follow;
        let id = id.to_owned();
        let begun = async move {
            let client = match socket.client().await {
                Ok(client) => client,
                Err(error) => return stream::once(async { Err(error) }).boxed(),
            };
            if wanted.follow {
                // The library does not say when the engine has begun to answer, and a program may say
                // nothing for long: an engine that hangs is found out by asking for something else.
                let name = id.clone();
                let look = |d: Docker| async move { d.inspect_container(&name, None).await };
                if let Err(error) = socket.call(Call::Logs, &id, look).await {
                    return stream::once(async { Err(error) }).boxed();
                }
            }
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
        let begun = stream::once(begun).flatten();
        if follow {
            // Silence is allowed from here on.
            return begun.boxed();
        }
        limited(Call::Logs, begun, Call::Logs.deadline())
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
        // The library does not say when the engine has begun to answer, and nothing may happen for
        // long: one that hangs is found out here.
        self.call(Call::Events, "", |d| async move { d.ping().await.map(drop) }).await?;
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

    async fn ensure_network(
        &self,
        cluster: &ClusterUid,
        name: &str,
        traffic: Traffic,
    ) -> Result<(), EngineError> {
        let _turn = self.making.lock().await;
        match self.network_is_good(name, traffic).await {
            Ok(true) => return Ok(()),
            Ok(false) => {
                let message = format!(
                    "network {name} exists and lets containers talk to each other: remove it, or \
                     allow that in the agent's configuration (policy.allow-container-traffic)"
                );
                return Err(EngineError::Other { status: 409, message });
            }
            Err(EngineError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let options = match traffic {
            Traffic::Off => HashMap::from([(ICC_OPTION.into(), "false".into())]),
            Traffic::Allowed => HashMap::new(),
        };
        let request = NetworkCreateRequest {
            name: name.into(),
            driver: Some("bridge".into()),
            options: Some(options),
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
        // Podman takes the option and does nothing about it.
        if !self.network_is_good(&id, traffic).await? {
            self.remove_network(&id).await?;
            let message = "this engine cannot keep the containers of a network apart: use Docker, \
                           or allow traffic between them in the agent's configuration \
                           (policy.allow-container-traffic)";
            return Err(EngineError::Other { status: 409, message: message.into() });
        }
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

    async fn gateway(&self, network: &str) -> Result<Option<IpAddr>, EngineError> {
        let inspect = |d: Docker| async move { d.inspect_network(network, None).await };
        let found = self.call(Call::Network, network, inspect).await?;
        let pools = found.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        Ok(pools.into_iter().find_map(|pool| pool.gateway?.parse().ok()))
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
    use std::path::Path;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// An engine that says who it is and nothing else.
    fn hanging(folder: &Path) -> DockerEngine {
        let socket = folder.join("engine.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut text = vec![0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut text).await {
                        if !String::from_utf8_lossy(&text[..read]).contains("/version") {
                            continue;
                        }
                        let body = r#"{"ApiVersion":"1.41","MinAPIVersion":"1.24"}"#;
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\
                             content-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        DockerEngine::new(&socket)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_has_no_limit_in_total_and_ends_by_silence() {
        let almost = PULL_STALL - Duration::from_secs(1);
        let steps = stream::unfold(0, move |step| async move {
            match step {
                0..20 => tokio::time::sleep(almost).await,
                _ => std::future::pending().await,
            }
            Some((Ok(step), step + 1))
        });
        let said: Vec<_> = limited(Call::Pull, steps, PULL_STALL).collect().await;
        let stalled = EngineError::Timeout { call: Call::Pull, after: PULL_STALL };
        assert_eq!(said, (0..20).map(Ok).chain([Err(stalled)]).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_hangs_ends_pulls_and_streams_of_logs_and_begins_none_of_events() {
        let folder = tempfile::tempdir().unwrap();
        let engine = hanging(folder.path());
        for follow in [false, true] {
            let mut logs = engine.logs("c", LogQuery { follow, ..LogQuery::default() });
            let first = logs.next().await.expect("an error");
            assert!(
                matches!(first, Err(EngineError::Timeout { call: Call::Logs, .. })),
                "{first:?}"
            );
            assert!(logs.next().await.is_none());
        }
        let mut pull = engine.pull("r@sha256:0", None);
        let first = pull.next().await.expect("an error");
        let stalled = EngineError::Timeout { call: Call::Pull, after: PULL_STALL };
        assert_eq!((first, pull.next().await), (Err(stalled), None));
        let events = engine.events(&"c".parse().unwrap()).await.err();
        assert!(
            matches!(events, Some(EngineError::Timeout { call: Call::Events, .. })),
            "{events:?}"
        );
    }
}
