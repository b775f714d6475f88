//! Health checks, asked of the container's own address.

use crate::engine::{Engine, ExecSpec};
use crate::state::Running;
use berth_proto::values::{HealthCheck, Probe};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// Asks once, within the check's timeout.
///
/// # Errors
/// Why it is not healthy, in words.
pub async fn check(
    engine: &dyn Engine,
    running: &Running,
    check: &HealthCheck,
) -> Result<(), String> {
    let limit = Duration::from_millis(check.timeout_ms);
    match tokio::time::timeout(limit, ask(engine, running, &check.probe)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no answer within {} ms", check.timeout_ms)),
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

async fn ask(engine: &dyn Engine, running: &Running, probe: &Probe) -> Result<(), String> {
    match probe {
        Probe::Tcp { port } => connect(running, port).await.map(|_| ()),
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
                Err(format!("{path} answered {status}"))
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
            let answer = response.into_body().collect().await.map_err(|e| e.to_string())?;
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
                Err(format!("the health service does not say SERVING (status {status})"))
            }
        }
        Probe::Exec { command } => {
            let spec = ExecSpec { command: command.clone(), ..ExecSpec::default() };
            let mut exec = engine.exec(&running.id, &spec).await.map_err(|e| e.to_string())?;
            while let Some(Ok(_)) = exec.output.next().await {}
            match engine.exec_exit(&exec.id).await.map_err(|e| e.to_string())? {
                Some(0) => Ok(()),
                Some(code) => Err(format!("the check's program ended with {code}")),
                None => Err("the check's program has not ended".to_owned()),
            }
        }
    }
}
