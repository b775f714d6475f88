//! What both ends of a connection must agree on: identities and how they are checked.
//!
//! A server is accepted by a pinned root and the URI `spiffe://<cluster>/server`, never by a host
//! name, so that it can move. TLS is 1.3 only, without tickets, so that every reconnect is verified
//! anew. Nothing here listens or decides what an identity may do.

use crate::ids::{ClusterUid, HostUid, Name};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::Digest as _;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// ALPN of the control and API door.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of a reverse connection.
pub const ALPN_REVERSE: &[u8] = b"berth-reverse/1";

/// Why a connection or an identity is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// PEM that holds no certificate or key.
    #[error("the {what} is not PEM of the right kind")]
    Pem {
        /// What was read.
        what: &'static str,
    },
    /// A certificate without our URI.
    #[error("the certificate names no identity of ours")]
    NoIdentity,
    /// rustls says no.
    #[error("TLS cannot be set up")]
    Rustls(#[from] rustls::Error),
    /// Keys or requests cannot be made.
    #[error("a key or certificate cannot be made")]
    Make(#[from] rcgen::Error),
    /// Nobody listens there, or it cannot be reached.
    #[error("cannot connect to {endpoint}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("{0} did not answer in time")]
    TimedOut(String),
}

/// Who a certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A server of the cluster.
    Server,
    /// An agent.
    Host(HostUid),
    /// A person or service.
    User(Name),
}

/// `spiffe://<cluster>/server`, `/host/<uid>` or `/user/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiffeId {
    /// The cluster.
    pub cluster: ClusterUid,
    /// Who in it.
    pub subject: Subject,
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/", self.cluster)?;
        match &self.subject {
            Subject::Server => f.write_str("server"),
            Subject::Host(uid) => write!(f, "host/{uid}"),
            Subject::User(name) => write!(f, "user/{name}"),
        }
    }
}

impl FromStr for SpiffeId {
    type Err = TlsError;
    fn from_str(text: &str) -> Result<Self, TlsError> {
        let no = || TlsError::NoIdentity;
        let rest = text.strip_prefix("spiffe://").ok_or_else(no)?;
        let (cluster, path) = rest.split_once('/').ok_or_else(no)?;
        let cluster = cluster.parse().map_err(|_| no())?;
        let subject = match path.split_once('/') {
            None if path == "server" => Subject::Server,
            Some(("host", uid)) => Subject::Host(uid.parse().map_err(|_| no())?),
            Some(("user", name)) => Subject::User(name.parse().map_err(|_| no())?),
            Some(_) | None => return Err(no()),
        };
        Ok(Self { cluster, subject })
    }
}

impl SpiffeId {
    /// Reads the one URI of ours in a certificate.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(certificate).map_err(|_| TlsError::NoIdentity)?;
        let names = parsed.subject_alternative_name().map_err(|_| TlsError::NoIdentity)?;
        let names = names.ok_or(TlsError::NoIdentity)?;
        let mut uris = names.value.general_names.iter().filter_map(uri);
        match (uris.next(), uris.next()) {
            (Some(uri), None) => uri.parse(),
            _ => Err(TlsError::NoIdentity),
        }
    }
}

/// The URI of a general name, if it is one.
#[must_use]
pub fn uri<'a>(name: &x509_parser::extensions::GeneralName<'a>) -> Option<&'a str> {
    if let x509_parser::extensions::GeneralName::URI(uri) = name { Some(uri) } else { None }
}

/// The SubjectPublicKeyInfo of a certificate, in DER.
///
/// # Errors
/// When it is no certificate.
pub fn public_key(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, TlsError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| TlsError::NoIdentity)?;
    Ok(parsed.public_key().raw.to_vec())
}

/// The times between which a certificate is good, in seconds since 1970.
///
/// # Errors
/// When it is no certificate.
pub fn validity(pem: &str) -> Result<(i64, i64), TlsError> {
    let first =
        certificates(pem)?.into_iter().next().ok_or(TlsError::Pem { what: "certificate" })?;
    validity_of(&first)
}

