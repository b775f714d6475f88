//! Keeps a materialised store behind the journal, by a thread of its own.
//!
//! What is acknowledged rests on the journal alone, so nothing that the materialised store does may
//! hold up a commit for ever: not an error, not a panic, and not a call that never comes back (sled
//! 0.34 has such a one: its threads all wait for a lock whose holder waits for one of them to shrink
//! the file). A store that has done nothing for its patience while there was something to do is
//! [`Stopped::Hung`] and is left alone; its thread, which cannot be ended, keeps what it holds.

use super::StoreError;
use berth_server_core::batching::Batch;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of keys and values that may wait; a commit then waits for room.
const QUEUE_BYTES: usize = 16 << 20;
/// Bytes of keys and values that are handed over at once, unless one batch has more.
const GROUP_BYTES: usize = 512 << 10;

/// A store that batches are put into, in the order of their revisions.
pub(super) trait Materialised: Send + 'static {
    /// Puts batches in, all or none of them.
    ///
    /// # Errors
    /// When it cannot; nothing is asked of it afterwards.
    fn apply(&mut self, batches: &[Batch]) -> Result<(), StoreError>;

    /// Makes what was put in survive a power cut.
    ///
    /// # Errors
    /// When it cannot; nothing is asked of it afterwards.
    fn sync(&mut self) -> Result<(), StoreError>;
}

/// Why a materialised store is out of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stopped {
    /// It failed or panicked, and was closed: it may be made anew in its place.
    #[error("it failed")]
    Failed,
    /// It does not come back from a call, and may still use its files.
    #[error("it hangs")]
    Hung,
}

struct State {
    queue: VecDeque<Batch>,
    queued_bytes: usize,
    /// Syncs asked for, and the number of those that are done.
    asked: u64,
    synced: u64,
    /// The store is in a call.
    busy: bool,
    /// When the last call began or, if it is over, ended.
    since: Instant,
    /// No more will be asked; what waits is still put in.
    closing: bool,
    /// The thread is done, and the store closed.
    over: bool,
}

impl State {
    fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            queued_bytes: 0,
            asked: 0,
            synced: 0,
            busy: false,
            since: Instant::now(),
            closing: false,
            over: false,
        }
    }

    /// When a wait that began then ends for want of any progress. Each call has its own patience: slow
    /// is not hung.
    fn hangs_at(&self, begun: Instant, patience: Duration) -> Instant {
        let since = if self.busy { self.since } else { self.since.max(begun) };
        since + patience
    }

    fn has_work(&self) -> bool {
        !self.queue.is_empty() || self.synced < self.asked
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread that a materialised store is used by.
pub(super) struct Follower {
    shared: Arc<Shared>,
    patience: Duration,
}

fn size(batch: &Batch) -> usize {
    batch.ops.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Vec::len)).sum()
}

impl Follower {
    /// Hands a store to a thread of its own. It hangs when no call of it ends for `patience`.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start(
        store: impl Materialised,
        patience: Duration,
    ) -> Result<Self, std::io::Error> {
        let shared = Arc::new(Shared { state: Mutex::new(State::new()), changed: Condvar::new() });
        let follower = Self { shared: shared.clone(), patience };
        std::thread::Builder::new().name("materialise".to_owned()).spawn(move || {
            run(store, &shared);
            shared.state.lock().over = true;
            shared.changed.notify_all();
        })?;
        Ok(follower)
    }

    /// Hands over a batch; waits only while too much waits already.
    ///
    /// # Errors
    /// [`Stopped`] when the store is out of use.
    pub(super) fn push(&self, batch: Batch) -> Result<(), Stopped> {
        let bytes = size(&batch);
        let mut state = self.shared.state.lock();
        self.wait(&mut state, |state| {
            state.queue.is_empty() || state.queued_bytes + bytes <= QUEUE_BYTES
        })?;
        state.queued_bytes += bytes;
        state.queue.push_back(batch);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until all that was handed over survives a power cut.
    ///
    /// # Errors
    /// [`Stopped`] when the store is out of use.
    pub(super) fn sync(&self) -> Result<(), Stopped> {
        let mut state = self.shared.state.lock();
        state.asked += 1;
        let mine = state.asked;
        self.shared.changed.notify_all();
        self.wait(&mut state, |state| state.synced >= mine)
    }

    fn wait(
        &self,
        state: &mut parking_lot::MutexGuard<'_, State>,
        done: impl Fn(&State) -> bool,
    ) -> Result<(), Stopped> {
        let begun = Instant::now();
        loop {
            if state.over {
                return Err(Stopped::Failed);
            }
            let until = state.hangs_at(begun, self.patience);
            if Instant::now() >= until {
                return Err(Stopped::Hung);
            }
            if done(state) {
                return Ok(());
            }
            self.shared.changed.wait_until(state, until);
        }
    }
}

impl Drop for Follower {
    /// Closes the store, with all that was handed over in it; one that hangs is left.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closing = true;
        self.shared.changed.notify_all();
        if self.wait(&mut state, |_| false) == Err(Stopped::Hung) {
            tracing::error!("the materialised store does not close; its thread is left");
        }
    }
}

/// What is to be done next.
enum Job {
    Apply(Vec<Batch>),
    /// Does as many of the syncs that were asked for.
    Sync(u64),
}

