//! Whether a rollout is complete, goes on, or has failed.
//!
//! The progress deadline runs only while every host that matters has been heard of and one of them is
//! in reach; whenever it stands still, the time that passes is not counted. What is left of it is
//! written down now and then, so that a server that restarts often does not grant it anew each time. A
//! replacement that a host in reach has given back fails a rollout whoever is silent.

use super::roll::{SlotWork, Tally};
use super::{Health, Planning};
use crate::change::Change;
use crate::live::RolloutClock;
use crate::objects::{Release, Replica};
use berth_proto::api::{EventSeverity, ReleaseState, RolloutState};
use berth_proto::values::OnRolloutFailure;
use std::sync::Arc;

/// The time left is written down each time this part of the deadline has gone by: a restart of the
/// server gives back an eighth at the most, for eight small writes a rollout.
const WRITTEN_PARTS: u64 = 8;
/// A host has brought back what its replacement was to take the place of.
const GIVEN_BACK: &str = "a replacement did not become ready in time on its host";

impl<'a> Planning<'a> {
    /// Completion, progress and failure.
    pub(super) fn judge(&mut self, release: &Arc<Release>, work: &[SlotWork<'_>], tally: &Tally) {
        match self.deployment.rollout() {
            RolloutState::Complete | RolloutState::Paused | RolloutState::RolledBack => {
                self.plan.clock = None;
                return;
            }
            RolloutState::Unspecified
            | RolloutState::Rolling
            | RolloutState::Failed
            | RolloutState::Deleting => {}
        }
        // Until every host has spoken, and with no host in reach, nothing is done and nothing fails.
        let in_reach = work.iter().any(|item| {
            item.all().any(|(_, h)| *h != Health::Deferred)
                || (item.new.is_empty() && item.old.is_empty() && !item.is_undecided_away())
        });
        let nobody = tally.wanted == 0 && !self.plan.report.deferred.is_empty();
        let undecided = work.iter().any(SlotWork::is_undecided);
        let unheard = tally.unknown > 0 || self.plan.report.unheard || undecided;
        let unheard = unheard && !bug!(DeadlineRunsUnheard);
        // A replacement that a host in reach has given back says all there is to say, whoever is silent: it
        // would else be tried again for as long as they are, each time in the place of one that serves.
        let own = |r: &Replica| r.release == release.number || bug!(OldFailureCounted);
        let mut failed = work.iter().flat_map(|item| &item.old).filter(|(r, _)| r.failed && own(r));
        if failed.clone().any(|(_, health)| *health != Health::Deferred) {
            self.fail(release, GIVEN_BACK);
            return;
        }
        if unheard || (tally.wanted > 0 && !in_reach) || nobody {
            self.stand_still(release, tally.new_healthy);
            return;
        }
        let done = work.iter().all(|item| {
            let reachable =
                |list: &[(&Arc<Replica>, Health)]| list.iter().any(|(_, h)| *h != Health::Deferred);
            let healthy = item.new.iter().any(|(_, h)| *h == Health::Healthy);
            let away = !item.new.is_empty() || !item.old.is_empty();
            let away = away && !reachable(&item.new) && !reachable(&item.old);
            let away = away || item.is_undecided_away();
            let old = item.old.iter().any(|(_, h)| *h == Health::Healthy);
            (healthy && !reachable(&item.old))
                || away
                || (old && bug!(OldHealthCounted))
                || (healthy && bug!(CompleteInPart))
        });
        let something =
            tally.new_healthy > 0 || (tally.wanted == 0 && self.plan.report.pending.is_empty());
        let something = something || (bug!(OldHealthCounted) && done);
        if done && something {
            self.complete(release);
            return;
        }
        let deadline = self.deployment.spec.rollout.progress_deadline_ms;
        let clock = self.run_clock(release, tally.new_healthy, deadline);
        // On a host that is away.
        let failed_for_good = failed.next().is_some();
        if clock.left_ms == 0 || failed_for_good {
            let why = if failed_for_good {
                GIVEN_BACK.to_owned()
            } else {
                let within = berth_proto::quantity::format_duration_ms(deadline);
                let none = if tally.new_healthy == 0 { "no replica" } else { "no further replica" };
                let cause = self.cause(work).map(|why| format!(" ({why})")).unwrap_or_default();
                format!("{none} became healthy within {within}{cause}")
            };
            self.fail(release, &why);
            return;
        }
        let part = (deadline / WRITTEN_PARTS).max(1);
        // Whichever comes first: the end, or the next time it is to be written down, which a plan in
        // between does not put off.
        let gone = self.written(deadline).saturating_sub(clock.left_ms) % part;
        self.wake(self.now.mono.plus_ms(clock.left_ms.min(part - gone)));
        self.write_down(&clock, deadline, part);
        self.plan.clock = Some(clock);
    }

    /// The clock as it is now, running.
    fn run_clock(&mut self, release: &Release, healthy: u32, deadline: u64) -> RolloutClock {
        let now = self.now.mono;
        let running = Some(now);
        match self.plan.clock.take().filter(|clock| clock.release == release.number) {
            Some(clock) if healthy > clock.best => {
                RolloutClock { best: healthy, left_ms: deadline, running, ..clock }
            }
            Some(clock) => {
                let gone = clock.running.map_or(0, |since| now.since_ms(since));
                let gone = if bug!(DeadlineStandsStill) { 0 } else { gone };
                RolloutClock { left_ms: clock.left_ms.saturating_sub(gone), running, ..clock }
            }
            None => {
                let left_ms = self.written(deadline);
                RolloutClock { release: release.number, best: healthy, left_ms, running }
            }
        }
    }

    /// Counts what has gone by and stops counting.
    fn stand_still(&mut self, release: &Release, healthy: u32) {
        let deadline = self.deployment.spec.rollout.progress_deadline_ms;
        let known = self.plan.clock.take().filter(|clock| clock.release == release.number);
        let Some(clock) = known else { return };
        let counted = if clock.running.is_some() {
            self.plan.clock = Some(clock);
            self.run_clock(release, healthy, deadline)
        } else {
            clock
        };
        // Never so far that the first look at a host that is back fails the rollout.
        let left_ms = counted.left_ms.max(1);
        self.plan.clock = Some(RolloutClock { left_ms, running: None, ..counted });
    }

    /// Time left as it was last written down.
    fn written(&self, deadline: u64) -> u64 {
        match self.deployment.record.progress_left_ms {
            0 => deadline,
            left => left.min(deadline),
        }
    }

    fn write_down(&mut self, clock: &RolloutClock, deadline: u64, part: u64) {
        let written = self.written(deadline);
        let progress = clock.left_ms > written;
        if progress || written.saturating_sub(clock.left_ms) >= part {
            let left = if clock.left_ms >= deadline { 0 } else { clock.left_ms };
            self.put(|record| record.progress_left_ms = left);
        }
    }

    fn put(&mut self, edit: impl FnOnce(&mut berth_proto::record::DeploymentRecord)) {
        let edited = self.deployment.edited(edit);
        self.plan.verdict.push(Change::PutDeployment(Arc::new(edited)));
    }

    fn complete(&mut self, release: &Arc<Release>) {
        self.plan.clock = None;
        let (number, now) = (release.number.0, self.now.wall.0);
        // A rollback that is complete keeps saying what happened: there is a newer release, which failed. One
        // that people gave up before it could is no news.
        let newest = self.view.releases_of(&self.deployment.uid).last();
        let rolled_back = newest
            .is_some_and(|r| r.number > release.number && r.state() != ReleaseState::Superseded);
        self.put(|record| {
            record.rollout = if rolled_back {
                RolloutState::RolledBack as i32
            } else {
                RolloutState::Complete as i32
            };
            record.stable_release = number;
            record.rollout_unix_ms = now;
            record.progress_left_ms = 0;
            if !rolled_back {
                record.reason.clear();
            }
        });
        let complete = Arc::new(release.in_state(ReleaseState::Complete));
        self.plan.verdict.push(Change::PutRelease(complete));
        let words = format!("release {number} is complete");
        self.event(EventSeverity::Info, "ROLLOUT_COMPLETE", words);
    }

    fn fail(&mut self, release: &Arc<Release>, why: &str) {
        self.plan.clock = None;
        let number = release.number;
        let now = self.now.wall;
        let stable = self.deployment.stable();
        let rollback = self.deployment.spec.rollout.on_failure == OnRolloutFailure::Rollback
            || bug!(PauseGoesBack);
        let back_to = (rollback && !bug!(RollbackForgotten) && stable.0 != 0 && stable != number)
            .then(|| self.view.release(&self.deployment.uid, stable).cloned())
            .flatten();
        let failed = Arc::new(release.in_state(ReleaseState::Failed));
        self.plan.verdict.push(Change::PutRelease(failed));
        // Back to the stable release itself, not to a copy under a new number: its replicas that
        // still run are then what is wanted, and nothing good is restarted.
        let (release, state, reason) = match back_to {
            Some(stable) => (
                stable.number,
                RolloutState::Rolling,
                format!("release {number} failed: {why}; rolled back to release {}", stable.number),
            ),
            None => (number, RolloutState::Paused, format!("release {number} failed: {why}")),
        };
        self.put(|record| {
            record.release = release.0;
            if let Some(meta) = &mut record.meta {
                meta.update_unix_ms = now.0;
            }
            record.rollout = state as i32;
            record.reason.clone_from(&reason);
            record.rollout_unix_ms = now.0;
            record.progress_left_ms = 0;
        });
        self.event(EventSeverity::Error, "ROLLOUT_FAILED", reason);
    }
}
