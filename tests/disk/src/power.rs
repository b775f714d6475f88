//! Power cuts: a process under load that says what was acknowledged to it, stopped with its disk.
//!
//! The process is the test's own binary once more, told by its environment what its part is. It takes
//! the part in one `#[test]` that has nothing to do otherwise.

use crate::Disk;
use anyhow::{Context as _, Result, bail, ensure};
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A process stops within this, however busy the disk is.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the child does.
const PART: &str = "BERTH_POWER_CUT_PART";
/// From which number on.
const FROM: &str = "BERTH_POWER_CUT_FROM";
/// In which folder.
const FOLDER: &str = "BERTH_POWER_CUT_FOLDER";
/// Before each acknowledgement.
const ACKNOWLEDGED: &str = "acknowledged ";

/// A number that looks drawn, from another.
#[must_use]
pub fn mixed(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Bytes that do not repeat soon, from a number.
#[must_use]
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut draw = mixed(seed.wrapping_add(1));
    while bytes.len() < length {
        draw = mixed(draw.wrapping_add(0x9e37_79b9_7f4a_7c15));
        bytes.extend_from_slice(&draw.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// How many power cuts: `BERTH_POWER_CUTS`, or so many.
#[must_use]
pub fn cuts(by_default: u64) -> u64 {
    std::env::var("BERTH_POWER_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(by_default)
}

/// Runs a test again where nobody else sees its mounts: a namespace that somebody makes meanwhile
/// would keep a copy of one, and with it the file system that shall be gone. `false`: this is it.
///
/// # Panics
/// When the test fails there; in CI also where no namespace can be made.
#[must_use]
pub fn is_carried_into_a_namespace(test: &str) -> bool {
    const INSIDE: &str = "BERTH_POWER_CUT_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let inside = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        command
    };
    if !inside().arg("true").output().is_ok_and(|output| output.status.success()) {
        assert!(std::env::var_os("CI").is_none(), "{test}: no mount namespace can be made");
        println!("{test}: skipped, no mount namespace can be made here (root? unshare?)");
        return true;
    }
    let again = std::env::current_exe().and_then(|this| {
        let mut again = inside();
        again.arg(this).args(["--exact", test, "--nocapture"]).env(INSIDE, "1").status()
    });
    assert!(
        again.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{test} failed in its namespace: {again:?}"
    );
    true
}

/// What a child is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it does.
    pub name: String,
    /// In which folder.
    pub folder: PathBuf,
    /// From which of its steps on.
    pub from: u64,
}

impl Part {
    /// One part, from its beginning.
    #[must_use]
    pub fn new(name: &str, folder: &Path) -> Self {
        Self { name: name.to_owned(), folder: folder.to_owned(), from: 0 }
    }

    /// The same from a later step on.
    #[must_use]
    pub fn from(self, from: u64) -> Self {
        Self { from, ..self }
    }

    /// The process that takes it: this binary, running only `taker`.
    ///
    /// # Errors
    /// When this binary cannot be found.
    pub fn command(&self, taker: &str) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", taker, "--nocapture", "--include-ignored"]);
        command.env(PART, &self.name).env(FOLDER, &self.folder);
        command.env(FROM, self.from.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }
}

/// The part that this process has been given.
#[must_use]
pub fn part() -> Option<Part> {
    let name = std::env::var(PART).ok()?;
    let folder = std::env::var_os(FOLDER)?.into();
    let from = std::env::var(FROM).ok()?.parse().ok()?;
    // The test's runner may have begun a line.
    println!();
    Some(Part { name, folder, from })
}

/// Says that something was acknowledged to this process.
///
/// # Errors
/// When nobody listens any more.
pub fn acknowledge(what: impl std::fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{ACKNOWLEDGED}{what}")
}

/// Whether no thread of a process that was sent SIGSTOP comes to its own code any more: the first one
/// that takes the signal stops, and has all others stop where they leave the kernel.
fn is_stopped(pid: &str) -> Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that has ended meanwhile has no state.
        let stat = std::fs::read_to_string(thread?.path().join("stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A process under load.
pub struct Load {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Load {
    /// Has `taker` take a part without end.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(part: &Part, taker: &str) -> Result<Self> {
        let mut child = part.command(taker)?.stderr(Stdio::inherit()).spawn()?;
        let out = child.stdout.take().context("the load has no output")?;
        Ok(Self { child, lines: BufReader::new(out).lines() })
    }

    /// The next acknowledgement; `None` when it has ended.
    pub fn acknowledged(&mut self) -> Option<String> {
        self.lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix(ACKNOWLEDGED).map(str::to_owned))
    }

    /// So many acknowledgements.
    ///
    /// # Errors
    /// When it ends before.
    pub fn wait_for(&mut self, count: u64) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for _ in 0..count {
            match self.acknowledged() {
                Some(one) => all.push(one),
                None => bail!("the load has ended by itself after {all:?}"),
            }
        }
        Ok(all)
    }

    /// The power goes, and is back. What was acknowledged until then and not read yet.
    ///
    /// # Errors
    /// When the file system does not mount again.
    pub fn cut_power(mut self, disk: &Disk) -> Result<Vec<String>> {
        // As the power does, this stops the process with the disk: one that went on could be told
        // that a sync has succeeded whose journal was given up meanwhile.
        let pid = self.child.id().to_string();
        let stopped = Command::new("kill").args(["-STOP", &pid]).status()?;
        ensure!(stopped.success(), "the load cannot be stopped");
        let until = Instant::now() + PATIENCE;
        while !is_stopped(&pid)? {
            ensure!(Instant::now() < until, "the load does not stop");
            std::thread::yield_now();
        }
        disk.cut()?;
        self.end()?;
        let rest = std::iter::from_fn(|| self.acknowledged()).collect();
        disk.mount_again().context("the file system does not mount again")?;
        Ok(rest)
    }

    fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Has ended already, unless a test has failed.
        let _ = self.end();
    }
}
