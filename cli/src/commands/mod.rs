//! One file a family of commands.

mod apply;
mod audit;
mod backup;
mod context;
mod deployment;
mod exec;
mod follow;
mod host;
mod image;
mod infer;
mod logs;
mod look;
mod model;
mod named;
mod root;
mod user;

use crate::args::{
    Cli, Command, Deployment, Event, Global, Host, Model, Orphan, Release, Token, TopOf, User,
};
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use berth_proto::api::WriteOptions;
use berth_proto::escape::for_terminal;
use berth_proto::ids::is_name;
use clap::Parser as _;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;

/// Segments that a model's name has at most.
const MODEL_SEGMENTS: usize = 3;

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
    let global = cli.global.clone();
    let result = runtime.block_on(async {
        match carry_out(cli).await {
            Ok(code) => Ok(code),
            Err(error) => Err(crate::hints::suggest(&global, error).await),
        }
    });
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.kind == Kind::ReaderGone => ExitCode::from(error.kind.code()),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.kind.code())
        }
    }
}

/// Whether a command lists things that have labels.
fn takes_selector(command: &Command) -> bool {
    match command {
        Command::Ps { .. } | Command::Top { .. } => true,
        Command::Deployment(verb) => matches!(verb, Deployment::List),
        Command::Host(verb) => matches!(verb, Host::List),
        Command::Apply(_)
        | Command::Plan(_)
        | Command::Logs(_)
        | Command::Scale(_)
        | Command::Rm { .. }
        | Command::Infer(_)
        | Command::Build(_)
        | Command::Events(_)
        | Command::Exec(_)
        | Command::Backup(_)
        | Command::Release(_)
        | Command::Orphan(_)
        | Command::Event(_)
        | Command::Audit(_)
        | Command::Model(_)
        | Command::Image(_)
        | Command::User(_)
        | Command::Context(_)
        | Command::Server(_)
        | Command::Root(_)
        | Command::Registry(_)
        | Command::Completion { .. } => false,
    }
}

/// Whether a command lists what the server filters.
fn takes_filter(command: &Command) -> bool {
    match command {
        Command::Ps { .. } | Command::Audit(_) => true,
        Command::Top { of, .. } => matches!(of, TopOf::Hosts),
        Command::Deployment(verb) => matches!(verb, Deployment::List),
        Command::Release(verb) => matches!(verb, Release::List { .. }),
        Command::Host(verb) => matches!(verb, Host::List | Host::Token(Token::List)),
        Command::Orphan(verb) => matches!(verb, Orphan::List),
        Command::Model(verb) => matches!(verb, Model::List | Model::History { .. }),
        Command::User(verb) => matches!(verb, User::List),
        Command::Apply(_)
        | Command::Plan(_)
        | Command::Logs(_)
        | Command::Scale(_)
        | Command::Rm { .. }
        | Command::Infer(_)
        | Command::Build(_)
        | Command::Events(_)
        | Command::Exec(_)
        | Command::Event(_)
        | Command::Image(_)
        | Command::Backup(_)
        | Command::Context(_)
        | Command::Server(_)
        | Command::Root(_)
        | Command::Registry(_)
        | Command::Completion { .. } => false,
    }
}

