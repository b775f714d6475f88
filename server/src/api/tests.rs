//! The services as their callers see them, over a ledger in memory and without a network.

use super::{Api, auth};
use crate::cluster::{Cluster, Parts, wall_now};
use crate::config::Options;
use crate::identity::roots::Roots;
use crate::ledger::Ledger;
use crate::registry::{self, Registry};
use crate::store::memory::Memory;
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::event_service_server::EventService as _;
use berth_proto::api::host_service_server::HostService as _;
use berth_proto::api::user_service_server::UserService as _;
use berth_proto::api::*;
use berth_proto::convert::timestamp;
use berth_proto::ids::Wall;
use berth_proto::record::{HostRecord, Meta};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::objects::Host as Held;
use berth_server_core::view::View;
use std::sync::Arc;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// A server's services in a folder of their own.
pub fn served() -> (tempfile::TempDir, Api) {
    served_with(registry::Settings::default())
}

/// The same, with a registry of these settings on a disk of any fullness.
pub fn served_with(registry: registry::Settings) -> (tempfile::TempDir, Api) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Options { data_dir: Some(dir.path().to_owned()), ..Options::default() };
    let parts = Parts {
        ledger: Ledger::start(Box::new(Memory::default()), View::default()),
        roots: Roots::open(dir.path()).unwrap(),
        registry: Registry::open(
            dir.path().join("registry"),
            registry::Settings { min_free_percent: 0, ..registry },
        )
        .unwrap(),
        settings: settings.settle().unwrap(),
        ports: [1, 2, 3, 4],
    };
    (dir, Api(Arc::new(Cluster::new(parts))))
}

/// How long anything here may take before a test gives up.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// A call by an admin.
pub fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(auth::Caller {
        subject: "user/admin".into(),
        bindings: vec![RoleBinding { role: Role::Admin as i32, ..RoleBinding::default() }],
        peer: "192.0.2.1:5".into(),
        ..auth::Caller::default()
    });
    request
}

/// Puts a host into the ledger.
pub async fn host(api: &Api, name: &str, labels: &[(&str, &str)]) {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let record = HostRecord {
        meta: Some(Meta {
            uid: uuid::Uuid::now_v7().to_string(),
            name: name.to_owned(),
            labels,
            ..Meta::default()
        }),
        ..HostRecord::default()
    };
    let changes = vec![Change::PutHost(Arc::new(Held::new(record).unwrap()))];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
}

fn write(id: &str) -> Option<WriteOptions> {
    Some(WriteOptions { request_id: id.to_owned(), ..WriteOptions::default() })
}

