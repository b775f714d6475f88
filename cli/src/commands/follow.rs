//! Following what becomes of a deployment, until it is there, has failed or its time is over.

use super::{Patience, ask, broken, connect};
use crate::args::Global;
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use crate::output::{transfer, waits, word};
use crate::progress::{Board, Line};
use crate::style::Ink;
use berth_proto::api::deployment_service_client::DeploymentServiceClient;
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::words::{NO_HOST_FITS, counted, is_of_empty_slots};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;

/// Hosts named before they are only counted.
const NAMED: usize = 8;
/// What everybody who follows has for the first message, also where the end has come meanwhile: of many,
/// some get their turn late, and how theirs are is not known before.
const FIRST: Duration = Duration::from_secs(5);

/// How long the next message is waited for.
fn until(end: Instant, begun: Instant, heard: bool) -> Instant {
    if heard { end } else { end.max(begun + FIRST) }
}

/// Waits for the end of the rollout that a deployment is in. `settled`: no release was made, so that it has
/// to have as many replicas ready as are wanted, too.
pub async fn settle(
    global: &Global,
    client: &Client,
    deployment: &Deployment,
    settled: bool,
    timeout: Duration,
) -> Result<Deployment> {
    let meta = &deployment.meta.clone().unwrap_or_default();
    let following = Following {
        global,
        shared: &Shared::new(client.deployments()),
        meta,
        release: deployment.status.as_ref().map_or(0, |s| s.release),
        settled,
        wait_all: false,
        end: Instant::now() + timeout,
        index: 0,
        board: &RefCell::new(Board::new()),
    };
    following.run().await.map_err(|(error, _)| error)
}

/// A connection that all share who follow a rollout. Whoever finds it broken leaves it, and the next
/// one who asks makes another.
pub struct Shared<T> {
    /// How many were left, and the present one.
    held: tokio::sync::Mutex<(u64, Option<T>)>,
}

impl<T: Clone> Shared<T> {
    pub fn new(first: T) -> Self {
        Self { held: tokio::sync::Mutex::new((0, Some(first))) }
    }

    /// The present one with its number, or the one that is made now.
    async fn get(&self, make: impl Future<Output = Result<T>>) -> Result<(u64, T)> {
        let mut held = self.held.lock().await;
        let one = match &held.1 {
            Some(one) => one.clone(),
            None => held.1.insert(make.await?).clone(),
        };
        Ok((held.0, one))
    }

    /// That of this number is of no use any more, unless somebody has said so before.
    async fn leave(&self, number: u64) {
        let mut held = self.held.lock().await;
        if held.0 == number {
            *held = (number + 1, None);
        }
    }
}

/// One rollout that is followed.
pub struct Following<'a> {
    pub global: &'a Global,
    pub shared: &'a Shared<DeploymentServiceClient<Channel>>,
    pub meta: &'a ObjectMeta,
    pub release: u64,
    /// No new release was made: that its rollout is complete says nothing of the replicas that were
    /// added or went since.
    pub settled: bool,
    /// Hosts that are away are waited for, too.
    pub wait_all: bool,
    pub end: Instant,
    pub index: usize,
    pub board: &'a RefCell<Board>,
}

/// An error, and the deployment as it was last seen.
type Lost = (Error, Option<Deployment>);

/// What a state of a deployment means for somebody who waits for one of its releases.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Go on waiting.
    Wait,
    /// Done, but for hosts that are away.
    Done { deferred: u32 },
    /// Not going to be done.
    Failed(String),
}

