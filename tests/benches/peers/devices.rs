// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest gives back by the agent's balloon: how fast, and how long its driver waits, beside
//! the kernel's part of it; and what hints at free pages save a migration.

use super::Bench;
use super::table::{Better, Table};
use pageferry_client::OutgoingOptions;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, PATIENCE, Piece};
use pageferry_tests::memory::TestBlock;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
/// Pages that Linux reports or hints at in one piece: the largest of its free lists.
const PIECE: u64 = (4 << 20) / PAGE_SIZE;
/// Pieces in one report (`PAGE_REPORTING_CAPACITY` in include/linux/page_reporting.h).
const PIECES: usize = 32;
/// Numbers in one buffer (`VIRTIO_BALLOON_ARRAY_PFNS_MAX` in drivers/virtio).
const NUMBERS: usize = 256;

/// Reports, inflation, and hints.
pub fn devices(bench: &Bench, table: &mut Table) {
    reports(bench, table);
    inflation(bench, table);
    hints(bench, table);
}

/// The pages behind those of the queues, all of them allocated.
fn full(host: &DeviceHost, pages: PageRange) {
    let bytes = vec![0x5a; 1 << 20];
    let (first, end) = (pages.offset(), pages.offset() + pages.bytes());
    for offset in (first..end).step_by(bytes.len()) {
        let length = (end - offset).min(bytes.len() as u64) as usize;
        host.block(0).write(offset, &bytes[..length]).unwrap();
    }
}

fn millions(pages: u64, time: Duration) -> f64 {
    pages as f64 / time.as_secs_f64() / 1e6
}

/// Adds the median and the 99th percentile of waits.
fn add_waits(table: &mut Table, work: &str, who: &str, mut waits: Vec<Duration>) {
    waits.sort_unstable();
    for (name, part) in [("p50", 50), ("p99", 99)] {
        let wait = [waits[(waits.len() - 1) * part / 100].as_secs_f64() * 1e6];
        table.add(work, &format!("{who}, {name}"), "us", &wait, format!("{} buffers", waits.len()));
    }
}

fn reports(bench: &Bench, table: &mut Table) {
    const WORK: &str = "free page reporting";
    let size = (GIB / bench.shrink).max(16 << 20);
    let pieces: Vec<u64> = (1..size / PAGE_SIZE / PIECE).map(|piece| piece * PIECE).collect();
    let host = DeviceHost::ram(size / PAGE_SIZE);
    let mut balloon = host.balloon();
    let queue = balloon.report_queue();
    let given = PageRange::new(PIECE, pieces.len() as u64 * PIECE);
    let (mut device, mut plain) = (Vec::new(), Vec::new());
    let (mut waits, mut punches) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        full(&host, given);
        let started = Instant::now();
        for report in pieces.chunks(PIECES) {
            let pieces: Vec<Piece> = report.iter().map(|first| writable(*first, PIECE)).collect();
            let begun = Instant::now();
            balloon.driver.queue(queue).round_trip(&pieces);
            waits.push(begun.elapsed());
        }
        device.push(millions(given.count, started.elapsed()));
        assert!(host.block(0).is_hole(given).unwrap());

        full(&host, given);
        let started = Instant::now();
        for report in pieces.chunks(PIECES) {
            let begun = Instant::now();
            for first in report {
                host.block(0).punch(PageRange::new(*first, PIECE)).unwrap();
            }
            punches.push(begun.elapsed());
        }
        plain.push(millions(given.count, started.elapsed()));
    }
    let remark = format!("{} MiB in pieces of 4 MiB, {PIECES} in a report", given.bytes() >> 20);
    table.add(WORK, "pageferry", "million pages/s", &device, remark);
    table.add(WORK, "fallocate alone", "million pages/s", &plain, String::new());
    table.compare_rounds(WORK, "pageferry", "fallocate alone", Better::More);
    add_waits(table, "wait for one report", "pageferry", waits);
    add_waits(table, "wait for one report", "fallocate alone", punches);
}

fn writable(first: u64, count: u64) -> Piece {
    Piece::writable(first * PAGE_SIZE, (count * PAGE_SIZE) as u32)
}

