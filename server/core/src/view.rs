//! Everything the ledger holds, at one revision.
//!
//! A view is immutable to its readers and cheap to copy: persistent maps of shared objects, with the
//! indexes and the hosts' used capacity inside. It is changed only by [`View::apply`], which keeps
//! every index; what an index holds always equals what could be rebuilt from the objects.

use crate::capacity::Capacity;
pub use crate::capacity::HostUse;
use crate::change::Change;
use crate::objects::{BadRecord, Deployment, Host, Release, Replica};
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{
    DeploymentUid, Epoch, Generation, HostUid, Name, Namespace, ReleaseNumber, ReplicaUid, Revision,
};
use berth_proto::record;
use rpds::{RedBlackTreeMapSync as Map, RedBlackTreeSetSync as Set};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A record and the revision it was last written at.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept<T> {
    /// The record.
    pub record: Arc<T>,
    /// Last written at.
    pub revision: Revision,
}

/// Everything the ledger holds.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The newest write in here.
    pub revision: Revision,
    /// The cluster's record.
    pub cluster: record::ClusterRecord,
    /// The sequence the next event gets.
    pub next_event: u64,
    hosts: Map<HostUid, Arc<Host>>,
    host_names: Map<Name, HostUid>,
    generations: Map<HostUid, Generation>,
    capacity: Capacity,
    deployments: Map<DeploymentUid, Arc<Deployment>>,
    deployment_names: Map<(Namespace, Name), DeploymentUid>,
    releases: Map<(DeploymentUid, ReleaseNumber), Arc<Release>>,
    replicas: Map<ReplicaUid, Arc<Replica>>,
    by_host: Map<HostUid, Set<ReplicaUid>>,
    by_deployment: Map<DeploymentUid, Set<ReplicaUid>>,
    models: Map<String, Kept<record::ModelRecord>>,
    model_names: Map<(String, String), String>,
    versions: Map<(String, String), Kept<record::ModelVersionRecord>>,
    join_tokens: Map<String, Kept<record::JoinTokenRecord>>,
    users: Map<String, Kept<record::UserRecord>>,
    user_names: Map<String, String>,
    user_tokens: Map<String, Kept<record::UserTokenRecord>>,
    requests: Map<String, Kept<record::RequestRecord>>,
}

/// Why stored entries are no view.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A record cannot be read.
    #[error("the entry {key} cannot be read")]
    Bad {
        /// Its key.
        key: String,
        /// What is wrong.
        #[source]
        source: BadRecord,
    },
    /// A kind this build does not know.
    #[error("the entry {0} was written by a newer version of the server; upgrade this one")]
    Unknown(String),
}

impl View {
    /// Reads stored entries: key, the revision that wrote it, bytes. Any order will do.
    ///
    /// # Errors
    /// When an entry cannot be read or is not known.
    pub fn load(
        entries: impl IntoIterator<Item = (Vec<u8>, Revision, Vec<u8>)>,
    ) -> Result<Self, LoadError> {
        let mut view = Self::default();
        // Releases first: the capacity a replica uses is its release's.
        let mut later = Vec::new();
        for (key, revision, value) in entries {
            let name = || String::from_utf8_lossy(&key).into_owned();
            let change = Change::decode(&key, &value)
                .map_err(|source| LoadError::Bad { key: name(), source })?
                .ok_or_else(|| LoadError::Unknown(name()))?;
            if matches!(change, Change::PutReplica(_)) {
                later.push((change, revision));
            } else {
                view.apply(&change, revision);
            }
        }
        for (change, revision) in later {
            view.apply(&change, revision);
        }
        Ok(view)
    }

