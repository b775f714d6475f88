//! The door as clients meet it: each rule by the requests that would break it.

use super::access::{
    AccessError, Credentials, NothingProtected, PeerCertificates, Principal, Reach,
};
use super::*;
use async_trait::async_trait;
use axum::body::Body;
use http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};
use std::path::Path;
use tower::ServiceExt as _;

pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// `all` may everything, `reader` may pull, `scoped` is bound to `a`, `other` may only `b`, and a
/// digest may pull what is below it.
struct Tokens;

#[async_trait]
impl Access for Tokens {
    async fn authenticate(&self, shown: Credentials) -> Result<Principal, AccessError> {
        let token = match shown {
            Credentials::Basic { password, .. } => password,
            Credentials::Bearer(token) => token,
            Credentials::Certificate(chain) => {
                String::from_utf8_lossy(chain.0.first().map_or(&[][..], |leaf| leaf.as_ref()))
                    .into()
            }
        };
        match token.as_str() {
            "all" | "reader" | "other" => Ok(Principal { subject: token, only: None }),
            "scoped" => Ok(Principal { subject: token, only: RepoName::parse("a").ok() }),
            root if root.starts_with("sha256:") => Ok(Principal { subject: token, only: None }),
            "later" => Err(AccessError::Unavailable),
            _ => Err(AccessError::Refused),
        }
    }
    fn allows(&self, principal: &Principal, repository: &RepoName, action: Action) -> bool {
        match principal.subject.as_str() {
            "all" | "scoped" => true,
            "reader" => action == Action::Pull,
            root if root.starts_with("sha256:") => action == Action::Pull,
            _ => repository.as_str() == "b",
        }
    }
    fn reach(&self, principal: &Principal, _: &RepoName) -> Reach {
        principal.subject.parse().map_or(Reach::Whole, |root| Reach::Below(vec![root]))
    }
    async fn note(&self, noted: access::Noted<'_>) -> Result<(), AccessError> {
        // What cannot be written down is not done.
        if noted.repository.as_str() == "unnoted" { Err(AccessError::Unavailable) } else { Ok(()) }
    }
}

/// Repository `a`, tag `1.2` is a registered version.
struct Version;

impl Protected for Version {
    fn protects(&self, repository: &RepoName, reference: &Reference) -> Option<String> {
        let ours = repository.as_str() == "a" && reference.to_string() == "1.2";
        ours.then(|| "iris:1.2".to_owned())
    }
}

pub(super) struct Reply {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    pub(super) body: bytes::Bytes,
}

impl Reply {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
    pub(super) fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

pub(super) struct Client {
    router: axum::Router,
    pub(super) registry: Registry,
}

impl Client {
    pub(super) fn open(root: &Path, settings: Settings) -> Self {
        Self::with(root, settings, Arc::new(NothingProtected))
    }
    fn with(root: &Path, mut settings: Settings, protected: Arc<dyn Protected>) -> Self {
        if settings.min_free_percent == Settings::default().min_free_percent {
            // How full the machine's disk is, is no business of most tests.
            settings.min_free_percent = 0;
        }
        let registry = Registry::open(root, settings).unwrap();
        Self { router: router(registry.clone(), Arc::new(Tokens), protected), registry }
    }
    async fn raw(&self, request: Request<Body>) -> Reply {
        let (parts, body) = self.router.clone().oneshot(request).await.unwrap().into_parts();
        assert_eq!(parts.headers["docker-distribution-api-version"], "registry/2.0");
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Reply { status: parts.status, headers: parts.headers, body }
    }
    pub(super) async fn send(
        &self,
        call: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Reply {
        let (method, path) = call.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "authorization") {
            request = request.header("authorization", "Bearer all");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.raw(request.body(body.into()).unwrap()).await
    }
    async fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path}"), &[], "").await
    }
    pub(super) async fn blob(&self, repo: &str, content: &str) -> Digest {
        let digest = Digest::of(content.as_bytes());
        let call = format!("POST /v2/{repo}/blobs/uploads/?digest={digest}");
        let reply = self.send(&call, &[], content.to_owned()).await;
        assert_eq!(reply.status, StatusCode::CREATED);
        digest
    }
    pub(super) async fn put(&self, repo: &str, to: &str, media: &str, content: &Value) -> Reply {
        let call = format!("PUT /v2/{repo}/manifests/{to}");
        self.send(&call, &[("content-type", media)], content.to_string()).await
    }
    /// A small image of one config and one layer, pushed under `tag`.
    pub(super) async fn image(&self, repo: &str, tag: &str, content: &str) -> (Digest, Value) {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": IMAGE,
            "config": describe(&self.blob(repo, "{}").await, 2),
            "layers": [describe(&self.blob(repo, content).await, content.len())],
        });
        let digest = Digest::of(manifest.to_string().as_bytes());
        let to = if tag.is_empty() { digest.to_string() } else { tag.to_owned() };
        assert_eq!(self.put(repo, &to, IMAGE, &manifest).await.status, StatusCode::CREATED);
        (digest, manifest)
    }
    pub(super) async fn begin(&self, repo: &str) -> String {
        let reply = self.send(&format!("POST /v2/{repo}/blobs/uploads/"), &[], "").await;
        assert_eq!((reply.status, reply.header("range")), (StatusCode::ACCEPTED, "0-0"));
        reply.header("location").to_owned()
    }
}

