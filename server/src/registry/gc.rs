//! The collection: what no root reaches and nobody asked for lately goes.
//!
//! Roots are the manifests the caller names (versions, retained releases, placements) and every tag.
//! From them everything is kept that can be reached: manifests of indexes, configs, layers, subjects,
//! and referrers of what is kept. So is what is leased: pushed, asked for by HEAD or mounted within
//! [`Settings::lease`](super::Settings).
//!
//! It never stops a push. Marking takes no lock. Each small batch of deletions holds the gate alone
//! and looks at every lease again; a push holds the gate shared while it checks that something is
//! there and renews its lease. So either the push comes first and the collection sees a fresh lease,
//! or the deletion comes first and the push is told to send the blob. Any doubt while marking, such
//! as a manifest that cannot be read, ends the collection before it deletes.
//!
//! Whoever makes an old manifest a root renews its lease first
//! ([`Registry::renew_manifest`]), as a collection that is under way does not see the new root.

use super::disk::{digests_in, names_in};
use super::errors::{RegistryError, io};
use super::manifests::Parsed;
use super::names::{RepoName, Tag};
use super::{Inner, Registry, add};
use berth_proto::ids::Digest;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Deletions per turn at the gate: some milliseconds, which is what a push may have to wait.
const BATCH: usize = 64;
/// Entries of each list in the result; the sums count all.
const LISTED_MAX: usize = 10_000;

/// What a collection deleted, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Nothing was deleted: a dry run.
    pub dry_run: bool,
    /// Manifests taken out of repositories; the first 10,000.
    pub manifests: Vec<(RepoName, Digest)>,
    /// All of them.
    pub manifests_total: u64,
    /// Blobs (manifests' bytes among them) with their sizes; the first 10,000.
    pub blobs: Vec<(Digest, u64)>,
    /// All of them.
    pub blobs_total: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Abandoned uploads that were ended; 0 in a dry run.
    pub uploads: u64,
    /// Blobs no root reaches that are kept because of a lease.
    pub leased: u64,
    /// Blobs kept because a root reaches them.
    pub kept: u64,
    /// Roots that are no manifest here: to be looked at.
    pub missing_roots: Vec<Digest>,
}

/// What no root reaches and whose lease ended.
#[derive(Default)]
struct Dead {
    /// Indexes before manifests, so that nothing readable ever lacks a part.
    manifests: Vec<(RepoName, Digest)>,
    blobs: Vec<(Digest, u64)>,
    links: Vec<(RepoName, Digest)>,
    stray: Vec<(RepoName, Digest, Digest)>,
}

/// All that is linked.
#[derive(Default)]
struct Inventory {
    repos: Vec<RepoName>,
    /// A repository for each manifest.
    manifests: BTreeMap<Digest, RepoName>,
    tagged: Vec<Digest>,
    referrers: BTreeMap<Digest, Vec<Digest>>,
    /// Entries of referrers (repository, subject, referrer) that are no manifests there: of pushes
    /// and deletions that a crash ended.
    stray: Vec<(RepoName, Digest, Digest)>,
}

impl Registry {
    /// Ends abandoned uploads and deletes what neither `roots`, a tag nor a lease keeps.
    ///
    /// One collection at a time.
    ///
    /// # Errors
    /// [`RegistryError::TooMany`] while another one runs; [`RegistryError::Io`]. When marking failed
    /// nothing was deleted; when deleting failed what is left is consistent.
    pub async fn collect(
        &self,
        roots: Vec<Digest>,
        dry_run: bool,
    ) -> Result<Collected, RegistryError> {
        let Ok(_one) = self.0.collecting.try_lock() else {
            return Err(RegistryError::TooMany("a collection is under way"));
        };
        let mut done = Collected { dry_run, ..Collected::default() };
        if !dry_run {
            done.uploads = self.end_abandoned_uploads().await?;
        }
        let (dead, mut done) = self
            .blocking_with("marking what is in use", move |inner| {
                let inventory = inner.inventory().map_err(io("reading the repositories"))?;
                let marked = inner.mark(&inventory, roots, &mut done)?;
                let mut dead = inner.dead(&inventory, &marked, &mut done)?;
                dead.stray = inventory.stray;
                Ok((dead, done))
            })
            .await?;
        if dry_run {
            for (repo, digest) in dead.manifests {
                done.note_manifest(repo, digest);
            }
            for (digest, size) in dead.blobs {
                done.note_blob(digest, size);
            }
            return Ok(done);
        }
        done = self.sweep(dead.manifests, done, Inner::unlink_manifest).await?;
        done = self.sweep(dead.links, done, Inner::unlink_blob).await?;
        done = self.sweep(dead.blobs, done, Inner::delete_blob_file).await?;
        done = self.sweep(dead.stray, done, Inner::remove_stray).await?;
        add(&self.0.stats.collections, 1);
        add(&self.0.stats.collected_bytes, done.bytes);
        Ok(done)
    }

