//! The registry: blobs, manifests and tags, also while they are taken out again and collected.
//!
//! What is done is a sequence of steps, each a function of its number, so that what must be there
//! after any of them is known. Of the step that was under way each part may have happened or not; it
//! is taken again afterwards.
#![expect(clippy::unwrap_used, reason = "a test's helpers")]

use crate::TAKER;
use berth_proto::ids::Digest;
use berth_server::registry::manifests::media_types::IMAGE;
use berth_server::registry::uploads::Placement;
use berth_server::registry::{Reference, Registry, RegistryError, RepoName, Settings, Tag};
use berth_test_disk::{
    Disk, Load, Part, acknowledge, cuts, is_carried_into_a_namespace, mixed, noise,
};
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

/// Steps of one image: what is not done each time is a step all the same.
const STEPS: u64 = 6;
/// An image stays tagged for so many more.
const TAGGED: u64 = 12;

/// No lease, so that collections take what no tag keeps; the disk's last byte may be used.
fn settings() -> Settings {
    Settings { lease: Duration::ZERO, min_free_percent: 0, ..Settings::default() }
}

/// Few repositories at a time, and new ones now and then.
fn repo(image: u64) -> RepoName {
    let name = match image % 3 {
        0 => "a".to_owned(),
        place => format!("team{}/r{place}", image / 40),
    };
    RepoName::parse(&name).unwrap()
}

fn tag(image: u64) -> Tag {
    Tag::parse(&format!("t{}", image % 7)).unwrap()
}

/// Few different ones, so that most are there already.
fn config(image: u64) -> Bytes {
    noise(image % 4, 3_000).into()
}

fn layer(image: u64) -> Bytes {
    let drawn = mixed(image);
    let most = if drawn.is_multiple_of(5) { 900_000 } else { 60_000 };
    noise(1_000 + image, usize::try_from(drawn % most).unwrap()).into()
}

fn manifest(image: u64) -> Bytes {
    let part = |bytes: &Bytes| {
        let digest = Digest::of(bytes);
        json!({"mediaType": "application/octet-stream", "digest": digest, "size": bytes.len()})
    };
    let (config, layer) = (part(&config(image)), part(&layer(image)));
    let whole = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    whole.to_string().into()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Config(u64),
    Layer(u64),
    Manifest(u64),
    /// Whatever it stands for.
    Untag(u64),
    Delete(u64),
    Collect,
    Nothing,
}

fn step(number: u64) -> Step {
    let image = number / STEPS;
    match number % STEPS {
        0 => Step::Config(image),
        1 => Step::Layer(image),
        2 => Step::Manifest(image),
        3 if image >= TAGGED => Step::Untag(image - TAGGED),
        4 if image.is_multiple_of(5) && image >= 9 => Step::Delete(image - 9),
        5 if image.is_multiple_of(8) => Step::Collect,
        _ => Step::Nothing,
    }
}

/// What must be there.
#[derive(Debug, Clone, Default)]
struct Held {
    blobs: BTreeMap<(RepoName, Digest), Bytes>,
    manifests: BTreeSet<u64>,
    tags: BTreeMap<(RepoName, Tag), u64>,
}

impl Held {
    fn take(&mut self, step: Step) {
        let mut hold = |image, bytes: Bytes| {
            self.blobs.insert((repo(image), Digest::of(&bytes)), bytes);
        };
        match step {
            Step::Config(image) => hold(image, config(image)),
            Step::Layer(image) => hold(image, layer(image)),
            Step::Manifest(image) => {
                self.manifests.insert(image);
                self.tags.insert((repo(image), tag(image)), image);
            }
            Step::Untag(image) => {
                self.tags.remove(&(repo(image), tag(image)));
            }
            Step::Delete(image) => {
                self.manifests.remove(&image);
                self.tags.retain(|_, held| *held != image);
            }
            Step::Collect => {
                self.manifests = self.tags.values().copied().collect();
                let kept: BTreeSet<(RepoName, Digest)> = self
                    .manifests
                    .iter()
                    .flat_map(|image| {
                        [config(*image), layer(*image)].map(|b| (repo(*image), Digest::of(&b)))
                    })
                    .collect();
                self.blobs.retain(|key, _| kept.contains(key));
            }
            Step::Nothing => {}
        }
    }
}

fn body(bytes: Bytes) -> impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> + Unpin {
    futures_util::stream::iter([Ok(bytes)])
}

/// Brings the rest of an upload and ends it.
async fn go_on(
    registry: &Registry,
    (image, id): (u64, Uuid),
    bytes: &Bytes,
) -> Result<(), RegistryError> {
    let held = registry.upload_offset(&repo(image), id).await?;
    let at = Placement { start: Some(held), length: None };
    let rest = bytes.slice(usize::try_from(held).unwrap()..);
    let digest = Digest::of(bytes);
    registry.finish_upload(&repo(image), id, at, body(rest), Some(&digest)).await.map(drop)
}

