//! The agent's settings and the host's own policy, which no server can change.

use berth_proto::values::{HostPolicy, Resources};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What may be set in the agent's TOML file.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Labels of the host; an operator's label of the same key wins.
    pub labels: BTreeMap<String, String>,
    /// Kept back from replicas, e.g. `{cpu = "500m", memory = "512MiB"}`.
    pub reserve: Reserve,
    /// What containers may ask of the host.
    pub policy: Policy,
}

/// What is kept back for the machine itself.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Reserve {
    /// Processors.
    pub cpu: Option<String>,
    /// Memory.
    pub memory: Option<String>,
}

/// The host's own policy; everything is forbidden unless it is set.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Policy {
    /// Folders below which mounts are allowed.
    pub mount_folders: Vec<String>,
    /// Privileged containers.
    pub allow_privileged: bool,
    /// The host's network.
    pub allow_host_network: bool,
    /// Capabilities that may be added.
    pub allow_capabilities: BTreeSet<String>,
    /// Devices that may be shown.
    pub allow_devices: BTreeSet<String>,
    /// Refuse running commands in containers.
    pub forbid_exec: bool,
    /// Addresses that ports may be published on; empty: any.
    pub publish_addresses: BTreeSet<std::net::IpAddr>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It holds something else.
    #[error("{} is not right", .0.display())]
    Parse(PathBuf, #[source] Box<toml::de::Error>),
    /// A quantity.
    #[error("reserve is not right")]
    Quantity(#[from] berth_proto::quantity::InvalidQuantity),
}

impl Config {
    /// Reads the file; with none given, the default one when it exists.
    ///
    /// # Errors
    /// When it cannot be read or holds what is not known.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let default = Path::new("/etc/berth/agent.toml");
        let path = match path {
            Some(path) => path,
            None if default.exists() => default,
            None => return Ok(Self::default()),
        };
        let text =
            std::fs::read_to_string(path).map_err(|e| ConfigError::Read(path.to_owned(), e))?;
        let config: Self =
            toml::from_str(&text).map_err(|e| ConfigError::Parse(path.to_owned(), Box::new(e)))?;
        config.reserved()?;
        Ok(config)
    }

    /// What is kept back.
    ///
    /// # Errors
    /// When a quantity is none.
    pub fn reserved(&self) -> Result<Resources, ConfigError> {
        let cpu = self.reserve.cpu.as_deref().map(berth_proto::quantity::parse_cpu);
        let memory = self.reserve.memory.as_deref().map(berth_proto::quantity::parse_bytes);
        Ok(Resources {
            cpu_millis: cpu.transpose()?.unwrap_or(0),
            memory_bytes: memory.transpose()?.unwrap_or(0),
            gpu_memory_bytes: 0,
        })
    }

    /// The host's own policy.
    #[must_use]
    pub fn policy(&self) -> HostPolicy {
        let p = self.policy.clone();
        HostPolicy {
            mount_folders: p.mount_folders,
            allow_privileged: p.allow_privileged,
            allow_host_network: p.allow_host_network,
            allow_capabilities: p.allow_capabilities,
            allow_devices: p.allow_devices,
            forbid_exec: p.forbid_exec,
            publish_addresses: p.publish_addresses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_allowed_unless_it_is_set_and_unknown_keys_are_refused() {
        let policy = Config::default().policy();
        assert_eq!(policy, HostPolicy::default());
        let text = "[policy]\nallow-priviledged = true";
        let error = toml::from_str::<Config>(text).unwrap_err().to_string();
        assert!(error.contains("allow-priviledged") && error.contains("allow-privileged"));
    }
}
