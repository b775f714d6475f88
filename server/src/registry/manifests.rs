//! Manifests and indexes: stored byte for byte, checked for what they name.
//!
//! A manifest is linked in its repository after everything it names is there and leased, so that one
//! that can be read is whole. Renewing the lease of a manifest renews that of everything below it,
//! the manifest last: one that is leased has nothing below it that is not.

use super::disk::{digests_in, read_small};
use super::errors::{RegistryError, io};
use super::names::{Reference, RepoName, Tag, parse_digest};
use super::{Inner, Registry, add};
use berth_proto::ids::Digest;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

/// The specification asks for at least this; other registries take no more either.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Manifests below one index, in all: the work one request can cause.
const BELOW_MAX: usize = 4096;

/// Media types stored here.
pub mod media_types {
    /// OCI image manifest, also of artifacts.
    pub const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image index.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker's image manifest.
    pub const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker's index.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
}

/// A stored manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Of its bytes.
    pub digest: Digest,
    /// As it was pushed.
    pub media_type: String,
    /// As they were pushed.
    pub bytes: Bytes,
}

/// A manifest that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// Of its bytes.
    pub digest: Digest,
    /// What it refers to, when it does.
    pub subject: Option<Digest>,
}

/// A descriptor as it stands in a manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) annotations: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing)]
    urls: Option<Vec<String>>,
}

impl Descriptor {
    pub(super) fn digest(&self) -> Result<Digest, RegistryError> {
        parse_digest(&self.digest).map_err(|error| {
            RegistryError::ManifestInvalid(format!("a descriptor of the manifest: {error}"))
        })
    }

    /// A layer that is fetched from its maker and never pushed.
    fn is_foreign(&self) -> bool {
        self.urls.as_ref().is_some_and(|urls| !urls.is_empty())
            && (self.media_type.contains(".foreign.")
                || self.media_type.contains("nondistributable"))
    }
}

