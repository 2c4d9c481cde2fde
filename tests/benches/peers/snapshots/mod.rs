// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: how fast a guest is saved, and the effect on the guest.
//!
//! - [`save`]: bytes per second, compared with a program that only copies and with QEMU;
//! - [`pause`]: how long the guest is paused, how long a write waits, and how much slower the guest
//!   gets;
//! - [`restore`]: the time until a restored guest runs, and until all its memory is there;
//! - [`deaths`]: how long a guest waits whose agent dies;
//! - [`floor`], [`qemu`]: the other programs that save;
//! - [`roamer`]: a guest that writes everywhere;
//! - [`linux_guest`]: a Linux guest that writes, beside QEMU's background-snapshot.

mod deaths;
mod floor;
mod linux_guest;
mod pause;
mod qemu;
mod restore;
mod roamer;
mod save;

use super::image::Image;
use super::table::{Better, Table, median};
use super::{Bench, Part};
use pageferry_client::{Client, Config, JobStatus, Phase, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use roamer::{Roamer, Roams};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(600);
/// Bytes that must be free where images are written.
const ROOM: u64 = 10 * GIB;

/// The sub-parts of `snapshots`.
pub const PARTS: [(&str, Part); 9] = [
    ("save", save::to_disk),
    ("save-tmpfs", save::to_tmpfs),
    ("save-sparse", save::sparse),
    ("pause", pause::full),
    ("pause-sparse", pause::sparse),
    ("linux-guest", linux_guest::writes),
    ("restore", restore::eager),
    ("restore-lazy", restore::lazy),
    ("restore-deaths", deaths::deaths),
];

/// Runs all sub-parts, or those that the options name.
pub fn snapshots(bench: &Bench, table: &mut Table) {
    if !require::uffd() {
        table.add("snapshots", "skipped: no userfaultfd", "", &[], String::new());
        return;
    }
    for (name, part) in PARTS {
        // A test is short, and Linux boots slowly.
        let wanted = if bench.snapshots.is_empty() {
            bench.shrink == 1 || name != "linux-guest"
        } else {
            bench.snapshots.iter().any(|wanted| wanted == name)
        };
        if wanted {
            eprintln!("snapshots: {name} ...");
            part(bench, table);
        }
    }
}

/// A folder for one image at a time. It is removed with its content.
struct Shelf {
    folder: tempfile::TempDir,
    opened: File,
}

impl Shelf {
    /// A folder in `place`. If there is no room, adds a note to the table and returns `None`.
    fn new(bench: &Bench, place: &Path, table: &mut Table) -> Option<Self> {
        let free = rustix::fs::statvfs(place)
            .map(|stat| stat.f_bavail * stat.f_frsize)
            .unwrap_or_default();
        if free < ROOM / bench.shrink {
            table.note(format!(
                "snapshots: skipped: {} MiB are free in {}",
                free / MIB,
                place.display()
            ));
            return None;
        }
        let folder = tempfile::Builder::new().prefix("pageferry-bench-").tempdir_in(place).unwrap();
        let opened = File::open(folder.path()).unwrap();
        Some(Self { folder, opened })
    }

    /// The path for the image.
    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// Removes the image, and waits until the disk is idle.
    fn clear(&self) {
        std::fs::remove_file(self.path()).unwrap();
        rustix::fs::syncfs(&self.opened).unwrap();
    }
}

/// A VMM with its own agent, and a guest that has touched all allocated pages, as real guests have.
struct Vmm {
    client: Client,
    memory: Arc<TestMemory>,
    guest: Roamer,
    agent: AgentProcess,
    _folder: tempfile::TempDir,
}

/// The cost of a snapshot.
struct Saved {
    /// From the request to the end.
    time: Duration,
    /// Processor time of the agent.
    processor: Duration,
    status: JobStatus,
}

/// The agents that are measured: their names, and their programs.
fn agents(bench: &Bench) -> Vec<(String, OsString)> {
    let others = bench.other.iter().map(|program| {
        (program.file_name().unwrap_or_default().display().to_string(), program.into())
    });
    std::iter::once(("pageferry".to_owned(), program().into())).chain(others).collect()
}

impl Vmm {
    fn new(image: &Image, program: impl AsRef<OsStr>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = AgentProcess::spawn(program, folder.path(), "agent").unwrap();
        let file = Arc::new(image.file.try_clone().unwrap());
        let layout = BlockLayout { backing: Backing::File(file), ..BlockLayout::ram(image.size) };
        let memory = Arc::new(TestMemory::new(vec![layout]).unwrap());
        let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
        let guest = Roamer::new(&memory);
        channel.spawn(Roams(guest.clone())).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        let new = Self { client, memory, guest, agent, _folder: folder };
        new.touch();
        new
    }

    /// The guest writes the present content again to all allocated pages.
    fn touch(&self) {
        let block = &self.memory.blocks()[0];
        for page in block.extents().unwrap().into_iter().flat_map(|run| run.first..run.end()) {
            let offset = page * PAGE_SIZE + 8;
            block.store(offset, block.load(offset).unwrap()).unwrap();
        }
    }

    fn save(&mut self, path: &Path, options: &SnapshotOptions) -> Saved {
        let agent = self.agent.process().id();
        let (started, before) = (Instant::now(), processor_time(agent));
        let job = self.client.start_snapshot(path, options).unwrap().job;
        let status = self.client.wait(job, LIMIT).unwrap();
        let time = started.elapsed();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        Saved { time, processor: processor_time(agent) - before, status }
    }
}

/// Processor time of a process so far, in the kernel's ticks of 10 ms.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The name, in brackets, may contain anything. Between it and the user and system time are 11
    // fields.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

/// Processor time so far that the host did not give to this machine although it wanted it, in the
/// kernel's ticks of 10 ms. Meanwhile threads wait, whatever their program does.
fn stolen_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    // `cpu`, then the times of user, nice, system, idle, iowait, irq, softirq, steal.
    let ticks = stat.split_whitespace().nth(8).and_then(|field| field.parse::<u64>().ok());
    Duration::from_millis(ticks.unwrap_or_default() * 10)
}

/// Reports a target, and whether it was reached: the median of `samples`, which has one figure for
/// each round, counts.
fn bar(
    table: &mut Table, name: &str, unit: &'static str, samples: &[f64], limit: f64, better: Better,
) {
    let middle = median(samples);
    let (reached, word) = match better {
        Better::More => (middle >= limit, "at least"),
        Better::Less => (middle <= limit, "at most"),
    };
    let verdict = if reached { "ok" } else { "missed" };
    table.add("snapshots: marks", name, unit, samples, format!("{verdict}: {word} {limit}"));
}

/// The ratio of `own` to the other in each round.
fn ratios(own: &[f64], other: &[f64]) -> Vec<f64> {
    own.iter().zip(other).map(|(own, other)| own / other).collect()
}
