//! Brings an image into the engine, and says how far it is, layer by layer.
//!
//! Nothing is asked of a registry when the image is here. An image is pulled by its manifest's digest
//! through the door and gets a name of ours, which keeps it from the first `docker image prune`; the
//! name with the door's port that the pull gave it is taken away again, also when an earlier life of
//! the agent left it.

use super::client::FetchError;
use super::door::{Door, Image, MARK, blobs_of};
use super::keep::{Keeper, NoEngineRoom};
use crate::engine::{Credentials, Engine, EngineError, ImageInfo, PullProgress};
use berth_agent_core::transfer::{Blob, Progress};
use berth_proto::values::{PlatformImage, ResolvedImage};
use futures_util::StreamExt as _;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Between two words about how far it is.
const TELL: Duration = Duration::from_millis(500);

/// Why an image is not here.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The registry or the disk.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The engine's disk.
    #[error(transparent)]
    Room(#[from] NoEngineRoom),
    /// A blob did not come; the engine only saw that its bytes ended.
    #[error("{0}")]
    Blob(String),
    /// The engine says it is there and does not find it.
    #[error("the engine has pulled {0} and does not find it under its id")]
    Missing(String),
}

/// What is said while it is brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// How far.
    Progress(Progress),
    /// Why not now, and when again.
    Trouble(String, u64),
}

/// Looks an image up by all the ways engines name it.
///
/// # Errors
/// When the engine does not answer.
pub async fn find(
    engine: &dyn Engine,
    platform: &PlatformImage,
    name: &str,
) -> Result<Option<ImageInfo>, EngineError> {
    // Engines with the containerd store name an image by its manifest.
    for reference in [platform.config_digest.as_str(), platform.manifest_digest.as_str(), name] {
        if let Some(found) = engine.image(reference).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

async fn keep_name(engine: &dyn Engine, found: &ImageInfo, name: &str) -> Result<(), EngineError> {
    if !found.tags.iter().any(|tag| tag == name) {
        let (repository, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
        engine.tag(&found.id, repository, tag).await?;
    }
    let ours = |name: &&String| {
        let rest = name.strip_prefix("127.0.0.1:").and_then(|rest| rest.split_once('/'));
        rest.is_some_and(|(_, path)| path.starts_with(&format!("{MARK}/")))
    };
    for left in found.repo_digests.iter().chain(&found.tags).filter(ours) {
        engine.remove_image(left).await?;
    }
    Ok(())
}

/// Layers of a pull by the engine's short ids, and how far it says each is.
struct Layers {
    blobs: Vec<Blob>,
    by_short: BTreeMap<String, usize>,
    engine: Vec<u64>,
}

impl Layers {
    fn new(blobs: Vec<Blob>) -> Self {
        let short = |(i, b): (usize, &Blob)| (b.digest.short().to_owned(), i);
        let by_short = blobs.iter().enumerate().map(short).collect();
        Self { engine: vec![0; blobs.len()], by_short, blobs }
    }

    fn take(&mut self, step: &PullProgress) {
        let Some(i) = self.by_short.get(&step.layer).copied() else { return };
        let size = self.blobs[i].size_bytes;
        match step.status.as_str() {
            "Already exists" | "Download complete" | "Verifying Checksum" | "Extracting"
            | "Pull complete" => self.engine[i] = size,
            "Downloading" => {
                let here = step.current_bytes.unwrap_or(0).min(size);
                self.engine[i] = self.engine[i].max(here);
            }
            _ => {}
        }
    }

    fn word(&self, door: &Door) -> Word {
        let mut done = 0;
        let mut rate: u64 = 0;
        let mut part = None;
        for (i, blob) in self.blobs.iter().enumerate() {
            let flow = door.flow(&blob.digest).unwrap_or_default();
            if let Some((why, retry_ms)) = flow.trouble {
                return Word::Trouble(why, retry_ms);
            }
            let here = self.engine[i].max(flow.here_bytes).min(blob.size_bytes);
            done += here;
            rate += flow.rate;
            if here < blob.size_bytes && part.is_none() {
                part = Some(i);
            }
        }
        let total: u64 = self.blobs.iter().map(|b| b.size_bytes).sum();
        let left = total.saturating_sub(done);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Word::Progress(Progress {
            done_bytes: done,
            total_bytes: total,
            rate_bytes_per_second: rate,
            part: count(part.map_or(self.blobs.len(), |i| i + 1)),
            parts: count(self.blobs.len()),
            time_left_ms: left.saturating_mul(1_000).checked_div(rate).unwrap_or(0),
        })
    }
}

/// Makes sure that an image is here under `name`; answers with its id.
///
/// # Errors
/// When the engine cannot bring it. Called again it goes on where it was.
pub async fn ensure(
    engine: &dyn Engine,
    door: &Door,
    name: &str,
    (image, platform): (&ResolvedImage, &PlatformImage),
    keeper: &Arc<Keeper>,
    tell: &(dyn Fn(Word) + Send + Sync),
) -> Result<String, ImageError> {
    if let Some(found) = find(engine, platform, name).await? {
        keep_name(engine, &found, name).await?;
        return Ok(found.id);
    }
    let digest = &platform.manifest_digest;
    let (manifest, media_type) = door.client().manifest(&image.repository, digest).await?;
    let blobs = blobs_of(&manifest)?;
    let all: Vec<_> = blobs.iter().map(|b| b.digest.clone()).collect();
    keeper.comes(digest, &all).await;
    let held = keeper.hold(all.clone());
    // Before the first byte.
    keeper.engine_room(blobs.iter().map(|b| b.size_bytes).sum()).await?;
    let opened = door.begin(
        digest,
        Image {
            repository: image.repository.clone(),
            manifest,
            media_type,
            blobs: blobs.iter().map(|b| (b.digest.clone(), b.size_bytes)).collect(),
        },
    );
    // The config is no layer that people count.
    let mut layers = Layers::new(blobs.into_iter().skip(1).collect());
    let through = door.reference(&image.repository, digest);
    let credentials =
        Credentials { username: "berth".to_owned(), password: door.password().to_owned() };
    let mut pull = engine.pull(&through, Some(credentials));
    let mut tick = tokio::time::interval(TELL);
    // Words are about now: a late one is not made up for.
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let pulled = loop {
        tokio::select! {
            // Cancel-safe, both.
            step = pull.next() => match step {
                Some(Ok(step)) => layers.take(&step),
                Some(Err(error)) => break Err(error),
                None => break Ok(()),
            },
            _ = tick.tick() => tell(layers.word(door)),
        }
    };
    drop(pull);
    if let Err(error) = pulled {
        // What stopped a blob says more than the engine's "unexpected EOF".
        let why = |digest| door.flow(digest)?.ended?.err();
        return Err(all.iter().find_map(why).map_or(ImageError::Engine(error), ImageError::Blob));
    }
    let found = match engine.image(&through).await? {
        Some(found) => Some(found),
        None => find(engine, platform, name).await?,
    };
    let found = found.ok_or_else(|| ImageError::Missing(through.clone()))?;
    keep_name(engine, &found, name).await?;
    engine.remove_image(&through).await?;
    drop((opened, held));
    door.drop_blobs(all).await;
    Ok(found.id)
}
