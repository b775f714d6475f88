//! Three hosts with an engine and an agent each: where replicas go, and what the loss and the return
//! of a host do.

use anyhow::{Context as _, Result, ensure};
use berth_tests::hosts::{Fleet, Seen, can_make_hosts};
use berth_tests::{PATIENCE, eventually};
use std::time::Instant;

/// Three replicas that are replaced when their host has been away for five seconds.
const SPREAD: &str = "  image: stand-in:1\n  replicas: 3\n  ports: [{name: http, container: 8080}]\n  \
    health: {http: {path: /healthy, port: http}, interval: 500ms, timeout: 2s}\n  \
    rollout: {readyFor: 1s}\n  onHostLoss: {after: 5s, do: replace}\n  stopGrace: 0s\n";

fn three_hosts() -> Result<Fleet> {
    let fleet = Fleet::start(3)?;
    fleet.push_stand_in("stand-in:1", 0)?;
    let manifest = fleet.manifest("app", SPREAD)?;
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"])?;
    Ok(fleet)
}

fn hosts_of(fleet: &Fleet, deployment: &str) -> Result<Vec<String>> {
    let listed = fleet.ps(deployment)?;
    let mut hosts: Vec<String> =
        listed.iter().filter_map(|r| r["host"].as_str()).map(str::to_owned).collect();
    hosts.sort();
    Ok(hosts)
}

/// Waits until three replicas are ready on hosts other than this one.
fn replaced_from(fleet: &Fleet, lost: &str) -> Result<()> {
    eventually("the lost host's replica runs elsewhere", PATIENCE, || {
        let listed = fleet.ps("app")?;
        let elsewhere = listed.iter().filter(|r| r["host"] != lost && r["state"] == "ready");
        ensure!(elsewhere.count() == 3, "{listed:#?}");
        Ok(())
    })
}

fn kept(before: &[Seen], after: &[Seen], which: impl Fn(&Seen) -> bool) -> Result<()> {
    for one in before.iter().filter(|one| which(one)) {
        ensure!(after.contains(one), "{one:?} is not as it was: {after:#?}");
    }
    Ok(())
}

#[test]
fn hosts_of_their_own_leave_nothing_behind() {
    if !can_make_hosts("hosts_of_their_own_leave_nothing_behind") {
        return;
    }
    let fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let manifest = fleet.manifest("app", SPREAD).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    assert_eq!(fleet.running().unwrap().len(), 3);
    let dir = fleet.cluster.dir.path().to_owned();
    // Another fleet of this process may begin as soon as this one has ended.
    let link = fleet.hosts[0].link().to_owned();
    let wire = std::fs::read_link(format!("/sys/class/net/{link}/master")).unwrap();
    let mine = [link, wire.file_name().unwrap().to_str().unwrap().to_owned()];
    drop(fleet);
    assert!(!dir.exists());
    let look = |program: &str, args: &[&str]| {
        let output = std::process::Command::new(program).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let holds = |all: &str| {
        let mut names = all.split(|c: char| !c.is_ascii_alphanumeric());
        names.any(|name| mine.iter().any(|mine| mine == name))
    };
    assert!(!holds(&look("ip", &["link"])));
    assert!(!holds(&look("find", &["/sys/fs/cgroup", "-maxdepth", "2", "-type", "d"])));
    let dir = dir.to_str().unwrap();
    assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(dir));
    assert!(!look("ps", &["-eo", "args"]).contains(dir));
}

