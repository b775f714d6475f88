//! Joining, renewing, quarantine and removal, as agents and operators meet them.

use super::tests::{call, served};
use super::{Api, auth};
use crate::cluster::{ClusterDesk, wall_now};
use crate::doors::PeerCerts;
use crate::session::desk::{Desk as _, Ended, Order};
use berth_proto::agent::agent_service_server::AgentServiceServer;
use berth_proto::agent::join_service_server::JoinService as _;
use berth_proto::agent::{
    BeginRenewalRequest, JoinRequest, Removed, RenewRequest, RenewResponse, ReplicaReport,
};
use berth_proto::api::host_service_server::HostService as _;
use berth_proto::api::*;
use berth_proto::ids::HostUid;
use berth_proto::record::HostRecord;
use berth_proto::tls;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::session::{Hold, Registration};
use std::sync::Arc;
use tonic::{Request, Status};
use tonic_types::StatusExt as _;
use tower::ServiceExt as _;

pub(super) struct Joined {
    pub(super) uid: HostUid,
    key_pem: String,
    pub(super) certificate_pem: String,
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

pub(super) async fn join(api: &Api, name: &str) -> Joined {
    let token = CreateJoinTokenRequest::default();
    let token = api.create_join_token(call(token)).await.unwrap().into_inner().secret;
    let (key_pem, csr_pem) = tls::key_and_request().unwrap();
    let request = JoinRequest { token, name: name.to_owned(), csr_pem, ..Default::default() };
    let joined = api.join(Request::new(request)).await.unwrap().into_inner();
    let uid = joined.host_uid.parse().unwrap();
    Joined { uid, key_pem, certificate_pem: joined.certificate_pem }
}

pub(super) async fn edit(api: &Api, uid: &HostUid, edit: impl FnOnce(&mut HostRecord)) {
    let next = api.0.ledger.view().host(uid).unwrap().edited(edit).unwrap();
    let changes = vec![Change::PutHost(Arc::new(next))];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
}

async fn renew(api: &Api, host: &Joined, key_pem: &str) -> Result<(RenewResponse, String), Status> {
    let begin = BeginRenewalRequest { host_uid: host.uid.to_string() };
    let challenge = api.begin_renewal(Request::new(begin)).await?.into_inner().challenge;
    let (next_key, csr_pem) = tls::key_and_request().unwrap();
    let signature = tls::sign(key_pem, &[&challenge[..], csr_pem.as_bytes()].concat()).unwrap();
    let request = RenewRequest {
        host_uid: host.uid.to_string(),
        csr_pem,
        challenge,
        public_key: tls::public_key_of(key_pem).unwrap(),
        signature,
    };
    Ok((api.renew(Request::new(request)).await?.into_inner(), next_key))
}

pub(super) fn shows(api: &Api, certificate_pem: &str) -> Result<auth::Caller, String> {
    let mut extensions = http::Extensions::new();
    extensions.insert(PeerCerts(Arc::new(tls::certificates(certificate_pem).unwrap())));
    let caller = auth::caller(&api.0, &http::HeaderMap::new(), &extensions);
    caller.map(|caller| caller.unwrap()).map_err(|error| error.to_string())
}

fn hello(nonce: &str) -> Registration {
    Registration {
        instance: "i".into(),
        boot_nonce: nonce.to_owned(),
        agent_start: 1,
        agent_version: "0".into(),
        facts: None,
        held: None,
        observed: Vec::new(),
        engine_observed: false,
        trust_version: 0,
    }
}

#[tokio::test]
async fn a_host_that_slept_past_its_certificates_end_renews_by_itself_within_the_grace() {
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    let day = 86_400_000;
    edit(&api, &host.uid, |r| r.certificate_expire_unix_ms = wall_now().0 - 89 * day).await;
    let (renewed, next_key) = renew(&api, &host, &host.key_pem).await.unwrap();
    assert!(shows(&api, &renewed.certificate_pem).is_ok(), "the new certificate is good");
    assert!(shows(&api, &host.certificate_pem).is_ok(), "the old one until the new one is used");
    // A lost answer: the old key may ask again.
    renew(&api, &host, &host.key_pem).await.unwrap();
    let stranger = tls::key_and_request().unwrap().0;
    assert_eq!(reason(&renew(&api, &host, &stranger).await.unwrap_err()), "KEY_UNKNOWN");

    edit(&api, &host.uid, |r| r.certificate_expire_unix_ms = wall_now().0 - 91 * day).await;
    let late = renew(&api, &host, &host.key_pem).await.unwrap_err();
    assert_eq!(reason(&late), "REKEY_GRACE_OVER");
    assert!(late.message().contains("--rejoin"), "{}", late.message());
    edit(&api, &host.uid, |r| r.removed = true).await;
    let told = renew(&api, &host, &next_key).await.unwrap().0;
    assert_eq!(
        told,
        RenewResponse { removed: Some(Removed { wipe: false }), ..Default::default() }
    );
}

/// Opens a session, as the door lets a caller do who has shown a certificate.
async fn dial(api: &Api, certificate_pem: &str) {
    let mut request = http::Request::post("/berth.agent.v1.AgentService/Session")
        .header("content-type", "application/grpc")
        .body(axum::body::Body::empty())
        .unwrap();
    request.extensions_mut().insert(shows(api, certificate_pem).unwrap());
    let answer = AgentServiceServer::new(api.clone()).oneshot(request).await.unwrap();
    assert!(answer.headers().get("grpc-status").is_none(), "{answer:?}");
}

#[tokio::test]
async fn the_first_session_with_a_new_key_retires_the_old_one_which_seen_again_quarantines_the_host()
 {
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    let (renewed, _) = renew(&api, &host, &host.key_pem).await.unwrap();
    dial(&api, &host.certificate_pem).await;
    assert!(shows(&api, &host.certificate_pem).is_ok(), "the new one was not used yet");
    dial(&api, &renewed.certificate_pem).await;
    assert!(shows(&api, &renewed.certificate_pem).is_ok());
    assert!(shows(&api, &host.certificate_pem).unwrap_err().contains("retired"));
    assert_eq!(reason(&renew(&api, &host, &host.key_pem).await.unwrap_err()), "KEY_RETIRED");
    assert!(api.0.ledger.view().host(&host.uid).unwrap().record.quarantined);
}

#[tokio::test]
async fn two_boots_of_one_identity_are_quarantined_until_an_operator_releases_them() {
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    let desk = ClusterDesk(Arc::clone(&api.0));
    let dial = async |nonce: &str| {
        let lines = desk.open(&host.uid);
        (desk.register(&host.uid, lines.id, hello(nonce)).await, lines)
    };
    let (first, mut original) = dial("original").await;
    assert_eq!(first.map(drop), Ok(()));
    let (second, _copy) = dial("copy").await;
    assert_eq!(second.map(drop), Ok(()), "a new boot alone may be a restart");
    let told = original.orders.try_recv().unwrap();
    assert!(matches!(told, Order::End(Ended::Superseded)), "{told:?}");
    let (third, _lines) = dial("original").await;
    assert_eq!(third, Err(Ended::Quarantined));
    let kept = api.0.ledger.view().host(&host.uid).cloned().unwrap();
    assert!(kept.record.quarantined, "it is durable");
    let held = berth_server_core::dispatch::host_set(&api.0.ledger.view(), &host.uid);
    assert!(!matches!(held, Some(Ok(_))), "it gets no set");
    for nonce in ["original", "copy", "third"] {
        assert_eq!(dial(nonce).await.0, Err(Ended::Quarantined));
    }
    let release = ReleaseQuarantineRequest { name: "edge".into(), ..Default::default() };
    let shown = api.release_quarantine(call(release)).await.unwrap().into_inner().host.unwrap();
    assert!(!shown.status.unwrap().quarantined);
    let (again, _lines) = dial("original").await;
    assert_eq!(again.map(drop), Ok(()));
}

#[tokio::test]
async fn a_hello_is_answered_with_a_set_that_was_made_knowing_what_it_told() {
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    let mut cluster = api.0.ledger.view().cluster.clone();
    cluster.observing = true;
    let changes = vec![Change::PutCluster(cluster)];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    let desk = ClusterDesk(Arc::clone(&api.0));
    let (first, second) = (desk.open(&host.uid), desk.open(&host.uid));
    let seen = |nonce: &str| Registration { engine_observed: true, ..hello(nonce) };
    let offered = desk.register(&host.uid, first.id, seen("original")).await;
    assert!(matches!(offered, Ok(Some(Ok(_)))), "{offered:?}");
    // Its disk was cloned before the restore: this copy runs what the other one does not.
    let unknown = ReplicaReport {
        replica_uid: "r1".into(),
        deployment_uid: "d1".into(),
        release: 1,
        ..ReplicaReport::default()
    };
    let copy = Registration { observed: vec![unknown], ..seen("copy") };
    let offered = desk.register(&host.uid, second.id, copy).await;
    assert_eq!(offered, Ok(Some(Err(Hold::Observing))));
}

#[tokio::test]
async fn a_removed_host_is_told_once_keeps_a_tombstone_and_frees_its_name() {
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    let desk = ClusterDesk(Arc::clone(&api.0));
    let mut lines = desk.open(&host.uid);
    desk.register(&host.uid, lines.id, hello("a")).await.unwrap();
    let remove = RemoveHostRequest { name: "edge".into(), wipe: true, ..Default::default() };
    api.remove_host(call(remove)).await.unwrap();
    assert!(matches!(lines.orders.try_recv(), Ok(Order::Removed { wipe: true })));
    assert!(lines.orders.try_recv().is_err(), "told once");
    desk.close(&host.uid, lines.id).await;

    let view = api.0.ledger.view();
    assert!(view.host(&host.uid).unwrap().is_removed(), "the tombstone stays");
    assert!(view.host_by_name("edge").is_none());
    // It still gets in to be told, and nothing else.
    let mut late = desk.open(&host.uid);
    assert_eq!(desk.register(&host.uid, late.id, hello("b")).await, Ok(None));
    assert!(matches!(late.orders.try_recv(), Ok(Order::Removed { wipe: true })));
    // One whose certificate has ended gets as far as this only.
    let told = renew(&api, &host, &host.key_pem).await.unwrap().0;
    assert_eq!(told, RenewResponse { removed: Some(Removed { wipe: true }), ..Default::default() });
    let second = join(&api, "edge").await;
    assert_ne!(second.uid, host.uid, "a new host of the name is another one");
}

#[tokio::test]
async fn a_certificate_of_a_revoked_user_stays_dead_when_the_name_is_given_again() {
    let (_dir, api) = served();
    let hour = berth_proto::ids::Wall(wall_now().0 + 3_600_000);
    let create = async || {
        let (_, csr_pem) = tls::key_and_request().unwrap();
        let request = CreateUserRequest {
            name: "vera".into(),
            bindings: vec![RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() }],
            expire_time: Some(berth_proto::convert::timestamp(hour)),
            csr_pem,
            ..CreateUserRequest::default()
        };
        use berth_proto::api::user_service_server::UserService as _;
        api.create_user(call(request)).await.unwrap().into_inner().certificate_pem
    };
    let old = create().await;
    assert!(shows(&api, &old).is_ok());
    let kept = api.0.ledger.view().user("vera").unwrap().record.clone();
    let revoked = berth_proto::record::UserRecord { revoked: true, ..(*kept).clone() };
    // A user of the name made later: seconds count in certificates, hence a minute.
    let mut later = (*kept).clone();
    if let Some(meta) = &mut later.meta {
        meta.uid = "another".into();
        meta.create_unix_ms += 60_000;
    }
    for record in [revoked, later] {
        let changes = vec![Change::PutUser(Arc::new(record))];
        api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    }
    assert!(shows(&api, &old).unwrap_err().contains("revoked"));
}

