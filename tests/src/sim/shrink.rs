//! Makes a failing script short and tells it in plain words.

use super::script::{Script, ms};
use super::world::World;
use std::fmt;

/// Runs of a search for a shorter script at most.
const TRIES: usize = 2_000;
/// Lines of what happened that are shown.
const LINES: usize = 80;

/// A failing run, told.
#[derive(Debug)]
pub struct Story {
    script: Script,
    broken: String,
    told: Vec<(u64, String)>,
}

fn broken(script: &Script) -> Option<String> {
    super::play(script).broken
}

/// The kind of a finding: its words without names and numbers.
pub(super) fn kind(words: &str) -> String {
    let plain = |word: &&str| !word.chars().any(|c| c.is_ascii_digit());
    words.split_whitespace().filter(plain).collect::<Vec<_>>().join(" ")
}

/// The shortest story that breaks the same thing.
pub(super) fn story(script: &Script) -> Option<Story> {
    let mut best = script.clone();
    let wanted = kind(&broken(&best)?);
    let mut tries = 0;
    let mut same = |candidate: &Script| {
        tries += 1;
        tries <= TRIES && broken(candidate).is_some_and(|b| kind(&b) == wanted)
    };
    // Halves first, then ever smaller parts, then each alone until none can go.
    let mut part = best.actions.len().div_ceil(2).max(1);
    loop {
        let mut changed = false;
        let mut at = 0;
        while at < best.actions.len() {
            let mut candidate = best.clone();
            let end = (at + part).min(candidate.actions.len());
            candidate.actions.drain(at..end);
            if same(&candidate) {
                best = candidate;
                changed = true;
            } else {
                at += part;
            }
        }
        if part == 1 && !changed {
            break;
        }
        part = if part > 1 { part.div_ceil(2) } else { 1 };
        if part == 1 && !changed && best.actions.len() <= 1 {
            break;
        }
    }
    while best.machines.len() > 1 {
        let mut candidate = best.clone();
        candidate.machines.pop();
        if !same(&candidate) {
            break;
        }
        best = candidate;
    }
    for plain in [
        |s: &mut Script| s.wire = false,
        |s: &mut Script| s.small = false,
        |s: &mut Script| s.server_per_mille = 1000,
        |s: &mut Script| s.machines.iter_mut().for_each(|m| m.per_mille = 1000),
        |s: &mut Script| s.machines.iter_mut().for_each(|m| m.old = false),
        |s: &mut Script| s.machines.iter_mut().for_each(|m| m.approval = false),
        |s: &mut Script| s.machines.iter_mut().for_each(|m| m.capped = false),
    ] {
        let mut candidate = best.clone();
        plain(&mut candidate);
        if candidate != best && same(&candidate) {
            best = candidate;
        }
    }
    let mut world = World::new(&best);
    world.listen();
    let broken = super::catch(|| world.run()).err().or_else(|| world.broken.take())?;
    let told = world.told.take().unwrap_or_default();
    Some(Story { broken, told, script: best })
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.script.seed, self.broken)?;
        writeln!(f, "the fleet:")?;
        for (n, machine) in self.script.machines.iter().enumerate() {
            write!(f, "  h{n}: {} MiB, zone z{}", machine.memory_mib, machine.zone)?;
            if machine.per_mille != 1000 {
                write!(f, ", its clock runs at {} per mille", machine.per_mille)?;
            }
            if machine.old {
                f.write_str(", an agent that knows no models")?;
            }
            if machine.approval {
                f.write_str(", waits for approval")?;
            }
            if machine.gpu {
                f.write_str(", with a GPU")?;
            }
            if machine.foreign {
                f.write_str(", of another architecture")?;
            }
            if machine.capped {
                f.write_str(", with a cap on what it brings")?;
            }
            writeln!(f)?;
        }
        if self.script.small {
            writeln!(f, "  (pages, groups and what is done at once are small)")?;
        }
        writeln!(f, "the script, made as short as it still breaks:")?;
        for (at, action) in &self.script.actions {
            writeln!(f, "  at {}: {action}", ms(*at))?;
        }
        writeln!(f, "what happened:")?;
        let skip = self.told.len().saturating_sub(LINES);
        if skip > 0 {
            writeln!(f, "  ({skip} lines before)")?;
        }
        for (at, words) in &self.told[skip..] {
            writeln!(f, "  {at:>9} ms  {words}")?;
        }
        write!(f, "broken: {}", self.broken)
    }
}
