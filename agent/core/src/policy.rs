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
    /// A mount of what is not there.
    #[error("{0} is not there, or cannot be read by the agent")]
    Missing(String),
    /// A mount of a socket: it would hand over whatever listens on it, the engine for one.
    #[error("{0} is a socket; sockets are never mounted")]
    Socket(String),
    /// What a container was made with leads elsewhere by now.
    #[error("{0} leads elsewhere than when its container was made")]
    Moved(String),
    /// An address.
    #[error("this host does not publish ports on {0}")]
    Publish(std::net::IpAddr),
    /// No image for this machine.
    #[error("there is no image for this machine ({0})")]
    Platform(String),
}

/// What a path leads to once all links are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Real {
    /// Where.
    pub path: String,
    /// A Unix socket is there.
    pub is_socket: bool,
}

/// Judges an assignment. `resolved` gives a path with all links resolved, so that a link inside an
/// allowed folder leads nowhere else; `None`: nothing is there.
///
/// # Errors
/// The first thing that is not allowed.
pub fn judge(
    body: &AssignmentBody,
    policy: &HostPolicy,
    features: &BTreeSet<String>,
    platform: (&str, &str),
    resolved: impl Fn(&str) -> Option<Real>,
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
        let shown = real.as_ref().map_or(mount.source.as_str(), |real| real.path.as_str());
        let below = |folder: &String| {
            let folder = resolved(folder).map_or_else(|| folder.clone(), |real| real.path);
            let folder = folder.trim_end_matches('/');
            shown == folder || shown.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
        };
        if !policy.mount_folders.iter().any(below) {
            let allowed = if policy.mount_folders.is_empty() {
                "no folder".to_owned()
            } else {
                policy.mount_folders.join(", ")
            };
            return Err(Forbidden::Mount(mount.source.clone(), allowed));
        }
        match real {
            None => return Err(Forbidden::Missing(mount.source.clone())),
            Some(real) if real.is_socket => return Err(Forbidden::Socket(real.path)),
            Some(_) => {}
        }
    }
    for publish in body.spec.ports.iter().filter_map(|p| p.publish.as_ref()) {
        if !policy.may_publish(publish.bind) {
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

/// Judges the paths that a container was made with, before it is started: the engine follows them once
/// more then, and a link that was put in the place of a folder meanwhile would lead it anywhere. What
/// was recorded had all its links resolved, so it must still lead to itself.
///
/// # Errors
/// The first that does not.
pub fn judge_made<'a>(
    sources: impl IntoIterator<Item = &'a str>,
    resolved: impl Fn(&str) -> Option<Real>,
) -> Result<(), Forbidden> {
    for source in sources {
        match resolved(source) {
            None => return Err(Forbidden::Missing(source.to_owned())),
            Some(real) if real.is_socket => return Err(Forbidden::Socket(real.path)),
            Some(real) if real.path != source => return Err(Forbidden::Moved(source.to_owned())),
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::values::{Mount, Port, Publish};
    use berth_proto::{agent, api, convert};
    use prost::Message as _;

    fn body() -> AssignmentBody {
        let digest = berth_proto::ids::Digest::of(b"i").to_string();
        let platform = api::PlatformImage {
            arch: "amd64".into(),
            os: "linux".into(),
            manifest_digest: digest.clone(),
            config_digest: digest.clone(),
            ..Default::default()
        };
        let bytes = agent::AssignmentBody {
            deployment_uid: "d".into(),
            deployment: "d".into(),
            namespace: "default".into(),
            release: 1,
            source: Some(api::ResolvedSource {
                image: Some(api::ResolvedImage {
                    digest,
                    platforms: vec![platform],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            spec: Some(api::DeploymentSpec {
                source: Some(api::deployment_spec::Source::Image("i".into())),
                ..Default::default()
            }),
            ..Default::default()
        }
        .encode_to_vec();
        convert::assignment_body_from_bytes(&bytes).unwrap()
    }

    /// A host with /srv/models, a link out of it, and a socket in it.
    fn resolved(path: &str) -> Option<Real> {
        let real = |path: &str, is_socket| Some(Real { path: path.into(), is_socket });
        match path {
            "/srv/models/link" => real("/etc", false),
            "/srv/models/engine.sock" => real("/srv/models/engine.sock", true),
            "/srv/models/none" => None,
            "/models" => real("/srv/models", false),
            other => real(other, false),
        }
    }

    fn ask(policy: &HostPolicy, edit: impl FnOnce(&mut AssignmentBody)) -> Result<(), Forbidden> {
        let mut body = body();
        edit(&mut body);
        judge(&body, policy, &BTreeSet::from(["artifact".into()]), ("linux", "amd64"), resolved)
    }

    #[test]
    fn nothing_beyond_the_ordinary_is_allowed_unless_the_host_says_so() {
        let none = HostPolicy::default();
        assert_eq!(ask(&none, |_| {}), Ok(()));
        assert_eq!(ask(&none, |b| b.spec.privileges.privileged = true), Err(Forbidden::Privileged));
        assert_eq!(
            ask(&none, |b| b.spec.privileges.host_network = true),
            Err(Forbidden::HostNetwork)
        );
        let capability = |b: &mut AssignmentBody| {
            b.spec.privileges.add_capabilities.insert("NET_ADMIN".into());
        };
        let device = |b: &mut AssignmentBody| {
            b.spec.privileges.devices.insert("/dev/kvm".into());
        };
        assert_eq!(ask(&none, capability), Err(Forbidden::Capability("NET_ADMIN".into())));
        assert_eq!(ask(&none, device), Err(Forbidden::Device("/dev/kvm".into())));
        let some = HostPolicy {
            allow_capabilities: BTreeSet::from(["NET_ADMIN".into()]),
            allow_devices: BTreeSet::from(["/dev/kvm".into()]),
            ..none.clone()
        };
        assert_eq!(ask(&some, capability).and(ask(&some, device)), Ok(()));
        assert_eq!(
            ask(&none, |b| b.requires = BTreeSet::from(["time-travel".into()])),
            Err(Forbidden::Feature("time-travel".into()))
        );
        assert!(matches!(
            ask(&none, |b| b.source.image.platforms[0].arch = "arm64".into()),
            Err(Forbidden::Platform(_))
        ));
    }

    #[test]
    fn mounts_stay_below_listed_folders_after_links_and_are_never_sockets() {
        let mount = |policy: &HostPolicy, source: &str| {
            ask(policy, |b| {
                let target = "/data".into();
                b.spec.mounts = vec![Mount { source: source.into(), target, writable: false }];
            })
        };
        let none = HostPolicy::default();
        assert!(matches!(mount(&none, "/srv/models/a"), Err(Forbidden::Mount(..))));
        // The folder may itself be named by a link.
        let some = HostPolicy { mount_folders: vec!["/models".into()], ..none };
        assert_eq!(mount(&some, "/srv/models/a").and(mount(&some, "/srv/models")), Ok(()));
        for out in ["/srv/models/link", "/srv/modelsX", "/srv", "/"] {
            assert!(matches!(mount(&some, out), Err(Forbidden::Mount(..))), "{out}");
        }
        let socket = "/srv/models/engine.sock";
        assert_eq!(mount(&some, socket), Err(Forbidden::Socket(socket.into())));
        let missing = "/srv/models/none";
        assert_eq!(mount(&some, missing), Err(Forbidden::Missing(missing.into())));
    }

    #[test]
    fn what_a_container_was_made_with_must_still_lead_to_itself() {
        assert_eq!(judge_made(["/srv/models/a", "/srv"], resolved), Ok(()));
        let out = "/srv/models/link";
        assert_eq!(judge_made([out], resolved), Err(Forbidden::Moved(out.into())));
        let none = "/srv/models/none";
        assert_eq!(judge_made([none], resolved), Err(Forbidden::Missing(none.into())));
        let socket = "/srv/models/engine.sock";
        assert_eq!(judge_made([socket], resolved), Err(Forbidden::Socket(socket.into())));
    }

    #[test]
    fn ports_are_published_on_listed_addresses_only() {
        let publish = |policy: &HostPolicy, bind: &str| {
            ask(policy, |b| {
                let publish = Some(Publish { bind: bind.parse().unwrap(), port: 80 });
                b.spec.ports = vec![Port { name: "http".into(), container: 80, publish }];
            })
        };
        let local = HostPolicy {
            publish_addresses: BTreeSet::from(["127.0.0.1".parse().unwrap()]),
            ..HostPolicy::default()
        };
        assert_eq!(publish(&local, "127.0.0.1"), Ok(()));
        let out = publish(&local, "0.0.0.0");
        assert_eq!(out, Err(Forbidden::Publish("0.0.0.0".parse().unwrap())));
        let nowhere = HostPolicy { forbid_publish: true, ..HostPolicy::default() };
        let local = publish(&nowhere, "127.0.0.1");
        assert_eq!(local, Err(Forbidden::Publish("127.0.0.1".parse().unwrap())));
    }
}
