//! Who calls, and whether they may: before any handler runs, and for the other doors.

use super::standing::Standing;
use crate::cluster::{Cluster, wall_now};
use crate::doors::{PeerAddr, PeerCerts};
use crate::error::Error;
use crate::gateway::http::{Forbidden, Guard};
use crate::identity::ca::BACKDATE_SECONDS;
use crate::identity::roles::{self, Needs};
use crate::identity::tokens;
use crate::registry::access::{
    Access, AccessError, Action, Credentials, Noted, Noting, PeerCertificates, Principal,
    Protected, Reach, credentials,
};
use crate::registry::names::{Reference, RepoName};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use berth_proto::api::{ReplicaIntent, Role, RoleBinding};
use berth_proto::ids::{Digest, HostUid};
use berth_proto::record::UserRecord;
use berth_proto::tls::{self, SpiffeId, Subject};
use berth_server_core::batching::Proposal;
use berth_server_core::view::Kept;
use rustls::pki_types::CertificateDer;
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::Status;

/// Who calls.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// `user/<name>`, `host/<uid>` or empty.
    pub subject: String,
    /// The host, when it is one.
    pub host: Option<HostUid>,
    /// The key of the certificate, for hosts.
    pub public_key: Vec<u8>,
    /// What a user may do.
    pub bindings: Vec<RoleBinding>,
    /// When what was shown ends (grant, token and certificate: the first), milliseconds since 1970;
    /// 0: not a user.
    pub expires: i64,
    /// Uid of the user, when it is one.
    pub uid: String,
    /// Public part of the token that was shown; empty: none.
    pub token: String,
    /// Only this deployment's gateway; empty: all.
    pub deployment: String,
    /// The certificate that was shown; `None`: a token, or nothing.
    pub certificate: Option<Arc<CertificateDer<'static>>>,
    /// Address.
    pub peer: String,
}

impl Caller {
    /// Whether it has a role in a namespace (empty: in all).
    ///
    /// # Errors
    /// What would be needed.
    pub fn require(&self, role: Role, namespace: &str) -> Result<(), Error> {
        if roles::has_role(&self.bindings, role, namespace) {
            return Ok(());
        }
        let place = if namespace.is_empty() {
            "all namespaces".to_owned()
        } else {
            format!("namespace \"{namespace}\"")
        };
        Err(self.lacks(role, &place))
    }

    fn lacks(&self, role: Role, place: &str) -> Error {
        let role = role.as_str_name().trim_start_matches("ROLE_").to_ascii_lowercase();
        Error::denied("ROLE_NEEDED", format!("{} needs the role {role} in {place}", self.subject))
    }

    /// Whether it may have a repository's contents run (whoever may pull them) or registered (whoever
    /// may push there: a registered version cannot be overwritten any more).
    ///
    /// # Errors
    /// When it may not.
    pub fn require_repository(&self, repository: &RepoName, action: Action) -> Result<(), Error> {
        if roles::may_in_repository(&self.bindings, repository, action) {
            return Ok(());
        }
        let message = format!("{} may not use what is in {repository}", self.subject);
        Err(Error::denied("ROLE_NEEDED", message))
    }

    /// Whether a namespace may be read.
    #[must_use]
    pub fn sees(&self, namespace: &str) -> bool {
        roles::has_role(&self.bindings, Role::Viewer, namespace)
    }
}

fn unknown_user(name: &str) -> Error {
    Error::Unauthenticated {
        reason: "USER_UNKNOWN",
        message: format!("the user \"{name}\" is not known here, revoked or expired"),
    }
}

fn user_of(kept: &Kept<UserRecord>) -> Result<Caller, Error> {
    let record = &kept.record;
    let meta = record.meta.clone().unwrap_or_default();
    if record.revoked || record.expire_unix_ms <= wall_now().0 {
        return Err(unknown_user(&meta.name));
    }
    Ok(Caller {
        subject: format!("user/{}", meta.name),
        bindings: record.bindings.clone(),
        expires: record.expire_unix_ms,
        uid: meta.uid,
        ..Caller::default()
    })
}

fn user(cluster: &Cluster, name: &str) -> Result<Caller, Error> {
    let view = cluster.ledger.view();
    user_of(view.user(name).ok_or_else(|| unknown_user(name))?)
}

