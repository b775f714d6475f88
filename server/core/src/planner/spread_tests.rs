//! Claims about where replicas are once releases have followed each other.

use super::*;
use crate::live::Unheard;
use crate::miniature::World;
use berth_proto::api::{self, RolloutState};

/// Replicas on each of so many hosts, after releases one, two and three.
fn after_rollouts(hosts: u32, replicas: u32, spread: &str, surge: (u32, u32)) -> Vec<usize> {
    let mut w = World::new(hosts);
    for image in ["one", "two", "three"] {
        let mut spec = World::spec(image);
        spec.replicas = Some(replicas);
        spec.placement = Some(api::Placement { require: vec![], spread: spread.to_owned() });
        let rollout = spec.rollout.get_or_insert_default();
        (rollout.max_surge, rollout.max_unavailable) = (Some(surge.0), Some(surge.1));
        w.apply(spec);
        w.settle();
        assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    }
    let on = |n| w.running.values().filter(|(host, ..)| host.as_str() == format!("h{n}")).count();
    (0..hosts).map(on).collect()
}

#[test]
fn a_rolling_update_leaves_replicas_as_spread_as_they_were() {
    for (hosts, replicas) in [(2, 2), (3, 3), (4, 3), (3, 6), (5, 7)] {
        for surge in [(1, 0), (0, 1), (1, 1), (2, 0), (3, 2)] {
            let on = after_rollouts(hosts, replicas, "", surge);
            let (most, least) = (on.iter().max().unwrap(), on.iter().min().unwrap());
            assert!(most - least <= 1, "{hosts} hosts, {replicas} replicas, {surge:?}: {on:?}");
        }
    }
}

#[test]
fn a_rolling_update_leaves_zones_as_even_as_they_were() {
    for surge in [(1, 0), (0, 1), (2, 1)] {
        // Zone a holds the hosts with even numbers, b the others.
        let on = after_rollouts(4, 2, "zone", surge);
        assert_eq!((on[0] + on[2], on[1] + on[3]), (1, 1), "{surge:?}: {on:?}");
    }
}

#[test]
fn a_host_that_never_comes_after_a_server_start_is_away_and_holds_up_nothing() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    assert_eq!(w.releases_running(), [1, 1]);
    // The server starts anew; one host with a replica is dead.
    let dead: HostUid = w.running.values().next().unwrap().0.clone();
    let number = dead.as_str()[1..].parse().unwrap();
    w.presence(number, Presence::Unknown);
    let mut unheard = Unheard::default();
    unheard.look(&w.view, &mut w.live, 30_000, w.now.mono);
    w.apply(World::spec("two"));
    w.now.mono = w.now.mono.plus_ms(119_000);
    unheard.look(&w.view, &mut w.live, 30_000, w.now.mono);
    assert_eq!(w.live.presence(&dead), Presence::Unknown);
    w.now.mono = w.now.mono.plus_ms(1_000);
    unheard.look(&w.view, &mut w.live, 30_000, w.now.mono);
    assert_eq!(w.live.presence(&dead), Presence::Away(w.now.mono));
    assert!(w.live.take_moved().contains(&crate::live::Moved::Host(dead.clone())));
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    // Once it is there it is waited for no longer, and one that joins late has its own time.
    w.presence(number, Presence::Present);
    w.host(9, 1 << 30, "a");
    let late: HostUid = "h9".parse().unwrap();
    w.presence(9, Presence::Unknown);
    unheard.look(&w.view, &mut w.live, 30_000, w.now.mono);
    assert_eq!(w.live.presence(&dead), Presence::Present);
    assert_eq!(w.live.presence(&late), Presence::Unknown);
}

#[test]
fn a_host_to_be_observed_since_a_restore_is_waited_for_as_long_as_it_takes() {
    let mut w = World::new(1);
    let mut cluster = w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (cluster.epoch + 1, true);
    w.change(vec![crate::change::Change::PutCluster(cluster)]);
    w.presence(0, Presence::Unknown);
    let mut unheard = Unheard::default();
    for _ in 0..3 {
        unheard.look(&w.view, &mut w.live, 1, w.now.mono);
        w.now.mono = w.now.mono.plus_ms(3_600_000);
    }
    assert_eq!(w.live.presence(&"h0".parse().unwrap()), Presence::Unknown);
}

#[test]
fn a_slot_whose_place_is_taken_until_the_one_before_has_stopped_says_so() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    let rollout = spec.rollout.get_or_insert_default();
    (rollout.max_surge, rollout.max_unavailable) = (Some(0), Some(1));
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec);
    // The first pass stops one; what it ran takes its time to go.
    let made = |w: &mut World| {
        let uid = w.uid();
        let ids = &mut w.ids;
        plan(&w.view, &w.live, &uid, w.now, &mut || {
            *ids += 1;
            format!("n{ids}").parse().unwrap()
        })
    };
    let first = made(&mut w);
    let stopped =
        first.steps.iter().find(|s| s.kind == PlannedStepKind::Stop).unwrap().host.clone();
    assert!(first.report.until_gone.is_empty());
    w.change(first.changes);
    let second = made(&mut w);
    assert_eq!(second.report.until_gone, BTreeMap::from([(stopped.clone(), 1)]));
    let shown = crate::status::deployment(&w.view, &w.live, w.deployment(), Some(&second.report));
    let pending = shown.status.unwrap().pending;
    let said = pending.iter().find(|p| p.reason == "STOPPING").unwrap();
    let host = &w.view.host(&stopped).unwrap().name;
    assert_eq!(said.message, format!("waits until the one before is gone from {host}"));
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
    assert!(made(&mut w).report.until_gone.is_empty());
}

#[test]
fn what_is_said_where_no_host_takes_part_ends_with_the_first_that_does() {
    let mut report = Report {
        pending: BTreeMap::from([("no host fits: 1 cordoned".to_owned(), 1)]),
        ..Report::default()
    };
    let host: HostUid = "h0".parse().unwrap();
    report.merge_host(&host, &Plan::default());
    assert_eq!(report.pending.len(), 1, "nothing was placed");
    let kind = PlannedStepKind::Place;
    let step = Step { kind, slot: 0, host: host.clone(), release: ReleaseNumber(1) };
    report.merge_host(&host, &Plan { steps: vec![step], ..Plan::default() });
    assert_eq!((report.wanted, report.pending.len()), (1, 0));
}
