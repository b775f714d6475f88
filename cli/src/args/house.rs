//! Commands about the server itself, its roots and registry, and the contexts that name it.

use super::{duration, help};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Contexts.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List them.
    List,
    /// Show the current one, without its key.
    Show,
    /// Take over a context that a server or `berth user create` wrote.
    Create {
        /// Its name here.
        name: String,
        /// The file; `-` is standard input.
        #[arg(long)]
        from: PathBuf,
        /// Though there is one of that name.
        #[arg(long)]
        force: bool,
    },
    /// Renew its certificate and take over the roots and addresses that the server tells now: during a
    /// rotation of the root, or when the server has moved.
    Renew,
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
    /// Print a link that opens the web page once, as you, within 5 minutes.
    Page,
    /// Back up its ledger and keys, encrypted, into a file here.
    #[command(after_help = help::BACKUP)]
    Backup(Backup),
}

/// A backup.
#[derive(Debug, Args)]
pub struct Backup {
    /// File to write; must not exist.
    pub file: PathBuf,
    /// Make a new recovery key, for this backup and those that follow.
    #[arg(long)]
    pub new_recovery_key: bool,
    /// File to write the recovery key to instead of standard output; must not exist, and is made only
    /// when there is a new key.
    #[arg(long, value_name = "FILE")]
    pub recovery_key: Option<PathBuf>,
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

/// The cluster's roots.
#[derive(Debug, Subcommand)]
pub enum Root {
    /// List them, and during a rotation who does not know the new one yet.
    List,
    /// Begin a rotation: make a second root, tell it to all, and sign with it what is given from now on.
    Rotate,
    /// End a rotation: retire the first root. Whoever knows it alone does not find the server any more.
    Finish {
        /// Though hosts do not hold the new root yet: they have to join anew.
        #[arg(long)]
        force: bool,
    },
    /// Print them in PEM, the newest last, for docker, curl and other clients of the doors.
    Export,
}
