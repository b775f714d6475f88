//! Steps under way: how many at once, and how they end.

use super::{Cause, Desk, Done, Effect, MAX_RETRY_MS, RETRY_MS, Reconcile, StepId, engine};
use crate::diff::{Container, Labels, State};
use crate::lifecycle::Reason;
use crate::restart::Backoff;
use berth_proto::api;
use berth_proto::ids::{Digest, Mono, Now, ReplicaUid};
use std::collections::{BTreeMap, BTreeSet};

/// Creates, starts and removes at once: an engine on two cores starts no more in parallel.
const STEPS: usize = 16;
/// Stops at once: they wait for programs and cost nothing meanwhile.
const STOPS: usize = 64;
/// Bodies whose bytes are asked for at once. Fewer of them move bytes: whoever carries it out keeps a
/// place for small ones, which the sizes that are left to bring tell, and those are not known here.
const FETCHES: usize = 16;
/// What the policy forbids is looked at again so often: a mount's folder may turn up, a link change.
const FORBIDDEN_MS: u64 = 60_000;
/// The grace of a container whose own cannot be read: the engine's default.
pub(super) const GRACE_MS: u64 = 10_000;

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Create,
    Start,
    Stop,
    Remove,
}

impl Kind {
    /// It puts an end to something.
    fn ends(self) -> bool {
        match self {
            Self::Create | Self::Start => false,
            Self::Stop | Self::Remove => true,
        }
    }
}

impl Desk {
    fn retry(&self, kind: Kind) -> &Backoff {
        if kind.ends() && !bug!(RemovalWaitsForRetry) { &self.retry_end } else { &self.retry }
    }

    fn retry_mut(&mut self, kind: Kind) -> &mut Backoff {
        if kind.ends() && !bug!(RemovalWaitsForRetry) {
            &mut self.retry_end
        } else {
            &mut self.retry
        }
    }
}

/// A step under way.
#[derive(Debug)]
struct Work {
    replica: ReplicaUid,
    kind: Kind,
    /// The container's id; empty for one that is being made.
    id: String,
    attempt: u32,
}

/// A transfer under way.
#[derive(Debug)]
struct Fetching {
    step: StepId,
    /// Image and artifact: the same bytes are brought once.
    contents: BTreeSet<Digest>,
}

impl Cause {
    /// The first and the longest wait before it is tried again.
    fn pause_ms(self) -> (u64, u64) {
        match self {
            // Besides, nothing is done before the engine has answered a look.
            Self::EngineAway => (engine::ASK_MS, engine::MAX_ASK_MS),
            Self::Forbidden => (FORBIDDEN_MS, FORBIDDEN_MS),
            Self::PortInUse | Self::BytesGone | Self::Bytes(_) | Self::Disk | Self::Engine => {
                (RETRY_MS, MAX_RETRY_MS)
            }
        }
    }
}

/// Everything under way.
#[derive(Debug, Default)]
pub(super) struct Works {
    issued: u64,
    works: BTreeMap<StepId, Work>,
    /// By the body whose bytes they are.
    fetches: BTreeMap<Digest, Fetching>,
    fetch_retry: BTreeMap<Digest, Backoff>,
}

impl Works {
    fn id(&mut self) -> StepId {
        self.issued += 1;
        StepId(self.issued)
    }

    fn room(&self, kind: Kind) -> bool {
        let is_stop = |kind: Kind| kind == Kind::Stop;
        let same = self.works.values().filter(|w| is_stop(w.kind) == is_stop(kind)).count();
        same < if is_stop(kind) { bound!(STOPS, 1) } else { bound!(STEPS, 1) }
    }
}

impl Reconcile {
    /// The container that it serves from.
    pub(super) fn newest_running(&self, uid: &ReplicaUid) -> Option<&str> {
        let list = self.seen.get(uid)?;
        list.iter().find(|c| c.state == State::Running).map(|c| c.id.as_str())
    }

    /// The container that it serves from is being stopped.
    pub(super) fn is_stopping(&self, uid: &ReplicaUid) -> bool {
        let step = self.desks.get(uid).and_then(|desk| desk.step);
        step.and_then(|step| self.works.works.get(&step)).is_some_and(|work| {
            work.kind == Kind::Stop && self.newest_running(uid).is_none_or(|id| id == work.id)
        })
    }

    /// Whether a step may begin now.
    pub(super) fn has_place(&mut self, now: Now, uid: &ReplicaUid, kind: Kind) -> bool {
        if let Some(at) = self.desks.get(uid).and_then(|desk| desk.retry(kind).waits(now.mono)) {
            self.wake_at(at);
            return false;
        }
        // With all places taken, the next step's end makes room.
        self.works.room(kind)
    }

    /// A step begins.
    pub(super) fn begin(&mut self, uid: &ReplicaUid, kind: Kind, id: &str, attempt: u32) -> StepId {
        let step = self.works.id();
        let work = Work { replica: uid.clone(), kind, id: id.to_owned(), attempt };
        self.works.works.insert(step, work);
        self.desk(uid).step = Some(step);
        step
    }

    /// Brings the bytes of a replica's body, which others may share.
    pub(super) fn fetch(&mut self, now: Now, uid: &ReplicaUid, out: &mut Vec<Effect>) {
        let (Some(digest), Some(body)) = (self.body_digest(uid), self.body(uid)) else { return };
        if self.works.fetches.contains_key(&digest) {
            return;
        }
        if let Some(at) = self.works.fetch_retry.get(&digest).and_then(|r| r.waits(now.mono)) {
            self.wake_at(at);
            return;
        }
        let mut contents = BTreeSet::from([body.source.image.digest.clone()]);
        contents.extend(body.source.artifact.as_ref().map(|a| a.digest.clone()));
        let shared = self.works.fetches.values().any(|f| !f.contents.is_disjoint(&contents));
        if shared || self.works.fetches.len() >= bound!(FETCHES, 1) {
            return;
        }
        let step = self.works.id();
        self.works.fetches.insert(digest.clone(), Fetching { step, contents });
        for uid in self.of_body(&digest) {
            self.desk(&uid).life.fetching(None);
        }
        out.push(Effect::Fetch { step, replica: uid.clone() });
    }

