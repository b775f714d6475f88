//! Bad luck on a real engine: whatever goes wrong is said with what to do about it, or mends itself.

use anyhow::{Context as _, ensure};
use berth_proto::api::model_service_client::ModelServiceClient;
use berth_proto::api::{ModelVersion, ModelVersionKind, RegisterVersionRequest};
use berth_proto::ids::Digest;
use berth_tests::hosts::{Fleet, Seen, can_make_hosts, run};
use berth_tests::{Cluster, PATIENCE, events, eventually, has_client};
use serde_json::json;
use std::process::Output;
use std::time::Duration;

/// One replica of the stand-in with a check, on which a rollout has a few seconds.
fn spec(image: &str, path: &str, more: &str) -> String {
    format!(
        "  image: {image}\n  replicas: 1\n  ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: {path}, port: http}}, interval: 500ms, timeout: 2s, startup: 2s}}\n  \
         rollout: {{readyFor: 1s, progressDeadline: 5s}}\n  stopGrace: 0s\n{more}"
    )
}

/// Ended with this code and said all of these words on its standard error.
fn told(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
}

fn apply(fleet: &Fleet, name: &str, spec: &str) -> Output {
    let manifest = fleet.manifest(name, spec).unwrap();
    fleet.cluster.berth(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap()
}

#[test]
fn an_image_that_is_not_there_is_refused_before_anything_is_written() {
    let cluster = Cluster::start().unwrap();
    let file = cluster.dir.path().join("app.yaml");
    let apply = |image: &str| {
        let text = format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: app}}\nspec: {{image: \"{image}\"}}\n"
        );
        std::fs::write(&file, text).unwrap();
        cluster.berth(&["apply", "-f", file.to_str().unwrap()]).unwrap()
    };
    let push = ["\"nosuch:1\" is not in the registry", "hint: ", "`berth image push`"];
    told(&apply("nosuch:1"), 1, &push);
    let door = cluster.door("registry").unwrap();
    let elsewhere = ["registry.example.org/app:1", "not in this server's registry", &door];
    told(&apply("registry.example.org/app:1"), 1, &elsewhere);
    told(&apply("Not An Image"), 1, &["not an image reference"]);
    assert_eq!(cluster.berth_json(&["deployment", "list"]).unwrap(), serde_json::json!([]));
}

#[test]
fn a_rollout_that_cannot_succeed_ends_with_5_and_says_why_and_what_to_do() {
    if !can_make_hosts("a_rollout_that_cannot_succeed") {
        return;
    }
    let mut fleet = Fleet::start(0).unwrap();
    let allowed = fleet.cluster.dir.path().join("allowed");
    std::fs::create_dir(&allowed).unwrap();
    std::os::unix::fs::symlink("/etc", allowed.join("link")).unwrap();
    let config = format!("[policy]\nmount-folders = [\"{}\"]\n", allowed.display());
    fleet.add_host_with(&config, &[]).unwrap();
    fleet.all_present().unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();

    let healthy = |more: &str| spec("stand-in:1", "/healthy", more);
    let linked =
        format!("  mounts: [{{source: \"{}/link\", target: /etc/x}}]\n", allowed.display());
    // The first release of each, so that there is nothing to go back to.
    let failing: [(&str, String, &[&str]); 6] = [
        (
            "exits",
            healthy("  env: {DO: \"exit:3\"}\n"),
            &[
                "its program has ended with code 3; it wrote last: ",
                "stand-in leaves with 3",
                "hint: ",
                "berth logs exits",
            ],
        ),
        ("none", healthy("  command: [\"/no/such/program\"]\n"), &["/no/such/program"]),
        // What the host's own policy forbids: known to the server, or found by the agent alone.
        (
            "privileged",
            healthy("  privileges: {privileged: true}\n"),
            &["no host fits: 1 whose policy forbids privileged containers"],
        ),
        ("linked", healthy(&linked), &["policy", "does not mount", "allowed below"]),
        // What fits nowhere.
        (
            "far",
            healthy("  placement: {require: [\"zone=mars\"]}\n"),
            &["no host fits: 1 without label zone=mars"],
        ),
        ("large", healthy("  resources: {memory: 900GiB}\n"), &["no host fits: 1 short of memory"]),
    ];
    std::thread::scope(|scope| {
        for (name, spec, words) in &failing {
            let fleet = &fleet;
            scope.spawn(move || {
                let output = apply(fleet, name, spec);
                told(&output, 5, &["release 1 failed", "became healthy within 5s"]);
                told(&output, 5, words);
            });
        }
    });
    let logs = fleet.cluster.berth_ok(&["logs", "exits"]).unwrap();
    assert!(logs.contains("stand-in leaves with 3"), "{logs}");
    assert_eq!(fleet.hosts[0].running().unwrap(), []);
    for (name, ..) in &failing {
        fleet.cluster.berth_ok(&["rm", name, "--yes"]).unwrap();
    }

    // A check that never passes, after a release that serves: that one is not touched.
    let good = spec("stand-in:1", "/healthy", "");
    assert!(apply(&fleet, "app", &good).status.success());
    let before = fleet.hosts[0].running().unwrap();
    let words = [
        "release 2 failed",
        "its health check fails",
        "503",
        "rolled back to release 1",
        "onFailure: pause",
    ];
    let sick = spec("stand-in:1", "/sick", "");
    told(&apply(&fleet, "app", &sick), 5, &words);
    assert_eq!(fleet.settles_at("app", 1).unwrap(), before);
    // The same words are there for whoever looks later.
    let later = fleet.cluster.berth_json(&["deployment", "show", "app"]).unwrap();
    let later = later["status"]["reason"].as_str().unwrap_or_default().to_owned();
    assert!(later.contains("release 2 failed") && later.contains("503"), "{later}");
    let ends = |verb: &[&str]| {
        let args = [verb, &["--wait", "--timeout", "90s"]].concat();
        fleet.cluster.berth(&args).unwrap()
    };
    told(&ends(&["deployment", "rollout", "status", "app"]), 5, &["rolled back to release 1"]);
    told(&ends(&["scale", "app", "1"]), 0, &[]);

    // Undone in the middle of it, it goes back to what serves, and does not start that anew.
    let manifest = fleet.manifest("app", &sick).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    let words = ["release 3 was undone; back to release 1"];
    told(&ends(&["deployment", "rollout", "undo", "app"]), 0, &words);
    assert_eq!(fleet.settles_at("app", 1).unwrap(), before);
    told(&ends(&["deployment", "restart", "app"]), 0, &["restarting as release 4"]);
    told(&ends(&["deployment", "rollout", "status", "app"]), 0, &[]);
    assert_ne!(fleet.settles_at("app", 1).unwrap(), before);
}

