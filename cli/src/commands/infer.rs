//! Asking a deployment for a prediction.

use crate::args::{Global, Infer};
use crate::client::{Door, context};
use crate::error::{Error, Kind, Result};
use crate::output::{put, remote_lines};
use berth_proto::escape::for_terminal;
use bytes::Bytes;
use http_body_util::Full;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

/// How long a prediction may take.
const INFER: Duration = Duration::from_secs(300);

/// Characters that are shown of an answer that cannot be read.
const SHOWN: usize = 200;

/// The elements of an output, whether they are nested or in a row.
fn elements<'a>(value: &'a Value, out: &mut Vec<&'a Value>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| elements(item, out)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            out.push(value)
        }
    }
}

/// Numbers up to what rounding makes of them, everything else exactly.
fn alike(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-4,
        (_, _) => a == b,
    }
}

/// Outputs that the right answer names, compared element by element.
fn differs(got: &Value, want: &Value) -> Option<String> {
    let list = |v: &Value| v["outputs"].as_array().cloned().unwrap_or_default();
    let (got, want) = (list(got), list(want));
    for right in &want {
        let Some(ours) = got.iter().find(|o| o["name"] == right["name"]) else {
            return Some(format!("output {} is missing", right["name"]));
        };
        let (mut a, mut b) = (Vec::new(), Vec::new());
        elements(&ours["data"], &mut a);
        elements(&right["data"], &mut b);
        if a.len() != b.len() {
            return Some(format!(
                "output {} has {} elements, not {}",
                right["name"],
                a.len(),
                b.len()
            ));
        }
        if let Some((x, y)) = a.iter().zip(&b).find(|(x, y)| !alike(x, y)) {
            return Some(format!("output {} has {x} where {y} is right", right["name"]));
        }
    }
    want.is_empty().then(|| "the file with the right answer names no output".to_owned())
}

/// What an answer means that is no prediction. It came from the gateway: whatever it says, the server
/// was reached.
fn refused(status: u16, words: &str, deployment: &str) -> Error {
    let words = format!("{} ({status})", for_terminal(words));
    match status {
        401 | 403 => Error::new(Kind::Denied, words),
        // The gateway's own words; a replica's 404 is about what it serves.
        404 if words.contains(berth_proto::words::NO_DEPLOYMENT) => {
            let reason = "DEPLOYMENT_NOT_FOUND".to_owned();
            let hint = crate::hints::of(&reason, tonic::Code::NotFound).map(str::to_owned);
            let named = Some(deployment.to_owned());
            Error { reason, hint, named, ..Error::user(words) }
        }
        404 => Error::user(words).hint(
            "a program that knows the model by a name of its own needs spec.servedModel; `berth ps` \
             shows which version each replica has",
        ),
        502..=504 => Error::user(words).hint(format!(
            "`berth ps {deployment}` shows its replicas and why one is not ready, `berth logs \
             {deployment}` what they said"
        )),
        _ => Error::user(words),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::user(format!("cannot read {}: {e}", path.display())))
}

/// What a file holds, or where it is no JSON.
fn json_of<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::user(format!("{} is no JSON: {e}", path.display())))
}

/// The request as it is sent, byte by byte; what is no JSON is not.
fn request(path: &Path) -> Result<Vec<u8>> {
    let (name, body) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes)?;
        (Path::new("standard input"), bytes)
    } else {
        (path, read(path)?)
    };
    json_of::<IgnoredAny>(name, &body)?;
    Ok(body)
}

/// Why a request was refused: the protocol's own field, or whatever else stands there.
fn reason(body: &[u8]) -> String {
    let said: Option<Value> = serde_json::from_slice(body).ok();
    match said.as_ref().map(|value| value["error"].as_str()) {
        Some(words) => words.unwrap_or("no reason was given").to_owned(),
        None => begin_of(body),
    }
}

/// The first of what somebody said, on one line.
fn begin_of(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut begin: String = text.trim().chars().take(SHOWN).collect();
    if begin.len() < text.trim().len() {
        begin.push_str("...");
    }
    for_terminal(&begin)
}

/// What a program has answered to a request that it took.
fn prediction(body: &[u8], gateway: &str, model: &str) -> Result<Value> {
    serde_json::from_slice(body).map_err(|_| {
        let begin = begin_of(body);
        Error::user(format!("the answer is no JSON (Open Inference Protocol): {begin}")).hint(
            format!(
                "a program that speaks another protocol is reached as it is, at \
                 https://{gateway}/deployments/{model}/..."
            ),
        )
    })
}

