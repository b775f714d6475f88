//! Clocks of processes, which run at rates of their own and whose walls jump.

use berth_proto::ids::{Mono, Now, Wall};

/// Where the walls of a run begin, in milliseconds since 1970: some day in 2027.
const WALL_MS: i64 = 1_800_000_000_000;

/// One process's clock. Times without a type are the run's own milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// Since when it runs at this rate, and what it showed then.
    since: u64,
    shown: u64,
    per_mille: u64,
    /// How far its machine's wall is ahead.
    pub(super) wall_ahead: i64,
}

impl Clock {
    /// The clock of a process that starts at `boot` on a machine whose clock gains or loses.
    pub(super) fn new(boot: u64, per_mille: u64, wall_ahead: i64) -> Self {
        Self { since: boot, shown: 0, per_mille, wall_ahead }
    }

    /// The same, from now on at another rate.
    pub(super) fn at_rate(&self, now: u64, per_mille: u64) -> Self {
        Self { since: now, shown: self.now(now).mono.0 - 1, per_mille, ..*self }
    }

    pub(super) fn now(&self, at: u64) -> Now {
        // Never 0, as in the programs.
        let mono = self.shown + at.saturating_sub(self.since) * self.per_mille / 1000 + 1;
        Now { mono: Mono(mono), wall: self.wall(at) }
    }

    pub(super) fn wall(&self, at: u64) -> Wall {
        Wall(WALL_MS + i64::try_from(at).unwrap_or(i64::MAX / 2) + self.wall_ahead)
    }

    /// When this clock shows `mono`; far away for what never comes.
    pub(super) fn when(&self, mono: Mono) -> u64 {
        let passed = mono.0.saturating_sub(1 + self.shown).min(1 << 50);
        self.since + (passed * 1000).div_ceil(self.per_mille)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_is_due_when_the_clock_shows_it_at_any_rate() {
        for per_mille in [900, 1000, 1003, 1100] {
            let clock = Clock::new(77, per_mille, 0);
            for mono in [1, 2, 999, 1000, 123_456] {
                let at = clock.when(Mono(mono));
                assert!(clock.now(at).mono.0 >= mono);
                assert!(at == 77 || clock.now(at - 1).mono.0 < mono);
            }
            let (at, slower) = (100_000, clock.at_rate(100_000, 950));
            assert_eq!(slower.now(at).mono, clock.now(at).mono);
            assert_eq!(slower.when(Mono(slower.now(at).mono.0 + 950)), at + 1_000);
        }
    }
}
