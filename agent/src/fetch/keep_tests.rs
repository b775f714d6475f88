//! Evictions on a real folder, with an engine in memory.

use super::super::testing::body;
use super::*;
use crate::engine::ContainerSpec;
use crate::engine::fake::FakeEngine;
use crate::store::Store;
use berth_agent_core::ledger::{self, HeldSet, Wanted};
use berth_proto::agent::SetEntry;
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::HostPolicy;
use prost::Message as _;

struct Host {
    _dir: tempfile::TempDir,
    engine: FakeEngine,
    keeper: Arc<Keeper>,
    root: PathBuf,
    shared: Arc<Shared>,
}

fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let identity = AgentIdentityFile { cluster: "c".to_owned(), ..Default::default() };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, HostPolicy::default()).unwrap());
    let root = dir.path().join("models");
    std::fs::create_dir_all(root.join("trees")).unwrap();
    let spool = Spool::open(root.join("blobs")).unwrap();
    let engine = FakeEngine::new();
    let week = 7 * 24 * 3_600 * 1_000;
    let keeper = Keeper::new(
        Arc::clone(&shared),
        Arc::new(engine.clone()),
        root.clone(),
        vec![spool],
        (0, week),
    );
    Host { _dir: dir, engine, keeper: Arc::new(keeper), root, shared }
}

impl Host {
    /// A model's folder of one file, last used so many days ago.
    fn tree(&self, content: &str, deployment: &str, days: i64) -> (PathBuf, PathBuf) {
        let blob = self.root.join("blobs").join(Digest::of(content.as_bytes()).hex());
        std::fs::write(&blob, content).unwrap();
        let hex = Digest::of(format!("manifest of {content}").as_bytes()).hex().to_owned();
        let tree = self.root.join("trees").join(&hex);
        std::fs::create_dir(&tree).unwrap();
        std::fs::hard_link(&blob, tree.join("model")).unwrap();
        let entry = Entry {
            deployment: deployment.to_owned(),
            used_unix_ms: wall_now().0 - days * 24 * 3_600 * 1_000,
            bytes: 10,
        };
        self.keeper.record.lock().trees.insert(hex, entry);
        (tree, blob)
    }

    fn set_is_empty(&self) {
        self.shared.inner.lock().board.wanted = Wanted::Set(Arc::new(HeldSet::default()));
    }
}

