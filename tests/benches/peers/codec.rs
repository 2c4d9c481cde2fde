// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's work on every byte, compared with the speed of the memory, and the cost of an idle
//! agent.

use super::Bench;
use super::image::Image;
use super::ours::{Side, migrate};
use super::table::{Better, Table};
use pageferry_agent::memory::zero::data_mask;
use pageferry_client::OutgoingOptions;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Size of a worker's buffer: the pages of one word of the bitmap.
const BUFFER: usize = 64 * PAGE_SIZE as usize;
/// Larger than any cache.
const LARGE: usize = 512 << 20;

fn speed(bytes: usize, times: usize, mut work: impl FnMut()) -> f64 {
    work();
    let started = Instant::now();
    (0..times).for_each(|_| work());
    (bytes * times) as f64 / started.elapsed().as_secs_f64() / 1e9
}

/// Zero scan, checksum and record header, in the cache and out of it.
pub fn codec(bench: &Bench, table: &mut Table) {
    const WORK: &str = "bytes";
    let large = LARGE / bench.shrink as usize / BUFFER * BUFFER;
    let (mut from, mut to) = (vec![1u8; large], vec![1u8; large]);
    // Written, because otherwise all of it would be the kernel's single zero page.
    from.fill(0);
    let content = vec![0x5au8; BUFFER];
    let header = RecordHeader::new(Kind::Data, 0, 0, PageRange::new(0, 64), BUFFER);
    let hot = 2000 / bench.shrink.min(100) as usize;
    let mut rows: [(&str, Vec<f64>); 6] = [
        ("memory copy, out of the cache", vec![]),
        ("zero scan, out of the cache, all zero", vec![]),
        ("zero scan, in the cache, all zero", vec![]),
        ("zero scan, in the cache, no page zero", vec![]),
        ("checksum, in the cache", vec![]),
        ("checksum, out of the cache", vec![]),
    ];
    for _ in 0..bench.rounds {
        rows[0].1.push(speed(large, 1, || to.copy_from_slice(black_box(&from))));
        let scan =
            |bytes: &[u8]| bytes.chunks(BUFFER).map(data_mask).fold(0, |any, mask| any | mask);
        rows[1].1.push(speed(large, 1, || {
            black_box(scan(black_box(&from)));
        }));
        rows[2].1.push(speed(BUFFER, hot, || {
            black_box(data_mask(black_box(&from[..BUFFER])));
        }));
        rows[3].1.push(speed(BUFFER, hot, || {
            black_box(data_mask(black_box(&content)));
        }));
        rows[4].1.push(speed(BUFFER, hot, || {
            black_box(header.with_checksum(black_box(&content)));
        }));
        rows[5].1.push(speed(large, 1, || {
            from.chunks(BUFFER).for_each(|part| {
                black_box(header.with_checksum(black_box(part)));
            });
        }));
    }
    for (who, rates) in &rows {
        table.add(WORK, who, "GB/s", rates, String::new());
    }
    for (who, _) in &rows[1..] {
        table.compare(WORK, who, rows[0].0, Better::More);
    }
    records(bench, table, header);
    idle(bench, table);
}

/// Makes headers, encodes them, decodes them and checks them.
fn records(bench: &Bench, table: &mut Table, header: RecordHeader) {
    let count = 2_000_000 / bench.shrink as usize;
    let rates: Vec<f64> = (0..bench.rounds)
        .map(|_| {
            let started = Instant::now();
            for _ in 0..count {
                let wire = black_box(header).with_checksum(&[]).to_wire();
                let _ = black_box(RecordHeader::from_wire(black_box(wire)).check());
            }
            count as f64 / started.elapsed().as_secs_f64() / 1e6
        })
        .collect();
    table.add("bytes", "record headers, made and checked", "M/s", &rates, String::new());
}

/// Processor time of an idle agent with memory, a client and an ended job.
fn idle(bench: &Bench, table: &mut Table) {
    let image = Image::new(&bench.folder, "idle", 1 << 30);
    let mut side = Side::new(&image);
    let time = Duration::from_millis(2000 / bench.shrink.min(10));
    let before = side.processor_time();
    std::thread::sleep(time);
    let used = side.processor_time() - before;
    table.add("an idle agent", "processor time in 2 s", "ms", &[used], String::new());
    let done = migrate(
        side,
        Side::new(&Image::new(&bench.folder, "idle-there", 1 << 30)),
        &OutgoingOptions::default(),
    );
    table.add(
        "an idle agent",
        "peak memory, empty guest of 1 GiB",
        "MiB",
        &[done.source_peak as f64 / f64::from(1 << 20)],
        String::new(),
    );
}
