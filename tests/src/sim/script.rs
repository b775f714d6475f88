//! What a seed comes to: a fleet, and what befalls it and when. All of it is drawn before the run, so
//! that a story is made shorter by leaving parts of it out.

use fastrand::Rng;
use std::fmt;

/// How a program behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    /// Serves from its start.
    Good,
    /// Serves after a while.
    Slow,
    /// Runs and never serves.
    Deaf,
    /// Ends with an error soon after its start.
    Crashes,
    /// Its image cannot be pulled.
    NoImage,
}

/// When a program that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    Always,
    OnFailure,
    Never,
}

/// A deployment as somebody writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) program: Program,
    /// Tells versions of one program apart.
    pub(super) version: u8,
    /// `None`: on every host.
    pub(super) replicas: Option<u32>,
    pub(super) memory_mib: u64,
    pub(super) cpu_millis: u64,
    /// It needs a part of a GPU's memory.
    pub(super) gpu: bool,
    /// Spread over zones.
    pub(super) spread: bool,
    pub(super) again: Again,
    pub(super) surge: u32,
    pub(super) unavailable: u32,
    pub(super) checked: bool,
    pub(super) host_port: bool,
    pub(super) zone: Option<u8>,
    pub(super) artifact: bool,
    pub(super) pause: bool,
    pub(super) keep_lost: bool,
    pub(super) ready_for_ms: u64,
    pub(super) deadline_ms: u64,
    pub(super) lost_after_ms: u64,
}

/// When an agent or a server dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Now,
    /// Just before its next write is durable.
    BeforeWrite,
    /// The next write is durable, and nobody was told.
    AfterWrite,
    /// An agent's: its next container is made or started, and it does not know.
    AfterStep,
    /// An agent's: just before the next chunk of a transfer is durable, and just after.
    BeforeChunk,
    AfterChunk,
}

/// What is wrong with a host's way to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trouble {
    /// Connections break, and some come to nothing.
    Breaks,
    /// Connections stay and nothing comes.
    Stalls,
    /// It says no.
    Refuses,
    /// It answers with other bytes than were asked for, and breaks off.
    Elsewhere,
    /// It sends wrong bytes.
    Wrong,
}

/// Something that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Apply { deployment: u8, spec: Spec },
    Scale { deployment: u8, replicas: u32 },
    Restart { deployment: u8 },
    Undo { deployment: u8 },
    Delete { deployment: u8 },
    Cordon { host: u8, on: bool },
    Drain { host: u8, on: bool },
    Relabel { host: u8, zone: u8 },
    Remove { host: u8, wipe: bool },
    Rejoin { host: u8, disk_kept: bool },
    ReleaseQuarantine { host: u8 },
    Backup,
    Restore { down_ms: u64 },
    ResolveOrphans { host: u8, adopt: bool },
    KillServer { when: Moment, down_ms: u64 },
    ServerDiskFull { for_ms: u64 },
    ServerDiskSlow { for_ms: u64 },
    ServerClock { ahead_ms: i64 },
    KillAgent { host: u8, when: Moment, down_ms: u64 },
    Reboot { host: u8, down_ms: u64 },
    CloneDisk { host: u8 },
    EndClone { host: u8 },
    Cut { host: u8 },
    Partition { host: u8, up: bool, down: bool, for_ms: u64 },
    SlowLink { host: u8, by_ms: u64, for_ms: u64 },
    Doubles { host: u8, messages: u8 },
    EngineAway { host: u8, for_ms: u64 },
    EngineSlow { host: u8, by_ms: u64, for_ms: u64 },
    EngineFails { host: u8, calls: u8 },
    EngineLosesAnswers { host: u8, calls: u8 },
    EngineLate { host: u8, for_ms: u64 },
    EngineHangs { host: u8, for_ms: u64 },
    EngineRestarts { host: u8, for_ms: u64 },
    ContainerRenamed { host: u8, which: u8 },
    PortTaken { host: u8, for_ms: u64 },
    NetworkUnreached { host: u8, for_ms: u64 },
    Upgrade { host: u8, down_ms: u64 },
    HostRate { host: u8, per_mille: u64 },
    ContainerEnds { host: u8, which: u8, code: i32 },
    ContainerRemoved { host: u8, which: u8 },
    ContainerStartedByHand { host: u8, which: u8 },
    Sick { host: u8, which: u8, for_ms: u64 },
    FollowEnds { host: u8 },
    RegistryAway { host: u8, for_ms: u64 },
    RegistryTroubled { host: u8, what: Trouble, for_ms: u64 },
    ChunkRots { host: u8, which: u8 },
    ImagesPruned { host: u8 },
    AgentDiskFull { host: u8, for_ms: u64 },
    HostClock { host: u8, ahead_ms: i64 },
}

