//! The page and metrics door: health for load balancers, metrics for Prometheus, a page for people.
//!
//! Whoever asks shows a client certificate, a token (bearer, or basic with the token as password, so
//! that a browser asks for it), or a cookie got by a one-time link. Each request is judged anew; what
//! is shown is what the API would show the same caller. Nothing can be changed here, and no answer
//! loads anything from elsewhere.

mod html;
mod links;
mod metrics;

pub use links::Links;

use crate::api::auth::{self, Caller};
use crate::cluster::Cluster;
use crate::error::Chain;
use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{Html, IntoResponse as _, Redirect, Response};
use axum::routing::get;
use base64::Engine as _;
use berth_proto::api::{Event, Role};
use std::sync::Arc;

/// Events on the page: what happened lately, not the history.
const EVENTS: usize = 50;
/// Nothing but our own style: no script, no frame, no form, nothing from elsewhere.
const POLICY: &str = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";
/// The cookie; the prefix makes browsers insist on TLS and on this very host.
pub(crate) const COOKIE: &str = "__Host-berth";

/// The door's routes.
pub fn router(cluster: Arc<Cluster>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/login", get(login))
        .route("/style.css", get(async || ([(header::CONTENT_TYPE, "text/css")], html::STYLE)))
        .route("/healthz", get(async || "ok\n"))
        .route("/metrics", get(metrics::metrics))
        .fallback(async || (StatusCode::NOT_FOUND, "not found; there are /, /metrics, /healthz\n"))
        .layer(axum::middleware::from_fn(harden))
        .with_state(cluster)
}

async fn harden(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// A browser's basic credentials: a user's name, and its token as the header that stands for it.
fn basic(headers: &HeaderMap) -> Option<(String, HeaderValue)> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let encoded = value.strip_prefix("Basic ").or_else(|| value.strip_prefix("basic "))?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (name, token) = text.split_once(':')?;
    Some((name.to_owned(), HeaderValue::from_str(&format!("Bearer {token}")).ok()?))
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok());
    all.flat_map(|v| v.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE)
        .map(|(_, value)| value)
}

/// Who asks, if it may read.
#[expect(clippy::result_large_err, reason = "the answer is made once and sent")]
fn reader(cluster: &Cluster, request: &Request) -> Result<Caller, Response> {
    let mut headers = request.headers().clone();
    let mut named = None;
    if let Some((name, bearer)) = basic(&headers) {
        headers.insert(header::AUTHORIZATION, bearer);
        named = Some(format!("user/{name}"));
    }
    let by_link = cookie(&headers).and_then(|value| cluster.links.visitor(value));
    let named = named.filter(|_| by_link.is_none());
    let caller = match by_link {
        Some(caller) => auth::still_stands(cluster, &caller).map(|()| Some(caller)),
        None => auth::caller(cluster, &headers, request.extensions()),
    };
    let caller = match caller {
        // A name that is shown is the token's user's: nobody passes for somebody else in a log.
        Ok(Some(caller))
            if caller.host.is_none() && named.is_none_or(|named| named == caller.subject) =>
        {
            caller
        }
        Ok(_) | Err(_) => {
            let words =
                "a token, a client certificate or a link of `berth server page` is needed\n";
            let ask = [(header::WWW_AUTHENTICATE, "Basic realm=\"berth\"")];
            return Err((StatusCode::UNAUTHORIZED, ask, words).into_response());
        }
    };
    let reads = caller.deployment.is_empty()
        && caller.bindings.iter().any(|b| b.role() as i32 >= Role::Viewer as i32);
    if reads {
        Ok(caller)
    } else {
        Err((StatusCode::FORBIDDEN, "the role viewer is needed\n").into_response())
    }
}

