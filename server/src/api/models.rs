//! Models, versions and aliases.

use super::lists::{Asked, label};
use super::writes::{Begun, Call, Step};
use super::{Api, auth, namespace};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::registry::access::Action;
use crate::registry::names::{Reference, RepoName};
use crate::resolve::{find_version, is_model_name};
use berth_proto::api::model_service_server::ModelService;
use berth_proto::api::*;
use berth_proto::convert::{Problems, timestamp, wall};
use berth_proto::ids::{Digest, Revision};
use berth_proto::record::{AliasMoveRecord, Meta, ModelRecord, ModelVersionRecord};
use berth_proto::values::{MAX_MODEL_FILES, MAX_VERSION_BYTES};
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::{Change, audited};
use berth_server_core::status;
use berth_server_core::view::{Kept, ObjectKey, View};
use prost::Message as _;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// What an alias must be.
const ALIAS: &str = "must begin with a-z and hold 1 to 63 of a-z, 0-9 and '-'";

fn is_alias(alias: &str) -> bool {
    (1..=63).contains(&alias.len())
        && alias.starts_with(|c: char| c.is_ascii_lowercase())
        && alias.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Everything that is wrong with a version as it is to be registered; where it lies when all is right.
fn checked(version: &ModelVersion, aliases: &[String]) -> Result<(RepoName, Reference), Error> {
    let mut p = Problems::default();
    if !is_model_name(&version.model) || version.model.split('/').count() > 3 {
        p.add("version.model", "must have 1 to 3 segments of a-z, 0-9 and '-', joined by '/'");
    }
    if crate::registry::names::Tag::parse(&version.version).is_err() {
        let words = "must be 1 to 128 of letters, digits, '.', '_' and '-', not beginning with '.' \
                     or '-'";
        p.add("version.version", words);
    }
    for (i, alias) in aliases.iter().enumerate() {
        if !is_alias(alias) {
            p.add(format!("aliases[{i}]"), ALIAS);
        } else if aliases[..i].contains(alias) {
            p.add(format!("aliases[{i}]"), format!("names \"{alias}\" twice"));
        }
    }
    for (field, count, most) in [
        ("files", version.files.len(), MAX_MODEL_FILES),
        ("parameters", version.parameters.len(), 256),
        ("metrics", version.metrics.len(), 256),
    ] {
        if count > most {
            p.add(format!("version.{field}"), format!("has {count} entries; at most {most} fit"));
        }
    }
    let repo = p.take("version.repository", RepoName::parse(&version.repository));
    let digest = p.take("version.digest", version.digest.parse::<Digest>());
    match (repo, digest) {
        (Some(repo), Some(digest)) if p.0.is_empty() => Ok((repo, Reference::Digest(digest))),
        _ => Err(p.into()),
    }
}

fn shown(view: &View, kept: &Kept<ModelRecord>) -> Model {
    let meta = kept.record.meta.clone().unwrap_or_default();
    let mut versions: Vec<ModelVersion> =
        view.versions_of(&meta.uid).filter_map(|v| v.record.version.clone()).collect();
    versions.sort_by_key(|v| v.create_time.as_ref().map(|t| wall(t).0));
    Model {
        meta: Some(status::meta(&meta, kept.revision.0)),
        description: kept.record.description.clone(),
        aliases: kept.record.aliases.clone(),
        version_count: u32::try_from(versions.len()).unwrap_or(u32::MAX),
        latest_version: versions.last().map(|v| v.version.clone()).unwrap_or_default(),
    }
}

fn with_revision(kept: &Kept<ModelVersionRecord>) -> Option<ModelVersion> {
    kept.record.version.clone().map(|v| ModelVersion { revision: kept.revision.0, ..v })
}

impl Api {
    fn model(view: &View, space: &str, name: &str) -> Result<Kept<ModelRecord>, Error> {
        view.model(space, name).cloned().ok_or_else(|| Error::not_found(Kind::Model, name))
    }

    fn move_alias(
        record: &mut ModelRecord,
        alias: &str,
        to: Option<&str>,
        caller: &auth::Caller,
        why: &str,
    ) -> (AliasMove, Change) {
        let from = match to {
            Some(to) => record.aliases.insert(alias.to_owned(), to.to_owned()),
            None => record.aliases.remove(alias),
        };
        let moved = AliasMove {
            alias: alias.to_owned(),
            from_version: from.unwrap_or_default(),
            to_version: to.unwrap_or_default().to_owned(),
            time: Some(timestamp(wall_now())),
            actor: caller.subject.clone(),
            why: why.chars().take(1024).collect(),
        };
        let meta = record.meta.get_or_insert_default();
        meta.update_unix_ms = wall_now().0;
        let change = Change::AppendAliasMove(AliasMoveRecord {
            model_uid: meta.uid.clone(),
            r#move: Some(moved.clone()),
            revision: 0,
        });
        (moved, change)
    }
}

/// A write of a model: its record and what goes with it, guarded by what was found.
fn step<A>(
    call: &Call<'_>,
    space: &str,
    (name, uid): (&str, &str),
    found: Revision,
    changes: Vec<Change>,
    answer: A,
) -> Step<A> {
    let key = ObjectKey::ModelName(space.to_owned(), name.to_owned());
    Step {
        proposal: Proposal { preconditions: vec![call.at(key, found)], changes },
        answer,
        objects: vec![audited("model", Some(space), name, uid)],
    }
}

/// How a version is registered: the step that writes it.
fn register(
    view: &View,
    call: &Call<'_>,
    space: &str,
    asked: &ModelVersion,
    aliases: &[String],
) -> Result<Step<RegisterVersionResponse>, Error> {
    let mut version = asked.clone();
    let known = view.model(space, &version.model);
    let found = known.map(|k| k.revision).unwrap_or_default();
    let mut record = known.map(|k| ModelRecord::clone(&k.record)).unwrap_or_else(|| ModelRecord {
        meta: Some(Meta {
            uid: uuid::Uuid::now_v7().to_string(),
            name: version.model.clone(),
            namespace: space.to_owned(),
            create_unix_ms: wall_now().0,
            ..Meta::default()
        }),
        ..ModelRecord::default()
    });
    let meta = record.meta.get_or_insert_default();
    meta.update_unix_ms = wall_now().0;
    let model_uid = meta.uid.clone();
    if let Some(held) = view.version(&model_uid, &version.version) {
        let same = with_revision(held).unwrap_or_default();
        if same.digest != version.digest {
            return Err(Error::Exists {
                kind: Kind::Version,
                name: format!("{}:{}", version.model, version.version),
                hint: " with another digest; a version never changes: give this one a new name"
                    .into(),
            });
        }
        if aliases.iter().all(|a| record.aliases.get(a) == Some(&version.version)) {
            return Ok(Step::nothing(RegisterVersionResponse { version: Some(same) }));
        }
        version = same;
    } else {
        version.uid = uuid::Uuid::now_v7().to_string();
        version.model_uid = model_uid;
        version.namespace = space.to_owned();
        version.create_time = Some(timestamp(wall_now()));
        version.created_by.clone_from(&call.caller.subject);
    }
    version.revision = 0;
    if version.encoded_len() > MAX_VERSION_BYTES {
        return Err(Error::field("version", "is larger than 512 KiB"));
    }
    let mut moves = Vec::new();
    for alias in aliases {
        if record.aliases.get(alias) == Some(&version.version) {
            continue;
        }
        let to = Some(version.version.as_str());
        moves.push(Api::move_alias(&mut record, alias, to, call.caller, "registered").1);
    }
    let kept = ModelVersionRecord { version: Some(version.clone()) };
    let mut changes = vec![Change::PutModel(Arc::new(record)), Change::PutVersion(Arc::new(kept))];
    changes.extend(moves);
    let (name, uid) = (version.model.clone(), version.model_uid.clone());
    let answer = RegisterVersionResponse { version: Some(version) };
    Ok(step(call, space, (&name, &uid), found, changes, answer))
}

/// Whether a version of the model with this uid may go.
fn may_go(view: &View, model: &str, version: &ModelVersion) -> Result<(), Error> {
    let Some(user) = view.user_of_version(model, &version.version) else { return Ok(()) };
    let whole = format!("{}:{}", version.model, version.version);
    Err(Error::precondition("VERSION_IN_USE", format!("{whole} is in use by {user}")))
}

#[tonic::async_trait]
impl ModelService for Api {
    async fn register_version(
        &self,
        request: Request<RegisterVersionRequest>,
    ) -> Result<Response<RegisterVersionResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let version = r.version.clone().unwrap_or_default();
        let space = namespace(&version.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        let (repo, digest) = checked(&version, &r.aliases)?;
        caller.require_repository(&repo, Action::Push)?;
        if self.0.registry.renew_manifest(&repo, &digest).await.is_err() {
            return Err(Error::precondition(
                "MANIFEST_MISSING",
                format!(
                    "{}@{} is not in the registry; push it first",
                    version.repository, version.digest
                ),
            )
            .into());
        }
        let method = "ModelService/RegisterVersion";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::Model, &version.model, |view| {
                register(view, &call, space.as_str(), &version, &r.aliases)
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Viewer, space.as_str())?;
        let view = self.0.ledger.view();
        let kept = Self::model(&view, space.as_str(), &r.name)?;
        Ok(Response::new(GetModelResponse { model: Some(shown(&view, &kept)) }))
    }

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let asked = Asked {
            call: "ListModels",
            parents: &[&r.namespace],
            fields: &["name", "namespace", "labels"],
        };
        let listing = self.listing(&caller, r.page.as_ref(), &asked)?;
        let view = Arc::clone(&listing.view);
        let all = view
            .models()
            .filter(|kept| {
                let Some(meta) = &kept.record.meta else { return false };
                let space = meta.namespace.as_str();
                (r.namespace.is_empty() || space == r.namespace)
                    && caller.sees(space)
                    && listing.wants(|field| match field {
                        "name" => Some(&meta.name),
                        "namespace" => Some(space),
                        other => label(&meta.labels, other),
                    })
            })
            .collect();
        let (models, next_page_token) = self.page(listing, all, |kept| shown(&view, kept));
        Ok(Response::new(ListModelsResponse { models, next_page_token }))
    }

    async fn get_version(
        &self,
        request: Request<GetVersionRequest>,
    ) -> Result<Response<GetVersionResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        let view = self.0.ledger.view();
        let (space, version) =
            find_version(&caller, &view, space.as_str(), &r.reference, "reference")?;
        let aliases = view
            .model(&space, &version.model)
            .map(|m| {
                let names = m.record.aliases.iter().filter(|(_, to)| **to == version.version);
                names.map(|(alias, _)| alias.clone()).collect()
            })
            .unwrap_or_default();
        Ok(Response::new(GetVersionResponse { version: Some(version), aliases }))
    }

    async fn list_versions(
        &self,
        request: Request<ListVersionsRequest>,
    ) -> Result<Response<ListVersionsResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Viewer, space.as_str())?;
        let asked = Asked {
            call: "ListVersions",
            parents: &[space.as_str(), &r.name],
            fields: &["version", "created_by", "format", "digest"],
        };
        let listing = self.listing(&caller, r.page.as_ref(), &asked)?;
        let model = Self::model(&listing.view, space.as_str(), &r.name)?;
        let uid = model.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let mut all: Vec<ModelVersion> = listing
            .view
            .versions_of(&uid)
            .filter_map(with_revision)
            .filter(|v| {
                listing.wants(|field| match field {
                    "version" => Some(&v.version),
                    "created_by" => Some(&v.created_by),
                    "format" => Some(&v.format),
                    _ => Some(&v.digest),
                })
            })
            .collect();
        all.sort_by_key(|v| std::cmp::Reverse(v.create_time.as_ref().map(|t| wall(t).0)));
        let (versions, next_page_token) = self.page(listing, all, |version| version);
        Ok(Response::new(ListVersionsResponse { versions, next_page_token }))
    }

    async fn delete_version(
        &self,
        request: Request<DeleteVersionRequest>,
    ) -> Result<Response<DeleteVersionResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        let method = "ModelService/DeleteVersion";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let name = format!("{}:{}", r.name, r.version);
        let answer = self
            .write(&call, Kind::Version, &name, |view| {
                let found = view.model(space.as_str(), &r.name).and_then(|model| {
                    let uid = model.record.meta.as_ref()?.uid.clone();
                    let kept = view.version(&uid, &r.version)?;
                    Some((uid, kept.record.version.clone()?, kept.revision))
                });
                let Some((uid, version, revision)) = found else {
                    if r.allow_missing {
                        return Ok(Step::nothing(DeleteVersionResponse {}));
                    }
                    return Err(Error::not_found(Kind::Version, &name));
                };
                may_go(view, &uid, &version)?;
                let at = call.at(ObjectKey::Version(uid.clone(), r.version.clone()), revision);
                let still = Precondition::Unused(uid.clone(), r.version.clone());
                Ok(Step {
                    proposal: Proposal {
                        preconditions: vec![at, still],
                        changes: vec![Change::DeleteVersion(uid, r.version.clone())],
                    },
                    answer: DeleteVersionResponse {},
                    objects: vec![audited("version", Some(space.as_str()), &name, &version.uid)],
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn set_alias(
        &self,
        request: Request<SetAliasRequest>,
    ) -> Result<Response<SetAliasResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        if !is_alias(&r.alias) {
            return Err(Error::field("alias", ALIAS).into());
        }
        let method = "ModelService/SetAlias";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::Model, &r.name, |view| {
                let kept = Self::model(view, space.as_str(), &r.name)?;
                let mut record = ModelRecord::clone(&kept.record);
                let uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
                if view.version(&uid, &r.version).is_none() {
                    let name = format!("{}:{}", r.name, r.version);
                    return Err(Error::not_found(Kind::Version, name));
                }
                let named = record.aliases.get(&r.alias) == Some(&r.version);
                let (moved, change) =
                    Self::move_alias(&mut record, &r.alias, Some(&r.version), &caller, &r.why);
                // What names it already is not moved.
                let changes = if named {
                    Vec::new()
                } else {
                    vec![Change::PutModel(Arc::new(record)), change]
                };
                let answer = SetAliasResponse { r#move: Some(moved) };
                let model = (r.name.as_str(), uid.as_str());
                Ok(step(&call, space.as_str(), model, kept.revision, changes, answer))
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn delete_alias(
        &self,
        request: Request<DeleteAliasRequest>,
    ) -> Result<Response<DeleteAliasResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        let method = "ModelService/DeleteAlias";
        let call = match self.begin(&caller, r.write.as_ref(), method, &r)? {
            Begun::Kept(answer) => return Ok(Response::new(answer)),
            Begun::New(call) => call,
        };
        let answer = self
            .write(&call, Kind::Model, &r.name, |view| {
                let kept = match Self::model(view, space.as_str(), &r.name) {
                    Ok(kept) if kept.record.aliases.contains_key(&r.alias) => kept,
                    Ok(_) | Err(_) if r.allow_missing => {
                        return Ok(Step::nothing(DeleteAliasResponse {}));
                    }
                    Ok(_) => return Err(Error::not_found(Kind::Alias, &r.alias)),
                    Err(error) => return Err(error),
                };
                let mut record = ModelRecord::clone(&kept.record);
                let uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
                let (_, change) = Self::move_alias(&mut record, &r.alias, None, &caller, &r.why);
                let changes = vec![Change::PutModel(Arc::new(record)), change];
                let answer = DeleteAliasResponse {};
                let model = (r.name.as_str(), uid.as_str());
                Ok(step(&call, space.as_str(), model, kept.revision, changes, answer))
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn list_alias_moves(
        &self,
        request: Request<ListAliasMovesRequest>,
    ) -> Result<Response<ListAliasMovesResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Viewer, space.as_str())?;
        let at = r.at_time.as_ref().map_or(i64::MAX, |t| wall(t).0);
        let asked = Asked {
            call: "ListAliasMoves",
            parents: &[space.as_str(), &r.name, &r.alias, &at.to_string()],
            fields: &["alias", "actor"],
        };
        let listing = self.listing_of_log(&caller, r.page.as_ref(), &asked)?;
        let kept = Self::model(&listing.view, space.as_str(), &r.name)?;
        let uid = kept.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let entries = self.0.ledger.entries(&format!("aliasmove/{uid}/")).await;
        let entries = entries.map_err(Error::from)?;
        let mut all: Vec<AliasMove> = entries
            .iter()
            .filter(|e| e.revision <= listing.revision())
            .filter_map(|e| AliasMoveRecord::decode(e.value.as_slice()).ok()?.r#move)
            .filter(|m| r.alias.is_empty() || m.alias == r.alias)
            .filter(|m| m.time.as_ref().is_some_and(|t| wall(t).0 <= at))
            .filter(|m| {
                listing.wants(|field| match field {
                    "alias" => Some(&m.alias),
                    _ => Some(&m.actor),
                })
            })
            .collect();
        all.reverse();
        let (moves, next_page_token) = self.page(listing, all, |moved| moved);
        Ok(Response::new(ListAliasMovesResponse { moves, next_page_token }))
    }
}
