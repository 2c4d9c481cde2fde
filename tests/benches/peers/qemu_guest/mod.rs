// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A live Linux guest that moves from one QEMU to another, over TCP: by pageferry beside unmodified
//! QEMUs, and by QEMU itself.
//!
//! - [`host`]: a QEMU that has the guest, or waits for it;
//! - [`mover`]: the programs that are compared.
//!
//! Each program has a guest of its own, all with the same command line and the same work. They take
//! turns, and a guest is paused while another one moves. One guest for all would be unfair: QEMU
//! leaves it with all its memory allocated, and the next program would have to read that.
//!
//! The same is measured for all, from the outside:
//!
//! - *Total*: from the start of the command (`pageferry migrate`, or `migrate` of QMP) until the
//!   guest runs at the destination, which is QEMU's event RESUME there.
//! - *Downtime*: from QEMU's event STOP at the source to that RESUME, by the host's clock.
//! - *Longest gap of its ticks*: the guest says every 100 ms that it runs.
//! - *On the wire*: by the program's own count.
//! - *Allocated*: the blocks of the memory files when the guest has arrived.
//! - *Writes*: as the guest counts them, by its own clock, which stands while it is paused.

pub mod host;
pub mod mover;

use super::Bench;
use super::table::{Better, Table, median};
use host::Host;
pub use host::memory_of;
use mover::Mover;
use pageferry_tests::linux_guest::{GuestMemory, LinuxGuest, QemuTools, QemuVersion, Tick};
use pageferry_tests::require;
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};

const MIB: u64 = 1 << 20;
/// Ticks of a guest between the end of its pause and a move: a second.
const SETTLE: usize = 10;
/// Ticks after a move that count for the longest gap.
const AFTERWARDS: usize = 5;
/// How long the writes of a guest are counted after a move.
const FIRST_SECONDS: Duration = Duration::from_secs(10);

/// The programs, in the order of the table.
const MOVERS: [Mover; 4] = [
    Mover::Pageferry { streams: 1 },
    Mover::Pageferry { streams: 2 },
    Mover::Qemu { channels: 0 },
    Mover::Qemu { channels: 2 },
];

/// A guest and its work.
struct Kind {
    name: &'static str,
    text: &'static str,
    memory_size: u64,
    /// What the balloon leaves it.
    balloon: Option<u64>,
    /// Commands that it gets. The first is the one that fills memory once, and never changes it.
    tasks: &'static [&'static str],
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "idle",
        text: "an idle guest of 512 MiB",
        memory_size: 512 * MIB,
        balloon: None,
        tasks: &["check 128M 86400000", "tick"],
    },
    Kind {
        name: "writes",
        text: "a guest of 512 MiB that writes to 2000 pages/s of 64 MiB",
        memory_size: 512 * MIB,
        balloon: None,
        tasks: &["check 128M 86400000", "write 2000 64M", "tick"],
    },
    Kind {
        name: "balloon",
        text: "a guest of 2 GiB whose balloon leaves it 384 MiB",
        memory_size: 2048 * MIB,
        balloon: Some(384 * MIB),
        tasks: &["check 128M 86400000", "tick"],
    },
    Kind {
        name: "writes-20k",
        text: "a guest of 2 GiB that writes to 20,000 pages/s of 1280 MiB",
        memory_size: 2048 * MIB,
        balloon: None,
        tasks: &["check 128M 86400000", "write 20000 1280M", "tick"],
    },
    Kind {
        name: "writes-200k",
        text: "a guest of 2 GiB that writes to 200,000 pages/s of 1280 MiB",
        memory_size: 2048 * MIB,
        balloon: None,
        tasks: &["check 128M 86400000", "write 200000 1280M", "tick"],
    },
];

/// The names of the guests.
pub fn names() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.name).collect()
}

/// The versions of QEMU that can be compared.
pub fn versions() -> Vec<String> {
    QemuVersion::ALL.iter().map(QemuVersion::to_string).collect()
}

