// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program that tests start as an agent or as a mock VMM. `agent ...` is `pageferry agent ...`,
//! and `mock-vmm ...` is the example `mock_vmm`. `forbidden ...` tries what an agent may not do.
#![deny(unsafe_code)]

use pageferry_tests::{agent, forbidden, mock_vmm};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "mock-vmm") {
        arguments.remove(0);
        return mock_vmm::main(arguments);
    }
    if arguments.first().is_some_and(|first| first == "forbidden") {
        return forbidden::main(&arguments[1..]);
    }
    agent::main(arguments)
}
