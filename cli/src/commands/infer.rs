//! Asking a deployment for a prediction.

use crate::args::{Global, Infer};
use crate::client::{Door, context};
use crate::error::{Error, Kind, Result};
use crate::output::{put, remote_lines};
use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use std::io::Read as _;
use std::time::Duration;

/// How long a prediction may take.
const INFER: Duration = Duration::from_secs(300);

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
    let words = format!("{} ({status})", berth_proto::escape::for_terminal(words));
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

pub async fn infer(global: &Global, args: Infer) -> Result<()> {
    let body = if args.input.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes)?;
        bytes
    } else {
        std::fs::read(&args.input)
            .map_err(|e| Error::user(format!("cannot read {}: {e}", args.input.display())))?
    };
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
    let value: Value = serde_json::from_slice(answer.body())
        .unwrap_or_else(|_| json!({"error": String::from_utf8_lossy(answer.body())}));
    if !answer.status().is_success() {
        let words = value["error"].as_str().unwrap_or("no reason was given");
        return Err(refused(answer.status().as_u16(), words, &args.deployment));
    }
    put(&remote_lines(&format!("{}\n", serde_json::to_string(&value)?)))?;
    if let Some(path) = args.expect {
        let want: Value = serde_json::from_slice(&std::fs::read(path)?)?;
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
