//! That what people ask for is what the ledger is about to hold: each request is held against its own
//! words, and not against what the core makes of them.

use super::script::Action;
use super::specs;
use super::world::World;
use berth_proto::api::{DeploymentSpec as Written, ReleaseState, RolloutState};
use berth_proto::convert;
use berth_proto::ids::{Namespace, ReleaseNumber};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::objects::{Deployment, Release};
use berth_server_core::view::View;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What of a spec makes the containers.
fn of_containers(spec: &Written) -> Written {
    Written {
        replicas: None,
        every_host: false,
        placement: None,
        rollout: None,
        on_host_loss: None,
        ..spec.clone()
    }
}

/// As the program writes it: what is left out has its default.
fn filled_in(spec: &Written) -> Option<Written> {
    convert::deployment_spec_from_api(spec).ok().map(|spec| convert::deployment_spec_to_api(&spec))
}

fn newest<'a>(view: &'a View, deployment: &Deployment) -> Option<&'a Arc<Release>> {
    view.releases_of(&deployment.uid).max_by_key(|release| release.number)
}

impl World<'_> {
    /// Somebody's request, as it is about to be sent.
    pub(super) fn check_asked(&mut self, before: &View, action: &Action, proposal: &Proposal) {
        let mut after = before.clone();
        let revision = before.revision.next();
        for change in &proposal.changes {
            after.apply(change, revision);
        }
        if let Action::Remove { host, wipe } = action {
            // Of its name there may be a newer join, which is not durable yet and not answered.
            if let Some(named) = before.host_by_name(&format!("h{host}")) {
                self.book.wipes.entry(named.uid.clone()).or_default().insert(*wipe);
            }
        }
        if let Some(wrong) = is_not_so(before, &after, action, &proposal.changes) {
            self.broke(format!("{action}, and {wrong}"));
        }
    }
}

fn is_not_so(before: &View, after: &View, action: &Action, changes: &[Change]) -> Option<String> {
    let named = |view: &View, number: &u8| {
        let name = format!("d{number}").parse().ok()?;
        view.deployment_by_name(&Namespace::default(), &name).cloned()
    };
    match action {
        Action::Apply { deployment, spec } => {
            let wanted = specs::wanted(*deployment, spec);
            let Some(held) = named(after, deployment) else {
                return Some("it is not there".into());
            };
            // Its newest, unless that was undone and this is what was gone back to.
            let newest = newest(after, &held)?;
            let old = named(before, deployment);
            let kept_back = old.as_ref().is_some_and(|old| {
                let given_up = old.release() == held.release() && old.rollout() == held.rollout();
                given_up && newest.state() != ReleaseState::Rolling
            });
            let newest = match after.release(&held.uid, held.release()) {
                Some(own) if kept_back => own,
                Some(_) | None => newest,
            };
            let containers = filled_in(&wanted.spec).as_ref().map(of_containers);
            let made = newest.record.spec.as_ref().map(of_containers);
            for (so, what) in [
                (held.record.spec.as_ref() == Some(&wanted.spec), "its spec is another one"),
                (held.wanted() == spec.replicas, "its number is another one"),
                (newest.source == wanted.resolved, "its release is of another source"),
                (made == containers, "its release is of another spec"),
                (held.release() == newest.number, "its release is not its newest"),
            ] {
                if !so {
                    return Some(what.to_owned());
                }
            }
            kept(before, after, &held)
        }
        Action::Scale { deployment, replicas } => {
            let held = named(after, deployment)?;
            let written = held.record.spec.as_ref().and_then(|spec| spec.replicas);
            let so = held.wanted() == Some(*replicas) && written.is_none_or(|n| n == *replicas);
            (!so).then(|| format!("its number is {:?}, written as {written:?}", held.wanted()))
        }
        Action::Restart { deployment } => {
            let was = named(before, deployment)?;
            let old = before.release(&was.uid, was.release())?;
            again(before, after, &was, old)
        }
        Action::Undo { deployment } => {
            let was = named(before, deployment)?;
            let complete = |release: &&Arc<Release>| {
                release.number < was.release() && release.state() == ReleaseState::Complete
            };
            let old = before.releases_of(&was.uid).filter(complete).max_by_key(|r| r.number)?;
            let under_way = matches!(was.rollout(), RolloutState::Rolling | RolloutState::Paused);
            if under_way && old.number == was.stable() {
                return given_up(before, after, &was, old);
            }
            again(before, after, &was, old)
        }
        Action::Delete { deployment } => {
            let held = named(after, deployment)?;
            let going = held.is_deleted() && held.rollout() == RolloutState::Deleting;
            (!going).then(|| "it is not".to_owned())
        }
        Action::ResolveOrphans { adopt: true, .. } => changes.iter().find_map(|change| {
            let Change::PutReplica(adopted) = change else { return None };
            let deployment = after.deployment(&adopted.deployment)?;
            let beyond = deployment.wanted().is_some_and(|wanted| adopted.slot >= wanted);
            let beyond = adopted.runs() && beyond;
            beyond.then(|| format!("{} is adopted beyond what is wanted", adopted.uid))
        }),
        _ => None,
    }
}

