//! Every call by every kind of caller. A new call that is not in the table of roles is refused to all;
//! what is in it is asked for here by everybody, through the check that the door itself runs.

use super::Api;
use super::auth;
use super::identity_tests::join;
use super::tests::{call, served};
use crate::cluster::wall_now;
use crate::doors::PeerCerts;
use crate::identity::ca::Ca;
use crate::identity::roles::{Needs, TABLE};
use axum::body::Body;
use berth_proto::api::user_service_server::UserService as _;
use berth_proto::api::*;
use berth_proto::convert::timestamp;
use berth_proto::ids::Wall;
use berth_proto::record::UserTokenRecord;
use berth_proto::tls::{self, Subject};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use std::sync::Arc;
use tower::ServiceExt as _;

/// `i`: gets in; `u`: UNAUTHENTICATED; `d`: PERMISSION_DENIED.
fn expected(needs: Needs) -> &'static str {
    //                      nobody..foreign key   roles      host
    match needs {
        Needs::Nobody => "iiiiii i iiiiiiii ii",
        Needs::User => "uuuuuu i iiiiiiii uu",
        Needs::Role(Role::Viewer) => "uuuuuu d iiiiiiii uu",
        Needs::Role(Role::Operator) => "uuuuuu d ddiiiiii uu",
        Needs::Role(Role::Admin) => "uuuuuu d ddddiiii uu",
        Needs::Everywhere(Role::Viewer) => "uuuuuu d diiiiiii uu",
        Needs::Everywhere(Role::Operator) => "uuuuuu d dddididii uu",
        Needs::Everywhere(Role::Admin) => "uuuuuu d dddddiii uu",
        Needs::Exec => "uuuuuu d dddddddi uu",
        // A removed host gets in to be told.
        Needs::Host => "duuuuu d dddddddd ii",
        Needs::Role(Role::Unspecified) | Needs::Everywhere(Role::Unspecified) => {
            panic!("no call needs a role that is none")
        }
    }
}

/// What a caller shows.
#[derive(Default, Clone)]
struct Shown {
    bearer: Option<String>,
    certificate_pem: Option<String>,
}

fn certificate(pem: String) -> Shown {
    Shown { certificate_pem: Some(pem), bearer: None }
}

fn bearer(token: String) -> Shown {
    Shown { bearer: Some(token), certificate_pem: None }
}

async fn user(api: &Api, name: &str, role: Role, namespace: &str, exec: bool) -> String {
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = CreateUserRequest {
        name: name.into(),
        bindings: vec![RoleBinding { role: role as i32, namespace: namespace.into(), exec }],
        expire_time: Some(timestamp(Wall(wall_now().0 + 3_600_000))),
        csr_pem,
        ..CreateUserRequest::default()
    };
    api.create_user(call(request)).await.unwrap().into_inner().certificate_pem
}

async fn token(api: &Api, name: &str, deployment: &str) -> CreateUserTokenResponse {
    let request = CreateUserTokenRequest {
        name: name.into(),
        deployment: deployment.into(),
        ..CreateUserTokenRequest::default()
    };
    api.create_user_token(call(request)).await.unwrap().into_inner()
}

async fn write(api: &Api, change: Change) {
    let proposal = Proposal { preconditions: Vec::new(), changes: vec![change] };
    api.0.ledger.propose(proposal).await.unwrap();
}

