//! Whether a host may run one more of a deployment, asked of the records alone: what decides it in the
//! core is what is being tested.
//!
//! Where the two could differ honestly this one is the stricter: it counts both of two that change
//! places. So what it finds to fit fits.

use berth_proto::api::ReplicaIntent;
use berth_proto::values::Resources;
use berth_server_core::live::{Live, Presence};
use berth_server_core::objects::{Deployment, Host, Release, Replica};
use berth_server_core::view::View;
use std::collections::BTreeSet;

/// It takes nothing new: somebody has said so, or has still to say.
pub(super) fn is_shut(host: &Host) -> bool {
    let spec = host.record.spec.unwrap_or_default();
    spec.cordoned || spec.draining || host.record.quarantined || host.record.waiting_for_approval
}

/// What runs there is to go elsewhere.
pub(super) fn is_draining(host: &Host) -> bool {
    host.record.spec.is_some_and(|spec| spec.draining)
}

/// It has the labels that a deployment asks for and knows what its release needs.
pub(super) fn is_of_its_kind(host: &Host, deployment: &Deployment, release: &Release) -> bool {
    let labels = deployment.spec.placement.require.iter().all(|r| r.matches(&host.labels));
    let knows = |feature: &str| host.facts.features.iter().any(|f| f == feature);
    let mut platforms = release.source.image.platforms.iter();
    let runs = platforms.any(|p| (&p.arch, &p.os) == (&host.facts.arch, &host.facts.os));
    labels && runs && (release.source.artifact.is_none() || knows("artifact"))
}

/// Its engine answers, and its agent reaches what it has to check.
pub(super) fn can_start(host: &Host, release: &Release) -> bool {
    let checked = release.spec.health.is_some();
    host.facts.engine_available && (host.facts.container_network_reachable || !checked)
}

/// It may be asked to run one more, whatever runs there already.
pub(super) fn suits(live: &Live, deployment: &Deployment, release: &Release, host: &Host) -> bool {
    !host.is_removed()
        && !is_shut(host)
        && live.presence(&host.uid) == Presence::Present
        && can_start(host, release)
        && is_of_its_kind(host, deployment, release)
}

/// There is room for one more, and nobody has to decide first about what was found there.
pub(super) fn has_room(view: &View, host: &Host, release: &Release) -> bool {
    has_room_for(view, host, release, 1)
}

/// The same for so many.
pub(super) fn has_room_for(view: &View, host: &Host, release: &Release, count: u64) -> bool {
    let mut used = Resources::default();
    let mut ports: BTreeSet<u16> = host.facts.used_ports.iter().copied().collect();
    for replica in view.replicas_on(&host.uid) {
        let of = view.release(&replica.deployment, replica.release);
        let Some(of) = of.filter(|_| replica.intent != ReplicaIntent::Orphan) else { return false };
        used.memory_bytes += of.spec.resources.memory_bytes;
        used.cpu_millis += of.spec.resources.cpu_millis;
        used.gpu_memory_bytes += of.spec.resources.gpu_memory_bytes;
        ports.extend(published(of));
    }
    let (have, want) = (host.facts.capacity, release.spec.resources);
    let fits = |used: u64, want: u64, have: u64| want == 0 || used + count * want <= have;
    !view.is_unobserved(&host.uid)
        && fits(used.memory_bytes, want.memory_bytes, have.memory_bytes)
        && fits(used.cpu_millis, want.cpu_millis, have.cpu_millis)
        && fits(used.gpu_memory_bytes, want.gpu_memory_bytes, have.gpu_memory_bytes)
        && published(release).all(|port| count <= 1 && !ports.contains(&port))
}

/// Why a host cannot serve what was placed on it, by what it said itself before.
pub(super) fn shut_out(before: &View, after: &View, replica: &Replica) -> Option<String> {
    let host = before.host(&replica.host)?;
    let release = after.release(&replica.deployment, replica.release)?;
    let words = format!("{} is placed on {}", replica.uid, host.uid);
    if let Some(port) = published(release).find(|port| host.facts.used_ports.contains(port)) {
        return Some(format!("{words}, where another program has port {port}"));
    }
    let unreached = !host.facts.container_network_reachable && release.spec.health.is_some();
    unreached.then(|| format!("{words}, whose agent reaches no container to check it"))
}

fn published(release: &Release) -> impl Iterator<Item = u16> {
    release.spec.ports.iter().filter_map(|port| Some(port.publish.as_ref()?.port))
}

/// It is wanted, and its host was not removed.
pub(super) fn is_there(view: &View, replica: &Replica) -> bool {
    replica.runs() && view.host(&replica.host).is_some_and(|host| !host.is_removed())
}

/// It has been ready for as long as its deployment asks, on a host in reach.
pub(super) fn is_healthy(
    live: &Live,
    deployment: &Deployment,
    replica: &Replica,
    now: berth_proto::ids::Mono,
) -> bool {
    let since = live.replica(&replica.uid).and_then(|l| l.ready_since);
    let ready_for_ms = deployment.spec.rollout.ready_for_ms;
    live.is_present(&replica.host) && since.is_some_and(|since| now >= since.plus_ms(ready_for_ms))
}