/// What this door reads of a manifest or index.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Parsed {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    subject: Option<Descriptor>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl Parsed {
    /// Reads a manifest of one of the media types taken here.
    pub(super) fn read(media_type: &str, bytes: &[u8]) -> Result<Self, RegistryError> {
        let invalid = RegistryError::ManifestInvalid;
        let index = match media_type {
            media_types::IMAGE | media_types::DOCKER_IMAGE => false,
            media_types::INDEX | media_types::DOCKER_INDEX => true,
            other => {
                return Err(invalid(format!(
                    "manifests of type \"{}\" are not taken: use an OCI manifest or index, or \
                     Docker's of schema 2",
                    other.chars().take(100).collect::<String>()
                )));
            }
        };
        let parsed: Self = serde_json::from_slice(bytes)
            .map_err(|error| invalid(format!("the manifest cannot be read: {error}")))?;
        if parsed.schema_version != 2 {
            return Err(invalid("schemaVersion must be 2".to_owned()));
        }
        if parsed.media_type.as_ref().is_some_and(|within| within != media_type) {
            return Err(invalid("mediaType differs from the Content-Type".to_owned()));
        }
        if index && (parsed.config.is_some() || parsed.layers.is_some()) {
            return Err(invalid("an index has neither config nor layers".to_owned()));
        }
        if !index && (parsed.manifests.is_some() || parsed.config.is_none()) {
            return Err(invalid("a manifest has a config and no manifests".to_owned()));
        }
        Ok(parsed)
    }

    /// Manifests of an index.
    pub(super) fn children(&self) -> &[Descriptor] {
        self.manifests.as_deref().unwrap_or_default()
    }
    /// Config and layers that must be stored here.
    pub(super) fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        let layers = self.layers.as_deref().unwrap_or_default();
        self.config.iter().chain(layers).filter(|blob| !blob.is_foreign())
    }
    pub(super) fn subject(&self) -> Result<Option<Digest>, RegistryError> {
        self.subject.as_ref().map(Descriptor::digest).transpose()
    }
    fn names(&self, digest: &Digest) -> bool {
        self.blobs().chain(self.children()).any(|one| one.digest == digest.as_str())
    }
    /// How a referrer is listed.
    fn describe(self, media_type: &str, digest: &Digest, size: u64) -> Descriptor {
        let config_type = self.config.map(|config| config.media_type);
        Descriptor {
            media_type: media_type.to_owned(),
            digest: digest.to_string(),
            size,
            artifact_type: self.artifact_type.filter(|t| !t.is_empty()).or(config_type),
            annotations: self.annotations,
            urls: None,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Revision {
    media_type: String,
}

impl Registry {
    /// The digest a tag stands for now.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn resolve_tag(
        &self,
        repo: &RepoName,
        tag: &Tag,
    ) -> Result<Option<Digest>, RegistryError> {
        let (repo, tag) = (repo.clone(), tag.clone());
        self.blocking("reading a tag", move |inner| inner.tagged(&repo, &tag)).await
    }

    /// A manifest of a repository.
    ///
    /// # Errors
    /// [`RegistryError::ManifestUnknown`]; [`RegistryError::Io`], also when the stored bytes are not
    /// what their digest says.
    pub async fn manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Manifest, RegistryError> {
        let (repo, reference) = (repo.clone(), reference.clone());
        let found = self
            .blocking_with("reading a manifest", move |inner| {
                let digest = inner.resolve(&repo, &reference)?;
                inner.read_manifest(&repo, &digest)
            })
            .await?;
        add(&self.0.stats.manifests_read, 1);
        Ok(found)
    }

    /// Whether one of these manifests names `wanted`, itself or through a manifest of its index. A
    /// manifest that is not in `repo` leads nowhere.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn leads_to(
        &self,
        repo: &RepoName,
        roots: &[Digest],
        wanted: &Digest,
    ) -> Result<bool, RegistryError> {
        let (repo, roots, wanted) = (repo.clone(), roots.to_vec(), wanted.clone());
        self.blocking_with("reading a manifest", move |inner| inner.leads_to(&repo, roots, &wanted))
            .await
    }

    /// The same, and renews the lease of the manifest and all below it (HEAD).
    ///
    /// # Errors
    /// Those of [`Self::manifest`].
    pub async fn renew_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Manifest, RegistryError> {
        let gate = self.shared().await;
        let (repo, reference) = (repo.clone(), reference.clone());
        self.blocking_with("reading a manifest", move |inner| {
            let _gate = gate;
            let digest = inner.resolve(&repo, &reference)?;
            let found = inner.read_manifest(&repo, &digest)?;
            let parsed = Parsed::read(&found.media_type, &found.bytes)?;
            let missing = inner.lease_below(&repo, &parsed)?;
            if !missing.is_empty() {
                tracing::warn!(%repo, %digest, missing = missing.len(), "a manifest is not whole");
            }
            inner.disk.touch(&digest, SystemTime::now()).map_err(io("renewing a lease"))?;
            Ok(found)
        })
        .await
    }

    /// Stores a manifest by digest or under a tag. Does not ask [`Protected`](super::Protected):
    /// that is a rule of the door.
    ///
    /// # Errors
    /// Those of [`Self::put_manifest_if`].
    pub async fn put_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Put, RegistryError> {
        self.put_manifest_if(repo, reference, media_type, bytes, |_| None).await
    }

    /// The same, unless `keep` says why not, given what the tag stands for just before it would be
    /// moved.
    ///
    /// # Errors
    /// [`RegistryError::ManifestInvalid`], [`RegistryError::ManifestTooLarge`],
    /// [`RegistryError::ManifestBlobUnknown`], [`RegistryError::DigestMismatch`],
    /// [`RegistryError::Denied`] with the words of `keep`, [`RegistryError::DiskFull`] for one that is
    /// not stored yet, [`RegistryError::Io`].
    pub async fn put_manifest_if(
        &self,
        repo: &RepoName,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
        keep: impl Fn(Option<Digest>) -> Option<String> + Send + 'static,
    ) -> Result<Put, RegistryError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(RegistryError::ManifestTooLarge { limit: MANIFEST_BYTES_MAX });
        }
        let gate = self.shared().await;
        let (repo, reference) = (repo.clone(), reference.clone());
        let media_type = media_type.to_owned();
        let put = self
            .blocking_with("storing a manifest", move |inner| {
                let _gate = gate;
                let held = match &reference {
                    Reference::Tag(tag) => inner.tagged(&repo, tag).map_err(io("reading a tag"))?,
                    Reference::Digest(_) => None,
                };
                if let Some(why) = keep(held) {
                    return Err(RegistryError::Denied(why));
                }
                inner.put_manifest(&repo, &reference, &media_type, &bytes)
            })
            .await?;
        add(&self.0.stats.manifests_put, 1);
        Ok(put)
    }

    /// Removes a tag; the manifest stays.
    ///
    /// # Errors
    /// Those of [`Self::delete_tag_if`].
    pub async fn delete_tag(&self, repo: &RepoName, tag: &Tag) -> Result<(), RegistryError> {
        self.delete_tag_if(repo, tag, |_| None).await
    }

    /// The same, unless `keep` says why it must stay.
    ///
    /// # Errors
    /// [`RegistryError::ManifestUnknown`], [`RegistryError::Denied`] with the words of `keep`,
    /// [`RegistryError::Io`].
    pub async fn delete_tag_if(
        &self,
        repo: &RepoName,
        tag: &Tag,
        keep: impl Fn(&Reference) -> Option<String> + Send + 'static,
    ) -> Result<(), RegistryError> {
        let gate = self.alone().await;
        let (repo, tag) = (repo.clone(), tag.clone());
        self.blocking_with("deleting a tag", move |inner| {
            let _gate = gate;
            if let Some(why) = keep(&Reference::Tag(tag.clone())) {
                return Err(RegistryError::Denied(why));
            }
            if inner.disk.remove(&inner.disk.tag(&repo, &tag)).map_err(io("deleting a tag"))? {
                Ok(())
            } else {
                Err(RegistryError::ManifestUnknown(tag.to_string()))
            }
        })
        .await
    }

    /// Removes a manifest and the tags that stand for it, unless `keep` says why it or one of these tags
    /// must stay. The bytes go with the next collection.
    ///
    /// # Errors
    /// [`RegistryError::ManifestUnknown`]; [`RegistryError::Denied`] while an index names it, or
    /// with the words of `keep`.
    pub async fn delete_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
        keep: impl Fn(&Reference) -> Option<String> + Send + 'static,
    ) -> Result<(), RegistryError> {
        let gate = self.alone().await;
        let (repo, digest) = (repo.clone(), digest.clone());
        self.blocking_with("deleting a manifest", move |inner| {
            let _gate = gate;
            // One that cannot be read any more can still be taken away.
            let found = inner.readable(&repo, &digest)?;
            if let Some(by) = inner.named_by(&repo, &digest)? {
                return Err(RegistryError::Denied(format!(
                    "manifest {digest} is part of index {by}; delete that first"
                )));
            }
            let tags = inner.tags_of(&repo, &digest).map_err(io("reading tags"))?;
            let all = tags.iter().cloned().map(Reference::Tag);
            let all = [Reference::Digest(digest.clone())].into_iter().chain(all);
            if let Some(why) = all.into_iter().find_map(|one| keep(&one)) {
                return Err(RegistryError::Denied(why));
            }
            let subject = found.map(|parsed| parsed.subject()).transpose()?.flatten();
            (|| {
                for tag in &tags {
                    inner.disk.remove(&inner.disk.tag(&repo, tag))?;
                }
                inner.disk.remove(&inner.disk.revision(&repo, &digest))?;
                if let Some(subject) = subject {
                    inner.disk.remove(&inner.disk.referrers(&repo, &subject).join(digest.hex()))?;
                }
                Ok(())
            })()
            .map_err(io("deleting a manifest"))
        })
        .await
    }
}

