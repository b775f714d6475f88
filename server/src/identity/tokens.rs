//! Tokens for joining and for people, and the judgement of renewals. Only hashes are stored.

use berth_proto::ids::Wall;
use berth_proto::record::{ClusterRecord, HostRecord, JoinTokenRecord, UserTokenRecord};
use sha2::Digest as _;
use std::time::Duration;
use subtle::ConstantTimeEq as _;

/// A token's text, of `A-Z a-z 0-9 - _` (what engines carry undamaged), with dots between a join
/// token's parts.
const JOIN_PREFIX: &str = "berth-join-v1";

/// A new token: its public part, the whole text, and what is stored of the secret.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Public part.
    pub id: String,
    /// Shown once.
    pub text: String,
    /// Stored.
    pub sha256: Vec<u8>,
}

/// Why a token is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// No such token, or another secret.
    #[error("the token is not known")]
    Unknown,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// All its uses are used.
    #[error("the token is used up")]
    UsedUp,
    /// Somebody ended it.
    #[error("the token was revoked")]
    Revoked,
}

impl BadToken {
    /// The stable word.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Unknown => "TOKEN_UNKNOWN",
            Self::Expired => "TOKEN_EXPIRED",
            Self::UsedUp => "TOKEN_USED_UP",
            Self::Revoked => "TOKEN_REVOKED",
        }
    }
}

fn secret() -> String {
    // Two version-4 UUIDs: 244 random bits.
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

fn hash(secret: &str) -> Vec<u8> {
    sha2::Sha256::digest(secret.as_bytes()).to_vec()
}

fn same(stored: &[u8], secret: &str) -> bool {
    bool::from(stored.ct_eq(&hash(secret)))
}

/// Makes a join token that pins the CA.
#[must_use]
pub fn new_join(pin: &str) -> NewToken {
    let (id, secret) = (uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(), secret());
    let text = format!("{JOIN_PREFIX}.{id}.{secret}.{pin}");
    NewToken { id, text, sha256: hash(&secret) }
}

/// The public part and the secret of a join token.
#[must_use]
pub fn read_join(text: &str) -> Option<(&str, &str)> {
    let mut parts = text.trim().split('.');
    (parts.next()? == JOIN_PREFIX).then_some(())?;
    Some((parts.next()?, parts.next()?))
}

/// Judges a join token.
///
/// # Errors
/// Why it is not good.
pub fn judge_join(
    record: Option<&JoinTokenRecord>,
    secret: &str,
    now: Wall,
) -> Result<(), BadToken> {
    let record = record.ok_or(BadToken::Unknown)?;
    if !same(&record.secret_sha256, secret) {
        return Err(BadToken::Unknown);
    }
    let token = record.token.clone().unwrap_or_default();
    if record.revoked {
        return Err(BadToken::Revoked);
    }
    if token.expire_time.as_ref().is_none_or(|t| berth_proto::convert::wall(t) <= now) {
        return Err(BadToken::Expired);
    }
    if token.uses_left == 0 {
        return Err(BadToken::UsedUp);
    }
    Ok(())
}

/// Makes a token for registry, gateway and API.
#[must_use]
pub fn new_user() -> NewToken {
    let (id, secret) = (uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(), secret());
    let text = format!("berth_{id}_{secret}");
    NewToken { id, text, sha256: hash(&secret) }
}

/// The public part and the secret of a user's token.
#[must_use]
pub fn read_user(text: &str) -> Option<(&str, &str)> {
    text.trim().strip_prefix("berth_")?.split_once('_')
}

/// Judges a user's token.
///
/// # Errors
/// Why it is not good.
pub fn judge_user(
    record: Option<&UserTokenRecord>,
    secret: &str,
    now: Wall,
) -> Result<(), BadToken> {
    let record = record.ok_or(BadToken::Unknown)?;
    if !same(&record.secret_sha256, secret) {
        return Err(BadToken::Unknown);
    }
    if record.revoked {
        return Err(BadToken::Revoked);
    }
    if record.expire_unix_ms <= now.0 {
        return Err(BadToken::Expired);
    }
    Ok(())
}

/// What a renewal comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// A certificate for the new key; the recorded one retires when the new one is first used.
    Grant,
    /// The host was removed.
    Removed,
    /// Too long after the end.
    GraceOver,
    /// A key that was retired is used again: two copies of the host are alive.
    RetiredKey,
    /// Neither the recorded key nor the one being taken into use.
    UnknownKey,
}

/// Judges a renewal signed with `public_key`, whose signature was found good.
#[must_use]
pub fn judge_renewal(host: &HostRecord, public_key: &[u8], grace: Duration, now: Wall) -> Renewal {
    if host.removed {
        return Renewal::Removed;
    }
    let fingerprint = sha2::Sha256::digest(public_key).to_vec();
    if host.retired_keys.contains(&fingerprint) {
        return Renewal::RetiredKey;
    }
    let known = host.public_key == public_key
        || (!host.next_public_key.is_empty() && host.next_public_key == public_key);
    if !known {
        return Renewal::UnknownKey;
    }
    let grace = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    if now.0 > host.certificate_expire_unix_ms.saturating_add(grace) {
        return Renewal::GraceOver;
    }
    Renewal::Grant
}

/// Keys that a host's record keeps as retired: one for each half life of 45 days gives two years.
pub const MAX_RETIRED: usize = 16;

