//! The planning pump: feeds the queue with what happens and carries out what is planned.
//!
//! Works in rounds: what has happened goes into the queue, then everything in it is planned and
//! proposed ([`berth_server_core::round`]). Nothing is remembered that a restart would miss: the queue
//! begins with everything in it.

use crate::cluster::Cluster;
use berth_proto::ids::ReplicaUid;
use berth_server_core::change::Change;
use berth_server_core::live::{Moved, Unheard};
use berth_server_core::planner;
use berth_server_core::queue::{Key, Queue, Why};
use berth_server_core::round::{Planned, Round, Sent};
use berth_server_core::view::View;
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// A pass over all deployments, as a check on the queue. A guess: seldom enough to cost nothing, often
/// enough that a missed wake is a delay and not an outage.
const FULL_PASS_MS: u64 = 60_000;

/// Plans until `stop`.
pub async fn run(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut changes = cluster.ledger.changes();
    let mut live = cluster.live_changes();
    let mut queue = Queue::new(&cluster.ledger.ahead());
    let mut check_at = cluster.time().mono.plus_ms(FULL_PASS_MS);
    let mut unheard = Unheard::default();
    let idle = u64::try_from(cluster.settings.idle.as_millis()).unwrap_or(u64::MAX);
    let mut look = || {
        let (view, now) = (cluster.ledger.view(), cluster.time().mono);
        // Wakes what they hold up.
        cluster.edit_live(|live| unheard.look(&view, live, idle, now));
    };
    look();
    let mut first = None;
    loop {
        live.borrow_and_update();
        take_in(&cluster, &mut queue, &mut changes, first.take());
        let now = cluster.time().mono;
        if now >= check_at {
            check_at = now.plus_ms(FULL_PASS_MS);
            look();
            queue.check_all(&cluster.ledger.ahead());
        }
        if round(&cluster, &mut queue).await {
            continue;
        }
        let due = queue.due().map_or(check_at, |due| due.min(check_at));
        let wait = Duration::from_millis(due.since_ms(cluster.time().mono).max(1));
        tokio::select! {
            // Cancel-safe, all: a change that was not taken stays one.
            change = changes.recv() => match change {
                Err(broadcast::error::RecvError::Closed) => return,
                change => first = Some(change),
            },
            _ = live.changed() => {}
            () = tokio::time::sleep(wait) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

type Heard = Result<
    (berth_proto::ids::Revision, berth_server_core::change::Change),
    broadcast::error::RecvError,
>;

/// Puts everything that has happened into the queue.
fn take_in(
    cluster: &Cluster,
    queue: &mut Queue,
    changes: &mut broadcast::Receiver<(
        berth_proto::ids::Revision,
        berth_server_core::change::Change,
    )>,
    first: Option<Heard>,
) {
    let mut heard = Vec::new();
    let mut lagged = false;
    let mut next = first;
    loop {
        match next.take() {
            Some(Ok((_, change))) => heard.push(change),
            Some(Err(broadcast::error::RecvError::Lagged(_))) => lagged = true,
            Some(Err(broadcast::error::RecvError::Closed)) | None => {}
        }
        next = match changes.try_recv() {
            Ok(change) => Some(Ok(change)),
            Err(broadcast::error::TryRecvError::Lagged(n)) => {
                Some(Err(broadcast::error::RecvError::Lagged(n)))
            }
            Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed) => {
                break;
            }
        };
    }
    let moved = cluster.take_moved();
    // After the news: whatever they tell of is in these, and what comes later brings news of its own.
    let view = cluster.ledger.ahead();
    let live = cluster.live.load_full();
    if lagged {
        *queue = Queue::new(&view);
        return;
    }
    for change in &heard {
        if let Change::DeleteDeployment(uid) = change {
            cluster.reports.lock().remove(uid);
        }
        queue.changed(&view, &live, change);
    }
    for moved in &moved {
        queue.moved(&view, &live, moved);
    }
}

/// Plans what is in the queue; false: there was nothing.
async fn round(cluster: &Arc<Cluster>, queue: &mut Queue) -> bool {
    let mut round = Round::begin(View::clone(&cluster.ledger.ahead()));
    loop {
        let live = cluster.live.load_full();
        let Some(planned) = round.next(queue, &live, cluster.time(), &mut new_replica) else {
            break;
        };
        let Planned { key, why, plan, changes_something, clock_moved } = planned;
        keep_report(cluster, &key, &plan);
        if clock_moved {
            cluster.edit_live(|live| live.set_clock(key.deployment(), plan.clock.clone()));
        }
        if changes_something && why == Why::Check {
            tracing::warn!(
                deployment = %key.deployment(), steps = plan.steps.len(),
                "a full pass found what no wake had told of"
            );
        }
        // A round may take a tenth of a second; others on this thread go between.
        tokio::task::yield_now().await;
    }
    let sent = round.proposals(queue);
    let results = join_all(sent.into_iter().map(|Sent { uid, proposals }| async move {
        let all = proposals.into_iter().map(|proposal| cluster.ledger.propose(proposal));
        (uid, join_all(all).await)
    }))
    .await;
    let refused = results.into_iter().flat_map(|(uid, results)| {
        results.into_iter().filter_map(Result::err).map(move |why| {
            tracing::debug!(deployment = %uid, %why, "a plan was not taken");
            (uid.clone(), why)
        })
    });
    round.ended(queue, refused, cluster.time().mono)
}

fn keep_report(cluster: &Cluster, key: &Key, plan: &planner::Plan) {
    let mut reports = cluster.reports.lock();
    match key {
        Key::Whole(uid) if cluster.ledger.ahead().deployment(uid).is_none() => {
            reports.remove(uid);
        }
        Key::Whole(uid) => {
            reports.insert(uid.clone(), plan.report.clone());
        }
        Key::OnHost(uid, host) => {
            if let Some(report) = reports.get_mut(uid) {
                report.merge_host(host, plan);
            }
        }
    }
}

#[expect(clippy::expect_used, reason = "a UUID in lower case is a uid")]
fn new_replica() -> ReplicaUid {
    uuid::Uuid::now_v7().to_string().parse().expect("a UUID is a uid")
}

/// What has moved among what is known live, waiting to be taken in; one entry for each host and
/// replica at the most.
pub type News = BTreeSet<Moved>;
