//! Writes the corpora that fuzzing begins with: small messages and records as the code itself encodes
//! them. `cargo run -p berth-tests --bin seeds` after a message has changed; the files are kept.
#![expect(clippy::unwrap_used, reason = "it stops at the first thing that is not as it must be")]

use berth_proto::agent::{self, session_request, session_response};
use berth_proto::convert::{
    assignment_body_from_bytes, deployment_spec_to_write, duration, timestamp,
};
use berth_proto::ids::{Digest, Wall};
use berth_proto::sets::set_digest;
use berth_proto::{api, record};
use berth_server_core::change::Change;
use prost::Message;
use std::path::PathBuf;

/// The kinds of records in the order of the target `records`.
const KINDS: [&str; 15] = [
    "cluster",
    "deployment",
    "release",
    "replica",
    "host",
    "model",
    "version",
    "user",
    "usertoken",
    "jointoken",
    "request",
    "event",
    "audit",
    "aliasmove",
    "hostset",
];

fn put(target: &str, name: &str, bytes: &[u8]) {
    // What the fuzzer takes at once.
    assert!(bytes.len() <= 16_384, "{target}/{name} has {} bytes", bytes.len());
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&corpus).unwrap();
    std::fs::write(corpus.join(name), bytes).unwrap();
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn spec() -> api::DeploymentSpec {
    let second = |s: u64| Some(duration(s * 1000));
    let spec = api::DeploymentSpec {
        source: Some(api::deployment_spec::Source::Model(text("iris:1"))),
        replicas: Some(2),
        placement: Some(api::Placement {
            require: vec![text("arch in (amd64, arm64)"), text("!spot")],
            spread: text("zone"),
        }),
        resources: Some(api::Resources {
            cpu_millis: 500,
            memory_bytes: 64 << 20,
            ..Default::default()
        }),
        ports: vec![api::Port {
            name: text("http"),
            container: 8080,
            host_port: 80,
            bind: text("0.0.0.0"),
        }],
        env: [(text("A"), text("b"))].into(),
        mounts: vec![api::Mount { source: text("/srv"), target: text("/data"), writable: true }],
        health: Some(api::HealthCheck {
            check: Some(api::health_check::Check::Http(api::HttpCheck {
                path: text("/ready"),
                port: text("http"),
            })),
            interval: second(1),
            timeout: second(1),
            failures: 2,
            startup: second(10),
            restart_after: second(60),
        }),
        restart: Some(api::RestartPolicy { min_backoff: second(1), ..Default::default() }),
        rollout: Some(api::RolloutPolicy { max_surge: Some(2), ..Default::default() }),
        stop_grace: second(5),
        privileges: Some(api::Privileges { devices: vec![text("/dev/kvm")], ..Default::default() }),
        ..Default::default()
    };
    deployment_spec_to_write(&spec).unwrap();
    spec
}

fn pins() -> api::ResolvedSource {
    let digest = |of: &str| Digest::of(of.as_bytes()).to_string();
    api::ResolvedSource {
        image: Some(api::ResolvedImage {
            registry: text("r:5000"),
            repository: text("runtime"),
            digest: digest("image"),
            platforms: vec![api::PlatformImage {
                arch: text("amd64"),
                os: text("linux"),
                manifest_digest: digest("manifest"),
                config_digest: digest("config"),
                size_bytes: 9,
            }],
        }),
        artifact: Some(api::ResolvedArtifact {
            model: text("iris"),
            version: text("1"),
            repository: text("models/iris"),
            digest: digest("artifact"),
            size_bytes: 7,
            format: text("onnx"),
        }),
        model_version: text("1"),
    }
}

fn body() -> Vec<u8> {
    let body = agent::AssignmentBody {
        deployment_uid: text("0"),
        deployment: text("iris"),
        namespace: text("default"),
        release: 1,
        requires: vec![text("f")],
        source: Some(pins()),
        spec: Some(spec()),
        system_env: [(text("BERTH"), text("1"))].into(),
        artifact_target: text("/model"),
    };
    let bytes = body.encode_to_vec();
    assignment_body_from_bytes(&bytes).unwrap();
    bytes
}

fn facts() -> api::HostFacts {
    api::HostFacts {
        arch: text("amd64"),
        os: text("linux"),
        capacity: Some(api::Resources {
            cpu_millis: 4_000,
            memory_bytes: 1 << 33,
            gpu_memory_bytes: 0,
        }),
        labels: [(text("zone"), text("a"))].into(),
        engine: text("docker 20.10"),
        engine_available: true,
        features: vec![text("f")],
        policy: Some(api::HostPolicy {
            mount_folders: vec![text("/srv")],
            publish_addresses: vec![text("127.0.0.1"), text("::1")],
            ..Default::default()
        }),
        used_ports: vec![22],
        ..Default::default()
    }
}

