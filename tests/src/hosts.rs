//! Hosts with an engine of their own, several on one machine.
//!
//! A [`Host`] is a process that does nothing, the first in a process, a mount and a network namespace
//! of its own; a stock `dockerd` and an agent run inside. Its end is the end of all of it, by the
//! kernel: engine, containers, mounts and its end of the cable. It ends when its standard input
//! closes, so that a test run that is killed leaves no host behind. A [`Wire`] is the bridge that
//! hosts hang on; the server listens on its address.
//!
//! It never touches the machine's own engine: socket, data, state, cgroups and bridge are others.

use crate::{PATIENCE, Process, eventually};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Whether hosts can be made here; says so when not.
#[must_use]
pub fn can_make_hosts(test: &str) -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| {
        use std::os::unix::fs::MetadataExt as _;
        m.uid() == 0
    });
    let missing: Vec<&str> = ["dockerd", "docker", "unshare", "nsenter", "ip", "tc"]
        .into_iter()
        .filter(|program| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            !std::env::split_paths(&path).any(|folder| folder.join(program).exists())
        })
        .collect();
    if !root || !missing.is_empty() {
        let words = format!("{test}: it needs root and {missing:?}");
        assert!(std::env::var_os("CI").is_none(), "{words}");
        println!("{test}: skipped, it needs root and {missing:?}");
        return false;
    }
    true
}

/// Runs a program to its end; a failure is an error with what it said.
///
/// # Errors
/// When it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn ip(args: &[&str]) -> Result<String> {
    run(Command::new("ip").args(args))
}

/// Names of this process's links and cgroups: `bt<process>x<n>`, so that what a killed run left can
/// be told from what runs. At most 12 bytes; a link's name holds 15.
fn fresh_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("bt{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Whether a name was made by a process that is gone.
fn is_left_over(name: &str) -> bool {
    let process = name.strip_prefix("bt").and_then(|rest| rest.split_once('x')).map(|(p, _)| p);
    process
        .and_then(|p| p.parse::<u32>().ok())
        .is_some_and(|p| !Path::new(&format!("/proc/{p}")).exists())
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// A bridge with an address.
pub struct Wire {
    name: String,
    net: u32,
}

impl Wire {
    /// A new one, in a network of its own; also removes what a killed test run left.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        for name in names_in("/sys/class/net").iter().filter(|name| is_left_over(name)) {
            let _ = ip(&["link", "del", name]);
        }
        for controller in names_in("/sys/fs/cgroup") {
            let folder = format!("/sys/fs/cgroup/{controller}");
            for name in names_in(&folder).iter().filter(|name| is_left_over(name)) {
                remove_cgroup(&Path::new(&folder).join(name));
            }
        }
        let name = fresh_name();
        // From 198.18.0.0/15, which RFC 2544 keeps for such networks.
        let used = ip(&["-4", "-o", "addr"])?;
        let first = std::process::id() % 250;
        let net = (0..250)
            .map(|n| (first + n) % 250)
            .find(|net| !used.contains(&format!("198.18.{net}.")))
            .context("all networks are in use")?;
        ip(&["link", "add", &name, "type", "bridge", "forward_delay", "0"])?;
        let wire = Self { name, net };
        let address = format!("{}/24", wire.address());
        ip(&["addr", "add", &address, "dev", &wire.name])?;
        ip(&["link", "set", &wire.name, "up"])?;
        Ok(wire)
    }

    /// The machine's own address on it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("198.18.{}.1", self.net)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.name]);
    }
}

/// The first process of a host's namespaces.
struct First {
    outer: Child,
    id: u32,
}

