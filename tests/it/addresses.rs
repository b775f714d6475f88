//! The registry under the operator's certificate, and at another address than before.

use anyhow::ensure;
use berth_server::identity::ca::Ca;
use berth_tests::samples::{model, onnx_cluster_with};
use berth_tests::{PATIENCE, command, eventually, has_docker};
use std::process::Command;

#[test]
fn agents_follow_a_registry_that_has_moved_and_its_certificate_is_the_operators_for_others_only() {
    if !has_docker("addresses") {
        return;
    }
    let theirs = tempfile::tempdir().unwrap();
    let foreign = Ca::open(theirs.path()).unwrap();
    let (certificate, key) = foreign.server(&["127.0.0.1".to_owned()]).unwrap();
    let path = |name: &str| theirs.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("tls.crt"), certificate).unwrap();
    std::fs::write(path("tls.key"), key).unwrap();
    let args = ["--tls-cert", &path("tls.crt"), "--tls-key", &path("tls.key")];
    // Our own command line pushes, whatever certificate others are shown.
    let mut cluster = onnx_cluster_with(&args).unwrap();
    let file = model("iris", "model.onnx").unwrap();
    cluster.berth_ok(&["model", "push", "iris:1", &file]).unwrap();
    // Of other bytes, so that it has to be fetched.
    let other = model("digits", "model.onnx").unwrap();
    cluster.berth_ok(&["model", "push", "iris:2", &other]).unwrap();

    // Others trust the operator's root, and need no other.
    let token = cluster.berth_json(&["user", "token", "admin"]).unwrap();
    let inspect = |root: &std::path::Path| {
        let roots = tempfile::tempdir().unwrap();
        std::fs::copy(root, roots.path().join("ca.crt")).unwrap();
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["inspect", "--raw", "--cert-dir"]).arg(roots.path());
        skopeo.args(["--creds", &format!("me:{}", token["secret"].as_str().unwrap())]);
        let door = cluster.door("registry").unwrap();
        skopeo.arg(format!("docker://{door}/models/iris:1")).output().unwrap()
    };
    if Command::new("skopeo").arg("--version").output().is_ok_and(|o| o.status.success()) {
        let seen = inspect(&theirs.path().join("ca.crt"));
        assert!(seen.status.success(), "{}", String::from_utf8_lossy(&seen.stderr));
        let ours = inspect(&cluster.server_dir().join("ca.crt"));
        assert!(!ours.status.success(), "the cluster's own certificate was shown");
    } else {
        assert!(std::env::var_os("CI").is_none(), "tests/run installs skopeo");
    }

    let manifest = |version: u32| {
        let text = format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{ name: iris }}\nspec:\n  model: \
             iris:{version}\n  replicas: 1\n  ports: [{{name: http, container: 8080}}]\n"
        );
        let path = cluster.dir.path().join(format!("iris-{version}.yaml"));
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (first, second) = (manifest(1), manifest(2));
    cluster.berth_ok(&["apply", "-f", &first, "--timeout", "90s"]).unwrap();

    // The registry's door opens at another port; nobody tells the agent but the server.
    let before = cluster.door("registry").unwrap();
    cluster.server().terminate(PATIENCE).unwrap();
    let doors = cluster.server_dir().join("doors.json");
    let text = std::fs::read_to_string(&doors).unwrap().replace(&before, "127.0.0.1:0");
    std::fs::write(&doors, text).unwrap();
    cluster.start_server().unwrap();
    let after = cluster.door("registry").unwrap();
    assert_ne!(before, after);
    eventually("the agent has the new address", PATIENCE, || {
        let status = command("berth-agent")?
            .args(["status", "--data-dir"])
            .arg(cluster.agent_dir("one"))
            .output()?;
        let text = String::from_utf8(status.stdout)?;
        ensure!(text.contains(&after), "{text}");
        Ok(())
    })
    .unwrap();
    cluster.berth_ok(&["apply", "-f", &second, "--timeout", "90s"]).unwrap();
}
