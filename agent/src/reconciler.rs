//! Pumps the reconciling machine: asks the engine, the disk and the programs what it wants to know,
//! and tells it what they said.
//!
//! Decides nothing: when something is done, tried again or given up is the machine's business
//! (`berth_agent_core::reconcile`). Every step, look and check is a task of its own, so that none
//! waits for another, and answers exactly once; each ends by its own deadline, which the engine's
//! adapter and the checks keep.

use crate::containers::{self, Attempt};
use crate::engine::{
    ContainerState, Engine, EngineError, EventKind, LogQuery, ObservedContainer, Traffic,
};
use crate::fetch::bring::{BringError, Fetcher, Told};
use crate::probes::{self, Unended};
use crate::state::{Running, Shared};
use async_trait::async_trait;
use berth_agent_core::diff::Container;
use berth_agent_core::ledger::Wanted;
use berth_agent_core::policy::{self, Forbidden, Real};
use berth_agent_core::reconcile::{
    Cause, Done, Effect, Input, Look, Outcome, Reconcile, StepId, Token,
};
use berth_proto::convert::{MAX_LAST_LINE, last_line};
use berth_proto::ids::ReplicaUid;
use berth_proto::values::{AssignmentBody, HealthCheck, PlatformImage, ResolvedArtifact};
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Answers on their way to the machine. It takes each in microseconds; a task that finds no room
/// waits.
const ANSWERS: usize = 1024;
/// Reading what a program wrote last: its end is told without it rather than late.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Lines of its output that are looked at.
const LAST_LINES: u32 = 8;
/// Lines before the last one that are told with it.
const LINES_BEFORE: usize = 2;
/// Programs whose last words are read at once: when a whole host ends, its ends come first.
const LAST_AT_ONCE: usize = 16;
/// Resolving the links of a few paths; a network file system that hangs must not hold up a step.
const RESOLVE: Duration = Duration::from_secs(10);

/// Who brings image and artifact.
#[async_trait]
pub trait Bring: Send + Sync {
    /// The set has changed: what may be asked for from now on.
    fn wanted(&self, wanted: &Wanted);
    /// Makes sure that image and model are here and verified.
    ///
    /// # Errors
    /// When they do not come.
    async fn bring(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
        tell: Box<dyn Fn(Told) + Send + Sync>,
    ) -> Result<(), BringError>;
    /// The engine's id of the image, when it is here.
    ///
    /// # Errors
    /// When the engine does not answer.
    async fn image_id(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
    ) -> Result<Option<String>, EngineError>;
    /// The folder of a model's files.
    fn tree(&self, artifact: &ResolvedArtifact) -> String;
}

#[async_trait]
impl Bring for Fetcher {
    fn wanted(&self, wanted: &Wanted) {
        if let Some(set) = wanted.set() {
            Self::wanted(self, set.bodies.values().map(|b| &*b.value));
        }
    }

    async fn bring(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
        tell: Box<dyn Fn(Told) + Send + Sync>,
    ) -> Result<(), BringError> {
        Box::pin(Self::bring(self, body, platform, tell)).await
    }

    async fn image_id(
        &self,
        body: &AssignmentBody,
        platform: &PlatformImage,
    ) -> Result<Option<String>, EngineError> {
        Self::image_id(self, body, platform).await
    }

    fn tree(&self, artifact: &ResolvedArtifact) -> String {
        Self::tree(self, artifact).to_string_lossy().into_owned()
    }
}

/// Everything the reconciler needs.
pub struct Reconciler {
    shared: Arc<Shared>,
    engine: Arc<dyn Engine>,
    bring: Arc<dyn Bring>,
    unended: Unended,
    /// Ended containers whose last words were read, by the engine's id.
    heard: Mutex<BTreeSet<String>>,
}

/// What a task says: containers as the engine shows them, and all else.
enum Said {
    Observed { look: Look, containers: Vec<ObservedContainer> },
    Seen { step: StepId, container: ObservedContainer },
    Input(Input),
}

impl Reconciler {
    /// A reconciler.
    #[must_use]
    pub fn new(shared: Arc<Shared>, engine: Arc<dyn Engine>, bring: Arc<dyn Bring>) -> Self {
        let (unended, heard) = (Unended::default(), Mutex::default());
        Self { shared, engine, bring, unended, heard }
    }

