//! What can go wrong with a request, and what the caller is told to do about it.
//!
//! The only file that makes HTTP statuses and gRPC statuses of errors.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use http::StatusCode;
use tonic::{Code, Status};

use crate::tensor::InputError;

/// An error of the engine, whichever that is.
pub type EngineError = Box<dyn StdError + Send + Sync>;

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another model was asked for.
    #[error("model `{asked}` is not served here; this server has `{served}`")]
    UnknownModel {
        /// The name in the request.
        asked: String,
        /// The name this server was given.
        served: String,
    },

    /// Another version was asked for.
    #[error("version `{asked}` of model `{model}` is not served here; this server has `{served}`")]
    UnknownVersion {
        /// The model's name.
        model: String,
        /// The version in the request.
        asked: String,
        /// The version this server was given.
        served: String,
    },

    /// There is nothing at this path.
    #[error("there is nothing at {path}; the models are under /v2/models")]
    UnknownPath {
        /// The path of the request.
        path: String,
    },

    /// The path takes another method.
    #[error("{path} does not take {method}")]
    WrongMethod {
        /// The path of the request.
        path: String,
        /// The method of the request.
        method: String,
    },

    /// The model is not loaded yet.
    #[error("model `{model}` is still loading")]
    Loading {
        /// The model's name.
        model: String,
    },

    /// The server finishes what it has and ends.
    #[error("the server is shutting down")]
    Stopping,

    /// The queue is full.
    #[error("the queue is full ({limit} requests in progress); send the request again later")]
    QueueFull {
        /// How many requests may be in progress.
        limit: usize,
    },

    /// The answer would come too late.
    #[error("no answer within {} ms", limit.as_millis())]
    TooLate {
        /// How long the request was allowed to take.
        limit: Duration,
    },

    /// The request is too large.
    #[error("the request is larger than the {limit} bytes this server reads")]
    TooLarge {
        /// The largest request that is read, in bytes.
        limit: usize,
    },

    /// The request's body broke off.
    #[error("the request's body could not be read")]
    Body(#[source] axum::Error),

    /// The body is compressed.
    #[error("the body is encoded with {encoding}; this server reads plain ones")]
    Encoded {
        /// What the header says.
        encoding: String,
    },

    /// The body is not the JSON that it should be.
    #[error("the request is not a valid inference request")]
    Json(#[source] serde_path_to_error::Error<serde_json::Error>),

    /// The request contradicts itself or the protocol.
    #[error("{0}")]
    Malformed(String),

    /// The tensors do not fit the model.
    #[error(transparent)]
    Input(#[from] InputError),

    /// The engine refused the input for a reason that the signature does not tell.
    #[error("the model does not take this input")]
    Refused(#[source] EngineError),

    /// The engine failed.
    #[error("the model failed on this input")]
    Failed(#[source] EngineError),

    /// The engine panicked; the server goes on.
    #[error("the model crashed on this input: {0}")]
    Crashed(String),

    /// The model gave something that its signature does not promise.
    #[error("the model broke its own signature: {0}")]
    BrokenSignature(String),
}

/// What became of a request: the label of the metrics, and what a caller should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Ok,
    /// The same request can never be right.
    Invalid,
    /// No such model, version or path.
    NotFound,
    /// Larger than this server reads.
    TooLarge,
    /// Send the same request again, later or elsewhere.
    Unavailable,
    /// Took longer than allowed.
    TooLate,
    /// The model failed.
    Failed,
}

impl Outcome {
    /// All outcomes, in the order of their index.
    pub const ALL: [Self; 7] = [
        Self::Ok,
        Self::Invalid,
        Self::NotFound,
        Self::TooLarge,
        Self::Unavailable,
        Self::TooLate,
        Self::Failed,
    ];

    /// The label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::TooLarge => "too_large",
            Self::Unavailable => "unavailable",
            Self::TooLate => "too_late",
            Self::Failed => "failed",
        }
    }

    /// The outcome that an HTTP status stands for.
    #[must_use]
    pub fn of_http(status: StatusCode) -> Self {
        match status {
            status if status.is_success() => Self::Ok,
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Self::NotFound,
            StatusCode::PAYLOAD_TOO_LARGE => Self::TooLarge,
            StatusCode::SERVICE_UNAVAILABLE => Self::Unavailable,
            StatusCode::GATEWAY_TIMEOUT => Self::TooLate,
            status if status.is_client_error() => Self::Invalid,
            _ => Self::Failed,
        }
    }

    /// The outcome that a gRPC code stands for.
    #[must_use]
    pub fn of_grpc(code: Code) -> Self {
        match code {
            Code::Ok => Self::Ok,
            Code::InvalidArgument | Code::Cancelled | Code::FailedPrecondition => Self::Invalid,
            Code::NotFound | Code::Unimplemented => Self::NotFound,
            Code::ResourceExhausted | Code::OutOfRange => Self::TooLarge,
            Code::Unavailable => Self::Unavailable,
            Code::DeadlineExceeded => Self::TooLate,
            Code::Unknown
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Aborted
            | Code::Internal
            | Code::DataLoss
            | Code::Unauthenticated => Self::Failed,
        }
    }
}

impl Error {
    /// What the caller should do next.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::UnknownModel { .. }
            | Self::UnknownVersion { .. }
            | Self::UnknownPath { .. }
            | Self::WrongMethod { .. } => Outcome::NotFound,
            Self::Loading { .. } | Self::Stopping | Self::QueueFull { .. } => Outcome::Unavailable,
            Self::TooLate { .. } => Outcome::TooLate,
            Self::TooLarge { .. } => Outcome::TooLarge,
            Self::Body(_)
            | Self::Encoded { .. }
            | Self::Json(_)
            | Self::Malformed(_)
            | Self::Input(_)
            | Self::Refused(_) => Outcome::Invalid,
            Self::Failed(_) | Self::Crashed(_) | Self::BrokenSignature(_) => Outcome::Failed,
        }
    }

    /// The HTTP status.
    #[must_use]
    pub fn http_status(&self) -> StatusCode {
        if matches!(self, Self::WrongMethod { .. }) {
            return StatusCode::METHOD_NOT_ALLOWED;
        }
        if matches!(self, Self::Encoded { .. }) {
            return StatusCode::UNSUPPORTED_MEDIA_TYPE;
        }
        match self.outcome() {
            Outcome::Ok => StatusCode::OK,
            Outcome::Invalid => StatusCode::BAD_REQUEST,
            Outcome::NotFound => StatusCode::NOT_FOUND,
            Outcome::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Outcome::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Outcome::TooLate => StatusCode::GATEWAY_TIMEOUT,
            Outcome::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The gRPC code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self.outcome() {
            Outcome::Ok => Code::Ok,
            Outcome::Invalid => Code::InvalidArgument,
            Outcome::NotFound => Code::NotFound,
            Outcome::TooLarge => Code::ResourceExhausted,
            Outcome::Unavailable => Code::Unavailable,
            Outcome::TooLate => Code::DeadlineExceeded,
            Outcome::Failed => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), Chain(&error).to_string())
    }
}

