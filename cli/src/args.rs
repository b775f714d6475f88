//! The command line. The doc comments are the help.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Put machine-learning models on fleets of edge hosts.
#[derive(Debug, Parser)]
#[command(
    name = "berth",
    version,
    propagate_version = true,
    after_help = "Examples:
  berth model push iris:1 ./model.onnx --alias champion
  berth plan  -f iris.yaml         what would happen, and where
  berth apply -f iris.yaml         make it so, and wait until it is
  berth ps                         what runs, and why something does not
  berth infer iris --input sample.json
  berth logs -f iris               all replicas in one stream

Exit codes: 0 done, 1 the request cannot be, 2 command line, 3 server not reached,
4 not permitted, 5 rollout failed, 6 rollout done but hosts deferred (with --wait-all)."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Form of the answer.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Namespace; by default `default`, and for lists all that you may see.
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
    /// Context to use instead of the current one.
    #[arg(long, global = true, env = "BERTH_CONTEXT")]
    pub context: Option<String>,
    /// How long one request may take, e.g. 30s.
    #[arg(long, global = true, default_value = "60s", value_parser = duration)]
    pub request_timeout: std::time::Duration,
    /// Do not ask before something is removed.
    #[arg(long, global = true)]
    pub yes: bool,
}

/// Form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table.
    Table,
    /// A table with more columns.
    Wide,
    /// JSON with stable names.
    Json,
    /// YAML.
    Yaml,
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    berth_proto::quantity::parse_duration_ms(text)
        .map(std::time::Duration::from_millis)
        .map_err(|e| e.to_string())
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make deployments as manifests say, and wait until they are.
    Apply(Apply),
    /// Show what apply would do, with the hosts that would be chosen.
    Plan(Files),
    /// List replicas: where they are, how they are, and why not.
    Ps {
        /// Only of this deployment.
        deployment: Option<String>,
    },
    /// Show the output of all replicas of a deployment.
    Logs(Logs),
    /// Set the number of replicas.
    Scale {
        /// The deployment.
        deployment: String,
        /// How many.
        replicas: u32,
    },
    /// Remove a deployment.
    Rm {
        /// The deployment.
        deployment: String,
    },
    /// Ask a deployment for a prediction, through the gateway.
    Infer(Infer),
    /// Build a folder's Dockerfile on the local engine, push the image, register it as a version.
    Build {
        /// NAME:VERSION.
        #[arg(short, long)]
        tag: String,
        /// Folder with the Dockerfile.
        folder: PathBuf,
    },
    /// Show what happened.
    Events {
        /// Go on with what happens.
        #[arg(short, long)]
        follow: bool,
        /// Only of this deployment.
        #[arg(long)]
        deployment: Option<String>,
        /// Only of this host.
        #[arg(long)]
        host: Option<String>,
    },
    /// Run a command in a replica of a deployment.
    Exec {
        /// The deployment.
        deployment: String,
        /// Only this replica (its uid or the beginning of it).
        #[arg(long)]
        replica: Option<String>,
        /// Program and arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Deployments.
    #[command(subcommand)]
    Deployment(Deployment),
    /// Releases of a deployment.
    #[command(subcommand)]
    Release(Release),
    /// Hosts and the tokens they join with.
    #[command(subcommand)]
    Host(Host),
    /// Replicas found after a restore, which wait for a decision.
    #[command(subcommand)]
    Orphan(Orphan),
    /// Models, versions and aliases.
    #[command(subcommand)]
    Model(Model),
    /// Images.
    #[command(subcommand)]
    Image(Image),
    /// People and services.
    #[command(subcommand)]
    User(User),
    /// Servers this command line knows.
    #[command(subcommand)]
    Context(ContextCommand),
    /// The server itself.
    #[command(subcommand)]
    Server(Server),
    /// The registry.
    #[command(subcommand)]
    Registry(Registry),
    /// Print the completion script of a shell.
    Completion {
        /// bash, zsh, fish...
        shell: clap_complete::Shell,
    },
}

/// Manifests.
#[derive(Debug, Args)]
pub struct Files {
    /// File, folder or `-` for standard input; may be given several times. All or none is applied.
    #[arg(short, long = "file", required = true)]
    pub files: Vec<PathBuf>,
}

