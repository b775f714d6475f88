//! What the ledger commits together.
//!
//! One writer. Proposals are checked in memory against the newest *submitted* view and get a revision
//! each, at once and in order; while one group is being made durable the next one gathers; when a
//! group is durable all its proposals are acknowledged and the view is published. A request is one
//! proposal and is never split. Whoever plans reads [`Batching::ahead`], so that nothing is decided
//! twice; everybody else reads what was published.
//!
//! A revision is given once in a life of the machine. What a full disk takes back leaves numbers that
//! somebody may have read: one who decides by such an object would else find its number again on another
//! one. So the next writes wait until empty batches of those numbers are durable, and get theirs then, in
//! order.
//!
//! Two things cannot be forgotten by whoever proposes, because they are done here: a change of a
//! host's replicas raises its generation in the same batch, and events and audit entries get their
//! numbers.

use crate::change::{Change, Encoded};
use crate::objects::Replica;
use crate::view::{ObjectKey, View};
use berth_proto::api::ReplicaIntent;
use berth_proto::ids::{Generation, HostUid, Revision};
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

/// What one revision may hold; a proposal is one revision, so no request can be larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Operations.
    pub ops: usize,
    /// Bytes of their keys and values.
    pub bytes: usize,
}

impl Limits {
    /// What every store takes: an etcd transaction has 128 operations and 1.5 MiB, and this leaves
    /// room to spare. What the server writes by itself is cut to fit.
    pub const ANY: Self = Self { ops: 100, bytes: 1024 * 1024 };
    /// What a journal of our own takes: an apply of 500 deployments, each with a release of a few KiB.
    /// A record of it stays below what the journal reads (4 MiB).
    pub const JOURNAL: Self = Self { ops: 2_000, bytes: 3 * 1024 * 1024 };

    /// Whether that much fits.
    ///
    /// # Errors
    /// [`Refusal::TooLarge`] when it does not.
    pub fn check(self, size: Size) -> Result<(), Refusal> {
        if size.ops > self.ops || size.bytes > self.bytes {
            return Err(Refusal::TooLarge { size, limits: self });
        }
        Ok(())
    }
}

/// How large a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// Operations.
    pub ops: usize,
    /// Bytes of their keys and values.
    pub bytes: usize,
}

impl Size {
    fn of(ops: &[Encoded]) -> Self {
        let bytes = ops.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len)).sum();
        Self { ops: ops.len(), bytes }
    }
}

/// Proposals in one group: bounds how long an acknowledgement can wait for others.
pub const MAX_GROUP: usize = 512;
/// Groups that full disks have taken back and that are remembered: whoever decided from an older one has
/// had his answer long since.
const GONE: usize = 64;
/// Proposals that may wait; beyond that the caller is told to come back.
pub const MAX_WAITING: usize = 8192;

/// What must hold for a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    /// The object was last written at this revision; 0: it is not there.
    At(ObjectKey, Revision),
    /// The object is there.
    Exists(ObjectKey),
    /// Nothing needs this version of the model with this uid.
    Unused(String, String),
    /// It was decided from the view of this revision, and no full disk has taken any of that back. For what
    /// goes by more objects than can be named, as a placement does by all that takes room on its host.
    Standing(Revision),
}

impl Precondition {
    /// Whether it holds in a view; of what a full disk took back no view knows.
    ///
    /// # Errors
    /// [`Refusal::Conflict`] when it does not.
    pub fn check(&self, view: &View) -> Result<(), Refusal> {
        let (object, expected) = match self {
            // Known to the machine alone.
            Self::Standing(_) => return Ok(()),
            Self::At(object, expected) => (object.clone(), *expected),
            Self::Exists(object) => (object.clone(), Revision(0)),
            Self::Unused(model, version) => {
                (ObjectKey::Version(model.clone(), version.clone()), Revision(0))
            }
        };
        let found = view.revision_of(&object);
        let holds = match self {
            Self::Standing(_) => true,
            Self::At(..) => found == expected,
            Self::Exists(_) => found != Revision(0),
            Self::Unused(model, version) => view.user_of_version(model, version).is_none(),
        };
        if holds { Ok(()) } else { Err(Refusal::Conflict { object, expected, found }) }
    }
}

/// Changes that belong together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Proposal {
    /// All must hold.
    pub preconditions: Vec<Precondition>,
    /// What to change.
    pub changes: Vec<Change>,
}

impl Proposal {
    /// How large it is; the batching machine adds an operation for each host whose set it changes.
    #[must_use]
    pub fn size(&self) -> Size {
        Size::of(&self.changes.iter().map(Change::encode).collect::<Vec<_>>())
    }
}

