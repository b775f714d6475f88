//! What sessions need of the rest of the server.

use berth_proto::agent::{OpenReverse, ReplicaReport, SetVerdict, Trust};
use berth_proto::api;
use berth_proto::ids::{HostUid, Now, SetNumber};
use berth_server_core::session::Registration;
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::{mpsc, watch};

/// What the server tells a session from outside.
#[derive(Debug, Clone)]
pub enum Order {
    /// The host was removed.
    Removed {
        /// Containers, artifacts and keys shall go.
        wipe: bool,
    },
    /// Roots or addresses that agents are told have changed.
    Trust(Box<Trust>),
    /// End now.
    End(Ended),
}

pub use berth_server_core::dispatch::Newest;
pub use berth_server_core::farewell::Ended;

/// What a session listens to.
pub struct Lines {
    /// The session's number, unique in this process.
    pub id: u64,
    /// The host's newest set.
    pub sets: watch::Receiver<Newest>,
    /// Tickets for reverse connections.
    pub tickets: mpsc::Receiver<OpenReverse>,
    /// Orders.
    pub orders: mpsc::Receiver<Order>,
}

/// An answer that comes later.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What sessions need of the rest of the server.
#[async_trait::async_trait]
pub trait Desk: Send + Sync + 'static {
    /// The time.
    fn now(&self) -> Now;
    /// A session begins; nothing is known of it but the certificate's host.
    fn open(&self, host: &HostUid) -> Lines;
    /// The agent has introduced itself; older sessions of the host end here. Answers with the host's
    /// newest set once what of it must be durable is: one that was made knowing all of that.
    async fn register(
        &self,
        host: &HostUid,
        session: u64,
        registration: Registration,
    ) -> Result<Newest, Ended>;
    /// Keeps statuses; the answer says whether what must be durable is.
    fn take(
        &self,
        host: &HostUid,
        session: u64,
        sequence: u64,
        reports: Vec<ReplicaReport>,
        absent: Vec<String>,
    ) -> Later<bool>;
    /// The host's facts have changed; the answer says whether what must be durable is.
    async fn facts(&self, host: &HostUid, session: u64, facts: api::HostFacts) -> bool;
    /// A set is durable at the agent; the answer says whether what must be durable of that is.
    async fn acknowledged(
        &self,
        host: &HostUid,
        session: u64,
        number: SetNumber,
        known: Option<BTreeSet<String>>,
    ) -> bool;
    /// A set was refused.
    fn refused(
        &self,
        host: &HostUid,
        session: u64,
        offered: SetNumber,
        held: Option<SetNumber>,
        verdict: SetVerdict,
    );
    /// Roots and endpoints are durable at the agent; the answer says whether that is kept.
    async fn trusts(&self, host: &HostUid, version: u64) -> bool;
    /// The host's clock is so far ahead, in milliseconds.
    fn clock(&self, host: &HostUid, session: u64, offset_ms: i64);
    /// The session is over.
    async fn close(&self, host: &HostUid, session: u64);
}
