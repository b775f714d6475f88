//! Claims about backups.

use super::*;
use crate::identity::ca::CaError;
use crate::store::Entry;
use berth_proto::api::JoinToken;
use berth_proto::ids::Wall;
use berth_proto::record::JoinTokenRecord;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

/// A data folder with a ledger of some entries.
fn server(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    let folder = Folder::open(&data).unwrap();
    let ca = Roots::open(folder.path()).unwrap();
    let cluster = ClusterRecord {
        uid: ca.cluster().to_string(),
        epoch: 7,
        trust_version: 1,
        ..ClusterRecord::default()
    };
    let token = JoinTokenRecord {
        token: Some(JoinToken { id: "t".into(), uses_left: 1, ..JoinToken::default() }),
        ..JoinTokenRecord::default()
    };
    let changes = [Change::PutCluster(cluster), Change::PutJoinToken(Arc::new(token))];
    let ops = changes.iter().map(Change::encode).collect();
    let (mut store, _) = Embedded::open(&data.join("ledger")).unwrap();
    store.commit(&[Batch { revision: Revision(1), ops }]).unwrap();
    data
}

fn held(data: &Path) -> (Vec<Entry>, View) {
    let (store, opened) = Embedded::open(&data.join("ledger")).unwrap();
    assert_eq!(opened.rebuilt, None, "a restored store needs no repair");
    let all = store.load(b"").unwrap();
    let view = View::load(all.iter().map(|e| (e.key.clone(), e.revision, e.value.clone())));
    (all, view.unwrap())
}

#[test]
fn a_backup_in_the_middle_of_a_rotation_brings_both_roots_back() {
    let dir = tempfile::tempdir().unwrap();
    let data = server(dir.path());
    let roots = Roots::open(&data).unwrap();
    assert!(roots.begin(|_| Ok::<(), CaError>(())).unwrap());
    let file = dir.path().join("backup.age");
    let key = make(&data, &file, false).unwrap().recovery.shown.unwrap();
    let fresh = dir.path().join("fresh");
    restore(&file, &key, &fresh, Wall(0)).unwrap();
    let restored = Roots::open(&fresh).unwrap();
    assert_eq!(restored.pem(), roots.pem());
    assert!(restored.finish().unwrap(), "the second with its key");
}

#[test]
fn what_was_backed_up_comes_back_with_a_new_epoch_and_void_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let data = server(dir.path());
    let file = dir.path().join("backup.age");
    let made = make(&data, &file, false).unwrap();
    let key = made.recovery.shown.clone().unwrap();
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it holds the CA's key");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), made.size_bytes);
    let bytes = std::fs::read(&file).unwrap();
    let plain = std::fs::read(data.join("ca.key")).unwrap();
    assert!(!bytes.windows(40).any(|w| plain.windows(40).any(|p| p == w)), "it is encrypted");

    let fresh = dir.path().join("fresh");
    let done = restore(&file, &key, &fresh, Wall(9_000)).unwrap();
    assert_eq!((done.epoch, done.void_tokens), (9, 1), "the clock wins over a lower epoch");
    let again = dir.path().join("again");
    assert_eq!(
        restore(&file, &key, &again, Wall(0)).unwrap().epoch,
        8,
        "a clock set back does not"
    );
    for name in ["ca.key", "ca.crt"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert_eq!(read(&fresh), read(&data));
    }
    let (_, view) = held(&fresh);
    assert!(view.cluster.observing, "hosts are only observed");
    assert_eq!(view.cluster.backup_unix_ms, done.made.0);
    assert!(view.join_token("t").unwrap().record.revoked);
    assert!(Folder::open(&fresh).is_ok(), "a server takes it");

    // The restored server goes on with the same recovery key, and so does the old one.
    for data in [&fresh, &data] {
        let file = data.join("second");
        let made = make(data, &file, false).unwrap();
        assert!(made.recovery.shown.is_none());
        assert!(read(File::open(&file).unwrap(), &key).is_ok());
    }
    let file = dir.path().join("third");
    let new = make(&data, &file, true).unwrap().recovery.shown.unwrap();
    assert_ne!(new, key);
    assert!(matches!(read(File::open(&file).unwrap(), &key), Err(BackupError::WrongKey)));
}

