//! Every endpoint of the OCI distribution specification (v1.1, "Endpoints") with the statuses and
//! codes that it names: one row for each way a request may end.

use super::door_tests::{Client, IMAGE, describe};
use super::*;
use serde_json::json;

/// A request and how it must end. In paths and expected headers `{layer}`, `{image}`, `{other}` (a
/// digest of nothing here) and `{upload}` (a new upload's location) stand for what the test made.
struct Row {
    /// The specification's number of the endpoint.
    end: &'static str,
    call: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    status: u16,
    /// The error's code; empty: it is no error.
    code: &'static str,
    /// Headers the answer must have; an empty value: any.
    shows: &'static [(&'static str, &'static str)],
}

const fn row(end: &'static str, call: &'static str, status: u16, code: &'static str) -> Row {
    Row { end, call, headers: &[], body: "", status, code, shows: &[] }
}

const JSON: &str = "application/json";
const DIGEST: &str = "docker-content-digest";
/// The digest of the empty blob.
const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
/// The digest of `hello`.
const HELLO: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

const ROWS: &[Row] = &[
    row("1", "GET /v2/", 200, ""),
    row("2", "GET /v2/a/blobs/{other}", 404, "BLOB_UNKNOWN"),
    row("2", "GET /v2/nowhere/blobs/{layer}", 404, "BLOB_UNKNOWN"),
    row("2", "GET /v2/a/blobs/sha256:short", 400, "DIGEST_INVALID"),
    Row {
        shows: &[(DIGEST, "{layer}"), ("content-length", "5")],
        ..row("2", "GET /v2/a/blobs/{layer}", 200, "")
    },
    Row {
        shows: &[(DIGEST, "{layer}"), ("content-length", "5")],
        ..row("2", "HEAD /v2/a/blobs/{layer}", 200, "")
    },
    Row {
        headers: &[("range", "bytes=1-2")],
        shows: &[("content-range", "bytes 1-2/5"), ("content-length", "2")],
        ..row("2", "GET /v2/a/blobs/{layer}", 206, "")
    },
    Row {
        headers: &[("range", "bytes=9-")],
        ..row("2", "GET /v2/a/blobs/{layer}", 416, "SIZE_INVALID")
    },
    row("2", "HEAD /v2/a/blobs/{other}", 404, ""),
    Row {
        shows: &[(DIGEST, "{image}"), ("content-type", IMAGE)],
        ..row("3", "GET /v2/a/manifests/x", 200, "")
    },
    Row {
        shows: &[(DIGEST, "{image}"), ("content-type", IMAGE)],
        ..row("3", "GET /v2/a/manifests/{image}", 200, "")
    },
    Row {
        shows: &[(DIGEST, "{image}"), ("content-length", "")],
        ..row("3", "HEAD /v2/a/manifests/x", 200, "")
    },
    row("3", "GET /v2/a/manifests/none", 404, "MANIFEST_UNKNOWN"),
    row("3", "GET /v2/a/manifests/.INVALID_MANIFEST_NAME", 404, "MANIFEST_UNKNOWN"),
    row("3", "GET /v2/a/manifests/{other}", 404, "MANIFEST_UNKNOWN"),
    // A blob is no manifest.
    row("3", "GET /v2/a/manifests/{layer}", 404, "MANIFEST_UNKNOWN"),
    row("3", "HEAD /v2/a/manifests/none", 404, ""),
    row("3", "GET /v2/A!/manifests/x", 400, "NAME_INVALID"),
    Row {
        shows: &[("location", ""), ("range", "0-0")],
        ..row("4a", "POST /v2/a/blobs/uploads/", 202, "")
    },
    row("4a", "POST /v2/A!/blobs/uploads/", 400, "NAME_INVALID"),
    Row {
        body: "hello",
        shows: &[
            (
                "location",
                "/v2/a/blobs/sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
            ),
            (DIGEST, HELLO),
        ],
        ..row("4b", "POST /v2/a/blobs/uploads/?digest={hello}", 201, "")
    },
    row("4b", "POST /v2/a/blobs/uploads/?digest={empty}", 201, ""),
    Row {
        body: "hullo",
        ..row("4b", "POST /v2/a/blobs/uploads/?digest={hello}", 400, "DIGEST_INVALID")
    },
    row("4b", "POST /v2/a/blobs/uploads/?digest=nonsense", 400, "DIGEST_INVALID"),
    Row {
        body: "he",
        shows: &[("range", "0-1"), ("location", "")],
        ..row("5", "PATCH {upload}", 202, "")
    },
    Row { headers: &[("content-range", "0-1")], body: "he", ..row("5", "PATCH {upload}", 202, "") },
    Row {
        headers: &[("content-range", "3-4")],
        body: "lo",
        shows: &[("range", ""), ("location", "")],
        ..row("5", "PATCH {upload}", 416, "BLOB_UPLOAD_INVALID")
    },
    Row {
        headers: &[("content-range", "x")],
        body: "he",
        ..row("5", "PATCH {upload}", 400, "BLOB_UPLOAD_INVALID")
    },
    Row { body: "he", ..row("5", "PATCH /v2/a/blobs/uploads/0", 404, "BLOB_UPLOAD_UNKNOWN") },
    Row {
        body: "hello",
        shows: &[("location", ""), (DIGEST, HELLO)],
        ..row("6", "PUT {upload}?digest={hello}", 201, "")
    },
    Row {
        headers: &[("content-range", "0-4")],
        body: "hello",
        ..row("6", "PUT {upload}?digest={hello}", 201, "")
    },
    Row {
        headers: &[("content-range", "1-5")],
        body: "hello",
        ..row("6", "PUT {upload}?digest={hello}", 416, "BLOB_UPLOAD_INVALID")
    },
    Row { body: "hullo", ..row("6", "PUT {upload}?digest={hello}", 400, "DIGEST_INVALID") },
    Row { body: "hello", ..row("6", "PUT {upload}", 400, "DIGEST_INVALID") },
    Row {
        body: "hello",
        ..row("6", "PUT /v2/a/blobs/uploads/0?digest={hello}", 404, "BLOB_UPLOAD_UNKNOWN")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "{manifest}",
        shows: &[("location", "/v2/a/manifests/{image}"), (DIGEST, "{image}")],
        ..row("7", "PUT /v2/a/manifests/y", 201, "")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "{manifest}",
        ..row("7", "PUT /v2/a/manifests/{image}", 201, "")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "{manifest}",
        ..row("7", "PUT /v2/a/manifests/{other}", 400, "DIGEST_INVALID")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "{manifest}",
        ..row("7", "PUT /v2/b/manifests/y", 400, "MANIFEST_BLOB_UNKNOWN")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "[]",
        ..row("7", "PUT /v2/a/manifests/y", 400, "MANIFEST_INVALID")
    },
    Row {
        headers: &[("content-type", "text/plain")],
        body: "{manifest}",
        ..row("7", "PUT /v2/a/manifests/y", 400, "MANIFEST_INVALID")
    },
    Row {
        headers: &[("content-type", IMAGE)],
        body: "{manifest}",
        ..row("7", "PUT /v2/A!/manifests/y", 400, "NAME_INVALID")
    },
    Row { shows: &[("content-type", JSON)], ..row("8a", "GET /v2/a/tags/list", 200, "") },
    row("8a", "GET /v2/nowhere/tags/list", 404, "NAME_UNKNOWN"),
    row("8b", "GET /v2/a/tags/list?n=0", 200, ""),
    Row { shows: &[("link", "")], ..row("8b", "GET /v2/a/tags/list?n=1", 200, "") },
    row("8b", "GET /v2/a/tags/list?n=1&last=zzz", 200, ""),
    row("8b", "GET /v2/a/tags/list?n=many", 400, "UNSUPPORTED"),
    Row {
        shows: &[("location", "/v2/b/blobs/{layer}")],
        ..row("11", "POST /v2/b/blobs/uploads/?mount={layer}&from=a", 201, "")
    },
    Row {
        shows: &[("location", "")],
        ..row("11", "POST /v2/b/blobs/uploads/?mount={other}&from=a", 202, "")
    },
    Row {
        shows: &[("location", "")],
        ..row("11", "POST /v2/b/blobs/uploads/?mount={layer}", 202, "")
    },
    Row {
        shows: &[("content-type", "application/vnd.oci.image.index.v1+json")],
        ..row("12a", "GET /v2/a/referrers/{image}", 200, "")
    },
    row("12a", "GET /v2/a/referrers/{other}", 200, ""),
    row("12a", "GET /v2/a/referrers/nonsense", 400, "DIGEST_INVALID"),
    Row {
        shows: &[("oci-filters-applied", "artifactType")],
        ..row("12b", "GET /v2/a/referrers/{image}?artifactType=a%2Fb", 200, "")
    },
    Row { shows: &[("range", "0-0"), ("location", "")], ..row("13", "GET {upload}", 204, "") },
    row("13", "GET /v2/a/blobs/uploads/0", 404, "BLOB_UPLOAD_UNKNOWN"),
    row("14", "DELETE {upload}", 204, ""),
    row("14", "DELETE /v2/a/blobs/uploads/0", 404, "BLOB_UPLOAD_UNKNOWN"),
    // What is no endpoint.
    row("-", "POST /v2/", 405, "UNSUPPORTED"),
    row("-", "PATCH /v2/a/manifests/x", 405, "UNSUPPORTED"),
    row("-", "PUT /v2/a/blobs/{layer}", 405, "UNSUPPORTED"),
    row("-", "DELETE /v2/a/tags/list", 405, "UNSUPPORTED"),
    row("-", "GET /v2/a/nothing", 404, "UNSUPPORTED"),
    // Deletions last: by tag, by digest, then what is gone.
    row("9", "DELETE /v2/a/manifests/none", 404, "MANIFEST_UNKNOWN"),
    row("9", "DELETE /v2/a/manifests/{other}", 404, "MANIFEST_UNKNOWN"),
    row("10", "DELETE /v2/a/blobs/{layer}", 405, "UNSUPPORTED"),
    row("9", "DELETE /v2/a/manifests/y", 202, ""),
    row("9", "DELETE /v2/a/manifests/{image}", 202, ""),
    row("3", "GET /v2/a/manifests/x", 404, "MANIFEST_UNKNOWN"),
    row("9", "DELETE /v2/a/manifests/{image}", 404, "MANIFEST_UNKNOWN"),
    row("10", "DELETE /v2/a/blobs/{layer}", 202, ""),
    row("10", "DELETE /v2/a/blobs/{layer}", 404, "BLOB_UNKNOWN"),
    row("2", "GET /v2/a/blobs/{layer}", 404, "BLOB_UNKNOWN"),
];

