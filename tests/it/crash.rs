//! kill -9 of the server at random moments under concurrent writes: no acknowledged write is lost, and
//! every start succeeds by itself. `BERTH_KILLS` is how many (20 by default).

use crate::load::{Book, Shared, book_says, join, nothing_is_lost, writers};
use berth_tests::Cluster;
use berth_tests::bench::number;

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

fn held(book: &Shared) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap()
}

/// A number that is different each time.
fn drawn() -> u8 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u8::try_from(since.subsec_micros() % 256).unwrap()
}
