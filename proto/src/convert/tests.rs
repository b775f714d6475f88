//! Every conversion: a value within its bounds is told and read as the same, and what was read of any
//! message is told so that it is read as the same.

use super::*;
use crate::ids::{Digest, ReleaseNumber};
use crate::values::*;
use crate::{agent, api};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use prost::Message as _;
use std::net::IpAddr;

const DAY_MS: u64 = 86_400_000;
const YEAR_MS: u64 = 365 * DAY_MS;

/// Words without NUL.
fn word() -> &'static str {
    "[^\\x00]{0,12}"
}

fn some_word() -> &'static str {
    "[^\\x00]{1,12}"
}

fn name() -> &'static str {
    "[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?"
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<u64>().prop_map(|n| Digest::of(&n.to_le_bytes()))
}

/// What a timestamp of the wire can tell.
fn moment() -> impl Strategy<Value = Wall> {
    prop_oneof![9 => any::<i64>(), 1 => Just(i64::MIN), 1 => Just(i64::MAX)].prop_map(Wall)
}

fn resources() -> impl Strategy<Value = Resources> {
    any::<[u64; 3]>().prop_map(|[cpu_millis, memory_bytes, gpu_memory_bytes]| Resources {
        cpu_millis,
        memory_bytes,
        gpu_memory_bytes,
    })
}

fn policy() -> impl Strategy<Value = HostPolicy> {
    let sets = (btree_set(word(), 0..3), btree_set(word(), 0..3), btree_set(any::<IpAddr>(), 0..3));
    (vec(word(), 0..3), any::<[bool; 5]>(), sets).prop_map(|(mount_folders, flags, sets)| {
        HostPolicy {
            mount_folders,
            allow_privileged: flags[0],
            allow_host_network: flags[1],
            allow_capabilities: sets.0,
            allow_devices: sets.1,
            forbid_exec: flags[2],
            publish_addresses: sets.2,
            allow_container_traffic: flags[3],
            forbid_publish: flags[4],
        }
    })
}

fn facts() -> impl Strategy<Value = HostFacts> {
    let words = [word(), word(), word(), word(), word()];
    let sets =
        (btree_map(word(), word(), 0..3), btree_set(word(), 0..3), btree_set(any::<u16>(), 0..5));
    (words, resources(), policy(), sets, any::<[bool; 2]>(), any::<u64>()).prop_map(
        |(words, capacity, policy, (labels, features, used_ports), flags, disk_free_bytes)| {
            let [arch, os, engine, agent_version, kernel] = words;
            HostFacts {
                arch,
                os,
                capacity,
                labels,
                engine,
                engine_available: flags[0],
                agent_version,
                features,
                policy,
                disk_free_bytes,
                kernel,
                container_network_reachable: flags[1],
                used_ports,
            }
        },
    )
}

fn phase() -> impl Strategy<Value = Phase> {
    prop::sample::select(vec![
        Phase::Accepted,
        Phase::Fetching,
        Phase::Creating,
        Phase::Starting,
        Phase::Running,
        Phase::Exited,
        Phase::Removed,
    ])
}

fn exit() -> impl Strategy<Value = Exit> {
    (any::<(u32, i32, bool)>(), moment(), any::<String>()).prop_map(
        |((attempt, code, out_of_memory), time, wrote)| Exit {
            attempt,
            code,
            out_of_memory,
            time,
            // Whatever a program writes: what is told of it is read back as it is told.
            last_line: last_line(&wrote),
        },
    )
}

fn progress() -> impl Strategy<Value = Progress> {
    (any::<[u64; 4]>(), any::<[u32; 2]>(), word()).prop_map(|(bytes, parts, what)| Progress {
        done_bytes: bytes[0],
        total_bytes: bytes[1],
        rate_bytes_per_second: bytes[2],
        time_left_ms: bytes[3],
        what,
        part: parts[0],
        parts: parts[1],
    })
}

fn status() -> impl Strategy<Value = ReplicaStatus> {
    let times = [option::of(moment()), option::of(moment())];
    let parts = (option::of(phase()), option::of(progress()), option::of(exit()));
    (any::<(u32, bool)>(), parts, times, [word(), word(), word()]).prop_map(
        |((attempt, ready), (phase, progress, last_exit), times, words)| {
            let [start_time, next_attempt_time] = times;
            let [reason, message, container_id] = words;
            ReplicaStatus {
                attempt,
                phase,
                ready,
                reason,
                message,
                progress,
                last_exit,
                start_time,
                next_attempt_time,
                container_id,
            }
        },
    )
}

