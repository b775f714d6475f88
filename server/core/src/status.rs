//! What people are shown, from the view and what is known live.

use crate::live::{Live, Presence};
use crate::objects::{Deployment, Host, Release, Replica};
use crate::planner::{self, Report};
use crate::view::View;
use berth_proto::api::{self, HostPresence, ReplicaIntent};
use berth_proto::convert::{
    duration, host_facts_to_api, replica_status_to_api, resources_to_api, timestamp,
};
use berth_proto::ids::{Mono, Now, Wall};
use berth_proto::values::Phase;
use berth_proto::words::{GIVEN_BACK, NO_HOST_FITS, ORPHAN_UNDECIDED, STOPPING, counted};
use std::collections::BTreeMap;

/// After so long away a host is shown as lost; deployments have their own policies.
pub const SHOWN_AS_LOST_MS: u64 = 300_000;

/// A stored meta as shown.
#[must_use]
pub fn meta(meta: &berth_proto::record::Meta, revision: u64) -> api::ObjectMeta {
    api::ObjectMeta {
        uid: meta.uid.clone(),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        labels: meta.labels.clone(),
        revision,
        create_time: Some(timestamp(Wall(meta.create_unix_ms))),
        update_time: Some(timestamp(Wall(meta.update_unix_ms))),
        delete_time: (meta.delete_unix_ms != 0).then(|| timestamp(Wall(meta.delete_unix_ms))),
    }
}

/// A host's presence as shown.
#[must_use]
pub fn presence(presence: Presence, now: Mono) -> HostPresence {
    match presence {
        Presence::Unknown => HostPresence::Unknown,
        Presence::Present => HostPresence::Present,
        Presence::Away(since) if now.since_ms(since) >= SHOWN_AS_LOST_MS => HostPresence::Lost,
        Presence::Away(_) => HostPresence::Away,
    }
}

/// A deployment as shown.
#[must_use]
pub fn deployment(
    view: &View,
    live: &Live,
    deployment: &Deployment,
    report: Option<&Report>,
) -> api::Deployment {
    let record = &deployment.record;
    let mut status = api::DeploymentStatus {
        release: record.release,
        rollout: record.rollout,
        reason: record.reason.clone(),
        wanted: deployment.wanted().or(report.map(|r| r.wanted)).unwrap_or(0),
        stable_release: record.stable_release,
        rollout_time: (record.rollout_unix_ms != 0)
            .then(|| timestamp(Wall(record.rollout_unix_ms))),
        resolved: record.resolved.clone(),
        ..api::DeploymentStatus::default()
    };
    let mut pending: BTreeMap<(String, String), u32> = BTreeMap::new();
    for replica in view.replicas_of(&deployment.uid) {
        let host = live.presence(&replica.host);
        if host == Presence::Unknown {
            status.unknown += 1;
        }
        let present = host == Presence::Present;
        let known = live.replica(&replica.uid);
        let phase = known.and_then(|k| k.status.phase);
        if phase == Some(Phase::Running) && present {
            status.running += 1;
        }
        let ready = present && known.is_some_and(|k| k.status.ready) && replica.runs();
        if ready {
            status.ready += 1;
            if replica.release == deployment.release() {
                status.updated_ready += 1;
            }
        } else if replica.runs() {
            let (reason, message) = why_not_ready(replica, known.map(|k| &k.status), host);
            *pending.entry((reason, message)).or_default() += 1;
        }
    }
    if let Some(report) = report {
        status.deferred_hosts = u32::try_from(report.deferred.len()).unwrap_or(u32::MAX);
        for (message, count) in &report.pending {
            status.pending_count += count;
            pending.insert((pending_reason(message).to_owned(), message.clone()), *count);
        }
        for (host, count) in &report.until_gone {
            let name = view.host(host).map(|h| h.name.to_string()).unwrap_or_default();
            let message = format!("waits until the one before is gone from {name}");
            pending.insert((STOPPING.to_owned(), message), *count);
        }
    }
    let mut pending: Vec<api::Pending> = pending
        .into_iter()
        .map(|((reason, message), count)| api::Pending { reason, message, count })
        .collect();
    pending.sort_by_key(|p| std::cmp::Reverse(p.count));
    pending.truncate(20);
    status.pending = pending;
    let mut spec = record.spec.clone().unwrap_or_default();
    // A number that was never written stays absent, so that what is shown can be applied again.
    if spec.replicas.is_some() {
        spec.replicas = Some(record.replicas);
    }
    api::Deployment {
        meta: record.meta.as_ref().map(|m| meta(m, deployment.revision.0)),
        spec: Some(spec),
        status: Some(status),
    }
}

