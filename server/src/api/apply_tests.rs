//! Applying: all or nothing, and how much at once.

use super::Api;
use super::tests::{call, served};
use crate::registry::names::{Reference, RepoName};
use berth_proto::api::deployment_service_server::DeploymentService as _;
use berth_proto::api::*;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Puts an image that engines could run into the server's registry, as `app:1`.
pub(super) async fn push(api: &Api) {
    let registry = &api.0.registry;
    let repo = RepoName::parse("app").unwrap();
    let config: &[u8] = br#"{"architecture": "amd64", "os": "linux"}"#;
    let (config, size) = registry.put_blob_from_reader(&repo, config, None).await.unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let config = serde_json::json!({
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": config.as_str(), "size": size,
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [],
    });
    let bytes = manifest.to_string().into_bytes().into();
    let tag = Reference::parse("1").unwrap();
    registry.put_manifest(&repo, &tag, media_type, bytes).await.unwrap();
}

pub(super) fn input(name: &str, env: &[(&str, &str)]) -> DeploymentInput {
    DeploymentInput {
        meta: Some(ObjectMeta { name: name.to_owned(), ..ObjectMeta::default() }),
        spec: Some(DeploymentSpec {
            source: Some(deployment_spec::Source::Image("app:1".to_owned())),
            env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..DeploymentSpec::default()
        }),
        origin: format!("{name}.yaml"),
    }
}

pub(super) async fn apply(
    api: &Api,
    deployments: Vec<DeploymentInput>,
) -> Result<ApplyResponse, Status> {
    let write = Some(WriteOptions { request_id: "once".to_owned(), ..WriteOptions::default() });
    Ok(api.apply(call(ApplyRequest { write, deployments })).await?.into_inner())
}

fn fields(status: &Status) -> Vec<(String, String)> {
    let found = status.get_error_details().bad_request().unwrap().field_violations.clone();
    found.into_iter().map(|v| (v.field, v.description)).collect()
}

#[tokio::test]
async fn as_many_deployments_as_the_contract_says_are_written_in_one_revision() {
    let (_dir, api) = served();
    push(&api).await;
    let before = api.0.ledger.view().revision;
    let all: Vec<DeploymentInput> = (0..500).map(|n| input(&format!("d{n}"), &[])).collect();
    let answer = apply(&api, all.clone()).await.unwrap();
    assert_eq!(answer.results.len(), 500);
    let view = api.0.ledger.view();
    assert_eq!((view.revision, view.deployments().count()), (before.next(), 500));
    // Again, as a retry: nothing more is written.
    assert_eq!(apply(&api, all.clone()).await.unwrap(), answer);
    assert_eq!(api.0.ledger.view().revision, view.revision);
    let deployments = all.into_iter().chain([input("one-more", &[])]).collect();
    let status = api.plan(call(PlanRequest { deployments })).await.unwrap_err();
    assert_eq!(fields(&status)[0].1, "must hold 1 to 500, not 501");
}

#[tokio::test]
async fn what_no_single_write_can_hold_is_told_before_anything_is_written() {
    let (_dir, api) = served();
    push(&api).await;
    let before = api.0.ledger.view().revision;
    let large = "x".repeat(30_000);
    let deployments: Vec<DeploymentInput> =
        (0..80).map(|n| input(&format!("d{n}"), &[("LARGE", &large)])).collect();
    let check = Some(WriteOptions { validate_only: true, ..WriteOptions::default() });
    let checked = ApplyRequest { write: check, deployments: deployments.clone() };
    let planned = PlanRequest { deployments: deployments.clone() };
    for status in [
        apply(&api, deployments).await.unwrap_err(),
        api.apply(call(checked)).await.unwrap_err(),
        api.plan(call(planned)).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::InvalidArgument);
        let (path, words) = fields(&status).remove(0);
        assert_eq!(path, "deployments");
        for part in ["nothing was written", "at most 2000 and 3.0 MiB fit", "at a time"] {
            assert!(words.contains(part), "{part} is not in: {words}");
        }
    }
    assert_eq!(api.0.ledger.view().revision, before);
}

#[tokio::test]
async fn all_that_is_missing_for_any_of_them_is_told_at_once() {
    let (_dir, api) = served();
    push(&api).await;
    let before = api.0.ledger.view().revision;
    let from = |name: &str, source| {
        let mut input = input(name, &[]);
        if let Some(spec) = &mut input.spec {
            spec.source = Some(source);
        }
        input
    };
    use deployment_spec::Source;
    let model = || from("model", Source::Model("nosuch@champion".into()));
    let image = || from("image", Source::Image("app:2".into()));
    let status = apply(&api, vec![model(), input("good", &[]), image()]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let told = "model.yaml: spec.model: model \"nosuch\" does not exist";
    assert!(status.message().contains(told), "{}", status.message());
    let told = "image.yaml: spec.image: image \"app:2\" is not in the registry";
    assert!(status.message().contains(told), "{}", status.message());
    // Beside what is wrong by itself.
    let status = apply(&api, vec![model(), input("Bad", &[])]).await.unwrap_err();
    assert_eq!((status.code(), fields(&status).len()), (Code::InvalidArgument, 2));
    assert_eq!(api.0.ledger.view().revision, before);
}

#[tokio::test]
async fn one_bad_deployment_keeps_all_from_being_written_and_every_problem_is_told() {
    let (_dir, api) = served();
    push(&api).await;
    let before = api.0.ledger.view().revision;
    let mut small = input("small", &[]);
    if let Some(spec) = &mut small.spec {
        spec.resources = Some(Resources { cpu_millis: 5, memory_bytes: 4 << 20, ..<_>::default() });
    }
    let mut labelled = input("Labelled", &[]);
    if let Some(meta) = &mut labelled.meta {
        meta.labels = (0..65).map(|n| (format!("k{n}"), "a b".to_owned())).collect();
    }
    let all = vec![input("good", &[]), small, labelled, input("good", &[])];
    let status = apply(&api, all).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let paths: Vec<String> = fields(&status).into_iter().map(|(path, _)| path).collect();
    for path in [
        "small.yaml: spec.resources.cpu",
        "small.yaml: spec.resources.memory",
        "Labelled.yaml: metadata.name",
        "Labelled.yaml: metadata.labels",
        "Labelled.yaml: metadata.labels.k7",
        "good.yaml: metadata.name",
    ] {
        assert!(paths.iter().any(|p| p == path), "{path} is not among {paths:?}");
    }
    assert_eq!(api.0.ledger.view().revision, before);
}
