//! The quickstart: from nothing to a prediction, again, and back to nothing; and where it must not go on.

use anyhow::{Context as _, Result, ensure};
use berth_tests::{
    PATIENCE, bin_dir, docker, docker_containers, eventually, has_docker, root, stand_in,
};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

/// The quickstart with this folder, under a umask that keeps others out.
fn quickstart(dir: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077 && exec \"$0\" \"$@\""]);
    command.arg(root().join("deploy/quickstart")).env("BERTH_QUICKSTART_DIR", dir);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_folder_that_holds_something_else_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let thesis = dir.path().join("thesis.tex");
    std::fs::write(&thesis, "mine").unwrap();
    for word in ["up", "down"] {
        let output = quickstart(dir.path()).arg(word).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{word}: {said}");
        assert!(said.contains("holds something else"), "{word}: {said}");
        assert_eq!(std::fs::read_to_string(&thesis).unwrap(), "mine");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A folder with these programs of the machine, and with these of its own.
fn programs(dir: &Path, own: &[(&str, &str)]) -> Result<()> {
    for name in ["bash", "cat", "dirname", "grep", "ls", "realpath", "sh", "uname"] {
        let path = std::env::var_os("PATH").context("no PATH")?;
        let found = std::env::split_paths(&path).map(|folder| folder.join(name));
        let found = found.into_iter().find(|at| at.exists());
        symlink(found.with_context(|| format!("there is no {name}"))?, dir.join(name))?;
    }
    for (name, script) in own {
        std::fs::write(dir.join(name), format!("#!/bin/sh\n{script}\n"))?;
        berth_tests::hosts::run(Command::new("chmod").arg("+x").arg(dir.join(name)))?;
    }
    Ok(())
}

#[test]
fn a_toolchain_without_the_static_target_and_without_rustup_is_told_before_anything_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bin");
    std::fs::create_dir(&path).unwrap();
    let nowhere = format!("echo {}/lib", dir.path().display());
    programs(&path, &[("cargo", "exit 9"), ("rustc", &nowhere)]).unwrap();
    let folder = dir.path().join("quickstart");
    let told = |command: &mut Command| {
        let output = command.env("PATH", &path).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("-unknown-linux-musl") && said.contains("rustup"), "{said}");
    };
    told(&mut quickstart(&folder));
    told(&mut Command::new(root().join("tests/run")));
    assert!(!folder.exists());
}

/// The first of four free ports in a row.
fn four_free_ports() -> Result<u16> {
    let first = 20_000 + u16::try_from(std::process::id() % 10_000)?;
    let free = |port: &u16| (*port..*port + 4).all(|p| TcpListener::bind(("127.0.0.1", p)).is_ok());
    (first..first + 1000).step_by(4).find(free).context("there are no four free ports in a row")
}

/// A container of another cluster's, with an image's name such as agents give; gone when dropped.
struct Foreign {
    id: String,
    name: String,
}

impl Foreign {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let archive = stand_in::archive(dir.path(), 0)?;
        let name = format!("berth.local/foreign:{}", std::process::id());
        let path = archive.to_str().context("a path")?;
        docker(&["import", "-c", "ENTRYPOINT [\"/berth-stand-in\"]", path, &name])?;
        let label = "io.berth.cluster=somebody-elses";
        let id = docker(&["run", "-d", "--network", "none", "--label", label, &name])?;
        Ok(Self { id, name })
    }

    fn goes_on(&self) -> Result<()> {
        let format = "{{.State.Running}} {{.RestartCount}}";
        ensure!(docker(&["inspect", "--format", format, &self.id])? == "true 0");
        docker(&["image", "inspect", "--format", "{{.Id}}", &self.name]).map(|_| ())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = docker(&["rm", "-f", &self.id]);
        let _ = docker(&["rmi", &self.name]);
    }
}

/// A quickstart that is taken down, whatever becomes of the test.
struct Quickstart {
    dir: tempfile::TempDir,
    port: u16,
}

