//! A call that goes on ends when its caller may no longer make it.
//!
//! Who calls is judged before a call begins; a stream may go on for days after that. Its answer's body
//! is therefore wrapped: whenever somebody's standing has changed (a user or token revoked or ended)
//! the caller is judged again, and when it no longer stands the stream ends with the very status a new
//! call would get. Nothing is polled: a stream wakes for revocations and for its caller's own end.
//! When the server stops every stream ends, and its caller is told to call again; sessions of hosts as
//! well, so that the next server is dialled at once.
//!
//! The gateway and the registry judge their callers themselves; [`keep`] ends what is under way there,
//! a transfer either way or an answer that is waited for.
//!
//! An answer is passed on by a task of its own (`passing`): while a caller takes nothing its
//! connection asks its body for nothing either, and a body that is not asked could not end.

use super::auth::{self, Caller};
use super::passing;
use crate::cluster::{Cluster, wall_now};
use crate::error::{Error, trailers};
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body::Frame;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Longest sleep until a caller's end, well within what the timer takes; then it looks again.
const LONGEST: Duration = Duration::from_secs(86_400);

type Fallen = Pin<Box<dyn Future<Output = Error> + Send>>;

/// How a body says that it ends before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// By the trailers that gRPC has for it.
    Grpc,
    /// By breaking off: plain HTTP has nothing else.
    Broken,
}

/// An answer of the gateway or registry of which its caller takes nothing for so long is given up: it
/// holds a place, a replica or an open file. As long as a replica may rest in the middle of one.
const UNTAKEN: Duration = Duration::from_secs(300);

/// A body that ends with its caller's standing.
pub struct Standing {
    inner: Body,
    ends: Ends,
    fallen: Option<Fallen>,
    /// Why it ends, once it does.
    over: Option<Error>,
    /// Frames that were given.
    given: u8,
}

/// An answer to a single call is two frames. Where it is ready it is given, though what it answers ended
/// its caller's standing: whoever revokes itself is told that it is done.
const ANSWER_FRAMES: u8 = 2;

impl Standing {
    /// Wraps the answer to a call of `caller`. One that stands and takes nothing is left to itself: an
    /// operator may rest over a log.
    pub fn wrap(cluster: &Arc<Cluster>, caller: Caller, inner: Body) -> Body {
        let stops = stops(cluster.stopping());
        // Hosts are told of their removal in the session, which then ends by itself.
        if !caller.subject.starts_with("user/") {
            let retired = retired(Arc::clone(cluster), caller);
            let ends = async move {
                tokio::select! {
                    // Cancel-safe, both.
                    error = retired => error,
                    error = stops => error,
                }
            };
            return Self::ending(Ends::Grpc, inner, Box::pin(ends), None);
        }
        let fallen = fallen(Arc::clone(cluster), caller);
        let ends = async move {
            tokio::select! {
                // Cancel-safe, both.
                error = fallen => error,
                error = stops => error,
            }
        };
        Self::ending(Ends::Grpc, inner, Box::pin(ends), None)
    }

    fn ending(ends: Ends, inner: Body, fallen: Fallen, untaken: Option<Duration>) -> Body {
        passing::pass(Self { inner, ends, fallen: Some(fallen), over: None, given: 0 }, untaken)
    }

    /// Waits until its caller no longer stands; for ever when that was noticed before.
    pub(super) async fn falls(&mut self) {
        match self.fallen.as_mut().filter(|_| self.over.is_none()) {
            Some(fallen) => self.over = Some(fallen.await),
            None => std::future::pending().await,
        }
    }

    /// What its caller gets last, with all that feeds it let go.
    pub(super) fn end(&mut self) -> Option<Result<Frame<Bytes>, axum::Error>> {
        self.fallen = None;
        // Dropping the rest ends whatever feeds it.
        self.inner = Body::empty();
        let error = self.over.take()?;
        Some(match self.ends {
            Ends::Grpc => Ok(Frame::trailers(trailers(error))),
            Ends::Broken => Err(axum::Error::new(error)),
        })
    }
}

/// What a door needs to end what is under way.
#[derive(Clone)]
pub struct Door {
    /// Whose callers.
    pub cluster: Arc<Cluster>,
    /// What a caller gets that was still waiting for an answer, by its request's headers.
    pub refuse: fn(&http::HeaderMap, &Error) -> Response,
}