impl First {
    fn start(log: &Path) -> Result<Self> {
        // Ignoring SIGCHLD lets the kernel bury what has lost its parent. A shell would not do here: it
        // takes the signal for the end of what it reads.
        let script = "mount -t tmpfs -o mode=755 run /run && ip link set lo up && echo up && \
                      exec env --ignore-signal=CHLD cat >/dev/null";
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut outer = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--net", "--mount-proc"])
            .args(["sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot run unshare")?;
        let mut said = String::new();
        let stdout = outer.stdout.as_mut().context("it was piped")?;
        std::io::BufReader::new(stdout).read_line(&mut said)?;
        ensure!(said == "up\n", "a host's namespaces cannot be made");
        let id = crate::child_of(outer.id()).context("the host ended at once")?;
        Ok(Self { outer, id })
    }
}

impl Drop for First {
    fn drop(&mut self) {
        // The kernel ends all others of the namespace before this one can be waited for.
        if matches!(self.outer.try_wait(), Ok(None)) {
            let _ = crate::signal(self.id, "KILL");
        }
        let _ = self.outer.wait();
    }
}

/// One container of ours on a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    /// The engine's id.
    pub id: String,
    /// Labels.
    pub deployment: String,
    /// Labels.
    pub replica: String,
    /// Labels.
    pub attempt: u32,
    /// Whether it runs.
    pub running: bool,
    /// When it was started last, as the engine writes it.
    pub started: String,
}

/// A host: namespaces, a cable, an engine, an agent.
pub struct Host {
    /// Its name in the cluster.
    pub name: String,
    /// Everything it writes.
    pub dir: PathBuf,
    /// Its address on the wire.
    pub address: String,
    agent: Option<Process>,
    engine: Option<Process>,
    first: Option<First>,
    wire: String,
    link: String,
    agent_args: Vec<String>,
    /// Where `berth-agent` is; the build that is tested unless it was rolled.
    build: PathBuf,
}

