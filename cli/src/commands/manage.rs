//! Hosts, models, images, users, contexts, the server.

use super::{ask, confirm, connect, name_and_version, pair, write};
use crate::args::{
    ContextCommand, Global, Host as HostVerb, Image, Model as ModelVerb, ModelPush, Orphan, Output,
    Registry, Server, Token, User as UserVerb,
};
use crate::client::{self, Client};
use crate::error::{Error, Kind, Result};
use crate::output::{age, moment, print, put, say, word};
use crate::{package, push};
use berth_proto::api::*;
use berth_proto::convert::duration;
use berth_proto::manifest;
use berth_proto::quantity::{format_cpu, human_bytes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn host_json(h: &Host) -> Value {
    let (m, s) = (h.meta.clone().unwrap_or_default(), h.status.clone().unwrap_or_default());
    let (f, spec) = (s.facts.clone().unwrap_or_default(), h.spec.unwrap_or_default());
    let amounts = |r: Option<Resources>| {
        let r = r.unwrap_or_default();
        json!({"cpuMillis": r.cpu_millis, "memoryBytes": r.memory_bytes, "gpuMemoryBytes": r.gpu_memory_bytes})
    };
    json!({
        "uid": m.uid, "name": m.name, "labels": f.labels, "revision": m.revision,
        "presence": word(s.presence().as_str_name(), "HOST_PRESENCE_"),
        "lastSeenTime": moment(s.last_seen_time.as_ref()), "cordoned": spec.cordoned,
        "draining": spec.draining, "replicas": s.replicas, "ready": s.ready, "reason": s.reason,
        "generation": s.generation, "acknowledgedGeneration": s.acknowledged_generation,
        "quarantined": s.quarantined, "waitingForApproval": s.waiting_for_approval,
        "engine": f.engine, "engineAvailable": f.engine_available, "agentVersion": f.agent_version,
        "arch": f.arch, "os": f.os, "kernel": f.kernel, "diskFreeBytes": f.disk_free_bytes,
        "capacity": amounts(f.capacity), "allocated": amounts(s.allocated),
        "certificateExpireTime": moment(s.certificate_expire_time.as_ref()),
    })
}

fn told(global: &Global, words: &str, host: Option<Host>) -> Result<()> {
    say(global, words, &host_json(&host.unwrap_or_default()))
}

pub async fn host(global: &Global, verb: HostVerb) -> Result<()> {
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    match verb {
        HostVerb::List => {
            let page = Some(Page { page_size: 1000, ..Page::default() });
            let all = ask(global, hosts.list_hosts(ListHostsRequest { page })).await?.hosts;
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
                        s.reason,
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
            confirm(global, &format!("move all replicas away from \"{name}\""))?;
            let request = DrainHostRequest { write: write(), name: name.clone(), draining: true };
            let host = ask(global, hosts.drain_host(request)).await?.host;
            told(global, &format!("{name}: draining"), host)
        }
        HostVerb::Rm { name, force, wipe } => {
            confirm(global, &format!("remove host \"{name}\""))?;
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
            let all = ask(global, hosts.list_join_tokens(ListJoinTokensRequest { page: None }))
                .await?
                .tokens;
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
            let request =
                RevokeJoinTokenRequest { write: write(), id: id.clone(), allow_missing: false };
            ask(global, hosts.revoke_join_token(request)).await?;
            say(global, &format!("{id}: revoked"), &json!({"id": id, "revoked": true}))
        }
    }
}

pub async fn orphan(global: &Global, verb: Orphan) -> Result<()> {
    let client = connect(global).await?;
    let mut hosts = client.hosts();
    let (host, decision) = match verb {
        Orphan::List => {
            let all =
                ask(global, hosts.list_orphans(ListOrphansRequest::default())).await?.replicas;
            let rows = all
                .iter()
                .map(|r| {
                    vec![r.uid.clone(), r.host.clone(), r.deployment.clone(), r.release.to_string()]
                })
                .collect();
            let value = all.iter().map(|r| json!({"uid": r.uid, "host": r.host, "deployment": r.deployment, "release": r.release})).collect();
            return print(
                global,
                &["REPLICA", "HOST", "DEPLOYMENT", "RELEASE"],
                4,
                rows,
                &Value::Array(value),
            );
        }
        Orphan::Adopt { host } => (host, OrphanDecision::Adopt),
        Orphan::Release { host } => {
            confirm(global, &format!("stop the orphans of \"{host}\""))?;
            (host, OrphanDecision::Release)
        }
    };
    let request = ResolveOrphansRequest {
        write: write(),
        host,
        decision: decision as i32,
        ..Default::default()
    };
    let resolved = ask(global, hosts.resolve_orphans(request)).await?.resolved;
    say(global, &format!("{resolved} resolved"), &json!({"resolved": resolved}))
}

fn version_json(v: &ModelVersion) -> Value {
    let tensors = |list: &[TensorSpec]| -> Vec<Value> {
        list.iter()
            .map(|t| json!({"name": t.name, "datatype": t.datatype, "shape": t.shape}))
            .collect()
    };
    let l = v.lineage.clone().unwrap_or_default();
    json!({
        "model": v.model, "namespace": v.namespace, "version": v.version, "digest": v.digest,
        "repository": v.repository, "kind": word(v.kind().as_str_name(), "MODEL_VERSION_KIND_"),
        "format": v.format, "sizeBytes": v.size_bytes, "createTime": moment(v.create_time.as_ref()),
        "createdBy": v.created_by, "license": v.license, "parameters": v.parameters, "metrics": v.metrics,
        "inputs": tensors(&v.inputs), "outputs": tensors(&v.outputs),
        "lineage": {
            "gitCommit": l.git_commit, "gitBranch": l.git_branch, "gitDirty": l.git_dirty,
            "gitRemote": l.git_remote, "parent": l.parent, "packagedWith": l.packaged_with,
        },
        "files": v.files.iter().map(|f| json!({"path": f.path, "sizeBytes": f.size_bytes, "digest": f.digest})).collect::<Vec<_>>(),
    })
}

async fn model_push(global: &Global, client: &Client, args: ModelPush) -> Result<()> {
    let (name, version) = name_and_version(&args.reference)?;
    let pushed = package::push_model(
        &client.context,
        name,
        version,
        &args.path,
        args.format.as_deref(),
        |line| {
            eprintln!("{line}");
        },
    )
    .await?;
    let mut metrics = BTreeMap::new();
    for metric in &args.metrics {
        let (key, value) = pair(metric)?;
        let value =
            value.parse().map_err(|_| Error::user(format!("metric {key} must be a number")))?;
        metrics.insert(key, value);
    }
    let request = RegisterVersionRequest {
        write: write(),
        version: Some(ModelVersion {
            model: name.to_owned(),
            namespace: client.namespace.clone(),
            version: version.to_owned(),
            repository: format!("models/{name}"),
            digest: pushed.digest,
            kind: ModelVersionKind::Artifact as i32,
            format: pushed.format,
            size_bytes: pushed.size,
            lineage: Some(package::lineage(&args.path, &args.parent)),
            inputs: pushed.inputs,
            outputs: pushed.outputs,
            parameters: args.params.iter().map(|p| pair(p)).collect::<Result<_>>()?,
            metrics,
            files: pushed.files,
            license: args.license,
            ..ModelVersion::default()
        }),
        aliases: args.aliases,
    };
    let made =
        ask(global, client.models().register_version(request)).await?.version.unwrap_or_default();
    let words = format!(
        "{}:{} registered, {} ({} sent), {}",
        made.model,
        made.version,
        human_bytes(made.size_bytes),
        human_bytes(pushed.sent),
        made.digest
    );
    say(global, &words, &version_json(&made))
}

pub async fn model(global: &Global, verb: ModelVerb) -> Result<()> {
    let client = connect(global).await?;
    let mut models = client.models();
    let namespace = client.namespace.clone();
    match verb {
        ModelVerb::Push(args) => model_push(global, &client, args).await,
        ModelVerb::List => {
            let all = ask(global, models.list_models(ListModelsRequest { namespace, page: None }))
                .await?
                .models;
            let aliases = |m: &Model| {
                m.aliases.iter().map(|(a, v)| format!("{a}={v}")).collect::<Vec<_>>().join(", ")
            };
            let rows = all
                .iter()
                .map(|m| {
                    let meta = m.meta.clone().unwrap_or_default();
                    vec![
                        meta.namespace,
                        meta.name,
                        m.version_count.to_string(),
                        m.latest_version.clone(),
                        aliases(m),
                        age(meta.create_time.as_ref()),
                    ]
                })
                .collect();
            let value = all
                .iter()
                .map(|m| {
                    let meta = m.meta.clone().unwrap_or_default();
                    json!({"namespace": meta.namespace, "name": meta.name, "versionCount": m.version_count, "latestVersion": m.latest_version, "aliases": m.aliases})
                })
                .collect();
            print(
                global,
                &["NAMESPACE", "NAME", "VERSIONS", "LATEST", "ALIASES", "AGE"],
                6,
                rows,
                &Value::Array(value),
            )
        }
        ModelVerb::Show { reference } => {
            if reference.contains([':', '@']) {
                let answer =
                    ask(global, models.get_version(GetVersionRequest { reference, namespace }))
                        .await?;
                let mut value = version_json(&answer.version.unwrap_or_default());
                value["aliases"] = json!(answer.aliases);
                return say(global, manifest::to_yaml(&value).trim_end(), &value);
            }
            let request = GetModelRequest { namespace: namespace.clone(), name: reference.clone() };
            let model = ask(global, models.get_model(request)).await?.model.unwrap_or_default();
            let request = ListVersionsRequest { namespace, name: reference, page: None };
            let all = ask(global, models.list_versions(request)).await?.versions;
            let rows = all
                .iter()
                .map(|v| {
                    let names = model.aliases.iter().filter(|(_, to)| **to == v.version);
                    let names = names.map(|(a, _)| a.clone()).collect::<Vec<_>>().join(", ");
                    let commit = v
                        .lineage
                        .as_ref()
                        .map(|l| l.git_commit.chars().take(12).collect::<String>())
                        .unwrap_or_default();
                    vec![
                        v.version.clone(),
                        names,
                        v.format.clone(),
                        human_bytes(v.size_bytes),
                        commit,
                        age(v.create_time.as_ref()),
                        v.created_by.clone(),
                        v.digest.clone(),
                    ]
                })
                .collect();
            let value = json!({"name": model.meta.map(|m| m.name), "aliases": model.aliases, "versions": all.iter().map(version_json).collect::<Vec<_>>()});
            print(
                global,
                &["VERSION", "ALIASES", "FORMAT", "SIZE", "COMMIT", "AGE", "BY", "DIGEST"],
                7,
                rows,
                &value,
            )
        }
        ModelVerb::Alias { reference, alias, why } => {
            let (name, version) = name_and_version(&reference)?;
            let request = SetAliasRequest {
                write: write(),
                namespace,
                name: name.to_owned(),
                alias: alias.clone(),
                version: version.to_owned(),
                why,
            };
            let moved = ask(global, models.set_alias(request)).await?.r#move.unwrap_or_default();
            say(
                global,
                &format!("{name}@{alias} names {version}"),
                &json!({"alias": alias, "from": moved.from_version, "to": moved.to_version}),
            )
        }
        ModelVerb::History { name } => {
            let request = ListAliasMovesRequest { namespace, name, ..Default::default() };
            let all = ask(global, models.list_alias_moves(request)).await?.moves;
            let rows = all
                .iter()
                .map(|m| {
                    vec![
                        m.time.as_ref().map(crate::output::rfc3339).unwrap_or_default(),
                        m.alias.clone(),
                        m.from_version.clone(),
                        m.to_version.clone(),
                        m.actor.clone(),
                        m.why.clone(),
                    ]
                })
                .collect();
            let value = all.iter().map(|m| json!({"time": moment(m.time.as_ref()), "alias": m.alias, "from": m.from_version, "to": m.to_version, "actor": m.actor, "why": m.why})).collect();
            print(
                global,
                &["TIME", "ALIAS", "FROM", "TO", "BY", "WHY"],
                6,
                rows,
                &Value::Array(value),
            )
        }
        ModelVerb::Rm { reference } => {
            confirm(global, &format!("remove {reference}"))?;
            let (name, version) = name_and_version(&reference)?;
            let request = DeleteVersionRequest {
                write: write(),
                namespace,
                name: name.to_owned(),
                version: version.to_owned(),
                allow_missing: false,
            };
            ask(global, models.delete_version(request)).await?;
            say(global, &format!("{reference}: removed"), &json!({"removed": reference}))
        }
    }
}

pub async fn image(global: &Global, verb: Image) -> Result<()> {
    let Image::Push { local, remote } = verb;
    let client = connect(global).await?;
    let (repository, tag) = name_and_version(&remote)?;
    let (digest, sent) = push::image(&client.context, &local, repository, tag).await?;
    say(
        global,
        &format!("{remote}@{digest} pushed ({} sent)", human_bytes(sent)),
        &json!({"image": remote, "digest": digest, "sentBytes": sent}),
    )
}

pub async fn build(global: &Global, tag: &str, folder: &Path) -> Result<()> {
    use futures_util::StreamExt as _;
    let (name, version) = name_and_version(tag)?;
    let client = connect(global).await?;
    let engine = bollard::Docker::connect_with_unix(
        "/var/run/docker.sock",
        3600,
        bollard::API_DEFAULT_VERSION,
    )?
    .negotiate_version()
    .await?;
    let mut archive = tar::Builder::new(Vec::new());
    archive.follow_symlinks(false);
    archive.append_dir_all(".", folder)?;
    let bytes = bytes::Bytes::from(archive.into_inner()?);
    let local =
        format!("berth.local/build-{}:{}", name.replace('/', "-"), uuid::Uuid::new_v4().simple());
    let options =
        bollard::query_parameters::BuildImageOptionsBuilder::default().t(&local).rm(true).build();
    let mut stream = engine.build_image(options, None, Some(bollard::body_full(bytes)));
    while let Some(step) = stream.next().await {
        let step = step?;
        if let Some(text) = step.stream {
            eprint!(
                "{}",
                text.lines()
                    .map(|l| format!("{}\n", berth_proto::escape::for_terminal(l)))
                    .collect::<String>()
            );
        }
        if let Some(error) = step.error_detail.and_then(|e| e.message) {
            return Err(Error::user(format!("the build failed: {error}")));
        }
    }
    let repository = format!("models/{name}");
    let pushed = push::image(&client.context, &local, &repository, version).await;
    let _ = engine
        .remove_image(&local, None::<bollard::query_parameters::RemoveImageOptions>, None)
        .await;
    let (digest, sent) = pushed?;
    let request = RegisterVersionRequest {
        write: write(),
        version: Some(ModelVersion {
            model: name.to_owned(),
            namespace: client.namespace.clone(),
            version: version.to_owned(),
            repository,
            digest: digest.clone(),
            kind: ModelVersionKind::Image as i32,
            format: "image".to_owned(),
            size_bytes: sent,
            lineage: Some(package::lineage(folder, "")),
            ..ModelVersion::default()
        }),
        aliases: Vec::new(),
    };
    let made =
        ask(global, client.models().register_version(request)).await?.version.unwrap_or_default();
    say(global, &format!("{tag} registered as image {digest}"), &version_json(&made))
}

pub async fn user(global: &Global, verb: UserVerb) -> Result<()> {
    let client = connect(global).await?;
    let mut users = client.users();
    let bindings = |list: &[RoleBinding]| -> Vec<Value> {
        list.iter().map(|b| json!({"role": word(b.role().as_str_name(), "ROLE_"), "namespace": b.namespace, "exec": b.exec})).collect()
    };
    match verb {
        UserVerb::Create { name, role, expires, exec } => {
            let role = match role.as_str() {
                "admin" => Role::Admin,
                "operator" => Role::Operator,
                "viewer" => Role::Viewer,
                other => {
                    return Err(Error::user(format!(
                        "\"{other}\" is not a role: admin, operator or viewer"
                    )));
                }
            };
            let (key, csr_pem) = berth_proto::tls::key_and_request()?;
            let until = time::OffsetDateTime::now_utc() + expires;
            let request = CreateUserRequest {
                write: write(),
                name: name.clone(),
                bindings: vec![RoleBinding {
                    role: role as i32,
                    namespace: global.namespace.clone().unwrap_or_default(),
                    exec,
                }],
                expire_time: Some(prost_types::Timestamp {
                    seconds: until.unix_timestamp(),
                    nanos: 0,
                }),
                csr_pem,
            };
            let made = ask(global, users.create_user(request)).await?;
            let context = client::Context {
                user: name,
                cluster: made.cluster,
                endpoints: made.endpoints,
                registry: client.context.registry.clone(),
                gateway: client.context.gateway.clone(),
                roots: made.roots_pem,
                certificate: made.certificate_pem,
                key,
            };
            let config = client::Config {
                current: "default".to_owned(),
                contexts: BTreeMap::from([("default".to_owned(), context)]),
            };
            // A secret: shown once, to be kept in ~/.config/berth/config.toml over there.
            put(&toml::to_string(&config)?)
        }
        UserVerb::List => {
            let all = ask(global, users.list_users(ListUsersRequest { page: None })).await?.users;
            let rows = all
                .iter()
                .map(|u| {
                    let until =
                        u.expire_time.as_ref().map(crate::output::rfc3339).unwrap_or_default();
                    let roles = u
                        .bindings
                        .iter()
                        .map(|b| word(b.role().as_str_name(), "ROLE_"))
                        .collect::<Vec<_>>()
                        .join(", ");
                    let state = if u.revoked { "revoked" } else { "" };
                    vec![
                        u.meta.clone().unwrap_or_default().name,
                        roles,
                        until,
                        u.tokens.to_string(),
                        state.to_owned(),
                    ]
                })
                .collect();
            let value = all.iter().map(|u| json!({"name": u.meta.clone().unwrap_or_default().name, "bindings": bindings(&u.bindings), "expireTime": moment(u.expire_time.as_ref()), "revoked": u.revoked, "tokens": u.tokens})).collect();
            print(
                global,
                &["NAME", "ROLES", "EXPIRES", "TOKENS", "STATE"],
                5,
                rows,
                &Value::Array(value),
            )
        }
        UserVerb::Token { name, deployment } => {
            let request =
                CreateUserTokenRequest { write: write(), name, expire_time: None, deployment };
            let made = ask(global, users.create_user_token(request)).await?;
            say(global, &made.secret, &json!({"id": made.id, "secret": made.secret}))
        }
        UserVerb::Revoke { name } => {
            confirm(global, &format!("revoke \"{name}\""))?;
            let request =
                RevokeUserRequest { write: write(), name: name.clone(), token_id: String::new() };
            ask(global, users.revoke_user(request)).await?;
            say(global, &format!("{name}: revoked"), &json!({"name": name, "revoked": true}))
        }
        UserVerb::Whoami => {
            let me = ask(global, users.who_am_i(WhoAmIRequest {})).await?;
            let value = json!({"subject": me.subject, "bindings": bindings(&me.bindings), "expireTime": moment(me.expire_time.as_ref())});
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
    }
}

pub fn context(global: &Global, verb: ContextCommand) -> Result<()> {
    let mut config = client::config()?;
    match verb {
        ContextCommand::List => {
            let rows = config
                .contexts
                .iter()
                .map(|(name, c)| {
                    let mark = if *name == config.current { "*" } else { "" };
                    vec![mark.to_owned(), name.clone(), c.user.clone(), c.endpoints.join(", ")]
                })
                .collect();
            let value = config.contexts.iter().map(|(name, c)| json!({"name": name, "current": *name == config.current, "user": c.user, "endpoints": c.endpoints})).collect();
            print(global, &["CURRENT", "NAME", "USER", "ENDPOINTS"], 4, rows, &Value::Array(value))
        }
        ContextCommand::Show => {
            let c = client::context(global)?;
            let value = json!({"user": c.user, "cluster": c.cluster, "endpoints": c.endpoints, "registry": c.registry, "gateway": c.gateway});
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
        ContextCommand::Use { name } => {
            if !config.contexts.contains_key(&name) {
                return Err(Error::user(format!("there is no context \"{name}\"")));
            }
            config.current = name;
            client::save(&config)
        }
        ContextCommand::Rm { name } => {
            if config.contexts.remove(&name).is_none() {
                return Err(Error::user(format!("there is no context \"{name}\"")));
            }
            client::save(&config)
        }
    }
}

pub async fn server(global: &Global, verb: Server) -> Result<()> {
    let Server::Info { wait } = verb;
    let end = tokio::time::Instant::now() + wait.unwrap_or_default();
    let info = loop {
        let asked = async {
            let client = connect(global).await?;
            ask(global, client.system().get_server_info(GetServerInfoRequest {})).await
        };
        match asked.await {
            Ok(info) => break info,
            Err(error) if error.kind == Kind::Unavailable && tokio::time::Instant::now() < end => {
                // Between two tries, until the time that was asked for is over.
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            Err(error) => return Err(error),
        }
    };
    let value = json!({
        "version": info.version, "cluster": info.cluster, "epoch": info.epoch, "revision": info.revision,
        "startTime": moment(info.start_time.as_ref()), "endpoints": info.endpoints,
        "registry": info.registry, "gateway": info.gateway, "page": info.page, "warnings": info.warnings,
    });
    say(global, manifest::to_yaml(&value).trim_end(), &value)
}

pub async fn registry(global: &Global, verb: Registry) -> Result<()> {
    let Registry::Gc { dry_run } = verb;
    let client = connect(global).await?;
    let done =
        ask(global, client.system().collect_garbage(CollectGarbageRequest { dry_run })).await?;
    let verb = if dry_run { "would be removed" } else { "removed" };
    let words = format!("{} blobs, {}: {verb}", done.count, human_bytes(done.size_bytes));
    let value = json!({"dryRun": dry_run, "count": done.count, "sizeBytes": done.size_bytes, "digests": done.digests});
    if global.output == Output::Wide {
        eprintln!("{}", done.digests.join("\n"));
    }
    say(global, &words, &value)
}
