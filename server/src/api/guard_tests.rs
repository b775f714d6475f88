//! Who the gateway and the registry let in: by token and certificate, role, namespace and assignment.

use super::Api;
use super::apply_tests::{apply, input, push};
use super::auth::{Caller, Doorkeeper};
use super::identity_tests::join;
use super::tests::{call, served};
use crate::doors::{PeerAddr, PeerCerts};
use crate::gateway::http::{Forbidden, Guard};
use crate::registry::access::{
    Access, Action, Credentials, Noted, Noting, PeerCertificates, Principal, Reach,
};
use crate::registry::names::{Reference, RepoName};
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::event_service_server::EventService as _;
use berth_proto::api::user_service_server::UserService as _;
use berth_proto::api::*;
use berth_proto::convert::timestamp;
use berth_proto::ids::Wall;
use berth_proto::record::ReplicaRecord;
use berth_proto::tls;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::objects::Replica;
use std::sync::Arc;
use tonic::Code;

/// A user with one role in one namespace (empty: all); answers with its certificate.
async fn user(api: &Api, name: &str, role: Role, namespace: &str) -> String {
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = CreateUserRequest {
        name: name.into(),
        bindings: vec![RoleBinding { role: role as i32, namespace: namespace.into(), exec: false }],
        expire_time: Some(timestamp(Wall(crate::cluster::wall_now().0 + 3_600_000))),
        csr_pem,
        ..CreateUserRequest::default()
    };
    api.create_user(call(request)).await.unwrap().into_inner().certificate_pem
}

async fn token(api: &Api, name: &str, deployment: &str) -> String {
    let request = CreateUserTokenRequest {
        name: name.into(),
        deployment: deployment.into(),
        ..CreateUserTokenRequest::default()
    };
    api.create_user_token(call(request)).await.unwrap().into_inner().secret
}

/// What the gateway says to a caller with this header and these certificates.
async fn asks(
    api: &Api,
    bearer: Option<&str>,
    certificate_pem: Option<&str>,
    model: Option<&str>,
) -> Result<(), Forbidden> {
    let mut headers = http::HeaderMap::new();
    if let Some(bearer) = bearer {
        headers.insert("authorization", format!("Bearer {bearer}").parse().unwrap());
    }
    let mut extensions = http::Extensions::new();
    if let Some(pem) = certificate_pem {
        extensions.insert(PeerCerts(Arc::new(tls::certificates(pem).unwrap())));
    }
    Guard::allows(&Doorkeeper(Arc::clone(&api.0)), &headers, &extensions, model).await
}

/// How it ended: `in`, or which refusal.
fn told(answer: Result<(), Forbidden>) -> &'static str {
    match answer {
        Ok(()) => "in",
        Err(Forbidden::Anonymous) => "anonymous",
        Err(Forbidden::NotGood(_)) => "not good",
        Err(Forbidden::NotPermitted(_)) => "not permitted",
    }
}

#[tokio::test]
async fn the_gateway_lets_in_whom_a_role_or_a_deployments_key_opens_the_deployment() {
    let (_dir, api) = served();
    let everywhere = user(&api, "anna", Role::Viewer, "").await;
    let edge = user(&api, "cam", Role::Viewer, "edge").await;
    let all = token(&api, "anna", "").await;
    let iris = token(&api, "anna", "iris").await;
    let edge_iris = token(&api, "anna", "edge.iris").await;
    let beyond = token(&api, "cam", "iris").await;
    let forged = format!("{}x", &all[..all.len() - 1]);
    // Header, certificate, model, what is told.
    let cases = [
        (None, None, None, "anonymous"),
        (None, None, Some("iris"), "anonymous"),
        (Some("nonsense"), None, Some("iris"), "not good"),
        (Some(&*forged), None, Some("iris"), "not good"),
        // A bad token is not made good by a certificate.
        (Some(&*forged), Some(&*everywhere), Some("iris"), "not good"),
        (Some(&*all), None, None, "in"),
        (Some(&*all), None, Some("iris"), "in"),
        (Some(&*all), None, Some("edge.iris"), "in"),
        (None, Some(&*everywhere), Some("edge.iris"), "in"),
        (None, Some(&*edge), Some("edge.iris"), "in"),
        (None, Some(&*edge), Some("iris"), "not permitted"),
        (None, Some(&*edge), Some("edgy.iris"), "not permitted"),
        (Some(&*iris), None, Some("iris"), "in"),
        (Some(&*iris), None, Some("digits"), "not permitted"),
        (Some(&*iris), None, Some("edge.iris"), "not permitted"),
        (Some(&*edge_iris), None, Some("edge.iris"), "in"),
        (Some(&*edge_iris), None, Some("iris"), "not permitted"),
        // A key opens no more than its user's role does.
        (Some(&*beyond), None, Some("iris"), "not permitted"),
    ];
    for (i, (bearer, certificate, model, wanted)) in cases.into_iter().enumerate() {
        let answer = told(asks(&api, bearer, certificate, model).await);
        assert_eq!(answer, wanted, "case {i}: {model:?}");
    }

    let revoke = RevokeUserRequest { name: "anna".into(), ..RevokeUserRequest::default() };
    api.revoke_user(call(revoke)).await.unwrap();
    assert_eq!(told(asks(&api, Some(&all), None, Some("iris")).await), "not good");
    assert_eq!(told(asks(&api, None, Some(&everywhere), Some("iris")).await), "not good");
}

