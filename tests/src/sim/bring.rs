//! An agent's transfers, driven as `berth-agent` drives them: what a replica's body needs comes blob by
//! blob onto the host's disk, over a connection to the registry that is slow, breaks, or lies.

use super::events::{Event, Life, NodeId};
use super::script::{Moment, Program, Trouble};
use super::specs;
use super::watched::{Watch, Wire};
use super::world::World;
use berth_agent_core::reconcile::{self, Cause, Done, StepId};
use berth_agent_core::transfer::{Blob, Cap, Effect, Failure, Input, Transfer};
use berth_proto::api;
use berth_proto::ids::{Digest, Mono, ReplicaUid};
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;

/// A dial over a dead path ends after so long.
const CONNECT_MS: u64 = 15_000;
/// What a host that has a cap brings at most: enough for what is brought here to come soon.
const CAP_BYTES: NonZeroU64 = NonZeroU64::new(8 << 20).unwrap();
/// What may come at once under the cap, for each transfer.
const BURST_BYTES: u64 = CAP_BYTES.get() / 4;
/// An agent whose transfer nobody wants ends it within this.
const STOPS_MS: u64 = 8_000;
/// What is wanted and was asked for is here within this, once nothing goes wrong any more: one pause of
/// its transfer, one of its step, by a clock that runs slow, and the time it takes. Longer by the silence
/// that ends a connection of which one way is dead: until then it may not be heard that it is not wanted.
const BROUGHT_MS: u64 = 300_000;

/// What is done for a replica's bytes.
#[derive(Debug)]
enum Part {
    /// The list of the blobs.
    Manifest,
    /// A transfer of blobs.
    Blobs(Vec<Blob>),
    /// The engine takes the image.
    Pull,
    /// The model's files are laid out.
    LayOut,
}

/// A transfer under way.
#[derive(Debug)]
struct UnderWay {
    machine: Transfer,
    watch: Watch,
}

/// What a replica's step to bring its bytes has come to.
#[derive(Debug)]
pub(super) struct Fetch {
    replica: ReplicaUid,
    image: Digest,
    model: Option<Digest>,
    /// Others bring the same, or have not begun either.
    begun: bool,
    parts: VecDeque<Part>,
    under_way: Option<UnderWay>,
    /// The model's part has begun.
    is_model: bool,
}

/// What an agent brings.
#[derive(Debug, Default)]
pub(super) struct Brings {
    fetches: BTreeMap<StepId, Box<Fetch>>,
    cap: Cap,
    is_capped: bool,
    /// What has come and is not paid for, and since when.
    unpaid: (u64, Mono),
    /// Fetches at once at the most: each may have a burst under way.
    most: u64,
    /// Image and model that are not here yet, and since when they are asked for.
    asked: BTreeMap<(Digest, Option<Digest>), u64>,
}

/// What is answered to whoever brings bytes.
#[derive(Debug)]
pub(super) enum Call {
    Part,
    Transfer { asked: Effect, stalls: bool },
}

impl Brings {
    pub(super) fn new(is_capped: bool) -> Self {
        let cap = Cap::new(is_capped.then_some(CAP_BYTES));
        Self { cap, is_capped, ..Self::default() }
    }

    /// Bytes came. A bucket of its own says whether they are too many.
    fn pays(&mut self, now: Mono, bytes: u64) -> Option<u64> {
        let (unpaid, since) = self.unpaid;
        let paid = now.since_ms(since).saturating_mul(CAP_BYTES.get()) / 1_000;
        let unpaid = unpaid.saturating_sub(paid) + bytes;
        self.unpaid = (unpaid, now);
        (self.is_capped && unpaid > (self.most + 2) * BURST_BYTES).then_some(unpaid)
    }
}

