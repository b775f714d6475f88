//! Lists: tags of a repository, repositories, referrers of a manifest. Sorted, in pages.

use super::disk::{digests_in, names_in, read_small};
use super::errors::{RegistryError, io};
use super::manifests::Descriptor;
use super::names::{RepoName, Tag};
use super::{Inner, Registry};
use berth_proto::ids::Digest;
use std::path::Path;

/// A page never has more entries, whatever was asked for: the answer is held in memory.
pub(super) const PAGE_MAX: usize = 10_000;
/// Referrers come with their annotations, so fewer of them.
const REFERRERS_MAX: usize = 500;
/// What clients take as a manifest, an index of referrers included.
const REFERRERS_BYTES_MAX: usize = 3 << 20;

/// Where a page begins and how long it is.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// At most so many; `None`: as many as the server gives.
    pub limit: Option<usize>,
    /// Begin after this entry; it need not exist.
    pub after: Option<String>,
}

impl Page {
    /// Cuts a sorted list; also tells whether there is more.
    pub(super) fn cut<T: AsRef<str>>(&self, sorted: Vec<T>) -> (Vec<T>, bool) {
        let limit = self.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let after = self.after.as_deref();
        let mut rest =
            sorted.into_iter().skip_while(|entry| after.is_some_and(|last| entry.as_ref() <= last));
        let page: Vec<T> = rest.by_ref().take(limit).collect();
        let more = limit > 0 && rest.next().is_some();
        (page, more)
    }
}

/// Referrers of a manifest.
#[derive(Debug, Clone, Default)]
pub(super) struct Referrers {
    pub(super) descriptors: Vec<Descriptor>,
    /// Continue after this digest.
    pub(super) next: Option<Digest>,
}

impl Registry {
    /// Tags of a repository, and whether there are more.
    ///
    /// # Errors
    /// [`RegistryError::NameUnknown`], [`RegistryError::Io`].
    pub async fn tags(
        &self,
        repo: &RepoName,
        page: Page,
    ) -> Result<(Vec<String>, bool), RegistryError> {
        let repo = repo.clone();
        self.blocking_with("listing tags", move |inner| {
            if !inner.is_repository(&repo) {
                return Err(RegistryError::NameUnknown(repo));
            }
            let mut tags = names_in(&inner.disk.tags(&repo)).map_err(io("listing tags"))?;
            tags.retain(|name| Tag::parse(name).is_ok());
            tags.sort();
            Ok(page.cut(tags))
        })
        .await
    }

    /// All repositories that hold a manifest, sorted.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub async fn repositories(&self) -> Result<Vec<RepoName>, RegistryError> {
        self.blocking("listing repositories", |inner| inner.disk.repositories()).await
    }

    /// Manifests of `repo` that name `subject` as theirs, which need not exist.
    pub(super) async fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        artifact_type: Option<String>,
        after: Option<Digest>,
    ) -> Result<Referrers, RegistryError> {
        let (repo, subject) = (repo.clone(), subject.clone());
        self.blocking("listing referrers", move |inner| {
            let folder = inner.disk.referrers(&repo, &subject);
            let mut digests = digests_in(&folder)?;
            digests.sort();
            let mut found = Referrers::default();
            let mut bytes = 0;
            let mut last = None;
            for digest in digests {
                if after.as_ref().is_some_and(|after| digest <= *after) {
                    continue;
                }
                let Some((descriptor, size)) = inner.referrer(&folder, &repo, &digest)? else {
                    continue;
                };
                if artifact_type.is_some() && descriptor.artifact_type != artifact_type {
                    continue;
                }
                bytes += size;
                let full = found.descriptors.len() >= REFERRERS_MAX || bytes > REFERRERS_BYTES_MAX;
                if full && last.is_some() {
                    found.next = last;
                    break;
                }
                found.descriptors.push(descriptor);
                last = Some(digest);
            }
            Ok(found)
        })
        .await
    }
}

impl Inner {
    /// Whether anything was pushed to it.
    pub(super) fn is_repository(&self, repo: &RepoName) -> bool {
        self.disk.revisions(repo).is_dir() || self.disk.blob_links(repo).is_dir()
    }

    fn referrer(
        &self,
        folder: &Path,
        repo: &RepoName,
        digest: &Digest,
    ) -> std::io::Result<Option<(Descriptor, usize)>> {
        // An entry without its revision is of a push that did not end, or of a deletion.
        if !self.disk.revision(repo, digest).exists() {
            return Ok(None);
        }
        let Some(bytes) = read_small(&folder.join(digest.hex()))? else { return Ok(None) };
        Ok(Some((serde_json::from_slice(&bytes)?, bytes.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_join_to_the_whole_list() {
        let all: Vec<String> = (0..25).map(|n| format!("{n:02}")).collect();
        let mut seen = Vec::new();
        let mut page = Page { limit: Some(7), after: None };
        loop {
            let (part, more) = page.cut(all.clone());
            seen.extend(part);
            if !more {
                break;
            }
            page.after = seen.last().cloned();
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn a_page_of_none_has_no_next() {
        let page = Page { limit: Some(0), after: None };
        assert_eq!(page.cut(vec!["a".to_owned()]), (Vec::new(), false));
    }
}
