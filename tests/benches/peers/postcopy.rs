// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Postcopy: how long a guest waits for a missing page, measured from its touch until it continues.
//!
//! The same run also measures the [`floor`]: a fault that another process answers, plus a request
//! and its reply over a socket. Both contain the four wake-ups that every such path needs: of the
//! fault reader, of the source, of the receiver and of the guest.
//!
//! What is measured:
//!
//! - *quiet*: the push is held back, so that a fault has the machine to itself;
//! - *pushing*: the push runs at full speed, and the guest touches pages in random order from its
//!   first moment until all is here;
//! - *in order*: the same in page order, as far as the push leaves pages missing;
//! - *huge*: quiet, on huge pages of 2 MiB, which are placed whole.
//!
//! If QEMU is installed, it does the first two in [`qemu_guest`].
//!
//! A touch counts as a fault if the page was a hole just before it. Files on huge pages do not
//! report holes. There a touch counts if it takes longer than a touch of a present page.

pub mod floor;
pub mod qemu_guest;

use super::Bench;
use super::image::{Image, WarmPool, full_guest};
use super::table::{Better, Table, median};
use floor::Floor;
use pageferry_client::{
    Client, Config, HookError, Hooks, IncomingOptions, JobStatus, Mode, OutgoingOptions,
    Parameters, Phase, RunState, StatePiece, Target,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::is_hole;
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages};
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use qemu_guest::Mover;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use vm_memory::VolatileMemory;

const GIB: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(300);
/// Pages that are touched in *quiet*.
const TOUCHES: u64 = 4000;
/// A push that is held back, in bytes per second.
const HELD_BACK: u64 = 256 << 10;

/// A touch of a present page takes no longer than this.
const NO_FAULT: Duration = Duration::from_micros(2);

/// Durations of one kind of event.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// A quantile, in thousandths, in microseconds. 0 if there are no durations.
    fn quantile(&self, part: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let index = (sorted.len() * part).div_ceil(1000).saturating_sub(1);
        sorted.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    }
}

/// The quantiles that are printed, in thousandths.
pub const QUANTILES: [(&str, usize); 4] =
    [("p50", 500), ("p90", 900), ("p99", 990), ("most", 1000)];

/// The numbers below `count`, in a random order from `seed`.
fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let (mut random, mut order) = (Random::new(seed), (0..count).collect::<Vec<u64>>());
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// Reads a word through the mapping, like the guest.
fn touch(block: &TestBlock, offset: u64) -> Duration {
    let word = block.mapping().get_atomic_ref::<AtomicU64>(offset as usize).unwrap();
    let started = Instant::now();
    std::hint::black_box(word.load(Ordering::Relaxed));
    started.elapsed()
}

/// A VMM whose guest has no state, and its own agent.
struct Side {
    client: Client,
    memory: Arc<TestMemory>,
    resumed: Receiver<()>,
    _agent: AgentProcess,
    _folder: tempfile::TempDir,
}

struct Stateless(Sender<()>);

impl Hooks for Stateless {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        // The receiver may be gone already.
        let _ = self.0.send(());
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}

/// Where a destination listens, and the arguments that both agents need for that.
#[derive(Debug, Clone, Copy)]
pub struct Listens<'a> {
    pub address: &'a str,
    pub arguments: &'a [&'a str],
}

/// In plain text.
const PLAIN: Listens<'_> = Listens { address: "tcp:127.0.0.1:0", arguments: &[] };

impl Side {
    fn new(memory: Arc<TestMemory>, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program());
        let agent = AgentProcess::start_with(&mut command, folder.path(), "agent", arguments);
        let agent = agent.unwrap();
        let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
        let (sender, resumed) = self::channel();
        channel.spawn(Stateless(sender)).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, memory, resumed, _agent: agent, _folder: folder }
    }
}

fn map(image: &Image) -> Arc<TestMemory> {
    let file = Arc::new(image.file.try_clone().unwrap());
    let layout = BlockLayout { backing: Backing::File(file), ..BlockLayout::ram(image.size) };
    Arc::new(TestMemory::new(vec![layout]).unwrap())
}

