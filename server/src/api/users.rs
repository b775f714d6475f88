//! People and services.

use super::lists::Asked;
use super::writes::{Answer as _, Begun, Step};
use super::{Api, auth};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::identity::{roles, tokens};
use berth_proto::api::user_service_server::UserService;
use berth_proto::api::*;
use berth_proto::convert::{Problems, timestamp, wall};
use berth_proto::ids::{Name, Namespace, Revision, Wall};
use berth_proto::record::{Meta, UserRecord, UserTokenRecord};
use berth_proto::tls::Subject;
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::{Change, audited};
use berth_server_core::status;
use berth_server_core::view::{Kept, ObjectKey, View};
use std::cmp::Reverse;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Tokens of one user that are shown, as the contract says.
const SHOWN_TOKENS: usize = 100;
/// Ten years: what a root lives.
const MAX_GRANT_MS: i64 = 3650 * 86_400_000;

fn shown(view: &View, kept: &Kept<UserRecord>) -> User {
    let record = &kept.record;
    let uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
    let now = wall_now().0;
    let mut alive: Vec<&UserTokenRecord> = view
        .user_tokens()
        .map(|kept| &*kept.record)
        .filter(|t| t.user_uid == uid && !t.revoked && t.expire_unix_ms > now)
        .collect();
    alive.sort_by_key(|t| (Reverse(t.expire_unix_ms), &t.id));
    User {
        meta: record.meta.as_ref().map(|m| status::meta(m, kept.revision.0)),
        bindings: record.bindings.clone(),
        expire_time: Some(timestamp(Wall(record.expire_unix_ms))),
        revoked: record.revoked,
        tokens: u32::try_from(alive.len()).unwrap_or(u32::MAX),
        live_tokens: alive
            .into_iter()
            .take(SHOWN_TOKENS)
            .map(|t| UserToken {
                id: t.id.clone(),
                expire_time: Some(timestamp(Wall(t.expire_unix_ms))),
                deployment: t.deployment.clone(),
            })
            .collect(),
    }
}

/// Whether a user may do everything now: is an admin of all namespaces, not revoked and not ended.
#[must_use]
pub(crate) fn is_admin(user: &UserRecord) -> bool {
    !user.revoked
        && user.expire_unix_ms > wall_now().0
        && roles::has_role(&user.bindings, Role::Admin, "")
}

/// Whoever may do everything when `name` may not any more: for an admin another one, as it was found,
/// who must still be there when `name` goes; for others nobody need be.
pub(super) fn admin_beside(view: &View, name: &str) -> Result<Option<Precondition>, Error> {
    let named = |user: &UserRecord| user.meta.as_ref().is_some_and(|meta| meta.name == name);
    let (own, others): (Vec<_>, Vec<_>) =
        view.users().filter(|kept| is_admin(&kept.record)).partition(|kept| named(&kept.record));
    if own.is_empty() {
        return Ok(None);
    }
    // The one that lasts longest.
    let Some(other) = others.iter().max_by_key(|kept| kept.record.expire_unix_ms) else {
        return Err(Error::precondition(
            "LAST_ADMIN",
            format!(
                "\"{name}\" is the only admin of all namespaces: nobody could make another; make one \
                 first"
            ),
        ));
    };
    let other_name = other.record.meta.as_ref().map(|meta| meta.name.clone()).unwrap_or_default();
    Ok(Some(Precondition::At(ObjectKey::UserName(other_name), other.revision)))
}

/// For the audit log.
fn user_object(user: &UserRecord) -> String {
    let meta = user.meta.clone().unwrap_or_default();
    audited("user", None, &meta.name, &meta.uid)
}

/// What ends a user, or one of its tokens: the change, what it is about, and where that stands.
fn revoked(view: &View, name: &str, token: &str) -> Result<(Change, ObjectKey, Revision), Error> {
    let kept = view.user(name).ok_or_else(|| Error::not_found(Kind::User, name))?;
    if token.is_empty() {
        let mut record = UserRecord { revoked: true, ..UserRecord::clone(&kept.record) };
        record.meta.get_or_insert_default().update_unix_ms = wall_now().0;
        let key = ObjectKey::UserName(name.to_owned());
        return Ok((Change::PutUser(Arc::new(record)), key, kept.revision));
    }
    let uid = kept.record.meta.as_ref().map(|m| m.uid.as_str()).unwrap_or_default();
    let held = view
        .user_token(token)
        .filter(|held| held.record.user_uid == uid)
        .ok_or_else(|| Error::not_found(Kind::Token, token))?;
    let record = UserTokenRecord { revoked: true, ..UserTokenRecord::clone(&held.record) };
    let key = ObjectKey::UserToken(token.to_owned());
    Ok((Change::PutUserToken(Arc::new(record)), key, held.revision))
}

