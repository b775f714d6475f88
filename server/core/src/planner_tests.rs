//! A cluster in miniature: views, live reports and plans, without anything that waits.

use super::*;
use crate::change::Change;
use crate::decide::{self, Asked, Wanted};
use crate::objects::Host;
use berth_proto::api;
use berth_proto::ids::{Revision, Wall};
use berth_proto::record::{HostRecord, Meta};
use berth_proto::values::{Phase, PlatformImage, ReplicaStatus, ResolvedImage, ResolvedSource};

struct World {
    view: View,
    live: Live,
    now: Now,
    ids: u32,
    /// Containers that run, by replica; what the hosts really have.
    running: BTreeMap<ReplicaUid, (HostUid, ReleaseNumber, u32)>,
    /// Releases that never become ready.
    broken: BTreeSet<u64>,
    most_at_once: usize,
    lowest_ready: usize,
}

fn digest(text: &str) -> berth_proto::ids::Digest {
    berth_proto::ids::Digest::of(text.as_bytes())
}

impl World {
    fn new(hosts: u32) -> Self {
        let mut world = Self {
            view: View::default(),
            live: Live::default(),
            now: Now { mono: Mono(1000), wall: Wall(1_000_000) },
            ids: 0,
            running: BTreeMap::new(),
            broken: BTreeSet::new(),
            most_at_once: 0,
            lowest_ready: usize::MAX,
        };
        for n in 0..hosts {
            world.host(n, 1 << 30, if n % 2 == 0 { "a" } else { "b" });
        }
        world
    }

    fn host(&mut self, n: u32, memory: u64, zone: &str) {
        let record = HostRecord {
            meta: Some(Meta {
                uid: format!("h{n}"),
                name: format!("host-{n}"),
                labels: BTreeMap::from([("zone".into(), zone.into())]),
                ..Meta::default()
            }),
            facts: Some(api::HostFacts {
                arch: "amd64".into(),
                os: "linux".into(),
                engine_available: true,
                capacity: Some(api::Resources {
                    cpu_millis: 4000,
                    memory_bytes: memory,
                    gpu_memory_bytes: 0,
                }),
                ..Default::default()
            }),
            ..HostRecord::default()
        };
        let host = Host::new(record).unwrap();
        self.live.edit_host(&host.uid, |h| h.presence = Presence::Present);
        self.change(vec![Change::PutHost(Arc::new(host))]);
    }

    fn change(&mut self, changes: Vec<Change>) {
        let revision = self.view.revision.next();
        for change in changes {
            self.view.apply(&change, revision);
        }
    }