/// Ends a request that is under way when its caller no longer stands. Whether it may be begun is the
/// door's own to judge.
pub async fn keep(State(door): State<Door>, request: Request, next: Next) -> Response {
    let Some(caller) = auth::shown(&door.cluster, request.headers(), request.extensions()) else {
        let nobody = Box::pin(std::future::pending());
        let response = next.run(request).await;
        return response.map(|body| Standing::ending(Ends::Broken, body, nobody, Some(UNTAKEN)));
    };
    let headers = request.headers().clone();
    let mut fallen: Fallen = Box::pin(fallen(Arc::clone(&door.cluster), caller));
    let response = tokio::select! {
        // Dropping the handler ends its transfer.
        response = next.run(request) => response,
        error = &mut fallen => return (door.refuse)(&headers, &error),
    };
    let grpc = response
        .headers()
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let ends = if grpc { Ends::Grpc } else { Ends::Broken };
    response.map(|body| Standing::ending(ends, body, fallen, Some(UNTAKEN)))
}

/// Ends when the server stops.
async fn stops(mut stopping: tokio::sync::watch::Receiver<bool>) -> Error {
    if stopping.wait_for(|stopping| *stopping).await.is_err() {
        std::future::pending::<()>().await;
    }
    Error::unavailable("SERVER_STOPPING", "the server stops; call again")
}

