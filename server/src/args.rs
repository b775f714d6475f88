//! The command line of `berthd`.

use crate::config::{LogFormat, Options, Settings};
use crate::error::Chain;
use clap::Parser;
use std::ffi::OsString;
use std::path::PathBuf;
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
  berthd --config /etc/berth/berthd.toml --log-format json"
)]
pub struct Args {
    /// TOML file with the settings below.
    #[arg(long, env = "BERTHD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

fn settings(args: Args) -> Result<Settings, crate::config::ConfigError> {
    let file = match &args.config {
        Some(path) => Options::from_file(path)?,
        None => Options::default(),
    };
    args.options.over(file).settle()
}

/// Runs the command line; the exit code is 2 for a wrong one, 1 for a server that failed.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
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
}
