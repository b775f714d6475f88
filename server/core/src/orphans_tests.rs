//! Claims about orphans.

use super::*;
use crate::dispatch::host_set;
use crate::intake::registration;
use crate::live::Presence;
use crate::miniature::World;
use crate::objects::Host;
use crate::session::Hold;
use crate::session::Registration;
use berth_proto::ids::Digest;

fn uid() -> HostUid {
    "h0".parse().unwrap()
}

/// A deployment of two replicas on one host, in a ledger that was restored just now.
fn restored() -> World {
    let mut w = World::new(1);
    w.apply(World::spec("one"));
    w.settle();
    let mut cluster = w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (5, true);
    w.change(vec![Change::PutCluster(cluster)]);
    w
}

fn report(
    replica: &str,
    deployment: &str,
    release: u64,
    slot: u32,
    body: &Digest,
) -> ReplicaReport {
    ReplicaReport {
        replica_uid: replica.into(),
        deployment_uid: deployment.into(),
        release,
        slot,
        body_digest: body.to_string(),
        ..ReplicaReport::default()
    }
}

fn body(w: &World) -> Digest {
    w.view.releases_of(&w.uid()).last().unwrap().body_digest.clone()
}

/// The host says what it runs, for the first time in this epoch.
fn observe(w: &mut World, more: &[ReplicaReport]) {
    let mut all: Vec<ReplicaReport> = w
        .view
        .replicas_on(&uid())
        .map(|r| report(r.uid.as_str(), "d", r.release.0, r.slot, &body(w)))
        .collect();
    all.extend(more.iter().cloned());
    let mut changes = found(&w.view, &uid(), &all, w.now.wall);
    let host = w.view.host(&uid()).unwrap();
    let seen: Host = host.edited(|r| r.observed_epoch = w.view.cluster.epoch).unwrap();
    changes.push(Change::PutHost(Arc::new(seen)));
    w.change(changes);
}

fn held_back(w: &World) -> bool {
    host_set(&w.view, &uid()).unwrap() == Err(Hold::Observing)
}

fn orphans(w: &World) -> Vec<Arc<Replica>> {
    w.view.orphans_on(&uid()).cloned().collect()
}

fn adopted(w: &mut World) -> Resolution {
    let asked = Asked { actor: "user/test", now: w.now.wall };
    let done = adopt(&w.view, &orphans(w), &asked);
    w.change(done.changes.clone());
    done
}

#[test]
fn a_host_gets_no_set_before_it_has_said_what_it_runs_and_then_at_once_if_all_is_known() {
    let mut w = restored();
    assert!(held_back(&w));
    observe(&mut w, &[]);
    assert!(!held_back(&w));
    // The next restore begins anew.
    let mut cluster = w.view.cluster.clone();
    cluster.epoch += 1;
    w.change(vec![Change::PutCluster(cluster)]);
    assert!(held_back(&w));
}

#[test]
fn no_set_lacks_an_orphan_and_nothing_new_is_placed_beside_it() {
    let mut w = restored();
    let body = body(&w);
    observe(&mut w, &[report("lost", "other", 1, 0, &body)]);
    assert_eq!(orphans(&w).len(), 1);
    assert!(held_back(&w));
    w.apply(berth_proto::api::DeploymentSpec { replicas: Some(3), ..World::spec("one") });
    let plan = w.plan();
    assert!(plan.report.pending.keys().any(|why| why.contains("orphan")), "{:?}", plan.report);
    let done = release(&orphans(&w));
    assert_eq!(done.resolved, 1);
    w.change(done.changes);
    let set = host_set(&w.view, &uid()).unwrap().unwrap();
    assert!(set.entries.iter().all(|e| e.replica_uid != "lost"));
    assert_eq!(set.entries.len(), 2);
}

#[test]
fn an_orphan_of_a_deployment_that_is_lost_is_listed_by_the_name_its_host_knows() {
    let mut w = restored();
    let body = body(&w);
    let named = ReplicaReport {
        deployment: "later".into(),
        namespace: "team".into(),
        ..report("lost", "other", 1, 0, &body)
    };
    let other = ReplicaReport { replica_uid: "unnamed".into(), ..report("", "", 1, 0, &body) };
    let other = ReplicaReport { deployment_uid: "another".into(), ..other };
    observe(&mut w, &[named, other]);
    let shown: Vec<_> = orphans(&w)
        .iter()
        .map(|orphan| {
            // As it is after a restart of the server, too.
            let read = Replica::new(&orphan.to_record()).unwrap();
            let shown = crate::status::replica(&w.view, &w.live, &read, w.now.mono);
            (shown.namespace, shown.deployment)
        })
        .collect();
    assert_eq!(shown, [("team".into(), "later".into()), (String::new(), String::new())]);
}

