//! The page: plain HTML made here from the view, every text escaped, without a script.

use crate::api::auth::Caller;
use crate::cluster::Cluster;
use berth_proto::api::{Event, EventSeverity, HostPresence, RolloutState};
use berth_proto::convert::wall;
use berth_proto::ids::Wall;
use berth_proto::words::is_of_empty_slots;
use berth_server_core::status;
use std::fmt::Write as _;

/// Rows of one table: more than a person reads; the command line shows all.
const ROWS: usize = 500;

/// The page's style, served beside it so that the policy forbids any other. On a narrow screen a row
/// is a card whose cells say what they are.
pub const STYLE: &str = include_str!("style.css");

/// Text as it may stand in HTML, between tags and in quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn moment(time: Wall) -> String {
    let format = time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from_unix_timestamp(time.0 / 1000)
        .ok()
        .and_then(|t| t.format(&format).ok())
        .unwrap_or_default()
}

/// One cell: its class, what it shows, and what it shows of it when pointed at.
struct Cell(&'static str, String, Option<String>);

/// A cell.
fn cell(class: &'static str, text: impl Into<String>) -> Cell {
    Cell(class, text.into(), None)
}

/// A reference in a cell: digests by their beginning, which is enough to tell them apart; in full when
/// pointed at.
fn reference(text: &str) -> Cell {
    let Some((before, digest)) = text.split_once("sha256:").filter(|(_, d)| d.len() > 12) else {
        return cell("", text);
    };
    let short: String = digest.chars().take(12).collect();
    Cell("", format!("{before}sha256:{short}…"), Some(text.to_owned()))
}

/// A table; `heads` are the columns' classes and names.
fn table(out: &mut String, title: &str, heads: &[(&str, &str)], rows: Vec<Vec<Cell>>, none: &str) {
    let _ = write!(out, "<section><h2>{}</h2>", escape(title));
    if rows.is_empty() {
        let _ = write!(out, "<p>{}</p></section>", escape(none));
        return;
    }
    out.push_str("<table><thead><tr>");
    for (class, head) in heads {
        let _ = write!(out, "<th scope=\"col\" class=\"{class}\">{}</th>", escape(head));
    }
    out.push_str("</tr></thead><tbody>");
    let more = rows.len().saturating_sub(ROWS);
    for row in rows.into_iter().take(ROWS) {
        let sub = row.first().is_some_and(|Cell(class, ..)| *class == "r");
        out.push_str(if sub { "<tr class=\"sub\">" } else { "<tr>" });
        for (Cell(class, text, whole), (column, head)) in row.into_iter().zip(heads) {
            let _ = write!(out, "<td class=\"{column} {class}\" data-h=\"{}\"", escape(head));
            if let Some(whole) = whole {
                let _ = write!(out, " title=\"{}\"", escape(&whole));
            }
            let _ = write!(out, ">{}</td>", escape(&text));
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table>");
    if more > 0 {
        let _ = write!(out, "<p>and {more} more; the command line shows all</p>");
    }
    out.push_str("</section>");
}

/// The page as this caller may see it.
pub fn page(cluster: &Cluster, caller: &Caller, events: &[Event]) -> String {
    let view = cluster.ledger.view();
    let live = cluster.live.load();
    let now = cluster.time();
    let mut out = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <meta http-equiv=\"refresh\" content=\"10\"><title>Berth</title>\
         <link rel=\"stylesheet\" href=\"/style.css\"></head><body>",
    );
    let _ = write!(
        out,
        "<h1>Berth</h1><p>cluster {} · {} · revision {} · {}</p>",
        escape(cluster.roots.cluster().as_str()),
        escape(&caller.subject),
        view.revision.0,
        moment(now.wall),
    );
    let mut hosts: Vec<_> = view.hosts().collect();
    hosts.sort_by(|a, b| a.name.cmp(&b.name));
    let rows = hosts
        .iter()
        .map(|host| {
            let shown = status::host(&view, &live, host, now);
            let state = shown.status.unwrap_or_default();
            let (class, presence) = match state.presence() {
                HostPresence::Present => ("good", "present"),
                HostPresence::Away => ("bad", "away"),
                HostPresence::Lost => ("bad", "lost"),
                HostPresence::Unknown | HostPresence::Unspecified => ("wait", "not heard of yet"),
            };
            let facts = state.facts.unwrap_or_default();
            vec![
                cell("", host.name.to_string()),
                cell(class, presence.to_owned()),
                cell("", format!("{}/{}", facts.os, facts.arch)),
                cell("", facts.engine),
                cell("", format!("{} of {}", state.ready, state.replicas)),
                cell("", state.reason),
            ]
        })
        .collect();
    let heads = [
        ("", "Name"),
        ("", "Presence"),
        ("", "Platform"),
        ("", "Engine"),
        ("n", "Ready"),
        ("w", "Why"),
    ];
    table(&mut out, "Hosts", &heads, rows, "No host has joined: berth host token create");

    let mut rows = Vec::new();
    for held in view.deployments().filter(|d| caller.sees(d.namespace.as_str())) {
        let report = cluster.reports.lock().get(&held.uid).cloned();
        let shown = status::deployment(&view, &live, held, report.as_ref());
        let state = shown.status.unwrap_or_default();
        let failed = matches!(state.rollout(), RolloutState::RolledBack | RolloutState::Paused);
        let class = match (failed, state.ready >= state.wanted && state.pending_count == 0) {
            (true, _) => "bad",
            (false, true) => "good",
            (false, false) => "wait",
        };
        // Why a replica waits stands in its own row; what has no row is told here.
        let placeless = state.pending.iter().filter(|p| is_of_empty_slots(&p.reason));
        let mut why: Vec<String> =
            placeless.map(|p| format!("{} waiting: {}", p.count, p.message)).collect();
        if !state.reason.is_empty() {
            why = vec![state.reason.clone()];
        }
        let rollout = state.rollout().as_str_name().trim_start_matches("ROLLOUT_STATE_");
        rows.push(vec![
            cell("", format!("{}/{}", held.namespace, held.name)),
            cell(class, rollout.to_ascii_lowercase().replace('_', " ")),
            cell("", format!("{} of {}", state.ready, state.wanted)),
            cell("", state.release.to_string()),
            reference(&state.resolved),
            cell("", why.join("; ")),
        ]);
        let mut replicas: Vec<_> = view.replicas_of(&held.uid).collect();
        replicas.sort_by_key(|r| (r.slot, r.uid.clone()));
        for replica in replicas {
            let shown = status::replica(&view, &live, replica, now.mono);
            let state = shown.status.unwrap_or_default();
            let phase = state.phase().as_str_name().trim_start_matches("REPLICA_PHASE_");
            rows.push(vec![
                cell("r", format!("slot {} on {}", shown.slot, shown.host)),
                cell(if state.ready { "good" } else { "wait" }, phase.to_ascii_lowercase()),
                cell("", if state.ready { "ready".to_owned() } else { String::new() }),
                cell("", shown.release.to_string()),
                cell("", String::new()),
                cell("", state.message),
            ]);
        }
    }
    let heads = [
        ("", "Name"),
        ("", "State"),
        ("n", "Ready"),
        ("n", "Release"),
        ("d", "What"),
        ("w", "Why"),
    ];
    table(&mut out, "Deployments", &heads, rows, "No deployment: berth apply -f FILE");

    let mut rows = Vec::new();
    for kept in view.models() {
        let meta = kept.record.meta.clone().unwrap_or_default();
        if !caller.sees(&meta.namespace) {
            continue;
        }
        for version in view.versions_of(&meta.uid).filter_map(|v| v.record.version.as_ref()) {
            let named = kept.record.aliases.iter().filter(|(_, to)| **to == version.version);
            let aliases: Vec<String> = named.map(|(alias, _)| format!("@{alias}")).collect();
            rows.push(vec![
                cell("", format!("{}/{}", meta.namespace, meta.name)),
                cell("", version.version.clone()),
                cell("good", aliases.join(" ")),
                cell("", version.format.clone()),
                cell("", version.create_time.as_ref().map(|t| moment(wall(t))).unwrap_or_default()),
                cell("", version.created_by.clone()),
            ]);
        }
    }
    let heads = [
        ("", "Model"),
        ("", "Version"),
        ("", "Aliases"),
        ("", "Format"),
        ("t", "Registered"),
        ("", "By"),
    ];
    table(&mut out, "Models", &heads, rows, "No model: berth model push NAME:VERSION PATH");

    let rows = events
        .iter()
        .map(|event| {
            let class = match event.severity() {
                EventSeverity::Error => "bad",
                EventSeverity::Warning => "wait",
                EventSeverity::Info | EventSeverity::Unspecified => "",
            };
            vec![
                cell("", event.time.as_ref().map(|t| moment(wall(t))).unwrap_or_default()),
                cell(class, event.reason.clone()),
                cell("", format!("{} {}", event.kind, event.name)),
                cell("", event.message.clone()),
            ]
        })
        .collect();
    table(
        &mut out,
        "Recent events",
        &[("t", "When"), ("", "What"), ("w", "Which"), ("w", "Words")],
        rows,
        "Nothing happened.",
    );
    out.push_str("</body></html>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_text_cannot_become_markup() {
        assert_eq!(
            escape("<script>alert('x')</script> & \"y\"\u{1b}[31m"),
            "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;y&quot;\u{fffd}[31m"
        );
        let mut out = String::new();
        let evil = "\"><img src=x>@sha256:0123456789ab\"onload=x";
        let rows = vec![vec![cell("", evil), reference(evil)]];
        table(&mut out, "T", &[("", "H"), ("", "\"I")], rows, "none");
        assert!(!out.contains("<img") && out.contains("&lt;img"), "{out}");
        assert!(!out.contains("\"onload"), "{out}");
    }

    #[test]
    fn a_digest_is_short_and_whole_when_pointed_at() {
        let whole = format!("app@sha256:{}", "a".repeat(64));
        let Cell(_, text, title) = reference(&whole);
        assert_eq!((text.as_str(), title), ("app@sha256:aaaaaaaaaaaa…", Some(whole)));
        let Cell(_, text, title) = reference("app:1");
        assert_eq!((text.as_str(), title), ("app:1", None));
    }
}
