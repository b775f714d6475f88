//! Answers on stdout: tables for people, JSON and YAML for programs.

use crate::args::{Global, Output};
use crate::error::{Error, Kind, Result};
use crate::style::Stream;
use berth_proto::escape::for_terminal;
use serde_json::{Value, json};

/// Prints a table, or the value in the form asked for. Columns beyond `wide_from` are for `-o wide`.
pub fn print(
    global: &Global,
    heads: &[&str],
    wide_from: usize,
    rows: Vec<Vec<String>>,
    value: &Value,
) -> Result<()> {
    let text = match global.output {
        Output::Json => remote_lines(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Output::Yaml => remote_lines(&berth_proto::manifest::to_yaml(value)),
        Output::Table => table(&heads[..wide_from.min(heads.len())], &rows, remote),
        Output::Wide => table(heads, &rows, remote),
    };
    put(&text)
}

/// One item of a stream: a line of JSON, a document of YAML, or these words.
pub fn item(global: &Global, words: impl FnOnce() -> String, value: &Value) -> Result<()> {
    match global.output {
        Output::Json => put(&remote_lines(&format!("{value}\n"))),
        Output::Yaml => {
            put(&remote_lines(&format!("---\n{}", berth_proto::manifest::to_yaml(value))))
        }
        Output::Table | Output::Wide => put(&words()),
    }
}

/// Prints JSON or YAML, or these words when a table is asked for.
pub fn say(global: &Global, words: &str, value: &Value) -> Result<()> {
    let text = match global.output {
        Output::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
        Output::Yaml => berth_proto::manifest::to_yaml(value),
        Output::Table | Output::Wide => format!("{words}\n"),
    };
    put(&remote_lines(&text))
}

/// Writes to stdout.
pub fn put(text: &str) -> Result<()> {
    raw(text.as_bytes())
}

/// Writes bytes to stdout at once. A reader that has gone ends the command quietly, as it would any
/// filter: `berth logs -f iris | head` shall not go on for ever. What failed beside that still counts:
/// see [`despite`].
pub fn raw(bytes: &[u8]) -> Result<()> {
    into(&mut std::io::stdout().lock(), bytes)
}

fn into(out: &mut impl std::io::Write, bytes: &[u8]) -> Result<()> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::ReaderGone, "nobody reads the answer"))
        }
        other => Ok(other?),
    }
}

/// How a command ends that has printed and failed: what failed goes before a reader that has gone.
pub fn despite(printed: Result<()>, failed: Option<Error>) -> Result<()> {
    failed.map_or(printed, Err)
}

/// Text from elsewhere: escaped on a terminal, raw into a pipe.
pub fn remote(text: &str) -> String {
    if Stream::Stdout.is_terminal() { for_terminal(text) } else { text.to_owned() }
}

/// The same of several lines, which stay lines. JSON and YAML leave characters as they are that a
/// terminal acts on: U+0080 to U+009F, and those that turn the direction of writing.
pub fn remote_lines(text: &str) -> String {
    if Stream::Stdout.is_terminal() { escaped(text) } else { text.to_owned() }
}

fn escaped(text: &str) -> String {
    let line = |line: &str| match line.strip_suffix('\n') {
        Some(line) => for_terminal(line) + "\n",
        None => for_terminal(line),
    };
    text.split_inclusive('\n').map(line).collect()
}

