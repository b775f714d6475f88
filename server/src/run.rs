//! The server as a whole: opens the data folder, the ledger and the doors, and ends cleanly.

use crate::api::users::is_admin;
use crate::api::{Api, auth, standing};
use crate::cluster::{Cluster, Parts, Shown, wall_now};
use crate::config::Settings;
use crate::doors::certificates::{Certificates, Internal, Operators};
use crate::doors::{self, DoorError, DoorTls, Speaks};
use crate::gateway;
use crate::gateway::forward::Forwarder;
use crate::gateway::http::{Gateway, router as gateway_router};
use crate::gateway::route::Routes;
use crate::identity::roots::Roots;
use crate::ledger::Ledger;
use crate::planning;
use crate::registry::access::PeerCertificates;
use crate::registry::{self, Registry};
use crate::store::embedded::{Embedded, told_of_fall_back};
use crate::store::folder::{Folder, free_bytes, is_begun};
use crate::store::{Store, StoreError};
use crate::tasks;
use anyhow::Context as _;
use axum::extract::Request;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use berth_proto::agent::agent_service_server::AgentServiceServer;
use berth_proto::agent::join_service_server::JoinServiceServer;
use berth_proto::api::deployment_service_server::DeploymentServiceServer;
use berth_proto::api::event_service_server::EventServiceServer;
use berth_proto::api::host_service_server::HostServiceServer;
use berth_proto::api::log_service_server::LogServiceServer;
use berth_proto::api::model_service_server::ModelServiceServer;
use berth_proto::api::system_service_server::SystemServiceServer;
use berth_proto::api::user_service_server::UserServiceServer;
use berth_proto::api::{Role, RoleBinding};
use berth_proto::ids::{ClusterUid, Name};
use berth_proto::record::{Meta, UserRecord};
use berth_proto::tls::{ALPN_H2, ALPN_REVERSE, SpiffeId, Subject};
use berth_server_core::batching::Proposal;
use berth_server_core::change::Change;
use berth_server_core::restore;
use berth_server_core::view::View;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::service::Routes as GrpcRoutes;

/// The first admin's certificate.
const ADMIN_DAYS: i64 = 3650;
/// What a start writes, with room to spare: contexts, and what was not materialised yet.
const START_BYTES: u64 = 512 * 1024;
/// Largest message on the control door: an apply of 500 deployments.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Largest message of an agent, as the contract says.
const MAX_AGENT_MESSAGE: usize = 1024 * 1024;

/// File handles that a fleet of a thousand hosts and its callers need.
const FEW_HANDLES: u64 = 4096;

