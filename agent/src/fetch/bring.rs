//! Brings what a replica needs onto this host: its image into the engine, its model's files into a
//! folder.
//!
//! It starts, stops and removes no container. What is here already is not asked for again, of the
//! engine or of a registry; the same bytes are brought once however many replicas wait for them; and
//! transfers run side by side within a bound, one place of which no big one may take.

use super::artifact::Artifacts;
use super::client::{Client, FetchError};
use super::door::Door;
use super::images::{self, ImageError, Word};
use super::keep::{Keeper, image_name};
use super::spool::Spool;
use super::transfer::{Seen, Transfers};
use crate::config::Limits;
use crate::engine::{Engine, EngineError};
use crate::state::Shared;
use berth_agent_core::transfer::{Failure, Progress};
use berth_proto::api;
use berth_proto::ids::Digest;
use berth_proto::values::{AssignmentBody, PlatformImage, ResolvedArtifact};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use tokio::sync::Semaphore;

/// Transfers at once. More gain nothing on one link and make each of them later.
const PLACES: usize = 4;
/// Places that big transfers may take: one is left, so that a small one never waits for them.
const BIG_PLACES: usize = 3;
/// From here on a transfer is big: at 10 MB/s it takes half a minute.
const BIG_BYTES: u64 = 256 << 20;

/// What is said while bytes are on their way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// How far it is.
    Progress(api::Progress),
    /// It does not go on just now and will be tried again.
    Waiting {
        /// Why.
        why: String,
        /// When it is tried again.
        retry_ms: u64,
    },
}

/// Why the bytes are not here.
#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// The image.
    #[error("the image cannot be brought")]
    Image(#[source] ImageError),
    /// The model.
    #[error("the model cannot be brought")]
    Artifact(#[source] FetchError),
    /// The agent stops.
    #[error("the agent stops")]
    Stopping,
}

impl BringError {
    /// The stable word for it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Image(ImageError::Engine(error)) if error.is_engine_away() => "ENGINE_AWAY",
            Self::Image(
                ImageError::Room(_)
                | ImageError::Fetch(FetchError::Transfer(Failure::NoRoom { .. })),
            )
            | Self::Artifact(FetchError::Transfer(Failure::NoRoom { .. })) => "DISK_SHORT",
            Self::Image(_) => "PULL_FAILED",
            Self::Artifact(_) => "FETCH_FAILED",
            Self::Stopping => "STOPPING",
        }
    }
}

/// Brings images and artifacts.
pub struct Fetcher {
    engine: Arc<dyn Engine>,
    artifacts: Artifacts,
    door: Door,
    places: Semaphore,
    big_places: Semaphore,
    under_way: Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>,
    /// Artifacts of the current set.
    wanted: Mutex<BTreeSet<Digest>>,
}

fn told(what: &str, progress: &Progress) -> Told {
    Told::Progress(api::Progress {
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        rate_bytes_per_second: progress.rate_bytes_per_second,
        what: what.to_owned(),
        part: progress.part,
        parts: progress.parts,
        time_left_ms: progress.time_left_ms,
    })
}

/// Where models are, in the agent's folder.
pub const MODELS: &str = "models";

impl Fetcher {
    /// Brings through `client`, into `models/` and `pull/` of the agent's folder, and opens the
    /// engine's door.
    ///
    /// # Errors
    /// When a folder cannot be made or nothing can be listened on.
    pub async fn open(
        shared: Arc<Shared>,
        engine: Arc<dyn Engine>,
        client: Client,
        limits: Limits,
    ) -> std::io::Result<Self> {
        let root = shared.store.folder().join(MODELS);
        let trees = root.join("trees");
        std::fs::create_dir_all(&trees)?;
        let left = trees.clone();
        let swept = tokio::task::spawn_blocking(move || super::artifact::sweep(&left)).await;
        if let Err(error) = swept.map_err(std::io::Error::other).flatten() {
            tracing::warn!(%error, "what a crash has left of models stays");
        }
        let blobs = Spool::open(root.join("blobs").join("sha256"))?;
        let pull = Spool::open(shared.store.folder().join("pull"))?;
        let transfers = Arc::new(Transfers::new(client, limits.bytes_per_second));
        let spools = vec![blobs.clone(), pull.clone()];
        let bounds = (limits.keep_free_bytes, limits.keep_unused_ms);
        let keeper = Keeper::new(shared, Arc::clone(&engine), root, spools, bounds);
        let keeper = Arc::new(keeper);
        let room = Arc::<Keeper>::clone(&keeper);
        let door = Door::open(Arc::clone(&transfers), room, pull).await?;
        tokio::spawn(Arc::clone(&keeper).run());
        Ok(Self {
            engine,
            artifacts: Artifacts { transfers, keeper, blobs, trees },
            door,
            places: Semaphore::new(PLACES),
            big_places: Semaphore::new(BIG_PLACES),
            under_way: Mutex::default(),
            wanted: Mutex::default(),
        })
    }

