//! What is used of each host, and hosts in the order in which they would be filled.
//!
//! Kept by the view with every change of a host or a replica, so that placing looks at the emptiest
//! hosts first and stops at the first that fits, however large the fleet is. What is in here always
//! equals what could be rebuilt from the view's objects; [`crate::audit`] checks it.

use crate::objects::Host;
use berth_proto::ids::HostUid;
use berth_proto::values::{DeploymentSpec, Requirement, Resources};
use rpds::{RedBlackTreeMapSync as Map, RedBlackTreeSetSync as Set};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What is used of a host by the replicas assigned to it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostUse {
    /// Reserved amounts.
    pub used: Resources,
    /// Published host ports.
    pub ports: BTreeSet<u16>,
    /// Replicas, those that shall go included.
    pub replicas: u32,
    /// Those among them that take another's place.
    pub replacing: u32,
}

impl HostUse {
    /// One more replica of this spec.
    pub fn add(&mut self, spec: &DeploymentSpec) {
        self.replicas += 1;
        self.add_amounts(spec);
    }

    /// Everything of another use as well.
    pub fn add_all(&mut self, other: &Self) {
        self.replicas += other.replicas;
        self.replacing += other.replacing;
        self.used.cpu_millis += other.used.cpu_millis;
        self.used.memory_bytes += other.used.memory_bytes;
        self.used.gpu_memory_bytes += other.used.gpu_memory_bytes;
        self.ports.extend(&other.ports);
    }

    /// What a replica of this spec reserves, without counting it.
    pub fn add_amounts(&mut self, spec: &DeploymentSpec) {
        let amounts = &spec.resources;
        self.used.cpu_millis += amounts.cpu_millis;
        self.used.memory_bytes += amounts.memory_bytes;
        self.used.gpu_memory_bytes += amounts.gpu_memory_bytes;
        self.ports.extend(spec.ports.iter().filter_map(|p| Some(p.publish.as_ref()?.port)));
    }
}

/// How full a host is: parts of 10,000 of what is fullest, then replicas.
#[must_use]
pub fn fullness(host: &Host, used: &HostUse) -> u64 {
    let part =
        |used: u64, have: u64| used.saturating_mul(10_000).checked_div(have).unwrap_or_default();
    let have = &host.facts.capacity;
    let fullest = part(used.used.memory_bytes, have.memory_bytes)
        .max(part(used.used.cpu_millis, have.cpu_millis))
        .max(part(used.used.gpu_memory_bytes, have.gpu_memory_bytes));
    fullest.saturating_mul(1_000_000).saturating_add(u64::from(used.replicas))
}

/// The indexes by room and by label.
#[derive(Debug, Clone, Default)]
pub struct Capacity {
    used: Map<HostUid, Arc<HostUse>>,
    /// Hosts that were not removed, the emptiest first.
    order: Map<(u64, HostUid), Arc<Host>>,
    /// Where each host stands in `order`.
    at: Map<HostUid, u64>,
    labels: Map<String, Map<String, Set<HostUid>>>,
}

impl Capacity {
    /// What is used of a host.
    #[must_use]
    pub fn used(&self, host: &HostUid) -> Option<&Arc<HostUse>> {
        self.used.get(host)
    }

    /// Hosts that were not removed with how full they are, the emptiest first.
    pub fn by_room(&self) -> impl Iterator<Item = (u64, &Arc<Host>)> {
        self.order.iter().map(|((full, _), host)| (*full, host))
    }