#[test]
fn a_release_number_that_no_server_has_given_is_not_believed() {
    let mut w = restored();
    let body = body(&w);
    observe(&mut w, &[report("lie", "d", u64::MAX, 1, &body)]);
    assert!(orphans(&w).is_empty());
    w.apply(World::spec("two"));
    assert_eq!(w.deployment().release().0, 2);
}

#[test]
fn what_was_scaled_up_after_the_backup_is_adopted_and_not_stopped_by_the_next_plan() {
    let mut w = restored();
    let body = body(&w);
    observe(&mut w, &[report("c", "d", 1, 2, &body), report("e", "d", 1, 4, &body)]);
    let done = adopted(&mut w);
    assert_eq!((done.resolved, done.kept.len()), (2, 0));
    assert_eq!(w.deployment().wanted(), Some(5));
    assert!(!held_back(&w));
    w.settle();
    for name in ["c", "e"] {
        assert!(w.view.replica(&name.parse().unwrap()).unwrap().runs());
    }
    assert_eq!(w.view.replicas_of(&w.uid()).count(), 5, "slot 3 was filled");
}

#[test]
fn the_place_of_an_orphan_is_filled_only_once_it_is_decided_about_or_its_host_is_lost() {
    let mut w = World::new(2);
    w.apply(World::spec("one"));
    w.settle();
    let mut cluster = w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (5, true);
    w.change(vec![Change::PutCluster(cluster)]);
    let other: HostUid = "h1".parse().unwrap();
    let there = report("there", "d", 1, 2, &body(&w));
    observe(&mut w, &[]);
    let seen = w.view.host(&other).unwrap().edited(|r| r.observed_epoch = 5).unwrap();
    w.change(vec![Change::PutHost(Arc::new(seen))]);
    w.change(found(&w.view, &other, &[there], w.now.wall));
    w.apply(berth_proto::api::DeploymentSpec { replicas: Some(4), ..World::spec("one") });
    let plan = w.plan();
    assert_eq!(plan.steps.iter().map(|s| s.slot).collect::<Vec<_>>(), [3], "and not slot 2");
    assert!(plan.report.pending.keys().any(|why| why.contains("berth orphan list")));
    // Away is not lost, and what is lost has another one.
    w.presence(1, Presence::Away(w.now.mono));
    assert_eq!(w.plan().steps, []);
    let plan = w.pass(6_000);
    assert_eq!(plan.steps.iter().map(|s| s.slot).collect::<Vec<_>>(), [2, 1], "all of that host");
}

/// Two hosts and a restored ledger; `h1` runs what nobody has decided about.
fn with_orphan_on_h1(spec: berth_proto::api::DeploymentSpec, orphan: ReplicaReport) -> World {
    let mut w = World::new(2);
    w.apply(spec);
    w.settle();
    let mut cluster = w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (5, true);
    w.change(vec![Change::PutCluster(cluster)]);
    observe(&mut w, &[]);
    let other: HostUid = "h1".parse().unwrap();
    let seen = w.view.host(&other).unwrap().edited(|r| r.observed_epoch = 5).unwrap();
    w.change(vec![Change::PutHost(Arc::new(seen))]);
    let body_digest = body(&w).to_string();
    let orphan = ReplicaReport { body_digest, ..orphan };
    w.change(found(&w.view, &other, &[orphan], w.now.wall));
    w
}

