//! The simulator's command.
//!
//! Exit code 0: all held. 1: something did not, with its story. 2: the command line is wrong.

use berth_tests::sim::{self, bugs};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const USAGE: &str = "\
usage: sim --seeds N [--first SEED] [--bug NAME] [--threads N]
       sim --story SEED [--bug NAME]   the story of one seed
       sim --list-bugs                 the bugs that can be planted
       sim --check-bugs [--seeds N] [--bug WORD]
                                       each planted bug (with WORD in its name) is found within
                                       N seeds (10000)";

/// What is asked for.
struct Asked {
    seeds: Option<u64>,
    first: u64,
    bug: Option<String>,
    threads: usize,
    story: Option<u64>,
    list_bugs: bool,
    check_bugs: bool,
}

fn read(mut args: impl Iterator<Item = String>) -> Result<Asked, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut asked = Asked {
        seeds: None,
        first: 0,
        bug: None,
        threads,
        story: None,
        list_bugs: false,
        check_bugs: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
        match arg.as_str() {
            "--seeds" => asked.seeds = Some(number(value()?)?),
            "--first" => asked.first = number(value()?)?,
            "--story" => asked.story = Some(number(value()?)?),
            "--threads" => asked.threads = usize::try_from(number(value()?)?).unwrap_or(1).max(1),
            "--bug" => asked.bug = Some(value()?),
            "--list-bugs" => asked.list_bugs = true,
            "--check-bugs" => asked.check_bugs = true,
            other => return Err(format!("{other} is not known")),
        }
    }
    Ok(asked)
}

/// How many seeds came to what.
struct Outcome {
    seeds: u64,
    steps: u64,
    /// The first seed that breaks something, and how many do.
    broken: Option<(u64, String)>,
    count: u64,
    /// By kind of finding: how many, and the first.
    kinds: BTreeMap<String, (u64, u64)>,
}

impl Outcome {
    fn new() -> Self {
        Self { seeds: 0, steps: 0, broken: None, count: 0, kinds: BTreeMap::new() }
    }

    fn add(&mut self, kind: String, count: u64, first: u64) {
        let held = self.kinds.entry(kind).or_insert((0, first));
        held.0 += count;
        held.1 = held.1.min(first);
    }
}

/// Runs seeds on all threads; with `stop`, until one breaks something.
fn run(first: u64, seeds: u64, threads: usize, bug: Option<&bugs::Bug>, stop: bool) -> Outcome {
    let (next, stopped) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let work = || {
        bugs::plant(bug);
        let mut mine = Outcome::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= seeds || at > stopped.load(Ordering::Relaxed) {
                return mine;
            }
            let run = sim::run(first + at);
            mine.seeds += 1;
            mine.steps += run.steps;
            if let Some(broken) = run.broken {
                mine.count += 1;
                mine.add(sim::kind(&broken), 1, first + at);
                if mine.broken.is_none() {
                    mine.broken = Some((first + at, broken));
                }
                if stop {
                    stopped.fetch_min(at, Ordering::Relaxed);
                }
            }
        }
    };
    let parts: Vec<Outcome> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let ended = running.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all = Outcome::new();
    for part in parts {
        all.seeds += part.seeds;
        all.steps += part.steps;
        all.count += part.count;
        for (kind, (count, first)) in part.kinds {
            all.add(kind, count, first);
        }
        all.broken = all.broken.into_iter().chain(part.broken).min_by_key(|(seed, _)| *seed);
    }
    all
}

/// Each planted bug, found or not.
fn check_bugs(asked: &Asked) -> bool {
    let seeds = asked.seeds.unwrap_or(10_000);
    let mut all = true;
    let asked_for =
        |bug: &bugs::Bug| asked.bug.as_ref().is_none_or(|word| bug.name().contains(word.as_str()));
    for bug in bugs::all().iter().filter(|bug| asked_for(bug)) {
        let begun = Instant::now();
        let outcome = run(asked.first, seeds, asked.threads, Some(bug), true);
        let took = begun.elapsed().as_secs_f64();
        match outcome.broken {
            Some((seed, broken)) => {
                println!("{:<36} seed {:>5}  {took:>5.1} s  {broken}", bug.name(), seed);
            }
            None => {
                all = false;
                println!("{:<36} NOT FOUND in {seeds} seeds, {took:.1} s", bug.name());
            }
        }
    }
    all
}

fn main() -> ExitCode {
    let asked = match read(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(why) => {
            eprintln!("sim: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if asked.list_bugs {
        for bug in bugs::all() {
            println!("{:<36} {}", bug.name(), bug.words());
        }
        return ExitCode::SUCCESS;
    }
    if asked.check_bugs {
        sim::keep_panics();
        return if check_bugs(&asked) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let bug = match asked.bug.as_deref().map(bugs::named) {
        Some(None) => {
            eprintln!("sim: no bug has this name; --list-bugs names them");
            return ExitCode::from(2);
        }
        Some(found) => found,
        None => None,
    };
    sim::keep_panics();
    let seed = match (asked.story, asked.seeds) {
        (Some(seed), _) => Some(seed),
        (None, Some(seeds)) => {
            let begun = Instant::now();
            let outcome = run(asked.first, seeds, asked.threads, bug.as_ref(), bug.is_some());
            let took = begun.elapsed().as_secs_f64();
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let pace = outcome.steps as f64 / took / asked.threads as f64;
            println!(
                "{} seeds, {} steps ({} a seed) in {took:.1} s: {pace:.0} steps a second and thread; \
                 {} broke something",
                outcome.seeds,
                outcome.steps,
                outcome.steps / outcome.seeds.max(1),
                outcome.count,
            );
            for (kind, (count, first)) in &outcome.kinds {
                println!("{count} times, first seed {first}: {kind}");
            }
            outcome.broken.map(|(seed, _)| seed)
        }
        (None, None) => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Some(seed) = seed else { return ExitCode::SUCCESS };
    bugs::plant(bug.as_ref());
    match sim::story(seed) {
        Some(story) => {
            println!("{story}");
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed} breaks nothing");
            ExitCode::SUCCESS
        }
    }
}