#[tokio::test]
async fn old_trees_go_with_their_blobs_and_young_ones_stay_until_the_disk_is_short() {
    let host = host();
    let (old, old_blob) = host.tree("old", "d", 8);
    let (young, young_blob) = host.tree("young", "d", 1);
    // Nobody has said what is wanted: nothing goes, however short the disk is.
    host.keeper.evict(u64::MAX).await;
    assert!(old.exists() && young.exists());
    host.set_is_empty();
    host.engine.go_away();
    host.keeper.evict(u64::MAX).await;
    assert!(old.exists());
    host.engine.come_back();
    host.keeper.evict(0).await;
    assert!(!old.exists() && !old_blob.exists());
    assert!(young.exists() && young_blob.exists());
    host.keeper.evict(1).await;
    assert!(!young.exists() && !young_blob.exists());
    assert_eq!(std::fs::read_dir(host.root.join("trees")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_a_container_has_stays_though_the_set_has_forgotten_it() {
    let host = host();
    host.set_is_empty();
    let (tree, blob) = host.tree("runs", "d-uid", 30);
    host.engine.add_image("sha256:i", &["berth.local/d:abc"]);
    let mut spec = ContainerSpec::new(&host.shared.cluster, "n", "sha256:i");
    spec.labels.insert("io.berth.deployment".to_owned(), "d-uid".to_owned());
    let id = host.engine.create(&spec).await.unwrap();
    let entry = Entry { deployment: "other".to_owned(), used_unix_ms: 0, bytes: 1 };
    host.keeper.record.lock().images.insert("berth.local/d:abc".to_owned(), entry);
    host.keeper.evict(u64::MAX).await;
    assert!(tree.exists() && blob.exists());
    assert!(host.engine.image("berth.local/d:abc").await.unwrap().is_some());
    host.engine.remove(&id, true).await.unwrap();
    host.keeper.evict(u64::MAX).await;
    assert!(!tree.exists() && !blob.exists());
    assert!(host.engine.image("berth.local/d:abc").await.unwrap().is_none());
}

#[tokio::test]
async fn blobs_on_their_way_are_held_and_the_record_survives() {
    let host = host();
    host.set_is_empty();
    let digest = Digest::of(b"coming");
    let path = host.root.join("blobs").join(format!("{}.partial", digest.hex()));
    std::fs::write(&path, "com").unwrap();
    let hold = host.keeper.hold(vec![digest]);
    host.keeper.evict(u64::MAX).await;
    assert!(path.exists());
    drop(hold);
    host.keeper.evict(u64::MAX).await;
    assert!(!path.exists());
    host.tree("kept", "d", 0);
    host.keeper.evict(0).await;
    let again: Record =
        serde_json::from_slice(&std::fs::read(host.root.join("kept.json")).unwrap()).unwrap();
    assert_eq!(again, *host.keeper.record.lock());
}

#[tokio::test]
async fn what_has_come_of_an_image_stays_as_long_as_the_set_names_it_whatever_fails_or_restarts() {
    let host = host();
    let manifest = Digest::of(b"manifest");
    let bytes = body(&manifest).encode_to_vec();
    let entry = SetEntry {
        replica_uid: "r".into(),
        body_digest: Digest::of(&bytes).to_string(),
        ..Default::default()
    };
    let sent = BTreeMap::from([(Digest::of(&bytes), bytes)]);
    let none = Wanted::NotYetKnown;
    let set = ledger::build(Default::default(), String::new(), vec![entry], sent, &none).unwrap();
    host.shared.inner.lock().board.wanted = Wanted::Set(Arc::new(set));

    let (layer, other) = (Digest::of(b"layer"), Digest::of(b"other"));
    let partial = |digest: &Digest| {
        let path = host.root.join("blobs").join(format!("{}.partial", digest.hex()));
        std::fs::write(&path, "com").unwrap();
        path
    };
    let (wanted, unwanted) = (partial(&layer), partial(&other));
    host.keeper.comes(&manifest, &[layer]).await;
    host.keeper.comes(&Digest::of(b"another manifest"), &[other]).await;
    // No transfer is under way, and the agent has started anew.
    let spool = Spool::open(host.root.join("blobs")).unwrap();
    let engine = Arc::new(host.engine.clone());
    let root = host.root.clone();
    let again = Keeper::new(Arc::clone(&host.shared), engine, root, vec![spool], (0, 0));
    again.evict(u64::MAX).await;
    assert!(wanted.exists() && !unwanted.exists());
    host.set_is_empty();
    again.evict(u64::MAX).await;
    assert!(!wanted.exists());
    assert!(again.record.lock().coming.is_empty());
}

#[tokio::test]
async fn the_engine_s_disk_is_checked_for_an_image_before_its_first_byte() {
    let host = host();
    host.set_is_empty();
    let (tree, _) = host.tree("young", "d", 1);
    host.keeper.engine_room(1).await.unwrap();
    assert!(tree.exists(), "there was room");
    // A file system that never has any: what may go is thrown away, and then it is said.
    host.engine.set_data_root("/proc");
    let short = host.keeper.engine_room(1 << 20).await.unwrap_err();
    assert_eq!(
        short.to_string(),
        "2.0 MiB are needed in the engine's folder /proc and only 0 B are free"
    );
    assert!(!tree.exists());
    // Where the agent does not see the engine's folder, the engine itself will say.
    for elsewhere in ["/nowhere/to/be/found", ""] {
        host.engine.set_data_root(elsewhere);
        host.keeper.engine_room(u64::MAX).await.unwrap();
    }
}
