//! Brings an image into the engine, and says how far it is, layer by layer.
//!
//! Nothing is asked of a registry when the image is here. What the engine lacks is brought first and
//! pulled then: an engine has one queue for the layers of all pulls, in which a slow one would hold up
//! all others. An image is pulled by its manifest's digest through the door and gets a name of ours,
//! which keeps it from the first `docker image prune`; the name with the door's port that the pull
//! gave it is taken away again, also when an earlier life of the agent left it.

use super::client::FetchError;
use super::door::{Door, Flow, Image, MARK, blobs_of};
use super::keep::{Keeper, NoEngineRoom};
use super::transfer::Seen;
use crate::engine::{Credentials, Engine, EngineError, ImageInfo, PullProgress};
use berth_agent_core::transfer::{Blob, Progress};
use berth_proto::ids::Digest;
use berth_proto::values::{PlatformImage, ResolvedImage};
use futures_util::StreamExt as _;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Between two words about how far it is.
const TELL: Duration = Duration::from_millis(500);
/// A larger configuration is not read into memory. Those of real images have some kilobytes.
const CONFIG_BYTES: u64 = 4 << 20;

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

/// Layers that images of the engine have, by the digests of their unpacked bytes.
async fn layers_held(engine: &dyn Engine) -> Result<BTreeSet<String>, EngineError> {
    let named = engine.images_named("").await?;
    let ids: BTreeSet<String> = named.into_iter().map(|(_, id)| id).collect();
    let mut held = BTreeSet::new();
    for id in ids {
        held.extend(engine.image(&id).await?.into_iter().flat_map(|image| image.layers));
    }
    Ok(held)
}

/// Which of an image's layers an engine lacks that has those in `held`. A configuration that does not
/// tell: none, and the engine asks for those that it does not find.
fn lacking(config: &[u8], layers: usize, held: &BTreeSet<String>) -> Vec<bool> {
    let json: serde_json::Value = serde_json::from_slice(config).unwrap_or_default();
    let unpacked = json["rootfs"]["diff_ids"].as_array().filter(|ids| ids.len() == layers);
    unpacked.map_or_else(
        || vec![false; layers],
        |ids| ids.iter().map(|id| id.as_str().is_some_and(|id| !held.contains(id))).collect(),
    )
}

/// Layers of an image, by the engine's short ids as well, and how much of each is known to be here.
struct Layers {
    blobs: Vec<Blob>,
    by_short: BTreeMap<String, usize>,
    here: Vec<u64>,
}

impl Layers {
    fn new(blobs: Vec<Blob>) -> Self {
        let short = |(i, b): (usize, &Blob)| (b.digest.short().to_owned(), i);
        let by_short = blobs.iter().enumerate().map(short).collect();
        Self { here: vec![0; blobs.len()], by_short, blobs }
    }

    fn take(&mut self, step: &PullProgress) {
        let Some(i) = self.by_short.get(&step.layer).copied() else { return };
        let size = self.blobs[i].size_bytes;
        match step.status.as_str() {
            "Already exists" | "Download complete" | "Verifying Checksum" | "Extracting"
            | "Pull complete" => self.here[i] = size,
            "Downloading" => {
                let here = step.current_bytes.unwrap_or(0).min(size);
                self.here[i] = self.here[i].max(here);
            }
            _ => {}
        }
    }

