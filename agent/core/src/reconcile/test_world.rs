//! The machine, its disk and an engine in memory, for tests.

use super::*;
use crate::diff::Labels;
use crate::ledger;
use berth_proto::agent::{self, Replaces};
use prost::Message as _;

pub(super) const WITHIN_MS: u64 = 20_000;

#[derive(Clone, Default)]
pub(super) struct Want {
    pub(super) name: &'static str,
    pub(super) replaces: Option<&'static str>,
    pub(super) checked: bool,
    pub(super) never: bool,
    pub(super) image: &'static str,
}

pub(super) fn want(name: &'static str) -> Want {
    Want { name, ..Want::default() }
}

pub(super) fn body(want: &Want) -> Vec<u8> {
    let digest = Digest::of(format!("image {}", want.image).as_bytes()).to_string();
    let second = |s| Some(prost_types::Duration { seconds: s, nanos: 0 });
    let mut spec = api::DeploymentSpec {
        source: Some(api::deployment_spec::Source::Image("i".into())),
        ports: vec![api::Port { name: "http".into(), container: 80, ..Default::default() }],
        restart: Some(api::RestartPolicy {
            condition: if want.never { 3 } else { 1 },
            min_backoff: second(1),
            max_backoff: second(60),
        }),
        ..Default::default()
    };
    if want.checked {
        spec.health = Some(api::HealthCheck {
            check: Some(api::health_check::Check::Tcp(api::TcpCheck { port: "http".into() })),
            interval: second(1),
            timeout: second(1),
            failures: 2,
            startup: second(10),
            restart_after: second(5),
        });
    }
    agent::AssignmentBody {
        deployment_uid: "d".into(),
        deployment: "d".into(),
        namespace: "default".into(),
        release: 1,
        source: Some(api::ResolvedSource {
            image: Some(api::ResolvedImage { digest, ..Default::default() }),
            ..Default::default()
        }),
        spec: Some(spec),
        ..Default::default()
    }
    .encode_to_vec()
}

pub(super) fn set(wants: &[Want]) -> Arc<HeldSet> {
    let mut sent = BTreeMap::new();
    let mut entries = Vec::new();
    for want in wants {
        let bytes = body(want);
        let digest = Digest::of(&bytes);
        entries.push(SetEntry {
            replica_uid: want.name.into(),
            body_digest: digest.to_string(),
            deployment_uid: "d".into(),
            release: 1,
            replaces: want
                .replaces
                .map(|old| Replaces { replica_uid: old.into(), ready_within_ms: WITHIN_MS }),
            ..Default::default()
        });
        sent.insert(digest, bytes);
    }
    let none = Wanted::NotYetKnown;
    Arc::new(ledger::build(Default::default(), String::new(), entries, sent, &none).unwrap())
}

pub(super) fn uid(text: &str) -> ReplicaUid {
    text.parse().unwrap()
}

/// What befalls a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Luck {
    Good,
    /// Not done, and said so.
    Fails,
    /// Done, and the answer is lost.
    LosesAnswer,
}

/// The agent's machine, its disk, and an engine.
pub(super) struct World {
    pub(super) now: u64,
    pub(super) machine: Reconcile,
    /// What survives the agent.
    pub(super) disk: (Wanted, BTreeMap<ReplicaUid, Memory>),
    /// Asked for and not carried out yet.
    pub(super) asked: Vec<Effect>,
    /// Carried out and not yet told.
    pub(super) answers: Vec<Input>,
    pub(super) containers: BTreeMap<String, Container>,
    pub(super) made: u32,
    pub(super) up: bool,
    pub(super) disk_full: bool,
    pub(super) no_bridge: bool,
    /// No container can be started.
    pub(super) unstartable: bool,
    /// Which bodies' images the registry gives; `None`: all.
    pub(super) registry_up: bool,
    pub(super) images: BTreeSet<ReplicaUid>,
    pub(super) healthy: bool,
    pub(super) starts: BTreeMap<(ReplicaUid, u32), u32>,
    pub(super) reports: BTreeMap<ReplicaUid, ReplicaReport>,
    pub(super) absent: BTreeSet<ReplicaUid>,
    pub(super) engine_is: Option<bool>,
    pub(super) log: Vec<Effect>,
}

impl World {
    pub(super) fn new() -> Self {
        let machine = Reconcile::new(&Wanted::NotYetKnown, BTreeMap::new(), Mono(1));
        Self {
            now: 1,
            machine,
            disk: (Wanted::NotYetKnown, BTreeMap::new()),
            asked: Vec::new(),
            answers: vec![Input::Tick],
            containers: BTreeMap::new(),
            made: 0,
            up: true,
            disk_full: false,
            no_bridge: false,
            unstartable: false,
            registry_up: true,
            images: BTreeSet::new(),
            healthy: true,
            starts: BTreeMap::new(),
            reports: BTreeMap::new(),
            absent: BTreeSet::new(),
            engine_is: None,
            log: Vec::new(),
        }
    }