#[tonic::async_trait]
impl UserService for Api {
    async fn create_user(
        &self,
        request: Request<CreateUserRequest>,
    ) -> Result<Response<CreateUserResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let now = wall_now().0;
        let expires = r.expire_time.as_ref().map(|t| wall(t).0).unwrap_or_default();
        let mut p = Problems::default();
        let name = p.take("name", r.name.parse::<Name>());
        if expires <= now || expires > now.saturating_add(MAX_GRANT_MS) {
            p.add("expire_time", "must be in the future, at most 10 years");
        }
        if r.bindings.is_empty() || r.bindings.len() > 64 {
            p.add("bindings", "must hold 1 to 64");
        }
        for (i, binding) in r.bindings.iter().take(64).enumerate() {
            if binding.role() == Role::Unspecified {
                p.add(format!("bindings[{i}].role"), "must be admin, operator or viewer");
            }
            if !binding.namespace.is_empty() {
                let path = format!("bindings[{i}].namespace");
                let _ = p.take(path, binding.namespace.parse::<Namespace>());
            }
        }
        let (Some(name), true) = (name, p.0.is_empty()) else { return Err(Error::from(p).into()) };
        let method = "UserService/CreateUser";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        call.expects_nothing()?;
        let certificate_pem = if r.csr_pem.is_empty() {
            String::new()
        } else {
            let days = (expires - now) / 86_400_000 + 1;
            self.0
                .roots
                .signing()
                .sign(&r.csr_pem, Subject::User(name.clone()), days)
                .map_err(|e| Error::field("csr_pem", e.to_string()))?
        };
        let record = Arc::new(UserRecord {
            meta: Some(Meta {
                uid: uuid::Uuid::now_v7().to_string(),
                name: name.to_string(),
                create_unix_ms: now,
                update_unix_ms: now,
                ..Meta::default()
            }),
            bindings: r.bindings.clone(),
            expire_unix_ms: expires,
            revoked: false,
            renew_unix_ms: 0,
        });
        let answer = self
            .write(&call, Kind::User, name.as_str(), |view| {
                let old = view.user(name.as_str());
                if old.is_some_and(|u| !u.record.revoked && u.record.expire_unix_ms > now) {
                    return Err(Error::Exists {
                        kind: Kind::User,
                        name: name.to_string(),
                        hint: String::new(),
                    });
                }
                let at = Precondition::At(
                    ObjectKey::UserName(name.to_string()),
                    old.map(|o| o.revision).unwrap_or_default(),
                );
                let new = Kept { record: Arc::clone(&record), revision: Revision(0) };
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![at],
                        changes: vec![Change::PutUser(Arc::clone(&record))],
                    },
                    answer: CreateUserResponse {
                        user: Some(shown(view, &new)),
                        certificate_pem: certificate_pem.clone(),
                        roots_pem: self.0.roots.pem(),
                        cluster: self.0.roots.cluster().to_string(),
                        endpoints: self.0.endpoints.clone(),
                    },
                    objects: vec![user_object(&record)],
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let asked = Asked { call: "ListUsers", parents: &[], fields: &["name"] };
        let listing = self.listing(&caller, r.page.as_ref(), &asked)?;
        let view = Arc::clone(&listing.view);
        let all = view
            .users()
            .filter(|kept| {
                listing.wants(|_| kept.record.meta.as_ref().map(|meta| meta.name.as_str()))
            })
            .collect();
        let (users, next_page_token) = self.page(listing, all, |kept| shown(&view, kept));
        Ok(Response::new(ListUsersResponse { users, next_page_token }))
    }

