//! What agents call.

use super::writes::MAX_REQUEST_ID;
use super::{Api, audit, auth};
use crate::cluster::{ClusterDesk, wall_now};
use crate::doors::PeerAddr;
use crate::error::{Error, Kind};
use crate::identity::ca::HOST_DAYS;
use crate::identity::tokens::{self, Renewal};
use crate::ledger::refused;
use crate::session::pump;
use berth_proto::agent::agent_service_server::AgentService;
use berth_proto::agent::join_service_server::JoinService;
use berth_proto::agent::*;
use berth_proto::api::EventSeverity;
use berth_proto::convert::timestamp;
use berth_proto::ids::{Name, Wall};
use berth_proto::record::{HostRecord, JoinTokenRecord, Meta, RequestRecord};
use berth_proto::tls::Subject;
use berth_server_core::batching::{Precondition, Proposal, Refusal};
use berth_server_core::change::{Change, audited};
use berth_server_core::objects::Host;
use berth_server_core::session::Terms;
use berth_server_core::view::ObjectKey;
use berth_server_core::view::View;
use prost::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// A challenge is good for so long.
const CHALLENGE: Duration = Duration::from_secs(60);
/// The window in which a whole fleet comes back: 1 s for each thousand hosts, at least 1 s.
const HOSTS_PER_SECOND: u64 = 1000;

#[tonic::async_trait]
impl AgentService for Api {
    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = auth::of(&request);
        let host = caller.host.clone().ok_or_else(|| {
            Error::denied("HOST_NEEDED", "only a host's agent may open a session")
        })?;
        let view = self.0.ledger.view();
        let first_use = |view: &View| {
            let held = view.host(&host).filter(|held| !held.is_removed());
            let next = held.and_then(|held| tokens::use_key(&held.record, &caller.public_key));
            let next = next.and_then(|next| Host::new(next).ok());
            next.map(|next| Change::PutHost(Arc::new(next))).into_iter().collect()
        };
        if !self.0.keep_made(first_use).await {
            let words = "the key's first use could not be kept; dial again";
            return Err(Error::unavailable("LEDGER_BUSY", words).into());
        }
        let settings = &self.0.settings;
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let hosts = view.host_count() as u64;
        let terms = Terms {
            epoch: view.epoch(),
            cluster: self.0.roots.cluster().to_string(),
            ping_interval_ms: ms(settings.ping),
            idle_timeout_ms: ms(settings.idle),
            status_interval_ms: 100,
            reconnect_window_ms: (1000 * hosts / HOSTS_PER_SECOND).clamp(1000, 60_000),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: berth_server_core::release::FEATURES.map(str::to_owned).to_vec(),
            trust: self.0.trust(),
        };
        let desk = Arc::new(ClusterDesk(Arc::clone(&self.0)));
        let outgoing = pump::start(desk, host, terms, request.into_inner());
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// A join that may have been made before, its answer lost.
struct Repeated {
    /// `None`: the agent did not choose a request id.
    key: Option<String>,
    request_sha256: Vec<u8>,
}

impl Repeated {
    /// The secret was judged by then: nobody else's answer is given away.
    fn of(token: &str, request: &JoinRequest) -> Result<Self, Error> {
        use sha2::Digest as _;
        let id = &request.request_id;
        if id.chars().count() > MAX_REQUEST_ID {
            let words = format!("must have at most {MAX_REQUEST_ID} characters");
            return Err(Error::field("request_id", words));
        }
        // Facts may have changed meanwhile.
        let same = JoinRequest { facts: None, ..request.clone() };
        Ok(Self {
            key: (!id.is_empty()).then(|| format!("join/{token}:{id}")),
            request_sha256: sha2::Sha256::digest(same.encode_to_vec()).to_vec(),
        })
    }

