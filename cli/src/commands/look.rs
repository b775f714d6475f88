//! Looking: replicas, logs, events, predictions, commands in replicas.

use super::{ask, connect};
use crate::args::{Global, Infer, Logs, Output};
use crate::client::{context, https};
use crate::error::{Error, Kind, Result};
use crate::output::{age, moment, print, put, remote, rfc3339, word};
use berth_proto::api::*;
use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::time::Duration;

/// How long a prediction may take.
const INFER: Duration = Duration::from_secs(300);

pub async fn ps(global: &Global, deployment: Option<&str>) -> Result<()> {
    let client = connect(global).await?;
    let request = ListReplicasRequest {
        namespace: client.namespace.clone(),
        deployment: deployment.unwrap_or_default().to_owned(),
        host: String::new(),
        page: Some(Page { page_size: 1000, ..Page::default() }),
    };
    let all = ask(global, client.deployments().list_replicas(request)).await?.replicas;
    let state = |r: &Replica| {
        let s = r.status.clone().unwrap_or_default();
        if r.host_presence() != HostPresence::Present {
            format!("host {}", word(r.host_presence().as_str_name(), "HOST_PRESENCE_"))
        } else if r.intent() == ReplicaIntent::Stop {
            "stopping".to_owned()
        } else if s.ready {
            "ready".to_owned()
        } else if let Some(p) = s.progress.as_ref().filter(|p| p.total_bytes > 0) {
            let rate = berth_proto::quantity::human_bytes(p.rate_bytes_per_second);
            format!("fetching {} % at {rate}/s", p.done_bytes.saturating_mul(100) / p.total_bytes)
        } else {
            word(s.phase().as_str_name(), "REPLICA_PHASE_")
        }
    };
    let rows = all
        .iter()
        .map(|r| {
            let s = r.status.clone().unwrap_or_default();
            vec![
                r.namespace.clone(),
                r.deployment.clone(),
                r.slot.to_string(),
                r.host.clone(),
                r.release.to_string(),
                state(r),
                s.attempt.to_string(),
                age(s.start_time.as_ref()),
                s.message.clone(),
                r.uid.clone(),
                s.container_id,
            ]
        })
        .collect();
    let value = all
        .iter()
        .map(|r| {
            let s = r.status.clone().unwrap_or_default();
            json!({
                "uid": r.uid, "namespace": r.namespace, "deployment": r.deployment, "slot": r.slot,
                "host": r.host, "release": r.release, "state": state(r), "ready": s.ready,
                "phase": word(s.phase().as_str_name(), "REPLICA_PHASE_"), "attempt": s.attempt,
                "intent": word(r.intent().as_str_name(), "REPLICA_INTENT_"),
                "hostPresence": word(r.host_presence().as_str_name(), "HOST_PRESENCE_"),
                "reason": s.reason, "message": s.message, "containerId": s.container_id,
                "startTime": moment(s.start_time.as_ref()), "createTime": moment(r.create_time.as_ref()),
                "lastExit": s.last_exit.map(|e| json!({"attempt": e.attempt, "code": e.code, "outOfMemory": e.out_of_memory})),
            })
        })
        .collect();
    let heads = [
        "NAMESPACE",
        "DEPLOYMENT",
        "SLOT",
        "HOST",
        "RELEASE",
        "STATE",
        "ATTEMPT",
        "UP",
        "WHY",
        "REPLICA",
        "CONTAINER",
    ];
    print(global, &heads, 9, rows, &Value::Array(value))
}

fn since(text: &str) -> Result<prost_types::Timestamp> {
    if let Ok(ms) = berth_proto::quantity::parse_duration_ms(text) {
        let at = time::OffsetDateTime::now_utc().unix_timestamp()
            - i64::try_from(ms / 1000).unwrap_or(0);
        return Ok(prost_types::Timestamp { seconds: at, nanos: 0 });
    }
    let at = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339)
        .map_err(|_| {
            Error::user(format!("\"{text}\" is neither a duration (10m) nor a time (RFC 3339)"))
        })?;
    Ok(prost_types::Timestamp {
        seconds: at.unix_timestamp(),
        nanos: i32::try_from(at.nanosecond()).unwrap_or(0),
    })
}