async fn carry_out(cli: Cli) -> Result<u8> {
    let global = cli.global;
    if global.filter.is_some() && !takes_filter(&cli.command) {
        return Err(Error::new(Kind::Usage, "--filter is for lists").hint(
            "ps, top, audit list, and list of deployments, releases, hosts, join tokens, orphans, \
             models and users, and model history",
        ));
    }
    if global.selector.is_some() && !takes_selector(&cli.command) {
        return Err(Error::new(Kind::Usage, "-l is for lists of what has labels")
            .hint("ps, top, deployment list, host list"));
    }
    match cli.command {
        Command::Apply(args) => return apply::apply(&global, args).await,
        Command::Plan(files) => apply::plan(&global, &files).await?,
        Command::Scale(args) => deployment::scale(&global, args).await?,
        Command::Rm { deployment } => deployment::remove(&global, &deployment, false).await?,
        Command::Deployment(command) => Box::pin(deployment::deployment(&global, command)).await?,
        Command::Release(command) => deployment::release(&global, command).await?,
        Command::Ps { deployment, host } => look::ps(&global, deployment, host).await?,
        Command::Top { of, deployment } => look::top(&global, of, deployment).await?,
        Command::Logs(args) => logs::logs(&global, args).await?,
        Command::Events(args) | Command::Event(Event::List(args)) => {
            logs::events(&global, args).await?;
        }
        Command::Audit(verb) => audit::audit(&global, verb).await?,
        Command::Exec(args) => return exec::exec(&global, args).await,
        Command::Infer(args) => infer::infer(&global, args).await?,
        Command::Build(args) => image::build(&global, args).await?,
        Command::Backup(args) => backup::backup(&global, args).await?,
        Command::Host(command) => host::host(&global, command).await?,
        Command::Orphan(command) => host::orphan(&global, command).await?,
        Command::Model(command) => model::model(&global, command).await?,
        Command::Image(command) => image::image(&global, command).await?,
        Command::User(command) => user::user(&global, command).await?,
        Command::Context(command) => context::context(&global, command).await?,
        Command::Server(command) => context::server(&global, command).await?,
        Command::Root(verb) => root::root(&global, verb).await?,
        Command::Registry(command) => context::registry(&global, command).await?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "berth", &mut script);
            crate::output::raw(&script)?;
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

/// All pages of a list: the call gets each page's request, the name is the answer's field.
macro_rules! pages {
    ($global:expr, $field:ident, |$page:ident| $call:expr) => {{
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let $page = Some(berth_proto::api::Page {
                page_size: 1000,
                page_token: token,
                filter: $global.filter.clone().unwrap_or_default(),
            });
            let answer = crate::commands::ask($global, $call).await?;
            all.extend(answer.$field);
            token = answer.next_page_token;
            if token.is_empty() {
                break all;
            }
        }
    }};
}
pub(crate) use pages;

/// Waits between tries that grow from a fifth of a second to two, and go on until a deadline.
struct Patience {
    pause: std::time::Duration,
    end: Option<tokio::time::Instant>,
    said: bool,
}

impl Patience {
    const FIRST: std::time::Duration = std::time::Duration::from_millis(200);
    const LONGEST: std::time::Duration = std::time::Duration::from_secs(2);

    fn new(end: Option<tokio::time::Instant>) -> Self {
        Self { pause: Self::FIRST, end, said: false }
    }

    /// Something worked again.
    fn calm(&mut self) {
        self.pause = Self::FIRST;
        self.said = false;
    }

    /// Waits, or gives the error back when it is not the server's absence or time is over; says once
    /// that it waits.
    async fn bear(&mut self, error: Error, say: impl FnOnce(String)) -> Result<()> {
        let over = self.end.is_some_and(|end| tokio::time::Instant::now() >= end);
        if error.kind != Kind::Unavailable || over {
            return Err(error);
        }
        if !self.said {
            self.said = true;
            say(format!("{}; trying again", error.message));
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(Self::LONGEST);
        Ok(())
    }
}

/// An error of a stream that had begun: whatever broke it, the server may be back in a moment,
/// unless it said no.
fn broken(status: tonic::Status) -> Error {
    use tonic::Code;
    let transient = matches!(
        status.code(),
        Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::OutOfRange
            | Code::ResourceExhausted
    );
    let mut error = Error::from(status);
    if transient {
        error.kind = Kind::Unavailable;
    }
    error
}

/// A write that may be sent again.
fn write() -> Option<WriteOptions> {
    Some(WriteOptions { request_id: uuid::Uuid::new_v4().to_string(), ..WriteOptions::default() })
}

/// Asks as [`confirm`] does, once `known` has told that it is there.
async fn confirm_known(
    global: &Global,
    what: &str,
    known: impl Future<Output = Result<()>>,
) -> Result<()> {
    if !global.yes {
        known.await?;
    }
    confirm(global, what)
}

/// Asks before something is removed.
fn confirm(global: &Global, what: &str) -> Result<()> {
    if global.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::user(format!("this would {what}, and nobody can be asked"))
            .hint("--yes says that you mean it"));
    }
    eprint!("This will {what}. Go on? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if answer.trim().eq_ignore_ascii_case("y") { Ok(()) } else { Err(Error::user("not done")) }
}

