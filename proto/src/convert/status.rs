//! What agents say of replicas.

use super::{timestamp, wall};
use crate::api;
use crate::values::{Exit, Phase, Progress, ReplicaStatus};

impl From<Phase> for api::ReplicaPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Accepted => Self::Accepted,
            Phase::Fetching => Self::Fetching,
            Phase::Creating => Self::Creating,
            Phase::Starting => Self::Starting,
            Phase::Running => Self::Running,
            Phase::Exited => Self::Exited,
            Phase::Removed => Self::Removed,
        }
    }
}

/// The phase on the wire; `None`: no news.
#[must_use]
pub fn phase_from_api(phase: api::ReplicaPhase) -> Option<Phase> {
    match phase {
        api::ReplicaPhase::Unspecified => None,
        api::ReplicaPhase::Accepted => Some(Phase::Accepted),
        api::ReplicaPhase::Fetching => Some(Phase::Fetching),
        api::ReplicaPhase::Creating => Some(Phase::Creating),
        api::ReplicaPhase::Starting => Some(Phase::Starting),
        api::ReplicaPhase::Running => Some(Phase::Running),
        api::ReplicaPhase::Exited => Some(Phase::Exited),
        api::ReplicaPhase::Removed => Some(Phase::Removed),
    }
}

/// Reads an exit.
#[must_use]
pub fn exit_from_api(from: &api::Exit) -> Exit {
    Exit {
        attempt: from.attempt,
        code: from.code,
        out_of_memory: from.out_of_memory,
        time: from.time.as_ref().map(wall).unwrap_or_default(),
        last_line: last_line(&from.last_line),
    }
}

/// Most characters of a program's last line that are told and kept.
pub const MAX_LAST_LINE: usize = 200;

/// A program's last line as it is told and kept: one line, within its bound.
#[must_use]
pub fn last_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let shown: String = text.chars().map(plain).collect();
    let cut: String = shown.trim().chars().take(MAX_LAST_LINE).collect();
    cut.trim_end().to_owned()
}

/// Writes an exit.
#[must_use]
pub fn exit_to_api(from: &Exit) -> api::Exit {
    api::Exit {
        attempt: from.attempt,
        code: from.code,
        out_of_memory: from.out_of_memory,
        time: Some(timestamp(from.time)),
        last_line: from.last_line.clone(),
    }
}

/// Words from a host are cut here, at a character's edge.
const MAX_MESSAGE: usize = 1024;

fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_MESSAGE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// Reads a status. A phase this build does not know is no news.
#[must_use]
pub fn replica_status_from_api(from: &api::ReplicaStatus) -> ReplicaStatus {
    ReplicaStatus {
        attempt: from.attempt,
        phase: phase_from_api(from.phase()),
        ready: from.ready,
        reason: cut(&from.reason),
        message: cut(&from.message),
        progress: from.progress.as_ref().map(|p| Progress {
            done_bytes: p.done_bytes,
            total_bytes: p.total_bytes,
            rate_bytes_per_second: p.rate_bytes_per_second,
            what: cut(&p.what),
            part: p.part,
            parts: p.parts,
            time_left_ms: p.time_left_ms,
        }),
        last_exit: from.last_exit.as_ref().map(exit_from_api),
        start_time: from.start_time.as_ref().map(wall),
        next_attempt_time: from.next_attempt_time.as_ref().map(wall),
        container_id: cut(&from.container_id),
    }
}

/// Writes a status.
#[must_use]
pub fn replica_status_to_api(from: &ReplicaStatus) -> api::ReplicaStatus {
    api::ReplicaStatus {
        attempt: from.attempt,
        phase: from.phase.map_or(api::ReplicaPhase::Unspecified, Into::into) as i32,
        ready: from.ready,
        reason: from.reason.clone(),
        message: from.message.clone(),
        progress: from.progress.as_ref().map(|p| api::Progress {
            done_bytes: p.done_bytes,
            total_bytes: p.total_bytes,
            rate_bytes_per_second: p.rate_bytes_per_second,
            what: p.what.clone(),
            part: p.part,
            parts: p.parts,
            time_left_ms: p.time_left_ms,
        }),
        last_exit: from.last_exit.as_ref().map(exit_to_api),
        start_time: from.start_time.map(timestamp),
        next_attempt_time: from.next_attempt_time.map(timestamp),
        container_id: from.container_id.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Wall;

    #[test]
    fn a_status_reads_back_and_words_are_cut() {
        let status = ReplicaStatus {
            attempt: 3,
            phase: Some(Phase::Running),
            ready: true,
            reason: "EXITED".into(),
            message: "ö".repeat(600),
            progress: None,
            last_exit: Some(Exit {
                attempt: 2,
                code: 137,
                out_of_memory: true,
                time: Wall(-5),
                last_line: "no module named iris".into(),
            }),
            start_time: Some(Wall(1_700_000_000_123)),
            next_attempt_time: None,
            container_id: "c".into(),
        };
        let read = replica_status_from_api(&replica_status_to_api(&status));
        assert_eq!(read.message.len(), 1024);
        assert_eq!(ReplicaStatus { message: status.message.clone(), ..read }, status);
    }

    #[test]
    fn a_phase_nobody_knows_is_no_news() {
        let status = api::ReplicaStatus { phase: 4711, ..Default::default() };
        assert_eq!(replica_status_from_api(&status).phase, None);
    }
}
