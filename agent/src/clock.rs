//! The time for certificates, on machines whose clocks forget it.
//!
//! A clock without a battery begins in 1970, before every certificate. So the time is at least when
//! this program was built, and at least what was written down last. What is written down follows the
//! system's clock, backwards too (it may have been ahead, and all certificates would be past their end
//! for ever), but not below the build's time, where it is surely wrong.

use crate::state::wall_now;
use berth_proto::ids::Wall;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// When this program was built.
pub const BUILT: Wall = Wall(seconds(env!("BERTH_BUILT_UNIX_S")) * 1000);

const fn seconds(text: &str) -> i64 {
    match i64::from_str_radix(text, 10) {
        Ok(seconds) => seconds,
        Err(_) => 0,
    }
}

/// The greatest of the system's clock, what was written down last, and [`BUILT`].
#[derive(Debug)]
pub struct Clock {
    written_unix_ms: AtomicI64,
}

impl Clock {
    /// A clock that goes on from what was written down; 0: nothing was.
    #[must_use]
    pub fn new(written_unix_ms: i64) -> Self {
        Self { written_unix_ms: AtomicI64::new(written_unix_ms) }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Wall {
        self.at(wall_now())
    }

    /// What is to be written down now.
    #[must_use]
    pub fn to_write(&self) -> Wall {
        self.writing(wall_now())
    }

    fn at(&self, system: Wall) -> Wall {
        system.max(BUILT).max(Wall(self.written_unix_ms.load(Ordering::Relaxed)))
    }

    fn writing(&self, system: Wall) -> Wall {
        if system < BUILT {
            return Wall(self.written_unix_ms.load(Ordering::Relaxed));
        }
        self.written_unix_ms.store(system.0, Ordering::Relaxed);
        system
    }
}

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let since = Duration::from_millis(u64::try_from(self.now().0).ok()?);
        Some(rustls::pki_types::UnixTime::since_unix_epoch(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_forgot_the_time_takes_the_newest_it_can_be_sure_of() {
        assert!(Wall(1_700_000_000_000) < BUILT && BUILT <= wall_now(), "{BUILT:?}");
        let later = Wall(BUILT.0 + 5);
        assert_eq!(Clock::new(0).at(Wall(7)), BUILT);
        assert_eq!(Clock::new(later.0).at(Wall(7)), later);
        assert_eq!(Clock::new(0).at(later), later);
    }

    #[test]
    fn what_is_written_down_is_not_lost_to_a_reset_clock_and_heals_one_that_was_ahead() {
        let ahead = BUILT.0 + 1_000_000;
        let clock = Clock::new(ahead);
        assert_eq!(clock.writing(Wall(0)), Wall(ahead));
        let right = Wall(BUILT.0 + 10);
        assert_eq!(clock.writing(right), right);
        assert_eq!(clock.at(Wall(0)), right);
    }
}
