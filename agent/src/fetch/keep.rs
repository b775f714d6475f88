//! What is kept on this host's disk, and what goes when it is short.
//!
//! A record beside the models says which tree and which image name was brought for which deployment
//! and when it was needed last; [`berth_agent_core::gc`] decides by it. Only trees and blobs of our own
//! folder and image names we gave ourselves ever go, and never forced: an image that a container uses
//! stays whatever the record says. A record that is lost makes everything look just used.

use super::artifact::GOING;
use super::spool::Spool;
use super::transfer::Room;
use crate::engine::Engine;
use crate::facts::{disk_free, disk_free_at};
use crate::state::{Shared, wall_now};
use async_trait::async_trait;
use berth_agent_core::gc::{self, Item, Rules};
use berth_proto::ids::{Digest, Wall};
use berth_proto::quantity::human_bytes;
use berth_proto::values::AssignmentBody;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The disk is looked at so often without being short.
const PERIOD: Duration = Duration::from_secs(3600);

/// One line of the record.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Entry {
    deployment: String,
    used_unix_ms: i64,
    #[serde(default)]
    bytes: u64,
}

/// The record.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Record {
    /// By the manifest's digest, in hex.
    #[serde(default)]
    trees: BTreeMap<String, Entry>,
    /// By our own name, `berth.local/..`.
    #[serde(default)]
    images: BTreeMap<String, Entry>,
    /// What is on its way: a manifest's blobs, by its digest, all in hex. Kept as long as the set names
    /// the manifest, so that no try that failed and no restart makes a transfer begin anew.
    #[serde(default)]
    coming: BTreeMap<String, BTreeSet<String>>,
}

/// Keeps the books of the disk.
pub struct Keeper {
    shared: Arc<Shared>,
    engine: Arc<dyn Engine>,
    root: PathBuf,
    spools: Vec<Spool>,
    keep_free_bytes: u64,
    keep_unused_ms: u64,
    record: Mutex<Record>,
    held: Arc<Mutex<BTreeMap<Digest, u32>>>,
    /// One write of the record at a time.
    writing: tokio::sync::Mutex<()>,
    /// One eviction at a time.
    turn: tokio::sync::Mutex<()>,
}

/// Blobs that must not go while this lives.
pub struct Hold {
    keeper: Arc<Keeper>,
    digests: Vec<Digest>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.keeper.held.lock();
        for digest in &self.digests {
            if let Some(count) = held.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    held.remove(digest);
                }
            }
        }
    }
}

/// The name we give an image.
#[must_use]
pub fn image_name(body: &AssignmentBody, config: &Digest) -> String {
    format!("berth.local/{}:{}", body.deployment, config.short())
}

