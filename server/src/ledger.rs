//! The one writer: pumps the batching machine with a store on a thread of its own.
//!
//! Reads come from an immutable view and never wait. What is acknowledged is durable. A store that
//! fails (other than by a full disk) stops the process: going on would promise what cannot be kept.

use crate::error::{Error, Kind};
use crate::store::{Entry, Store, StoreError};
use arc_swap::ArcSwap;
use berth_proto::ids::Revision;
use berth_proto::quantity::human_bytes;
use berth_server_core::batching::{Batch, Batching, Effect, Limits, Proposal, Refusal, Size};
use berth_server_core::change::Change;
use berth_server_core::view::{ObjectKey, View};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// Proposals handed to the writer's thread and not yet taken.
const QUEUE: usize = 4096;
/// Changes that a slow watcher may fall behind before it has to list again; a power of two, to which
/// the channel would raise it.
const BEHIND: usize = 16_384;
/// Proposals gathered into one group at most.
const GATHER: usize = 512;
/// How long a write may take, its wait for the queue included: a disk that needs longer has failed.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
/// How much of that is spent waiting for room in the queue; whoever finds none has written nothing.
const QUEUE_DEADLINE: Duration = Duration::from_secs(10);

enum Job {
    Propose(Proposal, oneshot::Sender<Result<Revision, Refusal>>),
    Checkpoint(oneshot::Sender<()>),
    Read(Reading, oneshot::Sender<Result<Vec<Entry>, StoreError>>),
    Snapshot(oneshot::Sender<Result<(Revision, Vec<Entry>), StoreError>>),
    Beyond { prefix: &'static str, keep: usize, limit: usize, reply: Keys },
}

type Keys = oneshot::Sender<Result<Vec<Vec<u8>>, StoreError>>;

/// Why what the view does not hold could not be read. Not that there is nothing.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// The ledger's thread did not come to it, or has ended.
    #[error("the ledger does not answer")]
    NoAnswer,
    /// The store said no.
    #[error("the ledger cannot be read")]
    Store(#[from] StoreError),
}

impl From<Unread> for Error {
    fn from(why: Unread) -> Self {
        Self::unavailable("LEDGER_UNREAD", crate::error::Chain(&why).to_string())
    }
}

/// What is read of kinds that the view does not hold.
struct Reading {
    prefix: String,
    below: Option<String>,
    limit: usize,
}

/// The ledger.
#[derive(Clone)]
pub struct Ledger {
    limits: Limits,
    jobs: mpsc::Sender<Job>,
    durable: Arc<ArcSwap<View>>,
    ahead: Arc<ArcSwap<View>>,
    published: watch::Receiver<Revision>,
    changes: broadcast::Sender<(Revision, Change)>,
    failed: watch::Receiver<bool>,
    full: watch::Receiver<bool>,
}

impl Ledger {
    /// Starts the writer over a store and the view loaded from it.
    #[must_use]
    pub fn start(store: Box<dyn Store>, view: View) -> Self {
        let (ledger, writer, jobs) = Self::parts(store, view);
        let thread = std::thread::Builder::new().name("ledger".to_owned());
        if let Err(error) = thread.spawn(move || writer.run(jobs)) {
            tracing::error!(%error, "the ledger's thread cannot be started");
        }
        ledger
    }

    fn parts(store: Box<dyn Store>, view: View) -> (Self, Writer, mpsc::Receiver<Job>) {
        let (jobs, rx) = mpsc::channel(QUEUE);
        let durable = Arc::new(ArcSwap::from_pointee(view.clone()));
        let ahead = Arc::new(ArcSwap::from_pointee(view.clone()));
        let (published_tx, published) = watch::channel(view.revision);
        let (changes, _) = broadcast::channel(BEHIND);
        let (failed_tx, failed) = watch::channel(false);
        let (full_tx, full) = watch::channel(false);
        let limits = store.limits();
        let writer = Writer {
            machine: Batching::new(view, limits),
            store,
            replies: HashMap::new(),
            next: 0,
            unseen: false,
            durable: Arc::clone(&durable),
            ahead: Arc::clone(&ahead),
            published: published_tx,
            changes: changes.clone(),
            failed: failed_tx,
            full: full_tx,
        };
        let ledger = Self { limits, jobs, durable, ahead, published, changes, failed, full };
        (ledger, writer, rx)
    }

    /// The newest durable view.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        self.durable.load_full()
    }

    /// The newest submitted view, for planning.
    #[must_use]
    pub fn ahead(&self) -> Arc<View> {
        self.ahead.load_full()
    }

