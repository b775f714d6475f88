//! The words Berth's parts share: wire messages, stored records and validated values.

#[cfg(feature = "tls")]
pub mod tls;