fn bad_token(why: tokens::BadToken) -> Error {
    Error::Unauthenticated { reason: why.reason(), message: why.to_string() }
}

fn by_token(cluster: &Cluster, text: &str) -> Result<Caller, Error> {
    let unknown = || bad_token(tokens::BadToken::Unknown);
    let (id, secret) = tokens::read_user(text).ok_or_else(unknown)?;
    let view = cluster.ledger.view();
    let record = view.user_token(id).map(|kept| Arc::clone(&kept.record));
    tokens::judge_user(record.as_deref(), secret, wall_now()).map_err(bad_token)?;
    let record = record.ok_or_else(unknown)?;
    // By uid: a new user of the same name has not been given the old one's tokens.
    let owner = user_of(view.user_by_uid(&record.user_uid).ok_or_else(unknown)?)?;
    Ok(Caller {
        deployment: record.deployment.clone(),
        expires: owner.expires.min(record.expire_unix_ms),
        token: record.id.clone(),
        ..owner
    })
}

/// Whether the root that has signed the certificate of whoever was let in is still one.
///
/// # Errors
/// When it was retired.
pub fn root_stands(cluster: &Cluster, caller: &Caller) -> Result<(), Error> {
    if caller.certificate.as_ref().is_none_or(|leaf| cluster.roots.stand_for(leaf)) {
        return Ok(());
    }
    // An agent renews its certificate before it dials.
    let again = || Error::unavailable("ROOT_RETIRED", "its root was retired; dial again");
    Err(caller.host.as_ref().map_or_else(root_retired, |_| again()))
}

/// Judges a user or host again that was let in before.
///
/// # Errors
/// Why it would not be let in now.
pub fn still_stands(cluster: &Cluster, caller: &Caller) -> Result<(), Error> {
    let view = cluster.ledger.view();
    root_stands(cluster, caller)?;
    if let Some(uid) = &caller.host {
        return match view.host(uid).is_none_or(|host| host.is_removed()) {
            true => Err(Error::denied("HOST_REMOVED", "the host was removed from its cluster")),
            false => Ok(()),
        };
    }
    let name = caller.subject.strip_prefix("user/").unwrap_or_default();
    user_of(view.user_by_uid(&caller.uid).ok_or_else(|| unknown_user(name))?)?;
    if !caller.token.is_empty() {
        let record = view.user_token(&caller.token).map(|kept| &kept.record);
        if record.is_none_or(|record| record.revoked) {
            return Err(bad_token(tokens::BadToken::Revoked));
        }
    }
    if caller.expires <= wall_now().0 {
        return Err(bad_token(tokens::BadToken::Expired));
    }
    Ok(())
}

fn root_retired() -> Error {
    Error::Unauthenticated {
        reason: "ROOT_RETIRED",
        message: "the root that signed this certificate was retired; connect again with one that \
                  `berth context renew` has brought, or with a new context"
            .to_owned(),
    }
}

