//! Applying and planning: manifests are read, sent, and their rollouts followed to the end.

use super::deployment::to_json;
use super::{Patience, ask, broken, connect, write};
use crate::args::{Apply, Files, Global};
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use crate::output::{counted, despite, print, say, transfer, waits, word};
use crate::progress::{Board, Line};
use crate::style::Ink;
use berth_proto::api::deployment_service_client::DeploymentServiceClient;
use berth_proto::api::*;
use berth_proto::convert::Problems;
use berth_proto::escape::for_terminal;
use berth_proto::manifest;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;

/// Rollouts followed at once; the others wait for their turn, which changes nothing for them: what is
/// followed is a level. One connection carries at least 100 streams.
const FOLLOWED: usize = 64;
/// Hosts named before they are only counted.
const NAMED: usize = 8;

/// Reads at most what a manifest may hold and one byte more, which `parse` then refuses.
fn read_text(from: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    let bound = u64::try_from(manifest::MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    from.take(bound).read_to_string(&mut text)?;
    Ok(text)
}

/// The manifests of a folder, by name.
fn manifests_in(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let known = |end: &std::ffi::OsStr| ["yaml", "yml", "json"].iter().any(|k| end == *k);
        if path.extension().is_some_and(known) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Every text that is named, and every one that cannot be read.
fn texts(paths: &[PathBuf], problems: &mut Problems) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        if path == Path::new("-") {
            match read_text(std::io::stdin()) {
                Ok(text) => out.push(("standard input".to_owned(), text)),
                Err(error) => problems.add("standard input", format!("cannot be read: {error}")),
            }
            continue;
        }
        let files = if path.is_dir() { manifests_in(path) } else { Ok(vec![path.clone()]) };
        match files {
            Ok(files) if files.is_empty() => {
                problems.add_hint(name, "holds no manifest", "they end in .yaml, .yml or .json");
            }
            Ok(files) => {
                for file in files {
                    let name = file.display().to_string();
                    match std::fs::File::open(&file).and_then(read_text) {
                        Ok(text) => out.push((name, text)),
                        Err(error) => problems.add(name, format!("cannot be read: {error}")),
                    }
                }
            }
            Err(error) => problems.add(name, format!("cannot be read: {error}")),
        }
    }
    out
}

/// All deployments of all files, or everything that is wrong with any of them.
fn inputs(global: &Global, files: &Files) -> Result<Vec<DeploymentInput>> {
    let mut problems = Problems::default();
    let mut inputs: Vec<DeploymentInput> = Vec::new();
    let mut seen: BTreeMap<(String, String), String> = BTreeMap::new();
    for (origin, text) in texts(&files.files, &mut problems) {
        let written = match manifest::parse(&text, &origin) {
            Ok(written) => written,
            Err(found) => {
                problems.0.extend(found.0);
                continue;
            }
        };
        for mut one in written {
            let asked = global.namespace.as_deref().unwrap_or_default();
            if one.namespace.is_empty() {
                asked.clone_into(&mut one.namespace);
            } else if !asked.is_empty() && asked != one.namespace {
                problems.add(
                    format!("{}: metadata.namespace", one.origin),
                    format!("is \"{}\", but -n says \"{asked}\"", one.namespace),
                );
            }
            let space = if one.namespace.is_empty() { "default" } else { &one.namespace };
            let place = (space.to_owned(), one.name.clone());
            if let Some(other) = seen.insert(place, one.origin.clone()) {
                problems.add(
                    format!("{}: metadata.name", one.origin),
                    format!("\"{}\" is also in {other}", one.name),
                );
            }
            inputs.push(DeploymentInput {
                meta: Some(ObjectMeta {
                    name: one.name,
                    namespace: one.namespace,
                    labels: one.labels,
                    ..ObjectMeta::default()
                }),
                spec: Some(one.spec),
                origin: one.origin,
            });
        }
    }
    if problems.0.is_empty() { Ok(inputs) } else { Err(told(&problems)) }
}