    /// Values of a label among hosts that were not removed.
    pub fn values_of<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a String> + use<'a> {
        self.labels.get(key).into_iter().flat_map(|values| values.keys())
    }

    /// Whether every host that was not removed has this label.
    #[must_use]
    pub fn all_have(&self, key: &str) -> bool {
        let values = self.labels.get(key).into_iter().flat_map(|values| values.values());
        values.map(Set::size).sum::<usize>() == self.at.size()
    }

    /// Hosts that a requirement leaves, when the index can tell; `None`: it cannot.
    #[must_use]
    pub fn with_label(&self, requirement: &Requirement) -> Option<Vec<&Set<HostUid>>> {
        let values = |key: &String| self.labels.get(key);
        match requirement {
            Requirement::Equals(key, value) => {
                Some(values(key).and_then(|v| v.get(value)).into_iter().collect())
            }
            Requirement::In(key, wanted) => Some(
                values(key)
                    .into_iter()
                    .flat_map(|v| wanted.iter().filter_map(|value| v.get(value)))
                    .collect(),
            ),
            Requirement::Exists(key) => {
                Some(values(key).into_iter().flat_map(|v| v.values()).collect())
            }
            Requirement::NotEquals(..) | Requirement::NotIn(..) | Requirement::Absent(_) => None,
        }
    }

    /// A host is as given now.
    pub fn put_host(&mut self, old: Option<&Arc<Host>>, host: &Arc<Host>) {
        let before = old.filter(|h| !h.is_removed()).map(|h| &h.labels);
        let after = Some(&host.labels).filter(|_| !host.is_removed());
        if before != after {
            for (key, value) in before.into_iter().flatten() {
                if after.and_then(|labels| labels.get(key)) != Some(value) {
                    self.unlabel(key, value, &host.uid);
                }
            }
            for (key, value) in after.into_iter().flatten() {
                if before.and_then(|labels| labels.get(key)) != Some(value) {
                    self.label(key, value, &host.uid);
                }
            }
        }
        self.unplace(&host.uid);
        if !host.is_removed() {
            let full = fullness(host, &self.used.get(&host.uid).cloned().unwrap_or_default());
            self.at.insert_mut(host.uid.clone(), full);
            self.order.insert_mut((full, host.uid.clone()), Arc::clone(host));
        }
    }

    /// So much is used of a host now. `host` is as in the view; `None`: it is not known.
    pub fn put_use(&mut self, uid: &HostUid, host: Option<&Arc<Host>>, used: HostUse) {
        if let Some(host) = host.filter(|h| !h.is_removed()) {
            let full = fullness(host, &used);
            if self.at.get(uid) != Some(&full) {
                self.unplace(uid);
                self.at.insert_mut(uid.clone(), full);
                self.order.insert_mut((full, uid.clone()), Arc::clone(host));
            }
        }
        if used == HostUse::default() {
            self.used.remove_mut(uid);
        } else {
            self.used.insert_mut(uid.clone(), Arc::new(used));
        }
    }

    fn unplace(&mut self, uid: &HostUid) {
        if let Some(full) = self.at.get(uid).copied() {
            self.order.remove_mut(&(full, uid.clone()));
            self.at.remove_mut(uid);
        }
    }

    fn label(&mut self, key: &str, value: &str, uid: &HostUid) {
        let mut values = self.labels.get(key).cloned().unwrap_or_default();
        let mut hosts = values.get(value).cloned().unwrap_or_default();
        hosts.insert_mut(uid.clone());
        values.insert_mut(value.to_owned(), hosts);
        self.labels.insert_mut(key.to_owned(), values);
    }

    fn unlabel(&mut self, key: &str, value: &str, uid: &HostUid) {
        let Some(mut values) = self.labels.get(key).cloned() else { return };
        let Some(mut hosts) = values.get(value).cloned() else { return };
        hosts.remove_mut(uid);
        if hosts.is_empty() {
            values.remove_mut(value);
        } else {
            values.insert_mut(value.to_owned(), hosts);
        }
        if values.is_empty() {
            self.labels.remove_mut(key);
        } else {
            self.labels.insert_mut(key.to_owned(), values);
        }
    }

    /// The whole index as plain maps, to be compared with a rebuilt one.
    #[must_use]
    pub fn contents(&self) -> Contents {
        Contents {
            used: self.used.iter().map(|(uid, used)| (uid.clone(), HostUse::clone(used))).collect(),
            order: self.order.keys().cloned().collect(),
            at: self.at.iter().map(|(uid, full)| (uid.clone(), *full)).collect(),
            labels: self
                .labels
                .iter()
                .flat_map(|(key, values)| {
                    values.iter().map(move |(value, hosts)| {
                        ((key.clone(), value.clone()), hosts.iter().cloned().collect())
                    })
                })
                .collect(),
        }
    }
}

/// What an index holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// What is used, by host.
    pub used: BTreeMap<HostUid, HostUse>,
    /// Hosts by how full they are.
    pub order: BTreeSet<(u64, HostUid)>,
    /// How full each host is.
    pub at: BTreeMap<HostUid, u64>,
    /// Hosts by label.
    pub labels: BTreeMap<(String, String), BTreeSet<HostUid>>,
}
