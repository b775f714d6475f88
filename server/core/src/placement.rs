//! Which host a replica goes to.
//!
//! A refusal is data: every host that does not fit says why, once, and the reasons are counted, so
//! that "why is nothing placed?" has an answer. Hosts are judged once per plan; what a plan places is
//! taken off its working copy, so that placing many costs a heap operation each and not a pass over
//! the fleet. The choice never depends on iteration order: the last tie break is the host's uid.

use crate::live::{Live, Presence};
use crate::objects::{Host, Release};
use crate::view::{HostUse, View};
use berth_proto::ids::HostUid;
use berth_proto::values::{DeploymentSpec, HostPolicy, Requirement};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;

/// Why a host does not fit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rejection {
    /// No session.
    Away,
    /// Not heard of since the server's start.
    Unknown,
    /// An operator said so.
    Cordoned,
    /// The join waits for approval.
    WaitingForApproval,
    /// Two boots share the identity.
    Quarantined,
    /// The engine does not answer.
    EngineAway,
    /// A label requirement does not hold.
    Label(String),
    /// There is no image for it.
    Platform(String),
    /// Not enough memory left.
    Memory,
    /// Not enough processor left.
    Cpu,
    /// Not enough GPU memory left.
    GpuMemory,
    /// A host port is taken.
    Port(u16),
    /// Its own policy forbids it.
    Policy(String),
    /// It does not know a feature.
    Feature(String),
    /// A replica of this deployment is there already (every-host deployments).
    Occupied,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away => f.write_str("away"),
            Self::Unknown => f.write_str("not heard of since the server's start"),
            Self::Cordoned => f.write_str("cordoned"),
            Self::WaitingForApproval => f.write_str("waiting for approval"),
            Self::Quarantined => f.write_str("quarantined"),
            Self::EngineAway => f.write_str("without an engine that answers"),
            Self::Label(requirement) => write!(f, "without label {requirement}"),
            Self::Platform(platform) => {
                write!(f, "of platform {platform}, for which there is no image")
            }
            Self::Memory => f.write_str("short of memory"),
            Self::Cpu => f.write_str("short of cpu"),
            Self::GpuMemory => f.write_str("short of GPU memory"),
            Self::Port(port) => write!(f, "with host port {port} taken"),
            Self::Policy(what) => write!(f, "whose policy forbids {what}"),
            Self::Feature(feature) => write!(f, "whose agent lacks feature {feature}"),
            Self::Occupied => f.write_str("already running it"),
        }
    }
}

/// Why no host fits, with how many hosts say so.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unplaceable(pub BTreeMap<Rejection, u32>);

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no host fits: there are none");
        }
        let mut reasons: Vec<(&Rejection, &u32)> = self.0.iter().collect();
        reasons.sort_by_key(|(why, count)| (Reverse(**count), *why));
        f.write_str("no host fits: ")?;
        for (i, (why, count)) in reasons.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{count} {why}")?;
        }
        Ok(())
    }
}

/// What of a host's policy a spec breaks. The same function judges at the agent's end in words of its
/// own; this one only keeps the server from sending what would be refused.
#[must_use]
pub fn policy_refusal(spec: &DeploymentSpec, policy: &HostPolicy) -> Option<String> {
    let p = &spec.privileges;
    if p.privileged && !policy.allow_privileged {
        return Some("privileged containers".to_owned());
    }
    if p.host_network && !policy.allow_host_network {
        return Some("the host's network".to_owned());
    }
    if let Some(capability) =
        p.add_capabilities.iter().find(|c| !policy.allow_capabilities.contains(*c))
    {
        return Some(format!("capability {capability}"));
    }
    if let Some(device) = p.devices.iter().find(|d| !policy.allow_devices.contains(*d)) {
        return Some(format!("device {device}"));
    }
    for mount in &spec.mounts {
        let below = |folder: &String| {
            let folder = folder.trim_end_matches('/');
            mount.source == folder
                || mount.source.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
        };
        if !policy.mount_folders.iter().any(below) {
            return Some(format!("mounting {}", mount.source));
        }
    }
    for publish in spec.ports.iter().filter_map(|port| port.publish.as_ref()) {
        if !policy.publish_addresses.is_empty() && !policy.publish_addresses.contains(&publish.bind)
        {
            return Some(format!("publishing on {}", publish.bind));
        }
    }
    None
}

