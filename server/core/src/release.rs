//! Making releases.
//!
//! The assignment's body is encoded here, once in a release's life. Those bytes are stored, sent,
//! hashed and kept by agents verbatim; nothing encodes them again.

use crate::objects::{BadRecord, Deployment, Release};
use berth_proto::api::{DeploymentSpec as WrittenSpec, ReleaseState};
use berth_proto::convert;
use berth_proto::ids::{Digest, ReleaseNumber, Wall};
use berth_proto::record::ReleaseRecord;
use berth_proto::values::{
    ARTIFACT_TARGET, AssignmentBody, DeploymentSpec, HealthCheck, Port, Probe, ResolvedSource,
    Source,
};
use prost::Message as _;
use std::collections::{BTreeMap, BTreeSet};

/// The agent fetches artifacts itself and mounts them.
pub const FEATURE_ARTIFACT: &str = "artifact";
/// Features an agent of this version knows.
pub const FEATURES: [&str; 1] = [FEATURE_ARTIFACT];

/// Port of a runtime when the deployment names none.
pub const DEFAULT_PORT: u16 = 8080;

/// What makes a release.
#[derive(Debug, Clone)]
pub struct Draft<'a> {
    /// The deployment, with its spec.
    pub deployment: &'a Deployment,
    /// Its number.
    pub number: ReleaseNumber,
    /// What its source was resolved to.
    pub source: ResolvedSource,
    /// Who makes it.
    pub actor: &'a str,
    /// Why.
    pub cause: &'a str,
    /// When.
    pub now: Wall,
    /// The release whose spec is taken again; 0: none.
    pub copied_from: ReleaseNumber,
}

/// Features a release needs of an agent.
#[must_use]
pub fn requires(release: &Release) -> Vec<String> {
    required(&release.source).into_iter().collect()
}

fn required(source: &ResolvedSource) -> BTreeSet<String> {
    source.artifact.iter().map(|_| FEATURE_ARTIFACT.to_owned()).collect()
}

/// The spec with what a model's runtime needs filled in: a port, and the Open Inference Protocol's
/// ready check.
#[must_use]
pub fn with_model_defaults(spec: &DeploymentSpec) -> DeploymentSpec {
    let mut spec = spec.clone();
    if matches!(spec.source, Source::Image(_)) {
        return spec;
    }
    if spec.ports.is_empty() {
        spec.ports.push(Port { name: "http".to_owned(), container: DEFAULT_PORT, publish: None });
    }
    if spec.health.is_none() {
        let port = spec.ports.iter().find(|p| p.name == "http").or(spec.ports.first());
        spec.health = port.map(|port| HealthCheck {
            probe: Probe::Http { path: "/v2/health/ready".to_owned(), port: port.name.clone() },
            interval_ms: 5_000,
            timeout_ms: 2_000,
            failures: 3,
            startup_ms: 60_000,
            restart_after_ms: None,
        });
    }
    spec
}

/// What a release's source was resolved to, in words, as they are told when it is applied.
#[must_use]
pub fn source_words(release: &Release) -> String {
    let source = &release.source;
    let (image, version) = (&source.image, &source.model_version);
    match (&source.artifact, version, &release.spec.source) {
        (Some(artifact), _, _) => {
            format!("{}:{}@{}", artifact.model, artifact.version, artifact.digest)
        }
        (None, Some(version), Source::Model(reference)) => {
            let name = reference.split(['@', ':']).next().unwrap_or_default();
            format!("{name}:{version}@{}", image.digest)
        }
        (None, Some(_) | None, Source::Image(_) | Source::Model(_)) => {
            format!("{}@{}", image.repository, image.digest)
        }
    }
}

/// A spec with everything filled in that it leaves out: two that mean the same are equal.
#[must_use]
pub fn filled_in(spec: &DeploymentSpec) -> WrittenSpec {
    convert::deployment_spec_to_api(&with_model_defaults(spec))
}

