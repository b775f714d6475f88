//! The registry with layers far larger than what the server may hold in memory.

use anyhow::{Result, ensure};
use berth_tests::Cluster;
use berth_tests::bench::status_kib;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::process::Command;

/// Ten times what the server may hold.
const LAYER_BYTES: u64 = 1 << 30;
/// Most that the server may ever have held.
const RESIDENT_KIB: f64 = 100.0 * 1024.0;

fn within_its_memory(cluster: &mut Cluster, after: &str) -> Result<()> {
    let most = status_kib(cluster.server().id(), "VmHWM")?;
    println!("{after}: the server has held {:.1} MiB at the most", most / 1024.0);
    ensure!(most < RESIDENT_KIB, "{after}: {most} KiB");
    Ok(())
}

#[test]
fn a_layer_of_a_gibibyte_is_pushed_and_pulled_with_the_server_under_100_mib() {
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

    if !Command::new("skopeo").arg("--version").output().is_ok_and(|o| o.status.success()) {
        assert!(std::env::var_os("CI").is_none(), "tests/run installs skopeo");
        println!("the pull is skipped, there is no skopeo");
        return;
    }
    let token = cluster.berth_json(&["user", "token", "admin"]).unwrap();
    let roots = cluster.dir.path().join("roots");
    std::fs::create_dir(&roots).unwrap();
    std::fs::copy(cluster.server_dir().join("ca.crt"), roots.join("ca.crt")).unwrap();
    let to = cluster.dir.path().join("pulled");
    let pull = Command::new("skopeo")
        .args(["copy", "--quiet", "--preserve-digests"])
        .arg("--src-cert-dir")
        .arg(&roots)
        .args(["--src-creds", &format!("me:{}", token["secret"].as_str().unwrap())])
        .arg(format!("docker://{}/models/big:1", cluster.door("registry").unwrap()))
        .arg(format!("dir:{}", to.display()))
        .output()
        .unwrap();
    assert!(pull.status.success(), "{}", String::from_utf8_lossy(&pull.stderr));
    let sizes = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
    assert!(sizes.into_iter().any(|size| size == LAYER_BYTES));
    within_its_memory(&mut cluster, "after the pull").unwrap();
}
