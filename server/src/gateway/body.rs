//! Bodies of requests: bounded, passed on as they come, kept only while they are small.
//!
//! The first bytes of every body are looked at, because a gRPC call says there whom it is for. A body
//! that is small is kept whole, so that it can be sent to another replica; a larger one streams
//! through and can be sent once. What is kept comes out of one budget for all requests: when that is
//! used up bodies stream, and nothing waits for memory.

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Largest request: a batch of 32 images of 224 x 224 x 3 in FP32 is 19 MB, as JSON about five times
/// that. It streams, so this bounds time and the replica's memory rather than ours.
pub const MAX_BODY: u64 = 128 * 1024 * 1024;
/// Kept of every body without asking the budget: whom a call is for stands within its first bytes.
const HEAD_BYTES: u64 = 16 * 1024;
/// Bodies up to this are kept whole and can be sent again: an image as JSON.
const REPLAY_BYTES: u64 = 1024 * 1024;
/// Memory for bodies that are kept, in KiB over all requests: 64 of the largest.
pub const BUDGET_KIB: usize = 64 * 1024;
/// A caller that sends nothing for so long in the middle of its body is given up.
const STALL: Duration = Duration::from_secs(60);
/// What is kept of a body must be here within this, however steadily it trickles: it holds memory. As
/// long as a request may wait for the head of its answer.
const READ_DEADLINE: Duration = Duration::from_secs(300);

/// Why a body could not be taken in. The caller's doing, not the replica's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// More than [`MAX_BODY`].
    #[error("the request is larger than {MAX_BODY} bytes")]
    TooLarge,
    /// Nothing came for too long.
    #[error("the request's body stopped coming")]
    Stalled,
    /// It ended before its end.
    #[error("the request's body broke off")]
    Broken,
}

/// A request's body on its way to a replica.
pub struct Payload {
    whole: Option<Bytes>,
    unsent: Option<Body>,
    head: Bytes,
    length: Option<u64>,
    fault: Arc<OnceLock<BodyError>>,
    _kept: Option<OwnedSemaphorePermit>,
}

