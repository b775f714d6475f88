//! A registry for tests: real TLS, blobs in memory, connections that break when told.

use super::client::Client;
use super::transfer::Room;
use async_trait::async_trait;
use berth_proto::agent::AssignmentBody;
use berth_proto::api;
use berth_proto::ids::Digest;
use berth_proto::tls::{self, Trusted};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::watch;

/// Sent at once.
const PIECE: usize = 64 * 1024;

#[derive(Default)]
struct State {
    blobs: BTreeMap<String, Arc<Vec<u8>>>,
    /// Each of the next answers is cut after so many bytes of its body.
    cuts: Vec<usize>,
    sent: u64,
    answers: u64,
}

/// The registry. Clones are the same one.
#[derive(Clone)]
pub(super) struct FakeRegistry {
    state: Arc<Mutex<State>>,
    /// Every blob stops after so many bytes of an answer.
    hold: Arc<watch::Sender<Option<usize>>>,
    /// Answers that are stopped, by their digests.
    held: Arc<watch::Sender<Vec<String>>>,
    pub(super) client: Client,
}

impl FakeRegistry {
    pub(super) async fn start() -> Self {
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let root = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::from_ca_cert_pem(&root, ca_key).unwrap();
        let mut leaf = CertificateParams::new(Vec::new()).unwrap();
        leaf.subject_alt_names = vec![SanType::URI("spiffe://c/server".try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                tls::private_key(&key.serialize_pem()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let trusted = Trusted::Roots { pem: root, cluster: "c".parse().unwrap() };
        let tls = tls::client_config(trusted, None, &[], None).unwrap();
        let client = Client::new(address, tls);
        let this =
            Self { state: Arc::default(), hold: Arc::default(), held: Arc::default(), client };
        let registry = this.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (registry, acceptor) = (registry.clone(), acceptor.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(tcp).await {
                        registry.serve(stream).await.ok();
                    }
                });
            }
        });
        this
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.state.lock().blobs.insert(digest.to_string(), Arc::new(bytes.to_vec()));
        digest
    }

    /// The next answers break off after so many bytes.
    pub(super) fn cut(&self, after: &[usize]) {
        self.state.lock().cuts = after.iter().rev().copied().collect();
    }

    /// Answers with blobs stop after so many bytes; `None`: they go on.
    pub(super) fn hold(&self, after: Option<usize>) {
        self.hold.send_replace(after);
    }

    /// The digests of the answers that are stopped, as soon as there are so many.
    pub(super) async fn held(&self, count: usize) -> Vec<String> {
        let mut held = self.held.subscribe();
        held.wait_for(|held| held.len() >= count).await.unwrap().clone()
    }

    /// Waits while an answer is to stop here.
    async fn stop(&self, name: &str, sent: usize) {
        let mut hold = self.hold.subscribe();
        let goes_on = |hold: &Option<usize>| hold.is_none_or(|after| sent < after);
        if goes_on(&hold.borrow()) {
            return;
        }
        self.held.send_modify(|held| held.push(name.to_owned()));
        let _ = hold.wait_for(goes_on).await;
        self.held.send_modify(|held| held.retain(|one| one != name));
    }

    /// Bytes of bodies sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.state.lock().sent
    }

    /// Requests answered so far.
    pub(super) fn answers(&self) -> u64 {
        self.state.lock().answers
    }

    async fn serve(
        &self,
        stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    ) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut path, mut range) = (String::new(), None);
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).await? == 0 {
                    return Ok(());
                }
                if let Some(rest) = line.strip_prefix("GET ") {
                    path = rest.split(' ').next().unwrap_or_default().to_owned();
                } else if let Some(rest) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                    let (from, to) = rest.trim().split_once('-').unwrap();
                    range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap()));
                } else if line.trim().is_empty() {
                    break;
                }
            }
            let name = path.rsplit('/').next().unwrap_or_default();
            let (blob, cut) = {
                let mut state = self.state.lock();
                state.answers += 1;
                (state.blobs.get(name).cloned(), state.cuts.pop())
            };
            let Some(blob) = blob else {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await?;
                continue;
            };
            let (from, end) = range.map_or((0, blob.len()), |(a, b)| (a, (b + 1).min(blob.len())));
            let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
                 content-range: bytes {from}-{}/{}\r\n\r\n",
                end - from,
                end.saturating_sub(1),
                blob.len()
            );
            stream.write_all(head.as_bytes()).await?;
            let stop = cut.map_or(end, |cut| (from + cut).min(end));
            for (i, piece) in blob[from..stop].chunks(PIECE).enumerate() {
                if path.contains("/blobs/") {
                    stream.flush().await?;
                    self.stop(name, i * PIECE).await;
                }
                stream.write_all(piece).await?;
                self.state.lock().sent += piece.len() as u64;
            }
            stream.flush().await?;
            if stop < end {
                return stream.shutdown().await;
            }
        }
    }
}

/// A disk that has room for so many bytes.
pub(super) struct RoomFor(pub(super) u64);

#[async_trait]
impl Room for RoomFor {
    async fn room(&self, bytes: u64) -> Result<(), (u64, u64)> {
        if bytes <= self.0 { Ok(()) } else { Err((bytes, self.0)) }
    }
}

/// Bytes that do not repeat soon.
pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut draw = seed;
    let mut next = || {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        (draw >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// What a replica is made from, with an image of one manifest.
pub(crate) fn body(manifest: &Digest) -> AssignmentBody {
    AssignmentBody {
        deployment_uid: "d".into(),
        deployment: "d".into(),
        namespace: "default".into(),
        release: 1,
        source: Some(api::ResolvedSource {
            image: Some(api::ResolvedImage {
                digest: manifest.to_string(),
                platforms: vec![api::PlatformImage {
                    arch: "amd64".into(),
                    os: "linux".into(),
                    manifest_digest: manifest.to_string(),
                    config_digest: Digest::of(b"config").to_string(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        spec: Some(api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".into())),
            ..Default::default()
        }),
        ..Default::default()
    }
}
