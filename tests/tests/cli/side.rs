// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent process with a VMM in this process, and the commands of its operator.

use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// 16 MiB: a job of 64 KiB per second does not end by itself.
pub const PAGES: u64 = 4096;

/// An agent process, and its VMM in this process.
pub struct Side {
    pub vmm: Attached,
    pub agent: AgentProcess,
}

impl Side {
    pub fn new(folder: &Path, name: &str) -> Self {
        let agent = AgentProcess::spawn(program(), folder, name).unwrap();
        Self { vmm: Attached::new(agent.socket(), Ram::odd(PAGES)), agent }
    }

    /// The same with a full memory: each page has its number, from 1.
    pub fn full(folder: &Path, name: &str) -> Self {
        let side = Self::new(folder, name);
        (0..PAGES).for_each(|page| side.vmm.ram.write(page, page + 1));
        side
    }

    pub fn command(&self, what: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg(what).arg("--socket").arg(self.agent.socket()).args(more).stdin(Stdio::null());
        command
    }

    pub fn run(&self, what: &str, more: &[&str]) -> Output {
        self.command(what, more).output().unwrap()
    }

    /// The last object that the command prints.
    pub fn json(&self, what: &str) -> Value {
        last_object(&self.run(what, &["--json"]))
    }
}

pub fn last_object(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    serde_json::from_str(
        text.lines().last().unwrap_or_else(|| panic!("nothing printed: {output:?}")),
    )
    .unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
