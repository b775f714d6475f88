//! The ledger: what it must hold is worked out from the numbers alone, because a batch is a function of
//! its revision.
//!
//! Every seventh time sled's own files are damaged besides, as a disk may; every eleventh time they
//! are gone. 200 power cuts by default.
#![expect(clippy::unwrap_used, reason = "a test's helpers")]

use crate::TAKER;
use berth_proto::ids::Revision;
use berth_server::store::embedded::Embedded;
use berth_server::store::{Store as _, StoreError};
use berth_server_core::batching::Batch;
use berth_test_disk::{Disk, Load, Part, acknowledge, cuts, is_carried_into_a_namespace, mixed};
use std::collections::BTreeMap;
use std::path::Path;

/// Keys in turn: small enough that most writes replace.
const KEYS: u64 = 400;

/// What is written at a revision: up to four keys, values of up to 9 kB, now and then a removal.
fn batch(revision: u64) -> Batch {
    let ops = (0..1 + mixed(revision) % 4).map(|i| {
        let drawn = mixed(revision * 7 + i);
        let key = format!("key/{:04}", drawn % KEYS).into_bytes();
        let length = usize::try_from((drawn >> 20) % 9_000).unwrap();
        let byte = u8::try_from((drawn >> 40) % 256).unwrap();
        let value = if drawn.is_multiple_of(13) { None } else { Some(vec![byte; length]) };
        (key, value)
    });
    Batch { revision: Revision(revision), ops: ops.collect() }
}

type Held = BTreeMap<Vec<u8>, Vec<u8>>;

fn take(held: &mut Held, revision: u64) {
    for (key, value) in batch(revision).ops {
        match value {
            Some(value) => held.insert(key, value),
            None => held.remove(&key),
        };
    }
}

fn sum<'a>(held: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> u32 {
    held.fold(0, |sum, (key, value)| crc32c::crc32c_append(crc32c::crc32c_append(sum, key), value))
}

/// The writer: groups of batches without end, each acknowledged on standard output.
pub(crate) fn write(folder: &Path) {
    let (mut store, _) = Embedded::open(folder).unwrap();
    loop {
        let next = store.revision().0 + 1;
        let group: Vec<Batch> = (next..=next + mixed(next) % 8).map(batch).collect();
        // The file system under it goes: that ends the load.
        if store.commit(&group).is_err() {
            return;
        }
        acknowledge(store.revision()).unwrap();
        // As when the ledger is quiet for a moment.
        if next.is_multiple_of(97) && store.checkpoint().is_err() {
            return;
        }
    }
}

/// The reader: opens the store and says what it holds.
pub(crate) fn read(folder: &Path) {
    let (store, opened) = Embedded::open(folder).unwrap();
    let all = store.load(b"").unwrap();
    let sum = sum(all.iter().map(|e| (&e.key[..], &e.value[..])));
    println!("holds {} {} {sum}", store.revision(), all.len());
    println!("rebuilt {} fell-back {}", opened.rebuilt.is_some(), opened.fell_back.is_some());
}

fn damage(sled: &Path, cut: u64) {
    if cut.is_multiple_of(11) {
        std::fs::remove_dir_all(sled).unwrap();
    } else if cut.is_multiple_of(7) {
        let file = sled.join("db");
        let mut bytes = std::fs::read(&file).unwrap();
        let (from, to) = (bytes.len() / 3, bytes.len() / 2);
        for byte in &mut bytes[from..to] {
            *byte ^= 0x5a;
        }
        std::fs::write(&file, bytes).unwrap();
    }
}