    /// Runs for ever.
    pub async fn run(self: Arc<Self>) {
        let (tx, mut rx) = mpsc::channel(ANSWERS);
        let mut wanted = self.shared.inner.lock().board.wanted.clone();
        self.bring.wanted(&wanted);
        let now = self.shared.now();
        let mut machine = Reconcile::new(&wanted, self.shared.remembered(), now.mono);
        let mut hands =
            Hands { this: self, tx, fetches: BTreeMap::new(), addresses: BTreeMap::new() };
        hands.carry_out(machine.step(now, Input::Tick));
        loop {
            let shared = &hands.this.shared;
            let wait_ms = machine.deadline().map_or(u64::MAX, |at| at.since_ms(shared.now().mono));
            let said = tokio::select! {
                // Cancel-safe, all of them: a permit that was not taken stays.
                Some(said) = rx.recv() => said,
                () = shared.wake.notified() => Said::Input(Input::Tick),
                () = tokio::time::sleep(Duration::from_millis(wait_ms)) => Said::Input(Input::Tick),
            };
            // What is wanted is a level: whatever woke us, the newest is looked at.
            let newest = shared.inner.lock().board.wanted.clone();
            if let Some(set) = newest.set()
                && wanted.set().is_none_or(|held| !Arc::ptr_eq(held, set))
            {
                hands.this.bring.wanted(&newest);
                let input = Input::SetTaken(Arc::clone(set));
                let effects = machine.step(hands.this.shared.now(), input);
                wanted = newest;
                hands.carry_out(effects);
            }
            let looked = matches!(said, Said::Observed { .. });
            let input = hands.take_in(said);
            let effects = machine.step(hands.this.shared.now(), input);
            hands.publish(&machine);
            hands.carry_out(effects);
            if looked {
                hands.this.shared.looked();
            }
        }
    }

    fn engine_is(&self, available: bool, why: &str) {
        if available {
            tracing::info!("the engine answers");
        } else {
            tracing::warn!(
                why,
                "the engine does not answer; what runs is left alone, it is asked again"
            );
        }
        let news = self.shared.inner.lock().board.engine_is(available);
        if let Some(news) = news {
            // No session listening is no error: the next one says all of it.
            let _ = self.shared.news.send(news);
        }
    }

    fn body(&self, uid: &ReplicaUid) -> Result<(Arc<AssignmentBody>, PlatformImage), Failed> {
        let body = self.shared.body(uid).ok_or(Failed::NotWanted)?;
        let inner = self.shared.inner.lock();
        let (os, arch) = (&inner.board.facts.os, &inner.board.facts.arch);
        let fits = |p: &&PlatformImage| p.os == *os && p.arch == *arch;
        let found = body.source.image.platforms.iter().find(fits).cloned();
        let platform =
            found.ok_or_else(|| Failed::Forbidden(Forbidden::Platform(format!("{os}/{arch}"))))?;
        drop(inner);
        Ok((body, platform))
    }

    /// Asks the host's own policy; answers with what the sources of mounts really are.
    async fn judge(&self, body: &AssignmentBody) -> Result<BTreeMap<String, String>, Failed> {
        let mut paths: BTreeSet<String> =
            body.spec.mounts.iter().map(|m| m.source.clone()).collect();
        if !paths.is_empty() {
            paths.extend(self.shared.policy.mount_folders.iter().cloned());
        }
        let resolved = resolve_all(paths).await?;
        let features: BTreeSet<String> = crate::facts::FEATURES.map(str::to_owned).into();
        let (os, arch) = {
            let inner = self.shared.inner.lock();
            (inner.board.facts.os.clone(), inner.board.facts.arch.clone())
        };
        let of = |path: &str| resolved.get(path).cloned().flatten();
        policy::judge(body, &self.shared.policy, &features, (&os, &arch), of)
            .map_err(Failed::Forbidden)?;
        Ok(resolved.into_iter().filter_map(|(path, real)| Some((path, real?.path))).collect())
    }

