use super::*;
use crate::engine::fake::FakeEngine;
use crate::engine::{Call, ContainerSpec};
use berth_proto::{agent, api, convert};
use prost::Message as _;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

fn running(port: u16, id: &str) -> Running {
    let bytes = agent::AssignmentBody {
        deployment_uid: "d".into(),
        deployment: "d".into(),
        namespace: "default".into(),
        release: 1,
        source: Some(api::ResolvedSource {
            image: Some(api::ResolvedImage {
                digest: berth_proto::ids::Digest::of(b"i").to_string(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        spec: Some(api::DeploymentSpec {
            source: Some(api::deployment_spec::Source::Image("i".into())),
            ports: vec![api::Port {
                name: "http".into(),
                container: port.into(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    }
    .encode_to_vec();
    let body = Arc::new(convert::assignment_body_from_bytes(&bytes).unwrap());
    Running { id: id.into(), ip: Some([127, 0, 0, 1].into()), body, attempt: 1 }
}

fn ask_by(probe: Probe) -> HealthCheck {
    HealthCheck {
        probe,
        interval_ms: 1_000,
        timeout_ms: 500,
        failures: 1,
        startup_ms: 0,
        restart_after_ms: None,
    }
}

async fn asked(probe: Probe, port: u16) -> Outcome {
    check(&FakeEngine::new(), &Unended::default(), &running(port, "c"), &ask_by(probe)).await
}

fn says(outcome: &Outcome, words: &str) -> bool {
    matches!(outcome, Outcome::Unhealthy(said) if said.contains(words))
}

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port nobody listens on.
async fn closed() -> u16 {
    listener().await.1
}

#[tokio::test]
async fn tcp_is_healthy_when_the_port_is_open() {
    let tcp = |port: &str| Probe::Tcp { port: port.into() };
    let (_held, port) = listener().await;
    assert_eq!(asked(tcp("http"), port).await, Outcome::Healthy);
    assert!(says(&asked(tcp("http"), closed().await).await, "refused"));
    assert!(says(&asked(tcp("other"), port).await, "no port \"other\""));
}

#[tokio::test]
async fn http_is_healthy_from_200_to_399_within_the_timeout() {
    let (held, port) = listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = held.accept().await {
            let mut text = [0; 1024];
            let read = stream.read(&mut text).await.unwrap_or(0);
            let text = String::from_utf8_lossy(&text[..read]).into_owned();
            let code = match text.split(' ').nth(1) {
                Some("/ready") => "200 OK",
                Some("/moved") => "302 Found",
                Some("/hangs") => {
                    // Says nothing until the other side has gone.
                    let _ = stream.read(&mut [0; 1]).await;
                    continue;
                }
                _ => "503 Service Unavailable",
            };
            let answer = format!("HTTP/1.1 {code}\r\ncontent-length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let http = |path: &str| asked(Probe::Http { path: path.into(), port: "http".into() }, port);
    assert_eq!(http("/ready").await, Outcome::Healthy);
    assert_eq!(http("/moved").await, Outcome::Healthy);
    assert!(says(&http("/else").await, "503"));
    assert!(says(&http("/hangs").await, "no answer within 500 ms"));
}

#[tokio::test]
async fn grpc_is_healthy_when_the_standard_service_says_serving() {
    use tonic_health::ServingStatus;
    let (held, port) = listener().await;
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("up", ServingStatus::Serving).await;
    reporter.set_service_status("down", ServingStatus::NotServing).await;
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(held);
    tokio::spawn(
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming),
    );
    let grpc =
        |service: &str| asked(Probe::Grpc { port: "http".into(), service: service.into() }, port);
    assert_eq!(grpc("up").await, Outcome::Healthy);
    assert_eq!(grpc("").await, Outcome::Healthy);
    assert!(says(&grpc("down").await, "SERVING"));
    assert!(says(&grpc("unknown").await, "SERVING"));
}

#[tokio::test]
async fn exec_is_healthy_at_code_0_and_an_engine_that_is_away_says_nothing_of_the_program() {
    let engine = FakeEngine::new();
    engine.add_image("sha256:i", &[]);
    let cluster = "c".parse().unwrap();
    let id = engine.create(&ContainerSpec::new(&cluster, "n", "sha256:i")).await.unwrap();
    engine.start(&id).await.unwrap();
    let unended = Unended::default();
    let (replica, exec) = (running(80, &id), ask_by(Probe::Exec { command: vec!["check".into()] }));
    assert_eq!(check(&engine, &unended, &replica, &exec).await, Outcome::Healthy);
    engine.set_exec_code(3);
    assert!(says(&check(&engine, &unended, &replica, &exec).await, "ended with 3"));
    engine.hang_next(Call::Exec);
    assert_eq!(check(&engine, &unended, &replica, &exec).await, Outcome::NotAsked);
    engine.go_away();
    assert_eq!(check(&engine, &unended, &replica, &exec).await, Outcome::NotAsked);
}

#[tokio::test(start_paused = true)]
async fn a_check_by_a_command_that_hangs_is_not_begun_again_beside_itself() {
    let engine = FakeEngine::new();
    engine.add_image("sha256:i", &[]);
    let cluster = "c".parse().unwrap();
    let id = engine.create(&ContainerSpec::new(&cluster, "n", "sha256:i")).await.unwrap();
    engine.start(&id).await.unwrap();
    let unended = Unended::default();
    let (replica, exec) = (running(80, &id), ask_by(Probe::Exec { command: vec!["hang".into()] }));
    assert!(says(&check(&engine, &unended, &replica, &exec).await, "no answer within"));
    let begun = || engine.calls().iter().filter(|c| c.0 == Call::Exec && c.1 == id).count();
    for _ in 0..3 {
        assert!(says(&check(&engine, &unended, &replica, &exec).await, "of last time"));
    }
    assert_eq!(begun(), 1);
    engine.end_hung();
    check(&engine, &unended, &replica, &exec).await;
    assert_eq!(begun(), 2);
    unended.retain(|_| false);
    check(&engine, &unended, &replica, &exec).await;
    assert_eq!(begun(), 3, "a container that is gone is forgotten");
}

#[tokio::test]
async fn a_health_service_that_answers_without_end_is_not_listened_to() {
    let (held, port) = listener().await;
    tokio::spawn(async move {
        let (stream, _) = held.accept().await.unwrap();
        let service = hyper::service::service_fn(|_| async {
            let body = Full::new(Bytes::from(vec![0_u8; 4 * GRPC_ANSWER]));
            Ok::<_, std::convert::Infallible>(http::Response::new(body))
        });
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    });
    let grpc = Probe::Grpc { port: "http".into(), service: String::new() };
    assert!(says(&asked(grpc, port).await, "limit"));
}
