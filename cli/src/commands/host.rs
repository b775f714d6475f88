//! Hosts, the tokens they join with, and replicas found after a restore.

use super::{ask, confirm, confirm_known, connect, pages, pair, write};
use crate::args::{Global, Host as HostVerb, Orphan, Orphans, Token};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{age, moment, print, say, word};
use berth_proto::api::*;
use berth_proto::convert::duration;
use berth_proto::escape::for_terminal;
use berth_proto::manifest;
use berth_proto::quantity::{format_cpu, human_bytes};
use berth_proto::words::counted;
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn host_json(h: &Host) -> Value {
    let (m, s) = (h.meta.clone().unwrap_or_default(), h.status.clone().unwrap_or_default());
    let (f, spec) = (s.facts.clone().unwrap_or_default(), h.spec.unwrap_or_default());
    let reason = reason(&spec, &s);
    let amounts = |r: Option<Resources>| {
        let r = r.unwrap_or_default();
        json!({"cpuMillis": r.cpu_millis, "memoryBytes": r.memory_bytes, "gpuMemoryBytes": r.gpu_memory_bytes})
    };
    json!({
        "uid": m.uid, "name": m.name, "labels": labels_of(h), "createTime": moment(m.create_time.as_ref()), "revision": m.revision,
        "presence": word(s.presence().as_str_name(), "HOST_PRESENCE_"),
        "lastSeenTime": moment(s.last_seen_time.as_ref()), "cordoned": spec.cordoned,
        "draining": spec.draining, "replicas": s.replicas, "ready": s.ready, "reason": reason,
        "generation": s.generation, "acknowledgedGeneration": s.acknowledged_generation,
        "quarantined": s.quarantined, "waitingForApproval": s.waiting_for_approval,
        "engine": f.engine, "engineAvailable": f.engine_available, "agentVersion": f.agent_version,
        "arch": f.arch, "os": f.os, "kernel": f.kernel, "diskFreeBytes": f.disk_free_bytes,
        "containerNetworkReachable": f.container_network_reachable, "usedPorts": f.used_ports,
        "features": f.features, "policy": policy_json(&f.policy.clone().unwrap_or_default()),
        "clockOffsetMs": s.clock_offset.as_ref().map_or(0, |d| d.seconds * 1000 + i64::from(d.nanos) / 1_000_000),
        "instance": s.instance,
        "capacity": amounts(f.capacity), "allocated": amounts(s.allocated),
        "certificateExpireTime": moment(s.certificate_expire_time.as_ref()),
    })
}

fn policy_json(p: &HostPolicy) -> Value {
    json!({
        "mountFolders": p.mount_folders, "allowPrivileged": p.allow_privileged,
        "allowHostNetwork": p.allow_host_network, "allowCapabilities": p.allow_capabilities,
        "allowDevices": p.allow_devices, "forbidExec": p.forbid_exec,
        "publishAddresses": p.publish_addresses, "forbidPublish": p.forbid_publish,
        "allowContainerTraffic": p.allow_container_traffic,
    })
}

/// What an operator and the agent's own configuration say of it, and what is built in; where both
/// name a key, the operator's holds.
pub fn labels_of(h: &Host) -> BTreeMap<String, String> {
    let facts = h.status.as_ref().and_then(|s| s.facts.as_ref());
    let mut labels: BTreeMap<String, String> =
        facts.map(|f| f.labels.clone()).unwrap_or_default().into_iter().collect();
    if let Some(meta) = &h.meta {
        labels.extend(meta.labels.clone());
        labels.insert("host".to_owned(), meta.name.clone());
    }
    if let Some(facts) = facts {
        labels.insert("arch".to_owned(), facts.arch.clone());
        labels.insert("os".to_owned(), facts.os.clone());
    }
    labels
}

/// Why a host is not as it should be; of one that is drained, how far that is.
fn reason(spec: &HostSpec, status: &HostStatus) -> String {
    if !status.reason.is_empty() || !spec.draining {
        return status.reason.clone();
    }
    match status.replicas {
        0 => "drained: nothing is left on it".to_owned(),
        left => format!("draining: {} still there", counted(left, "replica")),
    }
}

/// Whether there is such a host.
async fn known(global: &Global, name: &str) -> Result<()> {
    let request = GetHostRequest { name: name.to_owned() };
    ask(global, connect(global).await?.hosts().get_host(request)).await?;
    Ok(())
}

fn told(global: &Global, words: &str, host: Option<Host>) -> Result<()> {
    say(global, words, &host_json(&host.unwrap_or_default()))
}

