//! The Open Inference Protocol v2 over HTTP.
//!
//! Errors have the protocol's form, `{"error": "..."}`. What a replica answers, errors included, is
//! passed on as it is.

use super::forward::{Body, ForwardError, Forwarder, Wire};
use super::grpc;
use crate::error::Chain;
use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::json;
use std::sync::Arc;

/// Largest request or response held in memory: a batch of 32 images of 224 x 224 x 3 in FP32 is
/// 19 MB, as JSON about five times that.
pub const MAX_BODY: usize = 128 * 1024 * 1024;

/// What decides who may ask which deployment.
#[async_trait::async_trait]
pub trait Guard: Send + Sync + 'static {
    /// Whether the caller, known by these headers and extensions, may ask `model`; `None` as the
    /// model asks whether it may use the gateway at all.
    async fn allows(
        &self,
        headers: &HeaderMap,
        extensions: &axum::http::Extensions,
        model: Option<&str>,
    ) -> Result<(), Forbidden>;
}

/// Why a caller may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// Nobody we know.
    #[error(
        "a token or client certificate is needed; `berth user token` makes one, to be sent as \
         `Authorization: Bearer ...`"
    )]
    Anonymous,
    /// Known, but may not.
    #[error("{0}")]
    NotPermitted(String),
}

/// What the handlers share.
#[derive(Clone)]
pub struct Gateway {
    /// Sends requests on.
    pub forwarder: Forwarder,
    /// Says who may.
    pub guard: Arc<dyn Guard>,
}

/// All routes of the gateway's door, gRPC included.
pub fn router(gateway: Gateway) -> Router {
    Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(live))
        .route("/v2/models/{model}", get(pass))
        .route("/v2/models/{model}/ready", get(pass))
        .route("/v2/models/{model}/infer", post(pass))
        .route("/v2/models/{model}/versions/{version}", get(pass))
        .route("/v2/models/{model}/versions/{version}/ready", get(pass))
        .route("/v2/models/{model}/versions/{version}/infer", post(pass))
        .route("/inference.GRPCInferenceService/{method}", post(grpc::call))
        .fallback(async || {
            error(StatusCode::NOT_FOUND, "not found; models are at /v2/models/<deployment>/infer")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(gateway)
}

/// An error in the protocol's form.
pub fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

fn forbidden(why: &Forbidden) -> Response {
    match why {
        Forbidden::Anonymous => {
            let mut response = error(StatusCode::UNAUTHORIZED, &why.to_string());
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                axum::http::HeaderValue::from_static("Bearer realm=\"berth\""),
            );
            response
        }
        Forbidden::NotPermitted(_) => error(StatusCode::FORBIDDEN, &why.to_string()),
    }
}

async fn live() -> Json<serde_json::Value> {
    Json(json!({ "live": true, "ready": true }))
}

async fn server_metadata() -> Json<serde_json::Value> {
    Json(json!({
        "name": "berth",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": [],
    }))
}

impl ForwardError {
    /// The HTTP status callers get.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::UnknownModel(_) | Self::UnknownVersion { .. } => StatusCode::NOT_FOUND,
            Self::NoneReady(_) | Self::Unreachable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Broken { .. } => StatusCode::BAD_GATEWAY,
            Self::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

#[derive(serde::Deserialize)]
struct Named {
    model: String,
    #[serde(default)]
    version: String,
}

async fn pass(
    State(gateway): State<Gateway>,
    Path(named): Path<Named>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let allowed = gateway.guard.allows(&parts.headers, &parts.extensions, Some(&named.model)).await;
    if let Err(why) = allowed {
        return forbidden(&why);
    }
    let body = match axum::body::to_bytes(body, MAX_BODY).await {
        Ok(body) => body,
        Err(_) => {
            return error(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("the request cannot be read or is larger than {MAX_BODY} bytes"),
            );
        }
    };
    let Ok(request) = onward(&parts.method, parts.uri.path(), &parts.headers, body, &named) else {
        return error(StatusCode::BAD_REQUEST, "the request's path or headers are not valid");
    };
    match gateway.forwarder.send(&named.model, &named.version, Wire::Http1, request).await {
        Ok(response) => respond(response),
        Err(why) => {
            tracing::debug!(error = %Chain(&why), "an inference request failed");
            error(why.status(), &Chain(&why).to_string())
        }
    }
}

/// The request as the replica gets it: HTTP/1.1, the same path (the runtime is told the deployment's
/// name as its model's name), no credentials of the caller. A namespace is ours, not the runtime's.
fn onward(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    body: Bytes,
    named: &Named,
) -> Result<http::Request<Bytes>, http::Error> {
    let own = named.model.split_once('.').map_or(named.model.as_str(), |(_, name)| name);
    let path =
        path.replacen(&format!("/v2/models/{}", named.model), &format!("/v2/models/{own}"), 1);
    let mut onward = http::Request::builder()
        .method(method.clone())
        .uri(path)
        .header(header::HOST, "replica")
        .header(header::CONTENT_LENGTH, body.len());
    for name in [
        header::CONTENT_TYPE,
        header::ACCEPT,
        header::USER_AGENT,
        header::HeaderName::from_static("inference-header-content-length"),
        header::HeaderName::from_static("traceparent"),
        header::HeaderName::from_static("tracestate"),
        header::HeaderName::from_static("x-request-id"),
    ] {
        if let Some(value) = headers.get(&name) {
            onward = onward.header(name, value);
        }
    }
    onward.body(body)
}

/// The replica's response without what belongs to its own connection.
pub(super) fn respond(response: http::Response<Body>) -> Response {
    let (mut parts, body) = response.into_parts();
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
        parts.headers.remove(name);
    }
    parts.version = axum::http::Version::default();
    Response::from_parts(parts, axum::body::Body::new(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(model: &str) -> Named {
        Named { model: model.into(), version: String::new() }
    }

    #[test]
    fn credentials_of_the_caller_do_not_reach_the_replica() {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, "Bearer secret".parse().unwrap());
        headers.insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
        let request = onward(
            &Method::POST,
            "/v2/models/iris/infer",
            &headers,
            Bytes::from_static(b"{}"),
            &named("iris"),
        )
        .unwrap();
        assert!(request.headers().get(header::AUTHORIZATION).is_none());
        assert_eq!(request.headers()[header::CONTENT_TYPE], "application/json");
    }

    #[test]
    fn the_namespace_is_taken_off_before_the_replica() {
        let request = onward(
            &Method::POST,
            "/v2/models/prod.iris/versions/3/infer",
            &HeaderMap::new(),
            Bytes::new(),
            &named("prod.iris"),
        )
        .unwrap();
        assert_eq!(request.uri().path(), "/v2/models/iris/versions/3/infer");
    }
}