    fn keeps(&self, answer: &JoinResponse) -> Option<Change> {
        let record = RequestRecord {
            key: self.key.clone()?,
            time_unix_ms: wall_now().0,
            request_sha256: self.request_sha256.clone(),
            response: answer.encode_to_vec(),
        };
        Some(Change::PutRequest(Arc::new(record)))
    }
}

impl Api {
    /// What was answered to the same join before.
    fn kept_join(&self, asked: &Repeated) -> Result<Option<JoinResponse>, Error> {
        let Some(key) = &asked.key else { return Ok(None) };
        let view = self.0.ledger.view();
        let Some(kept) = view.request(key) else { return Ok(None) };
        if kept.record.request_sha256 != asked.request_sha256 {
            return Err(Error::RequestReused(asked.key.clone().unwrap_or_default()));
        }
        let answer = JoinResponse::decode(kept.record.response.as_slice())
            .map_err(|e| Error::internal("cannot read a kept answer", e))?;
        Ok(Some(answer))
    }

    /// What a challenge is: when it ends, and a keyed hash over that and the host.
    fn challenge(&self, host: &str, ends: Wall) -> Vec<u8> {
        let key = ring::hmac::Key::new(
            ring::hmac::HMAC_SHA256,
            self.0.roots.current().key_pem().as_bytes(),
        );
        let message = [host.as_bytes(), &[0], &ends.0.to_be_bytes()].concat();
        let tag = ring::hmac::sign(&key, &message);
        [&ends.0.to_be_bytes()[..], tag.as_ref()].concat()
    }

