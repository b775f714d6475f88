//! A model's two names: the one its callers use and the one its program knows.
//!
//! Callers ask for the deployment, outside of the namespace `default` by `<namespace>.<deployment>`;
//! the program serves what `spec.servedModel` says, which is the deployment's name where nothing is
//! said. The one is put in the other's place in the request and, where it leads it, in the answer, so
//! that a caller finds the name it asked for. Everything else passes undecoded: an answer that does
//! not name the model within its first bytes, or is compressed, is left as it is.

use super::grpc::{FRAMING, framing_of};
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, Response, Uri, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use std::fmt::Write as _;
use std::ops::Range;
use tokio_stream::StreamExt as _;

/// What is looked at of an answer: servers name the model first, or behind their request's id.
const LOOKED_AT: usize = 16 * 1024;
/// Before a model's name in a path.
const MODELS: &str = "/v2/models/";
/// Length of the JSON in front of binary tensors.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Where a request and its answer name the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Naming {
    /// Nowhere that is known: plain HTTP.
    Nowhere,
    /// In the path; in the answer the JSON object's `model_name` or `name`.
    Path,
    /// In field 1 of a gRPC message, both ways.
    Field {
        /// The name that stands there now.
        written: String,
    },
}

/// The same path, with this name as the model's.
pub(super) fn in_path(uri: &Uri, name: &str) -> Result<Uri, http::Error> {
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let Some(rest) = path.strip_prefix(MODELS) else { return Ok(uri.clone()) };
    let rest = rest.find(['/', '?']).map_or("", |at| &rest[at..]);
    let mut renamed = MODELS.to_owned();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            renamed.push(char::from(byte));
        } else {
            let _ = write!(renamed, "%{byte:02X}");
        }
    }
    Ok(Uri::try_from(renamed + rest)?)
}

/// The answer of a replica that knows the model as `served`, for a caller that asked for `asked`.
pub(super) async fn answered(
    response: Response<Body>,
    naming: &Naming,
    served: &str,
    asked: &str,
) -> Response<Body> {
    let renamed: fn(&[u8], &str, &str) -> Look = match naming {
        Naming::Nowhere => return response,
        Naming::Path => in_json,
        Naming::Field { .. } => in_message,
    };
    let (mut parts, mut body) = response.into_parts();
    let coded = parts.headers.contains_key(header::CONTENT_ENCODING);
    // An answer without a body stays one: gRPC tells an error by that.
    let empty = http_body::Body::is_end_stream(&body);
    if served == asked || coded || empty || !parts.status.is_success() {
        return Response::from_parts(parts, body);
    }
    let mut head = BytesMut::new();
    let mut next = None;
    let found = loop {
        match renamed(&head, served, asked) {
            Look::Found(renamed) => break Some(renamed),
            Look::Never => break None,
            Look::More if head.len() >= LOOKED_AT || next.is_some() => break None,
            Look::More => {}
        }
        match body.frame().await.map(|frame| frame.map(Frame::into_data)) {
            None => break None,
            Some(Ok(Ok(data))) => head.extend_from_slice(&data),
            // Trailers, or the end of it before its end.
            Some(Ok(Err(frame))) => next = Some(Ok(frame)),
            Some(Err(error)) => next = Some(Err(error)),
        }
    };
    let head = match found {
        None => head.freeze(),
        Some(Renamed { at, with }) => {
            let (before, after) = (head.len(), head.len() + with.len() - at.len());
            for name in [header::CONTENT_LENGTH, JSON_LENGTH] {
                lengthen(&mut parts.headers, &name, before, after);
            }
            let (front, back) = (&head[..at.start], &head[at.end..]);
            Bytes::from([front, &with, back].concat())
        }
    };
    let first = (!head.is_empty()).then(|| Ok(Frame::data(head)));
    let rest = futures_util::stream::unfold(body, async |mut body| {
        let frame = body.frame().await?;
        Some((frame, body))
    });
    let frames = tokio_stream::iter(first.into_iter().chain(next)).chain(rest);
    Response::from_parts(parts, Body::new(StreamBody::new(frames)))
}

/// What a look at an answer's head comes to.
enum Look {
    /// The name is here.
    Found(Renamed),
    /// It does not name the model by that name, whatever comes.
    Never,
    /// What is here does not tell.
    More,
}

/// What stands in the place of a part of an answer's head.
struct Renamed {
    at: Range<usize>,
    with: Vec<u8>,
}

fn lengthen(headers: &mut HeaderMap, name: &HeaderName, before: usize, after: usize) {
    let Some(value) = headers.get_mut(name) else { return };
    let length = value.to_str().ok().and_then(|text| text.parse::<usize>().ok());
    if let Some(length) = length.and_then(|length| length.checked_add(after)?.checked_sub(before)) {
        *value = length.into();
    }
}

