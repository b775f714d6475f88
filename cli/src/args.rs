//! The command line. The doc comments are the help.

mod house;

pub use house::{Backup, ContextCommand, Registry, Root, Server};

use crate::help;
use berth_proto::values::Requirement;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Put machine-learning models on fleets of edge hosts.
#[derive(Debug, Parser)]
#[command(name = "berth", version, propagate_version = true, after_help = help::TOP)]
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
    /// Only what has these labels, for lists: `team=vision,zone in (eu, us),!old`.
    #[arg(short = 'l', long = "selector", global = true, value_name = "SELECTOR")]
    pub selector: Option<Selector>,
    /// Only what matches, as the server's lists understand it: `name=edge* AND labels.zone!=eu`.
    #[arg(long, global = true, value_name = "FILTER")]
    pub filter: Option<String>,
    /// Context to use instead of the current one.
    #[arg(long, global = true, env = "BERTH_CONTEXT")]
    pub context: Option<String>,
    /// How long one call of the API may take, e.g. 30s; pushes and predictions have times of their own.
    #[arg(long, global = true, default_value = "60s", value_parser = duration)]
    pub request_timeout: std::time::Duration,
    /// Do not ask before something is removed or moved away.
    #[arg(short = 'y', long, global = true)]
    pub yes: bool,
}

/// Requirements on labels, all of which must hold.
#[derive(Debug, Clone)]
pub struct Selector(pub Vec<Requirement>);

impl std::str::FromStr for Selector {
    type Err = berth_proto::selector::InvalidSelector;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        berth_proto::selector::parse_all(text).map(Self)
    }
}

impl Global {
    /// The namespace that is asked for; empty: none is.
    pub fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or_default()
    }

    /// Whether these labels meet the selector; without one all do.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector.as_ref().is_none_or(|s| s.0.iter().all(|r| r.matches(labels)))
    }
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
    #[command(after_help = help::APPLY)]
    Apply(Apply),
    /// Show what apply would do, with the hosts that would be chosen.
    #[command(after_help = help::PLAN)]
    Plan(Files),
    /// List replicas: where they are, how they are, and why not.
    #[command(after_help = help::PS)]
    Ps {
        /// Only of this deployment.
        deployment: Option<String>,
        /// Only on this host.
        #[arg(long)]
        host: Option<String>,
    },
    /// Show the output of all replicas of a deployment.
    #[command(after_help = help::LOGS)]
    Logs(Logs),
    /// Set the number of replicas.
    #[command(after_help = help::SCALE)]
    Scale(Scale),
    /// Remove a deployment.
    #[command(after_help = help::RM)]
    Rm {
        /// The deployment.
        deployment: String,
    },
    /// Ask a deployment for a prediction, through the gateway.
    #[command(after_help = help::INFER)]
    Infer(Infer),
    /// Build a folder's Dockerfile on the local engine, push the image, register it as a version.
    #[command(after_help = help::BUILD)]
    Build(Build),
    /// Show what happened.
    #[command(after_help = help::EVENTS)]
    Events(Events),
    /// Run a command in a replica of a deployment.
    #[command(after_help = help::EXEC)]
    Exec(Exec),
    /// Show what is reserved and what is used.
    #[command(after_help = help::TOP_COMMAND)]
    Top {
        /// Of what.
        #[arg(value_enum, default_value_t = TopOf::Hosts)]
        of: TopOf,
        /// Only replicas of this deployment.
        deployment: Option<String>,
    },
    /// Back up the server's ledger and keys, encrypted, into a file here.
    #[command(after_help = help::BACKUP)]
    Backup(Backup),
    /// Deployments.
    #[command(subcommand, after_help = help::DEPLOYMENT)]
    Deployment(Deployment),
    /// Releases of a deployment.
    #[command(subcommand, after_help = help::RELEASE)]
    Release(Release),
    /// Hosts and the tokens they join with.
    #[command(subcommand, after_help = help::HOST)]
    Host(Host),
    /// Replicas found after a restore, which wait for a decision.
    #[command(subcommand, after_help = help::ORPHAN)]
    Orphan(Orphan),
    /// What happened.
    #[command(subcommand)]
    Event(Event),
    /// Who changed what.
    #[command(subcommand, after_help = help::AUDIT)]
    Audit(Audit),
    /// Models, versions and aliases.
    #[command(subcommand, after_help = help::MODEL)]
    Model(Model),
    /// Images.
    #[command(subcommand, after_help = help::IMAGE)]
    Image(Image),
    /// People and services.
    #[command(subcommand, after_help = help::USER)]
    User(User),
    /// Servers this command line knows.
    #[command(subcommand, after_help = help::CONTEXT)]
    Context(ContextCommand),
    /// The server itself.
    #[command(subcommand)]
    Server(Server),
    /// The roots that hosts and clients know the server by, and their rotation.
    #[command(subcommand, after_help = help::ROOT)]
    Root(Root),
    /// The registry.
    #[command(subcommand)]
    Registry(Registry),
    /// Print the completion script of a shell.
    #[command(after_help = help::COMPLETION)]
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
    #[arg(long, conflicts_with = "wait_all")]
    pub no_wait: bool,
    /// Wait for hosts that are away, too.
    #[arg(long)]
    pub wait_all: bool,
    /// Wait at most so long.
    #[arg(long, default_value = "15m", value_parser = duration)]
    pub timeout: std::time::Duration,
}