pub(super) fn describe(digest: &Digest, size: usize) -> Value {
    json!({"mediaType": "application/octet-stream", "digest": digest, "size": size})
}

fn fresh() -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    (dir, client)
}

#[tokio::test]
async fn nobody_is_let_in_without_credentials() {
    let (_dir, client) = fresh();
    for path in ["/v2", "/v2/", "/v2/_catalog", "/v2/a/tags/list", "/v2/a/manifests/x"] {
        for header in [None, Some("Bearer nonsense"), Some("Basic YTpi"), Some("x")] {
            let mut request = Request::builder().uri(path);
            if let Some(header) = header {
                request = request.header("authorization", header);
            }
            let reply = client.raw(request.body(Body::empty()).unwrap()).await;
            assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{path} {header:?}");
            assert!(reply.header("www-authenticate").starts_with("Basic realm=\"berth\""));
            assert_eq!(reply.code(), "UNAUTHORIZED");
        }
    }
    assert_eq!(client.registry.stats().unauthorized.load(Ordering::Relaxed), 20);
}

#[tokio::test]
async fn a_token_as_bearer_or_password_and_a_certificate_let_in() {
    let (_dir, client) = fresh();
    for header in ["Bearer all", "Basic YW55Ym9keTphbGw="] {
        let reply = client.send("GET /v2/", &[("authorization", header)], "").await;
        assert_eq!(reply.status, StatusCode::OK);
    }
    let mut request = Request::builder().uri("/v2/").body(Body::empty()).unwrap();
    let leaf = rustls_pki_types::CertificateDer::from(b"reader".to_vec());
    request.extensions_mut().insert(PeerCertificates(Arc::from([leaf])));
    assert_eq!(client.raw(request).await.status, StatusCode::OK);
    let reply = client.send("GET /v2/", &[("authorization", "Bearer later")], "").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn rights_are_asked_for_each_repository_and_action() {
    let (_dir, client) = fresh();
    client.image("a", "x", "layer").await;
    client.image("b", "x", "layer").await;
    let as_ = |token: &'static str, call: &'static str| {
        let client = &client;
        async move { client.send(call, &[("authorization", token)], "").await }
    };
    assert_eq!(as_("Bearer reader", "GET /v2/a/manifests/x").await.status, StatusCode::OK);
    for (token, call) in [
        ("Bearer reader", "POST /v2/a/blobs/uploads/"),
        ("Bearer reader", "DELETE /v2/a/manifests/x"),
        ("Bearer other", "GET /v2/a/manifests/x"),
        ("Bearer scoped", "GET /v2/b/manifests/x"),
    ] {
        let reply = as_(token, call).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::FORBIDDEN, "DENIED"));
    }
    let seen = as_("Bearer other", "GET /v2/_catalog").await.json();
    assert_eq!(seen, json!({"repositories": ["b"]}));
}

