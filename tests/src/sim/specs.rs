//! A script's deployments and machines in the words of the API.

use super::script::{Again, Machine, Program, Spec};
use berth_agent_core::transfer::{Blob, CHUNK_BYTES};
use berth_proto::api;
use berth_proto::convert::duration;
use berth_proto::ids::Digest;
use berth_proto::values::{PlatformImage, ResolvedArtifact, ResolvedImage, ResolvedSource};
use berth_server_core::decide::Wanted;
use std::collections::BTreeMap;
use std::sync::LazyLock;

const PROGRAMS: [(Program, &str); 5] = [
    (Program::Good, "good"),
    (Program::Slow, "slow"),
    (Program::Deaf, "deaf"),
    (Program::Crashes, "crashes"),
    (Program::NoImage, "no-image"),
];

/// Time a slow program needs until it serves.
pub(super) const SLOW_MS: u64 = 3_000;
/// Time after which a program that crashes does.
pub(super) const CRASH_MS: u64 = 300;
/// The longest wait before a program that ended is started again.
pub(super) const MAX_BACKOFF_MS: u64 = 20_000;
/// Largest number of versions of a program.
pub(super) const VERSIONS: u8 = 4;

fn image(program: Program, version: u8) -> Digest {
    let name = PROGRAMS.iter().find(|(of, _)| *of == program).map_or("", |(_, name)| name);
    Digest::of(format!("{name}/{version}").as_bytes())
}

/// The port that is published where one is.
pub(super) const HOST_PORT: u32 = 8_000;

fn blob(name: &str, size_bytes: u64) -> Blob {
    Blob { digest: Digest::of(name.as_bytes()), size_bytes }
}

/// What images and models are made of.
static BLOBS: LazyLock<BTreeMap<Digest, Vec<Blob>>> = LazyLock::new(|| {
    let layers = [3 << 20, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1, 3 * CHUNK_BYTES + (1 << 20)];
    let images = PROGRAMS.iter().flat_map(|(program, name)| {
        layers.iter().zip(0..VERSIONS).map(move |(size, version)| {
            let layer = blob(&format!("{name}/{version}/layer"), *size);
            (
                image(*program, version),
                vec![blob(&format!("{name}/{version}/config"), 2_000), layer],
            )
        })
    });
    // All models have one file in common; one has an empty file, one has many.
    let models = (0..VERSIONS).map(|version| {
        let mut files = vec![blob("model/words", CHUNK_BYTES + 100)];
        match version {
            2 => files.push(blob("model/empty", 0)),
            3 => files.extend((0..6).map(|n| blob(&format!("model/{n}"), 1_900_000))),
            _ => {}
        }
        let weights = blob(&format!("model/weights/{version}"), u64::from(version + 1) * 5_000_000);
        files.push(weights);
        (model(version), files)
    });
    images.chain(models).collect()
});

/// The blobs of an image.
pub(super) fn image_blobs(image: &Digest) -> &'static [Blob] {
    BLOBS.get(image).map_or(&[], Vec::as_slice)
}

/// The blobs of a model.
pub(super) fn model_blobs(model: &Digest) -> &'static [Blob] {
    BLOBS.get(model).map_or(&[], Vec::as_slice)
}

fn model(version: u8) -> Digest {
    Digest::of(&[version])
}

/// Every image there is, and how its program behaves.
pub(super) fn programs() -> BTreeMap<Digest, Program> {
    let all = PROGRAMS.iter().flat_map(|(program, _)| (0..VERSIONS).map(move |v| (*program, v)));
    all.map(|(program, version)| (image(program, version), program)).collect()
}

