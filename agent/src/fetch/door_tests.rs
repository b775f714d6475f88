//! The door's guards, asked as the engine asks.

use super::super::testing::{FakeRegistry, RoomFor, noise};
use super::*;
use berth_agent_core::transfer::{CHUNK_BYTES, Failure, Held};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;

struct Asked {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

async fn ask(door: &Door, method: &str, path: &str, password: &str, range: Option<&str>) -> Asked {
    let stream = tokio::net::TcpStream::connect(door.0.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("berth:{password}"));
    let mut request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "door")
        .header(header::AUTHORIZATION, format!("Basic {pair}"));
    if let Some(range) = range {
        request = request.header(header::RANGE, range);
    }
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Asked { status: head.status, headers: head.headers, body }
}

#[tokio::test]
async fn only_the_engine_reads_and_only_what_is_pulled_for_the_set() {
    let registry = FakeRegistry::start().await;
    let layer = noise(300_000, 3);
    let (config, layer_digest) = (registry.put(b"{}"), registry.put(&layer));
    let secret = registry.put(b"another's");
    let manifest = Bytes::from(
        serde_json::json!({
            "config": {"digest": config.as_str(), "size": 2},
            "layers": [{"digest": layer_digest.as_str(), "size": layer.len()}],
        })
        .to_string(),
    );
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Arc::new(Transfers::new(registry.client.clone(), None));
    let door = Door::open(transfers, Arc::new(RoomFor(u64::MAX)), spool).await.unwrap();
    let password = door.password().to_owned();
    assert!(password.len() >= 40);
    assert!(password.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-'));

    let digest = Digest::of(&manifest);
    let path = format!("/v2/{MARK}/r/manifests/{digest}");
    let blob = format!("/v2/{MARK}/r/blobs/{layer_digest}");
    assert_eq!(ask(&door, "GET", &path, "guess", None).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(ask(&door, "GET", "/v2/", "guess", None).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(ask(&door, "GET", "/v2/", &password, None).await.status, StatusCode::OK);
    // Not being pulled, then not wanted: not there.
    assert_eq!(ask(&door, "GET", &path, &password, None).await.status, StatusCode::NOT_FOUND);
    let image = Image {
        repository: "r".to_owned(),
        blobs: blobs_of(&manifest).unwrap().into_iter().map(|b| (b.digest, b.size_bytes)).collect(),
        manifest: manifest.clone(),
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
    };
    let opened = door.begin(&digest, image);
    assert_eq!(ask(&door, "GET", &path, &password, None).await.status, StatusCode::NOT_FOUND);
    door.allow([digest.clone()].into());

    let got = ask(&door, "GET", &path, &password, None).await;
    assert_eq!((got.status, got.body), (StatusCode::OK, manifest));
    for method in ["PUT", "POST", "PATCH", "DELETE"] {
        let got = ask(&door, method, &blob, &password, None).await;
        assert_eq!(got.status, StatusCode::METHOD_NOT_ALLOWED, "{method}");
    }
    let tag = format!("/v2/{MARK}/r/manifests/latest");
    assert_eq!(ask(&door, "GET", &tag, &password, None).await.status, StatusCode::NOT_FOUND);
    let foreign = format!("/v2/{MARK}/r/blobs/{secret}");
    assert_eq!(ask(&door, "GET", &foreign, &password, None).await.status, StatusCode::NOT_FOUND);
    let elsewhere = format!("/v2/{MARK}/other/blobs/{layer_digest}");
    assert_eq!(ask(&door, "GET", &elsewhere, &password, None).await.status, StatusCode::NOT_FOUND);

    let head = ask(&door, "HEAD", &blob, &password, None).await;
    assert_eq!((head.status, registry.answers()), (StatusCode::OK, 0));
    assert_eq!(head.headers[header::CONTENT_LENGTH], "300000");
    // A connection that breaks behind us is not seen by the engine.
    registry.cut(&[100_000]);
    let got = ask(&door, "GET", &blob, &password, None).await;
    assert_eq!((got.status, got.body.as_ref()), (StatusCode::OK, layer.as_slice()));
    assert_eq!(registry.sent(), 300_000);
    let got = ask(&door, "GET", &blob, &password, Some("bytes=299990-")).await;
    assert_eq!(got.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(got.body.as_ref(), &layer[299_990..]);
    // Asked twice, brought once.
    assert_eq!(registry.sent(), 300_000);

    drop(opened);
    assert_eq!(ask(&door, "GET", &blob, &password, None).await.status, StatusCode::NOT_FOUND);
    door.drop_blobs(vec![layer_digest]).await;
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}

#[tokio::test]
async fn a_blob_that_nobody_wants_any_more_stops_coming_within_a_chunk() {
    let registry = FakeRegistry::start().await;
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    let bytes = noise(4 * chunk, 5);
    let blob = Blob { digest: registry.put(&bytes), size_bytes: bytes.len() as u64 };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Arc::new(Transfers::new(registry.client.clone(), None));
    let room = Arc::new(RoomFor(u64::MAX));
    let door = Door::open(transfers, room, spool.clone()).await.unwrap();
    let image = Image {
        repository: "r".to_owned(),
        blobs: [(blob.digest.clone(), blob.size_bytes)].into(),
        manifest: Bytes::new(),
        media_type: String::new(),
    };
    let opened = door.begin(&Digest::of(b"manifest"), image);
    // In the middle of the second chunk of an answer that holds all four.
    registry.hold(Some(chunk + 1));
    let mut flow = door.bring("r", blob.clone());
    flow.wait_for(|flow| flow.here_bytes > CHUNK_BYTES).await.unwrap();
    drop(opened);
    registry.hold(None);
    let ended = flow.wait_for(|flow| flow.ended.is_some()).await.unwrap().ended.clone();
    assert_eq!(ended, Some(Err(Failure::Unwanted.to_string())));
    assert_eq!(spool.look(&blob).unwrap(), Held::Chunks([0, 1].into()));
}

#[tokio::test]
async fn connections_that_say_nothing_are_closed_and_keep_the_engine_out_no_longer() {
    let registry = FakeRegistry::start().await;
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Arc::new(Transfers::new(registry.client.clone(), None));
    let door = Door::open(transfers, Arc::new(RoomFor(0)), spool).await.unwrap();
    let password = door.password().to_owned();
    // From here on time passes only while all wait for it.
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        silent.push(tokio::net::TcpStream::connect(door.0.address).await.unwrap());
    }
    assert_eq!(ask(&door, "GET", "/v2/", &password, None).await.status, StatusCode::OK);
    assert!(begun.elapsed() >= SILENT, "all places were taken: {:?}", begun.elapsed());
    for mut one in silent {
        assert_eq!(one.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
