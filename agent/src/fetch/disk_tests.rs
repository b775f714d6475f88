//! Blobs, models' folders and their record under power cuts and on a full disk: what was durable
//! stays, nothing half brought is taken for whole, and what was begun is gone on with.
//!
//! What is done is a sequence of steps, each a function of its number, so that what must be there
//! after any of them is known. Of the step that was under way each part may have happened or not; it
//! is taken again afterwards. `BERTH_POWER_CUTS` is how many (20 by default).

use super::artifact::{lay_out, layers, sweep};
use super::client::FetchError;
use super::keep::Keeper;
use super::spool::Spool;
use crate::disk_tests::TAKER;
use crate::engine::fake::FakeEngine;
use crate::state::Shared;
use crate::store::Store;
use berth_agent_core::ledger::{HeldSet, Wanted};
use berth_agent_core::transfer::{Blob, CHUNK_BYTES, Failure, Held};
use berth_proto::ids::Digest;
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::HostPolicy;
use berth_test_disk::{
    Disk, Load, Part, acknowledge, cuts, is_carried_into_a_namespace, mixed, noise,
};
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Steps of one blob: what is not done each time is a step all the same.
const STEPS: u64 = 7;
/// Blobs of a model; the last one is packed.
const PARTS: u64 = 3;
/// What is packed into the last one.
const PACKED: &str = "inside/packed";

/// Most blobs have one chunk, some up to three.
fn content(blob: u64) -> Vec<u8> {
    let drawn = mixed(blob);
    let most = if drawn.is_multiple_of(6) { 2 * CHUNK_BYTES + CHUNK_BYTES / 2 } else { 60_000 };
    let bytes = noise(blob, usize::try_from(1 + drawn % most).unwrap());
    if blob % PARTS != PARTS - 1 {
        return bytes;
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o600);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, PACKED, &bytes[..]).unwrap();
    archive.into_inner().unwrap()
}

fn blob_of(bytes: &[u8]) -> Blob {
    Blob { digest: Digest::of(bytes), size_bytes: bytes.len() as u64 }
}

fn chunks(bytes: &[u8]) -> Vec<&[u8]> {
    bytes.chunks(usize::try_from(CHUNK_BYTES).unwrap()).collect()
}

/// The blobs of the model that ends with this one.
fn parts(last: u64) -> Vec<u64> {
    (last + 1 - PARTS..=last).collect()
}

fn manifest(last: u64) -> Vec<u8> {
    let layer = |part: u64| {
        let bytes = content(part);
        let packed = if part == last { "tar" } else { "raw" };
        json!({
            "mediaType": format!("application/vnd.cncf.model.weight.v1.{packed}"),
            "digest": Digest::of(&bytes), "size": bytes.len(),
            "annotations": {"org.cncf.model.filepath": format!("folder{part}/file")},
        })
    };
    let layers: Vec<Value> = parts(last).into_iter().map(layer).collect();
    let config = json!({"mediaType": "application/vnd.cncf.model.config.v1+json"});
    json!({"config": config, "layers": layers}).to_string().into_bytes()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Its blobs are about to come: that is written down.
    Comes(u64),
    /// A chunk of a blob is durable.
    Chunk(u64, u64),
    /// A blob is whole.
    Keep(u64),
    /// The folder of the model that ends with this blob.
    LayOut(u64),
    /// Everything goes.
    Evict,
    Nothing,
}

fn step(number: u64) -> Step {
    let blob = number / STEPS;
    let ends = blob % PARTS == PARTS - 1;
    match number % STEPS {
        0 if blob.is_multiple_of(PARTS) => Step::Comes(blob + PARTS - 1),
        at @ 1..=3 if at <= chunks(&content(blob)).len() as u64 => Step::Chunk(blob, at - 1),
        4 => Step::Keep(blob),
        5 if ends => Step::LayOut(blob),
        6 if ends && mixed(blob).is_multiple_of(3) => Step::Evict,
        _ => Step::Nothing,
    }
}

/// What must be there.
#[derive(Debug, Clone, Default)]
struct There {
    coming: BTreeSet<u64>,
    chunks: BTreeSet<(u64, u64)>,
    blobs: BTreeSet<u64>,
    trees: BTreeSet<u64>,
}

impl There {
    fn take(&mut self, step: Step) {
        match step {
            Step::Comes(last) => drop(self.coming.insert(last)),
            Step::Chunk(blob, chunk) => drop(self.chunks.insert((blob, chunk))),
            Step::Keep(blob) => {
                self.chunks.clear();
                self.blobs.insert(blob);
            }
            Step::LayOut(last) => drop(self.trees.insert(last)),
            Step::Evict => *self = Self::default(),
            Step::Nothing => {}
        }
    }
}