/// A deployment as the API gets it, everything pinned.
pub(super) fn wanted(deployment: u8, spec: &Spec) -> Wanted {
    let digest = image(spec.program, spec.version);
    let check = api::HealthCheck {
        check: Some(api::health_check::Check::Tcp(api::TcpCheck { port: "http".into() })),
        interval: Some(duration(5_000)),
        timeout: Some(duration(1_000)),
        failures: 2,
        startup: Some(duration(if spec.version == 1 { 60_000 } else { 10_000 })),
        restart_after: (spec.version == 3).then(|| duration(20_000)),
    };
    let host_port = if spec.host_port { HOST_PORT } else { 0 };
    let bind = if spec.host_port { "0.0.0.0".to_owned() } else { String::new() };
    let port = api::Port { name: "http".into(), container: 80, host_port, bind };
    let written = api::DeploymentSpec {
        source: Some(api::deployment_spec::Source::Image(format!("image-{}", digest.short()))),
        replicas: spec.replicas,
        every_host: spec.replicas.is_none(),
        placement: Some(api::Placement {
            require: spec.zone.map(|zone| format!("zone=z{zone}")).into_iter().collect(),
            spread: if spec.spread { "zone".into() } else { String::new() },
        }),
        resources: Some(api::Resources {
            memory_bytes: spec.memory_mib << 20,
            cpu_millis: spec.cpu_millis,
            gpu_memory_bytes: if spec.gpu { 3 << 30 } else { 0 },
        }),
        ports: vec![port],
        health: spec.checked.then_some(check),
        restart: Some(api::RestartPolicy {
            condition: match spec.again {
                Again::Always => api::RestartCondition::Always as i32,
                Again::OnFailure => api::RestartCondition::OnFailure as i32,
                Again::Never => api::RestartCondition::Never as i32,
            },
            min_backoff: Some(duration(1_000)),
            max_backoff: Some(duration(MAX_BACKOFF_MS)),
        }),
        rollout: Some(api::RolloutPolicy {
            max_surge: Some(spec.surge),
            max_unavailable: Some(spec.unavailable),
            ready_for: Some(duration(spec.ready_for_ms)),
            progress_deadline: Some(duration(spec.deadline_ms)),
            on_failure: if spec.pause {
                api::RolloutFailureAction::Pause as i32
            } else {
                api::RolloutFailureAction::Rollback as i32
            },
        }),
        on_host_loss: Some(api::HostLossPolicy {
            after: Some(duration(spec.lost_after_ms)),
            action: if spec.keep_lost {
                api::HostLossAction::Keep as i32
            } else {
                api::HostLossAction::Replace as i32
            },
        }),
        stop_grace: Some(duration(2_000)),
        ..Default::default()
    };
    let artifact = spec.artifact.then(|| ResolvedArtifact {
        repository: "models/m".into(),
        digest: model(spec.version),
        size_bytes: 1,
        model: "m".into(),
        version: spec.version.to_string(),
        format: "onnx".into(),
    });
    Wanted {
        #[expect(clippy::expect_used, reason = "a letter and a number are a name")]
        name: format!("d{deployment}").parse().expect("a name"),
        namespace: Default::default(),
        labels: BTreeMap::new(),
        spec: written,
        resolved_words: digest.to_string(),
        resolved: ResolvedSource {
            image: ResolvedImage {
                registry: String::new(),
                repository: "r".into(),
                digest: digest.clone(),
                platforms: vec![PlatformImage {
                    arch: "amd64".into(),
                    os: "linux".into(),
                    manifest_digest: digest.clone(),
                    config_digest: digest,
                    size_bytes: 1,
                }],
            },
            model_version: artifact.as_ref().map(|artifact| artifact.version.clone()),
            artifact,
        },
    }
}

/// What a machine's agent reports of it.
pub(super) fn facts(machine: &Machine) -> api::HostFacts {
    let features = if machine.old { Vec::new() } else { vec!["artifact".to_owned()] };
    api::HostFacts {
        arch: if machine.foreign { "arm64" } else { "amd64" }.into(),
        os: "linux".into(),
        engine_available: true,
        container_network_reachable: true,
        features,
        capacity: Some(api::Resources {
            cpu_millis: 4_000,
            memory_bytes: machine.memory_mib << 20,
            gpu_memory_bytes: if machine.gpu { 8 << 30 } else { 0 },
        }),
        policy: Some(api::HostPolicy::default()),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::{Action, Script};
    use super::*;

    #[test]
    fn whatever_is_drawn_is_something_the_api_takes() {
        let mut specs = 0;
        for seed in 0..3_000 {
            for (_, action) in Script::of(seed).actions {
                let Action::Apply { deployment, spec } = action else { continue };
                let read =
                    berth_proto::convert::deployment_spec_from_api(&wanted(deployment, &spec).spec);
                assert!(read.is_ok(), "{spec}: {read:?}");
                specs += 1;
            }
        }
        assert!(specs > 5_000);
    }
}