    /// Carries out a change.
    pub fn apply(&mut self, change: &Change, revision: Revision) {
        self.revision = self.revision.max(revision);
        match change {
            Change::PutCluster(record) => self.cluster = record.clone(),
            Change::PutDeployment(deployment) => {
                let mut deployment = Deployment::clone(deployment);
                deployment.revision = revision;
                let name = (deployment.namespace.clone(), deployment.name.clone());
                self.deployment_names.insert_mut(name, deployment.uid.clone());
                self.deployments.insert_mut(deployment.uid.clone(), Arc::new(deployment));
            }
            Change::DeleteDeployment(uid) => {
                if let Some(old) = self.deployments.get(uid).cloned() {
                    self.deployment_names.remove_mut(&(old.namespace.clone(), old.name.clone()));
                    self.deployments.remove_mut(uid);
                }
            }
            Change::PutRelease(release) => {
                let mut release = Release::clone(release);
                release.revision = revision;
                let key = (release.deployment.clone(), release.number);
                self.releases.insert_mut(key, Arc::new(release));
            }
            Change::DeleteRelease(uid, number) => {
                self.releases.remove_mut(&(uid.clone(), *number));
            }
            Change::PutReplica(replica) => self.put_replica(replica, revision),
            Change::DeleteReplica(uid) => {
                if let Some(old) = self.replicas.get(uid).cloned() {
                    self.replicas.remove_mut(uid);
                    index_remove(&mut self.by_host, &old.host, uid);
                    index_remove(&mut self.by_deployment, &old.deployment, uid);
                    if !bug!(CapacityNotGivenBack) {
                        self.reckon(&old.host);
                    }
                }
            }
            Change::PutHost(host) => {
                let mut host = Host::clone(host);
                host.revision = revision;
                if let Some(old) = self.hosts.get(&host.uid) {
                    let name = old.name.clone();
                    if self.host_names.get(&name) == Some(&host.uid) {
                        self.host_names.remove_mut(&name);
                    }
                }
                // A tombstone does not hold its name.
                if !host.is_removed() {
                    self.host_names.insert_mut(host.name.clone(), host.uid.clone());
                }
                let host = Arc::new(host);
                self.capacity.put_host(self.hosts.get(&host.uid), &host);
                self.hosts.insert_mut(host.uid.clone(), host);
            }
            Change::SetGeneration(host, generation) => {
                self.generations.insert_mut(host.clone(), *generation);
            }
            Change::PutModel(record) => {
                let meta = record.meta.clone().unwrap_or_default();
                self.model_names.insert_mut((meta.namespace, meta.name), meta.uid.clone());
                self.models.insert_mut(meta.uid, Kept { record: Arc::clone(record), revision });
            }
            Change::PutVersion(record) => {
                let version = record.version.clone().unwrap_or_default();
                self.versions.insert_mut(
                    (version.model_uid, version.version),
                    Kept { record: Arc::clone(record), revision },
                );
            }
            Change::DeleteVersion(model, version) => {
                self.versions.remove_mut(&(model.clone(), version.clone()));
            }
            Change::PutJoinToken(record) => {
                let id = record.token.as_ref().map(|t| t.id.clone()).unwrap_or_default();
                self.join_tokens.insert_mut(id, Kept { record: Arc::clone(record), revision });
            }
            Change::DeleteJoinToken(id) => {
                self.join_tokens.remove_mut(id);
            }
            Change::PutUser(record) => {
                let meta = record.meta.clone().unwrap_or_default();
                self.user_names.insert_mut(meta.name, meta.uid.clone());
                self.users.insert_mut(meta.uid, Kept { record: Arc::clone(record), revision });
            }
            Change::PutUserToken(record) => {
                self.user_tokens
                    .insert_mut(record.id.clone(), Kept { record: Arc::clone(record), revision });
            }
            Change::DeleteUserToken(id) => {
                self.user_tokens.remove_mut(id);
            }
            Change::PutRequest(record) => {
                self.requests
                    .insert_mut(record.key.clone(), Kept { record: Arc::clone(record), revision });
            }
            Change::DeleteRequest(key) => {
                self.requests.remove_mut(key);
            }
            Change::AppendEvent(event) => {
                self.next_event = self.next_event.max(event.sequence + 1);
            }
            Change::DeleteEvent(_)
            | Change::AppendAudit(_)
            | Change::DeleteAudit(_)
            | Change::AppendAliasMove(_) => {}
        }
    }

    fn put_replica(&mut self, replica: &Replica, revision: Revision) {
        let mut replica = replica.clone();
        replica.revision = revision;
        let replica = Arc::new(replica);
        let uid = &replica.uid;
        let old = self.replicas.get(uid).cloned();
        self.replicas.insert_mut(uid.clone(), Arc::clone(&replica));
        let Some(old) = old else {
            index_insert(&mut self.by_host, &replica.host, uid);
            index_insert(&mut self.by_deployment, &replica.deployment, uid);
            return self.add_use(&replica);
        };
        if old.deployment != replica.deployment {
            index_remove(&mut self.by_deployment, &old.deployment, uid);
            index_insert(&mut self.by_deployment, &replica.deployment, uid);
        }
        if old.host != replica.host {
            index_remove(&mut self.by_host, &old.host, uid);
            index_insert(&mut self.by_host, &replica.host, uid);
            self.reckon(&old.host);
        }
        if taken(&old) != taken(&replica) {
            self.reckon(&replica.host);
        }
    }