#[test]
fn an_orphan_on_a_host_that_is_away_holds_up_no_rollout() {
    let keep = berth_proto::api::HostLossPolicy {
        action: berth_proto::api::HostLossAction::Keep as i32,
        after: None,
    };
    let spec = |image: &str| berth_proto::api::DeploymentSpec {
        on_host_loss: Some(keep),
        ..World::spec(image)
    };
    let one = berth_proto::api::DeploymentSpec { replicas: Some(1), ..spec("one") };
    let orphan = report("there", "d", 1, 1, &Digest::of(b""));
    let mut w = with_orphan_on_h1(one, orphan);
    assert_eq!(w.view.replicas_of(&w.uid()).next().unwrap().host, uid());
    w.presence(1, Presence::Away(w.now.mono));
    w.apply(spec("two"));
    w.settle();
    assert_eq!(w.deployment().rollout(), berth_proto::api::RolloutState::Complete);
    // In reach again it is waited for, and no time counts.
    w.presence(1, Presence::Present);
    w.apply(spec("three"));
    for _ in 0..20 {
        w.pass(6_000);
    }
    assert_eq!(w.deployment().rollout(), berth_proto::api::RolloutState::Rolling);
}

#[test]
fn a_host_that_waits_for_a_decision_fails_no_rollout_on_all_hosts() {
    let spec = |image: &str| berth_proto::api::DeploymentSpec {
        replicas: None,
        every_host: true,
        ..World::spec(image)
    };
    let mut w = with_orphan_on_h1(spec("one"), report("lost", "other", 1, 0, &Digest::of(b"")));
    w.apply(spec("two"));
    for _ in 0..20 {
        w.pass(6_000);
    }
    assert_eq!(w.deployment().rollout(), berth_proto::api::RolloutState::Complete);
    assert_eq!(w.releases_running(), [1, 2], "what is there stays");
    let other: Vec<_> = w.view.orphans_on(&"h1".parse().unwrap()).cloned().collect();
    let done = release(&other);
    w.change(done.changes);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
}

#[test]
fn what_was_adopted_is_in_its_own_slot_though_that_was_wanted_before() {
    let mut w = restored();
    w.apply(berth_proto::api::DeploymentSpec { replicas: Some(3), ..World::spec("one") });
    let body = body(&w);
    observe(&mut w, &[report("there", "d", 1, 2, &body)]);
    assert_eq!(w.plan().steps, []);
    assert_eq!(adopted(&mut w).resolved, 1);
    w.settle();
    assert_eq!(w.view.replicas_of(&w.uid()).count(), 3);
    assert!(w.view.replica(&"there".parse().unwrap()).unwrap().runs());
}

#[test]
fn what_a_host_that_has_forgotten_the_slots_runs_is_adopted_each_in_one_of_its_own() {
    let mut w = restored();
    let body = body(&w);
    let before: Vec<_> = w.view.replicas_of(&w.uid()).map(|r| r.uid.clone()).collect();
    // It was removed, and has joined anew beside what it runs.
    w.change(before.iter().cloned().map(Change::DeleteReplica).collect());
    observe(&mut w, &[report("a", "d", 1, 0, &body), report("b", "d", 1, 0, &body)]);
    assert_eq!(w.plan().steps, [], "both hold a place");
    assert_eq!(adopted(&mut w).resolved, 2);
    let mut slots: Vec<u32> = w.view.replicas_of(&w.uid()).map(|r| r.slot).collect();
    slots.sort_unstable();
    assert_eq!((slots, w.deployment().wanted()), (vec![0, 1], Some(2)));
}

#[test]
fn each_reason_against_an_adoption_has_its_name() {
    let mut w = restored();
    let (good, other) = (body(&w), Digest::of(b"another body"));
    let why = |w: &mut World, report: ReplicaReport| {
        let mut w = World { view: w.view.clone(), ..restored() };
        observe(&mut w, &[report]);
        adopted(&mut w).kept.first().map(|(_, why)| *why)
    };
    assert_eq!(why(&mut w, report("x", "d", 1, 7, &good)), None);
    let unknown = report("x", "nosuch", 1, 7, &good);
    assert_eq!(why(&mut w, unknown), Some(Unadoptable::DeploymentUnknown));
    let newer = report("x", "d", 2, 7, &good);
    assert_eq!(why(&mut w, newer), Some(Unadoptable::ReleaseUnknown));
    let another = report("x", "d", 1, 7, &other);
    assert_eq!(why(&mut w, another), Some(Unadoptable::ReleaseUnknown), "another body restarts it");
    assert_eq!(why(&mut w, report("x", "d", 1, 0, &good)), Some(Unadoptable::SlotFilled));
    let deleted = w.deployment().edited(|r| r.meta.as_mut().unwrap().delete_unix_ms = 1);
    w.change(vec![Change::PutDeployment(Arc::new(deleted))]);
    assert_eq!(why(&mut w, report("x", "d", 1, 7, &good)), Some(Unadoptable::Deleting));
}

