//! A small model server: one ONNX model over the Open Inference Protocol v2.
//!
//! It runs alone in a container without anything else in it: a static program, a mounted folder with
//! the model, a read-only file system, no privileges. It reads the model, the command line and the
//! environment, and writes nothing but answers and log lines.
//!
//! What always holds:
//!
//! 1. It says that it is ready only after the model has run once.
//! 2. The memory that requests take is bounded: their number, their size, and how long they may last.
//! 3. A wrong request, or one that makes the engine panic, fails by itself and harms no other.
//! 4. Joining requests into one run never changes an answer: models for which it would are found out
//!    before the server is ready, and run one request at a time.

pub mod args;
pub mod batch;
pub mod error;
pub mod grpc;
pub mod healthcheck;
pub mod http;
pub mod json;
pub mod metrics;
pub mod model;
pub mod serve;
pub mod service;
pub mod signature;
pub mod tensor;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use crate::args::{Command, Job, LogFormat, Serve};
use crate::error::Chain;

/// Runs the program: 0 when it was told to stop and nothing was cut off, 1 when it failed, 2 for a
/// wrong command line.
#[must_use]
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = match Command::try_parse_from(args) {
        Ok(command) => command,
        Err(error) => {
            // Help and version go to standard output with code 0, mistakes to standard error with 2.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match command.job {
        Some(Job::Healthcheck(args)) => match healthcheck::check(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("unhealthy: {}", Chain(&error));
                ExitCode::FAILURE
            }
        },
        None => start(command.serve),
    }
}

fn start(args: Serve) -> ExitCode {
    let filter = match EnvFilter::try_new(&args.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("error: invalid value '{}' for '--log-level': {error}", args.log_level);
            return ExitCode::from(2);
        }
    };
    log(args.log_format, filter);
    // Two at least: a large request that is being read must not hold up the health checks.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(serve::processors().clamp(2, 8))
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        let stop = told_to_stop();
        serve::bind(args).await?.run(stop).await
    });
    // A run of the model that nobody waits for must not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ok(()) => {
            info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!("{}", serve::describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn log(format: LogFormat, filter: EnvFilter) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(std::io::stdout)
        .with_ansi(std::io::stdout().is_terminal());
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// Ends at the first SIGTERM or SIGINT. The handlers are set up by the call, not by the first poll,
/// so that a signal during the start is not lost: as the first process of a container this one would
/// otherwise not notice it at all.
fn told_to_stop() -> impl Future<Output = ()> {
    let mut signals = Vec::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        match signal(kind) {
            Ok(signal) => signals.push(signal),
            Err(error) => error!("cannot listen for signals: {error}"),
        }
    }
    std::future::poll_fn(move |context| {
        if signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
}