fn exit() -> api::Exit {
    api::Exit {
        attempt: 2,
        code: 137,
        out_of_memory: true,
        last_line: text("killed"),
        time: Some(timestamp(Wall(1_700_000_000_123))),
    }
}

fn status() -> api::ReplicaStatus {
    api::ReplicaStatus {
        attempt: 3,
        phase: api::ReplicaPhase::Running as i32,
        ready: true,
        reason: text("EXITED"),
        message: text("it ended"),
        progress: Some(api::Progress {
            done_bytes: 1,
            total_bytes: 2,
            what: text("image"),
            ..Default::default()
        }),
        last_exit: Some(exit()),
        start_time: Some(timestamp(Wall(1_700_000_000_123))),
        container_id: text("c"),
        ..Default::default()
    }
}

fn entry() -> agent::SetEntry {
    agent::SetEntry {
        replica_uid: text("r"),
        body_digest: Digest::of(&body()).to_string(),
        deployment_uid: text("0"),
        release: 1,
        slot: 1,
        attempt_floor: 2,
        replaces: Some(agent::Replaces { replica_uid: text("before"), ready_within_ms: 9_000 }),
    }
}

const ID: agent::SetId = agent::SetId { epoch: 7, generation: 3 };

fn values() {
    let all = [
        ("spec", spec().encode_to_vec()),
        ("pins", pins().encode_to_vec()),
        ("body", body()),
        ("facts", facts().encode_to_vec()),
        ("status", status().encode_to_vec()),
        ("exit", exit().encode_to_vec()),
    ];
    for (kind, (name, bytes)) in (0_u8..).zip(all) {
        put("values", name, &[&[kind], &bytes[..]].concat());
    }
}

/// Each behind its length and the time that has passed.
fn framed<M: Message>(first: u8, messages: &[M]) -> Vec<u8> {
    let mut all = vec![first];
    for message in messages {
        let bytes = message.encode_to_vec();
        all.extend(u16::try_from(bytes.len()).unwrap().to_le_bytes());
        all.push(1);
        all.extend(bytes);
    }
    all
}

/// A whole set as the server sends it.
fn set() -> Vec<agent::SessionResponse> {
    use session_response::Item;
    let begin = agent::SetBegin { id: Some(ID), entries: 1, bodies: 1 };
    let page = agent::SetPage { entries: vec![entry()], bodies: vec![body()] };
    let end = agent::SetEnd { id: Some(ID), digest: set_digest(&[entry()]).to_string() };
    [Item::SetBegin(begin), Item::SetPage(page), Item::SetEnd(end)]
        .map(|item| agent::SessionResponse { item: Some(item) })
        .into()
}

fn messages() {
    use {session_request::Item as Asked, session_response::Item as Told};
    let time = Some(timestamp(Wall(1_000_000)));
    let report = agent::ReplicaReport {
        replica_uid: text("r"),
        deployment_uid: text("0"),
        release: 1,
        body_digest: Digest::of(&body()).to_string(),
        status: Some(status()),
        assigned: true,
        slot: 1,
        deployment: text("iris"),
        namespace: text("team"),
    };
    let hello = agent::Hello {
        host_uid: text("h"),
        instance: text("i"),
        boot_id: text("b"),
        agent_start: 1,
        held: Some(ID),
        observed: vec![report.clone()],
        observed_pages: 1,
        facts: Some(facts()),
        time,
        engine_observed: true,
        ..Default::default()
    };
    let page = agent::ObservedPage { number: 1, observed: vec![report.clone()], bodies: vec![] };
    let ack = agent::SetAck {
        id: Some(ID),
        verdict: agent::SetVerdict::Taken as i32,
        held: Some(ID),
        ..Default::default()
    };
    let statuses =
        agent::Statuses { sequence: 1, reports: vec![report], absent: vec![text("gone")] };
    let asked = [
        Asked::Hello(hello),
        Asked::Observed(page),
        Asked::SetAck(ack),
        Asked::Statuses(statuses),
        Asked::Ping(agent::Ping { id: 1, time }),
        Asked::Pong(agent::Pong { id: 1, time }),
        Asked::TrustAck(agent::TrustAck { version: 1 }),
    ]
    .map(|item| agent::SessionRequest { item: Some(item) });
    put("messages", "agent", &framed(0, &asked));
    let welcome = agent::Welcome {
        epoch: 7,
        ping_interval_ms: 10_000,
        idle_timeout_ms: 30_000,
        status_interval_ms: 100,
        reconnect_window_ms: 1_000,
        time,
        cluster: text("c"),
        ..Default::default()
    };
    let trust = agent::Trust {
        version: 2,
        roots_pem: text("x"),
        endpoints: vec![text("s:7070")],
        registry: text("s:7071"),
    };
    let one = |item| agent::SessionResponse { item: Some(item) };
    let mut told = vec![one(Told::Welcome(welcome)), one(Told::Trust(trust))];
    told.extend(set());
    told.extend(
        [
            Told::StatusAck(agent::StatusAck { sequence: 1 }),
            Told::Ping(agent::Ping { id: 1, time }),
            Told::Pong(agent::Pong { id: 1, time }),
            Told::Open(agent::OpenReverse { ticket: text("t"), kind: 1 }),
            Told::Removed(agent::Removed { wipe: true }),
        ]
        .map(one),
    );
    put("messages", "server", &framed(1, &told));
}

