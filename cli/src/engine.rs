//! The Docker engine of whoever calls: `DOCKER_HOST`, or the local socket.
//!
//! Beside the agent's adapter, this and `berth build` and `berth image`, which work through it, are
//! the places that name the engine's library. They share nothing with it: the agent's speaks
//! containers, these build and export images for somebody who sits at the engine, and the command line
//! must not depend on the agent.

use crate::error::{Error, Kind, Result};

/// Where the engine listens unless `DOCKER_HOST` says otherwise.
const SOCKET: &str = "/var/run/docker.sock";
/// A build or an export answers nothing for as long as one step takes; an hour is the longest that a
/// step may.
const QUIET_SECONDS: u64 = 3600;

/// Connects, and agrees on a version of the engine's API.
pub async fn connect() -> Result<bollard::Docker> {
    let place = std::env::var("DOCKER_HOST").unwrap_or_default();
    let path = match place.strip_prefix("unix://") {
        Some(path) => path,
        None if place.is_empty() => SOCKET,
        None => {
            return Err(Error::user(format!("DOCKER_HOST is {place}, which is no local engine"))
                .hint("set it to unix:///path/to/docker.sock, or build and push with docker"));
        }
    };
    let engine =
        bollard::Docker::connect_with_unix(path, QUIET_SECONDS, bollard::API_DEFAULT_VERSION)
            .map_err(|e| away(path, &e))?;
    engine.negotiate_version().await.map_err(|e| away(path, &e))
}

fn away(path: &str, error: &bollard::errors::Error) -> Error {
    Error::new(Kind::Unavailable, format!("no Docker engine answers at {path}: {error}"))
        .hint("is it running, and may you use it? DOCKER_HOST names another one")
}

/// What the engine says about a call, without the wrapping.
pub fn explain(error: bollard::errors::Error) -> Error {
    let bollard::errors::Error::DockerResponseServerError { status_code, message } = error else {
        return error.into();
    };
    let said = berth_proto::escape::for_terminal(&message);
    let said = Error::user(format!("the engine says: {said}"));
    if status_code == 404 { said.hint("`docker images` shows what it has") } else { said }
}
