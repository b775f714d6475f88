//! A model's files as a CNCF ModelPack artifact (github.com/modelpack/model-spec, v1), and what is
//! remembered of where they come from.
//!
//! Files are shipped raw, one layer each: a raw blob equals the file, so that ranges and what has not
//! changed can be told from any registry. The same files give the same digests.

use crate::error::{Error, Result};
use crate::progress::Board;
use crate::push;
use berth_proto::api::{Lineage, ModelFile, ModelVersion};
use berth_proto::ids::Digest;
use berth_proto::quantity::human_bytes;
use berth_proto::values::{MAX_MODEL_FILES, MAX_VERSION_BYTES};
use prost::Message as _;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes that the server adds to a version's record: two uids, a time, and who registered it.
const ADDED_BYTES: usize = 1024;

fn collect(folder: &Path, below: &Path, out: &mut Vec<(String, PathBuf)>) -> Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(below)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if entry.file_name() != ".git" {
                collect(folder, &path, out)?;
            }
        } else if kind.is_file() {
            let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
            out.push((name, path));
        } else {
            return Err(Error::user(format!("{} is neither a file nor a folder", path.display()))
                .hint("links are not followed; copy what they point to"));
        }
        if out.len() > MAX_MODEL_FILES {
            return Err(Error::user(format!("the folder holds more than {MAX_MODEL_FILES} files"))
                .hint(
                    "a model of more files goes into an image, beside the program that reads it",
                ));
        }
    }
    Ok(())
}

/// The first bytes of a file, for formats that say what they are.
fn magic(path: &Path) -> [u8; 4] {
    use std::io::Read as _;
    let mut bytes = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
    if read.is_ok() { bytes } else { [0; 4] }
}

fn format_of(files: &[(String, PathBuf)]) -> &'static str {
    let ends = |list: &[&str]| {
        files.iter().any(|(name, _)| {
            let name = name.to_ascii_lowercase();
            list.iter().any(|ending| name.ends_with(ending))
        })
    };
    if ends(&[".onnx"]) {
        "onnx"
    } else if ends(&["saved_model.pb", "saved_model.pbtxt"]) {
        "tensorflow-savedmodel"
    } else if ends(&["-symbol.json"]) && ends(&[".params"]) {
        "mxnet"
    } else if ends(&[".safetensors"]) {
        "safetensors"
    } else if ends(&[".gguf"]) || files.iter().any(|(_, path)| magic(path) == *b"GGUF") {
        "gguf"
    } else if ends(&[".joblib", ".pkl", ".pickle"]) {
        "sklearn-joblib"
    } else if ends(&[".pt", ".pth", ".torchscript"]) {
        "pytorch"
    } else {
        "other"
    }
}

/// What a model's own name for its framework tells.
fn framework_of(format: &str, producer: &str) -> String {
    match (producer, format) {
        ("", "tensorflow-savedmodel") => "tensorflow".to_owned(),
        ("", "sklearn-joblib") => "scikit-learn".to_owned(),
        ("", "pytorch") => "pytorch".to_owned(),
        ("", "mxnet") => "mxnet".to_owned(),
        (producer, _) => producer.to_owned(),
    }
}

fn kind_of(name: &str) -> &'static str {
    let lower = name.to_ascii_lowercase();
    let ends = |list: &[&str]| list.iter().any(|e| lower.ends_with(e));
    if ends(&[".md", ".txt", "license", ".pdf"]) {
        "doc"
    } else if ends(&[".py", ".ipynb", ".sh"]) {
        "code"
    } else if ends(&[".json", ".yaml", ".yml", ".toml"]) {
        "weight.config"
    } else {
        "weight"
    }
}

/// The files of a model, in order.
fn files_of(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    if path.is_dir() {
        collect(path, path, &mut files)?;
    } else if path.is_file() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        files.push((name, path.to_owned()));
    } else if path.exists() {
        return Err(Error::user(format!("{} is neither a file nor a folder", path.display())));
    } else {
        return Err(Error::user(format!("{} does not exist", path.display())));
    }
    if files.is_empty() {
        return Err(Error::user(format!("{} holds no files", path.display())));
    }
    Ok(files)
}