    /// Tells when a newer view is durable.
    #[must_use]
    pub fn published(&self) -> watch::Receiver<Revision> {
        self.published.clone()
    }

    /// All changes from now on, in order.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<(Revision, Change)> {
        self.changes.subscribe()
    }

    /// Becomes true when the store has failed and the process must stop.
    #[must_use]
    pub fn failed(&self) -> watch::Receiver<bool> {
        self.failed.clone()
    }

    /// Whether the newest write was refused because the disk is full.
    #[must_use]
    pub fn full(&self) -> watch::Receiver<bool> {
        self.full.clone()
    }

    /// Whether a proposal is small enough for one write, for what is checked and not written.
    ///
    /// # Errors
    /// [`Refusal::TooLarge`] when it is not.
    pub fn fits(&self, proposal: &Proposal) -> Result<(), Refusal> {
        self.limits.check(proposal.size())
    }

    /// Writes; answers when it is durable.
    ///
    /// # Errors
    /// The refusal; nothing was written then, or with [`Refusal::Unsure`] it may have been.
    pub async fn propose(&self, proposal: Proposal) -> Result<Revision, Refusal> {
        let (tx, rx) = oneshot::channel();
        match self.ask(Job::Propose(proposal, tx), rx).await {
            Ok(result) => result,
            Err(Unasked::Busy) => Err(Refusal::Busy),
            Err(Unasked::Ended) => Err(Refusal::Failed),
            Err(Unasked::Late) => Err(Refusal::Unsure),
        }
    }

    /// Has the writer's thread do something, within what a write may take.
    async fn ask<T>(&self, job: Job, answer: oneshot::Receiver<T>) -> Result<T, Unasked> {
        let end = tokio::time::Instant::now() + WRITE_DEADLINE;
        match tokio::time::timeout(QUEUE_DEADLINE, self.jobs.send(job)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Unasked::Ended),
            Err(_) => return Err(Unasked::Busy),
        }
        match tokio::time::timeout_at(end, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Unasked::Ended),
            Err(_) => Err(Unasked::Late),
        }
    }

    /// All entries under a prefix that the view does not hold and that is short by its nature (the
    /// moves of one model's aliases), in order of keys.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn entries(&self, prefix: &str) -> Result<Vec<Entry>, Unread> {
        let mut all = self.newest(prefix, None, usize::MAX).await?;
        all.reverse();
        Ok(all)
    }

    /// The last entries under a prefix that the view does not hold (events, audit), from the last to
    /// the first: those before `below`, at most `limit`. The writer's thread reads them, so a long
    /// list is read in pieces.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn newest(
        &self,
        prefix: &str,
        below: Option<String>,
        limit: usize,
    ) -> Result<Vec<Entry>, Unread> {
        let (tx, rx) = oneshot::channel();
        let reading = Reading { prefix: prefix.to_owned(), below, limit };
        Ok(self.ask(Job::Read(reading, tx), rx).await??)
    }

    /// Keys under a prefix beyond the newest `keep`, the oldest first, at most `limit`.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn beyond(
        &self,
        prefix: &'static str,
        keep: usize,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, Unread> {
        let (reply, rx) = oneshot::channel();
        Ok(self.ask(Job::Beyond { prefix, keep, limit, reply }, rx).await??)
    }

    /// Everything that is durable, and as of which revision.
    ///
    /// # Errors
    /// When it cannot be read, or the ledger has ended.
    pub async fn snapshot(&self) -> Result<(Revision, Vec<crate::store::Entry>), StoreError> {
        let ended = || StoreError::Materialised("the ledger does not answer".to_owned());
        let (tx, rx) = oneshot::channel();
        self.ask(Job::Snapshot(tx), rx).await.map_err(|_| ended())?
    }

    /// Writes a checkpoint, before a clean end.
    pub async fn checkpoint(&self) {
        let (tx, rx) = oneshot::channel();
        if self.ask(Job::Checkpoint(tx), rx).await.is_err() {
            tracing::warn!(
                "the ledger wrote no checkpoint; the next start reads more of its journal"
            );
        }
    }
}

/// Why the writer's thread gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unasked {
    /// It was not asked: too many wait.
    Busy,
    /// It has ended.
    Ended,
    /// It was asked, and may do it yet.
    Late,
}

impl From<Unasked> for Unread {
    fn from(_: Unasked) -> Self {
        Self::NoAnswer
    }
}

struct Writer {
    machine: Batching,
    store: Box<dyn Store>,
    replies: HashMap<u64, oneshot::Sender<Result<Revision, Refusal>>>,
    next: u64,
    /// The machine has a view that `ahead` does not show yet.
    unseen: bool,
    durable: Arc<ArcSwap<View>>,
    ahead: Arc<ArcSwap<View>>,
    published: watch::Sender<Revision>,
    changes: broadcast::Sender<(Revision, Change)>,
    failed: watch::Sender<bool>,
    full: watch::Sender<bool>,
}

