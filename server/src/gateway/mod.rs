//! The gateway: inference requests to ready replicas, wherever they are.
//!
//! One stable address for every deployment. Requests are routed by deployment and version, tensors
//! are passed on undecoded and as they come, to the ready replica with the fewest requests
//! outstanding, through the connection its host's agent opened. It never decides what is ready:
//! [`route::Routes`] is told. Servers that do not speak the Open Inference Protocol get plain HTTP
//! ([`through`]).
//!
//! What always holds: nobody is let in without a token or certificate; a request is sent to another
//! replica only when nothing of it was sent, or when it changes nothing and the replica was being
//! stopped or out of reach before one byte of an answer came; every wait has a deadline, every body
//! and what is kept of all bodies a bound.

pub mod body;
pub mod dial;
pub mod forward;
pub mod grpc;
pub mod http;
pub mod names;
pub mod reply;
pub mod route;
pub mod through;

pub use http::ended;

#[cfg(test)]
mod forward_tests;
