//! What happens next: everything that is under way, in order of time.

use super::bring::Call;
use super::ledger::Waiter;
use berth_agent_core::diff::Memory;
use berth_agent_core::ledger::HeldSet;
use berth_agent_core::reconcile::{Effect, Input, StepId, Token};
use berth_agent_core::session::Ended;
use berth_proto::agent::{SessionRequest, SessionResponse};
use berth_proto::ids::ReplicaUid;
use berth_server_core::batching::{Batch, Proposal};
use berth_server_core::farewell::Ended as Over;
use berth_server_core::round::Sent;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

/// Furthest moment of an early tick: nothing of an agent or a session waits for longer without being
/// looked at in between.
const EARLY_MS: u64 = 60_000;

/// When a machine that has nothing to do before `due` is to show it, now and then: a moment between the
/// two that no one has planned.
pub(super) fn early(rng: &mut fastrand::Rng, now: u64, due: u64) -> Option<u64> {
    let until = due.min(now + EARLY_MS);
    (until > now + 1 && rng.u8(0..16) == 0).then(|| rng.u64(now + 1..until))
}

/// A life of a process: what was asked by an earlier one is not answered to a later one.
pub(super) type Life = u32;
/// A connection.
pub(super) type LinkId = usize;
/// A machine, by its place in the world.
pub(super) type NodeId = usize;

/// What an agent writes.
#[derive(Debug)]
pub(super) enum Write {
    Set(Box<HeldSet>),
    Memory(Token, BTreeMap<ReplicaUid, Memory>),
}

/// Something under way.
#[derive(Debug)]
pub(super) enum Event {
    /// An entry of the script.
    Script(usize),

    AgentStarts {
        node: NodeId,
    },
    Dial {
        node: NodeId,
        life: Life,
    },
    /// A dial comes to nothing.
    NotReached {
        node: NodeId,
        life: Life,
    },
    /// A dial has reached the server.
    Accept {
        link: LinkId,
    },
    Up {
        link: LinkId,
        message: Box<SessionRequest>,
    },
    Down {
        link: LinkId,
        message: Box<SessionResponse>,
    },
    /// The server sees that the agent has closed.
    UpClosed {
        link: LinkId,
    },
    /// The agent sees that the server has closed.
    DownClosed {
        link: LinkId,
        how: Ended,
    },
    SessionTick {
        node: NodeId,
        life: Life,
    },
    ReconcileTick {
        node: NodeId,
        life: Life,
    },
    /// Time passes, and nothing is due yet.
    EarlySessionTick {
        node: NodeId,
        life: Life,
    },
    EarlyReconcileTick {
        node: NodeId,
        life: Life,
    },
    /// An agent's write reaches the disk.
    Written {
        node: NodeId,
        life: Life,
        write: Write,
    },
    /// An agent hears of its write.
    SetPersisted {
        node: NodeId,
        life: Life,
        result: Result<Box<HeldSet>, String>,
    },
    /// An engine gets a call.
    Call {
        node: NodeId,
        life: Life,
        effect: Box<Effect>,
    },
    /// The agent hears something of engine, disk or programs.
    Tell {
        node: NodeId,
        life: Life,
        input: Box<Input>,
    },
    /// What a transfer has asked for is done, or another part of bringing a replica's bytes.
    Brings {
        node: NodeId,
        life: Life,
        step: StepId,
        call: Box<Call>,
    },
    /// An agent ends what nobody waits for any more.
    FetchStops {
        node: NodeId,
        life: Life,
        step: StepId,
    },
    /// A program that was told to stop has ended, and whoever asked for it hears of it.
    Stopped {
        node: NodeId,
        life: Life,
        stop: Box<Stop>,
    },
    /// A program ends by itself.
    ProgramEnds {
        node: NodeId,
        container: u32,
        start: u32,
    },

    /// A program that did not answer for so long does again.
    SickEnds {
        node: NodeId,
        life: Life,
        container: u32,
        for_ms: u64,
    },

    /// What is not wanted any more is gone by now.
    CheckGone {
        node: NodeId,
        life: Life,
        replica: ReplicaUid,
        since: u64,
    },
    /// An engine is away since so long that its agent says so.
    CheckAway {
        node: NodeId,
        life: Life,
    },
    /// What was so of a host for a while is over.
    FactsChange {
        node: NodeId,
    },

    ServerStarts,
    /// A group reaches the server's disk.
    Commit {
        life: Life,
        token: u64,
        batches: Vec<Batch>,
    },
    /// The ledger hears that it has.
    Committed {
        life: Life,
        token: u64,
    },
    /// The ledger hears that it has not.
    CommitFull {
        life: Life,
        token: u64,
    },
    ServerTick {
        life: Life,
        link: LinkId,
    },
    EarlyServerTick {
        life: Life,
        link: LinkId,
    },
    Plan {
        life: Life,
    },
    /// Plans that were made a moment ago are proposed.
    PlansSent {
        life: Life,
        sent: Vec<Sent>,
    },
    /// The same of what somebody asked for, and of what a session has to keep.
    Sent {
        life: Life,
        waiter: Waiter,
        proposal: Box<Proposal>,
    },
    /// A session hears that it is over.
    Order {
        life: Life,
        link: LinkId,
        why: Over,
    },
    /// An operator tries again.
    Again {
        operation: usize,
    },
}

/// A stop that an engine was asked for.
#[derive(Debug)]
pub(super) struct Stop {
    pub(super) step: StepId,
    pub(super) replica: ReplicaUid,
    pub(super) container: u32,
    /// The start that it ends; `None`: there was nothing to end.
    pub(super) start: Option<u32>,
    /// How long its answer takes beside that.
    pub(super) answer_ms: u64,
}

struct Item {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Item {}

impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Item {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Everything under way.
#[derive(Default)]
pub(super) struct Events {
    heap: BinaryHeap<Item>,
    order: u64,
}

impl Events {
    pub(super) fn push(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.heap.push(Item { at, order: self.order, event });
    }

    /// The next, if it comes by then.
    pub(super) fn pop(&mut self, until: u64) -> Option<(u64, Event)> {
        if self.heap.peek()?.at > until {
            return None;
        }
        self.heap.pop().map(|item| (item.at, item.event))
    }
}
