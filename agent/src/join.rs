//! Joining a cluster, and renewing the certificate, also past its end.

use crate::clock::Clock;
use crate::fetch::client::Client;
use crate::session;
use crate::state::Shared;
use crate::store::{Store, StoreError};
use berth_proto::agent::join_service_client::JoinServiceClient;
use berth_proto::agent::{BeginRenewalRequest, JoinRequest, Removed, RenewRequest, RenewResponse};
use berth_proto::api::HostFacts;
use berth_proto::record::{AgentIdentityFile, AgentJoinFile};
use berth_proto::tls::{self, ALPN_H2, Trusted};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// Renewals that are all due at once are spread over so long.
const SPREAD: Duration = Duration::from_secs(5);
/// One that failed in a session is tried again after this, and up to twice that.
const AGAIN: Duration = Duration::from_secs(60);
/// Connecting to a server.
const CONNECT: Duration = Duration::from_secs(15);

/// Why a host cannot join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token's text.
    #[error("the token is not a join token; `berth host token create` prints the whole command")]
    Token,
    /// The host has joined already.
    #[error("this host has joined already as \"{0}\"; `berth-agent leave` frees it")]
    Joined(String),
    /// No address with a port.
    #[error("\"{0}\" is no HOST:PORT, for example 10.0.0.5:7443")]
    Address(String),
    /// Another door, or another program.
    #[error("what answers at {0} is not the server's control door, which is port 7443 by default")]
    Door(String),
    /// TLS.
    #[error("cannot reach the server {0}")]
    Reach(String, #[source] tls::TlsError),
    /// A key cannot be made.
    #[error("cannot make a key")]
    Key(#[source] tls::TlsError),
    /// The server says no.
    #[error("the server refused: {0}")]
    Refused(String),
    /// The disk.
    #[error("cannot keep the identity")]
    Store(#[from] StoreError),
}

/// Joins; the identity is durable when it returns.
///
/// # Errors
/// When the server is not the one the token names, refuses, or the disk does not take it.
pub async fn join(
    store: &Store,
    server: &str,
    token: &str,
    name: &str,
    facts: HostFacts,
) -> Result<AgentIdentityFile, JoinError> {
    match store.identity() {
        Err(StoreError::NotJoined(_)) => {}
        Ok(held) => return Err(JoinError::Joined(held.name)),
        Err(error) => return Err(error.into()),
    }
    check_address(server)?;
    let pin = token.trim().rsplit('.').next().filter(|p| p.len() == 64).ok_or(JoinError::Token)?;
    let clock = Some(Arc::new(Clock::new(0)) as Arc<_>);
    let config = tls::client_config(Trusted::Pin(pin.to_owned()), None, &[ALPN_H2], clock)
        .map_err(JoinError::Key)?;
    let channel = tls::channel(server, config, CONNECT, |e| e)
        .await
        .map_err(|e| JoinError::Reach(server.to_owned(), e))?;
    let joining = joining(store, token.trim(), name)?;
    let request = JoinRequest {
        token: token.trim().to_owned(),
        name: name.to_owned(),
        csr_pem: joining.csr_pem,
        facts: Some(facts),
        request_id: joining.request_id,
    };
    let mut service = JoinServiceClient::new(channel);
    let answer = tokio::time::timeout(CONNECT, service.join(request))
        .await
        .map_err(|_| JoinError::Refused("no answer in time".to_owned()))?
        .map_err(|status| match status.message() {
            words if words.contains("grpc-status header missing") => {
                JoinError::Door(server.to_owned())
            }
            words => JoinError::Refused(words.to_owned()),
        })?
        .into_inner();
    let mut trust = answer.trust.unwrap_or_default();
    // The address that worked is tried too, whatever the server calls itself.
    if !trust.endpoints.iter().any(|e| e == server) {
        trust.endpoints.push(server.to_owned());
    }
    let identity = AgentIdentityFile {
        host_uid: answer.host_uid,
        name: answer.name,
        instance: answer.instance,
        cluster: answer.cluster,
        key_pem: joining.key_pem,
        certificate_pem: answer.certificate_pem,
        next_key_pem: String::new(),
        trust: Some(trust),
        registry: answer.registry,
        removed: false,
        wipe: false,
    };
    // Whatever an earlier life left: nothing of it is this cluster's.
    store.forget_set()?;
    store.put_identity(&identity)?;
    store.forget_joining()?;
    Ok(identity)
}

/// A host's name or address with a port.
///
/// # Errors
/// When it is none.
pub fn check_address(text: &str) -> Result<(), JoinError> {
    let right = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if right { Ok(()) } else { Err(JoinError::Address(text.to_owned())) }
}

/// What is asked for: the same again while no answer has come, else something new. It is durable, as
/// the answer is of no use without its key.
fn joining(store: &Store, token: &str, name: &str) -> Result<AgentJoinFile, JoinError> {
    use sha2::Digest as _;
    let token_sha256 = sha2::Sha256::digest(token).to_vec();
    // One that cannot be read is none.
    if let Ok(Some(held)) = store.joining()
        && held.token_sha256 == token_sha256
        && held.name == name
    {
        return Ok(held);
    }
    let (key_pem, csr_pem) = tls::key_and_request().map_err(JoinError::Key)?;
    let request_id = uuid::Uuid::new_v4().to_string();
    let fresh = AgentJoinFile { token_sha256, name: name.to_owned(), key_pem, csr_pem, request_id };
    store.put_joining(&fresh)?;
    Ok(fresh)
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Renews the certificate once it is due, and ends then; looks every `look`, by the wall clock, which
/// may be set meanwhile, and whenever other roots have been `told`.
///
/// A session may stand for longer than a certificate lives, and nobody dials meanwhile. Cancel-safe:
/// a renewal that was dropped is begun anew, the server takes the old key until the new one is used.
pub async fn renewed(
    shared: &Arc<Shared>,
    client: &Client,
    endpoint: &str,
    look: Duration,
    told: &Notify,
) {
    let mut wait = look;
    loop {
        if tokio::time::timeout(wait, told.notified()).await.is_ok() {
            // A whole fleet is told at once, and shall not come at once.
            tokio::time::sleep(drawn(SPREAD)).await;
        }
        wait = look;
        match renew_if_due(shared, client, endpoint).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(
                    error = crate::chain(&*error),
                    "the certificate could not be renewed yet"
                );
                wait = look.min(AGAIN + drawn(AGAIN));
            }
        }
    }
}

/// Anything up to so long.
fn drawn(most: Duration) -> Duration {
    most * u32::from(uuid::Uuid::new_v4().as_bytes()[0]) / 256
}

/// Renews the certificate at half its life, also when its end is past, and when there is a newer root than
/// the one that has signed it; `true`: it was renewed, or the
/// host was removed and that is remembered. `endpoint` is the server's address that is dialled, or that
/// a session stands with: another one is asked with the next dial.
///
/// # Errors
/// When it could not be done now; it will be tried again.
pub async fn renew_if_due(
    shared: &Arc<Shared>,
    client: &Client,
    endpoint: &str,
) -> Result<bool, AnyError> {
    let identity = shared.identity.lock().clone();
    let (from, until) = tls::validity(&identity.certificate_pem)?;
    let roots = identity.trust.as_ref().map(|trust| trust.roots_pem.as_str()).unwrap_or_default();
    // Where that cannot be read, renewing would not mend it.
    let newest = tls::is_signed_by_newest(&identity.certificate_pem, roots).unwrap_or(true);
    if newest && shared.clock.now().0 / 1000 < from + (until - from) / 2 {
        return Ok(false);
    }
    let (key_pem, answer) = renewal(shared, &identity, endpoint).await?;
    if let Some(Removed { wipe }) = answer.removed {
        tracing::warn!(wipe, "this host was removed from its cluster");
        let shared = Arc::clone(shared);
        tokio::task::spawn_blocking(move || shared.removed(wipe)).await??;
        return Ok(true);
    }
    let changed = session::change(shared, client, move |identity| {
        identity.certificate_pem = answer.certificate_pem;
        identity.key_pem = key_pem;
        if let Some(trust) = answer.trust {
            session::take_over(identity, trust);
        }
    });
    changed.await?;
    tracing::info!(server = endpoint, "the certificate was renewed");
    Ok(true)
}

/// Asks one address of the server for a certificate with a new key.
async fn renewal(
    shared: &Shared,
    identity: &AgentIdentityFile,
    endpoint: &str,
) -> Result<(String, RenewResponse), AnyError> {
    let cluster = identity.cluster.parse()?;
    let pem = identity.trust.clone().unwrap_or_default().roots_pem;
    let clock = Arc::clone(&shared.clock);
    let trusted = Trusted::Roots { pem, cluster };
    let config = tls::client_config(trusted, None, &[ALPN_H2], Some(clock))?;
    let channel = tls::channel(endpoint, config, CONNECT, |e| e).await?;
    let mut service = JoinServiceClient::new(channel);
    let host_uid = identity.host_uid.clone();
    let challenge = tokio::time::timeout(
        CONNECT,
        service.begin_renewal(BeginRenewalRequest { host_uid: host_uid.clone() }),
    )
    .await??
    .into_inner()
    .challenge;
    let (key_pem, csr_pem) = tls::key_and_request()?;
    let message = [&challenge[..], csr_pem.as_bytes()].concat();
    let request = RenewRequest {
        host_uid,
        csr_pem,
        challenge,
        signature: tls::sign(&identity.key_pem, &message)?,
        public_key: tls::public_key_of(&identity.key_pem)?,
    };
    let answer = tokio::time::timeout(CONNECT, service.renew(request)).await??.into_inner();
    Ok((key_pem, answer))
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