fn platform() -> impl Strategy<Value = PlatformImage> {
    (word(), word(), digest(), digest(), any::<u64>()).prop_map(
        |(arch, os, manifest_digest, config_digest, size_bytes)| PlatformImage {
            arch,
            os,
            manifest_digest,
            config_digest,
            size_bytes,
        },
    )
}

fn artifact() -> impl Strategy<Value = ResolvedArtifact> {
    ([word(), some_word(), word(), word()], digest(), any::<u64>()).prop_map(
        |([model, version, repository, format], digest, size_bytes)| ResolvedArtifact {
            model,
            version,
            repository,
            digest,
            size_bytes,
            format,
        },
    )
}

fn pins() -> impl Strategy<Value = ResolvedSource> {
    let image = (word(), word(), digest(), vec(platform(), 0..3)).prop_map(
        |(registry, repository, digest, platforms)| ResolvedImage {
            registry,
            repository,
            digest,
            platforms,
        },
    );
    (image, option::of(artifact()), option::of(some_word())).prop_map(
        |(image, artifact, version)| {
            // A release with an artifact has a version.
            let of_artifact = || artifact.as_ref().map(|artifact| artifact.version.clone());
            let model_version = version.or_else(of_artifact);
            ResolvedSource { image, artifact, model_version }
        },
    )
}

fn requirement() -> impl Strategy<Value = Requirement> {
    let (key, value) = ("[a-zA-Z0-9/][a-zA-Z0-9._/-]{0,9}", "[a-zA-Z0-9._-]{1,9}");
    (key, value, btree_set(value, 1..4), 0..6).prop_map(|(key, value, values, kind)| match kind {
        0 => Requirement::Equals(key, value),
        1 => Requirement::NotEquals(key, value),
        2 => Requirement::In(key, values),
        3 => Requirement::NotIn(key, values),
        4 => Requirement::Exists(key),
        _ => Requirement::Absent(key),
    })
}

fn placement() -> impl Strategy<Value = Placement> {
    (vec(requirement(), 0..4), option::of("[a-z]{1,9}"))
        .prop_map(|(require, spread)| Placement { require, spread })
}

/// Names and numbers are there once each.
fn ports() -> impl Strategy<Value = Vec<Port>> {
    let publish = (any::<IpAddr>(), 1_u16..).prop_map(|(bind, port)| Publish { bind, port });
    btree_map(name(), (1_u16.., option::of(publish)), 0..4).prop_map(|ports| {
        let mut numbers = std::collections::BTreeSet::new();
        let port = |(name, (container, publish))| Port { name, container, publish };
        ports.into_iter().map(port).filter(|port| numbers.insert(port.container)).collect()
    })
}

fn probe(ports: &[Port]) -> BoxedStrategy<Probe> {
    let exec = vec(word(), 1..4).prop_map(|command| Probe::Exec { command });
    if ports.is_empty() {
        return exec.boxed();
    }
    let names: Vec<String> = ports.iter().map(|port| port.name.clone()).collect();
    let port = prop::sample::select(names);
    prop_oneof![
        ("/[a-z/]{0,9}", port.clone()).prop_map(|(path, port)| Probe::Http { path, port }),
        port.clone().prop_map(|port| Probe::Tcp { port }),
        (port, word()).prop_map(|(port, service)| Probe::Grpc { port, service }),
        exec,
    ]
    .boxed()
}

fn health(ports: &[Port]) -> impl Strategy<Value = HealthCheck> + use<> {
    let times = (100..=DAY_MS, 1_u64..=3_600_000, 0..=DAY_MS, option::of(0..=DAY_MS));
    (probe(ports), times, 1_u32..=1_000).prop_map(|(probe, times, failures)| HealthCheck {
        probe,
        interval_ms: times.0,
        timeout_ms: times.1,
        failures,
        startup_ms: times.2,
        restart_after_ms: times.3,
    })
}

