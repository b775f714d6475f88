//! What each path does, in the words of HTTP.

use super::access::{Action, Noting};
use super::errors::{RegistryError, held_range};
use super::listing::Page;
use super::manifests::{MANIFEST_BYTES_MAX, Manifest, media_types};
use super::names::{Reference, RepoName, parse_digest};
use super::router::{Caller, Door, Params};
use super::uploads::{Placement, upload_location};
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use berth_proto::ids::Digest;
use http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH,
    LINK, LOCATION, RANGE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use std::sync::Arc;
use uuid::Uuid;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

type Answer = Result<Response, RegistryError>;

fn respond(status: StatusCode, headers: Vec<(HeaderName, String)>, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    for (name, value) in headers {
        // Every value here is made of checked parts; one that is not text is left out.
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

fn empty(status: StatusCode, mut headers: Vec<(HeaderName, String)>) -> Response {
    if status != StatusCode::NO_CONTENT {
        headers.push((CONTENT_LENGTH, "0".to_owned()));
    }
    respond(status, headers, Body::empty())
}

fn not_here(method: &Method) -> RegistryError {
    RegistryError::Unsupported(format!("method {method} is not used at this path"))
}

fn only_get(method: &Method) -> Result<(), RegistryError> {
    if matches!(*method, Method::GET | Method::HEAD) { Ok(()) } else { Err(not_here(method)) }
}

fn json(value: &serde_json::Value, more: Vec<(HeaderName, String)>) -> Response {
    let mut headers = vec![(CONTENT_TYPE, "application/json".to_owned())];
    headers.extend(more);
    respond(StatusCode::OK, headers, Body::from(value.to_string()))
}

/// `/v2/`: the door is here, and you are let in.
pub(super) fn base(method: &Method) -> Answer {
    only_get(method)?;
    Ok(json(&serde_json::json!({}), Vec::new()))
}

/// Repositories the caller may pull from.
pub(super) async fn catalog(
    door: &Door,
    caller: &Caller<'_>,
    method: &Method,
    params: &Params,
) -> Answer {
    only_get(method)?;
    let all = door.registry.repositories().await?;
    let names: Vec<String> = all
        .into_iter()
        .filter(|repo| caller.may(repo, Action::Pull))
        .map(|repo| repo.as_str().to_owned())
        .collect();
    let (names, more) = page(params).cut(names);
    let next = next_page("/v2/_catalog", params, names.last(), more);
    Ok(json(&serde_json::json!({ "repositories": names }), next))
}

pub(super) async fn tags(door: &Door, repo: &RepoName, method: &Method, params: &Params) -> Answer {
    only_get(method)?;
    let (tags, more) = door.registry.tags(repo, page(params)).await?;
    let next = next_page(&format!("/v2/{repo}/tags/list"), params, tags.last(), more);
    Ok(json(&serde_json::json!({ "name": repo.as_str(), "tags": tags }), next))
}

fn page(params: &Params) -> Page {
    Page { limit: params.n, after: params.last.clone() }
}

fn next_page(
    path: &str,
    params: &Params,
    last: Option<&String>,
    more: bool,
) -> Vec<(HeaderName, String)> {
    let Some(last) = last.filter(|_| more) else { return Vec::new() };
    let n = params.n.unwrap_or(super::listing::PAGE_MAX);
    vec![(LINK, format!("<{path}?n={n}&last={last}>; rel=\"next\""))]
}

pub(super) async fn referrers(
    door: &Door,
    repo: &RepoName,
    method: &Method,
    subject: &str,
    params: &Params,
) -> Answer {
    only_get(method)?;
    let subject = parse_digest(subject)?;
    let after = params.last.as_deref().map(parse_digest).transpose()?;
    let filter = params.artifact_type.clone().filter(|wanted| !wanted.is_empty());
    let found = door.registry.referrers(repo, &subject, filter.clone(), after).await?;
    let mut headers = vec![(CONTENT_TYPE, media_types::INDEX.to_owned())];
    let mut query = String::new();
    if let Some(wanted) = &filter {
        headers.push((FILTERS_APPLIED, "artifactType".to_owned()));
        query = format!("&artifactType={}", encode(wanted));
    }
    if let Some(next) = &found.next {
        let link = format!("</v2/{repo}/referrers/{subject}?last={next}{query}>; rel=\"next\"");
        headers.push((LINK, link));
    }
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media_types::INDEX,
        "manifests": found.descriptors,
    });
    Ok(respond(StatusCode::OK, headers, Body::from(index.to_string())))
}

