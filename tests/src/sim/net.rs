//! Connections: streams in order, that are slow, half-open, doubled or gone.

use super::events::{Event, Life, LinkId, NodeId};
use super::world::World;
use berth_agent_core::session::Ended;
use berth_proto::agent::session_response::Item;
use berth_proto::agent::{SessionRequest, SessionResponse};
use prost::Message as _;

/// A dial over a dead path ends after so long.
const CONNECT_MS: u64 = 15_000;

/// One connection of an agent.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) node: NodeId,
    pub(super) agent_life: Life,
    pub(super) server_life: Life,
    /// Its end at the agent is open; the same at the server.
    pub(super) agent_open: bool,
    pub(super) server_open: bool,
    /// Something was swallowed: nothing later gets through.
    up_dead: bool,
    down_dead: bool,
    up_last: u64,
    down_last: u64,
    /// A message of it came twice.
    pub(super) doubled: bool,
    /// A set was begun that the server has not been answered.
    pub(super) unanswered: bool,
    /// When its agent's disk did not take a set.
    pub(super) not_durable: Option<u64>,
    /// The messages of the newest set that was sent whole, and of the one that is being sent.
    last_set: Vec<SessionResponse>,
    this_set: Vec<SessionResponse>,
}

/// What befalls the messages of a machine.
#[derive(Debug, Default)]
pub(super) struct Net {
    pub(super) up_blocked_until: u64,
    pub(super) down_blocked_until: u64,
    pub(super) slow_by_ms: u64,
    pub(super) slow_until: u64,
    pub(super) doubles: u8,
}

impl Net {
    /// Whoever asks for an answer gets none.
    pub(super) fn is_blocked(&self, now: u64) -> bool {
        now < self.up_blocked_until.max(self.down_blocked_until)
    }
}

impl Link {
    /// Keeps the messages of sets; with the end of one, those of the one before it.
    fn remember(&mut self, message: &SessionResponse) -> Vec<SessionResponse> {
        match &message.item {
            Some(Item::SetBegin(_)) => self.this_set = vec![message.clone()],
            Some(Item::SetPage(_)) => self.this_set.push(message.clone()),
            Some(Item::SetEnd(_)) => {
                self.this_set.push(message.clone());
                let whole = std::mem::take(&mut self.this_set);
                return std::mem::replace(&mut self.last_set, whole);
            }
            _ => {}
        }
        Vec::new()
    }
}

