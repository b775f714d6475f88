//! After the faults: everything wanted runs, nothing else does, and the books balance, within a bound.

use super::agent::{Agent, Node};
use super::engine::Made;
use super::fit;
use super::operator::Operation;
use super::script::{Action, Program};
use super::server::Process;
use super::world::World;
use berth_agent_core::diff::State;
use berth_proto::api::{ReplicaIntent, RolloutState};
use berth_proto::ids::{DeploymentUid, ReplicaUid};
use berth_proto::values::OnRolloutFailure;
use berth_server_core::audit::{self, Finding};
use berth_server_core::live::Live;
use berth_server_core::objects::{Deployment, Host, Replica};
use berth_server_core::planner::{self, Report};
use berth_server_core::view::View;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The bound: a quarantined agent dials every five minutes; a set that nobody answers ends its session
/// after ten; then come a rollout's deadline, and another one back.
const WITHIN_MS: u64 = 2_400_000;
/// So long nothing moves.
const QUIET_MS: u64 = 600_000;
/// In one of so many seeds that is waited for.
const QUIET_EVERY: u64 = 8;
/// What a fault has left behind, as a dead connection or an engine that is asked again seldom, is over
/// by then.
const CALM_MS: u64 = 400_000;
/// How often it is looked whether all is well.
const LOOK_MS: u64 = 1_000;

/// What people are told of its deployment.
fn report_of<'a>(process: &'a Process, replica: &Replica) -> Option<&'a Report> {
    process.planner.reports.get(&replica.deployment)
}

/// Nothing more becomes of it for now: its rollout stands still, or there is no room elsewhere.
fn is_over(report: Option<&Report>, view: &View, replica: &Replica) -> bool {
    let held = view.deployment(&replica.deployment);
    report.is_some_and(|report| !report.pending.is_empty())
        || held.is_none_or(|held| held.rollout() == RolloutState::Paused)
}

/// A place that a deployment has not filled, though a host has room for it.
fn unfilled(view: &View, live: &Live, deployment: &Deployment) -> Option<String> {
    let uid = &deployment.uid;
    let release = view.release(uid, deployment.release()).filter(|_| !deployment.is_deleted())?;
    let mine: Vec<_> = view.replicas_of(uid).filter(|r| r.runs()).collect();
    let fits = |host: &&Arc<Host>| {
        fit::suits(live, deployment, release, host) && fit::has_room(view, host, release)
    };
    match deployment.wanted() {
        Some(wanted) => {
            // What was found on a host that never comes back is decided about by nobody.
            let held = |r: &&Arc<Replica>| r.intent == ReplicaIntent::Orphan;
            let found = view.replicas_of(uid).filter(held).map(|r| r.slot);
            let filled: BTreeSet<u32> = mine.iter().map(|r| r.slot).chain(found).collect();
            let empty = (0..wanted).find(|slot| !filled.contains(slot))?;
            let host = view.hosts().find(fits)?;
            Some(format!("{uid} has nothing in slot {empty}, and {} has room", host.uid))
        }
        None => {
            let lacks = |host: &&Arc<Host>| mine.iter().all(|r| r.host != host.uid);
            let host = view.hosts().filter(lacks).find(fits)?;
            Some(format!("{uid} has nothing on {}, which has room", host.uid))
        }
    }
}

