//! What can go wrong, whose turn it is then, and the exit code that says so.

use berth_proto::escape::for_terminal;
use std::fmt;

/// Whose turn it is now. One exit code each; scripts rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request cannot be. Exit code 1.
    User,
    /// The command line is wrong, as clap's own errors. Exit code 2.
    Usage,
    /// The server was not reached; the same command may work later. Exit code 3.
    Unavailable,
    /// Not permitted. Exit code 4.
    Denied,
    /// The rollout failed. Exit code 5.
    RolloutFailed,
    /// The rollout is done but hosts are deferred. Exit code 6.
    Deferred,
    /// Nobody reads what is printed any more. Exit code 0 and no words, as of any filter.
    ReaderGone,
}

impl Kind {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::User => 1,
            Self::Usage => 2,
            Self::Unavailable => 3,
            Self::Denied => 4,
            Self::RolloutFailed => 5,
            Self::Deferred => 6,
            Self::ReaderGone => 0,
        }
    }
}

/// An error as people see it.
#[derive(Debug)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
    /// The server's stable word for it; empty: it is not from the server.
    pub reason: String,
    /// What was named and does not exist.
    pub named: Option<String>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, reason: String::new(), named: None }
    }
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Kind::User, message)
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use crate::style::{Paint, Stream};
        let paint = |ink, text| Paint { on: Stream::Stderr, ink, text };
        write!(f, "{} {}", paint(crate::style::Ink::Bad, "error:"), self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n{} {hint}", paint(crate::style::Ink::Note, "hint:"))?;
        }
        Ok(())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

macro_rules! user_error {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Error {
            fn from(error: $kind) -> Self {
                Self::user(chain(&error))
            }
        }
    )*};
}
user_error!(
    std::io::Error,
    serde_json::Error,
    toml::de::Error,
    toml::ser::Error,
    http::Error,
    berth_proto::convert::Problems,
    bollard::errors::Error
);

/// What helps when one of the ends does not believe the other.
const DISTRUST: &str = "the server and the context do not belong together, the certificate has ended, or the \
    cluster's root was changed and this context not renewed in time: `berth context list` shows others; a \
    server's admin can make a new one with `berth user create` (after `berth user revoke`)";

impl From<berth_proto::tls::TlsError> for Error {
    fn from(error: berth_proto::tls::TlsError) -> Self {
        use berth_proto::tls::TlsError;
        let hint = match &error {
            TlsError::Connect { source, .. } if is_about_trust(source) => DISTRUST,
            TlsError::Connect { .. } | TlsError::TimedOut(_) => {
                "is the server running, and is this its address? See `berth context show`"
            }
            TlsError::Pem { .. }
            | TlsError::NoIdentity
            | TlsError::Rustls(_)
            | TlsError::Make(_) => {
                "the context is damaged: take it over again with `berth context create`"
            }
        };
        let kind = match &error {
            TlsError::Connect { .. } | TlsError::TimedOut(_) => Kind::Unavailable,
            TlsError::Pem { .. }
            | TlsError::NoIdentity
            | TlsError::Rustls(_)
            | TlsError::Make(_) => Kind::User,
        };
        Self::new(kind, chain(&error)).hint(hint)
    }
}

/// Whether an answer was no gRPC at all: the client's own words for that.
fn is_another_door(words: &str) -> bool {
    ["grpc-status header missing", "invalid compression flag"].iter().any(|w| words.contains(w))
}

/// Whether that is what broke a connection: a client learns only after its handshake that its certificate
/// is not taken. TLS tells it as data that is not valid; HTTP/2 hands on no more than that.
fn is_distrust(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::InvalidData)
}

/// Whether a connection failed because one of the ends did not believe the other.
fn is_about_trust(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    matches!(
        inner,
        Some(
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::AlertReceived(_)
                | rustls::Error::NoCertificatesPresented
        )
    )
}

