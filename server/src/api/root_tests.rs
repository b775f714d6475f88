//! A rotation of the root, as operators, people and agents meet it.

use super::identity_tests::{edit, join, shows};
use super::standing::Standing;
use super::tests::{PATIENCE, call, host, served};
use super::{Api, auth};
use crate::cluster::{ClusterDesk, wall_now};
use crate::identity::ca::{CaError, HOST_DAYS};
use crate::identity::roots::Roots;
use crate::session::desk::{Desk as _, Order};
use berth_proto::api::host_service_server::HostService as _;
use berth_proto::api::system_service_server::SystemService as _;
use berth_proto::api::user_service_server::UserService as _;
use berth_proto::api::*;
use berth_proto::convert::timestamp;
use berth_proto::ids::Wall;
use berth_proto::record::HostRecord;
use berth_proto::tls;
use std::sync::Arc;
use tonic::Status;
use tonic_types::StatusExt as _;

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

async fn state(api: &Api) -> RootsState {
    api.get_roots(call(GetRootsRequest {})).await.unwrap().into_inner().state.unwrap()
}

async fn begin(api: &Api) -> RootsState {
    let begun = api.begin_root_rotation(call(BeginRootRotationRequest {})).await;
    begun.unwrap().into_inner().state.unwrap()
}

async fn finish(api: &Api, pin: &str, force: bool) -> Result<RootsState, Status> {
    let request = FinishRootRotationRequest { pin: pin.to_owned(), force };
    let done = api.finish_root_rotation(call(request)).await?.into_inner();
    Ok(done.state.unwrap())
}

/// Events about the roots.
async fn happened(api: &Api) -> Vec<String> {
    let about_roots = |event: &Event| event.reason.starts_with("ROOT_");
    let found = api.0.past_events(0, 9, about_roots).await.unwrap();
    found.into_iter().map(|event| event.reason).collect()
}

fn is_of(certificate_pem: &str, roots_pem: &str) -> bool {
    tls::is_signed_by_newest(certificate_pem, roots_pem).unwrap()
}

#[tokio::test]
async fn a_rotation_ends_when_all_hosts_hold_the_new_root_or_by_force() {
    let (dir, api) = served();
    let first = state(&api).await;
    let pin = first.roots[0].pin.clone();
    assert!(first.roots.len() == 1 && first.roots[0].shown && first.roots[0].signs);
    assert_eq!(reason(&finish(&api, &pin, true).await.unwrap_err()), "NO_ROTATION");
    assert_eq!(finish(&api, "x", true).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    host(&api, "edge-1", &[]).await;
    let uid = api.0.ledger.view().hosts().next().unwrap().uid.clone();
    let desk = ClusterDesk(Arc::clone(&api.0));
    let mut lines = desk.open(&uid);

    let begun = begin(&api).await;
    assert_eq!(begun.roots.len(), 2);
    assert!(begun.version > first.version);
    assert_eq!(begun.hosts_not_told, ["edge-1"]);
    let order = tokio::time::timeout(PATIENCE, lines.orders.recv()).await.unwrap();
    let Some(Order::Trust(told)) = order else { panic!("{order:?}") };
    assert_eq!((told.version, told.roots_pem), (begun.version, api.0.roots.pem()));
    assert_eq!(begin(&api).await, begun, "nothing is done twice");
    assert_eq!(happened(&api).await, ["ROOT_ROTATION_BEGUN"]);
    let token = api.create_join_token(call(CreateJoinTokenRequest::default())).await;
    token.unwrap();
    // A host that has not said that it holds them hears of them again.
    for _ in 0..2 {
        let again = tokio::time::timeout(PATIENCE, lines.orders.recv()).await.unwrap();
        assert!(matches!(again, Some(Order::Trust(_))), "{again:?}");
        api.0.tell_trust_again().await.unwrap();
    }
    let warned = api.get_server_info(call(GetServerInfoRequest {})).await.unwrap().into_inner();
    assert!(warned.warnings.iter().any(|w| w.contains("1 host not told yet")), "{warned:?}");
    assert_eq!(warned.roots_pem, api.0.roots.pem());

    let refused = finish(&api, &pin, false).await.unwrap_err();
    assert_eq!(reason(&refused), "HOSTS_NOT_TOLD");
    assert!(refused.message().contains("edge-1"), "{}", refused.message());
    let newer = &begun.roots[1].pin;
    for wrong in [newer.as_str(), "x", &"0".repeat(64)] {
        let refused = finish(&api, wrong, true).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{wrong}");
    }
    assert!(desk.trusts(&uid, begun.version).await);
    assert_eq!(
        state(&api).await.hosts_not_told_count,
        1,
        "its certificate is none of the new root"
    );
    let of_now = |record: &mut HostRecord| {
        record.certificate_expire_unix_ms = wall_now().0 + HOST_DAYS * 86_400_000;
    };
    edit(&api, &uid, of_now).await;
    assert_eq!(state(&api).await.hosts_not_told_count, 0);

    let done = finish(&api, &pin, false).await.unwrap();
    assert_eq!(done.roots.len(), 1);
    assert_eq!(&done.roots[0].pin, newer);
    assert!(done.version > begun.version);
    assert_eq!(finish(&api, &pin, false).await.unwrap(), done, "a repetition finds it done");
    assert_eq!(happened(&api).await, ["ROOT_ROTATION_BEGUN", "ROOT_RETIRED"]);
    let listed = api.list_join_tokens(call(ListJoinTokensRequest::default())).await.unwrap();
    assert_eq!(listed.into_inner().tokens, [], "by them nobody would find the server");
    assert_eq!(Roots::open(dir.path()).unwrap().pem(), api.0.roots.pem());

    let pin = done.roots[0].pin.clone();
    begin(&api).await;
    assert_eq!(finish(&api, &pin, true).await.unwrap().roots.len(), 1, "though edge-1 lacks it");
}

#[tokio::test]
async fn what_is_signed_during_a_rotation_outlives_the_first_root_and_what_was_before_does_not() {
    let (_dir, api) = served();
    let before = join(&api, "edge-1").await;
    let old_pem = api.0.roots.pem();
    let begun = begin(&api).await;
    let during = join(&api, "edge-2").await;
    assert!(is_of(&before.certificate_pem, &old_pem));
    assert!(is_of(&during.certificate_pem, &api.0.roots.pem()));
    let streams: Vec<auth::Caller> = [&before, &during]
        .map(|host| shows(&api, &host.certificate_pem).expect("both are let in"))
        .into();
    finish(&api, &begun.roots[0].pin, true).await.unwrap();
    let words = shows(&api, &before.certificate_pem).unwrap_err();
    assert!(words.contains("berth context renew"), "{words}");
    assert!(shows(&api, &during.certificate_pem).is_ok());
    let standing = |caller| auth::still_stands(&api.0, caller).is_ok();
    assert!(!standing(&streams[0]), "a stream of before ends");
    assert!(standing(&streams[1]));
}

#[tokio::test]
async fn a_step_that_was_cut_off_behind_its_files_is_told_by_the_next_look() {
    let (_dir, api) = served();
    let first = state(&api).await;
    let nothing = |_: &str| Ok::<(), CaError>(());
    assert!(api.0.roots.begin(nothing).unwrap());
    assert_eq!(state(&api).await.version, first.version, "nobody was told");
    api.0.tell_trust_again().await.unwrap();
    let begun = state(&api).await.version;
    assert!(begun > first.version);
    assert!(api.0.roots.finish().unwrap());
    api.0.tell_trust_again().await.unwrap();
    assert!(state(&api).await.version > begun);
    let told = state(&api).await;
    api.0.tell_trust_again().await.unwrap();
    assert_eq!(state(&api).await, told);
}

#[tokio::test]
async fn a_session_ends_with_the_root_that_let_it_in() {
    let (_dir, api) = served();
    let host = join(&api, "edge-1").await;
    let caller = shows(&api, &host.certificate_pem).unwrap();
    let (_keeps, rx) = tokio::sync::mpsc::channel::<Result<axum::body::Bytes, axum::Error>>(1);
    let endless = axum::body::Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(rx));
    let body = Standing::wrap(&api.0, caller, endless);
    let begun = begin(&api).await;
    finish(&api, &begun.roots[0].pin, true).await.unwrap();
    let ended = http_body_util::BodyExt::collect(body);
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("it ends").unwrap();
    let trailers = ended.trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "14", "{trailers:?}");
}

