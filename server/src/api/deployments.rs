//! Deployments, releases and replicas.

use super::{Api, audit, auth, namespace, page};
use crate::error::{Error, Kind};
use crate::ledger::refused;
use berth_proto::api::deployment_service_server::DeploymentService;
use berth_proto::api::*;
use berth_proto::convert;
use berth_proto::ids::{Name, Namespace, ReleaseNumber, ReplicaUid};
use berth_proto::record::RequestRecord;
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::Change;
use berth_server_core::decide::{self, Asked, Decision, Refused, Wanted};
use berth_server_core::objects::Deployment as Held;
use berth_server_core::view::{ObjectKey, View};
use berth_server_core::{planner, status};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Deployments in one call, as the contract says.
const MAX_APPLY: usize = 500;
/// Between two messages of a watch: at most 10 a second.
const WATCH_PAUSE: Duration = Duration::from_millis(100);
/// Replicas in one message of a watch.
const WATCH_REPLICAS: usize = 1000;
/// Tries of a write that others keep getting in front of.
const TRIES: usize = 5;

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match &refused {
            Refused::Deleting(_) => Self::precondition("DEPLOYMENT_DELETING", refused.to_string()),
            Refused::EveryHost(_) => Self::precondition("EVERY_HOST", refused.to_string()),
            Refused::NoEarlierRelease(_) => {
                Self::precondition("NO_EARLIER_RELEASE", refused.to_string())
            }
            Refused::NoRelease { .. } => Self::precondition("NO_RELEASE", refused.to_string()),
            Refused::Bad(_) => Self::internal("cannot make the release", refused),
        }
    }
}

struct Target {
    namespace: Namespace,
    name: Name,
}

impl Api {
    fn target(caller: &auth::Caller, space: &str, name: &str, role: Role) -> Result<Target, Error> {
        let namespace = namespace(space)?;
        caller.require(role, namespace.as_str())?;
        let name = name.parse().map_err(|_| Error::not_found(Kind::Deployment, name))?;
        Ok(Target { namespace, name })
    }

    fn held(view: &View, target: &Target) -> Result<Arc<Held>, Error> {
        view.deployment_by_name(&target.namespace, &target.name)
            .cloned()
            .ok_or_else(|| Error::not_found(Kind::Deployment, target.name.as_str()))
    }

    fn shown(&self, view: &View, held: &Held) -> Deployment {
        let live = self.0.live.load();
        let report = self.0.reports.lock().get(&held.uid).cloned();
        status::deployment(view, &live, held, report.as_ref())
    }

    /// The kept answer of an earlier call with the same request id.
    fn replay<M: Message + Default>(
        &self,
        caller: &auth::Caller,
        write: Option<&WriteOptions>,
        request: &impl Message,
    ) -> Result<Option<M>, Error> {
        let Some(id) = write.map(|w| w.request_id.as_str()).filter(|id| !id.is_empty()) else {
            return Ok(None);
        };
        if id.len() > 64 {
            return Err(Error::field("write.request_id", "must have at most 64 characters"));
        }
        let view = self.0.ledger.view();
        let Some(kept) = view.request(&request_key(caller, id)) else { return Ok(None) };
        if kept.record.request_sha256 != sha256(request) {
            return Err(Error::RequestReused(id.to_owned()));
        }
        M::decode(kept.record.response.as_slice())
            .map(Some)
            .map_err(|e| Error::internal("cannot read a kept answer", e))
    }

