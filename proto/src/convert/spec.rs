//! A deployment's spec.

use super::{Problems, duration, duration_ms, resources_from_api, resources_to_api};
use crate::api;
use crate::values::{
    ARTIFACT_TARGET, DeploymentSpec, HealthCheck, HostLossAction, LogOptions, Mount, OnHostLoss,
    OnRolloutFailure, Placement, Port, Privileges, Probe, Publish, Restart, RestartCondition,
    Rollout, Scale, Source,
};
use std::collections::BTreeSet;

/// A day: no wait that a deployment describes is sensibly longer, but for host loss.
const DAY_MS: u64 = 86_400_000;
/// A year: a host may be away for a season.
const YEAR_MS: u64 = 365 * DAY_MS;

/// Least share of a processor that an engine gives (0.01), in thousandths.
pub const MIN_CPU_MILLIS: u64 = 10;
/// Least memory that an engine limits a container to (6 MiB): its runtime needs as much to start one.
pub const MIN_MEMORY_BYTES: u64 = 6 * 1024 * 1024;

/// Reads a spec as somebody writes it now: with [`deployment_spec_from_api`]'s bounds and those that
/// what is stored and what hosts hold is not measured by, because it was written before they were
/// known.
///
/// # Errors
/// Everything that is wrong with it.
pub fn deployment_spec_to_write(from: &api::DeploymentSpec) -> Result<DeploymentSpec, Problems> {
    let mut p = Problems::default();
    let asked = resources_from_api(from.resources.as_ref());
    if (1..MIN_CPU_MILLIS).contains(&asked.cpu_millis) {
        p.add_hint(
            "spec.resources.cpu",
            format!("must be at least {}", crate::quantity::format_cpu(MIN_CPU_MILLIS)),
            "engines give no smaller share; left out, nothing is reserved and nothing limited",
        );
    }
    if (1..MIN_MEMORY_BYTES).contains(&asked.memory_bytes) {
        p.add_hint(
            "spec.resources.memory",
            format!("must be at least {}", crate::quantity::format_bytes(MIN_MEMORY_BYTES)),
            "engines start no container with less; left out, nothing is reserved and nothing limited",
        );
    }
    // What cannot be read of these is told by the reading of the whole.
    let mut unread = Problems::default();
    let asked = rollout(&mut unread, from.rollout.as_ref());
    if asked.progress_deadline_ms <= asked.ready_for_ms {
        let ready_for = crate::quantity::format_duration_ms(asked.ready_for_ms);
        p.add_hint(
            "spec.rollout.progressDeadline",
            format!("must be longer than readyFor, which is {ready_for}"),
            "no replica becomes healthy sooner than that; leave time to fetch and to start one too",
        );
    }
    published_once(&mut p, &ports(&mut unread, &from.ports));
    mounted_once(&mut p, from);
    match deployment_spec_from_api(from) {
        Ok(spec) => p.finish(spec),
        Err(found) => {
            p.0.extend(found.0);
            Err(p)
        }
    }
}

