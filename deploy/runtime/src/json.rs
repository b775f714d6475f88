//! Inference requests and responses in JSON, with the protocol's binary extension.
//!
//! Elements in JSON may be a flat list or nested ones in the tensor's shape. With the extension, the
//! bytes of some tensors follow the JSON in the same body, whose length then stands in a header.

use std::fmt;

use bytes::{Bytes, BytesMut};
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::ser::{SerializeSeq, Serializer};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::signature::{Signature, TensorSpec};
use crate::tensor::{BadElement, Datatype, Elements, InputError, Tensor};

/// The header that tells how long the JSON is when bytes follow it.
pub const JSON_LENGTH: &str = "inference-header-content-length";

/// The options that are understood; all others are ignored, as the protocol asks.
#[derive(Clone, Debug, Default, Deserialize)]
struct Options {
    binary_data_size: Option<usize>,
    binary_data: Option<bool>,
    binary_data_output: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Request {
    id: Option<String>,
    #[serde(default)]
    parameters: Options,
    inputs: Vec<Input>,
    #[serde(default)]
    outputs: Vec<Wanted>,
}

#[derive(Debug, Deserialize)]
struct Input {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Options,
    data: Option<Literals>,
}

#[derive(Debug, Deserialize)]
struct Wanted {
    name: String,
    #[serde(default)]
    parameters: Options,
}

/// An inference request that fits the model.
#[derive(Debug)]
pub struct Infer {
    /// The caller's id.
    pub id: Option<String>,
    /// The inputs with their places in the signature.
    pub inputs: Vec<(usize, Tensor)>,
    /// The places of the wanted outputs.
    pub wanted: Vec<usize>,
    /// For each of them, whether it is to be sent as bytes.
    pub binary: Vec<bool>,
}

/// Reads a request. `json_length` is the value of [`JSON_LENGTH`], when there is one.
///
/// # Errors
///
/// When it is not valid JSON, not a request, or does not fit the model.
pub fn read(
    body: &Bytes,
    json_length: Option<usize>,
    signature: &Signature,
) -> Result<Infer, Error> {
    let length = json_length.unwrap_or(body.len());
    if length > body.len() {
        return Err(Error::Malformed(format!(
            "the header {JSON_LENGTH} says {length} bytes, the body has {}",
            body.len()
        )));
    }
    let (json, mut rest) = body.split_at(length);
    let mut reader = serde_json::Deserializer::from_slice(json);
    let request: Request = serde_path_to_error::deserialize(&mut reader).map_err(Error::Json)?;
    reader.end().map_err(|e| Error::Malformed(format!("something follows the request: {e}")))?;

    let mut inputs = Vec::with_capacity(request.inputs.len().min(signature.inputs.len()));
    for input in request.inputs {
        let (place, spec) = signature.input(&input.name)?;
        let shape = spec.admit(&input.datatype, &input.shape)?;
        let contents =
            |why: &str| InputError::Contents { name: input.name.clone(), why: why.to_owned() };
        let elements = match (input.data, input.parameters.binary_data_size) {
            (Some(literals), None) => {
                spec.count(&shape, literals.len())?;
                literals.elements(spec.datatype)
            }
            (None, Some(size)) => {
                spec.count_bytes(&shape, size)?;
                let (bytes, after) = rest
                    .split_at_checked(size)
                    .ok_or_else(|| contents("the body ends before its binary data"))?;
                rest = after;
                Elements::from_bytes(spec.datatype, bytes)
            }
            (None, None) => return Err(contents("has no `data`").into()),
            (Some(_), Some(_)) => {
                return Err(contents("has both `data` and `binary_data_size`").into());
            }
        };
        inputs.push((place, spec.tensor(shape, elements)?));
    }
    if !rest.is_empty() {
        return Err(Error::Malformed(format!("{} bytes follow the last input", rest.len())));
    }
    let wanted = signature.wanted(request.outputs.iter().map(|output| output.name.as_str()))?;
    let all = request.parameters.binary_data_output.unwrap_or(false);
    let binary = if request.outputs.is_empty() {
        vec![all; wanted.len()]
    } else {
        request.outputs.iter().map(|o| o.parameters.binary_data.unwrap_or(all)).collect()
    };
    Ok(Infer { id: request.id, inputs, wanted, binary })
}

#[derive(Serialize)]
struct Response<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<Output<'a>>,
}

#[derive(Serialize)]
struct Output<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data<'a>>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

/// One output to write.
#[derive(Debug)]
pub struct Answer<'a> {
    /// Its description.
    pub spec: &'a TensorSpec,
    /// Its value.
    pub tensor: &'a Tensor,
    /// Whether to send it as bytes.
    pub binary: bool,
}

