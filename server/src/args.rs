//! The command line of `berthd`.

use crate::backup::{self, BackupError};
use crate::cluster::wall_now;
use crate::config::{LogFormat, Options, Settings};
use crate::error::Chain;
use berth_proto::quantity::human_bytes;
use berth_proto::words::counted;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The Berth server: keeps the ledger, schedules deployments onto hosts, is registry and gateway.
///
/// Without any option it listens on loopback only and keeps everything in /var/lib/berth. The first
/// start writes the admin's context to admin.toml in the data folder: copy it to
/// ~/.config/berth/config.toml for the `berth` command.
///
/// Settings are taken from flags, then from BERTHD_... variables, then from the TOML file (the same
/// names as the flags, without the dashes in front), then from the defaults.
#[derive(Debug, Parser)]
#[command(
    name = "berthd",
    version,
    after_help = "Examples:
  berthd --data-dir ./data
  berthd --listen 0.0.0.0:7443 --registry-listen 0.0.0.0:7444 --advertise berth.example.org
  berthd --config /etc/berth/berthd.toml --log-format json
  berthd backup /backups/berth-monday.age
  berthd restore /backups/berth-monday.age --data-dir /srv/berth"
)]
pub struct Args {
    /// TOML file with the settings below.
    #[arg(long, env = "BERTHD_CONFIG", value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
enum Command {
    /// Back up the data folder of a server that does not run (`berth backup` asks a running one).
    ///
    /// The file, readable by its owner alone, holds the ledger and the key of the cluster's CA, and
    /// names the registry's blobs, whose bytes are not in it: copy the folder `registry` as well. It is
    /// encrypted to the recovery key. That is made with the first backup and printed once, to standard
    /// output: keep it apart from the backups. Without it no backup can be restored.
    Backup {
        /// File to write; must not exist.
        file: PathBuf,
        /// Make a new recovery key, for this backup and those that follow.
        #[arg(long)]
        new_recovery_key: bool,
    },
    /// Make a data folder from a backup.
    ///
    /// The data folder must be empty or not be there. The recovery key is asked for on standard input
    /// unless it is in a file. Nothing that runs is stopped: the restored server has a new epoch, and
    /// a host gets nothing to do before all that it runs is known or decided about (`berth orphan`).
    /// Join tokens made before are void; users that were revoked since the backup are not revoked.
    Restore {
        /// The backup.
        file: PathBuf,
        /// File with the recovery key.
        #[arg(long, value_name = "FILE")]
        recovery_key_file: Option<PathBuf>,
    },
}

fn back_up(data: &Path, file: &Path, new_key: bool) -> Result<(), BackupError> {
    let made = backup::make(data, file, new_key)?;
    eprintln!(
        "{}: {}, the ledger as of revision {} and the CA's key, encrypted",
        file.display(),
        human_bytes(made.size_bytes),
        made.revision
    );
    if made.blobs > 0 {
        let registry = data.join("registry");
        let blobs = counted(made.blobs, "blob");
        eprintln!("not in it, in the registry: {blobs}; copy {}", registry.display());
    }
    match made.recovery.shown {
        Some(key) => {
            eprintln!("the recovery key, shown once; keep it apart from the backups:");
            println!("{key}");
        }
        None => eprintln!("the recovery key that was shown before opens it"),
    }
    Ok(())
}

fn recovery_key(file: Option<&Path>) -> Result<String, BackupError> {
    let unread = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::File { doing: "read the recovery key from", path, source }
    };
    if let Some(path) = file {
        return std::fs::read_to_string(path).map_err(unread(path));
    }
    eprintln!("recovery key (AGE-SECRET-KEY-1...):");
    let mut key = String::new();
    std::io::stdin().lock().read_line(&mut key).map_err(unread(Path::new("standard input")))?;
    Ok(key)
}

fn restore(data: &Path, file: &Path, key: Option<&Path>) -> Result<(), BackupError> {
    let done = backup::restore(file, &recovery_key(key)?, data, wall_now())?;
    eprintln!(
        "{}: cluster {}, {} entries as of revision {}; the epoch is {} now",
        data.display(),
        done.cluster,
        done.entries,
        done.revision,
        done.epoch
    );
    if done.void_tokens > 0 {
        eprintln!("void now: {}", counted(done.void_tokens, "join token"));
    }
    if done.blobs.0 > 0 {
        eprintln!(
            "the registry held {}, {}: put a copy of its folder at {} before starting, or push \
             again what is asked for",
            counted(done.blobs.0, "blob"),
            human_bytes(done.blobs.1),
            data.join("registry").display()
        );
    }
    eprintln!("next: start berthd on this folder, then `berth orphan list`");
    Ok(())
}

fn settings(args: Args) -> Result<Settings, crate::config::ConfigError> {
    let file = match &args.config {
        Some(path) => Options::from_file(path)?,
        None => Options::default(),
    };
    args.options.over(file).settle()
}

/// Runs a command that serves nothing.
fn carry_out(command: Command, settings: &Settings) -> ExitCode {
    let data = &settings.data_dir;
    let done = match command {
        Command::Backup { file, new_recovery_key } => back_up(data, &file, new_recovery_key),
        Command::Restore { file, recovery_key_file } => {
            restore(data, &file, recovery_key_file.as_deref())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", Chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Runs the command line; the exit code is 2 for a wrong one, 1 for a server that failed.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let command = args.command.take();
    let settings = match settings(args) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("error: {}", Chain(&error));
            return ExitCode::from(2);
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&settings.log)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    if let Some(command) = command {
        return carry_out(command, &settings);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(crate::run::run(settings));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn the_help_of_each_option_tells_what_holds_without_it() {
        use clap::CommandFactory as _;
        let command = Args::command();
        let holds = Options::default().settle().unwrap();
        for (option, default) in [
            ("data_dir", holds.data_dir.display().to_string()),
            ("listen", holds.listen.to_string()),
            ("registry_listen", holds.registry_listen.to_string()),
            ("gateway_listen", holds.gateway_listen.to_string()),
            ("page_listen", holds.page_listen.to_string()),
            ("log_format", format!("{:?}", holds.log_format).to_lowercase()),
            ("log", holds.log),
            ("ballast_mib", (holds.ballast_bytes >> 20).to_string()),
            ("min_free_percent", holds.min_free_percent.to_string()),
            ("ping_seconds", holds.ping.as_secs().to_string()),
            ("idle_seconds", holds.idle.as_secs().to_string()),
            ("rekey_grace_days", (holds.rekey_grace.as_secs() / 86_400).to_string()),
            ("onnx_runtime", holds.onnx_runtime),
        ] {
            let option = command.get_arguments().find(|a| a.get_id() == option).unwrap();
            let help = option.get_long_help().or(option.get_help()).unwrap().to_string();
            let told = help.split("Default:").nth(1).unwrap_or_default();
            assert!(told.contains(&default), "{}: {help}", option.get_id());
        }
        // Without these nothing is in their place, or another option says what.
        let told = |id: &str| matches!(id, "advertise" | "tls_cert" | "tls_key" | "config");
        let all = command.get_arguments().filter(|a| !told(a.get_id().as_str()));
        assert_eq!(all.filter(|a| !["help", "version"].contains(&a.get_id().as_str())).count(), 13);
    }
}