/// Reads a spec; paths of problems begin with `spec.`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn deployment_spec_from_api(from: &api::DeploymentSpec) -> Result<DeploymentSpec, Problems> {
    let mut p = Problems::default();
    let source = match &from.source {
        Some(api::deployment_spec::Source::Model(text)) if !text.is_empty() => {
            Source::Model(text.clone())
        }
        Some(api::deployment_spec::Source::Image(text)) if !text.is_empty() => {
            Source::Image(text.clone())
        }
        Some(_) | None => {
            p.add_hint("spec", "names nothing to run", "set model: NAME[:VERSION] or image: REF");
            Source::Image(String::new())
        }
    };
    let scale = match (from.every_host, from.replicas) {
        (true, Some(_)) => {
            p.add("spec.replicas", "cannot stand beside everyHost: true");
            Scale::EveryHost
        }
        (true, None) => Scale::EveryHost,
        (false, Some(n)) => {
            bound(&mut p, "spec.replicas", n.into(), 0, 100_000);
            Scale::Replicas(n)
        }
        (false, None) => Scale::Keep,
    };
    let ports = ports(&mut p, &from.ports);
    let health = from.health.as_ref().and_then(|check| health(&mut p, check, &ports));
    let placement = placement(&mut p, from.placement.as_ref());
    count(&mut p, "spec.env", from.env.len(), 256);
    for (name, value) in &from.env {
        if name.is_empty() || name.contains(['=', '\0']) || name.len() > 256 {
            p.add(format!("spec.env.{name}"), "is not a name of an environment variable");
        }
        if value.contains('\0') || value.len() > 32 * 1024 {
            p.add(format!("spec.env.{name}"), "must be at most 32 KiB without NUL");
        }
    }
    let mounts = mounts(&mut p, &from.mounts);
    served_model(&mut p, &from.served_model);
    let spec = DeploymentSpec {
        source,
        runtime: (!from.runtime.is_empty()).then(|| from.runtime.clone()),
        served_model: (!from.served_model.is_empty()).then(|| from.served_model.clone()),
        scale,
        placement,
        resources: resources_from_api(from.resources.as_ref()),
        ports,
        env: from.env.clone(),
        mounts,
        health,
        restart: restart(&mut p, from.restart.as_ref()),
        rollout: rollout(&mut p, from.rollout.as_ref()),
        on_host_loss: host_loss(&mut p, from.on_host_loss.as_ref()),
        stop_grace_ms: time(&mut p, "spec.stopGrace", from.stop_grace.as_ref(), 10_000, 3_600_000),
        command: words(&mut p, "spec.command", &from.command),
        args: words(&mut p, "spec.args", &from.args),
        user: (!from.user.is_empty()).then(|| from.user.clone()),
        read_only_root: from.read_only_root,
        log: log(&mut p, from.log.as_ref()),
        privileges: privileges(&mut p, from.privileges.as_ref()),
    };
    p.finish(spec)
}

/// It stands in a path as one segment.
fn served_model(p: &mut Problems, name: &str) {
    let segment = !name.contains('/') && !name.contains(char::is_control);
    if !segment || name.chars().count() > 253 || matches!(name, "." | "..") {
        p.add("spec.servedModel", "must be 1 to 253 characters without '/' and control characters");
    }
}

fn bound(p: &mut Problems, path: &str, value: u64, low: u64, high: u64) {
    if !(low..=high).contains(&value) {
        p.add(path, format!("must be {low} to {high}, not {value}"));
    }
}

fn count(p: &mut Problems, path: &str, found: usize, most: usize) {
    if found > most {
        p.add(path, format!("has {found} entries; at most {most} are allowed"));
    }
}

fn time(
    p: &mut Problems,
    path: &str,
    value: Option<&prost_types::Duration>,
    default: u64,
    most: u64,
) -> u64 {
    let Some(value) = value else { return default };
    match duration_ms(value) {
        Some(ms) if ms <= most => ms,
        Some(_) | None => {
            let most = crate::quantity::format_duration_ms(most);
            p.add(path, format!("must be 0 to {most}"));
            default
        }
    }
}

fn words(p: &mut Problems, path: &str, words: &[String]) -> Vec<String> {
    count(p, path, words.len(), 256);
    for (i, word) in words.iter().enumerate() {
        if word.contains('\0') || word.len() > 32 * 1024 {
            p.add(format!("{path}[{i}]"), "must be at most 32 KiB without NUL");
        }
    }
    words.to_vec()
}

