//! Bad luck on a real engine: whatever goes wrong is said with what to do about it, or mends itself.

use anyhow::{Context as _, ensure};
use berth_tests::hosts::{Fleet, Seen, can_make_hosts};
use berth_tests::{Cluster, PATIENCE, events, eventually};
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
            &["its program has ended with code 3", "hint: ", "berth logs exits"],
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
    told(&apply(&fleet, "app", &spec("stand-in:1", "/sick", "")), 5, &words);
    assert_eq!(fleet.settles_at("app", 1).unwrap(), before);
    // The same words are there for whoever looks later.
    let later = fleet.cluster.berth_json(&["deployment", "show", "app"]).unwrap();
    let later = later["status"]["reason"].as_str().unwrap_or_default().to_owned();
    assert!(later.contains("release 2 failed") && later.contains("503"), "{later}");
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

#[test]
fn an_agent_killed_while_it_pulls_goes_on_where_it_was_and_while_it_starts_starts_nothing_twice() {
    const MIB: u64 = 1024 * 1024;
    if !can_make_hosts("an_agent_killed") {
        return;
    }
    let mut fleet = Fleet::start(0).unwrap();
    fleet.add_host_with("[transfer]\nbandwidth = \"8MiB\"\n", &[]).unwrap();
    fleet.all_present().unwrap();
    fleet.push_stand_in("stand-in:1", 32).unwrap();
    let manifest = fleet.manifest("app", &spec("stand-in:1", "/healthy", "")).unwrap();
    let before = fleet.hosts[0].received_bytes().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    eventually("half of the image is here", PATIENCE, || {
        let listed = fleet.ps("app")?;
        let done = listed.first().and_then(|r| r["progress"]["doneBytes"].as_u64()).unwrap_or(0);
        ensure!(done >= 16 * MIB, "{listed:?}");
        ensure!(listed[0]["state"].as_str().is_some_and(|s| s.starts_with("fetching")));
        Ok(())
    })
    .unwrap();
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    fleet.settles_at("app", 1).unwrap();
    let received = fleet.hosts[0].received_bytes().unwrap() - before;
    // Twice come a chunk of 4 MiB and what the kernel had received and the agent, held to its rate, had not
    // read yet. From the beginning again it would be half of it more.
    let again = (32 + 16) * MIB;
    assert!((32 * MIB..again - 4 * MIB).contains(&received), "{received} bytes for 32 MiB");

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
