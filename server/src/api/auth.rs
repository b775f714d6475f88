//! Who calls, and whether they may: before any handler runs, and for the other doors.

use crate::cluster::{Cluster, wall_now};
use crate::doors::{PeerAddr, PeerCerts};
use crate::error::Error;
use crate::gateway::http::{Forbidden, Guard};
use crate::identity::roles::{self, Needs};
use crate::identity::tokens;
use crate::registry::access::{Access, AccessError, Action, Credentials, Principal, Protected};
use crate::registry::names::{Reference, RepoName};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use berth_proto::api::{ReplicaIntent, Role, RoleBinding};
use berth_proto::ids::HostUid;
use berth_proto::tls::{self, SpiffeId, Subject};
use rustls::pki_types::CertificateDer;
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
    /// When the grant ends, milliseconds since 1970; 0: not a user.
    pub expires: i64,
    /// Only this deployment's gateway; empty: all.
    pub deployment: String,
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
        Err(Error::denied(
            "ROLE_NEEDED",
            format!(
                "{} needs the role {} in {place}",
                self.subject,
                role.as_str_name().trim_start_matches("ROLE_").to_ascii_lowercase()
            ),
        ))
    }

    /// Whether a namespace may be read.
    #[must_use]
    pub fn sees(&self, namespace: &str) -> bool {
        roles::has_role(&self.bindings, Role::Viewer, namespace)
    }
}

fn user(cluster: &Cluster, name: &str) -> Result<Caller, Error> {
    let view = cluster.ledger.view();
    let unknown = || Error::Unauthenticated {
        reason: "USER_UNKNOWN",
        message: format!("the user \"{name}\" is not known here, revoked or expired"),
    };
    let kept = view.user(name).ok_or_else(unknown)?;
    if kept.record.revoked || kept.record.expire_unix_ms <= wall_now().0 {
        return Err(unknown());
    }
    Ok(Caller {
        subject: format!("user/{name}"),
        bindings: kept.record.bindings.clone(),
        expires: kept.record.expire_unix_ms,
        ..Caller::default()
    })
}

fn by_token(cluster: &Cluster, text: &str) -> Result<Caller, Error> {
    let bad = |why: tokens::BadToken| Error::Unauthenticated {
        reason: why.reason(),
        message: why.to_string(),
    };
    let (id, secret) = tokens::read_user(text).ok_or_else(|| bad(tokens::BadToken::Unknown))?;
    let view = cluster.ledger.view();
    let record = view.user_token(id).map(|kept| Arc::clone(&kept.record));
    tokens::judge_user(record.as_deref(), secret, wall_now()).map_err(bad)?;
    let record = record.ok_or_else(|| bad(tokens::BadToken::Unknown))?;
    let owner = view
        .user_by_uid(&record.user_uid)
        .and_then(|u| u.record.meta.as_ref())
        .map(|m| m.name.clone())
        .unwrap_or_default();
    Ok(Caller { deployment: record.deployment.clone(), ..user(cluster, &owner)? })
}

fn by_certificate(cluster: &Cluster, chain: &[CertificateDer<'static>]) -> Result<Caller, Error> {
    let unknown =
        |message: String| Error::Unauthenticated { reason: "CERTIFICATE_UNKNOWN", message };
    let Some(leaf) = chain.first() else {
        return Err(unknown("no certificate was shown".to_owned()));
    };
    let id = SpiffeId::of(leaf).map_err(|e| unknown(e.to_string()))?;
    if id.cluster != *cluster.ca.cluster() {
        return Err(unknown("the certificate is of another cluster".to_owned()));
    }
    match id.subject {
        Subject::Server => Err(unknown("a server's certificate is no caller's".to_owned())),
        Subject::User(name) => user(cluster, name.as_str()),
        Subject::Host(uid) => {
            let public_key = tls::public_key(leaf).map_err(|e| unknown(e.to_string()))?;
            let view = cluster.ledger.view();
            let Some(host) = view.host(&uid) else {
                return Err(unknown("no host with this certificate is known".to_owned()));
            };
            let record = &host.record;
            let known = record.public_key == public_key
                || (!record.next_public_key.is_empty() && record.next_public_key == public_key);
            if !known && !host.is_removed() {
                return Err(unknown("this key of the host was retired".to_owned()));
            }
            Ok(Caller {
                subject: format!("host/{uid}"),
                host: Some(uid),
                public_key,
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

/// Checks every call on the control door against the table.
pub async fn check(
    State(cluster): State<Arc<Cluster>>,
    mut request: Request,
    next: Next,
) -> Response {
    match admit(&cluster, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => Status::from(error).into_http::<axum::body::Body>().into_response(),
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
                caller.require(role, "")?;
                return Err(Error::denied("TOKEN_LIMITED", "this token is for a gateway only"));
            }
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
            Err(error) => return Err(Forbidden::NotPermitted(error.to_string())),
        };
        let Some(model) = model else { return Ok(()) };
        let (namespace, name) = model.split_once('.').unwrap_or(("default", model));
        if !caller.deployment.is_empty() && caller.deployment != name {
            return Err(Forbidden::NotPermitted(format!(
                "this token is for deployment \"{}\" only",
                caller.deployment
            )));
        }
        caller.require(Role::Viewer, namespace).map_err(|e| Forbidden::NotPermitted(e.to_string()))
    }
}

#[async_trait::async_trait]
impl Access for Doorkeeper {
    async fn authenticate(&self, credentials: Credentials) -> Result<Principal, AccessError> {
        let caller = match &credentials {
            Credentials::Basic { password, .. } => by_token(&self.0, password),
            Credentials::Bearer(token) => by_token(&self.0, token),
            Credentials::Certificate(chain) => by_certificate(&self.0, &chain.0),
        };
        let caller = caller.map_err(|_| AccessError::Refused)?;
        if !caller.deployment.is_empty() {
            return Err(AccessError::Refused);
        }
        Ok(Principal { subject: caller.subject, only: None })
    }

    fn allows(&self, principal: &Principal, repository: &RepoName, action: Action) -> bool {
        if let Some(host) = principal.subject.strip_prefix("host/") {
            return action == Action::Pull && self.host_needs(host, repository.as_str());
        }
        let Some(name) = principal.subject.strip_prefix("user/") else { return false };
        let Ok(caller) = user(&self.0, name) else { return false };
        let needed = match action {
            Action::Pull => Role::Viewer,
            Action::Push | Action::Delete => Role::Operator,
        };
        caller.bindings.iter().any(|b| b.role() as i32 >= needed as i32)
    }
}

impl Doorkeeper {
    /// An agent reads only what its own assignments name.
    fn host_needs(&self, host: &str, repository: &str) -> bool {
        let Ok(uid) = host.parse::<HostUid>() else { return false };
        let view = self.0.ledger.view();
        if view.host(&uid).is_none_or(|h| h.is_removed()) {
            return false;
        }
        view.replicas_on(&uid)
            .filter(|r| r.intent != ReplicaIntent::Orphan)
            .filter_map(|r| view.release(&r.deployment, r.release))
            .any(|release| {
                let source = &release.source;
                source.image.repository == repository
                    || source.artifact.as_ref().is_some_and(|a| a.repository == repository)
            })
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
