//! Sessions with agents, and the connections that agents open for us to call.

pub mod desk;
pub mod pump;
pub mod reverse;
