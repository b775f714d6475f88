//! What a ledger begins with, and what of it changes when it has gone back in time.
//!
//! A restore, or a fallback to an older export, never stops anything that runs: it raises the epoch,
//! and from then on hosts are only observed until all that runs is known and decided about.

use crate::batching::Batch;
use crate::change::Change;
use crate::view::View;
use berth_proto::api::{Event, EventSeverity};
use berth_proto::convert::timestamp;
use berth_proto::ids::{ClusterUid, Wall};
use berth_proto::record::{AuditRecord, ClusterRecord, JoinTokenRecord};
use std::sync::Arc;

/// Changes in one write of the ledger.
pub const CHUNK: usize = 80;

/// What a restore writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turned {
    /// What to write, in order.
    pub batches: Vec<Batch>,
    /// The epoch from now on.
    pub epoch: u64,
    /// Join tokens that are void now.
    pub void_tokens: usize,
}

/// The epoch that follows one at this time.
#[must_use]
pub fn next_epoch(epoch: u64, now: Wall) -> u64 {
    let seconds = u64::try_from(now.0 / 1000).unwrap_or(0);
    if bug!(EpochKept) {
        return epoch.max(1);
    }
    (epoch + 1).max(if bug!(EpochAgain) { 0 } else { seconds })
}

/// The cluster's record as a server begins with it: a new cluster's, or one whose ledger fell back to an
/// earlier state. `None`: it stands as it is.
#[must_use]
pub fn begun(
    record: &ClusterRecord,
    uid: &ClusterUid,
    fell_back: bool,
    now: Wall,
) -> Option<ClusterRecord> {
    if !record.uid.is_empty() && !fell_back {
        return None;
    }
    Some(ClusterRecord {
        uid: uid.to_string(),
        epoch: next_epoch(record.epoch, now),
        observing: record.observing || fell_back,
        // Which writes are lost is not known: any certificate of ours may carry a key that was recorded
        // in one of them.
        backup_unix_ms: if fell_back { 1 } else { record.backup_unix_ms },
        ..record.clone()
    })
}

/// Ends every join token: which of them were used up or revoked in writes that are lost is not known.
#[must_use]
pub fn void_tokens(view: &View) -> Vec<Change> {
    view.join_tokens()
        .filter(|kept| !kept.record.revoked)
        .map(|kept| JoinTokenRecord { revoked: true, ..JoinTokenRecord::clone(&kept.record) })
        .map(|record| Change::PutJoinToken(Arc::new(record)))
        .collect()
}

/// What a restore changes in the ledger that was read from a backup of `made`.
#[must_use]
pub fn turned_back(view: &View, made: Wall, now: Wall) -> Turned {
    let epoch = next_epoch(view.cluster.epoch, now);
    let cluster = ClusterRecord {
        epoch,
        observing: !bug!(RestoreDoesNotObserve),
        backup_unix_ms: made.0,
        ..view.cluster.clone()
    };
    let age = berth_proto::quantity::format_duration_ms(
        u64::try_from(now.0 - made.0).unwrap_or(0) / 1000 * 1000,
    );
    let event = Event {
        sequence: view.next_event.max(1),
        time: Some(timestamp(now)),
        severity: EventSeverity::Warning as i32,
        kind: "cluster".to_owned(),
        uid: cluster.uid.clone(),
        reason: "RESTORED".to_owned(),
        message: format!("from a backup made {age} ago; what was written since is lost"),
        actor: "berthd restore".to_owned(),
        ..Event::default()
    };
    let mut revision = view.revision.next();
    let audit = AuditRecord {
        revision: revision.0,
        time: Some(timestamp(now)),
        actor: "berthd restore".to_owned(),
        objects: vec!["cluster".to_owned()],
        ..AuditRecord::default()
    };
    let first =
        [Change::PutCluster(cluster), Change::AppendEvent(event), Change::AppendAudit(audit)];
    let tokens = void_tokens(view);
    let mut batches = Vec::new();
    for changes in std::iter::once(&first[..]).chain(tokens.chunks(CHUNK)) {
        batches.push(Batch { revision, ops: changes.iter().map(Change::encode).collect() });
        revision = revision.next();
    }
    Turned { batches, epoch, void_tokens: tokens.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_never_taken_again_whatever_the_clock_says() {
        assert_eq!(next_epoch(7, Wall(0)), 8);
        assert_eq!(next_epoch(7, Wall(-5_000)), 8);
        assert_eq!(next_epoch(7, Wall(9_000)), 9);
    }

    #[test]
    fn a_cluster_begins_once_and_only_observes_after_a_fallback() {
        let uid: ClusterUid = "c".parse().unwrap();
        let first = begun(&ClusterRecord::default(), &uid, false, Wall(5_000)).unwrap();
        assert_eq!((first.epoch, first.observing, first.backup_unix_ms), (5, false, 0));
        assert_eq!(begun(&first, &uid, false, Wall(9_000)), None);
        let fallen = begun(&first, &uid, true, Wall(0)).unwrap();
        assert_eq!((fallen.epoch, fallen.observing, fallen.backup_unix_ms), (6, true, 1));
    }
}