#[test]
fn a_damaged_cut_foreign_or_newer_backup_is_refused_and_nothing_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let data = server(dir.path());
    let file = dir.path().join("backup.age");
    let key = make(&data, &file, false).unwrap().recovery.shown.unwrap();
    let whole = std::fs::read(&file).unwrap();
    let fresh = dir.path().join("fresh");
    let refused = |bytes: &[u8], key: &str| {
        let bad = dir.path().join("bad");
        std::fs::write(&bad, bytes).unwrap();
        let error = restore(&bad, key, &fresh, Wall(0)).unwrap_err();
        assert!(!fresh.exists(), "{error}");
        error
    };
    for at in (0..whole.len()).step_by(17) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        refused(&bytes, &key);
        refused(&whole[..at], &key);
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(refused(&longer, &key), BackupError::Damaged(_)));
    assert!(matches!(refused(b"no backup", &key), BackupError::NotABackup));
    assert!(matches!(refused(&whole, "no key"), BackupError::BadKey));
    let other = Identity::generate().to_string();
    assert!(matches!(refused(&whole, other.expose_secret()), BackupError::WrongKey));

    let identity: Identity = key.parse().unwrap();
    let with = |edit: &dyn Fn(&mut Contents)| {
        let mut contents = read(whole.as_slice(), &key).unwrap();
        edit(&mut contents);
        let mut bytes = Vec::new();
        write(&contents, &identity.to_public(), &mut bytes).unwrap();
        bytes
    };
    let newer = with(&|c| c.header.format = FORMAT + 1);
    assert!(matches!(refused(&newer, &key), BackupError::NewerFormat { .. }));
    let unknown = Entry { key: b"gadget/1".to_vec(), revision: Revision(1), value: Vec::new() };
    let unknown = with(&|c| c.entries.push(unknown.clone()));
    let error = refused(&unknown, &key);
    assert!(crate::error::Chain(&error).to_string().contains("newer version"), "{error}");
    let foreign = with(&|c| c.header.cluster = "other".into());
    assert!(matches!(refused(&foreign, &key), BackupError::Damaged(_)));
}

#[test]
fn nothing_is_overwritten_and_a_running_server_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data = server(dir.path());
    let file = dir.path().join("backup.age");
    let key = make(&data, &file, false).unwrap().recovery.shown.unwrap();
    assert!(matches!(make(&data, &file, false), Err(BackupError::Exists(_))));
    let not_empty = restore(&file, &key, &data, Wall(0));
    assert!(matches!(not_empty, Err(BackupError::Store(StoreError::NotEmpty(_)))));
    let none = make(&dir.path().join("none"), &dir.path().join("x"), false);
    assert!(matches!(none, Err(BackupError::NoServer(_))));
    let _running = Folder::open(&data).unwrap();
    assert!(matches!(make(&data, &dir.path().join("y"), false), Err(BackupError::Running(_))));
    assert!(!dir.path().join("y").exists());
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 2, "the data and one backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_recovery_key_travels_before_it_counts() {
    use crate::api::tests::{call, served};
    use berth_proto::api::stream_backup_response::Item;
    use berth_proto::api::system_service_server::SystemService as _;
    use futures_util::StreamExt as _;
    let (_dir, api) = served();
    let asked = berth_proto::api::StreamBackupRequest::default();
    let stream = api.stream_backup(call(asked)).await.unwrap().into_inner();
    let items: Vec<Item> = stream.map(|message| message.unwrap().item.unwrap()).collect().await;
    let Some(Item::Head(head)) = items.first() else { panic!("{items:?}") };
    let key: Identity = head.recovery_key.parse().unwrap();
    assert_eq!(key.to_public().to_string(), head.recovery_recipient);
    assert!(matches!(items.last(), Some(Item::Tail(_))));
    assert_eq!(api.0.ledger.view().cluster.recovery_recipient, head.recovery_recipient);
    // The second backup has the same, and shows none.
    let stream = api.stream_backup(call(asked)).await.unwrap().into_inner();
    let first = stream.map(|message| message.unwrap().item.unwrap()).take(1).collect::<Vec<_>>();
    let first = first.await;
    let Some(Item::Head(again)) = first.first() else { panic!("{first:?}") };
    assert_eq!(again.recovery_recipient, head.recovery_recipient);
    assert_eq!(again.recovery_key, "");
}
