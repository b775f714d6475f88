//! Writers that keep a book of what was acknowledged, for tests that take the server or its disk away.

use anyhow::{Context as _, Result, ensure};
use berth_proto::api::host_service_client::HostServiceClient;
use berth_proto::api::{
    CreateJoinTokenRequest, GetHostRequest, LabelHostRequest, ListJoinTokensRequest, Page,
};
use berth_proto::tls::{self, ALPN_H2, Credentials, Trusted};
use berth_tests::{Cluster, PATIENCE, command};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// The host whose labels are written.
pub const HOST: &str = "edge";
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// What was acknowledged, and what was tried beyond that.
#[derive(Debug, Default)]
pub struct Book {
    /// Public parts of tokens that were made.
    tokens: BTreeSet<String>,
    /// Of each writer's counter: the newest that was acknowledged, and the newest that was sent.
    counters: BTreeMap<String, (u64, u64)>,
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Writes that were refused for lack of room.
    pub refused: usize,
}

/// A book that writers share.
pub type Shared = Arc<Mutex<Book>>;

fn held(book: &Shared) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Lets a host join that no agent runs for.
pub fn join(cluster: &Cluster) -> Result<()> {
    let token = cluster.berth_json(&["host", "token", "create"])?;
    let token = token["secret"].as_str().context("no secret in the answer")?.to_owned();
    let output = command("berth-agent")?
        .args(["join", "--server", &cluster.door("control")?, "--name", HOST, "--token", &token])
        .arg("--data-dir")
        .arg(cluster.agent_dir(HOST))
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A connection as the first admin.
pub async fn channel(cluster: &Cluster) -> Result<Channel> {
    let text = std::fs::read_to_string(cluster.server_dir().join("admin.toml"))?;
    let config: toml::Table = text.parse()?;
    let context = &config["contexts"]["default"];
    let of = |key: &str| context[key].as_str().unwrap_or_default().to_owned();
    let credentials = Credentials { certificate_pem: of("certificate"), key_pem: of("key") };
    let trusted = Trusted::Roots { pem: of("roots"), cluster: of("cluster").parse()? };
    let tls = tls::client_config(trusted, Some(&credentials), &[ALPN_H2], None)?;
    Ok(tls::channel(&cluster.door("control")?, tls, CONNECT, |e| e).await?)
}

/// The same, for hosts.
pub async fn connect(cluster: &Cluster) -> Result<HostServiceClient<Channel>> {
    Ok(HostServiceClient::new(channel(cluster).await?))
}

/// One token and one label; whatever is acknowledged is in the book before the next is sent.
pub async fn write(
    hosts: &mut HostServiceClient<Channel>,
    writer: &str,
    book: &Shared,
) -> Result<(), Status> {
    let made = hosts.create_join_token(CreateJoinTokenRequest::default()).await?.into_inner();
    {
        let mut book = held(book);
        book.tokens.insert(made.token.unwrap_or_default().id);
        book.acknowledged += 1;
    }
    let next = {
        let mut book = held(book);
        let counter = book.counters.entry(writer.to_owned()).or_default();
        counter.1 += 1;
        counter.1
    };
    let set = [(writer.to_owned(), next.to_string())].into();
    let request = LabelHostRequest { name: HOST.to_owned(), set, ..Default::default() };
    hosts.label_host(request).await?;
    let mut book = held(book);
    book.counters.entry(writer.to_owned()).or_default().0 = next;
    book.acknowledged += 1;
    Ok(())
}

/// So many writers at once, until the server is gone; conflicts and a full disk are no end.
pub async fn writers(cluster: &Cluster, number: usize, book: &Shared) -> Result<Vec<Writer>> {
    let mut all = Vec::new();
    for n in 0..number {
        let mut hosts = connect(cluster).await?;
        let book = Arc::clone(book);
        all.push(tokio::spawn(async move {
            let name = format!("writer-{n}");
            loop {
                match write(&mut hosts, &name, &book).await {
                    Ok(()) => {}
                    Err(status) if status.code() == Code::Aborted => {}
                    Err(status) if status.code() == Code::ResourceExhausted => {
                        held(&book).refused += 1;
                    }
                    Err(status) => return status,
                }
            }
        }));
    }
    Ok(all)
}

/// A writer; ends with what ended it.
pub type Writer = tokio::task::JoinHandle<Status>;

/// Polls the book until this holds.
pub async fn book_says(book: &Shared, holds: impl Fn(&Book) -> bool) -> Result<()> {
    let polled = async {
        while !holds(&held(book)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let held_in_time = tokio::time::timeout(PATIENCE, polled).await;
    held_in_time.with_context(|| format!("the book stays at {:?}", held(book)))
}

/// All that was acknowledged is there, and no counter is beyond what was sent.
pub async fn nothing_is_lost(cluster: &Cluster, book: &Shared) -> Result<()> {
    let mut hosts = connect(cluster).await?;
    let (mut there, mut token) = (BTreeSet::new(), String::new());
    loop {
        let page = Page { page_size: 1000, page_token: token, ..Page::default() };
        let request = ListJoinTokensRequest { page: Some(page) };
        let answer = hosts.list_join_tokens(request).await?.into_inner();
        there.extend(answer.tokens.into_iter().map(|t| t.id));
        token = answer.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let host = hosts.get_host(GetHostRequest { name: HOST.to_owned() }).await?.into_inner();
    let labels = host.host.and_then(|h| h.meta).unwrap_or_default().labels;
    let book = held(book);
    let lost: Vec<&String> = book.tokens.difference(&there).collect();
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    for (writer, (acknowledged, sent)) in &book.counters {
        let found: u64 = labels.get(writer).map_or(Ok(0), |text| text.parse())?;
        ensure!(
            (*acknowledged..=*sent).contains(&found),
            "{writer} is at {found}; {acknowledged} was acknowledged, {sent} was sent"
        );
    }
    Ok(())
}
