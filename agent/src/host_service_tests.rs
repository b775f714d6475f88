use super::*;
use crate::engine::fake::FakeEngine;
use crate::engine::{Call, ContainerSpec};
use crate::state::Running;
use crate::store::Store;
use berth_proto::agent::host_service_client::HostServiceClient;
use berth_proto::agent::host_service_server::HostServiceServer;
use berth_proto::ids::Wall;
use berth_proto::record::AgentIdentityFile;
use berth_proto::values::HostPolicy;
use berth_proto::{api, convert};
use prost::Message as _;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

async fn served(engine: &FakeEngine) -> (tempfile::TempDir, Served, String) {
    served_by(engine, HostPolicy::default()).await
}

async fn served_by(engine: &FakeEngine, policy: HostPolicy) -> (tempfile::TempDir, Served, String) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let identity = AgentIdentityFile { cluster: "c".into(), ..Default::default() };
    store.put_identity(&identity).unwrap();
    let shared = Arc::new(Shared::open(store, policy).unwrap());
    engine.add_image("sha256:i", &[]);
    let spec = ContainerSpec::new(&shared.cluster, "n", "sha256:i");
    let id = engine.create(&spec).await.unwrap();
    engine.start(&id).await.unwrap();
    let uid: ReplicaUid = "r".parse().unwrap();
    shared.inner.lock().containers.insert(uid, vec![(id.clone(), 1)]);
    (folder, Served { shared, engine: Arc::new(engine.clone()) }, id)
}

/// A refusal's code and stable word.
fn said(status: &Status) -> (tonic::Code, &'static str) {
    let known = [
        "REPLICA_NOT_FOUND",
        "ATTEMPT_NOT_FOUND",
        "REPLICA_NOT_RUNNING",
        "EXEC_FORBIDDEN",
        "EXEC_FAILED",
        "LOGS_FAILED",
        "INVALID",
        "PORT_NOT_FOUND",
        "PORT_REFUSED",
        "ENGINE_AWAY",
    ];
    let info = status.get_details_error_info().expect("a refusal has a reason");
    assert_eq!(info.domain, "berth");
    let word = known.into_iter().find(|word| *word == info.reason);
    (status.code(), word.unwrap_or_else(|| panic!("{info:?}")))
}

