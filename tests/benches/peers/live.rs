// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that writes while it migrates: the total time, the downtime, and the effect on the
//! guest.

use super::Bench;
use super::floor;
use super::image::{Image, full_guest, warm_large_pages};
use super::table::Table;
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase, StatePiece};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::Error;
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep};
use pageferry_tests::guest::{Guest, IdleGuest};
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{MockVmm, Tracker};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(120);
/// Pages that a thread writes between two checks for a stop.
const BATCH: u64 = 64;
/// How long a writer is measured before the migration.
const BEFORE: Duration = Duration::from_millis(700);

/// The tracker of the writes, and so the kind of writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A thread that marks the shared log.
    Log,
    /// A thread whose mapping the agent scans.
    Uffd,
    /// A vCPU under KVM's dirty log.
    Kvm,
    /// A vCPU whose mapping the agent scans.
    KvmUffd,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Log, Self::Uffd, Self::Kvm, Self::KvmUffd];

    fn name(self) -> &'static str {
        match self {
            Self::Log => "thread, shared log",
            Self::Uffd => "thread, write protection",
            Self::Kvm => "vCPU, KVM's log",
            Self::KvmUffd => "vCPU, write protection",
        }
    }

    fn has_vcpu(self) -> bool {
        matches!(self, Self::Kvm | Self::KvmUffd)
    }
}

/// A guest of one thread that writes to one page after the other, at a steady rate.
struct Sweeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    memory: Arc<TestMemory>,
    pages: PageRange,
    /// Writes per second; 0 is as many as it can.
    rate: u64,
    marks: bool,
    writes: Arc<AtomicU64>,
    ends: AtomicBool,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    runs: bool,
    stands: bool,
}

impl Sweeper {
    fn new(
        memory: &Arc<TestMemory>, pages: PageRange, rate: u64, marks: bool, writes: &Arc<AtomicU64>,
    ) -> Self {
        let shared = Arc::new(Shared {
            memory: memory.clone(),
            pages,
            rate,
            marks,
            writes: writes.clone(),
            ends: AtomicBool::new(false),
            wanted: Mutex::default(),
            changed: Condvar::new(),
        });
        let inner = shared.clone();
        Self { shared, thread: Some(std::thread::spawn(move || inner.sweep())) }
    }
}

impl Shared {
    fn sweep(&self) {
        let block = &self.memory.blocks()[0];
        let mut next = 0;
        while self.stand() {
            let (started, mut written) = (Instant::now(), 0);
            loop {
                for _ in 0..BATCH {
                    let page = self.pages.first + next;
                    block.store(page * PAGE_SIZE + 8, next).unwrap();
                    if self.marks {
                        block.mark(PageRange::new(page, 1));
                    }
                    next = (next + 1) % self.pages.count;
                }
                written += BATCH;
                self.writes.fetch_add(BATCH, Ordering::Relaxed);
                if !self.wanted.lock().unwrap().runs {
                    break;
                }
                let due = self.rate.checked_sub(1).map(|_| written as f64 / self.rate as f64);
                let ahead = due.map_or(0.0, |due| due - started.elapsed().as_secs_f64());
                if ahead > 0.0005 {
                    std::thread::sleep(Duration::from_secs_f64(ahead));
                }
            }
        }
    }

    /// Waits while it is paused. False if it must end.
    fn stand(&self) -> bool {
        let mut wanted = self.wanted.lock().unwrap();
        wanted.stands = true;
        self.changed.notify_all();
        while !wanted.runs {
            if self.ends.load(Ordering::Relaxed) {
                return false;
            }
            wanted = self.changed.wait(wanted).unwrap();
        }
        wanted.stands = false;
        true
    }
}

impl Guest for Sweeper {
    fn start(&mut self) -> Result<(), Error> {
        self.resume()
    }