    fn challenge_is_good(&self, host: &str, challenge: &[u8]) -> bool {
        use subtle::ConstantTimeEq as _;
        let Some(head) = challenge.get(..8).and_then(|h| <[u8; 8]>::try_from(h).ok()) else {
            return false;
        };
        let ends = Wall(i64::from_be_bytes(head));
        wall_now() < ends && bool::from(self.challenge(host, ends).ct_eq(challenge))
    }
}

fn peer<T>(request: &Request<T>) -> String {
    request.extensions().get::<PeerAddr>().map(|a| a.0.to_string()).unwrap_or_default()
}

/// An audit entry for what a host's agent does for its own identity.
fn by_host(host: &Host, peer: String, method: &str, request_id: &str) -> Change {
    let subject = format!("host/{}", host.uid);
    let caller = auth::Caller { subject, peer, ..auth::Caller::default() };
    let object = audited("host", None, host.name.as_str(), host.uid.as_str());
    audit(&caller, method, request_id, vec![object])
}

#[tonic::async_trait]
impl JoinService for Api {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let peer = peer(&request);
        let r = request.into_inner();
        let denied = |why: tokens::BadToken| {
            Error::denied(why.reason(), format!("{why}; `berth host token create` makes a new one"))
        };
        let (id, secret) =
            tokens::read_join(&r.token).ok_or_else(|| denied(tokens::BadToken::Unknown))?;
        let view = self.0.ledger.ahead();
        let kept = view.join_token(id).cloned();
        let judged = tokens::judge_join(kept.as_ref().map(|k| &*k.record), secret, wall_now());
        let repeated = Repeated::of(id, &r)?;
        match judged {
            // What was taken may not be asked for again, and its end is no reason to say nothing.
            Ok(()) | Err(tokens::BadToken::UsedUp | tokens::BadToken::Expired) => {
                if let Some(answer) = self.kept_join(&repeated)? {
                    return Ok(Response::new(answer));
                }
            }
            Err(tokens::BadToken::Unknown | tokens::BadToken::Revoked) => {}
        }
        judged.map_err(denied)?;
        let kept = kept.ok_or_else(|| denied(tokens::BadToken::Unknown))?;
        let token = kept.record.token.clone().unwrap_or_default();
        let name: Name = r
            .name
            .parse()
            .map_err(|e: berth_proto::ids::InvalidId| Error::field("name", e.to_string()))?;
        let existing = view.host_by_name(name.as_str()).cloned();
        let uid = match (&existing, token.rejoin.as_str()) {
            (None, "") => uuid::Uuid::now_v7().to_string(),
            (Some(host), rejoin) if rejoin == name.as_str() => host.uid.to_string(),
            (Some(_), "") => {
                return Err(Error::Exists {
                    kind: Kind::Host,
                    name: name.to_string(),
                    hint: format!(
                        "; a token of `berth host token create --rejoin {name}` lets that host join again"
                    ),
                }
                .into());
            }
            (_, rejoin) => {
                return Err(Error::denied(
                    "TOKEN_FOR_ANOTHER_HOST",
                    format!("this token is for host \"{rejoin}\" only"),
                )
                .into());
            }
        };
        let subject =
            Subject::Host(uid.parse().map_err(|e| Error::internal("cannot make a host's uid", e))?);
        let certificate_pem = self
            .0
            .roots
            .signing()
            .sign(&r.csr_pem, subject, HOST_DAYS)
            .map_err(|e| Error::field("csr_pem", crate::error::Chain(&e).to_string()))?;
        let certificates = berth_proto::tls::certificates(&certificate_pem)
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let public_key = berth_proto::tls::public_key(&certificates[0])
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let (_, until) = berth_proto::tls::validity(&certificate_pem)
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let now = wall_now().0;
        let before = existing.as_ref().map(|h| h.record.clone()).unwrap_or_default();
        let created = before.meta.as_ref().map_or(now, |m| m.create_unix_ms);
        let record = HostRecord {
            meta: Some(Meta {
                uid: uid.clone(),
                name: name.to_string(),
                labels: before.meta.as_ref().map(|m| m.labels.clone()).unwrap_or_default(),
                create_unix_ms: created,
                update_unix_ms: now,
                ..Meta::default()
            }),
            spec: before.spec,
            instance: uuid::Uuid::now_v7().to_string(),
            facts: r.facts.clone(),
            public_key,
            certificate_expire_unix_ms: until.saturating_mul(1000),
            waiting_for_approval: token.require_approval,
            token_labels: token.labels.clone(),
            // The machine that had the name before may still be there: its keys end here, and are
            // known when they come back.
            retired_keys: tokens::retired_at_rejoin(&before),
            ..HostRecord::default()
        };
        let host =
            Host::new(record.clone()).map_err(|e| Error::internal("cannot make the host", e))?;
        let mut used = JoinTokenRecord::clone(&kept.record);
        if let Some(token) = &mut used.token {
            token.uses_left = token.uses_left.saturating_sub(1);
        }
        let joined = self.0.host_event(
            &host,
            EventSeverity::Info,
            "HOST_JOINED",
            format!("with token {id}, made by {}", token.created_by),
        );
        let at = existing.as_ref().map(|h| h.revision).unwrap_or_default();
        let answer = JoinResponse {
            host_uid: uid,
            name: name.to_string(),
            instance: record.instance,
            cluster: self.0.roots.cluster().to_string(),
            certificate_pem,
            trust: Some(self.0.trust()),
            waiting_for_approval: token.require_approval,
            registry: self.0.registry_address.clone(),
        };
        let audit = by_host(&host, peer, "JoinService/Join", &r.request_id);
        let used = Change::PutJoinToken(Arc::new(used));
        let mut changes = vec![Change::PutHost(Arc::new(host)), used, joined, audit];
        changes.extend(repeated.keeps(&answer));
        let proposal = Proposal {
            preconditions: vec![
                Precondition::At(ObjectKey::JoinToken(id.to_owned()), kept.revision),
                Precondition::At(ObjectKey::HostName(name.clone()), at),
            ],
            changes,
        };
        self.0.ledger.propose(proposal).await.map_err(|why| {
            if matches!(why, Refusal::Conflict { .. }) {
                // Another join with the same token was faster: ask again, it may have uses left.
                Error::unavailable("JOIN_RACED", "another join came first; try again")
            } else {
                refused(why, Kind::Host, name.as_str())
            }
        })?;
        Ok(Response::new(answer))
    }

