//! Power cuts and full disks under write load, for each store of the server: nothing acknowledged is
//! lost, nothing half written is taken for whole, and every start succeeds by itself.
//!
//! The store is on an ext4 file system of its own in a loop-mounted file. In the middle of the load
//! that is shut down, the process under load is killed, the file system is mounted again, and what it
//! holds is held against what was acknowledged. Needs root and loop devices; says so when it is
//! skipped. `BERTH_POWER_CUTS` is how many.

mod ledger;
mod registry;

/// The test that takes a part.
const TAKER: &str = "the_child_takes_its_part";

/// Not a test: what the processes under load run. Without a part it has nothing to do.
#[test]
fn the_child_takes_its_part() {
    let Some(part) = berth_test_disk::part() else { return };
    match part.name.as_str() {
        "ledger" => ledger::write(&part.folder),
        "ledger's reader" => ledger::read(&part.folder),
        "registry" => registry::push(&part),
        other => panic!("nobody has told what {other} does"),
    }
}
