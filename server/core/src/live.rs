//! What is known of hosts and replicas and never stored: presence, readiness, progress.
//!
//! After a server start every host is unknown, which is neither healthy nor failed; who has not come
//! after a while is away ([`Unheard`]), and holds up nothing any more. Reports are taken
//! in an order that cannot be turned back: by (host instance, agent start, sequence) between
//! messages, by (attempt, phase) within a replica. Everything is in persistent maps, so a copy costs
//! next to nothing however large the fleet is.

use crate::view::View;
use berth_proto::ids::{DeploymentUid, HostUid, Mono, ReleaseNumber, ReplicaUid, SetNumber, Wall};
use berth_proto::values::{Phase, ReplicaStatus};
use rpds::RedBlackTreeMapSync as Map;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long an agent may take beyond the session's idle timeout, which tells it that the server has
/// gone, until it is back: the window over which agents dial again (60 s), and the longest wait between
/// two dials that fail (30 s).
const BACK_WITHIN_MS: u64 = 90_000;

/// Whether a host can be spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Presence {
    /// Not heard of since the server's start, and not given up.
    #[default]
    Unknown,
    /// A session is live.
    Present,
    /// No session since then, or counted as away since then.
    Away(Mono),
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostLive {
    /// Whether it can be spoken to.
    pub presence: Presence,
    /// The join its reports are of.
    pub instance: String,
    /// The agent's start its reports are of.
    pub agent_start: u64,
    /// The newest report taken of that start.
    pub sequence: u64,
    /// The set durable at the agent.
    pub acknowledged: Option<SetNumber>,
    /// Last heard of.
    pub last_seen: Option<Wall>,
    /// The host's clock is ahead by so much.
    pub clock_offset_ms: i64,
    /// Why the host refused its set; empty: it did not.
    pub refusal: String,
}

/// What is known of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaLive {
    /// As last reported.
    pub status: ReplicaStatus,
    /// Ready without a break since then.
    pub ready_since: Option<Mono>,
}

/// How a rollout's clock stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolloutClock {
    /// Of which release.
    pub release: ReleaseNumber,
    /// Most healthy replicas of it so far.
    pub best: u32,
    /// Time left of the progress deadline, at `running`.
    pub left_ms: u64,
    /// Since when it runs; `None`: it stands still.
    pub running: Option<Mono>,
}

/// What has changed in a way that planning looks at. Progress, messages and clocks are not among it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moved {
    /// A host came, went, or began anew.
    Host(HostUid),
    /// A replica became ready or unready, or nothing is known of it any more.
    Replica(ReplicaUid),
}

/// Who has not been heard of since the server's start, or since it joined, and since when that is waited
/// for.
#[derive(Debug, Default)]
pub struct Unheard {
    since: BTreeMap<HostUid, Mono>,
}

impl Unheard {
    /// Looks at all hosts; to be called now and then. A host that is waited for so long that its agent
    /// must have found the server gone and have dialled again is away from now on, whatever it runs: one
    /// that never comes back would else hold up what runs there, and every rollout, for ever. One that
    /// must be observed since a restore is waited for as long as it takes.
    pub fn look(&mut self, view: &View, live: &mut Live, idle_timeout_ms: u64, now: Mono) {
        let unknown = |host: &HostUid| live.presence(host) == Presence::Unknown;
        let waited = std::mem::take(&mut self.since);
        for host in view.hosts().filter(|h| unknown(&h.uid) && !view.is_unobserved(&h.uid)) {
            let since = waited.get(&host.uid).copied().unwrap_or(now);
            self.since.insert(host.uid.clone(), since);
        }
        let within = idle_timeout_ms.saturating_add(BACK_WITHIN_MS);
        let within = if bug!(NeverGivenUp) { u64::MAX } else { within };
        for (host, _) in self.since.iter().filter(|(_, since)| now.since_ms(**since) >= within) {
            live.edit_host(host, |h| h.presence = Presence::Away(now));
        }
    }
}

/// All of it; cheap to copy.
#[derive(Debug, Clone, Default)]
pub struct Live {
    hosts: Map<HostUid, Arc<HostLive>>,
    replicas: Map<ReplicaUid, Arc<ReplicaLive>>,
    clocks: Map<DeploymentUid, Arc<RolloutClock>>,
    /// Since they were last taken; at most one entry for each host and replica.
    moved: BTreeSet<Moved>,
}

/// What a report was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Newer than what was known.
    Newer,
    /// The same.
    Same,
    /// Older: left aside.
    Older,
}

impl Live {
    /// A host.
    #[must_use]
    pub fn host(&self, uid: &HostUid) -> Option<&Arc<HostLive>> {
        self.hosts.get(uid)
    }

    /// Whether a host can be spoken to.
    #[must_use]
    pub fn presence(&self, uid: &HostUid) -> Presence {
        self.hosts.get(uid).map(|h| h.presence).unwrap_or_default()
    }

    /// A session is live.
    #[must_use]
    pub fn is_present(&self, uid: &HostUid) -> bool {
        self.presence(uid) == Presence::Present
    }

    /// Changes what is known of a host.
    pub fn edit_host(&mut self, uid: &HostUid, edit: impl FnOnce(&mut HostLive)) {
        let mut host = self.hosts.get(uid).map(|h| HostLive::clone(h)).unwrap_or_default();
        let before = host.presence;
        edit(&mut host);
        if host.presence != before {
            self.moved.insert(Moved::Host(uid.clone()));
        }
        self.hosts.insert_mut(uid.clone(), Arc::new(host));
    }

    /// Forgets a host.
    pub fn remove_host(&mut self, uid: &HostUid) {
        if self.hosts.remove_mut(uid) {
            self.moved.insert(Moved::Host(uid.clone()));
        }
    }

