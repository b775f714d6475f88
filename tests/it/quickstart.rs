//! The quickstart, where it must not go on.

use std::process::Command;

#[test]
fn a_folder_that_holds_something_else_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let thesis = dir.path().join("thesis.tex");
    std::fs::write(&thesis, "mine").unwrap();
    for word in ["up", "down"] {
        let output = Command::new(berth_tests::root().join("deploy/quickstart"))
            .arg(word)
            .env("BERTH_QUICKSTART_DIR", dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{word}: {said}");
        assert!(said.contains("holds something else"), "{word}: {said}");
        assert_eq!(std::fs::read_to_string(&thesis).unwrap(), "mine");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
