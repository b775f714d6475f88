//! The ledger's pump: one writer over the memory store, and who waits for what it says.

use super::events::{Event, Life, LinkId};
use super::script::Moment;
use super::world::World;
use berth_proto::agent::ReplicaReport;
use berth_proto::api::HostFacts;
use berth_proto::ids::{DeploymentUid, HostUid, Revision, SetNumber, Wall};
use berth_server_core::batching::{Batch, Effect, Proposal, Refusal};
use berth_server_core::change::Change;
use berth_server_core::dispatch::Touched;
use berth_server_core::intake::{self, Absent};
use berth_server_core::keeping::{Keeping, Next};
use berth_server_core::memory::NotTaken;
use berth_server_core::session::Registration;
use berth_server_core::view::View;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What of an agent's words is to be kept.
#[derive(Debug)]
pub(super) enum What {
    Registration(Box<Registration>),
    Statuses(Vec<ReplicaReport>, Vec<String>, Option<SetNumber>),
    Facts(Box<HostFacts>),
    Trusts(u64),
    NeverThere(SetNumber, BTreeSet<String>),
    Quarantine(String),
}

/// What goes on after it is kept.
#[derive(Debug, Clone, Copy)]
pub(super) enum Then {
    Registered(LinkId),
    Taken(LinkId, u64),
    Resume(LinkId),
    Quarantined(LinkId),
}

/// Something that is being kept.
#[derive(Debug)]
struct Job {
    host: HostUid,
    what: What,
    now: Wall,
    keeping: Keeping,
    then: Then,
}

/// Who waits for an answer.
#[derive(Debug, Clone)]
pub(super) enum Waiter {
    Job(u64),
    Plan(DeploymentUid),
    Operation(usize),
}

/// Everything that waits for the ledger.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    jobs: BTreeMap<u64, Job>,
    waiters: BTreeMap<u64, Waiter>,
    issued: u64,
    answers: VecDeque<(Waiter, Result<Revision, Refusal>)>,
    answering: bool,
}

