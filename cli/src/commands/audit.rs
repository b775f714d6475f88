//! Who changed what.

use super::{ask, connect};
use crate::args::{Audit, Global};
use crate::error::Result;
use crate::output::{moment, print, stamp};
use berth_proto::api::*;
use serde_json::{Value, json};

pub async fn audit(global: &Global, verb: Audit) -> Result<()> {
    let Audit::List { limit } = verb;
    let client = connect(global).await?;
    let mut events = client.events();
    let (mut found, mut page_token) = (Vec::new(), String::new());
    // A filter that hardly anything matches gives short pages that go on.
    while found.len() < limit {
        let room = u32::try_from(limit - found.len()).unwrap_or(u32::MAX);
        let filter = global.filter.clone().unwrap_or_default();
        let request = ListAuditRequest { page_size: room.min(1000), page_token, filter };
        let answer = ask(global, events.list_audit(request)).await?;
        found.extend(answer.entries);
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let rows = found
        .iter()
        .map(|e| {
            vec![
                e.time.as_ref().map(stamp).unwrap_or_default(),
                e.actor.clone(),
                e.method.clone(),
                e.objects.join(", "),
                e.peer.clone(),
                e.request_id.clone(),
                e.revision.to_string(),
            ]
        })
        .collect();
    let value = found
        .iter()
        .map(|e| {
            json!({
                "revision": e.revision, "time": moment(e.time.as_ref()), "actor": e.actor,
                "peer": e.peer, "method": e.method, "requestId": e.request_id,
                "objects": e.objects,
            })
        })
        .collect();
    let heads = ["TIME", "ACTOR", "CALL", "OBJECTS", "PEER", "REQUEST", "REVISION"];
    print(global, &heads, 4, rows, &Value::Array(value))
}