    async fn fetch(&self, uid: &ReplicaUid, tx: mpsc::Sender<Said>) -> Result<Done, Failed> {
        let (body, platform) = self.body(uid)?;
        self.judge(&body).await?;
        let replica = uid.clone();
        let tell = move |told: Told| {
            let replica = replica.clone();
            let input = match told {
                Told::Progress(progress) => Input::Progress { replica, progress },
                Told::Waiting { why, retry_ms } => {
                    let words = format!("{why}; tried again in {} s", retry_ms.div_ceil(1000));
                    Input::FetchWaits { replica, words }
                }
            };
            // With no room the next one tells more.
            let _ = tx.try_send(Said::Input(input));
        };
        self.bring.bring(&body, &platform, Box::new(tell)).await?;
        Ok(Done::Fetched)
    }

    async fn create(&self, uid: &ReplicaUid, number: u32) -> Result<Done, Failed> {
        let (body, platform) = self.body(uid)?;
        // Asked again for each attempt: a link may lead elsewhere by now.
        let real = self.judge(&body).await?;
        let image = self.bring.image_id(&body, &platform).await?.ok_or(Failed::ImageGone)?;
        let body_digest = {
            let inner = self.shared.inner.lock();
            let entry = inner.board.wanted.set().and_then(|s| s.entries.get(uid));
            entry.map(|e| e.body_digest.clone()).ok_or(Failed::NotWanted)?
        };
        let attempt = Attempt {
            cluster: &self.shared.cluster,
            replica: uid,
            number,
            body: &body,
            body_digest: &body_digest,
            image: &image,
            tree: body.source.artifact.as_ref().map(|a| self.bring.tree(a)),
            real: &real,
        };
        match self.engine.create(&attempt.spec()).await {
            Ok(id) => Ok(Done::Created { id }),
            // Left by a call whose answer was lost: a look shows whether it is ours.
            Err(EngineError::NameTaken(_)) => Ok(Done::Unseen),
            Err(EngineError::NoSuchImage(_)) => Err(Failed::ImageGone),
            Err(error) => Err(Failed::Engine(error)),
        }
    }

    /// Starts a container, which the policy allows now as well: it may have been made long ago, under
    /// another configuration, or a link may lead elsewhere since. One that it does not allow is
    /// removed, so that the next attempt is made anew, of what there is then.
    async fn start(&self, uid: &ReplicaUid, id: &str) -> Result<(), Failed> {
        match self.judge_made(uid, id).await {
            Ok(()) => Ok(self.engine.start(id).await?),
            Err(refused @ Failed::Forbidden(_)) => {
                self.engine.remove(id, false).await?;
                Err(refused)
            }
            Err(error) => Err(error),
        }
    }

    async fn judge_made(&self, uid: &ReplicaUid, id: &str) -> Result<(), Failed> {
        let (body, _) = self.body(uid)?;
        self.judge(&body).await?;
        if body.spec.mounts.is_empty() {
            return Ok(());
        }
        // The model's own folder is the agent's, and may be named by a link.
        let tree = body.source.artifact.as_ref().map(|a| self.bring.tree(a));
        let made = self.engine.inspect(&self.shared.cluster, id).await?.mount_sources;
        let sources: BTreeSet<String> =
            made.into_iter().filter(|source| Some(source) != tree.as_ref()).collect();
        let resolved = resolve_all(sources.clone()).await?;
        let of = |path: &str| resolved.get(path).cloned().flatten();
        policy::judge_made(sources.iter().map(String::as_str), of).map_err(Failed::Forbidden)
    }

    /// What programs that have failed wrote last, each once: for whoever is told that they failed.
    async fn last_words(&self, containers: &[ObservedContainer]) -> Vec<Input> {
        let failed = |c: &&ObservedContainer| match c.state {
            ContainerState::Exited { code, out_of_memory, .. } => code != 0 || out_of_memory,
            ContainerState::Created | ContainerState::Running { .. } | ContainerState::Removing => {
                false
            }
        };
        let fresh: Vec<Container> = {
            let mut heard = self.heard.lock();
            containers
                .iter()
                .filter(failed)
                .filter_map(containers::read)
                .filter(|c| heard.insert(c.id.clone()))
                .take(LAST_AT_ONCE)
                .collect()
        };
        let reading = fresh.into_iter().map(|container| async move {
            let line = tokio::time::timeout(LAST_WORDS, self.last_line(&container.id)).await;
            if line.is_err() {
                // The next look may have them.
                self.heard.lock().remove(&container.id);
            }
            let line = line.ok().flatten()?;
            let Container { replica, attempt, .. } = container;
            Some(Input::LastWords { replica, attempt, line })
        });
        futures_util::future::join_all(reading).await.into_iter().flatten().collect()
    }