impl Writer {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            let mut persist = Vec::new();
            self.take(job, &mut persist);
            for _ in 0..GATHER {
                match jobs.try_recv() {
                    Ok(job) => self.take(job, &mut persist),
                    Err(_) => break,
                }
            }
            self.show_ahead();
            // Each group's end may begin the next one.
            while let Some((token, batches)) = persist.pop() {
                self.write(token, &batches, &mut persist);
            }
        }
        if let Err(error) = self.store.checkpoint() {
            tracing::warn!(error = %crate::error::Chain(&error), "the last checkpoint failed");
        }
    }

    fn take(&mut self, job: Job, persist: &mut Vec<(u64, Vec<Batch>)>) {
        match job {
            Job::Propose(proposal, reply) => {
                self.next += 1;
                self.replies.insert(self.next, reply);
                let before = self.machine.ahead().revision;
                let effects = self.machine.propose(self.next, proposal);
                if self.machine.ahead().revision != before {
                    self.unseen = true;
                }
                self.carry_out(effects, persist);
            }
            Job::Checkpoint(done) => {
                if let Err(error) = self.store.checkpoint() {
                    tracing::warn!(error = %crate::error::Chain(&error), "a checkpoint failed");
                }
                let _ = done.send(());
            }
            Job::Snapshot(reply) => {
                let entries = self.store.load(b"");
                let _ = reply.send(entries.map(|entries| (self.store.revision(), entries)));
            }
            Job::Read(Reading { prefix, below, limit }, reply) => {
                let below = below.as_deref().map(str::as_bytes);
                let found = self.store.newest(prefix.as_bytes(), below, limit);
                let _ = reply.send(found);
            }
            Job::Beyond { prefix, keep, limit, reply } => {
                let found = self.store.beyond(prefix.as_bytes(), keep, limit);
                let _ = reply.send(found);
            }
        }
    }

    fn write(&mut self, token: u64, batches: &[Batch], persist: &mut Vec<(u64, Vec<Batch>)>) {
        let before = self.machine.ahead().revision;
        let effects = match self.store.commit(batches) {
            Ok(()) => {
                // Empty revisions find room where nothing else does.
                let filled = batches.iter().any(|batch| !batch.ops.is_empty());
                if filled && self.full.send_if_modified(std::mem::take) {
                    tracing::info!("the disk has room again; writes are taken");
                }
                self.machine.persisted(token)
            }
            Err(StoreError::Full) => {
                // Once, not with every write that is tried.
                if self.full.send_if_modified(|full| !std::mem::replace(full, true)) {
                    tracing::error!("the disk is full; writes are refused until there is room");
                }
                self.unseen = true;
                self.machine.full(token)
            }
            Err(error) => {
                tracing::error!(error = %crate::error::Chain(&error), "the store has failed; stopping");
                let effects = self.machine.failed();
                self.failed.send_replace(true);
                effects
            }
        };
        // What had to wait may have been taken in.
        self.unseen |= self.machine.ahead().revision != before;
        self.carry_out(effects, persist);
        self.show_ahead();
    }

    fn carry_out(&mut self, effects: Vec<Effect>, persist: &mut Vec<(u64, Vec<Batch>)>) {
        for effect in effects {
            match effect {
                Effect::Persist { token, batches } => persist.push((token, batches)),
                Effect::Acknowledge { id, revision } => self.reply(id, Ok(revision)),
                Effect::Reject { id, why } => {
                    // First what it lost to: whoever plans anew at once must find that.
                    self.show_ahead();
                    self.reply(id, Err(why));
                }
                Effect::Publish { view, changes } => {
                    let revision = view.revision;
                    self.durable.store(Arc::new(*view));
                    for change in changes {
                        // Nobody listening is no error.
                        let _ = self.changes.send(change);
                    }
                    self.published.send_replace(revision);
                }
            }
        }
    }

    /// Stores the newest submitted view where planning reads it.
    fn show_ahead(&mut self) {
        if std::mem::take(&mut self.unseen) {
            self.ahead.store(Arc::new(self.machine.ahead().clone()));
        }
    }

    fn reply(&mut self, id: u64, result: Result<Revision, Refusal>) {
        if let Some(reply) = self.replies.remove(&id) {
            let _ = reply.send(result);
        }
    }
}