/// Why a proposal was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An object is not as expected.
    #[error("{object:?} is at revision {found}, not {expected}")]
    Conflict {
        /// Which.
        object: ObjectKey,
        /// What was expected.
        expected: Revision,
        /// What is.
        found: Revision,
    },
    /// What it was decided from has been taken back by a full disk.
    #[error("what it was decided from was taken back: the disk was full")]
    TakenBack,
    /// More than one commit can hold.
    #[error(
        "the change has {} operations and {} bytes; at most {} and {} fit",
        size.ops, size.bytes, limits.ops, limits.bytes
    )]
    TooLarge {
        /// What it has.
        size: Size,
        /// What fits.
        limits: Limits,
    },
    /// Too many wait.
    #[error("too many writes are waiting")]
    Busy,
    /// It took too long, and may be done yet.
    #[error("the write takes too long; whether it will be done is not known")]
    Unsure,
    /// The store has failed; the process stops.
    #[error("the store has failed")]
    Failed,
    /// The disk is full; this one was not written.
    #[error("the disk is full")]
    Full,
}

/// One revision's operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The revision.
    pub revision: Revision,
    /// What to write.
    pub ops: Vec<Encoded>,
}

/// What comes out.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Make these durable, in order; answer with [`Batching::persisted`] or [`Batching::failed`].
    Persist {
        /// Names the group.
        token: u64,
        /// The group.
        batches: Vec<Batch>,
    },
    /// A proposal is durable.
    Acknowledge {
        /// Whose.
        id: u64,
        /// At which revision.
        revision: Revision,
    },
    /// A proposal was not taken.
    Reject {
        /// Whose.
        id: u64,
        /// Why.
        why: Refusal,
    },
    /// This view is durable; readers get it. The changes are those since the view before.
    Publish {
        /// The view.
        view: Box<View>,
        /// What has changed, in order.
        changes: Vec<(Revision, Change)>,
    },
}

#[derive(Debug)]
struct Group {
    token: u64,
    ids: Vec<(u64, Revision)>,
    changes: Vec<(Revision, Change)>,
    view: View,
}

/// The machine.
#[derive(Debug)]
pub struct Batching {
    limits: Limits,
    ahead: View,
    durable: View,
    in_flight: Option<Group>,
    waiting_ids: Vec<(u64, Revision)>,
    waiting: Vec<Batch>,
    waiting_changes: Vec<(Revision, Change)>,
    token: u64,
    failed: bool,
    /// Up to here revisions were given to what a full disk has taken back. The views of these are gone, and
    /// the first one that is none of them comes after.
    taken_back: Option<Revision>,
    /// What was taken back of late: after the first revision, up to the second one. The newest last.
    gone: VecDeque<(Revision, Revision)>,
    /// Wait until those are durable as empty ones.
    held: Vec<(u64, Proposal)>,
}

impl Batching {
    /// A machine that goes on from a loaded view and keeps within what the store takes.
    #[must_use]
    pub fn new(view: View, limits: Limits) -> Self {
        Self {
            limits,
            ahead: view.clone(),
            durable: view,
            in_flight: None,
            waiting_ids: Vec::new(),
            waiting: Vec::new(),
            waiting_changes: Vec::new(),
            token: 0,
            failed: false,
            taken_back: None,
            gone: VecDeque::new(),
            held: Vec::new(),
        }
    }

    /// The newest submitted view, not yet durable: for planning.
    #[must_use]
    pub fn ahead(&self) -> &View {
        &self.ahead
    }

    /// The newest durable view.
    #[must_use]
    pub fn durable(&self) -> &View {
        &self.durable
    }

    /// Takes in a proposal.
    pub fn propose(&mut self, id: u64, proposal: Proposal) -> Vec<Effect> {
        let reject = |why| vec![Effect::Reject { id, why }];
        if self.failed {
            return reject(Refusal::Failed);
        }
        if self.waiting.len() + self.held.len() >= MAX_WAITING {
            return reject(Refusal::Busy);
        }
        if let Some(until) = self.taken_back {
            self.held.push((id, proposal));
            return self.pass(until);
        }
        if let Err(why) = self.check(&proposal.preconditions) {
            return reject(why);
        }
        if proposal.changes.is_empty() {
            // Nothing to write: true as soon as what it was checked against is durable.
            return self.empty(id);
        }
        let revision = self.ahead.revision.next();
        let mut next = self.ahead.clone();
        let changes = prepare(&mut next, proposal.changes, revision);
        let ops: Vec<Encoded> = changes.iter().map(Change::encode).collect();
        if let Err(why) = self.limits.check(Size::of(&ops)) {
            return reject(why);
        }
        self.ahead = next;
        self.waiting_ids.push((id, revision));
        self.waiting.push(Batch { revision, ops });
        self.waiting_changes.extend(changes.into_iter().map(|change| (revision, change)));
        if bug!(WriteAcknowledgedUndurable) {
            let mut out = vec![Effect::Acknowledge { id, revision }];
            self.waiting_ids.retain(|(waiting, _)| *waiting != id);
            out.extend(self.launch());
            return out;
        }
        self.launch()
    }

