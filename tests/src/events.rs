//! What an engine says has happened to our containers, and what must never have.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Something that happened to one of our containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// `create`, `start`, `die`, `destroy`, ...
    pub action: String,
    /// The engine's id.
    pub container: String,
    /// Labels.
    pub deployment: String,
    /// Labels.
    pub replica: String,
    /// Labels.
    pub attempt: u32,
}

fn event(line: &str) -> Result<Event> {
    let value: Value = serde_json::from_str(line)?;
    let attributes = &value["Actor"]["Attributes"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(Event {
        action: text(&value["Action"]),
        container: text(&value["Actor"]["ID"]),
        deployment: text(&attributes["io.berth.deployment"]),
        replica: text(&attributes["io.berth.replica"]),
        attempt: text(&attributes["io.berth.attempt"]).parse()?,
    })
}

/// The events that [`crate::hosts::Host::record_events`] has written down so far, in their order.
///
/// # Errors
/// When they cannot be read.
pub fn read(log: &Path) -> Result<Vec<Event>> {
    let text = std::fs::read_to_string(log)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| event(line).with_context(|| format!("not an event: {line}"))).collect()
}

/// An attempt is one container, which is started once; and of a replica one container runs at a time.
///
/// # Errors
/// The first event that breaks it.
pub fn nothing_twice(events: &[Event]) -> Result<()> {
    let mut made: BTreeMap<(&str, u32), &str> = BTreeMap::new();
    let mut started: BTreeSet<&str> = BTreeSet::new();
    let mut running: BTreeMap<&str, &str> = BTreeMap::new();
    for event in events {
        let (replica, container) = (event.replica.as_str(), event.container.as_str());
        match event.action.as_str() {
            "create" => {
                let other = made.insert((replica, event.attempt), container);
                ensure!(other.is_none(), "made twice: {event:?}, {other:?}");
            }
            "start" => {
                ensure!(started.insert(container), "started twice: {event:?}");
                let other = running.insert(replica, container);
                ensure!(other.is_none(), "runs beside {other:?}: {event:?}");
            }
            "die" => {
                ensure!(running.remove(replica) == Some(container), "it did not run: {event:?}");
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(action: &str, container: &str, attempt: u32) -> Event {
        let text = str::to_owned;
        let (deployment, replica) = (text("d"), text("r"));
        Event { action: text(action), container: text(container), deployment, replica, attempt }
    }

    #[test]
    fn each_way_of_doing_a_thing_twice_is_found() {
        let good = ["create a 1", "start a 1", "kill a 1", "die a 1", "create b 2", "start b 2"];
        let read = |lines: &[&str]| -> Vec<Event> {
            let parts = lines.iter().map(|l| l.split(' ').collect::<Vec<_>>());
            parts.map(|p| of(p[0], p[1], p[2].parse().unwrap())).collect()
        };
        assert!(nothing_twice(&read(&good)).is_ok());
        for bad in [
            &["create a 1", "create b 1"][..],
            &["create a 1", "start a 1", "die a 1", "start a 1"],
            &["create a 1", "start a 1", "create b 2", "start b 2"],
        ] {
            assert!(nothing_twice(&read(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_line_that_is_not_whole_yet_is_left_for_later() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let line = r#"{"Action":"start","Actor":{"ID":"i","Attributes":{"io.berth.attempt":"2"}}}"#;
        std::fs::write(&log, format!("{line}\n{}", &line[..20])).unwrap();
        let events = read(&log).unwrap();
        assert_eq!((events.len(), events[0].attempt), (1, 2));
    }
}
