//! The Open Inference Protocol v2 over gRPC.
//!
//! Calls on models are routed by the first two fields of their message, read from its first bytes;
//! the tensors behind them are never decoded and stream through. Calls on the server are answered
//! here.

use super::body::{BodyError, MAX_BODY, Payload};
use super::forward::{ForwardError, Onward, Repeat, Wire};
use super::http::{Forbidden, Gateway, respond};
use super::names::Naming;
use crate::error::Chain;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use berth_proto::inference;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header};
use http_body_util::BodyExt as _;
use prost::Message;
use std::time::Duration;
use tonic::Code;

/// One call.
pub async fn call(
    State(gateway): State<Gateway>,
    Path(method): Path<String>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let own: Option<Bytes> = match method.as_str() {
        "ServerLive" => Some(encode(&inference::ServerLiveResponse { live: true })),
        "ServerReady" => Some(encode(&inference::ServerReadyResponse { ready: true })),
        "ServerMetadata" => Some(encode(&inference::ServerMetadataResponse {
            name: "berth".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: vec![],
        })),
        "ModelReady" | "ModelMetadata" | "ModelInfer" => None,
        _ => return refuse(Code::Unimplemented, "the Open Inference Protocol has no such call"),
    };
    // Before a byte of the body is taken in.
    if let Err(why) = gateway.allows(&parts, None).await {
        return forbidden(&why);
    }
    if let Some(message) = own {
        return answer(&message);
    }
    let payload = match Payload::read(body, None, &gateway.forwarder.budget).await {
        Ok(payload) => payload,
        Err(why) => return refuse(body_code(why), &why.to_string()),
    };
    let named = match route(&payload) {
        Ok(found) => found,
        Err((code, why)) => return refuse(code, why),
    };
    let model = named.model;
    if let Err(why) = gateway.allows(&parts, Some(&model)).await {
        return forbidden(&why);
    }
    if method == "ModelReady" {
        match gateway.forwarder.routes.backend(&model) {
            None => {
                let why = ForwardError::UnknownModel(model);
                return refuse(code(&why), &why.to_string());
            }
            // Said at once: whoever asks this does not want to wait until it is so.
            Some(backend) if backend.targets.is_empty() => {
                return answer(&encode(&inference::ModelReadyResponse { ready: false }));
            }
            Some(_) => {}
        }
    }
    let Ok(uri) = format!("http://replica/inference.GRPCInferenceService/{method}").parse() else {
        return refuse(Code::InvalidArgument, "the call's name is not valid");
    };
    let naming = Naming::Field { written: model.clone() };
    let onward = Onward {
        model,
        version: named.version,
        wire: Wire::Http2,
        repeat: Repeat::Harmless,
        naming,
        method: http::Method::POST,
        uri,
        headers: headers(&parts.headers),
        payload,
        patience: parts.headers.get("grpc-timeout").and_then(timeout),
    };
    match gateway.forwarder.send(onward).await {
        Ok(response) => respond(response),
        Err(why) => {
            tracing::debug!(error = %Chain(&why), "a call was not answered");
            refuse(code(&why), &Chain(&why).to_string())
        }
    }
}

fn headers(given: &HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    for name in [
        "grpc-timeout",
        "grpc-accept-encoding",
        "user-agent",
        "traceparent",
        "tracestate",
        "x-request-id",
    ] {
        if let Some(value) = given.get(name) {
            headers.insert(http::HeaderName::from_static(name), value.clone());
        }
    }
    headers
}

