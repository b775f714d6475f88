//! The services on the control and API door.
//!
//! Handlers convert, ask a pure decision, write through the ledger and answer; they decide nothing
//! themselves. Who may call what stands in one table ([`crate::identity::roles`]) and is checked
//! before a handler runs; a namespace is checked in the handler, which knows it.

pub mod agents;
pub mod auth;
pub mod deployments;
pub mod hosts;
pub mod logs;
pub mod models;
pub mod users;

use crate::cluster::Cluster;
use crate::error::{Error, FieldError};
use berth_proto::api;
use berth_proto::convert::Problems;
use berth_proto::ids::Namespace;
use berth_server_core::change::Change;
use std::sync::Arc;

/// What every service holds.
#[derive(Clone)]
pub struct Api(pub Arc<Cluster>);

impl From<Problems> for Error {
    fn from(problems: Problems) -> Self {
        Self::Invalid(
            problems
                .0
                .into_iter()
                .map(|p| FieldError {
                    path: p.path,
                    message: match p.hint {
                        Some(hint) => format!("{} ({hint})", p.message),
                        None => p.message,
                    },
                })
                .collect(),
        )
    }
}

/// The namespace asked for, `default` when empty.
fn namespace(text: &str) -> Result<Namespace, Error> {
    if text.is_empty() {
        return Ok(Namespace::default());
    }
    text.parse().map_err(|e: berth_proto::ids::InvalidId| Error::field("namespace", e.to_string()))
}

/// A page of a list that is in order: items from an offset that the token names.
fn page<T>(all: Vec<T>, page: Option<&api::Page>) -> Result<(Vec<T>, String), Error> {
    let page = page.cloned().unwrap_or_default();
    let size = match page.page_size {
        0 => 100,
        n => n.min(1000) as usize,
    };
    let from: usize = if page.page_token.is_empty() {
        0
    } else {
        page.page_token
            .parse()
            .map_err(|_| Error::field("page.page_token", "is not one this server gave"))?
    };
    let total = all.len();
    let items: Vec<T> = all.into_iter().skip(from).take(size).collect();
    let next = from + items.len();
    let token = if next < total { next.to_string() } else { String::new() };
    Ok((items, token))
}

/// An audit entry for a call.
fn audit(caller: &auth::Caller, method: &str, request_id: &str, objects: Vec<String>) -> Change {
    Change::AppendAudit(berth_proto::record::AuditRecord {
        revision: 0,
        time: Some(berth_proto::convert::timestamp(crate::cluster::wall_now())),
        actor: caller.subject.clone(),
        peer: caller.peer.clone(),
        method: method.to_owned(),
        request_id: request_id.to_owned(),
        objects,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_join_to_the_whole_list() {
        let mut token = String::new();
        let mut seen = Vec::new();
        loop {
            let asked = api::Page { page_size: 3, page_token: token, filter: String::new() };
            let (items, next) = page((0..10).collect(), Some(&asked)).unwrap();
            seen.extend(items);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
        let bad = api::Page { page_token: "x".into(), ..Default::default() };
        assert!(page(vec![1], Some(&bad)).is_err());
    }
}
