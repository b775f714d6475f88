//! Which host a replica goes to.
//!
//! A refusal is data: every host that does not fit says why, once, and the reasons are counted, so
//! that "why is nothing placed?" has an answer. Hosts are looked at from the emptiest on, by the
//! view's index, and only as far as is needed; each is judged once per plan, and what a plan places
//! is taken off its working copy. So placing few in a large fleet looks at few hosts, placing many
//! costs a heap operation each, and only "no host fits" has looked at all of them. The choice never
//! depends on how it was found: of all hosts that fit, the best score wins, the last tie break being
//! the host's uid.

use crate::capacity::{HostUse, fullness};
use crate::live::{Live, Presence};
use crate::objects::{Deployment, Host, Release};
use crate::view::View;
use berth_proto::ids::HostUid;
use berth_proto::values::{DeploymentSpec, HostPolicy, Probe, Publish, Requirement};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::sync::Arc;

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
    /// Since a restore: it runs what nobody has decided about, or has not said what it runs.
    HeldBack,
    /// The engine does not answer.
    EngineAway,
    /// Its agent does not reach container addresses, and the replica is checked by network.
    ContainersUnreached,
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
}

/// What would have to change of a host for it to fit: the key of the index by which deployments that
/// wait are woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WaitsFor {
    /// It must be heard of.
    Presence,
    /// Its record: labels, cordon, facts, policy, features, engine.
    Record,
    /// Room on it.
    Room,
}

