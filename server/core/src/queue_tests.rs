//! Whatever a pass over all deployments would change has been woken; shown with random acts of
//! operators, hosts and time.

use super::*;
use crate::audit;
use crate::live::Presence;
use crate::miniature::World;
use crate::planner;
use berth_proto::api;
use proptest::prelude::*;
use std::sync::Arc;

#[derive(Debug, Clone)]
enum Act {
    Apply { name: u8, image: u8, replicas: u32, memory: u64, zone: u8, every: bool, port: bool },
    Delete(u8),
    Away(u8),
    Back(u8),
    Cordon(u8, bool, bool),
    Relabel(u8, bool),
    Join(u8),
    Remove(u8),
    Break(u8),
    Agents,
    Time(u64),
    Plan,
}

fn act() -> impl Strategy<Value = Act> {
    let n = 0..6_u8;
    prop_oneof![
        4 => (0..4_u8, 0..3_u8, 0..5_u32, 0..5_u64, 0..3_u8, prop::bool::weighted(0.25), prop::bool::weighted(0.25))
            .prop_map(|(name, image, replicas, memory, zone, every, port)| Act::Apply {
                name, image, replicas, memory, zone, every, port
            }),
        1 => (0..4_u8).prop_map(Act::Delete),
        2 => n.clone().prop_map(Act::Away),
        3 => n.clone().prop_map(Act::Back),
        2 => (n.clone(), any::<bool>(), any::<bool>()).prop_map(|(n, c, d)| Act::Cordon(n, c, d)),
        2 => (n.clone(), any::<bool>()).prop_map(|(n, b)| Act::Relabel(n, b)),
        1 => n.clone().prop_map(Act::Join),
        1 => n.prop_map(Act::Remove),
        1 => (1..4_u8).prop_map(Act::Break),
        5 => Just(Act::Agents),
        3 => prop_oneof![Just(50), Just(150), Just(3000), Just(11_000)].prop_map(Act::Time),
        6 => Just(Act::Plan),
    ]
}

struct Fleet {
    w: World,
    queue: Queue,
}

impl Fleet {
    fn new() -> Self {
        let w = World::new(4);
        let queue = Queue::new(&w.view);
        let mut fleet = Self { w, queue };
        fleet.hear();
        fleet
    }

    /// What the pump does with news.
    fn hear(&mut self) {
        for change in std::mem::take(&mut self.w.log) {
            self.queue.changed(&self.w.view, &self.w.live, &change);
        }
        for moved in self.w.live.take_moved() {
            self.queue.moved(&self.w.view, &self.w.live, &moved);
        }
    }

    fn uid(&self, name: u8) -> Option<DeploymentUid> {
        let name = format!("app-{name}").parse().unwrap();
        self.w.view.deployment_by_name(&Default::default(), &name).map(|d| d.uid.clone())
    }

    fn edit_host(&mut self, n: u8, edit: impl FnOnce(&mut berth_proto::record::HostRecord)) {
        let uid: HostUid = format!("h{n}").parse().unwrap();
        if let Some(host) = self.w.view.host(&uid).filter(|h| !h.is_removed()) {
            let next = host.edited(edit).unwrap();
            self.w.change(vec![Change::PutHost(Arc::new(next))]);
        }
    }

    fn plan_all(&mut self) {
        for turn in 0.. {
            assert!(turn < 2000, "planning does not end");
            let now = self.w.now;
            let Some((key, why)) = self.queue.next(now.mono) else { break };
            assert_eq!(why, Why::Woken);
            let ids = &mut self.w.ids;
            let mut mint = || {
                *ids += 1;
                format!("r{:06}", *ids).parse().unwrap()
            };
            let (view, live) = (&self.w.view, &self.w.live);
            let plan = match &key {
                Key::Whole(uid) => planner::plan(view, live, uid, now, &mut mint),
                Key::OnHost(uid, host) => planner::plan_host(view, live, uid, host, now, &mut mint),
            };
            self.queue.planned(&key, &plan.report);
            self.w.live.set_clock(key.deployment(), plan.clock.clone());
            let before = (self.w.view.clone(), self.w.live.clone());
            self.w.change(plan.all_changes().cloned().collect());
            let step = audit::step((&before.0, &before.1), (&self.w.view, &self.w.live));
            assert_eq!(step, []);
            self.hear();
        }
    }

