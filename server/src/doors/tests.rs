//! Who gets through a door.

use super::*;
use crate::identity::ca::Ca;
use berth_proto::tls::{ALPN_H2, Credentials, Trusted};

/// How long a handshake on this machine may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

fn ca() -> (tempfile::TempDir, Ca) {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::open(dir.path()).unwrap();
    (dir, ca)
}

fn credentials(ca: &Ca, days: i64) -> Credentials {
    let (certificate_pem, key_pem) = ca.user(&"vera".parse().unwrap(), days).unwrap();
    Credentials { certificate_pem, key_pem }
}

/// Whether a client with these credentials gets through, and with how many certificates.
async fn enters(ca: &Ca, shown: Option<Credentials>) -> Result<usize, String> {
    let internal = certificates::Internal::new(ca, vec!["127.0.0.1".to_owned()]).unwrap();
    let certificates = Certificates { internal: Arc::new(internal), operators: None };
    let config = DoorTls::new(certificates, ca.root_pem(), &[ALPN_H2], Speaks::Ours).unwrap();
    let listener = bind("--listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (_stop, stop) = watch::channel(false);
    let mut entered = accept("control", listener, Arc::new(config), stop);
    let trusted = Trusted::Roots { pem: ca.root_pem().to_owned(), cluster: ca.cluster().clone() };
    let client = tls::client_config(trusted, shown.as_ref(), &[ALPN_H2], None).unwrap();
    let knocking = async {
        let mut stream =
            tls::connect(&address, client, PATIENCE).await.map_err(|e| e.to_string())?;
        // In TLS 1.3 the client learns of a refusal with the first thing it reads.
        stream.write_all(b"x").await.map_err(|e| e.to_string())?;
        stream.read_u8().await.map_err(|e| e.to_string())
    };
    let opening = tokio::spawn(async move {
        let Some(mut one) = entered.recv().await else { return 0 };
        let shown = one.stream.get_ref().1.peer_certificates().map_or(0, <[_]>::len);
        one.stream.write_u8(7).await.unwrap();
        one.stream.flush().await.unwrap();
        shown
    });
    let knocked = tokio::time::timeout(PATIENCE, knocking).await.expect("neither in nor out");
    match knocked {
        Ok(_) => Ok(opening.await.unwrap()),
        Err(words) => {
            opening.abort();
            Err(words)
        }
    }
}

#[tokio::test]
async fn only_good_certificates_of_this_cluster_get_through_and_none_at_all_is_asked_later() {
    let (_dir, ours) = ca();
    let (_other_dir, theirs) = ca();
    assert_eq!(enters(&ours, Some(credentials(&ours, 1))).await, Ok(1));
    assert_eq!(enters(&ours, None).await, Ok(0), "joining and health need none");
    let expired = enters(&ours, Some(credentials(&ours, -1))).await.unwrap_err();
    assert!(expired.to_lowercase().contains("expired"), "{expired}");
    let foreign = enters(&ours, Some(credentials(&theirs, 1))).await.unwrap_err();
    assert!(foreign.to_lowercase().contains("ca") || foreign.contains("alert"), "{foreign}");
}

#[tokio::test]
async fn who_is_turned_away_hears_why_also_when_it_goes_on_sending() {
    let (_dir, ours) = ca();
    let (_other_dir, theirs) = ca();
    let internal = certificates::Internal::new(&ours, vec!["127.0.0.1".to_owned()]).unwrap();
    let certificates = Certificates { internal: Arc::new(internal), operators: None };
    let config = DoorTls::new(certificates, ours.root_pem(), &[ALPN_H2], Speaks::Ours).unwrap();
    let listener = bind("--listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (_stop, stop) = watch::channel(false);
    let _entered = accept("control", listener, Arc::new(config), stop);
    let pem = ours.root_pem().to_owned();
    let trusted = Trusted::Roots { pem, cluster: ours.cluster().clone() };
    let foreign = credentials(&theirs, 1);
    let client = tls::client_config(trusted, Some(&foreign), &[ALPN_H2], None).unwrap();
    let sent = async {
        let mut stream = tls::connect(&address, client, PATIENCE).await.unwrap();
        let readable = tokio::io::Interest::READABLE;
        while !stream.get_ref().0.ready(readable).await.unwrap().is_read_closed() {
            tokio::task::yield_now().await;
        }
        // A closed connection answers the first with a reset and takes no second.
        for _ in 0..3 {
            stream.write_all(b"x").await.unwrap();
            stream.flush().await.unwrap();
        }
        stream.read_u8().await.unwrap_err().to_string()
    };
    let words = tokio::time::timeout(PATIENCE, sent).await.expect("it ends");
    assert!(words.contains("UnknownCA"), "{words}");
}

/// Whether a client that speaks nothing newer than TLS 1.2 gets through.
async fn enters_with_1_2(ca: &Ca, speaks: Speaks) -> bool {
    let internal = certificates::Internal::new(ca, vec!["127.0.0.1".to_owned()]).unwrap();
    let certificates = Certificates { internal: Arc::new(internal), operators: None };
    let config = DoorTls::new(certificates, ca.root_pem(), &[ALPN_H2], speaks).unwrap();
    let listener = bind("--listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_stop, stop) = watch::channel(false);
    let _entered = accept("control", listener, Arc::new(config), stop);
    let client = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(tls::roots(ca.root_pem()).unwrap())
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::from(address.ip());
    let shaking = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, tcp);
    tokio::time::timeout(PATIENCE, shaking).await.expect("neither in nor out").is_ok()
}

#[tokio::test]
async fn our_own_door_speaks_the_newest_tls_only_and_the_others_the_one_before_as_well() {
    let (_dir, ca) = ca();
    assert!(!enters_with_1_2(&ca, Speaks::Ours).await);
    assert!(enters_with_1_2(&ca, Speaks::Anybody).await);
}

/// What a client that trusts `trusted` says to a server that shows this chain and key.
async fn takes(trusted: Trusted, (chain_pem, key_pem): (String, String)) -> Result<(), String> {
    let server = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            tls::certificates(&chain_pem).unwrap(),
            tls::private_key(&key_pem).unwrap(),
        )
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let _ = tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(tcp).await;
    });
    let client = tls::client_config(trusted, None, &[], None).unwrap();
    tls::connect(&address, client, PATIENCE).await.map(|_| ()).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", cause.unwrap_or_default())
    })
}

