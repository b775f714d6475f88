//! What of an agent's words is kept: durable or only live, decided field by field.
//!
//! Durable are exits, the first readiness of each replica, what a first look after a restore found,
//! facts, and that a replica is gone. Readiness, progress and presence are only live. Nothing here
//! writes: it says what is to be written, for the view it was asked about, and [`seen`] makes that
//! hold only as long as the view does.

use crate::batching::{Precondition, Proposal};
use crate::change::{Change, audited};
use crate::live::{Live, Presence};
use crate::objects::{Host, MAX_EXITS, Replica};
use crate::orphans;
use crate::session::Registration;
use crate::status::wrote;
use crate::view::{ObjectKey, View};
use berth_proto::agent::ReplicaReport;
use berth_proto::api::{self, EventSeverity, ReplicaIntent};
use berth_proto::convert;
use berth_proto::ids::{HostUid, Mono, Now, SetNumber, Wall};
use berth_proto::record::AuditRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Most characters of an agent's words that are stored with a replica: four of them fit into one write.
const MAX_REASON_CHARS: usize = 300;

/// Replicas of which a host has nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Absent<'a> {
    /// Which.
    pub uids: &'a [String],
    /// The set that it had acknowledged when it said so.
    pub held: Option<SetNumber>,
}

/// What of a host's statuses must be durable. Replicas of other hosts are passed over.
#[must_use]
pub fn statuses(
    view: &View,
    host: &HostUid,
    reports: &[ReplicaReport],
    absent: Absent<'_>,
    now: Wall,
) -> Vec<Change> {
    let mut changes = Vec::new();
    for report in reports {
        let Ok(uid) = report.replica_uid.parse() else { continue };
        let Some(replica) = view.replica(&uid).filter(|r| r.host == *host) else { continue };
        let status = report.status.clone().unwrap_or_default();
        let mut next = Replica::clone(replica);
        if let Some(mut exit) = status.last_exit
            && next.exits.iter().all(|known| known.attempt < exit.attempt)
        {
            exit.last_line = convert::last_line(&exit.last_line);
            let extra = (next.exits.len() + 1).saturating_sub(MAX_EXITS);
            next.exits.drain(..extra);
            let why = if exit.out_of_memory { " for lack of memory" } else { "" };
            // A program that is told to stop ends with whatever code it likes.
            let (severity, planned) = match replica.intent {
                ReplicaIntent::Stop => (EventSeverity::Info, ": it was to be stopped"),
                ReplicaIntent::Run | ReplicaIntent::Orphan | ReplicaIntent::Unspecified => {
                    (EventSeverity::Warning, "")
                }
            };
            let (attempt, code, wrote) = (exit.attempt, exit.code, wrote(&exit));
            let words = format!("attempt {attempt} ended with code {code}{why}{planned}{wrote}");
            next.exits.push(exit);
            changes.push(replica_event(view, replica, severity, "REPLICA_EXITED", words, now));
        }
        if status.ready && next.first_ready.is_none() {
            next.first_ready = Some(now);
            let words = format!("slot {} of release {} is ready", replica.slot, replica.release);
            let severity = EventSeverity::Info;
            changes.push(replica_event(view, replica, severity, "REPLICA_READY", words, now));
        }
        if status.reason == "REPLACEMENT_FAILED" && !next.failed {
            next.failed = true;
            next.reason = status.message.chars().take(MAX_REASON_CHARS).collect();
        }
        if next != **replica {
            changes.push(Change::PutReplica(Arc::new(next)));
        }
    }
    // An earlier set may have named it, so that it is made again before the newest one is taken: then its
    // end is known with that set's acknowledgement (`never_there`), or when it is gone once more.
    let newest = SetNumber { epoch: view.epoch(), generation: view.generation(host) };
    let is_final = absent.held == Some(newest);
    for uid in absent.uids {
        let Ok(uid) = uid.parse() else { continue };
        if let Some(replica) = view.replica(&uid)
            && replica.host == *host
            && is_forgotten(replica)
            && (is_final || replica.intent == ReplicaIntent::Orphan)
        {
            changes.push(Change::DeleteReplica(uid));
        }
    }
    changes
}