/// For a query: all but letters and digits as `%XX`.
fn encode(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

pub(super) async fn manifest(
    door: &Door,
    caller: &Caller<'_>,
    repo: &RepoName,
    reference: &str,
    request: Request,
) -> Answer {
    let method = request.method().clone();
    let parsed = Reference::parse(reference);
    if method == Method::PUT {
        return put_manifest(door, caller, repo, parsed?, request).await;
    }
    // What cannot be a tag is not here; only a push is told why.
    if let Err(RegistryError::TagInvalid(tag)) = parsed {
        return Err(RegistryError::ManifestUnknown(tag));
    }
    let reference = parsed?;
    match method {
        Method::GET | Method::HEAD => {
            let found = if method == Method::HEAD {
                door.registry.renew_manifest(repo, &reference).await?
            } else {
                door.registry.manifest(repo, &reference).await?
            };
            Ok(shown(found, method == Method::HEAD))
        }
        Method::DELETE => {
            // The body, which nobody reads, must not be held while we wait.
            let (request, _) = request.into_parts();
            delete_manifest(door, caller, repo, &reference, &request.extensions).await?;
            Ok(empty(StatusCode::ACCEPTED, Vec::new()))
        }
        other => Err(not_here(&other)),
    }
}

fn shown(found: Manifest, head: bool) -> Response {
    let headers = vec![
        (CONTENT_TYPE, found.media_type),
        (CONTENT_DIGEST, found.digest.to_string()),
        (ETAG, format!("\"{}\"", found.digest)),
        (CONTENT_LENGTH, found.bytes.len().to_string()),
    ];
    respond(StatusCode::OK, headers, if head { Body::empty() } else { Body::from(found.bytes) })
}

async fn put_manifest(
    door: &Door,
    caller: &Caller<'_>,
    repo: &RepoName,
    reference: Reference,
    request: Request,
) -> Answer {
    let (request, body) = request.into_parts();
    let media_type = request
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .unwrap_or_default()
        .trim()
        .to_owned();
    // A manifest is small: a client that takes longer than a stall for all of it is stuck.
    let reading = axum::body::to_bytes(body, MANIFEST_BYTES_MAX + 1);
    let bytes = tokio::time::timeout(door.registry.settings().stall, reading)
        .await
        .map_err(|_| RegistryError::BodyBroken)?
        .map_err(|error| {
            // One byte more than allowed is read, so a longer body is told from a broken one.
            let long = std::error::Error::source(&error)
                .is_some_and(|cause| cause.is::<http_body_util::LengthLimitError>());
            if long {
                RegistryError::ManifestTooLarge { limit: MANIFEST_BYTES_MAX }
            } else {
                RegistryError::BodyBroken
            }
        })?;
    let digest = Digest::of(&bytes);
    let keep = {
        let (protected, repo) = (Arc::clone(&door.protected), repo.clone());
        let (reference, digest) = (reference.clone(), digest.clone());
        move |held: Option<Digest>| {
            let Reference::Tag(_) = &reference else { return None };
            let version = protected.protects(&repo, &reference)?;
            // Pushing a version again as it is harms nothing, and clients do it.
            let same = held.as_ref() == Some(&digest)
                || protected.protects(&repo, &Reference::Digest(digest.clone()))
                    == Some(version.clone());
            (!same).then(|| {
                format!(
                    "{version} is a registered version and never changes: push {repo} under \
                     another tag"
                )
            })
        }
    };
    // Now, so that what is not done is not written down, and again when it is done: a version may be
    // registered while this is.
    let held = match &reference {
        Reference::Tag(tag) => door.registry.resolve_tag(repo, tag).await?,
        Reference::Digest(_) => None,
    };
    if let Some(why) = keep(held) {
        return Err(RegistryError::Denied(why));
    }
    let noted = Noting::Manifest(&reference, Some(digest));
    caller.note(&request.extensions, Action::Push, repo, noted).await?;
    let put = door.registry.put_manifest_if(repo, &reference, &media_type, bytes, keep).await?;
    let mut headers = vec![
        (LOCATION, format!("/v2/{repo}/manifests/{}", put.digest)),
        (CONTENT_DIGEST, put.digest.to_string()),
    ];
    if let Some(subject) = put.subject {
        headers.push((SUBJECT, subject.to_string()));
    }
    Ok(empty(StatusCode::CREATED, headers))
}

async fn delete_manifest(
    door: &Door,
    caller: &Caller<'_>,
    repo: &RepoName,
    reference: &Reference,
    extensions: &http::Extensions,
) -> Result<(), RegistryError> {
    let keep = {
        let (protected, repo) = (Arc::clone(&door.protected), repo.clone());
        move |reference: &Reference| {
            let version = protected.protects(&repo, reference)?;
            Some(format!(
                "{version} is a registered version: remove it with `berth model rm` first"
            ))
        }
    };
    // Now, so that what is not done is not written down, and again when it is done: a version may be
    // registered while this is.
    if let Some(why) = keep(reference) {
        return Err(RegistryError::Denied(why));
    }
    caller.note(extensions, Action::Delete, repo, Noting::Manifest(reference, None)).await?;
    match reference {
        Reference::Tag(tag) => door.registry.delete_tag_if(repo, tag, keep).await,
        Reference::Digest(digest) => door.registry.delete_manifest(repo, digest, keep).await,
    }
}

pub(super) async fn blob(
    door: &Door,
    caller: &Caller<'_>,
    repo: &RepoName,
    digest: &str,
    request: Request,
) -> Answer {
    // The body, which nobody reads, must not be held while we wait.
    let (request, _) = request.into_parts();
    let digest = parse_digest(digest)?;
    let mut headers = vec![
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_DIGEST, digest.to_string()),
        (ETAG, format!("\"{digest}\"")),
        (ACCEPT_RANGES, "bytes".to_owned()),
    ];
    match request.method {
        Method::HEAD => {
            let size = door.registry.blob_size(repo, &digest, true).await?;
            headers.push((CONTENT_LENGTH, size.to_string()));
            Ok(respond(StatusCode::OK, headers, Body::empty()))
        }
        Method::GET => {
            let place = door.registry.place_to_send().await?;
            let (file, size) = door.registry.open_blob(repo, &digest).await?;
            let held = request.headers.get(IF_NONE_MATCH).and_then(|held| held.to_str().ok());
            if held.is_some_and(|held| held.contains(digest.as_str())) {
                return Ok(respond(StatusCode::NOT_MODIFIED, headers, Body::empty()));
            }
            let (status, start, length) = match read_range(&request.headers, size)? {
                Some((start, end)) => {
                    headers.push((CONTENT_RANGE, format!("bytes {start}-{end}/{size}")));
                    (StatusCode::PARTIAL_CONTENT, start, end - start + 1)
                }
                None => (StatusCode::OK, 0, size),
            };
            headers.push((CONTENT_LENGTH, length.to_string()));
            let body = door.registry.read_stream(file, start, length, place);
            Ok(respond(status, headers, Body::from_stream(body)))
        }
        Method::DELETE => {
            // What is not here is not written down as deleted.
            door.registry.blob_size(repo, &digest, false).await?;
            let noted = Noting::Blob(&digest);
            caller.note(&request.extensions, Action::Delete, repo, noted).await?;
            door.registry.delete_blob(repo, &digest).await?;
            Ok(empty(StatusCode::ACCEPTED, Vec::new()))
        }
        _ => Err(not_here(&request.method)),
    }
}

