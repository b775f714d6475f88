//! Applying, planning, scaling, undoing.

use super::{ask, confirm, connect, write};
use crate::args::{
    Apply, Deployment as Verb, Files, Global, Output, Release as ReleaseVerb, Rollout,
};
use crate::error::{Error, Kind, Result};
use crate::output::{age, moment, print, put, say, word};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::manifest;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn read_files(paths: &[PathBuf]) -> Result<Vec<DeploymentInput>> {
    let mut texts: Vec<(String, String)> = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            texts.push(("standard input".to_owned(), text));
        } else if path.is_dir() {
            let mut names: Vec<PathBuf> = std::fs::read_dir(path)?
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| {
                    p.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|k| e == *k))
                })
                .collect();
            names.sort();
            for name in names {
                texts.push((name.display().to_string(), std::fs::read_to_string(&name)?));
            }
        } else {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::user(format!("cannot read {}: {e}", path.display())))?;
            texts.push((path.display().to_string(), text));
        }
    }
    let mut problems = berth_proto::convert::Problems::default();
    let mut inputs = Vec::new();
    for (origin, text) in texts {
        match manifest::parse(&text, &origin) {
            Ok(written) => inputs.extend(written.into_iter().map(|w| DeploymentInput {
                meta: Some(ObjectMeta {
                    name: w.name,
                    namespace: w.namespace,
                    labels: w.labels,
                    ..ObjectMeta::default()
                }),
                spec: Some(w.spec),
                origin: w.origin,
            })),
            Err(found) => problems.0.extend(found.0),
        }
    }
    if problems.0.is_empty() { Ok(inputs) } else { Err(problems.into()) }
}

fn inputs(global: &Global, files: &Files) -> Result<Vec<DeploymentInput>> {
    let mut inputs = read_files(&files.files)?;
    if let Some(namespace) = &global.namespace {
        for meta in inputs.iter_mut().filter_map(|i| i.meta.as_mut()) {
            if meta.namespace.is_empty() {
                meta.namespace.clone_from(namespace);
            }
        }
    }
    Ok(inputs)
}

pub async fn apply(global: &Global, args: Apply) -> Result<()> {
    let deployments = inputs(global, &args.files)?;
    let client = connect(global).await?;
    let request = ApplyRequest { write: write(), deployments };
    let answer = ask(global, client.deployments().apply(request)).await?;
    let mut shown = Vec::new();
    let mut worst: Option<Error> = None;
    for result in &answer.results {
        let deployment = result.deployment.clone().unwrap_or_default();
        let meta = deployment.meta.clone().unwrap_or_default();
        let action = word(result.action().as_str_name(), "APPLY_ACTION_");
        let release = deployment.status.as_ref().map_or(0, |s| s.release);
        eprintln!("{}: {action} (release {release})", meta.name);
        let mut last = deployment;
        if !args.no_wait {
            match wait(global, &meta, args.timeout, args.wait_all).await {
                Ok(done) => last = done,
                Err(error) => {
                    eprintln!("{}: {}", meta.name, error.message);
                    worst = Some(error);
                }
            }
        }
        let mut value = to_json(&last);
        value["action"] = json!(action);
        shown.push(value);
    }
    if global.output != Output::Table && global.output != Output::Wide {
        say(global, "", &Value::Array(shown))?;
    }
    worst.map_or(Ok(()), Err)
}

