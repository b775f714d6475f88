//! Compiles the protos without a system `protoc`.

use prost::Message as _;
use std::path::PathBuf;

const FILES: [&str; 25] = [
    "berth/v1/common.proto",
    "berth/v1/deployment.proto",
    "berth/v1/release.proto",
    "berth/v1/replica.proto",
    "berth/v1/host.proto",
    "berth/v1/model.proto",
    "berth/v1/event.proto",
    "berth/v1/deployment_service.proto",
    "berth/v1/host_service.proto",
    "berth/v1/model_service.proto",
    "berth/v1/event_service.proto",
    "berth/v1/log_service.proto",
    "berth/v1/user_service.proto",
    "berth/v1/system_service.proto",
    "berth/agent/v1/assignment.proto",
    "berth/agent/v1/session.proto",
    "berth/agent/v1/agent_service.proto",
    "berth/agent/v1/host_service.proto",
    "berth/store/v1/records.proto",
    "berth/store/v1/agent_files.proto",
    "berth/store/v1/backup.proto",
    "inference/grpc_predict_v2.proto",
    "google/protobuf/timestamp.proto",
    "google/protobuf/duration.proto",
    "google/protobuf/empty.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES.iter().filter(|f| !f.starts_with("google/")) {
        println!("cargo::rerun-if-changed={file}");
    }
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let fds = protox::compile(FILES, ["."])?;
    std::fs::write(out.join("descriptors.bin"), fds.encode_to_vec())?;

    // Services need tonic; the cores want messages only.
    let services = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        .build_client(services)
        .build_server(services)
        // Iteration order must not depend on the process.
        .btree_map(".")
        .compile_well_known_types(false)
        .compile_fds(fds)?;
    Ok(())
}
