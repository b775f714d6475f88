//! What a plan shows: differences between specs, and the planner's steps over a view with the decision
//! applied. Writes nothing.

use super::Api;
use crate::error::Error;
use berth_proto::api::{DeploymentSpec, FieldChange};
use berth_proto::convert::deployment_spec_from_api;
use berth_proto::ids::ReplicaUid;
use berth_server_core::decide::{Decision, Wanted};
use berth_server_core::view::View;
use berth_server_core::{planner, release};
use std::collections::{BTreeMap, BTreeSet};

/// Leaves of a manifest's spec by their path; lists are told as a whole.
fn leaves(value: &serde_json::Value, path: &str, out: &mut BTreeMap<String, String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                leaves(value, &format!("{path}.{key}"), out);
            }
        }
        serde_json::Value::String(text) => {
            out.insert(path.to_owned(), text.clone());
        }
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::Array(_) => {
            out.insert(path.to_owned(), value.to_string());
        }
    }
}

/// Differences between two specs, as people write them. What one of them leaves out and the other spells
/// out as it is by default is none: going back leaves a spec with everything filled in.
pub(super) fn changes(before: Option<&DeploymentSpec>, after: &DeploymentSpec) -> Vec<FieldChange> {
    let flat = |spec: &DeploymentSpec| {
        let mut out = BTreeMap::new();
        leaves(&berth_proto::manifest::spec_to_json(spec), "spec", &mut out);
        out
    };
    // Of one that is new all that was written is told, and no more.
    let Some(before) = before else { return differences(&BTreeMap::new(), &flat(after)) };
    let filled_in = |spec: &DeploymentSpec| match deployment_spec_from_api(spec) {
        Ok(spec) => flat(&release::filled_in(&spec)),
        Err(_) => flat(spec),
    };
    differences(&filled_in(before), &filled_in(after))
}

fn differences(
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
) -> Vec<FieldChange> {
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != after.get(*key))
        .map(|key| FieldChange {
            path: key.clone(),
            before: before.get(key).cloned().unwrap_or_default(),
            after: after.get(key).cloned().unwrap_or_default(),
        })
        .collect()
}

/// Steps of one answer: some 4 MiB, of the 16 that a client takes.
const MAX_STEPS: usize = 50_000;

/// What the planner would do for each over a view with that decision applied, to the end if all goes
/// well. Not on the runtime's threads: it may take as long as half a second.
///
/// # Errors
/// When it panics.
pub(super) async fn foresee(
    api: &Api,
    view: &View,
    decided: &[(Wanted, Decision)],
) -> Result<Vec<planner::Plan>, Error> {
    let (live, now) = (api.0.live.load_full(), api.0.time());
    let view = view.clone();
    let decided: Vec<_> = decided
        .iter()
        .map(|(_, d)| (d.deployment.uid.clone(), d.proposal.changes.clone()))
        .collect();
    let look = move || {
        let (mut budget, mut room) = (planner::Budget::default(), MAX_STEPS);
        let mut number = 0_u32;
        let mut mint = || -> ReplicaUid {
            number += 1;
            #[expect(clippy::expect_used, reason = "the text is a uid by its form")]
            format!("planned-{number}").parse().expect("a uid")
        };
        let mut plans = Vec::new();
        for (uid, changes) in decided {
            let mut next = view.clone();
            let revision = next.revision.next();
            for change in &changes {
                next.apply(change, revision);
            }
            let mut plan = planner::foresee(&next, &live, &uid, now, &mut mint, &mut budget);
            plan.report.more |= plan.steps.len() > room;
            plan.steps.truncate(room);
            room -= plan.steps.len();
            plans.push(plan);
        }
        plans
    };
    let plans = tokio::task::spawn_blocking(look).await;
    plans.map_err(|e| Error::internal("cannot look ahead", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::api::deployment_spec::Source;

    #[test]
    fn what_is_filled_in_is_no_difference() {
        let model = |reference: &str| DeploymentSpec {
            source: Some(Source::Model(reference.to_owned())),
            ..DeploymentSpec::default()
        };
        let kept = release::filled_in(&deployment_spec_from_api(&model("iris:1")).unwrap());
        assert_eq!(changes(Some(&kept), &model("iris:1")), []);
        let told = changes(Some(&kept), &model("iris:2"));
        let words: Vec<_> = told.iter().map(|c| (&*c.path, &*c.before, &*c.after)).collect();
        assert_eq!(words, [("spec.model", "iris:1", "iris:2")]);
        let new = changes(None, &model("iris:1"));
        assert_eq!(new.iter().map(|c| &*c.path).collect::<Vec<_>>(), ["spec.model"]);
    }
}
