//! The protocol over gRPC, on the same port.

use std::collections::BTreeMap;

use berth_proto::inference as wire;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use prost::Message as _;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use wire::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};

use crate::harness::{Server, assert_close, fixture, numbers, sample, sample_json};

/// The sample request of a model, its elements as contents.
fn sample_request(model: &str) -> wire::ModelInferRequest {
    let json = sample_json(model, "sample.json");
    let input = &json["inputs"][0];
    let mut data = Vec::new();
    flatten(&input["data"], &mut data);
    wire::ModelInferRequest {
        model_name: model.to_owned(),
        id: "42".to_owned(),
        inputs: vec![InferInputTensor {
            name: input["name"].as_str().unwrap().to_owned(),
            datatype: "FP32".to_owned(),
            shape: input["shape"].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect(),
            contents: Some(wire::InferTensorContents { fp32_contents: data, ..Default::default() }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the samples are written as singles")]
fn flatten(data: &serde_json::Value, into: &mut Vec<f32>) {
    match data.as_array() {
        Some(list) => list.iter().for_each(|item| flatten(item, into)),
        None => into.push(data.as_f64().unwrap() as f32),
    }
}

/// The same request with raw contents.
fn raw(mut request: wire::ModelInferRequest) -> wire::ModelInferRequest {
    for input in &mut request.inputs {
        let contents = input.contents.take().unwrap();
        let bytes: Vec<u8> = contents.fp32_contents.iter().flat_map(|x| x.to_le_bytes()).collect();
        request.raw_input_contents.push(bytes);
    }
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn the_samples_get_their_known_answers_both_ways() {
    for model in ["iris", "digits"] {
        let server = Server::ready(sample(model), &["--model-name", model]).await;
        let mut client = server.grpc().await;
        let expected = numbers(&sample_json(model, "expected.json")["outputs"][0]);

        let answer = client.model_infer(sample_request(model)).await.unwrap().into_inner();
        assert_eq!((answer.model_name.as_str(), answer.id.as_str()), (model, "42"));
        assert!(answer.raw_output_contents.is_empty());
        let contents = answer.outputs[0].contents.as_ref().unwrap();
        let got: Vec<f64> = contents.fp32_contents.iter().map(|x| f64::from(*x)).collect();
        assert_close(&got, &expected);

        let answer = client.model_infer(raw(sample_request(model))).await.unwrap().into_inner();
        assert!(answer.outputs[0].contents.is_none());
        let got: Vec<f64> = answer.raw_output_contents[0]
            .chunks(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect();
        assert_close(&got, &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_five_calls_answer() {
    let args = ["--model-name", "iris", "--model-version", "3"];
    let server = Server::ready(sample("iris"), &args).await;
    let mut client = server.grpc().await;
    assert!(client.server_live(wire::ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(wire::ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let metadata = client.server_metadata(wire::ServerMetadataRequest {}).await.unwrap();
    assert_eq!(metadata.into_inner().name, "berth-runtime");
    let ask = |version: &str| wire::ModelReadyRequest {
        name: "iris".to_owned(),
        version: version.to_owned(),
    };
    assert!(client.model_ready(ask("")).await.unwrap().into_inner().ready);
    assert!(client.model_ready(ask("3")).await.unwrap().into_inner().ready);
    assert_eq!(client.model_ready(ask("4")).await.unwrap_err().code(), Code::NotFound);
    let request = wire::ModelMetadataRequest { name: "iris".to_owned(), version: String::new() };
    let metadata = client.model_metadata(request).await.unwrap().into_inner();
    assert_eq!(metadata.versions, ["3"]);
    assert_eq!(metadata.inputs[0].name, "features");
    assert_eq!(metadata.inputs[0].datatype, "FP32");
    assert_eq!(metadata.inputs[0].shape, [-1, 4]);
    assert_eq!(metadata.outputs[0].shape, [-1, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_have_the_codes_that_the_contract_names() {
    let args = ["--model-name", "iris", "--max-body", "4KiB"];
    let server = Server::ready(sample("iris"), &args).await;
    let mut client = server.grpc().await;

    let mut wrong = sample_request("iris");
    wrong.inputs[0].shape = vec![6, 5];
    let status = client.model_infer(wrong).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("dimension 1 is 5 instead of 4"), "{}", status.message());

    let mut wrong = sample_request("iris");
    wrong.outputs = vec![InferRequestedOutputTensor {
        name: "probability".to_owned(),
        parameters: BTreeMap::new(),
    }];
    let status = client.model_infer(wrong).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("it gives `probabilities`"), "{}", status.message());

    let mut wrong = sample_request("iris");
    wrong.model_name = "rose".to_owned();
    assert_eq!(client.model_infer(wrong).await.unwrap_err().code(), Code::NotFound);

    let mut large = sample_request("iris");
    large.id = "x".repeat(5000);
    let status = client.model_infer(large).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("4096 bytes"), "{}", status.message());

    // The connection and the server are as good as before.
    assert!(client.model_infer(sample_request("iris")).await.is_ok());
    for (outcome, count) in [("invalid", 2.0), ("not_found", 1.0), ("too_large", 1.0), ("ok", 1.0)]
    {
        let series =
            format!("berth_runtime_requests_total{{protocol=\"grpc\",outcome=\"{outcome}\"}}");
        assert_eq!(server.metric(&series).await, count, "{outcome}");
    }
}

/// By hand, because the client of the library would give up by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_callers_deadline_is_kept_by_the_server() {
    let server = Server::ready(fixture("slow"), &[]).await;
    let message = slow(300).encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    let request = server
        .request("POST", "/inference.GRPCInferenceService/ModelInfer")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "20m")
        .body(Full::<bytes::Bytes>::from(body))
        .unwrap();
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let response = client.request(request).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4", "DEADLINE_EXCEEDED");
    assert_eq!(response.headers()["grpc-message"], "no%20answer%20within%2020%20ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_own_limit_is_kept() {
    let server = Server::ready(fixture("slow"), &["--request-timeout", "20ms"]).await;
    let status = server.grpc().await.model_infer(slow(300)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_does_not_exist_is_unimplemented() {
    let server = Server::ready(sample("iris"), &[]).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = server
        .request("POST", "/inference.Other/Call")
        .header("content-type", "application/grpc")
        .body(Full::<bytes::Bytes>::default())
        .unwrap();
    let response = client.request(request).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["grpc-status"]),
        (200, &"12".parse().unwrap())
    );
}

/// A request that takes the slow model about `size` cubed times 80 floating point operations.
pub(crate) fn slow(size: i64) -> wire::ModelInferRequest {
    let count = usize::try_from(size * size).unwrap();
    wire::ModelInferRequest {
        model_name: "model".to_owned(),
        inputs: vec![InferInputTensor {
            name: "x0".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![size, size],
            ..Default::default()
        }],
        raw_input_contents: vec![vec![0; count * 4]],
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standard_health_service_follows_readiness() {
    let server = Server::ready(sample("iris"), &[]).await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", server.address));
    let mut client = HealthClient::new(channel.unwrap().connect().await.unwrap());
    for service in ["", "inference.GRPCInferenceService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let status = client.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service}");
    }
}