    fn spec(image: &str) -> api::DeploymentSpec {
        api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image(image.into())),
            replicas: Some(2),
            rollout: Some(api::RolloutPolicy {
                ready_for: Some(berth_proto::convert::duration(100)),
                progress_deadline: Some(berth_proto::convert::duration(10_000)),
                ..Default::default()
            }),
            on_host_loss: Some(api::HostLossPolicy {
                after: Some(berth_proto::convert::duration(5_000)),
                action: 0,
            }),
            ..Default::default()
        }
    }

    fn apply(&mut self, spec: api::DeploymentSpec) -> ApplyOutcome {
        let image = match &spec.source {
            Some(api::deployment_spec::Source::Image(image)) => image.clone(),
            Some(api::deployment_spec::Source::Model(_)) | None => String::new(),
        };
        let wanted = Wanted {
            name: "d".parse().unwrap(),
            namespace: Default::default(),
            labels: BTreeMap::new(),
            spec,
            resolved: ResolvedSource {
                image: ResolvedImage {
                    registry: String::new(),
                    repository: "r".into(),
                    digest: digest(&image),
                    platforms: vec![PlatformImage {
                        arch: "amd64".into(),
                        os: "linux".into(),
                        manifest_digest: digest(&image),
                        config_digest: digest(&image),
                        size_bytes: 1,
                    }],
                },
                artifact: None,
            },
            resolved_words: image,
        };
        let asked = Asked { actor: "user/test", now: self.now.wall };
        let decision = decide::apply(&self.view, &wanted, "d".parse().unwrap(), &asked).unwrap();
        self.change(decision.proposal.changes);
        decision.action
    }

    fn uid(&self) -> DeploymentUid {
        "d".parse().unwrap()
    }

    fn deployment(&self) -> &Arc<Deployment> {
        self.view.deployment(&self.uid()).unwrap()
    }

    fn plan(&mut self) -> Plan {
        let ids = &mut self.ids;
        let plan = plan(&self.view, &self.live, &"d".parse().unwrap(), self.now, &mut || {
            *ids += 1;
            format!("r{:05}", *ids).parse().unwrap()
        });
        self.live.set_clock(&"d".parse().unwrap(), plan.clock.clone());
        self.change(plan.changes.clone());
        for (host, used) in self.view.rebuilt_use() {
            assert_eq!(*self.view.host_use(&host), used);
            let have = &self.view.host(&host).unwrap().facts.capacity;
            assert!(used.used.memory_bytes <= have.memory_bytes, "{host} is over its memory");
        }
        plan
    }

    fn report(&mut self, uid: &ReplicaUid, phase: Phase, ready: bool) {
        let status = ReplicaStatus {
            attempt: 1,
            phase: Some(phase),
            ready,
            reason: String::new(),
            message: String::new(),
            progress: None,
            last_exit: None,
            start_time: None,
            next_attempt_time: None,
            container_id: String::new(),
        };
        self.live.take(uid, status, self.now.mono);
    }

    /// What agents in reach would do, and time.
    fn agents(&mut self) {
        let replicas: Vec<Arc<Replica>> = self.view.replicas().cloned().collect();
        for replica in replicas {
            if !self.live.is_present(&replica.host) {
                continue;
            }
            if replica.runs() {
                let here = (replica.host.clone(), replica.release, replica.slot);
                let ok = !self.broken.contains(&replica.release.0);
                if let Some(old) = &replica.replaces {
                    if ok {
                        self.running.remove(old);
                        self.report(old, Phase::Exited, false);
                    } else {
                        let mut failed = Replica::clone(&replica);
                        failed.failed = true;
                        failed.reason = "not ready in time".into();
                        self.change(vec![Change::PutReplica(Arc::new(failed))]);
                        continue;
                    }
                }
                self.running.insert(replica.uid.clone(), here);
                self.report(&replica.uid, Phase::Running, ok);
                if ok && replica.first_ready.is_none() {
                    let mut ready = Replica::clone(&replica);
                    ready.first_ready = Some(self.now.wall);
                    self.change(vec![Change::PutReplica(Arc::new(ready))]);
                }
            } else if replica.intent == ReplicaIntent::Stop {
                self.running.remove(&replica.uid);
                self.live.remove_replica(&replica.uid);
                self.change(vec![Change::DeleteReplica(replica.uid.clone())]);
            }
        }
        let reachable = self.running.values().filter(|(host, ..)| self.live.is_present(host));
        self.most_at_once = self.most_at_once.max(reachable.count());
        let ready = self
            .running
            .values()
            .filter(|(_, release, _)| !self.broken.contains(&release.0))
            .count();
        self.lowest_ready = self.lowest_ready.min(ready);
    }

    fn pass(&mut self, ms: u64) -> Plan {
        self.now.mono = self.now.mono.plus_ms(ms);
        let plan = self.plan();
        self.agents();
        plan
    }

    /// Until nothing changes any more.
    fn settle(&mut self) {
        for _ in 0..300 {
            let before = self.view.revision;
            self.pass(150);
            if self.view.revision == before && self.plan().changes.is_empty() {
                return;
            }
        }
        panic!("it does not end");
    }

    fn releases_running(&self) -> Vec<u64> {
        let mut all: Vec<u64> = self.running.values().map(|(_, release, _)| release.0).collect();
        all.sort_unstable();
        all
    }

    fn presence(&mut self, n: u32, presence: Presence) {
        let uid: HostUid = format!("h{n}").parse().unwrap();
        self.live.edit_host(&uid, |h| h.presence = presence);
    }
}

type ApplyOutcome = api::ApplyAction;

#[test]
fn a_deployment_is_placed_spread_and_complete() {
    let mut w = World::new(4);
    let mut spec = World::spec("one");
    spec.replicas = Some(4);
    spec.placement = Some(api::Placement { require: vec![], spread: "zone".into() });
    assert_eq!(w.apply(spec.clone()), api::ApplyAction::Created);
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    let hosts: BTreeSet<&HostUid> = w.running.values().map(|(host, ..)| host).collect();
    assert_eq!(hosts.len(), 4);
    assert_eq!(w.apply(spec), api::ApplyAction::Unchanged);
}

#[test]
fn a_rollout_keeps_its_floor_and_its_surge() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    (w.most_at_once, w.lowest_ready) = (0, usize::MAX);
    assert_eq!(w.apply(World::spec("two")), api::ApplyAction::Changed);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    assert!(w.most_at_once <= 3, "{}", w.most_at_once);
    assert!(w.lowest_ready >= 2, "{}", w.lowest_ready);
}

