//! Transfers under seeded faults: what they cost, and that they end right.

use super::*;
use proptest::prelude::*;

/// A disk, a registry and a link, all of which fail now and then.
struct World {
    blobs: Vec<Blob>,
    seed: u64,
    /// One fault in so many chances; 0: none.
    one_in: u64,
    /// Durable: `Some(true)`: as it should be; `Some(false)`: changed since it came.
    durable: Vec<Vec<Option<bool>>>,
    kept: Vec<bool>,
    now: Mono,
    cap: Cap,
    moved: u64,
    interruptions: u64,
    ranges: bool,
    /// The source sends this blob wrongly.
    wrong: Option<usize>,
    asked_before_room: bool,
    read_past: bool,
    /// The most that was asked for at once.
    most_asked: u64,
}

impl World {
    fn new(sizes: &[u64], seed: u64, one_in: u64) -> Self {
        let blobs: Vec<Blob> = sizes
            .iter()
            .enumerate()
            .map(|(i, size)| Blob { digest: Digest::of(&[i as u8]), size_bytes: *size })
            .collect();
        Self {
            durable: sizes.iter().map(|s| vec![None; chunks(*s) as usize]).collect(),
            kept: vec![false; sizes.len()],
            blobs,
            seed,
            one_in,
            now: Mono(1),
            cap: Cap::default(),
            moved: 0,
            interruptions: 0,
            ranges: true,
            wrong: None,
            asked_before_room: false,
            read_past: false,
            most_asked: 0,
        }
    }

    fn draw(&mut self, of: u64) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(12_345);
        (self.seed >> 33) % of.max(1)
    }

    fn fault(&mut self) -> bool {
        let one_in = self.one_in;
        let hit = one_in > 0 && self.draw(one_in) == 0;
        self.interruptions += u64::from(hit);
        hit
    }

    /// Runs to the end, over as many lives of the process as it takes.
    fn run(&mut self) -> Result<(), Failure> {
        for life in 0..10_000 {
            if let Some(end) = self.live(life) {
                return end;
            }
        }
        panic!("it does not end");
    }

    /// One life of the process; `None`: it was killed.
    fn live(&mut self, life: u64) -> Option<Result<(), Failure>> {
        let mut machine = Transfer::new(self.blobs.clone(), life);
        let mut cap = self.cap.clone();
        let mut effects: Vec<Effect> = machine.step(self.now, Input::Begin, &mut cap);
        let mut room = false;
        for _ in 0..1_000_000 {
            let mut input = None;
            for effect in std::mem::take(&mut effects) {
                match effect {
                    Effect::Done => return Some(Ok(())),
                    Effect::Failed(why) => return Some(Err(why)),
                    Effect::Progress(p) => {
                        assert!(p.done_bytes <= p.total_bytes, "{p:?}");
                        continue;
                    }
                    Effect::Trouble { .. } | Effect::Close => continue,
                    Effect::Look(blob) => {
                        let good =
                            |(i, c): (usize, &Option<bool>)| (*c == Some(true)).then_some(i as u64);
                        input = Some(Input::Looked(if self.kept[blob] {
                            Held::Whole
                        } else {
                            Held::Chunks(
                                self.durable[blob].iter().enumerate().filter_map(good).collect(),
                            )
                        }));
                    }
                    Effect::Room(_) => {
                        room = true;
                        input = Some(Input::Room);
                    }
                    Effect::Open { from, to, .. } => {
                        self.asked_before_room |= !room;
                        self.most_asked = self.most_asked.max(to - from);
                        input = Some(if self.fault() {
                            Input::Broke("no connection".to_owned())
                        } else {
                            Input::Opened { from: if self.ranges { from } else { 0 } }
                        });
                    }
                    Effect::Read { blob, at, most, not_before, deadline } => {
                        self.now = self.now.max(not_before).plus_ms(1);
                        self.read_past |= at.is_some_and(|at| {
                            at + most > self.blobs[blob].size_bytes
                                || at / CHUNK_BYTES != (at + most - 1) / CHUNK_BYTES
                        });
                        input = Some(if self.fault() {
                            match self.draw(2) {
                                0 => Input::Broke("reset".to_owned()),
                                _ => {
                                    self.now = deadline;
                                    Input::Tick
                                }
                            }
                        } else {
                            let bytes = (1 + self.draw(2 << 20)).min(most);
                            self.moved += bytes;
                            Input::Received { bytes }
                        });
                    }
                    Effect::Persist { blob, chunk } => {
                        // A disk that changes a byte later on.
                        let rots = self.one_in > 0 && self.draw(self.one_in * 8) == 0;
                        self.interruptions += u64::from(rots);
                        self.durable[blob][chunk as usize] = Some(!rots);
                        input = Some(Input::Persisted);
                    }
                    Effect::Verify(blob) => {
                        let good = self.wrong != Some(blob)
                            && self.durable[blob].iter().all(|c| *c == Some(true));
                        input = Some(Input::Verified { good });
                    }
                    Effect::Keep(blob) => {
                        assert!(self.durable[blob].iter().all(|c| *c == Some(true)));
                        self.kept[blob] = true;
                        input = Some(Input::Kept);
                    }
                    Effect::Discard(blob) => {
                        self.durable[blob].fill(None);
                        input = Some(Input::Discarded);
                    }
                    Effect::Wait(until) => {
                        self.now = until;
                        input = Some(Input::Tick);
                    }
                }
            }
            let input = input.expect("a machine that is not over waits for something");
            // A kill loses whatever was not durable.
            if matches!(input, Input::Received { .. }) && self.one_in > 0 {
                let one_in = self.one_in * 4;
                if self.draw(one_in) == 0 {
                    self.interruptions += 1;
                    return None;
                }
            }
            effects = machine.step(self.now, input, &mut cap);
        }
        panic!("one life does not end");
    }
}

