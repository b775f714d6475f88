//! When a program that has ended is started again.
//!
//! The policy is carried out on the host itself; the engine's own is always `no`.

use berth_proto::ids::Mono;
use berth_proto::values::{Restart, RestartCondition};

/// What to do after an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Start again after so long.
    After {
        /// Milliseconds from the end.
        wait_ms: u64,
    },
    /// Leave it.
    Finished,
}

/// What to do after an end with `code`, the `failures`-th in a row (1 for the first).
#[must_use]
pub fn next(policy: &Restart, code: i32, failures: u32) -> Next {
    let again = match policy.condition {
        RestartCondition::Always => true,
        RestartCondition::OnFailure => code != 0 || bug!(FinishedStartedAgain),
        RestartCondition::Never => false,
    };
    if !again {
        return Next::Finished;
    }
    Next::After { wait_ms: wait_ms(policy, failures) }
}

/// How long to wait after the `failures`-th failure in a row.
#[must_use]
pub fn wait_ms(policy: &Restart, failures: u32) -> u64 {
    let longer = if bug!(BackoffUnbounded) { 60 } else { 1 };
    doubled(policy.min_backoff_ms, policy.max_backoff_ms.saturating_mul(longer), failures)
}

/// `min`, 2 `min`, 4 `min`... for the 1st, 2nd, 3rd... time, at most `max`.
fn doubled(min_ms: u64, max_ms: u64, times: u32) -> u64 {
    // 2^40 times a millisecond is beyond any bound.
    min_ms.saturating_mul(1_u64 << times.saturating_sub(1).min(40)).min(max_ms)
}

/// When something that failed is tried again: for ever, with a wait that doubles up to a bound.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
    not_before: Option<Mono>,
}

impl Backoff {
    /// It failed; answers with how long is waited.
    pub fn failed(&mut self, min_ms: u64, max_ms: u64, now: Mono) -> u64 {
        self.failures = self.failures.saturating_add(1);
        let wait_ms = doubled(min_ms, max_ms, self.failures);
        self.not_before = Some(now.plus_ms(wait_ms));
        wait_ms
    }

    /// It succeeded.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// When it may be tried; `None`: now.
    #[must_use]
    pub fn waits(&self, now: Mono) -> Option<Mono> {
        self.not_before.filter(|at| now < *at)
    }
}

/// Failures in a row, counted with an end after having been ready for so long: being ready for the
/// longest wait shows that the trouble is over.
#[must_use]
pub fn count(policy: &Restart, failures: u32, ready_for_ms: u64) -> u32 {
    if ready_for_ms >= policy.max_backoff_ms { 1 } else { failures.saturating_add(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(condition: RestartCondition) -> Restart {
        Restart { condition, min_backoff_ms: 1_000, max_backoff_ms: 300_000 }
    }

    #[test]
    fn the_wait_doubles_up_to_its_bound() {
        let always = policy(RestartCondition::Always);
        let wait = |n| next(&always, 0, n);
        assert_eq!(wait(1), Next::After { wait_ms: 1_000 });
        assert_eq!(wait(3), Next::After { wait_ms: 4_000 });
        assert_eq!(wait(100), Next::After { wait_ms: 300_000 });
    }

    #[test]
    fn what_fails_for_ever_is_tried_for_ever_at_the_longest_wait() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.waits(Mono(0)), None);
        let waits: Vec<u64> = (0..70).map(|_| backoff.failed(250, 10_000, Mono(0))).collect();
        assert_eq!(waits[..4], [250, 500, 1_000, 2_000]);
        assert!(waits[6..].iter().all(|w| *w == 10_000));
        assert_eq!(backoff.waits(Mono(9_999)), Some(Mono(10_000)));
        assert_eq!(backoff.waits(Mono(10_000)), None);
        backoff.succeeded();
        assert_eq!(backoff.failed(250, 10_000, Mono(0)), 250);
    }

    #[test]
    fn each_condition_says_after_which_ends() {
        assert_eq!(next(&policy(RestartCondition::OnFailure), 0, 1), Next::Finished);
        assert!(matches!(next(&policy(RestartCondition::OnFailure), 1, 1), Next::After { .. }));
        assert_eq!(next(&policy(RestartCondition::Never), 1, 1), Next::Finished);
    }

    #[test]
    fn having_been_ready_for_long_begins_anew() {
        let always = policy(RestartCondition::Always);
        assert_eq!(count(&always, 7, 299_999), 8);
        assert_eq!(count(&always, 7, 300_000), 1);
    }
}