/// First and last byte of a single range. What is no range of bytes, or several, is answered with
/// the whole, as RFC 9110 allows.
fn read_range(headers: &HeaderMap, size: u64) -> Result<Option<(u64, u64)>, RegistryError> {
    let asked = headers.get(RANGE).and_then(|range| range.to_str().ok());
    let Some((first, last)) = asked
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.split_once('-'))
    else {
        return Ok(None);
    };
    let outside = || RegistryError::RangeNotSatisfiable { size };
    let (start, end) = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(start), Ok(end)) if start <= end => (start, end.min(size.saturating_sub(1))),
        (Ok(start), Err(_)) if last.trim().is_empty() => (start, size.saturating_sub(1)),
        (Err(_), Ok(tail)) if first.trim().is_empty() => {
            if tail == 0 {
                return Err(outside());
            }
            (size.saturating_sub(tail), size.saturating_sub(1))
        }
        (Ok(_) | Err(_), Ok(_) | Err(_)) => return Ok(None),
    };
    if start >= size { Err(outside()) } else { Ok(Some((start, end))) }
}

/// Begins an upload; or mounts, or takes the whole blob at once.
pub(super) async fn begin(
    door: &Door,
    caller: &Caller<'_>,
    repo: &RepoName,
    params: Params,
    request: Request,
) -> Answer {
    if request.method() != Method::POST {
        return Err(not_here(request.method()));
    }
    if let Some(mount) = &params.mount {
        let digest = parse_digest(mount)?;
        // A source that is not a name, not there or not the caller's is answered in one way: upload
        // it. So nobody learns what is in a repository that is not theirs.
        let from = params.from.as_deref().and_then(|from| RepoName::parse(from).ok());
        if let Some(from) = from.filter(|from| caller.may(from, Action::Pull))
            && door.registry.mount_blob(&from, repo, &digest).await?
        {
            return Ok(created_blob(repo, &digest));
        }
    }
    let expected = params.digest.as_deref().map(parse_digest).transpose()?;
    let at = Placement { start: None, length: content_length(request.headers()) };
    let by = Some(caller.subject());
    if let (Some(expected), None) = (&expected, &params.mount) {
        let body = request.into_body().into_data_stream();
        door.registry.take_whole(repo, by, at, body, Some(expected)).await?;
        return Ok(created_blob(repo, expected));
    }
    let id = door.registry.begin_upload_by(repo, by).await?;
    Ok(empty(StatusCode::ACCEPTED, upload_headers(repo, id, 0)))
}

