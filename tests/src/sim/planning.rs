//! The planning pump, as `berthd` drives it.

use super::events::{Event, Life};
use super::ledger::Waiter;
use super::world::World;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, ReplicaUid};
use berth_server_core::batching::Refusal;
use berth_server_core::change::Change;
use berth_server_core::live::{Live, Presence, Unheard};
use berth_server_core::planner::Report;
use berth_server_core::queue::{Key, Queue, Why};
use berth_server_core::round::{Round, Sent};
use std::collections::{BTreeMap, BTreeSet};

/// A pass over all deployments, as in the program.
const FULL_PASS_MS: u64 = 60_000;
/// A host that was never heard of is waited for as long as a session may be silent, and so long.
const UNHEARD_MS: u64 = 85_000;

/// A round whose proposals are not all answered yet.
struct Waiting {
    round: Round,
    left: usize,
    refused: Vec<(DeploymentUid, Refusal)>,
}

/// What the pump holds.
pub(super) struct Planner {
    pub(super) queue: Queue,
    pub(super) heard: Vec<Change>,
    pub(super) reports: BTreeMap<DeploymentUid, Report>,
    check_at: Mono,
    unheard: Unheard,
    started: Mono,
    round: Option<Waiting>,
    tick: u64,
}

impl Planner {
    pub(super) fn new(queue: Queue, now: Mono) -> Self {
        Self {
            queue,
            heard: Vec::new(),
            reports: BTreeMap::new(),
            check_at: now.plus_ms(FULL_PASS_MS),
            unheard: Unheard::default(),
            started: now,
            round: None,
            tick: u64::MAX,
        }
    }

    /// Nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.round.is_none() && self.heard.is_empty() && self.queue.is_idle()
    }
}

