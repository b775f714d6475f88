//! A model's files as a CNCF ModelPack artifact (github.com/modelpack/model-spec, v1), and what is
//! remembered of where they come from.
//!
//! Files are shipped raw, one layer each: a raw blob equals the file, so that ranges and what has not
//! changed can be told from any registry. The same files give the same digests.

use crate::client::Context;
use crate::error::{Error, Result};
use crate::push;
use berth_proto::api::{Lineage, ModelFile, TensorSpec};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files of one model, as the contract says.
const MAX_FILES: usize = 10_000;

/// What was pushed.
pub struct Pushed {
    pub digest: String,
    pub size: u64,
    pub sent: u64,
    pub files: Vec<ModelFile>,
    pub format: String,
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
}

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
        if out.len() > MAX_FILES {
            return Err(Error::user(format!("the folder holds more than {MAX_FILES} files")));
        }
    }
    Ok(())
}

fn format_of(files: &[(String, PathBuf)]) -> &'static str {
    let ends =
        |ending: &str| files.iter().any(|(name, _)| name.to_ascii_lowercase().ends_with(ending));
    if ends(".onnx") {
        "onnx"
    } else if ends("saved_model.pb") {
        "tensorflow-savedmodel"
    } else if ends(".joblib") || ends(".pkl") {
        "sklearn-joblib"
    } else if ends(".pt") || ends(".pth") {
        "pytorch"
    } else if ends(".gguf") {
        "gguf"
    } else if ends(".safetensors") {
        "safetensors"
    } else {
        "other"
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

/// Packages a file or folder and pushes it to `models/<name>` under the version's tag.
pub async fn push_model(
    context: &Context,
    name: &str,
    version: &str,
    path: &Path,
    format: Option<&str>,
    say: impl Fn(&str),
) -> Result<Pushed> {
    let mut files = Vec::new();
    if path.is_dir() {
        collect(path, path, &mut files)?;
    } else if path.is_file() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        files.push((name, path.to_owned()));
    } else {
        return Err(Error::user(format!("{} does not exist", path.display())));
    }
    if files.is_empty() {
        return Err(Error::user(format!("{} holds no files", path.display())));
    }
    let format = format.map_or_else(|| format_of(&files).to_owned(), str::to_owned);
    let repository = format!("models/{name}");
    let (mut layers, mut listed, mut diff_ids) = (Vec::new(), Vec::new(), Vec::new());
    let (mut size, mut sent) = (0, 0);
    for (i, (file, path)) in files.iter().enumerate() {
        let (digest, bytes) = push::digest_of(path)?;
        let human = berth_proto::quantity::human_bytes(bytes);
        say(&format!("[{}/{}] {file} ({human})", i + 1, files.len()));
        if bytes > 0 && push::blob(context, &repository, path, &digest, bytes).await? {
            sent += bytes;
        }
        if bytes == 0 {
            return Err(Error::user(format!("{file} is empty; registries take no empty files")));
        }
        let metadata = json!({
            "name": file, "mode": 420, "uid": 0, "gid": 0, "size": bytes,
            "mtime": "1970-01-01T00:00:00Z", "typeflag": 48,
        });
        layers.push(json!({
            "mediaType": format!("application/vnd.cncf.model.{}.v1.raw", kind_of(file)),
            "digest": digest,
            "size": bytes,
            "annotations": {
                "org.cncf.model.filepath": file,
                "org.cncf.model.file.metadata+json": metadata.to_string(),
            },
        }));
        diff_ids.push(Value::String(digest.clone()));
        listed.push(ModelFile { path: file.clone(), size_bytes: bytes, digest });
        size += bytes;
    }
    let config = json!({
        "descriptor": { "name": name, "version": version },
        "config": { "format": format },
        "modelfs": { "type": "layers", "diffIds": diff_ids },
    });
    let folder = push::TempFolder::new()?;
    let config_path = folder.path().join("config.json");
    std::fs::write(&config_path, serde_json::to_vec(&config)?)?;
    let (config_digest, config_size) = push::digest_of(&config_path)?;
    push::blob(context, &repository, &config_path, &config_digest, config_size).await?;
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": config_digest,
            "size": config_size,
        },
        "layers": layers,
    });
    let bytes = serde_json::to_vec(&manifest)?;
    let digest = push::manifest(context, &repository, version, media, bytes).await?;
    let onnx = files.iter().find(|(name, _)| name.ends_with(".onnx"));
    let (inputs, outputs) = match onnx {
        Some((_, path)) => signature(&std::fs::read(path)?).unwrap_or_default(),
        None => Default::default(),
    };
    Ok(Pushed { digest, size, sent, files: listed, format, inputs, outputs })
}