fn by_certificate(cluster: &Cluster, chain: &[CertificateDer<'static>]) -> Result<Caller, Error> {
    let unknown =
        |message: String| Error::Unauthenticated { reason: "CERTIFICATE_UNKNOWN", message };
    let Some(leaf) = chain.first() else {
        return Err(unknown("no certificate was shown".to_owned()));
    };
    let id = SpiffeId::of(leaf).map_err(|e| unknown(e.to_string()))?;
    if id.cluster != *cluster.roots.cluster() {
        return Err(unknown("the certificate is of another cluster".to_owned()));
    }
    if !cluster.roots.stand_for(leaf) {
        return Err(root_retired());
    }
    match id.subject {
        Subject::Server => Err(unknown("a server's certificate is no caller's".to_owned())),
        Subject::User(name) => {
            let caller = user(cluster, name.as_str())?;
            let (from, until) = tls::validity_of(leaf).map_err(|e| unknown(e.to_string()))?;
            // A certificate made for an earlier user of the name, who was revoked.
            let made =
                cluster.ledger.view().user_by_uid(&caller.uid).and_then(|kept| {
                    kept.record.meta.as_ref().map(|meta| meta.create_unix_ms / 1000)
                });
            if from + BACKDATE_SECONDS < made.unwrap_or_default() {
                return Err(unknown_user(name.as_str()));
            }
            let expires = caller.expires.min(until.saturating_mul(1000));
            Ok(Caller { expires, certificate: Some(Arc::new(leaf.clone())), ..caller })
        }
        Subject::Host(uid) => {
            let public_key = tls::public_key(leaf).map_err(|e| unknown(e.to_string()))?;
            let view = cluster.ledger.view();
            let Some(host) = view.host(&uid) else {
                let since = match view.cluster.observing {
                    true => "; if it joined after the backup that was restored, let it join again",
                    false => "",
                };
                return Err(unknown(format!("no host with this certificate is known{since}")));
            };
            let record = &host.record;
            let known = record.public_key == public_key
                || (!record.next_public_key.is_empty() && record.next_public_key == public_key);
            let made = tls::validity_of(leaf).map_err(|e| unknown(e.to_string()))?.0;
            let made = made + BACKDATE_SECONDS;
            let cluster = &view.cluster;
            let known = known || tokens::is_newer_than_backup(cluster, record, &public_key, made);
            if !known && !host.is_removed() {
                return Err(unknown("this key of the host was retired".to_owned()));
            }
            Ok(Caller {
                subject: format!("host/{uid}"),
                host: Some(uid),
                public_key,
                certificate: Some(Arc::new(leaf.clone())),
                ..Caller::default()
            })
        }
    }
}

/// Who shows these headers and certificates.
///
/// # Errors
/// When what is shown is not good. Nothing shown at all is nobody, not an error.
pub fn caller(
    cluster: &Cluster,
    headers: &http::HeaderMap,
    extensions: &http::Extensions,
) -> Result<Option<Caller>, Error> {
    let bearer = headers
        .get(http::header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let found = if let Some(token) = bearer {
        Some(by_token(cluster, token)?)
    } else if let Some(PeerCerts(chain)) = extensions.get::<PeerCerts>() {
        Some(by_certificate(cluster, chain)?)
    } else {
        None
    };
    let peer = extensions.get::<PeerAddr>().map(|a| a.0.to_string()).unwrap_or_default();
    Ok(found.map(|c| Caller { peer, ..c }))
}

/// Who shows these headers and certificates to a door that takes Basic credentials as well; nobody
/// when they are not good.
pub(super) fn shown(
    cluster: &Cluster,
    headers: &http::HeaderMap,
    extensions: &http::Extensions,
) -> Option<Caller> {
    let chain = extensions.get::<PeerCerts>().map(|certs| certs.0.as_slice());
    let chain = chain.map(|chain| PeerCertificates(chain.into()));
    let shown = credentials(headers, chain.as_ref()).ok()?;
    by_credentials(cluster, &shown).ok()
}

fn by_credentials(cluster: &Cluster, shown: &Credentials) -> Result<Caller, Error> {
    match shown {
        Credentials::Basic { password, .. } => by_token(cluster, password),
        Credentials::Bearer(token) => by_token(cluster, token),
        Credentials::Certificate(chain) => by_certificate(cluster, &chain.0),
    }
}

/// Why a host whose retired key is shown is quarantined.
pub const RETIRED: &str = "a retired key was used: two copies of the host are alive";

/// The host whose retired key this certificate holds, if it does: a copied disk shows itself so.
fn retired_host(cluster: &Cluster, extensions: &http::Extensions) -> Option<HostUid> {
    let leaf = extensions.get::<PeerCerts>()?.0.first()?;
    let id = SpiffeId::of(leaf).ok().filter(|id| id.cluster == *cluster.roots.cluster())?;
    let Subject::Host(uid) = id.subject else { return None };
    let key = tls::public_key(leaf).ok()?;
    let view = cluster.ledger.view();
    let record = &view.host(&uid).filter(|host| !host.is_removed())?.record;
    (tokens::is_retired(record, &key) && !record.quarantined).then_some(uid)
}

/// Checks every call on the control door against the table.
pub async fn check(
    State(cluster): State<Arc<Cluster>>,
    mut request: Request,
    next: Next,
) -> Response {
    let kind = request.headers().get(http::header::CONTENT_TYPE);
    if kind.is_some_and(|kind| !kind.as_bytes().starts_with(b"application/grpc")) {
        let words = "this door speaks gRPC; with buf curl: --protocol grpc\n";
        return (http::StatusCode::UNSUPPORTED_MEDIA_TYPE, words).into_response();
    }
    match admit(&cluster, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller.clone());
            next.run(request).await.map(|body| Standing::wrap(&cluster, caller, body))
        }
        Err(error) => {
            if let Some(host) = retired_host(&cluster, request.extensions()) {
                cluster.quarantine(&host, RETIRED).await;
            }
            Status::from(error).into_http::<axum::body::Body>().into_response()
        }
    }
}

