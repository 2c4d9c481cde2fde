// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line `mock_vmm source|destination|clone`: the parts of a migration, a snapshot or a
//! restore, driven from a shell.
//!
//! - [`cli`]: its options;
//! - [`source`], [`destination`]: the two sides;
//! - [`report`]: what they print at the end;
//! - [`clone`]: many guests of one image, and what they take.
//!
//! The memory of the guests of both sides is an existing sparse file. It is never truncated, and
//! its holes are never read through the mapping. So a user can prepare the content, and afterwards
//! compare the two files and what is allocated in them.
#![allow(clippy::print_stdout)]

pub mod cli;
pub mod clone;
pub mod destination;
pub mod report;
pub mod source;

use crate::Error;
use crate::memory::{Backing, BlockLayout, TestMemory};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use clap::Parser;
use report::Report;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs `mock_vmm` with these arguments, without the program's name. Succeeds if a migration was
/// verified and committed, a snapshot's image is complete, or a restore or clones were verified.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let cli = match cli::Cli::try_parse_from(
        std::iter::once(OsString::from("mock_vmm")).chain(arguments),
    ) {
        Ok(cli) => cli,
        Err(error) => {
            // This fails only if standard output is closed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let level = match &cli.command {
        // A clone whose agent is lost is lost: each would say so when it begins.
        cli::Command::Clone(_) => "error",
        _ => "warn",
    };
    let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .try_init();
    let (json, report) = match &cli.command {
        cli::Command::Source(arguments) => (arguments.common.json, source::run(arguments)),
        cli::Command::Destination(arguments) => {
            (arguments.common.json, destination::run(arguments))
        }
        // It prints its report by itself, while the clones still run.
        cli::Command::Clone(arguments) => match clone::run(arguments) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) if arguments.json => (true, Err(error)),
            Err(error) => {
                println!("failed: {}", error.sentence());
                return ExitCode::FAILURE;
            }
        },
    };
    let report = report.unwrap_or_else(|error| Report::failed(&error));
    if json {
        println!("{}", report.json());
    } else {
        println!("{report}");
    }
    if report.succeeded() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// How long to wait for an agent that was started at the same time.
const AGENT_STARTS: Duration = Duration::from_secs(10);

/// Connects to the agent, once it listens.
fn connect(
    common: &cli::Common, usage: &Arc<Usage>, tracker: impl Fn() -> Tracker,
) -> Result<MockVmm, Error> {
    let until = Instant::now() + AGENT_STARTS;
    loop {
        let connect = if common.supervise { MockVmm::supervised } else { MockVmm::connect };
        match connect(&common.socket, usage.clone(), tracker()) {
            Err(Error::Client(pageferry_client::Error::Connect { .. }))
                if Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            connected => return connected,
        }
    }
}

/// The file as the guest's memory: block "ram", id 0, from guest address 0.
fn memory(common: &cli::Common) -> Result<Arc<TestMemory>, Error> {
    let path = common.memory.display();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&common.memory);
    let file = file.map_err(Error::io(format!("open {path}")))?;
    let layout =
        BlockLayout { backing: Backing::File(Arc::new(file)), ..BlockLayout::ram(common.size) };
    Ok(Arc::new(TestMemory::new(vec![layout])?))
}