/// A refusal as callers are told. `kind` and `name` say what they were writing.
#[must_use]
pub fn refused(refusal: Refusal, kind: Kind, name: &str) -> Error {
    match refusal {
        Refusal::Conflict { object, expected, found } => match (object, expected, found) {
            (ObjectKey::Request(_), _, _) => Error::unavailable(
                "REQUEST_RUNNING",
                "the same request is being carried out; ask again",
            ),
            (_, Revision(0), Revision(0)) => Error::not_found(kind, name),
            (_, Revision(0), _) => {
                Error::Exists { kind, name: name.to_owned(), hint: String::new() }
            }
            (_, expected, found) => Error::RevisionMismatch {
                kind,
                name: name.to_owned(),
                expected: expected.0,
                found: found.0,
            },
        },
        Refusal::TooLarge { size, limits } => Error::field("", too_large(size, limits)),
        Refusal::Busy => Error::unavailable("LEDGER_BUSY", "too many writes are waiting"),
        Refusal::TakenBack => Error::unavailable(
            "LEDGER_BUSY",
            "the server's disk was full meanwhile, and what this was decided from is gone",
        ),
        Refusal::Full => Error::Exhausted {
            reason: "DISK_FULL",
            message: "the server's disk is full; nothing was written, free some space".to_owned(),
        },
        Refusal::Failed => Error::unavailable("LEDGER_FAILED", "the server's store has failed"),
        Refusal::Unsure => Error::unavailable(
            "WRITE_UNSURE",
            "the server's disk is slow; whether this was written is not known, ask again",
        ),
    }
}

/// A request that no single write can hold, in words.
#[must_use]
pub fn too_large(size: Size, limits: Limits) -> String {
    format!(
        "this is too large for one write, which is all or nothing: it takes {} operations and {}, \
         and at most {} and {} fit; nothing was written",
        size.ops,
        human_bytes(size.bytes as u64),
        limits.ops,
        human_bytes(limits.bytes as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::Memory;
    use berth_proto::record::{Meta, UserRecord};
    use berth_server_core::batching::Precondition;
    use berth_server_core::view::ObjectKey;

    fn user(name: &str) -> Change {
        let meta = Meta { uid: name.into(), name: name.into(), ..Meta::default() };
        Change::PutUser(Arc::new(UserRecord { meta: Some(meta), ..UserRecord::default() }))
    }

    #[test]
    fn whoever_loses_finds_what_it_lost_to_among_what_was_submitted() {
        let (ledger, mut writer, _jobs) =
            Ledger::parts(Box::new(Memory::default()), View::default());
        let key = ObjectKey::UserName("ada".to_owned());
        let make = Proposal {
            preconditions: vec![Precondition::At(key, Revision(0))],
            changes: vec![user("ada")],
        };
        let mut persist = Vec::new();
        let mut answers = Vec::new();
        for _ in 0..2 {
            let (tx, rx) = oneshot::channel();
            writer.take(Job::Propose(make.clone(), tx), &mut persist);
            answers.push(rx);
        }
        let lost = answers.pop().unwrap().try_recv().unwrap();
        assert!(matches!(lost, Err(Refusal::Conflict { .. })));
        assert!(ledger.ahead().user("ada").is_some(), "told of a conflict with what it cannot see");
        assert!(ledger.view().user("ada").is_none(), "nothing is durable yet");
    }

    #[tokio::test(start_paused = true)]
    async fn a_writer_that_comes_to_nothing_holds_nobody_up_for_long() {
        let (ledger, _writer, _jobs) = Ledger::parts(Box::new(Memory::default()), View::default());
        let begun = tokio::time::Instant::now();
        let unsure = ledger.propose(Proposal::default()).await;
        assert_eq!(unsure, Err(Refusal::Unsure), "it is in the queue and may be done yet");
        assert_eq!(begun.elapsed(), WRITE_DEADLINE);
        while ledger.jobs.try_send(Job::Checkpoint(oneshot::channel().0)).is_ok() {}
        let begun = tokio::time::Instant::now();
        assert_eq!(ledger.propose(Proposal::default()).await, Err(Refusal::Busy));
        assert_eq!(begun.elapsed(), QUEUE_DEADLINE);
        assert!(ledger.newest("audit/", None, 1).await.is_err());
        ledger.checkpoint().await;
        assert_eq!(begun.elapsed(), 3 * QUEUE_DEADLINE);
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_read_is_not_an_empty_one() {
        let (ledger, _, _) = Ledger::parts(Box::new(Memory::default()), View::default());
        let why = ledger.entries("audit/").await.unwrap_err();
        assert_eq!(Error::from(why).code(), tonic::Code::Unavailable);
        assert!(ledger.beyond("audit/", 0, 1).await.is_err());
    }
}
