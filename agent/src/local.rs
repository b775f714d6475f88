//! What is done on the host itself, with the server gone: from the agent's disk and its engine alone.
//!
//! Reading works beside a running agent; what changes the agent's disk needs it for itself.

use crate::containers::{LABEL_ATTEMPT, LABEL_NAMESPACE, LABEL_REPLICA, bridge};
use crate::engine::{ContainerState, Engine, LogQuery, Source};
use crate::fetch::bring::MODELS;
use crate::link::{self, Link};
use crate::reach;
use crate::state::wall_now;
use crate::store::Store;
use anyhow::{Context as _, bail};
use berth_proto::ids::ReplicaUid;
use berth_proto::words::counted;
use futures_util::StreamExt as _;
use std::io::Write;
use std::path::Path;

/// Names another address of the server, to be tried first, and of its registry, where that is another
/// one.
///
/// # Errors
/// When an agent runs, or the disk does not take it.
pub fn set_server(folder: &Path, server: &str, registry: Option<&str>) -> anyhow::Result<()> {
    for address in [Some(server), registry].into_iter().flatten() {
        crate::join::check_address(address)?;
    }
    let store = Store::open(folder).context("stop the agent first")?;
    let mut identity = store.identity()?;
    let trust = identity.trust.get_or_insert_default();
    trust.endpoints.retain(|e| e != server);
    trust.endpoints.insert(0, server.to_owned());
    if let Some(registry) = registry {
        registry.clone_into(&mut identity.registry);
    }
    store.put_identity(&identity)?;
    Ok(())
}

/// Forgets the cluster; its containers and the models they read go on, or are removed with the names
/// of its images.
///
/// # Errors
/// When an agent runs, or a container cannot be removed: then nothing is forgotten.
pub async fn leave(
    folder: &Path,
    engine: &dyn Engine,
    remove_containers: bool,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let store = Store::open(folder).context("stop the agent first")?;
    let cluster = store.identity()?.cluster.parse()?;
    if remove_containers {
        for container in engine.observe(&cluster).await? {
            engine.remove(&container.id, true).await?;
            writeln!(out, "removed {}", container.name)?;
        }
        if let Err(error) = engine.remove_network(&bridge(&cluster)).await {
            tracing::warn!(%error, "the bridge could not be removed");
        }
        crate::fetch::keep::forget_images(engine, &folder.join(MODELS)).await;
        crate::retire::remove_held(folder);
    }
    store.forget_cluster()?;
    writeln!(out, "left cluster {cluster}")?;
    Ok(())
}

/// How what is found out is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: one JSON value, names and values stable.
    Json,
}

/// What `status` tells.
#[derive(Debug, serde::Serialize)]
struct Status {
    host: String,
    uid: String,
    cluster: String,
    servers: Vec<String>,
    registry: String,
    /// Absent: that cannot be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent_runs: Option<bool>,
    /// Absent: no session was ever tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<Link>,
    /// `removed`, or `removing` while what it ran is being removed; absent: it is a host of its cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<&'static str>,
    /// Absent: none was ever received.
    #[serde(skip_serializing_if = "Option::is_none")]
    set: Option<HeldSet>,
    /// Absent: it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine_error: Option<String>,
    /// Absent: that cannot be told now.
    #[serde(skip_serializing_if = "Option::is_none")]
    container_addresses_reached: Option<bool>,
}

#[derive(Debug, serde::Serialize)]
struct HeldSet {
    epoch: u64,
    generation: u64,
    replicas: usize,
}

