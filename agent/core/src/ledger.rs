//! The set of assignments an agent holds, and whether another may take its place.
//!
//! A set is judged only when it is whole. It is never taken when it is older, nor when it has the
//! number of the one held and another content: each way of going back has a refusal of its own.

use berth_proto::agent::{SetBegin, SetEnd, SetEntry, SetId, SetPage, SetVerdict};
use berth_proto::convert::assignment_body_from_bytes;
use berth_proto::ids::{Digest, Epoch, Generation, ReplicaUid, SetNumber};
use berth_proto::sets::set_digest;
use berth_proto::values::AssignmentBody;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// Entries of a set: ten times what an engine is known to run.
pub const MAX_ENTRIES: usize = 20_000;
/// Bytes of all bodies of a set: a body has a few KiB, and a host few different ones.
pub const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

/// A body as it came, and as it was read.
#[derive(Debug, Clone)]
pub struct Body {
    /// Verbatim.
    pub bytes: Arc<[u8]>,
    /// Read.
    pub value: Arc<AssignmentBody>,
}

/// A whole set.
#[derive(Debug, Clone, Default)]
pub struct HeldSet {
    /// Its number.
    pub number: SetNumber,
    /// Its digest.
    pub digest: String,
    /// Its entries by replica.
    pub entries: BTreeMap<ReplicaUid, SetEntry>,
    /// Bodies by digest.
    pub bodies: BTreeMap<Digest, Body>,
}

impl HeldSet {
    /// The body of an entry.
    #[must_use]
    pub fn body(&self, entry: &SetEntry) -> Option<&Body> {
        self.bodies.get(&entry.body_digest.parse().ok()?)
    }
}

/// What is wanted. No news is not the empty set.
#[derive(Debug, Clone, Default)]
pub enum Wanted {
    /// Nobody has said yet.
    #[default]
    NotYetKnown,
    /// This.
    Set(Arc<HeldSet>),
}

impl Wanted {
    /// The set, if there is one.
    #[must_use]
    pub fn set(&self) -> Option<&Arc<HeldSet>> {
        match self {
            Self::NotYetKnown => None,
            Self::Set(set) => Some(set),
        }
    }
}

/// Whether a set may take the place of the one held.
///
/// # Errors
/// The refusal, by its name on the wire.
pub fn judge(
    held: Option<(SetNumber, &str)>,
    offered: (SetNumber, &str),
) -> Result<SetVerdict, SetVerdict> {
    if let Some((held, _)) = held {
        let older = bug!(OlderSetTaken) && offered.0 < held;
        let generation_alone = bug!(EpochUnasked) && offered.0.generation > held.generation;
        if older || generation_alone {
            return Ok(SetVerdict::Taken);
        }
    }
    if bug!(EpochUnasked) && held.is_some_and(|(held, _)| offered.0.generation < held.generation) {
        return Err(SetVerdict::Older);
    }
    match held {
        None => Ok(SetVerdict::Taken),
        Some((held, _)) if offered.0 > held => Ok(SetVerdict::Taken),
        Some((held, _)) if offered.0 < held => Err(SetVerdict::Older),
        Some((_, digest)) if digest == offered.1 => Ok(SetVerdict::Same),
        Some(_) => Err(SetVerdict::Changed),
    }
}

/// Why a set that came is no set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Pages without a beginning, or an end of another set.
    #[error("the set's messages are out of order")]
    Order,
    /// Not as many entries or bodies as announced, or too many.
    #[error("the set has other counts than announced, or is too large")]
    Counts,
    /// An entry cannot be read.
    #[error("an entry names no replica")]
    Entry,
    /// Its digest is another.
    #[error("the set's digest does not match")]
    Digest,
    /// A body is not here.
    #[error("the body {0} is missing")]
    Body(String),
    /// A body cannot be read.
    #[error("the body {0} cannot be read: {1}")]
    Unreadable(String, String),
}

/// Gathers a set from its messages.
#[derive(Debug, Default)]
pub struct Assembly {
    begun: Option<SetBegin>,
    entries: Vec<SetEntry>,
    bodies: Vec<Vec<u8>>,
    body_bytes: usize,
    broken: Option<Broken>,
}

impl Assembly {
    /// A set begins; what was gathered of another is dropped.
    pub fn begin(&mut self, begin: SetBegin) {
        *self = Self { begun: Some(begin), ..Self::default() };
    }

    /// A page of it.
    pub fn page(&mut self, page: SetPage) {
        if self.begun.is_none() {
            self.broken = Some(Broken::Order);
        }
        self.body_bytes += page.bodies.iter().map(Vec::len).sum::<usize>();
        if self.entries.len() + page.entries.len() > MAX_ENTRIES || self.body_bytes > MAX_BODY_BYTES
        {
            self.broken = Some(Broken::Counts);
            return;
        }
        self.entries.extend(page.entries);
        self.bodies.extend(page.bodies);
    }