pub async fn infer(global: &Global, args: Infer) -> Result<()> {
    let body = request(&args.input)?;
    let want = args.expect.as_deref().map(|path| json_of(path, &read(path)?)).transpose()?;
    let context = context(global)?;
    let namespace = global.namespace.as_deref().filter(|n| *n != "default");
    let model = match namespace {
        Some(namespace) => format!("{namespace}.{}", args.deployment),
        None => args.deployment.clone(),
    };
    let version = args.model_version.map(|v| format!("/versions/{v}")).unwrap_or_default();
    let request = http::Request::post(format!("/v2/models/{model}{version}/infer"))
        .header(http::header::HOST, &context.gateway)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let answer = Door::new(&context, &context.gateway)?.ask(request, INFER).await?;
    if !answer.status().is_success() {
        let words = reason(answer.body());
        return Err(refused(answer.status().as_u16(), &words, &args.deployment));
    }
    let value = prediction(answer.body(), &context.gateway, &model)?;
    put(&remote_lines(&format!("{}\n", serde_json::to_string(&value)?)))?;
    if let Some(want) = want {
        if let Some(difference) = differs(&value, &want) {
            return Err(Error::user(format!("the answer is not the expected one: {difference}")));
        }
        eprintln!("the answer is the expected one");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_no_json_is_not_sent_and_the_place_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("input.json");
        let of = |text: &str| {
            std::fs::write(&at, text).unwrap();
            request(&at)
        };
        assert_eq!(of("{\"inputs\": []}\n").unwrap(), b"{\"inputs\": []}\n");
        for (text, place) in [
            ("{\n  inputs}", "line 2 column 3"),
            ("", "line 1 column 0"),
            // Python's json writes these.
            ("[NaN]", "line 1 column 2"),
            ("[-Infinity]", "line 1 column 3"),
        ] {
            let error = of(text).unwrap_err();
            assert_eq!(error.kind, Kind::User);
            assert!(error.message.contains("input.json is no JSON"), "{}", error.message);
            assert!(error.message.contains(place), "{}", error.message);
        }
    }

    #[test]
    fn an_answer_of_another_protocol_is_an_error_with_its_beginning() {
        let error = prediction(b"hello\n\x1b[2J\n", "127.0.0.1:7445", "vision.app").unwrap_err();
        assert_eq!(error.kind, Kind::User);
        assert!(error.message.ends_with("Protocol): hello\\u{a}\\u{1b}[2J"), "{}", error.message);
        assert!(error.hint.unwrap().contains("https://127.0.0.1:7445/deployments/vision.app/"));
        let long = prediction("ö".repeat(500).as_bytes(), "x", "x").unwrap_err().message;
        assert_eq!(long.chars().filter(|c| *c == 'ö').count(), SHOWN);
        assert_eq!(prediction(b"{\"outputs\": []}", "x", "x").unwrap()["outputs"], json!([]));
        // A refusal says why in its own words.
        assert_eq!(reason(b"no room\n"), "no room");
        assert_eq!(reason(br#"{"error": "too large"}"#), "too large");
        assert_eq!(reason(b"{}"), "no reason was given");
    }

    #[test]
    fn a_gateway_that_answers_was_reached_and_says_where_to_look() {
        for status in [502, 503, 504] {
            let error = refused(status, "model \"iris\" has no ready replica", "iris");
            assert_eq!(error.kind, Kind::User, "{status}");
            assert!(error.hint.unwrap().contains("berth ps iris"));
        }
        assert_eq!(refused(401, "x", "iris").kind, Kind::Denied);
        let nothing = format!("{} \"iris\"", berth_proto::words::NO_DEPLOYMENT);
        assert_eq!(refused(404, &nothing, "iris").named.as_deref(), Some("iris"));
        assert!(refused(404, &nothing, "iris").hint.unwrap().contains("berth deployment list"));
        // A replica's own words.
        let of_replica = refused(404, "unknown model", "iris");
        assert!(of_replica.named.is_none() && of_replica.hint.unwrap().contains("servedModel"));
        assert_eq!(refused(400, "x", "iris").hint, None);
    }

    #[test]
    fn a_wrong_number_a_missing_one_and_no_output_at_all_are_told() {
        let answer = |data: Value| json!({"outputs": [{"name": "p", "data": data}]});
        assert_eq!(differs(&answer(json!([[1.0, 2.0]])), &answer(json!([1.0, 2.00001]))), None);
        assert!(differs(&answer(json!([1.0])), &answer(json!([1.1]))).is_some());
        assert!(differs(&answer(json!([1.0])), &answer(json!([1.0, 1.0]))).is_some());
        assert!(differs(&json!({}), &answer(json!([1.0]))).is_some());
        assert!(differs(&answer(json!([1.0])), &json!({})).is_some());
    }

    #[test]
    fn a_missing_output_and_another_word_are_differences() {
        let named = |name: &str, data: Value| json!({"name": name, "data": data});
        let answer = |outputs: &[Value]| json!({"outputs": outputs});
        let (p, q) = (named("p", json!([1.0])), named("q", json!(["cat", true])));
        let (both, first) = (answer(&[p.clone(), q]), answer(std::slice::from_ref(&p)));
        assert_eq!(differs(&both, &both), None);
        assert_eq!(differs(&both, &first), None);
        assert!(differs(&first, &both).is_some_and(|why| why.contains("missing")));
        for other in [json!(["dog", true]), json!(["cat", false]), json!([1.0, true])] {
            let answer = answer(&[p.clone(), named("q", other)]);
            assert!(differs(&answer, &both).is_some(), "{answer}");
        }
    }
}
