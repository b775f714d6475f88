//! What the agent serves on a reverse connection: logs, commands, and a replica's ports.
//!
//! Names replicas, never addresses: nothing but our own containers can be reached.

use crate::engine::{Engine, ExecSpec, LogChunk, LogQuery, Source};
use crate::probes;
use crate::state::Shared;
use berth_proto::agent::host_service_server::HostService;
use berth_proto::agent::*;
use berth_proto::api::{LogLine, OutputStream};
use berth_proto::ids::ReplicaUid;
use futures_util::StreamExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Frames on their way.
const QUEUE: usize = 8;
/// The contract's bound on a frame.
const FRAME: usize = 64 * 1024;
/// Reaching a container on this machine.
const CONNECT: Duration = Duration::from_secs(3);
/// Lines in one message.
const LINES: usize = 256;

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Clone)]
pub struct Served {
    /// What is known.
    pub shared: Arc<Shared>,
    /// The engine.
    pub engine: Arc<dyn Engine>,
}

fn replica(text: &str) -> Result<ReplicaUid, Status> {
    text.parse().map_err(|_| Status::not_found("no such replica is on this host"))
}

fn line(chunk: LogChunk, attempt: u32) -> LogLine {
    let mut text = chunk.bytes.to_vec();
    while text.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
        text.pop();
    }
    text.truncate(FRAME);
    let stamp = chunk.stamp_ns.unwrap_or_default();
    LogLine {
        time: Some(prost_types::Timestamp {
            seconds: i64::try_from(stamp.div_euclid(1_000_000_000)).unwrap_or(0),
            nanos: i32::try_from(stamp.rem_euclid(1_000_000_000)).unwrap_or(0),
        }),
        stream: match chunk.source {
            Source::Stdout => OutputStream::Stdout,
            Source::Stderr => OutputStream::Stderr,
        } as i32,
        text,
        attempt,
        ..LogLine::default()
    }
}

#[tonic::async_trait]
impl HostService for Served {
    type LogsStream = Sent<LogsResponse>;

