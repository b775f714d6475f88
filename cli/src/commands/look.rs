//! Looking: replicas, and what hosts and replicas use.

use super::host::labels_of;
use super::{ask, connect, pages};
use crate::args::{Global, Output, TopOf};
use crate::client::Client;
use crate::error::Result;
use crate::output::{age, moment, print, transfer, waits, word};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::quantity::{format_cpu, human_bytes};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Deployments that meet the selector, by namespace and name; `None` without one.
async fn selected(global: &Global, client: &Client) -> Result<Option<BTreeSet<(String, String)>>> {
    if global.selector.is_none() {
        return Ok(None);
    }
    // --filter is for the replicas that are asked for.
    let all = Global { filter: None, ..global.clone() };
    let global = &all;
    let mut deployments = client.deployments();
    let all = pages!(global, deployments, |page| deployments
        .list_deployments(ListDeploymentsRequest { namespace: client.namespace.clone(), page }));
    let metas = all.into_iter().filter_map(|d| d.meta);
    let chosen = metas.filter(|m| global.selects(&m.labels));
    Ok(Some(chosen.map(|m| (m.namespace, m.name)).collect()))
}

/// Rows for the slots that have no replica, because no host fits: `deployment list -o json` has them as
/// `pending`.
async fn placeless(global: &Global, client: &Client, name: &str) -> Result<Vec<Vec<String>>> {
    if global.filter.is_some() {
        return Ok(Vec::new());
    }
    let mut deployments = client.deployments();
    let all = pages!(global, deployments, |page| deployments
        .list_deployments(ListDeploymentsRequest { namespace: client.namespace.clone(), page }));
    let mut rows = Vec::new();
    for deployment in all {
        let meta = deployment.meta.unwrap_or_default();
        if (!name.is_empty() && meta.name != name) || !global.selects(&meta.labels) {
            continue;
        }
        let status = deployment.status.unwrap_or_default();
        for pending in status.pending.iter().filter(|p| p.reason == "NO_HOST_FITS") {
            let slots = match pending.count {
                1 => "1 slot".to_owned(),
                many => format!("{many} slots"),
            };
            rows.push(vec![
                meta.namespace.clone(),
                meta.name.clone(),
                slots,
                String::new(),
                status.release.to_string(),
                "pending".to_owned(),
                String::new(),
                String::new(),
                pending.message.clone(),
            ]);
        }
    }
    Ok(rows)
}

pub async fn ps(global: &Global, deployment: Option<String>, host: Option<String>) -> Result<()> {
    let client = connect(global).await?;
    let selected = selected(global, &client).await?;
    let mut deployments = client.deployments();
    let (name, host) = (deployment.unwrap_or_default(), host.unwrap_or_default());
    if !name.is_empty() {
        // So that a name that does not exist is an error, not an empty list.
        let request =
            GetDeploymentRequest { namespace: client.namespace.clone(), name: name.clone() };
        ask(global, deployments.get_deployment(request)).await?;
    }
    let mut all = pages!(global, replicas, |page| deployments.list_replicas(ListReplicasRequest {
        namespace: client.namespace.clone(),
        deployment: name.clone(),
        host: host.clone(),
        page,
    }));
    if let Some(selected) = selected {
        all.retain(|r| selected.contains(&(r.namespace.clone(), r.deployment.clone())));
    }
    let state = |r: &Replica| {
        let s = r.status.clone().unwrap_or_default();
        if r.host_presence() != HostPresence::Present {
            format!("host {}", word(r.host_presence().as_str_name(), "HOST_PRESENCE_"))
        } else if r.intent() == ReplicaIntent::Stop {
            "stopping".to_owned()
        } else if s.ready {
            "ready".to_owned()
        } else {
            word(s.phase().as_str_name(), "REPLICA_PHASE_")
        }
    };
    // For people; programs find the numbers in `progress`.
    let shown = |r: &Replica| {
        let progress = r.status.as_ref().and_then(|s| s.progress.as_ref());
        match progress.filter(|p| p.total_bytes > 0) {
            Some(p) if state(r) == "fetching" => format!("fetching {}", transfer(p)),
            Some(_) | None => state(r),
        }
    };
    let mut rows: Vec<Vec<String>> = all
        .iter()
        .map(|r| {
            let s = r.status.clone().unwrap_or_default();
            vec![
                r.namespace.clone(),
                r.deployment.clone(),
                r.slot.to_string(),
                r.host.clone(),
                r.release.to_string(),
                shown(r),
                s.attempt.to_string(),
                age(s.start_time.as_ref()),
                waits(&s),
                r.uid.clone(),
                s.container_id,
            ]
        })
        .collect();
    if matches!(global.output, Output::Table | Output::Wide) && host.is_empty() {
        rows.extend(placeless(global, &client, &name).await?);
        rows.sort_by(|a, b| (&a[0], &a[1]).cmp(&(&b[0], &b[1])));
    }
    let value = all
        .iter()
        .map(|r| {
            let s = r.status.clone().unwrap_or_default();
            json!({
                "uid": r.uid, "namespace": r.namespace, "deployment": r.deployment, "slot": r.slot,
                "host": r.host, "release": r.release, "state": state(r), "ready": s.ready,
                "phase": word(s.phase().as_str_name(), "REPLICA_PHASE_"), "attempt": s.attempt,
                "intent": word(r.intent().as_str_name(), "REPLICA_INTENT_"),
                "hostPresence": word(r.host_presence().as_str_name(), "HOST_PRESENCE_"),
                "reason": s.reason, "message": s.message, "containerId": s.container_id,
                "startTime": moment(s.start_time.as_ref()), "createTime": moment(r.create_time.as_ref()),
                "firstReadyTime": moment(r.first_ready_time.as_ref()),
                "nextAttemptTime": moment(s.next_attempt_time.as_ref()),
                "progress": s.progress.map(|p| json!({
                    "what": p.what, "doneBytes": p.done_bytes, "totalBytes": p.total_bytes,
                    "bytesPerSecond": p.rate_bytes_per_second, "part": p.part, "parts": p.parts,
                    "timeLeftMs": p.time_left_ms,
                })),
                "lastExit": s.last_exit.map(|e| json!({
                    "attempt": e.attempt, "code": e.code, "outOfMemory": e.out_of_memory,
                    "time": moment(e.time.as_ref()),
                })),
            })
        })
        .collect();
    let heads = [
        "NAMESPACE",
        "DEPLOYMENT",
        "SLOT",
        "HOST",
        "RELEASE",
        "STATE",
        "ATTEMPT",
        "UP",
        "WHY",
        "REPLICA",
        "CONTAINER",
    ];
    print(global, &heads, 9, rows, &Value::Array(value))
}