fn ports(p: &mut Problems, from: &[api::Port]) -> Vec<Port> {
    count(p, "spec.ports", from.len(), 16);
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::new();
    for (i, port) in from.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        if !crate::ids::is_name(&port.name) || port.name.len() > 15 {
            p.add(format!("{path}.name"), "must be 1 to 15 of a-z, 0-9 and '-'");
        }
        if !names.insert(&port.name) {
            p.add(format!("{path}.name"), format!("\"{}\" is there twice", port.name));
        }
        let container = u16::try_from(port.container).unwrap_or(0);
        if container == 0 {
            p.add(format!("{path}.container"), "must be 1 to 65535");
        }
        if !numbers.insert(container) {
            p.add(format!("{path}.container"), format!("{container} is there twice"));
        }
        let publish = match (port.host_port, port.bind.as_str()) {
            (0, "") => None,
            (0, _) => {
                p.add(format!("{path}.bind"), "means nothing without hostPort");
                None
            }
            (_, "") => {
                p.add_hint(
                    format!("{path}.bind"),
                    "is needed with hostPort",
                    "e.g. bind: 127.0.0.1, or bind: 0.0.0.0 for every address of the host",
                );
                None
            }
            (number, bind) => {
                let number = u16::try_from(number).ok();
                if number.is_none() {
                    p.add(format!("{path}.hostPort"), "must be 1 to 65535");
                }
                let bind = p.take(format!("{path}.bind"), bind.parse());
                bind.zip(number).map(|(bind, port)| Publish { bind, port })
            }
        };
        ports.push(Port { name: port.name.clone(), container, publish });
    }
    ports
}

/// An engine binds an address and port of the host once.
fn published_once(p: &mut Problems, ports: &[Port]) {
    let overlap = |a: &Publish, b: &Publish| {
        let whole = a.bind.is_unspecified() || b.bind.is_unspecified();
        a.port == b.port && (a.bind == b.bind || (whole && a.bind.is_ipv4() == b.bind.is_ipv4()))
    };
    for (i, port) in ports.iter().enumerate() {
        let Some(publish) = &port.publish else { continue };
        let mut before = ports.iter().take(i).filter_map(|other| other.publish.as_ref());
        if before.any(|other| overlap(other, publish)) {
            let address = std::net::SocketAddr::new(publish.bind, publish.port);
            p.add(format!("spec.ports[{i}].hostPort"), format!("{address} is published twice"));
        }
    }
}

/// An engine mounts one thing at a path, and nothing in the place of the image's root.
fn mounted_once(p: &mut Problems, from: &api::DeploymentSpec) {
    let model = matches!(from.source, Some(api::deployment_spec::Source::Model(_)));
    let mut taken = BTreeSet::new();
    for (i, mount) in from.mounts.iter().enumerate() {
        let path = format!("spec.mounts[{i}].target");
        let parts = mount.target.split('/').filter(|part| !part.is_empty() && *part != ".");
        let target = parts.fold(String::new(), |path, part| path + "/" + part);
        if target.is_empty() && mount.target.starts_with('/') {
            p.add(&path, "must be below /");
        }
        if model && target == ARTIFACT_TARGET {
            p.add(&path, format!("{ARTIFACT_TARGET} is where the model's files are"));
        }
        if !taken.insert(target) {
            p.add(&path, format!("\"{}\" is there twice", mount.target));
        }
    }
}

fn mounts(p: &mut Problems, from: &[api::Mount]) -> Vec<Mount> {
    count(p, "spec.mounts", from.len(), 32);
    let absolute = |path: &str| {
        path.starts_with('/') && !path.split('/').any(|part| part == "..") && !path.contains('\0')
    };
    for (i, mount) in from.iter().enumerate() {
        for (name, path) in [("source", &mount.source), ("target", &mount.target)] {
            if !absolute(path) {
                p.add(format!("spec.mounts[{i}].{name}"), "must be an absolute path without '..'");
            }
        }
    }
    from.iter()
        .map(|m| Mount { source: m.source.clone(), target: m.target.clone(), writable: m.writable })
        .collect()
}

