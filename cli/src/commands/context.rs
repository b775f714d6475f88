//! Servers this command line knows, the one in use, and its registry.

use super::{ask, confirm, connect, write};
use crate::args::{ContextCommand, Global, Output, Registry, Server};
use crate::client;
use crate::error::{Error, Kind, Result};
use crate::output::{moment, print, say};
use berth_proto::api::*;
use berth_proto::manifest;
use berth_proto::quantity::human_bytes;
use berth_proto::words::counted;
use serde_json::{Value, json};

/// A context that there is, or an error with the nearest one.
fn known(config: &client::Config, name: &str) -> Result<()> {
    if config.contexts.contains_key(name) {
        return Ok(());
    }
    Err(client::no_context(config, name))
}

/// A new key and certificate, and what else the server tells of itself now.
async fn renew(global: &Global, config: client::Config) -> Result<()> {
    let name = global.context.clone().unwrap_or_else(|| config.current.clone());
    known(&config, &name)?;
    let client = connect(global).await?;
    let (key, csr_pem) = berth_proto::tls::key_and_request()?;
    let request = RenewCertificateRequest { write: write(), csr_pem };
    let made = ask(global, client.users().renew_certificate(request)).await?;
    let held = client.context;
    // The addresses that work stay behind those that are told.
    let mut endpoints = made.endpoints;
    for address in held.endpoints {
        if !endpoints.contains(&address) {
            endpoints.push(address);
        }
    }
    let told = |told: String, held: String| if told.is_empty() { held } else { told };
    let context = client::Context {
        endpoints,
        registry: told(made.registry, held.registry),
        gateway: told(made.gateway, held.gateway),
        roots: made.roots_pem,
        certificate: made.certificate_pem,
        key,
        user: held.user,
        cluster: held.cluster,
    };
    let (_, until) = berth_proto::tls::validity(&context.certificate)?;
    let expire_time = Some(prost_types::Timestamp { seconds: until, nanos: 0 });
    let roots = berth_proto::tls::certificates(&context.roots)?.len();
    // As it is by now: somebody else may have changed it meanwhile.
    let mut config = client::config()?;
    config.contexts.insert(name.clone(), context);
    client::save(&config)?;
    let words = format!("{name}: renewed; it knows {}", counted(roots, "root"));
    let expire_time = moment(expire_time.as_ref());
    say(global, &words, &json!({"name": name, "roots": roots, "expireTime": expire_time}))
}

pub async fn context(global: &Global, verb: ContextCommand) -> Result<()> {
    // The first context may be taken over before there is a file.
    let mut config = match (client::config(), &verb) {
        (Err(_), ContextCommand::Create { .. }) if !client::config_path().exists() => {
            client::Config::default()
        }
        (config, _) => config?,
    };
    match verb {
        ContextCommand::List => {
            let rows = config
                .contexts
                .iter()
                .map(|(name, c)| {
                    let mark = if *name == config.current { "*" } else { "" };
                    vec![mark.to_owned(), name.clone(), c.user.clone(), c.endpoints.join(", ")]
                })
                .collect();
            let value = config.contexts.iter().map(|(name, c)| json!({"name": name, "current": *name == config.current, "user": c.user, "endpoints": c.endpoints})).collect();
            print(global, &["CURRENT", "NAME", "USER", "ENDPOINTS"], 4, rows, &Value::Array(value))
        }
        ContextCommand::Show => {
            let c = client::context(global)?;
            let value = json!({"user": c.user, "cluster": c.cluster, "endpoints": c.endpoints, "registry": c.registry, "gateway": c.gateway});
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
        ContextCommand::Create { name, from, force } => {
            let text = if from.as_os_str() == "-" {
                std::io::read_to_string(std::io::stdin())?
            } else {
                std::fs::read_to_string(&from)
                    .map_err(|e| Error::user(format!("cannot read {}: {e}", from.display())))?
            };
            let given: client::Config = toml::from_str(&text).map_err(|e| {
                Error::user(format!("{} holds no context: {e}", from.display())).hint(
                    "admin.toml in a server's data folder is one; `berth user create` prints one",
                )
            })?;
            let Some(context) = given.contexts.get(&given.current).cloned() else {
                return Err(Error::user("the file's current context is not in it"));
            };
            if config.contexts.contains_key(&name) && !force {
                return Err(Error::user(format!("there is a context \"{name}\" already"))
                    .hint("--force puts this one in its place"));
            }
            let value = json!({"name": name, "user": context.user, "endpoints": context.endpoints});
            if config.contexts.is_empty() || !config.contexts.contains_key(&config.current) {
                config.current.clone_from(&name);
            }
            let words = format!("{name}: {} at {}", context.user, context.endpoints.join(", "));
            config.contexts.insert(name, context);
            client::save(&config)?;
            say(global, &words, &value)
        }
        ContextCommand::Renew => renew(global, config).await,
        ContextCommand::Use { name } => {
            known(&config, &name)?;
            config.current.clone_from(&name);
            client::save(&config)?;
            say(global, &format!("{name} is used now"), &json!({"current": name}))
        }
        ContextCommand::Rm { name } => {
            known(&config, &name)?;
            confirm(global, &format!("forget the context \"{name}\", with its key"))?;
            config.contexts.remove(&name);
            client::save(&config)?;
            say(global, &format!("{name}: forgotten"), &json!({"name": name, "removed": true}))
        }
    }
}

pub async fn server(global: &Global, verb: Server) -> Result<()> {
    let wait = match verb {
        Server::Info { wait } => wait,
        Server::Page => {
            let client = connect(global).await?;
            let mut system = client.system();
            let url = ask(global, system.create_page_link(CreatePageLinkRequest {})).await?.url;
            return say(global, &url, &json!({"url": url}));
        }
        Server::Backup(args) => return super::backup::backup(global, args).await,
    };
    let end = tokio::time::Instant::now() + wait.unwrap_or_default();
    let info = loop {
        let asked = async {
            let client = connect(global).await?;
            ask(global, client.system().get_server_info(GetServerInfoRequest {})).await
        };
        match asked.await {
            Ok(info) => break info,
            Err(error) if error.kind == Kind::Unavailable && tokio::time::Instant::now() < end => {
                // Between two tries, until the time that was asked for is over.
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            Err(error) => return Err(error),
        }
    };
    let value = json!({
        "version": info.version, "cluster": info.cluster, "epoch": info.epoch, "revision": info.revision,
        "startTime": moment(info.start_time.as_ref()), "endpoints": info.endpoints,
        "registry": info.registry, "gateway": info.gateway, "page": info.page, "warnings": info.warnings,
    });
    say(global, manifest::to_yaml(&value).trim_end(), &value)
}

pub async fn registry(global: &Global, verb: Registry) -> Result<()> {
    let Registry::Gc { dry_run } = verb;
    let client = connect(global).await?;
    let done =
        ask(global, client.system().collect_garbage(CollectGarbageRequest { dry_run })).await?;
    let verb = if dry_run { "would be removed" } else { "removed" };
    let words =
        format!("{}, {}: {verb}", counted(done.count, "blob"), human_bytes(done.size_bytes));
    let value = json!({"dryRun": dry_run, "count": done.count, "sizeBytes": done.size_bytes, "digests": done.digests});
    if global.output == Output::Wide {
        eprintln!("{}", done.digests.join("\n"));
    }
    say(global, &words, &value)
}
