//! Releases of a deployment: made, looked at, gone back to.

use super::Api;
use super::apply_tests::{input, push};
use super::tests::{PATIENCE, call, host, served};
use crate::cluster::wall_now;
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::host_service_server::HostService as _;
use berth_proto::api::*;
use berth_proto::convert::wall;
use berth_proto::ids::ReleaseNumber;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use std::sync::Arc;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

fn reason(status: &Status) -> (Code, String) {
    let info = status.get_error_details().error_info().map(|info| info.reason.clone());
    (status.code(), info.unwrap_or_default())
}

/// A deployment whose releases ended as told, oldest first; each has its number as `N` in its
/// environment.
async fn released(states: &[ReleaseState]) -> (tempfile::TempDir, Api) {
    let (dir, api) = served();
    push(&api).await;
    for (i, state) in states.iter().enumerate() {
        let number = (i + 1).to_string();
        let deployments = vec![input("web", &[("N", &number)])];
        api.apply(call(ApplyRequest { deployments, ..Default::default() })).await.unwrap();
        let view = api.0.ledger.view();
        let uid = view.deployments().next().unwrap().uid.clone();
        let release = view.release(&uid, ReleaseNumber(i as u64 + 1)).unwrap();
        let changes = vec![Change::PutRelease(Arc::new(release.in_state(*state)))];
        api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    }
    (dir, api)
}

async fn undo(api: &Api, to_release: u64) -> Result<Deployment, Status> {
    let request = UndoRequest { name: "web".into(), to_release, ..Default::default() };
    Ok(api.undo(call(request)).await?.into_inner().deployment.unwrap())
}

async fn release(api: &Api, number: u64) -> Result<Release, Status> {
    let request = GetReleaseRequest { deployment: "web".into(), number, ..Default::default() };
    Ok(api.get_release(call(request)).await?.into_inner().release.unwrap())
}

fn n(spec: Option<DeploymentSpec>) -> String {
    spec.unwrap().env.get("N").cloned().unwrap_or_default()
}

#[tokio::test]
async fn undo_goes_back_to_the_newest_release_that_was_complete() {
    use ReleaseState::{Complete, Failed, Rolling, Superseded};
    let (_dir, api) = released(&[Complete, Complete, Superseded, Failed, Rolling]).await;
    let back = undo(&api, 0).await.unwrap();
    assert_eq!(n(back.spec), "2", "3 never was complete, nor was 4");
    assert_eq!(back.status.unwrap().release, 6);
    let made = release(&api, 6).await.unwrap();
    assert_eq!((made.copied_from, made.cause.as_str()), (2, "undo to release 2"));
    assert_eq!(made.state(), Rolling);
    assert_eq!(release(&api, 5).await.unwrap().state(), Superseded);
}

#[tokio::test]
async fn undo_to_a_number_goes_there_whatever_became_of_it() {
    use ReleaseState::{Complete, Superseded};
    let (_dir, api) = released(&[Superseded, Complete]).await;
    assert_eq!(n(undo(&api, 1).await.unwrap().spec), "1");
    let gone = undo(&api, 77).await.unwrap_err();
    assert_eq!(reason(&gone), (Code::FailedPrecondition, "NO_RELEASE".into()));
}

#[tokio::test]
async fn undo_with_nothing_to_go_back_to_is_told_so() {
    use ReleaseState::{Complete, Superseded};
    for states in [&[Complete][..], &[Superseded, Complete]] {
        let (_dir, api) = released(states).await;
        let none = undo(&api, 0).await.unwrap_err();
        assert_eq!(reason(&none), (Code::FailedPrecondition, "NO_EARLIER_RELEASE".into()));
    }
}

#[tokio::test]
async fn undo_keeps_the_number_of_replicas_as_it_is_now() {
    use ReleaseState::Complete;
    let (_dir, api) = released(&[Complete, Complete]).await;
    let scale = ScaleRequest { name: "web".into(), replicas: 4, ..Default::default() };
    api.scale(call(scale)).await.unwrap();
    assert_eq!(undo(&api, 0).await.unwrap().status.unwrap().wanted, 4);
}

#[tokio::test]
async fn a_restart_makes_a_release_equal_to_the_present_one() {
    use ReleaseState::Complete;
    let (_dir, api) = released(&[Complete, Complete]).await;
    let request = RestartRequest { name: "web".into(), ..Default::default() };
    let shown = api.restart(call(request)).await.unwrap().into_inner().deployment.unwrap();
    assert_eq!(n(shown.spec), "2");
    assert_eq!(shown.status.unwrap().release, 3);
    let made = release(&api, 3).await.unwrap();
    assert_eq!((made.copied_from, made.cause.as_str()), (2, "restart"));
    assert_eq!(made.source, release(&api, 2).await.unwrap().source);
    let request = RestartRequest { name: "nosuch".into(), ..Default::default() };
    let missing = api.restart(call(request)).await.unwrap_err();
    assert_eq!(reason(&missing), (Code::NotFound, "DEPLOYMENT_NOT_FOUND".into()));
}