/// A machine of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) memory_mib: u64,
    pub(super) zone: u8,
    /// Its clock's rate.
    pub(super) per_mille: u64,
    /// An agent of before artifacts.
    pub(super) old: bool,
    pub(super) approval: bool,
    /// It has a GPU.
    pub(super) gpu: bool,
    /// Of another architecture than the images.
    pub(super) foreign: bool,
    /// What it brings is capped.
    pub(super) capped: bool,
}

/// All of a run but for its draws.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    pub(super) seed: u64,
    pub(super) machines: Vec<Machine>,
    /// When, and what.
    pub(super) actions: Vec<(u64, Action)>,
    pub(super) ping_ms: u64,
    pub(super) server_per_mille: u64,
    /// Messages are encoded and read back.
    pub(super) wire: bool,
    /// Pages, groups and what is done at once are small.
    pub(super) small: bool,
}

fn draw_rate(rng: &mut Rng) -> u64 {
    match rng.u8(0..8) {
        0 => 900,
        1 => 1100,
        2 => 995,
        3 => 1005,
        _ => 1000,
    }
}

fn draw_spec(rng: &mut Rng, hosts: u32) -> Spec {
    let program = match rng.u8(0..16) {
        0 => Program::Crashes,
        1 => Program::Deaf,
        2 => Program::NoImage,
        3..=5 => Program::Slow,
        _ => Program::Good,
    };
    let unavailable = u32::from(rng.u8(0..3) == 0);
    Spec {
        program,
        version: rng.u8(0..4),
        replicas: (rng.u8(0..6) != 0).then(|| rng.u32(0..=hosts.min(8) + 1)),
        memory_mib: [64, 128, 300, 600][rng.usize(0..4)],
        cpu_millis: if rng.u8(0..4) == 0 { 1_500 } else { 100 },
        gpu: rng.u8(0..10) == 0,
        spread: rng.u8(0..4) == 0,
        again: match rng.u8(0..10) {
            0 => Again::Never,
            1 | 2 => Again::OnFailure,
            _ => Again::Always,
        },
        surge: u32::from(unavailable == 0 || rng.bool()),
        unavailable,
        checked: program == Program::Deaf || rng.u8(0..4) == 0,
        host_port: rng.u8(0..6) == 0,
        zone: (rng.u8(0..5) == 0).then(|| rng.u8(0..2)),
        artifact: rng.u8(0..8) == 0,
        pause: rng.u8(0..4) == 0,
        keep_lost: rng.u8(0..3) == 0,
        ready_for_ms: [0, 500, 3_000][rng.usize(0..3)],
        deadline_ms: [20_000, 60_000][rng.usize(0..2)],
        lost_after_ms: [5_000, 30_000][rng.usize(0..2)],
    }
}

fn draw_ms(rng: &mut Rng) -> u64 {
    match rng.u8(0..12) {
        0 => rng.u64(1..50),
        1..=5 => rng.u64(50..2_000),
        6..=9 => rng.u64(2_000..20_000),
        10 => rng.u64(20_000..90_000),
        _ => rng.u64(90_000..1_000_000),
    }
}

fn draw_clock(rng: &mut Rng) -> i64 {
    let far = [1_000, 60_000, 3_600_000, 40 * 86_400_000][rng.usize(0..4)];
    if rng.bool() { far } else { -far }
}

fn draw_moment(rng: &mut Rng, agent: bool) -> Moment {
    match rng.u8(0..if agent { 9 } else { 4 }) {
        0 => Moment::Now,
        1 => Moment::BeforeWrite,
        2 | 3 => Moment::AfterWrite,
        4..=6 => Moment::AfterStep,
        7 => Moment::BeforeChunk,
        _ => Moment::AfterChunk,
    }
}

