//! What people ask for, as changes.
//!
//! Pure decisions behind the API's writes: each reads a view and answers with a proposal (what must
//! still hold and what to change) or with a refusal in words.

use crate::batching::{Precondition, Proposal};
use crate::change::Change;
use crate::objects::{BadRecord, Deployment, Release};
use crate::release::{self, Draft};
use crate::view::{ObjectKey, View};
use berth_proto::api::{self, ApplyAction, EventSeverity, ReleaseState, RolloutState};
use berth_proto::convert::timestamp;
use berth_proto::ids::{DeploymentUid, Name, Namespace, ReleaseNumber, Revision, Wall};
use berth_proto::record::{DeploymentRecord, Meta};
use berth_proto::values::{ResolvedSource, Scale};
use berth_proto::words::counted;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Releases kept of a deployment besides those in use: enough to undo a bad week.
pub const KEPT_RELEASES: usize = 10;

/// Why something cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is being deleted.
    #[error("deployment \"{0}\" is being deleted; wait until it is gone")]
    Deleting(Name),
    /// Every-host deployments have no number.
    #[error("deployment \"{0}\" runs on every host that fits; it has no number of replicas")]
    EveryHost(Name),
    /// There is nothing to go back to.
    #[error("deployment \"{0}\" has no earlier release to go back to")]
    NoEarlierRelease(Name),
    /// There is no such release.
    #[error("deployment \"{deployment}\" has no release {release}")]
    NoRelease {
        /// Whose.
        deployment: Name,
        /// Which.
        release: ReleaseNumber,
    },
    /// What was made of it is out of bounds.
    #[error(transparent)]
    Bad(#[from] BadRecord),
}

/// Who asks, and when.
#[derive(Debug, Clone)]
pub struct Asked<'a> {
    /// `user/<name>`.
    pub actor: &'a str,
    /// When.
    pub now: Wall,
}

/// A deployment as people write it.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its name.
    pub name: Name,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// As written.
    pub spec: api::DeploymentSpec,
    /// What the source is now.
    pub resolved: ResolvedSource,
    /// The same in words.
    pub resolved_words: String,
}

/// What a write does.
#[derive(Debug, Clone)]
pub struct Decision {
    /// What must hold and what to change.
    pub proposal: Proposal,
    /// In one word.
    pub action: ApplyAction,
    /// The deployment afterwards.
    pub deployment: Arc<Deployment>,
}

/// Something that happened to a deployment, for people.
#[must_use]
pub fn event(
    deployment: &Deployment,
    asked: &Asked<'_>,
    severity: EventSeverity,
    reason: &str,
    message: String,
) -> Change {
    Change::AppendEvent(api::Event {
        sequence: 0,
        time: Some(timestamp(asked.now)),
        severity: severity as i32,
        kind: "deployment".to_owned(),
        name: deployment.name.to_string(),
        namespace: deployment.namespace.to_string(),
        uid: deployment.uid.to_string(),
        reason: reason.to_owned(),
        message,
        actor: asked.actor.to_owned(),
        host: String::new(),
        deployment: deployment.name.to_string(),
    })
}

/// How many are kept in this run: fewer where all bounds are small.
#[must_use]
pub fn kept_releases() -> usize {
    bound!(KEPT_RELEASES, 2)
}

fn newest(view: &View, uid: &DeploymentUid) -> ReleaseNumber {
    view.releases_of(uid).last().map(|r| r.number).unwrap_or_default()
}

/// The number of the next release. A number that an orphan has was given before a restore, and is not
/// given again.
fn next_number(view: &View, uid: &DeploymentUid) -> ReleaseNumber {
    let seen = view.replicas_of(uid).map(|r| r.release).max().unwrap_or_default();
    newest(view, uid).max(seen).next()
}

/// Releases beyond the kept ones that nothing uses.
fn forget_old(view: &View, deployment: &Deployment) -> Vec<Change> {
    let used: Vec<ReleaseNumber> = view.replicas_of(&deployment.uid).map(|r| r.release).collect();
    let all: Vec<ReleaseNumber> = view.releases_of(&deployment.uid).map(|r| r.number).collect();
    let keep_from = all.len().saturating_sub(kept_releases());
    all[..keep_from]
        .iter()
        .filter(|n| !used.contains(n) && **n != deployment.stable() && **n != deployment.release())
        .map(|n| Change::DeleteRelease(deployment.uid.clone(), *n))
        .collect()
}

