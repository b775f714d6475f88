//! Requests made to do harm: each is refused as what it is, and the server goes on.

use berth_proto::inference as wire;
use bytes::Bytes;
use http_body_util::Full;
use tonic::Code;
use wire::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};

use crate::harness::{Server, fixture, sample, sample_json};

/// One input, `features`, with these words in the place of its shape, parameters and data.
fn input(shape: &str, more: &str) -> String {
    format!(r#"{{"name": "features", "datatype": "FP32", "shape": {shape}{more}}}"#)
}

fn inputs(shape: &str, more: &str) -> String {
    format!(r#"{{"inputs": [{}]}}"#, input(shape, more))
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_http_requests_are_refused_in_the_protocols_form_and_harm_nobody() {
    let args = ["--model-name", "iris", "--max-body", "1MiB"];
    let server = Server::ready(sample("iris"), &args).await;
    let four = r#", "data": [1, 2, 3, 4]"#;
    let good = inputs("[1, 4]", four);
    let binary = |size: &str| {
        inputs("[1, 4]", &format!(r#", "parameters": {{"binary_data_size": {size}}}"#))
    };
    let twice = format!(r#"{{"inputs": [{0}, {0}]}}"#, input("[1, 4]", four));
    let outputs = |list: &str| good.replacen('{', &format!(r#"{{"outputs": [{list}], "#), 1);
    let deep = inputs("[1, 4]", &format!(r#", "data": {}1{}"#, "[".repeat(5000), "]".repeat(5000)));
    // What, the body, the header of the JSON's length, the status, a part of what is said.
    let cases: Vec<(&str, String, Option<&str>, u16, &str)> = vec![
        ("no body", String::new(), None, 400, "not a valid inference request"),
        ("no JSON", "\u{0}\u{1}".into(), None, 400, "not a valid inference request"),
        ("cut JSON", good[..good.len() - 3].into(), None, 400, "not a valid inference request"),
        ("more behind", format!("{good}{good}"), None, 400, "something follows"),
        ("deep lists", deep, None, 400, "not a valid inference request"),
        ("inputs is no list", r#"{"inputs": {}}"#.into(), None, 400, "inputs"),
        ("id is no text", good.replacen('{', r#"{"id": {}, "#, 1), None, 400, "id"),
        ("input twice", twice, None, 400, "twice"),
        ("shape of fractions", inputs("[1.5, 4]", four), None, 400, "shape"),
        ("shape of texts", inputs(r#"["1", 4]"#, four), None, 400, "shape"),
        ("no shape", inputs("null", four), None, 400, "shape"),
        ("shape of nothing", inputs("[]", four), None, 400, "0 dimensions instead of 2"),
        ("dimension 0", inputs("[0, 4]", r#", "data": []"#), None, 400, "at least 1"),
        ("dimension below 0", inputs("[-4, 4]", four), None, 400, "at least 1"),
        ("overflow", inputs("[4611686018427387904, 4]", four), None, 400, "too many elements"),
        ("dimension beyond 64 bits", inputs("[18446744073709551616, 4]", four), None, 400, "shape"),
        ("a promise of much", inputs("[1000000000, 4]", four), None, 400, "4 elements were given"),
        (
            "too many dimensions",
            inputs("[1, 1, 1, 4]", four),
            None,
            400,
            "4 dimensions instead of 2",
        ),
        (
            "number beyond a double",
            inputs("[1, 4]", r#", "data": [1e999, 2, 3, 4]"#),
            None,
            400,
            "data",
        ),
        ("data is an object", inputs("[1, 4]", r#", "data": {"a": 1}"#), None, 400, "data"),
        ("ragged data", inputs("[1, 4]", r#", "data": [[1, 2], [3]]"#), None, 400, "data"),
        ("data of nulls", inputs("[1, 4]", r#", "data": [null, 2, 3, 4]"#), None, 400, "data"),
        (
            "texts for numbers",
            good.replace("FP32", "BYTES"),
            None,
            400,
            "data type BYTES was given",
        ),
        (
            "a data type that is none",
            good.replace("FP32", "FP31"),
            None,
            400,
            "data type FP31 was given",
        ),
        ("unknown output", outputs(r#"{"name": "x"}"#), None, 400, "it gives `probabilities`"),
        (
            "output twice",
            outputs(r#"{"name": "probabilities"}, {"name": "probabilities"}"#),
            None,
            400,
            "twice",
        ),
        ("bytes that are not there", binary("16"), None, 400, "ends before its binary data"),
        ("bytes beyond all", binary("18446744073709551615"), None, 400, "bytes were given"),
        ("bytes below 0", binary("-1"), None, 400, "binary_data_size"),
        (
            "bytes and data",
            inputs("[1, 4]", r#", "data": [1, 2, 3, 4], "parameters": {"binary_data_size": 16}"#),
            None,
            400,
            "both",
        ),
        ("JSON longer than the body", good.clone(), Some("1000000"), 400, "the body has"),
        ("JSON of no length", good.clone(), Some("0"), 400, "not a valid inference request"),
        ("JSON's length is no number", good.clone(), Some("many"), 400, "is not a number"),
        ("JSON's length below 0", good.clone(), Some("-1"), 400, "is not a number"),
        ("larger than the bound", " ".repeat(1024 * 1024 + 1), None, 413, "1048576 bytes"),
    ];
    for (what, body, length, status, words) in cases {
        let mut request = server.request("POST", "/v2/models/iris/infer");
        if let Some(length) = length {
            request = request.header("inference-header-content-length", length);
        }
        let response = server.send(request.body(Full::<Bytes>::from(body)).unwrap()).await;
        let answer: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{what}: {answer}"));
        assert_eq!(response.status().as_u16(), status, "{what}: {error}");
        assert!(error.contains(words), "{what}: {error}");
        assert!(error.len() < 1000, "{what}: an error of {} bytes", error.len());
        assert_eq!(answer.as_object().unwrap().len(), 1, "{what}: {answer}");
    }
    let compressed = server
        .request("POST", "/v2/models/iris/infer")
        .header("content-encoding", "gzip")
        .body(Full::<Bytes>::from(good))
        .unwrap();
    let response = server.send(compressed).await;
    assert_eq!(response.status().as_u16(), 415);
    assert!(String::from_utf8_lossy(response.body()).contains("gzip"));

    let body = sample_json("iris", "sample.json");
    assert_eq!(server.post("/v2/models/iris/infer", &body).await.0, 200);
    assert_eq!(server.get("/v2/health/ready").await.0, 200);
}

/// A good request for iris, all of it in raw contents.
fn good() -> wire::ModelInferRequest {
    wire::ModelInferRequest {
        model_name: "iris".to_owned(),
        inputs: vec![InferInputTensor {
            name: "features".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 4],
            ..Default::default()
        }],
        raw_input_contents: vec![vec![0; 16]],
        ..Default::default()
    }
}

type Spoil = fn(&mut wire::ModelInferRequest);

fn wanted(name: &str) -> InferRequestedOutputTensor {
    InferRequestedOutputTensor { name: name.to_owned(), ..Default::default() }
}

fn contents(floats: Vec<f32>) -> Option<wire::InferTensorContents> {
    Some(wire::InferTensorContents { fp32_contents: floats, ..Default::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_grpc_requests_have_the_right_code_and_harm_nobody() {
    let args = ["--model-name", "iris", "--max-body", "1MiB"];
    let server = Server::ready(sample("iris"), &args).await;
    let mut client = server.grpc().await;
    let invalid = Code::InvalidArgument;
    let cases: &[(&str, Spoil, Code)] = &[
        ("no model", |r| r.model_name.clear(), Code::NotFound),
        ("another model", |r| r.model_name.push('x'), Code::NotFound),
        ("another version", |r| r.model_version.push('9'), Code::NotFound),
        ("no inputs", |r| r.inputs.clear(), invalid),
        (
            "no inputs nor contents",
            |r| {
                *r =
                    wire::ModelInferRequest { inputs: vec![], raw_input_contents: vec![], ..good() }
            },
            invalid,
        ),
        (
            "input twice",
            |r| {
                r.inputs.push(r.inputs[0].clone());
                r.raw_input_contents.push(vec![0; 16]);
            },
            invalid,
        ),
        ("unknown input", |r| r.inputs[0].name.push('x'), invalid),
        ("another data type", |r| r.inputs[0].datatype = "INT64".into(), invalid),
        ("a data type that is none", |r| r.inputs[0].datatype = "fp32".into(), invalid),
        ("no data type", |r| r.inputs[0].datatype.clear(), invalid),
        ("no shape", |r| r.inputs[0].shape.clear(), invalid),
        ("dimension 0", |r| r.inputs[0].shape = vec![0, 4], invalid),
        ("dimension below 0", |r| r.inputs[0].shape = vec![i64::MIN, 4], invalid),
        ("overflow", |r| r.inputs[0].shape = vec![i64::MAX, 4], invalid),
        ("a promise of much", |r| r.inputs[0].shape = vec![1 << 30, 4], invalid),
        ("a thousand dimensions", |r| r.inputs[0].shape = vec![1; 1000], invalid),
        (
            "a byte too few",
            |r| {
                r.raw_input_contents[0].pop();
            },
            invalid,
        ),
        ("a byte too many", |r| r.raw_input_contents[0].push(0), invalid),
        ("empty contents", |r| r.raw_input_contents[0].clear(), invalid),
        ("contents without an input", |r| r.raw_input_contents.push(vec![0; 16]), invalid),
        ("both kinds of contents", |r| r.inputs[0].contents = contents(vec![0.0; 4]), invalid),
        ("neither kind of contents", |r| r.raw_input_contents.clear(), invalid),
        (
            "too few elements",
            |r| {
                r.raw_input_contents.clear();
                r.inputs[0].contents = contents(vec![0.0; 3]);
            },
            invalid,
        ),
        (
            "another field's elements",
            |r| {
                r.raw_input_contents.clear();
                let contents =
                    wire::InferTensorContents { int_contents: vec![0; 4], ..Default::default() };
                r.inputs[0].contents = Some(contents);
            },
            invalid,
        ),
        ("unknown output", |r| r.outputs = vec![wanted("x")], invalid),
        ("output twice", |r| r.outputs = vec![wanted("probabilities"); 2], invalid),
        ("larger than the bound", |r| r.id = "x".repeat(1024 * 1024 + 1), Code::ResourceExhausted),
    ];
    for (what, spoil, code) in cases {
        let mut request = good();
        spoil(&mut request);
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), *code, "{what}: {}", status.message());
        let words = status.message();
        assert!(!words.is_empty() && words.len() < 8000, "{what}: {} bytes", words.len());
    }
    assert!(client.model_infer(good()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn elements_that_the_data_type_cannot_hold_are_named_with_their_place() {
    let server = Server::ready(fixture("mixed"), &[]).await;
    let request = |flag: &str, id: &str| {
        let text = format!(
            r#"{{"inputs": [
                {{"name": "flag", "datatype": "BOOL", "shape": [2], "data": {flag}}},
                {{"name": "half", "datatype": "FP16", "shape": [2, 1], "data": [0, 0]}},
                {{"name": "offset", "datatype": "FP32", "shape": [2, 3], "data": [0, 0, 0, 0, 0, 0]}},
                {{"name": "id", "datatype": "INT64", "shape": [2], "data": {id}}}]}}"#
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    for (flag, id, words) in [
        ("[0, 2]", "[0, 1]", "element 1 is 2"),
        ("[true, 0.5]", "[0, 1]", "data"),
        ("[0.5, 1]", "[0, 1]", "element 0 is 0.5"),
        ("[true, true]", "[0, 1.5]", "element 1 is 1.5"),
        ("[true, true]", "[true, false]", "takes numbers"),
        ("[true, true]", "[0, 9223372036854775807]", "element 1 is 9223372036854775807"),
        ("[true, true]", "[0, 9223372036854775808]", "data"),
    ] {
        let (status, answer) = server.post("/v2/models/model/infer", &request(flag, id)).await;
        assert_eq!(status, 400, "{flag} {id}: {answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(words), "{flag} {id}: {error}");
    }
    assert_eq!(server.post("/v2/models/model/infer", &request("[1, 0]", "[0, 1]")).await.0, 200);
}
