//! Bringing blobs from a registry onto this disk, as a machine without I/O.
//!
//! [`Transfer`] is told what the disk holds, what came and what went wrong, and answers with what to do
//! next. It never reads, writes, waits or looks at a clock, and it holds no bytes.
//!
//! What always holds:
//!
//! - A blob is kept only after all of it was verified against its digest.
//! - What is durable is never asked for again: bytes come in chunks, a chunk is durable before the next
//!   is read, and after whatever interruption at most the one chunk under way is asked for again. While
//!   the process lives not even that: a connection that broke is gone on with at the very byte.
//! - When a blob does not verify only the chunks that changed on the disk are brought again; only when
//!   all are as they came is the whole blob thrown away, because then its source is wrong.
//! - The disk is asked for room before the first byte is.
//! - Under a bandwidth cap no more is asked for at once than half a second's worth, so that the cap holds on
//!   the link and not in the reader alone.
//! - A transfer is limited by silence, never in total; it tries for ever, with a growing pause, what may
//!   get better by itself, and ends with a [`Failure`] for what will not.

use berth_proto::ids::{Digest, Mono};
use std::collections::BTreeSet;
use std::num::NonZeroU64;

/// Bytes of a chunk: what a crash of the agent may cost. At 1 Mbit/s half a minute, and two syncs of
/// the disk for each are no load.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// No byte for so long, while we read, and the connection is given up.
pub const STALL_MS: u64 = 30_000;
/// The pause after a first failure, doubled up to the greatest while no chunk comes whole.
const FIRST_PAUSE_MS: u64 = 500;
/// The greatest pause: a registry that comes back is found within a minute.
const GREATEST_PAUSE_MS: u64 = 60_000;
/// Between two words about how far it is.
const PROGRESS_MS: u64 = 500;
/// A disk that changes what it holds so often in one transfer is not written to any further.
const REPAIRS: u32 = 3;
/// What may come at once after a pause under a bandwidth cap, as time: short enough for other traffic
/// to get in between, long enough for whole packets.
const BURST_US: u64 = 250_000;
/// What is asked for at once under a bandwidth cap, as time. A cap is kept by reading late, and whatever
/// was asked for may fill the kernel's buffer meanwhile: megabytes that come over the link in one burst,
/// and that are lost with the process. A pause of a burst between two questions is made up for; over a
/// longer one the rate is below the cap.
const ASK_US: u64 = 500_000;
/// The least that is asked for at once: heads are a small part of it.
const ASK_LEAST: u64 = 64 * 1024;

/// One blob of a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// What it must be.
    pub digest: Digest,
    /// How large it must be.
    pub size_bytes: u64,
}

/// What the disk holds of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// All, verified.
    Whole,
    /// These chunks, each as it came; none: nothing.
    Chunks(BTreeSet<u64>),
}

/// What has happened. Each answers the effect of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Begin.
    Begin,
    /// What the disk holds of the blob that was looked for.
    Looked(Held),
    /// There is room.
    Room,
    /// There is no room.
    NoRoom {
        /// What the transfer needs.
        need_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The registry answers, with the bytes from `from` on.
    Opened {
        /// The first byte that will come.
        from: u64,
    },
    /// So many bytes came and, unless they were to be skipped, were written behind those before.
    Received {
        /// How many, at most what was asked for.
        bytes: u64,
    },
    /// There is no connection, it broke, it ended early, or the registry is not well.
    Broke(String),
    /// The registry says no, and will say so again.
    Refused(String),
    /// The chunk is durable.
    Persisted,
    /// All bytes of the blob were read and compared with its digest.
    Verified {
        /// They are right.
        good: bool,
    },
    /// The blob has its final name.
    Kept,
    /// Nothing is left of the blob.
    Discarded,
    /// The disk does not do what it is told.
    DiskFailed(String),
    /// Nobody needs it any more.
    Unwanted,
    /// The time that was waited for has come, or a read's deadline has passed.
    Tick,
}

