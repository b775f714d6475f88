//! The cluster's certificate authority.

use berth_proto::ids::ClusterUid;
use berth_proto::tls::{self, SpiffeId, Subject, TlsError};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
    SerialNumber,
};
use sha2::Digest as _;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// A root is good for ten years.
const ROOT_DAYS: i64 = 3650;
/// A host's certificate, renewed at half its life.
pub const HOST_DAYS: i64 = 90;
/// The server's own, made anew at every start.
const SERVER_DAYS: i64 = 365;
/// Certificates begin a little in the past, for clocks that are behind.
const BACKDATE: Duration = Duration::hours(1);
/// The same in seconds, for whoever asks when a certificate was made.
pub const BACKDATE_SECONDS: i64 = BACKDATE.whole_seconds();

/// Why the CA cannot work.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of it.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is none, and what it has signed is in use.
    #[error(
        "{} is missing beside a ledger: put ca.crt and ca.key of this cluster back, or restore a \
         backup into an empty folder (berthd restore)",
        .0.display()
    )]
    Missing(PathBuf),
    /// It is another cluster's.
    #[error(
        "the CA is of cluster {found}, the ledger of cluster {expected}: put ca.crt and ca.key of that \
         one back"
    )]
    OtherCluster {
        /// The ledger's.
        expected: String,
        /// The CA's.
        found: ClusterUid,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// What is in the files is not a CA's.
    #[error("the CA's files do not hold a CA of a cluster")]
    Foreign(#[source] TlsError),
    /// A certificate beside the key of another one.
    #[error("the CA's certificate and key are no pair: put both of one backup back")]
    NoPair,
    /// The request is none.
    #[error("the certificate request is not PEM of a request with a good signature")]
    Request(#[source] rcgen::Error),
}

/// The cluster's certificate authority.
pub struct Ca {
    cluster: ClusterUid,
    root_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Writes a file for its owner alone, durable and whole.
pub(super) fn write_private(path: &Path, text: &str) -> Result<(), CaError> {
    let failed = |source| CaError::File { path: path.to_owned(), source };
    let partial = path.with_extension("partial");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&partial, path).map_err(failed)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|f| f.sync_all()).map_err(failed)
}

/// A file that cannot be looked at is not one that is missing.
pub(super) fn is_there(path: &Path) -> Result<bool, CaError> {
    path.try_exists().map_err(|source| CaError::File { path: path.to_owned(), source })
}

/// What is in a file.
pub(super) fn read_pem(path: &Path) -> Result<String, CaError> {
    std::fs::read_to_string(path).map_err(|source| CaError::File { path: path.to_owned(), source })
}

impl Ca {
    /// Opens the CA in a folder, or makes a new one there while the folder has no ledger: hosts and
    /// users of a cluster know its root, and another one in its place would shut all of them out.
    ///
    /// # Errors
    /// When files cannot be read or written, or hold something else; [`CaError::Missing`].
    pub fn open(folder: &Path) -> Result<Self, CaError> {
        let (certificate, key) = (folder.join("ca.crt"), folder.join("ca.key"));
        if !is_there(&certificate)? {
            if is_there(&folder.join("ledger"))? {
                return Err(CaError::Missing(certificate));
            }
            let cluster = uuid::Uuid::now_v7().to_string();
            let (root_pem, key_pem) = new_root(&cluster)?;
            // The key first: a certificate without its key would look like a whole CA.
            write_private(&key, &key_pem)?;
            write_private(&certificate, &root_pem)?;
        }
        Self::from_pem(read_pem(&certificate)?, read_pem(&key)?)
    }

    /// Whether it is the CA of the ledger's cluster; an empty uid is a ledger that has none yet.
    ///
    /// # Errors
    /// [`CaError::OtherCluster`].
    pub fn belongs_to(&self, cluster: &str) -> Result<(), CaError> {
        if cluster.is_empty() || cluster == self.cluster.as_str() {
            return Ok(());
        }
        Err(CaError::OtherCluster { expected: cluster.to_owned(), found: self.cluster.clone() })
    }

    /// From PEM, as kept in a backup.
    ///
    /// # Errors
    /// When it is not a CA's, or of two.
    pub fn from_pem(root_pem: String, key_pem: String) -> Result<Self, CaError> {
        if !Self::is_pair(&root_pem, &key_pem)? {
            return Err(CaError::NoPair);
        }
        let first = tls::certificates(&root_pem).map_err(CaError::Foreign)?;
        let cluster = cluster_of(&first[0]).map_err(CaError::Foreign)?;
        let issuer = Issuer::from_ca_cert_pem(&root_pem, KeyPair::from_pem(&key_pem)?)?;
        Ok(Self { cluster, root_pem, key_pem, issuer })
    }

    /// Whether the key is the certificate's.
    ///
    /// # Errors
    /// When one of them is none.
    pub fn is_pair(root_pem: &str, key_pem: &str) -> Result<bool, CaError> {
        let root = tls::certificates(root_pem).map_err(CaError::Foreign)?;
        let of_root = tls::public_key(&root[0]).map_err(CaError::Foreign)?;
        Ok(KeyPair::from_pem(key_pem)?.subject_public_key_info() == of_root)
    }

    /// A root of the same cluster that is not in use yet.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn another(cluster: &str) -> Result<Self, CaError> {
        let (root_pem, key_pem) = new_root(cluster)?;
        Self::from_pem(root_pem, key_pem)
    }

    /// Writes it into a folder that has none.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), CaError> {
        // The key first: a certificate without its key would look like a whole CA.
        write_private(&folder.join("ca.key"), &self.key_pem)?;
        write_private(&folder.join("ca.crt"), &self.root_pem)
    }

    /// The cluster it belongs to.
    #[must_use]
    pub fn cluster(&self) -> &ClusterUid {
        &self.cluster
    }

    /// The root, PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// The root's key, PEM: for backups only.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    fn id(&self, subject: Subject) -> SpiffeId {
        SpiffeId { cluster: self.cluster.clone(), subject }
    }

    fn dress(
        &self,
        params: &mut CertificateParams,
        id: &SpiffeId,
        days: i64,
    ) -> Result<(), CaError> {
        // What the request asked for is attacker-chosen: everything is replaced.
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, id.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match id.subject {
            Subject::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
            Subject::Host(_) | Subject::User(_) => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        let now = OffsetDateTime::now_utc();
        params.not_before = now - BACKDATE;
        params.not_after = now + Duration::days(days);
        params.serial_number = Some(SerialNumber::from_slice(uuid::Uuid::new_v4().as_bytes()));
        params.custom_extensions.clear();
        params.name_constraints = None;
        Ok(())
    }

    /// Signs a request for a host or user; answers with the chain.
    ///
    /// # Errors
    /// When the request is none.
    pub fn sign(&self, request_pem: &str, subject: Subject, days: i64) -> Result<String, CaError> {
        let mut request =
            CertificateSigningRequestParams::from_pem(request_pem).map_err(CaError::Request)?;
        self.dress(&mut request.params, &self.id(subject), days)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// A certificate (with the root behind it, for those who only have its pin) and key of the
    /// server. `names` are host names and addresses for clients that check them, such as docker.
    ///
    /// # Errors
    /// When a name is none.
    pub fn server(&self, names: &[String]) -> Result<(String, String), CaError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        self.dress(&mut params, &self.id(Subject::Server), SERVER_DAYS)?;
        for name in names {
            params.subject_alt_names.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((format!("{}{}", certificate.pem(), self.root_pem), key.serialize_pem()))
    }

    /// A certificate and key of a user, made here: for the first admin.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn user(
        &self,
        name: &berth_proto::ids::Name,
        days: i64,
    ) -> Result<(String, String), CaError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        self.dress(&mut params, &self.id(Subject::User(name.clone())), days)?;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }
}

