// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discards: how many are acknowledged per second, how long one takes while the agent migrates at
//! full speed, and what a queue gains for small ones.

use super::Bench;
use super::image::{Image, full_guest};
use super::ours::Side;
use super::table::{Better, Table};
use pageferry_client::{BlockRange, IncomingOptions, OutgoingOptions, Phase, Punch, Target};
use pageferry_protocol::memory::PAGE_SIZE;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const RANGES: u64 = 1_000_000;

fn page(page: u64) -> BlockRange {
    BlockRange { block: 0, offset: page * PAGE_SIZE, length: PAGE_SIZE }
}

/// Discards in batches while nothing else happens, and one by one during a migration.
pub fn discards(bench: &Bench, table: &mut Table) {
    batches(bench, table);
    single(bench, table);
}

/// Pages of 4 KiB that a balloon gives back one by one, as many at a time as virtio-balloon's
/// driver has in one request (256, `VIRTIO_BALLOON_ARRAY_PFNS_MAX` in drivers/virtio). All of them
/// are allocated.
pub fn queued(bench: &Bench, table: &mut Table) {
    const REQUEST: usize = 256;
    let count = (100 * REQUEST as u64 / bench.shrink).next_multiple_of(REQUEST as u64);
    let image = Image::new(&bench.folder, "source", count * 2 * PAGE_SIZE);
    let side = Side::new(&image);
    let scattered: Vec<BlockRange> = (0..count).map(|at| page(at * 2)).collect();
    // In each request the pages lie together, in any order.
    let together: Vec<BlockRange> =
        (0..count).map(|at| page(at / 256 * 256 + at * 67 % 256)).collect();
    for (work, pages) in [
        ("frees of 4 KiB, scattered", scattered),
        ("frees of 4 KiB, together in any order", together),
    ] {
        let (mut direct, mut queued, mut queueing) = (Vec::new(), Vec::new(), Vec::new());
        let each = |time: Duration| time.as_secs_f64() * 1e6 / pages.len() as f64;
        for _ in 0..bench.rounds {
            image.fill(0, image.size);
            let started = Instant::now();
            for page in &pages {
                assert_eq!(side.client.free(&[*page]).unwrap(), 1);
            }
            direct.push(each(started.elapsed()));

            image.fill(0, image.size);
            let (started, mut flushed, mut asked) = (Instant::now(), 0, Duration::ZERO);
            for request in pages.chunks(REQUEST) {
                let begun = Instant::now();
                for page in request {
                    side.client.free_later(&[*page]).unwrap();
                }
                asked += begun.elapsed();
                flushed += side.client.flush().unwrap();
            }
            queued.push(each(started.elapsed()));
            queueing.push(each(asked));
            assert_eq!(flushed, count);
        }
        let remark = |what: &str| format!("{count} pages, {what}");
        table.add(work, "one by one", "us", &direct, remark("all allocated"));
        table.add(work, "queued", "us", &queued, remark("a flush for every 256"));
        table.compare(work, "queued", "one by one", Better::Less);
        table.add(work, "queued: the caller alone", "us", &queueing, remark("without the flush"));
    }
}

/// Every second page of a guest, so that no two ranges can be merged.
fn batches(bench: &Bench, table: &mut Table) {
    let count = RANGES / bench.shrink;
    let image = Image::new(&bench.folder, "source", count * 2 * PAGE_SIZE);
    let side = Side::new(&image);
    let ranges: Vec<BlockRange> = (0..count).map(|range| page(range * 2)).collect();
    for (who, punch, allocated) in [
        ("1,000,000 ranges, not freed", Punch::No, false),
        ("1,000,000 ranges, freed, nothing allocated", Punch::Yes, false),
        ("1,000,000 ranges, freed, all allocated", Punch::Yes, true),
    ] {
        let mut times = Vec::new();
        for _ in 0..bench.rounds {
            side.client
                .populate(&[BlockRange { block: 0, offset: 0, length: image.size }])
                .unwrap();
            if allocated {
                image.fill(0, image.size);
            }
            let started = Instant::now();
            assert_eq!(side.client.discard(&ranges, punch).unwrap(), count);
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        image.clear();
        table.add("discards: batches, idle", who, "ms", &times, String::new());
    }
}

/// One discard at a time, at a steady pace, while a full guest is migrated at full speed.
fn single(bench: &Bench, table: &mut Table) {
    let size = 2 * GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    let pages = size / PAGE_SIZE;
    let mut idle = Vec::new();
    let mut during = Vec::new();
    for _ in 0..bench.rounds {
        destination.clear();
        source.fill(0, size / 16);
        let (from, to) = (Side::new(&source), Side::new(&destination));
        let mut next = 0;
        let mut discard = || {
            let started = Instant::now();
            from.client.discard(&[page(next)], Punch::Yes).unwrap();
            // All of them are in the part that is filled again before the next round.
            next = (next + 17) % (pages / 16);
            started.elapsed()
        };
        for _ in 0..200 {
            idle.push(discard());
        }
        let listen = Target::Address("tcp:127.0.0.1:0".into());
        let incoming = to.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        let options = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
        let job =
            from.client.start_outgoing(Target::Address(incoming.address), &options).unwrap().job;
        while !from.client.status().unwrap().phase.is_final() {
            during.push(discard());
            // A real guest gives pages back from time to time. Without a pause this would measure
            // batches of one.
            std::thread::sleep(Duration::from_micros(500));
        }
        assert_eq!(from.client.wait(job, Duration::from_secs(60)).unwrap().phase, Phase::Completed);
    }
    for (who, mut times) in [("idle", idle), ("during a migration at full speed", during)] {
        times.sort_unstable();
        let quantile = |part: usize| [times[(times.len() - 1) * part / 1000].as_secs_f64() * 1e6];
        let remark = format!("{} discards", times.len());
        for (name, part) in [("p50", 500), ("p99", 990), ("most", 1000)] {
            table.add(
                "discards: latency of one, freed",
                &format!("{who}, {name}"),
                "us",
                &quantile(part),
                remark.clone(),
            );
        }
    }
}
