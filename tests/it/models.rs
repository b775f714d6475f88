//! What becomes of a folder: an image that is built and registered, and files in folders of their own.

use anyhow::{Context as _, ensure};
use berth_tests::bench::stand_in_image;
use berth_tests::hosts::run;
use berth_tests::{Cluster, PATIENCE, docker, eventually, has_docker, stand_in};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// A server and an agent on the machine's own engine.
fn one_host() -> Cluster {
    let mut cluster = Cluster::start().unwrap();
    cluster.add_agent("one", &[]).unwrap();
    cluster
}

fn deploy(cluster: &Cluster, name: &str, spec: &str) -> String {
    let text = format!(
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: {name}}}\nspec:\n{spec}"
    );
    let manifest = cluster.dir.path().join(format!("{name}.yaml"));
    std::fs::write(&manifest, text).unwrap();
    cluster.berth_ok(&["apply", "-f", manifest.to_str().unwrap(), "--timeout", "90s"]).unwrap();
    let all = cluster.berth_json(&["ps", name]).unwrap();
    assert_eq!(
        (&all[0]["state"], all.as_array().map(Vec::len)),
        (&json!("ready"), Some(1)),
        "{all}"
    );
    all[0]["containerId"].as_str().unwrap().to_owned()
}

fn git(folder: &Path, args: &[&str]) -> String {
    let me = ["-c", "user.name=me", "-c", "user.email=me@example.org"];
    run(Command::new("git").arg("-C").arg(folder).args(me).args(args)).unwrap()
}

#[test]
fn a_folder_is_built_registered_with_its_lineage_and_deployed_as_a_model() {
    if !has_docker("a_folder_is_built") {
        return;
    }
    let cluster = one_host();
    let folder = cluster.dir.path().join("app");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(stand_in::program().unwrap(), folder.join("berth-stand-in")).unwrap();
    // Bytes of its own, so that the image is no other test's.
    std::fs::write(folder.join("about"), cluster.uid().unwrap()).unwrap();
    let recipe = "FROM scratch\nCOPY about berth-stand-in /\nENTRYPOINT [\"/berth-stand-in\"]\n";
    std::fs::write(folder.join("Dockerfile"), recipe).unwrap();
    git(&folder, &["init", "-q", "-b", "trunk"]);
    git(&folder, &["add", "."]);
    git(&folder, &["commit", "-q", "-m", "first"]);

    let build = ["build", "-t", "app:1", "--alias", "best", folder.to_str().unwrap()];
    cluster.berth_ok(&build).unwrap();
    let local = docker(&["images", "-q", "berth.local/build-app"]).unwrap();
    assert_eq!(local, "", "the name it was built under is gone");
    let shown = cluster.berth_json(&["model", "show", "app@best"]).unwrap();
    assert_eq!((&shown["kind"], &shown["version"]), (&json!("image"), &json!("1")), "{shown}");
    let lineage = &shown["lineage"];
    assert_eq!(lineage["gitCommit"], git(&folder, &["rev-parse", "HEAD"]), "{shown}");
    assert_eq!((&lineage["gitBranch"], &lineage["gitDirty"]), (&json!("trunk"), &json!(false)));

    let spec = "  model: app:1\n  ports: [{name: http, container: 8080}]\n  \
                health: {tcp: {port: http}}\n  rollout: {readyFor: 0s}\n";
    let container = deploy(&cluster, "app", spec);
    let logs = cluster.berth_ok(&["logs", "app", "--tail", "100"]).unwrap();
    assert!(logs.contains("stand-in is up"), "{logs}");
    assert_eq!(
        docker(&["inspect", "--format", "{{.Path}}", &container]).unwrap(),
        "/berth-stand-in"
    );
}