fn new_root(cluster: &str) -> Result<(String, String), CaError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // A name of its own: some clients look no further than the first issuer of the right name.
    let digest = sha2::Sha256::digest(key.subject_public_key_info());
    let name = format!("Berth root {cluster} {}", hex::encode(&digest[..4]));
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{cluster}/ca").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATE;
    params.not_after = now + Duration::days(ROOT_DAYS);
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn cluster_of(root: &rustls::pki_types::CertificateDer<'_>) -> Result<ClusterUid, TlsError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(root).map_err(|_| TlsError::NoIdentity)?;
    let names = parsed.subject_alternative_name().map_err(|_| TlsError::NoIdentity)?;
    names
        .into_iter()
        .flat_map(|names| names.value.general_names.iter())
        .find_map(|name| {
            tls::uri(name)?.strip_prefix("spiffe://")?.strip_suffix("/ca")?.parse().ok()
        })
        .ok_or(TlsError::NoIdentity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_opens_again_as_the_same_and_keeps_its_key_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let first = Ca::open(dir.path()).unwrap();
        let again = Ca::open(dir.path()).unwrap();
        assert_eq!(first.cluster(), again.cluster());
        let mode = std::fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn beside_a_ledger_a_lost_certificate_is_not_made_anew_and_the_key_stays() {
        let dir = tempfile::tempdir().unwrap();
        Ca::open(dir.path()).unwrap();
        let key = std::fs::read_to_string(dir.path().join("ca.key")).unwrap();
        std::fs::create_dir(dir.path().join("ledger")).unwrap();
        std::fs::remove_file(dir.path().join("ca.crt")).unwrap();
        assert!(matches!(Ca::open(dir.path()), Err(CaError::Missing(_))));
        assert_eq!(std::fs::read_to_string(dir.path().join("ca.key")).unwrap(), key);
        // One that cannot be looked at (a link to itself, here) is not one that is missing.
        std::fs::remove_dir(dir.path().join("ledger")).unwrap();
        std::os::unix::fs::symlink("ca.crt", dir.path().join("ca.crt")).unwrap();
        assert!(matches!(Ca::open(dir.path()), Err(CaError::File { .. })));
        assert_eq!(std::fs::read_to_string(dir.path().join("ca.key")).unwrap(), key);
    }

    #[test]
    fn a_ca_is_not_used_with_the_ledger_of_another_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open(dir.path()).unwrap();
        assert!(ca.belongs_to("").is_ok() && ca.belongs_to(ca.cluster().as_str()).is_ok());
        assert!(matches!(ca.belongs_to("another"), Err(CaError::OtherCluster { .. })));
    }

    #[test]
    fn the_names_of_a_request_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open(dir.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        let wish = format!("spiffe://{}/server", ca.cluster());
        params.subject_alt_names.push(SanType::URI(wish.try_into().unwrap()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let request = params.serialize_request(&key).unwrap().pem().unwrap();
        let host = Subject::Host("h1".parse().unwrap());
        let pem = ca.sign(&request, host.clone(), HOST_DAYS).unwrap();
        let signed = tls::certificates(&pem).unwrap();
        assert_eq!(SpiffeId::of(&signed[0]).unwrap().subject, host);
        let (_, parsed) = x509_parser::parse_x509_certificate(&signed[0]).unwrap();
        assert!(!parsed.is_ca());
        let names = parsed.subject_alternative_name().unwrap().unwrap().value;
        assert_eq!(names.general_names.len(), 1);
        assert!(ca.sign("nonsense", host, 1).is_err());
    }
}
