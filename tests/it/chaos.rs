//! Server and agents are killed at random moments while a client deploys and keeps its own book.
//!
//! `BERTH_KILLS` (100) says how many times, `BERTH_SEED` which moments; the seed is printed. The
//! engines' own events say afterwards whether anything was done twice, or to what should be left alone.

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::bench::number;
use berth_tests::hosts::{Fleet, Seen, can_make_hosts};
use berth_tests::{PATIENCE, command, events, eventually};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Deployments of the client at once: enough that one is always on its way.
const DEPLOYMENTS: usize = 4;
/// Most replicas of one of them.
const REPLICAS: u64 = 3;
/// Longest time between two kills, and of what was killed until it is started again.
const BETWEEN_MS: u64 = 700;
const DOWN_MS: u64 = 300;

/// Draws that depend on the seed alone (splitmix64).
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// What the client wants of a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    /// It never was, or its removal was asked for.
    Gone,
    /// It has this mark in its environment, and so many replicas.
    Wanted { mark: u64, replicas: u64 },
}

/// A client, with all that was acknowledged to it.
struct Client {
    folder: PathBuf,
    config: PathBuf,
    draws: Draws,
    book: BTreeMap<String, Entry>,
    made: u64,
    mark: u64,
    acknowledged: usize,
    unknown: usize,
}

impl Client {
    fn berth(&self, args: &[&str]) -> Result<Output> {
        let mut berth = command("berth")?;
        berth.env("BERTH_CONFIG", &self.config).args(args).args(["--request-timeout", "5s"]);
        Ok(berth.stdin(Stdio::null()).output()?)
    }

    /// One write that makes `name` to `new`.
    fn write(&mut self, name: &str, new: Entry, args: &[&str]) -> Result<()> {
        let output = self.berth(args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(0) => {
                self.acknowledged += 1;
                self.book.insert(name.to_owned(), new);
                Ok(())
            }
            // Not reached, or not answered: either is true, and one of them from now on.
            Some(3) => {
                self.unknown += 1;
                let now = self.look()?.remove(name).unwrap_or(Entry::Gone);
                let old = self.book.get(name).cloned().unwrap_or(Entry::Gone);
                ensure!(now == old || now == new, "{name}: {old:?} became {now:?}, not {new:?}");
                self.book.insert(name.to_owned(), now);
                Ok(())
            }
            code => bail!("berth {} ended with {code:?}: {said}", args.join(" ")),
        }
    }

    /// What the server says there is, once it answers.
    fn look(&self) -> Result<BTreeMap<String, Entry>> {
        let list = eventually("the server answers", PATIENCE, || {
            let output = self.berth(&["deployment", "list", "-o", "json"])?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{:?}: {said}", output.status.code());
            Ok(serde_json::from_slice::<Value>(&output.stdout)?)
        })?;
        let mut found = BTreeMap::new();
        for one in list.as_array().context("a list")? {
            let name = one["metadata"]["name"].as_str().context("a name")?.to_owned();
            let mark = one["spec"]["env"]["MARK"].as_str().and_then(|m| m.parse().ok());
            let entry = match (one["status"]["rollout"].as_str(), mark) {
                (Some("deleting"), _) => Entry::Gone,
                (_, None) => continue,
                (_, Some(mark)) => {
                    let replicas = one["spec"]["replicas"].as_u64().context("a number")?;
                    Entry::Wanted { mark, replicas }
                }
            };
            found.insert(name, entry);
        }
        Ok(found)
    }

    /// Nothing that was acknowledged is lost, and nothing has come back.
    fn compare(&self) -> Result<()> {
        let mut now = self.look()?;
        now.retain(|_, entry| *entry != Entry::Gone);
        let mut book = self.book.clone();
        book.retain(|_, entry| *entry != Entry::Gone);
        ensure!(now == book, "the book says {book:?}, the server {now:?}");
        Ok(())
    }