    pub(super) fn now(&self) -> Now {
        Now { mono: Mono(self.now), wall: Wall(i64::try_from(self.now).unwrap()) }
    }

    pub(super) fn tell(&mut self, input: Input) {
        for effect in self.machine.step(self.now(), input) {
            self.log.push(effect.clone());
            match effect {
                Effect::Report(report) => {
                    let uid = uid(&report.replica_uid);
                    let status = report.status.clone().unwrap();
                    if let Some(before) = self.reports.get(&uid) {
                        let before = before.status.as_ref().unwrap();
                        let newer =
                            (status.attempt, status.phase) >= (before.attempt, before.phase);
                        assert!(
                            newer || status.attempt == 0,
                            "{uid} went back from {before:?} to {status:?}"
                        );
                    }
                    self.reports.insert(uid, *report);
                }
                Effect::Absent(uid) => {
                    self.reports.remove(&uid);
                    self.absent.insert(uid);
                }
                Effect::EngineIs { available, .. } => self.engine_is = Some(available),
                other => self.asked.push(other),
            }
        }
    }

    /// The server's set is durable.
    pub(super) fn want(&mut self, wants: &[Want]) {
        let set = set(wants);
        self.disk.0 = Wanted::Set(Arc::clone(&set));
        self.tell(Input::SetTaken(set));
    }

    /// The agent ends and starts again from its disk; what it asked of the engine was done or not.
    pub(super) fn restart(&mut self) {
        self.asked.clear();
        self.answers = vec![Input::Tick];
        // Statuses of another start of the agent are another sequence, but attempts still grow.
        self.machine = Reconcile::new(&self.disk.0, self.disk.1.clone(), Mono(self.now));
        self.engine_is = None;
    }

    pub(super) fn running(&self) -> Vec<&str> {
        let running = self.containers.values().filter(|c| c.state == State::Running);
        running.map(|c| c.replica.as_str()).collect()
    }

    pub(super) fn of(&self, name: &str) -> Option<&Container> {
        self.containers.values().filter(|c| c.replica.as_str() == name).max_by_key(|c| c.attempt)
    }

    pub(super) fn status(&self, name: &str) -> api::ReplicaStatus {
        self.reports[&uid(name)].status.clone().unwrap()
    }

    pub(super) fn end(&mut self, name: &str, code: i32) {
        let time = Wall(i64::try_from(self.now).unwrap());
        let id = self.of(name).unwrap().id.clone();
        let container = self.containers.get_mut(&id).unwrap();
        container.state = State::Exited { code, out_of_memory: false, time };
        self.tell(Input::Happened { urgent: true });
    }

    pub(super) fn away(&self, step: StepId) -> Input {
        Input::StepFailed { step, cause: Cause::EngineAway, words: "away".into() }
    }

