//! Streams: what replicas say, and what happens. A followed stream goes on where it was after a break.

use super::{Patience, ask, broken, connect, in_namespace, named};
use crate::args::{Events, Global, Logs};
use crate::error::{Error, Kind, Result};
use crate::output::{item, moment, remote, rfc3339, since, stamp, word};
use crate::style::{Ink, Paint, Stream};
use berth_proto::api::*;
use berth_proto::escape::for_terminal;
use berth_proto::lines::Position;
use serde_json::json;
use std::collections::BTreeMap;

/// What is known of each replica's lines.
#[derive(Default)]
struct Sources {
    positions: BTreeMap<String, Position>,
    /// Source names in the order they came, for colours.
    names: BTreeMap<String, usize>,
}

impl Sources {
    /// Every source's place, for the request that goes on after a break.
    fn resume(&mut self) -> BTreeMap<String, prost_types::Timestamp> {
        self.positions
            .iter_mut()
            .filter_map(|(uid, position)| {
                position.resume();
                Some((uid.clone(), position.time()?))
            })
            .collect()
    }

    fn admit(&mut self, line: &LogLine) -> bool {
        self.positions.entry(line.replica_uid.clone()).or_default().admit(line.time.as_ref())
    }

    fn ink(&mut self, name: &str) -> Ink {
        let next = self.names.len();
        Ink::Source(*self.names.entry(name.to_owned()).or_insert(next))
    }
}

pub async fn logs(global: &Global, mut args: Logs) -> Result<()> {
    (args.deployment, args.replica) =
        named::replica(global, &args.deployment, args.replica.take(), args.host.as_deref()).await?;
    let mut request = StreamLogsRequest {
        namespace: global.namespace.clone().unwrap_or_default(),
        deployment: args.deployment.clone(),
        replica: args.replica.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        follow: args.follow,
        since: args.since.as_deref().map(since).transpose()?,
        tail: args.tail,
        previous: args.previous,
        resume: BTreeMap::new(),
    };
    let mut sources = Sources::default();
    let mut patience = Patience::new(None);
    let mut begun = false;
    loop {
        let result = pour(global, &args, &request, &mut sources, &mut begun, &mut patience).await;
        match result {
            Ok(()) => return Ok(()),
            // Before the first answer the server is simply not there.
            Err(error) if !args.follow || !begun => return Err(error),
            // It is gone, so there is nothing more to come.
            Err(error) if error.reason == "DEPLOYMENT_NOT_FOUND" => return Ok(()),
            Err(error) => patience.bear(error, |words| eprintln!("{words}")).await?,
        }
        request.resume = sources.resume();
        if !request.resume.is_empty() {
            request.tail = None;
        }
    }
}

async fn pour(
    global: &Global,
    args: &Logs,
    request: &StreamLogsRequest,
    sources: &mut Sources,
    begun: &mut bool,
    patience: &mut Patience,
) -> Result<()> {
    let client = connect(global).await?;
    let mut stream = ask(global, client.logs().stream_logs(request.clone())).await?;
    *begun = true;
    while let Some(message) = stream.message().await.map_err(broken)? {
        patience.calm();
        match message.item {
            Some(stream_logs_response::Item::Line(line)) if sources.admit(&line) => {
                print_line(global, args, &line, sources)?;
            }
            // Shown before the stream was taken up again.
            Some(stream_logs_response::Item::Line(_)) => {}
            Some(stream_logs_response::Item::Source(source)) => tell(args, &source),
            None => {}
        }
    }
    Ok(())
}

fn print_line(global: &Global, args: &Logs, line: &LogLine, sources: &mut Sources) -> Result<()> {
    let text = String::from_utf8_lossy(&line.text);
    let time = line.time.as_ref().map(rfc3339).unwrap_or_default();
    let value = json!({
        "time": time, "serverTime": moment(line.server_time.as_ref()), "deployment": args.deployment, "replica": line.replica_uid,
        "slot": line.slot, "host": line.host, "release": line.release, "attempt": line.attempt,
        "stream": word(line.stream().as_str_name(), "OUTPUT_STREAM_"), "text": text,
    });
    let words = || {
        let name = for_terminal(&format!("{}/{} {}", args.deployment, line.slot, line.host));
        let ink = sources.ink(&name);
        let source = Paint { on: Stream::Stdout, ink, text: &name };
        let stamp = if args.timestamps { format!("{time} ") } else { String::new() };
        format!("{source} | {stamp}{}\n", remote(&text))
    };
    item(global, words, &value)
}

/// Sources that cannot be read are named, on standard error; they end nothing.
fn tell(args: &Logs, source: &LogSourceState) {
    let name = for_terminal(&format!("{}/{} {}", args.deployment, source.slot, source.host));
    let words = for_terminal(&source.message);
    match source.condition() {
        LogSourceCondition::Unreachable => {
            let text = format!("{name}: not reached: {words}");
            eprintln!("{}", Paint { on: Stream::Stderr, ink: Ink::Bad, text: &text });
        }
        LogSourceCondition::Ended if !words.is_empty() => eprintln!("{name}: {words}"),
        LogSourceCondition::Ended | LogSourceCondition::Open | LogSourceCondition::Unspecified => {}
    }
}