/// How many of what.
#[derive(Debug, Args)]
pub struct Scale {
    /// The deployment.
    pub deployment: String,
    /// How many.
    pub replicas: u32,
    /// Wait until so many are ready.
    #[arg(long)]
    pub wait: bool,
    /// Wait at most so long.
    #[arg(long, default_value = "15m", value_parser = duration, requires = "wait")]
    pub timeout: std::time::Duration,
}

/// What to build.
#[derive(Debug, Args)]
pub struct Build {
    /// NAME:VERSION.
    #[arg(short, long)]
    pub tag: String,
    /// Folder to build from.
    pub folder: PathBuf,
    /// The Dockerfile, a path in the folder.
    #[arg(long, default_value = "Dockerfile")]
    pub file: String,
    /// A build argument, KEY=VALUE.
    #[arg(long = "build-arg")]
    pub build_args: Vec<String>,
    /// Alias to move to it; may be given several times.
    #[arg(long = "alias")]
    pub aliases: Vec<String>,
    /// Do not use what earlier builds left.
    #[arg(long)]
    pub no_cache: bool,
}

/// Which events.
#[derive(Debug, Clone, Args)]
pub struct Events {
    /// Go on with what happens.
    #[arg(short, long)]
    pub follow: bool,
    /// Only of this deployment.
    #[arg(long)]
    pub deployment: Option<String>,
    /// Only of this host.
    #[arg(long)]
    pub host: Option<String>,
    /// Only since so long ago (10m) or a time (RFC 3339).
    #[arg(long)]
    pub since: Option<String>,
    /// The newest so many of the past.
    #[arg(long, default_value_t = 1000)]
    pub limit: u32,
}

/// Events.
#[derive(Debug, Subcommand)]
pub enum Event {
    /// List them; the same as `berth events`.
    #[command(after_help = help::EVENTS)]
    List(Events),
}

/// The audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List it, the newest first.
    #[command(after_help = help::AUDIT)]
    List {
        /// The newest so many.
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
}

/// What to run.
#[derive(Debug, Args)]
pub struct Exec {
    /// The deployment, or one of its replicas (iris/0).
    pub deployment: String,
    /// Only this replica (its uid or the beginning of it).
    #[arg(long)]
    pub replica: Option<String>,
    /// With a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Program and arguments, after `--`.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// Of what `top` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TopOf {
    /// Hosts: what is reserved of what there is.
    Hosts,
    /// Replicas: what they use now.
    Replicas,
}