    /// The last lines of a container's output that are not empty, as many as are told.
    async fn last_line(&self, id: &str) -> Option<String> {
        let query = LogQuery { tail: Some(LAST_LINES), ..LogQuery::default() };
        let mut lines = self.engine.logs(id, query);
        let mut all = Vec::new();
        while let Some(Ok(chunk)) = lines.next().await {
            let line = last_line(&String::from_utf8_lossy(&chunk.bytes));
            if !line.is_empty() {
                all.push(line);
            }
        }
        let mut told = all.pop()?;
        // What comes before often says more: the last one tells how to ask for help, or to see a trace.
        for line in all.iter().rev().take(LINES_BEFORE) {
            let longer = format!("{line} | {told}");
            if longer.chars().count() > MAX_LAST_LINE {
                break;
            }
            told = longer;
        }
        Some(told)
    }

    /// How a container is after a step; a look tells when it cannot be asked for alone.
    async fn after(&self, step: StepId, id: &str, tx: &mpsc::Sender<Said>) -> Said {
        match self.engine.inspect(&self.shared.cluster, id).await {
            Ok(container) => {
                for words in self.last_words(std::slice::from_ref(&container)).await {
                    say(tx, words).await;
                }
                Said::Seen { step, container }
            }
            Err(_) => Said::Input(Input::StepDone { step, done: Done::Unseen }),
        }
    }
}

/// What a path leads to.
fn resolve(path: &str) -> Option<Real> {
    let real = std::fs::canonicalize(path).ok()?;
    let is_socket = std::fs::metadata(&real).ok()?.file_type().is_socket();
    Some(Real { path: real.to_str()?.to_owned(), is_socket })
}

/// What each path leads to.
async fn resolve_all(paths: BTreeSet<String>) -> Result<BTreeMap<String, Option<Real>>, Failed> {
    let resolving = tokio::task::spawn_blocking(move || {
        paths.into_iter().map(|path| (resolve(&path), path)).collect::<Vec<_>>()
    });
    let resolved = tokio::time::timeout(RESOLVE, resolving).await;
    let resolved = resolved.map_err(|_| Failed::Paths)?.map_err(|_| Failed::Paths)?;
    Ok(resolved.into_iter().map(|(real, path)| (path, real)).collect())
}

/// Carries effects out.
struct Hands {
    this: Arc<Reconciler>,
    tx: mpsc::Sender<Said>,
    fetches: BTreeMap<StepId, AbortHandle>,
    /// Addresses of running containers by the engine's id.
    addresses: BTreeMap<String, Option<IpAddr>>,
}

impl Hands {
    fn take_in(&mut self, said: Said) -> Input {
        match said {
            Said::Input(input) => input,
            Said::Observed { look, containers } => {
                self.addresses.clear();
                for container in &containers {
                    self.note(container);
                }
                self.this.unended.retain(|id| self.addresses.contains_key(id));
                let containers = containers.iter().filter_map(containers::read).collect();
                Input::Observed { look, containers }
            }
            Said::Seen { step, container } => {
                self.note(&container);
                let done = containers::read(&container).map_or(Done::Unseen, Done::Seen);
                Input::StepDone { step, done }
            }
        }
    }

    fn note(&mut self, container: &ObservedContainer) {
        if let crate::engine::ContainerState::Running { ip, .. } = &container.state {
            self.addresses.insert(container.id.clone(), *ip);
        }
    }