/// A guest that runs at its destination while its memory follows.
struct Running {
    from: Side,
    to: Side,
    job: u64,
    since: Instant,
}

/// The final status of its jobs.
struct Arrived {
    time: Duration,
    status: JobStatus,
}

impl Running {
    fn start(
        source: Arc<TestMemory>, destination: Arc<TestMemory>, streams: u16, bandwidth: u64,
    ) -> Self {
        Self::start_over(PLAIN, source, destination, streams, bandwidth)
    }

    fn start_over(
        listens: Listens<'_>, source: Arc<TestMemory>, destination: Arc<TestMemory>, streams: u16,
        bandwidth: u64,
    ) -> Self {
        let [from, to] = [source, destination].map(|memory| Side::new(memory, listens.arguments));
        let listen = Target::Address(listens.address.to_owned());
        let incoming = to.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        let options = OutgoingOptions {
            streams,
            bandwidth,
            mode: Mode::Postcopy,
            ..OutgoingOptions::default()
        };
        let since = Instant::now();
        let job =
            from.client.start_outgoing(Target::Address(incoming.address), &options).unwrap().job;
        to.resumed.recv_timeout(LIMIT).unwrap();
        Self { from, to, job, since }
    }

    /// Removes the bandwidth limit for the rest.
    fn finish(self) -> Arrived {
        self.from.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
        self.arrived()
    }

    fn arrived(&self) -> Arrived {
        let status = self.from.client.wait(self.job, LIMIT).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        let time = self.since.elapsed();
        wait_until("the destination's end", LIMIT, || {
            self.to.client.status().unwrap().phase.is_final()
        })
        .unwrap();
        Arrived { time, status: self.to.client.status().unwrap() }
    }
}

/// The measurements of the guest in one round.
#[derive(Debug, Default)]
struct Felt {
    times: Times,
    /// Touches of present pages.
    there: u64,
}

impl Felt {
    /// Touches a host page, checks that it holds the same as the source's, and counts a fault if it
    /// was a hole.
    fn touch(&mut self, running: &Running, offset: u64) {
        let block = &running.to.memory.blocks()[0];
        let tells_holes = !matches!(block.layout().backing, Backing::HugePages);
        let was_hole = tells_holes && is_hole(block.file(), offset).unwrap();
        let time = touch(block, offset);
        assert_eq!(
            block.read_word(offset).unwrap(),
            running.from.memory.blocks()[0].read_word(offset).unwrap()
        );
        if was_hole || !tells_holes && time > NO_FAULT {
            self.times.push(time)
        } else {
            self.there += 1
        }
    }
}

/// The rounds of one kind of touches.
#[derive(Default)]
pub struct Rounds {
    felt: Vec<Felt>,
    arrived: Vec<Arrived>,
}

impl Rounds {
    fn add(&mut self, felt: Felt, arrived: Arrived) {
        self.felt.push(felt);
        self.arrived.push(arrived);
    }

    /// The medians of one figure over the rounds, as text.
    fn middle(&self, figure: impl Fn(&JobStatus) -> u64) -> f64 {
        median(
            &self.arrived.iter().map(|arrived| figure(&arrived.status) as f64).collect::<Vec<_>>(),
        )
    }

    pub fn add_rows(&self, table: &mut Table, work: &str, who: &str) {
        let faults: Vec<f64> = self.felt.iter().map(|felt| felt.times.0.len() as f64).collect();
        let there: Vec<f64> = self.felt.iter().map(|felt| felt.there as f64).collect();
        let counted = format!(
            "{:.0} faults, {:.0} touches of what was there; {:.0} pages were pushed",
            median(&faults),
            median(&there),
            self.middle(|status| status.counters.pushed_pages)
        );
        let own = [
            self.middle(|status| status.counters.fault_p50_us),
            self.middle(|status| status.counters.fault_p90_us),
            self.middle(|status| status.counters.fault_p99_us),
            self.middle(|status| status.counters.fault_max_us),
        ];
        for ((name, part), own) in QUANTILES.into_iter().zip(own) {
            let samples: Vec<f64> =
                self.felt.iter().map(|felt| felt.times.quantile(part)).collect();
            let more = if part == 500 { format!("; {counted}") } else { String::new() };
            let remark = format!("{own:.0} by the agent's count{more}");
            let who = format!("{who}, {name}");
            table.add(work, &who, "us", &samples, remark);
            table.compare(work, &who, &format!("floor, {name}"), Better::Less);
        }
    }

