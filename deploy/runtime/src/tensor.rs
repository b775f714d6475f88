//! Tensors between the wire and the engine.
//!
//! On the wire a tensor has one of the protocol's data types; the engine computes in four element
//! types. [`Datatype`] is the former, [`Elements`] the latter, and here is every conversion between
//! them. Whole numbers are never changed: what does not fit is refused. Real ones are rounded to the
//! nearest that there is, and what is too large becomes infinite: FP64 is computed as FP32, an answer
//! in FP16 or a whole number given as a real one is rounded likewise.

use std::fmt;

use rten::{Value, ValueView};
use rten_tensor::Tensor as EngineTensor;
use rten_tensor::prelude::*;

/// A data type of the protocol that the engine can compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datatype {
    /// One byte an element, 0 or 1.
    Bool,
    /// Signed, 8 bits.
    Int8,
    /// Unsigned, 8 bits.
    UInt8,
    /// Signed, 32 bits.
    Int32,
    /// Signed, 64 bits; the engine computes with 32 and greater values are refused.
    Int64,
    /// Half precision; computed as FP32.
    Fp16,
    /// Single precision.
    Fp32,
    /// Double precision; computed as FP32.
    Fp64,
}

impl Datatype {
    /// The protocol's spelling.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Int8 => "INT8",
            Self::UInt8 => "UINT8",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
        }
    }

    /// Bytes of one element on the wire.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::Int8 | Self::UInt8 => 1,
            Self::Fp16 => 2,
            Self::Int32 | Self::Fp32 => 4,
            Self::Int64 | Self::Fp64 => 8,
        }
    }

    /// Whether the elements are real numbers.
    #[must_use]
    pub fn is_float(self) -> bool {
        match self {
            Self::Fp16 | Self::Fp32 | Self::Fp64 => true,
            Self::Bool | Self::Int8 | Self::UInt8 | Self::Int32 | Self::Int64 => false,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why tensors do not fit the model. The message names what was given and what is expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InputError {
    /// The model has no such input.
    #[error("the model has no input `{given}`; it takes {known}")]
    UnknownInput {
        /// The name in the request.
        given: String,
        /// The model's inputs, ready to print.
        known: String,
    },
    /// The model has no such output.
    #[error("the model has no output `{given}`; it gives {known}")]
    UnknownOutput {
        /// The name in the request.
        given: String,
        /// The model's outputs, ready to print.
        known: String,
    },
    /// An input is absent.
    #[error("input `{name}` is missing; the model takes {known}")]
    Missing {
        /// The input's name.
        name: String,
        /// The model's inputs, ready to print.
        known: String,
    },
    /// An input or a requested output stands twice in the request.
    #[error("`{name}` was given twice")]
    Twice {
        /// The tensor's name.
        name: String,
    },
    /// The data type is another.
    #[error("input `{name}`: data type {given} was given, the model takes {wanted}")]
    Datatype {
        /// The input's name.
        name: String,
        /// The data type in the request.
        given: String,
        /// The model's.
        wanted: Datatype,
    },
    /// The shape does not fit.
    #[error("input `{name}`: shape {given:?} was given, the model takes {wanted}: {why}")]
    Shape {
        /// The input's name.
        name: String,
        /// The shape in the request.
        given: Vec<i64>,
        /// The model's shape, ready to print.
        wanted: String,
        /// The first thing that does not fit.
        why: String,
    },
    /// There are more or fewer elements than the shape says.
    #[error(
        "input `{name}`: {given} {unit} were given, shape {shape:?} of {datatype} takes {wanted}"
    )]
    Count {
        /// The input's name.
        name: String,
        /// How many were given.
        given: usize,
        /// How many there should be.
        wanted: usize,
        /// Elements or bytes.
        unit: &'static str,
        /// The shape in the request.
        shape: Vec<usize>,
        /// The data type.
        datatype: Datatype,
    },
    /// An element cannot be represented.
    #[error("input `{name}`: element {index} is {value}, which {datatype} {why}")]
    Element {
        /// The input's name.
        name: String,
        /// Its place, in row-major order.
        index: usize,
        /// The element as it was given.
        value: String,
        /// The input's data type.
        datatype: Datatype,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The elements stand in the wrong place of the request.
    #[error("input `{name}`: {why}")]
    Contents {
        /// The input's name.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Inputs that belong together have different numbers of rows.
    #[error(
        "inputs `{one}` and `{other}` have {one_rows} and {other_rows} rows; they must be equal"
    )]
    Rows {
        /// An input's name.
        one: String,
        /// Its rows.
        one_rows: usize,
        /// Another input's name.
        other: String,
        /// Its rows.
        other_rows: usize,
    },
}

