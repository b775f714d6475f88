//! Why a session is over, and what its agent is told.

use crate::session::Closed;
use berth_proto::farewell::Farewell;

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The connection is gone.
    #[error("the connection was lost")]
    Lost,
    /// The server stops.
    #[error("the server stops")]
    Stopping,
    /// A newer session of the host.
    #[error("a newer session took over")]
    Superseded,
    /// The host was removed.
    #[error("the host was removed")]
    Removed,
    /// The ledger knows no such host.
    #[error("the host is not known")]
    Unknown,
    /// Two boots share the identity.
    #[error("two boots share the identity")]
    Quarantined,
    /// The ledger did not take what the agent said.
    #[error("what the agent said could not be kept")]
    Unavailable,
    /// The machine ended it.
    #[error(transparent)]
    Machine(Closed),
}

/// What an agent is told at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// What it has to make of it.
    pub farewell: Farewell,
    /// The stable word for it.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Ended {
    /// What the machine has ended its session for.
    #[must_use]
    pub fn of_machine(why: Closed) -> Self {
        match why {
            Closed::Removed => Self::Removed,
            other @ (Closed::Protocol(_)
            | Closed::WrongHost
            | Closed::Idle(_)
            | Closed::NoHello
            | Closed::Overrun
            | Closed::Unanswered(_)) => Self::Machine(other),
        }
    }

    /// What the agent is told; `None`: there is nobody to tell.
    #[must_use]
    pub fn words(&self) -> Option<Words> {
        let (farewell, reason, message) = match self {
            Self::Lost => return None,
            Self::Stopping => (Farewell::Again, "SERVER_STOPPING", "the server stops; dial again"),
            Self::Superseded => (
                Farewell::Superseded,
                "SESSION_SUPERSEDED",
                "another session of this host has taken over",
            ),
            Self::Removed => (Farewell::Denied, "HOST_REMOVED", "this host was removed"),
            Self::Unknown => {
                (Farewell::Denied, "HOST_UNKNOWN", "no host with this certificate is known")
            }
            Self::Quarantined => (
                if bug!(QuarantinedDialsOn) { Farewell::Again } else { Farewell::Denied },
                "HOST_QUARANTINED",
                "two hosts use this identity; an operator has to release the quarantine",
            ),
            Self::Unavailable => (
                if bug!(BusyIsForGood) { Farewell::Denied } else { Farewell::Again },
                "LEDGER_BUSY",
                "the server cannot register the host now",
            ),
            Self::Machine(Closed::WrongHost) => {
                (Farewell::Denied, "WRONG_HOST", "the hello names another host")
            }
            Self::Machine(Closed::Protocol(what)) => {
                let message = format!("the session's protocol was broken: {what}");
                return Some(Words { farewell: Farewell::Invalid, reason: "INVALID", message });
            }
            Self::Machine(
                Closed::Idle(_)
                | Closed::NoHello
                | Closed::Overrun
                | Closed::Unanswered(_)
                | Closed::Removed,
            ) => (Farewell::Again, "SESSION_ENDED", "the session was ended; dial again"),
        };
        Some(Words { farewell, reason, message: message.to_owned() })
    }
}
