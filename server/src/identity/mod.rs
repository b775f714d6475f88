//! Who is who: the cluster's CA, join tokens, renewals, people and what they may do.
//!
//! Decisions are pure functions over records; the records live in the ledger. A request's own names
//! are always replaced.

pub mod ca;
pub mod roles;
pub mod roots;
pub mod tokens;