#[tokio::test]
async fn who_reads_below_a_manifest_reads_nothing_else() {
    let (_dir, client) = fresh();
    let (child, manifest) = client.image("a", "x", "layer").await;
    let entry = describe(&child, manifest.to_string().len());
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    client.put("a", "multi", INDEX, &index).await;
    let index = Digest::of(index.to_string().as_bytes());
    let (other, _) = client.image("a", "y", "another").await;
    let layer = Digest::of(b"layer");
    let another = Digest::of(b"another");
    let unknown = Digest::of(b"nothing");
    for (root, path, status) in [
        (&index, format!("manifests/{index}"), 200),
        (&index, format!("manifests/{child}"), 200),
        (&index, format!("blobs/{layer}"), 200),
        (&child, format!("manifests/{child}"), 200),
        (&child, format!("blobs/{layer}"), 200),
        (&child, format!("manifests/{index}"), 403),
        (&index, format!("manifests/{other}"), 403),
        (&index, format!("blobs/{another}"), 403),
        (&index, format!("blobs/{unknown}"), 403),
        (&index, "manifests/multi".to_owned(), 403),
        (&index, "tags/list".to_owned(), 403),
        (&index, format!("referrers/{index}"), 403),
        (&unknown, format!("blobs/{layer}"), 403),
    ] {
        let bearer = format!("Bearer {root}");
        for method in ["GET", "HEAD"] {
            let call = format!("{method} /v2/a/{path}");
            let reply = client.send(&call, &[("authorization", &bearer)], "").await;
            assert_eq!(reply.status.as_u16(), status, "{root}: {call}");
        }
    }
}

#[tokio::test]
async fn a_blob_comes_back_as_it_was_sent_and_in_ranges() {
    let (_dir, client) = fresh();
    let content = "0123456789".repeat(200_000);
    let digest = client.blob("a", &content).await;
    let path = format!("/v2/a/blobs/{digest}");
    let reply = client.get(&path).await;
    assert_eq!(reply.body, content.as_bytes());
    assert_eq!(reply.header("docker-content-digest"), digest.as_str());
    let head = client.send(&format!("HEAD {path}"), &[], "").await;
    assert_eq!(head.header("content-length"), "2000000");
    assert!(head.body.is_empty());
    let part = client.send(&format!("GET {path}"), &[("range", "bytes=5-14")], "").await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.header("content-range"), "bytes 5-14/2000000");
    assert_eq!(part.body, "5678901234");
    let tail = client.send(&format!("GET {path}"), &[("range", "bytes=1999990-")], "").await;
    assert_eq!(tail.body, "0123456789");
    let past = client.send(&format!("GET {path}"), &[("range", "bytes=2000000-")], "").await;
    assert_eq!(past.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(past.header("content-range"), "bytes */2000000");
}

