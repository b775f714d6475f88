//! Deployments and their releases.

use super::follow::{on_return, ready_of, settle};
use super::{ask, confirm_known, connect, pages, write};
use crate::args::{
    Deployment as Verb, Global, Output, Release as ReleaseVerb, Rollout, Scale, Until,
};
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use crate::output::{age, moment, print, put, remote_lines, say, word};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::manifest;
use berth_proto::words::counted;
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub fn to_json(deployment: &Deployment) -> Value {
    let mut value = manifest::to_json(deployment);
    let s = deployment.status.clone().unwrap_or_default();
    let meta = deployment.meta.clone().unwrap_or_default();
    value["metadata"]["uid"] = json!(meta.uid);
    value["metadata"]["revision"] = json!(meta.revision);
    value["metadata"]["createTime"] = moment(meta.create_time.as_ref());
    value["status"] = json!({
        "release": s.release, "rollout": word(s.rollout().as_str_name(), "ROLLOUT_STATE_"),
        "reason": s.reason, "wanted": s.wanted, "running": s.running, "ready": s.ready,
        "updatedReady": s.updated_ready, "deferredHosts": s.deferred_hosts,
        "stableRelease": s.stable_release, "resolved": s.resolved, "unknown": s.unknown,
        "pending": s.pending.iter().map(|p| json!({"reason": p.reason, "message": p.message, "count": p.count})).collect::<Vec<_>>(),
    });
    value
}

pub async fn scale(global: &Global, args: Scale) -> Result<()> {
    let Scale { deployment: name, replicas, wait, timeout } = args;
    let client = connect(global).await?;
    let request = ScaleRequest {
        write: write(),
        namespace: client.namespace.clone(),
        name: name.clone(),
        replicas,
    };
    let answer = ask(global, client.deployments().scale(request)).await?;
    let mut deployment = answer.deployment.unwrap_or_default();
    stands_still(&name, &deployment);
    if wait {
        deployment = settle(global, &client, &deployment, true, timeout).await?;
    }
    let words = format!("{name}: {} wanted", counted(replicas, "replica"));
    say(global, &words, &to_json(&deployment))
}

/// What is started by a rollout that stands still is of the release that failed.
fn stands_still(name: &str, deployment: &Deployment) {
    if let Some(words) = paused(name, &deployment.status.clone().unwrap_or_default()) {
        eprintln!("{words}");
    }
}

fn paused(name: &str, status: &DeploymentStatus) -> Option<String> {
    (status.rollout() == RolloutState::Paused).then(|| {
        for_terminal(&format!(
            "{name}: its rollout stands still, and what is started is of release {}, which failed; \
             `berth deployment rollout undo {name}` goes back",
            status.release
        ))
    })
}

pub async fn remove(global: &Global, name: &str, allow_missing: bool) -> Result<()> {
    let known = async {
        if allow_missing {
            return Ok(());
        }
        let client = connect(global).await?;
        let (namespace, name) = (client.namespace.clone(), name.to_owned());
        let request = GetDeploymentRequest { namespace, name };
        ask(global, client.deployments().get_deployment(request)).await?;
        Ok(())
    };
    // People think as long as they like: no connection waits for that.
    confirm_known(global, &format!("stop all replicas of \"{name}\" and remove it"), known).await?;
    let client = connect(global).await?;
    let request = DeleteRequest {
        write: write(),
        namespace: client.namespace.clone(),
        name: name.to_owned(),
        allow_missing,
    };
    ask(global, client.deployments().delete(request)).await?;
    let watch =
        WatchDeploymentRequest { namespace: client.namespace.clone(), name: name.to_owned() };
    let gone = match ask(global, client.deployments().watch_deployment(watch)).await {
        Ok(mut stream) => {
            let gone = async {
                while let Ok(Some(now)) = stream.message().await {
                    if now.deleted {
                        return true;
                    }
                }
                false
            };
            tokio::time::timeout(global.request_timeout, gone).await.unwrap_or(false)
        }
        Err(error) => is_gone(&error),
    };
    let value = json!({"name": name, "removed": gone});
    if gone {
        return say(global, &format!("{name}: removed"), &value);
    }
    eprintln!("it ends when every host has confirmed that nothing of it is left");
    match global.output {
        Output::Json | Output::Yaml => say(global, "", &value),
        Output::Table | Output::Wide => Ok(()),
    }
}

/// What the server says of a deployment of which nothing is left; anything else says nothing of it.
fn is_gone(error: &Error) -> bool {
    error.reason == "DEPLOYMENT_NOT_FOUND"
}

