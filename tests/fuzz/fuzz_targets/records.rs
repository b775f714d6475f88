//! What is stored under any key is read or refused; what was read is written such that it reads the
//! same, and a ledger of it loads.
#![no_main]

use berth_proto::ids::Revision;
use berth_server_core::change::Change;
use berth_server_core::view::View;
use libfuzzer_sys::fuzz_target;

/// In the order that the seeds count on.
const KINDS: [&str; 15] = [
    "cluster",
    "deployment",
    "release",
    "replica",
    "host",
    "model",
    "version",
    "user",
    "usertoken",
    "jointoken",
    "request",
    "event",
    "audit",
    "aliasmove",
    "hostset",
];

fuzz_target!(|bytes: &[u8]| {
    let mut entries = Vec::new();
    let mut rest = bytes;
    while let Some((head, tail)) = rest.split_at_checked(4) {
        let length = usize::from(u16::from_le_bytes([head[2], head[3]])).min(tail.len());
        let (value, tail) = tail.split_at(length);
        rest = tail;
        let key = format!("{}/{}", KINDS[usize::from(head[0]) % KINDS.len()], head[1] % 8);
        if let Ok(Some(change)) = Change::decode(key.as_bytes(), value) {
            let (again_key, again) = change.encode();
            let again = again.expect("what is stored is put");
            let read = Change::decode(&again_key, &again).unwrap().unwrap();
            assert_eq!(read.encode(), (again_key.clone(), Some(again.clone())));
            entries.push((again_key, Revision(entries.len() as u64 + 1), again));
        }
    }
    let _ = View::load(entries);
});