fn health(p: &mut Problems, from: &api::HealthCheck, ports: &[Port]) -> Option<HealthCheck> {
    use api::health_check::Check;
    let known = |p: &mut Problems, port: &str| {
        if !ports.iter().any(|known| known.name == port) {
            let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
            p.add_hint(
                "spec.health",
                format!("names port \"{port}\", which is not among the ports"),
                format!("ports are: {}", names.join(", ")),
            );
        }
        port.to_owned()
    };
    let probe = match &from.check {
        Some(Check::Http(http)) => {
            if !http.path.starts_with('/') || http.path.contains(char::is_whitespace) {
                p.add("spec.health.http.path", "must begin with '/' and hold no blanks");
            }
            Probe::Http { path: http.path.clone(), port: known(p, &http.port) }
        }
        Some(Check::Tcp(tcp)) => Probe::Tcp { port: known(p, &tcp.port) },
        Some(Check::Grpc(grpc)) => {
            Probe::Grpc { port: known(p, &grpc.port), service: grpc.service.clone() }
        }
        Some(Check::Exec(exec)) => {
            if exec.command.is_empty() {
                p.add("spec.health.exec.command", "needs a program");
            }
            Probe::Exec { command: words(p, "spec.health.exec.command", &exec.command) }
        }
        None => {
            p.add("spec.health", "needs one of http, tcp, grpc and exec");
            return None;
        }
    };
    let interval_ms = time(p, "spec.health.interval", from.interval.as_ref(), 5_000, DAY_MS);
    let timeout_ms = time(p, "spec.health.timeout", from.timeout.as_ref(), 2_000, 3_600_000);
    if interval_ms < 100 {
        p.add("spec.health.interval", "must be at least 100ms");
    }
    if timeout_ms == 0 {
        p.add("spec.health.timeout", "must be greater than 0");
    }
    let failures = if from.failures == 0 { 3 } else { from.failures };
    bound(p, "spec.health.failures", failures.into(), 1, 1000);
    Some(HealthCheck {
        probe,
        interval_ms,
        timeout_ms,
        failures,
        startup_ms: time(p, "spec.health.startup", from.startup.as_ref(), 60_000, DAY_MS),
        restart_after_ms: from
            .restart_after
            .as_ref()
            .map(|d| time(p, "spec.health.restartAfter", Some(d), 0, DAY_MS)),
    })
}

fn placement(p: &mut Problems, from: Option<&api::Placement>) -> Placement {
    let Some(from) = from else { return Placement::default() };
    count(p, "spec.placement.require", from.require.len(), 32);
    let mut require = Vec::new();
    for (i, text) in from.require.iter().enumerate() {
        require.extend(p.take(format!("spec.placement.require[{i}]"), text.parse()));
    }
    if !from.spread.is_empty()
        && let Err(error) = crate::selector::check_key(&from.spread)
    {
        p.add("spec.placement.spread", error.to_string());
    }
    Placement { require, spread: (!from.spread.is_empty()).then(|| from.spread.clone()) }
}

fn restart(p: &mut Problems, from: Option<&api::RestartPolicy>) -> Restart {
    let from = from.cloned().unwrap_or_default();
    let condition = match from.condition() {
        api::RestartCondition::Unspecified | api::RestartCondition::Always => {
            RestartCondition::Always
        }
        api::RestartCondition::OnFailure => RestartCondition::OnFailure,
        api::RestartCondition::Never => RestartCondition::Never,
    };
    let min = time(p, "spec.restart.minBackoff", from.min_backoff.as_ref(), 1_000, DAY_MS);
    let max =
        time(p, "spec.restart.maxBackoff", from.max_backoff.as_ref(), 300_000.max(min), DAY_MS);
    if min < 100 {
        p.add("spec.restart.minBackoff", "must be at least 100ms");
    }
    if max < min {
        p.add("spec.restart.maxBackoff", "must not be shorter than minBackoff");
    }
    Restart { condition, min_backoff_ms: min, max_backoff_ms: max }
}

