//! People: what they ask for, as the API carries it out, and that they try again.

use super::events::{Event, NodeId};
use super::ledger::Waiter;
use super::script::{self, Action};
use super::specs;
use super::spool::Spool;
use super::world::World;
use berth_agent_core::ledger::Wanted;
use berth_proto::api::HostSpec;
use berth_proto::ids::{HostUid, Name, Namespace, Revision, Wall};
use berth_proto::record::{HostRecord, Meta};
use berth_server_core::batching::{Precondition, Proposal, Refusal};
use berth_server_core::change::Change;
use berth_server_core::decide::{self, Asked};
use berth_server_core::farewell::Ended as Over;
use berth_server_core::objects::{Deployment, Host};
use berth_server_core::orphans;
use berth_server_core::session::Input;
use berth_server_core::view::{ObjectKey, View};
use std::sync::Arc;

/// How often somebody tries again.
const TRIES: u32 = 12;

/// Something that is asked for.
#[derive(Debug, Clone)]
pub(super) struct Operation {
    pub(super) action: Action,
    tries: u32,
    /// Where it was sent.
    life: u32,
    pub(super) open: bool,
}

fn name(text: String) -> Name {
    #[expect(clippy::expect_used, reason = "a letter and a number are a name")]
    text.parse().expect("a name")
}

/// What a join of a machine comes to, as the API makes it.
pub(super) fn joined(
    host: u8,
    machine: &script::Machine,
    before: Option<&Host>,
    uid: &HostUid,
    instance: &str,
) -> HostRecord {
    let old = before.map(|h| h.record.clone()).unwrap_or_default();
    HostRecord {
        meta: Some(Meta {
            uid: uid.to_string(),
            name: format!("h{host}"),
            labels: old.meta.map(|m| m.labels).unwrap_or_else(|| zone(machine.zone)),
            ..Meta::default()
        }),
        spec: old.spec,
        instance: instance.to_owned(),
        facts: Some(specs::facts(machine)),
        waiting_for_approval: machine.approval && before.is_none(),
        ..HostRecord::default()
    }
}

fn zone(zone: u8) -> std::collections::BTreeMap<String, String> {
    [("zone".to_owned(), format!("z{zone}"))].into()
}