/// What `grpc-timeout` says: up to eight digits and a unit.
fn timeout(value: &HeaderValue) -> Option<Duration> {
    let (digits, unit) = value.to_str().ok()?.split_at_checked(value.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Whom a call is for.
fn route(payload: &Payload) -> Result<Named, (Code, &'static str)> {
    let invalid = |why| Err((Code::InvalidArgument, why));
    let Some((framing, message)) = payload.head().split_at_checked(FRAMING) else {
        return invalid("the request must be one message");
    };
    if framing[0] != 0 {
        return Err((Code::Unimplemented, "compressed messages are not taken"));
    }
    let length = u32::from_be_bytes([framing[1], framing[2], framing[3], framing[4]]);
    if u64::from(length) > MAX_BODY {
        return Err((Code::ResourceExhausted, "the request is too large"));
    }
    let whole = payload.is_whole();
    if whole && message.len() != length as usize {
        return invalid("the request must be one message that is not cut");
    }
    let Some((named, _)) = Named::of(message, whole) else {
        return invalid("the message cannot be read");
    };
    if named.model.is_empty() {
        return invalid(
            "the message names no model; in a large one the model's name and version must come first",
        );
    }
    Ok(named)
}

/// Writes another name of the model into a call that was routed.
pub(super) fn rename(payload: &mut Payload, name: &str) {
    let Some((framing, message)) = payload.head().split_at_checked(FRAMING) else { return };
    let whole = payload.is_whole();
    let (lead, cut) = if whole {
        (BytesMut::from(&renamed(message, name)[..]), FRAMING + message.len())
    } else {
        // Its end is not here: the leading two fields are written anew.
        let length = u32::from_be_bytes([framing[1], framing[2], framing[3], framing[4]]);
        let Some((named, lead)) = Named::of(message, whole) else { return };
        let mut fields = BytesMut::new();
        prost::encoding::string::encode(1, &name.to_owned(), &mut fields);
        if !named.version.is_empty() {
            prost::encoding::string::encode(2, &named.version, &mut fields);
        }
        let mut bytes =
            BytesMut::from(&framing_of((length as usize).saturating_sub(lead) + fields.len())[..]);
        bytes.put_slice(&fields);
        (bytes, FRAMING + lead)
    };
    payload.put_lead(&lead, cut);
}

fn code(error: &ForwardError) -> Code {
    match error {
        ForwardError::UnknownModel(_) | ForwardError::UnknownVersion { .. } => Code::NotFound,
        ForwardError::NoneReady(_)
        | ForwardError::Unreachable { .. }
        | ForwardError::Broken { .. } => Code::Unavailable,
        ForwardError::TimedOut(_) => Code::DeadlineExceeded,
        ForwardError::Head(_) => Code::InvalidArgument,
        ForwardError::Body(why) => body_code(*why),
    }
}

fn body_code(why: BodyError) -> Code {
    match why {
        BodyError::TooLarge => Code::ResourceExhausted,
        BodyError::Stalled => Code::DeadlineExceeded,
        BodyError::Broken => Code::Cancelled,
    }
}

pub(super) fn forbidden(why: &Forbidden) -> Response {
    let code = match why {
        Forbidden::Anonymous | Forbidden::NotGood(_) => Code::Unauthenticated,
        Forbidden::NotPermitted(_) => Code::PermissionDenied,
    };
    refuse(code, &why.to_string())
}

/// A response of trailers only, as gRPC has it.
fn refuse(code: Code, message: &str) -> Response {
    let mut response = Response::new(axum::body::Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(code as i32));
    let escaped: String = message
        .bytes()
        .map(|b| match b {
            b' '..=b'~' if b != b'%' => char::from(b).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect();
    if let Ok(value) = HeaderValue::from_str(&escaped) {
        headers.insert("grpc-message", value);
    }
    response
}

fn answer(message: &Bytes) -> Response {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = http_body_util::Full::new(message.clone())
        .with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(axum::body::Body::new(body));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Flag and length before a message.
pub(super) const FRAMING: usize = 5;

pub(super) fn framing_of(length: usize) -> [u8; FRAMING] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + FRAMING);
    framed.put_slice(&framing_of(message.len()));
    framed.put_slice(message);
    framed.freeze()
}

fn encode(message: &impl Message) -> Bytes {
    frame(&message.encode_to_vec())
}

/// The message with another model name: protobuf lets a later occurrence of a field win.
fn renamed(message: &[u8], name: &str) -> Bytes {
    let mut bytes = BytesMut::from(message);
    prost::encoding::string::encode(1, &name.to_owned(), &mut bytes);
    frame(&bytes)
}

/// The fields 1 (model's name) and 2 (its version), which all calls on models share.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    model: String,
    version: String,
}

impl Named {
    /// Reads the two fields, and says how many leading bytes hold nothing else. All of a message that
    /// is whole is looked at; of one that is still coming only what is here, up to the first other
    /// field.
    fn of(all: &[u8], whole: bool) -> Option<(Self, usize)> {
        use prost::encoding::{DecodeContext, WireType, decode_key, skip_field, string};
        let mut named = Self { model: String::new(), version: String::new() };
        let mut message = all;
        let mut lead = None;
        while !message.is_empty() {
            let before = all.len() - message.len();
            let (tag, wire) = decode_key(&mut message).ok()?;
            let field = match tag {
                1 => &mut named.model,
                2 => &mut named.version,
                _ => {
                    lead.get_or_insert(before);
                    if !whole {
                        break;
                    }
                    skip_field(wire, tag, &mut message, DecodeContext::default()).ok()?;
                    continue;
                }
            };
            if wire != WireType::LengthDelimited {
                return None;
            }
            string::merge(wire, field, &mut message, DecodeContext::default()).ok()?;
        }
        Some((named, lead.unwrap_or(all.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    fn infer() -> inference::ModelInferRequest {
        inference::ModelInferRequest {
            model_name: "prod.iris".into(),
            model_version: "3".into(),
            raw_input_contents: vec![vec![7; 1000]],
            ..Default::default()
        }
    }

    /// Routes a body and gives the message that a replica sees that knows the model without its
    /// namespace.
    async fn routed(body: Bytes) -> Result<(Named, inference::ModelInferRequest), Code> {
        let budget = Arc::new(Semaphore::new(super::super::body::BUDGET_KIB));
        let pieces: Vec<_> = body.chunks(8000).map(Bytes::copy_from_slice).collect();
        let stream = tokio_stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>));
        let mut payload =
            Payload::read(axum::body::Body::from_stream(stream), None, &budget).await.unwrap();
        let named = route(&payload).map_err(|(code, _)| code)?;
        if let Some((_, own)) = named.model.split_once('.') {
            rename(&mut payload, own);
        }
        let seen = payload.take().unwrap().collect().await.unwrap().to_bytes();
        let (framing, message) = seen.split_at(FRAMING);
        assert_eq!(framing, framing_of(message.len()));
        Ok((named, inference::ModelInferRequest::decode(message).unwrap()))
    }

    #[tokio::test]
    async fn the_replica_sees_its_own_name_and_the_same_tensors_however_large() {
        for size in [1000, 5_000_000] {
            let mut request = infer();
            request.raw_input_contents = vec![vec![7; size]];
            let (named, seen) = routed(encode(&request)).await.unwrap();
            assert_eq!(named, Named { model: "prod.iris".into(), version: "3".into() });
            assert_eq!((seen.model_name.as_str(), seen.model_version.as_str()), ("iris", "3"));
            assert_eq!(seen.raw_input_contents, request.raw_input_contents);
            request.model_name = "iris".into();
            assert_eq!(routed(encode(&request)).await.unwrap().1, request);
        }
    }

    #[tokio::test]
    async fn a_name_that_comes_last_is_found_in_a_small_message_and_asked_to_come_first_in_a_large_one()
     {
        for (size, found) in [(1000, true), (5_000_000, false)] {
            let tensors = inference::ModelInferRequest {
                raw_input_contents: vec![vec![7; size]],
                ..Default::default()
            };
            let name =
                inference::ModelInferRequest { model_name: "a.b".into(), ..Default::default() };
            let body = frame(&[tensors.encode_to_vec(), name.encode_to_vec()].concat());
            let routed = routed(body).await;
            assert_eq!(
                routed.as_ref().ok().map(|(_, seen)| seen.model_name.as_str()),
                found.then_some("b")
            );
            assert_eq!(routed.err(), (!found).then_some(Code::InvalidArgument));
        }
    }

    #[test]
    fn the_calls_on_models_share_the_first_two_fields() {
        let ready = inference::ModelReadyRequest { name: "a".into(), version: "b".into() };
        let (named, lead) = Named::of(&ready.encode_to_vec(), true).unwrap();
        assert_eq!((named.model.as_str(), named.version.as_str(), lead), ("a", "b", 6));
    }

    #[tokio::test]
    async fn a_compressed_or_cut_message_is_refused() {
        let good = encode(&infer());
        assert!(routed(good.clone()).await.is_ok());
        assert_eq!(routed(good.slice(..good.len() - 1)).await.err(), Some(Code::InvalidArgument));
        let mut compressed = good.to_vec();
        compressed[0] = 1;
        assert_eq!(routed(compressed.into()).await.err(), Some(Code::Unimplemented));
    }

    #[test]
    fn a_callers_patience_is_read_in_every_unit() {
        let read = |text: &'static str| timeout(&HeaderValue::from_static(text));
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "5", "m", "123456789S", "5x"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
