//! Looking: replicas, and what hosts and replicas use.

use super::host::labels_of;
use super::{ask, connect, pages};
use crate::args::{Global, TopOf};
use crate::client::Client;
use crate::error::Result;
use crate::output::{age, moment, print, transfer, waits, word};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::quantity::{format_cpu, human_bytes};
use berth_proto::words::{counted, is_of_empty_slots};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// All deployments. --filter is for the replicas that are asked for.
async fn deployments(global: &Global, client: &Client) -> Result<Vec<Deployment>> {
    let all = Global { filter: None, ..global.clone() };
    let global = &all;
    let mut deployments = client.deployments();
    Ok(pages!(global, deployments, |page| deployments
        .list_deployments(ListDeploymentsRequest { namespace: client.namespace.clone(), page })))
}

/// Of these deployments those that meet the selector, by namespace and name.
fn selected(global: &Global, all: &[Deployment]) -> BTreeSet<(String, String)> {
    let metas = all.iter().filter_map(|d| d.meta.as_ref());
    let chosen = metas.filter(|m| global.selects(&m.labels));
    chosen.map(|m| (m.namespace.clone(), m.name.clone())).collect()
}

/// A row of the table, and the same for programs.
type Shown = (Vec<String>, Value);

/// The slots that have no replica, because no host fits or the one before still stops. For programs with
/// the fields of a replica: null where only a replica has something to tell.
fn placeless(global: &Global, all: &[Deployment]) -> Vec<Shown> {
    let mut shown = Vec::new();
    for deployment in all {
        let meta = deployment.meta.clone().unwrap_or_default();
        if !global.selects(&meta.labels) {
            continue;
        }
        let status = deployment.status.clone().unwrap_or_default();
        for pending in status.pending.iter().filter(|p| is_of_empty_slots(&p.reason)) {
            let row = vec![
                meta.namespace.clone(),
                meta.name.clone(),
                // How many, not which: that stands with the reason.
                String::new(),
                String::new(),
                status.release.to_string(),
                "pending".to_owned(),
                String::new(),
                String::new(),
                format!("{} ({})", pending.message, counted(pending.count, "slot")),
            ];
            let value = json!({
                "uid": null, "namespace": meta.namespace, "deployment": meta.name, "slot": null,
                "slots": pending.count, "host": null, "release": status.release,
                "state": "pending", "ready": false, "phase": null, "attempt": 0, "intent": "run",
                "hostPresence": null, "reason": pending.reason, "message": pending.message,
                "containerId": null, "startTime": null, "createTime": null,
                "firstReadyTime": null, "nextAttemptTime": null, "progress": null,
                "lastExit": null,
            });
            shown.push((row, value));
        }
    }
    shown
}

/// How a replica is, in a word or two.
fn state(r: &Replica) -> String {
    let s = r.status.clone().unwrap_or_default();
    if r.host_presence() != HostPresence::Present {
        format!("host {}", word(r.host_presence().as_str_name(), "HOST_PRESENCE_"))
    } else if r.intent() == ReplicaIntent::Stop {
        "stopping".to_owned()
    } else if s.ready {
        "ready".to_owned()
    } else if s.phase() == ReplicaPhase::Unspecified {
        // Nothing was told of it yet.
        "assigned".to_owned()
    } else {
        word(s.phase().as_str_name(), "REPLICA_PHASE_")
    }
}

fn placed(r: &Replica) -> Shown {
    let s = r.status.clone().unwrap_or_default();
    let state = state(r);
    // How far a transfer is stands in `progress` for programs.
    let fetched = s.progress.as_ref().filter(|p| p.total_bytes > 0 && state == "fetching");
    let told = fetched.map_or(state.clone(), |p| format!("fetching {}", transfer(p)));
    let row = vec![
        r.namespace.clone(),
        r.deployment.clone(),
        r.slot.to_string(),
        r.host.clone(),
        r.release.to_string(),
        told,
        s.attempt.to_string(),
        age(s.start_time.as_ref()),
        waits(&s),
        r.uid.clone(),
        s.container_id.clone(),
    ];
    let value = json!({
        "uid": r.uid, "namespace": r.namespace, "deployment": r.deployment, "slot": r.slot,
        "slots": 1, "host": r.host, "release": r.release, "state": state, "ready": s.ready,
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
        "lastExit": s.last_exit.as_ref().map(|e| json!({
            "attempt": e.attempt, "code": e.code, "outOfMemory": e.out_of_memory,
            "time": moment(e.time.as_ref()), "lastLine": e.last_line,
        })),
    });
    (row, value)
}