#[tokio::test]
async fn a_join_whose_answer_was_lost_is_answered_again_and_costs_one_use() {
    let (_dir, api) = served();
    let token = CreateJoinTokenRequest::default();
    let token = api.create_join_token(call(token)).await.unwrap().into_inner().secret;
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = JoinRequest {
        token,
        name: "edge-1".to_owned(),
        csr_pem,
        request_id: "r1".to_owned(),
        ..Default::default()
    };
    let join = |request: &JoinRequest| api.join(Request::new(request.clone()));
    let first = join(&request).await.unwrap().into_inner();
    let again = JoinRequest { facts: Some(HostFacts::default()), ..request.clone() };
    assert_eq!(join(&again).await.unwrap().into_inner(), first);
    // Another request of the same id, another id, and none: the token is used up.
    let other = JoinRequest { name: "edge-2".to_owned(), ..request.clone() };
    assert_eq!(reason(&join(&other).await.unwrap_err()), "REQUEST_ID_REUSED");
    for id in ["r2", ""] {
        let other = JoinRequest { request_id: id.to_owned(), ..request.clone() };
        assert_eq!(reason(&join(&other).await.unwrap_err()), "TOKEN_USED_UP");
    }
    // Whoever does not have the secret is told nothing.
    let mut parts: Vec<String> = request.token.split('.').map(str::to_owned).collect();
    parts[2] = "x".repeat(parts[2].len());
    let wrong = JoinRequest { token: parts.join("."), ..request.clone() };
    assert_eq!(reason(&join(&wrong).await.unwrap_err()), "TOKEN_UNKNOWN");
}