#[tokio::test]
async fn a_server_is_known_by_its_root_and_its_uri_and_by_no_name() {
    let (_dir, ours) = ca();
    let (_other_dir, theirs) = ca();
    let roots =
        || Trusted::Roots { pem: ours.root_pem().to_owned(), cluster: ours.cluster().clone() };
    let pin = || Trusted::Pin(tls::pin(ours.root_pem()).unwrap());
    // It has no name at all, let alone that of the address.
    takes(roots(), ours.server(&[]).unwrap()).await.unwrap();
    takes(pin(), ours.server(&[]).unwrap()).await.unwrap();
    // A host or a user of the same cluster is no server.
    let (key, csr) = tls::key_and_request().unwrap();
    let host = ours.sign(&csr, tls::Subject::Host("h".parse().unwrap()), 1).unwrap();
    let with_root = format!("{host}{}", ours.root_pem());
    let user = ours.user(&"vera".parse().unwrap(), 1).unwrap();
    for shown in [(host, key.clone()), (with_root.clone(), key.clone()), user] {
        let words = takes(roots(), shown).await.unwrap_err();
        assert!(words.contains("is not a server"), "{words}");
    }
    let words = takes(pin(), (with_root, key)).await.unwrap_err();
    assert!(words.contains("is not a server"), "{words}");
    // A server of another root is none, and one of our root for another cluster is not ours.
    let words = takes(roots(), theirs.server(&[]).unwrap()).await.unwrap_err();
    assert!(!words.contains("is not a server"), "{words}");
    let words = takes(pin(), theirs.server(&[]).unwrap()).await.unwrap_err();
    assert!(words.contains("not the one the token names"), "{words}");
    let elsewhere =
        Trusted::Roots { pem: ours.root_pem().to_owned(), cluster: theirs.cluster().clone() };
    let words = takes(elsewhere, ours.server(&[]).unwrap()).await.unwrap_err();
    assert!(words.contains("another cluster"), "{words}");
    // A server that shows our root behind its own certificate of another one has not our root.
    let (theirs_pem, theirs_key) = theirs.server(&[]).unwrap();
    let mixed = format!("{theirs_pem}{}", ours.root_pem());
    takes(pin(), (mixed, theirs_key)).await.unwrap_err();
}

