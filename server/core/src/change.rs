//! The words the ledger is written in.
//!
//! A change is one object's new state; its key and bytes are what the store keeps. Keys are readable
//! and sort by kind, then by uid.

use crate::objects::{BadRecord, Deployment, Host, Release, Replica};
use berth_proto::convert::Problems;
use berth_proto::ids::{DeploymentUid, Generation, HostUid, ReleaseNumber, ReplicaUid};
use berth_proto::record;
use prost::Message as _;
use std::sync::Arc;

/// One object's new state.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The cluster's own record.
    PutCluster(record::ClusterRecord),
    /// A deployment is as given.
    PutDeployment(Arc<Deployment>),
    /// A deployment has ended. Its releases are deleted by changes of their own in the same write.
    DeleteDeployment(DeploymentUid),
    /// A release is as given.
    PutRelease(Arc<Release>),
    /// A release is forgotten.
    DeleteRelease(DeploymentUid, ReleaseNumber),
    /// A replica is as given.
    PutReplica(Arc<Replica>),
    /// Nothing of a replica is left.
    DeleteReplica(ReplicaUid),
    /// A host is as given.
    PutHost(Arc<Host>),
    /// A host's set has this number. Made by the batching machine alone.
    SetGeneration(HostUid, Generation),
    /// A model is as given.
    PutModel(Arc<record::ModelRecord>),
    /// A version is as given.
    PutVersion(Arc<record::ModelVersionRecord>),
    /// A version is gone: model's uid and version's name.
    DeleteVersion(String, String),
    /// A move of an alias, kept for ever. The batching machine gives the revision.
    AppendAliasMove(record::AliasMoveRecord),
    /// A join token is as given.
    PutJoinToken(Arc<record::JoinTokenRecord>),
    /// A join token is forgotten.
    DeleteJoinToken(String),
    /// A user is as given.
    PutUser(Arc<record::UserRecord>),
    /// A user's token is as given.
    PutUserToken(Arc<record::UserTokenRecord>),
    /// A user's token is forgotten.
    DeleteUserToken(String),
    /// The result of a request.
    PutRequest(Arc<record::RequestRecord>),
    /// A request's result is forgotten.
    DeleteRequest(String),
    /// Something happened. The batching machine gives the sequence.
    AppendEvent(berth_proto::api::Event),
    /// An event is forgotten.
    DeleteEvent(u64),
    /// Somebody changed something. The batching machine gives the revision.
    AppendAudit(record::AuditRecord),
    /// An audit entry is forgotten.
    DeleteAudit(u64),
}

/// An object as the audit log names it: `kind/namespace/name@uid`, without a namespace
/// `kind/name@uid`. A later holder of the name is another one.
#[must_use]
pub fn audited(kind: &str, namespace: Option<&str>, name: &str, uid: &str) -> String {
    match namespace {
        Some(namespace) => format!("{kind}/{namespace}/{name}@{uid}"),
        None => format!("{kind}/{name}@{uid}"),
    }
}