    fn add_times(&self, table: &mut Table, work: &str, who: &str) {
        let times: Vec<f64> =
            self.arrived.iter().map(|arrived| arrived.time.as_secs_f64() * 1e3).collect();
        table.add(work, &format!("{who}, all there"), "ms", &times, String::new());
    }
}

fn add_floor(table: &mut Table, work: &str, floors: &[Floor]) {
    for (name, part) in QUANTILES {
        let samples: Vec<f64> = floors.iter().map(|floor| floor.quantile(part)).collect();
        let half = |of: fn(&Floor) -> &Times| {
            median(&floors.iter().map(|floor| of(floor).quantile(part)).collect::<Vec<f64>>())
        };
        let remark = format!(
            "fault {:.1} + socket {:.1}",
            half(|floor| &floor.fault),
            half(|floor| &floor.socket)
        );
        table.add(work, &format!("floor, {name}"), "us", &samples, remark);
    }
}

/// Runs all of it.
pub fn postcopy(bench: &Bench, table: &mut Table) {
    if !require::uffd() {
        table.add("postcopy", "skipped: no userfaultfd", "", &[], String::new());
        return;
    }
    // First: what the other leaves of free memory is in small pieces.
    huge_pages(bench, table);
    small_pages(bench, table);
    if bench.qemu.is_some() {
        qemu(bench, table);
    }
}

/// Measures one round of faults while the push is held back.
pub fn quiet(
    bench: &Bench, [source, destination]: [&Image; 2], listens: Listens<'_>, round: u64,
    rounds: &mut Rounds,
) {
    destination.clear();
    let running = Running::start_over(listens, map(source), map(destination), 1, HELD_BACK);
    let mut felt = Felt::default();
    let touches = (TOUCHES / bench.shrink.min(40)) as usize;
    for page in shuffled(source.size / PAGE_SIZE, round).into_iter().take(touches) {
        felt.touch(&running, page * PAGE_SIZE);
    }
    rounds.add(felt, running.finish());
}

fn small_pages(bench: &Bench, table: &mut Table) {
    let (source, destination, _warm) = full_guest(&bench.folder, 2 * GIB / bench.shrink);
    let (touches, pages) = (TOUCHES / bench.shrink.min(40), source.size / PAGE_SIZE);
    let streams = [1, 2];
    let mut floors = Vec::new();
    let mut quiet = Rounds::default();
    let mut pushing = streams.map(|_| Rounds::default());
    let mut in_order = streams.map(|_| Rounds::default());
    for round in 0..bench.rounds as u64 {
        destination.clear();
        floors.push(Floor::measure(&map(&destination), PAGE_SIZE, touches));

        self::quiet(bench, [&source, &destination], PLAIN, round, &mut quiet);

        for (&streams, (pushing, in_order)) in
            streams.iter().zip(pushing.iter_mut().zip(&mut in_order))
        {
            for (order, rounds) in
                [(shuffled(pages, round), pushing), ((0..pages).collect(), in_order)]
            {
                destination.clear();
                let running = Running::start(map(&source), map(&destination), streams, 0);
                let mut felt = Felt::default();
                for page in order {
                    felt.touch(&running, page * PAGE_SIZE);
                }
                rounds.add(felt, running.arrived());
            }
        }
    }
    let work = "postcopy: a fault";
    add_floor(table, work, &floors);
    quiet.add_rows(table, work, "quiet");
    for (streams, rounds) in streams.iter().zip(&pushing) {
        rounds.add_rows(table, work, &format!("pushing, {streams}"));
    }
    for (streams, rounds) in streams.iter().zip(&in_order) {
        rounds.add_rows(table, work, &format!("in order, pushing, {streams}"));
    }
    let work = "postcopy: a guest that touches all of its 2 GiB";
    for (streams, (pushing, in_order)) in streams.iter().zip(pushing.iter().zip(&in_order)) {
        for (order, rounds) in [("in random order", pushing), ("in order", in_order)] {
            let who = format!("{order}, {streams}");
            let per_gib =
                |felt: &Felt| felt.times.0.len() as f64 * GIB as f64 / (pages * PAGE_SIZE) as f64;
            let faults: Vec<f64> = rounds.felt.iter().map(per_gib).collect();
            table.add(work, &format!("{who}, faults"), "per GiB", &faults, String::new());
            rounds.add_times(table, work, &who);
        }
    }
}

