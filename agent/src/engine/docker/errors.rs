//! What the engine's errors mean, by status code; the few it says in words only are together here.

use super::CLIENT_TIMEOUT_S;
use crate::engine::{Call, EngineError};
use bollard::errors::Error as ClientError;
use std::time::Duration;

/// What an error of the library means for `call` on `what`.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors, most of which cannot come"
)]
pub(super) fn translate(call: Call, what: &str, error: ClientError) -> EngineError {
    match error {
        ClientError::DockerResponseServerError { status_code, message } => {
            by_status(call, what, status_code, message)
        }
        ClientError::DockerStreamError { error } => by_words(call, what, 0, error),
        ClientError::SocketNotFoundError(path) => {
            EngineError::Unreachable(format!("there is no socket {path}"))
        }
        ClientError::IOError { err } => EngineError::Unreachable(err.to_string()),
        ClientError::HyperResponseError { err } => EngineError::Unreachable(chain(&err)),
        ClientError::HyperLegacyError { err } => EngineError::Unreachable(chain(&err)),
        ClientError::RequestTimeoutError => {
            EngineError::Timeout { call, after: Duration::from_secs(CLIENT_TIMEOUT_S) }
        }
        other => EngineError::Other { status: 0, message: chain(&other) },
    }
}

/// An error and its causes in one line, for a message: the library's own error says no cause.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = next.source();
    }
    text
}

pub(super) fn by_status(call: Call, what: &str, status: u16, message: String) -> EngineError {
    match (status, call) {
        (401 | 403, _) => EngineError::Denied(message),
        // A create's 404 is about its image: name, labels and options cannot be "not found".
        (404, Call::Create) => EngineError::NoSuchImage(what.into()),
        (404, Call::Pull) => by_words(call, what, status, message),
        (404, Call::Image) => EngineError::NoSuchImage(what.into()),
        (404, _) => EngineError::NotFound(format!("{what} ({message})")),
        (409, Call::Create) => EngineError::NameTaken(what_name(&message, what)),
        _ => by_words(call, what, status, message),
    }
}

/// What engines say in words only: a port in use is a 500 (Docker) or 500 (podman) of `start`; a
/// name that is taken is a 500 of podman; the registry's refusals come as 404, as 500 or inside
/// the stream.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the calls that have words of their own are named"
)]
pub(super) fn by_words(call: Call, what: &str, status: u16, message: String) -> EngineError {
    let lower = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    match call {
        Call::Start | Call::Create
            if says(&[
                "port is already allocated",
                "address already in use",
                "ports are not available",
            ]) =>
        {
            EngineError::PortInUse(message)
        }
        Call::Create if says(&["name is already in use", "already in use by"]) => {
            EngineError::NameTaken(what_name(&message, what))
        }
        Call::Pull
            if says(&[
                "unauthorized",
                "no basic auth",
                "access denied",
                "authentication required",
            ]) =>
        {
            EngineError::Denied(message)
        }
        Call::Pull if status == 404 || says(&["manifest unknown", "not found", "name unknown"]) => {
            EngineError::NoSuchImage(what.into())
        }
        _ => EngineError::Other { status, message },
    }
}

/// The name in an engine's words about a conflict, else `what`.
pub(super) fn what_name(message: &str, what: &str) -> String {
    message.split('"').nth(1).map_or(what, |name| name.trim_start_matches('/')).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status_code: u16, message: &str) -> ClientError {
        ClientError::DockerResponseServerError { status_code, message: message.into() }
    }

    #[test]
    fn answers_of_both_engines_mean_the_same() {
        let taken = EngineError::NameTaken("b".into());
        let docker = r#"Conflict. The container name "/b" is already in use by container "c"."#;
        let podman = r#"container create: creating container storage: the container name "b" is already in use by c."#;
        assert_eq!(translate(Call::Create, "i", answer(409, docker)), taken);
        assert_eq!(translate(Call::Create, "i", answer(500, podman)), taken);

        let port = "driver failed: Bind for 0.0.0.0:80 failed: port is already allocated";
        assert!(matches!(
            translate(Call::Start, "c", answer(500, port)),
            EngineError::PortInUse(_)
        ));
        assert!(matches!(
            translate(Call::Pull, "i", answer(404, "pull access denied for x")),
            EngineError::Denied(_)
        ));
        assert_eq!(
            translate(
                Call::Pull,
                "i",
                ClientError::DockerStreamError { error: "manifest unknown".into() }
            ),
            EngineError::NoSuchImage("i".into())
        );
        assert_eq!(
            translate(Call::Create, "i", answer(404, "No such image: i")),
            EngineError::NoSuchImage("i".into())
        );
    }
}