    #[expect(clippy::too_many_arguments, reason = "all of one call, named at each of four uses")]
    async fn write(
        &self,
        caller: &auth::Caller,
        write: Option<&WriteOptions>,
        method: &str,
        target: &Target,
        request: &impl Message,
        decide: impl Fn(&View, &Held, &Asked<'_>) -> Result<Decision, Refused>,
        answer: impl Fn(Deployment) -> Vec<u8>,
    ) -> Result<Deployment, Error> {
        let mut tries = 0;
        loop {
            let view = self.0.ledger.ahead();
            let held = Self::held(&view, target)?;
            let asked = Asked { actor: &caller.subject, now: crate::cluster::wall_now() };
            let decision = decide(&view, &held, &asked)?;
            let mut proposal = decision.proposal;
            let expected = write.and_then(|w| w.expected_revision);
            if let Some(expected) = expected {
                proposal.preconditions.push(decide::expected(
                    &target.namespace,
                    &target.name,
                    expected,
                ));
            }
            let shown = self.shown(&view, &decision.deployment);
            if write.is_some_and(|w| w.validate_only) {
                return Ok(shown);
            }
            let bytes = answer(shown.clone());
            finish(
                &mut proposal,
                caller,
                write,
                method,
                request,
                bytes,
                vec![format!("deployment/{}/{}", target.namespace, target.name)],
            );
            match self.0.ledger.propose(proposal).await {
                Ok(_) => {
                    let view = self.0.ledger.view();
                    return Ok(view
                        .deployment(&decision.deployment.uid)
                        .map_or(shown, |held| self.shown(&view, held)));
                }
                Err(refusal) => {
                    tries += 1;
                    let conflict =
                        matches!(refusal, berth_server_core::batching::Refusal::Conflict { .. });
                    if !conflict || expected.is_some() || tries >= TRIES {
                        return Err(refused(refusal, Kind::Deployment, target.name.as_str()));
                    }
                }
            }
        }
    }

    async fn wanted(
        &self,
        caller: &auth::Caller,
        view: &View,
        input: &DeploymentInput,
        index: usize,
        role: Role,
    ) -> Result<Wanted, Error> {
        let path = if input.origin.is_empty() {
            format!("deployments[{index}].")
        } else {
            format!("{}: ", input.origin)
        };
        let meta = input.meta.clone().unwrap_or_default();
        let name: Name = meta.name.parse().map_err(|e: berth_proto::ids::InvalidId| {
            Error::field(format!("{path}metadata.name"), e.to_string())
        })?;
        let namespace = namespace(&meta.namespace)?;
        caller.require(role, namespace.as_str())?;
        let written = input.spec.clone().unwrap_or_default();
        let spec = convert::deployment_spec_from_api(&written).map_err(|mut problems| {
            for problem in &mut problems.0 {
                problem.path = format!("{path}{}", problem.path);
            }
            Error::from(problems)
        })?;
        let (resolved, words) =
            crate::resolve::source(&self.0, view, namespace.as_str(), &spec, &path).await?;
        Ok(Wanted {
            name,
            namespace,
            labels: meta.labels,
            spec: written,
            resolved,
            resolved_words: words,
        })
    }

    async fn decide_all(
        &self,
        caller: &auth::Caller,
        inputs: &[DeploymentInput],
        role: Role,
    ) -> Result<(Arc<View>, Vec<(Wanted, Decision)>), Error> {
        if inputs.is_empty() || inputs.len() > MAX_APPLY {
            return Err(Error::field("deployments", format!("must hold 1 to {MAX_APPLY}")));
        }
        let view = self.0.ledger.ahead();
        let mut wanted = Vec::new();
        let mut problems = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            match self.wanted(caller, &view, input, i, role).await {
                Ok(one) => wanted.push(one),
                // Every problem of every document at once.
                Err(Error::Invalid(fields)) => problems.extend(fields),
                Err(other) => return Err(other),
            }
        }
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        let asked = Asked { actor: &caller.subject, now: crate::cluster::wall_now() };
        let mut decided = Vec::new();
        for one in wanted {
            let uid = uuid::Uuid::now_v7()
                .to_string()
                .parse()
                .map_err(|e| Error::internal("cannot make a uid", e))?;
            let decision = decide::apply(&view, &one, uid, &asked)?;
            decided.push((one, decision));
        }
        Ok((view, decided))
    }
}

fn sha256(request: &impl Message) -> Vec<u8> {
    use sha2::Digest as _;
    sha2::Sha256::digest(request.encode_to_vec()).to_vec()
}

fn request_key(caller: &auth::Caller, id: &str) -> String {
    format!("{}:{id}", caller.subject)
}

/// Adds the audit entry and, for a request with an id, its answer.
fn finish(
    proposal: &mut Proposal,
    caller: &auth::Caller,
    write: Option<&WriteOptions>,
    method: &str,
    request: &impl Message,
    response: Vec<u8>,
    objects: Vec<String>,
) {
    let id = write.map(|w| w.request_id.clone()).unwrap_or_default();
    if !id.is_empty() {
        let key = request_key(caller, &id);
        proposal
            .preconditions
            .push(Precondition::At(ObjectKey::Request(key.clone()), Default::default()));
        proposal.changes.push(Change::PutRequest(Arc::new(RequestRecord {
            key,
            time_unix_ms: crate::cluster::wall_now().0,
            request_sha256: sha256(request),
            response,
        })));
    }
    if !proposal.changes.is_empty() {
        proposal.changes.push(audit(caller, method, &id, objects));
    }
}