impl World<'_> {
    /// Somebody asks for something.
    pub(super) fn ask(&mut self, action: &Action) {
        let operation = self.operations.len();
        self.operations.push(Operation { action: action.clone(), tries: 0, life: 0, open: true });
        self.again(operation);
    }

    /// Asks, or asks again.
    pub(super) fn again(&mut self, operation: usize) {
        let life = self.server.life;
        let held = &mut self.operations[operation];
        if !held.open {
            return;
        }
        held.tries += 1;
        held.life = life;
        if held.tries > TRIES {
            held.open = false;
            return;
        }
        let action = held.action.clone();
        let Some(process) = &self.server.process else {
            return self.events.push(self.now + 2_000, Event::Again { operation });
        };
        let now = process.clock.now(self.now).wall;
        let view = process.machine.ahead().clone();
        match self.proposal(&view, &action, now) {
            Some(proposal) => {
                self.check_asked(&view, &action, &proposal);
                // A server that dies answers nobody.
                self.events.push(self.now + 20_000, Event::Again { operation });
                let at = self.now + self.a_moment_ms();
                let waiter = Waiter::Operation(operation);
                let proposal = Box::new(proposal);
                self.events.push(at, Event::Sent { life, waiter, proposal });
            }
            None => self.operations[operation].open = false,
        }
    }

    pub(super) fn operation_answered(
        &mut self,
        operation: usize,
        result: Result<Revision, Refusal>,
    ) {
        match result {
            Ok(revision) => {
                self.book.acknowledged = self.book.acknowledged.max(revision);
                let held = &mut self.operations[operation];
                held.open = false;
                let action = held.action.clone();
                self.note(|_| format!("done: {action}"));
                self.done(&action);
            }
            Err(_) => {
                let at = self.now + 1 + u64::from(self.operations[operation].tries) * 200;
                self.events.push(at, Event::Again { operation });
            }
        }
    }

    fn proposal(&mut self, view: &View, action: &Action, now: Wall) -> Option<Proposal> {
        let asked = Asked { actor: "user/a", now };
        let deployment = |n: &u8| -> Option<Arc<Deployment>> {
            view.deployment_by_name(&Namespace::default(), &name(format!("d{n}"))).cloned()
        };
        let host = |n: &u8| view.host_by_name(&format!("h{n}")).cloned();
        let decision = match action {
            Action::Apply { deployment, spec } => {
                self.minted += 1;
                let uid = name(format!("d{deployment}-{}", self.minted)).as_str().parse().ok()?;
                decide::apply(view, &specs::wanted(*deployment, spec), uid, &asked)
            }
            Action::Scale { deployment: d, replicas } => {
                decide::scale(&*deployment(d)?, *replicas, &asked)
            }
            Action::Restart { deployment: d } => decide::restart(view, &*deployment(d)?, &asked),
            Action::Undo { deployment: d } => {
                decide::undo(view, &*deployment(d)?, Default::default(), &asked)
            }
            Action::Delete { deployment: d } => decide::delete(&*deployment(d)?, &asked),
            Action::Cordon { host: h, on } => {
                return edited(&*host(h)?, |record| {
                    let draining = *on && record.spec.is_some_and(|s| s.draining);
                    record.spec = Some(HostSpec { cordoned: *on, draining });
                    record.waiting_for_approval &= *on;
                });
            }
            Action::Drain { host: h, on } => {
                return edited(&*host(h)?, |record| {
                    record.spec = Some(HostSpec { cordoned: true, draining: *on });
                });
            }
            Action::Relabel { host: h, zone: z } => {
                return edited(&*host(h)?, |record| {
                    if let Some(meta) = &mut record.meta {
                        meta.labels = zone(*z);
                    }
                });
            }
            Action::Remove { host: h, wipe } => {
                let host = host(h)?;
                let mut proposal = edited(&host, |record| {
                    record.removed = true;
                    record.wipe = *wipe;
                })?;
                proposal.changes.extend(orphans::forgotten_with(view, &host.uid));
                return Some(proposal);
            }
            Action::ReleaseQuarantine { host: h } => {
                return edited(&*host(h)?, |record| record.quarantined = false);
            }
            Action::Rejoin { host: h, .. } => return self.rejoin(*h, host(h)),
            Action::ResolveOrphans { host: h, adopt } => {
                let which: Vec<_> = view.orphans_on(&host(h)?.uid).cloned().collect();
                if which.is_empty() {
                    return None;
                }
                let done = if *adopt {
                    orphans::adopt(view, &which, &asked)
                } else {
                    orphans::release(&which)
                };
                let replicas = done.changes.iter().filter_map(Change::replica).cloned();
                let deployments = done.seen.iter().map(|d| ObjectKey::Deployment(d.uid.clone()));
                let preconditions = replicas
                    .map(ObjectKey::Replica)
                    .chain(deployments)
                    .map(|key| {
                        let at = view.revision_of(&key);
                        Precondition::At(key, at)
                    })
                    .collect();
                return Some(Proposal { preconditions, changes: done.changes });
            }
            Action::Backup
            | Action::Restore { .. }
            | Action::KillServer { .. }
            | Action::ServerDiskFull { .. }
            | Action::ServerDiskSlow { .. }
            | Action::ServerClock { .. }
            | Action::KillAgent { .. }
            | Action::Reboot { .. }
            | Action::CloneDisk { .. }
            | Action::EndClone { .. }
            | Action::Cut { .. }
            | Action::Partition { .. }
            | Action::SlowLink { .. }
            | Action::Doubles { .. }
            | Action::EngineAway { .. }
            | Action::EngineSlow { .. }
            | Action::EngineFails { .. }
            | Action::EngineLosesAnswers { .. }
            | Action::EngineLate { .. }
            | Action::EngineHangs { .. }
            | Action::EngineRestarts { .. }
            | Action::ContainerRenamed { .. }
            | Action::PortTaken { .. }
            | Action::NetworkUnreached { .. }
            | Action::Upgrade { .. }
            | Action::HostRate { .. }
            | Action::ContainerEnds { .. }
            | Action::ContainerRemoved { .. }
            | Action::ContainerStartedByHand { .. }
            | Action::Sick { .. }
            | Action::FollowEnds { .. }
            | Action::RegistryAway { .. }
            | Action::RegistryTroubled { .. }
            | Action::ChunkRots { .. }
            | Action::ImagesPruned { .. }
            | Action::AgentDiskFull { .. }
            | Action::HostClock { .. } => return None,
        };
        decision.ok().map(|decision| decision.proposal)
    }

    fn rejoin(&mut self, host: u8, before: Option<Arc<Host>>) -> Option<Proposal> {
        // A story may have been left with fewer machines than its script speaks of.
        let machine = *self.script.machines.get(usize::from(host))?;
        self.minted += 1;
        let instance = format!("i{}", self.minted);
        let uid = match &before {
            Some(host) => host.uid.clone(),
            None => format!("h{host}-{}", self.minted).parse().ok()?,
        };
        let record = joined(host, &machine, before.as_deref(), &uid, &instance);
        let key = ObjectKey::HostName(name(format!("h{host}")));
        let at = before.map(|h| h.revision).unwrap_or_default();
        let put = Change::PutHost(Arc::new(Host::new(record).ok()?));
        Some(Proposal { preconditions: vec![Precondition::At(key, at)], changes: vec![put] })
    }

    /// What the API does after a write.
    fn done(&mut self, action: &Action) {
        let view = match &self.server.process {
            Some(process) => process.machine.durable().clone(),
            None => return,
        };
        match action {
            Action::Remove { host, wipe } => {
                let uid = self.nodes[self.machine(*host)].uid.clone();
                for link in self.links_of(&uid) {
                    self.server_input(link, Input::Removed { wipe: *wipe });
                }
                self.edit_live(|live, _, _| live.remove_host(&uid));
                self.book.present.remove(&uid);
            }
            Action::ReleaseQuarantine { host } => {
                let uid = self.nodes[self.machine(*host)].uid.clone();
                if let Some(process) = self.server.process.as_mut() {
                    process.desk.forget_boots(&uid);
                    self.book.boots.remove(&uid);
                }
                for link in self.links_of(&uid) {
                    self.order(link, Over::Superseded);
                }
            }
            Action::Rejoin { host, disk_kept } => {
                let Some(record) = view.host_by_name(&format!("h{host}")) else { return };
                let node = self.machine(*host);
                self.joins(node, record.uid.clone(), &record.record.instance, *disk_kept);
            }
            _ => {}
        }
    }

    /// The machine's agent begins anew, with what its join has given it.
    fn joins(&mut self, node: NodeId, uid: HostUid, instance: &str, disk_kept: bool) {
        self.kill_agent(node, 100);
        let held = &mut self.nodes[node];
        held.uid = uid;
        let disk = &mut held.disk;
        disk.instance = instance.to_owned();
        (disk.removed, disk.wipe) = (false, false);
        self.book.joined.insert(node, held.life);
        // A join forgets what an earlier one was told.
        self.book.made.retain(|(of, ..)| *of != node);
        disk.wanted = Wanted::NotYetKnown;
        disk.memory.clear();
        self.book.begun.retain(|(of, _), _| *of != node);
        self.book.failures.retain(|(of, _), _| *of != node);
        disk.start = 0;
        if disk_kept {
            // The cluster's containers are the new join's to keep or to remove.
            let replicas = held.engine.containers.values().map(|c| c.shown.replica.clone());
            self.book.may_stop.extend(replicas);
            self.book.loose.insert(node);
        } else {
            held.engine.containers.clear();
            held.engine.images.clear();
            held.spool = Spool::default();
        }
    }
}

fn edited(host: &Host, edit: impl FnOnce(&mut HostRecord)) -> Option<Proposal> {
    let key = ObjectKey::Host(host.uid.clone());
    let next = host.edited(edit).ok()?;
    Some(Proposal {
        preconditions: vec![Precondition::At(key, host.revision)],
        changes: vec![Change::PutHost(Arc::new(next))],
    })
}
