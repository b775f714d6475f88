//! Plain HTTP to servers that speak something of their own.
//!
//! `/deployments/<deployment>/<path>` reaches `/<path>` of a ready replica, with any method, query,
//! headers and body; the answer comes back as it is and as it comes. What a request does is not
//! known, so only what was not sent is sent to another replica; methods that HTTP calls safe are
//! repeated like inference. The caller's credentials are for the gateway and stay here.

use super::body::Payload;
use super::forward::{Onward, Repeat, Wire};
use super::http::{Gateway, HOP_BY_HOP, declared, error, forbidden};
use super::names::Naming;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use std::collections::BTreeMap;

/// Before a deployment's name.
const PREFIX: &str = "/deployments/";

/// One request.
pub async fn pass(
    State(gateway): State<Gateway>,
    Path(named): Path<BTreeMap<String, String>>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let model = named.get("model").cloned().unwrap_or_default();
    if let Err(why) = gateway.allows(&parts, Some(&model)).await {
        return forbidden(&why);
    }
    let budget = &gateway.forwarder.budget;
    let payload = match Payload::read(body, declared(&parts.headers), budget).await {
        Ok(payload) => payload,
        Err(why) => return error(why.status(), &why.to_string()),
    };
    match onward(parts, payload, model) {
        Some(onward) => gateway.forward(onward).await,
        None => error(StatusCode::BAD_REQUEST, "the request's path is not valid"),
    }
}

fn onward(parts: Parts, payload: Payload, model: String) -> Option<Onward> {
    let path = parts.uri.path_and_query()?.as_str().strip_prefix(PREFIX)?;
    // The name ends where its path or query begins.
    let rest = path.find(['/', '?']).map_or("", |at| &path[at..]);
    let uri = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    let safe = matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    Some(Onward {
        uri: uri.parse().ok()?,
        model,
        version: String::new(),
        wire: Wire::Http1,
        repeat: if safe { Repeat::Harmless } else { Repeat::Never },
        naming: Naming::Nowhere,
        method: parts.method,
        headers: headers(parts.headers),
        payload,
        patience: None,
    })
}

/// All headers but what belongs to the caller's connection and to the gateway.
fn headers(mut headers: HeaderMap) -> HeaderMap {
    let listed: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(|name| name.trim().to_ascii_lowercase()))
        .collect();
    for name in listed {
        headers.remove(name.as_str());
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(header::AUTHORIZATION);
    keep_visitor_to_ourselves(&mut headers);
    // The body has a length again when it is known.
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::HOST, HeaderValue::from_static("replica"));
    headers
}

/// Takes the page's cookie out: a browser sends it to every port of our name.
fn keep_visitor_to_ourselves(headers: &mut HeaderMap) {
    let all: Vec<HeaderValue> = headers.get_all(header::COOKIE).iter().cloned().collect();
    headers.remove(header::COOKIE);
    for value in all {
        let ours = |pair: &&[u8]| {
            let name = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
            name.trim_ascii() == crate::page::COOKIE.as_bytes()
        };
        let pairs = || value.as_bytes().split(|byte| *byte == b';');
        if !pairs().any(|pair| ours(&pair)) {
            headers.append(header::COOKIE, value);
            continue;
        }
        let others: Vec<&[u8]> =
            pairs().filter(|pair| !ours(pair)).map(<[u8]>::trim_ascii).collect();
        if let Ok(others) = HeaderValue::from_bytes(&others.join(&b"; "[..]))
            && !others.is_empty()
        {
            headers.append(header::COOKIE, others);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn sent(method: Method, path: &str, given: &[(&str, &str)]) -> Onward {
        let mut request = http::Request::builder().method(method).uri(path);
        for (name, value) in given {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        onward(parts, Payload::whole(Bytes::new(), None), "app".into()).unwrap()
    }

    #[test]
    fn the_path_behind_the_name_is_the_replicas_path() {
        for (given, path) in [
            ("/deployments/app", "/"),
            ("/deployments/app/", "/"),
            ("/deployments/app?x=1", "/?x=1"),
            ("/deployments/app/predict/a%20b?x=1&y=/2", "/predict/a%20b?x=1&y=/2"),
            ("/deployments/app//double", "//double"),
        ] {
            assert_eq!(sent(Method::GET, given, &[]).uri.to_string(), path, "{given}");
        }
    }

    #[test]
    fn headers_pass_but_for_credentials_and_the_connections_own() {
        let given = [
            ("authorization", "Bearer secret"),
            ("connection", "keep-alive, X-Only-Here"),
            ("x-only-here", "1"),
            ("transfer-encoding", "chunked"),
            ("x-mine", "2"),
            ("cookie", "a=b"),
        ];
        let onward = sent(Method::POST, "/deployments/app/x", &given);
        let names: Vec<&str> = onward.headers.keys().map(|name| name.as_str()).collect();
        let mut names = names;
        names.sort_unstable();
        assert_eq!(names, ["cookie", "host", "x-mine"]);
    }

    #[test]
    fn the_pages_cookie_does_not_reach_a_replica_and_all_others_do() {
        for (given, passed) in [
            ("a=b", Some("a=b")),
            ("__Host-berth=secret", None),
            ("a=b; __Host-berth=secret; c=d", Some("a=b; c=d")),
            ("a=b;__Host-berth =secret", Some("a=b")),
            ("__Host-berthed=x; a=\"b\"", Some("__Host-berthed=x; a=\"b\"")),
        ] {
            let onward = sent(Method::GET, "/deployments/app/", &[("cookie", given)]);
            let got = onward.headers.get(header::COOKIE).map(|value| value.to_str().unwrap());
            assert_eq!(got, passed, "{given}");
        }
    }

    #[test]
    fn only_safe_methods_may_be_sent_twice() {
        for (method, repeat) in [
            (Method::GET, Repeat::Harmless),
            (Method::HEAD, Repeat::Harmless),
            (Method::POST, Repeat::Never),
            (Method::PUT, Repeat::Never),
            (Method::DELETE, Repeat::Never),
        ] {
            assert_eq!(sent(method, "/deployments/app/", &[]).repeat, repeat);
        }
    }
}
