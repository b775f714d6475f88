//! Requirements on labels: `key=value`, `key!=value`, `key in (a, b)`, `key notin (a, b)`, `key`, `!key`.

use crate::convert::Problems;
use crate::values::Requirement;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// Why a text is not a requirement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSelector {
    /// The form is another.
    #[error(
        "\"{0}\" is not a requirement; write key=value, key!=value, key in (a, b), \
         key notin (a, b), key or !key"
    )]
    Form(String),
    /// A key has another form.
    #[error("label key \"{0}\" must be 1 to 63 of letters, digits, '-', '_', '.' and '/'")]
    Key(String),
    /// A value has another form.
    #[error("label value \"{0}\" must be at most 63 of letters, digits, '-', '_' and '.'")]
    Value(String),
}

/// Checks a label's key.
///
/// # Errors
/// When it has another form.
pub fn check_key(key: &str) -> Result<(), InvalidSelector> {
    let good = (1..=63).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    if good { Ok(()) } else { Err(InvalidSelector::Key(key.to_owned())) }
}

/// Checks a label's value.
///
/// # Errors
/// When it has another form.
pub fn check_value(value: &str) -> Result<(), InvalidSelector> {
    let good = value.len() <= 63
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if good { Ok(()) } else { Err(InvalidSelector::Value(value.to_owned())) }
}

/// Labels of one object: what people tell apart by hand, many times over.
pub const MAX_LABELS: usize = 64;

/// Checks labels as somebody writes them; paths of problems begin with `path`.
pub fn check_labels(labels: &BTreeMap<String, String>, path: &str, p: &mut Problems) {
    if labels.len() > MAX_LABELS {
        p.add(path, format!("has {} entries; at most {MAX_LABELS} are allowed", labels.len()));
    }
    for (key, value) in labels {
        if let Err(error) = check_key(key).and_then(|()| check_value(value)) {
            p.add(format!("{path}.{key}"), error.to_string());
        }
    }
}

impl FromStr for Requirement {
    type Err = InvalidSelector;

    fn from_str(text: &str) -> Result<Self, InvalidSelector> {
        let text = text.trim();
        let form = || InvalidSelector::Form(text.to_owned());
        if let Some(key) = text.strip_prefix('!') {
            check_key(key.trim())?;
            return Ok(Self::Absent(key.trim().to_owned()));
        }
        if let Some((key, value)) = text.split_once("!=") {
            return pair(key, value, Self::NotEquals);
        }
        if let Some((key, value)) = text.split_once('=') {
            return pair(key, value.strip_prefix('=').unwrap_or(value), Self::Equals);
        }
        if let Some(open) = text.find('(') {
            let list = text[open + 1..].strip_suffix(')').ok_or_else(form)?;
            let (key, word) = text[..open].trim().split_once(' ').ok_or_else(form)?;
            check_key(key)?;
            let mut values = BTreeSet::new();
            for value in list.split(',').map(str::trim) {
                check_value(value)?;
                values.insert(value.to_owned());
            }
            return match word.trim() {
                "in" => Ok(Self::In(key.to_owned(), values)),
                "notin" => Ok(Self::NotIn(key.to_owned(), values)),
                _ => Err(form()),
            };
        }
        if text.contains(' ') {
            return Err(form());
        }
        check_key(text)?;
        Ok(Self::Exists(text.to_owned()))
    }
}

/// Several requirements, separated by commas (but not those inside parentheses).
///
/// # Errors
/// When one of them has another form.
pub fn parse_all(text: &str) -> Result<Vec<Requirement>, InvalidSelector> {
    let (mut all, mut depth, mut from) = (Vec::new(), 0_u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                all.push(text[from..at].parse()?);
                from = at + 1;
            }
            _ => {}
        }
    }
    all.push(text[from..].parse()?);
    Ok(all)
}

fn pair(
    key: &str,
    value: &str,
    make: impl FnOnce(String, String) -> Requirement,
) -> Result<Requirement, InvalidSelector> {
    let (key, value) = (key.trim(), value.trim());
    check_key(key)?;
    check_value(value)?;
    Ok(make(key.to_owned(), value.to_owned()))
}

fn list(values: &BTreeSet<String>) -> String {
    values.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equals(key, value) => write!(f, "{key}={value}"),
            Self::NotEquals(key, value) => write!(f, "{key}!={value}"),
            Self::In(key, values) => write!(f, "{key} in ({})", list(values)),
            Self::NotIn(key, values) => write!(f, "{key} notin ({})", list(values)),
            Self::Exists(key) => f.write_str(key),
            Self::Absent(key) => write!(f, "!{key}"),
        }
    }
}

impl Requirement {
    /// Whether labels meet it.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Equals(key, value) => labels.get(key) == Some(value),
            Self::NotEquals(key, value) => labels.get(key) != Some(value),
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Exists(key) => labels.contains_key(key),
            Self::Absent(key) => !labels.contains_key(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_reads_back_and_matches() {
        let labels = BTreeMap::from([("zone".to_owned(), "eu".to_owned())]);
        for (text, holds) in [
            ("zone=eu", true),
            ("zone=us", false),
            ("zone!=us", true),
            ("rack!=1", true),
            ("zone in (eu, us)", true),
            ("rack in (1)", false),
            ("zone notin (us)", true),
            ("rack notin (1)", true),
            ("zone", true),
            ("gpu", false),
            ("!gpu", true),
            ("!zone", false),
        ] {
            let requirement: Requirement = text.parse().unwrap();
            assert_eq!(requirement.to_string(), text);
            assert_eq!(requirement.matches(&labels), holds, "{text}");
        }
        assert_eq!("zone==eu".parse(), Ok(Requirement::Equals("zone".into(), "eu".into())));
    }

    #[test]
    fn several_are_separated_by_commas_outside_of_lists() {
        let all = parse_all("zone in (eu, us),!old , team=vision").unwrap();
        let words: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(words, ["zone in (eu, us)", "!old", "team=vision"]);
        assert!(parse_all("zone=eu,").is_err());
        assert!(parse_all("").is_err());
    }

    #[test]
    fn another_form_is_refused() {
        for bad in ["", "zone in eu", "zone within (eu)", "a b", "ä=1", "a=b c", "zone in (a", "="]
        {
            assert!(bad.parse::<Requirement>().is_err(), "{bad}");
        }
    }
}
