//! A host's set, as it comes and as an agent's disk holds it: it is whole or refused, and what was taken
//! is written such that it reads the same.
#![no_main]

use berth_agent::store::{from_file, to_file};
use berth_agent_core::ledger::{Assembly, Wanted};
use berth_proto::agent::SessionResponse;
use berth_proto::agent::session_response::Item;
use berth_proto::ids::ClusterUid;
use berth_proto::record::AgentSetFile;
use berth_proto::sets::set_digest;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;

fn read_again(wanted: &Wanted, cluster: &ClusterUid) {
    let file = to_file(cluster, wanted, &BTreeMap::new(), 1, 0);
    let (again, _) = from_file(&file).expect("what is written is read");
    // No news and the empty set stay different.
    assert_eq!(again.set().is_some(), wanted.set().is_some());
    assert_eq!(to_file(cluster, &again, &BTreeMap::new(), 1, 0), file);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let cluster: ClusterUid = "c".parse().unwrap();
    if first % 2 == 0 {
        let Ok(file) = AgentSetFile::decode(rest) else { return };
        let Ok((wanted, memory)) = from_file(&file) else { return };
        read_again(&wanted, &cluster);
        let told = to_file(&cluster, &wanted, &memory, file.agent_start, file.last_seen_unix_ms);
        assert_eq!(from_file(&told).expect("what is written is read").1, memory);
        return;
    }
    let (mut assembly, mut held) = (Assembly::default(), Wanted::default());
    while let Some((head, tail)) = rest.split_at_checked(3) {
        let length = usize::from(u16::from_le_bytes([head[0], head[1]])).min(tail.len());
        let (message, tail) = tail.split_at(length);
        rest = tail;
        let Ok(message) = SessionResponse::decode(message) else { continue };
        match message.item {
            Some(Item::SetBegin(begin)) => assembly.begin(begin),
            Some(Item::SetPage(page)) => assembly.page(page),
            Some(Item::SetEnd(end)) => {
                if let Ok(set) = assembly.end(&end, &held) {
                    for entry in set.entries.values() {
                        assert!(set.body(entry).is_some(), "an entry without its body");
                    }
                    let entries: Vec<_> = set.entries.values().cloned().collect();
                    // As many as were sent, unless one was sent twice.
                    assert!(entries.len() <= berth_agent_core::ledger::MAX_ENTRIES);
                    let _ = set_digest(&entries);
                    held = Wanted::Set(Arc::new(set));
                    read_again(&held, &cluster);
                }
            }
            _ => {}
        }
    }
});
