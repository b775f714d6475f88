//! What the collection keeps, what it takes, and what crashes leave.

use super::door_tests::{Client, IMAGE, describe};
use super::*;
use serde_json::json;
use std::path::Path;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// No lease: what no root reaches goes at once.
fn hasty(root: &Path) -> Client {
    Client::open(root, Settings { lease: Duration::ZERO, ..Settings::default() })
}

fn a() -> RepoName {
    RepoName::parse("a").unwrap()
}

async fn whole(registry: &Registry, digest: &Digest) -> bool {
    let found = registry.manifest(&a(), &Reference::Digest(digest.clone())).await;
    let Ok(found) = found else { return false };
    let value: serde_json::Value = serde_json::from_slice(&found.bytes).unwrap();
    for blob in value["layers"].as_array().unwrap() {
        let digest: Digest = blob["digest"].as_str().unwrap().parse().unwrap();
        registry.open_blob(&a(), &digest).await.unwrap();
    }
    true
}

fn age(registry: &Registry, digest: &Digest, age: Duration) {
    let file = std::fs::File::open(registry.blob_path(digest)).unwrap();
    file.set_modified(SystemTime::now().checked_sub(age).unwrap()).unwrap();
}

#[tokio::test]
async fn roots_tags_and_what_they_reach_stay_and_the_rest_goes() {
    let dir = tempfile::tempdir().unwrap();
    let client = hasty(dir.path());
    let (tagged, _) = client.image("a", "x", "tagged").await;
    let (root, _) = client.image("a", "", "root").await;
    let (fetched, _) = client.image("a", "", "fetched").await;
    let (dead, _) = client.image("a", "", "dead").await;
    let (child, manifest) = client.image("a", "", "child").await;
    let size = manifest.to_string().len();
    let index = json!({"schemaVersion": 2, "manifests": [describe(&child, size)]});
    let put = client.put("a", "multi", manifests::media_types::INDEX, &index).await;
    assert_eq!(put.status, http::StatusCode::CREATED);
    let referrer = json!({
        "schemaVersion": 2, "config": describe(&client.blob("a", "{}").await, 2),
        "layers": [describe(&client.blob("a", "signature").await, 9)],
        "subject": describe(&tagged, 1),
    });
    let signature = Digest::of(referrer.to_string().as_bytes());
    client.put("a", signature.as_str(), IMAGE, &referrer).await;
    let loose = client.blob("a", "loose").await;

    let nowhere = Digest::of(b"nowhere");
    let roots = vec![root.clone(), fetched.clone(), nowhere.clone()];
    let would = client.registry.collect(roots.clone(), true).await.unwrap();
    assert!(whole(&client.registry, &dead).await);
    let done = client.registry.collect(roots, false).await.unwrap();
    assert_eq!(would, gc::Collected { dry_run: true, ..done.clone() });
    assert_eq!(done.missing_roots, [nowhere]);
    assert_eq!(done.manifests, [(a(), dead.clone())]);
    let mut gone: Vec<Digest> = done.blobs.iter().map(|(digest, _)| digest.clone()).collect();
    let mut expected = vec![dead.clone(), Digest::of(b"dead"), loose.clone()];
    gone.sort();
    expected.sort();
    assert_eq!(gone, expected);
    assert_eq!(done.bytes, done.blobs.iter().map(|(_, size)| size).sum::<u64>());

    assert!(!whole(&client.registry, &dead).await);
    for kept in [&tagged, &root, &fetched, &child, &signature] {
        assert!(whole(&client.registry, kept).await, "{kept}");
    }
    assert!(client.registry.open_blob(&a(), &loose).await.is_err());
}

#[tokio::test]
async fn a_lease_keeps_what_no_root_reaches_and_head_and_mount_renew_it() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let registry = &client.registry;
    let (manifest, _) = client.image("a", "", "layer").await;
    let (head, mounted, old) = (
        client.blob("a", "asked for").await,
        client.blob("a", "mounted").await,
        client.blob("a", "old").await,
    );
    let layer = Digest::of(b"layer");
    for digest in [&manifest, &layer, &head, &mounted, &old] {
        age(registry, digest, 2 * DAY);
    }
    // The manifest's lease is that of all below it.
    registry.renew_manifest(&a(), &Reference::Digest(manifest.clone())).await.unwrap();
    registry.blob_size(&a(), &head, true).await.unwrap();
    let b = RepoName::parse("b").unwrap();
    assert!(registry.mount_blob(&a(), &b, &mounted).await.unwrap());
    let done = registry.collect(Vec::new(), false).await.unwrap();
    assert_eq!(done.blobs, [(old, 3)]);
    assert!(whole(registry, &manifest).await);
    assert!(registry.open_blob(&b, &mounted).await.is_ok());
}

#[tokio::test]
async fn a_leased_manifest_keeps_its_parts_however_old_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let (manifest, _) = client.image("a", "", "layer").await;
    age(&client.registry, &Digest::of(b"layer"), 2 * DAY);
    let done = client.registry.collect(Vec::new(), false).await.unwrap();
    assert_eq!(done.blobs_total, 0);
    assert!(whole(&client.registry, &manifest).await);
}

