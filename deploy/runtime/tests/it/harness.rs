//! A server in this process on a free port, and two clients for it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use berth_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use berth_runtime::args::Command;
use berth_runtime::serve::{self, ServeError};
use bytes::Bytes;
use clap::Parser as _;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tonic::transport::Channel;

/// No test waits longer for anything; reached only when something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A sample model's folder.
pub(crate) fn sample(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

/// A model made for the tests.
pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.onnx"))
}

/// A JSON file of a sample model.
pub(crate) fn sample_json(model: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(sample(model).join(file)).unwrap()).unwrap()
}

/// A running server.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) ready: watch::Receiver<bool>,
    stop: Option<oneshot::Sender<()>>,
    ended: tokio::task::JoinHandle<Result<(), ServeError>>,
    client: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>,
}

impl Server {
    /// Starts a server without waiting for its model.
    pub(crate) async fn start(model: PathBuf, more: &[&str]) -> Self {
        let model = model.to_str().unwrap().to_owned();
        let mut args = vec!["berth-runtime", "--listen", "127.0.0.1:0", "--model-dir", &model];
        args.extend(more);
        let bound = serve::bind(Command::try_parse_from(args).unwrap().serve).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let (address, ready) = (bound.address(), bound.ready());
        let ended = tokio::spawn(bound.run(async {
            let _ = stopped.await;
        }));
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { address, ready, stop: Some(stop), ended, client }
    }

    /// Starts a server and waits until it is ready.
    pub(crate) async fn ready(model: PathBuf, more: &[&str]) -> Self {
        let mut server = Self::start(model, more).await;
        let ready = server.ready.wait_for(|ready| *ready);
        tokio::time::timeout(PATIENCE, ready).await.unwrap().unwrap();
        server
    }

    /// Tells the server to stop; does not wait.
    pub(crate) fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits for the server's end.
    pub(crate) async fn end(self) -> Result<(), ServeError> {
        drop(self.client);
        tokio::time::timeout(PATIENCE, self.ended).await.unwrap().unwrap()
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn send(&self, request: http::Request<Full<Bytes>>) -> http::Response<Bytes> {
        let answer = async {
            let (head, body) = self.client.request(request).await.unwrap().into_parts();
            http::Response::from_parts(head, body.collect().await.unwrap().to_bytes())
        };
        tokio::time::timeout(PATIENCE, answer).await.unwrap()
    }

    /// GET, as status and JSON.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let request = self.request("GET", path).body(Full::default()).unwrap();
        as_json(&self.send(request).await)
    }

    /// POST of JSON, as status and JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let body = Full::from(serde_json::to_vec(body).unwrap());
        as_json(&self.send(self.request("POST", path).body(body).unwrap()).await)
    }

    /// A request to this server.
    pub(crate) fn request(&self, method: &str, path: &str) -> http::request::Builder {
        http::Request::builder().method(method).uri(format!("http://{}{path}", self.address))
    }

    /// The value of one series of the metrics.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let request = self.request("GET", "/metrics").body(Full::default()).unwrap();
        let page = String::from_utf8(self.send(request).await.into_body().to_vec()).unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(series)).unwrap();
        value.trim().parse().unwrap()
    }

    /// A gRPC client.
    pub(crate) async fn grpc(&self) -> GrpcInferenceServiceClient<Channel> {
        let channel = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        GrpcInferenceServiceClient::new(channel.connect().await.unwrap())
    }
}

fn as_json(response: &http::Response<Bytes>) -> (u16, Value) {
    let json = serde_json::from_slice(response.body())
        .unwrap_or_else(|e| panic!("{e}: {:?}", response.body()));
    (response.status().as_u16(), json)
}

/// Asserts that two lists of numbers agree within the samples' tolerance.
pub(crate) fn assert_close(got: &[f64], wanted: &[f64]) {
    assert_eq!(got.len(), wanted.len());
    for (place, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() <= 1e-5, "element {place}: {got} instead of {wanted}");
    }
}

/// The `data` of a JSON output as numbers.
pub(crate) fn numbers(output: &Value) -> Vec<f64> {
    output["data"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}