fn restart() -> impl Strategy<Value = Restart> {
    let all = vec![RestartCondition::Always, RestartCondition::OnFailure, RestartCondition::Never];
    (prop::sample::select(all), 100..=DAY_MS, 100..=DAY_MS).prop_map(|(condition, a, b)| Restart {
        condition,
        min_backoff_ms: a.min(b),
        max_backoff_ms: a.max(b),
    })
}

fn rollout() -> impl Strategy<Value = Rollout> {
    let all = vec![OnRolloutFailure::Rollback, OnRolloutFailure::Pause];
    let bounds = (0_u32..=100_000, 0_u32..=100_000).prop_filter("no step", |b| b.0 + b.1 > 0);
    (bounds, 0..=DAY_MS, 0..=YEAR_MS, prop::sample::select(all)).prop_map(
        |((max_surge, max_unavailable), ready_for_ms, progress_deadline_ms, on_failure)| Rollout {
            max_surge,
            max_unavailable,
            ready_for_ms,
            progress_deadline_ms,
            on_failure,
        },
    )
}

fn privileges() -> impl Strategy<Value = Privileges> {
    (any::<[bool; 2]>(), btree_set(word(), 0..3), btree_set("/dev/[a-z0-9]{1,6}", 0..3)).prop_map(
        |([privileged, host_network], add_capabilities, devices)| Privileges {
            privileged,
            host_network,
            add_capabilities,
            devices,
        },
    )
}

fn mount() -> impl Strategy<Value = Mount> {
    ("/[a-z/]{0,9}", "/[a-z/]{0,9}", any::<bool>()).prop_map(|(source, target, writable)| Mount {
        source,
        target,
        writable,
    })
}

fn scale() -> impl Strategy<Value = Scale> {
    prop_oneof![
        Just(Scale::Keep),
        (0_u32..=100_000).prop_map(Scale::Replicas),
        Just(Scale::EveryHost)
    ]
}

fn spec() -> impl Strategy<Value = DeploymentSpec> {
    let source =
        prop_oneof![some_word().prop_map(Source::Model), some_word().prop_map(Source::Image)];
    let words = (option::of(some_word()), option::of("[a-z]{1,9}"), option::of(some_word()));
    let listening = ports().prop_flat_map(|ports| {
        let health = option::of(health(&ports));
        (Just(ports), health)
    });
    let loss = prop::sample::select(vec![HostLossAction::Replace, HostLossAction::Keep]);
    let loss = (0..=YEAR_MS, loss).prop_map(|(after_ms, action)| OnHostLoss { after_ms, action });
    let log = (4_096..=100_000_000_000_u64, 1_u32..=100)
        .prop_map(|(max_size_bytes, max_files)| LogOptions { max_size_bytes, max_files });
    let env = btree_map("[A-Z][A-Z0-9_]{0,7}", word(), 0..4);
    let command = (vec(word(), 0..3), vec(word(), 0..3), vec(mount(), 0..3), env);
    let policies = (placement(), restart(), rollout(), loss, log, privileges());
    (
        (source, words, scale(), resources()),
        listening,
        policies,
        command,
        (any::<bool>(), 0_u64..=3_600_000),
    )
        .prop_map(
            |(
                (source, (runtime, served_model, user), scale, resources),
                (ports, health),
                (placement, restart, rollout, on_host_loss, log, privileges),
                (command, args, mounts, env),
                (read_only_root, stop_grace_ms),
            )| DeploymentSpec {
                source,
                runtime,
                served_model,
                scale,
                placement,
                resources,
                ports,
                env,
                mounts,
                health,
                restart,
                rollout,
                on_host_loss,
                stop_grace_ms,
                command,
                args,
                user,
                read_only_root,
                log,
                privileges,
            },
        )
}

fn body() -> impl Strategy<Value = AssignmentBody> {
    let env = btree_map("[A-Z]{1,8}", word(), 0..4);
    let rest = (btree_set(word(), 0..3), env, option::of("/[a-z]{1,9}"), any::<u64>());
    ([name(), name(), name()], pins(), spec(), rest).prop_map(
        |([uid, deployment, namespace], source, spec, rest)| AssignmentBody {
            deployment_uid: uid.parse().unwrap(),
            deployment: deployment.parse().unwrap(),
            namespace: namespace.parse().unwrap(),
            release: ReleaseNumber(rest.3),
            requires: rest.0,
            source,
            spec,
            system_env: rest.1,
            artifact_target: rest.2,
        },
    )
}