/// The only host's reason, as `berth host list` shows it.
fn engine_is_said_to_be_away(fleet: &Fleet, within: Duration) {
    eventually("the host says that its engine does not answer", within, || {
        let hosts = fleet.cluster.berth_json(&["host", "list"])?;
        ensure!(hosts[0]["reason"] == "its engine does not answer", "{hosts}");
        ensure!(hosts[0]["presence"] == "present", "{hosts}");
        Ok(())
    })
    .unwrap();
}

/// The same replicas, each with a container of its own after those that ended.
fn are_back(before: &[Seen], after: &[Seen]) {
    assert_eq!(before.len(), after.len());
    for old in before {
        let new = after.iter().find(|new| new.replica == old.replica);
        let new = new.unwrap_or_else(|| panic!("{old:?} is not back: {after:?}"));
        assert!(new.attempt > old.attempt && new.id != old.id, "{old:?}: {new:?}");
    }
}

#[test]
fn an_engine_that_hangs_stops_or_is_killed_is_said_so_and_its_replicas_are_back_with_it() {
    if !can_make_hosts("an_engine_that_hangs") {
        return;
    }
    let mut fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let two = spec("stand-in:1", "/healthy", "").replace("replicas: 1", "replicas: 2");
    assert!(apply(&fleet, "app", &two).status.success());
    let before = fleet.settles_at("app", 2).unwrap();

    // It hangs: what is asked of it waits, what runs is not touched.
    fleet.hosts[0].engine().freeze().unwrap();
    let late = fleet.manifest("late", &two).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &late, "--no-wait"]).unwrap();
    eventually("what waits says that it waits for the engine", PATIENCE, || {
        let waiting = fleet.ps("late")?;
        let one = waiting.first().context("nothing is placed")?;
        ensure!(one["reason"] == "ENGINE_AWAY", "{one}");
        let message = one["message"].as_str().unwrap_or_default();
        ensure!(message.contains("container engine did not answer"), "{message}");
        Ok(())
    })
    .unwrap();
    engine_is_said_to_be_away(&fleet, PATIENCE);
    // An agent that starts meanwhile is there as soon as any other, and says why nothing goes on.
    fleet.hosts[0].agent().kill();
    eventually("the host is away without its agent", PATIENCE, || {
        let hosts = fleet.cluster.berth_json(&["host", "list"])?;
        ensure!(hosts[0]["presence"] == "away", "{hosts}");
        Ok(())
    })
    .unwrap();
    fleet.hosts[0].start_agent().unwrap();
    engine_is_said_to_be_away(&fleet, Duration::from_secs(15));
    fleet.hosts[0].engine().thaw().unwrap();
    let late = fleet.ready("late", 2).unwrap();
    let mut after = fleet.running().unwrap();
    after.retain(|one| late.iter().all(|r| r["uid"] != *one.replica));
    assert_eq!(after, before);
    fleet.cluster.berth_ok(&["rm", "late", "--yes"]).unwrap();
    fleet.settles_at("app", 2).unwrap();

    // It stops, and with it what runs: nothing new fits, and all is back when it is.
    fleet.hosts[0].engine().terminate(PATIENCE).unwrap();
    engine_is_said_to_be_away(&fleet, PATIENCE);
    let words = ["no host fits: 1 without an engine that answers", "hint: "];
    told(&apply(&fleet, "none", &two), 5, &words);
    fleet.cluster.berth_ok(&["rm", "none", "--yes"]).unwrap();
    fleet.hosts[0].start_engine().unwrap();
    let back = fleet.settles_at("app", 2).unwrap();
    are_back(&before, &back);

    // It is killed, and its next life ends what the last one has left.
    fleet.hosts[0].engine().kill();
    fleet.hosts[0].start_engine().unwrap();
    let again = fleet.settles_at("app", 2).unwrap();
    are_back(&back, &again);
}

