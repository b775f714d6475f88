//! A fleet under random work and faults for as long as one likes, and what each part takes meanwhile.
//!
//!     cargo run --release -p berth-tests --bin soak -- --minutes N [--hosts N] [--seed SEED] [--every SECONDS]
//!
//! Hosts are network namespaces, each with an engine of its own, so it needs root, Docker's daemon and the
//! programs built before. Each line is a look at all parts: MiB of memory, file handles, MiB on disk,
//! containers and images. At the end everything is mended and must settle, and what was mostly taken in the
//! last quarter is held against the second one, the first being the time in which things grow to their size.
//! Exit code 0: it settled and nothing has gone on growing. 1: it did not, or something has, or there were too
//! few looks to tell.

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::eventually;
use berth_tests::hosts::Fleet;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: soak --minutes N [--hosts N] [--seed SEED] [--every SECONDS]";
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// Longest pause between two things that are done: a pace.
const PAUSE_MS: u64 = 3_000;
/// Longest time something is away.
const AWAY_MS: u64 = 8_000;
/// All is to be as wanted this long after the last fault.
const SETTLES: Duration = Duration::from_secs(300);

struct Asked {
    minutes: u64,
    hosts: u32,
    seed: u64,
    every: Duration,
}

fn read(mut words: impl Iterator<Item = String>) -> Result<Asked> {
    let mut asked =
        Asked { minutes: 0, hosts: 3, seed: fastrand::u64(..), every: Duration::from_secs(30) };
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64> {
            let value = words.next().with_context(|| format!("{word} needs a number"))?;
            value.parse().with_context(|| format!("{word} {value} is no number"))
        };
        match word.as_str() {
            "--minutes" => asked.minutes = number()?,
            "--hosts" => asked.hosts = u32::try_from(number()?)?.clamp(1, 20),
            "--seed" => asked.seed = number()?,
            "--every" => asked.every = Duration::from_secs(number()?.max(1)),
            other => bail!("{other} is not known"),
        }
    }
    ensure!(asked.minutes > 0, "--minutes says for how long");
    Ok(asked)
}

/// What one part takes: `what` by name.
type Taken = BTreeMap<String, u64>;

fn of_process(taken: &mut Taken, name: &str, id: u32) -> Result<()> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no memory")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    taken.insert(format!("{name} MiB"), kib / 1024);
    let handles = std::fs::read_dir(format!("/proc/{id}/fd"))?.count();
    taken.insert(format!("{name} handles"), u64::try_from(handles)?);
    Ok(())
}

fn on_disk(folder: &Path) -> Result<u64> {
    let out = Command::new("du").arg("-sm").arg(folder).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or("0").parse()?)
}

fn look(fleet: &mut Fleet) -> Result<Taken> {
    let mut taken = Taken::new();
    of_process(&mut taken, "berthd", fleet.cluster.server().id())?;
    taken.insert("berthd disk".to_owned(), on_disk(&fleet.cluster.server_dir())?);
    for host in &mut fleet.hosts {
        let name = host.name.clone();
        let (agent, engine) = (host.agent().id(), host.engine().id());
        of_process(&mut taken, &format!("{name} agent"), agent)?;
        of_process(&mut taken, &format!("{name} engine"), engine)?;
        taken.insert(format!("{name} disk"), on_disk(&host.dir.join("agent"))?);
        taken.insert(format!("{name} engine disk"), on_disk(&host.dir.join("engine"))?);
        taken.insert(format!("{name} containers"), u64::try_from(host.containers()?.len())?);
        let images = host.docker(&["images", "-q"])?.lines().count();
        taken.insert(format!("{name} images"), u64::try_from(images)?);
    }
    Ok(taken)
}

/// Of eight versions one fails, and goes back by itself; half of them have a model.
fn manifest(fleet: &Fleet, name: &str, mark: u64, replicas: u64) -> Result<String> {
    let does = if mark % 8 == 7 { "exit:1" } else { "serve" };
    let source = if mark.is_multiple_of(2) {
        format!("model: m:{}\n  runtime: stand-in:1", mark % 4)
    } else {
        "image: stand-in:1".to_owned()
    };
    fleet.manifest(
        name,
        &format!(
            "  {source}\n  replicas: {replicas}\n  env: {{MARK: \"{mark}\", DO: \"{does}\"}}\n  \
             ports: [{{name: http, container: 8080}}]\n  \
             health: {{http: {{path: /healthy, port: http}}, interval: 1s, timeout: 2s}}\n  \
             rollout: {{readyFor: 0s, progressDeadline: 20s}}\n  stopGrace: 0s\n"
        ),
    )
}

