//! What the registry door asks the rest of the server: who is calling, what they may, and what
//! nobody may touch.
//!
//! The door never lets anybody in by itself: without credentials that [`Access`] takes, every path
//! answers 401.

use super::errors::RegistryError;
use super::names::{Reference, RepoName};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use berth_proto::ids::Digest;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::sync::Arc;

/// Longest `Authorization` header looked at; our tokens have under 100 characters.
const AUTHORIZATION_MAX: usize = 8192;

/// The client's certificate chain, verified by the listener and put into the request's extensions.
#[derive(Debug, Clone)]
pub struct PeerCertificates(pub Arc<[CertificateDer<'static>]>);

/// What a caller shows.
#[derive(Clone)]
pub enum Credentials {
    /// HTTP Basic: the user's name is anything, the password is a token.
    Basic {
        /// As typed; means nothing.
        user: String,
        /// The token.
        password: String,
    },
    /// A token.
    Bearer(String),
    /// A verified chain, leaf first.
    Certificate(PeerCertificates),
}

impl fmt::Debug for Credentials {
    /// Never prints a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { .. } => f.write_str("Basic(..)"),
            Self::Bearer(_) => f.write_str("Bearer(..)"),
            Self::Certificate(_) => f.write_str("Certificate(..)"),
        }
    }
}

/// Who is calling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// Stable name, for rights and logs, e.g. `user/anna` or `host/<uid>`.
    pub subject: String,
    /// For a token that opens one repository only; the door refuses all others by itself.
    pub only: Option<RepoName>,
}

/// What is done to a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Read manifests, blobs and tags.
    Pull,
    /// Write them.
    Push,
    /// Remove them.
    Delete,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pull => "pull from",
            Self::Push => "push to",
            Self::Delete => "delete from",
        })
    }
}

/// How much of a repository that it may pull from somebody reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// All of it.
    Whole,
    /// By digest alone these manifests, and what they lead to.
    Below(Vec<Digest>),
}

/// Why a caller is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// Wrong, expired or revoked.
    #[error("the token or certificate is not valid here: make one with `berth user token`")]
    Refused,
    /// It cannot be told now.
    #[error("the server cannot check credentials now, try again")]
    Unavailable,
}

/// What is about to be put or removed.
#[derive(Debug)]
pub enum Noting<'a> {
    /// A manifest, under which tag or by which digest; what is put.
    Manifest(&'a Reference, Option<Digest>),
    /// A blob.
    Blob(&'a Digest),
}

/// Something is about to be put or removed.
#[derive(Debug)]
pub struct Noted<'a> {
    /// By whom.
    pub principal: &'a Principal,
    /// From where: what the listener has put into the request.
    pub extensions: &'a http::Extensions,
    /// [`Action::Push`] or [`Action::Delete`].
    pub action: Action,
    /// Where.
    pub repository: &'a RepoName,
    /// What.
    pub what: Noting<'a>,
}

/// Who may do what; asked at every request, so that a revocation counts at once.
#[async_trait]
pub trait Access: Send + Sync + 'static {
    /// Who shows these credentials.
    async fn authenticate(&self, credentials: Credentials) -> Result<Principal, AccessError>;
    /// Whether `principal` may do `action` in `repository`. Never waits.
    fn allows(&self, principal: &Principal, repository: &RepoName, action: Action) -> bool;
    /// How much of it `principal` reads, once it may pull. Never waits.
    fn reach(&self, principal: &Principal, repository: &RepoName) -> Reach;
    /// Writes down who puts or removes something, before it is done; not done when that fails.
    async fn note(&self, noted: Noted<'_>) -> Result<(), AccessError>;
}

/// What nobody may overwrite or delete through the door.
pub trait Protected: Send + Sync + 'static {
    /// The registered version (as people name it, e.g. `iris:1.2`) that holds this tag or digest.
    ///
    /// Never waits. Also asked for a tag that does not exist yet.
    fn protects(&self, repository: &RepoName, reference: &Reference) -> Option<String>;
}

/// Protects nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NothingProtected;

impl Protected for NothingProtected {
    fn protects(&self, _: &RepoName, _: &Reference) -> Option<String> {
        None
    }
}

/// The credentials of a request: the header's, else the certificate's.
///
/// # Errors
/// [`RegistryError::Unauthorized`] when none are shown, or none that can be read.
pub fn credentials(
    headers: &HeaderMap,
    certificates: Option<&PeerCertificates>,
) -> Result<Credentials, RegistryError> {
    // Some clients without a login send Basic with nothing in it, and are told the same.
    const LOG_IN: RegistryError = RegistryError::Unauthorized(
        "log in first: any user name, a token of `berth user token` as password",
    );
    match headers.get(AUTHORIZATION) {
        Some(header) => parse(header.to_str().unwrap_or_default()).ok_or(LOG_IN),
        None => certificates
            .filter(|chain| !chain.0.is_empty())
            .map(|chain| Credentials::Certificate(chain.clone()))
            .ok_or(LOG_IN),
    }
}

fn parse(header: &str) -> Option<Credentials> {
    if header.len() > AUTHORIZATION_MAX {
        return None;
    }
    let (scheme, rest) = header.split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return (!rest.is_empty()).then(|| Credentials::Bearer(rest.to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(rest).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    (!password.is_empty())
        .then(|| Credentials::Basic { user: user.to_owned(), password: password.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_of_basic_is_all_after_the_first_colon() {
        let header = format!("bAsIc {}", STANDARD.encode("anna:to:ken"));
        let Some(Credentials::Basic { user, password }) = parse(&header) else { panic!() };
        assert_eq!((user.as_str(), password.as_str()), ("anna", "to:ken"));
    }

    #[test]
    fn nothing_and_nonsense_are_nobody() {
        for header in ["", "Basic", "Basic !!", "Basic YQ==", "Basic YTo=", "Bearer ", "Digest x"] {
            assert!(parse(header).is_none(), "{header}");
        }
        assert!(credentials(&HeaderMap::new(), None).is_err());
        assert!(credentials(&HeaderMap::new(), Some(&PeerCertificates(Arc::from([])))).is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        let shown = format!("{:?}", Credentials::Bearer("hunter2".into()));
        assert!(!shown.contains("hunter2"));
    }
}