/// Where replicas are looked for: a name alone is that of a deployment in `default`, as everywhere;
/// nothing means all namespaces.
pub(super) fn where_to_look<'a>(namespace: &'a str, deployment: &str) -> &'a str {
    if namespace.is_empty() && !deployment.is_empty() { "default" } else { namespace }
}

pub async fn ps(global: &Global, deployment: Option<String>, host: Option<String>) -> Result<()> {
    let client = connect(global).await?;
    let mut asking = client.deployments();
    let (name, host) = (deployment.unwrap_or_default(), host.unwrap_or_default());
    let namespace = where_to_look(&client.namespace, &name).to_owned();
    // Slots that have no host match no filter of replicas.
    let with_placeless = host.is_empty() && global.filter.is_none();
    let known = if !name.is_empty() {
        // Also so that a name that does not exist is an error, not an empty list.
        let request = GetDeploymentRequest { namespace: namespace.clone(), name: name.clone() };
        ask(global, asking.get_deployment(request)).await?.deployment.into_iter().collect()
    } else if with_placeless || global.selector.is_some() {
        deployments(global, &client).await?
    } else {
        Vec::new()
    };
    let mut all = pages!(global, replicas, |page| asking.list_replicas(ListReplicasRequest {
        namespace: namespace.clone(),
        deployment: name.clone(),
        host: host.clone(),
        page,
    }));
    if global.selector.is_some() {
        let selected = selected(global, &known);
        all.retain(|r| selected.contains(&(r.namespace.clone(), r.deployment.clone())));
    }
    let mut shown: Vec<Shown> = all.iter().map(placed).collect();
    if with_placeless {
        shown.extend(placeless(global, &known));
        shown.sort_by(|(a, _), (b, _)| (&a[0], &a[1]).cmp(&(&b[0], &b[1])));
    }
    let (rows, values) = shown.into_iter().unzip();
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
    print(global, &heads, 9, rows, &Value::Array(values))
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
    let request = ReadUsageRequest {
        namespace: client.namespace.clone(),
        deployment: deployment.unwrap_or_default(),
        host: String::new(),
    };
    let mut answer = ask(global, client.logs().read_usage(request)).await?;
    if global.selector.is_some() {
        let selected = selected(global, &deployments(global, &client).await?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser as _;

    #[test]
    fn slots_without_a_replica_are_told_to_programs_with_the_fields_of_replicas() {
        let global = Cli::try_parse_from(["berth", "ps"]).unwrap().global;
        let pending = |reason: &str, count| Pending {
            reason: reason.to_owned(),
            message: "no host fits: 1 cordoned".to_owned(),
            count,
        };
        let status = DeploymentStatus {
            release: 4,
            pending: vec![pending("NO_HOST_FITS", 2), pending("FETCHING", 1)],
            ..DeploymentStatus::default()
        };
        let meta = ObjectMeta {
            name: "iris".to_owned(),
            namespace: "default".to_owned(),
            ..ObjectMeta::default()
        };
        let one = Deployment { meta: Some(meta), status: Some(status), ..Deployment::default() };
        let told = placeless(&global, &[one]);
        // What waits with a replica is that replica's row.
        let [(row, value)] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!((row[2].as_str(), row[5].as_str()), ("", "pending"));
        assert_eq!(row[8], "no host fits: 1 cordoned (2 slots)");
        assert_eq!(value["state"], "pending");
        assert_eq!((&value["slots"], &value["reason"]), (&json!(2), &json!("NO_HOST_FITS")));
        assert_eq!(value["message"], "no host fits: 1 cordoned");
        let names = |value: &Value| -> BTreeSet<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let (_, replica) = placed(&Replica::default());
        assert_eq!(names(value), names(&replica));
        assert_eq!(replica["slots"], 1);
    }

    #[test]
    fn a_name_alone_is_looked_for_in_default_and_nothing_everywhere() {
        assert_eq!(where_to_look("", "iris"), "default");
        assert_eq!(where_to_look("vision", "iris"), "vision");
        assert_eq!((where_to_look("", ""), where_to_look("vision", "")), ("", "vision"));
    }
}