#[tokio::test]
async fn chunks_are_taken_in_order_only() {
    let (_dir, client) = fresh();
    let at = client.begin("a").await;
    let patch = format!("PATCH {at}");
    let first = client.send(&patch, &[("content-range", "0-4")], "01234").await;
    assert_eq!((first.status, first.header("range")), (StatusCode::ACCEPTED, "0-4"));
    for wrong in ["0-4", "6-10"] {
        let reply = client.send(&patch, &[("content-range", wrong)], "56789").await;
        assert_eq!(reply.status, StatusCode::RANGE_NOT_SATISFIABLE, "{wrong}");
        assert_eq!((reply.header("range"), reply.header("location")), ("0-4", at.as_str()));
    }
    client.send(&patch, &[("content-range", "5-9")], "56789").await;
    let status = client.get(&at).await;
    assert_eq!((status.status, status.header("range")), (StatusCode::NO_CONTENT, "0-9"));
    let digest = Digest::of(b"0123456789ab");
    let end = client.send(&format!("PUT {at}?digest={digest}"), &[], "ab").await;
    assert_eq!(end.status, StatusCode::CREATED);
    assert_eq!(client.get(end.header("location")).await.body, "0123456789ab");
    assert_eq!(client.get(&at).await.code(), "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn an_upload_goes_on_after_a_restart_and_a_broken_body() {
    let (dir, client) = fresh();
    let at = client.begin("a").await;
    let parts: Vec<Result<&str, std::io::Error>> =
        vec![Ok("first "), Ok("part "), Err(std::io::Error::other("gone"))];
    let body = Body::from_stream(futures_util::stream::iter(parts));
    let broken = client.send(&format!("PATCH {at}"), &[], body).await;
    assert_eq!(broken.code(), "BLOB_UPLOAD_INVALID");
    assert_eq!(client.get(&at).await.header("range"), "0-10");

    drop(client);
    let client = Client::open(dir.path(), Settings::default());
    let other = at.replace("/a/", "/b/");
    assert_eq!(client.get(&other).await.code(), "BLOB_UPLOAD_UNKNOWN");
    assert_eq!(client.get(&at).await.header("range"), "0-10");
    client.send(&format!("PATCH {at}"), &[("content-range", "11-14")], "rest").await;
    let digest = Digest::of(b"first part rest");
    let end = client.send(&format!("PUT {at}?digest={digest}"), &[], "").await;
    assert_eq!(end.status, StatusCode::CREATED);
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).await.body, "first part rest");
}

#[tokio::test]
async fn content_that_is_not_what_its_digest_says_is_never_shown() {
    let (_dir, client) = fresh();
    let lie = Digest::of(b"truth");
    let call = format!("POST /v2/a/blobs/uploads/?digest={lie}");
    assert_eq!(client.send(&call, &[], "lie").await.code(), "DIGEST_INVALID");
    let at = client.begin("a").await;
    let reply = client.send(&format!("PUT {at}?digest={lie}"), &[], "lie").await;
    assert_eq!(reply.code(), "DIGEST_INVALID");
    assert_eq!(client.get(&format!("/v2/a/blobs/{lie}")).await.status, StatusCode::NOT_FOUND);
    let usage = client.registry.usage().await.unwrap();
    assert_eq!((usage.blobs, usage.uploads), (0, 0));
    let sha512 = format!("sha512:{}", "0".repeat(128));
    for call in [
        format!("POST /v2/a/blobs/uploads/?digest={sha512}"),
        format!("GET /v2/a/blobs/{sha512}"),
        format!("GET /v2/a/manifests/{sha512}"),
    ] {
        let reply = client.send(&call, &[], "").await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::BAD_REQUEST, "UNSUPPORTED"));
    }
}

#[tokio::test]
async fn a_cancelled_upload_is_gone() {
    let (_dir, client) = fresh();
    let at = client.begin("a").await;
    let reply = client.send(&format!("DELETE {at}"), &[], "").await;
    assert_eq!(reply.status, StatusCode::NO_CONTENT);
    assert_eq!(client.send(&format!("PATCH {at}"), &[], "x").await.status, StatusCode::NOT_FOUND);
    assert_eq!(client.registry.usage().await.unwrap().uploads, 0);
}

#[tokio::test]
async fn a_blob_is_readable_only_where_it_was_pushed_or_mounted() {
    let (_dir, client) = fresh();
    let digest = client.blob("a", "content").await;
    let unknown = client.get(&format!("/v2/b/blobs/{digest}")).await;
    assert_eq!(unknown.code(), "BLOB_UNKNOWN");
    // `other` may not read `a`, and is told to upload as if the blob were not there.
    let call = format!("POST /v2/b/blobs/uploads/?mount={digest}&from=a");
    let reply = client.send(&call, &[("authorization", "Bearer other")], "").await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
    assert_eq!(client.get(&format!("/v2/b/blobs/{digest}")).await.code(), "BLOB_UNKNOWN");
    for from in ["", "&from=nowhere", "&from=../a"] {
        let call = format!("POST /v2/b/blobs/uploads/?mount={digest}{from}");
        assert_eq!(client.send(&call, &[], "").await.status, StatusCode::ACCEPTED, "{from}");
    }
    let reply = client.send(&call, &[], "").await;
    assert_eq!(reply.status, StatusCode::CREATED);
    assert_eq!(client.get(&format!("/v2/b/blobs/{digest}")).await.body, "content");
}

