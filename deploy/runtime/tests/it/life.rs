//! Start, stop, and the program itself.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use berth_runtime::model::LoadError;
use berth_runtime::serve::ServeError;

use crate::harness::{Server, fixture, sample};

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_without_a_model_ends_the_server_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path().to_path_buf(), &[]).await;
    let error = server.end().await.unwrap_err();
    assert!(matches!(error, ServeError::Load(LoadError::NoModel { .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_refused_by_name() {
    let server = Server::ready(sample("iris"), &[]).await;
    let address = server.address.to_string();
    let args = ["berth-runtime", "--listen", &address];
    let args = <berth_runtime::args::Command as clap::Parser>::try_parse_from(args).unwrap();
    let error = berth_runtime::serve::bind(args.serve).await.unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_progress_is_finished_after_the_stop() {
    let args = ["--request-timeout", "5m", "--shutdown-grace", "5m"];
    let mut server = Server::ready(fixture("slow"), &args).await;
    let mut client = server.grpc().await;
    let call =
        tokio::spawn(async move { client.model_infer(super::grpc::slow(200)).await.map(|_| ()) });
    let reached = async {
        while server.metric("berth_runtime_requests_in_progress").await < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, reached).await.unwrap();
    server.stop();
    server.ready.wait_for(|ready| !*ready).await.unwrap();
    call.await.unwrap().unwrap();
    let address = server.address;
    server.end().await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_outlasts_the_grace_period_is_cut_and_counted() {
    let args = ["--shutdown-grace", "0ms"];
    let mut server = Server::ready(fixture("slow"), &args).await;
    let mut client = server.grpc().await;
    let call = tokio::spawn(async move { client.model_infer(super::grpc::slow(300)).await });
    let reached = async {
        while server.metric("berth_runtime_requests_in_progress").await < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, reached).await.unwrap();
    server.stop();
    let ended = server.end().await;
    assert!(matches!(ended, Err(ServeError::Cut { requests: 1, .. })), "{ended:?}");
    call.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_and_idle_connections_do_not_hold_up_the_stop() {
    let mut server = Server::ready(sample("iris"), &["--shutdown-grace", "1h"]).await;
    let _silent = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let _idle = server.grpc().await;
    assert_eq!(server.get("/v2/health/live").await.0, 200);
    server.stop();
    server.end().await.unwrap();
}

/// The real program with its log; killed when the test fails.
struct Program {
    child: Child,
    log: BufReader<std::process::ChildStdout>,
}

impl Program {
    fn start(model: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_berth-runtime"))
            .env_clear()
            .args(["--listen", "127.0.0.1:0", "--log-format", "json", "--model-dir"])
            .arg(model)
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stdout.take().unwrap());
        Self { child, log }
    }

    /// Reads log lines until one has this message.
    fn wait_for(&mut self, message: &str) -> serde_json::Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "ended before {message:?}");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if line["message"] == message {
                return line;
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_program_gets_healthy_and_ends_with_0_on_sigterm() {
    let mut program = Program::start(&sample("iris"), &["--model-name", "iris"]);
    let address = program.wait_for("listening")["address"].as_str().unwrap().to_owned();
    let address: SocketAddr = address.parse().unwrap();
    program.wait_for("ready");
    let healthcheck = |address: SocketAddr| {
        Command::new(env!("CARGO_BIN_EXE_berth-runtime"))
            .args(["healthcheck", "--listen", &address.to_string()])
            .status()
            .unwrap()
            .code()
    };
    // The log line comes just before the state: ask until it is there.
    let start = std::time::Instant::now();
    while healthcheck(address) != Some(0) {
        assert!(start.elapsed() < crate::harness::PATIENCE);
    }
    let pid = rustix::process::Pid::from_child(&program.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    program.wait_for("stopped");
    assert_eq!(program.child.wait().unwrap().code(), Some(0));
    assert_eq!(healthcheck(address), Some(1));
}

#[test]
fn the_program_ends_with_1_and_a_reason_when_there_is_no_model() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.onnx"), b"not a model").unwrap();
    let mut program = Program::start(folder.path(), &[]);
    let mut log = String::new();
    program.log.read_to_string(&mut log).unwrap();
    assert_eq!(program.child.wait().unwrap().code(), Some(1));
    assert!(log.contains("cannot load the model") && log.contains("not an ONNX model"), "{log}");
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    let output = Command::new(env!("CARGO_BIN_EXE_berth-runtime"))
        .args(["--max-batch", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--max-batch"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_request_fails_while_a_busy_server_stops() {
    let mut server = Server::ready(sample("iris"), &["--model-name", "iris"]).await;
    let address = server.address;
    let body = Arc::new(std::fs::read(sample("iris").join("sample.json")).unwrap());
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let body = body.clone();
        callers.spawn(async move { call_until_refused(address, &body).await });
    }
    let busy = async {
        let ok = "berth_runtime_requests_total{protocol=\"http\",outcome=\"ok\"}";
        while server.metric(ok).await < 100.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, busy).await.unwrap();
    server.stop();
    server.end().await.unwrap();
    while let Some(answered) = callers.join_next().await {
        assert!(answered.unwrap() > 0);
    }
}

/// Calls on a new connection each time until none is taken; every connection that is taken must be
/// answered with 200 or closed without a byte (it was in the backlog when the port closed).
async fn call_until_refused(address: SocketAddr, body: &[u8]) -> usize {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let head = format!(
        "POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut answered = 0;
    loop {
        let Ok(mut stream) = tokio::net::TcpStream::connect(address).await else { return answered };
        let mut answer = Vec::new();
        if stream.write_all(head.as_bytes()).await.is_ok() && stream.write_all(body).await.is_ok() {
            let _ = stream.read_to_end(&mut answer).await;
        }
        if answer.is_empty() {
            continue;
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(&answer));
        answered += 1;
    }
}
