//! Who of a host's sessions counts, and what of an agent's words is believed.
//!
//! A machine without I/O: sessions open, say hello and close; what is known live is changed by the
//! newest one that has said hello, and by no other. What of a hello or a status must be durable is
//! [`crate::intake`]'s business; whoever drives the desk keeps that between [`Desk::judge`] and
//! [`Desk::registered`].
//!
//! What always holds:
//!
//! - Of two sessions of a host the one that was opened later wins, whatever the order of their hellos.
//! - A host is present as long as one session of it that has said hello is open, and only then.
//! - What an older session says, or has said and nobody has read yet, changes nothing.

use crate::live::{Live, Taken};
use crate::session::Registration;
use crate::takeover::{Boots, Takeover};
use crate::view::View;
use berth_proto::agent::{ReplicaReport, SetVerdict};
use berth_proto::ids::{HostUid, Mono, Now, SetNumber, Wall};
use std::collections::BTreeMap;

/// A session that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    id: u64,
    /// It has said hello.
    registered: bool,
}

/// What a hello comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// It may stand; older sessions of the host end. What of the hello must be durable is to be kept,
    /// then [`Desk::registered`].
    Welcome {
        /// The older sessions.
        ends: Vec<u64>,
    },
    /// The host was removed: it is told so.
    Removed {
        /// Its containers, artifacts and keys shall go.
        wipe: bool,
    },
    /// No such host.
    Unknown,
    /// Two boots share the identity, as is known.
    Quarantined,
    /// Two boots share the identity, as this hello shows: the host is to be quarantined.
    TwoBoots,
    /// A newer session was faster.
    Superseded,
}

/// What becomes of a status message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// It is news: what of it must be durable is to be kept before it is acknowledged.
    News {
        /// The set that the host had acknowledged when it said so.
        held: Option<SetNumber>,
    },
    /// It was taken before: it may be acknowledged.
    Known,
    /// Its session does not count any more.
    Superseded,
}

/// The sessions of all hosts.
#[derive(Debug, Default)]
pub struct Desk {
    sessions: BTreeMap<HostUid, Vec<Line>>,
    boots: BTreeMap<HostUid, Boots>,
    /// The newest session that has said hello, of each host, also when it is over.
    heard: BTreeMap<HostUid, u64>,
    newest: u64,
}

impl Desk {
    /// A session begins; nothing is known of it but the certificate's host. Its number is unique.
    pub fn open(&mut self, host: &HostUid) -> u64 {
        self.newest += 1;
        let line = Line { id: self.newest, registered: false };
        self.sessions.entry(host.clone()).or_default().push(line);
        self.newest
    }

    /// Judges a hello.
    pub fn judge(
        &mut self,
        view: &View,
        host: &HostUid,
        session: u64,
        boot_nonce: &str,
        now: Mono,
    ) -> Admission {
        let Some(held) = view.host(host) else { return Admission::Unknown };
        if held.is_removed() {
            return Admission::Removed { wipe: held.record.wipe || bug!(WipedUnasked) };
        }
        if held.record.quarantined {
            return Admission::Quarantined;
        }
        let list = self.sessions.entry(host.clone()).or_default();
        // Before anything is remembered of it: a hello that comes late is of a boot that may be over.
        if self.heard.get(host).is_some_and(|newest| *newest > session) {
            return Admission::Superseded;
        }
        let boots = self.boots.entry(host.clone()).or_default();
        if boots.judge(boot_nonce, now) == Takeover::TwoBoots && !bug!(TwoBootsWelcome) {
            return Admission::TwoBoots;
        }
        self.heard.insert(host.clone(), session);
        for line in list.iter_mut() {
            line.registered |= line.id == session;
        }
        let ends = list.iter().map(|line| line.id).filter(|id| *id < session).collect();
        list.retain(|line| line.id >= session);
        Admission::Welcome { ends }
    }

    /// Whether this is the newest session that has said hello. What an older one still says, or has
    /// said and nobody has read yet, is of an agent that may be gone: its numbers mean nothing.
    #[must_use]
    pub fn is_current(&self, host: &HostUid, session: u64) -> bool {
        let said_hello = self.sessions.get(host).into_iter().flatten().filter(|l| l.registered);
        said_hello.map(|line| line.id).max() == Some(session)
    }

    /// What of a hello must be durable is kept: the host is present, unless a newer session was faster
    /// meanwhile; what that one said must not be undone. `false`: it was. To be called where nobody
    /// else changes `live` between the question and the change.
    pub fn registered(
        &self,
        live: &mut Live,
        view: &View,
        (host, session): (&HostUid, u64),
        said: &Registration,
        now: Now,
    ) -> bool {
        let current = self.is_current(host, session) || bug!(SupersededHelloBelieved);
        if current {
            live.registered(view, host, said, now);
        }
        current
    }