/// What an agent has of models, in a folder.
struct Models {
    root: PathBuf,
    spool: Spool,
    keeper: Arc<Keeper>,
    runtime: tokio::runtime::Runtime,
}

impl Models {
    /// As the agent does at its start.
    fn open(folder: &Path) -> std::io::Result<Self> {
        let store = Store::open(folder).unwrap();
        let identity = AgentIdentityFile { cluster: "c".to_owned(), ..Default::default() };
        store.put_identity(&identity).unwrap();
        let shared = Shared::open(store, HostPolicy::default()).unwrap();
        shared.inner.lock().board.wanted = Wanted::Set(Arc::new(HeldSet::default()));
        let root = folder.join("models");
        std::fs::create_dir_all(root.join("trees"))?;
        sweep(&root.join("trees"))?;
        let spool = Spool::open(root.join("blobs"))?;
        let spools = vec![spool.clone()];
        let engine = Arc::new(FakeEngine::new());
        let keeper = Keeper::new(Arc::new(shared), engine, root.clone(), spools, (0, u64::MAX));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { root, spool, keeper: Arc::new(keeper), runtime })
    }

    fn tree(&self, last: u64) -> PathBuf {
        self.root.join("trees").join(Digest::of(&manifest(last)).hex())
    }

    fn go(&self, step: Step) -> Result<(), FetchError> {
        match step {
            Step::Comes(last) => {
                let digests: Vec<Digest> =
                    parts(last).into_iter().map(|part| Digest::of(&content(part))).collect();
                self.runtime.block_on(self.keeper.comes(&Digest::of(&manifest(last)), &digests));
            }
            Step::Chunk(blob, chunk) => {
                let content = content(blob);
                let blob = blob_of(&content);
                let held = self.spool.look(&blob)?;
                if held == Held::Whole || has(&held, chunk) {
                    return Ok(());
                }
                let bytes = chunks(&content)[usize::try_from(chunk).unwrap()];
                let writing = self.spool.write(&blob.digest)?;
                writing.pieces(chunk * CHUNK_BYTES, &[Bytes::copy_from_slice(bytes)])?;
                writing.persist(chunk, crc32c::crc32c(bytes))?;
            }
            Step::Keep(blob) => {
                let blob = blob_of(&content(blob));
                if self.spool.look(&blob)? != Held::Whole {
                    assert!(self.spool.verify(&blob)?, "its chunks are here");
                    self.spool.keep(&blob.digest)?;
                }
            }
            Step::LayOut(last) => {
                let tree = self.tree(last);
                if !tree.exists() {
                    lay_out(&layers(&manifest(last))?, &self.spool, &tree, 0)?;
                }
            }
            Step::Evict => self.runtime.block_on(self.keeper.evict(u64::MAX)),
            Step::Nothing => {}
        }
        Ok(())
    }

    /// Whether a whole folder of that model is there; one that is not whole is no folder.
    fn has_tree(&self, last: u64, when: &str) -> bool {
        let tree = self.tree(last);
        if !tree.exists() {
            return false;
        }
        for part in parts(last) {
            let content = content(part);
            if part == last {
                let mut archive = tar::Archive::new(&content[..]);
                let mut packed = archive.entries().unwrap().next().unwrap().unwrap();
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut packed, &mut bytes).unwrap();
                assert!(std::fs::read(tree.join(PACKED)).unwrap() == bytes, "{when}: {last}");
            } else {
                let file = tree.join(format!("folder{part}/file"));
                assert!(std::fs::read(file).unwrap() == content, "{when}: {part} of {last}");
            }
        }
        true
    }

    /// Holds what is there against what must be: `before` the step under way, and `after` it.
    fn check(&self, number: u64, before: &There, after: &There, when: &str) {
        let blob = number / STEPS;
        for blob in blob.saturating_sub(8)..=blob {
            let content = content(blob);
            let held = self.spool.look(&blob_of(&content)).unwrap();
            let whole = self.spool.whole(&Digest::of(&content));
            assert_eq!(held == Held::Whole, whole.exists(), "{when}: blob {blob}");
            if held == Held::Whole {
                assert!(std::fs::read(whole).unwrap() == content, "{when}: blob {blob}");
            } else {
                let must = before.blobs.contains(&blob) && after.blobs.contains(&blob);
                assert!(!must, "{when}: blob {blob} is lost");
                for (_, chunk) in before.chunks.iter().filter(|(of, _)| *of == blob) {
                    let must = after.chunks.contains(&(blob, *chunk));
                    assert!(!must || has(&held, *chunk), "{when}: {chunk} of {blob} is lost");
                }
            }
        }
        let from = before.trees.first().copied().unwrap_or(blob).min(blob.saturating_sub(8));
        for last in (from..=blob).filter(|blob| blob % PARTS == PARTS - 1) {
            let there = self.has_tree(last, when);
            let must = before.trees.contains(&last) && after.trees.contains(&last);
            assert!(there || !must, "{when}: model {last} is lost");
        }
        let record = std::fs::read(self.root.join("kept.json"));
        let record: Value = record.map_or(Value::Null, |r| serde_json::from_slice(&r).unwrap());
        for last in before.coming.intersection(&after.coming) {
            let coming = &record["coming"][Digest::of(&manifest(*last)).hex()];
            assert!(coming.is_array(), "{when}: what {last} needs is forgotten: {record}");
        }
    }
}

