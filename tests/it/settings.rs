//! Where settings come from, how logs are written, and how the server ends.

use berth_tests::{Cluster, PATIENCE, command, eventually};
use std::process::Stdio;

#[test]
fn flags_win_over_the_environment_and_that_over_the_file_and_logs_are_json_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (file, data) = (dir.path().join("berthd.toml"), dir.path().join("data"));
    let ports: Vec<String> =
        ["registry", "gateway", "page"].map(|d| format!("{d}-listen = \"127.0.0.1:0\"")).into();
    let text = format!("{}\nlog-format = \"text\"\nmin-free-percent = 0\n", ports.join("\n"));
    std::fs::write(&file, text).unwrap();
    let log = dir.path().join("log");
    let mut server = command("berthd").unwrap();
    server.arg("--config").arg(&file).arg("--data-dir").arg(&data);
    server.args(["--listen", "127.0.0.1:0", "--ballast-mib", "0"]);
    // Each would be refused if it counted: an address that is not ours, and another log format.
    server.env("BERTHD_LISTEN", "192.0.2.1:7443").env("BERTHD_LOG_FORMAT", "json");
    let mut server = berth_tests::Process::start(&mut server, &log).unwrap();
    eventually("the doors are open", PATIENCE, || {
        Ok(std::fs::read(data.join("doors.json")).map(|_| ())?)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", server.tail()));
    let status = server.terminate(PATIENCE).unwrap();
    assert!(status.success(), "SIGTERM is no failure: {status}");
    let text = std::fs::read_to_string(&log).unwrap();
    let mut messages = Vec::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("the file's format won: {error}: {line}"));
        messages.extend(line["fields"]["message"].as_str().map(str::to_owned));
    }
    assert!(messages.iter().any(|m| m == "the doors are open"), "{messages:?}");
    assert!(messages.iter().any(|m| m.starts_with("stopping")), "{messages:?}");
}

#[test]
fn a_revoked_user_loses_the_stream_it_has_open() {
    let mut cluster = Cluster::start().unwrap();
    // So that there is something to be seen.
    cluster.add_agent("one", &[]).unwrap();
    let context = cluster.berth_ok(&["user", "create", "vera", "--role", "viewer"]).unwrap();
    let config = cluster.dir.path().join("vera.toml");
    std::fs::write(&config, context).unwrap();
    let seen = cluster.dir.path().join("seen");
    let mut follow = command("berth")
        .unwrap()
        .env("BERTH_CONFIG", &config)
        .args(["events", "-f"])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&seen).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Revoked earlier it would not get a stream, which is another matter.
    eventually("its stream is open", PATIENCE, || {
        anyhow::ensure!(std::fs::metadata(&seen)?.len() > 0, "it has seen nothing");
        Ok(())
    })
    .unwrap();
    cluster.berth_ok(&["user", "revoke", "vera", "--yes"]).unwrap();
    let ended = eventually("the stream ends", PATIENCE, || {
        follow.try_wait()?.ok_or_else(|| anyhow::anyhow!("it goes on"))
    });
    let _ = follow.kill();
    assert_eq!(ended.unwrap().code(), Some(4));
}

#[test]
fn a_link_to_the_page_is_printed_for_whoever_may_read() {
    let cluster = Cluster::start().unwrap();
    let link = cluster.berth_json(&["server", "page"]).unwrap();
    let url = link["url"].as_str().unwrap();
    let port = cluster.door("page").unwrap().rsplit(':').next().unwrap().to_owned();
    assert!(url.starts_with("https://") && url.contains(&format!(":{port}/login?code=")), "{url}");
}
