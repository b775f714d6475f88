//! The services on the control and API door.
//!
//! Handlers convert, ask a pure decision, write through the ledger and answer; they decide nothing
//! themselves. Who may call what stands in one table ([`crate::identity::roles`]) and is checked
//! before a handler runs; a namespace is checked in the handler, which knows it.

pub mod agents;
pub mod auth;
pub mod deployments;
mod foresee;
pub mod hosts;
pub mod lists;
pub mod logs;
pub mod models;
mod passing;
mod roots;
pub mod standing;
mod system;
pub mod users;
pub mod writes;

use crate::cluster::Cluster;
use crate::error::{Error, FieldError};
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
    namespace_at("namespace", text)
}

/// The same, of a field of another name.
fn namespace_at(path: &str, text: &str) -> Result<Namespace, Error> {
    if text.is_empty() {
        return Ok(Namespace::default());
    }
    text.parse().map_err(|e: berth_proto::ids::InvalidId| Error::field(path, e.to_string()))
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
mod apply_tests;
#[cfg(test)]
mod every_call_tests;
#[cfg(test)]
mod field_tests;
#[cfg(test)]
mod guard_tests;
#[cfg(test)]
mod identity_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod release_tests;
#[cfg(test)]
mod root_tests;
#[cfg(test)]
pub mod tests;
