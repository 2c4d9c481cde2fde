// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The effect of a background snapshot on its guest: how long it is paused, how long its writes
//! wait, and how much slower it gets.

use super::super::Bench;
use super::super::image::{Image, WarmPool};
use super::super::table::{Better, Table, median};
use super::roamer::Pace;
use super::{GIB, MIB, Shelf, Vmm, agents, bar, floor, ratios, stolen_time};
use pageferry_client::{JobStatus, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use std::time::{Duration, Instant};

/// How long a guest is measured before the snapshot.
const BEFORE: Duration = Duration::from_millis(500);
/// Longest pause of a guest of 2 GiB, in milliseconds.
const LONGEST: f64 = 10.0;

const PACES: [(&str, Pace); 3] = [
    ("idle", Pace { threads: 0, rate: None }),
    ("20,000 writes/s", Pace { threads: 2, rate: Some(20_000) }),
    ("2 threads at full speed", Pace { threads: 2, rate: None }),
];

/// The measurements of one round.
struct Felt {
    status: JobStatus,
    /// Milliseconds by the guest's own clock.
    pause: f64,
    total: f64,
    /// Writes during the snapshot, as a part of those before in the same time.
    speed: f64,
    /// The same during a plain copy.
    beside_copy: f64,
    /// Microseconds of the slow writes, in order.
    slow: Vec<f64>,
    /// Milliseconds of processor time that the host gave to others.
    stolen: f64,
}

impl Felt {
    /// The agent's own count, in milliseconds.
    fn downtime(&self) -> f64 {
        self.status.counters.downtime_us as f64 / 1e3
    }

    /// A quantile, in thousandths, of the slow writes in microseconds.
    fn quantile(&self, part: usize) -> f64 {
        let index = (self.slow.len() * part).div_ceil(1000).saturating_sub(1);
        self.slow.get(index).copied().unwrap_or_default()
    }
}

/// Guests of several sizes and paces.
pub fn full(bench: &Bench, table: &mut Table) {
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    for size in &bench.sizes {
        of_size(bench, table, &shelf, size * MIB / bench.shrink);
    }
}

fn of_size(bench: &Bench, table: &mut Table, shelf: &Shelf, size: u64) {
    let image = Image::new(&bench.folder, "source", size);
    image.fill(0, size);
    let _warm = WarmPool::new(&bench.folder, size);
    let mut vmms: Vec<_> =
        agents(bench).into_iter().map(|(who, program)| (who, Vmm::new(&image, &program))).collect();
    let mut rounds: Vec<_> = vmms.iter().map(|_| PACES.map(|_| Vec::new())).collect();
    // The order changes from round to round, as in `save`.
    for round in 0..bench.rounds {
        for (at, (_, pace)) in PACES.iter().enumerate() {
            let count = vmms.len();
            for who in (0..count).map(|turn| (turn + round) % count) {
                rounds[who][at].push(feel(&mut vmms[who].1, &image, shelf, *pace));
            }
        }
    }
    for ((who, _), rounds) in vmms.iter().zip(&rounds) {
        for ((name, pace), rounds) in PACES.iter().zip(rounds) {
            let work = format!("pause: {} MiB, {name}", size / MIB);
            add_rows(table, &work, who, rounds, pace.threads > 0);
            if size == 2 * GIB {
                let name = format!("pause: {who}, 2 GiB, {name}");
                bar(
                    table,
                    &name,
                    "ms",
                    &rounds.iter().map(Felt::downtime).collect::<Vec<_>>(),
                    LONGEST,
                    Better::Less,
                );
            }
        }
    }
}

/// Takes a snapshot of a guest that runs at this pace.
fn feel(vmm: &mut Vmm, image: &Image, shelf: &Shelf, pace: Pace) -> Felt {
    let guest = vmm.guest.clone();
    let running = guest.run(pace);
    let (mut before, mut beside_copy) = (0.0, 0.0);
    if pace.threads > 0 {
        before = guest.rate(BEFORE);
        let (writes, started) = (guest.writes(), Instant::now());
        floor::copy(image, &shelf.path(), 2, false);
        beside_copy = (guest.writes() - writes) as f64 / started.elapsed().as_secs_f64() / before;
        shelf.clear();
    }
    guest.note(true);
    let (writes, stolen) = (guest.writes(), stolen_time());
    let saved = vmm.save(&shelf.path(), &SnapshotOptions::default());
    let during = (guest.writes() - writes) as f64 / saved.time.as_secs_f64();
    let mut slow: Vec<f64> =
        guest.note(false).iter().map(|time| time.as_secs_f64() * 1e6).collect();
    slow.sort_by(f64::total_cmp);
    let stolen = (stolen_time() - stolen).as_secs_f64() * 1e3;
    drop(running);
    shelf.clear();
    assert_eq!(saved.status.counters.pages_saved, image.allocated() / PAGE_SIZE);
    let pause = guest.last_pause();
    let (total, pause) = (saved.time.as_secs_f64() * 1e3, pause.as_secs_f64() * 1e3);
    Felt { status: saved.status, pause, total, speed: during / before, beside_copy, slow, stolen }
}

fn add_rows(table: &mut Table, work: &str, who: &str, rounds: &[Felt], busy: bool) {
    let samples = |figure: &dyn Fn(&Felt) -> f64| rounds.iter().map(figure).collect::<Vec<_>>();
    let mut add = |what: &str, unit, figure: &dyn Fn(&Felt) -> f64, remark| {
        table.add(work, &format!("{who}: {what}"), unit, &samples(figure), remark);
    };
    add("paused, by the agent's count", "ms", &Felt::downtime, String::new());
    add("paused, by the guest's", "ms", &|felt| felt.pause, String::new());
    add("all saved", "ms", &|felt| felt.total, String::new());
    if !busy {
        return;
    }
    let middle = |figure: &dyn Fn(&Felt) -> f64| median(&samples(figure));
    let faults = format!(
        "{:.0} faults, {:.0} of them captured their page",
        middle(&|felt| felt.status.counters.write_faults as f64),
        middle(&|felt| felt.status.counters.copied_before_write_pages as f64)
    );
    add(
        "a fault, p50, by the agent's count",
        "us",
        &|felt| felt.status.counters.fault_p50_us as f64,
        faults,
    );
    add("a fault, p99", "us", &|felt| felt.status.counters.fault_p99_us as f64, String::new());
    add("a fault, most", "us", &|felt| felt.status.counters.fault_max_us as f64, String::new());
    let slow = format!("{:.0} writes took more than 5 us", middle(&|felt| felt.slow.len() as f64));
    add("a slow write, p50, by the guest's clock", "us", &|felt| felt.quantile(500), slow);
    add("a slow write, p99", "us", &|felt| felt.quantile(990), String::new());
    add("a slow write, most", "us", &|felt| felt.quantile(1000), String::new());
    add("processor time that the host did not give", "ms", &|felt| felt.stolen, String::new());
    add("writes, of their rate before", "", &|felt| felt.speed, String::new());
    add("writes beside a plain copy", "", &|felt| felt.beside_copy, String::new());
}

/// 64 GiB of which 1 GiB is allocated, in one piece and in 64 pieces, compared with a guest of 1
/// GiB.
pub fn sparse(bench: &Bench, table: &mut Table) {
    const WORK: &str = "pause: idle";
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    let content = GIB / bench.shrink;
    let guests = [
        ("a full guest of 1 GiB", content, 1),
        ("64 GiB, the first GiB allocated", content * 64, 1),
        ("64 GiB, 1 GiB allocated in 64 pieces", content * 64, 64),
    ];
    let guests = guests.map(|(name, size, pieces)| {
        let image = Image::new(&bench.folder, &format!("source-{size}-{pieces}"), size);
        (0..pieces).for_each(|piece| image.fill(size / pieces * piece, content / pieces));
        (name, image)
    });
    let mut vmms = Vec::new();
    for (who, program) in agents(bench) {
        for (name, image) in &guests {
            vmms.push((format!("{who}: {name}"), image, Vmm::new(image, &program), Vec::new()));
        }
    }
    // Twice as many rounds, because they are short and the differences are small.
    for round in 0..bench.rounds * 2 {
        let count = vmms.len();
        for turn in 0..count {
            let (_, image, vmm, rounds) = &mut vmms[(turn + round) % count];
            rounds.push(feel(vmm, image, &shelf, PACES[0].1));
        }
    }
    for (name, _, _, rounds) in &vmms {
        let samples: Vec<f64> = rounds.iter().map(Felt::downtime).collect();
        let totals: Vec<f64> = rounds.iter().map(|felt| felt.total).collect();
        table.add(WORK, name, "ms", &samples, format!("all saved in {:.0} ms", median(&totals)));
    }
    for guests in vmms.chunks(3) {
        let times = |at: usize| guests[at].3.iter().map(Felt::downtime).collect::<Vec<_>>();
        for (at, (name, ..)) in guests.iter().enumerate().skip(1) {
            table.compare_rounds(WORK, name, &guests[0].0, Better::Less);
            let name = format!("pause: {name}, against 1 GiB");
            bar(table, &name, "times", &ratios(&times(at), &times(0)), 1.0, Better::Less);
        }
    }
}