fn rollout(p: &mut Problems, from: Option<&api::RolloutPolicy>) -> Rollout {
    let from = from.cloned().unwrap_or_default();
    let max_surge = from.max_surge.unwrap_or(1);
    let max_unavailable = from.max_unavailable.unwrap_or(0);
    bound(p, "spec.rollout.maxSurge", max_surge.into(), 0, 100_000);
    bound(p, "spec.rollout.maxUnavailable", max_unavailable.into(), 0, 100_000);
    if max_surge == 0 && max_unavailable == 0 {
        p.add_hint(
            "spec.rollout",
            "maxSurge and maxUnavailable are both 0, so no rollout could ever take a step",
            "let one of them be at least 1",
        );
    }
    Rollout {
        max_surge,
        max_unavailable,
        ready_for_ms: time(p, "spec.rollout.readyFor", from.ready_for.as_ref(), 10_000, DAY_MS),
        progress_deadline_ms: time(
            p,
            "spec.rollout.progressDeadline",
            from.progress_deadline.as_ref(),
            600_000,
            YEAR_MS,
        ),
        on_failure: match from.on_failure() {
            api::RolloutFailureAction::Unspecified | api::RolloutFailureAction::Rollback => {
                OnRolloutFailure::Rollback
            }
            api::RolloutFailureAction::Pause => OnRolloutFailure::Pause,
        },
    }
}

fn host_loss(p: &mut Problems, from: Option<&api::HostLossPolicy>) -> OnHostLoss {
    let from = from.copied().unwrap_or_default();
    OnHostLoss {
        after_ms: time(p, "spec.onHostLoss.after", from.after.as_ref(), 300_000, YEAR_MS),
        action: match from.action() {
            api::HostLossAction::Unspecified | api::HostLossAction::Replace => {
                HostLossAction::Replace
            }
            api::HostLossAction::Keep => HostLossAction::Keep,
        },
    }
}

fn log(p: &mut Problems, from: Option<&api::LogOptions>) -> LogOptions {
    let from = from.copied().unwrap_or_default();
    let or = |value, default| if value == 0 { default } else { value };
    let log = LogOptions {
        max_size_bytes: or(from.max_size_bytes, 10_000_000),
        max_files: u32::try_from(or(from.max_files.into(), 3)).unwrap_or(3),
    };
    bound(p, "spec.log.maxFiles", log.max_files.into(), 1, 100);
    bound(p, "spec.log.maxSize", log.max_size_bytes, 4096, 100_000_000_000);
    log
}

fn privileges(p: &mut Problems, from: Option<&api::Privileges>) -> Privileges {
    let Some(from) = from else { return Privileges::default() };
    for (i, device) in from.devices.iter().enumerate() {
        if !device.starts_with("/dev/") || device.contains("..") {
            p.add(format!("spec.privileges.devices[{i}]"), "must be a path below /dev");
        }
    }
    Privileges {
        privileged: from.privileged,
        host_network: from.host_network,
        add_capabilities: from.add_capabilities.iter().cloned().collect(),
        devices: from.devices.iter().cloned().collect(),
    }
}