/// What to do. Blobs are named by their place in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Look what the disk holds of it; every chunk is compared with what came.
    Look(usize),
    /// Ask whether so many bytes more have room beside what is there.
    Room(u64),
    /// Ask the registry for the bytes `from..to`.
    Open {
        /// The blob.
        blob: usize,
        /// First byte.
        from: u64,
        /// Byte behind the last one.
        to: u64,
    },
    /// Take the next bytes and write them at `at`.
    Read {
        /// The blob.
        blob: usize,
        /// Where they belong; `None`: they were not asked for and are dropped.
        at: Option<u64>,
        /// At most so many.
        most: u64,
        /// Not before then, for the bandwidth cap.
        not_before: Mono,
        /// A tick when none came until then.
        deadline: Mono,
    },
    /// Close the connection.
    Close,
    /// Make a chunk durable.
    Persist {
        /// The blob.
        blob: usize,
        /// The chunk.
        chunk: u64,
    },
    /// Compare all of the blob with its digest.
    Verify(usize),
    /// Give the blob its final name.
    Keep(usize),
    /// Throw away all that is held of the blob.
    Discard(usize),
    /// Wait.
    Wait(Mono),
    /// Say how far it is.
    Progress(Progress),
    /// Say that it does not go on just now; a `Wait` until then follows.
    Trouble {
        /// Why.
        why: String,
        /// When it is tried again.
        until: Mono,
    },
    /// All blobs are kept.
    Done,
    /// It will not get better by itself.
    Failed(Failure),
}

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes that are here.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes a second, over the last seconds.
    pub rate_bytes_per_second: u64,
    /// Which blob, from 1 on.
    pub part: u32,
    /// How many there are.
    pub parts: u32,
    /// Time left at that rate; 0: not known.
    pub time_left_ms: u64,
}

/// Why a transfer was given up. The caller may begin it again later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The registry says no.
    #[error("{0}")]
    Refused(String),
    /// The source's bytes are not what the digest says.
    #[error("what the registry sent as {0} is something else")]
    Wrong(Digest),
    /// No room.
    #[error(
        "{} are needed and only {} are free",
        berth_proto::quantity::human_bytes(*need_bytes),
        berth_proto::quantity::human_bytes(*free_bytes)
    )]
    NoRoom {
        /// What it needs.
        need_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The disk.
    #[error("the disk does not take it: {0}")]
    Disk(String),
    /// Nobody needs it any more.
    #[error("it is not needed any more")]
    Unwanted,
}

/// A bandwidth cap for all transfers of a host together.
#[derive(Debug, Clone, Default)]
pub struct Cap {
    bytes_per_second: Option<NonZeroU64>,
    /// When all that was taken has been paid for, in microseconds.
    paid_us: u64,
}

impl Cap {
    /// At most so many bytes a second; `None`: no cap.
    #[must_use]
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        Self { bytes_per_second, paid_us: 0 }
    }

    /// So many bytes came: when the next may be read.
    pub fn take(&mut self, now: Mono, bytes: u64) -> Mono {
        let Some(rate) = self.bytes_per_second else { return now };
        let now_us = now.0.saturating_mul(1_000);
        let cost_us = bytes.saturating_mul(1_000_000) / rate;
        self.paid_us = self.paid_us.max(now_us).saturating_add(cost_us);
        now.max(Mono(self.paid_us.saturating_sub(BURST_US).div_ceil(1_000)))
    }

    /// How many bytes to ask for at once.
    fn ask(&self) -> u64 {
        let most =
            |rate: NonZeroU64| (rate.get().saturating_mul(ASK_US) / 1_000_000).max(ASK_LEAST);
        self.bytes_per_second.map_or(u64::MAX, most)
    }

    /// How many bytes to take at once: no more than the burst, so that a slow cap is kept smoothly.
    fn most(&self, wanted: u64) -> u64 {
        let burst = |rate: NonZeroU64| (rate.get().saturating_mul(BURST_US) / 1_000_000).max(1_024);
        wanted.min(self.bytes_per_second.map_or(u64::MAX, burst))
    }
}