const MIB: u64 = 1024 * 1024;
/// What is brought to a slow host, in four seconds.
const LARGE: u64 = 32 * MIB;

/// A host that brings no more than 8 MiB a second.
fn slow_host() -> Fleet {
    let mut fleet = Fleet::start(0).unwrap();
    fleet.add_host_with("[transfer]\nbandwidth = \"8MiB\"\n", &[]).unwrap();
    fleet.all_present().unwrap();
    fleet
}

fn half_is_here(fleet: &Fleet, deployment: &str) {
    eventually("half of it is here", PATIENCE, || {
        let listed = fleet.ps(deployment)?;
        let done = listed.first().and_then(|r| r["progress"]["doneBytes"].as_u64()).unwrap_or(0);
        ensure!(done >= LARGE / 2, "{listed:?}");
        ensure!(listed[0]["state"].as_str().is_some_and(|s| s.starts_with("fetching")));
        Ok(())
    })
    .unwrap();
}

/// Twice come a chunk of 4 MiB and what the kernel had received and the agent, held to its rate, had not
/// read yet. From the beginning again it would be half of it more.
fn little_came_twice(fleet: &Fleet, before: u64) {
    let received = fleet.hosts[0].received_bytes().unwrap() - before;
    let again = LARGE + LARGE / 2;
    assert!((LARGE..again - 4 * MIB).contains(&received), "{received} bytes for {LARGE}");
}

#[test]
fn a_pull_whose_engine_is_killed_and_a_models_fetch_whose_agent_is_killed_go_on_where_they_were() {
    if !can_make_hosts("a_pull_whose_engine_is_killed") {
        return;
    }
    let mut fleet = slow_host();
    fleet.push_stand_in("stand-in:1", LARGE / MIB).unwrap();
    let app = spec("stand-in:1", "/healthy", "").replace("5s", "60s");
    let manifest = fleet.manifest("app", &app).unwrap();
    let before = fleet.hosts[0].received_bytes().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    half_is_here(&fleet, "app");
    fleet.hosts[0].engine().kill();
    fleet.hosts[0].start_engine().unwrap();
    fleet.settles_at("app", 1).unwrap();
    little_came_twice(&fleet, before);

    // A model's file, which the agent brings itself.
    let file = fleet.cluster.dir.path().join("weights.bin");
    let random = std::fs::File::open("/dev/urandom").unwrap();
    let mut random = std::io::Read::take(random, LARGE);
    std::io::copy(&mut random, &mut std::fs::File::create(&file).unwrap()).unwrap();
    fleet.cluster.berth_ok(&["model", "push", "big:1", file.to_str().unwrap()]).unwrap();
    let model = app.replace("image: stand-in:1", "model: big:1\n  runtime: stand-in:1");
    let manifest = fleet.manifest("big", &model).unwrap();
    let before = fleet.hosts[0].received_bytes().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    half_is_here(&fleet, "big");
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    let ready = fleet.ready("big", 1).unwrap();
    little_came_twice(&fleet, before);
    let id = ready[0]["containerId"].as_str().unwrap();
    let source = "{{(index .Mounts 0).Source}}";
    let source = fleet.hosts[0].docker(&["inspect", "--format", source, id]).unwrap();
    let brought = std::fs::read(std::path::Path::new(&source).join("weights.bin")).unwrap();
    assert!(brought == std::fs::read(&file).unwrap(), "every byte is the one that was pushed");
}