/// Leaves of a manifest's spec by their path; lists are told as a whole.
fn leaves(value: &serde_json::Value, path: &str, out: &mut BTreeMap<String, String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                leaves(value, &format!("{path}.{key}"), out);
            }
        }
        serde_json::Value::String(text) => {
            out.insert(path.to_owned(), text.clone());
        }
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::Array(_) => {
            out.insert(path.to_owned(), value.to_string());
        }
    }
}

/// Differences between two specs, as people write them.
fn changes(before: Option<&DeploymentSpec>, after: &DeploymentSpec) -> Vec<FieldChange> {
    let flat = |spec: &DeploymentSpec| {
        let mut out = BTreeMap::new();
        leaves(&berth_proto::manifest::spec_to_json(spec), "spec", &mut out);
        out
    };
    let before = before.map(flat).unwrap_or_default();
    let after = flat(after);
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != after.get(*key))
        .map(|key| FieldChange {
            path: key.clone(),
            before: before.get(key).cloned().unwrap_or_default(),
            after: after.get(key).cloned().unwrap_or_default(),
        })
        .collect()
}

/// A pass of the planner over a view with the decision applied: what would be done first.
fn foresee(api: &Api, view: &View, decision: &Decision) -> planner::Plan {
    let mut next = view.clone();
    let revision = next.revision.next();
    for change in &decision.proposal.changes {
        next.apply(change, revision);
    }
    let live = api.0.live.load_full();
    let mut number = 0_u32;
    let mut mint = || -> ReplicaUid {
        number += 1;
        #[expect(clippy::expect_used, reason = "the text is a uid by its form")]
        format!("planned-{number}").parse().expect("a uid")
    };
    planner::plan(&next, &live, &decision.deployment.uid, api.0.time(), &mut mint)
}

