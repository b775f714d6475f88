//! What bad input and bad luck get: a clear message, and an exit code of its own.

use anyhow::ensure;
use berth_tests::{Cluster, PATIENCE, command, eventually, root};
use std::process::{Output, Stdio};

fn told(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
}

fn berthd(args: &[&str]) -> Output {
    command("berthd").unwrap().args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_server_that_cannot_start_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    told(&berthd(&["--listen", "0.0.0.0:0", "--data-dir", data]), 2, &["--advertise"]);

    let config = dir.path().join("berthd.toml");
    std::fs::write(&config, "lisen = \"127.0.0.1:0\"\n").unwrap();
    told(&berthd(&["--config", config.to_str().unwrap()]), 2, &["lisen", "listen"]);

    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "x").unwrap();
    told(&berthd(&["--data-dir", foreign.to_str().unwrap()]), 1, &["not made by a Berth server"]);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let args = ["--data-dir", data, "--ballast-mib", "0", "--listen", &address];
    told(&berthd(&args), 1, &["--listen", &address]);

    // Nothing is left of a start that came to nothing.
    assert!(!std::path::Path::new(data).exists());
    std::fs::create_dir(data).unwrap();
    std::fs::write(std::path::Path::new(data).join("FORMAT"), "99\n").unwrap();
    told(&berthd(&["--data-dir", data]), 1, &["format 99"]);

    let nowhere = ["cannot make the folder /dev/null/x", "Not a directory"];
    told(&berthd(&["--data-dir", "/dev/null/x"]), 1, &nowhere);
}

#[test]
fn a_second_server_on_a_folder_that_is_served_is_refused_and_the_first_one_serves_on() {
    let cluster = Cluster::start().unwrap();
    let data = cluster.server_dir();
    let any = ["--listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0"];
    let args = [&["--data-dir", data.to_str().unwrap()][..], &any].concat();
    told(&berthd(&args), 1, &[data.to_str().unwrap(), "in use by another server"]);
    cluster.berth_ok(&["user", "create", "vera"]).unwrap();
}

#[test]
fn a_context_of_another_cluster_or_with_an_ended_certificate_ends_with_3_and_says_what_to_do() {
    let (cluster, other) = (Cluster::start().unwrap(), Cluster::start().unwrap());
    let read = |cluster: &Cluster| -> toml::Table {
        let text = std::fs::read_to_string(cluster.server_dir().join("admin.toml")).unwrap();
        text.parse().unwrap()
    };
    let (ours, theirs) = (read(&cluster), read(&other));
    let file = cluster.dir.path().join("context.toml");
    let input = root().join("deploy/models/iris/sample.json");
    let infer = ["infer", "iris", "--input", input.to_str().unwrap()];
    let berth = |changed: &[(&str, toml::Value)], args: &[&str]| {
        let mut config = ours.clone();
        for (key, value) in changed {
            config["contexts"]["default"][*key] = value.clone();
        }
        std::fs::write(&file, config.to_string()).unwrap();
        command("berth").unwrap().env("BERTH_CONFIG", &file).args(args).output().unwrap()
    };
    let list = ["host", "list"];
    assert!(berth(&[], &list).status.success());
    let words =
        ["hint: the server and the context do not belong together", "certificate has ended"];
    // Over gRPC and over HTTP.
    let refused = |changed: &[(&str, toml::Value)]| {
        for args in [&list[..], &infer] {
            told(&berth(changed, args), 3, &words);
        }
    };
    let of_theirs = |keys: &[&'static str]| -> Vec<(&'static str, toml::Value)> {
        keys.iter().map(|key| (*key, theirs["contexts"]["default"][*key].clone())).collect()
    };
    // They do not believe the server; the server does not believe them; nor what has ended.
    refused(&of_theirs(&["cluster", "roots", "certificate", "key"]));
    refused(&of_theirs(&["certificate", "key"]));
    let ca = berth_server::identity::ca::Ca::open(&cluster.server_dir()).unwrap();
    let (certificate, key) = ca.user(&"admin".parse().unwrap(), 0).unwrap();
    let ended = [("certificate", certificate.into()), ("key", key.into())];
    eventually("the certificate has ended", PATIENCE, || {
        ensure!(berth(&ended, &list).status.code() != Some(0), "it is in force");
        Ok(())
    })
    .unwrap();
    refused(&ended);
}

#[test]
fn without_a_server_the_command_line_ends_with_3_and_without_a_context_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let berth = |config: &str| {
        command("berth")
            .unwrap()
            .env("BERTH_CONFIG", config)
            .args(["host", "list"])
            .output()
            .unwrap()
    };
    let missing = dir.path().join("none.toml");
    told(&berth(missing.to_str().unwrap()), 1, &["there is no context", "hint:"]);
    let mut cluster = Cluster::start().unwrap();
    let config = cluster.server_dir().join("admin.toml");
    cluster.server().kill();
    told(&berth(config.to_str().unwrap()), 3, &["hint: is the server running"]);
}