#[tokio::test]
async fn a_manifest_is_kept_verbatim_and_only_whole() {
    let (_dir, client) = fresh();
    let config = client.blob("a", "{}").await;
    let layer = Digest::of(b"layer");
    let text = format!(
        "{{ \"schemaVersion\" : 2,\n \"config\": {},\"layers\":[{}] }}\n",
        describe(&config, 2),
        describe(&layer, 5)
    );
    let put = |to: String, body: String| {
        let client = &client;
        async move {
            let call = format!("PUT /v2/a/manifests/{to}");
            client.send(&call, &[("content-type", IMAGE)], body).await
        }
    };
    let missing = put("x".into(), text.clone()).await;
    assert_eq!(missing.code(), "MANIFEST_BLOB_UNKNOWN");
    assert_eq!(missing.json()["errors"][0]["detail"], json!([{"digest": layer}]));
    client.blob("b", "layer").await;
    // In the store, but not in this repository.
    assert_eq!(put("x".into(), text.clone()).await.code(), "MANIFEST_BLOB_UNKNOWN");
    client.blob("a", "layer").await;
    let digest = Digest::of(text.as_bytes());
    let reply = put("x".into(), text.clone()).await;
    assert_eq!(reply.header("docker-content-digest"), digest.as_str());
    for reference in ["x", digest.as_str()] {
        let reply = client.get(&format!("/v2/a/manifests/{reference}")).await;
        assert_eq!((reply.header("content-type"), &reply.body[..]), (IMAGE, text.as_bytes()));
        let call = format!("HEAD /v2/a/manifests/{reference}");
        let head = client.send(&call, &[], "").await;
        assert_eq!(head.header("content-length"), text.len().to_string());
    }
    let lie = Digest::of(b"lie").to_string();
    assert_eq!(put(lie, text.clone()).await.code(), "DIGEST_INVALID");
    let size = text.replace("\"size\":5", "\"size\":6");
    assert_eq!(put("x".into(), size).await.code(), "MANIFEST_INVALID");
    assert_eq!(put(".x".into(), text).await.code(), "MANIFEST_INVALID");
    assert_eq!(put("x".into(), "{".into()).await.code(), "MANIFEST_INVALID");
    let long = put("x".into(), " ".repeat(manifests::MANIFEST_BYTES_MAX + 1)).await;
    assert_eq!(long.status, StatusCode::PAYLOAD_TOO_LARGE);
    let reply = client.put("a", "x", "text/html", &json!({})).await;
    assert_eq!(reply.code(), "MANIFEST_INVALID");
    assert_eq!(client.get("/v2/b/manifests/x").await.code(), "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn an_index_needs_its_manifests_and_keeps_them() {
    let (_dir, client) = fresh();
    let (child, manifest) = client.image("b", "x", "layer").await;
    let size = manifest.to_string().len();
    let index = json!({"schemaVersion": 2, "manifests": [describe(&child, size)]});
    let missing = client.put("a", "multi", INDEX, &index).await;
    assert_eq!(missing.code(), "MANIFEST_BLOB_UNKNOWN");
    client.image("a", "", "layer").await;
    assert_eq!(client.put("a", "multi", INDEX, &index).await.status, StatusCode::CREATED);
    let wrong = json!({"schemaVersion": 2, "manifests": [describe(&child, size + 1)]});
    assert_eq!(client.put("a", "multi", INDEX, &wrong).await.code(), "MANIFEST_INVALID");
    let reply = client.send(&format!("DELETE /v2/a/manifests/{child}"), &[], "").await;
    assert_eq!(reply.code(), "DENIED");
    assert!(String::from_utf8_lossy(&reply.body).contains("part of index"));
}

#[tokio::test]
async fn tags_and_repositories_come_sorted_and_in_pages() {
    let (_dir, client) = fresh();
    let (_, manifest) = client.image("a", "v0", "layer").await;
    for tag in ["v2", "v1", "B"] {
        client.put("a", tag, IMAGE, &manifest).await;
    }
    client.image("models/iris", "x", "layer").await;
    let all = client.get("/v2/a/tags/list").await.json();
    assert_eq!(all, json!({"name": "a", "tags": ["B", "v0", "v1", "v2"]}));
    let page = client.get("/v2/a/tags/list?n=3").await;
    let next = "</v2/a/tags/list?n=3&last=v1>; rel=\"next\"";
    assert_eq!(page.header("link"), next);
    let page = client.get("/v2/a/tags/list?n=3&last=v1").await;
    assert_eq!((page.json()["tags"].clone(), page.header("link")), (json!(["v2"]), ""));
    assert_eq!(client.get("/v2/nowhere/tags/list").await.code(), "NAME_UNKNOWN");
    assert_eq!(client.get("/v2/_catalog?n=x").await.status, StatusCode::BAD_REQUEST);
    let page = client.get("/v2/_catalog?n=1").await;
    assert_eq!(page.json(), json!({"repositories": ["a"]}));
    assert_eq!(page.header("link"), "</v2/_catalog?n=1&last=a>; rel=\"next\"");
    let page = client.get("/v2/_catalog?last=a").await;
    assert_eq!(page.json(), json!({"repositories": ["models/iris"]}));
}

#[tokio::test]
async fn referrers_are_found_by_subject_and_filtered() {
    let (_dir, client) = fresh();
    let (subject, _) = client.image("a", "x", "layer").await;
    let config = client.blob("a", "{}").await;
    let mut pushed = Vec::new();
    for kind in ["sbom", "sign+ature"] {
        let referrer = json!({
            "schemaVersion": 2, "config": describe(&config, 2), "layers": [],
            "artifactType": kind, "annotations": {"kind": kind},
            "subject": describe(&subject, 1),
        });
        let digest = Digest::of(referrer.to_string().as_bytes());
        let reply = client.put("a", digest.as_str(), IMAGE, &referrer).await;
        assert_eq!(reply.header("oci-subject"), subject.as_str());
        pushed.push(digest);
    }
    let path = format!("/v2/a/referrers/{subject}");
    let all = client.get(&path).await;
    assert_eq!(all.header("content-type"), INDEX);
    assert_eq!(all.json()["manifests"].as_array().unwrap().len(), 2);
    let one = client.get(&format!("{path}?artifactType=sign%2Bature")).await;
    assert_eq!(one.header("oci-filters-applied"), "artifactType");
    let listed = &one.json()["manifests"];
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["digest"], json!(pushed[1]));
    assert_eq!(listed[0]["annotations"], json!({"kind": "sign+ature"}));
    client.send(&format!("DELETE /v2/a/manifests/{}", pushed[0]), &[], "").await;
    assert_eq!(client.get(&path).await.json()["manifests"].as_array().unwrap().len(), 1);
    let none = client.get(&format!("/v2/a/referrers/{}", Digest::of(b"?"))).await;
    assert_eq!((none.status, none.json()["manifests"].clone()), (StatusCode::OK, json!([])));
}

