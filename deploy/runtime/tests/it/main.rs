//! The server as its callers see it: over real connections, on real models with known answers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod batching;
mod grpc;
mod harness;
mod hostile;
mod http;
mod life;

/// A file that no `mod` names would never be compiled, and nobody would see.
#[test]
fn every_file_is_a_module() {
    let main = include_str!("main.rs");
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.trim_end_matches(".rs");
        assert!(name == "main" || main.contains(&format!("mod {name};")), "{name} is not a module");
    }
}