#[test]
fn without_surge_the_old_one_stops_first() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.rollout.as_mut().unwrap().max_surge = Some(0);
    spec.rollout.as_mut().unwrap().max_unavailable = Some(1);
    w.apply(spec.clone());
    w.settle();
    (w.most_at_once, w.lowest_ready) = (0, usize::MAX);
    spec.source = World::spec("two").source;
    w.apply(spec);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
    assert!(w.most_at_once <= 2, "{}", w.most_at_once);
    assert!(w.lowest_ready >= 1, "{}", w.lowest_ready);
}

#[test]
fn a_failed_rollout_goes_back_without_touching_the_good_ones() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let good: Vec<ReplicaUid> = w.running.keys().cloned().collect();
    w.broken.insert(2);
    w.apply(World::spec("two"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
    assert!(w.deployment().record.reason.contains("release 2 failed"));
    assert_eq!(w.running.keys().cloned().collect::<Vec<_>>(), good);
    // The same spec again is another try.
    w.broken.clear();
    assert_eq!(w.apply(World::spec("two")), api::ApplyAction::Changed);
    w.settle();
    assert_eq!(w.releases_running(), [3, 3]);
}

#[test]
fn a_first_release_that_fails_waits_for_a_person() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    for _ in 0..200 {
        w.pass(150);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Paused);
}

#[test]
fn what_cannot_stand_side_by_side_is_replaced_in_place() {
    let mut w = World::new(1);
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    spec.ports = vec![api::Port {
        name: "http".into(),
        container: 80,
        host_port: 8080,
        bind: "127.0.0.1".into(),
    }];
    w.apply(spec.clone());
    w.settle();
    spec.source = World::spec("two").source;
    w.apply(spec.clone());
    let plan = w.plan();
    assert!(plan.steps.iter().any(|s| s.kind == PlannedStepKind::Replace), "{:?}", plan.steps);
    w.agents();
    w.settle();
    assert_eq!(w.releases_running(), [2]);
    // And when the new one fails, the old one stays.
    w.broken.insert(3);
    spec.source = World::spec("three").source;
    w.apply(spec);
    for _ in 0..20 {
        w.pass(150);
    }
    assert_eq!(w.releases_running(), [2]);
    assert_eq!(w.deployment().rollout(), RolloutState::RolledBack);
}

#[test]
fn why_nothing_is_placed_is_said_in_words() {
    let mut w = World::new(3);
    let host = w.view.host(&"h0".parse().unwrap()).unwrap();
    let cordoned = host.edited(|r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: false });
    });
    w.change(vec![Change::PutHost(Arc::new(cordoned.unwrap()))]);
    w.presence(1, Presence::Away(Mono(0)));
    let mut spec = World::spec("one");
    spec.placement = Some(api::Placement { require: vec!["zone=b".into()], spread: String::new() });
    w.apply(spec);
    let plan = w.plan();
    let words: Vec<&String> = plan.report.pending.keys().collect();
    assert_eq!(words, ["no host fits: 1 away, 1 cordoned, 1 without label zone=b"]);
}

#[test]
fn a_short_absence_changes_nothing_and_a_lost_host_is_replaced_once() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let on: HostUid = w.running.values().next().unwrap().0.clone();
    let n: u32 = on.as_str()[1..].parse().unwrap();
    let at = w.now.mono;
    w.presence(n, Presence::Away(at));
    for _ in 0..20 {
        assert!(w.pass(100).changes.is_empty());
    }
    w.now.mono = at.plus_ms(6_000);
    w.settle();
    assert_eq!(w.view.replicas_of(&w.uid()).filter(|r| r.runs()).count(), 3);
    // It returns: one of the two goes, and the slot has one again.
    w.presence(n, Presence::Present);
    w.settle();
    assert_eq!(w.running.len(), 2);
    let slots: BTreeSet<u32> = w.running.values().map(|(_, _, slot)| *slot).collect();
    assert_eq!(slots.len(), 2);
}

#[test]
fn after_a_server_start_nothing_happens_until_hosts_have_spoken() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    w.apply(World::spec("two"));
    w.live = Live::default();
    for _ in 0..200 {
        assert!(w.pass(1000).changes.is_empty());
    }
    for n in 0..3 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
}