#[test]
fn addresses_of_one_household_share_their_handshakes() {
    let crowd = Arc::new(Crowd::default());
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let one = |n: usize| address(&format!("2001:db8:0:7::{n:x}"));
    let held: Vec<Guest> = (0..HANDSHAKES_OF_ONE).filter_map(|n| crowd.enter(one(n))).collect();
    assert_eq!(held.len(), HANDSHAKES_OF_ONE);
    assert!(crowd.enter(one(9999)).is_none(), "another address of the same network is another");
    assert!(crowd.enter(address("2001:db8:0:8::1")).is_some());
    assert!(crowd.enter(address("192.0.2.1")).is_some());
    drop(held);
    assert!(crowd.0.lock().is_empty(), "a place was not given back");
    // The same, however it is written.
    let held: Vec<Guest> =
        (0..HANDSHAKES_OF_ONE).filter_map(|_| crowd.enter(address("192.0.2.1"))).collect();
    assert!(crowd.enter(address("::ffff:192.0.2.1")).is_none());
    assert!(crowd.enter(address("192.0.2.2")).is_some());
    drop(held);
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending_and_its_stream_is_not_reset() {
    use http_body_util::StreamBody;
    let (_dir, ca) = ca();
    let internal = certificates::Internal::new(&ca, vec!["127.0.0.1".to_owned()]).unwrap();
    let certificates = Certificates { internal: Arc::new(internal), operators: None };
    let config = DoorTls::new(certificates, ca.root_pem(), &[ALPN_H2], Speaks::Ours).unwrap();
    let listener = bind("--listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (_stop, stop) = watch::channel(false);
    let entered = accept("gateway", listener, Arc::new(config), stop.clone());
    let refuses = Router::new().fallback(async || (http::StatusCode::UNAUTHORIZED, "no token"));
    tokio::spawn(serve_http("gateway", entered, refuses, stop));

    let trusted = Trusted::Roots { pem: ca.root_pem().to_owned(), cluster: ca.cluster().clone() };
    let client = tls::client_config(trusted, None, &[ALPN_H2], None).unwrap();
    let stream = tls::connect(&address, client, PATIENCE).await.unwrap();
    let io = TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);

    let piece = || {
        let bytes = bytes::Bytes::from_static(&[7; 32 * 1024]);
        Ok::<_, std::convert::Infallible>(http_body::Frame::data(bytes))
    };
    let (pieces, rx) = mpsc::channel(1);
    let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(rx));
    let request = http::Request::post("https://berth/v2/models/x/infer").body(body).unwrap();
    let told = async {
        let asked = tokio::spawn(sender.send_request(request));
        pieces.send(piece()).await.unwrap();
        let answer = asked.await.unwrap().unwrap();
        assert_eq!(answer.status(), http::StatusCode::UNAUTHORIZED);
        let words = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
        assert_eq!(words.to_bytes(), "no token");
        // Three round trips of the connection: whatever was sent behind the answer is here.
        for _ in 0..3 {
            let empty =
                StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(mpsc::channel(1).1));
            let request = http::Request::get("https://berth/").body(empty).unwrap();
            sender.send_request(request).await.unwrap();
        }
        for _ in 0..20 {
            pieces.send(piece()).await.expect("the stream was reset");
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("it ends");
}