/// The layer of one file.
fn layer(file: &str, digest: &str, bytes: u64) -> Value {
    // 48 is tar's '0', a regular file; owner and times are left out of it, so that the same files
    // give the same artifact.
    let metadata = json!({
        "name": file, "mode": 420, "uid": 0, "gid": 0, "size": bytes,
        "mtime": "1970-01-01T00:00:00Z", "typeflag": 48,
    });
    json!({
        "mediaType": format!("application/vnd.cncf.model.{}.v1.raw", kind_of(file)),
        "digest": digest,
        "size": bytes,
        "annotations": {
            "org.cncf.model.filepath": file,
            "org.cncf.model.file.metadata+json": metadata.to_string(),
        },
    })
}

/// The artifact's configuration. Its schema allows no fields of our own, at any level.
fn config_of(name: &str, version: &str, format: &str, license: &str, diff_ids: &[Value]) -> Value {
    let mut descriptor = json!({ "name": name, "version": version });
    if !license.is_empty() {
        descriptor["licenses"] = json!([license]);
    }
    json!({
        "descriptor": descriptor,
        "config": { "format": format },
        "modelfs": { "type": "layers", "diffIds": diff_ids },
    })
}

/// Where a model's versions are in the registry. Other namespaces than `default` have theirs below
/// their own name, which is also what a role in one of them opens.
pub fn repository(namespace: &str, model: &str) -> String {
    match namespace {
        "" | "default" => format!("models/{model}"),
        other => format!("{other}/models/{model}"),
    }
}

/// Whether the server takes a version's record: asked before the first byte is sent.
fn fits(version: &ModelVersion) -> Result<()> {
    if version.encoded_len() + ADDED_BYTES <= MAX_VERSION_BYTES {
        return Ok(());
    }
    let files = version.files.len();
    let most = human_bytes(MAX_VERSION_BYTES as u64);
    Err(Error::user(format!(
        "the paths of the {files} files and what is said of the version take more than {most}"
    ))
    .hint("give fewer files, shorter paths, or fewer parameters"))
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A model as it is sent: everything is known of it, and nothing has been sent.
pub struct Packed {
    /// With its digest and what its files tell.
    pub version: ModelVersion,
    /// Of each file of the version, where it is.
    paths: Vec<PathBuf>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

fn no_onnx(name: &str) -> Error {
    Error::user(format!("{name} is no ONNX model: it cannot be read as one"))
        .hint("--format onnx takes it as one all the same, --format other as something else")
}

/// Packages a file or folder as this version.
pub async fn pack(mut version: ModelVersion, args: &crate::args::ModelPush) -> Result<Packed> {
    let files = files_of(&args.path)?;
    version.format = args.format.clone().unwrap_or_else(|| format_of(&files).to_owned());
    let onnx = files.iter().find(|(name, _)| name.to_ascii_lowercase().ends_with(".onnx"));
    let onnx = onnx.map(|(name, path)| (name.clone(), path.clone()));
    let asked = args.format.is_some();
    let about = push::aside(move || match onnx {
        Some((name, path)) => match crate::onnx::about(&path) {
            // It would be told much later, by the runtime on each host.
            None if !asked => Err(no_onnx(&name)),
            about => Ok(about),
        },
        None => Ok(None),
    });
    let about = about.await?;
    let about = about.unwrap_or_default();
    version.lineage.get_or_insert_default().framework =
        framework_of(&version.format, &about.producer);
    (version.inputs, version.outputs) = (about.inputs, about.outputs);
    // All digests are of one length.
    version.digest = Digest::of(b"").to_string();
    for (file, path) in &files {
        let (path, size_bytes) = (file.clone(), std::fs::metadata(path)?.len());
        version.files.push(ModelFile { path, size_bytes, digest: version.digest.clone() });
    }
    fits(&version)?;
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for ((file, path), listed) in files.iter().zip(&mut version.files) {
        let (digest, bytes) = push::digest_of(path).await?;
        layers.push(layer(file, &digest, bytes));
        diff_ids.push(Value::String(digest.clone()));
        version.size_bytes += bytes;
        (listed.size_bytes, listed.digest) = (bytes, digest);
    }
    let config = serde_json::to_vec(&config_of(
        &version.model,
        &version.version,
        &version.format,
        &args.license,
        &diff_ids,
    ))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": Digest::of(&config).to_string(),
            "size": config.len(),
        },
        "layers": layers,
    }))?;
    version.digest = Digest::of(&manifest).to_string();
    let paths = files.into_iter().map(|(_, path)| path).collect();
    Ok(Packed { version, paths, config, manifest })
}

