//! The body of a replica's answer on its way to the caller.

use super::route::Chosen;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

/// A replica that sends nothing for so long in the middle of its answer is given up. As long as the
/// wait for its head, because a stream of events may rest as long as a model may think.
const STALL: Duration = Duration::from_secs(300);

/// Passes an answer on as it comes; the replica counts as busy until it has gone by.
pub struct Reply<B> {
    body: B,
    stall: Pin<Box<Sleep>>,
    _busy: Chosen,
}

impl<B> Reply<B> {
    /// The answer of the replica that was chosen.
    #[must_use]
    pub fn new(body: B, chosen: Chosen) -> Self {
        Self { body, stall: Box::pin(tokio::time::sleep(STALL)), _busy: chosen }
    }
}

impl<B> Body for Reply<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.stall.as_mut().reset(Instant::now() + STALL);
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        if self.stall.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(
                Err("the replica stopped in the middle of its answer".into()),
            ));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer on its way that holds its places among those that may be: its deployment's, and all.
pub struct Placed<B> {
    /// The answer's body.
    pub body: B,
    /// Given back when it has gone by, or nobody reads it any more.
    pub _places: [Option<OwnedSemaphorePermit>; 2],
}

impl<B: Body + Unpin> Body for Placed<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