fn draw_trouble(rng: &mut Rng) -> Trouble {
    match rng.u8(0..8) {
        0 | 1 => Trouble::Breaks,
        2 => Trouble::Stalls,
        3 => Trouble::Refuses,
        4..=6 => Trouble::Elsewhere,
        _ => Trouble::Wrong,
    }
}

fn draw_action(rng: &mut Rng, hosts: u8, deployments: u8) -> Action {
    let host = rng.u8(0..hosts);
    let deployment = rng.u8(0..deployments);
    let which = rng.u8(0..8);
    let ms = draw_ms(rng);
    match rng.u8(0..122) {
        0..=15 => Action::Apply { deployment, spec: draw_spec(rng, u32::from(hosts)) },
        16..=20 => Action::Scale { deployment, replicas: rng.u32(0..=u32::from(hosts).min(8) + 1) },
        21..=23 => Action::Restart { deployment },
        24..=25 => Action::Undo { deployment },
        26..=27 => Action::Delete { deployment },
        28..=30 => Action::Cordon { host, on: rng.bool() },
        31..=33 => Action::Drain { host, on: rng.u8(0..3) != 0 },
        34 => Action::Relabel { host, zone: rng.u8(0..2) },
        35 | 118 => Action::Remove { host, wipe: rng.bool() },
        36..=37 => Action::Rejoin { host, disk_kept: rng.u8(0..4) == 0 },
        38 => Action::ReleaseQuarantine { host },
        39..=40 => Action::Backup,
        41 | 119 => Action::Restore { down_ms: ms.min(20_000) },
        42 => Action::ResolveOrphans { host, adopt: rng.u8(0..3) != 0 },
        43..=48 => Action::KillServer { when: draw_moment(rng, false), down_ms: ms },
        49 => Action::ServerDiskFull { for_ms: ms },
        50 => Action::ServerDiskSlow { for_ms: ms },
        51 => Action::ServerClock { ahead_ms: draw_clock(rng) },
        52..=58 => Action::KillAgent { host, when: draw_moment(rng, true), down_ms: ms },
        59..=60 => Action::Reboot { host, down_ms: ms },
        61 => Action::CloneDisk { host },
        62 => Action::EndClone { host },
        63..=65 => Action::Cut { host },
        66..=70 => {
            let both = rng.bool();
            let up = rng.bool();
            Action::Partition { host, up: both || up, down: both || !up, for_ms: ms }
        }
        71 => {
            let by_ms = [200, 5_000, 40_000, 7_200_000][rng.usize(0..4)];
            Action::SlowLink { host, by_ms, for_ms: ms.min(60_000) }
        }
        72..=73 => Action::Doubles { host, messages: rng.u8(1..4) },
        74..=77 => Action::EngineAway { host, for_ms: ms },
        78 => Action::EngineSlow { host, by_ms: rng.u64(100..20_000), for_ms: ms },
        79..=81 => Action::EngineFails { host, calls: rng.u8(1..9) },
        82..=84 => Action::EngineLosesAnswers { host, calls: rng.u8(1..4) },
        85 => Action::EngineLate { host, for_ms: ms },
        86..=89 => Action::ContainerEnds { host, which, code: i32::from(rng.bool()) },
        90 => Action::ContainerRemoved { host, which },
        91 | 92 if rng.u8(0..6) == 0 => Action::ContainerStartedByHand { host, which },
        91 | 92 => {
            Action::Sick { host, which, for_ms: [3_000, 3_000, 40_000, 150_000][rng.usize(0..4)] }
        }
        93 => Action::FollowEnds { host },
        94..=95 => Action::RegistryAway { host, for_ms: ms },
        96 => Action::ImagesPruned { host },
        97..=98 => Action::AgentDiskFull { host, for_ms: ms },
        99 => Action::EngineHangs { host, for_ms: ms },
        100..=101 => Action::EngineRestarts { host, for_ms: ms },
        102 => Action::ContainerRenamed { host, which },
        // Half of them for so long that whoever wants it tries seldom in the end.
        103..=105 => {
            let least_ms = if which.is_multiple_of(2) { 30_000 } else { 0 };
            Action::PortTaken { host, for_ms: ms.max(least_ms) }
        }
        106 => Action::NetworkUnreached { host, for_ms: ms },
        107 => Action::Upgrade { host, down_ms: ms.min(20_000) },
        108 => Action::HostRate { host, per_mille: draw_rate(rng) },
        // Some of them for so long that a transfer's pause comes to its bound.
        110..=115 | 120..=121 => {
            let least_ms = if which.is_multiple_of(4) { 100_000 } else { 0 };
            let what = draw_trouble(rng);
            Action::RegistryTroubled { host, what, for_ms: ms.max(least_ms) }
        }
        116..=117 => Action::ChunkRots { host, which },
        _ => Action::HostClock { host, ahead_ms: draw_clock(rng) },
    }
}

