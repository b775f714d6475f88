//! What can go wrong at the registry door, and the only place that turns it into an HTTP answer.
//!
//! The body is the form of the OCI distribution specification: `{"errors": [{code, message,
//! detail}]}`. Codes are the specification's; `INTERNAL` and `UNAVAILABLE` are ours, for what it has
//! no word for. Causes inside the server go to the log, never to a client.

use super::names::RepoName;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use berth_proto::ids::Digest;
use http::header::{
    CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderValue, StatusCode};
use std::io;

/// Why the registry did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The path names nothing this door has.
    #[error("there is nothing at this path; see the OCI distribution specification v1.1")]
    NoSuchPath,
    /// The query cannot be read.
    #[error("the query cannot be read: {0}")]
    QueryInvalid(String),
    /// A repository's name has another form.
    #[error(
        "repository \"{0}\" is not a name: 1 to 8 segments of a-z, 0-9 and single '.', '_', '-' \
         between them, at most 255 characters"
    )]
    NameInvalid(String),
    /// The repository does not exist, or nothing was pushed to it yet.
    #[error("repository \"{0}\" does not exist")]
    NameUnknown(RepoName),
    /// A tag has another form.
    #[error(
        "tag \"{0}\" is not a tag: 1 to 128 of a-z, A-Z, 0-9, '_', '.', '-', not beginning with \
         '.' or '-'"
    )]
    TagInvalid(String),
    /// A digest has another form, or is missing.
    #[error("\"{0}\" is not a digest: sha256: and 64 of 0-9a-f")]
    DigestInvalid(String),
    /// A digest of an algorithm that is not kept here.
    #[error("digests made with {0} are not supported here, use sha256")]
    DigestUnsupported(String),
    /// The content is not what the digest says.
    #[error("the content has digest {found}, not {expected}; nothing was stored")]
    DigestMismatch {
        /// What was announced.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// The blob is not in that repository.
    #[error("blob {0} is not in this repository")]
    BlobUnknown(Digest),
    /// The upload ended, was given up, or never was.
    #[error("this upload does not exist (any more); begin a new one")]
    UploadUnknown,
    /// The request does not fit the upload.
    #[error("{0}")]
    UploadInvalid(String),
    /// The chunk does not begin where the upload is.
    #[error("the upload has {offset} bytes; the next chunk must begin there")]
    UploadRange {
        /// Bytes held.
        offset: u64,
        /// Where the upload is continued.
        location: String,
    },
    /// The client sent nothing for too long, or its connection broke.
    #[error("the body ended early; what came is kept, go on from the upload's offset")]
    BodyBroken,
    /// A range outside of the blob.
    #[error("the range is not within the blob's {size} bytes")]
    RangeNotSatisfiable {
        /// The blob's size.
        size: u64,
    },
    /// The manifest is not in that repository.
    #[error("manifest {0} is not in this repository")]
    ManifestUnknown(String),
    /// The manifest cannot be used.
    #[error("{0}")]
    ManifestInvalid(String),
    /// The manifest is too large.
    #[error("a manifest may have at most {limit} bytes")]
    ManifestTooLarge {
        /// Bytes.
        limit: usize,
    },
    /// The manifest names what is not in the repository; push that first.
    #[error("the manifest names {} that are not in this repository", count(.0))]
    ManifestBlobUnknown(Vec<Digest>),
    /// The caller is nobody the server knows.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The caller may not, or nobody may.
    #[error("{0}")]
    Denied(String),
    /// Not offered.
    #[error("{0}")]
    Unsupported(String),
    /// A bound of the server is reached; the same request may do later.
    #[error("{0}")]
    TooMany(&'static str),
    /// Less free disk than the rule keeps.
    #[error(
        "the registry's disk has less than {min_free_percent} % free and takes no uploads: delete \
         versions or tags, run `berth registry gc`, or give it a larger disk"
    )]
    DiskFull {
        /// The rule.
        min_free_percent: u8,
    },
    /// The disk has no byte left, or none for this user.
    #[error(
        "the registry's disk is full, found while {doing}: delete versions or tags, run `berth registry \
         gc`, or give it a larger disk"
    )]
    NoRoom {
        /// What was tried.
        doing: &'static str,
        /// As the disk says it.
        #[source]
        source: io::Error,
    },
    /// Something the server needs to judge the caller is not there.
    #[error("{0}")]
    Unavailable(&'static str),
    /// The disk did not do it.
    #[error("the registry's storage failed while {doing}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn count(digests: &[Digest]) -> String {
    match digests {
        [one] => format!("{one}, one of the digests"),
        more => format!("{} digests", more.len()),
    }
}