/// An element that a data type cannot hold: its place, its text and why.
#[derive(Clone, Debug, PartialEq)]
pub struct BadElement {
    /// Its place, in row-major order.
    pub index: usize,
    /// The element as it was given.
    pub value: String,
    /// What is wrong with it: follows the data type's name in a sentence.
    pub why: &'static str,
}

/// The elements of a tensor in row-major order, as the engine computes with them.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// FP16, FP32, FP64.
    F32(Vec<f32>),
    /// BOOL, INT32, INT64.
    I32(Vec<i32>),
    /// INT8.
    I8(Vec<i8>),
    /// UINT8.
    U8(Vec<u8>),
}

const TOO_LARGE: &str = "cannot hold";
const TOO_LARGE_HERE: &str = "can hold but this runtime cannot (it computes integers with 32 bits)";
const NOT_WHOLE: &str = "cannot hold: it is not a whole number";
const NOT_BOOL: &str = "cannot hold: it takes true and false";

impl Elements {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U8(v) => v.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whole numbers as elements of `datatype`.
    ///
    /// # Errors
    ///
    /// The first number that the data type, or the engine, cannot hold.
    pub fn from_whole(
        datatype: Datatype,
        numbers: impl ExactSizeIterator<Item = i64>,
    ) -> Result<Self, BadElement> {
        fn all<T: TryFrom<i64>>(
            numbers: impl ExactSizeIterator<Item = i64>,
            why: &'static str,
        ) -> Result<Vec<T>, BadElement> {
            numbers
                .enumerate()
                .map(|(index, n)| {
                    T::try_from(n).map_err(|_| BadElement { index, value: n.to_string(), why })
                })
                .collect()
        }
        match datatype {
            Datatype::Bool => numbers
                .enumerate()
                .map(|(index, n)| match n {
                    0 | 1 => Ok(i32::from(n == 1)),
                    _ => Err(BadElement { index, value: n.to_string(), why: NOT_BOOL }),
                })
                .collect::<Result<_, _>>()
                .map(Self::I32),
            Datatype::Int8 => all(numbers, TOO_LARGE).map(Self::I8),
            Datatype::UInt8 => all(numbers, TOO_LARGE).map(Self::U8),
            Datatype::Int32 => all(numbers, TOO_LARGE).map(Self::I32),
            Datatype::Int64 => all(numbers, TOO_LARGE_HERE).map(Self::I32),
            #[expect(
                clippy::cast_precision_loss,
                reason = "JSON has one kind of number; an FP32 tensor may be written in whole ones"
            )]
            Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64 => {
                Ok(Self::F32(numbers.map(|n| n as f32).collect()))
            }
        }
    }

    /// Real numbers as elements of `datatype`.
    ///
    /// # Errors
    ///
    /// The first number that the data type cannot hold.
    pub fn from_real(
        datatype: Datatype,
        numbers: impl ExactSizeIterator<Item = f64>,
    ) -> Result<Self, BadElement> {
        if datatype.is_float() {
            #[expect(clippy::cast_possible_truncation, reason = "the engine computes with FP32")]
            return Ok(Self::F32(numbers.map(|n| n as f32).collect()));
        }
        let whole = numbers
            .enumerate()
            .map(|(index, n)| {
                // 2^53: up to there every whole number has its own double.
                if n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0 {
                    #[expect(clippy::cast_possible_truncation, reason = "whole and in range")]
                    return Ok(n as i64);
                }
                Err(BadElement { index, value: n.to_string(), why: NOT_WHOLE })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Self::from_whole(datatype, whole.into_iter())
    }

    /// Little-endian bytes as elements of `datatype`; `bytes` must be a whole number of elements.
    ///
    /// # Errors
    ///
    /// The first element that the engine cannot hold.
    pub fn from_bytes(datatype: Datatype, bytes: &[u8]) -> Result<Self, BadElement> {
        Ok(match datatype {
            Datatype::Bool => Self::I32(bytes.iter().map(|b| i32::from(*b != 0)).collect()),
            Datatype::Int8 => Self::I8(bytes.iter().map(|b| b.cast_signed()).collect()),
            Datatype::UInt8 => Self::U8(bytes.to_vec()),
            Datatype::Int32 => Self::I32(words(bytes).map(i32::from_le_bytes).collect()),
            Datatype::Int64 => {
                return Self::from_whole(
                    datatype,
                    words(bytes).map(i64::from_le_bytes).collect::<Vec<_>>().into_iter(),
                );
            }
            Datatype::Fp16 => {
                Self::F32(words(bytes).map(|b| half_to_single(u16::from_le_bytes(b))).collect())
            }
            Datatype::Fp32 => Self::F32(words(bytes).map(f32::from_le_bytes).collect()),
            #[expect(clippy::cast_possible_truncation, reason = "the engine computes with FP32")]
            Datatype::Fp64 => {
                Self::F32(words(bytes).map(|b| f64::from_le_bytes(b) as f32).collect())
            }
        })
    }

    /// As little-endian bytes of `datatype`; `None` when these elements are not of that kind.
    #[must_use]
    pub fn to_bytes(&self, datatype: Datatype) -> Option<Vec<u8>> {
        if datatype.is_float() {
            let Self::F32(v) = self else { return None };
            return Some(match datatype {
                Datatype::Fp16 => v.iter().flat_map(|x| single_to_half(*x).to_le_bytes()).collect(),
                Datatype::Fp64 => v.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect(),
                Datatype::Fp32
                | Datatype::Bool
                | Datatype::Int8
                | Datatype::UInt8
                | Datatype::Int32
                | Datatype::Int64 => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            });
        }
        let whole = self.to_whole()?;
        Some(match datatype {
            Datatype::Bool => whole.map(|n| u8::from(n != 0)).collect(),
            Datatype::Int8 | Datatype::UInt8 => whole.map(|n| n.to_le_bytes()[0]).collect(),
            Datatype::Int32 => whole.flat_map(i32::to_le_bytes).collect(),
            Datatype::Int64 | Datatype::Fp16 | Datatype::Fp32 | Datatype::Fp64 => {
                whole.flat_map(|n| i64::from(n).to_le_bytes()).collect()
            }
        })
    }

    /// The elements as real numbers; `None` when they are whole ones.
    #[must_use]
    pub fn as_real(&self) -> Option<&[f32]> {
        match self {
            Self::F32(v) => Some(v),
            Self::I32(_) | Self::I8(_) | Self::U8(_) => None,
        }
    }

    /// The elements as whole numbers; `None` when they are real ones.
    #[must_use]
    pub fn to_whole(&self) -> Option<Box<dyn ExactSizeIterator<Item = i32> + '_>> {
        Some(match self {
            Self::F32(_) => return None,
            Self::I32(v) => Box::new(v.iter().copied()),
            Self::I8(v) => Box::new(v.iter().map(|n| i32::from(*n))),
            Self::U8(v) => Box::new(v.iter().map(|n| i32::from(*n))),
        })
    }

    /// Appends `more`, which must be of the same kind; otherwise nothing happens and it says `false`.
    #[must_use]
    fn append(&mut self, more: &Self) -> bool {
        match (self, more) {
            (Self::F32(a), Self::F32(b)) => a.extend_from_slice(b),
            (Self::I32(a), Self::I32(b)) => a.extend_from_slice(b),
            (Self::I8(a), Self::I8(b)) => a.extend_from_slice(b),
            (Self::U8(a), Self::U8(b)) => a.extend_from_slice(b),
            (Self::F32(_) | Self::I32(_) | Self::I8(_) | Self::U8(_), _) => return false,
        }
        true
    }

    fn slice(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::F32(v) => Self::F32(v[range].to_vec()),
            Self::I32(v) => Self::I32(v[range].to_vec()),
            Self::I8(v) => Self::I8(v[range].to_vec()),
            Self::U8(v) => Self::U8(v[range].to_vec()),
        }
    }
}