#[test]
fn a_host_cut_off_is_replaced_and_on_its_return_exactly_what_is_wanted_runs() {
    if !can_make_hosts("a_host_cut_off") {
        return;
    }
    let fleet = three_hosts().unwrap();
    assert_eq!(hosts_of(&fleet, "app").unwrap(), ["h0", "h1", "h2"]);
    let before = fleet.settles_at("app", 3).unwrap();
    let lost = &fleet.hosts[1];
    let there = lost.running().unwrap();

    lost.cut().unwrap();
    eventually("the host is listed as away and nothing fails", PATIENCE, || {
        let listed = fleet.ps("app")?;
        let one = listed.iter().find(|r| r["host"] == "h1").context("h1 is not listed")?;
        let state = one["state"].as_str().unwrap_or_default();
        ensure!(state == "host away" || state == "host lost", "{state}");
        Ok(())
    })
    .unwrap();
    let logs = fleet.cluster.berth(&["logs", "app", "--tail", "1000"]).unwrap();
    let (lines, told) =
        (String::from_utf8_lossy(&logs.stdout), String::from_utf8_lossy(&logs.stderr));
    assert_eq!(logs.status.code(), Some(0), "{told}");
    for host in ["h0", "h2"] {
        let up = |line: &str| line.contains(&format!(" {host} |")) && line.contains("is up");
        assert!(lines.lines().any(up), "{host}: {lines}");
    }
    assert!(told.contains("h1"), "the host that is away is not named: {told}");

    replaced_from(&fleet, "h1").unwrap();
    // Silence stops nothing: what ran there runs there still, untouched.
    assert_eq!(lost.running().unwrap(), there);

    lost.mend().unwrap();
    let after = fleet.settles_at("app", 3).unwrap();
    fleet.all_present().unwrap();
    kept(&before, &after, |one| !there.contains(one)).unwrap();
}

#[test]
fn a_host_cut_off_for_less_than_its_policy_says_changes_nothing_anywhere() {
    if !can_make_hosts("a_host_cut_off_for_less") {
        return;
    }
    let fleet = three_hosts().unwrap();
    let patient = SPREAD.replace("after: 5s", "after: 60s");
    let manifest = fleet.manifest("app", &patient).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    let before = fleet.settles_at("app", 3).unwrap();
    let listed = fleet.ps("app").unwrap();
    let replicas = |listed: &[serde_json::Value]| {
        let mut all: Vec<String> = listed.iter().map(|r| r["uid"].to_string()).collect();
        all.sort();
        all
    };

    fleet.hosts[1].cut().unwrap();
    eventually("the host is known to be away", PATIENCE, || {
        let now = fleet.ps("app")?;
        let away = now.iter().any(|r| r["host"] == "h1" && r["state"] == "host away");
        ensure!(away, "{now:#?}");
        // What it runs is deferred: nothing is placed elsewhere for it.
        ensure!(replicas(&now) == replicas(&listed), "{now:#?}");
        Ok(())
    })
    .unwrap();
    fleet.hosts[1].mend().unwrap();
    fleet.all_present().unwrap();
    // The very same containers, none of them started anew.
    assert_eq!(fleet.settles_at("app", 3).unwrap(), before);
    assert_eq!(replicas(&fleet.ps("app").unwrap()), replicas(&listed));
}