/// Writes a response; the second part is the length of the JSON when bytes follow it.
///
/// # Errors
///
/// When an output is not of the data type that the signature promises.
pub fn write(
    model: (&str, &str),
    id: Option<&str>,
    answers: &[Answer<'_>],
) -> Result<(Bytes, Option<usize>), Error> {
    let mut tail = BytesMut::new();
    let mut outputs = Vec::with_capacity(answers.len());
    for Answer { spec, tensor, binary } in answers {
        let mut output = Output {
            name: &spec.name,
            datatype: spec.datatype.name(),
            shape: &tensor.shape,
            parameters: None,
            data: None,
        };
        if *binary {
            let bytes = tensor.elements.to_bytes(spec.datatype).ok_or_else(|| {
                Error::BrokenSignature(format!("output {spec} is of another data type"))
            })?;
            output.parameters = Some(BinarySize { binary_data_size: bytes.len() });
            tail.extend_from_slice(&bytes);
        } else {
            output.data = Some(Data { datatype: spec.datatype, elements: &tensor.elements });
        }
        outputs.push(output);
    }
    let response = Response { model_name: model.0, model_version: model.1, id, outputs };
    let mut json = serde_json::to_vec(&response)
        .map_err(|e| Error::BrokenSignature(format!("cannot be written as JSON: {e}")))?;
    if !answers.iter().any(|answer| answer.binary) {
        return Ok((json.into(), None));
    }
    let length = json.len();
    json.extend_from_slice(&tail);
    Ok((json.into(), Some(length)))
}

/// The elements of an output. JSON has no infinities and no NaN: those are written as `null`.
struct Data<'a> {
    datatype: Datatype,
    elements: &'a Elements,
}

impl Serialize for Data<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.elements.len()))?;
        if let Some(numbers) = self.elements.as_real() {
            for number in numbers {
                list.serialize_element(number)?;
            }
        } else if let Some(numbers) = self.elements.to_whole() {
            for number in numbers {
                if self.datatype == Datatype::Bool {
                    list.serialize_element(&(number != 0))?;
                } else {
                    list.serialize_element(&number)?;
                }
            }
        }
        list.end()
    }
}

/// Elements as JSON writes them, before the data type is known to fit: `datatype` may stand after
/// `data`. Whole numbers are kept whole, since a double cannot hold all 64-bit ones.
#[derive(Clone, Debug, PartialEq)]
enum Literals {
    Whole(Vec<i64>),
    Real(Vec<f64>),
    Bools(Vec<bool>),
}

impl Literals {
    fn len(&self) -> usize {
        match self {
            Self::Whole(v) => v.len(),
            Self::Real(v) => v.len(),
            Self::Bools(v) => v.len(),
        }
    }

    fn elements(self, datatype: Datatype) -> Result<Elements, BadElement> {
        match self {
            Self::Whole(v) => Elements::from_whole(datatype, v.into_iter()),
            Self::Real(v) => Elements::from_real(datatype, v.into_iter()),
            Self::Bools(v) if datatype == Datatype::Bool => {
                Ok(Elements::I32(v.into_iter().map(i32::from).collect()))
            }
            Self::Bools(v) => Err(BadElement {
                index: 0,
                value: v.first().map(ToString::to_string).unwrap_or_default(),
                why: "cannot hold: it takes numbers",
            }),
        }
    }

    fn push_whole(&mut self, number: i64) -> Result<(), &'static str> {
        match self {
            Self::Whole(v) => v.push(number),
            #[expect(clippy::cast_precision_loss, reason = "a list with reals is a list of reals")]
            Self::Real(v) => v.push(number as f64),
            Self::Bools(v) if v.is_empty() => *self = Self::Whole(vec![number]),
            Self::Bools(_) => return Err("a number among true and false"),
        }
        Ok(())
    }

    fn push_real(&mut self, number: f64) -> Result<(), &'static str> {
        match self {
            Self::Real(v) => v.push(number),
            Self::Whole(v) => {
                #[expect(clippy::cast_precision_loss, reason = "a list with reals is one of reals")]
                let mut reals: Vec<f64> = v.iter().map(|n| *n as f64).collect();
                reals.push(number);
                *self = Self::Real(reals);
            }
            Self::Bools(v) if v.is_empty() => *self = Self::Real(vec![number]),
            Self::Bools(_) => return Err("a number among true and false"),
        }
        Ok(())
    }

    fn push_bool(&mut self, value: bool) -> Result<(), &'static str> {
        match self {
            Self::Bools(v) => v.push(value),
            Self::Whole(v) if v.is_empty() => *self = Self::Bools(vec![value]),
            Self::Whole(_) | Self::Real(_) => return Err("true or false among numbers"),
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Literals {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut into =
            Flat { literals: Self::Whole(Vec::new()), lengths: Vec::new(), leaves_at: None };
        Level { flat: &mut into, depth: 0 }.deserialize(deserializer)?;
        Ok(into.literals)
    }
}

/// Nested lists while they are laid flat. All lists of one depth must have one length, and numbers
/// stand at one depth only: what is ragged cannot be a tensor.
struct Flat {
    literals: Literals,
    /// Length of the lists at each depth, once the first has ended.
    lengths: Vec<Option<usize>>,
    leaves_at: Option<usize>,
}

struct Level<'a> {
    flat: &'a mut Flat,
    depth: usize,
}

