//! Whoever reaches a door may be anybody: what he holds, floods or leaves unread costs a bounded amount,
//! and others are served meanwhile.

use crate::load;
use anyhow::{Context as _, Result, ensure};
use berth_proto::agent::JoinRequest;
use berth_proto::agent::join_service_client::JoinServiceClient;
use berth_proto::api::event_service_client::EventServiceClient;
use berth_proto::api::host_service_client::HostServiceClient;
use berth_proto::api::{LabelHostRequest, ListHostsRequest, WatchEventsRequest};
use berth_proto::tls::{self, ALPN_H2, Credentials, Trusted};
use berth_tests::{Cluster, PATIENCE, eventually};
use futures_util::StreamExt as _;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};
use tonic::Code;
use tonic::transport::Channel;

/// How long one connection may take while thousands are being made.
const CONNECT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// Bytes of memory of the server: now, and at the most so far.
fn memory(cluster: &mut Cluster) -> Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", cluster.server().id()))?;
    let of = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).context("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    };
    Ok((of("VmRSS:")?, of("VmHWM:")?))
}

/// File handles of the server.
fn handles(cluster: &mut Cluster) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", cluster.server().id()))?.count())
}

/// Somebody who asks in the ordinary way is served.
fn others_are_served(cluster: &Cluster) -> Result<()> {
    cluster.berth_ok(&["host", "list", "--request-timeout", "30s"]).map(|_| ())
}

