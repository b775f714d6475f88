//! What an agent remembers and tells, held to what its engine shows.

use super::engine::Made;
use super::engine::number;
use super::events::{Life, NodeId};
use super::faults::AWAY_TOLD_MS;
use super::script::Program;
use super::specs;
use super::world::World;
use berth_agent_core::diff::{Memory, State, predecessor};
use berth_proto::agent::ReplicaReport;
use berth_proto::ids::ReplicaUid;
use berth_proto::values::{AssignmentBody, RestartCondition};
use std::collections::BTreeMap;
use std::sync::Arc;

/// An agent learns of an end so long after it at the most, unless its engine is away: events come
/// late, and looks take long.
const HEARD_MS: u64 = 90_000;
/// What a full disk has refused is tried again within this.
const RETRIED_MS: u64 = 61_000;
/// Being ready for so long makes an end the first failure again, by a clock that runs too fast.
const STEADY_MS: u64 = 18_000;

/// A program that does not answer for so long fails one check at the most.
const BRIEF_MS: u64 = 4_000;

/// A program serves whoever asks.
pub(super) fn serves(made: &Made, now: u64) -> bool {
    match made.program {
        Program::Good => true,
        Program::Slow => now >= made.running_since + specs::SLOW_MS,
        Program::Deaf | Program::Crashes | Program::NoImage => false,
    }
}

/// A wait after a call that failed is over by then.
const RETRY_MS: u64 = 75_000;