#[test]
fn no_acknowledged_write_is_lost_by_power_cuts_and_every_start_succeeds() {
    const TEST: &str =
        "ledger::no_acknowledged_write_is_lost_by_power_cuts_and_every_start_succeeds";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 1024) else { return };
    let cuts = cuts(200);
    let folder = disk.path().join("ledger");
    let (mut held, mut known) = (Held::new(), 0_u64);
    let (mut acknowledged, mut rebuilt) = (0_u64, 0);
    for cut in 1..=cuts {
        let mut load = Load::start(&Part::new("ledger", &folder), TAKER).unwrap();
        let said = load.wait_for(1 + mixed(cut) % 60).unwrap();
        // What it had said before counts as well.
        let rest = load.cut_power(&disk).unwrap();
        for revision in said.into_iter().chain(rest) {
            acknowledged = revision.parse().unwrap();
        }
        damage(&folder.join("sled"), cut);

        let reader = Part::new("ledger's reader", &folder);
        let read = reader.command(TAKER).unwrap().output().unwrap();
        let text = String::from_utf8_lossy(&read.stdout).into_owned();
        let said = String::from_utf8_lossy(&read.stderr);
        assert!(read.status.success(), "cut {cut}: the start failed: {text}{said}");
        let line = text.lines().find_map(|l| l.strip_prefix("holds ")).unwrap();
        let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
        let revision = numbers[0];
        assert!(revision >= acknowledged, "cut {cut}: {acknowledged} was acknowledged, {line}");
        for later in known + 1..=revision {
            take(&mut held, later);
        }
        known = revision;
        assert_eq!(numbers[1], held.len() as u64, "cut {cut}: {line}");
        let expected = sum(held.iter().map(|(k, v)| (&k[..], &v[..])));
        assert_eq!(numbers[2], u64::from(expected), "cut {cut}: {line}");
        assert!(text.contains("fell-back false"), "cut {cut}: {text}");
        rebuilt += u32::from(text.contains("rebuilt true"));
    }
    println!(
        "{cuts} power cuts, {known} batches, {rebuilt} times sled was made anew, nothing lost"
    );
    // One damage alone may be where nobody reads.
    assert!(cuts < 11 || rebuilt > 0, "damage was never noticed");
}

/// Whether a store holds exactly this.
fn holds(store: &Embedded, held: &Held) -> bool {
    let all = store.load(b"").unwrap();
    all.iter().map(|e| (&e.key, &e.value)).eq(held.iter())
}

#[test]
fn a_disk_that_is_full_at_any_write_loses_nothing_and_the_store_goes_on_when_there_is_room() {
    const TEST: &str = "ledger::a_disk_that_is_full_at_any_write_loses_nothing_and_the_store_goes_on_when_there_is_room";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 64) else { return };
    let folder = disk.path().join("ledger");
    let (mut held, mut refused, mut without_sled) = (Held::new(), 0, 0);
    let mut store = Embedded::open(&folder).unwrap().0;
    for round in 0..12 {
        // So much is left, and whatever writes next finds the end: journal, sled or an export.
        disk.fill_but(mixed(round) % (3 << 20)).unwrap();
        let mut checkpoint = 1;
        loop {
            let next = batch(store.revision().0 + 1);
            let revision = next.revision.0;
            match store.commit(&[next]) {
                Ok(()) => take(&mut held, revision),
                Err(StoreError::Full) => break,
                Err(error) => panic!("round {round}: {error:?}"),
            }
            checkpoint += 1;
            if mixed(revision).is_multiple_of(151) {
                let made = store.checkpoint();
                assert!(matches!(made, Ok(()) | Err(StoreError::Full)), "round {round}: {made:?}");
            }
            assert!(checkpoint < 20_000, "round {round}: the disk never was full");
        }
        refused += 1;
        assert!(holds(&store, &held), "round {round}: on the full disk");
        // A start on the full disk finds all of it.
        drop(store);
        let (again, opened) = Embedded::open(&folder).unwrap();
        store = again;
        assert_eq!(opened.fell_back, None, "round {round}");
        without_sled += u32::from(opened.rebuilt.is_some());
        assert!(holds(&store, &held), "round {round}: after a start on the full disk");
        disk.free().unwrap();
        let next = batch(store.revision().0 + 1);
        let revision = next.revision.0;
        store.commit(&[next]).unwrap();
        take(&mut held, revision);
        // The two exports that the journal waits for.
        store.checkpoint().unwrap();
        store.checkpoint().unwrap();
        assert!(holds(&store, &held), "round {round}: with room again");
    }
    println!("{refused} times full, {without_sled} starts without sled, nothing lost");
}
