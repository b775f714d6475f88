//! Passes answers on, by a task each.
//!
//! A connection asks a body for more only when its peer takes more. An answer that nobody reads would
//! therefore neither notice that its caller's standing ended nor let go of what feeds it, for as long
//! as the peer keeps the connection. Here a task asks, a few pieces ahead of the connection at the
//! most, and lets go when it is time.

use super::standing::Standing;
use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

type Piece = Result<Frame<Bytes>, axum::Error>;

/// Pieces ahead of the connection: an answer to a single call, message and trailers.
const AHEAD: usize = 2;
/// The same where a piece may be as large as one read of a blob.
const AHEAD_LARGE: usize = 1;

/// What a task passes on.
struct Passed {
    pieces: mpsc::Receiver<Arc<Mutex<Option<Piece>>>>,
    /// Comes after the last piece.
    end: Arc<Mutex<Option<Piece>>>,
    size: SizeHint,
    over: bool,
}

/// Has a task pass the body on. With `untaken` it is given up when nothing was taken of it for so long.
pub(super) fn pass(body: Standing, untaken: Option<Duration>) -> Body {
    use http_body::Body as _;
    if body.is_end_stream() {
        return Body::empty();
    }
    let size = body.size_hint();
    let (tx, pieces) = mpsc::channel(if untaken.is_some() { AHEAD_LARGE } else { AHEAD });
    let end = Arc::default();
    tokio::spawn(run(body, untaken, tx, Arc::clone(&end)));
    Body::new(Passed { pieces, end, size, over: false })
}

async fn run(
    mut body: Standing,
    untaken: Option<Duration>,
    tx: mpsc::Sender<Arc<Mutex<Option<Piece>>>>,
    end: Arc<Mutex<Option<Piece>>>,
) {
    let mut last: Arc<Mutex<Option<Piece>>> = Arc::default();
    loop {
        let next = tokio::select! {
            // Cancel-safe: whoever is not there any more needs no piece.
            next = body.frame() => next,
            () = tx.closed() => return,
        };
        let Some(piece) = next else { return };
        let piece = Arc::new(Mutex::new(Some(piece)));
        let kept = Arc::clone(&piece);
        match tx.try_send(piece) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => return,
            Err(TrySendError::Full(piece)) => {
                let patience = async {
                    match untaken {
                        Some(untaken) => tokio::time::sleep(untaken).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    // Cancel-safe: the piece is of no use to whoever is not to get it.
                    sent = tx.send(piece) => if sent.is_err() {
                        return;
                    },
                    () = body.falls() => {
                        *end.lock() = body.end();
                        return;
                    }
                    () = patience => {
                        tracing::info!("an answer that nobody takes is given up");
                        // What is on its way is held no longer, either.
                        last.lock().take();
                        *end.lock() = Some(Err(axum::Error::new(Untaken)));
                        return;
                    }
                }
            }
        }
        last = kept;
    }
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
#[error("nothing of the answer was taken for too long")]
struct Untaken;

impl http_body::Body for Passed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        if self.over {
            return Poll::Ready(None);
        }
        let piece = match self.pieces.poll_recv(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(piece) => piece.and_then(|piece| piece.lock().take()),
        };
        if piece.is_some() {
            return Poll::Ready(piece);
        }
        self.over = true;
        Poll::Ready(self.end.lock().take())
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }

    fn size_hint(&self) -> SizeHint {
        self.size
    }
}
