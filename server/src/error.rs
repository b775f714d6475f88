//! What can go wrong for a caller, and the only place that makes a gRPC status.
//!
//! The code says what the caller should do next. UNAVAILABLE: send the same call again. ABORTED:
//! read again, then retry. FAILED_PRECONDITION: do something else first. Every status carries
//! `google.rpc.ErrorInfo` with a stable reason in the domain `berth`; wrong fields are listed as
//! `BadRequest`, all of them.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The domain of all our error reasons.
pub const DOMAIN: &str = "berth";

/// One wrong field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Path to the field, e.g. `deployments[0].spec.ports[1].container`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// What can go wrong for a caller.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Fields of the request are wrong; all of them are named.
    #[error("{}", first_of(.0))]
    Invalid(Vec<FieldError>),
    /// Something that was named does not exist.
    #[error("{kind} \"{name}\" does not exist")]
    NotFound {
        /// Kind in upper case, e.g. `DEPLOYMENT`; makes the reason `DEPLOYMENT_NOT_FOUND`.
        kind: Kind,
        /// What was asked for.
        name: String,
    },
    /// A name is taken.
    #[error("{kind} \"{name}\" exists already{hint}")]
    Exists {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: String,
        /// What goes on the sentence: with what, and what to do; mostly empty.
        hint: String,
    },
    /// The object was written since the caller read it.
    #[error("{kind} \"{name}\" was changed meanwhile: expected revision {expected}, found {found}")]
    RevisionMismatch {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: String,
        /// What the caller has read.
        expected: u64,
        /// What is.
        found: u64,
    },
    /// Something else must be done first.
    #[error("{message}")]
    Precondition {
        /// Stable word.
        reason: &'static str,
        /// What to do, for people.
        message: String,
    },
    /// The caller is nobody the server knows.
    #[error("{message}")]
    Unauthenticated {
        /// Stable word.
        reason: &'static str,
        /// Why.
        message: String,
    },
    /// The caller may not.
    #[error("{message}")]
    Denied {
        /// Stable word.
        reason: &'static str,
        /// What would be needed.
        message: String,
    },
    /// A request id was used for another request.
    #[error("request id \"{0}\" was used for another request within the last 24 hours")]
    RequestReused(String),
    /// Too much at once, or no room.
    #[error("{message}")]
    Exhausted {
        /// Stable word.
        reason: &'static str,
        /// What to do.
        message: String,
    },
    /// The caller fell behind, or its page is gone.
    #[error("{message}")]
    Gone {
        /// Stable word.
        reason: &'static str,
        /// What to do.
        message: String,
    },
    /// The same call may succeed in a moment.
    #[error("{message}")]
    Unavailable {
        /// Stable word.
        reason: &'static str,
        /// What is not there.
        message: String,
    },
    /// A host's agent says no.
    #[error("{message}")]
    Host {
        /// As its agent said: what the caller should do next.
        code: Code,
        /// The agent's stable word.
        reason: String,
        /// Why, in the agent's words.
        message: String,
    },
    /// A wait ended.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// Something inside failed; the cause is in the chain and the log.
    #[error("{doing}")]
    Internal {
        /// What the server was doing.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Kinds of objects that can be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    Deployment,
    Release,
    Replica,
    Host,
    Model,
    Version,
    Alias,
    User,
    Token,
    Image,
}

impl Kind {
    /// As part of a reason.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Deployment => "DEPLOYMENT",
            Self::Release => "RELEASE",
            Self::Replica => "REPLICA",
            Self::Host => "HOST",
            Self::Model => "MODEL",
            Self::Version => "VERSION",
            Self::Alias => "ALIAS",
            Self::User => "USER",
            Self::Token => "TOKEN",
            Self::Image => "IMAGE",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.word().to_ascii_lowercase())
    }
}