/// What a gRPC caller gets for a path that is no call of ours: the code that generic clients know.
#[must_use]
pub fn unimplemented(error: &Error) -> http::Response<tonic::body::Body> {
    Status::unimplemented(Chain(error).to_string()).into_http()
}

/// Prints an error and its causes once each: `a: b: c`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn StdError + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries print their cause as part of themselves: do not say it twice.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_sent_again_says_so_in_both_protocols() {
        for error in [
            Error::Stopping,
            Error::QueueFull { limit: 1 },
            Error::Loading { model: "m".to_owned() },
        ] {
            assert_eq!(error.http_status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(error.code(), Code::Unavailable);
        }
    }

    #[test]
    fn both_protocols_give_the_same_outcome() {
        for error in [
            Error::Stopping,
            Error::TooLarge { limit: 1 },
            Error::TooLate { limit: Duration::from_secs(1) },
            Error::Malformed(String::new()),
            Error::Crashed(String::new()),
            Error::UnknownPath { path: String::new() },
            Error::WrongMethod { path: String::new(), method: String::new() },
            Error::Encoded { encoding: String::new() },
        ] {
            assert_eq!(Outcome::of_http(error.http_status()), error.outcome());
            assert_eq!(Outcome::of_grpc(error.code()), error.outcome());
        }
    }

    #[test]
    fn a_chain_names_each_cause_once() {
        let json = serde_json::from_str::<u8>("x").unwrap_err();
        let path =
            serde_path_to_error::deserialize::<_, u8>(&mut serde_json::Deserializer::from_str("x"));
        let error = Error::Json(path.unwrap_err());
        let text = Chain(&error).to_string();
        assert_eq!(text.matches(&json.to_string()).count(), 1, "{text}");
    }
}