impl Host {
    /// A running host on the wire, with its engine and without an agent; `number` from 2 to 250 is the
    /// last part of its address.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn start(wire: &Wire, name: &str, number: u32, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("daemon.json"), "{}")?;
        let mut host = Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            address: format!("198.18.{}.{number}", wire.net),
            agent: None,
            engine: None,
            first: None,
            wire: wire.name.clone(),
            link: fresh_name(),
            agent_args: Vec::new(),
            build: crate::bin_dir()?,
        };
        host.power_on()?;
        Ok(host)
    }

    /// Starts a host that is off: namespaces, cable and engine.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn power_on(&mut self) -> Result<()> {
        let first = First::start(&self.dir.join("host.log"))?;
        let id = first.id.to_string();
        self.first = Some(first);
        ip(&["link", "add", &self.link, "type", "veth", "peer", "name", "eth0", "netns", &id])?;
        ip(&["link", "set", &self.link, "master", &self.wire, "up"])?;
        let address = format!("{}/24", self.address);
        run(&mut self.inside(Command::new("ip").args(["addr", "add", &address, "dev", "eth0"])))?;
        run(&mut self.inside(Command::new("ip").args(["link", "set", "eth0", "up"])))?;
        self.start_engine()
    }

    /// Ends everything on the host at once, as a power cut does; its disk stays.
    pub fn power_off(&mut self) {
        self.first = None;
        self.agent = None;
        self.engine = None;
        // The cable goes with the namespace, but not at once.
        let _ = ip(&["link", "del", &self.link]);
    }

    /// Pulls the cable.
    ///
    /// # Errors
    /// When it cannot be pulled.
    pub fn cut(&self) -> Result<()> {
        ip(&["link", "set", &self.link, "down"]).map(|_| ())
    }

    /// Puts the cable in again.
    ///
    /// # Errors
    /// When it cannot be put in.
    pub fn mend(&self) -> Result<()> {
        ip(&["link", "set", &self.link, "up"]).map(|_| ())
    }

    /// Limits what reaches the host, in Mbit/s; `None` takes the limit away.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn limit(&self, mbit: Option<u32>) -> Result<()> {
        let tc = |args: &[&str]| run(Command::new("tc").args(args)).map(|_| ());
        match mbit {
            Some(mbit) => {
                let rate = format!("{mbit}mbit");
                let root = ["qdisc", "replace", "dev", &self.link, "root", "tbf", "rate", &rate];
                tc(&[&root[..], &["burst", "64kb", "latency", "200ms"]].concat())
            }
            None => tc(&["qdisc", "del", "dev", &self.link, "root"]),
        }
    }

    /// Loses so many of a hundred packets that reach the host; `None`: none any more.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn lose(&self, percent: Option<u32>) -> Result<()> {
        let iptables = |args: &[&str]| run(&mut self.inside(Command::new("iptables").args(args)));
        let chain = "BERTH-LOSS";
        if let Some(percent) = percent {
            iptables(&["-N", chain])?;
            let part = format!("0.{percent:02}");
            let random = ["-m", "statistic", "--mode", "random", "--probability", &part];
            iptables(&[&["-A", chain, "-i", "eth0"], &random[..], &["-j", "DROP"]].concat())?;
            iptables(&["-I", "INPUT", "-j", chain])?;
        } else {
            iptables(&["-D", "INPUT", "-j", chain])?;
            iptables(&["-F", chain])?;
            iptables(&["-X", chain])?;
        }
        Ok(())
    }

    /// The name of its end of the wire, and of its cgroups.
    #[must_use]
    pub fn link(&self) -> &str {
        &self.link
    }

    /// Bytes that have reached the host over the wire since it was powered on.
    ///
    /// # Errors
    /// When it is off.
    pub fn received_bytes(&self) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", self.link);
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    }

    /// The same command, run on the host.
    ///
    /// # Panics
    /// When the host is off.
    #[must_use]
    pub fn inside(&self, command: &Command) -> Command {
        let first = self.first.as_ref().expect("the host is on").id.to_string();
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &first, "-p", "-m", "-n", "--"]);
        inside.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            if let Some(value) = value {
                inside.env(key, value);
            }
        }
        inside
    }

    /// Whether something takes a connection at this address, IP:PORT, asked on the host.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn dials(&self, address: &str) -> Result<bool> {
        let (ip, port) = address.rsplit_once(':').context("an address has a port")?;
        let mut dial = Command::new("timeout");
        dial.args(["5", "bash", "-c", &format!("exec 3<>/dev/tcp/{ip}/{port}")]);
        Ok(self.inside(&dial).output()?.status.success())
    }

    /// The engine's socket, as seen from everywhere.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("docker.sock")
    }

    /// Starts the engine.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn start_engine(&mut self) -> Result<()> {
        let dir = self.dir.display();
        let mut dockerd = Command::new("dockerd");
        dockerd
            .args(["--config-file", &format!("{dir}/daemon.json")])
            .args(["--data-root", &format!("{dir}/engine")])
            // In the host's own /run, which a power cut empties.
            .args(["--exec-root", "/run/engine", "--pidfile", "/run/engine.pid"])
            .args(["-H", &format!("unix://{}", self.socket().display())])
            // Where programs on the host look for it.
            .args(["-H", "unix:///run/docker.sock"])
            .args(["--cgroup-parent", &format!("/{}", self.link)])
            .args(["--bip", "172.30.0.1/24", "--log-level", "warn"]);
        let mut dockerd = self.inside(&dockerd);
        let engine = Process::start_within(&mut dockerd, &self.dir.join("engine.log"))?;
        let engine = self.engine.insert(engine);
        let log = engine.log.clone();
        let socket = format!("unix://{}/docker.sock", self.dir.display());
        eventually("the engine answers", PATIENCE, || {
            run(Command::new("docker").args(["-H", &socket, "version"]))
        })
        .map(|_| ())
        .map_err(|e| e.context(std::fs::read_to_string(log).unwrap_or_default()))
    }

    /// The engine's process.
    ///
    /// # Panics
    /// When it was not started.
    pub fn engine(&mut self) -> &mut Process {
        self.engine.as_mut().expect("the engine was started")
    }

    /// The agent's process.
    ///
    /// # Panics
    /// When it was not started.
    pub fn agent(&mut self) -> &mut Process {
        self.agent.as_mut().expect("the agent was started")
    }

    fn berth_agent(&self) -> Result<Command> {
        let mut command = crate::command_of(&self.build, "berth-agent")?;
        command.arg("--data-dir").arg(self.dir.join("agent"));
        command.arg("--engine").arg(self.socket());
        // The machine's own configuration is not this host's.
        let config = self.dir.join("agent.toml");
        if !config.exists() {
            std::fs::write(&config, "")?;
        }
        command.arg("--config").arg(config);
        Ok(command)
    }

    /// Joins the cluster and starts the agent, with these flags each time it is started.
    ///
    /// # Errors
    /// When it cannot join.
    pub fn join(&mut self, server: &str, token: &str, args: &[&str]) -> Result<()> {
        self.agent_args = args.iter().map(ToString::to_string).collect();
        let mut join = self.berth_agent()?;
        join.args(["join", "--name", &self.name, "--server", server, "--token", token]);
        run(&mut self.inside(&join))?;
        self.start_agent()
    }

    /// Starts the agent of a host that has joined.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self) -> Result<()> {
        let mut command = self.berth_agent()?;
        command.arg("run").args(&self.agent_args);
        let mut command = self.inside(&command);
        let agent = Process::start_within(&mut command, &self.dir.join("agent.log"))?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Ends the agent and starts that of another build on what it has left.
    ///
    /// # Errors
    /// When it does not end or cannot be started.
    pub fn roll_agent(&mut self, build: &Path) -> Result<()> {
        self.agent().terminate(PATIENCE)?;
        self.build = build.to_owned();
        self.start_agent()
    }

    /// Runs one of the agent's local commands.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn ask_agent(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.berth_agent()?;
        command.args(args);
        Ok(self.inside(&command).output()?)
    }

    /// Runs `docker` against the host's engine.
    ///
    /// # Errors
    /// When it fails.
    pub fn docker(&self, args: &[&str]) -> Result<String> {
        let socket = format!("unix://{}", self.socket().display());
        run(Command::new("docker").args(["-H", &socket]).args(args))
    }

    /// All containers of ours on the host.
    ///
    /// # Errors
    /// When the engine does not say.
    pub fn containers(&self) -> Result<Vec<Seen>> {
        // One that is removed between the two calls makes the second one fail.
        let all = eventually("the engine tells of its containers", PATIENCE, || {
            let ids =
                self.docker(&["ps", "-aq", "--no-trunc", "--filter", "label=io.berth.replica"])?;
            if ids.is_empty() {
                return Ok(Vec::new());
            }
            let mut args = vec!["inspect"];
            args.extend(ids.lines());
            let all: Vec<Value> = serde_json::from_str(&self.docker(&args)?)?;
            Ok(all)
        })?;
        let mut seen = Vec::new();
        for one in all {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let labels = &one["Config"]["Labels"];
            seen.push(Seen {
                id: text(&one["Id"]),
                deployment: text(&labels["io.berth.deployment"]),
                replica: text(&labels["io.berth.replica"]),
                attempt: text(&labels["io.berth.attempt"]).parse()?,
                running: one["State"]["Running"] == true,
                started: text(&one["State"]["StartedAt"]),
            });
        }
        seen.sort();
        Ok(seen)
    }

    /// The containers of ours that run.
    ///
    /// # Errors
    /// When the engine does not say.
    pub fn running(&self) -> Result<Vec<Seen>> {
        let mut all = self.containers()?;
        all.retain(|c| c.running);
        Ok(all)
    }

    /// Writes down every event of the engine's containers, from the engine's start on, as
    /// [`crate::events`] reads them.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn record_events(&self) -> Result<Process> {
        let socket = format!("unix://{}", self.socket().display());
        let mut command = Command::new("docker");
        command.args(["-H", &socket, "events", "--since", "0", "--filter", "type=container"]);
        command.args(["--filter", "label=io.berth.replica", "--format", "{{json .}}"]);
        Process::start(&mut command, &self.dir.join("events.log"))
    }

    /// What agent and engine said last, for a failed test's message.
    #[must_use]
    pub fn story(&self) -> String {
        let mut story = String::new();
        for (what, process) in [("agent", &self.agent), ("engine", &self.engine)] {
            if let Some(process) = process {
                story.push_str(&format!("--- {what} of {}\n{}\n", self.name, process.tail()));
            }
        }
        story
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.power_off();
        for controller in names_in("/sys/fs/cgroup") {
            remove_cgroup(&Path::new("/sys/fs/cgroup").join(controller).join(&self.link));
        }
        remove_cgroup(&Path::new("/sys/fs/cgroup").join(&self.link));
    }
}