    fn pause(&mut self) -> Result<(), Error> {
        let mut wanted = self.shared.wanted.lock().unwrap();
        wanted.runs = false;
        while !wanted.stands {
            wanted = self.shared.changed.wait(wanted).unwrap();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.shared.wanted.lock().unwrap().runs = true;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: &[StatePiece]) -> Result<(), Error> {
        Ok(())
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        // It is paused, or about to be.
        let _ = self.pause();
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A VMM with its own agent.
struct Side {
    vmm: MockVmm,
    memory: Arc<TestMemory>,
    _agent: AgentProcess,
    _folder: tempfile::TempDir,
}

pub fn map(image: &Image) -> Arc<TestMemory> {
    let file = Arc::new(image.file.try_clone().unwrap());
    let layout = BlockLayout { backing: Backing::File(file), ..BlockLayout::ram(image.size) };
    Arc::new(TestMemory::new(vec![layout]).unwrap())
}

impl Side {
    fn new(
        image: &Image, tracker: impl FnOnce(&TestMemory) -> Result<Tracker, Error>,
    ) -> Result<Self, Error> {
        let folder = tempfile::tempdir().unwrap();
        let agent = AgentProcess::spawn(program(), folder.path(), "agent")?;
        let memory = map(image);
        let tracker = tracker(&memory)?;
        let vmm = MockVmm::connect(agent.socket(), Usage::new(memory.clone())?, tracker)?;
        Ok(Self { vmm, memory, _agent: agent, _folder: folder })
    }
}

/// Counts a writer's writes while it runs.
pub type Count = Box<dyn Fn() -> u64>;

/// The progress of a vCPU, from its counters: those before its present page are one ahead of those
/// after it.
pub fn sweeps_of(image: &Image, pages: PageRange) -> u64 {
    let counter = |page: u64| {
        let mut bytes = [0; 4];
        image.file.read_exact_at(&mut bytes, (pages.first + page) * PAGE_SIZE).unwrap();
        u64::from(u32::from_le_bytes(bytes))
    };
    let first = counter(0);
    let (mut low, mut high) = (0, pages.count);
    while low < high {
        let middle = (low + high) / 2;
        if counter(middle) == first { low = middle + 1 } else { high = middle }
    }
    first.saturating_sub(1) * pages.count + if first == 0 { 0 } else { low }
}

fn rate_of(count: &Count, time: Duration) -> f64 {
    let (before, started) = (count(), Instant::now());
    std::thread::sleep(time);
    (count() - before) as f64 / started.elapsed().as_secs_f64()
}

/// How often a vCPU must spin after each page to write `rate` pages per second, from its rate with
/// 10,000 spins.
fn spins_for(rate: u64, at_ten_thousand: f64) -> u32 {
    if rate == 0 { 0 } else { (at_ten_thousand * 10_000.0 / rate as f64) as u32 }
}

/// The case of one line of the table.
struct Case {
    name: String,
    pages: PageRange,
    /// Writes per second; 0 is as many as it can.
    rate: u64,
}

/// The measurements of a case.
#[derive(Default)]
struct Measured {
    total: Vec<f64>,
    downtime: Vec<f64>,
    slowdown: Vec<f64>,
    control: Vec<f64>,
    remark: String,
}

/// 2 GiB with a writer at several rates, and several trackers.
pub fn live(bench: &Bench, table: &mut Table) {
    let size = 2 * GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    floor::copy(&source, &destination, 1);
    destination.clear();
    let link = size as f64 / PAGE_SIZE as f64 / floor::copy(&source, &destination, 1).as_secs_f64();
    table.note(format!(
        "live: 100% of the link is {link:.0} pages/s, that of a plain copy through one socket"
    ));
    let all = PageRange::new(FIRMWARE_PAGES, size / PAGE_SIZE - FIRMWARE_PAGES);
    let mut cases: Vec<Case> = [10, 50, 90]
        .map(|percent| Case {
            name: format!("a writer at {percent}% of the link"),
            pages: all,
            rate: (link * f64::from(percent) / 100.0) as u64,
        })
        .into();
    let hot = PageRange::new(FIRMWARE_PAGES, all.count / 16);
    cases.push(Case {
        name: "a hot set of 128 MiB, as fast as it can".into(),
        pages: hot,
        rate: 0,
    });
    cases.push(Case {
        name: "1 GiB in one piece, at 50% of the link".into(),
        pages: PageRange::new(FIRMWARE_PAGES, all.count / 2),
        rate: link as u64 / 2,
    });
    for kind in Kind::ALL {
        for case in &cases {
            let mut measured = Measured::default();
            for _ in 0..bench.rounds.min(3) {
                source.zero_counters();
                if let Err(error) =
                    run(&bench.folder, (&source, &destination), kind, case, &mut measured)
                {
                    table.note(format!("live, {}: skipped: {}", kind.name(), error.sentence()));
                    break;
                }
            }
            let work = format!("live: {}, {}", case.name, kind.name());
            if measured.total.is_empty() {
                continue;
            }
            table.add(&work, "total", "ms", &measured.total, measured.remark);
            table.add(&work, "downtime, limit 300", "ms", &measured.downtime, String::new());
            table.add(&work, "writer, of its speed before", "", &measured.slowdown, String::new());
            table.add(&work, "writer beside a plain copy", "", &measured.control, String::new());
        }
    }
}

fn run(
    folder: &Path, (source, destination): (&Image, &Image), kind: Kind, case: &Case,
    measured: &mut Measured,
) -> Result<(), Error> {
    destination.clear();
    let mut kvm: Option<KvmGuest> = None;
    let from = Side::new(source, |memory| {
        if kind.has_vcpu() {
            kvm = Some(vcpu(source, memory, case)?);
        }
        match kind {
            Kind::Log => Ok(Tracker::Log),
            Kind::Uffd | Kind::KvmUffd => Ok(Tracker::WriteProtect),
            Kind::Kvm => {
                let log = kvm.as_ref().map(KvmGuest::dirty_log).transpose();
                let log = log.map_err(|error| Error::Memory(error.to_string()))?;
                Ok(log.map_or(Tracker::Log, |log| Tracker::Hooks(Box::new(log))))
            }
        }
    })?;
    let count: Count = match kvm {
        Some(guest) => {
            from.vmm.set_guest(guest);
            let (image, pages) = (Image::again(source), case.pages);
            Box::new(move || sweeps_of(&image, pages))
        }
        None => {
            let writes = Arc::new(AtomicU64::new(0));
            from.vmm.set_guest(Sweeper::new(
                &from.memory,
                case.pages,
                case.rate,
                kind == Kind::Log,
                &writes,
            ));
            Box::new(move || writes.load(Ordering::Relaxed))
        }
    };
    from.vmm.start()?;
    let before = rate_of(&count, BEFORE);
    // The control: the same writer during a plain copy of as many bytes on the same cores.
    let (writes, started) = (count(), Instant::now());
    floor::copy(source, destination, 1);
    measured.control.push((count() - writes) as f64 / started.elapsed().as_secs_f64() / before);
    destination.clear();
    warm_large_pages(folder, destination.size + destination.size / 16);

    let to = Side::new(destination, |_| Ok(Tracker::Log))?;
    to.vmm.set_guest(IdleGuest);
    let (_, address) = to.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default())?;
    let (writes, started) = (count(), Instant::now());
    let job = from.vmm.start_outgoing(
        &address,
        &OutgoingOptions { max_passes: 0, ..OutgoingOptions::default() },
    )?;
    let status = from.vmm.wait_job(job, LIMIT)?;
    let total = started.elapsed();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let downtime = Duration::from_micros(status.counters.downtime_us);
    let during = (count() - writes) as f64 / (total.saturating_sub(downtime)).as_secs_f64();
    measured.total.push(total.as_secs_f64() * 1e3);
    measured.downtime.push(downtime.as_secs_f64() * 1e3);
    measured.slowdown.push(during / before);
    measured.remark = format!(
        "{} passes, {} pages sent, expected downtime {:.0} ms, {before:.0} pages/s before",
        status.counters.passes,
        status.counters.pages_sent,
        status.counters.expected_downtime_us as f64 / 1e3
    );
    Ok(())
}

fn vcpu(image: &Image, memory: &TestMemory, case: &Case) -> Result<KvmGuest, Error> {
    let sweep =
        Sweep { ranges: vec![(case.pages.first * PAGE_SIZE, case.pages.count)], spins: 10_000 };
    let mut guest = KvmGuest::new(memory.guest().clone(), sweep)?;
    guest.boot()?;
    let file = Image::again(image);
    let pages = case.pages;
    let count: Count = Box::new(move || sweeps_of(&file, pages));
    guest.resume()?;
    let at_ten_thousand = rate_of(&count, Duration::from_millis(300));
    guest.pause()?;
    guest.set_spins(spins_for(case.rate, at_ten_thousand))?;
    Ok(guest)
}
