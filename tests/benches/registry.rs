//! Pushing and pulling an image and an artifact, beside Debian's `docker-registry`, in one run.
//!
//! Both serve HTTPS on loopback from a folder of the same disk, and skopeo is the client of both: it
//! copies the same OCI layout there and back, layers as they are. The image has many layers of a
//! middling size, the artifact one large file. Each round has new random bytes, so that nobody has
//! any of them already; the sides take turns in who comes first, and ratios are taken pair by pair.
//! Berth's server also checks a token and the repository's namespace at each request; the peer lets
//! anybody in.
//!
//! `BERTH_BENCH_MIB` (256) is the size of each, `BERTH_BENCH_ROUNDS` (5) how often. Installs skopeo
//! and docker-registry by apt when it is run by root and they are missing.

use anyhow::{Context as _, Result, ensure};
use berth_tests::bench::{Spread, number, status_kib};
use berth_tests::{Cluster, PATIENCE, Process, eventually};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Layers of the image.
const LAYERS: usize = 16;

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(String::from_utf8(output.stdout)?)
}

fn is_here(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Whether both programs are here, installing them when that can be done.
fn peers() -> bool {
    let missing: Vec<&str> =
        ["skopeo", "docker-registry"].into_iter().filter(|name| !is_here(name)).collect();
    if missing.is_empty() {
        return true;
    }
    println!("installing {}", missing.join(" and "));
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        run(command.env("DEBIAN_FRONTEND", "noninteractive").args(args).args(&missing))
    };
    let _ = run(Command::new("apt-get").args(["update", "-q"]));
    let installed = apt(&["install", "-qy", "--no-install-recommends"]);
    if let Err(error) = installed {
        println!("skipped, {} is missing and cannot be installed: {error:#}", missing.join(", "));
        return false;
    }
    // The package starts one of its own, which nobody asked for.
    let _ = run(Command::new("systemctl").args(["disable", "--now", "docker-registry"]));
    true
}

/// An OCI layout in a folder of its own.
struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// So many layers of random bytes, of `bytes` in all.
    fn random(folder: &Path, artifact: bool, layers: usize, bytes: usize) -> Result<Self> {
        let blobs = folder.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        let store = |content: &[u8], kind: &str| -> Result<Value> {
            let digest = berth_proto::ids::Digest::of(content).to_string();
            let name = digest.strip_prefix("sha256:").context("a digest of SHA-256")?;
            std::fs::write(blobs.join(name), content)?;
            Ok(json!({"mediaType": kind, "digest": digest, "size": content.len()}))
        };
        let mut random = std::fs::File::open("/dev/urandom")?;
        let mut content = vec![0; bytes / layers];
        let (mut described, mut digests) = (Vec::new(), Vec::new());
        for _ in 0..layers {
            random.read_exact(&mut content)?;
            let kind = if artifact {
                "application/vnd.cncf.model.weight.v1.raw"
            } else {
                "application/vnd.oci.image.layer.v1.tar"
            };
            let layer = store(&content, kind)?;
            digests.push(layer["digest"].clone());
            described.push(layer);
        }
        let (config, kind) = if artifact {
            let config = json!({
                "descriptor": {"name": "bench", "version": "1"}, "config": {"format": "other"},
                "modelfs": {"type": "layers", "diffIds": digests},
            });
            (config, "application/vnd.cncf.model.config.v1+json")
        } else {
            let config = json!({
                "architecture": "amd64", "os": "linux", "config": {},
                "rootfs": {"type": "layers", "diff_ids": digests},
            });
            (config, "application/vnd.oci.image.config.v1+json")
        };
        let config = store(config.to_string().as_bytes(), kind)?;
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media, "config": config, "layers": described,
        });
        let manifest = store(manifest.to_string().as_bytes(), media)?;
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        std::fs::write(folder.join("index.json"), index.to_string())?;
        std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn blobs(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.folder.join("blobs/sha256"))?.count())
    }
}

/// One of the two registries, as skopeo is told of it.
struct Side {
    name: &'static str,
    address: String,
    creds: Vec<String>,
    process: u32,
}

