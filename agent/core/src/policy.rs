//! The host's own policy, enforced against the server.

use berth_proto::values::{AssignmentBody, HostPolicy};
use std::collections::BTreeSet;

/// Why an assignment is not carried out on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// A feature this agent lacks.
    #[error("this agent does not know the feature {0}")]
    Feature(String),
    /// All of the host's rights.
    #[error("this host allows no privileged containers")]
    Privileged,
    /// The host's network.
    #[error("this host does not share its network")]
    HostNetwork,
    /// A capability.
    #[error("this host does not allow capability {0}")]
    Capability(String),
    /// A device.
    #[error("this host does not show device {0}")]
    Device(String),
    /// A mount.
    #[error("this host does not mount {0}; mounts are allowed below: {1}")]
    Mount(String, String),
    /// An address.
    #[error("this host does not publish ports on {0}")]
    Publish(std::net::IpAddr),
    /// No image for this machine.
    #[error("there is no image for this machine ({0})")]
    Platform(String),
}

/// Judges an assignment. `resolved` gives a mount's source with all links resolved, so that a link
/// inside an allowed folder leads nowhere else.
///
/// # Errors
/// The first thing that is not allowed.
pub fn judge(
    body: &AssignmentBody,
    policy: &HostPolicy,
    features: &BTreeSet<String>,
    platform: (&str, &str),
    resolved: impl Fn(&str) -> Option<String>,
) -> Result<(), Forbidden> {
    if let Some(feature) = body.requires.iter().find(|f| !features.contains(*f)) {
        return Err(Forbidden::Feature(feature.clone()));
    }
    let asked = &body.spec.privileges;
    if asked.privileged && !policy.allow_privileged {
        return Err(Forbidden::Privileged);
    }
    if asked.host_network && !policy.allow_host_network {
        return Err(Forbidden::HostNetwork);
    }
    if let Some(c) = asked.add_capabilities.iter().find(|c| !policy.allow_capabilities.contains(*c))
    {
        return Err(Forbidden::Capability(c.clone()));
    }
    if let Some(d) = asked.devices.iter().find(|d| !policy.allow_devices.contains(*d)) {
        return Err(Forbidden::Device(d.clone()));
    }
    for mount in &body.spec.mounts {
        let real = resolved(&mount.source);
        let below = |folder: &String| {
            let folder = resolved(folder).unwrap_or_else(|| folder.clone());
            let folder = folder.trim_end_matches('/');
            real.as_ref().is_some_and(|real| {
                real == folder
                    || real.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
            })
        };
        if !policy.mount_folders.iter().any(below) {
            let allowed = if policy.mount_folders.is_empty() {
                "no folder".to_owned()
            } else {
                policy.mount_folders.join(", ")
            };
            return Err(Forbidden::Mount(mount.source.clone(), allowed));
        }
    }
    for publish in body.spec.ports.iter().filter_map(|p| p.publish.as_ref()) {
        if !policy.publish_addresses.is_empty() && !policy.publish_addresses.contains(&publish.bind)
        {
            return Err(Forbidden::Publish(publish.bind));
        }
    }
    let (os, arch) = platform;
    let platforms = &body.source.image.platforms;
    if !platforms.iter().any(|p| p.os == os && p.arch == arch) {
        return Err(Forbidden::Platform(format!("{os}/{arch}")));
    }
    Ok(())
}
