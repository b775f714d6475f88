//! Models, versions and aliases.

use super::{Api, audit, auth, namespace, page};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::ledger::refused;
use crate::registry::names::{Reference, RepoName};
use crate::resolve::{find_version, is_model_name};
use berth_proto::api::model_service_server::ModelService;
use berth_proto::api::*;
use berth_proto::convert::{timestamp, wall};
use berth_proto::record::{AliasMoveRecord, Meta, ModelRecord, ModelVersionRecord};
use berth_server_core::batching::{Precondition, Proposal};
use berth_server_core::change::Change;
use berth_server_core::status;
use berth_server_core::view::{Kept, ObjectKey, View};
use prost::Message as _;
use std::sync::Arc;
use tonic::{Request, Response, Status};

fn check_alias(alias: &str) -> Result<(), Error> {
    let good = (1..=63).contains(&alias.len())
        && alias.starts_with(|c: char| c.is_ascii_lowercase())
        && alias.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if good {
        Ok(())
    } else {
        Err(Error::field("alias", "must begin with a-z and hold 1 to 63 of a-z, 0-9 and '-'"))
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
        let model_uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let change =
            Change::AppendAliasMove(AliasMoveRecord { model_uid, r#move: Some(moved.clone()) });
        (moved, change)
    }

    async fn write_model(
        &self,
        caller: &auth::Caller,
        method: &str,
        name: &str,
        preconditions: Vec<Precondition>,
        mut changes: Vec<Change>,
    ) -> Result<(), Error> {
        changes.push(audit(caller, method, "", vec![format!("model/{name}")]));
        self.0
            .ledger
            .propose(Proposal { preconditions, changes })
            .await
            .map(|_| ())
            .map_err(|why| refused(why, Kind::Model, name))
    }
}

#[tonic::async_trait]
impl ModelService for Api {
    async fn register_version(
        &self,
        request: Request<RegisterVersionRequest>,
    ) -> Result<Response<RegisterVersionResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let mut version = r.version.clone().unwrap_or_default();
        let space = namespace(&version.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        if !is_model_name(&version.model) || version.model.split('/').count() > 3 {
            return Err(Error::field(
                "version.model",
                "must have 1 to 3 segments of a-z, 0-9 and '-', joined by '/'",
            )
            .into());
        }
        let tag = crate::registry::names::Tag::parse(&version.version);
        if tag.is_err() {
            return Err(Error::field(
                "version.version",
                "must be 1 to 128 of letters, digits, '.', '_' and '-', not beginning with '.' or '-'",
            )
            .into());
        }
        for alias in &r.aliases {
            check_alias(alias)?;
        }
        if version.files.len() > 10_000
            || version.parameters.len() > 256
            || version.metrics.len() > 256
        {
            return Err(Error::field("version", "has too many files, parameters or metrics").into());
        }
        let repo = RepoName::parse(&version.repository)
            .map_err(|e| Error::field("version.repository", e.to_string()))?;
        let digest = Reference::parse(&version.digest)
            .map_err(|e| Error::field("version.digest", e.to_string()))?;
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
        let view = self.0.ledger.ahead();
        let known = view.model(space.as_str(), &version.model);
        let key = ObjectKey::ModelName(space.to_string(), version.model.clone());
        let preconditions =
            vec![Precondition::At(key, known.map(|k| k.revision).unwrap_or_default())];
        let mut record =
            known.map(|k| ModelRecord::clone(&k.record)).unwrap_or_else(|| ModelRecord {
                meta: Some(Meta {
                    uid: uuid::Uuid::now_v7().to_string(),
                    name: version.model.clone(),
                    namespace: space.to_string(),
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
                    name: format!("{}:{} (with another digest)", version.model, version.version),
                }
                .into());
            }
            if r.aliases.iter().all(|a| record.aliases.get(a) == Some(&version.version)) {
                return Ok(Response::new(RegisterVersionResponse { version: Some(same) }));
            }
            version = same;
        } else {
            version.uid = uuid::Uuid::now_v7().to_string();
            version.model_uid = model_uid.clone();
            version.namespace = space.to_string();
            version.create_time = Some(timestamp(wall_now()));
            version.created_by = caller.subject.clone();
        }
        if version.encoded_len() > 512 * 1024 {
            return Err(Error::field("version", "is larger than 512 KiB").into());
        }
        let mut changes = Vec::new();
        for alias in &r.aliases {
            let to = version.version.clone();
            changes.push(Self::move_alias(&mut record, alias, Some(&to), &caller, "registered").1);
        }
        changes.insert(0, Change::PutModel(Arc::new(record)));
        let kept = ModelVersionRecord { version: Some(version.clone()) };
        changes.insert(1, Change::PutVersion(Arc::new(kept)));
        if !r.write.as_ref().is_some_and(|w| w.validate_only) {
            let name = version.model.clone();
            self.write_model(
                &caller,
                "ModelService/RegisterVersion",
                &name,
                preconditions,
                changes,
            )
            .await?;
        }
        let view = self.0.ledger.view();
        let version =
            view.version(&model_uid, &version.version).and_then(with_revision).unwrap_or(version);
        Ok(Response::new(RegisterVersionResponse { version: Some(version) }))
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
        let view = self.0.ledger.view();
        let all = view
            .models()
            .filter(|k| {
                let space =
                    k.record.meta.as_ref().map(|m| m.namespace.as_str()).unwrap_or_default();
                (r.namespace.is_empty() || space == r.namespace) && caller.sees(space)
            })
            .map(|kept| shown(&view, kept))
            .collect();
        let (models, next_page_token) = page(all, r.page.as_ref())?;
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
        let (space, version) = find_version(&view, space.as_str(), &r.reference)?;
        caller.require(Role::Viewer, &space)?;
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
        let view = self.0.ledger.view();
        let model = Self::model(&view, space.as_str(), &r.name)?;
        let uid = model.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let mut all: Vec<ModelVersion> = view.versions_of(&uid).filter_map(with_revision).collect();
        all.sort_by_key(|v| std::cmp::Reverse(v.create_time.as_ref().map(|t| wall(t).0)));
        let (versions, next_page_token) = page(all, r.page.as_ref())?;
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
        let view = self.0.ledger.ahead();
        let found = Self::model(&view, space.as_str(), &r.name).ok().and_then(|model| {
            let uid = model.record.meta.as_ref()?.uid.clone();
            let version = view.version(&uid, &r.version)?.record.version.clone()?;
            Some((model, uid, version))
        });
        let Some((model, uid, version)) = found else {
            if r.allow_missing {
                return Ok(Response::new(DeleteVersionResponse {}));
            }
            let name = format!("{}:{}", r.name, r.version);
            return Err(Error::not_found(Kind::Version, name).into());
        };
        let in_use = |by: String| {
            Error::precondition(
                "VERSION_IN_USE",
                format!("{}:{} is in use by {by}", r.name, r.version),
            )
        };
        if let Some((alias, _)) = model.record.aliases.iter().find(|(_, to)| **to == r.version) {
            return Err(in_use(format!("alias @{alias}")).into());
        }
        for deployment in view.deployments() {
            let used = view.releases_of(&deployment.uid).any(|release| {
                release
                    .source
                    .artifact
                    .as_ref()
                    .is_some_and(|a| a.digest.as_str() == version.digest)
            });
            if used {
                return Err(in_use(format!("deployment {}", deployment.name)).into());
            }
        }
        let changes = vec![Change::DeleteVersion(uid, r.version.clone())];
        self.write_model(&caller, "ModelService/DeleteVersion", &r.name, Vec::new(), changes)
            .await?;
        Ok(Response::new(DeleteVersionResponse {}))
    }

    async fn set_alias(
        &self,
        request: Request<SetAliasRequest>,
    ) -> Result<Response<SetAliasResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        check_alias(&r.alias)?;
        let view = self.0.ledger.ahead();
        let kept = Self::model(&view, space.as_str(), &r.name)?;
        let mut record = ModelRecord::clone(&kept.record);
        let uid = record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        if view.version(&uid, &r.version).is_none() {
            let name = format!("{}:{}", r.name, r.version);
            return Err(Error::not_found(Kind::Version, name).into());
        }
        let (moved, change) =
            Self::move_alias(&mut record, &r.alias, Some(&r.version), &caller, &r.why);
        let key = ObjectKey::ModelName(space.to_string(), r.name.clone());
        let preconditions = vec![Precondition::At(key, kept.revision)];
        let changes = vec![Change::PutModel(Arc::new(record)), change];
        self.write_model(&caller, "ModelService/SetAlias", &r.name, preconditions, changes).await?;
        Ok(Response::new(SetAliasResponse { r#move: Some(moved) }))
    }

    async fn delete_alias(
        &self,
        request: Request<DeleteAliasRequest>,
    ) -> Result<Response<DeleteAliasResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Operator, space.as_str())?;
        let view = self.0.ledger.ahead();
        let kept = Self::model(&view, space.as_str(), &r.name)?;
        if !kept.record.aliases.contains_key(&r.alias) {
            if r.allow_missing {
                return Ok(Response::new(DeleteAliasResponse {}));
            }
            return Err(Error::not_found(Kind::Alias, &r.alias).into());
        }
        let mut record = ModelRecord::clone(&kept.record);
        let (_, change) = Self::move_alias(&mut record, &r.alias, None, &caller, &r.why);
        let key = ObjectKey::ModelName(space.to_string(), r.name.clone());
        let preconditions = vec![Precondition::At(key, kept.revision)];
        let changes = vec![Change::PutModel(Arc::new(record)), change];
        self.write_model(&caller, "ModelService/DeleteAlias", &r.name, preconditions, changes)
            .await?;
        Ok(Response::new(DeleteAliasResponse {}))
    }

    async fn list_alias_moves(
        &self,
        request: Request<ListAliasMovesRequest>,
    ) -> Result<Response<ListAliasMovesResponse>, Status> {
        let caller = auth::of(&request);
        let r = request.into_inner();
        let space = namespace(&r.namespace)?;
        caller.require(Role::Viewer, space.as_str())?;
        let view = self.0.ledger.view();
        let kept = Self::model(&view, space.as_str(), &r.name)?;
        let uid = kept.record.meta.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let entries = self.0.ledger.entries(&format!("aliasmove/{uid}/")).await;
        let until = r.at_time.as_ref().map_or(i64::MAX, |t| wall(t).0);
        let mut all: Vec<AliasMove> = entries
            .iter()
            .filter_map(|e| AliasMoveRecord::decode(e.value.as_slice()).ok()?.r#move)
            .filter(|m| r.alias.is_empty() || m.alias == r.alias)
            .filter(|m| m.time.as_ref().is_some_and(|t| wall(t).0 <= until))
            .collect();
        all.reverse();
        let (moves, next_page_token) = page(all, r.page.as_ref())?;
        Ok(Response::new(ListAliasMovesResponse { moves, next_page_token }))
    }
}