    /// What has moved since this was last asked.
    pub fn take_moved(&mut self) -> BTreeSet<Moved> {
        std::mem::take(&mut self.moved)
    }

    /// A replica.
    #[must_use]
    pub fn replica(&self, uid: &ReplicaUid) -> Option<&Arc<ReplicaLive>> {
        self.replicas.get(uid)
    }

    /// Forgets a replica.
    pub fn remove_replica(&mut self, uid: &ReplicaUid) {
        if self.replicas.remove_mut(uid) {
            self.moved.insert(Moved::Replica(uid.clone()));
        }
    }

    /// Forgets replicas the ledger does not hold any more, so that what is known stays bounded by it.
    pub fn forget_deleted(&mut self, view: &View) {
        let gone: Vec<ReplicaUid> =
            self.replicas.keys().filter(|uid| view.replica(uid).is_none()).cloned().collect();
        for uid in gone {
            self.remove_replica(&uid);
        }
    }

    /// A rollout's clock.
    #[must_use]
    pub fn clock(&self, uid: &DeploymentUid) -> Option<&Arc<RolloutClock>> {
        self.clocks.get(uid)
    }

    /// Sets or forgets a rollout's clock.
    pub fn set_clock(&mut self, uid: &DeploymentUid, clock: Option<RolloutClock>) {
        match clock {
            Some(clock) => self.clocks.insert_mut(uid.clone(), Arc::new(clock)),
            None => {
                self.clocks.remove_mut(uid);
            }
        }
    }

    /// Whether messages of this origin may still be taken, and notes them when so.
    pub fn admit(
        &mut self,
        host: &HostUid,
        instance: &str,
        agent_start: u64,
        sequence: u64,
    ) -> Taken {
        let known = self.hosts.get(host).map(|h| HostLive::clone(h)).unwrap_or_default();
        if known.instance == instance {
            if (agent_start, sequence) < (known.agent_start, known.sequence) {
                return Taken::Older;
            }
            if (agent_start, sequence) == (known.agent_start, known.sequence) && sequence != 0 {
                return Taken::Same;
            }
        }
        self.edit_host(host, |host| {
            host.instance = instance.to_owned();
            host.agent_start = agent_start;
            host.sequence = sequence;
        });
        Taken::Newer
    }

    /// Takes in a replica's status.
    pub fn take(&mut self, uid: &ReplicaUid, status: ReplicaStatus, now: Mono) -> Taken {
        let known = self.replicas.get(uid);
        if let Some(known) = known {
            let order = |s: &ReplicaStatus| (s.attempt, s.phase);
            if status.phase.is_none() || order(&status) < order(&known.status) {
                return Taken::Older;
            }
            if known.status == status {
                return Taken::Same;
            }
        }
        let running = status.ready && status.phase == Some(Phase::Running);
        // A new attempt starts the wait anew even if nobody saw it unready.
        let since = known
            .filter(|k| k.status.attempt == status.attempt)
            .and_then(|k| k.ready_since)
            .or(Some(now));
        let ready_since = if running { since } else { None };
        if known.and_then(|k| k.ready_since) != ready_since {
            self.moved.insert(Moved::Replica(uid.clone()));
        }
        self.replicas.insert_mut(uid.clone(), Arc::new(ReplicaLive { status, ready_since }));
        Taken::Newer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(attempt: u32, phase: Phase, ready: bool) -> ReplicaStatus {
        ReplicaStatus { attempt, phase: Some(phase), ready, ..ReplicaStatus::default() }
    }

    #[test]
    fn attempt_and_phase_never_go_backwards_but_readiness_may() {
        let uid: ReplicaUid = "r".parse().unwrap();
        let mut live = Live::default();
        assert_eq!(live.take(&uid, status(1, Phase::Running, true), Mono(5)), Taken::Newer);
        assert_eq!(live.take(&uid, status(1, Phase::Starting, false), Mono(6)), Taken::Older);
        assert_eq!(live.take(&uid, status(1, Phase::Running, false), Mono(7)), Taken::Newer);
        assert_eq!(live.replica(&uid).unwrap().ready_since, None);
        assert_eq!(live.take(&uid, status(2, Phase::Accepted, false), Mono(8)), Taken::Newer);
        assert_eq!(live.take(&uid, status(1, Phase::Exited, false), Mono(9)), Taken::Older);
    }

    #[test]
    fn ready_since_survives_repeats_and_starts_anew_with_an_attempt() {
        let uid: ReplicaUid = "r".parse().unwrap();
        let mut live = Live::default();
        live.take(&uid, status(1, Phase::Running, true), Mono(5));
        let again = ReplicaStatus { message: "x".into(), ..status(1, Phase::Running, true) };
        live.take(&uid, again, Mono(9));
        assert_eq!(live.replica(&uid).unwrap().ready_since, Some(Mono(5)));
        live.take(&uid, status(2, Phase::Running, true), Mono(12));
        assert_eq!(live.replica(&uid).unwrap().ready_since, Some(Mono(12)));
    }

    #[test]
    fn a_message_of_an_older_start_is_left_aside_and_a_new_join_begins_anew() {
        let host: HostUid = "h".parse().unwrap();
        let mut live = Live::default();
        assert_eq!(live.admit(&host, "i", 2, 7), Taken::Newer);
        assert_eq!(live.admit(&host, "i", 2, 7), Taken::Same);
        assert_eq!(live.admit(&host, "i", 2, 6), Taken::Older);
        assert_eq!(live.admit(&host, "i", 1, 99), Taken::Older);
        assert_eq!(live.admit(&host, "i", 3, 1), Taken::Newer);
        assert_eq!(live.admit(&host, "j", 1, 1), Taken::Newer);
    }
}
