//! What an ONNX file says of itself: inputs, outputs, and who made it.
//!
//! Reads the few fields that tell and skips the weights, so that a model of gigabytes costs no
//! memory. (onnx.proto: ModelProto.producer_name = 2, producer_version = 3, graph = 7;
//! GraphProto.initializer = 5, input = 11, output = 12; ValueInfoProto.name = 1, type = 2.)

use berth_proto::api::TensorSpec;
use prost::encoding::{WireType, decode_key, decode_varint};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// One field that is read into memory: a signature takes kilobytes.
const MAX_FIELD: u64 = 1024 * 1024;
/// Fields looked at before the file is taken for nonsense.
const MAX_FIELDS: usize = 10_000_000;

/// What was found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct About {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
    /// `name version` of the tool that wrote it; empty: not said.
    pub producer: String,
}

/// Reads a file; `None` when it is no ONNX model.
pub fn about(path: &Path) -> Option<About> {
    let file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    model(&mut BufReader::new(file), length)
}

/// A field's number, and where its content begins and ends.
struct Field {
    tag: u32,
    end: u64,
}

fn varint(from: &mut impl Read) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let mut byte = [0];
        from.read_exact(&mut byte).ok()?;
        value |= u64::from(byte[0] & 0x7f).checked_shl(shift)?;
        if byte[0] & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The next field; the reader stands at its content then.
fn next(from: &mut (impl Read + Seek), end: u64) -> Option<Field> {
    let key = varint(from)?;
    let tag = u32::try_from(key >> 3).ok().filter(|tag| *tag > 0)?;
    let length = match key & 7 {
        0 => {
            varint(from)?;
            0
        }
        1 => 8,
        2 => varint(from)?,
        5 => 4,
        _ => return None,
    };
    let end_of_field = from.stream_position().ok()?.checked_add(length)?;
    (end_of_field <= end).then_some(Field { tag, end: end_of_field })
}

fn content(from: &mut (impl Read + Seek), field: &Field) -> Option<Vec<u8>> {
    let length = field.end.checked_sub(from.stream_position().ok()?)?;
    if length > MAX_FIELD {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    from.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn text(from: &mut (impl Read + Seek), field: &Field) -> Option<String> {
    String::from_utf8(content(from, field)?).ok()
}

fn model(from: &mut (impl Read + Seek), end: u64) -> Option<About> {
    let (mut about, mut version) = (None, String::new());
    let mut producer = String::new();
    for _ in 0..MAX_FIELDS {
        if from.stream_position().ok()? >= end {
            let mut about: About = about?;
            about.producer = format!("{producer} {version}").trim().to_owned();
            return Some(about);
        }
        let field = next(from, end)?;
        match field.tag {
            2 => producer = text(from, &field)?,
            3 => version = text(from, &field)?,
            7 => about = Some(graph(from, field.end)?),
            _ => {}
        }
        from.seek(SeekFrom::Start(field.end)).ok()?;
    }
    None
}

fn graph(from: &mut (impl Read + Seek), end: u64) -> Option<About> {
    let mut about = About::default();
    // Weights may be listed as inputs, too.
    let mut weights = Vec::new();
    for _ in 0..MAX_FIELDS {
        if from.stream_position().ok()? >= end {
            about.inputs.retain(|input| !weights.contains(&input.name));
            return Some(about);
        }
        let field = next(from, end)?;
        match field.tag {
            5 => weights.extend(name_of_weight(from, field.end)),
            11 => about.inputs.extend(tensor(&content(from, &field)?)),
            12 => about.outputs.extend(tensor(&content(from, &field)?)),
            _ => {}
        }
        from.seek(SeekFrom::Start(field.end)).ok()?;
    }
    None
}

/// TensorProto.name is 8; all else of it is skipped.
fn name_of_weight(from: &mut (impl Read + Seek), end: u64) -> Option<String> {
    while from.stream_position().ok()? < end {
        let field = next(from, end)?;
        if field.tag == 8 {
            return text(from, &field);
        }
        from.seek(SeekFrom::Start(field.end)).ok()?;
    }
    None
}

fn tensor(bytes: &[u8]) -> Option<TensorSpec> {
    let info = fields(bytes)?;
    let name = String::from_utf8(first(&info, 1)?.to_vec()).ok()?;
    let kind = fields(first(&info, 2)?)?;
    let tensor = fields(first(&kind, 1)?)?;
    let datatype = match number(first(&tensor, 1)?)? {
        1 => "FP32",
        2 => "UINT8",
        3 => "INT8",
        4 => "UINT16",
        5 => "INT16",
        6 => "INT32",
        7 => "INT64",
        8 => "BYTES",
        9 => "BOOL",
        10 => "FP16",
        11 => "FP64",
        12 => "UINT32",
        13 => "UINT64",
        16 => "BF16",
        _ => "OTHER",
    };
    let shape = first(&tensor, 2)
        .and_then(fields)
        .unwrap_or_default()
        .iter()
        .map(|(_, dimension)| {
            let value = fields(dimension).and_then(|f| number(first(&f, 1)?));
            value.and_then(|v| i64::try_from(v).ok()).unwrap_or(-1)
        })
        .collect();
    Some(TensorSpec { name, datatype: datatype.to_owned(), shape })
}

fn first<'a>(fields: &[(u32, &'a [u8])], tag: u32) -> Option<&'a [u8]> {
    fields.iter().find(|(t, _)| *t == tag).map(|(_, bytes)| *bytes)
}

fn number(mut bytes: &[u8]) -> Option<u64> {
    decode_varint(&mut bytes).ok()
}

/// The fields of a small message: tag and bytes (for numbers, their encoding).
fn fields(mut bytes: &[u8]) -> Option<Vec<(u32, &[u8])>> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (tag, wire) = decode_key(&mut bytes).ok()?;
        let length = match wire {
            WireType::Varint => {
                let before = bytes;
                decode_varint(&mut bytes).ok()?;
                out.push((tag, &before[..before.len() - bytes.len()]));
                continue;
            }
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut bytes).ok()?).ok()?,
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let (value, rest) = bytes.split_at_checked(length)?;
        out.push((tag, value));
        bytes = rest;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    fn sample(name: &str) -> Vec<u8> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models");
        std::fs::read(root.join(name)).unwrap()
    }

    fn read(bytes: &[u8]) -> Option<About> {
        model(&mut Cursor::new(bytes), bytes.len() as u64)
    }

    #[test]
    fn the_sample_models_tell_their_inputs_and_outputs() {
        let iris = read(&sample("iris/model.onnx")).unwrap();
        let input = &iris.inputs[0];
        assert_eq!((input.datatype.as_str(), input.shape.as_slice()), ("FP32", &[-1, 4][..]));
        assert!(!iris.outputs.is_empty());
        assert!(!iris.producer.is_empty());
        let digits = read(&sample("digits/model.onnx")).unwrap();
        assert_eq!(digits.inputs.len(), 1);
        assert_eq!(digits.inputs[0].shape, [-1, 1, 8, 8]);
    }

    #[test]
    fn nonsense_is_no_model() {
        assert_eq!(read(b"nonsense"), None);
        assert_eq!(read(b""), None);
        let cut = sample("iris/model.onnx");
        assert_eq!(read(&cut[..cut.len() / 2]), None);
    }

    proptest! {
        /// Any bytes are answered, and quickly.
        #[test]
        fn damaged_files_are_answered(at in 0_usize..2000, byte in any::<u8>()) {
            let mut bytes = sample("iris/model.onnx");
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = read(&bytes);
        }
    }
}
