//! Models' files: fetched by digest, verified, laid out as a folder that never changes.
//!
//! `trees/<manifest digest>/` holds a model's files and is finished by a rename; a folder that is
//! there is whole. Paths and entries of archives stay inside it: nothing absolute, no `..`, no links,
//! no devices; counts and sizes are bounded.

use super::client::{Client, FetchError, Into};
use berth_proto::ids::Digest;
use bytes::Bytes;
use serde_json::Value;
use sha2::Digest as _;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use tokio::io::AsyncWriteExt as _;

/// Files of one model.
const MAX_FILES: usize = 10_000;
/// Layers of one model.
const MAX_LAYERS: usize = 1_000;
/// An unpacked layer may be so many times its packed size: beyond that it is a bomb.
const MAX_RATIO: u64 = 200;

/// One layer.
struct Layer {
    digest: Digest,
    size: u64,
    kind: Packed,
    path: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Packed {
    Raw,
    Tar,
    TarGzip,
    TarZstd,
}

/// A path that stays inside a folder.
fn inside(path: &str) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!clean.as_os_str().is_empty()).then_some(clean)
}

/// Layers of a ModelPack, ModelKit or Docker model artifact.
fn layers(manifest: &[u8]) -> Result<Vec<Layer>, FetchError> {
    let unusable = |what: &str| FetchError::Unusable(format!("the model's manifest {what}"));
    let json: Value = serde_json::from_slice(manifest).map_err(|_| unusable("is not JSON"))?;
    let config = json["config"]["mediaType"].as_str().unwrap_or_default();
    let known = [
        "application/vnd.cncf.model.",
        "application/vnd.kitops.modelkit.",
        "application/vnd.docker.ai.",
    ];
    if !known.iter().any(|prefix| config.starts_with(prefix)) {
        return Err(unusable("is of a kind that is not a model's"));
    }
    let list = json["layers"].as_array().ok_or_else(|| unusable("has no layers"))?;
    if list.len() > MAX_LAYERS {
        return Err(unusable("has too many layers"));
    }
    let mut out = Vec::new();
    for (i, layer) in list.iter().enumerate() {
        let media = layer["mediaType"].as_str().unwrap_or_default();
        let kind = match media.rsplit_once(".v1.").map_or(media, |(_, enc)| enc) {
            "tar" => Packed::Tar,
            "tar+gzip" => Packed::TarGzip,
            "tar+zstd" => Packed::TarZstd,
            _ => Packed::Raw,
        };
        let named = layer["annotations"]["org.cncf.model.filepath"]
            .as_str()
            .or(layer["annotations"]["org.opencontainers.image.title"].as_str());
        let fallback = format!("layer-{i}");
        let path = inside(named.unwrap_or(&fallback))
            .ok_or_else(|| unusable("names a file outside of its folder"))?;
        out.push(Layer {
            digest: layer["digest"]
                .as_str()
                .and_then(|d| d.parse().ok())
                .ok_or_else(|| unusable("has a layer without a digest"))?,
            size: layer["size"].as_u64().ok_or_else(|| unusable("has a layer without a size"))?,
            kind,
            path,
        });
    }
    Ok(out)
}

/// Brings a model's files; answers with their folder. Says how many bytes are here, of how many.
///
/// # Errors
/// When they do not come, are wrong, or leave their folder.
pub async fn fetch(
    client: &Client,
    root: &Path,
    repository: &str,
    digest: &Digest,
    progress: impl Fn(u64, u64) + Send + Sync,
) -> Result<PathBuf, FetchError> {
    let tree = root.join("trees").join(digest.hex());
    if tree.exists() {
        return Ok(tree);
    }
    let manifest = client.manifest(repository, digest).await?;
    let layers = layers(&manifest)?;
    let total: u64 = layers.iter().map(|l| l.size).sum();
    let stat = rustix::fs::statvfs(root).map_err(std::io::Error::from)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // Blobs and, for archives, what comes out of them.
    if free < total.saturating_mul(2) {
        return Err(FetchError::Unusable(format!(
            "the model needs {} and only {} are free",
            berth_proto::quantity::human_bytes(total.saturating_mul(2)),
            berth_proto::quantity::human_bytes(free)
        )));
    }
    let blobs = root.join("blobs").join("sha256");
    tokio::fs::create_dir_all(&blobs).await?;
    let mut done = 0;
    for layer in &layers {
        let path = blobs.join(layer.digest.hex());
        if !path.exists() {
            blob(client, repository, layer, &path, |here| progress(done + here, total)).await?;
        }
        done += layer.size;
        progress(done, total);
    }
    let (tree_path, blobs_path) = (tree.clone(), blobs.clone());
    tokio::task::spawn_blocking(move || lay_out(&layers, &blobs_path, &tree_path))
        .await
        .map_err(|e| FetchError::Unusable(e.to_string()))??;
    Ok(tree)
}

