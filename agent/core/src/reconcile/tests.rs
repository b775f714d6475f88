//! The machine against an engine in memory: first by scenario, then under seeded faults.

use super::*;
use crate::diff::Labels;
use crate::ledger;
use berth_proto::agent::{self, Replaces};
use berth_proto::api::ReplicaPhase;
use prost::Message as _;

const WITHIN_MS: u64 = 20_000;

#[derive(Clone, Default)]
struct Want {
    name: &'static str,
    replaces: Option<&'static str>,
    checked: bool,
    never: bool,
    image: &'static str,
}

fn want(name: &'static str) -> Want {
    Want { name, ..Want::default() }
}

fn body(want: &Want) -> Vec<u8> {
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

fn set(wants: &[Want]) -> Arc<HeldSet> {
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

fn uid(text: &str) -> ReplicaUid {
    text.parse().unwrap()
}

/// What befalls a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Luck {
    Good,
    /// Not done, and said so.
    Fails,
    /// Done, and the answer is lost.
    LosesAnswer,
}

/// The agent's machine, its disk, and an engine.
struct World {
    now: u64,
    machine: Reconcile,
    /// What survives the agent.
    disk: (Wanted, BTreeMap<ReplicaUid, Memory>),
    /// Asked for and not carried out yet.
    asked: Vec<Effect>,
    /// Carried out and not yet told.
    answers: Vec<Input>,
    containers: BTreeMap<String, Container>,
    made: u32,
    up: bool,
    disk_full: bool,
    no_bridge: bool,
    /// No container can be started.
    unstartable: bool,
    /// Which bodies' images the registry gives; `None`: all.
    registry_up: bool,
    images: BTreeSet<ReplicaUid>,
    healthy: bool,
    starts: BTreeMap<(ReplicaUid, u32), u32>,
    reports: BTreeMap<ReplicaUid, ReplicaReport>,
    absent: BTreeSet<ReplicaUid>,
    engine_is: Option<bool>,
    log: Vec<Effect>,
}

impl World {
    fn new() -> Self {
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

    fn now(&self) -> Now {
        Now { mono: Mono(self.now), wall: Wall(i64::try_from(self.now).unwrap()) }
    }

    fn tell(&mut self, input: Input) {
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
    fn want(&mut self, wants: &[Want]) {
        let set = set(wants);
        self.disk.0 = Wanted::Set(Arc::clone(&set));
        self.tell(Input::SetTaken(set));
    }

    /// The agent ends and starts again from its disk; what it asked of the engine was done or not.
    fn restart(&mut self) {
        self.asked.clear();
        self.answers = vec![Input::Tick];
        // Statuses of another start of the agent are another sequence, but attempts still grow.
        self.machine = Reconcile::new(&self.disk.0, self.disk.1.clone(), Mono(self.now));
        self.engine_is = None;
    }

    fn running(&self) -> Vec<&str> {
        let running = self.containers.values().filter(|c| c.state == State::Running);
        running.map(|c| c.replica.as_str()).collect()
    }

    fn of(&self, name: &str) -> Option<&Container> {
        self.containers.values().filter(|c| c.replica.as_str() == name).max_by_key(|c| c.attempt)
    }

    fn status(&self, name: &str) -> api::ReplicaStatus {
        self.reports[&uid(name)].status.clone().unwrap()
    }

    fn end(&mut self, name: &str, code: i32) {
        let time = Wall(i64::try_from(self.now).unwrap());
        let id = self.of(name).unwrap().id.clone();
        let container = self.containers.get_mut(&id).unwrap();
        container.state = State::Exited { code, out_of_memory: false, time };
        self.tell(Input::Happened { urgent: true });
    }

    fn away(&self, step: StepId) -> Input {
        Input::StepFailed { step, cause: Cause::EngineAway, words: "away".into() }
    }

    /// Carries one effect out and keeps its answer.
    fn carry_out(&mut self, effect: Effect, luck: Luck) {
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

    /// Carries out and tells all there is, without time passing.
    fn settle(&mut self) {
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
    fn run_until(&mut self, until: u64) {
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

    fn run_for(&mut self, ms: u64) {
        self.run_until(self.now + ms);
    }
}

fn is_step(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Create { .. } | Effect::Start { .. } | Effect::Stop { .. } | Effect::Remove { .. }
    )
}

#[test]
fn what_is_wanted_is_brought_made_started_and_told() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(100);
    assert_eq!(w.running(), ["a"]);
    let status = w.status("a");
    assert_eq!((status.attempt, status.phase(), status.ready), (1, ReplicaPhase::Running, true));
    let steps: Vec<&Effect> = w.log.iter().filter(|e| is_step(e)).collect();
    assert!(matches!(steps[..], [Effect::Create { attempt: 1, .. }, Effect::Start { .. }]));
    w.want(&[]);
    w.run_for(100);
    assert!(w.containers.is_empty() && w.absent.contains(&uid("a")));
    // It is stopped with the grace it was made with, though no set names it any more.
    assert!(w.log.iter().any(|e| matches!(e, Effect::Stop { grace_ms: 7_000, .. })));
}

#[test]
fn what_could_not_be_started_for_long_goes_at_once_when_it_is_not_wanted_any_more() {
    let mut w = World::new();
    w.unstartable = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert_eq!((w.running().len(), w.containers.len()), (0, 1));
    w.want(&[]);
    w.run_for(1_000);
    assert!(w.containers.is_empty() && w.absent.contains(&uid("a")));
}

#[test]
fn silence_removes_nothing_and_the_empty_set_does() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(100);
    // The disk is lost: nobody has said what is wanted.
    w.disk = (Wanted::NotYetKnown, BTreeMap::new());
    w.restart();
    w.log.clear();
    w.run_for(3_600_000);
    assert!(!w.log.iter().any(is_step));
    assert!(!w.reports[&uid("a")].assigned);
    w.want(&[]);
    w.run_for(100);
    assert!(w.containers.is_empty());
}

#[test]
fn a_running_container_is_adopted_after_a_restart_of_the_agent() {
    let mut w = World::new();
    w.want(&[want("a"), Want { checked: true, ..want("b") }]);
    w.run_for(1_000);
    w.log.clear();
    w.restart();
    w.run_for(600_000);
    assert!(!w.log.iter().any(is_step), "{:?}", w.log);
    assert!(w.status("a").ready && w.status("b").ready);
}

#[test]
fn a_look_that_began_before_a_step_ended_says_nothing_of_it() {
    let mut w = World::new();
    w.settle();
    w.want(&[want("a")]);
    // All but the looks is carried out; one that saw nothing comes in late.
    let mut late = Vec::new();
    for _ in 0..50 {
        if let Some(effect) = (!w.asked.is_empty()).then(|| w.asked.remove(0)) {
            let is_look = matches!(effect, Effect::Observe(_));
            w.carry_out(effect, Luck::Good);
            if is_look {
                late.extend(w.answers.pop());
            }
        }
        w.tell(Input::Happened { urgent: true });
        w.now += 25;
        if let Some(input) = w.answers.pop() {
            w.tell(input);
        }
        if !w.running().is_empty() {
            break;
        }
    }
    assert!(!late.is_empty() && w.running() == ["a"]);
    for input in late {
        w.tell(input);
    }
    w.run_for(60_000);
    assert_eq!((w.running(), w.containers.len()), (vec!["a"], 1));
}

#[test]
fn fifty_are_made_in_parallel_within_the_bound_after_one_fetch_and_one_write() {
    let names: Vec<&'static str> =
        (0..50).map(|n| &*Box::leak(format!("r{n}").into_boxed_str())).collect();
    let mut w = World::new();
    w.settle();
    w.log.clear();
    w.want(&names.iter().map(|n| want(n)).collect::<Vec<_>>());
    let mut most = 0;
    while let Some(effect) = (!w.asked.is_empty()).then(|| w.asked.remove(0)) {
        let under_way =
            w.asked.iter().filter(|e| is_step(e)).count() + usize::from(is_step(&effect));
        most = most.max(under_way);
        w.carry_out(effect, Luck::Good);
        while let Some(input) = w.answers.pop() {
            w.tell(input);
        }
    }
    w.run_for(1_000);
    assert_eq!((w.running().len(), most), (50, 16));
    let count = |f: fn(&Effect) -> bool| w.log.iter().filter(|e| f(e)).count();
    assert_eq!(count(|e| matches!(e, Effect::Fetch { .. })), 1);
    assert_eq!(count(|e| matches!(e, Effect::Persist { .. })), 1);
}

#[test]
fn no_container_is_made_while_the_disk_does_not_take_its_number() {
    let mut w = World::new();
    w.disk_full = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert!(w.containers.is_empty());
    assert_eq!(w.status("a").reason, "DISK_FAILED");
    let writes = w.log.iter().filter(|e| matches!(e, Effect::Persist { .. })).count();
    assert!((8..30).contains(&writes), "{writes} writes in ten minutes");
    w.disk_full = false;
    w.run_for(60_000);
    assert_eq!(w.running(), ["a"]);
}

#[test]
fn what_waits_for_a_bridge_that_cannot_be_made_says_so() {
    let mut w = World::new();
    w.no_bridge = true;
    w.want(&[want("a")]);
    w.run_for(600_000);
    assert!(w.containers.is_empty());
    let status = w.status("a");
    let told = (status.reason.as_str(), status.message.as_str());
    assert_eq!(told, ("NO_NETWORK", "they cannot be kept apart"));
    w.no_bridge = false;
    w.run_for(60_000);
    assert_eq!((w.running(), w.status("a").reason.as_str()), (vec!["a"], ""));
}

#[test]
fn an_engine_that_is_away_is_told_asked_for_ever_and_loses_nothing() {
    let mut w = World::new();
    w.up = false;
    w.want(&[want("a")]);
    w.run_for(3_600_000);
    assert_eq!((w.engine_is, w.status("a").reason.as_str()), (Some(false), "ENGINE_AWAY"));
    let looks = w.log.iter().filter(|e| matches!(e, Effect::Observe(_))).count();
    assert!((350..400).contains(&looks), "{looks} looks in an hour");
    w.up = true;
    w.run_for(11_000);
    assert_eq!((w.engine_is, w.running()), (Some(true), vec!["a"]));
    assert_eq!(w.status("a").reason, "");
    // It goes while something runs: that is left alone, and still told as it was.
    w.up = false;
    w.log.clear();
    w.tell(Input::FollowEnded);
    w.run_for(600_000);
    assert_eq!((w.engine_is, w.status("a").ready), (Some(false), true));
    assert!(!w.log.iter().any(is_step));
}

#[test]
fn a_program_that_ends_is_started_again_with_doubling_waits_and_no_server() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    let mut waits = Vec::new();
    for _ in 0..9 {
        w.end("a", 1);
        w.settle();
        w.run_for(50);
        assert_eq!(w.status("a").reason, "BACKOFF");
        let (ended, attempt) = (w.now, w.of("a").unwrap().attempt);
        while w.of("a").unwrap().attempt == attempt {
            w.run_for(100);
        }
        waits.push((w.now - ended).div_ceil(1_000));
        assert!(w.containers.len() <= 2, "one dead predecessor is kept, no more");
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    assert_eq!(w.containers.values().filter(|c| c.state != State::Running).count(), 1);
    // The wait goes on over a restart of the agent.
    w.end("a", 1);
    w.run_for(50);
    w.restart();
    w.run_for(50_000);
    assert!(w.running().is_empty());
    w.run_for(11_000);
    assert_eq!(w.running(), ["a"]);
}

#[test]
fn what_shall_not_run_again_does_not_even_after_a_restart_of_the_agent() {
    let mut w = World::new();
    w.want(&[Want { never: true, ..want("a") }]);
    w.run_for(10);
    w.end("a", 0);
    w.run_for(1_000);
    w.restart();
    w.run_for(3_600_000);
    assert_eq!((w.running().len(), w.starts.len()), (0, 1));
    assert_eq!(w.status("a").phase(), ReplicaPhase::Exited);
}

#[test]
fn a_check_that_fails_while_the_program_starts_up_restarts_nothing() {
    let mut w = World::new();
    w.healthy = false;
    w.want(&[Want { checked: true, ..want("a") }]);
    w.run_for(14_000);
    let status = w.status("a");
    assert_eq!((status.attempt, status.ready, status.reason.as_str()), (1, false, "NOT_READY"));
    // Ten seconds of start-up and five of being unready are over: it is started anew.
    w.run_for(4_000);
    assert_eq!(w.status("a").attempt, 2);
    w.healthy = true;
    w.run_for(2_000);
    assert!(w.status("a").ready);
    // A check nobody could ask is no failed one.
    let Some((replica, attempt)) = Some((uid("a"), 2)) else { return };
    for _ in 0..10 {
        w.tell(Input::ProbeResult {
            replica: replica.clone(),
            attempt,
            outcome: Outcome::NotAsked,
        });
    }
    assert!(w.status("a").ready);
}

#[test]
fn a_container_somebody_removed_is_made_anew_after_a_wait() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    w.containers.clear();
    w.tell(Input::Happened { urgent: true });
    w.run_for(100);
    assert_eq!(w.status("a").reason, "CONTAINER_GONE");
    assert!(w.containers.is_empty());
    w.run_for(2_000);
    assert_eq!((w.running(), w.of("a").unwrap().attempt), (vec!["a"], 2));
}

#[test]
fn one_that_is_wanted_again_after_somebody_started_it_anew_is_told_of_truly() {
    let mut w = World::new();
    w.want(&[want("a")]);
    w.run_for(10);
    w.want(&[]);
    // It is stopped, and the engine goes before it is removed.
    while w.of("a").unwrap().state == State::Running {
        let effect = w.asked.remove(0);
        w.carry_out(effect, Luck::Good);
    }
    for answer in std::mem::take(&mut w.answers) {
        w.tell(answer);
    }
    w.up = false;
    w.run_for(100);
    let id = w.of("a").unwrap().id.clone();
    w.containers.get_mut(&id).unwrap().state = State::Running;
    w.want(&[want("a")]);
    w.up = true;
    w.run_for(120_000);
    assert_eq!((w.running(), w.of("a").unwrap().attempt), (vec!["a"], 2));
    assert!(w.status("a").ready);
}

fn replaced() -> [Want; 2] {
    let new = Want { replaces: Some("old"), checked: true, image: "2", ..want("new") };
    [want("old"), new]
}

#[test]
fn the_bytes_are_here_before_the_predecessor_is_stopped() {
    let mut w = World::new();
    w.want(&[want("old")]);
    w.run_for(100);
    w.registry_up = false;
    w.want(&replaced());
    w.run_for(3_600_000);
    assert_eq!((w.running(), w.status("new").reason.as_str()), (vec!["old"], "PULL_FAILED"));
    w.registry_up = true;
    w.run_for(61_000);
    assert_eq!(w.running(), ["new"]);
    assert_eq!(w.status("old").reason, "REPLACED");
}

#[test]
fn a_replacement_has_all_of_its_time_after_a_disk_that_took_nothing() {
    let mut w = World::new();
    w.want(&[want("old")]);
    w.run_for(100);
    w.disk_full = true;
    w.healthy = false;
    w.want(&replaced());
    w.run_for(200_000);
    assert_eq!(w.running(), ["old"]);
    w.disk_full = false;
    let mut waited = 0;
    while w.running() == ["old"] {
        w.run_for(100);
        waited += 100;
        assert!(waited <= MAX_RETRY_MS, "the disk takes it and nothing is done");
    }
    w.run_for(WITHIN_MS - 2_000);
    assert_eq!(w.running(), ["new"], "it has its time");
    w.healthy = true;
    w.run_for(2_000);
    assert!(w.running() == ["new"] && w.status("new").ready);
}

#[test]
fn a_replacement_is_not_given_up_untried_for_a_disk_that_takes_nothing() {
    // The disk is full from some moment of the exchange on: whatever was durable by then.
    for moment in (0..400).step_by(10) {
        let mut w = World::new();
        w.want(&[want("old")]);
        w.run_for(100);
        w.want(&replaced());
        w.run_for(moment);
        w.disk_full = true;
        w.run_for(200_000);
        w.disk_full = false;
        w.run_for(200_000);
        assert_eq!(w.running(), ["new"], "full after {moment} ms");
        assert!(w.status("new").ready, "full after {moment} ms");
    }
}

#[test]
fn a_replacement_that_is_not_ready_in_time_gives_the_place_back_with_no_server() {
    for never in [false, true] {
        for restart in [false, true] {
            let mut w = World::new();
            let old = Want { never, ..want("old") };
            w.want(std::slice::from_ref(&old));
            w.run_for(100);
            w.healthy = false;
            w.want(&[old, replaced()[1].clone()]);
            w.run_for(5_000);
            assert_eq!(w.running(), ["new"]);
            if restart {
                // The server is gone, the registry as well, and the agent starts anew.
                w.registry_up = true;
                w.restart();
            }
            w.run_for(WITHIN_MS - 6_000);
            assert!(!w.running().contains(&"old"), "it has its time");
            // Each restart adds at most the pause between two writes.
            w.run_for(if restart { 2_000 + COUNT_DOWN_MS } else { 2_000 });
            assert_eq!(w.running(), ["old"], "never {never} restart {restart}");
            assert_eq!(w.status("new").reason, "REPLACEMENT_FAILED");
            w.restart();
            w.run_for(600_000);
            assert_eq!(w.running(), ["old"]);
        }
    }
}

#[test]
fn a_transfer_nobody_waits_for_any_more_is_ended() {
    let mut w = World::new();
    w.settle();
    w.want(&[want("a")]);
    let fetch = w.asked.iter().find_map(|e| match e {
        Effect::Fetch { step, .. } => Some(*step),
        _ => None,
    });
    w.want(&[]);
    assert!(w.asked.contains(&Effect::StopFetch(fetch.unwrap())));
    assert!(w.absent.contains(&uid("a")));
}

/// Numbers from a seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).unwrap()
    }
}

