//! One-time links to the page, and the visits they begin. In memory only: a restart ends them all.
//! Only hashes are kept.

use crate::api::auth::Caller;
use parking_lot::Mutex;
use sha2::Digest as _;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a link may lie in a terminal.
const LINK: Duration = Duration::from_secs(300);
/// How long a visit lasts: a working day.
const VISIT: Duration = Duration::from_secs(12 * 3600);
/// Links and visits kept at most, each: some hundred bytes; the one that ends first makes room.
const KEPT: usize = 1024;

type Held = BTreeMap<[u8; 32], (Caller, Instant)>;

/// Links and visits.
#[derive(Default)]
pub struct Links {
    links: Mutex<Held>,
    visits: Mutex<Held>,
}

fn hash(text: &str) -> [u8; 32] {
    sha2::Sha256::digest(text.as_bytes()).into()
}

fn put(held: &Mutex<Held>, caller: Caller, life: Duration) -> String {
    // Two version-4 UUIDs: 244 random bits.
    let secret = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    let (mut held, now) = (held.lock(), Instant::now());
    held.retain(|_, (_, until)| *until > now);
    if held.len() >= KEPT {
        let first = held.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| *key);
        held.retain(|key, _| Some(*key) != first);
    }
    held.insert(hash(&secret), (caller, now + life));
    secret
}

impl Links {
    /// The code of a new link for this caller.
    pub fn make(&self, caller: Caller) -> String {
        put(&self.links, caller, LINK)
    }

    /// Takes a link's code, once; answers with the cookie of a visit.
    pub fn redeem(&self, code: &str) -> Option<String> {
        let (caller, until) = self.links.lock().remove(&hash(code))?;
        (until > Instant::now()).then(|| put(&self.visits, caller, VISIT))
    }

    /// Whose visit a cookie is.
    pub fn visitor(&self, cookie: &str) -> Option<Caller> {
        let visits = self.visits.lock();
        let (caller, until) = visits.get(&hash(cookie))?;
        (*until > Instant::now()).then(|| caller.clone())
    }
}
