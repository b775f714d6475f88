//! `berth-agent`, the Berth agent.

fn main() -> std::process::ExitCode {
    berth_agent::args::main(std::env::args_os())
}