#[tokio::test]
async fn what_a_host_does_for_its_identity_and_its_quarantine_are_in_the_audit_log() {
    use berth_proto::api::event_service_server::EventService as _;
    let (_dir, api) = served();
    let host = join(&api, "edge").await;
    renew(&api, &host, &host.key_pem).await.unwrap();
    api.0.quarantine(&host.uid, "two boots use this identity").await;
    let all = api.list_audit(call(ListAuditRequest::default())).await.unwrap().into_inner();
    let object = format!("host/edge@{}", host.uid);
    let told: Vec<(&str, &str)> = all
        .entries
        .iter()
        .filter(|e| e.objects == [object.clone()])
        .map(|e| (e.actor.as_str(), e.method.as_str()))
        .collect();
    let itself = format!("host/{}", host.uid);
    assert_eq!(
        told,
        [
            ("server", "quarantine"),
            (itself.as_str(), "JoinService/Renew"),
            (itself.as_str(), "JoinService/Join"),
        ]
    );
}

#[tokio::test]
async fn a_host_that_waits_for_approval_gets_no_set_until_somebody_approves() {
    use berth_server_core::dispatch::host_set;
    use berth_server_core::session::Hold;
    let (_dir, api) = served();
    let labels = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>()
    };
    let token = CreateJoinTokenRequest {
        require_approval: true,
        labels: labels(&[("zone", "eu"), ("tier", "edge")]).into_iter().collect(),
        ..Default::default()
    };
    let token = api.create_join_token(call(token)).await.unwrap().into_inner().secret;
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = JoinRequest { token, name: "edge".into(), csr_pem, ..Default::default() };
    let joined = api.join(Request::new(request)).await.unwrap().into_inner();
    assert!(joined.waiting_for_approval);
    let uid: HostUid = joined.host_uid.parse().unwrap();
    let set = || host_set(&api.0.ledger.view(), &uid);
    assert!(matches!(set(), Some(Err(Hold::WaitingForApproval))));
    let approve = ApproveHostRequest { name: "edge".into(), ..Default::default() };
    let shown = api.approve_host(call(approve)).await.unwrap().into_inner().host.unwrap();
    assert!(!shown.status.unwrap().waiting_for_approval);
    assert!(matches!(set(), Some(Ok(_))));
    // The token's labels reach the host, and an operator's win.
    let label = LabelHostRequest {
        name: "edge".into(),
        set: labels(&[("tier", "core")]).into_iter().collect(),
        ..Default::default()
    };
    api.label_host(call(label)).await.unwrap();
    let view = api.0.ledger.view();
    let counts = &view.host(&uid).unwrap().labels;
    assert_eq!((counts["zone"].as_str(), counts["tier"].as_str()), ("eu", "core"));
}

