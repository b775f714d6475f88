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
/// How long a write may take: a disk that needs longer has failed.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

enum Job {
    Propose(Proposal, oneshot::Sender<Result<Revision, Refusal>>),
    Checkpoint(oneshot::Sender<()>),
    Read(Reading, oneshot::Sender<Vec<Entry>>),
    Snapshot(oneshot::Sender<Result<(Revision, Vec<Entry>), StoreError>>),
    Beyond { prefix: &'static str, keep: usize, limit: usize, reply: oneshot::Sender<Vec<Vec<u8>>> },
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
            durable: Arc::clone(&durable),
            ahead: Arc::clone(&ahead),
            published: published_tx,
            changes: changes.clone(),
            failed: failed_tx,
            full: full_tx,
        };
        let thread = std::thread::Builder::new().name("ledger".to_owned());
        if let Err(error) = thread.spawn(move || writer.run(rx)) {
            tracing::error!(%error, "the ledger's thread cannot be started");
        }
        Self { limits, jobs, durable, ahead, published, changes, failed, full }
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
        self.jobs.send(Job::Propose(proposal, tx)).await.map_err(|_| Refusal::Failed)?;
        match tokio::time::timeout(WRITE_DEADLINE, rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Refusal::Failed),
            Err(_) => Err(Refusal::Unsure),
        }
    }

    /// All entries under a prefix that the view does not hold and that is short by its nature (the
    /// moves of one model's aliases), in order of keys.
    pub async fn entries(&self, prefix: &str) -> Vec<Entry> {
        let mut all = self.newest(prefix, None, usize::MAX).await;
        all.reverse();
        all
    }

    /// The last entries under a prefix that the view does not hold (events, audit), from the last to
    /// the first: those before `below`, at most `limit`. The writer's thread reads them, so a long
    /// list is read in pieces.
    pub async fn newest(&self, prefix: &str, below: Option<String>, limit: usize) -> Vec<Entry> {
        let (tx, rx) = oneshot::channel();
        let reading = Reading { prefix: prefix.to_owned(), below, limit };
        if self.jobs.send(Job::Read(reading, tx)).await.is_err() {
            return Vec::new();
        }
        tokio::time::timeout(WRITE_DEADLINE, rx).await.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Keys under a prefix beyond the newest `keep`, the oldest first, at most `limit`.
    pub async fn beyond(&self, prefix: &'static str, keep: usize, limit: usize) -> Vec<Vec<u8>> {
        let (reply, rx) = oneshot::channel();
        if self.jobs.send(Job::Beyond { prefix, keep, limit, reply }).await.is_err() {
            return Vec::new();
        }
        tokio::time::timeout(WRITE_DEADLINE, rx).await.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Everything that is durable, and as of which revision.
    ///
    /// # Errors
    /// When it cannot be read, or the ledger has ended.
    pub async fn snapshot(&self) -> Result<(Revision, Vec<crate::store::Entry>), StoreError> {
        let ended = || StoreError::Materialised("the ledger does not answer".to_owned());
        let (tx, rx) = oneshot::channel();
        self.jobs.send(Job::Snapshot(tx)).await.map_err(|_| ended())?;
        tokio::time::timeout(WRITE_DEADLINE, rx)
            .await
            .ok()
            .and_then(Result::ok)
            .ok_or_else(ended)?
    }

    /// Writes a checkpoint, before a clean end.
    pub async fn checkpoint(&self) {
        let (tx, rx) = oneshot::channel();
        if self.jobs.send(Job::Checkpoint(tx)).await.is_ok() {
            let _ = tokio::time::timeout(WRITE_DEADLINE, rx).await;
        }
    }
}

struct Writer {
    machine: Batching,
    store: Box<dyn Store>,
    replies: HashMap<u64, oneshot::Sender<Result<Revision, Refusal>>>,
    next: u64,
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
            self.ahead.store(Arc::new(self.machine.ahead().clone()));
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
                let effects = self.machine.propose(self.next, proposal);
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
                let _ = reply.send(found.unwrap_or_default());
            }
            Job::Beyond { prefix, keep, limit, reply } => {
                let found = self.store.beyond(prefix.as_bytes(), keep, limit);
                let _ = reply.send(found.unwrap_or_default());
            }
        }
    }

    fn write(&mut self, token: u64, batches: &[Batch], persist: &mut Vec<(u64, Vec<Batch>)>) {
        let effects = match self.store.commit(batches) {
            Ok(()) => {
                if self.full.send_if_modified(std::mem::take) {
                    tracing::info!("the disk has room again; writes are taken");
                }
                self.machine.persisted(token)
            }
            Err(StoreError::Full) => {
                // Once, not with every write that is tried.
                if self.full.send_if_modified(|full| !std::mem::replace(full, true)) {
                    tracing::error!("the disk is full; writes are refused until there is room");
                }
                let effects = self.machine.full(token);
                self.ahead.store(Arc::new(self.machine.ahead().clone()));
                effects
            }
            Err(error) => {
                tracing::error!(error = %crate::error::Chain(&error), "the store has failed; stopping");
                let effects = self.machine.failed();
                self.failed.send_replace(true);
                effects
            }
        };
        self.carry_out(effects, persist);
    }

    fn carry_out(&mut self, effects: Vec<Effect>, persist: &mut Vec<(u64, Vec<Batch>)>) {
        for effect in effects {
            match effect {
                Effect::Persist { token, batches } => persist.push((token, batches)),
                Effect::Acknowledge { id, revision } => self.reply(id, Ok(revision)),
                Effect::Reject { id, why } => self.reply(id, Err(why)),
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
            (_, Revision(0), _) => Error::Exists { kind, name: name.to_owned() },
            (_, expected, found) => Error::RevisionMismatch {
                kind,
                name: name.to_owned(),
                expected: expected.0,
                found: found.0,
            },
        },
        Refusal::Epoch { .. } => {
            Error::unavailable("EPOCH_CHANGED", "the server's epoch has changed; ask again")
        }
        Refusal::TooLarge { size, limits } => Error::field("", too_large(size, limits)),
        Refusal::Busy => Error::unavailable("LEDGER_BUSY", "too many writes are waiting"),
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
