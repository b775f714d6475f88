//! What must hold at every step, asked of the world and not of the machines that make it.

use super::agent::Node;
use super::events::{Life, LinkId, NodeId};
use super::fit;
use super::rollouts::Rollouts;
use super::script::Program;
use super::world::World;
use berth_proto::agent::SetVerdict;
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{
    DeploymentUid, HostUid, Now, ReleaseNumber, ReplicaUid, Revision, SetNumber,
};
use berth_proto::values::Resources;
use berth_server_core::audit::{self, Finding};
use berth_server_core::change::Change;
use berth_server_core::live::Live;
use berth_server_core::objects::{Host, Replica};
use berth_server_core::round::Sent;
use berth_server_core::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A full audit is made after so many durable groups.
const FULL_EVERY: u64 = 200;

/// A disk that did not take a set is left alone for so long, by a clock that runs too fast.
const OFFERED_MS: u64 = 4_000;

/// A container has begun to run.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) node: NodeId,
    pub(super) replica: ReplicaUid,
    pub(super) starts: u32,
}

/// What the world remembers, to hold others to it.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// Replicas that somebody has durably said may stop.
    pub(super) may_stop: BTreeSet<ReplicaUid>,
    /// Containers of these were started by somebody else.
    pub(super) by_hand: BTreeSet<ReplicaUid>,
    /// Since when no set of a machine names these, which have containers there.
    pub(super) unwanted: BTreeMap<(NodeId, ReplicaUid), u64>,
    /// Containers whose removal was asked for while no set named their replica.
    pub(super) put_away: BTreeSet<(NodeId, String)>,
    /// Two machines share, or have shared, this identity.
    pub(super) cloned: BTreeSet<HostUid>,
    /// The newest revision that was acknowledged to anybody.
    pub(super) acknowledged: Revision,
    /// The newest durable view, as the server published it.
    pub(super) durable: Option<View>,
    /// The newest session of a host that has said hello.
    pub(super) hello: BTreeMap<HostUid, u64>,
    /// The newest session of a host whose hello is kept.
    pub(super) newest: BTreeMap<HostUid, u64>,
    /// Statuses that are durably kept: connection and sequence.
    kept: BTreeSet<(LinkId, u64)>,
    /// Statuses of each connection that the server has read.
    pub(super) taken: BTreeMap<LinkId, BTreeSet<u64>>,
    /// The join of which each host has said hello last.
    pub(super) instances: BTreeMap<HostUid, String>,
    /// Hosts of which a session counts.
    pub(super) present: BTreeSet<HostUid>,
    groups: u64,
    /// Every attempt that was made on a machine, since its disk was new.
    pub(super) made: BTreeSet<(NodeId, ReplicaUid, u32)>,
    /// Machines that run what nobody has asked their room for: it is of a join before this one.
    pub(super) loose: BTreeSet<NodeId>,
    /// The first life of each machine's agent since its newest join.
    pub(super) joined: BTreeMap<NodeId, Life>,
    /// The server has gone back in time: what runs was not all placed by it.
    pub(super) restored: bool,
    /// Somebody removed images.
    pub(super) pruned: bool,
    /// The boots of each host that have said hello, since the server's start.
    pub(super) boots: BTreeMap<HostUid, Vec<String>>,
    /// Rollouts under way.
    pub(super) rollouts: Rollouts,
    /// When a machine's agent began to put one in another's place; `None`: nobody knows.
    pub(super) begun: BTreeMap<(NodeId, ReplicaUid), Option<u64>>,
    /// Failures in a row of a machine's programs, as far as they may be known to its agent.
    pub(super) failures: BTreeMap<(NodeId, ReplicaUid), u32>,
    /// The attempt whose end was the last that was counted there.
    pub(super) counted: BTreeMap<(NodeId, ReplicaUid), u32>,
    /// Somebody removed a container of these.
    pub(super) removed: BTreeSet<ReplicaUid>,
    /// Hosts that somebody asked to remove, with and without a wipe.
    pub(super) wipes: BTreeMap<HostUid, BTreeSet<bool>>,
    /// Where each replica was placed first: its slot, its release and its host.
    placed: BTreeMap<ReplicaUid, (u32, ReleaseNumber, HostUid)>,
    /// Found after a restore by a host that knew its slot no more.
    slotless: BTreeSet<ReplicaUid>,
    /// The greatest epoch so far.
    pub(super) epoch: u64,
    /// The ledger was turned back since the server's last start.
    pub(super) turned: bool,
}