impl Rejection {
    /// What would have to change.
    #[must_use]
    pub fn waits_for(&self) -> WaitsFor {
        match self {
            Self::Away | Self::Unknown => WaitsFor::Presence,
            Self::Cordoned
            | Self::WaitingForApproval
            | Self::Quarantined
            | Self::EngineAway
            | Self::ContainersUnreached
            | Self::Label(_)
            | Self::Platform(_)
            | Self::Policy(_)
            | Self::Feature(_) => WaitsFor::Record,
            // Orphans are replicas: what becomes of them is heard of as room is.
            Self::HeldBack | Self::Memory | Self::Cpu | Self::GpuMemory | Self::Port(_) => {
                WaitsFor::Room
            }
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away => f.write_str("away"),
            Self::Unknown => f.write_str("not heard of since the server's start"),
            Self::Cordoned => f.write_str("cordoned"),
            Self::WaitingForApproval => f.write_str("waiting for approval"),
            Self::Quarantined => f.write_str("quarantined"),
            Self::HeldBack => {
                f.write_str("with orphans to decide about since a restore (berth orphan list)")
            }
            Self::EngineAway => f.write_str("without an engine that answers"),
            Self::ContainersUnreached => f.write_str(
                "where the agent does not reach containers, as the health check needs it to",
            ),
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
        if !policy.may_publish(publish.bind) {
            return Some(format!("publishing on {}", publish.bind));
        }
    }
    None
}

/// Whether a replica becomes ready only where its agent reaches its container's address.
fn is_checked_by_network(spec: &DeploymentSpec) -> bool {
    spec.health.as_ref().is_some_and(|health| match health.probe {
        Probe::Http { .. } | Probe::Tcp { .. } | Probe::Grpc { .. } => true,
        Probe::Exec { .. } => false,
    })
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
    if host.is_cordoned() && !bug!(CordonUnasked) {
        return Err(Rejection::Cordoned);
    }
    match live.presence(&host.uid) {
        Presence::Present => {}
        Presence::Unknown => return Err(Rejection::Unknown),
        Presence::Away(_) => return Err(Rejection::Away),
    }
    let unmet = require.iter().find(|r| !r.matches(&host.labels));
    if let Some(requirement) = unmet.filter(|_| !bug!(LabelsUnasked)) {
        return Err(Rejection::Label(requirement.to_string()));
    }
    let platforms = &release.source.image.platforms;
    let facts = &host.facts;
    if !platforms.is_empty()
        && !platforms
            .iter()
            .any(|p| (p.arch == facts.arch || bug!(AnyArchitecture)) && p.os == facts.os)
    {
        return Err(Rejection::Platform(format!("{}/{}", facts.os, facts.arch)));
    }
    if let Some(feature) = requires.iter().find(|f| !facts.features.contains(*f)) {
        return Err(Rejection::Feature(feature.clone()));
    }
    if let Some(what) = policy_refusal(&release.spec, &facts.policy) {
        return Err(Rejection::Policy(what));
    }
    if !facts.engine_available && !bug!(EngineUnasked) {
        return Err(Rejection::EngineAway);
    }
    let checked = is_checked_by_network(&release.spec) && !bug!(NetworkUnasked);
    if !facts.container_network_reachable && checked {
        return Err(Rejection::ContainersUnreached);
    }
    Ok(())
}

/// Whether there is room beside what is used.
///
/// # Errors
/// The first thing that is short.
pub fn has_room(host: &Host, used: &HostUse, spec: &DeploymentSpec) -> Result<(), Rejection> {
    has_room_after(host, used, spec, None)
}

/// Whether there is room beside what is used, once what runs there by the spec `gone` is gone: the
/// ports that the host itself sees in use may still be that one's.
///
/// # Errors
/// The first thing that is short.
pub fn has_room_after(
    host: &Host,
    used: &HostUse,
    spec: &DeploymentSpec,
    gone: Option<&DeploymentSpec>,
) -> Result<(), Rejection> {
    if bug!(RoomUnasked) {
        return Ok(());
    }
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
    fn published(spec: &DeploymentSpec) -> impl Iterator<Item = &Publish> {
        spec.ports.iter().filter_map(|port| port.publish.as_ref())
    }
    for publish in published(spec) {
        let seen = host.facts.used_ports.contains(&publish.port)
            && !gone.into_iter().flat_map(published).any(|own| own.port == publish.port);
        let seen = seen && !bug!(OthersPortsUnasked);
        if used.ports.contains(&publish.port) || seen {
            return Err(Rejection::Port(publish.port));
        }
    }
    Ok(())
}

/// What a replica of a deployment's release needs of its host.
#[derive(Debug, Clone)]
pub struct Need<'a> {
    /// The release.
    pub release: &'a Release,
    /// Required labels, as the deployment says now.
    pub require: &'a [Requirement],
    /// Label over whose values replicas are spread.
    pub spread: Option<&'a str>,
    requires: Vec<String>,
}

impl<'a> Need<'a> {
    /// What a release of a deployment needs.
    #[must_use]
    pub fn new(deployment: &'a Deployment, release: &'a Release) -> Self {
        let placement = &deployment.spec.placement;
        Self {
            release,
            require: &placement.require,
            spread: placement.spread.as_deref(),
            requires: crate::release::requires(release),
        }
    }

    /// What a host must be, whatever is used of it.
    ///
    /// # Errors
    /// The first reason against it.
    pub fn suits(&self, host: &Host, live: &Live) -> Result<(), Rejection> {
        fits_at_all(host, live, self.release, self.require, &self.requires)
    }

    /// Whether one more fits on a host now.
    ///
    /// # Errors
    /// The first reason against it.
    pub fn fits(&self, view: &View, live: &Live, host: &Host) -> Result<(), Rejection> {
        self.suits(host, live)?;
        self.has_room(view, host)
    }

    /// Whether one more may be put on a host that suits.
    fn has_room(&self, view: &View, host: &Host) -> Result<(), Rejection> {
        if view.is_held_back(&host.uid) {
            return Err(Rejection::HeldBack);
        }
        has_room(host, &view.host_use(&host.uid), &self.release.spec)
    }
}

/// How good a host is: fewer of the same deployment, then less full; smaller is better.
type Score = (u32, u64, HostUid);

struct Candidate {
    host: Arc<Host>,
    used: HostUse,
    same: u32,
    group: String,
}