/// For `map_err`: what was being done when the disk failed.
pub(super) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> RegistryError {
    move |source| {
        if crate::store::folder::is_full(&source) {
            RegistryError::NoRoom { doing, source }
        } else {
            RegistryError::Io { doing, source }
        }
    }
}

impl RegistryError {
    /// Status and code. 4xx: the caller changes something; 429, 503: the same later; 507: the
    /// operator makes room.
    #[must_use]
    pub fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NoSuchPath => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
            Self::QueryInvalid(_) => (StatusCode::BAD_REQUEST, "UNSUPPORTED"),
            Self::NameInvalid(_) => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            Self::NameUnknown(_) => (StatusCode::NOT_FOUND, "NAME_UNKNOWN"),
            Self::TagInvalid(_) | Self::ManifestInvalid(_) => {
                (StatusCode::BAD_REQUEST, "MANIFEST_INVALID")
            }
            Self::DigestInvalid(_) | Self::DigestMismatch { .. } => {
                (StatusCode::BAD_REQUEST, "DIGEST_INVALID")
            }
            Self::DigestUnsupported(_) => (StatusCode::BAD_REQUEST, "UNSUPPORTED"),
            Self::BlobUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            Self::UploadUnknown => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            Self::UploadInvalid(_) | Self::BodyBroken => {
                (StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID")
            }
            Self::UploadRange { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            Self::RangeNotSatisfiable { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID"),
            Self::ManifestUnknown(_) => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN"),
            Self::ManifestTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            Self::ManifestBlobUnknown(_) => (StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN"),
            Self::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
            Self::Denied(_) => (StatusCode::FORBIDDEN, "DENIED"),
            Self::Unsupported(_) => (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED"),
            Self::TooMany(_) => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            Self::DiskFull { .. } | Self::NoRoom { .. } => {
                (StatusCode::INSUFFICIENT_STORAGE, "DENIED")
            }
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
            Self::Io { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
        }
    }

    fn detail(&self) -> serde_json::Value {
        if let Self::ManifestBlobUnknown(missing) = self {
            // 20 are enough to see what is wrong; an answer of thousands helps nobody.
            missing.iter().take(20).map(|digest| serde_json::json!({"digest": digest})).collect()
        } else if let Self::BlobUnknown(digest) = self {
            serde_json::json!({"digest": digest})
        } else if let Self::NameUnknown(name) = self {
            serde_json::json!({"name": name.as_str()})
        } else {
            serde_json::Value::Null
        }
    }

    fn header(&self) -> Vec<(HeaderName, String)> {
        if let Self::UploadRange { offset, location } = self {
            vec![(RANGE, held_range(*offset)), (LOCATION, location.clone())]
        } else if let Self::RangeNotSatisfiable { size } = self {
            vec![(CONTENT_RANGE, format!("bytes */{size}"))]
        } else if let Self::Unauthorized(_) = self {
            // Basic and not Bearer: docker, podman and skopeo all send the token as password with
            // every request, and no second endpoint has to know how the door is reached from
            // outside. A bearer token is taken as well.
            vec![(WWW_AUTHENTICATE, "Basic realm=\"berth\", charset=\"UTF-8\"".to_owned())]
        } else if matches!(self, Self::TooMany(_) | Self::Unavailable(_)) {
            vec![(RETRY_AFTER, "2".to_owned())]
        } else {
            Vec::new()
        }
    }
}

/// What a caller gets that waited for an answer and no longer may.
pub fn ended(_: &http::HeaderMap, _: &crate::error::Error) -> Response {
    RegistryError::Unauthorized("the token or certificate is not valid here any more")
        .into_response()
}

/// `0-N` with N the last byte held; `0-0` while nothing is, as other registries say it.
pub(super) fn held_range(offset: u64) -> String {
    format!("0-{}", offset.saturating_sub(1))
}

impl IntoResponse for RegistryError {
    fn into_response(self) -> Response {
        let (status, code) = self.status();
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(
                error = &self as &dyn std::error::Error,
                "the registry's storage failed"
            );
        } else if status == StatusCode::INSUFFICIENT_STORAGE {
            tracing::warn!(error = &self as &dyn std::error::Error, "an upload was refused");
        }
        let body = serde_json::json!({
            "errors": [{"code": code, "message": self.to_string(), "detail": self.detail()}]
        });
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in self.header() {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        }
        response
    }
}
