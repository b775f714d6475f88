//! Deployments, releases and replicas.

use super::foresee::{changes, foresee};
use super::lists::{Asked as Asking, label, word};
use super::writes::{self, Answer, Begun, Call, Step};
use super::{Api, auth, namespace};
use crate::error::{Error, FieldError, Kind};
use crate::ledger::{refused, too_large};
use berth_proto::api::deployment_service_server::DeploymentService;
use berth_proto::api::*;
use berth_proto::convert::{self, Problems};
use berth_proto::ids::{Name, Namespace, ReleaseNumber};
use berth_proto::selector::check_labels;
use berth_server_core::batching::{Precondition, Proposal, Refusal};
use berth_server_core::change::audited;
use berth_server_core::decide::{self, Asked, Decision, Refused, Wanted};
use berth_server_core::objects::Deployment as Held;
use berth_server_core::objects::Replica as HeldReplica;
use berth_server_core::status;
use berth_server_core::view::{ObjectKey, View};
use prost::Message as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Deployments in one call, as the contract says.
const MAX_APPLY: usize = 500;
/// Between two messages of a watch, or two looks of one: at most 10 a second.
pub(super) const WATCH_PAUSE: Duration = Duration::from_millis(100);
/// Replicas in one message of a watch.
const WATCH_REPLICAS: usize = 1000;

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