/// `excused`: how many slots nobody waits for, where no new release was made.
fn judge(status: &DeploymentStatus, release: u64, excused: Option<u32>) -> Verdict {
    let reason = || {
        let words = for_terminal(&status.reason);
        if words.is_empty() { "the rollout failed".to_owned() } else { words }
    };
    // Where going back was what is waited for, it has come to its end.
    let complete = match status.rollout() {
        RolloutState::Complete | RolloutState::RolledBack => status.release == release,
        RolloutState::Unspecified
        | RolloutState::Rolling
        | RolloutState::Paused
        | RolloutState::Failed
        | RolloutState::Deleting => false,
    };
    match status.rollout() {
        RolloutState::RolledBack | RolloutState::Failed | RolloutState::Paused if !complete => {
            Verdict::Failed(reason())
        }
        RolloutState::Deleting => Verdict::Failed("it is being deleted".to_owned()),
        RolloutState::Rolling | RolloutState::Complete | RolloutState::Unspecified
            if status.release > release =>
        {
            Verdict::Failed(format!("release {} took the place of {release}", status.release))
        }
        _ if complete => {
            let there = |excused| status.updated_ready.saturating_add(excused) >= status.wanted;
            match excused {
                Some(excused) if !there(excused) => Verdict::Wait,
                Some(_) | None => Verdict::Done { deferred: status.deferred_hosts },
            }
        }
        // Somebody has given it up.
        RolloutState::Complete if status.release < release => Verdict::Failed(format!(
            "release {release} was undone; release {} is back",
            status.release
        )),
        // It has failed, and going back waits for room or a host: nobody knows for how long.
        RolloutState::Rolling
            if (1..release).contains(&status.release) && status.pending_count > 0 =>
        {
            Verdict::Failed(reason())
        }
        RolloutState::Rolling
        | RolloutState::Unspecified
        | RolloutState::Complete
        | RolloutState::RolledBack
        | RolloutState::Failed
        | RolloutState::Paused => Verdict::Wait,
    }
}

/// The time of somebody who waits is over. That is no failure of the rollout, but whoever waited must not
/// go on as if it were there: 1 would say that nothing was written, 3 that nobody was reached, 6 that it
/// is done.
fn late(status: &DeploymentStatus, release: u64, excused: Option<u32>) -> Error {
    let why = status.pending.iter().find(|p| !p.message.is_empty());
    // Its rollout is over, and what it had brought is not there any more.
    let lost = status.rollout() == RolloutState::Complete
        || (status.rollout() == RolloutState::RolledBack && status.release == release);
    match judge(status, release, excused) {
        Verdict::Done { deferred } if deferred > 0 => Error::new(
            Kind::Deferred,
            format!("complete, but {}", on_return(deferred, &BTreeSet::new())),
        )
        .hint("`berth ps` shows which; --timeout sets how long to wait for them"),
        Verdict::Done { .. } | Verdict::Wait | Verdict::Failed(_) => Error::new(
            Kind::RolloutFailed,
            for_terminal(&format!(
                "not {} in time ({} ready{}{}); {}",
                if lost { "there" } else { "complete" },
                ready_of(status),
                if !lost && status.updated_ready >= status.wanted && status.wanted > 0 {
                    ", which has to last for spec.rollout.readyFor"
                } else {
                    ""
                },
                why.map(|p| format!("; {}", p.message)).unwrap_or_default(),
                if lost { "it is still tried" } else { "the rollout goes on" }
            )),
        )
        .hint("`berth deployment rollout status` shows where it is, `berth ps` why"),
    }
}

/// How many of how many are ready: of a number that was made smaller, those beyond it are on their way
/// out.
pub fn ready_of(status: &DeploymentStatus) -> String {
    format!("{}/{}", status.updated_ready.min(status.wanted), status.wanted)
}

/// How a rollout is told that is complete: also where that is so because no host is eligible, and with
/// how many programs have ended and are not to be started again.
fn complete(status: &DeploymentStatus, finished: usize) -> String {
    let nobody = status.pending.iter().find(|p| status.wanted == 0 && p.reason == NO_HOST_FITS);
    match nobody {
        Some(nobody) => for_terminal(&format!(
            "runs nowhere, no host is eligible: {}; the first that is gets it",
            nobody.message
        )),
        None if finished > 0 => format!("complete, {} ready, {finished} ended", ready_of(status)),
        None => format!("complete, {} ready", ready_of(status)),
    }
}

