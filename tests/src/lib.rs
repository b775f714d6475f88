//! The harness of Berth's end-to-end tests: real binaries in folders of their own.
//!
//! A [`Cluster`] is one `berthd` and any number of agents, on free loopback ports, against the
//! machine's own Docker engine; everything it made is gone when it is dropped. Waiting is always for
//! a level ("three replicas are ready"), never for a time, and always with a deadline.

pub mod bench;
pub mod events;
pub mod forward;
pub mod hosts;
pub mod samples;
pub mod sim;
pub mod stand_in;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a level may take on a busy machine of two cores.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Polls until `probe` gives a value, or fails with what it said last.
///
/// # Errors
/// When the deadline passes.
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<T>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!("not so after {deadline:?}: {what}")));
            }
            Err(_) => pause(),
        }
    }
}

/// Between two looks at a level.
fn pause() {
    let (_tx, rx) = std::sync::mpsc::channel::<()>();
    let _ = rx.recv_timeout(Duration::from_millis(50));
}

/// The folder that holds this build's binaries.
///
/// # Errors
/// When it cannot be told.
pub fn bin_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where is this program?")?;
    let folder = exe.parent().context("a program is in a folder")?;
    // Tests are in a folder of theirs beside the programs.
    let beside = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
    beside.map(Path::to_owned).context("a test's folder has a parent")
}

/// The project's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A command of this build.
///
/// # Errors
/// When it was not built.
pub fn command(name: &str) -> Result<Command> {
    command_of(&bin_dir()?, name)
}

/// A command of the build in a folder.
fn command_of(folder: &Path, name: &str) -> Result<Command> {
    let path = folder.join(name);
    if !path.exists() {
        bail!("{} is not built; run tests/run, or: cargo build --workspace", path.display());
    }
    Ok(Command::new(path))
}

/// The only child of a process that runs another in namespaces of its own.
fn child_of(id: u32) -> Result<u32> {
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    children.trim().parse().with_context(|| format!("process {id} has not one child: {children}"))
}

/// Sends a signal, by its name without SIG.
fn signal(id: u32, name: &str) -> Result<()> {
    let sent = Command::new("kill").args([&format!("-{name}"), &id.to_string()]).status()?;
    if !sent.success() {
        bail!("process {id} does not take SIG{name}");
    }
    Ok(())
}

