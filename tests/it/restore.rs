//! A restore of an older backup, on hosts with engines of their own: nothing that runs is stopped.

use anyhow::{Context as _, Result, ensure};
use berth_tests::hosts::{Fleet, Seen, can_make_hosts};
use berth_tests::{Cluster, PATIENCE, command, eventually};
use serde_json::Value;
use std::path::Path;
use std::process::{Output, Stdio};

fn spec(replicas: u32) -> String {
    format!(
        "  image: stand-in:1\n  replicas: {replicas}\n  ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 500ms, timeout: 2s}}\n  \
         rollout: {{readyFor: 1s}}\n  stopGrace: 0s\n"
    )
}

fn berthd(args: &[&str]) -> Output {
    command("berthd").unwrap().args(args).stdin(Stdio::null()).output().unwrap()
}

fn told(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
}

fn orphans(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.berth_json(&["orphan", "list"])?.as_array().cloned().context("a list")
}

/// The server's folder is lost and made anew from a backup; its registry was copied besides.
fn restore(cluster: &Cluster, backup: &Path, key: &Path) -> Result<()> {
    let (data, lost) = (cluster.server_dir(), cluster.dir.path().join("lost"));
    std::fs::rename(&data, &lost)?;
    let args = [
        "restore",
        backup.to_str().context("a path")?,
        "--data-dir",
        data.to_str().context("a path")?,
        "--recovery-key-file",
        key.to_str().context("a path")?,
    ];
    let output = berthd(&args);
    told(&output, 0, &["void now: 3 join tokens", "the registry held", "berth orphan list"]);
    told(&berthd(&args), 1, &["is not empty"]);
    std::fs::rename(lost.join("registry"), data.join("registry"))?;
    std::fs::copy(lost.join("doors.json"), data.join("doors.json"))?;
    Ok(())
}

/// Waits until so many orphans are listed and every host has said what it runs.
fn listed(fleet: &Fleet, number: usize) -> Result<Vec<Value>> {
    eventually("what the ledger does not know is listed", PATIENCE, || {
        let all = orphans(&fleet.cluster)?;
        ensure!(all.len() == number, "{all:#?}");
        let info = fleet.cluster.berth_json(&["server", "info"])?;
        ensure!(!info["warnings"].to_string().contains("have not said"), "{info}");
        Ok(all)
    })
}

