//! What an idle agent holds resident with 20 containers, TLS on, after it has carried them through
//! a rollout; beside the engine's own process in the same run.
//!
//! The agent measured is the shipped form, static with the `dist` profile, unless
//! `BERTH_BENCH_AGENT` names another binary. `BERTH_BENCH_QUIET_S` (60) is how long nothing happens
//! before it is looked at.

use anyhow::{Context as _, Result, ensure};
use berth_tests::bench::{number, stand_in_image, status_kib};
use berth_tests::{Cluster, PATIENCE, Process, bin_dir, eventually, has_docker};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const CONTAINERS: usize = 20;

fn binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("BERTH_BENCH_AGENT") {
        return Ok(named.into());
    }
    let target = format!("../{}-unknown-linux-musl/dist/berth-agent", std::env::consts::ARCH);
    let path = bin_dir()?.join(target);
    ensure!(path.exists(), "{} is not built; tests/benches/run builds it", path.display());
    Ok(path)
}

fn main() -> Result<()> {
    if !has_docker("agent_memory") {
        return Ok(());
    }
    let binary = binary()?;
    let mut cluster = Cluster::start()?;
    let token = cluster.berth_json(&["host", "token", "create"])?;
    let token = token["secret"].as_str().context("no secret in the answer")?.to_owned();
    let folder = cluster.agent_dir("one");
    let joined = Command::new(&binary)
        .args(["join", "--server", &cluster.door("control")?, "--token", &token, "--data-dir"])
        .arg(&folder)
        .status()?;
    ensure!(joined.success(), "the agent did not join");
    let log = cluster.dir.path().join("agent.log");
    let agent =
        Process::start(Command::new(&binary).args(["run", "--data-dir"]).arg(&folder), &log)?;
    // Held by the cluster, so that what it made is removed at the end.
    let id = agent.id();
    cluster.adopt_agent("one", agent);

    let _image = stand_in_image(&cluster, "bench/stand-in:1")?;
    let manifest = cluster.dir.path().join("bench.yaml");
    let text = format!(
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: bench}}\nspec:\n  image: bench/stand-in:1\n  replicas: {CONTAINERS}\n  resources: {{cpu: 10m, memory: 16MiB}}\n  ports: [{{name: http, container: 8080}}]\n  health: {{http: {{path: /healthy, port: http}}, interval: 5s}}\n  rollout: {{readyFor: 0s}}\n"
    );
    std::fs::write(&manifest, text)?;
    cluster.berth_ok(&["apply", "-f", manifest.to_str().context("a path")?])?;
    eventually("all are ready", PATIENCE, || {
        let all = cluster.berth_json(&["ps"])?;
        let ready = all.as_array().context("a list")?.iter();
        let ready = ready.filter(|r| r["state"] == "ready").count();
        ensure!(ready == CONTAINERS, "{ready} of {CONTAINERS}");
        Ok(())
    })?;
    let quiet = Duration::from_secs(u64::try_from(number("BERTH_BENCH_QUIET_S", 60))?);
    println!("{CONTAINERS} containers are ready; quiet for {} s", quiet.as_secs());
    let (_tx, rx) = std::sync::mpsc::channel::<()>();
    let _ = rx.recv_timeout(quiet);

    let engine = Command::new("pidof").arg("dockerd").output()?;
    let engine = String::from_utf8(engine.stdout)?;
    let engine = engine.split_whitespace().next().and_then(|id| id.parse().ok());
    let rss = status_kib(id, "VmRSS")?;
    println!("{}", binary.display());
    println!("resident        {:.2} MiB (goal 8)", rss / 1024.0);
    println!("  of it its own {:.2} MiB", status_kib(id, "RssAnon")? / 1024.0);
    println!("greatest ever   {:.2} MiB", status_kib(id, "VmHWM")? / 1024.0);
    if let Some(engine) = engine {
        let beside = status_kib(engine, "VmRSS")?;
        println!("the engine      {:.2} MiB, ratio {:.3}", beside / 1024.0, rss / beside);
    }
    // The image's name can go once nothing uses it.
    let uid = cluster.uid()?;
    cluster.berth_ok(&["rm", "bench", "--yes"])?;
    eventually("all are gone", PATIENCE, || {
        let left = berth_tests::docker_containers(&uid, false)?;
        ensure!(left.is_empty(), "{} are left", left.len());
        Ok(())
    })
}
