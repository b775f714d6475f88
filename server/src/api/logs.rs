//! Events, logs and commands.

use super::{Api, auth, namespace};
use crate::error::{Error, Kind};
use crate::identity::roles;
use crate::session::reverse::ReverseError;
use berth_proto::agent;
use berth_proto::api::event_service_server::EventService;
use berth_proto::api::log_service_server::LogService;
use berth_proto::api::*;
use berth_proto::convert::wall;
use berth_proto::record::{AuditRecord, EventRecord};
use berth_server_core::change::Change;
use berth_server_core::objects::Replica as Held;
use prost::Message as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// How long opening a host's log may take.
const OPEN: Duration = Duration::from_secs(10);
/// Messages on their way to a caller; a caller that does not read holds up the hosts' streams by
/// HTTP/2's own flow control, and nothing else.
const QUEUE: usize = 64;

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl EventService for Api {
    type WatchEventsStream = Sent<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let mut changes = self.0.ledger.changes();
        let since = r.since.as_ref().map_or(i64::MIN, |t| wall(t).0);
        let (host, deployment, space) = (r.host.clone(), r.deployment.clone(), r.namespace.clone());
        let wanted = move |e: &Event| {
            (space.is_empty() || e.namespace == space)
                && (host.is_empty() || e.host == host)
                && (deployment.is_empty() || e.deployment == deployment)
                && e.time.as_ref().is_none_or(|t| wall(t).0 >= since)
                && (e.namespace.is_empty() || caller.sees(&e.namespace))
        };
        let mut past: Vec<Event> = self
            .0
            .ledger
            .entries("event/")
            .await
            .iter()
            .filter_map(|entry| EventRecord::decode(entry.value.as_slice()).ok()?.event)
            .filter(|e| e.sequence > r.after_sequence && wanted(e))
            .collect();
        let limit = if r.limit == 0 { 1000 } else { r.limit as usize };
        past.drain(..past.len().saturating_sub(limit));
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut last = r.after_sequence;
            for event in past {
                last = event.sequence;
                if tx.send(Ok(WatchEventsResponse { event: Some(event) })).await.is_err() {
                    return;
                }
            }
            if !r.follow {
                return;
            }
            loop {
                let change = tokio::select! {
                    // Cancel-safe, both.
                    change = changes.recv() => change,
                    () = tx.closed() => return,
                };
                let message = match change {
                    Ok((_, Change::AppendEvent(event)))
                        if event.sequence > last && wanted(&event) =>
                    {
                        Ok(WatchEventsResponse { event: Some(event) })
                    }
                    Ok(_) => continue,
                    Err(broadcast::error::RecvError::Lagged(_)) => Err(Status::from(Error::Gone {
                        reason: "EVENTS_SKIPPED",
                        message: "the caller fell behind; call again with the last sequence seen"
                            .to_owned(),
                    })),
                    Err(broadcast::error::RecvError::Closed) => return,
                };
                let ends = message.is_err();
                if tx.send(message).await.is_err() || ends {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Result<Response<ListAuditResponse>, Status> {
        let r = request.into_inner();
        let mut all: Vec<AuditEntry> = self
            .0
            .ledger
            .entries("audit/")
            .await
            .iter()
            .filter_map(|entry| AuditRecord::decode(entry.value.as_slice()).ok())
            .map(|a| AuditEntry {
                revision: a.revision,
                time: a.time,
                actor: a.actor,
                peer: a.peer,
                method: a.method,
                request_id: a.request_id,
                objects: a.objects,
            })
            .collect();
        all.reverse();
        let page = Page { page_size: r.page_size, page_token: r.page_token, ..Page::default() };
        let (entries, next_page_token) = super::page(all, Some(&page))?;
        Ok(Response::new(ListAuditResponse { entries, next_page_token }))
    }
}

fn source(
    held: &Held,
    host: &str,
    condition: LogSourceCondition,
    message: String,
) -> StreamLogsResponse {
    StreamLogsResponse {
        item: Some(stream_logs_response::Item::Source(LogSourceState {
            replica_uid: held.uid.to_string(),
            slot: held.slot,
            host: host.to_owned(),
            condition: condition as i32,
            message,
        })),
    }
}

impl Api {
    /// One replica's lines into the common stream.
    async fn pour(
        self,
        held: Arc<Held>,
        host: String,
        request: agent::LogsRequest,
        out: mpsc::Sender<Result<StreamLogsResponse, Status>>,
    ) {
        let say = |condition, message: String| Ok(source(&held, &host, condition, message));
        let kind = agent::ReverseKind::Operate;
        let opened = async {
            let mut client = self.0.hub.client(&held.host, kind, OPEN).await?;
            match tokio::time::timeout(OPEN, client.logs(request)).await {
                Ok(Ok(response)) => Ok(Ok(response.into_inner())),
                Ok(Err(status)) => Ok(Err(status)),
                Err(_) => Err(ReverseError::TimedOut),
            }
        };
        let mut lines = match opened.await {
            Ok(Ok(lines)) => lines,
            Ok(Err(status)) => {
                let words = status.message().to_owned();
                let _ = out.send(say(LogSourceCondition::Unreachable, words)).await;
                return;
            }
            Err(error) => {
                let _ = out.send(say(LogSourceCondition::Unreachable, error.to_string())).await;
                return;
            }
        };
        if out.send(say(LogSourceCondition::Open, String::new())).await.is_err() {
            return;
        }
        loop {
            let next = tokio::select! {
                // Cancel-safe: dropping the stream ends the call at the agent.
                next = lines.message() => next,
                () = out.closed() => return,
            };
            match next {
                Ok(Some(batch)) => {
                    for line in batch.lines {
                        let line = LogLine {
                            replica_uid: held.uid.to_string(),
                            slot: held.slot,
                            host: host.clone(),
                            release: held.release.0,
                            ..line
                        };
                        let item = Some(stream_logs_response::Item::Line(line));
                        if out.send(Ok(StreamLogsResponse { item })).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(None) => {
                    let _ = out.send(say(LogSourceCondition::Ended, String::new())).await;
                    return;
                }
                Err(status) => {
                    let words = status.message().to_owned();
                    let _ = out.send(say(LogSourceCondition::Unreachable, words)).await;
                    return;
                }
            }
        }
    }

    fn replica_for(
        &self,
        space: &str,
        deployment: &str,
        replica: &str,
    ) -> Result<Vec<Arc<Held>>, Error> {
        let namespace = namespace(space)?;
        let name =
            deployment.parse().map_err(|_| Error::not_found(Kind::Deployment, deployment))?;
        let view = self.0.ledger.view();
        let held = view
            .deployment_by_name(&namespace, &name)
            .ok_or_else(|| Error::not_found(Kind::Deployment, deployment))?;
        let mut all: Vec<Arc<Held>> = view
            .replicas_of(&held.uid)
            .filter(|r| replica.is_empty() || r.uid.as_str().starts_with(replica))
            .cloned()
            .collect();
        all.sort_by_key(|r| r.slot);
        if all.is_empty() && !replica.is_empty() {
            return Err(Error::not_found(Kind::Replica, replica));
        }
        Ok(all)
    }
}

#[tonic::async_trait]
impl LogService for Api {
    type StreamLogsStream = Sent<StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        caller.require(Role::Viewer, namespace(&r.namespace)?.as_str())?;
        let replicas = self.replica_for(&r.namespace, &r.deployment, &r.replica)?;
        let view = self.0.ledger.view();
        let (tx, rx) = mpsc::channel(QUEUE);
        for held in replicas {
            let host = view.host(&held.host).map(|h| h.name.to_string()).unwrap_or_default();
            if !r.host.is_empty() && r.host != host {
                continue;
            }
            let ask = agent::LogsRequest {
                replica_uid: held.uid.to_string(),
                follow: r.follow,
                since: r.since,
                tail: r.tail,
                previous: r.previous,
            };
            tokio::spawn(self.clone().pour(held, host, ask, tx.clone()));
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    type ExecStream = Sent<ExecResponse>;

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        use agent::{host_service_exec_request as to, host_service_exec_response as from};
        let caller = auth::of(&request);
        let mut incoming = request.into_inner();
        let first = incoming.message().await?.and_then(|m| m.item);
        let Some(exec_request::Item::Start(start)) = first else {
            return Err(Error::field("item", "the first message must be start").into());
        };
        let space = namespace(&start.namespace)?;
        if !roles::may_exec(&caller.bindings, space.as_str()) {
            return Err(
                Error::denied("EXEC_NEEDED", "the permission to run commands is needed").into()
            );
        }
        let live = self.0.live.load_full();
        let replicas = self.replica_for(&start.namespace, &start.deployment, &start.replica)?;
        let running = replicas.into_iter().find(|r| {
            live.replica(&r.uid)
                .is_some_and(|l| l.status.phase == Some(berth_proto::values::Phase::Running))
        });
        let Some(held) = running else {
            return Err(Error::precondition(
                "REPLICA_NOT_RUNNING",
                "no replica of that name runs; see `berth ps`",
            )
            .into());
        };
        let mut client = self
            .0
            .hub
            .client(&held.host, agent::ReverseKind::Operate, OPEN)
            .await
            .map_err(|e| Error::unavailable("HOST_AWAY", e.to_string()))?;
        let (tx, rx) = mpsc::channel(8);
        let begin = agent::HostExecStart {
            replica_uid: held.uid.to_string(),
            command: start.command,
            tty: start.tty,
            size: start.size,
        };
        let message = |item| agent::HostServiceExecRequest { item: Some(item) };
        let _ = tx.try_send(message(to::Item::Start(begin)));
        tokio::spawn(async move {
            while let Some(Ok(next)) = incoming.next().await {
                let item = match next.item {
                    Some(exec_request::Item::Stdin(bytes)) => to::Item::Stdin(bytes),
                    Some(exec_request::Item::Resize(size)) => to::Item::Resize(size),
                    Some(exec_request::Item::Start(_)) | None => continue,
                };
                if tx.send(message(item)).await.is_err() {
                    return;
                }
            }
        });
        let answer = client.exec(ReceiverStream::new(rx)).await?.into_inner();
        let stream = answer.map(|next| {
            next.map(|m| ExecResponse {
                item: m.item.map(|item| match item {
                    from::Item::Stdout(bytes) => exec_response::Item::Stdout(bytes),
                    from::Item::Stderr(bytes) => exec_response::Item::Stderr(bytes),
                    from::Item::ExitCode(code) => exec_response::Item::ExitCode(code),
                }),
            })
        });
        Ok(Response::new(Box::pin(stream)))
    }
}
