//! Submit-to-running of many replicas through Berth, beside the bare engine in the same run.
//!
//! The bare side makes the same bridge, then creates and starts the same containers through the
//! same adapter, 16 calls at once, which is as good as one engine gets on two cores; its clock stops
//! when the last start has been answered. Berth's clock starts before `berth apply` is spawned and
//! stops at the engine's own event of the last start. The sides take turns, and the ratio is taken
//! pair by pair, so that it holds while the machine's speed drifts.
//!
//! `BERTH_BENCH_REPLICAS` (50) and `BERTH_BENCH_ROUNDS` (5) change its size.

use anyhow::{Context as _, Result, ensure};
use berth_agent::engine::docker::DockerEngine;
use berth_agent::engine::{ContainerSpec, ContainerState, Engine, EventKind, NetworkMode, Traffic};
use berth_proto::ids::ClusterUid;
use berth_tests::bench::{Spread, number, stand_in_image};
use berth_tests::{Cluster, PATIENCE, eventually, has_docker};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Engine calls at once on the bare side; the agent's own bound as well.
const AT_ONCE: usize = 16;

/// One round of the bare engine: how long until all run.
async fn bare(engine: &DockerEngine, image: &str, count: usize) -> Result<Duration> {
    let cluster: ClusterUid = "00000000-0000-7000-8000-0000000be9c4".parse()?;
    let bridge = "berth-bench-bare".to_owned();
    engine.ensure_network(&cluster, &bridge, Traffic::Off).await?;
    let begin = Instant::now();
    let started = stream::iter(0..count)
        .map(|n| {
            let name = format!("berth-bench-bare-{n}");
            let mut spec = ContainerSpec::new(&cluster, &name, image);
            spec.network = NetworkMode::Bridge(bridge.clone());
            spec.memory_bytes = Some(16 << 20);
            spec.cpu_millis = Some(10);
            for key in ["namespace", "deployment", "release", "replica", "attempt", "spec"] {
                spec.labels.insert(format!("io.berth.{key}"), n.to_string());
            }
            async move {
                let id = engine.create(&spec).await?;
                engine.start(&id).await?;
                Ok::<_, anyhow::Error>(id)
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await;
    let took = begin.elapsed();
    for container in engine.observe(&cluster).await? {
        engine.remove(&container.id, true).await?;
    }
    engine.remove_network(&bridge).await?;
    started?;
    Ok(took)
}

/// One round through Berth: how long until all run.
async fn ours(
    engine: &DockerEngine,
    cluster: &Cluster,
    manifest: &Path,
    count: usize,
) -> Result<Duration> {
    let uid: ClusterUid = cluster.uid()?.parse()?;
    let file = manifest.to_str().context("a path")?;
    let mut events = engine.events(&uid).await?;
    let begin = Instant::now();
    cluster.berth_ok(&["apply", "-f", file, "--no-wait"])?;
    let mut running = 0;
    while running < count {
        let event = tokio::time::timeout(PATIENCE, events.next())
            .await
            .context("the engine tells of no further start")?
            .context("the engine's events ended")??;
        if matches!(event.kind, EventKind::Start) {
            running += 1;
        }
    }
    let took = begin.elapsed();
    let seen = engine.observe(&uid).await?;
    let up = seen.iter().filter(|c| matches!(c.state, ContainerState::Running { .. })).count();
    ensure!(up == count && seen.len() == count, "{up} of {count} run, {} are there", seen.len());
    cluster.berth_ok(&["rm", "bench", "--yes"])?;
    eventually("all are gone", 2 * PATIENCE, || {
        let left = berth_tests::docker_containers(uid.as_str(), false)?;
        ensure!(left.is_empty(), "{} are left", left.len());
        Ok(())
    })?;
    eventually("the deployment has ended", PATIENCE, || {
        let all = cluster.berth_json(&["deployment", "list"])?;
        ensure!(all.as_array().is_some_and(Vec::is_empty), "{all}");
        Ok(())
    })?;
    Ok(took)
}

fn main() -> Result<()> {
    if !has_docker("deploy") {
        return Ok(());
    }
    let (count, rounds) = (number("BERTH_BENCH_REPLICAS", 50), number("BERTH_BENCH_ROUNDS", 5));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let engine = DockerEngine::new("/var/run/docker.sock");
    let mut cluster = Cluster::start()?;
    cluster.add_agent("one", &[])?;
    let image = stand_in_image(&cluster, "bench/stand-in:1")?;
    let manifest = cluster.dir.path().join("bench.yaml");
    let text = format!(
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: bench}}\nspec:\n  image: bench/stand-in:1\n  replicas: {count}\n  resources: {{cpu: 10m, memory: 16MiB}}\n  rollout: {{readyFor: 0s}}\n"
    );
    std::fs::write(&manifest, text)?;

    let (mut alone, mut through, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // The first pair warms up: the image is pulled and the engine's caches fill.
    for round in 0..=rounds {
        let b = runtime.block_on(ours(&engine, &cluster, &manifest, count))?.as_secs_f64();
        let a = runtime.block_on(bare(&engine, &image.id, count))?.as_secs_f64();
        println!("round {round}: bare {a:.2} s, Berth {b:.2} s, ratio {:.3}", b / a);
        if round > 0 {
            alone.push(a);
            through.push(b);
            ratios.push(b / a);
        }
    }
    println!("submit to running, {count} replicas, {rounds} rounds after one to warm up");
    println!("bare engine, {AT_ONCE} at once   {} s", Spread::of(&alone));
    println!("Berth                   {} s", Spread::of(&through));
    println!("ratio (goal 1.05)       {}", Spread::of(&ratios));
    Ok(())
}