    async fn create_user_token(
        &self,
        request: Request<CreateUserTokenRequest>,
    ) -> Result<Response<CreateUserTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "UserService/CreateUserToken";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        call.expects_nothing()?;
        let asked = r.expire_time.as_ref().map(|t| wall(t).0);
        if asked.is_some_and(|until| until <= wall_now().0) {
            return Err(Error::field("expire_time", "must be in the future").into());
        }
        let new = tokens::new_user();
        let answer = self
            .write(&call, Kind::User, &r.name, |view| {
                let kept = view.user(&r.name).filter(|u| !u.record.revoked);
                let kept = kept.ok_or_else(|| Error::not_found(Kind::User, &r.name))?;
                let until = kept.record.expire_unix_ms;
                let record = UserTokenRecord {
                    id: new.id.clone(),
                    user_uid: kept.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default(),
                    secret_sha256: new.sha256.clone(),
                    expire_unix_ms: asked.map_or(until, |asked| asked.min(until)),
                    deployment: r.deployment.clone(),
                    revoked: false,
                };
                let still = ObjectKey::UserName(r.name.clone());
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![Precondition::At(still, kept.revision)],
                        changes: vec![Change::PutUserToken(Arc::new(record))],
                    },
                    answer: CreateUserTokenResponse {
                        id: new.id.clone(),
                        secret: new.text.clone(),
                    },
                    objects: vec![user_object(&kept.record)],
                })
            })
            .await?;
        Ok(Response::new(if call.validate_only() { answer.kept() } else { answer }))
    }

    async fn revoke_user(
        &self,
        request: Request<RevokeUserRequest>,
    ) -> Result<Response<RevokeUserResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "UserService/RevokeUser";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::User, &r.name, |view| {
                let found = revoked(view, &r.name, &r.token_id);
                let (change, object, revision) = match found {
                    Err(Error::NotFound { .. }) if r.allow_missing => {
                        return Ok(Step::nothing(RevokeUserResponse {}));
                    }
                    found => found?,
                };
                let mut preconditions = vec![call.at(object, revision)];
                if r.token_id.is_empty() {
                    preconditions.extend(admin_beside(view, &r.name)?);
                }
                Ok(Step {
                    proposal: Proposal { preconditions, changes: vec![change] },
                    answer: RevokeUserResponse {},
                    objects: view
                        .user(&r.name)
                        .map(|u| user_object(&u.record))
                        .into_iter()
                        .collect(),
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn renew_certificate(
        &self,
        request: Request<RenewCertificateRequest>,
    ) -> Result<Response<RenewCertificateResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let name = caller.subject.strip_prefix("user/").and_then(|name| name.parse::<Name>().ok());
        let (Some(name), true) = (name, caller.certificate.is_some()) else {
            let words =
                "a token gives no certificate: call with the certificate that is to be renewed";
            return Err(Error::denied("CERTIFICATE_NEEDED", words).into());
        };
        let method = "UserService/RenewCertificate";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        call.expects_nothing()?;
        let now = wall_now().0;
        let days = (caller.expires - now) / 86_400_000 + 1;
        let certificate_pem = self
            .0
            .roots
            .signing()
            .sign(&r.csr_pem, Subject::User(name.clone()), days)
            .map_err(|e| Error::field("csr_pem", crate::error::Chain(&e).to_string()))?;
        let answer = self
            .write(&call, Kind::User, name.as_str(), |view| {
                let kept = view.user_by_uid(&caller.uid).filter(|user| !user.record.revoked);
                let kept = kept.ok_or_else(|| Error::not_found(Kind::User, name.as_str()))?;
                let record = UserRecord { renew_unix_ms: now, ..UserRecord::clone(&kept.record) };
                let at = Precondition::At(ObjectKey::UserName(name.to_string()), kept.revision);
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![at],
                        changes: vec![Change::PutUser(Arc::new(record))],
                    },
                    answer: RenewCertificateResponse {
                        certificate_pem: certificate_pem.clone(),
                        roots_pem: self.0.roots.pem(),
                        endpoints: self.0.endpoints.clone(),
                        registry: self.0.registry_address.clone(),
                        gateway: self.0.gateway_address.clone(),
                    },
                    objects: vec![user_object(&kept.record)],
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn who_am_i(
        &self,
        request: Request<WhoAmIRequest>,
    ) -> Result<Response<WhoAmIResponse>, Status> {
        let caller = auth::of(&request);
        Ok(Response::new(WhoAmIResponse {
            subject: caller.subject,
            bindings: caller.bindings,
            expire_time: (caller.expires != 0).then(|| timestamp(Wall(caller.expires))),
        }))
    }
}