/// How paths into one deployment of a request begin: as its author finds it.
fn prefix(input: &DeploymentInput, index: usize) -> String {
    if input.origin.is_empty() {
        format!("deployments[{index}].")
    } else {
        format!("{}: ", input.origin)
    }
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

    /// A decision as a step of a write of one deployment.
    fn step<A>(
        &self,
        view: &View,
        call: &Call<'_>,
        target: &Target,
        decision: Decision,
        answer: impl FnOnce(Deployment) -> A,
    ) -> Step<A> {
        let mut proposal = decision.proposal;
        if let Some(expected) = call.expected() {
            let at = decide::expected(&target.namespace, &target.name, expected.0);
            proposal.preconditions.push(at);
        }
        let mut shown = self.shown(view, &decision.deployment);
        if let Some(meta) = shown.meta.as_mut().filter(|_| !proposal.changes.is_empty()) {
            meta.revision = 0;
        }
        let (namespace, uid) = (Some(target.namespace.as_str()), &decision.deployment.uid);
        let object = audited("deployment", namespace, target.name.as_str(), uid.as_str());
        Step { proposal, answer: answer(shown), objects: vec![object] }
    }

    /// Writes one deployment, which must be there.
    async fn change<A: Answer>(
        &self,
        call: &Call<'_>,
        target: &Target,
        decide: impl Fn(&View, &Held, &Asked<'_>) -> Result<Decision, Refused>,
        answer: impl Fn(Deployment) -> A,
    ) -> Result<A, Error> {
        self.write(call, Kind::Deployment, target.name.as_str(), |view| {
            let held = Self::held(view, target)?;
            let asked = Asked { actor: &call.caller.subject, now: crate::cluster::wall_now() };
            let decision = decide(view, &held, &asked)?;
            Ok(self.step(view, call, target, decision, &answer))
        })
        .await
    }

    /// Whether what is to be written of so many deployments is small enough for one write.
    fn fits(&self, proposal: &Proposal, deployments: usize) -> Result<(), Error> {
        let Err(refusal) = self.0.ledger.fits(proposal) else { return Ok(()) };
        let Refusal::TooLarge { size, limits } = refusal else {
            return Err(refused(refusal, Kind::Deployment, ""));
        };
        let part = |most: usize, found: usize| deployments * most / found.max(1);
        let some = part(limits.ops, size.ops).min(part(limits.bytes, size.bytes)).max(1);
        let words = too_large(size, limits);
        Err(Error::field("deployments", format!("{words}; apply about {some} at a time")))
    }

    async fn wanted(
        &self,
        caller: &auth::Caller,
        view: &View,
        input: &DeploymentInput,
        index: usize,
        role: Role,
    ) -> Result<(Wanted, Option<ObjectKey>), Error> {
        let path = prefix(input, index);
        let meta = input.meta.clone().unwrap_or_default();
        let namespace = super::namespace_at(&format!("{path}metadata.namespace"), &meta.namespace)?;
        caller.require(role, namespace.as_str())?;
        let mut p = Problems::default();
        let name = p.take("metadata.name", meta.name.parse::<Name>());
        check_labels(&meta.labels, "metadata.labels", &mut p);
        let written = input.spec.clone().unwrap_or_default();
        let spec = convert::deployment_spec_to_write(&written);
        p.0.extend(spec.as_ref().err().into_iter().flat_map(|found| found.0.iter().cloned()));
        let (Some(name), Ok(spec), true) = (name, spec, p.0.is_empty()) else {
            for problem in &mut p.0 {
                problem.path = format!("{path}{}", problem.path);
            }
            return Err(p.into());
        };
        let found =
            crate::resolve::source(&self.0, caller, view, namespace.as_str(), &spec, &path).await?;
        let wanted = Wanted {
            name,
            namespace,
            labels: meta.labels,
            spec: written,
            resolved: found.resolved,
            resolved_words: found.words,
        };
        Ok((wanted, found.version))
    }

    pub(super) async fn decide_all(
        &self,
        caller: &auth::Caller,
        inputs: &[DeploymentInput],
        role: Role,
    ) -> Result<(Arc<View>, Vec<(Wanted, Decision)>), Error> {
        if inputs.is_empty() || inputs.len() > MAX_APPLY {
            let words = format!("must hold 1 to {MAX_APPLY}, not {}", inputs.len());
            return Err(Error::field("deployments", words));
        }
        let view = self.0.ledger.ahead();
        let mut wanted: Vec<(Wanted, Option<ObjectKey>)> = Vec::new();
        let mut problems = Vec::new();
        let mut missing = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            match self.wanted(caller, &view, input, i, role).await {
                // Twice in one write would be two deployments of one name.
                Ok((one, _))
                    if wanted
                        .iter()
                        .any(|(o, _)| (&o.namespace, &o.name) == (&one.namespace, &one.name)) =>
                {
                    problems.push(FieldError {
                        path: format!("{}metadata.name", prefix(input, i)),
                        message: format!("\"{}\" is named twice", one.name),
                    });
                }
                Ok(one) => wanted.push(one),
                // Every problem of every document at once.
                Err(Error::Invalid(fields)) => problems.extend(fields),
                Err(Error::Precondition { reason, message }) => missing.push((reason, message)),
                Err(other) => return Err(other),
            }
        }
        if let (true, Some((reason, _))) = (problems.is_empty(), missing.first()) {
            let words: Vec<&str> = missing.iter().map(|(_, message)| message.as_str()).collect();
            return Err(Error::precondition(reason, words.join("; ")));
        }
        problems.extend(
            missing.into_iter().map(|(_, message)| FieldError { path: String::new(), message }),
        );
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        let asked = Asked { actor: &caller.subject, now: crate::cluster::wall_now() };
        let mut decided = Vec::new();
        for (one, version) in wanted {
            let uid = uuid::Uuid::now_v7()
                .to_string()
                .parse()
                .map_err(|e| Error::internal("cannot make a uid", e))?;
            let mut decision = decide::apply(&view, &one, uid, &asked)?;
            // One that is deleted meanwhile is not deployed.
            decision.proposal.preconditions.extend(version.map(Precondition::Exists));
            decided.push((one, decision));
        }
        Ok((view, decided))
    }
}