/// Problems as people see them: one a line.
fn told(problems: &Problems) -> Error {
    let lines: Vec<String> = problems.to_string().lines().map(for_terminal).collect();
    match lines.as_slice() {
        [one] => Error::user(one.clone()),
        many => Error::user(format!("{} problems:\n  {}", many.len(), many.join("\n  "))),
    }
    .hint("nothing was written; deploy/examples/all-options.yaml explains every field")
}

/// What became of one deployment.
struct Outcome {
    action: String,
    release: u64,
    deployment: Deployment,
    error: Option<Error>,
}

pub async fn apply(global: &Global, args: Apply) -> Result<()> {
    let deployments = inputs(global, &args.files)?;
    let client = connect(global).await?;
    let request = ApplyRequest { write: write(), deployments };
    let answer = ask(global, client.deployments().apply(request)).await?;
    let shared = Shared::new(client.deployments());
    let board = RefCell::new(Board::new());
    let end = Instant::now() + args.timeout;
    let follow = |(index, result): (usize, ApplyResult)| {
        let (board, shared) = (&board, &shared);
        async move {
            let adjusted = result.action() == ApplyAction::Adjusted;
            let action = word(result.action().as_str_name(), "APPLY_ACTION_");
            let deployment = result.deployment.unwrap_or_default();
            let release = deployment.status.as_ref().map_or(0, |s| s.release);
            let meta = deployment.meta.clone().unwrap_or_default();
            board.borrow_mut().note(&format!("{}: {action} (release {release})", meta.name));
            let mut outcome = Outcome { action, release, deployment, error: None };
            if !args.no_wait {
                let wait_all = args.wait_all;
                let meta = &meta;
                let following = Following {
                    global,
                    shared,
                    meta,
                    release,
                    adjusted,
                    wait_all,
                    end,
                    index,
                    board,
                };
                match following.run().await {
                    Ok(last) => outcome.deployment = last,
                    Err((error, last)) => {
                        let words = format!("{}: {}", meta.name, error.message);
                        board.borrow_mut().end(index, &words);
                        outcome.error = Some(error);
                        if let Some(last) = last {
                            outcome.deployment = last;
                        }
                    }
                }
            }
            (index, outcome)
        }
    };
    let results = answer.results.into_iter().enumerate();
    let mut outcomes: Vec<(usize, Outcome)> =
        futures_util::stream::iter(results).map(follow).buffer_unordered(FOLLOWED).collect().await;
    outcomes.sort_by_key(|(index, _)| *index);
    let (mut rows, mut values, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for (_, outcome) in outcomes {
        let mut value = to_json(&outcome.deployment);
        value["action"] = json!(outcome.action);
        value["error"] = json!(outcome.error.as_ref().map(|e| e.message.clone()));
        values.push(value);
        rows.push(row(&outcome));
        errors.extend(outcome.error);
    }
    let heads = ["NAMESPACE", "NAME", "ACTION", "RELEASE", "ROLLOUT", "READY", "DEFERRED"];
    let printed = print(global, &heads, heads.len(), rows, &Value::Array(values));
    despite(printed, worst(errors))
}

fn row(outcome: &Outcome) -> Vec<String> {
    let meta = outcome.deployment.meta.clone().unwrap_or_default();
    let s = outcome.deployment.status.clone().unwrap_or_default();
    let deferred = if s.deferred_hosts > 0 { s.deferred_hosts.to_string() } else { String::new() };
    vec![
        meta.namespace,
        meta.name,
        outcome.action.clone(),
        outcome.release.to_string(),
        word(s.rollout().as_str_name(), "ROLLOUT_STATE_"),
        format!("{}/{}", s.updated_ready, s.wanted),
        deferred,
    ]
}

/// The error that the command ends with: of several, the one that needs somebody most.
fn worst(errors: Vec<Error>) -> Option<Error> {
    let count = errors.len();
    let rank = |kind: Kind| match kind {
        Kind::ReaderGone | Kind::Deferred => 0,
        Kind::Unavailable => 1,
        Kind::User | Kind::Usage => 2,
        Kind::Denied => 3,
        Kind::RolloutFailed => 4,
    };
    let mut worst = errors.into_iter().max_by_key(|e| rank(e.kind))?;
    if count > 1 {
        worst.message = format!("{count} deployments did not get there; of one: {}", worst.message);
    }
    Some(worst)
}

/// Waits until a deployment whose number was changed has as many replicas ready.
pub async fn settle(
    global: &Global,
    client: &Client,
    deployment: &Deployment,
    timeout: Duration,
) -> Result<Deployment> {
    let meta = &deployment.meta.clone().unwrap_or_default();
    let following = Following {
        global,
        shared: &Shared::new(client.deployments()),
        meta,
        release: deployment.status.as_ref().map_or(0, |s| s.release),
        adjusted: true,
        wait_all: false,
        end: Instant::now() + timeout,
        index: 0,
        board: &RefCell::new(Board::new()),
    };
    following.run().await.map_err(|(error, _)| error)
}

/// A connection that all share who follow a rollout. Whoever finds it broken leaves it, and the next
/// one who asks makes another.
struct Shared<T> {
    /// How many were left, and the present one.
    held: tokio::sync::Mutex<(u64, Option<T>)>,
}

impl<T: Clone> Shared<T> {
    fn new(first: T) -> Self {
        Self { held: tokio::sync::Mutex::new((0, Some(first))) }
    }

    /// The present one with its number, or the one that is made now.
    async fn get(&self, make: impl Future<Output = Result<T>>) -> Result<(u64, T)> {
        let mut held = self.held.lock().await;
        let one = match &held.1 {
            Some(one) => one.clone(),
            None => held.1.insert(make.await?).clone(),
        };
        Ok((held.0, one))
    }

    /// That of this number is of no use any more, unless somebody has said so before.
    async fn leave(&self, number: u64) {
        let mut held = self.held.lock().await;
        if held.0 == number {
            *held = (number + 1, None);
        }
    }
}

/// One rollout that is followed.
struct Following<'a> {
    global: &'a Global,
    shared: &'a Shared<DeploymentServiceClient<Channel>>,
    meta: &'a ObjectMeta,
    release: u64,
    /// No new release was made: a complete rollout says nothing of the replicas that were added.
    adjusted: bool,
    wait_all: bool,
    end: Instant,
    index: usize,
    board: &'a RefCell<Board>,
}

