//! Hosts and join tokens.

use super::lists::{Asked, label};
use super::writes::{Answer, Begun, Call, Step};
use super::{Api, auth};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::identity::tokens;
use crate::session::desk::{Ended, Order};
use berth_proto::api::host_service_server::HostService;
use berth_proto::api::*;
use berth_proto::convert::{Problems, duration_ms, timestamp};
use berth_proto::ids::{InvalidId, Revision, Wall};
use berth_proto::record::{HostRecord, JoinTokenRecord};
use berth_proto::selector::{MAX_LABELS, check_labels};
use berth_proto::words::counted;
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::{Change, audited};
use berth_server_core::decide;
use berth_server_core::objects::{Host as Held, Replica};
use berth_server_core::orphans;
use berth_server_core::status;
use berth_server_core::view::{ObjectKey, View};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// A token lives for an hour unless said, and for thirty days at the most.
const TTL_MS: u64 = 3_600_000;
const MAX_TTL_MS: u64 = 30 * 24 * 3_600_000;
/// Orphans that stay so and are listed in an answer.
const MAX_KEPT: usize = 100;

/// For the audit log.
fn host_object(host: &Held) -> String {
    audited("host", None, host.name.as_str(), host.uid.as_str())
}

impl Api {
    fn host(view: &View, name: &str) -> Result<Arc<Held>, Error> {
        view.host_by_name(name).cloned().ok_or_else(|| Error::not_found(Kind::Host, name))
    }

    fn shown_host(&self, view: &View, held: &Held) -> Host {
        status::host(view, &self.0.live.load(), held, self.0.time())
    }

    /// Writes one host, which must be there.
    async fn edit_host<A: Answer>(
        &self,
        call: &Call<'_>,
        name: &str,
        edit: impl Fn(&mut HostRecord),
        answer: impl Fn(Host) -> A,
    ) -> Result<A, Error> {
        self.write(call, Kind::Host, name, |view| {
            let held = Self::host(view, name)?;
            let shown = |host: &Held| answer(self.shown_host(view, host));
            let next = held.edited(&edit).map_err(|e| Error::internal("cannot edit a host", e))?;
            let at = call.at(ObjectKey::Host(held.uid.clone()), held.revision);
            let mut step = if next.record == held.record {
                Step::nothing(shown(&held))
            } else {
                let next = next
                    .edited(|record| {
                        record.meta.get_or_insert_default().update_unix_ms = wall_now().0
                    })
                    .map_err(|e| Error::internal("cannot edit a host", e))?;
                let next = Arc::new(next);
                let answer = shown(&next);
                let proposal =
                    Proposal { changes: vec![Change::PutHost(next)], ..Default::default() };
                Step { proposal, answer, objects: vec![host_object(&held)] }
            };
            step.proposal.preconditions.push(at);
            Ok(step)
        })
        .await
    }
}

