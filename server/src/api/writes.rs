//! Writes: what every call that changes something has in common.
//!
//! A call is begun with `Api::begin`, which checks its options and finds the kept answer of an
//! earlier call with the same request id; it is carried out by `Api::write`, which lets a pure
//! decision look at the newest submitted view and writes its proposal together with the audit entry
//! and, for a call with an id, its answer, all in one batch. When somebody comes between and the
//! caller expected no revision, it is decided anew.

use super::{Api, audit, auth};
use crate::cluster::wall_now;
use crate::error::{Error, Kind};
use crate::ledger::refused;
use berth_proto::api::{self, WriteOptions};
use berth_proto::ids::Revision;
use berth_proto::record::RequestRecord;
use berth_server_core::batching::{Precondition, Proposal, Refusal};
use berth_server_core::change::Change;
use berth_server_core::view::{Kept, ObjectKey, View};
use prost::Message;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Tries of a write that others keep getting in front of.
pub(super) const TRIES: usize = 5;
/// Characters of a request id, as the contract says: a UUID and room to spare.
pub(super) const MAX_REQUEST_ID: usize = 64;
/// How long a request's answer is kept, in milliseconds: a caller that tries again for a day.
pub const REQUEST_KEPT_MS: i64 = 24 * 3_600_000;

/// Calls that are carried out on a full disk, in the room that the ballast has left.
const TAKEN_WHEN_FULL: [&str; 6] = [
    "DeploymentService/Delete",
    "HostService/RemoveHost",
    "HostService/RevokeJoinToken",
    "ModelService/DeleteAlias",
    "ModelService/DeleteVersion",
    "UserService/RevokeUser",
];

/// The answer of a write.
pub(super) trait Answer: Message + Default + Clone {
    /// Fills in the revision of the objects in it that this write has written: those that have none.
    fn written_at(&mut self, _revision: Revision) {}
    /// What is kept for a repetition: all but secrets.
    fn kept(&self) -> Self {
        self.clone()
    }
}

/// One call that changes something.
pub(super) struct Call<'a> {
    pub caller: &'a auth::Caller,
    method: &'static str,
    options: WriteOptions,
    request_sha256: Vec<u8>,
    /// Where the answer is kept, and at which revision that place was written.
    place: Option<(String, Revision)>,
}

/// What becomes of a call.
pub(super) enum Begun<'a, A> {
    /// It was carried out before; this was answered.
    Kept(A),
    /// It is to be carried out.
    New(Call<'a>),
}

/// What a decision comes to.
pub(super) struct Step<A> {
    pub proposal: Proposal,
    pub answer: A,
    /// For the audit log, e.g. `host/edge-1`.
    pub objects: Vec<String>,
}

impl<A> Step<A> {
    /// Nothing has to be changed.
    pub fn nothing(answer: A) -> Self {
        Self { proposal: Proposal::default(), answer, objects: Vec::new() }
    }
}

fn sha256(request: &impl Message) -> Vec<u8> {
    use sha2::Digest as _;
    sha2::Sha256::digest(request.encode_to_vec()).to_vec()
}

impl Api {
    /// Checks a call's options and looks for its kept answer.
    pub(super) fn begin<'a, A: Answer>(
        &self,
        caller: &'a auth::Caller,
        options: Option<&WriteOptions>,
        method: &'static str,
        request: &impl Message,
    ) -> Result<Begun<'a, A>, Error> {
        let options = options.cloned().unwrap_or_default();
        let id = &options.request_id;
        if id.chars().count() > MAX_REQUEST_ID {
            let words = format!("must have at most {MAX_REQUEST_ID} characters");
            return Err(Error::field("write.request_id", words));
        }
        let mut call = Call {
            caller,
            method,
            request_sha256: sha256(request),
            place: None,
            options: options.clone(),
        };
        if id.is_empty() {
            self.has_room_for(method)?;
            return Ok(Begun::New(call));
        }
        let key = format!("{}:{id}", caller.subject);
        let fresh =
            |kept: &&Kept<RequestRecord>| wall_now().0 - kept.record.time_unix_ms < REQUEST_KEPT_MS;
        let (durable, ahead) = (self.0.ledger.view(), self.0.ledger.ahead());
        if let Some(kept) = durable.request(&key).filter(fresh) {
            if kept.record.request_sha256 != call.request_sha256 {
                return Err(Error::RequestReused(id.clone()));
            }
            let mut answer = A::decode(kept.record.response.as_slice())
                .map_err(|e| Error::internal("cannot read a kept answer", e))?;
            answer.written_at(kept.revision);
            return Ok(Begun::Kept(answer));
        }
        if ahead.request(&key).filter(fresh).is_some() {
            return Err(running());
        }
        self.has_room_for(method)?;
        call.place = Some((key.clone(), ahead.revision_of(&ObjectKey::Request(key))));
        Ok(Begun::New(call))
    }

    /// On a full disk only what makes room, or takes rights away, is begun.
    fn has_room_for(&self, method: &str) -> Result<(), Error> {
        if !self.0.cramped.load(Ordering::Relaxed) || TAKEN_WHEN_FULL.contains(&method) {
            return Ok(());
        }
        Err(Error::Exhausted {
            reason: "DISK_FULL",
            message: "the server's disk is full; nothing was written. Delete what is not needed \
                      (`berth rm`, `berth model rm`, `berth registry gc`) or free some space there"
                .to_owned(),
        })
    }

    /// Decides and writes, anew when somebody comes between; answers when it is durable.
    pub(super) async fn write<A: Answer>(
        &self,
        call: &Call<'_>,
        kind: Kind,
        name: &str,
        decide: impl Fn(&View) -> Result<Step<A>, Error>,
    ) -> Result<A, Error> {
        let mut tries = 0;
        loop {
            let view = self.0.ledger.ahead();
            let Step { mut proposal, mut answer, objects } = decide(&view)?;
            if call.validate_only() {
                return holds(&view, &proposal, kind, name).map(|()| answer);
            }
            // Also when there is nothing to change: what the answer rests on may not be durable yet.
            call.seal(&mut proposal, answer.kept().encode_to_vec(), objects);
            match self.0.ledger.propose(proposal).await {
                Ok(revision) => {
                    answer.written_at(revision);
                    return Ok(answer);
                }
                Err(refusal) => {
                    tries += 1;
                    if !call.again(&refusal, tries) {
                        return Err(refused(refusal, kind, name));
                    }
                }
            }
        }
    }
}