/// An error, and the deployment as it was last seen.
type Lost = (Error, Option<Deployment>);

/// What a state of a deployment means for somebody who waits for one of its releases.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Go on waiting.
    Wait,
    /// Done, but for hosts that are away.
    Done { deferred: u32 },
    /// Not going to be done.
    Failed(String),
}

fn judge(status: &DeploymentStatus, release: u64, adjusted: bool) -> Verdict {
    let reason = || {
        let words = for_terminal(&status.reason);
        if words.is_empty() { "the rollout failed".to_owned() } else { words }
    };
    match status.rollout() {
        RolloutState::RolledBack | RolloutState::Failed | RolloutState::Paused => {
            Verdict::Failed(reason())
        }
        RolloutState::Deleting => Verdict::Failed("it is being deleted".to_owned()),
        RolloutState::Rolling | RolloutState::Complete | RolloutState::Unspecified
            if status.release > release =>
        {
            Verdict::Failed(format!("release {} took the place of {release}", status.release))
        }
        RolloutState::Complete
            if adjusted && status.deferred_hosts == 0 && status.updated_ready < status.wanted =>
        {
            Verdict::Wait
        }
        RolloutState::Complete => Verdict::Done { deferred: status.deferred_hosts },
        RolloutState::Rolling | RolloutState::Unspecified => Verdict::Wait,
    }
}

/// What to do about a rollout that has ended like this.
fn advice(rollout: RolloutState, name: &str) -> Option<String> {
    match rollout {
        RolloutState::RolledBack => Some(
            "mend the manifest and apply it again; `rollout: {onFailure: pause}` keeps what fails \
             for a look"
                .to_owned(),
        ),
        RolloutState::Paused | RolloutState::Failed => Some(format!(
            "`berth ps {name}` shows each replica, `berth logs {name}` what its program said; mend \
             the manifest and apply it again"
        )),
        RolloutState::Unspecified
        | RolloutState::Rolling
        | RolloutState::Complete
        | RolloutState::Deleting => None,
    }
}