/// Makes a release.
///
/// # Errors
/// When what it was made of is out of bounds.
pub fn draft(draft: &Draft<'_>) -> Result<Release, BadRecord> {
    let deployment = draft.deployment;
    let spec = with_model_defaults(&deployment.spec);
    let mut system_env = BTreeMap::from([
        ("BERTH_DEPLOYMENT".to_owned(), deployment.name.to_string()),
        ("BERTH_NAMESPACE".to_owned(), deployment.namespace.to_string()),
        ("BERTH_RELEASE".to_owned(), draft.number.to_string()),
    ]);
    // Also of a version that is an image: what is in it may want to tell its version.
    if let Some(version) = &draft.source.model_version {
        let name = spec.served_model.clone().unwrap_or_else(|| deployment.name.to_string());
        system_env.insert("BERTH_MODEL_NAME".to_owned(), name);
        system_env.insert("BERTH_MODEL_VERSION".to_owned(), version.clone());
    }
    if draft.source.artifact.is_some() {
        system_env.insert("BERTH_MODEL_DIR".to_owned(), ARTIFACT_TARGET.to_owned());
    }
    let body = AssignmentBody {
        deployment_uid: deployment.uid.clone(),
        deployment: deployment.name.clone(),
        namespace: deployment.namespace.clone(),
        release: draft.number,
        requires: required(&draft.source),
        source: draft.source.clone(),
        spec: spec.clone(),
        system_env,
        artifact_target: draft.source.artifact.as_ref().map(|_| ARTIFACT_TARGET.to_owned()),
    };
    let bytes = convert::assignment_body_to_agent(&body).encode_to_vec();
    Release::new(ReleaseRecord {
        deployment_uid: deployment.uid.to_string(),
        number: draft.number.0,
        body_digest: Digest::of(&bytes).to_string(),
        body: bytes,
        spec: Some(filled_in(&deployment.spec)),
        source: Some(convert::resolved_to_api(&draft.source)),
        create_unix_ms: draft.now.0,
        created_by: draft.actor.to_owned(),
        cause: draft.cause.to_owned(),
        state: ReleaseState::Rolling as i32,
        copied_from: draft.copied_from.0,
    })
}

/// Whether a change from one spec to another needs other containers. Numbers, placement and bounds of
/// rollouts are the server's own and change nothing that runs.
#[must_use]
pub fn needs_release(before: &DeploymentSpec, after: &DeploymentSpec) -> bool {
    let neutral = |spec: &DeploymentSpec| {
        let mut spec = filled_in(spec);
        spec.replicas = None;
        spec.every_host = false;
        spec.placement = None;
        spec.rollout = None;
        spec.on_host_loss = None;
        spec
    };
    let (before, after): (WrittenSpec, WrittenSpec) = (neutral(before), neutral(after));
    before != after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::World;
    use berth_proto::values::ResolvedArtifact;

    /// What the server adds to the environment of a release's containers.
    fn added(change: impl FnOnce(&mut ResolvedSource)) -> BTreeMap<String, String> {
        added_to(World::spec("one"), change)
    }

    fn added_to(
        spec: WrittenSpec,
        change: impl FnOnce(&mut ResolvedSource),
    ) -> BTreeMap<String, String> {
        let mut w = World::new(1);
        w.apply_as("iris", spec);
        let deployment = w.view.deployments().next().unwrap();
        let number = deployment.release();
        let mut source = w.view.release(&deployment.uid, number).unwrap().source.clone();
        change(&mut source);
        let (actor, cause, now) = ("user/test", "", Wall(0));
        let made = Draft { deployment, number, source, actor, cause, now, copied_from: number };
        let body = draft(&made).unwrap().body;
        berth_proto::agent::AssignmentBody::decode(&*body).unwrap().system_env
    }

    #[test]
    fn a_version_is_told_its_name_whether_it_is_files_or_an_image() {
        let told = |env: &BTreeMap<String, String>, name: &str| env.get(name).cloned();
        let plain = added(|_| {});
        assert!(!plain.keys().any(|name| name.starts_with("BERTH_MODEL")), "{plain:?}");
        let built = added(|source| source.model_version = Some("1.2".to_owned()));
        assert_eq!(told(&built, "BERTH_MODEL_NAME").as_deref(), Some("iris"));
        assert_eq!(told(&built, "BERTH_MODEL_VERSION").as_deref(), Some("1.2"));
        assert_eq!(told(&built, "BERTH_MODEL_DIR"), None, "it has no files beside its image");
        let files = added(|source| {
            source.model_version = Some("1.2".to_owned());
            source.artifact = Some(ResolvedArtifact {
                model: "iris".to_owned(),
                version: "1.2".to_owned(),
                repository: "models/iris".to_owned(),
                digest: source.image.digest.clone(),
                size_bytes: 1,
                format: "onnx".to_owned(),
            });
        });
        assert_eq!(told(&files, "BERTH_MODEL_VERSION").as_deref(), Some("1.2"));
        assert_eq!(told(&files, "BERTH_MODEL_DIR").as_deref(), Some(ARTIFACT_TARGET));
    }
    #[test]
    fn a_program_with_a_name_of_its_own_for_the_model_is_told_that_one() {
        let spec = WrittenSpec { served_model: "iris-sklearn".to_owned(), ..World::spec("one") };
        let env = added_to(spec, |source| source.model_version = Some("1".to_owned()));
        assert_eq!(env["BERTH_MODEL_NAME"], "iris-sklearn");
        assert_eq!(env["BERTH_DEPLOYMENT"], "iris");
    }

    #[test]
    fn another_name_behind_the_gateway_is_another_release() {
        let read = |spec: &WrittenSpec| convert::deployment_spec_from_api(spec).unwrap();
        let before = World::spec("one");
        let after = WrittenSpec { served_model: "iris-sklearn".to_owned(), ..before.clone() };
        assert!(needs_release(&read(&before), &read(&after)));
        assert!(!needs_release(&read(&after), &read(&after)));
    }
}
