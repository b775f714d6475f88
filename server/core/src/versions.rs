//! What needs a model's version.

use crate::objects::Deployment;
use crate::view::View;
use berth_proto::api::ModelVersion;
use std::sync::Arc;

/// What needs a version, so that it cannot be deleted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionUser {
    /// An alias names it.
    #[error("alias @{0}")]
    Alias(String),
    /// A release of this deployment runs it, or could again.
    #[error("deployment {0}")]
    Deployment(String),
    /// This version tells of it as what it was made from.
    #[error("{0}, made from it")]
    Child(String),
}

impl View {
    /// What needs a version, so that it cannot be deleted.
    #[must_use]
    pub fn user_of_version(&self, model: &str, version: &str) -> Option<VersionUser> {
        let version = self.version(model, version)?.record.version.as_ref()?;
        let aliases = &self.model(&version.namespace, &version.model)?.record.aliases;
        if let Some((alias, _)) = aliases.iter().find(|(_, to)| **to == version.version) {
            return Some(VersionUser::Alias(alias.clone()));
        }
        let runs = |deployment: &&Arc<Deployment>| {
            self.releases_of(&deployment.uid).any(|release| {
                let artifact = release.source.artifact.as_ref().map(|a| &a.digest);
                // A version may be an image of its own as well as a model that a runtime's image loads.
                let all = artifact.into_iter().chain([&release.source.image.digest]);
                all.into_iter().any(|digest| digest.as_str() == version.digest)
            })
        };
        if let Some(deployment) = self.deployments().find(runs) {
            return Some(VersionUser::Deployment(deployment.name.to_string()));
        }
        let whole = format!("{}:{}", version.model, version.version);
        let made_from_it = |other: &&ModelVersion| {
            other.namespace == version.namespace
                && other.lineage.as_ref().is_some_and(|lineage| lineage.parent == whole)
        };
        let mut others = self.versions().filter_map(|kept| kept.record.version.as_ref());
        let child = others.find(made_from_it)?;
        Some(VersionUser::Child(format!("{}:{}", child.model, child.version)))
    }
}
