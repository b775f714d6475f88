//! What the agent reports of its host.

use crate::config::Config;
use crate::engine::{Engine, EngineInfo, ObservedContainer};
use berth_proto::api;
use berth_proto::convert::host_facts_to_api;
use berth_proto::ids::ClusterUid;
use berth_proto::values::{HostFacts, Resources};
use std::collections::BTreeSet;
use std::path::Path;

/// Features this agent knows; an assignment that needs another is refused by name.
pub const FEATURES: [&str; 1] = ["artifact"];

/// Ports told of at the most.
const MAX_PORTS: usize = 1024;
/// The first port that Linux hands out by itself, as its default is.
const FIRST_EPHEMERAL: u32 = 32_768;

/// Bytes free where `path` is; 0 when it is nowhere.
#[must_use]
pub fn disk_free(path: &Path) -> u64 {
    disk_free_at(path).unwrap_or(0)
}

/// The same; `None` when it is nowhere, as an engine's folder is for an agent that does not see it.
#[must_use]
pub fn disk_free_at(path: &Path) -> Option<u64> {
    rustix::fs::statvfs(path).map(|s| s.f_bavail.saturating_mul(s.f_frsize)).ok()
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// What comes and goes all the time is no news: the space left, and ports that the kernel may hand out
/// by itself. It is told with the next fact that changes.
#[must_use]
pub fn is_news(before: &api::HostFacts, after: &api::HostFacts) -> bool {
    let calm = |f: &api::HostFacts| api::HostFacts {
        disk_free_bytes: 0,
        used_ports: f.used_ports.iter().copied().filter(|p| *p < FIRST_EPHEMERAL).collect(),
        ..f.clone()
    };
    calm(before) != calm(after)
}

/// What listens without our own running containers: their ports are free when they are gone, and the
/// server knows of them.
fn of_others(listening: &BTreeSet<u16>, ours: &[ObservedContainer]) -> BTreeSet<u16> {
    let ours: BTreeSet<u16> =
        ours.iter().flat_map(|c| c.published.values()).map(std::net::SocketAddr::port).collect();
    listening.difference(&ours).copied().collect()
}

/// TCP ports something listens on, from the kernel's tables.
fn listening_ports() -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1).and_then(|a| a.rsplit_once(':'));
            let listens = fields.nth(1) == Some("0A");
            if let (Some((_, port)), true) = (local, listens) {
                ports.extend(u16::from_str_radix(port, 16).ok());
            }
        }
    }
    ports
}

/// Bytes free for models in our own folder and for images in the engine's: where there is less.
fn least_free(folder: &Path, data_root: &str) -> u64 {
    let engine = (!data_root.is_empty()).then(|| disk_free_at(Path::new(data_root))).flatten();
    engine.map_or(u64::MAX, |free| free).min(disk_free(folder))
}

/// The machine's GOARCH name.
#[must_use]
pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// What is known of the host without its engine, which is taken to be away: what there is to tell before
/// it has answered. Container addresses are taken to be reached until it is found that they are not.
#[must_use]
pub fn without_engine(config: &Config, folder: &Path) -> api::HostFacts {
    told(config, folder, None, true, BTreeSet::new())
}

/// Gathers the facts. An engine that does not answer is said so. `reached`: whether container
/// addresses are ([`crate::reach`]). `cluster`: whose containers are ours; `None` before the host has joined.
/// `used_before`: ports found in use last, which stand while the engine does not say which are ours.
pub async fn gather(
    config: &Config,
    folder: &Path,
    engine: &dyn Engine,
    reached: bool,
    cluster: Option<&ClusterUid>,
    used_before: &[u32],
) -> api::HostFacts {
    let info = engine.info().await.ok();
    let ours = match cluster {
        Some(cluster) if info.is_some() => engine.observe(cluster).await.ok(),
        Some(_) => None,
        None => Some(Vec::new()),
    };
    let used_ports = match ours {
        Some(ours) => of_others(&listening_ports(), &ours).into_iter().take(MAX_PORTS).collect(),
        None => used_before.iter().filter_map(|p| u16::try_from(*p).ok()).collect(),
    };
    told(config, folder, info, reached, used_ports)
}