impl Following<'_> {
    /// To the rollout's end, or to the time's. A stream that broke is opened again, on whatever
    /// server answers then: each message is complete, so nothing is missed.
    async fn run(&self) -> std::result::Result<Deployment, Lost> {
        let mut patience = Patience::new(Some(self.end));
        let mut last: Option<Deployment> = None;
        loop {
            match self.watch(&mut last, &mut patience).await {
                Ok(deployment) => return Ok(deployment),
                Err(error) => {
                    let say = |words: String| self.board.borrow_mut().note(&format!("  {words}"));
                    if let Err(error) = patience.bear(error, say).await {
                        return Err((error, last));
                    }
                }
            }
        }
    }

    async fn watch(
        &self,
        last: &mut Option<Deployment>,
        patience: &mut Patience,
    ) -> Result<Deployment> {
        let make = async { Ok(connect(self.global).await?.deployments()) };
        let (number, deployments) = match tokio::time::timeout_at(self.end, self.shared.get(make))
            .await
        {
            Ok(got) => got?,
            Err(_) => {
                return Err(Error::new(Kind::Unavailable, "the server was not reached in time"));
            }
        };
        let result = self.watch_over(deployments, last, patience).await;
        if result.as_ref().is_err_and(|error| error.kind == Kind::Unavailable) {
            self.shared.leave(number).await;
        }
        result
    }

    async fn watch_over(
        &self,
        mut deployments: DeploymentServiceClient<Channel>,
        last: &mut Option<Deployment>,
        patience: &mut Patience,
    ) -> Result<Deployment> {
        let request = WatchDeploymentRequest {
            namespace: self.meta.namespace.clone(),
            name: self.meta.name.clone(),
        };
        let mut stream = ask(self.global, deployments.watch_deployment(request)).await?;
        loop {
            let next = match tokio::time::timeout_at(self.end, stream.message()).await {
                Ok(next) => next.map_err(broken)?,
                Err(_) => return Err(self.late(last.as_ref())),
            };
            let Some(now) = next else {
                return Err(Error::new(Kind::Unavailable, "the server ended the watch"));
            };
            patience.calm();
            if now.deleted {
                return Err(Error::new(Kind::RolloutFailed, "it was deleted meanwhile"));
            }
            let deployment = now.deployment.clone().unwrap_or_default();
            let status = deployment.status.clone().unwrap_or_default();
            *last = Some(deployment.clone());
            let away = away(&now.replicas);
            self.board.borrow_mut().show(self.index, self.lines(&now.replicas, &status, &away));
            match judge(&status, self.release, self.adjusted) {
                Verdict::Wait => {}
                Verdict::Done { deferred } if deferred > 0 && self.wait_all => {}
                Verdict::Done { deferred } => {
                    let mut words = format!(
                        "{}: complete, {}/{} ready",
                        self.meta.name, status.updated_ready, status.wanted
                    );
                    if deferred > 0 {
                        words.push_str(&format!("; deferred: {}", on_return(deferred, &away)));
                    }
                    self.board.borrow_mut().end(self.index, &words);
                    return Ok(deployment);
                }
                Verdict::Failed(reason) => {
                    let error = Error::new(Kind::RolloutFailed, reason);
                    return Err(match advice(status.rollout(), &self.meta.name) {
                        Some(hint) => error.hint(hint),
                        None => error,
                    });
                }
            }
        }
    }

    /// The time is over.
    fn late(&self, last: Option<&Deployment>) -> Error {
        let status = last.and_then(|d| d.status.clone()).unwrap_or_default();
        let why = status.pending.iter().find(|p| !p.message.is_empty());
        match judge(&status, self.release, self.adjusted) {
            Verdict::Done { deferred } if deferred > 0 => Error::new(
                Kind::Deferred,
                format!("complete, but {}", on_return(deferred, &BTreeSet::new())),
            )
            .hint("`berth ps` shows which; --timeout sets how long to wait for them"),
            Verdict::Done { .. } | Verdict::Wait | Verdict::Failed(_) => Error::new(
                Kind::RolloutFailed,
                for_terminal(&format!(
                    "not complete in time ({}/{} ready{}); the rollout goes on",
                    status.updated_ready,
                    status.wanted,
                    why.map(|p| format!("; {}", p.message)).unwrap_or_default()
                )),
            )
            .hint("`berth deployment rollout status` shows where it is, `berth ps` why"),
        }
    }

    fn lines(
        &self,
        replicas: &[Replica],
        status: &DeploymentStatus,
        away: &BTreeSet<&str>,
    ) -> Vec<Line> {
        let mut lines = Vec::new();
        let key = |what: &str| format!("{}/{}/{what}", self.meta.namespace, self.meta.name);
        for replica in replicas {
            let (state, coarse, ink) = progress(replica);
            let text = for_terminal(&format!(
                "  {}/{} on {} (release {}): {state}",
                self.meta.name, replica.slot, replica.host, replica.release
            ));
            lines.push(Line { key: key(&replica.uid), text, coarse, ink });
        }
        for pending in status.pending.iter().filter(|p| p.reason == "NO_HOST_FITS") {
            let text = for_terminal(&format!(
                "  {}: waiting: {} ({})",
                self.meta.name,
                pending.message,
                counted(pending.count, "slot")
            ));
            lines.push(Line {
                key: key(&pending.reason),
                coarse: text.clone(),
                text,
                ink: Ink::Busy,
            });
        }
        if status.deferred_hosts > 0 {
            let text = for_terminal(&format!(
                "  {}: deferred: {}",
                self.meta.name,
                on_return(status.deferred_hosts, away)
            ));
            lines.push(Line { key: key("deferred"), coarse: text.clone(), text, ink: Ink::Note });
        }
        lines
    }
}

