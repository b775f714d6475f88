//! The cluster's roots, and their rotation.

use super::{Api, audit, auth};
use crate::cluster::wall_now;
use crate::doors::certificates::CertificateError;
use crate::error::{Error, Kind};
use crate::identity::ca::{BACKDATE_SECONDS, Ca, CaError, HOST_DAYS};
use crate::ledger::refused;
use berth_proto::api::{Event, EventSeverity, Root, RootsState};
use berth_proto::convert::timestamp;
use berth_proto::ids::Wall;
use berth_proto::record::HostRecord;
use berth_proto::tls::{self, TlsError};
use berth_proto::words::counted;
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::restore;
use berth_server_core::view::View;
use std::sync::Arc;

/// Names that are shown, as the contract says.
const SHOWN: usize = 100;
/// A root is spoken of so long before its end, in milliseconds: a fleet's rotation is no hurry then.
const SOON_MS: i64 = 365 * 86_400_000;

/// Why a rotation does not go on.
#[derive(Debug, thiserror::Error)]
enum NotTurned {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

fn not_turned(error: NotTurned) -> Error {
    Error::internal("cannot change the roots", error)
}

/// A root as it is told.
fn shown(ca: &Ca, shown: bool, signs: bool) -> Result<Root, TlsError> {
    let (from, until) = tls::validity(ca.root_pem())?;
    let at = |seconds: i64| Some(timestamp(Wall(seconds.saturating_mul(1000))));
    let from = from + BACKDATE_SECONDS;
    Ok(Root {
        pin: tls::pin(ca.root_pem())?,
        create_time: at(from),
        expire_time: at(until),
        shown,
        signs,
    })
}

/// Hosts that have not said that they hold the present bundle, or whose newest certificate was made before
/// the root that signs now.
fn behind(view: &View, since_ms: Option<i64>) -> Vec<String> {
    let version = view.cluster.trust_version;
    let expires = since_ms.map_or(i64::MIN, |since| since.saturating_add(HOST_DAYS * 86_400_000));
    let is_behind = |host: &HostRecord| {
        host.trust_version < version || host.certificate_expire_unix_ms < expires
    };
    let mut names: Vec<String> = view
        .hosts()
        .filter(|host| !host.is_removed() && is_behind(&host.record))
        .map(|host| host.name.to_string())
        .collect();
    names.sort();
    names
}

/// Users whose certificate is no newer than the root that signs now.
fn not_renewed(view: &View, since_ms: i64) -> Vec<String> {
    let now = wall_now().0;
    let mut names: Vec<String> = view
        .users()
        .map(|kept| &kept.record)
        .filter(|user| !user.revoked && user.expire_unix_ms > now)
        .filter_map(|user| {
            let meta = user.meta.as_ref()?;
            let made = meta.create_unix_ms.max(user.renew_unix_ms);
            (made < since_ms).then(|| meta.name.clone())
        })
        .collect();
    names.sort();
    names
}

fn few(mut names: Vec<String>) -> (Vec<String>, u32) {
    let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
    names.truncate(SHOWN);
    (names, count)
}

/// Names in a sentence: some, and how many more.
fn some_of(names: &[String], count: usize) -> String {
    const SOME: usize = 5;
    let more = count.saturating_sub(SOME.min(names.len()));
    let some = names.iter().take(SOME).cloned().collect::<Vec<_>>().join(", ");
    if more == 0 { some } else { format!("{some} and {more} more") }
}

/// When a root was made, in milliseconds since 1970.
fn made_ms(ca: &Ca) -> Result<i64, TlsError> {
    let (from, _) = tls::validity(ca.root_pem())?;
    Ok((from + BACKDATE_SECONDS).saturating_mul(1000))
}

impl Api {
    /// How the roots stand.
    pub(super) fn roots_state(&self) -> Result<RootsState, Error> {
        let unread = |e: TlsError| Error::internal("cannot read a root", e);
        let view = self.0.ledger.view();
        let (current, next) = self.0.roots.both();
        let mut roots = vec![shown(&current, true, next.is_none()).map_err(unread)?];
        let mut since = None;
        if let Some(next) = &next {
            roots.push(shown(next, false, true).map_err(unread)?);
            since = Some(made_ms(next).map_err(unread)?);
        }
        let users = since.map_or_else(Vec::new, |since| not_renewed(&view, since));
        let (hosts_not_told, hosts_not_told_count) = few(behind(&view, since));
        let (users_not_renewed, users_not_renewed_count) = few(users);
        Ok(RootsState {
            roots,
            version: view.cluster.trust_version,
            hosts_not_told,
            hosts_not_told_count,
            users_not_renewed,
            users_not_renewed_count,
        })
    }

    /// Tells the present roots to all, and writes down who has changed them. What has happened is an event
    /// once, however often it is asked for.
    async fn tell_roots(
        &self,
        caller: &auth::Caller,
        method: &str,
        (is_done, reason, message): (bool, &str, String),
    ) -> Result<(), Error> {
        let mut noted = vec![audit(caller, method, "", vec!["roots".to_owned()])];
        let told = self.0.ledger.ahead().cluster.clone();
        // An earlier call may have been cut off before it could say so.
        if is_done || !self.0.roots_are_told(&told) {
            noted.push(Change::AppendEvent(Event {
                time: Some(timestamp(wall_now())),
                severity: EventSeverity::Info as i32,
                kind: "cluster".to_owned(),
                uid: told.uid,
                reason: reason.to_owned(),
                message,
                actor: caller.subject.clone(),
                ..Event::default()
            }));
        }
        let told = self.0.tell_trust(noted).await;
        told.map_err(|why| refused(why, Kind::User, &caller.subject))
    }