/// Writes a spec; reading it back gives the same value.
#[must_use]
pub fn deployment_spec_to_api(from: &DeploymentSpec) -> api::DeploymentSpec {
    api::DeploymentSpec {
        source: Some(match &from.source {
            Source::Model(text) => api::deployment_spec::Source::Model(text.clone()),
            Source::Image(text) => api::deployment_spec::Source::Image(text.clone()),
        }),
        runtime: from.runtime.clone().unwrap_or_default(),
        replicas: match from.scale {
            Scale::Replicas(n) => Some(n),
            Scale::Keep | Scale::EveryHost => None,
        },
        every_host: from.scale == Scale::EveryHost,
        placement: Some(api::Placement {
            require: from.placement.require.iter().map(ToString::to_string).collect(),
            spread: from.placement.spread.clone().unwrap_or_default(),
        }),
        resources: Some(resources_to_api(&from.resources)),
        ports: from
            .ports
            .iter()
            .map(|port| api::Port {
                name: port.name.clone(),
                container: port.container.into(),
                host_port: port.publish.as_ref().map_or(0, |p| p.port.into()),
                bind: port.publish.as_ref().map(|p| p.bind.to_string()).unwrap_or_default(),
            })
            .collect(),
        env: from.env.clone(),
        mounts: from
            .mounts
            .iter()
            .map(|m| api::Mount {
                source: m.source.clone(),
                target: m.target.clone(),
                writable: m.writable,
            })
            .collect(),
        health: from.health.as_ref().map(health_to_api),
        restart: Some(api::RestartPolicy {
            condition: match from.restart.condition {
                RestartCondition::Always => api::RestartCondition::Always,
                RestartCondition::OnFailure => api::RestartCondition::OnFailure,
                RestartCondition::Never => api::RestartCondition::Never,
            } as i32,
            min_backoff: Some(duration(from.restart.min_backoff_ms)),
            max_backoff: Some(duration(from.restart.max_backoff_ms)),
        }),
        rollout: Some(api::RolloutPolicy {
            max_surge: Some(from.rollout.max_surge),
            max_unavailable: Some(from.rollout.max_unavailable),
            ready_for: Some(duration(from.rollout.ready_for_ms)),
            progress_deadline: Some(duration(from.rollout.progress_deadline_ms)),
            on_failure: match from.rollout.on_failure {
                OnRolloutFailure::Rollback => api::RolloutFailureAction::Rollback,
                OnRolloutFailure::Pause => api::RolloutFailureAction::Pause,
            } as i32,
        }),
        on_host_loss: Some(api::HostLossPolicy {
            after: Some(duration(from.on_host_loss.after_ms)),
            action: match from.on_host_loss.action {
                HostLossAction::Replace => api::HostLossAction::Replace,
                HostLossAction::Keep => api::HostLossAction::Keep,
            } as i32,
        }),
        stop_grace: Some(duration(from.stop_grace_ms)),
        command: from.command.clone(),
        args: from.args.clone(),
        user: from.user.clone().unwrap_or_default(),
        read_only_root: from.read_only_root,
        served_model: from.served_model.clone().unwrap_or_default(),
        log: Some(api::LogOptions {
            max_size_bytes: from.log.max_size_bytes,
            max_files: from.log.max_files,
        }),
        privileges: Some(api::Privileges {
            privileged: from.privileges.privileged,
            host_network: from.privileges.host_network,
            add_capabilities: from.privileges.add_capabilities.iter().cloned().collect(),
            devices: from.privileges.devices.iter().cloned().collect(),
        }),
    }
}