#[tokio::test]
async fn each_endpoint_ends_as_the_specification_says() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let (image, manifest) = client.image("a", "x", "layer").await;
    let layer = Digest::of(b"layer").to_string();
    let other = Digest::of(b"nothing here").to_string();
    for row in ROWS {
        let upload =
            if row.call.contains("{upload}") { client.begin("a").await } else { String::new() };
        let filled = |text: &str| {
            text.replace("{layer}", &layer)
                .replace("{image}", image.as_str())
                .replace("{other}", &other)
                .replace("{upload}", &upload)
                .replace("{hello}", HELLO)
                .replace("{empty}", EMPTY)
                .replace("{manifest}", &manifest.to_string())
        };
        let call = filled(row.call);
        let about = format!("end-{}: {call} {:?}", row.end, row.headers);
        let reply = client.send(&call, row.headers, filled(row.body)).await;
        assert_eq!(reply.status.as_u16(), row.status, "{about}");
        if row.code.is_empty() {
            assert!(reply.status.is_success() || reply.body.is_empty(), "{about}");
        } else {
            assert_eq!(reply.code(), row.code, "{about}");
            assert_eq!(reply.header("content-type"), JSON, "{about}");
            let error = &reply.json()["errors"][0];
            assert!(error["message"].as_str().is_some_and(|words| !words.is_empty()), "{about}");
        }
        for (name, value) in row.shows {
            let got = reply.header(name);
            assert!(!got.is_empty(), "{about} shows no {name}");
            assert!(value.is_empty() || got == filled(value), "{about} shows {name}: {got}");
        }
        if call.starts_with("HEAD ") {
            assert!(reply.body.is_empty(), "{about}");
        }
    }
}

#[tokio::test]
async fn a_manifest_may_name_a_subject_that_is_not_there_yet() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::open(dir.path(), Settings::default());
    let later = Digest::of(b"later");
    let config = client.blob("a", "{}").await;
    let referrer = json!({
        "schemaVersion": 2, "mediaType": IMAGE, "artifactType": "a/b",
        "config": describe(&config, 2), "layers": [describe(&config, 2)],
        "subject": describe(&later, 5),
    });
    let reply = client.put("a", "about", IMAGE, &referrer).await;
    assert_eq!((reply.status.as_u16(), reply.header("oci-subject")), (201, later.as_str()));
    let listed = client.send(&format!("GET /v2/a/referrers/{later}"), &[], "").await.json();
    assert_eq!(listed["manifests"][0]["artifactType"], "a/b");
}
