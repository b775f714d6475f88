//! `berth`, the Berth command line.

mod args;
mod client;
mod commands;
mod error;
mod output;
mod package;
mod push;

fn main() -> std::process::ExitCode {
    commands::run(std::env::args_os())
}
