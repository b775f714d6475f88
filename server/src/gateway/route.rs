//! Which replicas serve a deployment, and which of them is asked next.
//!
//! The table is replaced as a whole whenever placement or readiness change; a request works on the
//! backend it has looked up. Outstanding requests are counted per replica over replacements of the
//! table, by the replica's uid.

use arc_swap::ArcSwap;
use berth_proto::ids::{HostUid, ReplicaUid};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

/// One replica that may be asked.
#[derive(Debug, Clone)]
pub struct Target {
    /// The replica.
    pub replica: ReplicaUid,
    /// Its host.
    pub host: HostUid,
    /// The model version it serves; empty for images.
    pub version: String,
    /// The model's name as the replica knows it.
    pub served: String,
    /// Requests under way to it.
    outstanding: Arc<AtomicUsize>,
}

/// All ready replicas of a deployment.
#[derive(Debug, Clone, Default)]
pub struct Backend {
    /// Namespace.
    pub namespace: String,
    /// Deployment's name, which is the model's name for callers.
    pub deployment: String,
    /// Name of the port for HTTP; gRPC goes to the port named `grpc` when there is one.
    pub http_port: String,
    /// Name of the port for gRPC.
    pub grpc_port: String,
    /// Ready replicas, in order of uid.
    pub targets: Vec<Target>,
    /// When a replica was ready last.
    pub ready_at: Option<Instant>,
    /// Places for its requests under way.
    pub places: Places,
}

/// Requests under way to one deployment at once; more wait. One that hangs keeps each of its places for
/// as long as a request may take: with a share of all places it cannot take them from the others.
pub const REQUESTS_OF_ONE: usize = 512;

/// A deployment's share of the places for requests under way, over replacements of the table.
#[derive(Debug, Clone)]
pub struct Places(pub Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(REQUESTS_OF_ONE)))
    }
}

/// A deployment without a ready replica for longer than this is down, not in the middle of a change:
/// whoever asks is told at once instead of being kept waiting.
const LATELY: Duration = Duration::from_secs(60);

/// What a replica is told to the table as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The replica.
    pub replica: ReplicaUid,
    /// Its host.
    pub host: HostUid,
    /// The model version it serves.
    pub version: String,
    /// The model's name as the replica knows it: its own release says it.
    pub served: String,
}

/// The table.
#[derive(Debug)]
pub struct Routes {
    table: ArcSwap<BTreeMap<String, Arc<Backend>>>,
    start: AtomicUsize,
    begun: Instant,
    changes: watch::Sender<()>,
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            table: ArcSwap::default(),
            start: AtomicUsize::new(0),
            begun: Instant::now(),
            changes: watch::channel(()).0,
        }
    }
}

/// A replica chosen for a request; counts as outstanding until it is dropped.
#[derive(Debug)]
pub struct Chosen {
    /// Which.
    pub target: Target,
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.target.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The name a deployment has for callers: its own in the namespace `default`, else
/// `<namespace>.<name>` (neither can hold a dot).
#[must_use]
pub fn model_name(namespace: &str, deployment: &str) -> String {
    if namespace == "default" { deployment.to_owned() } else { format!("{namespace}.{deployment}") }
}

impl Routes {
    /// Replaces the table. `backends` give the ready replicas of each deployment.
    pub fn replace(&self, backends: impl IntoIterator<Item = (Backend, Vec<Ready>)>) {
        let old = self.table.load();
        let table = backends
            .into_iter()
            .map(|(mut backend, ready)| {
                let name = model_name(&backend.namespace, &backend.deployment);
                let before = old.get(&name);
                let held = before.map_or(&[][..], |b| &b.targets);
                if let Some(before) = before {
                    backend.places.clone_from(&before.places);
                }
                let mut ready = ready;
                ready.sort_unstable_by(|a, b| a.replica.cmp(&b.replica));
                backend.targets = ready
                    .into_iter()
                    .map(|ready| {
                        let at = held.binary_search_by(|t| t.replica.cmp(&ready.replica));
                        let known = at.ok().map(|at| Arc::clone(&held[at].outstanding));
                        Target {
                            replica: ready.replica,
                            host: ready.host,
                            version: ready.version,
                            served: ready.served,
                            outstanding: known.unwrap_or_default(),
                        }
                    })
                    .collect();
                backend.ready_at = if backend.targets.is_empty() {
                    before.and_then(|b| b.ready_at)
                } else {
                    Some(Instant::now())
                };
                (name, Arc::new(backend))
            })
            .collect();
        self.table.store(Arc::new(table));
        self.changes.send_replace(());
    }

    /// Whether a replica of it was ready a moment ago, or may have been before this server's start.
    #[must_use]
    pub fn was_ready_lately(&self, backend: &Backend) -> bool {
        backend.ready_at.unwrap_or(self.begun).elapsed() < LATELY
    }

    /// Tells when the table was replaced.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// The backend of a deployment, by the name callers use.
    #[must_use]
    pub fn backend(&self, model: &str) -> Option<Arc<Backend>> {
        self.table.load().get(model).cloned()
    }