/// What something is, without what it holds.
pub(super) fn word(of: &impl std::fmt::Debug) -> String {
    format!("{of:?}").chars().take_while(|c| c.is_alphanumeric()).collect()
}

impl World<'_> {
    /// The first thing that is broken ends the run.
    pub(super) fn broke(&mut self, what: String) {
        if self.broken.is_none() {
            self.broken = Some(what);
        }
    }

    fn found(&mut self, findings: impl IntoIterator<Item = Finding>) {
        if let Some(finding) = findings.into_iter().find(|f| !f.is_passing()) {
            self.broke(finding.to_string());
        }
    }

    // ---- the engine's side ----

    /// A container is about to be made.
    pub(super) fn check_made(&mut self, node: NodeId, replica: &ReplicaUid, attempt: u32) {
        // A restored ledger may want again what was gone already.
        let again = !self.book.made.insert((node, replica.clone(), attempt));
        if again && !self.book.restored {
            return self.broke(format!("attempt {attempt} of {replica} is made twice"));
        }
        // One that is to be stopped for another may end by itself before the stop comes: who ended it is known
        // to nobody, and it may come back at once.
        let stopped = |stopping: u32| stopping != 0 && stopping == attempt.saturating_sub(1);
        let put_down =
            self.nodes[node].disk.memory.get(replica).is_some_and(|m| stopped(m.stopping));
        let ended = self.ended(node, replica, attempt.saturating_sub(1)).filter(|_| !put_down);
        // A second by a clock that runs too fast.
        let by_hand = self.book.by_hand.contains(replica);
        if !by_hand && ended.is_some_and(|ended| self.now - ended < 800) {
            return self
                .broke(format!("attempt {attempt} of {replica} follows the last one at once"));
        }
        self.check_again(node, replica, attempt);
    }

    pub(super) fn check_started(&mut self, started: &Started) {
        let replica = &started.replica;
        let held = &self.nodes[started.node];
        if self.book.by_hand.contains(replica) {
            return;
        }
        if started.starts > 1 {
            return self.broke(format!("a container of {replica} is started again"));
        }
        if self.book.cloned.contains(&held.uid) {
            return;
        }
        let runs = self.nodes.iter().flat_map(|n| n.engine.running());
        let count = runs.filter(|c| c.shown.replica == *replica).count();
        if count > 1 {
            return self.broke(format!("{count} containers of {replica} run"));
        }
        let asked = !self.book.restored && !self.book.loose.contains(&started.node);
        if let Some(have) = &held.facts.capacity
            && asked
            && self.book.by_hand.is_empty()
        {
            let sum = |part: fn(&Resources) -> u64| -> u64 {
                held.engine.running().map(|c| part(&c.resources)).sum()
            };
            for (what, used, have) in [
                ("memory", sum(|r| r.memory_bytes), have.memory_bytes),
                ("cpu", sum(|r| r.cpu_millis), have.cpu_millis),
                ("GPU memory", sum(|r| r.gpu_memory_bytes), have.gpu_memory_bytes),
            ] {
                if used > have {
                    let words = format!("what runs on {} takes {used} of {have}", held.uid);
                    return self.broke(format!("{words} of its {what}"));
                }
            }
        }
        let set = held.agent.as_ref().and_then(|a| a.board.wanted.set().cloned());
        let Some(set) = set else {
            return self.broke(format!("{replica} is started and nobody has said what is wanted"));
        };
        // Neither beside its predecessor nor beside its successor.
        let old =
            |uid: &ReplicaUid| set.entries.get(uid).and_then(berth_agent_core::diff::predecessor);
        let new = set.entries.keys().find(|uid| old(uid).as_ref() == Some(replica)).cloned();
        for other in old(replica).into_iter().chain(new) {
            let beside = held.engine.running().any(|c| c.shown.replica == other);
            if beside && !self.book.by_hand.contains(&other) {
                return self.broke(format!("{replica} runs beside {other}, which it replaces"));
            }
        }
    }

    /// A running container was stopped as an agent had asked, and so many others of its replica run on
    /// here.
    pub(super) fn check_stopped(
        &mut self,
        (node, life): (NodeId, Life),
        replica: &ReplicaUid,
        (program, ill_ms): (Program, u64),
        others: usize,
    ) {
        let held = &self.nodes[node];
        // The agent of a join before this one asked for it, and what that one was told is forgotten.
        let earlier = self.book.joined.get(&node).is_some_and(|first| life < *first);
        if earlier && self.book.may_stop.contains(replica) {
            return;
        }
        let Some(set) = held.disk.wanted.set() else {
            return self.broke(format!("{replica} is stopped and nobody has said what is wanted"));
        };
        let by_successor = |uid: &&ReplicaUid| {
            let old = set.entries.get(*uid).and_then(berth_agent_core::diff::predecessor);
            old.as_ref() == Some(replica)
        };
        let source = |uid: &ReplicaUid| Some(&set.body(set.entries.get(uid)?)?.value.source);
        let unhealthy = matches!(program, Program::Deaf | Program::Slow);
        // One that fails its own check is started anew in its place, as long as nobody takes that.
        let begun = |uid: &ReplicaUid| {
            held.disk.memory.get(uid).is_some_and(|memory| memory.replacement_begun)
        };
        if set.entries.contains_key(replica)
            && !self.book.pruned
            && !self.book.by_hand.contains(replica)
            && let Some(successor) = set.entries.keys().find(by_successor)
            && (begun(successor) || !unhealthy)
            && let Some(source) = source(successor)
            && !(held.engine.images.contains(&source.image.digest)
                && source.artifact.as_ref().is_none_or(|model| held.spool.has_tree(&model.digest)))
        {
            return self.broke(format!("{replica} is stopped before what replaces it is here"));
        }
        if self.book.may_stop.contains(replica) || self.book.by_hand.contains(replica) {
            return;
        }
        let wiped = held.disk.removed && held.disk.wipe;
        let replaces =
            |uid: &ReplicaUid| set.entries.get(uid).and_then(berth_agent_core::diff::predecessor);
        let in_exchange = replaces(replica).is_some()
            || set.entries.keys().any(|uid| replaces(uid).as_ref() == Some(replica));
        if wiped || others > 0 {
            return;
        }
        if in_exchange {
            // Which of the two gives way is durable before one is stopped for the other.
            let failed = |uid: &ReplicaUid| {
                held.disk.memory.get(uid).is_some_and(|memory| memory.rolled_back)
            };
            let gives_way = set.entries.keys().find(by_successor).is_some_and(begun);
            if !gives_way && !failed(replica) && !unhealthy {
                let words = format!("{replica} is stopped for another one before");
                self.broke(format!("{words} that is durable on {}", held.uid));
            }
            return;
        }
        if !unhealthy {
            let on = held.uid.clone();
            return self.broke(format!("{replica} is stopped on {on} and nobody has said so"));
        }
        let entry = set.entries.get(replica).and_then(|entry| set.body(entry));
        let after = entry.and_then(|body| body.value.spec.health.as_ref()?.restart_after_ms);
        if after.is_none_or(|after| ill_ms < after * 9 / 10) {
            let words = format!("{replica} is stopped for not answering for {ill_ms} ms");
            self.broke(format!("{words}, and its check says {after:?}"));
        }
    }

    // ---- the server's side ----

    /// What is about to be proposed keeps what serves.
    pub(super) fn check_plan(&mut self, before: &View, live: &Live, sent: &Sent, now: Now) {
        let mut view = before.clone();
        for proposal in &sent.proposals {
            let revision = view.revision.next();
            for change in &proposal.changes {
                if let Change::PutDeployment(deployment) = change {
                    self.check_verdict(before, live, deployment, now.mono);
                }
                view.apply(change, revision);
            }
            self.check_at_once(before, &view, live, &sent.uid);
            let found = audit::floor(before, &view, live, &sent.uid, now.mono);
            self.found(found);
            self.found(audit::placed(before, &view, live, &sent.uid, &proposal.changes, now.mono));
        }
    }

    /// The first replicas of a deployment, where there is room for all of them anywhere, are spread as
    /// evenly over the values of its label as can be.
    pub(super) fn check_spread(&mut self, view: &View, live: &Live, sent: &Sent) {
        let Some(deployment) = view.deployment(&sent.uid) else { return };
        let Some(key) = &deployment.spec.placement.spread else { return };
        let Some(release) = view.release(&sent.uid, deployment.release()) else { return };
        let wanted = deployment.wanted().unwrap_or_default() as usize;
        let changes = sent.proposals.iter().flat_map(|proposal| &proposal.changes);
        let placed: Vec<&HostUid> = changes
            .filter_map(|change| match change {
                Change::PutReplica(replica) if replica.runs() => Some(&replica.host),
                _ => None,
            })
            .collect();
        if placed.len() != wanted || view.replicas_of(&sent.uid).next().is_some() {
            return;
        }
        let hosts: Vec<_> =
            view.hosts().filter(|h| fit::suits(live, deployment, release, h)).collect();
        if !hosts.iter().all(|host| fit::has_room_for(view, host, release, wanted as u64)) {
            return;
        }
        let mut values: BTreeMap<Option<&String>, usize> =
            hosts.iter().map(|host| (host.labels.get(key), 0)).collect();
        for host in hosts.iter().filter(|host| placed.contains(&&host.uid)) {
            let here = placed.iter().filter(|uid| **uid == &host.uid).count();
            *values.entry(host.labels.get(key)).or_default() += here;
        }
        let (most, least) = (values.values().max(), values.values().min());
        if most.zip(least).is_some_and(|(most, least)| most - least > 1) {
            self.broke(format!("{} is spread over {key} as {values:?}", sent.uid));
        }
    }

    /// A group is durable.
    pub(super) fn check_published(&mut self, view: &View, changes: &[(Revision, Change)]) {
        self.book.groups += 1;
        let before = self.book.durable.replace(view.clone()).unwrap_or_default();
        let mut hosts: BTreeSet<HostUid> = BTreeSet::new();
        let mut deployments: BTreeSet<DeploymentUid> = BTreeSet::new();
        let mut found = Vec::new();
        let mut then = before.clone();
        for (revision, change) in changes {
            found.extend(audit::change(&before, view, change));
            self.check_one(&then, change);
            then.apply(change, *revision);
            match change {
                Change::PutReplica(replica) => {
                    hosts.insert(replica.host.clone());
                    deployments.insert(replica.deployment.clone());
                    if replica.intent == ReplicaIntent::Stop {
                        self.book.may_stop.insert(replica.uid.clone());
                    }
                    self.book.may_stop.extend(replica.replaces.clone());
                }
                Change::DeleteReplica(uid) => {
                    let wanted = before.replica(uid).filter(|r| r.runs());
                    let there =
                        |r: &&Arc<Replica>| view.host(&r.host).is_some_and(|h| !h.is_removed());
                    let stopped = self.book.may_stop.contains(uid);
                    if wanted.filter(there).is_some() && !stopped {
                        self.broke(format!("{uid} is wanted and forgotten"));
                    }
                    self.book.may_stop.insert(uid.clone());
                }
                Change::PutHost(host) => {
                    hosts.insert(host.uid.clone());
                }
                Change::PutDeployment(deployment) => {
                    self.book.rollouts.written(deployment);
                    deployments.insert(deployment.uid.clone());
                }
                _ => {}
            }
        }
        let Some(process) = &self.server.process else { return };
        if self.book.groups.is_multiple_of(FULL_EVERY) {
            found.extend(audit::everything(view, &process.live));
        } else {
            found.extend(hosts.iter().flat_map(|uid| audit::host(view, uid)));
            let live = &process.live;
            found.extend(deployments.iter().flat_map(|uid| audit::deployment(view, live, uid)));
        }
        self.found(found);
    }

    /// One change, to what was before it.
    fn check_one(&mut self, before: &View, change: &Change) {
        match change {
            Change::PutReplica(replica) => {
                let uid = &replica.uid;
                let mut place = (replica.slot, replica.release, replica.host.clone());
                let of_set = |node: &Node| {
                    node.disk.wanted.set().is_some_and(|set| set.entries.contains_key(uid))
                };
                // The slot of what no set names any more is not known on its host, nor on that one of two
                // copies of a disk that has lost its set.
                let found = replica.found_body.is_some()
                    && self.nodes.iter().any(|node| node.uid == replica.host && !of_set(node));
                let orphan = |r: &Arc<Replica>| r.intent == ReplicaIntent::Orphan;
                if found || before.replica(uid).is_some_and(orphan) {
                    // Nor when it is adopted, into one that is free.
                    self.book.slotless.insert(uid.clone());
                }
                if let Some(known) = self.book.placed.get(uid) {
                    if self.book.slotless.contains(uid) {
                        place.0 = known.0;
                    }
                    // Its machine may have joined as another host, which a restore has undone.
                    if self.book.restored {
                        place.2 = known.2.clone();
                    }
                }
                if self.book.placed.entry(uid.clone()).or_insert_with(|| place.clone()) != &place {
                    return self.broke(format!("{uid} is in another place than it was given"));
                }
                let takes_none = |host: &Host| host.is_removed() || fit::is_shut(host);
                let shut = before.host(&replica.host).is_none_or(|host| takes_none(host));
                if replica.runs() && before.replica(uid).is_none() && shut {
                    self.broke(format!("{uid} is placed on {}, which takes none", replica.host));
                }
            }
            Change::DeleteReplica(uid) => {
                let Some(host) = before.replica(uid).map(|replica| replica.host.clone()) else {
                    return;
                };
                let there = before.host(&host).is_some_and(|host| !host.is_removed());
                let runs = |(id, node): (NodeId, &Node)| {
                    node.uid == host
                        && !self.book.joined.contains_key(&id)
                        && node.engine.running().any(|made| made.shown.replica == *uid)
                };
                let known = !self.book.cloned.contains(&host) && !self.book.by_hand.contains(uid);
                if there && known && self.nodes.iter().enumerate().any(runs) {
                    self.broke(format!("{uid} is forgotten and runs on {host}"));
                }
            }
            _ => {}
        }
    }

    /// The server has started from this.
    pub(super) fn check_loaded(&mut self, view: &View) {
        if view.revision < self.book.acknowledged {
            let words = format!(
                "revision {} was acknowledged and is lost: the ledger ends at {}",
                self.book.acknowledged, view.revision
            );
            return self.broke(words);
        }
        let live = Live::default();
        self.found(audit::everything(view, &live));
        let (epoch, turned) = (view.epoch().0, std::mem::take(&mut self.book.turned));
        if epoch < self.book.epoch || (turned && epoch == self.book.epoch) {
            return self.broke(format!("epoch {epoch} is taken again"));
        }
        self.book.epoch = epoch;
        // What was durable and not told of before the server died.
        let stopping = view.replicas().filter(|r| r.intent == ReplicaIntent::Stop);
        self.book.may_stop.extend(stopping.map(|r| r.uid.clone()));
        self.book.may_stop.extend(view.replicas().filter_map(|r| r.replaces.clone()));
        if let Some(durable) = &self.book.durable {
            let gone = durable.replicas().filter(|r| view.replica(&r.uid).is_none());
            self.book.may_stop.extend(gone.map(|r| r.uid.clone()));
        }
        self.book.rollouts.restarted();
        self.book.newest.clear();
        self.book.present.clear();
        self.book.hello.clear();
        self.book.boots.clear();
        // What was published is the same after it was written and read.
        let Some(durable) = self.book.durable.replace(view.clone()) else { return };
        if durable.revision == view.revision {
            let replicas = durable.replicas().eq(view.replicas());
            let hosts = durable.hosts().eq(view.hosts());
            let deployments = durable.deployments().eq(view.deployments());
            let releases = durable
                .deployments()
                .all(|d| durable.releases_of(&d.uid).eq(view.releases_of(&d.uid)));
            let generations =
                durable.hosts().all(|h| durable.generation(&h.uid) == view.generation(&h.uid));
            for (same, what) in [
                (replicas, "replicas"),
                (hosts, "hosts"),
                (deployments, "deployments"),
                (releases, "releases"),
                (generations, "generations"),
            ] {
                if !same {
                    self.broke(format!("{what} are others after they were written and read"));
                }
            }
        } else if durable.revision > view.revision {
            self.broke("what was published was not durable".to_owned());
        }
    }

    /// A hello is welcome. Asked when it is judged: a quarantine that is ended before it is kept is ended
    /// for this boot, too.
    pub(super) fn check_boot(&mut self, host: &HostUid, boot: &str) {
        let boots = self.book.boots.entry(host.clone()).or_default();
        if boots.last().is_none_or(|last| last != boot) {
            if boots.iter().any(|known| known == boot) {
                return self.broke(format!("two boots of {host} take the session from each other"));
            }
            boots.push(boot.to_owned());
        }
    }

    /// A session's hello is kept, and its host counts as present.
    pub(super) fn check_registered(&mut self, host: &HostUid, session: u64) {
        let newest = self.book.newest.entry(host.clone()).or_insert(session);
        let hello = self.book.hello.get(host).copied().unwrap_or_default();
        if *newest > session || hello > session {
            return self
                .broke(format!("a session of {host} counts though a newer one has said hello"));
        }
        *newest = session;
    }

    /// Statuses of this session are taken for true.
    pub(super) fn check_believed(&mut self, host: &HostUid, session: u64) {
        if self.book.newest.get(host) != Some(&session) {
            self.broke(format!("a status of {host} is believed of a session that does not count"));
        }
    }

    /// Statuses of a host are kept, and the durable view lacks this of them.
    pub(super) fn check_kept_whole(&mut self, host: &HostUid, lacks: &[Change]) {
        // What is gone may have become forgettable only since; no other state of a replica goes back.
        if lacks.iter().any(|change| matches!(change, Change::PutReplica(_))) {
            self.broke(format!("statuses of {host} are taken for kept and are not durable"));
        }
    }

    pub(super) fn check_kept(&mut self, link: LinkId, sequence: u64) {
        self.book.kept.insert((link, sequence));
    }

    /// The agent hears that its statuses are kept.
    pub(super) fn kept(&mut self, link: LinkId, sequence: u64) {
        let doubled = self.links[link].doubled;
        // Whoever acknowledges one acknowledges all before it.
        let taken = self.book.taken.get(&link).into_iter().flat_map(|all| all.range(..=sequence));
        let unkept = taken.copied().find(|of| !self.book.kept.contains(&(link, *of)));
        let told = self.book.kept.contains(&(link, sequence));
        if let Some(sequence) = unkept.or((!told).then_some(sequence))
            && !doubled
        {
            let node = &self.nodes[self.links[link].node];
            self.broke(format!("status {sequence} of {} is acknowledged and not kept", node.uid));
        }
    }

    /// The server begins to send a set.
    pub(super) fn check_offered(&mut self, link: LinkId) {
        let soon = |at: u64| self.now < at + OFFERED_MS;
        if self.links[link].not_durable.is_some_and(soon) {
            let node = &self.nodes[self.links[link].node];
            self.broke(format!("{} is sent a set at once that its disk did not take", node.uid));
        }
        if std::mem::replace(&mut self.links[link].unanswered, true) {
            let node = &self.nodes[self.links[link].node];
            self.broke(format!("{} is sent a set before it has answered the last one", node.uid));
        }
    }

    /// The server believes that a set is durable there.
    pub(super) fn check_acknowledged(&mut self, link: LinkId, number: SetNumber) {
        let node = &self.nodes[self.links[link].node];
        let held = node.disk.wanted.set().map(|s| s.number);
        let alone =
            !self.book.cloned.contains(&node.uid) && node.life == self.links[link].agent_life;
        if alone && held.is_none_or(|held| held < number) && !node.disk.removed {
            self.broke(format!("{} has acknowledged a set that it does not hold", node.uid));
        }
    }

    /// The agent refused a set.
    pub(super) fn check_refused(
        &mut self,
        link: LinkId,
        offered: SetNumber,
        held: Option<SetNumber>,
        verdict: SetVerdict,
    ) {
        let node = &self.nodes[self.links[link].node];
        let told = match verdict {
            SetVerdict::NotDurable => {
                self.links[link].not_durable = Some(self.now);
                return;
            }
            SetVerdict::Broken if self.links[link].doubled => return,
            SetVerdict::Changed | SetVerdict::Older if self.book.cloned.contains(&node.uid) => {
                return;
            }
            SetVerdict::Taken | SetVerdict::Same => "though it took it",
            SetVerdict::Broken => "because it is not whole",
            SetVerdict::Changed => "because it holds another of that number",
            SetVerdict::Older => "because it holds a newer one",
            SetVerdict::Unspecified => "for no reason",
        };
        let uid = node.uid.clone();
        self.broke(format!("{uid} refuses set {offered:?} {told}; it holds {held:?}"));
    }
}
