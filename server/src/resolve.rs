//! What a deployment's source is now, pinned by digest.

use crate::cluster::Cluster;
use crate::error::{Error, FieldError, Kind};
use crate::registry::Registry;
use crate::registry::errors::RegistryError;
use crate::registry::names::{Reference, RepoName};
use berth_proto::api::{ModelVersion, ModelVersionKind};
use berth_proto::ids::Digest;
use berth_proto::values::{
    DeploymentSpec, PlatformImage, ResolvedArtifact, ResolvedImage, ResolvedSource, Source,
};
use berth_server_core::view::View;
use serde_json::Value;

/// A model reference, read: `[namespace/]name[:version]`, `name@alias`, `name@sha256:...`.
///
/// A name may have up to three segments, so a first segment is a namespace only when a model of the
/// whole name is not known in the asked namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRef {
    /// Name with its segments.
    pub name: String,
    /// Which version.
    pub which: Which,
}

/// Which version of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The one registered last.
    Latest,
    /// By name.
    Version(String),
    /// By alias.
    Alias(String),
    /// By digest.
    Digest(Digest),
}

/// Reads a model reference.
#[must_use]
pub fn read_model(text: &str) -> Option<ModelRef> {
    let (name, which) = match text.split_once('@') {
        Some((name, rest)) if rest.starts_with("sha256:") => {
            (name, Which::Digest(rest.parse().ok()?))
        }
        Some((name, alias)) => (name, Which::Alias(alias.to_owned())),
        None => match text.rsplit_once(':') {
            Some((name, version)) => (name, Which::Version(version.to_owned())),
            None => (text, Which::Latest),
        },
    };
    is_model_name(name).then(|| ModelRef { name: name.to_owned(), which })
}

/// Whether a name has 1 to 3 segments (4 with a namespace) of `a-z0-9-`.
#[must_use]
pub fn is_model_name(name: &str) -> bool {
    let segments: Vec<&str> = name.split('/').collect();
    segments.len() <= 4 && segments.iter().all(|s| berth_proto::ids::is_name(s))
}

/// The version a reference names; `path`: where the reference was written.
///
/// # Errors
/// When there is none, with what there is.
pub fn find_version(
    view: &View,
    namespace: &str,
    reference: &str,
    path: &str,
) -> Result<(String, ModelVersion), Error> {
    let Some(asked) = read_model(reference) else {
        return Err(Error::field(
            path,
            format!(
                "\"{reference}\" is not a model reference; write NAME, NAME:VERSION or NAME@ALIAS"
            ),
        ));
    };
    let found =
        view.model(namespace, &asked.name).map(|m| (namespace.to_owned(), m)).or_else(|| {
            let (space, name) = asked.name.split_once('/')?;
            view.model(space, name).map(|m| (space.to_owned(), m))
        });
    let Some((space, model)) = found else {
        return Err(Error::not_found(Kind::Model, &asked.name));
    };
    let meta = model.record.meta.clone().unwrap_or_default();
    let versions = || view.versions_of(&meta.uid).filter_map(|v| v.record.version.clone());
    let version = match &asked.which {
        Which::Latest => versions().max_by_key(|v| v.revision.max(created(v))),
        Which::Version(name) => versions().find(|v| v.version == *name),
        Which::Digest(digest) => versions().find(|v| v.digest == digest.as_str()),
        Which::Alias(alias) => {
            let Some(name) = model.record.aliases.get(alias) else {
                return Err(Error::not_found(Kind::Alias, format!("{}@{alias}", asked.name)));
            };
            versions().find(|v| v.version == *name)
        }
    };
    version.map(|v| (space, v)).ok_or_else(|| Error::not_found(Kind::Version, reference))
}

fn created(version: &ModelVersion) -> u64 {
    version
        .create_time
        .as_ref()
        .map(|t| u64::try_from(berth_proto::convert::wall(t).0).unwrap_or(0))
        .unwrap_or(0)
}

