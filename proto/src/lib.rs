//! The words Berth's parts share: wire messages, stored records and validated values.
//!
//! No other crate defines a wire format. Messages are generated from the `.proto` files beside this
//! crate's sources; [`values`] holds what the rest of the code works with, validated once;
//! between the two stands `convert`. Nothing here waits, reads or writes, but for the feature `tls`, which
//! holds what both ends of a connection must agree on.
#![cfg_attr(test, allow(clippy::wildcard_enum_match_arm, reason = "tests pick one variant out"))]

/// The generated packages, nested as their names are.
#[allow(missing_docs, clippy::all, clippy::wildcard_enum_match_arm, rustdoc::all)]
pub mod berth {
    /// Objects and services for people.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/berth.v1.rs"));
    }
    /// What agents and server say to each other.
    pub mod agent {
        /// The first version.
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/berth.agent.v1.rs"));
        }
    }
    /// What is written to disks.
    pub mod store {
        /// The first version.
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/berth.store.v1.rs"));
        }
    }
}

pub use berth::agent::v1 as agent;
pub use berth::store::v1 as record;
pub use berth::v1 as api;

/// The Open Inference Protocol v2: package `inference`.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

/// All packages with their comments left out, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub mod convert;
pub mod escape;
pub mod farewell;
pub mod filter;
pub mod ids;
pub mod lines;
pub mod manifest;
pub mod quantity;
pub mod selector;
pub mod sets;
pub mod values;
pub mod words;

#[cfg(feature = "tls")]
pub mod tls;