/// What one move has cost.
struct Sample {
    total: Duration,
    downtime: Duration,
    gap: Duration,
    wire_bytes: u64,
    /// Bytes of the memory files that are allocated.
    source_before: u64,
    source_after: u64,
    destination: u64,
    /// Writes in a second before the move, during it, and in the first seconds after it.
    writes: [f64; 3],
    remark: String,
}

/// A guest that one program moves.
struct Traveller<'a> {
    tools: &'a QemuTools,
    version: QemuVersion,
    guest: LinuxGuest,
    writes: bool,
    mover: Mover,
    host: Host,
    samples: Vec<Sample>,
}

/// Moves guests.
pub fn qemu_guest(bench: &Bench, table: &mut Table) {
    let Some(tools) = require::qemu() else {
        return table.note("skipped: qemu-guest: run tests/guests/install".to_owned());
    };
    let has = |list: &[String], name: &str| list.is_empty() || list.iter().any(|one| one == name);
    for version in QemuVersion::ALL {
        if !bench.qemu_versions.iter().any(|wanted| *wanted == version.to_string()) {
            continue;
        }
        for kind in KINDS.iter().filter(|kind| has(&bench.guests, kind.name)) {
            eprintln!("  {} in QEMU {version}", kind.text);
            compare(bench, &tools, version, kind, table);
        }
    }
}

fn compare(bench: &Bench, tools: &QemuTools, version: QemuVersion, kind: &Kind, table: &mut Table) {
    let mut travellers: Vec<Traveller<'_>> = MOVERS
        .into_iter()
        .filter(|mover| bench.who.iter().any(|who| who == mover.kind()))
        .map(|mover| Traveller::boot(tools, version, kind, mover))
        .collect();
    let count = travellers.len();
    for round in 0..bench.rounds {
        for turn in 0..count {
            travellers[(round + turn) % count].travel();
        }
    }
    for traveller in &mut travellers {
        traveller.verify();
    }
    let rows: [Row; 8] = [
        ("total", "ms", |sample| millis(sample.total)),
        ("downtime, limit 300", "ms", |sample| millis(sample.downtime)),
        ("longest gap of its ticks", "ms", |sample| millis(sample.gap)),
        ("on the wire", "MiB", |sample| mebibytes(sample.wire_bytes)),
        ("allocated at the source afterwards", "MiB", |sample| mebibytes(sample.source_after)),
        ("allocated at the destination", "MiB", |sample| mebibytes(sample.destination)),
        ("writes meanwhile, of their rate", "", |sample| sample.writes[1] / sample.writes[0]),
        ("writes afterwards, of their rate", "", |sample| sample.writes[2] / sample.writes[0]),
    ];
    let rows = rows.into_iter().filter(|row| kind.writes() || !row.0.starts_with("writes"));
    for (what, unit, figure) in rows {
        let work = format!("QEMU {version}: {}: {what}", kind.text);
        for traveller in &travellers {
            let figures: Vec<f64> = traveller.samples.iter().map(figure).collect();
            table.add(&work, &traveller.mover.to_string(), unit, &figures, traveller.remark(what));
        }
        for mover in MOVERS.iter().filter(|mover| mover.kind() == "pageferry") {
            for peer in MOVERS.iter().filter(|mover| mover.kind() == "qemu") {
                table.compare(&work, &mover.to_string(), &peer.to_string(), Better::Less);
            }
        }
    }
}

impl Kind {
    /// True if its guest writes as fast as it was told to.
    fn writes(&self) -> bool {
        self.tasks.iter().any(|task| task.starts_with("write"))
    }
}

/// What is measured, its unit, and the figure of a sample.
type Row = (&'static str, &'static str, fn(&Sample) -> f64);

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

