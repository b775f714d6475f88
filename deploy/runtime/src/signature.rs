//! A model's signature: what it takes and gives, and whether given tensors fit.
//!
//! Read from the ONNX file itself and not from the engine, because the engine knows only the four
//! element types it computes with: callers must see the data types the model's author wrote.

use std::collections::BTreeMap;
use std::fmt;

use prost::Message;

use crate::tensor::{BadElement, Datatype, Elements, InputError, Tensor};

/// Size of one dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Always this.
    Fixed(usize),
    /// Any size from 1; dimensions of one name have one size.
    Open(Option<String>),
}

/// One input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its name, unique among the inputs or among the outputs.
    pub name: String,
    /// Data type on the wire.
    pub datatype: Datatype,
    /// Its dimensions; `None` when the model does not even tell how many.
    pub shape: Option<Vec<Dim>>,
}

/// What a model takes and gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Signature {
    /// Inputs, in the model's order.
    pub inputs: Vec<TensorSpec>,
    /// Outputs, in the model's order.
    pub outputs: Vec<TensorSpec>,
    /// The author's remarks (`metadata_props`), such as the labels of classes.
    pub properties: BTreeMap<String, String>,
}

/// Why a signature cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// Not an ONNX file.
    #[error("the file is not an ONNX model")]
    NotOnnx(#[source] prost::DecodeError),
    /// There is nothing to ask for.
    #[error("the model has no {0}")]
    Nothing(&'static str),
    /// A data type that the engine has not.
    #[error(
        "{kind} `{name}` is {found}, which this runtime cannot serve; it serves tensors of BOOL, INT8, UINT8, INT32, INT64, FP16, FP32 and FP64"
    )]
    Unsupported {
        /// Input or output.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What the model says it is.
        found: String,
    },
}

impl Signature {
    /// Reads the signature out of an ONNX file. Weights are skipped, not copied.
    ///
    /// # Errors
    ///
    /// When it is no ONNX model, or one whose inputs or outputs cannot be served.
    pub fn from_onnx(file: &[u8]) -> Result<Self, SignatureError> {
        let model = onnx::Model::decode(file).map_err(SignatureError::NotOnnx)?;
        let graph = model.graph.ok_or(SignatureError::Nothing("graph"))?;
        // Old files list the weights among the inputs.
        let is_weight = |name: &str| graph.initializer.iter().any(|weight| weight.name == name);
        let inputs = graph
            .input
            .iter()
            .filter(|input| !is_weight(&input.name))
            .map(|input| spec("input", input))
            .collect::<Result<Vec<_>, _>>()?;
        let outputs = graph
            .output
            .iter()
            .map(|output| spec("output", output))
            .collect::<Result<Vec<_>, _>>()?;
        if inputs.is_empty() {
            return Err(SignatureError::Nothing("inputs"));
        }
        if outputs.is_empty() {
            return Err(SignatureError::Nothing("outputs"));
        }
        let properties = model.metadata_props.into_iter().map(|p| (p.key, p.value)).collect();
        Ok(Self { inputs, outputs, properties })
    }

    /// The place of the input of this name.
    ///
    /// # Errors
    ///
    /// When there is none; the message lists those there are.
    pub fn input(&self, name: &str) -> Result<(usize, &TensorSpec), InputError> {
        find(&self.inputs, name).ok_or_else(|| InputError::UnknownInput {
            given: name.to_owned(),
            known: list(&self.inputs),
        })
    }

    /// The places of the wanted outputs; all when none is named.
    ///
    /// # Errors
    ///
    /// When one does not exist or is named twice.
    pub fn wanted<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<usize>, InputError> {
        let mut wanted = Vec::new();
        for name in names {
            let (index, _) = find(&self.outputs, name).ok_or_else(|| {
                InputError::UnknownOutput { given: name.to_owned(), known: list(&self.outputs) }
            })?;
            if wanted.contains(&index) {
                return Err(InputError::Twice { name: name.to_owned() });
            }
            wanted.push(index);
        }
        if wanted.is_empty() {
            wanted.extend(0..self.outputs.len());
        }
        Ok(wanted)
    }