/// How to apply.
#[derive(Debug, Args)]
pub struct Apply {
    #[command(flatten)]
    pub files: Files,
    /// Return when it is written, without waiting for the rollout.
    #[arg(long)]
    pub no_wait: bool,
    /// Wait for hosts that are away, too.
    #[arg(long)]
    pub wait_all: bool,
    /// Wait at most so long.
    #[arg(long, default_value = "15m", value_parser = duration)]
    pub timeout: std::time::Duration,
}

/// Which output.
#[derive(Debug, Args)]
pub struct Logs {
    /// The deployment.
    pub deployment: String,
    /// Go on with lines as they come.
    #[arg(short, long)]
    pub follow: bool,
    /// Only lines since so long ago (10m) or a time (RFC 3339).
    #[arg(long)]
    pub since: Option<String>,
    /// Only the last so many lines of each replica.
    #[arg(long)]
    pub tail: Option<u32>,
    /// Show when each line was written.
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only this replica (its uid or the beginning of it).
    #[arg(long)]
    pub replica: Option<String>,
    /// Only replicas on this host.
    #[arg(long)]
    pub host: Option<String>,
    /// The attempt before the present one.
    #[arg(long)]
    pub previous: bool,
}

/// What to ask.
#[derive(Debug, Args)]
pub struct Infer {
    /// The deployment.
    pub deployment: String,
    /// File with an Open Inference Protocol v2 request, or `-`.
    #[arg(short, long)]
    pub input: PathBuf,
    /// Only a replica of this model version.
    #[arg(long)]
    pub model_version: Option<String>,
    /// File with the known right answer: fail when the numbers differ by more than 0.0001.
    #[arg(long)]
    pub expect: Option<PathBuf>,
}

/// Deployments.
#[derive(Debug, Subcommand)]
pub enum Deployment {
    /// List them.
    List,
    /// Show one; `-o yaml` gives a manifest that can be applied again.
    Show {
        /// Its name.
        name: String,
    },
    /// Set the number of replicas.
    Scale {
        /// Its name.
        name: String,
        /// How many.
        replicas: u32,
    },
    /// Replace every replica by a new one of the same release's spec.
    Restart {
        /// Its name.
        name: String,
    },
    /// Remove it.
    Rm {
        /// Its name.
        name: String,
        /// Absence is no error.
        #[arg(long)]
        allow_missing: bool,
    },
    /// Its rollout.
    #[command(subcommand)]
    Rollout(Rollout),
}

/// Rollouts.
#[derive(Debug, Subcommand)]
pub enum Rollout {
    /// Where it is.
    Status {
        /// The deployment.
        name: String,
    },
    /// Its releases.
    History {
        /// The deployment.
        name: String,
    },
    /// Go back to an earlier release.
    Undo {
        /// The deployment.
        name: String,
        /// Which release. Default: the newest complete one before the present.
        #[arg(long, default_value_t = 0)]
        to: u64,
    },
}

/// Releases.
#[derive(Debug, Subcommand)]
pub enum Release {
    /// List them.
    List {
        /// The deployment.
        deployment: String,
    },
    /// Show one.
    Show {
        /// The deployment.
        deployment: String,
        /// Its number; 0: the newest.
        #[arg(default_value_t = 0)]
        number: u64,
    },
}

/// Hosts.
#[derive(Debug, Subcommand)]
pub enum Host {
    /// List them.
    List,
    /// Show one.
    Show {
        /// Its name.
        name: String,
    },
    /// Set labels (`zone=eu`) and remove them (`zone-`).
    Label {
        /// The host.
        name: String,
        /// Changes.
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// Place nothing new on it.
    Cordon {
        /// The host.
        name: String,
    },
    /// Place on it again.
    Uncordon {
        /// The host.
        name: String,
    },
    /// Move away what is there.
    Drain {
        /// The host.
        name: String,
    },
    /// Remove it from the cluster.
    Rm {
        /// The host.
        name: String,
        /// Though replicas are there.
        #[arg(long)]
        force: bool,
        /// Tell its agent to delete containers, models and keys.
        #[arg(long)]
        wipe: bool,
    },
    /// Let a host that waits for approval in.
    Approve {
        /// The host.
        name: String,
    },
    /// Let a quarantined host go on.
    ReleaseQuarantine {
        /// The host.
        name: String,
    },
    /// Join tokens.
    #[command(subcommand)]
    Token(Token),
}

/// Join tokens.
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make one; prints the whole join command.
    Create {
        /// How long it lives.
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: std::time::Duration,
        /// How many hosts may join with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// Labels its hosts get, KEY=VALUE.
        #[arg(long = "label")]
        labels: Vec<String>,
        /// Hosts wait for `berth host approve`.
        #[arg(long)]
        require_approval: bool,
        /// Lets this one host join again.
        #[arg(long, default_value = "")]
        rejoin: String,
    },
    /// List them, without their secrets.
    List,
    /// End one.
    Rm {
        /// Its public part.
        id: String,
    },
}

