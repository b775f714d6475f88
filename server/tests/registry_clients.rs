//! The registry door with clients nobody here wrote: docker, skopeo and podman push to it and pull
//! from it, over plain HTTP on loopback. A client that is not installed is skipped, and said so.
#![expect(clippy::unwrap_used, reason = "a test's helpers")]

use async_trait::async_trait;
use berth_proto::ids::Digest;
use berth_server::registry::access::NothingProtected;
use berth_server::registry::{
    Access, AccessError, Action, Credentials, Noted, Principal, Reach, Reference, Registry,
    RepoName, Settings, router,
};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const TOKEN: &str = "t0ken_of-a-user";
/// Longer than any of these calls takes, shorter than a stuck test is noticed.
const CALL_SECONDS: &str = "120";

struct OneToken;

#[async_trait]
impl Access for OneToken {
    async fn authenticate(&self, shown: Credentials) -> Result<Principal, AccessError> {
        match shown {
            Credentials::Basic { password, .. } if password == TOKEN => {
                Ok(Principal { subject: "user/anna".into(), only: None })
            }
            Credentials::Basic { .. } | Credentials::Bearer(_) | Credentials::Certificate(_) => {
                Err(AccessError::Refused)
            }
        }
    }
    fn allows(&self, _: &Principal, repository: &RepoName, _: Action) -> bool {
        !repository.as_str().starts_with("forbidden/")
    }
    fn reach(&self, _: &Principal, _: &RepoName) -> Reach {
        Reach::Whole
    }
    async fn note(&self, _: Noted<'_>) -> Result<(), AccessError> {
        Ok(())
    }
}

struct Door {
    registry: Registry,
    address: String,
    dir: tempfile::TempDir,
}

/// A door on a free port; it ends with the test's runtime.
async fn open() -> Door {
    let dir = tempfile::tempdir().unwrap();
    // What clients remember of logins stays in here.
    std::fs::write(dir.path().join("auth.json"), "{}").unwrap();
    let settings = Settings { min_free_percent: 1, ..Settings::default() };
    let registry = Registry::open(dir.path().join("registry"), settings).unwrap();
    let app = router(registry.clone(), Arc::new(OneToken), Arc::new(NothingProtected));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    Door { registry, address, dir }
}

/// Whether a client is here and works.
fn has(client: &str, args: &[&str]) -> bool {
    let works = Command::new(client)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !works {
        assert!(std::env::var_os("CI").is_none(), "`{client} {}` does not work", args.join(" "));
        println!("skipped: `{client} {}` does not work here", args.join(" "));
    }
    works
}

/// An image of the local engine that goes when the test does.
struct Image(String);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = Command::new("docker")
            .args(["rmi", "-f", &self.0])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

