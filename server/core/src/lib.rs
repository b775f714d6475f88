//! What the server decides.

pub mod session;
