//! Small languages and names: what is taken is written as text that is taken for the same.
#![no_main]

use berth_proto::filter::Filter;
use berth_proto::ids::{Digest, Name};
use berth_proto::quantity;
use berth_proto::tls::SpiffeId;
use berth_proto::values::Requirement;
use berth_server::registry::names::{Reference, RepoName, Tag};
use libfuzzer_sys::fuzz_target;
use std::fmt::{Debug, Display};
use std::str::FromStr;

fn same<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let shown = value.to_string();
        assert_eq!(shown.parse::<T>().ok().as_ref(), Some(&value), "{text:?} {shown:?}");
    }
}

fuzz_target!(|text: &str| {
    same::<Requirement>(text);
    same::<Digest>(text);
    same::<Name>(text);
    same::<SpiffeId>(text);
    if let Ok(name) = RepoName::parse(text) {
        assert_eq!(RepoName::parse(name.as_str()).ok(), Some(name.clone()));
        // It becomes a folder.
        assert!(!name.as_str().split('/').any(|part| part.is_empty() || part.starts_with('.')));
        let _ = name.place();
    }
    let _ = (Tag::parse(text), Reference::parse(text));
    let _ = Filter::parse(text, &["name", "labels"]);
    if let Ok(millis) = quantity::parse_cpu(text) {
        assert_eq!(quantity::parse_cpu(&quantity::format_cpu(millis)).ok(), Some(millis));
    }
    if let Ok(bytes) = quantity::parse_bytes(text) {
        assert_eq!(quantity::parse_bytes(&quantity::format_bytes(bytes)).ok(), Some(bytes));
        let _ = quantity::human_bytes(bytes);
    }
    if let Ok(ms) = quantity::parse_duration_ms(text) {
        let shown = quantity::format_duration_ms(ms);
        assert_eq!(quantity::parse_duration_ms(&shown).ok(), Some(ms), "{text:?} {shown:?}");
    }
});
