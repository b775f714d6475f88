//! The Open Inference Protocol v2 over gRPC.
//!
//! Calls on models are routed by the first two fields of their message, read from the bytes; the
//! tensors behind them are never decoded. Calls on the server are answered here.

use super::forward::{ForwardError, Wire};
use super::http::{Forbidden, Gateway, MAX_BODY, respond};
use crate::error::Chain;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use berth_proto::inference;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header};
use http_body_util::BodyExt as _;
use prost::Message;
use tonic::Code;

/// One call.
pub async fn call(
    State(gateway): State<Gateway>,
    Path(method): Path<String>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let body = match http_body_util::Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => {
            return refuse(Code::ResourceExhausted, "the request cannot be read or is too large");
        }
    };
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
    if let Some(message) = own {
        return match gateway.guard.allows(&parts.headers, &parts.extensions, None).await {
            Ok(()) => answer(&message),
            Err(why) => forbidden(&why),
        };
    }
    let Some(message) = unframe(&body) else {
        return refuse(
            Code::InvalidArgument,
            "the request must be one message that is not compressed",
        );
    };
    let Some(Named { model, version }) = Named::of(message) else {
        return refuse(Code::InvalidArgument, "the message cannot be read");
    };
    if let Err(why) = gateway.guard.allows(&parts.headers, &parts.extensions, Some(&model)).await {
        return forbidden(&why);
    }
    let own_name = model.split_once('.').map_or(model.as_str(), |(_, name)| name);
    let body = if own_name == model { body.clone() } else { renamed(message, own_name) };
    let path = format!("/inference.GRPCInferenceService/{method}");
    let Ok(request) = onward(&path, &parts.headers, body) else {
        return refuse(Code::InvalidArgument, "the request's headers are not valid");
    };
    match gateway.forwarder.send(&model, &version, Wire::Http2, request).await {
        Ok(response) => respond(response),
        Err(why) => refuse(code(&why), &Chain(&why).to_string()),
    }
}

fn onward(
    path: &str,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<http::Request<Bytes>, http::Error> {
    let mut onward = http::Request::builder()
        .method(http::Method::POST)
        .uri(format!("http://replica{path}"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers");
    for name in ["grpc-timeout", "user-agent", "traceparent", "tracestate", "x-request-id"] {
        if let Some(value) = headers.get(name) {
            onward = onward.header(name, value);
        }
    }
    onward.body(body)
}

fn code(error: &ForwardError) -> Code {
    match error {
        ForwardError::UnknownModel(_) | ForwardError::UnknownVersion { .. } => Code::NotFound,
        ForwardError::NoneReady(_)
        | ForwardError::Unreachable { .. }
        | ForwardError::Broken { .. } => Code::Unavailable,
        ForwardError::TimedOut(_) => Code::DeadlineExceeded,
    }
}

fn forbidden(why: &Forbidden) -> Response {
    let code = match why {
        Forbidden::Anonymous => Code::Unauthenticated,
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

fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

fn encode(message: &impl Message) -> Bytes {
    frame(&message.encode_to_vec())
}

/// The one message of a body; `None` when it is compressed, cut or not alone.
fn unframe(body: &[u8]) -> Option<&[u8]> {
    let (head, message) = body.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    (head[0] == 0 && message.len() == length).then_some(message)
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
    fn of(mut message: &[u8]) -> Option<Self> {
        use prost::encoding::{DecodeContext, WireType, decode_key, skip_field, string};
        let mut named = Self { model: String::new(), version: String::new() };
        while !message.is_empty() {
            let (tag, wire) = decode_key(&mut message).ok()?;
            let field = match tag {
                1 => &mut named.model,
                2 => &mut named.version,
                _ => {
                    skip_field(wire, tag, &mut message, DecodeContext::default()).ok()?;
                    continue;
                }
            };
            if wire != WireType::LengthDelimited {
                return None;
            }
            string::merge(wire, field, &mut message, DecodeContext::default()).ok()?;
        }
        Some(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn infer() -> inference::ModelInferRequest {
        inference::ModelInferRequest {
            model_name: "prod.iris".into(),
            model_version: "3".into(),
            raw_input_contents: vec![vec![7; 1000]],
            ..Default::default()
        }
    }

    #[test]
    fn the_route_is_read_without_decoding_tensors() {
        let bytes = infer().encode_to_vec();
        let named = Named::of(&bytes).unwrap();
        assert_eq!(named, Named { model: "prod.iris".into(), version: "3".into() });
        assert_eq!(Named::of(&bytes[..bytes.len() - 1]), None);
        let ready = inference::ModelReadyRequest { name: "a".into(), version: "b".into() };
        let named = Named::of(&ready.encode_to_vec()).unwrap();
        assert_eq!(named, Named { model: "a".into(), version: "b".into() });
    }

    #[test]
    fn the_replica_sees_its_own_name_and_the_same_tensors() {
        let body = renamed(&infer().encode_to_vec(), "iris");
        let read = inference::ModelInferRequest::decode(unframe(&body).unwrap()).unwrap();
        assert_eq!(read.model_name, "iris");
        assert_eq!(read.raw_input_contents, infer().raw_input_contents);
    }

    #[test]
    fn a_compressed_or_cut_message_is_refused() {
        let good = encode(&infer());
        assert!(unframe(&good).is_some());
        assert!(unframe(&good[..good.len() - 1]).is_none());
        let mut compressed = good.to_vec();
        compressed[0] = 1;
        assert!(unframe(&compressed).is_none());
    }
}