    async fn sweep<T: Clone + Send + 'static>(
        &self,
        dead: Vec<T>,
        mut done: Collected,
        delete: fn(&Inner, T, &mut Collected) -> std::io::Result<()>,
    ) -> Result<Collected, RegistryError> {
        for batch in dead.chunks(BATCH) {
            let batch = batch.to_vec();
            let gate = self.alone().await;
            done = self
                .blocking("collecting", move |inner| {
                    let _gate = gate;
                    for one in batch {
                        delete(inner, one, &mut done)?;
                    }
                    Ok(done)
                })
                .await?;
        }
        Ok(done)
    }
}

impl Collected {
    fn note_manifest(&mut self, repo: RepoName, digest: Digest) {
        self.manifests_total += 1;
        if self.manifests.len() < LISTED_MAX {
            self.manifests.push((repo, digest));
        }
    }
    fn note_blob(&mut self, digest: Digest, size: u64) {
        self.blobs_total += 1;
        self.bytes += size;
        if self.blobs.len() < LISTED_MAX {
            self.blobs.push((digest, size));
        }
    }
}

impl Inner {
    fn inventory(&self) -> std::io::Result<Inventory> {
        let mut all = Inventory { repos: self.disk.all_repositories()?, ..Inventory::default() };
        for repo in &all.repos {
            for digest in digests_in(&self.disk.revisions(repo))? {
                all.manifests.insert(digest, repo.clone());
            }
            for name in names_in(&self.disk.tags(repo))? {
                if let Ok(tag) = Tag::parse(&name) {
                    all.tagged.extend(self.tagged(repo, &tag)?);
                }
            }
            for subject in digests_in(&self.disk.all_referrers(repo))? {
                for by in digests_in(&self.disk.referrers(repo, &subject))? {
                    if self.disk.revision(repo, &by).exists() {
                        all.referrers.entry(subject.clone()).or_default().push(by);
                    } else {
                        all.stray.push((repo.clone(), subject.clone(), by));
                    }
                }
            }
        }
        Ok(all)
    }

    fn mark(
        &self,
        inventory: &Inventory,
        roots: Vec<Digest>,
        done: &mut Collected,
    ) -> Result<BTreeSet<Digest>, RegistryError> {
        let missing = |root: &&Digest| !inventory.manifests.contains_key(*root);
        done.missing_roots = roots.iter().filter(missing).take(LISTED_MAX).cloned().collect();
        let mut open = roots;
        open.extend(inventory.tagged.iter().cloned());
        for digest in inventory.manifests.keys() {
            // A leased manifest keeps what is below it, however old that is.
            if !self.is_stale(digest).map_err(io("reading a lease"))? {
                open.push(digest.clone());
            }
        }
        let mut marked = BTreeSet::new();
        while let Some(digest) = open.pop() {
            if !marked.insert(digest.clone()) {
                continue;
            }
            let Some(repo) = inventory.manifests.get(&digest) else { continue };
            let found = match self.read_manifest(repo, &digest) {
                Ok(found) => found,
                // Deleted since it was listed.
                Err(RegistryError::ManifestUnknown(_)) => continue,
                Err(error) => return Err(error),
            };
            let parsed = Parsed::read(&found.media_type, &found.bytes)?;
            for below in parsed.blobs().chain(parsed.children()) {
                open.push(below.digest()?);
            }
            open.extend(parsed.subject()?);
            open.extend(inventory.referrers.get(&digest).into_iter().flatten().cloned());
        }
        Ok(marked)
    }

