// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a guest waits whose agent dies before all of its memory is there, until another agent
//! continues.
//!
//! A lazy restore is so slow that nearly every page is missing. A thread touches one page after the
//! other, as a vCPU would. Again and again it kills the agent, and touches the next page at once:
//! that wait is the whole time until the supervisor has started the next agent, and that has placed
//! the page.
//!
//! The same for an agent that is upgraded instead. It serves for a moment after the signal, so the
//! thread goes on to touch pages until one of them has waited for the next program.

use super::super::Bench;
use super::super::image::{Image, WarmPool};
use super::super::table::{Better, Table};
use super::roamer::{Roamer, Roams};
use super::{LIMIT, MIB, Shelf, bar, restore::save};
use pageferry_client::{
    Config, MIN_BANDWIDTH, Parameters, RestoreMode, RestoreOptions, Supervisor, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::{AgentProcess, program};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Deaths in each round.
const DEATHS: u64 = 40;
/// Touches between two deaths.
const TOUCHES: u64 = 200;

/// Touches missing pages, each once, in an order in which no page is near the one before.
struct Touches<'a> {
    block: &'a TestBlock,
    next: u64,
    pages: u64,
}

impl Touches<'_> {
    fn touch(&mut self) -> Duration {
        // The factor is odd, and the number of pages a power of two.
        let page = self.next.wrapping_mul(0x9e37_79b1) % self.pages;
        self.next += 1;
        let since = Instant::now();
        self.block.load(page * PAGE_SIZE).unwrap();
        since.elapsed()
    }
}

/// 512 MiB, lazy.
pub fn deaths(bench: &Bench, table: &mut Table) {
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    let size = 512 * MIB / bench.shrink;
    let source = Image::new(&bench.folder, "source", size);
    source.fill(0, size);
    let path = save(&source, &shelf);
    drop(source);
    let target = Image::new(&bench.folder, "target", size);
    let _warm = WarmPool::new(&bench.folder, size);
    let work = format!("restore: {} MiB, lazy, a fault", size >> 20);
    let mut usual = Vec::new();
    for (end, signal) in [("as the agent dies", Signal::KILL), ("upgrade", Signal::USR2)] {
        let mut waits = Vec::new();
        for _ in 0..bench.rounds {
            target.clear();
            round(bench, &target, &path, signal, &mut usual, &mut waits);
        }
        let longest = waits.iter().copied().fold(0.0, f64::max);
        figures(table, &work, end, waits);
        bar(table, &format!("{work}, {end}: the longest"), "ms", &[longest], 50.0, Better::Less);
    }
    figures(table, &work, "with an agent", usual);
}

fn figures(table: &mut Table, work: &str, when: &str, mut samples: Vec<f64>) {
    samples.sort_by(f64::total_cmp);
    let at = |part: f64| samples[((samples.len() - 1) as f64 * part) as usize];
    for (name, value) in [("p50", at(0.5)), ("p99", at(0.99)), ("most", at(1.0))] {
        let remark = format!("of {}", samples.len());
        table.add(work, &format!("{when}, {name}"), "ms", &[value], remark);
    }
}

/// Restores once. Adds the milliseconds that touches took to `usual`, and those that waited for the
/// next agent to `waits`.
fn round(
    bench: &Bench, target: &Image, path: &Path, signal: Signal, usual: &mut Vec<f64>,
    waits: &mut Vec<f64>,
) {
    let size = 512 * MIB / bench.shrink;
    let file = Arc::new(target.file.try_clone().unwrap());
    let layout = BlockLayout { backing: Backing::File(file), ..BlockLayout::ram(size) };
    let memory = Arc::new(TestMemory::new(vec![layout]).unwrap());
    let hooks = Roams(Roamer::new(&memory));
    let folder = tempfile::tempdir().unwrap();
    let mut service = None;
    let (client, supervisor) = if signal == Signal::USR2 {
        let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
        Supervisor::connect(service.insert(agent).socket(), Config::default(), hooks).unwrap()
    } else {
        let agent = || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin"]);
            command
        };
        Supervisor::spawn(agent, Config::default(), hooks).unwrap()
    };
    memory.add_to(&client).unwrap();
    client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
    let (mode, bandwidth) = (RestoreMode::Lazy, MIN_BANDWIDTH);
    let options = RestoreOptions { mode, bandwidth, ..RestoreOptions::default() };
    client.start_restore(path, &options).unwrap();
    wait_until("the guest to run", LIMIT, || {
        client.status().is_ok_and(|status| status.counters.time_to_run_us > 0)
    })
    .unwrap();
    let pages = size / PAGE_SIZE;
    let mut touches = Touches { block: &memory.blocks()[0], next: 0, pages };
    let mut touch = || touches.touch().as_secs_f64() * 1e3;
    for _ in 0..(pages / (2 * TOUCHES)).min(DEATHS) {
        usual.extend((0..TOUCHES).map(|_| touch()));
        let process = Pid::from_raw(client.agent_pid() as i32).unwrap();
        kill_process(process, signal).unwrap();
        let mut longest = touch();
        if signal == Signal::USR2 {
            longest = (1..TOUCHES).map(|_| touch()).fold(longest, f64::max);
        }
        waits.push(longest);
    }
    wait_until("the end", LIMIT, || {
        let _ = client.set_parameters(&Parameters::bandwidth(0));
        client.status().is_ok_and(|status| status.phase.is_final())
    })
    .unwrap();
    drop(client);
    supervisor.join();
}
