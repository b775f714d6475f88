//! The registry as it is shipped: clients that nobody of Berth wrote, and layers far larger than what the
//! server may hold in memory.

use anyhow::{Context as _, Result, ensure};
use berth_tests::bench::status_kib;
use berth_tests::hosts::run;
use berth_tests::{Cluster, docker, has_client, has_docker, stand_in};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;
use std::process::Command;

/// Twenty times what the server may hold, and more than 31 bits count.
const LAYER_BYTES: u64 = (2 << 30) + 4097;
/// Most that the server may ever have held.
const RESIDENT_KIB: f64 = 100.0 * 1024.0;

fn within_its_memory(cluster: &mut Cluster, after: &str) -> Result<()> {
    let most = status_kib(cluster.server().id(), "VmHWM")?;
    println!("{after}: the server has held {:.1} MiB at the most", most / 1024.0);
    ensure!(most < RESIDENT_KIB, "{after}: {most} KiB");
    Ok(())
}

#[test]
fn a_layer_of_more_than_two_gibibytes_is_pushed_pulled_and_pushed_again_with_the_server_under_100_mib()
 {
    let mut cluster = Cluster::start().unwrap();
    let file = cluster.dir.path().join("weights.bin");
    // Mostly a hole: its bytes are read, hashed, sent and stored like any others.
    let mut sparse = std::fs::File::create(&file).unwrap();
    sparse.write_all(b"the beginning").unwrap();
    sparse.seek(SeekFrom::Start(LAYER_BYTES - 3)).unwrap();
    sparse.write_all(b"end").unwrap();
    drop(sparse);
    cluster.berth_ok(&["model", "push", "big:1", file.to_str().unwrap()]).unwrap();
    within_its_memory(&mut cluster, "after the push").unwrap();

    if !has_client("the pull", "skopeo") {
        return;
    }
    let token = token(&cluster).unwrap();
    let roots = roots(&cluster).unwrap();
    let to = cluster.dir.path().join("pulled");
    let skopeo = |which: &str, from: &str, to: &str| {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--preserve-digests"]);
        command.arg(format!("--{which}-cert-dir")).arg(&roots);
        command.args([&format!("--{which}-creds"), &format!("me:{token}"), from, to]);
        run(&mut command).unwrap();
    };
    let door = cluster.door("registry").unwrap();
    let pulled = format!("dir:{}", to.display());
    skopeo("src", &format!("docker://{door}/models/big:1"), &pulled);
    let sizes = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
    assert!(sizes.into_iter().any(|size| size == LAYER_BYTES));
    within_its_memory(&mut cluster, "after the pull").unwrap();

    // Under another name all of it is sent, by a client that nobody of Berth wrote.
    skopeo("dest", &pulled, &format!("docker://{door}/models/again:1"));
    within_its_memory(&mut cluster, "after another client's push").unwrap();
    let tags = cluster.berth_json(&["image", "tags", "models/again"]).unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["1"]));
}

/// A user's password for the registry.
fn token(cluster: &Cluster) -> Result<String> {
    let made = cluster.berth_json(&["user", "token", "admin"])?;
    made["secret"].as_str().map(str::to_owned).context("no secret in the answer")
}

/// A folder of roots, as docker and others take it.
fn roots(cluster: &Cluster) -> Result<PathBuf> {
    let roots = cluster.dir.path().join("roots");
    std::fs::create_dir_all(&roots)?;
    std::fs::copy(cluster.server_dir().join("ca.crt"), roots.join("ca.crt"))?;
    Ok(roots)
}

/// A name in the machine's own engine; gone when it is dropped.
struct Local(String);

impl Drop for Local {
    fn drop(&mut self) {
        let _ = docker(&["rmi", "-f", &self.0]);
    }
}

#[test]
fn docker_logs_in_pushes_and_pulls_on_loopback_without_a_root_and_podman_with_it() {
    if !has_docker("docker_logs_in") {
        return;
    }
    let cluster = Cluster::start().unwrap();
    let folder = cluster.dir.path();
    let door = cluster.door("registry").unwrap();
    let token = token(&cluster).unwrap();
    let archive = stand_in::archive(folder, 0).unwrap();
    let image = Local(format!("{door}/app:1"));
    let id = docker(&["import", archive.to_str().unwrap(), &image.0]).unwrap();

    // What it remembers of logins stays in here.
    let config = folder.join("docker");
    let config = config.to_str().unwrap();
    let refused = docker(&["--config", config, "push", &image.0]).unwrap_err();
    assert!(format!("{refused}").contains("no basic auth credentials"), "{refused}");
    let secret = folder.join("secret");
    std::fs::write(&secret, &token).unwrap();
    let mut login = Command::new("docker");
    login.args(["--config", config, "login", "-u", "me", "--password-stdin", &door]);
    run(login.stdin(std::fs::File::open(&secret).unwrap())).unwrap();
    docker(&["--config", config, "push", &image.0]).unwrap();
    docker(&["rmi", &image.0]).unwrap();
    docker(&["--config", config, "pull", &image.0]).unwrap();
    assert_eq!(docker(&["image", "inspect", "--format", "{{.Id}}", &image.0]).unwrap(), id);

    if !has_client("podman_with_a_root", "podman") {
        return;
    }
    let roots = roots(&cluster).unwrap();
    let podman = |args: &[&str]| {
        let mut command = Command::new("podman");
        command.arg("--root").arg(folder.join("podman")).arg("--runroot").arg(folder.join("run"));
        run(command.args(["--storage-driver", "vfs"]).args(args))
    };
    let creds = format!("me:{token}");
    let unknown = podman(&["pull", "--creds", &creds, &image.0]).unwrap_err();
    assert!(format!("{unknown}").contains("x509"), "{unknown}");
    let with = ["--creds", &creds, "--cert-dir", roots.to_str().unwrap()];
    podman(&[&["pull"], &with[..], &[&image.0]].concat()).unwrap();
    let again = format!("{door}/app:2");
    podman(&[&["push"], &with[..], &[&image.0, &again]].concat()).unwrap();
    podman(&["rmi", &image.0]).unwrap();
    let tags = cluster.berth_json(&["image", "tags", "app"]).unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["1", "2"]));
}
