//! A replica by the name that events, logs and messages give it: `DEPLOYMENT/SLOT`.

use super::look::where_to_look;
use super::{connect, pages};
use crate::args::Global;
use crate::error::{Error, Kind, Result};
use berth_proto::api::{ListReplicasRequest, Replica, ReplicaIntent};
use std::collections::BTreeSet;

/// The deployment, and the uid of the replica that is meant, if one is: `name` may be
/// `DEPLOYMENT/SLOT`, unless the replica is given beside it; where a host is given it is the one there.
///
/// # Errors
/// When that is no name, or not the name of one replica.
pub async fn replica(
    global: &Global,
    name: &str,
    replica: Option<String>,
    host: Option<&str>,
) -> Result<(String, Option<String>)> {
    let Some((deployment, slot)) = slot(name, replica.as_deref())? else {
        return Ok((name.to_owned(), replica));
    };
    let client = connect(global).await?;
    let mut asking = client.deployments();
    let all = pages!(global, replicas, |page| asking.list_replicas(ListReplicasRequest {
        namespace: where_to_look(&client.namespace, deployment).to_owned(),
        deployment: deployment.to_owned(),
        host: host.unwrap_or_default().to_owned(),
        page,
    }));
    Ok((deployment.to_owned(), Some(in_slot(deployment, slot, &all)?)))
}

/// The deployment and the slot in a name; `None`: it names a deployment.
fn slot<'a>(name: &'a str, replica: Option<&str>) -> Result<Option<(&'a str, u32)>> {
    let Some((deployment, slot)) = name.split_once('/') else { return Ok(None) };
    let Ok(slot) = slot.parse() else {
        let words = format!("\"{name}\" is neither a deployment nor a replica");
        return Err(Error::new(Kind::Usage, words).hint("write DEPLOYMENT, or DEPLOYMENT/SLOT"));
    };
    if replica.is_some() {
        let words = format!("{name} names a replica, and so does --replica");
        return Err(Error::new(Kind::Usage, words).hint("give one of them"));
    }
    Ok(Some((deployment, slot)))
}

/// The one replica in a slot. Of several, as while one takes another's place, the one that serves.
fn in_slot(deployment: &str, slot: u32, all: &[Replica]) -> Result<String> {
    let wanted = |r: &&Replica| r.intent() == ReplicaIntent::Run;
    let serves = |r: &&Replica| r.status.as_ref().is_some_and(|status| status.ready);
    let here: Vec<&Replica> = all.iter().filter(|r| r.slot == slot).collect();
    let wanted: Vec<&Replica> = here.iter().copied().filter(wanted).collect();
    let serving: Vec<&Replica> = wanted.iter().copied().filter(serves).collect();
    for candidates in [&wanted, &serving, &here] {
        if let [one] = candidates.as_slice() {
            return Ok(one.uid.clone());
        }
    }
    let list = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join(", ");
    if here.is_empty() {
        let slots: BTreeSet<u32> = all.iter().map(|r| r.slot).collect();
        let slots = slots.into_iter().map(|slot| format!("{deployment}/{slot}")).collect();
        let error = Error::user(format!("there is no replica {deployment}/{slot}"));
        return Err(match all {
            [] => error.hint(format!("it has none just now (berth ps {deployment})")),
            _ => error.hint(format!("there are {}", list(slots))),
        });
    }
    let hosts = list(here.iter().map(|r| r.host.clone()).collect());
    let words = format!("{deployment}/{slot} is {} replicas, on {hosts}", here.len());
    let hint =
        format!("write {deployment} --replica UID (berth ps {deployment} -o wide shows them)");
    Err(Error::user(words).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::api::ReplicaStatus;

    fn made(uid: &str, slot: u32, host: &str, intent: ReplicaIntent, ready: bool) -> Replica {
        Replica {
            uid: uid.to_owned(),
            slot,
            host: host.to_owned(),
            intent: intent as i32,
            status: Some(ReplicaStatus { ready, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_slot_names_the_replica_that_is_wanted_in_it_and_of_two_the_one_that_serves() {
        use ReplicaIntent::{Run, Stop};
        let all = [
            made("a", 0, "h0", Stop, true),
            made("b", 0, "h1", Run, false),
            made("c", 1, "h0", Run, true),
            made("d", 1, "h0", Run, false),
            made("e", 2, "h1", Stop, false),
        ];
        let found = |slot| in_slot("iris", slot, &all).ok();
        assert_eq!([found(0), found(1), found(2)], ["b", "c", "e"].map(|uid| Some(uid.to_owned())));
        let none = in_slot("iris", 7, &all).unwrap_err();
        assert_eq!(none.message, "there is no replica iris/7");
        assert_eq!(none.hint.as_deref(), Some("there are iris/0, iris/1, iris/2"));
    }

    #[test]
    fn a_name_with_a_slash_is_a_slots_or_none() {
        assert_eq!(slot("iris", Some("u")).unwrap(), None);
        assert_eq!(slot("iris/3", None).unwrap(), Some(("iris", 3)));
        assert_eq!(slot("iris/x", None).unwrap_err().kind, Kind::Usage);
        assert_eq!(slot("iris/3", Some("u")).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn a_slot_of_a_deployment_on_every_host_is_one_replica_on_each() {
        let all = ["h0", "h1"].map(|host| made(host, 0, host, ReplicaIntent::Run, true));
        let error = in_slot("iris", 0, &all).unwrap_err();
        assert_eq!(error.message, "iris/0 is 2 replicas, on h0, h1");
        assert!(error.hint.unwrap().contains("--replica"));
    }
}