async fn blob(
    client: &Client,
    repository: &str,
    layer: &Layer,
    path: &Path,
    progress: impl Fn(u64) + Send,
) -> Result<(), FetchError> {
    let partial = path.with_extension("partial");
    let file =
        tokio::fs::OpenOptions::new().create(true).append(true).read(true).open(&partial).await?;
    let mut here = file.metadata().await?.len();
    if here > layer.size {
        file.set_len(0).await?;
        here = 0;
    }
    progress(here);
    let digest = layer.digest.to_string();
    let mut growing = Growing { file, here, progress };
    client.blob(repository, &digest, here, layer.size, &mut growing).await?;
    growing.file.flush().await?;
    growing.file.sync_all().await?;
    drop(growing);
    let (checked, expected) = (partial.clone(), layer.digest.clone());
    let good = tokio::task::spawn_blocking(move || -> std::io::Result<bool> {
        let mut hash = sha2::Sha256::new();
        std::io::copy(&mut std::fs::File::open(checked)?, &mut hash)?;
        Ok(Digest::from_sha256(&hash.finalize().into()) == expected)
    })
    .await
    .map_err(|e| FetchError::Unusable(e.to_string()))??;
    if !good {
        tokio::fs::remove_file(&partial).await?;
        return Err(FetchError::Wrong(digest));
    }
    tokio::fs::rename(&partial, path).await?;
    Ok(())
}

/// A file that a blob's pieces are appended to.
struct Growing<F> {
    file: tokio::fs::File,
    here: u64,
    progress: F,
}

impl<F: Fn(u64) + Send> Into for Growing<F> {
    async fn take(&mut self, piece: Bytes) -> Result<(), FetchError> {
        self.file.write_all(&piece).await?;
        self.here += piece.len() as u64;
        (self.progress)(self.here);
        Ok(())
    }
}

fn lay_out(layers: &[Layer], blobs: &Path, tree: &Path) -> Result<(), FetchError> {
    let making = tree.with_extension("making");
    if making.exists() {
        std::fs::remove_dir_all(&making)?;
    }
    std::fs::create_dir_all(&making)?;
    let mut files = 0;
    for layer in layers {
        let blob = blobs.join(layer.digest.hex());
        if layer.kind == Packed::Raw {
            let to = making.join(&layer.path);
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::hard_link(&blob, &to).or_else(|_| std::fs::copy(&blob, &to).map(|_| ()))?;
            readable(&to, 0o644)?;
            files += 1;
        } else {
            let file = std::fs::File::open(&blob)?;
            let reader: Box<dyn Read> = match layer.kind {
                Packed::TarGzip => Box::new(flate2::read::GzDecoder::new(file)),
                Packed::TarZstd => Box::new(zstd::stream::read::Decoder::new(file)?),
                Packed::Tar | Packed::Raw => Box::new(file),
            };
            let most = layer.size.saturating_mul(MAX_RATIO).max(1 << 20);
            unpack(reader.take(most), &making, &mut files)?;
        }
        if files > MAX_FILES {
            return Err(FetchError::Unusable("the model has too many files".to_owned()));
        }
    }
    std::fs::File::open(&making)?.sync_all()?;
    std::fs::rename(&making, tree)?;
    if let Some(parent) = tree.parent() {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn readable(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

fn unpack(reader: impl Read, folder: &Path, files: &mut usize) -> Result<(), FetchError> {
    let leaves = |path: &Path| {
        FetchError::Unusable(format!(
            "the model's archive has an entry that leaves its folder or is no file: {}",
            path.display()
        ))
    };
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let named = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        let Some(path) = named.to_str().and_then(inside) else {
            // The folder itself is no way out.
            if named.components().all(|c| c == Component::CurDir) && kind.is_dir() {
                continue;
            }
            return Err(leaves(&named));
        };
        let to = folder.join(path);
        if kind.is_dir() {
            std::fs::create_dir_all(&to)?;
            continue;
        }
        if !kind.is_file() {
            return Err(leaves(&named));
        }
        *files += 1;
        if *files > MAX_FILES {
            return Err(FetchError::Unusable("the model has too many files".to_owned()));
        }
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        // Made anew: nothing is followed, nothing is overwritten.
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&to)?;
        std::io::copy(&mut entry, &mut file)?;
        readable(&to, 0o644)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(path: &str, kind: tar::EntryType) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(2);
        header.set_mode(0o644);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &b"hi"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn an_archive_cannot_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        for (path, kind) in [
            ("../escape", tar::EntryType::Regular),
            ("/absolute", tar::EntryType::Regular),
            ("a/../../b", tar::EntryType::Regular),
            ("link", tar::EntryType::Symlink),
            ("hard", tar::EntryType::Link),
            ("device", tar::EntryType::Char),
        ] {
            let bytes = archive(path, kind);
            assert!(unpack(&bytes[..], dir.path(), &mut 0).is_err(), "{path}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let good = archive("./sub/file", tar::EntryType::Regular);
        unpack(&good[..], dir.path(), &mut 0).unwrap();
        assert_eq!(std::fs::read(dir.path().join("sub/file")).unwrap(), b"hi");
    }

    #[test]
    fn a_manifest_that_names_a_file_outside_is_refused() {
        let manifest = |path: &str| {
            serde_json::json!({
                "config": {"mediaType": "application/vnd.cncf.model.config.v1+json"},
                "layers": [{
                    "mediaType": "application/vnd.cncf.model.weight.v1.raw",
                    "digest": Digest::of(b"x").as_str(), "size": 1,
                    "annotations": {"org.cncf.model.filepath": path},
                }],
            })
            .to_string()
        };
        assert!(layers(manifest("model.onnx").as_bytes()).is_ok());
        assert!(layers(manifest("../model.onnx").as_bytes()).is_err());
        assert!(layers(b"{}").is_err());
    }
}