impl World<'_> {
    /// Has something kept.
    pub(super) fn keep(&mut self, host: HostUid, what: What, now: Wall, then: Then) {
        let Some(process) = self.server.process.as_mut() else { return };
        process.jobs.issued += 1;
        let id = process.jobs.issued;
        let (keeping, next) = match &what {
            What::Registration(_) => Keeping::behind(),
            What::Statuses(..)
            | What::Facts(_)
            | What::Trusts(_)
            | What::NeverThere(..)
            | What::Quarantine(_) => Keeping::begin(),
        };
        process.jobs.jobs.insert(id, Job { host, what, now, keeping, then });
        self.job_goes_on(id, next);
    }

    fn job_goes_on(&mut self, id: u64, next: Next) {
        let Some(process) = self.server.process.as_mut() else { return };
        let Some(job) = process.jobs.jobs.get_mut(&id) else { return };
        let next = if next == Next::Make {
            let view = process.machine.ahead();
            // A newer session has said hello meanwhile: what this one tells is older.
            let older = match (&job.what, job.then) {
                (
                    What::Registration(_) | What::Facts(_),
                    Then::Registered(link) | Then::Resume(link),
                ) => process
                    .sessions
                    .get(&link)
                    .is_none_or(|session| !process.desk.is_current(&job.host, session.id)),
                _ => false,
            };
            let made = |view: &View| {
                if older { Vec::new() } else { make(view, &job.host, &job.what, job.now) }
            };
            let changes = made(view);
            let durable = process.machine.durable();
            let lacks = || made(durable);
            job.keeping.made(view, &changes, lacks)
        } else {
            next
        };
        match next {
            Next::Make => {}
            Next::Propose(proposal) => {
                if self.server.rng.u8(0..4) == 0 {
                    let at = self.now + self.a_moment_ms();
                    let (life, waiter) = (self.server.life, Waiter::Job(id));
                    let proposal = Box::new(proposal);
                    self.events.push(at, Event::Sent { life, waiter, proposal });
                } else {
                    self.propose(Waiter::Job(id), proposal);
                }
            }
            Next::Over(kept) => {
                if let Some(job) = process.jobs.jobs.remove(&id) {
                    // An orphan is found by one look and its exits are taken in by the next.
                    if kept && matches!(job.what, What::Statuses(..)) {
                        let durable = process.machine.durable();
                        let lacks = make(durable, &job.host, &job.what, job.now);
                        self.check_kept_whole(&job.host, &lacks);
                    }
                    self.resumed(job.then, &job.host, kept);
                }
            }
        }
    }

    pub(super) fn propose(&mut self, waiter: Waiter, proposal: Proposal) {
        self.steps += 1;
        self.check_proposal(&waiter, &proposal);
        let Some(process) = self.server.process.as_mut() else { return };
        process.jobs.issued += 1;
        let id = process.jobs.issued;
        process.jobs.waiters.insert(id, waiter);
        let effects = process.machine.propose(id, proposal);
        self.ledger_effects(effects);
    }

    fn ledger_effects(&mut self, effects: Vec<Effect>) {
        let now = self.now;
        let life = self.server.life;
        for effect in effects {
            match effect {
                Effect::Persist { token, batches } => {
                    let slow = now < self.server.slow_until;
                    let took_ms = self.server.rng.u64(1..if slow { 12_000 } else { 6 });
                    self.events.push(now + took_ms, Event::Commit { life, token, batches });
                }
                Effect::Acknowledge { id, revision } => self.answer_later(id, Ok(revision)),
                Effect::Reject { id, why } => self.answer_later(id, Err(why)),
                Effect::Publish { view, changes } => self.published(&view, changes),
            }
        }
        self.answer_all();
    }

    fn answer_later(&mut self, id: u64, result: Result<Revision, Refusal>) {
        let Some(process) = self.server.process.as_mut() else { return };
        if let Some(waiter) = process.jobs.waiters.remove(&id) {
            process.jobs.answers.push_back((waiter, result));
        }
    }

    /// One answer after the other, however deep they ask for more.
    fn answer_all(&mut self) {
        let Some(process) = self.server.process.as_mut() else { return };
        if std::mem::replace(&mut process.jobs.answering, true) {
            return;
        }
        while let Some(process) = self.server.process.as_mut() {
            let Some((waiter, result)) = process.jobs.answers.pop_front() else { break };
            match waiter {
                Waiter::Job(id) => {
                    let next = process
                        .jobs
                        .jobs
                        .get_mut(&id)
                        .map(|job| job.keeping.answered(result.as_ref().err()));
                    if let Some(next) = next {
                        self.job_goes_on(id, next);
                    }
                }
                Waiter::Plan(uid) => self.plan_answered(uid, result.err()),
                Waiter::Operation(operation) => self.operation_answered(operation, result),
            }
        }
        if let Some(process) = self.server.process.as_mut() {
            process.jobs.answering = false;
        }
    }

    /// A view is durable and everybody's.
    fn published(&mut self, view: &View, changes: Vec<(Revision, Change)>) {
        self.check_published(view, &changes);
        let Some(process) = self.server.process.as_mut() else { return };
        let mut touched = Touched::default();
        for (_, change) in &changes {
            touched.by(change);
        }
        process.planner.heard.extend(changes.into_iter().map(|(_, change)| change));
        self.refresh_sets(&touched.hosts(view));
        self.plan_soon();
    }

    /// A group reaches the disk.
    pub(super) fn commit(&mut self, life: Life, token: u64, batches: &[Batch]) {
        let now = self.now;
        if self.server.life != life || !self.server.is_up() {
            return;
        }
        self.steps += 1;
        if let Some((Moment::BeforeWrite, down_ms)) = self.server.arm {
            return self.kill_server(down_ms);
        }
        self.server.store.full = now < self.server.full_until;
        let event = match self.server.store.commit(batches) {
            Ok(()) => Event::Committed { life, token },
            Err(NotTaken::Full) => Event::CommitFull { life, token },
            Err(NotTaken::OutOfOrder { held, offered }) => {
                return self.broke(format!("batch {offered} does not follow {held}"));
            }
        };
        let at = now + self.server.rng.u64(0..2);
        self.events.push(at, event);
        if let Some((Moment::AfterWrite | Moment::AfterStep, down_ms)) = self.server.arm {
            self.kill_server(down_ms);
        }
    }

    pub(super) fn committed(&mut self, life: Life, token: u64, full: bool) {
        if self.server.life != life {
            return;
        }
        self.steps += 1;
        let Some(process) = self.server.process.as_mut() else { return };
        let machine = &mut process.machine;
        let effects = if full { machine.full(token) } else { machine.persisted(token) };
        if full {
            self.plan_soon();
        }
        self.ledger_effects(effects);
    }
}

fn make(view: &View, host: &HostUid, what: &What, now: Wall) -> Vec<Change> {
    match what {
        What::Registration(said) => intake::registration(view, host, said, now),
        What::Statuses(reports, uids, held) => {
            intake::statuses(view, host, reports, Absent { uids, held: *held }, now)
        }
        What::Facts(facts) => intake::facts(view, host, facts).into_iter().collect(),
        What::Trusts(version) => intake::trusts(view, host, *version).into_iter().collect(),
        What::NeverThere(number, known) => intake::never_there(view, host, *number, known),
        What::Quarantine(why) => intake::quarantine(view, host, why, now),
    }
}
