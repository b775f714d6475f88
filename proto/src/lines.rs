//! Going on with a stream of lines after it broke, by time and without doubles.
//!
//! Holds for one replica. A source that is asked again from the last time seen sends the lines of
//! that very moment once more; as many of them as were seen are left out. Once past that, every line
//! counts, also when a host's clock is set back.

use prost_types::Timestamp;

/// How far one replica's lines were seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Time of the last line, seconds and nanoseconds; `None`: no line yet.
    last: Option<(i64, i32)>,
    /// Lines seen with just that time.
    seen: u32,
    /// Of those, how many came again so far; `None`: not going on after a break.
    again: Option<u32>,
}

impl Position {
    /// The time to ask from; absent when nothing was seen yet.
    #[must_use]
    pub fn time(&self) -> Option<Timestamp> {
        self.last.map(|(seconds, nanos)| Timestamp { seconds, nanos })
    }

    /// The stream broke, and what comes next begins at [`Self::time`].
    pub fn resume(&mut self) {
        self.again = self.last.map(|_| 0);
    }

    /// Whether a line is new.
    pub fn admit(&mut self, time: Option<&Timestamp>) -> bool {
        let time = time.map_or((0, 0), |t| (t.seconds, t.nanos));
        if let (Some(again), Some(last)) = (self.again, self.last) {
            if time < last {
                return false;
            }
            if time == last && again < self.seen {
                self.again = Some(again + 1);
                return false;
            }
            self.again = None;
        }
        if self.last == Some(time) {
            self.seen = self.seen.saturating_add(1);
        } else {
            self.last = Some(time);
            self.seen = 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp { seconds, nanos: 0 }
    }

    proptest! {
        /// Whatever the times and wherever it breaks: each line once, in order.
        #[test]
        fn no_line_is_lost_or_told_twice(
            steps in prop::collection::vec(0_i64..3, 1..40),
            breaks in prop::collection::vec(0_usize..40, 0..4),
        ) {
            let mut time = 0;
            let lines: Vec<(usize, i64)> = steps
                .iter()
                .enumerate()
                .map(|(i, step)| { time += step; (i, time) })
                .collect();
            let mut position = Position::default();
            let mut told = Vec::new();
            let mut ends = breaks;
            ends.push(lines.len());
            for end in ends {
                position.resume();
                let from = position.time().map_or(i64::MIN, |t| t.seconds);
                let served = lines.iter().filter(|(_, t)| *t >= from);
                for (i, t) in served.take_while(|(i, _)| *i < end) {
                    if position.admit(Some(&at(*t))) {
                        told.push(*i);
                    }
                }
            }
            prop_assert_eq!(told, (0..lines.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_clock_that_is_set_back_silences_nothing() {
        let mut position = Position::default();
        assert!(position.admit(Some(&at(100))));
        assert!(position.admit(Some(&at(50))));
        position.resume();
        assert!(!position.admit(Some(&at(50))));
        assert!(position.admit(Some(&at(51))));
        assert!(position.admit(Some(&at(40))));
    }
}