    fn carry_out(&mut self, act: &Act) {
        let at = self.w.now.mono;
        match act.clone() {
            Act::Apply { name, image, replicas, memory, zone, every, port } => {
                let mut spec = World::spec(&format!("image-{image}"));
                spec.replicas = (!every).then_some(replicas);
                spec.every_host = every;
                spec.resources = Some(api::Resources {
                    cpu_millis: 0,
                    memory_bytes: memory * (200 << 20),
                    gpu_memory_bytes: 0,
                });
                spec.placement = Some(api::Placement {
                    require: match zone {
                        0 => vec![],
                        1 => vec!["zone=a".into()],
                        _ => vec!["zone=b".into()],
                    },
                    spread: if image == 0 { "zone".into() } else { String::new() },
                });
                if port {
                    spec.ports = vec![api::Port {
                        name: "http".into(),
                        container: 80,
                        host_port: 8080,
                        bind: "127.0.0.1".into(),
                    }];
                }
                self.w.apply_as(&format!("app-{name}"), spec);
            }
            Act::Delete(name) => {
                if let Some(uid) = self.uid(name) {
                    let asked = crate::decide::Asked { actor: "user/test", now: self.w.now.wall };
                    let held = self.w.view.deployment(&uid).unwrap();
                    let gone = crate::decide::delete(held, &asked).unwrap();
                    self.w.change(gone.proposal.changes);
                }
            }
            Act::Away(n) => {
                let uid: HostUid = format!("h{n}").parse().unwrap();
                if self.w.live.is_present(&uid) {
                    self.w.presence(n.into(), Presence::Away(at));
                }
            }
            Act::Back(n) => self.w.presence(n.into(), Presence::Present),
            Act::Cordon(n, cordoned, draining) => self.edit_host(n, |r| {
                r.spec = Some(api::HostSpec { cordoned, draining });
            }),
            Act::Relabel(n, b) => self.edit_host(n, |r| {
                let zone = if b { "b" } else { "a" };
                r.meta.as_mut().unwrap().labels.insert("zone".into(), zone.into());
            }),
            Act::Join(n) => {
                let uid: HostUid = format!("h{n}").parse().unwrap();
                if self.w.view.host(&uid).is_none() {
                    self.w.host(n.into(), 1 << 30, "a");
                }
            }
            Act::Remove(n) => {
                self.edit_host(n, |r| r.removed = true);
                self.w.live.remove_host(&format!("h{n}").parse().unwrap());
            }
            Act::Break(release) => {
                if !self.w.broken.remove(&u64::from(release)) {
                    self.w.broken.insert(u64::from(release));
                }
            }
            Act::Agents => self.w.agents(),
            Act::Time(ms) => self.w.now.mono = at.plus_ms(ms),
            Act::Plan => self.plan_all(),
        }
        self.hear();
    }

