//! The sample models, and a cluster that can serve them on the machine's own engine.

use crate::{Cluster, bin_dir, docker, root};
use anyhow::{Context as _, Result};
use std::os::unix::fs::PermissionsExt as _;

/// A cluster with one agent and the ONNX runtime's image in its registry.
///
/// # Errors
/// When it does not come up, or the runtime is not built.
pub fn onnx_cluster() -> Result<Cluster> {
    onnx_cluster_with(&[])
}

/// The same, with more flags for the server.
///
/// # Errors
/// As [`onnx_cluster`].
pub fn onnx_cluster_with(args: &[&str]) -> Result<Cluster> {
    let mut cluster = Cluster::start_with(args)?;
    cluster.add_agent("one", &[])?;
    push_runtime(&cluster)?;
    Ok(cluster)
}

/// Puts the ONNX runtime's image into a cluster's registry, by way of the machine's own engine.
///
/// # Errors
/// When the runtime is not built, or its image cannot be made or pushed.
pub fn push_runtime(cluster: &Cluster) -> Result<()> {
    let binary = bin_dir()?
        .join(format!("../{}-unknown-linux-musl/release/berth-runtime", std::env::consts::ARCH));
    let context = cluster.dir.path().join("image");
    std::fs::create_dir(&context)?;
    let program = context.join("berth-runtime");
    std::fs::copy(&binary, &program)
        .with_context(|| format!("{} is not built; run tests/run", binary.display()))?;
    // In the image it runs as another user, whatever the umask is here.
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    std::fs::copy(root().join("deploy/runtime/Dockerfile"), context.join("Dockerfile"))?;
    let folder = cluster.dir.path().file_name().and_then(|name| name.to_str());
    let name = folder.context("a folder has a name")?;
    let tag = format!("berth-it/onnx:{name}");
    docker(&["build", "-q", "-t", &tag, context.to_str().context("a path")?])?;
    let pushed = cluster.berth_ok(&["image", "push", &tag, "runtimes/onnx:latest"]);
    docker(&["rmi", "-f", &tag])?;
    pushed.map(|_| ())
}

/// The path of a sample model's file.
///
/// # Errors
/// When it is not text.
pub fn model(name: &str, file: &str) -> Result<String> {
    let path = root().join("deploy/models").join(name).join(file);
    path.to_str().map(str::to_owned).context("a path")
}