/// What a change is about, put or deleted alike: for whoever asks no more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject<'a> {
    /// The cluster's own record.
    Cluster,
    /// A deployment.
    Deployment(&'a DeploymentUid),
    /// A release of this deployment.
    Release(&'a DeploymentUid),
    /// A replica.
    Replica(&'a ReplicaUid),
    /// A host.
    Host(&'a HostUid),
    /// The number of this host's set.
    HostSet(&'a HostUid),
    /// Models, their versions and aliases.
    Models,
    /// Who may do what: users and tokens.
    Access,
    /// What has happened: kept answers, events, the audit log.
    Past,
}

/// A stored key and its bytes; `None`: the key is deleted.
pub type Encoded = (Vec<u8>, Option<Vec<u8>>);

impl Change {
    /// What it is about.
    #[must_use]
    pub fn subject(&self) -> Subject<'_> {
        match self {
            Self::PutCluster(_) => Subject::Cluster,
            Self::PutDeployment(d) => Subject::Deployment(&d.uid),
            Self::DeleteDeployment(uid) => Subject::Deployment(uid),
            Self::PutRelease(r) => Subject::Release(&r.deployment),
            Self::DeleteRelease(uid, _) => Subject::Release(uid),
            Self::PutReplica(r) => Subject::Replica(&r.uid),
            Self::DeleteReplica(uid) => Subject::Replica(uid),
            Self::PutHost(h) => Subject::Host(&h.uid),
            Self::SetGeneration(host, _) => Subject::HostSet(host),
            Self::PutModel(_)
            | Self::PutVersion(_)
            | Self::DeleteVersion(..)
            | Self::AppendAliasMove(_) => Subject::Models,
            Self::PutJoinToken(_)
            | Self::DeleteJoinToken(_)
            | Self::PutUser(_)
            | Self::PutUserToken(_)
            | Self::DeleteUserToken(_) => Subject::Access,
            Self::PutRequest(_)
            | Self::DeleteRequest(_)
            | Self::AppendEvent(_)
            | Self::DeleteEvent(_)
            | Self::AppendAudit(_)
            | Self::DeleteAudit(_) => Subject::Past,
        }
    }

    /// The replica it writes, if it writes one.
    #[must_use]
    pub fn replica(&self) -> Option<&ReplicaUid> {
        match self.subject() {
            Subject::Replica(uid) => Some(uid),
            Subject::Cluster
            | Subject::Deployment(_)
            | Subject::Release(_)
            | Subject::Host(_)
            | Subject::HostSet(_)
            | Subject::Models
            | Subject::Access
            | Subject::Past => None,
        }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Self::PutCluster(_) => "cluster".to_owned(),
            Self::PutDeployment(d) => format!("deployment/{}", d.uid),
            Self::DeleteDeployment(uid) => format!("deployment/{uid}"),
            Self::PutRelease(r) => format!("release/{}/{:020}", r.deployment, r.number.0),
            Self::DeleteRelease(uid, number) => format!("release/{uid}/{:020}", number.0),
            Self::PutReplica(r) => format!("replica/{}", r.uid),
            Self::DeleteReplica(uid) => format!("replica/{uid}"),
            Self::PutHost(h) => format!("host/{}", h.uid),
            Self::SetGeneration(host, _) => format!("hostset/{host}"),
            Self::PutModel(m) => format!("model/{}", meta_uid(m.meta.as_ref())),
            Self::PutVersion(v) => {
                let v = v.version.clone().unwrap_or_default();
                format!("version/{}/{}", v.model_uid, v.version)
            }
            Self::DeleteVersion(model, version) => format!("version/{model}/{version}"),
            Self::AppendAliasMove(m) => {
                let time = m.move_time_unix_ms();
                let alias = m.r#move.as_ref().map(|m| m.alias.as_str()).unwrap_or_default();
                // By time first, as it was when only the time told moves apart.
                format!("aliasmove/{}/{time:020}/{:020}/{alias}", m.model_uid, m.revision)
            }
            Self::PutJoinToken(t) => {
                let id = t.token.as_ref().map(|t| t.id.as_str()).unwrap_or_default();
                format!("jointoken/{id}")
            }
            Self::DeleteJoinToken(id) => format!("jointoken/{id}"),
            Self::PutUser(u) => format!("user/{}", meta_uid(u.meta.as_ref())),
            Self::PutUserToken(t) => format!("usertoken/{}", t.id),
            Self::DeleteUserToken(id) => format!("usertoken/{id}"),
            Self::PutRequest(r) => format!("request/{}", r.key),
            Self::DeleteRequest(key) => format!("request/{key}"),
            Self::AppendEvent(e) => format!("event/{:020}", e.sequence),
            Self::DeleteEvent(sequence) => format!("event/{sequence:020}"),
            Self::AppendAudit(a) => format!("audit/{:020}", a.revision),
            Self::DeleteAudit(revision) => format!("audit/{revision:020}"),
        }
    }

    /// Key and bytes.
    #[must_use]
    pub fn encode(&self) -> Encoded {
        let value = match self {
            Self::PutCluster(r) => Some(r.encode_to_vec()),
            Self::PutDeployment(d) => Some(d.record.encode_to_vec()),
            Self::PutRelease(r) => Some(r.to_record().encode_to_vec()),
            Self::PutReplica(r) => Some(r.to_record().encode_to_vec()),
            Self::PutHost(h) => Some(h.record.encode_to_vec()),
            Self::SetGeneration(host, generation) => Some(
                record::HostSetRecord { host_uid: host.to_string(), generation: generation.0 }
                    .encode_to_vec(),
            ),
            Self::PutModel(r) => Some(r.encode_to_vec()),
            Self::PutVersion(r) => Some(r.encode_to_vec()),
            Self::AppendAliasMove(r) => Some(r.encode_to_vec()),
            Self::PutJoinToken(r) => Some(r.encode_to_vec()),
            Self::PutUser(r) => Some(r.encode_to_vec()),
            Self::PutUserToken(r) => Some(r.encode_to_vec()),
            Self::PutRequest(r) => Some(r.encode_to_vec()),
            Self::AppendEvent(event) => {
                Some(record::EventRecord { event: Some(event.clone()) }.encode_to_vec())
            }
            Self::AppendAudit(r) => Some(r.encode_to_vec()),
            Self::DeleteDeployment(_)
            | Self::DeleteRelease(..)
            | Self::DeleteReplica(_)
            | Self::DeleteVersion(..)
            | Self::DeleteJoinToken(_)
            | Self::DeleteUserToken(_)
            | Self::DeleteRequest(_)
            | Self::DeleteEvent(_)
            | Self::DeleteAudit(_) => None,
        };
        (self.key().into_bytes(), value)
    }

    /// Reads what [`Change::encode`] wrote; `None` for a kind this build does not know.
    ///
    /// # Errors
    /// When the bytes are not what the key says.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Option<Self>, BadRecord> {
        let key = String::from_utf8_lossy(key);
        let kind = key.split('/').next().unwrap_or_default();
        Ok(Some(match kind {
            "cluster" => Self::PutCluster(read("cluster", value)?),
            "deployment" => {
                Self::PutDeployment(Arc::new(Deployment::new(read("deployment", value)?)?))
            }
            "release" => Self::PutRelease(Arc::new(Release::new(read("release", value)?)?)),
            "replica" => Self::PutReplica(Arc::new(Replica::new(&read("replica", value)?)?)),
            "host" => Self::PutHost(Arc::new(Host::new(read("host", value)?)?)),
            "hostset" => {
                let set: record::HostSetRecord = read("host set", value)?;
                let mut p = Problems::default();
                match p.take("host_uid", set.host_uid.parse()) {
                    Some(host) => Self::SetGeneration(host, Generation(set.generation)),
                    None => return Err(BadRecord { kind: "host set", problems: p }),
                }
            }
            "model" => Self::PutModel(Arc::new(read("model", value)?)),
            "version" => Self::PutVersion(Arc::new(read("version", value)?)),
            "aliasmove" => Self::AppendAliasMove(read("alias move", value)?),
            "jointoken" => Self::PutJoinToken(Arc::new(read("join token", value)?)),
            "user" => Self::PutUser(Arc::new(read("user", value)?)),
            "usertoken" => Self::PutUserToken(Arc::new(read("user token", value)?)),
            "request" => Self::PutRequest(Arc::new(read("request", value)?)),
            "event" => {
                let event: record::EventRecord = read("event", value)?;
                Self::AppendEvent(event.event.unwrap_or_default())
            }
            "audit" => Self::AppendAudit(read("audit entry", value)?),
            _ => return Ok(None),
        }))
    }
}

fn meta_uid(meta: Option<&record::Meta>) -> &str {
    meta.map(|m| m.uid.as_str()).unwrap_or_default()
}

fn read<M: prost::Message + Default>(kind: &'static str, value: &[u8]) -> Result<M, BadRecord> {
    let mut p = Problems::default();
    match p.take("", M::decode(value)) {
        Some(message) => Ok(message),
        None => Err(BadRecord { kind, problems: p }),
    }
}

trait MoveTime {
    fn move_time_unix_ms(&self) -> i64;
}

impl MoveTime for record::AliasMoveRecord {
    fn move_time_unix_ms(&self) -> i64 {
        let time = self.r#move.as_ref().and_then(|m| m.time.as_ref());
        time.map(|t| berth_proto::convert::wall(t).0).unwrap_or_default()
    }
}
