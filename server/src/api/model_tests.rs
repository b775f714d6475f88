//! Models, versions and aliases, and what a collection of the registry leaves of them.

use super::Api;
use super::apply_tests::{input, push};
use super::tests::{call, host, served, served_with};
use crate::registry::{self, Reference, RepoName, Tag};
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::model_service_server::ModelService as _;
use berth_proto::api::system_service_server::SystemService as _;
use berth_proto::api::*;
use berth_proto::ids::{DeploymentUid, Digest};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

fn reason(status: &Status) -> (Code, String) {
    let info = status.get_error_details().error_info().map(|info| info.reason.clone());
    (status.code(), info.unwrap_or_default())
}

fn app() -> RepoName {
    RepoName::parse("app").unwrap()
}

/// The digest of what [`push`] has put as `app:1`.
async fn pushed(api: &Api) -> Digest {
    let tag = Tag::parse("1").unwrap();
    api.0.registry.resolve_tag(&app(), &tag).await.unwrap().unwrap()
}

/// Version `version` of model `iris`, an image of its own.
async fn iris(api: &Api, version: &str) -> ModelVersion {
    ModelVersion {
        model: "iris".into(),
        version: version.into(),
        repository: "app".into(),
        digest: pushed(api).await.to_string(),
        kind: ModelVersionKind::Image as i32,
        ..ModelVersion::default()
    }
}

async fn register(
    api: &Api,
    version: ModelVersion,
    aliases: &[&str],
) -> Result<ModelVersion, Status> {
    let aliases = aliases.iter().map(|a| (*a).to_owned()).collect();
    let request = RegisterVersionRequest { version: Some(version), aliases, ..Default::default() };
    Ok(api.register_version(call(request)).await?.into_inner().version.unwrap())
}

async fn delete(api: &Api, version: &str) -> Result<(), Status> {
    let (name, version) = ("iris".to_owned(), version.to_owned());
    let request = DeleteVersionRequest { name, version, ..Default::default() };
    api.delete_version(call(request)).await.map(|_| ())
}

