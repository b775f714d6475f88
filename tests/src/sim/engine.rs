//! An engine in memory: it is slow, fails, loses answers, tells late, and containers end, vanish or are
//! started behind the agent's back.

use super::check::Started;
use super::events::{Event, Life, NodeId, Stop};
use super::remembered::serves;
use super::script::{Moment, Program};
use super::specs;
use super::world::World;
use berth_agent_core::diff::{Container, Labels, State};
use berth_agent_core::policy;
use berth_agent_core::reconcile::{Cause, Done, Effect, Input, Outcome, StepId};
use berth_proto::convert;
use berth_proto::ids::{Digest, ReplicaUid};
use berth_proto::values::{AssignmentBody, Resources};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A call that is not answered ends after so long, as the engine's adapter keeps it.
const CALL_DEADLINE_MS: u64 = 15_000;
/// A program that did not answer is told to have been so for a while after.
pub(super) const SICK_MS: u64 = 60_000;
/// Well for so long: a check has seen it.
const WELL_MS: u64 = 16_000;
/// Time a stopped program takes at most here.
const STOP_MS: u64 = 1_500;

/// A container and its program.
#[derive(Debug, Clone)]
pub(super) struct Made {
    pub(super) shown: Container,
    pub(super) program: Program,
    host_port: bool,
    /// It has lost the name that keeps another one of its attempt from being made.
    pub(super) renamed: bool,
    pub(super) resources: Resources,
    /// From when until when it does not answer; what lies less than three checks apart is one.
    pub(super) sick: Vec<(u64, u64)>,
    /// Starts so far.
    pub(super) starts: u32,
    pub(super) running_since: u64,
    /// When it ended by itself.
    pub(super) ended: Option<u64>,
    /// Its agent stopped it.
    pub(super) stopped: bool,
    /// It ended while one of two that change places: that counts for nothing.
    pub(super) ended_in_exchange: bool,
}

impl Made {
    /// It does not answer now.
    fn is_sick(&self, now: u64) -> bool {
        self.sick.last().is_some_and(|(from, until)| *from <= now && now < *until)
    }
}

/// An engine.
#[derive(Debug, Default)]
pub(super) struct Engine {
    pub(super) containers: BTreeMap<u32, Made>,
    made: u32,
    pub(super) images: BTreeSet<Digest>,
    pub(super) away_until: u64,
    pub(super) down_since: u64,
    /// It takes calls and answers none.
    pub(super) hangs_until: u64,
    /// Another program has the port that programs here publish.
    pub(super) port_taken_until: u64,
    pub(super) registry_away_until: u64,
    /// Until when something is wrong with it or with its agent's disk.
    pub(super) troubled_until: u64,
    pub(super) slow_by_ms: u64,
    pub(super) slow_until: u64,
    pub(super) late_until: u64,
    pub(super) fails: u8,
    pub(super) loses: u8,
    /// Who follows its events.
    pub(super) follower: Option<Life>,
    /// When that one hears that it does.
    pub(super) followed_at: u64,
}

impl Engine {
    pub(super) fn is_up(&self, now: u64) -> bool {
        now >= self.away_until && now >= self.hangs_until
    }

    /// It has been away or silent for so long.
    pub(super) fn down_for(&self, now: u64) -> u64 {
        if self.is_up(now) { 0 } else { now - self.down_since }
    }

    pub(super) fn running(&self) -> impl Iterator<Item = &Made> {
        self.containers.values().filter(|c| c.shown.state == State::Running)
    }

    /// Grows with each one that is made, and changes with each one that ends.
    pub(super) fn made_and_running(&self) -> u64 {
        u64::from(self.made) * 1_000 + u64::try_from(self.running().count()).unwrap_or(0)
    }

    /// Something is wrong until then.
    pub(super) fn troubled(&mut self, until: u64) {
        self.troubled_until = self.troubled_until.max(until);
    }

    /// A program here has the port that is published.
    pub(super) fn publishes(&self) -> bool {
        self.running().any(|c| c.host_port)
    }

    fn runs_of(&self, replica: &ReplicaUid) -> usize {
        self.running().filter(|c| c.shown.replica == *replica).count()
    }
}

pub(super) fn number(id: &str) -> u32 {
    id.trim_start_matches('c').parse().unwrap_or(u32::MAX)
}

