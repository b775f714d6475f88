//! Health checks, asked of the container's own address.

use crate::engine::{Engine, EngineError, ExecSpec};
use crate::state::Running;
use berth_agent_core::reconcile::Outcome;
use berth_proto::values::{HealthCheck, Probe};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// All of a health service's answer; it has seven bytes.
const GRPC_ANSWER: usize = 64 * 1024;

/// Why there was no good answer.
#[derive(Debug)]
enum No {
    /// The program, in words.
    Unhealthy(String),
    /// The engine, which says nothing of the program.
    NotAsked,
}

impl From<String> for No {
    fn from(words: String) -> Self {
        Self::Unhealthy(words)
    }
}

impl From<EngineError> for No {
    fn from(error: EngineError) -> Self {
        if error.is_engine_away() { Self::NotAsked } else { Self::Unhealthy(error.to_string()) }
    }
}

/// Commands of checks that had not ended when their time was up, by container: an engine goes on with
/// them, and another beside each would pile them up.
#[derive(Debug, Default)]
pub struct Unended(Mutex<BTreeMap<String, String>>);

impl Unended {
    /// Forgets those of containers that do not run any more.
    pub fn retain(&self, runs: impl Fn(&str) -> bool) {
        self.0.lock().retain(|container, _| runs(container));
    }

    fn of(&self, container: &str) -> Option<String> {
        self.0.lock().get(container).cloned()
    }

    fn begun(&self, container: &str, exec: &str) {
        self.0.lock().insert(container.to_owned(), exec.to_owned());
    }

    fn ended(&self, container: &str) {
        self.0.lock().remove(container);
    }
}

/// Asks once, within the check's timeout.
pub async fn check(
    engine: &dyn Engine,
    unended: &Unended,
    running: &Running,
    check: &HealthCheck,
) -> Outcome {
    let limit = Duration::from_millis(check.timeout_ms);
    match tokio::time::timeout(limit, ask(engine, unended, running, &check.probe)).await {
        Ok(Ok(())) => Outcome::Healthy,
        Ok(Err(No::Unhealthy(words))) => Outcome::Unhealthy(words),
        Ok(Err(No::NotAsked)) => Outcome::NotAsked,
        Err(_) => Outcome::Unhealthy(format!("no answer within {} ms", check.timeout_ms)),
    }
}

/// Where a port of a replica is reached.
///
/// # Errors
/// When it has no address or no such port.
pub fn address(running: &Running, port: &str) -> Result<SocketAddr, String> {
    let spec = &running.body.spec;
    let number = spec
        .ports
        .iter()
        .find(|p| p.name == port)
        .map(|p| p.container)
        .ok_or_else(|| format!("there is no port \"{port}\""))?;
    let ip = match running.ip {
        Some(ip) => ip,
        None if spec.privileges.host_network => [127, 0, 0, 1].into(),
        None => return Err("the container has no address".to_owned()),
    };
    Ok(SocketAddr::new(ip, number))
}

async fn connect(running: &Running, port: &str) -> Result<TcpStream, String> {
    let address = address(running, port)?;
    TcpStream::connect(address).await.map_err(|e| format!("{address}: {e}"))
}

async fn ask(
    engine: &dyn Engine,
    unended: &Unended,
    running: &Running,
    probe: &Probe,
) -> Result<(), No> {
    match probe {
        Probe::Tcp { port } => Ok(connect(running, port).await.map(drop)?),
        Probe::Http { path, port } => {
            let stream = connect(running, port).await?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(|e| e.to_string())?;
            tokio::spawn(connection);
            let request = http::Request::get(path)
                .header(http::header::HOST, "replica")
                .header(http::header::USER_AGENT, "berth-agent")
                .body(Empty::<Bytes>::new())
                .map_err(|e| e.to_string())?;
            let status = sender.send_request(request).await.map_err(|e| e.to_string())?.status();
            if (200..400).contains(&status.as_u16()) {
                Ok(())
            } else {
                Err(format!("{path} answered {status}").into())
            }
        }
        Probe::Grpc { port, service } => {
            let stream = connect(running, port).await?;
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                    .await
                    .map_err(|e| e.to_string())?;
            tokio::spawn(connection);
            // grpc.health.v1.HealthCheckRequest { service = 1 }, framed.
            let mut message = Vec::new();
            if !service.is_empty() {
                prost::encoding::string::encode(1, service, &mut message);
            }
            let mut body = vec![0];
            body.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
            body.extend_from_slice(&message);
            let request = http::Request::post("http://replica/grpc.health.v1.Health/Check")
                .header(http::header::CONTENT_TYPE, "application/grpc")
                .header(http::header::TE, "trailers")
                .body(Full::new(Bytes::from(body)))
                .map_err(|e| e.to_string())?;
            let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
            let body = Limited::new(response.into_body(), GRPC_ANSWER);
            let answer = body.collect().await.map_err(|e| e.to_string())?;
            let status = answer
                .trailers()
                .and_then(|t| t.get("grpc-status"))
                .and_then(|v| v.to_str().ok())
                .unwrap_or("0")
                .to_owned();
            // HealthCheckResponse { status = 1 }, SERVING is 1.
            let bytes = answer.to_bytes();
            if status == "0" && bytes.get(5..7) == Some(&[0x08, 0x01]) {
                Ok(())
            } else {
                Err(format!("the health service does not say SERVING (status {status})").into())
            }
        }
        Probe::Exec { command } => {
            if let Some(before) = unended.of(&running.id) {
                match engine.exec_exit(&before).await {
                    Ok(None) => {
                        let words = "the check's program of last time has not ended";
                        return Err(words.to_owned().into());
                    }
                    // An engine that was started anew knows nothing of it.
                    Ok(Some(_)) | Err(EngineError::NotFound(_)) => unended.ended(&running.id),
                    Err(error) => return Err(error.into()),
                }
            }
            let spec = ExecSpec { command: command.clone(), ..ExecSpec::default() };
            let mut exec = engine.exec(&running.id, &spec).await?;
            // Noted first: the time may be up at any point from here on.
            unended.begun(&running.id, &exec.id);
            while let Some(piece) = exec.output.next().await {
                piece?;
            }
            match engine.exec_exit(&exec.id).await? {
                Some(code) => {
                    unended.ended(&running.id);
                    match code {
                        0 => Ok(()),
                        code => Err(format!("the check's program ended with {code}").into()),
                    }
                }
                None => Err("the check's program has not ended".to_owned().into()),
            }
        }
    }
}

#[cfg(test)]
#[path = "probes_tests.rs"]
mod tests;
