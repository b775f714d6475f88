//! Images brought from a registry that answers when told, into an engine in memory.

use super::super::testing::{FakeRegistry, noise};
use super::*;
use crate::engine::Call;
use crate::engine::fake::FakeEngine;
use crate::store::Store;
use berth_agent_core::ledger;
use berth_proto::agent::{AssignmentBody as AssignmentBodyMessage, SetEntry};
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::HostPolicy;
use futures_util::future::join_all;
use prost::Message as _;

struct Host {
    dir: tempfile::TempDir,
    engine: FakeEngine,
    registry: FakeRegistry,
    fetcher: Fetcher,
}

/// An image at the registry, and who wants it.
struct One {
    body: AssignmentBody,
    config: String,
    /// What the engine pulls it by.
    through: String,
    /// The name it is to have.
    name: String,
}

async fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let identity = AgentIdentityFile { cluster: "c".to_owned(), ..Default::default() };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, HostPolicy::default()).unwrap());
    let (engine, registry) = (FakeEngine::new(), FakeRegistry::start().await);
    let limits = Limits { bytes_per_second: None, keep_free_bytes: 0, keep_unused_ms: u64::MAX };
    let client = registry.client.clone();
    let fetcher = Fetcher::open(shared, Arc::new(engine.clone()), client, limits).await.unwrap();
    Host { dir, engine, registry, fetcher }
}