/// A call that is a step.
fn step_of(effect: &Effect) -> Option<StepId> {
    match effect {
        Effect::Fetch { step, .. }
        | Effect::Create { step, .. }
        | Effect::Start { step, .. }
        | Effect::Stop { step, .. }
        | Effect::Remove { step, .. } => Some(*step),
        Effect::Persist { .. }
        | Effect::Observe(_)
        | Effect::Follow
        | Effect::EnsureNetwork
        | Effect::StopFetch(_)
        | Effect::Probe { .. }
        | Effect::Report(_)
        | Effect::Absent(_)
        | Effect::EngineIs { .. } => None,
    }
}

impl World<'_> {
    /// A call reaches the engine.
    pub(super) fn call(&mut self, node: NodeId, life: Life, effect: Effect) {
        self.steps += 1;
        let now = self.now;
        let held = &mut self.nodes[node];
        // The agent died meanwhile: the call may not have been sent.
        if (held.life != life && held.rng.bool()) || held.gone {
            return;
        }
        let up = held.engine.is_up(now);
        let mut answer_ms = held.rng.u64(0..6);
        if now < held.engine.slow_until {
            answer_ms += held.rng.u64(0..=held.engine.slow_by_ms);
        }
        let step = step_of(&effect).filter(|_| !matches!(effect, Effect::Fetch { .. }));
        let away = "the engine is away".to_owned();
        if !up {
            // Refused at once, or it hangs until its deadline.
            let hangs = held.rng.u8(0..3) == 0 || now < held.engine.hangs_until;
            let hangs_ms = match &effect {
                Effect::Probe { check, .. } => check.timeout_ms.min(CALL_DEADLINE_MS),
                _ => CALL_DEADLINE_MS,
            };
            let at = now + if hangs { hangs_ms } else { answer_ms };
            let input = match effect {
                Effect::Observe(look) => Input::EngineAway { look, why: away },
                Effect::Follow => Input::FollowEnded,
                Effect::EnsureNetwork => Input::Network(Err(away)),
                Effect::Probe { replica, attempt, .. } => {
                    Input::ProbeResult { replica, attempt, outcome: Outcome::NotAsked }
                }
                other => match step_of(&other) {
                    Some(step) => Input::StepFailed { step, cause: Cause::EngineAway, words: away },
                    None => return,
                },
            };
            return self.events.push(at, Event::Tell { node, life, input: Box::new(input) });
        }
        if let Some(step) = step
            && held.engine.fails > 0
        {
            held.engine.fails -= 1;
            if matches!(effect, Effect::Stop { .. } | Effect::Remove { .. }) {
                held.engine.troubled(now);
            }
            let words = "the engine says no".to_owned();
            let input = Box::new(Input::StepFailed { step, cause: Cause::Engine, words });
            return self.events.push(now + answer_ms, Event::Tell { node, life, input });
        }
        let mut answers = Vec::new();
        let is_step =
            matches!(effect, Effect::Create { .. } | Effect::Start { .. } | Effect::Stop { .. });
        match effect {
            Effect::Observe(look) => {
                let containers = held.engine.containers.values().map(|c| c.shown.clone()).collect();
                answers.push((0, Input::Observed { look, containers }));
            }
            Effect::Follow => {
                if held.life == life {
                    held.engine.follower = Some(life);
                    held.engine.followed_at = now + answer_ms;
                }
                answers.push((0, Input::Followed));
            }
            Effect::EnsureNetwork => answers.push((0, Input::Network(Ok(())))),
            Effect::Fetch { step, replica } => self.fetches(node, life, step, &replica),
            Effect::Create { step, replica, attempt } => {
                let input = match self.makes(node, &replica, attempt) {
                    Ok(done) => Input::StepDone { step, done },
                    Err((cause, words)) => Input::StepFailed { step, cause, words },
                };
                answers.push((0, input));
            }
            Effect::Start { step, replica, id } => {
                let input = match self.starts(node, &replica, number(&id)) {
                    Ok(done) => Input::StepDone { step, done },
                    Err((cause, words)) => Input::StepFailed { step, cause, words },
                };
                answers.push((0, input));
            }
            Effect::Stop { step, replica, id, grace_ms } => {
                let made = held.engine.containers.get(&number(&id));
                if made.is_some_and(|made| made.shown.grace_ms != grace_ms) {
                    self.broke(format!("{replica} is given {grace_ms} ms to end"));
                }
                return self.stops(node, life, step, &replica, number(&id), answer_ms);
            }
            Effect::Remove { step, id, .. } => {
                // Asked for while no set named its replica, it may be wanted again by now.
                let is_named = !self.book.put_away.contains(&(node, id.clone()));
                let id = number(&id);
                if is_named {
                    self.check_put_away(node, id);
                }
                let engine = &mut self.nodes[node].engine;
                let runs =
                    engine.containers.get(&id).is_some_and(|c| c.shown.state == State::Running);
                let input = if runs {
                    let words = "it runs".to_owned();
                    Input::StepFailed { step, cause: Cause::Engine, words }
                } else {
                    engine.containers.remove(&id);
                    Input::StepDone { step, done: Done::Removed }
                };
                answers.push((0, input));
            }
            Effect::Probe { replica, attempt, .. } => {
                let found = held
                    .engine
                    .running()
                    .find(|c| c.shown.replica == replica && c.shown.attempt == attempt);
                let outcome = match found {
                    None => Outcome::NotAsked,
                    Some(c) if !c.is_sick(now) && serves(c, now) => Outcome::Healthy,
                    Some(_) => Outcome::Unhealthy("refused".to_owned()),
                };
                answers.push((0, Input::ProbeResult { replica, attempt, outcome }));
            }
            Effect::Persist { .. }
            | Effect::StopFetch(_)
            | Effect::Report(_)
            | Effect::Absent(_)
            | Effect::EngineIs { .. } => {}
        }
        if is_step && self.dies_at(node, Moment::AfterStep) {
            return;
        }
        for (later, input) in answers {
            let later = answer_ms + later;
            self.answers(node, life, step, later, input);
        }
    }

    /// A call is carried out; whoever asked for it hears so, if nothing is lost.
    fn answers(
        &mut self,
        node: NodeId,
        life: Life,
        step: Option<StepId>,
        later: u64,
        input: Input,
    ) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let (later, input) = match step {
            Some(step) if held.engine.loses > 0 => {
                held.engine.loses -= 1;
                held.engine.troubled(now + CALL_DEADLINE_MS);
                let words = "the engine did not answer".to_owned();
                let cause = Cause::EngineAway;
                (CALL_DEADLINE_MS, Input::StepFailed { step, cause, words })
            }
            Some(_) | None => (later, input),
        };
        self.events.push(now + later, Event::Tell { node, life, input: Box::new(input) });
    }

    /// The body the agent works off.
    fn body_of(&self, node: NodeId, replica: &ReplicaUid) -> Option<(Arc<AssignmentBody>, Labels)> {
        let set = self.nodes[node].agent.as_ref()?.board.wanted.set()?;
        let entry = set.entries.get(replica)?;
        let labels = Labels {
            deployment_uid: entry.deployment_uid.clone(),
            release: entry.release,
            body_digest: entry.body_digest.clone(),
        };
        Some((Arc::clone(&set.body(entry)?.value), labels))
    }

    /// What the host's own policy says.
    pub(super) fn judged(
        &self,
        node: NodeId,
        replica: &ReplicaUid,
    ) -> Result<(Arc<AssignmentBody>, Labels), (Cause, String)> {
        let not_wanted = (Cause::Engine, "it is not wanted any more".to_owned());
        let found = self.body_of(node, replica).ok_or(not_wanted)?;
        let facts = convert::host_facts_from_api(&self.nodes[node].facts);
        let platform = (facts.os.as_str(), facts.arch.as_str());
        policy::judge(&found.0, &facts.policy, &facts.features, platform, |_| None)
            .map_err(|why| (Cause::Forbidden, why.to_string()))?;
        Ok(found)
    }

    fn makes(
        &mut self,
        node: NodeId,
        replica: &ReplicaUid,
        attempt: u32,
    ) -> Result<Done, (Cause, String)> {
        let (body, labels) = self.judged(node, replica)?;
        let image = body.source.image.digest.clone();
        let program = self.programs.get(&image).copied().unwrap_or(Program::Good);
        let held = &mut self.nodes[node];
        if !held.engine.images.contains(&image) {
            return Err((Cause::BytesGone, "its image is not here".to_owned()));
        }
        let same =
            |c: &Made| c.shown.replica == *replica && c.shown.attempt == attempt && !c.renamed;
        if held.engine.containers.values().any(same) {
            return Ok(Done::Unseen);
        }
        self.check_made(node, replica, attempt);
        if let Some(model) = &body.source.artifact {
            self.check_brought(node, replica, &model.digest);
        }
        let held = &mut self.nodes[node];
        let durable = held.disk.memory.get(replica).map_or(0, |m| m.attempt);
        if durable < attempt && held.agent.is_some() {
            self.broke(format!("attempt {attempt} of {replica} is made before it is durable"));
        }
        let engine = &mut self.nodes[node].engine;
        engine.made += 1;
        let id = format!("c{}", engine.made);
        let shown = Container {
            id: id.clone(),
            replica: replica.clone(),
            attempt,
            state: State::Created,
            started: None,
            grace_ms: body.spec.stop_grace_ms,
            labels,
        };
        let host_port = body.spec.ports.iter().any(|p| p.publish.is_some());
        let resources = body.spec.resources;
        let made = Made {
            shown,
            program,
            host_port,
            renamed: false,
            resources,
            sick: Vec::new(),
            starts: 0,
            running_since: 0,
            ended: None,
            stopped: false,
            ended_in_exchange: false,
        };
        engine.containers.insert(engine.made, made);
        Ok(Done::Created { id })
    }

    fn starts(
        &mut self,
        node: NodeId,
        replica: &ReplicaUid,
        id: u32,
    ) -> Result<Done, (Cause, String)> {
        let (body, _) = self.judged(node, replica)?;
        if let Some(model) = &body.source.artifact {
            self.check_brought(node, replica, &model.digest);
        }
        let now = self.now;
        let held = &mut self.nodes[node];
        let wall = held.clock.wall(now);
        let taken = held.engine.running().any(|c| c.host_port && c.shown.replica != *replica)
            || now < held.engine.port_taken_until;
        let Some(container) = held.engine.containers.get_mut(&id) else {
            return Err((Cause::Engine, "no such container".to_owned()));
        };
        if container.host_port && taken {
            return Err((Cause::PortInUse, "its host port is in use".to_owned()));
        }
        if container.shown.state == State::Running {
            return Ok(Done::Seen(container.shown.clone()));
        }
        container.shown.state = State::Running;
        container.shown.started = Some(wall);
        container.starts += 1;
        container.running_since = now;
        let (shown, starts) = (container.shown.clone(), container.starts);
        if container.program == Program::Crashes {
            let event = Event::ProgramEnds { node, container: id, start: starts };
            self.events.push(now + specs::CRASH_MS, event);
        }
        self.note(|w| {
            format!("attempt {} of {replica} runs on {}", shown.attempt, w.nodes[node].uid)
        });
        self.container_runs(Started { node, replica: replica.clone(), starts });
        Ok(Done::Seen(shown))
    }

    /// A program is told to stop, and takes its time.
    fn stops(
        &mut self,
        node: NodeId,
        life: Life,
        step: StepId,
        replica: &ReplicaUid,
        id: u32,
        answer_ms: u64,
    ) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let made = held.engine.containers.get(&id);
        let running = made.filter(|made| made.shown.state == State::Running).cloned();
        let took_ms = if running.is_some() { held.rng.u64(0..STOP_MS) } else { 0 };
        if let Some(made) = &running {
            // Whoever does not answer for long may be stopped for that.
            let sick = made.sick.last().filter(|(_, until)| now < until + SICK_MS);
            // Starting up is no illness.
            let ran_ms = (now - made.running_since).saturating_sub(8_000);
            let (program, ill_ms) = match (sick, made.program) {
                (Some((from, _)), Program::Good | Program::Slow) => (Program::Deaf, now - from),
                (_, program) => (program, ran_ms),
            };
            let others = held.engine.runs_of(replica) - 1;
            self.check_stopped((node, life), replica, (program, ill_ms), others);
        }
        let start = running.map(|made| made.starts);
        let stop = Stop { step, replica: replica.clone(), container: id, start, answer_ms };
        self.events.push(now + took_ms, Event::Stopped { node, life, stop: Box::new(stop) });
    }

    /// A program that was told to stop has ended, if it still ran. Whoever runs the engine then is who
    /// answers.
    pub(super) fn stopped(&mut self, node: NodeId, life: Life, stop: &Stop) {
        let now = self.now;
        let held = &mut self.nodes[node];
        if held.gone {
            return;
        }
        let time = held.clock.wall(now);
        let made = held.engine.containers.get_mut(&stop.container);
        let mut ends = false;
        let done = made.map_or(Done::Unseen, |made| {
            ends = made.shown.state == State::Running && stop.start == Some(made.starts);
            if ends {
                made.shown.state = State::Exited { code: 0, out_of_memory: false, time };
                made.shown.started = None;
                made.stopped = true;
            }
            Done::Seen(made.shown.clone())
        });
        let here = held.engine.is_up(now);
        if let Done::Seen(shown) = &done
            && ends
        {
            let (attempt, uid) = (shown.attempt, stop.replica.clone());
            self.note(|w| {
                format!("attempt {attempt} of {uid} is stopped on {}", w.nodes[node].uid)
            });
            self.happened(node, true);
        }
        if self.dies_at(node, Moment::AfterStep) {
            return;
        }
        let step = stop.step;
        let input = if here {
            Input::StepDone { step, done }
        } else {
            let words = "the engine is away".to_owned();
            Input::StepFailed { step, cause: Cause::EngineAway, words }
        };
        self.answers(node, life, Some(step), stop.answer_ms, input);
    }

    /// The engine's event stream tells of something.
    pub(super) fn happened(&mut self, node: NodeId, urgent: bool) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let Some(life) = held.engine.follower.filter(|life| *life == held.life) else { return };
        let late = if now < held.engine.late_until { held.rng.u64(0..30_000) } else { 0 };
        // One that hangs tells it when it goes on.
        let at = now.max(held.engine.hangs_until) + late + held.rng.u64(0..20);
        let input = Box::new(Input::Happened { urgent });
        self.events.push(at, Event::Tell { node, life, input });
    }

    /// A program ends, if it still runs the same start.
    pub(super) fn program_ends(&mut self, node: NodeId, id: u32, start: u32) {
        let held = &self.nodes[node];
        let runs = held.engine.containers.get(&id).is_some_and(|c| c.starts == start);
        if runs && !held.gone {
            self.end_program(node, id, 1);
        }
    }

    pub(super) fn end_program(&mut self, node: NodeId, id: u32, code: i32) {
        let held = &mut self.nodes[node];
        let time = held.clock.wall(self.now);
        let Some(container) = held.engine.containers.get_mut(&id) else { return };
        if container.shown.state == State::Running {
            container.shown.state = State::Exited { code, out_of_memory: code == 137, time };
            container.shown.started = None;
            container.ended = Some(self.now);
            let (uid, attempt) = (container.shown.replica.clone(), container.shown.attempt);
            let ran_ms = self.now - container.running_since;
            if self.changes_places(node, &uid) {
                if let Some(made) = self.nodes[node].engine.containers.get_mut(&id) {
                    made.ended_in_exchange = true;
                }
            } else {
                self.count_failure(node, &uid, attempt, ran_ms);
            }
            self.happened(node, true);
        }
    }

    /// When an attempt ended by itself.
    pub(super) fn ended(&self, node: NodeId, replica: &ReplicaUid, attempt: u32) -> Option<u64> {
        let mut all = self.nodes[node].engine.containers.values();
        all.find(|c| c.shown.replica == *replica && c.shown.attempt == attempt)?.ended
    }

    /// The n-th container of a machine, and whether it runs.
    pub(super) fn nth(&self, node: NodeId, which: u8) -> Option<(u32, bool)> {
        let all = &self.nodes[node].engine.containers;
        let (id, made) = all.iter().nth(usize::from(which) % all.len().max(1))?;
        Some((*id, made.shown.state == State::Running))
    }

    /// A program does not answer for a while.
    pub(super) fn falls_sick(&mut self, node: NodeId, which: u8, for_ms: u64) {
        let (now, until) = (self.now, self.now + for_ms);
        // One whose check notices, if there is any.
        let all = self.nodes[node].engine.containers.iter();
        let runs = all.filter(|(_, c)| c.shown.state == State::Running);
        let checked: Vec<u32> = runs
            .filter(|(_, c)| {
                let body = self.body_of(node, &c.shown.replica);
                body.is_some_and(|(body, _)| body.spec.health.is_some())
            })
            .map(|(id, _)| *id)
            .collect();
        let Some(container) = checked.get(usize::from(which) % checked.len().max(1)) else {
            return;
        };
        let held = &mut self.nodes[node];
        let (life, container) = (held.life, *container);
        let Some(made) = held.engine.containers.get_mut(&container) else { return };
        match made.sick.last_mut().filter(|(_, last)| now < *last + WELL_MS) {
            Some((_, last)) => *last = until.max(*last),
            None => made.sick.push((now, until)),
        }
        self.events.push(until, Event::SickEnds { node, life, container, for_ms });
    }

    /// Somebody starts a container that has ended.
    pub(super) fn start_by_hand(&mut self, node: NodeId, which: u8) {
        let now = self.now;
        let Some((id, false)) = self.nth(node, which) else { return };
        let held = &mut self.nodes[node];
        let wall = held.clock.wall(now);
        let Some(container) = held.engine.containers.get_mut(&id) else { return };
        container.shown.state = State::Running;
        container.shown.started = Some(wall);
        container.starts += 1;
        container.running_since = now;
        let replica = container.shown.replica.clone();
        if container.program == Program::Crashes {
            let event = Event::ProgramEnds { node, container: id, start: container.starts };
            self.events.push(now + specs::CRASH_MS, event);
        }
        self.book.by_hand.insert(replica);
        self.happened(node, false);
    }
}