/// A name for people, with its namespace where that is not the usual one.
fn in_namespace(namespace: &str, name: &str) -> String {
    if namespace.is_empty() || namespace == "default" {
        name.to_owned()
    } else {
        format!("{namespace}/{name}")
    }
}

/// NAME:VERSION, both needed.
fn name_and_version(reference: &str) -> Result<(&str, &str)> {
    reference
        .rsplit_once(':')
        .filter(|(name, version)| !name.is_empty() && !version.is_empty())
        .ok_or_else(|| {
            Error::new(Kind::Usage, format!("\"{reference}\" is not NAME:VERSION"))
                .hint("for example iris:1 or vision/iris:2024-06")
        })
}

/// NAME:VERSION of a model, as the server takes it: told before anything is built or sent.
fn model_and_version(reference: &str) -> Result<(&str, &str)> {
    let (name, version) = name_and_version(reference)?;
    if name.split('/').count() > MODEL_SEGMENTS || !name.split('/').all(is_name) {
        return Err(Error::new(
            Kind::Usage,
            format!("\"{}\" is no model's name", for_terminal(name)),
        )
        .hint(
            "1 to 3 segments of a-z, 0-9 and '-', each beginning and ending with a letter or \
               digit, joined by '/'",
        ));
    }
    if !is_version(version) {
        return Err(Error::new(
            Kind::Usage,
            format!("\"{}\" is no version", for_terminal(version)),
        )
        .hint("1 to 128 of letters, digits, '.', '_' and '-', not beginning with '.' or '-'"));
    }
    Ok((name, version))
}

/// Whether this can be a version: a tag of the registry.
fn is_version(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = text.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'))
}

/// KEY=VALUE.
fn pair(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| Error::new(Kind::Usage, format!("\"{text}\" is not KEY=VALUE")))
}

