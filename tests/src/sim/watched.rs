//! A transfer held to what it promises: by what it was told, by its host's disk, and by the connection
//! it reads from.

use super::spool::{Spool, chunk_end, chunks};
use berth_agent_core::transfer::{
    Blob, CHUNK_BYTES, Effect, Failure, Held, Input, Progress, STALL_MS,
};
use berth_proto::ids::{Digest, Mono};
use std::collections::BTreeSet;

/// The least and the greatest pause after a failure.
const PAUSES_MS: (u64, u64) = (250, 60_000);
/// So often a blob is mended whose chunks change on the disk, before all of it is thrown away.
const REPAIRS: u32 = 3;

/// What a transfer was told that ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    NoRoom,
    Refused,
    Discarded,
    DiskFailed,
    Unwanted,
}

/// A connection to the registry, as its other end knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wire {
    /// The byte that comes next.
    pub(super) at: u64,
    /// What was asked for.
    pub(super) from: u64,
    pub(super) to: u64,
    /// Which start of the server it leads to.
    pub(super) server: u32,
}

/// What is known of a transfer without asking it.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) blobs: Vec<Blob>,
    pub(super) wire: Option<Wire>,
    /// The registry has sent what was not asked for.
    pub(super) no_ranges: bool,
    /// What it was told to be durable, by blob.
    held: Vec<BTreeSet<u64>>,
    room: bool,
    /// The blob and the byte up to which its chunk under way is written; nothing of it came wrong.
    written: Option<(usize, u64)>,
    right: bool,
    /// Bad verifications of the blob under way; nothing has come since the last one.
    repairs: u32,
    unchanged: bool,
    /// The pause it is in.
    until: Option<Mono>,
    last: Option<Told>,
}

fn held_bytes(blob: &Blob, held: &BTreeSet<u64>) -> u64 {
    held.iter().map(|c| chunk_end(*c, blob.size_bytes) - c * CHUNK_BYTES).sum()
}

fn must(holds: bool, words: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(words()) }
}

impl Watch {
    pub(super) fn new(blobs: Vec<Blob>) -> Self {
        Self {
            held: vec![BTreeSet::new(); blobs.len()],
            blobs,
            wire: None,
            no_ranges: false,
            room: false,
            written: None,
            right: true,
            repairs: 0,
            unchanged: false,
            until: None,
            last: None,
        }
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.blobs.iter().any(|blob| blob.digest == *digest)
    }

    /// Whether the chunk under way is as the source has it.
    pub(super) fn is_right(&self) -> bool {
        self.right
    }

    fn held_bytes(&self) -> u64 {
        self.blobs.iter().zip(&self.held).map(|(blob, held)| held_bytes(blob, held)).sum()
    }

    /// Bytes of a blob came.
    pub(super) fn came(&mut self, blob: usize, at: Option<u64>, bytes: u64, right: bool) {
        if let Some(wire) = &mut self.wire {
            wire.at += bytes;
        }
        if let Some(at) = at {
            self.right = right && (self.right || at.is_multiple_of(CHUNK_BYTES));
            self.written = Some((blob, at + bytes));
            self.unchanged = false;
        }
    }

    /// The answer to what it asked for last.
    pub(super) fn told(&mut self, asked: &Effect, input: &Input) {
        match (asked, input) {
            (Effect::Look(blob), Input::Looked(held)) => {
                self.held[*blob] = match held {
                    Held::Whole => (0..chunks(self.blobs[*blob].size_bytes)).collect(),
                    Held::Chunks(held) => held.clone(),
                };
            }
            (_, Input::Room) => self.room = true,
            (Effect::Persist { blob, chunk }, Input::Persisted) => {
                self.held[*blob].insert(*chunk);
                self.written = None;
            }
            (_, Input::Verified { good: false }) => {
                self.repairs += 1;
                (self.unchanged, self.written) = (true, None);
            }
            (_, Input::Kept) => self.repairs = 0,
            _ => {}
        }
        self.last = match input {
            Input::NoRoom { .. } => Some(Told::NoRoom),
            Input::Refused(_) => Some(Told::Refused),
            Input::Discarded => Some(Told::Discarded),
            Input::DiskFailed(_) => Some(Told::DiskFailed),
            Input::Unwanted => Some(Told::Unwanted),
            Input::Begin
            | Input::Looked(_)
            | Input::Room
            | Input::Opened { .. }
            | Input::Received { .. }
            | Input::Broke(_)
            | Input::Persisted
            | Input::Verified { .. }
            | Input::Kept
            | Input::Tick => None,
        };
    }