/// What a spec's source is now, and the same in words.
///
/// # Errors
/// When a model, version or image is not there.
pub async fn source(
    cluster: &Cluster,
    view: &View,
    namespace: &str,
    spec: &DeploymentSpec,
    path: &str,
) -> Result<(ResolvedSource, String), Error> {
    let pushed = |image: &str| {
        Error::precondition(
            "IMAGE_NOT_FOUND",
            format!(
                "{path}spec.image: image \"{image}\" is not in the registry; push it with `berth image push` or docker push"
            ),
        )
    };
    match &spec.source {
        Source::Image(reference) => {
            let own = own_image(cluster, reference).ok_or_else(|| {
                Error::Invalid(vec![FieldError {
                    path: format!("{path}spec.image"),
                    message: format!(
                        "\"{reference}\" is not in this server's registry ({}); push it there first",
                        cluster.registry_address
                    ),
                }])
            })?;
            let field = format!("{path}spec.image");
            let image = image(&cluster.registry, &own, &field).await?;
            let image = image.ok_or_else(|| pushed(reference))?;
            let words = format!("{}@{}", image.repository, image.digest);
            Ok((ResolvedSource { image, artifact: None }, words))
        }
        Source::Model(reference) => {
            let field = format!("{path}spec.model");
            let (_, version) =
                find_version(view, namespace, reference, &field).map_err(|error| {
                    let Error::NotFound { kind, name } = error else { return error };
                    let reason = if kind == Kind::Model {
                        "MODEL_NOT_FOUND"
                    } else if kind == Kind::Alias {
                        "ALIAS_NOT_FOUND"
                    } else {
                        "VERSION_NOT_FOUND"
                    };
                    Error::precondition(
                        reason,
                        format!(
                            "{path}spec.model: {kind} \"{name}\" does not exist; \
                         `berth model push` registers one"
                        ),
                    )
                })?;
            let words = format!("{}:{}@{}", version.model, version.version, version.digest);
            let digest: Digest = version
                .digest
                .parse()
                .map_err(|e| Error::internal("cannot read a stored digest", e))?;
            if version.kind() == ModelVersionKind::Image {
                let own = format!("{}@{digest}", version.repository);
                let image = image(&cluster.registry, &own, &field).await?;
                let image = image.ok_or_else(|| pushed(&own))?;
                return Ok((ResolvedSource { image, artifact: None }, words));
            }
            let runtime = spec.runtime.clone().unwrap_or_else(|| version.format.clone());
            let reference = match runtime.as_str() {
                "onnx" => cluster.settings.onnx_runtime.clone(),
                other if other.contains([':', '/']) => {
                    own_image(cluster, other).unwrap_or_default()
                }
                other => format!("runtimes/{other}:latest"),
            };
            let field = format!("{path}spec.runtime");
            let image = image(&cluster.registry, &reference, &field).await?.ok_or_else(|| {
                Error::precondition(
                    "RUNTIME_NOT_FOUND",
                    format!(
                        "{path}spec.runtime: no image \"{reference}\" serves format \"{}\"; push one with `berth image push LOCAL {reference}`",
                        version.format
                    ),
                )
            })?;
            let artifact = ResolvedArtifact {
                model: version.model.clone(),
                version: version.version.clone(),
                repository: version.repository.clone(),
                digest,
                size_bytes: version.size_bytes,
                format: version.format.clone(),
            };
            Ok((ResolvedSource { image, artifact: Some(artifact) }, words))
        }
    }
}

/// The repositories that whoever wrote the spec has chosen; a runtime by its short name is the
/// server's choice.
#[must_use]
pub fn chosen(spec: &DeploymentSpec, resolved: &ResolvedSource) -> Vec<RepoName> {
    let artifact = resolved.artifact.as_ref().map(|artifact| artifact.repository.as_str());
    let named = spec.runtime.as_ref().is_some_and(|runtime| runtime.contains([':', '/']));
    let image = (artifact.is_none() || named).then_some(resolved.image.repository.as_str());
    artifact.into_iter().chain(image).filter_map(|name| RepoName::parse(name).ok()).collect()
}

/// The reference inside our own registry, when the registry part is ours or absent.
fn own_image(cluster: &Cluster, reference: &str) -> Option<String> {
    match reference.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => {
            (host == cluster.registry_address).then(|| rest.to_owned())
        }
        Some(_) | None => Some(reference.to_owned()),
    }
}