fn check(w: &World, seed: u64) {
    for ((replica, attempt), count) in &w.starts {
        assert_eq!(*count, 1, "seed {seed}: attempt {attempt} of {replica} was started twice");
    }
    let running = w.running();
    let unique: BTreeSet<&str> = running.iter().copied().collect();
    assert_eq!(unique.len(), running.len(), "seed {seed}: one replica runs twice: {running:?}");
    let both = unique.contains("old") && unique.contains("new");
    assert!(!both, "seed {seed}: two run for one slot");
}

/// One run under faults: what the engine does, loses and forgets, when the agent dies before and
/// after a write, is drawn from the seed.
fn faults(seed: u64) {
    let mut draw = Draw(seed);
    let mut w = World::new();
    let sets = [
        vec![want("old"), want("a"), Want { checked: true, ..want("b") }],
        vec![replaced()[0].clone(), replaced()[1].clone(), want("a")],
        vec![Want { replaces: None, ..replaced()[1].clone() }, want("a"), want("c")],
    ];
    let mut given = 0;
    w.want(&sets[0]);
    for _ in 0..600 {
        match draw.below(40) {
            0..=15 if !w.asked.is_empty() => {
                let at = draw.below(w.asked.len());
                let effect = w.asked.remove(at);
                let luck = match draw.below(12) {
                    0 => Luck::Fails,
                    1 => Luck::LosesAnswer,
                    _ => Luck::Good,
                };
                w.carry_out(effect, luck);
            }
            16..=30 if !w.answers.is_empty() => {
                let at = draw.below(w.answers.len());
                let input = w.answers.remove(at);
                w.tell(input);
            }
            31..=33 => {
                let due = w.machine.deadline().map_or(0, |at| at.0);
                w.now = w.now.max(due.min(w.now + 30_000)) + draw.below(50) as u64;
                w.tell(Input::Tick);
            }
            34 => {
                let ids: Vec<String> = w.containers.keys().cloned().collect();
                if let Some(id) = ids.get(draw.below(ids.len().max(1))) {
                    let time = Wall(i64::try_from(w.now).unwrap());
                    let container = w.containers.get_mut(id).unwrap();
                    if container.state == State::Running {
                        let code = i32::try_from(draw.below(2)).unwrap();
                        container.state = State::Exited { code, out_of_memory: false, time };
                    }
                }
            }
            35 if draw.below(3) == 0 => {
                let ids: Vec<String> = w.containers.keys().cloned().collect();
                if let Some(id) = ids.get(draw.below(ids.len().max(1))) {
                    w.containers.remove(id);
                }
            }
            36 => w.up = draw.below(3) != 0,
            37 => {
                w.healthy = draw.below(3) != 0;
                w.registry_up = draw.below(4) != 0;
                w.disk_full = draw.below(6) == 0;
            }
            38 if draw.below(2) == 0 => {
                // The agent dies: each call on its way is done, or never was.
                for effect in std::mem::take(&mut w.asked) {
                    if draw.below(2) == 0 {
                        w.carry_out(effect, Luck::Good);
                    }
                }
                w.restart();
            }
            39 if draw.below(6) == 0 && given + 1 < sets.len() => {
                given += 1;
                let set = sets[given].clone();
                w.want(&set);
            }
            _ => w.tell(Input::Happened { urgent: draw.below(2) == 0 }),
        }
        check(&w, seed);
    }
    // Faults end: what is wanted runs, and nothing else is left of the rest.
    (w.up, w.healthy, w.registry_up, w.disk_full) = (true, true, true, false);
    while given + 1 < sets.len() {
        given += 1;
        let set = sets[given].clone();
        w.want(&set);
        w.run_for(300_000);
        check(&w, seed);
    }
    w.run_for(300_000);
    check(&w, seed);
    let mut running = w.running();
    running.sort_unstable();
    assert_eq!(running, ["a", "c", "new"], "seed {seed}: {:?}", w.reports);
    assert!(!w.containers.values().any(|c| ["old", "b"].contains(&c.replica.as_str())));
    for name in ["a", "c", "new"] {
        assert!(w.status(name).ready, "seed {seed}: {name}");
    }
}

#[test]
fn under_any_faults_nothing_is_started_twice_and_afterwards_all_is_as_wanted() {
    for seed in 0..400 {
        faults(seed);
    }
}
