//! Why the agent does not do what the server asks of it on a reverse connection, and the only place
//! here that makes a gRPC status.
//!
//! Every refusal has a stable reason in `google.rpc.ErrorInfo`, domain `berth`, as the server's own
//! have; the server hands code and reason on to whoever asked.

use crate::engine::EngineError;
use std::collections::HashMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Why it is not done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Nothing of that replica is here.
    #[error("no such replica is on this host")]
    NoReplica,
    /// It has had no such attempt, or its container is gone.
    #[error("there is no such attempt")]
    NoAttempt,
    /// It is here and does not run.
    #[error("the replica does not run here")]
    NotRunning,
    /// By this host's policy.
    #[error("this host forbids running commands in containers")]
    ExecForbidden,
    /// The engine does not run the command.
    #[error("the command was not started: {0}")]
    ExecFailed(EngineError),
    /// The engine does not give the container's output, by its logging driver perhaps.
    #[error("the engine does not give its output: {0}")]
    LogsFailed(EngineError),
    /// A call did not begin with what it is about.
    #[error("the first message must be start")]
    NoStart,
    /// The deployment has no such port, or its container no address.
    #[error("{0}")]
    NoPort(String),
    /// The program does not take the connection.
    #[error("{0}")]
    PortRefused(String),
    /// The program's connection broke.
    #[error("the replica's connection broke: {0}")]
    Broken(std::io::Error),
    /// The engine does not answer.
    #[error("the engine does not answer: {0}")]
    EngineAway(EngineError),
}

impl Refusal {
    /// What the caller should do next.
    fn code(&self) -> Code {
        match self {
            Self::NoReplica | Self::NoAttempt | Self::NoPort(_) => Code::NotFound,
            Self::NotRunning | Self::ExecFailed(_) | Self::LogsFailed(_) => {
                Code::FailedPrecondition
            }
            Self::ExecForbidden => Code::PermissionDenied,
            Self::NoStart => Code::InvalidArgument,
            Self::PortRefused(_) | Self::Broken(_) | Self::EngineAway(_) => Code::Unavailable,
        }
    }

    /// The stable word programs go by.
    fn reason(&self) -> &'static str {
        match self {
            Self::NoReplica => "REPLICA_NOT_FOUND",
            Self::NoAttempt => "ATTEMPT_NOT_FOUND",
            Self::NotRunning => "REPLICA_NOT_RUNNING",
            Self::ExecForbidden => "EXEC_FORBIDDEN",
            Self::ExecFailed(_) => "EXEC_FAILED",
            Self::LogsFailed(_) => "LOGS_FAILED",
            Self::NoStart => "INVALID",
            Self::NoPort(_) => "PORT_NOT_FOUND",
            Self::PortRefused(_) => "PORT_REFUSED",
            Self::Broken(_) => "CONNECTION_BROKEN",
            Self::EngineAway(_) => "ENGINE_AWAY",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let details = ErrorDetails::with_error_info(refusal.reason(), "berth", HashMap::new());
        Self::with_error_details(refusal.code(), refusal.to_string(), details)
    }
}
