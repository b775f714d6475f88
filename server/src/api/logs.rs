//! Events, logs and commands.

use super::deployments::WATCH_PAUSE;
use super::lists::{Asked, LogPage};
use super::{Api, audit, auth, namespace};
use crate::error::{Error, Kind};
use crate::history::Seen;
use crate::identity::roles;
use crate::ledger::refused;
use crate::session::reverse::ReverseError;
use berth_proto::agent;
use berth_proto::api::event_service_server::EventService;
use berth_proto::api::log_service_server::LogService;
use berth_proto::api::*;
use berth_proto::convert::wall;
use berth_proto::ids::{DeploymentUid, HostUid, ReplicaUid, Revision};
use berth_proto::lines::Position;
use berth_proto::record::AuditRecord;
use berth_server_core::batching::Proposal;
use berth_server_core::change::{Change, audited};
use berth_server_core::live::Live;
use berth_server_core::objects::{Deployment as HeldDeployment, Replica as Held};
use berth_server_core::view::View;
use futures_util::StreamExt as _;
use prost::Message as _;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

/// Entries of the audit log read at once: some hundred KiB.
const READ_AT_ONCE: usize = 1000;
/// How long opening a host's log may take.
const OPEN: Duration = Duration::from_secs(10);
/// Between two tries to read a followed source that cannot be read now: a host that is away, or a
/// container that is not made yet. Doubles from the first to the second.
const AGAIN_FIRST: Duration = Duration::from_millis(500);
/// The longest such wait: a host that returns is read again within this.
const AGAIN_LONGEST: Duration = Duration::from_secs(5);
/// Positions taken from a request, as the contract says.
const RESUMES: usize = 10_000;
/// Figures of all hosts: each measures for a second.
const USAGE: Duration = Duration::from_secs(5);
/// Hosts asked for figures at once.
const USAGE_HOSTS: usize = 64;
/// Replicas in one question to a host, as the contract says.
const USAGE_REPLICAS: usize = 1000;
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
        let sees = caller.clone();
        let wanted = move |e: &Event| {
            (space.is_empty() || e.namespace == space)
                && (host.is_empty() || e.host == host)
                && (deployment.is_empty() || e.deployment == deployment)
                && e.time.as_ref().is_none_or(|t| wall(t).0 >= since)
                && (e.namespace.is_empty() || sees.sees(&e.namespace))
        };
        // Whoever goes on was told before.
        if !r.deployment.is_empty() && r.after_token.is_empty() {
            self.was_there(&caller, &r).await?;
        }
        let limit = if r.limit == 0 { 1000 } else { r.limit as usize };
        let foreign = || Error::field("after_token", "is not the token of an event");
        let seen = match r.after_token.as_str() {
            "" => None,
            token => Some(Seen::read(token).ok_or_else(foreign)?),
        };
        let epoch = self.0.ledger.view().cluster.epoch;
        let past = match seen {
            None => self.0.past_events(0, limit, &wanted).await.map_err(Error::from)?,
            Some(seen) => self.0.events_after(seen, limit, &wanted).await?,
        };
        let told = move |event: Event| {
            let token = Seen { epoch, sequence: event.sequence }.token();
            Ok(WatchEventsResponse { event: Some(event), token })
        };
        let api = Arc::clone(&self.0);
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut last = seen.map_or(0, |seen| seen.sequence);
            let mut past = past;
            loop {
                let more = r.follow && seen.is_some() && past.len() >= limit;
                for event in past {
                    last = event.sequence;
                    if tx.send(told(event)).await.is_err() {
                        return;
                    }
                }
                if !more {
                    break;
                }
                // Whoever goes on after what it has seen gets all that lies between that and now.
                let seen = Seen { epoch, sequence: last };
                past = match api.events_after(seen, limit, &wanted).await {
                    Ok(past) => past,
                    Err(why) => {
                        let _ = tx.send(Err(Status::from(why))).await;
                        return;
                    }
                };
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
                        told(event)
                    }
                    Ok(_) => continue,
                    Err(broadcast::error::RecvError::Lagged(_)) => Err(Status::from(Error::Gone {
                        reason: "EVENTS_SKIPPED",
                        message: "the caller fell behind; call again with the last token seen"
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
        let caller = auth::of(&request);
        let r = request.into_inner();
        let asked =
            Asked { call: "ListAudit", parents: &[], fields: &["actor", "method", "request_id"] };
        let page = Page { page_size: r.page_size, page_token: r.page_token, filter: r.filter };
        let listing = self.listing_of_log(&caller, Some(&page), &asked)?;
        let mut log = LogPage::new(&listing);
        let mut below = listing.revision().0.saturating_add(1);
        while log.has_room() {
            let end = Some(format!("audit/{below:020}"));
            let entries = self.0.ledger.newest("audit/", end, READ_AT_ONCE).await;
            let entries = entries.map_err(Error::from)?;
            let last = entries.len() < READ_AT_ONCE;
            for entry in entries {
                let Ok(a) = AuditRecord::decode(entry.value.as_slice()) else { continue };
                below = a.revision;
                let wanted = listing.wants(|field| match field {
                    "actor" => Some(&a.actor),
                    "method" => Some(&a.method),
                    _ => Some(&a.request_id),
                });
                let shown = wanted.then_some(AuditEntry {
                    revision: a.revision,
                    time: a.time,
                    actor: a.actor,
                    peer: a.peer,
                    method: a.method,
                    request_id: a.request_id,
                    objects: a.objects,
                });
                if !log.take(Revision(below), shown) {
                    break;
                }
            }
            if last {
                log.ended();
            }
        }
        let (entries, next_page_token) = log.finish();
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

/// One replica's log, as somebody wants it.
struct Pour {
    api: Api,
    held: Arc<Held>,
    host: String,
    request: agent::LogsRequest,
    position: Position,
    out: mpsc::Sender<Result<StreamLogsResponse, Status>>,
    told: Option<(LogSourceCondition, String)>,
}

/// Why the lines of a source ended.
enum End {
    /// The caller has gone.
    Caller,
    /// All were sent.
    Done,
    /// There is no container, yet or any more.
    Nothing(String),
    /// It cannot be reached.
    Unreachable(String),
}

impl Pour {
    /// Says what became of the source, once for each change.
    async fn tell(&mut self, condition: LogSourceCondition, message: String) {
        let news = (condition, message);
        if self.told.as_ref() != Some(&news) {
            self.told = Some(news.clone());
            let _ = self.out.send(Ok(source(&self.held, &self.host, condition, news.1))).await;
        }
    }

    fn is_leaving(&self) -> bool {
        let api = &self.api.0;
        is_leaving(&api.ledger.view(), &api.live.load(), &self.held)
    }

    /// Lines into the common stream until all were sent; a followed source is read again after
    /// whatever broke it, for as long as its replica is.
    async fn run(mut self) {
        let mut pause = AGAIN_FIRST;
        loop {
            let before = self.position;
            let end = self.once().await;
            let follow = self.request.follow;
            match end {
                End::Caller => return,
                End::Done if !follow => {
                    return self.tell(LogSourceCondition::Ended, String::new()).await;
                }
                End::Nothing(words) if !follow => {
                    return self.tell(LogSourceCondition::Ended, words).await;
                }
                // What is being removed there cannot be read at some point: its lines are over. Where some
                // were read, it broke in the middle.
                End::Unreachable(_) if self.position == before && self.is_leaving() => {
                    if !follow {
                        return self.tell(LogSourceCondition::Ended, String::new()).await;
                    }
                }
                End::Unreachable(words) => {
                    self.tell(LogSourceCondition::Unreachable, words).await;
                    if !follow {
                        return;
                    }
                }
                End::Done | End::Nothing(_) => {}
            }
            if self.api.0.ledger.view().replica(&self.held.uid).is_none() {
                return self.tell(LogSourceCondition::Ended, String::new()).await;
            }
            if self.position != before {
                pause = AGAIN_FIRST;
            }
            tokio::select! {
                // Cancel-safe, both.
                () = tokio::time::sleep(pause) => {}
                () = self.out.closed() => return,
            }
            pause = (pause * 2).min(AGAIN_LONGEST);
            self.position.resume();
            if let Some(time) = self.position.time() {
                self.request.since = Some(time);
                self.request.tail = None;
            }
        }
    }

    async fn once(&mut self) -> End {
        let kind = agent::ReverseKind::Operate;
        let opened = async {
            let mut client = self.api.0.hub.client(&self.held.host, kind, OPEN).await?;
            match tokio::time::timeout(OPEN, client.logs(self.request.clone())).await {
                Ok(answer) => Ok(answer),
                Err(_) => Err(ReverseError::TimedOut),
            }
        };
        let mut lines = match opened.await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) if status.code() == Code::NotFound => {
                return End::Nothing(status.message().to_owned());
            }
            Ok(Err(status)) => return End::Unreachable(status.message().to_owned()),
            Err(error) => return End::Unreachable(error.to_string()),
        };
        self.tell(LogSourceCondition::Open, String::new()).await;
        loop {
            let next = tokio::select! {
                // Cancel-safe: dropping the stream ends the call at the agent.
                next = lines.message() => next,
                () = self.out.closed() => return End::Caller,
            };
            match next {
                Ok(Some(batch)) => {
                    let offset_ms =
                        self.api.0.live.load().host(&self.held.host).map(|h| h.clock_offset_ms);
                    for line in batch.lines {
                        if !self.position.admit(line.time.as_ref()) {
                            continue;
                        }
                        let line = LogLine {
                            replica_uid: self.held.uid.to_string(),
                            slot: self.held.slot,
                            host: self.host.clone(),
                            release: self.held.release.0,
                            server_time: line.time.as_ref().zip(offset_ms).map(earlier),
                            ..line
                        };
                        let item = Some(stream_logs_response::Item::Line(line));
                        if self.out.send(Ok(StreamLogsResponse { item })).await.is_err() {
                            return End::Caller;
                        }
                    }
                }
                Ok(None) => return End::Done,
                Err(status) if status.code() == Code::NotFound => {
                    return End::Nothing(status.message().to_owned());
                }
                Err(status) => return End::Unreachable(status.message().to_owned()),
            }
        }
    }
}

/// Whether a replica is being stopped, or is gone, on a host that is there.
fn is_leaving(view: &View, live: &Live, held: &Held) -> bool {
    let stopped = |now: &Arc<Held>| now.intent == ReplicaIntent::Stop;
    live.is_present(&held.host) && view.replica(&held.uid).is_none_or(stopped)
}

/// For the audit log, by its deployment's name and its slot, as events name it.
fn replica_object(view: &View, held: &Held) -> String {
    let deployment = view.deployment(&held.deployment);
    let name = deployment.map(|d| d.name.to_string()).unwrap_or_default();
    let namespace = deployment.map(|d| d.namespace.to_string()).unwrap_or_default();
    let name = format!("{name}/{}", held.slot);
    audited("replica", Some(&namespace), &name, held.uid.as_str())
}

/// A moment of a clock that is so many milliseconds ahead, by the clock it was compared with.
fn earlier((time, ahead_ms): (&prost_types::Timestamp, i64)) -> prost_types::Timestamp {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
        - i128::from(ahead_ms) * 1_000_000;
    prost_types::Timestamp {
        seconds: i64::try_from(nanos.div_euclid(1_000_000_000)).unwrap_or_default(),
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default(),
    }
}

/// A request for lines with what it names looked up.
struct Wanted {
    api: Api,
    deployment: DeploymentUid,
    request: StreamLogsRequest,
    begun: BTreeSet<ReplicaUid>,
}

impl Wanted {
    /// Starts to read what matches and is not read yet; the first time with `tail`.
    fn begin(
        &mut self,
        view: &View,
        out: &mpsc::Sender<Result<StreamLogsResponse, Status>>,
        first: bool,
    ) {
        let r = &self.request;
        let mut all: Vec<Arc<Held>> = view
            .replicas_of(&self.deployment)
            .filter(|held| held.uid.as_str().starts_with(&r.replica))
            .filter(|held| !self.begun.contains(&held.uid))
            .cloned()
            .collect();
        all.sort_by_key(|held| held.slot);
        for held in all {
            let host = view.host(&held.host).map(|h| h.name.to_string()).unwrap_or_default();
            if (!r.host.is_empty() && r.host != host) || !self.begun.insert(held.uid.clone()) {
                continue;
            }
            let (since, tail) = match r.resume.get(held.uid.as_str()) {
                Some(time) => (Some(*time), None),
                // What is new is wanted whole.
                None => (r.since, r.tail.filter(|_| first)),
            };
            let request = agent::LogsRequest {
                replica_uid: held.uid.to_string(),
                follow: r.follow,
                since,
                tail,
                previous: r.previous,
            };
            let pour = Pour {
                api: self.api.clone(),
                held,
                host,
                request,
                position: Position::default(),
                out: out.clone(),
                told: None,
            };
            tokio::spawn(pour.run());
        }
    }

    /// Lets replicas that are placed later join in, until the deployment is gone.
    async fn watch(mut self, out: mpsc::Sender<Result<StreamLogsResponse, Status>>) {
        let mut published = self.api.0.ledger.published();
        loop {
            published.borrow_and_update();
            let view = self.api.0.ledger.view();
            if view.deployment(&self.deployment).is_none() {
                return;
            }
            self.begin(&view, &out, false);
            tokio::select! {
                // Cancel-safe, both.
                changed = published.changed() => if changed.is_err() { return },
                () = out.closed() => return,
            }
            // However fast the ledger is written, the deployment is looked through now and then only.
            tokio::time::sleep(WATCH_PAUSE).await;
        }
    }
}

impl Api {
    /// That there is a deployment whose events are asked for, or that events of one are kept that is gone.
    async fn was_there(&self, caller: &auth::Caller, r: &WatchEventsRequest) -> Result<(), Error> {
        let here =
            |space: &str| (r.namespace.is_empty() || space == r.namespace) && caller.sees(space);
        let view = self.0.ledger.view();
        let named = |d: &&Arc<HeldDeployment>| d.name.as_str() == r.deployment;
        if view.deployments().filter(named).any(|d| here(d.namespace.as_str())) {
            return Ok(());
        }
        let told = |e: &Event| e.deployment == r.deployment && here(&e.namespace);
        match self.0.past_events(0, 1, told).await.map_err(Error::from)?.is_empty() {
            true => Err(Error::not_found(Kind::Deployment, &r.deployment)),
            false => Ok(()),
        }
    }

    fn deployment_of(&self, space: &str, name: &str) -> Result<DeploymentUid, Error> {
        let namespace = namespace(space)?;
        let parsed = name.parse().map_err(|_| Error::not_found(Kind::Deployment, name))?;
        let view = self.0.ledger.view();
        view.deployment_by_name(&namespace, &parsed)
            .map(|held| held.uid.clone())
            .ok_or_else(|| Error::not_found(Kind::Deployment, name))
    }

    /// What one host's replicas use, or why it does not say.
    async fn usage_of(
        self,
        host: HostUid,
        replica_uids: Vec<String>,
    ) -> Result<Vec<ReplicaUsage>, String> {
        let asking = async {
            let kind = agent::ReverseKind::Operate;
            let mut client =
                self.0.hub.client(&host, kind, OPEN).await.map_err(|e| e.to_string())?;
            let request = agent::UsageRequest { replica_uids };
            client
                .usage(request)
                .await
                .map(|answer| answer.into_inner().usages)
                .map_err(|status| status.message().to_owned())
        };
        match tokio::time::timeout(USAGE, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(ReverseError::TimedOut.to_string()),
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
        let mut r = request.into_inner();
        caller.require(Role::Viewer, namespace(&r.namespace)?.as_str())?;
        let deployment = self.deployment_of(&r.namespace, &r.deployment)?;
        if r.resume.len() > RESUMES {
            r.resume = r.resume.into_iter().take(RESUMES).collect();
        }
        if !r.replica.is_empty() && !r.follow {
            self.replica_for(&r.namespace, &r.deployment, &r.replica)?;
        }
        let follow = r.follow;
        let (tx, rx) = mpsc::channel(QUEUE);
        let mut wanted =
            Wanted { api: self.clone(), deployment, request: r, begun: BTreeSet::new() };
        wanted.begin(&self.0.ledger.view(), &tx, true);
        if follow {
            tokio::spawn(wanted.watch(tx));
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn read_usage(
        &self,
        request: Request<ReadUsageRequest>,
    ) -> Result<Response<ReadUsageResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.view();
        let only = match r.deployment.as_str() {
            "" => None,
            name => {
                caller.require(Role::Viewer, namespace(&r.namespace)?.as_str())?;
                Some(self.deployment_of(&r.namespace, name)?)
            }
        };
        let mut by_host: BTreeMap<HostUid, Vec<String>> = BTreeMap::new();
        let mut known = BTreeMap::new();
        for held in view.replicas() {
            let Some(owner) = view.deployment(&held.deployment) else { continue };
            let space = owner.namespace.as_str();
            let host = view.host(&held.host).map(|h| h.name.to_string()).unwrap_or_default();
            let wanted = only.as_ref().is_none_or(|uid| *uid == held.deployment)
                && (r.namespace.is_empty() || r.namespace == space)
                && (r.host.is_empty() || r.host == host)
                && caller.sees(space);
            if wanted {
                let uids = by_host.entry(held.host.clone()).or_default();
                if uids.len() < USAGE_REPLICAS {
                    uids.push(held.uid.to_string());
                    known.insert(held.uid.to_string(), (Arc::clone(held), Arc::clone(owner), host));
                }
            }
        }
        let answers: Vec<_> = futures_util::stream::iter(by_host)
            .map(|(host, uids)| {
                let api = self.clone();
                async move { (host.clone(), api.usage_of(host, uids).await) }
            })
            .buffer_unordered(USAGE_HOSTS)
            .collect()
            .await;
        let mut answer = ReadUsageResponse::default();
        for (host, result) in answers {
            match result {
                Ok(usages) => answer.usages.extend(usages.into_iter().filter_map(|usage| {
                    let (held, owner, host) = known.get(&usage.replica_uid)?;
                    Some(ReplicaUsage {
                        deployment: owner.name.to_string(),
                        namespace: owner.namespace.to_string(),
                        slot: held.slot,
                        host: host.clone(),
                        ..usage
                    })
                })),
                Err(words) => {
                    let name = view.host(&host).map(|h| h.name.to_string()).unwrap_or_default();
                    answer.unreachable.insert(name, words);
                }
            }
        }
        answer.usages.sort_by(|a, b| {
            (&a.namespace, &a.deployment, a.slot, &a.replica_uid).cmp(&(
                &b.namespace,
                &b.deployment,
                b.slot,
                &b.replica_uid,
            ))
        });
        Ok(Response::new(answer))
    }

    type ExecStream = Sent<ExecResponse>;

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        use agent::{host_service_exec_request as to, host_service_exec_response as from};
        let caller = auth::of(&request);
        let mut incoming = request.into_inner();
        let late = || Error::field("item", "the first message must be start, and come at once");
        let first = tokio::time::timeout(OPEN, incoming.message()).await.map_err(|_| late())??;
        let first = first.and_then(|m| m.item);
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
        // Before it runs: a command that nobody could be asked about must not have run.
        let entry = audit(
            &caller,
            "LogService/Exec",
            "",
            vec![replica_object(&self.0.ledger.view(), &held)],
        );
        let proposal = Proposal { preconditions: Vec::new(), changes: vec![entry] };
        let kept = self.0.ledger.propose(proposal).await;
        kept.map_err(|why| refused(why, Kind::Replica, held.uid.as_str()))?;
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
        let answer = tokio::time::timeout(OPEN, client.exec(ReceiverStream::new(rx)))
            .await
            .map_err(|_| Error::unavailable("HOST_AWAY", "the host does not answer; try again"))?
            .map_err(|status| Error::of_host(&status))?
            .into_inner();
        let stream = answer.map(|next| {
            let shown = |m: agent::HostServiceExecResponse| ExecResponse {
                item: m.item.map(|item| match item {
                    from::Item::Stdout(bytes) => exec_response::Item::Stdout(bytes),
                    from::Item::Stderr(bytes) => exec_response::Item::Stderr(bytes),
                    from::Item::ExitCode(code) => exec_response::Item::ExitCode(code),
                }),
            };
            next.map(shown).map_err(|status| Error::of_host(&status).into())
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_server_core::live::Presence;

    #[tokio::test]
    async fn the_events_of_no_deployment_are_not_found_and_those_of_one_that_is_gone_are() {
        use crate::api::tests::{call, served};
        let (_dir, api) = served();
        let event =
            Event { namespace: "default".into(), deployment: "gone".into(), ..Event::default() };
        let proposal =
            Proposal { changes: vec![Change::AppendEvent(event)], ..Proposal::default() };
        api.0.ledger.propose(proposal).await.unwrap();
        let ask = async |deployment: &str, namespace: &str| {
            let (deployment, namespace) = (deployment.to_owned(), namespace.to_owned());
            let request = WatchEventsRequest { deployment, namespace, ..Default::default() };
            api.watch_events(call(request)).await.map(drop)
        };
        ask("", "").await.unwrap();
        ask("gone", "").await.unwrap();
        ask("gone", "default").await.unwrap();
        for (name, namespace) in [("nope", ""), ("gone", "vision")] {
            let status = ask(name, namespace).await.unwrap_err();
            assert_eq!(status.code(), Code::NotFound, "{name} {namespace}");
        }
    }

    #[test]
    fn what_is_stopped_on_a_host_that_is_there_is_no_failure() {
        let held = Held {
            uid: "r0".parse().unwrap(),
            deployment: "d".parse().unwrap(),
            slot: 0,
            release: Default::default(),
            host: "h0".parse().unwrap(),
            intent: ReplicaIntent::Run,
            replaces: None,
            stands_in_for: None,
            created: berth_proto::ids::Wall(0),
            first_ready: None,
            attempt_floor: 0,
            exits: Vec::new(),
            failed: false,
            reason: String::new(),
            given_back: None,
            found_body: None,
            found_as: None,
            revision: Revision(0),
        };
        let (mut view, mut live) = (View::default(), Live::default());
        view.apply(&Change::PutReplica(Arc::new(held.stopped())), Revision(1));
        assert!(!is_leaving(&view, &live, &held), "its host may be away");
        live.edit_host(&held.host, |h| h.presence = Presence::Present);
        assert!(is_leaving(&view, &live, &held));
        view.apply(&Change::PutReplica(Arc::new(held.clone())), Revision(2));
        assert!(!is_leaving(&view, &live, &held), "it shall run");
        view.apply(&Change::DeleteReplica(held.uid.clone()), Revision(3));
        assert!(is_leaving(&view, &live, &held));
    }

    #[test]
    fn a_line_of_a_clock_that_is_off_has_the_servers_time_too() {
        let at = |seconds, nanos| prost_types::Timestamp { seconds, nanos };
        assert_eq!(earlier((&at(10, 5), 1_500)), at(8, 500_000_005));
        assert_eq!(earlier((&at(10, 0), -1)), at(10, 1_000_000));
        assert_eq!(earlier((&at(0, 0), 1)), at(-1, 999_000_000));
    }
}