/// Says who this host is and what it was told.
///
/// # Errors
/// When it has not joined, or its disk is damaged.
pub async fn status(
    folder: &Path,
    engine: &dyn Engine,
    output: Output,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let store = Store::peek(folder);
    let identity = store.identity()?;
    let set = store.set_of(&identity.cluster)?;
    let cluster = identity.cluster.parse()?;
    let info = engine.info().await;
    let removed = if identity.wipe { "removing" } else { "removed" };
    let status = Status {
        host: identity.name,
        uid: identity.host_uid,
        servers: identity.trust.unwrap_or_default().endpoints,
        registry: identity.registry,
        agent_runs: link::agent_runs(folder),
        link: Link::read(folder),
        removed: identity.removed.then_some(removed),
        set: set.id.map(|id| HeldSet {
            epoch: id.epoch,
            generation: id.generation,
            replicas: set.entries.len(),
        }),
        engine: info.as_ref().ok().map(|info| format!("{} {}", info.name, info.version)),
        engine_error: info.err().map(|error| error.to_string()),
        container_addresses_reached: reach::look(engine, &cluster, &bridge(&cluster)).await,
        cluster: identity.cluster,
    };
    if output == Output::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
        return Ok(());
    }
    writeln!(out, "host:     {} ({})", status.host, status.uid)?;
    writeln!(out, "cluster:  {}", status.cluster)?;
    writeln!(out, "servers:  {}", status.servers.join(", "))?;
    writeln!(out, "registry: {}", status.registry)?;
    writeln!(out, "session:  {}", session_words(status.agent_runs, status.link.as_ref()))?;
    if status.removed.is_some() {
        let left =
            if identity.wipe { "what it ran is being removed" } else { "what it ran goes on" };
        writeln!(out, "removed:  from its cluster; {left}; `berth-agent leave` frees this host")?;
    }
    match status.set {
        Some(HeldSet { epoch, generation, replicas }) => {
            let replicas = counted(replicas, "replica");
            writeln!(out, "set:      {epoch}.{generation}, {replicas}")?;
        }
        None => writeln!(out, "set:      none was ever received")?,
    }
    match (status.engine, status.engine_error) {
        (Some(engine), _) => writeln!(out, "engine:   {engine}")?,
        (None, error) => {
            writeln!(out, "engine:   does not answer: {}", error.unwrap_or_default())?;
        }
    }
    let network = match status.container_addresses_reached {
        Some(true) => "container addresses are reached",
        Some(false) => {
            "container addresses are not reached: health checks by network and the gateway fail here"
        }
        None => "whether container addresses are reached cannot be told now",
    };
    writeln!(out, "network:  {network}")?;
    Ok(())
}

/// How it stands with the server, in words.
fn session_words(agent_runs: Option<bool>, link: Option<&Link>) -> String {
    let since = |link: &Link| {
        let ms = wall_now().0.saturating_sub(link.since_unix_ms);
        let seconds = u64::try_from(ms / 1000).unwrap_or(0).max(1);
        berth_proto::quantity::format_duration_ms(seconds * 1000)
    };
    match (agent_runs, link) {
        (Some(false), _) => "none: no agent runs here; what runs goes on".to_owned(),
        (_, None) => "none was tried yet".to_owned(),
        (_, Some(link)) if link.stands => format!("with {} for {}", link.server, since(link)),
        (_, Some(link)) => {
            format!("none for {}, tried {} last: {}", since(link), link.server, link.why)
        }
    }
}

/// One container of the cluster on this host.
#[derive(Debug, serde::Serialize)]
struct Listed {
    namespace: String,
    /// By name; empty: this host's set does not name it any more.
    deployment: String,
    /// Absent: this host's set does not name it any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<u32>,
    replica: String,
    attempt: u32,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    container: String,
    #[serde(skip)]
    id: String,
}

impl Listed {
    /// As a server's lists name it; its uid where that is not known.
    fn name(&self) -> String {
        match self.slot {
            Some(slot) => format!("{}/{slot}", self.deployment),
            None => self.replica.clone(),
        }
    }

    /// Whether a person who says `asked` means it: a deployment's name, one with a slot, or the beginning
    /// of a uid.
    fn is(&self, asked: &str) -> bool {
        let named = self.slot.is_some() && (self.deployment == asked || self.name() == asked);
        named || (!asked.is_empty() && self.replica.starts_with(asked))
    }
}