    /// The whole set, with the bodies held already for those that were not sent.
    ///
    /// # Errors
    /// When it is not whole.
    pub fn end(&mut self, end: &SetEnd, held: &Wanted) -> Result<HeldSet, Broken> {
        let gathered = std::mem::take(self);
        let begun = gathered.begun.ok_or(Broken::Order)?;
        if let Some(broken) = gathered.broken {
            return Err(broken);
        }
        let id = begun.id.unwrap_or_default();
        if end.id != Some(id) {
            return Err(Broken::Order);
        }
        if gathered.entries.len() != begun.entries as usize
            || gathered.bodies.len() != begun.bodies as usize
        {
            return Err(Broken::Counts);
        }
        if set_digest(&gathered.entries).as_str() != end.digest {
            return Err(Broken::Digest);
        }
        let sent: BTreeMap<Digest, Vec<u8>> =
            gathered.bodies.into_iter().map(|bytes| (Digest::of(&bytes), bytes)).collect();
        build(number(id), end.digest.clone(), gathered.entries, sent, held)
    }
}

/// Puts a set together, reading every body it names.
///
/// # Errors
/// When an entry or a body cannot be read, or a body is missing.
pub fn build(
    number: SetNumber,
    digest: String,
    entries: Vec<SetEntry>,
    mut sent: BTreeMap<Digest, Vec<u8>>,
    held: &Wanted,
) -> Result<HeldSet, Broken> {
    let mut set = HeldSet { number, digest, ..HeldSet::default() };
    for entry in entries {
        let replica: ReplicaUid = entry.replica_uid.parse().map_err(|_| Broken::Entry)?;
        let missing = || Broken::Body(entry.body_digest.clone());
        let digest: Digest = entry.body_digest.parse().map_err(|_| missing())?;
        if let Entry::Vacant(place) = set.bodies.entry(digest.clone()) {
            let body = match sent.remove(&digest) {
                Some(bytes) => {
                    let value = assignment_body_from_bytes(&bytes).map_err(|problems| {
                        Broken::Unreadable(digest.to_string(), problems.to_string())
                    })?;
                    Body { bytes: bytes.into(), value: Arc::new(value) }
                }
                None => held
                    .set()
                    .filter(|_| !bug!(HeldBodiesForgotten))
                    .and_then(|set| set.bodies.get(&digest))
                    .cloned()
                    .ok_or_else(missing)?,
            };
            place.insert(body);
        }
        set.entries.insert(replica, entry);
    }
    Ok(set)
}

/// From the wire.
#[must_use]
pub fn number(id: SetId) -> SetNumber {
    SetNumber { epoch: Epoch(id.epoch), generation: Generation(id.generation) }
}

/// To the wire.
#[must_use]
pub fn set_id(number: SetNumber) -> SetId {
    SetId { epoch: number.epoch.0, generation: number.generation.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, generation: u64) -> SetNumber {
        SetNumber { epoch: Epoch(epoch), generation: Generation(generation) }
    }

    #[test]
    fn never_goes_backwards() {
        use SetVerdict::{Changed, Older, Same, Taken};
        let held = Some((at(2, 5), "d"));
        assert_eq!(judge(None, (at(0, 0), "x")), Ok(Taken));
        assert_eq!(judge(held, (at(2, 6), "x")), Ok(Taken));
        assert_eq!(judge(held, (at(3, 0), "x")), Ok(Taken));
        assert_eq!(judge(held, (at(2, 5), "d")), Ok(Same));
        assert_eq!(judge(held, (at(2, 4), "d")), Err(Older));
        assert_eq!(judge(held, (at(1, 99), "x")), Err(Older));
        assert_eq!(judge(held, (at(2, 5), "x")), Err(Changed));
    }

    #[test]
    fn a_set_that_is_not_whole_is_refused() {
        let id = Some(SetId { epoch: 1, generation: 1 });
        let entry = SetEntry {
            replica_uid: "r".into(),
            body_digest: Digest::of(b"x").to_string(),
            ..SetEntry::default()
        };
        let end = SetEnd { id, digest: set_digest(std::slice::from_ref(&entry)).to_string() };
        let begin = SetBegin { id, entries: 1, bodies: 0 };
        let page = SetPage { entries: vec![entry], bodies: vec![] };
        let none = Wanted::NotYetKnown;

        let mut a = Assembly::default();
        assert_eq!(a.end(&end, &none).unwrap_err(), Broken::Order);
        a.begin(begin);
        assert_eq!(a.end(&end, &none).unwrap_err(), Broken::Counts);
        a.begin(begin);
        a.page(page.clone());
        let other = SetEnd { digest: "sha256:0".into(), ..end.clone() };
        assert_eq!(a.end(&other, &none).unwrap_err(), Broken::Digest);
        a.begin(begin);
        a.page(page);
        assert!(matches!(a.end(&end, &none).unwrap_err(), Broken::Body(_)));
    }

    #[test]
    fn the_empty_set_is_a_set() {
        let id = Some(SetId { epoch: 1, generation: 1 });
        let mut a = Assembly::default();
        a.begin(SetBegin { id, entries: 0, bodies: 0 });
        let end = SetEnd { id, digest: set_digest(&[]).to_string() };
        assert!(a.end(&end, &Wanted::NotYetKnown).unwrap().entries.is_empty());
    }
}