    /// Adds a new replica to its host's use; what cannot be added alone is worked out anew.
    fn add_use(&mut self, replica: &Replica) {
        let held = self.capacity.used(&replica.host);
        if replica.replaces.is_some() || held.is_some_and(|u| u.replacing > 0) {
            return self.reckon(&replica.host);
        }
        let mut used = held.map(|u| HostUse::clone(u)).unwrap_or_default();
        used.replicas += 1;
        if let Some(release) = self.amounts_of(replica) {
            used.add_amounts(&release.spec);
        }
        self.capacity.put_use(&replica.host, self.hosts.get(&replica.host), used);
    }

    /// The release whose amounts a replica takes; what an orphan takes is not known.
    fn amounts_of(&self, replica: &Replica) -> Option<&Arc<Release>> {
        match replica.intent {
            ReplicaIntent::Orphan => None,
            ReplicaIntent::Stop if bug!(CapacityGivenBackEarly) => None,
            ReplicaIntent::Unspecified | ReplicaIntent::Run | ReplicaIntent::Stop => {
                self.release(&replica.deployment, replica.release)
            }
        }
    }

    /// What would be used of a host if this replica were not there.
    #[must_use]
    pub fn use_beside(&self, host: &HostUid, replica: &ReplicaUid) -> HostUse {
        self.work_out(host, BTreeSet::from([replica.clone()]))
    }

    fn worked_out(&self, host: &HostUid) -> HostUse {
        self.work_out(host, BTreeSet::new())
    }

    fn work_out(&self, host: &HostUid, mut replaced: BTreeSet<ReplicaUid>) -> HostUse {
        let mut used = HostUse::default();
        for replica in self.replicas_on(host) {
            used.replicas += 1;
            if let Some(old) = &replica.replaces {
                used.replacing += 1;
                replaced.insert(old.clone());
            }
        }
        for replica in self.replicas_on(host).filter(|r| !replaced.contains(&r.uid)) {
            let Some(release) = self.amounts_of(replica) else { continue };
            let mut amounts = HostUse::default();
            amounts.add_amounts(&release.spec);
            // The two never run side by side, but either may: the new one, or the old one again.
            let old = replica.replaces.as_ref().and_then(|old| self.replicas.get(old));
            if let Some(before) = old.and_then(|old| self.amounts_of(old)) {
                let most = before.spec.resources;
                let now = &mut amounts.used;
                now.cpu_millis = now.cpu_millis.max(most.cpu_millis);
                now.memory_bytes = now.memory_bytes.max(most.memory_bytes);
                now.gpu_memory_bytes = now.gpu_memory_bytes.max(most.gpu_memory_bytes);
                let ports = &before.spec.ports;
                amounts.ports.extend(ports.iter().filter_map(|p| Some(p.publish.as_ref()?.port)));
            }
            used.add_all(&amounts);
        }
        used
    }