/// Follows a rollout to its end, saying on stderr how it goes.
async fn wait(
    global: &Global,
    meta: &ObjectMeta,
    timeout: Duration,
    wait_all: bool,
) -> Result<Deployment> {
    let end = tokio::time::Instant::now() + timeout;
    let mut said: BTreeMap<String, String> = BTreeMap::new();
    let late = || {
        Error::new(Kind::RolloutFailed, "the rollout is not complete in time; it goes on")
            .hint("`berth deployment rollout status` shows where it is")
    };
    loop {
        // A stream that broke is opened again: each message is complete.
        let client = connect(global).await?;
        let request =
            WatchDeploymentRequest { namespace: meta.namespace.clone(), name: meta.name.clone() };
        let mut stream = ask(global, client.deployments().watch_deployment(request)).await?;
        loop {
            let next = tokio::time::timeout_at(end, stream.message()).await.map_err(|_| late())?;
            let Ok(Some(now)) = next else { break };
            let deployment = now.deployment.clone().unwrap_or_default();
            let status = deployment.status.clone().unwrap_or_default();
            if now.deleted {
                return Err(Error::new(Kind::RolloutFailed, "it was deleted meanwhile"));
            }
            for replica in &now.replicas {
                let line = progress(replica);
                if said.get(&replica.uid) != Some(&line) {
                    eprintln!("  {line}");
                    said.insert(replica.uid.clone(), line);
                }
            }
            for pending in status.pending.iter().filter(|p| p.reason == "NO_HOST_FITS") {
                let line = format!("waiting: {} ({} slots)", pending.message, pending.count);
                if said.insert(line.clone(), String::new()).is_none() {
                    eprintln!("  {}", for_terminal(&line));
                }
            }
            let reason = for_terminal(&status.reason);
            match status.rollout() {
                RolloutState::Complete => {
                    if status.deferred_hosts > 0 {
                        let words = format!(
                            "{} hosts are away and get it on return",
                            status.deferred_hosts
                        );
                        if wait_all {
                            return Err(Error::new(
                                Kind::Deferred,
                                format!("complete, but {words}"),
                            ));
                        }
                        eprintln!("  deferred: {words}");
                    }
                    eprintln!(
                        "{}: complete, {}/{} ready",
                        meta.name, status.updated_ready, status.wanted
                    );
                    return Ok(deployment);
                }
                RolloutState::RolledBack | RolloutState::Failed | RolloutState::Paused => {
                    return Err(Error::new(Kind::RolloutFailed, reason));
                }
                RolloutState::Rolling | RolloutState::Unspecified | RolloutState::Deleting => {}
            }
        }
        if tokio::time::Instant::now() >= end {
            return Err(late());
        }
    }
}

/// How a replica is, in a line.
fn progress(replica: &Replica) -> String {
    let status = replica.status.clone().unwrap_or_default();
    let what = if replica.intent() == ReplicaIntent::Stop {
        "stopping".to_owned()
    } else if status.ready {
        "ready".to_owned()
    } else if let Some(p) = status.progress.as_ref().filter(|p| p.total_bytes > 0) {
        format!("fetching {} {} %", p.what, p.done_bytes.saturating_mul(100) / p.total_bytes)
    } else if !status.reason.is_empty() && status.reason != "NOT_READY" {
        format!("{}: {}", status.reason.to_ascii_lowercase(), status.message)
    } else {
        word(status.phase().as_str_name(), "REPLICA_PHASE_")
    };
    for_terminal(&format!(
        "slot {} on {} (release {}): {what}",
        replica.slot, replica.host, replica.release
    ))
}

pub async fn plan(global: &Global, files: &Files) -> Result<()> {
    let deployments = inputs(global, files)?;
    let client = connect(global).await?;
    let answer = ask(global, client.deployments().plan(PlanRequest { deployments })).await?;
    let mut text = String::new();
    let mut values = Vec::new();
    for planned in &answer.planned {
        let meta = planned.deployment.clone().unwrap_or_default().meta.unwrap_or_default();
        let action = word(planned.action().as_str_name(), "APPLY_ACTION_");
        text.push_str(&format!("{}: would be {action}\n", meta.name));
        for change in &planned.changes {
            let or = |t: &str| if t.is_empty() { "(none)".to_owned() } else { t.to_owned() };
            text.push_str(&format!(
                "  {}: {} -> {}\n",
                change.path,
                or(&change.before),
                or(&change.after)
            ));
        }
        for step in &planned.steps {
            let kind = word(step.kind().as_str_name(), "PLANNED_STEP_KIND_");
            text.push_str(&format!(
                "  {kind} slot {} on {} (release {}, up to {} to fetch)\n",
                step.slot,
                step.host,
                step.release,
                berth_proto::quantity::human_bytes(step.fetch_bytes)
            ));
        }
        for pending in &planned.pending {
            text.push_str(&format!("  {} slots would wait: {}\n", pending.count, pending.message));
        }
        values.push(json!({
            "name": meta.name, "namespace": meta.namespace, "action": action,
            "changes": planned.changes.iter().map(|c| json!({"path": c.path, "before": c.before, "after": c.after})).collect::<Vec<_>>(),
            "steps": planned.steps.iter().map(|s| json!({
                "kind": word(s.kind().as_str_name(), "PLANNED_STEP_KIND_"), "slot": s.slot,
                "host": s.host, "release": s.release, "fetchBytes": s.fetch_bytes,
            })).collect::<Vec<_>>(),
            "pending": planned.pending.iter().map(|p| json!({"reason": p.reason, "message": p.message, "count": p.count})).collect::<Vec<_>>(),
        }));
    }
    say(global, text.trim_end(), &Value::Array(values))
}

