//! Bringing bytes: from the server's registry, with the host's own certificate.
//!
//! What was begun is gone on with: a blob whose stream broke is asked for again from the byte it was
//! at, and what a file holds of one survives the agent. Nothing is used before its digest is right.

pub mod artifact;
pub mod client;
pub mod door;
