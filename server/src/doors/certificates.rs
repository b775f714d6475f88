//! The certificates that the doors show, exchanged while they are open.
//!
//! Our own clients know the server by its cluster's root and the URI in its certificate, so they are
//! always shown the internal one: they say [`tls::SERVER_NAME`], which is no host's name. Everybody
//! else is shown the operator's, where there is one. The internal one is made anew at half its life,
//! or when the clock has jumped out of it; the operator's files are read again when they change.

use crate::identity::ca::Ca;
use arc_swap::ArcSwap;
use berth_proto::ids::Wall;
use berth_proto::tls;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is no certificate to show.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What is in the files is not a certificate with its key.
    #[error("{} and {} are not a certificate and its key in PEM", certificate.display(), key.display())]
    Files {
        /// `--tls-cert`.
        certificate: PathBuf,
        /// `--tls-key`.
        key: PathBuf,
        /// Why.
        #[source]
        source: tls::TlsError,
    },
    /// The internal one cannot be made.
    #[error("the server's own certificate cannot be made")]
    Own(#[from] tls::TlsError),
    /// The CA does not make one.
    #[error(transparent)]
    Ca(#[from] crate::identity::ca::CaError),
}

#[derive(Debug)]
struct Shown {
    /// Its PEM, to see whether it has changed.
    text: String,
    key: Arc<CertifiedKey>,
}

fn certified(certificate_pem: &str, key_pem: &str) -> Result<Arc<CertifiedKey>, tls::TlsError> {
    let chain = tls::certificates(certificate_pem)?;
    let key = tls::private_key(key_pem)?;
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &tls::provider())?))
}

/// The internal certificate.
#[derive(Debug)]
pub struct Internal {
    names: Vec<String>,
    shown: ArcSwap<Shown>,
}

impl Internal {
    /// Makes one for these host names and addresses.
    ///
    /// # Errors
    /// When a name is none.
    pub fn new(ca: &Ca, names: Vec<String>) -> Result<Self, CertificateError> {
        let shown = ArcSwap::new(Arc::new(Self::make(ca, &names)?));
        Ok(Self { names, shown })
    }

    fn make(ca: &Ca, names: &[String]) -> Result<Shown, CertificateError> {
        let (text, key) = ca.server(names)?;
        Ok(Shown { key: certified(&text, &key)?, text })
    }

    /// Makes it anew when half its life is over, or it is not yet good; answers whether it was.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn renew(&self, ca: &Ca, now: Wall) -> Result<bool, CertificateError> {
        let (from, until) = tls::validity(&self.shown.load().text)?;
        let seconds = now.0 / 1000;
        if (from..from + (until - from) / 2).contains(&seconds) {
            return Ok(false);
        }
        self.make_anew(ca)?;
        Ok(true)
    }

    /// Makes it anew, whatever its age: of another root.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn make_anew(&self, ca: &Ca) -> Result<(), CertificateError> {
        self.shown.store(Arc::new(Self::make(ca, &self.names)?));
        Ok(())
    }
}

/// The operator's certificate.
#[derive(Debug)]
pub struct Operators {
    certificate: PathBuf,
    key: PathBuf,
    shown: ArcSwap<Shown>,
}

impl Operators {
    /// Reads it.
    ///
    /// # Errors
    /// When the files cannot be read or are something else.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, CertificateError> {
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let shown = ArcSwap::new(Arc::new(Self::load(&certificate, &key)?));
        Ok(Self { certificate, key, shown })
    }

    fn load(certificate: &Path, key: &Path) -> Result<Shown, CertificateError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|source| CertificateError::File { path: path.to_owned(), source })
        };
        let (text, key_pem) = (read(certificate)?, read(key)?);
        let certified = certified(&text, &key_pem).map_err(|source| CertificateError::Files {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            source,
        })?;
        Ok(Shown { text, key: certified })
    }

    /// Reads it again; answers whether it has changed. What was good stays when this fails.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_again(&self) -> Result<bool, CertificateError> {
        let newer = Self::load(&self.certificate, &self.key)?;
        if newer.text == self.shown.load().text {
            return Ok(false);
        }
        self.shown.store(Arc::new(newer));
        Ok(true)
    }
}

/// What one door shows.
#[derive(Debug, Clone)]
pub struct Certificates {
    /// To our own clients, and to all where there is no other.
    pub internal: Arc<Internal>,
    /// To everybody else.
    pub operators: Option<Arc<Operators>>,
}

impl Certificates {
    fn for_name(&self, name: Option<&str>) -> Arc<CertifiedKey> {
        let shown = match &self.operators {
            Some(operators) if name != Some(tls::SERVER_NAME) => operators.shown.load(),
            Some(_) | None => self.internal.shown.load(),
        };
        Arc::clone(&shown.key)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.for_name(hello.server_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_MS: i64 = 365 * 86_400_000 / 2;

    fn ca() -> (tempfile::TempDir, Ca) {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open(dir.path()).unwrap();
        (dir, ca)
    }

    #[test]
    fn the_internal_one_is_made_anew_at_half_its_life_and_when_the_clock_has_jumped() {
        let (_dir, ca) = ca();
        let internal = Internal::new(&ca, vec!["localhost".into()]).unwrap();
        let now = crate::cluster::wall_now().0;
        let day = 86_400_000;
        for (at, anew) in [
            (now, false),
            (now + HALF_MS - day, false),
            (now + HALF_MS + day, true),
            (now + 3 * HALF_MS, true),
            // Made by a clock that was ahead, and set right since.
            (now - day, true),
        ] {
            assert_eq!(internal.renew(&ca, Wall(at)).unwrap(), anew, "{}", (at - now) / day);
        }
    }

    #[test]
    fn ours_are_shown_the_internal_one_and_others_the_operators_which_may_change() {
        let (_dir, ca) = ca();
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        let issue = || {
            let (_other, foreign) = self::ca();
            let (certificate_pem, key_pem) = foreign.server(&["registry.test".into()]).unwrap();
            std::fs::write(&key, key_pem).unwrap();
            std::fs::write(&certificate, &certificate_pem).unwrap();
            tls::certificates(&certificate_pem).unwrap()
        };
        let first = issue();
        let operators = Arc::new(Operators::read(&certificate, &key).unwrap());
        let internal = Arc::new(Internal::new(&ca, vec!["localhost".into()]).unwrap());
        let door = Certificates {
            internal: Arc::clone(&internal),
            operators: Some(Arc::clone(&operators)),
        };
        let own = Arc::clone(&internal.shown.load().key);
        assert!(Arc::ptr_eq(&door.for_name(Some(tls::SERVER_NAME)), &own));
        for name in [None, Some("registry.test")] {
            assert_eq!(door.for_name(name).cert, first);
        }
        assert!(!operators.read_again().unwrap());
        std::fs::write(&certificate, "nothing").unwrap();
        assert!(matches!(operators.read_again(), Err(CertificateError::Files { .. })));
        assert_eq!(door.for_name(None).cert, first, "the good one stays");
        let second = issue();
        assert!(operators.read_again().unwrap());
        assert_eq!(door.for_name(None).cert, second);
        let plain = Certificates { internal, operators: None };
        assert!(Arc::ptr_eq(&plain.for_name(None), &own));
    }
}