fn to_json(deployment: &Deployment) -> Value {
    let mut value = manifest::to_json(deployment);
    let s = deployment.status.clone().unwrap_or_default();
    let meta = deployment.meta.clone().unwrap_or_default();
    value["metadata"]["uid"] = json!(meta.uid);
    value["metadata"]["revision"] = json!(meta.revision);
    value["metadata"]["createTime"] = moment(meta.create_time.as_ref());
    value["status"] = json!({
        "release": s.release, "rollout": word(s.rollout().as_str_name(), "ROLLOUT_STATE_"),
        "reason": s.reason, "wanted": s.wanted, "running": s.running, "ready": s.ready,
        "updatedReady": s.updated_ready, "deferredHosts": s.deferred_hosts,
        "stableRelease": s.stable_release, "resolved": s.resolved, "unknown": s.unknown,
        "pending": s.pending.iter().map(|p| json!({"reason": p.reason, "message": p.message, "count": p.count})).collect::<Vec<_>>(),
    });
    value
}

pub async fn scale(global: &Global, name: &str, replicas: u32) -> Result<()> {
    let client = connect(global).await?;
    let request = ScaleRequest {
        write: write(),
        namespace: client.namespace.clone(),
        name: name.to_owned(),
        replicas,
    };
    let answer = ask(global, client.deployments().scale(request)).await?;
    say(
        global,
        &format!("{name}: {replicas} replicas wanted"),
        &to_json(&answer.deployment.unwrap_or_default()),
    )
}

pub async fn remove(global: &Global, name: &str, allow_missing: bool) -> Result<()> {
    confirm(global, &format!("stop all replicas of \"{name}\" and remove it"))?;
    let client = connect(global).await?;
    let request = DeleteRequest {
        write: write(),
        namespace: client.namespace.clone(),
        name: name.to_owned(),
        allow_missing,
    };
    ask(global, client.deployments().delete(request)).await?;
    let watch =
        WatchDeploymentRequest { namespace: client.namespace.clone(), name: name.to_owned() };
    if let Ok(mut stream) = ask(global, client.deployments().watch_deployment(watch)).await {
        let gone = async {
            while let Ok(Some(now)) = stream.message().await {
                if now.deleted {
                    return true;
                }
            }
            false
        };
        if !tokio::time::timeout(global.request_timeout, gone).await.unwrap_or(false) {
            eprintln!("it ends when every host has confirmed that nothing of it is left");
            return Ok(());
        }
    }
    say(global, &format!("{name}: removed"), &json!({"name": name, "removed": true}))
}