fn table(heads: &[&str], rows: &[Vec<String>], safe: impl Fn(&str) -> String) -> String {
    // A row stays a row, whatever a host's words hold.
    let cell = |row: &Vec<String>, i: usize| {
        row.get(i)
            .map(|c| safe(&c.replace(['\n', '\r'], " ")))
            .filter(|c| !c.is_empty())
            .unwrap_or_else(|| "-".into())
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

/// A moment for a table, as long as any other: RFC 3339, UTC, to the millisecond.
pub fn stamp(time: &prost_types::Timestamp) -> String {
    let text = rfc3339(&prost_types::Timestamp { nanos: 0, ..*time });
    match text.strip_suffix('Z') {
        Some(seconds) => format!("{seconds}.{:03}Z", time.nanos.clamp(0, 999_999_999) / 1_000_000),
        None => text,
    }
}

/// A point in time that people give: so long ago (10m) or RFC 3339.
pub fn since(text: &str) -> Result<prost_types::Timestamp> {
    if let Ok(ms) = berth_proto::quantity::parse_duration_ms(text) {
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let seconds = now - i64::try_from(ms / 1000).unwrap_or(0);
        return Ok(prost_types::Timestamp { seconds, nanos: 0 });
    }
    let at = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339)
        .map_err(|_| {
            Error::new(Kind::Usage, format!("\"{text}\" is neither a duration nor a time"))
                .hint("write 10m, 2h, or 2026-01-31T12:00:00Z (RFC 3339)")
        })?;
    Ok(prost_types::Timestamp {
        seconds: at.unix_timestamp(),
        nanos: i32::try_from(at.nanosecond()).unwrap_or(0),
    })
}

/// How far a transfer is: `43 %, layer 2 of 5, 3.0 MiB/s, 12s left`.
pub fn transfer(p: &berth_proto::api::Progress) -> String {
    let left_bytes = p.total_bytes.saturating_sub(p.done_bytes);
    if p.total_bytes > 0 && left_bytes == 0 && p.what == "image" {
        // All is here; the engine has still to make files of it.
        return "100 %, unpacking".to_owned();
    }
    let mut text = match p.done_bytes.saturating_mul(100).checked_div(p.total_bytes) {
        Some(percent) => format!("{percent} %"),
        None => berth_proto::quantity::human_bytes(p.done_bytes),
    };
    if p.parts > 1 && p.part > 0 {
        let part = if p.what == "image" { "layer" } else { "file" };
        text.push_str(&format!(", {part} {} of {}", p.part.min(p.parts), p.parts));
    }
    if p.rate_bytes_per_second > 0 && left_bytes > 0 {
        let rate = berth_proto::quantity::human_bytes(p.rate_bytes_per_second);
        let computed = left_bytes.saturating_mul(1000) / p.rate_bytes_per_second;
        let left_ms = if p.time_left_ms > 0 { p.time_left_ms } else { computed };
        text.push_str(&format!(", {rate}/s, {} left", rough(left_ms)));
    }
    text
}

/// A time to wait, in its two largest units and never 0: `12s`, `3m5s`, `2h10m`.
pub fn rough(ms: u64) -> String {
    let unit = match ms {
        0..=3_599_999 => 1000,
        3_600_000..=86_399_999 => 60_000,
        _ => 3_600_000,
    };
    berth_proto::quantity::format_duration_ms(ms.div_ceil(unit).max(1).saturating_mul(unit))
}

/// Why a replica waits, with when it is tried again.
pub fn waits(status: &berth_proto::api::ReplicaStatus) -> String {
    let now = time::OffsetDateTime::now_utc();
    let next = status.next_attempt_time.as_ref().filter(|_| !status.message.is_empty());
    let left = next.map(|t| {
        let now_ms = now.unix_timestamp_nanos() / 1_000_000;
        let at_ms = i128::from(t.seconds) * 1000 + i128::from(t.nanos) / 1_000_000;
        u64::try_from(at_ms - now_ms).unwrap_or(0)
    });
    match left.filter(|left| *left > 0) {
        Some(left) => format!("{}, in {}", status.message, rough(left)),
        None => status.message.clone(),
    }
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
    fn a_reader_that_has_gone_hides_no_failure() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        let printed = || into(&mut writer.try_clone().unwrap(), b"x");
        assert_eq!(printed().unwrap_err().kind.code(), 0);
        let failed = Error::new(Kind::RolloutFailed, "x");
        assert_eq!(despite(printed(), Some(failed)).unwrap_err().kind, Kind::RolloutFailed);
        assert!(into(&mut writer, b"").is_ok() && despite(Ok(()), None).is_ok());
    }

    #[test]
    fn since_is_a_duration_or_a_time() {
        assert_eq!(since("2026-01-01T00:00:00Z").unwrap().seconds, 1_767_225_600);
        assert!(since("10m").is_ok());
        assert_eq!(since("yesterday").unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn the_times_of_a_table_are_of_one_length() {
        let of = |nanos| stamp(&prost_types::Timestamp { seconds: 1_767_225_600, nanos });
        assert_eq!(of(0), "2026-01-01T00:00:00.000Z");
        assert_eq!(of(120_000_000), "2026-01-01T00:00:00.120Z");
        assert_eq!(of(7_999_999), "2026-01-01T00:00:00.007Z");
    }

    #[test]
    fn a_transfer_tells_what_is_known() {
        let p = |done_bytes, total_bytes, rate_bytes_per_second| berth_proto::api::Progress {
            done_bytes,
            total_bytes,
            rate_bytes_per_second,
            ..Default::default()
        };
        assert_eq!(transfer(&p(43, 100, 0)), "43 %");
        assert_eq!(transfer(&p(1 << 20, 4 << 20, 1 << 20)), "25 %, 1.0 MiB/s, 3s left");
        assert!(!transfer(&p(5, 0, 0)).contains('%'));
        assert_eq!(transfer(&p(100, 100, 7)), "100 %");
        let image = |progress| berth_proto::api::Progress { what: "image".into(), ..progress };
        let layer = image(berth_proto::api::Progress { part: 2, parts: 5, ..p(43, 100, 0) });
        assert_eq!(transfer(&layer), "43 %, layer 2 of 5");
        assert_eq!(transfer(&image(p(100, 100, 7))), "100 %, unpacking");
        let file = berth_proto::api::Progress {
            what: "artifact".into(),
            part: 3,
            parts: 3,
            time_left_ms: 7_325_000,
            ..p(1, 100, 1)
        };
        assert_eq!(transfer(&file), "1 %, file 3 of 3, 1 B/s, 2h3m left");
    }

    #[test]
    fn what_is_tried_again_says_when() {
        let at = |seconds| {
            let now = time::OffsetDateTime::now_utc().unix_timestamp();
            let message = "it ended".to_owned();
            let next = prost_types::Timestamp { seconds: now + seconds, nanos: 0 };
            let next_attempt_time = Some(next);
            berth_proto::api::ReplicaStatus { message, next_attempt_time, ..Default::default() }
        };
        assert!(waits(&at(90_000)).starts_with("it ended, in 1d"), "{}", waits(&at(90_000)));
        assert_eq!(waits(&at(-5)), "it ended");
        assert_eq!(
            (rough(0), rough(59_001), rough(3_599_000)),
            ("1s".into(), "1m".into(), "59m59s".into())
        );
    }

    #[test]
    fn json_and_yaml_cannot_act_on_a_terminal_either() {
        let value = json!({"a": "\u{9b}2J\u{202e}\u{61c}", "b": "x\ny"});
        for text in
            [serde_json::to_string_pretty(&value).unwrap(), berth_proto::manifest::to_yaml(&value)]
        {
            let safe = escaped(&text);
            assert!(safe.contains("\\u{9b}2J\\u{202e}\\u{61c}"), "{safe}");
            assert_eq!(safe.lines().count(), text.lines().count());
            assert!(safe.chars().all(|c| c == '\n' || !c.is_control()), "{safe}");
        }
        assert_eq!((escaped("a\nb\n"), escaped("a")), ("a\nb\n".into(), "a".into()));
    }

    #[test]
    fn columns_line_up_and_remote_text_cannot_act() {
        let rows =
            vec![vec!["a".into(), "\x1b[31m".into()], vec!["long-name".into(), String::new()]];
        assert_eq!(
            table(&["NAME", "STATE"], &rows, for_terminal),
            "NAME       STATE\na          \\u{1b}[31m\nlong-name  -\n"
        );
        // Raw in a pipe, but a row stays a row.
        let rows = vec![vec!["a\nb\u{1b}".into()]];
        assert_eq!(table(&["NAME"], &rows, str::to_owned), "NAME\na b\u{1b}\n");
    }
}
