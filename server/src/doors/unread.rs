//! Bodies of requests that are answered before they have come.
//!
//! A refusal needs no more than a request's head. In HTTP/2 a stream whose answer has gone and whose
//! body nobody reads is reset (with NO_ERROR, RFC 9113, section 8.1); some clients, curl 7.88 among
//! them, then tell of the reset and never of the answer. A body that nobody wants any more is
//! therefore read on for a moment: its sender hears the answer first, and ends or stops sending by
//! itself. What is read is thrown away at once; time, bytes and their number are bounded, and beyond
//! the bounds the stream is reset as ever.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// How long a body is read on: a round trip of a bad mobile link.
const READ_ON: Duration = Duration::from_secs(2);
/// What is read on of it: eight times a stream's window. Who has not looked at its answer after as many
/// round trips does not look.
const READ_ON_BYTES: usize = 8 * 1024 * 1024;
/// Bodies of one door read on at once; of more, streams are reset.
pub(super) const AT_ONCE: usize = 1024;

/// A request's body, lent to whoever answers the request.
pub(super) struct Lent<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    body: Option<B>,
    /// Absent: it is not read on.
    places: Option<Arc<Semaphore>>,
}

impl<B> Lent<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    /// Lends a request's body. HTTP/1 closes the connection by itself, after its answer.
    pub(super) fn of(request: http::Request<B>, places: &Arc<Semaphore>) -> http::Request<Self> {
        let places = (request.version() == http::Version::HTTP_2).then(|| Arc::clone(places));
        request.map(|body| Self { body: Some(body), places })
    }
}

impl<B> Drop for Lent<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        let place = self.places.take().and_then(|places| places.try_acquire_owned().ok());
        // Without a runtime there is no connection any more.
        if let (Some(place), Ok(runtime)) = (place, Handle::try_current()) {
            runtime.spawn(async move {
                let _ = tokio::time::timeout(READ_ON, read_on(body)).await;
                drop(place);
            });
        }
    }
}

/// Reads a body to its end, or to the bound.
async fn read_on<B: Body<Data = Bytes> + Unpin>(mut body: B) {
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, Bytes::len);
        if read > READ_ON_BYTES {
            return;
        }
    }
}

impl<B> Body for Lent<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use std::convert::Infallible;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    type Pieces = mpsc::Sender<Result<Frame<Bytes>, Infallible>>;

    /// A request with a body that nobody wants, and who sends that body.
    fn refused(version: http::Version, places: &Arc<Semaphore>) -> Pieces {
        let (tx, rx) = mpsc::channel(1);
        let body = http_body_util::StreamBody::new(ReceiverStream::new(rx).boxed());
        let mut request = http::Request::new(body);
        *request.version_mut() = version;
        drop(Lent::of(request, places));
        tx
    }

    fn piece() -> Result<Frame<Bytes>, Infallible> {
        Ok(Frame::data(Bytes::from_static(&[7; 64 * 1024])))
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_wants_is_read_on_for_a_moment() {
        let places = Arc::new(Semaphore::new(1));
        let sender = refused(http::Version::HTTP_2, &places);
        let begun = tokio::time::Instant::now();
        for _ in 0..10 {
            sender.send(piece()).await.unwrap();
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
        sender.closed().await;
        assert!(begun.elapsed().abs_diff(READ_ON) < Duration::from_millis(10));
        let given_back = tokio::time::timeout(READ_ON, places.acquire()).await;
        assert!(given_back.is_ok_and(|place| place.is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_not_read_on() {
        let places = Arc::new(Semaphore::new(1));
        let sender = refused(http::Version::HTTP_2, &places);
        let mut sent = 0_usize;
        while sender.send(piece()).await.is_ok() {
            sent += 64 * 1024;
        }
        assert!(sent.abs_diff(READ_ON_BYTES) <= 4 * 64 * 1024, "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn beyond_its_number_and_in_http_1_a_body_is_let_go_at_once() {
        let places = Arc::new(Semaphore::new(1));
        let first = refused(http::Version::HTTP_2, &places);
        assert!(!first.is_closed());
        assert!(refused(http::Version::HTTP_2, &places).is_closed());
        drop(first);
        let none = Arc::new(Semaphore::new(1));
        assert!(refused(http::Version::HTTP_11, &none).is_closed());
    }
}