impl Script {
    /// What a seed comes to.
    pub(super) fn of(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let hosts = match rng.u16(0..2_000) {
            0 => rng.u8(20..=50),
            1..=3 => rng.u8(13..=19),
            4..=40 => rng.u8(6..=12),
            41..=500 => 1,
            501..=1_200 => 2,
            _ => rng.u8(3..=5),
        };
        let deployments = match rng.u16(0..1_000) {
            0 => rng.u8(5..=20),
            1..=600 => 1,
            601..=900 => 2,
            _ => rng.u8(3..=4),
        };
        let machine = |rng: &mut Rng| Machine {
            memory_mib: [400, 700, 1_300, 4_000][rng.usize(0..4)],
            zone: rng.u8(0..2),
            per_mille: draw_rate(rng),
            old: rng.u8(0..12) == 0,
            approval: rng.u8(0..20) == 0,
            gpu: rng.u8(0..3) == 0,
            foreign: rng.u8(0..24) == 0,
            capped: rng.u8(0..8) == 0,
        };
        let machines = (0..hosts).map(|_| machine(&mut rng)).collect();
        let span_ms = [5_000, 20_000, 60_000, 180_000][rng.usize(0..4)];
        // More happens where there is more.
        let count = rng.usize(4..=18) * usize::from(1 + hosts / 13);
        let mut actions: Vec<(u64, Action)> = (0..deployments)
            .map(|deployment| {
                let spec = draw_spec(&mut rng, u32::from(hosts));
                (rng.u64(0..2_000), Action::Apply { deployment, spec })
            })
            .collect();
        for _ in 0..count {
            let at = rng.u64(0..span_ms);
            let action = draw_action(&mut rng, hosts, deployments);
            // What is done now and then is followed by its like: a restore needs a backup.
            if matches!(action, Action::Restore { .. }) {
                actions.push((rng.u64(0..=at), Action::Backup));
            }
            // One who is well in between is not sick for longer.
            if matches!(action, Action::Sick { for_ms: 3_000, .. }) {
                actions.push((at + rng.u64(20_000..40_000), action.clone()));
            }
            actions.push((at, action));
        }
        actions.sort_by_key(|(at, _)| *at);
        let ping_ms = [10_000, 30_000, 120_000][rng.usize(0..3)];
        let server_per_mille = draw_rate(&mut rng);
        let (wire, small) = (rng.u8(0..8) == 0, rng.u8(0..8) == 0);
        Self { seed, machines, actions, ping_ms, server_per_mille, wire, small }
    }
}