/// Every kind of caller with what it shows, in the order of the columns of [`expected`].
async fn everybody(api: &Api) -> Vec<(&'static str, Shown)> {
    let dir = tempfile::tempdir().unwrap();
    let foreign = Ca::open(dir.path()).unwrap();
    let twin = Subject::Host(join(api, "twin").await.uid);
    let signed = |subject| {
        let (_, csr_pem) = tls::key_and_request().unwrap();
        certificate(foreign.sign(&csr_pem, subject, 1).unwrap())
    };

    let gone = user(api, "gone", Role::Admin, "", true).await;
    user(api, "late", Role::Admin, "", true).await;
    let late = token(api, "late", "").await;
    let revoke = RevokeUserRequest { name: "gone".into(), ..Default::default() };
    api.revoke_user(call(revoke)).await.unwrap();
    let held = api.0.ledger.view().user_token(&late.id).unwrap().clone();
    let ended = UserTokenRecord { expire_unix_ms: 1, ..(*held.record).clone() };
    write(api, Change::PutUserToken(Arc::new(ended))).await;

    user(api, "caller", Role::Admin, "", true).await;
    user(api, "a-token", Role::Admin, "", false).await;
    let removed = join(api, "edge-2").await;
    let next = api.0.ledger.view().host(&removed.uid).unwrap().edited(|r| r.removed = true);
    write(api, Change::PutHost(Arc::new(next.unwrap()))).await;

    let of = async |name: &str, role, namespace: &str, exec| {
        certificate(user(api, name, role, namespace, exec).await)
    };
    vec![
        ("nobody", Shown::default()),
        ("garbage", bearer("berth_nobody_knows".into())),
        ("revoked user", certificate(gone)),
        ("ended token", bearer(late.secret)),
        ("foreign user", signed(Subject::User("admin".parse().unwrap()))),
        ("foreign host", signed(twin)),
        ("gateway key", bearer(token(api, "caller", "iris").await.secret)),
        ("viewer of prod", of("v-prod", Role::Viewer, "prod", false).await),
        ("viewer", of("v", Role::Viewer, "", false).await),
        ("operator of prod", of("o-prod", Role::Operator, "prod", false).await),
        ("operator", of("o", Role::Operator, "", false).await),
        ("admin of prod", of("a-prod", Role::Admin, "prod", false).await),
        ("admin", of("a", Role::Admin, "", false).await),
        ("admin's token", bearer(token(api, "a-token", "").await.secret)),
        ("admin with exec", of("a-exec", Role::Admin, "", true).await),
        ("host", certificate(join(api, "edge-1").await.certificate_pem)),
        ("removed host", certificate(removed.certificate_pem)),
    ]
}

/// Calls through the door's own check, before a handler that answers all; as in [`expected`].
async fn asks(door: &axum::Router, path: &str, shown: &Shown) -> char {
    let mut request = http::Request::post(format!("/{path}"));
    if let Some(token) = &shown.bearer {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let mut request = request.body(Body::empty()).unwrap();
    if let Some(pem) = &shown.certificate_pem {
        let chain = tls::certificates(pem).unwrap();
        request.extensions_mut().insert(PeerCerts(Arc::new(chain)));
    }
    let answer = door.clone().oneshot(request).await.unwrap();
    match answer.headers().get("grpc-status").map(|code| code.to_str().unwrap()) {
        None => 'i',
        Some("16") => 'u',
        Some("7") => 'd',
        Some(other) => panic!("{path}: status {other}"),
    }
}

#[tokio::test]
async fn every_call_is_open_to_whom_its_row_names_and_to_nobody_else() {
    let (_dir, api) = served();
    let check = axum::middleware::from_fn_with_state(Arc::clone(&api.0), auth::check);
    let door = axum::Router::new().fallback(async || "in").layer(check);
    let all = everybody(&api).await;
    let mut wrong = Vec::new();
    let health = ("grpc.health.v1.Health/Check", Needs::Nobody);
    let reflection = ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Needs::User);
    for (path, needs) in TABLE.iter().copied().chain([health, reflection]) {
        let row: Vec<char> = expected(needs).chars().filter(|c| *c != ' ').collect();
        assert_eq!(row.len(), all.len());
        for ((who, shown), expected) in all.iter().zip(row) {
            let found = asks(&door, path, shown).await;
            if found != expected {
                wrong.push(format!("{path} by {who}: expected {expected}, found {found}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    for (who, shown) in &all {
        assert_ne!(asks(&door, "berth.v1.HostService/NewCall", shown).await, 'i', "{who}");
    }
}
