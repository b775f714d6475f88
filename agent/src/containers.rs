//! What is said of a replica when its container is made, and what its labels say of it later.
//!
//! Whatever a container is, it gets here: no restart policy of the engine's own, no more rights than
//! the deployment asked for (which the host's policy was asked about before), mounts by their real
//! paths, bounded logs.

use crate::engine::{
    BindMount, ContainerSpec, ContainerState, NETWORK, NetworkMode, ObservedContainer, PortSpec,
};
use crate::state::wall_now;
use berth_agent_core::diff::{Container, Labels, State};
use berth_proto::ids::{ClusterUid, ReplicaUid};
use berth_proto::values::AssignmentBody;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The replica's label.
pub const LABEL_REPLICA: &str = "io.berth.replica";
/// The attempt's label.
pub const LABEL_ATTEMPT: &str = "io.berth.attempt";
/// The namespace's label.
pub const LABEL_NAMESPACE: &str = "io.berth.namespace";
const LABEL_DEPLOYMENT: &str = "io.berth.deployment";
const LABEL_RELEASE: &str = "io.berth.release";
const LABEL_SPEC: &str = "io.berth.spec";

/// The name of a cluster's own bridge: engines let two networks have one name, and two clusters may
/// share an engine.
#[must_use]
pub fn bridge(cluster: &ClusterUid) -> String {
    let text = cluster.as_str();
    format!("{NETWORK}-{}", &text[text.len().saturating_sub(12)..])
}

/// What the core needs of a container; `None`: it is no replica's, or it is being removed.
#[must_use]
pub fn read(observed: &ObservedContainer) -> Option<Container> {
    let (state, started) = match &observed.state {
        ContainerState::Created => (State::Created, None),
        ContainerState::Running { started_at, .. } => (State::Running, *started_at),
        ContainerState::Exited { code, out_of_memory, finished_at, .. } => {
            let time = finished_at.unwrap_or_else(wall_now);
            (State::Exited { code: *code, out_of_memory: *out_of_memory, time }, None)
        }
        ContainerState::Removing => return None,
    };
    let label = |key: &str| observed.labels.get(key);
    Some(Container {
        id: observed.id.clone(),
        replica: label(LABEL_REPLICA)?.parse().ok()?,
        attempt: label(LABEL_ATTEMPT)?.parse().ok()?,
        state,
        started,
        grace_ms: u64::from(observed.stop_grace_s.unwrap_or(10)) * 1000,
        labels: Labels {
            deployment_uid: label(LABEL_DEPLOYMENT).cloned().unwrap_or_default(),
            release: label(LABEL_RELEASE).and_then(|r| r.parse().ok()).unwrap_or_default(),
            body_digest: label(LABEL_SPEC).cloned().unwrap_or_default(),
        },
    })
}

/// One attempt of a replica.
pub struct Attempt<'a> {
    /// The cluster.
    pub cluster: &'a ClusterUid,
    /// The replica.
    pub replica: &'a ReplicaUid,
    /// Its number.
    pub number: u32,
    /// What it runs.
    pub body: &'a AssignmentBody,
    /// Digest of the body's bytes.
    pub body_digest: &'a str,
    /// The engine's id of the image.
    pub image: &'a str,
    /// Where the model's files are.
    pub tree: Option<String>,
    /// What the sources of mounts lead to.
    pub real: &'a BTreeMap<String, String>,
}

impl Attempt<'_> {
    /// All that is said of its container.
    #[must_use]
    pub fn spec(&self) -> ContainerSpec {
        let (body, want) = (self.body, &self.body.spec);
        let name = format!("berth-{}-{}-{}", body.deployment, self.replica, self.number);
        let mut spec = ContainerSpec::new(self.cluster, &name, self.image);
        for (key, value) in [
            (LABEL_NAMESPACE, body.namespace.to_string()),
            (LABEL_DEPLOYMENT, body.deployment_uid.to_string()),
            (LABEL_RELEASE, body.release.to_string()),
            (LABEL_REPLICA, self.replica.to_string()),
            (LABEL_ATTEMPT, self.number.to_string()),
            (LABEL_SPEC, self.body_digest.to_owned()),
        ] {
            spec.labels.insert(key.to_owned(), value);
        }
        spec.env = want.env.clone();
        // What the server adds is not the operator's to override.
        spec.env.extend(body.system_env.clone());
        spec.entrypoint.clone_from(&want.command);
        spec.command.clone_from(&want.args);
        spec.user.clone_from(&want.user);
        spec.mounts = want
            .mounts
            .iter()
            .map(|m| BindMount {
                source: self.real.get(&m.source).unwrap_or(&m.source).clone(),
                target: m.target.clone(),
                writable: m.writable,
            })
            .collect();
        if let (Some(source), Some(target)) = (self.tree.clone(), body.artifact_target.clone()) {
            spec.mounts.push(BindMount { source, target, writable: false });
        }
        spec.ports = want
            .ports
            .iter()
            .map(|p| PortSpec {
                container: p.container,
                publish: p.publish.as_ref().map(|at| SocketAddr::new(at.bind, at.port)),
            })
            .collect();
        let some = |n: u64| (n > 0).then_some(n);
        spec.memory_bytes = some(want.resources.memory_bytes);
        spec.cpu_millis = some(want.resources.cpu_millis);
        spec.log.max_size_bytes = want.log.max_size_bytes;
        spec.log.max_files = want.log.max_files;
        spec.read_only_root = want.read_only_root;
        spec.cap_add = want.privileges.add_capabilities.clone();
        spec.devices = want.privileges.devices.clone();
        spec.privileged = want.privileges.privileged;
        spec.network = if want.privileges.host_network {
            NetworkMode::Host
        } else {
            NetworkMode::Bridge(bridge(self.cluster))
        };
        spec.stop_grace_s = u32::try_from(want.stop_grace_ms.div_ceil(1000)).unwrap_or(10);
        spec
    }
}