    /// Puts the given inputs into the model's order.
    ///
    /// `given` holds places as [`Self::input`] gave them.
    ///
    /// # Errors
    ///
    /// When one is missing or was given twice.
    pub fn arrange(&self, given: Vec<(usize, Tensor)>) -> Result<Vec<Tensor>, InputError> {
        let mut slots: Vec<Option<Tensor>> = vec![None; self.inputs.len()];
        for (index, tensor) in given {
            if slots[index].replace(tensor).is_some() {
                return Err(InputError::Twice { name: self.inputs[index].name.clone() });
            }
        }
        slots
            .into_iter()
            .zip(&self.inputs)
            .map(|(slot, spec)| {
                slot.ok_or_else(|| InputError::Missing {
                    name: spec.name.clone(),
                    known: list(&self.inputs),
                })
            })
            .collect()
    }

    /// Checks that all inputs have the same number of rows.
    ///
    /// # Errors
    ///
    /// Names the first two that differ.
    pub fn same_rows(&self, inputs: &[Tensor]) -> Result<usize, InputError> {
        let Some(first) = inputs.first() else { return Ok(0) };
        for (spec, tensor) in self.inputs.iter().zip(inputs) {
            if tensor.rows() != first.rows() {
                return Err(InputError::Rows {
                    one: self.inputs[0].name.clone(),
                    one_rows: first.rows(),
                    other: spec.name.clone(),
                    other_rows: tensor.rows(),
                });
            }
        }
        Ok(first.rows())
    }

    /// Whether requests could be joined along the first dimension, as far as the signature tells.
    ///
    /// # Errors
    ///
    /// A sentence that says why not.
    pub fn open_first_dimension(&self) -> Result<(), String> {
        let mut symbol = None;
        for (kind, specs) in [("input", &self.inputs), ("output", &self.outputs)] {
            for spec in specs {
                let name = match spec.shape.as_deref() {
                    // The engine's answer is checked by a trial anyway.
                    None if kind == "output" => continue,
                    None => {
                        return Err(format!(
                            "the model does not tell the shape of `{}`",
                            spec.name
                        ));
                    }
                    Some([]) => return Err(format!("{kind} `{}` is a single number", spec.name)),
                    Some([Dim::Fixed(size), ..]) => {
                        return Err(format!(
                            "the first dimension of {kind} `{}` is always {size}",
                            spec.name
                        ));
                    }
                    Some([Dim::Open(name), ..]) => name.as_ref(),
                };
                // Names of outputs are often made up by the exporter, those of inputs are not.
                if let (Some(name), "input") = (name, kind)
                    && *symbol.get_or_insert(name) != name
                {
                    return Err(format!("the first dimensions of the inputs differ: `{name}`"));
                }
            }
        }
        Ok(())
    }
}

impl TensorSpec {
    /// Checks the data type and the shape that a request gives for this input.
    ///
    /// # Errors
    ///
    /// Says what was given, what the model takes and where they differ.
    pub fn admit(&self, datatype: &str, shape: &[i64]) -> Result<Vec<usize>, InputError> {
        if datatype != self.datatype.name() {
            return Err(InputError::Datatype {
                name: self.name.clone(),
                given: datatype.to_owned(),
                wanted: self.datatype,
            });
        }
        let refuse = |why: String| InputError::Shape {
            name: self.name.clone(),
            given: shape.to_vec(),
            wanted: Shape(self.shape.as_deref()).to_string(),
            why,
        };
        let mut sizes = Vec::with_capacity(shape.len());
        let mut total = 1_usize;
        for (place, size) in shape.iter().enumerate() {
            let size = usize::try_from(*size).ok().filter(|size| *size > 0).ok_or_else(|| {
                refuse(format!("dimension {place} is {size}, at least 1 is needed"))
            })?;
            // Bounded by the body's size later; here only against an overflow.
            total = total
                .checked_mul(size)
                .filter(|total| *total <= 1 << 40)
                .ok_or_else(|| refuse("that is too many elements".to_owned()))?;
            sizes.push(size);
        }
        let Some(wanted) = &self.shape else { return Ok(sizes) };
        if wanted.len() != sizes.len() {
            return Err(refuse(format!("{} dimensions instead of {}", sizes.len(), wanted.len())));
        }
        for (place, (dim, size)) in wanted.iter().zip(&sizes).enumerate() {
            match dim {
                Dim::Fixed(wanted) if wanted != size => {
                    return Err(refuse(format!("dimension {place} is {size} instead of {wanted}")));
                }
                Dim::Fixed(_) | Dim::Open(_) => {}
            }
        }
        Ok(sizes)
    }