impl World<'_> {
    /// Faults end; people put right what only people can.
    pub(super) fn settle(&mut self) {
        self.note(|_| "nothing goes wrong from here on".to_owned());
        self.faults_end();
        let until = self.now + WITHIN_MS;
        let mut wrong = None;
        let mut next = LOOK_MS;
        while self.now < until {
            self.people_mend();
            let at = self.now + next;
            if !self.run_until(at) {
                return;
            }
            if let Some(uid) = self.never_started_anew(until - WITHIN_MS) {
                let words = format!("{uid} does not answer, and its check does not start it anew");
                return self.broke(words);
            }
            self.check_brings(until - WITHIN_MS);
            if self.broken.is_some() {
                return;
            }
            wrong = self.wrong();
            if wrong.is_none() {
                self.full_audit();
                return self.quiet();
            }
            next = (next + next / 8).min(30_000);
        }
        if let Some(wrong) = wrong {
            self.broke(format!("{} minutes after the faults ended {wrong}", WITHIN_MS / 60_000));
        }
    }

    fn people_mend(&mut self) {
        let Some(process) = &self.server.process else { return };
        let view = process.machine.ahead().clone();
        for host in 0..self.script.machines.len() {
            let host = u8::try_from(host).unwrap_or(u8::MAX);
            let Some(held) = view.host_by_name(&format!("h{host}")).cloned() else { continue };
            let has_machine = self.nodes.iter().any(|n| n.uid == held.uid && !n.is_clone);
            let joins = |o: &Operation| {
                o.open && matches!(o.action, Action::Rejoin { host: of, .. } if of == host)
            };
            if !has_machine && !self.operations.iter().any(joins) {
                // A restore has undone the join of its machine, which is not known any more.
                self.ask(&Action::Rejoin { host, disk_kept: true });
            } else if held.record.quarantined {
                self.ask(&Action::ReleaseQuarantine { host });
            } else if held.record.waiting_for_approval {
                self.ask(&Action::Cordon { host, on: false });
            } else if !view.is_unobserved(&held.uid) && view.orphans_on(&held.uid).next().is_some()
            {
                // What cannot be adopted is released.
                self.mended = !self.mended;
                self.ask(&Action::ResolveOrphans { host, adopt: self.mended });
            }
        }
    }

    /// A replica whose program does not answer since long, and which its check should have started anew.
    fn never_started_anew(&self, began: u64) -> Option<&ReplicaUid> {
        let nodes = self.nodes.iter().filter(|n| !n.gone && n.agent.is_some());
        let all = nodes.flat_map(|node| node.engine.running().map(move |made| (node, made)));
        let deaf = all.filter(|(_, made)| made.program == Program::Deaf);
        let mut late = deaf.filter(|(node, made)| {
            let uid = &made.shown.replica;
            let set = node.agent.as_ref().and_then(|a| a.board.wanted.set());
            let body = set.and_then(|set| set.body(set.entries.get(uid)?));
            let check = body.and_then(|body| body.value.spec.health.as_ref());
            let after = check.and_then(|check| Some(check.restart_after_ms? + check.startup_ms));
            let since = began.max(made.running_since);
            after.is_some_and(|after| self.now - since > 2 * after + CALM_MS / 8)
        });
        late.next().map(|(_, made)| &made.shown.replica)
    }

    /// Of what is settled nothing moves for a while: no session ends, no container of a program that
    /// serves is made or stopped, and nothing is written. In some of the seeds, for the time it takes.
    fn quiet(&mut self) {
        if !self.script.seed.is_multiple_of(QUIET_EVERY) || !self.run_until(self.now + CALM_MS) {
            return;
        }
        if !self.is_calm() {
            return;
        }
        let before = self.shape();
        if self.run_until(self.now + QUIET_MS) {
            let after = self.shape();
            for (before, after, what) in [
                (before.0, after.0, "the ledger is written to"),
                (before.1, after.1, "a session has ended"),
                (before.2, after.2, "a container is made or stopped"),
            ] {
                if before != after && self.broken.is_none() {
                    self.broke(format!("all is settled, and {what}: {before:?}, {after:?}"));
                }
            }
        }
    }

    /// Nothing is waited for, and nothing ends by itself.
    fn is_calm(&self) -> bool {
        let Some(process) = &self.server.process else { return false };
        let view = process.machine.durable();
        let over = |d: &Arc<Deployment>| match d.rollout() {
            RolloutState::Complete | RolloutState::RolledBack | RolloutState::Paused => true,
            RolloutState::Unspecified
            | RolloutState::Rolling
            | RolloutState::Failed
            | RolloutState::Deleting => false,
        };
        let serves = |made: &Made| matches!(made.program, Program::Good | Program::Slow);
        // Whoever is refused dials again now and then.
        let stands = |agent: &Agent| agent.session.is_some();
        let connected = |n: &Node| n.disk.removed || n.agent.as_ref().is_some_and(stands);
        self.nodes.iter().all(|n| n.gone || connected(n))
            && view.hosts().all(|host| host.is_removed() || process.live.is_present(&host.uid))
            && view.deployments().all(over)
            && self.nodes.iter().all(|n| n.gone || n.engine.containers.values().all(serves))
            && self.operations.iter().all(|operation| !operation.open)
    }

    /// What does not change while nothing happens.
    fn shape(&self) -> (u64, u64, u64) {
        let revision = self.server.process.as_ref().map_or(0, |p| p.machine.ahead().revision.0);
        let containers = self.nodes.iter().map(|n| n.engine.made_and_running());
        let links = u64::try_from(self.links.len()).unwrap_or(u64::MAX);
        (revision, links, containers.sum())
    }

    fn full_audit(&mut self) {
        let Some(process) = &self.server.process else { return };
        let found = audit::everything(process.machine.durable(), &process.live);
        if let Some(finding) = found.iter().find(|finding| !self.waits(finding)) {
            self.broke(format!("at the end {finding}"));
        }
    }

    /// A host that came back after its replica was placed elsewhere leaves one too many. It goes when the
    /// floor lets it go, and not of a rollout that is paused: that waits, as all of it does, for a person.
    fn waits(&self, finding: &Finding) -> bool {
        let (Finding::BeyondSurge { deployment, .. } | Finding::SlotTwice { deployment, .. }) =
            finding
        else {
            return false;
        };
        let Some(process) = &self.server.process else { return false };
        let view = process.machine.durable();
        let held = view.deployment(deployment);
        held.is_some_and(|d| d.rollout() == RolloutState::Paused)
            || self.floor_holds(view, &process.live, deployment)
    }

    /// No more of a deployment serve than its floor asks for: nothing that serves may go.
    fn floor_holds(&self, view: &View, live: &Live, uid: &DeploymentUid) -> bool {
        let Some(deployment) = view.deployment(uid) else { return false };
        let Some(wanted) = deployment.wanted() else { return false };
        let runs = || view.replicas_of(uid).filter(|r| r.runs() && r.slot < wanted);
        let reached: BTreeSet<u32> =
            runs().filter(|r| live.is_present(&r.host)).map(|r| r.slot).collect();
        let deferred = runs().map(|r| r.slot).collect::<BTreeSet<_>>().len() - reached.len();
        let serves = |r: &&Arc<Replica>| {
            live.is_present(&r.host) && live.replica(&r.uid).is_some_and(|l| l.status.ready)
        };
        let most_gone = deployment.spec.rollout.max_unavailable as usize + deferred;
        runs().filter(serves).count() <= (wanted as usize).saturating_sub(most_gone)
    }

    /// What is not as it should be in the end.
    pub(super) fn wrong(&self) -> Option<String> {
        let Some(process) = &self.server.process else { return Some("the server is down".into()) };
        let view = process.machine.durable();
        let live = &process.live;
        if view.revision != process.machine.ahead().revision || !process.planner.is_idle() {
            return Some("the ledger is busy".to_owned());
        }
        for host in view.hosts() {
            let uid = &host.uid;
            let on = self.nodes.iter().find(|n| n.uid == *uid && !n.is_clone);
            let Some(node) = on else { return Some(format!("{uid} has no machine")) };
            if node.disk.removed {
                // It was told of a removal that a restore has undone: only a person can join it again.
                continue;
            }
            if node.disk.instance != host.record.instance && !node.disk.instance.is_empty() {
                continue;
            }
            if !live.is_present(uid) {
                return Some(format!("{uid} is not present"));
            }
            if let Some(what) = self.disagreement(node, view, live) {
                return Some(what);
            }
            if node.engine.follower != Some(node.life) {
                return Some(format!("nobody follows what happens on {uid}"));
            }
            let trust = self.server.trust();
            if (node.disk.trust, host.record.trust_version) != (trust, trust) {
                let told = host.record.trust_version;
                return Some(format!("{uid} holds roots {}, told as {told}", node.disk.trust));
            }
            let number = view.generation(uid);
            let held = live.host(uid).and_then(|h| h.acknowledged);
            if held.is_none_or(|held| (held.epoch, held.generation) != (view.epoch(), number)) {
                return Some(format!("{uid} holds {held:?} and not its newest set, {number}"));
            }
            let wanted: BTreeSet<&ReplicaUid> =
                view.replicas_on(uid).filter(|r| r.runs()).map(|r| &r.uid).collect();
            for made in node.engine.containers.values() {
                let shown = &made.shown;
                if !wanted.contains(&shown.replica) {
                    return Some(format!("{uid} still has a container of {}", shown.replica));
                }
            }
            for replica in view.replicas_on(uid) {
                if replica.intent != ReplicaIntent::Run {
                    return Some(format!("{} on {uid} is still {:?}", replica.uid, replica.intent));
                }
                let on_host = node.engine.containers.values();
                let mine: Vec<_> = on_host.filter(|c| c.shown.replica == replica.uid).collect();
                let running = mine.iter().filter(|c| c.shown.state == State::Running).count();
                let exchanged = view
                    .replicas_on(uid)
                    .any(|r| r.replaces.as_ref() == Some(&replica.uid) && !r.failed);
                let program = view
                    .release(&replica.deployment, replica.release)
                    .and_then(|r| self.programs.get(&r.source.image.digest));
                let memory = node.disk.memory.get(&replica.uid);
                let over = memory.is_some_and(|m| m.finished);
                let serves = matches!(program, Some(Program::Good | Program::Slow)) && !over;
                let under_way = memory
                    .is_some_and(|m| m.replacement_begun && !m.replacement_done && !m.rolled_back);
                let over = is_over(report_of(process, replica), view, replica)
                    || self.floor_holds(view, live, &replica.deployment);
                if !over && view.host(uid).is_some_and(|host| fit::is_draining(host)) {
                    return Some(format!("{} is left on {uid}, which is drained", replica.uid));
                }
                // One that was adopted after a restore takes nobody's place any more.
                if under_way && !exchanged && !replica.failed && replica.replaces.is_some() {
                    return Some(format!(
                        "{} has begun to take another's place on {uid} and has neither taken it nor \
                         given it back",
                        replica.uid
                    ));
                }
                let status = live.replica(&replica.uid).map(|l| &l.status);
                let told = status.is_some_and(|status| status.ready);
                if serves && !exchanged && !replica.failed && (running != 1 || !told) {
                    return Some(format!(
                        "{} containers of {} run on {uid}, ready: {told} {}",
                        running,
                        replica.uid,
                        status.map_or(String::new(), |s| format!("({:?}, {})", s.phase, s.message))
                    ));
                }
            }
        }
        for node in self.nodes.iter().filter(|n| !n.gone) {
            let wiped = node.disk.removed && node.disk.wipe;
            if wiped && !node.engine.containers.is_empty() {
                return Some(format!("{} is to be wiped and has containers", node.uid));
            }
        }
        for replica in view.replicas() {
            if view.host(&replica.host).is_none_or(|host| host.is_removed()) {
                return Some(format!("{} is on a host that was removed", replica.uid));
            }
        }
        for replica in view.replicas() {
            let there = view.host(&replica.host).is_some_and(|h| !h.is_removed());
            if replica.intent != ReplicaIntent::Run && self.is_reached(&replica.host) && there {
                return Some(format!("{} is {:?}", replica.uid, replica.intent));
            }
        }
        for deployment in view.deployments() {
            let uid = &deployment.uid;
            let deferred = view.replicas_of(uid).any(|r| !self.is_reached(&r.host));
            if let Some(what) = unfilled(view, live, deployment) {
                return Some(what);
            }
            match deployment.rollout() {
                RolloutState::Complete | RolloutState::RolledBack | RolloutState::Paused => {}
                state @ (RolloutState::Unspecified
                | RolloutState::Rolling
                | RolloutState::Failed
                | RolloutState::Deleting) => {
                    let report = process.planner.reports.get(uid);
                    let pending =
                        report.is_some_and(|r| !r.pending.is_empty() || !r.deferred.is_empty());
                    if !deferred && (!pending || state == RolloutState::Deleting) {
                        return Some(format!("{uid} is {state:?}"));
                    }
                }
            }
            let stable = deployment.stable();
            let lacks = |release| view.release(uid, release).is_none();
            if !deployment.is_deleted() && stable.0 != 0 && lacks(stable) {
                return Some(format!("the stable release of {uid} is forgotten"));
            }
            if deployment.rollout() == RolloutState::Paused
                && deployment.spec.rollout.on_failure == OnRolloutFailure::Rollback
                && stable.0 != 0
                && stable != deployment.release()
            {
                return Some(format!("{uid} is paused and should have rolled back"));
            }
            let now = process.clock.now(self.now);
            let mut minted = 0;
            let mut mint = || -> ReplicaUid {
                minted += 1;
                #[expect(clippy::expect_used, reason = "a letter and a number are a uid")]
                format!("x{minted}").parse().expect("a uid")
            };
            let plan = planner::plan(view, live, uid, now, &mut mint);
            if !plan.is_empty() {
                return Some(format!("there is something left to plan for {uid}"));
            }
            let found = audit::deployment(view, live, uid);
            if let Some(finding) = found.iter().find(|finding| !self.waits(finding)) {
                return Some(finding.to_string());
            }
            if let Some(wanted) = deployment.wanted()
                && deployment.rollout() == RolloutState::Complete
                && plan.report.pending.is_empty()
            {
                let slots: BTreeSet<u32> =
                    view.replicas_of(uid).filter(|r| r.runs()).map(|r| r.slot).collect();
                if slots.len() != wanted as usize {
                    return Some(format!("{uid} has {} of {wanted} slots filled", slots.len()));
                }
            }
        }
        None
    }

    /// Its agent may still come back: nobody has removed it there, nor given it another join.
    fn is_reached(&self, host: &berth_proto::ids::HostUid) -> bool {
        self.nodes.iter().any(|n| n.uid == *host && !n.is_clone && !n.disk.removed)
    }
}
