//! The `pageferry` binary: the agent, and what an operator asks of it. See `pageferry --help`.

fn main() -> std::process::ExitCode {
    pageferry_agent::cli::main_from(std::env::args_os())
}