/// The facts; `None`: the engine does not answer.
fn told(
    config: &Config,
    folder: &Path,
    info: Option<EngineInfo>,
    reached: bool,
    used_ports: BTreeSet<u16>,
) -> api::HostFacts {
    let engine_available = info.is_some();
    let info = info.unwrap_or_default();
    let reserve = config.reserved().unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let capacity = Resources {
        cpu_millis: (cpus * 1000).saturating_sub(reserve.cpu_millis),
        memory_bytes: memory_bytes().saturating_sub(reserve.memory_bytes),
        gpu_memory_bytes: 0,
    };
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    host_facts_to_api(&HostFacts {
        arch: arch().to_owned(),
        os: "linux".to_owned(),
        capacity,
        labels: config.labels.clone(),
        engine: format!("{} {}", info.name.to_ascii_lowercase(), info.version).trim().to_owned(),
        engine_available,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        features: FEATURES.map(str::to_owned).into(),
        policy: config.policy(),
        disk_free_bytes: least_free(folder, &info.data_root),
        kernel: release,
        container_network_reachable: reached,
        used_ports,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::FakeEngine;
    use crate::engine::{ContainerSpec, PortSpec};

    async fn run(engine: &FakeEngine, cluster: &ClusterUid, at: std::net::SocketAddr) {
        engine.add_image("sha256:i", &[]);
        let mut spec = ContainerSpec::new(cluster, "n", "sha256:i");
        spec.ports.push(PortSpec { container: 80, publish: Some(at) });
        let id = engine.create(&spec).await.unwrap();
        engine.start(&id).await.unwrap();
    }

    #[tokio::test]
    async fn a_port_that_our_own_container_publishes_is_not_in_use_by_something_else() {
        let here = tempfile::tempdir().unwrap();
        let engine = FakeEngine::new();
        let cluster: ClusterUid = "c".parse().unwrap();
        // Two listeners on this machine: one stands for the engine's, one is somebody else's.
        let ours = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (ours, other) = (ours.local_addr().unwrap(), other.local_addr().unwrap());
        run(&engine, &cluster, ours).await;
        let config = Config::default();
        let told = |cluster| gather(&config, here.path(), &engine, true, cluster, &[7]);
        let ports = told(Some(&cluster)).await.used_ports;
        assert!(ports.contains(&u32::from(other.port())), "{ports:?}");
        assert!(!ports.contains(&u32::from(ours.port())), "{ports:?}");
        // Of another cluster it is another's.
        let elsewhere: ClusterUid = "d".parse().unwrap();
        assert!(told(Some(&elsewhere)).await.used_ports.contains(&u32::from(ours.port())));
        // While the engine does not say which are ours, nothing new is found out.
        engine.go_away();
        assert_eq!(told(Some(&cluster)).await.used_ports, [7]);
    }

    #[test]
    fn a_port_that_is_taken_is_news_and_one_that_the_kernel_hands_out_is_not() {
        let facts = |ports: &[u32], free| api::HostFacts {
            used_ports: ports.to_vec(),
            disk_free_bytes: free,
            ..api::HostFacts::default()
        };
        assert!(is_news(&facts(&[22], 1), &facts(&[22, 8080], 1)));
        assert!(is_news(&facts(&[22, 8080], 1), &facts(&[22], 1)));
        assert!(!is_news(&facts(&[22], 1), &facts(&[22, 40_000], 2)));
    }

    #[test]
    fn the_engine_s_folder_counts_where_the_agent_sees_it() {
        let here = tempfile::tempdir().unwrap();
        assert!(least_free(here.path(), "") > 0);
        assert!(least_free(here.path(), "/nowhere/to/be/found") > 0);
        // A file system that never has room.
        assert_eq!(least_free(here.path(), "/proc"), 0);
    }
}