/// Takes a new release: the record's fields that go with it, and the release itself.
fn take_release(
    view: &View,
    record: DeploymentRecord,
    source: ResolvedSource,
    cause: &str,
    copied_from: ReleaseNumber,
    asked: &Asked<'_>,
) -> Result<(Arc<Deployment>, Vec<Change>), Refused> {
    let mut deployment = Deployment::new(record)?;
    let before = deployment.release();
    let number = next_number(view, &deployment.uid);
    let draft = Draft {
        deployment: &deployment,
        number,
        source,
        actor: asked.actor,
        cause,
        now: asked.now,
        copied_from,
    };
    let release = release::draft(&draft)?;
    deployment.record.release = number.0;
    deployment.record.rollout = RolloutState::Rolling as i32;
    written(&mut deployment.record, asked.now);
    deployment.record.rollout_unix_ms = asked.now.0;
    deployment.record.progress_left_ms = 0;
    deployment.record.reason.clear();
    let deployment = Arc::new(deployment);
    let mut changes = vec![Change::PutDeployment(Arc::clone(&deployment))];
    if let Some(old) = view.release(&deployment.uid, before)
        && old.state() == ReleaseState::Rolling
    {
        changes.push(Change::PutRelease(Arc::new(old.in_state(ReleaseState::Superseded))));
    }
    changes.push(Change::PutRelease(Arc::new(release)));
    changes.extend(forget_old(view, &deployment));
    changes.push(event(
        &deployment,
        asked,
        EventSeverity::Info,
        "RELEASE_CREATED",
        format!("release {number} ({cause}): {}", deployment.record.resolved),
    ));
    Ok((deployment, changes))
}

/// Makes or changes a deployment. `new_uid` is used when it is new.
///
/// # Errors
/// When it cannot be.
pub fn apply(
    view: &View,
    wanted: &Wanted,
    new_uid: DeploymentUid,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    let existing = view.deployment_by_name(&wanted.namespace, &wanted.name);
    let key = ObjectKey::DeploymentName(wanted.namespace.clone(), wanted.name.clone());
    let at = existing.map(|d| d.revision).unwrap_or_default();
    let preconditions = vec![Precondition::At(key, at)];
    let Some(existing) = existing else {
        let record = DeploymentRecord {
            meta: Some(Meta {
                uid: new_uid.to_string(),
                name: wanted.name.to_string(),
                namespace: wanted.namespace.to_string(),
                labels: wanted.labels.clone(),
                create_unix_ms: asked.now.0,
                update_unix_ms: asked.now.0,
                delete_unix_ms: 0,
            }),
            spec: Some(wanted.spec.clone()),
            replicas: wanted.spec.replicas.unwrap_or(1),
            resolved: wanted.resolved_words.clone(),
            ..DeploymentRecord::default()
        };
        let (deployment, changes) =
            take_release(view, record, wanted.resolved.clone(), "apply", ReleaseNumber(0), asked)?;
        let proposal = Proposal { preconditions, changes };
        return Ok(Decision { proposal, action: ApplyAction::Created, deployment });
    };
    if existing.is_deleted() {
        return Err(Refused::Deleting(existing.name.clone()));
    }
    let mut record = existing.record.clone();
    record.spec = Some(wanted.spec.clone());
    if let Some(replicas) = wanted.spec.replicas {
        let least = if bug!(NeverFewer) { record.replicas } else { 0 };
        record.replicas = replicas.max(least);
    }
    if let Some(meta) = &mut record.meta {
        meta.labels.clone_from(&wanted.labels);
        meta.update_unix_ms = asked.now.0;
    }
    record.resolved.clone_from(&wanted.resolved_words);
    let next = Deployment::new(record.clone())?;
    let number = newest(view, &existing.uid);
    let newest = view.release(&existing.uid, number);
    // A rollout that was undone has led back to what is written: that is what counts then.
    let own = view
        .release(&existing.uid, existing.release())
        .filter(|own| own.number != number && !release::needs_release(&own.spec, &existing.spec));
    let resolved_changed = own.or(newest).is_none_or(|r| {
        r.source != wanted.resolved
            && !(bug!(NewModelKept) && r.source.image == wanted.resolved.image)
    });
    // Its newest release has failed, and it is on its way back or back: this is another try.
    let went_back = existing.rollout() == RolloutState::RolledBack || existing.release() != number;
    let stuck = existing.rollout() == RolloutState::Paused || (went_back && own.is_none());
    let kind_changed =
        (existing.spec.scale == Scale::EveryHost) != (next.spec.scale == Scale::EveryHost);
    if resolved_changed
        || stuck
        || kind_changed
        || release::needs_release(&existing.spec, &next.spec)
    {
        let (deployment, changes) =
            take_release(view, record, wanted.resolved.clone(), "apply", ReleaseNumber(0), asked)?;
        let proposal = Proposal { preconditions, changes };
        return Ok(Decision { proposal, action: ApplyAction::Changed, deployment });
    }
    let same = {
        // Going back leaves a spec with everything filled in: what is written counts, not how.
        let strip = |deployment: &Deployment| {
            let mut record = deployment.record.clone();
            if let Some(meta) = &mut record.meta {
                meta.update_unix_ms = 0;
            }
            record.spec = Some(release::filled_in(&deployment.spec));
            record
        };
        strip(existing) == strip(&next)
    };
    if same {
        let proposal = Proposal { preconditions, changes: Vec::new() };
        let deployment = Arc::clone(existing);
        return Ok(Decision { proposal, action: ApplyAction::Unchanged, deployment });
    }
    let deployment = Arc::new(next);
    let changes = vec![
        Change::PutDeployment(Arc::clone(&deployment)),
        event(
            &deployment,
            asked,
            EventSeverity::Info,
            "DEPLOYMENT_ADJUSTED",
            "number, placement or bounds changed; nothing that runs does".to_owned(),
        ),
    ];
    let proposal = Proposal { preconditions, changes };
    Ok(Decision { proposal, action: ApplyAction::Adjusted, deployment })
}