    /// Ends the join tokens: they name the root that is to go, also those that were made since another one
    /// stands beside it.
    async fn void_join_tokens(&self, caller: &auth::Caller) -> Result<usize, Error> {
        let void = restore::void_tokens(&self.0.ledger.ahead());
        for chunk in void.chunks(restore::CHUNK) {
            let objects = chunk.iter().map(Change::key).collect();
            let mut changes = chunk.to_vec();
            changes.push(audit(caller, "SystemService/FinishRootRotation", "", objects));
            let proposal = Proposal { preconditions: Vec::new(), changes };
            let written = self.0.ledger.propose(proposal).await;
            written.map_err(|why| refused(why, Kind::Token, &caller.subject))?;
        }
        Ok(void.len())
    }

    /// Makes the second root, where there is none.
    pub(super) async fn begin_rotation(&self, caller: &auth::Caller) -> Result<RootsState, Error> {
        let _one = self.0.rotating.lock().await;
        let cluster = Arc::clone(&self.0);
        let begun = tokio::task::spawn_blocking(move || {
            cluster.roots.begin(|bundle| cluster.trust_roots(bundle).map_err(NotTurned::from))
        });
        let begun = begun.await.map_err(|e| Error::internal("cannot change the roots", e))?;
        let begun = begun.map_err(not_turned)?;
        if begun {
            tracing::warn!(by = caller.subject, "a rotation of the root has begun");
        }
        // Also where it had begun: an earlier call may have been cut off before this.
        let words =
            "a rotation of the root has begun: a second root stands beside the first".to_owned();
        let news = (begun, "ROOT_ROTATION_BEGUN", words);
        self.tell_roots(caller, "SystemService/BeginRootRotation", news).await?;
        self.roots_state()
    }

    /// Retires the root with this pin for the one after it.
    pub(super) async fn finish_rotation(
        &self,
        caller: &auth::Caller,
        pin: &str,
        force: bool,
    ) -> Result<RootsState, Error> {
        if pin.len() != 64 || hex::decode(pin).is_err() {
            return Err(Error::field("pin", "must be a root's pin: 64 characters of hex"));
        }
        let _one = self.0.rotating.lock().await;
        let unwritten = |why| refused(why, Kind::User, &caller.subject);
        // Who holds the bundle is known by its number: it has to be that of the roots there are.
        self.0.tell_trust(Vec::new()).await.map_err(unwritten)?;
        let state = self.roots_state()?;
        let named = |at: usize| state.roots.get(at).is_some_and(|root| root.pin == pin);
        match state.roots.as_slice() {
            [_] if named(0) => {
                let words = "no rotation has begun: there is no other root to go on with";
                return Err(Error::precondition("NO_ROTATION", words.to_owned()));
            }
            [_, _] if named(1) => {
                let words = "is the pin of the newer root, which stays; the older one is retired";
                return Err(Error::field("pin", words));
            }
            [_, _] if named(0) => {}
            [_, _] => return Err(Error::field("pin", "is neither root's")),
            // A repetition: it is gone. What comes after it may have been cut off.
            _ => {
                self.0.show_roots().map_err(|e| not_turned(e.into()))?;
                self.0.judge_again();
                return Ok(state);
            }
        }
        let count = state.hosts_not_told_count as usize;
        if count > 0 && !force {
            let (verb, they) = if count == 1 { ("does", "it") } else { ("do", "they") };
            return Err(Error::precondition(
                "HOSTS_NOT_TOLD",
                format!(
                    "{} {verb} not hold the new root yet: {}; without it {they} would not find the \
                     server any more",
                    counted(count, "host"),
                    some_of(&state.hosts_not_told, count)
                ),
            ));
        }
        // Before: a call that is cut off here finds the root still there when it is repeated.
        let void = self.void_join_tokens(caller).await?;
        let cluster = Arc::clone(&self.0);
        let finished = tokio::task::spawn_blocking(move || {
            cluster.roots.finish()?;
            cluster.show_roots()?;
            Ok(())
        });
        finished
            .await
            .map_err(|e| Error::internal("cannot change the roots", e))?
            .map_err(not_turned)?;
        tracing::warn!(by = caller.subject, retired = pin, "a root was retired");
        let void = match void {
            0 => String::new(),
            count => format!(", and with it {}", counted(count, "join token")),
        };
        let news = (true, "ROOT_RETIRED", format!("the root {pin} was retired{void}"));
        let told = self.tell_roots(caller, "SystemService/FinishRootRotation", news).await;
        // After they were told: whoever has to come again finds the server then.
        self.0.judge_again();
        told?;
        self.roots_state()
    }

    /// What an operator should know of the roots.
    pub(super) fn about_roots(&self) -> Vec<String> {
        let Ok(state) = self.roots_state() else { return Vec::new() };
        let [first, rest @ ..] = state.roots.as_slice() else { return Vec::new() };
        if rest.is_empty() {
            let ends =
                first.expire_time.as_ref().map_or(i64::MAX, |t| berth_proto::convert::wall(t).0);
            let soon = ends.saturating_sub(wall_now().0) < SOON_MS;
            let words =
                "the cluster's root ends within a year: `berth root rotate` begins a new one";
            return soon.then(|| words.to_owned()).into_iter().collect();
        }
        let counts = [
            (state.hosts_not_told_count, "host", "not told yet"),
            (state.users_not_renewed_count, "user", "with an earlier certificate"),
        ];
        let left: Vec<String> = counts
            .into_iter()
            .filter(|(n, ..)| *n > 0)
            .map(|(n, what, how)| format!("{} {how}", counted(n as usize, what)))
            .collect();
        let left =
            if left.is_empty() { "nobody is left to be told".to_owned() } else { left.join(", ") };
        vec![format!("a rotation of the root is under way ({left}): `berth root list` shows more")]
    }
}