/// Whether a word has the form of our reasons, so that an agent puts no others into the answers.
fn is_reason(word: &str) -> bool {
    (1..=63).contains(&word.len())
        && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

fn first_of(fields: &[FieldError]) -> String {
    let Some(first) = fields.first() else { return "the request is not valid".to_owned() };
    let more = match fields.len() {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    if first.path.is_empty() {
        format!("{}{more}", first.message)
    } else {
        format!("{}: {}{more}", first.path, first.message)
    }
}

impl Error {
    /// One wrong field.
    pub fn field(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![FieldError { path: path.into(), message: message.into() }])
    }
    /// Something does not exist.
    pub fn not_found(kind: Kind, name: impl Into<String>) -> Self {
        Self::NotFound { kind, name: name.into() }
    }
    /// Something else must be done first.
    pub fn precondition(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Precondition { reason, message: message.into() }
    }
    /// The caller may not.
    pub fn denied(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Denied { reason, message: message.into() }
    }
    /// The same call may succeed in a moment.
    pub fn unavailable(reason: &'static str, message: impl Into<String>) -> Self {
        Self::Unavailable { reason, message: message.into() }
    }
    /// What a host's agent answered, with its code and reason. An agent that tells no reason of ours,
    /// or a code that says nothing to the caller, is one that cannot be asked now.
    #[must_use]
    pub fn of_host(status: &Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let told = matches!(
            status.code(),
            Code::NotFound | Code::FailedPrecondition | Code::PermissionDenied | Code::Unavailable
        );
        match info {
            Some(info) if told && is_reason(&info.reason) => Self::Host {
                code: status.code(),
                reason: info.reason,
                message: status.message().to_owned(),
            },
            Some(_) | None => Self::unavailable("HOST_AWAY", status.message()),
        }
    }
    /// Something inside failed.
    pub fn internal(
        doing: &'static str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::Internal { doing, source: source.into() }
    }

    /// The status code: what the caller should do next.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::RequestReused(_) => Code::InvalidArgument,
            Self::NotFound { .. } => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::RevisionMismatch { .. } => Code::Aborted,
            Self::Precondition { .. } => Code::FailedPrecondition,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::Denied { .. } => Code::PermissionDenied,
            Self::Exhausted { .. } => Code::ResourceExhausted,
            Self::Gone { .. } => Code::OutOfRange,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Host { code, .. } => *code,
            Self::Deadline(_) => Code::DeadlineExceeded,
            Self::Internal { .. } => Code::Internal,
        }
    }

    /// What programs may want to know besides the reason, under stable names.
    fn metadata(&self) -> HashMap<String, String> {
        let pairs: Vec<(&str, String)> = match self {
            Self::NotFound { kind, name } | Self::Exists { kind, name, .. } => {
                vec![("kind", kind.to_string()), ("name", name.clone())]
            }
            Self::RevisionMismatch { kind, name, expected, found } => vec![
                ("kind", kind.to_string()),
                ("name", name.clone()),
                ("expected", expected.to_string()),
                ("found", found.to_string()),
            ],
            Self::Invalid(_)
            | Self::Precondition { .. }
            | Self::Unauthenticated { .. }
            | Self::Denied { .. }
            | Self::RequestReused(_)
            | Self::Exhausted { .. }
            | Self::Gone { .. }
            | Self::Unavailable { .. }
            | Self::Host { .. }
            | Self::Deadline(_)
            | Self::Internal { .. } => Vec::new(),
        };
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// The stable word programs go by.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Invalid(_) => "INVALID".to_owned(),
            Self::RequestReused(_) => "REQUEST_ID_REUSED".to_owned(),
            Self::NotFound { kind, .. } => format!("{}_NOT_FOUND", kind.word()),
            Self::Exists { kind, .. } => format!("{}_EXISTS", kind.word()),
            Self::RevisionMismatch { .. } => "REVISION_MISMATCH".to_owned(),
            Self::Precondition { reason, .. }
            | Self::Unauthenticated { reason, .. }
            | Self::Denied { reason, .. }
            | Self::Exhausted { reason, .. }
            | Self::Gone { reason, .. }
            | Self::Unavailable { reason, .. } => (*reason).to_owned(),
            Self::Host { reason, .. } => reason.clone(),
            Self::Deadline(_) => "DEADLINE".to_owned(),
            Self::Internal { .. } => "INTERNAL".to_owned(),
        }
    }
}

/// An error and its causes, each once: `a: b: c`.
pub struct Chain<'a>(pub &'a (dyn StdError + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason(), DOMAIN, error.metadata());
        match &error {
            Error::Invalid(fields) => {
                for field in fields {
                    details.add_bad_request_violation(&field.path, &field.message);
                }
            }
            Error::Precondition { reason, message } => {
                details.add_precondition_failure_violation(*reason, "", message);
            }
            Error::Unavailable { .. } | Error::Exhausted { .. } => {
                details.set_retry_info(Some(Duration::from_secs(1)));
            }
            Error::Internal { .. } => {
                tracing::error!(error = %Chain(&error), "a call failed inside");
            }
            Error::NotFound { .. }
            | Error::Exists { .. }
            | Error::RevisionMismatch { .. }
            | Error::Unauthenticated { .. }
            | Error::Denied { .. }
            | Error::RequestReused(_)
            | Error::Gone { .. }
            | Error::Host { .. }
            | Error::Deadline(_) => {}
        }
        Status::with_error_details(error.code(), Chain(&error).to_string(), details)
    }
}

