//! After the faults: everything wanted runs, nothing else does, and the books balance, within a bound.

use super::operator::Operation;
use super::script::{Action, Program};
use super::world::World;
use berth_agent_core::diff::State;
use berth_proto::api::{ReplicaIntent, RolloutState};
use berth_proto::ids::{DeploymentUid, ReplicaUid};
use berth_proto::values::OnRolloutFailure;
use berth_server_core::audit::{self, Finding};
use berth_server_core::live::Live;
use berth_server_core::objects::Replica;
use berth_server_core::planner;
use berth_server_core::view::View;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The bound: a quarantined agent dials every five minutes; a set that nobody answers ends its session
/// after ten; then come a rollout's deadline, and another one back.
const WITHIN_MS: u64 = 2_400_000;
/// How often it is looked whether all is well.
const LOOK_MS: u64 = 1_000;

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
            wrong = self.wrong();
            if wrong.is_none() {
                return self.full_audit();
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
                let serves = matches!(program, Some(Program::Good | Program::Slow));
                let under_way =
                    node.disk.memory.get(&replica.uid).is_some_and(|m| {
                        m.replacement_begun && !m.replacement_done && !m.rolled_back
                    });
                // One that was adopted after a restore takes nobody's place any more.
                if under_way && !replica.failed && replica.replaces.is_some() {
                    return Some(format!(
                        "{} has begun to take another's place on {uid} and has neither taken it nor \
                         given it back",
                        replica.uid
                    ));
                }
                let told = live.replica(&replica.uid).is_some_and(|l| l.status.ready);
                if serves && !exchanged && !replica.failed && (running != 1 || !told) {
                    return Some(format!(
                        "{} containers of {} run on {uid}, ready: {told}",
                        running, replica.uid
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
            let there = view.host(&replica.host).is_some_and(|h| !h.is_removed());
            if replica.intent != ReplicaIntent::Run && self.is_reached(&replica.host) && there {
                return Some(format!("{} is {:?}", replica.uid, replica.intent));
            }
        }
        for deployment in view.deployments() {
            let uid = &deployment.uid;
            let deferred = view.replicas_of(uid).any(|r| !self.is_reached(&r.host));
            if deferred {
                continue;
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
                    if !pending || state == RolloutState::Deleting {
                        return Some(format!("{uid} is {state:?}"));
                    }
                }
            }
            let stable = deployment.stable();
            if deployment.rollout() == RolloutState::Paused
                && deployment.spec.rollout.on_failure == OnRolloutFailure::Rollback
                && stable.0 != 0
                && stable != deployment.release()
                && view.release(uid, stable).is_some()
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