impl World<'_> {
    /// Something has happened that planning looks at.
    pub(super) fn plan_soon(&mut self) {
        let at = self.now + 1;
        self.plan_at(at);
    }

    fn plan_at(&mut self, at: u64) {
        let life = self.server.life;
        let Some(process) = self.server.process.as_mut() else { return };
        if at < process.planner.tick {
            process.planner.tick = at;
            self.events.push(at, Event::Plan { life });
        }
    }

    pub(super) fn plan(&mut self, life: Life) {
        let now = self.now;
        if self.server.life != life {
            return;
        }
        let Some(process) = self.server.process.as_mut() else { return };
        if now < process.planner.tick {
            return;
        }
        process.planner.tick = u64::MAX;
        if process.planner.round.is_some() {
            return;
        }
        let at = process.clock.now(now);
        let planner = &mut process.planner;
        let ahead = process.machine.ahead().clone();
        for change in std::mem::take(&mut planner.heard) {
            planner.queue.changed(&ahead, &process.live, &change);
        }
        for moved in std::mem::take(&mut process.news) {
            planner.queue.moved(&ahead, &process.live, &moved);
        }
        if at.mono >= planner.check_at {
            planner.check_at = at.mono.plus_ms(FULL_PASS_MS);
            let idle = 3 * self.script.ping_ms;
            let view = process.machine.durable();
            let unknown = |live: &Live| -> BTreeSet<HostUid> {
                let all = view.hosts().map(|host| host.uid.clone());
                all.filter(|uid| live.presence(uid) == Presence::Unknown).collect()
            };
            let before = unknown(&process.live);
            planner.unheard.look(view, &mut process.live, idle, at.mono);
            let after = unknown(&process.live);
            let up_ms = at.mono.since_ms(planner.started);
            let joined =
                |uid: &HostUid| self.book.joined.keys().any(|node| self.nodes[*node].uid == *uid);
            let late = up_ms > idle + UNHEARD_MS + 3 * FULL_PASS_MS && !self.book.restored;
            let late = after.iter().find(|uid| late && !joined(uid));
            if up_ms < idle + UNHEARD_MS && before != after {
                let words = format!("{before:?} are given up {up_ms} ms after the start");
                return self.broke(words);
            }
            if let Some(uid) = late {
                return self.broke(format!("{uid} is waited for, {up_ms} ms after the start"));
            }
            for moved in process.live.take_moved() {
                planner.queue.moved(&ahead, &process.live, &moved);
            }
            planner.queue.check_all(&ahead);
        }
        // Nor is what a full disk refused forgotten: it is planned again in a moment.
        let all_durable = ahead.revision == process.machine.durable().revision
            && now > self.server.full_until + 2_000;
        let before = ahead.clone();
        let mut round = Round::begin(ahead);
        let mut missed = None;
        let mut plans = 0;
        loop {
            let minted = &mut self.minted;
            let mut mint = || -> ReplicaUid {
                *minted += 1;
                #[expect(clippy::expect_used, reason = "a letter and a number are a uid")]
                format!("r{minted:05}").parse().expect("a uid")
            };
            let planner = &mut process.planner;
            let Some(planned) = round.next(&mut planner.queue, &process.live, at, &mut mint) else {
                break;
            };
            plans += 1;
            match &planned.key {
                Key::Whole(uid) => {
                    self.book.rollouts.planned(&before, &process.live, uid, (at.mono, now));
                    planner.reports.insert(uid.clone(), planned.plan.report.clone());
                }
                Key::OnHost(uid, host) => {
                    if let Some(report) = planner.reports.get_mut(uid) {
                        report.merge_host(host, &planned.plan);
                    }
                }
            }
            if planned.clock_moved {
                process.live.set_clock(planned.key.deployment(), planned.plan.clock.clone());
            }
            // What is submitted and not durable yet wakes when it is.
            if planned.changes_something && planned.why == Why::Check && all_durable {
                let steps = planned.plan.steps.len();
                missed = Some(format!("{:?} ({steps} steps)", planned.key));
            }
        }
        self.steps += plans;
        if let Some(missed) = missed {
            return self.broke(format!(
                "a full pass over all deployments changes something that nothing has woken: {missed}"
            ));
        }
        let sent = round.proposals(&mut process.planner.queue);
        let count = sent.iter().map(|sent| sent.proposals.len()).sum();
        process.planner.round = Some(Waiting { round, left: count, refused: Vec::new() });
        let live = process.live.clone();
        for one in &sent {
            self.check_plan(&before, &live, one, at);
            if sent.len() == 1 {
                self.check_spread(&before, &live, one);
            }
        }
        if count == 0 {
            return self.round_ends();
        }
        // Planning takes a while, and others write meanwhile.
        let at = now + self.a_moment_ms();
        self.events.push(at, Event::PlansSent { life, sent });
    }

    pub(super) fn plans_sent(&mut self, life: Life, sent: Vec<Sent>) {
        if self.server.life != life {
            return;
        }
        for sent in sent {
            for proposal in sent.proposals {
                self.propose(Waiter::Plan(sent.uid.clone()), proposal);
            }
        }
    }

    /// How long it takes to get from a thought to a deed: mostly nothing.
    pub(super) fn a_moment_ms(&mut self) -> u64 {
        let rng = &mut self.server.rng;
        match rng.u8(0..16) {
            0 => rng.u64(0..300),
            1..=7 => rng.u64(0..8),
            _ => 0,
        }
    }

    pub(super) fn plan_answered(&mut self, uid: DeploymentUid, refusal: Option<Refusal>) {
        let Some(process) = self.server.process.as_mut() else { return };
        let Some(waiting) = &mut process.planner.round else { return };
        waiting.left -= 1;
        waiting.refused.extend(refusal.map(|why| (uid, why)));
        if waiting.left == 0 {
            self.round_ends();
        }
    }

    fn round_ends(&mut self) {
        let now = self.now;
        let Some(process) = self.server.process.as_mut() else { return };
        let mono = process.clock.now(now).mono;
        let Some(Waiting { round, refused, .. }) = process.planner.round.take() else { return };
        let planner = &mut process.planner;
        let busy = round.ended(&mut planner.queue, refused, mono);
        if busy || !planner.heard.is_empty() || !process.news.is_empty() {
            return self.plan_soon();
        }
        let all = self.now > self.server.full_until + 2_000;
        if all && process.machine.ahead().revision == process.machine.durable().revision {
            let (view, live) = (process.machine.durable().clone(), process.live.clone());
            self.check_lost(&view, &live, mono);
        }
        let Some(process) = self.server.process.as_mut() else { return };
        let planner = &mut process.planner;
        let due = planner.queue.due().map_or(planner.check_at, |due| due.min(planner.check_at));
        let at = process.clock.when(due).max(now + 1);
        self.plan_at(at);
    }
}