pub async fn deployment(global: &Global, verb: Verb) -> Result<()> {
    match verb {
        Verb::List => {
            let client = connect(global).await?;
            let mut deployments = client.deployments();
            let mut all = pages!(global, deployments, |page| deployments.list_deployments(
                ListDeploymentsRequest { namespace: client.namespace.clone(), page }
            ));
            all.retain(|d| d.meta.as_ref().is_some_and(|m| global.selects(&m.labels)));
            let rows = all
                .iter()
                .map(|d| {
                    let (m, s) =
                        (d.meta.clone().unwrap_or_default(), d.status.clone().unwrap_or_default());
                    let reason =
                        s.pending.first().map(|p| p.message.clone()).unwrap_or(s.reason.clone());
                    vec![
                        m.namespace,
                        m.name,
                        format!("{}/{}", s.ready, s.wanted),
                        s.release.to_string(),
                        word(s.rollout().as_str_name(), "ROLLOUT_STATE_"),
                        age(m.create_time.as_ref()),
                        reason,
                        s.resolved,
                    ]
                })
                .collect();
            let value = Value::Array(all.iter().map(to_json).collect());
            let heads =
                ["NAMESPACE", "NAME", "READY", "RELEASE", "ROLLOUT", "AGE", "REASON", "SOURCE"];
            print(global, &heads, 7, rows, &value)
        }
        Verb::Show { name } => {
            let client = connect(global).await?;
            let request = GetDeploymentRequest { namespace: client.namespace.clone(), name };
            let one = ask(global, client.deployments().get_deployment(request)).await?;
            let one = one.deployment.unwrap_or_default();
            match global.output {
                // Can be applied again and changes nothing.
                Output::Yaml => put(&remote_lines(&manifest::to_yaml(&manifest::to_json(&one)))),
                Output::Json => say(global, "", &to_json(&one)),
                Output::Table | Output::Wide => {
                    put(&remote_lines(&manifest::to_yaml(&to_json(&one))))
                }
            }
        }
        Verb::Scale(args) => scale(global, args).await,
        Verb::Restart { name, until } => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request = RestartRequest { write: write(), namespace, name: name.clone() };
            let answer = ask(global, client.deployments().restart(request)).await?;
            let deployment = answer.deployment.unwrap_or_default();
            let release = deployment.status.as_ref().map_or(0, |status| status.release);
            let words = format!("{name}: restarting as release {release}");
            ends(global, &client, until, &words, deployment).await
        }
        Verb::Rm { name, allow_missing } => remove(global, &name, allow_missing).await,
        Verb::Rollout(Rollout::Status { name, until }) => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request = GetDeploymentRequest { namespace, name: name.clone() };
            let one = ask(global, client.deployments().get_deployment(request)).await?;
            let mut one = one.deployment.unwrap_or_default();
            if until.wait {
                one = Box::pin(settle(global, &client, &one, true, until.timeout)).await?;
            }
            let s = one.status.clone().unwrap_or_default();
            say(global, &format!("{name}: {}", standing(&s)), &to_json(&one))?;
            if until.wait && s.rollout() == RolloutState::RolledBack {
                return Err(Error::new(Kind::RolloutFailed, for_terminal(&s.reason)));
            }
            Ok(())
        }
        Verb::Rollout(Rollout::History { name }) => {
            release(global, ReleaseVerb::List { deployment: name }).await
        }
        Verb::Rollout(Rollout::Undo { name, to, until }) => {
            let client = connect(global).await?;
            let namespace = client.namespace.clone();
            let request =
                UndoRequest { write: write(), namespace, name: name.clone(), to_release: to };
            let answer = ask(global, client.deployments().undo(request))
                .await?
                .deployment
                .unwrap_or_default();
            let words = format!("{name}: {}", undone(&answer));
            ends(global, &client, until, &words, answer).await
        }
    }
}

/// Says what was begun; where its end is waited for, that first, and the deployment as it is then.
async fn ends(
    global: &Global,
    client: &Client,
    until: Until,
    begun: &str,
    deployment: Deployment,
) -> Result<()> {
    if !until.wait {
        return say(global, begun, &to_json(&deployment));
    }
    eprintln!("{}", for_terminal(begun));
    let deployment = Box::pin(settle(global, client, &deployment, false, until.timeout)).await?;
    match global.output {
        Output::Json | Output::Yaml => say(global, "", &to_json(&deployment)),
        Output::Table | Output::Wide => Ok(()),
    }
}

/// Where an undo leads, in words: to a copy of an earlier release, or back from a rollout that was not
/// complete to the release that served before.
fn undone(deployment: &Deployment) -> String {
    let status = deployment.status.clone().unwrap_or_default();
    if status.reason.is_empty() {
        format!("going back, as release {}", status.release)
    } else {
        status.reason
    }
}