fn has(held: &Held, chunk: u64) -> bool {
    matches!(held, Held::Chunks(chunks) if chunks.contains(&chunk))
}

/// The load: one step after the other, each acknowledged.
pub(crate) fn bring(part: &Part) {
    let models = Models::open(&part.folder).unwrap();
    for number in part.from.. {
        // The file system under it goes: that ends the load.
        if models.go(step(number)).is_err() {
            return;
        }
        acknowledge(number).unwrap();
    }
}

#[test]
fn nothing_brought_is_lost_by_power_cuts_and_nothing_half_brought_is_taken_for_whole() {
    const TEST: &str = "fetch::disk_tests::nothing_brought_is_lost_by_power_cuts_and_nothing_half_brought_is_taken_for_whole";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 512) else { return };
    let folder = disk.path().join("agent");
    let cuts = cuts(20);
    let (mut there, mut next) = (There::default(), 0);
    for cut in 1..=cuts {
        let mut load = Load::start(&Part::new("models", &folder).from(next), TAKER).unwrap();
        let mut said = load.wait_for(1 + mixed(cut) % 40).unwrap();
        said.extend(load.cut_power(&disk).unwrap());
        for line in said {
            assert_eq!(line, next.to_string(), "cut {cut}");
            there.take(step(next));
            next += 1;
        }
        let when = format!("cut {cut}, in step {next}: {:?}", step(next));
        let mut after = there.clone();
        after.take(step(next));
        Models::open(&folder).expect(&when).check(next, &there, &after, &when);
    }
    println!("{cuts} power cuts, {next} steps, nothing lost");
}

/// Whether a full disk is why.
fn is_full(error: &FetchError) -> bool {
    match error {
        FetchError::Disk(error) => error.kind() == ErrorKind::StorageFull,
        FetchError::Transfer(Failure::NoRoom { .. }) => true,
        _ => false,
    }
}

#[test]
fn a_disk_that_is_full_at_any_write_of_a_model_loses_nothing_and_it_is_gone_on_with() {
    const TEST: &str = "fetch::disk_tests::a_disk_that_is_full_at_any_write_of_a_model_loses_nothing_and_it_is_gone_on_with";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 96) else { return };
    let folder = disk.path().join("agent");
    let models = Models::open(&folder).unwrap();
    let (mut there, mut next, mut met) = (There::default(), 0, BTreeSet::new());
    let take = |there: &mut There, next: &mut u64| {
        models.go(step(*next))?;
        there.take(step(*next));
        *next += 1;
        Ok::<(), FetchError>(())
    };
    for round in 0..9 {
        // So much is left, and whatever writes next finds the end: a chunk or a folder first.
        let first = [1, 2, 5][usize::try_from(round % 3).unwrap()];
        while next % STEPS != first || matches!(step(next), Step::Nothing) {
            take(&mut there, &mut next).unwrap();
        }
        disk.fill_but(mixed(round) % (2_000 << (round % 12))).unwrap();
        let refused = loop {
            if let Err(error) = take(&mut there, &mut next) {
                break error;
            }
        };
        let when = format!("round {round}, in step {next}: {:?}", step(next));
        assert!(is_full(&refused), "{when}: {refused:?}");
        met.insert(next % STEPS);
        models.check(next, &there, &there, &when);
        let left = std::fs::read_dir(folder.join("models/trees")).unwrap();
        assert_eq!(left.count(), there.trees.len(), "{when}: something is left of a folder");
        disk.free().unwrap();
        for _ in 0..2 {
            take(&mut there, &mut next).expect(&when);
        }
        models.check(next, &there, &there, &when);
    }
    println!("full in {met:?} of {STEPS} kinds of steps, {next} steps, nothing lost");
    assert!(met.contains(&1) && met.contains(&5), "{met:?}");
}
