//! The gateway: inference requests to ready replicas, wherever they are.
//!
//! One stable address for every deployment. Requests are routed by deployment and version, tensors
//! are passed on undecoded, to the ready replica with the fewest requests outstanding, through the
//! connection its host's agent opened. It never decides what is ready: [`route::Routes`] is told.
//!
//! What always holds: a request is sent to another replica only when nothing of it was sent, or when
//! the replica was being stopped and answered not one byte; every wait has a deadline; a body has a
//! bound.

pub mod dial;
pub mod forward;
pub mod grpc;
pub mod http;
pub mod route;
