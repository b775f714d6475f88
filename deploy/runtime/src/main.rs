//! The program `berth-runtime`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    berth_runtime::run(std::env::args_os())
}