    /// Takes statuses into what is known live, if they are news of the session that counts.
    pub fn statuses(
        &self,
        live: &mut Live,
        view: &View,
        (host, session, sequence): (&HostUid, u64, u64),
        (reports, absent): (&[ReplicaReport], &[String]),
        now: Now,
    ) -> Admitted {
        if !self.is_current(host, session) && !bug!(SupersededStatusBelieved) {
            return Admitted::Superseded;
        }
        let known = live.host(host).cloned().unwrap_or_default();
        live.edit_host(host, |h| h.last_seen = Some(now.wall));
        match live.admit(host, &known.instance, known.agent_start, sequence) {
            Taken::Newer => {
                live.take_reports(view, host, (reports, absent), now.mono);
                Admitted::News { held: known.acknowledged }
            }
            Taken::Same | Taken::Older => Admitted::Known,
        }
    }

    /// A set is durable at the agent. `false`: the session does not count any more.
    pub fn acknowledged(
        &self,
        live: &mut Live,
        host: &HostUid,
        session: u64,
        number: SetNumber,
    ) -> bool {
        let current = self.is_current(host, session);
        if current {
            live.edit_host(host, |h| {
                h.acknowledged = Some(number);
                h.refusal.clear();
            });
        }
        current
    }

    /// A set was refused.
    pub fn refused(
        &self,
        live: &mut Live,
        (host, session): (&HostUid, u64),
        offered: SetNumber,
        held: Option<SetNumber>,
        verdict: SetVerdict,
    ) {
        if !self.is_current(host, session) {
            return;
        }
        let why = match verdict {
            SetVerdict::NotDurable => "its agent's disk did not take it: is it full?",
            SetVerdict::Unspecified
            | SetVerdict::Taken
            | SetVerdict::Same
            | SetVerdict::Older
            | SetVerdict::Changed
            | SetVerdict::Broken => verdict.as_str_name(),
        };
        let words = format!(
            "it refused set {}.{} ({why}); it holds {}",
            offered.epoch,
            offered.generation,
            held.map_or_else(|| "none".to_owned(), |h| format!("{}.{}", h.epoch, h.generation)),
        );
        live.edit_host(host, |h| h.refusal = words);
    }

    /// The host's clock is so far ahead, as its session that counts says.
    pub fn clock(
        &self,
        live: &mut Live,
        (host, session): (&HostUid, u64),
        offset_ms: i64,
        now: Wall,
    ) {
        if !self.is_current(host, session) {
            return;
        }
        live.edit_host(host, |h| {
            h.clock_offset_ms = offset_ms;
            h.last_seen = Some(now);
        });
    }

    /// A session is over.
    pub fn closed(&mut self, live: &mut Live, host: &HostUid, session: u64, now: Now) {
        if let Some(list) = self.sessions.get_mut(host) {
            list.retain(|line| line.id != session);
            if list.is_empty() {
                self.sessions.remove(host);
            }
        }
        // One that has not said hello keeps nobody present.
        if self.sessions.get(host).into_iter().flatten().all(|line| !line.registered) {
            live.ended(host, now);
        }
    }

    /// The sessions of a host that are open, oldest first.
    #[must_use]
    pub fn sessions_of(&self, host: &HostUid) -> Vec<u64> {
        self.sessions.get(host).into_iter().flatten().map(|line| line.id).collect()
    }