/// What the machine is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    New,
    /// Looking at blob after blob, so that room can be asked for all of them.
    Looking(usize),
    Asking,
    Opening,
    Reading,
    Persisting,
    Waiting(Mono),
    Verifying,
    Keeping,
    Repairing,
    Discarding,
    Over,
}

#[derive(Debug, Clone, Default)]
struct State {
    whole: bool,
    /// Durable.
    chunks: BTreeSet<u64>,
    /// The first that is missing.
    gap: u64,
}

impl State {
    fn advance(&mut self) {
        while self.chunks.contains(&self.gap) {
            self.gap += 1;
        }
    }
}

/// The bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The next byte.
    at: u64,
    /// Behind the last one.
    to: u64,
    /// Bytes the registry sends before those that were asked for.
    skip: u64,
}

/// Bytes a second, smoothed.
#[derive(Debug, Clone, Copy, Default)]
struct Meter {
    since: Mono,
    bytes: u64,
    rate: u64,
}

impl Meter {
    /// A quarter of the newest second, three of what was: a few seconds' memory.
    fn add(&mut self, now: Mono, bytes: u64) {
        self.bytes += bytes;
        let time_ms = now.since_ms(self.since);
        if time_ms < 1_000 {
            return;
        }
        let newest = self.bytes.saturating_mul(1_000) / time_ms;
        self.rate = if self.rate == 0 { newest } else { (self.rate * 3 + newest) / 4 };
        (self.since, self.bytes) = (now, 0);
    }

    fn restart(&mut self, now: Mono) {
        *self = Self { since: now, ..Self::default() };
    }
}

/// One transfer of some blobs, in their order.
#[derive(Debug, Clone)]
pub struct Transfer {
    blobs: Vec<Blob>,
    states: Vec<State>,
    stage: Stage,
    blob: usize,
    run: Option<Run>,
    /// The registry sends blobs from their beginning, whatever is asked for.
    no_ranges: bool,
    failures: u32,
    repairs: u32,
    draw: u64,
    meter: Meter,
    told: Mono,
}

fn chunks(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CHUNK_BYTES)
}

fn chunk_end(chunk: u64, size_bytes: u64) -> u64 {
    ((chunk + 1) * CHUNK_BYTES).min(size_bytes)
}

impl Transfer {
    /// A transfer of `blobs`; `seed` spreads the pauses of many hosts.
    #[must_use]
    pub fn new(blobs: Vec<Blob>, seed: u64) -> Self {
        let states = vec![State::default(); blobs.len()];
        Self {
            blobs,
            states,
            stage: Stage::New,
            blob: 0,
            run: None,
            no_ranges: false,
            failures: 0,
            repairs: 0,
            draw: seed,
            meter: Meter::default(),
            told: Mono(0),
        }
    }

    /// How many bytes of a blob are here without a gap from its beginning on: what a reader beside us
    /// may already have.
    #[must_use]
    pub fn prefix(&self, blob: usize) -> u64 {
        let (Some(state), Some(of)) = (self.states.get(blob), self.blobs.get(blob)) else {
            return 0;
        };
        if state.whole {
            return of.size_bytes;
        }
        let start = (state.gap * CHUNK_BYTES).min(of.size_bytes);
        let here = self.run.filter(|run| self.blob == blob && run.at / CHUNK_BYTES == state.gap);
        here.map_or(start, |run| run.at.max(start))
    }

