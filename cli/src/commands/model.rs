//! Models, their versions and aliases.

use super::{ask, confirm, connect, model_and_version, name_and_version, pages, pair, write};
use crate::args::{Global, Model as ModelVerb, ModelPush};
use crate::client::{self, Client};
use crate::error::{Error, Kind, Result};
use crate::output::{age, moment, print, say, word};
use crate::{package, push};
use berth_proto::api::*;
use berth_proto::manifest;
use berth_proto::quantity::human_bytes;
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub fn version_json(v: &ModelVersion) -> Value {
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
            "gitRemote": l.git_remote, "parent": l.parent, "datasets": l.datasets,
            "framework": l.framework, "packagedOn": l.packaged_on, "packagedWith": l.packaged_with,
        },
        "files": v.files.iter().map(|f| json!({"path": f.path, "sizeBytes": f.size_bytes, "digest": f.digest})).collect::<Vec<_>>(),
    })
}

/// The version that is registered under this name, if there is one.
pub async fn registered(
    global: &Global,
    client: &Client,
    name: &str,
    version: &str,
) -> Result<Option<ModelVersion>> {
    let (reference, namespace) = (format!("{name}:{version}"), global.namespace().to_owned());
    let request = GetVersionRequest { reference, namespace: namespace.clone() };
    match ask(global, client.models().get_version(request)).await {
        // A name that begins with another namespace's is looked for there, too.
        Ok(answer) => Ok(answer.version.filter(|v| v.model == name && is_in(v, &namespace))),
        Err(error) if ["MODEL_NOT_FOUND", "VERSION_NOT_FOUND"].contains(&&*error.reason) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn is_in(version: &ModelVersion, namespace: &str) -> bool {
    let named = |space: &str| if space.is_empty() { "default" } else { space }.to_owned();
    named(&version.namespace) == named(namespace)
}

/// What a push says of a version, which may have been there before it.
pub fn registered_words(known: Option<&ModelVersion>) -> &'static str {
    match known {
        Some(_) => "was registered already",
        None => "registered",
    }
}

/// Refuses what would change a version that is registered. The same once more is none of that: it moves
/// the aliases that it names.
pub fn unchanged(known: Option<&ModelVersion>, digest: &str) -> Result<()> {
    let Some(known) = known.filter(|known| known.digest != digest) else { return Ok(()) };
    let words = format!(
        "{}:{} exists already ({}), and a version never changes",
        known.model, known.version, known.digest
    );
    Err(Error::user(words).hint("nothing was sent; give it another version"))
}

async fn model_push(global: &Global, mut args: ModelPush) -> Result<()> {
    let (name, version) = model_and_version(&args.reference)?;
    let mut metrics = BTreeMap::new();
    for metric in &args.metrics {
        let (key, value) = pair(metric)?;
        let value = value
            .parse()
            .map_err(|_| Error::new(Kind::Usage, format!("metric {key} must be a number")))?;
        metrics.insert(key, value);
    }
    let parameters: BTreeMap<String, String> =
        args.params.iter().map(|p| pair(p)).collect::<Result<_>>()?;
    let (context, namespace) = (client::context(global)?, global.namespace());
    let datasets = std::mem::take(&mut args.datasets);
    let version = ModelVersion {
        model: name.to_owned(),
        namespace: namespace.to_owned(),
        version: version.to_owned(),
        repository: package::repository(namespace, name),
        kind: ModelVersionKind::Artifact as i32,
        lineage: Some(package::lineage(&args.path, &args.parent, datasets)),
        parameters,
        metrics,
        license: args.license.clone(),
        ..ModelVersion::default()
    };
    let packed = package::pack(version, &args).await?;
    let (registry, version) = (push::Registry::of(&context)?, &packed.version);
    // The registry's tag tells whether there is anything to ask the server for; what was never
    // registered may change.
    let there = registry.named(&version.repository, &version.version).await?;
    let known = if there.is_some() {
        let client = connect(global).await?;
        registered(global, &client, name, &version.version).await?
    } else {
        None
    };
    unchanged(known.as_ref(), &version.digest)?;
    let sent = package::send(&registry, &packed).await?;
    // Only now: a push takes its time, and the server closes a connection that asks for nothing.
    let client = connect(global).await?;
    let request = RegisterVersionRequest {
        write: write(),
        version: Some(packed.version),
        aliases: args.aliases,
    };
    let made =
        ask(global, client.models().register_version(request)).await?.version.unwrap_or_default();
    let words = format!(
        "{}:{} {}, {} ({} sent), {}",
        made.model,
        made.version,
        registered_words(known.as_ref()),
        human_bytes(made.size_bytes),
        human_bytes(sent),
        made.digest
    );
    say(global, &words, &version_json(&made))
}

pub async fn model(global: &Global, verb: ModelVerb) -> Result<()> {
    let namespace = global.namespace().to_owned();
    match verb {
        ModelVerb::Push(args) => model_push(global, args).await,
        ModelVerb::List => {
            let mut models = connect(global).await?.models();
            let all = pages!(global, models, |page| models
                .list_models(ListModelsRequest { namespace: namespace.clone(), page }));
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
            let mut models = connect(global).await?.models();
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
            let all = pages!(global, versions, |page| models.list_versions(ListVersionsRequest {
                namespace: namespace.clone(),
                name: reference.clone(),
                page,
            }));
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
            let mut models = connect(global).await?.models();
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
        ModelVerb::Unalias { name, alias, why } => {
            // People think as long as they like: no connection waits for that.
            confirm(global, &format!("take the alias \"{alias}\" from \"{name}\""))?;
            let mut models = connect(global).await?.models();
            let request = DeleteAliasRequest {
                write: write(),
                namespace,
                name: name.clone(),
                alias: alias.clone(),
                why,
                allow_missing: false,
            };
            ask(global, models.delete_alias(request)).await?;
            say(
                global,
                &format!("{name}@{alias} names nothing"),
                &json!({"alias": alias, "removed": true}),
            )
        }
        ModelVerb::History { name, alias, at } => {
            let at_time = at.as_deref().map(crate::output::since).transpose()?;
            let alias = alias.unwrap_or_default();
            let mut models = connect(global).await?.models();
            let all =
                pages!(global, moves, |page| models.list_alias_moves(ListAliasMovesRequest {
                    namespace: namespace.clone(),
                    name: name.clone(),
                    alias: alias.clone(),
                    at_time,
                    page,
                }));
            let rows = all
                .iter()
                .map(|m| {
                    vec![
                        m.time.as_ref().map(crate::output::stamp).unwrap_or_default(),
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
            let (name, version) = name_and_version(&reference)?;
            confirm(global, &format!("remove {reference}"))?;
            let mut models = connect(global).await?.models();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_may_be_sent_again_as_it_is_and_not_otherwise() {
        let known = ModelVersion {
            model: "iris".to_owned(),
            version: "1".to_owned(),
            digest: "sha256:a".to_owned(),
            ..ModelVersion::default()
        };
        assert!(unchanged(None, "sha256:a").is_ok());
        assert!(unchanged(Some(&known), "sha256:a").is_ok());
        let error = unchanged(Some(&known), "sha256:b").unwrap_err();
        assert_eq!(error.kind, Kind::User);
        assert!(error.message.contains("iris:1 exists already (sha256:a)"), "{}", error.message);
    }

    #[test]
    fn a_version_of_another_namespace_is_not_the_one_that_is_pushed() {
        let of = |namespace: &str| ModelVersion {
            namespace: namespace.to_owned(),
            ..ModelVersion::default()
        };
        assert!(is_in(&of("default"), "") && is_in(&of(""), "default"));
        assert!(is_in(&of("vision"), "vision") && !is_in(&of("vision"), ""));
    }
}
