//! `berth`, the Berth command line.

mod args;
mod client;
mod commands;
mod dockerignore;
mod engine;
mod error;
mod help;
mod hints;
mod onnx;
mod output;
mod package;
mod progress;
mod push;
mod style;
mod whole;

fn main() -> std::process::ExitCode {
    commands::run(std::env::args_os())
}