/// Notes when what is wanted was written.
fn written(record: &mut DeploymentRecord, now: Wall) {
    if let Some(meta) = &mut record.meta {
        meta.update_unix_ms = now.0;
    }
}

fn still(deployment: &Deployment) -> Vec<Precondition> {
    let key = ObjectKey::Deployment(deployment.uid.clone());
    vec![Precondition::At(key, deployment.revision)]
}

/// Sets the number of replicas.
///
/// # Errors
/// For every-host deployments, and while it is being deleted.
pub fn scale(
    deployment: &Deployment,
    replicas: u32,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    if deployment.is_deleted() {
        return Err(Refused::Deleting(deployment.name.clone()));
    }
    let Some(before) = deployment.wanted() else {
        return Err(Refused::EveryHost(deployment.name.clone()));
    };
    let mut record = deployment.record.clone();
    record.replicas = replicas;
    // What people wrote keeps its meaning: a number written is the number now.
    if let Some(spec) = &mut record.spec
        && spec.replicas.is_some()
    {
        spec.replicas = Some(replicas);
    }
    if before != replicas {
        written(&mut record, asked.now);
    }
    let next = Arc::new(Deployment::new(record)?);
    let changes = if before == replicas {
        Vec::new()
    } else {
        vec![
            Change::PutDeployment(Arc::clone(&next)),
            event(
                &next,
                asked,
                EventSeverity::Info,
                "DEPLOYMENT_SCALED",
                format!("from {before} to {}", counted(replicas, "replica")),
            ),
        ]
    };
    let proposal = Proposal { preconditions: still(deployment), changes };
    Ok(Decision { proposal, action: ApplyAction::Adjusted, deployment: next })
}

/// Makes a release equal to the wanted one.
///
/// # Errors
/// While it is being deleted.
pub fn restart(
    view: &View,
    deployment: &Deployment,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    repeat(view, deployment, deployment.release(), "restart", asked)
}

/// Makes a release with the spec of an earlier one; 0: the newest complete one before the present. From a
/// rollout that is not complete it goes back to the release that served before itself, as a rollout that
/// fails does: what still runs of it is then what is wanted, and nothing good is started again.
///
/// # Errors
/// When there is none.
pub fn undo(
    view: &View,
    deployment: &Deployment,
    to: ReleaseNumber,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    let to = if to == ReleaseNumber(0) {
        view.releases_of(&deployment.uid)
            .filter(|r| r.number < deployment.release())
            .filter(|r| r.state() == ReleaseState::Complete || bug!(UndoneToAny))
            .map(|r| r.number)
            .last()
            .ok_or_else(|| Refused::NoEarlierRelease(deployment.name.clone()))?
    } else {
        to
    };
    let unfinished = match deployment.rollout() {
        RolloutState::Rolling | RolloutState::Paused | RolloutState::Failed => true,
        RolloutState::Unspecified
        | RolloutState::Complete
        | RolloutState::RolledBack
        | RolloutState::Deleting => false,
    };
    if unfinished
        && to == deployment.stable()
        && to < deployment.release()
        && let Some(stable) = view.release(&deployment.uid, to)
    {
        return give_up(view, deployment, stable, asked);
    }
    repeat(view, deployment, to, &format!("undo to release {to}"), asked)
}

