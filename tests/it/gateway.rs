//! The gateway before real replicas: clients nobody of Berth wrote get right answers, also while
//! everything behind it is being replaced.

use crate::clients::{clients, run};
use anyhow::{Context as _, Result, ensure};
use berth_tests::hosts::{Fleet, can_make_hosts};
use berth_tests::samples::{model, onnx_cluster, push_runtime};
use berth_tests::{Cluster, PATIENCE, docker_containers, eventually, has_docker, root};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A sample model's deployment, by `<namespace>.<name>` outside of `default`.
fn deploy(cluster: &Cluster, callers_name: &str, replicas: u32) -> Result<()> {
    let (namespace, name) = callers_name.split_once('.').unwrap_or(("default", callers_name));
    let file = model(name, "model.onnx")?;
    cluster.berth_ok(&["-n", namespace, "model", "push", &format!("{name}:1"), &file])?;
    let text = format!(
        "apiVersion: berth/v1\nkind: Deployment\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  model: {name}:1\n  \
         replicas: {replicas}\n  ports: [{{name: http, container: 8080}}]\n  \
         rollout: {{maxSurge: 1, maxUnavailable: 0, readyFor: 1s}}\n"
    );
    let manifest = cluster.dir.path().join(format!("{callers_name}.yaml"));
    std::fs::write(&manifest, text)?;
    let manifest = manifest.to_str().context("a path")?;
    cluster.berth_ok(&["apply", "-f", manifest, "--timeout", "90s"])?;
    Ok(())
}

/// `tests/clients/oip.py` as this user.
fn client(cluster: &Cluster, bin: &Path, what: &str, token: &str) -> Result<Command> {
    let mut command = Command::new(bin.join("python"));
    command.arg(root().join("tests/clients/oip.py")).arg(what);
    command.arg(cluster.door("gateway")?).arg(cluster.server_dir().join("ca.crt"));
    command.arg(token).arg(root().join("deploy/models"));
    Ok(command)
}

fn token(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let made = cluster.berth_json(&[&["user", "token"], args].concat())?;
    made["secret"].as_str().map(str::to_owned).context("no secret in the answer")
}

#[test]
fn a_client_nobody_of_berth_wrote_gets_the_known_answers_over_http_and_grpc() {
    let name = "a_client_nobody_of_berth_wrote";
    let Some(bin) = clients(name).filter(|_| has_docker(name)) else { return };
    let cluster = onnx_cluster().unwrap();
    let names = ["iris", "edge.digits"];
    for name in names {
        deploy(&cluster, name, 1).unwrap();
    }
    let token = token(&cluster, &["admin"]).unwrap();
    let told = run(client(&cluster, &bin, "ask", &token).unwrap().args(names));
    for protocol in ["http", "grpc"] {
        for name in names {
            assert!(told.contains(&format!("{protocol}: {name} answers rightly")), "{told}");
        }
        assert!(told.contains(&format!("{protocol}: what is wrong is refused")), "{told}");
    }
}