    /// Carries one effect out and keeps its answer.
    pub(super) fn carry_out(&mut self, effect: Effect, luck: Luck) {
        let time = Wall(i64::try_from(self.now).unwrap());
        let refused = |step| {
            let words = "the engine says no".to_owned();
            Input::StepFailed { step, cause: Cause::Engine, words }
        };
        let step = match &effect {
            Effect::Create { step, .. }
            | Effect::Start { step, .. }
            | Effect::Stop { step, .. }
            | Effect::Remove { step, .. } => Some(*step),
            _ => None,
        };
        if let Some(step) = step
            && (!self.up || luck == Luck::Fails)
        {
            let input = if self.up { refused(step) } else { self.away(step) };
            self.answers.push(input);
            return;
        }
        let answer = match effect {
            Effect::Persist { token, memory } => {
                let fails = self.disk_full || luck == Luck::Fails;
                if !fails {
                    self.disk.1 = memory;
                }
                let result = if fails { Err("the disk is full".into()) } else { Ok(()) };
                Input::Persisted { token, result }
            }
            Effect::Observe(look) if self.up && luck == Luck::Good => {
                let containers = self.containers.values().cloned().collect();
                Input::Observed { look, containers }
            }
            Effect::Observe(look) => Input::EngineAway { look, why: "it hangs".into() },
            Effect::Follow if self.up => Input::Followed,
            Effect::Follow => Input::FollowEnded,
            Effect::EnsureNetwork => Input::Network(match (self.up, self.no_bridge) {
                (true, false) => Ok(()),
                (true, true) => Err("they cannot be kept apart".into()),
                (false, _) => Err("away".into()),
            }),
            Effect::Fetch { step, replica } => {
                if self.registry_up && luck == Luck::Good {
                    self.images.insert(replica);
                    Input::StepDone { step, done: Done::Fetched }
                } else {
                    let cause = Cause::Bytes("PULL_FAILED");
                    Input::StepFailed { step, cause, words: "no registry".into() }
                }
            }
            Effect::Create { step, replica, attempt } => {
                let known = self.disk.1.get(&replica).map_or(0, |m| m.attempt);
                assert!(known >= attempt, "{replica} {attempt} is made before it is durable");
                assert!(
                    !self.containers.values().any(|c| c.replica == replica && c.attempt == attempt),
                    "{replica} {attempt} is made twice"
                );
                self.made += 1;
                let id = format!("c{}", self.made);
                let container = Container {
                    id: id.clone(),
                    replica,
                    attempt,
                    state: State::Created,
                    started: None,
                    grace_ms: 7_000,
                    labels: Labels::default(),
                };
                self.containers.insert(id.clone(), container);
                Input::StepDone { step, done: Done::Created { id } }
            }
            Effect::Start { step, .. } if self.unstartable => refused(step),
            Effect::Start { step, replica, id } => match self.containers.get_mut(&id) {
                Some(container) => {
                    if container.state != State::Running {
                        let attempt = container.attempt;
                        assert_eq!(container.state, State::Created, "an ended one is started");
                        *self.starts.entry((replica, attempt)).or_default() += 1;
                        container.state = State::Running;
                        container.started = Some(time);
                    }
                    Input::StepDone { step, done: Done::Seen(container.clone()) }
                }
                None => refused(step),
            },
            Effect::Stop { step, id, .. } => match self.containers.get_mut(&id) {
                Some(container) => {
                    if container.state == State::Running {
                        container.state = State::Exited { code: 0, out_of_memory: false, time };
                        container.started = None;
                    }
                    Input::StepDone { step, done: Done::Seen(container.clone()) }
                }
                None => Input::StepDone { step, done: Done::Unseen },
            },
            Effect::Remove { step, id, .. } => {
                let runs = self.containers.get(&id).is_some_and(|c| c.state == State::Running);
                if runs {
                    refused(step)
                } else {
                    self.containers.remove(&id);
                    Input::StepDone { step, done: Done::Removed }
                }
            }
            Effect::Probe { replica, attempt, .. } => {
                let outcome =
                    if self.healthy { Outcome::Healthy } else { Outcome::Unhealthy("503".into()) };
                Input::ProbeResult { replica, attempt, outcome }
            }
            Effect::StopFetch(_)
            | Effect::Report(_)
            | Effect::Absent(_)
            | Effect::EngineIs { .. } => return,
        };
        if luck == Luck::LosesAnswer
            && let Some(step) = step
        {
            let lost = self.away(step);
            self.answers.push(lost);
            return;
        }
        self.answers.push(answer);
    }

    /// Time passes until something like this is asked for, which is not carried out; nor is all else.
    pub(super) fn until_asked(&mut self, wanted: impl Fn(&Effect) -> bool) -> Effect {
        loop {
            if let Some(at) = self.asked.iter().position(&wanted) {
                return self.asked.remove(at);
            }
            self.now = self.now.max(self.machine.deadline().unwrap().0);
            self.tell(Input::Tick);
        }
    }

    /// Something has happened at the engine: the agent looks, and nothing else is carried out.
    pub(super) fn look(&mut self) {
        self.tell(Input::Happened { urgent: true });
        let effect = self.until_asked(|effect| matches!(effect, Effect::Observe(_)));
        self.carry_out(effect, Luck::Good);
        let answer = self.answers.pop().unwrap();
        self.tell(answer);
    }

    /// Carries out and tells all there is, without time passing.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            if let Some(effect) = (!self.asked.is_empty()).then(|| self.asked.remove(0)) {
                self.carry_out(effect, Luck::Good);
            } else if let Some(input) = (!self.answers.is_empty()).then(|| self.answers.remove(0)) {
                self.tell(input);
            } else {
                return;
            }
        }
        panic!("it never settles: {:?}", &self.log[self.log.len() - 20..]);
    }

    /// Time passes up to `until`, all being carried out as it comes.
    pub(super) fn run_until(&mut self, until: u64) {
        self.settle();
        while let Some(at) = self.machine.deadline().filter(|at| at.0 <= until) {
            self.now = self.now.max(at.0);
            self.tell(Input::Tick);
            self.settle();
        }
        self.now = self.now.max(until);
        self.tell(Input::Tick);
        self.settle();
    }

    pub(super) fn run_for(&mut self, ms: u64) {
        self.run_until(self.now + ms);
    }
}

pub(super) fn is_step(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Create { .. } | Effect::Start { .. } | Effect::Stop { .. } | Effect::Remove { .. }
    )
}

/// One that takes another's place.
pub(super) fn replaced() -> [Want; 2] {
    let new = Want { replaces: Some("old"), checked: true, image: "2", ..want("new") };
    [want("old"), new]
}
