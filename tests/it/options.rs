//! What a manifest's options become on a real engine: its container's own, its checks, its network.

use anyhow::{Context as _, Result, ensure};
use berth_tests::hosts::{Fleet, can_make_hosts};
use berth_tests::samples::{model, onnx_cluster};
use berth_tests::{PATIENCE, eventually, has_docker};
use serde_json::{Value, json};

fn inspected(fleet: &Fleet, deployment: &str) -> Value {
    let ready = fleet.ready(deployment, 1).unwrap();
    let id = ready[0]["containerId"].as_str().unwrap();
    let told = fleet.hosts[0].docker(&["inspect", id]).unwrap();
    serde_json::from_str::<Value>(&told).unwrap()[0].take()
}

fn apply(fleet: &Fleet, name: &str, spec: &str) {
    let manifest = fleet.manifest(name, spec).unwrap();
    fleet.cluster.berth_ok(&["apply", "-f", &manifest, "--timeout", "90s"]).unwrap();
}

#[test]
fn every_option_of_a_container_reaches_the_engine_as_it_was_written() {
    if !can_make_hosts("every_option_of_a_container") {
        return;
    }
    let mut fleet = Fleet::start(0).unwrap();
    let shared = fleet.cluster.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("calibration"), "seven").unwrap();
    let allowed = shared.display();
    let config = format!(
        "[policy]\nmount-folders = [\"{allowed}\"]\nallow-capabilities = [\"NET_ADMIN\"]\n\
         publish-addresses = [\"127.0.0.1\"]\n"
    );
    fleet.add_host_with(&config, &[]).unwrap();
    fleet.all_present().unwrap();
    fleet.push_stand_in("stand-in:1", 0).unwrap();
    let spec = format!(
        "  image: stand-in:1\n  replicas: 1\n  \
         ports: [{{name: http, container: 8080, hostPort: 18080, bind: 127.0.0.1}}]\n  \
         env: {{DO: \"read:/calibration/calibration\", NUMBER: \"0644\"}}\n  \
         command: [\"/berth-stand-in\"]\n  args: [\"one\", \"two words\"]\n  \
         user: \"65532:65532\"\n  readOnlyRoot: true\n  \
         mounts: [{{source: \"{allowed}\", target: /calibration}}]\n  \
         resources: {{cpu: 250m, memory: 32MiB}}\n  log: {{maxSize: 2MB, maxFiles: 4}}\n  \
         stopGrace: 7s\n  privileges: {{addCapabilities: [NET_ADMIN]}}\n  \
         health: {{http: {{path: /healthy, port: http}}, interval: 500ms}}\n  \
         rollout: {{readyFor: 0s}}\n"
    );
    apply(&fleet, "app", &spec);
    let made = inspected(&fleet, "app");
    let (config, host) = (&made["Config"], &made["HostConfig"]);
    assert_eq!(config["Entrypoint"], json!(["/berth-stand-in"]), "{made:#}");
    assert_eq!(config["Cmd"], json!(["one", "two words"]), "{made:#}");
    assert_eq!((&config["User"], &config["StopTimeout"]), (&json!("65532:65532"), &json!(7)));
    let env = config["Env"].as_array().unwrap();
    for wanted in ["DO=read:/calibration/calibration", "NUMBER=0644"] {
        assert!(env.contains(&json!(wanted)), "{env:?}");
    }
    assert_eq!(host["ReadonlyRootfs"], true);
    assert_eq!((&host["Memory"], &host["NanoCpus"]), (&json!(32 << 20), &json!(250_000_000)));
    assert_eq!(host["CapAdd"].to_string().replace("CAP_", ""), "[\"NET_ADMIN\"]");
    let log = json!({"Type": "json-file", "Config": {"max-size": "2000000", "max-file": "4"}});
    assert_eq!(host["LogConfig"], log);
    let bound = json!({"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18080"}]});
    assert_eq!(host["PortBindings"], bound);
    let mounts = made["Mounts"].as_array().unwrap();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert_eq!(
        (&mounts[0]["Destination"], &mounts[0]["RW"]),
        (&json!("/calibration"), &json!(false))
    );

    // And the program finds it so: the file is there, the port answers on the host.
    let logs = fleet.cluster.berth_ok(&["logs", "app", "--tail", "100"]).unwrap();
    assert!(logs.contains("reads Ok(\"seven\")"), "{logs}");
    let answer = fleet.hosts[0].dials("127.0.0.1:18080").unwrap();
    assert!(answer, "the published port takes connections on the host");
}