    /// How far it is, with what is on its way just now.
    fn word(&self, flow: impl Fn(&Digest) -> Option<Flow>) -> Word {
        let mut done = 0;
        let mut rate: u64 = 0;
        let mut part = None;
        for (i, blob) in self.blobs.iter().enumerate() {
            let flow = flow(&blob.digest).unwrap_or_default();
            if let Some((why, retry_ms)) = flow.trouble {
                return Word::Trouble(why, retry_ms);
            }
            let here = self.here[i].max(flow.here_bytes).min(blob.size_bytes);
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

/// Brings what the engine lacks of an image into the spool; answers with its layers.
async fn ahead(
    engine: &dyn Engine,
    door: &Door,
    (repository, manifest): (&str, &Digest),
    blobs: &[Blob],
    tell: &(dyn Fn(Word) + Send + Sync),
) -> Result<Layers, ImageError> {
    // The config is no layer that people count.
    let (config, rest) = blobs.split_at(blobs.len().min(1));
    let mut layers = Layers::new(rest.to_vec());
    let Some(config) = config.first().filter(|c| c.size_bytes <= CONFIG_BYTES) else {
        return Ok(layers);
    };
    let trouble = |seen| match seen {
        Seen::Trouble { why, retry_ms } => tell(Word::Trouble(why, retry_ms)),
        Seen::Progress(_) | Seen::Prefix(_) => {}
    };
    door.ahead(repository, manifest, config, &trouble).await.map_err(FetchError::from)?;
    let config = tokio::fs::read(door.spool().whole(&config.digest)).await;
    let config = config.map_err(FetchError::from)?;
    let lacking = lacking(&config, layers.blobs.len(), &layers_held(engine).await?);
    // One after the other, so that whoever waits for the same layer waits for no other.
    for (i, lacks) in lacking.into_iter().enumerate() {
        let blob = layers.blobs[i].clone();
        if lacks {
            let say = |seen| match seen {
                Seen::Progress(p) => tell(layers.word(|digest| {
                    (*digest == blob.digest).then(|| Flow {
                        here_bytes: p.done_bytes,
                        rate: p.rate_bytes_per_second,
                        ..Flow::default()
                    })
                })),
                Seen::Trouble { .. } | Seen::Prefix(_) => trouble(seen),
            };
            door.ahead(repository, manifest, &blob, &say).await.map_err(FetchError::from)?;
            layers.here[i] = blob.size_bytes;
        }
    }
    Ok(layers)
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
    let mut layers = ahead(engine, door, (&image.repository, digest), &blobs, tell).await?;
    let opened = door.begin(
        digest,
        Image {
            repository: image.repository.clone(),
            manifest,
            media_type,
            blobs: blobs.iter().map(|b| (b.digest.clone(), b.size_bytes)).collect(),
        },
    );
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
            _ = tick.tick() => tell(layers.word(|digest| door.flow(digest))),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_layers_that_no_image_of_the_engine_has_are_brought_ahead() {
        let held = BTreeSet::from(["sha256:base".to_owned(), "sha256:other".to_owned()]);
        let config = br#"{"rootfs":{"diff_ids":["sha256:base","sha256:new"]}}"#;
        assert_eq!(lacking(config, 2, &held), [false, true]);
        // What does not tell is left to the engine.
        assert_eq!(lacking(config, 3, &held), [false; 3]);
        assert_eq!(lacking(b"no json", 1, &held), [false]);
    }

    #[test]
    fn a_layer_counts_as_here_once_however_it_came() {
        let blob = |bytes: &[u8]| Blob { digest: Digest::of(bytes), size_bytes: 100 };
        let blobs = vec![blob(b"ahead"), blob(b"engine"), blob(b"door")];
        let mut layers = Layers::new(blobs.clone());
        layers.here[0] = 100;
        layers.take(&PullProgress {
            layer: blobs[1].digest.short().to_owned(),
            status: "Downloading".to_owned(),
            current_bytes: Some(60),
            total_bytes: Some(100),
        });
        let flow = |digest: &Digest| {
            (*digest == blobs[1].digest).then(|| Flow {
                here_bytes: 70,
                rate: 10,
                ..Flow::default()
            })
        };
        let Word::Progress(seen) = layers.word(flow) else { panic!("it goes on") };
        assert_eq!((seen.done_bytes, seen.total_bytes), (170, 300));
        assert_eq!((seen.part, seen.parts, seen.time_left_ms), (2, 3, 13_000));
    }
}
