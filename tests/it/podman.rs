//! An agent on podman's compatible socket: what works there, and what the host must allow for it.

use anyhow::{Context as _, Result, ensure};
use berth_tests::{Cluster, PATIENCE, Process, eventually, stand_in};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A podman of its own: everything it makes is in one folder, and goes with it.
struct Podman {
    folder: tempfile::TempDir,
    service: Option<Process>,
}

impl Podman {
    fn command(&self) -> Command {
        let at = |name: &str| self.folder.path().join(name);
        let mut command = Command::new("podman");
        command.arg("--root").arg(at("root")).arg("--runroot").arg(at("run"));
        command.arg("--network-config-dir").arg(at("networks"));
        command.args(["--storage-driver", "vfs"]).env("CONTAINERS_CONF", at("containers.conf"));
        command
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.command().args(args).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "podman {args:?}: {error}");
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("podman.sock")
    }

    /// Starts its service; `None`: no podman here can run a container.
    fn start() -> Result<Option<Self>> {
        if Command::new("podman").arg("--version").output().is_err() {
            return Ok(None);
        }
        let folder = tempfile::Builder::new().prefix("berth-podman-").tempdir()?;
        // Its own defaults are more than some machines give to anybody.
        let limits =
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n";
        std::fs::write(folder.path().join("containers.conf"), limits)?;
        let mut podman = Self { folder, service: None };
        let archive = stand_in::archive(podman.folder.path(), 0)?;
        let archive = archive.to_str().context("a path")?;
        let entry = "ENTRYPOINT [\"/berth-stand-in\"]";
        podman.run(&["import", "-q", "-c", entry, archive, "localhost/stand-in:1"])?;
        let trial = ["run", "--rm", "--network", "none", "-e", "DO=exit:0", "localhost/stand-in:1"];
        let tried = podman.run(&trial);
        if let Err(error) = tried {
            println!("podman runs no container here: {error}");
            return Ok(None);
        }
        let mut command = podman.command();
        command.args(["system", "service", "--time=0"]);
        command.arg(format!("unix://{}", podman.socket().display()));
        let process = Process::start(&mut command, &podman.folder.path().join("podman.log"))?;
        podman.service = Some(process);
        eventually("podman's socket is there", PATIENCE, || {
            ensure!(podman.socket().exists());
            Ok(())
        })?;
        Ok(Some(podman))
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        let _ = self.run(&["network", "prune", "--force"]);
        self.service = None;
        let _ = self.run(&["rmi", "--all", "--force"]);
    }
}

/// The attempt of the one replica, which must be ready.
fn ready(cluster: &Cluster) -> Result<u64> {
    let all = cluster.berth_json(&["ps", "app"])?;
    let all = all.as_array().context("a list")?;
    ensure!(all.len() == 1 && all[0]["state"] == "ready", "{all:?}");
    all[0]["attempt"].as_u64().context("an attempt")
}

fn write(folder: &Path, name: &str, text: &str) -> Result<String> {
    let path = folder.join(name);
    std::fs::write(&path, text)?;
    path.to_str().map(str::to_owned).context("a path")
}

#[test]
fn an_agent_on_podman_serves_once_its_host_allows_what_podman_cannot_forbid() {
    let Some(podman) = Podman::start().unwrap() else {
        assert!(std::env::var_os("CI").is_none(), "podman: there is none that runs containers");
        println!("podman: skipped, there is none that runs containers");
        return;
    };
    let mut cluster = Cluster::start().unwrap();
    let folder = cluster.dir.path().to_owned();
    let engine = format!("unix://{}", podman.socket().display());
    let pushed = berth_tests::command("berth")
        .unwrap()
        .env("BERTH_CONFIG", cluster.server_dir().join("admin.toml"))
        .env("DOCKER_HOST", &engine)
        .args(["image", "push", "localhost/stand-in:1", "stand-in:1"])
        .output()
        .unwrap();
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    let manifest = "apiVersion: berth/v1\nkind: Deployment\nmetadata: {name: app}\nspec:\n  \
                    image: stand-in:1\n  ports: [{name: http, container: 8080}]\n  \
                    resources: {memory: 32MiB}\n  restart: {minBackoff: 100ms}\n  \
                    health: {http: {path: /healthy, port: http}, interval: 200ms}\n  \
                    rollout: {readyFor: 0s}\n";
    let manifest = write(&folder, "app.yaml", manifest).unwrap();
    let socket = podman.socket();
    let socket = socket.to_str().unwrap();

    // By default containers are kept apart, which podman cannot do: nothing runs, and it is said why.
    cluster.add_agent("one", &["--engine", socket]).unwrap();
    cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    eventually("what keeps it from running is said", PATIENCE, || {
        let told = cluster.berth_ok(&["ps", "app"])?;
        ensure!(told.contains("allow-container-traffic"), "{told}");
        Ok(())
    })
    .unwrap();
    assert_eq!(podman.run(&["ps", "--all", "--quiet"]).unwrap(), "");

    // Allowed by the host, it runs, is healthy, is read, entered, asked, and started again.
    let config = "[policy]\nallow-container-traffic = true\n";
    let config = write(&folder, "agent.toml", config).unwrap();
    let allowed = ["--engine", socket, "--config", &config];
    cluster.agent("one").kill();
    cluster.start_agent("one", &allowed).unwrap();
    let first = eventually("it is ready", PATIENCE, || ready(&cluster)).unwrap();
    // An engine that is busy tells later what it is.
    eventually("the host tells its engine", PATIENCE, || {
        let host = cluster.berth_json(&["host", "show", "one"])?;
        ensure!(host["engine"].as_str().is_some_and(|e| e.starts_with("podman")), "{host}");
        ensure!(host["containerNetworkReachable"] == true, "{host}");
        Ok(())
    })
    .unwrap();
    let logs = cluster.berth_ok(&["logs", "app", "--tail", "100"]).unwrap();
    assert!(logs.contains("stand-in is up"), "{logs}");
    let exec = cluster.berth(&["exec", "app", "--", "/berth-stand-in"]).unwrap();
    let said = String::from_utf8_lossy(&exec.stderr).into_owned();
    assert!(said.contains("cannot listen"), "a second one finds the port taken: {said}");
    assert_eq!(exec.status.code(), Some(1));

    let running = || podman.run(&["ps", "--quiet", "--no-trunc"]);
    let before = running().unwrap();
    // Another start of the agent touches nothing.
    cluster.agent("one").kill();
    cluster.start_agent("one", &allowed).unwrap();
    eventually("the host is back", PATIENCE, || {
        let host = cluster.berth_json(&["host", "show", "one"])?;
        ensure!(host["presence"] == "present" && host["ready"] == 1, "{host}");
        Ok(())
    })
    .unwrap();
    assert_eq!(running().unwrap(), before);
    podman.run(&["kill", &before]).unwrap();
    eventually("what was killed is started again", PATIENCE, || {
        ensure!(ready(&cluster)? > first);
        Ok(())
    })
    .unwrap();
    cluster.berth_ok(&["rm", "app", "--yes"]).unwrap();
    eventually("nothing of it is left", PATIENCE, || {
        let left = podman.run(&["ps", "--all", "--quiet"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
    .unwrap();
}