/// The cluster's containers, by name, the newest attempt of each replica last.
async fn listed(folder: &Path, engine: &dyn Engine) -> anyhow::Result<Vec<Listed>> {
    let store = Store::peek(folder);
    let identity = store.identity()?;
    let (wanted, _) = crate::store::from_file(&store.set_of(&identity.cluster)?)?;
    let set = wanted.set().cloned().unwrap_or_default();
    let mut all = Vec::new();
    for c in engine.observe(&identity.cluster.parse()?).await? {
        let label = |key: &str| c.labels.get(key).cloned().unwrap_or_default();
        let (state, exit_code) = match &c.state {
            ContainerState::Created => ("created", None),
            ContainerState::Running { .. } => ("running", None),
            ContainerState::Exited { code, .. } => ("exited", Some(*code)),
            ContainerState::Removing => ("removing", None),
        };
        let replica = label(LABEL_REPLICA);
        let entry = replica.parse().ok().and_then(|uid: ReplicaUid| set.entries.get(&uid));
        let body = entry.and_then(|entry| set.body(entry));
        all.push(Listed {
            namespace: label(LABEL_NAMESPACE),
            deployment: body.map(|b| b.value.deployment.to_string()).unwrap_or_default(),
            slot: body.and(entry).map(|entry| entry.slot),
            replica,
            attempt: label(LABEL_ATTEMPT).parse().unwrap_or_default(),
            state,
            exit_code,
            container: c.name,
            id: c.id,
        });
    }
    let key = |c: &Listed| (c.namespace.clone(), c.deployment.clone(), c.slot, c.replica.clone());
    all.sort_by_key(|c| (key(c), c.attempt));
    Ok(all)
}

/// Lists the cluster's containers.
///
/// # Errors
/// When the host has not joined, its disk is damaged or the engine does not answer.
pub async fn ps(
    folder: &Path,
    engine: &dyn Engine,
    output: Output,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let all = listed(folder, engine).await?;
    if output == Output::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    let names: Vec<String> = all.iter().map(Listed::name).collect();
    let wide = names.iter().map(String::len).chain([7]).max().unwrap_or(7);
    writeln!(out, "{:<wide$}  {:>7}  {:<12}  CONTAINER", "REPLICA", "ATTEMPT", "STATE")?;
    for (c, name) in all.iter().zip(names) {
        let state = match c.exit_code {
            Some(code) => format!("{} ({code})", c.state),
            None => c.state.to_owned(),
        };
        writeln!(out, "{name:<wide$}  {:>7}  {state:<12}  {}", c.attempt, c.container)?;
    }
    Ok(())
}