/// What to do about a rollout that has ended like this.
fn advice(rollout: RolloutState, name: &str) -> Option<String> {
    match rollout {
        RolloutState::RolledBack => Some(
            "mend the manifest and apply it again; `rollout: {onFailure: pause}` keeps what fails \
             for a look"
                .to_owned(),
        ),
        RolloutState::Paused | RolloutState::Failed => Some(format!(
            "`berth ps {name}` shows each replica, `berth logs {name}` what its program said; mend \
             the manifest and apply it again"
        )),
        RolloutState::Unspecified
        | RolloutState::Rolling
        | RolloutState::Complete
        | RolloutState::Deleting => None,
    }
}

impl Following<'_> {
    /// To the rollout's end, or to the time's. A stream that broke is opened again, on whatever
    /// server answers then: each message is complete, so nothing is missed.
    pub async fn run(&self) -> std::result::Result<Deployment, Lost> {
        let begun = Instant::now();
        let mut patience = Patience::new(Some(until(self.end, begun, false)));
        let mut last: Option<Deployment> = None;
        loop {
            match self.watch(begun, &mut last, &mut patience).await {
                Ok(deployment) => return Ok(deployment),
                Err(error) => {
                    let say = |words: String| self.board.borrow_mut().note(&format!("  {words}"));
                    if let Err(error) = patience.bear(error, say).await {
                        return Err((error, last));
                    }
                }
            }
        }
    }

    async fn watch(
        &self,
        begun: Instant,
        last: &mut Option<Deployment>,
        patience: &mut Patience,
    ) -> Result<Deployment> {
        let make = async { Ok(connect(self.global).await?.deployments()) };
        let until = until(self.end, begun, last.is_some());
        let (number, deployments) = match timeout_at(until, self.shared.get(make)).await {
            Ok(got) => got?,
            Err(_) => {
                return Err(Error::new(Kind::Unavailable, "the server was not reached in time"));
            }
        };
        let result = self.watch_over(begun, deployments, last, patience).await;
        if result.as_ref().is_err_and(|error| error.kind == Kind::Unavailable) {
            self.shared.leave(number).await;
        }
        result
    }

    async fn watch_over(
        &self,
        begun: Instant,
        mut deployments: DeploymentServiceClient<Channel>,
        last: &mut Option<Deployment>,
        patience: &mut Patience,
    ) -> Result<Deployment> {
        let request = WatchDeploymentRequest {
            namespace: self.meta.namespace.clone(),
            name: self.meta.name.clone(),
        };
        let mut stream = ask(self.global, deployments.watch_deployment(request)).await?;
        let mut excused = self.settled.then_some(0);
        loop {
            let until = until(self.end, begun, last.is_some());
            let next = match (timeout_at(until, stream.message()).await, &last) {
                (Ok(next), _) => next.map_err(broken)?,
                (Err(_), Some(last)) => {
                    let status = last.status.clone().unwrap_or_default();
                    return Err(late(&status, self.release, excused));
                }
                (Err(_), None) => {
                    return Err(Error::new(Kind::Unavailable, "the server did not answer in time"));
                }
            };
            let Some(now) = next else {
                return Err(Error::new(Kind::Unavailable, "the server ended the watch"));
            };
            patience.calm();
            if now.deleted {
                return Err(Error::new(Kind::RolloutFailed, "it was deleted meanwhile"));
            }
            let deployment = now.deployment.clone().unwrap_or_default();
            let status = deployment.status.clone().unwrap_or_default();
            *last = Some(deployment.clone());
            let every_host = deployment.spec.as_ref().is_some_and(|s| s.every_host);
            let Spared { all, finished } = spared(&now.replicas, status.release, every_host);
            let away =
                now.replicas.iter().filter(|r| is_away(r)).map(|r| r.host.as_str()).collect();
            excused = self.settled.then(|| u32::try_from(all).unwrap_or(u32::MAX));
            self.board.borrow_mut().show(self.index, self.lines(&now.replicas, &status, &away));
            match judge(&status, self.release, excused) {
                Verdict::Wait => {}
                Verdict::Done { deferred } if deferred > 0 && self.wait_all => {}
                Verdict::Done { deferred } => {
                    let mut words = format!("{}: {}", self.meta.name, complete(&status, finished));
                    if deferred > 0 {
                        words.push_str(&format!("; deferred: {}", on_return(deferred, &away)));
                    }
                    self.board.borrow_mut().end(self.index, &words);
                    return Ok(deployment);
                }
                Verdict::Failed(reason) => {
                    let error = Error::new(Kind::RolloutFailed, reason);
                    return Err(match advice(status.rollout(), &self.meta.name) {
                        Some(hint) => error.hint(hint),
                        None => error,
                    });
                }
            }
        }
    }

    fn lines(
        &self,
        replicas: &[Replica],
        status: &DeploymentStatus,
        away: &BTreeSet<&str>,
    ) -> Vec<Line> {
        let mut lines = Vec::new();
        let key = |what: &str| format!("{}/{}/{what}", self.meta.namespace, self.meta.name);
        for replica in replicas {
            let (state, coarse, ink) = progress(replica);
            let text = for_terminal(&format!(
                "  {}/{} on {} (release {}): {state}",
                self.meta.name, replica.slot, replica.host, replica.release
            ));
            lines.push(Line { key: key(&replica.uid), text, coarse, ink });
        }
        for pending in status.pending.iter().filter(|p| is_of_empty_slots(&p.reason)) {
            let text = for_terminal(&format!(
                "  {}: waiting: {} ({})",
                self.meta.name,
                pending.message,
                counted(pending.count, "slot")
            ));
            lines.push(Line {
                key: key(&format!("{}/{}", pending.reason, pending.message)),
                coarse: text.clone(),
                text,
                ink: Ink::Busy,
            });
        }
        if status.deferred_hosts > 0 {
            let text = for_terminal(&format!(
                "  {}: deferred: {}",
                self.meta.name,
                on_return(status.deferred_hosts, away)
            ));
            lines.push(Line { key: key("deferred"), coarse: text.clone(), text, ink: Ink::Note });
        }
        lines
    }
}