/// Ends when the root that has signed the caller's certificate is retired.
async fn retired(cluster: Arc<Cluster>, caller: Caller) -> Error {
    let mut changes = cluster.revocations();
    loop {
        changes.borrow_and_update();
        if let Err(error) = auth::root_stands(&cluster, &caller) {
            return error;
        }
        if changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Ends when the caller no longer stands.
async fn fallen(cluster: Arc<Cluster>, caller: Caller) -> Error {
    let mut revocations = cluster.revocations();
    loop {
        revocations.borrow_and_update();
        if let Err(error) = auth::still_stands(&cluster, &caller) {
            return error;
        }
        let left = match caller.host {
            // Its certificate is renewed while it works.
            Some(_) => LONGEST,
            None => {
                Duration::from_millis(u64::try_from(caller.expires - wall_now().0).unwrap_or(0))
            }
        };
        tokio::select! {
            // Cancel-safe, both.
            changed = revocations.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            },
            () = tokio::time::sleep(left.min(LONGEST)) => {}
        }
    }
}

impl http_body::Body for Standing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let Some(fallen) = &mut this.fallen else { return Poll::Ready(None) };
        if this.over.is_none()
            && let Poll::Ready(error) = fallen.as_mut().poll(cx)
        {
            this.over = Some(error);
        }
        if this.over.is_none() || this.given < ANSWER_FRAMES {
            let frame = Pin::new(&mut this.inner).poll_frame(cx);
            if this.over.is_none() || frame.is_ready() {
                this.given = this.given.saturating_add(1);
                return frame;
            }
        }
        Poll::Ready(this.end())
    }

    fn is_end_stream(&self) -> bool {
        self.fallen.is_none() || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{call, served};
    use super::*;
    use berth_proto::api::user_service_server::UserService as _;
    use berth_proto::api::*;
    use http_body_util::BodyExt as _;

    async fn vera(api: &super::super::Api) -> (Caller, String) {
        let user = CreateUserRequest {
            name: "vera".into(),
            bindings: vec![RoleBinding { role: Role::Viewer as i32, ..RoleBinding::default() }],
            expire_time: Some(berth_proto::convert::timestamp(berth_proto::ids::Wall(
                wall_now().0 + 3_600_000,
            ))),
            ..CreateUserRequest::default()
        };
        api.create_user(call(user)).await.unwrap();
        let token = CreateUserTokenRequest { name: "vera".into(), ..Default::default() };
        let token = api.create_user_token(call(token)).await.unwrap().into_inner();
        let mut headers = http::HeaderMap::new();
        headers.insert("authorization", format!("Bearer {}", token.secret).parse().unwrap());
        let caller = auth::caller(&api.0, &headers, &http::Extensions::new()).unwrap().unwrap();
        (caller, token.id)
    }

    fn endless() -> Body {
        Body::from_stream(tokio_stream::pending::<Result<Bytes, std::io::Error>>())
    }

    async fn end_of(mut body: Body) -> String {
        let wait = tokio::time::timeout(Duration::from_secs(10), body.frame());
        let frame = wait.await.expect("the stream goes on").unwrap().unwrap();
        let trailers = frame.into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "16");
        trailers["grpc-message"].to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_stream_ends_when_its_user_or_token_is_revoked() {
        for only_token in [false, true] {
            let (_dir, api) = served();
            let (_stop, stop) = tokio::sync::watch::channel(false);
            tokio::spawn(crate::tasks::revocations(Arc::clone(&api.0), stop));
            let (caller, token) = vera(&api).await;
            let mut body = Standing::wrap(&api.0, caller.clone(), endless());
            let going = tokio::time::timeout(Duration::from_millis(50), body.frame());
            assert!(going.await.is_err(), "it ended by itself");
            let token_id = if only_token { token } else { String::new() };
            let revoke = RevokeUserRequest { name: "vera".into(), token_id, ..Default::default() };
            api.revoke_user(call(revoke)).await.unwrap();
            let words = end_of(body).await;
            assert!(words.contains("revoked"), "{words}");
        }
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_callers_time() {
        let (_dir, api) = served();
        let (caller, _) = vera(&api).await;
        let caller = Caller { expires: wall_now().0 + 50, ..caller };
        let words = end_of(Standing::wrap(&api.0, caller, endless())).await;
        assert!(words.contains("expired"), "{words}");
    }

    #[tokio::test]
    async fn a_new_user_of_an_old_name_does_not_give_life_to_the_old_ones_token() {
        let (_dir, api) = served();
        let (old, _) = vera(&api).await;
        let revoke = RevokeUserRequest { name: "vera".into(), ..Default::default() };
        api.revoke_user(call(revoke)).await.unwrap();
        vera(&api).await;
        assert!(auth::still_stands(&api.0, &old).is_err());
    }

    /// A door of which everything goes on for ever: answers, and what is waited for and taken in.
    fn door(cluster: &Arc<Cluster>) -> axum::Router {
        use axum::routing::{get, put};
        let door = Door { cluster: Arc::clone(cluster), refuse: crate::gateway::ended };
        axum::Router::new()
            .route("/endless", get(async || endless()))
            .route("/waited-for", get(async || std::future::pending::<()>().await))
            .route("/upload", put(async |body: Body| body.collect().await.map(|_| ()).unwrap()))
            .layer(axum::middleware::from_fn_with_state(door, keep))
    }

    fn request(path: &str, authorization: &str) -> Request {
        let method = if path == "/upload" { "PUT" } else { "GET" };
        let request = Request::builder().uri(path).method(method);
        request.header("authorization", authorization).body(endless()).unwrap()
    }

    #[tokio::test]
    async fn what_is_under_way_at_a_door_ends_with_its_callers_standing() {
        use base64::Engine as _;
        use tower::ServiceExt as _;
        let (_dir, api) = served();
        let (_stop, stop) = tokio::sync::watch::channel(false);
        tokio::spawn(crate::tasks::revocations(Arc::clone(&api.0), stop));
        vera(&api).await;
        let token = CreateUserTokenRequest { name: "vera".into(), ..Default::default() };
        let token = api.create_user_token(call(token)).await.unwrap().into_inner().secret;
        let basic = base64::engine::general_purpose::STANDARD.encode(format!("x:{token}"));
        let shown = [format!("Bearer {token}"), format!("Basic {basic}")];
        let mut waiting = tokio::task::JoinSet::new();
        let mut answers = Vec::new();
        for shown in &shown {
            let response = door(&api.0).oneshot(request("/endless", shown)).await.unwrap();
            assert_eq!(response.status(), http::StatusCode::OK);
            answers.push(response.into_body());
            for path in ["/waited-for", "/upload"] {
                waiting.spawn(door(&api.0).oneshot(request(path, shown)));
            }
        }
        let early = tokio::time::timeout(Duration::from_millis(50), waiting.join_next()).await;
        assert!(early.is_err(), "one ended by itself");
        let revoke = RevokeUserRequest { name: "vera".into(), ..Default::default() };
        api.revoke_user(call(revoke)).await.unwrap();
        for mut body in answers {
            let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.unwrap();
            assert!(frame.unwrap().is_err(), "it ended as if it were whole");
            assert!(body.frame().await.is_none());
        }
        let all = tokio::time::timeout(Duration::from_secs(10), waiting.join_all()).await.unwrap();
        for response in all {
            assert_eq!(response.unwrap().status(), http::StatusCode::UNAUTHORIZED);
        }
    }

    #[tokio::test]
    async fn streams_of_users_and_hosts_end_when_the_server_stops() {
        let (_dir, api) = served();
        let (user, _) = vera(&api).await;
        let host = Caller { subject: "host/1".into(), ..Caller::default() };
        let mut bodies = [user, host].map(|caller| Standing::wrap(&api.0, caller, endless()));
        for body in &mut bodies {
            let going = tokio::time::timeout(Duration::from_millis(50), body.frame());
            assert!(going.await.is_err(), "it ended by itself");
        }
        api.0.stop();
        for mut body in bodies {
            let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await;
            let trailers = frame.unwrap().unwrap().unwrap().into_trailers().unwrap();
            assert_eq!(trailers["grpc-status"], "14");
        }
    }

    /// Pieces without end, and a word when they are let go.
    fn fed() -> (Body, tokio::sync::oneshot::Receiver<()>) {
        let (held, let_go) = tokio::sync::oneshot::channel();
        let pieces = futures_util::stream::repeat_with(move || {
            let _ = &held;
            Ok::<_, std::io::Error>(Bytes::from_static(b"x"))
        });
        (Body::from_stream(pieces), let_go)
    }

    #[tokio::test]
    async fn an_answer_that_nobody_reads_ends_with_its_callers_standing() {
        let (_dir, api) = served();
        let (_stop, stop) = tokio::sync::watch::channel(false);
        tokio::spawn(crate::tasks::revocations(Arc::clone(&api.0), stop));
        let (caller, _) = vera(&api).await;
        let (feed, mut let_go) = fed();
        let body = Standing::wrap(&api.0, caller, feed);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut let_go).await;
        assert!(early.is_err(), "it ended by itself");
        let revoke = RevokeUserRequest { name: "vera".into(), ..Default::default() };
        api.revoke_user(call(revoke)).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(10), let_go).await;
        assert!(ended.expect("what feeds it is held").is_err());
        // What was on its way, then why.
        let mut body = body;
        for _ in 0..ANSWER_FRAMES {
            assert!(body.frame().await.unwrap().unwrap().is_data());
        }
        assert!(end_of(body).await.contains("revoked"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_of_a_door_that_nobody_reads_is_given_up_and_a_call_is_not() {
        let begun = tokio::time::Instant::now();
        let nobody = || Box::pin(std::future::pending());
        let (feed, let_go) = fed();
        let mut body = Standing::ending(Ends::Broken, feed, nobody(), Some(UNTAKEN));
        assert!(let_go.await.is_err());
        assert_eq!(begun.elapsed().as_secs(), UNTAKEN.as_secs());
        assert!(body.frame().await.unwrap().is_err(), "it ended as if it were whole");
        assert!(body.frame().await.is_none());
        let (feed, mut let_go) = fed();
        let mut body = Standing::ending(Ends::Grpc, feed, nobody(), None);
        let rested = tokio::time::timeout(10 * UNTAKEN, &mut let_go).await;
        assert!(rested.is_err(), "a caller that rests is not given up");
        for _ in 0..100 {
            assert!(body.frame().await.unwrap().unwrap().is_data());
        }
        drop(body);
        assert!(let_go.await.is_err(), "nobody is left");
    }

    #[tokio::test]
    async fn whoever_revokes_itself_is_told_that_it_is_done_and_nothing_more() {
        let (_dir, api) = served();
        let (caller, _) = vera(&api).await;
        let frames = (0..5).map(|n| Ok::<_, std::io::Error>(Bytes::from(vec![n])));
        let ready = Body::from_stream(tokio_stream::iter(frames));
        let revoke = RevokeUserRequest { name: "vera".into(), ..Default::default() };
        api.revoke_user(call(revoke)).await.unwrap();
        // As it is: the answer is there after it was done.
        let mut body = Standing::wrap(&api.0, caller, ready);
        for n in 0..2 {
            let frame = body.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), vec![n]);
        }
        assert!(end_of(body).await.contains("revoked"));
    }

    #[tokio::test]
    async fn a_caller_nobody_knows_is_left_to_the_door() {
        use tower::ServiceExt as _;
        let (_dir, api) = served();
        let response = door(&api.0).oneshot(request("/endless", "Bearer nobody")).await.unwrap();
        assert_eq!(response.status(), http::StatusCode::OK);
    }
}
