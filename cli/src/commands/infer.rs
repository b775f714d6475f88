//! Asking a deployment for a prediction.

use crate::args::{Global, Infer};
use crate::client::{Door, context};
use crate::error::{Error, Kind, Result};
use crate::output::put;
use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use std::io::Read as _;
use std::time::Duration;

/// How long a prediction may take.
const INFER: Duration = Duration::from_secs(300);

fn numbers(value: &Value, out: &mut Vec<f64>) {
    match value {
        Value::Number(n) => out.extend(n.as_f64()),
        Value::Array(items) => items.iter().for_each(|item| numbers(item, out)),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Object(_) => {}
    }
}

/// Outputs that both answers name, compared number by number.
fn differs(got: &Value, want: &Value) -> Option<String> {
    let list = |v: &Value| v["outputs"].as_array().cloned().unwrap_or_default();
    let (got, want) = (list(got), list(want));
    let mut compared = 0;
    for right in &want {
        let Some(ours) = got.iter().find(|o| o["name"] == right["name"]) else { continue };
        let (mut a, mut b) = (Vec::new(), Vec::new());
        numbers(&ours["data"], &mut a);
        numbers(&right["data"], &mut b);
        if a.len() != b.len() {
            return Some(format!(
                "output {} has {} numbers, not {}",
                right["name"],
                a.len(),
                b.len()
            ));
        }
        if let Some((x, y)) = a.iter().zip(&b).find(|(x, y)| (*x - *y).abs() > 1e-4) {
            return Some(format!("output {} has {x} where {y} is right", right["name"]));
        }
        compared += 1;
    }
    (compared == 0).then(|| "the answers name no output in common".to_owned())
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
        let kind = match answer.status().as_u16() {
            401 | 403 => Kind::Denied,
            502..=504 => Kind::Unavailable,
            _ => Kind::User,
        };
        let words = value["error"].as_str().unwrap_or("no reason was given");
        let words = berth_proto::escape::for_terminal(words);
        return Err(Error::new(kind, format!("{} ({})", words, answer.status().as_u16())));
    }
    put(&format!("{}\n", serde_json::to_string(&value)?))?;
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
    fn a_wrong_number_a_missing_one_and_no_output_at_all_are_told() {
        let answer = |data: Value| json!({"outputs": [{"name": "p", "data": data}]});
        assert_eq!(differs(&answer(json!([[1.0, 2.0]])), &answer(json!([1.0, 2.00001]))), None);
        assert!(differs(&answer(json!([1.0])), &answer(json!([1.1]))).is_some());
        assert!(differs(&answer(json!([1.0])), &answer(json!([1.0, 1.0]))).is_some());
        assert!(differs(&json!({}), &answer(json!([1.0]))).is_some());
    }
}