impl Quickstart {
    fn run(&self, word: &str) -> Output {
        let target = bin_dir().unwrap().join("..");
        let mut command = quickstart(&self.dir.path().join("quickstart"));
        // What Cargo tells of this package would make it build others anew.
        for (name, _) in std::env::vars_os() {
            let told =
                |text: &str| text.starts_with("CARGO_MANIFEST") || text.starts_with("CARGO_PKG");
            if name.to_str().is_some_and(told) {
                command.env_remove(name);
            }
        }
        command
            .arg(word)
            // Of what is built already nothing is built again.
            .env("BERTH_QUICKSTART_PROFILE", "dev")
            .env("CARGO_TARGET_DIR", target)
            .env("BERTH_QUICKSTART_PORT", self.port.to_string())
            .output()
            .unwrap()
    }

    fn file(&self, name: &str) -> Result<String> {
        let path = self.dir.path().join("quickstart").join(name);
        Ok(std::fs::read_to_string(path)?.trim().to_owned())
    }

    /// Both processes by the files that name them: their numbers, and whether they run.
    fn processes(&self) -> Result<BTreeMap<&'static str, String>> {
        ["berthd", "berth-agent"]
            .into_iter()
            .map(|name| Ok((name, self.file(&format!("{name}.pid"))?)))
            .collect()
    }
}

impl Drop for Quickstart {
    fn drop(&mut self) {
        self.run("down");
    }
}

/// The names of images that a cluster's containers were made from, each with its id.
fn names_of_images(cluster: &str) -> Result<Vec<(String, String)>> {
    let mut used = Vec::new();
    for id in docker_containers(cluster, false)? {
        used.push(docker(&["inspect", "--format", "{{.Image}}", &id])?);
    }
    let format = "{{.ID}} {{.Repository}}:{{.Tag}}";
    let all = docker(&["images", "--no-trunc", "--format", format, "berth.local/*"])?;
    let pairs = all.lines().filter_map(|line| line.split_once(' '));
    let ours = pairs.filter(|(id, _)| used.iter().any(|one| one == id));
    Ok(ours.map(|(id, name)| (id.to_owned(), name.to_owned())).collect())
}

#[test]
fn the_quickstart_predicts_goes_on_with_what_is_there_and_is_undone_without_a_trace() {
    if !has_docker("quickstart") {
        return;
    }
    let foreign = Foreign::start().unwrap();
    let dir = tempfile::Builder::new().prefix("berth-it-").tempdir().unwrap();
    let quickstart = Quickstart { dir, port: four_free_ports().unwrap() };
    let up = || {
        let output = quickstart.run("up");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{out}{err}");
        assert!(err.contains("the answer is the expected one"), "{out}{err}");
        assert!(out.contains("\"outputs\"") && out.contains("It works"), "{out}");
    };
    up();
    let cluster = quickstart.file("cluster").unwrap();
    let before = docker_containers(&cluster, true).unwrap();
    assert_eq!(before.len(), 2);
    let processes = quickstart.processes().unwrap();
    up();
    assert_eq!(docker_containers(&cluster, true).unwrap(), before, "they go on");
    assert_eq!(quickstart.processes().unwrap(), processes, "they go on");

    let names = names_of_images(&cluster).unwrap();
    assert!(!names.is_empty());
    let down = quickstart.run("down");
    assert!(down.status.success(), "{}{}", text(&down.stdout), text(&down.stderr));
    assert!(!quickstart.dir.path().join("quickstart").exists());
    for (name, process) in &processes {
        let command = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        assert!(!text(&command).contains(name), "{name} runs on");
    }
    assert_eq!(docker_containers(&cluster, false).unwrap(), [] as [String; 0]);
    let networks = docker(&["network", "ls", "--format", "{{.Name}}"]).unwrap();
    assert!(!networks.contains(&cluster[cluster.len() - 12..]), "{networks}");
    eventually("names of images are gone where no other cluster needs them", PATIENCE, || {
        let now = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", "berth.local/*"])?;
        for (id, name) in &names {
            let others = docker(&["ps", "-aq", "--filter", &format!("ancestor={id}")])?;
            ensure!(!others.is_empty() || now.lines().all(|one| one != name), "{name}: {now}");
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(docker(&["images", "-q", "berth-quickstart/onnx"]).unwrap(), "");
    foreign.goes_on().unwrap();
    // Nothing is left to stop, which is no failure.
    assert!(quickstart.run("down").status.success());
}