/// A child process that is ended when it is dropped.
pub struct Process {
    child: Child,
    /// The process that signals are for, when the child only carries it into namespaces.
    within: Option<u32>,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, within: None, log: log.to_owned() })
    }

    /// Starts `command`, which carries another program into namespaces (`nsenter`); signals are for
    /// that one.
    ///
    /// # Errors
    /// When it cannot be started or ends at once.
    pub fn start_within(command: &mut Command, log: &Path) -> Result<Self> {
        let mut process = Self::start(command, log)?;
        let within =
            eventually("the program has been started", PATIENCE, || child_of(process.child.id()));
        process.within = Some(within.map_err(|error| error.context(process.tail()))?);
        Ok(process)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.within.unwrap_or_else(|| self.child.id())
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self) {
        // Not once it has ended: its number may be another's.
        if self.within.is_some() && self.is_running() {
            let _ = signal(self.id(), "KILL");
            // A carrier stops with what it carries.
            let _ = signal(self.child.id(), "CONT");
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }

    /// SIGSTOP: it hangs until it is thawed.
    ///
    /// # Errors
    /// When it does not run.
    pub fn freeze(&self) -> Result<()> {
        signal(self.id(), "STOP")
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it does not run.
    pub fn thaw(&self) -> Result<()> {
        signal(self.id(), "CONT")?;
        signal(self.child.id(), "CONT")
    }

    /// SIGTERM, and its end within `deadline`.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn terminate(&mut self, deadline: Duration) -> Result<std::process::ExitStatus> {
        signal(self.id(), "TERM")?;
        eventually("the process ends after SIGTERM", deadline, || {
            self.child.try_wait()?.context("it still runs")
        })
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of its output, for a failed test's message.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(40).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A server with its agents.
pub struct Cluster {
    /// Everything it writes.
    pub dir: tempfile::TempDir,
    server: Option<Process>,
    agents: Vec<(String, Process)>,
    server_args: Vec<String>,
    address: String,
    /// The cluster's uid, since the first agent: what it leaves in the engine is found by that, also
    /// when the server cannot say it any more.
    uid: Option<String>,
    /// Where `berthd` is; the build that is tested unless it was rolled.
    build: PathBuf,
}

/// Where servers listen unless a test says otherwise.
const LOOPBACK: &str = "127.0.0.1";

impl Cluster {
    /// A running server on free ports, without agents.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// The same, with more flags.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_with(args: &[&str]) -> Result<Self> {
        Self::start_at(LOOPBACK, args)
    }

    /// The same, listening at another address than loopback.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_at(address: &str, args: &[&str]) -> Result<Self> {
        Self::prepared(address, args, |_| Ok(()))
    }

    /// The same on loopback, after the server's folder, which does not exist yet, was prepared.
    ///
    /// # Errors
    /// When it cannot be prepared, or the server does not come up.
    pub fn start_on(args: &[&str], prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        Self::prepared(LOOPBACK, args, prepare)
    }

    fn prepared(
        address: &str,
        args: &[&str],
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-it-").tempdir()?;
        let server_args = args.iter().map(ToString::to_string).collect();
        let address = address.to_owned();
        let (server, agents, build) = (None, Vec::new(), bin_dir()?);
        let uid = None;
        let mut cluster = Self { dir, server, agents, server_args, address, uid, build };
        prepare(&cluster.server_dir())?;
        cluster.start_server()?;
        Ok(cluster)
    }

    /// The server's folder.
    #[must_use]
    pub fn server_dir(&self) -> PathBuf {
        self.dir.path().join("server")
    }

    /// Where the ids of images are noted that a test has made for this cluster, one a line.
    pub(crate) fn made_images(&self) -> PathBuf {
        self.dir.path().join("made-images")
    }

    /// An agent's folder.
    #[must_use]
    pub fn agent_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("agent-{name}"))
    }

    /// Starts the server, on the ports it had before, if any.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_server(&mut self) -> Result<()> {
        let mut command = command_of(&self.build, "berthd")?;
        command.arg("--data-dir").arg(self.server_dir()).args(["--ballast-mib", "1"]);
        command.args(["--ping-seconds", "1", "--idle-seconds", "4"]);
        // How full the machine's disk is, is not what is tested.
        command.args(["--min-free-percent", "0"]);
        command.args(&self.server_args);
        let doors = self.server_dir().join("doors.json");
        let before: Option<Value> =
            std::fs::read(&doors).ok().and_then(|text| serde_json::from_slice(&text).ok());
        for (flag, key) in [
            ("--listen", "control"),
            ("--registry-listen", "registry"),
            ("--gateway-listen", "gateway"),
            ("--page-listen", "page"),
        ] {
            let held = before.as_ref().and_then(|b| b[key].as_str());
            let any = format!("{}:0", self.address);
            command.args([flag, held.unwrap_or(&any)]);
        }
        if self.address != LOOPBACK {
            command.args(["--advertise", &self.address]);
        }
        std::fs::remove_file(&doors).ok();
        let process = Process::start(&mut command, &self.dir.path().join("berthd.log"))?;
        let process = self.server.insert(process);
        let up = eventually("the server's doors are open", PATIENCE, || {
            if !process.is_running() {
                bail!("berthd ended");
            }
            std::fs::read(&doors).context("no doors yet")
        });
        up.map(|_| ()).map_err(|error| error.context(process.tail()))
    }

    /// Ends the server and starts that of another build on what it has left.
    ///
    /// # Errors
    /// When it does not end or does not come up.
    pub fn roll_server(&mut self, build: &Path) -> Result<()> {
        self.server().terminate(PATIENCE)?;
        self.build = build.to_owned();
        self.start_server()
    }

    /// The server's process.
    ///
    /// # Panics
    /// When it is not running.
    pub fn server(&mut self) -> &mut Process {
        self.server.as_mut().expect("the server was started")
    }

    /// An address of the server: `control`, `registry`, `gateway` or `page`.
    ///
    /// # Errors
    /// When the server has not written it.
    pub fn door(&self, which: &str) -> Result<String> {
        let text = std::fs::read(self.server_dir().join("doors.json"))?;
        let doors: Value = serde_json::from_slice(&text)?;
        doors[which].as_str().map(str::to_owned).with_context(|| format!("no door {which}"))
    }

    /// The cluster's uid.
    ///
    /// # Errors
    /// When the server does not say.
    pub fn uid(&self) -> Result<String> {
        let info = self.berth_json(&["server", "info"])?;
        info["cluster"].as_str().map(str::to_owned).context("the server named no cluster")
    }

    /// Lets a host join and starts its agent.
    ///
    /// # Errors
    /// When it cannot join.
    pub fn add_agent(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let token = self.berth_json(&["host", "token", "create"])?;
        let token = token["secret"].as_str().context("no secret in the answer")?.to_owned();
        let join = command("berth-agent")?
            .args(["join", "--name", name, "--server", &self.door("control")?])
            .args(["--token", &token])
            .arg("--data-dir")
            .arg(self.agent_dir(name))
            .args(args)
            .output()?;
        if !join.status.success() {
            bail!("join failed: {}", String::from_utf8_lossy(&join.stderr));
        }
        self.start_agent(name, args)
    }

    /// Starts the agent of a host that has joined.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let mut command = command("berth-agent")?;
        command.arg("run").arg("--data-dir").arg(self.agent_dir(name)).args(args);
        let log = self.dir.path().join(format!("agent-{name}.log"));
        let process = Process::start(&mut command, &log)?;
        self.agents.retain(|(held, _)| held != name);
        self.adopt_agent(name, process);
        Ok(())
    }

    /// Takes over an agent that was started otherwise.
    pub fn adopt_agent(&mut self, name: &str, process: Process) {
        self.uid = self.uid.take().or_else(|| self.uid().ok());
        self.agents.push((name.to_owned(), process));
    }

    /// An agent's process.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn agent(&mut self, name: &str) -> &mut Process {
        let found = self.agents.iter_mut().find(|(held, _)| held == name);
        &mut found.expect("the agent was started").1
    }

    /// Runs `berth` with these arguments as the admin.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn berth(&self, args: &[&str]) -> Result<Output> {
        Ok(command("berth")?
            .env("BERTH_CONFIG", self.server_dir().join("admin.toml"))
            .args(args)
            .stdin(Stdio::null())
            .output()?)
    }

    /// Runs `berth` and gives its standard output; a failure is an error with what it said.
    ///
    /// # Errors
    /// When it fails.
    pub fn berth_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.berth(args)?;
        if !output.status.success() {
            bail!(
                "berth {} ended with {:?}:\n{}{}",
                args.join(" "),
                output.status.code(),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `berth ... -o json`.
    ///
    /// # Errors
    /// When it fails or does not print JSON.
    pub fn berth_json(&self, args: &[&str]) -> Result<Value> {
        let text = self.berth_ok(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// What all processes said last, for a failed test's message.
    #[must_use]
    pub fn story(&self) -> String {
        let mut story = String::new();
        if let Some(server) = &self.server {
            story.push_str(&format!("--- berthd\n{}\n", server.tail()));
        }
        for (name, agent) in &self.agents {
            story.push_str(&format!("--- agent {name}\n{}\n", agent.tail()));
        }
        story
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story());
        }
        let uid = self.uid.take().or_else(|| self.uid().ok());
        for (_, agent) in &mut self.agents {
            agent.kill();
        }
        if let Some(server) = &mut self.server {
            server.kill();
        }
        // What the cluster's label names, and nothing else. Without an agent here there is nothing.
        if let Some(uid) = uid
            && !self.agents.is_empty()
        {
            let made = std::fs::read_to_string(self.made_images()).unwrap_or_default();
            let _ = docker_remove(&uid, &made);
        }
    }
}

/// Whether a Docker engine answers; says so when not.
#[must_use]
pub fn has_docker(test: &str) -> bool {
    let answers =
        Command::new("docker").arg("version").output().is_ok_and(|output| output.status.success());
    if !answers {
        assert!(std::env::var_os("CI").is_none(), "{test}: no Docker engine answers");
        println!("{test}: skipped, no Docker engine answers");
    }
    answers
}

/// Whether a client that `tests/run` installs is here; says so when not.
#[must_use]
pub fn has_client(test: &str, client: &str) -> bool {
    let works = Command::new(client).arg("--version").output().is_ok_and(|o| o.status.success());
    if !works {
        assert!(std::env::var_os("CI").is_none(), "{test}: tests/run installs {client}");
        println!("{test}: skipped, there is no {client}");
    }
    works
}

/// Runs `docker`; what it prints, trimmed.
///
/// # Errors
/// When it fails.
pub fn docker(args: &[&str]) -> Result<String> {
    let output = Command::new("docker").args(args).output()?;
    if !output.status.success() {
        bail!("docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The ids of all containers of a cluster, running or not.
///
/// # Errors
/// When docker fails.
pub fn docker_containers(cluster: &str, only_running: bool) -> Result<Vec<String>> {
    let filter = format!("label=io.berth.cluster={cluster}");
    let list = if only_running { "-q" } else { "-aq" };
    let output =
        Command::new("docker").args(["ps", list, "--no-trunc", "--filter", &filter]).output()?;
    if !output.status.success() {
        bail!("docker ps failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// Removes all containers of a cluster, its network, and the names our agents gave their images and
/// those that were `made` for it (ids, one a line).
///
/// # Errors
/// When docker fails.
pub fn docker_remove(cluster: &str, made: &str) -> Result<()> {
    let ids = docker_containers(cluster, false)?;
    let mut images = made.to_owned();
    if !ids.is_empty() {
        let inspect = ["inspect", "--format", "{{.Image}}"];
        let output = Command::new("docker").args(inspect).args(&ids).output()?;
        images.push_str(&String::from_utf8(output.stdout)?);
        Command::new("docker").args(["rm", "-f"]).args(&ids).output()?;
    }
    let network = format!("berth-{}", &cluster[cluster.len().saturating_sub(12)..]);
    Command::new("docker").args(["network", "rm", &network]).output()?;
    // Not forced, so that what another cluster's container uses stays; and only of images that a
    // container of this cluster had or that were made for it: another cluster may be about to start
    // one.
    let format = "{{.ID}} {{.Repository}}:{{.Tag}}";
    let names = ["images", "--no-trunc", "--format", format, "berth.local/*"];
    let names = String::from_utf8(Command::new("docker").args(names).output()?.stdout)?;
    for (id, name) in names.lines().filter_map(|line| line.split_once(' ')) {
        if images.lines().any(|image| image == id) {
            Command::new("docker").args(["rmi", name]).output()?;
        }
    }
    Ok(())
}
