//! The registry door.