/// How a stream ends with an error after its headers were sent.
#[must_use]
pub fn trailers(error: Error) -> http::HeaderMap {
    let mut map = http::HeaderMap::new();
    if Status::from(error).add_header(&mut map).is_err() {
        map.insert("grpc-status", http::HeaderValue::from(Code::Internal as i32));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_field_is_named() {
        let status = Status::from(Error::Invalid(vec![
            FieldError { path: "a".into(), message: "is wrong".into() },
            FieldError { path: "b".into(), message: "is wrong too".into() },
        ]));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "a: is wrong (and 1 more)");
        let fields = status.get_error_details().bad_request().unwrap().field_violations.clone();
        assert_eq!(fields.len(), 2);
    }

    #[test]
    fn each_kind_of_error_has_the_details_programs_act_on() {
        let details = |error: Error| Status::from(error).get_error_details();
        let mismatch = details(Error::RevisionMismatch {
            kind: Kind::Host,
            name: "edge".into(),
            expected: 3,
            found: 7,
        });
        let info = mismatch.error_info().unwrap();
        assert_eq!(info.reason, "REVISION_MISMATCH");
        assert_eq!((&*info.metadata["expected"], &*info.metadata["found"]), ("3", "7"));
        let first = details(Error::precondition("HOST_HAS_REPLICAS", "drain it first"));
        let violation = &first.precondition_failure().unwrap().violations[0];
        assert_eq!(
            (&*violation.r#type, &*violation.description),
            ("HOST_HAS_REPLICAS", "drain it first")
        );
        let later = details(Error::unavailable("LEDGER_BUSY", "too many writes are waiting"));
        assert!(later.retry_info().unwrap().retry_delay.is_some());
        assert!(details(Error::Deadline("a pull")).retry_info().is_none());
    }

    #[test]
    fn what_a_host_says_is_handed_on_with_its_code_and_reason_and_nothing_else_is() {
        let said = |code, reason: &str, domain: &str| {
            let info = ErrorDetails::with_error_info(reason, domain, HashMap::new());
            let status = Status::with_error_details(code, "words", info);
            let error = Error::of_host(&status);
            (error.code(), error.reason(), error.to_string())
        };
        let is = |code, reason: &str| (code, reason.to_owned(), "words".to_owned());
        let forbidden = (Code::PermissionDenied, "EXEC_FORBIDDEN");
        assert_eq!(said(forbidden.0, forbidden.1, DOMAIN), is(forbidden.0, forbidden.1));
        // Codes of the link, words of others: the host cannot be asked now.
        for (code, reason, domain) in [
            (Code::Unauthenticated, "TOKEN_EXPIRED", DOMAIN),
            (Code::PermissionDenied, "EXEC_FORBIDDEN", "elsewhere"),
            (Code::PermissionDenied, "no reason\n", DOMAIN),
            (Code::NotFound, "", DOMAIN),
        ] {
            assert_eq!(said(code, reason, domain), is(Code::Unavailable, "HOST_AWAY"));
        }
        let bare = Error::of_host(&Status::unknown("broken pipe"));
        assert_eq!((bare.code(), bare.reason().as_str()), (Code::Unavailable, "HOST_AWAY"));
    }

    #[test]
    fn a_cause_is_printed_once() {
        let cause = std::io::Error::other("disk is gone");
        let error = Error::internal("cannot read the blob", cause);
        assert_eq!(Chain(&error).to_string(), "cannot read the blob: disk is gone");
    }

    #[test]
    fn a_reason_is_stable_and_in_our_domain() {
        let status = Status::from(Error::not_found(Kind::Deployment, "iris"));
        assert_eq!(status.message(), "deployment \"iris\" does not exist");
        let info = status.get_error_details().error_info().unwrap().clone();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("DEPLOYMENT_NOT_FOUND", "berth"));
        assert_eq!(info.metadata["name"], "iris");
    }
}
