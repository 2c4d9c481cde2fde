// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The metrics of an agent, as scrapers and strangers see them:
//!
//! - [`scrapes`]: what they say about jobs;
//! - [`strangers`]: clients that are slow, silent, many or wrong, while a guest moves;
//! - [`documents`]: what the documentation and the dashboard say about them.

mod documents;
mod scrapes;
mod strangers;

use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram, Scrape};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An agent process that serves metrics, and its VMM in this process. The VMM goes first.
struct Side {
    vmm: Attached,
    metrics: PathBuf,
    agent: AgentProcess,
}

impl Side {
    fn new(folder: &Path, name: &str, pages: u64) -> Self {
        let metrics = folder.join(format!("{name}.metrics"));
        let address = format!("unix:{}", metrics.display());
        let mut command = Command::new(program());
        let more = ["--metrics", &address];
        let agent = AgentProcess::start_with(&mut command, folder, name, &more).unwrap();
        Self { vmm: Attached::new(agent.socket(), Ram::odd(pages)), metrics, agent }
    }

    fn scrape(&self) -> Scrape {
        Scrape::of(&self.metrics)
    }
}