    /// One write of some kind, now and then with a look at everything.
    fn turn(&mut self) -> Result<()> {
        let is_wanted = |(_, entry): &(&String, &Entry)| **entry != Entry::Gone;
        let there: Vec<(String, Entry)> =
            self.book.iter().filter(is_wanted).map(|(n, e)| (n.clone(), e.clone())).collect();
        let draw = self.draws.below(10);
        if there.len() < DEPLOYMENTS || draw < 4 {
            let name = if there.len() < DEPLOYMENTS {
                self.made += 1;
                format!("d{}", self.made)
            } else {
                there[self.pick(there.len())?].0.clone()
            };
            self.apply(&name)?;
        } else if draw < 8 {
            let (name, old) = there[self.pick(there.len())?].clone();
            let Entry::Wanted { mark, .. } = old else { bail!("{name} is not there") };
            let replicas = self.draws.below(REPLICAS + 1);
            let new = Entry::Wanted { mark, replicas };
            self.write(&name, new, &["scale", &name, &replicas.to_string()])?;
        } else {
            let name = there[self.pick(there.len())?].0.clone();
            self.write(&name, Entry::Gone, &["rm", &name, "--yes"])?;
        }
        if self.draws.below(4) == 0 { self.compare() } else { Ok(()) }
    }

    fn pick(&mut self, among: usize) -> Result<usize> {
        Ok(usize::try_from(self.draws.below(u64::try_from(among)?))?)
    }

    fn apply(&mut self, name: &str) -> Result<()> {
        self.mark += 1;
        let (mark, replicas) = (self.mark, self.draws.below(REPLICAS) + 1);
        let file = self.folder.join(format!("{name}.yaml"));
        std::fs::write(&file, manifest(name, mark, replicas))?;
        let file = file.to_str().context("a path")?;
        let new = Entry::Wanted { mark, replicas };
        self.write(name, new, &["apply", "-f", file, "--no-wait"])
    }
}

fn manifest(name: &str, mark: u64, replicas: u64) -> String {
    format!(
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: {name}}}\nspec:\n  \
         image: stand-in:1\n  replicas: {replicas}\n  env: {{MARK: \"{mark}\"}}\n  \
         ports: [{{name: http, container: 8080}}]\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 1s, timeout: 2s}}\n  \
         rollout: {{readyFor: 0s}}\n  stopGrace: 0s\n"
    )
}

/// Kills and starts again, until it was done often enough or the client has ended.
fn kill_at_random(
    fleet: &mut Fleet,
    kills: usize,
    draws: &mut Draws,
    client: &mpsc::Receiver<()>,
) -> Result<BTreeMap<String, usize>> {
    let mut killed: BTreeMap<String, usize> = BTreeMap::new();
    // The pace, not a wait for something: the moments are to be random.
    let ended = |ms: u64| {
        let waited = client.recv_timeout(Duration::from_millis(ms));
        waited == Err(mpsc::RecvTimeoutError::Disconnected)
    };
    for _ in 0..kills {
        if ended(draws.below(BETWEEN_MS)) {
            break;
        }
        let down = draws.below(DOWN_MS);
        let victims = u64::try_from(fleet.hosts.len() + 1)?;
        match usize::try_from(draws.below(victims))?.checked_sub(1) {
            None => {
                fleet.cluster.server().kill();
                ended(down);
                fleet.cluster.start_server()?;
                *killed.entry("berthd".to_owned()).or_default() += 1;
            }
            Some(n) => {
                let host = &mut fleet.hosts[n];
                host.agent().kill();
                ended(down);
                host.start_agent()?;
                *killed.entry(format!("agent {}", host.name)).or_default() += 1;
            }
        }
    }
    Ok(killed)
}

/// What is listed is what the book says, each replica runs once and as it was applied last, and
/// nothing else of ours is left on any host.
fn settled(fleet: &Fleet, book: &BTreeMap<String, Entry>) -> Result<Vec<Seen>> {
    let listed = fleet.cluster.berth_json(&["ps"])?;
    let listed = listed.as_array().context("a list")?;
    let mut wanted = BTreeMap::from([("still", 2)]);
    for (name, entry) in book {
        if let Entry::Wanted { replicas, .. } = entry
            && *replicas > 0
        {
            wanted.insert(name, *replicas);
        }
    }
    let mut there: BTreeMap<&str, u64> = BTreeMap::new();
    for one in listed {
        ensure!(one["state"] == "ready", "{one}");
        *there.entry(one["deployment"].as_str().unwrap_or_default()).or_default() += 1;
    }
    if there != wanted {
        let all = fleet.cluster.berth_json(&["deployment", "list"])?;
        bail!("wanted {wanted:?}, listed {there:?}: {listed:#?}, {all:#}");
    }
    let ids: BTreeSet<&str> = listed.iter().filter_map(|r| r["containerId"].as_str()).collect();
    let mut running = Vec::new();
    for host in &fleet.hosts {
        for one in host.containers()? {
            ensure!(listed.iter().any(|r| r["uid"] == *one.replica), "left over: {one:?}");
            if one.running {
                ensure!(ids.contains(one.id.as_str()), "not listed: {one:?}");
                running.push(one);
            }
        }
    }
    ensure!(running.len() == ids.len() && ids.len() == listed.len(), "{running:?}, {ids:?}");
    is_marked(fleet, book)?;
    Ok(running)
}