#[tokio::test]
async fn every_join_makes_a_new_instance_and_the_machine_before_is_known_when_it_comes_back() {
    let (_dir, api) = served();
    let first = join(&api, "edge").await;
    let instance =
        |api: &Api| api.0.ledger.view().host(&first.uid).unwrap().record.instance.clone();
    let before = instance(&api);
    let token = CreateJoinTokenRequest { rejoin: "edge".into(), ..Default::default() };
    let token = api.create_join_token(call(token)).await.unwrap().into_inner().secret;
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = JoinRequest { token, name: "edge".into(), csr_pem, ..Default::default() };
    let second = api.join(Request::new(request)).await.unwrap().into_inner();
    assert_eq!(second.host_uid, first.uid.to_string(), "it is the same host");
    assert_ne!(instance(&api), before);
    assert_eq!(reason(&renew(&api, &first, &first.key_pem).await.unwrap_err()), "KEY_RETIRED");
    assert!(api.0.ledger.view().host(&first.uid).unwrap().record.quarantined);
}

#[tokio::test]
async fn the_last_admin_of_all_namespaces_cannot_be_revoked() {
    use berth_proto::api::user_service_server::UserService as _;
    use berth_server_core::batching::Precondition;
    use berth_server_core::view::ObjectKey;
    let (_dir, api) = served();
    let create = |name: &str, role: Role, namespace: &str| CreateUserRequest {
        name: name.into(),
        bindings: vec![RoleBinding { role: role as i32, namespace: namespace.into(), exec: false }],
        expire_time: Some(berth_proto::convert::timestamp(berth_proto::ids::Wall(
            wall_now().0 + 3_600_000,
        ))),
        ..Default::default()
    };
    let revoke = |name: &str| RevokeUserRequest { name: name.into(), ..Default::default() };
    for user in [
        create("root", Role::Admin, ""),
        create("prods", Role::Admin, "prod"),
        create("vera", Role::Viewer, ""),
    ] {
        api.create_user(call(user)).await.unwrap();
    }
    let refused = api.revoke_user(call(revoke("root"))).await.unwrap_err();
    assert_eq!(reason(&refused), "LAST_ADMIN");
    api.revoke_user(call(revoke("vera"))).await.unwrap();
    api.create_user(call(create("second", Role::Admin, ""))).await.unwrap();
    // Whoever goes needs the other as it was found: two that revoke each other do not both go.
    let view = api.0.ledger.view();
    for (name, beside) in [("root", "second"), ("second", "root")] {
        let held = view.user(beside).unwrap().revision;
        let still = Precondition::At(ObjectKey::UserName(beside.into()), held);
        assert_eq!(super::users::admin_beside(&view, name).unwrap(), Some(still));
    }
    assert_eq!(super::users::admin_beside(&view, "prods").unwrap(), None);
    api.revoke_user(call(revoke("root"))).await.unwrap();
    assert_eq!(reason(&api.revoke_user(call(revoke("second"))).await.unwrap_err()), "LAST_ADMIN");
}
