//! What the ledger holds, read from records and checked once.
//!
//! An object keeps the record it was read from, so that a field this build does not use is written
//! back as it came.

use berth_proto::api::{ReleaseState, ReplicaIntent, RolloutState};
use berth_proto::convert::{self, Problems};
use berth_proto::ids::{
    DeploymentUid, Digest, HostUid, Name, Namespace, ReleaseNumber, ReplicaUid, Revision, Wall,
};
use berth_proto::record;
use berth_proto::values::{DeploymentSpec, HostFacts, ResolvedSource, Scale};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why a record is no object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a stored {kind} cannot be read")]
pub struct BadRecord {
    /// What kind of object.
    pub kind: &'static str,
    /// What is wrong with it.
    #[source]
    pub problems: Problems,
}

fn bad(kind: &'static str) -> impl Fn(Problems) -> BadRecord {
    move |problems| BadRecord { kind, problems }
}

/// What operators want.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// Its uid.
    pub uid: DeploymentUid,
    /// Its name.
    pub name: Name,
    /// Its namespace.
    pub namespace: Namespace,
    /// As written by people, with defaults filled in.
    pub spec: DeploymentSpec,
    /// As stored.
    pub record: record::DeploymentRecord,
    /// Last written at.
    pub revision: Revision,
}

impl Deployment {
    /// Reads a record.
    ///
    /// # Errors
    /// When the record is out of bounds.
    pub fn new(record: record::DeploymentRecord) -> Result<Self, BadRecord> {
        let mut p = Problems::default();
        let meta = record.meta.clone().unwrap_or_default();
        let uid = p.take("uid", meta.uid.parse());
        let name = p.take("name", meta.name.parse());
        let namespace = p.take("namespace", meta.namespace.parse());
        let spec = convert::deployment_spec_from_api(&record.spec.clone().unwrap_or_default())
            .map_err(bad("deployment"))?;
        let (Some(uid), Some(name), Some(namespace)) = (uid, name, namespace) else {
            return Err(bad("deployment")(p));
        };
        Ok(Self { uid, name, namespace, spec, record, revision: Revision(0) })
    }

    /// The newest release; 0 before the first.
    #[must_use]
    pub fn release(&self) -> ReleaseNumber {
        ReleaseNumber(self.record.release)
    }

    /// The newest release whose rollout was complete; 0: none.
    #[must_use]
    pub fn stable(&self) -> ReleaseNumber {
        ReleaseNumber(self.record.stable_release)
    }

    /// Where its rollout is.
    #[must_use]
    pub fn rollout(&self) -> RolloutState {
        self.record.rollout()
    }

    /// Deletion was asked for.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.record.meta.as_ref().is_some_and(|m| m.delete_unix_ms != 0)
    }

    /// Replicas wanted now; `None` for every-host ones.
    #[must_use]
    pub fn wanted(&self) -> Option<u32> {
        (self.spec.scale != Scale::EveryHost).then_some(self.record.replicas)
    }

    /// A copy with a changed record. The spec must not be changed by `edit`.
    #[must_use]
    pub fn edited(&self, edit: impl FnOnce(&mut record::DeploymentRecord)) -> Self {
        let mut copy = self.clone();
        edit(&mut copy.record);
        copy
    }
}

/// One immutable resolution of a deployment; only its state changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    /// The deployment.
    pub deployment: DeploymentUid,
    /// The number.
    pub number: ReleaseNumber,
    /// The encoded body, verbatim.
    pub body: Arc<[u8]>,
    /// The body's digest.
    pub body_digest: Digest,
    /// Spec with defaults.
    pub spec: DeploymentSpec,
    /// Pins.
    pub source: ResolvedSource,
    /// As stored, without the body.
    pub record: record::ReleaseRecord,
    /// Last written at.
    pub revision: Revision,
}