/// The stable word for what a plan says of empty slots.
#[must_use]
pub fn pending_reason(message: &str) -> &'static str {
    match message {
        planner::UNDECIDED => ORPHAN_UNDECIDED,
        planner::GIVEN_BACK => GIVEN_BACK,
        _ => NO_HOST_FITS,
    }
}

/// Why nothing is told of a replica whose host gets no set.
const HELD_BACK: &str = "its host is told nothing before what it runs is known and decided about: berth orphan \
                         list";

/// Why a replica that shall run is not ready: the stable word, and words for people.
pub(crate) fn why_not_ready(
    replica: &Replica,
    status: Option<&berth_proto::values::ReplicaStatus>,
    host: Presence,
) -> (String, String) {
    let own = |reason: &str, message: &str| (reason.to_owned(), message.to_owned());
    match host {
        Presence::Unknown => {
            return own("HOST_UNKNOWN", "its host has not spoken since the server's start");
        }
        Presence::Away(_) => return own("HOST_AWAY", "its host is away"),
        Presence::Present => {}
    }
    if replica.failed {
        return own("FAILED", &replica.reason);
    }
    let Some(status) = status else {
        return own("ASSIGNED", "its host has not reported on it yet");
    };
    if !status.reason.is_empty() {
        return (status.reason.clone(), status.message.clone());
    }
    match status.phase {
        None | Some(Phase::Accepted) => own("ACCEPTED", "its host is about to start it"),
        Some(Phase::Fetching) => own("FETCHING", "image or model are being fetched"),
        Some(Phase::Creating | Phase::Starting) => {
            own("STARTING", "its container is being started")
        }
        Some(Phase::Running) => own("NOT_READY", "it runs and has not passed its health check"),
        Some(Phase::Exited) => own("EXITED", "its program has ended"),
        Some(Phase::Removed) => own("REMOVED", "its container is gone"),
    }
}

/// What a program that failed wrote last, as the end of a sentence.
#[must_use]
pub fn wrote(exit: &api::Exit) -> String {
    if exit.last_line.is_empty() {
        return String::new();
    }
    format!("; it wrote last: {}", exit.last_line)
}

/// A replica as shown.
#[must_use]
pub fn replica(view: &View, live: &Live, replica: &Replica, now: Mono) -> api::Replica {
    let deployment = view.deployment(&replica.deployment);
    let known = live.replica(&replica.uid);
    let mut status = known.map(|k| replica_status_to_api(&k.status)).unwrap_or_default();
    if status.last_exit.is_none() {
        status.last_exit = replica.exits.last().cloned();
    }
    if replica.failed {
        status.reason = "FAILED".to_owned();
        status.message.clone_from(&replica.reason);
    } else if known.is_none() && replica.runs() && view.is_held_back(&replica.host) {
        status.reason = "HOST_HELD_BACK".to_owned();
        status.message = HELD_BACK.to_owned();
    } else if status.reason.is_empty() && !status.ready && replica.runs() {
        let (reason, message) =
            why_not_ready(replica, known.map(|k| &k.status), live.presence(&replica.host));
        status.reason = reason;
        status.message = message;
    }
    let known_as = deployment.map(|d| (&d.namespace, &d.name));
    let found_as = replica.found_as.as_ref().map(|(namespace, name)| (namespace, name));
    let named = known_as.or(found_as);
    api::Replica {
        uid: replica.uid.to_string(),
        deployment_uid: replica.deployment.to_string(),
        deployment: named.map(|(_, name)| name.to_string()).unwrap_or_default(),
        namespace: named.map(|(namespace, _)| namespace.to_string()).unwrap_or_default(),
        slot: replica.slot,
        release: replica.release.0,
        host_uid: replica.host.to_string(),
        host: view.host(&replica.host).map(|h| h.name.to_string()).unwrap_or_default(),
        intent: replica.intent as i32,
        status: Some(status),
        create_time: Some(timestamp(replica.created)),
        first_ready_time: replica.first_ready.map(timestamp),
        host_presence: presence(live.presence(&replica.host), now) as i32,
    }
}