/// Runs the server until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start, or its store fails.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    raise_handles();
    let operators = match &settings.registry_tls {
        None => None,
        Some((certificate, key)) => Some(Arc::new(Operators::read(certificate, key)?)),
    };
    // A first start that finds a port taken leaves no folder behind.
    let early = match is_begun(&settings.data_dir) {
        true => None,
        false => Some(bind(&settings).await?),
    };
    let folder = Arc::new(Folder::open(&settings.data_dir)?);
    let cramped = cramped(&folder, settings.ballast_bytes)?;
    let roots = Roots::open(folder.path())?;
    let (store, opened) = Embedded::open(&folder.path().join("ledger"))?;
    if let Some(why) = &opened.rebuilt {
        tracing::error!(why, "the ledger's store was damaged and was made anew; nothing was lost");
    }
    let entries =
        store.load(b"")?.into_iter().map(|entry| (entry.key, entry.revision, entry.value));
    let mut view = View::load(entries).context("cannot read the ledger")?;
    view.revision = store.revision();
    roots.current().belongs_to(&view.cluster.uid)?;
    let ledger = Ledger::start(Box::new(store), view);
    let registry = Registry::open(
        folder.path().join("registry"),
        registry::Settings {
            min_free_percent: settings.min_free_percent,
            ..registry::Settings::default()
        },
    )
    .context("cannot open the registry's folder")?;

    // Every door is bound before anything is promised on any of them.
    let [control, blobs, gate, pages] = match early {
        Some(bound) => bound,
        None => bind(&settings).await?,
    };
    let addresses =
        [control.local_addr()?, blobs.local_addr()?, gate.local_addr()?, pages.local_addr()?];
    let ports = addresses.map(|a| a.port());
    let first =
        ["admin.toml", "admin.written"].iter().all(|name| !folder.path().join(name).exists());
    first_records(&ledger, roots.cluster(), opened.fell_back.is_some(), first).await?;
    told_of_fall_back(&folder.path().join("ledger"))?;
    let parts = Parts { ledger, roots, registry, settings, ports };
    let cluster = Arc::new(Cluster::new(parts));
    cluster.tell_trust(Vec::new()).await.context("cannot keep the server's addresses")?;
    cluster.cramped.store(cramped, Ordering::Relaxed);

    let mut names = cluster.settings.advertise.clone();
    names.extend(["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]);
    names.dedup();
    let internal = Arc::new(Internal::new(&cluster.roots.current(), names)?);
    let plain = Certificates { internal: Arc::clone(&internal), operators: None };
    let with_operators = Certificates { operators: operators.clone(), ..plain.clone() };
    let roots_pem = cluster.roots.pem();
    let tls = |certificates: &Certificates, alpn: &[&[u8]], speaks| {
        DoorTls::new(certificates.clone(), &roots_pem, alpn, speaks).map(Arc::new)
    };
    let https: &[&[u8]] = &[ALPN_H2, b"http/1.1"];
    let control_tls = tls(&plain, &[ALPN_H2, ALPN_REVERSE], Speaks::Ours)?;
    let gateway_tls = tls(&plain, https, Speaks::Anybody)?;
    let registry_tls = tls(&with_operators, https, Speaks::Anybody)?;

    cluster.show_with(Shown {
        internal,
        doors: [&control_tls, &gateway_tls, &registry_tls].map(Arc::clone).into(),
    });

    let stop = cluster.stopping();
    let routes = Arc::new(Routes::default());
    let mut work = tokio::task::JoinSet::new();
    work.spawn(planning::run(Arc::clone(&cluster), stop.clone()));
    work.spawn(tasks::trust(Arc::clone(&cluster), stop.clone()));
    work.spawn(tasks::sets(Arc::clone(&cluster), stop.clone()));
    work.spawn(tasks::revocations(Arc::clone(&cluster), stop.clone()));
    work.spawn(tasks::certificates(Arc::clone(&cluster), with_operators, stop.clone()));
    work.spawn(tasks::sweep(Arc::clone(&cluster), stop.clone()));
    work.spawn(tasks::space(Arc::clone(&cluster), Arc::clone(&folder), stop.clone()));
    work.spawn(tasks::routes(Arc::clone(&cluster), Arc::clone(&routes), stop.clone()));

    let keeper = Arc::new(auth::Doorkeeper(Arc::clone(&cluster)));
    let entered = doors::accept("control", control, control_tls, stop.clone());
    let (calls_tx, calls) = mpsc::channel(64);
    work.spawn(sort(Arc::clone(&cluster), entered, calls_tx));
    work.spawn(doors::serve_http("control", calls, control_router(&cluster).await?, stop.clone()));

    let ending = |refuse| standing::Door { cluster: Arc::clone(&cluster), refuse };
    let entered = doors::accept("registry", blobs, registry_tls, stop.clone());
    let router = registry::router(cluster.registry.clone(), keeper.clone(), keeper.clone())
        .layer(from_fn(pass_certificates))
        .layer(from_fn_with_state(ending(registry::ended), standing::keep));
    work.spawn(doors::serve_http("registry", entered, router, stop.clone()));

    let entered = doors::accept("gateway", gate, Arc::clone(&gateway_tls), stop.clone());
    let forwarder = Forwarder::new(routes, cluster.hub.clone());
    let router = gateway_router(Gateway { forwarder, guard: keeper.clone() })
        .layer(from_fn_with_state(ending(gateway::ended), standing::keep));
    work.spawn(doors::serve_http("gateway", entered, router, stop.clone()));

    let entered = doors::accept("page", pages, gateway_tls, stop.clone());
    work.spawn(doors::serve_http(
        "page",
        entered,
        crate::page::router(Arc::clone(&cluster)),
        stop.clone(),
    ));

    write_contexts(&cluster, &addresses)?;
    tracing::info!(
        cluster = %cluster.roots.cluster(), control = %addresses[0], registry = %addresses[1],
        gateway = %addresses[2], page = %addresses[3], "the doors are open"
    );

    let mut failed = cluster.ledger.failed();
    // A server without one of its parts would answer and do nothing: whoever supervises it starts it anew.
    let panicked = async {
        loop {
            match work.join_next().await {
                Some(Err(error)) if error.is_panic() => break error,
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let ended = tokio::select! {
        // Cancel-safe, all.
        _ = terminate.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = failed.wait_for(|failed| *failed) => Err(anyhow::anyhow!("the ledger's store has failed")),
        error = panicked => Err(anyhow::anyhow!("a part of the server has failed: {error}")),
    };
    tracing::info!("stopping; containers go on");
    cluster.stop();
    let _ = tokio::time::timeout(Duration::from_secs(10), async {
        while work.join_next().await.is_some() {}
    })
    .await;
    cluster.ledger.checkpoint().await;
    ended
}

/// The doors in the order in which their addresses are told.
async fn bind(settings: &Settings) -> Result<[TcpListener; 4], DoorError> {
    Ok([
        doors::bind("--listen", settings.listen).await?,
        doors::bind("--registry-listen", settings.registry_listen).await?,
        doors::bind("--gateway-listen", settings.gateway_listen).await?,
        doors::bind("--page-listen", settings.page_listen).await?,
    ])
}

/// Makes the ballast, or gives it up where a start would find no room; answers whether there is too
/// little room for it.
fn cramped(folder: &Folder, ballast_bytes: u64) -> Result<bool, StoreError> {
    let free = free_bytes(folder.path())?;
    if free < START_BYTES && folder.release_ballast()? {
        tracing::error!("the disk is full; the ballast is given up");
        return Ok(true);
    }
    Ok(!folder.ballast(ballast_bytes)? && free < ballast_bytes)
}

/// Tells HTTP/2 from reverse connections by what was agreed in the handshake.
async fn sort(
    cluster: Arc<Cluster>,
    mut entered: mpsc::Receiver<doors::Entered>,
    calls: mpsc::Sender<doors::Entered>,
) {
    while let Some(one) = entered.recv().await {
        let session = one.stream.get_ref().1;
        if session.alpn_protocol() != Some(ALPN_REVERSE) {
            if calls.send(one).await.is_err() {
                return;
            }
            continue;
        }
        let peer = session
            .peer_certificates()
            .and_then(|chain| SpiffeId::of(chain.first()?).ok())
            .filter(|id| id.cluster == *cluster.roots.cluster());
        let Some(SpiffeId { subject: Subject::Host(uid), .. }) = peer else {
            tracing::warn!(addr = %one.addr, "a reverse connection without a host's certificate");
            continue;
        };
        let hub = cluster.hub.clone();
        tokio::spawn(async move {
            if let Err(error) = hub.accept(&uid, one.stream).await {
                tracing::warn!(host = %uid, %error, "a reverse connection was refused");
            }
        });
    }
}

async fn pass_certificates(mut request: Request, next: Next) -> axum::response::Response {
    if let Some(doors::PeerCerts(chain)) = request.extensions().get::<doors::PeerCerts>() {
        let chain = PeerCertificates(chain.iter().cloned().collect());
        request.extensions_mut().insert(chain);
    }
    next.run(request).await
}

async fn control_router(cluster: &Arc<Cluster>) -> anyhow::Result<axum::Router> {
    let api = Api(Arc::clone(cluster));
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<DeploymentServiceServer<Api>>().await;
    reporter.set_serving::<AgentServiceServer<Api>>().await;
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(berth_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    macro_rules! bounded {
        ($service:ident) => {
            $service::new(api.clone())
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(4 * MAX_MESSAGE)
        };
    }
    let mut grpc = GrpcRoutes::builder();
    grpc.add_service(health)
        .add_service(describe().build_v1()?)
        .add_service(describe().build_v1alpha()?)
        .add_service(bounded!(DeploymentServiceServer))
        .add_service(bounded!(HostServiceServer))
        .add_service(bounded!(ModelServiceServer))
        .add_service(bounded!(EventServiceServer))
        .add_service(bounded!(LogServiceServer))
        .add_service(bounded!(UserServiceServer))
        .add_service(bounded!(SystemServiceServer))
        .add_service(bounded!(JoinServiceServer))
        // Agents page what is larger.
        .add_service(
            AgentServiceServer::new(api.clone()).max_decoding_message_size(MAX_AGENT_MESSAGE),
        );
    Ok(grpc
        .routes()
        .prepare()
        .into_axum_router()
        .layer(from_fn_with_state(Arc::clone(cluster), auth::check)))
}

/// Each connection takes a file handle, and the usual limit of 1024 is for programs that use `select`.
/// Raised as far as may be without more rights, as Go's runtime does.
fn raise_handles() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, "the limit of file handles could not be raised");
    }
    if let Some(handles) = limit.maximum.filter(|most| *most < FEW_HANDLES) {
        tracing::warn!(
            handles,
            "the limit of file handles is low: each host and each caller takes one or more"
        );
    }
}

/// The records a new cluster begins with, and the epoch after a fallback.
///
/// `first`: the folder holds no context of an admin, and no note that there was one. Whoever has the
/// folder gets one made anew then, also where nobody is left who may do everything.
async fn first_records(
    ledger: &Ledger,
    uid: &ClusterUid,
    fell_back: bool,
    first: bool,
) -> anyhow::Result<()> {
    let view = ledger.view();
    let mut changes = Vec::new();
    if let Some(record) = restore::begun(&view.cluster, uid, fell_back, wall_now()) {
        if fell_back {
            tracing::error!(
                epoch = record.epoch,
                "acknowledged writes may be missing; hosts are only observed until an operator decides, \
                 and join tokens are void"
            );
            changes.extend(restore::void_tokens(&view));
        }
        changes.push(Change::PutCluster(record));
    }
    let admin = view.user("admin").is_some_and(|kept| is_admin(&kept.record));
    if view.cluster.uid.is_empty() || (first && !admin) {
        let now = wall_now().0;
        changes.push(Change::PutUser(Arc::new(UserRecord {
            meta: Some(Meta {
                uid: uuid::Uuid::now_v7().to_string(),
                name: "admin".to_owned(),
                create_unix_ms: now,
                update_unix_ms: now,
                ..Meta::default()
            }),
            bindings: vec![RoleBinding {
                role: Role::Admin as i32,
                namespace: String::new(),
                exec: true,
            }],
            expire_unix_ms: now + ADMIN_DAYS * 86_400_000,
            revoked: false,
            renew_unix_ms: 0,
        })));
    }
    // The epoch comes last, so that a start that ends in between does all of it again.
    for changes in changes.chunks(restore::CHUNK) {
        let (preconditions, changes) = (Vec::new(), changes.to_vec());
        ledger.propose(Proposal { preconditions, changes }).await?;
    }
    Ok(())
}

/// Writes where the doors are, and at the first start the admin's context.
fn write_contexts(cluster: &Cluster, addresses: &[std::net::SocketAddr; 4]) -> anyhow::Result<()> {
    let folder = &cluster.settings.data_dir;
    let admin = folder.join("admin.toml");
    // Once: an operator who takes the file away, or its key from the machine, is not given it again.
    let written = folder.join("admin.written");
    if !admin.exists() && !written.exists() {
        let name: Name = "admin".parse()?;
        let (certificate, key) = cluster.roots.signing().user(&name, ADMIN_DAYS)?;
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let endpoints: Vec<String> = cluster.endpoints.iter().map(|e| quoted(e)).collect();
        let text = format!(
            "# The first admin's context. Copy it to ~/.config/berth/config.toml; whoever has it \
             may do everything.\ncurrent = \"default\"\n\n[contexts.default]\nuser = \"admin\"\n\
             cluster = {}\nendpoints = [{}]\nregistry = {}\ngateway = {}\nroots = {}\n\
             certificate = {}\nkey = {}\n",
            quoted(cluster.roots.cluster().as_str()),
            endpoints.join(", "),
            quoted(&cluster.registry_address),
            quoted(&cluster.gateway_address),
            quoted(&cluster.roots.pem()),
            quoted(&certificate),
            quoted(&key),
        );
        let partial = folder.join("admin.partial");
        std::fs::remove_file(&partial).ok();
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, &admin)?;
    }
    if !written.exists() {
        std::fs::write(&written, b"")?;
    }
    let doors = serde_json::json!({
        "control": addresses[0].to_string(),
        "registry": addresses[1].to_string(),
        "gateway": addresses[2].to_string(),
        "page": addresses[3].to_string(),
    });
    let partial = folder.join("doors.partial");
    std::fs::write(&partial, serde_json::to_vec_pretty(&doors)?)?;
    std::fs::rename(&partial, folder.join("doors.json"))?;
    Ok(())
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