/// A caller that asks without a pause and counts.
struct Load {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Load {
    /// Asks until the first answer is there.
    fn start(cluster: &Cluster, bin: &Path, token: &str, protocol: &str) -> Result<Self> {
        let mut command = client(cluster, bin, "load", token)?;
        command.args(["iris", protocol]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("its output is piped")?;
        let mut load = Self { child, stdin, lines: BufReader::new(stdout).lines() };
        let first = load.lines.next().context("it ended before the first answer")??;
        ensure!(first == "asking", "{first}");
        Ok(load)
    }

    /// Stops asking; what became of all.
    fn end(mut self) -> Result<Value> {
        drop(self.stdin.take());
        let last = self.lines.next().context("it says nothing at its end")??;
        ensure!(self.child.wait()?.success(), "{last}");
        Ok(serde_json::from_str(&last)?)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until exactly so many containers run and as many replicas are ready.
fn settles(cluster: &Cluster, uid: &str, number: usize) -> Result<()> {
    eventually("exactly what is wanted runs", PATIENCE, || {
        let all = cluster.berth_json(&["ps", "iris"])?;
        let all = all.as_array().context("a list")?;
        let ready = all.iter().filter(|r| r["state"] == "ready").count();
        let running = docker_containers(uid, true)?.len();
        ensure!(ready == number && all.len() == number && running == number, "{all:?}");
        Ok(())
    })
}

#[test]
fn no_request_fails_while_replicas_are_replaced_and_removed_and_their_agent_is_restarted() {
    let name = "no_request_fails";
    let Some(bin) = clients(name).filter(|_| has_docker(name)) else { return };
    let mut cluster = onnx_cluster().unwrap();
    let uid = cluster.uid().unwrap();
    deploy(&cluster, "iris", 3).unwrap();
    settles(&cluster, &uid, 3).unwrap();
    let token = token(&cluster, &["admin"]).unwrap();
    let loads =
        ["http", "grpc"].map(|protocol| Load::start(&cluster, &bin, &token, protocol).unwrap());

    let before = docker_containers(&uid, true).unwrap();
    cluster.berth_ok(&["deployment", "restart", "iris"]).unwrap();
    eventually("every container is another one", PATIENCE, || {
        let now = docker_containers(&uid, true)?;
        ensure!(now.len() == 3 && !now.iter().any(|id| before.contains(id)), "{now:?}");
        Ok(())
    })
    .unwrap();
    settles(&cluster, &uid, 3).unwrap();

    cluster.berth_ok(&["scale", "iris", "1"]).unwrap();
    settles(&cluster, &uid, 1).unwrap();

    for _ in 0..3 {
        cluster.agent("one").terminate(PATIENCE).unwrap();
        cluster.start_agent("one", &[]).unwrap();
        settles(&cluster, &uid, 1).unwrap();
    }

    for load in loads {
        let told = load.end().unwrap();
        println!("{told}");
        assert_eq!(told["failed"], 0, "{told}");
    }
}

#[test]
fn no_request_fails_while_a_host_is_cut_off_or_loses_power_and_comes_back() {
    let name = "no_request_fails_while_a_host_is_cut_off";
    let Some(bin) = clients(name).filter(|_| has_docker(name) && can_make_hosts(name)) else {
        return;
    };
    let mut fleet = Fleet::start(3).unwrap();
    push_runtime(&fleet.cluster).unwrap();
    deploy(&fleet.cluster, "iris", 3).unwrap();
    let hosts: BTreeSet<String> = fleet
        .ready("iris", 3)
        .unwrap()
        .iter()
        .map(|r| r["host"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(hosts.len(), 3, "one on each host: {hosts:?}");
    let token = token(&fleet.cluster, &["admin"]).unwrap();
    let loads = ["http", "grpc"]
        .map(|protocol| Load::start(&fleet.cluster, &bin, &token, protocol).unwrap());

    let away = |fleet: &Fleet, host: &str| {
        eventually("the host is away", PATIENCE, || {
            let listed = fleet.ps("iris")?;
            let one = listed.iter().find(|r| r["host"] == *host).context("it is not listed")?;
            ensure!(one["state"].as_str().is_some_and(|s| s.starts_with("host ")), "{one}");
            Ok(())
        })
    };
    // Silently: what is under way there is neither answered nor refused.
    fleet.hosts[1].cut().unwrap();
    away(&fleet, "h1").unwrap();
    fleet.hosts[1].mend().unwrap();
    fleet.all_present().unwrap();
    fleet.ready("iris", 3).unwrap();

    fleet.hosts[2].power_off();
    away(&fleet, "h2").unwrap();
    fleet.hosts[2].power_on().unwrap();
    fleet.hosts[2].start_agent().unwrap();
    fleet.all_present().unwrap();
    fleet.ready("iris", 3).unwrap();

    for load in loads {
        let told = load.end().unwrap();
        println!("{told}");
        assert_eq!(told["failed"], 0, "{told}");
    }
}
