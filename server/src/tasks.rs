//! Background work: planning, sets and routes.
//!
//! Each is woken by a level (a newer view, newer live facts, a time that was asked for) and works on
//! the newest there is; what was missed comes up again.

use crate::cluster::Cluster;
use crate::gateway::route::{Backend, Ready, Routes};
use berth_proto::ids::{DeploymentUid, HostUid, ReplicaUid};
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::Change;
use berth_server_core::planner;
use berth_server_core::view::ObjectKey;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// A full pass, as a check on what wakes planning.
const FULL_PASS: Duration = Duration::from_secs(30);

/// Plans until `stop`.
pub async fn plan(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut published = cluster.ledger.published();
    let mut live = cluster.live_changes();
    loop {
        published.borrow_and_update();
        live.borrow_and_update();
        let wake = pass(&cluster).await;
        let wait = wake.map_or(FULL_PASS, |ms| Duration::from_millis(ms).min(FULL_PASS));
        tokio::select! {
            // Cancel-safe, all: a change that was not seen stays one.
            _ = published.changed() => {}
            _ = live.changed() => {}
            () = tokio::time::sleep(wait) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Plans every deployment once; answers in how many milliseconds to come again.
async fn pass(cluster: &Arc<Cluster>) -> Option<u64> {
    let all: Vec<DeploymentUid> =
        cluster.ledger.ahead().deployments().map(|d| d.uid.clone()).collect();
    let mut wake: Option<u64> = None;
    let mut sooner = |ms: u64| wake = Some(wake.map_or(ms, |held| held.min(ms)));
    for uid in &all {
        let view = cluster.ledger.ahead();
        let live = cluster.live.load_full();
        let now = cluster.time();
        let plan = planner::plan(&view, &live, uid, now, &mut new_replica);
        let Some(deployment) = view.deployment(uid) else { continue };
        if live.clock(uid).map(|c| (**c).clone()) != plan.clock {
            cluster.edit_live(|live| live.set_clock(uid, plan.clock.clone()));
        }
        if let Some(at) = plan.report.wake {
            sooner(at.since_ms(now.mono).max(1));
        }
        let more = plan.report.more;
        cluster.reports.lock().insert(uid.clone(), plan.report);
        if plan.changes.is_empty() {
            continue;
        }
        let still = Precondition::At(ObjectKey::Deployment(uid.clone()), deployment.revision);
        let proposal = Proposal { preconditions: vec![still], changes: plan.changes };
        match cluster.ledger.propose(proposal).await {
            Ok(_) if more => sooner(1),
            Ok(_) => {}
            // Somebody was faster, or the disk is full: the next pass sees what is.
            Err(why) => {
                tracing::debug!(deployment = %deployment.name, %why, "a plan was not taken");
                sooner(500);
            }
        }
    }
    let known: BTreeSet<&DeploymentUid> = all.iter().collect();
    cluster.reports.lock().retain(|uid, _| known.contains(uid));
    wake
}

#[expect(clippy::expect_used, reason = "a UUID in lower case is a uid")]
fn new_replica() -> ReplicaUid {
    uuid::Uuid::now_v7().to_string().parse().expect("a UUID is a uid")
}

/// Hands newer sets to sessions until `stop`.
pub async fn sets(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut changes = cluster.ledger.changes();
    loop {
        let first = tokio::select! {
            // Cancel-safe, both.
            change = changes.recv() => change,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let mut hosts: BTreeSet<HostUid> = BTreeSet::new();
        let mut all = false;
        let mut next = Some(first);
        while let Some(change) = next.take() {
            match change {
                Ok((_, Change::SetGeneration(host, _))) => {
                    hosts.insert(host);
                }
                Ok((_, Change::PutHost(host))) => {
                    hosts.insert(host.uid.clone());
                }
                Ok((_, Change::PutCluster(_))) | Err(broadcast::error::RecvError::Lagged(_)) => {
                    all = true;
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
            next = changes.try_recv().ok().map(Ok);
        }
        if all {
            let view = cluster.ledger.view();
            hosts.extend(view.hosts().map(|h| h.uid.clone()));
        }
        cluster.refresh_sets(&hosts);
    }
}

/// Keeps the gateway's table until `stop`.
pub async fn routes(cluster: Arc<Cluster>, routes: Arc<Routes>, mut stop: watch::Receiver<bool>) {
    let mut published = cluster.ledger.published();
    let mut live = cluster.live_changes();
    loop {
        published.borrow_and_update();
        live.borrow_and_update();
        routes.replace(table(&cluster));
        tokio::select! {
            // Cancel-safe, all.
            _ = published.changed() => {}
            _ = live.changed() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

fn table(cluster: &Cluster) -> Vec<(Backend, Vec<Ready>)> {
    let view = cluster.ledger.view();
    let live = cluster.live.load();
    let mut table = Vec::new();
    for deployment in view.deployments() {
        let Some(release) = view.release(&deployment.uid, deployment.release()) else { continue };
        let ports = &release.spec.ports;
        let named = |name: &str| ports.iter().find(|p| p.name == name).map(|p| p.name.clone());
        let Some(http_port) = named("http").or(ports.first().map(|p| p.name.clone())) else {
            continue;
        };
        let grpc_port = named("grpc").unwrap_or_else(|| http_port.clone());
        let ready = view
            .replicas_of(&deployment.uid)
            .filter(|r| r.runs() && live.is_present(&r.host))
            .filter(|r| live.replica(&r.uid).is_some_and(|l| l.status.ready))
            .map(|r| Ready {
                replica: r.uid.clone(),
                host: r.host.clone(),
                version: view
                    .release(&r.deployment, r.release)
                    .and_then(|release| release.source.artifact.as_ref())
                    .map(|artifact| artifact.version.clone())
                    .unwrap_or_default(),
            })
            .collect();
        let backend = Backend {
            namespace: deployment.namespace.to_string(),
            deployment: deployment.name.to_string(),
            http_port,
            grpc_port,
            targets: Vec::new(),
        };
        table.push((backend, ready));
    }
    table
}