async fn connect(global: &Global) -> Result<Client> {
    Client::connect(global).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// The whole help text, as people see it on a terminal of 100 columns. `UPDATE=1` writes it anew.
    #[test]
    fn the_help_is_as_agreed() {
        let mut text = String::new();
        help_of(&mut Cli::command().term_width(100), "berth", &mut text);
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let agreed = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = text.lines().zip(agreed.lines()).find(|(now, then)| now != then);
        assert_eq!(differs, None, "the help has changed; UPDATE=1 cargo test writes it anew");
        assert_eq!(text.lines().count(), agreed.lines().count());
    }

    fn help_of(command: &mut clap::Command, path: &str, out: &mut String) {
        out.push_str(&format!("==== {path} --help\n{}\n", command.render_long_help()));
        for sub in command.get_subcommands_mut().filter(|s| s.get_name() != "help") {
            let path = format!("{path} {}", sub.get_name());
            let mut sub = sub.clone().term_width(100);
            help_of(&mut sub, &path, out);
        }
    }

    /// The grammar scripts rely on: each of these parses.
    #[test]
    fn the_grammar_holds() {
        for line in [
            "deployment list",
            "deployment show iris -o yaml",
            "deployment scale iris 3",
            "deployment restart iris",
            "deployment rm iris --yes",
            "deployment rollout status iris",
            "deployment rollout history iris",
            "deployment rollout undo iris --to 2",
            "deployment rollout undo iris --wait",
            "deployment rollout status iris --wait --timeout 1m",
            "deployment restart iris --wait",
            "release list iris",
            "release show iris 2",
            "host list -l zone=eu",
            "host show a",
            "host label a zone=eu rack-",
            "host cordon a",
            "host uncordon a",
            "host drain a",
            "host rm a --force --wipe",
            "host remove a",
            "host approve a",
            "host token create --ttl 1h --uses 2 --label a=b --require-approval",
            "host token create --rejoin a",
            "host token list",
            "host token rm x",
            "orphan list",
            "orphan adopt --host a",
            "orphan release --host a",
            "orphan adopt r1 r2",
            "backup f",
            "backup f --recovery-key k",
            "user create a --out f",
            "server backup f --new-recovery-key",
            "model push a:1 f --alias x --param a=b --metric c=1",
            "model list",
            "model show a@x",
            "model alias a:1 x",
            "model unalias a x",
            "model history a --alias x --at 2026-01-01T00:00:00Z",
            "model rm a:1",
            "user create a --role operator -n team --expires 30d --exec",
            "user list",
            "user token a",
            "user revoke a --token x",
            "user token a --expires 30d --deployment iris",
            "user revoke a",
            "audit list --limit 5",
            "host list --filter labels.zone=eu",
            "event list --since 1h",
            "context list",
            "context show",
            "context create a --from f",
            "context use a",
            "context rm a",
            "registry gc --dry-run",
            "apply -f a -f b --wait-all --timeout 5m",
            "apply -f - --no-wait",
            "plan -f a -o json",
            "ps iris -o wide",
            "logs -f iris --since 10m --tail 3 --timestamps",
            "scale iris 2",
            "scale iris 2 --wait --timeout 1m",
            "image list",
            "image tags runtimes/onnx",
            "rm iris -y",
            "infer iris --input f",
            "build -t a:1 .",
            "events -f --deployment iris",
            "exec -t iris -- sh -c true",
            "top",
            "top replicas iris",
            "ps -o wide -l a=b -n x --context c --request-timeout 5s --yes",
            "completion bash",
        ] {
            let words = std::iter::once("berth").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("berth {line}: {error}");
            }
        }
        for line in [
            "apply",
            "apply -f a --no-wait --wait-all",
            "ps -o xml",
            "exec iris",
            "nosuch",
            "orphan adopt",
            "scale iris 2 --timeout 1m",
            "deployment restart iris --timeout 1m",
            "orphan release r1 --host a",
        ] {
            let words = std::iter::once("berth").chain(line.split(' '));
            let error = Cli::try_parse_from(words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        assert_eq!(Cli::try_parse_from(["berth", "--help"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn every_shell_is_completed() {
        for shell in
            [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish]
        {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "berth", &mut script);
            let script = String::from_utf8(script).unwrap();
            for word in ["rollout", "request-timeout", "wait-all", "wide"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }

    #[test]
    fn a_name_is_told_with_a_namespace_that_is_not_the_usual_one() {
        assert_eq!(in_namespace("default", "iris"), "iris");
        assert_eq!(in_namespace("", "h1"), "h1");
        assert_eq!(in_namespace("team", "iris"), "team/iris");
    }

    #[test]
    fn a_reference_needs_both_parts() {
        assert_eq!(name_and_version("a/b:1.2").unwrap(), ("a/b", "1.2"));
        assert_eq!(model_and_version("a/b/c-1:v1.2_x").unwrap(), ("a/b/c-1", "v1.2_x"));
        for bad in ["iris: 5", "Hello:1", "a/b/c/d:1", "a//b:1", "-a:1", "a:.1", "a:1/2", "a:ö"] {
            let error = model_and_version(bad).unwrap_err();
            assert_eq!(error.kind, Kind::Usage, "{bad}");
            assert!(error.hint.is_some(), "{bad}");
        }
        for bad in ["a", ":1", "a:"] {
            assert_eq!(name_and_version(bad).unwrap_err().kind, Kind::Usage, "{bad}");
        }
    }

    #[tokio::test]
    async fn nobody_is_asked_about_what_is_not_there_and_nothing_is_looked_up_that_is_meant() {
        let global = |args: &[&str]| {
            Cli::try_parse_from([&["berth"], args, &["ps"]].concat()).unwrap().global
        };
        let missing = async { Err(Error::user("host \"x\" does not exist")) };
        let error = confirm_known(&global(&[]), "move all", missing).await.unwrap_err();
        assert_eq!(error.message, "host \"x\" does not exist");
        let never = std::future::pending();
        assert!(confirm_known(&global(&["--yes"]), "move all", never).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_servers_absence_is_waited_for_and_not_for_ever() {
        let end = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        let mut patience = Patience::new(Some(end));
        let mut said = 0;
        let mut tries = 0;
        while patience.bear(Error::new(Kind::Unavailable, "away"), |_| said += 1).await.is_ok() {
            tries += 1;
        }
        assert_eq!(said, 1);
        assert!((15..30).contains(&tries), "{tries}");
        let mut patience = Patience::new(None);
        assert!(patience.bear(Error::new(Kind::Denied, "no"), |_| ()).await.is_err());
    }
}