pub(super) async fn upload(
    door: &Door,
    repo: &RepoName,
    id: &str,
    params: Params,
    request: Request,
) -> Answer {
    let id = Uuid::try_parse(id).map_err(|_| RegistryError::UploadUnknown)?;
    let registry = &door.registry;
    match *request.method() {
        Method::GET | Method::HEAD => {
            let offset = registry.upload_offset(repo, id).await?;
            Ok(empty(StatusCode::NO_CONTENT, upload_headers(repo, id, offset)))
        }
        Method::PATCH => {
            let at = placement(request.headers())?;
            let body = request.into_body().into_data_stream();
            let offset = registry.append_upload(repo, id, at, body).await?;
            Ok(empty(StatusCode::ACCEPTED, upload_headers(repo, id, offset)))
        }
        Method::PUT => {
            let digest = params.digest.unwrap_or_default();
            let expected = parse_digest(&digest)?;
            let at = placement(request.headers())?;
            let body = request.into_body().into_data_stream();
            registry.finish_upload(repo, id, at, body, Some(&expected)).await?;
            Ok(created_blob(repo, &expected))
        }
        Method::DELETE => {
            registry.cancel_upload(repo, id).await?;
            Ok(empty(StatusCode::NO_CONTENT, Vec::new()))
        }
        _ => Err(not_here(request.method())),
    }
}

