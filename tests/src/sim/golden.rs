//! Golden stories: what happens, and what must be planned, as text files in `tests/stories`.
//!
//! Above the line of dashes: a machine or an action on each line. Below it: what the end must be.
//! `UPDATE=1` writes the end anew.

use super::script::{Action, Again, Machine, Moment, Program, Script, Spec};
use super::world::World;
use std::fmt::Write as _;
use std::path::Path;

const LINE: &str = "----";

fn number(words: &[&str], name: &str) -> Option<u64> {
    words.iter().find_map(|w| w.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

fn spec(words: &[&str]) -> Spec {
    let program = match words {
        w if w.contains(&"slow") => Program::Slow,
        w if w.contains(&"deaf") => Program::Deaf,
        w if w.contains(&"crashes") => Program::Crashes,
        w if w.contains(&"no-image") => Program::NoImage,
        _ => Program::Good,
    };
    let get = |name, other| number(words, name).unwrap_or(other);
    let small = |value: u64| u32::try_from(value).unwrap();
    Spec {
        program,
        version: u8::try_from(get("version", 0)).unwrap(),
        replicas: (!words.contains(&"every-host")).then(|| small(get("replicas", 1))),
        memory_mib: get("memory", 64),
        cpu_millis: 100,
        gpu: false,
        spread: false,
        again: Again::Always,
        surge: small(get("surge", 1)),
        unavailable: small(get("unavailable", 0)),
        checked: program == Program::Deaf,
        host_port: words.contains(&"host-port"),
        zone: number(words, "zone").map(|zone| u8::try_from(zone).unwrap()),
        artifact: words.contains(&"model"),
        pause: words.contains(&"pause"),
        keep_lost: words.contains(&"keep"),
        ready_for_ms: get("ready", 500),
        deadline_ms: get("deadline", 20_000),
        lost_after_ms: get("lost", 5_000),
    }
}

fn action(words: &[&str]) -> Action {
    let n = |at: usize| words[at][1..].parse::<u8>().unwrap();
    let ms = |name| number(words, name).unwrap_or(1_000);
    match words[0] {
        "apply" => Action::Apply { deployment: n(1), spec: spec(words) },
        "scale" => {
            let replicas = u32::try_from(number(words, "replicas").unwrap()).unwrap();
            Action::Scale { deployment: n(1), replicas }
        }
        "delete" => Action::Delete { deployment: n(1) },
        "undo" => Action::Undo { deployment: n(1) },
        "drain" => Action::Drain { host: n(1), on: true },
        "cordon" => Action::Cordon { host: n(1), on: true },
        "remove" => Action::Remove { host: n(1), wipe: words.contains(&"wipe") },
        "backup" => Action::Backup,
        "restore" => Action::Restore { down_ms: ms("for") },
        "kill-server" => Action::KillServer { when: Moment::Now, down_ms: ms("for") },
        "kill-agent" => Action::KillAgent { host: n(1), when: Moment::Now, down_ms: ms("for") },
        "partition" => Action::Partition { host: n(1), up: true, down: true, for_ms: ms("for") },
        "clone" => Action::CloneDisk { host: n(1) },
        "engine-away" => Action::EngineAway { host: n(1), for_ms: ms("for") },
        "disk-full" => Action::AgentDiskFull { host: n(1), for_ms: ms("for") },
        other => panic!("{other} is no action"),
    }
}

fn script(text: &str) -> Script {
    let mut script = Script {
        seed: 1,
        machines: Vec::new(),
        actions: Vec::new(),
        ping_ms: 10_000,
        server_per_mille: 1000,
        wire: true,
        small: false,
    };
    for line in text.lines().take_while(|line| *line != LINE) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] | ["#", ..] => {}
            ["machine", rest @ ..] => script.machines.push(Machine {
                memory_mib: number(rest, "memory").unwrap_or(1_000),
                zone: u8::try_from(number(rest, "zone").unwrap_or(0)).unwrap(),
                per_mille: 1000,
                old: rest.contains(&"old"),
                approval: false,
                gpu: false,
                foreign: false,
                capped: false,
            }),
            ["at", at, rest @ ..] => script.actions.push((at.parse().unwrap(), action(rest))),
            _ => panic!("{line} is neither a machine nor an action"),
        }
    }
    script
}

fn end(script: &Script) -> String {
    let mut world = World::new(script);
    world.run();
    let mut text = String::new();
    let Some(process) = &world.server.process else { return "the server is down".into() };
    assert_eq!(world.broken, None);
    let view = process.machine.durable();
    for d in view.deployments() {
        writeln!(text, "{} {:?} release {}", d.name, d.rollout(), d.release()).unwrap();
        let mut places: Vec<String> = view
            .replicas_of(&d.uid)
            .map(|r| {
                format!("  slot {} release {} on {} {:?}", r.slot, r.release, r.host, r.intent)
            })
            .collect();
        places.sort();
        for place in places {
            writeln!(text, "{place}").unwrap();
        }
        for why in process.planner.reports.get(&d.uid).iter().flat_map(|r| r.pending.keys()) {
            writeln!(text, "  waits: {why}").unwrap();
        }
    }
    text
}

#[test]
fn every_story_ends_as_it_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stories");
    let mut stories = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (story, wanted) = text.split_once(&format!("{LINE}\n")).unwrap_or((&text, ""));
        let found = end(&script(story));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, format!("{story}{LINE}\n{found}")).unwrap();
        } else {
            assert_eq!(found, wanted, "{}", path.display());
        }
        stories += 1;
    }
    assert!(stories >= 8, "{stories} stories");
}