/// The environment of each container is that of the last apply.
fn is_marked(fleet: &Fleet, book: &BTreeMap<String, Entry>) -> Result<()> {
    for host in &fleet.hosts {
        for one in host.running()? {
            let format = "{{range .Config.Env}}{{println .}}{{end}}";
            let env = host.docker(&["inspect", "--format", format, &one.id])?;
            let of = |key: &str| env.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
            let name = of("BERTH_DEPLOYMENT").context("a name")?;
            if let Some(Entry::Wanted { mark, .. }) = book.get(name) {
                ensure!(of("MARK") == Some(mark.to_string().as_str()), "{name}: {mark}, {env}");
            }
        }
    }
    Ok(())
}

/// What the engines say: nothing was done twice, and what runs now has never stopped.
fn judge(fleet: &Fleet, running: &[Seen]) -> Result<usize> {
    let mut count = 0;
    for host in &fleet.hosts {
        let log = host.dir.join("events.log");
        let events = eventually("the engine has told of all that runs", PATIENCE, || {
            let events = events::read(&log)?;
            for one in host.running()? {
                let begun = |e: &events::Event| e.action == "start" && e.container == one.id;
                ensure!(events.iter().any(begun), "{one:?}");
            }
            Ok(events)
        })?;
        events::nothing_twice(&events).with_context(|| host.name.clone())?;
        for event in events.iter().filter(|e| e.action == "die") {
            ensure!(running.iter().all(|r| r.replica != event.replica), "it ended: {event:?}");
        }
        count += events.iter().filter(|e| e.action == "start").count();
    }
    Ok(count)
}

#[test]
fn whoever_is_killed_whenever_nothing_acknowledged_is_lost_nothing_runs_twice_nothing_is_stopped() {
    if !can_make_hosts("chaos") {
        return;
    }
    let kills = number("BERTH_KILLS", 100);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let drawn = usize::try_from(now.as_millis() % 1_000_000).unwrap();
    let seed = number("BERTH_SEED", drawn);
    println!("BERTH_KILLS={kills} BERTH_SEED={seed}");
    let seed = u64::try_from(seed).unwrap();

    let mut fleet = Fleet::start(2).unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let _recording: Vec<_> = fleet.hosts.iter().map(|h| h.record_events().unwrap()).collect();
    let still = fleet.cluster.dir.path().join("still.yaml");
    std::fs::write(&still, manifest("still", 0, 2).replace("  env: {MARK: \"0\"}\n", "")).unwrap();
    let still = still.to_str().unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", still, "--timeout", "90s"]).unwrap();
    let before = fleet.settles_at("still", 2).unwrap();

    let mut client = Client {
        folder: fleet.cluster.dir.path().to_owned(),
        config: fleet.cluster.server_dir().join("admin.toml"),
        draws: Draws(seed),
        book: BTreeMap::new(),
        made: 0,
        mark: 0,
        acknowledged: 0,
        unknown: 0,
    };
    let begin = Instant::now();
    let enough = AtomicBool::new(false);
    let (alive, ended) = mpsc::channel::<()>();
    let (killed, client) = std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let _alive = alive;
            while !enough.load(Ordering::Relaxed) {
                client.turn()?;
            }
            client.compare()?;
            Ok::<_, anyhow::Error>(client)
        });
        let killed = kill_at_random(&mut fleet, kills, &mut Draws(!seed), &ended);
        enough.store(true, Ordering::Relaxed);
        (killed, working.join().unwrap())
    });
    let client = client.unwrap();
    let killed = killed.unwrap();
    let took = begin.elapsed().as_secs_f64();
    let settling = Instant::now();
    let running =
        eventually("all is as it was acknowledged", PATIENCE, || settled(&fleet, &client.book));
    let running = running.unwrap();
    let settled_s = settling.elapsed().as_secs_f64();
    for one in &before {
        assert!(running.contains(one), "{one:?} is not as it was: {running:?}");
    }
    let starts = judge(&fleet, &running).unwrap();
    println!(
        "{killed:?} killed in {took:.0} s; {} writes acknowledged, {} not answered; {starts} \
         containers started, {} run; settled after {settled_s:.1} s",
        client.acknowledged,
        client.unknown,
        running.len()
    );
    assert_eq!(killed.values().sum::<usize>(), kills);
}