/// Removes a cgroup and those in it, none of which holds a process any more.
fn remove_cgroup(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(path);
}

/// A server on a wire with hosts, each with an engine and an agent of its own.
pub struct Fleet {
    /// `h0`, `h1`, ...; dropped before the server's folder, which holds theirs.
    pub hosts: Vec<Host>,
    /// The server.
    pub cluster: crate::Cluster,
    wire: Wire,
    /// Two fleets at once are too much for two cores.
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Fleet {
    /// So many hosts, all joined and present.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn start(hosts: u32) -> Result<Self> {
        static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let wire = Wire::new()?;
        let cluster = crate::Cluster::start_at(&wire.address(), &[])?;
        let mut fleet = Self { hosts: Vec::new(), cluster, wire, _turn: turn };
        for _ in 0..hosts {
            fleet.add_host(&[])?;
        }
        fleet.all_present()?;
        Ok(fleet)
    }

    /// One more host, whose agent gets these flags.
    ///
    /// # Errors
    /// When it cannot be made or cannot join.
    pub fn add_host(&mut self, args: &[&str]) -> Result<&mut Host> {
        self.add_host_with("", args)
    }

    /// The same, with a configuration of its own.
    ///
    /// # Errors
    /// When it cannot be made or cannot join.
    pub fn add_host_with(&mut self, config: &str, args: &[&str]) -> Result<&mut Host> {
        let number = u32::try_from(self.hosts.len())?;
        let name = format!("h{number}");
        let dir = self.cluster.dir.path().join(&name);
        let mut host = Host::start(&self.wire, &name, number + 2, &dir)?;
        std::fs::write(dir.join("agent.toml"), config)?;
        let token = self.cluster.berth_json(&["host", "token", "create"])?;
        let token = token["secret"].as_str().context("no secret in the answer")?.to_owned();
        host.join(&self.cluster.door("control")?, &token, args)?;
        self.hosts.push(host);
        self.hosts.last_mut().context("it was put there")
    }

