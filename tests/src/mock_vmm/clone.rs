// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `mock_vmm clone`: many guests of one image, which share the pages that none of them has written.

use super::cli::CloneArgs;
use crate::Error;
use crate::memory::{Backing, BlockLayout, TestMemory};
use crate::usage::{Path, Usage, Writer};
use crate::vmm::{MockVmm, PATIENCE, Tracker};
use indicatif::HumanBytes;
use pageferry_client::{BaseBlock, Client, Config, Phase, RestoreOptions};
use pageferry_protocol::memory::pages_in;
use serde::Serialize;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The only block of a mock VMM.
const RAM: u32 = 0;
/// The ledger of the guest in the images of `mock_vmm source`.
const LEDGER: &str = "guest";

/// Starts the clones one after another, each when the one before has all its memory. Compares the
/// memory of each with what the guest of the image wrote, has each write, and prints the report.
/// Then keeps them for `--run-for`.
///
/// # Errors
/// The first clone that cannot be started, or that has other memory than the image.
pub fn run(arguments: &CloneArgs) -> Result<(), Error> {
    let before = available()?;
    let mut clones = Vec::new();
    for number in 1..=arguments.number {
        let clone = Clone::start(arguments);
        clones.push(
            clone.map_err(|error| {
                Error::Mismatch(format!("clone {number}: {}", error.sentence()))
            })?,
        );
    }
    let after_start = Memory::now(before, &clones)?;
    let write = arguments.write.unwrap_or(0);
    let after_writes = if write == 0 {
        None
    } else {
        clones.iter().try_for_each(|clone| clone.write(write))?;
        Some(Memory::now(before, &clones)?)
    };
    // What one clone has written is in the memory of no other.
    let words_checked = clones.iter().map(|clone| clone.vmm.usage().check());
    let words_checked = words_checked.sum::<Result<u64, Error>>()?;
    let times = |time: fn(&Clone) -> Duration| Times::of(clones.iter().map(time).collect());
    let report = CloneReport {
        clones: arguments.number,
        size: clones.first().map_or(0, |clone| clone.block.length),
        words_checked,
        until_it_runs: times(|clone| clone.until_it_runs),
        until_complete: times(|clone| clone.until_complete),
        after_start,
        after_writes,
    };
    if arguments.json {
        // This cannot fail: the report has only numbers and nulls.
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        println!("{report}");
    }
    std::thread::sleep(arguments.run_for);
    // The last one ends with this process, which lets the base go at once. Here, a thread that
    // answers hooks may have it mapped for a moment longer than an agent lives to remove it.
    let last = clones.pop();
    clones.into_iter().try_for_each(Clone::end)?;
    std::mem::forget(last);
    Ok(())
}

/// A clone and its agent.
struct Clone {
    vmm: MockVmm,
    writer: Writer,
    agent: Child,
    block: BaseBlock,
    /// From the start of its agent.
    until_it_runs: Duration,
    /// The same until it needs nothing of the image any more.
    until_complete: Duration,
}

impl Clone {
    fn start(arguments: &CloneArgs) -> Result<Self, Error> {
        let begun = Instant::now();
        let mut command = Command::new(&arguments.agent);
        command.args(["agent", "--stdin"]);
        // What every agent says of its start and its end would hide the report.
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        command.args(arguments.store.iter().flat_map(|store| ["--store", store]));
        let (client, channel, agent) = Client::spawn(&mut command, Config::default())?;
        let base = client.open_base(&arguments.image)?;
        let [block] = base.blocks() else {
            let count = base.blocks().len();
            let sentence = format!("the image has {count} blocks, and that of a mock_vmm has one");
            return Err(Error::Argument(sentence));
        };
        let block = *block;
        let file = base.file().try_clone_to_owned().map_err(Error::io("duplicate the base"))?;
        let layout = BlockLayout {
            id: RAM,
            fd_offset: block.offset,
            backing: Backing::Clone(Arc::new(file.into())),
            ..BlockLayout::ram(block.length)
        };
        let usage = Usage::new(Arc::new(TestMemory::new(vec![layout])?))?;
        // The restore loads the ledger of the image's guest into this one.
        let writer = usage.writer(LEDGER, Path::MappingAndLog)?;
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log)?;
        let until_restore = begun.elapsed();
        let options = RestoreOptions { shared_base: true, ..RestoreOptions::default() };
        let job = vmm.start_restore(&arguments.image, &options)?;
        let status = vmm.wait_job(job, arguments.wait_for)?;
        if status.phase != Phase::Completed {
            return Err(Error::Mismatch(status.error_text().to_owned()));
        }
        let time_to_run = Duration::from_micros(status.counters.time_to_run_us);
        let (until_it_runs, until_complete) = (until_restore + time_to_run, begun.elapsed());
        vmm.usage().check()?;
        Ok(Self { vmm, writer, agent, block, until_it_runs, until_complete })
    }

    /// Writes to each of the first `bytes` of its memory.
    fn write(&self, bytes: u64) -> Result<(), Error> {
        let pages = pages_in(bytes.min(self.block.length));
        (0..pages).try_for_each(|page| self.writer.touch(RAM, page).map(drop))
    }

    fn end(mut self) -> Result<(), Error> {
        drop((self.vmm, self.writer));
        let ended = crate::deadline::wait_for("the end of an agent", PATIENCE, || {
            self.agent.try_wait().transpose()
        });
        let status = ended?.map_err(Error::io("wait for an agent"))?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Mismatch(format!("an agent ended with {status}")))
    }
}

