//! What agents report of their hosts.

use crate::api;
use crate::values::{HostFacts, HostPolicy, Resources};

/// Reads amounts; absent is zero.
#[must_use]
pub fn resources_from_api(from: Option<&api::Resources>) -> Resources {
    let from = from.copied().unwrap_or_default();
    Resources {
        cpu_millis: from.cpu_millis,
        memory_bytes: from.memory_bytes,
        gpu_memory_bytes: from.gpu_memory_bytes,
    }
}

/// Writes amounts.
#[must_use]
pub fn resources_to_api(from: &Resources) -> api::Resources {
    api::Resources {
        cpu_millis: from.cpu_millis,
        memory_bytes: from.memory_bytes,
        gpu_memory_bytes: from.gpu_memory_bytes,
    }
}

/// Reads facts. What cannot be understood (a newer agent's address form) is left out: facts only
/// ever allow more, so leaving out is safe.
#[must_use]
pub fn host_facts_from_api(from: &api::HostFacts) -> HostFacts {
    let policy = from.policy.clone().unwrap_or_default();
    HostFacts {
        arch: from.arch.clone(),
        os: from.os.clone(),
        capacity: resources_from_api(from.capacity.as_ref()),
        labels: from.labels.clone(),
        engine: from.engine.clone(),
        engine_available: from.engine_available,
        agent_version: from.agent_version.clone(),
        features: from.features.iter().cloned().collect(),
        policy: HostPolicy {
            mount_folders: policy.mount_folders,
            allow_privileged: policy.allow_privileged,
            allow_host_network: policy.allow_host_network,
            allow_capabilities: policy.allow_capabilities.into_iter().collect(),
            allow_devices: policy.allow_devices.into_iter().collect(),
            forbid_exec: policy.forbid_exec,
            publish_addresses: policy
                .publish_addresses
                .iter()
                .filter_map(|a| a.parse().ok())
                .collect(),
            allow_container_traffic: policy.allow_container_traffic,
            forbid_publish: policy.forbid_publish,
        },
        disk_free_bytes: from.disk_free_bytes,
        kernel: from.kernel.clone(),
        container_network_reachable: from.container_network_reachable,
        used_ports: from.used_ports.iter().filter_map(|p| u16::try_from(*p).ok()).collect(),
    }
}

/// Writes facts.
#[must_use]
pub fn host_facts_to_api(from: &HostFacts) -> api::HostFacts {
    api::HostFacts {
        arch: from.arch.clone(),
        os: from.os.clone(),
        capacity: Some(resources_to_api(&from.capacity)),
        labels: from.labels.clone(),
        engine: from.engine.clone(),
        engine_available: from.engine_available,
        agent_version: from.agent_version.clone(),
        features: from.features.iter().cloned().collect(),
        policy: Some(api::HostPolicy {
            mount_folders: from.policy.mount_folders.clone(),
            allow_privileged: from.policy.allow_privileged,
            allow_host_network: from.policy.allow_host_network,
            allow_capabilities: from.policy.allow_capabilities.iter().cloned().collect(),
            allow_devices: from.policy.allow_devices.iter().cloned().collect(),
            forbid_exec: from.policy.forbid_exec,
            publish_addresses: from
                .policy
                .publish_addresses
                .iter()
                .map(ToString::to_string)
                .collect(),
            allow_container_traffic: from.policy.allow_container_traffic,
            forbid_publish: from.policy.forbid_publish,
        }),
        disk_free_bytes: from.disk_free_bytes,
        kernel: from.kernel.clone(),
        container_network_reachable: from.container_network_reachable,
        used_ports: from.used_ports.iter().map(|p| (*p).into()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_read_back() {
        let facts = HostFacts {
            arch: "amd64".into(),
            capacity: Resources { cpu_millis: 2000, memory_bytes: 1 << 30, gpu_memory_bytes: 0 },
            policy: HostPolicy {
                publish_addresses: ["127.0.0.1".parse().unwrap()].into(),
                forbid_exec: true,
                allow_container_traffic: true,
                ..HostPolicy::default()
            },
            used_ports: [22, 80].into(),
            ..HostFacts::default()
        };
        assert_eq!(host_facts_from_api(&host_facts_to_api(&facts)), facts);
    }
}