impl World<'_> {
    /// A replica's bytes are asked for.
    pub(super) fn fetches(&mut self, node: NodeId, life: Life, step: StepId, replica: &ReplicaUid) {
        // What has died since brings nothing any more.
        if !self.lives(node, life) {
            return;
        }
        let body = match self.judged(node, replica) {
            Ok((body, _)) => body,
            Err((cause, words)) => {
                let failed = reconcile::Input::StepFailed { step, cause, words };
                return self.says(node, failed);
            }
        };
        let now = self.now;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let image = body.source.image.digest.clone();
        let model = body.source.artifact.as_ref().map(|artifact| artifact.digest.clone());
        agent.brings.asked.entry((image.clone(), model.clone())).or_insert(now);
        let fetch = Fetch {
            replica: replica.clone(),
            image,
            model,
            begun: false,
            parts: VecDeque::new(),
            under_way: None,
            is_model: false,
        };
        agent.brings.fetches.insert(step, Box::new(fetch));
        let at_once = u64::try_from(agent.brings.fetches.len()).unwrap_or(u64::MAX);
        agent.brings.most = agent.brings.most.max(at_once);
        self.fetch_goes_on(node, step);
    }

    /// Nobody waits for it any more. Mostly it ends at once.
    pub(super) fn stop_fetch(&mut self, node: NodeId, step: StepId) {
        let held = &mut self.nodes[node];
        let late = if held.bring_rng.u8(0..4) == 0 { held.bring_rng.u64(1..STOPS_MS) } else { 0 };
        let life = held.life;
        self.events.push(self.now + late, Event::FetchStops { node, life, step });
    }

    pub(super) fn fetch_stops(&mut self, node: NodeId, life: Life, step: StepId) {
        if self.lives(node, life)
            && let Some(agent) = &mut self.nodes[node].agent
            && agent.brings.fetches.remove(&step).is_some()
        {
            self.others_go_on(node);
        }
    }

    /// Those that waited for another's bytes.
    fn others_go_on(&mut self, node: NodeId) {
        let Some(agent) = &self.nodes[node].agent else { return };
        let steps: Vec<StepId> = agent.brings.fetches.keys().copied().collect();
        for step in steps {
            // One that has ended meanwhile may have let it go on already.
            let agent = self.nodes[node].agent.as_ref();
            let waits = agent.and_then(|agent| agent.brings.fetches.get(&step)).is_some_and(|f| {
                let for_blobs = matches!(f.parts.front(), Some(Part::Blobs(_)));
                f.under_way.is_none() && (!f.begun || for_blobs)
            });
            if waits {
                self.fetch_goes_on(node, step);
            }
        }
    }

    fn says(&mut self, node: NodeId, input: reconcile::Input) {
        let life = self.nodes[node].life;
        self.events.push(self.now, Event::Tell { node, life, input: Box::new(input) });
    }

    /// The next part, unless another brings the same.
    fn fetch_goes_on(&mut self, node: NodeId, step: StepId) {
        let (now, life) = (self.now, self.nodes[node].life);
        let held = &mut self.nodes[node];
        let Some(agent) = &mut held.agent else { return };
        let fetches = &mut agent.brings.fetches;
        let Some(mut fetch) = fetches.remove(&step) else { return };
        if !fetch.begun {
            let same = |other: &Fetch| {
                other.begun
                    && (other.image == fetch.image
                        || (other.model.is_some() && other.model == fetch.model))
            };
            if fetches.values().any(|other| same(other)) {
                fetches.insert(step, fetch);
                return;
            }
            fetch.begun = true;
            if !held.engine.images.contains(&fetch.image) {
                fetch.parts.push_back(Part::Manifest);
                let blobs = specs::image_blobs(&fetch.image).iter();
                fetch.parts.extend(blobs.map(|blob| Part::Blobs(vec![blob.clone()])));
                fetch.parts.push_back(Part::Pull);
            }
            if let Some(model) = fetch.model.as_ref().filter(|model| !held.spool.has_tree(model)) {
                let blobs = specs::model_blobs(model).to_vec();
                fetch.parts.extend([Part::Manifest, Part::Blobs(blobs), Part::LayOut]);
            }
        }
        match fetch.parts.front() {
            None => self.fetch_ends(node, step, &fetch, Ok(())),
            Some(Part::Manifest | Part::Pull | Part::LayOut) => {
                let at = now + held.bring_rng.u64(1..40);
                let call = Box::new(Call::Part);
                self.events.push(at, Event::Brings { node, life, step, call });
                fetches.insert(step, fetch);
            }
            Some(Part::Blobs(blobs)) => {
                // One transfer of a blob at a time, whoever wants it.
                let mut others = fetches.values().filter_map(|other| other.under_way.as_ref());
                if others.any(|other| blobs.iter().any(|blob| other.watch.has(&blob.digest))) {
                    fetches.insert(step, fetch);
                    return;
                }
                let machine = Transfer::new(blobs.clone(), held.bring_rng.u64(..));
                let watch = Watch::new(blobs.clone());
                fetch.under_way = Some(UnderWay { machine, watch });
                self.moves(node, step, fetch, Input::Begin);
            }
        }
    }

    /// Something that was asked for a fetch is done now.
    pub(super) fn brings(&mut self, node: NodeId, life: Life, step: StepId, call: Call) {
        if !self.lives(node, life) {
            return;
        }
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let Some(mut fetch) = agent.brings.fetches.remove(&step) else { return };
        match call {
            Call::Part => {
                self.steps += 1;
                let ended = self.part_ends(node, &mut fetch);
                if self.broken.is_some() {
                    return;
                }
                match ended {
                    Ok(()) => {
                        fetch.parts.pop_front();
                        self.put_back(node, step, fetch);
                        self.fetch_goes_on(node, step);
                    }
                    Err(why) => self.fetch_ends(node, step, &fetch, Err(why)),
                }
            }
            Call::Transfer { asked, stalls } => {
                if let Some(input) = self.carries_out(node, &mut fetch, &asked, stalls) {
                    if let Some(under_way) = &mut fetch.under_way {
                        under_way.watch.told(&asked, &input);
                    }
                    self.moves(node, step, fetch, input);
                }
            }
        }
    }

    fn put_back(&mut self, node: NodeId, step: StepId, fetch: Box<Fetch>) {
        if let Some(agent) = &mut self.nodes[node].agent {
            agent.brings.fetches.insert(step, fetch);
        }
    }

    /// A part that is no transfer.
    fn part_ends(&mut self, node: NodeId, fetch: &mut Fetch) -> Result<(), (Cause, String)> {
        let now = self.now;
        match fetch.parts.front() {
            Some(Part::Manifest) => {
                fetch.is_model = !fetch.parts.iter().any(|part| matches!(part, Part::Pull));
                let exists = self.programs.get(&fetch.image) != Some(&Program::NoImage);
                if exists && self.reaches_registry(node) && !self.nodes[node].registry.refuses(now)
                {
                    return Ok(());
                }
                let words = "the registry does not give it".to_owned();
                let replica = fetch.replica.clone();
                self.says(node, reconcile::Input::FetchWaits { replica, words: words.clone() });
                Err((fetch.cause(), words))
            }
            Some(Part::Pull) => {
                let held = &mut self.nodes[node];
                if !held.engine.is_up(now) {
                    return Err((Cause::EngineAway, "the engine is away".to_owned()));
                }
                let blobs = specs::image_blobs(&fetch.image);
                let lacks = blobs.iter().find(|blob| !held.spool.is_whole(&blob.digest));
                if let Some(lacks) = lacks {
                    let words = format!("{} is given an image without {}", held.uid, lacks.digest);
                    self.broke(words);
                    return Ok(());
                }
                held.engine.images.insert(fetch.image.clone());
                blobs.iter().for_each(|blob| held.spool.discard(&blob.digest));
                Ok(())
            }
            Some(Part::LayOut) => {
                let held = &mut self.nodes[node];
                if now < held.disk_full_until {
                    return Err((Cause::Bytes("DISK_SHORT"), "the disk is full".to_owned()));
                }
                if let Some(model) = &fetch.model {
                    held.spool.lay_out(model);
                }
                Ok(())
            }
            Some(Part::Blobs(_)) | None => Ok(()),
        }
    }

    fn fetch_ends(
        &mut self,
        node: NodeId,
        step: StepId,
        fetch: &Fetch,
        ended: Result<(), (Cause, String)>,
    ) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let input = match ended {
            Ok(()) => {
                agent.brings.asked.remove(&(fetch.image.clone(), fetch.model.clone()));
                reconcile::Input::StepDone { step, done: Done::Fetched }
            }
            Err((cause, words)) => reconcile::Input::StepFailed { step, cause, words },
        };
        self.says(node, input);
        self.others_go_on(node);
    }

    /// A transfer takes an input, and all that it asks for that needs no time.
    fn moves(&mut self, node: NodeId, step: StepId, mut fetch: Box<Fetch>, mut input: Input) {
        loop {
            self.steps += 1;
            let held = &mut self.nodes[node];
            let (mono, life) = (held.now(self.now).mono, held.life);
            let (Some(agent), Some(under_way)) = (&mut held.agent, &mut fetch.under_way) else {
                return;
            };
            let effects = under_way.machine.step(mono, input, &mut agent.brings.cap);
            let mut asked = None;
            for effect in effects {
                if let Err(words) = under_way.watch.asks(mono, &effect, &held.spool) {
                    let words = format!("{}: {words}", held.uid);
                    return self.broke(words);
                }
                if let Effect::Open { from, to, .. } = &effect
                    && agent.brings.is_capped
                    && !under_way.watch.no_ranges
                    && to - from > CAP_BYTES.get() / 2
                {
                    let words = format!("{} asks for {} bytes at once", held.uid, to - from);
                    return self.broke(words);
                }
                let replica = fetch.replica.clone();
                let said = match effect {
                    Effect::Progress(progress) => {
                        let (done_bytes, total_bytes) = (progress.done_bytes, progress.total_bytes);
                        let progress =
                            api::Progress { done_bytes, total_bytes, ..Default::default() };
                        reconcile::Input::Progress { replica, progress }
                    }
                    Effect::Trouble { why, .. } => {
                        reconcile::Input::FetchWaits { replica, words: why }
                    }
                    Effect::Close => {
                        under_way.watch.wire = None;
                        continue;
                    }
                    Effect::Done => {
                        fetch.under_way = None;
                        fetch.parts.pop_front();
                        self.put_back(node, step, fetch);
                        self.fetch_goes_on(node, step);
                        return self.others_go_on(node);
                    }
                    Effect::Failed(failure) => {
                        let cause = match failure {
                            Failure::NoRoom { .. } => Cause::Bytes("DISK_SHORT"),
                            _ => fetch.cause(),
                        };
                        let why = Err((cause, failure.to_string()));
                        return self.fetch_ends(node, step, &fetch, why);
                    }
                    other => {
                        if asked.replace(other).is_some() {
                            let words = format!("{}: a transfer asks for two things", held.uid);
                            return self.broke(words);
                        }
                        continue;
                    }
                };
                let tell = Event::Tell { node, life, input: Box::new(said) };
                self.events.push(self.now, tell);
            }
            let Some(asked) = asked else {
                let uid = held.uid.clone();
                return self.broke(format!("{uid}: a transfer waits for nothing"));
            };
            let (at, stalls) = self.done_at(node, &asked);
            if at > self.now {
                self.put_back(node, step, fetch);
                let call = Box::new(Call::Transfer { asked, stalls });
                return self.events.push(at, Event::Brings { node, life, step, call });
            }
            match self.carries_out(node, &mut fetch, &asked, stalls) {
                Some(next) => input = next,
                None => return,
            }
            if let Some(under_way) = &mut fetch.under_way {
                under_way.watch.told(&asked, &input);
            }
        }
    }

    /// When something that a transfer asks for is done, and whether nothing comes until then.
    fn done_at(&mut self, node: NodeId, asked: &Effect) -> (u64, bool) {
        let now = self.now;
        let held = &mut self.nodes[node];
        let rng = &mut held.bring_rng;
        let blocked = held.net.is_blocked(now);
        let slow_ms = if now < held.net.slow_until { held.net.slow_by_ms } else { 0 };
        let took_ms = match asked {
            Effect::Open { .. } if blocked => CONNECT_MS,
            Effect::Open { .. } => rng.u64(0..10) + slow_ms.min(CONNECT_MS),
            Effect::Read { not_before, deadline, .. } => {
                let from = held.clock.when(*not_before).max(now);
                let late = held.clock.when(*deadline).max(now + 1);
                let comes = from + rng.u64(1..60) + slow_ms;
                let stalls = blocked || held.registry.stalls(now) && rng.bool() || comes >= late;
                return if stalls { (late, true) } else { (comes, false) };
            }
            Effect::Wait(until) => {
                let until = held.clock.when(*until);
                let early = until > now + 1 && rng.u8(0..4) == 0;
                return (if early { rng.u64(now + 1..until) } else { until }, false);
            }
            Effect::Persist { .. } | Effect::Verify(_) => rng.u64(1..10),
            Effect::Look(_) | Effect::Room(_) | Effect::Keep(_) | Effect::Discard(_)
                if rng.u8(0..4) != 0 =>
            {
                0
            }
            _ => rng.u64(1..10),
        };
        (now + took_ms, false)
    }

    /// What a transfer asks for is done now; `None`: its agent dies of it, or something is broken.
    fn carries_out(
        &mut self,
        node: NodeId,
        fetch: &mut Fetch,
        asked: &Effect,
        stalls: bool,
    ) -> Option<Input> {
        let now = self.now;
        if matches!(asked, Effect::Persist { .. }) && self.dies_at(node, Moment::BeforeChunk) {
            return None;
        }
        let wanted = self.is_wanted(node, fetch);
        let full = now < self.nodes[node].disk_full_until;
        let under_way = fetch.under_way.as_mut()?;
        let watch = &mut under_way.watch;
        let blob_of = |blob: usize| watch.blobs[blob].clone();
        let spool = &mut self.nodes[node].spool;
        let input = match *asked {
            Effect::Look(blob) => Input::Looked(spool.look(&blob_of(blob))),
            Effect::Room(need_bytes) if full => Input::NoRoom { need_bytes, free_bytes: 0 },
            Effect::Room(_) => Input::Room,
            Effect::Open { .. } | Effect::Wait(_) if !wanted => Input::Unwanted,
            Effect::Open { from, to, .. } => return Some(self.opens(node, watch, (from, to))),
            Effect::Read { .. } if stalls => Input::Tick,
            Effect::Read { blob, at, most, .. } => {
                return self.reads(node, watch, (blob, at), most);
            }
            Effect::Persist { .. } if full => Input::DiskFailed("the disk is full".to_owned()),
            Effect::Persist { blob, chunk } => {
                let right = watch.is_right();
                spool.persist(&watch.blobs[blob].digest, chunk, right);
                if self.dies_at(node, Moment::AfterChunk) {
                    return None;
                }
                if wanted { Input::Persisted } else { Input::Unwanted }
            }
            Effect::Verify(blob) => Input::Verified { good: spool.verify(&blob_of(blob)) },
            Effect::Keep(blob) => {
                spool.keep(&blob_of(blob).digest);
                Input::Kept
            }
            Effect::Discard(blob) => {
                spool.discard(&blob_of(blob).digest);
                Input::Discarded
            }
            Effect::Wait(_) => Input::Tick,
            Effect::Close
            | Effect::Progress(_)
            | Effect::Trouble { .. }
            | Effect::Done
            | Effect::Failed(_) => return None,
        };
        Some(input)
    }

    /// A body of the set names what is brought.
    fn is_wanted(&self, node: NodeId, fetch: &Fetch) -> bool {
        let agent = self.nodes[node].agent.as_ref();
        let Some(set) = agent.and_then(|agent| agent.board.wanted.set()) else { return false };
        set.bodies.values().any(|body| {
            let source = &body.value.source;
            let model = source.artifact.as_ref().map(|artifact| &artifact.digest);
            if fetch.is_model {
                model == fetch.model.as_ref()
            } else {
                source.image.digest == fetch.image
            }
        })
    }

    // ---- the registry, which is at the server ----

    fn reaches_registry(&self, node: NodeId) -> bool {
        let held = &self.nodes[node];
        let away = self.now < held.engine.registry_away_until || held.net.is_blocked(self.now);
        self.server.is_up() && !away
    }

    fn opens(&mut self, node: NodeId, watch: &mut Watch, (from, to): (u64, u64)) -> Input {
        let reached = self.reaches_registry(node);
        let (now, server) = (self.now, self.server.life);
        let held = &mut self.nodes[node];
        if !reached || held.registry.breaks(now) && held.bring_rng.u8(0..4) != 0 {
            return Input::Broke("no connection to the registry".to_owned());
        }
        if held.registry.refuses(now) {
            return Input::Refused("the registry says no".to_owned());
        }
        let at = match held.registry.answers_elsewhere(now).then(|| held.bring_rng.u8(0..4)) {
            None | Some(0) => from,
            Some(1) => from - held.bring_rng.u64(0..=from.min(1_000)),
            Some(2) => from + 1,
            Some(_) => 0,
        };
        watch.no_ranges |= at < from;
        watch.wire = Some(Wire { at, from, to, server });
        Input::Opened { from: at }
    }

    fn reads(
        &mut self,
        node: NodeId,
        watch: &mut Watch,
        (blob, at): (usize, Option<u64>),
        most: u64,
    ) -> Option<Input> {
        let reached = self.reaches_registry(node);
        let (now, server) = (self.now, self.server.life);
        let held = &mut self.nodes[node];
        let rng = &mut held.bring_rng;
        let wire = watch.wire.filter(|wire| wire.server == server && wire.at < wire.to);
        let registry = &held.registry;
        let breaks = registry.breaks(now) && rng.bool()
            || registry.answers_elsewhere(now) && rng.u8(0..3) == 0;
        if !reached || wire.is_none() || breaks {
            return Some(Input::Broke("the connection to the registry broke".to_owned()));
        }
        let bytes = if rng.u8(0..8) == 0 { rng.u64(1..=most) } else { most };
        let right = !(held.registry.sends_wrong(now) && rng.bool());
        watch.came(blob, at, bytes, right);
        let mono = held.now(now).mono;
        if let Some(unpaid) = held.agent.as_mut().and_then(|a| a.brings.pays(mono, bytes)) {
            let words = format!("{} has brought {unpaid} bytes more than its cap allows", held.uid);
            self.broke(words);
            return None;
        }
        Some(Input::Received { bytes })
    }

    // ---- what must hold ----

    /// A container is made or started: its model is all here.
    pub(super) fn check_brought(&mut self, node: NodeId, replica: &ReplicaUid, model: &Digest) {
        let held = &self.nodes[node];
        let blobs = specs::model_blobs(model);
        let lacks = blobs.iter().find(|blob| !held.spool.is_whole(&blob.digest));
        if lacks.is_some() || !held.spool.has_tree(model) {
            let words = format!("{replica} is made on {} and its model is not there", held.uid);
            self.broke(format!("{words}: {lacks:?}"));
        }
    }

    /// What is asked for and wanted came in time.
    pub(super) fn check_brings(&mut self, calm_since: u64) {
        for node in 0..self.nodes.len() {
            let held = &mut self.nodes[node];
            let Some(agent) = &mut held.agent else { continue };
            let Some(set) = agent.board.wanted.set() else { continue };
            agent.brings.asked.retain(|(image, model), _| {
                set.bodies.values().any(|body| {
                    let source = &body.value.source;
                    source.image.digest == *image
                        && source.artifact.as_ref().map(|a| &a.digest) == model.as_ref()
                })
            });
            let programs = self.programs;
            let comes = |image: &Digest| programs.get(image) != Some(&Program::NoImage);
            let within = BROUGHT_MS + 3 * self.script.ping_ms;
            let late = |since: u64| self.now - since.max(calm_since) > within;
            let mut all = agent.brings.asked.iter();
            if let Some(((image, model), since)) = all.find(|((i, _), at)| comes(i) && late(**at)) {
                let words = format!("{} has asked for {image} with {model:?} at {since}", held.uid);
                return self.broke(format!("{words} ms, and it is not there"));
            }
        }
    }
}

impl Fetch {
    fn cause(&self) -> Cause {
        Cause::Bytes(if self.is_model { "FETCH_FAILED" } else { "PULL_FAILED" })
    }
}

/// What is wrong with a host's way to the registry, and until when.
#[derive(Debug, Default)]
pub(super) struct Registry(BTreeMap<Trouble, u64>);

impl Registry {
    pub(super) fn troubled(&mut self, trouble: Trouble, until: u64) {
        self.0.insert(trouble, until);
    }

    fn has(&self, trouble: Trouble, now: u64) -> bool {
        self.0.get(&trouble).is_some_and(|until| now < *until)
    }

    fn breaks(&self, now: u64) -> bool {
        self.has(Trouble::Breaks, now)
    }

    fn stalls(&self, now: u64) -> bool {
        self.has(Trouble::Stalls, now)
    }

    fn refuses(&self, now: u64) -> bool {
        self.has(Trouble::Refuses, now)
    }

    fn answers_elsewhere(&self, now: u64) -> bool {
        self.has(Trouble::Elsewhere, now)
    }

    fn sends_wrong(&self, now: u64) -> bool {
        self.has(Trouble::Wrong, now)
    }
}
