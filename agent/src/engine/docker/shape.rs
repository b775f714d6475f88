//! Containers, output and events, between our words and the library's.

use crate::engine::{
    BindMount, CLUSTER_LABEL, ContainerSpec, ContainerState, EngineEvent, EventKind, LogChunk,
    NetworkMode, ObservedContainer, Source, stamp,
};
use berth_proto::ids::{ClusterUid, Wall};
use bollard::container::LogOutput;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, DeviceMapping,
    EventMessage, HostConfig, HostConfigLogConfig, Mount, MountType, PortBinding, RestartPolicy,
    RestartPolicyNameEnum,
};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

pub(super) fn create_body(spec: &ContainerSpec) -> ContainerCreateBody {
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

pub(super) fn observed(it: ContainerInspectResponse) -> Option<ObservedContainer> {
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
        // Dead: a removal failed, and only another try gets it away.
        ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD => ended(state),
        ContainerStateStatusEnum::REMOVING => ContainerState::Removing,
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
        stop_grace_s: config.stop_timeout.and_then(|s| u32::try_from(s).ok()),
        mount_sources: it
            .mounts
            .unwrap_or_default()
            .into_iter()
            .filter(|m| m.typ.as_deref() == Some("bind"))
            .filter_map(|m| m.source)
            .collect(),
    })
}

pub(super) fn chunk(output: LogOutput, stamped: bool) -> LogChunk {
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

pub(super) fn event(message: EventMessage, cluster: &ClusterUid) -> Option<EngineEvent> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

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
    fn limits_logs_and_mounts_reach_the_engine_as_they_were_said() {
        let cluster: ClusterUid = "c".parse().unwrap();
        let mut spec = ContainerSpec::new(&cluster, "n", "sha256:0");
        spec.memory_bytes = Some(64 << 20);
        spec.cpu_millis = Some(1_500);
        spec.stop_grace_s = 7;
        spec.mounts =
            vec![BindMount { source: "/srv/a".into(), target: "/data".into(), writable: false }];
        let body = create_body(&spec);
        let host = body.host_config.unwrap();
        assert_eq!((host.memory, host.memory_swap), (Some(64 << 20), Some(64 << 20)));
        assert_eq!((host.nano_cpus, body.stop_timeout), (Some(1_500_000_000), Some(7)));
        let log = host.log_config.unwrap().config.unwrap();
        assert_eq!((log["max-file"].as_str(), log["max-size"].as_str()), ("3", "10000000"));
        let mount = &host.mounts.unwrap()[0];
        assert_eq!((mount.typ, mount.read_only), (Some(MountType::BIND), Some(true)));
        assert_eq!(mount.source.as_deref(), Some("/srv/a"));
    }

    #[test]
    fn a_container_that_could_not_be_removed_is_seen_as_ended_so_that_it_is_removed_again() {
        let seen = |status| {
            let it = ContainerInspectResponse {
                id: Some("x".into()),
                image: Some("sha256:0".into()),
                config: Some(bollard::models::ContainerConfig::default()),
                state: Some(bollard::models::ContainerState {
                    status: Some(status),
                    exit_code: Some(137),
                    ..Default::default()
                }),
                ..ContainerInspectResponse::default()
            };
            observed(it).unwrap().state
        };
        let dead = seen(ContainerStateStatusEnum::DEAD);
        assert!(matches!(dead, ContainerState::Exited { code: 137, .. }), "{dead:?}");
        assert_eq!(seen(ContainerStateStatusEnum::REMOVING), ContainerState::Removing);
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
