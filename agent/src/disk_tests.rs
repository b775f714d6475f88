//! The agent's own files under power cuts and on a full disk: what was durable stays, what was under
//! way is there whole or not at all, and every start succeeds by itself.
//!
//! What is written is a sequence of steps, each a function of its number, so that what must be there
//! after any of them is known. Needs root and loop devices; says so when it is skipped.
//! `BERTH_POWER_CUTS` is how many (20 by default).

use crate::fetch;
use crate::state::Shared;
use crate::store::{self, Store, StoreError};
use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::{self, Wanted};
use berth_proto::agent::SetEntry;
use berth_proto::ids::{Digest, Epoch, Generation, Mono, ReplicaUid, SetNumber};
use berth_proto::record::{AgentIdentityFile, AgentJoinFile, AgentSetFile};
use berth_proto::sets::set_digest;
use berth_proto::values::HostPolicy;
use berth_test_disk::{Disk, Load, Part, acknowledge, cuts, is_carried_into_a_namespace, mixed};
use prost::Message as _;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The test that takes a part.
pub(crate) const TAKER: &str = "disk_tests::the_child_takes_its_part";
/// Kinds of steps: the set, what is remembered, the identity, the join.
const KINDS: u64 = 4;

/// Not a test: what the processes under load run. Without a part it has nothing to do.
#[test]
fn the_child_takes_its_part() {
    let Some(part) = berth_test_disk::part() else { return };
    match part.name.as_str() {
        "files" => write(&part),
        "models" => fetch::disk_tests::bring(&part),
        other => panic!("nobody has told what {other} does"),
    }
}

/// Text of up to so many bytes.
fn text(number: u64, most: u64) -> String {
    let length = usize::try_from(mixed(number) % most).unwrap();
    char::from(b'a' + u8::try_from(number % 26).unwrap()).to_string().repeat(length)
}

/// The set of a step; none before the first.
fn wanted(number: Option<u64>) -> Wanted {
    let Some(number) = number else { return Wanted::NotYetKnown };
    let (mut entries, mut bodies) = (Vec::new(), BTreeMap::new());
    for place in 0..mixed(number) % 5 {
        let mut body = fetch::testing::body(&Digest::of(b"manifest"));
        body.system_env.insert("TEXT".to_owned(), text(number + place, 30_000));
        let bytes = body.encode_to_vec();
        let replica_uid = format!("r{place}");
        let body_digest = Digest::of(&bytes).to_string();
        entries.push(SetEntry { replica_uid, body_digest, ..SetEntry::default() });
        bodies.insert(Digest::of(&bytes), bytes);
    }
    let id = SetNumber { epoch: Epoch(1), generation: Generation(number) };
    let digest = set_digest(&entries).to_string();
    let set = ledger::build(id, digest, entries, bodies, &Wanted::NotYetKnown).unwrap();
    Wanted::Set(Arc::new(set))
}

/// What is remembered at a step.
fn memory(number: Option<u64>) -> BTreeMap<ReplicaUid, Memory> {
    let Some(number) = number else { return BTreeMap::new() };
    let one = |place: u64| {
        let attempt = u32::try_from(number).unwrap();
        let not_before = Some(Mono(number + place));
        let memory = Memory { attempt, not_before, must_restart: true, ..Memory::default() };
        (format!("r{place}").parse().unwrap(), memory)
    };
    (0..mixed(number) % 300).map(one).collect()
}

fn identity(number: Option<u64>) -> AgentIdentityFile {
    AgentIdentityFile {
        cluster: "c".to_owned(),
        certificate_pem: number.map(|number| text(number, 20_000)).unwrap_or_default(),
        registry: format!("{number:?}"),
        ..AgentIdentityFile::default()
    }
}

/// Every second time there is none.
fn joining(number: Option<u64>) -> Option<AgentJoinFile> {
    let number = number.filter(|number| (number / KINDS).is_multiple_of(2))?;
    Some(AgentJoinFile { key_pem: text(number, 9_000), ..AgentJoinFile::default() })
}

fn go(shared: &Shared, number: u64) -> Result<(), StoreError> {
    match number % KINDS {
        0 => shared.persist(&wanted(Some(number))),
        1 => shared.remember(memory(Some(number))),
        2 => shared.change_identity(|held| *held = identity(Some(number))).map(drop),
        _ => match joining(Some(number)) {
            Some(joining) => shared.store.put_joining(&joining),
            None => shared.store.forget_joining(),
        },
    }
}

fn open(folder: &Path) -> Result<Shared, StoreError> {
    Shared::open(Store::open(folder)?, HostPolicy::default())
}

/// Whoever has joined and wants nothing yet.
fn join(folder: &Path) {
    Store::open(folder).unwrap().put_identity(&identity(None)).unwrap();
}