impl Payload {
    /// Reads as much as is kept. `declared` is the length the caller announced.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub async fn read(
        body: Body,
        declared: Option<u64>,
        budget: &Arc<Semaphore>,
    ) -> Result<Self, BodyError> {
        if declared.is_some_and(|length| length > MAX_BODY) {
            return Err(BodyError::TooLarge);
        }
        tokio::time::timeout(READ_DEADLINE, Self::keep(body, declared, budget))
            .await
            .map_err(|_| BodyError::Stalled)?
    }

    async fn keep(
        body: Body,
        declared: Option<u64>,
        budget: &Arc<Semaphore>,
    ) -> Result<Self, BodyError> {
        let enough = if declared.is_some_and(|length| length > REPLAY_BYTES) {
            HEAD_BYTES
        } else {
            REPLAY_BYTES
        };
        let mut stream = body.into_data_stream();
        let mut held = BytesMut::new();
        let mut kept = None;
        loop {
            let size = held.len() as u64;
            if size > HEAD_BYTES && kept.is_none() && size <= enough {
                let kib = u32::try_from(REPLAY_BYTES / 1024).unwrap_or(u32::MAX);
                kept = Arc::clone(budget).try_acquire_many_owned(kib).ok();
            }
            if size > enough || (size > HEAD_BYTES && kept.is_none()) {
                return Ok(Self::streamed(held.freeze(), stream, declared, kept));
            }
            match tokio::time::timeout(STALL, stream.next()).await {
                Err(_) => return Err(BodyError::Stalled),
                Ok(Some(Err(_))) => return Err(BodyError::Broken),
                Ok(Some(Ok(bytes))) => held.extend_from_slice(&bytes),
                Ok(None) => return Ok(Self::whole(held.freeze(), kept)),
            }
        }
    }

    /// A body that is here.
    #[must_use]
    pub fn whole(bytes: Bytes, kept: Option<OwnedSemaphorePermit>) -> Self {
        Self {
            head: bytes.clone(),
            length: Some(bytes.len() as u64),
            whole: Some(bytes),
            unsent: None,
            fault: Arc::default(),
            _kept: kept,
        }
    }

    fn streamed(
        head: Bytes,
        rest: BodyDataStream,
        length: Option<u64>,
        kept: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let fault = Arc::new(OnceLock::new());
        let unsent = Some(bounded(VecDeque::from([head.clone()]), rest, Arc::clone(&fault)));
        Self { whole: None, unsent, head, length, fault, _kept: kept }
    }

    /// The first bytes; all of them when [`Self::is_whole`].
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Whether all of it is here, so that it can be sent again.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.whole.is_some()
    }

    /// Its length, when that is known.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Puts `lead` in the place of the first `cut` bytes.
    pub fn put_lead(&mut self, lead: &[u8], cut: usize) {
        let splice = |bytes: &Bytes| {
            let mut spliced = BytesMut::from(lead);
            spliced.extend_from_slice(bytes.get(cut..).unwrap_or_default());
            spliced.freeze()
        };
        if let Some(bytes) = &self.whole {
            let bytes = splice(bytes);
            self.length = Some(bytes.len() as u64);
            self.head = bytes.clone();
            self.whole = Some(bytes);
            return;
        }
        let head = splice(&self.head);
        self.unsent = self.unsent.take().map(|body| {
            let mut stream = body.into_data_stream();
            let first = head.clone();
            Body::from_stream(
                futures_util::stream::once(async move { Ok(first) }).chain(
                    // The head that was read comes first out of the stream as one piece.
                    futures_util::stream::once(async move {
                        stream.next().await;
                        stream
                    })
                    .flatten(),
                ),
            )
        });
        self.length = self.length.map(|n| n + lead.len() as u64 - cut as u64);
        self.head = head;
    }

    /// What is to be sent; `None` when it was sent and is not here any more.
    pub fn take(&mut self) -> Option<Body> {
        match &self.whole {
            Some(bytes) => Some(Body::from(bytes.clone())),
            None => self.unsent.take(),
        }
    }

    /// Takes back what was not sent.
    pub fn give_back(&mut self, body: Body) {
        if self.whole.is_none() {
            self.unsent = Some(body);
        }
    }

    /// What was wrong with the caller's body while it was passed on.
    #[must_use]
    pub fn fault(&self) -> Option<BodyError> {
        self.fault.get().copied()
    }
}