/// Where a rollout is, in words: one that was complete may since have lost what ran, and says so.
fn standing(s: &DeploymentStatus) -> String {
    let state = word(s.rollout().as_str_name(), "ROLLOUT_STATE_");
    let lacks = s.rollout() == RolloutState::Complete && s.updated_ready < s.wanted;
    let joiner = if lacks { ", but" } else { "," };
    let mut words = format!("release {} is {state}{joiner} {} ready", s.release, ready_of(s));
    let why = s.pending.iter().filter(|_| lacks).find(|p| !p.message.is_empty());
    for more in [s.reason.as_str(), why.map_or("", |why| &why.message)] {
        if !more.is_empty() {
            words.push_str(&format!("; {more}"));
        }
    }
    if s.deferred_hosts > 0 {
        words.push_str(&format!("; deferred: {}", on_return(s.deferred_hosts, &BTreeSet::new())));
    }
    words
}

fn release_json(r: &Release) -> Value {
    json!({
        "deployment": r.deployment, "namespace": r.namespace, "number": r.number,
        "state": word(r.state().as_str_name(), "RELEASE_STATE_"), "cause": r.cause,
        "createdBy": r.created_by, "createTime": moment(r.create_time.as_ref()),
        "bodyDigest": r.body_digest, "copiedFrom": r.copied_from,
        "spec": r.spec.as_ref().map(manifest::spec_to_json),
    })
}

pub async fn release(global: &Global, verb: ReleaseVerb) -> Result<()> {
    let client = connect(global).await?;
    let namespace = client.namespace.clone();
    match verb {
        ReleaseVerb::List { deployment } => {
            let mut deployments = client.deployments();
            let all =
                pages!(global, releases, |page| deployments.list_releases(ListReleasesRequest {
                    namespace: namespace.clone(),
                    deployment: deployment.clone(),
                    page,
                }));
            let rows = all
                .iter()
                .map(|r| {
                    vec![
                        r.number.to_string(),
                        word(r.state().as_str_name(), "RELEASE_STATE_"),
                        r.cause.clone(),
                        r.created_by.clone(),
                        age(r.create_time.as_ref()),
                        r.body_digest.clone(),
                    ]
                })
                .collect();
            let value = Value::Array(all.iter().map(release_json).collect());
            print(global, &["RELEASE", "STATE", "CAUSE", "BY", "AGE", "BODY"], 5, rows, &value)
        }
        ReleaseVerb::Show { deployment, number } => {
            let request = GetReleaseRequest { namespace, deployment, number };
            let one = ask(global, client.deployments().get_release(request)).await?;
            let value = release_json(&one.release.unwrap_or_default());
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_scales_what_stands_still_is_told_which_release_that_starts() {
        let status = |rollout: RolloutState| DeploymentStatus {
            rollout: rollout as i32,
            release: 6,
            ..DeploymentStatus::default()
        };
        let words = paused("iris", &status(RolloutState::Paused)).unwrap();
        assert!(words.contains("release 6, which failed") && words.contains("undo iris"));
        assert_eq!(paused("iris", &status(RolloutState::Rolling)), None);
    }

    #[test]
    fn an_undo_says_where_it_leads() {
        let status = |release, reason: &str| Deployment {
            status: Some(DeploymentStatus {
                release,
                reason: reason.to_owned(),
                ..DeploymentStatus::default()
            }),
            ..Deployment::default()
        };
        assert_eq!(undone(&status(4, "")), "going back, as release 4");
        let words = "release 2 was undone; back to release 1";
        assert_eq!(undone(&status(1, words)), words);
    }

    #[test]
    fn a_complete_rollout_of_which_nothing_is_left_says_so() {
        let status = DeploymentStatus {
            rollout: RolloutState::Complete as i32,
            release: 4,
            wanted: 2,
            updated_ready: 2,
            ..DeploymentStatus::default()
        };
        assert_eq!(standing(&status), "release 4 is complete, 2/2 ready");
        let message = "no host fits: there are none".to_owned();
        let pending = vec![Pending { message, count: 2, ..Pending::default() }];
        let none = DeploymentStatus { updated_ready: 0, pending, ..status.clone() };
        let words = "release 4 is complete, but 0/2 ready; no host fits: there are none";
        assert_eq!(standing(&none), words);
        let away = DeploymentStatus { updated_ready: 1, deferred_hosts: 1, ..status.clone() };
        let words = standing(&away);
        assert!(words.contains("but 1/2 ready; deferred: 1 host is away"), "{words}");
        let paused = RolloutState::Paused as i32;
        let failed = DeploymentStatus { rollout: paused, reason: "why".to_owned(), ..status };
        assert_eq!(standing(&failed), "release 4 is paused, 2/2 ready; why");
    }
}