    /// Whether a replica may still be asked.
    #[must_use]
    pub fn serves(&self, model: &str, replica: &ReplicaUid) -> bool {
        self.backend(model)
            .is_some_and(|b| b.targets.binary_search_by(|t| t.replica.cmp(replica)).is_ok())
    }

    /// The replica with the fewest requests outstanding, of `version` when that is not empty, but
    /// none of `tried`. Among equals the next one in turn.
    #[must_use]
    pub fn choose(&self, model: &str, version: &str, tried: &[ReplicaUid]) -> Option<Chosen> {
        let backend = self.backend(model)?;
        let fits: Vec<&Target> = backend
            .targets
            .iter()
            .filter(|t| version.is_empty() || t.version == version)
            .filter(|t| !tried.contains(&t.replica))
            .collect();
        let turn = self.start.fetch_add(1, Ordering::Relaxed);
        let target = (0..fits.len())
            .map(|i| fits[(turn + i) % fits.len()])
            .min_by_key(|t| t.outstanding.load(Ordering::Relaxed))?
            .clone();
        target.outstanding.fetch_add(1, Ordering::Relaxed);
        Some(Chosen { target })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(n: u32, version: &str) -> Ready {
        Ready {
            replica: format!("r{n}").parse().unwrap(),
            host: format!("h{n}").parse().unwrap(),
            version: version.into(),
            served: "iris".into(),
        }
    }

    fn backend() -> Backend {
        Backend { namespace: "default".into(), deployment: "iris".into(), ..Backend::default() }
    }

    #[test]
    fn the_replica_with_the_fewest_outstanding_is_asked() {
        let routes = Routes::default();
        routes.replace([(backend(), vec![ready(1, "1"), ready(2, "1"), ready(3, "1")])]);
        let held: Vec<Chosen> = (0..6).map(|_| routes.choose("iris", "", &[]).unwrap()).collect();
        let mut count = BTreeMap::new();
        for chosen in &held {
            *count.entry(chosen.target.replica.to_string()).or_insert(0) += 1;
        }
        assert_eq!(count.values().copied().collect::<Vec<_>>(), [2, 2, 2]);
    }

    #[test]
    fn counts_survive_a_new_table() {
        let routes = Routes::default();
        routes.replace([(backend(), vec![ready(1, "1")])]);
        let held = routes.choose("iris", "", &[]).unwrap();
        routes.replace([(backend(), vec![ready(1, "1"), ready(2, "1")])]);
        for _ in 0..4 {
            assert_eq!(routes.choose("iris", "", &[]).unwrap().target.replica.as_str(), "r2");
        }
        drop(held);
    }

    #[test]
    fn each_replica_keeps_its_own_count_in_whatever_order_a_table_is_given() {
        let routes = Routes::default();
        let all = |order: [u32; 3]| order.map(|n| ready(n, "1")).to_vec();
        routes.replace([(backend(), all([3, 1, 2]))]);
        let tried = ["r1".parse().unwrap(), "r3".parse().unwrap()];
        let held = routes.choose("iris", "", &tried).unwrap();
        routes.replace([(backend(), all([2, 3, 1]))]);
        for target in &routes.backend("iris").unwrap().targets {
            let busy = usize::from(target.replica.as_str() == "r2");
            assert_eq!(target.outstanding.load(Ordering::Relaxed), busy, "{}", target.replica);
            assert!(routes.serves("iris", &target.replica));
        }
        drop(held);
    }

    #[test]
    fn a_version_and_what_was_tried_narrow_the_choice() {
        let routes = Routes::default();
        routes.replace([(backend(), vec![ready(1, "1"), ready(2, "2")])]);
        assert_eq!(routes.choose("iris", "2", &[]).unwrap().target.replica.as_str(), "r2");
        assert!(routes.choose("iris", "3", &[]).is_none());
        let tried = ["r2".parse().unwrap()];
        assert!(routes.choose("iris", "2", &tried).is_none());
        assert!(routes.choose("other", "", &[]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_deployment_is_waited_for_only_while_it_was_ready_lately() {
        let routes = Routes::default();
        let told = |routes: &Routes| routes.was_ready_lately(&routes.backend("iris").unwrap());
        routes.replace([(backend(), vec![])]);
        assert!(told(&routes), "it may have been ready before the server's start");
        tokio::time::advance(LATELY).await;
        assert!(!told(&routes));
        routes.replace([(backend(), vec![ready(1, "1")])]);
        routes.replace([(backend(), vec![])]);
        tokio::time::advance(LATELY / 2).await;
        routes.replace([(backend(), vec![])]);
        assert!(told(&routes));
        tokio::time::advance(LATELY / 2).await;
        assert!(!told(&routes));
    }

    #[test]
    fn other_namespaces_are_told_apart_by_a_dot() {
        assert_eq!(model_name("default", "iris"), "iris");
        assert_eq!(model_name("prod", "iris"), "prod.iris");
    }
}