    /// The folder of a model's files; it is there once they were brought.
    #[must_use]
    pub fn tree(&self, artifact: &ResolvedArtifact) -> PathBuf {
        let path = self.artifacts.trees.join(artifact.digest.hex());
        std::path::absolute(&path).unwrap_or(path)
    }

    /// The set has changed: what may be asked for from now on.
    pub fn wanted<'a>(&self, bodies: impl Iterator<Item = &'a AssignmentBody>) {
        let (mut manifests, mut artifacts) = (BTreeSet::new(), BTreeSet::new());
        for body in bodies {
            let platforms = body.source.image.platforms.iter();
            manifests.extend(platforms.map(|p| p.manifest_digest.clone()));
            artifacts.extend(body.source.artifact.iter().map(|a| a.digest.clone()));
        }
        self.door.allow(manifests);
        *self.wanted.lock() = artifacts;
    }

    /// The engine's id of an image that is here; `None`: it must be brought.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn image_id(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
    ) -> Result<Option<String>, EngineError> {
        let name = image_name(body, &platform.config_digest);
        Ok(images::find(&*self.engine, platform, &name).await?.map(|found| found.id))
    }

    /// Takes away the names of ours that images of the engine have: nothing is to stay here.
    pub async fn forget_images(&self) {
        self.artifacts.keeper.forget_images().await;
    }

    /// Makes sure that image and model of `body` are here and verified.
    ///
    /// # Errors
    /// When they do not come, are wrong, or there is no room. Called again it goes on where it was.
    pub async fn bring(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
        tell: impl Fn(Told) + Send + Sync,
    ) -> Result<(), BringError> {
        // One transfer of the same bytes at a time; whoever waits finds them here and takes no place
        // among the transfers meanwhile.
        let mut same = vec![self.one_at_a_time(platform.config_digest.as_str())];
        same.extend(body.source.artifact.iter().map(|a| self.one_at_a_time(a.digest.as_str())));
        let mut turns = Vec::new();
        for one in &same {
            turns.push(one.lock().await);
        }
        let artifact_bytes = body.source.artifact.as_ref().map_or(0, |a| a.size_bytes);
        let big = platform.size_bytes.saturating_add(artifact_bytes) >= BIG_BYTES;
        let _big_place = match big {
            true => Some(self.big_places.acquire().await.map_err(|_| BringError::Stopping)?),
            false => None,
        };
        let _place = self.places.acquire().await.map_err(|_| BringError::Stopping)?;
        let name = image_name(body, &platform.config_digest);
        let say = |word| match word {
            Word::Progress(progress) => tell(told("image", &progress)),
            Word::Trouble(why, retry_ms) => tell(Told::Waiting { why, retry_ms }),
        };
        let keeper = &self.artifacts.keeper;
        let source = (&body.source.image, platform);
        images::ensure(&*self.engine, &self.door, &name, source, keeper, &say)
            .await
            .map_err(BringError::Image)?;
        if let Some(artifact) = &body.source.artifact {
            let say = |seen| match seen {
                Seen::Progress(progress) => tell(told("artifact", &progress)),
                Seen::Trouble { why, retry_ms } => tell(Told::Waiting { why, retry_ms }),
                Seen::Prefix(_) => {}
            };
            let wanted = || self.wanted.lock().contains(&artifact.digest);
            self.artifacts
                .fetch(&artifact.repository, &artifact.digest, &wanted, &say)
                .await
                .map_err(BringError::Artifact)?;
        }
        keeper.brought(body, &platform.config_digest, platform.size_bytes).await;
        Ok(())
    }

    /// The lock of what is fetched under a digest.
    fn one_at_a_time(&self, digest: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.under_way.lock();
        all.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = all.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        all.insert(digest.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

#[cfg(test)]
#[path = "bring_tests.rs"]
mod tests;