/// The times of all clones, in milliseconds.
#[derive(Debug, Serialize)]
struct Times {
    /// Of the first one, for which the base is made.
    first_ms: f64,
    /// Half of the others took no longer. `None` if there is only one clone.
    others_p50_ms: Option<f64>,
    /// 99 of 100 of the others took no longer.
    others_p99_ms: Option<f64>,
}

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        let milliseconds = |time: &Duration| time.as_secs_f64() * 1000.0;
        let (first, others) =
            times.split_first_mut().map_or((Duration::ZERO, &mut [][..]), |all| (*all.0, all.1));
        others.sort_unstable();
        let at = |percent: usize| {
            let last = (others.len() * percent).div_ceil(100);
            others.get(last.checked_sub(1)?).map(milliseconds)
        };
        Self { first_ms: milliseconds(&first), others_p50_ms: at(50), others_p99_ms: at(99) }
    }
}

/// The memory of all clones and their agents, in bytes.
#[derive(Debug, Serialize)]
struct Memory {
    /// How much less memory this machine has available than before the first clone. Whatever else
    /// runs on it counts, too, so the tables do not have it.
    used_of_machine: u64,
    /// What this process and the agents have mapped; pages that several of them map count once.
    proportional: u64,
    /// Their page tables.
    page_tables: u64,
    /// What the base has, also if nobody has it mapped.
    base: u64,
}

impl Memory {
    fn now(available_before: u64, clones: &[Clone]) -> Result<Self, Error> {
        let agents = clones.iter().map(|clone| clone.agent.id().to_string());
        let processes = std::iter::once("self".to_owned()).chain(agents);
        let (mut proportional, mut page_tables) = (0, 0);
        for process in processes {
            proportional += kibibytes(&format!("/proc/{process}/smaps_rollup"), "Pss:")? * 1024;
            page_tables += kibibytes(&format!("/proc/{process}/status"), "VmPTE:")? * 1024;
        }
        let base = match clones.first() {
            None => 0,
            Some(clone) => {
                let file = clone.vmm.memory().block(RAM)?.file();
                let stat = rustix::fs::fstat(file).map_err(Error::kernel("look at the base"))?;
                stat.st_blocks as u64 * 512
            }
        };
        let used_of_machine = available_before.saturating_sub(available()?);
        Ok(Self { used_of_machine, proportional, page_tables, base })
    }
}

/// The memory of this machine that is available, in bytes.
fn available() -> Result<u64, Error> {
    Ok(kibibytes("/proc/meminfo", "MemAvailable:")? * 1024)
}

/// The number in the line of the file that begins with `name`.
fn kibibytes(path: &str, name: &str) -> Result<u64, Error> {
    let lines = std::fs::read_to_string(path).map_err(Error::io(format!("read {path}")))?;
    let line = lines.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    number.ok_or_else(|| Error::Argument(format!("{path} has no {name}")))
}

/// What is printed when all clones run.
#[derive(Debug, Serialize)]
struct CloneReport {
    clones: u32,
    /// Bytes of memory of each.
    size: u64,
    /// Words of the ledgers that were compared with the memory, of all clones.
    words_checked: u64,
    until_it_runs: Times,
    until_complete: Times,
    after_start: Memory,
    /// `None` if they write nothing.
    after_writes: Option<Memory>,
}

impl std::fmt::Display for CloneReport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (count, size) = (self.clones, HumanBytes(self.size));
        let words = self.words_checked;
        writeln!(formatter, "clones that run: {count}, each of {size}, {words} words compared")?;
        writeln!(
            formatter,
            "\n{:<22}{:>12}{:>12}{:>12}",
            "time (ms)", "first", "others p50", "p99"
        )?;
        let rows =
            [("until it runs", &self.until_it_runs), ("until complete", &self.until_complete)];
        for (name, times) in rows {
            let others = [times.others_p50_ms, times.others_p99_ms];
            let [p50, p99] =
                others.map(|time| time.map_or("-".into(), |time| format!("{time:.1}")));
            writeln!(formatter, "{name:<22}{:>12.1}{p50:>12}{p99:>12}", times.first_ms)?;
        }
        let [mapped, tables, base] = ["mapped", "page tables", "base"];
        write!(formatter, "\n{:<22}{mapped:>12}{tables:>12}{base:>12}", "memory (MiB)")?;
        let after_writes = self.after_writes.as_ref();
        for (name, memory) in
            [("all run", Some(&self.after_start)), ("all have written", after_writes)]
        {
            let Some(memory) = memory else { continue };
            let Memory { proportional, page_tables, base, .. } = memory;
            let [mapped, tables, base] = [proportional, page_tables, base].map(|bytes| bytes >> 20);
            write!(formatter, "\n{name:<22}{mapped:>12}{tables:>12}{base:>12}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_is_not_among_the_others() {
        let times = |count: u64| Times::of((1..=count).rev().map(Duration::from_millis).collect());
        let found = |times: Times| (times.first_ms, times.others_p50_ms, times.others_p99_ms);
        assert_eq!(found(times(1)), (1.0, None, None));
        assert_eq!(found(times(2)), (2.0, Some(1.0), Some(1.0)));
        assert_eq!(found(times(101)), (101.0, Some(50.0), Some(99.0)));
    }
}
