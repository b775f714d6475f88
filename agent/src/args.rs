//! The command line of `berth-agent`.

use crate::config::Config;
use crate::engine::docker::DockerEngine;
use crate::engine::{ContainerState, Engine, LogQuery, Source};
use crate::reconciler::{LABEL_ATTEMPT, LABEL_REPLICA};
use crate::store::Store;
use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use futures_util::StreamExt as _;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// The Berth agent: reconciles this host's container engine with what the server wants.
///
/// It only dials out, keeps what it was told on its own disk, and works the same when the server is
/// away. Stopping it stops no container.
#[derive(Debug, Parser)]
#[command(
    name = "berth-agent",
    version,
    after_help = "Examples:
  berth-agent join --server berth.example.org:7443 --token berth-join-v1....
  berth-agent run
  berth-agent status        # works with the server gone"
)]
pub struct Args {
    /// Folder of the agent's identity, its desired set and its models.
    #[arg(
        long,
        global = true,
        env = "BERTH_AGENT_DATA_DIR",
        default_value = "/var/lib/berth-agent"
    )]
    pub data_dir: PathBuf,
    /// The engine's socket.
    #[arg(long, global = true, env = "BERTH_AGENT_ENGINE", default_value = "/var/run/docker.sock")]
    pub engine: PathBuf,
    /// TOML file with labels, reserve and the host's own policy. Default: /etc/berth/agent.toml.
    #[arg(long, global = true, env = "BERTH_AGENT_CONFIG")]
    pub config: Option<PathBuf>,
    /// What is logged, e.g. `info` or `berth_agent=debug`.
    #[arg(long, global = true, env = "BERTH_AGENT_LOG", default_value = "info")]
    pub log: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent (the default).
    Run,
    /// Make this machine a host of a cluster, with a token of `berth host token create`.
    Join {
        /// The server's address, HOST:PORT.
        #[arg(long)]
        server: String,
        /// The token; also from BERTH_JOIN_TOKEN, so that it stays out of the process list.
        #[arg(long, env = "BERTH_JOIN_TOKEN", hide_env_values = true)]
        token: String,
        /// The host's name. Default: the machine's.
        #[arg(long)]
        name: Option<String>,
    },
    /// Name another address of the server: the last resort when all known ones are gone.
    SetServer {
        /// HOST:PORT.
        server: String,
    },
    /// Forget the cluster, for a host whose cluster is gone.
    Leave {
        /// Also remove the cluster's containers.
        #[arg(long)]
        remove_containers: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Who this host is and what it was told.
    Status,
    /// The cluster's containers on this host.
    Ps,
    /// A replica's output, from the engine here.
    Logs {
        /// The replica's uid, or the beginning of it.
        replica: String,
        /// Only the last so many lines.
        #[arg(long)]
        tail: Option<u32>,
    },
}