#[test]
fn what_a_clone_runs_is_an_orphan_too_whoever_of_the_two_was_looked_at_first() {
    let mut w = restored();
    let body = body(&w);
    observe(&mut w, &[]);
    assert!(!held_back(&w));
    // The other copy of the disk, which the backup does not know of either.
    let said = Registration {
        instance: "i".into(),
        boot_nonce: "of the other boot".into(),
        agent_start: 1,
        agent_version: String::new(),
        facts: None,
        held: None,
        observed: vec![report("only-here", "d", 1, 7, &body)],
        engine_observed: true,
        trust_version: 0,
    };
    let changes = registration(&w.view, &uid(), &said, w.now.wall);
    w.change(changes);
    assert_eq!(orphans(&w).len(), 1);
    assert!(held_back(&w), "or its set would stop it");
    // Of a host that was removed meanwhile nothing is written.
    let removed = w.view.host(&uid()).unwrap().edited(|r| r.removed = true).unwrap();
    w.change(vec![Change::PutHost(Arc::new(removed))]);
    let said = Registration { observed: vec![report("another", "d", 1, 8, &body)], ..said };
    assert_eq!(registration(&w.view, &uid(), &said, w.now.wall), []);
}

#[test]
fn a_release_number_that_an_orphan_has_is_not_given_again() {
    let mut w = restored();
    let other = Digest::of(b"lost release");
    observe(&mut w, &[report("x", "d", 4, 0, &other)]);
    w.apply(World::spec("two"));
    assert_eq!(w.deployment().release(), ReleaseNumber(5));
}

#[test]
fn two_orphans_of_one_slot_become_one_and_decisions_are_bounded() {
    let mut w = restored();
    let body = body(&w);
    let twice = [report("a", "d", 1, 3, &body), report("b", "d", 1, 3, &body)];
    observe(&mut w, &twice);
    let done = adopted(&mut w);
    assert_eq!(done.resolved, 1);
    assert_eq!(done.kept, [("b".parse().unwrap(), Unadoptable::SlotFilled)]);

    let mut w = restored();
    let many: Vec<_> = (2..300).map(|n| report(&format!("m{n}"), "d", 1, n, &body)).collect();
    observe(&mut w, &many);
    let mut calls = 0;
    while !orphans(&w).is_empty() {
        let done = adopted(&mut w);
        assert!(done.changes.len() <= MAX_CHANGES && done.resolved > 0, "{}", done.changes.len());
        calls += 1;
    }
    assert!(calls > 1);
    assert_eq!(w.deployment().wanted(), Some(300));
}

#[test]
fn an_orphan_that_its_host_has_no_room_for_any_more_is_not_adopted() {
    let mut w = World::new(1);
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    // The host has 1 GiB.
    let memory_bytes = 600 << 20;
    spec.resources = Some(berth_proto::api::Resources { memory_bytes, ..Default::default() });
    w.apply(spec);
    w.settle();
    let mut cluster = w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (5, true);
    w.change(vec![Change::PutCluster(cluster)]);
    let body = body(&w);
    observe(&mut w, &[report("x", "d", 1, 7, &body)]);
    let done = adopted(&mut w);
    assert_eq!((done.resolved, done.kept), (0, vec![("x".parse().unwrap(), Unadoptable::NoRoom)]));
}

#[test]
fn with_a_host_goes_what_ran_there_for_deployments_nobody_knows() {
    let mut w = restored();
    let body = body(&w);
    observe(&mut w, &[report("lost", "gone", 1, 0, &body)]);
    let released: Vec<_> = w.view.orphans_on(&uid()).cloned().collect();
    assert_eq!(released.len(), 1);
    w.change(release(&released).changes);
    let forgotten = forgotten_with(&w.view, &uid());
    assert_eq!(forgotten, [Change::DeleteReplica(released[0].uid.clone())]);
    w.change(forgotten);
    assert_eq!(w.view.replicas_on(&uid()).count(), 2, "those of a known deployment are planned");
}