proptest! {
    #[test]
    fn a_moment_is_told_to_the_millisecond(time in moment()) {
        prop_assert_eq!(wall(&timestamp(time)), time);
    }

    #[test]
    fn any_moment_of_the_wire_is_read_and_told_as_it_was_read(seconds: i64, nanos: i32) {
        let read = wall(&prost_types::Timestamp { seconds, nanos });
        prop_assert_eq!(wall(&timestamp(read)), read);
    }

    #[test]
    fn a_time_is_told_to_the_millisecond(ms: u64) {
        prop_assert_eq!(duration_ms(&duration(ms)), Some(ms));
    }

    #[test]
    fn any_time_of_the_wire_is_none_or_told_as_it_was_read(seconds: i64, nanos: i32) {
        let read = duration_ms(&prost_types::Duration { seconds, nanos });
        prop_assert_eq!(read.is_none(), read.and_then(|ms| duration_ms(&duration(ms))).is_none());
        if let Some(ms) = read {
            prop_assert_eq!(duration_ms(&duration(ms)), Some(ms));
        }
    }

    #[test]
    fn amounts_read_back(value in resources()) {
        prop_assert_eq!(resources_from_api(Some(&resources_to_api(&value))), value);
    }

    #[test]
    fn facts_read_back(value in facts()) {
        prop_assert_eq!(host_facts_from_api(&host_facts_to_api(&value)), value);
    }

    #[test]
    fn phases_read_back(value in phase()) {
        prop_assert_eq!(status::phase_from_api(value.into()), Some(value));
    }

    #[test]
    fn exits_read_back(value in exit()) {
        prop_assert_eq!(exit_from_api(&exit_to_api(&value)), value);
    }

    #[test]
    fn statuses_read_back(value in status()) {
        prop_assert_eq!(replica_status_from_api(&replica_status_to_api(&value)), value);
    }

    #[test]
    fn pins_read_back(value in pins()) {
        prop_assert_eq!(resolved_from_api(&resolved_to_api(&value)), Ok(value));
    }

    #[test]
    fn specs_read_back(value in spec()) {
        prop_assert_eq!(deployment_spec_from_api(&deployment_spec_to_api(&value)), Ok(value));
    }

    /// All of a spec but what only the server needs, which its defaults stand for.
    #[test]
    fn bodies_read_back(value in body()) {
        let told = assignment_body_to_agent(&value).encode_to_vec();
        let read = assignment_body_from_bytes(&told).unwrap();
        let plain = api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".to_owned())),
            ..Default::default()
        };
        let plain = deployment_spec_from_api(&plain).unwrap();
        let rollout = Rollout { ready_for_ms: value.spec.rollout.ready_for_ms, ..plain.rollout };
        let spec = DeploymentSpec {
            scale: plain.scale,
            placement: plain.placement,
            rollout,
            ..value.spec.clone()
        };
        prop_assert_eq!(&read, &AssignmentBody { spec, ..value });
        // What an agent has read is told and read as the same.
        let again: agent::AssignmentBody = assignment_body_to_agent(&read);
        prop_assert_eq!(assignment_body_from_bytes(&again.encode_to_vec()), Ok(read));
    }

    /// What is taken as somebody writes it is what is stored.
    #[test]
    fn a_spec_that_is_taken_when_written_is_read_as_the_same(value in spec()) {
        let told = deployment_spec_to_api(&value);
        if let Ok(written) = deployment_spec_to_write(&told) {
            prop_assert_eq!(written, value);
        }
    }

    /// Bytes that break off or are changed anywhere are refused, or read as what reads back.
    #[test]
    fn a_damaged_body_is_refused_or_reads_back(value in body(), at: usize, byte: u8) {
        let mut bytes = assignment_body_to_agent(&value).encode_to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        for bytes in [&bytes[..], &bytes[..at]] {
            if let Ok(read) = assignment_body_from_bytes(bytes) {
                let told = assignment_body_to_agent(&read).encode_to_vec();
                prop_assert_eq!(assignment_body_from_bytes(&told), Ok(read));
            }
        }
    }
}