/// From when until when a certificate is good, in seconds since 1970.
///
/// # Errors
/// When it is no certificate.
pub fn validity_of(certificate: &CertificateDer<'_>) -> Result<(i64, i64), TlsError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| TlsError::NoIdentity)?;
    let validity = parsed.validity();
    Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// `sha256` of a root's public key, in hex: what a join token pins.
///
/// # Errors
/// When the PEM holds no certificate.
pub fn pin(root_pem: &str) -> Result<String, TlsError> {
    let first = certificates(root_pem)?.into_iter().next().ok_or(TlsError::Pem { what: "root" })?;
    Ok(hex::encode(sha2::Sha256::digest(public_key(&first)?)))
}

/// The same of each root in PEM, in their order.
///
/// # Errors
/// When the PEM holds no certificate.
pub fn pins(roots_pem: &str) -> Result<Vec<String>, TlsError> {
    let of = |root: &CertificateDer<'_>| Ok(hex::encode(sha2::Sha256::digest(public_key(root)?)));
    certificates(roots_pem)?.iter().map(of).collect()
}

/// All certificates in PEM.
///
/// # Errors
/// When there is none.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) | Err(_) => Err(TlsError::Pem { what: "certificate" }),
    }
}

/// A private key in PEM.
///
/// # Errors
/// When it is none.
pub fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| TlsError::Pem { what: "key" })
}

/// Whether a client's certificate is signed by one of these roots, whatever the time is.
fn signed_by(leaf: &CertificateDer<'_>, roots: RootCertStore) -> bool {
    let Ok((from, _)) = validity_of(leaf) else { return false };
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let Ok(verifier) = verifier.build() else { return false };
    let from = Duration::from_secs(u64::try_from(from).unwrap_or_default());
    verifier.verify_client_cert(leaf, &[], UnixTime::since_unix_epoch(from)).is_ok()
}

/// Whether a client's certificate is signed by one of these roots (PEM), whatever the time is.
#[must_use]
pub fn is_signed_by(leaf: &CertificateDer<'_>, roots_pem: &str) -> bool {
    roots(roots_pem).is_ok_and(|roots| signed_by(leaf, roots))
}

/// Whether a client's certificate (PEM) is signed by the newest root of a bundle, which is its last.
///
/// # Errors
/// When PEM holds none.
pub fn is_signed_by_newest(certificate_pem: &str, roots_pem: &str) -> Result<bool, TlsError> {
    let leaf = certificates(certificate_pem)?.swap_remove(0);
    let mut newest = RootCertStore::empty();
    if let Some(root) = certificates(roots_pem)?.pop() {
        newest.add(root)?;
    }
    Ok(signed_by(&leaf, newest))
}

/// A store of roots.
///
/// # Errors
/// When the PEM holds none.
pub fn roots(pem: &str) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(pem)? {
        store.add(certificate)?;
    }
    Ok(store)
}

/// The one provider: ring.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// How a server is recognised.
#[derive(Debug, Clone)]
pub enum Trusted {
    /// By these roots (PEM) and the cluster's URI.
    Roots {
        /// Roots.
        pem: String,
        /// The cluster.
        cluster: ClusterUid,
    },
    /// By the hash of its root's key, before anything else is known: for joining.
    Pin(String),
}

/// A client's own certificate and key, PEM.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Chain.
    pub certificate_pem: String,
    /// Key.
    pub key_pem: String,
}

#[derive(Debug)]
struct ServerCheck {
    trusted: Trusted,
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let wrong = |text: &str| rustls::Error::General(text.to_owned());
        let leaf = ParsedCertificate::try_from(end_entity)?;
        let verify = |roots: &RootCertStore| {
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &leaf,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )
        };
        let id = SpiffeId::of(end_entity).map_err(|e| wrong(&e.to_string()))?;
        if id.subject != Subject::Server {
            return Err(wrong("the other end is not a server"));
        }
        match &self.trusted {
            Trusted::Roots { cluster, .. } => {
                verify(&self.roots)?;
                if id.cluster != *cluster {
                    return Err(wrong("the server belongs to another cluster"));
                }
            }
            Trusted::Pin(pin) => {
                let pinned = intermediates.iter().find(|certificate| {
                    public_key(certificate)
                        .is_ok_and(|key| hex::encode(sha2::Sha256::digest(key)) == *pin)
                });
                let root = pinned
                    .ok_or_else(|| wrong("the server's root is not the one the token names"))?;
                let mut roots = RootCertStore::empty();
                roots.add(root.clone().into_owned())?;
                verify(&roots)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A client's TLS: whom it trusts, who it is, what it speaks, and its clock (`None`: the system's).
///
/// # Errors
/// When PEM does not hold what it should.
pub fn client_config(
    trusted: Trusted,
    credentials: Option<&Credentials>,
    alpn: &[&[u8]],
    clock: Option<Arc<dyn rustls::time_provider::TimeProvider>>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = match &trusted {
        Trusted::Roots { pem, .. } => roots(pem)?,
        Trusted::Pin(_) => RootCertStore::empty(),
    };
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let clock = clock.unwrap_or_else(|| Arc::new(rustls::time_provider::DefaultTimeProvider));
    let builder = ClientConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerCheck { trusted, roots, algorithms }));
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some(c) => builder
            .with_client_auth_cert(certificates(&c.certificate_pem)?, private_key(&c.key_pem)?)?,
    };
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The name that our own clients ask a server for, wherever it is. They recognise it by its cluster's
/// root and the URI in its certificate; by this name it knows whom it shows that certificate. Of the
/// domain that RFC 2606 keeps free, so that no host has it.
pub const SERVER_NAME: &str = "server.berth.invalid";

