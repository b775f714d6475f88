//! Another build takes over a running fleet, one whose assignments have a field more: nothing that
//! runs is touched, in either direction.
//!
//! An assignment's body is encoded once. Whoever encoded it again would drop a field it does not know,
//! or add one it does, and its digest with it.

use anyhow::{Context as _, Result, ensure};
use berth_proto::ids::Digest;
use berth_proto::record::ReleaseRecord;
use berth_server::store::{Store as _, embedded::Embedded};
use berth_server_core::batching::Batch;
use berth_tests::hosts::{Fleet, Seen, can_make_hosts};
use berth_tests::{PATIENCE, bin_dir, eventually};
use prost::Message as _;
use std::path::{Path, PathBuf};

fn spec(replicas: u32, more: &str) -> String {
    format!(
        "  image: stand-in:1\n  replicas: {replicas}\n  ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 500ms, timeout: 2s}}\n  \
         rollout: {{readyFor: 0s}}\n  stopGrace: 0s\n{more}"
    )
}

/// Adds field 200, a text, to the body of the only release, as a later build would have encoded it.
fn add_a_field(folder: &Path) -> Result<Digest> {
    let (mut store, _) = Embedded::open(folder)?;
    let all = store.load(b"release/")?;
    ensure!(all.len() == 1, "{} releases", all.len());
    let mut record = ReleaseRecord::decode(&all[0].value[..])?;
    record.body.extend([0xc2, 0x0c, 5]);
    record.body.extend(b"later");
    let digest = Digest::of(&record.body);
    record.body_digest = digest.to_string();
    let ops = vec![(all[0].key.clone(), Some(record.encode_to_vec()))];
    store.commit(&[Batch { revision: store.revision().next(), ops }])?;
    Ok(digest)
}

/// The digest of the body that a container was made from.
fn body_of(fleet: &Fleet, one: &Seen) -> Result<String> {
    let host = fleet.hosts.iter().find(|h| h.running().is_ok_and(|all| all.contains(one)));
    let format = "{{index .Config.Labels \"io.berth.spec\"}}";
    host.context("it runs nowhere")?.docker(&["inspect", "--format", format, &one.id])
}

#[test]
fn a_field_of_a_later_build_in_a_body_is_kept_to_the_letter_on_both_ends() {
    if !can_make_hosts("a_field_of_a_later_build") {
        return;
    }
    let mut fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let spec = spec(2, "  placement: {require: [later]}\n");
    let manifest = fleet.manifest("app", &spec).unwrap();
    // Placed nowhere yet: no agent has seen the body before it gets its field.
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    fleet.cluster.server().terminate(PATIENCE).unwrap();
    let digest = add_a_field(&fleet.cluster.server_dir().join("ledger")).unwrap();
    fleet.cluster.start_server().unwrap();
    fleet.cluster.berth_ok(&["host", "label", "h0", "later=yes"]).unwrap();
    let before = fleet.settles_at("app", 2).unwrap();
    for one in &before {
        assert_eq!(body_of(&fleet, one).unwrap(), digest.as_str());
    }

    // All of it is read back from disk on both ends, and said anew.
    for _ in 0..2 {
        fleet.cluster.server().kill();
        fleet.hosts[0].agent().kill();
        fleet.hosts[0].start_agent().unwrap();
        fleet.cluster.start_server().unwrap();
        fleet.all_present().unwrap();
        assert_eq!(fleet.settles_at("app", 2).unwrap(), before);
    }
    let again = fleet.cluster.berth_json(&["apply", "-f", &manifest]).unwrap();
    assert_eq!(again[0]["action"], "unchanged", "{again}");
    // One more of the same body, and the others stay.
    fleet.cluster.berth_ok(&["scale", "app", "3"]).unwrap();
    let after = fleet.settles_at("app", 3).unwrap();
    assert!(before.iter().all(|one| after.contains(one)), "{before:?}: {after:?}");
    assert!(after.iter().all(|one| body_of(&fleet, one).unwrap() == digest.as_str()));
}

/// Where `tests/next` has put a build whose bodies have one more field.
fn next_build() -> Option<PathBuf> {
    let folder = std::env::var_os("BERTH_NEXT_BUILD").map(PathBuf::from);
    if folder.is_none() {
        assert!(std::env::var_os("CI").is_none(), "tests/run makes the other build");
        println!("a_build_with_one_more_field: skipped, tests/next makes the other build");
    }
    folder
}

#[test]
fn a_build_with_one_more_field_in_a_body_is_rolled_over_a_fleet_and_back_and_touches_nothing() {
    let Some(next) = next_build() else { return };
    assert!(can_make_hosts("a_build_with_one_more_field"));
    let this = bin_dir().unwrap();
    let mut fleet = Fleet::start(2).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let mut running = Vec::new();
    let deploy = |fleet: &Fleet, name: &str, running: &mut Vec<Seen>| {
        let manifest = fleet.manifest(name, &spec(4, "")).unwrap();
        fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
        running.extend(all_run(fleet, running.len() + 4));
        running.sort();
        running.dedup();
        // Each build takes the other's deployments for what they are.
        for known in ["old", "new", "back"] {
            let manifest = fleet.cluster.dir.path().join(format!("{known}.yaml"));
            if !manifest.exists() {
                continue;
            }
            let again =
                fleet.cluster.berth_json(&["apply", "-f", manifest.to_str().unwrap()]).unwrap();
            assert_eq!(again[0]["action"], "unchanged", "{again}");
        }
    };
    deploy(&fleet, "old", &mut running);
    // The server first, then one agent; the other one gets a body with a field it does not know.
    fleet.cluster.roll_server(&next).unwrap();
    untouched(&fleet, &running);
    fleet.hosts[0].roll_agent(&next).unwrap();
    untouched(&fleet, &running);
    deploy(&fleet, "new", &mut running);
    let bodies: std::collections::BTreeSet<String> =
        running.iter().map(|one| body_of(&fleet, one).unwrap()).collect();
    assert_eq!(bodies.len(), 2, "{bodies:?}");
    fleet.hosts[1].roll_agent(&next).unwrap();
    untouched(&fleet, &running);
    // And back, with bodies of the later build about.
    for host in 0..2 {
        fleet.hosts[host].roll_agent(&this).unwrap();
        untouched(&fleet, &running);
    }
    fleet.cluster.roll_server(&this).unwrap();
    untouched(&fleet, &running);
    deploy(&fleet, "back", &mut running);
    untouched(&fleet, &running);
}

fn all_run(fleet: &Fleet, number: usize) -> Vec<Seen> {
    eventually("all run", PATIENCE, || {
        let running = fleet.running()?;
        ensure!(running.len() == number, "{running:?}");
        Ok(running)
    })
    .unwrap()
}

/// Every host is heard of, everything is ready, and the same containers run as before.
fn untouched(fleet: &Fleet, before: &[Seen]) {
    fleet.all_present().unwrap();
    eventually("all are ready", PATIENCE, || {
        let listed = fleet.cluster.berth_json(&["ps"])?;
        let listed = listed.as_array().context("a list")?;
        let ready = listed.iter().filter(|r| r["state"] == "ready").count();
        ensure!(ready == before.len() && listed.len() == ready, "{listed:#?}");
        Ok(())
    })
    .unwrap();
    assert_eq!(fleet.running().unwrap(), before);
}