/// Pushes a model whose only layer is this archive, past `berth model push`, which makes no archives.
fn push_archive(cluster: &Cluster, name: &str, archive: &[u8]) -> anyhow::Result<()> {
    let folder = cluster.dir.path().join(format!("{name}.dir"));
    std::fs::create_dir(&folder)?;
    let blob = |bytes: &[u8], media: &str| -> anyhow::Result<serde_json::Value> {
        let digest = Digest::of(bytes);
        std::fs::write(folder.join(digest.hex()), bytes)?;
        Ok(json!({"mediaType": media, "digest": digest.as_str(), "size": bytes.len()}))
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(b"{}", "application/vnd.cncf.model.config.v1+json")?,
        "layers": [blob(archive, "application/vnd.cncf.model.weight.v1.tar")?],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    std::fs::write(folder.join("manifest.json"), &manifest)?;
    std::fs::write(folder.join("version"), "Directory Transport Version: 1.1\n")?;
    let token = cluster.berth_json(&["user", "token", "admin"])?;
    let secret = token["secret"].as_str().context("no secret")?;
    let repository = format!("models/{name}");
    let mut push = std::process::Command::new("skopeo");
    push.args(["copy", "--quiet", "--preserve-digests", "--dest-cert-dir"]).arg(&folder);
    std::fs::copy(cluster.server_dir().join("ca.crt"), folder.join("ca.crt"))?;
    push.args(["--dest-creds", &format!("me:{secret}"), &format!("dir:{}", folder.display())]);
    push.arg(format!("docker://{}/{repository}:1", cluster.door("registry")?));
    run(&mut push)?;
    let version = ModelVersion {
        model: name.to_owned(),
        namespace: "default".to_owned(),
        version: "1".to_owned(),
        repository,
        digest: Digest::of(&manifest).to_string(),
        kind: ModelVersionKind::Artifact as i32,
        format: "other".to_owned(),
        size_bytes: archive.len() as u64,
        ..ModelVersion::default()
    };
    let request = RegisterVersionRequest { version: Some(version), ..Default::default() };
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut models = ModelServiceClient::new(crate::load::channel(cluster).await?);
        models.register_version(request).await?;
        Ok(())
    })
}

#[test]
fn a_models_archive_that_leaves_its_folder_is_refused_by_its_host_and_said_so() {
    if !(can_make_hosts("a_models_archive") && has_client("a_models_archive", "skopeo")) {
        return;
    }
    let fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let (cluster, folder) = (&fleet.cluster, fleet.cluster.dir.path());
    std::fs::write(folder.join("escape"), "out").unwrap();
    let archive = folder.join("evil.tar");
    let mut tar = std::process::Command::new("tar");
    tar.arg("-C").arg(folder).arg("-cf").arg(&archive).arg("--absolute-names");
    run(tar.args(["--transform", "s,^,../../,", "escape"])).unwrap();
    push_archive(cluster, "evil", &std::fs::read(&archive).unwrap()).unwrap();
    let evil = spec("stand-in:1", "/healthy", "")
        .replace("image: stand-in:1", "model: evil:1\n  runtime: stand-in:1");
    let output = apply(&fleet, "evil", &evil);
    let words = ["an entry that leaves its folder", "../../escape"];
    told(&output, 5, &words);
    let listed = cluster.berth_ok(&["ps", "evil"]).unwrap();
    assert!(words.iter().all(|word| listed.contains(word)), "{listed}");
    assert_eq!(fleet.hosts[0].running().unwrap(), []);
    let agent = fleet.hosts[0].dir.join("agent");
    let escaped =
        [agent.join("escape"), agent.join("models/escape"), agent.join("models/trees/escape")];
    assert!(escaped.iter().all(|path| !path.exists()));
}

#[test]
fn an_agent_killed_while_it_pulls_goes_on_where_it_was_and_while_it_starts_starts_nothing_twice() {
    if !can_make_hosts("an_agent_killed") {
        return;
    }
    let mut fleet = slow_host();
    fleet.push_stand_in("stand-in:1", LARGE / MIB).unwrap();
    let manifest = fleet.manifest("app", &spec("stand-in:1", "/healthy", "")).unwrap();
    let before = fleet.hosts[0].received_bytes().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    half_is_here(&fleet, "app");
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    fleet.settles_at("app", 1).unwrap();
    little_came_twice(&fleet, before);

    // While it starts: the moment the engine tells of a container that was made.
    let events = fleet.hosts[0].record_events().unwrap();
    for wanted in [4, 8] {
        let seen = events::read(&events.log).unwrap_or_default().len();
        fleet.cluster.berth_ok(&["scale", "app", &wanted.to_string()]).unwrap();
        eventually("a container is being made", PATIENCE, || {
            let all = events::read(&events.log)?;
            ensure!(all[seen.min(all.len())..].iter().any(|e| e.action == "create"));
            Ok(())
        })
        .unwrap();
        fleet.hosts[0].agent().kill();
        fleet.hosts[0].start_agent().unwrap();
        fleet.settles_at("app", wanted).unwrap();
    }
    events::nothing_twice(&events::read(&events.log).unwrap()).unwrap();
}
