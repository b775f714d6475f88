//! What a deployment's source is now, pinned by digest.

use crate::api::auth::Caller;
use crate::cluster::Cluster;
use crate::error::{Error, Kind};
use crate::registry::Registry;
use crate::registry::access::Action;
use crate::registry::errors::RegistryError;
use crate::registry::names::{Reference, RepoName};
use berth_proto::api::{ModelVersion, ModelVersionKind, Role};
use berth_proto::ids::Digest;
use berth_proto::manifest::nearest;
use berth_proto::values::{
    DeploymentSpec, PlatformImage, ResolvedArtifact, ResolvedImage, ResolvedSource, Source,
};
use berth_server_core::view::{ObjectKey, View};
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

/// The version a reference names; `path`: where the reference was written. A namespace that the caller
/// may not read is not looked into: what is there and what is not are told alike.
///
/// # Errors
/// When there is none, with what there is.
pub fn find_version(
    caller: &Caller,
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
    let within = asked.name.split_once('/').filter(|(space, _)| caller.sees(space));
    let own = caller.sees(namespace).then_some((namespace, asked.name.as_str()));
    let found = own
        .into_iter()
        .chain(within)
        .find_map(|(space, name)| Some((space.to_owned(), view.model(space, name)?)));
    let Some((space, model)) = found else {
        if within.is_none() {
            caller.require(Role::Viewer, namespace)?;
        }
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

/// The nearest reference to one that names nothing, among what the caller may read.
fn near(caller: &Caller, view: &View, namespace: &str, reference: &str) -> Option<String> {
    let asked = read_model(reference)?;
    let rest = &reference[asked.name.len()..];
    let within = asked.name.split_once('/').filter(|(space, _)| caller.sees(space));
    let own = caller.sees(namespace).then_some((namespace, asked.name.as_str()));
    let model = own.into_iter().chain(within).find_map(|(space, name)| view.model(space, name));
    let Some(model) = model else {
        let (space, name) = own?;
        let metas = view.models().filter_map(|m| m.record.meta.as_ref());
        let names = metas.filter(|m| m.namespace == space).map(|m| m.name.as_str());
        return nearest(name, names).map(|near| format!("{near}{rest}"));
    };
    match &asked.which {
        Which::Alias(alias) => {
            let near = nearest(alias, model.record.aliases.keys().map(String::as_str))?;
            Some(format!("{}@{near}", asked.name))
        }
        Which::Version(version) => {
            let uid = model.record.meta.as_ref().map(|m| m.uid.as_str()).unwrap_or_default();
            let known = view.versions_of(uid).filter_map(|v| v.record.version.as_ref());
            let near = nearest(version, known.map(|v| v.version.as_str()))?;
            Some(format!("{}:{near}", asked.name))
        }
        Which::Latest | Which::Digest(_) => None,
    }
}

fn created(version: &ModelVersion) -> u64 {
    version
        .create_time
        .as_ref()
        .map(|t| u64::try_from(berth_proto::convert::wall(t).0).unwrap_or(0))
        .unwrap_or(0)
}

/// What a source is now.
pub struct Found {
    /// Pinned by digest.
    pub resolved: ResolvedSource,
    /// The same in words.
    pub words: String,
    /// The registered version it is, which must be there still when that is written.
    pub version: Option<ObjectKey>,
}

/// What a spec's source is now. What the caller names is looked up only where it may: a runtime by its
/// short name is the server's choice.
///
/// # Errors
/// When a model, version or image is not there, or the caller may not have it run.
pub async fn source(
    cluster: &Cluster,
    caller: &Caller,
    view: &View,
    namespace: &str,
    spec: &DeploymentSpec,
    path: &str,
) -> Result<Found, Error> {
    let foreign = |field: &str, reference: &str| {
        let message = format!(
            "\"{reference}\" is not in this server's registry ({}); push it there first",
            cluster.registry_address
        );
        Error::field(format!("{path}{field}"), message)
    };
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
            let own =
                own_image(cluster, reference).ok_or_else(|| foreign("spec.image", reference))?;
            let field = format!("{path}spec.image");
            let image = image(&cluster.registry, Some(caller), &own, &field).await?;
            let image = image.ok_or_else(|| {
                // Mistaken easily: what `berth build` makes is a version of a model.
                match find_version(caller, view, namespace, reference, &field) {
                    Ok(_) => Error::precondition(
                        "IMAGE_NOT_FOUND",
                        format!(
                            "{field}: image \"{reference}\" is not in the registry; a model version of that name is: write `model: {reference}` instead of `image:`"
                        ),
                    ),
                    Err(_) => pushed(reference),
                }
            })?;
            let words = format!("{}@{}", image.repository, image.digest);
            let resolved = ResolvedSource { image, artifact: None, model_version: None };
            Ok(Found { resolved, words, version: None })
        }
        Source::Model(reference) => {
            let field = format!("{path}spec.model");
            let (_, version) =
                find_version(caller, view, namespace, reference, &field).map_err(|error| {
                    let Error::NotFound { kind, name } = error else { return error };
                    let reason = if kind == Kind::Model {
                        "MODEL_NOT_FOUND"
                    } else if kind == Kind::Alias {
                        "ALIAS_NOT_FOUND"
                    } else {
                        "VERSION_NOT_FOUND"
                    };
                    let help = match near(caller, view, namespace, reference) {
                        Some(near) => format!("did you mean \"{near}\"?"),
                        None if kind == Kind::Alias => "`berth model alias` moves one".to_owned(),
                        None => "`berth model push` registers one".to_owned(),
                    };
                    Error::precondition(
                        reason,
                        format!("{path}spec.model: {kind} \"{name}\" does not exist; {help}"),
                    )
                })?;
            let words = format!("{}:{}@{}", version.model, version.version, version.digest);
            let digest: Digest = version
                .digest
                .parse()
                .map_err(|e| Error::internal("cannot read a stored digest", e))?;
            let key = ObjectKey::Version(version.model_uid.clone(), version.version.clone());
            if version.kind() == ModelVersionKind::Image {
                let own = format!("{}@{digest}", version.repository);
                let image = image(&cluster.registry, Some(caller), &own, &field).await?;
                let image = image.ok_or_else(|| pushed(&own))?;
                let model_version = Some(version.version);
                let resolved = ResolvedSource { image, artifact: None, model_version };
                return Ok(Found { resolved, words, version: Some(key) });
            }
            let runtime = spec.runtime.clone().unwrap_or_else(|| version.format.clone());
            let reference = match runtime.as_str() {
                "onnx" => cluster.settings.onnx_runtime.clone(),
                other if other.contains([':', '/']) => {
                    own_image(cluster, other).ok_or_else(|| foreign("spec.runtime", other))?
                }
                other => format!("runtimes/{other}:latest"),
            };
            let repository = RepoName::parse(&version.repository)
                .map_err(|e| Error::internal("cannot read a stored repository", e))?;
            caller.require_repository(&repository, Action::Pull)?;
            let named = spec.runtime.as_ref().is_some_and(|runtime| runtime.contains([':', '/']));
            let reader = named.then_some(caller);
            let field = format!("{path}spec.runtime");
            let image = image(&cluster.registry, reader, &reference, &field).await?.ok_or_else(|| {
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
            let model_version = Some(version.version);
            let resolved = ResolvedSource { image, artifact: Some(artifact), model_version };
            Ok(Found { resolved, words, version: Some(key) })
        }
    }
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

/// Pins an image of our own registry; `None`: it is not there. `reader` must be allowed to pull it;
/// `None`: it is the server's own choice. `path`: where its reference was written.
///
/// # Errors
/// When what is there is no image, or is not for `reader`.
async fn image(
    registry: &Registry,
    reader: Option<&Caller>,
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
    if let Some(reader) = reader {
        reader.require_repository(&repo, Action::Pull)?;
    }
    // With a lease, on all that is below it: what is pinned now must outlive a collection that runs before the release is kept.
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
            let Ok(one) = registry.manifest(&repo, &reference).await else { continue };
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
