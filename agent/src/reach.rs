//! Whether the agent reaches its containers' addresses.
//!
//! Health checks by network and everything that is dialled for the gateway go from the agent straight
//! to a container's address. That works where the agent stands in the network of the engine's
//! bridges, and nowhere else: not beside an engine in a virtual machine or one without root, whose
//! bridges are in a network of their own, and not in a container of its own without the host's
//! network. It is found out without starting anything: where the bridge's own address is one of this
//! machine's, its containers are one hop away; where it is not, the addresses of those that run are
//! tried.

use crate::engine::{ContainerState, Engine, EngineError};
use berth_proto::ids::ClusterUid;
use futures_util::future::join_all;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;
use tokio::net::TcpStream;

/// A container on this machine answers or refuses within microseconds.
const TRY: Duration = Duration::from_secs(2);
/// Containers tried at most: one that answers is enough, and of so many not all are deaf by chance.
const TRIED: usize = 3;
/// A port nothing listens on: being refused is an answer of the container's own kernel.
const PORT: u16 = 1;

/// Looks, and makes nothing. `None`: it cannot be told, because the engine does not answer, there is no
/// bridge yet, or the engine makes a bridge only with its first container.
pub async fn look(engine: &dyn Engine, cluster: &ClusterUid, bridge: &str) -> Option<bool> {
    let found: Result<Option<bool>, EngineError> = async {
        let gateway = engine.gateway(bridge).await?.map(is_local);
        if gateway == Some(true) {
            return Ok(Some(true));
        }
        let running = engine.observe(cluster).await?.into_iter().filter_map(|c| match c.state {
            ContainerState::Running { ip, paused: false, .. } => ip,
            ContainerState::Running { .. }
            | ContainerState::Created
            | ContainerState::Exited { .. }
            | ContainerState::Removing => None,
        });
        let tried =
            join_all(running.take(TRIED).map(|ip| answers(SocketAddr::new(ip, PORT)))).await;
        let lazy = engine.info().await?.makes_bridges_late();
        Ok(judge(gateway, &tried, lazy))
    }
    .await;
    found.unwrap_or_else(|error| {
        tracing::debug!(%error, "whether container addresses are reached cannot be told now");
        None
    })
}

/// What was found comes to this.
fn judge(gateway: Option<bool>, tried: &[bool], lazy: bool) -> Option<bool> {
    match (gateway, tried) {
        (Some(true), _) => Some(true),
        (Some(false) | None, [_, ..]) => Some(tried.contains(&true)),
        (Some(false), []) if !lazy => Some(false),
        (Some(false) | None, []) => None,
    }
}

/// Whether an address is one of this machine's: only then can it be bound to.
fn is_local(address: IpAddr) -> bool {
    match UdpSocket::bind((address, 0)) {
        Ok(_) => true,
        Err(error) => error.kind() != ErrorKind::AddrNotAvailable,
    }
}

async fn answers(address: SocketAddr) -> bool {
    match tokio::time::timeout(TRY, TcpStream::connect(address)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::FakeEngine;

    #[test]
    fn a_bridge_of_this_machine_or_a_container_that_answers_is_reached() {
        let cases = [
            (Some(true), &[][..], false, Some(true)),
            (Some(true), &[false], false, Some(true)),
            (Some(false), &[false, true], false, Some(true)),
            (Some(false), &[false, false], false, Some(false)),
            (Some(false), &[], false, Some(false)),
            // Its bridge comes with the first container: nothing is known before.
            (Some(false), &[], true, None),
            (Some(false), &[false], true, Some(false)),
            (None, &[], false, None),
            (None, &[true], false, Some(true)),
        ];
        for (gateway, tried, lazy, expected) in cases {
            assert_eq!(judge(gateway, tried, lazy), expected, "{gateway:?} {tried:?} {lazy}");
        }
    }

    #[tokio::test]
    async fn being_refused_is_an_answer_and_a_foreign_address_is_not_ours() {
        assert!(is_local([127, 0, 0, 1].into()));
        // For documentation: no machine has it.
        assert!(!is_local([192, 0, 2, 1].into()));
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(answers(closed).await);
    }

    #[tokio::test]
    async fn an_engine_that_is_away_says_nothing() {
        let engine = FakeEngine::new();
        let cluster = "c".parse().unwrap();
        engine.set_gateway(Some([127, 0, 0, 1].into()));
        assert_eq!(look(&engine, &cluster, "berth-c").await, Some(true));
        engine.set_gateway(Some([192, 0, 2, 1].into()));
        assert_eq!(look(&engine, &cluster, "berth-c").await, Some(false));
        engine.go_away();
        assert_eq!(look(&engine, &cluster, "berth-c").await, None);
    }
}