fn gone_is_done(result: Result<(), RegistryError>) -> Result<(), RegistryError> {
    match result {
        Err(RegistryError::ManifestUnknown(_)) => Ok(()),
        other => other,
    }
}

/// Takes a step; an upload that is taken up in parts is told of by `begun`.
async fn go(
    registry: &Registry,
    step: Step,
    mut begun: impl FnMut(Uuid),
) -> Result<(), RegistryError> {
    match step {
        Step::Config(image) => {
            let bytes = config(image);
            registry.put_blob_from_reader(&repo(image), &bytes[..], None).await.map(drop)
        }
        Step::Layer(image) => {
            let bytes = layer(image);
            let id = registry.begin_upload(&repo(image)).await?;
            begun(id);
            for from in (0..bytes.len() / 2).step_by(100_000) {
                let piece = bytes.slice(from..(from + 100_000).min(bytes.len() / 2));
                let at = Placement { start: Some(from as u64), length: None };
                registry.append_upload(&repo(image), id, at, body(piece)).await?;
            }
            go_on(registry, (image, id), &bytes).await
        }
        Step::Manifest(image) => {
            let to = Reference::Tag(tag(image));
            registry.put_manifest(&repo(image), &to, IMAGE, manifest(image)).await.map(drop)
        }
        Step::Untag(image) => gone_is_done(registry.delete_tag(&repo(image), &tag(image)).await),
        Step::Delete(image) => {
            let digest = Digest::of(&manifest(image));
            gone_is_done(registry.delete_manifest(&repo(image), &digest, |_| None).await)
        }
        Step::Collect => registry.collect(Vec::new(), false).await.map(drop),
        Step::Nothing => Ok(()),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The load: one step after the other, each acknowledged; before that, uploads that were begun.
pub(crate) fn push(part: &Part) {
    runtime().block_on(async {
        let registry = Registry::open(&part.folder, settings()).unwrap();
        for number in part.from.. {
            let begun = |id| acknowledge(format!("{number} {id}")).unwrap();
            // The file system under it goes: that ends the load.
            if go(&registry, step(number), begun).await.is_err() {
                return;
            }
            acknowledge(number).unwrap();
        }
    });
}

async fn read(registry: &Registry, repo: &RepoName, digest: &Digest) -> Vec<u8> {
    let (mut file, size) = registry.open_blob(repo, digest).await.unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, size);
    bytes
}

/// Holds what is there against what must be: `before` the step under way, and `after` it.
async fn check(registry: &Registry, before: &Held, after: &Held, when: &str) {
    for ((repo, digest), bytes) in &before.blobs {
        if after.blobs.contains_key(&(repo.clone(), digest.clone())) {
            assert!(read(registry, repo, digest).await == *bytes, "{when}: {digest} of {repo}");
        }
    }
    for image in before.manifests.intersection(&after.manifests) {
        let to = Reference::Digest(Digest::of(&manifest(*image)));
        let found = registry.manifest(&repo(*image), &to).await;
        assert_eq!(found.unwrap().bytes, manifest(*image), "{when}: manifest {image}");
    }
    for (repo, tag) in before.tags.keys().chain(after.tags.keys()) {
        let found = registry.resolve_tag(repo, tag).await.unwrap();
        let key = (repo.clone(), tag.clone());
        let may = [before.tags.get(&key), after.tags.get(&key)];
        let may = may.map(|image| image.map(|image| Digest::of(&manifest(*image))));
        assert!(may.contains(&found), "{when}: {tag} of {repo} is {found:?}, not of {may:?}");
    }
    // Nothing is taken for whole that is not, whoever asks for it.
    for (digest, _) in registry.all_blobs().await.unwrap() {
        let bytes = std::fs::read(registry.blob_path(&digest)).unwrap();
        assert_eq!(Digest::of(&bytes), digest, "{when}");
    }
    for repo in registry.repositories().await.unwrap() {
        for tag in (0..7).map(tag) {
            let found = match registry.manifest(&repo, &Reference::Tag(tag)).await {
                Ok(found) => found,
                Err(RegistryError::ManifestUnknown(_)) => continue,
                Err(error) => panic!("{when}: {error}"),
            };
            let found: Value = serde_json::from_slice(&found.bytes).unwrap();
            for part in [&found["config"], &found["layers"][0]] {
                let digest = part["digest"].as_str().unwrap().parse().unwrap();
                let size = registry.blob_size(&repo, &digest, false).await.unwrap();
                assert_eq!(size, part["size"], "{when}: a part of {repo}");
            }
        }
    }
}

#[test]
fn nothing_pushed_is_lost_by_power_cuts_and_nothing_half_pushed_is_taken_for_whole() {
    const TEST: &str =
        "registry::nothing_pushed_is_lost_by_power_cuts_and_nothing_half_pushed_is_taken_for_whole";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 512) else { return };
    let folder = disk.path().join("registry");
    let runtime = runtime();
    let cuts = cuts(20);
    let (mut held, mut next, mut resumed) = (Held::default(), 0, 0);
    for cut in 1..=cuts {
        let part = Part::new("registry", &folder).from(next);
        let mut load = Load::start(&part, TAKER).unwrap();
        let mut said = load.wait_for(1 + mixed(cut) % 90).unwrap();
        said.extend(load.cut_power(&disk).unwrap());
        let mut upload = None;
        for line in said {
            match line.split_once(' ') {
                Some((number, id)) => upload = Some((number.parse::<u64>().unwrap(), id.parse())),
                None => {
                    assert_eq!(line, next.to_string(), "cut {cut}");
                    held.take(step(next));
                    next += 1;
                }
            }
        }
        let when = format!("cut {cut}, in step {next}: {:?}", step(next));
        let mut after = held.clone();
        after.take(step(next));
        let registry = Registry::open(&folder, settings()).expect(&when);
        runtime.block_on(async {
            check(&registry, &held, &after, &when).await;
            if let (Some((number, Ok(id))), Step::Layer(image)) = (upload, step(next))
                && number == next
            {
                // What came of it is gone on with, or it is begun again; it never ends as another.
                match go_on(&registry, (image, id), &layer(image)).await {
                    Ok(()) => resumed += 1,
                    Err(RegistryError::UploadUnknown | RegistryError::DigestMismatch { .. }) => {}
                    Err(error) => panic!("{when}: {error}"),
                }
                check(&registry, &held, &after, &when).await;
            }
        });
    }
    println!("{cuts} power cuts, {next} steps, {resumed} uploads gone on with, nothing lost");
}