    /// It asks for something, or says something.
    pub(super) fn asks(&mut self, now: Mono, effect: &Effect, disk: &Spool) -> Result<(), String> {
        let ends = matches!(effect, Effect::Close | Effect::Failed(_));
        let waits = ends || matches!(effect, Effect::Wait(_));
        must(waits || self.until.is_none_or(|until| until <= now), || {
            "a transfer goes on before its pause is over".to_owned()
        })?;
        must(ends || self.last.is_none(), || {
            format!("a transfer goes on after it was told {:?}", self.last)
        })?;
        match effect {
            Effect::Look(_) | Effect::Close => Ok(()),
            Effect::Room(bytes) => {
                let all: u64 = self.blobs.iter().map(|blob| blob.size_bytes).sum();
                let lacks = all - self.held_bytes();
                must(*bytes == lacks, || format!("room for {bytes} is asked for, for {lacks}"))
            }
            Effect::Open { blob, from, to } => {
                self.until = None;
                self.opens(*blob, (*from, *to), disk)
            }
            Effect::Read { blob, at, most, not_before, deadline } => {
                let silence_ms = deadline.since_ms((*not_before).max(now));
                must(silence_ms == STALL_MS, || {
                    format!("a transfer waits for {silence_ms} ms for a byte")
                })?;
                self.reads(*blob, *at, *most, disk)
            }
            Effect::Persist { blob, chunk } => {
                let end = chunk_end(*chunk, self.blobs[*blob].size_bytes);
                must(self.written == Some((*blob, end)), || {
                    format!("chunk {chunk} is made durable, and {:?} is written", self.written)
                })
            }
            Effect::Verify(blob) => {
                let digest = &self.blobs[*blob].digest;
                must(!self.unchanged, || format!("{digest} is verified again, and nothing came"))
            }
            Effect::Keep(blob) => {
                let digest = &self.blobs[*blob].digest;
                must(disk.is_verified(digest), || format!("{digest} is kept and not verified"))
            }
            Effect::Discard(blob) => self.throws_away(*blob, disk),
            Effect::Wait(until) => {
                self.until = Some(*until);
                Ok(())
            }
            Effect::Trouble { until, .. } => {
                let pause_ms = until.since_ms(now);
                must((PAUSES_MS.0..=PAUSES_MS.1).contains(&pause_ms), || {
                    format!("a transfer that does not go on is tried again after {pause_ms} ms")
                })
            }
            Effect::Progress(progress) => self.tells(progress),
            Effect::Done => {
                let lacks = self.blobs.iter().find(|blob| !disk.is_whole(&blob.digest));
                must(lacks.is_none(), || format!("a transfer is done, and {lacks:?} is not whole"))
            }
            Effect::Failed(failure) => {
                let why = match failure {
                    Failure::Refused(_) => Told::Refused,
                    Failure::Wrong(_) => Told::Discarded,
                    Failure::NoRoom { .. } => Told::NoRoom,
                    Failure::Disk(_) => Told::DiskFailed,
                    Failure::Unwanted => Told::Unwanted,
                };
                must(self.last == Some(why), || {
                    format!("a transfer is given up: {failure:?}, told {:?}", self.last)
                })
            }
        }
    }

    fn opens(&self, blob: usize, (from, to): (u64, u64), disk: &Spool) -> Result<(), String> {
        let of = &self.blobs[blob];
        must(from < to && to <= of.size_bytes, || format!("bytes {from} to {to} are asked for"))?;
        must(self.room || disk.has_place(of, from, to), || {
            format!("{} is asked for before there is room", of.digest)
        })?;
        let held = disk.held_of(of, from, to);
        must(held.is_none(), || {
            format!("chunk {held:?} of {} is asked for again, and is durable", of.digest)
        })?;
        let goes_on = match self.written {
            Some((under_way, at)) => (under_way, at) == (blob, from),
            None => from.is_multiple_of(CHUNK_BYTES),
        };
        must(goes_on, || format!("byte {from} is asked for, and {:?} is written", self.written))
    }

    fn reads(&self, blob: usize, at: Option<u64>, most: u64, disk: &Spool) -> Result<(), String> {
        let Some(wire) = self.wire else {
            return Err("a transfer reads from no connection".to_owned());
        };
        let Some(at) = at else {
            let skips = wire.at + most;
            return must(skips <= wire.from, || {
                format!("bytes up to {skips} are dropped, and {} was asked for", wire.from)
            });
        };
        must(wire.at == at, || format!("byte {} is written as byte {at}", wire.at))?;
        let end = at + most;
        let last = chunk_end(at / CHUNK_BYTES, self.blobs[blob].size_bytes);
        must(end <= last && end <= wire.to, || {
            format!("bytes {at} to {end} are read, of a chunk up to {last}, up to {}", wire.to)
        })?;
        let goes_on = match self.written {
            Some(written) => written == (blob, at) && !at.is_multiple_of(CHUNK_BYTES),
            None => at.is_multiple_of(CHUNK_BYTES),
        };
        must(goes_on, || format!("byte {at} is read, and {:?} is not durable", self.written))?;
        let held = disk.held_of(&self.blobs[blob], at, end);
        must(held.is_none(), || format!("chunk {held:?} is read again, and is durable"))
    }

    /// All of a blob goes only when all of it is as it came, or its disk changes it again and again.
    fn throws_away(&self, blob: usize, disk: &Spool) -> Result<(), String> {
        let of = &self.blobs[blob];
        let all = held_bytes(of, &self.held[blob]) == of.size_bytes;
        must(self.repairs > REPAIRS || all && disk.came_wrong(&of.digest), || {
            let words = format!("{} is thrown away after {} repairs", of.digest, self.repairs);
            format!("{words}, and its source is not wrong")
        })
    }

    fn tells(&self, progress: &Progress) -> Result<(), String> {
        let all: u64 = self.blobs.iter().map(|blob| blob.size_bytes).sum();
        let under_way = self.written.map_or(0, |(_, at)| at - (at - 1) / CHUNK_BYTES * CHUNK_BYTES);
        let here = self.held_bytes() + under_way;
        must((progress.done_bytes, progress.total_bytes) == (here, all), || {
            format!("a transfer says {progress:?}, and {here} of {all} bytes are here")
        })
    }
}
