//! Contexts, and connections to the server they name.

use crate::args::Global;
use crate::error::{Error, Kind, Result};
use berth_proto::api::deployment_service_client::DeploymentServiceClient;
use berth_proto::api::event_service_client::EventServiceClient;
use berth_proto::api::host_service_client::HostServiceClient;
use berth_proto::api::log_service_client::LogServiceClient;
use berth_proto::api::model_service_client::ModelServiceClient;
use berth_proto::api::system_service_client::SystemServiceClient;
use berth_proto::api::user_service_client::UserServiceClient;
use berth_proto::tls::{self, Credentials, Trusted};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::transport::Channel;

/// Reaching one of the server's addresses.
const CONNECT: Duration = Duration::from_secs(5);
/// Between two looks whether the server is there, and how long its answer may take.
const ALIVE: Duration = Duration::from_secs(20);
/// How long a connection is kept for the next request: well below the 15 s after which the server closes
/// one that asks for nothing, so that no request meets its end.
const KEPT: Duration = Duration::from_secs(5);
/// Largest answer: a list of a thousand replicas is under 1 MiB.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// The file of contexts.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The one that is used.
    pub current: String,
    /// All of them.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
}

/// A server, and who one is there.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    pub user: String,
    pub cluster: String,
    pub endpoints: Vec<String>,
    #[serde(default)]
    pub registry: String,
    #[serde(default)]
    pub gateway: String,
    pub roots: String,
    pub certificate: String,
    pub key: String,
}

/// Where the file is.
pub fn config_path() -> PathBuf {
    if let Some(path) = std::env::var_os("BERTH_CONFIG") {
        return path.into();
    }
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let base = std::env::var_os("XDG_CONFIG_HOME").map_or(home.join(".config"), PathBuf::from);
    base.join("berth").join("config.toml")
}

/// Reads the file.
pub fn config() -> Result<Config> {
    let path = config_path();
    match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text)
            .map_err(|e| Error::user(format!("{} is not right: {e}", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::user(format!(
            "there is no context: {} does not exist",
            path.display()
        ))
        .hint(
            "`berth context create NAME --from FILE` takes over the server's admin.toml or what \
             `berth user create` printed; or set BERTH_CONFIG to it",
        )),
        Err(error) => Err(Error::user(format!("cannot read {}: {error}", path.display()))),
    }
}

/// Writes the file, for its owner only.
pub fn save(config: &Config) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = config_path();
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension("partial");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(toml::to_string(config)?.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&partial, &path)?;
    Ok(())
}

/// A connection to a server.
pub struct Client {
    pub context: Context,
    channel: Channel,
    pub namespace: String,
}

fn tls(context: &Context, alpn: &[&[u8]]) -> Result<Arc<rustls::ClientConfig>> {
    let cluster = context
        .cluster
        .parse()
        .map_err(|_| Error::user("the context's cluster is not a cluster's uid"))?;
    let credentials =
        Credentials { certificate_pem: context.certificate.clone(), key_pem: context.key.clone() };
    let trusted = Trusted::Roots { pem: context.roots.clone(), cluster };
    Ok(tls::client_config(trusted, Some(&credentials), alpn, None)?)
}

/// The context that is asked for.
pub fn context(global: &Global) -> Result<Context> {
    let config = config()?;
    let name = global.context.clone().unwrap_or(config.current.clone());
    config.contexts.get(&name).cloned().ok_or_else(|| no_context(&config, &name))
}

/// There is no such context, and the nearest one that there is.
pub fn no_context(config: &Config, name: &str) -> Error {
    let known: Vec<&str> = config.contexts.keys().map(String::as_str).collect();
    let hint = match berth_proto::manifest::nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => format!("contexts are: {}", known.join(", ")),
    };
    Error::user(format!("there is no context \"{name}\"")).hint(hint)
}

/// Looks whether the server is still there, also while nothing is said: a stream that is followed over
/// a link that has gone would wait for ever.
fn alive(endpoint: tonic::transport::Endpoint) -> tonic::transport::Endpoint {
    endpoint.http2_keep_alive_interval(ALIVE).keep_alive_timeout(ALIVE).keep_alive_while_idle(true)
}

