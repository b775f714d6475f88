//! Bad links, engines that go and come with their containers running, and a host that is full.

use anyhow::{Context as _, ensure};
use berth_tests::events;
use berth_tests::forward::Forwarder;
use berth_tests::hosts::{Fleet, can_make_hosts};
use berth_tests::{PATIENCE, eventually};
use std::time::{Duration, Instant};

const MIB: u64 = 1024 * 1024;

fn spec(replicas: u32) -> String {
    format!(
        "  image: stand-in:1\n  replicas: {replicas}\n  ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 1s, timeout: 5s}}\n  \
         rollout: {{readyFor: 0s, progressDeadline: 10m}}\n  stopGrace: 0s\n"
    )
}

#[test]
fn a_pull_over_a_slow_lossy_link_that_is_cut_in_the_middle_ends_and_brings_little_twice() {
    const SIZE: u64 = 8 * MIB;
    if !can_make_hosts("a_pull_over_a_slow_lossy_link") {
        return;
    }
    let fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", SIZE / MIB).unwrap();
    let host = &fleet.hosts[0];
    host.limit(Some(5)).unwrap();
    host.lose(Some(2)).unwrap();
    let before = host.received_bytes().unwrap();
    let manifest = fleet.manifest("app", &spec(1)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    let received = || host.received_bytes().map(|all| all - before);
    eventually("a third of it is here", PATIENCE, || {
        let received = received()?;
        ensure!(received > SIZE / 3, "{received} bytes");
        Ok(())
    })
    .unwrap();
    host.cut().unwrap();
    eventually("the server misses the host", PATIENCE, || {
        let hosts = fleet.cluster.berth_json(&["host", "list"])?;
        ensure!(hosts[0]["presence"] == "away", "{hosts}");
        Ok(())
    })
    .unwrap();
    host.mend().unwrap();
    fleet.ready("app", 1).unwrap();
    let received = received().unwrap();
    // What was lost on the way is sent twice by TCP; besides that a chunk of 4 MiB at the most.
    assert!(received < SIZE + 5 * MIB, "{received} bytes for {SIZE}");
    println!("{:.1} MiB received for {} MiB", received as f64 / MIB as f64, SIZE / MIB);
}

#[test]
fn a_small_image_is_here_while_slow_ones_would_fill_the_engine_s_queue() {
    if !can_make_hosts("a_small_image_is_here") {
        return;
    }
    let mut fleet = Fleet::start(0).unwrap();
    fleet.add_host_with("[transfer]\nbandwidth = \"3MiB\"\n", &[]).unwrap();
    fleet.all_present().unwrap();
    // An engine brings three layers at once, of all pulls together.
    let slow = [32, 33, 34].map(|mib| (format!("slow-{mib}"), mib));
    let state = |name: &str| -> anyhow::Result<(String, u64)> {
        let listed = fleet.ps(name)?;
        let one = listed.first().context("nothing is placed")?;
        let done = one["progress"]["doneBytes"].as_u64().unwrap_or(0);
        Ok((one["state"].as_str().context("a state")?.to_owned(), done))
    };
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    for (name, mib) in &slow {
        fleet.push_stand_in(&format!("{name}:1"), *mib).unwrap();
    }
    for (name, _) in &slow {
        let spec = spec(1).replace("stand-in:1", &format!("{name}:1"));
        let manifest = fleet.manifest(name, &spec).unwrap();
        fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    }
    eventually("all three are on their way", PATIENCE, || {
        for (name, _) in &slow {
            let (state, done) = state(name)?;
            ensure!(state.starts_with("fetching") && done > 0, "{name}: {state}, {done} bytes");
        }
        Ok(())
    })
    .unwrap();
    let manifest = fleet.manifest("app", &spec(1)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--no-wait"]).unwrap();
    fleet.ready("app", 1).unwrap();
    for (name, _) in &slow {
        let (state, _) = state(name).unwrap();
        assert!(state.starts_with("fetching"), "{name}: {state}");
    }
}

#[test]
fn an_engine_that_is_killed_while_its_containers_go_on_finds_them_untouched() {
    if !can_make_hosts("an_engine_that_is_killed") {
        return;
    }
    let mut fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    // Such an engine leaves what runs alone when it ends, and takes it over when it starts.
    let host = &mut fleet.hosts[0];
    host.engine().terminate(PATIENCE).unwrap();
    std::fs::write(host.dir.join("daemon.json"), r#"{"live-restore": true}"#).unwrap();
    host.start_engine().unwrap();
    let manifest = fleet.manifest("app", &spec(3)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest]).unwrap();
    let before = fleet.settles_at("app", 3).unwrap();
    for kill in [false, true] {
        let host = &mut fleet.hosts[0];
        if kill {
            host.engine().kill();
        } else {
            host.engine().terminate(PATIENCE).unwrap();
        }
        eventually("the host says that its engine does not answer", PATIENCE, || {
            let hosts = fleet.cluster.berth_json(&["host", "list"])?;
            ensure!(hosts[0]["reason"] == "its engine does not answer", "{hosts}");
            Ok(())
        })
        .unwrap();
        fleet.hosts[0].start_engine().unwrap();
        assert_eq!(fleet.settles_at("app", 3).unwrap(), before, "killed: {kill}");
    }
}

#[test]
fn two_hundred_containers_on_one_host_are_adopted_by_an_agent_that_was_killed() {
    const MANY: usize = 200;
    if !can_make_hosts("two_hundred_containers") {
        return;
    }
    let mut fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let recorded = fleet.hosts[0].record_events().unwrap();
    let begun = Instant::now();
    let manifest = fleet.manifest("app", &spec(200)).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "600s"]).unwrap();
    let took = begun.elapsed();
    let before = fleet.settles_at("app", MANY).unwrap();
    let memory = |fleet: &mut Fleet| {
        let path = format!("/proc/{}/status", fleet.hosts[0].agent().id());
        let status = std::fs::read_to_string(path)?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no such line")?;
        anyhow::Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
    };
    println!(
        "{MANY} containers in {:.0} s; the agent has {} MiB (debug build)",
        took.as_secs_f64(),
        memory(&mut fleet).unwrap()
    );
    fleet.hosts[0].agent().kill();
    fleet.hosts[0].start_agent().unwrap();
    fleet.all_present().unwrap();
    assert_eq!(fleet.settles_at("app", MANY).unwrap(), before);
    let all = events::read(&recorded.log).unwrap();
    events::nothing_twice(&all).unwrap();
    assert!(all.iter().all(|e| e.action != "die"), "something has ended");
    // They go as they came.
    fleet.cluster.berth_ok(&["scale", "app", "0"]).unwrap();
    eventually("nothing runs any more", Duration::from_secs(300), || {
        let left = fleet.running()?.len();
        ensure!(left == 0, "{left} run");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_host_at_the_end_of_a_long_link_gets_what_is_wanted_and_its_logs_and_commands_come() {
    const ONE_WAY: Duration = Duration::from_millis(400);
    if !can_make_hosts("a_host_at_the_end_of_a_long_link") {
        return;
    }
    let mut fleet = Fleet::start(1).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let status = fleet.hosts[0].ask_agent(&["status", "-o", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let server = status["servers"][0].as_str().unwrap();
    let (ip, _) = server.rsplit_once(':').unwrap();
    let link = Forwarder::start(ip, server, ONE_WAY).unwrap();
    fleet.hosts[0].agent().terminate(PATIENCE).unwrap();
    let set = fleet.hosts[0].ask_agent(&["set-server", &link.address]).unwrap();
    assert!(set.status.success(), "{set:?}");
    fleet.hosts[0].start_agent().unwrap();
    eventually("its session is over the long link", PATIENCE, || {
        let status = fleet.hosts[0].ask_agent(&["status"])?;
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(text.contains(&format!("session:  with {}", link.address)), "{text}");
        Ok(())
    })
    .unwrap();

    let took = |what: &str, args: &[&str]| {
        let begun = Instant::now();
        let text = fleet.cluster.berth_ok(args).unwrap();
        println!("{what} after {:?}, {ONE_WAY:?} one way", begun.elapsed());
        text
    };
    let manifest = fleet.manifest("app", &spec(2)).unwrap();
    took("complete", &["apply", "-f", &manifest, "--timeout", "90s"]);
    let before = fleet.settles_at("app", 2).unwrap();
    assert!(!took("logs", &["logs", "app/0", "--tail", "5"]).is_empty());
    let exec = fleet.cluster.berth(&["exec", "app/0", "--", "/berth-stand-in"]).unwrap();
    let said = String::from_utf8_lossy(&exec.stderr).into_owned();
    assert!(said.contains("cannot listen"), "a second one finds the port taken: {said}");
    assert_eq!(exec.status.code(), Some(1));
    took("scaled", &["scale", "app", "3", "--wait", "--timeout", "90s"]);
    // Nothing was lost on the way: the session that stood is the one that stands.
    let after = fleet.settles_at("app", 3).unwrap();
    assert!(before.iter().all(|one| after.contains(one)), "{after:?}");
}