    /// Works out a host's use anew from the replicas on it.
    fn reckon(&mut self, host: &HostUid) {
        let used = self.worked_out(host);
        self.capacity.put_use(host, self.hosts.get(host), used);
    }

    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.cluster.epoch)
    }

    /// A host, removed ones included.
    #[must_use]
    pub fn host(&self, uid: &HostUid) -> Option<&Arc<Host>> {
        self.hosts.get(uid)
    }

    /// A host that was not removed, by name.
    #[must_use]
    pub fn host_by_name(&self, name: &str) -> Option<&Arc<Host>> {
        let name: Name = name.parse().ok()?;
        self.hosts.get(self.host_names.get(&name)?)
    }

    /// Hosts that were not removed, by uid.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.hosts.values().filter(|h| !h.is_removed())
    }

    /// Hosts that were ever known, removed ones included.
    #[must_use]
    pub fn host_count(&self) -> usize {
        self.hosts.size()
    }

    /// Number of a host's set.
    #[must_use]
    pub fn generation(&self, host: &HostUid) -> Generation {
        self.generations.get(host).copied().unwrap_or_default()
    }

    /// What is used of a host.
    #[must_use]
    pub fn host_use(&self, host: &HostUid) -> Arc<HostUse> {
        self.capacity.used(host).cloned().unwrap_or_default()
    }

    /// Hosts by room and by label.
    #[must_use]
    pub fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// A deployment.
    #[must_use]
    pub fn deployment(&self, uid: &DeploymentUid) -> Option<&Arc<Deployment>> {
        self.deployments.get(uid)
    }

    /// A deployment by name.
    #[must_use]
    pub fn deployment_by_name(
        &self,
        namespace: &Namespace,
        name: &Name,
    ) -> Option<&Arc<Deployment>> {
        self.deployments.get(self.deployment_names.get(&(namespace.clone(), name.clone()))?)
    }

    /// All deployments by namespace and name.
    pub fn deployments(&self) -> impl Iterator<Item = &Arc<Deployment>> {
        self.deployment_names.values().filter_map(|uid| self.deployments.get(uid))
    }

    /// A release.
    #[must_use]
    pub fn release(&self, uid: &DeploymentUid, number: ReleaseNumber) -> Option<&Arc<Release>> {
        self.releases.get(&(uid.clone(), number))
    }

    /// A deployment's releases, oldest first.
    pub fn releases_of<'a>(
        &'a self,
        uid: &DeploymentUid,
    ) -> impl Iterator<Item = &'a Arc<Release>> + use<'a> {
        let from = (uid.clone(), ReleaseNumber(0));
        let to = (uid.clone(), ReleaseNumber(u64::MAX));
        self.releases.range(from..=to).map(|(_, release)| release)
    }

    /// A replica.
    #[must_use]
    pub fn replica(&self, uid: &ReplicaUid) -> Option<&Arc<Replica>> {
        self.replicas.get(uid)
    }

    /// All replicas by uid.
    pub fn replicas(&self) -> impl Iterator<Item = &Arc<Replica>> {
        self.replicas.values()
    }

    /// Replicas on a host, by uid.
    pub fn replicas_on(&self, host: &HostUid) -> impl Iterator<Item = &Arc<Replica>> {
        self.by_host
            .get(host)
            .into_iter()
            .flat_map(|set| set.iter())
            .filter_map(|uid| self.replicas.get(uid))
    }

    /// Replicas of a deployment, by uid.
    pub fn replicas_of(&self, uid: &DeploymentUid) -> impl Iterator<Item = &Arc<Replica>> {
        self.by_deployment
            .get(uid)
            .into_iter()
            .flat_map(|set| set.iter())
            .filter_map(|uid| self.replicas.get(uid))
    }

    /// A model by name.
    #[must_use]
    pub fn model(&self, namespace: &str, name: &str) -> Option<&Kept<record::ModelRecord>> {
        self.models.get(self.model_names.get(&(namespace.to_owned(), name.to_owned()))?)
    }

    /// All models by namespace and name.
    pub fn models(&self) -> impl Iterator<Item = &Kept<record::ModelRecord>> {
        self.model_names.values().filter_map(|uid| self.models.get(uid))
    }

    /// A version by its model's uid and its name.
    #[must_use]
    pub fn version(&self, model: &str, version: &str) -> Option<&Kept<record::ModelVersionRecord>> {
        self.versions.get(&(model.to_owned(), version.to_owned()))
    }

    /// A model's versions, by name.
    pub fn versions_of<'a>(
        &'a self,
        model: &'a str,
    ) -> impl Iterator<Item = &'a Kept<record::ModelVersionRecord>> {
        self.versions
            .range((model.to_owned(), String::new())..)
            .take_while(move |((uid, _), _)| uid == model)
            .map(|(_, kept)| kept)
    }

    /// All versions.
    pub fn versions(&self) -> impl Iterator<Item = &Kept<record::ModelVersionRecord>> {
        self.versions.values()
    }

    /// A join token by its public part.
    #[must_use]
    pub fn join_token(&self, id: &str) -> Option<&Kept<record::JoinTokenRecord>> {
        self.join_tokens.get(id)
    }

    /// All join tokens.
    pub fn join_tokens(&self) -> impl Iterator<Item = &Kept<record::JoinTokenRecord>> {
        self.join_tokens.values()
    }

    /// A user by name.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<&Kept<record::UserRecord>> {
        self.users.get(self.user_names.get(name)?)
    }

    /// A user by uid.
    #[must_use]
    pub fn user_by_uid(&self, uid: &str) -> Option<&Kept<record::UserRecord>> {
        self.users.get(uid)
    }

    /// All users by name.
    pub fn users(&self) -> impl Iterator<Item = &Kept<record::UserRecord>> {
        self.user_names.values().filter_map(|uid| self.users.get(uid))
    }

    /// A user's token by its public part.
    #[must_use]
    pub fn user_token(&self, id: &str) -> Option<&Kept<record::UserTokenRecord>> {
        self.user_tokens.get(id)
    }

    /// All user tokens.
    pub fn user_tokens(&self) -> impl Iterator<Item = &Kept<record::UserTokenRecord>> {
        self.user_tokens.values()
    }

    /// A kept request.
    #[must_use]
    pub fn request(&self, key: &str) -> Option<&Kept<record::RequestRecord>> {
        self.requests.get(key)
    }

    /// All kept requests.
    pub fn requests(&self) -> impl Iterator<Item = &Kept<record::RequestRecord>> {
        self.requests.values()
    }

    /// What an object of this key was last written at; 0: it is not there. For preconditions.
    #[must_use]
    pub fn revision_of(&self, object: &ObjectKey) -> Revision {
        let found = match object {
            ObjectKey::Deployment(uid) => self.deployments.get(uid).map(|d| d.revision),
            ObjectKey::DeploymentName(namespace, name) => {
                self.deployment_by_name(namespace, name).map(|d| d.revision)
            }
            ObjectKey::Host(uid) => self.hosts.get(uid).map(|h| h.revision),
            ObjectKey::HostName(name) => self.host_by_name(name.as_str()).map(|h| h.revision),
            ObjectKey::Replica(uid) => self.replicas.get(uid).map(|r| r.revision),
            ObjectKey::ModelName(namespace, name) => {
                self.model(namespace, name).map(|m| m.revision)
            }
            ObjectKey::Version(model, version) => self.version(model, version).map(|v| v.revision),
            ObjectKey::JoinToken(id) => self.join_token(id).map(|t| t.revision),
            ObjectKey::UserName(name) => self.user(name).map(|u| u.revision),
            ObjectKey::UserToken(id) => self.user_token(id).map(|t| t.revision),
            ObjectKey::Request(key) => self.request(key).map(|r| r.revision),
        };
        found.unwrap_or_default()
    }

    /// The capacity index, built anew from hosts, releases and replicas; must equal the one kept.
    #[must_use]
    pub fn rebuilt_capacity(&self) -> Capacity {
        let mut capacity = Capacity::default();
        for host in self.hosts.values() {
            capacity.put_host(None, host);
        }
        for host in self.by_host.keys() {
            capacity.put_use(host, self.hosts.get(host), self.worked_out(host));
        }
        capacity
    }
}

