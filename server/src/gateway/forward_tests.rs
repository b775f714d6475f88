//! What is sent to another replica and what never is, with hosts that do as they are told.

use super::body::Payload;
use super::forward::{ForwardError, Forwarder, Onward, Repeat, Wire};
use super::names::Naming;
use super::route::{Backend, REQUESTS_OF_ONE, Ready, Routes};
use crate::session::reverse::ReverseHub;
use axum::body::Body;
use berth_proto::agent::host_service_server::{HostService, HostServiceServer};
use berth_proto::agent::*;
use berth_proto::ids::HostUid;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::BTreeMap;
use std::io::Error as IoError;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, DuplexStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Reached only when something is broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a replica does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Answers with its name.
    Answers,
    /// Takes no connection.
    Refuses,
    /// Takes the whole request and breaks the connection.
    Breaks,
    /// Is taken off the table before it does so, as one that is being stopped.
    LeavesAndBreaks,
    /// Its host's link breaks when the request is there.
    LosesItsLink,
    /// Breaks in the middle of its answer.
    BreaksInItsAnswer,
}

/// Replicas `r1` on host `h1` and `r2` on `h2`; `r1` is asked first.
struct Scene {
    routes: Arc<Routes>,
    hub: ReverseHub,
    does: BTreeMap<&'static str, Does>,
    /// Who was sent the whole request, in order.
    seen: Mutex<Vec<String>>,
    /// The first lines of those requests.
    lines: Mutex<Vec<String>>,
}

impl Scene {
    fn start(first: Does, second: Does) -> Arc<Self> {
        let scene = Arc::new(Self {
            routes: Arc::default(),
            hub: ReverseHub::default(),
            does: [("r1", first), ("r2", second)].into(),
            seen: Mutex::default(),
            lines: Mutex::default(),
        });
        for host in ["h1", "h2"] {
            let (tickets, mut asked) = mpsc::channel(4);
            scene.hub.attach(host.parse().unwrap(), 1, tickets);
            let scene = Arc::clone(&scene);
            tokio::spawn(async move {
                while let Some(open) = asked.recv().await {
                    scene.dials(host.parse().unwrap(), open.ticket).await;
                }
            });
        }
        scene.ready(&["r1", "r2"]);
        scene
    }

    /// Makes exactly these ready.
    fn ready(&self, replicas: &[&str]) {
        let backend = Backend {
            namespace: "default".into(),
            deployment: "app".into(),
            http_port: "http".into(),
            grpc_port: "http".into(),
            ..Backend::default()
        };
        let ready = replicas.iter().map(|replica| Ready {
            replica: replica.parse().unwrap(),
            host: replica.replace('r', "h").parse().unwrap(),
            version: String::new(),
            served: format!("app-{replica}"),
        });
        self.routes.replace([(backend, ready.collect())]);
    }