/// How far events were followed.
#[derive(Default)]
struct Seen {
    /// A stream was there.
    begun: bool,
    /// Of the newest event that was shown.
    time: Option<prost_types::Timestamp>,
}

pub async fn events(global: &Global, args: Events) -> Result<()> {
    let mut request = WatchEventsRequest {
        namespace: global.namespace.clone().unwrap_or_default(),
        deployment: args.deployment.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        after_token: String::new(),
        since: args.since.as_deref().map(since).transpose()?,
        follow: args.follow,
        limit: args.limit,
    };
    let mut patience = Patience::new(None);
    let mut seen = Seen::default();
    loop {
        let error = match watch(global, &mut request, &mut seen, &mut patience).await {
            Ok(()) if !args.follow => return Ok(()),
            Ok(()) => Error::new(Kind::Unavailable, "the server ended the stream"),
            Err(error) if error.reason == "EVENTS_EXPIRED" => {
                eprintln!("{}; going on with its newest events", error.message);
                begin_anew(&mut request, seen.time, args.limit);
                continue;
            }
            Err(error) if !args.follow || !seen.begun => return Err(error),
            Err(error) => error,
        };
        patience.bear(error, |words| eprintln!("{words}")).await?;
    }
}

async fn watch(
    global: &Global,
    request: &mut WatchEventsRequest,
    seen: &mut Seen,
    patience: &mut Patience,
) -> Result<()> {
    let client = connect(global).await?;
    let mut stream = ask(global, client.events().watch_events(request.clone())).await?;
    seen.begun = true;
    while let Some(message) = stream.message().await.map_err(broken)? {
        patience.calm();
        let Some(event) = message.event else { continue };
        go_on_after(request, message.token);
        seen.time = event.time;
        print_event(global, &event)?;
    }
    Ok(())
}

/// From here on a new stream goes on, with everything that has happened meanwhile: the limit was for
/// what had happened before.
fn go_on_after(request: &mut WatchEventsRequest, token: String) {
    request.after_token = token;
    request.limit = u32::MAX;
}

/// The token means nothing any more: everything since the newest event that was shown, or the newest as
/// at the beginning.
fn begin_anew(request: &mut WatchEventsRequest, shown: Option<prost_types::Timestamp>, limit: u32) {
    request.after_token.clear();
    match shown {
        Some(_) => request.since = shown,
        None => request.limit = limit,
    }
}

fn print_event(global: &Global, event: &Event) -> Result<()> {
    let time = event.time.as_ref().map(rfc3339).unwrap_or_default();
    let severity = word(event.severity().as_str_name(), "EVENT_SEVERITY_");
    let value = json!({
        "sequence": event.sequence, "time": time, "severity": severity, "kind": event.kind,
        "name": event.name, "namespace": event.namespace, "uid": event.uid,
        "reason": event.reason, "message": event.message, "actor": event.actor,
        "host": event.host, "deployment": event.deployment,
    });
    let words = || {
        let ink = match event.severity() {
            EventSeverity::Error => Ink::Bad,
            EventSeverity::Warning => Ink::Busy,
            EventSeverity::Info | EventSeverity::Unspecified => Ink::Note,
        };
        let padded = format!("{severity:<7}");
        let severity = Paint { on: Stream::Stdout, ink, text: &padded };
        let name = in_namespace(&event.namespace, &event.name);
        let rest = format!("{}/{name} {} {}", event.kind, event.reason, event.message);
        let time = event.time.as_ref().map(stamp).unwrap_or_default();
        format!("{time} {severity} {}\n", remote(&rest.replace('\n', " ")))
    };
    item(global, words, &value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_break_each_source_goes_on_where_it_was() {
        let mut sources = Sources::default();
        let line = |replica: &str, seconds| LogLine {
            replica_uid: replica.to_owned(),
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            ..LogLine::default()
        };
        assert!(sources.admit(&line("a", 5)));
        assert!(sources.admit(&line("b", 9)));
        let resume = sources.resume();
        assert_eq!((resume["a"].seconds, resume["b"].seconds), (5, 9));
        assert!(!sources.admit(&line("a", 5)));
        assert!(sources.admit(&line("a", 6)));
        assert!(!sources.admit(&line("b", 9)));
        assert!(sources.admit(&line("c", 1)));
    }

    #[test]
    fn what_happens_during_a_break_is_not_cut_to_the_limit() {
        let mut request = WatchEventsRequest { limit: 5, ..WatchEventsRequest::default() };
        begin_anew(&mut request, None, 5);
        assert_eq!((request.after_token.as_str(), request.limit), ("", 5));
        go_on_after(&mut request, "nine".to_owned());
        assert_eq!((request.after_token.as_str(), request.limit), ("nine", u32::MAX));
        let shown = Some(prost_types::Timestamp { seconds: 7, nanos: 0 });
        begin_anew(&mut request, shown, 5);
        assert_eq!((request.since, request.limit), (shown, u32::MAX));
        assert!(request.after_token.is_empty());
    }

    #[test]
    fn a_source_keeps_its_colour() {
        let mut sources = Sources::default();
        let first = sources.ink("iris/0 one");
        assert_ne!(sources.ink("iris/1 two"), first);
        assert_eq!(sources.ink("iris/0 one"), first);
    }
}
