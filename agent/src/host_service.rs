//! What the agent serves on a reverse connection: logs, commands, and a replica's ports.
//!
//! Names replicas, never addresses: nothing but our own containers can be reached.

use crate::engine::{Engine, EngineError, ExecSpec, LogChunk, LogQuery, Source};
use crate::probes;
use crate::refusal::Refusal;
use crate::state::Shared;
use berth_proto::agent::host_service_server::HostService;
use berth_proto::agent::*;
use berth_proto::api::{LogLine, OutputStream, ReplicaUsage};
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
/// Between two looks at a container's processor time.
const SAMPLE: Duration = Duration::from_secs(1);
/// Containers looked at at once; the engine answers each in a few milliseconds.
const LOOKS: usize = 8;
/// The contract's bound on a request for figures.
const USAGES: usize = 1000;
/// A follower that heard nothing for so long asks the engine anew from where it was: some engines
/// stop sending when they turn a log over, without ending the stream.
const WATCH: Duration = Duration::from_secs(60);
/// Asking again after the engine broke off, and how often in a row without a line in between.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES: u32 = 10;
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

/// Why no more lines come from a stream of the engine.
enum Broken {
    /// The program has ended.
    Over,
    /// Nothing came for long.
    Silent,
    /// The engine broke off.
    Off(EngineError),
}