/// Pushes what was packaged to the version's repository under its tag. Answers with the bytes sent. A
/// file that has changed since is refused by the registry.
pub async fn send(registry: &push::Registry<'_>, packed: &Packed) -> Result<u64> {
    let version = &packed.version;
    let mut sent = 0;
    let board = RefCell::new(Board::new());
    for (i, (file, path)) in version.files.iter().zip(&packed.paths).enumerate() {
        let (digest, bytes) = (&file.digest, file.size_bytes);
        let label = format!("[{}/{}] {}", i + 1, version.files.len(), file.path);
        let report = |done, all| board.borrow_mut().show(0, vec![push::moving(&label, done, all)]);
        let new = push::blob(registry, &version.repository, path, digest, bytes, &report).await?;
        let what = if new { "pushed" } else { "there already" };
        let label = berth_proto::escape::for_terminal(&label);
        board.borrow_mut().end(0, &format!("{label}: {}, {what}", human_bytes(bytes)));
        if new {
            sent += bytes;
        }
    }
    let folder = push::TempFolder::new()?;
    let config = folder.path().join("config.json");
    std::fs::write(&config, &packed.config)?;
    let (digest, size) = push::digest_of(&config).await?;
    push::blob(registry, &version.repository, &config, &digest, size, &|_, _| {}).await?;
    let bytes = packed.manifest.clone();
    push::manifest(registry, &version.repository, &version.version, MANIFEST, bytes).await?;
    Ok(sent)
}

