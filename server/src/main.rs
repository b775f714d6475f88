//! `berthd`, the Berth server.

fn main() -> std::process::ExitCode {
    berth_server::args::main(std::env::args_os())
}
