//! What every store must do, as one suite.

#[cfg(test)]
mod tests {
    use super::super::embedded::Embedded;
    use super::super::memory::Memory;
    use super::super::{Store, StoreError};
    use berth_proto::ids::Revision;
    use berth_server_core::batching::{Batch, Limits};

    fn put(revision: u64, key: &str, value: &[u8]) -> Batch {
        let ops = vec![(key.as_bytes().to_vec(), Some(value.to_vec()))];
        Batch { revision: Revision(revision), ops }
    }

    fn delete(revision: u64, key: &str) -> Batch {
        Batch { revision: Revision(revision), ops: vec![(key.as_bytes().to_vec(), None)] }
    }

    /// `reopen` gives the same store again, as after a restart.
    fn suite(mut store: Box<dyn Store>, reopen: &dyn Fn(Box<dyn Store>) -> Box<dyn Store>) {
        let large = vec![9; 100_000];
        store.commit(&[put(1, "a/1", b"one"), put(2, "a/2", &large), put(3, "b/1", b"")]).unwrap();
        let gap = store.commit(&[put(5, "x", b"")]).unwrap_err();
        assert!(matches!(gap, StoreError::OutOfOrder { .. }), "a gap is refused");
        store.commit(&[put(4, "a/1", b"two"), delete(5, "b/1")]).unwrap();
        store.commit(&[put(6, "a", b"short"), put(7, "a/10", b"ten")]).unwrap();
        for _ in 0..2 {
            let all: Vec<(String, u64, usize)> = store
                .load(b"")
                .unwrap()
                .into_iter()
                .map(|e| (String::from_utf8(e.key).unwrap(), e.revision.0, e.value.len()))
                .collect();
            let expected = [("a", 6, 5), ("a/1", 4, 3), ("a/10", 7, 3), ("a/2", 2, 100_000)];
            let expected: Vec<(String, u64, usize)> =
                expected.into_iter().map(|(k, r, n)| (k.to_owned(), r, n)).collect();
            assert_eq!(all, expected, "keys in order, values with the revision that wrote them");
            assert_eq!(store.load(b"a/").unwrap().len(), 3, "a prefix is a prefix");
            let newest = |prefix: &str, below: Option<&str>, limit| -> Vec<String> {
                let below = below.map(str::as_bytes);
                let found = store.newest(prefix.as_bytes(), below, limit).unwrap();
                found.into_iter().map(|e| String::from_utf8(e.key).unwrap()).collect()
            };
            assert_eq!(newest("a/", None, 2), ["a/2", "a/10"], "the last come first");
            assert_eq!(newest("a/", Some("a/2"), 9), ["a/10", "a/1"], "and end at the prefix");
            assert_eq!(newest("a/", Some("a"), 9), [""; 0]);
            assert_eq!(newest("b", None, 9), [""; 0]);
            assert_eq!(store.beyond(b"a/", 1, 9).unwrap(), [b"a/1".to_vec(), b"a/10".to_vec()]);
            assert_eq!(store.beyond(b"a/", 1, 1).unwrap(), [b"a/1".to_vec()]);
            assert!(store.beyond(b"a/", 3, 9).unwrap().is_empty());
            assert_eq!(store.revision(), Revision(7));
            store = reopen(store);
        }
        // A value that shrinks leaves nothing of the larger one behind.
        store.commit(&[put(8, "a/2", b"small")]).unwrap();
        store.checkpoint().unwrap();
        store = reopen(store);
        assert_eq!(store.load(b"a/2").unwrap()[0].value, b"small");
        store.commit(&[put(9, "c", b"after a checkpoint")]).unwrap();
        store = reopen(store);
        assert_eq!(store.revision(), Revision(9));
        // A batch of nothing is a revision like any other.
        store.commit(&[Batch { revision: Revision(10), ops: Vec::new() }]).unwrap();
        store = reopen(store);
        assert_eq!((store.revision(), store.load(b"").unwrap().len()), (Revision(10), 5));
        // A batch as large as the store says is read again.
        let limits = store.limits();
        assert!(limits.ops >= Limits::ANY.ops && limits.bytes >= Limits::ANY.bytes);
        let key = |i| format!("full/{i:06}").into_bytes();
        let value = vec![7; limits.bytes / limits.ops - key(0).len()];
        let ops = (0..limits.ops).map(|i| (key(i), Some(value.clone()))).collect();
        store.commit(&[Batch { revision: Revision(11), ops }]).unwrap();
        store = reopen(store);
        assert_eq!(store.load(b"full/").unwrap().len(), limits.ops);
    }

    #[test]
    fn memory_is_a_store() {
        suite(Box::new(Memory::default()), &|store| store);
    }

    #[test]
    fn the_embedded_default_is_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let open = || -> Box<dyn Store> { Box::new(Embedded::open(dir.path()).unwrap().0) };
        suite(open(), &|store| {
            drop(store);
            open()
        });
    }

    #[test]
    fn a_full_store_writes_nothing_and_goes_on() {
        let mut store = Memory::default();
        store.full = true;
        assert!(matches!(Store::commit(&mut store, &[put(1, "a", b"")]), Err(StoreError::Full)));
        store.full = false;
        store.commit(&[put(1, "a", b"")]).unwrap();
    }
}
