// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agent or mock VMM as a process of its own, for the scenario tests: `agent ...` as in
//! `pageferry agent ...`, `mock-vmm ...` as in the example `mock_vmm`.
#![deny(unsafe_code)]

use pageferry_tests::{agent, mock_vmm};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "mock-vmm") {
        arguments.remove(0);
        return mock_vmm::main(arguments);
    }
    agent::main(arguments)
}
