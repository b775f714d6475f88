//! The last word of a session: the gRPC status it ends with, which both ends must read alike.

/// Why the server ends a session, as the agent has to act on it. The number of each is gRPC's own, of
/// the status code that says it
/// (<https://github.com/grpc/grpc/blob/master/doc/statuscodes.md>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// The agent broke the protocol: `INVALID_ARGUMENT`.
    Invalid = 3,
    /// The host may have no session, until a person changes that: `PERMISSION_DENIED`.
    Denied = 7,
    /// Another session of the host has its place: `FAILED_PRECONDITION`.
    Superseded = 9,
    /// The next dial may succeed: `UNAVAILABLE`.
    Again = 14,
}

impl Farewell {
    /// gRPC's number of the status code.
    #[must_use]
    pub const fn code(self) -> i32 {
        self as i32
    }
}

/// gRPC's number of `UNKNOWN`: what the transport makes of a connection that broke.
pub const UNKNOWN: i32 = 2;
