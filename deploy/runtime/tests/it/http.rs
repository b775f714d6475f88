//! The protocol over HTTP.

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::harness::{Server, assert_close, fixture, numbers, sample, sample_json};

fn iris(shape: &[i64], data: &Value) -> Value {
    json!({ "inputs": [{ "name": "features", "datatype": "FP32", "shape": shape, "data": data }] })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_samples_get_their_known_answers() {
    for model in ["iris", "digits"] {
        let server = Server::ready(sample(model), &["--model-name", model]).await;
        let (status, answer) = server
            .post(&format!("/v2/models/{model}/infer"), &sample_json(model, "sample.json"))
            .await;
        assert_eq!(status, 200, "{answer}");
        let expected = sample_json(model, "expected.json");
        assert_eq!(answer["id"], format!("{model}-sample"));
        assert_eq!(answer["model_name"], model);
        for (got, wanted) in answer["outputs"]
            .as_array()
            .unwrap()
            .iter()
            .zip(expected["outputs"].as_array().unwrap())
        {
            for field in ["name", "datatype", "shape"] {
                assert_eq!(got[field], wanted[field]);
            }
            assert_close(&numbers(got), &numbers(wanted));
        }
        // The labels are in the model's own metadata.
        let (_, metadata) = server.get(&format!("/v2/models/{model}")).await;
        let labels: Vec<&str> =
            metadata["parameters"]["labels"].as_str().unwrap().split(',').collect();
        let data = numbers(&answer["outputs"][0]);
        let best: Vec<&str> = data
            .chunks(labels.len())
            .map(|row| labels[(0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()])
            .collect();
        assert_eq!(json!(best), expected["labels"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_tells_the_models_own_signature() {
    let args = ["--model-name", "digits", "--model-version", "7"];
    let server = Server::ready(sample("digits"), &args).await;
    let wanted = json!({
        "name": "digits",
        "versions": ["7"],
        "platform": "onnx_rten",
        "inputs": [{ "name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8] }],
        "outputs": [{ "name": "probabilities", "datatype": "FP32", "shape": [-1, 10] }],
        "parameters": { "labels": "0,1,2,3,4,5,6,7,8,9" },
    });
    assert_eq!(server.get("/v2/models/digits").await, (200, wanted.clone()));
    assert_eq!(server.get("/v2/models/digits/versions/7").await, (200, wanted));
    let (status, server_metadata) = server.get("/v2").await;
    assert_eq!((status, &server_metadata["name"]), (200, &json!("berth-runtime")));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_models_versions_paths_and_methods_are_told_apart() {
    let server = Server::ready(sample("iris"), &["--model-name", "iris"]).await;
    let body = sample_json("iris", "sample.json");
    assert_eq!(server.get("/v2/models/iris/ready").await.0, 200);
    assert_eq!(server.get("/v2/models/iris/versions/1/ready").await.0, 200);
    assert_eq!(server.post("/v2/models/iris/versions/1/infer", &body).await.0, 200);
    for path in
        ["/v2/models/rose", "/v2/models/iris/versions/2", "/v2/models/iris/versions/2/ready"]
    {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, 404, "{path}");
        assert!(answer["error"].as_str().unwrap().contains("this server has"), "{answer}");
    }
    assert_eq!(server.post("/v2/models/rose/infer", &body).await.0, 404);
    assert_eq!(server.get("/v3").await.0, 404);
    assert_eq!(server.get("/v2/models/iris/infer").await.0, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_request_is_told_what_is_wrong_with_it() {
    let server = Server::ready(sample("iris"), &["--model-name", "iris"]).await;
    let cases = [
        (iris(&[1, 5], &json!([1, 2, 3, 4, 5])), "[-1, 4]: dimension 1 is 5 instead of 4"),
        (iris(&[4], &json!([1, 2, 3, 4])), "1 dimensions instead of 2"),
        (iris(&[2, 4], &json!([1, 2, 3, 4])), "4 elements were given"),
        (iris(&[1, 4], &json!(["a", "b", "c", "d"])), "inputs[0].data"),
        (iris(&[-1, 4], &json!([])), "at least 1"),
        (json!({ "inputs": [] }), "input `features` is missing"),
        (json!({}), "missing field `inputs`"),
        (json!([]), "not a valid inference request"),
    ];
    for (body, wanted) in cases {
        let (status, answer) = server.post("/v2/models/iris/infer", &body).await;
        let error = answer["error"].as_str().unwrap();
        assert_eq!(status, 400, "{body}: {error}");
        assert!(error.contains(wanted), "{body}: {error}");
    }
    let mut body = iris(&[1, 4], &json!([1, 2, 3, 4]));
    body["inputs"][0]["datatype"] = json!("FP64");
    let (status, answer) = server.post("/v2/models/iris/infer", &body).await;
    let wanted = "input `features`: data type FP64 was given, the model takes FP32";
    assert_eq!((status, answer["error"].as_str().unwrap()), (400, wanted));
    let request = server.request("POST", "/v2/models/iris/infer").body(Full::from("{")).unwrap();
    assert_eq!(server.send(request).await.status(), 400);
    // None of these harmed the server.
    let body = sample_json("iris", "sample.json");
    assert_eq!(server.post("/v2/models/iris/infer", &body).await.0, 200);
    let invalid = "berth_runtime_requests_total{protocol=\"http\",outcome=\"invalid\"}";
    assert_eq!(server.metric(invalid).await, 10.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_beyond_the_bound_is_refused() {
    let args = ["--model-name", "iris", "--max-body", "4KiB"];
    let server = Server::ready(sample("iris"), &args).await;
    let data: Vec<u32> = (0..4000).collect();
    let (status, answer) =
        server.post("/v2/models/iris/infer", &iris(&[1000, 4], &json!(data))).await;
    assert_eq!(status, 413);
    assert!(answer["error"].as_str().unwrap().contains("4096 bytes"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_tensors_travel_both_ways() {
    let server = Server::ready(sample("iris"), &["--model-name", "iris"]).await;
    let json = json!({
        "inputs": [{ "name": "features", "datatype": "FP32", "shape": [1, 4],
                     "parameters": { "binary_data_size": 16 } }],
        "outputs": [{ "name": "probabilities", "parameters": { "binary_data": true } }],
    });
    let mut body = serde_json::to_vec(&json).unwrap();
    let length = body.len();
    body.extend([5.1f32, 3.5, 1.4, 0.2].iter().flat_map(|x| x.to_le_bytes()));
    let request = server
        .request("POST", "/v2/models/iris/infer")
        .header("inference-header-content-length", length)
        .body(Full::<Bytes>::from(body))
        .unwrap();
    let response = server.send(request).await;
    assert_eq!(response.status(), 200, "{:?}", response.body());
    let length: usize =
        response.headers()["inference-header-content-length"].to_str().unwrap().parse().unwrap();
    let got: Vec<f64> = response.body()[length..]
        .chunks(4)
        .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
        .collect();
    let (_, flat) =
        server.post("/v2/models/iris/infer", &iris(&[1, 4], &json!([[5.1, 3.5, 1.4, 0.2]]))).await;
    assert_close(&got, &numbers(&flat["outputs"][0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_data_type_is_given_back_as_the_model_says() {
    let server = Server::ready(fixture("mixed"), &[]).await;
    let half = |x: f32| berth_runtime::tensor::single_to_half(x).to_le_bytes();
    let json = json!({ "inputs": [
        { "name": "flag", "datatype": "BOOL", "shape": [2], "data": [true, false] },
        { "name": "half", "datatype": "FP16", "shape": [2, 1], "parameters": { "binary_data_size": 4 } },
        { "name": "offset", "datatype": "FP32", "shape": [2, 3], "data": [[0, 0, 0.5], [0, 0, 0]] },
        { "name": "id", "datatype": "INT64", "shape": [2], "data": [0, 1] },
    ]});
    let mut body = serde_json::to_vec(&json).unwrap();
    let length = body.len();
    body.extend(half(0.5));
    body.extend(half(-2.0));
    let request = server
        .request("POST", "/v2/models/model/infer")
        .header("inference-header-content-length", length)
        .body(Full::<Bytes>::from(body))
        .unwrap();
    let response = server.send(request).await;
    let answer: Value = serde_json::from_slice(response.body()).unwrap();
    assert_eq!(response.status(), 200, "{answer}");
    let outputs = json!([
        { "name": "sum", "datatype": "FP32", "shape": [2, 3], "data": [1.0, 2.0, 3.5, 30.0, 20.0, 10.0] },
        { "name": "best", "datatype": "INT64", "shape": [2], "data": [2, 0] },
        { "name": "opposite", "datatype": "BOOL", "shape": [2], "data": [false, true] },
        { "name": "wide", "datatype": "FP64", "shape": [2, 1], "data": [0.5, -2.0] },
    ]);
    assert_eq!(answer["outputs"], outputs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_fails_on_an_input_fails_that_request_only() {
    let server = Server::ready(fixture("mixed"), &[]).await;
    let request = |id: i64| {
        json!({ "inputs": [
            { "name": "flag", "datatype": "BOOL", "shape": [1], "data": [true] },
            { "name": "half", "datatype": "FP16", "shape": [1, 1], "data": [1.0] },
            { "name": "offset", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0] },
            { "name": "id", "datatype": "INT64", "shape": [1], "data": [id] },
        ]})
    };
    // There is no row 9 in the model's table.
    let (status, answer) = server.post("/v2/models/model/infer", &request(9)).await;
    assert_eq!(status, 500, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("failed on this input"), "{answer}");
    let (status, answer) = server.post("/v2/models/model/infer", &request(1 << 40)).await;
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("element 0 is 1099511627776"), "{answer}");
    assert_eq!(server.post("/v2/models/model/infer", &request(1)).await.0, 200);
}