/// What the first use of a key that was let in changes: `None` when it is the one in use already.
#[must_use]
pub fn use_key(host: &HostRecord, public_key: &[u8]) -> Option<HostRecord> {
    if host.public_key == public_key {
        return None;
    }
    let mut next = host.clone();
    next.retired_keys.push(sha2::Sha256::digest(&host.public_key).to_vec());
    let extra = next.retired_keys.len().saturating_sub(MAX_RETIRED);
    next.retired_keys.drain(..extra);
    next.public_key = public_key.to_vec();
    next.next_public_key.clear();
    Some(next)
}

/// Fingerprints of the keys that end when a host joins again: those retired before, the one in use and
/// the one given to follow it.
#[must_use]
pub fn retired_at_rejoin(before: &HostRecord) -> Vec<Vec<u8>> {
    let mut retired = before.retired_keys.clone();
    let keys = [&before.public_key, &before.next_public_key];
    retired.extend(keys.iter().filter(|k| !k.is_empty()).map(|k| sha2::Sha256::digest(k).to_vec()));
    let extra = retired.len().saturating_sub(MAX_RETIRED);
    retired.drain(..extra);
    retired
}

/// Whether this key of the host was retired.
#[must_use]
pub fn is_retired(host: &HostRecord, public_key: &[u8]) -> bool {
    host.retired_keys.contains(&sha2::Sha256::digest(public_key).to_vec())
}

/// Whether a key that the host's record does not know may be one it was given after the backup that
/// this ledger was restored from: its certificate, which the CA has signed, was made at `made_unix_s`.
#[must_use]
pub fn is_newer_than_backup(
    cluster: &ClusterRecord,
    host: &HostRecord,
    public_key: &[u8],
    made_unix_s: i64,
) -> bool {
    let fingerprint = sha2::Sha256::digest(public_key).to_vec();
    cluster.observing
        && cluster.backup_unix_ms != 0
        && made_unix_s >= cluster.backup_unix_ms / 1000
        && !host.retired_keys.contains(&fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::api::JoinToken;
    use berth_proto::convert::timestamp;

    #[test]
    fn each_way_a_join_token_is_wrong_has_its_name() {
        let token = new_join("pin");
        let (id, secret) = read_join(&token.text).unwrap();
        assert_eq!(id, token.id);
        let good = JoinTokenRecord {
            token: Some(JoinToken {
                id: token.id.clone(),
                expire_time: Some(timestamp(Wall(1000))),
                uses_left: 1,
                ..Default::default()
            }),
            secret_sha256: token.sha256.clone(),
            revoked: false,
        };
        assert_eq!(judge_join(Some(&good), secret, Wall(999)), Ok(()));
        assert_eq!(judge_join(None, secret, Wall(0)), Err(BadToken::Unknown));
        assert_eq!(judge_join(Some(&good), "x", Wall(0)), Err(BadToken::Unknown));
        assert_eq!(judge_join(Some(&good), secret, Wall(1000)), Err(BadToken::Expired));
        let revoked = JoinTokenRecord { revoked: true, ..good.clone() };
        assert_eq!(judge_join(Some(&revoked), secret, Wall(0)), Err(BadToken::Revoked));
        let mut used = good;
        used.token.as_mut().unwrap().uses_left = 0;
        assert_eq!(judge_join(Some(&used), secret, Wall(0)), Err(BadToken::UsedUp));
    }

    #[test]
    fn a_user_token_has_the_alphabet_engines_carry() {
        let token = new_user();
        assert!(token.text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        let (id, secret) = read_user(&token.text).unwrap();
        let record = UserTokenRecord {
            id: id.into(),
            secret_sha256: token.sha256,
            expire_unix_ms: 10,
            ..Default::default()
        };
        assert_eq!(judge_user(Some(&record), secret, Wall(9)), Ok(()));
        assert_eq!(judge_user(Some(&record), secret, Wall(10)), Err(BadToken::Expired));
    }

    #[test]
    fn a_key_renewed_after_the_restored_backup_is_let_in_and_an_older_one_is_not() {
        let host = HostRecord { public_key: b"one".to_vec(), ..Default::default() };
        let cluster =
            ClusterRecord { observing: true, backup_unix_ms: 5_400, ..Default::default() };
        assert!(is_newer_than_backup(&cluster, &host, b"two", 5));
        assert!(!is_newer_than_backup(&cluster, &host, b"two", 4), "retired before the backup");
        let next = use_key(&host, b"two").unwrap();
        assert!(!is_newer_than_backup(&cluster, &next, b"one", 9), "retired by the newer one");
        assert!(!is_newer_than_backup(&ClusterRecord::default(), &host, b"two", 9));
    }

    #[test]
    fn the_old_key_retires_with_the_first_use_of_the_new_one() {
        let host = HostRecord {
            public_key: b"one".to_vec(),
            next_public_key: b"two".to_vec(),
            certificate_expire_unix_ms: 1_000,
            ..Default::default()
        };
        let day = Duration::from_secs(86_400);
        assert_eq!(judge_renewal(&host, b"one", day, Wall(0)), Renewal::Grant);
        assert_eq!(judge_renewal(&host, b"three", day, Wall(0)), Renewal::UnknownKey);
        assert_eq!(judge_renewal(&host, b"one", Duration::ZERO, Wall(1_001)), Renewal::GraceOver);
        assert_eq!(use_key(&host, b"one"), None);
        let next = use_key(&host, b"two").unwrap();
        assert_eq!(judge_renewal(&next, b"one", day, Wall(0)), Renewal::RetiredKey);
        assert_eq!(judge_renewal(&next, b"two", day, Wall(0)), Renewal::Grant);
        let removed = HostRecord { removed: true, ..next };
        assert_eq!(judge_renewal(&removed, b"two", day, Wall(0)), Renewal::Removed);
    }
}