/// Whether nobody can ask for a replica now that shall run.
fn is_away(replica: &Replica) -> bool {
    replica.intent() == ReplicaIntent::Run
        && matches!(replica.host_presence(), HostPresence::Away | HostPresence::Lost)
}

/// Whether a replica's program has ended well and is not to be started again: what it shall run has run.
/// One that has ended with another code is left as well, and has not done what it was to do.
fn has_finished(replica: &Replica) -> bool {
    replica.intent() == ReplicaIntent::Run
        && replica.host_presence() == HostPresence::Present
        && replica.status.as_ref().is_some_and(|s| {
            s.reason == "FINISHED" && s.last_exit.as_ref().is_some_and(|exit| exit.code == 0)
        })
}

/// Those that nobody waits for, where no new release was made.
#[derive(Debug, Default, PartialEq, Eq)]
struct Spared {
    /// Slots on hosts that are away, and those that have finished.
    all: usize,
    /// Of these, those that have finished.
    finished: usize,
}

/// Counted by slot, not by replica, and without those that are ready elsewhere: a lost host's replica
/// stays on the list beside the one that stands in for it, and two excuses for one slot would let another
/// one's absence pass.
fn spared(replicas: &[Replica], release: u64, every_host: bool) -> Spared {
    // Of what runs on every host, the host is the slot.
    let slot = |r: &Replica| (if every_host { r.host_uid.clone() } else { String::new() }, r.slot);
    // As the server counts them.
    let is_ready = |r: &&Replica| {
        r.intent() == ReplicaIntent::Run
            && r.host_presence() == HostPresence::Present
            && r.release == release
            && r.status.as_ref().is_some_and(|s| s.ready)
    };
    let ready: BTreeSet<_> = replicas.iter().filter(is_ready).map(slot).collect();
    let unready = |counts: &dyn Fn(&Replica) -> bool| -> BTreeSet<_> {
        let slots = replicas.iter().filter(|r| counts(r)).map(slot);
        slots.filter(|slot| !ready.contains(slot)).collect()
    };
    // What has finished of an older release is yet to be replaced.
    let finished = unready(&|r| r.release == release && has_finished(r));
    let away = unready(&is_away);
    Spared { all: away.union(&finished).count(), finished: finished.len() }
}

