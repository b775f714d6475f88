//! Identifiers, names and counters, each a type of its own.
//!
//! A string that was not checked cannot be taken for a uid, nor one kind's uid for another's. clap,
//! the conversions and configuration all go through the same [`FromStr`], so a
//! name is checked in one place and its message is written once.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// A uid has another form.
    #[error("{kind} must be 1 to 64 of a-z, 0-9 and '-'")]
    Uid {
        /// What kind of uid was read.
        kind: &'static str,
    },
    /// A name has another form.
    #[error(
        "{kind} must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
    )]
    Name {
        /// What kind of name was read.
        kind: &'static str,
    },
    /// A digest has another form.
    #[error("a digest must be 'sha256:' and 64 of 0-9a-f")]
    Digest,
}

fn is_uid(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Whether `text` is 1 to 63 of `a-z0-9-`, beginning and ending with a letter or digit.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:ident, $variant:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if $check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(InvalidId::$variant { kind: $kind })
                }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(from)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id!(
    /// A host's uid: made by the server at the join, never reused.
    HostUid, "a host uid", is_uid, Uid
);
text_id!(
    /// A deployment's uid.
    DeploymentUid, "a deployment uid", is_uid, Uid
);
text_id!(
    /// A replica's uid.
    ReplicaUid, "a replica uid", is_uid, Uid
);
text_id!(
    /// A model's uid.
    ModelUid, "a model uid", is_uid, Uid
);
text_id!(
    /// A user's uid.
    UserUid, "a user uid", is_uid, Uid
);
text_id!(
    /// The cluster's uid: part of every certificate and container label.
    ClusterUid, "a cluster uid", is_uid, Uid
);
text_id!(
    /// One join of a host: a new one with every join.
    InstanceId, "a host instance", is_uid, Uid
);
text_id!(
    /// A name people give: of a host, deployment, user...
    Name, "a name", is_name, Name
);
text_id!(
    /// A namespace's name.
    Namespace, "a namespace", is_name, Name
);

impl Default for Namespace {
    fn default() -> Self {
        Self("default".into())
    }
}

/// `sha256:<64 hex>`: the digest of some bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct Digest(Arc<str>);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes))).into())
    }
    /// From a finished SHA-256.
    #[must_use]
    pub fn from_sha256(sum: &[u8; 32]) -> Self {
        Self(format!("sha256:{}", hex::encode(sum)).into())
    }
    /// `sha256:<hex>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The 64 hex digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
    /// The first 12 hex digits, for people and tags.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}
impl FromStr for Digest {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let hex = text.strip_prefix("sha256:").ok_or(InvalidId::Digest)?;
        let good = hex.len() == 64
            && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if good { Ok(Self(text.into())) } else { Err(InvalidId::Digest) }
    }
}
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.0)
    }
}
impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default,
            serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}
counter!(
    /// Number of a write to the ledger.
    Revision
);
counter!(
    /// Number of a host's set of assignments.
    Generation
);
counter!(
    /// Raised by every restore, fallback and change of leader.
    Epoch
);
counter!(
    /// Number of a deployment's release: 1, 2, 3...; 0 before the first.
    ReleaseNumber
);

/// What orders the sets of a host: first the epoch, then the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SetNumber {
    /// Raised by restore, fallback and change of leader.
    pub epoch: Epoch,
    /// Grows with every change of the host's set.
    pub generation: Generation,
}

/// Monotonic time since some start, in milliseconds: for every duration and deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mono(pub u64);

impl Mono {
    /// This time plus `ms` milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
    /// Milliseconds from `earlier` to this; 0 when it is not earlier.
    #[must_use]
    pub fn since_ms(self, earlier: Mono) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Wall clock, in milliseconds since 1970: for display and certificates only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Wall(pub i64);

/// Both kinds of time, as a step machine is told them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// For durations.
    pub mono: Mono,
    /// For display.
    pub wall: Wall,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_at_both_edges() {
        for good in ["a", "iris", "a-b-1", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_lower_case_sha256_only() {
        let good = Digest::of(b"");
        assert_eq!(
            good.as_str(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(good.as_str().parse::<Digest>(), Ok(good.clone()));
        assert!(good.as_str().to_uppercase().parse::<Digest>().is_err());
        assert!(format!("sha512:{}", good.hex()).parse::<Digest>().is_err());
        assert!(good.as_str()[..70].parse::<Digest>().is_err());
    }

    #[test]
    fn sets_are_ordered_by_epoch_before_generation() {
        let set = |epoch, generation| SetNumber {
            epoch: Epoch(epoch),
            generation: Generation(generation),
        };
        assert!(set(2, 1) > set(1, 9));
        assert!(set(2, 2) > set(2, 1));
    }
}