    async fn begin_renewal(
        &self,
        request: Request<BeginRenewalRequest>,
    ) -> Result<Response<BeginRenewalResponse>, Status> {
        let r = request.into_inner();
        let life = i64::try_from(CHALLENGE.as_millis()).unwrap_or(60_000);
        let ends = Wall(wall_now().0 + life);
        Ok(Response::new(BeginRenewalResponse {
            challenge: self.challenge(&r.host_uid, ends),
            expire_time: Some(timestamp(ends)),
        }))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let peer = peer(&request);
        let r = request.into_inner();
        if !self.challenge_is_good(&r.host_uid, &r.challenge) {
            return Err(
                Error::denied("CHALLENGE_EXPIRED", "the challenge is over; begin again").into()
            );
        }
        let point = x509_parser::x509::SubjectPublicKeyInfo::from_der_bytes(&r.public_key);
        let message = [&r.challenge[..], r.csr_pem.as_bytes()].concat();
        let good = point.is_some_and(|point| {
            ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_ASN1, point)
                .verify(&message, &r.signature)
                .is_ok()
        });
        if !good {
            return Err(Error::denied(
                "SIGNATURE_WRONG",
                "the signature is not the recorded key's",
            )
            .into());
        }
        let view = self.0.ledger.ahead();
        let host = r.host_uid.parse().ok().and_then(|uid| view.host(&uid).cloned());
        let Some(host) = host else {
            let words = "no such host is known; let it join again, or restore a newer backup";
            return Err(Error::denied("HOST_UNKNOWN", words).into());
        };
        let grace = self.0.settings.rekey_grace;
        match tokens::judge_renewal(&host.record, &r.public_key, grace, wall_now()) {
            Renewal::Grant => {}
            Renewal::Removed => {
                let removed = Some(Removed { wipe: host.record.wipe });
                return Ok(Response::new(RenewResponse { removed, ..Default::default() }));
            }
            Renewal::GraceOver => {
                return Err(Error::denied(
                    "REKEY_GRACE_OVER",
                    "the certificate ended too long ago; let the host join again with `--rejoin`",
                )
                .into());
            }
            Renewal::RetiredKey => {
                self.0.quarantine(&host.uid, auth::RETIRED).await;
                return Err(Error::denied("KEY_RETIRED", "this key was retired").into());
            }
            Renewal::UnknownKey => {
                return Err(
                    Error::denied("KEY_UNKNOWN", "this is not the host's recorded key").into()
                );
            }
        }
        let certificate_pem = self
            .0
            .roots
            .signing()
            .sign(&r.csr_pem, Subject::Host(host.uid.clone()), HOST_DAYS)
            .map_err(|e| Error::field("csr_pem", crate::error::Chain(&e).to_string()))?;
        let certificates = berth_proto::tls::certificates(&certificate_pem)
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let next_key = berth_proto::tls::public_key(&certificates[0])
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let (_, until) = berth_proto::tls::validity(&certificate_pem)
            .map_err(|e| Error::internal("cannot read what was signed", e))?;
        let next = host
            .edited(|record| {
                record.next_public_key = next_key;
                record.certificate_expire_unix_ms = until.saturating_mul(1000);
            })
            .map_err(|e| Error::internal("cannot change the host", e))?;
        let key = ObjectKey::Host(host.uid.clone());
        let proposal = Proposal {
            preconditions: vec![Precondition::At(key, host.revision)],
            changes: vec![
                Change::PutHost(Arc::new(next)),
                by_host(&host, peer, "JoinService/Renew", ""),
            ],
        };
        self.0
            .ledger
            .propose(proposal)
            .await
            .map_err(|why| refused(why, Kind::Host, host.name.as_str()))?;
        let trust = Some(self.0.trust());
        Ok(Response::new(RenewResponse { certificate_pem, trust, removed: None }))
    }
}

trait PointOf {
    fn from_der_bytes(der: &[u8]) -> Option<Vec<u8>>;
}

impl PointOf for x509_parser::x509::SubjectPublicKeyInfo<'_> {
    /// The curve point inside a SubjectPublicKeyInfo.
    fn from_der_bytes(der: &[u8]) -> Option<Vec<u8>> {
        use x509_parser::prelude::FromDer as _;
        let (_, info) = x509_parser::x509::SubjectPublicKeyInfo::from_der(der).ok()?;
        Some(info.subject_public_key.data.to_vec())
    }
}
