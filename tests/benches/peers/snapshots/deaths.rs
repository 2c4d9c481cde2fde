// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a guest waits whose agent dies before all of its memory is there, until another agent
//! continues.
//!
//! A lazy restore is so slow that nearly every page is missing. A thread touches one page after the
//! other, as a vCPU would. Again and again it kills the agent, and touches the next page at once:
//! that wait is the whole time until the supervisor has started the next agent, and that has placed
//! the page.

use super::super::Bench;
use super::super::image::{Image, WarmPool};
use super::super::table::{Better, Table};
use super::roamer::{Roamer, Roams};
use super::{LIMIT, MIB, Shelf, bar, restore::save};
use pageferry_client::{
    Client, Config, MIN_BANDWIDTH, Parameters, RestoreMode, RestoreOptions, Supervisor, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::program;
use rustix::process::{Pid, Signal, kill_process};
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
    let (mut waits, mut usual) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        target.clear();
        let file = Arc::new(target.file.try_clone().unwrap());
        let layout = BlockLayout { backing: Backing::File(file), ..BlockLayout::ram(size) };
        let memory = Arc::new(TestMemory::new(vec![layout]).unwrap());
        let agent = || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin"]);
            command
        };
        let hooks = Roams(Roamer::new(&memory));
        let (client, supervisor) = Supervisor::spawn(agent, Config::default(), hooks).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        let (mode, bandwidth) = (RestoreMode::Lazy, MIN_BANDWIDTH);
        let options = RestoreOptions { mode, bandwidth, ..RestoreOptions::default() };
        client.start_restore(&path, &options).unwrap();
        wait_until("the guest to run", LIMIT, || {
            client.status().is_ok_and(|status| status.counters.time_to_run_us > 0)
        })
        .unwrap();
        let pages = size / PAGE_SIZE;
        let mut touches = Touches { block: &memory.blocks()[0], next: 0, pages };
        let rests = (pages / (TOUCHES + 1)).min(DEATHS);
        for _ in 0..rests {
            for _ in 0..TOUCHES {
                usual.push(touches.touch().as_secs_f64() * 1e3);
            }
            kill(&client);
            waits.push(touches.touch().as_secs_f64() * 1e3);
        }
        wait_until("the end", LIMIT, || {
            let _ = client.set_parameters(&Parameters::bandwidth(0));
            client.status().is_ok_and(|status| status.phase.is_final())
        })
        .unwrap();
        drop(client);
        supervisor.join();
    }
    let work = format!("restore: {} MiB, lazy, a fault as the agent dies", size >> 20);
    for (who, samples) in [("with an agent", &mut usual), ("until the next agent", &mut waits)] {
        samples.sort_by(f64::total_cmp);
        let at = |part: f64| samples[((samples.len() - 1) as f64 * part) as usize];
        let figures = [("p50", at(0.5)), ("p99", at(0.99)), ("most", at(1.0))];
        for (name, value) in figures {
            let remark = format!("of {}", samples.len());
            table.add(&work, &format!("{who}, {name}"), "ms", &[value], remark);
        }
    }
    if let Some(longest) = waits.last() {
        bar(table, &format!("{work}: the longest"), "ms", &[*longest], 50.0, Better::Less);
    }
}

fn kill(client: &Client) {
    let process = Pid::from_raw(client.agent_pid() as i32).unwrap();
    kill_process(process, Signal::KILL).unwrap();
}
