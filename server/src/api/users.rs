//! People, services, and the server itself.

use super::{Api, audit, auth, page};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::identity::tokens;
use crate::ledger::refused;
use berth_proto::api::system_service_server::SystemService;
use berth_proto::api::user_service_server::UserService;
use berth_proto::api::*;
use berth_proto::convert::{timestamp, wall};
use berth_proto::ids::{Name, Wall};
use berth_proto::record::{Meta, UserRecord, UserTokenRecord};
use berth_proto::tls::Subject;
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::Change;
use berth_server_core::status;
use berth_server_core::view::{Kept, ObjectKey, View};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Ten years: what a root lives.
const MAX_GRANT_MS: i64 = 3650 * 86_400_000;

fn shown(view: &View, kept: &Kept<UserRecord>) -> User {
    let record = &kept.record;
    let uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
    let alive = |t: &&Kept<UserTokenRecord>| {
        t.record.user_uid == uid && !t.record.revoked && t.record.expire_unix_ms > wall_now().0
    };
    User {
        meta: record.meta.as_ref().map(|m| status::meta(m, kept.revision.0)),
        bindings: record.bindings.clone(),
        expire_time: Some(timestamp(Wall(record.expire_unix_ms))),
        revoked: record.revoked,
        tokens: u32::try_from(view.user_tokens().filter(alive).count()).unwrap_or(u32::MAX),
    }
}

#[tonic::async_trait]
impl UserService for Api {
    async fn create_user(
        &self,
        request: Request<CreateUserRequest>,
    ) -> Result<Response<CreateUserResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let name: Name = r
            .name
            .parse()
            .map_err(|e: berth_proto::ids::InvalidId| Error::field("name", e.to_string()))?;
        let now = wall_now().0;
        let expires = r.expire_time.as_ref().map(|t| wall(t).0).unwrap_or_default();
        if expires <= now || expires > now.saturating_add(MAX_GRANT_MS) {
            return Err(
                Error::field("expire_time", "must be in the future, at most 10 years").into()
            );
        }
        if r.bindings.is_empty() || r.bindings.len() > 64 {
            return Err(Error::field("bindings", "must hold 1 to 64").into());
        }
        let key = ObjectKey::UserName(name.to_string());
        let view = self.0.ledger.ahead();
        let old = view.user(name.as_str());
        if old.is_some_and(|u| !u.record.revoked && u.record.expire_unix_ms > now) {
            return Err(Error::Exists { kind: Kind::User, name: name.to_string() }.into());
        }
        let record = UserRecord {
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
        };
        let certificate_pem = if r.csr_pem.is_empty() {
            String::new()
        } else {
            let days = (expires - now) / 86_400_000 + 1;
            self.0
                .ca
                .sign(&r.csr_pem, Subject::User(name.clone()), days)
                .map_err(|e| Error::field("csr_pem", e.to_string()))?
        };
        let proposal = Proposal {
            preconditions: vec![Precondition::At(key, old.map(|o| o.revision).unwrap_or_default())],
            changes: vec![
                Change::PutUser(Arc::new(record)),
                audit(&caller, "UserService/CreateUser", "", vec![format!("user/{name}")]),
            ],
        };
        self.0
            .ledger
            .propose(proposal)
            .await
            .map_err(|why| refused(why, Kind::User, name.as_str()))?;
        let view = self.0.ledger.view();
        Ok(Response::new(CreateUserResponse {
            user: view.user(name.as_str()).map(|kept| shown(&view, kept)),
            certificate_pem,
            roots_pem: self.0.ca.root_pem().to_owned(),
            cluster: self.0.ca.cluster().to_string(),
            endpoints: self.0.endpoints.clone(),
        }))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let r = request.into_inner();
        let view = self.0.ledger.view();
        let all = view.users().map(|kept| shown(&view, kept)).collect();
        let (users, next_page_token) = page(all, r.page.as_ref())?;
        Ok(Response::new(ListUsersResponse { users, next_page_token }))
    }

    async fn create_user_token(
        &self,
        request: Request<CreateUserTokenRequest>,
    ) -> Result<Response<CreateUserTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.ahead();
        let kept = view.user(&r.name).filter(|u| !u.record.revoked);
        let kept = kept.ok_or_else(|| Error::not_found(Kind::User, &r.name))?;
        let until = kept.record.expire_unix_ms;
        let expires = r.expire_time.as_ref().map_or(until, |t| wall(t).0.min(until));
        let new = tokens::new_user();
        let record = UserTokenRecord {
            id: new.id.clone(),
            user_uid: kept.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default(),
            secret_sha256: new.sha256,
            expire_unix_ms: expires,
            deployment: r.deployment.clone(),
            revoked: false,
        };
        let changes = vec![
            Change::PutUserToken(Arc::new(record)),
            audit(&caller, "UserService/CreateUserToken", "", vec![format!("user/{}", r.name)]),
        ];
        self.0
            .ledger
            .propose(Proposal { preconditions: Vec::new(), changes })
            .await
            .map_err(|why| refused(why, Kind::User, &r.name))?;
        Ok(Response::new(CreateUserTokenResponse { id: new.id, secret: new.text }))
    }

    async fn revoke_user(
        &self,
        request: Request<RevokeUserRequest>,
    ) -> Result<Response<RevokeUserResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.ahead();
        let kept =
            view.user(&r.name).cloned().ok_or_else(|| Error::not_found(Kind::User, &r.name))?;
        let change = if r.token_id.is_empty() {
            let record = UserRecord { revoked: true, ..UserRecord::clone(&kept.record) };
            Change::PutUser(Arc::new(record))
        } else {
            let token = view
                .user_token(&r.token_id)
                .ok_or_else(|| Error::not_found(Kind::Token, &r.token_id))?;
            let record = UserTokenRecord { revoked: true, ..UserTokenRecord::clone(&token.record) };
            Change::PutUserToken(Arc::new(record))
        };
        let changes = vec![
            change,
            audit(&caller, "UserService/RevokeUser", "", vec![format!("user/{}", r.name)]),
        ];
        self.0
            .ledger
            .propose(Proposal { preconditions: Vec::new(), changes })
            .await
            .map_err(|why| refused(why, Kind::User, &r.name))?;
        Ok(Response::new(RevokeUserResponse {}))
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