fn label(name: &str, key: &str, value: &str, write: Option<WriteOptions>) -> LabelHostRequest {
    LabelHostRequest {
        write,
        name: name.to_owned(),
        set: [(key.to_owned(), value.to_owned())].into(),
        remove: Vec::new(),
    }
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

async fn names(api: &Api, page: Page) -> Result<(Vec<String>, String), Status> {
    let answer = api.list_hosts(call(ListHostsRequest { page: Some(page) })).await?.into_inner();
    let name = |h: Host| h.meta.map(|m| m.name).unwrap_or_default();
    Ok((answer.hosts.into_iter().map(name).collect(), answer.next_page_token))
}

#[tokio::test]
async fn all_pages_of_a_list_are_of_one_revision() {
    let (_dir, api) = served();
    for name in ["a", "c", "e", "g"] {
        host(&api, name, &[]).await;
    }
    let page = |token: &str| Page { page_size: 2, page_token: token.into(), ..Page::default() };
    let (first, token) = names(&api, page("")).await.unwrap();
    assert_eq!(first, ["a", "c"]);
    // What is written between two pages is not in the second.
    for name in ["b", "d", "f"] {
        host(&api, name, &[]).await;
    }
    let (second, end) = names(&api, page(&token)).await.unwrap();
    assert_eq!((second, end.as_str()), (vec!["e".to_owned(), "g".to_owned()], ""));
    // A page may be read twice.
    assert_eq!(names(&api, page(&token)).await.unwrap().0, ["e", "g"]);
    // When the view is gone the caller is told, and gets nothing else instead.
    *api.0.walked.lock() = super::lists::Walked::default();
    let gone = names(&api, page(&token)).await.unwrap_err();
    assert_eq!((gone.code(), reason(&gone).as_str()), (Code::OutOfRange, "PAGE_EXPIRED"));
}

#[tokio::test]
async fn a_filter_selects_and_a_bad_one_is_refused_with_its_place() {
    let (_dir, api) = served();
    host(&api, "edge-1", &[("zone", "eu")]).await;
    host(&api, "edge-2", &[("zone", "us")]).await;
    host(&api, "core-1", &[("zone", "eu")]).await;
    let filter = |text: &str| Page { filter: text.to_owned(), ..Page::default() };
    let (found, _) = names(&api, filter("name = edge* AND labels.zone = eu")).await.unwrap();
    assert_eq!(found, ["edge-1"]);
    let bad = names(&api, filter("zone = eu")).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let field = bad.get_error_details().bad_request().unwrap().field_violations[0].clone();
    assert_eq!(field.field, "page.filter");
    assert!(field.description.starts_with("at character 1: there is no field"), "{field:?}");
}

#[tokio::test]
async fn a_repeated_request_is_answered_as_the_first_time_and_changes_nothing() {
    let (_dir, api) = served();
    host(&api, "edge", &[]).await;
    let once = || call(label("edge", "zone", "eu", write("one")));
    let first = api.label_host(once()).await.unwrap().into_inner();
    let revision = first.host.as_ref().unwrap().meta.as_ref().unwrap().revision;
    assert_eq!(revision, api.0.ledger.view().revision.0, "the answer names its own write");
    api.label_host(call(label("edge", "zone", "us", None))).await.unwrap();
    let before = api.0.ledger.view().revision;
    let again = api.label_host(once()).await.unwrap().into_inner();
    assert_eq!(again.host.unwrap().meta, first.host.unwrap().meta);
    assert_eq!(api.0.ledger.view().revision, before, "nothing was written");
    let other = api.label_host(call(label("edge", "zone", "xx", write("one")))).await.unwrap_err();
    assert_eq!(
        (other.code(), reason(&other).as_str()),
        (Code::InvalidArgument, "REQUEST_ID_REUSED")
    );
    let long = api.label_host(call(label("edge", "a", "b", write(&"x".repeat(65))))).await;
    assert_eq!(long.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn requests_in_parallel_with_one_id_are_carried_out_once() {
    let (_dir, api) = served();
    let user = || CreateUserRequest {
        write: write("same"),
        name: "vera".into(),
        bindings: vec![RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() }],
        expire_time: Some(timestamp(Wall(4_000_000_000_000.min(wall_now().0 + 86_400_000)))),
        csr_pem: String::new(),
    };
    let request = user();
    let results =
        futures_util::future::join_all((0..8).map(|_| api.create_user(call(request.clone()))))
            .await;
    let mut good = 0;
    for result in results {
        match result {
            Ok(_) => good += 1,
            // "The same is being carried out": never "exists already", which a caller would believe.
            Err(status) => assert_eq!(reason(&status), "REQUEST_RUNNING"),
        }
    }
    assert!(good >= 1);
    let again = api.create_user(call(request)).await.unwrap().into_inner();
    assert_eq!(again.user.unwrap().meta.unwrap().name, "vera");
    assert_eq!(api.0.ledger.view().users().count(), 1);
}

#[tokio::test]
async fn an_expected_revision_that_is_not_the_objects_ends_the_call() {
    let (_dir, api) = served();
    host(&api, "edge", &[]).await;
    let at = api.0.ledger.view().revision.0;
    let expecting = |revision, validate_only| {
        let write = WriteOptions {
            expected_revision: Some(revision),
            validate_only,
            ..WriteOptions::default()
        };
        call(label("edge", "zone", "eu", Some(write)))
    };
    for validate_only in [true, false] {
        let wrong = api.label_host(expecting(at + 7, validate_only)).await.unwrap_err();
        assert_eq!((wrong.code(), reason(&wrong).as_str()), (Code::Aborted, "REVISION_MISMATCH"));
    }
    api.label_host(expecting(at, true)).await.unwrap();
    assert_eq!(api.0.ledger.view().revision.0, at, "a check writes nothing");
    api.label_host(expecting(at, false)).await.unwrap();
    assert_eq!(api.0.ledger.view().revision.0, at + 1);
}

#[tokio::test]
async fn every_write_can_be_checked_without_being_written() {
    let (_dir, api) = served();
    host(&api, "edge", &[]).await;
    let check = || Some(WriteOptions { validate_only: true, ..WriteOptions::default() });
    let before = api.0.ledger.view().revision;
    let name = || "edge".to_owned();
    api.cordon_host(call(CordonHostRequest { write: check(), name: name(), cordoned: true }))
        .await
        .unwrap();
    api.drain_host(call(DrainHostRequest { write: check(), name: name(), draining: true }))
        .await
        .unwrap();
    api.remove_host(call(RemoveHostRequest { write: check(), name: name(), ..Default::default() }))
        .await
        .unwrap();
    let token = CreateJoinTokenRequest { write: check(), ..Default::default() };
    let token = api.create_join_token(call(token)).await.unwrap().into_inner();
    assert_eq!(token.secret, "", "a token that does not exist has no secret");
    let revoke = RevokeJoinTokenRequest { write: check(), id: "x".into(), allow_missing: true };
    api.revoke_join_token(call(revoke)).await.unwrap();
    assert_eq!(api.0.ledger.view().revision, before);
    assert!(api.0.ledger.view().host_by_name("edge").is_some());
}

#[tokio::test]
async fn absence_is_an_error_unless_it_is_allowed() {
    let (_dir, api) = served();
    for allow_missing in [false, true] {
        let good = |result: Result<(), Status>, kind: &str| match result {
            Ok(()) => assert!(allow_missing, "{kind}"),
            Err(status) => {
                assert!(!allow_missing, "{kind}: {status}");
                assert_eq!(reason(&status), kind);
            }
        };
        let name = || "nosuch".to_owned();
        let delete = DeleteRequest { name: name(), allow_missing, ..Default::default() };
        good(api.delete(call(delete)).await.map(|_| ()), "DEPLOYMENT_NOT_FOUND");
        let remove = RemoveHostRequest { name: name(), allow_missing, ..Default::default() };
        good(api.remove_host(call(remove)).await.map(|_| ()), "HOST_NOT_FOUND");
        let revoke = RevokeUserRequest { name: name(), allow_missing, ..Default::default() };
        good(api.revoke_user(call(revoke)).await.map(|_| ()), "USER_NOT_FOUND");
        let token = RevokeJoinTokenRequest { id: name(), allow_missing, ..Default::default() };
        good(api.revoke_join_token(call(token)).await.map(|_| ()), "TOKEN_NOT_FOUND");
    }
}

#[tokio::test]
async fn a_secret_is_answered_once_and_not_by_the_repetition() {
    let (_dir, api) = served();
    let ask = || call(CreateJoinTokenRequest { write: write("t"), ..Default::default() });
    let first = api.create_join_token(ask()).await.unwrap().into_inner();
    let again = api.create_join_token(ask()).await.unwrap().into_inner();
    assert!(first.secret.starts_with("berth-join-v1.") && first.command.contains(&first.secret));
    assert_eq!((again.secret.as_str(), again.command.as_str()), ("", ""));
    assert_eq!(again.token, first.token);
    let kept = api.0.ledger.view().request("user/admin:t").unwrap().record.response.clone();
    let secret = first.secret.split('.').nth(2).unwrap().to_owned();
    assert!(!String::from_utf8_lossy(&kept).contains(&secret), "the secret was stored");
}

#[tokio::test]
async fn every_write_is_in_the_audit_log_with_actor_request_and_peer() {
    let (_dir, api) = served();
    for name in ["a", "b", "c"] {
        host(&api, name, &[]).await;
        api.label_host(call(label(name, "x", "y", write(name)))).await.unwrap();
    }
    let list = |filter: &str, token: &str| {
        let (filter, page_token) = (filter.to_owned(), token.to_owned());
        api.list_audit(call(ListAuditRequest { page_size: 2, page_token, filter }))
    };
    let first = list("", "").await.unwrap().into_inner();
    let ids: Vec<&str> = first.entries.iter().map(|e| e.request_id.as_str()).collect();
    assert_eq!(ids, ["c", "b"], "newest first");
    let entry = &first.entries[0];
    assert_eq!((&*entry.actor, &*entry.peer), ("user/admin", "192.0.2.1:5"));
    assert_eq!(&*entry.method, "HostService/LabelHost");
    let uid = api.0.ledger.view().host_by_name("c").unwrap().uid.clone();
    assert_eq!(entry.objects, [format!("host/c@{uid}")], "a later c is another host");
    // What is written meanwhile does not push anything onto the second page.
    api.label_host(call(label("a", "x", "z", write("late")))).await.unwrap();
    let second = list("", &first.next_page_token).await.unwrap().into_inner();
    assert_eq!(second.entries.len(), 1);
    assert_eq!(second.entries[0].request_id, "a");
    let one = list("request_id = b", "").await.unwrap().into_inner();
    assert_eq!(one.entries.len(), 1);
}

#[tokio::test]
async fn a_request_id_is_the_callers_own() {
    let (_dir, api) = served();
    host(&api, "edge", &[]).await;
    let by = |subject: &str, value: &str| {
        let mut request = call(label("edge", "zone", value, write("same")));
        request.extensions_mut().get_mut::<auth::Caller>().unwrap().subject = subject.to_owned();
        request
    };
    api.label_host(by("user/anna", "eu")).await.unwrap();
    // Neither answered as anna was, nor refused as her id with another request.
    api.label_host(by("user/bert", "us")).await.unwrap();
    let zone = |api: &Api| api.0.ledger.view().host_by_name("edge").unwrap().labels["zone"].clone();
    assert_eq!(zone(&api), "us");
    api.label_host(by("user/anna", "eu")).await.unwrap();
    assert_eq!(zone(&api), "us", "anna's was a repetition");
}

#[tokio::test]
async fn a_watcher_of_events_that_falls_behind_is_told_so() {
    let (_dir, api) = served();
    let events = |n: usize| {
        let event = || Change::AppendEvent(Event { reason: "X".into(), ..Event::default() });
        Proposal { preconditions: Vec::new(), changes: (0..n).map(|_| event()).collect() }
    };
    api.0.ledger.propose(events(1)).await.unwrap();
    let follow = WatchEventsRequest { follow: true, ..Default::default() };
    let mut stream = api.watch_events(call(follow)).await.unwrap().into_inner();
    let first = stream.next().await.unwrap().unwrap();
    let mut token = first.token;
    let mut last = first.event.unwrap().sequence;
    assert_eq!(last, 1);
    // Nobody reads while more happens than is kept for a slow one.
    for _ in 0..40 {
        api.0.ledger.propose(events(500)).await.unwrap();
    }
    let skipped = loop {
        let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("it goes on");
        match next.expect("an end that says why") {
            Ok(message) => {
                let sequence = message.event.unwrap().sequence;
                assert_eq!(sequence, last + 1, "none is left out silently");
                (last, token) = (sequence, message.token);
            }
            Err(status) => break status,
        }
    };
    assert_eq!((skipped.code(), reason(&skipped).as_str()), (Code::OutOfRange, "EVENTS_SKIPPED"));
    assert!(stream.next().await.is_none());
    // Going on from the last one seen gives all that follow.
    let resume = WatchEventsRequest { after_token: token, limit: 30_000, ..Default::default() };
    let rest = api.watch_events(call(resume)).await.unwrap().into_inner();
    let rest: Vec<u64> = rest.map(|m| m.unwrap().event.unwrap().sequence).collect().await;
    assert_eq!(rest, (last + 1..=20_001).collect::<Vec<_>>());
}