impl Keeper {
    /// Keeps the books of `root` (`trees/`, the record) and of the blobs in `spools`.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        engine: Arc<dyn Engine>,
        root: PathBuf,
        spools: Vec<Spool>,
        (keep_free_bytes, keep_unused_ms): (u64, u64),
    ) -> Self {
        let record = read(&root);
        Self {
            shared,
            engine,
            root,
            spools,
            keep_free_bytes,
            keep_unused_ms,
            record: Mutex::new(record),
            held: Arc::default(),
            writing: tokio::sync::Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// These blobs stay as long as the answer lives.
    #[must_use]
    pub fn hold(self: &Arc<Self>, digests: Vec<Digest>) -> Hold {
        let mut held = self.held.lock();
        for digest in &digests {
            *held.entry(digest.clone()).or_default() += 1;
        }
        drop(held);
        Hold { keeper: Arc::clone(self), digests }
    }

    /// What is kept free on the agent's disk.
    #[must_use]
    pub fn keep_free_bytes(&self) -> u64 {
        self.keep_free_bytes
    }

    /// Blobs of a manifest are about to come: they stay, whole or not, as long as the set names it.
    pub async fn comes(&self, manifest: &Digest, blobs: &[Digest]) {
        let blobs = blobs.iter().map(|b| b.hex().to_owned()).collect();
        let held = self.record.lock().coming.insert(manifest.hex().to_owned(), blobs);
        if held.is_none() {
            self.write().await;
        }
    }

    /// Image and model of `body` are here: written down before they are used.
    pub async fn brought(&self, body: &AssignmentBody, config: &Digest, image_bytes: u64) {
        let entry = |bytes: u64| Entry {
            deployment: body.deployment_uid.to_string(),
            used_unix_ms: wall_now().0,
            bytes,
        };
        {
            let mut record = self.record.lock();
            record.images.insert(image_name(body, config), entry(image_bytes));
            if let Some(artifact) = &body.source.artifact {
                let entry = entry(artifact.size_bytes);
                record.trees.insert(artifact.digest.hex().to_owned(), entry);
            }
            for manifest in manifests(body) {
                record.coming.remove(manifest);
            }
        }
        self.write().await;
    }

    async fn write(&self) {
        let _one = self.writing.lock().await;
        let record = self.record.lock().clone();
        let root = self.root.clone();
        let written = tokio::task::spawn_blocking(move || write(&root, &record)).await;
        if let Err(error) = written.map_err(io::Error::other).flatten() {
            tracing::warn!(%error, "the record of what is kept cannot be written");
        }
    }

    /// Throws away, now and then, what nobody has needed for long. Runs for ever.
    pub async fn run(self: Arc<Self>) {
        let mut tick = tokio::time::interval(PERIOD);
        // A late look is not made up for by two at once.
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.evict(0).await;
        }
    }

    /// Throws away what may go: what is too old, and more while so many bytes are short.
    pub async fn evict(&self, short_bytes: u64) {
        let _turn = self.turn.lock().await;
        // An engine that does not answer has containers nobody sees: nothing goes.
        let Ok(containers) = self.engine.observe(&self.shared.cluster).await else { return };
        // Read after that, which may take long: what is wanted by now stays.
        let wanted = self.shared.inner.lock().board.wanted.clone();
        // Nobody has said what is wanted: nothing goes.
        let Some(set) = wanted.set() else { return };
        let bodies: Vec<&AssignmentBody> = set.bodies.values().map(|b| &*b.value).collect();
        let label = |c: &crate::engine::ObservedContainer, key: &str| {
            c.labels.get(key).cloned().unwrap_or_default()
        };
        // Containers of other releases than the set's are still there: all of theirs stays.
        let lingering: BTreeSet<String> = containers
            .iter()
            .filter(|c| {
                let spec = label(c, "io.berth.spec");
                !set.bodies.keys().any(|digest| digest.as_str() == spec)
            })
            .map(|c| label(c, "io.berth.deployment"))
            .collect();
        let used_images: BTreeSet<&str> = containers.iter().map(|c| c.image_id.as_str()).collect();
        let rules = Rules {
            now: wall_now(),
            keep_unused_ms: self.keep_unused_ms,
            short_bytes,
            deployments: bodies.iter().map(|b| b.deployment_uid.to_string()).collect(),
        };
        let trees: BTreeSet<&str> = bodies
            .iter()
            .filter_map(|b| b.source.artifact.as_ref())
            .map(|a| a.digest.hex())
            .collect();
        let names: BTreeSet<String> = bodies
            .iter()
            .flat_map(|b| b.source.image.platforms.iter().map(|p| image_name(b, &p.config_digest)))
            .collect();
        self.adopt_trees();
        let named: BTreeSet<&str> = bodies.iter().flat_map(|b| manifests(b)).collect();
        let (tree_items, image_items, coming) = {
            let mut record = self.record.lock();
            record.coming.retain(|manifest, _| named.contains(manifest.as_str()));
            let coming: BTreeSet<String> = record.coming.values().flatten().cloned().collect();
            let items = |list: &mut BTreeMap<String, Entry>, wanted: &dyn Fn(&str) -> bool| {
                let item = |(id, entry): (&String, &mut Entry)| {
                    let in_use = wanted(id) || lingering.contains(&entry.deployment);
                    if in_use {
                        entry.used_unix_ms = rules.now.0;
                    }
                    Item {
                        id: id.clone(),
                        deployment: (!entry.deployment.is_empty())
                            .then(|| entry.deployment.clone()),
                        bytes: entry.bytes,
                        last_used: Wall(entry.used_unix_ms),
                        in_use,
                    }
                };
                list.iter_mut().map(item).collect::<Vec<Item<String>>>()
            };
            let record = &mut *record;
            let trees = items(&mut record.trees, &|id| trees.contains(id));
            let images = items(&mut record.images, &|id| names.contains(id));
            (trees, images, coming)
        };
        for hex in gc::evict(&tree_items, &rules) {
            // The set may have changed while another was going.
            if self.is_wanted_tree(&hex) {
                continue;
            }
            match self.drop_tree(&hex, &coming).await {
                Ok(()) => {
                    tracing::info!(tree = hex, "a model that nobody needs was thrown away");
                    self.record.lock().trees.remove(&hex);
                }
                Err(error) => tracing::warn!(tree = hex, %error, "a model could not be removed"),
            }
        }
        for name in gc::evict(&image_items, &rules) {
            let used = self.engine.image(&name).await;
            let used = used.map(|i| i.is_some_and(|i| used_images.contains(i.id.as_str())));
            if used != Ok(false) {
                continue;
            }
            match self.engine.remove_image(&name).await {
                Ok(()) => {
                    tracing::info!(name, "an image that nobody needs was thrown away");
                    self.record.lock().images.remove(&name);
                }
                Err(error) => tracing::debug!(name, %error, "an image could not be removed"),
            }
        }
        let (spools, held) = (self.spools.clone(), Arc::clone(&self.held));
        let work = move || drop_blobs(&spools, &held, &coming, &rules);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
            tracing::warn!(%error, "blobs that nobody needs could not be removed");
        }
        self.write().await;
    }

    fn is_wanted_tree(&self, hex: &str) -> bool {
        let wanted = self.shared.inner.lock().board.wanted.clone();
        wanted.set().is_some_and(|set| {
            let mut artifacts =
                set.bodies.values().filter_map(|b| b.value.source.artifact.as_ref());
            artifacts.any(|a| a.digest.hex() == hex)
        })
    }

    /// Takes away every name of ours in the record. An image that somebody else uses stays under
    /// theirs.
    pub async fn forget_images(&self) {
        let _turn = self.turn.lock().await;
        let names = self.record.lock().images.keys().cloned().collect();
        forget(&*self.engine, names).await;
    }

    /// Trees that the record does not know: of nobody, used just now.
    fn adopt_trees(&self) {
        let Ok(folder) = std::fs::read_dir(self.root.join("trees")) else { return };
        let mut record = self.record.lock();
        for one in folder.flatten() {
            let Some(hex) = one.file_name().to_str().map(str::to_owned) else { continue };
            if hex.len() == 64 {
                record.trees.entry(hex).or_insert_with(|| Entry {
                    deployment: String::new(),
                    used_unix_ms: wall_now().0,
                    bytes: 0,
                });
            }
        }
    }

    /// Removes a tree and the blobs that only it had.
    async fn drop_tree(&self, hex: &str, coming: &BTreeSet<String>) -> io::Result<()> {
        let tree = self.root.join("trees").join(hex);
        // Out of sight first: a tree that is there is whole.
        let going = tree.with_extension(GOING);
        match std::fs::rename(&tree, &going) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        let (spools, held, coming) = (self.spools.clone(), Arc::clone(&self.held), coming.clone());
        let work = move || drop_files(&going, &spools, &held, &coming);
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }
}

