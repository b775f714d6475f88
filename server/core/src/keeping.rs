//! Keeping what was found out, against others who write the same objects.
//!
//! A machine without I/O: it asks for one proposal at a time and is told how it went. Each object must
//! be as it was seen; where the planner or an operator was faster, what is to be written is made anew
//! from what is there then, so that none of them undoes another's write.
//!
//! It is made from the newest *submitted* view, and what is submitted may still be taken back by a full
//! disk. So nothing is left to be written only when the durable view lacks nothing of it either; where it
//! does, another's write has it, and that one is waited for.

use crate::batching::{Proposal, Refusal};
use crate::change::Change;
use crate::intake;
use crate::view::View;
use std::collections::VecDeque;

/// Changes proposed at once, below what one commit holds.
const CHUNK: usize = 40;
/// How often a write is made anew because somebody else was faster: each time that was another's
/// success, and no object of a host has so many writers at once.
pub const TRIES: usize = 16;

/// What comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Propose this, then [`Keeping::answered`].
    Propose(Proposal),
    /// Make what is to be kept from the newest submitted view, then [`Keeping::made`].
    Make,
    /// All of it is kept, or it could not be.
    Over(bool),
}

/// The machine.
#[derive(Debug, Default)]
pub struct Keeping {
    made: usize,
    /// For what others have submitted.
    waits: bool,
    /// For whatever was proposed before: a session's word that is older must not come after it.
    fenced: bool,
    chunks: VecDeque<Proposal>,
}

impl Keeping {
    /// The machine, and what comes first.
    #[must_use]
    pub fn begin() -> (Self, Next) {
        (Self::default(), Next::Make)
    }

    /// The same for what must not be overtaken by anything that was proposed before: what a full disk keeps
    /// waiting is in no view, and would be written after nothing was found to be left to write.
    #[must_use]
    pub fn behind() -> (Self, Next) {
        (Self { fenced: true, ..Self::default() }, Next::Propose(Proposal::default()))
    }

    /// What is to be kept, as made from this view; `lacks` asks the same of the newest durable one.
    pub fn made(
        &mut self,
        view: &View,
        changes: &[Change],
        lacks: impl FnOnce() -> Vec<Change>,
    ) -> Next {
        self.made += 1;
        self.waits = changes.is_empty() && !lacks().is_empty() && !bug!(SubmittedTakenForKept);
        if self.waits {
            // Answered when all that is submitted is durable.
            return Next::Propose(Proposal::default());
        }
        self.chunks =
            changes.chunks(bound!(CHUNK, 2)).map(|chunk| intake::seen(view, chunk)).collect();
        self.next()
    }

    fn next(&mut self) -> Next {
        self.chunks.pop_front().map_or(Next::Over(true), Next::Propose)
    }

    /// How the last proposal went.
    pub fn answered(&mut self, refusal: Option<&Refusal>) -> Next {
        if std::mem::take(&mut self.fenced) {
            return match refusal {
                // A full disk has refused all that came before it, too.
                None | Some(Refusal::Full | Refusal::Conflict { .. } | Refusal::TakenBack) => {
                    Next::Make
                }
                Some(
                    Refusal::TooLarge { .. } | Refusal::Busy | Refusal::Failed | Refusal::Unsure,
                ) => Next::Over(false),
            };
        }
        match refusal {
            // What it waited for may have been taken back before it was asked.
            None if self.waits && self.made < TRIES => Next::Make,
            None if self.waits => Next::Over(false),
            None => self.next(),
            Some(Refusal::Conflict { .. } | Refusal::TakenBack) if self.made < TRIES => Next::Make,
            Some(
                Refusal::Conflict { .. }
                | Refusal::TakenBack
                | Refusal::TooLarge { .. }
                | Refusal::Busy
                | Refusal::Failed
                | Refusal::Unsure
                | Refusal::Full,
            ) => Next::Over(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ObjectKey;
    use berth_proto::ids::Revision;

    fn changes(n: usize) -> Vec<Change> {
        (0..n).map(|n| Change::DeleteReplica(format!("r{n}").parse().unwrap())).collect()
    }

    fn conflict() -> Refusal {
        let object = ObjectKey::Replica("r".parse().unwrap());
        Refusal::Conflict { object, expected: Revision(1), found: Revision(2) }
    }

    #[test]
    fn a_long_list_is_kept_in_parts_one_after_the_other() {
        let mut keeping = Keeping::default();
        let mut next = keeping.made(&View::default(), &changes(CHUNK + 1), Vec::new);
        let mut sizes = Vec::new();
        while let Next::Propose(proposal) = next {
            assert_eq!(proposal.preconditions.len(), proposal.changes.len());
            sizes.push(proposal.changes.len());
            next = keeping.answered(None);
        }
        assert_eq!((sizes, next), (vec![CHUNK, 1], Next::Over(true)));
    }

    #[test]
    fn whoever_was_slower_makes_it_anew_and_a_full_disk_ends_it() {
        let mut keeping = Keeping::default();
        for _ in 1..TRIES {
            keeping.made(&View::default(), &changes(1), Vec::new);
            assert_eq!(keeping.answered(Some(&conflict())), Next::Make);
        }
        keeping.made(&View::default(), &changes(1), Vec::new);
        assert_eq!(keeping.answered(Some(&conflict())), Next::Over(false));
        let mut keeping = Keeping::default();
        keeping.made(&View::default(), &changes(1), Vec::new);
        assert_eq!(keeping.answered(Some(&Refusal::Full)), Next::Over(false));
        assert_eq!(Keeping::default().made(&View::default(), &[], Vec::new), Next::Over(true));
    }

    #[test]
    fn what_must_not_be_overtaken_waits_for_all_that_was_proposed_before() {
        let (mut keeping, next) = Keeping::behind();
        assert_eq!(next, Next::Propose(Proposal::default()));
        assert_eq!(keeping.answered(None), Next::Make);
        keeping.made(&View::default(), &changes(1), Vec::new);
        assert_eq!(keeping.answered(Some(&Refusal::Full)), Next::Over(false));
        // Nothing before it will be written either.
        let (mut keeping, _) = Keeping::behind();
        assert_eq!(keeping.answered(Some(&Refusal::Full)), Next::Make);
        assert_eq!(keeping.made(&View::default(), &[], Vec::new), Next::Over(true));
        let (mut keeping, _) = Keeping::behind();
        assert_eq!(keeping.answered(Some(&Refusal::Unsure)), Next::Over(false));
    }

    #[test]
    fn what_another_write_has_is_kept_only_once_that_is_durable() {
        let view = View::default();
        let mut keeping = Keeping::default();
        let lacking = || changes(1);
        assert_eq!(keeping.made(&view, &[], lacking), Next::Propose(Proposal::default()));
        // It is durable.
        assert_eq!(keeping.answered(None), Next::Make);
        assert_eq!(keeping.made(&view, &[], Vec::new), Next::Over(true));
        // It was taken back before anybody waited for it.
        keeping.made(&view, &[], lacking);
        assert_eq!(keeping.answered(None), Next::Make);
        assert!(
            matches!(keeping.made(&view, &changes(1), lacking), Next::Propose(p) if p.changes.len() == 1)
        );
        assert_eq!(keeping.answered(None), Next::Over(true));
        // It is taken back while it is waited for.
        keeping.made(&view, &[], lacking);
        assert_eq!(keeping.answered(Some(&Refusal::Full)), Next::Over(false));
    }
}