fn health_to_api(from: &HealthCheck) -> api::HealthCheck {
    use api::health_check::Check;
    api::HealthCheck {
        check: Some(match &from.probe {
            Probe::Http { path, port } => {
                Check::Http(api::HttpCheck { path: path.clone(), port: port.clone() })
            }
            Probe::Tcp { port } => Check::Tcp(api::TcpCheck { port: port.clone() }),
            Probe::Grpc { port, service } => {
                Check::Grpc(api::GrpcCheck { port: port.clone(), service: service.clone() })
            }
            Probe::Exec { command } => Check::Exec(api::ExecCheck { command: command.clone() }),
        }),
        interval: Some(duration(from.interval_ms)),
        timeout: Some(duration(from.timeout_ms)),
        failures: from.failures,
        startup: Some(duration(from.startup_ms)),
        restart_after: from.restart_after_ms.map(duration),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> api::DeploymentSpec {
        api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Model("iris:1".into())),
            ..Default::default()
        }
    }

    #[test]
    fn defaults_are_filled_in_and_read_back() {
        let spec = deployment_spec_from_api(&model()).unwrap();
        assert_eq!(spec.scale, Scale::Keep);
        assert_eq!((spec.rollout.max_surge, spec.rollout.max_unavailable), (1, 0));
        assert_eq!(spec.restart.max_backoff_ms, 300_000);
        assert_eq!(spec.stop_grace_ms, 10_000);
        assert_eq!(deployment_spec_from_api(&deployment_spec_to_api(&spec)), Ok(spec));
    }

    #[test]
    fn every_problem_is_listed_at_once() {
        let spec = api::DeploymentSpec {
            source: None,
            replicas: Some(100_001),
            ports: vec![api::Port {
                name: "UP".into(),
                container: 0,
                host_port: 1,
                ..Default::default()
            }],
            rollout: Some(api::RolloutPolicy {
                max_surge: Some(0),
                max_unavailable: Some(0),
                ..Default::default()
            }),
            mounts: vec![api::Mount {
                source: "x".into(),
                target: "/a/../b".into(),
                writable: false,
            }],
            placement: Some(api::Placement { require: vec!["a b".into()], spread: String::new() }),
            ..Default::default()
        };
        let problems = deployment_spec_from_api(&spec).unwrap_err();
        let paths: Vec<&str> = problems.0.iter().map(|p| p.path.as_str()).collect();
        for path in [
            "spec",
            "spec.replicas",
            "spec.ports[0].name",
            "spec.ports[0].container",
            "spec.ports[0].bind",
            "spec.rollout",
            "spec.mounts[0].source",
            "spec.mounts[0].target",
            "spec.placement.require[0]",
        ] {
            assert!(paths.contains(&path), "{path} is not among {paths:?}");
        }
    }

    #[test]
    fn the_name_behind_the_gateway_is_one_segment_of_a_path() {
        let with = |name: &str| {
            let spec = api::DeploymentSpec { served_model: name.to_owned(), ..model() };
            deployment_spec_from_api(&spec).map(|spec| spec.served_model)
        };
        assert_eq!(with(""), Ok(None));
        for good in ["iris-sklearn", "Iris v2 (ä%?)", "...", &"ä".repeat(253)] {
            assert_eq!(with(good), Ok(Some(good.to_owned())), "{good}");
        }
        for bad in ["a/b", ".", "..", "a\nb", "\u{7f}", &"a".repeat(254)] {
            let problems = with(bad).unwrap_err();
            assert_eq!(problems.0[0].path, "spec.servedModel", "{bad}");
        }
    }

    #[test]
    fn less_than_an_engine_gives_is_refused_when_written_and_read_when_stored() {
        let with = |cpu_millis, memory_bytes| api::DeploymentSpec {
            resources: Some(api::Resources { cpu_millis, memory_bytes, gpu_memory_bytes: 0 }),
            ..model()
        };
        let little = with(MIN_CPU_MILLIS - 1, MIN_MEMORY_BYTES - 1);
        let problems = deployment_spec_to_write(&little).unwrap_err();
        assert_eq!(
            problems.to_string().lines().collect::<Vec<_>>(),
            [
                "spec.resources.cpu: must be at least 10m (engines give no smaller share; left out, \
                 nothing is reserved and nothing limited)",
                "spec.resources.memory: must be at least 6MiB (engines start no container with less; \
                 left out, nothing is reserved and nothing limited)",
            ]
        );
        // What an earlier server took must not keep this one from starting.
        assert!(deployment_spec_from_api(&little).is_ok());
        for enough in [with(0, 0), with(MIN_CPU_MILLIS, MIN_MEMORY_BYTES)] {
            assert_eq!(deployment_spec_to_write(&enough), deployment_spec_from_api(&enough));
        }
    }

    /// What is refused when it is written, by path, though it is read when it is stored.
    fn refused(spec: &api::DeploymentSpec) -> Vec<String> {
        assert!(deployment_spec_from_api(spec).is_ok(), "an earlier server took it");
        let problems = deployment_spec_to_write(spec).err().unwrap_or_default();
        problems.0.into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn a_deadline_that_ends_before_any_replica_can_be_healthy_is_refused() {
        let with = |ready_for: Option<u64>, deadline: Option<u64>| api::DeploymentSpec {
            rollout: Some(api::RolloutPolicy {
                ready_for: ready_for.map(duration),
                progress_deadline: deadline.map(duration),
                ..Default::default()
            }),
            ..model()
        };
        for (ready_for, deadline) in [
            (Some(5_000), Some(5_000)),
            (Some(0), Some(0)),
            (None, Some(10_000)),
            (Some(600_000), None),
        ] {
            let paths = refused(&with(ready_for, deadline));
            assert_eq!(paths, ["spec.rollout.progressDeadline"], "{ready_for:?} {deadline:?}");
        }
        for (ready_for, deadline) in
            [(None, None), (Some(0), Some(1)), (Some(5_000), Some(5_001)), (None, Some(11_000))]
        {
            let paths = refused(&with(ready_for, deadline));
            assert!(paths.is_empty(), "{ready_for:?} {deadline:?}: {paths:?}");
        }
    }

    #[test]
    fn an_address_of_the_host_is_published_once() {
        let with = |binds: [(&str, u32); 2]| api::DeploymentSpec {
            ports: binds
                .iter()
                .zip(["a", "b"])
                .zip(1..)
                .map(|(((bind, host_port), name), container)| api::Port {
                    name: name.into(),
                    container,
                    host_port: *host_port,
                    bind: (*bind).into(),
                })
                .collect(),
            ..model()
        };
        for same in [
            [("127.0.0.1", 80), ("127.0.0.1", 80)],
            [("127.0.0.1", 80), ("0.0.0.0", 80)],
            [("::", 80), ("::1", 80)],
        ] {
            assert_eq!(refused(&with(same)), ["spec.ports[1].hostPort"], "{same:?}");
        }
        for apart in [
            [("127.0.0.1", 80), ("127.0.0.1", 81)],
            [("127.0.0.1", 80), ("10.0.0.1", 80)],
            [("0.0.0.0", 80), ("::", 80)],
        ] {
            assert!(refused(&with(apart)).is_empty(), "{apart:?}");
        }
    }

    #[test]
    fn a_path_is_mounted_once_and_neither_the_root_nor_the_models() {
        let with = |targets: &[&str]| api::DeploymentSpec {
            mounts: targets
                .iter()
                .map(|target| api::Mount {
                    source: "/srv".into(),
                    target: (*target).into(),
                    writable: false,
                })
                .collect(),
            ..model()
        };
        for (targets, index) in [
            (&["/data", "/data"][..], 1),
            (&["/data", "/./data//"], 1),
            (&["/"], 0),
            (&["//."], 0),
            (&["/model/"], 0),
        ] {
            let paths = refused(&with(targets));
            assert_eq!(paths, [format!("spec.mounts[{index}].target")], "{targets:?}");
        }
        assert!(refused(&with(&["/data", "/data/in", "/models", "/model/extra"])).is_empty());
        let image = api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("app:1".into())),
            ..with(&["/model"])
        };
        assert!(refused(&image).is_empty(), "an image has no files of ours there");
    }

    #[test]
    fn a_health_check_must_name_a_port_there_is() {
        let mut spec = model();
        spec.health = Some(api::HealthCheck {
            check: Some(api::health_check::Check::Tcp(api::TcpCheck { port: "http".into() })),
            ..Default::default()
        });
        assert!(deployment_spec_from_api(&spec).is_err());
        spec.ports = vec![api::Port { name: "http".into(), container: 80, ..Default::default() }];
        let read = deployment_spec_from_api(&spec).unwrap();
        assert_eq!(deployment_spec_from_api(&deployment_spec_to_api(&read)), Ok(read));
    }
}