/// Shows a replica's output, of its newest attempt.
///
/// # Errors
/// When there is none, several are meant, or the engine does not answer.
pub async fn logs(
    folder: &Path,
    engine: &dyn Engine,
    replica: &str,
    tail: Option<u32>,
    (out, err): (&mut (dyn Write + Send), &mut (dyn Write + Send)),
) -> anyhow::Result<()> {
    let mut all = listed(folder, engine).await?;
    all.retain(|c| c.is(replica));
    let Some(newest) = all.last() else {
        bail!("no container of a replica \"{replica}\" is here; see berth-agent ps");
    };
    if let Some(other) = all.iter().find(|c| c.replica != newest.replica) {
        let (one, other) = (other.name(), newest.name());
        bail!("\"{replica}\" is more than one replica here: name one, such as {one} or {other}");
    }
    let mut lines = engine.logs(&newest.id, LogQuery { tail, ..LogQuery::default() });
    while let Some(chunk) = lines.next().await {
        let chunk = chunk?;
        match chunk.source {
            Source::Stdout => out.write_all(&chunk.bytes)?,
            Source::Stderr => err.write_all(&chunk.bytes)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ContainerSpec;
    use crate::engine::fake::FakeEngine;
    use berth_proto::api;
    use berth_proto::record::AgentIdentityFile;

    async fn host() -> (tempfile::TempDir, FakeEngine) {
        let folder = tempfile::tempdir().unwrap();
        let identity = AgentIdentityFile {
            name: "edge-1".into(),
            host_uid: "uid-1".into(),
            cluster: "ours".into(),
            ..Default::default()
        };
        Store::open(folder.path()).unwrap().put_identity(&identity).unwrap();
        let engine = FakeEngine::new();
        engine.add_image("sha256:i", &[]);
        for (cluster, attempt) in [("ours", "1"), ("ours", "2"), ("theirs", "1")] {
            let name = format!("{cluster}-{attempt}");
            let mut spec = ContainerSpec::new(&cluster.parse().unwrap(), &name, "sha256:i");
            spec.labels.insert(LABEL_REPLICA.into(), "r-1".into());
            spec.labels.insert(LABEL_ATTEMPT.into(), attempt.into());
            let id = engine.create(&spec).await.unwrap();
            engine.start(&id).await.unwrap();
            engine.write_log(&id, Source::Stdout, &format!("out of {name}\n"));
            engine.crash(&id, 7, false);
        }
        (folder, engine)
    }

    #[tokio::test]
    async fn all_can_be_seen_with_no_server_beside_a_running_agent() {
        let (folder, engine) = host().await;
        let _agent = Store::open(folder.path()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        status(folder.path(), &engine, Output::Table, &mut out).await.unwrap();
        ps(folder.path(), &engine, Output::Table, &mut out).await.unwrap();
        logs(folder.path(), &engine, "r", None, (&mut out, &mut err)).await.unwrap();
        let text = String::from_utf8(out).unwrap();
        for words in [
            "edge-1 (uid-1)",
            "none was ever received",
            "session:  none was tried yet",
            "addresses are reached",
            "exited (7)",
            "out of ours-2",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!text.contains("theirs") && !text.contains("out of ours-1"), "{text}");
        let none = logs(folder.path(), &engine, "x", None, (&mut Vec::new(), &mut err)).await;
        assert!(none.unwrap_err().to_string().contains("berth-agent ps"));
        // What changes the disk waits for the agent to stop.
        assert!(set_server(folder.path(), "a:1", None).is_err());
        assert!(leave(folder.path(), &engine, true, &mut Vec::new()).await.is_err());
        assert_eq!(engine.containers().len(), 3);
        engine.go_away();
        let mut out = Vec::new();
        status(folder.path(), &engine, Output::Table, &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().contains("does not answer"));
    }

    #[test]
    fn how_it_stands_with_the_server_is_told() {
        let up = Link::now("a:1", None);
        let down = Link::now("a:1", Some("refused"));
        let down = Link { since_unix_ms: down.since_unix_ms - 61_500, ..down };
        assert_eq!(session_words(Some(true), Some(&up)), "with a:1 for 1s");
        let words = session_words(Some(true), Some(&down));
        assert_eq!(words, "none for 1m1s, tried a:1 last: refused");
        assert!(session_words(Some(false), Some(&up)).starts_with("none: no agent runs"));
        assert_eq!(session_words(Some(true), None), "none was tried yet");
    }

    #[tokio::test]
    async fn replicas_are_named_as_the_servers_lists_name_them() {
        let (folder, engine) = host().await;
        let digest = berth_proto::ids::Digest::of(b"image").to_string();
        let body = berth_proto::agent::AssignmentBody {
            deployment_uid: "d".into(),
            deployment: "iris".into(),
            namespace: "default".into(),
            release: 1,
            source: Some(api::ResolvedSource {
                image: Some(api::ResolvedImage { digest, ..Default::default() }),
                ..Default::default()
            }),
            spec: Some(api::DeploymentSpec {
                source: Some(api::deployment_spec::Source::Image("i".into())),
                ..Default::default()
            }),
            ..Default::default()
        };
        let body = prost::Message::encode_to_vec(&body);
        let entry = berth_proto::agent::SetEntry {
            replica_uid: "r-1".into(),
            body_digest: berth_proto::ids::Digest::of(&body).to_string(),
            slot: 3,
            ..Default::default()
        };
        let set = berth_proto::record::AgentSetFile {
            id: Some(berth_proto::agent::SetId { epoch: 1, generation: 2 }),
            cluster: "ours".into(),
            entries: vec![entry],
            bodies: vec![body],
            ..Default::default()
        };
        Store::open(folder.path()).unwrap().put_set(&set).unwrap();
        for asked in ["iris", "iris/3", "r-"] {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            logs(folder.path(), &engine, asked, None, (&mut out, &mut err)).await.unwrap();
            assert_eq!(out, b"out of ours-2\n", "{asked}");
        }
        let mut out = Vec::new();
        ps(folder.path(), &engine, Output::Table, &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().contains("iris/3 "));
        let mut out = Vec::new();
        ps(folder.path(), &engine, Output::Json, &mut out).await.unwrap();
        let all: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&all[1]["slot"], &all[1]["exit_code"]), (&3.into(), &7.into()));
        let mut out = Vec::new();
        status(folder.path(), &engine, Output::Json, &mut out).await.unwrap();
        let told: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&told["host"], &told["set"]["replicas"]), (&"edge-1".into(), &1.into()));
        // Another replica of the same deployment: then its slot has to be said.
        let mut spec = ContainerSpec::new(&"ours".parse().unwrap(), "second", "sha256:i");
        spec.labels.insert(LABEL_REPLICA.into(), "r-2".into());
        spec.labels.insert(LABEL_ATTEMPT.into(), "1".into());
        engine.create(&spec).await.unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let two = logs(folder.path(), &engine, "r-", None, (&mut out, &mut err)).await;
        assert!(two.unwrap_err().to_string().contains("more than one"));
    }

    #[tokio::test]
    async fn another_server_is_tried_first_and_named_once() {
        let (folder, _) = host().await;
        for server in ["a:1", "b:2", "a:1"] {
            set_server(folder.path(), server, None).unwrap();
        }
        let before = Store::peek(folder.path()).identity().unwrap();
        assert_eq!(before.trust.unwrap().endpoints, ["a:1", "b:2"]);
        assert!(set_server(folder.path(), "a", None).is_err(), "no port");
        assert!(set_server(folder.path(), "a:1", Some(":2")).is_err(), "no host");
        set_server(folder.path(), "a:1", Some("r:2")).unwrap();
        assert_ne!(before.registry, "r:2");
        assert_eq!(Store::peek(folder.path()).identity().unwrap().registry, "r:2");
    }

    #[tokio::test]
    async fn leaving_forgets_the_cluster_and_removes_its_containers_only_when_asked() {
        let (folder, engine) = host().await;
        let models = |folder: &tempfile::TempDir| {
            std::fs::create_dir(folder.path().join("models")).unwrap();
            std::fs::write(folder.path().join("models/file"), "x").unwrap();
        };
        models(&folder);
        leave(folder.path(), &engine, false, &mut Vec::new()).await.unwrap();
        assert_eq!(engine.containers().len(), 3);
        assert!(Store::peek(folder.path()).identity().is_err());
        assert!(folder.path().join("models/file").exists(), "what runs reads it");

        let (folder, engine) = host().await;
        models(&folder);
        engine.go_away();
        assert!(leave(folder.path(), &engine, true, &mut Vec::new()).await.is_err());
        assert!(Store::peek(folder.path()).identity().is_ok(), "nothing is forgotten");
        engine.come_back();
        leave(folder.path(), &engine, true, &mut Vec::new()).await.unwrap();
        let left: Vec<_> = engine.containers().into_iter().map(|c| c.name).collect();
        assert_eq!(left, ["theirs-1"]);
        assert!(!folder.path().join("models").exists());
    }
}