fn sizes() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(0..60 * CHUNK_BYTES, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn interruptions_cost_a_chunk_each_and_the_result_verifies(
        sizes in sizes(), seed: u64, one_in in 3_u64..200,
    ) {
        let mut world = World::new(&sizes, seed, one_in);
        prop_assert_eq!(world.run(), Ok(()));
        prop_assert!(world.kept.iter().all(|k| *k));
        let size: u64 = sizes.iter().sum();
        let most = size + size / 50 + world.interruptions * CHUNK_BYTES;
        prop_assert!(world.moved <= most, "{} of {size} after {}", world.moved, world.interruptions);
        prop_assert!(!world.asked_before_room && !world.read_past);
    }

    #[test]
    fn an_undisturbed_transfer_moves_each_byte_once(sizes in sizes(), seed: u64) {
        let mut world = World::new(&sizes, seed, 0);
        prop_assert_eq!(world.run(), Ok(()));
        prop_assert_eq!(world.moved, sizes.iter().sum::<u64>());
    }

    #[test]
    fn a_registry_without_ranges_serves_as_well(seed: u64, one_in in 20_u64..200) {
        let mut world = World::new(&[10 * CHUNK_BYTES + 7], seed, one_in);
        world.ranges = false;
        prop_assert_eq!(world.run(), Ok(()));
    }

    #[test]
    fn under_a_cap_no_more_is_asked_for_at_once_than_half_a_seconds_worth(
        rate in 100_000_u64..20_000_000, seed: u64, one_in in 20_u64..200,
    ) {
        let mut world = World::new(&[3 * CHUNK_BYTES + 7, 9, 2 * CHUNK_BYTES], seed, one_in);
        world.cap = Cap::new(NonZeroU64::new(rate));
        prop_assert_eq!(world.run(), Ok(()));
        prop_assert!(world.most_asked <= (rate / 2).max(64 * 1024), "{}", world.most_asked);
        prop_assert!(!world.read_past);
    }

    #[test]
    fn a_cap_is_kept_over_any_pieces(
        rate in 1_u64..10_000_000, pieces in prop::collection::vec(1_u64..100_000, 1..50),
    ) {
        let mut cap = Cap::new(NonZeroU64::new(rate));
        let (mut now, mut moved) = (Mono(5), 0_u64);
        for piece in pieces {
            let piece = cap.most(piece);
            moved += piece;
            now = cap.take(now, piece);
            // Paid for, but for what a burst may run ahead and the rounding of each piece.
            let paid = rate.saturating_mul(now.0 - 5) / 1_000;
            prop_assert!(moved <= paid + rate * BURST_US / 1_000_000 + rate / 1_000 + 51);
        }
    }
}

