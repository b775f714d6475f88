//! Background work: sets and routes. Planning has a file of its own.
//!
//! Each is woken by a level (a newer view, newer live facts, a time that was asked for) and works on
//! the newest there is; what was missed comes up again.

use crate::api::writes::REQUEST_KEPT_MS;
use crate::cluster::Cluster;
use crate::doors::certificates::Certificates;
use crate::gateway::route::{Backend, Ready, Routes};
use crate::store::StoreError;
use crate::store::folder::Folder;
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::Wall;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::dispatch::Touched;
use berth_server_core::objects::Replica;
use berth_server_core::view::View;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, watch};

/// Hands newer sets to sessions until `stop`.
pub async fn sets(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut changes = cluster.ledger.changes();
    loop {
        let first = tokio::select! {
            // Cancel-safe, both.
            change = changes.recv() => change,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let mut touched = Touched::default();
        let mut next = Some(first);
        while let Some(change) = next.take() {
            match change {
                Ok((_, change)) => touched.by(&change),
                Err(broadcast::error::RecvError::Lagged(_)) => touched.all = true,
                Err(broadcast::error::RecvError::Closed) => return,
            }
            next = match changes.try_recv() {
                Ok(change) => Some(Ok(change)),
                // Not the end: what was passed over may name any host.
                Err(broadcast::error::TryRecvError::Lagged(n)) => {
                    Some(Err(broadcast::error::RecvError::Lagged(n)))
                }
                Err(
                    broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed,
                ) => None,
            };
        }
        let hosts = touched.hosts(&cluster.ledger.view());
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
        let begun = Instant::now();
        routes.replace(table(&cluster));
        let rest = rest_after(begun.elapsed());
        tokio::select! {
            // Cancel-safe, all.
            _ = published.changed() => {}
            _ = live.changed() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        tokio::time::sleep(rest).await;
    }
}

/// How long the table is left as it is after it took `cost` to make, so that a large fleet in which
/// something changes all the time costs a fifth of a core, as long as a table takes a quarter of a
/// second at the most. A small one waits for nothing
/// that could be noticed; a replica that is gone meanwhile is passed over by the request itself.
fn rest_after(cost: Duration) -> Duration {
    (cost * 4).min(Duration::from_secs(1))
}

/// The gateway's table as it should be now.
pub(crate) fn table(cluster: &Cluster) -> Vec<(Backend, Vec<Ready>)> {
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
            .map(|r| {
                let own = view.release(&r.deployment, r.release);
                let version = own.and_then(|release| release.source.model_version.clone());
                let served = own.and_then(|release| release.spec.served_model.clone());
                Ready {
                    replica: r.uid.clone(),
                    host: r.host.clone(),
                    version: version.unwrap_or_default(),
                    served: served.unwrap_or_else(|| deployment.name.to_string()),
                }
            })
            .collect();
        let backend = Backend {
            namespace: deployment.namespace.to_string(),
            deployment: deployment.name.to_string(),
            http_port,
            grpc_port,
            ..Backend::default()
        };
        table.push((backend, ready));
    }
    table
}

/// Has live calls judged again when users or tokens were written or hosts removed, until `stop`.
pub async fn revocations(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut changes = cluster.ledger.changes();
    // What was written before this task listened.
    cluster.judge_again();
    loop {
        let change = tokio::select! {
            // Cancel-safe, both.
            change = changes.recv() => change,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match change {
            Ok((_, Change::PutUser(_) | Change::PutUserToken(_)))
            | Err(broadcast::error::RecvError::Lagged(_)) => cluster.judge_again(),
            Ok((_, Change::PutHost(host))) if host.is_removed() => cluster.judge_again(),
            Ok(_) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Between two looks whether all know the roots and addresses there are.
const TRUST: Duration = Duration::from_secs(30);

/// Tells roots and addresses again, until `stop`, to whoever has not said that it holds them.
pub async fn trust(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            // Cancel-safe, both.
            () = tokio::time::sleep(TRUST) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        // Else with the next look.
        if let Err(error) = cluster.tell_trust_again().await {
            tracing::warn!(%error, "the roots' number cannot be written yet");
        }
    }
}

/// Between two looks at the certificates that the doors show.
const CERTIFICATES: Duration = Duration::from_secs(3600);

/// Keeps the doors' certificates good until `stop`.
pub async fn certificates(
    cluster: Arc<Cluster>,
    shown: Certificates,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            // Cancel-safe, both.
            () = tokio::time::sleep(CERTIFICATES) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        match shown.internal.renew(&cluster.roots.current(), crate::cluster::wall_now()) {
            Ok(true) => tracing::info!("the server's own certificate was made anew"),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(error = %crate::error::Chain(&error), "it cannot be made anew");
            }
        }
        let Some(operators) = shown.operators.clone() else { continue };
        match tokio::task::spawn_blocking(move || operators.read_again()).await {
            Ok(Ok(true)) => tracing::info!("the registry's certificate was read again"),
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => {
                let error = crate::error::Chain(&error);
                tracing::error!(%error, "the registry's certificate is not read; the old one stays");
            }
        }
    }
}

/// Between two looks for room on a full disk, or for a ballast that found none.
const ROOM_AGAIN: Duration = Duration::from_secs(2);

/// What a look at the disk has left.
enum Ballast {
    /// It is there.
    There,
    /// It gave its room.
    GivenUp,
    /// There is no room for it.
    Missing,
}

/// Gives the ballast up when the disk is full, and makes it when there is none and room for it, until
/// `stop`.
/// Meanwhile agents and plans are still written, in the room that the ballast has left, and of what
/// people ask for only what makes room.
pub async fn space(cluster: Arc<Cluster>, folder: Arc<Folder>, mut stop: watch::Receiver<bool>) {
    let mut full = cluster.ledger.full();
    let bytes = cluster.settings.ballast_bytes;
    // Only a write that was refused since the ballast was made says that the disk is full.
    let mut refused = false;
    // There should be a ballast, and is none.
    let mut missing = false;
    loop {
        let cramped = cluster.cramped.load(Ordering::Relaxed);
        let folder = Arc::clone(&folder);
        // A full disk takes its time for either.
        let tried = tokio::task::spawn_blocking(move || {
            if refused && folder.release_ballast()? {
                Ok(Ballast::GivenUp)
            } else if folder.ballast(bytes)? {
                Ok(Ballast::There)
            } else {
                Ok::<_, StoreError>(Ballast::Missing)
            }
        });
        let Ok(tried) = tried.await else { return };
        match tried {
            Ok(Ballast::GivenUp) => {
                tracing::error!(
                    "the ballast is given up: only deleting and cleaning are taken until there is room"
                );
                cluster.cramped.store(true, Ordering::Relaxed);
            }
            Ok(Ballast::There) if cramped => {
                tracing::info!("there is room again, and the ballast; everything is taken");
                cluster.cramped.store(false, Ordering::Relaxed);
                full.mark_unchanged();
                missing = false;
            }
            Ok(Ballast::There) => {
                if missing {
                    tracing::info!("there is room for the ballast, and it is made");
                }
                missing = false;
            }
            Ok(Ballast::Missing) => {
                if !missing && !cramped {
                    tracing::warn!(
                        bytes,
                        "there is no room for the ballast beside as much again: if the disk fills \
                         now, not even deleting is taken; make room, or give a smaller --ballast-mib"
                    );
                }
                missing = true;
            }
            Err(error) => {
                tracing::warn!(error = %crate::error::Chain(&error), "the ballast cannot be changed");
            }
        }
        let cramped = cluster.cramped.load(Ordering::Relaxed);
        refused = false;
        tokio::select! {
            // Cancel-safe, all.
            changed = full.changed(), if !cramped => match changed {
                Ok(()) => refused = *full.borrow(),
                Err(_) => return,
            },
            () = tokio::time::sleep(ROOM_AGAIN), if cramped || missing => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Between two looks for what is kept no longer.
const SWEEP: Duration = Duration::from_secs(600);
/// What one write of a sweep removes: within what one commit of the ledger holds.
const SWEEP_CHUNK: usize = 80;
/// How long a token is kept past its end, so that whoever uses it late is told that it has expired and
/// not that it is not known.
const TOKEN_KEPT_MS: i64 = 30 * 86_400_000;

/// Forgets answers of requests after their day, tokens long past their end, events and audit
/// entries beyond what is kept, and uploads to the
/// registry that nobody went on with, until `stop`.
pub async fn sweep(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    loop {
        let view = cluster.ledger.ahead();
        for chunk in over(&view, crate::cluster::wall_now()).chunks(SWEEP_CHUNK) {
            let proposal = Proposal { preconditions: Vec::new(), changes: chunk.to_vec() };
            if let Err(why) = cluster.ledger.propose(proposal).await {
                tracing::debug!(%why, "a sweep was not taken; the next one will be");
                break;
            }
        }
        cluster.forget_old_history().await;
        let view = cluster.ledger.view();
        cluster.edit_live(|live| live.forget_deleted(&view));
        if let Err(error) = cluster.registry.end_abandoned_uploads().await {
            tracing::warn!(%error, "abandoned uploads could not be ended; the next sweep will try");
        }
        tokio::select! {
            // Cancel-safe, both.
            () = tokio::time::sleep(SWEEP) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// What is kept no longer.
fn over(view: &View, now: Wall) -> Vec<Change> {
    let requests = view
        .requests()
        .filter(|kept| now.0 - kept.record.time_unix_ms >= REQUEST_KEPT_MS)
        .map(|kept| Change::DeleteRequest(kept.record.key.clone()));
    let tokens = view.join_tokens().filter_map(|kept| {
        let token = kept.record.token.as_ref()?;
        let end = berth_proto::convert::wall(token.expire_time.as_ref()?);
        (now.0 - end.0 >= TOKEN_KEPT_MS).then(|| Change::DeleteJoinToken(token.id.clone()))
    });
    let user_tokens = view
        .user_tokens()
        .filter(|kept| now.0 - kept.record.expire_unix_ms >= TOKEN_KEPT_MS)
        .map(|kept| Change::DeleteUserToken(kept.record.id.clone()));
    // Nobody will ever say that they are gone.
    let removed = |r: &&Arc<Replica>| view.host(&r.host).is_none_or(|h| h.is_removed());
    let orphans = view.replicas().filter(|r| r.intent == ReplicaIntent::Orphan).filter(removed);
    let orphans = orphans.map(|r| Change::DeleteReplica(r.uid.clone()));
    requests.chain(tokens).chain(user_tokens).chain(orphans).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::api::JoinToken;
    use berth_proto::ids::Revision;
    use berth_proto::record::{JoinTokenRecord, RequestRecord, UserTokenRecord};

    #[test]
    fn a_table_that_costs_much_is_made_less_often() {
        let ms = Duration::from_millis;
        assert_eq!(rest_after(Duration::from_micros(50)), Duration::from_micros(200));
        assert_eq!(rest_after(ms(25)), ms(100));
        assert_eq!(rest_after(ms(900)), ms(1000), "never later than that");
    }

    #[test]
    fn answers_are_forgotten_after_a_day_and_tokens_a_month_past_their_end() {
        let mut view = View::default();
        for (key, at) in [("old", 0), ("new", 1)] {
            let record =
                RequestRecord { key: key.into(), time_unix_ms: at, ..RequestRecord::default() };
            view.apply(&Change::PutRequest(Arc::new(record)), Revision(1));
        }
        let token = JoinToken {
            id: "t".into(),
            expire_time: Some(berth_proto::convert::timestamp(Wall(0))),
            ..JoinToken::default()
        };
        let token = JoinTokenRecord { token: Some(token), ..JoinTokenRecord::default() };
        view.apply(&Change::PutJoinToken(Arc::new(token)), Revision(2));
        for (id, end) in [("ended", 0), ("later", 1)] {
            let token =
                UserTokenRecord { id: id.into(), expire_unix_ms: end, ..Default::default() };
            view.apply(&Change::PutUserToken(Arc::new(token)), Revision(3));
        }
        assert_eq!(over(&view, Wall(REQUEST_KEPT_MS)), [Change::DeleteRequest("old".into())]);
        let gone = over(&view, Wall(TOKEN_KEPT_MS));
        assert_eq!(gone.len(), 4);
        for change in gone {
            view.apply(&change, Revision(4));
        }
        let left: Vec<&str> = view.user_tokens().map(|kept| kept.record.id.as_str()).collect();
        assert_eq!(left, ["later"]);
    }
}
