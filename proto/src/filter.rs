//! Filters of lists: a subset of AIP-160, parsed once and matched without I/O.
//!
//! ```text
//! filter = term { "AND" term }
//! term   = field ( "=" | "!=" ) value     equal, not equal
//!        | field ":" "*"                  present and not empty
//! field  = name of a field the call documents, or labels.KEY
//! value  = bare word, or text in double quotes (\" and \\ stand for " and \)
//! ```
//!
//! A `*` at the beginning or the end of a value stands for any text there. Nothing else of AIP-160 is
//! understood: OR, NOT, parentheses and comparisons are refused with their place, never ignored. A
//! filter that was parsed names only fields its list has.

use std::fmt;

/// Longest filter, in bytes: what people write by hand, thirty times over.
pub const MAX_BYTES: usize = 2048;
/// Most terms: each one is looked at for every item of a list.
pub const MAX_TERMS: usize = 32;

/// Why a text is not a filter, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at character {at}: {why}")]
pub struct InvalidFilter {
    /// Which character, counted from 1.
    pub at: usize,
    /// What is wrong there.
    pub why: Why,
}

/// What is wrong with a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Too long.
    #[error("a filter has at most {MAX_BYTES} bytes")]
    TooLong,
    /// Too many terms.
    #[error("a filter has at most {MAX_TERMS} terms")]
    TooManyTerms,
    /// A field's name should stand here.
    #[error("the name of a field is missing")]
    FieldMissing,
    /// A field that the list does not have.
    #[error("there is no field \"{field}\" to filter by; there are {known}")]
    FieldUnknown {
        /// What was written.
        field: String,
        /// What could have been.
        known: String,
    },
    /// An operator should stand here.
    #[error("=, != or :* must follow a field")]
    OperatorMissing,
    /// A value should stand here.
    #[error("a value is missing")]
    ValueMissing,
    /// `:` with something else than `*`.
    #[error("only :* (the field is set) is understood after a colon")]
    OnlyPresence,
    /// A quote that is not closed.
    #[error("the quoted text that begins here does not end")]
    Unclosed,
    /// A `*` within a value.
    #[error("* may stand at the beginning or the end of a value only")]
    InnerStar,
    /// Something else than `AND` between terms.
    #[error("terms are joined by AND only; OR, NOT and parentheses are not understood")]
    OnlyAnd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Is(Pattern),
    IsNot(Pattern),
    Present,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    text: String,
    open_start: bool,
    open_end: bool,
}

impl Pattern {
    fn matches(&self, value: &str) -> bool {
        match (self.open_start, self.open_end) {
            (false, false) => value == self.text,
            (true, false) => value.ends_with(&self.text),
            (false, true) => value.starts_with(&self.text),
            (true, true) => value.contains(&self.text),
        }
    }
}

/// A filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    terms: Vec<(String, Test)>,
}