#[test]
fn a_built_model_server_that_has_a_name_of_its_own_for_the_model_answers_by_the_deployments() {
    if !has_docker("a_built_model_server") {
        return;
    }
    let cluster = one_host();
    let folder = cluster.dir.path().join("served");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(stand_in::program().unwrap(), folder.join("berth-stand-in")).unwrap();
    std::fs::write(folder.join("about"), cluster.uid().unwrap()).unwrap();
    let recipe = "FROM scratch\nCOPY about berth-stand-in /\nENV DO=model:iris-sklearn\n\
                  ENTRYPOINT [\"/berth-stand-in\"]\n";
    std::fs::write(folder.join("Dockerfile"), recipe).unwrap();
    cluster.berth_ok(&["build", "-t", "server:1", folder.to_str().unwrap()]).unwrap();

    // Its health is asked as that of any model.
    let spec = "  model: server:1\n  servedModel: iris-sklearn\n  \
                ports: [{name: http, container: 8080}]\n  rollout: {readyFor: 0s}\n";
    let container = deploy(&cluster, "iris", spec);
    let env = docker(&["inspect", "--format", "{{json .Config.Env}}", &container]).unwrap();
    for told in ["BERTH_MODEL_NAME=iris-sklearn", "BERTH_MODEL_VERSION=1"] {
        assert!(env.contains(told), "{env}");
    }

    let input = cluster.dir.path().join("input.json");
    std::fs::write(&input, r#"{"inputs":[]}"#).unwrap();
    let ask = ["infer", "iris", "--input", input.to_str().unwrap()];
    let answer: Value = serde_json::from_str(&cluster.berth_ok(&ask).unwrap()).unwrap();
    assert_eq!(answer, json!({"model_name": "iris", "model_version": "1", "outputs": []}));
    let versioned = [&ask[..], &["--model-version", "2"]].concat();
    assert!(cluster.berth_ok(&versioned).is_err(), "no replica serves it");
}

#[test]
fn models_are_listed_and_a_folder_in_a_models_folder_is_read_by_a_program_of_another_user() {
    if !has_docker("models_are_listed") {
        return;
    }
    let cluster = one_host();
    let folder = cluster.dir.path().join("words");
    std::fs::create_dir_all(folder.join("deep/er")).unwrap();
    std::fs::write(folder.join("deep/er/words.txt"), "in a folder of a folder").unwrap();
    std::fs::write(folder.join("top.txt"), "on top").unwrap();
    let folder = folder.to_str().unwrap();
    assert_eq!(cluster.berth_json(&["model", "list"]).unwrap(), json!([]));
    let one = ["model", "push", "words:1", folder, "--alias", "best"];
    cluster.berth_ok(&one).unwrap();
    cluster.berth_ok(&["model", "push", "words:2", folder]).unwrap();
    cluster.berth_ok(&["-n", "edge", "model", "push", "other:1", folder]).unwrap();
    let listed = cluster.berth_json(&["-n", "default", "model", "list"]).unwrap();
    let words = json!([{"namespace": "default", "name": "words", "versionCount": 2,
        "latestVersion": "2", "aliases": {"best": "1"}}]);
    assert_eq!(listed, words);
    let table = cluster.berth_ok(&["model", "list"]).unwrap();
    assert!(table.contains("best=1") && table.contains("other"), "of all namespaces: {table}");
    let shown = cluster.berth_json(&["model", "show", "words:1"]).unwrap();
    let paths: Vec<&Value> =
        shown["files"].as_array().unwrap().iter().map(|f| &f["path"]).collect();
    assert_eq!(paths, [&json!("deep/er/words.txt"), &json!("top.txt")], "{shown}");

    let _image = stand_in_image(&cluster, "stand-in:1").unwrap();
    let spec = "  model: words@best\n  runtime: stand-in:1\n  user: \"65532:65532\"\n  \
                env: {DO: \"read:/model/deep/er/words.txt\"}\n  \
                ports: [{name: http, container: 8080}]\n  health: {tcp: {port: http}}\n  \
                rollout: {readyFor: 0s}\n";
    deploy(&cluster, "words", spec);
    eventually("the program has read it", PATIENCE, || {
        let logs = cluster.berth_ok(&["logs", "words", "--tail", "100"])?;
        ensure!(logs.contains("in a folder of a folder"), "{logs}");
        Ok(())
    })
    .context("a user that is not root")
    .unwrap();
}
