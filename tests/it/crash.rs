//! kill -9 of the server at random moments under concurrent writes: no acknowledged write is lost, and
//! every start succeeds by itself. `BERTH_KILLS` is how many (20 by default). And damage to what it
//! keeps: mended where a good copy is left, told where none is.

use crate::load::{Book, Shared, book_says, join, nothing_is_lost, writers};
use berth_tests::bench::number;
use berth_tests::{Cluster, PATIENCE, command};
use std::path::{Path, PathBuf};

/// Writers at once: enough for groups of several, few enough for two cores.
const WRITERS: usize = 8;

#[test]
fn no_acknowledged_write_is_lost_by_kill_9_under_load_and_every_start_succeeds() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut cluster = Cluster::start().unwrap();
    join(&cluster).unwrap();
    let book = Shared::default();
    let kills = number("BERTH_KILLS", 20);
    for kill in 0..kills {
        // From the first write of the load to some hundred later.
        let more = usize::from(drawn()) * 2;
        runtime.block_on(async {
            let goal = held(&book).acknowledged + 1 + more;
            let load = writers(&cluster, WRITERS, &book).await.unwrap();
            book_says(&book, |book: &Book| book.acknowledged >= goal).await.unwrap();
            cluster.server().kill();
            for writer in load {
                writer.await.unwrap();
            }
            cluster.start_server().unwrap_or_else(|error| panic!("start {kill}: {error:#}"));
            nothing_is_lost(&cluster, &book).await.unwrap();
        });
    }
    let log = std::fs::read_to_string(&cluster.server().log).unwrap();
    assert!(!log.contains("may be missing"), "a start fell back");
    println!("{kills} kills, {} writes acknowledged, none lost", held(&book).acknowledged);
}

/// Damages what a disk has kept: every byte from one place to another.
fn damage(path: &Path, from: usize, to: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    for byte in &mut bytes[from..to] {
        *byte ^= 0x5a;
    }
    std::fs::write(path, bytes).unwrap();
}

fn files(folder: PathBuf) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

fn users(cluster: &Cluster) -> Vec<String> {
    let users = cluster.berth_json(&["user", "list"]).unwrap();
    users.as_array().unwrap().iter().map(|u| u["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_damaged_store_is_made_anew_and_loses_nothing_and_without_any_good_copy_no_server_starts() {
    let mut cluster = Cluster::start().unwrap();
    for name in ["vera", "anna", "otto"] {
        cluster.berth_ok(&["user", "create", name]).unwrap();
    }
    let before = users(&cluster);
    let epoch = cluster.berth_json(&["server", "info"]).unwrap()["epoch"].clone();
    let ledger = cluster.server_dir().join("ledger");
    let damage_sled = || {
        let db = ledger.join("sled/db");
        damage(&db, 0, usize::try_from(std::fs::metadata(&db).unwrap().len()).unwrap());
    };
    cluster.server().terminate(PATIENCE).unwrap();
    damage_sled();
    cluster.start_server().unwrap();
    assert_eq!(users(&cluster), before);
    assert_eq!(cluster.berth_json(&["server", "info"]).unwrap()["epoch"], epoch);
    let log = std::fs::read_to_string(&cluster.server().log).unwrap();
    assert!(log.contains("was made anew; nothing was lost"), "{log}");

    // With the exports gone bad, too, it is not taken for a new cluster.
    cluster.server().terminate(PATIENCE).unwrap();
    let exports = files(ledger.join("exports"));
    assert!(!exports.is_empty());
    for export in exports {
        damage(&export, 20, 40);
    }
    damage_sled();
    for _ in 0..2 {
        let data = cluster.server_dir();
        let start = command("berthd").unwrap().arg("--data-dir").arg(data).output().unwrap();
        let said = String::from_utf8_lossy(&start.stderr).into_owned();
        assert_eq!(start.status.code(), Some(1), "{said}");
        assert!(said.contains("error: no good copy of the ledger is left"), "{said}");
    }
    cluster.server().kill();
}

#[test]
fn a_journal_damaged_before_its_end_raises_the_epoch_and_voids_join_tokens() {
    let mut cluster = Cluster::start().unwrap();
    cluster.berth_ok(&["user", "create", "vera"]).unwrap();
    let token = cluster.berth_json(&["host", "token", "create"]).unwrap();
    let before = users(&cluster);
    let epoch = |cluster: &Cluster| {
        cluster.berth_json(&["server", "info"]).unwrap()["epoch"].as_u64().unwrap()
    };
    let first = epoch(&cluster);
    cluster.server().kill();
    let journal = files(cluster.server_dir().join("ledger/journal"));
    damage(&journal[0], 100, 101);
    cluster.start_server().unwrap();
    assert!(epoch(&cluster) > first, "nobody goes by orders of before");
    assert_eq!(cluster.berth_json(&["host", "token", "list"]).unwrap(), serde_json::json!([]));
    let join = command("berth-agent")
        .unwrap()
        .args(["join", "--name", "late", "--server", &cluster.door("control").unwrap()])
        .args(["--token", token["secret"].as_str().unwrap(), "--data-dir"])
        .arg(cluster.agent_dir("late"))
        .output()
        .unwrap();
    assert_eq!(join.status.code(), Some(1));
    assert_eq!(users(&cluster), before, "the other copy had it all");
    let log = std::fs::read_to_string(&cluster.server().log).unwrap();
    assert!(log.contains("acknowledged writes may be missing"), "{log}");
    // Once: the next start is one like any other.
    let second = epoch(&cluster);
    cluster.server().kill();
    cluster.start_server().unwrap();
    assert_eq!(epoch(&cluster), second);
}

fn held(book: &Shared) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap()
}

/// A number that is different each time.
fn drawn() -> u8 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u8::try_from(since.subsec_micros() % 256).unwrap()
}