impl<'a> Traveller<'a> {
    /// Boots a guest and gives it its work. It is paused until its turn.
    fn boot(tools: &'a QemuTools, version: QemuVersion, kind: &Kind, mover: Mover) -> Self {
        let guest = LinuxGuest::new(kind.memory_size);
        let mut host = mover.boot(tools, version, &guest);
        host.running.wait_until_ready().unwrap();
        if let Some(size) = kind.balloon {
            host.running.qmp.balloon(size).unwrap();
            host.running.qmp.wait_for_balloon(size).unwrap();
        }
        let console = &mut host.running.console;
        for task in kind.tasks {
            console.command(task).unwrap();
        }
        console.wait_for_status("the content of the memory", |status| status.check > 0).unwrap();
        host.execute("stop");
        Self { tools, version, guest, writes: kind.writes(), mover, host, samples: Vec::new() }
    }

    /// Moves the guest once.
    fn travel(&mut self) {
        let source = &mut self.host;
        source.execute("cont");
        let settling = counted(source);
        source
            .running
            .console
            .wait_for_ticks(source.running.console.ticks().len() + SETTLE)
            .unwrap();
        let mut destination = self.mover.receive(self.tools, self.version, &self.guest);
        let source_before = source.allocated();
        let leaving = counted(source);

        let (started, started_at) = (Instant::now(), SystemTime::now());
        let sent = self.mover.migrate(source, &mut destination);
        let stopped = source.event_since("STOP", started_at);
        let resumed = destination.event_since("RESUME", started_at);
        let (source_after, arrived) = (source.allocated(), destination.allocated());
        let come = counted(&mut destination);
        if self.writes {
            std::thread::sleep(FIRST_SECONDS);
        }
        let later = counted(&mut destination);

        destination.running.console.wait_for_ticks(AFTERWARDS).unwrap();
        let mut ticks = source.running.console.ticks();
        ticks.extend(destination.running.console.ticks());
        let since = |time: SystemTime| resumed.duration_since(time).unwrap();
        self.samples.push(Sample {
            total: since(started_at),
            downtime: since(stopped),
            gap: longest_gap(ticks, started),
            wire_bytes: sent.wire_bytes,
            source_before,
            source_after,
            destination: arrived,
            writes: [(settling, leaving), (leaving, come), (come, later)].map(rate),
            remark: sent.remark,
        });
        destination.running.verify().unwrap();
        destination.execute("stop");
        std::mem::replace(&mut self.host, destination).end();
    }

    /// Fails if the guest has lost memory on its way.
    fn verify(&mut self) {
        self.host.execute("cont");
        // Verifies all pages once more.
        self.host.running.console.command("stop check").unwrap();
        self.host.running.verify().unwrap();
    }

    fn remark(&self, what: &str) -> String {
        match what {
            "total" => self.samples.last().map_or(String::new(), |last| last.remark.clone()),
            "allocated at the source afterwards" => {
                let before: Vec<f64> =
                    self.samples.iter().map(|sample| mebibytes(sample.source_before)).collect();
                format!("{:.0} before", median(&before))
            }
            _ => String::new(),
        }
    }
}

/// The longest time between two ticks that follow each other, from the last one before `start` on.
fn longest_gap(mut ticks: Vec<Tick>, start: Instant) -> Duration {
    ticks.sort_by_key(|tick| tick.number);
    let gaps = ticks.windows(2).filter(|pair| pair[1].arrived > start);
    gaps.map(|pair| pair[1].arrived.saturating_duration_since(pair[0].arrived)).max().unwrap()
}

/// How many pages the guest has written, and when, by its own clock.
fn counted(host: &mut Host) -> (u64, Duration) {
    let status = host.running.console.status().unwrap();
    (status.written, status.monotonic)
}

/// Writes in a second between two counts.
fn rate((before, after): ((u64, Duration), (u64, Duration))) -> f64 {
    (after.0 - before.0) as f64 / (after.1 - before.1).as_secs_f64()
}

/// The guest with its memory in a backend.
fn with_memory(guest: &LinuxGuest, memory: GuestMemory) -> LinuxGuest {
    LinuxGuest { memory, ..guest.clone() }
}

/// A capability of QEMU's migration.
fn capability(name: &str, state: bool) -> Value {
    json!({ "capabilities": [{ "capability": name, "state": state }] })
}