#[tokio::test]
async fn a_hosts_certificate_is_nobody_at_the_gateway() {
    let (_dir, api) = served();
    let host = join(&api, "edge-1").await;
    for model in [None, Some("iris")] {
        let answer = asks(&api, None, Some(&host.certificate_pem), model).await;
        assert_eq!(told(answer), "anonymous");
    }
}

/// What a caller may do in a repository of the registry.
async fn may(api: &Api, shown: Credentials, repository: &str) -> Option<Vec<Action>> {
    let door = Doorkeeper(Arc::clone(&api.0));
    let principal = door.authenticate(shown).await.ok()?;
    let repository = RepoName::parse(repository).unwrap();
    let allowed = |action: &Action| Access::allows(&door, &principal, &repository, *action);
    Some([Action::Pull, Action::Push, Action::Delete].into_iter().filter(allowed).collect())
}

#[tokio::test]
async fn the_registry_knows_namespaces_and_takes_no_deployments_key() {
    use Action::{Delete, Pull, Push};
    let (_dir, api) = served();
    let certificate = user(&api, "cam", Role::Operator, "edge").await;
    let whole = token(&api, "cam", "").await;
    let key = token(&api, "cam", "edge.iris").await;
    let basic =
        |password: &str| Credentials::Basic { user: "me".into(), password: password.into() };
    let chain = tls::certificates(&certificate).unwrap();
    let by_certificate =
        Credentials::Certificate(PeerCertificates(chain.into_iter().collect::<Arc<[_]>>()));
    for shown in [basic(&whole), Credentials::Bearer(whole.clone()), by_certificate] {
        let edge = may(&api, shown.clone(), "edge/models/iris").await;
        assert_eq!(edge.unwrap(), [Pull, Push, Delete], "{shown:?}");
        assert_eq!(may(&api, shown.clone(), "models/iris").await.unwrap(), [], "{shown:?}");
        assert_eq!(may(&api, shown.clone(), "runtimes/onnx").await.unwrap(), [Pull]);
    }
    assert_eq!(may(&api, basic(&key), "edge/models/iris").await, None);
    assert_eq!(may(&api, basic("nonsense"), "edge/models/iris").await, None);
}