#[test]
fn a_source_that_is_wrong_is_told_after_all_else_was_kept() {
    let mut world = World::new(&[CHUNK_BYTES, 3 * CHUNK_BYTES], 1, 0);
    world.wrong = Some(1);
    assert_eq!(world.run(), Err(Failure::Wrong(Digest::of(&[1]))));
    assert_eq!(world.kept, [true, false]);
    assert!(world.durable[1].iter().all(Option::is_none));
}

#[test]
fn one_rotten_chunk_costs_one_chunk() {
    let mut world = World::new(&[10 * CHUNK_BYTES], 1, 0);
    world.durable[0] = vec![Some(true); 10];
    world.durable[0][4] = Some(false);
    assert_eq!(world.run(), Ok(()));
    assert_eq!(world.moved, CHUNK_BYTES);
}

#[test]
fn no_byte_is_asked_for_without_room() {
    let blob = Blob { digest: Digest::of(b"x"), size_bytes: 9 };
    let (mut machine, mut cap) = (Transfer::new(vec![blob], 0), Cap::default());
    let now = Mono(1);
    assert_eq!(machine.step(now, Input::Begin, &mut cap), [Effect::Look(0)]);
    let nothing = Input::Looked(Held::Chunks(BTreeSet::new()));
    assert_eq!(machine.step(now, nothing, &mut cap), [Effect::Room(9)]);
    let full = Input::NoRoom { need_bytes: 9, free_bytes: 3 };
    let why = Failure::NoRoom { need_bytes: 9, free_bytes: 3 };
    assert_eq!(machine.step(now, full, &mut cap), [Effect::Close, Effect::Failed(why)]);
}

#[test]
fn pauses_grow_to_a_minute_and_never_end() {
    let blob = Blob { digest: Digest::of(b"x"), size_bytes: 9 };
    let (mut machine, mut cap) = (Transfer::new(vec![blob], 7), Cap::default());
    let mut now = Mono(1);
    machine.step(now, Input::Begin, &mut cap);
    machine.step(now, Input::Looked(Held::Chunks(BTreeSet::new())), &mut cap);
    machine.step(now, Input::Room, &mut cap);
    let mut last = 0;
    for _ in 0..500 {
        let effects = machine.step(now, Input::Broke("no".to_owned()), &mut cap);
        let Some(Effect::Wait(until)) = effects.last() else { panic!("{effects:?}") };
        last = until.since_ms(now);
        assert!((250..=60_000).contains(&last), "{last}");
        now = *until;
        machine.step(now, Input::Tick, &mut cap);
    }
    assert!(last >= 30_000);
}

#[test]
fn under_a_cap_a_registry_without_ranges_sends_no_more_than_the_first_two_parts_again() {
    let mut world = World::new(&[10 * CHUNK_BYTES], 1, 0);
    world.ranges = false;
    world.cap = Cap::new(NonZeroU64::new(CHUNK_BYTES));
    assert_eq!(world.run(), Ok(()));
    let (first, second) = (CHUNK_BYTES / 2, CHUNK_BYTES);
    assert_eq!(world.moved, 10 * CHUNK_BYTES + first + second);
}

#[test]
fn a_cap_is_kept_over_many_small_blobs() {
    let mut world = World::new(&[100_000; 50], 1, 0);
    world.cap = Cap::new(NonZeroU64::new(1_000_000));
    assert_eq!(world.run(), Ok(()));
    // Five seconds' worth, but for a burst and the last piece.
    assert!(world.now >= Mono(4_500), "{:?}", world.now);
}