#[tonic::async_trait]
impl DeploymentService for Api {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let write = request.write.clone();
        if let Some(kept) = self.replay::<ApplyResponse>(&caller, write.as_ref(), &request)? {
            return Ok(Response::new(kept));
        }
        let expected = write.as_ref().and_then(|w| w.expected_revision);
        if expected.is_some() && request.deployments.len() != 1 {
            return Err(
                Error::field("write.expected_revision", "goes with a single deployment").into()
            );
        }
        let mut tries = 0;
        loop {
            let (view, decided) =
                self.decide_all(&caller, &request.deployments, Role::Operator).await?;
            let mut proposal = Proposal::default();
            let mut results = Vec::new();
            let mut objects = Vec::new();
            for (wanted, decision) in decided {
                objects.push(format!("deployment/{}/{}", wanted.namespace, wanted.name));
                if let Some(expected) = expected {
                    proposal.preconditions.push(decide::expected(
                        &wanted.namespace,
                        &wanted.name,
                        expected,
                    ));
                }
                proposal.preconditions.extend(decision.proposal.preconditions);
                proposal.changes.extend(decision.proposal.changes);
                results.push((decision.deployment, decision.action));
            }
            let answer = |view: &View| ApplyResponse {
                results: results
                    .iter()
                    .map(|(held, action)| ApplyResult {
                        deployment: Some(
                            self.shown(view, view.deployment(&held.uid).unwrap_or(held)),
                        ),
                        action: *action as i32,
                    })
                    .collect(),
            };
            if write.as_ref().is_some_and(|w| w.validate_only) {
                return Ok(Response::new(answer(&view)));
            }
            let bytes = answer(&view).encode_to_vec();
            let name = objects.first().cloned().unwrap_or_default();
            finish(
                &mut proposal,
                &caller,
                write.as_ref(),
                "DeploymentService/Apply",
                &request,
                bytes,
                objects,
            );
            match self.0.ledger.propose(proposal).await {
                Ok(_) => return Ok(Response::new(answer(&self.0.ledger.view()))),
                Err(refusal) => {
                    tries += 1;
                    let conflict =
                        matches!(refusal, berth_server_core::batching::Refusal::Conflict { .. });
                    if !conflict || expected.is_some() || tries >= TRIES {
                        return Err(refused(refusal, Kind::Deployment, &name).into());
                    }
                }
            }
        }
    }

    async fn plan(&self, request: Request<PlanRequest>) -> Result<Response<PlanResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let (view, decided) = self.decide_all(&caller, &request.deployments, Role::Viewer).await?;
        let mut planned = Vec::new();
        for (wanted, decision) in decided {
            let plan = foresee(self, &view, &decision);
            let before = view.deployment_by_name(&wanted.namespace, &wanted.name);
            let name = |uid| view.host(uid).map(|h| h.name.to_string()).unwrap_or_default();
            let bytes = wanted.resolved.artifact.as_ref().map_or(0, |a| a.size_bytes)
                + wanted.resolved.image.platforms.first().map_or(0, |p| p.size_bytes);
            planned.push(PlannedDeployment {
                deployment: Some(self.shown(&view, &decision.deployment)),
                action: decision.action as i32,
                changes: changes(before.and_then(|b| b.record.spec.as_ref()), &wanted.spec),
                steps: plan
                    .steps
                    .iter()
                    .map(|s| PlannedStep {
                        kind: s.kind as i32,
                        slot: s.slot,
                        host: name(&s.host),
                        release: s.release.0,
                        fetch_bytes: if s.kind == PlannedStepKind::Stop { 0 } else { bytes },
                    })
                    .collect(),
                pending: plan
                    .report
                    .pending
                    .iter()
                    .map(|(message, count)| Pending {
                        reason: "NO_HOST_FITS".to_owned(),
                        message: message.clone(),
                        count: *count,
                    })
                    .collect(),
                resolved: Some(convert::resolved_to_api(&wanted.resolved)),
            });
        }
        Ok(Response::new(PlanResponse { planned }))
    }

    async fn get_deployment(
        &self,
        request: Request<GetDeploymentRequest>,
    ) -> Result<Response<GetDeploymentResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let target = Self::target(&caller, &request.namespace, &request.name, Role::Viewer)?;
        let view = self.0.ledger.view();
        let held = Self::held(&view, &target)?;
        Ok(Response::new(GetDeploymentResponse { deployment: Some(self.shown(&view, &held)) }))
    }

    async fn list_deployments(
        &self,
        request: Request<ListDeploymentsRequest>,
    ) -> Result<Response<ListDeploymentsResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let view = self.0.ledger.view();
        let all: Vec<Arc<Held>> = view
            .deployments()
            .filter(|d| request.namespace.is_empty() || d.namespace.as_str() == request.namespace)
            .filter(|d| caller.sees(d.namespace.as_str()))
            .cloned()
            .collect();
        let (held, next_page_token) = page(all, request.page.as_ref())?;
        let deployments = held.iter().map(|d| self.shown(&view, d)).collect();
        Ok(Response::new(ListDeploymentsResponse { deployments, next_page_token }))
    }

    type WatchDeploymentStream =
        Pin<Box<dyn Stream<Item = Result<WatchDeploymentResponse, Status>> + Send>>;

    async fn watch_deployment(
        &self,
        request: Request<WatchDeploymentRequest>,
    ) -> Result<Response<Self::WatchDeploymentStream>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let target = Self::target(&caller, &request.namespace, &request.name, Role::Viewer)?;
        let uid = Self::held(&self.0.ledger.view(), &target)?.uid.clone();
        let (tx, rx) = tokio::sync::mpsc::channel(1);
        let api = self.clone();
        tokio::spawn(async move {
            let mut published = api.0.ledger.published();
            let mut live = api.0.live_changes();
            let mut last: Option<WatchDeploymentResponse> = None;
            loop {
                published.borrow_and_update();
                live.borrow_and_update();
                let view = api.0.ledger.view();
                let message = match view.deployment(&uid) {
                    None => WatchDeploymentResponse { deleted: true, ..Default::default() },
                    Some(held) => {
                        let known = api.0.live.load();
                        let now = api.0.time().mono;
                        let mut replicas: Vec<Replica> = view
                            .replicas_of(&uid)
                            .map(|r| status::replica(&view, &known, r, now))
                            .collect();
                        replicas.sort_by_key(|r| {
                            (r.status.as_ref().is_some_and(|s| s.ready), r.slot, r.uid.clone())
                        });
                        replicas.truncate(WATCH_REPLICAS);
                        WatchDeploymentResponse {
                            deployment: Some(api.shown(&view, held)),
                            replicas,
                            deleted: false,
                        }
                    }
                };
                let deleted = message.deleted;
                if last.as_ref() != Some(&message) {
                    last = Some(message.clone());
                    if tx.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
                if deleted {
                    return;
                }
                tokio::select! {
                    // Cancel-safe, all.
                    _ = published.changed() => {}
                    _ = live.changed() => {}
                    () = tx.closed() => return,
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn scale(
        &self,
        request: Request<ScaleRequest>,
    ) -> Result<Response<ScaleResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if r.replicas > 100_000 {
            return Err(Error::field("replicas", "must be 0 to 100000").into());
        }
        if let Some(kept) = self.replay::<ScaleResponse>(&caller, r.write.as_ref(), &r)? {
            return Ok(Response::new(kept));
        }
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let answer = |d| ScaleResponse { deployment: Some(d) };
        let deployment = self
            .write(
                &caller,
                r.write.as_ref(),
                "DeploymentService/Scale",
                &target,
                &r,
                |_, held, asked| decide::scale(held, r.replicas, asked),
                |d| answer(d).encode_to_vec(),
            )
            .await?;
        Ok(Response::new(answer(deployment)))
    }

    async fn restart(
        &self,
        request: Request<RestartRequest>,
    ) -> Result<Response<RestartResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if let Some(kept) = self.replay::<RestartResponse>(&caller, r.write.as_ref(), &r)? {
            return Ok(Response::new(kept));
        }
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let answer = |d| RestartResponse { deployment: Some(d) };
        let deployment = self
            .write(
                &caller,
                r.write.as_ref(),
                "DeploymentService/Restart",
                &target,
                &r,
                decide::restart,
                |d| answer(d).encode_to_vec(),
            )
            .await?;
        Ok(Response::new(answer(deployment)))
    }

    async fn undo(&self, request: Request<UndoRequest>) -> Result<Response<UndoResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if let Some(kept) = self.replay::<UndoResponse>(&caller, r.write.as_ref(), &r)? {
            return Ok(Response::new(kept));
        }
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let answer = |d| UndoResponse { deployment: Some(d) };
        let deployment = self
            .write(
                &caller,
                r.write.as_ref(),
                "DeploymentService/Undo",
                &target,
                &r,
                |view, held, asked| decide::undo(view, held, ReleaseNumber(r.to_release), asked),
                |d| answer(d).encode_to_vec(),
            )
            .await?;
        Ok(Response::new(answer(deployment)))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        if let Some(kept) = self.replay::<DeleteResponse>(&caller, r.write.as_ref(), &r)? {
            return Ok(Response::new(kept));
        }
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let answer = |d| DeleteResponse { deployment: Some(d) };
        let written = self
            .write(
                &caller,
                r.write.as_ref(),
                "DeploymentService/Delete",
                &target,
                &r,
                |_, held, asked| decide::delete(held, asked),
                |d| answer(d).encode_to_vec(),
            )
            .await;
        match written {
            Ok(deployment) => Ok(Response::new(answer(deployment))),
            Err(Error::NotFound { .. }) if r.allow_missing => {
                Ok(Response::new(DeleteResponse { deployment: None }))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn list_releases(
        &self,
        request: Request<ListReleasesRequest>,
    ) -> Result<Response<ListReleasesResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = Self::target(&caller, &r.namespace, &r.deployment, Role::Viewer)?;
        let view = self.0.ledger.view();
        let held = Self::held(&view, &target)?;
        let mut all: Vec<Release> =
            view.releases_of(&held.uid).map(|release| status::release(&held, release)).collect();
        all.reverse();
        let (releases, next_page_token) = page(all, r.page.as_ref())?;
        Ok(Response::new(ListReleasesResponse { releases, next_page_token }))
    }

    async fn get_release(
        &self,
        request: Request<GetReleaseRequest>,
    ) -> Result<Response<GetReleaseResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = Self::target(&caller, &r.namespace, &r.deployment, Role::Viewer)?;
        let view = self.0.ledger.view();
        let held = Self::held(&view, &target)?;
        let number = if r.number == 0 { held.release() } else { ReleaseNumber(r.number) };
        let release = view
            .release(&held.uid, number)
            .ok_or_else(|| Error::not_found(Kind::Release, format!("{}/{number}", held.name)))?;
        Ok(Response::new(GetReleaseResponse { release: Some(status::release(&held, release)) }))
    }

    async fn list_replicas(
        &self,
        request: Request<ListReplicasRequest>,
    ) -> Result<Response<ListReplicasResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let view = self.0.ledger.view();
        let live = self.0.live.load();
        let now = self.0.time().mono;
        let mut all: Vec<Replica> = view
            .replicas()
            .map(|replica| status::replica(&view, &live, replica, now))
            .filter(|s| r.namespace.is_empty() || s.namespace == r.namespace)
            .filter(|s| r.deployment.is_empty() || s.deployment == r.deployment)
            .filter(|s| r.host.is_empty() || s.host == r.host)
            .filter(|s| caller.sees(&s.namespace))
            .collect();
        all.sort_by(|a, b| {
            (&a.namespace, &a.deployment, a.slot, &a.uid).cmp(&(
                &b.namespace,
                &b.deployment,
                b.slot,
                &b.uid,
            ))
        });
        let (replicas, next_page_token) = page(all, r.page.as_ref())?;
        Ok(Response::new(ListReplicasResponse { replicas, next_page_token }))
    }
}
