//! Models' files: fetched by digest, verified, laid out as a folder that never changes.
//!
//! `trees/<manifest digest>/` holds a model's files and is finished by a rename; a folder that is
//! there is whole. Paths and entries of archives stay inside it: nothing absolute, no `..`, no links,
//! no devices; counts and sizes are bounded.

use super::archive::{Most, unpack};
use super::client::FetchError;
use super::keep::Keeper;
use super::spool::Spool;
use super::transfer::{Job, Room as _, Seen, Transfers};
use berth_agent_core::transfer::{Blob, Failure};
use berth_proto::ids::Digest;
use berth_proto::values::MAX_MODEL_FILES;
use serde_json::Value;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Files of one model, archives unpacked.
pub(super) const MAX_FILES: usize = 10_000;
/// An unpacked layer may be so many times its packed size: beyond that it is a bomb.
const MAX_RATIO: u64 = 200;
/// Ends the name of a model's folder that is being made.
const MAKING: &str = "making";
/// Ends the name of a model's folder that is being thrown away.
pub(super) const GOING: &str = "going";

/// One layer.
pub(super) struct Layer {
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
pub(super) fn inside(path: &str) -> Option<PathBuf> {
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
pub(super) fn layers(manifest: &[u8]) -> Result<Vec<Layer>, FetchError> {
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
    // A layer holds at least one file.
    if list.len() > MAX_MODEL_FILES {
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

/// What brings models' files.
#[derive(Clone)]
pub struct Artifacts {
    /// Moves the bytes.
    pub transfers: Arc<Transfers>,
    /// Keeps the books of the disk.
    pub keeper: Arc<Keeper>,
    /// Blobs, whole files by digest.
    pub blobs: Spool,
    /// Models' folders by manifest digest.
    pub trees: PathBuf,
}

impl Artifacts {
    /// Brings a model's files; answers with their folder.
    ///
    /// # Errors
    /// When they do not come, are wrong, leave their folder, or there is no room.
    pub async fn fetch(
        &self,
        repository: &str,
        digest: &Digest,
        wanted: &(dyn Fn() -> bool + Send + Sync),
        tell: &(dyn Fn(Seen) + Send + Sync),
    ) -> Result<PathBuf, FetchError> {
        let tree = self.trees.join(digest.hex());
        if tree.exists() {
            return Ok(tree);
        }
        let (manifest, _) = self.transfers.client().manifest(repository, digest).await?;
        let layers = layers(&manifest)?;
        let all: Vec<Digest> = layers.iter().map(|l| l.digest.clone()).collect();
        self.keeper.comes(digest, &all).await;
        let _hold = self.keeper.hold(all);
        let mut blobs: Vec<Blob> = Vec::new();
        for layer in &layers {
            if !blobs.iter().any(|b| b.digest == layer.digest) {
                blobs.push(Blob { digest: layer.digest.clone(), size_bytes: layer.size });
            }
        }
        let job =
            Job { spool: self.blobs.clone(), repository, blobs, room: &*self.keeper, wanted, tell };
        self.transfers.run(job).await?;
        // What is unpacked needs room beside the packed bytes, at least as much.
        let packed: u64 = layers.iter().filter(|l| l.kind != Packed::Raw).map(|l| l.size).sum();
        if packed > 0 {
            self.keeper.room(packed).await.map_err(|(need_bytes, free_bytes)| {
                FetchError::Transfer(Failure::NoRoom { need_bytes, free_bytes })
            })?;
        }
        let (to, spool, keep_free) =
            (tree.clone(), self.blobs.clone(), self.keeper.keep_free_bytes());
        tokio::task::spawn_blocking(move || lay_out(&layers, &spool, &to, keep_free))
            .await
            .map_err(|e| FetchError::Unusable(e.to_string()))??;
        Ok(tree)
    }
}

/// Lays a model's files out as a folder; nothing is left of what does not get whole. Each try has a
/// folder of its own: one that was given up may still be unpacking when the next one begins, and
/// whichever is whole first counts.
pub(super) fn lay_out(
    layers: &[Layer],
    blobs: &Spool,
    tree: &Path,
    keep_free_bytes: u64,
) -> Result<(), FetchError> {
    let making = tree.with_extension(format!("{}.{MAKING}", uuid::Uuid::new_v4().simple()));
    let made = make(layers, blobs, tree, &making, keep_free_bytes);
    if made.is_err()
        && let Err(error) = std::fs::remove_dir_all(&making)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "what is left of a model that did not get whole stays");
    }
    if tree.exists() { Ok(()) } else { made }
}

/// Removes what a crash has left of models that were being made or thrown away.
///
/// # Errors
/// When the disk does not take it.
pub(super) fn sweep(trees: &Path) -> io::Result<()> {
    for one in std::fs::read_dir(trees)? {
        let path = one?.path();
        if path.extension().is_some_and(|e| e == MAKING || e == GOING) {
            std::fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

fn make(
    layers: &[Layer],
    blobs: &Spool,
    tree: &Path,
    making: &Path,
    keep_free_bytes: u64,
) -> Result<(), FetchError> {
    std::fs::create_dir_all(making)?;
    let mut files = 0;
    for layer in layers {
        let blob = blobs.whole(&layer.digest);
        if layer.kind == Packed::Raw {
            let to = making.join(&layer.path);
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            link(&blob, &to)?;
            files += 1;
        } else {
            let file = std::fs::File::open(&blob)?;
            let reader: Box<dyn Read> = match layer.kind {
                Packed::TarGzip => Box::new(flate2::read::MultiGzDecoder::new(file)),
                Packed::TarZstd => Box::new(zstd::stream::read::Decoder::new(file)?),
                Packed::Tar | Packed::Raw => Box::new(file),
            };
            let most = Most {
                bytes: layer.size.saturating_mul(MAX_RATIO).max(1 << 20),
                room_bytes: crate::facts::disk_free(making).saturating_sub(keep_free_bytes),
            };
            unpack(reader, most, making, &mut files)?;
        }
        if files > MAX_FILES {
            return Err(FetchError::Unusable("the model has too many files".to_owned()));
        }
    }
    enterable(making)?;
    // All of it is on the disk before its name says so.
    rustix::fs::syncfs(std::fs::File::open(making)?).map_err(io::Error::from)?;
    std::fs::rename(making, tree)?;
    if let Some(parent) = tree.parent() {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// A further name for a blob. Where the file system takes no link it is copied; what is there already
/// is never written to, because it may be another blob's link.
fn link(blob: &Path, to: &Path) -> Result<(), FetchError> {
    match std::fs::hard_link(blob, to) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let name = to.display();
            return Err(FetchError::Unusable(format!("the model has two files {name}")));
        }
        Err(_) => {
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(to)?;
            io::copy(&mut std::fs::File::open(blob)?, &mut file)?;
        }
    }
    Ok(readable(to)?)
}

/// Lets whatever user the program runs as into a folder and all below it, whatever the agent's own
/// mask for new folders is.
fn enterable(folder: &Path) -> io::Result<()> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    for one in std::fs::read_dir(folder)? {
        let one = one?;
        if one.file_type()?.is_dir() {
            enterable(&one.path())?;
        }
    }
    Ok(())
}

/// Readable for whatever user the program runs as, writable for nobody.
pub(super) fn readable(path: &Path) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::DirBuilderExt as _;

    #[test]
    fn a_bomb_is_not_unpacked_to_its_end_and_never_taken_for_whole() {
        let mut header = tar::Header::new_gnu();
        header.set_path("zeros").unwrap();
        header.set_size(64 << 20);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, io::repeat(0).take(64 << 20)).unwrap();
        let tar = builder.into_inner().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().join("blobs")).unwrap();
        std::fs::create_dir(dir.path().join("trees")).unwrap();
        let packed = zstd::stream::encode_all(&tar[..], 3).unwrap();
        let digest = Digest::of(&packed);
        std::fs::write(spool.whole(&digest), &packed).unwrap();
        let size = packed.len() as u64;
        assert!(size < 64 << 10, "{size}");
        let layer = Layer { digest, size, kind: Packed::TarZstd, path: "zeros".into() };
        let tree = dir.path().join("trees").join("t");
        let full = lay_out(std::slice::from_ref(&layer), &spool, &tree, u64::MAX).unwrap_err();
        assert!(matches!(full, FetchError::Transfer(Failure::NoRoom { .. })), "{full}");
        assert!(lay_out(&[layer], &spool, &tree, 0).is_err());
        assert!(!tree.exists());
        assert_eq!(
            std::fs::read_dir(dir.path().join("trees")).unwrap().count(),
            0,
            "nothing stays"
        );
    }

    /// A layer that is in `spool`.
    fn held(spool: &Spool, bytes: &[u8], kind: Packed, path: &str) -> Layer {
        let digest = Digest::of(bytes);
        std::fs::write(spool.whole(&digest), bytes).unwrap();
        Layer { digest, size: bytes.len() as u64, kind, path: path.into() }
    }

    fn tar_of(path: &str) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o600);
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header, path, &b"hi"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn all_members_of_a_gzip_file_are_unpacked() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().join("blobs")).unwrap();
        std::fs::create_dir(dir.path().join("trees")).unwrap();
        let (one, two) = (tar_of("one"), tar_of("two"));
        let member = |bytes: &[u8]| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(bytes).unwrap();
            gzip.finish().unwrap()
        };
        let packed = [member(&one[..1024]), member(&two)].concat();
        let layer = held(&spool, &packed, Packed::TarGzip, "x.tar.gz");
        let tree = dir.path().join("trees").join("t");
        lay_out(&[layer], &spool, &tree, 0).unwrap();
        assert!(tree.join("one").exists() && tree.join("two").exists());
    }

    #[test]
    fn two_files_of_one_name_are_refused_and_leave_the_blobs_alone() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().join("blobs")).unwrap();
        std::fs::create_dir(dir.path().join("trees")).unwrap();
        let layer = |bytes: &[u8]| held(&spool, bytes, Packed::Raw, "same");
        let both = [layer(b"one"), layer(b"two")];
        let tree = dir.path().join("trees").join("t");
        assert!(lay_out(&both, &spool, &tree, 0).is_err());
        assert_eq!(std::fs::read(spool.whole(&both[0].digest)).unwrap(), b"one");
        lay_out(&both[..1], &spool, &tree, 0).unwrap();
        assert_eq!(std::fs::read(tree.join("same")).unwrap(), b"one");
        // A second try that was under way meanwhile changes nothing and leaves nothing.
        lay_out(&both[..1], &spool, &tree, 0).unwrap();
        let beside = std::fs::read_dir(tree.parent().unwrap()).unwrap().count();
        assert_eq!((beside, std::fs::read(tree.join("same")).unwrap()), (1, b"one".to_vec()));
        // What a crash has left goes at the next start, what is whole stays.
        for left in [MAKING, GOING] {
            std::fs::create_dir_all(tree.with_extension(left).join("sub")).unwrap();
        }
        sweep(tree.parent().unwrap()).unwrap();
        let left: Vec<_> = std::fs::read_dir(tree.parent().unwrap()).unwrap().collect();
        assert_eq!((left.len(), tree.exists()), (1, true));
    }

    #[test]
    fn every_folder_of_a_model_is_open_to_every_user_also_where_the_umask_keeps_them_out() {
        let dir = tempfile::tempdir().unwrap();
        let folders = ["", "a", "a/b", "c"].map(|name| dir.path().join("tree").join(name));
        for folder in &folders {
            std::fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
        }
        enterable(&folders[0]).unwrap();
        for folder in &folders {
            let mode = std::fs::metadata(folder).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755, "{}", folder.display());
        }
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
