//! Answers on stdout: tables for people, JSON and YAML for programs.

use crate::args::{Global, Output};
use crate::error::Result;
use berth_proto::escape::for_terminal;
use serde_json::{Value, json};
use std::io::{IsTerminal as _, Write as _};

/// Prints a table, or the value in the form asked for. Columns beyond `wide_from` are for `-o wide`.
pub fn print(
    global: &Global,
    heads: &[&str],
    wide_from: usize,
    rows: Vec<Vec<String>>,
    value: &Value,
) -> Result<()> {
    let text = match global.output {
        Output::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
        Output::Yaml => berth_proto::manifest::to_yaml(value),
        Output::Table => table(&heads[..wide_from.min(heads.len())], &rows),
        Output::Wide => table(heads, &rows),
    };
    put(&text)
}

/// Prints JSON or YAML, or these words when a table is asked for.
pub fn say(global: &Global, words: &str, value: &Value) -> Result<()> {
    match global.output {
        Output::Json => put(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Output::Yaml => put(&berth_proto::manifest::to_yaml(value)),
        Output::Table | Output::Wide => put(&format!("{words}\n")),
    }
}

/// Writes to stdout; a pipe that was closed is no error.
pub fn put(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Text from elsewhere: escaped on a terminal, raw into a pipe.
pub fn remote(text: &str) -> String {
    if std::io::stdout().is_terminal() { for_terminal(text) } else { text.to_owned() }
}

fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &Vec<String>, i: usize| {
        row.get(i).map(|c| for_terminal(c)).filter(|c| !c.is_empty()).unwrap_or_else(|| "-".into())
    };
    let widths: Vec<usize> = (0..heads.len())
        .map(|i| {
            rows.iter()
                .map(|row| cell(row, i).chars().count())
                .chain([heads[i].chars().count()])
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    let mut line = |cells: Vec<String>| {
        let last = cells.len().saturating_sub(1);
        for (i, text) in cells.iter().enumerate() {
            out.push_str(text);
            if i < last {
                let pad = widths[i].saturating_sub(text.chars().count()) + 2;
                out.push_str(&" ".repeat(pad));
            }
        }
        out.push('\n');
    };
    line(heads.iter().map(|h| (*h).to_owned()).collect());
    for row in rows {
        line((0..heads.len()).map(|i| cell(row, i)).collect());
    }
    out
}

/// A moment in RFC 3339, or null.
pub fn moment(time: Option<&prost_types::Timestamp>) -> Value {
    time.map_or(Value::Null, |t| json!(rfc3339(t)))
}

/// A moment in RFC 3339, UTC.
pub fn rfc3339(time: &prost_types::Timestamp) -> String {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    time::OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_default()
}

/// How long ago, in one unit.
pub fn age(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time else { return String::new() };
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let seconds = (now - time.seconds).max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// An enum's name without its prefix, in lower case: `ROLLOUT_STATE_ROLLING` is `rolling`.
pub fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_remote_text_cannot_act() {
        let rows =
            vec![vec!["a".into(), "\x1b[31m".into()], vec!["long-name".into(), String::new()]];
        assert_eq!(
            table(&["NAME", "STATE"], &rows),
            "NAME       STATE\na          \\u{1b}[31m\nlong-name  -\n"
        );
    }
}