    /// Takes one input, answers with what to do, in this order.
    pub fn step(&mut self, now: Mono, input: Input, cap: &mut Cap) -> Vec<Effect> {
        match input {
            Input::Begin if self.stage == Stage::New => self.look(now, 0, cap),
            Input::Looked(held) => self.looked(now, held, cap),
            Input::Room if self.stage == Stage::Asking => self.next(now, cap),
            Input::NoRoom { need_bytes, free_bytes } => {
                self.fail(Failure::NoRoom { need_bytes, free_bytes })
            }
            Input::Opened { from } => self.opened(now, from, cap),
            Input::Received { bytes } => self.received(now, bytes, cap),
            Input::Broke(why) if matches!(self.stage, Stage::Opening | Stage::Reading) => {
                if bug!(BrokenIsForGood) {
                    return self.fail(Failure::Refused(why));
                }
                self.trouble(now, why)
            }
            Input::Refused(why) => self.fail(Failure::Refused(why)),
            Input::Persisted => self.persisted(now, cap),
            Input::Verified { good } => self.verified(good),
            Input::Kept if self.stage == Stage::Keeping => self.kept(now, cap),
            Input::Discarded if self.stage == Stage::Discarding => {
                let digest = self.blobs[self.blob].digest.clone();
                self.fail(Failure::Wrong(digest))
            }
            Input::DiskFailed(why) => self.fail(Failure::Disk(why)),
            Input::Unwanted if bug!(UnwantedGoesOn) => self.next(now, cap),
            Input::Unwanted => self.fail(Failure::Unwanted),
            Input::Tick => self.tick(now, cap),
            // Answers to what was asked before the transfer took another turn.
            Input::Begin | Input::Room | Input::Broke(_) | Input::Kept | Input::Discarded => {
                Vec::new()
            }
        }
    }

    fn tick(&mut self, now: Mono, cap: &Cap) -> Vec<Effect> {
        if let Stage::Waiting(until) = self.stage {
            return if now >= until || bug!(PauseCutShort) {
                self.next(now, cap)
            } else {
                vec![Effect::Wait(until)]
            };
        }
        if self.stage == Stage::Reading && !bug!(SilenceWithoutEnd) {
            let seconds = STALL_MS / 1_000;
            return self.trouble(now, format!("the registry sent nothing for {seconds} s"));
        }
        Vec::new()
    }

    fn kept(&mut self, now: Mono, cap: &Cap) -> Vec<Effect> {
        let state = &mut self.states[self.blob];
        state.whole = true;
        state.chunks.clear();
        self.repairs = 0;
        let mut effects = vec![self.progress(now)];
        effects.extend(self.next(now, cap));
        effects
    }

    fn look(&mut self, now: Mono, blob: usize, cap: &Cap) -> Vec<Effect> {
        if blob < self.blobs.len() {
            self.stage = Stage::Looking(blob);
            return vec![Effect::Look(blob)];
        }
        let missing = self.total().saturating_sub(self.done());
        if missing == 0 || bug!(BytesBeforeRoom) {
            return self.next(now, cap);
        }
        self.stage = Stage::Asking;
        vec![Effect::Room(missing)]
    }

    fn looked(&mut self, now: Mono, held: Held, cap: &Cap) -> Vec<Effect> {
        if let Stage::Looking(blob) = self.stage {
            self.take(blob, held);
            return self.look(now, blob + 1, cap);
        }
        if self.stage != Stage::Repairing {
            return Vec::new();
        }
        let blob = self.blob;
        self.take(blob, held);
        let all = self.states[blob].chunks.len() as u64 == chunks(self.blobs[blob].size_bytes);
        let all = all && !bug!(WrongSourceBelieved);
        if all || self.repairs > REPAIRS || bug!(WholeThrownAway) {
            self.stage = Stage::Discarding;
            return vec![Effect::Discard(blob)];
        }
        self.next(now, cap)
    }

    fn take(&mut self, blob: usize, held: Held) {
        let state = &mut self.states[blob];
        match held {
            Held::Whole => state.whole = true,
            Held::Chunks(mut set) => {
                set.retain(|c| *c < chunks(self.blobs[blob].size_bytes));
                if bug!(DurableForgotten) {
                    set.clear();
                }
                state.chunks = set;
                state.gap = if bug!(RottenNotMissed) { state.gap } else { 0 };
                state.advance();
            }
        }
    }