#[test]
fn every_way_a_join_fails_is_named() {
    let mut cluster = Cluster::start().unwrap();
    let control = cluster.door("control").unwrap();
    let join = |cluster: &Cluster, name: &str, token: &str| {
        command("berth-agent")
            .unwrap()
            .args(["join", "--server", &control, "--name", name, "--token", token, "--data-dir"])
            .arg(cluster.agent_dir(name))
            .output()
            .unwrap()
    };
    let token = |cluster: &Cluster, args: &[&str]| {
        let all = [&["host", "token", "create"], args].concat();
        let made = cluster.berth_json(&all).unwrap();
        (made["id"].as_str().unwrap().to_owned(), made["secret"].as_str().unwrap().to_owned())
    };
    told(&join(&cluster, "a", "nonsense"), 1, &["not a join token"]);
    let (_, good) = token(&cluster, &[]);
    let mut parts: Vec<&str> = good.split('.').collect();
    parts[2] = "0000";
    told(&join(&cluster, "a", &parts.join(".")), 1, &["not known"]);
    let other = "0".repeat(64);
    let mut parts: Vec<&str> = good.split('.').collect();
    parts[3] = &other;
    told(&join(&cluster, "a", &parts.join(".")), 1, &["not the one the token names"]);

    assert!(join(&cluster, "a", &good).status.success());
    told(&join(&cluster, "a", &good), 1, &["joined already"]);
    told(&join(&cluster, "b", &good), 1, &["used up"]);
    let (id, revoked) = token(&cluster, &[]);
    cluster.berth_ok(&["host", "token", "rm", &id, "--yes"]).unwrap();
    told(&join(&cluster, "b", &revoked), 1, &["revoked"]);
    let (_, short) = token(&cluster, &["--ttl", "1ms"]);
    told(&join(&cluster, "b", &short), 1, &["expired"]);

    // A name in use needs a token that says so.
    let (_, again) = token(&cluster, &["--uses", "2"]);
    std::fs::remove_file(cluster.agent_dir("a").join("identity")).unwrap();
    told(&join(&cluster, "a", &again), 1, &["exists already", "--rejoin a"]);
    let (_, rejoin) = token(&cluster, &["--rejoin", "a"]);
    assert!(join(&cluster, "a", &rejoin).status.success());
    cluster.server().kill();
}

#[test]
fn a_manifest_gets_every_problem_at_once_and_nothing_is_written() {
    let cluster = Cluster::start().unwrap();
    let file = cluster.dir.path().join("bad.yaml");
    let text = "apiVersion: berth/v1\nkind: Deployment\nmetadata: {name: X}\n\
                spec: {modle: iris, replicas: -1}\n";
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let words = ["metadata.name", "spec.modle", "did you mean \"model\"", "spec.replicas"];
    told(&cluster.berth(&["apply", "-f", file]).unwrap(), 1, &words);

    let text =
        "apiVersion: berth/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {model: nosuch}\n";
    std::fs::write(file, text).unwrap();
    let output = cluster.berth(&["apply", "-f", file]).unwrap();
    told(&output, 1, &["\"nosuch\" does not exist", "berth model push"]);
    assert_eq!(cluster.berth_json(&["deployment", "list"]).unwrap(), serde_json::json!([]));
}

#[test]
fn a_role_that_does_not_suffice_ends_with_4_and_a_revoked_user_at_once() {
    let cluster = Cluster::start().unwrap();
    let context = cluster.berth_ok(&["user", "create", "vera", "--role", "viewer"]).unwrap();
    let config = cluster.dir.path().join("vera.toml");
    std::fs::write(&config, context).unwrap();
    let vera = |args: &[&str]| {
        command("berth").unwrap().env("BERTH_CONFIG", &config).args(args).output().unwrap()
    };
    assert!(vera(&["deployment", "list"]).status.success());
    told(&vera(&["host", "token", "create"]), 4, &["admin"]);
    told(&vera(&["deployment", "scale", "x", "3"]), 4, &["operator"]);
    cluster.berth_ok(&["user", "revoke", "vera", "--yes"]).unwrap();
    told(&vera(&["deployment", "list"]), 4, &["revoked"]);
}

#[test]
fn acknowledged_writes_survive_kill_9() {
    let mut cluster = Cluster::start().unwrap();
    for round in 0..5 {
        let name = format!("user-{round}");
        cluster.berth_ok(&["user", "create", &name]).unwrap();
        cluster.server().kill();
        cluster.start_server().unwrap();
        let users = cluster.berth_json(&["user", "list"]).unwrap();
        let names: Vec<&str> =
            users.as_array().unwrap().iter().filter_map(|u| u["name"].as_str()).collect();
        for known in 0..=round {
            assert!(names.contains(&format!("user-{known}").as_str()), "{names:?}");
        }
    }
}

