//! Images: pushed from the local engine, or built there from a folder.

use super::model::{registered, registered_words, unchanged, version_json};
use super::{ask, connect, model_and_version, name_and_version, pair, write};
use crate::args::{Build, Global, Image};
use crate::client;
use crate::dockerignore::{self, Rules};
use crate::engine;
use crate::error::{Error, Result};
use crate::output::{print, say};
use crate::{package, push};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::quantity::human_bytes;
use bollard::models::BuildInfo;
use bollard::query_parameters::{BuildImageOptionsBuilder, RemoveImageOptions};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use tokio_util::io::ReaderStream;

/// Pieces of the context on their way to the engine.
const PIECE: usize = 256 * 1024;

/// The namespace a repository is in: its first segment, but for what is `default`'s.
fn namespace_of(repository: &str) -> &str {
    match repository.split_once('/') {
        None | Some(("models", _)) => "default",
        Some((namespace, _)) => namespace,
    }
}

pub async fn image(global: &Global, verb: Image) -> Result<()> {
    let context = client::context(global)?;
    let (local, remote) = match verb {
        Image::Push { local, remote } => (local, remote),
        Image::List => {
            let registry = push::Registry::of(&context)?;
            let mut all = registry.list("/v2/_catalog", "repositories").await?;
            all.retain(|name| global.namespace.as_deref().is_none_or(|n| n == namespace_of(name)));
            let row = |name: &String| vec![namespace_of(name).to_owned(), name.clone()];
            let one = |name: &String| json!({"namespace": namespace_of(name), "repository": name});
            let (rows, values) = (all.iter().map(row).collect(), all.iter().map(one).collect());
            return print(global, &["NAMESPACE", "REPOSITORY"], 2, rows, &Value::Array(values));
        }
        Image::Tags { repository } => {
            let registry = push::Registry::of(&context)?;
            let all = registry.list(&format!("/v2/{repository}/tags/list"), "tags").await?;
            let rows = all.iter().map(|tag| vec![tag.clone()]).collect();
            let value = json!({"repository": repository, "tags": all});
            return print(global, &["TAG"], 1, rows, &value);
        }
    };
    let (repository, tag) = name_and_version(&remote)?;
    let exported = push::export(&local).await?;
    let pushed = push::image(&context, exported, repository, tag).await?;
    say(
        global,
        &format!(
            "{remote}@{} pushed, {} ({} sent)",
            pushed.digest,
            human_bytes(pushed.size),
            human_bytes(pushed.sent)
        ),
        &json!({
            "image": remote, "digest": pushed.digest, "sizeBytes": pushed.size,
            "sentBytes": pushed.sent,
        }),
    )
}

/// The folder as a tar file in `to`, without what `.dockerignore` names.
fn pack(folder: &Path, dockerfile: &str, to: &Path) -> Result<(usize, u64)> {
    let rules = match std::fs::read_to_string(folder.join(".dockerignore")) {
        Ok(text) => Rules::parse(&text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Rules::default(),
        Err(error) => return Err(Error::user(format!("cannot read .dockerignore: {error}"))),
    };
    let entries = dockerignore::context(folder, &rules, &[dockerfile, ".dockerignore"])?;
    let file = std::io::BufWriter::new(std::fs::File::create(to)?);
    let mut archive = tar::Builder::new(file);
    archive.follow_symlinks(false);
    for entry in &entries {
        let path = folder.join(entry);
        let kind = std::fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            archive.append_dir(entry, &path)?;
        } else if kind.is_file() || kind.is_symlink() {
            archive.append_path_with_name(&path, entry)?;
        }
        // Sockets and devices are no part of a context.
    }
    std::io::Write::flush(&mut archive.into_inner()?)?;
    Ok((entries.len(), std::fs::metadata(to)?.len()))
}

/// What the engine says while it builds, on standard error; its error, where that is what it says.
fn step(info: &BuildInfo) -> Result<()> {
    if let Some(text) = &info.stream {
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            eprintln!("{}", for_terminal(line));
        }
    }
    if let (Some(id), Some(status)) = (&info.id, &info.status)
        && info.progress_detail.as_ref().is_none_or(|p| p.total.is_none())
    {
        eprintln!("{}", for_terminal(&format!("{id}: {status}")));
    }
    match info.error_detail.as_ref().and_then(|e| e.message.as_ref()) {
        Some(message) => Err(failed(message)),
        None => Ok(()),
    }
}

fn failed(message: &str) -> Error {
    Error::user(format!("the build failed: {}", for_terminal(message.trim())))
        .hint("the lines above are the engine's; nothing was pushed or registered")
}

