//! Pumps the transfer's machine: asks the registry, writes the spool, keeps the time.
//!
//! Decides nothing: what to ask for, when to give a connection up, how long to wait and what to throw
//! away is said by [`berth_agent_core::transfer`]. One transfer of a blob runs at a time, whoever
//! wants it; all share one bandwidth cap.

use super::client::{Client, FetchError, Link};
use super::spool::{Spool, Writing};
use async_trait::async_trait;
use berth_agent_core::transfer::{
    Blob, CHUNK_BYTES, Cap, Effect, Failure, Input, Progress, Transfer,
};
use berth_proto::ids::{Digest, Mono};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroU64;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes written at once: fewer system calls than piece by piece, and a small price in memory.
const WRITE_BYTES: usize = 256 * 1024;
/// What has come is written after so long at the latest, for whoever reads behind us.
const WRITE_AFTER: Duration = Duration::from_millis(200);
/// A transfer that waits looks so often whether it is still wanted.
const LOOK: Duration = Duration::from_secs(5);

/// Says whether there is room, and makes some where that is allowed.
#[async_trait]
pub trait Room: Send + Sync {
    /// Room for so many bytes more.
    ///
    /// # Errors
    /// What is needed and what is free, when there is not.
    async fn room(&self, bytes: u64) -> Result<(), (u64, u64)>;
}

/// What is seen of a transfer while it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// How far it is.
    Progress(Progress),
    /// It does not go on just now.
    Trouble {
        /// Why.
        why: String,
        /// When it is tried again.
        retry_ms: u64,
    },
    /// The first blob is written from its beginning up to here.
    Prefix(u64),
}

/// One transfer.
pub struct Job<'a> {
    /// Where the blobs go.
    pub spool: Spool,
    /// Where they come from.
    pub repository: &'a str,
    /// The blobs.
    pub blobs: Vec<Blob>,
    /// Asked before the first byte.
    pub room: &'a dyn Room,
    /// Whether it is still wanted: asked before each request, after each chunk, and while it waits.
    pub wanted: &'a (dyn Fn() -> bool + Send + Sync),
    /// Told how it goes.
    pub tell: &'a (dyn Fn(Seen) + Send + Sync),
}

/// The transfers of a host.
pub struct Transfers {
    client: Client,
    cap: Mutex<Cap>,
    locks: Mutex<BTreeMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    origin: Instant,
}

/// The ends a transfer holds while it runs.
#[derive(Default)]
struct Ends {
    link: Link,
    body: Option<Incoming>,
    /// Came and was not taken yet.
    rest: Bytes,
    writing: Option<(usize, Arc<Writing>)>,
    /// Taken and not written yet, from this byte on.
    pieces: Vec<Bytes>,
    pieces_at: u64,
    pieces_bytes: usize,
    /// Of the chunk under way.
    crc: u32,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

impl Transfers {
    /// Transfers through `client`, all together at most so many bytes a second.
    #[must_use]
    pub fn new(client: Client, bytes_per_second: Option<NonZeroU64>) -> Self {
        Self {
            client,
            cap: Mutex::new(Cap::new(bytes_per_second)),
            locks: Mutex::default(),
            origin: Instant::now(),
        }
    }

