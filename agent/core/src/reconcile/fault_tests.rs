//! The machine under seeded faults of the engine, the disk and the agent itself.

use super::test_world::*;
use super::*;

/// Numbers from a seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).unwrap()
    }
}

fn check(w: &World, seed: u64) {
    for ((replica, attempt), count) in &w.starts {
        assert_eq!(*count, 1, "seed {seed}: attempt {attempt} of {replica} was started twice");
    }
    let running = w.running();
    let unique: BTreeSet<&str> = running.iter().copied().collect();
    assert_eq!(unique.len(), running.len(), "seed {seed}: one replica runs twice: {running:?}");
    let both = unique.contains("old") && unique.contains("new");
    assert!(!both, "seed {seed}: two run for one slot");
}

/// One run under faults: what the engine does, loses and forgets, when the agent dies before and
/// after a write, is drawn from the seed.
fn faults(seed: u64) {
    let mut draw = Draw(seed);
    let mut w = World::new();
    let sets = [
        vec![want("old"), want("a"), Want { checked: true, ..want("b") }],
        vec![replaced()[0].clone(), replaced()[1].clone(), want("a")],
        vec![Want { replaces: None, ..replaced()[1].clone() }, want("a"), want("c")],
    ];
    let mut given = 0;
    w.want(&sets[0]);
    for _ in 0..600 {
        match draw.below(40) {
            0..=15 if !w.asked.is_empty() => {
                let at = draw.below(w.asked.len());
                let effect = w.asked.remove(at);
                let luck = match draw.below(12) {
                    0 => Luck::Fails,
                    1 => Luck::LosesAnswer,
                    _ => Luck::Good,
                };
                w.carry_out(effect, luck);
            }
            16..=30 if !w.answers.is_empty() => {
                let at = draw.below(w.answers.len());
                let input = w.answers.remove(at);
                w.tell(input);
            }
            31..=33 => {
                let due = w.machine.deadline().map_or(0, |at| at.0);
                w.now = w.now.max(due.min(w.now + 30_000)) + draw.below(50) as u64;
                w.tell(Input::Tick);
            }
            34 => {
                let ids: Vec<String> = w.containers.keys().cloned().collect();
                if let Some(id) = ids.get(draw.below(ids.len().max(1))) {
                    let time = Wall(i64::try_from(w.now).unwrap());
                    let container = w.containers.get_mut(id).unwrap();
                    if container.state == State::Running {
                        let code = i32::try_from(draw.below(2)).unwrap();
                        container.state = State::Exited { code, out_of_memory: false, time };
                    }
                }
            }
            35 if draw.below(3) == 0 => {
                let ids: Vec<String> = w.containers.keys().cloned().collect();
                if let Some(id) = ids.get(draw.below(ids.len().max(1))) {
                    w.containers.remove(id);
                }
            }
            36 => w.up = draw.below(3) != 0,
            37 => {
                w.healthy = draw.below(3) != 0;
                w.registry_up = draw.below(4) != 0;
                w.disk_full = draw.below(6) == 0;
            }
            38 if draw.below(2) == 0 => {
                // The agent dies: each call on its way is done, or never was.
                for effect in std::mem::take(&mut w.asked) {
                    if draw.below(2) == 0 {
                        w.carry_out(effect, Luck::Good);
                    }
                }
                w.restart();
            }
            39 if draw.below(6) == 0 && given + 1 < sets.len() => {
                given += 1;
                let set = sets[given].clone();
                w.want(&set);
            }
            _ => w.tell(Input::Happened { urgent: draw.below(2) == 0 }),
        }
        check(&w, seed);
    }
    // Faults end: what is wanted runs, and nothing else is left of the rest.
    (w.up, w.healthy, w.registry_up, w.disk_full) = (true, true, true, false);
    while given + 1 < sets.len() {
        given += 1;
        let set = sets[given].clone();
        w.want(&set);
        w.run_for(300_000);
        check(&w, seed);
    }
    w.run_for(300_000);
    check(&w, seed);
    let mut running = w.running();
    running.sort_unstable();
    assert_eq!(running, ["a", "c", "new"], "seed {seed}: {:?}", w.reports);
    assert!(!w.containers.values().any(|c| ["old", "b"].contains(&c.replica.as_str())));
    for name in ["a", "c", "new"] {
        assert!(w.status(name).ready, "seed {seed}: {name}");
    }
}

#[test]
fn under_any_faults_nothing_is_started_twice_and_afterwards_all_is_as_wanted() {
    for seed in 0..400 {
        faults(seed);
    }
}