/// TLS as the first admin, with a certificate or without.
fn client(cluster: &Cluster, known: bool) -> Result<std::sync::Arc<rustls::ClientConfig>> {
    let text = std::fs::read_to_string(cluster.server_dir().join("admin.toml"))?;
    let config: toml::Table = text.parse()?;
    let context = &config["contexts"]["default"];
    let of = |key: &str| context[key].as_str().unwrap_or_default().to_owned();
    let credentials = Credentials { certificate_pem: of("certificate"), key_pem: of("key") };
    let trusted = Trusted::Roots { pem: of("roots"), cluster: of("cluster").parse()? };
    Ok(tls::client_config(trusted, known.then_some(&credentials), &[ALPN_H2], None)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let mut cluster = Cluster::start().unwrap();
    let (before, _) = memory(&mut cluster).unwrap();
    let mut crowd: Vec<TcpStream> = Vec::new();
    for door in ["control", "registry", "gateway", "page"] {
        let door = cluster.door(door).unwrap().parse().unwrap();
        for _ in 0..2_000 {
            let socket = TcpSocket::new_v4().unwrap();
            // From one address that is not ours.
            socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
            crowd.push(socket.connect(door).await.unwrap());
        }
        others_are_served(&cluster).unwrap();
    }
    let (now, _) = memory(&mut cluster).unwrap();
    assert!(now < before + 64 * MIB, "{} MiB more", (now - before) / MIB);
    // Whoever was let in is sent away after a while, with nobody asking.
    eventually("no silent connection is held any more", PATIENCE, || {
        let held = handles(&mut cluster)?;
        ensure!(held < 200, "{held} handles are open");
        Ok(())
    })
    .unwrap();
    drop(crowd);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_connections_cost_a_bounded_amount_each_and_leave_nothing() {
    const CONNECTIONS: usize = 10_000;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let enough = limit.is_none_or(|limit| limit > CONNECTIONS as u64 + 1_000);
    assert!(enough, "this test needs {CONNECTIONS} file handles and more; the limit is {limit:?}");
    let most = rustix::process::Rlimit { current: limit, maximum: limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most).unwrap();
    let mut cluster = Cluster::start().unwrap();
    let (door, tls) = (cluster.door("control").unwrap(), client(&cluster, true).unwrap());
    let ask = |tls| {
        let door = door.clone();
        async move {
            let channel = tls::channel(&door, tls, CONNECT, |e| e).await?;
            let mut hosts = HostServiceClient::new(channel);
            hosts.list_hosts(ListHostsRequest::default()).await?;
            anyhow::Ok(hosts)
        }
    };
    let first = ask(tls.clone()).await.unwrap();
    let ((before, _), open) = (memory(&mut cluster).unwrap(), handles(&mut cluster).unwrap());
    let all: Vec<Result<HostServiceClient<Channel>>> = futures_util::stream::iter(0..CONNECTIONS)
        .map(|_| ask(tls.clone()))
        .buffer_unordered(64)
        .collect()
        .await;
    let all: Vec<_> = all.into_iter().collect::<Result<_>>().unwrap();
    let held = handles(&mut cluster).unwrap();
    assert!(held >= open + CONNECTIONS, "{held} handles: some were sent away");
    others_are_served(&cluster).unwrap();
    let (now, _) = memory(&mut cluster).unwrap();
    let each = (now - before) / CONNECTIONS as u64;
    println!("{CONNECTIONS} connections: {} KiB each, {} MiB in all", each / 1024, now / MIB);
    assert!(each < 128 * 1024, "{each} bytes a connection");
    drop(all);
    eventually("their handles are given back", PATIENCE, || {
        let held = handles(&mut cluster)?;
        ensure!(held <= open + 10, "{held} handles are open, {open} were before");
        Ok(())
    })
    .unwrap();
    drop(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_joins_is_refused_and_fills_neither_memory_nor_ledger() {
    let mut cluster = Cluster::start().unwrap();
    let (door, tls) = (cluster.door("control").unwrap(), client(&cluster, false).unwrap());
    let (before, _) = memory(&mut cluster).unwrap();
    let channel = tls::channel(&door, tls, CONNECT, |e| e).await.unwrap();
    let (_, csr_pem) = tls::key_and_request().unwrap();
    let revision = |cluster: &Cluster| {
        cluster.berth_json(&["server", "info"]).map(|info| info["revision"].clone()).unwrap()
    };
    let begun = revision(&cluster);
    let join = |n: usize| {
        let mut service = JoinServiceClient::new(channel.clone());
        let request = JoinRequest {
            token: format!("berth-join-v1.{n:08}.{}.{}", "0".repeat(43), "0".repeat(64)),
            name: format!("host-{n}"),
            csr_pem: csr_pem.clone(),
            request_id: n.to_string(),
            ..JoinRequest::default()
        };
        async move { service.join(request).await.unwrap_err().code() }
    };
    let codes: Vec<Code> =
        futures_util::stream::iter(0..5_000).map(join).buffer_unordered(200).collect().await;
    let refused = [Code::Unauthenticated, Code::PermissionDenied, Code::ResourceExhausted];
    assert!(codes.iter().all(|code| refused.contains(code)), "{codes:?}");
    others_are_served(&cluster).unwrap();
    let (now, _) = memory(&mut cluster).unwrap();
    assert!(now < before + 64 * MIB, "{} MiB more", now.saturating_sub(before) / MIB);
    assert_eq!(revision(&cluster), begun, "what is refused is not written");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_nobody_reads_hold_a_bounded_amount() {
    let mut cluster = Cluster::start().unwrap();
    load::join(&cluster).unwrap();
    let mut hosts = load::connect(&cluster).await.unwrap();
    let (door, tls) = (cluster.door("control").unwrap(), client(&cluster, true).unwrap());
    let channel = tls::channel(&door, tls, CONNECT, |e| e).await.unwrap();
    let mut unread = Vec::new();
    for _ in 0..200 {
        let mut events = EventServiceClient::new(channel.clone());
        let request = WatchEventsRequest { follow: true, ..Default::default() };
        unread.push(events.watch_events(request).await.unwrap().into_inner());
    }
    let (before, _) = memory(&mut cluster).unwrap();
    let value = "x".repeat(63);
    for n in 0..2_000 {
        let set = [("k".to_owned(), format!("{n}-{}", &value[..50]))].into();
        let request = LabelHostRequest { name: load::HOST.to_owned(), set, ..Default::default() };
        hosts.label_host(request).await.unwrap();
    }
    others_are_served(&cluster).unwrap();
    let (now, _) = memory(&mut cluster).unwrap();
    assert!(now < before + 128 * MIB, "{} MiB more", now.saturating_sub(before) / MIB);
    // Whoever begins to read again is either told all that came, or that he has missed some.
    let first = unread[0].next().await.expect("something is there");
    assert!(first.is_ok() || first.unwrap_err().code() == Code::DataLoss);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_larger_than_its_bound_is_refused_and_the_connection_serves_on() {
    let cluster = Cluster::start().unwrap();
    let mut hosts = load::connect(&cluster).await.unwrap();
    let set = [("k".to_owned(), "x".repeat(5 << 20))].into();
    let request = LabelHostRequest { name: load::HOST.to_owned(), set, ..Default::default() };
    let refused = hosts.label_host(request).await.unwrap_err();
    assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused:?}");
    hosts.list_hosts(ListHostsRequest::default()).await.unwrap();
}