    fn dead(
        &self,
        inventory: &Inventory,
        marked: &BTreeSet<Digest>,
        done: &mut Collected,
    ) -> Result<Dead, RegistryError> {
        let reading = || io("reading the repositories");
        let mut dead = Dead::default();
        let mut stored = BTreeMap::new();
        for folder in names_in(&self.disk.blobs()).map_err(reading())? {
            for digest in digests_in(&self.disk.blobs().join(folder)).map_err(reading())? {
                if marked.contains(&digest) {
                    done.kept += 1;
                } else if self.is_stale(&digest).map_err(reading())? {
                    let size = self.disk.size(&digest).map_err(reading())?.unwrap_or(0);
                    stored.insert(digest.clone(), size);
                } else {
                    done.leased += 1;
                }
            }
        }
        let mut plain = Vec::new();
        for repo in &inventory.repos {
            for digest in digests_in(&self.disk.revisions(repo)).map_err(reading())? {
                if !stored.contains_key(&digest) {
                    continue;
                }
                let found = self.read_manifest(repo, &digest)?;
                let index = !Parsed::read(&found.media_type, &found.bytes)?.children().is_empty();
                let list = if index { &mut dead.manifests } else { &mut plain };
                list.push((repo.clone(), digest));
            }
            for digest in digests_in(&self.disk.blob_links(repo)).map_err(reading())? {
                if stored.contains_key(&digest) {
                    dead.links.push((repo.clone(), digest));
                }
            }
        }
        dead.manifests.append(&mut plain);
        dead.blobs = stored.into_iter().collect();
        Ok(dead)
    }

    /// Whether a blob's lease ended. One that is not stored, or was written in what now is the
    /// future, is not stale.
    fn is_stale(&self, digest: &Digest) -> std::io::Result<bool> {
        let found = match std::fs::metadata(self.disk.blob(digest)) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(found.modified()?.elapsed().is_ok_and(|age| age >= self.settings.lease))
    }

    fn unlink_manifest(
        &self,
        (repo, digest): (RepoName, Digest),
        done: &mut Collected,
    ) -> std::io::Result<()> {
        if !self.is_stale(&digest)? {
            return Ok(());
        }
        let subject = self
            .read_manifest(&repo, &digest)
            .and_then(|found| Parsed::read(&found.media_type, &found.bytes)?.subject())
            .ok()
            .flatten();
        if self.disk.remove(&self.disk.revision(&repo, &digest))? {
            if let Some(subject) = subject {
                let folder = self.disk.referrers(&repo, &subject);
                self.disk.remove(&folder.join(digest.hex()))?;
                remove_empty(&folder);
            }
            done.note_manifest(repo, digest);
        }
        Ok(())
    }

    fn remove_stray(
        &self,
        (repo, subject, by): (RepoName, Digest, Digest),
        _: &mut Collected,
    ) -> std::io::Result<()> {
        if !self.disk.revision(&repo, &by).exists() {
            let folder = self.disk.referrers(&repo, &subject);
            self.disk.remove(&folder.join(by.hex()))?;
            remove_empty(&folder);
        }
        Ok(())
    }

    fn unlink_blob(
        &self,
        (repo, digest): (RepoName, Digest),
        _: &mut Collected,
    ) -> std::io::Result<()> {
        if self.is_stale(&digest)? {
            self.disk.remove(&self.disk.blob_link(&repo, &digest))?;
        }
        Ok(())
    }

    fn delete_blob_file(
        &self,
        (digest, size): (Digest, u64),
        done: &mut Collected,
    ) -> std::io::Result<()> {
        if self.is_stale(&digest)? {
            // Not made durable one by one: a blob that a power cut brings back is unlinked, and the
            // next collection finds it.
            self.disk.change()?;
            std::fs::remove_file(self.disk.blob(&digest))?;
            done.note_blob(digest, size);
        }
        Ok(())
    }
}

/// A folder that is not empty stays.
fn remove_empty(folder: &Path) {
    let _ = std::fs::remove_dir(folder);
}
