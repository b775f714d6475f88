//! A backup of a running server, in a file here.

use super::{ask, connect};
use crate::args::{Backup, Global, Output};
use crate::error::{Error, Result};
use crate::output::say;
use berth_proto::api::stream_backup_response::Item;
use berth_proto::api::{BackupHead, StreamBackupRequest, StreamBackupResponse};
use berth_proto::quantity::human_bytes;
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// What is there until the backup is whole; gone when it does not become so.
struct Partial {
    path: PathBuf,
    file: File,
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let words = format!("cannot {doing} {}", path.display());
    move |error| Error::user(format!("{words}: {error}"))
}

/// Begins the file; what it will hold is for its owner alone.
fn begin(path: &Path) -> Result<Partial> {
    if path.exists() {
        return Err(Error::user(format!("{} exists already", path.display()))
            .hint("a backup overwrites nothing; name another file"));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&partial);
    let file = file.map_err(failed("make", &partial))?;
    Ok(Partial { path: partial, file })
}

/// Gives a file its name and overwrites nothing.
fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that does not know of that may know of links, as NFS does; FAT, on a stick,
        // knows of no links.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(from, to),
        done => Ok(done?),
    }
}

fn finish(partial: &Partial, path: &Path) -> Result<()> {
    partial.file.sync_all().map_err(failed("write", path))?;
    rename(&partial.path, path).map_err(failed("make", path))?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) | None => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).map_err(failed("sync", folder))
}

/// Takes the file in; answers its size once it is whole.
async fn receive(
    global: &Global,
    stream: &mut tonic::Streaming<StreamBackupResponse>,
    head: &mut BackupHead,
    partial: &mut Partial,
    path: &Path,
) -> Result<u64> {
    let mut size = 0;
    loop {
        let next = async { stream.message().await.map(tonic::Response::new) };
        let item = match ask(global, next).await? {
            Some(StreamBackupResponse { item: Some(item) }) => item,
            Some(StreamBackupResponse { item: None }) => continue,
            None => return Err(Error::user("the backup broke off; nothing was kept")),
        };
        match item {
            Item::Head(first) => *head = first,
            Item::Data(data) => {
                partial.file.write_all(&data).map_err(failed("write", path))?;
                size += data.len() as u64;
            }
            Item::Tail(tail) if tail.size_bytes == size => return Ok(size),
            Item::Tail(_) => {
                return Err(Error::user("the backup came in parts; nothing was kept"));
            }
        }
    }
}

/// An error that may have come after the server began to use a new key.
fn without_backup(error: Error, key: &str) -> Error {
    if key.is_empty() {
        return error;
    }
    error.hint(format!(
        "the server may use a new recovery key from now on: keep {key} until the next backup has \
         succeeded; if that shows another key, this one is of no use"
    ))
}

pub async fn backup(global: &Global, args: Backup) -> Result<()> {
    let mut partial = begin(&args.file)?;
    let client = connect(global).await?;
    let mut system = client.system();
    let request = StreamBackupRequest { new_recovery_key: args.new_recovery_key };
    let mut stream = ask(global, system.stream_backup(request)).await?;
    let mut head = BackupHead::default();
    let kept = receive(global, &mut stream, &mut head, &mut partial, &args.file).await;
    let kept = kept.and_then(|size| finish(&partial, &args.file).map(|()| size));
    let size = kept.map_err(|error| without_backup(error, &head.recovery_key))?;
    let path = args.file.display().to_string();
    let value = json!({
        "file": path, "sizeBytes": size, "revision": head.revision,
        "recoveryRecipient": head.recovery_recipient, "recoveryKey": head.recovery_key,
    });
    if matches!(global.output, Output::Table | Output::Wide) {
        eprintln!(
            "{path}: {}, the ledger as of revision {} and the CA's key, encrypted; the \
             registry's blobs are not in it",
            human_bytes(size),
            head.revision
        );
        if head.recovery_key.is_empty() {
            eprintln!("the recovery key that was shown before opens it");
            return Ok(());
        }
        eprintln!("the recovery key, shown once; keep it apart from the backups:");
    }
    say(global, &head.recovery_key, &value).map_err(|error| not_shown(error, &head.recovery_key))
}

/// A key that is shown once and was not: it goes to standard error, whatever became of the reader.
fn not_shown(error: Error, key: &str) -> Error {
    if key.is_empty() {
        return error;
    }
    let words =
        format!("the backup is whole, but its recovery key was not printed: {}", error.message);
    Error::user(words).hint(format!("keep it apart from the backups: {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_key_that_nobody_read_is_told_with_the_error() {
        let gone = || Error::new(Kind::ReaderGone, "nobody reads the answer");
        let error = not_shown(gone(), "AGE-SECRET-KEY-1X");
        assert_eq!(error.kind, Kind::User);
        assert!(error.hint.unwrap().ends_with("AGE-SECRET-KEY-1X"));
        assert_eq!(not_shown(gone(), "").kind, Kind::ReaderGone);
    }

    #[test]
    fn a_backup_gets_its_name_without_a_link_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("monday.age");
        let begun = || {
            let mut partial = begin(&path).unwrap();
            partial.file.write_all(b"x").unwrap();
            partial
        };
        let (first, second) = (begun(), dir.path().join("second"));
        finish(&first, &path).unwrap();
        // Moved, not linked: FAT has no links.
        assert!(!first.path.exists());
        std::fs::write(&second, "y").unwrap();
        assert_eq!(rename(&second, &path).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn a_new_key_is_shown_also_when_the_backup_broke_off_behind_it() {
        let broke = || Error::user("the backup broke off");
        let hint = without_backup(broke(), "AGE-SECRET-KEY-1X").hint.unwrap();
        assert!(hint.contains("keep AGE-SECRET-KEY-1X until"), "{hint}");
        assert_eq!(without_backup(broke(), "").hint, None);
    }
}