fn inflation(bench: &Bench, table: &mut Table) {
    let size = (GIB / 4 / bench.shrink).max(16 << 20);
    let pages = size / PAGE_SIZE - FIRST_FREE_PAGE;
    let host = DeviceHost::ram(size / PAGE_SIZE);
    let mut balloon = host.balloon();
    let all = PageRange::new(FIRST_FREE_PAGE, pages);
    // Linux takes pages from wherever it finds them, and lists the last one first.
    let together: Vec<u64> = (all.first..all.end()).rev().collect();
    let scattered: Vec<u64> = together.iter().copied().step_by(2).collect();
    for (work, pages) in [
        ("inflation, pages together, the last one first", together),
        ("inflation, every second page", scattered),
    ] {
        let (mut device, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds {
            full(&host, all);
            let started = Instant::now();
            inflate(&mut balloon, &pages);
            device.push(millions(pages.len() as u64, started.elapsed()));

            full(&host, all);
            let started = Instant::now();
            pages.iter().for_each(|page| punch(host.block(0), *page));
            plain.push(millions(pages.len() as u64, started.elapsed()));
        }
        let remark = format!("{} pages, {NUMBERS} in a buffer", pages.len());
        table.add(work, "pageferry", "million pages/s", &device, remark);
        table.add(work, "fallocate, page by page", "million pages/s", &plain, String::new());
        table.compare_rounds(work, "pageferry", "fallocate, page by page", Better::More);
    }
}

fn inflate(balloon: &mut BalloonDriver, pages: &[u64]) {
    for buffer in pages.chunks(NUMBERS) {
        let numbers: Vec<u32> = buffer.iter().map(|page| *page as u32).collect();
        balloon.inflate(&numbers);
    }
}

fn punch(block: &TestBlock, page: u64) {
    block.punch(PageRange::new(page, 1)).unwrap();
}

/// A guest that has dropped its page cache: seven eighths of its memory are allocated and free.
fn hints(bench: &Bench, table: &mut Table) {
    const WORK: &str = "a guest of which 7/8 are allocated and free";
    let size = (GIB / bench.shrink).max(32 << 20);
    let pages = size / PAGE_SIZE;
    let free: Vec<u64> = (pages / 8 / PIECE..pages / PIECE).map(|piece| piece * PIECE).collect();
    let options = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
    for hinting in [false, true] {
        let who = if hinting { "with hints" } else { "without hints" };
        let (mut times, mut sent) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds {
            let source = DeviceHost::ram(pages);
            full(&source, PageRange::new(FIRST_FREE_PAGE, pages - FIRST_FREE_PAGE));
            let balloon = hinting.then(|| source.balloon());
            let destination = DeviceHost::ram(pages);
            let jobs = source.start_move(&destination, &options);
            if let Some(balloon) = balloon {
                answer(balloon, &free);
            }
            let status = source.arrives_at(&destination, jobs);
            times.push(status.counters.total_us as f64 / 1e3);
            sent.push(status.counters.wire_bytes as f64 / f64::from(1 << 20));
        }
        let remark = format!("{} MiB", size >> 20);
        table.add(WORK, &format!("{who}, sent"), "MiB", &sent, remark);
        table.add(WORK, &format!("{who}, total time"), "ms", &times, String::new());
    }
    table.compare(WORK, "with hints, sent", "without hints, sent", Better::Less);
    table.compare(WORK, "with hints, total time", "without hints, total time", Better::Less);
}

/// Answers the device's question, if it comes in time.
fn answer(mut balloon: BalloonDriver, free: &[u64]) {
    if !balloon.driver.front_end.config_changes_within(PATIENCE) {
        return;
    }
    let round = balloon.hint_command();
    balloon.answer_hints(round);
    let queue = balloon.hint_queue();
    let queue = balloon.driver.queue(queue);
    for pieces in free.chunks(usize::from(queue.rings().size)) {
        for first in pieces {
            queue.put(&[writable(*first, PIECE)]);
        }
        queue.kick();
        // When the guest has gone, nobody returns them.
        if pieces.iter().any(|_| queue.wait_within(Duration::from_millis(500)).is_none()) {
            return;
        }
    }
}
