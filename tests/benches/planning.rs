//! Placements planned a second over 10,000 hosts, and what one change costs by the queue.
//!
//! `cargo bench -p berth-tests --bench planning`. Prints figures; each plan is applied to the view, so
//! that the next one sees it, as the server does before its ledger makes anything durable.

use berth_proto::api;
use berth_proto::ids::{HostUid, Mono, Now, Wall};
use berth_proto::record::{HostRecord, Meta};
use berth_proto::values::{PlatformImage, ResolvedImage, ResolvedSource};
use berth_server_core::change::Change;
use berth_server_core::decide::{self, Asked, Wanted};
use berth_server_core::live::{Live, Presence};
use berth_server_core::objects::Host;
use berth_server_core::planner;
use berth_server_core::queue::{Key, Queue};
use berth_server_core::view::View;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

const HOSTS: usize = 10_000;
const NOW: Now = Now { mono: Mono(1_000), wall: Wall(1_000_000) };

fn main() -> anyhow::Result<()> {
    let (view, live) = fleet()?;
    for (deployments, replicas) in [(20, 1_000), (2_000, 10), (10_000, 2)] {
        let mut view = view.clone();
        for n in 0..deployments {
            apply(&mut view, n, replicas)?;
        }
        let mut queue = Queue::new(&view);
        let begun = Instant::now();
        let placed = drain(&mut queue, &mut view, &live)?;
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{HOSTS} hosts, {deployments} deployments of {replicas}: {placed} placements, {:.0} a second",
            placed as f64 / seconds
        );
    }
    let mut view = view;
    for n in 0..1_000 {
        apply(&mut view, n, 10)?;
    }
    let mut queue = Queue::new(&view);
    drain(&mut queue, &mut view, &live)?;
    let begun = Instant::now();
    let full: usize = view
        .deployments()
        .map(|d| planner::plan(&view, &live, &d.uid, NOW, &mut mint(0)).steps.len())
        .sum();
    let pass = begun.elapsed();
    let rounds = 1_000_usize;
    let begun = Instant::now();
    for n in 0..rounds {
        let uid: HostUid = format!("host-{:05}", n * 7 % HOSTS).parse()?;
        let host = view.host(&uid).map(|h| h.edited(|r| r.trust_version += 1));
        let Some(Ok(host)) = host else { continue };
        let change = Change::PutHost(Arc::new(host));
        view.apply(&change, view.revision.next());
        queue.changed(&view, &live, &change);
        drain(&mut queue, &mut view, &live)?;
    }
    let one = begun.elapsed() / u32::try_from(rounds)?;
    println!(
        "one host of {HOSTS} changed, 1000 deployments: {one:?} by the queue, {pass:?} by a full pass ({full} steps), {:.0} times",
        pass.as_secs_f64() / one.as_secs_f64()
    );
    Ok(())
}

fn mint(from: u64) -> impl FnMut() -> berth_proto::ids::ReplicaUid {
    let mut next = from;
    move || {
        next += 1;
        #[expect(clippy::expect_used, reason = "digits are a uid")]
        format!("0193aa00-0000-7000-8000-{next:012}").parse().expect("digits are a uid")
    }
}

fn drain(queue: &mut Queue, view: &mut View, live: &Live) -> anyhow::Result<usize> {
    let mut placed = 0;
    // Uids must not come again over the rounds.
    let mut mint = mint(view.revision.0 * 1_000_000);
    while let Some((key, _)) = queue.next(NOW.mono) {
        let plan = match &key {
            Key::Whole(uid) => planner::plan(view, live, uid, NOW, &mut mint),
            Key::OnHost(uid, host) => planner::plan_host(view, live, uid, host, NOW, &mut mint),
        };
        anyhow::ensure!(plan.report.pending.is_empty(), "no room: {:?}", plan.report.pending);
        placed += plan.steps.len();
        queue.planned(&key, &plan.report);
        let revision = view.revision.next();
        for change in plan.all_changes() {
            view.apply(change, revision);
        }
    }
    Ok(placed)
}

fn fleet() -> anyhow::Result<(View, Live)> {
    let (mut view, mut live) = (View::default(), Live::default());
    for n in 0..HOSTS {
        let record = HostRecord {
            meta: Some(Meta {
                uid: format!("host-{n:05}"),
                name: format!("host-{n:05}"),
                labels: BTreeMap::from([("zone".to_owned(), format!("z{}", n % 10))]),
                ..Meta::default()
            }),
            facts: Some(api::HostFacts {
                arch: "amd64".to_owned(),
                os: "linux".to_owned(),
                engine_available: true,
                container_network_reachable: true,
                capacity: Some(api::Resources {
                    cpu_millis: 8_000,
                    memory_bytes: 16 << 30,
                    gpu_memory_bytes: 0,
                }),
                ..api::HostFacts::default()
            }),
            ..HostRecord::default()
        };
        let host = Host::new(record)?;
        live.edit_host(&host.uid, |h| h.presence = Presence::Present);
        view.apply(&Change::PutHost(Arc::new(host)), view.revision.next());
    }
    Ok((view, live))
}

fn apply(view: &mut View, n: usize, replicas: u32) -> anyhow::Result<()> {
    let digest = berth_proto::ids::Digest::of(b"image");
    let spec = api::DeploymentSpec {
        source: Some(api::deployment_spec::Source::Image("image".to_owned())),
        replicas: Some(replicas),
        resources: Some(api::Resources {
            cpu_millis: 100,
            memory_bytes: 128 << 20,
            gpu_memory_bytes: 0,
        }),
        ..api::DeploymentSpec::default()
    };
    let wanted = Wanted {
        name: format!("app-{n}").parse()?,
        namespace: berth_proto::ids::Namespace::default(),
        labels: BTreeMap::new(),
        spec,
        resolved: ResolvedSource {
            image: ResolvedImage {
                registry: String::new(),
                repository: "image".to_owned(),
                digest: digest.clone(),
                platforms: vec![PlatformImage {
                    arch: "amd64".to_owned(),
                    os: "linux".to_owned(),
                    manifest_digest: digest.clone(),
                    config_digest: digest,
                    size_bytes: 1,
                }],
            },
            artifact: None,
            model_version: None,
        },
        resolved_words: "image".to_owned(),
    };
    let asked = Asked { actor: "user/bench", now: NOW.wall };
    let decision = decide::apply(view, &wanted, format!("d-{n:05}").parse()?, &asked)?;
    let revision = view.revision.next();
    for change in &decision.proposal.changes {
        view.apply(change, revision);
    }
    Ok(())
}
