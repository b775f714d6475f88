//! What the agent reports of its host.

use crate::config::Config;
use crate::engine::Engine;
use berth_proto::api;
use berth_proto::convert::host_facts_to_api;
use berth_proto::values::{HostFacts, Resources};
use std::collections::BTreeSet;
use std::path::Path;

/// Features this agent knows; an assignment that needs another is refused by name.
pub const FEATURES: [&str; 1] = ["artifact"];

/// Bytes free where models are kept.
#[must_use]
pub fn disk_free(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map(|s| s.f_bavail.saturating_mul(s.f_frsize)).unwrap_or(0)
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// TCP ports something listens on, from the kernel's tables.
fn used_ports() -> BTreeSet<u16> {
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

/// Gathers the facts. An engine that does not answer is said so.
pub async fn gather(config: &Config, folder: &Path, engine: &dyn Engine) -> api::HostFacts {
    let info = engine.info().await;
    let available = info.is_ok();
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
        engine_available: available,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        features: FEATURES.map(str::to_owned).into(),
        policy: config.policy(),
        disk_free_bytes: disk_free(folder),
        kernel: release,
        container_network_reachable: true,
        used_ports: used_ports().into_iter().take(1024).collect(),
    })
}
