//! What is thrown away when the disk is short or nobody has needed it for long.
//!
//! A function of its arguments. What is in use is never thrown away, nor the one version of each
//! deployment that a rollback would need; of the rest the oldest goes first.

use berth_proto::ids::Wall;
use std::collections::{BTreeMap, BTreeSet};

/// Something on the disk that can be brought again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<Id> {
    /// Which.
    pub id: Id,
    /// The deployment it was brought for; `None`: nobody's, e.g. a part of what never became whole.
    pub deployment: Option<String>,
    /// Bytes that come free with it; 0: not known.
    pub bytes: u64,
    /// When it was in use last.
    pub last_used: Wall,
    /// The set names it, a container has it, or it is being brought.
    pub in_use: bool,
}

/// What an eviction goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The time.
    pub now: Wall,
    /// What was not used for longer goes, whether or not the disk is short.
    pub keep_unused_ms: u64,
    /// Bytes the disk is short of; 0: it is not.
    pub short_bytes: u64,
    /// Deployments of the current set: these may be rolled back.
    pub deployments: BTreeSet<String>,
}

/// What goes, in order. Items are of one kind: each kind has its own version to roll back to.
#[must_use]
pub fn evict<Id: Ord + Clone>(items: &[Item<Id>], rules: &Rules) -> Vec<Id> {
    let mut unused: Vec<&Item<Id>> = items.iter().filter(|i| !i.in_use).collect();
    unused.sort_by(|a, b| (a.last_used, &a.id).cmp(&(b.last_used, &b.id)));
    // The newest unused one of each deployment that is still there is what it would go back to.
    let mut rollback: BTreeMap<&str, &Id> = BTreeMap::new();
    for item in &unused {
        if let Some(deployment) = &item.deployment
            && rules.deployments.contains(deployment)
        {
            rollback.insert(deployment, &item.id);
        }
    }
    let mut short = rules.short_bytes;
    let mut out = Vec::new();
    for item in unused {
        if rollback.values().any(|id| **id == item.id) {
            continue;
        }
        let age_ms = u64::try_from(rules.now.0.saturating_sub(item.last_used.0)).unwrap_or(0);
        if short > 0 || age_ms > rules.keep_unused_ms {
            short = short.saturating_sub(item.bytes);
            out.push(item.id.clone());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(id: u32, deployment: Option<&str>, last_used: i64, in_use: bool) -> Item<u32> {
        let deployment = deployment.map(str::to_owned);
        Item { id, deployment, bytes: 10, last_used: Wall(last_used), in_use }
    }

    fn rules(short_bytes: u64) -> Rules {
        Rules {
            now: Wall(1_000),
            keep_unused_ms: 500,
            short_bytes,
            deployments: ["iris".to_owned()].into(),
        }
    }

    #[test]
    fn the_oldest_goes_first_and_no_more_than_is_short() {
        let items =
            [item(1, None, 700, false), item(2, None, 600, false), item(3, None, 800, false)];
        assert_eq!(evict(&items, &rules(0)), Vec::<u32>::new());
        assert_eq!(evict(&items, &rules(5)), [2]);
        assert_eq!(evict(&items, &rules(15)), [2, 1]);
    }

    #[test]
    fn what_a_rollback_needs_stays_until_its_deployment_is_gone() {
        let items = [
            item(1, Some("iris"), 100, false),
            item(2, Some("iris"), 200, false),
            item(3, Some("iris"), 300, true),
            item(4, Some("gone"), 200, false),
        ];
        assert_eq!(evict(&items, &rules(1_000)), [1, 4]);
        let none = Rules { deployments: BTreeSet::new(), ..rules(0) };
        assert_eq!(evict(&items, &none), [1, 2, 4]);
    }

    proptest! {
        #[test]
        fn what_is_in_use_never_goes(
            all in prop::collection::vec((0_u8..3, -5_000_i64..2_000, any::<bool>()), 0..30),
            short: u64,
        ) {
            let names = [None, Some("iris"), Some("gone")];
            let items: Vec<_> = all
                .iter()
                .enumerate()
                .map(|(i, (d, t, used))| item(i as u32, names[usize::from(*d)], *t, *used))
                .collect();
            let out = evict(&items, &rules(short));
            prop_assert!(out.iter().all(|id| !items[*id as usize].in_use));
            let left = |i: &&Item<u32>| i.deployment.as_deref() == Some("iris") && !i.in_use;
            let kept = items.iter().filter(left).filter(|i| !out.contains(&i.id)).count();
            prop_assert!(kept >= 1 || !items.iter().any(|i| left(&i)));
        }
    }
}