/// `bytes` cut into words of N; what is left over at the end is ignored (lengths are checked before).
fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// A tensor: `elements.len()` is always the product of `shape`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Size of each dimension.
    pub shape: Vec<usize>,
    /// The elements in row-major order.
    pub elements: Elements,
}

impl Tensor {
    /// Size of the first dimension; 1 for a single number.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Joins tensors along their first dimension; `None` when they do not fit together.
    #[must_use]
    pub fn concat<'a>(mut tensors: impl Iterator<Item = &'a Self>) -> Option<Self> {
        let mut joined = tensors.next()?.clone();
        for tensor in tensors {
            if joined.shape.is_empty() || joined.shape.get(1..) != tensor.shape.get(1..) {
                return None;
            }
            joined.shape[0] += tensor.rows();
            if !joined.elements.append(&tensor.elements) {
                return None;
            }
        }
        Some(joined)
    }

    /// Cuts along the first dimension into parts of `rows`; `None` when they do not add up.
    #[must_use]
    pub fn split(&self, rows: &[usize]) -> Option<Vec<Self>> {
        if self.shape.is_empty() || rows.iter().sum::<usize>() != self.rows() {
            return None;
        }
        let row = self.shape[1..].iter().product::<usize>();
        let mut start = 0;
        Some(
            rows.iter()
                .map(|count| {
                    let end = start + count * row;
                    let mut shape = self.shape.clone();
                    shape[0] = *count;
                    let part = Self { shape, elements: self.elements.slice(start..end) };
                    start = end;
                    part
                })
                .collect(),
        )
    }

    /// A view for the engine; `None` when the shape lies about the elements.
    pub(crate) fn view(&self) -> Option<ValueView<'_>> {
        match &self.elements {
            Elements::F32(v) => ValueView::from_shape(&self.shape, v).ok(),
            Elements::I32(v) => ValueView::from_shape(&self.shape, v).ok(),
            Elements::I8(v) => ValueView::from_shape(&self.shape, v).ok(),
            Elements::U8(v) => ValueView::from_shape(&self.shape, v).ok(),
        }
    }

    /// What the engine gave; `None` when it is not a tensor.
    pub(crate) fn from_value(value: Value) -> Option<Self> {
        fn parts<T: Clone>(tensor: EngineTensor<T>) -> (Vec<usize>, Vec<T>) {
            (tensor.shape().to_vec(), tensor.into_data())
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "the engine's enum is non-exhaustive")]
        let (shape, elements) = match value {
            Value::FloatTensor(t) => {
                let (shape, data) = parts(t);
                (shape, Elements::F32(data))
            }
            Value::Int32Tensor(t) => {
                let (shape, data) = parts(t);
                (shape, Elements::I32(data))
            }
            Value::Int8Tensor(t) => {
                let (shape, data) = parts(t);
                (shape, Elements::I8(data))
            }
            Value::UInt8Tensor(t) => {
                let (shape, data) = parts(t);
                (shape, Elements::U8(data))
            }
            _ => return None,
        };
        Some(Self { shape, elements })
    }
}

