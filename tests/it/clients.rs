//! Clients that nobody of Berth wrote, against a real server.
//!
//! `tests/run` installs them into a folder of its own; without it these tests say that they are
//! skipped, but never in CI.

use berth_tests::Cluster;
use std::path::PathBuf;
use std::process::Command;

/// Where `tests/run` puts the clients' programs.
pub fn clients(test: &str) -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or(home.join(".cache"), PathBuf::from);
    let bin = cache.join("berth-tests/clients/bin");
    if bin.join("buf").exists() && bin.join("python").exists() {
        return Some(bin);
    }
    assert!(std::env::var_os("CI").is_none(), "tests/run installs {}", bin.display());
    println!("{test}: skipped, there is no {}; tests/run makes it", bin.display());
    None
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out
}

#[test]
fn buf_curl_finds_and_calls_the_services_by_reflection_alone() {
    let Some(bin) = clients("buf curl") else { return };
    let cluster = Cluster::start().unwrap();
    let admin = std::fs::read_to_string(cluster.server_dir().join("admin.toml")).unwrap();
    let admin: toml::Value = toml::from_str(&admin).unwrap();
    let context = &admin["contexts"]["default"];
    for name in ["roots", "certificate", "key"] {
        let text = context[name].as_str().unwrap();
        std::fs::write(cluster.dir.path().join(name), text).unwrap();
    }
    let door = cluster.door("control").unwrap();
    let buf = |protocol: &str, more: &[&str], path: &str| {
        let file = |name: &str| cluster.dir.path().join(name);
        let mut command = Command::new(bin.join("buf"));
        command.current_dir(cluster.dir.path()).args(["curl", "--protocol", "grpc"]);
        command.args(["--reflect-protocol", protocol]);
        command.arg("--cacert").arg(file("roots"));
        command.arg("--cert").arg(file("certificate")).arg("--key").arg(file("key"));
        command.args(more).arg(format!("https://{door}{path}"));
        command
    };
    for protocol in ["grpc-v1", "grpc-v1alpha"] {
        let services = run(&mut buf(protocol, &["--list-services"], ""));
        for service in ["berth.v1.DeploymentService", "grpc.health.v1.Health"] {
            assert!(services.contains(service), "{services}");
        }
        let call = ["-d", "{}"];
        let info = run(&mut buf(protocol, &call, "/berth.v1.SystemService/GetServerInfo"));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["cluster"].as_str(), Some(cluster.uid().unwrap().as_str()));
    }
    let bad = r#"{"page": {"filter": "zone = eu"}}"#;
    let refused = buf("grpc-v1", &["-d", bad], "/berth.v1.HostService/ListHosts").output().unwrap();
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && words.contains("invalid_argument"), "{words}");
    assert!(words.contains("at character 1"), "{words}");
}

/// What a load balancer knows of a service's health.
const HEALTH: &str = "syntax = \"proto3\"; package grpc.health.v1;
message HealthCheckRequest { string service = 1; }
message HealthCheckResponse {
  enum ServingStatus { UNKNOWN = 0; SERVING = 1; NOT_SERVING = 2; SERVICE_UNKNOWN = 3; }
  ServingStatus status = 1;
}
service Health { rpc Check(HealthCheckRequest) returns (HealthCheckResponse); }
";

#[test]
fn whoever_has_no_certificate_is_told_that_the_server_serves_and_nothing_else() {
    let Some(bin) = clients("buf curl") else { return };
    let cluster = Cluster::start().unwrap();
    let schema = cluster.dir.path().join("schema");
    std::fs::create_dir(&schema).unwrap();
    std::fs::write(schema.join("health.proto"), HEALTH).unwrap();
    let door = cluster.door("control").unwrap();
    let call = |schema: &std::path::Path, path: &str| {
        let mut command = Command::new(bin.join("buf"));
        command.current_dir(cluster.dir.path()).args(["curl", "--protocol", "grpc"]);
        command.arg("--cacert").arg(cluster.server_dir().join("ca.crt"));
        command.arg("--schema").arg(schema).args(["-d", "{}"]);
        command.arg(format!("https://{door}{path}"));
        command
    };
    let told = run(&mut call(&schema, "/grpc.health.v1.Health/Check"));
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["status"], "SERVING");
    let proto = berth_tests::root().join("proto");
    let info = call(&proto, "/berth.v1.SystemService/GetServerInfo").output().unwrap();
    let words = String::from_utf8_lossy(&info.stderr).into_owned();
    assert!(!info.status.success() && words.contains("unauthenticated"), "{words}");
}

#[test]
fn a_python_client_made_from_the_protos_creates_lists_watches_and_deletes() {
    let Some(bin) = clients("grpcio") else { return };
    let cluster = Cluster::start().unwrap();
    let work = cluster.dir.path().join("python");
    std::fs::create_dir(&work).unwrap();
    let told = run(Command::new(bin.join("python"))
        .arg(berth_tests::root().join("tests/clients/deployments.py"))
        .arg(cluster.server_dir().join("admin.toml"))
        .arg(berth_tests::root().join("proto"))
        .arg(&work));
    for step in ["repeated the request", "by pages", "errors carry", "deleted", "v1alpha"] {
        assert!(told.contains(step), "\"{step}\" was not reached: {told}");
    }
}