    /// Goes on with the first thing that is missing.
    fn next(&mut self, now: Mono, cap: &Cap) -> Vec<Effect> {
        while let Some(state) = self.states.get(self.blob) {
            if !state.whole {
                break;
            }
            self.blob += 1;
            self.run = None;
        }
        let Some((blob, state)) = self.blobs.get(self.blob).zip(self.states.get(self.blob)) else {
            self.stage = Stage::Over;
            return vec![Effect::Done];
        };
        let size = blob.size_bytes;
        let gap = state.gap;
        if gap >= chunks(size) {
            if bug!(KeptUnverified) {
                self.stage = Stage::Keeping;
                return vec![Effect::Keep(self.blob)];
            }
            self.stage = Stage::Verifying;
            return vec![Effect::Verify(self.blob)];
        }
        let behind =
            (gap..chunks(size)).find(|c| state.chunks.contains(c) && !bug!(DurableBehindAsked));
        let to = behind.map_or(size, |c| c * CHUNK_BYTES);
        let start = gap * CHUNK_BYTES;
        // Within the chunk under way the bytes before are here, while we live.
        let at = self
            .run
            .filter(|r| r.at > start && r.at < chunk_end(gap, size) && !bug!(ChunkBegunAnew))
            .map_or(start, |r| r.at);
        let most = if self.no_ranges || bug!(AskedAtOnce) { u64::MAX } else { cap.ask() };
        let to = to.min(at.saturating_add(most));
        self.run = Some(Run { at, to, skip: 0 });
        if !matches!(self.stage, Stage::Reading | Stage::Persisting) {
            self.meter.restart(now);
        }
        self.stage = Stage::Opening;
        vec![Effect::Open { blob: self.blob, from: at, to }]
    }

    fn opened(&mut self, now: Mono, from: u64, cap: &mut Cap) -> Vec<Effect> {
        let (Stage::Opening, Some(run)) = (&self.stage, self.run.as_mut()) else {
            return Vec::new();
        };
        if from > run.at && !bug!(OtherBytesTaken) {
            return self.trouble(now, "the registry answered with other bytes".to_owned());
        }
        // A registry without ranges sends all of it.
        run.skip = if bug!(UnaskedNotDropped) { 0 } else { run.at.saturating_sub(from) };
        self.no_ranges |= run.skip > 0;
        self.stage = Stage::Reading;
        // What came before is paid for first: blobs may be smaller than a burst, and many.
        let not_before = if bug!(BlobsUncapped) { now } else { cap.take(now, 0) };
        vec![self.read(now, not_before, cap)]
    }

    fn read(&self, now: Mono, not_before: Mono, cap: &Cap) -> Effect {
        let run = self.run.unwrap_or(Run { at: 0, to: 0, skip: 0 });
        let (at, most) = if run.skip > 0 {
            (None, run.skip)
        } else {
            let end = chunk_end(run.at / CHUNK_BYTES, self.blobs[self.blob].size_bytes);
            (Some(run.at), end.min(run.to) - run.at)
        };
        let deadline = not_before.max(now).plus_ms(STALL_MS);
        Effect::Read { blob: self.blob, at, most: cap.most(most), not_before, deadline }
    }

    fn received(&mut self, now: Mono, bytes: u64, cap: &mut Cap) -> Vec<Effect> {
        let size = self.blobs.get(self.blob).map_or(0, |b| b.size_bytes);
        let (Stage::Reading, Some(run)) = (&self.stage, self.run.as_mut()) else {
            return Vec::new();
        };
        let not_before = cap.take(now, bytes);
        self.meter.add(now, bytes);
        if run.skip > 0 {
            run.skip = run.skip.saturating_sub(bytes);
            return vec![self.read(now, not_before, cap)];
        }
        let chunk = run.at / CHUNK_BYTES;
        run.at = (run.at + bytes).min(chunk_end(chunk, size)).min(run.to);
        let asked_is_here = run.at == run.to;
        let whole = run.at == chunk_end(chunk, size) && (asked_is_here || !bug!(ReadOnUndurable));
        let mut effects = Vec::new();
        if now.since_ms(self.told) >= PROGRESS_MS {
            effects.push(self.progress(now));
        }
        if whole {
            self.stage = Stage::Persisting;
            effects.push(Effect::Persist { blob: self.blob, chunk });
        } else if asked_is_here {
            effects.extend(self.next(now, cap));
        } else {
            effects.push(self.read(now, not_before, cap));
        }
        effects
    }

