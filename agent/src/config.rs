//! The agent's settings and the host's own policy, which no server can change.

use berth_proto::values::{HostPolicy, Resources};
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
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
    /// How bytes are brought and kept.
    pub transfer: Transfer,
}

/// How bytes are brought and kept.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Transfer {
    /// At most so many bytes a second for all transfers together, e.g. `2MiB`. Default: no cap.
    pub bandwidth: Option<String>,
    /// Nothing is brought that would leave less than this free. Default: `256MiB`.
    pub keep_free: Option<String>,
    /// Models and images that nobody needs go after so long, e.g. `30d`; sooner when the disk is
    /// short. Default: `7d`.
    pub keep_unused: Option<String>,
}

/// [`Transfer`], read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second for all transfers together; `None`: no cap.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Bytes that stay free.
    pub keep_free_bytes: u64,
    /// How long what nobody needs is kept.
    pub keep_unused_ms: u64,
}

/// Enough for logs and for the engine to go on. A guess; it is a setting.
const KEEP_FREE_BYTES: u64 = 256 << 20;
/// A week: long enough to go back after a weekend. A guess; it is a setting.
const KEEP_UNUSED_MS: u64 = 7 * 24 * 3_600 * 1_000;

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
    /// Addresses that ports may be published on; not set: any; an empty list: none.
    pub publish_addresses: Option<BTreeSet<std::net::IpAddr>>,
    /// Containers may talk to each other. An engine that cannot keep them apart (podman) needs it.
    pub allow_container_traffic: bool,
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
    /// A folder by which no mount could ever be found.
    #[error("policy.mount-folders: \"{0}\" does not begin with /")]
    Relative(String),
    /// A quantity.
    #[error("a quantity is not right")]
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
        config.limits()?;
        config.mounts()?;
        Ok(config)
    }

    fn mounts(&self) -> Result<(), ConfigError> {
        let relative = self.policy.mount_folders.iter().find(|folder| !folder.starts_with('/'));
        relative.map_or(Ok(()), |folder| Err(ConfigError::Relative(folder.clone())))
    }

    /// How bytes are brought and kept.
    ///
    /// # Errors
    /// When a quantity is none.
    pub fn limits(&self) -> Result<Limits, ConfigError> {
        let bytes = |text: &Option<String>| {
            text.as_deref().map(berth_proto::quantity::parse_bytes).transpose()
        };
        let unused = self.transfer.keep_unused.as_deref();
        let unused = unused.map(berth_proto::quantity::parse_duration_ms).transpose()?;
        Ok(Limits {
            bytes_per_second: bytes(&self.transfer.bandwidth)?.and_then(NonZeroU64::new),
            keep_free_bytes: bytes(&self.transfer.keep_free)?.unwrap_or(KEEP_FREE_BYTES),
            keep_unused_ms: unused.unwrap_or(KEEP_UNUSED_MS),
        })
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
            forbid_publish: p.publish_addresses.as_ref().is_some_and(BTreeSet::is_empty),
            publish_addresses: p.publish_addresses.unwrap_or_default(),
            allow_container_traffic: p.allow_container_traffic,
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

    #[test]
    fn a_folder_for_mounts_that_is_no_whole_path_is_refused() {
        let load = |folder: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), format!("[policy]\nmount-folders = [\"{folder}\"]"))
                .unwrap();
            Config::load(Some(file.path())).map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(load("/srv"), Ok(()));
        assert!(load("srv").unwrap_err().contains("\"srv\" does not begin with /"));
    }

    #[test]
    fn an_empty_list_of_addresses_allows_none_and_no_list_allows_any() {
        let may = |text: &str| {
            let policy = toml::from_str::<Config>(text).unwrap().policy();
            ["127.0.0.1", "0.0.0.0"].map(|on| policy.may_publish(on.parse().unwrap()))
        };
        assert_eq!(may(""), [true, true]);
        assert_eq!(may("[policy]\npublish-addresses = []"), [false, false]);
        assert_eq!(may("[policy]\npublish-addresses = [\"127.0.0.1\"]"), [true, false]);
    }
}