/// The first field of a message, when it is the model's name.
fn in_message(head: &[u8], served: &str, asked: &str) -> Look {
    let field = |name: &str| {
        let mut field = Vec::new();
        prost::encoding::string::encode(1, &name.to_owned(), &mut field);
        field
    };
    let (old, new) = (field(served), field(asked));
    let Some((framing, message)) = head.split_at_checked(FRAMING) else { return Look::More };
    let length = u32::from_be_bytes([framing[1], framing[2], framing[3], framing[4]]) as usize;
    let here = message.len().min(old.len());
    if framing[0] != 0 || length < old.len() || message[..here] != old[..here] {
        return Look::Never;
    }
    if here < old.len() {
        return Look::More;
    }
    let mut with = framing_of(length - old.len() + new.len()).to_vec();
    with.extend(new);
    Look::Found(Renamed { at: 0..FRAMING + old.len(), with })
}

/// The name in a JSON object that is an answer, when it is here.
fn in_json(head: &[u8], served: &str, asked: &str) -> Look {
    match head.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => return Look::More,
        Some(b'{') => {}
        Some(_) => return Look::Never,
    }
    let at = match member(head, &[b"\"model_name\"", b"\"name\""]) {
        Ok(at) => at,
        Err(look) => return look,
    };
    if serde_json::from_slice::<String>(&head[at.clone()]).is_ok_and(|it| it == served) {
        let with = serde_json::Value::from(asked).to_string().into_bytes();
        Look::Found(Renamed { at, with })
    } else {
        Look::Never
    }
}