#[test]
fn containers_of_one_host_cannot_reach_each_other_unless_the_host_allows_it() {
    if !can_make_hosts("containers_of_one_host") {
        return;
    }
    for allowed in [false, true] {
        let mut fleet = Fleet::start(0).unwrap();
        let config = format!("[policy]\nallow-container-traffic = {allowed}\n");
        fleet.add_host_with(&config, &[]).unwrap();
        fleet.all_present().unwrap();
        fleet.push_stand_in("stand-in:1", 0).unwrap();
        let spec = |what: &str| {
            format!(
                "  image: stand-in:1\n  replicas: 1\n  env: {{DO: \"{what}\"}}\n  \
                 ports: [{{name: http, container: 8080}}]\n  \
                 health: {{http: {{path: /healthy, port: http}}, interval: 200ms}}\n  \
                 rollout: {{readyFor: 0s}}\n  stopGrace: 0s\n"
            )
        };
        apply(&fleet, "one", &spec("serve"));
        let networks = inspected(&fleet, "one")["NetworkSettings"]["Networks"].take();
        let (name, network) = networks.as_object().unwrap().iter().next().unwrap();
        let option = "{{index .Options \"com.docker.network.bridge.enable_icc\"}}";
        let told =
            fleet.hosts[0].docker(&["network", "inspect", "--format", option, name]).unwrap();
        assert_eq!(told == "false", !allowed, "{told}");
        let address = format!("{}:8080", network["IPAddress"].as_str().unwrap());
        assert!(fleet.hosts[0].dials(&address).unwrap(), "the host itself reaches it");
        apply(&fleet, "two", &spec(&format!("dial:{address}")));
        let logs = fleet.cluster.berth_ok(&["logs", "two", "--tail", "100"]).unwrap();
        let reached = logs.contains(&format!("stand-in dials {address}: Ok"));
        assert!(logs.contains("stand-in dials") && reached == allowed, "{logs}");
    }
}

#[test]
fn tcp_grpc_and_exec_checks_tell_what_serves_from_what_does_not() {
    if !has_docker("tcp_grpc_and_exec_checks") {
        return;
    }
    let cluster = onnx_cluster().unwrap();
    let file = model("iris", "model.onnx").unwrap();
    cluster.berth_ok(&["model", "push", "iris:1", &file]).unwrap();
    let checks = [
        ("tcp", "tcp: {port: http}", ""),
        ("grpc", "grpc: {port: http}", ""),
        ("exec", "exec: {command: [\"/berth-runtime\", \"healthcheck\"]}", ""),
        ("no-tcp", "tcp: {port: other}", "refused"),
        ("no-grpc", "grpc: {port: http, service: nosuch}", "does not say SERVING"),
        ("no-exec", "exec: {command: [\"/berth-runtime\", \"nosuch\"]}", "ended with 2"),
    ];
    let documents = checks.map(|(name, check, _)| {
        format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: {name}}}\nspec:\n  \
             model: iris:1\n  replicas: 1\n  stopGrace: 0s\n  rollout: {{readyFor: 0s}}\n  \
             ports: [{{name: http, container: 8080}}, {{name: other, container: 8081}}]\n  \
             health: {{{check}, interval: 500ms, timeout: 2s, startup: 1s}}\n"
        )
    });
    let manifest = cluster.dir.path().join("checks.yaml");
    std::fs::write(&manifest, documents.join("---\n")).unwrap();
    cluster.berth_ok(&["apply", "-f", manifest.to_str().unwrap(), "--no-wait"]).unwrap();
    let seen = |name: &str, ready: bool, words: &str| -> Result<()> {
        let all = cluster.berth_json(&["ps", name])?;
        let one = all.as_array().and_then(|all| all.first()).context("nothing is placed")?;
        ensure!((one["state"] == "ready") == ready, "{one}");
        ensure!(one["message"].as_str().is_some_and(|m| m.contains(words)), "{one}");
        Ok(())
    };
    for (name, _, words) in checks {
        let ready = words.is_empty();
        let what = format!("{name} is {}", if ready { "ready" } else { "said not to be" });
        eventually(&what, PATIENCE, || seen(name, ready, words)).unwrap();
    }
    // What passes goes on passing while the others fail.
    for (name, _, words) in checks.iter().filter(|(.., words)| words.is_empty()) {
        seen(name, true, words).unwrap();
    }
}