#[tonic::async_trait]
impl DeploymentService for Api {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let caller = auth::of(&request);
        let request = request.into_inner();
        let method = "DeploymentService/Apply";
        let call = match self.begin(&caller, request.write.as_ref(), method, &request)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        if call.expected().is_some() && request.deployments.len() != 1 {
            return Err(
                Error::field("write.expected_revision", "goes with a single deployment").into()
            );
        }
        let mut tries = 0;
        loop {
            let (view, decided) =
                self.decide_all(&caller, &request.deployments, Role::Operator).await?;
            let mut proposal = Proposal::default();
            let mut answer = ApplyResponse::default();
            let mut objects = Vec::new();
            let first = decided.first().map(|(wanted, _)| wanted.name.to_string());
            let name = first.unwrap_or_default();
            for (wanted, decision) in decided {
                let action = decision.action as i32;
                let target = Target { namespace: wanted.namespace, name: wanted.name };
                let step = self.step(&view, &call, &target, decision, |deployment| ApplyResult {
                    deployment: Some(deployment),
                    action,
                });
                proposal.preconditions.extend(step.proposal.preconditions);
                proposal.changes.extend(step.proposal.changes);
                answer.results.push(step.answer);
                objects.extend(step.objects);
            }
            if call.validate_only() {
                writes::holds(&view, &proposal, Kind::Deployment, &name)?;
                self.fits(&proposal, request.deployments.len())?;
                return Ok(Response::new(answer));
            }
            call.seal(&mut proposal, answer.encode_to_vec(), objects);
            self.fits(&proposal, request.deployments.len())?;
            match self.0.ledger.propose(proposal).await {
                Ok(revision) => {
                    answer.written_at(revision);
                    return Ok(Response::new(answer));
                }
                Err(refusal) => {
                    tries += 1;
                    if !call.again(&refusal, tries) {
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
        let changes_of = |(_, decision): &(_, Decision)| decision.proposal.changes.clone();
        let together = Proposal {
            changes: decided.iter().flat_map(changes_of).collect(),
            ..Proposal::default()
        };
        self.fits(&together, decided.len())?;
        let plans = foresee(self, &view, &decided).await?;
        let mut planned = Vec::new();
        for ((wanted, decision), plan) in decided.into_iter().zip(plans) {
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
                        reason: status::pending_reason(message).to_owned(),
                        message: message.clone(),
                        count: *count,
                    })
                    .collect(),
                resolved: Some(convert::resolved_to_api(&wanted.resolved)),
                more: plan.report.more,
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
        let list = Asking {
            call: "ListDeployments",
            parents: &[&request.namespace],
            fields: &["name", "namespace", "labels"],
        };
        let listing = self.listing(&caller, request.page.as_ref(), &list)?;
        let view = Arc::clone(&listing.view);
        let all: Vec<Arc<Held>> = view
            .deployments()
            .filter(|d| request.namespace.is_empty() || d.namespace.as_str() == request.namespace)
            .filter(|d| caller.sees(d.namespace.as_str()))
            .filter(|d| {
                listing.wants(|field| match field {
                    "name" => Some(d.name.as_str()),
                    "namespace" => Some(d.namespace.as_str()),
                    other => d.record.meta.as_ref().and_then(|m| label(&m.labels, other)),
                })
            })
            .cloned()
            .collect();
        let (deployments, next_page_token) = self.page(listing, all, |d| self.shown(&view, &d));
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
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let method = "DeploymentService/Scale";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = |d| ScaleResponse { deployment: Some(d) };
        let answer = self
            .change(&call, &target, |_, held, asked| decide::scale(held, r.replicas, asked), answer)
            .await?;
        Ok(Response::new(answer))
    }

    async fn restart(
        &self,
        request: Request<RestartRequest>,
    ) -> Result<Response<RestartResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let method = "DeploymentService/Restart";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = |d| RestartResponse { deployment: Some(d) };
        let answer = self.change(&call, &target, decide::restart, answer).await?;
        Ok(Response::new(answer))
    }

    async fn undo(&self, request: Request<UndoRequest>) -> Result<Response<UndoResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = Self::target(&caller, &r.namespace, &r.name, Role::Operator)?;
        let method = "DeploymentService/Undo";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = |d| UndoResponse { deployment: Some(d) };
        let answer = self
            .change(
                &call,
                &target,
                |view, held, asked| decide::undo(view, held, ReleaseNumber(r.to_release), asked),
                answer,
            )
            .await?;
        Ok(Response::new(answer))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = match Self::target(&caller, &r.namespace, &r.name, Role::Operator) {
            Err(Error::NotFound { .. }) if r.allow_missing => {
                return Ok(Response::new(DeleteResponse { deployment: None }));
            }
            found => found?,
        };
        let method = "DeploymentService/Delete";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::Deployment, target.name.as_str(), |view| {
                let held = match Self::held(view, &target) {
                    Err(Error::NotFound { .. }) if r.allow_missing => {
                        return Ok(Step::nothing(DeleteResponse { deployment: None }));
                    }
                    found => found?,
                };
                let asked = Asked { actor: &caller.subject, now: crate::cluster::wall_now() };
                let decision = decide::delete(&held, &asked)?;
                Ok(self.step(view, &call, &target, decision, |d| DeleteResponse {
                    deployment: Some(d),
                }))
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn list_releases(
        &self,
        request: Request<ListReleasesRequest>,
    ) -> Result<Response<ListReleasesResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let target = Self::target(&caller, &r.namespace, &r.deployment, Role::Viewer)?;
        let list = Asking {
            call: "ListReleases",
            parents: &[target.namespace.as_str(), target.name.as_str()],
            fields: &["cause", "created_by", "state"],
        };
        let listing = self.listing(&caller, r.page.as_ref(), &list)?;
        let view = Arc::clone(&listing.view);
        let held = Self::held(&view, &target)?;
        let mut all: Vec<Release> = view
            .releases_of(&held.uid)
            .map(|release| status::release(&held, release))
            .filter(|shown| {
                listing.wants(|field| match field {
                    "cause" => Some(&shown.cause),
                    "created_by" => Some(&shown.created_by),
                    _ => Some(word(shown.state().as_str_name(), "RELEASE_STATE_")),
                })
            })
            .collect();
        all.reverse();
        let (releases, next_page_token) = self.page(listing, all, |release| release);
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
        let list = Asking {
            call: "ListReplicas",
            parents: &[&r.namespace, &r.deployment, &r.host],
            fields: &["deployment", "host", "namespace"],
        };
        let listing = self.listing(&caller, r.page.as_ref(), &list)?;
        let view = Arc::clone(&listing.view);
        let live = self.0.live.load();
        let now = self.0.time().mono;
        // What is not on the page is only looked at.
        let named = |held: &Arc<HeldReplica>| -> (&str, &str, &str) {
            let owner = view.deployment(&held.deployment);
            let host = view.host(&held.host);
            (
                owner.map_or("", |d| d.namespace.as_str()),
                owner.map_or("", |d| d.name.as_str()),
                host.map_or("", |h| h.name.as_str()),
            )
        };
        let wanted = |held: &&Arc<HeldReplica>| {
            let (namespace, deployment, host) = named(held);
            (r.namespace.is_empty() || namespace == r.namespace)
                && (r.deployment.is_empty() || deployment == r.deployment)
                && (r.host.is_empty() || host == r.host)
                && caller.sees(namespace)
                && listing.wants(|field| match field {
                    "deployment" => Some(deployment),
                    "host" => Some(host),
                    _ => Some(namespace),
                })
        };
        let of_one = match (r.namespace.parse::<Namespace>(), r.deployment.parse::<Name>()) {
            (Ok(namespace), Ok(name)) => Some(view.deployment_by_name(&namespace, &name)),
            _ => None,
        };
        let mut all: Vec<Arc<HeldReplica>> = match of_one {
            Some(Some(one)) => view.replicas_of(&one.uid).filter(wanted).cloned().collect(),
            // One that is gone may have replicas that are not, yet.
            Some(None) | None => view.replicas().filter(wanted).cloned().collect(),
        };
        let order = |held: &Arc<HeldReplica>| {
            let (namespace, deployment, _) = named(held);
            (namespace.to_owned(), deployment.to_owned(), held.slot, held.uid.clone())
        };
        all.sort_by_cached_key(order);
        let (replicas, next_page_token) =
            self.page(listing, all, |held| status::replica(&view, &live, &held, now));
        Ok(Response::new(ListReplicasResponse { replicas, next_page_token }))
    }
}