impl Filter {
    /// Reads a filter of a list that has the fields `known`; `labels` among them stands for every
    /// `labels.KEY`. The empty text matches everything.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, InvalidFilter> {
        let mut reader = Reader { text, at: 0 };
        if text.len() > MAX_BYTES {
            return Err(reader.wrong(Why::TooLong));
        }
        let mut terms = Vec::new();
        reader.skip_space();
        while !reader.rest().is_empty() {
            if !terms.is_empty() {
                let start = reader.at;
                if reader.word() != "AND" {
                    reader.at = start;
                    return Err(reader.wrong(Why::OnlyAnd));
                }
                reader.skip_space();
            }
            if terms.len() == MAX_TERMS {
                return Err(reader.wrong(Why::TooManyTerms));
            }
            terms.push(reader.term(known)?);
            reader.skip_space();
        }
        Ok(Self { terms })
    }

    /// Whether an item matches; `field` gives the value of a field (`labels.KEY` for a label), `None`
    /// when it has none. What is not there equals nothing and differs from everything.
    pub fn matches<'a>(&self, mut field: impl FnMut(&str) -> Option<&'a str>) -> bool {
        self.terms.iter().all(|(name, test)| {
            let value = field(name);
            match test {
                Test::Is(pattern) => value.is_some_and(|v| pattern.matches(v)),
                Test::IsNot(pattern) => !value.is_some_and(|v| pattern.matches(v)),
                Test::Present => value.is_some_and(|v| !v.is_empty()),
            }
        })
    }

    /// Whether it matches everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn wrong(&self, why: Why) -> InvalidFilter {
        let before = self.text.get(..self.at).unwrap_or_default();
        InvalidFilter { at: before.chars().count() + 1, why }
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let stop = |c: char| c.is_whitespace() || "=!:<>()\",".contains(c);
        let word = &rest[..rest.find(stop).unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    fn term(&mut self, known: &[&str]) -> Result<(String, Test), InvalidFilter> {
        let start = self.at;
        let field = self.word().to_owned();
        if field.is_empty() {
            let why = if self.rest().starts_with('(') { Why::OnlyAnd } else { Why::FieldMissing };
            return Err(self.wrong(why));
        }
        if field == "NOT" || field == "OR" || field.starts_with('-') {
            self.at = start;
            return Err(self.wrong(Why::OnlyAnd));
        }
        let is_known = match field.strip_prefix("labels.") {
            Some(key) => !key.is_empty() && known.contains(&"labels"),
            None => field != "labels" && known.contains(&field.as_str()),
        };
        if !is_known {
            self.at = start;
            let name =
                |k: &&str| if *k == "labels" { "labels.KEY".to_owned() } else { (*k).to_owned() };
            let known = known.iter().map(name).collect::<Vec<_>>().join(", ");
            return Err(self.wrong(Why::FieldUnknown { field, known }));
        }
        self.skip_space();
        if self.take(":") {
            self.skip_space();
            if !self.take("*") {
                return Err(self.wrong(Why::OnlyPresence));
            }
            return Ok((field, Test::Present));
        }
        let equal = match (self.take("!="), self.take("=")) {
            (true, _) => false,
            (false, true) => true,
            (false, false) => return Err(self.wrong(Why::OperatorMissing)),
        };
        self.skip_space();
        let pattern = self.value()?;
        Ok((field, if equal { Test::Is(pattern) } else { Test::IsNot(pattern) }))
    }

    fn value(&mut self) -> Result<Pattern, InvalidFilter> {
        let start = self.at;
        let text = if self.take("\"") {
            self.quoted(start)?
        } else {
            let word = self.word();
            if word.is_empty() {
                return Err(self.wrong(Why::ValueMissing));
            }
            word.to_owned()
        };
        let (open_start, rest) = match text.strip_prefix('*') {
            Some(rest) => (true, rest),
            None => (false, text.as_str()),
        };
        let (open_end, rest) = match rest.strip_suffix('*') {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        if rest.contains('*') {
            self.at = start;
            return Err(self.wrong(Why::InnerStar));
        }
        Ok(Pattern { text: rest.to_owned(), open_start, open_end })
    }

    fn quoted(&mut self, start: usize) -> Result<String, InvalidFilter> {
        let mut text = String::new();
        let mut escaped = false;
        for c in self.rest().chars() {
            self.at += c.len_utf8();
            match (escaped, c) {
                (false, '"') => return Ok(text),
                (false, '\\') => escaped = true,
                (true | false, c) => {
                    escaped = false;
                    text.push(c);
                }
            }
        }
        self.at = start;
        Err(self.wrong(Why::Unclosed))
    }
}

impl fmt::Display for Filter {
    /// As it could have been written; equal filters give equal texts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (field, test)) in self.terms.iter().enumerate() {
            if i > 0 {
                f.write_str(" AND ")?;
            }
            let (operator, pattern) = match test {
                Test::Is(pattern) => ("=", pattern),
                Test::IsNot(pattern) => ("!=", pattern),
                Test::Present => {
                    write!(f, "{field}:*")?;
                    continue;
                }
            };
            let text = pattern.text.replace('\\', "\\\\").replace('"', "\\\"");
            let star = |open: bool| if open { "*" } else { "" };
            let (before, after) = (star(pattern.open_start), star(pattern.open_end));
            write!(f, "{field}{operator}\"{before}{text}{after}\"")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: &[&str] = &["name", "namespace", "labels"];

    fn item(field: &str) -> Option<&'static str> {
        match field {
            "name" => Some("iris-1"),
            "namespace" => Some("default"),
            "labels.zone" => Some("eu west"),
            "labels.empty" => Some(""),
            _ => None,
        }
    }

    #[test]
    fn terms_mean_what_is_documented() {
        for (text, expected) in [
            ("", true),
            ("   ", true),
            ("name = iris-1", true),
            ("name=\"iris-1\" AND namespace=default", true),
            ("name=iris-1 AND namespace=other", false),
            ("name != iris-1", false),
            ("name = \"iris*\"", true),
            ("name = *-1", true),
            ("name = *ris*", true),
            ("name = *x*", false),
            ("labels.zone = \"eu west\"", true),
            ("labels.gone = x", false),
            ("labels.gone != x", true),
            ("labels.zone:*", true),
            ("labels.empty:*", false),
            ("labels.gone : *", false),
        ] {
            let filter = Filter::parse(text, KNOWN).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(filter.matches(item), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, at, word) in [
            ("nam = x", 1, "there are name, namespace, labels.KEY"),
            ("name", 5, "must follow a field"),
            ("name > x", 6, "must follow a field"),
            ("name = ", 8, "a value is missing"),
            ("name = \"x", 8, "does not end"),
            ("name = a*b", 8, "beginning or the end"),
            ("name=x OR name=y", 8, "joined by AND only"),
            ("name=x name=y", 8, "joined by AND only"),
            ("NOT name=x", 1, "joined by AND only"),
            ("(name=x)", 1, "joined by AND only"),
            ("name=x AND", 11, "name of a field"),
            ("name:x", 6, "only :*"),
            ("labels = x", 1, "no field \"labels\""),
            ("é = x", 1, "no field"),
        ] {
            let error = Filter::parse(text, KNOWN).unwrap_err();
            assert_eq!(error.at, at, "{text}: {error}");
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
        let long = vec!["name=x"; MAX_TERMS + 1].join(" AND ");
        assert_eq!(Filter::parse(&long, KNOWN).unwrap_err().why, Why::TooManyTerms);
        assert_eq!(Filter::parse(&" ".repeat(MAX_BYTES + 1), KNOWN).unwrap_err().why, Why::TooLong);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_and_what_is_printed_reads_the_same(text in ".{0,60}") {
            if let Ok(filter) = Filter::parse(&text, KNOWN) {
                prop_assert_eq!(Filter::parse(&filter.to_string(), KNOWN).unwrap(), filter);
            }
        }

        #[test]
        fn a_quoted_value_matches_itself_only(value in "[^*]{0,20}", other in "[^*]{0,20}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let filter = Filter::parse(&format!("name=\"{quoted}\""), KNOWN).unwrap();
            prop_assert!(filter.matches(|_| Some(&value)));
            prop_assert_eq!(filter.matches(|_| Some(&other)), value == other);
        }
    }
}
