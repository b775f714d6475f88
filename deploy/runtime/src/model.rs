//! The model: found, loaded, tried out and run.
//!
//! The engine is named here and in `tensor` only. A loaded model never changes; it may be run from
//! any thread.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rten::{NodeId, RunErrorKind, RunOptions, ThreadPool, ValueOrView};

use crate::error::{EngineError, Error};
use crate::signature::{Dim, Signature, SignatureError, TensorSpec};
use crate::tensor::{Elements, Tensor};

/// Why there is no model to serve. Every one of these ends the program.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder holds no model.
    #[error("no file that ends in .onnx below {}; mount the model's folder there or name it with --model-dir", folder.display())]
    NoModel {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder holds several models.
    #[error("several models below {}: {found:?}; name one model.onnx or give the file itself as --model-dir", folder.display())]
    SeveralModels {
        /// The folder.
        folder: PathBuf,
        /// The first few of them.
        found: Vec<PathBuf>,
    },
    /// The signature cannot be served.
    #[error("cannot serve {}", path.display())]
    Signature {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// The engine cannot load the model.
    #[error("the engine cannot load {}", path.display())]
    Engine {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: EngineError,
    },
    /// The engine loaded something else than the file says.
    #[error("the engine does not find {kind} `{name}` of {}", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// Input or output.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The trial run failed.
    #[error("the model does not run on inputs of its own signature")]
    Trial(#[source] Error),
}

/// A loaded model.
pub struct Model {
    engine: rten::Model,
    inputs: Vec<NodeId>,
    outputs: Vec<NodeId>,
    pool: Arc<ThreadPool>,
    signature: Signature,
    parameters: usize,
}

/// What the trial runs before readiness have shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Whether requests may be joined, and if not, why.
    pub joinable: Result<(), String>,
    /// Why the model could not be tried, when its open dimensions are not to be guessed.
    pub untried: Option<String>,
}

impl Model {
    /// Finds and loads the model of a folder; `threads` work on one run together.
    ///
    /// # Errors
    ///
    /// See [`LoadError`].
    pub fn open(folder: &Path, threads: usize) -> Result<Self, LoadError> {
        let path = find(folder)?;
        let file = fs::read(&path)
            .map_err(|source| LoadError::Unreadable { path: path.clone(), source })?;
        let signature = Signature::from_onnx(&file)
            .map_err(|source| LoadError::Signature { path: path.clone(), source })?;
        // The engine reads the file itself, because weights may stand in files beside it.
        drop(file);
        let engine = rten::Model::load_file(&path)
            .map_err(|e| LoadError::Engine { path: path.clone(), source: Box::new(e) })?;
        let nodes = |kind: &'static str, specs: &[TensorSpec]| {
            specs
                .iter()
                .map(|spec| {
                    engine.find_node(&spec.name).ok_or_else(|| LoadError::Lost {
                        path: path.clone(),
                        kind,
                        name: spec.name.clone(),
                    })
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let inputs = nodes("input", &signature.inputs)?;
        let outputs = nodes("output", &signature.outputs)?;
        let parameters = engine.total_params();
        let pool = Arc::new(ThreadPool::with_num_threads(threads));
        Ok(Self { engine, inputs, outputs, pool, signature, parameters })
    }

    /// What the model takes and gives.
    #[must_use]
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// How many numbers its weights are.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Runs the model once. `inputs` in the model's order; `wanted` are places of outputs.
    ///
    /// A panic of the engine is an error like others: one bad request must not end the server.
    ///
    /// # Errors
    ///
    /// When the engine refuses, fails or crashes, or gives what the signature does not promise.
    pub fn run(&self, inputs: &[Tensor], wanted: &[usize]) -> Result<Vec<Tensor>, Error> {
        let values = self
            .inputs
            .iter()
            .zip(inputs)
            .map(|(node, tensor)| Some((*node, ValueOrView::from(tensor.view()?))))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::Malformed("a tensor's shape and elements differ".to_owned()))?;
        let outputs: Vec<NodeId> = wanted.iter().map(|index| self.outputs[*index]).collect();
        let options = RunOptions::default().with_thread_pool(Some(self.pool.clone()));
        let run =
            catch_unwind(AssertUnwindSafe(|| self.engine.run(values, &outputs, Some(options))));
        let values = match run {
            Ok(Ok(values)) => values,
            Ok(Err(error)) if error.kind() == RunErrorKind::InvalidInput => {
                return Err(Error::Refused(Box::new(error)));
            }
            Ok(Err(error)) => return Err(Error::Failed(Box::new(error))),
            Err(panic) => return Err(Error::Crashed(panic_text(&*panic))),
        };
        values
            .into_iter()
            .zip(wanted)
            .map(|(value, index)| {
                let spec = &self.signature.outputs[*index];
                let broken = |what| Error::BrokenSignature(format!("output {spec} is {what}"));
                let tensor = Tensor::from_value(value).ok_or_else(|| broken("not a tensor"))?;
                if tensor.elements.as_real().is_some() != spec.datatype.is_float() {
                    return Err(broken("of another data type"));
                }
                Ok(tensor)
            })
            .collect()
    }

    /// Runs the model on made-up inputs before it is said to be ready.
    ///
    /// That makes the first real request as quick as the later ones, finds a model that cannot run,
    /// and decides whether requests may be joined: an open first dimension alone does not tell,
    /// since in some models it is time, or rows are compared with each other. So one row and two
    /// rows are run apart and joined, twice, and only equal answers permit joining.
    ///
    /// # Errors
    ///
    /// When a model whose dimensions are known does not run.
    pub fn try_out(&self) -> Result<Trial, LoadError> {
        let joinable = self.signature.open_first_dimension();
        let known = self.open_dimensions_are_rows(joinable.is_ok());
        let wanted: Vec<usize> = (0..self.outputs.len()).collect();
        let mut last = None;
        // Only the first is tried when all sizes are known.
        for size in trial_sizes(&self.signature) {
            match self.run(&trial_inputs(&self.signature, 1, size, 1), &wanted) {
                Ok(_) => {
                    let joinable = joinable.and_then(|()| self.rows_are_independent(size, &wanted));
                    return Ok(Trial { joinable, untried: None });
                }
                Err(error) if known => return Err(LoadError::Trial(error)),
                Err(error) => last = Some(error),
            }
        }
        let why = last.map(|e| crate::error::Chain(&e).to_string()).unwrap_or_default();
        Ok(Trial {
            joinable: Err("no input could be made up to try it".to_owned()),
            untried: Some(why),
        })
    }

    /// Whether every size but the number of rows is known.
    fn open_dimensions_are_rows(&self, first_is_open: bool) -> bool {
        let skip = usize::from(first_is_open);
        self.signature.inputs.iter().all(|spec| {
            spec.shape
                .as_ref()
                .is_some_and(|dims| dims.iter().skip(skip).all(|dim| matches!(dim, Dim::Fixed(_))))
        })
    }

    fn rows_are_independent(&self, size: usize, wanted: &[usize]) -> Result<(), String> {
        let failed = |e: Error| format!("a joined run failed: {}", crate::error::Chain(&e));
        for seed in [3, 5] {
            let one = trial_inputs(&self.signature, 1, size, seed);
            let two = trial_inputs(&self.signature, 2, size, seed + 100);
            let joined: Option<Vec<Tensor>> =
                one.iter().zip(&two).map(|(a, b)| Tensor::concat([a, b].into_iter())).collect();
            let joined = joined.ok_or("inputs could not be joined")?;
            let one = self.run(&one, wanted).map_err(failed)?;
            let two = self.run(&two, wanted).map_err(failed)?;
            let joined = self.run(&joined, wanted).map_err(failed)?;
            for (index, spec) in self.signature.outputs.iter().enumerate() {
                let parts = joined[index].split(&[1, 2]).ok_or_else(|| {
                    format!("output `{}` does not have one row for each row given", spec.name)
                })?;
                if !alike(&parts[0], &one[index]) || !alike(&parts[1], &two[index]) {
                    return Err(format!("rows influence each other in output `{}`", spec.name));
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("signature", &self.signature).finish_non_exhaustive()
    }
}

/// Finds the one model file at or below `path`.
///
/// A `model.onnx` directly in the folder wins. Otherwise there must be exactly one file that ends in
/// .onnx, in the folder or up to three folders deeper.
///
/// # Errors
///
/// When there is none, or when it is not clear which one is meant.
pub fn find(path: &Path) -> Result<PathBuf, LoadError> {
    let unreadable = |path: &Path| {
        let path = path.to_path_buf();
        move |source| LoadError::Unreadable { path, source }
    };
    if fs::metadata(path).map_err(unreadable(path))?.is_file() {
        return Ok(path.to_path_buf());
    }
    let usual = path.join("model.onnx");
    if usual.is_file() {
        return Ok(usual);
    }
    let mut found = Vec::new();
    let mut folders = vec![(path.to_path_buf(), 0)];
    'search: while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(unreadable(&folder))? {
            let entry = entry.map_err(unreadable(&folder))?.path();
            // Follows links: artifacts and volumes are often trees of them.
            if entry.is_dir() {
                if depth < 3 {
                    folders.push((entry, depth + 1));
                }
            } else if entry.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx")) {
                found.push(entry);
            }
            // Enough to say that there are several; a wrong mount may hold millions of files.
            if found.len() > 4 {
                break 'search;
            }
        }
    }
    found.sort();
    match found.len() {
        0 => Err(LoadError::NoModel { folder: path.to_path_buf() }),
        1 => Ok(found.remove(0)),
        _ => Err(LoadError::SeveralModels { folder: path.to_path_buf(), found }),
    }
}

/// Elements of a trial's inputs together, 64 MiB of them: room for a picture whose every dimension is
/// open, but not for a film.
const TRIAL_ELEMENTS: usize = 16 << 20;

/// What open dimensions are tried with: sizes that pictures and sentences have, but for those that would
/// make more of them than a host has memory for. With 1 they are as small as they can be.
fn trial_sizes(signature: &Signature) -> Vec<usize> {
    let elements = |size| {
        let shapes = trial_shapes(signature, 1, size);
        let of = |shape: &Vec<usize>| shape.iter().try_fold(1_usize, |all, n| all.checked_mul(*n));
        shapes.iter().map(of).try_fold(0_usize, |all, n| all.checked_add(n?))
    };
    let fits = |size: &usize| *size == 1 || elements(*size).is_some_and(|n| n <= TRIAL_ELEMENTS);
    [1, 16, 64, 224].into_iter().filter(fits).collect()
}

/// The shapes of a trial's inputs: the first dimension is `rows` where it is open, every other open one
/// is `size`.
fn trial_shapes(signature: &Signature, rows: usize, size: usize) -> Vec<Vec<usize>> {
    // Open dimensions of one name have one size, also when the first is named like a later one.
    let mut named = BTreeMap::new();
    let mut of = |(place, dim): (usize, &Dim)| {
        let open = if place == 0 { rows } else { size };
        match dim {
            Dim::Fixed(size) => *size,
            Dim::Open(None) => open,
            Dim::Open(Some(name)) => *named.entry(name.clone()).or_insert(open),
        }
    };
    let dims = |spec: &TensorSpec| -> Vec<usize> {
        spec.shape.iter().flatten().enumerate().map(&mut of).collect()
    };
    signature.inputs.iter().map(dims).collect()
}

/// Inputs of the signature's data types and shapes, the same for the same arguments.
///
/// Their shapes are those of [`trial_shapes`]. Real numbers lie between -1 and 1; whole ones are 0 or
/// 1, which any table that is looked up has.
fn trial_inputs(signature: &Signature, rows: usize, size: usize, seed: u32) -> Vec<Tensor> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let shapes = trial_shapes(signature, rows, size);
    signature
        .inputs
        .iter()
        .zip(shapes)
        .map(|(spec, shape)| {
            let count = shape.iter().product::<usize>();
            let elements = if spec.datatype.is_float() {
                #[expect(clippy::cast_precision_loss, reason = "any number will do")]
                let real = |n: u32| (n >> 8) as f32 / 8_388_608.0 - 1.0;
                Elements::F32((0..count).map(|_| real(next())).collect())
            } else {
                let bits: Vec<i64> = (0..count).map(|_| i64::from(next() >> 31)).collect();
                // 0 and 1 fit into every data type.
                Elements::from_whole(spec.datatype, bits.into_iter())
                    .unwrap_or(Elements::I32(vec![0; count]))
            };
            Tensor { shape, elements }
        })
        .collect()
}

/// Equal up to the rounding of sums that are taken in another order.
fn alike(a: &Tensor, b: &Tensor) -> bool {
    if a.shape != b.shape {
        return false;
    }
    match (a.elements.as_real(), b.elements.as_real()) {
        (Some(a), Some(b)) => a.iter().zip(b).all(|(a, b)| {
            a == b
                || (a.is_nan() && b.is_nan())
                || (a - b).abs() <= 1e-4 * a.abs().max(b.abs()).max(1.0)
        }),
        (None, None) => a.elements == b.elements,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Datatype;

    fn sample(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
    }

    #[test]
    fn a_folder_without_or_with_several_models_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(find(folder.path()), Err(LoadError::NoModel { .. })));
        fs::write(folder.path().join("a.onnx"), "").unwrap();
        assert_eq!(find(folder.path()).unwrap(), folder.path().join("a.onnx"));
        fs::create_dir(folder.path().join("deeper")).unwrap();
        fs::write(folder.path().join("deeper/b.ONNX"), "").unwrap();
        assert!(matches!(
            find(folder.path()),
            Err(LoadError::SeveralModels { found, .. }) if found.len() == 2
        ));
        fs::write(folder.path().join("model.onnx"), "").unwrap();
        assert_eq!(find(folder.path()).unwrap(), folder.path().join("model.onnx"));
        let absent = folder.path().join("absent");
        assert!(matches!(find(&absent), Err(LoadError::Unreadable { .. })));
    }

    #[test]
    fn a_search_ends_when_it_has_found_several() {
        let folder = tempfile::tempdir().unwrap();
        for below in 0..4 {
            let below = folder.path().join(below.to_string());
            fs::create_dir(&below).unwrap();
            for file in 0..4 {
                fs::write(below.join(format!("{file}.onnx")), "").unwrap();
            }
        }
        assert!(matches!(
            find(folder.path()),
            Err(LoadError::SeveralModels { found, .. }) if found.len() == 5
        ));
    }

    #[test]
    fn a_film_of_open_dimensions_is_not_tried_in_all_sizes() {
        let signature = |shape: &[Dim]| {
            let shape = Some(shape.to_vec());
            let spec = TensorSpec { name: "x".to_owned(), datatype: Datatype::Fp32, shape };
            Signature { inputs: vec![spec], ..Signature::default() }
        };
        let open = Dim::Open(None);
        let of = |open_dims: usize| trial_sizes(&signature(&vec![open.clone(); open_dims]));
        assert_eq!(of(4), [1, 16, 64, 224]);
        assert_eq!(of(5), [1, 16, 64]);
        // What the file itself says is tried whatever it is.
        assert_eq!(trial_sizes(&signature(&[Dim::Fixed(usize::MAX), Dim::Fixed(2)])), [1]);
    }

    #[test]
    fn a_damaged_file_is_refused_and_does_not_crash() {
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(sample("digits").join("model.onnx")).unwrap();
        for cut in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(folder.path().join("model.onnx"), &whole[..cut]).unwrap();
            assert!(Model::open(folder.path(), 1).is_err(), "{cut} bytes");
        }
    }

    #[test]
    fn rows_of_the_samples_are_independent() {
        for name in ["iris", "digits"] {
            let trial = Model::open(&sample(name), 1).unwrap().try_out().unwrap();
            assert_eq!(trial, Trial { joinable: Ok(()), untried: None }, "{name}");
        }
    }

    #[test]
    fn made_up_inputs_are_the_same_for_the_same_seed() {
        let signature = Model::open(&sample("digits"), 1).unwrap().signature;
        let inputs = trial_inputs(&signature, 2, 1, 9);
        assert_eq!(inputs, trial_inputs(&signature, 2, 1, 9));
        assert_ne!(inputs, trial_inputs(&signature, 2, 1, 10));
        assert_eq!(inputs[0].shape, [2, 1, 8, 8]);
    }
}