    fn empty(&mut self, id: u64) -> Vec<Effect> {
        let revision = self.ahead.revision;
        if self.waiting.is_empty() && self.in_flight.is_none() {
            return vec![Effect::Acknowledge { id, revision }];
        }
        if self.waiting.is_empty() {
            if let Some(group) = &mut self.in_flight {
                group.ids.push((id, revision));
            }
        } else {
            self.waiting_ids.push((id, revision));
        }
        Vec::new()
    }

    fn check(&self, preconditions: &[Precondition]) -> Result<(), Refusal> {
        if bug!(PreconditionsUnasked) {
            return Ok(());
        }
        preconditions.iter().try_for_each(|one| match one {
            Precondition::Standing(seen)
                if self.gone.iter().any(|(after, until)| after < seen && seen <= until) =>
            {
                Err(Refusal::TakenBack)
            }
            Precondition::Standing(_)
            | Precondition::At(..)
            | Precondition::Exists(_)
            | Precondition::Unused(..) => one.check(&self.ahead),
        })
    }

    fn launch(&mut self) -> Vec<Effect> {
        if self.in_flight.is_some() || self.waiting.is_empty() {
            return Vec::new();
        }
        // A group is everything that waits, cut at its bound; what was cut makes the next one.
        let cut = self.waiting.len().min(bound!(MAX_GROUP, 3));
        let rest = self.waiting.split_off(cut);
        let batches = std::mem::replace(&mut self.waiting, rest);
        let last = batches.last().map(|b| b.revision).unwrap_or_default();
        let (ids, rest) = std::mem::take(&mut self.waiting_ids)
            .into_iter()
            .partition(|(_, revision)| *revision <= last);
        self.waiting_ids = rest;
        let (changes, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting_changes)
            .into_iter()
            .partition(|(revision, _)| *revision <= last);
        self.waiting_changes = rest;
        let view = if self.waiting.is_empty() {
            self.ahead.clone()
        } else {
            let mut view = self.durable.clone();
            for (revision, change) in &changes {
                view.apply(change, *revision);
            }
            view
        };
        self.token += 1;
        self.in_flight = Some(Group { token: self.token, ids, changes, view });
        vec![Effect::Persist { token: self.token, batches }]
    }

    /// Makes the next of the numbers that were taken back durable with nothing in them.
    fn pass(&mut self, until: Revision) -> Vec<Effect> {
        if self.in_flight.is_some() {
            return Vec::new();
        }
        let first = self.durable.revision.next();
        let last = until.0.min(self.durable.revision.0 + bound!(MAX_GROUP, 3) as u64);
        let empty = |n| Batch { revision: Revision(n), ops: Vec::new() };
        let batches: Vec<Batch> = (first.0..=last).map(empty).collect();
        let mut view = self.durable.clone();
        view.revision = Revision(last);
        self.token += 1;
        let (ids, changes) = (Vec::new(), Vec::new());
        self.in_flight = Some(Group { token: self.token, ids, changes, view });
        vec![Effect::Persist { token: self.token, batches }]
    }

    /// A group is durable.
    pub fn persisted(&mut self, token: u64) -> Vec<Effect> {
        let mut out = Vec::new();
        let Some(group) = self.in_flight.take_if(|group| group.token == token) else {
            return out;
        };
        self.durable = group.view;
        // Readers first: whoever is acknowledged finds what it wrote.
        out.push(Effect::Publish { view: Box::new(self.durable.clone()), changes: group.changes });
        out.extend(
            group.ids.into_iter().map(|(id, revision)| Effect::Acknowledge { id, revision }),
        );
        match self.taken_back {
            Some(until) if self.durable.revision < until => out.extend(self.pass(until)),
            Some(_) => {
                self.taken_back = None;
                self.ahead = self.durable.clone();
                for (id, proposal) in std::mem::take(&mut self.held) {
                    out.extend(self.propose(id, proposal));
                }
            }
            None => out.extend(self.launch()),
        }
        out
    }