impl Client {
    /// Connects to the first address that answers.
    pub async fn connect(global: &Global) -> Result<Self> {
        let context = context(global)?;
        let config = tls(&context, &[tls::ALPN_H2])?;
        let mut last = None;
        for endpoint in &context.endpoints {
            match tls::channel(endpoint, Arc::clone(&config), CONNECT, alive).await {
                Ok(channel) => {
                    let namespace = global.namespace.clone().unwrap_or_default();
                    return Ok(Self { context, channel, namespace });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(|| Error::user("the context names no server"), Error::from))
    }

    pub fn deployments(&self) -> DeploymentServiceClient<Channel> {
        DeploymentServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn events(&self) -> EventServiceClient<Channel> {
        EventServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn logs(&self) -> LogServiceClient<Channel> {
        LogServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn users(&self) -> UserServiceClient<Channel> {
        UserServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    pub fn system(&self) -> SystemServiceClient<Channel> {
        SystemServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A connection that is kept from one request to the next.
struct Held {
    sender: SendRequest<Body>,
    since: Instant,
}

/// A door of the server that takes HTTPS requests, one after the other: over one connection as long as
/// that holds, then over another.
pub struct Door {
    /// Its address.
    pub address: String,
    config: Arc<rustls::ClientConfig>,
    held: Mutex<Option<Held>>,
}

impl Door {
    /// The door at this address, as the context's user; connects with the first request.
    pub fn new(context: &Context, address: &str) -> Result<Self> {
        let config = tls(context, &[b"http/1.1"])?;
        Ok(Self { address: address.to_owned(), config, held: Mutex::new(None) })
    }

    /// One request; answers with status, headers and body.
    pub async fn ask<B>(
        &self,
        request: http::Request<B>,
        deadline: Duration,
    ) -> Result<http::Response<Bytes>>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let connect =
            async { Ok(tls::connect(&self.address, Arc::clone(&self.config), CONNECT).await?) };
        over(&self.held, connect, &self.address, request, deadline).await
    }
}

/// One request over the held connection, or over a new one.
async fn over<B, S>(
    held: &Mutex<Option<Held>>,
    connect: impl Future<Output = Result<S>>,
    address: &str,
    request: http::Request<B>,
    deadline: Duration,
) -> Result<http::Response<Bytes>>
where
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Taken, and given back only when all went well: what broke, was given up or is in doubt is
    // closed.
    let mut before = held.lock().await.take().filter(|held| held.since.elapsed() < KEPT);
    let holds = match &mut before {
        Some(held) => held.sender.ready().await.is_ok(),
        None => false,
    };
    let mut sender = match before.filter(|_| holds) {
        Some(held) => held.sender,
        None => {
            let stream = TokioIo::new(connect.await?);
            let (sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
            tokio::spawn(connection);
            sender
        }
    };
    let has_body = !request.body().is_end_stream();
    let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
    let asking = async {
        let response = sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await?.to_bytes();
        Ok::<_, hyper::Error>(http::Response::from_parts(parts, bytes))
    };
    let answer = match tokio::time::timeout(deadline, asking).await {
        Ok(answer) => answer?,
        Err(_) => {
            return Err(Error::new(Kind::Unavailable, format!("{address} did not answer in time")));
        }
    };
    // A refusal may have come before the body was read to its end.
    if answer.status().is_success() || !has_body {
        *held.lock().await = Some(Held { sender, since: Instant::now() });
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{Empty, Full};
    use hyper::service::service_fn;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Asks a server without TLS in here, which answers with this status; how many connections it has
    /// seen.
    struct Server {
        held: Mutex<Option<Held>>,
        seen: AtomicUsize,
        status: http::StatusCode,
    }

    impl Server {
        fn new(status: u16) -> Self {
            let status = http::StatusCode::from_u16(status).unwrap();
            Self { held: Mutex::new(None), seen: AtomicUsize::new(0), status }
        }

        async fn ask(&self, body: &'static str) -> Result<http::Response<Bytes>> {
            let status = self.status;
            let connect = async {
                self.seen.fetch_add(1, Ordering::Relaxed);
                let (here, there) = tokio::io::duplex(1 << 16);
                let service = service_fn(move |_| async move {
                    let answer = http::Response::builder().status(status);
                    answer.body(Empty::<Bytes>::new())
                });
                let builder = hyper::server::conn::http1::Builder::new();
                tokio::spawn(async move {
                    // One connection, whose end is its client's.
                    let _ = builder.serve_connection(TokioIo::new(there), service).await;
                });
                Ok(here)
            };
            let request = http::Request::post("/").body(Full::new(Bytes::from(body))).unwrap();
            over(&self.held, connect, "here", request, CONNECT).await
        }

        fn seen(&self) -> usize {
            self.seen.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_follow_each_other_over_one_connection_until_it_is_old() {
        let server = Server::new(200);
        for _ in 0..3 {
            server.ask("x").await.unwrap();
        }
        assert_eq!(server.seen(), 1);
        tokio::time::advance(KEPT).await;
        server.ask("x").await.unwrap();
        assert_eq!(server.seen(), 2);
    }

    #[tokio::test]
    async fn a_refused_body_costs_the_connection_and_a_refusal_without_one_does_not() {
        let server = Server::new(404);
        for (body, seen) in [("", 1), ("", 1), ("x", 1), ("", 2), ("", 2)] {
            assert_eq!(server.ask(body).await.unwrap().status(), 404);
            assert_eq!(server.seen(), seen, "{body:?}");
        }
    }
}