#[tokio::test]
async fn deletion_takes_tags_and_manifests_but_no_blob_in_use() {
    let (_dir, client) = fresh();
    let (digest, manifest) = client.image("a", "x", "layer").await;
    client.put("a", "y", IMAGE, &manifest).await;
    let layer = Digest::of(b"layer");
    let delete = |path: String| {
        let client = &client;
        async move { client.send(&format!("DELETE {path}"), &[], "").await }
    };
    let used = delete(format!("/v2/a/blobs/{layer}")).await;
    assert_eq!(
        (used.status, used.code().as_str()),
        (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED")
    );
    assert_eq!(delete("/v2/a/manifests/y".into()).await.status, StatusCode::ACCEPTED);
    assert_eq!(delete("/v2/a/manifests/y".into()).await.code(), "MANIFEST_UNKNOWN");
    assert_eq!(client.get("/v2/a/manifests/x").await.status, StatusCode::OK);
    assert_eq!(delete(format!("/v2/a/manifests/{digest}")).await.status, StatusCode::ACCEPTED);
    assert_eq!(client.get("/v2/a/manifests/x").await.code(), "MANIFEST_UNKNOWN");
    assert_eq!(delete(format!("/v2/a/blobs/{layer}")).await.status, StatusCode::ACCEPTED);
    assert_eq!(client.get(&format!("/v2/a/blobs/{layer}")).await.code(), "BLOB_UNKNOWN");
}

#[tokio::test]
async fn a_registered_version_is_neither_overwritten_nor_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::with(dir.path(), Settings::default(), Arc::new(Version));
    let layer = client.blob("a", "other").await;
    let other = json!({
        "schemaVersion": 2, "config": describe(&client.blob("a", "{}").await, 2),
        "layers": [describe(&layer, 5)],
    });
    // The version itself was registered by the server.
    let (digest, manifest) = client.image("a", "", "layer").await;
    let repo = RepoName::parse("a").unwrap();
    let tag = Reference::parse("1.2").unwrap();
    let bytes = manifest.to_string().into();
    client.registry.put_manifest(&repo, &tag, IMAGE, bytes).await.unwrap();

    let again = client.put("a", "1.2", IMAGE, &manifest).await;
    assert_eq!(again.status, StatusCode::CREATED);
    let refused = client.put("a", "1.2", IMAGE, &other).await;
    assert_eq!((refused.status, refused.code().as_str()), (StatusCode::FORBIDDEN, "DENIED"));
    assert!(String::from_utf8_lossy(&refused.body).contains("iris:1.2"));
    for path in ["/v2/a/manifests/1.2".to_owned(), format!("/v2/a/manifests/{digest}")] {
        let refused = client.send(&format!("DELETE {path}"), &[], "").await;
        assert_eq!(refused.code(), "DENIED", "{path}");
        assert!(String::from_utf8_lossy(&refused.body).contains("iris:1.2"));
    }
    let kept = client.get("/v2/a/manifests/1.2").await;
    assert_eq!(kept.header("docker-content-digest"), digest.as_str());
    assert_eq!(client.put("a", "1.3", IMAGE, &other).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn a_nearly_full_disk_takes_no_uploads_and_no_manifests_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let digest = fresh_blob(dir.path()).await;
    let manifest = |artifact: &str| {
        json!({
            "schemaVersion": 2, "mediaType": IMAGE, "artifactType": artifact, "layers": [],
            "config": describe(&digest, 4),
        })
    };
    let before = Client::open(dir.path(), Settings::default());
    assert_eq!(before.put("a", "1", IMAGE, &manifest("x/old")).await.status, StatusCode::CREATED);
    let client =
        Client::open(dir.path(), Settings { min_free_percent: 101, ..Settings::default() });
    let refused = client.send("POST /v2/a/blobs/uploads/", &[], "").await;
    assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE);
    assert_eq!(refused.code(), "DENIED");
    assert!(String::from_utf8_lossy(&refused.body).contains("berth registry gc"));
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).await.body, "kept");
    let refused = client.put("a", "2", IMAGE, &manifest("x/new")).await;
    assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE);
    assert_eq!(client.registry.stats().uploads_refused.load(Ordering::Relaxed), 2);
    // One that is here takes no room under another name.
    assert_eq!(client.put("a", "2", IMAGE, &manifest("x/old")).await.status, StatusCode::CREATED);
}