    /// A group was not written, and nothing of it: the disk is full. What was submitted is taken
    /// back, the writers are told, and the machine goes on.
    pub fn full(&mut self, token: u64) -> Vec<Effect> {
        let Some(group) = self.in_flight.take_if(|group| group.token == token) else {
            return Vec::new();
        };
        if !bug!(FullDiskForgotten) {
            if self.ahead.revision > self.durable.revision {
                self.gone.push_back((self.durable.revision, self.ahead.revision));
                if self.gone.len() > GONE {
                    self.gone.pop_front();
                }
                // A view of the last one's number would be another than the one that is gone.
                self.taken_back = self.taken_back.max(Some(self.ahead.revision.next()));
            }
            self.ahead = self.durable.clone();
        }
        let ids = group.ids.into_iter().chain(std::mem::take(&mut self.waiting_ids));
        let ids = ids.map(|(id, _)| id).chain(self.held.drain(..).map(|(id, _)| id));
        let out = ids.map(|id| Effect::Reject { id, why: Refusal::Full }).collect();
        self.waiting.clear();
        self.waiting_changes.clear();
        out
    }

    /// The store has failed: nothing more is taken, nobody is acknowledged.
    pub fn failed(&mut self) -> Vec<Effect> {
        self.failed = true;
        let in_flight = self.in_flight.take().map(|group| group.ids).unwrap_or_default();
        let ids = in_flight.into_iter().chain(std::mem::take(&mut self.waiting_ids));
        let ids = ids.map(|(id, _)| id).chain(self.held.drain(..).map(|(id, _)| id));
        let out = ids.map(|id| Effect::Reject { id, why: Refusal::Failed }).collect();
        self.waiting.clear();
        self.waiting_changes.clear();
        out
    }
}

/// Numbers events, audit entries and moves of aliases, raises the generations of hosts whose set changes, and applies.
fn prepare(view: &mut View, changes: Vec<Change>, revision: Revision) -> Vec<Change> {
    let mut out = Vec::with_capacity(changes.len() + 1);
    let mut touched: BTreeSet<HostUid> = BTreeSet::new();
    for mut change in changes {
        match &mut change {
            Change::AppendEvent(event) => event.sequence = view.next_event.max(1),
            Change::AppendAudit(audit) => audit.revision = revision.0,
            Change::AppendAliasMove(moved) => moved.revision = revision.0,
            Change::PutReplica(replica) => {
                let old = view.replica(&replica.uid);
                // An orphan keeps its host from getting sets: that changes with it.
                let orphan = |r: &Arc<Replica>| r.intent == ReplicaIntent::Orphan;
                let changed = old.and_then(|old| old.set_entry()) != replica.set_entry()
                    || old.is_some_and(orphan) != orphan(replica);
                let lost = bug!(GenerationNotRaised) && replica.intent == ReplicaIntent::Stop;
                if changed && !lost {
                    touched.insert(replica.host.clone());
                }
                if let Some(old) = old
                    && old.host != replica.host
                {
                    touched.insert(old.host.clone());
                }
            }
            Change::DeleteReplica(uid) => {
                if let Some(old) = view.replica(uid)
                    && (old.set_entry().is_some() || old.intent == ReplicaIntent::Orphan)
                {
                    touched.insert(old.host.clone());
                }
            }
            Change::PutCluster(_)
            | Change::PutDeployment(_)
            | Change::DeleteDeployment(_)
            | Change::PutRelease(_)
            | Change::DeleteRelease(..)
            | Change::PutHost(_)
            | Change::SetGeneration(..)
            | Change::PutModel(_)
            | Change::PutVersion(_)
            | Change::DeleteVersion(..)
            | Change::PutJoinToken(_)
            | Change::DeleteJoinToken(_)
            | Change::PutUser(_)
            | Change::PutUserToken(_)
            | Change::DeleteUserToken(_)
            | Change::PutRequest(_)
            | Change::DeleteRequest(_)
            | Change::DeleteEvent(_)
            | Change::DeleteAudit(_) => {}
        }
        view.apply(&change, revision);
        out.push(change);
    }
    for host in touched {
        let generation = Generation(view.generation(&host).0 + 1);
        let change = Change::SetGeneration(host, generation);
        view.apply(&change, revision);
        out.push(change);
    }
    out
}

#[cfg(test)]
#[path = "batching_tests.rs"]
mod tests;