pub async fn top(global: &Global, of: TopOf, deployment: Option<String>) -> Result<()> {
    match of {
        TopOf::Hosts => top_hosts(global).await,
        TopOf::Replicas => top_replicas(global, deployment).await,
    }
}

/// `used` of `all` in words, with its share.
fn share(used: String, all: String, share: Option<u64>) -> String {
    match share {
        Some(percent) => format!("{used}/{all} {percent}%"),
        None => format!("{used}/{all}"),
    }
}

fn percent(used: u64, all: u64) -> Option<u64> {
    used.saturating_mul(100).checked_div(all)
}

async fn top_hosts(global: &Global) -> Result<()> {
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    let mut all = pages!(global, hosts, |page| hosts.list_hosts(ListHostsRequest { page }));
    all.retain(|h| global.selects(&labels_of(h)));
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for h in all {
        let name = h.meta.unwrap_or_default().name;
        let s = h.status.unwrap_or_default();
        let facts = s.facts.clone().unwrap_or_default();
        let (have, used) = (facts.capacity.unwrap_or_default(), s.allocated.unwrap_or_default());
        rows.push(vec![
            name.clone(),
            word(s.presence().as_str_name(), "HOST_PRESENCE_"),
            share(
                format_cpu(used.cpu_millis),
                format_cpu(have.cpu_millis),
                percent(used.cpu_millis, have.cpu_millis),
            ),
            share(
                human_bytes(used.memory_bytes),
                human_bytes(have.memory_bytes),
                percent(used.memory_bytes, have.memory_bytes),
            ),
            format!("{}/{}", s.ready, s.replicas),
            human_bytes(facts.disk_free_bytes),
        ]);
        values.push(json!({
            "name": name, "presence": word(s.presence().as_str_name(), "HOST_PRESENCE_"),
            "replicas": s.replicas, "ready": s.ready,
            "reserved": {
                "cpuMillis": used.cpu_millis, "memoryBytes": used.memory_bytes,
                "gpuMemoryBytes": used.gpu_memory_bytes,
            },
            "capacity": {
                "cpuMillis": have.cpu_millis, "memoryBytes": have.memory_bytes,
                "gpuMemoryBytes": have.gpu_memory_bytes,
            },
            "diskFreeBytes": facts.disk_free_bytes,
        }));
    }
    let heads = ["HOST", "STATE", "CPU RESERVED", "MEMORY RESERVED", "REPLICAS READY", "DISK FREE"];
    print(global, &heads, heads.len(), rows, &Value::Array(values))
}

async fn top_replicas(global: &Global, deployment: Option<String>) -> Result<()> {
    let client = connect(global).await?;
    let selected = selected(global, &client).await?;
    let request = ReadUsageRequest {
        namespace: client.namespace.clone(),
        deployment: deployment.unwrap_or_default(),
        host: String::new(),
    };
    let mut answer = ask(global, client.logs().read_usage(request)).await?;
    if let Some(selected) = selected {
        answer.usages.retain(|u| selected.contains(&(u.namespace.clone(), u.deployment.clone())));
    }
    for (host, words) in &answer.unreachable {
        eprintln!("{}: not reached: {}", for_terminal(host), for_terminal(words));
    }
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for u in answer.usages {
        let limit = match u.memory_limit_bytes {
            0 => String::new(),
            n => human_bytes(n),
        };
        rows.push(vec![
            u.namespace.clone(),
            u.deployment.clone(),
            u.slot.to_string(),
            u.host.clone(),
            format!("{}m", u.cpu_millis),
            human_bytes(u.memory_bytes),
            limit,
            human_bytes(u.received_bytes),
            human_bytes(u.sent_bytes),
            u.replica_uid.clone(),
        ]);
        values.push(json!({
            "uid": u.replica_uid, "namespace": u.namespace, "deployment": u.deployment,
            "slot": u.slot, "host": u.host, "cpuMillis": u.cpu_millis,
            "memoryBytes": u.memory_bytes, "memoryLimitBytes": u.memory_limit_bytes,
            "receivedBytes": u.received_bytes, "sentBytes": u.sent_bytes,
            "processes": u.processes,
        }));
    }
    let heads = [
        "NAMESPACE",
        "DEPLOYMENT",
        "SLOT",
        "HOST",
        "CPU",
        "MEMORY",
        "LIMIT",
        "RECEIVED",
        "SENT",
        "REPLICA",
    ];
    print(global, &heads, 9, rows, &Value::Array(values))
}
