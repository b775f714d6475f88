//! Applying and planning: manifests are read, sent, and their rollouts followed to the end.

use super::deployment::to_json;
use super::follow::{Following, Shared, ready_of};
use super::{ask, connect, in_namespace, write};
use crate::args::{Apply, Files, Global};
use crate::error::{Error, Kind, Result};
use crate::output::{despite, print, say, word};
use crate::progress::Board;
use berth_proto::api::*;
use berth_proto::convert::Problems;
use berth_proto::escape::for_terminal;
use berth_proto::manifest;
use berth_proto::words::counted;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use tokio::time::Instant;

/// Rollouts followed at once; the others wait for their turn. What is followed is a level, so they miss
/// nothing by that, and one whose turn comes after the end is still asked for once. One connection carries
/// at least 100 streams.
const FOLLOWED: usize = 64;
/// The exit code of whoever is ended by Ctrl-C, as shells give it.
const INTERRUPTED: u8 = 130;

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
    let lines: Vec<String> = problems.0.iter().map(|p| for_terminal(&p.to_string())).collect();
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

/// What somebody is told who does not wait any longer for these. The namespaces are the manifests', which
/// may name them without `-n`.
fn left(metas: &[ObjectMeta]) -> String {
    let (what, name) = match metas {
        [one] => ("the rollout goes on", one.name.as_str()),
        [] | [_, ..] => ("the rollouts go on", "NAME"),
    };
    let spaces: BTreeSet<&str> = metas.iter().map(|m| m.namespace.as_str()).collect();
    let mut spaces = spaces.into_iter();
    let space = match (spaces.next(), spaces.next()) {
        (None | Some("" | "default"), None) => String::new(),
        (Some(one), None) => format!(" -n {one}"),
        (_, Some(_)) => " -n NAMESPACE".to_owned(),
    };
    for_terminal(&format!("{what}; `berth deployment rollout status {name}{space}` tells how"))
}

/// Answers with the exit code.
pub async fn apply(global: &Global, args: Apply) -> Result<u8> {
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
            let action = word(result.action().as_str_name(), "APPLY_ACTION_");
            let applied = result.action();
            let deployment = result.deployment.unwrap_or_default();
            let settled = is_settled(applied, &deployment);
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
                    settled,
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
    let metas: Vec<ObjectMeta> =
        answer.results.iter().filter_map(|r| r.deployment.as_ref()?.meta.clone()).collect();
    let results = answer.results.into_iter().enumerate();
    let following =
        futures_util::stream::iter(results).map(follow).buffer_unordered(FOLLOWED).collect();
    let mut outcomes: Vec<(usize, Outcome)> = tokio::select! {
        // What is over is told, also when somebody gives up at that moment.
        biased;
        outcomes = following => outcomes,
        // Cancel-safe: followed is a level, and nothing is written.
        pressed = tokio::signal::ctrl_c() => {
            pressed?;
            board.borrow_mut().leave(&left(&metas));
            return Ok(INTERRUPTED);
        }
    };
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
    despite(printed, worst(errors)).map(|()| 0)
}

/// Whether a rollout that is complete says nothing of how many are there now. Every host of a fleet is
/// seldom ready at once: of those that run on every host only a change is waited for.
fn is_settled(action: ApplyAction, deployment: &Deployment) -> bool {
    match action {
        ApplyAction::Adjusted => true,
        ApplyAction::Unchanged => !deployment.spec.as_ref().is_some_and(|s| s.every_host),
        ApplyAction::Created | ApplyAction::Changed | ApplyAction::Unspecified => false,
    }
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
        ready_of(&s),
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

fn planned_text(planned: &PlannedDeployment) -> String {
    let shown = planned.deployment.clone().unwrap_or_default();
    let meta = shown.meta.unwrap_or_default();
    let resolved = shown.status.map(|s| s.resolved).unwrap_or_default();
    let name = in_namespace(&meta.namespace, &meta.name);
    let mut text = match planned.action() {
        ApplyAction::Created => format!("{name}: would be created"),
        ApplyAction::Changed => format!("{name}: would be changed, by a new release"),
        ApplyAction::Adjusted => format!("{name}: would be adjusted, without a new release"),
        ApplyAction::Unchanged => format!("{name}: would not change"),
        ApplyAction::Unspecified => format!("{name}: not said"),
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
    if planned.more {
        text.push_str("  ... and more steps\n");
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
        "changes": changes, "steps": steps, "more": planned.more, "pending": pending,
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

        // One place is one problem, named as compilers name theirs.
        std::fs::write(at("torn.yaml"), "kind: Deployment\nspec: {image: [x}\n").unwrap();
        let error = read(&["torn.yaml"], &[]).unwrap_err();
        assert!(!error.message.contains("problems"), "{}", error.message);
        assert!(error.message.contains("torn.yaml:2:"), "{}", error.message);
        assert!(!error.message.contains("<input>"), "{}", error.message);
        assert_eq!(error.message.lines().count(), 1, "{}", error.message);

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
    fn what_did_not_change_is_waited_for_but_for_what_runs_on_every_host() {
        let of = |every_host| {
            let spec = DeploymentSpec { every_host, ..DeploymentSpec::default() };
            Deployment { spec: Some(spec), ..Deployment::default() }
        };
        assert!(is_settled(ApplyAction::Unchanged, &of(false)));
        assert!(is_settled(ApplyAction::Unchanged, &Deployment::default()));
        assert!(!is_settled(ApplyAction::Unchanged, &of(true)));
        assert!(is_settled(ApplyAction::Adjusted, &of(true)));
        // Their rollout judges them.
        assert!(!is_settled(ApplyAction::Changed, &of(false)));
    }

    #[test]
    fn whoever_gives_up_is_told_where_to_look() {
        let told = |all: &[(&str, &str)]| {
            let meta = |(namespace, name): &(&str, &str)| ObjectMeta {
                namespace: (*namespace).to_owned(),
                name: (*name).to_owned(),
                ..ObjectMeta::default()
            };
            left(&all.iter().map(meta).collect::<Vec<_>>())
        };
        assert_eq!(
            told(&[("default", "iris")]),
            "the rollout goes on; `berth deployment rollout status iris` tells how"
        );
        // Also where the manifest names it, and not the command line.
        assert_eq!(
            told(&[("vision", "iris")]),
            "the rollout goes on; `berth deployment rollout status iris -n vision` tells how"
        );
        for (all, end) in [
            ([("default", "a"), ("default", "b")], "status NAME` tells how"),
            ([("x", "a"), ("x", "b")], "status NAME -n x` tells how"),
            ([("x", "a"), ("default", "b")], "status NAME -n NAMESPACE` tells how"),
        ] {
            let told = told(&all);
            assert!(told.starts_with("the rollouts go on; ") && told.ends_with(end), "{told}");
        }
    }

    #[test]
    fn a_plan_that_is_cut_short_says_so() {
        let planned = |more| {
            let steps = vec![PlannedStep { host: "a".to_owned(), ..PlannedStep::default() }];
            PlannedDeployment { steps, more, ..PlannedDeployment::default() }
        };
        assert!(planned_text(&planned(true)).ends_with(")\n  ... and more steps\n"));
        assert!(!planned_text(&planned(false)).contains("more"));
        for more in [true, false] {
            assert_eq!(planned_json(&planned(more))["more"], json!(more));
        }
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
}