/// What a full disk says.
fn is_full(error: &RegistryError) -> bool {
    let full = http::StatusCode::INSUFFICIENT_STORAGE;
    error.to_string().contains("full") && error.status().0 == full
}

#[test]
fn a_disk_that_is_full_at_any_write_refuses_pushes_and_loses_nothing_and_takes_them_when_there_is_room()
 {
    const TEST: &str = "registry::a_disk_that_is_full_at_any_write_refuses_pushes_and_loses_nothing_and_takes_them_when_there_is_room";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 64) else { return };
    let folder = disk.path().join("registry");
    runtime().block_on(full_again_and_again(&disk, &folder));
}

async fn full_again_and_again(disk: &Disk, folder: &Path) {
    let mut registry = Registry::open(folder, settings()).unwrap();
    let (mut held, mut next) = (Held::default(), 0);
    let mut met = BTreeSet::new();
    for round in 0..15 {
        // So much is left, and whatever writes next finds the end: config, layer or manifest first.
        while next % STEPS != round % 3 {
            go(&registry, step(next), |_| {}).await.unwrap();
            held.take(step(next));
            next += 1;
        }
        disk.fill_but(mixed(round) % (4_000 << (round % 6))).unwrap();
        let mut upload = None;
        let refused = loop {
            match go(&registry, step(next), |id| upload = Some(id)).await {
                Ok(()) => {
                    held.take(step(next));
                    next += 1;
                    upload = None;
                }
                Err(error) => break error,
            }
        };
        let when = format!("round {round}, in step {next}: {:?}", step(next));
        assert!(is_full(&refused), "{when}: {refused}");
        met.insert(next % STEPS);
        let mut after = held.clone();
        after.take(step(next));
        check(&registry, &held, &after, &when).await;
        if round % 2 == 0 {
            // A start on the full disk finds all of it.
            drop(registry);
            registry = Registry::open(folder, settings()).expect(&when);
            check(&registry, &held, &after, &when).await;
        }
        disk.free().unwrap();
        if let (Some(id), Step::Layer(image)) = (upload, step(next)) {
            go_on(&registry, (image, id), &layer(image)).await.expect(&when);
            held.take(step(next));
            next += 1;
        }
        for _ in 0..STEPS {
            go(&registry, step(next), |_| {}).await.expect(&when);
            held.take(step(next));
            next += 1;
        }
        check(&registry, &held, &held, &when).await;
    }
    println!("full in {met:?} of {STEPS} kinds of steps, {next} steps, nothing lost");
    assert!(met.len() > 2, "{met:?}");
}

#[test]
fn an_upload_whose_end_a_full_disk_refused_is_ended_when_there_is_room() {
    const TEST: &str =
        "registry::an_upload_whose_end_a_full_disk_refused_is_ended_when_there_is_room";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 64) else { return };
    let registry = Registry::open(disk.path().join("registry"), settings()).unwrap();
    runtime().block_on(async {
        let (repo, bytes) = (RepoName::parse("new/one").unwrap(), layer(1));
        let digest = Digest::of(&bytes);
        let id = registry.begin_upload(&repo).await.unwrap();
        let at = Placement::default();
        registry.append_upload(&repo, id, at, body(bytes.clone())).await.unwrap();
        let end = || registry.finish_upload(&repo, id, at, body(Bytes::new()), Some(&digest));
        // All of it is here; what has no room is the repository's folder.
        disk.fill().unwrap();
        let refused = end().await.unwrap_err();
        assert!(is_full(&refused), "{refused}");
        disk.free().unwrap();
        end().await.unwrap();
        assert!(read(&registry, &repo, &digest).await == bytes);
    });
}