/// What a host must be, whatever is used of it.
///
/// # Errors
/// The first reason against it.
pub fn fits_at_all(
    host: &Host,
    live: &Live,
    release: &Release,
    require: &[Requirement],
    requires: &[String],
) -> Result<(), Rejection> {
    let record = &host.record;
    if record.waiting_for_approval {
        return Err(Rejection::WaitingForApproval);
    }
    if record.quarantined {
        return Err(Rejection::Quarantined);
    }
    if host.is_cordoned() {
        return Err(Rejection::Cordoned);
    }
    match live.presence(&host.uid) {
        Presence::Present => {}
        Presence::Unknown => return Err(Rejection::Unknown),
        Presence::Away(_) => return Err(Rejection::Away),
    }
    if let Some(requirement) = require.iter().find(|r| !r.matches(&host.labels)) {
        return Err(Rejection::Label(requirement.to_string()));
    }
    let platforms = &release.source.image.platforms;
    let facts = &host.facts;
    if !platforms.is_empty() && !platforms.iter().any(|p| p.arch == facts.arch && p.os == facts.os)
    {
        return Err(Rejection::Platform(format!("{}/{}", facts.os, facts.arch)));
    }
    if let Some(feature) = requires.iter().find(|f| !facts.features.contains(*f)) {
        return Err(Rejection::Feature(feature.clone()));
    }
    if let Some(what) = policy_refusal(&release.spec, &facts.policy) {
        return Err(Rejection::Policy(what));
    }
    if !facts.engine_available {
        return Err(Rejection::EngineAway);
    }
    Ok(())
}

/// Whether there is room beside what is used.
///
/// # Errors
/// The first thing that is short.
pub fn has_room(host: &Host, used: &HostUse, spec: &DeploymentSpec) -> Result<(), Rejection> {
    let (have, want) = (&host.facts.capacity, &spec.resources);
    // What a spec does not reserve is not counted, as the engine does not limit it either.
    let short = |want: u64, used: u64, have: u64| want > 0 && used.saturating_add(want) > have;
    if short(want.memory_bytes, used.used.memory_bytes, have.memory_bytes) {
        return Err(Rejection::Memory);
    }
    if short(want.cpu_millis, used.used.cpu_millis, have.cpu_millis) {
        return Err(Rejection::Cpu);
    }
    if short(want.gpu_memory_bytes, used.used.gpu_memory_bytes, have.gpu_memory_bytes) {
        return Err(Rejection::GpuMemory);
    }
    for publish in spec.ports.iter().filter_map(|port| port.publish.as_ref()) {
        if used.ports.contains(&publish.port) || host.facts.used_ports.contains(&publish.port) {
            return Err(Rejection::Port(publish.port));
        }
    }
    Ok(())
}

/// How good a host is: fewer of the same deployment, then less full; smaller is better.
type Score = (u32, u64, u32, HostUid);

struct Candidate {
    used: HostUse,
    same: u32,
    group: String,
    /// Raised with each change, so that older entries of the heap are told apart.
    turn: u32,
}

/// The hosts a plan may still place on, with what it has placed taken off.
pub struct Pool<'a> {
    view: &'a View,
    spec: &'a DeploymentSpec,
    hosts: BTreeMap<HostUid, Candidate>,
    rejected: BTreeMap<Rejection, u32>,
    /// A heap for each value of the spread label, and how many replicas are there.
    groups: BTreeMap<String, (u32, BinaryHeap<Reverse<Score>>)>,
}

impl<'a> Pool<'a> {
    /// Judges every host once. `same` says how many replicas of the deployment are on each host.
    #[must_use]
    pub fn new(
        view: &'a View,
        live: &Live,
        release: &'a Release,
        require: &[Requirement],
        spread: Option<&str>,
        requires: &[String],
        same: &BTreeMap<HostUid, u32>,
    ) -> Self {
        let mut pool = Self {
            view,
            spec: &release.spec,
            hosts: BTreeMap::new(),
            rejected: BTreeMap::new(),
            groups: BTreeMap::new(),
        };
        for host in view.hosts() {
            let here = same.get(&host.uid).copied().unwrap_or(0);
            let group = spread.and_then(|key| host.labels.get(key)).cloned().unwrap_or_default();
            if here > 0 {
                pool.groups.entry(group.clone()).or_default().0 += here;
            }
            let used = view.host_use(&host.uid);
            let judged = fits_at_all(host, live, release, require, requires)
                .and_then(|()| has_room(host, &used, &release.spec));
            match judged {
                Err(why) => *pool.rejected.entry(why).or_default() += 1,
                Ok(()) => {
                    let candidate =
                        Candidate { used: HostUse::clone(&used), same: here, group, turn: 0 };
                    pool.push(host, &candidate);
                    pool.hosts.insert(host.uid.clone(), candidate);
                }
            }
        }
        pool
    }

