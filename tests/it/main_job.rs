//! The main job on the machine's own engine: a model is packaged, pushed, deployed, asked for a
//! prediction and watched; then agent and server are killed, and nothing that runs is touched.

use anyhow::{Context as _, Result, ensure};
use berth_tests::samples::{model, onnx_cluster};
use berth_tests::{Cluster, PATIENCE, docker, docker_containers, eventually, has_docker, root};

fn ready(cluster: &Cluster, number: usize) -> Result<()> {
    eventually("the replicas are ready", PATIENCE, || {
        let all = cluster.berth_json(&["ps", "iris"])?;
        let all = all.as_array().context("a list")?;
        let ready = all.iter().filter(|r| r["state"] == "ready").count();
        ensure!(ready == number && all.len() == number, "{ready} of {number}: {all:?}");
        Ok(())
    })
}

fn predict(cluster: &Cluster) -> Result<String> {
    let (input, expect) = (model("iris", "sample.json")?, model("iris", "expected.json")?);
    cluster.berth_ok(&["infer", "iris", "--input", &input, "--expect", &expect])
}

#[test]
fn a_model_is_packaged_pushed_deployed_asked_and_watched_and_survives_its_keepers() {
    if !has_docker("main_job") {
        return;
    }
    let mut cluster = onnx_cluster().unwrap();
    let uid = cluster.uid().unwrap();
    let file = model("iris", "model.onnx").unwrap();
    cluster.berth_ok(&["model", "push", "iris:1", &file, "--alias", "champion"]).unwrap();
    let shown = cluster.berth_json(&["model", "show", "iris@champion"]).unwrap();
    assert_eq!(shown["inputs"][0]["datatype"], "FP32");

    let manifest = root().join("deploy/examples/iris.yaml");
    let manifest = manifest.to_str().unwrap();
    let plan = cluster.berth_json(&["plan", "-f", manifest]).unwrap();
    assert_eq!(plan[0]["steps"].as_array().unwrap().len(), 2, "{plan}");
    cluster.berth_ok(&["apply", "-f", manifest, "--timeout", "90s"]).unwrap();
    ready(&cluster, 2).unwrap();
    predict(&cluster).unwrap();
    let logs = cluster.berth_ok(&["logs", "iris", "--tail", "5"]).unwrap();
    assert!(logs.contains("iris/0 one |") && logs.contains("iris/1 one |"), "{logs}");
    let logs = cluster.berth_ok(&["logs", "iris/1", "--tail", "5"]).unwrap();
    assert!(!logs.contains("iris/0 one |") && logs.contains("iris/1 one |"), "{logs}");
    let answer = cluster.berth_ok(&["exec", "iris/0", "--", "/berth-runtime", "--version"]);
    assert!(answer.unwrap().starts_with("berth-runtime "));

    // What is shown can be applied again and changes nothing.
    let yaml = cluster.berth_ok(&["deployment", "show", "iris", "-o", "yaml"]).unwrap();
    let again = cluster.dir.path().join("again.yaml");
    std::fs::write(&again, yaml).unwrap();
    let applied = cluster.berth_json(&["apply", "-f", again.to_str().unwrap()]).unwrap();
    assert_eq!(applied[0]["action"], "unchanged", "{applied}");

    let running = |what: &str| {
        let mut ids = docker_containers(&uid, true).unwrap();
        ids.sort();
        assert_eq!(ids.len(), 2, "{what}");
        ids
    };
    let before = running("after apply");

    // The agent is killed and comes back: it adopts what runs.
    cluster.agent("one").kill();
    assert_eq!(running("without an agent"), before);
    cluster.start_agent("one", &[]).unwrap();
    eventually("the gateway answers again", PATIENCE, || predict(&cluster)).unwrap();
    assert_eq!(running("with the agent back"), before);

    // The server is killed; a replica that ends meanwhile is started again by the agent alone.
    cluster.server().kill();
    docker(&["kill", &before[0]]).unwrap();
    eventually("the killed replica is started again without a server", PATIENCE, || {
        let now = docker_containers(&uid, true)?;
        ensure!(now.len() == 2 && !now.contains(&before[0]), "{now:?}");
        Ok(())
    })
    .unwrap();
    // And the agent, killed as well, boots into its last set with no server in reach.
    cluster.agent("one").kill();
    docker(&["kill", &before[1]]).unwrap();
    cluster.start_agent("one", &[]).unwrap();
    eventually("an agent without a server brings its replicas back", PATIENCE, || {
        let now = docker_containers(&uid, true)?;
        ensure!(now.len() == 2 && !now.contains(&before[1]), "{now:?}");
        Ok(())
    })
    .unwrap();
    cluster.start_server().unwrap();
    ready(&cluster, 2).unwrap();
    predict(&cluster).unwrap();

    // Removal ends when it is true.
    cluster.berth_ok(&["rm", "iris", "--yes"]).unwrap();
    eventually("nothing is left", PATIENCE, || {
        let left = docker_containers(&uid, false)?;
        ensure!(left.is_empty(), "{left:?}");
        ensure!(cluster.berth_json(&["deployment", "list"])? == serde_json::json!([]));
        Ok(())
    })
    .unwrap();
    cluster.agent("one").terminate(PATIENCE).unwrap();
    cluster.server().terminate(PATIENCE).unwrap();
    cluster.start_server().unwrap();
}

#[test]
fn a_release_that_never_becomes_ready_rolls_back_and_the_good_one_is_not_touched() {
    if !has_docker("rollback") {
        return;
    }
    let cluster = onnx_cluster().unwrap();
    let uid = cluster.uid().unwrap();
    let file = model("iris", "model.onnx").unwrap();
    cluster.berth_ok(&["model", "push", "iris:1", &file]).unwrap();
    let broken = cluster.dir.path().join("broken.onnx");
    std::fs::write(&broken, b"this is no model").unwrap();
    let push = ["model", "push", "iris:2", broken.to_str().unwrap()];
    let refused = cluster.berth(&push).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("is no ONNX model"), "{text}");
    cluster.berth_ok(&[&push[..], &["--format", "onnx"]].concat()).unwrap();
    let manifest = cluster.dir.path().join("iris.yaml");
    let write = |version: u32| {
        let text = format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: iris}}\nspec:\n  \
             model: iris:{version}\n  replicas: 1\n  \
             rollout: {{readyFor: 1s, progressDeadline: 8s}}\n"
        );
        std::fs::write(&manifest, text).unwrap();
        cluster.berth(&["apply", "-f", manifest.to_str().unwrap(), "--timeout", "60s"]).unwrap()
    };
    assert!(write(1).status.success());
    let before = docker_containers(&uid, true).unwrap();
    let failed = write(2);
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(5), "{text}");
    assert!(
        text.contains("release 2 failed") && text.contains("rolled back to release 1"),
        "{text}"
    );
    ready(&cluster, 1).unwrap();
    predict(&cluster).unwrap();
    assert_eq!(docker_containers(&uid, true).unwrap(), before);
    cluster.berth_ok(&["rm", "iris", "--yes"]).unwrap();
}