pub async fn deployment(global: &Global, verb: Verb) -> Result<()> {
    match verb {
        Verb::List => {
            let client = connect(global).await?;
            let request = ListDeploymentsRequest {
                namespace: client.namespace.clone(),
                page: Some(Page { page_size: 1000, ..Page::default() }),
            };
            let all =
                ask(global, client.deployments().list_deployments(request)).await?.deployments;
            let rows = all
                .iter()
                .map(|d| {
                    let (m, s) =
                        (d.meta.clone().unwrap_or_default(), d.status.clone().unwrap_or_default());
                    let reason =
                        s.pending.first().map(|p| p.message.clone()).unwrap_or(s.reason.clone());
                    vec![
                        m.namespace,
                        m.name,
                        format!("{}/{}", s.ready, s.wanted),
                        s.release.to_string(),
                        word(s.rollout().as_str_name(), "ROLLOUT_STATE_"),
                        age(m.create_time.as_ref()),
                        reason,
                        s.resolved,
                    ]
                })
                .collect();
            let value = Value::Array(all.iter().map(to_json).collect());
            let heads =
                ["NAMESPACE", "NAME", "READY", "RELEASE", "ROLLOUT", "AGE", "REASON", "SOURCE"];
            print(global, &heads, 7, rows, &value)
        }
        Verb::Show { name } => {
            let client = connect(global).await?;
            let request = GetDeploymentRequest { namespace: client.namespace.clone(), name };
            let one = ask(global, client.deployments().get_deployment(request)).await?;
            let one = one.deployment.unwrap_or_default();
            match global.output {
                // Can be applied again and changes nothing.
                Output::Yaml => put(&manifest::to_yaml(&manifest::to_json(&one))),
                Output::Json => say(global, "", &to_json(&one)),
                Output::Table | Output::Wide => put(&manifest::to_yaml(&to_json(&one))),
            }
        }
        Verb::Scale { name, replicas } => scale(global, &name, replicas).await,
        Verb::Restart { name } => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request = RestartRequest { write: write(), namespace, name: name.clone() };
            let answer = ask(global, client.deployments().restart(request)).await?;
            let release =
                answer.deployment.clone().unwrap_or_default().status.unwrap_or_default().release;
            say(
                global,
                &format!("{name}: restarting as release {release}"),
                &to_json(&answer.deployment.unwrap_or_default()),
            )
        }
        Verb::Rm { name, allow_missing } => remove(global, &name, allow_missing).await,
        Verb::Rollout(Rollout::Status { name }) => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request = GetDeploymentRequest { namespace, name: name.clone() };
            let one = ask(global, client.deployments().get_deployment(request)).await?;
            let one = one.deployment.unwrap_or_default();
            let s = one.status.clone().unwrap_or_default();
            let state = word(s.rollout().as_str_name(), "ROLLOUT_STATE_");
            let words = format!(
                "{name}: release {} is {state}, {}/{} ready {}",
                s.release, s.updated_ready, s.wanted, s.reason
            );
            say(global, &for_terminal(words.trim()), &to_json(&one))
        }
        Verb::Rollout(Rollout::History { name }) => {
            release(global, ReleaseVerb::List { deployment: name }).await
        }
        Verb::Rollout(Rollout::Undo { name, to }) => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request =
                UndoRequest { write: write(), namespace, name: name.clone(), to_release: to };
            let answer = ask(global, client.deployments().undo(request))
                .await?
                .deployment
                .unwrap_or_default();
            let release = answer.status.as_ref().map_or(0, |s| s.release);
            say(global, &format!("{name}: going back, as release {release}"), &to_json(&answer))
        }
    }
}

fn release_json(r: &Release) -> Value {
    json!({
        "deployment": r.deployment, "namespace": r.namespace, "number": r.number,
        "state": word(r.state().as_str_name(), "RELEASE_STATE_"), "cause": r.cause,
        "createdBy": r.created_by, "createTime": moment(r.create_time.as_ref()),
        "bodyDigest": r.body_digest, "copiedFrom": r.copied_from,
        "spec": r.spec.as_ref().map(manifest::spec_to_json),
    })
}

pub async fn release(global: &Global, verb: ReleaseVerb) -> Result<()> {
    let client = connect(global).await?;
    let namespace = client.namespace.clone();
    match verb {
        ReleaseVerb::List { deployment } => {
            let request = ListReleasesRequest { namespace, deployment, page: None };
            let all = ask(global, client.deployments().list_releases(request)).await?.releases;
            let rows = all
                .iter()
                .map(|r| {
                    vec![
                        r.number.to_string(),
                        word(r.state().as_str_name(), "RELEASE_STATE_"),
                        r.cause.clone(),
                        r.created_by.clone(),
                        age(r.create_time.as_ref()),
                        r.body_digest.clone(),
                    ]
                })
                .collect();
            let value = Value::Array(all.iter().map(release_json).collect());
            print(global, &["RELEASE", "STATE", "CAUSE", "BY", "AGE", "BODY"], 5, rows, &value)
        }
        ReleaseVerb::Show { deployment, number } => {
            let request = GetReleaseRequest { namespace, deployment, number };
            let one = ask(global, client.deployments().get_release(request)).await?;
            let value = release_json(&one.release.unwrap_or_default());
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
    }
}
