// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A line of the agent's log. It carries the name of the VM, since the logs of many agents are read
//! together.

use crate::vm_name::VmName;
use std::io::Write;

/// Writes lines such as `[2026-01-31T12:00:00Z INFO  vm1 pageferry_agent::server] listening`.
/// Without a name, it is left out.
pub fn name_the_vm(logger: &mut env_logger::Builder, name: VmName) {
    logger.format(move |line, record| {
        let (time, level) = (line.timestamp(), record.level());
        let name = name.get();
        let space = if name.is_empty() { "" } else { " " };
        let (target, text) = (record.target(), record.args());
        writeln!(line, "[{time} {level:<5} {name}{space}{target}] {text}")
    });
}
