// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How fast a guest runs once it has arrived: with huge pages, and without.
//!
//! A guest of 2 GiB that uses all of its memory is migrated. Then a program maps its memory as a
//! VMM does, and does what the guest would do next: it walks over random pages, and changes a
//! quarter of them. The first walk finds nothing mapped and takes page faults. The second walk
//! finds all that the first has mapped; what it still waits for are page tables that the processor
//! does not remember.

use super::Bench;
use super::image::{full_guest, warm_large_pages};
use super::ours::{Side, migrate_with};
use super::table::{Better, Table};
use pageferry_client::{HugePages, IncomingOptions, OutgoingOptions};
use pageferry_tests::guest_mapping::GuestMapping;
use pageferry_tests::random::Random;
use std::fs;
use std::sync::atomic::Ordering;
use std::time::Instant;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// Accesses of a walk, for each page.
const ACCESSES: u64 = 4;

/// What the guests of one kind have shown.
#[derive(Default)]
struct Seen {
    /// Nanoseconds of an access, for each walk and round.
    nanoseconds: [Vec<f64>; 2],
    /// Page faults of the first walk, for each page.
    faults: Vec<f64>,
}

/// 2 GiB, full.
pub fn arrived(bench: &Bench, table: &mut Table) {
    let size = 2 * GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    let mut kinds = [HugePages::Auto, HugePages::Never].map(|choice| (choice, Seen::default()));
    for round in 0..bench.rounds {
        for turn in 0..kinds.len() {
            let count = kinds.len();
            let (huge_pages, seen) = &mut kinds[(turn + round) % count];
            destination.clear();
            warm_large_pages(&bench.folder, size + size / 16);
            let incoming =
                IncomingOptions { huge_pages: *huge_pages, ..IncomingOptions::default() };
            let outgoing = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
            migrate_with(Side::new(&source), Side::new(&destination), &outgoing, &incoming);
            let memory = GuestMapping::new(&destination.file, size as usize).unwrap();
            let before = faults();
            for walk in 0..2 {
                seen.nanoseconds[walk].push(walk_over(&memory, size, round as u64));
                if walk == 0 {
                    seen.faults.push((faults() - before) as f64);
                }
            }
        }
    }
    let walks = ["first walk", "second walk"];
    for (at, walk) in walks.into_iter().enumerate() {
        let work = format!("arrived: {walk} over {} MiB", size >> 20);
        for (huge_pages, seen) in &kinds {
            let remark = match at {
                0 => format!("{:.0} page faults", super::table::median(&seen.faults)),
                _ => String::new(),
            };
            table.add(&work, name(*huge_pages), "ns", &seen.nanoseconds[at], remark);
        }
        table.compare(&work, name(HugePages::Auto), name(HugePages::Never), Better::Less);
    }
}

fn name(huge_pages: HugePages) -> &'static str {
    match huge_pages {
        HugePages::Auto => "--huge-pages auto",
        HugePages::Never => "--huge-pages never",
    }
}

/// Nanoseconds of an access. Where the next one goes depends on what this one has read, as in a
/// guest that follows pointers.
fn walk_over(memory: &GuestMapping, size: u64, seed: u64) -> f64 {
    let mut chance = Random::new(seed + 1);
    let (pages, mut read) = (size / PAGE, 0);
    let accesses = pages * ACCESSES;
    let started = Instant::now();
    for access in 0..accesses {
        let page = (chance.below(pages) ^ (read & 1)) % pages;
        let byte = (page * PAGE + chance.below(PAGE / 8) * 8) as usize;
        if access % 4 == 0 {
            memory.count(byte);
        } else {
            read = memory.word(byte).load(Ordering::Relaxed);
        }
    }
    started.elapsed().as_nanos() as f64 / accesses as f64
}

/// Page faults of this thread so far.
fn faults() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
    // After the name in parentheses: state is field 3, and minflt 10.
    let fields = stat.rsplit_once(')').unwrap().1;
    fields.split_whitespace().nth(7).unwrap().parse().unwrap()
}
