//! The agent as a whole.

use crate::claim;
use crate::config::Config;
use crate::containers;
use crate::engine::docker::DockerEngine;
use crate::engine::{Engine, Traffic};
use crate::facts;
use crate::fetch::bring::Fetcher;
use crate::fetch::client::Client;
use crate::reach;
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
    let _claim = claim::claim(Path::new(claim::FOLDER), &shared.cluster, socket)?;
    let engine: Arc<dyn Engine> = Arc::new(DockerEngine::new(socket));
    let identity = shared.identity.lock().clone();
    tracing::info!(
        host = identity.name,
        cluster = identity.cluster,
        start = shared.agent_start,
        "the agent starts"
    );
    let tls = tls_config(&identity, Arc::clone(&shared.clock), &[b"http/1.1"])
        .context("the identity is not right")?;
    let client = Client::new(identity.registry.clone(), tls);
    let limits = config.limits()?;
    let fetcher = Fetcher::open(Arc::clone(&shared), Arc::clone(&engine), client.clone(), limits)
        .await
        .context("cannot open the engine's registry door")?;
    let fetcher = Arc::new(fetcher);
    // An engine that hangs holds up nothing: what it has to say is told when it does.
    shared.inner.lock().board.facts = facts::without_engine(&config, folder);

    let reconciler =
        Arc::new(Reconciler::new(Arc::clone(&shared), Arc::clone(&engine), fetcher.clone()));
    tokio::spawn(reconciler.run());
    tokio::spawn(session::run(Arc::clone(&shared), Arc::clone(&engine), client));
    tokio::spawn(watch_facts(Arc::clone(&shared), Arc::clone(&engine), config));

    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        // Cancel-safe, the first two; the third goes on where it was at the next start.
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
        () = crate::retire::emptied(&shared, &*engine, &fetcher) => {
            tracing::warn!("nothing of its cluster is left on this host; the agent ends");
            return Ok(());
        }
    }
    tracing::info!("the agent stops; containers go on");
    Ok(())
}

/// Whether container addresses are reached: what is found now, else what was known before. Says so
/// when it is found that they are not.
async fn look(shared: &Shared, engine: &dyn Engine, before: bool) -> bool {
    let bridge = containers::bridge(&shared.cluster);
    // So that it can be told before anything runs. Why it cannot be made the reconciler says, which
    // tries again.
    let _ = engine.ensure_network(&shared.cluster, &bridge, Traffic::by(&shared.policy)).await;
    let now = reach::look(engine, &shared.cluster, &bridge).await.unwrap_or(before);
    if before && !now {
        tracing::warn!(
            bridge,
            "the agent does not reach container addresses: health checks by network and the gateway \
             fail on this host; run the agent on the host itself, in the network of the engine's \
             bridges, or check health by exec"
        );
    }
    now
}

async fn watch_facts(shared: Arc<Shared>, engine: Arc<dyn Engine>, config: Config) {
    let mut tick = tokio::time::interval(FACTS);
    // A late look is not made up for by two at once.
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let before = shared.inner.lock().board.facts.clone();
        let reached = look(&shared, &*engine, before.container_network_reachable).await;
        let (folder, cluster) = (shared.store.folder(), Some(&shared.cluster));
        let used = &before.used_ports;
        let facts = facts::gather(&config, folder, &*engine, reached, cluster, used).await;
        let facts = shared.inner.lock().board.gathered(facts).clone();
        shared.gathered.send_replace(true);
        if facts::is_news(&before, &facts) {
            let _ = shared.news.send(News::Facts(Box::new(facts)));
        }
    }
}
