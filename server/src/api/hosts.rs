//! Hosts and join tokens.

use super::{Api, audit, auth, page};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::identity::tokens;
use crate::ledger::refused;
use crate::session::desk::{Ended, Order};
use berth_proto::api::host_service_server::HostService;
use berth_proto::api::*;
use berth_proto::convert::{duration_ms, timestamp};
use berth_proto::ids::Wall;
use berth_proto::record::{HostRecord, JoinTokenRecord};
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::Change;
use berth_server_core::objects::Host as Held;
use berth_server_core::status;
use berth_server_core::view::{ObjectKey, View};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// A token lives for an hour unless said, and for thirty days at the most.
const TTL_MS: u64 = 3_600_000;
const MAX_TTL_MS: u64 = 30 * 24 * 3_600_000;

impl Api {
    fn host(view: &View, name: &str) -> Result<Arc<Held>, Error> {
        view.host_by_name(name).cloned().ok_or_else(|| Error::not_found(Kind::Host, name))
    }

    fn shown_host(&self, view: &View, held: &Held) -> Host {
        status::host(view, &self.0.live.load(), held, self.0.time().mono)
    }

    async fn edit_host(
        &self,
        caller: &auth::Caller,
        method: &str,
        name: &str,
        write: Option<&WriteOptions>,
        edit: impl FnOnce(&mut HostRecord),
    ) -> Result<Host, Error> {
        let view = self.0.ledger.ahead();
        let held = Self::host(&view, name)?;
        let expected = write.and_then(|w| w.expected_revision).unwrap_or(held.revision.0);
        let next =
            Arc::new(held.edited(edit).map_err(|e| Error::internal("cannot change the host", e))?);
        if write.is_some_and(|w| w.validate_only) {
            return Ok(self.shown_host(&view, &next));
        }
        let key = ObjectKey::Host(held.uid.clone());
        let proposal = Proposal {
            preconditions: vec![Precondition::At(key, berth_proto::ids::Revision(expected))],
            changes: vec![
                Change::PutHost(next),
                audit(
                    caller,
                    method,
                    write.map(|w| w.request_id.as_str()).unwrap_or_default(),
                    vec![format!("host/{name}")],
                ),
            ],
        };
        self.0.ledger.propose(proposal).await.map_err(|r| refused(r, Kind::Host, name))?;
        let view = self.0.ledger.view();
        let held = view.host(&held.uid).cloned().unwrap_or(held);
        Ok(self.shown_host(&view, &held))
    }
}

#[tonic::async_trait]
impl HostService for Api {
    async fn get_host(
        &self,
        request: Request<GetHostRequest>,
    ) -> Result<Response<GetHostResponse>, Status> {
        let view = self.0.ledger.view();
        let held = Self::host(&view, &request.into_inner().name)?;
        Ok(Response::new(GetHostResponse { host: Some(self.shown_host(&view, &held)) }))
    }

    async fn list_hosts(
        &self,
        request: Request<ListHostsRequest>,
    ) -> Result<Response<ListHostsResponse>, Status> {
        let request = request.into_inner();
        let view = self.0.ledger.view();
        let mut all: Vec<Arc<Held>> = view.hosts().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let (held, next_page_token) = page(all, request.page.as_ref())?;
        let hosts = held.iter().map(|h| self.shown_host(&view, h)).collect();
        Ok(Response::new(ListHostsResponse { hosts, next_page_token }))
    }