pub fn on_return(count: u32, away: &BTreeSet<&str>) -> String {
    let verb = if count == 1 { "host is away and gets" } else { "hosts are away and get" };
    let mut words = format!("{count} {verb} it on return");
    if !away.is_empty() {
        let mut names: Vec<&str> = away.iter().take(NAMED).copied().collect();
        if away.len() > NAMED {
            names.push("...");
        }
        words.push_str(&format!(" ({})", names.join(", ")));
    }
    for_terminal(&words)
}

/// What the reasons say that are no trouble: how far a replica is on its way.
fn on_its_way(reason: &str) -> Option<&'static str> {
    match reason {
        "ASSIGNED" => Some("told to its host"),
        "ACCEPTED" => Some("about to be started"),
        "FETCHING" => Some("fetching"),
        "STARTING" => Some("starting"),
        "NOT_READY" => Some("running, not ready yet"),
        _ => None,
    }
}

/// How a replica is: in full, without what moves all the time, and as a colour.
fn progress(replica: &Replica) -> (String, String, Ink) {
    let status = replica.status.clone().unwrap_or_default();
    let same = |text: String, ink| (text.clone(), text, ink);
    // A transfer that waits says why instead of how far it is.
    let moves = status.reason.is_empty() || status.reason == "FETCHING";
    if !matches!(replica.host_presence(), HostPresence::Present) {
        let presence = word(replica.host_presence().as_str_name(), "HOST_PRESENCE_");
        same(format!("host {presence}"), Ink::Note)
    } else if replica.intent() == ReplicaIntent::Stop {
        same("stopping".to_owned(), Ink::Note)
    } else if status.ready {
        same("ready".to_owned(), Ink::Good)
    } else if let Some(p) = status.progress.as_ref().filter(|p| p.total_bytes > 0 && moves) {
        // A line each ten per cent is enough for a file.
        let tenth = p.done_bytes.saturating_mul(10) / p.total_bytes;
        let what = if p.what.is_empty() { String::new() } else { format!(" {}", p.what) };
        let coarse = format!("fetching{what} {tenth}0 %");
        (format!("fetching{what} {}", transfer(p)), coarse, Ink::Busy)
    } else if let Some(words) = on_its_way(&status.reason) {
        let why = if status.reason == "NOT_READY" { waits(&status) } else { String::new() };
        let text = if why.is_empty() { words.to_owned() } else { format!("{words}: {why}") };
        (text, words.to_owned(), Ink::Busy)
    } else if !status.reason.is_empty() {
        let reason = status.reason.to_ascii_lowercase().replace('_', " ");
        (format!("{reason}: {}", waits(&status)), reason, Ink::Bad)
    } else if status.phase() == ReplicaPhase::Running {
        same("running, not ready yet".to_owned(), Ink::Busy)
    } else {
        same(word(status.phase().as_str_name(), "REPLICA_PHASE_"), Ink::Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_is_judged_by_its_own_release() {
        let status = |rollout: RolloutState, release, deferred_hosts| DeploymentStatus {
            rollout: rollout as i32,
            release,
            deferred_hosts,
            ..DeploymentStatus::default()
        };
        use RolloutState as S;
        let judge = |status: &DeploymentStatus, release| judge(status, release, None);
        assert_eq!(judge(&status(S::Rolling, 2, 0), 2), Verdict::Wait);
        assert_eq!(judge(&status(S::Complete, 2, 3), 2), Verdict::Done { deferred: 3 });
        for failed in [S::Failed, S::RolledBack, S::Paused, S::Deleting] {
            assert!(matches!(judge(&status(failed, 1, 0), 2), Verdict::Failed(_)), "{failed:?}");
        }
        assert!(matches!(judge(&status(S::Complete, 1, 0), 2), Verdict::Failed(_)));
        // Whoever waits for the release that was gone back to has it.
        assert_eq!(judge(&status(S::RolledBack, 1, 0), 1), Verdict::Done { deferred: 0 });
        // Going back is waited for as long as it goes on.
        let back = status(S::Rolling, 1, 0);
        assert_eq!(judge(&back, 2), Verdict::Wait);
        let stuck = DeploymentStatus { pending_count: 1, reason: "why".into(), ..back };
        assert_eq!(judge(&stuck, 2), Verdict::Failed("why".to_owned()));
        assert_eq!(judge(&stuck, 1), Verdict::Wait);
        // Somebody else's newer release is not the one that was waited for.
        assert!(matches!(judge(&status(S::Complete, 3, 0), 2), Verdict::Failed(_)));
    }

    #[test]
    fn what_runs_nowhere_is_not_told_as_complete_alone() {
        let pending = Pending {
            reason: NO_HOST_FITS.to_owned(),
            message: "no host fits: 1 cordoned".to_owned(),
            count: 1,
        };
        let nobody = DeploymentStatus { pending: vec![pending], ..DeploymentStatus::default() };
        let words = complete(&nobody, 0);
        assert!(words.contains("no host is eligible: no host fits: 1 cordoned"), "{words}");
        let some = DeploymentStatus { wanted: 2, updated_ready: 2, ..nobody };
        assert_eq!(complete(&some, 0), "complete, 2/2 ready");
        assert_eq!(complete(&DeploymentStatus::default(), 0), "complete, 0/0 ready");
        let ended = DeploymentStatus { updated_ready: 1, ..some.clone() };
        assert_eq!(complete(&ended, 1), "complete, 1/2 ready, 1 ended");
        // A number that was made smaller, while those beyond it are still ready.
        let fewer = DeploymentStatus { updated_ready: 3, wanted: 1, ..some };
        assert_eq!(complete(&fewer, 0), "complete, 1/1 ready");
    }

    #[test]
    fn whoever_gets_a_turn_after_the_end_has_some_seconds_for_the_first_message() {
        let end = Instant::now() + Duration::from_secs(60);
        for begun in [end - Duration::from_secs(1), end, end + Duration::from_secs(30)] {
            assert_eq!(until(end, begun, false), begun + FIRST);
            // Then it is judged as it is; another one is not waited for.
            assert_eq!(until(end, begun, true), end);
        }
        // The end comes no sooner for whoever began in time.
        assert_eq!(until(end, end - Duration::from_secs(60), false), end);
    }

    #[test]
    fn whose_time_is_over_is_told_that_it_is_not_there_and_goes_on() {
        let status = |rollout: RolloutState, deferred_hosts| DeploymentStatus {
            rollout: rollout as i32,
            release: 1,
            wanted: 3,
            updated_ready: 1,
            deferred_hosts,
            ..DeploymentStatus::default()
        };
        let rolling = late(&status(RolloutState::Rolling, 0), 1, None);
        assert_eq!((rolling.kind, rolling.kind.code()), (Kind::RolloutFailed, 5));
        assert!(rolling.message.contains("1/3 ready); the rollout goes on"), "{}", rolling.message);
        // All but hosts that are away have it.
        assert_eq!(late(&status(RolloutState::Complete, 2), 1, None).kind, Kind::Deferred);
    }

    #[test]
    fn a_number_is_not_there_before_its_replicas_are_ready_where_no_release_was_made() {
        let status = |updated_ready, deferred_hosts| DeploymentStatus {
            rollout: RolloutState::Complete as i32,
            release: 1,
            wanted: 50,
            updated_ready,
            deferred_hosts,
            ..DeploymentStatus::default()
        };
        assert_eq!(judge(&status(2, 0), 1, Some(0)), Verdict::Wait);
        assert_eq!(judge(&status(50, 0), 1, Some(0)), Verdict::Done { deferred: 0 });
        // As with a new release: what is on hosts that are away is not waited for, and the rest is.
        assert_eq!(judge(&status(2, 1), 1, Some(5)), Verdict::Wait);
        assert_eq!(judge(&status(45, 1), 1, Some(5)), Verdict::Done { deferred: 1 });
        // Nothing fits: the rollout was complete long ago, and nothing is there.
        assert_eq!(judge(&status(0, 0), 1, Some(0)), Verdict::Wait);
        let error = late(&status(0, 0), 1, Some(0));
        assert_eq!(error.kind, Kind::RolloutFailed);
        assert_eq!(error.message, "not there in time (0/50 ready); it is still tried");
        // What is wanted of a number that was made smaller is there before those beyond it are gone.
        assert_eq!(judge(&status(51, 0), 1, Some(0)), Verdict::Done { deferred: 0 });
        // A release that was made has been judged by its rollout.
        assert_eq!(judge(&status(2, 0), 1, None), Verdict::Done { deferred: 0 });
    }

    /// One of release 1 that shall run.
    fn replica(host: &str, slot: u32, host_presence: HostPresence, ready: bool) -> Replica {
        Replica {
            host: host.to_owned(),
            host_uid: host.to_owned(),
            slot,
            release: 1,
            intent: ReplicaIntent::Run as i32,
            host_presence: host_presence as i32,
            status: Some(ReplicaStatus { ready, ..ReplicaStatus::default() }),
            ..Replica::default()
        }
    }

    /// One whose program has ended for good.
    fn ended(slot: u32, code: i32) -> Replica {
        let status = ReplicaStatus {
            reason: "FINISHED".to_owned(),
            last_exit: Some(Exit { code, ..Exit::default() }),
            ..ReplicaStatus::default()
        };
        Replica { status: Some(status), ..replica("c", slot, HostPresence::Present, false) }
    }

    /// What becomes of somebody who waits for so many of release 1, of which these are there.
    fn waiting(wanted: u32, all: &[Replica]) -> (Verdict, Kind) {
        let ready = all.iter().filter(|r| r.status.as_ref().is_some_and(|s| s.ready)).count();
        let status = DeploymentStatus {
            rollout: RolloutState::Complete as i32,
            release: 1,
            wanted,
            updated_ready: u32::try_from(ready).unwrap(),
            ..DeploymentStatus::default()
        };
        let excused = u32::try_from(spared(all, 1, false).all).ok();
        (judge(&status, 1, excused), late(&status, 1, excused).kind)
    }

    #[test]
    fn what_is_spared_is_what_shall_run_on_hosts_that_are_away() {
        let stopping = |r: Replica| Replica { intent: ReplicaIntent::Stop as i32, ..r };
        let all = [
            replica("a", 0, HostPresence::Away, false),
            // The same slot's older one, and one that is being stopped.
            Replica { release: 0, ..replica("a", 0, HostPresence::Away, false) },
            stopping(replica("a", 1, HostPresence::Away, false)),
            replica("b", 2, HostPresence::Lost, true),
            replica("c", 3, HostPresence::Present, false),
        ];
        assert_eq!(spared(&all, 1, false), Spared { all: 2, finished: 0 });
    }

    #[test]
    fn whoever_stands_in_for_a_slot_leaves_no_excuse_for_another() {
        let lost = replica("a", 0, HostPresence::Lost, false);
        let stand_in = replica("b", 0, HostPresence::Present, true);
        let missing = replica("c", 1, HostPresence::Present, false);
        let all = [lost.clone(), stand_in.clone(), missing];
        assert_eq!(spared(&all, 1, false), Spared::default());
        assert_eq!(waiting(2, &all), (Verdict::Wait, Kind::RolloutFailed));
        // One that is not ready, or of another release, stands in for nobody.
        let starting = replica("b", 0, HostPresence::Present, false);
        let older = Replica { release: 0, ..stand_in.clone() };
        for other in [starting, older] {
            assert_eq!(spared(&[lost.clone(), other], 1, false).all, 1);
        }
        // The same slot away and finished is one.
        assert_eq!(spared(&[lost.clone(), ended(0, 0)], 1, false).all, 1);
        // Of what runs on every host each host is a slot, all of the same number.
        let everywhere = [lost, replica("d", 0, HostPresence::Away, false), stand_in];
        assert_eq!(spared(&everywhere, 1, true).all, 2);
    }

    #[test]
    fn what_has_ended_well_for_good_is_not_waited_for() {
        let with = |reason: &str| {
            let mut replica = ended(1, 0);
            reason.clone_into(&mut replica.status.as_mut().unwrap().reason);
            replica
        };
        let stopping = Replica { intent: ReplicaIntent::Stop as i32, ..ended(2, 0) };
        let older = Replica { release: 0, ..ended(3, 0) };
        let all = [ended(0, 0), with("BACKOFF"), stopping, older];
        assert_eq!(spared(&all, 1, false), Spared { all: 1, finished: 1 });
        assert_eq!(waiting(1, &[ended(0, 0)]).0, Verdict::Done { deferred: 0 });
        // Left as well, but it has not done what it was to do.
        for code in [1, 137, -1] {
            let (verdict, late) = waiting(1, &[ended(0, code)]);
            assert_eq!((verdict, late.code()), (Verdict::Wait, 5), "{code}");
        }
        let mut unknown = ended(0, 0);
        unknown.status.as_mut().unwrap().last_exit = None;
        assert_eq!(spared(&[unknown], 1, false), Spared::default());
    }

    #[tokio::test]
    async fn a_connection_is_shared_until_it_breaks_and_then_made_anew_once() {
        let made = RefCell::new(0);
        let make = || async {
            *made.borrow_mut() += 1;
            Ok(*made.borrow())
        };
        let shared = Shared::new(0);
        assert_eq!(shared.get(make()).await.unwrap(), (0, 0));
        // Two find it broken, one makes the next.
        for _ in 0..2 {
            shared.leave(0).await;
            assert_eq!(shared.get(make()).await.unwrap(), (1, 1));
        }
        shared.leave(1).await;
        let away = async { Err(Error::new(Kind::Unavailable, "away")) };
        assert!(shared.get(away).await.is_err());
        assert_eq!(shared.get(make()).await.unwrap(), (2, 2));
    }

    #[test]
    fn a_replicas_state_is_told_with_its_progress() {
        let mut replica = Replica {
            host_presence: HostPresence::Present as i32,
            intent: ReplicaIntent::Run as i32,
            ..Replica::default()
        };
        let with = |replica: &Replica, status: ReplicaStatus| {
            progress(&Replica { status: Some(status), ..replica.clone() })
        };
        let fetching = ReplicaStatus {
            progress: Some(Progress {
                done_bytes: 43,
                total_bytes: 100,
                what: "artifact".into(),
                ..Progress::default()
            }),
            ..ReplicaStatus::default()
        };
        let (text, coarse, _) = with(&replica, fetching.clone());
        assert_eq!(
            (text.as_str(), coarse.as_str()),
            ("fetching artifact 43 %", "fetching artifact 40 %")
        );
        // The server gives every phase a reason; only trouble is told instead of the progress.
        let moved = |reason: &str| {
            let (reason, message) = (reason.to_owned(), "no registry answers".to_owned());
            with(&replica, ReplicaStatus { reason, message, ..fetching.clone() }).0
        };
        assert_eq!(moved("FETCHING"), "fetching artifact 43 %");
        assert_eq!(moved("FETCH_WAITS"), "fetch waits: no registry answers");
        let failing = ReplicaStatus {
            reason: "NOT_READY".into(),
            message: "its health check fails: 503".into(),
            ..ReplicaStatus::default()
        };
        let (text, coarse, _) = with(&replica, failing);
        assert_eq!(text, "running, not ready yet: its health check fails: 503");
        assert_eq!(coarse, "running, not ready yet");
        let starting =
            ReplicaStatus { phase: ReplicaPhase::Starting as i32, ..ReplicaStatus::default() };
        assert_eq!(with(&replica, starting).0, "starting");
        let ready = ReplicaStatus { ready: true, ..ReplicaStatus::default() };
        assert_eq!(with(&replica, ready.clone()).0, "ready");
        replica.host_presence = HostPresence::Away as i32;
        assert_eq!(with(&replica, ready).0, "host away");
    }
}