#[test]
fn a_host_that_loses_power_is_replaced_and_on_its_return_nothing_runs_twice() {
    if !can_make_hosts("a_host_that_loses_power") {
        return;
    }
    let mut fleet = three_hosts().unwrap();
    let before = fleet.settles_at("app", 3).unwrap();
    let there = fleet.hosts[2].running().unwrap();
    fleet.hosts[2].power_off();
    replaced_from(&fleet, "h2").unwrap();

    fleet.hosts[2].power_on().unwrap();
    assert_eq!(fleet.hosts[2].running().unwrap(), []);
    fleet.hosts[2].start_agent().unwrap();
    fleet.all_present().unwrap();
    let after = fleet.settles_at("app", 3).unwrap();
    kept(&before, &after, |one| !there.contains(one)).unwrap();
    eventually("what is not wanted there is removed", PATIENCE, || {
        let left = fleet.hosts[2].containers()?;
        let wanted = fleet.ps("app")?;
        for one in &left {
            ensure!(wanted.iter().any(|r| r["uid"] == *one.replica), "{one:?}");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_host_without_a_server_and_without_a_registry_boots_into_serving() {
    if !can_make_hosts("a_host_without_a_server") {
        return;
    }
    let mut fleet = three_hosts().unwrap();
    let replica = fleet.hosts[0].running().unwrap().remove(0).replica;
    fleet.cluster.server().kill();
    let host = &mut fleet.hosts[0];
    host.power_off();
    let off = Instant::now();
    host.power_on().unwrap();
    let engine = off.elapsed();
    host.start_agent().unwrap();
    let back = eventually("its replica is back", PATIENCE, || {
        let running = host.running()?;
        ensure!(running.len() == 1 && running[0].replica == replica, "{running:?}");
        Ok(running)
    })
    .unwrap();
    println!("serving {:?} after power came back, its engine up after {engine:?}", off.elapsed());
    assert!(back[0].attempt > 1, "an attempt of its own: {back:?}");
    let ps = host.ask_agent(&["ps"]).unwrap();
    let text = String::from_utf8_lossy(&ps.stdout);
    assert!(ps.status.success() && text.contains(&replica) && text.contains("running"), "{text}");
    // Whoever asks on the host is told how it stands with the server, and since when.
    let session = |fleet: &Fleet, words: &str| {
        eventually("the host says how it stands with the server", PATIENCE, || {
            let status = fleet.hosts[0].ask_agent(&["status"])?;
            let text = String::from_utf8_lossy(&status.stdout);
            ensure!(text.contains(words), "{text}");
            Ok(())
        })
        .unwrap();
    };
    session(&fleet, "session:  none for ");
    // The server comes back and finds it; nothing is moved.
    fleet.cluster.start_server().unwrap();
    session(&fleet, "session:  with ");
    let after = fleet.settles_at("app", 3).unwrap();
    kept(&back, &after, |_| true).unwrap();
}

#[test]
fn placement_follows_labels_spreads_over_zones_first_and_moves_when_a_label_goes() {
    if !can_make_hosts("placement_follows_labels") {
        return;
    }
    let fleet = Fleet::start(3).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    for (host, zone) in [("h0", "zone=a"), ("h1", "zone=a"), ("h2", "zone=b")] {
        fleet.cluster.berth_ok(&["host", "label", host, zone]).unwrap();
    }
    let apply = |name: &str, number: &str, placement: &str| {
        let spec = SPREAD.replace("replicas: 3", number);
        let manifest = fleet.manifest(name, &format!("{spec}  placement: {placement}\n")).unwrap();
        fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
        hosts_of(&fleet, name).unwrap()
    };
    // Two in each zone, though one of them has twice the hosts.
    assert_eq!(apply("spread", "replicas: 4", "{spread: zone}"), ["h0", "h1", "h2", "h2"]);
    assert_eq!(apply("only", "replicas: 2", "{require: [\"zone in (b, c)\"]}"), ["h2", "h2"]);
    assert_eq!(apply("every", "everyHost: true", "{require: [zone]}"), ["h0", "h1", "h2"]);

    // Only what asked for the label minds that it goes, and only there.
    let before = fleet.running().unwrap();
    let moved = fleet.ps("every").unwrap();
    let moved = moved.iter().find(|r| r["host"] == "h1").unwrap()["uid"].clone();
    fleet.cluster.berth_ok(&["host", "label", "h1", "zone-"]).unwrap();
    let after = eventually("it is gone from the host without the label", PATIENCE, || {
        let hosts = hosts_of(&fleet, "every")?;
        ensure!(hosts == ["h0", "h2"], "{hosts:?}");
        let running = fleet.running()?;
        ensure!(running.len() == before.len() - 1, "{running:?}");
        Ok(running)
    })
    .unwrap();
    kept(&before, &after, |one| moved != *one.replica).unwrap();
}

#[test]
fn a_rollout_that_only_a_host_away_keeps_open_ends_with_6_for_whoever_waits_for_all() {
    if !can_make_hosts("a_rollout_that_only_a_host_away_keeps_open") {
        return;
    }
    let fleet = Fleet::start(2).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let everywhere = SPREAD.replace("replicas: 3", "everyHost: true");
    let manifest = fleet.manifest("app", &everywhere).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    fleet.hosts[1].cut().unwrap();
    eventually("the host is known to be away", PATIENCE, || {
        let listed = fleet.cluster.berth_json(&["host", "list"])?;
        let away = listed.as_array().context("a list")?.iter().find(|h| h["name"] == "h1").cloned();
        ensure!(away.as_ref().is_some_and(|h| h["presence"] == "away"), "{away:?}");
        Ok(())
    })
    .unwrap();
    let manifest = fleet.manifest("app", &format!("{everywhere}  env: {{N: two}}\n")).unwrap();
    let all = ["apply", "-f", &manifest, "--wait-all", "--timeout", "20s"];
    let output = fleet.cluster.berth(&all).unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{words}");
    assert!(words.contains("complete, but"), "{words}");
    // Whoever does not wait for all is done.
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    // And on its return the host is brought there, too.
    fleet.hosts[1].mend().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--wait-all", "--timeout", "90s"]).unwrap();
    fleet.ready("app", 2).unwrap();
}
