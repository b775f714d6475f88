//! Metrics in Prometheus' text form, each with its help; deployments as the caller may see them.

use crate::cluster::Cluster;
use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use berth_server_core::live::Presence;
use std::fmt::Write as _;
use std::sync::Arc;

/// Answers Prometheus.
pub async fn metrics(State(cluster): State<Arc<Cluster>>, request: Request) -> Response {
    let caller = match super::reader(&cluster, &request) {
        Ok(caller) => caller,
        Err(response) => return response,
    };
    let view = cluster.ledger.view();
    let live = cluster.live.load();
    let mut text = String::new();
    let mut count = |name: &str, help: &str, rows: Vec<(String, u64)>| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for (labels, value) in rows {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let mut presence = [0_u64; 3];
    for host in view.hosts() {
        presence[match live.presence(&host.uid) {
            Presence::Unknown => 0,
            Presence::Present => 1,
            Presence::Away(_) => 2,
        }] += 1;
    }
    let labelled = |names: [&str; 3]| -> Vec<(String, u64)> {
        names.iter().zip(presence).map(|(n, v)| (format!("{{presence=\"{n}\"}}"), v)).collect()
    };
    count("berth_hosts", "Hosts by presence.", labelled(["unknown", "present", "away"]));
    count(
        "berth_ledger_revision",
        "Newest durable revision.",
        vec![(String::new(), view.revision.0)],
    );
    let mut wanted = Vec::new();
    let mut ready = Vec::new();
    for deployment in view.deployments().filter(|d| caller.sees(d.namespace.as_str())) {
        let labels = format!(
            "{{namespace=\"{}\",deployment=\"{}\"}}",
            deployment.namespace, deployment.name
        );
        let is_ready = |uid| live.replica(uid).is_some_and(|l| l.status.ready);
        let number = view
            .replicas_of(&deployment.uid)
            .filter(|r| r.runs() && live.is_present(&r.host) && is_ready(&r.uid))
            .count();
        wanted.push((labels.clone(), deployment.wanted().unwrap_or(0).into()));
        ready.push((labels, number as u64));
    }
    count("berth_deployment_replicas_wanted", "Replicas wanted.", wanted);
    count("berth_deployment_replicas_ready", "Replicas ready.", ready);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