/// Where a folder comes from, when it is in a git work tree.
pub fn lineage(path: &Path, parent: &str, datasets: Vec<String>) -> Lineage {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let git = |args: &[&str]| -> Option<String> {
        let output = Command::new("git").arg("-C").arg(folder).args(args).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text)
    };
    // Credentials in an address are nobody's business.
    let remote = git(&["remote", "get-url", "origin"]).unwrap_or_default();
    let remote = match remote.split_once("://") {
        Some((scheme, rest)) => {
            format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
        }
        None => remote,
    };
    Lineage {
        git_commit: git(&["rev-parse", "HEAD"]).unwrap_or_default(),
        git_branch: git(&["rev-parse", "--abbrev-ref", "HEAD"]).unwrap_or_default(),
        git_dirty: git(&["status", "--porcelain"]).is_some_and(|text| !text.is_empty()),
        git_remote: remote,
        parent: parent.to_owned(),
        datasets,
        packaged_on: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        packaged_with: format!("berth {}", env!("CARGO_PKG_VERSION")),
        ..Lineage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_told_from_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let of = |names: &[&str]| {
            let files: Vec<(String, PathBuf)> = names
                .iter()
                .map(|name| ((*name).to_owned(), dir.path().join(name.replace('/', "-"))))
                .collect();
            format_of(&files)
        };
        std::fs::write(dir.path().join("weights.bin"), b"GGUF\0\0").unwrap();
        for (names, format) in [
            (&["model.ONNX", "labels.txt"][..], "onnx"),
            (&["1/saved_model.pb", "1/variables/x"], "tensorflow-savedmodel"),
            (&["net-symbol.json", "net-0000.params"], "mxnet"),
            (&["a.safetensors", "config.json"], "safetensors"),
            (&["weights.bin"], "gguf"),
            (&["clf.joblib"], "sklearn-joblib"),
            (&["net.pt"], "pytorch"),
            (&["what.ever"], "other"),
        ] {
            assert_eq!(of(names), format, "{names:?}");
        }
    }

    /// ModelPack v1, config-schema.json: the fields there are, and no others, at every level.
    #[test]
    fn the_artifacts_configuration_is_a_modelpacks() {
        let config = config_of("iris", "1", "onnx", "MIT", &[json!("sha256:00")]);
        let keys = |v: &Value| -> Vec<String> { v.as_object().unwrap().keys().cloned().collect() };
        assert_eq!(keys(&config), ["config", "descriptor", "modelfs"]);
        let allowed = [
            "createdAt",
            "authors",
            "family",
            "name",
            "docURL",
            "sourceURL",
            "datasetsURL",
            "version",
            "revision",
            "vendor",
            "licenses",
            "title",
            "description",
        ];
        assert!(keys(&config["descriptor"]).iter().all(|k| allowed.contains(&k.as_str())));
        assert!(config["descriptor"]["licenses"].is_array());
        assert_eq!(keys(&config["config"]), ["format"]);
        assert_eq!(config["modelfs"], json!({"type": "layers", "diffIds": ["sha256:00"]}));
        let layer = layer("a/model.onnx", "sha256:00", 7);
        assert_eq!(layer["mediaType"], "application/vnd.cncf.model.weight.v1.raw");
        assert_eq!(layer["annotations"]["org.cncf.model.filepath"], "a/model.onnx");
        let metadata = layer["annotations"]["org.cncf.model.file.metadata+json"].as_str().unwrap();
        let metadata: Value = serde_json::from_str(metadata).unwrap();
        assert_eq!(keys(&metadata), ["gid", "mode", "mtime", "name", "size", "typeflag", "uid"]);
    }

    #[test]
    fn a_work_tree_tells_its_commit_and_whether_it_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let mut command = Command::new("git");
            command.arg("-C").arg(dir.path()).args(["-c", "user.name=t", "-c", "user.email=t@t"]);
            assert!(command.args(args).output().unwrap().status.success(), "{args:?}");
        };
        let none = lineage(dir.path(), "", Vec::new());
        assert_eq!((none.git_commit.as_str(), none.git_dirty), ("", false));
        git(&["init", "-q", "-b", "trunk"]);
        std::fs::write(dir.path().join("m.onnx"), "x").unwrap();
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "x"]);
        git(&["remote", "add", "origin", "https://me:secret@example.com/a/b"]);
        let clean = lineage(&dir.path().join("m.onnx"), "iris:1", vec!["s3://d".into()]);
        assert_eq!((clean.git_commit.len(), clean.git_dirty), (40, false));
        assert_eq!(clean.git_branch, "trunk");
        assert_eq!(clean.git_remote, "https://example.com/a/b");
        assert_eq!((clean.parent.as_str(), clean.datasets.len()), ("iris:1", 1));
        std::fs::write(dir.path().join("m.onnx"), "y").unwrap();
        assert!(lineage(dir.path(), "", Vec::new()).git_dirty);
    }

    #[test]
    fn a_model_whose_record_the_server_would_not_take_is_refused_before_it_is_sent() {
        let of = |files: usize, path: usize| {
            let digest = Digest::of(b"").to_string();
            let file = ModelFile { path: "p".repeat(path), size_bytes: 1 << 30, digest };
            ModelVersion { files: vec![file; files], ..ModelVersion::default() }
        };
        fits(&of(MAX_MODEL_FILES, 40)).unwrap();
        assert!(fits(&of(MAX_MODEL_FILES, 60)).is_err());
        assert!(fits(&of(1_000, 500)).is_err());
        let dir = tempfile::tempdir().unwrap();
        for n in 0..=MAX_MODEL_FILES {
            std::fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        let many = files_of(dir.path()).err().unwrap().to_string();
        assert!(many.contains("more than 4000 files"), "{many}");
        std::fs::remove_file(dir.path().join("0")).unwrap();
        assert_eq!(files_of(dir.path()).unwrap().len(), MAX_MODEL_FILES);
    }

    #[test]
    fn a_folder_is_read_in_order_and_links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        for name in ["c", "b/x", "a"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let mut files = Vec::new();
        collect(dir.path(), dir.path(), &mut files).unwrap();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b/x", "c"]);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(collect(dir.path(), dir.path(), &mut Vec::new()).is_err());
        let words = |path: &str| files_of(Path::new(path)).err().unwrap().message;
        assert_eq!(words("/dev/null"), "/dev/null is neither a file nor a folder");
        assert_eq!(words("/dev/nothing"), "/dev/nothing does not exist");
    }
}