/// Milliseconds for people.
pub(super) fn ms(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { format!("{} s", ms / 1000) }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = match self.program {
            Program::Good => "a good program",
            Program::Slow => "a program that is slow to start",
            Program::Deaf => "a program that never serves",
            Program::Crashes => "a program that crashes",
            Program::NoImage => "an image that cannot be pulled",
        };
        match self.replicas {
            Some(n) => write!(f, "{n} of {program}")?,
            None => write!(f, "{program} on every host")?,
        }
        write!(
            f,
            " (version {}, {} MiB, surge {}, unavailable {}, ready for {}, deadline {}, lost after {}",
            self.version,
            self.memory_mib,
            self.surge,
            self.unavailable,
            ms(self.ready_for_ms),
            ms(self.deadline_ms),
            ms(self.lost_after_ms),
        )?;
        for (is, word) in [
            (self.checked, "with a health check"),
            (self.host_port, "with a host port"),
            (self.artifact, "with a model"),
            (self.pause, "paused on failure"),
            (self.keep_lost, "kept on a lost host"),
            (self.cpu_millis > 100, "with much CPU"),
            (self.gpu, "with GPU memory"),
            (self.spread, "spread over zones"),
            (self.again == Again::OnFailure, "started again when it fails"),
            (self.again == Again::Never, "never started again"),
        ] {
            if is {
                write!(f, ", {word}")?;
            }
        }
        if let Some(zone) = self.zone {
            write!(f, ", in zone z{zone}")?;
        }
        f.write_str(")")
    }
}