/// QEMU's guest is smaller, and notes only what took longer than a touch without a fault.
fn qemu(bench: &Bench, table: &mut Table) {
    let work = "postcopy: a fault of a guest in QEMU";
    let (source, destination, _warm) = full_guest(&bench.folder, qemu_guest::SIZE);
    let (qemu, ours) = (Mover::Qemu, Mover::Pageferry { streams: 1 });
    let ways = [
        ("quiet", ours, true),
        ("quiet", qemu, true),
        ("pushing", ours, false),
        ("pushing", Mover::Pageferry { streams: 2 }, false),
        ("pushing", qemu, false),
    ];
    let mut rounds = ways.map(|_| Vec::new());
    for _ in 0..bench.rounds {
        for ((_, mover, quiet), rounds) in ways.iter().zip(&mut rounds) {
            destination.clear();
            rounds.push(mover.migrate(&source, &destination, *quiet));
        }
    }
    for ((way, mover, _), rounds) in ways.iter().zip(&rounds) {
        let middle = |figure: &dyn Fn(&qemu_guest::Moved) -> f64| {
            median(&rounds.iter().map(figure).collect::<Vec<_>>())
        };
        for (name, part) in QUANTILES {
            let samples: Vec<f64> = rounds.iter().map(|moved| moved.times.quantile(part)).collect();
            let remark = format!(
                "{:.0} slow touches, {:.0} requests; all there in {:.0} ms",
                middle(&|moved| moved.times.0.len() as f64),
                middle(&|moved| moved.requests as f64),
                middle(&|moved| moved.time.as_secs_f64() * 1e3)
            );
            let remark = if part == 500 { remark } else { String::new() };
            table.add(work, &format!("{way}, {mover}, {name}"), "us", &samples, remark);
        }
    }
}

fn huge_pages(bench: &Bench, table: &mut Table) {
    let work = "postcopy: a fault, huge pages of 2 MiB";
    let count = 128 / bench.shrink.min(32);
    let _pool = match HugePages::reserve(count) {
        Ok(pool) => pool,
        Err(error) => {
            table.add(work, "skipped", "", &[], error.sentence());
            return;
        }
    };
    let source = Image::new(&bench.folder, "source", count * HUGE_PAGE);
    source.fill(0, source.size);
    let _warm = WarmPool::new(&bench.folder, source.size);
    let layout = BlockLayout { backing: Backing::HugePages, ..BlockLayout::ram(source.size) };
    let mut floors = Vec::new();
    let mut quiet = Rounds::default();
    for round in 0..bench.rounds as u64 {
        let destination = Arc::new(TestMemory::new(vec![layout.clone()]).unwrap());
        floors.push(Floor::measure(&destination, HUGE_PAGE, count));
        drop(destination);

        let destination = Arc::new(TestMemory::new(vec![layout.clone()]).unwrap());
        let running = Running::start(map(&source), destination, 1, HELD_BACK);
        let mut felt = Felt::default();
        for page in shuffled(count, round) {
            felt.touch(&running, page * HUGE_PAGE);
        }
        quiet.add(felt, running.finish());
    }
    add_floor(table, work, &floors);
    quiet.add_rows(table, work, "quiet");
}
