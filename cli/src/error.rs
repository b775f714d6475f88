//! What can go wrong, whose turn it is then, and the exit code that says so.

use std::fmt;

/// Whose turn it is now. One exit code each; scripts rely on them. (2 is clap's, for a command line
/// that is wrong.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request cannot be. Exit code 1.
    User,
    /// The server was not reached; the same command may work later. Exit code 3.
    Unavailable,
    /// Not permitted. Exit code 4.
    Denied,
    /// The rollout failed. Exit code 5.
    RolloutFailed,
    /// The rollout is done but hosts are deferred. Exit code 6.
    Deferred,
}

impl Kind {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::User => 1,
            Self::Unavailable => 3,
            Self::Denied => 4,
            Self::RolloutFailed => 5,
            Self::Deferred => 6,
        }
    }
}

/// An error as people see it.
#[derive(Debug)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
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
        write!(f, "error: {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
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

impl From<berth_proto::tls::TlsError> for Error {
    fn from(error: berth_proto::tls::TlsError) -> Self {
        Self::new(Kind::Unavailable, chain(&error))
            .hint("is the server running, and is this its address? See `berth context show`")
    }
}

impl From<hyper::Error> for Error {
    fn from(error: hyper::Error) -> Self {
        Self::new(Kind::Unavailable, chain(&error))
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        use tonic_types::StatusExt as _;
        let kind = if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) {
            Kind::Unavailable
        } else if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) {
            Kind::Denied
        } else {
            Kind::User
        };
        let details = status.get_error_details();
        let mut message = berth_proto::escape::for_terminal(status.message());
        if let Some(bad) = details.bad_request()
            && bad.field_violations.len() > 1
        {
            message = format!("{} problems:", bad.field_violations.len());
            for field in &bad.field_violations {
                let line = format!("{}: {}", field.field, field.description);
                message.push_str("\n  ");
                message.push_str(&berth_proto::escape::for_terminal(&line));
            }
        }
        Self::new(kind, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_an_exit_code_of_its_own() {
        let kinds =
            [Kind::User, Kind::Unavailable, Kind::Denied, Kind::RolloutFailed, Kind::Deferred];
        assert_eq!(kinds.map(Kind::code), [1, 3, 4, 5, 6]);
    }
}
