//! The roots that hosts and clients know the server by.

use super::{ask, confirm, connect};
use crate::args::{Global, Root as RootVerb};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{moment, print, put, rfc3339};
use berth_proto::api::*;
use berth_proto::words::counted;
use serde_json::{Value, json};

fn root_json(root: &Root) -> Value {
    json!({
        "pin": root.pin, "createTime": moment(root.create_time.as_ref()),
        "expireTime": moment(root.expire_time.as_ref()), "shown": root.shown, "signs": root.signs,
    })
}

fn standing(root: &Root) -> &'static str {
    match (root.shown, root.signs) {
        (true, true) => "in use",
        (true, false) => "shown, to be retired",
        (false, true) => "signs, comes next",
        (false, false) => "",
    }
}

/// Names of some, and how many there are besides.
fn names(names: &[String], count: u32) -> String {
    let listed = names.join(", ");
    let more = usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(names.len());
    if more == 0 { listed } else { format!("{listed} and {more} more") }
}

/// What is still to be done, a line each.
fn to_do(state: &RootsState) -> Vec<String> {
    let mut lines = Vec::new();
    if state.roots.len() < 2 {
        if state.hosts_not_told_count > 0 {
            let who = names(&state.hosts_not_told, state.hosts_not_told_count);
            lines.push(format!("hosts that have not said that they hold it: {who}"));
        }
        return lines;
    }
    if state.hosts_not_told_count > 0 {
        let who = names(&state.hosts_not_told, state.hosts_not_told_count);
        lines.push(format!("hosts that do not hold the new root yet: {who}"));
    }
    if state.users_not_renewed_count > 0 {
        let who = names(&state.users_not_renewed, state.users_not_renewed_count);
        lines.push(format!("users who have not run `berth context renew` since it began: {who}"));
    }
    lines.push("join tokens that are there when it ends, end with it".to_owned());
    lines.push(match state.hosts_not_told_count {
        0 => "all hosts hold the new root; `berth root finish` retires the first".to_owned(),
        _ => "`berth root finish` comes when no host is left".to_owned(),
    });
    lines
}

fn show(global: &Global, state: &RootsState) -> Result<()> {
    table(global, state)?;
    for line in to_do(state) {
        eprintln!("{line}");
    }
    Ok(())
}

fn table(global: &Global, state: &RootsState) -> Result<()> {
    let end = |root: &Root| root.expire_time.as_ref().map(rfc3339).unwrap_or_default();
    let made = |root: &Root| root.create_time.as_ref().map(rfc3339).unwrap_or_default();
    let rows = state
        .roots
        .iter()
        .map(|root| {
            let short = root.pin.chars().take(12).collect();
            vec![short, standing(root).to_owned(), made(root), end(root), root.pin.clone()]
        })
        .collect();
    let value = json!({
        "roots": state.roots.iter().map(root_json).collect::<Vec<_>>(),
        "version": state.version,
        "hostsNotTold": state.hosts_not_told, "hostsNotToldCount": state.hosts_not_told_count,
        "usersNotRenewed": state.users_not_renewed,
        "usersNotRenewedCount": state.users_not_renewed_count,
    });
    print(global, &["ROOT", "STATE", "MADE", "EXPIRES", "PIN"], 4, rows, &value)
}

async fn state(global: &Global, client: &Client) -> Result<RootsState> {
    let answer = ask(global, client.system().get_roots(GetRootsRequest {})).await?;
    Ok(answer.state.unwrap_or_default())
}

/// Whoever ends a rotation goes on with the new root alone.
fn knows(client: &Client, newest: Option<&Root>) -> Result<()> {
    let (context, newest) = (&client.context, newest.map(|root| root.pin.as_str()));
    let known = berth_proto::tls::pins(&context.roots)?;
    let certificate = berth_proto::tls::is_signed_by_newest(&context.certificate, &context.roots)?;
    if known.last().map(String::as_str) == newest && certificate {
        return Ok(());
    }
    Err(Error::user("this context does not know the new root yet, and would be shut out")
        .hint("`berth context renew` first; also for contexts of other machines"))
}

pub async fn root(global: &Global, verb: RootVerb) -> Result<()> {
    match verb {
        RootVerb::List => {
            let client = connect(global).await?;
            show(global, &state(global, &client).await?)
        }
        RootVerb::Export => {
            let client = connect(global).await?;
            let mut system = client.system();
            let info = ask(global, system.get_server_info(GetServerInfoRequest {})).await?;
            put(&info.roots_pem)
        }
        RootVerb::Rotate => {
            let client = connect(global).await?;
            if state(global, &client).await?.roots.len() > 1 {
                eprintln!("a rotation has begun before, and goes on: no other root is made");
            }
            let request = BeginRootRotationRequest {};
            let begun = ask(global, client.system().begin_root_rotation(request)).await?;
            show(global, &begun.state.unwrap_or_default())
        }
        RootVerb::Finish { force } => {
            let client = connect(global).await?;
            let now = state(global, &client).await?;
            let Some(first) = now.roots.first().filter(|_| now.roots.len() > 1) else {
                return Err(Error::user("no rotation of the root has begun")
                    .hint("`berth root rotate` begins one"));
            };
            knows(&client, now.roots.last())?;
            let mut what = format!("retire the root {}", &first.pin[..first.pin.len().min(12)]);
            let lost = [
                (if force { now.hosts_not_told_count } else { 0 }, "host"),
                (now.users_not_renewed_count, "user"),
            ];
            let lost: Vec<String> = lost
                .into_iter()
                .filter(|(n, _)| *n > 0)
                .map(|(n, who)| counted(n as usize, who))
                .collect();
            if !lost.is_empty() {
                what.push_str(&format!(", which is all that {} may know", lost.join(" and ")));
            }
            drop(client);
            confirm(global, &what)?;
            let client = connect(global).await?;
            let request = FinishRootRotationRequest { pin: first.pin.clone(), force };
            let done = ask(global, client.system().finish_root_rotation(request)).await?;
            // Hosts hear just now that it is over: `root list` names those that have not said so in a while.
            table(global, &done.state.unwrap_or_default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_rotation_is_told_with_names() {
        let two = vec![Root::default(), Root::default()];
        let state = |hosts: &[&str], count| RootsState {
            roots: two.clone(),
            hosts_not_told: hosts.iter().map(|h| (*h).to_owned()).collect(),
            hosts_not_told_count: count,
            ..RootsState::default()
        };
        assert_eq!(
            to_do(&state(&["a", "b"], 7)),
            [
                "hosts that do not hold the new root yet: a, b and 5 more",
                "join tokens that are there when it ends, end with it",
                "`berth root finish` comes when no host is left"
            ]
        );
        let told = to_do(&state(&[], 0));
        assert!(told.len() == 2 && told[1].contains("`berth root finish` retires"), "{told:?}");
        assert!(to_do(&RootsState { roots: two[..1].to_vec(), ..state(&[], 0) }).is_empty());
        let left = to_do(&RootsState { roots: two[..1].to_vec(), ..state(&["a"], 1) });
        assert_eq!(left, ["hosts that have not said that they hold it: a"]);
    }
}