    /// Checks the number of elements against the shape.
    ///
    /// # Errors
    ///
    /// Names both numbers.
    pub fn count(&self, shape: &[usize], given: usize) -> Result<(), InputError> {
        self.expect(shape, given, shape.iter().product(), "elements")
    }

    /// Checks the number of bytes against the shape.
    ///
    /// # Errors
    ///
    /// Names both numbers.
    pub fn count_bytes(&self, shape: &[usize], given: usize) -> Result<(), InputError> {
        let wanted = shape.iter().product::<usize>() * self.datatype.size();
        self.expect(shape, given, wanted, "bytes")
    }

    fn expect(
        &self,
        shape: &[usize],
        given: usize,
        wanted: usize,
        unit: &'static str,
    ) -> Result<(), InputError> {
        if given == wanted {
            return Ok(());
        }
        Err(InputError::Count {
            name: self.name.clone(),
            given,
            wanted,
            unit,
            shape: shape.to_vec(),
            datatype: self.datatype,
        })
    }

    /// Makes a tensor of checked parts; names the element that does not fit.
    ///
    /// # Errors
    ///
    /// When an element could not be converted, or there are too many or too few.
    pub fn tensor(
        &self,
        shape: Vec<usize>,
        elements: Result<Elements, BadElement>,
    ) -> Result<Tensor, InputError> {
        let elements = elements.map_err(|bad| InputError::Element {
            name: self.name.clone(),
            index: bad.index,
            value: bad.value,
            datatype: self.datatype,
            why: bad.why,
        })?;
        self.count(&shape, elements.len())?;
        Ok(Tensor { shape, elements })
    }

    /// The shape as the protocol writes it: -1 for an open dimension.
    #[must_use]
    pub fn wire_shape(&self) -> Vec<i64> {
        self.shape.as_ref().map_or_else(
            || vec![-1],
            |dims| {
                dims.iter()
                    .map(|dim| match dim {
                        Dim::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
                        Dim::Open(_) => -1,
                    })
                    .collect()
            },
        )
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ({} {})", self.name, self.datatype, Shape(self.shape.as_deref()))
    }
}

/// Prints `[-1, 4]`, or `any shape`.
struct Shape<'a>(Option<&'a [Dim]>);

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(dims) = self.0 else { return f.write_str("any shape") };
        f.write_str("[")?;
        for (place, dim) in dims.iter().enumerate() {
            if place > 0 {
                f.write_str(", ")?;
            }
            match dim {
                Dim::Fixed(size) => write!(f, "{size}")?,
                Dim::Open(_) => f.write_str("-1")?,
            }
        }
        f.write_str("]")
    }
}

fn find<'a>(specs: &'a [TensorSpec], name: &str) -> Option<(usize, &'a TensorSpec)> {
    specs.iter().enumerate().find(|(_, spec)| spec.name == name)
}