impl Release {
    /// Reads a record.
    ///
    /// # Errors
    /// When the record is out of bounds or the body is not the digest's.
    pub fn new(mut record: record::ReleaseRecord) -> Result<Self, BadRecord> {
        let mut p = Problems::default();
        let deployment = p.take("deployment_uid", record.deployment_uid.parse());
        let body: Arc<[u8]> = std::mem::take(&mut record.body).into();
        let body_digest = Digest::of(&body);
        if body_digest.as_str() != record.body_digest {
            p.add("body", "is not what its digest says");
        }
        let spec = convert::deployment_spec_from_api(&record.spec.clone().unwrap_or_default());
        let source = convert::resolved_from_api(&record.source.clone().unwrap_or_default());
        for problems in [spec.as_ref().err(), source.as_ref().err()].into_iter().flatten() {
            p.0.extend(problems.0.iter().cloned());
        }
        let (Some(deployment), Ok(spec), Ok(source), true) =
            (deployment, spec, source, p.0.is_empty())
        else {
            return Err(bad("release")(p));
        };
        let number = ReleaseNumber(record.number);
        Ok(Self {
            deployment,
            number,
            body,
            body_digest,
            spec,
            source,
            record,
            revision: Revision(0),
        })
    }

    /// The record, with the body.
    #[must_use]
    pub fn to_record(&self) -> record::ReleaseRecord {
        record::ReleaseRecord { body: self.body.to_vec(), ..self.record.clone() }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> ReleaseState {
        self.record.state()
    }

    /// A copy in another state.
    #[must_use]
    pub fn in_state(&self, state: ReleaseState) -> Self {
        let mut copy = self.clone();
        copy.record.state = state as i32;
        copy
    }
}

/// A placement.
#[derive(Debug, Clone, PartialEq)]
pub struct Replica {
    /// Its uid.
    pub uid: ReplicaUid,
    /// The deployment.
    pub deployment: DeploymentUid,
    /// The slot.
    pub slot: u32,
    /// The release.
    pub release: ReleaseNumber,
    /// The host.
    pub host: HostUid,
    /// What is wanted.
    pub intent: ReplicaIntent,
    /// Whose place it takes on its host.
    pub replaces: Option<ReplicaUid>,
    /// It takes over from this one on a lost host.
    pub stands_in_for: Option<ReplicaUid>,
    /// When it was placed.
    pub created: Wall,
    /// When it first was ready.
    pub first_ready: Option<Wall>,
    /// The agent's next attempt is greater.
    pub attempt_floor: u32,
    /// Last exits, newest last, at most [`MAX_EXITS`].
    pub exits: Vec<berth_proto::api::Exit>,
    /// It failed for good.
    pub failed: bool,
    /// Why it failed.
    pub reason: String,
    /// The release whose replica was tried in its place, and which its host has given back: it is not
    /// tried there again.
    pub given_back: Option<ReleaseNumber>,
    /// Of an orphan: the body it was found to run, when its host said so.
    pub found_body: Option<Digest>,
    /// Of an orphan: where its deployment was and what its name was, when its host said so.
    pub found_as: Option<(Namespace, Name)>,
    /// Last written at.
    pub revision: Revision,
}

/// Exits kept of a replica: enough to see a loop.
pub const MAX_EXITS: usize = 5;

impl Replica {
    /// Reads a record.
    ///
    /// # Errors
    /// When the record is out of bounds.
    pub fn new(record: &record::ReplicaRecord) -> Result<Self, BadRecord> {
        let mut p = Problems::default();
        let optional = |p: &mut Problems, path: &str, text: &str| {
            if text.is_empty() { None } else { p.take(path, text.parse::<ReplicaUid>()) }
        };
        let uid = p.take("uid", record.uid.parse());
        let deployment = p.take("deployment_uid", record.deployment_uid.parse());
        let host = p.take("host_uid", record.host_uid.parse());
        let replaces = optional(&mut p, "replaces", &record.replaces);
        let stands_in_for = optional(&mut p, "stands_in_for", &record.stands_in_for);
        let body = &record.body_digest;
        let found_body =
            if body.is_empty() { None } else { p.take("body_digest", body.parse::<Digest>()) };
        let found_as = if record.found_deployment.is_empty() {
            None
        } else {
            let namespace = p.take("found_namespace", record.found_namespace.parse());
            namespace.zip(p.take("found_deployment", record.found_deployment.parse()))
        };
        let (Some(uid), Some(deployment), Some(host), true) =
            (uid, deployment, host, p.0.is_empty())
        else {
            return Err(bad("replica")(p));
        };
        Ok(Self {
            uid,
            deployment,
            slot: record.slot,
            release: ReleaseNumber(record.release),
            host,
            intent: record.intent(),
            replaces,
            stands_in_for,
            created: Wall(record.create_unix_ms),
            first_ready: (record.first_ready_unix_ms != 0)
                .then_some(Wall(record.first_ready_unix_ms)),
            attempt_floor: record.attempt_floor,
            exits: record.exits.clone(),
            failed: record.failed,
            reason: record.reason.clone(),
            given_back: Some(ReleaseNumber(record.given_back_release)).filter(|r| r.0 != 0),
            found_body,
            found_as,
            revision: Revision(0),
        })
    }