/// Lets a drawn time go by.
#[expect(
    clippy::disallowed_methods,
    reason = "nothing is waited for: the moments are to be random"
)]
fn pace(time: Duration) {
    std::thread::sleep(time);
}

/// One thing that people do. What the server refuses, or does not answer, is no failure here.
fn work(fleet: &Fleet, draws: &mut fastrand::Rng, mark: u64) -> Result<String> {
    let name = *draws.choice(&NAMES).context("a name")?;
    let args: Vec<String> = match draws.u32(0..14) {
        0..=2 => {
            let file = manifest(fleet, name, mark, draws.u64(1..5))?;
            vec!["apply".into(), "-f".into(), file, "--no-wait".into()]
        }
        3 | 4 => vec!["scale".into(), name.into(), draws.u64(0..6).to_string()],
        5 => ["deployment", "restart", name].map(str::to_owned).into(),
        6 => vec!["rm".into(), name.into(), "--yes".into()],
        7 => ["deployment", "rollout", "undo", name].map(str::to_owned).into(),
        8 | 9 => ["logs", name, "--tail", "5"].map(str::to_owned).into(),
        10 => ["events", "--limit", "20"].map(str::to_owned).into(),
        11 => {
            let host = draws.choice(&fleet.hosts).context("a host")?.name.clone();
            vec!["host".into(), "drain".into(), host, "--yes".into()]
        }
        _ => {
            let host = draws.choice(&fleet.hosts).context("a host")?.name.clone();
            let verb = *draws.choice(&["cordon", "uncordon"]).context("a verb")?;
            vec!["host".into(), verb.into(), host]
        }
    };
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let code = fleet.cluster.berth(&words)?.status.code().unwrap_or(-1);
    Ok(format!("{} -> {code}", words.join(" ")))
}

/// One thing that goes wrong, and its end.
fn fault(fleet: &mut Fleet, draws: &mut fastrand::Rng) -> Result<String> {
    let away = Duration::from_millis(draws.u64(100..AWAY_MS));
    let n = draws.usize(0..fleet.hosts.len());
    let name = fleet.hosts[n].name.clone();
    let lasts = || pace(away);
    let what = match draws.u32(0..6) {
        0 => {
            fleet.cluster.server().kill();
            lasts();
            fleet.cluster.start_server()?;
            "berthd is killed".to_owned()
        }
        1 => {
            fleet.hosts[n].agent().kill();
            lasts();
            fleet.hosts[n].start_agent()?;
            format!("the agent of {name} is killed")
        }
        2 => {
            fleet.hosts[n].cut()?;
            lasts();
            fleet.hosts[n].mend()?;
            format!("{name} is cut off")
        }
        3 => {
            fleet.hosts[n].engine().freeze()?;
            lasts();
            fleet.hosts[n].engine().thaw()?;
            format!("the engine of {name} hangs")
        }
        4 => {
            fleet.hosts[n].engine().kill();
            lasts();
            fleet.hosts[n].start_engine()?;
            format!("the engine of {name} is killed")
        }
        _ => {
            fleet.hosts[n].lose(Some(20))?;
            lasts();
            fleet.hosts[n].lose(None)?;
            format!("{name} loses packets")
        }
    };
    Ok(format!("{what} for {} ms", away.as_millis()))
}

/// Everything wanted runs and is ready, and nothing else is there.
fn settled(fleet: &Fleet) -> Result<()> {
    // What was left with a version that fails, and nothing to go back to, waits for people.
    for name in NAMES {
        let file = manifest(fleet, name, 0, 2)?;
        fleet.cluster.berth_ok(&["apply", "-f", &file, "--no-wait"])?;
    }
    for host in &fleet.hosts {
        fleet.cluster.berth_ok(&["host", "uncordon", &host.name])?;
    }
    eventually("everything wanted runs, and nothing else", SETTLES, || {
        let listed = fleet.cluster.berth_json(&["ps"])?;
        let listed = listed.as_array().context("a list")?;
        let late: Vec<_> = listed.iter().filter(|r| r["state"] != "ready").collect();
        ensure!(late.is_empty(), "{late:#?}");
        let running = fleet.running()?;
        ensure!(running.len() == listed.len(), "{} listed, {running:#?}", listed.len());
        Ok(())
    })
}