impl From<hyper::Error> for Error {
    fn from(error: hyper::Error) -> Self {
        let told = Self::new(Kind::Unavailable, chain(&error));
        if is_distrust(&error) { told.hint(DISTRUST) } else { told }
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        use std::error::Error as _;
        use tonic::Code;
        use tonic_types::StatusExt as _;
        // Not the server's word, but that of the connection to it: it alone has a cause.
        if let Some(cause) = status.source() {
            let words =
                format!("the connection broke before the server answered: {}", chain(cause));
            let hint = match is_distrust(cause) {
                true => DISTRUST,
                false => "whether it was done is not known; the same command may be given again",
            };
            return Self::new(Kind::Unavailable, for_terminal(&words)).hint(hint);
        }
        if is_another_door(status.message()) {
            return Self::new(
                Kind::Unavailable,
                "what answers there is not the server's control door",
            )
            .hint("it listens on port 7443 by default; `berth context show` names the endpoint");
        }
        let kind = if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) {
            Kind::Unavailable
        } else if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) {
            Kind::Denied
        } else {
            Kind::User
        };
        let details = status.get_error_details();
        let mut message = for_terminal(status.message());
        if let Some(bad) = details.bad_request()
            && bad.field_violations.len() > 1
        {
            message = format!("{} problems:", bad.field_violations.len());
            for field in &bad.field_violations {
                let line = format!("{}: {}", field.field, field.description);
                message.push_str("\n  ");
                message.push_str(&for_terminal(&line));
            }
        }
        // By the name it has on the command line.
        if let Some([filter]) = details.bad_request().map(|bad| &bad.field_violations[..])
            && filter.field == "page.filter"
        {
            message = for_terminal(&format!("--filter: {}", filter.description));
        }
        if message.is_empty() {
            message = format!("the server answered {:?}", status.code());
        }
        let mut error = Self::new(kind, message);
        if let Some(info) = details.error_info().filter(|info| info.domain == "berth") {
            error.reason.clone_from(&info.reason);
            error.named = info.metadata.get("name").cloned();
        }
        error.hint = crate::hints::of(&error.reason, status.code()).map(str::to_owned);
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_an_exit_code_of_its_own() {
        let kinds = [
            Kind::User,
            Kind::Usage,
            Kind::Unavailable,
            Kind::Denied,
            Kind::RolloutFailed,
            Kind::Deferred,
            Kind::ReaderGone,
        ];
        assert_eq!(kinds.map(Kind::code), [1, 2, 3, 4, 5, 6, 0]);
    }

    #[test]
    fn every_wrong_field_is_listed_and_the_servers_text_cannot_act() {
        use tonic_types::{ErrorDetails, StatusExt as _};
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("a.yaml: spec.x", "is \u{1b}[31mwrong");
        details.add_bad_request_violation("b.yaml: spec.y", "is wrong, too");
        let code = tonic::Code::InvalidArgument;
        let error = Error::from(tonic::Status::with_error_details(code, "first", details));
        assert_eq!(error.kind, Kind::User);
        assert_eq!(
            error.message,
            "2 problems:\n  a.yaml: spec.x: is \\u{1b}[31mwrong\n  b.yaml: spec.y: is wrong, too"
        );
    }

    #[test]
    fn a_wrong_filter_is_told_by_its_name_here() {
        use tonic_types::{ErrorDetails, StatusExt as _};
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("page.filter", "no such field");
        let code = tonic::Code::InvalidArgument;
        let status = tonic::Status::with_error_details(code, "page.filter: no such field", details);
        assert_eq!(Error::from(status).message, "--filter: no such field");
    }

    #[test]
    fn a_connection_that_breaks_is_the_servers_absence_whatever_its_code() {
        let cause = std::io::Error::other("reset");
        let error = Error::from(tonic::Status::from_error(Box::new(cause)));
        assert_eq!(error.kind, Kind::Unavailable);
        assert!(error.message.ends_with("reset"), "{}", error.message);
    }

    #[test]
    fn the_code_says_whose_turn_it_is() {
        use tonic::{Code, Status};
        for (code, kind) in [
            (Code::Unavailable, Kind::Unavailable),
            (Code::DeadlineExceeded, Kind::Unavailable),
            (Code::PermissionDenied, Kind::Denied),
            (Code::Unauthenticated, Kind::Denied),
            (Code::NotFound, Kind::User),
            (Code::FailedPrecondition, Kind::User),
        ] {
            let error = Error::from(Status::new(code, "x"));
            assert_eq!(error.kind, kind, "{code:?}");
        }
    }
}