/// Builds the folder under the name `local`.
async fn run_build(engine: &bollard::Docker, args: &Build, local: &str) -> Result<()> {
    let folder = push::TempFolder::new()?;
    let archive = folder.path().join("context.tar");
    let (from, dockerfile, to) = (args.folder.clone(), args.file.clone(), archive.clone());
    let (entries, size) = push::aside(move || pack(&from, &dockerfile, &to)).await?;
    eprintln!("context: {entries} entries, {}", human_bytes(size));
    let build_args: HashMap<String, String> =
        args.build_args.iter().map(|a| pair(a)).collect::<Result<_>>()?;
    let options = BuildImageOptionsBuilder::default()
        .dockerfile(&args.file)
        .t(local)
        .nocache(args.no_cache)
        .rm(true)
        .forcerm(true)
        .buildargs(&build_args)
        .build();
    let file = tokio::fs::File::open(&archive).await?;
    let pieces = ReaderStream::with_capacity(file, PIECE);
    let body = bollard::body_try_stream(pieces);
    let mut stream = engine.build_image(options, None, Some(body));
    while let Some(next) = stream.next().await {
        match next {
            Ok(info) => step(&info)?,
            Err(bollard::errors::Error::DockerStreamError { error }) => return Err(failed(&error)),
            Err(error) => return Err(engine::explain(error)),
        }
    }
    Ok(())
}

pub async fn build(global: &Global, args: Build) -> Result<()> {
    let (name, version) = model_and_version(&args.tag)?;
    if !args.folder.is_dir() {
        return Err(Error::user(format!("{} is not a folder", args.folder.display())));
    }
    let dockerfile = args.folder.join(&args.file);
    if !dockerfile.is_file() {
        return Err(Error::user(format!("{} does not exist", dockerfile.display()))
            .hint("--file names another one, as a path in the folder"));
    }
    let context = client::context(global)?;
    // Whether the server is there is said before the build, not after. A version that it has may come out
    // of the build as it is: whoever lost the answer, and CI, runs the same once more.
    let client = connect(global).await?;
    let known = registered(global, &client, name, version).await?;
    drop(client);
    let engine = engine::connect().await?;
    let namespace = global.namespace();
    let repository = package::repository(namespace, name);
    let local =
        format!("berth.local/build-{}:{}", name.replace('/', "-"), uuid::Uuid::new_v4().simple());
    let result = async {
        run_build(&engine, &args, &local).await?;
        let built = push::export(&local).await?;
        unchanged(known.as_ref(), &built.digest)?;
        push::image(&context, built, &repository, version).await
    }
    .await;
    let _ = engine.remove_image(&local, None::<RemoveImageOptions>, None).await;
    let pushed = result?;
    let lineage = package::lineage(&args.folder, "", Vec::new());
    // Only now: the server closes a connection that asks for nothing for as long as a build takes.
    let client = connect(global).await?;
    let request = RegisterVersionRequest {
        write: write(),
        version: Some(ModelVersion {
            model: name.to_owned(),
            namespace: namespace.to_owned(),
            version: version.to_owned(),
            repository,
            digest: pushed.digest.clone(),
            kind: ModelVersionKind::Image as i32,
            format: "image".to_owned(),
            size_bytes: pushed.size,
            lineage: Some(lineage),
            ..ModelVersion::default()
        }),
        aliases: args.aliases,
    };
    let made =
        ask(global, client.models().register_version(request)).await?.version.unwrap_or_default();
    let words = format!(
        "{} {} as image {}, {} ({} sent)",
        args.tag,
        registered_words(known.as_ref()),
        pushed.digest,
        human_bytes(pushed.size),
        human_bytes(pushed.sent)
    );
    say(global, &words, &version_json(&made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repositorys_first_segment_is_its_namespace_but_for_models() {
        for (repository, namespace) in [
            ("iris-app", "default"),
            ("models/iris", "default"),
            ("vision/models/iris", "vision"),
            ("runtimes/onnx", "runtimes"),
        ] {
            assert_eq!(namespace_of(repository), namespace);
        }
    }

    #[test]
    fn a_context_keeps_links_and_leaves_out_what_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("src")).unwrap();
        for (name, text) in [("Dockerfile", "FROM scratch"), ("src/a", "a"), ("x.log", "log")] {
            std::fs::write(at(name), text).unwrap();
        }
        std::os::unix::fs::symlink("src/a", at("link")).unwrap();
        std::fs::write(at(".dockerignore"), "*.log\n").unwrap();
        let out = tempfile::NamedTempFile::new().unwrap();
        pack(dir.path(), "Dockerfile", out.path()).unwrap();
        let mut archive = tar::Archive::new(std::fs::File::open(out.path()).unwrap());
        let mut names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_string_lossy().trim_end_matches('/').to_owned())
            .collect();
        names.sort();
        assert_eq!(names, [".dockerignore", "Dockerfile", "link", "src", "src/a"]);
    }
}
