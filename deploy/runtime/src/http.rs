//! The protocol over HTTP: paths, bodies and statuses.
//!
//! Errors are `{"error": "..."}` with a status that says what to do (see [`Error::http_status`]).

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde_json::json;

use crate::error::{Chain, Error, Outcome, unimplemented};
use crate::json;
use crate::metrics::Protocol;
use crate::service::{Deadline, EXTENSIONS, PLATFORM, SERVER_NAME, Service};
use crate::signature::TensorSpec;

type Shared = State<Arc<Service>>;

/// The routes of the protocol, and `/metrics`.
pub fn routes(service: Arc<Service>) -> Router {
    let model = "/v2/models/{model}";
    let version = "/v2/models/{model}/versions/{version}";
    let mut router = Router::new()
        .route("/v2", get(server))
        .route("/v2/", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/metrics", get(metrics));
    for prefix in [model, version] {
        router = router
            .route(prefix, get(metadata))
            .route(&format!("{prefix}/ready"), get(model_ready))
            .route(&format!("{prefix}/infer"), post(infer));
    }
    router.fallback(unknown).method_not_allowed_fallback(wrong_method).with_state(service)
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let body = json!({ "error": Chain(&self).to_string() });
        let mut response = (self.http_status(), axum::Json(body)).into_response();
        if self.outcome() == Outcome::Unavailable {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// The model and, on the longer paths, the version.
#[derive(Debug, serde::Deserialize)]
struct Asked {
    model: String,
    #[serde(default)]
    version: String,
}

async fn server() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    axum::Json(json!({ "name": SERVER_NAME, "version": version, "extensions": EXTENSIONS }))
        .into_response()
}

async fn live() -> Response {
    axum::Json(json!({ "live": true })).into_response()
}

async fn ready(State(service): Shared) -> Result<Response, Error> {
    service.ready()?;
    Ok(axum::Json(json!({ "ready": true })).into_response())
}

async fn model_ready(State(service): Shared, Path(asked): Path<Asked>) -> Result<Response, Error> {
    service.resolve(&asked.model, &asked.version)?;
    service.ready()?;
    Ok(axum::Json(json!({ "name": asked.model, "ready": true })).into_response())
}

async fn metadata(State(service): Shared, Path(asked): Path<Asked>) -> Result<Response, Error> {
    #[derive(Serialize)]
    struct Tensor<'a> {
        name: &'a str,
        datatype: &'static str,
        shape: Vec<i64>,
    }
    fn tensors(specs: &[TensorSpec]) -> Vec<Tensor<'_>> {
        specs
            .iter()
            .map(|spec| Tensor {
                name: &spec.name,
                datatype: spec.datatype.name(),
                shape: spec.wire_shape(),
            })
            .collect()
    }
    service.resolve(&asked.model, &asked.version)?;
    let signature = service.signature()?;
    Ok(axum::Json(json!({
        "name": asked.model,
        "versions": [service.settings().version],
        "platform": PLATFORM,
        "inputs": tensors(&signature.inputs),
        "outputs": tensors(&signature.outputs),
        "parameters": signature.properties,
    }))
    .into_response())
}

async fn metrics(State(service): Shared) -> Response {
    let page = service.metrics_page();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

async fn unknown(headers: HeaderMap, uri: Uri) -> Response {
    let error = Error::UnknownPath { path: uri.path().to_owned() };
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if headers.get(CONTENT_TYPE).is_some_and(is_grpc) {
        return unimplemented(&error).map(Body::new);
    }
    error.into_response()
}

async fn wrong_method(uri: Uri, method: Method) -> Error {
    Error::WrongMethod { path: uri.path().to_owned(), method: method.to_string() }
}

async fn infer(State(service): Shared, Path(asked): Path<Asked>, request: Request) -> Response {
    let start = std::time::Instant::now();
    let deadline = Deadline::after(service.settings().timeout);
    let response = match deadline.bound(answer(&service, &asked, request, deadline)).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) | Err(error) => error.into_response(),
    };
    let outcome = Outcome::of_http(response.status());
    service.metrics().request(Protocol::Http, outcome, start.elapsed().as_secs_f64());
    response
}

async fn answer(
    service: &Service,
    asked: &Asked,
    request: Request,
    deadline: Deadline,
) -> Result<Response, Error> {
    service.resolve(&asked.model, &asked.version)?;
    let signature = service.signature()?;
    // Held until the answer is written.
    let _place = service.admit()?;
    let (head, body) = request.into_parts();
    plain(&head.headers)?;
    let json_length = json_length(&head.headers)?;
    let body = read_body(body, service.settings().max_body).await?;
    let infer = json::read(&body, json_length, signature)?;
    drop(body);
    let outputs = service.infer(infer.inputs, infer.wanted.clone(), deadline).await?;
    let answers: Vec<json::Answer<'_>> = infer
        .wanted
        .iter()
        .zip(&infer.binary)
        .zip(&outputs)
        .map(|((place, binary), tensor)| json::Answer {
            spec: &signature.outputs[*place],
            tensor,
            binary: *binary,
        })
        .collect();
    let model = (service.settings().model.as_str(), service.settings().version.as_str());
    let (body, length) = json::write(model, infer.id.as_deref(), &answers)?;
    let Some(length) = length else {
        return Ok(([(CONTENT_TYPE, "application/json")], body).into_response());
    };
    let name = HeaderName::from_static(json::JSON_LENGTH);
    Ok((
        [(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))],
        [(name, HeaderValue::from(length))],
        body,
    )
        .into_response())
}

/// Refuses a compressed body: in a few kilobytes it could hold gigabytes.
fn plain(headers: &HeaderMap) -> Result<(), Error> {
    match headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => Ok(()),
        Some(other) => {
            let encoding = String::from_utf8_lossy(other).chars().take(40).collect();
            Err(Error::Encoded { encoding })
        }
    }
}

fn json_length(headers: &HeaderMap) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(json::JSON_LENGTH) else { return Ok(None) };
    value.to_str().ok().and_then(|text| text.trim().parse().ok()).map(Some).ok_or_else(|| {
        Error::Malformed(format!("the header {} is not a number", json::JSON_LENGTH))
    })
}

async fn read_body(body: Body, limit: usize) -> Result<bytes::Bytes, Error> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Error::TooLarge { limit }),
        Err(error) => Err(Error::Body(axum::Error::new(error))),
    }
}
