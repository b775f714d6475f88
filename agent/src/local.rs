//! What is done on the host itself, with the server gone: from the agent's disk and its engine alone.
//!
//! Reading works beside a running agent; what changes the agent's disk needs it for itself.

use crate::containers::{LABEL_ATTEMPT, LABEL_REPLICA, bridge};
use crate::engine::{ContainerState, Engine, LogQuery, Source};
use crate::reach;
use crate::store::Store;
use anyhow::{Context as _, bail};
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

/// Forgets the cluster; its containers go on, or are removed.
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
    }
    store.forget_cluster()?;
    writeln!(out, "left cluster {cluster}")?;
    Ok(())
}

/// Says who this host is and what it was told.
///
/// # Errors
/// When it has not joined, or its disk is damaged.
pub async fn status(
    folder: &Path,
    engine: &dyn Engine,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let store = Store::peek(folder);
    let identity = store.identity()?;
    let set = store.set_of(&identity.cluster)?;
    writeln!(out, "host:     {} ({})", identity.name, identity.host_uid)?;
    writeln!(out, "cluster:  {}", identity.cluster)?;
    let trust = identity.trust.unwrap_or_default();
    writeln!(out, "servers:  {}", trust.endpoints.join(", "))?;
    writeln!(out, "registry: {}", identity.registry)?;
    if identity.removed {
        let left =
            if identity.wipe { "what it ran is being removed" } else { "what it ran goes on" };
        writeln!(out, "removed:  from its cluster; {left}; `berth-agent leave` frees this host")?;
    }
    match set.id {
        Some(id) => {
            let count = set.entries.len();
            writeln!(out, "set:      {}.{}, {count} replicas", id.epoch, id.generation)?;
        }
        None => writeln!(out, "set:      none was ever received")?,
    }
    match engine.info().await {
        Ok(info) => writeln!(out, "engine:   {} {}", info.name, info.version)?,
        Err(error) => writeln!(out, "engine:   does not answer: {error}")?,
    }
    let cluster = identity.cluster.parse()?;
    let network = match reach::look(engine, &cluster, &bridge(&cluster)).await {
        Some(true) => "container addresses are reached",
        Some(false) => {
            "container addresses are not reached: health checks by network and the gateway fail here"
        }
        None => "whether container addresses are reached cannot be told now",
    };
    writeln!(out, "network:  {network}")?;
    Ok(())
}

/// Lists the cluster's containers.
///
/// # Errors
/// When the host has not joined or the engine does not answer.
pub async fn ps(
    folder: &Path,
    engine: &dyn Engine,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<()> {
    let identity = Store::peek(folder).identity()?;
    writeln!(out, "{:<38} {:>7}  {:<12} CONTAINER", "REPLICA", "ATTEMPT", "STATE")?;
    for c in engine.observe(&identity.cluster.parse()?).await? {
        let label = |key: &str| c.labels.get(key).map_or("", String::as_str);
        let state = match &c.state {
            ContainerState::Created => "created".to_owned(),
            ContainerState::Running { .. } => "running".to_owned(),
            ContainerState::Exited { code, .. } => format!("exited ({code})"),
            ContainerState::Removing => "removing".to_owned(),
        };
        let (replica, attempt) = (label(LABEL_REPLICA), label(LABEL_ATTEMPT));
        writeln!(out, "{replica:<38} {attempt:>7}  {state:<12} {}", c.name)?;
    }
    Ok(())
}

/// Shows a replica's output, of its newest attempt.
///
/// # Errors
/// When there is none, or the engine does not answer.
pub async fn logs(
    folder: &Path,
    engine: &dyn Engine,
    replica: &str,
    tail: Option<u32>,
    (out, err): (&mut (dyn Write + Send), &mut (dyn Write + Send)),
) -> anyhow::Result<()> {
    let identity = Store::peek(folder).identity()?;
    let mut all = engine.observe(&identity.cluster.parse()?).await?;
    all.retain(|c| c.labels.get(LABEL_REPLICA).is_some_and(|r| r.starts_with(replica)));
    all.sort_by_key(|c| c.labels.get(LABEL_ATTEMPT).and_then(|a| a.parse::<u32>().ok()));
    let Some(newest) = all.last() else {
        bail!("no container of a replica \"{replica}\" is here; see berth-agent ps");
    };
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
        status(folder.path(), &engine, &mut out).await.unwrap();
        ps(folder.path(), &engine, &mut out).await.unwrap();
        logs(folder.path(), &engine, "r", None, (&mut out, &mut err)).await.unwrap();
        let text = String::from_utf8(out).unwrap();
        for words in [
            "edge-1 (uid-1)",
            "none was ever received",
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
        status(folder.path(), &engine, &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().contains("does not answer"));
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
        leave(folder.path(), &engine, false, &mut Vec::new()).await.unwrap();
        assert_eq!(engine.containers().len(), 3);
        assert!(Store::peek(folder.path()).identity().is_err());

        let (folder, engine) = host().await;
        engine.go_away();
        assert!(leave(folder.path(), &engine, true, &mut Vec::new()).await.is_err());
        assert!(Store::peek(folder.path()).identity().is_ok(), "nothing is forgotten");
        engine.come_back();
        leave(folder.path(), &engine, true, &mut Vec::new()).await.unwrap();
        let left: Vec<_> = engine.containers().into_iter().map(|c| c.name).collect();
        assert_eq!(left, ["theirs-1"]);
    }
}
