//! What both ends compute over a host's set of assignments.

use crate::agent::SetEntry;
use crate::ids::Digest;
use prost::Message as _;
use sha2::Digest as _;

/// The digest of a set: SHA-256 over the entries' encoded bytes, each behind its length, in order
/// of `replica_uid`, whatever order they are given in.
#[must_use]
pub fn set_digest(entries: &[SetEntry]) -> Digest {
    let mut order: Vec<&SetEntry> = entries.iter().collect();
    order.sort_by(|a, b| a.replica_uid.cmp(&b.replica_uid));
    let mut hash = sha2::Sha256::new();
    for entry in order {
        hash.update(entry.encode_length_delimited_to_vec());
    }
    Digest::from_sha256(&hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(replica: &str, slot: u32) -> SetEntry {
        SetEntry { replica_uid: replica.into(), slot, ..SetEntry::default() }
    }

    #[test]
    fn a_set_has_one_digest_in_any_order_and_another_for_any_change() {
        let set = [entry("b", 1), entry("a", 0)];
        let turned = [entry("a", 0), entry("b", 1)];
        assert_eq!(set_digest(&set), set_digest(&turned));
        assert_ne!(set_digest(&set), set_digest(&set[..1]));
        assert_ne!(set_digest(&set), set_digest(&[entry("b", 2), entry("a", 0)]));
        assert_ne!(set_digest(&[]), set_digest(&set));
    }
}
