//! Repository names, tags and references: what a request may name, checked once.
//!
//! A value of these types is also a safe path below the registry's folder: no segment is empty,
//! begins with a dot or an underscore (ours do), or holds a slash, so nothing can leave the folder
//! or meet a folder of ours.

use super::errors::RegistryError;
use berth_proto::ids::Digest;
use std::fmt;
use std::sync::Arc;

/// Longest name of a repository; file systems take 255 bytes in one segment.
const NAME_MAX: usize = 255;
/// Deepest name; bounds the folders one push can make.
const SEGMENTS_MAX: usize = 8;

/// A repository's name, e.g. `models/iris`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoName(Arc<str>);

impl RepoName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`RegistryError::NameInvalid`].
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        let good = text.len() <= NAME_MAX
            && text.split('/').count() <= SEGMENTS_MAX
            && text.split('/').all(is_segment);
        if good { Ok(Self(text.into())) } else { Err(RegistryError::NameInvalid(shown(text))) }
    }
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose a repository is. Its name alone says it, so that a right never depends on what somebody
/// else has pushed or deployed meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// Everybody's to read: the runtimes that serve the models of all.
    Shared,
    /// A namespace's.
    Namespace(&'a str),
}

impl RepoName {
    /// Whose it is: `runtimes/...` is shared, `models/...` and names of one segment are of the
    /// namespace `default`, and all others of the namespace that is their first segment.
    #[must_use]
    pub fn place(&self) -> Place<'_> {
        match self.0.split_once('/') {
            None | Some(("models", _)) => Place::Namespace("default"),
            Some(("runtimes", _)) => Place::Shared,
            Some((namespace, _)) => Place::Namespace(namespace),
        }
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_segment(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !word(*first) || !word(*last) {
        return false;
    }
    bytes.split(|b| word(*b)).all(|between| {
        matches!(between, b"" | b"." | b"_" | b"__") || between.iter().all(|b| *b == b'-')
    })
}

/// A tag's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Arc<str>);

impl Tag {
    /// Checks a tag.
    ///
    /// # Errors
    /// [`RegistryError::TagInvalid`].
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let bytes = text.as_bytes();
        let good = bytes.len() <= 128
            && bytes.first().is_some_and(|b| word(*b))
            && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'));
        if good { Ok(Self(text.into())) } else { Err(RegistryError::TagInvalid(shown(text))) }
    }
    /// The tag.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A movable name.
    Tag(Tag),
    /// The content itself.
    Digest(Digest),
}

impl Reference {
    /// Checks a reference; whatever has a `:` is a digest, as no tag can have one.
    ///
    /// # Errors
    /// [`RegistryError::TagInvalid`], [`RegistryError::DigestInvalid`],
    /// [`RegistryError::DigestUnsupported`].
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        if text.contains(':') {
            parse_digest(text).map(Self::Digest)
        } else {
            Tag::parse(text).map(Self::Tag)
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// Checks a digest, telling an algorithm that is not kept here from nonsense.
///
/// # Errors
/// [`RegistryError::DigestInvalid`], [`RegistryError::DigestUnsupported`].
pub fn parse_digest(text: &str) -> Result<Digest, RegistryError> {
    if let Some((algorithm, _)) = text.split_once(':')
        && matches!(algorithm, "sha512" | "sha384" | "blake3")
    {
        return Err(RegistryError::DigestUnsupported(algorithm.to_owned()));
    }
    text.parse().map_err(|_| RegistryError::DigestInvalid(shown(text)))
}

/// Text of a client as it may stand in a message: bounded, without control characters.
fn shown(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_specification_are_taken() {
        for name in ["a", "models/iris", "a.b/c_d/e__f/g-h/i--j", "0", "a/b/c/d/e/f/g/h"] {
            assert!(RepoName::parse(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn no_name_leaves_the_folder_or_meets_ours() {
        let long = "a".repeat(256);
        for name in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "..",
            "a/../b",
            ".a",
            "a.",
            "a..b",
            "_manifests",
            "a/_blobs",
            "A",
            "a b",
            "a\0b",
            "a___b",
            "a-",
            "ä",
            "a%2fb",
            "a\\b",
            "a/b/c/d/e/f/g/h/i",
            &long,
        ] {
            assert!(RepoName::parse(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_name_says_whose_the_repository_is() {
        for (name, place) in [
            ("app", Place::Namespace("default")),
            ("models/iris", Place::Namespace("default")),
            ("models/edge/iris", Place::Namespace("default")),
            ("edge/models/iris", Place::Namespace("edge")),
            ("edge/app", Place::Namespace("edge")),
            ("default/app", Place::Namespace("default")),
            ("runtimes/onnx", Place::Shared),
            ("runtimes", Place::Namespace("default")),
        ] {
            assert_eq!(RepoName::parse(name).unwrap().place(), place, "{name}");
        }
    }

    #[test]
    fn tags_are_bounded_and_never_hidden() {
        let long = "a".repeat(128);
        for tag in ["latest", "1.2.3", "_x", "A-b_c.d", &long] {
            assert!(Tag::parse(tag).is_ok(), "{tag}");
        }
        let longer = "a".repeat(129);
        for tag in ["", ".x", "-x", "..", "a/b", "a:b", "a b", "é", &longer] {
            assert!(Tag::parse(tag).is_err(), "{tag:?}");
        }
    }

    #[test]
    fn other_algorithms_are_told_from_nonsense() {
        let sha512 = format!("sha512:{}", "0".repeat(128));
        assert!(matches!(parse_digest(&sha512), Err(RegistryError::DigestUnsupported(_))));
        assert!(matches!(parse_digest("sha256:zz"), Err(RegistryError::DigestInvalid(_))));
        assert!(matches!(
            Reference::parse(&format!("sha256:{}", "A".repeat(64))),
            Err(RegistryError::DigestInvalid(_))
        ));
    }
}