pub async fn logs(global: &Global, args: Logs) -> Result<()> {
    let client = connect(global).await?;
    let request = StreamLogsRequest {
        namespace: client.namespace.clone(),
        deployment: args.deployment.clone(),
        replica: args.replica.unwrap_or_default(),
        host: args.host.unwrap_or_default(),
        follow: args.follow,
        since: args.since.as_deref().map(since).transpose()?,
        tail: args.tail,
        previous: args.previous,
    };
    let mut stream = ask(global, client.logs().stream_logs(request)).await?;
    while let Some(message) = stream.message().await? {
        match message.item {
            Some(stream_logs_response::Item::Line(line)) => {
                let text = remote(&String::from_utf8_lossy(&line.text));
                let time = line.time.as_ref().map(rfc3339).unwrap_or_default();
                if global.output == Output::Json {
                    let value = json!({
                        "time": time, "replica": line.replica_uid, "slot": line.slot,
                        "host": line.host, "attempt": line.attempt, "text": text,
                        "stream": word(line.stream().as_str_name(), "OUTPUT_STREAM_"),
                    });
                    put(&format!("{value}\n"))?;
                } else {
                    let stamp = if args.timestamps { format!("{time} ") } else { String::new() };
                    put(&format!(
                        "{}/{} {} | {stamp}{text}\n",
                        args.deployment, line.slot, line.host
                    ))?;
                }
            }
            Some(stream_logs_response::Item::Source(source))
                if source.condition() == LogSourceCondition::Unreachable =>
            {
                let words = berth_proto::escape::for_terminal(&source.message);
                eprintln!(
                    "{}/{} {}: not reached: {words}",
                    args.deployment, source.slot, source.host
                );
            }
            Some(stream_logs_response::Item::Source(_)) | None => {}
        }
    }
    Ok(())
}

pub async fn events(
    global: &Global,
    follow: bool,
    deployment: Option<String>,
    host: Option<String>,
) -> Result<()> {
    let client = connect(global).await?;
    let request = WatchEventsRequest {
        namespace: client.namespace.clone(),
        deployment: deployment.unwrap_or_default(),
        host: host.unwrap_or_default(),
        follow,
        ..WatchEventsRequest::default()
    };
    let mut stream = ask(global, client.events().watch_events(request)).await?;
    while let Some(message) = stream.message().await? {
        let Some(event) = message.event else { continue };
        let time = event.time.as_ref().map(rfc3339).unwrap_or_default();
        let severity = word(event.severity().as_str_name(), "EVENT_SEVERITY_");
        if global.output == Output::Json {
            let value = json!({
                "sequence": event.sequence, "time": time, "severity": severity, "kind": event.kind,
                "name": event.name, "namespace": event.namespace, "reason": event.reason,
                "message": event.message, "actor": event.actor, "host": event.host,
            });
            put(&format!("{value}\n"))?;
        } else {
            let line = format!(
                "{time} {severity:<7} {}/{} {} {}",
                event.kind, event.name, event.reason, event.message
            );
            put(&format!("{}\n", remote(&line)))?;
        }
    }
    Ok(())
}

pub async fn exec(
    global: &Global,
    deployment: String,
    replica: Option<String>,
    command: Vec<String>,
) -> Result<u8> {
    let client = connect(global).await?;
    let start = ExecStart {
        namespace: client.namespace.clone(),
        deployment,
        replica: replica.unwrap_or_default(),
        command,
        ..ExecStart::default()
    };
    let message = |item| ExecRequest { item: Some(item) };
    let first =
        [message(exec_request::Item::Start(start)), message(exec_request::Item::Stdin(Vec::new()))];
    let mut stream = client.logs().exec(tokio_stream::iter(first)).await?.into_inner();
    while let Some(message) = stream.message().await? {
        match message.item {
            Some(exec_response::Item::Stdout(bytes)) => std::io::stdout().write_all(&bytes)?,
            Some(exec_response::Item::Stderr(bytes)) => std::io::stderr().write_all(&bytes)?,
            Some(exec_response::Item::ExitCode(code)) => {
                return Ok(u8::try_from(code.clamp(0, 255)).unwrap_or(1));
            }
            None => {}
        }
    }
    Err(Error::new(Kind::Unavailable, "the command's end was not told"))
}

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
    let answer = https(&context, &context.gateway, request, INFER).await?;
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

    #[test]
    fn since_is_a_duration_or_a_time() {
        assert_eq!(since("2026-01-01T00:00:00Z").unwrap().seconds, 1_767_225_600);
        assert!(since("10m").is_ok());
        assert!(since("yesterday").is_err());
    }
}
