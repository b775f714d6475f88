//! Readers of logs that do not read.

use anyhow::{Context as _, Result, ensure};
use berth_tests::bench::{stand_in_image, status_kib};
use berth_tests::{Cluster, PATIENCE, command, eventually, has_docker};
use std::io::BufRead as _;
use std::process::{Child, Stdio};

/// What the program has written before it is ready: 64 MB in lines of 1,000 bytes.
const FLOOD_LINES: u32 = 64_000;
/// What server and agent may hold more while nobody reads: half of what waits to be read.
const GROWTH_KIB: f64 = 32.0 * 1024.0;

/// A reader of everything, of which nothing is read but the first line.
struct Stuck(Child);

impl Stuck {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut child = command("berth")?
            .env("BERTH_CONFIG", cluster.server_dir().join("admin.toml"))
            .args(["logs", "-f", "flood", "--tail", &FLOOD_LINES.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().context("its output is piped")?;
        // One byte at a time, so that no more than this line is taken off the pipe.
        let mut lines = std::io::BufReader::with_capacity(1, out);
        let mut first = String::new();
        lines.read_line(&mut first)?;
        ensure!(first.contains("flood/0"), "{first}");
        // The pipe stays open.
        child.stdout = Some(lines.into_inner());
        Ok(Self(child))
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ready(cluster: &Cluster, number: usize) -> Result<()> {
    eventually("the replicas are ready", PATIENCE, || {
        let all = cluster.berth_json(&["ps", "flood"])?;
        let all = all.as_array().context("a list")?;
        let ready = all.iter().filter(|r| r["state"] == "ready").count();
        ensure!(ready == number && all.len() == number, "{ready} of {number}: {all:?}");
        Ok(())
    })
}

#[test]
fn readers_that_never_read_hold_up_nobody_and_cost_no_memory() {
    if !has_docker("readers_that_never_read") {
        return;
    }
    let mut cluster = Cluster::start().unwrap();
    cluster.add_agent("one", &[]).unwrap();
    let _image = stand_in_image(&cluster, "flood:1").unwrap();
    let manifest = cluster.dir.path().join("flood.yaml");
    let text = format!(
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: flood}}\nspec:\n  \
         image: flood:1\n  replicas: 1\n  env: {{DO: \"flood:{FLOOD_LINES}\"}}\n  \
         ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 500ms}}\n  \
         rollout: {{readyFor: 0s}}\n  log: {{maxSize: 100MB, maxFiles: 1}}\n  stopGrace: 0s\n"
    );
    std::fs::write(&manifest, text).unwrap();
    cluster.berth_ok(&["apply", "-f", manifest.to_str().unwrap(), "--timeout", "90s"]).unwrap();
    let held = |cluster: &mut Cluster| {
        [cluster.server().id(), cluster.agent("one").id()]
            .map(|id| status_kib(id, "VmHWM").unwrap())
    };
    let before = held(&mut cluster);
    let stuck: Vec<Stuck> = (0..4).map(|_| Stuck::start(&cluster).unwrap()).collect();

    // The session carries on: sets go down it and statuses come up.
    cluster.berth_ok(&["scale", "flood", "2"]).unwrap();
    ready(&cluster, 2).unwrap();
    cluster.berth_ok(&["scale", "flood", "1"]).unwrap();
    ready(&cluster, 1).unwrap();
    // So does another reader over the same connection of the host.
    let lines = cluster.berth_ok(&["logs", "flood", "--tail", "3"]).unwrap();
    assert_eq!(lines.lines().count(), 3, "{lines}");

    let after = held(&mut cluster);
    for (who, (before, after)) in ["server", "agent"].iter().zip(before.into_iter().zip(after)) {
        println!("the {who} held {before} KiB before and {after} KiB at the most");
        assert!(after - before < GROWTH_KIB, "{who}: {before} KiB became {after} KiB");
    }
    drop(stuck);
    cluster.berth_ok(&["rm", "flood", "--yes"]).unwrap();
}
