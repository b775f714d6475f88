//! A host's set, from the view.
//!
//! The same view gives the same set, byte for byte: entries in order of uid, bodies as stored. An
//! agent refuses the number it holds with another content, so nothing that is not in
//! [`crate::objects::Replica::set_entry`] (whose change raises the generation) may be in here.

use crate::session::{Hold, HostSet};
use crate::view::View;
use berth_proto::agent::{Replaces, SetEntry};
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{HostUid, SetNumber};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long a replacement gets to be ready before its predecessor is brought back: the start-up grace
/// of its health check, and as long again as it must stay ready, bounded by these.
const READY_WITHIN_MIN_MS: u64 = 30_000;

/// The set of a host, or why it gets none; `None`: there is no such host.
#[must_use]
pub fn host_set(view: &View, host: &HostUid) -> Option<Result<HostSet, Hold>> {
    let record = &view.host(host)?.record;
    if record.waiting_for_approval {
        return Some(Err(Hold::WaitingForApproval));
    }
    if record.quarantined {
        return Some(Err(Hold::Quarantined));
    }
    if view.cluster.observing && view.replicas_on(host).any(|r| r.intent == ReplicaIntent::Orphan) {
        return Some(Err(Hold::Observing));
    }
    let mut entries = Vec::new();
    let mut bodies = BTreeMap::new();
    for replica in view.replicas_on(host).filter(|r| r.runs()) {
        let Some(release) = view.release(&replica.deployment, replica.release) else { continue };
        bodies.insert(release.body_digest.clone(), Arc::clone(&release.body));
        let within = release.spec.health.as_ref().map_or(0, |h| h.startup_ms)
            + release.spec.rollout.ready_for_ms;
        entries.push(SetEntry {
            replica_uid: replica.uid.to_string(),
            body_digest: release.body_digest.to_string(),
            deployment_uid: replica.deployment.to_string(),
            release: replica.release.0,
            slot: replica.slot,
            attempt_floor: replica.attempt_floor,
            replaces: replica.replaces.as_ref().map(|old| Replaces {
                replica_uid: old.to_string(),
                ready_within_ms: within.max(READY_WITHIN_MIN_MS),
            }),
        });
    }
    let number = SetNumber { epoch: view.epoch(), generation: view.generation(host) };
    Some(Ok(HostSet::new(number, entries, bodies)))
}