    /// Everything that a full pass would change is in the queue.
    fn check(&self) {
        for deployment in self.w.view.deployments() {
            if self.queue.holds(&deployment.uid, self.w.now.mono) {
                continue;
            }
            let mut ids = 0;
            let mut mint = || {
                ids += 1;
                format!("x{ids}").parse().unwrap()
            };
            let plan =
                planner::plan(&self.w.view, &self.w.live, &deployment.uid, self.w.now, &mut mint);
            assert!(plan.is_empty(), "{} was not woken for {:?}", deployment.name, plan.steps);
        }
        self.w.audit();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_full_pass_would_change_is_woken(acts in prop::collection::vec(act(), 1..80)) {
        let mut fleet = Fleet::new();
        for act in &acts {
            fleet.carry_out(act);
            fleet.check();
        }
    }

    #[test]
    fn when_all_is_well_again_everything_settles_and_the_books_balance(
        acts in prop::collection::vec(act(), 1..60)
    ) {
        let mut fleet = Fleet::new();
        for act in &acts {
            fleet.carry_out(act);
        }
        fleet.w.broken.clear();
        for n in 0..6 {
            fleet.edit_host(n, |r| r.spec = None);
            fleet.w.presence(n.into(), Presence::Present);
        }
        for _ in 0..150 {
            fleet.plan_all();
            fleet.w.agents();
            fleet.w.now.mono = fleet.w.now.mono.plus_ms(200);
            fleet.hear();
        }
        fleet.plan_all();
        fleet.check();
        // A rollout that was halted waits for a person, with what it had; all others are done.
        let halted = |uid: &DeploymentUid| {
            let state = fleet.w.view.deployment(uid).map(|d| d.rollout());
            matches!(state, Some(api::RolloutState::Paused | api::RolloutState::Rolling))
        };
        let done = fleet.w.view.deployments().filter(|d| !halted(&d.uid));
        for deployment in done {
            let found = audit::deployment(&fleet.w.view, &fleet.w.live, &deployment.uid);
            prop_assert_eq!(found, vec![]);
        }
        // What runs is what is wanted; where a halted rollout left two that change places, the newer.
        let all = || fleet.w.view.replicas().filter(|r| r.runs() && !r.failed);
        let displaced: BTreeSet<&ReplicaUid> = all().filter_map(|r| r.replaces.as_ref()).collect();
        let wanted: BTreeSet<&ReplicaUid> =
            all().map(|r| &r.uid).filter(|uid| !displaced.contains(uid)).collect();
        let there: BTreeSet<&ReplicaUid> = fleet
            .w
            .running
            .iter()
            .filter(|(_, (host, ..))| !fleet.w.view.host(host).unwrap().is_removed())
            .map(|(uid, _)| uid)
            .collect();
        prop_assert_eq!(wanted, there);
    }
}

#[test]
fn freed_room_wakes_only_those_that_wait_for_room_and_fit() {
    let mut fleet = Fleet::new();
    let apply = |fleet: &mut Fleet, name, memory, zone| {
        fleet.carry_out(&Act::Apply {
            name,
            image: 1,
            replicas: 4,
            memory,
            zone,
            every: false,
            port: false,
        });
        fleet.plan_all();
    };
    // Four hosts of 1 GiB are full of the first; the second waits for room, the third for a label.
    apply(&mut fleet, 0, 4, 0);
    apply(&mut fleet, 1, 2, 0);
    fleet.edit_host(3, |r| {
        r.meta.as_mut().unwrap().labels.insert("zone".into(), "a".into());
    });
    fleet.edit_host(1, |r| {
        r.meta.as_mut().unwrap().labels.insert("zone".into(), "a".into());
    });
    fleet.hear();
    apply(&mut fleet, 2, 0, 2);
    assert!(fleet.queue.is_idle());
    let (second, third) = (fleet.uid(1).unwrap(), fleet.uid(2).unwrap());
    let victim = fleet.w.view.replicas_on(&"h0".parse().unwrap()).next().unwrap().uid.clone();
    fleet.w.change(vec![Change::DeleteReplica(victim)]);
    fleet.hear();
    let now = fleet.w.now.mono;
    assert!(fleet.queue.holds(&second, now));
    assert!(!fleet.queue.holds(&third, now));
    fleet.plan_all();
    fleet.edit_host(1, |r| {
        r.meta.as_mut().unwrap().labels.insert("zone".into(), "b".into());
    });
    fleet.hear();
    assert!(fleet.queue.holds(&third, now));
}

#[test]
fn one_host_of_many_costs_one_small_plan() {
    let mut fleet = Fleet::new();
    let every =
        Act::Apply { name: 0, image: 1, replicas: 0, memory: 1, zone: 0, every: true, port: false };
    fleet.carry_out(&every);
    for _ in 0..6 {
        fleet.plan_all();
        fleet.w.agents();
        fleet.w.now.mono = fleet.w.now.mono.plus_ms(200);
        fleet.hear();
    }
    fleet.plan_all();
    fleet.carry_out(&Act::Join(5));
    let uid = fleet.uid(0).unwrap();
    let woken = fleet.queue.next(fleet.w.now.mono);
    assert_eq!(woken, Some((Key::OnHost(uid, "h5".parse().unwrap()), Why::Woken)));
    assert!(fleet.queue.is_idle());
}

#[test]
fn room_wakes_a_slot_that_waits_for_its_turn_to_change_places() {
    let apply = |name, replicas, memory, every| Act::Apply {
        name,
        image: 0,
        replicas,
        memory,
        zone: u8::from(every && name == 2),
        every,
        port: false,
    };
    let mut fleet = Fleet::new();
    // The second release on h0 and h2 finds no room beside the first, and one may change places at a time:
    // that of h0, which goes away with it. Then the other deployment gives its room on h2 up.
    let acts = [
        apply(2, 0, 3, true),
        Act::Plan,
        Act::Agents,
        apply(1, 0, 1, true),
        Act::Plan,
        apply(1, 0, 0, false),
        apply(2, 0, 2, true),
        Act::Plan,
        Act::Away(0),
        Act::Plan,
        Act::Agents,
    ];
    for act in &acts {
        fleet.carry_out(act);
        fleet.check();
    }
    fleet.carry_out(&Act::Plan);
    let on_h2 = |r: &&Arc<Replica>| r.host.as_str() == "h2" && r.release.0 == 2;
    assert_eq!(fleet.w.view.replicas().filter(on_h2).count(), 1);
}

#[test]
fn an_orphan_that_ends_by_itself_lets_its_host_be_used_by_whoever_stayed_away() {
    let mut fleet = Fleet::new();
    let mut cluster = fleet.w.view.cluster.clone();
    (cluster.epoch, cluster.observing) = (5, true);
    fleet.w.change(vec![Change::PutCluster(cluster)]);
    for n in 0..6 {
        fleet.edit_host(n, |r| r.observed_epoch = 5);
    }
    // Of a deployment that the restored ledger has never had.
    let orphan = berth_proto::agent::ReplicaReport {
        replica_uid: "there".into(),
        deployment_uid: "gone".into(),
        release: 1,
        ..Default::default()
    };
    let host: HostUid = "h0".parse().unwrap();
    let found = crate::orphans::found(&fleet.w.view, &host, &[orphan], fleet.w.now.wall);
    fleet.w.change(found);
    let every =
        Act::Apply { name: 0, image: 1, replicas: 0, memory: 1, zone: 0, every: true, port: false };
    fleet.carry_out(&every);
    fleet.plan_all();
    let on_h0 = |fleet: &Fleet| fleet.w.view.replicas_on(&host).filter(|r| r.runs()).count();
    assert_eq!(on_h0(&fleet), 0);
    fleet.w.change(vec![Change::DeleteReplica("there".parse().unwrap())]);
    fleet.hear();
    fleet.check();
    fleet.plan_all();
    assert_eq!(on_h0(&fleet), 1);
}
