//! What both protocols share: which model is served, whether it is ready, and one inference.
//!
//! Knows neither HTTP nor gRPC. A request is admitted before its body is read, so that the number of
//! requests in progress bounds the memory they take.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::batch::{Job, Queue};
use crate::error::Error;
use crate::metrics::{Metrics, Now};
use crate::model::Model;
use crate::signature::Signature;
use crate::tensor::Tensor;

/// The program's name in the server's metadata.
pub const SERVER_NAME: &str = "berth-runtime";

/// What runs the model, in the model's metadata.
pub const PLATFORM: &str = "onnx_rten";

/// Protocol extensions that are understood.
pub const EXTENSIONS: [&str; 1] = ["binary_tensor_data"];

/// Settings that hold for the life of the server.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's name.
    pub model: String,
    /// The model's version.
    pub version: String,
    /// Largest request in bytes.
    pub max_body: usize,
    /// Longest time of a request.
    pub timeout: Duration,
    /// Requests in progress.
    pub limit: usize,
}

/// By when a request must be answered.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// The time.
    pub at: tokio::time::Instant,
    /// How long that was from the request's start: what the caller is told when it has passed.
    pub limit: Duration,
}

impl Deadline {
    /// `limit` from now.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self { at: tokio::time::Instant::now() + limit, limit }
    }

    /// The outcome of `work`, unless the deadline passes first; `work` is dropped then.
    ///
    /// # Errors
    ///
    /// [`Error::TooLate`].
    pub async fn bound<T>(self, work: impl Future<Output = T>) -> Result<T, Error> {
        tokio::time::timeout_at(self.at, work)
            .await
            .map_err(|_| Error::TooLate { limit: self.limit })
    }
}

/// What is there once the model is loaded.
#[derive(Debug)]
struct Loaded {
    model: Arc<Model>,
    queue: Arc<Queue>,
    joining: bool,
    after: Duration,
}

/// The served model.
#[derive(Debug)]
pub struct Service {
    settings: Settings,
    started: Instant,
    loaded: OnceLock<Loaded>,
    stopping: AtomicBool,
    admission: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Service {
    /// A service whose model is still to be loaded.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            admission: Arc::new(Semaphore::new(settings.limit)),
            settings,
            started: Instant::now(),
            loaded: OnceLock::new(),
            stopping: AtomicBool::new(false),
            metrics: Arc::default(),
        }
    }

    /// Makes the model available. The second call does nothing.
    pub fn load(&self, model: Arc<Model>, queue: Arc<Queue>, joining: bool) {
        let after = self.started.elapsed();
        let _ = self.loaded.set(Loaded { model, queue, joining, after });
    }

    /// Says "not ready" from now on; requests that still come are answered.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Requests in progress.
    #[must_use]
    pub fn in_progress(&self) -> usize {
        self.settings.limit.saturating_sub(self.admission.available_permits())
    }

    /// The page of metrics.
    #[must_use]
    pub fn metrics_page(&self) -> String {
        let loaded = self.loaded.get();
        self.metrics.page(Now {
            model: &self.settings.model,
            version: &self.settings.version,
            ready: self.ready().is_ok(),
            joining: loaded.is_some_and(|loaded| loaded.joining),
            in_progress: self.in_progress(),
            limit: self.settings.limit,
            load_seconds: loaded.map_or(0.0, |loaded| loaded.after.as_secs_f64()),
        })
    }

    /// Checks that requests are welcome.
    ///
    /// # Errors
    ///
    /// While the model loads, and once the server stops.
    pub fn ready(&self) -> Result<(), Error> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::Stopping);
        }
        self.loaded().map(|_| ())
    }

    /// Checks that this model is meant; an empty version means any.
    ///
    /// # Errors
    ///
    /// When another model or version is asked for.
    pub fn resolve(&self, model: &str, version: &str) -> Result<(), Error> {
        if model != self.settings.model {
            return Err(Error::UnknownModel {
                asked: model.to_owned(),
                served: self.settings.model.clone(),
            });
        }
        if !version.is_empty() && version != self.settings.version {
            return Err(Error::UnknownVersion {
                model: model.to_owned(),
                asked: version.to_owned(),
                served: self.settings.version.clone(),
            });
        }
        Ok(())
    }

    /// Takes a place among the requests in progress; it is given back when the permit is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`] at once when there is none: a caller can go elsewhere, waiting here would
    /// only hide the load.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.admission
            .clone()
            .try_acquire_owned()
            .map_err(|_| Error::QueueFull { limit: self.settings.limit })
    }

    /// What the model takes and gives.
    ///
    /// # Errors
    ///
    /// While the model loads.
    pub fn signature(&self) -> Result<&Signature, Error> {
        self.loaded().map(|loaded| loaded.model.signature())
    }

    /// Runs the model on `inputs`, each with its place in the signature, for the `wanted` outputs.
    ///
    /// # Errors
    ///
    /// When the inputs do not fit, when the model fails, or when `deadline` passes; what already runs
    /// is then finished without anybody waiting.
    pub async fn infer(
        &self,
        inputs: Vec<(usize, Tensor)>,
        wanted: Vec<usize>,
        deadline: Deadline,
    ) -> Result<Vec<Tensor>, Error> {
        let loaded = self.loaded()?;
        let signature = loaded.model.signature();
        let inputs = signature.arrange(inputs)?;
        if loaded.joining {
            signature.same_rows(&inputs)?;
        }
        let (reply, answer) = oneshot::channel();
        loaded.queue.push(Job { inputs, wanted, since: Instant::now(), reply })?;
        // The worker ends only after the queue is empty, so no answer means that it is gone.
        let gone = |_| Err(Error::Crashed("the worker ended".to_owned()));
        deadline.bound(answer).await?.unwrap_or_else(gone)
    }

    /// Lets the worker end when it has done what waits.
    pub fn close(&self) {
        if let Some(loaded) = self.loaded.get() {
            loaded.queue.close();
        }
    }

    fn loaded(&self) -> Result<&Loaded, Error> {
        self.loaded.get().ok_or_else(|| Error::Loading { model: self.settings.model.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        Service::new(Settings {
            model: "iris".to_owned(),
            version: "2".to_owned(),
            max_body: 1024,
            timeout: Duration::from_secs(1),
            limit: 1,
        })
    }

    #[test]
    fn only_its_own_name_and_version_are_served() {
        let service = service();
        assert!(service.resolve("iris", "").is_ok());
        assert!(service.resolve("iris", "2").is_ok());
        assert!(matches!(service.resolve("iris", "1"), Err(Error::UnknownVersion { .. })));
        assert!(matches!(service.resolve("rose", "2"), Err(Error::UnknownModel { .. })));
    }

    #[test]
    fn it_is_not_ready_before_the_model_is_loaded_nor_after_the_stop() {
        let service = service();
        assert!(matches!(service.ready(), Err(Error::Loading { .. })));
        service.stop();
        assert!(matches!(service.ready(), Err(Error::Stopping)));
    }

    #[test]
    fn a_place_is_given_back() {
        let service = service();
        let place = service.admit().unwrap();
        assert!(matches!(service.admit(), Err(Error::QueueFull { limit: 1 })));
        assert_eq!(service.in_progress(), 1);
        drop(place);
        assert!(service.admit().is_ok());
    }
}