impl World<'_> {
    fn travel_ms(&mut self, node: NodeId) -> u64 {
        let (now, node) = (self.now, &mut self.nodes[node]);
        let slow = if now < node.net.slow_until { node.net.slow_by_ms } else { 0 };
        slow + node.rng.u64(0..4) + if node.rng.u8(0..32) == 0 { node.rng.u64(0..400) } else { 0 }
    }

    /// The agent dials.
    pub(super) fn dial(&mut self, node: NodeId, life: Life) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let Some(agent) = held.agent.as_mut().filter(|_| held.life == life) else { return };
        if held.disk.removed || agent.session.is_some() || agent.dial_at != Some(now) {
            return;
        }
        agent.dial_at = None;
        let blocked = now < held.net.up_blocked_until.max(held.net.down_blocked_until);
        let nobody = !self.server.is_up();
        if blocked || nobody {
            let at = now + if blocked { CONNECT_MS } else { 5 };
            return self.events.push(at, Event::NotReached { node, life });
        }
        let link = self.links.len();
        let at = now + 2 * self.travel_ms(node).min(CONNECT_MS / 2);
        self.links.push(Link {
            node,
            agent_life: life,
            server_life: self.server.life,
            agent_open: true,
            server_open: true,
            up_dead: false,
            down_dead: false,
            up_last: at,
            down_last: at,
            doubled: false,
            unanswered: false,
            not_durable: None,
            last_set: Vec::new(),
            this_set: Vec::new(),
        });
        self.events.push(at, Event::Accept { link });
    }

    pub(super) fn not_reached(&mut self, node: NodeId, life: Life) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let Some(agent) = held.agent.as_mut().filter(|_| held.life == life) else { return };
        let wait_ms = agent.dialling.ended(Ended::Lost, held.rng.u64(0..1000));
        let at = now + wait_ms;
        agent.dial_at = Some(at);
        self.events.push(at, Event::Dial { node, life });
        self.check_dials(node, wait_ms, false);
    }

    /// A dial has reached the server, and the agent says hello.
    pub(super) fn accept(&mut self, link: LinkId) {
        let Link { node, agent_life, server_life, .. } = self.links[link];
        if self.nodes[node].life != agent_life || self.nodes[node].agent.is_none() {
            return;
        }
        if !self.server.is_up() || self.server.life != server_life {
            return self.not_reached(node, agent_life);
        }
        self.open_session(link);
        self.begin_session(node, link);
    }

    pub(super) fn send_up(&mut self, link: LinkId, message: Box<SessionRequest>) {
        let node = self.links[link].node;
        let blocked = self.now < self.nodes[node].net.up_blocked_until;
        let travel = self.travel_ms(node);
        let held = &mut self.links[link];
        held.up_dead |= blocked;
        if held.up_dead || !held.server_open {
            return;
        }
        held.up_last = held.up_last.max(self.now + travel);
        if self.nodes[node].net.doubles > 0 {
            self.nodes[node].net.doubles -= 1;
            held.doubled = true;
            self.events.push(held.up_last, Event::Up { link, message: message.clone() });
        }
        self.events.push(held.up_last, Event::Up { link, message });
    }

    pub(super) fn send_down(&mut self, link: LinkId, message: Box<SessionResponse>) {
        let node = self.links[link].node;
        let blocked = self.now < self.nodes[node].net.down_blocked_until;
        let travel = self.travel_ms(node);
        let held = &mut self.links[link];
        held.down_dead |= blocked;
        if held.down_dead || !held.agent_open {
            return;
        }
        held.down_last = held.down_last.max(self.now + travel);
        if self.nodes[node].net.doubles > 0 {
            self.nodes[node].net.doubles -= 1;
            held.doubled = true;
            self.events.push(held.down_last, Event::Down { link, message: message.clone() });
        }
        let (at, again) = (held.down_last, held.remember(&message));
        let doubles = &mut self.nodes[node].net.doubles;
        let again = if *doubles > 0 { again } else { Vec::new() };
        self.events.push(at, Event::Down { link, message });
        if !again.is_empty() {
            *doubles -= 1;
            self.links[link].doubled = true;
        }
        for message in again {
            self.events.push(at, Event::Down { link, message: Box::new(message) });
        }
    }

    /// The agent's end is closed.
    pub(super) fn close_up(&mut self, link: LinkId) {
        let node = self.links[link].node;
        let blocked = self.now < self.nodes[node].net.up_blocked_until;
        let travel = self.travel_ms(node);
        let held = &mut self.links[link];
        if !std::mem::take(&mut held.agent_open) || held.up_dead || blocked {
            return;
        }
        held.up_last = held.up_last.max(self.now + travel);
        self.events.push(held.up_last, Event::UpClosed { link });
    }

    /// The server's end is closed.
    pub(super) fn close_down(&mut self, link: LinkId, how: Ended) {
        let node = self.links[link].node;
        let blocked = self.now < self.nodes[node].net.down_blocked_until;
        let travel = self.travel_ms(node);
        let held = &mut self.links[link];
        if !std::mem::take(&mut held.server_open) || held.down_dead || blocked {
            return;
        }
        held.down_last = held.down_last.max(self.now + travel);
        self.events.push(held.down_last, Event::DownClosed { link, how });
    }

    /// The connection breaks: what is under way is lost, both ends see it soon.
    pub(super) fn cut(&mut self, node: NodeId) {
        let Some(link) = self.link_of(node) else { return };
        let (at, held) = (self.now + 1, &mut self.links[link]);
        held.up_dead = true;
        held.down_dead = true;
        let how = Ended::Lost;
        self.events.push(at, Event::UpClosed { link });
        self.events.push(at, Event::DownClosed { link, how });
    }

    pub(super) fn link_of(&self, node: NodeId) -> Option<LinkId> {
        Some(self.nodes[node].agent.as_ref()?.session.as_ref()?.link)
    }

    /// A message comes in at the server.
    pub(super) fn up(&mut self, link: LinkId, message: Box<SessionRequest>) {
        let held = &self.links[link];
        if held.server_open && held.server_life == self.server.life {
            let message = if self.script.wire { self.rewrite(message) } else { message };
            self.server_input(link, berth_server_core::session::Input::Message(message));
        }
    }

    /// A message comes in at the agent.
    pub(super) fn down(&mut self, link: LinkId, message: Box<SessionResponse>) {
        let node = self.links[link].node;
        if self.links[link].agent_open && self.link_of(node) == Some(link) {
            let message = if self.script.wire { self.rewrite(message) } else { message };
            self.session_input(node, berth_agent_core::session::Input::Message(message));
        }
    }

    /// Through its bytes.
    fn rewrite<M: prost::Message + Default + PartialEq>(&mut self, message: Box<M>) -> Box<M> {
        let bytes = message.encode_to_vec();
        if bytes.len() > 1024 * 1024 {
            self.broke(format!("a message has {} bytes", bytes.len()));
        }
        match M::decode(bytes.as_slice()) {
            Ok(read) if read == *message => Box::new(read),
            _ => {
                self.broke("a message is another after it was encoded and read".to_owned());
                message
            }
        }
    }
}