async fn fresh_blob(root: &Path) -> Digest {
    Client::open(root, Settings::default()).blob("a", "kept").await
}

#[tokio::test]
async fn uploads_are_bounded_in_number() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings { uploads_max: 1, ..Settings::default() });
    let at = client.begin("a").await;
    let refused = client.send("POST /v2/a/blobs/uploads/", &[], "").await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("retry-after"), "2");
    client.send(&format!("DELETE {at}"), &[], "").await;
    client.begin("a").await;
}

#[tokio::test]
async fn what_cannot_be_written_down_is_neither_put_nor_removed() {
    let (_dir, client) = fresh();
    let (repo, tag) = (RepoName::parse("unnoted").unwrap(), Reference::parse("1").unwrap());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE, "layers": [],
        "config": describe(&client.blob("unnoted", "{}").await, 2),
    });
    let put = client.put("unnoted", "1", IMAGE, &manifest).await;
    assert_eq!(put.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(client.registry.manifest(&repo, &tag).await.is_err());
    let bytes = manifest.to_string().into_bytes().into();
    client.registry.put_manifest(&repo, &tag, IMAGE, bytes).await.unwrap();
    let gone = client.send("DELETE /v2/unnoted/manifests/1", &[], "").await;
    assert_eq!(gone.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(client.registry.manifest(&repo, &tag).await.is_ok());
}

/// Tag `1.2` and its digest become a registered version once they were asked about so many times.
struct Soon(std::sync::atomic::AtomicUsize);

impl Protected for Soon {
    fn protects(&self, _: &RepoName, reference: &Reference) -> Option<String> {
        let asked = self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let named = matches!(reference, Reference::Tag(tag) if tag.as_str() == "1.2");
        (asked > 0 && (named || matches!(reference, Reference::Digest(_))))
            .then(|| format!("iris:1.2 as {reference}"))
    }
}

#[tokio::test]
async fn a_version_that_is_registered_while_its_manifest_is_put_or_deleted_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (digest, manifest) = {
        let client = Client::open(dir.path(), Settings::default());
        client.image("a", "1.2", "layer").await
    };
    let mut other = manifest.clone();
    other["annotations"] = json!({"x": "y"});
    for call in ["PUT", "DELETE tag", "DELETE digest"] {
        let client = Client::with(dir.path(), Settings::default(), Arc::new(Soon(0.into())));
        let reply = match call {
            "PUT" => client.put("a", "1.2", IMAGE, &other).await,
            "DELETE tag" => client.send("DELETE /v2/a/manifests/1.2", &[], "").await,
            _ => client.send(&format!("DELETE /v2/a/manifests/{digest}"), &[], "").await,
        };
        assert_eq!(reply.status, StatusCode::FORBIDDEN, "{call}");
        let tag = names::Tag::parse("1.2").unwrap();
        let repo = RepoName::parse("a").unwrap();
        let held = client.registry.resolve_tag(&repo, &tag).await.unwrap();
        assert_eq!(held, Some(digest.clone()), "{call}");
    }
}