fn created_blob(repo: &RepoName, digest: &Digest) -> Response {
    let location = format!("/v2/{repo}/blobs/{digest}");
    empty(StatusCode::CREATED, vec![(LOCATION, location), (CONTENT_DIGEST, digest.to_string())])
}

fn upload_headers(repo: &RepoName, id: Uuid, offset: u64) -> Vec<(HeaderName, String)> {
    vec![
        (LOCATION, upload_location(repo, id)),
        (RANGE, held_range(offset)),
        (UPLOAD_UUID, id.to_string()),
    ]
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Where a chunk belongs: `Content-Range: first-last`, with or without `bytes` and a total.
fn placement(headers: &HeaderMap) -> Result<Placement, RegistryError> {
    let length = content_length(headers);
    let Some(range) = headers.get(CONTENT_RANGE) else {
        return Ok(Placement { start: None, length });
    };
    let invalid = || {
        RegistryError::UploadInvalid(
            "Content-Range must be the chunk's first and last byte, as in 0-1023".to_owned(),
        )
    };
    let text = range.to_str().map_err(|_| invalid())?;
    let text = text.strip_prefix("bytes").unwrap_or(text).trim_start_matches([' ', '=']);
    let text = text.split('/').next().unwrap_or_default();
    let (first, last) = text.split_once('-').ok_or_else(invalid)?;
    let first: u64 = first.trim().parse().map_err(|_| invalid())?;
    let last: u64 = last.trim().parse().map_err(|_| invalid())?;
    // `0-0` with an empty body is how some say "nothing".
    let said = last.checked_sub(first).ok_or_else(invalid)?.saturating_add(1);
    match length {
        Some(0) => Ok(Placement { start: None, length }),
        Some(length) if length != said => Err(RegistryError::UploadInvalid(format!(
            "Content-Range says {said} bytes, Content-Length {length}"
        ))),
        Some(_) | None => Ok(Placement { start: Some(first), length: Some(said) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str, size: u64) -> Result<Option<(u64, u64)>, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, text.parse().unwrap());
        read_range(&headers, size)
    }

    #[test]
    fn a_single_range_is_cut_to_the_blob() {
        assert_eq!(range("bytes=0-9", 100).unwrap(), Some((0, 9)));
        assert_eq!(range("bytes=90-200", 100).unwrap(), Some((90, 99)));
        assert_eq!(range("bytes=90-", 100).unwrap(), Some((90, 99)));
        assert_eq!(range("bytes=-10", 100).unwrap(), Some((90, 99)));
        assert_eq!(range("bytes=-500", 100).unwrap(), Some((0, 99)));
    }

    #[test]
    fn what_is_no_single_range_gets_the_whole() {
        for text in ["bytes=9-0", "bytes=a-b", "lines=0-9", "bytes=0-1,5-6", "bytes=-"] {
            assert_eq!(range(text, 100).unwrap(), None, "{text}");
        }
    }

    #[test]
    fn a_range_past_the_end_is_refused() {
        assert!(range("bytes=100-", 100).is_err());
        assert!(range("bytes=100-200", 100).is_err());
        assert!(range("bytes=-0", 100).is_err());
        assert!(range("bytes=0-", 0).is_err());
    }

    #[test]
    fn ranges_that_contradict_themselves_are_refused() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_RANGE, "0-9".parse().unwrap());
        headers.insert(CONTENT_LENGTH, "11".parse().unwrap());
        assert!(placement(&headers).is_err());
        headers.insert(CONTENT_LENGTH, "10".parse().unwrap());
        let at = placement(&headers).unwrap();
        assert_eq!((at.start, at.length), (Some(0), Some(10)));
        headers.insert(CONTENT_RANGE, "9-0".parse().unwrap());
        assert!(placement(&headers).is_err());
    }
}
