//! Both ends of a session take whatever the other end says, in any order, and answer within bounds.
#![no_main]

use berth_agent_core::session as agent_end;
use berth_proto::agent::{Hello, SessionRequest, SessionResponse, Trust};
use berth_proto::ids::{Epoch, Mono, Now, Wall};
use berth_server_core::session as server_end;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn terms() -> server_end::Terms {
    server_end::Terms {
        epoch: Epoch(7),
        cluster: "c".into(),
        ping_interval_ms: 10_000,
        idle_timeout_ms: 30_000,
        status_interval_ms: 100,
        reconnect_window_ms: 1_000,
        version: "0".into(),
        features: vec![],
        trust: Trust::default(),
    }
}

/// One answer of a step may hold a whole set in pages; of what a stranger says it holds little.
const MOST_EFFECTS: usize = 1_000;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let mut now = Now { mono: Mono(1), wall: Wall(1_000_000) };
    let mut server = server_end::Session::new("h".parse().unwrap(), terms(), now.mono);
    let hello = Hello { host_uid: "h".into(), ..Hello::default() };
    let (mut agent, _) =
        agent_end::Session::begin(hello, berth_agent_core::ledger::Wanted::default(), 0, now.mono);
    while let Some((head, tail)) = rest.split_at_checked(3) {
        let length = usize::from(u16::from_le_bytes([head[0], head[1]])).min(tail.len());
        let (message, tail) = tail.split_at(length);
        rest = tail;
        let passed = u64::from(head[2]) * 20;
        now = Now {
            mono: Mono(now.mono.0 + passed),
            wall: Wall(now.wall.0 + i64::try_from(passed).unwrap()),
        };
        let effects = if first % 2 == 0 {
            let Ok(message) = SessionRequest::decode(message) else { continue };
            server.step(now, server_end::Input::Message(Box::new(message))).len()
                + server.step(now, server_end::Input::Registered(None)).len()
                + server.step(now, server_end::Input::Tick).len()
        } else {
            let Ok(message) = SessionResponse::decode(message) else { continue };
            agent.step(now, agent_end::Input::Message(Box::new(message))).len()
                + agent.step(now, agent_end::Input::Tick).len()
        };
        assert!(effects <= MOST_EFFECTS, "{effects}");
    }
});
