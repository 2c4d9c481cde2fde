// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An idle guest whose pages hold text.

use super::Bench;
use super::image::{Image, WarmPool};
use super::ours::{Side, migrate};
use super::qemu::Mode;
use super::table::{Better, Table};
use pageferry_client::{Compression, OutgoingOptions};

const WORK: &str = "compression";
const GIB: u64 = 1 << 30;
const OURS: [(&str, Compression); 3] = [
    ("pageferry, 2, none", Compression::None),
    ("pageferry, 2, lz4", Compression::Lz4),
    ("pageferry, 2, zstd:1", Compression::Zstd(1)),
];
const QEMUS: [(&str, Mode); 2] = [
    ("QEMU, multifd 2, none", Mode::multifd(2)),
    ("QEMU, multifd 2, zstd:1", Mode { channels: 2, zstd: 1 }),
];

/// The rates of one program, and the bytes on the wire in its last round.
#[derive(Default)]
struct Samples {
    rates: Vec<f64>,
    wire_bytes: u64,
}

impl Samples {
    fn add(&mut self, size: u64, time: std::time::Duration, wire_bytes: u64) {
        self.rates.push(size as f64 / time.as_secs_f64() / 1e9);
        self.wire_bytes = wire_bytes;
    }

    fn print(&self, table: &mut Table, who: &str, size: u64) {
        let times = size as f64 / self.wire_bytes.max(1) as f64;
        let remark = format!("{} MiB on the wire, {times:.2} times less", self.wire_bytes >> 20);
        table.add(WORK, who, "GB/s", &self.rates, remark);
    }
}

/// 1 GiB of text over TCP loopback. GB/s count the guest's bytes and not the bytes on the wire.
pub fn compression(bench: &Bench, table: &mut Table) {
    let size = GIB / bench.shrink;
    let source = Image::new(&bench.folder, "source", size);
    let destination = Image::new(&bench.folder, "destination", size);
    source.fill_text();
    let _warm = WarmPool::new(&bench.folder, size * 2);
    let mut ours = OURS.map(|_| Samples::default());
    let mut qemus = QEMUS.map(|_| Samples::default());
    for _ in 0..bench.rounds {
        for ((_, compression), samples) in OURS.iter().zip(&mut ours) {
            destination.clear();
            let options = OutgoingOptions {
                streams: 2,
                compression: *compression,
                ..OutgoingOptions::default()
            };
            let done = migrate(Side::new(&source), Side::new(&destination), &options);
            assert_eq!(done.status.counters.pages_sent, size / 4096);
            samples.add(size, done.time, done.status.counters.wire_bytes);
        }
        let Some(qemu) = &bench.qemu else { continue };
        for ((_, mode), samples) in QEMUS.iter().zip(&mut qemus) {
            destination.clear();
            let took = qemu.migrate(&source, &destination, *mode);
            samples.add(size, took.time, took.wire_bytes);
        }
    }
    OURS.iter().zip(&ours).for_each(|((who, _), samples)| samples.print(table, who, size));
    if bench.qemu.is_some() {
        QEMUS.iter().zip(&qemus).for_each(|((who, _), samples)| samples.print(table, who, size));
    }
    for (who, with) in [
        (OURS[1].0, OURS[0].0),
        (OURS[2].0, OURS[0].0),
        (OURS[0].0, QEMUS[0].0),
        (OURS[2].0, QEMUS[1].0),
    ] {
        table.compare(WORK, who, with, Better::More);
    }
}