/// Hosts that are away, by name.
fn away(replicas: &[Replica]) -> BTreeSet<&str> {
    replicas
        .iter()
        .filter(|r| matches!(r.host_presence(), HostPresence::Away | HostPresence::Lost))
        .map(|r| r.host.as_str())
        .collect()
}

fn on_return(count: u32, away: &BTreeSet<&str>) -> String {
    let verb = if count == 1 { "host is away and gets" } else { "hosts are away and get" };
    let mut words = format!("{count} {verb} it on return");
    if !away.is_empty() {
        let mut names: Vec<&str> = away.iter().take(NAMED).copied().collect();
        if away.len() > NAMED {
            names.push("...");
        }
        words.push_str(&format!(" ({})", names.join(", ")));
    }
    for_terminal(&words)
}

/// What the reasons say that are no trouble: how far a replica is on its way.
fn on_its_way(reason: &str) -> Option<&'static str> {
    match reason {
        "ASSIGNED" => Some("told to its host"),
        "ACCEPTED" => Some("about to be started"),
        "FETCHING" => Some("fetching"),
        "STARTING" => Some("starting"),
        "NOT_READY" => Some("running, not ready yet"),
        _ => None,
    }
}

/// How a replica is: in full, without what moves all the time, and as a colour.
fn progress(replica: &Replica) -> (String, String, Ink) {
    let status = replica.status.clone().unwrap_or_default();
    let same = |text: String, ink| (text.clone(), text, ink);
    // A transfer that waits says why instead of how far it is.
    let moves = status.reason.is_empty() || status.reason == "FETCHING";
    if !matches!(replica.host_presence(), HostPresence::Present) {
        let presence = word(replica.host_presence().as_str_name(), "HOST_PRESENCE_");
        same(format!("host {presence}"), Ink::Note)
    } else if replica.intent() == ReplicaIntent::Stop {
        same("stopping".to_owned(), Ink::Note)
    } else if status.ready {
        same("ready".to_owned(), Ink::Good)
    } else if let Some(p) = status.progress.as_ref().filter(|p| p.total_bytes > 0 && moves) {
        // A line each ten per cent is enough for a file.
        let tenth = p.done_bytes.saturating_mul(10) / p.total_bytes;
        let what = if p.what.is_empty() { String::new() } else { format!(" {}", p.what) };
        let coarse = format!("fetching{what} {tenth}0 %");
        (format!("fetching{what} {}", transfer(p)), coarse, Ink::Busy)
    } else if let Some(words) = on_its_way(&status.reason) {
        let why = if status.reason == "NOT_READY" { waits(&status) } else { String::new() };
        let text = if why.is_empty() { words.to_owned() } else { format!("{words}: {why}") };
        (text, words.to_owned(), Ink::Busy)
    } else if !status.reason.is_empty() {
        let reason = status.reason.to_ascii_lowercase().replace('_', " ");
        (format!("{reason}: {}", waits(&status)), reason, Ink::Bad)
    } else if status.phase() == ReplicaPhase::Running {
        same("running, not ready yet".to_owned(), Ink::Busy)
    } else {
        same(word(status.phase().as_str_name(), "REPLICA_PHASE_"), Ink::Busy)
    }
}

