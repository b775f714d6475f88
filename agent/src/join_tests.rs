use super::*;
use crate::session::tls_config;
use berth_proto::agent::join_service_server::{JoinService, JoinServiceServer};
use berth_proto::agent::{BeginRenewalResponse, JoinResponse, Removed, Trust};
use berth_proto::values::HostPolicy;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair,
    SanType,
};
use tonic::{Request, Response, Status};

/// A server that renews whatever it is asked for, for a long time, and loses its first answer to a
/// join.
#[derive(Clone)]
struct Renews(Arc<Issuer<'static, KeyPair>>, Arc<Mutex<Vec<JoinRequest>>>);

#[tonic::async_trait]
impl JoinService for Renews {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let mut asked = self.1.lock();
        asked.push(request.into_inner());
        match asked.len() {
            1 => Err(Status::unavailable("the answer was lost")),
            _ => Ok(Response::new(JoinResponse { cluster: "c".into(), ..Default::default() })),
        }
    }

    async fn begin_renewal(
        &self,
        _: Request<BeginRenewalRequest>,
    ) -> Result<Response<BeginRenewalResponse>, Status> {
        Ok(Response::new(BeginRenewalResponse { challenge: b"c".to_vec(), expire_time: None }))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        if request.get_ref().host_uid == "removed" {
            let removed = Some(Removed { wipe: true });
            return Ok(Response::new(RenewResponse { removed, ..Default::default() }));
        }
        let mut csr =
            CertificateSigningRequestParams::from_pem(&request.get_ref().csr_pem).unwrap();
        lives(&mut csr.params, 2100);
        let certificate_pem = csr.signed_by(&*self.0).unwrap().pem();
        Ok(Response::new(RenewResponse { certificate_pem, ..Default::default() }))
    }
}

/// From 2020 until a year.
fn lives(params: &mut CertificateParams, until: i32) {
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(until, 1, 1);
}

/// Serves on a port of this machine; answers with its address and the root it is trusted by.
async fn serve() -> (String, String, Renews) {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let root = ca.self_signed(&ca_key).unwrap();
    let (root, root_der) = (root.pem(), root.der().clone());
    let issuer = Arc::new(Issuer::new(ca, ca_key));
    let mut leaf = CertificateParams::new(Vec::new()).unwrap();
    leaf.subject_alt_names = vec![SanType::URI("spiffe://c/server".try_into().unwrap())];
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &*issuer).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone(), root_der],
            tls::private_key(&key.serialize_pem()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let renews = Renews(Arc::clone(&issuer), Arc::default());
    let service = JoinServiceServer::new(renews.clone());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, service) = (acceptor.clone(), service.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(tcp).await else { return };
                let service = hyper_util::service::TowerToHyperService::new(service);
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (address, root, renews)
}

#[tokio::test]
async fn a_certificate_is_renewed_while_a_session_stands() {
    let (address, root, Renews(issuer, _)) = serve().await;
    let closed = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut old = CertificateParams::new(Vec::new()).unwrap();
    // Half of its life is over, whatever the clock of this machine says.
    lives(&mut old, 2021);
    let identity = AgentIdentityFile {
        cluster: "c".into(),
        host_uid: "h".into(),
        certificate_pem: old.signed_by(&key, &*issuer).unwrap().pem(),
        key_pem: key.serialize_pem(),
        trust: Some(Trust {
            version: 1,
            roots_pem: root,
            endpoints: vec![address.clone()],
            ..Trust::default()
        }),
        ..Default::default()
    };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, HostPolicy::default()).unwrap());
    let config = tls_config(&identity, Arc::clone(&shared.clock), &[b"http/1.1"]).unwrap();
    let client = Client::new(address.clone(), config);
    let told = Notify::new();
    let waiting = renewed(&shared, &client, &address, Duration::from_millis(1), &told);
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("a renewal");
    let next = shared.identity.lock().clone();
    assert_ne!(next.certificate_pem, identity.certificate_pem);
    assert_eq!(tls::public_key_of(&next.key_pem).unwrap(), {
        let first = tls::certificates(&next.certificate_pem).unwrap().remove(0);
        tls::public_key(&first).unwrap()
    });
    assert_eq!(Store::peek(folder.path()).identity().unwrap(), next);
    assert!(!renew_if_due(&shared, &client, &address).await.unwrap(), "it is new");
    // With nobody there it fails, and nothing has changed.
    shared
        .change_identity(|held| held.certificate_pem.clone_from(&identity.certificate_pem))
        .unwrap();
    assert!(renew_if_due(&shared, &client, &closed).await.is_err());
}