/// Runs the command line.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&args.log)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    // One thread: an idle agent shall cost a few megabytes.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(carry_out(args));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", crate::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn carry_out(args: Args) -> anyhow::Result<()> {
    let config = Config::load(args.config.as_deref())?;
    let engine = DockerEngine::new(args.engine.clone());
    match args.command.unwrap_or(Command::Run) {
        Command::Run => crate::run::run(&args.data_dir, &args.engine, config).await,
        Command::Join { server, token, name } => {
            let store = Store::open(&args.data_dir)?;
            let facts = crate::facts::gather(&config, &args.data_dir, &engine).await;
            let name = name.unwrap_or_else(machine_name);
            let held = crate::join::join(&store, &server, &token, &name, facts).await?;
            println!("joined cluster {} as host \"{}\"", held.cluster, held.name);
            println!("now run: berth-agent run --data-dir {}", args.data_dir.display());
            Ok(())
        }
        Command::SetServer { server } => {
            let store = Store::open(&args.data_dir).context("stop the agent first")?;
            let mut identity = store.identity()?;
            let trust = identity.trust.get_or_insert_default();
            trust.endpoints.retain(|e| *e != server);
            trust.endpoints.insert(0, server);
            store.put_identity(&identity)?;
            Ok(())
        }
        Command::Leave { remove_containers, yes } => {
            let identity = Store::peek(&args.data_dir).identity()?;
            if !yes {
                bail!("this forgets cluster {}; say --yes to do so", identity.cluster);
            }
            let cluster = identity.cluster.parse()?;
            if remove_containers {
                for container in engine.observe(&cluster).await? {
                    engine.remove(&container.id, true).await?;
                    println!("removed {}", container.name);
                }
                engine.remove_network(&crate::reconciler::bridge(&cluster)).await.ok();
            }
            for name in ["identity", "set"] {
                std::fs::remove_file(args.data_dir.join(name)).ok();
            }
            println!("left cluster {}", identity.cluster);
            Ok(())
        }
        Command::Status => {
            let store = Store::peek(&args.data_dir);
            let identity = store.identity()?;
            let set = store.set()?;
            println!("host:     {} ({})", identity.name, identity.host_uid);
            println!("cluster:  {}", identity.cluster);
            let trust = identity.trust.unwrap_or_default();
            println!("servers:  {}", trust.endpoints.join(", "));
            match set.id {
                Some(id) => println!(
                    "set:      {}.{}, {} replicas",
                    id.epoch,
                    id.generation,
                    set.entries.len()
                ),
                None => println!("set:      none was ever received"),
            }
            let answer = match engine.info().await {
                Ok(info) => format!("{} {}", info.name, info.version),
                Err(error) => format!("does not answer: {error}"),
            };
            println!("engine:   {answer}");
            Ok(())
        }
        Command::Ps => {
            let identity = Store::peek(&args.data_dir).identity()?;
            let mut out = std::io::stdout().lock();
            writeln!(out, "{:<38} {:>7}  {:<12} CONTAINER", "REPLICA", "ATTEMPT", "STATE")?;
            for c in engine.observe(&identity.cluster.parse()?).await? {
                let label = |key: &str| c.labels.get(key).map_or("", String::as_str);
                let state = match &c.state {
                    ContainerState::Created => "created".to_owned(),
                    ContainerState::Running { .. } => "running".to_owned(),
                    ContainerState::Exited { code, .. } => format!("exited ({code})"),
                    ContainerState::Removing => "removing".to_owned(),
                };
                let (replica, attempt) = (label(LABEL_REPLICA), label(LABEL_ATTEMPT));
                writeln!(out, "{replica:<38} {attempt:>7}  {state:<12} {}", c.name)?;
            }
            Ok(())
        }
        Command::Logs { replica, tail } => {
            let identity = Store::peek(&args.data_dir).identity()?;
            let mut all = engine.observe(&identity.cluster.parse()?).await?;
            all.retain(|c| c.labels.get(LABEL_REPLICA).is_some_and(|r| r.starts_with(&replica)));
            all.sort_by_key(|c| c.labels.get(LABEL_ATTEMPT).and_then(|a| a.parse::<u32>().ok()));
            let Some(newest) = all.last() else {
                bail!("no container of a replica \"{replica}\" is here; see berth-agent ps");
            };
            let mut lines = engine.logs(&newest.id, LogQuery { tail, ..LogQuery::default() });
            while let Some(chunk) = lines.next().await {
                let chunk = chunk?;
                match chunk.source {
                    Source::Stdout => std::io::stdout().write_all(&chunk.bytes)?,
                    Source::Stderr => std::io::stderr().write_all(&chunk.bytes)?,
                }
            }
            Ok(())
        }
    }
}

/// The machine's name, made fit: lower case, other characters as '-'.
fn machine_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    let name = name.trim_matches('-').to_owned();
    if name.is_empty() { "host".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
        assert!(berth_proto::ids::is_name(&machine_name()));
    }
}