#[tokio::test]
async fn one_user_cannot_take_all_uploads_and_a_whole_push_that_is_dropped_leaves_none() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { uploads_max: 4, uploads_of_one: 2, ..Settings::default() };
    let client = Client::open(dir.path(), settings);
    let begin = async |user: &str| {
        let shown = format!("Bearer {user}");
        client.send("POST /v2/b/blobs/uploads/", &[("authorization", &shown)], "").await.status
    };
    for status in [StatusCode::ACCEPTED, StatusCode::ACCEPTED, StatusCode::TOO_MANY_REQUESTS] {
        assert_eq!(begin("all").await, status);
    }
    // One that stalls in the middle and goes away, for as long as anybody likes.
    let digest = Digest::of(b"never whole");
    for _ in 0..5 {
        let stuck = Body::from_stream(tokio_stream::pending::<Result<bytes::Bytes, io::Error>>());
        let request = Request::post(format!("/v2/b/blobs/uploads/?digest={digest}"))
            .header("authorization", "Bearer other")
            .body(stuck)
            .unwrap();
        let push = client.router.clone().oneshot(request);
        assert!(tokio::time::timeout(Duration::from_millis(20), push).await.is_err());
        // Its place is given back.
        let free = async {
            while client.registry.0.uploads.lock().len() > 2 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), free).await.unwrap();
    }
    assert_eq!(begin("other").await, StatusCode::ACCEPTED);
}