impl Level<'_> {
    fn leaf<E: serde::de::Error>(
        self,
        push: impl FnOnce(&mut Literals) -> Result<(), &'static str>,
    ) -> Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom("`data` must be a list"));
        }
        if *self.flat.leaves_at.get_or_insert(self.depth) != self.depth {
            return Err(E::custom("lists and elements stand side by side"));
        }
        push(&mut self.flat.literals).map_err(E::custom)
    }
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of numbers or of true and false, flat or nested")
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.leaf(|literals| literals.push_bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.leaf(|literals| literals.push_whole(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        let value = i64::try_from(value).map_err(|_| {
            E::custom(format!("{value} is greater than any served data type holds"))
        })?;
        self.leaf(|literals| literals.push_whole(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.leaf(|literals| literals.push_real(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        use serde::de::Error as _;
        let Self { flat, depth } = self;
        if flat.lengths.len() <= depth {
            flat.lengths.resize(depth + 1, None);
        }
        if flat.leaves_at.is_some_and(|leaves| leaves <= depth) {
            return Err(A::Error::custom("lists and elements stand side by side"));
        }
        let mut length = 0;
        while list.next_element_seed(Level { flat: &mut *flat, depth: depth + 1 })?.is_some() {
            length += 1;
        }
        let first = *flat.lengths[depth].get_or_insert(length);
        if first != length {
            return Err(A::Error::custom(format!(
                "lists of {first} and of {length} elements stand side by side"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iris() -> Signature {
        Signature::from_onnx(include_bytes!("../../models/iris/model.onnx")).unwrap()
    }

    fn literals(text: &str) -> Result<Literals, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    fn request(inputs: &str) -> Result<Infer, String> {
        let body = Bytes::from(format!("{{\"inputs\": {inputs}}}"));
        read(&body, None, &iris()).map_err(|e| crate::error::Chain(&e).to_string())
    }

    #[test]
    fn nested_and_flat_data_are_the_same() {
        assert_eq!(literals("[[1, 2], [3, 4]]"), literals("[1, 2, 3, 4]"));
        assert_eq!(literals("[1, 2.5]"), Ok(Literals::Real(vec![1.0, 2.5])));
        assert_eq!(literals("[true]"), Ok(Literals::Bools(vec![true])));
        assert_eq!(
            literals("[9007199254740993]"),
            Ok(Literals::Whole(vec![9_007_199_254_740_993]))
        );
    }

    #[test]
    fn ragged_and_mixed_data_are_refused() {
        for text in [
            "[[1, 2], [3]]",
            "[1, [2]]",
            "[[1], 2]",
            "[[[1]], [2]]",
            "1",
            "\"x\"",
            "[\"x\"]",
            "[null]",
            "[true, 1]",
            "[1, true]",
            "{}",
            "[1.5, false]",
            "[18446744073709551615]",
        ] {
            assert!(literals(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_fault_is_told_with_its_place() {
        let error = request(r#"[{"name": "features", "datatype": "FP32", "shape": "x"}]"#);
        assert!(error.unwrap_err().contains("inputs[0].shape"));
        let error = request(r#"[{"name": "featurs", "datatype": "FP32", "shape": [1, 4]}]"#);
        let error = error.unwrap_err();
        assert!(
            error.contains("`featurs`") && error.contains("`features` (FP32 [-1, 4])"),
            "{error}"
        );
        let error =
            request(r#"[{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1]}]"#);
        assert!(error.unwrap_err().contains("1 elements were given"));
        let error = request(r#"[{"name": "features", "datatype": "FP32", "shape": [1, 4]}]"#);
        assert!(error.unwrap_err().contains("no `data`"));
    }

    #[test]
    fn binary_tensors_stand_behind_the_json() {
        let json = br#"{"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4],
            "parameters": {"binary_data_size": 16}}], "parameters": {"binary_data_output": true}}"#;
        let mut body = json.to_vec();
        body.extend([1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()));
        let infer = read(&body.clone().into(), Some(json.len()), &iris()).unwrap();
        assert_eq!(infer.inputs[0].1.elements, Elements::F32(vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(infer.binary, [true]);
        // Too little, too much, and a length beyond the body.
        let short = body[..body.len() - 1].to_vec();
        assert!(read(&short.into(), Some(json.len()), &iris()).is_err());
        assert!(read(&body.clone().into(), Some(body.len() + 1), &iris()).is_err());
        body.push(0);
        assert!(read(&body.into(), Some(json.len()), &iris()).is_err());
    }

    #[test]
    fn a_binary_answer_is_what_its_header_says() {
        let signature = iris();
        let tensor = Tensor { shape: vec![1, 3], elements: Elements::F32(vec![0.5, 0.25, 0.25]) };
        let answer = Answer { spec: &signature.outputs[0], tensor: &tensor, binary: true };
        let (body, length) = write(("iris", "1"), Some("7"), &[answer]).unwrap();
        let length = length.unwrap();
        let json: serde_json::Value = serde_json::from_slice(&body[..length]).unwrap();
        assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], 12);
        assert_eq!(json["id"], "7");
        assert_eq!(&body[length..length + 4], 0.5f32.to_le_bytes());
        assert_eq!(body.len(), length + 12);
    }
}
