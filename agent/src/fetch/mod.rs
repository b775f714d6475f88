//! Bringing bytes: from the server's registry, with the host's own certificate.
//!
//! What was begun is gone on with, whatever was interrupted: the link, the registry, the engine or the
//! agent. Nothing is used before its digest is right. What nobody needs any more goes when the disk is
//! short.

pub mod archive;
pub mod artifact;
pub mod bring;
pub mod client;
#[cfg(test)]
pub(crate) mod disk_tests;
pub mod door;
pub mod images;
pub mod keep;
pub mod spool;
#[cfg(test)]
pub(crate) mod testing;
pub mod transfer;
