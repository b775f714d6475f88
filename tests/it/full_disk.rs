//! The server's disk, filled to its last block under writes: it says so, refuses writes, loses nothing
//! that it acknowledged, comes up on the full disk, and goes on by itself once there is room.

use crate::load::{Book, Shared, book_says, join, nothing_is_lost, writers};
use anyhow::ensure;
use berth_test_disk::Disk;
use berth_tests::hosts::{Fleet, can_make_hosts};
use berth_tests::{Cluster, PATIENCE, eventually};

const WRITERS: usize = 4;

#[test]
fn a_full_disk_refuses_writes_and_loses_nothing_and_the_server_goes_on_when_there_is_room() {
    let mut disk = None;
    let cluster = Cluster::start_on(&[], |server| {
        disk = Disk::mount("a_full_disk", server, 64);
        ensure!(disk.is_some(), "skipped");
        Ok(())
    });
    let Some(disk) = disk else { return };
    let mut cluster = cluster.unwrap();
    join(&cluster).unwrap();
    let spare = cluster.berth_json(&["host", "token", "create"]).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let book = Shared::default();
    let load = |cluster: &Cluster, goal: &dyn Fn(&Book) -> bool| {
        runtime.block_on(async {
            let load = writers(cluster, WRITERS, &book).await.unwrap();
            book_says(&book, goal).await.unwrap();
            load
        })
    };
    let mut ends = load(&cluster, &|book| book.acknowledged >= 50);

    // Held meanwhile, so that what fills the disk does not take the ballast's room as well.
    cluster.server().freeze().unwrap();
    disk.fill().unwrap();
    cluster.server().thaw().unwrap();
    runtime.block_on(book_says(&book, |book| book.refused >= 50)).unwrap();
    let warned = |cluster: &Cluster, yes: bool| {
        eventually("the server tells of its disk as it is", PATIENCE, || {
            let info = cluster.berth_json(&["server", "info"])?;
            ensure!(info["warnings"].to_string().contains("disk is full") == yes, "{info}");
            Ok(())
        })
        .unwrap();
    };
    warned(&cluster, true);
    let refused = cluster.berth(&["host", "token", "create"]).unwrap();
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && words.contains("disk is full"), "{words}");
    // The ballast leaves room for what makes room.
    cluster.berth_ok(&["host", "token", "rm", spare["id"].as_str().unwrap(), "--yes"]).unwrap();
    runtime.block_on(nothing_is_lost(&cluster, &book)).unwrap();
    assert!(cluster.server().is_running());

    // It dies, and comes up on the full disk.
    for _ in 0..2 {
        cluster.server().kill();
        for end in ends.drain(..) {
            runtime.block_on(end).unwrap();
        }
        cluster.start_server().unwrap();
        runtime.block_on(nothing_is_lost(&cluster, &book)).unwrap();
    }

    let before = book.lock().unwrap().acknowledged;
    ends = load(&cluster, &|book| book.refused >= 60 || book.acknowledged > before);
    disk.free().unwrap();
    runtime.block_on(book_says(&book, |book| book.acknowledged >= before + 50)).unwrap();
    warned(&cluster, false);
    cluster.server().kill();
    for end in ends {
        runtime.block_on(end).unwrap();
    }
    cluster.start_server().unwrap();
    runtime.block_on(nothing_is_lost(&cluster, &book)).unwrap();
    let log = std::fs::read_to_string(&cluster.server().log).unwrap();
    assert!(log.contains("the disk is full; writes are refused"), "{log}");
    cluster.server().kill();
}

#[test]
fn a_ballast_that_finds_no_room_at_the_start_is_told_of_and_made_once_there_is() {
    const BALLAST: u64 = 1 << 20;
    let mut disk = None;
    let cluster = Cluster::start_on(&[], |server| {
        disk = Disk::mount("a_ballast_that_finds_no_room", server, 64);
        ensure!(disk.is_some(), "skipped");
        Ok(())
    });
    let Some(disk) = disk else { return };
    let mut cluster = cluster.unwrap();
    let ballast = cluster.server_dir().join("ballast");
    cluster.server().kill();
    std::fs::remove_file(&ballast).unwrap();
    // Enough to start and to write, too little for a ballast beside as much again.
    disk.fill_but(BALLAST + BALLAST / 2).unwrap();
    cluster.start_server().unwrap();
    let log = cluster.server().log.clone();
    eventually("the missing ballast is told of", PATIENCE, || {
        ensure!(std::fs::read_to_string(&log)?.contains("there is no room for the ballast"));
        Ok(())
    })
    .unwrap();
    assert!(!ballast.exists());
    let token = cluster.berth_json(&["host", "token", "create"]).unwrap();
    disk.free().unwrap();
    eventually("the ballast is made", PATIENCE, || {
        ensure!(std::fs::metadata(&ballast)?.len() == BALLAST);
        Ok(())
    })
    .unwrap();
    // So that what makes room is taken when the disk fills.
    cluster.server().freeze().unwrap();
    disk.fill().unwrap();
    cluster.server().thaw().unwrap();
    eventually("the ballast is given up", PATIENCE, || {
        let made = cluster.berth(&["host", "token", "create"])?;
        ensure!(!made.status.success() && !ballast.exists());
        Ok(())
    })
    .unwrap();
    cluster.berth_ok(&["host", "token", "rm", token["id"].as_str().unwrap(), "--yes"]).unwrap();
    cluster.server().kill();
}

#[test]
fn an_agent_whose_disk_is_full_says_so_keeps_what_runs_and_goes_on_when_there_is_room() {
    if !can_make_hosts("an_agent_whose_disk_is_full") {
        return;
    }
    let mut fleet = Fleet::start(0).unwrap();
    let host = fleet.cluster.dir.path().join("h0");
    std::fs::create_dir_all(&host).unwrap();
    let disk = Disk::mount("an_agent_whose_disk_is_full", &host.join("agent"), 64);
    let Some(disk) = disk else { return };
    fleet.add_host_with("[transfer]\nkeep-free = \"1MiB\"\n", &[]).unwrap();
    fleet.all_present().unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let spec = "  image: stand-in:1\n  replicas: 2\n  rollout: {readyFor: 0s}\n  stopGrace: 0s\n";
    let manifest = fleet.manifest("app", spec).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
    let before = fleet.settles_at("app", 2).unwrap();

    disk.fill().unwrap();
    fleet.cluster.berth_ok(&["scale", "app", "3"]).unwrap();
    eventually("the host says why it does not follow", PATIENCE, || {
        let hosts = fleet.cluster.berth_json(&["host", "list"])?;
        let why = hosts[0]["reason"].as_str().unwrap_or_default();
        ensure!(why.contains("disk did not take it: is it full?"), "{hosts}");
        Ok(())
    })
    .unwrap();
    assert_eq!(fleet.hosts[0].running().unwrap(), before);
    assert!(fleet.hosts[0].agent().is_running());

    disk.free().unwrap();
    let after = fleet.settles_at("app", 3).unwrap();
    assert!(before.iter().all(|one| after.contains(one)), "{after:?}");
}
