//! What is told of replicas, and when.
//!
//! A machine without I/O. The newest report of each replica waits, older ones of the same replica are
//! dropped; one message goes out at most once an interval; a message is kept until it is
//! acknowledged; messages are numbered without gaps within one start of the agent, so that
//! (instance, start, sequence) orders them all. A server that does not acknowledge gets no more than
//! [`MAX_UNKEPT`] messages ahead, while reports go on being coalesced.
//!
//! That nothing is left of a replica is never dropped for a newer report: one that was forgotten and is
//! wanted again begins with its first attempt, which would be taken for older than what was known. So it
//! is told first, and the report by the next message. Nor is it told after the acknowledgement of a set
//! that came later ([`Reporter::absences`]): it would pass for what became of that set.

use berth_proto::agent::{ReplicaReport, Statuses};
use berth_proto::ids::Mono;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Reports in one message, as the contract says.
pub const MAX_REPORTS: usize = 500;
/// Messages that wait to be acknowledged: a second and a half's worth at the default pace, and below
/// the 20 a server lets wait, so that a ledger that is slow for a moment slows statuses and does not
/// end the session.
pub const MAX_UNKEPT: usize = 16;

/// Paces and coalesces.
#[derive(Debug, Clone)]
pub struct Reporter {
    sequence: u64,
    interval_ms: u64,
    last: Option<Mono>,
    waiting: BTreeMap<String, ReplicaReport>,
    /// Nothing is left of these, or nothing was before what waits.
    absent: BTreeSet<String>,
    unkept: VecDeque<Statuses>,
}

impl Reporter {
    /// Goes on after `sequence`, the last number used in this start of the agent.
    #[must_use]
    pub fn after(sequence: u64, interval_ms: u64) -> Self {
        Self {
            sequence,
            interval_ms,
            last: None,
            waiting: BTreeMap::new(),
            absent: BTreeSet::new(),
            unkept: VecDeque::new(),
        }
    }

    /// The shortest time between two messages, as the server says.
    pub fn pace(&mut self, interval_ms: u64) {
        self.interval_ms = interval_ms;
    }

    /// The number used last.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// A replica's newest report.
    pub fn changed(&mut self, report: ReplicaReport) {
        self.waiting.insert(report.replica_uid.clone(), report);
    }

    /// Nothing is left of a replica.
    pub fn absent(&mut self, uid: String) {
        self.waiting.remove(&uid);
        self.absent.insert(uid);
    }

    /// When a message is due; `None`: nothing waits, or the server has to acknowledge first.
    #[must_use]
    pub fn due(&self) -> Option<Mono> {
        let nothing = self.waiting.is_empty() && self.absent.is_empty();
        if nothing || self.unkept.len() >= MAX_UNKEPT {
            return None;
        }
        Some(self.last.map_or(Mono(0), |last| last.plus_ms(self.interval_ms)))
    }

    /// The next message, when one is due.
    pub fn next(&mut self, now: Mono) -> Option<Statuses> {
        if self.due().is_none_or(|due| now < due) {
            return None;
        }
        self.last = Some(now);
        self.sequence += 1;
        let ready = self.waiting.keys().filter(|uid| !self.absent.contains(*uid));
        let ready: Vec<String> = ready.take(bound!(MAX_REPORTS, 2)).cloned().collect();
        let reports = ready.iter().filter_map(|uid| self.waiting.remove(uid)).collect();
        let absent = self.next_absent();
        let message = Statuses { sequence: self.sequence, reports, absent };
        self.unkept.push_back(message.clone());
        Some(message)
    }

    /// All that is gone, at once and whatever the pace: told before a set is acknowledged. Beyond
    /// [`MAX_UNKEPT`] by as many sets as come while the server keeps nothing, mostly one or two; where it
    /// takes none any more it ends the session, and the next hello tells all.
    pub fn absences(&mut self) -> Vec<Statuses> {
        let mut messages = Vec::new();
        while !self.absent.is_empty() {
            self.sequence += 1;
            let absent = self.next_absent();
            let message = Statuses { sequence: self.sequence, reports: Vec::new(), absent };
            self.unkept.push_back(message.clone());
            messages.push(message);
        }
        messages
    }

    fn next_absent(&mut self) -> Vec<String> {
        let mut absent = Vec::new();
        while absent.len() < bound!(MAX_REPORTS, 2)
            && let Some(uid) = self.absent.pop_first()
        {
            absent.push(uid);
        }
        absent
    }

