//! Whether a running program can serve, from the results of its health check.

use berth_proto::ids::Mono;
use berth_proto::values::HealthCheck;

/// The state of one attempt's health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probing {
    started: Mono,
    ready: bool,
    failures: u32,
    next: Mono,
    unready_since: Mono,
    /// What the last failed check said.
    pub last_failure: String,
}

impl Probing {
    /// The program has started.
    #[must_use]
    pub fn new(started: Mono) -> Self {
        Self {
            started,
            ready: false,
            failures: 0,
            next: started,
            unready_since: started,
            last_failure: String::new(),
        }
    }

    /// The program was found running: how long it has been unready is not known.
    #[must_use]
    pub fn adopted(started: Mono, now: Mono) -> Self {
        Self { next: now, unready_since: now, ..Self::new(started) }
    }

    /// Nobody could ask: that says nothing of the program.
    pub fn not_asked(&mut self, check: &HealthCheck, now: Mono) {
        self.next = now.plus_ms(check.interval_ms);
    }

    /// When the next check is due.
    #[must_use]
    pub fn due(&self) -> Mono {
        self.next
    }

    /// Whether it can serve.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// A check has ended. While the program starts up a check comes every 250 ms at the most
    /// seldom, so that readiness is seen soon; then at the interval.
    pub fn result(&mut self, check: &HealthCheck, outcome: Result<(), String>, now: Mono) {
        match outcome {
            Ok(()) => {
                self.ready = true;
                self.failures = 0;
                self.next = now.plus_ms(check.interval_ms);
            }
            Err(why) => {
                self.last_failure = why;
                let starting = !self.ready && now.since_ms(self.started) < check.startup_ms;
                if starting {
                    self.next = now.plus_ms(check.interval_ms.min(250));
                    return;
                }
                self.failures = self.failures.saturating_add(1);
                if self.ready && self.failures >= check.failures && !bug!(NeverUnready) {
                    self.ready = false;
                    self.unready_since = now;
                }
                self.next = now.plus_ms(check.interval_ms);
            }
        }
    }

    /// It has been unready for so long that its policy restarts it.
    #[must_use]
    pub fn must_restart(&self, check: &HealthCheck, now: Mono) -> bool {
        let Some(after) = check.restart_after_ms else { return false };
        let since = self.unready_since.max(self.started.plus_ms(check.startup_ms));
        !self.ready && now.since_ms(since) >= after && now >= since
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::values::Probe;

    fn check() -> HealthCheck {
        HealthCheck {
            probe: Probe::Tcp { port: "http".into() },
            interval_ms: 5_000,
            timeout_ms: 1_000,
            failures: 3,
            startup_ms: 60_000,
            restart_after_ms: Some(10_000),
        }
    }

    #[test]
    fn one_success_makes_ready_and_failures_in_a_row_make_unready() {
        let (c, mut p) = (check(), Probing::new(Mono(0)));
        p.result(&c, Err("no".into()), Mono(10));
        assert!(!p.is_ready());
        assert_eq!(p.due(), Mono(260));
        p.result(&c, Ok(()), Mono(260));
        assert!(p.is_ready());
        p.result(&c, Err("no".into()), Mono(6_000));
        p.result(&c, Err("no".into()), Mono(11_000));
        assert!(p.is_ready());
        p.result(&c, Ok(()), Mono(16_000));
        for at in [21_000, 26_000, 31_000] {
            p.result(&c, Err("no".into()), Mono(at));
        }
        assert!(!p.is_ready());
        assert!(!p.must_restart(&c, Mono(61_000)));
        assert!(p.must_restart(&c, Mono(70_000)));
    }

    #[test]
    fn failures_during_start_up_do_not_count() {
        let (c, mut p) = (check(), Probing::new(Mono(0)));
        for at in (0..59_000).step_by(250) {
            p.result(&c, Err("no".into()), Mono(at));
        }
        assert!(!p.must_restart(&c, Mono(60_000)));
        assert!(p.must_restart(&c, Mono(70_000)));
    }
}
