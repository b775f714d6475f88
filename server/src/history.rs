//! The past: events and audit entries, which no view holds.
//!
//! Both are only ever added to at one end and forgotten at the other, in bounds: each entry costs its
//! bytes in memory. They are read from the newest backwards, in pieces, so that a reader costs what it
//! asks for and the ledger's thread is never held up by the length of a log.

use crate::cluster::Cluster;
use crate::error::Error;
use crate::ledger::Unread;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_proto::api::Event;
use berth_proto::record::EventRecord;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use prost::Message as _;
use std::collections::VecDeque;

/// Entries read at once: some hundred KiB.
const PIECE: usize = 1000;
/// Events kept: some 20 MiB. A deployment of ten replicas makes about fifty in its rollout.
pub const EVENTS_KEPT: usize = 50_000;
/// Audit entries kept: some 100 MiB, years of a busy cluster's writes by people.
pub const AUDIT_KEPT: usize = 200_000;
/// What one write forgets: within what one commit of any store holds.
const FORGOTTEN_AT_ONCE: usize = 80;

/// How far somebody has seen the events. Sequences are given anew after a restore, so they mean
/// something within one epoch alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The epoch of the ledger that numbered the event.
    pub epoch: u64,
    /// The event's sequence.
    pub sequence: u64,
}

impl Seen {
    /// As callers are given it.
    #[must_use]
    pub fn token(self) -> String {
        let bytes = [self.epoch.to_be_bytes(), self.sequence.to_be_bytes()].concat();
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Reads what a caller was given; `None`: it was not given this.
    #[must_use]
    pub fn read(token: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (epoch, sequence) = bytes.split_first_chunk::<8>()?;
        Some(Self {
            epoch: u64::from_be_bytes(*epoch),
            sequence: u64::from_be_bytes(sequence.try_into().ok()?),
        })
    }
}

fn expired() -> Error {
    Error::Gone {
        reason: "EVENTS_EXPIRED",
        message:
            "not all events since those that were seen are here: the server was restored from \
                  a backup, or more happened than is kept"
                .to_owned(),
    }
}

impl Cluster {
    /// Sequence of the newest event that is kept; 0: there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn newest_event(&self) -> Result<u64, Unread> {
        let newest = self.ledger.newest("event/", None, 1).await?.pop();
        let record = newest.and_then(|entry| EventRecord::decode(entry.value.as_slice()).ok());
        Ok(record.and_then(|record| record.event).map_or(0, |event| event.sequence))
    }

    /// Of the events after a sequence that are wanted `limit`, oldest first: the newest of all; after a
    /// sequence the first that follow it, so that whoever asks for more loses none.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn past_events(
        &self,
        after_sequence: u64,
        limit: usize,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Vec<Event>, Unread> {
        let mut found: VecDeque<Event> = VecDeque::new();
        let mut below = None;
        loop {
            let entries = self.ledger.newest("event/", below.take(), PIECE).await?;
            let last = entries.len() < PIECE;
            for entry in entries {
                below = String::from_utf8(entry.key).ok();
                let record = EventRecord::decode(entry.value.as_slice());
                let Some(event) = record.ok().and_then(|record| record.event) else { continue };
                if event.sequence <= after_sequence {
                    return Ok(found.into());
                }
                if !wanted(&event) {
                    continue;
                }
                if found.len() >= limit {
                    if after_sequence == 0 {
                        return Ok(found.into());
                    }
                    found.pop_back();
                }
                found.push_front(event);
            }
            if last || below.is_none() {
                return Ok(found.into());
            }
        }
    }