/// Where the text stands that the outermost object has under one of these keys, quotes included. What
/// follows the object, as binary tensors do, is not looked at.
fn member(json: &[u8], keys: &[&[u8]]) -> Result<Range<usize>, Look> {
    let mut depth = 0_usize;
    // The key that was read last, until what it stands for begins.
    let mut key = None;
    let mut at = 0;
    while let Some(byte) = json.get(at) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return Err(Look::Never);
                }
            }
            b',' => key = None,
            b'"' => {
                let end = text_end(json, at).ok_or(Look::More)?;
                let text = &json[at..end];
                match key {
                    None if depth == 1 => key = Some(text),
                    Some(key) if depth == 1 && keys.contains(&key) => return Ok(at..end),
                    None | Some(_) => {}
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    Err(Look::More)
}

/// Behind the closing quote of the text that begins at `from`.
fn text_end(json: &[u8], from: usize) -> Option<usize> {
    let mut at = from + 1;
    loop {
        match json.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::inference::{ModelInferResponse, ModelReadyResponse};
    use prost::Message as _;

    /// What a caller of `asked` gets of an answer, sent in pieces, by a program that knows `served`.
    async fn heard(
        naming: &Naming,
        (served, asked): (&str, &str),
        answer: &[u8],
        piece: usize,
        headers: &[(HeaderName, usize)],
    ) -> (HeaderMap, Vec<u8>) {
        let pieces: Vec<_> = answer
            .chunks(piece)
            .map(|p| Ok::<_, std::io::Error>(Bytes::copy_from_slice(p)))
            .collect();
        let mut response = Response::new(Body::from_stream(tokio_stream::iter(pieces)));
        for (name, value) in headers {
            response.headers_mut().insert(name, (*value).into());
        }
        let (parts, body) = answered(response, naming, served, asked).await.into_parts();
        (parts.headers, body.collect().await.unwrap().to_bytes().to_vec())
    }

    #[test]
    fn the_name_in_a_path_is_exchanged_and_nothing_that_looks_like_it() {
        for (given, name, path) in [
            (
                "/v2/models/prod.iris/versions/3/infer?a=b",
                "iris",
                "/v2/models/iris/versions/3/infer?a=b",
            ),
            ("/v2/models/models/infer", "iris-sklearn", "/v2/models/iris-sklearn/infer"),
            ("/v2/models/v?x=/y", "a b%", "/v2/models/a%20b%25?x=/y"),
            ("/v2/models/ir%69s/ready", "ä", "/v2/models/%C3%A4/ready"),
            ("/v2/models/iris", "Iris_2", "/v2/models/Iris_2"),
        ] {
            assert_eq!(in_path(&given.parse().unwrap(), name).unwrap(), path, "{given}");
        }
    }

    #[tokio::test]
    async fn a_caller_finds_the_name_it_asked_for_in_json_and_all_lengths_are_right() {
        let names = ("iris-sklearn", "edge.iris");
        let big =
            format!(r#","outputs":[{{"name":"iris-sklearn","data":[{}1]}}]"#, "1,".repeat(9000));
        for (given, wanted) in [
            (r#"{"model_name":"iris-sklearn","id":"1"}"#, r#"{"model_name":"edge.iris","id":"1"}"#),
            (
                r#"{"name": "iris-sklearn", "versions":["1"]}"#,
                r#"{"name": "edge.iris", "versions":["1"]}"#,
            ),
            // Not the outermost object's, not as a value, not another name, not behind an escape.
            (
                r#"{"id":"\"model_name","o":[{"name":"iris-sklearn"}],"model_name":"iris-sklearn"}"#,
                r#"{"id":"\"model_name","o":[{"name":"iris-sklearn"}],"model_name":"edge.iris"}"#,
            ),
            (
                r#"{"id":"model_name","x":"iris-sklearn"}"#,
                r#"{"id":"model_name","x":"iris-sklearn"}"#,
            ),
            (r#"{"model_name":"other"}"#, r#"{"model_name":"other"}"#),
            (r#"["model_name","iris-sklearn"]"#, r#"["model_name","iris-sklearn"]"#),
            // Behind the object come tensors, which may look like anything.
            (
                r#"{"id":"1"}{"model_name":"iris-sklearn"}"#,
                r#"{"id":"1"}{"model_name":"iris-sklearn"}"#,
            ),
            ("no JSON", "no JSON"),
            ("", ""),
        ] {
            for piece in [1, 7, 1000] {
                let lengths = [(header::CONTENT_LENGTH, given.len()), (JSON_LENGTH, given.len())];
                let (headers, got) =
                    heard(&Naming::Path, names, given.as_bytes(), piece, &lengths).await;
                assert_eq!(String::from_utf8(got).unwrap(), wanted, "{given}");
                for name in [header::CONTENT_LENGTH, JSON_LENGTH] {
                    assert_eq!(headers[name], wanted.len().to_string(), "{given}");
                }
            }
        }
        let long = format!(r#"{{"model_name":"iris-sklearn"{big}}}"#);
        let (_, got) = heard(&Naming::Path, names, long.as_bytes(), 4096, &[]).await;
        assert_eq!(String::from_utf8(got).unwrap(), long.replacen("iris-sklearn", "edge.iris", 1));
        // What is too far behind is left, and so is what was compressed all the same.
        let late = format!(r#"{{"x":0{big},"model_name":"iris-sklearn"}}"#);
        let (_, got) = heard(&Naming::Path, names, late.as_bytes(), 4096, &[]).await;
        assert_eq!(String::from_utf8(got).unwrap(), late);
        let coded = [(header::CONTENT_ENCODING, 1)];
        let (_, got) = heard(&Naming::Path, names, long.as_bytes(), 4096, &coded).await;
        assert_eq!(String::from_utf8(got).unwrap(), long);
    }

    #[tokio::test]
    async fn an_answer_without_a_body_stays_without_one() {
        // By an empty stream's end gRPC tells that an error stands in the head.
        let naming = Naming::Field { written: "iris".to_owned() };
        let told = answered(Response::new(Body::empty()), &naming, "iris", "edge.iris").await;
        assert!(http_body::Body::is_end_stream(told.body()));
    }

    #[tokio::test]
    async fn what_cannot_be_the_name_any_more_is_not_waited_for() {
        for (naming, start) in [
            (Naming::Path, &b"no JSON"[..]),
            (Naming::Path, br#"{"name":"other""#),
            (Naming::Field { written: "iris".to_owned() }, b"\0\0\0\0\x09\x0a\x05o"),
        ] {
            let first = tokio_stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(start))]);
            let never = first.chain(tokio_stream::pending());
            let response = Response::new(Body::from_stream(never));
            let mut told = answered(response, &naming, "iris", "edge.iris").await.into_body();
            let frame = told.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), start);
        }
    }

    #[tokio::test]
    async fn a_caller_finds_the_name_it_asked_for_in_field_1_and_the_same_tensors() {
        let framed = |message: Vec<u8>| [&framing_of(message.len())[..], &message].concat();
        let naming = Naming::Field { written: "iris-sklearn".to_owned() };
        let names = ("iris-sklearn", "edge.iris");
        let mut answer = ModelInferResponse {
            model_name: "iris-sklearn".into(),
            model_version: "3".into(),
            raw_output_contents: vec![vec![7; 100_000]],
            ..Default::default()
        };
        let given = framed(answer.encode_to_vec());
        answer.model_name = "edge.iris".into();
        for piece in [1, 1000, 1_000_000] {
            let (_, got) = heard(&naming, names, &given, piece, &[]).await;
            assert!(got == framed(answer.encode_to_vec()), "in pieces of {piece}");
        }
        for other in [
            framed(ModelReadyResponse { ready: true }.encode_to_vec()),
            framed(
                ModelInferResponse { model_name: "other".into(), ..Default::default() }
                    .encode_to_vec(),
            ),
            Vec::new(),
        ] {
            assert_eq!(heard(&naming, names, &other, 3, &[]).await.1, other);
        }
    }
}