fn dies(when: Moment) -> &'static str {
    match when {
        Moment::Now => "is killed",
        Moment::BeforeWrite => "is killed just before its next write is durable",
        Moment::AfterWrite => "is killed just after its next write is durable",
        Moment::AfterStep => "is killed just after its next container is made, started or stopped",
        Moment::BeforeChunk => "is killed just before its next chunk is durable",
        Moment::AfterChunk => "is killed just after its next chunk is durable",
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply { deployment, spec } => write!(f, "somebody applies d{deployment}: {spec}"),
            Self::Scale { deployment, replicas } => {
                write!(f, "somebody scales d{deployment} to {replicas}")
            }
            Self::Restart { deployment } => write!(f, "somebody restarts d{deployment}"),
            Self::Undo { deployment } => write!(f, "somebody undoes d{deployment}'s last release"),
            Self::Delete { deployment } => write!(f, "somebody deletes d{deployment}"),
            Self::Cordon { host, on: true } => write!(f, "somebody cordons h{host}"),
            Self::Cordon { host, on: false } => write!(f, "somebody uncordons h{host}"),
            Self::Drain { host, on: true } => write!(f, "somebody drains h{host}"),
            Self::Drain { host, on: false } => write!(f, "somebody ends the drain of h{host}"),
            Self::Relabel { host, zone } => write!(f, "somebody moves h{host} to zone z{zone}"),
            Self::Remove { host, wipe } => {
                write!(
                    f,
                    "somebody removes h{host}{}",
                    if *wipe { " and has it wiped" } else { "" }
                )
            }
            Self::Rejoin { host, disk_kept } => {
                let with = if *disk_kept { "its containers" } else { "an empty disk" };
                write!(f, "h{host} joins again with {with}")
            }
            Self::ReleaseQuarantine { host } => {
                write!(f, "somebody ends the quarantine of h{host}")
            }
            Self::Backup => write!(f, "a backup of the server is made"),
            Self::Restore { down_ms } => {
                write!(
                    f,
                    "the server is restored from the newest backup, away for {}",
                    ms(*down_ms)
                )
            }
            Self::ResolveOrphans { host, adopt } => {
                let how = if *adopt { "adopts" } else { "releases" };
                write!(f, "somebody {how} the orphans on h{host}")
            }
            Self::KillServer { when, down_ms } => {
                write!(f, "the server {}, back after {}", dies(*when), ms(*down_ms))
            }
            Self::ServerDiskFull { for_ms } => {
                write!(f, "the server's disk is full for {}", ms(*for_ms))
            }
            Self::ServerDiskSlow { for_ms } => {
                write!(f, "the server's disk is slow for {}", ms(*for_ms))
            }
            Self::ServerClock { ahead_ms } => {
                write!(f, "the server's wall clock jumps by {ahead_ms} ms")
            }
            Self::KillAgent { host, when, down_ms } => {
                write!(f, "the agent of h{host} {}, back after {}", dies(*when), ms(*down_ms))
            }
            Self::Reboot { host, down_ms } => {
                write!(f, "h{host} loses power, back after {}", ms(*down_ms))
            }
            Self::CloneDisk { host } => write!(f, "the disk of h{host} is cloned to a new machine"),
            Self::EndClone { host } => write!(f, "the clone of h{host} is switched off"),
            Self::Cut { host } => write!(f, "the connection of h{host} breaks"),
            Self::Partition { host, up, down, for_ms } => {
                let way = match (up, down) {
                    (true, true) => "in both directions",
                    (true, false) => "from it",
                    _ => "to it",
                };
                write!(f, "nothing gets through {way} at h{host} for {}", ms(*for_ms))
            }
            Self::SlowLink { host, by_ms, for_ms } => {
                write!(f, "messages of h{host} take {} for {}", ms(*by_ms), ms(*for_ms))
            }
            Self::Doubles { host, messages } => {
                write!(
                    f,
                    "{messages} messages of h{host} come twice, or a set of before comes again"
                )
            }
            Self::EngineAway { host, for_ms } => {
                write!(f, "the engine of h{host} is away for {}", ms(*for_ms))
            }
            Self::EngineSlow { host, by_ms, for_ms } => {
                write!(f, "the engine of h{host} takes {} for {}", ms(*by_ms), ms(*for_ms))
            }
            Self::EngineFails { host, calls } => {
                write!(f, "the engine of h{host} fails {calls} calls")
            }
            Self::EngineLosesAnswers { host, calls } => {
                write!(f, "the engine of h{host} does {calls} calls and does not answer")
            }
            Self::EngineLate { host, for_ms } => {
                write!(f, "the engine of h{host} tells its events late for {}", ms(*for_ms))
            }
            Self::EngineHangs { host, for_ms } => {
                write!(f, "the engine of h{host} answers nothing for {}", ms(*for_ms))
            }
            Self::EngineRestarts { host, for_ms } => {
                let time = ms(*for_ms);
                write!(f, "the engine of h{host} ends with all it runs, back after {time}")
            }
            Self::ContainerRenamed { host, which } => {
                write!(f, "somebody renames a container on h{host} (the {which}th)")
            }
            Self::PortTaken { host, for_ms } => {
                write!(f, "another program has the port on h{host} for {}", ms(*for_ms))
            }
            Self::NetworkUnreached { host, for_ms } => {
                write!(f, "the agent of h{host} reaches no container for {}", ms(*for_ms))
            }
            Self::Upgrade { host, down_ms } => {
                write!(f, "a newer agent is put on h{host}, up after {}", ms(*down_ms))
            }
            Self::HostRate { host, per_mille } => {
                write!(f, "the clock of h{host} runs at {per_mille} per mille from now on")
            }
            Self::ContainerEnds { host, which, code } => {
                write!(f, "a program on h{host} ends with code {code} (the {which}th)")
            }
            Self::ContainerRemoved { host, which } => {
                write!(f, "somebody removes a container on h{host} (the {which}th)")
            }
            Self::ContainerStartedByHand { host, which } => {
                write!(f, "somebody starts a dead container on h{host} (the {which}th)")
            }
            Self::Sick { host, which, for_ms } => {
                let time = ms(*for_ms);
                write!(f, "a program on h{host} does not answer for {time} (the {which}th)")
            }
            Self::FollowEnds { host } => write!(f, "the event stream of h{host}'s engine ends"),
            Self::RegistryAway { host, for_ms } => {
                write!(f, "h{host} reaches no registry for {}", ms(*for_ms))
            }
            Self::RegistryTroubled { host, what, for_ms } => {
                let how = match what {
                    Trouble::Breaks => "breaks its connections",
                    Trouble::Stalls => "sends nothing now and then",
                    Trouble::Refuses => "says no",
                    Trouble::Elsewhere => "answers with other bytes",
                    Trouble::Wrong => "sends wrong bytes",
                };
                write!(f, "the registry {how} to h{host} for {}", ms(*for_ms))
            }
            Self::ChunkRots { host, which } => {
                write!(f, "a chunk on the disk of h{host} changes (the {which}th, or the next one)")
            }
            Self::ImagesPruned { host } => write!(f, "somebody prunes the images of h{host}"),
            Self::AgentDiskFull { host, for_ms } => {
                write!(f, "the agent's disk of h{host} is full for {}", ms(*for_ms))
            }
            Self::HostClock { host, ahead_ms } => {
                write!(f, "the wall clock of h{host} jumps by {ahead_ms} ms")
            }
        }
    }
}
