//! What a plan shows: differences between specs, and the planner's first steps over a view with the
//! decision applied. Writes nothing.

use super::Api;
use berth_proto::api::{DeploymentSpec, FieldChange};
use berth_proto::ids::ReplicaUid;
use berth_server_core::decide::Decision;
use berth_server_core::planner;
use berth_server_core::view::View;
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

/// Differences between two specs, as people write them.
pub(super) fn changes(before: Option<&DeploymentSpec>, after: &DeploymentSpec) -> Vec<FieldChange> {
    let flat = |spec: &DeploymentSpec| {
        let mut out = BTreeMap::new();
        leaves(&berth_proto::manifest::spec_to_json(spec), "spec", &mut out);
        out
    };
    let before = before.map(flat).unwrap_or_default();
    let after = flat(after);
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

/// A pass of the planner over a view with the decision applied: what would be done first.
pub(super) fn foresee(api: &Api, view: &View, decision: &Decision) -> planner::Plan {
    let mut next = view.clone();
    let revision = next.revision.next();
    for change in &decision.proposal.changes {
        next.apply(change, revision);
    }
    let live = api.0.live.load_full();
    let mut number = 0_u32;
    let mut mint = || -> ReplicaUid {
        number += 1;
        #[expect(clippy::expect_used, reason = "the text is a uid by its form")]
        format!("planned-{number}").parse().expect("a uid")
    };
    planner::plan(&next, &live, &decision.deployment.uid, api.0.time(), &mut mint)
}
