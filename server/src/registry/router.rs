//! The door's paths: who is let in, and which handler answers.
//!
//! A repository's name has slashes in it, so paths are read from their end.

use super::access::{
    self, Access, AccessError, Action, Noted, Noting, PeerCertificates, Principal, Protected, Reach,
};
use super::errors::RegistryError;
use super::names::{Place, RepoName, parse_digest};
use super::{Registry, add, handlers};
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse as _, Response};
use berth_proto::ids::Digest;
use http::{HeaderName, HeaderValue, Method, Uri};
use std::sync::Arc;

/// The door with all it needs.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) registry: Registry,
    access: Arc<dyn Access>,
    pub(super) protected: Arc<dyn Protected>,
}

/// The registry's routes: everything below `/v2`.
///
/// The listener puts [`PeerCertificates`] into the request's extensions when the client showed a
/// certificate that it verified.
pub fn router(
    registry: Registry,
    access: Arc<dyn Access>,
    protected: Arc<dyn Protected>,
) -> axum::Router {
    let door = Door { registry, access, protected };
    axum::Router::new()
        .route("/v2", axum::routing::any(answer))
        .route("/v2/", axum::routing::any(answer))
        .route("/v2/{*rest}", axum::routing::any(answer))
        .with_state(door)
}

/// Query parameters of all paths.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Params {
    pub(super) digest: Option<String>,
    pub(super) mount: Option<String>,
    pub(super) from: Option<String>,
    pub(super) n: Option<usize>,
    pub(super) last: Option<String>,
    pub(super) artifact_type: Option<String>,
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Base,
    Catalog,
    In(RepoName, Part),
}

/// A part of a repository.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Tags,
    Manifest(String),
    Blob(String),
    Uploads,
    Upload(String),
    Referrers(String),
}

/// A caller who was let in.
pub(super) struct Caller<'a> {
    pub(super) principal: Principal,
    access: &'a dyn Access,
}

impl Caller<'_> {
    pub(super) fn may(&self, repo: &RepoName, action: Action) -> bool {
        self.principal.only.as_ref().is_none_or(|only| only == repo)
            && self.access.allows(&self.principal, repo, action)
    }

    /// Who it is.
    pub(super) fn subject(&self) -> &str {
        &self.principal.subject
    }

    /// Writes down what is put or removed, before it is.
    pub(super) async fn note(
        &self,
        extensions: &http::Extensions,
        action: Action,
        repository: &RepoName,
        what: Noting<'_>,
    ) -> Result<(), RegistryError> {
        let principal = &self.principal;
        let noted = Noted { principal, extensions, action, repository, what };
        self.access.note(noted).await.map_err(|_| {
            RegistryError::Unavailable("the server cannot write down who does this, try again")
        })
    }
}