/// What of a replica decides what it takes of its host.
fn taken(
    replica: &Replica,
) -> (&HostUid, &DeploymentUid, ReleaseNumber, Option<&ReplicaUid>, bool) {
    let orphan = replica.intent == ReplicaIntent::Orphan
        || (bug!(CapacityGivenBackEarly) && replica.intent == ReplicaIntent::Stop);
    (&replica.host, &replica.deployment, replica.release, replica.replaces.as_ref(), orphan)
}

/// Names an object in a precondition.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ObjectKey {
    Deployment(DeploymentUid),
    DeploymentName(Namespace, Name),
    Host(HostUid),
    HostName(Name),
    Replica(ReplicaUid),
    ModelName(String, String),
    Version(String, String),
    JoinToken(String),
    UserName(String),
    UserToken(String),
    Request(String),
}

fn index_insert<K: Clone + Ord>(index: &mut Map<K, Set<ReplicaUid>>, key: &K, uid: &ReplicaUid) {
    let mut set = index.get(key).cloned().unwrap_or_default();
    set.insert_mut(uid.clone());
    index.insert_mut(key.clone(), set);
}

fn index_remove<K: Clone + Ord>(index: &mut Map<K, Set<ReplicaUid>>, key: &K, uid: &ReplicaUid) {
    if let Some(set) = index.get(key) {
        let set = set.remove(uid);
        if set.is_empty() {
            index.remove_mut(key);
        } else {
            index.insert_mut(key.clone(), set);
        }
    }
}