fn records() {
    let meta = || {
        let (uid, name, namespace) = (text("0"), text("one"), text("default"));
        Some(record::Meta { uid, name, namespace, create_unix_ms: 5, ..Default::default() })
    };
    let deployment = record::DeploymentRecord {
        meta: meta(),
        spec: Some(spec()),
        replicas: 2,
        release: 1,
        rollout: api::RolloutState::Rolling as i32,
        progress_left_ms: 600_000,
        ..Default::default()
    };
    let release = record::ReleaseRecord {
        deployment_uid: text("0"),
        number: 1,
        body: body(),
        body_digest: Digest::of(&body()).to_string(),
        spec: Some(spec()),
        source: Some(pins()),
        create_unix_ms: 5,
        created_by: text("user/a"),
        ..Default::default()
    };
    let replica = record::ReplicaRecord {
        uid: text("r"),
        deployment_uid: text("0"),
        slot: 1,
        release: 1,
        host_uid: text("0"),
        intent: api::ReplicaIntent::Run as i32,
        exits: vec![exit()],
        ..Default::default()
    };
    let host = record::HostRecord {
        meta: meta(),
        spec: Some(api::HostSpec { cordoned: true, draining: false }),
        instance: text("i"),
        facts: Some(facts()),
        public_key: vec![1, 2, 3],
        ..Default::default()
    };
    let version =
        api::ModelVersion { model_uid: text("0"), version: text("1"), ..Default::default() };
    let event = api::Event { sequence: 1, ..Default::default() };
    let token = api::JoinToken { id: text("t"), ..Default::default() };
    let moved = api::AliasMove { alias: text("prod"), ..Default::default() };
    let all = [
        record::ClusterRecord { uid: text("c"), epoch: 1, ..Default::default() }.encode_to_vec(),
        deployment.encode_to_vec(),
        release.encode_to_vec(),
        replica.encode_to_vec(),
        host.encode_to_vec(),
        record::ModelRecord {
            meta: meta(),
            aliases: [(text("prod"), text("1"))].into(),
            ..Default::default()
        }
        .encode_to_vec(),
        record::ModelVersionRecord { version: Some(version) }.encode_to_vec(),
        record::UserRecord { meta: meta(), ..Default::default() }.encode_to_vec(),
        record::UserTokenRecord { id: text("t"), user_uid: text("0"), ..Default::default() }
            .encode_to_vec(),
        record::JoinTokenRecord { token: Some(token), ..Default::default() }.encode_to_vec(),
        record::RequestRecord { key: text("k"), ..Default::default() }.encode_to_vec(),
        record::EventRecord { event: Some(event) }.encode_to_vec(),
        record::AuditRecord { revision: 1, actor: text("user/a"), ..Default::default() }
            .encode_to_vec(),
        record::AliasMoveRecord { model_uid: text("0"), r#move: Some(moved), revision: 1 }
            .encode_to_vec(),
        record::HostSetRecord { host_uid: text("0"), generation: 3 }.encode_to_vec(),
    ];
    let mut ledger = Vec::new();
    for ((number, kind), bytes) in (0_u8..).zip(KINDS).zip(all) {
        let taken = Change::decode(format!("{kind}/0").as_bytes(), &bytes).unwrap();
        assert!(taken.is_some(), "{kind} is not known");
        let length = u16::try_from(bytes.len()).unwrap().to_le_bytes();
        let one = [&[number, 0], &length[..], &bytes].concat();
        put("records", kind, &one);
        ledger.extend(one);
    }
    put("records", "ledger", &ledger);
}

fn hostset() {
    let file = record::AgentSetFile {
        id: Some(ID),
        digest: set_digest(&[entry()]).to_string(),
        entries: vec![entry()],
        bodies: vec![body()],
        replicas: vec![record::AgentReplicaMemory {
            replica_uid: text("r"),
            attempt: 3,
            failures: 1,
            last_exit: Some(exit()),
            replacement_left_ms: Some(5),
            backoff_left_ms: Some(6),
            replaces: text("before"),
            ..Default::default()
        }],
        agent_start: 2,
        last_seen_unix_ms: 5,
        cluster: text("c"),
    };
    put("hostset", "file", &[&[0], &file.encode_to_vec()[..]].concat());
    let none = record::AgentSetFile { agent_start: 1, ..Default::default() };
    put("hostset", "no-news", &[&[0], &none.encode_to_vec()[..]].concat());
    put("hostset", "sent", &framed(1, &set()));
}

fn main() {
    values();
    messages();
    records();
    hostset();
}