async fn answer(State(door): State<Door>, request: Request) -> Response {
    let mut response = match serve(&door, request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(
        HeaderName::from_static("docker-distribution-api-version"),
        HeaderValue::from_static("registry/2.0"),
    );
    // Whatever was pushed is never a page.
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn serve(door: &Door, request: Request) -> Result<Response, RegistryError> {
    let certificates = request.extensions().get::<PeerCertificates>();
    let principal = match access::credentials(request.headers(), certificates) {
        Ok(shown) => door.access.authenticate(shown).await.map_err(|error| match error {
            AccessError::Refused => {
                RegistryError::Unauthorized("the token or certificate is not valid here")
            }
            AccessError::Unavailable => {
                RegistryError::Unavailable("the server cannot check credentials now, try again")
            }
        }),
        Err(error) => Err(error),
    };
    let principal = principal.inspect_err(|_| add(&door.registry.stats().unauthorized, 1))?;
    let caller = Caller { principal, access: &*door.access };

    let target = read_path(request.uri().path())?;
    let params = read_query(request.uri())?;
    match target {
        Target::Base => handlers::base(request.method()),
        Target::Catalog => handlers::catalog(door, &caller, request.method(), &params).await,
        Target::In(repo, part) => {
            let action = action_of(request.method(), &part)?;
            if !caller.may(&repo, action) {
                let place = match repo.place() {
                    Place::Shared => "which is shared by all namespaces".to_owned(),
                    Place::Namespace(name) => format!("which is of namespace \"{name}\""),
                };
                return Err(RegistryError::Denied(format!(
                    "{} may not {action} {repo}, {place}",
                    caller.principal.subject
                )));
            }
            if action == Action::Pull
                && let Reach::Below(roots) = door.access.reach(&caller.principal, &repo)
                && !within(&door.registry, &repo, &part, &roots).await?
            {
                return Err(RegistryError::Denied(format!(
                    "{} reads of {repo} only what its assignments lead to, by digest",
                    caller.principal.subject
                )));
            }
            match part {
                Part::Tags => handlers::tags(door, &repo, request.method(), &params).await,
                Part::Referrers(digest) => {
                    handlers::referrers(door, &repo, request.method(), &digest, &params).await
                }
                Part::Manifest(reference) => {
                    handlers::manifest(door, &caller, &repo, &reference, request).await
                }
                Part::Blob(digest) => handlers::blob(door, &caller, &repo, &digest, request).await,
                Part::Uploads => handlers::begin(door, &caller, &repo, params, request).await,
                Part::Upload(id) => handlers::upload(door, &repo, &id, params, request).await,
            }
        }
    }
}

/// Whether a part of a repository is one of these manifests or below one of them.
async fn within(
    registry: &Registry,
    repo: &RepoName,
    part: &Part,
    roots: &[Digest],
) -> Result<bool, RegistryError> {
    let wanted = match part {
        Part::Manifest(digest) | Part::Blob(digest) => digest,
        Part::Tags | Part::Referrers(_) | Part::Uploads | Part::Upload(_) => return Ok(false),
    };
    // A tag moves, and nobody is assigned one.
    let Ok(wanted) = parse_digest(wanted) else { return Ok(false) };
    Ok(roots.contains(&wanted) || registry.leads_to(repo, roots, &wanted).await?)
}

/// Uploads are pushed, whatever is done with them.
fn action_of(method: &Method, part: &Part) -> Result<Action, RegistryError> {
    if matches!(part, Part::Uploads | Part::Upload(_)) {
        return Ok(Action::Push);
    }
    match *method {
        Method::GET | Method::HEAD => Ok(Action::Pull),
        Method::POST | Method::PUT | Method::PATCH => Ok(Action::Push),
        Method::DELETE => Ok(Action::Delete),
        _ => Err(RegistryError::Unsupported(format!("method {method} is not used here"))),
    }
}

fn read_query(uri: &Uri) -> Result<Params, RegistryError> {
    Query::<Params>::try_from_uri(uri)
        .map(|query| query.0)
        .map_err(|error| RegistryError::QueryInvalid(error.body_text()))
}

fn read_path(path: &str) -> Result<Target, RegistryError> {
    let rest = path.strip_prefix("/v2").ok_or(RegistryError::NoSuchPath)?;
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    match rest {
        "" => return Ok(Target::Base),
        "_catalog" => return Ok(Target::Catalog),
        _ => {}
    }
    let rest = decode(rest).ok_or(RegistryError::NoSuchPath)?;
    let segments: Vec<&str> = rest.split('/').collect();
    let (name, part) = match segments.as_slice() {
        [name @ .., "tags", "list"] => (name, Part::Tags),
        [name @ .., "blobs", "uploads", ""] | [name @ .., "blobs", "uploads"] => {
            (name, Part::Uploads)
        }
        [name @ .., "blobs", "uploads", id] => (name, Part::Upload((*id).to_owned())),
        [name @ .., "blobs", digest] => (name, Part::Blob((*digest).to_owned())),
        [name @ .., "manifests", reference] => (name, Part::Manifest((*reference).to_owned())),
        [name @ .., "referrers", digest] => (name, Part::Referrers((*digest).to_owned())),
        _ => return Err(RegistryError::NoSuchPath),
    };
    Ok(Target::In(RepoName::parse(&name.join("/"))?, part))
}

/// Undoes percent-encoding; clients may write the `:` of a digest so. What comes out is checked
/// like everything else.
fn decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let pair = [rest.next()?, rest.next()?];
            bytes.extend(hex::decode(pair).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(path: &str) -> (String, Part) {
        match read_path(path).unwrap() {
            Target::In(repo, part) => (repo.to_string(), part),
            other @ (Target::Base | Target::Catalog) => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn paths_are_read_from_their_end() {
        assert_eq!(part("/v2/a/b/tags/list"), ("a/b".into(), Part::Tags));
        assert_eq!(part("/v2/tags/tags/list"), ("tags".into(), Part::Tags));
        assert_eq!(part("/v2/blobs/blobs/uploads/"), ("blobs".into(), Part::Uploads));
        assert_eq!(part("/v2/a/blobs/uploads"), ("a".into(), Part::Uploads));
        assert_eq!(part("/v2/a/blobs/uploads/x"), ("a".into(), Part::Upload("x".into())));
        assert_eq!(
            part("/v2/manifests/manifests/latest"),
            ("manifests".into(), Part::Manifest("latest".into()))
        );
        assert_eq!(part("/v2/a/blobs/sha256%3Aab"), ("a".into(), Part::Blob("sha256:ab".into())));
    }

    #[test]
    fn no_path_leaves_the_folder() {
        for path in [
            "/v2/../etc/manifests/x",
            "/v2/a/../../manifests/x",
            "/v2/%2e%2e/manifests/x",
            "/v2/a%2f..%2fb/tags/list",
            "/v2/_manifests/tags/list",
            "/v2//manifests/x",
            "/v2/manifests/x",
            "/v2/a/nothing",
            "/v2/a/manifests/%",
            "/v2/a%00b/manifests/x",
        ] {
            assert!(read_path(path).is_err(), "{path}");
        }
    }
}
