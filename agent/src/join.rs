//! Joining a cluster, and renewing the certificate, also past its end.

use crate::fetch::client::Client;
use crate::session::tls_config;
use crate::state::{Shared, wall_now};
use crate::store::{Store, StoreError};
use berth_proto::agent::join_service_client::JoinServiceClient;
use berth_proto::agent::{BeginRenewalRequest, JoinRequest, RenewRequest, Trust};
use berth_proto::api::HostFacts;
use berth_proto::record::AgentIdentityFile;
use berth_proto::tls::{self, ALPN_H2, Trusted};
use std::sync::Arc;
use std::time::Duration;

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
        Err(StoreError::NotJoined) => {}
        Ok(held) => return Err(JoinError::Joined(held.name)),
        Err(error) => return Err(error.into()),
    }
    let pin = token.trim().rsplit('.').next().filter(|p| p.len() == 64).ok_or(JoinError::Token)?;
    let config = tls::client_config(Trusted::Pin(pin.to_owned()), None, &[ALPN_H2], None)
        .map_err(JoinError::Key)?;
    let channel = tls::channel(server, config, CONNECT, |e| e)
        .await
        .map_err(|e| JoinError::Reach(server.to_owned(), e))?;
    let (key_pem, csr_pem) = tls::key_and_request().map_err(JoinError::Key)?;
    let request = JoinRequest {
        token: token.trim().to_owned(),
        name: name.to_owned(),
        csr_pem,
        facts: Some(facts),
        request_id: uuid::Uuid::new_v4().to_string(),
    };
    let mut service = JoinServiceClient::new(channel);
    let answer = tokio::time::timeout(CONNECT, service.join(request))
        .await
        .map_err(|_| JoinError::Refused("no answer in time".to_owned()))?
        .map_err(|status| JoinError::Refused(status.message().to_owned()))?
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
        key_pem,
        certificate_pem: answer.certificate_pem,
        next_key_pem: String::new(),
        trust: Some(trust),
        registry: answer.registry,
        removed: false,
    };
    store.put_identity(&identity)?;
    Ok(identity)
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Renews the certificate at half its life, also when its end is past.
///
/// # Errors
/// When it could not be done now; it will be tried again.
pub async fn renew_if_due(shared: &Arc<Shared>, client: &Client) -> Result<(), AnyError> {
    let identity = shared.identity.lock().clone();
    let (from, until) = tls::validity(&identity.certificate_pem)?;
    if wall_now().0 / 1000 < from + (until - from) / 2 {
        return Ok(());
    }
    let trust = identity.trust.clone().unwrap_or_default();
    let cluster = identity.cluster.parse()?;
    let trusted = Trusted::Roots { pem: trust.roots_pem.clone(), cluster };
    let config = tls::client_config(trusted, None, &[ALPN_H2], None)?;
    let endpoint = trust.endpoints.first().cloned().unwrap_or_default();
    let channel = tls::channel(&endpoint, config, CONNECT, |e| e).await?;
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
    let mut next = identity;
    next.certificate_pem = answer.certificate_pem;
    next.key_pem = key_pem;
    if let Some(newer) = answer
        .trust
        .filter(|t: &Trust| t.version > next.trust.as_ref().map_or(0, |held| held.version))
    {
        next.trust = Some(newer);
    }
    shared.store.put_identity(&next)?;
    client.retarget(next.registry.clone(), tls_config(&next, 0, &[b"http/1.1"])?);
    *shared.identity.lock() = next;
    tracing::info!("the certificate was renewed");
    Ok(())
}
