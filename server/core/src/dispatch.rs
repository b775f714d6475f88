//! A host's set, from the view.
//!
//! The same view gives the same set, byte for byte: entries in order of uid, bodies as stored. An
//! agent refuses the number it holds with another content, so nothing that is not in
//! [`crate::objects::Replica::set_entry`] (whose change raises the generation) may be in here.

use crate::change::{Change, Subject};
use crate::session::{Hold, HostSet};
use crate::view::View;
use berth_proto::agent::{Replaces, SetEntry};
use berth_proto::ids::{HostUid, SetNumber};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long a replacement gets to be ready before its predecessor is brought back: the start-up grace
/// of its health check, and as long again as it must stay ready, and never less than this.
const READY_WITHIN_MIN_MS: u64 = 30_000;

/// The set of a host, or why it gets none; `None`: there is no such host, or it was removed. A removed
/// one must not take the emptiness of its assignments for an order: without a wipe it stops nothing.
#[must_use]
pub fn host_set(view: &View, host: &HostUid) -> Option<Result<HostSet, Hold>> {
    let record = &view.host(host).filter(|held| !held.is_removed())?.record;
    if record.waiting_for_approval {
        return Some(Err(Hold::WaitingForApproval));
    }
    if record.quarantined {
        return Some(Err(Hold::Quarantined));
    }
    if view.is_held_back(host) {
        return Some(Err(Hold::Observing));
    }
    let mut entries = Vec::new();
    let mut bodies = BTreeMap::new();
    let named = |r: &&Arc<crate::objects::Replica>| {
        let stop = r.intent == berth_proto::api::ReplicaIntent::Stop;
        r.runs() || (bug!(StoppedStaysInSet) && stop)
    };
    for replica in view.replicas_on(host).filter(named) {
        let Some(release) = view.release(&replica.deployment, replica.release) else { continue };
        bodies.insert(release.body_digest.clone(), Arc::clone(&release.body));
        let within = release
            .spec
            .health
            .as_ref()
            .map_or(0, |h| if bug!(StartUpForgotten) { 0 } else { h.startup_ms })
            + release.spec.rollout.ready_for_ms;
        entries.push(SetEntry {
            replica_uid: replica.uid.to_string(),
            body_digest: release.body_digest.to_string(),
            deployment_uid: replica.deployment.to_string(),
            release: replica.release.0,
            slot: replica.slot,
            attempt_floor: replica.attempt_floor,
            replaces: replica.replaces.as_ref().filter(|_| !bug!(SuccessorBeside)).map(|old| {
                Replaces {
                    replica_uid: old.to_string(),
                    ready_within_ms: within.max(READY_WITHIN_MIN_MS),
                }
            }),
        });
    }
    let number = SetNumber { epoch: view.epoch(), generation: view.generation(host) };
    Some(Ok(HostSet::new(number, entries, bodies)))
}

/// Whose sets what was written may have changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    /// These hosts'.
    pub hosts: BTreeSet<HostUid>,
    /// Everybody's.
    pub all: bool,
}

impl Touched {
    /// Something was written.
    pub fn by(&mut self, change: &Change) {
        match change.subject() {
            Subject::Host(host) | Subject::HostSet(host) => {
                self.hosts.insert(host.clone());
            }
            Subject::Cluster => self.all = true,
            Subject::Deployment(_)
            | Subject::Release(_)
            | Subject::Replica(_)
            | Subject::Models
            | Subject::Access
            | Subject::Past => {}
        }
    }

    /// The hosts whose sets are to be worked out anew.
    #[must_use]
    pub fn hosts(mut self, view: &View) -> BTreeSet<HostUid> {
        if self.all {
            self.hosts.extend(view.hosts().map(|h| h.uid.clone()));
        }
        self.hosts
    }
}

/// A host's newest set, or why it gets none; `None`: there is no such host.
pub type Newest = Option<Result<Arc<HostSet>, Hold>>;

/// Whether sessions are to be told of a newer one.
#[must_use]
pub fn is_news(held: &Newest, newest: &Newest) -> bool {
    let number =
        |n: &Newest| n.as_ref().map(|n| n.as_ref().map(|set| set.number).map_err(|hold| *hold));
    number(held) != number(newest)
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