    /// Forgets the boots of a host: its quarantine was released.
    pub fn forget_boots(&mut self, host: &HostUid) {
        self.boots.remove(host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Change;
    use crate::live::Presence;
    use crate::objects::Host;
    use berth_proto::ids::Revision;
    use berth_proto::record::{HostRecord, Meta};
    use std::sync::Arc;

    fn host() -> HostUid {
        "h".parse().unwrap()
    }

    fn view(edit: impl FnOnce(&mut HostRecord)) -> View {
        let meta = Meta { uid: "h".into(), name: "h".into(), ..Meta::default() };
        let mut record = HostRecord { meta: Some(meta), ..HostRecord::default() };
        edit(&mut record);
        let mut view = View::default();
        view.apply(&Change::PutHost(Arc::new(Host::new(record).unwrap())), Revision(1));
        view
    }

    fn now(ms: u64) -> Now {
        Now { mono: Mono(ms), wall: Wall(0) }
    }

    fn said() -> Registration {
        Registration {
            instance: "i".into(),
            boot_nonce: "n".into(),
            agent_start: 1,
            agent_version: String::new(),
            facts: None,
            held: None,
            observed: Vec::new(),
            engine_observed: true,
            trust_version: 0,
        }
    }

    fn hello(desk: &mut Desk, live: &mut Live, view: &View, session: u64) -> Admission {
        let admission = desk.judge(view, &host(), session, "n", Mono(1));
        if matches!(admission, Admission::Welcome { .. }) {
            assert!(desk.registered(live, view, (&host(), session), &said(), now(1)));
        }
        admission
    }

    #[test]
    fn the_session_opened_later_wins_whatever_the_order_of_hellos() {
        let (mut desk, mut live, view) = (Desk::default(), Live::default(), view(|_| {}));
        let (old, new) = (desk.open(&host()), desk.open(&host()));
        let welcome = Admission::Welcome { ends: vec![old] };
        assert_eq!(hello(&mut desk, &mut live, &view, new), welcome);
        assert_eq!(hello(&mut desk, &mut live, &view, old), Admission::Superseded);
        assert!(desk.is_current(&host(), new) && !desk.is_current(&host(), old));
    }

    #[test]
    fn a_hello_that_comes_late_makes_no_clone_of_the_boot_that_follows() {
        let (mut desk, view) = (Desk::default(), view(|_| {}));
        let (old, new) = (desk.open(&host()), desk.open(&host()));
        let judge = |desk: &mut Desk, session, nonce: &str| {
            desk.judge(&view, &host(), session, nonce, Mono(1))
        };
        assert!(matches!(judge(&mut desk, new, "second"), Admission::Welcome { .. }));
        assert_eq!(judge(&mut desk, old, "first"), Admission::Superseded);
        let again = desk.open(&host());
        assert!(matches!(judge(&mut desk, again, "second"), Admission::Welcome { .. }));
    }

    #[test]
    fn a_hello_that_comes_after_a_later_session_has_come_and_gone_is_too_late() {
        let (mut desk, mut live, view) = (Desk::default(), Live::default(), view(|_| {}));
        let (old, new) = (desk.open(&host()), desk.open(&host()));
        hello(&mut desk, &mut live, &view, new);
        desk.closed(&mut live, &host(), new, now(2));
        assert_eq!(hello(&mut desk, &mut live, &view, old), Admission::Superseded);
        assert!(!live.is_present(&host()));
        let next = desk.open(&host());
        assert_eq!(
            hello(&mut desk, &mut live, &view, next),
            Admission::Welcome { ends: Vec::new() }
        );
    }

    #[test]
    fn a_superseded_sessions_words_change_nothing() {
        let (mut desk, mut live, view) = (Desk::default(), Live::default(), view(|_| {}));
        let old = desk.open(&host());
        hello(&mut desk, &mut live, &view, old);
        let new = desk.open(&host());
        hello(&mut desk, &mut live, &view, new);
        let before = live.host(&host()).cloned();
        let admitted = desk.statuses(&mut live, &view, (&host(), old, 7), (&[], &[]), now(9));
        desk.acknowledged(&mut live, &host(), old, SetNumber::default());
        desk.clock(&mut live, (&host(), old), 9_000, Wall(9));
        assert_eq!((admitted, live.host(&host()).cloned()), (Admitted::Superseded, before));
        let admitted = desk.statuses(&mut live, &view, (&host(), new, 1), (&[], &[]), now(9));
        assert_eq!(admitted, Admitted::News { held: None });
        let again = desk.statuses(&mut live, &view, (&host(), new, 1), (&[], &[]), now(9));
        assert_eq!(again, Admitted::Known);
    }

    #[test]
    fn a_host_is_away_when_its_last_session_that_said_hello_ends() {
        let (mut desk, mut live, view) = (Desk::default(), Live::default(), view(|_| {}));
        let first = desk.open(&host());
        hello(&mut desk, &mut live, &view, first);
        let second = desk.open(&host());
        hello(&mut desk, &mut live, &view, second);
        desk.closed(&mut live, &host(), first, now(2));
        assert!(live.is_present(&host()));
        let silent = desk.open(&host());
        desk.closed(&mut live, &host(), second, now(3));
        assert_eq!(live.presence(&host()), Presence::Away(Mono(3)));
        desk.closed(&mut live, &host(), silent, now(4));
        assert_eq!(
            (live.presence(&host()), desk.sessions_of(&host())),
            (Presence::Away(Mono(3)), vec![])
        );
    }

    #[test]
    fn whoever_is_removed_unknown_or_quarantined_is_told_so() {
        let mut desk = Desk::default();
        let mut judge = |view: &View| {
            let session = desk.open(&host());
            desk.judge(view, &host(), session, "n", Mono(1))
        };
        assert_eq!(judge(&View::default()), Admission::Unknown);
        let removed = view(|record| (record.removed, record.wipe) = (true, true));
        assert_eq!(judge(&removed), Admission::Removed { wipe: true });
        assert_eq!(judge(&view(|record| record.quarantined = true)), Admission::Quarantined);
    }

    #[test]
    fn a_boot_that_comes_back_is_two_boots_until_it_is_forgotten() {
        let (mut desk, view) = (Desk::default(), view(|_| {}));
        let judge = |desk: &mut Desk, nonce: &str| {
            let session = desk.open(&host());
            desk.judge(&view, &host(), session, nonce, Mono(1))
        };
        for nonce in ["a", "b"] {
            assert!(matches!(judge(&mut desk, nonce), Admission::Welcome { .. }));
        }
        assert_eq!(judge(&mut desk, "a"), Admission::TwoBoots);
        desk.forget_boots(&host());
        assert!(matches!(judge(&mut desk, "a"), Admission::Welcome { .. }));
    }
}