/// Once it is gone from its host, nothing wants it any more.
fn is_forgotten(replica: &Replica) -> bool {
    match replica.intent {
        ReplicaIntent::Stop | ReplicaIntent::Orphan => true,
        ReplicaIntent::Run | ReplicaIntent::Unspecified => bug!(WantedForgotten),
    }
}

/// What of a hello must be durable, before the host counts as present.
#[must_use]
pub fn registration(view: &View, host: &HostUid, said: &Registration, now: Wall) -> Vec<Change> {
    if view.host(host).is_none_or(|h| h.is_removed()) {
        // Removed while it said hello: what it runs is nobody's any more.
        return Vec::new();
    }
    let mut changes = statuses(view, host, &said.observed, Absent::default(), now);
    // An agent that has not seen its engine knows only what its disk tells; one with no set has lost it.
    if said.engine_observed || said.held.is_none() {
        raise_floors(view, host, &said.observed, &mut changes);
    }
    let seen = said.engine_observed || bug!(UnseenIsGone);
    if seen && !bug!(GoneStayInLedger) {
        // Complete means that what is not in it is not there.
        let observed = uids(&said.observed);
        let gone = view
            .replicas_on(host)
            .filter(|r| is_forgotten(r) && !observed.contains(r.uid.as_str()));
        changes.extend(gone.map(|r| Change::DeleteReplica(r.uid.clone())));
    }
    let first_look = said.engine_observed && view.is_unobserved(host);
    // Not on the first look alone: a disk may have been cloned before the restore, and each copy runs what
    // the other one does not.
    if said.engine_observed && view.cluster.observing {
        changes.extend(orphans::found(view, host, &said.observed, now));
    }
    // Last: the host counts as observed when all of its orphans are kept.
    let seen = first_look.then_some(view.cluster.epoch);
    // What it holds of roots was told when it took them, and that may not have been kept.
    changes.extend(host_change(view, host, said.facts.as_ref(), seen, said.trust_version));
    changes
}

/// The attempts of an agent that has forgotten those it made, as one that joins again with an empty
/// disk, go on where they had ended: else its next exits would be taken for ones known long since. A
/// floor is raised here alone, because each raise makes another set of the host.
fn raise_floors(
    view: &View,
    host: &HostUid,
    observed: &[ReplicaReport],
    changes: &mut Vec<Change>,
) {
    let said: BTreeMap<&str, u32> = observed
        .iter()
        .map(|r| (r.replica_uid.as_str(), r.status.as_ref().map_or(0, |s| s.attempt)))
        .collect();
    for replica in view.replicas_on(host).filter(|r| r.runs()) {
        let known = replica.exits.iter().map(|exit| exit.attempt).max().unwrap_or(0);
        let reported = said.get(replica.uid.as_str()).copied().unwrap_or(0);
        if known <= reported.max(replica.attempt_floor) {
            continue;
        }
        let written = changes.iter_mut().find_map(|change| {
            if let Change::PutReplica(next) = change { Some(next) } else { None }
                .filter(|next| next.uid == replica.uid)
        });
        match written {
            Some(next) => Arc::make_mut(next).attempt_floor = known,
            None => changes.push(Change::PutReplica(Arc::new(Replica {
                attempt_floor: known,
                ..Replica::clone(replica)
            }))),
        }
    }
}

/// Replicas to be stopped that never got to their host: it holds the set that lacks them, and has
/// nothing of them (`known` is all it may have something of). Nobody else would ever say that they are
/// gone: they were placed and given up while another set was on its way, or the set that had them could
/// not be made durable.
#[must_use]
pub fn never_there(
    view: &View,
    host: &HostUid,
    number: SetNumber,
    known: &BTreeSet<String>,
) -> Vec<Change> {
    let newest = (view.epoch(), view.generation(host)) == (number.epoch, number.generation);
    if !newest || bug!(NeverThereStays) {
        // A newer set is on its way, and is acknowledged in its turn.
        return Vec::new();
    }
    view.replicas_on(host)
        .filter(|r| r.intent == ReplicaIntent::Stop && !known.contains(r.uid.as_str()))
        .map(|r| Change::DeleteReplica(r.uid.clone()))
        .collect()
}

