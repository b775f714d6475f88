//! The command line of `berth-agent`.

use crate::config::Config;
use crate::engine::docker::DockerEngine;
use crate::local::{self, Output};
use crate::store::Store;
use anyhow::bail;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
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
  berth-agent status                     # works with the server gone
  berth-agent logs iris/0 --tail 20      # so does this"
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
    /// Name another address of the server: the last resort when all known ones are gone. Once it is
    /// reached, the server tells its addresses itself.
    SetServer {
        /// HOST:PORT.
        server: String,
        /// HOST:PORT of its registry, where that has moved as well.
        #[arg(long)]
        registry: Option<String>,
    },
    /// Forget the cluster, for a host whose cluster is gone.
    Leave {
        /// Also remove the cluster's containers, and the models and the names of images brought for them.
        #[arg(long)]
        remove_containers: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Who this host is and what it was told.
    Status {
        /// How it is shown.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// The cluster's containers on this host.
    Ps {
        /// How it is shown.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// A replica's output, from the engine here.
    Logs {
        /// DEPLOYMENT/SLOT, a deployment of which one replica is here, or the beginning of a uid.
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
    let filter = match tracing_subscriber::EnvFilter::try_new(&args.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("error: --log {}: {error}; for example: info, berth_agent=debug", args.log);
            return ExitCode::from(2);
        }
    };
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
            let facts =
                crate::facts::gather(&config, &args.data_dir, &engine, true, None, &[]).await;
            let name = name.unwrap_or_else(machine_name);
            let held = crate::join::join(&store, &server, &token, &name, facts).await?;
            println!("joined cluster {} as host \"{}\"", held.cluster, held.name);
            println!("now run: berth-agent run --data-dir {}", args.data_dir.display());
            Ok(())
        }
        Command::SetServer { server, registry } => {
            local::set_server(&args.data_dir, &server, registry.as_deref())
        }
        Command::Leave { remove_containers, yes } => {
            if !yes {
                let identity = Store::peek(&args.data_dir).identity()?;
                bail!("this forgets cluster {}; say --yes to do so", identity.cluster);
            }
            local::leave(&args.data_dir, &engine, remove_containers, &mut std::io::stdout()).await
        }
        Command::Status { output } => {
            local::status(&args.data_dir, &engine, output, &mut std::io::stdout()).await
        }
        Command::Ps { output } => {
            local::ps(&args.data_dir, &engine, output, &mut std::io::stdout()).await
        }
        Command::Logs { replica, tail } => {
            let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
            local::logs(&args.data_dir, &engine, &replica, tail, (&mut out, &mut err)).await
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