fn list(specs: &[TensorSpec]) -> String {
    specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn spec(kind: &'static str, value: &onnx::ValueInfo) -> Result<TensorSpec, SignatureError> {
    let unsupported =
        |found: String| SignatureError::Unsupported { kind, name: value.name.clone(), found };
    let tensor = value
        .kind
        .as_ref()
        .and_then(|kind| kind.tensor.as_ref())
        .ok_or_else(|| unsupported("not a tensor".to_owned()))?;
    let datatype = match tensor.element {
        1 => Datatype::Fp32,
        2 => Datatype::UInt8,
        3 => Datatype::Int8,
        6 => Datatype::Int32,
        7 => Datatype::Int64,
        9 => Datatype::Bool,
        10 => Datatype::Fp16,
        11 => Datatype::Fp64,
        other => {
            let name = match other {
                4 => "UINT16",
                5 => "INT16",
                8 => "BYTES (text)",
                12 => "UINT32",
                13 => "UINT64",
                16 => "BF16",
                _ => return Err(unsupported(format!("of ONNX element type {other}"))),
            };
            return Err(unsupported(format!("a tensor of {name}")));
        }
    };
    let shape = tensor.shape.as_ref().map(|shape| {
        shape
            .dim
            .iter()
            .map(|dim| match (dim.value.and_then(|v| usize::try_from(v).ok()), &dim.param) {
                // Some exporters write 0 for "any".
                (Some(size), _) if size > 0 => Dim::Fixed(size),
                (_, Some(name)) if !name.is_empty() => Dim::Open(Some(name.clone())),
                (_, _) => Dim::Open(None),
            })
            .collect()
    });
    Ok(TensorSpec { name: value.name.clone(), datatype, shape })
}

/// The few fields of an ONNX file that make up its signature; all others are skipped.
mod onnx {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Model {
        #[prost(message, optional, tag = "7")]
        pub(super) graph: Option<Graph>,
        #[prost(message, repeated, tag = "14")]
        pub(super) metadata_props: Vec<Property>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Property {
        #[prost(string, tag = "1")]
        pub(super) key: String,
        #[prost(string, tag = "2")]
        pub(super) value: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Graph {
        #[prost(message, repeated, tag = "5")]
        pub(super) initializer: Vec<Weight>,
        #[prost(message, repeated, tag = "11")]
        pub(super) input: Vec<ValueInfo>,
        #[prost(message, repeated, tag = "12")]
        pub(super) output: Vec<ValueInfo>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Weight {
        #[prost(string, tag = "8")]
        pub(super) name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ValueInfo {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, optional, tag = "2")]
        pub(super) kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Kind {
        #[prost(message, optional, tag = "1")]
        pub(super) tensor: Option<TensorKind>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct TensorKind {
        #[prost(int32, tag = "1")]
        pub(super) element: i32,
        #[prost(message, optional, tag = "2")]
        pub(super) shape: Option<TensorShape>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct TensorShape {
        #[prost(message, repeated, tag = "1")]
        pub(super) dim: Vec<Dimension>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Dimension {
        #[prost(int64, optional, tag = "1")]
        pub(super) value: Option<i64>,
        #[prost(string, optional, tag = "2")]
        pub(super) param: Option<String>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn float(name: &str, shape: &[i64]) -> TensorSpec {
        let shape = shape
            .iter()
            .map(|size| usize::try_from(*size).map_or(Dim::Open(None), Dim::Fixed))
            .collect();
        TensorSpec { name: name.to_owned(), datatype: Datatype::Fp32, shape: Some(shape) }
    }

    fn signature(inputs: &[&[i64]], outputs: &[&[i64]]) -> Signature {
        let specs = |prefix: &str, shapes: &[&[i64]]| {
            shapes.iter().enumerate().map(|(i, s)| float(&format!("{prefix}{i}"), s)).collect()
        };
        Signature {
            inputs: specs("in", inputs),
            outputs: specs("out", outputs),
            properties: BTreeMap::new(),
        }
    }

    #[test]
    fn the_sample_models_signatures_are_read_from_their_files() {
        let iris = Signature::from_onnx(include_bytes!("../../models/iris/model.onnx")).unwrap();
        assert_eq!(iris.inputs[0].to_string(), "`features` (FP32 [-1, 4])");
        assert_eq!(iris.outputs[0].wire_shape(), [-1, 3]);
        assert_eq!(iris.properties["labels"], "setosa,versicolor,virginica");
        let digits =
            Signature::from_onnx(include_bytes!("../../models/digits/model.onnx")).unwrap();
        assert_eq!(digits.inputs[0].wire_shape(), [-1, 1, 8, 8]);
    }

    #[test]
    fn what_is_no_model_is_refused() {
        assert!(matches!(Signature::from_onnx(b"PK\x03\x04 zip"), Err(SignatureError::NotOnnx(_))));
        assert!(matches!(Signature::from_onnx(b""), Err(SignatureError::Nothing("graph"))));
    }

    #[test]
    fn a_text_input_is_refused_by_name_at_the_start() {
        let tensor = onnx::TensorKind { element: 8, shape: None };
        let value = onnx::ValueInfo {
            name: "sentence".to_owned(),
            kind: Some(onnx::Kind { tensor: Some(tensor) }),
        };
        let error = spec("input", &value).unwrap_err().to_string();
        assert!(error.contains("`sentence`") && error.contains("BYTES"), "{error}");
    }

    #[test]
    fn a_wrong_shape_is_told_with_both_shapes_and_the_place() {
        let error = float("x", &[-1, 4]).admit("FP32", &[2, 5]).unwrap_err().to_string();
        assert_eq!(
            error,
            "input `x`: shape [2, 5] was given, the model takes [-1, 4]: dimension 1 is 5 instead of 4"
        );
        for shape in [&[][..], &[4], &[0, 4], &[-1, 4], &[1, 4, 1], &[i64::MAX, 4]] {
            assert!(float("x", &[-1, 4]).admit("FP32", shape).is_err(), "{shape:?}");
        }
        assert_eq!(float("x", &[-1, 4]).admit("FP32", &[7, 4]), Ok(vec![7, 4]));
    }

    #[test]
    fn a_wrong_data_type_is_told_with_both() {
        let error = float("x", &[1]).admit("INT32", &[1]).unwrap_err().to_string();
        assert_eq!(error, "input `x`: data type INT32 was given, the model takes FP32");
    }

    #[test]
    fn inputs_come_in_any_order_but_each_exactly_once() {
        let signature = signature(&[&[1], &[1]], &[&[1]]);
        let tensor = |x: f32| Tensor { shape: vec![1], elements: Elements::F32(vec![x]) };
        let arranged = signature.arrange(vec![(1, tensor(1.0)), (0, tensor(0.0))]).unwrap();
        assert_eq!(arranged, [tensor(0.0), tensor(1.0)]);
        assert!(matches!(
            signature.arrange(vec![(0, tensor(0.0))]),
            Err(InputError::Missing { name, .. }) if name == "in1"
        ));
        assert!(matches!(
            signature.arrange(vec![(0, tensor(0.0)), (0, tensor(0.0))]),
            Err(InputError::Twice { name }) if name == "in0"
        ));
    }

    #[test]
    fn only_an_open_first_dimension_everywhere_can_be_joined() {
        assert!(signature(&[&[-1, 4]], &[&[-1, 3]]).open_first_dimension().is_ok());
        assert!(signature(&[&[1, 4]], &[&[-1, 3]]).open_first_dimension().is_err());
        assert!(signature(&[&[-1, 4]], &[&[3]]).open_first_dimension().is_err());
        assert!(signature(&[&[-1, 4], &[]], &[&[-1]]).open_first_dimension().is_err());
        let mut named = signature(&[&[-1, 4], &[-1, 4]], &[&[-1]]);
        for (spec, name) in named.inputs.iter_mut().zip(["batch", "words"]) {
            spec.shape.as_mut().unwrap()[0] = Dim::Open(Some(name.to_owned()));
        }
        assert!(named.open_first_dimension().is_err());
    }

    #[test]
    fn all_outputs_are_wanted_when_none_is_named() {
        let signature = signature(&[&[1]], &[&[1], &[1]]);
        assert_eq!(signature.wanted([].into_iter()), Ok(vec![0, 1]));
        assert_eq!(signature.wanted(["out1"].into_iter()), Ok(vec![1]));
        assert!(signature.wanted(["out2"].into_iter()).is_err());
        assert!(signature.wanted(["out1", "out1"].into_iter()).is_err());
    }
}
