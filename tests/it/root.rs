//! A rotation of the cluster's root on real hosts, under what runs there.

use anyhow::{Context as _, ensure};
use berth_agent::store::Store;
use berth_proto::tls;
use berth_tests::hosts::{Fleet, can_make_hosts};
use berth_tests::{PATIENCE, command, eventually};
use std::path::Path;
use std::process::{Output, Stdio};

fn told(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
}

/// The command line with a context of its own.
fn berth(context: &Path, args: &[&str]) -> Output {
    let mut berth = command("berth").unwrap();
    berth.env("BERTH_CONFIG", context).args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn the_root_is_rotated_under_what_runs_and_hosts_that_were_away_come_along() {
    if !can_make_hosts("the_root_is_rotated") {
        return;
    }
    let mut fleet = Fleet::start(2).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let spec = "  image: stand-in:1\n  replicas: 2\n  ports: [{name: http, container: 8080}]\n  \
                health: {http: {path: /healthy, port: http}, interval: 500ms, timeout: 2s}\n  \
                placement: {spread: host}\n  rollout: {readyFor: 1s}\n  stopGrace: 0s\n";
    let app = fleet.manifest("app", spec).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &app, "--timeout", "90s"]).unwrap();
    let running = fleet.settles_at("app", 2).unwrap();
    let folder = fleet.cluster.server_dir();
    let first = std::fs::read_to_string(folder.join("ca.crt")).unwrap();
    // A context that nobody renews.
    let stale = fleet.cluster.dir.path().join("stale.toml");
    std::fs::copy(folder.join("admin.toml"), &stale).unwrap();
    let finish = ["root", "finish", "--yes"];
    told(&fleet.cluster.berth(&finish).unwrap(), 1, &["no rotation", "berth root rotate"]);

    // One host is away while it begins.
    fleet.hosts[1].agent().kill();
    let begun = fleet.cluster.berth_json(&["root", "rotate"]).unwrap();
    assert_eq!(begun["roots"].as_array().map(Vec::len), Some(2), "{begun}");
    assert_eq!(begun["usersNotRenewed"], serde_json::json!(["admin"]));
    let holds = |fleet: &Fleet, host: usize| {
        let store = Store::peek(&fleet.hosts[host].dir.join("agent"));
        let identity = store.identity().unwrap();
        let roots = identity.trust.unwrap_or_default().roots_pem;
        let newest = tls::is_signed_by_newest(&identity.certificate_pem, &roots).unwrap();
        (tls::certificates(&roots).unwrap().len(), newest)
    };
    eventually("the host that is there has a certificate of the new root", PATIENCE, || {
        ensure!(holds(&fleet, 0) == (2, true));
        let state = fleet.cluster.berth_json(&["root", "list"])?;
        ensure!(state["hostsNotTold"] == serde_json::json!(["h1"]), "{state}");
        Ok(())
    })
    .unwrap();
    let refused = fleet.cluster.berth(&finish).unwrap();
    told(&refused, 1, &["this context does not know the new root yet", "berth context renew"]);
    fleet.cluster.berth_ok(&["context", "renew"]).unwrap();
    let refused = fleet.cluster.berth(&finish).unwrap();
    told(&refused, 1, &["1 host does not hold the new root yet: h1", "berth root list"]);

    fleet.hosts[1].start_agent().unwrap();
    eventually("the host that was away has one as well", PATIENCE, || {
        ensure!(holds(&fleet, 1) == (2, true));
        let state = fleet.cluster.berth_json(&["root", "list"])?;
        ensure!(state["hostsNotToldCount"] == 0, "{state}");
        Ok(())
    })
    .unwrap();
    let state = fleet.cluster.berth_json(&["root", "list"]).unwrap();
    assert_eq!(state["usersNotRenewed"], serde_json::json!([]), "{state}");
    let exported = fleet.cluster.berth_ok(&["root", "export"]).unwrap();
    assert!(exported.starts_with(&first) && exported.len() > first.len());
    assert_eq!(berth(&stale, &["ps"]).status.code(), Some(0), "both are let in meanwhile");

    // Somebody follows with the old certificate.
    let mut following = command("berth").unwrap();
    following.env("BERTH_CONFIG", &stale).args(["events", "-f"]);
    following.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let following = following.spawn().unwrap();

    fleet.cluster.berth_ok(&finish).unwrap();
    let ended = following.wait_with_output().unwrap();
    assert!(!ended.status.success(), "a stream of the retired root goes on");
    assert_eq!(berth(&stale, &["ps"]).status.code(), Some(3), "the server is not known any more");
    assert_ne!(std::fs::read_to_string(folder.join("ca.crt")).unwrap(), first);
    eventually("the hosts are there with the one root", PATIENCE, || {
        ensure!((holds(&fleet, 0), holds(&fleet, 1)) == ((1, true), (1, true)));
        let state = fleet.cluster.berth_json(&["root", "list"])?;
        ensure!(state["hostsNotToldCount"] == 0, "{state}");
        Ok(())
    })
    .unwrap();
    fleet.all_present().unwrap();
    assert_eq!(fleet.settles_at("app", 2).unwrap(), running, "the very same containers");

    // What comes after goes on as ever: reverse connections, pulls, other starts, hosts that join.
    let logs = fleet.cluster.berth(&["logs", "app", "--tail", "3"]).unwrap();
    told(&logs, 0, &[]);
    assert!(!String::from_utf8_lossy(&logs.stderr).contains("cannot"), "{logs:?}");
    fleet.cluster.server().kill();
    fleet.cluster.start_server().unwrap();
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    fleet.all_present().unwrap();
    fleet.push_stand_in("stand-in:2", 7).unwrap();
    let next = fleet.manifest("app", &spec.replace("stand-in:1", "stand-in:2")).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &next, "--timeout", "90s"]).unwrap();
    let token = fleet.cluster.berth_json(&["host", "token", "create"]).unwrap();
    let secret = token["secret"].as_str().context("a token").unwrap();
    let pin = tls::pin(&std::fs::read_to_string(folder.join("ca.crt")).unwrap()).unwrap();
    assert!(secret.ends_with(&pin), "it pins the one root there is");
}
