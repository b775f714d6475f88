//! What releases pin, and the body agents are told.

use super::{Problems, deployment_spec_from_api, deployment_spec_to_api};
use crate::values::{
    AssignmentBody, PlatformImage, ResolvedArtifact, ResolvedImage, ResolvedSource,
};
use crate::{agent, api};
use prost::Message as _;

/// Reads pins.
///
/// # Errors
/// When a digest is none or the image is missing.
pub fn resolved_from_api(from: &api::ResolvedSource) -> Result<ResolvedSource, Problems> {
    let mut p = Problems::default();
    let Some(image) = &from.image else {
        p.add("source.image", "is missing");
        return Err(p);
    };
    let digest = p.take("source.image.digest", image.digest.parse());
    let mut platforms = Vec::new();
    for (i, platform) in image.platforms.iter().enumerate() {
        let path = format!("source.image.platforms[{i}]");
        let manifest = p.take(format!("{path}.manifest_digest"), platform.manifest_digest.parse());
        let config = p.take(format!("{path}.config_digest"), platform.config_digest.parse());
        if let (Some(manifest_digest), Some(config_digest)) = (manifest, config) {
            platforms.push(PlatformImage {
                arch: platform.arch.clone(),
                os: platform.os.clone(),
                manifest_digest,
                config_digest,
                size_bytes: platform.size_bytes,
            });
        }
    }
    let artifact = match &from.artifact {
        None => None,
        Some(artifact) => p.take("source.artifact.digest", artifact.digest.parse()).map(|digest| {
            ResolvedArtifact {
                model: artifact.model.clone(),
                version: artifact.version.clone(),
                repository: artifact.repository.clone(),
                digest,
                size_bytes: artifact.size_bytes,
                format: artifact.format.clone(),
            }
        }),
    };
    // Releases from before it had a place of its own name it with the artifact alone.
    let of_artifact = || artifact.as_ref().map(|artifact| artifact.version.clone());
    let model_version = Some(from.model_version.clone()).filter(|name| !name.is_empty());
    let model_version = model_version.or_else(of_artifact);
    let Some(digest) = digest else { return Err(p) };
    p.finish(ResolvedSource {
        image: ResolvedImage {
            registry: image.registry.clone(),
            repository: image.repository.clone(),
            digest,
            platforms,
        },
        artifact,
        model_version,
    })
}

/// Writes pins.
#[must_use]
pub fn resolved_to_api(from: &ResolvedSource) -> api::ResolvedSource {
    api::ResolvedSource {
        image: Some(api::ResolvedImage {
            registry: from.image.registry.clone(),
            repository: from.image.repository.clone(),
            digest: from.image.digest.to_string(),
            platforms: from
                .image
                .platforms
                .iter()
                .map(|p| api::PlatformImage {
                    arch: p.arch.clone(),
                    os: p.os.clone(),
                    manifest_digest: p.manifest_digest.to_string(),
                    config_digest: p.config_digest.to_string(),
                    size_bytes: p.size_bytes,
                })
                .collect(),
        }),
        artifact: from.artifact.as_ref().map(|a| api::ResolvedArtifact {
            model: a.model.clone(),
            version: a.version.clone(),
            repository: a.repository.clone(),
            digest: a.digest.to_string(),
            size_bytes: a.size_bytes,
            format: a.format.clone(),
        }),
        model_version: from.model_version.clone().unwrap_or_default(),
    }
}

/// Reads a body from its bytes.
///
/// # Errors
/// When the bytes are no body or hold what is out of bounds.
pub fn assignment_body_from_bytes(bytes: &[u8]) -> Result<AssignmentBody, Problems> {
    let mut p = Problems::default();
    let Some(from) = p.take("body", agent::AssignmentBody::decode(bytes)) else {
        return Err(p);
    };
    let deployment_uid = p.take("deployment_uid", from.deployment_uid.parse());
    let deployment = p.take("deployment", from.deployment.parse());
    let namespace = p.take("namespace", from.namespace.parse());
    let source = resolved_from_api(&from.source.unwrap_or_default());
    let spec = deployment_spec_from_api(&from.spec.unwrap_or_default());
    for problems in [source.as_ref().err(), spec.as_ref().err()].into_iter().flatten() {
        p.0.extend(problems.0.iter().cloned());
    }
    let (Some(deployment_uid), Some(deployment), Some(namespace), Ok(source), Ok(spec)) =
        (deployment_uid, deployment, namespace, source, spec)
    else {
        return Err(p);
    };
    p.finish(AssignmentBody {
        deployment_uid,
        deployment,
        namespace,
        release: crate::ids::ReleaseNumber(from.release),
        requires: from.requires.into_iter().collect(),
        source,
        spec,
        system_env: from.system_env,
        artifact_target: (!from.artifact_target.is_empty()).then_some(from.artifact_target),
    })
}

/// Writes a body. Called once in a release's life; what is encoded from it is kept verbatim.
#[must_use]
pub fn assignment_body_to_agent(from: &AssignmentBody) -> agent::AssignmentBody {
    let mut spec = deployment_spec_to_api(&from.spec);
    // The server's own, but for the time that makes running count as ready.
    spec.replicas = None;
    spec.every_host = false;
    spec.placement = None;
    spec.rollout = spec
        .rollout
        .map(|r| api::RolloutPolicy { ready_for: r.ready_for, ..api::RolloutPolicy::default() });
    agent::AssignmentBody {
        deployment_uid: from.deployment_uid.to_string(),
        deployment: from.deployment.to_string(),
        namespace: from.namespace.to_string(),
        release: from.release.0,
        requires: from.requires.iter().cloned().collect(),
        source: Some(resolved_to_api(&from.source)),
        spec: Some(spec),
        system_env: from.system_env.clone(),
        artifact_target: from.artifact_target.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Digest;

    #[test]
    fn the_version_is_read_of_releases_that_name_it_with_their_artifact_alone() {
        let digest = Digest::of(b"x").to_string();
        let artifact = api::ResolvedArtifact {
            version: "1.2".to_owned(),
            digest: digest.clone(),
            ..Default::default()
        };
        let stored = api::ResolvedSource {
            image: Some(api::ResolvedImage { digest, ..Default::default() }),
            artifact: Some(artifact),
            model_version: String::new(),
        };
        let read = resolved_from_api(&stored).unwrap();
        assert_eq!(read.model_version.as_deref(), Some("1.2"));
        assert_eq!(resolved_from_api(&resolved_to_api(&read)), Ok(read));
        let image = api::ResolvedSource { artifact: None, ..stored };
        assert_eq!(resolved_from_api(&image).unwrap().model_version, None);
        let built = api::ResolvedSource { model_version: "1.2".to_owned(), ..image };
        let read = resolved_from_api(&built).unwrap();
        assert_eq!(read.model_version.as_deref(), Some("1.2"));
        assert_eq!(resolved_to_api(&read), built);
    }
}
