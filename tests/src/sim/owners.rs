//! Who may write what: an agent's words, a plan and a person each leave alone what is the others'.

use super::ledger::Waiter;
use super::script::Action;
use super::world::World;
use berth_proto::record::HostRecord;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::objects::{Deployment, Host, Replica};
use berth_server_core::view::View;

impl World<'_> {
    /// Something is about to be proposed. What was made of an older object is refused, and is not
    /// looked at.
    pub(super) fn check_proposal(&mut self, waiter: &Waiter, proposal: &Proposal) {
        let Some(process) = &self.server.process else { return };
        let view = process.machine.ahead();
        if proposal.preconditions.iter().any(|precondition| precondition.check(view).is_err()) {
            return;
        }
        let action = match waiter {
            Waiter::Operation(operation) => Some(&self.operations[*operation].action),
            Waiter::Job(_) | Waiter::Plan(_) => None,
        };
        let wrong =
            proposal.changes.iter().find_map(|change| not_its_own(view, waiter, action, change));
        if let Some(wrong) = wrong {
            self.broke(wrong);
        }
    }
}

fn not_its_own(
    view: &View,
    waiter: &Waiter,
    action: Option<&Action>,
    change: &Change,
) -> Option<String> {
    match (waiter, change) {
        (Waiter::Job(_), Change::PutHost(next)) => {
            let held = view.host(&next.uid)?;
            let differs = people_say(&held.record) != people_say(&next.record);
            differs.then(|| format!("what an agent says changes what people say of {}", next.uid))
        }
        (Waiter::Job(_), Change::PutReplica(next)) => {
            let held = view.replica(&next.uid)?;
            let differs = planned(held) != planned(next);
            differs.then(|| format!("what an agent says changes what is planned of {}", next.uid))
        }
        (Waiter::Job(_), Change::PutDeployment(next)) => {
            Some(format!("what an agent says changes {}", next.uid))
        }
        (Waiter::Plan(_), Change::PutReplica(next)) => {
            let held = view.replica(&next.uid)?;
            let differs = heard(held) != heard(next);
            differs.then(|| format!("a plan changes what was heard of {}", next.uid))
        }
        (Waiter::Plan(_), Change::PutHost(next)) => Some(format!("a plan changes {}", next.uid)),
        (Waiter::Plan(_), Change::PutDeployment(next)) => {
            let differs = asked(view.deployment(&next.uid)?) != asked(next);
            differs.then(|| format!("a plan changes what is asked of {}", next.uid))
        }
        (Waiter::Operation(_), Change::PutDeployment(next)) => {
            let held = view.deployment(&next.uid)?;
            let far = |d: &Deployment| (d.release(), d.rollout());
            let scaled = matches!(action, Some(Action::Scale { .. })) && far(held) != far(next);
            let wrong = scaled || held.stable() != next.stable();
            wrong.then(|| format!("somebody changes how far {} is", next.uid))
        }
        (Waiter::Operation(_), Change::PutHost(next)) => {
            let told = |h: &Host| (h.record.facts.clone(), h.record.observed_epoch);
            let joins = matches!(action, Some(Action::Rejoin { .. }));
            let wrong = !joins && told(view.host(&next.uid)?) != told(next);
            wrong.then(|| format!("somebody changes what was heard of {}", next.uid))
        }
        _ => None,
    }
}

/// What only people say of a host.
fn people_say(record: &HostRecord) -> impl PartialEq + use<> {
    let meta = record.meta.clone().unwrap_or_default();
    (
        (meta.name, meta.labels, record.spec, record.instance.clone()),
        (record.removed, record.wipe, record.waiting_for_approval),
    )
}

/// What only a plan or people say of a replica.
fn planned(replica: &Replica) -> impl PartialEq + use<> {
    (
        (replica.deployment.clone(), replica.slot, replica.release, replica.host.clone()),
        (replica.intent, replica.replaces.clone(), replica.stands_in_for.clone(), replica.created),
    )
}

/// What only its host's agent says of a replica.
fn heard(replica: &Replica) -> impl PartialEq + use<> {
    (replica.exits.clone(), replica.first_ready, replica.attempt_floor, replica.failed)
}

/// What only people say of a deployment.
fn asked(deployment: &Deployment) -> impl PartialEq + use<> {
    let meta = deployment.record.meta.clone().unwrap_or_default();
    let deleted = meta.delete_unix_ms;
    ((meta.name, meta.labels, deleted), deployment.record.spec.clone(), deployment.record.replicas)
}