async fn texts(stream: &mut Sent<LogsResponse>) -> Vec<String> {
    let waiting = tokio::time::timeout(Duration::from_secs(3600), stream.next());
    let lines = waiting.await.expect("a line").unwrap().unwrap().lines;
    lines.into_iter().map(|l| String::from_utf8(l.text).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_follower_outlives_an_engine_that_stalls_or_breaks_off_and_gets_each_line_once() {
    let engine = FakeEngine::new();
    let (_folder, served, id) = served(&engine).await;
    engine.set_time(Wall(1_000));
    engine.write_log(&id, Source::Stdout, "one\n");
    let request = LogsRequest { replica_uid: "r".into(), follow: true, ..Default::default() };
    let mut stream = served.logs(Request::new(request)).await.unwrap().into_inner();
    assert_eq!(texts(&mut stream).await, ["one"]);
    // Silence: it asks anew, the engine refuses twice, and it goes on where it was.
    let refused = || EngineError::Unreachable("reset".into());
    engine.fail_next(Call::Logs, refused());
    engine.fail_next(Call::Logs, refused());
    let asked = || engine.calls().iter().filter(|(call, _)| *call == Call::Logs).count();
    let anew = async {
        while asked() < 4 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(300), anew).await.expect("to be asked anew");
    engine.set_time(Wall(2_000));
    engine.write_log(&id, Source::Stdout, "two\n");
    assert_eq!(texts(&mut stream).await, ["two"]);
}

#[tokio::test]
async fn only_replicas_of_this_host_can_be_read() {
    let engine = FakeEngine::new();
    let (_folder, served, id) = served(&engine).await;
    for name in [id.as_str(), "other", "../r", ""] {
        let request = LogsRequest { replica_uid: name.into(), ..Default::default() };
        let Err(status) = served.logs(Request::new(request)).await else { panic!("{name}") };
        assert_eq!(said(&status), (tonic::Code::NotFound, "REPLICA_NOT_FOUND"), "{name}");
    }
}

#[tokio::test]
async fn why_no_lines_come_is_told_apart() {
    use tonic::Code::{FailedPrecondition, NotFound, Unavailable};
    let engine = FakeEngine::new();
    let (_folder, served, _) = served(&engine).await;
    let other = EngineError::Other { status: 501, message: "no such driver".into() };
    for (error, told) in [
        (EngineError::NotFound("gone".into()), (NotFound, "ATTEMPT_NOT_FOUND")),
        (EngineError::Unreachable("reset".into()), (Unavailable, "ENGINE_AWAY")),
        (other, (FailedPrecondition, "LOGS_FAILED")),
    ] {
        engine.fail_next(Call::Logs, error);
        let request = LogsRequest { replica_uid: "r".into(), ..Default::default() };
        let mut stream = served.logs(Request::new(request)).await.unwrap().into_inner();
        assert_eq!(said(&stream.next().await.unwrap().unwrap_err()), told);
    }
}

/// A replica "r" runs, its port "http" being `port` on this machine.
fn runs(served: &Served, id: &str, port: u16) {
    let bytes = AssignmentBody {
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
    let one = Running { id: id.into(), ip: Some([127, 0, 0, 1].into()), body, attempt: 1 };
    served.shared.inner.lock().running.insert("r".parse().unwrap(), one);
}

async fn client(served: Served) -> HostServiceClient<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let service = HostServiceServer::new(served);
    tokio::spawn(
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming),
    );
    HostServiceClient::connect(address).await.unwrap()
}

fn begin(replica: &str, tty: bool) -> HostServiceExecRequest {
    let start = HostExecStart {
        replica_uid: replica.into(),
        command: vec!["say".into(), "hello".into()],
        tty,
        size: tty.then_some(api::TerminalSize { width: 80, height: 24 }),
    };
    HostServiceExecRequest { item: Some(host_service_exec_request::Item::Start(start)) }
}

#[tokio::test]
async fn a_command_runs_with_and_without_a_terminal_and_tells_its_end() {
    use host_service_exec_response::Item;
    let engine = FakeEngine::new();
    engine.set_exec_code(3);
    let (_folder, served, id) = served(&engine).await;
    runs(&served, &id, 80);
    let mut client = client(served).await;
    for tty in [false, true] {
        let ask = tokio_stream::iter([begin("r", tty)]);
        let answer = client.exec(ask).await.unwrap().into_inner();
        let items: Vec<_> = answer.map(|m| m.unwrap().item.unwrap()).collect().await;
        assert_eq!(items, [Item::Stdout(b"say hello\n".to_vec()), Item::ExitCode(3)]);
    }
    let status = client.exec(tokio_stream::iter([begin("other", false)])).await.unwrap_err();
    assert_eq!(said(&status), (tonic::Code::FailedPrecondition, "REPLICA_NOT_RUNNING"));
    engine.fail_next(Call::Exec, EngineError::NotFound("say".into()));
    let status = client.exec(tokio_stream::iter([begin("r", false)])).await.unwrap_err();
    assert_eq!(said(&status), (tonic::Code::FailedPrecondition, "EXEC_FAILED"));
    engine.fail_next(Call::Exec, EngineError::Unreachable("reset".into()));
    let status = client.exec(tokio_stream::iter([begin("r", false)])).await.unwrap_err();
    assert_eq!(said(&status), (tonic::Code::Unavailable, "ENGINE_AWAY"));
    let status = client.exec(tokio_stream::iter([])).await.unwrap_err();
    assert_eq!(said(&status), (tonic::Code::InvalidArgument, "INVALID"));
}

#[tokio::test]
async fn what_is_typed_reaches_the_command_in_order_and_its_end_ends_it() {
    use host_service_exec_request::Item as In;
    use host_service_exec_response::Item as Out;
    let engine = FakeEngine::new();
    let (_folder, served, id) = served(&engine).await;
    runs(&served, &id, 80);
    let mut client = client(served).await;
    let start = HostExecStart {
        replica_uid: "r".into(),
        command: vec!["cat".into()],
        ..HostExecStart::default()
    };
    // More than what is held on the way, so that it must flow.
    let typed: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut items = vec![In::Start(start)];
    items.extend(typed.chunks(FRAME).map(|piece| In::Stdin(piece.to_vec())));
    items.push(In::Stdin(Vec::new()));
    let requests = items.into_iter().map(|item| HostServiceExecRequest { item: Some(item) });
    // The stream stays open, as a terminal's does: the end of the input is a message.
    let ask = tokio_stream::iter(requests.collect::<Vec<_>>())
        .chain(futures_util::stream::pending::<HostServiceExecRequest>());
    let mut answer = client.exec(ask).await.unwrap().into_inner();
    let mut out = Vec::new();
    let code = loop {
        let next = tokio::time::timeout(Duration::from_secs(30), answer.next()).await;
        match next.expect("an answer").unwrap().unwrap().item.unwrap() {
            Out::Stdout(bytes) => out.extend(bytes),
            Out::Stderr(bytes) => panic!("{bytes:?}"),
            Out::ExitCode(code) => break code,
        }
    };
    assert_eq!(code, 0);
    assert!(out == typed, "{} of {} bytes came back", out.len(), typed.len());
}

#[tokio::test]
async fn whoever_leaves_a_command_lets_go_of_it() {
    let engine = FakeEngine::new();
    let (_folder, served, id) = served(&engine).await;
    runs(&served, &id, 80);
    let mut client = client(served).await;
    let start = HostExecStart {
        replica_uid: "r".into(),
        command: vec!["hang".into()],
        ..Default::default()
    };
    let start =
        HostServiceExecRequest { item: Some(host_service_exec_request::Item::Start(start)) };
    let (say, heard) = mpsc::channel(1);
    say.send(start).await.unwrap();
    let answer = client.exec(ReceiverStream::new(heard)).await.unwrap();
    assert_eq!(engine.attached(), 1);
    drop((answer, say));
    let gone = async {
        while engine.attached() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the output to be let go");
}

#[tokio::test]
async fn a_host_that_forbids_commands_runs_none() {
    let engine = FakeEngine::new();
    let policy = HostPolicy { forbid_exec: true, ..HostPolicy::default() };
    let (_folder, served, id) = served_by(&engine, policy).await;
    runs(&served, &id, 80);
    let mut client = client(served).await;
    let status = client.exec(tokio_stream::iter([begin("r", false)])).await.unwrap_err();
    assert_eq!(said(&status), (tonic::Code::PermissionDenied, "EXEC_FORBIDDEN"));
    assert!(!engine.calls().iter().any(|(call, _)| *call == Call::Exec));
}

#[tokio::test]
async fn dialling_reaches_named_ports_of_our_replicas_and_nothing_else() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    let engine = FakeEngine::new();
    let (_folder, served, id) = served(&engine).await;
    runs(&served, &id, port);
    let mut client = client(served).await;
    let ask = |replica: &str, port: &str, data: &[u8]| {
        let start = DialStart { replica_uid: replica.into(), port: port.into() };
        tokio_stream::iter([
            DialRequest { item: Some(dial_request::Item::Start(start)) },
            DialRequest { item: Some(dial_request::Item::Data(data.to_vec())) },
        ])
    };
    let answer = client.dial(ask("r", "http", b"hello")).await.unwrap().into_inner();
    let pieces: Vec<Vec<u8>> = answer.map(|m| m.unwrap().data).collect().await;
    assert_eq!((pieces[0].as_slice(), pieces.concat().as_slice()), (&b""[..], &b"hello"[..]));
    let wrong = [
        ("r", "other", tonic::Code::NotFound, "PORT_NOT_FOUND"),
        ("other", "http", tonic::Code::FailedPrecondition, "REPLICA_NOT_RUNNING"),
        ("127.0.0.1", "http", tonic::Code::NotFound, "REPLICA_NOT_FOUND"),
    ];
    for (replica, port, code, reason) in wrong {
        let status = client.dial(ask(replica, port, b"")).await.unwrap_err();
        assert_eq!(said(&status), (code, reason), "{replica} {port}");
    }
}
