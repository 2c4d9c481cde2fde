// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An idle guest: full, sparse, and huge but nearly empty.

use super::Bench;
use super::floor;
use super::image::{Image, WarmPool, full_guest, warm_large_pages};
use super::ours::{Moved, Side, migrate};
use super::qemu::Mode;
use super::table::{Better, Table, median};
use pageferry_client::OutgoingOptions;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const QEMU_MODES: [(&str, Mode); 3] = [
    ("QEMU, one stream", Mode::multifd(0)),
    ("QEMU, multifd 2", Mode::multifd(2)),
    ("QEMU, multifd 4", Mode::multifd(4)),
];

fn options(streams: u16) -> OutgoingOptions {
    OutgoingOptions { streams, ..OutgoingOptions::default() }
}

/// Someone who moves a full guest, and how fast.
struct Mover {
    name: String,
    rates: Vec<f64>,
    moved: Vec<Moved>,
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    Pageferry(u16),
    Floor(u16),
    Qemu(Mode),
}

fn movers(bench: &Bench) -> Vec<Mover> {
    let takes_part = |who: &str| bench.who.iter().any(|part| part == who);
    let mover = |name: String, how| Mover { name, rates: Vec::new(), moved: Vec::new(), how };
    let mut movers = Vec::new();
    for (index, streams) in bench.streams.iter().copied().enumerate() {
        if takes_part("pageferry") {
            movers.push(mover(format!("pageferry, {streams}"), How::Pageferry(streams)));
        }
        if takes_part("floor") {
            movers.push(mover(format!("floor, {streams}"), How::Floor(streams)));
        }
        if let Some((name, mode)) =
            QEMU_MODES.get(index).filter(|_| takes_part("qemu") && bench.qemu.is_some())
        {
            movers.push(mover((*name).into(), How::Qemu(*mode)));
        }
    }
    movers
}

/// 2 GiB of random pages over TCP loopback.
pub fn full(bench: &Bench, table: &mut Table) {
    const WORK: &str = "full";
    let size = 2 * GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    floor::copy(&source, &destination, 1);
    let mut movers = movers(bench);
    for _ in 0..bench.rounds {
        for mover in &mut movers {
            destination.clear();
            warm_large_pages(&bench.folder, size + size / 16);
            let time = match mover.how {
                How::Pageferry(streams) => {
                    let done =
                        migrate(Side::new(&source), Side::new(&destination), &options(streams));
                    assert_eq!(done.status.counters.pages_sent, size / 4096);
                    mover.moved.push(done.clone());
                    done.time
                }
                How::Floor(sockets) => floor::copy(&source, &destination, u64::from(sockets)),
                How::Qemu(mode) => {
                    let Some(qemu) = &bench.qemu else { continue };
                    qemu.migrate(&source, &destination, mode).time
                }
            };
            mover.rates.push(size as f64 / time.as_secs_f64() / 1e9);
        }
    }
    for mover in &movers {
        let remark = match mover.moved.as_slice() {
            [] => String::new(),
            moved => format!("{}; {}", peaks(moved), processor_time(moved, size)),
        };
        table.add(WORK, &mover.name, "GB/s", &mover.rates, remark);
    }
    let qemus = movers.iter().filter(|mover| matches!(mover.how, How::Qemu(_)));
    let best = qemus.max_by(|one, other| median(&one.rates).total_cmp(&median(&other.rates)));
    for mover in &movers {
        let How::Pageferry(streams) = mover.how else { continue };
        table.compare(WORK, &mover.name, &format!("floor, {streams}"), Better::More);
        if let Some(best) = best {
            table.compare(WORK, &mover.name, &best.name, Better::More);
        }
    }
}

/// Processor time of both ends for each GiB.
fn processor_time(moved: &[Moved], size: u64) -> String {
    let seconds: Vec<f64> = moved.iter().map(|one| one.processor).collect();
    format!("{:.2} s of processor time per GiB", median(&seconds) * GIB as f64 / size as f64)
}

fn peaks(moved: &[Moved]) -> String {
    let most =
        |of: fn(&Moved) -> u64| moved.iter().map(of).max().unwrap_or_default() as f64 / MIB as f64;
    format!(
        "agents' peaks {:.1} and {:.1} MiB",
        most(|one| one.source_peak),
        most(|one| one.destination_peak)
    )
}

/// What is allocated in a sparse guest.
struct Sparse {
    work: &'static str,
    /// Ranges with content.
    content: Vec<(u64, u64)>,
    /// Ranges that are told as discarded.
    discarded: Vec<(u64, u64)>,
}