/// The load: one step after the other, each acknowledged; before them the number of the start.
fn write(part: &Part) {
    let shared = open(&part.folder).unwrap();
    acknowledge(format!("start {}", shared.agent_start)).unwrap();
    for number in part.from.. {
        // The file system under it goes: that ends the load.
        if go(&shared, number).is_err() {
            return;
        }
        acknowledge(number).unwrap();
    }
}

/// Everything that is on the disk, but for the number of the start and its time.
type Files = (AgentSetFile, AgentIdentityFile, Option<AgentJoinFile>);

/// What must be there after so many steps.
fn expected(steps: u64) -> Files {
    let last = |kind: u64| (0..steps).rev().find(|number| number % KINDS == kind);
    let set = store::to_file(&"c".parse().unwrap(), &wanted(last(0)), &memory(last(1)), 0, 0);
    (set, identity(last(2)), joining(last(3)))
}

fn held(folder: &Path) -> Files {
    let store = Store::peek(folder);
    let set = store.set_of("c").unwrap();
    store::from_file(&set).unwrap();
    let set = AgentSetFile { agent_start: 0, last_seen_unix_ms: 0, cluster: "c".into(), ..set };
    (set, store.identity().unwrap(), store.joining().unwrap())
}

#[test]
fn nothing_the_agent_made_durable_is_lost_by_power_cuts_and_every_start_succeeds() {
    const TEST: &str =
        "disk_tests::nothing_the_agent_made_durable_is_lost_by_power_cuts_and_every_start_succeeds";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 64) else { return };
    let folder = disk.path().join("agent");
    join(&folder);
    let cuts = cuts(20);
    let (mut next, mut start, mut under_way) = (0, 0, 0);
    for cut in 1..=cuts {
        let mut load = Load::start(&Part::new("files", &folder).from(next), TAKER).unwrap();
        let mut said = load.wait_for(1 + mixed(cut) % 60).unwrap();
        said.extend(load.cut_power(&disk).unwrap());
        for line in said {
            if let Some(number) = line.strip_prefix("start ") {
                let number = number.parse().unwrap();
                assert!(number > start, "cut {cut}: start {number} comes again");
                start = number;
            } else {
                assert_eq!(line, next.to_string(), "cut {cut}");
                next += 1;
            }
        }
        let held = held(&folder);
        if held != expected(next) {
            // What was under way may be there, and then whole.
            assert!(held == expected(next + 1), "cut {cut}, in step {next}");
            under_way += 1;
        }
        let shared = open(&folder).unwrap();
        assert!(shared.agent_start > start, "cut {cut}: {} comes again", shared.agent_start);
        start = shared.agent_start;
    }
    println!("{cuts} power cuts, {next} steps, {under_way} under way kept, nothing lost");
}

/// Whether a full disk is why.
fn is_full(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. }
        if source.kind() == std::io::ErrorKind::StorageFull)
}

#[test]
fn an_agent_whose_disk_is_full_at_any_write_loses_nothing_and_goes_on_when_there_is_room() {
    const TEST: &str = "disk_tests::an_agent_whose_disk_is_full_at_any_write_loses_nothing_and_goes_on_when_there_is_room";
    if is_carried_into_a_namespace(TEST) {
        return;
    }
    let Some(disk) = Disk::new(TEST, 16) else { return };
    let folder = disk.path().join("agent");
    join(&folder);
    let mut shared = open(&folder).unwrap();
    let (mut next, mut refused_starts) = (0, 0);
    for round in 0..40 {
        // So much is left, and whatever writes next finds the end.
        while next % KINDS != round % KINDS {
            go(&shared, next).unwrap();
            next += 1;
        }
        disk.fill_but(mixed(round) % 60_000 / (1 + round % 8)).unwrap();
        let refused = loop {
            match go(&shared, next) {
                Ok(()) => next += 1,
                Err(error) => break error,
            }
        };
        let when = format!("round {round}, in step {next}");
        assert!(is_full(&refused), "{when}: {refused:?}");
        assert!(held(&folder) == expected(next), "{when}");
        if round % 2 == 0 {
            // A start counts itself, durably. Where even that has no room it is tried again.
            let start = shared.agent_start;
            drop(shared);
            shared = match open(&folder) {
                Ok(shared) => shared,
                Err(error) => {
                    assert!(is_full(&error), "{when}: {error:?}");
                    refused_starts += 1;
                    assert!(held(&folder) == expected(next), "{when}");
                    disk.free().unwrap();
                    let shared = open(&folder).unwrap();
                    disk.fill().unwrap();
                    shared
                }
            };
            assert!(shared.agent_start > start, "{when}");
            assert!(held(&folder) == expected(next), "{when}");
        }
        disk.free().unwrap();
        for _ in 0..KINDS {
            go(&shared, next).expect(&when);
            next += 1;
        }
        assert!(held(&folder) == expected(next), "{when}");
    }
    println!("40 times full, {refused_starts} starts waited for room, {next} steps, nothing lost");
}