    /// One more host whose disk is a copy of another's: two with one identity. Its agent runs.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn add_clone_of(&mut self, original: usize) -> Result<&mut Host> {
        let number = u32::try_from(self.hosts.len())?;
        let dir = self.cluster.dir.path().join(format!("h{number}"));
        let held = self.hosts.get(original).context("there is no such host")?;
        let (from, name) = (held.dir.join("agent"), held.name.clone());
        let mut host = Host::start(&self.wire, &name, number + 2, &dir)?;
        run(Command::new("cp").arg("-a").arg(from).arg(dir.join("agent")))?;
        host.start_agent()?;
        self.hosts.push(host);
        self.hosts.last_mut().context("it was put there")
    }

    /// Waits until the server sees every host.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn all_present(&self) -> Result<()> {
        eventually("all hosts are present", PATIENCE, || {
            let hosts = self.cluster.berth_json(&["host", "list"])?;
            let hosts = hosts.as_array().context("a list")?;
            let present = hosts.iter().filter(|h| h["presence"] == "present").count();
            ensure!(present == self.hosts.len(), "{present}: {hosts:?}");
            Ok(())
        })
    }

    /// Puts the stand-in's image into the cluster's registry as `name`, with so many MiB besides; no
    /// engine holds it afterwards.
    ///
    /// # Errors
    /// When it cannot be built or pushed.
    pub fn push_stand_in(&self, name: &str, ballast_mib: u64) -> Result<()> {
        let host = self.hosts.first().context("a host is needed to push from")?;
        let folder = tempfile::Builder::new().prefix("image-").tempdir_in(&host.dir)?;
        let archive = crate::stand_in::archive(folder.path(), ballast_mib)?;
        let local = format!("berth-it/{name}");
        let path = archive.to_str().context("a path")?;
        host.docker(&["import", "-c", "ENTRYPOINT [\"/berth-stand-in\"]", path, &local])?;
        // On the host, where the engine's usual socket is this one.
        let mut push = crate::command("berth")?;
        push.env("BERTH_CONFIG", self.cluster.server_dir().join("admin.toml"));
        push.args(["image", "push", &local, name]);
        let pushed = run(&mut host.inside(&push));
        host.docker(&["rmi", "-f", &local])?;
        pushed.map(|_| ())
    }

    /// Writes a manifest and gives its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn manifest(&self, name: &str, spec: &str) -> Result<String> {
        let path = self.cluster.dir.path().join(format!("{name}.yaml"));
        let text = format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: {name}}}\nspec:\n{spec}"
        );
        std::fs::write(&path, text)?;
        path.to_str().map(str::to_owned).context("a path")
    }

    /// The replicas of a deployment as `berth ps` lists them.
    ///
    /// # Errors
    /// When it does not.
    pub fn ps(&self, deployment: &str) -> Result<Vec<Value>> {
        let all = self.cluster.berth_json(&["ps", deployment])?;
        all.as_array().cloned().context("a list")
    }

    /// Waits until exactly so many replicas are listed and all of them are ready; gives them.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn ready(&self, deployment: &str, number: usize) -> Result<Vec<Value>> {
        eventually("all replicas are ready", PATIENCE, || {
            let all = self.ps(deployment)?;
            let ready = all.iter().filter(|r| r["state"] == "ready").count();
            ensure!(ready == number && all.len() == number, "{ready} of {number}: {all:#?}");
            Ok(all)
        })
    }

    /// Everything of ours that runs on hosts that are on.
    ///
    /// # Errors
    /// When an engine does not say.
    pub fn running(&self) -> Result<Vec<Seen>> {
        let mut all = Vec::new();
        for host in self.hosts.iter().filter(|host| host.first.is_some()) {
            all.extend(host.running()?);
        }
        all.sort();
        Ok(all)
    }

    /// What everybody said last.
    #[must_use]
    pub fn story(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(Host::story).collect();
        hosts.concat()
    }

    /// Waits until `berth ps` and the engines agree: so many replicas, each ready, each run by exactly
    /// one container, and no other container runs anywhere.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn settles_at(&self, deployment: &str, number: usize) -> Result<Vec<Seen>> {
        eventually("exactly what is wanted runs", PATIENCE, || {
            let listed = self.ps(deployment)?;
            let ready = listed.iter().filter(|r| r["state"] == "ready").count();
            if ready != number || listed.len() != number {
                bail!("{ready} of {number} are ready: {listed:#?}");
            }
            let mut slots: Vec<u64> = listed.iter().filter_map(|r| r["slot"].as_u64()).collect();
            slots.sort_unstable();
            slots.dedup();
            ensure!(slots.len() == number, "slots are filled twice: {listed:#?}");
            let mut wanted: Vec<&str> =
                listed.iter().filter_map(|r| r["containerId"].as_str()).collect();
            wanted.sort_unstable();
            let running = self.running()?;
            let mut here: Vec<&str> = running.iter().map(|c| c.id.as_str()).collect();
            here.sort_unstable();
            ensure!(wanted == here, "listed {wanted:?}, running {running:#?}");
            Ok(running)
        })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story());
        }
    }
}
