//! One file a family of commands.

mod deploy;
mod look;
mod manage;

use crate::args::{Cli, Command, Global};
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use berth_proto::api::WriteOptions;
use clap::Parser as _;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;

/// Runs the command line.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(carry_out(cli));
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.kind.code())
        }
    }
}

async fn carry_out(cli: Cli) -> Result<u8> {
    let global = cli.global;
    match cli.command {
        Command::Apply(args) => deploy::apply(&global, args).await?,
        Command::Plan(files) => deploy::plan(&global, &files).await?,
        Command::Scale { deployment, replicas } => {
            deploy::scale(&global, &deployment, replicas).await?;
        }
        Command::Rm { deployment } => deploy::remove(&global, &deployment, false).await?,
        Command::Deployment(command) => deploy::deployment(&global, command).await?,
        Command::Release(command) => deploy::release(&global, command).await?,
        Command::Ps { deployment } => look::ps(&global, deployment.as_deref()).await?,
        Command::Logs(args) => look::logs(&global, args).await?,
        Command::Events { follow, deployment, host } => {
            look::events(&global, follow, deployment, host).await?;
        }
        Command::Exec { deployment, replica, command } => {
            return look::exec(&global, deployment, replica, command).await;
        }
        Command::Infer(args) => look::infer(&global, args).await?,
        Command::Build { tag, folder } => manage::build(&global, &tag, &folder).await?,
        Command::Host(command) => manage::host(&global, command).await?,
        Command::Orphan(command) => manage::orphan(&global, command).await?,
        Command::Model(command) => manage::model(&global, command).await?,
        Command::Image(command) => manage::image(&global, command).await?,
        Command::User(command) => manage::user(&global, command).await?,
        Command::Context(command) => manage::context(&global, command)?,
        Command::Server(command) => manage::server(&global, command).await?,
        Command::Registry(command) => manage::registry(&global, command).await?,
        Command::Completion { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "berth", &mut std::io::stdout());
        }
    }
    Ok(0)
}

/// A request with its deadline.
async fn ask<T>(
    global: &Global,
    call: impl Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T> {
    match tokio::time::timeout(global.request_timeout, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Error::new(Kind::Unavailable, "the server did not answer in time")
            .hint("--request-timeout sets how long to wait")),
    }
}

/// A write that may be sent again.
fn write() -> Option<WriteOptions> {
    Some(WriteOptions { request_id: uuid::Uuid::new_v4().to_string(), ..WriteOptions::default() })
}

/// Asks before something is removed.
fn confirm(global: &Global, what: &str) -> Result<()> {
    if global.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::user(format!("this would {what}")).hint("--yes says that you mean it"));
    }
    eprint!("This will {what}. Go on? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if answer.trim().eq_ignore_ascii_case("y") { Ok(()) } else { Err(Error::user("not done")) }
}

/// NAME:VERSION, both needed.
fn name_and_version(reference: &str) -> Result<(&str, &str)> {
    reference
        .rsplit_once(':')
        .filter(|(name, version)| !name.is_empty() && !version.is_empty())
        .ok_or_else(|| Error::user(format!("\"{reference}\" is not NAME:VERSION")))
}

/// KEY=VALUE.
fn pair(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| Error::user(format!("\"{text}\" is not KEY=VALUE")))
}

async fn connect(global: &Global) -> Result<Client> {
    Client::connect(global).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn a_reference_needs_both_parts() {
        assert_eq!(name_and_version("a/b:1.2").unwrap(), ("a/b", "1.2"));
        assert!(name_and_version("a").is_err());
        assert!(name_and_version(":1").is_err());
    }
}
