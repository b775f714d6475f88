//! Joining requests: it happens, it changes no answer, and it is left where it would.

use std::sync::Arc;

use serde_json::json;

use crate::harness::{Server, assert_close, fixture, numbers, sample, sample_json};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn joined_requests_get_the_answers_they_would_get_alone() {
    // A delay far above what the requests need to arrive: they meet in the queue.
    let args = ["--model-name", "iris", "--max-batch", "6", "--max-delay", "30s"];
    let server = Arc::new(Server::ready(sample("iris"), &args).await);
    let request = sample_json("iris", "sample.json");
    let expected = numbers(&sample_json("iris", "expected.json")["outputs"][0]);
    let rows: Vec<_> = request["inputs"][0]["data"].as_array().unwrap().clone();
    assert_eq!(rows.len(), 6);
    let mut calls = tokio::task::JoinSet::new();
    for (place, row) in rows.into_iter().enumerate() {
        let server = server.clone();
        calls.spawn(async move {
            let body = json!({ "inputs": [{
                "name": "features", "datatype": "FP32", "shape": [1, 4], "data": row,
            }]});
            (place, server.post("/v2/models/iris/infer", &body).await)
        });
    }
    while let Some(call) = calls.join_next().await {
        let (place, (status, answer)) = call.unwrap();
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["outputs"][0]["shape"], json!([1, 3]));
        assert_close(&numbers(&answer["outputs"][0]), &expected[place * 3..place * 3 + 3]);
    }
    // One run for all: six rows make the batch full, which ends the wait.
    assert_eq!(server.metric("berth_runtime_run_duration_seconds_count").await, 1.0);
    assert_eq!(server.metric("berth_runtime_batch_rows_sum").await, 6.0);
    assert_eq!(server.metric("berth_runtime_batching").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_whose_rows_influence_each_other_are_not_joined() {
    let server = Server::ready(fixture("crossed"), &["--max-delay", "30s"]).await;
    assert_eq!(server.metric("berth_runtime_batching").await, 0.0);
    let body = json!({ "inputs": [
        { "name": "x", "datatype": "FP32", "shape": [1, 2], "data": [3, 4] },
    ]});
    // Not held back by a delay that serves nothing.
    let start = std::time::Instant::now();
    let (status, answer) = server.post("/v2/models/model/infer", &body).await;
    assert!(start.elapsed().as_secs() < 15);
    assert_eq!((status, numbers(&answer["outputs"][0])), (200, vec![0.0, 0.0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_with_a_fixed_first_dimension_are_not_joined() {
    let server = Server::ready(fixture("fixed"), &["--max-delay", "30s"]).await;
    assert_eq!(server.metric("berth_runtime_batching").await, 0.0);
    let body = json!({ "inputs": [
        { "name": "x", "datatype": "FP32", "shape": [1, 2], "data": [3, 4] },
    ]});
    let (status, answer) = server.post("/v2/models/model/infer", &body).await;
    assert_eq!((status, numbers(&answer["outputs"][0])), (200, vec![-3.0, -4.0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_inputs_and_outputs_are_joined_and_rows_must_agree() {
    let server = Server::ready(fixture("mixed"), &[]).await;
    assert_eq!(server.metric("berth_runtime_batching").await, 1.0);
    let body = json!({ "inputs": [
        { "name": "id", "datatype": "INT64", "shape": [2], "data": [0, 1] },
        { "name": "offset", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0] },
        { "name": "flag", "datatype": "BOOL", "shape": [1], "data": [true] },
        { "name": "half", "datatype": "FP16", "shape": [1, 1], "data": [0] },
    ]});
    let (status, answer) = server.post("/v2/models/model/infer", &body).await;
    let wanted = "inputs `id` and `offset` have 2 and 1 rows; they must be equal";
    assert_eq!((status, answer["error"].as_str().unwrap()), (400, wanted));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_full_queue_refuses_at_once_and_health_still_answers() {
    let args = ["--queue", "2", "--request-timeout", "5m"];
    let server = Arc::new(Server::ready(fixture("slow"), &args).await);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let mut client = server.grpc().await;
        calls.spawn(async move { client.model_infer(super::grpc::slow(200)).await.map(|_| ()) });
    }
    // A level, not a time: both have their places.
    let reached = async {
        while server.metric("berth_runtime_requests_in_progress").await < 2.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, reached).await.unwrap();
    let (status, answer) = server.post("/v2/models/model/infer", &json!({})).await;
    assert_eq!(status, 503, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("queue is full (2 requests"), "{answer}");
    let refused = server.grpc().await.model_infer(super::grpc::slow(1)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    assert_eq!(server.get("/v2/health/ready").await.0, 200);
    while let Some(call) = calls.join_next().await {
        call.unwrap().unwrap();
    }
    assert_eq!(server.metric("berth_runtime_requests_in_progress").await, 0.0);
}