#[test]
fn a_restore_of_an_older_backup_stops_nothing_and_what_it_does_not_know_waits_for_a_decision() {
    if !can_make_hosts("a_restore_of_an_older_backup") {
        return;
    }
    let mut fleet = Fleet::start(2).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let app = fleet.manifest("app", &spec(2)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &app, "--timeout", "90s"]).unwrap();
    let known = fleet.settles_at("app", 2).unwrap();
    fleet.cluster.berth_ok(&["host", "token", "create"]).unwrap();
    let epoch = |fleet: &Fleet| {
        fleet.cluster.berth_json(&["server", "info"]).unwrap()["epoch"].as_u64().unwrap()
    };
    let before = epoch(&fleet);

    // The backup of a running server; the key is printed, once.
    let backup = fleet.cluster.dir.path().join("monday.age");
    let name = backup.to_str().unwrap().to_owned();
    let key = fleet.cluster.dir.path().join("recovery.key");
    std::fs::write(&key, fleet.cluster.berth_ok(&["backup", &name]).unwrap()).unwrap();
    told(&fleet.cluster.berth(&["backup", &name]).unwrap(), 1, &["exists already"]);
    let second = fleet.cluster.dir.path().join("second.age");
    let again = fleet.cluster.berth(&["backup", second.to_str().unwrap()]).unwrap();
    told(&again, 0, &["the recovery key that was shown before"]);
    assert_eq!(again.stdout, b"");

    // Afterwards more is wanted, and runs.
    fleet.cluster.berth_ok(&["scale", "app", "4"]).unwrap();
    fleet.settles_at("app", 4).unwrap();
    let later = fleet.manifest("later", &spec(1)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &later, "--timeout", "90s"]).unwrap();
    fleet.ready("later", 1).unwrap();
    let running = fleet.running().unwrap();
    assert_eq!(running.len(), 5);
    let untouched = |fleet: &Fleet, when: &str| {
        assert_eq!(fleet.running().unwrap(), running, "{when}");
    };

    let data = fleet.cluster.server_dir();
    let online = fleet.cluster.dir.path().join("online.age");
    let online = ["backup", online.to_str().unwrap(), "--data-dir", data.to_str().unwrap()];
    told(&berthd(&online), 1, &["a server runs on", "`berth backup`"]);
    fleet.cluster.server().kill();
    told(&berthd(&online), 0, &["the recovery key that was shown before opens it"]);
    restore(&fleet.cluster, &backup, &key).unwrap();
    untouched(&fleet, "without a server");

    fleet.cluster.start_server().unwrap();
    let found = listed(&fleet, 3).unwrap();
    untouched(&fleet, "after the hosts were heard");
    assert!(epoch(&fleet) > before, "a restore raises the epoch");
    let slots: Vec<_> =
        found.iter().filter(|o| o["deployment"] == "app").map(|o| o["slot"].as_u64()).collect();
    assert_eq!(slots.len(), 2, "{found:#?}");
    let lost = found.iter().filter(|o| o["deployment"] == "later").count();
    assert_eq!(lost, 1, "its host knows the name of what the ledger has lost: {found:#?}");
    assert!(slots.contains(&Some(2)) && slots.contains(&Some(3)), "{found:#?}");
    let info = fleet.cluster.berth_json(&["server", "info"]).unwrap();
    assert!(info["warnings"].to_string().contains("berth orphan list"), "{info}");
    let tokens = fleet.cluster.berth_json(&["host", "token", "list"]).unwrap();
    assert_eq!(tokens, serde_json::json!([]), "tokens of before are void");

    // Nothing is forgotten by a server that dies meanwhile.
    fleet.cluster.server().kill();
    fleet.cluster.start_server().unwrap();
    fleet.all_present().unwrap();
    assert_eq!(listed(&fleet, 3).unwrap(), found);
    untouched(&fleet, "after another start");

    // Adopted ones go on as they are; what was deployed after the backup cannot be adopted.
    for host in ["h0", "h1"] {
        if found.iter().any(|o| o["host"] == host && o["deployment"] == "app") {
            fleet.cluster.berth_ok(&["orphan", "adopt", "--host", host]).unwrap();
        }
    }
    let left = listed(&fleet, 1).unwrap();
    let lone = left[0]["uid"].as_str().unwrap();
    let refused = fleet.cluster.berth(&["orphan", "adopt", lone]).unwrap();
    told(&refused, 1, &["cannot be adopted", "release this one, then apply the manifest"]);
    let ready = fleet.ready("app", 4).unwrap();
    untouched(&fleet, "after the adoption");
    assert!(known.iter().all(|one| ready.iter().any(|r| r["containerId"] == one.id.as_str())));

    // The last decision lets the hosts have sets again: that one goes, and nothing else does.
    fleet.cluster.berth_ok(&["orphan", "release", lone, "--yes"]).unwrap();
    let gone = eventually("what was released is stopped", PATIENCE, || {
        let now = fleet.running()?;
        ensure!(now.len() == 4, "{now:#?}");
        Ok(now)
    });
    let kept: Vec<Seen> = fleet.settles_at("app", 4).unwrap();
    assert_eq!(gone.unwrap(), kept);
    assert!(kept.iter().all(|one| running.contains(one)), "{kept:#?} of {running:#?}");
    let info = fleet.cluster.berth_json(&["server", "info"]).unwrap();
    assert!(!info["warnings"].to_string().contains("orphan"), "{info}");

    // And the cluster goes on as any other.
    fleet.cluster.berth_ok(&["scale", "app", "5"]).unwrap();
    let grown = fleet.settles_at("app", 5).unwrap();
    assert!(kept.iter().all(|one| grown.contains(one)), "{grown:#?}");
    fleet.cluster.berth_ok(&["apply", "-f", &later, "--timeout", "90s"]).unwrap();
    fleet.ready("later", 1).unwrap();
}
