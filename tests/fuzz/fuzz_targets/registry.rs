//! The registry's door takes any request, answers with no status of its own failure, and goes on.
#![no_main]

use async_trait::async_trait;
use axum::body::Body;
use berth_server::registry::access::{
    Access, AccessError, Action, Credentials, Noted, NothingProtected, Principal, Reach,
};
use berth_server::registry::names::RepoName;
use berth_server::registry::{self, Registry, Settings};
use http::{Method, Request, StatusCode};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, LazyLock};
use tower::ServiceExt as _;

struct Everybody;

#[async_trait]
impl Access for Everybody {
    async fn authenticate(&self, _: Credentials) -> Result<Principal, AccessError> {
        Ok(Principal { subject: "user/fuzz".into(), only: None })
    }
    fn allows(&self, _: &Principal, _: &RepoName, _: Action) -> bool {
        true
    }
    fn reach(&self, _: &Principal, _: &RepoName) -> Reach {
        Reach::Whole
    }
    async fn note(&self, _: Noted<'_>) -> Result<(), AccessError> {
        Ok(())
    }
}

struct Door {
    runtime: tokio::runtime::Runtime,
    router: axum::Router,
    _folder: tempfile::TempDir,
}

static DOOR: LazyLock<Door> = LazyLock::new(|| {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let settings = Settings { min_free_percent: 0, ..Settings::default() };
    let registry = Registry::open(folder.path().join("registry"), settings).unwrap();
    let router = registry::router(registry, Arc::new(Everybody), Arc::new(NothingProtected));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    Door { runtime, router, _folder: folder }
});

const METHODS: [Method; 7] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::PATCH,
    Method::DELETE,
    Method::OPTIONS,
];

/// Lines of one request: path and query, then headers, then, behind an empty line, the body.
fn request(bytes: &[u8]) -> Option<Request<Body>> {
    let (method, rest) = bytes.split_first()?;
    let end = rest.windows(2).position(|two| two == b"\n\n").unwrap_or(rest.len());
    let (head, body) = rest.split_at(end);
    let mut lines = std::str::from_utf8(head).ok()?.split('\n');
    let mut request = Request::builder()
        .method(METHODS[usize::from(*method) % METHODS.len()].clone())
        .uri(format!("/v2/{}", lines.next()?))
        .header("authorization", "Bearer t");
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        request = request.header(name.trim(), value.trim());
    }
    request.body(Body::from(body.get(2..).unwrap_or_default().to_vec())).ok()
}

fuzz_target!(|bytes: &[u8]| {
    let Some(request) = request(bytes) else { return };
    let door = &*DOOR;
    let shown = format!("{request:?}");
    let status = door.runtime.block_on(async {
        let response = door.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let _ = axum::body::to_bytes(response.into_body(), 16 << 20).await;
        status
    });
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{shown}");
});
