//! Claims about sets.

use super::*;
use crate::change::Change;
use crate::miniature::World;
use crate::objects::Release;
use berth_proto::ids::Digest;

#[test]
fn a_body_with_a_field_this_build_does_not_know_is_stored_and_sent_as_it_came() {
    let mut w = World::new(1);
    w.apply(World::spec("one"));
    w.plan();
    let host: HostUid = "h0".parse().unwrap();
    let before = host_set(&w.view, &host).unwrap().unwrap();
    // Field 4000, a string: what a newer build may have written.
    let release = w.view.releases_of(&w.uid()).last().unwrap().clone();
    let mut record = release.to_record();
    record.body.extend([0x82, 0xFA, 0x01, 0x03, b'n', b'e', b'w']);
    record.body_digest = Digest::of(&record.body).to_string();
    let newer = Change::PutRelease(Arc::new(Release::new(record.clone()).unwrap()));
    // Through the store and back.
    let (key, bytes) = newer.encode();
    let read = Change::decode(&key, &bytes.unwrap()).unwrap().unwrap();
    w.change(vec![read]);
    let after = host_set(&w.view, &host).unwrap().unwrap();
    assert_eq!(after.bodies.len(), 1);
    let (digest, body) = after.bodies.first_key_value().unwrap();
    assert_eq!(body.as_ref(), record.body.as_slice());
    assert_eq!(digest.as_str(), record.body_digest);
    assert_ne!(before.digest, after.digest);
    assert!(after.entries.iter().all(|e| e.body_digest == record.body_digest));
}

#[test]
fn the_same_view_gives_the_same_set_and_what_shall_go_is_not_in_it() {
    let mut w = World::new(1);
    w.apply(World::spec("one"));
    w.plan();
    let host: HostUid = "h0".parse().unwrap();
    let set = || host_set(&w.view, &host).unwrap().unwrap();
    assert_eq!(set(), set());
    assert_eq!(set().entries.len(), 2);
    let gone = w.view.replicas_on(&host).next().unwrap().stopped();
    w.change(vec![Change::PutReplica(Arc::new(gone.clone()))]);
    let set = host_set(&w.view, &host).unwrap().unwrap();
    assert!(set.entries.iter().all(|e| e.replica_uid != gone.uid.as_str()));
    assert_eq!(set.entries.len(), 1);
}
