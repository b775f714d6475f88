//! One replica that takes another's place, by scenario.

use super::test_world::*;
use super::*;

#[test]
fn the_bytes_are_here_before_the_predecessor_is_stopped() {
    let mut w = World::new();
    w.want(&[want("old")]);
    w.run_for(100);
    w.registry_up = false;
    w.want(&replaced());
    w.run_for(3_600_000);
    assert_eq!((w.running(), w.status("new").reason.as_str()), (vec!["old"], "PULL_FAILED"));
    w.registry_up = true;
    w.run_for(61_000);
    assert_eq!(w.running(), ["new"]);
    assert_eq!(w.status("old").reason, "REPLACED");
}

#[test]
fn a_replacement_has_all_of_its_time_after_a_disk_that_took_nothing() {
    let mut w = World::new();
    w.want(&[want("old")]);
    w.run_for(100);
    w.disk_full = true;
    w.healthy = false;
    w.want(&replaced());
    w.run_for(200_000);
    assert_eq!(w.running(), ["old"]);
    w.disk_full = false;
    let mut waited = 0;
    while w.running() == ["old"] {
        w.run_for(100);
        waited += 100;
        assert!(waited <= MAX_RETRY_MS, "the disk takes it and nothing is done");
    }
    w.run_for(WITHIN_MS - 2_000);
    assert_eq!(w.running(), ["new"], "it has its time");
    w.healthy = true;
    w.run_for(2_000);
    assert!(w.running() == ["new"] && w.status("new").ready);
}

#[test]
fn a_replacement_is_not_given_up_untried_for_a_disk_that_takes_nothing() {
    // The disk is full from some moment of the exchange on: whatever was durable by then.
    for moment in (0..400).step_by(10) {
        let mut w = World::new();
        w.want(&[want("old")]);
        w.run_for(100);
        w.want(&replaced());
        w.run_for(moment);
        w.disk_full = true;
        w.run_for(200_000);
        w.disk_full = false;
        w.run_for(200_000);
        assert_eq!(w.running(), ["new"], "full after {moment} ms");
        assert!(w.status("new").ready, "full after {moment} ms");
    }
}

#[test]
fn a_replacement_that_is_not_ready_in_time_gives_the_place_back_with_no_server() {
    for never in [false, true] {
        for restart in [false, true] {
            let mut w = World::new();
            let old = Want { never, ..want("old") };
            w.want(std::slice::from_ref(&old));
            w.run_for(100);
            w.healthy = false;
            w.want(&[old, replaced()[1].clone()]);
            w.run_for(5_000);
            assert_eq!(w.running(), ["new"]);
            if restart {
                // The server is gone, the registry as well, and the agent starts anew.
                w.registry_up = true;
                w.restart();
            }
            w.run_for(WITHIN_MS - 6_000);
            assert!(!w.running().contains(&"old"), "it has its time");
            // Each restart adds at most the pause between two writes.
            w.run_for(if restart { 2_000 + COUNT_DOWN_MS } else { 2_000 });
            assert_eq!(w.running(), ["old"], "never {never} restart {restart}");
            assert_eq!(w.status("new").reason, "REPLACEMENT_FAILED");
            w.restart();
            w.run_for(600_000);
            assert_eq!(w.running(), ["old"]);
        }
    }
}
