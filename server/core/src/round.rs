//! One round of planning.
//!
//! Everything in the queue is planned over a working copy of the newest submitted view, each plan
//! seeing what those before it have placed, and all of it is proposed at once, so that a round costs
//! one group of the ledger and not one wait per deployment. A plan that the ledger refuses, because
//! something it was made on has changed, is made anew.
//!
//! A machine without I/O: [`Round::next`] until it answers `None`, then what [`Round::proposals`] gives
//! is proposed, then [`Round::ended`] with what was refused.

use crate::batching::{Proposal, Refusal};
use crate::live::Live;
use crate::planner::{self, Plan};
use crate::queue::{Key, Queue, Why};
use crate::view::View;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, Now, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet};

/// Changes of one round: some hundred commits, well below what may wait at the ledger.
const ROUND_CHANGES: usize = 8_000;
/// Plans of one round, for the same reason.
const ROUND_PLANS: usize = 1_000;
/// A plan that was refused for want of disk or room in the ledger's queue is made again after this.
const AGAIN_MS: u64 = 500;

/// One plan of a round.
#[derive(Debug)]
pub struct Planned {
    /// Of what.
    pub key: Key,
    /// Why it was made.
    pub why: Why,
    /// The plan, to be kept for people; its changes are in [`Round::proposals`].
    pub plan: Plan,
    /// It changes something.
    pub changes_something: bool,
    /// The rollout's clock is another now: it is to be set in what is known live.
    pub clock_moved: bool,
}

/// A plan as it goes to the ledger.
#[derive(Debug)]
pub struct Sent {
    /// Of which deployment.
    pub uid: DeploymentUid,
    /// In order.
    pub proposals: Vec<Proposal>,
}

/// The machine.
#[derive(Debug)]
pub struct Round {
    base: View,
    work: View,
    sent: Vec<Sent>,
    changes: usize,
    plans: usize,
    /// A deployment is planned once a round: its next plan needs the revisions this one is written at.
    whole: BTreeSet<DeploymentUid>,
    hosts: BTreeMap<DeploymentUid, BTreeSet<HostUid>>,
    later: Vec<Key>,
    short: Vec<DeploymentUid>,
}

impl Round {
    /// A round over the newest submitted view.
    #[must_use]
    pub fn begin(base: View) -> Self {
        Self {
            work: base.clone(),
            base,
            sent: Vec::new(),
            changes: 0,
            plans: 0,
            whole: BTreeSet::new(),
            hosts: BTreeMap::new(),
            later: Vec::new(),
            short: Vec::new(),
        }
    }

    fn was_planned(&self, key: &Key) -> bool {
        let uid = key.deployment();
        self.whole.contains(uid)
            || match key {
                Key::Whole(_) => self.hosts.contains_key(uid),
                Key::OnHost(_, host) => self.hosts.get(uid).is_some_and(|all| all.contains(host)),
            }
    }

    /// The next plan; `None`: the queue holds nothing more for this round.
    pub fn next(
        &mut self,
        queue: &mut Queue,
        live: &Live,
        now: Now,
        mint: &mut dyn FnMut() -> ReplicaUid,
    ) -> Option<Planned> {
        while self.changes < ROUND_CHANGES && self.plans < ROUND_PLANS {
            let (key, why) = queue.next(now.mono)?;
            if self.was_planned(&key) {
                self.later.push(key);
                continue;
            }
            self.plans += 1;
            let uid = key.deployment().clone();
            let mut plan = match &key {
                Key::Whole(_) => planner::plan(&self.work, live, &uid, now, mint),
                Key::OnHost(_, host) => planner::plan_host(&self.work, live, &uid, host, now, mint),
            };
            queue.planned(&key, &plan.report);
            if !plan.report.waits_for.is_empty() {
                self.short.push(uid.clone());
            }
            let clock_moved = live.clock(&uid).map(|c| &**c) != plan.clock.as_ref();
            let changes_something = self.send(&key, &mut plan);
            return Some(Planned { key, why, plan, changes_something, clock_moved });
        }
        None
    }

    fn send(&mut self, key: &Key, plan: &mut Plan) -> bool {
        let uid = key.deployment();
        let Some(deployment) = self.base.deployment(uid) else { return false };
        if plan.is_empty() {
            return false;
        }
        let revision = self.work.revision.next();
        for change in plan.all_changes() {
            self.work.apply(change, revision);
            self.changes += 1;
        }
        match key {
            Key::Whole(uid) => {
                self.whole.insert(uid.clone());
            }
            Key::OnHost(uid, host) => {
                self.hosts.entry(uid.clone()).or_default().insert(host.clone());
            }
        }
        let changes = std::mem::take(&mut plan.changes);
        let verdict = std::mem::take(&mut plan.verdict);
        let proposals =
            Plan { changes, verdict, ..Plan::default() }.proposals(&self.base, deployment);
        self.sent.push(Sent { uid: uid.clone(), proposals });
        true
    }

    /// What is to be proposed, once. What was in the queue twice waits for the next round.
    pub fn proposals(&mut self, queue: &mut Queue) -> Vec<Sent> {
        for key in std::mem::take(&mut self.later) {
            queue.wake(key);
        }
        std::mem::take(&mut self.sent)
    }

    /// All was answered, with these refusals. `false`: there was nothing to plan.
    pub fn ended(
        self,
        queue: &mut Queue,
        refused: impl IntoIterator<Item = (DeploymentUid, Refusal)>,
        now: Mono,
    ) -> bool {
        let mut again = BTreeSet::new();
        for (uid, refusal) in refused {
            again.insert(uid.clone());
            match refusal {
                // Somebody was faster.
                Refusal::Conflict { .. } | Refusal::TakenBack => queue.wake(Key::Whole(uid)),
                Refusal::TooLarge { .. }
                | Refusal::Busy
                | Refusal::Full
                | Refusal::Unsure
                | Refusal::Failed => queue.retry(&uid, now.plus_ms(AGAIN_MS)),
            }
        }
        if !again.is_empty() {
            // They may have found no room only because of a plan that was not taken. Those that were
            // refused themselves come again at their own time.
            for uid in self.short.into_iter().filter(|uid| !again.contains(uid)) {
                queue.wake(Key::Whole(uid));
            }
        }
        self.plans > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::World;
    use berth_proto::ids::Wall;

    #[test]
    fn a_plan_that_is_refused_for_want_of_disk_waits_even_when_it_also_lacks_room() {
        let mut w = World::new(1);
        let mut spec = World::spec("one");
        spec.replicas = Some(5);
        let memory_bytes = 300 << 20;
        spec.resources = Some(berth_proto::api::Resources { memory_bytes, ..Default::default() });
        w.apply(spec);
        let mut queue = Queue::new(&w.view);
        let now = Now { mono: Mono(5_000), wall: Wall(0) };
        let mut round = Round::begin(w.view.clone());
        let mut minted = 0;
        let mut mint = || {
            minted += 1;
            format!("n{minted}").parse().unwrap()
        };
        let planned = round.next(&mut queue, &w.live, now, &mut mint).unwrap();
        assert!(planned.changes_something && !planned.plan.report.waits_for.is_empty());
        assert!(round.next(&mut queue, &w.live, now, &mut mint).is_none());
        assert_eq!(round.proposals(&mut queue).len(), 1);
        assert!(round.ended(&mut queue, [(w.uid(), Refusal::Full)], now.mono));
        assert!(queue.is_idle(), "or it would be planned again at once, for ever");
        assert_eq!(queue.due(), Some(now.mono.plus_ms(AGAIN_MS)));
    }
}