fn replica(text: &str) -> Result<ReplicaUid, Refusal> {
    text.parse().map_err(|_| Refusal::NoReplica)
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
        let attempts = of(&self.shared).ok_or(Refusal::NoReplica)?;
        let chosen = if r.previous { attempts.get(1) } else { attempts.first() };
        let (mut id, mut attempt) = chosen.cloned().ok_or(Refusal::NoAttempt)?;
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
            let mut broken = 0;
            loop {
                let mut chunks = engine.logs(&id, query.clone()).ready_chunks(LINES);
                let ended = loop {
                    let next = tokio::select! {
                        // Cancel-safe: dropping the stream ends the engine's call.
                        next = chunks.next() => next,
                        () = tokio::time::sleep(WATCH), if query.follow => break Broken::Silent,
                        () = tx.closed() => return,
                    };
                    let Some(batch) = next else { break Broken::Over };
                    let mut lines = Vec::new();
                    let mut error = None;
                    for item in batch {
                        match item {
                            Ok(chunk) => {
                                if let Some(stamp) = chunk.stamp_ns {
                                    // What was sent is not asked for again.
                                    query.since_ns = Some(stamp + 1);
                                    query.tail = None;
                                }
                                lines.push(line(chunk, attempt));
                            }
                            Err(why) => error = Some(why),
                        }
                    }
                    if !lines.is_empty() {
                        broken = 0;
                        if tx.send(Ok(LogsResponse { lines })).await.is_err() {
                            return;
                        }
                    }
                    if let Some(error) = error {
                        break Broken::Off(error);
                    }
                };
                let runs = shared.inner.lock().running.get(&uid).is_some_and(|r| r.id == id);
                match ended {
                    // The engine went, not the program.
                    Broken::Over if query.follow && runs => tokio::select! {
                        () = tokio::time::sleep(AGAIN) => continue,
                        () = tx.closed() => return,
                    },
                    Broken::Over => {}
                    Broken::Silent => continue,
                    Broken::Off(EngineError::NotFound(_)) if query.follow => {}
                    Broken::Off(error) => {
                        broken += 1;
                        if !query.follow || broken > TRIES {
                            let refusal = if matches!(error, EngineError::NotFound(_)) {
                                Refusal::NoAttempt
                            } else if error.is_engine_away() {
                                Refusal::EngineAway(error)
                            } else {
                                Refusal::LogsFailed(error)
                            };
                            let _ = tx.send(Err(refusal.into())).await;
                            return;
                        }
                        tokio::select! {
                            () = tokio::time::sleep(AGAIN) => continue,
                            () = tx.closed() => return,
                        }
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
            return Err(Refusal::ExecForbidden.into());
        }
        let mut incoming = request.into_inner();
        let Some(In::Start(start)) = incoming.message().await?.and_then(|m| m.item) else {
            return Err(Refusal::NoStart.into());
        };
        let uid = replica(&start.replica_uid)?;
        let running = self.shared.inner.lock().running.get(&uid).cloned();
        let running = running.ok_or(Refusal::NotRunning)?;
        let spec =
            ExecSpec { command: start.command, tty: start.tty, stdin: true, ..ExecSpec::default() };
        let exec = self.engine.exec(&running.id, &spec).await.map_err(|why| {
            if why.is_engine_away() { Refusal::EngineAway(why) } else { Refusal::ExecFailed(why) }
        })?;
        let (tx, rx) = mpsc::channel(QUEUE);
        let engine = Arc::clone(&self.engine);
        let (id, mut output, mut input) = (exec.id, exec.output, exec.input);
        if let Some(size) = start.size {
            let _ = engine.exec_resize(&id, dimension(size.height), dimension(size.width)).await;
        }
        let (resizer, exec_id) = (Arc::clone(&engine), id.clone());
        // Falls when nothing more comes out: what is still typed then goes nowhere.
        let (alive, mut over) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                match message.item {
                    Some(In::Stdin(bytes)) if bytes.is_empty() => {
                        let _ = input.shutdown().await;
                    }
                    Some(In::Stdin(bytes)) => {
                        let write = async {
                            input.write_all(&bytes).await?;
                            input.flush().await
                        };
                        tokio::select! {
                            // Dropped only when nobody reads it any more.
                            written = write => if written.is_err() { break },
                            _ = &mut over => break,
                        }
                    }
                    Some(In::Resize(size)) => {
                        let (rows, columns) = (dimension(size.height), dimension(size.width));
                        let _ = resizer.exec_resize(&exec_id, rows, columns).await;
                    }
                    Some(In::Start(_)) | None => {}
                }
            }
            // However it ended: a command that reads shall see the end, not wait for ever.
            let _ = input.shutdown().await;
        });
        tokio::spawn(async move {
            let _alive = alive;
            let message = |item| Ok(HostServiceExecResponse { item: Some(item) });
            loop {
                let next = tokio::select! {
                    // Cancel-safe: dropping the stream lets go of the command.
                    next = output.next() => next,
                    () = tx.closed() => return,
                };
                let Some(Ok(chunk)) = next else { break };
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

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        let wanted: Vec<(String, String)> = {
            let inner = self.shared.inner.lock();
            let of = |text: &String| {
                let running = inner.running.get(&text.parse::<ReplicaUid>().ok()?)?;
                Some((text.clone(), running.id.clone()))
            };
            request.get_ref().replica_uids.iter().take(USAGES).filter_map(of).collect()
        };
        let usages = futures_util::stream::iter(wanted)
            .map(|(uid, id)| self.measure(uid, id))
            .buffer_unordered(LOOKS)
            .filter_map(std::future::ready)
            .collect()
            .await;
        Ok(Response::new(UsageResponse { usages }))
    }

    type DialStream = Sent<DialResponse>;

    async fn dial(
        &self,
        request: Request<Streaming<DialRequest>>,
    ) -> Result<Response<Self::DialStream>, Status> {
        let mut incoming = request.into_inner();
        let Some(dial_request::Item::Start(start)) = incoming.message().await?.and_then(|m| m.item)
        else {
            return Err(Refusal::NoStart.into());
        };
        let uid = replica(&start.replica_uid)?;
        let running = self.shared.inner.lock().running.get(&uid).cloned();
        let running = running.ok_or(Refusal::NotRunning)?;
        let address = probes::address(&running, &start.port).map_err(Refusal::NoPort)?;
        let stream = tokio::time::timeout(CONNECT, TcpStream::connect(address))
            .await
            .map_err(|_| Refusal::PortRefused("the replica's port did not answer".to_owned()))?
            .map_err(|e| Refusal::PortRefused(format!("the replica refuses the port: {e}")))?;
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
                        let _ = tx.send(Err(Refusal::Broken(error).into())).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

impl Served {
    /// Two looks at one container. One that ended meanwhile has no figures.
    async fn measure(&self, uid: String, id: String) -> Option<ReplicaUsage> {
        let begun = tokio::time::Instant::now();
        let first = self.engine.stats(&id).await.ok()?;
        tokio::time::sleep(SAMPLE).await;
        let second = self.engine.stats(&id).await.ok()?;
        let used_ns = second.cpu_total_ns.saturating_sub(first.cpu_total_ns);
        let wall_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        Some(ReplicaUsage {
            replica_uid: uid,
            // ns / us is thousandths.
            cpu_millis: used_ns / wall_us,
            memory_bytes: second.memory_bytes,
            memory_limit_bytes: second.memory_limit_bytes,
            received_bytes: second.rx_bytes,
            sent_bytes: second.tx_bytes,
            processes: second.pids,
            ..ReplicaUsage::default()
        })
    }
}

fn dimension(n: u32) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

#[cfg(test)]
#[path = "host_service_tests.rs"]
mod tests;
