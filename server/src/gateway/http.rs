//! The Open Inference Protocol v2 over HTTP.
//!
//! Errors have the protocol's form, `{"error": "..."}`. What a replica answers, errors included, is
//! passed on as it is.

use super::body::{BodyError, Payload};
use super::forward::{ForwardError, Forwarder, Onward, Repeat, Wire};
use super::names::Naming;
use super::{grpc, through};
use crate::error::Chain;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use serde_json::json;
use std::sync::Arc;

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
    /// What was shown is not good (any more).
    #[error("{0}")]
    NotGood(String),
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
        .route("/v2/", get(server_metadata))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(live))
        .route("/v2/models/{model}", get(pass))
        .route("/v2/models/{model}/ready", get(ready))
        .route("/v2/models/{model}/infer", post(pass))
        .route("/v2/models/{model}/versions/{version}", get(pass))
        .route("/v2/models/{model}/versions/{version}/ready", get(ready))
        .route("/v2/models/{model}/versions/{version}/infer", post(pass))
        .route("/inference.GRPCInferenceService/{method}", post(grpc::call))
        .route("/deployments/{model}", any(through::pass))
        .route("/deployments/{model}/", any(through::pass))
        .route("/deployments/{model}/{*rest}", any(through::pass))
        .method_not_allowed_fallback(async || {
            error(StatusCode::METHOD_NOT_ALLOWED, "this path does not take that method")
        })
        .fallback(async || {
            error(
                StatusCode::NOT_FOUND,
                "not found; models are at /v2/models/<deployment>/infer, other servers at \
                 /deployments/<deployment>/<path>",
            )
        })
        // Bodies stream and have a bound of their own.
        .layer(DefaultBodyLimit::disable())
        .with_state(gateway)
}

/// An error in the protocol's form.
pub fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

pub(super) fn forbidden(why: &Forbidden) -> Response {
    match why {
        Forbidden::Anonymous | Forbidden::NotGood(_) => {
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

/// What a caller gets that waited for an answer and no longer may.
pub fn ended(headers: &HeaderMap, why: &crate::error::Error) -> Response {
    let why = Forbidden::NotGood(why.to_string());
    let kind = headers.get(header::CONTENT_TYPE);
    match kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        true => grpc::forbidden(&why),
        false => forbidden(&why),
    }
}

async fn live(State(gateway): State<Gateway>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    match gateway.allows(&parts, None).await {
        Ok(()) => Json(json!({ "live": true, "ready": true })).into_response(),
        Err(why) => forbidden(&why),
    }
}

async fn server_metadata(State(gateway): State<Gateway>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    match gateway.allows(&parts, None).await {
        Ok(()) => Json(json!({
            "name": "berth",
            "version": env!("CARGO_PKG_VERSION"),
            "extensions": [],
        }))
        .into_response(),
        Err(why) => forbidden(&why),
    }
}

impl Gateway {
    pub(super) async fn allows(&self, parts: &Parts, model: Option<&str>) -> Result<(), Forbidden> {
        self.guard.allows(&parts.headers, &parts.extensions, model).await
    }

    /// Sends a request on and gives the caller what came of it.
    pub(super) async fn forward(&self, onward: Onward) -> Response {
        match self.forwarder.send(onward).await {
            Ok(response) => respond(response),
            Err(why) => {
                tracing::debug!(error = %Chain(&why), "a request was not answered");
                error(why.status(), &Chain(&why).to_string())
            }
        }
    }
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
            Self::Head(_) => StatusCode::BAD_REQUEST,
            Self::Body(why) => why.status(),
        }
    }
}

impl BodyError {
    /// The HTTP status callers get.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Stalled => StatusCode::REQUEST_TIMEOUT,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }
}

#[derive(serde::Deserialize)]
pub(super) struct Named {
    model: String,
    #[serde(default)]
    version: String,
}

/// Whether a model is ready: said at once when no replica is, else the replica says it.
async fn ready(
    State(gateway): State<Gateway>,
    Path(named): Path<Named>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    if let Err(why) = gateway.allows(&parts, Some(&named.model)).await {
        return forbidden(&why);
    }
    let Some(backend) = gateway.forwarder.routes.backend(&named.model) else {
        let why = ForwardError::UnknownModel(named.model);
        return error(why.status(), &why.to_string());
    };
    if backend.targets.is_empty() {
        let why = ForwardError::NoneReady(named.model);
        return error(why.status(), &why.to_string());
    }
    send(&gateway, parts, body, named).await
}

async fn pass(
    State(gateway): State<Gateway>,
    Path(named): Path<Named>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    if let Err(why) = gateway.allows(&parts, Some(&named.model)).await {
        return forbidden(&why);
    }
    send(&gateway, parts, body, named).await
}

async fn send(gateway: &Gateway, parts: Parts, body: Body, named: Named) -> Response {
    let budget = &gateway.forwarder.budget;
    let payload = match Payload::read(body, declared(&parts.headers), budget).await {
        Ok(payload) => payload,
        Err(why) => return error(why.status(), &why.to_string()),
    };
    match onward(parts, payload, named) {
        Ok(onward) => gateway.forward(onward).await,
        Err(_) => error(StatusCode::BAD_REQUEST, "the request's path is not valid"),
    }
}

/// The length the caller announced.
pub(super) fn declared(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Headers that mean something to the replica. Credentials of the caller are not among them.
const PASSED: [HeaderName; 9] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::USER_AGENT,
    HeaderName::from_static("inference-header-content-length"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("x-request-id"),
];

/// The request as the replica gets it: HTTP/1.1, the same path (but for the model's name, which is put
/// in when the replica is known), no credentials of the caller.
fn onward(parts: Parts, payload: Payload, named: Named) -> Result<Onward, http::Error> {
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = HeaderMap::new();
    headers.insert(header::HOST, HeaderValue::from_static("replica"));
    for name in PASSED {
        if let Some(value) = parts.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    Ok(Onward {
        uri: http::Uri::try_from(path)?,
        model: named.model,
        version: named.version,
        wire: Wire::Http1,
        repeat: Repeat::Harmless,
        naming: Naming::Path,
        method: parts.method,
        headers,
        payload,
        patience: None,
    })
}

/// What belongs to one connection and not to what is carried over it.
pub(super) const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// The replica's response without what belongs to its own connection.
pub(super) fn respond(response: http::Response<Body>) -> Response {
    let (mut parts, body) = response.into_parts();
    for name in HOP_BY_HOP {
        parts.headers.remove(name);
    }
    parts.version = axum::http::Version::default();
    Response::from_parts(parts, body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn sent(path: &str, headers: &[(HeaderName, &str)], model: &str) -> Onward {
        let mut request = http::Request::post(path);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let named = Named { model: model.into(), version: String::new() };
        onward(parts, Payload::whole(Bytes::from_static(b"{}"), None), named).unwrap()
    }

    #[test]
    fn credentials_of_the_caller_do_not_reach_the_replica() {
        let headers =
            [(header::AUTHORIZATION, "Bearer secret"), (header::CONTENT_TYPE, "application/json")];
        let onward = sent("/v2/models/iris/infer", &headers, "iris");
        assert!(onward.headers.get(header::AUTHORIZATION).is_none());
        assert_eq!(onward.headers[header::CONTENT_TYPE], "application/json");
    }
}