/// The digests of all manifests of a body, in hex.
fn manifests(body: &AssignmentBody) -> impl Iterator<Item = &str> {
    let images = body.source.image.platforms.iter().map(|p| &p.manifest_digest);
    images.chain(body.source.artifact.as_ref().map(|a| &a.digest)).map(Digest::hex)
}

fn read(root: &Path) -> Record {
    match std::fs::read(root.join("kept.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "the record of what is kept is damaged and is begun anew");
            Record::default()
        }),
        Err(_) => Record::default(),
    }
}

/// Takes away every image name in the record of a folder that no agent works with, as
/// [`Keeper::forget_images`] does.
pub async fn forget_images(engine: &dyn Engine, root: &Path) {
    forget(engine, read(root).images.into_keys().collect()).await;
}

async fn forget(engine: &dyn Engine, names: Vec<String>) {
    for name in names {
        if let Err(error) = engine.remove_image(&name).await {
            tracing::warn!(name, %error, "an image could not be removed");
        }
    }
}

/// Writes the record; the old one or the new one is there at any time.
fn write(root: &Path, record: &Record) -> io::Result<()> {
    let path = root.join("kept.json");
    let partial = path.with_extension("partial");
    let mut file = std::fs::File::create(&partial)?;
    file.write_all(&serde_json::to_vec(record).map_err(io::Error::other)?)?;
    file.sync_all()?;
    std::fs::rename(&partial, &path)?;
    std::fs::File::open(root)?.sync_all()
}