/// Old blobs, pushes that count on them, and collections, all at once: a push that was acknowledged
/// is whole, one that came too late was told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_never_loses_to_a_collection() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let registry = client.registry.clone();
    let config = client.blob("a", "{}").await;
    let mut pushes = Vec::new();
    for n in 0..150 {
        let content = format!("layer {n}");
        let layer = client.blob("a", &content).await;
        age(&registry, &layer, 2 * DAY);
        let manifest = json!({
            "schemaVersion": 2, "config": describe(&config, 2),
            "layers": [describe(&layer, content.len())],
        });
        pushes.push(manifest.to_string());
    }
    let collector = tokio::spawn({
        let registry = registry.clone();
        async move { registry.collect(Vec::new(), false).await.unwrap() }
    });
    let (mut kept, mut refused) = (0, 0);
    // From the far end, so that some are ahead of the collection.
    for manifest in pushes.into_iter().rev() {
        let digest = Digest::of(manifest.as_bytes());
        let to = Reference::Digest(digest.clone());
        match registry.put_manifest(&a(), &to, IMAGE, manifest.into()).await {
            Ok(_) => {
                kept += 1;
                assert!(whole(&registry, &digest).await);
            }
            Err(RegistryError::ManifestBlobUnknown(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    let done = collector.await.unwrap();
    assert_eq!(done.blobs_total, refused, "{kept} kept");
}

/// The stored bytes, the first of them turned: as many as before.
fn damage(registry: &Registry, digest: &Digest) {
    let path = registry.blob_path(digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 0xff;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn what_is_damaged_at_its_own_size_is_mended_by_a_push_and_can_be_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let (digest, manifest) = client.image("a", "x", "layer").await;
    let layer = Digest::of(b"layer");
    damage(&client.registry, &digest);
    damage(&client.registry, &layer);
    assert!(!whole(&client.registry, &digest).await);
    client.blob("a", "layer").await;
    assert_eq!(std::fs::read(client.registry.blob_path(&layer)).unwrap(), b"layer");
    client.put("a", "x", IMAGE, &manifest).await;
    assert!(whole(&client.registry, &digest).await);
    // One that stays damaged holds up neither its own end nor that of others.
    let (other, _) = client.image("a", "y", "other").await;
    damage(&client.registry, &digest);
    client.registry.delete_manifest(&a(), &other, |_| None).await.unwrap();
    client.registry.delete_blob(&a(), &Digest::of(b"other")).await.unwrap();
    client.registry.delete_manifest(&a(), &digest, |_| None).await.unwrap();
    assert_eq!(
        client.registry.resolve_tag(&a(), &names::Tag::parse("x").unwrap()).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn doubt_ends_a_collection_before_it_deletes() {
    let dir = tempfile::tempdir().unwrap();
    let client = hasty(dir.path());
    let (tagged, _) = client.image("a", "x", "layer").await;
    client.blob("a", "loose").await;
    std::fs::write(client.registry.blob_path(&tagged), "damaged").unwrap();
    let before = client.registry.usage().await.unwrap().blobs;
    assert!(client.registry.collect(Vec::new(), false).await.is_err());
    assert_eq!(client.registry.usage().await.unwrap().blobs, before);
}

#[tokio::test]
async fn abandoned_uploads_end_and_active_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let settings = || Settings { abandoned_after: DAY, ..Settings::default() };
    let client = Client::open(dir.path(), settings());
    let old = client.registry.begin_upload(&a()).await.unwrap();
    let new = client.registry.begin_upload(&a()).await.unwrap();
    assert_eq!(client.registry.end_abandoned_uploads().await.unwrap(), 0);
    drop(client);
    let data = dir.path().join("uploads").join(old.simple().to_string()).join("data");
    let past = SystemTime::now().checked_sub(2 * DAY).unwrap();
    std::fs::File::open(data).unwrap().set_modified(past).unwrap();
    let client = Client::open(dir.path(), settings());
    assert_eq!(client.registry.end_abandoned_uploads().await.unwrap(), 1);
    assert!(client.registry.upload_offset(&a(), old).await.is_err());
    assert_eq!(client.registry.upload_offset(&a(), new).await.unwrap(), 0);
}

/// States a crash can leave, each made by hand.
#[tokio::test]
async fn a_crash_leaves_nothing_that_is_shown_and_nothing_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (tagged, _) = hasty(dir.path()).image("a", "x", "layer").await;
    let root = dir.path();
    // Between storing a blob and linking it.
    let unlinked = Digest::of(b"unlinked");
    let hex = unlinked.hex();
    std::fs::write(root.join("blobs/sha256").join(&hex[..2]).join(hex), "unlinked").unwrap();
    // Between a referrer's entry and its revision.
    let entry = root.join("repos/a/_manifests/referrers").join(tagged.hex());
    std::fs::create_dir_all(&entry).unwrap();
    std::fs::write(entry.join(hex), "{}").unwrap();
    // In the middle of a small file, and of making or ending an upload.
    std::fs::write(root.join("tmp/half"), "ha").unwrap();
    let upload = root.join("uploads").join(Uuid::new_v4().simple().to_string());
    std::fs::create_dir_all(&upload).unwrap();
    std::fs::write(upload.join("meta.json"), "{\"repo").unwrap();

    let client = Client::open(
        root,
        Settings { lease: Duration::ZERO, abandoned_after: Duration::ZERO, ..Settings::default() },
    );
    assert!(whole(&client.registry, &tagged).await);
    assert!(client.registry.open_blob(&a(), &unlinked).await.is_err());
    let found = client.registry.referrers(&a(), &tagged, None, None).await.unwrap();
    assert!(found.descriptors.is_empty());
    assert!(!root.join("tmp/half").exists());
    let done = client.registry.collect(Vec::new(), false).await.unwrap();
    assert_eq!((done.blobs, done.uploads), (vec![(unlinked, 8)], 1));
    assert!(!upload.exists());
    assert!(!entry.exists());
    assert!(whole(&client.registry, &tagged).await);
}

/// A push, a push over it, a deletion and a collection, ended between any two changes of the folder:
/// what was acknowledged is there, and every manifest that can be read is whole.
#[tokio::test]
async fn a_crash_between_any_two_changes_leaves_the_store_consistent() {
    let mut changes = 0;
    loop {
        let dir = tempfile::tempdir().unwrap();
        let registry = hasty(dir.path()).registry;
        registry.0.disk.until_crash.store(changes, Ordering::SeqCst);
        let mut acknowledged = Vec::new();
        let ended = story(&registry, &mut acknowledged).await;
        drop(registry);

        let registry = hasty(dir.path()).registry;
        let tag = Tag::parse("x").unwrap();
        let tagged = registry.resolve_tag(&a(), &tag).await.unwrap();
        if let Some(digest) = &tagged {
            assert!(whole(&registry, digest).await, "after {changes} changes");
        }
        // The tag is at the last that was acknowledged, or at the one that was under way.
        let at = acknowledged.iter().position(|known| Some(known) == tagged.as_ref());
        assert!(at.is_none_or(|at| at + 1 == acknowledged.len()), "after {changes} changes");
        assert!(tagged.is_some() || acknowledged.is_empty(), "after {changes} changes");
        let revisions = disk::digests_in(&registry.0.disk.revisions(&a())).unwrap();
        for digest in revisions {
            assert!(whole(&registry, &digest).await, "after {changes} changes");
        }
        // And it goes on: the same again, to the end.
        registry.end_abandoned_uploads().await.unwrap();
        story(&registry, &mut Vec::new()).await.unwrap();
        if ended.is_ok() {
            break;
        }
        changes += 1;
    }
    assert!(changes > 40, "only {changes} changes were tried");
}

async fn story(registry: &Registry, acknowledged: &mut Vec<Digest>) -> Result<(), RegistryError> {
    for n in 0..2 {
        let content = format!("layer {n}");
        let (config, _) = registry.put_blob_from_reader(&a(), &b"{}"[..], None).await?;
        let (layer, _) = registry.put_blob_from_reader(&a(), content.as_bytes(), None).await?;
        let manifest = json!({
            "schemaVersion": 2, "config": describe(&config, 2),
            "layers": [describe(&layer, content.len())], "subject": describe(&layer, 1),
        });
        let to = Reference::parse("x")?;
        let put = registry.put_manifest(&a(), &to, IMAGE, manifest.to_string().into()).await?;
        acknowledged.push(put.digest);
    }
    if let [first, _] = acknowledged.as_slice() {
        registry.delete_manifest(&a(), first, |_| None).await?;
    }
    registry.collect(Vec::new(), false).await.map(drop)
}

#[tokio::test]
async fn another_programs_folder_or_another_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("photo.jpg"), "").unwrap();
    assert!(Registry::open(dir.path(), Settings::default()).is_err());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("format"), "2\n").unwrap();
    let error = Registry::open(dir.path(), Settings::default()).unwrap_err();
    assert!(error.to_string().contains("format"), "{error}");
}

#[tokio::test]
async fn the_servers_own_blobs_are_verified_like_all_others() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let content = vec![7_u8; 3 << 20];
    let expected = Digest::of(&content);
    let stored =
        client.registry.put_blob_from_reader(&a(), &content[..], Some(&expected)).await.unwrap();
    assert_eq!(stored, (expected, 3 << 20));
    let lie = Digest::of(b"lie");
    let refused = client.registry.put_blob_from_reader(&a(), &content[..], Some(&lie)).await;
    assert!(matches!(refused, Err(RegistryError::DigestMismatch { .. })));
    let usage = client.registry.usage().await.unwrap();
    assert_eq!((usage.blobs, usage.blob_bytes, usage.uploads), (1, 3 << 20, 0));
}
