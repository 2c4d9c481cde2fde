// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Linux guest that writes while it is saved: by pageferry beside an unmodified QEMU, and by
//! QEMU's own background-snapshot.
//!
//! Both guests have the same command line and the same work, and both files are synced within the
//! measured time. The programs take turns; a guest is paused while the other one is saved.

use super::super::Bench;
use super::super::qemu::unlimited;
use super::super::qemu_guest::host::Host;
use super::super::qemu_guest::mover::Mover;
use super::super::table::{Better, Table};
use super::Shelf;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::linux_guest::{LinuxGuest, QemuVersion};
use pageferry_tests::process::{Process, program};
use pageferry_tests::require;
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a guest is measured before it is saved.
const BEFORE: Duration = Duration::from_secs(2);

/// One save.
struct Sample {
    total: Duration,
    downtime: Duration,
    /// The longest time between two ticks of the guest, which come every 100 ms.
    gap: Duration,
    /// Writes meanwhile, as a part of those before in the same time.
    speed: f64,
    /// Bytes of the file that are allocated.
    file: u64,
    remark: String,
}

struct Saver {
    name: &'static str,
    mover: Mover,
    host: Host,
    samples: Vec<Sample>,
}

/// A guest of 1 GiB that writes to 20,000 pages/s of 640 MiB.
pub fn writes(bench: &Bench, table: &mut Table) {
    let Some(tools) = require::qemu() else {
        return table
            .note("skipped: snapshots of a Linux guest: run tests/guests/install".to_owned());
    };
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    let guest = LinuxGuest { net: false, balloon: false, ..LinuxGuest::new(1024 * MIB) };
    let programs = [
        ("pageferry, background", Mover::Pageferry { streams: 1 }),
        ("QEMU, background-snapshot", Mover::Qemu { channels: 0 }),
    ];
    let mut savers: Vec<Saver> = programs
        .into_iter()
        .filter(|(_, mover)| bench.who.iter().any(|who| who == mover.kind()))
        .map(|(name, mover)| {
            let mut host = mover.boot(&tools, QemuVersion::V10_0, &guest);
            host.running.wait_until_ready().unwrap();
            let console = &mut host.running.console;
            for task in ["write 20000 640M", "tick"] {
                console.command(task).unwrap();
            }
            // By then nearly all of its pages were written.
            let touched = 4 * 640 * MIB / 4096;
            console.wait_for_status("its memory", |status| status.written > touched).unwrap();
            host.execute("stop");
            Saver { name, mover, host, samples: Vec::new() }
        })
        .collect();
    let count = savers.len();
    for round in 0..bench.rounds {
        for turn in 0..count {
            savers[(round + turn) % count].save(&shelf);
        }
    }
    let rows: [Row; 5] = [
        ("all saved", "ms", |sample| millis(sample.total)),
        ("paused", "ms", |sample| millis(sample.downtime)),
        ("longest gap of its ticks", "ms", |sample| millis(sample.gap)),
        ("writes, of their rate before", "", |sample| sample.speed),
        ("the file", "MiB", |sample| sample.file as f64 / MIB as f64),
    ];
    for (what, unit, figure) in rows {
        let work = format!("a Linux guest of 1 GiB, 20,000 writes/s: {what}");
        for saver in &savers {
            let figures: Vec<f64> = saver.samples.iter().map(figure).collect();
            let remark = saver.samples.last().map_or("", |sample| &sample.remark);
            let remark = if what == "all saved" { remark } else { "" };
            table.add(&work, saver.name, unit, &figures, remark.to_owned());
        }
        if let [ours, qemu] = &savers[..] {
            let better = if unit.is_empty() { Better::More } else { Better::Less };
            table.compare(&work, ours.name, qemu.name, better);
        }
    }
}

/// What is measured, its unit, and the figure of a sample.
type Row = (&'static str, &'static str, fn(&Sample) -> f64);

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Saver {
    fn written(&mut self) -> u64 {
        self.host.running.console.status().unwrap().written
    }

    fn save(&mut self, shelf: &Shelf) {
        self.host.execute("cont");
        let settled = self.host.running.console.ticks().len() + 10;
        self.host.running.console.wait_for_ticks(settled).unwrap();
        let (since, written) = (Instant::now(), self.written());
        std::thread::sleep(BEFORE);
        let before = (self.written() - written) as f64 / since.elapsed().as_secs_f64();

        let path = shelf.path();
        let (started_at, since, written) = (SystemTime::now(), Instant::now(), self.written());
        let started = Instant::now();
        let remark = match self.mover {
            Mover::Pageferry { .. } => by_pageferry(&self.host, &path),
            Mover::Qemu { .. } => by_qemu(&mut self.host, &path),
        };
        File::open(&path).unwrap().sync_all().unwrap();
        let total = started.elapsed();
        let during = (self.written() - written) as f64 / since.elapsed().as_secs_f64();
        let stopped = self.host.event_since("STOP", started_at);
        let resumed = self.host.event_since("RESUME", started_at);
        let ticks = self.host.running.console.ticks();
        let gaps = ticks.windows(2).filter(|pair| pair[1].arrived > started);
        let gap = gaps.map(|pair| pair[1].arrived.saturating_duration_since(pair[0].arrived)).max();
        self.samples.push(Sample {
            total,
            downtime: resumed.duration_since(stopped).unwrap(),
            gap: gap.unwrap_or_default(),
            speed: during / before,
            file: std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512,
            remark: format!("{before:.0} writes/s before; {remark}"),
        });
        self.host.running.verify().unwrap();
        self.host.execute("stop");
        shelf.clear();
    }
}

fn by_pageferry(host: &Host, path: &Path) -> String {
    let mut command = Command::new(program());
    command.args(["snapshot", "--json", "--socket"]).arg(host.agent.as_ref().unwrap()).arg(path);
    let mut process = Process::spawn("pageferry snapshot", &mut command).unwrap();
    let exit = process.wait(PATIENCE).unwrap();
    let lines = process.lines();
    assert!(exit.success(), "{exit}: {lines:?}");
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    let number = |name: &str| last[name].as_u64().unwrap();
    format!(
        "{} write faults, p99 {} us, most {} us; {} pages saved",
        number("write_faults"),
        number("fault_p99_us"),
        number("fault_max_us"),
        number("pages_saved")
    )
}

fn by_qemu(host: &mut Host, path: &Path) -> String {
    let capability = json!({ "capability": "background-snapshot", "state": true });
    let qmp = &mut host.running.qmp;
    let capabilities = json!({ "capabilities": [capability] });
    qmp.execute("migrate-set-capabilities", capabilities).unwrap();
    qmp.execute("migrate-set-parameters", unlimited()).unwrap();
    qmp.execute("migrate", json!({ "uri": format!("file:{}", path.display()) })).unwrap();
    let status = wait_for("QEMU's snapshot", PATIENCE, || {
        let status = host.execute("query-migrate");
        match status["status"].as_str() {
            Some("completed") => Some(status),
            Some("failed" | "cancelled") => panic!("QEMU's snapshot failed: {status}"),
            _ => None,
        }
    });
    let status = status.unwrap();
    let ram = |name: &str| status["ram"][name].as_u64().unwrap_or_default();
    format!(
        "{} pages saved, {} of zeroes, downtime {} ms by QEMU",
        ram("normal"),
        ram("duplicate"),
        status["downtime"]
    )
}