#[test]
fn an_away_host_is_deferred_and_does_not_hold_up_the_rollout() {
    let mut w = World::new(2);
    w.apply(World::spec("one"));
    w.settle();
    let at = w.now.mono;
    w.presence(0, Presence::Away(at));
    let mut spec = World::spec("two");
    spec.on_host_loss = Some(api::HostLossPolicy { after: None, action: 2 });
    w.apply(spec);
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
    assert_eq!(w.releases_running(), [1, 2]);
    w.presence(0, Presence::Present);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2]);
}

#[test]
fn every_host_gets_one_and_a_new_host_too() {
    let mut w = World::new(3);
    let mut spec = World::spec("one");
    spec.replicas = None;
    spec.every_host = true;
    w.apply(spec.clone());
    w.settle();
    assert_eq!(w.running.len(), 3);
    w.host(3, 1 << 30, "a");
    w.settle();
    assert_eq!(w.running.len(), 4);
    spec.source = World::spec("two").source;
    w.apply(spec);
    w.settle();
    assert_eq!(w.releases_running(), [2, 2, 2, 2]);
}

#[test]
fn a_drained_host_is_left_without_going_below_the_floor() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let on: HostUid = w.running.values().next().unwrap().0.clone();
    let drained = w.view.host(&on).unwrap().edited(|r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: true });
    });
    w.change(vec![Change::PutHost(Arc::new(drained.unwrap()))]);
    w.lowest_ready = usize::MAX;
    w.settle();
    assert!(w.running.values().all(|(host, ..)| *host != on));
    assert_eq!(w.running.len(), 2);
    assert!(w.lowest_ready >= 2);
}

#[test]
fn scaling_and_deleting_end_when_absence_is_confirmed() {
    let mut w = World::new(3);
    w.apply(World::spec("one"));
    w.settle();
    let asked = Asked { actor: "user/test", now: w.now.wall };
    let scaled = decide::scale(w.deployment(), 5, &asked).unwrap();
    w.change(scaled.proposal.changes);
    w.settle();
    assert_eq!(w.running.len(), 5);
    let scaled = decide::scale(w.deployment(), 1, &asked).unwrap();
    w.change(scaled.proposal.changes);
    w.settle();
    assert_eq!(w.running.len(), 1);
    let deleted = decide::delete(w.deployment(), &asked).unwrap();
    w.change(deleted.proposal.changes);
    w.presence(0, Presence::Away(Mono(0)));
    w.presence(1, Presence::Away(Mono(0)));
    w.presence(2, Presence::Away(Mono(0)));
    for _ in 0..5 {
        w.pass(100);
    }
    assert!(w.view.deployment(&w.uid()).is_some(), "no host has confirmed absence");
    for n in 0..3 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert!(w.view.deployment(&w.uid()).is_none());
    assert_eq!(w.view.releases_of(&w.uid()).count(), 0);
}

#[test]
fn a_plan_is_the_same_for_the_same_view() {
    let mut w = World::new(5);
    let mut spec = World::spec("one");
    spec.replicas = Some(9);
    w.apply(spec);
    let make = |w: &World| {
        let mut n = 0;
        plan(&w.view, &w.live, &w.uid(), w.now, &mut || {
            n += 1;
            format!("x{n}").parse().unwrap()
        })
    };
    assert_eq!(make(&w), make(&w));
    assert_eq!(w.view.revision, Revision(6));
}

#[test]
fn no_host_is_given_more_than_it_has() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    spec.replicas = Some(20);
    spec.resources =
        Some(api::Resources { cpu_millis: 100, memory_bytes: 300 << 20, gpu_memory_bytes: 0 });
    w.apply(spec);
    for _ in 0..10 {
        w.pass(150);
    }
    // 1 GiB holds three of 300 MiB.
    assert_eq!(w.running.len(), 6);
    let plan = w.plan();
    assert_eq!(plan.report.pending.keys().collect::<Vec<_>>(), ["no host fits: 2 short of memory"]);
}

#[test]
fn with_no_host_in_reach_nothing_is_complete_and_nothing_fails() {
    let mut w = World::new(2);
    w.broken.insert(1);
    w.apply(World::spec("one"));
    w.pass(100);
    let at = w.now.mono;
    for n in 0..2 {
        w.presence(n, Presence::Away(at));
    }
    let mut spec = World::spec("one");
    spec.on_host_loss = Some(api::HostLossPolicy { after: None, action: 2 });
    w.apply(spec);
    for _ in 0..200 {
        w.pass(1000);
    }
    assert_eq!(w.deployment().rollout(), RolloutState::Rolling);
    w.broken.clear();
    for n in 0..2 {
        w.presence(n, Presence::Present);
    }
    w.settle();
    assert_eq!(w.deployment().rollout(), RolloutState::Complete);
}