#[tokio::test]
async fn a_user_renews_its_certificate_by_its_certificate_alone_and_is_not_named_any_more() {
    let (_dir, api) = served();
    let until = wall_now().0 + 3 * 86_400_000;
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let request = CreateUserRequest {
        name: "vera".into(),
        bindings: vec![RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() }],
        expire_time: Some(timestamp(Wall(until))),
        csr_pem: csr_pem.clone(),
        ..CreateUserRequest::default()
    };
    let made = api.create_user(call(request)).await.unwrap().into_inner();
    let begun = begin(&api).await;
    let caller = shows(&api, &made.certificate_pem).unwrap();
    let ask = async |caller: auth::Caller, csr_pem: &str| {
        let mut request =
            call(RenewCertificateRequest { csr_pem: csr_pem.to_owned(), write: None });
        request.extensions_mut().insert(caller);
        api.renew_certificate(request).await.map(tonic::Response::into_inner)
    };
    let by_token = auth::Caller { certificate: None, ..caller.clone() };
    assert_eq!(reason(&ask(by_token, &csr_pem).await.unwrap_err()), "CERTIFICATE_NEEDED");
    let by_host = shows(&api, &join(&api, "edge-1").await.certificate_pem).unwrap();
    assert_eq!(reason(&ask(by_host, &csr_pem).await.unwrap_err()), "CERTIFICATE_NEEDED");
    assert!(ask(caller.clone(), "nonsense").await.is_err());
    let renewed = ask(caller, &csr_pem).await.unwrap();
    assert_eq!(renewed.roots_pem, api.0.roots.pem());
    assert!(is_of(&renewed.certificate_pem, &renewed.roots_pem));
    let (_, ends) = tls::validity(&renewed.certificate_pem).unwrap();
    assert!(ends * 1000 <= until + 86_400_000, "no longer than it was granted");
    assert!(state(&api).await.users_not_renewed.is_empty());
    finish(&api, &begun.roots[0].pin, true).await.unwrap();
    assert!(shows(&api, &made.certificate_pem).is_err());
    let again = shows(&api, &renewed.certificate_pem).unwrap();
    assert_eq!(again.subject, "user/vera");
    assert!(again.expires <= until);
}
