//! Claims about what a start writes.

use super::*;
use crate::api::tests::{host, served};
use crate::store::memory::Memory;
use berth_proto::tls::{SpiffeId, Subject};
use berth_server_core::dispatch::host_set;
use berth_server_core::session::Hold;
use std::os::unix::fs::PermissionsExt as _;

fn doors() -> [std::net::SocketAddr; 4] {
    [1, 2, 3, 4].map(|port| std::net::SocketAddr::from(([127, 0, 0, 1], port)))
}

#[tokio::test]
async fn the_first_start_writes_the_admins_context_for_its_owner_alone_and_never_again() {
    let (dir, api) = served();
    let admin = dir.path().join("admin.toml");
    write_contexts(&api.0, &doors()).unwrap();
    let mode = std::fs::metadata(&admin).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&admin).unwrap();
    let context: toml::Table = text.parse().unwrap();
    let context = context["contexts"]["default"].as_table().unwrap();
    assert_eq!(context["cluster"].as_str(), Some(api.0.roots.cluster().as_str()));
    let chain = berth_proto::tls::certificates(context["certificate"].as_str().unwrap()).unwrap();
    assert_eq!(SpiffeId::of(&chain[0]).unwrap().subject, Subject::User("admin".parse().unwrap()));
    // A second start leaves it as it is; one that was taken away is not given again.
    write_contexts(&api.0, &doors()).unwrap();
    assert_eq!(std::fs::read_to_string(&admin).unwrap(), text);
    std::fs::remove_file(&admin).unwrap();
    write_contexts(&api.0, &doors()).unwrap();
    assert!(!admin.exists());
}

#[tokio::test]
async fn a_new_cluster_has_one_admin_and_an_epoch_of_its_time_and_a_later_start_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Roots::open(dir.path()).unwrap();
    let ledger = Ledger::start(Box::new(Memory::default()), View::default());
    let seconds = u64::try_from(wall_now().0 / 1000).unwrap();
    first_records(&ledger, ca.cluster(), false, false).await.unwrap();
    let view = ledger.view();
    assert_eq!(view.cluster.uid, ca.cluster().to_string());
    assert!(view.cluster.epoch >= seconds && !view.cluster.observing);
    assert_eq!(view.users().count(), 1);
    first_records(&ledger, ca.cluster(), false, false).await.unwrap();
    assert_eq!(ledger.view().revision, view.revision);
}

#[tokio::test]
async fn after_a_fallback_the_epoch_is_greater_and_no_host_gets_a_set_before_it_was_looked_at() {
    let (_dir, api) = served();
    let (ledger, ca) = (&api.0.ledger, api.0.roots.cluster());
    first_records(ledger, ca, false, false).await.unwrap();
    host(&api, "edge", &[]).await;
    let uid = ledger.view().host_by_name("edge").unwrap().uid.clone();
    assert!(matches!(host_set(&ledger.view(), &uid), Some(Ok(_))));
    // Also when the epoch was beyond the clock already.
    let mut ahead = ledger.view().cluster.clone();
    ahead.epoch += 1_000_000;
    let changes = vec![Change::PutCluster(ahead.clone())];
    ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    first_records(ledger, ca, true, false).await.unwrap();
    let view = ledger.view();
    assert_eq!(view.cluster.epoch, ahead.epoch + 1);
    assert!(view.cluster.observing);
    assert_ne!(view.cluster.backup_unix_ms, 0, "certificates made since may carry unknown keys");
    assert!(matches!(host_set(&view, &uid), Some(Err(Hold::Observing))));
    assert_eq!(view.users().count(), 1, "nobody is made anew");
}

#[tokio::test]
async fn whoever_has_the_folder_and_takes_the_context_away_gets_an_admin_that_counts() {
    let (_dir, api) = served();
    let (ledger, ca) = (&api.0.ledger, api.0.roots.cluster());
    first_records(ledger, ca, false, true).await.unwrap();
    let held = ledger.view().user("admin").unwrap().record.clone();
    first_records(ledger, ca, false, true).await.unwrap();
    assert_eq!(ledger.view().user("admin").unwrap().record, held, "it counts as it is");
    let ended = UserRecord { expire_unix_ms: 1, ..UserRecord::clone(&held) };
    let changes = vec![Change::PutUser(Arc::new(ended))];
    ledger.propose(Proposal { preconditions: Vec::new(), changes }).await.unwrap();
    first_records(ledger, ca, false, false).await.unwrap();
    assert!(!is_admin(&ledger.view().user("admin").unwrap().record), "the context is still there");
    first_records(ledger, ca, false, true).await.unwrap();
    let anew = ledger.view().user("admin").unwrap().record.clone();
    assert!(is_admin(&anew));
    assert_ne!(anew.meta.as_ref().unwrap().uid, held.meta.as_ref().unwrap().uid);
}

#[tokio::test]
async fn a_first_start_that_finds_a_port_taken_leaves_no_folder_behind() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("server");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let free = Some("127.0.0.1:0".parse().unwrap());
    let options = crate::config::Options {
        data_dir: Some(data.clone()),
        listen: free,
        registry_listen: free,
        gateway_listen: free,
        page_listen: Some(taken.local_addr().unwrap()),
        ballast_mib: Some(0),
        ..Default::default()
    };
    let error = run(options.settle().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("--page-listen"), "{error}");
    assert!(!data.exists());
}