fn planned_text(planned: &PlannedDeployment) -> String {
    let shown = planned.deployment.clone().unwrap_or_default();
    let meta = shown.meta.unwrap_or_default();
    let resolved = shown.status.map(|s| s.resolved).unwrap_or_default();
    let mut text = match planned.action() {
        ApplyAction::Created => format!("{}: would be created", meta.name),
        ApplyAction::Changed => format!("{}: would be changed, by a new release", meta.name),
        ApplyAction::Adjusted => format!("{}: would be adjusted, without a new release", meta.name),
        ApplyAction::Unchanged => format!("{}: would not change", meta.name),
        ApplyAction::Unspecified => format!("{}: not said", meta.name),
    };
    if !resolved.is_empty() {
        text.push_str(&format!(", from {resolved}"));
    }
    text.push('\n');
    for change in &planned.changes {
        let or = |t: &str| if t.is_empty() { "(none)".to_owned() } else { t.to_owned() };
        let (before, after) = (or(&change.before), or(&change.after));
        text.push_str(&format!("  {}: {before} -> {after}\n", change.path));
    }
    for step in &planned.steps {
        let kind = word(step.kind().as_str_name(), "PLANNED_STEP_KIND_");
        let fetch = match step.fetch_bytes {
            0 => String::new(),
            n => format!(", up to {} to fetch", berth_proto::quantity::human_bytes(n)),
        };
        text.push_str(&format!(
            "  {kind:<7} slot {} on {} (release {}{fetch})\n",
            step.slot, step.host, step.release
        ));
    }
    for pending in &planned.pending {
        let slots = counted(pending.count, "slot");
        text.push_str(&format!("  {slots} would wait: {}\n", pending.message));
    }
    text
}

fn planned_json(planned: &PlannedDeployment) -> Value {
    let shown = planned.deployment.clone().unwrap_or_default();
    let meta = shown.meta.unwrap_or_default();
    let changes: Vec<Value> = planned
        .changes
        .iter()
        .map(|c| json!({"path": c.path, "before": c.before, "after": c.after}))
        .collect();
    let steps: Vec<Value> = planned
        .steps
        .iter()
        .map(|s| {
            json!({
                "kind": word(s.kind().as_str_name(), "PLANNED_STEP_KIND_"), "slot": s.slot,
                "host": s.host, "release": s.release, "fetchBytes": s.fetch_bytes,
            })
        })
        .collect();
    let pending: Vec<Value> = planned
        .pending
        .iter()
        .map(|p| json!({"reason": p.reason, "message": p.message, "count": p.count}))
        .collect();
    json!({
        "name": meta.name, "namespace": meta.namespace,
        "action": word(planned.action().as_str_name(), "APPLY_ACTION_"),
        "resolved": shown.status.map(|s| s.resolved),
        "changes": changes, "steps": steps, "pending": pending,
    })
}