    fn push(&mut self, host: &Host, candidate: &Candidate) {
        let score =
            (candidate.same, fullness(host, &candidate.used), candidate.turn, host.uid.clone());
        self.groups.entry(candidate.group.clone()).or_default().1.push(Reverse(score));
    }

    /// Takes the best host for one more replica.
    ///
    /// # Errors
    /// Why no host fits, counted.
    pub fn take(&mut self) -> Result<HostUid, Unplaceable> {
        loop {
            // The value of the spread label with the fewest replicas that still has a host.
            let best = self
                .groups
                .iter()
                .filter(|(_, (_, heap))| !heap.is_empty())
                .min_by_key(|(value, (count, heap))| {
                    (*count, heap.peek().cloned().map(|s| s.0.0), (*value).clone())
                })
                .map(|(value, _)| value.clone());
            let Some(value) = best else { return Err(Unplaceable(self.rejected.clone())) };
            let Some((count, heap)) = self.groups.get_mut(&value) else { continue };
            let Some(Reverse((_, _, turn, uid))) = heap.pop() else { continue };
            let Some(candidate) = self.hosts.get_mut(&uid).filter(|c| c.turn == turn) else {
                continue;
            };
            *count += 1;
            candidate.same += 1;
            candidate.turn += 1;
            add(&mut candidate.used, self.spec);
            let Some(host) = self.view.host(&uid) else { continue };
            match has_room(host, &candidate.used, self.spec) {
                Ok(()) => {
                    let score = (
                        candidate.same,
                        fullness(host, &candidate.used),
                        candidate.turn,
                        uid.clone(),
                    );
                    if let Some((_, heap)) = self.groups.get_mut(&value) {
                        heap.push(Reverse(score));
                    }
                }
                Err(why) => {
                    *self.rejected.entry(why).or_default() += 1;
                    self.hosts.remove(&uid);
                }
            }
            return Ok(uid);
        }
    }

    /// Takes this host, if it fits.
    ///
    /// # Errors
    /// When it does not.
    pub fn take_host(&mut self, uid: &HostUid) -> Result<(), Unplaceable> {
        let Some(candidate) = self.hosts.get_mut(uid) else {
            return Err(Unplaceable(self.rejected.clone()));
        };
        candidate.turn += 1;
        candidate.same += 1;
        add(&mut candidate.used, self.spec);
        self.hosts.remove(uid);
        Ok(())
    }

    /// Hosts that fit, by uid.
    pub fn hosts(&self) -> impl Iterator<Item = &HostUid> {
        self.hosts.keys()
    }

    /// Why the others do not.
    #[must_use]
    pub fn rejected(&self) -> &BTreeMap<Rejection, u32> {
        &self.rejected
    }
}

fn add(used: &mut HostUse, spec: &DeploymentSpec) {
    used.replicas += 1;
    used.used.cpu_millis += spec.resources.cpu_millis;
    used.used.memory_bytes += spec.resources.memory_bytes;
    used.used.gpu_memory_bytes += spec.resources.gpu_memory_bytes;
    used.ports.extend(spec.ports.iter().filter_map(|p| Some(p.publish.as_ref()?.port)));
}

/// How full a host is in parts of 10,000, by what is fullest, then by replicas.
fn fullness(host: &Host, used: &HostUse) -> u64 {
    let part =
        |used: u64, have: u64| used.saturating_mul(10_000).checked_div(have).unwrap_or_default();
    let have = &host.facts.capacity;
    let fullest = part(used.used.memory_bytes, have.memory_bytes)
        .max(part(used.used.cpu_millis, have.cpu_millis))
        .max(part(used.used.gpu_memory_bytes, have.gpu_memory_bytes));
    fullest.saturating_mul(1_000_000) + u64::from(used.replicas)
}