    /// What the engine shows, as others need it.
    fn publish(&self, machine: &Reconcile) {
        let mut inner = self.this.shared.inner.lock();
        let set = inner.board.wanted.set().cloned();
        inner.running.clear();
        inner.containers.clear();
        for (uid, list) in machine.seen() {
            inner
                .containers
                .insert(uid.clone(), list.iter().map(|c| (c.id.clone(), c.attempt)).collect());
            let body = set.as_ref().and_then(|s| s.body(s.entries.get(uid)?));
            let running = list.iter().find(|c| self.addresses.contains_key(&c.id));
            if let (Some(c), Some(body)) =
                (running.filter(|c| c.state == berth_agent_core::diff::State::Running), body)
            {
                let ip = self.addresses.get(&c.id).copied().flatten();
                let body = Arc::clone(&body.value);
                let one = Running { id: c.id.clone(), ip, body, attempt: c.attempt };
                inner.running.insert(uid.clone(), one);
            }
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        self.fetches.retain(|_, task| !task.is_finished());
        for effect in effects {
            self.one(effect);
        }
    }

    fn one(&mut self, effect: Effect) {
        match effect {
            Effect::Persist { token, memory } => {
                let shared = Arc::clone(&self.this.shared);
                let (tx, write) = (self.tx.clone(), move || shared.remember(memory));
                tokio::spawn(async move {
                    let written = tokio::task::spawn_blocking(write).await;
                    let result = match written {
                        Ok(result) => result.map_err(|e| crate::chain(&e)),
                        Err(error) => Err(error.to_string()),
                    };
                    say(&tx, persisted(token, result)).await;
                });
            }
            Effect::Observe(look) => self.observe(look),
            Effect::Follow => self.follow(),
            Effect::EnsureNetwork => {
                let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
                tokio::spawn(async move {
                    let cluster = &this.shared.cluster;
                    let name = containers::bridge(cluster);
                    let traffic = Traffic::by(&this.shared.policy);
                    let made = this.engine.ensure_network(cluster, &name, traffic).await;
                    if let Err(error) = &made {
                        tracing::warn!(%error, "the bridge cannot be made yet");
                    }
                    say(&tx, Input::Network(made.map_err(|e| e.to_string()))).await;
                });
            }
            Effect::Fetch { step, replica } => {
                let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
                let work = async move { this.fetch(&replica, tx).await };
                let task =
                    self.step(step, async move { work.await.map(|d| done(step, d)) }.boxed());
                self.fetches.insert(step, task);
            }
            Effect::StopFetch(step) => {
                if let Some(task) = self.fetches.remove(&step) {
                    task.abort();
                }
            }
            Effect::Create { step, replica, attempt } => {
                let this = Arc::clone(&self.this);
                let work = async move {
                    let made = this.create(&replica, attempt).await?;
                    Ok(done(step, made))
                };
                self.step(step, work.boxed());
            }
            Effect::Start { step, replica, id } => {
                let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
                let work = async move {
                    this.start(&replica, &id).await?;
                    Ok(this.after(step, &id, &tx).await)
                };
                self.step(step, work.boxed());
            }
            Effect::Stop { step, id, grace_ms, .. } => {
                let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
                let work = async move {
                    match this.engine.stop(&id, Duration::from_millis(grace_ms)).await {
                        Ok(()) | Err(EngineError::NotFound(_)) => {
                            Ok(this.after(step, &id, &tx).await)
                        }
                        Err(error) => Err(error.into()),
                    }
                };
                self.step(step, work.boxed());
            }
            Effect::Remove { step, id, .. } => {
                let this = Arc::clone(&self.this);
                let work = async move {
                    this.engine.remove(&id, false).await?;
                    Ok(done(step, Done::Removed))
                };
                self.step(step, work.boxed());
            }
            Effect::Probe { replica, attempt, check } => self.probe(replica, attempt, check),
            Effect::Report(report) => self.this.shared.report(*report),
            Effect::Absent(uid) => self.this.shared.absent(&uid),
            Effect::EngineIs { available, why } => self.this.engine_is(available, &why),
        }
    }

    /// A step as a task that answers, whatever happens to it.
    fn step(
        &self,
        step: StepId,
        work: futures_util::future::BoxFuture<'static, Result<Said, Failed>>,
    ) -> AbortHandle {
        let tx = self.tx.clone();
        let task = tokio::spawn(async move {
            let ended = AssertUnwindSafe(work).catch_unwind().await;
            let said = match ended.unwrap_or(Err(Failed::Fault)) {
                Ok(said) => said,
                Err(failed) => {
                    let (cause, words) = (failed.cause(), crate::chain(&failed));
                    tracing::warn!(?step, ?cause, error = words, "a step failed");
                    Said::Input(Input::StepFailed { step, cause, words })
                }
            };
            // Nobody listens: the agent stops.
            let _ = tx.send(said).await;
        });
        task.abort_handle()
    }

    fn observe(&self, look: Look) {
        let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
        tokio::spawn(async move {
            let looked = async {
                // A list may take long under load; an engine that hangs shows it here, in seconds.
                this.engine.ping().await?;
                this.engine.observe(&this.shared.cluster).await
            };
            let said = match looked.await {
                Ok(containers) => {
                    for words in this.last_words(&containers).await {
                        say(&tx, words).await;
                    }
                    let here: BTreeSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
                    this.heard.lock().retain(|id| here.contains(id.as_str()));
                    Said::Observed { look, containers }
                }
                Err(error) => Said::Input(Input::EngineAway { look, why: error.to_string() }),
            };
            let _ = tx.send(said).await;
        });
    }

    fn follow(&self) {
        let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
        tokio::spawn(async move {
            if let Ok(mut events) = this.engine.events(&this.shared.cluster).await {
                say(&tx, Input::Followed).await;
                loop {
                    let next = tokio::select! {
                        // Cancel-safe: an event that was not taken stays.
                        next = events.next() => next,
                        // Nobody listens: the agent stops.
                        () = tx.closed() => return,
                    };
                    let Some(Ok(event)) = next else { break };
                    let urgent = match event.kind {
                        // Mostly our own doing, the outcome of which is known already.
                        EventKind::Create | EventKind::Start => false,
                        EventKind::Die { .. }
                        | EventKind::OutOfMemory
                        | EventKind::Destroy
                        | EventKind::Other => true,
                    };
                    say(&tx, Input::Happened { urgent }).await;
                }
            }
            say(&tx, Input::FollowEnded).await;
        });
    }

    fn probe(&self, replica: ReplicaUid, attempt: u32, check: HealthCheck) {
        let (this, tx) = (Arc::clone(&self.this), self.tx.clone());
        let running = this.shared.inner.lock().running.get(&replica).cloned();
        tokio::spawn(async move {
            let outcome = match running.filter(|r| r.attempt == attempt) {
                Some(running) => {
                    Box::pin(probes::check(&*this.engine, &this.unended, &running, &check)).await
                }
                None => Outcome::NotAsked,
            };
            say(&tx, Input::ProbeResult { replica, attempt, outcome }).await;
        });
    }
}

fn done(step: StepId, done: Done) -> Said {
    Said::Input(Input::StepDone { step, done })
}

fn persisted(token: Token, result: Result<(), String>) -> Input {
    if let Err(why) = &result {
        tracing::error!(why, "what must be remembered could not be made durable");
    }
    Input::Persisted { token, result }
}

async fn say(tx: &mpsc::Sender<Said>, input: Input) {
    // Nobody listens: the agent stops.
    let _ = tx.send(Said::Input(input)).await;
}

/// Why a step was not carried out.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Bring(#[from] BringError),
    #[error("this host's policy refuses it")]
    Forbidden(#[source] Forbidden),
    #[error("the folders it mounts cannot be looked at")]
    Paths,
    #[error("its image is not here any more")]
    ImageGone,
    #[error("it is not wanted any more")]
    NotWanted,
    #[error("the agent itself failed; its log says how")]
    Fault,
}

impl Failed {
    fn cause(&self) -> Cause {
        match self {
            Self::Engine(EngineError::PortInUse(_)) => Cause::PortInUse,
            Self::Engine(error) if error.is_engine_away() => Cause::EngineAway,
            Self::Engine(_) | Self::NotWanted | Self::Fault => Cause::Engine,
            Self::Bring(error) => match error.reason() {
                "ENGINE_AWAY" => Cause::EngineAway,
                reason => Cause::Bytes(reason),
            },
            Self::Forbidden(_) => Cause::Forbidden,
            Self::Paths => Cause::Disk,
            Self::ImageGone => Cause::BytesGone,
        }
    }
}

#[cfg(test)]
#[path = "reconciler_tests.rs"]
mod tests;