/// Where a folder comes from, when it is in a git work tree.
pub fn lineage(path: &Path, parent: &str) -> Lineage {
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
        packaged_with: format!("berth {}", env!("CARGO_PKG_VERSION")),
        ..Lineage::default()
    }
}

type Signature = (Vec<TensorSpec>, Vec<TensorSpec>);

/// Inputs and outputs of an ONNX file (onnx.proto: ModelProto.graph = 7; GraphProto.initializer = 5,
/// input = 11, output = 12; ValueInfoProto.name = 1, type = 2).
fn signature(model: &[u8]) -> Option<Signature> {
    let graph = fields(model)?.into_iter().find(|(tag, _)| *tag == 7)?.1;
    let graph = fields(graph)?;
    let named = |bytes: &[u8], tag: u32| -> Option<String> {
        let found = fields(bytes)?.into_iter().find(|(t, _)| *t == tag)?.1;
        String::from_utf8(found.to_vec()).ok()
    };
    // Weights may be listed as inputs, too; TensorProto.name is 8.
    let weights: Vec<String> =
        graph.iter().filter(|(tag, _)| *tag == 5).filter_map(|(_, b)| named(b, 8)).collect();
    let all = |tag: u32| -> Vec<TensorSpec> {
        graph
            .iter()
            .filter(|(t, _)| *t == tag)
            .filter_map(|(_, bytes)| tensor(bytes))
            .filter(|t| !weights.contains(&t.name))
            .collect()
    };
    Some((all(11), all(12)))
}

fn tensor(bytes: &[u8]) -> Option<TensorSpec> {
    let info = fields(bytes)?;
    let name = String::from_utf8(info.iter().find(|(t, _)| *t == 1)?.1.to_vec()).ok()?;
    let kind = fields(info.iter().find(|(t, _)| *t == 2)?.1)?;
    let tensor = fields(kind.iter().find(|(t, _)| *t == 1)?.1)?;
    let datatype = match varint_field(info_of(&tensor, 1)?)? {
        1 => "FP32",
        2 => "UINT8",
        3 => "INT8",
        4 => "UINT16",
        5 => "INT16",
        6 => "INT32",
        7 => "INT64",
        8 => "BYTES",
        9 => "BOOL",
        10 => "FP16",
        11 => "FP64",
        12 => "UINT32",
        13 => "UINT64",
        16 => "BF16",
        _ => "OTHER",
    };
    let shape = tensor
        .iter()
        .find(|(t, _)| *t == 2)
        .and_then(|(_, bytes)| fields(bytes))
        .unwrap_or_default()
        .iter()
        .map(|(_, dimension)| {
            let value = fields(dimension).and_then(|f| varint_field(info_of(&f, 1)?));
            value.and_then(|v| i64::try_from(v).ok()).unwrap_or(-1)
        })
        .collect();
    Some(TensorSpec { name, datatype: datatype.to_owned(), shape })
}

fn info_of<'a>(fields: &[(u32, &'a [u8])], tag: u32) -> Option<&'a [u8]> {
    fields.iter().find(|(t, _)| *t == tag).map(|(_, bytes)| *bytes)
}

fn varint_field(mut bytes: &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(&mut bytes).ok()
}

/// The fields of a protobuf message: tag and bytes (for numbers, their encoding).
fn fields(mut bytes: &[u8]) -> Option<Vec<(u32, &[u8])>> {
    use prost::encoding::{WireType, decode_key, decode_varint};
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (tag, wire) = decode_key(&mut bytes).ok()?;
        let length = match wire {
            WireType::Varint => {
                let before = bytes;
                decode_varint(&mut bytes).ok()?;
                out.push((tag, &before[..before.len() - bytes.len()]));
                continue;
            }
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut bytes).ok()?).ok()?,
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let (value, rest) = bytes.split_at_checked(length)?;
        out.push((tag, value));
        bytes = rest;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_models_tell_their_inputs_and_outputs() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models");
        let read = |name: &str| signature(&std::fs::read(root.join(name)).unwrap()).unwrap();
        let (inputs, outputs) = read("iris/model.onnx");
        assert_eq!(
            (inputs[0].datatype.as_str(), inputs[0].shape.as_slice()),
            ("FP32", &[-1, 4][..])
        );
        assert!(!outputs.is_empty());
        assert_eq!(read("digits/model.onnx").0[0].shape, [-1, 1, 8, 8]);
    }

    #[test]
    fn nonsense_is_no_model() {
        assert!(signature(b"nonsense").is_none());
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
    }
}