/// Connects to `host:port` within `deadline`.
///
/// # Errors
/// When it cannot be reached, is not the server it should be, or takes too long.
pub async fn connect(
    endpoint: &str,
    config: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<TlsStream<TcpStream>, TlsError> {
    let connecting = async {
        let failed = |source| TlsError::Connect { endpoint: endpoint.to_owned(), source };
        let tcp = TcpStream::connect(endpoint).await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        let name = ServerName::try_from(SERVER_NAME).map_err(|_| TlsError::NoIdentity)?;
        TlsConnector::from(config).connect(name, tcp).await.map_err(failed)
    };
    match tokio::time::timeout(deadline, connecting).await {
        Ok(result) => result,
        Err(_) => Err(TlsError::TimedOut(endpoint.to_owned())),
    }
}

/// A gRPC channel to `host:port` that is connected already. It is not dialled again when it breaks.
///
/// # Errors
/// As [`connect`].
#[cfg(feature = "grpc")]
pub async fn channel(
    endpoint: &str,
    config: Arc<ClientConfig>,
    deadline: Duration,
    tune: impl FnOnce(tonic::transport::Endpoint) -> tonic::transport::Endpoint,
) -> Result<tonic::transport::Channel, TlsError> {
    let stream = connect(endpoint, config, deadline).await?;
    let once = Arc::new(std::sync::Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = once.lock().ok().and_then(|mut held| held.take());
        async move {
            stream
                .map(hyper_util::rt::TokioIo::new)
                .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))
        }
    });
    tune(tonic::transport::Endpoint::from_static("http://berth"))
        .connect_with_connector(connector)
        .await
        .map_err(|e| TlsError::Connect {
            endpoint: endpoint.to_owned(),
            source: std::io::Error::other(e),
        })
}

/// A new key and a request for a certificate, both PEM. The request names nothing: names are the CA's
/// to give.
///
/// # Errors
/// When the system gives no randomness.
pub fn key_and_request() -> Result<(String, String), TlsError> {
    let key = rcgen::KeyPair::generate()?;
    let request = request_for(&key)?;
    Ok((key.serialize_pem(), request))
}

/// A request for a certificate with this key.
///
/// # Errors
/// When the key cannot sign.
pub fn request_for(key: &rcgen::KeyPair) -> Result<String, TlsError> {
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params.serialize_request(key)?.pem()?)
}

/// Signs bytes with a key in PEM: ECDSA P-256 with SHA-256, ASN.1.
///
/// # Errors
/// When the key is of another kind.
pub fn sign(key_pem: &str, message: &[u8]) -> Result<Vec<u8>, TlsError> {
    let key = rcgen::KeyPair::from_pem(key_pem)?;
    let rng = ::ring::rand::SystemRandom::new();
    let pair = ::ring::signature::EcdsaKeyPair::from_pkcs8(
        &::ring::signature::ECDSA_P256_SHA256_ASN1_SIGNING,
        &key.serialize_der(),
        &rng,
    )
    .map_err(|_| TlsError::Pem { what: "key" })?;
    let signature = pair.sign(&rng, message).map_err(|_| TlsError::Pem { what: "key" })?;
    Ok(signature.as_ref().to_vec())
}

/// The public key (SubjectPublicKeyInfo, DER) of a key in PEM.
///
/// # Errors
/// When it is no key.
pub fn public_key_of(key_pem: &str) -> Result<Vec<u8>, TlsError> {
    use rcgen::PublicKeyData as _;
    Ok(rcgen::KeyPair::from_pem(key_pem)?.subject_public_key_info())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_and_nothing_else_is_one() {
        for text in ["spiffe://c1/server", "spiffe://c1/host/h-1", "spiffe://c1/user/ann"] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "spiffe://c1",
            "spiffe://c1/",
            "spiffe://c1/host",
            "http://c1/server",
            "spiffe://c1/host/H",
            "spiffe://c1/user/a/b",
            "spiffe:///server",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