fn run(mut store: impl Materialised, shared: &Shared) {
    loop {
        let job = {
            let mut state = shared.state.lock();
            while !state.has_work() && !state.closing {
                shared.changed.wait(&mut state);
            }
            let mut group = Vec::new();
            let mut bytes = 0;
            while bytes < GROUP_BYTES
                && let Some(batch) = state.queue.pop_front()
            {
                bytes += size(&batch);
                group.push(batch);
            }
            state.queued_bytes -= bytes;
            (state.busy, state.since) = (true, Instant::now());
            if !group.is_empty() {
                Job::Apply(group)
            } else if state.synced < state.asked {
                Job::Sync(state.asked)
            } else {
                return;
            }
        };
        let synced = match &job {
            Job::Apply(_) => None,
            Job::Sync(asked) => Some(*asked),
        };
        // Nothing of ours is left half-done: whatever the store held is thrown away then.
        let done = catch_unwind(AssertUnwindSafe(|| match job {
            Job::Apply(group) => store.apply(&group),
            Job::Sync(_) => store.sync(),
        }));
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(
                    error = %crate::error::Chain(&error),
                    "the materialised store has failed; the journal holds"
                );
                return;
            }
            Err(_) => {
                tracing::error!("the materialised store panicked; the journal holds");
                return;
            }
        }
        let mut state = shared.state.lock();
        (state.busy, state.since) = (false, Instant::now());
        state.synced = synced.unwrap_or(state.synced);
        shared.changed.notify_all();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use berth_proto::ids::Revision;
    use std::sync::mpsc::{Receiver, Sender, channel};

    pub(in super::super) const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);

    /// Does what it is told to by the other end, one word a call; hangs for want of a word.
    pub(in super::super) struct Puppet {
        words: Receiver<Result<(), StoreError>>,
        got: Sender<Vec<u64>>,
    }

    pub(in super::super) fn puppet() -> (Puppet, Sender<Result<(), StoreError>>, Receiver<Vec<u64>>)
    {
        let (say, words) = channel();
        let (got, seen) = channel();
        (Puppet { words, got }, say, seen)
    }

    impl Materialised for Puppet {
        fn apply(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
            self.got.send(batches.iter().map(|b| b.revision.0).collect()).unwrap();
            self.words.recv().unwrap()
        }

        fn sync(&mut self) -> Result<(), StoreError> {
            self.got.send(Vec::new()).unwrap();
            self.words.recv().unwrap()
        }
    }

    fn batch(revision: u64, bytes: usize) -> Batch {
        Batch { revision: Revision(revision), ops: vec![(b"k".to_vec(), Some(vec![0; bytes]))] }
    }

    #[test]
    fn batches_arrive_in_order_and_a_sync_comes_after_them() {
        let (store, say, seen) = puppet();
        for _ in 0..20 {
            say.send(Ok(())).unwrap();
        }
        let follower = Follower::start(store, LONG).unwrap();
        for revision in 1..=9 {
            follower.push(batch(revision, 10)).unwrap();
        }
        follower.sync().unwrap();
        drop(follower);
        let calls: Vec<Vec<u64>> = seen.iter().collect();
        assert_eq!(calls.concat(), (1..=9).collect::<Vec<_>>());
        assert_eq!(calls.last(), Some(&Vec::new()), "the sync is the last call");
    }

    #[test]
    fn what_waits_is_put_in_before_it_is_closed() {
        let (store, say, seen) = puppet();
        let follower = Follower::start(store, LONG).unwrap();
        for revision in 1..=5 {
            follower.push(batch(revision, GROUP_BYTES)).unwrap();
        }
        for _ in 0..5 {
            say.send(Ok(())).unwrap();
        }
        drop(follower);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [[1], [2], [3], [4], [5]]);
    }

    #[test]
    fn a_store_that_hangs_holds_up_nobody_for_longer_than_its_patience() {
        let (store, _say, _seen) = puppet();
        let follower = Follower::start(store, SHORT).unwrap();
        // As much as may wait goes at once.
        for revision in 1..=16 {
            follower.push(batch(revision, QUEUE_BYTES / 16 - 1)).unwrap();
        }
        let mut end = Ok(());
        for revision in 17..=40 {
            end = end.and(follower.push(batch(revision, QUEUE_BYTES / 16 - 1)));
        }
        assert_eq!(end, Err(Stopped::Hung));
        assert_eq!(follower.sync(), Err(Stopped::Hung));
        drop(follower);
    }

    #[test]
    fn each_call_has_its_own_patience() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let state = |busy, since| State { busy, since: at(since), ..State::new() };
        let hangs = |busy, since, begun| state(busy, since).hangs_at(at(begun), LONG);
        assert_eq!(hangs(true, 3, 20), at(33), "it was in that call before the wait began");
        assert_eq!(hangs(true, 90, 20), at(120), "a later call of a long wait");
        assert_eq!(hangs(false, 3, 20), at(50), "it had nothing to do until the wait began");
        assert_eq!(hangs(false, 90, 20), at(120), "between two calls of a long wait");
    }

    #[test]
    fn a_failure_and_a_panic_put_it_out_of_use() {
        let (store, say, _seen) = puppet();
        let follower = Follower::start(store, LONG).unwrap();
        say.send(Err(StoreError::Full)).unwrap();
        follower.push(batch(1, 10)).unwrap();
        assert_eq!(follower.sync(), Err(Stopped::Failed));

        let (store, say, _seen) = puppet();
        let follower = Follower::start(store, LONG).unwrap();
        // The puppet has nobody to hear from: it panics.
        drop(say);
        follower.push(batch(1, 10)).unwrap();
        assert_eq!(follower.sync(), Err(Stopped::Failed));
        assert_eq!(follower.push(batch(2, 10)), Err(Stopped::Failed));
    }
}
