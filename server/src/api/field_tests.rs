//! Wrong fields: all of them at once, each by the path its author wrote it at.

use super::apply_tests::{input, push};
use super::tests::{call, host, served};
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::host_service_server::HostService as _;
use berth_proto::api::model_service_server::ModelService as _;
use berth_proto::api::user_service_server::UserService as _;
use berth_proto::api::*;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

/// The paths that a refusal names.
fn wrong<T>(answer: Result<Response<T>, Status>) -> Vec<String> {
    let Err(status) = answer else { panic!("it was taken") };
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let details = status.get_error_details();
    details.bad_request().unwrap().field_violations.iter().map(|v| v.field.clone()).collect()
}

#[tokio::test]
async fn a_reference_that_cannot_be_read_is_told_where_its_author_wrote_it() {
    let (_dir, api) = served();
    push(&api).await;
    let model = |text: &str| Some(deployment_spec::Source::Model(text.into()));
    let image = |text: &str| Some(deployment_spec::Source::Image(text.into()));
    let with = |name: &str, source: Option<deployment_spec::Source>| {
        let mut one = input(name, &[]);
        one.spec.as_mut().unwrap().source = source;
        one
    };
    let mut elsewhere = with("d", image("app:1"));
    elsewhere.meta.as_mut().unwrap().namespace = "No Namespace".into();
    let mut unnamed = with("e", model("Iris!"));
    unnamed.origin.clear();
    let deployments =
        vec![with("a", model("Iris!")), with("b", image("APP:1")), elsewhere, unnamed];
    let answer = api.apply(call(ApplyRequest { deployments, ..Default::default() })).await;
    assert_eq!(
        wrong(answer),
        [
            "a.yaml: spec.model",
            "b.yaml: spec.image",
            "d.yaml: metadata.namespace",
            "deployments[3].spec.model",
        ]
    );
    let reference = "Iris!".to_owned();
    let get = GetVersionRequest { reference, ..Default::default() };
    assert_eq!(wrong(api.get_version(call(get)).await), ["reference"]);
}

#[tokio::test]
async fn all_that_is_wrong_with_a_version_is_told_at_once() {
    let (_dir, api) = served();
    let version = ModelVersion {
        model: "Iris".into(),
        version: "-1".into(),
        repository: "UPPER".into(),
        digest: "sha256:short".into(),
        parameters: (0..257).map(|n| (n.to_string(), String::new())).collect(),
        ..ModelVersion::default()
    };
    let aliases = ["good", "Bad", "good"].map(str::to_owned).to_vec();
    let request = RegisterVersionRequest { version: Some(version), aliases, ..Default::default() };
    assert_eq!(
        wrong(api.register_version(call(request)).await),
        [
            "version.model",
            "version.version",
            "aliases[1]",
            "aliases[2]",
            "version.parameters",
            "version.repository",
            "version.digest",
        ]
    );
}

#[tokio::test]
async fn all_that_is_wrong_with_a_user_a_token_and_labels_is_told_at_once() {
    let (_dir, api) = served();
    let unspecified = RoleBinding { namespace: "no namespace".into(), ..RoleBinding::default() };
    let viewer = RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() };
    let user = CreateUserRequest {
        name: "No Name".into(),
        bindings: vec![viewer, unspecified],
        ..Default::default()
    };
    assert_eq!(
        wrong(api.create_user(call(user)).await),
        ["name", "expire_time", "bindings[1].role", "bindings[1].namespace"]
    );
    let token = CreateJoinTokenRequest {
        ttl: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        uses: 10_001,
        labels: [("no label".to_owned(), "x".to_owned())].into(),
        ..Default::default()
    };
    assert_eq!(wrong(api.create_join_token(call(token)).await), ["ttl", "uses", "labels.no label"]);
    host(&api, "edge", &[]).await;
    let mut set: std::collections::HashMap<String, String> =
        (0..65).map(|n| (format!("l{n}"), String::new())).collect();
    set.insert("no label".into(), String::new());
    let label = LabelHostRequest {
        name: "edge".into(),
        set: set.into_iter().collect(),
        ..Default::default()
    };
    let paths = wrong(api.label_host(call(label)).await);
    assert!(
        paths.contains(&"set.no label".to_owned()) && paths.contains(&"set".to_owned()),
        "{paths:?}"
    );
}

#[tokio::test]
async fn orphans_are_many_and_no_single_revision_is_expected_of_them() {
    let (_dir, api) = served();
    host(&api, "edge", &[]).await;
    let decide = |expected_revision| {
        let write = Some(WriteOptions { expected_revision, ..WriteOptions::default() });
        call(ResolveOrphansRequest {
            write,
            host: "edge".into(),
            decision: OrphanDecision::Release as i32,
            ..Default::default()
        })
    };
    api.resolve_orphans(decide(None)).await.unwrap();
    for revision in [0, 1, 77] {
        let refused = api.resolve_orphans(decide(Some(revision))).await;
        assert_eq!(wrong(refused), ["write.expected_revision"], "it is not passed over");
    }
}