fn uids(reports: &[ReplicaReport]) -> BTreeSet<&str> {
    reports.iter().map(|r| r.replica_uid.as_str()).collect()
}

/// Facts as stored, when they differ in more than what changes all the time.
#[must_use]
pub fn facts(view: &View, host: &HostUid, facts: &api::HostFacts) -> Option<Change> {
    host_change(view, host, Some(facts), None, 0)
}

/// The host with newer facts and roots, and observed in this epoch, where that changes something.
fn host_change(
    view: &View,
    host: &HostUid,
    facts: Option<&api::HostFacts>,
    observed_epoch: Option<u64>,
    trust_version: u64,
) -> Option<Change> {
    let held = view.host(host)?;
    let calm = |f: &api::HostFacts| api::HostFacts { disk_free_bytes: 0, ..f.clone() };
    let known = held.record.facts.as_ref().map(calm);
    let newer = facts.filter(|facts| known != Some(calm(facts)));
    let roots = held.record.trust_version < trust_version;
    if newer.is_none() && observed_epoch.is_none() && !roots {
        return None;
    }
    let next = held.edited(|record| {
        if let Some(facts) = newer {
            record.facts = Some(facts.clone());
        }
        record.observed_epoch = observed_epoch.unwrap_or(record.observed_epoch);
        record.trust_version = record.trust_version.max(trust_version);
    });
    Some(Change::PutHost(Arc::new(next.ok()?)))
}

/// Roots and endpoints of this number are durable at the host's agent.
#[must_use]
pub fn trusts(view: &View, host: &HostUid, version: u64) -> Option<Change> {
    let held = view.host(host).filter(|held| held.record.trust_version < version)?;
    let next = held.edited(|record| record.trust_version = version).ok()?;
    Some(Change::PutHost(Arc::new(next)))
}

/// A host whose identity is used twice, as `why` says: it keeps what it runs and gets no new sets.
#[must_use]
pub fn quarantine(view: &View, host: &HostUid, why: &str, now: Wall) -> Vec<Change> {
    let held = view.host(host).filter(|held| !held.is_removed() && !held.record.quarantined);
    let Some(held) = held else { return Vec::new() };
    let Ok(quarantined) = held.edited(|record| record.quarantined = true) else {
        return Vec::new();
    };
    let words = format!("{why}; what runs is kept, no new sets are sent");
    let event = host_event(held, EventSeverity::Error, "HOST_QUARANTINED", words, now);
    let audit = Change::AppendAudit(AuditRecord {
        time: Some(convert::timestamp(now)),
        actor: "server".to_owned(),
        method: "quarantine".to_owned(),
        objects: vec![audited("host", None, held.name.as_str(), held.uid.as_str())],
        ..AuditRecord::default()
    });
    vec![Change::PutHost(Arc::new(quarantined)), event, audit]
}

/// A proposal of what was found from `view`: each object must still be as it was there, so that
/// neither an operator's nor the planner's write is undone by it.
#[must_use]
pub fn seen(view: &View, changes: &[Change]) -> Proposal {
    let preconditions = changes.iter().filter_map(|change| as_seen(view, change)).collect();
    Proposal { preconditions, changes: changes.to_vec() }
}

fn as_seen(view: &View, change: &Change) -> Option<Precondition> {
    let key = if let Change::PutHost(host) = change {
        ObjectKey::Host(host.uid.clone())
    } else {
        ObjectKey::Replica(change.replica()?.clone())
    };
    let at = view.revision_of(&key);
    Some(Precondition::At(key, at))
}

/// An event about a host.
#[must_use]
pub fn host_event(
    host: &Host,
    severity: EventSeverity,
    reason: &str,
    message: String,
    now: Wall,
) -> Change {
    Change::AppendEvent(api::Event {
        sequence: 0,
        time: Some(convert::timestamp(now)),
        severity: severity as i32,
        kind: "host".to_owned(),
        name: host.name.to_string(),
        namespace: String::new(),
        uid: host.uid.to_string(),
        reason: reason.to_owned(),
        message,
        actor: "server".to_owned(),
        host: host.name.to_string(),
        deployment: String::new(),
    })
}