/// Orphans.
#[derive(Debug, Subcommand)]
pub enum Orphan {
    /// List them.
    List,
    /// Take them into their deployments.
    Adopt {
        /// All of this host's.
        #[arg(long)]
        host: String,
    },
    /// Let them go: they are stopped.
    Release {
        /// All of this host's.
        #[arg(long)]
        host: String,
    },
}

/// Models.
#[derive(Debug, Subcommand)]
pub enum Model {
    /// Package a file or folder, push it, and register it as a version.
    Push(ModelPush),
    /// List models.
    List,
    /// Show a model with its versions, or one version (NAME:VERSION, NAME@ALIAS).
    Show {
        /// Reference.
        reference: String,
    },
    /// Let an alias name a version.
    Alias {
        /// NAME:VERSION.
        reference: String,
        /// The alias.
        alias: String,
        /// Why, for the history.
        #[arg(long, default_value = "")]
        why: String,
    },
    /// Show how aliases were moved.
    History {
        /// The model.
        name: String,
    },
    /// Remove a version that nothing uses.
    Rm {
        /// NAME:VERSION.
        reference: String,
    },
}

/// What to push.
#[derive(Debug, Args)]
pub struct ModelPush {
    /// NAME:VERSION.
    pub reference: String,
    /// The model's file or folder.
    pub path: PathBuf,
    /// Alias to move to it; may be given several times.
    #[arg(long = "alias")]
    pub aliases: Vec<String>,
    /// Its format. Default: told from the files.
    #[arg(long)]
    pub format: Option<String>,
    /// A parameter to remember, KEY=VALUE.
    #[arg(long = "param")]
    pub params: Vec<String>,
    /// A metric to remember, KEY=NUMBER.
    #[arg(long = "metric")]
    pub metrics: Vec<String>,
    /// NAME:VERSION it was made from.
    #[arg(long, default_value = "")]
    pub parent: String,
    /// Licence, e.g. Apache-2.0.
    #[arg(long, default_value = "")]
    pub license: String,
}

/// Images.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Push an image of the local engine to the server's registry.
    Push {
        /// The image here.
        local: String,
        /// REPOSITORY:TAG there.
        remote: String,
    },
}

/// Users.
#[derive(Debug, Subcommand)]
pub enum User {
    /// Make a user; prints a context for it.
    Create {
        /// Its name.
        name: String,
        /// admin, operator or viewer.
        #[arg(long, default_value = "viewer")]
        role: String,
        /// When it ends, in so long.
        #[arg(long, default_value = "365d", value_parser = duration)]
        expires: std::time::Duration,
        /// May run commands in replicas.
        #[arg(long)]
        exec: bool,
    },
    /// List them.
    List,
    /// Make a token for registry, gateway and API.
    Token {
        /// The user.
        name: String,
        /// Only for this deployment's gateway.
        #[arg(long, default_value = "")]
        deployment: String,
    },
    /// End a user.
    Revoke {
        /// The user.
        name: String,
    },
    /// Who am I, and what may I do?
    Whoami,
}

/// Contexts.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List them.
    List,
    /// Show the current one, without its key.
    Show,
    /// Use another one.
    Use {
        /// Its name.
        name: String,
    },
    /// Forget one.
    Rm {
        /// Its name.
        name: String,
    },
}

/// The server.
#[derive(Debug, Subcommand)]
pub enum Server {
    /// Who and how it is.
    Info {
        /// Try for so long until it answers.
        #[arg(long, value_parser = duration)]
        wait: Option<std::time::Duration>,
    },
}

/// The registry.
#[derive(Debug, Subcommand)]
pub enum Registry {
    /// Remove content that nothing names.
    Gc {
        /// Say what would go.
        #[arg(long)]
        dry_run: bool,
    },
}