#[tokio::test]
async fn a_young_certificate_is_renewed_once_a_newer_root_than_its_own_is_told() {
    let (address, newest, _) = serve().await;
    let mut first = CertificateParams::new(Vec::new()).unwrap();
    first.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let first_key = KeyPair::generate().unwrap();
    let first_root = first.self_signed(&first_key).unwrap().pem();
    let issuer = Issuer::new(first, first_key);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut young = CertificateParams::new(Vec::new()).unwrap();
    lives(&mut young, 2150);
    let identity = AgentIdentityFile {
        cluster: "c".into(),
        host_uid: "h".into(),
        certificate_pem: young.signed_by(&key, &issuer).unwrap().pem(),
        key_pem: key.serialize_pem(),
        trust: Some(Trust { version: 1, roots_pem: first_root.clone(), ..Trust::default() }),
        ..Default::default()
    };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, HostPolicy::default()).unwrap());
    let config = tls_config(&identity, Arc::clone(&shared.clock), &[b"http/1.1"]).unwrap();
    let client = Client::new(address.clone(), config);
    assert!(!renew_if_due(&shared, &client, &address).await.unwrap(), "its root is the newest");
    let told = Notify::new();
    // It would look by itself in a year.
    let look = Duration::from_secs(365 * 86_400);
    let waiting = renewed(&shared, &client, &address, look, &told);
    let telling = async {
        let both =
            Trust { version: 2, roots_pem: format!("{first_root}{newest}"), ..Trust::default() };
        shared.change_identity(|held| session::take_over(held, both)).unwrap();
        told.notify_one();
    };
    let both = async { tokio::join!(waiting, telling) };
    tokio::time::timeout(Duration::from_secs(60), both).await.expect("a renewal");
    let next = Store::peek(folder.path()).identity().unwrap();
    assert!(tls::is_signed_by_newest(&next.certificate_pem, &newest).unwrap());
    assert!(!renew_if_due(&shared, &client, &address).await.unwrap(), "once");
}

#[tokio::test]
async fn a_removed_host_whose_certificate_has_ended_learns_it_when_it_would_renew() {
    let (address, root, Renews(issuer, _)) = serve().await;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut old = CertificateParams::new(Vec::new()).unwrap();
    lives(&mut old, 2021);
    let identity = AgentIdentityFile {
        cluster: "c".into(),
        host_uid: "removed".into(),
        certificate_pem: old.signed_by(&key, &*issuer).unwrap().pem(),
        key_pem: key.serialize_pem(),
        trust: Some(Trust {
            roots_pem: root,
            endpoints: vec![address.clone()],
            ..Trust::default()
        }),
        ..Default::default()
    };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, HostPolicy::default()).unwrap());
    let config = tls_config(&identity, Arc::clone(&shared.clock), &[b"http/1.1"]).unwrap();
    let client = Client::new(address.clone(), config);
    assert!(renew_if_due(&shared, &client, &address).await.unwrap());
    let held = Store::peek(folder.path()).identity().unwrap();
    assert!(held.removed && held.wipe, "it is durable");
    assert_eq!(held.certificate_pem, identity.certificate_pem);
}

#[tokio::test]
async fn a_join_whose_answer_was_lost_is_asked_for_again_in_the_same_words() {
    let (address, root, Renews(_, asked)) = serve().await;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let token = format!("berth-join.id.secret.{}", tls::pin(&root).unwrap());
    let join = |token: &str, name: &str| {
        let (store, address, token, name) = (&store, &address, token.to_owned(), name.to_owned());
        async move { join(store, address, &token, &name, HostFacts::default()).await }
    };
    assert!(matches!(join(&token, "one").await, Err(JoinError::Refused(_))));
    let held = join(&token, "one").await.unwrap();
    let asked = asked.lock().clone();
    assert_eq!(asked[0], asked[1]);
    assert!(!asked[0].request_id.is_empty());
    // The key is that of the request that was answered.
    let csr = CertificateSigningRequestParams::from_pem(&asked[0].csr_pem).unwrap();
    let key = KeyPair::from_pem(&held.key_pem).unwrap();
    assert_eq!(
        rcgen::PublicKeyData::der_bytes(&csr.public_key),
        rcgen::PublicKeyData::der_bytes(&key)
    );
    assert!(store.joining().unwrap().is_none(), "it is over");
}

#[test]
fn another_token_or_name_is_another_join() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let first = joining(&store, "t", "one").unwrap();
    assert_eq!(joining(&store, "t", "one").unwrap(), first);
    let other = joining(&store, "u", "one").unwrap();
    assert_ne!(other.request_id, first.request_id);
    assert_ne!(joining(&store, "u", "two").unwrap().key_pem, other.key_pem);
}