impl Inner {
    fn put_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<Put, RegistryError> {
        let digest = Digest::of(bytes);
        if let Reference::Digest(expected) = reference
            && *expected != digest
        {
            return Err(RegistryError::DigestMismatch {
                expected: expected.clone(),
                found: digest,
            });
        }
        let parsed = Parsed::read(media_type, bytes)?;
        let subject = parsed.subject()?;
        let missing = self.lease_below(repo, &parsed)?;
        if !missing.is_empty() {
            return Err(RegistryError::ManifestBlobUnknown(missing));
        }
        let size = bytes.len() as u64;
        if self.disk.size(&digest).map_err(io("storing a manifest"))?.is_none() {
            self.check_room(size)?;
        }
        let describe = subject.is_some().then(|| parsed.describe(media_type, &digest, size));
        let stored = (|| {
            // What is there may be damaged, also at the same size: a push mends it.
            if read_small(&self.disk.blob(&digest))?.is_some_and(|held| held == *bytes) {
                self.disk.touch(&digest, SystemTime::now())?;
            } else {
                self.disk.write(&self.disk.blob(&digest), bytes)?;
            }
            // The referrer's entry first: one without its revision is not listed.
            if let (Some(subject), Some(descriptor)) = (&subject, &describe) {
                let entry = self.disk.referrers(repo, subject).join(digest.hex());
                self.disk.write(&entry, &serde_json::to_vec(descriptor)?)?;
            }
            let revision = Revision { media_type: media_type.to_owned() };
            let revision = serde_json::to_vec(&revision)?;
            let path = self.disk.revision(repo, &digest);
            if read_small(&path)?.as_deref() != Some(&revision) {
                self.disk.write(&path, &revision)?;
            }
            if let Reference::Tag(tag) = reference {
                self.disk.write(&self.disk.tag(repo, tag), digest.as_str().as_bytes())?;
            }
            Ok(())
        })();
        stored.map_err(io("storing a manifest"))?;
        Ok(Put { digest, subject })
    }