pub async fn host(global: &Global, verb: HostVerb) -> Result<()> {
    // People think as long as they like: no connection waits for that.
    if let HostVerb::Drain { name } = &verb {
        let what = format!("move all replicas away from \"{name}\"");
        confirm_known(global, &what, known(global, name)).await?;
    }
    if let HostVerb::Rm { name, .. } = &verb {
        let what = format!("remove host \"{name}\"");
        confirm_known(global, &what, known(global, name)).await?;
    }
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    match verb {
        HostVerb::List => {
            let mut all = pages!(global, hosts, |page| hosts.list_hosts(ListHostsRequest { page }));
            all.retain(|h| global.selects(&labels_of(h)));
            let rows = all
                .iter()
                .map(|h| {
                    let (m, s) =
                        (h.meta.clone().unwrap_or_default(), h.status.clone().unwrap_or_default());
                    let f = s.facts.clone().unwrap_or_default();
                    let (have, used) =
                        (f.capacity.unwrap_or_default(), s.allocated.unwrap_or_default());
                    let mut state = word(s.presence().as_str_name(), "HOST_PRESENCE_");
                    let spec = h.spec.unwrap_or_default();
                    if spec.draining {
                        state.push_str(", draining");
                    } else if spec.cordoned {
                        state.push_str(", cordoned");
                    }
                    vec![
                        m.name,
                        state,
                        format!("{}/{}", s.ready, s.replicas),
                        format!("{}/{}", format_cpu(used.cpu_millis), format_cpu(have.cpu_millis)),
                        format!(
                            "{}/{}",
                            human_bytes(used.memory_bytes),
                            human_bytes(have.memory_bytes)
                        ),
                        age(m.create_time.as_ref()),
                        reason(&spec, &s),
                        f.engine,
                        f.agent_version,
                        f.arch,
                        m.uid,
                    ]
                })
                .collect();
            let value = Value::Array(all.iter().map(host_json).collect());
            let heads = [
                "NAME", "STATE", "READY", "CPU", "MEMORY", "AGE", "REASON", "ENGINE", "AGENT",
                "ARCH", "UID",
            ];
            print(global, &heads, 7, rows, &value)
        }
        HostVerb::Show { name } => {
            let one = ask(global, hosts.get_host(GetHostRequest { name }))
                .await?
                .host
                .unwrap_or_default();
            let value = host_json(&one);
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
        HostVerb::Label { name, labels } => {
            let mut request =
                LabelHostRequest { write: write(), name: name.clone(), ..Default::default() };
            for label in labels {
                if let Some(key) = label.strip_suffix('-').filter(|k| !k.contains('=')) {
                    request.remove.push(key.to_owned());
                } else {
                    let (key, value) = pair(&label)?;
                    request.set.insert(key, value);
                }
            }
            let host = ask(global, hosts.label_host(request)).await?.host;
            told(global, &format!("{name}: labelled"), host)
        }
        HostVerb::Cordon { name } => {
            let request = CordonHostRequest { write: write(), name: name.clone(), cordoned: true };
            let host = ask(global, hosts.cordon_host(request)).await?.host;
            told(global, &format!("{name}: nothing new is placed there"), host)
        }
        HostVerb::Uncordon { name } => {
            let request = CordonHostRequest { write: write(), name: name.clone(), cordoned: false };
            let host = ask(global, hosts.cordon_host(request)).await?.host;
            told(global, &format!("{name}: is placed on again"), host)
        }
        HostVerb::Drain { name } => {
            let request = DrainHostRequest { write: write(), name: name.clone(), draining: true };
            let host = ask(global, hosts.drain_host(request)).await?.host;
            told(global, &format!("{name}: draining"), host)
        }
        HostVerb::Rm { name, force, wipe } => {
            let request = RemoveHostRequest {
                write: write(),
                name: name.clone(),
                force,
                wipe,
                allow_missing: false,
            };
            ask(global, hosts.remove_host(request)).await?;
            say(global, &format!("{name}: removed"), &json!({"name": name, "removed": true}))
        }
        HostVerb::Approve { name } => {
            let request = ApproveHostRequest { write: write(), name: name.clone() };
            let host = ask(global, hosts.approve_host(request)).await?.host;
            told(global, &format!("{name}: approved"), host)
        }
        HostVerb::ReleaseQuarantine { name } => {
            let request = ReleaseQuarantineRequest { write: write(), name: name.clone() };
            let host = ask(global, hosts.release_quarantine(request)).await?.host;
            told(global, &format!("{name}: may go on"), host)
        }
        HostVerb::Token(verb) => token(global, &client, verb).await,
    }
}

fn token_json(t: &JoinToken) -> Value {
    json!({
        "id": t.id, "expireTime": moment(t.expire_time.as_ref()), "usesLeft": t.uses_left,
        "labels": t.labels, "requireApproval": t.require_approval, "rejoin": t.rejoin,
        "createdBy": t.created_by,
    })
}

async fn token(global: &Global, client: &Client, verb: Token) -> Result<()> {
    let mut hosts = client.hosts();
    match verb {
        Token::Create { ttl, uses, labels, require_approval, rejoin } => {
            let labels: BTreeMap<String, String> =
                labels.iter().map(|l| pair(l)).collect::<Result<_>>()?;
            let request = CreateJoinTokenRequest {
                write: write(),
                ttl: Some(duration(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))),
                uses,
                labels,
                require_approval,
                rejoin,
            };
            let made = ask(global, hosts.create_join_token(request)).await?;
            let mut value = token_json(&made.token.unwrap_or_default());
            value["secret"] = json!(made.secret);
            value["endpoints"] = json!(made.endpoints);
            value["command"] = json!(made.command);
            say(global, &made.command, &value)
        }
        Token::List => {
            let all = pages!(global, tokens, |page| hosts
                .list_join_tokens(ListJoinTokensRequest { page }));
            let rows = all
                .iter()
                .map(|t| {
                    let until =
                        t.expire_time.as_ref().map(crate::output::rfc3339).unwrap_or_default();
                    vec![t.id.clone(), t.uses_left.to_string(), until, t.created_by.clone()]
                })
                .collect();
            let value = Value::Array(all.iter().map(token_json).collect());
            print(global, &["ID", "USES", "EXPIRES", "BY"], 4, rows, &value)
        }
        Token::Rm { id } => {
            confirm(global, &format!("revoke the join token {id}"))?;
            let request =
                RevokeJoinTokenRequest { write: write(), id: id.clone(), allow_missing: false };
            ask(global, hosts.revoke_join_token(request)).await?;
            say(global, &format!("{id}: revoked"), &json!({"id": id, "revoked": true}))
        }
    }
}