    /// The record.
    #[must_use]
    pub fn to_record(&self) -> record::ReplicaRecord {
        let text = |uid: &Option<ReplicaUid>| uid.as_ref().map(ToString::to_string);
        let found = |part: fn(&(Namespace, Name)) -> String| {
            self.found_as.as_ref().map(part).unwrap_or_default()
        };
        record::ReplicaRecord {
            uid: self.uid.to_string(),
            deployment_uid: self.deployment.to_string(),
            slot: self.slot,
            release: self.release.0,
            host_uid: self.host.to_string(),
            intent: self.intent as i32,
            replaces: text(&self.replaces).unwrap_or_default(),
            create_unix_ms: self.created.0,
            first_ready_unix_ms: self
                .first_ready
                .filter(|_| !bug!(ReadinessNotStored))
                .map_or(0, |w| w.0),
            attempt_floor: self.attempt_floor,
            exits: self.exits.clone(),
            stands_in_for: text(&self.stands_in_for).unwrap_or_default(),
            failed: self.failed,
            reason: self.reason.clone(),
            body_digest: self.found_body.as_ref().map(ToString::to_string).unwrap_or_default(),
            given_back_release: self.given_back.map_or(0, |release| release.0),
            found_deployment: found(|(_, name)| name.to_string()),
            found_namespace: found(|(namespace, _)| namespace.to_string()),
        }
    }

    /// It shall run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.intent == ReplicaIntent::Run
    }

    /// A copy that shall go.
    #[must_use]
    pub fn stopped(&self) -> Self {
        Self { intent: ReplicaIntent::Stop, ..self.clone() }
    }

    /// What of it stands in its host's set; two that agree here make the same set.
    #[must_use]
    pub fn set_entry(&self) -> Option<(ReleaseNumber, u32, u32, Option<&ReplicaUid>)> {
        self.runs().then_some((self.release, self.slot, self.attempt_floor, self.replaces.as_ref()))
    }
}

/// A machine with an engine and an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Its uid.
    pub uid: HostUid,
    /// Its name.
    pub name: Name,
    /// All its labels: built-in, the agent's, the token's, the operator's; the later win.
    pub labels: BTreeMap<String, String>,
    /// What its agent reported last.
    pub facts: HostFacts,
    /// As stored.
    pub record: record::HostRecord,
    /// Last written at.
    pub revision: Revision,
}

impl Host {
    /// Reads a record.
    ///
    /// # Errors
    /// When the record is out of bounds.
    pub fn new(record: record::HostRecord) -> Result<Self, BadRecord> {
        let mut p = Problems::default();
        let meta = record.meta.clone().unwrap_or_default();
        let uid = p.take("uid", meta.uid.parse());
        let name = p.take("name", meta.name.parse::<Name>());
        let (Some(uid), Some(name)) = (uid, name) else { return Err(bad("host")(p)) };
        let facts = convert::host_facts_from_api(&record.facts.clone().unwrap_or_default());
        let mut labels = facts.labels.clone();
        labels.extend(record.token_labels.clone());
        labels.extend(meta.labels);
        // Nobody can relabel what a host is.
        labels.insert("arch".to_owned(), facts.arch.clone());
        labels.insert("os".to_owned(), facts.os.clone());
        labels.insert("host".to_owned(), name.to_string());
        Ok(Self { uid, name, labels, facts, record, revision: Revision(0) })
    }

    /// Nothing new is placed here.
    #[must_use]
    pub fn is_cordoned(&self) -> bool {
        self.record.spec.as_ref().is_some_and(|s| s.cordoned || s.draining)
    }

    /// What is here moves away.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.record.spec.as_ref().is_some_and(|s| s.draining)
    }

    /// It was removed; what is left is a tombstone.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.record.removed
    }

    /// A copy with a changed record.
    ///
    /// # Errors
    /// When the edit puts it out of bounds.
    pub fn edited(&self, edit: impl FnOnce(&mut record::HostRecord)) -> Result<Self, BadRecord> {
        let mut record = self.record.clone();
        edit(&mut record);
        Self::new(record)
    }
}