    fn persisted(&mut self, now: Mono, cap: &mut Cap) -> Vec<Effect> {
        let (Stage::Persisting, Some(run)) = (&self.stage, self.run) else { return Vec::new() };
        // `at` is behind the chunk, which is never empty.
        let state = &mut self.states[self.blob];
        state.chunks.insert((run.at - 1) / CHUNK_BYTES);
        state.advance();
        self.failures = 0;
        if run.at < run.to {
            self.stage = Stage::Reading;
            let not_before = cap.take(now, 0);
            return vec![self.read(now, not_before, cap)];
        }
        self.next(now, cap)
    }

    fn verified(&mut self, good: bool) -> Vec<Effect> {
        if self.stage != Stage::Verifying {
            return Vec::new();
        }
        if good {
            self.stage = Stage::Keeping;
            return vec![Effect::Keep(self.blob)];
        }
        self.repairs += 1;
        self.run = None;
        self.stage = Stage::Repairing;
        vec![Effect::Look(self.blob)]
    }

    fn trouble(&mut self, now: Mono, why: String) -> Vec<Effect> {
        self.failures = self.failures.saturating_add(1);
        let doublings = (self.failures - 1).min(16);
        let greatest = if bug!(PauseUnbounded) { u64::MAX } else { GREATEST_PAUSE_MS };
        let pause = (FIRST_PAUSE_MS << doublings).min(greatest);
        let until = now.plus_ms(pause / 2 + self.random() % (pause / 2 + 1));
        self.stage = Stage::Waiting(until);
        vec![Effect::Close, Effect::Trouble { why, until }, Effect::Wait(until)]
    }

    fn fail(&mut self, failure: Failure) -> Vec<Effect> {
        if self.stage == Stage::Over {
            return Vec::new();
        }
        self.stage = Stage::Over;
        vec![Effect::Close, Effect::Failed(failure)]
    }

    fn total(&self) -> u64 {
        self.blobs.iter().map(|b| b.size_bytes).sum()
    }

    fn done(&self) -> u64 {
        let durable = |(blob, state): (&Blob, &State)| {
            if state.whole {
                return blob.size_bytes;
            }
            let bytes = |c: &u64| chunk_end(*c, blob.size_bytes) - c * CHUNK_BYTES;
            state.chunks.iter().map(bytes).sum()
        };
        let durable: u64 = self.blobs.iter().zip(&self.states).map(durable).sum();
        let under_way = self.run.map_or(0, |run| {
            let held = self.states.get(self.blob).is_none_or(|s| {
                s.whole || run.at == 0 || s.chunks.contains(&((run.at - 1) / CHUNK_BYTES))
            });
            if held { 0 } else { run.at - (run.at - 1) / CHUNK_BYTES * CHUNK_BYTES }
        });
        durable + under_way
    }

    fn progress(&mut self, now: Mono) -> Effect {
        self.told = now;
        let (done_bytes, total_bytes) = (self.done(), self.total());
        let rate = self.meter.rate;
        let left = total_bytes.saturating_sub(done_bytes);
        let place = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Effect::Progress(Progress {
            done_bytes,
            total_bytes,
            rate_bytes_per_second: rate,
            part: place((self.blob + 1).min(self.blobs.len())),
            parts: place(self.blobs.len()),
            time_left_ms: left.saturating_mul(1_000).checked_div(rate).unwrap_or(0),
        })
    }

    /// The next of a linear congruence: enough to spread pauses.
    fn random(&mut self) -> u64 {
        self.draw = self.draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        self.draw >> 33
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;
