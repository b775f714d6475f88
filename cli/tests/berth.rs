//! The binary itself, with no server anywhere: what it does before it would need one.

use std::process::{Command, Output, Stdio};

/// Runs `berth` without a context and with nobody to ask.
fn berth(words: &str) -> Output {
    let dir = tempfile::tempdir().expect("a folder");
    Command::new(env!("CARGO_BIN_EXE_berth"))
        .env("BERTH_CONFIG", dir.path().join("none.toml"))
        .args(words.split(' '))
        .stdin(Stdio::null())
        .output()
        .expect("berth starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn whoever_removes_something_is_asked_before_the_server_is() {
    for words in [
        "user revoke a",
        "user revoke a --token x",
        "model rm a:1",
        "model unalias a x",
        "orphan release --host a",
        "deployment rm a --allow-missing",
    ] {
        let output = berth(words);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(said(&output).contains("nobody can be asked"), "{words}: {}", said(&output));
    }
}

#[test]
fn nobody_is_asked_about_a_host_or_a_deployment_before_it_is_known_to_be_there() {
    for words in ["host rm a", "host drain a", "rm a", "deployment rm a"] {
        let output = berth(words);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(said(&output).contains("there is no context"), "{words}: {}", said(&output));
        assert!(!said(&output).contains("nobody can be asked"), "{words}: {}", said(&output));
    }
}

#[test]
fn what_cannot_be_sent_is_refused_before_the_server_is_looked_for() {
    for (words, code, told) in [
        ("build -t Hello:1 .", 2, "\"Hello\" is no model's name"),
        ("model push iris:.5 Cargo.toml", 2, "\".5\" is no version"),
        ("infer iris --input Cargo.toml", 1, "Cargo.toml is no JSON"),
    ] {
        let output = berth(words);
        assert_eq!(output.status.code(), Some(code), "{words}: {}", said(&output));
        assert!(said(&output).contains(told), "{words}: {}", said(&output));
    }
}
