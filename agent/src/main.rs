// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The `pageferry` binary: the agent, and the operator's subcommands. See `pageferry --help`.

fn main() -> std::process::ExitCode {
    pageferry_agent::cli::main_from(std::env::args_os())
}