/// Removes blobs that may go and are in no tree.
fn drop_blobs(
    spools: &[Spool],
    held: &Mutex<BTreeMap<Digest, u32>>,
    coming: &BTreeSet<String>,
    rules: &Rules,
) -> io::Result<()> {
    for spool in spools {
        let held = held.lock().clone();
        let mut items = Vec::new();
        for one in std::fs::read_dir(spool.folder())? {
            let one = one?;
            let meta = one.metadata()?;
            let name = one.file_name().to_string_lossy().into_owned();
            let hex = name.split('.').next().unwrap_or_default();
            if meta.nlink() > 1 || !meta.is_file() {
                continue;
            }
            items.push(Item {
                id: one.path(),
                deployment: None,
                bytes: meta.len(),
                last_used: Wall(meta.mtime().saturating_mul(1_000)),
                in_use: coming.contains(hex) || held.keys().any(|digest| digest.hex() == hex),
            });
        }
        for path in gc::evict(&items, rules) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes a folder and the blobs that only it had and nobody is about to use.
fn drop_files(
    going: &Path,
    spools: &[Spool],
    held: &Mutex<BTreeMap<Digest, u32>>,
    coming: &BTreeSet<String>,
) -> io::Result<()> {
    let mut inodes = BTreeSet::new();
    inodes_of(going, &mut inodes)?;
    std::fs::remove_dir_all(going)?;
    for spool in spools {
        for one in std::fs::read_dir(spool.folder())? {
            let one = one?;
            let meta = one.metadata()?;
            let name = one.file_name().to_string_lossy().into_owned();
            // Whoever takes hold of it later finds it gone and brings it.
            let held = held.lock();
            let in_use = coming.contains(&name) || held.keys().any(|digest| digest.hex() == name);
            if meta.nlink() == 1 && inodes.contains(&meta.ino()) && !in_use {
                std::fs::remove_file(one.path())?;
            }
        }
    }
    Ok(())
}

fn inodes_of(folder: &Path, out: &mut BTreeSet<u64>) -> io::Result<()> {
    for one in std::fs::read_dir(folder)? {
        let one = one?;
        let meta = one.metadata()?;
        if meta.is_dir() {
            inodes_of(&one.path(), out)?;
        } else {
            out.insert(meta.ino());
        }
    }
    Ok(())
}

/// Too little room in the engine's own folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} are needed in the engine's folder {} and only {} are free",
    human_bytes(*need_bytes), folder.display(), human_bytes(*free_bytes)
)]
pub struct NoEngineRoom {
    folder: PathBuf,
    need_bytes: u64,
    free_bytes: u64,
}

impl Keeper {
    /// Whether the engine has room for an image of so many bytes of packed layers, after throwing
    /// away what may go. An engine whose folder the agent does not see is not asked about it.
    ///
    /// # Errors
    /// What is short.
    pub async fn engine_room(&self, packed_bytes: u64) -> Result<(), NoEngineRoom> {
        let Ok(info) = self.engine.info().await else { return Ok(()) };
        let folder = PathBuf::from(info.data_root);
        let free = || disk_free_at(&folder).filter(|_| folder.is_absolute());
        let Some(first) = free() else { return Ok(()) };
        // The engine unpacks a layer beside the packed one. How far it unpacks nobody says; that it
        // does not get smaller is certain.
        let mut need = packed_bytes.saturating_mul(2).saturating_add(self.keep_free_bytes);
        if same_disk(&folder, &self.root) {
            // And we hold the bytes until the engine has them.
            need = need.saturating_add(packed_bytes);
        }
        if first >= need {
            return Ok(());
        }
        self.evict(need - first).await;
        let free_bytes = free().unwrap_or(u64::MAX);
        if free_bytes >= need {
            Ok(())
        } else {
            Err(NoEngineRoom { folder, need_bytes: need, free_bytes })
        }
    }
}

fn same_disk(a: &Path, b: &Path) -> bool {
    let disk = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    disk(a).is_some_and(|a| Some(a) == disk(b))
}

#[async_trait]
impl Room for Keeper {
    async fn room(&self, bytes: u64) -> Result<(), (u64, u64)> {
        let need = bytes.saturating_add(self.keep_free_bytes);
        let free = disk_free(&self.root);
        if free >= need {
            return Ok(());
        }
        self.evict(need - free).await;
        let free = disk_free(&self.root);
        if free >= need { Ok(()) } else { Err((need, free)) }
    }
}

#[cfg(test)]
#[path = "keep_tests.rs"]
mod tests;