async fn page(State(cluster): State<Arc<Cluster>>, request: Request) -> Response {
    let caller = match reader(&cluster, &request) {
        Ok(caller) => caller,
        Err(response) => return response,
    };
    let sees = |e: &Event| e.namespace.is_empty() || caller.sees(&e.namespace);
    let mut events = match cluster.past_events(0, EVENTS, sees).await {
        Ok(events) => events,
        Err(why) => {
            let words = format!("{}; load the page again\n", Chain(&why));
            return (StatusCode::SERVICE_UNAVAILABLE, words).into_response();
        }
    };
    events.reverse();
    Html(html::page(&cluster, &caller, &events)).into_response()
}

#[derive(serde::Deserialize)]
struct Login {
    code: String,
}

async fn login(State(cluster): State<Arc<Cluster>>, Query(login): Query<Login>) -> Response {
    let Some(value) = cluster.links.redeem(&login.code) else {
        let words = "this link was used or is over; `berth server page` makes a new one\n";
        return (StatusCode::UNAUTHORIZED, words).into_response();
    };
    let cookie = format!("{COOKIE}={value}; Path=/; Secure; HttpOnly; SameSite=Lax");
    ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::{call, host, served};
    use berth_proto::api::RoleBinding;
    use berth_proto::api::user_service_server::UserService as _;
    use tower::ServiceExt as _;

    async fn get(cluster: &Arc<Cluster>, path: &str, head: &[(&str, &str)]) -> (Response, String) {
        let mut request = http::Request::get(path);
        for (name, value) in head {
            request = request.header(*name, *value);
        }
        let request = request.body(axum::body::Body::empty()).unwrap();
        let (parts, body) =
            router(Arc::clone(cluster)).oneshot(request).await.unwrap().into_parts();
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        (Response::from_parts(parts, axum::body::Body::empty()), text)
    }

    async fn token(api: &crate::api::Api, deployment: &str) -> String {
        use berth_proto::api::{CreateUserRequest, CreateUserTokenRequest};
        let hour = berth_proto::ids::Wall(crate::cluster::wall_now().0 + 3_600_000);
        let name = format!("vera{deployment}");
        let user = CreateUserRequest {
            name: name.clone(),
            bindings: vec![RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() }],
            expire_time: Some(berth_proto::convert::timestamp(hour)),
            ..CreateUserRequest::default()
        };
        api.create_user(call(user)).await.unwrap();
        let deployment = deployment.to_owned();
        let token = CreateUserTokenRequest { name, deployment, ..Default::default() };
        api.create_user_token(call(token)).await.unwrap().into_inner().secret
    }

    #[tokio::test]
    async fn nobody_reads_without_credentials_and_a_gateways_token_does_not_suffice() {
        let (_dir, api) = served();
        for path in ["/", "/metrics"] {
            let (answer, _) = get(&api.0, path, &[]).await;
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
            let (answer, _) = get(&api.0, path, &[("cookie", "__Host-berth=guess")]).await;
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
            let limited = format!("Bearer {}", token(&api, &format!("d{}", path.len())).await);
            let (answer, _) = get(&api.0, path, &[("authorization", &limited)]).await;
            assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{path}");
        }
        assert_eq!(get(&api.0, "/healthz", &[]).await.0.status(), StatusCode::OK);
    }

    /// Every tag that is opened is closed, in order.
    fn well_formed(html: &str) {
        let mut open: Vec<&str> = Vec::new();
        for piece in html.split('<').skip(1) {
            let (tag, _) = piece.split_once('>').unwrap_or_else(|| panic!("not closed: {piece}"));
            let name = tag.split_whitespace().next().unwrap_or_default();
            assert_eq!(tag.matches('"').count() % 2, 0, "a quote too few: {tag}");
            match name.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "{html}"),
                None if name == "!doctype" || ["meta", "link"].contains(&name) => {}
                None => open.push(name),
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
    }

    #[tokio::test]
    async fn the_page_is_whole_loads_nothing_from_elsewhere_and_shows_text_as_text() {
        let (_dir, api) = served();
        host(&api, "edge-7", &[]).await;
        let evil = "</td><script src=\"https://evil.example/x.js\">'&\u{1b}[31m";
        let event = Event { reason: evil.into(), message: evil.into(), ..Event::default() };
        let change = berth_server_core::change::Change::AppendEvent(event);
        let proposal = berth_server_core::batching::Proposal {
            changes: vec![change],
            ..berth_server_core::batching::Proposal::default()
        };
        api.0.ledger.propose(proposal).await.unwrap();
        let bearer = format!("Bearer {}", token(&api, "").await);
        let (answer, text) = get(&api.0, "/", &[("authorization", &bearer)]).await;
        well_formed(&text);
        assert!(text.contains("&lt;script src=&quot;https://evil.example"), "{text}");
        assert!(!text.contains("<script") && !text.contains('\u{1b}'), "{text}");
        for attribute in ["src=\"", "href=\"http", "href=\"//", "style=\"", " on"] {
            let tags =
                text.split('<').filter_map(|piece| piece.split_once('>')).map(|(tag, _)| tag);
            let found: Vec<&str> = tags.filter(|tag| tag.contains(attribute)).collect();
            assert!(found.is_empty(), "{attribute}: {found:?}");
        }
        let policy = answer.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        for part in ["default-src 'none'", "style-src 'self'", "frame-ancestors 'none'"] {
            assert!(policy.contains(part), "{part} is not in {policy}");
        }
        assert_eq!(answer.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(answer.headers()[header::CACHE_CONTROL], "no-store");
        let (style, css) = get(&api.0, "/style.css", &[]).await;
        assert_eq!(style.headers()[header::CONTENT_TYPE], "text/css");
        assert!(!css.contains("url(") && !css.contains("@import"), "{css}");
        assert_eq!(css.matches('{').count(), css.matches('}').count());
    }

    #[tokio::test]
    async fn basic_credentials_are_a_user_and_a_token_of_that_user() {
        let (_dir, api) = served();
        let token = token(&api, "").await;
        for (name, status) in [("vera", StatusCode::OK), ("admin", StatusCode::UNAUTHORIZED)] {
            let basic = base64::engine::general_purpose::STANDARD.encode(format!("{name}:{token}"));
            let shown = format!("Basic {basic}");
            let (answer, _) = get(&api.0, "/metrics", &[("authorization", &shown)]).await;
            assert_eq!(answer.status(), status, "{name}");
        }
    }

    #[tokio::test]
    async fn a_token_reads_page_and_metrics_and_a_link_works_once() {
        let (_dir, api) = served();
        host(&api, "edge-7", &[]).await;
        let bearer = format!("Bearer {}", token(&api, "").await);
        let (answer, text) = get(&api.0, "/", &[("authorization", &bearer)]).await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert!(text.contains("edge-7") && !text.contains("<script"), "{text}");
        let policy = answer.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");

        let (_, text) = get(&api.0, "/metrics", &[("authorization", &bearer)]).await;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
            assert!(text.contains(&format!("# TYPE {name} ")), "{name} has no type");
        }
        assert!(text.contains("berth_hosts{presence=\"unknown\"} 1"), "{text}");

        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, bearer.parse().unwrap());
        let caller = auth::caller(&api.0, &headers, &http::Extensions::new()).unwrap().unwrap();
        let link = format!("/login?code={}", api.0.links.make(caller));
        let (answer, _) = get(&api.0, &link, &[]).await;
        assert_eq!(answer.status(), StatusCode::SEE_OTHER);
        let set = answer.headers()[header::SET_COOKIE].to_str().unwrap().to_owned();
        assert!(set.contains("HttpOnly") && set.contains("Secure"), "{set}");
        let cookie = set.split(';').next().unwrap();
        assert_eq!(get(&api.0, "/", &[("cookie", cookie)]).await.0.status(), StatusCode::OK);
        assert_eq!(get(&api.0, &link, &[]).await.0.status(), StatusCode::UNAUTHORIZED);
        let revoke =
            berth_proto::api::RevokeUserRequest { name: "vera".into(), ..Default::default() };
        api.revoke_user(call(revoke)).await.unwrap();
        let (answer, _) = get(&api.0, "/", &[("cookie", cookie)]).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "a revoked user's cookie is dead");
    }
}