    /// Those that wait for the bytes of a body.
    fn of_body(&self, digest: &Digest) -> Vec<ReplicaUid> {
        let Some(set) = self.wanted.set() else { return Vec::new() };
        let of = set.entries.iter().filter(|(_, e)| e.body_digest == digest.as_str());
        let lacks = |uid: &ReplicaUid| self.memory.get(uid).is_none_or(|m| !m.bytes_here);
        of.map(|(uid, _)| uid).filter(|uid| lacks(uid)).cloned().collect()
    }

    /// Ends transfers that nobody waits for any more.
    pub(super) fn drop_fetches(&mut self, out: &mut Vec<Effect>) {
        let Some(set) = self.wanted.set().cloned() else { return };
        self.works.fetch_retry.retain(|digest, _| set.bodies.contains_key(digest));
        self.works.fetches.retain(|digest, fetching| {
            let wanted = set.bodies.contains_key(digest);
            if !wanted {
                out.push(Effect::StopFetch(fetching.step));
            }
            wanted
        });
    }

    fn fetch_of(&mut self, step: StepId) -> Option<Digest> {
        let found = self.works.fetches.iter().find(|(_, f)| f.step == step);
        let digest = found.map(|(digest, _)| digest.clone())?;
        self.works.fetches.remove(&digest);
        Some(digest)
    }

    pub(super) fn progress(&mut self, uid: &ReplicaUid, progress: &api::Progress) {
        let Some(digest) = self.body_digest(uid) else { return };
        if self.works.fetches.contains_key(&digest) {
            for uid in self.of_body(&digest) {
                self.desk(&uid).life.fetching(Some(progress.clone()));
            }
        }
    }

    pub(super) fn fetch_waits(&mut self, uid: &ReplicaUid, words: &str) {
        let Some(digest) = self.body_digest(uid) else { return };
        if self.works.fetches.contains_key(&digest) {
            for uid in self.of_body(&digest) {
                let life = &mut self.desk(&uid).life;
                life.fetched();
                life.because(Reason::FETCH_WAITS, words);
            }
        }
    }

    pub(super) fn step_done(&mut self, now: Now, step: StepId, done: Done) {
        if let Some(digest) = self.fetch_of(step) {
            self.works.fetch_retry.remove(&digest);
            for uid in self.of_body(&digest) {
                self.memory.entry(uid.clone()).or_default().bytes_here = true;
                self.desk(&uid).life.fetched();
            }
            return;
        }
        let Some(work) = self.works.works.remove(&step) else { return };
        let (uid, last) = (work.replica, self.engine.last());
        let desk = self.desk(&uid);
        desk.step = None;
        desk.look_after = last;
        desk.retry_mut(work.kind).succeeded();
        match done {
            Done::Created { id } => {
                let container = Container {
                    id,
                    replica: uid.clone(),
                    attempt: work.attempt,
                    state: State::Created,
                    started: None,
                    grace_ms: self.body(&uid).map_or(GRACE_MS, |b| b.spec.stop_grace_ms),
                    labels: self.labels(&uid),
                };
                self.see_one(now, &uid, container);
            }
            Done::Seen(container) => self.see_one(now, &uid, container),
            Done::Removed => self.see_gone(now, &uid, &work.id),
            Done::Fetched | Done::Unseen => {
                self.desk(&uid).unsure = true;
                self.engine.happened(true, now.mono);
            }
        }
    }

    fn labels(&self, uid: &ReplicaUid) -> Labels {
        self.entry(uid).map_or_else(Labels::default, |e| Labels {
            deployment_uid: e.deployment_uid.clone(),
            release: e.release,
            body_digest: e.body_digest.clone(),
        })
    }

    pub(super) fn step_failed(&mut self, now: Mono, step: StepId, cause: Cause, words: &str) {
        if let Some(digest) = self.fetch_of(step) {
            let (min_ms, max_ms) = cause.pause_ms();
            let retry = self.works.fetch_retry.entry(digest.clone()).or_default();
            retry.failed(min_ms, max_ms, now);
            if cause == Cause::EngineAway {
                self.engine.happened(false, now);
            }
            for uid in self.of_body(&digest) {
                let life = &mut self.desk(&uid).life;
                life.fetched();
                life.because(cause.reason(), words);
            }
            return;
        }
        let Some(work) = self.works.works.remove(&step) else { return };
        let (uid, last) = (work.replica, self.engine.last());
        let desk = self.desk(&uid);
        desk.step = None;
        desk.look_after = last;
        // It may have been done all the same.
        desk.unsure = true;
        desk.life.because(cause.reason(), words);
        if cause == Cause::BytesGone {
            let digest = self.body_digest(&uid);
            let set = self.wanted.set().cloned();
            for (uid, entry) in set.iter().flat_map(|s| &s.entries) {
                if digest.as_ref().is_some_and(|d| entry.body_digest == d.as_str()) {
                    self.memory.entry(uid.clone()).or_default().bytes_here = false;
                }
            }
        } else {
            let (min_ms, max_ms) = cause.pause_ms();
            desk.retry_mut(work.kind).failed(min_ms, max_ms, now);
        }
        match work.kind {
            Kind::Create | Kind::Start => self.engine.doubt(now),
            Kind::Stop | Kind::Remove => self.engine.happened(true, now),
        }
    }
}
