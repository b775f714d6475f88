//! A backup of a running server, in a file here.

use super::{ask, connect};
use crate::args::{Backup, Global, Output};
use crate::error::{Error, Result};
use crate::output::say;
use crate::whole::Whole;
use berth_proto::api::stream_backup_response::Item;
use berth_proto::api::{BackupHead, StreamBackupRequest, StreamBackupResponse};
use berth_proto::quantity::human_bytes;
use serde_json::json;

/// What a backup is written to.
struct Files {
    backup: Whole,
    /// Taken once there is a key to write.
    key: Option<Whole>,
    /// Where the key is, once it is there.
    kept: Option<String>,
}

impl Files {
    /// A key that is there is in its file before anything else is: the server goes by it from now on.
    fn keep(&mut self, key: &str) -> Result<()> {
        if key.is_empty() {
            return Ok(());
        }
        let Some(mut file) = self.key.take() else { return Ok(()) };
        let name = file.path.display().to_string();
        file.write(format!("{key}\n").as_bytes())?;
        file.finish()?;
        self.kept = Some(name);
        Ok(())
    }
}

/// Takes the file in; answers its size once it is whole.
async fn receive(
    global: &Global,
    stream: &mut tonic::Streaming<StreamBackupResponse>,
    head: &mut BackupHead,
    files: &mut Files,
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
            Item::Head(first) => {
                *head = first;
                files.keep(&head.recovery_key)?;
            }
            Item::Data(data) => {
                files.backup.write(&data)?;
                size += data.len() as u64;
            }
            Item::Tail(tail) if tail.size_bytes == size => return Ok(size),
            Item::Tail(_) => {
                return Err(Error::user("the backup came in parts; nothing was kept"));
            }
        }
    }
}

/// An error that may have come after the server began to use a new key, which is in a file, or only here.
fn without_backup(error: Error, key: &str, kept: Option<&str>) -> Error {
    if key.is_empty() {
        return error;
    }
    error.hint(format!(
        "the server may use a new recovery key from now on: keep {} until the next backup has \
         succeeded; if that shows another key, this one is of no use",
        kept.unwrap_or(key)
    ))
}

pub async fn backup(global: &Global, args: Backup) -> Result<()> {
    let backup = Whole::begin(&args.file)?;
    // Where a key cannot be written none is asked for: it is shown once.
    let key = args.recovery_key.as_deref().map(Whole::begin).transpose()?;
    let mut files = Files { backup, key, kept: None };
    let client = connect(global).await?;
    let mut system = client.system();
    let request = StreamBackupRequest { new_recovery_key: args.new_recovery_key };
    let mut stream = ask(global, system.stream_backup(request)).await?;
    let mut head = BackupHead::default();
    let received = receive(global, &mut stream, &mut head, &mut files).await;
    let Files { backup, key: _, kept } = files;
    let whole = received.and_then(|size| backup.finish().map(|()| size));
    let size = whole.map_err(|error| without_backup(error, &head.recovery_key, kept.as_deref()))?;
    let path = args.file.display().to_string();
    // What is in a file is shown nowhere else.
    let shown = if kept.is_some() { "" } else { head.recovery_key.as_str() };
    let value = json!({
        "file": path, "sizeBytes": size, "revision": head.revision,
        "recoveryRecipient": head.recovery_recipient, "recoveryKey": shown,
        "recoveryKeyFile": kept,
    });
    if head.recovery_key.is_empty()
        && let Some(file) = &args.recovery_key
    {
        eprintln!("{}: not made, there is no new recovery key", file.display());
    }
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
        if let Some(file) = &kept {
            eprintln!("{file}: the recovery key, given out once; keep it apart from the backups");
            return Ok(());
        }
        eprintln!("the recovery key, shown once; keep it apart from the backups:");
    }
    say(global, shown, &value).map_err(|error| not_shown(error, shown))
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
    fn a_key_is_in_its_file_before_the_backup_and_no_key_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let begin = || {
            let (backup, key) = (Whole::begin(&at("monday.age")), Whole::begin(&at("key")));
            Files { backup: backup.unwrap(), key: Some(key.unwrap()), kept: None }
        };
        let mut none = begin();
        none.keep("").unwrap();
        drop(none);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut some = begin();
        some.keep("AGE-SECRET-KEY-1X").unwrap();
        assert_eq!(std::fs::read_to_string(at("key")).unwrap(), "AGE-SECRET-KEY-1X\n");
        assert_eq!(some.kept.as_deref(), at("key").to_str());
        assert!(!at("monday.age").exists());
        // A backup that broke off takes no key with it.
        drop(some);
        assert!(at("key").exists());
    }

    #[test]
    fn a_new_key_is_shown_also_when_the_backup_broke_off_behind_it() {
        let broke = || Error::user("the backup broke off");
        let hint = without_backup(broke(), "AGE-SECRET-KEY-1X", None).hint.unwrap();
        assert!(hint.contains("keep AGE-SECRET-KEY-1X until"), "{hint}");
        let hint = without_backup(broke(), "AGE-SECRET-KEY-1X", Some("my.key")).hint.unwrap();
        assert!(hint.contains("keep my.key until"), "{hint}");
        assert_eq!(without_backup(broke(), "", None).hint, None);
    }
}