fn running() -> Error {
    Error::unavailable("REQUEST_RUNNING", "the same request is being carried out; ask again")
}

/// Whether a proposal's preconditions hold in a view, for what is checked and not written.
pub(super) fn holds(view: &View, proposal: &Proposal, kind: Kind, name: &str) -> Result<(), Error> {
    let held = proposal.preconditions.iter().try_for_each(|one| one.check(view));
    held.map_err(|refusal| refused(refusal, kind, name))
}

impl Call<'_> {
    /// Nothing is to be written.
    pub fn validate_only(&self) -> bool {
        self.options.validate_only
    }

    /// What the caller has read of the object.
    pub fn expected(&self) -> Option<Revision> {
        self.options.expected_revision.map(Revision)
    }

    /// The precondition on the object the call is about: what the caller expects, else what was found
    /// when it was decided.
    pub fn at(&self, object: ObjectKey, found: Revision) -> Precondition {
        Precondition::At(object, self.expected().unwrap_or(found))
    }

    /// For calls that make something new: nothing can have been read of it.
    pub fn expects_nothing(&self) -> Result<(), Error> {
        match self.options.expected_revision {
            None | Some(0) => Ok(()),
            Some(_) => Err(Error::field(
                "write.expected_revision",
                "must be absent or 0: the call makes something new",
            )),
        }
    }

    /// Whether to decide anew after a refusal.
    pub fn again(&self, refusal: &Refusal, tries: usize) -> bool {
        let mine = |object: &ObjectKey| matches!(object, ObjectKey::Request(_));
        let conflict = matches!(refusal, Refusal::Conflict { object, .. } if !mine(object))
            || *refusal == Refusal::TakenBack;
        conflict && self.options.expected_revision.is_none() && tries < TRIES
    }

    /// Adds the audit entry and, for a call with an id, its answer.
    pub fn seal(&self, proposal: &mut Proposal, answer: Vec<u8>, objects: Vec<String>) {
        if let Some((key, found)) = &self.place {
            // First, so that a repetition under way is told so, and not what it has collided with.
            let still = Precondition::At(ObjectKey::Request(key.clone()), *found);
            proposal.preconditions.insert(0, still);
            proposal.changes.push(Change::PutRequest(Arc::new(RequestRecord {
                key: key.clone(),
                time_unix_ms: wall_now().0,
                request_sha256: self.request_sha256.clone(),
                response: answer,
            })));
        }
        if !proposal.changes.is_empty() {
            let id = &self.options.request_id;
            proposal.changes.push(audit(self.caller, self.method, id, objects));
        }
    }
}

/// Answers that hold one object with a `meta`, whose revision 0 means "written by this call".
macro_rules! answers_with_meta {
    ($($answer:ident . $field:ident),* $(,)?) => {$(
        impl Answer for api::$answer {
            fn written_at(&mut self, revision: Revision) {
                let meta = self.$field.as_mut().and_then(|object| object.meta.as_mut());
                if let Some(meta) = meta.filter(|meta| meta.revision == 0) {
                    meta.revision = revision.0;
                }
            }
        }
    )*};
}

answers_with_meta!(
    ScaleResponse.deployment,
    RestartResponse.deployment,
    UndoResponse.deployment,
    DeleteResponse.deployment,
    LabelHostResponse.host,
    CordonHostResponse.host,
    DrainHostResponse.host,
    ApproveHostResponse.host,
    ReleaseQuarantineResponse.host,
    CreateUserResponse.user,
);

macro_rules! plain_answers {
    ($($answer:ident),* $(,)?) => {$( impl Answer for api::$answer {} )*};
}

plain_answers!(
    RemoveHostResponse,
    RenewCertificateResponse,
    RevokeJoinTokenResponse,
    ResolveOrphansResponse,
    RevokeUserResponse,
    DeleteVersionResponse,
    SetAliasResponse,
    DeleteAliasResponse,
);

impl Answer for api::ApplyResponse {
    fn written_at(&mut self, revision: Revision) {
        for result in &mut self.results {
            let meta = result.deployment.as_mut().and_then(|d| d.meta.as_mut());
            if let Some(meta) = meta.filter(|meta| meta.revision == 0) {
                meta.revision = revision.0;
            }
        }
    }
}

impl Answer for api::RegisterVersionResponse {
    fn written_at(&mut self, revision: Revision) {
        if let Some(version) = self.version.as_mut().filter(|v| v.revision == 0) {
            version.revision = revision.0;
        }
    }
}

impl Answer for api::CreateJoinTokenResponse {
    fn kept(&self) -> Self {
        Self { secret: String::new(), command: String::new(), ..self.clone() }
    }
}

impl Answer for api::CreateUserTokenResponse {
    fn kept(&self) -> Self {
        Self { secret: String::new(), ..self.clone() }
    }
}
