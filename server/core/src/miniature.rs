//! A cluster in miniature: views, live reports and plans, without anything that waits.

use crate::audit;
use crate::change::Change;
use crate::decide::{self, Asked, Wanted};
use crate::live::{Live, Presence};
use crate::objects::{Deployment, Host, Replica};
use crate::planner::{Plan, plan};
use crate::view::View;
use berth_proto::api::{self, ReplicaIntent};
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, ReleaseNumber, ReplicaUid, Wall};
use berth_proto::record::{HostRecord, Meta};
use berth_proto::values::{Phase, PlatformImage, ReplicaStatus, ResolvedImage, ResolvedSource};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(crate) struct World {
    pub(crate) view: View,
    pub(crate) live: Live,
    pub(crate) now: Now,
    pub(crate) ids: u32,
    /// Containers that run, by replica; what the hosts really have.
    pub(crate) running: BTreeMap<ReplicaUid, (HostUid, ReleaseNumber, u32)>,
    /// Releases of which nothing that was not ready before becomes so.
    pub(crate) broken: BTreeSet<u64>,
    pub(crate) most_at_once: usize,
    pub(crate) lowest_ready: usize,
    /// What was written, for the queue.
    pub(crate) log: Vec<Change>,
}

fn digest(text: &str) -> berth_proto::ids::Digest {
    berth_proto::ids::Digest::of(text.as_bytes())
}

impl World {
    pub(crate) fn new(hosts: u32) -> Self {
        let mut world = Self {
            view: View::default(),
            live: Live::default(),
            now: Now { mono: Mono(1000), wall: Wall(1_000_000) },
            ids: 0,
            running: BTreeMap::new(),
            broken: BTreeSet::new(),
            most_at_once: 0,
            lowest_ready: usize::MAX,
            log: Vec::new(),
        };
        for n in 0..hosts {
            world.host(n, 1 << 30, if n % 2 == 0 { "a" } else { "b" });
        }
        world
    }

    pub(crate) fn host(&mut self, n: u32, memory: u64, zone: &str) {
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
                container_network_reachable: true,
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

    pub(crate) fn change(&mut self, changes: Vec<Change>) {
        let revision = self.view.revision.next();
        for change in changes {
            self.view.apply(&change, revision);
            self.log.push(change);
        }
    }

    pub(crate) fn spec(image: &str) -> api::DeploymentSpec {
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

    pub(crate) fn apply(&mut self, spec: api::DeploymentSpec) -> api::ApplyAction {
        self.apply_as("d", spec)
    }

    pub(crate) fn apply_as(&mut self, name: &str, spec: api::DeploymentSpec) -> api::ApplyAction {
        let image = match &spec.source {
            Some(api::deployment_spec::Source::Image(image)) => image.clone(),
            Some(api::deployment_spec::Source::Model(_)) | None => String::new(),
        };
        let wanted = Wanted {
            name: name.parse().unwrap(),
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
                model_version: None,
            },
            resolved_words: format!("r@{}", digest(&image)),
        };
        let asked = Asked { actor: "user/test", now: self.now.wall };
        let decision = {
            // A uid is never used again, a name may be.
            self.ids += 1;
            let uid = if name == "d" { "d".to_owned() } else { format!("{name}-{}", self.ids) };
            decide::apply(&self.view, &wanted, uid.parse().unwrap(), &asked)
        };
        let Ok(decision) = decision else { return api::ApplyAction::Unspecified };
        self.change(decision.proposal.changes);
        decision.action
    }

    pub(crate) fn uid(&self) -> DeploymentUid {
        "d".parse().unwrap()
    }

    pub(crate) fn deployment(&self) -> &Arc<Deployment> {
        self.view.deployment(&self.uid()).unwrap()
    }

    pub(crate) fn plan(&mut self) -> Plan {
        let ids = &mut self.ids;
        let plan = plan(&self.view, &self.live, &"d".parse().unwrap(), self.now, &mut || {
            *ids += 1;
            format!("r{:05}", *ids).parse().unwrap()
        });
        self.live.set_clock(&"d".parse().unwrap(), plan.clock.clone());
        self.change(plan.all_changes().cloned().collect());
        self.audit();
        plan
    }

    pub(crate) fn report(&mut self, uid: &ReplicaUid, phase: Phase, ready: bool) {
        let status =
            ReplicaStatus { attempt: 1, phase: Some(phase), ready, ..ReplicaStatus::default() };
        self.live.take(uid, status, self.now.mono);
    }

    /// What agents in reach would do, and time.
    pub(crate) fn agents(&mut self) {
        let replicas: Vec<Arc<Replica>> = self.view.replicas().cloned().collect();
        for replica in replicas {
            if !self.live.is_present(&replica.host) {
                continue;
            }
            if replica.runs() {
                let here = (replica.host.clone(), replica.release, replica.slot);
                let was_ready = replica.first_ready.is_some();
                let ok = was_ready || !self.broken.contains(&replica.release.0);
                if let Some(old) = &replica.replaces {
                    if ok {
                        self.running.remove(old);
                        self.report(old, Phase::Exited, false);
                    } else {
                        let mut failed = Replica::clone(&replica);
                        failed.failed = true;
                        failed.reason = "not ready in time".into();
                        self.change(vec![Change::PutReplica(Arc::new(failed))]);
                        // What it displaced is started again in a moment.
                        self.report(old, Phase::Running, false);
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

    pub(crate) fn pass(&mut self, ms: u64) -> Plan {
        self.now.mono = self.now.mono.plus_ms(ms);
        let plan = self.plan();
        self.agents();
        plan
    }

    /// Until nothing changes any more.
    pub(crate) fn settle(&mut self) {
        for _ in 0..300 {
            let before = self.view.revision;
            self.pass(150);
            if self.view.revision == before && self.plan().is_empty() {
                return;
            }
        }
        panic!("it does not end");
    }

    pub(crate) fn releases_running(&self) -> Vec<u64> {
        let mut all: Vec<u64> = self.running.values().map(|(_, release, _)| release.0).collect();
        all.sort_unstable();
        all
    }

    pub(crate) fn presence(&mut self, n: u32, presence: Presence) {
        let uid: HostUid = format!("h{n}").parse().unwrap();
        self.live.edit_host(&uid, |h| h.presence = presence);
    }

    /// Nothing is wrong that a planning pass would not put right.
    pub(crate) fn audit(&self) {
        let mut found = audit::everything(&self.view, &self.live);
        found.retain(|finding| !finding.is_passing());
        assert_eq!(found, []);
    }
}