/// Runs a client to its end, within the deadline; its output.
async fn run(home: &Path, call: &str, input: &str) -> Result<String, String> {
    let (home, call, input) = (home.to_owned(), call.to_owned(), input.to_owned());
    let ran = tokio::task::spawn_blocking(move || {
        let mut command = Command::new("timeout");
        command
            .arg(CALL_SECONDS)
            .args(call.split(' '))
            .env("DOCKER_CONFIG", &home)
            .env("REGISTRY_AUTH_FILE", home.join("auth.json"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        use std::io::Write as _;
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        if done.status.success() { Ok(text) } else { Err(format!("{call}: {text}")) }
    });
    ran.await.unwrap()
}

/// A tar of one file that does not compress: several chunks for a client that sends chunks.
fn small_tar(dir: &Path) -> PathBuf {
    let content: Vec<u8> = (0_u32..1 << 19)
        .flat_map(|n| Digest::of(&n.to_le_bytes()).hex().as_bytes()[..8].to_vec())
        .collect();
    let folder = dir.join("root");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("weights"), content).unwrap();
    let tar = dir.join("image.tar");
    let made = Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&folder).arg(".").status();
    assert!(made.unwrap().success());
    tar
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn docker_logs_in_pushes_mounts_and_pulls_the_same_image() {
    if !has("docker", &["info"]) {
        return;
    }
    let door = open().await;
    let home = door.dir.path();
    let tar = small_tar(home);
    let (first, second, forbidden) = (
        format!("{}/team/iris-app:1", door.address),
        format!("{}/other:2", door.address),
        format!("{}/forbidden/x:1", door.address),
    );
    let id = run(home, &format!("docker import {} {first}", tar.display()), "").await.unwrap();
    let id = id.trim().to_owned();

    // Removed whether this ends well or not.
    let _image = Image(id.clone());
    let anonymous = run(home, &format!("docker push {first}"), "").await.unwrap_err();
    assert!(anonymous.contains("no basic auth credentials"), "{anonymous}");
    let login = format!("docker login -u anybody --password-stdin {}", door.address);
    let wrong = run(home, &login, "wrong").await.unwrap_err();
    assert!(wrong.contains("401 Unauthorized"), "{wrong}");
    run(home, &login, TOKEN).await.unwrap();
    run(home, &format!("docker push {first}"), "").await.unwrap();
    // The layer is known by now: it is mounted, not sent.
    run(home, &format!("docker tag {first} {second}"), "").await.unwrap();
    run(home, &format!("docker push {second}"), "").await.unwrap();
    assert_eq!(door.registry.stats().blobs_mounted.load(Ordering::Relaxed), 1);
    run(home, &format!("docker tag {first} {forbidden}"), "").await.unwrap();
    let denied = run(home, &format!("docker push {forbidden}"), "").await.unwrap_err();
    assert!(denied.contains("may not push to forbidden/x"), "{denied}");

    run(home, &format!("docker rmi -f {id}"), "").await.unwrap();
    let pulled = run(home, &format!("docker pull {second}"), "").await.unwrap();
    let digest =
        run(home, &format!("docker inspect --format {{{{.Id}}}} {second}"), "").await.unwrap();
    assert_eq!(digest.trim(), id);
    assert!(pulled.contains("Digest: sha256:"), "{pulled}");
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let repo = RepoName::parse("team/iris-app").unwrap();
    let stored = door.registry.manifest(&repo, &Reference::parse("1").unwrap()).await.unwrap();
    assert_eq!(stored.media_type, docker);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_copies_in_out_and_across_lists_and_deletes() {
    if !has("skopeo", &["--version"]) {
        return;
    }
    let door = open().await;
    let home = door.dir.path();
    let tar = small_tar(home);
    let repo = RepoName::parse("source").unwrap();
    let layer = tokio::fs::File::open(&tar).await.unwrap();
    let (layer, size) = door.registry.put_blob_from_reader(&repo, layer, None).await.unwrap();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    })
    .to_string();
    let (config, config_size) =
        door.registry.put_blob_from_reader(&repo, config.as_bytes(), None).await.unwrap();
    let image = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": image,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config, "size": config_size,
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": size,
        }],
    });
    let tag = Reference::parse("1").unwrap();
    let put = door.registry.put_manifest(&repo, &tag, image, manifest.to_string().into());
    let digest = put.await.unwrap().digest;

    let creds = format!("anybody:{TOKEN}");
    let at = |name: &str| format!("docker://{}/{name}", door.address);
    let folder = format!("dir:{}", home.join("out").display());
    let copy_out = format!(
        "skopeo copy --preserve-digests --src-tls-verify=false --src-creds {creds} {} {folder}",
        at("source:1")
    );
    let anonymous = copy_out.replace(&format!(" --src-creds {creds}"), "");
    let refused = run(home, &anonymous, "").await.unwrap_err();
    assert!(refused.contains("log in first"), "{refused}");
    run(home, &copy_out, "").await.unwrap();
    let copy_in = format!(
        "skopeo copy --preserve-digests --dest-tls-verify=false --dest-creds {creds} {folder} {}",
        at("models/copy:2")
    );
    run(home, &copy_in, "").await.unwrap();
    let across = format!(
        "skopeo copy --preserve-digests --src-tls-verify=false --dest-tls-verify=false \
         --src-creds {creds} --dest-creds {creds} {} {}",
        at("models/copy:2"),
        at("models/copy:3")
    );
    run(home, &across, "").await.unwrap();
    let copied = RepoName::parse("models/copy").unwrap();
    for tag in ["2", "3"] {
        let found = door.registry.manifest(&copied, &Reference::parse(tag).unwrap()).await.unwrap();
        assert_eq!(found.digest, digest);
    }
    let more = format!("--tls-verify=false --creds {creds}");
    let tags = run(home, &format!("skopeo list-tags {more} {}", at("models/copy")), "").await;
    let tags: serde_json::Value = serde_json::from_str(&tags.unwrap()).unwrap();
    assert_eq!(tags["Tags"], serde_json::json!(["2", "3"]));
    let looked = run(home, &format!("skopeo inspect {more} {}", at("source:1")), "").await.unwrap();
    assert!(looked.contains(digest.as_str()), "{looked}");
    run(home, &format!("skopeo delete {more} {}", at("models/copy:2")), "").await.unwrap();
    assert!(door.registry.manifest(&copied, &tag).await.is_err());
    assert!(door.registry.manifest(&repo, &tag).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn podman_pushes_and_pulls_the_same_image() {
    let store = tempfile::tempdir().unwrap();
    let podman = format!(
        "podman --storage-driver vfs --root {0}/root --runroot {0}/run",
        store.path().display()
    );
    let args: Vec<&str> = podman.split(' ').skip(1).chain(["info"]).collect();
    if !has("podman", &args) {
        return;
    }
    let door = open().await;
    let home = door.dir.path();
    let tar = small_tar(home);
    let name = format!("{}/team/iris-app:1", door.address);
    let id = run(home, &format!("{podman} import -q {} {name}", tar.display()), "").await.unwrap();
    let options = format!("--tls-verify=false --creds anybody:{TOKEN}");
    run(home, &format!("{podman} push {options} {name}"), "").await.unwrap();
    run(home, &format!("{podman} rmi -f {name}"), "").await.unwrap();
    run(home, &format!("{podman} pull -q {options} {name}"), "").await.unwrap();
    let back = run(home, &format!("{podman} inspect --format {{{{.Id}}}} {name}"), "").await;
    let last = |text: &str| text.trim().lines().last().unwrap_or_default().to_owned();
    assert_eq!(last(&id).trim_start_matches("sha256:"), last(&back.unwrap()));
}