/// A host as shown.
#[must_use]
pub fn host(view: &View, live: &Live, host: &Host, now: Now) -> api::Host {
    let record = &host.record;
    let known = live.host(&host.uid);
    let at = live.presence(&host.uid);
    // While a session stands its pings are answered: what they are heard by is not written here.
    let last_seen =
        if at == Presence::Present { Some(now.wall) } else { known.and_then(|k| k.last_seen) };
    let used = view.host_use(&host.uid);
    let mut facts = host_facts_to_api(&host.facts);
    facts.labels.clone_from(&host.labels);
    let ready = view
        .replicas_on(&host.uid)
        .filter(|r| r.intent != ReplicaIntent::Orphan)
        .filter(|r| live.replica(&r.uid).is_some_and(|l| l.status.ready))
        .count();
    let replicas =
        view.replicas_on(&host.uid).filter(|r| r.intent != ReplicaIntent::Orphan).count();
    let offset = known.map_or(0, |k| k.clock_offset_ms);
    let reason = if record.quarantined {
        "two boots use this identity; berth host release-quarantine".to_owned()
    } else if record.waiting_for_approval {
        format!("waiting for approval: berth host approve {}", host.name)
    } else if let Some(refusal) = known.map(|k| k.refusal.clone()).filter(|r| !r.is_empty()) {
        refusal
    } else if view.is_held_back(&host.uid) && !view.is_unobserved(&host.uid) {
        format!(
            "what it runs is not in the ledger: {}; berth orphan list",
            counted(view.orphans_on(&host.uid).count(), "replica")
        )
    } else if !host.facts.engine_available {
        "its engine does not answer".to_owned()
    } else if host.record.facts.is_some() && !host.facts.container_network_reachable {
        "its agent does not reach container addresses: health checks by network and the gateway fail \
         there"
            .to_owned()
    } else {
        clock_words(offset)
    };
    let mut clock_offset = duration(offset.unsigned_abs());
    if offset < 0 {
        clock_offset.seconds = -clock_offset.seconds;
        clock_offset.nanos = -clock_offset.nanos;
    }
    api::Host {
        meta: record.meta.as_ref().map(|m| meta(m, host.revision.0)),
        spec: record.spec,
        status: Some(api::HostStatus {
            presence: presence(at, now.mono) as i32,
            last_seen_time: last_seen.map(timestamp),
            facts: Some(facts),
            allocated: Some(resources_to_api(&used.used)),
            replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            generation: view.generation(&host.uid).0,
            acknowledged_generation: known
                .and_then(|k| k.acknowledged)
                .map_or(0, |a| a.generation.0),
            quarantined: record.quarantined,
            waiting_for_approval: record.waiting_for_approval,
            reason,
            clock_offset: Some(clock_offset),
            instance: record.instance.clone(),
            certificate_expire_time: (record.certificate_expire_unix_ms != 0)
                .then(|| timestamp(Wall(record.certificate_expire_unix_ms))),
        }),
    }
}

/// What is said of a clock that is off by more than a minute: it dates lines wrongly, and certificates.
/// Empty: it is right.
fn clock_words(ahead_ms: i64) -> String {
    let off = ahead_ms.unsigned_abs();
    if off <= 60_000 {
        return String::new();
    }
    let side = if ahead_ms > 0 { "ahead" } else { "behind" };
    format!("its clock is {} {side}", berth_proto::quantity::format_duration_ms(off - off % 1000))
}

/// A release as shown.
#[must_use]
pub fn release(deployment: &Deployment, release: &Release) -> api::Release {
    let record = &release.record;
    api::Release {
        deployment_uid: deployment.uid.to_string(),
        deployment: deployment.name.to_string(),
        namespace: deployment.namespace.to_string(),
        number: release.number.0,
        spec: record.spec.clone(),
        source: record.source.clone(),
        body_digest: release.body_digest.to_string(),
        create_time: Some(timestamp(Wall(record.create_unix_ms))),
        created_by: record.created_by.clone(),
        cause: record.cause.clone(),
        state: record.state,
        copied_from: record.copied_from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_present_was_seen_just_now_and_an_away_one_when_it_last_spoke() {
        let mut w = crate::miniature::World::new(1);
        let uid = "h0".parse().unwrap();
        w.live.edit_host(&uid, |h| h.last_seen = Some(Wall(5)));
        let seen = |w: &crate::miniature::World| {
            let shown = host(&w.view, &w.live, w.view.host(&uid).unwrap(), w.now);
            shown.status.unwrap().last_seen_time
        };
        assert_eq!(seen(&w), Some(timestamp(w.now.wall)));
        w.presence(0, Presence::Away(Mono(1)));
        assert_eq!(seen(&w), Some(timestamp(Wall(5))));
    }

    #[test]
    fn a_clock_that_is_off_is_named_with_its_offset() {
        assert_eq!(clock_words(60_000), "");
        assert_eq!(clock_words(3_725_900), "its clock is 1h2m5s ahead");
        assert_eq!(clock_words(-120_000), "its clock is 2m behind");
    }
}