/// An IEEE 754 half as a single; every half has its own single.
#[must_use]
pub fn half_to_single(half: u16) -> f32 {
    let sign = u32::from(half >> 15) << 31;
    let exponent = u32::from(half >> 10) & 0x1f;
    let fraction = u32::from(half) & 0x3ff;
    match (exponent, fraction) {
        // Zero and subnormals are fraction * 2^-24, which a single holds exactly.
        (0, _) => {
            #[expect(clippy::cast_precision_loss, reason = "10 bits fit into 24")]
            let size = fraction as f32 / 16_777_216.0;
            if sign == 0 { size } else { -size }
        }
        (31, _) => f32::from_bits(sign | 0x7f80_0000 | (fraction << 13)),
        // The exponent's bias is 15 there and 127 here.
        (_, _) => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}

/// A single as the nearest IEEE 754 half, ties to even; what is too large becomes infinite.
#[must_use]
pub fn single_to_half(single: f32) -> u16 {
    let bits = single.to_bits();
    let sign = ((bits >> 31) as u16) << 15;
    let size = bits & 0x7fff_ffff;
    if size > 0x7f80_0000 {
        return sign | 0x7e00; // Not a number.
    }
    // 65520 and above round to infinity.
    if size >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // Below 2^-14 halves are whole multiples of 2^-24: adding 0.5 makes the addition of singles, whose
    // last bit is then worth 2^-24, do the rounding.
    if size < 0x3880_0000 {
        let rounded = (f32::from_bits(size) + 0.5).to_bits() - 0.5_f32.to_bits();
        #[expect(clippy::cast_possible_truncation, reason = "at most 0x400")]
        return sign | rounded as u16;
    }
    // Drop 13 bits of the fraction, rounding half to even; a carry moves into the exponent, rightly.
    let rounded = size - (112 << 23) + 0xfff + ((size >> 13) & 1);
    #[expect(clippy::cast_possible_truncation, reason = "at most 0x7bff")]
    let half = (rounded >> 13) as u16;
    sign | half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_way_there_and_back() {
        for half in 0..=u16::MAX {
            let single = half_to_single(half);
            if single.is_nan() {
                assert!(half_to_single(single_to_half(single)).is_nan());
            } else {
                assert_eq!(single_to_half(single), half, "{half:#06x} = {single}");
            }
        }
    }

    #[test]
    fn halves_round_to_nearest_and_ties_to_even() {
        assert_eq!(single_to_half(1.0), 0x3c00);
        assert_eq!(single_to_half(1.0 + 1.0 / 2048.0), 0x3c00); // half-way, down to even
        assert_eq!(single_to_half(1.0 + 3.0 / 2048.0), 0x3c02); // half-way, up to even
        assert_eq!(single_to_half(65519.0), 0x7bff);
        assert_eq!(single_to_half(65520.0), 0x7c00);
        assert_eq!(single_to_half(-2.0f32.powi(-24)), 0x8001);
        assert_eq!(single_to_half(2.0f32.powi(-25)), 0x0000); // half-way, down to even
        assert_eq!(half_to_single(0x3555), 0.333_251_95);
    }

    #[test]
    fn bytes_survive_the_way_there_and_back_in_every_data_type() {
        let of = |datatype: Datatype, bytes: &[u8]| {
            let elements = Elements::from_bytes(datatype, bytes).unwrap();
            assert_eq!(elements.len() * datatype.size(), bytes.len());
            assert_eq!(elements.to_bytes(datatype).unwrap(), bytes, "{datatype}");
        };
        of(Datatype::Bool, &[0, 1, 1]);
        of(Datatype::Int8, &[0, 127, 128, 255]);
        of(Datatype::UInt8, &[0, 127, 128, 255]);
        of(Datatype::Int32, &(-5i32).to_le_bytes());
        of(Datatype::Int64, &(-5i64).to_le_bytes());
        of(Datatype::Fp16, &[0x00, 0x3c, 0x01, 0x80]);
        of(Datatype::Fp32, &0.1f32.to_le_bytes());
        of(Datatype::Fp64, &0.5f64.to_le_bytes());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_place() {
        let bad = |datatype, numbers: &[i64]| {
            Elements::from_whole(datatype, numbers.iter().copied()).unwrap_err()
        };
        assert_eq!(bad(Datatype::UInt8, &[1, 256]).index, 1);
        assert_eq!(bad(Datatype::Int8, &[-129]).value, "-129");
        assert_eq!(bad(Datatype::Bool, &[2]).why, NOT_BOOL);
        assert_eq!(bad(Datatype::Int64, &[1 << 40]).why, TOO_LARGE_HERE);
        let real = Elements::from_real(Datatype::Int32, [1.0, 1.5].into_iter());
        assert_eq!(real.unwrap_err().index, 1);
        assert!(Elements::from_bytes(Datatype::Int64, &i64::MAX.to_le_bytes()).is_err());
    }

    #[test]
    fn splitting_undoes_joining() {
        let a = Tensor { shape: vec![1, 2], elements: Elements::F32(vec![1.0, 2.0]) };
        let b = Tensor { shape: vec![2, 2], elements: Elements::F32(vec![3.0, 4.0, 5.0, 6.0]) };
        let joined = Tensor::concat([&a, &b].into_iter()).unwrap();
        assert_eq!(joined.shape, [3, 2]);
        assert_eq!(joined.split(&[1, 2]).unwrap(), [a.clone(), b]);
        assert_eq!(joined.split(&[1, 1]), None);
        let wide = Tensor { shape: vec![1, 3], elements: Elements::F32(vec![0.0; 3]) };
        assert_eq!(Tensor::concat([&a, &wide].into_iter()), None);
    }
}