    /// The registry's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    fn now(&self) -> Mono {
        Mono(u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1))
    }

    async fn until(&self, at: Mono) {
        tokio::time::sleep(Duration::from_millis(at.since_ms(self.now()))).await;
    }

    /// The locks of these blobs, in one order for all, so that nobody waits in a circle.
    fn locks(&self, blobs: &[Blob]) -> Vec<Arc<tokio::sync::Mutex<()>>> {
        let mut digests: Vec<&Digest> = blobs.iter().map(|b| &b.digest).collect();
        digests.sort();
        digests.dedup();
        let mut held = self.locks.lock();
        held.retain(|_, lock| lock.strong_count() > 0);
        let mut locks = Vec::new();
        for digest in digests {
            let lock = held.get(digest).and_then(Weak::upgrade).unwrap_or_default();
            held.insert(digest.clone(), Arc::downgrade(&lock));
            locks.push(lock);
        }
        locks
    }

    /// Runs one transfer to its end. Dropped, it leaves what is durable for the next one.
    ///
    /// # Errors
    /// When it will not get better by itself.
    pub async fn run(&self, job: Job<'_>) -> Result<(), Failure> {
        let locks = self.locks(&job.blobs);
        let mut guards = Vec::with_capacity(locks.len());
        for lock in &locks {
            guards.push(lock.lock().await);
        }
        let mut seed = [0; 8];
        // Without randomness all hosts pause alike, which is no reason to fetch nothing.
        let _ = getrandom::fill(&mut seed);
        let mut machine = Transfer::new(job.blobs.clone(), u64::from_le_bytes(seed));
        let mut ends = Ends::default();
        let mut effects: VecDeque<Effect> =
            machine.step(self.now(), Input::Begin, &mut self.cap.lock()).into();
        let mut told = 0;
        while let Some(effect) = effects.pop_front() {
            let input = match effect {
                Effect::Done => {
                    (job.tell)(Seen::Prefix(machine.prefix(0)));
                    return Ok(());
                }
                Effect::Failed(failure) => return Err(failure),
                Effect::Progress(progress) => {
                    (job.tell)(Seen::Progress(progress));
                    continue;
                }
                Effect::Trouble { why, until } => {
                    let retry_ms = until.since_ms(self.now());
                    tracing::debug!(job.repository, why, retry_ms, "a transfer waits");
                    (job.tell)(Seen::Trouble { why, retry_ms });
                    continue;
                }
                Effect::Close => {
                    ends.body = None;
                    ends.rest = Bytes::new();
                    ends.link = Link::default();
                    continue;
                }
                Effect::Wait(until) => self.wait(&job, until).await,
                Effect::Room(bytes) => match job.room.room(bytes).await {
                    Ok(()) => Input::Room,
                    Err((need_bytes, free_bytes)) => Input::NoRoom { need_bytes, free_bytes },
                },
                Effect::Open { blob, from, to } => {
                    if (job.wanted)() {
                        self.open(&job, &mut ends, blob, from, to).await
                    } else {
                        Input::Unwanted
                    }
                }
                Effect::Read { at, most, not_before, deadline, .. } => {
                    self.until(not_before).await;
                    let prefix = machine.prefix(0);
                    self.read(&job, &mut ends, prefix, (at, most, deadline)).await
                }
                Effect::Persist { chunk, .. } => {
                    let persisted = ends.persist(chunk).await;
                    // One answer may hold all of a blob.
                    let go_on = persisted.is_err() || (job.wanted)();
                    if go_on { disk(persisted) } else { Input::Unwanted }
                }
                Effect::Look(blob) => {
                    // Looking may replace the journal: it is opened anew.
                    ends.writing = None;
                    let (spool, blob) = (job.spool.clone(), job.blobs[blob].clone());
                    disk(blocking(move || spool.look(&blob)).await.map(Input::Looked))
                }
                Effect::Verify(blob) => {
                    let (spool, blob) = (job.spool.clone(), job.blobs[blob].clone());
                    let verified = blocking(move || spool.verify(&blob)).await;
                    disk(verified.map(|good| Input::Verified { good }))
                }
                Effect::Keep(blob) => {
                    ends.writing = None;
                    let (spool, digest) = (job.spool.clone(), job.blobs[blob].digest.clone());
                    disk(blocking(move || spool.keep(&digest)).await.map(|()| Input::Kept))
                }
                Effect::Discard(blob) => {
                    ends.writing = None;
                    let (spool, digest) = (job.spool.clone(), job.blobs[blob].digest.clone());
                    disk(blocking(move || spool.discard(&digest)).await.map(|()| Input::Discarded))
                }
            };
            effects.extend(machine.step(self.now(), input, &mut self.cap.lock()));
            // Only what is written may be read by others.
            let here = machine.prefix(0).saturating_sub(ends.pieces_bytes as u64);
            if here > told {
                told = here;
                (job.tell)(Seen::Prefix(here));
            }
        }
        // Not reached: a machine ends with Done or Failed.
        Err(Failure::Unwanted)
    }

    async fn wait(&self, job: &Job<'_>, until: Mono) -> Input {
        loop {
            if !(job.wanted)() {
                return Input::Unwanted;
            }
            let left = Duration::from_millis(until.since_ms(self.now()));
            if left.is_zero() {
                return Input::Tick;
            }
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }

    async fn open(&self, job: &Job<'_>, ends: &mut Ends, blob: usize, from: u64, to: u64) -> Input {
        let digest = &job.blobs[blob].digest;
        if ends.writing.as_ref().is_none_or(|(open, _)| *open != blob) {
            let (spool, digest) = (job.spool.clone(), digest.clone());
            match blocking(move || spool.write(&digest)).await {
                Ok(writing) => ends.writing = Some((blob, Arc::new(writing))),
                Err(error) => return Input::DiskFailed(error.to_string()),
            }
        }
        ends.body = None;
        ends.rest = Bytes::new();
        let path = format!("/v2/{}/blobs/{digest}", job.repository);
        match self.client.ask(&mut ends.link, &path, Some((from, to))).await {
            Ok(answer) => {
                ends.body = Some(answer.body);
                Input::Opened { from: answer.from }
            }
            Err(FetchError::Refused { status, .. })
                if status == http::StatusCode::RANGE_NOT_SATISFIABLE =>
            {
                Input::Refused(format!("the registry's {digest} is shorter than its manifest says"))
            }
            Err(error) if error.is_passing() => Input::Broke(crate::chain(&error)),
            Err(error) => Input::Refused(crate::chain(&error)),
        }
    }

    async fn read(
        &self,
        job: &Job<'_>,
        ends: &mut Ends,
        prefix: u64,
        (at, most, deadline): (Option<u64>, u64, Mono),
    ) -> Input {
        while ends.rest.is_empty() {
            let Some(body) = ends.body.as_mut() else {
                return Input::Broke("the connection to the registry broke".to_owned());
            };
            let left = Duration::from_millis(deadline.since_ms(self.now()));
            // Cancel-safe: a frame that was not taken stays.
            let frame = match tokio::time::timeout(left.min(WRITE_AFTER), body.frame()).await {
                Ok(frame) => frame,
                Err(_) if left <= WRITE_AFTER => return Input::Tick,
                Err(_) => {
                    if let Err(error) = ends.write().await {
                        return Input::DiskFailed(error.to_string());
                    }
                    (job.tell)(Seen::Prefix(prefix));
                    continue;
                }
            };
            match frame {
                None => return Input::Broke("the registry ended too early".to_owned()),
                Some(Err(error)) => return Input::Broke(crate::chain(&error)),
                Some(Ok(frame)) => ends.rest = frame.into_data().unwrap_or_default(),
            }
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(ends.rest.len());
        let piece = ends.rest.split_to(most);
        if let Some(at) = at {
            ends.take(at, piece);
            if ends.pieces_bytes >= WRITE_BYTES
                && let Err(error) = ends.write().await
            {
                return Input::DiskFailed(error.to_string());
            }
        }
        Input::Received { bytes: most as u64 }
    }
}

fn disk(result: io::Result<Input>) -> Input {
    result.unwrap_or_else(|error| Input::DiskFailed(error.to_string()))
}

impl Ends {
    fn take(&mut self, at: u64, piece: Bytes) {
        if at.is_multiple_of(CHUNK_BYTES) {
            self.crc = 0;
        }
        if self.pieces.is_empty() {
            self.pieces_at = at;
        }
        self.crc = crc32c::crc32c_append(self.crc, &piece);
        self.pieces_bytes += piece.len();
        self.pieces.push(piece);
    }

    async fn write(&mut self) -> io::Result<()> {
        let Some((_, writing)) = &self.writing else { return Ok(()) };
        if self.pieces.is_empty() {
            return Ok(());
        }
        let (writing, at) = (Arc::clone(writing), self.pieces_at);
        let pieces = std::mem::take(&mut self.pieces);
        self.pieces_bytes = 0;
        blocking(move || writing.pieces(at, &pieces)).await
    }

    async fn persist(&mut self, chunk: u64) -> io::Result<Input> {
        self.write().await?;
        let Some((_, writing)) = &self.writing else {
            return Err(io::Error::other("nothing is open"));
        };
        let (writing, crc) = (Arc::clone(writing), self.crc);
        blocking(move || writing.persist(chunk, crc)).await?;
        Ok(Input::Persisted)
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;