impl World<'_> {
    /// An engine that was away all the time is told to be.
    pub(super) fn check_away(&mut self, node: NodeId, life: Life) {
        let held = &self.nodes[node];
        // Another fault may have ended this one.
        if !self.lives(node, life) || held.engine.down_for(self.now) < AWAY_TOLD_MS {
            return;
        }
        let told = held.agent.as_ref().is_some_and(|agent| agent.board.facts.engine_available);
        if told {
            self.broke(format!(
                "the engine of {} is away, and its agent says it answers",
                held.uid
            ));
        }
    }

    /// What no set names any more is gone, unless something was wrong on its host.
    pub(super) fn check_gone(&mut self, node: NodeId, life: Life, uid: &ReplicaUid, since: u64) {
        let held = &self.nodes[node];
        // Where little is done at once, some wait for others.
        let small = self.script.small;
        let troubled = small || held.engine.troubled_until + RETRY_MS > since;
        if !self.lives(node, life) || troubled || self.book.by_hand.contains(uid) {
            return;
        }
        let set = held.agent.as_ref().and_then(|agent| agent.board.wanted.set());
        let wanted = set.is_none_or(|set| set.entries.contains_key(uid));
        let there = held.engine.containers.values().any(|made| made.shown.replica == *uid);
        // It may have been wanted again in between.
        let all_along = self.book.unwanted.get(&(node, uid.clone())).is_some_and(|s| *s <= since);
        if there && !wanted && all_along {
            let words = format!("{uid} is not wanted on {} since {}", held.uid, self.now - since);
            self.broke(format!("{words} ms, and is still there"));
        }
    }

    fn body(&self, node: NodeId, uid: &ReplicaUid) -> Option<Arc<AssignmentBody>> {
        let set = self.nodes[node].agent.as_ref()?.board.wanted.set()?;
        Some(Arc::clone(&set.body(set.entries.get(uid)?)?.value))
    }

    /// An agent asks its disk to remember this.
    pub(super) fn check_remembered(&mut self, node: NodeId, memory: &BTreeMap<ReplicaUid, Memory>) {
        let now = self.now;
        self.book.begun.retain(|(of, uid), _| *of != node || memory.contains_key(uid));
        for (uid, next) in memory {
            let held = &self.nodes[node];
            let none = Memory::default();
            let last = held.disk.memory.get(uid).unwrap_or(&none);
            if next.replacement_begun && !last.replacement_begun {
                // What a full disk refuses was decided earlier than it is asked for.
                let refused = held.disk_full_until > 0 && now < held.disk_full_until + RETRIED_MS;
                let since = (!refused).then_some(now);
                self.book.begun.entry((node, uid.clone())).or_insert(since);
            }
            // What is written is the time left.
            if next.not_before.is_some_and(|left| left.0 > specs::MAX_BACKOFF_MS) {
                let words = format!("{uid} is not started again before {:?}", next.not_before);
                return self.broke(words);
            }
            // One that gives way to another is not told from one that ended by itself in that moment.
            let gives_way =
                memory.values().any(|m| m.replacement_begun && m.replaces.as_ref() == Some(uid));
            if next.exit_taken > last.exit_taken
                && next.failures == last.failures
                && (next.stopping == next.exit_taken || gives_way)
            {
                self.put_aside(node, uid, next.exit_taken);
            }
            let last = self.nodes[node].disk.memory.get(uid).unwrap_or(&none);
            let by_hand = self.book.by_hand.contains(uid) || self.book.removed.contains(uid);
            if next.rolled_back
                && !last.rolled_back
                && let Some(Some(begun)) = self.book.begun.get(&(node, uid.clone()))
                && now - begun < self.replace_ms(node, uid)
            {
                let words = format!("{uid} has failed to take another's place after");
                return self.broke(format!("{words} {} ms", now - begun));
            }
            let taken = next.replacement_done && !last.replacement_done && !last.rolled_back;
            if taken && !by_hand {
                self.check_place_taken(node, uid);
            }
            if next.finished && !self.nodes[node].disk.memory.get(uid).is_some_and(|m| m.finished) {
                self.check_finished(node, uid, next);
            }
        }
    }

    /// How long one that takes another's place has at least until it is given up: as long as its check
    /// lets it start and its deployment asks it to be ready, and half a minute at least; by a clock that
    /// runs too fast.
    fn replace_ms(&self, node: NodeId, uid: &ReplicaUid) -> u64 {
        let asked_ms = self.body(node, uid).map_or(0, |body| {
            let startup_ms = body.spec.health.as_ref().map_or(0, |check| check.startup_ms);
            startup_ms + body.spec.rollout.ready_for_ms
        });
        asked_ms.max(30_000) * 9 / 10
    }

    /// A replica has taken another's place for good.
    fn check_place_taken(&mut self, node: NodeId, uid: &ReplicaUid) {
        let now = self.now;
        let Some(body) = self.body(node, uid) else { return };
        let held = &self.nodes[node];
        let mine = || held.engine.containers.values().filter(|c| c.shown.replica == *uid);
        let lately = |c: &Made| c.ended.is_some_and(|at| now - at < HEARD_MS);
        let Some(running) = mine().find(|c| c.shown.state == State::Running) else {
            if !mine().any(lately) && held.engine.away_until + HEARD_MS < now {
                self.broke(format!("{uid} has taken another's place and does not run"));
            }
            return;
        };
        let ran_ms = now - running.running_since;
        let steady_ms = body.spec.rollout.ready_for_ms.min(15_000) * 9 / 10;
        let anew = mine().any(lately);
        let why = match body.spec.health {
            Some(_) if !serves(running, now) => "does not serve",
            None if ran_ms < steady_ms => "has just been started",
            Some(_) | None => return,
        };
        if !anew {
            self.broke(format!("{uid} has taken another's place and {why}"));
        }
    }

    /// A program is not to be started any more.
    fn check_finished(&mut self, node: NodeId, uid: &ReplicaUid, memory: &Memory) {
        let Some(body) = self.body(node, uid) else { return };
        let all = self.nodes[node].engine.containers.values();
        let ended = |c: &&Made| c.shown.replica == *uid && c.shown.attempt == memory.exit_taken;
        // Nor does a join know what an earlier one did.
        let known = self.book.by_hand.contains(uid)
            || self.book.removed.contains(uid)
            || self.book.joined.contains_key(&node);
        // What was let go for good may be wanted again by a restored ledger.
        if !known
            && !self.book.restored
            && all.clone().filter(ended).any(|c| c.stopped && c.ended.is_none())
        {
            let words = format!("{uid} was stopped by its agent");
            return self.broke(format!("{words}, and is not started again"));
        }
        let code = all.filter(ended).find_map(|c| match c.shown.state {
            State::Exited { code, .. } => Some(code),
            State::Created | State::Running => None,
        });
        let right = match body.spec.restart.condition {
            RestartCondition::Always => false,
            // One that somebody has removed has not ended well.
            RestartCondition::OnFailure => {
                code == Some(0)
                    || self.book.by_hand.contains(uid)
                    || self.book.removed.contains(uid)
            }
            RestartCondition::Never => true,
        };
        if !right {
            self.broke(format!("{uid} has ended with {code:?} and is not started again"));
        }
    }

    /// An agent tells of a replica.
    pub(super) fn check_told(&mut self, node: NodeId, report: &ReplicaReport) {
        let now = self.now;
        let Some(status) = &report.status else { return };
        let Ok(uid) = report.replica_uid.parse::<ReplicaUid>() else { return };
        let far = (status.attempt, status.phase);
        let checked = self.body(node, &uid).is_some_and(|body| body.spec.health.is_some());
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let stopping = agent.stopping.values().any(|of| *of == (uid.clone(), far.0));
        let before = agent.told.insert(uid.clone(), (far, status.ready));
        if stopping && status.ready {
            return self.broke(format!("{uid} is told to be ready while it is being stopped"));
        }
        if let Some((before, _)) = before.filter(|(before, _)| far < *before) {
            return self
                .broke(format!("{uid} was told to be at {before:?} and is told at {far:?}"));
        }
        let by_hand = self.book.by_hand.contains(&uid);
        let all = self.nodes[node].engine.containers.values();
        let made = all.filter(|c| c.shown.replica == uid).find(|c| c.shown.attempt == far.0);
        let Some(made) = made else { return };
        let was_ready = before.is_some_and(|((attempt, _), ready)| ready && attempt == far.0);
        let ill = made.sick.iter().any(|(from, until)| until - from > BRIEF_MS);
        if was_ready && status.reason == "NOT_READY" && !ill && !by_hand && serves(made, now) {
            return self.broke(format!("{uid} is told to be unready, and its program serves"));
        }
        if !status.ready {
            return;
        }
        if made.starts == 0 || (checked && !serves(made, now)) {
            self.broke(format!("{uid} is told to be ready, and its program does not serve"));
        }
    }

    /// A container is about to be made after another one: what its program's policy says of that.
    pub(super) fn check_again(&mut self, node: NodeId, uid: &ReplicaUid, attempt: u32) {
        let now = self.now;
        let key = (node, uid.clone());
        if self.book.by_hand.contains(uid) || self.book.removed.contains(uid) {
            return;
        }
        if let Some(exits) = self.book.durable.as_ref().and_then(|view| view.replica(uid))
            && let Some(last) = exits.exits.last()
            && last.attempt >= attempt
            && !self.book.restored
            && !self.book.joined.contains_key(&node)
            && !self.book.cloned.contains(&self.nodes[node].uid)
        {
            let words = format!("attempt {attempt} of {uid} is made, and attempt");
            return self.broke(format!("{words} {} is known to have ended", last.attempt));
        }
        let all = self.nodes[node].engine.containers.values();
        let earlier = all.filter(|c| c.shown.replica == *uid && c.shown.attempt < attempt);
        let last = earlier.max_by_key(|c| c.shown.attempt);
        let Some(last) = last.filter(|last| !last.ended_in_exchange) else { return };
        let (since, state) = (last.running_since, last.shown.state.clone());
        let Some(ended) = last.ended else { return };
        let Some(body) = self.body(node, uid) else { return };
        if now - since >= STEADY_MS {
            // For whoever hears of its end late it was ready for long.
            self.book.failures.insert(key.clone(), 1);
        }
        let failures = self.book.failures.get(&key).copied().unwrap_or(1).clamp(1, 6);
        let wait_ms = (1_000 << (failures - 1)).min(specs::MAX_BACKOFF_MS) * 8 / 10;
        if now - ended < wait_ms {
            let words =
                format!("attempt {attempt} of {uid} follows its {failures}th failure after");
            return self.broke(format!("{words} {} ms", now - ended));
        }
        let well = matches!(state, State::Exited { code: 0, .. });
        let checked = body.spec.health.as_ref().is_some_and(|h| h.restart_after_ms.is_some());
        let again = match body.spec.restart.condition {
            RestartCondition::Always => true,
            RestartCondition::OnFailure => !well,
            RestartCondition::Never => false,
        };
        if !again && !self.changes_places(node, uid) && !checked {
            self.broke(format!("{uid} is started again, and its policy is not to"));
        }
    }

    /// A program that did not answer for so long does again: it was told to be unready meanwhile, and
    /// started anew where its check says so.
    pub(super) fn check_sick(&mut self, node: NodeId, life: Life, container: u32, for_ms: u64) {
        let now = self.now;
        let held = &self.nodes[node];
        let Some(made) = held.engine.containers.get(&container) else { return };
        let (uid, attempt) = (made.shown.replica.clone(), made.shown.attempt);
        let began = now - for_ms;
        // As long as nobody meddled, and the agent and its engine were there.
        let quiet = held.life == life
            && made.sick.last().is_some_and(|(_, until)| *until == now)
            && made.running_since < began
            && made.shown.state == State::Running
            && !self.book.by_hand.contains(&uid)
            && held.engine.away_until.max(held.engine.hangs_until) < began
            && held.engine.slow_until.max(held.engine.late_until) < began
            && (held.engine.fails, held.engine.loses) == (0, 0);
        let Some(check) = self.body(node, &uid).and_then(|body| body.spec.health.clone()) else {
            return;
        };
        let slack_ms = check.timeout_ms + 2 * check.interval_ms;
        let unready_ms = u64::from(check.failures) * check.interval_ms + slack_ms;
        let restart_ms = check.restart_after_ms.map(|after| unready_ms + after + slack_ms);
        let told = held.agent.as_ref().and_then(|a| a.board.reports.get(&uid));
        let told = told.and_then(|report| report.status.as_ref());
        let ready = told.is_some_and(|status| status.ready && status.attempt == attempt);
        if quiet && for_ms * 8 / 10 > unready_ms && ready {
            return self.broke(format!("{uid} does not answer for {for_ms} ms and is ready"));
        }
        if quiet && restart_ms.is_some_and(|least| for_ms * 8 / 10 > least) {
            self.broke(format!("{uid} does not answer for {for_ms} ms and is not started anew"));
        }
    }

    /// A dead container is about to be removed: the newest one of a replica that is wanted is kept for its
    /// logs.
    pub(super) fn check_put_away(&mut self, node: NodeId, id: u32) {
        let held = &self.nodes[node];
        let Some(made) = held.engine.containers.get(&id) else { return };
        let uid = &made.shown.replica;
        let wanted = held.disk.wanted.set().is_some_and(|set| set.entries.contains_key(uid));
        let given_back = held.disk.memory.get(uid).is_some_and(|memory| memory.rolled_back);
        let dead = |c: &&Made| matches!(c.shown.state, State::Exited { .. });
        let newer = |c: &Made| c.shown.replica == *uid && c.shown.attempt > made.shown.attempt;
        let kept = held.engine.containers.values().filter(dead).any(newer);
        let meddled = self.book.by_hand.contains(uid) || self.book.removed.contains(uid);
        if wanted && dead(&made) && !kept && !given_back && !meddled {
            self.broke(format!("the logs of {uid} are removed with its last attempt"));
        }
    }

    /// An agent waits so long before it dials again.
    pub(super) fn check_dials(&mut self, node: NodeId, wait_ms: u64, away: bool) {
        let (least, most) = if away { (150_000, 300_000) } else { (0, 30_000) };
        if !(least..=most).contains(&wait_ms) {
            let uid = &self.nodes[node].uid;
            self.broke(format!(
                "{uid} waits {wait_ms} ms before it dials, told to stay away: {away}"
            ));
        }
    }

    /// It is one of two of which one takes the other's place, as far as the disk knows.
    pub(super) fn changes_places(&self, node: NodeId, uid: &ReplicaUid) -> bool {
        let Some(set) = self.nodes[node].disk.wanted.set() else { return false };
        let old = |uid: &ReplicaUid| set.entries.get(uid).and_then(predecessor);
        old(uid).is_some() || set.entries.keys().any(|new| old(new).as_ref() == Some(uid))
    }

    /// A program has ended by itself.
    pub(super) fn count_failure(
        &mut self,
        node: NodeId,
        uid: &ReplicaUid,
        attempt: u32,
        ran_ms: u64,
    ) {
        let key = (node, uid.clone());
        let failures = self.book.failures.entry(key.clone()).or_default();
        *failures = if ran_ms >= STEADY_MS { 1 } else { *failures + 1 };
        self.book.counted.insert(key, attempt);
    }

    /// An agent takes an end for that of its own stop, which it asked for before it heard that the program
    /// had ended by itself: no failure, and nothing is waited for.
    fn put_aside(&mut self, node: NodeId, uid: &ReplicaUid, attempt: u32) {
        let key = (node, uid.clone());
        if self.book.counted.get(&key) != Some(&attempt) {
            return;
        }
        self.book.counted.remove(&key);
        if let Some(failures) = self.book.failures.get_mut(&key) {
            *failures = failures.saturating_sub(1);
        }
        for made in self.nodes[node].engine.containers.values_mut() {
            made.ended_in_exchange |= made.shown.replica == *uid && made.shown.attempt == attempt;
        }
    }

    /// A container is about to be removed of which nobody wants anything: how its program ended is not taken
    /// in any more, and counts for nothing should it be wanted again by then.
    pub(super) fn ended_unwanted(&mut self, node: NodeId, uid: &ReplicaUid, id: &str) {
        let held = &self.nodes[node];
        let wanted = held.agent.as_ref().and_then(|agent| agent.board.wanted.set());
        if wanted.is_none_or(|set| set.entries.contains_key(uid)) {
            return;
        }
        let taken = held.disk.memory.get(uid).map_or(0, |memory| memory.exit_taken);
        let made = held.engine.containers.get(&number(id));
        if let Some(attempt) = made.map(|made| made.shown.attempt).filter(|n| *n > taken) {
            self.put_aside(node, uid, attempt);
        }
    }

    /// An agent is gone, and with it the failures that it had not written down.
    pub(super) fn forget_failures(&mut self, node: NodeId) {
        let memory = &self.nodes[node].disk.memory;
        for ((of, uid), failures) in &mut self.book.failures {
            if *of == node {
                *failures = (*failures).min(memory.get(uid).map_or(0, |m| m.failures));
            }
        }
    }
}
