use super::*;

use crate::engine::fake::FakeEngine;
use crate::engine::{CLUSTER_LABEL, Call, ContainerSpec, ContainerState, NetworkMode, Source};
use crate::state::News;
use crate::store::Store;
use berth_agent_core::ledger;
use berth_proto::agent::SetEntry;
use berth_proto::api::{self, ReplicaPhase};
use berth_proto::ids::{ClusterUid, Digest};
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::HostPolicy;
use prost::Message as _;
use std::path::Path;

const CLUSTER: &str = "cluster-of-tests";

/// Brings by saying that it is there.
struct FromFake(FakeEngine);

#[async_trait]
impl Bring for FromFake {
    fn wanted(&self, _: &Wanted) {}

    async fn bring(
        &self,
        _: &AssignmentBody,
        platform: &PlatformImage,
        tell: Box<dyn Fn(Told) + Send + Sync>,
    ) -> Result<(), BringError> {
        tell(Told::Progress(api::Progress { done_bytes: 1, total_bytes: 2, ..Default::default() }));
        self.0.add_image(platform.config_digest.as_str(), &[]);
        Ok(())
    }

    async fn image_id(
        &self,
        _: &AssignmentBody,
        platform: &PlatformImage,
    ) -> Result<Option<String>, EngineError> {
        Ok(self.0.image(platform.config_digest.as_str()).await?.map(|i| i.id))
    }

    fn tree(&self, artifact: &ResolvedArtifact) -> String {
        format!("/models/{}", artifact.digest.hex())
    }
}

fn joined(folder: &Path) {
    let store = Store::open(folder).unwrap();
    let identity = AgentIdentityFile { cluster: CLUSTER.into(), ..Default::default() };
    store.put_identity(&identity).unwrap();
}

struct Agent {
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    fn start(folder: &Path, engine: &FakeEngine, policy: HostPolicy) -> Self {
        let shared = Arc::new(Shared::open(Store::open(folder).unwrap(), policy).unwrap());
        {
            let facts = &mut shared.inner.lock().board.facts;
            (facts.os, facts.arch) = ("linux".into(), "amd64".into());
            facts.engine_available = true;
        }
        let bring = Arc::new(FromFake(engine.clone()));
        let reconciler = Reconciler::new(Arc::clone(&shared), Arc::new(engine.clone()), bring);
        let task = tokio::spawn(Arc::new(reconciler).run());
        Self { shared, task }
    }

