//! Hosts that stop, are removed or copied: what runs on them goes on, unless it shall not.

use anyhow::ensure;
use berth_tests::hosts::{Fleet, Host, can_make_hosts};
use berth_tests::{PATIENCE, eventually};

const THREE: &str = "  image: stand-in:1\n  replicas: 3\n  ports: [{name: http, container: 8080}]\n  \
    health: {http: {path: /healthy, port: http}, interval: 500ms, timeout: 2s}\n  \
    rollout: {readyFor: 0s}\n  stopGrace: 0s\n";

fn deployed(hosts: u32) -> Fleet {
    let fleet = Fleet::start(hosts).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let manifest = fleet.manifest("app", THREE).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    fleet
}

/// Nothing of the cluster is left on a host, and its agent has ended by itself.
fn is_empty(host: &mut Host) {
    eventually("the wiped host's agent ends", PATIENCE, || {
        ensure!(!host.agent().is_running(), "it runs");
        Ok(())
    })
    .unwrap();
    assert_eq!(host.containers().unwrap(), []);
    assert_eq!(host.docker(&["images", "-q"]).unwrap(), "");
    let networks = host.docker(&["network", "ls", "--format", "{{.Name}}"]).unwrap();
    assert!(!networks.contains("berth"), "{networks}");
    for name in ["identity", "set", "models", "pull", "link.json"] {
        assert!(!host.dir.join("agent").join(name).exists(), "{name} is left");
    }
    let status = host.ask_agent(&["status"]).unwrap();
    let text = String::from_utf8_lossy(&status.stderr);
    assert!(text.contains("has not joined a cluster"), "{text}");
}

#[test]
fn stopping_stops_nothing_and_a_removed_host_keeps_what_runs_unless_it_is_wiped() {
    if !can_make_hosts("stopping_stops_nothing") {
        return;
    }
    let mut fleet = deployed(3);
    let before = fleet.settles_at("app", 3).unwrap();

    // Both are asked to end, which is no failure, and stop nothing.
    for host in &mut fleet.hosts {
        assert!(host.agent().terminate(PATIENCE).unwrap().success());
    }
    assert!(fleet.cluster.server().terminate(PATIENCE).unwrap().success());
    assert_eq!(fleet.running().unwrap(), before);
    fleet.cluster.start_server().unwrap();
    for host in &mut fleet.hosts {
        host.start_agent().unwrap();
    }
    fleet.all_present().unwrap();
    assert_eq!(fleet.settles_at("app", 3).unwrap(), before);

    // Removed: its replica is replaced elsewhere, and goes on where it is, also over a restart.
    let refused = fleet.cluster.berth(&["host", "rm", "h0", "--yes"]).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("has 1 replica; drain it first, or use --force"), "{text}");
    let there = fleet.hosts[0].running().unwrap();
    fleet.cluster.berth_ok(&["host", "rm", "h0", "--force", "--yes"]).unwrap();
    let replaced = |fleet: &Fleet, on: &[&str]| {
        eventually("the others have taken over", PATIENCE, || {
            let listed = fleet.ps("app")?;
            let ready = |r: &&serde_json::Value| {
                r["state"] == "ready" && on.iter().any(|host| r["host"] == *host)
            };
            let ready = listed.iter().filter(ready).count();
            ensure!(ready == 3 && listed.len() == 3, "{listed:#?}");
            Ok(())
        })
        .unwrap();
    };
    replaced(&fleet, &["h1", "h2"]);
    assert_eq!(fleet.hosts[0].running().unwrap(), there);
    eventually("the host knows", PATIENCE, || {
        let status = fleet.hosts[0].ask_agent(&["status"])?;
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(text.contains("removed:") && text.contains("goes on"), "{text}");
        Ok(())
    })
    .unwrap();
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    // Its agent still looks after them, with no cluster to ask.
    fleet.hosts[0].docker(&["kill", &there[0].id]).unwrap();
    eventually("what ended is started again", PATIENCE, || {
        let running = fleet.hosts[0].running()?;
        ensure!(running.len() == 1 && running[0].id != there[0].id, "{running:?}");
        Ok(())
    })
    .unwrap();

    // Wiped while it is there, and while it is away: then on its return.
    fleet.cluster.berth_ok(&["host", "rm", "h1", "--force", "--wipe", "--yes"]).unwrap();
    is_empty(&mut fleet.hosts[1]);
    replaced(&fleet, &["h2"]);
    fleet.hosts[2].cut().unwrap();
    fleet.cluster.berth_ok(&["host", "rm", "h2", "--force", "--wipe", "--yes"]).unwrap();
    assert_eq!(fleet.hosts[2].running().unwrap().len(), 3);
    fleet.hosts[2].mend().unwrap();
    is_empty(&mut fleet.hosts[2]);
    let listed = fleet.cluster.berth_json(&["host", "list"]).unwrap();
    assert_eq!(listed, serde_json::json!([]));
    let shown = fleet.cluster.berth_json(&["deployment", "show", "app"]).unwrap();
    let pending = shown["status"]["pending"][0]["message"].as_str().unwrap_or_default().to_owned();
    assert_eq!(pending, "no host fits: there are none", "{shown}");
}

#[test]
fn a_copied_host_is_quarantined_keeps_what_runs_and_goes_on_once_it_is_released() {
    if !can_make_hosts("a_copied_host") {
        return;
    }
    let mut fleet = deployed(1);
    let before = fleet.settles_at("app", 3).unwrap();
    fleet.add_clone_of(0).unwrap();
    eventually("both are shut out", PATIENCE, || {
        let hosts = fleet.cluster.berth_json(&["host", "list"])?;
        ensure!(hosts[0]["quarantined"] == true && hosts[0]["presence"] == "away", "{hosts}");
        let reason = hosts[0]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("berth host release-quarantine"), "{reason}");
        Ok(())
    })
    .unwrap();
    // What ran goes on; of new sets there are none, for neither of the two.
    assert_eq!(fleet.hosts[0].running().unwrap(), before);
    let copied = eventually("the copy runs what was wanted when it was made", PATIENCE, || {
        let running = fleet.hosts[1].running()?;
        ensure!(running.len() == 3, "{running:?}");
        Ok(running)
    })
    .unwrap();
    let more = THREE.replace("replicas: 3", "replicas: 1");
    let more = fleet.manifest("more", &more).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &more, "--no-wait"]).unwrap();
    eventually("why it waits is said", PATIENCE, || {
        let shown = fleet.cluster.berth_json(&["deployment", "show", "more"])?;
        let message = &shown["status"]["pending"][0]["message"];
        ensure!(*message == "no host fits: 1 quarantined", "{shown}");
        Ok(())
    })
    .unwrap();
    assert_eq!(fleet.hosts[0].running().unwrap(), before);
    assert_eq!(fleet.hosts[1].running().unwrap(), copied);

    // The copy is taken off the network, the operator says so, and the host goes on.
    drop(fleet.hosts.pop());
    fleet.cluster.berth_ok(&["host", "release-quarantine", "h0"]).unwrap();
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    fleet.all_present().unwrap();
    fleet.ready("more", 1).unwrap();
    let after = fleet.running().unwrap();
    assert!(before.iter().all(|one| after.contains(one)), "{before:?}: {after:?}");
}
