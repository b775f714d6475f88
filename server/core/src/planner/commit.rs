//! Cuts a plan into what the ledger takes at once.
//!
//! Starts are counted against the surge as if nothing stopped, stops against the floor as if nothing
//! started, so any part of a plan is safe alone, and its changes may be spread over several commits,
//! of which some may be refused; what they make of the deployment itself stays together, in the last
//! one. Each commit names what it was planned on: had the deployment, one of the replicas or the host of
//! a new one been written since, it is refused and the plan is made anew, so that a plan never undoes what it has not
//! seen.

use super::Plan;
use crate::batching::{Precondition, Proposal};
use crate::change::Change;
use crate::objects::Deployment;
use crate::view::{ObjectKey, View};
use berth_proto::ids::Revision;

/// Steps in one commit. Each may raise the generation of a host of its own, which is an operation as
/// well: 40 and 40, and at most 4 of a verdict, are below what one commit holds
/// ([`crate::batching::Limits::ANY`]).
pub const STEPS_PER_COMMIT: usize = 40;

impl Plan {
    /// The plan as proposals, in order. `view` is the one it was made on.
    #[must_use]
    pub fn proposals(self, view: &View, deployment: &Deployment) -> Vec<Proposal> {
        let still =
            Precondition::At(ObjectKey::Deployment(deployment.uid.clone()), deployment.revision);
        let mut all: Vec<Proposal> = Vec::new();
        for change in self.changes {
            if all.last().is_none_or(|last| last.changes.len() >= bound!(STEPS_PER_COMMIT, 2)) {
                let preconditions = vec![still.clone(), Precondition::Standing(view.revision)];
                all.push(Proposal { preconditions, changes: Vec::new() });
            }
            let Some(last) = all.last_mut() else { continue };
            if let Some(uid) = change.replica() {
                let key = ObjectKey::Replica(uid.clone());
                let at = view.revision_of(&key);
                last.preconditions.push(Precondition::At(key, at));
                // What is placed goes by what its host was: one that was cordoned meanwhile, or has
                // less to give, must not get it.
                if let Change::PutReplica(replica) = &change
                    && at == Revision(0)
                    && !bug!(HostNotHeld)
                {
                    let host = ObjectKey::Host(replica.host.clone());
                    let at = view.revision_of(&host);
                    last.preconditions.push(Precondition::At(host, at));
                }
            }
            last.changes.push(change);
        }
        if !self.verdict.is_empty() {
            match all.last_mut() {
                Some(last) => last.changes.extend(self.verdict),
                None => {
                    all.push(Proposal { preconditions: vec![still], changes: self.verdict });
                }
            }
        }
        all
    }
}