    /// Of the events that follow those somebody has seen and are wanted the first `limit`, oldest first.
    ///
    /// # Errors
    /// [`Error::Gone`] when not all that follow are here; when they cannot be read.
    pub async fn events_after(
        &self,
        seen: Seen,
        limit: usize,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Vec<Event>, Error> {
        let Seen { epoch, sequence } = seen;
        if epoch != self.ledger.view().cluster.epoch || sequence > self.newest_event().await? {
            return Err(expired());
        }
        let found = self.past_events(sequence, limit, wanted).await?;
        // Asked afterwards, so that what was forgotten meanwhile is missed. The oldest go first: when the
        // next one is kept, all are.
        let below = Change::DeleteEvent(sequence.saturating_add(2)).key();
        if self.ledger.newest("event/", Some(below), 1).await?.is_empty() {
            return Err(expired());
        }
        Ok(found)
    }

    /// Forgets the oldest events and audit entries beyond what is kept.
    pub async fn forget_old_history(&self) {
        self.forget_beyond("event/", EVENTS_KEPT).await;
        self.forget_beyond("audit/", AUDIT_KEPT).await;
    }

    async fn forget_beyond(&self, prefix: &'static str, keep: usize) {
        loop {
            let keys = match self.ledger.beyond(prefix, keep, FORGOTTEN_AT_ONCE).await {
                Ok(keys) => keys,
                Err(why) => {
                    let why = crate::error::Chain(&why);
                    tracing::debug!(%why, "old history was not looked at; the next sweep will");
                    return;
                }
            };
            let changes: Vec<Change> = keys.iter().filter_map(|key| forget(key)).collect();
            if changes.is_empty() {
                return;
            }
            let proposal = Proposal { preconditions: Vec::new(), changes };
            if let Err(why) = self.ledger.propose(proposal).await {
                tracing::debug!(%why, "old history was not forgotten; the next sweep will");
                return;
            }
        }
    }
}

/// The change that deletes what is kept under a key.
fn forget(key: &[u8]) -> Option<Change> {
    let (kind, number) = std::str::from_utf8(key).ok()?.split_once('/')?;
    let number = number.parse().ok()?;
    match kind {
        "event" => Some(Change::DeleteEvent(number)),
        "audit" => Some(Change::DeleteAudit(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::served;
    use berth_proto::record::AuditRecord;

    async fn happen(cluster: &Cluster, count: usize) {
        let mut left = count;
        while left > 0 {
            let some = left.min(1000);
            left -= some;
            let event = |n| Event { name: format!("{n}"), ..Event::default() };
            let changes = (0..some).map(|n| Change::AppendEvent(event(n))).collect();
            let proposal = Proposal { changes, ..Proposal::default() };
            cluster.ledger.propose(proposal).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_newest_events_that_are_wanted_come_oldest_first_however_long_the_log_is() {
        let (_dir, api) = served();
        happen(&api.0, 2500).await;
        let numbers =
            |events: Vec<Event>| -> Vec<u64> { events.into_iter().map(|e| e.sequence).collect() };
        let all = numbers(api.0.past_events(0, 9999, |_| true).await.unwrap());
        assert_eq!(all, (1..=2500).collect::<Vec<u64>>());
        assert_eq!(numbers(api.0.past_events(0, 2, |_| true).await.unwrap()), [2499, 2500]);
        // After a sequence none is passed over: the first of what follows, then the next.
        assert_eq!(numbers(api.0.past_events(7, 2, |_| true).await.unwrap()), [8, 9]);
        assert_eq!(numbers(api.0.past_events(2498, 9, |_| true).await.unwrap()), [2499, 2500]);
        // Seldom, and far back.
        let rare = numbers(api.0.past_events(0, 9, |e| e.sequence % 1000 == 7).await.unwrap());
        assert_eq!(rare, [7, 1007, 2007]);
    }

    #[tokio::test]
    async fn what_is_beyond_the_bounds_is_forgotten_and_the_newest_stays() {
        let (_dir, api) = served();
        happen(&api.0, 700).await;
        let audit = Change::AppendAudit(AuditRecord::default());
        let proposal = Proposal { changes: vec![audit], ..Proposal::default() };
        api.0.ledger.propose(proposal).await.unwrap();
        api.0.forget_beyond("event/", 500).await;
        let kept = api.0.past_events(0, usize::MAX, |_| true).await.unwrap();
        assert_eq!((kept.len(), kept[0].sequence), (500, 201));
        api.0.forget_old_history().await;
        assert_eq!(api.0.ledger.newest("audit/", None, 9).await.unwrap().len(), 1);
        assert_eq!(forget(b"audit/00000000000000000007"), Some(Change::DeleteAudit(7)));
        assert_eq!(forget(b"host/7"), None);
    }

    #[tokio::test]
    async fn who_has_seen_more_than_is_known_here_is_told_to_begin_anew() {
        use crate::api::tests::call;
        use berth_proto::api::event_service_server::EventService as _;
        use futures_util::StreamExt as _;
        let (_dir, api) = served();
        happen(&api.0, 5).await;
        let newest = api.0.newest_event().await.unwrap();
        let watch = |after_token| {
            api.watch_events(call(berth_proto::api::WatchEventsRequest {
                after_token,
                ..Default::default()
            }))
        };
        let all: Vec<_> = watch(String::new()).await.unwrap().into_inner().collect().await;
        let tokens: Vec<String> = all.into_iter().map(|told| told.unwrap().token).collect();
        assert_eq!(tokens.len() as u64, newest);
        assert_eq!(watch(tokens[4].clone()).await.unwrap().into_inner().count().await, 0);
        let last = watch(tokens[3].clone()).await.unwrap().into_inner().next().await;
        assert_eq!(last.unwrap().unwrap().event.unwrap().sequence, newest);
        // Whoever follows gets all that it has not seen, though the limit is less.
        let asked = berth_proto::api::WatchEventsRequest {
            after_token: tokens[0].clone(),
            limit: 2,
            follow: true,
            ..Default::default()
        };
        let mut followed = api.watch_events(call(asked)).await.unwrap().into_inner();
        for sequence in 2..=newest {
            let next = followed.next().await.unwrap().unwrap();
            assert_eq!(next.event.unwrap().sequence, sequence);
            assert_eq!(next.token, tokens[usize::try_from(sequence).unwrap() - 1]);
        }
        let seen = Seen::read(&tokens[4]).unwrap();
        let more = Seen { sequence: newest + 1, ..seen }.token();
        let refused = watch(more).await.map(|_| ()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::OutOfRange);
        for bad in ["5", "AAAAAAAAAAU", "?"] {
            let refused = watch(bad.to_owned()).await.map(|_| ()).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{bad}");
        }
    }

    #[tokio::test]
    async fn numbers_of_another_epoch_are_not_taken_for_ones_own() {
        let (_dir, api) = served();
        happen(&api.0, 300).await;
        let epoch = api.0.ledger.view().cluster.epoch;
        let seen = Seen { epoch, sequence: 200 };
        assert_eq!(api.0.events_after(seen, 999, |_| true).await.unwrap().len(), 100);
        // As a restore does, after which other events have the numbers that were seen.
        let raised = berth_proto::record::ClusterRecord {
            epoch: epoch + 1,
            ..api.0.ledger.view().cluster.clone()
        };
        let changes = vec![Change::PutCluster(raised)];
        api.0.ledger.propose(Proposal { changes, ..Proposal::default() }).await.unwrap();
        let gone = api.0.events_after(seen, 999, |_| true).await.unwrap_err();
        assert!(matches!(gone, Error::Gone { reason: "EVENTS_EXPIRED", .. }), "{gone}");
        let seen = Seen { epoch: epoch + 1, ..seen };
        assert_eq!(api.0.events_after(seen, 999, |_| true).await.unwrap().len(), 100);
    }

    #[tokio::test]
    async fn who_was_away_while_events_were_forgotten_is_told_so() {
        let (_dir, api) = served();
        happen(&api.0, 700).await;
        api.0.forget_beyond("event/", 500).await;
        let epoch = api.0.ledger.view().cluster.epoch;
        let after = async |sequence| {
            let seen = Seen { epoch, sequence };
            api.0.events_after(seen, 999, |e| e.sequence % 2 == 0).await.map(|found| found.len())
        };
        // 201 is the oldest that is kept.
        assert_eq!(after(201).await.unwrap(), 250);
        assert_eq!(after(200).await.unwrap(), 250);
        let gone = after(199).await.unwrap_err();
        assert!(matches!(gone, Error::Gone { reason: "EVENTS_EXPIRED", .. }), "{gone}");
        assert_eq!(after(700).await.unwrap(), 0);
    }
}