/// The largest image configuration that is read: whatever a manifest calls its configuration is read
/// into memory, and real ones have some ten KiB.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;

/// Pins an image of our own registry; `None`: it is not there. `path`: where its reference was written.
///
/// # Errors
/// When what is there is no image.
pub async fn image(
    registry: &Registry,
    reference: &str,
    path: &str,
) -> Result<Option<ResolvedImage>, Error> {
    let (repository, tail) = match reference.split_once('@') {
        Some((name, digest)) => (name, digest.to_owned()),
        None => match reference.rsplit_once(':') {
            Some((name, tag)) => (name, tag.to_owned()),
            None => (reference, "latest".to_owned()),
        },
    };
    let (Ok(repo), Ok(asked)) = (RepoName::parse(repository), Reference::parse(&tail)) else {
        return Err(Error::field(path, format!("\"{reference}\" is not an image reference")));
    };
    // With a lease: what is pinned now must outlive a collection that runs before the release is kept.
    let top = match registry.renew_manifest(&repo, &asked).await {
        Ok(top) => top,
        Err(RegistryError::ManifestUnknown(_) | RegistryError::NameUnknown(_)) => return Ok(None),
        Err(error) => return Err(Error::internal("cannot read an image's manifest", error)),
    };
    let bad =
        |what: &'static str| Error::precondition("NOT_AN_IMAGE", format!("\"{reference}\" {what}"));
    let json: Value = serde_json::from_slice(&top.bytes).map_err(|_| bad("is not JSON"))?;
    let mut platforms = Vec::new();
    if let Some(list) = json["manifests"].as_array() {
        for entry in list {
            let digest = entry["digest"].as_str().unwrap_or_default();
            let os = entry["platform"]["os"].as_str().unwrap_or_default();
            if os != "linux" {
                continue;
            }
            let Ok(reference) = Reference::parse(digest) else { continue };
            let Ok(one) = registry.renew_manifest(&repo, &reference).await else { continue };
            platforms.extend(platform(registry, &repo, &one.digest, &one.bytes).await);
        }
    } else {
        platforms.extend(platform(registry, &repo, &top.digest, &top.bytes).await);
    }
    if platforms.is_empty() {
        return Err(bad("holds no image for Linux that engines can run"));
    }
    Ok(Some(ResolvedImage {
        registry: String::new(),
        repository: repository.to_owned(),
        digest: top.digest,
        platforms,
    }))
}

async fn platform(
    registry: &Registry,
    repo: &RepoName,
    digest: &Digest,
    manifest: &[u8],
) -> Option<PlatformImage> {
    let json: Value = serde_json::from_slice(manifest).ok()?;
    let config_digest: Digest = json["config"]["digest"].as_str()?.parse().ok()?;
    if registry.blob_size(repo, &config_digest, true).await.ok()? > MAX_CONFIG_BYTES {
        return None;
    }
    let bytes = tokio::fs::read(registry.blob_path(&config_digest)).await.ok()?;
    let config: Value = serde_json::from_slice(&bytes).ok()?;
    let size = json["layers"].as_array()?.iter().filter_map(|l| l["size"].as_u64()).sum();
    Some(PlatformImage {
        arch: config["architecture"].as_str()?.to_owned(),
        os: config["os"].as_str()?.to_owned(),
        manifest_digest: digest.clone(),
        config_digest,
        size_bytes: size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_references_are_read_by_their_end() {
        let read = |text: &str| read_model(text).map(|r| (r.name, r.which));
        assert_eq!(read("iris"), Some(("iris".into(), Which::Latest)));
        assert_eq!(read("a/iris:1.2"), Some(("a/iris".into(), Which::Version("1.2".into()))));
        assert_eq!(read("iris@champion"), Some(("iris".into(), Which::Alias("champion".into()))));
        let digest = Digest::of(b"x");
        assert_eq!(read(&format!("iris@{digest}")), Some(("iris".into(), Which::Digest(digest))));
        for bad in ["", "Iris", "a//b", "iris@sha256:xyz", "../x:1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