    /// Renews the leases of everything a manifest names, and names what is not in the repository.
    fn lease_below(&self, repo: &RepoName, parsed: &Parsed) -> Result<Vec<Digest>, RegistryError> {
        let mut walk = Walk::default();
        self.lease_walk(repo, parsed, &mut walk)?;
        Ok(walk.missing)
    }

    fn lease_walk(
        &self,
        repo: &RepoName,
        parsed: &Parsed,
        walk: &mut Walk,
    ) -> Result<(), RegistryError> {
        let now = SystemTime::now();
        for blob in parsed.blobs() {
            let digest = blob.digest()?;
            if !walk.seen.insert(digest.clone()) {
                continue;
            }
            match self.linked_blob(repo, &digest) {
                Ok(size) if size == blob.size => {
                    self.disk.touch(&digest, now).map_err(io("renewing a lease"))?;
                }
                Ok(size) => {
                    return Err(RegistryError::ManifestInvalid(format!(
                        "the manifest says {} bytes for {digest}, which has {size}",
                        blob.size
                    )));
                }
                Err(RegistryError::BlobUnknown(_)) => walk.missing.push(digest),
                Err(error) => return Err(error),
            }
        }
        for child in parsed.children() {
            let digest = child.digest()?;
            if !walk.seen.insert(digest.clone()) {
                continue;
            }
            walk.manifests += 1;
            if walk.manifests > BELOW_MAX || walk.depth >= 8 {
                return Err(RegistryError::ManifestInvalid(format!(
                    "an index may have at most {BELOW_MAX} manifests below it, 8 deep"
                )));
            }
            match self.read_manifest(repo, &digest) {
                Ok(found) => {
                    if found.bytes.len() as u64 != child.size {
                        return Err(RegistryError::ManifestInvalid(format!(
                            "the index says {} bytes for {digest}, which has {}",
                            child.size,
                            found.bytes.len()
                        )));
                    }
                    walk.depth += 1;
                    let below = Parsed::read(&found.media_type, &found.bytes)?;
                    self.lease_walk(repo, &below, walk)?;
                    walk.depth -= 1;
                    self.disk.touch(&digest, now).map_err(io("renewing a lease"))?;
                }
                Err(RegistryError::ManifestUnknown(_)) => walk.missing.push(digest),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn tagged(&self, repo: &RepoName, tag: &Tag) -> std::io::Result<Option<Digest>> {
        let Some(text) = read_small(&self.disk.tag(repo, tag))? else { return Ok(None) };
        let digest = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        digest.map(Some).ok_or_else(|| damaged(format!("tag {tag} of {repo} holds no digest")))
    }

    fn resolve(&self, repo: &RepoName, reference: &Reference) -> Result<Digest, RegistryError> {
        match reference {
            Reference::Digest(digest) => Ok(digest.clone()),
            Reference::Tag(tag) => self
                .tagged(repo, tag)
                .map_err(io("reading a tag"))?
                .ok_or_else(|| RegistryError::ManifestUnknown(tag.to_string())),
        }
    }

    /// A manifest that is linked in `repo`, its bytes verified.
    pub(super) fn read_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Manifest, RegistryError> {
        let read = (|| {
            let Some(revision) = read_small(&self.disk.revision(repo, digest))? else {
                return Ok(None);
            };
            let revision: Revision = serde_json::from_slice(&revision)?;
            let bytes = std::fs::read(self.disk.blob(digest))?;
            if Digest::of(&bytes) != *digest {
                return Err(damaged(format!("the bytes of manifest {digest} are not its own")));
            }
            Ok(Some(Manifest {
                digest: digest.clone(),
                media_type: revision.media_type,
                bytes: bytes.into(),
            }))
        })();
        read.map_err(io("reading a manifest"))?
            .ok_or_else(|| RegistryError::ManifestUnknown(digest.to_string()))
    }

    fn leads_to(
        &self,
        repo: &RepoName,
        roots: Vec<Digest>,
        wanted: &Digest,
    ) -> Result<bool, RegistryError> {
        let (mut seen, mut next) = (BTreeSet::new(), roots);
        while let Some(digest) = next.pop() {
            // As many as a push takes below one manifest.
            if seen.len() > BELOW_MAX || !seen.insert(digest.clone()) {
                continue;
            }
            let found = match self.read_manifest(repo, &digest) {
                Ok(found) => found,
                Err(RegistryError::ManifestUnknown(_)) => continue,
                Err(error) => return Err(error),
            };
            let parsed = Parsed::read(&found.media_type, &found.bytes)?;
            if parsed.names(wanted) {
                return Ok(true);
            }
            next.extend(parsed.children().iter().filter_map(|child| child.digest().ok()));
        }
        Ok(false)
    }

    /// What a manifest of `repo` says; `None`, with a warning, when it is damaged.
    fn readable(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Parsed>, RegistryError> {
        let read = self
            .read_manifest(repo, digest)
            .and_then(|found| Parsed::read(&found.media_type, &found.bytes));
        match read {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error @ (RegistryError::Io { .. } | RegistryError::ManifestInvalid(_))) => {
                let error = crate::error::Chain(&error);
                tracing::warn!(%repo, %digest, %error, "a manifest cannot be read; it is passed over");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A manifest of `repo` that names `digest`. Reads them all; deletions are rare. One that is
    /// damaged names nothing.
    pub(super) fn named_by(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Option<Digest>, RegistryError> {
        for other in digests_in(&self.disk.revisions(repo)).map_err(io("reading a repository"))? {
            if self.readable(repo, &other)?.is_some_and(|parsed| parsed.names(digest)) {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    fn tags_of(&self, repo: &RepoName, digest: &Digest) -> std::io::Result<Vec<Tag>> {
        let mut tags = Vec::new();
        for name in super::disk::names_in(&self.disk.tags(repo))? {
            if let Ok(tag) = Tag::parse(&name)
                && self.tagged(repo, &tag)?.as_ref() == Some(digest)
            {
                tags.push(tag);
            }
        }
        Ok(tags)
    }
}

#[derive(Default)]
struct Walk {
    seen: BTreeSet<Digest>,
    missing: Vec<Digest>,
    manifests: usize,
    depth: usize,
}

fn damaged(what: String) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, what)
}
