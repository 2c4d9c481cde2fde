// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's command line inside the harness's own program, so that a test needs no other
//! program.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs `pageferry` with these arguments, without the program's name.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    pageferry_agent::cli::main_from(std::iter::once(OsString::from("pageferry")).chain(arguments))
}
