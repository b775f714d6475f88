//! Between wire messages and values.
//!
//! Reading collects every problem before it gives up, fills in the defaults that the protos
//! document, and checks every bound. Writing cannot fail.

mod facts;
mod release;
mod spec;
mod status;

pub use facts::{host_facts_from_api, host_facts_to_api, resources_from_api, resources_to_api};
pub use release::{
    assignment_body_from_bytes, assignment_body_to_agent, resolved_from_api, resolved_to_api,
};
pub use spec::{
    MIN_CPU_MILLIS, MIN_MEMORY_BYTES, deployment_spec_from_api, deployment_spec_to_api,
    deployment_spec_to_write,
};
pub use status::{
    MAX_LAST_LINE, exit_from_api, exit_to_api, last_line, replica_status_from_api,
    replica_status_to_api,
};

use crate::ids::Wall;
use std::fmt;

/// One thing that is wrong with a message or manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: `spec.ports[0].container`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it, where that can be told.
    pub hint: Option<String>,
}

/// Everything that is wrong, never empty.
#[derive(Debug, Clone, PartialEq, Eq, Default, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl Problems {
    /// Notes a problem.
    pub fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem { path: path.into(), message: message.into(), hint: None });
    }
    /// Notes a problem and what to do about it.
    pub fn add_hint(
        &mut self,
        path: impl Into<String>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let hint = Some(hint.into());
        self.0.push(Problem { path: path.into(), message: message.into(), hint });
    }
    /// The value of a result, or its problem noted under `path`.
    pub fn take<T, E: fmt::Display>(
        &mut self,
        path: impl Into<String>,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.add(path, error.to_string());
                None
            }
        }
    }
    /// `value` when nothing was noted.
    ///
    /// # Errors
    /// What was noted.
    pub fn finish<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }
}

/// Wall clock to timestamp.
#[must_use]
pub fn timestamp(wall: Wall) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: wall.0.div_euclid(1000),
        nanos: i32::try_from(wall.0.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

/// Timestamp to wall clock, to the millisecond.
#[must_use]
pub fn wall(time: &prost_types::Timestamp) -> Wall {
    // At the ends of what a clock can tell, the second alone is past them and the moment is not.
    let ms = i128::from(time.seconds) * 1000 + i128::from(time.nanos) / 1_000_000;
    let end = if ms < 0 { i64::MIN } else { i64::MAX };
    Wall(i64::try_from(ms).unwrap_or(end))
}

/// Milliseconds to duration.
#[must_use]
pub fn duration(ms: u64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0),
    }
}

/// Duration to milliseconds; `None` when negative or too large.
#[must_use]
pub fn duration_ms(duration: &prost_types::Duration) -> Option<u64> {
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u64::try_from(duration.nanos).ok()?;
    seconds.checked_mul(1000)?.checked_add(nanos / 1_000_000)
}

#[cfg(test)]
mod tests;