/// Which output.
#[derive(Debug, Args)]
pub struct Logs {
    /// The deployment, or one of its replicas (iris/0).
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
    Scale(Scale),
    /// Replace every replica by a new one of the same release's spec.
    Restart {
        /// Its name.
        name: String,
        #[command(flatten)]
        until: Until,
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
    /// Where it is. Without --wait it fails only when that cannot be told; with it, it ends as `berth
    /// apply` does: 0 complete, 5 failed, rolled back, or not complete in time.
    Status {
        /// The deployment.
        name: String,
        #[command(flatten)]
        until: Until,
    },
    /// Its releases.
    History {
        /// The deployment.
        name: String,
    },
    /// Go back to an earlier release, as one more; a rollout that is not complete is given up, and what
    /// still runs of the release before stays.
    Undo {
        /// The deployment.
        name: String,
        /// Which release. Default: the newest complete one before the present.
        #[arg(long, default_value_t = 0)]
        to: u64,
        #[command(flatten)]
        until: Until,
    },
}

/// Whether the end of a rollout is waited for.
#[derive(Debug, Clone, Copy, Args)]
pub struct Until {
    /// Wait until it is complete.
    #[arg(long)]
    pub wait: bool,
    /// Wait at most so long.
    #[arg(long, default_value = "15m", value_parser = duration, requires = "wait")]
    pub timeout: std::time::Duration,
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
    #[command(visible_alias = "remove")]
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
    #[command(subcommand, after_help = help::TOKEN)]
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
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
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
    /// Take them into their deployments, whose number grows where their slots are beyond it; those that
    /// cannot be taken in stay orphans.
    Adopt(Orphans),
    /// Let them go: they are stopped.
    Release(Orphans),
}

/// Which orphans.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Orphans {
    /// Replicas, as listed.
    #[arg(value_name = "REPLICA")]
    pub replicas: Vec<String>,
    /// All of this host's.
    #[arg(long)]
    pub host: Option<String>,
}

/// Models.
#[derive(Debug, Subcommand)]
pub enum Model {
    /// Package a file or folder, push it, and register it as a version.
    #[command(after_help = help::MODEL_PUSH)]
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
    /// Let an alias name nothing any more; its history is kept.
    Unalias {
        /// The model.
        name: String,
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
        /// Only this alias.
        #[arg(long)]
        alias: Option<String>,
        /// What it named at this time: moves up to then, the newest first (RFC 3339, or 10m ago).
        #[arg(long)]
        at: Option<String>,
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
    /// A data set it was made with; may be given several times.
    #[arg(long = "dataset")]
    pub datasets: Vec<String>,
    /// Licence, e.g. Apache-2.0.
    #[arg(long, default_value = "")]
    pub license: String,
}

/// Images.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// List the repositories of the server's registry: images and models.
    List,
    /// List the tags of one.
    Tags {
        /// The repository, as listed.
        repository: String,
    },
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
    /// Make a user; prints a context for it, or writes it to a file. Without -n its role holds in all namespaces.
    Create {
        /// Its name.
        name: String,
        /// What it may do.
        #[arg(long, value_enum, default_value_t = UserRole::Viewer)]
        role: UserRole,
        /// When it ends, in so long.
        #[arg(long, default_value = "365d", value_parser = duration)]
        expires: std::time::Duration,
        /// May run commands in replicas.
        #[arg(long)]
        exec: bool,
        /// File to write the context to instead of standard output, for its owner alone; must not
        /// exist.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
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
        /// When it ends, in so long. Default: with the user.
        #[arg(long, value_parser = duration)]
        expires: Option<std::time::Duration>,
    },
    /// End a user, or one of its tokens.
    Revoke {
        /// The user.
        name: String,
        /// Only this token, by its public part; `berth user list -o wide` shows them.
        #[arg(long, value_name = "ID")]
        token: Option<String>,
    },
    /// Who am I, and what may I do?
    Whoami,
}

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UserRole {
    /// Everything.
    Admin,
    /// Deploy, push, look.
    Operator,
    /// Look.
    Viewer,
}