/// Orphans named in one call, as the contract says.
const ORPHANS: usize = 80;

pub async fn orphan(global: &Global, verb: Orphan) -> Result<()> {
    let (which, decision) = match verb {
        Orphan::List => return orphans(global).await,
        Orphan::Adopt(which) => (which, OrphanDecision::Adopt),
        Orphan::Release(which) => {
            let what = match &which.host {
                Some(host) => format!("stop the orphans of \"{host}\""),
                None => format!("stop {}", counted(which.replicas.len(), "replica")),
            };
            confirm(global, &what)?;
            (which, OrphanDecision::Release)
        }
    };
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    let (mut resolved, mut kept) = (0, Vec::new());
    // One call is one write of the ledger, and that has a bound.
    for part in parts(&which) {
        loop {
            let request = ResolveOrphansRequest {
                write: write(),
                host: which.host.clone().unwrap_or_default(),
                replica_uids: part.clone(),
                decision: decision as i32,
            };
            let answer = ask(global, hosts.resolve_orphans(request)).await.map_err(|error| {
                match error.reason.as_str() {
                    "REPLICA_NOT_FOUND" => error.hint("`berth orphan list` shows them"),
                    _ => error,
                }
            })?;
            resolved += answer.resolved;
            if answer.resolved == 0 || which.host.is_none() {
                kept.extend(answer.kept);
                break;
            }
        }
    }
    for orphan in &kept {
        eprintln!("{}: {}", for_terminal(&orphan.replica_uid), for_terminal(&orphan.reason));
    }
    let left: Vec<Value> =
        kept.iter().map(|k| json!({"uid": k.replica_uid, "reason": k.reason})).collect();
    say(global, &format!("{resolved} resolved"), &json!({"resolved": resolved, "kept": left}))?;
    if resolved == 0 && !kept.is_empty() {
        return Err(Error::user("none of them can be adopted")
            .hint("`berth orphan release REPLICA` lets one go"));
    }
    Ok(())
}

/// Replicas as they are asked for, some at a time; of a host all at once.
fn parts(which: &Orphans) -> Vec<Vec<String>> {
    if which.host.is_some() {
        return vec![Vec::new()];
    }
    which.replicas.chunks(ORPHANS).map(<[String]>::to_vec).collect()
}

async fn orphans(global: &Global) -> Result<()> {
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    let all = pages!(global, replicas, |page| hosts
        .list_orphans(ListOrphansRequest { page, ..Default::default() }));
    let known =
        |r: &Replica| if r.deployment.is_empty() { "(unknown)" } else { &r.deployment }.to_owned();
    let rows = all
        .iter()
        .map(|r| {
            vec![
                r.uid.clone(),
                r.host.clone(),
                r.namespace.clone(),
                known(r),
                r.slot.to_string(),
                r.release.to_string(),
            ]
        })
        .collect();
    let value = all
        .iter()
        .map(|r| {
            json!({
                "uid": r.uid, "host": r.host, "namespace": r.namespace, "deployment": r.deployment,
                "slot": r.slot, "release": r.release,
            })
        })
        .collect();
    let heads = ["REPLICA", "HOST", "NAMESPACE", "DEPLOYMENT", "SLOT", "RELEASE"];
    print(global, &heads, heads.len(), rows, &Value::Array(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_drained_tells_how_far_that_is() {
        let spec = |draining| HostSpec { draining, ..HostSpec::default() };
        let status = |replicas, reason: &str| HostStatus {
            replicas,
            reason: reason.to_owned(),
            ..HostStatus::default()
        };
        assert_eq!(reason(&spec(false), &status(2, "")), "");
        assert_eq!(reason(&spec(true), &status(1, "")), "draining: 1 replica still there");
        assert_eq!(reason(&spec(true), &status(0, "")), "drained: nothing is left on it");
        assert_eq!(reason(&spec(true), &status(1, "its engine is away")), "its engine is away");
        // For programs, too.
        let (spec, status) = (Some(spec(true)), Some(status(1, "")));
        let told = host_json(&Host { spec, status, ..Host::default() });
        assert_eq!(told["reason"], "draining: 1 replica still there");
    }
}