/// Carries out a write of one host: its kept answer, or the edit.
macro_rules! edit {
    ($api:ident, $caller:ident, $r:ident, $method:literal, $answer:ident, $edit:expr) => {
        match $api.begin(&$caller, $r.write.as_ref(), $method, &$r)? {
            Begun::Kept(answer) => answer,
            Begun::New(call) => {
                let answer = |host| $answer { host: Some(host) };
                $api.edit_host(&call, &$r.name, $edit, answer).await?
            }
        }
    };
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
        let caller = auth::of(&request);
        let request = request.into_inner();
        let asked = Asked { call: "ListHosts", parents: &[], fields: &["name", "labels"] };
        let listing = self.listing(&caller, request.page.as_ref(), &asked)?;
        let view = Arc::clone(&listing.view);
        let mut all: Vec<Arc<Held>> = view
            .hosts()
            .filter(|host| {
                listing.wants(|field| match field {
                    "name" => Some(host.name.as_str()),
                    other => label(&host.labels, other),
                })
            })
            .cloned()
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let (hosts, next_page_token) = self.page(listing, all, |h| self.shown_host(&view, &h));
        Ok(Response::new(ListHostsResponse { hosts, next_page_token }))
    }

    async fn label_host(
        &self,
        request: Request<LabelHostRequest>,
    ) -> Result<Response<LabelHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let mut p = Problems::default();
        check_labels(&r.set, "set", &mut p);
        let view = self.0.ledger.ahead();
        let meta = view.host_by_name(&r.name).and_then(|host| host.record.meta.clone());
        let mut after = meta.unwrap_or_default().labels;
        after.retain(|key, _| !r.remove.contains(key));
        after.extend(r.set.clone());
        if after.len() > MAX_LABELS {
            p.add("set", format!("would give the host more than {MAX_LABELS} labels"));
        }
        p.finish(()).map_err(Error::from)?;
        let answer = edit!(self, caller, r, "HostService/LabelHost", LabelHostResponse, |record| {
            let labels = &mut record.meta.get_or_insert_default().labels;
            labels.retain(|key, _| !r.remove.contains(key));
            labels.extend(r.set.clone());
        });
        Ok(Response::new(answer))
    }

    async fn cordon_host(
        &self,
        request: Request<CordonHostRequest>,
    ) -> Result<Response<CordonHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let answer =
            edit!(self, caller, r, "HostService/CordonHost", CordonHostResponse, |record| {
                record.spec = Some(HostSpec {
                    cordoned: r.cordoned,
                    draining: r.cordoned && record.spec.is_some_and(|s| s.draining),
                });
            });
        Ok(Response::new(answer))
    }

    async fn drain_host(
        &self,
        request: Request<DrainHostRequest>,
    ) -> Result<Response<DrainHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let answer = edit!(self, caller, r, "HostService/DrainHost", DrainHostResponse, |record| {
            record.spec = Some(HostSpec { cordoned: true, draining: r.draining });
        });
        Ok(Response::new(answer))
    }

    async fn remove_host(
        &self,
        request: Request<RemoveHostRequest>,
    ) -> Result<Response<RemoveHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "HostService/RemoveHost";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let removed = parking_lot::Mutex::new(None);
        let answer = self
            .write(&call, Kind::Host, &r.name, |view| {
                let held = match Self::host(view, &r.name) {
                    Ok(held) => held,
                    Err(_) if r.allow_missing => return Ok(Step::nothing(RemoveHostResponse {})),
                    Err(error) => return Err(error),
                };
                let there = view.replicas_on(&held.uid).count();
                if there > 0 && !r.force {
                    let there = counted(there, "replica");
                    return Err(Error::precondition(
                        "HOST_HAS_REPLICAS",
                        if held.is_draining() {
                            format!(
                                "host \"{}\" is draining, and without another place there: {there}; \
                                 `berth ps` says why; --force does not wait",
                                r.name
                            )
                        } else {
                            format!(
                                "host \"{}\" has {there}; drain it first, or use --force",
                                r.name
                            )
                        },
                    ));
                }
                let next = held
                    .edited(|record| {
                        record.removed = true;
                        record.meta.get_or_insert_default().update_unix_ms = wall_now().0;
                        record.wipe = r.wipe;
                    })
                    .map_err(|e| Error::internal("cannot edit a host", e))?;
                let kind = if r.wipe { ", and is told to delete what it has" } else { "" };
                let event = self.0.host_event(
                    &held,
                    EventSeverity::Warning,
                    "HOST_REMOVED",
                    format!("by {}{kind}", caller.subject),
                );
                *removed.lock() = Some(held.uid.clone());
                let at = call.at(ObjectKey::Host(held.uid.clone()), held.revision);
                let mut changes = vec![Change::PutHost(Arc::new(next)), event];
                changes.extend(orphans::forgotten_with(view, &held.uid));
                Ok(Step {
                    proposal: Proposal { preconditions: vec![at], changes },
                    answer: RemoveHostResponse {},
                    objects: vec![host_object(&held)],
                })
            })
            .await?;
        let uid = removed.into_inner();
        if let Some(uid) = uid.filter(|_| !call.validate_only()) {
            self.0.order(&uid, &Order::Removed { wipe: r.wipe });
            self.0.hub.cut(&uid);
            self.0.edit_live(|live| live.remove_host(&uid));
        }
        Ok(Response::new(answer))
    }

    async fn approve_host(
        &self,
        request: Request<ApproveHostRequest>,
    ) -> Result<Response<ApproveHostResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let answer =
            edit!(self, caller, r, "HostService/ApproveHost", ApproveHostResponse, |record| {
                record.waiting_for_approval = false;
            });
        Ok(Response::new(answer))
    }

    async fn release_quarantine(
        &self,
        request: Request<ReleaseQuarantineRequest>,
    ) -> Result<Response<ReleaseQuarantineResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "HostService/ReleaseQuarantine";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let edit = |record: &mut HostRecord| record.quarantined = false;
        let answer = |host| ReleaseQuarantineResponse { host: Some(host) };
        let answer = self.edit_host(&call, &r.name, edit, answer).await?;
        let view = self.0.ledger.view();
        if let Some(held) = view.host_by_name(&r.name).filter(|_| !call.validate_only()) {
            self.0.forget_boots(&held.uid);
            self.0.order(&held.uid, &Order::End(Ended::Superseded));
        }
        Ok(Response::new(answer))
    }

    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "HostService/CreateJoinToken";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        call.expects_nothing()?;
        let mut p = Problems::default();
        let ttl = r.ttl.as_ref().map_or(Some(TTL_MS), duration_ms);
        let ttl = ttl.filter(|ms| (1..=MAX_TTL_MS).contains(ms)).unwrap_or_else(|| {
            p.add("ttl", "must be more than 0 and at most 30d");
            TTL_MS
        });
        let uses = if r.uses == 0 { 1 } else { r.uses };
        if uses > 10_000 {
            p.add("uses", "must be at most 10000");
        }
        check_labels(&r.labels, "labels", &mut p);
        p.finish(()).map_err(Error::from)?;
        let pin = berth_proto::tls::pin(self.0.roots.current().root_pem())
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
        let record = Arc::new(record);
        let endpoints = self.0.endpoints.clone();
        let server = endpoints.first().cloned().unwrap_or_default();
        // A token for one host is good under that name only.
        let name = match r.rejoin.as_str() {
            "" => String::new(),
            host => format!(" --name {host}"),
        };
        let answer = CreateJoinTokenResponse {
            token: Some(token),
            command: format!("berth-agent join --server {server} --token {}{name}", new.text),
            secret: new.text,
            endpoints,
        };
        let answer = self
            .write(&call, Kind::Token, &new.id, |view| {
                if !r.rejoin.is_empty() {
                    Self::host(view, &r.rejoin)?;
                }
                let key = ObjectKey::JoinToken(new.id.clone());
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![Precondition::At(key, Revision(0))],
                        changes: vec![Change::PutJoinToken(Arc::clone(&record))],
                    },
                    answer: answer.clone(),
                    objects: vec![format!("jointoken/{}", new.id)],
                })
            })
            .await?;
        Ok(Response::new(if call.validate_only() { answer.kept() } else { answer }))
    }

    async fn list_join_tokens(
        &self,
        request: Request<ListJoinTokensRequest>,
    ) -> Result<Response<ListJoinTokensResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let asked = Asked {
            call: "ListJoinTokens",
            parents: &[],
            fields: &["id", "created_by", "rejoin", "labels"],
        };
        let listing = self.listing(&caller, request.page.as_ref(), &asked)?;
        let all = listing
            .view
            .join_tokens()
            .filter(|kept| !kept.record.revoked)
            .filter_map(|kept| kept.record.token.clone())
            .filter(|token| {
                listing.wants(|field| match field {
                    "id" => Some(&token.id),
                    "created_by" => Some(&token.created_by),
                    "rejoin" => Some(&token.rejoin),
                    other => label(&token.labels, other),
                })
            })
            .collect();
        let (tokens, next_page_token) = self.page(listing, all, |token| token);
        Ok(Response::new(ListJoinTokensResponse { tokens, next_page_token }))
    }

    async fn revoke_join_token(
        &self,
        request: Request<RevokeJoinTokenRequest>,
    ) -> Result<Response<RevokeJoinTokenResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let method = "HostService/RevokeJoinToken";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::Token, &r.id, |view| {
                let Some(kept) = view.join_token(&r.id) else {
                    if r.allow_missing {
                        return Ok(Step::nothing(RevokeJoinTokenResponse {}));
                    }
                    return Err(Error::not_found(Kind::Token, &r.id));
                };
                let record =
                    JoinTokenRecord { revoked: true, ..JoinTokenRecord::clone(&kept.record) };
                let at = call.at(ObjectKey::JoinToken(r.id.clone()), kept.revision);
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![at],
                        changes: vec![Change::PutJoinToken(Arc::new(record))],
                    },
                    answer: RevokeJoinTokenResponse {},
                    objects: vec![format!("jointoken/{}", r.id)],
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn list_orphans(
        &self,
        request: Request<ListOrphansRequest>,
    ) -> Result<Response<ListOrphansResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let asked = Asked {
            call: "ListOrphans",
            parents: &[&r.host],
            fields: &["deployment", "host", "namespace"],
        };
        let listing = self.listing(&caller, r.page.as_ref(), &asked)?;
        let view = Arc::clone(&listing.view);
        let live = self.0.live.load();
        let now = self.0.time().mono;
        let all = view
            .replicas()
            .filter(|replica| replica.intent == ReplicaIntent::Orphan)
            .map(|replica| status::replica(&view, &live, replica, now))
            .filter(|shown| r.host.is_empty() || shown.host == r.host)
            .filter(|shown| {
                listing.wants(|field| match field {
                    "deployment" => Some(&shown.deployment),
                    "host" => Some(&shown.host),
                    _ => Some(&shown.namespace),
                })
            })
            .collect();
        let (replicas, next_page_token) = self.page(listing, all, |replica| replica);
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
        if r.replica_uids.len() > orphans::MAX_CHANGES {
            let words = format!("names more than {} replicas", orphans::MAX_CHANGES);
            return Err(Error::field("replica_uids", words).into());
        }
        let adopt = match r.decision() {
            OrphanDecision::Adopt => true,
            OrphanDecision::Release => false,
            OrphanDecision::Unspecified => {
                return Err(Error::field("decision", "must be adopt or release").into());
            }
        };
        let method = "HostService/ResolveOrphans";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        if call.expected().is_some() {
            let words = "must be absent: the call decides about many replicas, as they are then";
            return Err(Error::field("write.expected_revision", words).into());
        }
        let answer = self
            .write(&call, Kind::Replica, &r.host, |view| {
                let which = orphans_asked_for(view, &r)?;
                let asked = decide::Asked { actor: &caller.subject, now: wall_now() };
                let done = if adopt {
                    orphans::adopt(view, &which, &asked)
                } else {
                    orphans::release(&which)
                };
                if !r.replica_uids.is_empty()
                    && let Some((uid, why)) = done.kept.first()
                {
                    let words = format!("replica {uid} cannot be adopted: {why}");
                    return Err(Error::precondition(why.reason(), words));
                }
                let replicas = done.changes.iter().filter_map(|change| {
                    if let Change::PutReplica(replica) = change {
                        Some(ObjectKey::Replica(replica.uid.clone()))
                    } else {
                        None
                    }
                });
                let deployments = done.seen.iter().map(|d| ObjectKey::Deployment(d.uid.clone()));
                let still = |key: ObjectKey| {
                    let at = view.revision_of(&key);
                    Precondition::At(key, at)
                };
                let kept = done.kept.iter().take(MAX_KEPT).map(|(uid, why)| KeptOrphan {
                    replica_uid: uid.to_string(),
                    reason: why.to_string(),
                });
                let hosts: std::collections::BTreeSet<_> = which.iter().map(|r| &r.host).collect();
                let names = hosts.into_iter().filter_map(|uid| view.host(uid));
                Ok(Step {
                    answer: ResolveOrphansResponse {
                        resolved: done.resolved,
                        kept: kept.collect(),
                    },
                    objects: names.map(|h| host_object(h)).collect(),
                    proposal: Proposal {
                        preconditions: replicas.chain(deployments).map(still).collect(),
                        changes: done.changes,
                    },
                })
            })
            .await?;
        Ok(Response::new(answer))
    }
}

/// The orphans that a request names, each of them or those of a host.
fn orphans_asked_for(view: &View, r: &ResolveOrphansRequest) -> Result<Vec<Arc<Replica>>, Error> {
    if r.replica_uids.is_empty() {
        let host = Api::host(view, &r.host)?;
        return Ok(view.orphans_on(&host.uid).cloned().collect());
    }
    let mut which = Vec::new();
    for (i, uid) in r.replica_uids.iter().enumerate() {
        let path = || format!("replica_uids[{i}]");
        let parsed = uid.parse().map_err(|e: InvalidId| Error::field(path(), e.to_string()))?;
        match view.replica(&parsed) {
            None => return Err(Error::not_found(Kind::Replica, uid)),
            Some(found) if found.intent == ReplicaIntent::Orphan => which.push(Arc::clone(found)),
            // Decided about already.
            Some(_) => {}
        }
    }
    Ok(which)
}