    async fn logs(
        &self,
        request: Request<LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let r = request.into_inner();
        let uid = replica(&r.replica_uid)?;
        let of = |shared: &Shared| shared.inner.lock().containers.get(&uid).cloned();
        let attempts = of(&self.shared)
            .ok_or_else(|| Status::not_found("the replica has no container here"))?;
        let chosen = if r.previous { attempts.get(1) } else { attempts.first() };
        let (mut id, mut attempt) =
            chosen.cloned().ok_or_else(|| Status::not_found("there is no such attempt"))?;
        let since = |t: &prost_types::Timestamp| {
            i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos)
        };
        let mut query = LogQuery {
            follow: r.follow && !r.previous,
            since_ns: r.since.as_ref().map(since),
            tail: r.tail,
            timestamps: true,
        };
        let (tx, rx) = mpsc::channel(QUEUE);
        let (shared, engine) = (Arc::clone(&self.shared), Arc::clone(&self.engine));
        tokio::spawn(async move {
            loop {
                let mut chunks = engine.logs(&id, query.clone()).ready_chunks(LINES);
                loop {
                    let next = tokio::select! {
                        // Cancel-safe: dropping the stream ends the engine's call.
                        next = chunks.next() => next,
                        () = tx.closed() => return,
                    };
                    let Some(batch) = next else { break };
                    let mut lines = Vec::new();
                    for item in batch {
                        match item {
                            Ok(chunk) => lines.push(line(chunk, attempt)),
                            Err(error) => {
                                let _ = tx.send(Err(Status::unavailable(error.to_string()))).await;
                                return;
                            }
                        }
                    }
                    if tx.send(Ok(LogsResponse { lines })).await.is_err() {
                        return;
                    }
                }
                if !query.follow {
                    return;
                }
                // The program has ended: go on with the next attempt when there is one.
                let mut news = shared.news.subscribe();
                loop {
                    let newest =
                        shared.inner.lock().containers.get(&uid).and_then(|l| l.first().cloned());
                    match newest {
                        None => return,
                        Some((next, number)) if number > attempt => {
                            (id, attempt) = (next, number);
                            query = LogQuery { since_ns: None, tail: None, ..query };
                            break;
                        }
                        Some(_) => {}
                    }
                    tokio::select! {
                        // Cancel-safe, both.
                        changed = news.recv() => if matches!(changed, Err(tokio::sync::broadcast::error::RecvError::Closed)) { return },
                        () = tx.closed() => return,
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    type ExecStream = Sent<HostServiceExecResponse>;

    async fn exec(
        &self,
        request: Request<Streaming<HostServiceExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        use host_service_exec_request::Item as In;
        use host_service_exec_response::Item as Out;
        if self.shared.policy.forbid_exec {
            return Err(Status::permission_denied(
                "this host forbids running commands in containers",
            ));
        }
        let mut incoming = request.into_inner();
        let Some(In::Start(start)) = incoming.message().await?.and_then(|m| m.item) else {
            return Err(Status::invalid_argument("the first message must be start"));
        };
        let uid = replica(&start.replica_uid)?;
        let running = self.shared.inner.lock().running.get(&uid).cloned();
        let running = running.ok_or_else(|| Status::not_found("the replica does not run here"))?;
        let spec =
            ExecSpec { command: start.command, tty: start.tty, stdin: true, ..ExecSpec::default() };
        let exec = self
            .engine
            .exec(&running.id, &spec)
            .await
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        let (tx, rx) = mpsc::channel(QUEUE);
        let engine = Arc::clone(&self.engine);
        let (id, mut output, mut input) = (exec.id, exec.output, exec.input);
        if let Some(size) = start.size {
            let _ = engine.exec_resize(&id, dimension(size.height), dimension(size.width)).await;
        }
        let (resizer, exec_id) = (Arc::clone(&engine), id.clone());
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                match message.item {
                    Some(In::Stdin(bytes)) if bytes.is_empty() => {
                        let _ = input.shutdown().await;
                    }
                    Some(In::Stdin(bytes)) => {
                        if input.write_all(&bytes).await.is_err() || input.flush().await.is_err() {
                            return;
                        }
                    }
                    Some(In::Resize(size)) => {
                        let (rows, columns) = (dimension(size.height), dimension(size.width));
                        let _ = resizer.exec_resize(&exec_id, rows, columns).await;
                    }
                    Some(In::Start(_)) | None => {}
                }
            }
        });
        tokio::spawn(async move {
            let message = |item| Ok(HostServiceExecResponse { item: Some(item) });
            while let Some(Ok(chunk)) = output.next().await {
                let bytes = chunk.bytes.to_vec();
                let item = match chunk.source {
                    Source::Stdout => Out::Stdout(bytes),
                    Source::Stderr => Out::Stderr(bytes),
                };
                if tx.send(message(item)).await.is_err() {
                    return;
                }
            }
            let code = engine.exec_exit(&id).await.ok().flatten().unwrap_or(-1);
            let _ = tx.send(message(Out::ExitCode(code))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    type DialStream = Sent<DialResponse>;

    async fn dial(
        &self,
        request: Request<Streaming<DialRequest>>,
    ) -> Result<Response<Self::DialStream>, Status> {
        let mut incoming = request.into_inner();
        let Some(dial_request::Item::Start(start)) = incoming.message().await?.and_then(|m| m.item)
        else {
            return Err(Status::invalid_argument("the first message must be start"));
        };
        let uid = replica(&start.replica_uid)?;
        let running = self.shared.inner.lock().running.get(&uid).cloned();
        let running = running.ok_or_else(|| Status::not_found("the replica does not run here"))?;
        let address = probes::address(&running, &start.port).map_err(Status::not_found)?;
        let stream = tokio::time::timeout(CONNECT, TcpStream::connect(address))
            .await
            .map_err(|_| Status::unavailable("the replica's port did not answer"))?
            .map_err(|e| Status::unavailable(format!("the replica refuses the port: {e}")))?;
        let _ = stream.set_nodelay(true);
        let (mut read, mut write) = stream.into_split();
        let (tx, rx) = mpsc::channel(QUEUE);
        let _ = tx.try_send(Ok(DialResponse { data: Vec::new() }));
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                if let Some(dial_request::Item::Data(data)) = message.item
                    && write.write_all(&data).await.is_err()
                {
                    return;
                }
            }
            let _ = write.shutdown().await;
        });
        tokio::spawn(async move {
            let mut buffer = vec![0; FRAME / 4];
            loop {
                let read = tokio::select! {
                    // Cancel-safe: what was not read stays in the socket.
                    read = read.read(&mut buffer) => read,
                    () = tx.closed() => return,
                };
                match read {
                    Ok(0) => return,
                    Ok(n) => {
                        let data = buffer[..n].to_vec();
                        if tx.send(Ok(DialResponse { data })).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        let _ = tx.send(Err(Status::unavailable(error.to_string()))).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

fn dimension(n: u32) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}