fn replica_event(
    view: &View,
    replica: &Replica,
    severity: EventSeverity,
    reason: &str,
    message: String,
    now: Wall,
) -> Change {
    let deployment = view.deployment(&replica.deployment);
    let name = deployment.map(|d| d.name.to_string()).unwrap_or_default();
    Change::AppendEvent(api::Event {
        sequence: 0,
        time: Some(convert::timestamp(now)),
        severity: severity as i32,
        kind: "replica".to_owned(),
        name: format!("{name}/{}", replica.slot),
        namespace: deployment.map(|d| d.namespace.to_string()).unwrap_or_default(),
        uid: replica.uid.to_string(),
        reason: reason.to_owned(),
        message,
        actor: format!("host/{}", replica.host),
        host: view.host(&replica.host).map(|h| h.name.to_string()).unwrap_or_default(),
        deployment: name,
    })
}

impl Live {
    /// The newest session of a host has said hello, and what of it must be durable is.
    pub fn registered(&mut self, view: &View, host: &HostUid, said: &Registration, now: Now) {
        let rejoined =
            self.host(host).is_some_and(|h| !h.instance.is_empty() && h.instance != said.instance);
        self.edit_host(host, |h| {
            // The newest session is right, even when its agent's disk went back in time. Its numbers
            // begin here: another copy of the agent may have had the same start and got further.
            let same = (&h.instance, h.agent_start) == (&said.instance, said.agent_start);
            if !(same && bug!(CloneNumbersKept)) {
                h.sequence = 0;
            }
            h.instance.clone_from(&said.instance);
            h.agent_start = said.agent_start;
            h.presence = Presence::Present;
            h.acknowledged = said.held;
            h.last_seen = Some(now.wall);
            h.refusal.clear();
        });
        // What an earlier join had may be gone with its disk, whether the engine was looked at or not.
        if said.engine_observed || rejoined {
            let observed = uids(&said.observed);
            for replica in view.replicas_on(host) {
                if !observed.contains(replica.uid.as_str()) {
                    self.remove_replica(&replica.uid);
                }
            }
        }
        // All that a hello says is newer than whatever was known: what went further, went further at
        // another copy of the agent, or before its disk went back in time.
        for report in &said.observed {
            if let (Ok(uid), Some(told)) = (report.replica_uid.parse(), &report.status)
                && view.replica(&uid).is_some_and(|r| r.host == *host)
                && let Some(known) = self.replica(&uid)
            {
                let told = convert::replica_status_from_api(told);
                if (told.attempt, told.phase) < (known.status.attempt, known.status.phase) {
                    self.remove_replica(&uid);
                }
            }
        }
        self.take_reports(view, host, (&said.observed, &[]), now.mono);
    }

    /// A host's newest statuses and what it has nothing left of, already admitted. What it says of
    /// replicas that are not its own is passed over.
    pub fn take_reports(
        &mut self,
        view: &View,
        host: &HostUid,
        (reports, absent): (&[ReplicaReport], &[String]),
        now: Mono,
    ) {
        for report in reports {
            if let (Ok(uid), Some(status)) = (report.replica_uid.parse(), &report.status)
                && view.replica(&uid).is_some_and(|r| r.host == *host)
            {
                self.take(&uid, convert::replica_status_from_api(status), now);
            }
        }
        for uid in absent {
            if let Ok(uid) = uid.parse()
                && view.replica(&uid).is_none_or(|r| r.host == *host)
            {
                self.remove_replica(&uid);
            }
        }
    }

    /// The last session of a host that had said hello is over.
    pub fn ended(&mut self, host: &HostUid, now: Now) {
        if self.presence(host) == Presence::Present {
            self.edit_host(host, |h| {
                h.presence = Presence::Away(now.mono);
                h.last_seen = Some(now.wall);
            });
        }
    }
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