fn admit(cluster: &Cluster, request: &Request) -> Result<Caller, Error> {
    let path = request.uri().path();
    let needs = roles::needs(path).ok_or_else(|| {
        Error::denied("NO_SUCH_CALL", format!("nobody may call {path}; is the client newer?"))
    })?;
    let caller = match caller(cluster, request.headers(), request.extensions()) {
        Ok(caller) => caller,
        Err(_) if needs == Needs::Nobody => None,
        Err(error) => return Err(error),
    };
    let needed = || Error::Unauthenticated {
        reason: "CREDENTIALS_NEEDED",
        message: "a client certificate or a token is needed".to_owned(),
    };
    match needs {
        Needs::Nobody => Ok(caller.unwrap_or_default()),
        Needs::Host => caller
            .filter(|c| c.host.is_some())
            .ok_or_else(|| Error::denied("HOST_NEEDED", "only a host's agent may call this")),
        Needs::User => caller.filter(|c| c.host.is_none()).ok_or_else(needed),
        Needs::Role(role) => {
            let caller = caller.filter(|c| c.host.is_none()).ok_or_else(needed)?;
            // In some namespace; which one is for the handler to check.
            if !caller.deployment.is_empty()
                || !caller.bindings.iter().any(|b| b.role() as i32 >= role as i32)
            {
                caller.require(role, "").map_err(|_| {
                    caller.lacks(role, "the namespace asked for, and has it in none")
                })?;
                return Err(Error::denied("TOKEN_LIMITED", "this token is for a gateway only"));
            }
            Ok(caller)
        }
        Needs::Everywhere(role) => {
            let caller = caller.filter(|c| c.host.is_none()).ok_or_else(needed)?;
            if !caller.deployment.is_empty() {
                return Err(Error::denied("TOKEN_LIMITED", "this token is for a gateway only"));
            }
            caller.require(role, "")?;
            Ok(caller)
        }
        Needs::Exec => {
            let caller = caller.filter(|c| c.host.is_none()).ok_or_else(needed)?;
            if caller.bindings.iter().any(|b| b.exec) && caller.deployment.is_empty() {
                Ok(caller)
            } else {
                Err(Error::denied("EXEC_NEEDED", "the permission to run commands is needed"))
            }
        }
    }
}

/// The caller that [`check`] let in.
pub fn of<T>(request: &tonic::Request<T>) -> Caller {
    request.extensions().get::<Caller>().cloned().unwrap_or_default()
}

/// The gateway's and the registry's guard.
pub struct Doorkeeper(pub Arc<Cluster>);

#[async_trait::async_trait]
impl Guard for Doorkeeper {
    async fn allows(
        &self,
        headers: &http::HeaderMap,
        extensions: &http::Extensions,
        model: Option<&str>,
    ) -> Result<(), Forbidden> {
        let caller = match caller(&self.0, headers, extensions) {
            Ok(Some(caller)) if caller.host.is_none() => caller,
            Ok(_) => return Err(Forbidden::Anonymous),
            Err(error) => return Err(Forbidden::NotGood(error.to_string())),
        };
        let Some(model) = model else { return Ok(()) };
        // Such a token names its deployment as callers do, namespace included.
        if !caller.deployment.is_empty() && caller.deployment != model {
            return Err(Forbidden::NotPermitted(format!(
                "this token is for deployment \"{}\" only",
                caller.deployment
            )));
        }
        let (namespace, _) = model.split_once('.').unwrap_or(("default", model));
        caller.require(Role::Viewer, namespace).map_err(|e| Forbidden::NotPermitted(e.to_string()))
    }
}

