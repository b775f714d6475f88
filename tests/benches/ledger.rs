//! Commits a second, durable, of the ledger at several numbers of writers, beside bare appends with an
//! `fdatasync` each on the same disk in the same run.
//!
//! `cargo bench -p berth-tests --bench ledger`. One writer shows what a commit costs over the bare
//! append; many show what committing in groups gains. `BERTH_BENCH_SECONDS` is how long each figure is
//! taken for (2 by default), `BERTH_BENCH_ROUNDS` how often (3), `BERTH_BENCH_DIR` the disk (the build's
//! own by default).

use anyhow::{Context as _, Result, ensure};
use berth_proto::ids::Revision;
use berth_proto::record::RequestRecord;
use berth_server::ledger::Ledger;
use berth_server::store::Store as _;
use berth_server::store::embedded::Embedded;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::view::View;
use berth_tests::bench::{Spread, number};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const WRITERS: [usize; 4] = [1, 8, 64, 512];
/// Bytes of a written value: about a placement.
const VALUE: usize = 200;
/// Bytes of such a commit in the journal, key and lengths with it.
const RECORD: usize = 256;

/// What was measured with so many writers, in each round.
#[derive(Default)]
struct Figures {
    writers: usize,
    commits: Vec<f64>,
    ratios: Vec<f64>,
    waits_ms: Vec<f64>,
}

fn main() -> Result<()> {
    let time = Duration::from_secs(u64::try_from(number("BERTH_BENCH_SECONDS", 2))?);
    let rounds = number("BERTH_BENCH_ROUNDS", 3);
    let disk = match std::env::var_os("BERTH_BENCH_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => berth_tests::bin_dir()?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut bare_figures = Vec::new();
    let mut all = WRITERS.map(|writers| Figures { writers, ..Figures::default() });
    for _ in 0..rounds {
        for figures in &mut all {
            let dir = tempfile::Builder::new().prefix("ledger-bench-").tempdir_in(&disk)?;
            // Beside each figure its own bare one: a disk is not the same from minute to minute.
            let bare = bare(&dir.path().join("bare"), time)?;
            let (rate, median_ms) = runtime.block_on(ledger(dir.path(), figures.writers, time))?;
            bare_figures.push(bare);
            figures.commits.push(rate);
            figures.ratios.push(rate / bare);
            figures.waits_ms.push(median_ms);
        }
    }
    println!(
        "{RECORD}-byte appends, each with its fdatasync, a second: {}",
        Spread::of(&bare_figures)
    );
    for figures in &all {
        println!(
            "{} writers: {:.0} durable commits a second, {} times the bare appends, median {:.2} ms",
            figures.writers,
            Spread::of(&figures.commits).median,
            Spread::of(&figures.ratios),
            Spread::of(&figures.waits_ms).median
        );
    }
    Ok(())
}

/// Appends a second to one file, each durable before the next.
fn bare(path: &Path, time: Duration) -> Result<f64> {
    let mut file = std::fs::File::create(path)?;
    let record = [7; RECORD];
    let (begun, mut appends) = (Instant::now(), 0_u32);
    while begun.elapsed() < time {
        file.write_all(&record)?;
        file.sync_data()?;
        appends += 1;
    }
    Ok(f64::from(appends) / begun.elapsed().as_secs_f64())
}

/// Commits a second that were acknowledged to so many writers, and the median wait in milliseconds.
async fn ledger(folder: &Path, writers: usize, time: Duration) -> Result<(f64, f64)> {
    let (store, _) = Embedded::open(&folder.join("ledger"))?;
    let revision: Revision = store.revision();
    ensure!(revision == Revision(0), "the ledger is not new");
    let ledger = Ledger::start(Box::new(store), View::default());
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..writers {
        let ledger = ledger.clone();
        tasks.spawn(async move {
            let mut waits = Vec::new();
            while begun.elapsed() < time {
                let record = RequestRecord {
                    key: format!("writer-{writer}"),
                    response: vec![7; VALUE],
                    ..RequestRecord::default()
                };
                let changes = vec![Change::PutRequest(Arc::new(record))];
                let asked = Instant::now();
                ledger.propose(Proposal { preconditions: Vec::new(), changes }).await?;
                waits.push(asked.elapsed().as_secs_f64() * 1000.0);
            }
            anyhow::Ok(waits)
        });
    }
    let mut waits = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        waits.extend(ended.context("a writer ended")??);
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok((waits.len() as f64 / seconds, Spread::of(&waits).median))
}