    /// Dies at once, and lets the folder go.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        let shared = self.shared;
        // Answers under way hold it for a moment.
        wait_for("the folder to be free", || Arc::strong_count(&shared) == 1).await;
    }

    fn want(&self, names: &[&str], edit: impl Fn(&mut api::DeploymentSpec)) {
        let digest = Digest::of(b"image").to_string();
        let mut spec = api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".into())),
            ..Default::default()
        };
        edit(&mut spec);
        let platform = api::PlatformImage {
            arch: "amd64".into(),
            os: "linux".into(),
            manifest_digest: digest.clone(),
            config_digest: digest.clone(),
            ..Default::default()
        };
        let bytes = berth_proto::agent::AssignmentBody {
            deployment_uid: "d-uid".into(),
            deployment: "iris".into(),
            namespace: "default".into(),
            release: 3,
            source: Some(api::ResolvedSource {
                image: Some(api::ResolvedImage {
                    digest,
                    platforms: vec![platform],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            spec: Some(spec),
            ..Default::default()
        }
        .encode_to_vec();
        let digest = Digest::of(&bytes);
        let entry = |name: &&str| SetEntry {
            replica_uid: (*name).into(),
            body_digest: digest.to_string(),
            ..Default::default()
        };
        let entries = names.iter().map(entry).collect();
        let sent = BTreeMap::from([(digest.clone(), bytes)]);
        let none = Wanted::NotYetKnown;
        let set = ledger::build(Default::default(), String::new(), entries, sent, &none).unwrap();
        let wanted = Wanted::Set(Arc::new(set));
        self.shared.persist(&wanted).unwrap();
        self.shared.inner.lock().board.wanted = wanted;
        self.shared.wake.notify_one();
    }

    fn status(&self, name: &str) -> Option<api::ReplicaStatus> {
        let uid: ReplicaUid = name.parse().unwrap();
        self.shared.inner.lock().board.reports.get(&uid)?.status.clone()
    }

    async fn is(&self, name: &str, what: impl Fn(&api::ReplicaStatus) -> bool) {
        let said = || format!("{name} is {:?}", self.status(name));
        wait_for(&said(), || self.status(name).is_some_and(|s| what(&s))).await;
    }
}

/// Waits for a level; the clock stands still but for this.
async fn wait_for(what: &str, is: impl Fn() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let limit = Duration::from_secs(300);
    assert!(tokio::time::timeout(limit, waiting).await.is_ok(), "never: {what}");
}

fn runs(status: &api::ReplicaStatus) -> bool {
    status.phase() == ReplicaPhase::Running && status.ready
}

fn count(engine: &FakeEngine, call: Call) -> usize {
    engine.calls().iter().filter(|(made, _)| *made == call).count()
}

#[tokio::test(start_paused = true)]
async fn what_runs_is_adopted_by_the_next_start_and_others_containers_are_never_touched() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let engine = FakeEngine::new();
    engine.add_image("sha256:theirs", &[]);
    let mut theirs = ContainerSpec::new(&"another".parse().unwrap(), "theirs", "sha256:theirs");
    engine.create(&theirs).await.unwrap();
    theirs.labels.remove(CLUSTER_LABEL);
    theirs.name = "nobodys".into();
    engine.create(&theirs).await.unwrap();

    let agent = Agent::start(folder.path(), &engine, HostPolicy::default());
    agent.want(&["a", "b"], |_| {});
    agent.is("a", runs).await;
    agent.is("b", runs).await;
    assert_eq!(agent.shared.inner.lock().running.len(), 2);
    agent.kill().await;

    // No server, no set sent again: from its own disk.
    let again = Agent::start(folder.path(), &engine, HostPolicy::default());
    again.is("a", runs).await;
    again.is("b", runs).await;
    assert_eq!((count(&engine, Call::Create), count(&engine, Call::Start)), (4, 2));
    again.want(&[], |_| {});
    wait_for("ours to go", || engine.containers().len() == 2).await;
    let touched = engine.calls().iter().any(|(call, what)| {
        matches!(call, Call::Stop | Call::Remove | Call::Start)
            && engine.containers().iter().any(|c| c.id == *what)
    });
    assert!(!touched);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_program_that_failed_tells_what_it_wrote_last() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let engine = FakeEngine::new();
    let agent = Agent::start(folder.path(), &engine, HostPolicy::default());
    agent.want(&["a"], |_| {});
    let mut lines = Vec::new();
    // The third time its output cannot be read: its end is told all the same.
    for (attempt, text) in
        [(1, "loading\n"), (2, "no module\tnamed iris\nnote: see the trace\n"), (3, "lost")]
    {
        agent.is("a", |s| runs(s) && s.attempt == attempt).await;
        let running = |c: &crate::engine::ObservedContainer| {
            matches!(c.state, ContainerState::Running { .. })
        };
        let id = engine.containers().into_iter().find(running).unwrap().id;
        for line in text.split_inclusive('\n') {
            engine.write_log(&id, Source::Stdout, line);
        }
        engine.write_log(&id, Source::Stderr, "\n");
        if attempt == 3 {
            engine.fail_next(Call::Logs, EngineError::Unreachable("gone".into()));
        }
        engine.crash(&id, 3, false);
        let ended = |s: &api::ReplicaStatus| {
            s.last_exit.as_ref().is_some_and(|exit| exit.attempt == attempt)
        };
        agent.is("a", ended).await;
        lines.push(agent.status("a").unwrap().last_exit.unwrap().last_line);
    }
    assert_eq!(lines, ["loading", "no module named iris | note: see the trace", ""]);
    assert_eq!(count(&engine, Call::Logs), 3, "once for each end");
}

#[tokio::test(start_paused = true)]
async fn lost_answers_and_refusals_of_the_engine_start_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let engine = FakeEngine::new();
    engine.lose_next_answer(Call::Create);
    engine.hang_next(Call::Start);
    engine.lose_next_answer(Call::Start);
    engine.fail_next(Call::Inspect, EngineError::Unreachable("gone".into()));
    let agent = Agent::start(folder.path(), &engine, HostPolicy::default());
    agent.want(&["a"], |_| {});
    agent.is("a", runs).await;
    assert_eq!((engine.containers().len(), agent.status("a").unwrap().attempt), (1, 1));
    assert_eq!(count(&engine, Call::Create), 1);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_is_away_is_a_fact_that_is_told_and_all_goes_on_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let engine = FakeEngine::new();
    let agent = Agent::start(folder.path(), &engine, HostPolicy::default());
    agent.want(&["a"], |_| {});
    agent.is("a", runs).await;
    let mut news = agent.shared.news.subscribe();
    engine.go_away();
    let available = || agent.shared.inner.lock().board.facts.engine_available;
    agent.want(&["a", "b"], |_| {});
    agent.is("b", |s| s.reason == "ENGINE_AWAY").await;
    wait_for("the host's facts to say so", || !available()).await;
    assert!(runs(&agent.status("a").unwrap()), "what runs is told as it was");
    engine.come_back();
    agent.is("b", runs).await;
    assert!(available());
    let told = std::iter::from_fn(|| news.try_recv().ok()).filter_map(|n| match n {
        News::Facts(facts) => Some(facts.engine_available),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [false, true]);
    // The machine boots: every program has ended, and is started again with no server.
    engine.reboot();
    agent.is("a", |s| runs(s) && s.attempt == 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_hosts_policy_forbids_is_refused_here_whatever_the_server_says() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let allowed = tempfile::tempdir().unwrap();
    let real = std::fs::canonicalize(allowed.path()).unwrap();
    let socket = real.join("engine.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::os::unix::fs::symlink("/etc", real.join("out")).unwrap();
    std::fs::create_dir(real.join("data")).unwrap();
    std::os::unix::fs::symlink(real.join("data"), real.join("in")).unwrap();
    let policy = HostPolicy {
        mount_folders: vec![allowed.path().to_string_lossy().into_owned()],
        ..HostPolicy::default()
    };
    let engine = FakeEngine::new();
    let agent = Agent::start(folder.path(), &engine, policy);
    let mount = |path: std::path::PathBuf| {
        move |spec: &mut api::DeploymentSpec| {
            let source = path.to_string_lossy().into_owned();
            spec.mounts = vec![api::Mount { source, target: "/data".into(), ..Default::default() }];
        }
    };
    for (path, words) in [
        ("/etc".into(), "does not mount /etc"),
        (real.join("out"), "does not mount"),
        (socket, "is a socket"),
        (real.join("none"), "is not there"),
    ] {
        agent.want(&["a"], mount(path));
        agent.is("a", |s| s.reason == "FORBIDDEN" && s.message.contains(words)).await;
    }
    let privileged = |spec: &mut api::DeploymentSpec| {
        spec.privileges = Some(api::Privileges { privileged: true, ..Default::default() });
    };
    agent.want(&["a"], privileged);
    agent.is("a", |s| s.message.contains("no privileged containers")).await;
    assert_eq!((engine.containers().len(), count(&engine, Call::Pull)), (0, 0));
    // What is allowed is mounted by its real path.
    agent.want(&["a"], mount(real.join("in")));
    agent.is("a", runs).await;
    let spec = engine.spec(&engine.containers()[0].id).unwrap();
    assert_eq!(spec.mounts[0].source, real.join("data").to_string_lossy());
}

#[tokio::test(start_paused = true)]
async fn a_container_is_not_started_when_the_policy_or_a_link_has_changed_since_it_was_made() {
    let allowed = tempfile::tempdir().unwrap();
    let real = std::fs::canonicalize(allowed.path()).unwrap();
    let data = real.join("data");
    let mount = |spec: &mut api::DeploymentSpec| {
        let source = data.to_string_lossy().into_owned();
        spec.mounts = vec![api::Mount { source, target: "/data".into(), ..Default::default() }];
    };
    let policy = || HostPolicy {
        mount_folders: vec![real.to_string_lossy().into_owned()],
        ..HostPolicy::default()
    };
    for by_link in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        joined(folder.path());
        let _ = std::fs::remove_file(&data);
        std::fs::create_dir(&data).unwrap();
        let engine = FakeEngine::new();
        // Made, and not started: a port was taken.
        engine.fail_next(Call::Start, EngineError::PortInUse("80".into()));
        let agent = Agent::start(folder.path(), &engine, policy());
        agent.want(&["a"], mount);
        agent.is("a", |s| s.reason == "PORT_IN_USE").await;
        agent.kill().await;
        let first = engine.containers()[0].id.clone();
        let again = if by_link {
            std::fs::remove_dir(&data).unwrap();
            std::os::unix::fs::symlink("/etc", &data).unwrap();
            policy()
        } else {
            HostPolicy::default()
        };
        let agent = Agent::start(folder.path(), &engine, again);
        agent.is("a", |s| s.reason == "FORBIDDEN").await;
        wait_for("it to be removed", || engine.containers().is_empty()).await;
        let started = |what: &(Call, String)| what.0 == Call::Start && what.1 == first;
        assert_eq!(engine.calls().iter().filter(|call| started(call)).count(), 1);
        agent.kill().await;
        if !by_link {
            std::fs::remove_dir(&data).unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_is_made_as_its_deployment_says_and_with_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    joined(folder.path());
    let engine = FakeEngine::new();
    let agent = Agent::start(folder.path(), &engine, HostPolicy::default());
    agent.want(&["a"], |spec| {
        spec.resources =
            Some(api::Resources { cpu_millis: 500, memory_bytes: 64 << 20, ..Default::default() });
        spec.env.insert("K".into(), "v".into());
        spec.stop_grace = Some(prost_types::Duration { seconds: 3, nanos: 0 });
    });
    agent.is("a", runs).await;
    let made = engine.containers().remove(0);
    let spec = engine.spec(&made.id).unwrap();
    assert_eq!(made.name, "berth-iris-a-1");
    let labels = ["namespace", "deployment", "release", "replica", "attempt"];
    let labels = labels.map(|key| made.labels[&format!("io.berth.{key}")].as_str());
    assert_eq!(labels, ["default", "d-uid", "3", "a", "1"]);
    assert!(made.labels["io.berth.spec"].starts_with("sha256:"));
    assert_eq!((spec.cpu_millis, spec.memory_bytes), (Some(500), Some(64 << 20)));
    assert_eq!((spec.log.max_files, spec.log.max_size_bytes), (3, 10_000_000));
    assert!(spec.no_new_privileges && !spec.privileged && spec.mounts.is_empty());
    assert!(spec.cap_add.is_empty() && spec.devices.is_empty());
    let cluster: ClusterUid = CLUSTER.parse().unwrap();
    assert_eq!(spec.network, NetworkMode::Bridge(containers::bridge(&cluster)));
    assert_eq!((spec.stop_grace_s, spec.env["K"].as_str()), (3, "v"));
    assert!(matches!(made.state, ContainerState::Running { .. }));
}