async fn alias(api: &Api, alias: &str, version: &str, why: &str) -> Result<AliasMove, Status> {
    let request = SetAliasRequest {
        name: "iris".into(),
        alias: alias.into(),
        version: version.into(),
        why: why.into(),
        ..Default::default()
    };
    Ok(api.set_alias(call(request)).await?.into_inner().r#move.unwrap())
}

async fn moves(api: &Api, ask: ListAliasMovesRequest) -> Vec<AliasMove> {
    let request = ListAliasMovesRequest { name: "iris".into(), ..ask };
    api.list_alias_moves(call(request)).await.unwrap().into_inner().moves
}

async fn deploy(api: &Api, source: deployment_spec::Source) -> DeploymentUid {
    let mut wanted = input("web", &[]);
    wanted.spec.as_mut().unwrap().source = Some(source);
    let request = ApplyRequest { deployments: vec![wanted], ..Default::default() };
    api.apply(call(request)).await.unwrap();
    api.0.ledger.view().deployments().next().unwrap().uid.clone()
}

async fn forget(api: &Api, uid: &DeploymentUid) {
    let changes = vec![Change::DeleteDeployment(uid.clone())];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
}

#[tokio::test]
async fn a_version_goes_only_when_no_alias_release_or_child_names_it() {
    let (_dir, api) = served();
    push(&api).await;
    register(&api, iris(&api, "1").await, &["best"]).await.unwrap();
    let in_use = async |by: &str| {
        let status = delete(&api, "1").await.unwrap_err();
        assert_eq!(reason(&status), (Code::FailedPrecondition, "VERSION_IN_USE".into()));
        assert!(status.message().contains(by), "{by}: {status}");
    };
    in_use("alias @best").await;
    let gone =
        DeleteAliasRequest { name: "iris".into(), alias: "best".into(), ..Default::default() };
    api.delete_alias(call(gone)).await.unwrap();

    let uid = deploy(&api, deployment_spec::Source::Model("iris:1".into())).await;
    in_use("deployment web").await;
    forget(&api, &uid).await;
    // The same image by its own name is in use, too.
    let uid = deploy(&api, deployment_spec::Source::Image("app:1".into())).await;
    in_use("deployment web").await;
    forget(&api, &uid).await;

    let lineage = Some(Lineage { parent: "iris:1".into(), ..Lineage::default() });
    let child = ModelVersion { lineage, ..iris(&api, "2").await };
    register(&api, child, &[]).await.unwrap();
    in_use("iris:2, made from it").await;
    delete(&api, "2").await.unwrap();
    delete(&api, "1").await.unwrap();
    assert_eq!(reason(&delete(&api, "1").await.unwrap_err()).1, "VERSION_NOT_FOUND");
}

#[tokio::test]
async fn a_version_is_of_what_is_in_the_registry_and_never_of_something_else() {
    let (_dir, api) = served();
    push(&api).await;
    let digest = Digest::of(b"never pushed").to_string();
    let missing = ModelVersion { digest, ..iris(&api, "1").await };
    let missing = register(&api, missing, &[]).await.unwrap_err();
    assert_eq!(reason(&missing), (Code::FailedPrecondition, "MANIFEST_MISSING".into()));
    let first = register(&api, iris(&api, "1").await, &[]).await.unwrap();
    // The same again is the same one.
    let again = register(&api, iris(&api, "1").await, &[]).await.unwrap();
    assert_eq!((&again.uid, again.revision), (&first.uid, first.revision));
    let twice = register(&api, iris(&api, "2").await, &["a", "b", "a"]).await.unwrap_err();
    assert_eq!(twice.code(), Code::InvalidArgument);
    assert_eq!(api.0.ledger.view().versions().count(), 1, "nothing was registered");
}

#[tokio::test]
async fn every_move_of_an_alias_is_kept_with_who_and_why() {
    let (_dir, api) = served();
    push(&api).await;
    for version in ["1", "2"] {
        register(&api, iris(&api, version).await, &[]).await.unwrap();
    }
    // As fast as can be: also those of one millisecond are all there.
    for n in 0..20 {
        let to = if n % 2 == 0 { "1" } else { "2" };
        alias(&api, "best", to, &format!("reason {n}")).await.unwrap();
    }
    alias(&api, "other", "1", "").await.unwrap();
    let gone =
        DeleteAliasRequest { name: "iris".into(), alias: "best".into(), ..Default::default() };
    api.delete_alias(call(gone.clone())).await.unwrap();
    assert_eq!(reason(&api.delete_alias(call(gone)).await.unwrap_err()).1, "ALIAS_NOT_FOUND");

    assert_eq!(moves(&api, ListAliasMovesRequest::default()).await.len(), 22);
    let of = ListAliasMovesRequest { alias: "best".into(), ..Default::default() };
    let best = moves(&api, of.clone()).await;
    assert_eq!(best.len(), 21);
    // Newest first, and each goes on where the one before ended.
    assert_eq!((best[0].from_version.as_str(), best[0].to_version.as_str()), ("2", ""));
    for pair in best.windows(2) {
        assert_eq!(pair[0].from_version, pair[1].to_version, "{pair:?}");
    }
    let oldest = best.last().unwrap();
    assert_eq!(
        (&*oldest.why, &*oldest.actor, &*oldest.from_version),
        ("reason 0", "user/admin", "")
    );
    // What it was at a time in the past.
    let at = ListAliasMovesRequest { at_time: oldest.time, ..of.clone() };
    let then = moves(&api, at).await;
    assert_eq!(then.last().unwrap().why, "reason 0");
    assert!(then.iter().all(|m| m.time == oldest.time), "none of later");
    let before = prost_types::Timestamp { seconds: 1, nanos: 0 };
    assert!(moves(&api, ListAliasMovesRequest { at_time: Some(before), ..of }).await.is_empty());
}

#[tokio::test]
async fn an_alias_names_a_version_that_is_there_and_is_read_through() {
    let (_dir, api) = served();
    push(&api).await;
    register(&api, iris(&api, "1").await, &[]).await.unwrap();
    let nowhere = alias(&api, "best", "9", "").await.unwrap_err();
    assert_eq!(reason(&nowhere), (Code::NotFound, "VERSION_NOT_FOUND".into()));
    let bad = alias(&api, "Best", "1", "").await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    alias(&api, "best", "1", "").await.unwrap();
    let get = async |reference: &str| {
        let request = GetVersionRequest { reference: reference.into(), ..Default::default() };
        api.get_version(call(request)).await.map(|answer| answer.into_inner())
    };
    let found = get("iris@best").await.unwrap();
    assert_eq!((found.version.unwrap().version, found.aliases), ("1".into(), vec!["best".into()]));
    assert_eq!(reason(&get("iris@worst").await.unwrap_err()).0, Code::NotFound);
    let model = GetModelRequest { name: "iris".into(), ..Default::default() };
    let model = api.get_model(call(model)).await.unwrap().into_inner().model.unwrap();
    assert_eq!(model.aliases.get("best").map(String::as_str), Some("1"));
    assert_eq!((model.version_count, model.latest_version.as_str()), (1, "1"));
}

async fn collect(api: &Api, dry_run: bool) -> Result<CollectGarbageResponse, Status> {
    let request = CollectGarbageRequest { dry_run };
    Ok(api.collect_garbage(call(request)).await?.into_inner())
}

#[tokio::test]
async fn a_collection_leaves_what_versions_and_kept_releases_name() {
    let hasty = registry::Settings { lease: Duration::ZERO, ..registry::Settings::default() };
    let (_dir, api) = served_with(hasty);
    push(&api).await;
    let image = pushed(&api).await;
    register(&api, iris(&api, "1").await, &[]).await.unwrap();
    let uid = deploy(&api, deployment_spec::Source::Image("app:1".into())).await;
    api.0.registry.delete_tag(&app(), &Tag::parse("1").unwrap()).await.unwrap();
    let there = async || {
        let by_digest = Reference::parse(image.as_str()).unwrap();
        api.0.registry.manifest(&app(), &by_digest).await.is_ok()
    };
    // A release and a version name it, then the version alone, then nothing does.
    assert_eq!(collect(&api, false).await.unwrap().count, 0);
    delete(&api, "1").await.unwrap_err();
    forget(&api, &uid).await;
    assert_eq!(collect(&api, false).await.unwrap().count, 0);
    assert!(there().await);
    let uid = {
        let by_digest = format!("app@{image}");
        deploy(&api, deployment_spec::Source::Image(by_digest)).await
    };
    let changes = {
        let view = api.0.ledger.view();
        let model = view.model("default", "iris").unwrap().record.meta.clone().unwrap().uid;
        vec![Change::DeleteVersion(model, "1".into())]
    };
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    assert_eq!(collect(&api, false).await.unwrap().count, 0, "the release alone keeps it");
    assert!(there().await);
    forget(&api, &uid).await;
    let would = collect(&api, true).await.unwrap();
    assert!(there().await, "a look deletes nothing");
    assert!(would.digests.contains(&image.to_string()), "{would:?}");
    let done = collect(&api, false).await.unwrap();
    assert_eq!(done.digests, would.digests);
    assert!(!there().await);
}

/// A call by somebody who may read one namespace.
fn reader_of<T>(namespace: &str, message: T) -> tonic::Request<T> {
    let mut request = call(message);
    let caller = request.extensions_mut().get_mut::<super::auth::Caller>().unwrap();
    caller.bindings =
        vec![RoleBinding { role: Role::Viewer as i32, namespace: namespace.into(), exec: false }];
    request
}

#[tokio::test]
async fn what_is_in_a_namespace_that_a_caller_may_not_read_is_told_like_what_is_not() {
    let (_dir, api) = served();
    push(&api).await;
    let version = ModelVersion { namespace: "b".into(), ..iris(&api, "1").await };
    register(&api, version, &["best"]).await.unwrap();
    let get = async |reader: &str, namespace: &str, reference: &str| {
        let (namespace, reference) = (namespace.to_owned(), reference.to_owned());
        let asked = GetVersionRequest { namespace, reference };
        api.get_version(reader_of(reader, asked)).await.map(|_| ()).map_err(|s| reason(&s))
    };
    let plan = async |reader: &str, source: deployment_spec::Source| {
        let mut wanted = input("web", &[]);
        wanted.meta.as_mut().unwrap().namespace = "a".into();
        wanted.spec.as_mut().unwrap().source = Some(source);
        let asked = PlanRequest { deployments: vec![wanted] };
        api.plan(reader_of(reader, asked)).await.map(|_| ()).map_err(|s| reason(&s))
    };
    let model = |text: &str| deployment_spec::Source::Model(text.into());
    let there = ["b/iris:1", "b/iris", "b/iris@best"];
    for reference in there.into_iter().chain(["b/iris:2", "b/none:1", "b/iris@worst", "c/x"]) {
        let unknown = Err((Code::NotFound, "MODEL_NOT_FOUND".to_owned()));
        assert_eq!(get("a", "a", reference).await, unknown, "{reference}");
        let unknown = Err((Code::FailedPrecondition, "MODEL_NOT_FOUND".to_owned()));
        assert_eq!(plan("a", model(reference)).await, unknown, "{reference}");
        let denied = Err((Code::PermissionDenied, "ROLE_NEEDED".to_owned()));
        assert_eq!(get("a", "b", reference).await, denied, "{reference}");
    }
    for reference in there {
        assert_eq!(get("b", "", reference).await, Ok(()), "{reference}");
        assert_eq!(get("", "a", reference).await, Ok(()), "{reference}");
    }
    // Nor are images told of.
    for image in ["app:1", "app:2", "none:1"] {
        let denied = Err((Code::PermissionDenied, "ROLE_NEEDED".to_owned()));
        let image = format!("b/{image}");
        assert_eq!(plan("a", deployment_spec::Source::Image(image)).await, denied);
    }
}

#[tokio::test]
async fn an_alias_that_names_a_version_already_is_not_moved_there() {
    let (_dir, api) = served();
    push(&api).await;
    register(&api, iris(&api, "1").await, &["best"]).await.unwrap();
    let before = api.0.ledger.view().revision;
    let told = alias(&api, "best", "1", "again").await.unwrap();
    assert_eq!((told.from_version.as_str(), told.to_version.as_str()), ("1", "1"));
    assert_eq!(api.0.ledger.view().revision, before, "something was written");
    // One of two: the other is where it was.
    register(&api, iris(&api, "1").await, &["best", "newest"]).await.unwrap();
    assert_eq!(moves(&api, ListAliasMovesRequest::default()).await.len(), 2);
}

#[tokio::test]
async fn a_version_that_is_deployed_must_be_there_when_that_is_written() {
    use berth_server_core::batching::Precondition;
    use berth_server_core::view::ObjectKey;
    let (_dir, api) = served();
    push(&api).await;
    let version = register(&api, iris(&api, "1").await, &[]).await.unwrap();
    let mut wanted = input("web", &[]);
    wanted.spec.as_mut().unwrap().source =
        Some(deployment_spec::Source::Model("iris:1".to_owned()));
    let caller = super::auth::of(&call(()));
    let (_, decided) = api.decide_all(&caller, &[wanted], Role::Operator).await.unwrap();
    let still = Precondition::Exists(ObjectKey::Version(version.model_uid, "1".into()));
    assert!(decided[0].1.proposal.preconditions.contains(&still));
    delete(&api, "1").await.unwrap();
    let late = api.0.ledger.propose(decided[0].1.proposal.clone()).await;
    assert!(late.is_err(), "a version was deployed that had gone");
}

#[tokio::test]
async fn a_version_that_is_deployed_while_it_is_deleted_stays() {
    use berth_server_core::batching::Precondition;
    let (_dir, api) = served();
    push(&api).await;
    let version = register(&api, iris(&api, "1").await, &[]).await.unwrap();
    // Decided while nobody needed it, and written afterwards.
    let model = version.model_uid;
    let decided = Proposal {
        preconditions: vec![Precondition::Unused(model.clone(), "1".into())],
        changes: vec![Change::DeleteVersion(model.clone(), "1".into())],
    };
    let uid = deploy(&api, deployment_spec::Source::Model("iris:1".into())).await;
    assert!(api.0.ledger.propose(decided.clone()).await.is_err());
    assert!(api.0.ledger.view().version(&model, "1").is_some());
    forget(&api, &uid).await;
    api.0.ledger.propose(decided).await.unwrap();
    assert!(api.0.ledger.view().version(&model, "1").is_none());
}

#[tokio::test]
async fn callers_ask_for_a_version_that_is_an_image_by_its_name() {
    use berth_proto::convert::replica_status_from_api;
    use berth_proto::record::ReplicaRecord;
    use berth_server_core::live::Presence;
    let (_dir, api) = served();
    push(&api).await;
    register(&api, iris(&api, "1.2").await, &[]).await.unwrap();
    let uid = deploy(&api, deployment_spec::Source::Model("iris:1.2".into())).await;
    host(&api, "edge", &[]).await;
    let host = api.0.ledger.view().host_by_name("edge").unwrap().uid.clone();
    let placed = berth_server_core::objects::Replica::new(&ReplicaRecord {
        uid: "r1".into(),
        deployment_uid: uid.to_string(),
        release: 1,
        host_uid: host.to_string(),
        intent: ReplicaIntent::Run as i32,
        ..ReplicaRecord::default()
    });
    let placed = std::sync::Arc::new(placed.unwrap());
    let changes = vec![Change::PutReplica(std::sync::Arc::clone(&placed))];
    api.0.ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    let status = ReplicaStatus {
        attempt: 1,
        phase: ReplicaPhase::Running as i32,
        ready: true,
        ..ReplicaStatus::default()
    };
    let now = api.0.time().mono;
    api.0.edit_live(|live| {
        live.edit_host(&host, |host| host.presence = Presence::Present);
        live.take(&placed.uid, replica_status_from_api(&status), now);
    });
    let table = crate::tasks::table(&api.0);
    let served: Vec<&str> = table[0].1.iter().map(|ready| ready.version.as_str()).collect();
    assert_eq!(served, ["1.2"]);
}

#[tokio::test]
async fn a_slip_in_a_reference_is_told_with_the_nearest_there_is() {
    let (_dir, api) = served();
    push(&api).await;
    register(&api, iris(&api, "1").await, &["champion"]).await.unwrap();
    for (reference, words) in [
        ("iris@champoin", "did you mean \"iris@champion\"?"),
        ("iriss:1", "did you mean \"iris:1\"?"),
        ("iris:2", "did you mean \"iris:1\"?"),
        ("iriss@champion", "did you mean \"iris@champion\"?"),
        ("iris@staging", "`berth model alias` moves one"),
        ("speech:1", "`berth model push` registers one"),
        // An image is asked for, and what `berth build` has made is a model version.
        ("image iris:1", "write `model: iris:1` instead of `image:`"),
        ("image iris:2", "docker push"),
    ] {
        let source = match reference.strip_prefix("image ") {
            Some(image) => deployment_spec::Source::Image(image.to_owned()),
            None => deployment_spec::Source::Model(reference.to_owned()),
        };
        let spec = DeploymentSpec { source: Some(source), ..DeploymentSpec::default() };
        let meta = ObjectMeta { name: "d".to_owned(), ..ObjectMeta::default() };
        let input = DeploymentInput { meta: Some(meta), spec: Some(spec), ..Default::default() };
        let request = PlanRequest { deployments: vec![input] };
        let status = api.plan(call(request)).await.unwrap_err();
        assert!(status.message().ends_with(words), "{reference}: {}", status.message());
    }
}