#[tokio::test]
async fn releases_are_listed_newest_first_and_read_one_by_one() {
    use ReleaseState::{Complete, Failed};
    let (_dir, api) = released(&[Complete, Failed, Complete]).await;
    let list = |filter: &str| {
        let page = Some(Page { filter: filter.to_owned(), ..Page::default() });
        api.list_releases(call(ListReleasesRequest {
            deployment: "web".into(),
            page,
            ..Default::default()
        }))
    };
    let numbers = |answer: ListReleasesResponse| -> Vec<u64> {
        answer.releases.iter().map(|r| r.number).collect()
    };
    assert_eq!(numbers(list("").await.unwrap().into_inner()), [3, 2, 1]);
    let failed = list("state = FAILED").await.unwrap().into_inner();
    assert_eq!(numbers(failed), [2]);
    let one = release(&api, 1).await.unwrap();
    assert_eq!((n(one.spec), one.created_by.as_str()), ("1".into(), "user/admin"));
    let missing = release(&api, 9).await.unwrap_err();
    assert_eq!(reason(&missing), (Code::NotFound, "RELEASE_NOT_FOUND".into()));
}

#[tokio::test]
async fn ten_releases_are_kept_and_the_older_ones_go() {
    let (_dir, api) = released(&[ReleaseState::Complete; 13]).await;
    assert!(release(&api, 1).await.is_err());
    assert_eq!(release(&api, 13).await.unwrap().number, 13);
    let kept = api.0.ledger.view().deployments().next().unwrap().uid.clone();
    assert!(api.0.ledger.view().releases_of(&kept).count() >= 10);
}

#[tokio::test]
async fn whatever_is_written_says_when() {
    let (_dir, api) = released(&[ReleaseState::Complete, ReleaseState::Complete]).await;
    host(&api, "edge", &[]).await;
    let before = wall_now();
    // As if all had been written long ago.
    let age = async || {
        let view = api.0.ledger.view();
        let deployment = view.deployments().next().unwrap().edited(|record| {
            record.meta.get_or_insert_default().update_unix_ms = 1;
        });
        let host = view.host_by_name("edge").unwrap();
        let host = host.edited(|r| r.meta.get_or_insert_default().update_unix_ms = 1).unwrap();
        let changes =
            vec![Change::PutDeployment(Arc::new(deployment)), Change::PutHost(Arc::new(host))];
        api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    };
    let now = |meta: Option<ObjectMeta>, what: &str| {
        let at = meta.unwrap().update_time.unwrap();
        assert!(wall(&at) >= before, "{what}: {at:?}");
    };
    let name = || "web".to_owned();
    age().await;
    let scale = ScaleRequest { name: name(), replicas: 3, ..Default::default() };
    now(api.scale(call(scale)).await.unwrap().into_inner().deployment.unwrap().meta, "scale");
    age().await;
    let restart = RestartRequest { name: name(), ..Default::default() };
    now(api.restart(call(restart)).await.unwrap().into_inner().deployment.unwrap().meta, "restart");
    age().await;
    now(undo(&api, 1).await.unwrap().meta, "undo");
    age().await;
    let delete = DeleteRequest { name: name(), ..Default::default() };
    now(api.delete(call(delete)).await.unwrap().into_inner().deployment.unwrap().meta, "delete");
    let edge = || "edge".to_owned();
    let cordon = CordonHostRequest { name: edge(), cordoned: true, ..Default::default() };
    let shown = api.cordon_host(call(cordon.clone())).await.unwrap().into_inner().host.unwrap();
    now(shown.meta, "cordon");
    // What changes nothing is not a write.
    age().await;
    let shown = api.cordon_host(call(cordon)).await.unwrap().into_inner().host.unwrap();
    assert_eq!(wall(&shown.meta.unwrap().update_time.unwrap()).0, 1);
    let uid = api.0.ledger.view().host_by_name("edge").unwrap().uid.clone();
    let remove = RemoveHostRequest { name: edge(), ..Default::default() };
    api.remove_host(call(remove)).await.unwrap();
    let view = api.0.ledger.view();
    let tombstone = view.host(&uid).unwrap().record.meta.clone().unwrap();
    assert!(tombstone.update_unix_ms >= before.0);
}

#[tokio::test]
async fn a_watch_of_a_deployment_is_coalesced_complete_and_ends_with_it() {
    let (_dir, api) = released(&[ReleaseState::Complete]).await;
    let watch = WatchDeploymentRequest { name: "web".into(), ..Default::default() };
    let mut stream = api.watch_deployment(call(watch)).await.unwrap().into_inner();
    let begun = tokio::time::Instant::now();
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!(first.deployment.unwrap().status.unwrap().wanted, 1);
    let scaling = async {
        for replicas in 2..=100 {
            let scale = ScaleRequest { name: "web".into(), replicas, ..Default::default() };
            api.scale(call(scale)).await.unwrap();
        }
    };
    let (mut count, mut wanted) = (1, 1);
    let reading = async {
        while wanted < 100 {
            let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("it goes on");
            let message = next.unwrap().unwrap();
            let now = message.deployment.unwrap().status.unwrap().wanted;
            assert!(now > wanted, "never older, and no message without news");
            (count, wanted) = (count + 1, now);
        }
    };
    tokio::join!(scaling, reading);
    let tenths = begun.elapsed().as_millis() / 100;
    assert!(count <= tenths + 2, "{count} messages in {tenths} tenths of a second");
    let uid = api.0.ledger.view().deployments().next().unwrap().uid.clone();
    let changes = vec![Change::DeleteDeployment(uid)];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    let last = stream.next().await.unwrap().unwrap();
    assert!(last.deleted);
    assert!(stream.next().await.is_none(), "and it ends with OK");
}