    /// The server keeps all up to this one.
    pub fn kept(&mut self, sequence: u64) {
        while self.unkept.front().is_some_and(|m| m.sequence <= sequence) {
            self.unkept.pop_front();
        }
    }

    /// What was sent and not acknowledged waits again, unless there is something newer; for another
    /// connection.
    pub fn again(&mut self) {
        // Newest first: what is there already wins.
        while let Some(message) = self.unkept.pop_back() {
            for report in message.reports {
                if !self.absent.contains(&report.replica_uid) {
                    self.waiting.entry(report.replica_uid.clone()).or_insert(report);
                }
            }
            self.absent.extend(message.absent);
        }
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(uid: &str, slot: u32) -> ReplicaReport {
        ReplicaReport { replica_uid: uid.into(), slot, ..Default::default() }
    }

    fn slots(message: &Statuses) -> Vec<(&str, u32)> {
        message.reports.iter().map(|r| (r.replica_uid.as_str(), r.slot)).collect()
    }

    #[test]
    fn that_nothing_was_left_of_a_replica_is_told_before_it_is_reported_anew() {
        let mut r = Reporter::after(0, 100);
        r.changed(report("a", 1));
        r.absent("a".into());
        r.changed(report("a", 2));
        r.changed(report("b", 1));
        let first = r.next(Mono(0)).unwrap();
        assert_eq!((slots(&first), &first.absent[..]), (vec![("b", 1)], &["a".to_owned()][..]));
        let second = r.next(r.due().unwrap()).unwrap();
        assert_eq!((slots(&second), second.absent.len()), (vec![("a", 2)], 0));
        r.changed(report("a", 3));
        r.absent("a".into());
        let third = r.next(r.due().unwrap()).unwrap();
        assert_eq!((third.reports.len(), third.absent.len(), r.due()), (0, 1, None));
    }

    #[test]
    fn what_is_gone_is_told_at_once_before_a_set_is_acknowledged() {
        let mut r = Reporter::after(0, 100);
        r.changed(report("b", 1));
        r.next(Mono(0)).unwrap();
        r.absent("a".into());
        r.changed(report("a", 2));
        let told = r.absences();
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].sequence, &told[0].absent[..]), (2, &["a".to_owned()][..]));
        assert!(r.absences().is_empty());
        // What came after it waits for its turn, and what was not kept is told again.
        assert_eq!(slots(&r.next(Mono(100)).unwrap()), [("a", 2)]);
        r.again();
        assert_eq!(r.absences()[0].absent, ["a"]);
    }

    #[test]
    fn the_newest_of_each_replica_goes_out_at_most_once_an_interval() {
        let mut r = Reporter::after(7, 100);
        let mut sent = Vec::new();
        for ms in 0..=1_000_u32 {
            r.changed(report("a", ms));
            if let Some(message) = r.next(Mono(u64::from(ms))) {
                r.kept(message.sequence);
                sent.push(message);
            }
        }
        assert_eq!(sent.len(), 11);
        assert!(sent.iter().all(|m| m.reports.len() == 1));
        assert_eq!(sent[10].reports[0].slot, 1_000);
        assert!(sent.iter().zip(8..).all(|(m, n)| m.sequence == n));
    }

    #[test]
    fn what_was_not_acknowledged_is_told_again_unless_something_newer_is_known() {
        let mut r = Reporter::after(0, 100);
        r.changed(report("a", 1));
        r.absent("b".into());
        r.absent("c".into());
        r.next(Mono(0)).unwrap();
        r.changed(report("b", 2));
        r.next(Mono(100)).unwrap();
        r.changed(report("a", 3));
        r.kept(0);
        r.again();
        let all = r.next(Mono(101)).unwrap();
        let both = ["b".to_owned(), "c".to_owned()];
        assert_eq!((slots(&all), &all.absent[..]), (vec![("a", 3)], &both[..]));
        let rest = r.next(Mono(201)).unwrap();
        assert_eq!((slots(&rest), rest.absent.len()), (vec![("b", 2)], 0));
        r.kept(rest.sequence);
        r.again();
        assert_eq!(r.due(), None);
    }

    #[test]
    fn a_server_that_does_not_acknowledge_is_not_flooded_and_nothing_is_lost() {
        let mut r = Reporter::after(0, 100);
        for ms in 0..100 {
            r.changed(report("a", ms));
            r.next(Mono(u64::from(ms) * 100));
        }
        assert_eq!((r.sequence(), r.due()), (MAX_UNKEPT as u64, None));
        r.kept(MAX_UNKEPT as u64);
        assert_eq!(r.next(Mono(20_000)).unwrap().reports[0].slot, 99);
    }
}
