//! The command line: what can be set, what each setting means, and what is refused.
//!
//! Every flag can be given as an environment variable, because a deployment sets the environment of
//! its container more easily than its arguments. The doc comments here are the help text.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use berth_proto::quantity::{self, InvalidQuantity};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Serves one ONNX model over the Open Inference Protocol v2.
///
/// HTTP/1.1 and gRPC (HTTP/2 without TLS) share one port. The server answers at once; it says that it
/// is ready when the model is loaded and has run once. Inputs, outputs, data types and shapes are read
/// from the model: ask `GET /v2/models/NAME` for them.
///
/// On SIGTERM or SIGINT it takes no new connections, finishes the requests it has and exits with 0.
#[derive(Debug, Parser)]
#[command(name = "berth-runtime", version, args_conflicts_with_subcommands = true)]
pub struct Command {
    /// Another job than serving.
    #[command(subcommand)]
    pub job: Option<Job>,

    /// How to serve.
    #[command(flatten)]
    pub serve: Serve,
}

/// Jobs other than serving.
#[derive(Debug, Subcommand)]
pub enum Job {
    /// Ask a running server whether it is ready; exits with 0 if so and 1 if not.
    ///
    /// For health checks that run a program inside the container, where there is no curl.
    Healthcheck(Healthcheck),
}

/// Settings of the health check.
#[derive(Debug, Args)]
pub struct Healthcheck {
    /// Where the server listens. One that listens on all addresses is asked on the loopback one.
    #[arg(long, env = "BERTH_LISTEN", value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// What to ask for: /v2/health/ready or /v2/health/live.
    #[arg(long, value_name = "PATH", default_value = "/v2/health/ready")]
    pub path: String,

    /// How long to wait for the answer.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub timeout: Duration,
}

/// Settings of the server.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    /// Folder of the model: its model.onnx, or the only file in it that ends in .onnx. May also be the file.
    #[arg(long, env = "BERTH_MODEL_DIR", value_name = "FOLDER", default_value = "/model")]
    pub model_dir: PathBuf,

    /// Name under which requests must ask for the model.
    #[arg(long, env = "BERTH_MODEL_NAME", value_name = "NAME", default_value = "model",
          value_parser = name)]
    pub model_name: String,

    /// Version of the model. Requests that name a version must name this one.
    #[arg(long, env = "BERTH_MODEL_VERSION", value_name = "VERSION", default_value = "1",
          value_parser = name)]
    pub model_version: String,

    /// Address and port to listen on, for HTTP and gRPC alike.
    #[arg(long, env = "BERTH_LISTEN", value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// Threads for one run of the model. Default: the processors this container may use.
    #[arg(long, env = "BERTH_THREADS", value_name = "COUNT",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,

    /// Rows that one run of the model may take together; 1 turns batching off.
    ///
    /// Requests that wait while the model runs are joined along their first dimension. That is done
    /// only if the model leaves its first dimension open and a test at the start shows that rows do
    /// not influence each other. A single request is never split.
    #[arg(long, env = "BERTH_MAX_BATCH", value_name = "ROWS", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_batch: u32,

    /// How long a request may wait for others to be joined with.
    ///
    /// 0ms runs whatever waits as soon as the model is free: the best latency, and under load
    /// requests still meet. More gives larger batches, for models that gain from them.
    #[arg(long, env = "BERTH_MAX_DELAY", value_name = "DURATION", default_value = "0ms",
          value_parser = duration)]
    pub max_delay: Duration,

    /// Requests in progress, waiting ones included; more are refused (503, UNAVAILABLE).
    ///
    /// What is read of them takes at most this times --max-body; the tensors made of it take some
    /// times more, as a digit and a comma become a number of eight bytes.
    #[arg(long, env = "BERTH_QUEUE", value_name = "COUNT", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub queue: u32,

    /// Largest request that is read, such as 512KiB or 16MiB.
    #[arg(long, env = "BERTH_MAX_BODY", value_name = "BYTES", default_value = "16MiB",
          value_parser = bytes)]
    pub max_body: usize,

    /// How long a request may take, from its first byte to its answer (504, DEADLINE_EXCEEDED).
    #[arg(long, env = "BERTH_REQUEST_TIMEOUT", value_name = "DURATION", default_value = "30s",
          value_parser = duration)]
    pub request_timeout: Duration,

    /// How long requests get to finish after SIGTERM. Keep it below the deployment's stopGrace.
    #[arg(long, env = "BERTH_SHUTDOWN_GRACE", value_name = "DURATION", default_value = "8s",
          value_parser = duration)]
    pub shutdown_grace: Duration,

    /// What to log: error, warn, info, debug, trace, or a filter such as info,berth_runtime=debug.
    #[arg(long, env = "LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub log_level: String,

    /// How to log: lines for people, or one JSON object a line. Always to standard output.
    #[arg(long, env = "LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// One JSON object.
    Json,
}

/// A duration as manifests write it: `250ms`, `30s`, `1h30m`.
fn duration(text: &str) -> Result<Duration, InvalidQuantity> {
    quantity::parse_duration_ms(text).map(Duration::from_millis)
}

/// A size as manifests write it, from 1 KiB to 2 GiB: gRPC's messages cannot be larger than 4.
fn bytes(text: &str) -> Result<usize, String> {
    let total = quantity::parse_bytes(text).map_err(|e| e.to_string())?;
    usize::try_from(total)
        .ok()
        .filter(|total| (1 << 10..=2 << 30).contains(total))
        .ok_or_else(|| format!("\"{text}\" is out of range: 1KiB to 2GiB"))
}

/// A name that can stand as one segment of a path and in a log line.
fn name(text: &str) -> Result<String, String> {
    let fits = (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 128 of a-z, A-Z, 0-9, '.', '_' and '-'".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Command::command().debug_assert();
    }

    fn serve(args: &[&str]) -> Result<Serve, String> {
        let args = ["berth-runtime"].iter().chain(args);
        Command::try_parse_from(args).map(|command| command.serve).map_err(|e| e.to_string())
    }

    #[test]
    fn durations_and_sizes_are_read_with_their_units() {
        let args = serve(&["--max-delay", "2ms", "--max-body", "1MiB"]).unwrap();
        assert_eq!(args.max_delay, Duration::from_millis(2));
        assert_eq!(args.max_body, 1 << 20);
    }

    #[test]
    fn durations_and_sizes_without_sense_are_refused_by_name() {
        for (flag, text, wanted) in [
            ("--max-delay", "soon", "30s"),
            ("--max-body", "16 apples", "MiB"),
            ("--max-body", "3GiB", "1KiB to 2GiB"),
            ("--max-body", "12", "1KiB to 2GiB"),
        ] {
            let error = serve(&[flag, text]).unwrap_err();
            assert!(error.contains(flag) && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn serving_is_the_default_job() {
        let command = Command::try_parse_from(["berth-runtime", "--model-name", "iris"]).unwrap();
        assert!(command.job.is_none());
        assert_eq!(command.serve.model_name, "iris");
    }

    #[test]
    fn a_model_name_that_is_no_path_segment_is_refused() {
        assert!(Command::try_parse_from(["berth-runtime", "--model-name", "a/b"]).is_err());
        assert!(Command::try_parse_from(["berth-runtime", "--model-name", ""]).is_err());
    }
}
