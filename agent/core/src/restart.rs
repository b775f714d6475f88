//! When a program that has ended is started again.
//!
//! The policy is carried out on the host itself; the engine's own is always `no`.

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
        RestartCondition::OnFailure => code != 0,
        RestartCondition::Never => false,
    };
    if !again {
        return Next::Finished;
    }
    // Doubled each time: min, 2 min, 4 min...; 2^40 times a millisecond is beyond any bound.
    let doublings = failures.saturating_sub(1).min(40);
    let wait_ms =
        policy.min_backoff_ms.saturating_mul(1_u64 << doublings).min(policy.max_backoff_ms);
    Next::After { wait_ms }
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