/// Looks from which on it can be told whether something grows.
const ENOUGH: usize = 16;

/// What so much more of it is no growth: what is there at random comes and goes.
fn slack(what: &str) -> u64 {
    match what.rsplit(' ').next() {
        Some("containers" | "images") => 4,
        Some("disk") => 32,
        // Eight of each container.
        Some("handles") if what.contains("engine") => 64,
        _ => 8,
    }
}

/// What has gone on growing: what is mostly taken in the last quarter is far above that of the second.
///
/// # Errors
/// When there are too few looks to tell.
fn grown(looks: &[Taken]) -> Result<Vec<String>> {
    ensure!(looks.len() >= ENOUGH, "{} looks do not tell whether anything grows", looks.len());
    let quarter = looks.len() / 4;
    let mostly = |looks: &[Taken], what: &str| {
        let mut all: Vec<u64> = looks.iter().filter_map(|l| l.get(what)).copied().collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or(0)
    };
    let last = looks.last().context("a look")?;
    let mut all = Vec::new();
    for what in last.keys() {
        let before = mostly(&looks[quarter..2 * quarter], what);
        let after = mostly(&looks[looks.len() - quarter..], what);
        if after > before + before / 4 + slack(what) {
            all.push(format!("{what}: {before} in the second quarter, {after} in the last"));
        }
    }
    Ok(all)
}

fn run(asked: &Asked) -> Result<Vec<String>> {
    println!("--seed {} --minutes {} --hosts {}", asked.seed, asked.minutes, asked.hosts);
    let mut draws = fastrand::Rng::with_seed(asked.seed);
    let mut fleet = Fleet::start(asked.hosts)?;
    fleet.push_stand_in("stand-in:1", 1)?;
    for version in [0, 2] {
        let file = fleet.cluster.dir.path().join(format!("m{version}.bin"));
        std::fs::write(&file, vec![version; 1 << 20])?;
        let name = format!("m:{version}");
        fleet.cluster.berth_ok(&["model", "push", &name, file.to_str().context("a path")?])?;
    }
    let (begun, mut looks, mut done) = (Instant::now(), Vec::new(), (0, 0));
    let mut next = begun;
    while begun.elapsed() < Duration::from_secs(60 * asked.minutes) {
        if Instant::now() >= next {
            next = Instant::now() + asked.every;
            let taken = look(&mut fleet)?;
            let all: Vec<String> = taken.iter().map(|(what, n)| format!("{what} {n}")).collect();
            println!("{:>6} s  {}", begun.elapsed().as_secs(), all.join(", "));
            looks.push(taken);
        }
        if draws.u32(0..4) == 0 {
            done.1 += 1;
            println!("          * {}", fault(&mut fleet, &mut draws)?);
        } else {
            done.0 += 1;
            println!("          {}", work(&fleet, &mut draws, done.0)?);
        }
        pace(Duration::from_millis(draws.u64(0..PAUSE_MS)));
    }
    let settling = Instant::now();
    settled(&fleet).with_context(|| fleet.story())?;
    println!(
        "{} things done, {} went wrong; settled after {:.1} s",
        done.0,
        done.1,
        settling.elapsed().as_secs_f64()
    );
    grown(&looks)
}

fn main() -> ExitCode {
    let asked = match read(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(why) => {
            eprintln!("soak: {why:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&asked) {
        Ok(grown) if grown.is_empty() => ExitCode::SUCCESS,
        Ok(grown) => {
            eprintln!("soak: goes on growing:\n  {}", grown.join("\n  "));
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("soak: {why:?}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each number twice.
    fn looks(numbers: &[u64]) -> Vec<Taken> {
        let all = numbers.iter().flat_map(|n| [n, n]);
        all.map(|n| Taken::from([("x MiB".to_owned(), *n)])).collect()
    }

    #[test]
    fn what_levels_off_has_not_grown_and_what_goes_on_has() {
        assert!(grown(&looks(&[1, 50, 100, 100, 110, 120, 120, 110])).unwrap().is_empty());
        // What is there once only has not grown.
        assert!(grown(&looks(&[1, 50, 100, 100, 100, 100, 110, 110])).unwrap().is_empty());
        assert_eq!(grown(&looks(&[1, 50, 100, 100, 150, 200, 300, 400])).unwrap().len(), 1);
        assert!(grown(&looks(&[1, 2])).is_err());
    }
}
