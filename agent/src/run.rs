//! The agent as a whole.

use crate::config::Config;
use crate::engine::Engine;
use crate::engine::docker::DockerEngine;
use crate::facts;
use crate::fetch::client::Client;
use crate::fetch::door::Door;
use crate::reconciler::Reconciler;
use crate::session::{self, tls_config};
use crate::state::{News, Shared};
use crate::store::Store;
use anyhow::Context as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Facts are looked at again so often.
const FACTS: Duration = Duration::from_secs(60);

/// Runs until SIGTERM or SIGINT. Stops no container, neither then nor ever by itself.
///
/// # Errors
/// When the disk is damaged or in use, or the host has not joined.
pub async fn run(folder: &Path, socket: &Path, config: Config) -> anyhow::Result<()> {
    let store = Store::open(folder)?;
    let shared = Arc::new(Shared::open(store, config.policy())?);
    let engine: Arc<dyn Engine> = Arc::new(DockerEngine::new(socket));
    let identity = shared.identity.lock().clone();
    tracing::info!(
        host = identity.name,
        cluster = identity.cluster,
        start = shared.agent_start,
        "the agent starts"
    );
    let seen = shared.store.set().map(|s| s.last_seen_unix_ms).unwrap_or(0);
    let tls = tls_config(&identity, seen, &[b"http/1.1"]).context("the identity is not right")?;
    let client = Client::new(identity.registry.clone(), tls);
    let door =
        Door::open(client.clone()).await.context("cannot open the engine's registry door")?;
    shared.inner.lock().facts = facts::gather(&config, folder, &*engine).await;

    let reconciler =
        Arc::new(Reconciler::new(Arc::clone(&shared), Arc::clone(&engine), client.clone(), door));
    tokio::spawn(reconciler.run());
    tokio::spawn(session::run(Arc::clone(&shared), Arc::clone(&engine), client));
    tokio::spawn(watch_facts(Arc::clone(&shared), Arc::clone(&engine), config));

    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        // Cancel-safe, both.
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    tracing::info!("the agent stops; containers go on");
    Ok(())
}

async fn watch_facts(shared: Arc<Shared>, engine: Arc<dyn Engine>, config: Config) {
    let mut tick = tokio::time::interval(FACTS);
    // A late look is not made up for by two at once.
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    loop {
        tick.tick().await;
        let facts = facts::gather(&config, shared.store.folder(), &*engine).await;
        let changed = {
            let mut inner = shared.inner.lock();
            // Ports come and go with our own containers; they are told with the next real change.
            let calm = |f: &berth_proto::api::HostFacts| berth_proto::api::HostFacts {
                disk_free_bytes: 0,
                used_ports: Vec::new(),
                ..f.clone()
            };
            let changed = calm(&inner.facts) != calm(&facts);
            inner.facts = facts.clone();
            changed
        };
        if changed {
            let _ = shared.news.send(News::Facts(Box::new(facts)));
        }
    }
}

/// Removes all containers of the cluster, and the agent's models and identity.
pub async fn wipe(shared: &Shared, engine: &dyn Engine) {
    if let Ok(all) = engine.observe(&shared.cluster).await {
        for container in all {
            if let Err(error) = engine.remove(&container.id, true).await {
                tracing::warn!(%error, "a container could not be removed");
            }
        }
    }
    for name in ["models", "set", "identity"] {
        let path = shared.store.folder().join(name);
        let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
    }
}