#[async_trait::async_trait]
impl Access for Doorkeeper {
    async fn authenticate(&self, credentials: Credentials) -> Result<Principal, AccessError> {
        let caller = by_credentials(&self.0, &credentials).map_err(|_| AccessError::Refused)?;
        if !caller.deployment.is_empty() {
            return Err(AccessError::Refused);
        }
        Ok(Principal { subject: caller.subject, only: None })
    }

    fn allows(&self, principal: &Principal, repository: &RepoName, action: Action) -> bool {
        if let Some(host) = principal.subject.strip_prefix("host/") {
            return action == Action::Pull && !self.assigned(host, repository.as_str()).is_empty();
        }
        let Some(name) = principal.subject.strip_prefix("user/") else { return false };
        let Ok(caller) = user(&self.0, name) else { return false };
        roles::may_in_repository(&caller.bindings, repository, action)
    }

    fn reach(&self, principal: &Principal, repository: &RepoName) -> Reach {
        match principal.subject.strip_prefix("host/") {
            Some(host) => Reach::Below(self.assigned(host, repository.as_str())),
            None => Reach::Whole,
        }
    }

    async fn note(&self, noted: Noted<'_>) -> Result<(), AccessError> {
        let method = match (noted.action, &noted.what) {
            (Action::Push, Noting::Manifest(..)) => "registry/PutManifest",
            (Action::Delete, Noting::Manifest(..)) => "registry/DeleteManifest",
            (Action::Delete, Noting::Blob(_)) => "registry/DeleteBlob",
            // Blobs that no manifest names come to nothing.
            (Action::Push, Noting::Blob(_)) | (Action::Pull, _) => return Ok(()),
        };
        let repository = noted.repository;
        let object = match &noted.what {
            Noting::Manifest(Reference::Tag(tag), Some(digest)) => {
                format!("image/{repository}:{tag}@{digest}")
            }
            Noting::Manifest(Reference::Tag(tag), None) => format!("image/{repository}:{tag}"),
            Noting::Manifest(Reference::Digest(digest), _) => {
                format!("image/{repository}@{digest}")
            }
            Noting::Blob(digest) => format!("blob/{repository}@{digest}"),
        };
        let peer = noted.extensions.get::<PeerAddr>().map(|a| a.0.to_string()).unwrap_or_default();
        let subject = noted.principal.subject.clone();
        let caller = Caller { subject, peer, ..Caller::default() };
        let changes = vec![super::audit(&caller, method, "", vec![object])];
        let proposal = Proposal { preconditions: Vec::new(), changes };
        match self.0.ledger.propose(proposal).await {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, method, "it cannot be written down who does this");
                Err(AccessError::Unavailable)
            }
        }
    }
}

impl Doorkeeper {
    /// What a host's own assignments name in a repository; it reads nothing else.
    fn assigned(&self, host: &str, repository: &str) -> Vec<Digest> {
        let Ok(uid) = host.parse::<HostUid>() else { return Vec::new() };
        let view = self.0.ledger.view();
        if view.host(&uid).is_none_or(|h| h.is_removed()) {
            return Vec::new();
        }
        let digests: BTreeSet<Digest> = view
            .replicas_on(&uid)
            .filter(|r| r.intent != ReplicaIntent::Orphan)
            .filter_map(|r| view.release(&r.deployment, r.release))
            .flat_map(|release| {
                let (image, artifact) = (&release.source.image, release.source.artifact.as_ref());
                let whole = (image.repository == repository).then_some(image);
                let images = whole.into_iter().flat_map(|image| {
                    let platforms = image.platforms.iter().map(|p| p.manifest_digest.clone());
                    platforms.chain([image.digest.clone()])
                });
                let artifact = artifact.filter(|artifact| artifact.repository == repository);
                images.chain(artifact.map(|artifact| artifact.digest.clone()))
            })
            .collect();
        digests.into_iter().collect()
    }
}

impl Protected for Doorkeeper {
    fn protects(&self, repository: &RepoName, reference: &Reference) -> Option<String> {
        let view = self.0.ledger.view();
        view.versions()
            .filter_map(|kept| kept.record.version.as_ref())
            .find(|v| {
                v.repository == repository.as_str()
                    && match reference {
                        Reference::Tag(tag) => v.version == tag.as_str(),
                        Reference::Digest(digest) => v.digest == digest.as_str(),
                    }
            })
            .map(|v| format!("{}:{}", v.model, v.version))
    }
}