/// 8 GiB of which little or nothing is in use.
pub fn sparse(bench: &Bench, table: &mut Table) {
    let size = 8 * GIB / bench.shrink;
    // 1 GiB in 64 pieces.
    let pieces = || (0..64).map(|piece| (piece * size / 64, size / 512));
    let rests = || (0..64).map(|piece| (piece * size / 64 + size / 512, size / 64 - size / 512));
    let source = Image::new(&bench.folder, "source", size);
    let destination = Image::new(&bench.folder, "destination", size);
    let _warm = WarmPool::new(&bench.folder, size * 2);
    let cases = [
        Sparse { work: "sparse: nothing of 8 GiB allocated", content: vec![], discarded: vec![] },
        Sparse {
            work: "sparse: 1 of 8 GiB allocated",
            content: pieces().collect(),
            discarded: vec![],
        },
        Sparse {
            work: "sparse: 8 GiB allocated, 7 of them discarded",
            content: vec![(0, size)],
            discarded: rests().collect(),
        },
    ];
    for case in cases {
        sparse_case(bench, table, &case, &source, &destination);
    }
}

fn sparse_case(
    bench: &Bench, table: &mut Table, case: &Sparse, source: &Image, destination: &Image,
) {
    let restore = || {
        source.clear();
        case.content.iter().for_each(|(start, length)| source.fill(*start, *length));
        destination.clear();
    };
    restore();
    let (mut ours, mut qemus) = (Vec::new(), Vec::new());
    let mut remarks = [String::new(), String::new()];
    let allocated = |before: u64| {
        let mib = |image: &Image| image.allocated() / MIB;
        format!(
            "allocated at the source {} MiB before, {} after; at the destination {}",
            before / MIB,
            mib(source),
            mib(destination)
        )
    };
    for round in 0..bench.rounds {
        destination.clear();
        let before = source.allocated();
        let (from, to) = (Side::new(source), Side::new(destination));
        from.discard(&case.discarded);
        ours.push(migrate(from, to, &options(2)).time.as_secs_f64() * 1e3);
        remarks[0] = allocated(before);
        assert_eq!(source.allocated(), before, "the source grew");
        // QEMU needs up to half a minute for one, and does not vary that much.
        if let Some(qemu) = bench.qemu.as_ref().filter(|_| round < 2) {
            destination.clear();
            qemus
                .push(qemu.migrate(source, destination, Mode::multifd(2)).time.as_secs_f64() * 1e3);
            remarks[1] = allocated(before);
            restore();
        }
    }
    table.add(case.work, "pageferry, 2", "ms", &ours, std::mem::take(&mut remarks[0]));
    if !qemus.is_empty() {
        table.add(case.work, "QEMU, multifd 2", "ms", &qemus, std::mem::take(&mut remarks[1]));
        table.compare(case.work, "pageferry, 2", "QEMU, multifd 2", Better::Less);
    }
}

/// A guest of the huge part.
struct Huge {
    who: &'static str,
    pieces: u64,
    /// All that has no content is told as discarded.
    discarded: bool,
    source: Image,
    destination: Image,
    times: Vec<f64>,
    syncs: Vec<f64>,
    moved: Vec<Moved>,
}

/// 1 TiB of which 1 GiB is allocated, beside a guest of 1 GiB.
pub fn huge(bench: &Bench, table: &mut Table) {
    const WORK: &str = "huge";
    let content = GIB / bench.shrink;
    let kinds = [
        ("a full guest of 1 GiB", content, 1, false),
        ("1 TiB, 1 GiB of it allocated", content * 1024, 64, false),
        ("1 TiB, 1 GiB of it allocated, the rest discarded", content * 1024, 64, true),
    ];
    let mut guests = kinds.map(|(who, size, pieces, discarded)| {
        let source = Image::new(&bench.folder, &format!("source-{size}-{discarded}"), size);
        let destination =
            Image::new(&bench.folder, &format!("destination-{size}-{discarded}"), size);
        (0..pieces).for_each(|piece| source.fill(size / pieces * piece, content / pieces));
        Huge {
            who,
            pieces,
            discarded,
            source,
            destination,
            times: vec![],
            syncs: vec![],
            moved: vec![],
        }
    });
    let _warm = WarmPool::new(&bench.folder, content * 4);
    for _ in 0..bench.rounds {
        for guest in &mut guests {
            guest.destination.clear();
            let before = guest.source.allocated();
            let (from, to) = (Side::new(&guest.source), Side::new(&guest.destination));
            if guest.discarded {
                let (stride, full) = (guest.source.size / guest.pieces, content / guest.pieces);
                let rests = (0..guest.pieces).map(|piece| (piece * stride + full, stride - full));
                from.discard(&rests.collect::<Vec<_>>());
            }
            let done = migrate(from, to, &options(2));
            assert_eq!(guest.source.allocated(), before, "the source grew");
            guest.times.push(done.time.as_secs_f64() * 1e3);
            guest.syncs.push(done.status.counters.sync_us as f64 / 1e3);
            guest.moved.push(done);
        }
    }
    for guest in &guests {
        table.add(WORK, guest.who, "ms", &guest.times, peaks(&guest.moved));
    }
    for guest in &guests[1..] {
        table.compare(WORK, guest.who, guests[0].who, Better::Less);
    }
    for guest in &guests {
        table.add(
            "huge: the last sync, with its fix-up",
            guest.who,
            "ms",
            &guest.syncs,
            String::new(),
        );
    }
}