/// Goes back to the stable release from a rollout that is under way, or stands still.
fn give_up(
    view: &View,
    deployment: &Deployment,
    stable: &Release,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    let (given_up, number) = (deployment.release(), stable.number);
    let mut record = back_to(deployment, stable);
    record.release = number.0;
    record.rollout = RolloutState::Rolling as i32;
    record.rollout_unix_ms = asked.now.0;
    record.progress_left_ms = 0;
    let reason = format!("release {given_up} was undone; back to release {number}");
    record.reason.clone_from(&reason);
    written(&mut record, asked.now);
    let next = Arc::new(Deployment::new(record)?);
    let mut changes = vec![Change::PutDeployment(Arc::clone(&next))];
    if let Some(old) = view.release(&deployment.uid, given_up)
        && old.state() == ReleaseState::Rolling
    {
        changes.push(Change::PutRelease(Arc::new(old.in_state(ReleaseState::Superseded))));
    }
    changes.push(event(&next, asked, EventSeverity::Info, "ROLLOUT_UNDONE", reason));
    let proposal = Proposal { preconditions: still(deployment), changes };
    Ok(Decision { proposal, action: ApplyAction::Changed, deployment: next })
}

/// A deployment with the spec of an earlier release; the number of replicas stays as it is now.
fn back_to(deployment: &Deployment, release: &Release) -> DeploymentRecord {
    let mut record = deployment.record.clone();
    let mut spec = release.record.spec.clone().unwrap_or_default();
    // One that runs on every host has no number.
    spec.replicas = record.spec.as_ref().and_then(|s| s.replicas).filter(|_| !spec.every_host);
    record.spec = Some(spec);
    record.resolved = release::source_words(release);
    record
}

fn repeat(
    view: &View,
    deployment: &Deployment,
    number: ReleaseNumber,
    cause: &str,
    asked: &Asked<'_>,
) -> Result<Decision, Refused> {
    if deployment.is_deleted() {
        return Err(Refused::Deleting(deployment.name.clone()));
    }
    let Some(release) = view.release(&deployment.uid, number) else {
        return Err(Refused::NoRelease { deployment: deployment.name.clone(), release: number });
    };
    // After a rollback the deployment still says what the failed release was to be.
    let rolled_back = deployment.release() != newest(view, &deployment.uid);
    let record = if number != deployment.release() || rolled_back {
        back_to(deployment, release)
    } else {
        deployment.record.clone()
    };
    let (deployment_next, changes) =
        take_release(view, record, release.source.clone(), cause, number, asked)?;
    let proposal = Proposal { preconditions: still(deployment), changes };
    Ok(Decision { proposal, action: ApplyAction::Changed, deployment: deployment_next })
}

/// Marks a deployment for deletion.
///
/// # Errors
/// Never for now; deletion asked twice is no error.
pub fn delete(deployment: &Deployment, asked: &Asked<'_>) -> Result<Decision, Refused> {
    if deployment.is_deleted() {
        let proposal = Proposal { preconditions: Vec::new(), changes: Vec::new() };
        let deployment = Arc::new(deployment.clone());
        return Ok(Decision { proposal, action: ApplyAction::Unchanged, deployment });
    }
    let mut record = deployment.record.clone();
    if let Some(meta) = &mut record.meta {
        meta.delete_unix_ms = asked.now.0.max(1);
        meta.update_unix_ms = asked.now.0;
    }
    record.rollout = RolloutState::Deleting as i32;
    let next = Arc::new(Deployment::new(record)?);
    let changes = vec![
        Change::PutDeployment(Arc::clone(&next)),
        event(
            &next,
            asked,
            EventSeverity::Info,
            "DEPLOYMENT_DELETING",
            "its replicas are being stopped".to_owned(),
        ),
    ];
    let proposal = Proposal { preconditions: still(deployment), changes };
    Ok(Decision { proposal, action: ApplyAction::Changed, deployment: next })
}

/// A caller's expected revision as a precondition on a deployment.
#[must_use]
pub fn expected(namespace: &Namespace, name: &Name, revision: u64) -> Precondition {
    let key = ObjectKey::DeploymentName(namespace.clone(), name.clone());
    Precondition::At(key, Revision(revision))
}