pub async fn plan(global: &Global, files: &Files) -> Result<()> {
    let deployments = inputs(global, files)?;
    let client = connect(global).await?;
    let answer = ask(global, client.deployments().plan(PlanRequest { deployments })).await?;
    let text: String = answer.planned.iter().map(planned_text).collect();
    let values = answer.planned.iter().map(planned_json).collect();
    say(global, text.trim_end(), &Value::Array(values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser as _;

    fn global(args: &[&str]) -> Global {
        Cli::try_parse_from([&["berth"], args, &["ps"]].concat()).unwrap().global
    }

    fn manifest(name: &str) -> String {
        format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: {name}}}\n\
             spec: {{image: x}}\n"
        )
    }

    #[test]
    fn files_and_folders_are_read_in_order_and_every_problem_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("more")).unwrap();
        std::fs::write(at("more/b.yaml"), manifest("b")).unwrap();
        std::fs::write(
            at("more/a.json"),
            r#"{"apiVersion": "berth/v1", "kind": "Deployment",
            "metadata": {"name": "a"}, "spec": {"image": "x"}}"#,
        )
        .unwrap();
        std::fs::write(at("more/notes.txt"), "not a manifest").unwrap();
        std::fs::write(at("two.yaml"), format!("{}---\n{}", manifest("c"), manifest("d"))).unwrap();
        let read = |files: &[&str], args: &[&str]| {
            let files = Files { files: files.iter().map(|f| at(f)).collect() };
            inputs(&global(args), &files)
        };
        let names = |inputs: Vec<DeploymentInput>| -> Vec<String> {
            inputs.into_iter().filter_map(|i| Some(i.meta?.name)).collect()
        };
        assert_eq!(names(read(&["more", "two.yaml"], &[]).unwrap()), ["a", "b", "c", "d"]);

        std::fs::write(at("bad.yaml"), manifest("e").replace("image", "imgae")).unwrap();
        let many = ["bad.yaml", "missing.yaml", "more", "more/b.yaml"];
        let error = read(&many, &[]).unwrap_err();
        assert_eq!(error.kind, Kind::User);
        for part in [
            "4 problems",
            "bad.yaml: spec.imgae: is not known (did you mean \"image\"?)",
            "bad.yaml: spec: names nothing to run", // an unknown field leaves the source missing
            "missing.yaml: cannot be read",
            "\"b\" is also in",
        ] {
            assert!(error.message.contains(part), "{part} is not in {}", error.message);
        }
        assert!(
            read(&["more"], &["-n", "x"])
                .unwrap()
                .iter()
                .all(|i| i.meta.as_ref().is_some_and(|m| m.namespace == "x"))
        );
    }

    #[test]
    fn a_folder_without_manifests_and_another_namespace_are_problems() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { files: vec![dir.path().to_owned()] };
        let error = inputs(&global(&[]), &files).unwrap_err();
        assert!(error.message.contains("holds no manifest"), "{}", error.message);
        let text = manifest("a").replace("{name: a}", "{name: a, namespace: y}");
        std::fs::write(dir.path().join("a.yaml"), text).unwrap();
        let error = inputs(&global(&["-n", "x"]), &files).unwrap_err();
        assert!(error.message.contains("-n says \"x\""), "{}", error.message);
    }

    #[test]
    fn a_rollout_is_judged_by_its_own_release() {
        let status = |rollout: RolloutState, release, deferred_hosts| DeploymentStatus {
            rollout: rollout as i32,
            release,
            deferred_hosts,
            ..DeploymentStatus::default()
        };
        use RolloutState as S;
        let judge = |status: &DeploymentStatus, release| judge(status, release, false);
        assert_eq!(judge(&status(S::Rolling, 2, 0), 2), Verdict::Wait);
        assert_eq!(judge(&status(S::Complete, 2, 3), 2), Verdict::Done { deferred: 3 });
        for failed in [S::Failed, S::RolledBack, S::Paused, S::Deleting] {
            assert!(matches!(judge(&status(failed, 1, 0), 2), Verdict::Failed(_)), "{failed:?}");
        }
        // Somebody else's newer release is not the one that was waited for.
        assert!(matches!(judge(&status(S::Complete, 3, 0), 2), Verdict::Failed(_)));
    }

    #[test]
    fn a_number_that_was_raised_is_not_there_before_its_replicas_are_ready() {
        let status = |updated_ready, deferred_hosts| DeploymentStatus {
            rollout: RolloutState::Complete as i32,
            release: 1,
            wanted: 50,
            updated_ready,
            deferred_hosts,
            ..DeploymentStatus::default()
        };
        assert_eq!(judge(&status(2, 0), 1, true), Verdict::Wait);
        assert_eq!(judge(&status(50, 0), 1, true), Verdict::Done { deferred: 0 });
        // As with a new release: hosts that are away are not waited for.
        assert_eq!(judge(&status(2, 1), 1, true), Verdict::Done { deferred: 1 });
        // A release that was made has been judged by its rollout.
        assert_eq!(judge(&status(2, 0), 1, false), Verdict::Done { deferred: 0 });
    }

    #[tokio::test]
    async fn a_connection_is_shared_until_it_breaks_and_then_made_anew_once() {
        let made = RefCell::new(0);
        let make = || async {
            *made.borrow_mut() += 1;
            Ok(*made.borrow())
        };
        let shared = Shared::new(0);
        assert_eq!(shared.get(make()).await.unwrap(), (0, 0));
        // Two find it broken, one makes the next.
        for _ in 0..2 {
            shared.leave(0).await;
            assert_eq!(shared.get(make()).await.unwrap(), (1, 1));
        }
        shared.leave(1).await;
        let away = async { Err(Error::new(Kind::Unavailable, "away")) };
        assert!(shared.get(away).await.is_err());
        assert_eq!(shared.get(make()).await.unwrap(), (2, 2));
    }

    #[test]
    fn of_several_ends_the_failed_rollout_decides_the_exit_code() {
        let of = |kinds: &[Kind]| {
            worst(kinds.iter().map(|k| Error::new(*k, "x")).collect()).map(|e| e.kind.code())
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[Kind::Deferred]), Some(6));
        assert_eq!(of(&[Kind::Deferred, Kind::RolloutFailed, Kind::Unavailable]), Some(5));
    }

    #[test]
    fn a_replicas_state_is_told_with_its_progress() {
        let mut replica = Replica {
            host_presence: HostPresence::Present as i32,
            intent: ReplicaIntent::Run as i32,
            ..Replica::default()
        };
        let with = |replica: &Replica, status: ReplicaStatus| {
            progress(&Replica { status: Some(status), ..replica.clone() })
        };
        let fetching = ReplicaStatus {
            progress: Some(Progress {
                done_bytes: 43,
                total_bytes: 100,
                what: "artifact".into(),
                ..Progress::default()
            }),
            ..ReplicaStatus::default()
        };
        let (text, coarse, _) = with(&replica, fetching.clone());
        assert_eq!(
            (text.as_str(), coarse.as_str()),
            ("fetching artifact 43 %", "fetching artifact 40 %")
        );
        // The server gives every phase a reason; only trouble is told instead of the progress.
        let moved = |reason: &str| {
            let (reason, message) = (reason.to_owned(), "no registry answers".to_owned());
            with(&replica, ReplicaStatus { reason, message, ..fetching.clone() }).0
        };
        assert_eq!(moved("FETCHING"), "fetching artifact 43 %");
        assert_eq!(moved("FETCH_WAITS"), "fetch waits: no registry answers");
        let failing = ReplicaStatus {
            reason: "NOT_READY".into(),
            message: "its health check fails: 503".into(),
            ..ReplicaStatus::default()
        };
        let (text, coarse, _) = with(&replica, failing);
        assert_eq!(text, "running, not ready yet: its health check fails: 503");
        assert_eq!(coarse, "running, not ready yet");
        let starting =
            ReplicaStatus { phase: ReplicaPhase::Starting as i32, ..ReplicaStatus::default() };
        assert_eq!(with(&replica, starting).0, "starting");
        let ready = ReplicaStatus { ready: true, ..ReplicaStatus::default() };
        assert_eq!(with(&replica, ready.clone()).0, "ready");
        replica.host_presence = HostPresence::Away as i32;
        assert_eq!(with(&replica, ready).0, "host away");
    }
}
