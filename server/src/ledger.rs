//! The one writer: pumps the batching machine with a store on a thread of its own.
//!
//! Reads come from an immutable view and never wait. What is acknowledged is durable. A store that
//! fails (other than by a full disk) stops the process: going on would promise what cannot be kept.

use crate::error::{Error, Kind};
use crate::store::{Store, StoreError};
use arc_swap::ArcSwap;
use berth_proto::ids::Revision;
use berth_server_core::batching::{Batch, Batching, Effect, Proposal, Refusal};
use berth_server_core::change::Change;
use berth_server_core::view::{ObjectKey, View};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// Proposals handed to the writer's thread and not yet taken.
const QUEUE: usize = 4096;
/// Changes that a slow watcher may fall behind before it has to list again.
const BEHIND: usize = 10_000;
/// Proposals gathered into one group at most.
const GATHER: usize = 512;
/// How long a write may take: a disk that needs longer has failed.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

enum Job {
    Propose(Proposal, oneshot::Sender<Result<Revision, Refusal>>),
    Checkpoint(oneshot::Sender<()>),
    Read(Vec<u8>, oneshot::Sender<Vec<crate::store::Entry>>),
}

/// The ledger.
#[derive(Clone)]
pub struct Ledger {
    jobs: mpsc::Sender<Job>,
    durable: Arc<ArcSwap<View>>,
    ahead: Arc<ArcSwap<View>>,
    published: watch::Receiver<Revision>,
    changes: broadcast::Sender<(Revision, Change)>,
    failed: watch::Receiver<bool>,
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
        let writer = Writer {
            machine: Batching::new(view),
            store,
            replies: HashMap::new(),
            next: 0,
            durable: Arc::clone(&durable),
            ahead: Arc::clone(&ahead),
            published: published_tx,
            changes: changes.clone(),
            failed: failed_tx,
        };
        let thread = std::thread::Builder::new().name("ledger".to_owned());
        if let Err(error) = thread.spawn(move || writer.run(rx)) {
            tracing::error!(%error, "the ledger's thread cannot be started");
        }
        Self { jobs, durable, ahead, published, changes, failed }
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

    /// Writes; answers when it is durable.
    ///
    /// # Errors
    /// The refusal; nothing was written then.
    pub async fn propose(&self, proposal: Proposal) -> Result<Revision, Refusal> {
        let (tx, rx) = oneshot::channel();
        self.jobs.send(Job::Propose(proposal, tx)).await.map_err(|_| Refusal::Failed)?;
        match tokio::time::timeout(WRITE_DEADLINE, rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(Refusal::Failed),
        }
    }

    /// Entries of a kind that the view does not hold (events, audit, alias moves).
    pub async fn entries(&self, prefix: &str) -> Vec<crate::store::Entry> {
        let (tx, rx) = oneshot::channel();
        if self.jobs.send(Job::Read(prefix.as_bytes().to_vec(), tx)).await.is_err() {
            return Vec::new();
        }
        tokio::time::timeout(WRITE_DEADLINE, rx).await.ok().and_then(Result::ok).unwrap_or_default()
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
            Job::Read(prefix, reply) => {
                let _ = reply.send(self.store.load(&prefix).unwrap_or_default());
            }
        }
    }

    fn write(&mut self, token: u64, batches: &[Batch], persist: &mut Vec<(u64, Vec<Batch>)>) {
        let effects = match self.store.commit(batches) {
            Ok(()) => self.machine.persisted(token),
            Err(StoreError::Full) => {
                tracing::error!("the disk is full; writes are refused until there is room");
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
        Refusal::TooLarge { .. } => {
            Error::field("", "the request is too large for one write; split it up")
        }
        Refusal::Busy => Error::unavailable("LEDGER_BUSY", "too many writes are waiting"),
        Refusal::Full => Error::Exhausted {
            reason: "DISK_FULL",
            message: "the server's disk is full; nothing was written, free some space".to_owned(),
        },
        Refusal::Failed => Error::unavailable("LEDGER_FAILED", "the server's store has failed"),
    }
}