    async fn label_host(
        &self,
        request: Request<LabelHostRequest>,
    ) -> Result<Response<LabelHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        for (key, value) in &r.set {
            berth_proto::selector::check_key(key)
                .and_then(|()| berth_proto::selector::check_value(value))
                .map_err(|e| Error::field(format!("set.{key}"), e.to_string()))?;
        }
        let host = self
            .edit_host(&caller, "HostService/LabelHost", &r.name, r.write.as_ref(), |record| {
                let labels = &mut record.meta.get_or_insert_default().labels;
                labels.retain(|key, _| !r.remove.contains(key));
                labels.extend(r.set.clone());
            })
            .await?;
        Ok(Response::new(LabelHostResponse { host: Some(host) }))
    }

    async fn cordon_host(
        &self,
        request: Request<CordonHostRequest>,
    ) -> Result<Response<CordonHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let host = self
            .edit_host(&caller, "HostService/CordonHost", &r.name, r.write.as_ref(), |record| {
                record.spec = Some(HostSpec {
                    cordoned: r.cordoned,
                    draining: r.cordoned && record.spec.is_some_and(|s| s.draining),
                });
            })
            .await?;
        Ok(Response::new(CordonHostResponse { host: Some(host) }))
    }

    async fn drain_host(
        &self,
        request: Request<DrainHostRequest>,
    ) -> Result<Response<DrainHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let host = self
            .edit_host(&caller, "HostService/DrainHost", &r.name, r.write.as_ref(), |record| {
                record.spec = Some(HostSpec { cordoned: true, draining: r.draining });
            })
            .await?;
        Ok(Response::new(DrainHostResponse { host: Some(host) }))
    }

    async fn remove_host(
        &self,
        request: Request<RemoveHostRequest>,
    ) -> Result<Response<RemoveHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.ahead();
        let held = match Self::host(&view, &r.name) {
            Ok(held) => held,
            Err(_) if r.allow_missing => return Ok(Response::new(RemoveHostResponse {})),
            Err(error) => return Err(error.into()),
        };
        let there = view.replicas_on(&held.uid).count();
        if there > 0 && !r.force {
            return Err(Error::precondition(
                "HOST_HAS_REPLICAS",
                format!("host \"{}\" has {there} replicas; drain it first, or use --force", r.name),
            )
            .into());
        }
        self.edit_host(&caller, "HostService/RemoveHost", &r.name, r.write.as_ref(), |record| {
            record.removed = true;
            record.wipe = r.wipe;
        })
        .await?;
        self.0.order(&held.uid, &Order::Removed { wipe: r.wipe });
        self.0.hub.cut(&held.uid);
        self.0.edit_live(|live| live.remove_host(&held.uid));
        Ok(Response::new(RemoveHostResponse {}))
    }

    async fn approve_host(
        &self,
        request: Request<ApproveHostRequest>,
    ) -> Result<Response<ApproveHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let host = self
            .edit_host(&caller, "HostService/ApproveHost", &r.name, r.write.as_ref(), |record| {
                record.waiting_for_approval = false;
            })
            .await?;
        Ok(Response::new(ApproveHostResponse { host: Some(host) }))
    }

    async fn release_quarantine(
        &self,
        request: Request<ReleaseQuarantineRequest>,
    ) -> Result<Response<ReleaseQuarantineResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "HostService/ReleaseQuarantine";
        let host = self
            .edit_host(&caller, method, &r.name, r.write.as_ref(), |record| {
                record.quarantined = false;
            })
            .await?;
        if let Some(held) = self.0.ledger.view().host_by_name(&r.name) {
            self.0.forget_boots(&held.uid);
            self.0.order(&held.uid, &Order::End(Ended::Superseded));
        }
        Ok(Response::new(ReleaseQuarantineResponse { host: Some(host) }))
    }

    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let ttl = match &r.ttl {
            None => TTL_MS,
            Some(d) => duration_ms(d)
                .filter(|ms| (1..=MAX_TTL_MS).contains(ms))
                .ok_or_else(|| Error::field("ttl", "must be more than 0 and at most 30d"))?,
        };
        let uses = if r.uses == 0 { 1 } else { r.uses };
        if uses > 10_000 {
            return Err(Error::field("uses", "must be at most 10000").into());
        }
        if !r.rejoin.is_empty() {
            Self::host(&self.0.ledger.ahead(), &r.rejoin)?;
        }
        let pin = berth_proto::tls::pin(self.0.ca.root_pem())
            .map_err(|e| Error::internal("cannot read the root", e))?;
        let new = tokens::new_join(&pin);
        let now = wall_now();
        let expires = Wall(now.0.saturating_add(i64::try_from(ttl).unwrap_or(i64::MAX)));
        let token = JoinToken {
            id: new.id.clone(),
            expire_time: Some(timestamp(expires)),
            uses_left: uses,
            labels: r.labels.clone(),
            require_approval: r.require_approval,
            rejoin: r.rejoin.clone(),
            created_by: caller.subject.clone(),
            create_time: Some(timestamp(now)),
        };
        let record = JoinTokenRecord {
            token: Some(token.clone()),
            secret_sha256: new.sha256,
            revoked: false,
        };
        let changes = vec![
            Change::PutJoinToken(Arc::new(record)),
            audit(
                &caller,
                "HostService/CreateJoinToken",
                "",
                vec![format!("jointoken/{}", new.id)],
            ),
        ];
        self.0
            .ledger
            .propose(Proposal { preconditions: Vec::new(), changes })
            .await
            .map_err(|why| refused(why, Kind::Token, &new.id))?;
        let endpoints = self.0.endpoints.clone();
        let server = endpoints.first().cloned().unwrap_or_default();
        let command = format!("berth-agent join --server {server} --token {}", new.text);
        Ok(Response::new(CreateJoinTokenResponse {
            token: Some(token),
            secret: new.text,
            endpoints,
            command,
        }))
    }

    async fn list_join_tokens(
        &self,
        request: Request<ListJoinTokensRequest>,
    ) -> Result<Response<ListJoinTokensResponse>, Status> {
        let request = request.into_inner();
        let view = self.0.ledger.view();
        let all = view
            .join_tokens()
            .filter(|kept| !kept.record.revoked)
            .filter_map(|kept| kept.record.token.clone())
            .collect();
        let (tokens, next_page_token) = page(all, request.page.as_ref())?;
        Ok(Response::new(ListJoinTokensResponse { tokens, next_page_token }))
    }

    async fn revoke_join_token(
        &self,
        request: Request<RevokeJoinTokenRequest>,
    ) -> Result<Response<RevokeJoinTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.ahead();
        let Some(kept) = view.join_token(&r.id) else {
            if r.allow_missing {
                return Ok(Response::new(RevokeJoinTokenResponse {}));
            }
            return Err(Error::not_found(Kind::Token, &r.id).into());
        };
        let record = JoinTokenRecord { revoked: true, ..JoinTokenRecord::clone(&kept.record) };
        let changes = vec![
            Change::PutJoinToken(Arc::new(record)),
            audit(&caller, "HostService/RevokeJoinToken", "", vec![format!("jointoken/{}", r.id)]),
        ];
        self.0
            .ledger
            .propose(Proposal { preconditions: Vec::new(), changes })
            .await
            .map_err(|why| refused(why, Kind::Token, &r.id))?;
        Ok(Response::new(RevokeJoinTokenResponse {}))
    }

    async fn list_orphans(
        &self,
        request: Request<ListOrphansRequest>,
    ) -> Result<Response<ListOrphansResponse>, Status> {
        let r = request.into_inner();
        let view = self.0.ledger.view();
        let live = self.0.live.load();
        let now = self.0.time().mono;
        let all = view
            .replicas()
            .filter(|replica| replica.intent == ReplicaIntent::Orphan)
            .map(|replica| status::replica(&view, &live, replica, now))
            .filter(|shown| r.host.is_empty() || shown.host == r.host)
            .collect();
        let (replicas, next_page_token) = page(all, r.page.as_ref())?;
        Ok(Response::new(ListOrphansResponse { replicas, next_page_token }))
    }

    async fn resolve_orphans(
        &self,
        request: Request<ResolveOrphansRequest>,
    ) -> Result<Response<ResolveOrphansResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if r.replica_uids.is_empty() && r.host.is_empty() {
            return Err(Error::field("replica_uids", "name replicas or a host").into());
        }
        let intent = match r.decision() {
            OrphanDecision::Adopt => ReplicaIntent::Run,
            OrphanDecision::Release => ReplicaIntent::Stop,
            OrphanDecision::Unspecified => {
                return Err(Error::field("decision", "must be adopt or release").into());
            }
        };
        let view = self.0.ledger.ahead();
        let mut changes = Vec::new();
        for replica in view.replicas().filter(|r| r.intent == ReplicaIntent::Orphan) {
            let host = view.host(&replica.host).map(|h| h.name.to_string()).unwrap_or_default();
            let asked = if r.replica_uids.is_empty() {
                host == r.host
            } else {
                r.replica_uids.iter().any(|uid| uid == replica.uid.as_str())
            };
            if !asked {
                continue;
            }
            if intent == ReplicaIntent::Run
                && view.release(&replica.deployment, replica.release).is_none()
            {
                return Err(Error::precondition(
                    "RELEASE_UNKNOWN",
                    format!(
                        "the release of replica {} is not known; it can only be released",
                        replica.uid
                    ),
                )
                .into());
            }
            let mut next = berth_server_core::objects::Replica::clone(replica);
            next.intent = intent;
            changes.push(Change::PutReplica(Arc::new(next)));
        }
        let resolved = u32::try_from(changes.len()).unwrap_or(u32::MAX);
        for chunk in changes.chunks(40) {
            let mut changes = chunk.to_vec();
            changes.push(audit(&caller, "HostService/ResolveOrphans", "", vec![r.host.clone()]));
            self.0
                .ledger
                .propose(Proposal { preconditions: Vec::new(), changes })
                .await
                .map_err(|why| refused(why, Kind::Replica, &r.host))?;
        }
        Ok(Response::new(ResolveOrphansResponse { resolved }))
    }
}