#[tonic::async_trait]
impl SystemService for Api {
    async fn get_server_info(
        &self,
        _request: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let view = self.0.ledger.view();
        let mut warnings = Vec::new();
        if view.cluster.observing {
            warnings.push(
                "restored from a backup: `berth orphan list` shows what to decide about".to_owned(),
            );
        }
        let free = crate::store::folder::free_bytes(&self.0.settings.data_dir).unwrap_or(u64::MAX);
        if free < 1 << 30 {
            warnings.push(format!("the disk has only {} MiB left", free >> 20));
        }
        Ok(Response::new(GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster: self.0.ca.cluster().to_string(),
            epoch: view.cluster.epoch,
            revision: view.revision.0,
            start_time: Some(timestamp(self.0.started)),
            endpoints: self.0.endpoints.clone(),
            registry: self.0.registry_address.clone(),
            gateway: self.0.gateway_address.clone(),
            page: self.0.page_address.clone(),
            warnings,
        }))
    }

    async fn backup(
        &self,
        _request: Request<BackupRequest>,
    ) -> Result<Response<BackupResponse>, Status> {
        Err(Error::precondition(
            "BACKUP_NOT_OFFERED",
            "this version makes no backups yet; stop the server and copy its data folder",
        )
        .into())
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        let r = request.into_inner();
        let view = self.0.ledger.view();
        let mut roots = Vec::new();
        let digests =
            view.versions().filter_map(|v| v.record.version.as_ref()?.digest.parse().ok());
        roots.extend(digests);
        for deployment in view.deployments() {
            for release in view.releases_of(&deployment.uid) {
                roots.push(release.source.image.digest.clone());
                roots.extend(release.source.artifact.as_ref().map(|a| a.digest.clone()));
            }
        }
        let done = self
            .0
            .registry
            .collect(roots, Vec::new(), r.dry_run)
            .await
            .map_err(|e| Error::internal("cannot collect", e))?;
        Ok(Response::new(CollectGarbageResponse {
            digests: done.blobs.iter().map(|(digest, _)| digest.to_string()).collect(),
            count: done.blobs_total,
            size_bytes: done.bytes,
        }))
    }
}