/// A release that takes an earlier one's spec again.
fn again(before: &View, after: &View, was: &Deployment, old: &Release) -> Option<String> {
    let held = after.deployment(&was.uid)?;
    let newest = newest(after, held)?;
    let highest = before.releases_of(&was.uid).map(|r| r.number).max().unwrap_or_default();
    let containers = |spec: &Option<Written>| spec.as_ref().and_then(filled_in);
    let spec = containers(&held.record.spec).as_ref().map(of_containers);
    for (so, what) in [
        (newest.number > highest, "there is no new release"),
        (held.release() == newest.number, "its release is not its newest"),
        (newest.source == old.source, "its release is of another source"),
        (
            held.wanted() == was.wanted() || old.spec.scale != was.spec.scale,
            "its number is changed",
        ),
        (
            newest.record.spec.as_ref().map(of_containers)
                == old.record.spec.as_ref().map(of_containers),
            "its release is of another spec",
        ),
        (spec == old.record.spec.as_ref().map(of_containers), "its spec is another one"),
    ] {
        if !so {
            return Some(what.to_owned());
        }
    }
    kept(before, after, held)
}

/// A rollout that is not complete is given up: what served before is wanted again, itself.
fn given_up(before: &View, after: &View, was: &Deployment, old: &Release) -> Option<String> {
    let held = after.deployment(&was.uid)?;
    let count = |view: &View| view.releases_of(&was.uid).count();
    let containers = |spec: &Option<Written>| spec.as_ref().and_then(filled_in);
    let spec = containers(&held.record.spec).as_ref().map(of_containers);
    for (so, what) in [
        (held.release() == old.number, "its release is not the one that served"),
        (count(before) == count(after), "there is a new release"),
        (held.rollout() == RolloutState::Rolling, "it does not go back"),
        (
            held.wanted() == was.wanted() || old.spec.scale != was.spec.scale,
            "its number is changed",
        ),
        (spec == old.record.spec.as_ref().map(of_containers), "its spec is another one"),
    ] {
        if !so {
            return Some(what.to_owned());
        }
    }
    None
}

/// The newest releases are kept, and of older ones what is in use.
fn kept(before: &View, after: &View, held: &Deployment) -> Option<String> {
    let keeps = berth_server_core::decide::kept_releases();
    let uid = &held.uid;
    let all: Vec<ReleaseNumber> = before.releases_of(uid).map(|r| r.number).collect();
    let newest: BTreeSet<&ReleaseNumber> = all.iter().rev().take(keeps).collect();
    let made_one = after.releases_of(uid).any(|release| !all.contains(&release.number));
    all.iter().find_map(|number| {
        let used = after.replicas_of(uid).any(|r| r.release == *number);
        let used = used || [held.stable(), held.release()].contains(number);
        let there = after.release(uid, *number).is_some();
        let wanted = newest.contains(number) || used;
        let wrong = if wanted { !there } else { there && made_one };
        wrong.then(|| format!("release {} is kept: {there}", number.0))
    })
}