fn body(name: &str, manifest: &Digest, config: &Digest, size_bytes: u64) -> AssignmentBody {
    let bytes = AssignmentBodyMessage {
        deployment_uid: name.into(),
        deployment: name.into(),
        namespace: "default".into(),
        release: 1,
        source: Some(api::ResolvedSource {
            image: Some(api::ResolvedImage {
                repository: "r".into(),
                digest: manifest.to_string(),
                platforms: vec![api::PlatformImage {
                    arch: "amd64".into(),
                    os: "linux".into(),
                    manifest_digest: manifest.to_string(),
                    config_digest: config.to_string(),
                    size_bytes,
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        spec: Some(api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".into())),
            ..Default::default()
        }),
        ..Default::default()
    }
    .encode_to_vec();
    let digest = Digest::of(&bytes);
    let body_digest = digest.to_string();
    let entry = SetEntry { replica_uid: "r".into(), body_digest, ..Default::default() };
    let sent = BTreeMap::from([(digest.clone(), bytes)]);
    let held = ledger::Wanted::NotYetKnown;
    let set = ledger::build(Default::default(), String::new(), vec![entry], sent, &held).unwrap();
    AssignmentBody::clone(&set.bodies[&digest].value)
}

impl Host {
    /// An image of one layer that the registry has, said to be of so many bytes.
    fn image(&self, name: &str, size_bytes: u64) -> One {
        let layer = self.registry.put(&noise(10_000, name.len() as u64));
        let unpacked = Digest::of(name.as_bytes());
        let config = serde_json::json!({"rootfs": {"diff_ids": [unpacked.as_str()]}}).to_string();
        let config_digest = self.registry.put(config.as_bytes());
        let manifest = serde_json::json!({
            "config": {"digest": config_digest.as_str(), "size": config.len()},
            "layers": [{"digest": layer.as_str(), "size": 10_000}],
        });
        let manifest = self.registry.put(manifest.to_string().as_bytes());
        let body = body(name, &manifest, &config_digest, size_bytes);
        let through = self.fetcher.door.reference("r", &manifest);
        self.engine.offer_image(&through, config_digest.as_str());
        One {
            name: image_name(&body, &config_digest),
            config: config_digest.to_string(),
            through,
            body,
        }
    }

    async fn bring(&self, one: &One, tell: impl Fn(Told) + Send + Sync) {
        self.fetcher.bring(&one.body, &one.body.source.image.platforms[0], tell).await.unwrap();
    }

    async fn names(&self, one: &One) -> Vec<String> {
        let image = self.engine.image(&one.config).await.unwrap().expect("it is here");
        image.tags.into_iter().chain(image.repo_digests).collect()
    }

    fn pulls(&self) -> usize {
        self.engine.calls().iter().filter(|(call, _)| *call == Call::Pull).count()
    }
}

#[tokio::test]
async fn at_most_as_many_transfers_run_as_there_are_places_and_a_small_one_passes_the_big_ones() {
    let host = host().await;
    // Longer by one letter each, which makes their layers differ.
    let name = |n: usize| "i".repeat(n + 1);
    let big: Vec<One> = (0..5).map(|n| host.image(&name(n), BIG_BYTES)).collect();
    let small: Vec<One> = (5..8).map(|n| host.image(&name(n), BIG_BYTES - 1)).collect();
    host.fetcher.wanted(big.iter().chain(&small).map(|one| &one.body));
    host.registry.hold(Some(0));
    let brings = join_all(big.iter().chain(&small).map(|one| host.bring(one, |_| {})));
    let under_way = async {
        host.registry.held(PLACES).await;
        // Whoever else had a place would be there after so many times to the registry and back.
        let path = format!("/v2/r/manifests/{}", big[0].body.source.image.digest);
        for _ in 0..20 {
            host.registry.client.ask(&mut Default::default(), &path, None).await.unwrap();
        }
        let held = host.registry.held(PLACES).await;
        host.registry.hold(None);
        held
    };
    let (_, held) = tokio::join!(brings, under_way);
    let count = |ones: &[One]| ones.iter().filter(|one| held.contains(&one.config)).count();
    assert_eq!((held.len(), count(&big), count(&small)), (PLACES, BIG_PLACES, 1));
    assert_eq!(host.pulls(), 8);
}

#[tokio::test]
async fn an_image_s_bytes_are_here_before_the_engine_is_asked_to_pull_it() {
    let host = host().await;
    let one = host.image("one", 10_000);
    host.fetcher.wanted([&one.body].into_iter());
    // Manifest and config come whole, the layer only half.
    host.registry.cut(&[usize::MAX, usize::MAX, 5_000]);
    let told = Mutex::new(Vec::new());
    let bring = host.bring(&one, |word| {
        if matches!(word, Told::Waiting { .. }) {
            assert_eq!(host.pulls(), 0, "the engine waits for no slow link");
        }
        told.lock().push(word);
    });
    bring.await;
    let told = told.into_inner();
    assert!(told.iter().any(|word| matches!(word, Told::Waiting { .. })), "{told:?}");
    let last = told.iter().rev().find_map(|word| match word {
        Told::Progress(p) => Some((p.done_bytes, p.total_bytes, p.part, p.parts)),
        Told::Waiting { .. } => None,
    });
    assert_eq!(last, Some((10_000, 10_000, 1, 1)));
    assert_eq!(host.pulls(), 1);
    // The engine has it: nothing of it stays here.
    let left = std::fs::read_dir(host.dir.path().join("pull")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn an_image_has_our_name_alone_after_a_pull_and_none_that_a_killed_agent_has_left() {
    let host = host().await;
    let one = host.image("one", 10_000);
    host.fetcher.wanted([&one.body].into_iter());
    host.bring(&one, |_| {}).await;
    assert_eq!(host.names(&one).await, [one.name.as_str()]);
    assert_eq!(host.engine.image(&one.through).await.unwrap(), None);

    // Killed right after its pull, with another port; somebody else uses the image as well.
    let two = host.image("second", 10_000);
    let left = two.through.replace("127.0.0.1:", "127.0.0.1:1");
    let others = ["127.0.0.1:5000/theirs:1", "second:latest"];
    host.engine.add_image(&two.config, &[&left, others[0], others[1]]);
    host.bring(&two, |_| {}).await;
    assert_eq!(host.names(&two).await, [others[0], &two.name, others[1]]);
    assert_eq!(host.pulls(), 1, "it was here");
}

#[tokio::test]
async fn an_image_is_found_by_whichever_of_its_digests_the_engine_names_it_or_by_our_name() {
    let host = host().await;
    let one = host.image("one", 10_000);
    let platform = &one.body.source.image.platforms[0];
    let found = || async {
        let id = host.fetcher.image_id(&one.body, platform).await.unwrap();
        if let Some(id) = &id {
            host.engine.lose_image(id);
        }
        id
    };
    assert_eq!(found().await, None);
    for id in [&platform.config_digest, &platform.manifest_digest] {
        host.engine.add_image(id.as_str(), &[]);
        assert_eq!(found().await.as_deref(), Some(id.as_str()));
    }
    host.engine.add_image("sha256:index", &[&one.name]);
    assert_eq!(found().await.as_deref(), Some("sha256:index"));
}