#[derive(Default)]
struct Group {
    /// Replicas of the deployment on its hosts.
    count: u32,
    /// Each host that fits and was found, once.
    heap: BinaryHeap<Reverse<Score>>,
}

/// A required label that leaves fewer hosts than one in so many is looked up by the index instead of
/// being met while going through all of them.
const RARE: usize = 8;

/// The hosts a plan may still place on, with what it has placed taken off.
pub struct Pool<'a> {
    view: &'a View,
    live: &'a Live,
    need: &'a Need<'a>,
    /// Hosts not looked at yet, the emptiest first.
    ahead: Box<dyn Iterator<Item = (u64, &'a Arc<Host>)> + 'a>,
    exhausted: bool,
    /// Looked at only these, because a required label leaves no others.
    narrowed: Option<BTreeSet<HostUid>>,
    /// Hosts that hold replicas of the deployment; they are looked at in the beginning.
    held: &'a BTreeMap<HostUid, u32>,
    found: BTreeMap<HostUid, Candidate>,
    rejected: BTreeMap<Rejection, u32>,
    /// By value of the spread label; one group when there is none.
    groups: BTreeMap<String, Group>,
}

impl<'a> Pool<'a> {
    /// Looks at the hosts that hold replicas of the deployment; `held` says how many each.
    #[must_use]
    pub fn new(
        view: &'a View,
        live: &'a Live,
        need: &'a Need<'a>,
        held: &'a BTreeMap<HostUid, u32>,
    ) -> Self {
        let narrowed = narrowed(view, need);
        let ahead: Box<dyn Iterator<Item = (u64, &'a Arc<Host>)> + 'a> = match &narrowed {
            None => Box::new(view.capacity().by_room()),
            Some(few) => {
                let mut few: Vec<(u64, &Arc<Host>)> = few
                    .iter()
                    .filter_map(|uid| view.host(uid))
                    .filter(|host| !host.is_removed())
                    .map(|host| (fullness(host, &view.host_use(&host.uid)), host))
                    .collect();
                few.sort_by(|a, b| (a.0, &a.1.uid).cmp(&(b.0, &b.1.uid)));
                Box::new(few.into_iter())
            }
        };
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        let spread = need.spread.into_iter().flat_map(|key| view.capacity().values_of(key));
        groups.extend(spread.map(|value| (value.clone(), Group::default())));
        if need.spread.is_none_or(|key| !view.capacity().all_have(key)) {
            groups.insert(String::new(), Group::default());
        }
        let mut pool = Self {
            view,
            live,
            need,
            ahead,
            exhausted: false,
            narrowed,
            held,
            found: BTreeMap::new(),
            rejected: BTreeMap::new(),
            groups,
        };
        for (uid, count) in held {
            let Some(host) = view.host(uid).filter(|h| !h.is_removed()) else { continue };
            let group = pool.group_of(host);
            pool.groups.entry(group).or_default().count += count;
            if pool.narrowed.as_ref().is_none_or(|few| few.contains(uid)) {
                pool.look_at(host, *count);
            }
        }
        pool
    }

    fn group_of(&self, host: &Host) -> String {
        self.need.spread.and_then(|key| host.labels.get(key)).cloned().unwrap_or_default()
    }

    fn look_at(&mut self, host: &Arc<Host>, same: u32) {
        let used = self.view.host_use(&host.uid);
        let judged =
            self.need.suits(host, self.live).and_then(|()| self.need.has_room(self.view, host));
        match judged {
            Err(why) => *self.rejected.entry(why).or_default() += 1,
            Ok(()) => {
                let group = self.group_of(host);
                let score = (same, fullness(host, &used), host.uid.clone());
                self.groups.entry(group.clone()).or_default().heap.push(Reverse(score));
                let used = HostUse::clone(&used);
                let candidate = Candidate { host: Arc::clone(host), used, same, group };
                self.found.insert(host.uid.clone(), candidate);
            }
        }
    }

    /// Looks at one more host; false: there are no more.
    fn look_further(&mut self) -> bool {
        for (_, host) in self.ahead.by_ref() {
            if !self.held.contains_key(&host.uid) {
                self.look_at(host, 0);
                return true;
            }
        }
        self.exhausted = true;
        false
    }

    /// Whether the best host of a group is known: one without a replica of the deployment, of which
    /// the emptiest is found first, or any when all hosts were looked at.
    fn is_settled(&self, group: &Group) -> bool {
        self.exhausted || group.heap.peek().is_some_and(|best| best.0.0 == 0)
    }

    /// The group to place in: with the fewest replicas among those that have a host.
    fn best_group(&mut self) -> Option<String> {
        loop {
            let open = |group: &Group| !(self.exhausted && group.heap.is_empty());
            let fewest = self.groups.values().filter(|g| open(g)).map(|g| g.count).min()?;
            let these = || self.groups.iter().filter(|(_, g)| open(g) && g.count == fewest);
            let unsettled: Vec<String> = these()
                .filter(|(_, group)| !self.is_settled(group))
                .map(|(value, _)| value.clone())
                .collect();
            if unsettled.is_empty() {
                return these()
                    .min_by_key(|(value, group)| {
                        (group.heap.peek().map(|best| (best.0.0, best.0.1)), *value)
                    })
                    .map(|(value, _)| value.clone());
            }
            for value in unsettled {
                while self.groups.get(&value).is_some_and(|group| !self.is_settled(group)) {
                    self.look_further();
                }
            }
        }
    }

    /// Takes the best host for one more replica.
    ///
    /// # Errors
    /// Why no host fits, counted.
    pub fn take(&mut self) -> Result<HostUid, Unplaceable> {
        while let Some(value) = self.best_group() {
            let Some(group) = self.groups.get_mut(&value) else { break };
            let Some(Reverse((_, _, uid))) = group.heap.pop() else { break };
            group.count += 1;
            if let Some(mut candidate) = self.found.remove(&uid) {
                candidate.same += 1;
                candidate.used.add(&self.need.release.spec);
                self.keep(candidate);
                return Ok(uid);
            }
        }
        Err(self.unplaceable())
    }

    /// Back among the hosts to choose from, if there is still room.
    fn keep(&mut self, candidate: Candidate) {
        match has_room(&candidate.host, &candidate.used, &self.need.release.spec) {
            Ok(()) => {
                let full = fullness(&candidate.host, &candidate.used);
                let score = (candidate.same, full, candidate.host.uid.clone());
                let group = self.groups.entry(candidate.group.clone()).or_default();
                group.heap.push(Reverse(score));
                self.found.insert(candidate.host.uid.clone(), candidate);
            }
            Err(why) => *self.rejected.entry(why).or_default() += 1,
        }
    }

    /// Why no host fits. Those that a rare label ruled out by the index are counted here.
    fn unplaceable(&self) -> Unplaceable {
        let mut all = self.rejected.clone();
        if let Some(few) = &self.narrowed {
            for host in self.view.hosts().filter(|host| !few.contains(&host.uid)) {
                if let Err(why) = self.need.suits(host, self.live) {
                    *all.entry(why).or_default() += 1;
                }
            }
        }
        Unplaceable(all)
    }
}

/// The hosts that the rarest required label leaves, when they are few.
fn narrowed(view: &View, need: &Need<'_>) -> Option<BTreeSet<HostUid>> {
    let (count, sets) = need
        .require
        .iter()
        .filter_map(|requirement| view.capacity().with_label(requirement))
        .map(|sets| (sets.iter().map(|set| set.size()).sum::<usize>(), sets))
        .min_by_key(|(count, _)| *count)?;
    (count.saturating_mul(RARE) <= view.host_count())
        .then(|| sets.into_iter().flat_map(|set| set.iter().cloned()).collect())
}