#[tokio::test]
async fn an_agent_reads_what_its_assignments_name_and_nothing_once_they_are_gone() {
    let (_dir, api) = served();
    push(&api).await;
    apply(&api, vec![input("app", &[])]).await.unwrap();
    let host = join(&api, "edge-1").await;
    let view = api.0.ledger.view();
    let deployment = view.deployments().next().unwrap();
    let digest =
        view.release(&deployment.uid, deployment.release()).unwrap().source.image.digest.clone();
    let door = Doorkeeper(Arc::clone(&api.0));
    let chain = tls::certificates(&host.certificate_pem).unwrap();
    let shown = Credentials::Certificate(PeerCertificates(chain.into_iter().collect::<Arc<[_]>>()));
    let principal = door.authenticate(shown.clone()).await.unwrap();
    let app = RepoName::parse("app").unwrap();
    let write = async |change: Change| {
        let proposal = Proposal { preconditions: Vec::new(), changes: vec![change] };
        api.0.ledger.propose(proposal).await.unwrap();
    };

    assert_eq!(may(&api, shown.clone(), "app").await.unwrap(), []);
    let replica = Replica::new(&ReplicaRecord {
        uid: "r1".into(),
        deployment_uid: deployment.uid.to_string(),
        release: 1,
        host_uid: host.uid.to_string(),
        intent: ReplicaIntent::Run as i32,
        ..ReplicaRecord::default()
    });
    let replica = Arc::new(replica.unwrap());
    write(Change::PutReplica(Arc::clone(&replica))).await;
    assert_eq!(may(&api, shown.clone(), "app").await.unwrap(), [Action::Pull]);
    assert_eq!(door.reach(&principal, &app), Reach::Below(vec![digest]));
    // Neither another repository nor another host's.
    assert_eq!(may(&api, shown.clone(), "models/iris").await.unwrap(), []);
    let other = join(&api, "edge-2").await;
    let chain = tls::certificates(&other.certificate_pem).unwrap();
    let others =
        Credentials::Certificate(PeerCertificates(chain.into_iter().collect::<Arc<[_]>>()));
    assert_eq!(may(&api, others, "app").await.unwrap(), []);

    write(Change::DeleteReplica(replica.uid.clone())).await;
    assert_eq!(may(&api, shown, "app").await.unwrap(), []);
    assert_eq!(door.reach(&principal, &app), Reach::Below(Vec::new()));
}

#[tokio::test]
async fn a_deployment_names_only_what_its_writer_may_read() {
    let (_dir, api) = served();
    push(&api).await;
    let as_ = |role: Role, namespace: &str, deployment: DeploymentInput| {
        let mut request = call(PlanRequest { deployments: vec![deployment] });
        request.extensions_mut().insert(Caller {
            subject: "user/cam".into(),
            bindings: vec![RoleBinding {
                role: role as i32,
                namespace: namespace.into(),
                exec: false,
            }],
            ..Caller::default()
        });
        request
    };
    let edge = || {
        let mut input = input("app", &[]);
        input.meta.get_or_insert_default().namespace = "edge".into();
        input
    };
    let refused = api.plan(as_(Role::Operator, "edge", edge())).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("may not use what is in app"), "{}", refused.message());
    api.plan(as_(Role::Operator, "", edge())).await.unwrap();
    api.plan(as_(Role::Operator, "default", input("app", &[]))).await.unwrap();
}

#[tokio::test]
async fn who_puts_or_removes_something_is_in_the_audit_log() {
    let (_dir, api) = served();
    let principal = Principal { subject: "user/anna".into(), only: None };
    let mut extensions = http::Extensions::new();
    extensions.insert(PeerAddr("192.0.2.7:5".parse().unwrap()));
    let repository = RepoName::parse("models/iris").unwrap();
    let digest = berth_proto::ids::Digest::of(b"m");
    let by_digest = Reference::parse(digest.as_str()).unwrap();
    let tag = Reference::parse("1.2").unwrap();
    for (action, what) in [
        (Action::Push, Noting::Manifest(&tag, Some(digest.clone()))),
        (Action::Push, Noting::Manifest(&by_digest, Some(digest.clone()))),
        (Action::Delete, Noting::Manifest(&tag, None)),
        (Action::Delete, Noting::Manifest(&by_digest, None)),
        (Action::Delete, Noting::Blob(&digest)),
        (Action::Pull, Noting::Manifest(&tag, None)),
    ] {
        let noted = Noted {
            principal: &principal,
            extensions: &extensions,
            action,
            repository: &repository,
            what,
        };
        Doorkeeper(Arc::clone(&api.0)).note(noted).await.unwrap();
    }
    let mut all = api.list_audit(call(ListAuditRequest::default())).await.unwrap().into_inner();
    all.entries.reverse();
    let told: Vec<(&str, &str)> =
        all.entries.iter().map(|e| (e.method.as_str(), e.objects[0].as_str())).collect();
    let whole = format!("image/models/iris@{digest}");
    let blob = format!("blob/models/iris@{digest}");
    let tagged = format!("image/models/iris:1.2@{digest}");
    let (put, delete) = ("registry/PutManifest", "registry/DeleteManifest");
    assert_eq!(
        told,
        [
            (put, &*tagged),
            (put, &*whole),
            (delete, "image/models/iris:1.2"),
            (delete, &*whole),
            ("registry/DeleteBlob", &*blob),
        ]
    );
    assert!(all.entries.iter().all(|e| (&*e.actor, &*e.peer) == ("user/anna", "192.0.2.7:5")));
}
