//! What keeps a rollout from being complete, for the words it fails with.

use super::roll::SlotWork;
use super::{Health, Planning};
use crate::objects::Replica;
use crate::status::{why_not_ready, wrote};
use std::collections::BTreeMap;

/// Most characters of one cause: a program's own words may be long, and the reason is stored.
const MAX_CHARS: usize = 300;

impl Planning<'_> {
    /// What most of what is missing waits for, with how many do; `None`: nothing is known of it.
    pub(super) fn cause(&self, work: &[SlotWork<'_>]) -> Option<String> {
        let mut replicas: BTreeMap<String, u32> = BTreeMap::new();
        for (replica, health) in work.iter().flat_map(|item| &item.new) {
            if let Health::NotYet(None) = health {
                *replicas.entry(self.why(replica)).or_default() += 1;
            }
        }
        let most = |all: &BTreeMap<String, u32>| {
            let most = all.iter().max_by_key(|(words, count)| (**count, std::cmp::Reverse(*words)));
            most.map(|(words, count)| (words.chars().take(MAX_CHARS).collect::<String>(), *count))
        };
        let mut told = Vec::new();
        if let Some((words, count)) = most(&replicas) {
            told.push(format!("{}: {words}", counted(count, "replica")));
        }
        if let Some((words, count)) = most(&self.plan.report.pending) {
            told.push(format!("{}: {words}", counted(count, "slot")));
        }
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// Why one replica is not ready. Between two attempts its status says only that it is about to
    /// start; how the last one ended says more.
    fn why(&self, replica: &Replica) -> String {
        let known = self.live.replica(&replica.uid).map(|live| &live.status);
        let says = known.is_some_and(|s| !s.reason.is_empty() && s.reason != "BACKOFF");
        match replica.exits.last() {
            Some(exit) if !says => {
                let memory = if exit.out_of_memory { " for lack of memory" } else { "" };
                format!("its program has ended with code {}{memory}{}", exit.code, wrote(exit))
            }
            Some(_) | None => why_not_ready(replica, known, self.live.presence(&replica.host)).1,
        }
    }
}

fn counted(count: u32, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}
