//! A model's archive makes files and folders inside its folder, within its bounds, or is refused.
#![no_main]

use berth_agent::fetch::archive::{Most, unpack};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

const MOST: Most = Most { bytes: 1 << 20, room_bytes: 1 << 20 };

/// Bytes and number of what is in a folder.
fn held(folder: &Path) -> (u64, usize) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        assert!(kind.is_dir() || kind.is_file(), "{:?}", entry.path());
        sum.1 += 1;
        if kind.is_dir() {
            let (bytes, number) = held(&entry.path());
            sum = (sum.0 + bytes, sum.1 + number);
        } else {
            sum.0 += entry.metadata().unwrap().len();
        }
    }
    sum
}

fuzz_target!(|bytes: &[u8]| {
    // In memory where there is such a place: a disk would be the slow part.
    let outer = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let mut files = 0;
    let _ = unpack(bytes, MOST, &folder, &mut files);
    assert!(held(&folder).0 <= MOST.bytes);
    assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 1, "it left its folder");
});