#[test]
fn what_takes_something_away_is_asked_about_and_nobody_to_ask_is_a_no() {
    let cluster = Cluster::start().unwrap();
    cluster.berth_ok(&["user", "create", "vera"]).unwrap();
    for args in [
        &["user", "revoke", "vera"][..],
        &["model", "rm", "iris:1"],
        &["model", "unalias", "iris", "best"],
    ] {
        told(&cluster.berth(args).unwrap(), 1, &["nobody can be asked", "--yes"]);
    }
    // Nobody is asked about what is not there.
    for args in [&["rm", "web"][..], &["host", "drain", "edge"], &["host", "rm", "edge"]] {
        let output = cluster.berth(args).unwrap();
        told(&output, 1, &["does not exist", "hint: "]);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("--yes"), "{args:?}");
    }
    let revoked = || {
        let users = cluster.berth_json(&["user", "list"]).unwrap();
        let vera = users.as_array().unwrap().iter().find(|u| u["name"] == "vera").cloned();
        vera.unwrap()["revoked"].as_bool().unwrap()
    };
    assert!(!revoked(), "nothing was written");
    cluster.berth_ok(&["user", "revoke", "vera", "--yes"]).unwrap();
    assert!(revoked());
}

#[test]
fn a_deployment_that_is_named_and_not_there_is_not_found() {
    let cluster = Cluster::start().unwrap();
    let input = root().join("deploy/models/iris/sample.json");
    for args in [
        &["events", "--deployment", "nope"][..],
        &["user", "token", "admin", "--deployment", "nope"],
        &["infer", "nope", "--input", input.to_str().unwrap()],
    ] {
        told(&cluster.berth(args).unwrap(), 1, &["nope", "hint: `berth deployment list`"]);
    }
    let users = cluster.berth_json(&["user", "list"]).unwrap();
    assert!(users.as_array().unwrap().iter().all(|u| u["tokens"] == 0), "{users}");
}

#[test]
fn a_version_that_never_changes_ends_with_1_and_a_role_that_may_not_push_with_4() {
    let cluster = Cluster::start().unwrap();
    let file = cluster.dir.path().join("weights.bin");
    let file = file.to_str().unwrap();
    std::fs::write(file, "one").unwrap();
    let push = ["model", "push", "iris:1", file];
    cluster.berth_ok(&push).unwrap();
    std::fs::write(file, "two").unwrap();
    told(&cluster.berth(&push).unwrap(), 1, &["never changes"]);

    let context = cluster.berth_ok(&["user", "create", "vera", "--role", "viewer"]).unwrap();
    let config = cluster.dir.path().join("vera.toml");
    std::fs::write(&config, context).unwrap();
    let vera = |args: &[&str]| {
        command("berth").unwrap().env("BERTH_CONFIG", &config).args(args).output().unwrap()
    };
    // Every byte is there already, so that the manifest alone is refused.
    std::fs::write(file, "one").unwrap();
    told(&vera(&push), 4, &["vera", "may not push"]);
    assert!(vera(&["image", "list"]).status.success());

    let repository = serde_json::json!({"namespace": "default", "repository": "models/iris"});
    assert_eq!(cluster.berth_json(&["image", "list"]).unwrap(), serde_json::json!([repository]));
    let elsewhere = cluster.berth_json(&["image", "list", "-n", "vision"]).unwrap();
    assert_eq!(elsewhere, serde_json::json!([]));
    let tags = cluster.berth_json(&["image", "tags", "models/iris"]).unwrap();
    assert_eq!(tags, serde_json::json!({"repository": "models/iris", "tags": ["1"]}));
    told(&cluster.berth(&["image", "tags", "nowhere"]).unwrap(), 1, &["nowhere"]);
}

#[test]
fn a_model_is_pushed_whole_before_the_server_is_asked_to_register_it() {
    let cluster = Cluster::start().unwrap();
    let file = cluster.dir.path().join("weights.bin");
    std::fs::write(&file, "one").unwrap();
    // The registry's door is there, the other one is not.
    let admin = std::fs::read_to_string(cluster.server_dir().join("admin.toml")).unwrap();
    let config = cluster.dir.path().join("half.toml");
    let door = cluster.door("control").unwrap();
    assert!(admin.contains(&door), "{door} is not in the context");
    std::fs::write(&config, admin.replace(&door, "127.0.0.1:1")).unwrap();
    let half = command("berth")
        .unwrap()
        .env("BERTH_CONFIG", &config)
        .args(["model", "push", "iris:1", file.to_str().unwrap()])
        .output()
        .unwrap();
    told(&half, 3, &["127.0.0.1:1"]);
    let tags = cluster.berth_json(&["image", "tags", "models/iris"]).unwrap();
    assert_eq!(tags["tags"], serde_json::json!(["1"]));
}