impl Side {
    /// Pushes a layout and pulls it again; seconds of both.
    fn there_and_back(&self, layout: &Layout, what: &str) -> Result<(f64, f64)> {
        let remote = format!("docker://{}/bench/{what}:1", self.address);
        let local = format!("oci:{}", layout.folder.display());
        let back = layout.folder.with_extension("back");
        let skopeo = |which: &str, from: &str, to: &str| -> Result<f64> {
            let mut command = Command::new("skopeo");
            command.args(["copy", "--quiet", "--preserve-digests"]);
            command.arg(format!("--{which}-tls-verify=false"));
            if let [creds] = &self.creds[..] {
                command.arg(format!("--{which}-creds={creds}"));
            }
            let begin = Instant::now();
            run(command.args([from, to]))?;
            Ok(begin.elapsed().as_secs_f64())
        };
        let push = skopeo("dest", &local, &remote)?;
        let pull = skopeo("src", &remote, &format!("oci:{}", back.display()))?;
        let came = Layout { folder: back };
        ensure!(came.blobs()? == layout.blobs()?, "{}: not all came back", self.name);
        std::fs::remove_dir_all(&came.folder)?;
        Ok((push, pull))
    }
}

/// The peer, with a certificate of its own.
fn docker_registry(folder: &Path) -> Result<(Process, String)> {
    std::fs::create_dir_all(folder)?;
    let at = |name: &str| folder.join(name).display().to_string();
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args([
            "-subj",
            "/CN=127.0.0.1",
            "-days",
            "2",
            "-keyout",
            &at("key"),
            "-out",
            &at("crt"),
        ]))?;
    // Free now; nobody else on this machine takes ports so fast.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let config = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: '{address}', tls: {{certificate: {}, key: {}}}}}\n",
        at("data"),
        at("crt"),
        at("key")
    );
    std::fs::File::create(folder.join("config.yml"))?.write_all(config.as_bytes())?;
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(folder.join("config.yml"));
    let process = Process::start(&mut command, &folder.join("log"))?;
    eventually("docker-registry listens", PATIENCE, || Ok(TcpStream::connect(&address)?))
        .map_err(|error| error.context(process.tail()))?;
    Ok((process, address))
}

fn main() -> Result<()> {
    if !peers() {
        return Ok(());
    }
    let bytes = number("BERTH_BENCH_MIB", 256) << 20;
    let rounds = number("BERTH_BENCH_ROUNDS", 5);
    let mut cluster = Cluster::start()?;
    let token = cluster.berth_json(&["user", "token", "admin"])?;
    let token = token["secret"].as_str().context("no secret in the answer")?;
    let folder = cluster.dir.path().to_owned();
    let (peer, address) = docker_registry(&folder.join("peer"))?;
    let theirs = Side { name: "docker-registry", address, creds: Vec::new(), process: peer.id() };
    let ours = Side {
        name: "Berth",
        address: cluster.door("registry")?,
        creds: vec![format!("me:{token}")],
        process: cluster.server().id(),
    };
    let mut seconds: BTreeMap<(&str, &str, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for (what, layers) in [("image", LAYERS), ("artifact", 1)] {
            let path = folder.join(format!("{what}-{round}"));
            let layout = Layout::random(&path, what == "artifact", layers, bytes)?;
            let mut sides = [&ours, &theirs];
            if round % 2 == 1 {
                sides.reverse();
            }
            for side in sides {
                let (push, pull) = side.there_and_back(&layout, what)?;
                println!(
                    "round {round}: {what}, {}: push {push:.2} s, pull {pull:.2} s",
                    side.name
                );
                seconds.entry((what, "push", side.name)).or_default().push(push);
                seconds.entry((what, "pull", side.name)).or_default().push(pull);
            }
            std::fs::remove_dir_all(&path)?;
        }
    }
    println!("{} MiB each, {rounds} rounds; seconds, and Berth's over the peer's", bytes >> 20);
    for what in ["image", "artifact"] {
        for way in ["push", "pull"] {
            let (a, b) = (&seconds[&(what, way, ours.name)], &seconds[&(what, way, theirs.name)]);
            let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
            println!("{what} {way}: Berth            {}", Spread::of(a));
            println!("{what} {way}: docker-registry  {}", Spread::of(b));
            println!("{what} {way}: ratio            {}", Spread::of(&ratios));
        }
    }
    for side in [&ours, &theirs] {
        let most = status_kib(side.process, "VmHWM")? / 1024.0;
        println!("{}: {most:.1} MiB resident at the most", side.name);
    }
    Ok(())
}
