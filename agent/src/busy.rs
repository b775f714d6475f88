//! Whether a connection that is served carries any call.

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::watch;
use tonic::body::Body;
use tower::Service;

/// Calls under way.
#[derive(Clone)]
pub struct Busy(Arc<watch::Sender<usize>>);

impl Default for Busy {
    fn default() -> Self {
        Self(Arc::new(watch::channel(0).0))
    }
}

impl Busy {
    /// Ends when there was no call for so long.
    pub async fn idle(&self, long: Duration) {
        let mut calls = self.0.subscribe();
        loop {
            // The sender is ours: it does not go away.
            let _ = calls.wait_for(|calls| *calls == 0).await;
            // A call that came and went begins the wait anew as well.
            if tokio::time::timeout(long, calls.changed()).await.is_err() {
                return;
            }
        }
    }

    fn begin(&self) -> Call {
        self.0.send_modify(|calls| *calls += 1);
        Call(self.clone())
    }
}

/// A call; it is over when this is dropped.
struct Call(Busy);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.0.send_modify(|calls| *calls -= 1);
    }
}

/// Counts a service's calls, each until its answer has gone by.
#[derive(Clone)]
pub struct Counted<S> {
    /// The service.
    pub service: S,
    /// The count.
    pub busy: Busy,
}

impl<S> Service<Request<Incoming>> for Counted<S>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let call = self.busy.begin();
        let answer = self.service.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let _under_way = &call;
                    frame
                }))
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn idle_is_told_only_after_a_whole_wait_without_a_call() {
        let busy = Busy::default();
        let long = Duration::from_secs(60);
        let begun = tokio::time::Instant::now();
        let waiting = tokio::spawn({
            let busy = busy.clone();
            async move { busy.idle(long).await }
        });
        tokio::time::sleep(Duration::from_secs(50)).await;
        let call = busy.begin();
        tokio::time::sleep(Duration::from_secs(500)).await;
        assert!(!waiting.is_finished());
        drop(call);
        waiting.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_secs(610));
    }
}