/// The rest of a body behind what was read of it, within the bound.
fn bounded(held: VecDeque<Bytes>, rest: BodyDataStream, fault: Arc<OnceLock<BodyError>>) -> Body {
    let end = |why: BodyError, fault: &OnceLock<BodyError>| {
        let _ = fault.set(why);
        Some((Err(why), None))
    };
    let state = Some((held, rest, 0_u64));
    Body::from_stream(futures_util::stream::unfold(state, move |state| {
        let fault = Arc::clone(&fault);
        async move {
            let (mut held, mut rest, gone) = state?;
            let bytes = match held.pop_front() {
                Some(bytes) => bytes,
                None => match tokio::time::timeout(STALL, rest.next()).await {
                    Err(_) => return end(BodyError::Stalled, &fault),
                    Ok(Some(Err(_))) => return end(BodyError::Broken, &fault),
                    Ok(Some(Ok(bytes))) => bytes,
                    Ok(None) => return None,
                },
            };
            let gone = gone + bytes.len() as u64;
            if gone > MAX_BODY {
                return end(BodyError::TooLarge, &fault);
            }
            Some((Ok(bytes), Some((held, rest, gone))))
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;

    fn budget(kib: usize) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(kib))
    }

    fn pieces(size: usize, number: usize) -> Body {
        let piece = Bytes::from(vec![7_u8; size]);
        let all = (0..number).map(move |_| Ok::<_, std::io::Error>(piece.clone()));
        Body::from_stream(futures_util::stream::iter(all))
    }

    async fn all(body: Option<Body>) -> usize {
        body.unwrap().collect().await.unwrap().to_bytes().len()
    }

    #[tokio::test]
    async fn a_small_body_can_be_sent_again_and_a_large_one_once() {
        let mut small = Payload::read(pieces(1000, 3), None, &budget(BUDGET_KIB)).await.unwrap();
        assert!(small.is_whole());
        assert_eq!(all(small.take()).await, 3000);
        assert_eq!(all(small.take()).await, 3000);
        let mut large =
            Payload::read(pieces(100_000, 30), None, &budget(BUDGET_KIB)).await.unwrap();
        assert!(!large.is_whole());
        let body = large.take().unwrap();
        assert!(large.take().is_none());
        large.give_back(body);
        assert_eq!(all(large.take()).await, 3_000_000);
        assert!(large.take().is_none());
    }

    #[tokio::test]
    async fn without_memory_to_keep_it_a_body_streams() {
        let none = budget(0);
        let mut payload = Payload::read(pieces(10_000, 9), None, &none).await.unwrap();
        assert!(!payload.is_whole());
        assert_eq!(all(payload.take()).await, 90_000);
        let tiny = Payload::read(pieces(100, 9), None, &none).await.unwrap();
        assert!(tiny.is_whole());
        let one = budget(1024);
        let first = Payload::read(pieces(10_000, 9), None, &one).await.unwrap();
        assert!(first.is_whole());
        assert!(!Payload::read(pieces(10_000, 9), None, &one).await.unwrap().is_whole());
        drop(first);
        assert!(Payload::read(pieces(10_000, 9), None, &one).await.unwrap().is_whole());
    }

    #[tokio::test]
    async fn a_body_above_the_bound_is_refused_before_or_while_it_comes() {
        let told = Payload::read(pieces(1, 1), Some(MAX_BODY + 1), &budget(0)).await;
        assert_eq!(told.err(), Some(BodyError::TooLarge));
        let endless = pieces(1 << 20, 1 + usize::try_from(MAX_BODY >> 20).unwrap());
        let mut payload = Payload::read(endless, None, &budget(0)).await.unwrap();
        assert!(payload.take().unwrap().collect().await.is_err());
        assert_eq!(payload.fault(), Some(BodyError::TooLarge));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_stops_sending_is_given_up() {
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"a"))]);
        let stuck = Body::from_stream(first.chain(futures_util::stream::pending()));
        let read = Payload::read(stuck, None, &budget(BUDGET_KIB)).await;
        assert_eq!(read.err(), Some(BodyError::Stalled));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_trickles_is_given_up_too() {
        let drops = futures_util::stream::repeat(Bytes::from_static(b"a")).then(async |byte| {
            tokio::time::sleep(STALL / 2).await;
            Ok::<_, std::io::Error>(byte)
        });
        let begun = tokio::time::Instant::now();
        let read = Payload::read(Body::from_stream(drops), None, &budget(BUDGET_KIB)).await;
        assert_eq!(read.err(), Some(BodyError::Stalled));
        assert_eq!(begun.elapsed().as_secs(), READ_DEADLINE.as_secs());
    }

    #[tokio::test]
    async fn a_lead_is_exchanged_in_kept_and_in_streamed_bodies() {
        for number in [3, 30] {
            let none = budget(0);
            let mut payload = Payload::read(pieces(100_000, number), None, &none).await.unwrap();
            // For a second replica, where the first was not reached.
            payload.put_lead(b"1st", 10);
            payload.put_lead(b"lead", 3);
            let bytes = payload.take().unwrap().collect().await.unwrap().to_bytes();
            assert_eq!(bytes.len(), 100_000 * number - 6);
            assert!(bytes.starts_with(b"lead\x07"));
        }
        let mut whole = Payload::whole(Bytes::from_static(b"0123456789"), None);
        whole.put_lead(b"ab", 9);
        assert_eq!(whole.head(), b"ab9");
        assert_eq!(whole.length(), Some(3));
    }
}