    /// As an agent does when it is given a ticket.
    async fn dials(self: &Arc<Self>, host: HostUid, ticket: String) {
        let (mut agent, server) = tokio::io::duplex(256 * 1024);
        let hello = ReverseHello { ticket, host_uid: host.to_string() }.encode_to_vec();
        agent.write_u32(u32::try_from(hello.len()).unwrap()).await.unwrap();
        agent.write_all(&hello).await.unwrap();
        let once = tokio_stream::once(Ok::<DuplexStream, IoError>(agent));
        let incoming = once.chain(tokio_stream::pending());
        let service = HostServiceServer::new(Host(Arc::clone(self)));
        tokio::spawn(
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming),
        );
        let hub = self.hub.clone();
        tokio::spawn(async move { hub.accept(&host, server).await });
    }

    async fn ask(&self, repeat: Repeat, body: Body, length: Option<u64>) -> Answer {
        // None kept beyond what is always kept: a body of more than 16 KiB streams.
        let payload = Payload::read(body, length, &Arc::new(Semaphore::new(0))).await.unwrap();
        let onward = Onward {
            model: "app".into(),
            version: String::new(),
            wire: Wire::Http1,
            repeat,
            naming: Naming::Nowhere,
            method: http::Method::POST,
            uri: "/x".parse().unwrap(),
            headers: http::HeaderMap::new(),
            payload,
            patience: Some(PATIENCE),
        };
        let forwarder = Forwarder::new(Arc::clone(&self.routes), self.hub.clone());
        match forwarder.send(onward).await {
            Ok(response) => match response.into_body().collect().await {
                Ok(body) => Answer::By(String::from_utf8(body.to_bytes().into()).unwrap()),
                Err(_) => Answer::Cut,
            },
            Err(ForwardError::Broken { .. }) => Answer::Broken,
            Err(other) => Answer::Other(other.to_string()),
        }
    }

    /// The whole request, of one that is kept and can be sent again.
    async fn ask_small(&self, repeat: Repeat) -> Answer {
        self.ask(repeat, Body::from("body"), Some(4)).await
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_that_cannot_be_reached_are_not_all_tried_past_a_callers_patience() {
    let scene = Scene::start(Does::Answers, Does::Answers);
    // Many, on a host that is told to dial and does not.
    let (tickets, _asked) = mpsc::channel(64);
    scene.hub.attach("h3".parse().unwrap(), 1, tickets);
    let backend = Backend {
        namespace: "default".into(),
        deployment: "app".into(),
        http_port: "http".into(),
        ..Backend::default()
    };
    let ready = (10..40).map(|n| Ready {
        replica: format!("r{n}").parse().unwrap(),
        host: "h3".parse().unwrap(),
        version: String::new(),
        served: "app".into(),
    });
    scene.routes.replace([(backend, ready.collect())]);
    let begun = tokio::time::Instant::now();
    let answer = scene.ask(Repeat::Never, Body::from("body"), Some(4)).await;
    assert!(matches!(answer, Answer::Other(_)), "{answer:?}");
    assert!(begun.elapsed() <= Duration::from_secs(26), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_deployment_that_hangs_leaves_the_others_their_places() {
    let scene = Scene::start(Does::Answers, Does::Answers);
    // One that is on a host that is told to dial and does not, and one that is well.
    let (tickets, _asked) = mpsc::channel(64);
    scene.hub.attach("h3".parse().unwrap(), 1, tickets);
    let of = |name: &str, replica: &str, host: &str| {
        let backend = Backend {
            namespace: "default".into(),
            deployment: name.into(),
            http_port: "http".into(),
            ..Backend::default()
        };
        let ready = Ready {
            replica: replica.parse().unwrap(),
            host: host.parse().unwrap(),
            version: String::new(),
            served: "app".into(),
        };
        (backend, vec![ready])
    };
    let table = || [of("app", "r3", "h3"), of("other", "r1", "h1")];
    scene.routes.replace(table());
    let forwarder = Forwarder::new(Arc::clone(&scene.routes), scene.hub.clone());
    let onward = |model: &str, patience| Onward {
        model: model.into(),
        version: String::new(),
        wire: Wire::Http1,
        repeat: Repeat::Never,
        naming: Naming::Nowhere,
        method: http::Method::POST,
        uri: "/x".parse().unwrap(),
        headers: http::HeaderMap::new(),
        payload: Payload::whole(Bytes::from("body"), None),
        patience: Some(patience),
    };
    let mut hanging = tokio::task::JoinSet::new();
    for _ in 0..4 * REQUESTS_OF_ONE {
        let (forwarder, onward) = (forwarder.clone(), onward("app", PATIENCE));
        hanging.spawn(async move { forwarder.send(onward).await.map(|_| ()) });
    }
    // Also over a new table.
    scene.routes.replace(table());
    let left = || scene.routes.backend("app").unwrap().places.0.available_permits();
    for _ in 0..100_000 {
        if left() == 0 {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(left(), 0);
    let second = Duration::from_secs(1);
    let served = forwarder.send(onward("other", second)).await.unwrap();
    let body = served.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "r1");
    // Its own callers wait, as they would for any place.
    let late = forwarder.send(onward("app", second)).await.map(|_| ()).unwrap_err();
    assert!(matches!(late, ForwardError::TimedOut(_)), "{late}");
    hanging.shutdown().await;
    assert_eq!(left(), REQUESTS_OF_ONE);
}

/// What the caller gets.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    By(String),
    /// The head of an answer, and a body that broke off.
    Cut,
    Broken,
    Other(String),
}

fn by(replica: &str) -> Answer {
    Answer::By(replica.to_owned())
}

struct Host(Arc<Scene>);

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Whether a request of HTTP/1.1 that announces its length is here as a whole.
fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    length.is_some_and(|length| body.len() == length.parse::<usize>().unwrap())
}

#[tonic::async_trait]
impl HostService for Host {
    type DialStream = Sent<DialResponse>;

    async fn dial(
        &self,
        request: Request<Streaming<DialRequest>>,
    ) -> Result<Response<Self::DialStream>, Status> {
        let mut incoming = request.into_inner();
        let Some(dial_request::Item::Start(start)) = incoming.message().await?.and_then(|m| m.item)
        else {
            return Err(Status::invalid_argument("start"));
        };
        let scene = Arc::clone(&self.0);
        let replica = start.replica_uid;
        let does = scene.does[replica.as_str()];
        if does == Does::Refuses {
            return Err(Status::unavailable("refused"));
        }
        let (tx, rx) = mpsc::channel(4);
        tokio::spawn(async move {
            let say = |text: String| Ok(DialResponse { data: text.into_bytes() });
            let _ = tx.send(say(String::new())).await;
            let mut got = Vec::new();
            while !is_whole(&got) {
                match incoming.message().await.ok().flatten().and_then(|m| m.item) {
                    Some(dial_request::Item::Data(data)) => got.extend(data),
                    Some(dial_request::Item::Start(_)) | None => return,
                }
            }
            let text = String::from_utf8_lossy(&got);
            scene.lines.lock().extend(text.lines().next().map(str::to_owned));
            scene.seen.lock().push(replica.clone());
            let head =
                |length: usize| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
            match does {
                Does::Answers => {
                    let _ = tx.send(say(head(replica.len()) + &replica)).await;
                }
                Does::BreaksInItsAnswer => {
                    let _ = tx.send(say(head(100) + &replica)).await;
                }
                Does::LeavesAndBreaks => scene.ready(&["r2"]),
                Does::LosesItsLink => scene.hub.cut(&replica.replace('r', "h").parse().unwrap()),
                Does::Breaks | Does::Refuses => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    type LogsStream = Sent<LogsResponse>;
    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        Err(Status::unimplemented("logs"))
    }
    type ExecStream = Sent<HostServiceExecResponse>;
    async fn exec(
        &self,
        _: Request<Streaming<HostServiceExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        Err(Status::unimplemented("exec"))
    }
    async fn usage(&self, _: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        Err(Status::unimplemented("usage"))
    }
}

#[tokio::test]
async fn only_what_harms_nobody_is_sent_to_another_replica() {
    use Repeat::{Harmless, Never};
    let two: &[&str] = &["r1", "r2"];
    // What r1 does, may it be sent twice, what the caller gets, who saw the whole request.
    for (does, repeat, answer, seen) in [
        (Does::Answers, Never, by("r1"), &two[..1]),
        // Nothing was sent: anything may go elsewhere.
        (Does::Refuses, Harmless, by("r2"), &two[1..]),
        (Does::Refuses, Never, by("r2"), &two[1..]),
        // A request that may have killed a replica does not get the next one.
        (Does::Breaks, Harmless, Answer::Broken, &two[..1]),
        (Does::Breaks, Never, Answer::Broken, &two[..1]),
        // The replica is not to blame, and the request changes nothing.
        (Does::LeavesAndBreaks, Harmless, by("r2"), two),
        (Does::LosesItsLink, Harmless, by("r2"), two),
        // What it changes is not known.
        (Does::LeavesAndBreaks, Never, Answer::Broken, &two[..1]),
        (Does::LosesItsLink, Never, Answer::Broken, &two[..1]),
        // A part of the answer is with the caller already.
        (Does::BreaksInItsAnswer, Harmless, Answer::Cut, &two[..1]),
    ] {
        let scene = Scene::start(does, Does::Answers);
        let got = tokio::time::timeout(PATIENCE, scene.ask_small(repeat)).await.unwrap();
        assert_eq!(got, answer, "{does:?} {repeat:?}");
        assert_eq!(*scene.seen.lock(), *seen, "{does:?} {repeat:?}");
    }
}

#[tokio::test]
async fn a_body_that_is_not_kept_is_sent_once() {
    let size = 100_000;
    for (does, answer) in [
        (Does::Refuses, by("r2")),
        (Does::LeavesAndBreaks, Answer::Broken),
        (Does::LosesItsLink, Answer::Broken),
    ] {
        let scene = Scene::start(does, Does::Answers);
        let piece = Bytes::from(vec![b'x'; size / 10]);
        let pieces = (0..10).map(move |_| Ok::<_, IoError>(piece.clone()));
        let body = Body::from_stream(tokio_stream::iter(pieces));
        let asked = scene.ask(Repeat::Harmless, body, Some(size as u64));
        assert_eq!(tokio::time::timeout(PATIENCE, asked).await.unwrap(), answer, "{does:?}");
        assert_eq!(scene.seen.lock().len(), 1, "{does:?}");
    }
}

#[tokio::test]
async fn a_replica_that_is_about_to_be_ready_is_waited_for() {
    let scene = Scene::start(Does::Refuses, Does::Answers);
    scene.ready(&[]);
    let asking = tokio::spawn({
        let scene = Arc::clone(&scene);
        async move { scene.ask_small(Repeat::Never).await }
    });
    // Whichever comes first, the request or the replica: the request ends there.
    tokio::task::yield_now().await;
    scene.ready(&["r2"]);
    assert_eq!(tokio::time::timeout(PATIENCE, asking).await.unwrap().unwrap(), by("r2"));
}

#[tokio::test]
async fn what_no_deployment_serves_is_said_at_once() {
    let scene = Scene::start(Does::Answers, Does::Answers);
    scene.routes.replace([]);
    let told =
        Answer::Other("no deployment with a port (spec.ports) serves a model \"app\"".into());
    assert_eq!(scene.ask_small(Repeat::Harmless).await, told);
}

#[tokio::test]
async fn each_replica_is_asked_for_the_model_by_the_name_it_knows() {
    // Of a rollout from one name to the other, and the first is not reached.
    let scene = Scene::start(Does::Refuses, Does::Answers);
    let onward = Onward {
        model: "app".into(),
        version: String::new(),
        wire: Wire::Http1,
        repeat: Repeat::Never,
        naming: Naming::Path,
        method: http::Method::POST,
        uri: "/v2/models/app/infer?x=app".parse().unwrap(),
        headers: http::HeaderMap::new(),
        payload: Payload::whole(Bytes::from("body"), None),
        patience: Some(PATIENCE),
    };
    let forwarder = Forwarder::new(Arc::clone(&scene.routes), scene.hub.clone());
    forwarder.send(onward).await.unwrap();
    assert_eq!(*scene.lines.lock(), ["POST /v2/models/app-r2/infer?x=app HTTP/1.1"]);
}
