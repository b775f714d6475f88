//! What the server decides.

pub mod session;
pub mod takeover;
