// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The speed of a snapshot of a paused or idle guest.
//!
//! All programs write the same bytes to a new file on the same file system, and sync it within the
//! measured time. The order changes from round to round, because a disk with a cache, or a limit
//! with a burst, favours the first one.

use super::super::Bench;
use super::super::image::{Image, WarmPool};
use super::super::table::{Better, Table, median};
use super::{GIB, Shelf, Vmm, agents, bar, floor, qemu, ratios};
use pageferry_client::{SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use std::path::Path;
use std::time::Duration;

/// A program that saves, and its rates.
struct Saver {
    name: String,
    how: How,
    /// GB/s of each round.
    rates: Vec<f64>,
    /// Milliseconds until everything was written, if that is known.
    written: Vec<f64>,
    safe: Vec<f64>,
    /// Milliseconds of processor time for each GiB.
    processor: Vec<f64>,
}

#[derive(Clone, Copy)]
enum How {
    /// The agent of this index.
    Pageferry {
        agent: usize,
        mode: SnapshotMode,
        workers: u16,
        cached: bool,
    },
    Floor {
        threads: usize,
        direct: bool,
    },
    Qemu(qemu::Mode),
}

impl How {
    fn who(self) -> &'static str {
        match self {
            Self::Pageferry { .. } => "pageferry",
            Self::Floor { .. } => "floor",
            Self::Qemu(_) => "qemu",
        }
    }

    fn is_buffered_floor(self) -> bool {
        matches!(self, Self::Floor { direct: false, .. })
    }
}

const MODES: [(&str, SnapshotMode); 2] =
    [("paused", SnapshotMode::Paused), ("background", SnapshotMode::Background)];

fn savers(bench: &Bench, with_direct: bool, with_qemu: bool) -> Vec<Saver> {
    let mut all = Vec::new();
    for (agent, (who, _)) in agents(bench).into_iter().enumerate() {
        let ours = |mode, workers, cached| How::Pageferry { agent, mode, workers, cached };
        all.extend(MODES.map(|(name, mode)| (format!("{who}, {name}"), ours(mode, 2, false))));
        if with_direct {
            let mode = SnapshotMode::Paused;
            all.push((format!("{who}, paused, 4 workers"), ours(mode, 4, false)));
            all.push((format!("{who}, paused, cached"), ours(mode, 2, true)));
        }
    }
    for direct in [false, true].into_iter().filter(|direct| with_direct || !direct) {
        let more = if direct { ", O_DIRECT" } else { "" };
        all.push((format!("floor, 1 thread{more}"), How::Floor { threads: 1, direct }));
        all.push((format!("floor, 2 threads{more}"), How::Floor { threads: 2, direct }));
    }
    if with_direct {
        all.push((
            "floor, 4 threads, O_DIRECT".to_owned(),
            How::Floor { threads: 4, direct: true },
        ));
    }
    if with_qemu {
        let modes = qemu::MODES.into_iter().filter(|(_, mode)| with_direct || !mode.direct);
        all.extend(modes.map(|(name, mode)| (name.to_owned(), How::Qemu(mode))));
    }
    let takes_part = |how: &How| bench.who.iter().any(|who| who == how.who());
    let saver = |(name, how)| Saver {
        name,
        how,
        rates: vec![],
        written: vec![],
        safe: vec![],
        processor: vec![],
    };
    all.into_iter().filter(|(_, how)| takes_part(how)).map(saver).collect()
}

/// A VMM for each agent.
fn vmms(bench: &Bench, source: &Image) -> Vec<Vmm> {
    agents(bench).iter().map(|(_, program)| Vmm::new(source, program)).collect()
}

/// 2 GiB to a disk.
pub fn to_disk(bench: &Bench, table: &mut Table) {
    full(bench, table, &bench.disk, "a disk");
}

/// 2 GiB to tmpfs: the cost without the disk.
pub fn to_tmpfs(bench: &Bench, table: &mut Table) {
    full(bench, table, &bench.folder, "tmpfs");
}

/// QEMU supports this since version 9.0.
fn with_qemu(bench: &Bench, table: &mut Table) -> bool {
    let can = bench.qemu.is_some() && qemu::can(&bench.folder);
    if !can {
        table.note("snapshots: skipped: no QEMU with mapped-ram (9.0 or newer)".to_owned());
    }
    can
}

fn full(bench: &Bench, table: &mut Table, place: &Path, place_name: &str) {
    let Some(shelf) = Shelf::new(bench, place, table) else { return };
    let source = Image::new(&bench.folder, "source", 2 * GIB / bench.shrink);
    source.fill(0, source.size);
    // Memory for the page cache.
    let _warm = WarmPool::new(&bench.folder, source.size);
    let mut vmms = vmms(bench, &source);
    let on_disk = place == bench.disk;
    let mut savers = savers(bench, on_disk, with_qemu(bench, table));
    for round in 0..bench.rounds {
        let count = savers.len();
        for turn in 0..count {
            savers[(turn + round) % count].save(&source, &mut vmms, &shelf, source.size);
        }
    }
    let size = source.size >> 20;
    let work = format!("save: {size} MiB to {place_name}");
    add_rows(table, &work, &savers);
    if on_disk {
        add_bars(table, &savers);
    }
}

/// 8 GiB of which 1 GiB is allocated, in 64 pieces.
pub fn sparse(bench: &Bench, table: &mut Table) {
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    let size = 8 * GIB / bench.shrink;
    let source = Image::new(&bench.folder, "source", size);
    let _warm = WarmPool::new(&bench.folder, size / 8);
    let restore = || {
        source.clear();
        (0..64).for_each(|piece| source.fill(piece * size / 64, size / 512));
    };
    restore();
    let mut vmms = vmms(bench, &source);
    let mut savers = savers(bench, false, with_qemu(bench, table));
    for round in 0..bench.rounds {
        let count = savers.len();
        for turn in 0..count {
            let saver = &mut savers[(turn + round) % count];
            saver.save(&source, &mut vmms, &shelf, size / 8);
            // QEMU has read, and so allocated, all memory.
            if source.allocated() != size / 8 {
                assert!(matches!(saver.how, How::Qemu(_)), "the guest grew");
                restore();
                vmms.iter().for_each(Vmm::touch);
            }
        }
    }
    add_rows(table, "save: 1 of 8 GiB allocated, to a disk", &savers);
}

impl Saver {
    fn save(&mut self, source: &Image, vmms: &mut [Vmm], shelf: &Shelf, content: u64) {
        let path = shelf.path();
        let (time, processor) = match self.how {
            How::Pageferry { agent, mode, workers, cached } => {
                let options =
                    SnapshotOptions { mode, workers, cached, ..SnapshotOptions::default() };
                let saved = vmms[agent].save(&path, &options);
                assert_eq!(saved.status.counters.pages_saved, content / PAGE_SIZE);
                (saved.time, saved.processor)
            }
            How::Floor { threads, direct } => {
                self.took(floor::copy(source, &path, threads, direct))
            }
            How::Qemu(mode) => self.took(qemu::save(source, &path, mode)),
        };
        self.processor.push(processor.as_secs_f64() * 1e3 * GIB as f64 / content as f64);
        self.rates.push(content as f64 / time.as_secs_f64() / 1e9);
        shelf.clear();
    }

    fn took(&mut self, took: floor::Took) -> (Duration, Duration) {
        self.written.push(took.written.as_secs_f64() * 1e3);
        self.safe.push(took.safe.as_secs_f64() * 1e3);
        (took.total(), took.processor)
    }

    fn remark(&self) -> String {
        let processor = format!("{:.0} ms of processor time for each GiB", median(&self.processor));
        if self.written.is_empty() {
            return processor;
        }
        format!(
            "{processor}; {:.0} ms to write, {:.0} ms more to be safe",
            median(&self.written),
            median(&self.safe)
        )
    }
}

fn best(savers: &[Saver], which: impl Fn(How) -> bool) -> Option<&Saver> {
    let savers = savers.iter().filter(|saver| which(saver.how));
    savers.max_by(|one, other| median(&one.rates).total_cmp(&median(&other.rates)))
}

fn add_rows(table: &mut Table, work: &str, savers: &[Saver]) {
    for saver in savers {
        table.add(work, &saver.name, "GB/s", &saver.rates, saver.remark());
    }
    let others =
        [best(savers, How::is_buffered_floor), best(savers, |how| matches!(how, How::Qemu(_)))];
    for saver in savers.iter().filter(|saver| matches!(saver.how, How::Pageferry { .. })) {
        for other in others.into_iter().flatten() {
            table.compare_rounds(work, &saver.name, &other.name, Better::More);
        }
    }
}

fn add_bars(table: &mut Table, savers: &[Saver]) {
    let ours = savers.iter().filter(|saver| {
        matches!(saver.how, How::Pageferry { agent: 0, workers: 2, cached: false, .. })
    });
    for saver in ours {
        if let Some(floor) = best(savers, How::is_buffered_floor) {
            let name = format!("save: {} against {}", saver.name, floor.name);
            bar(table, &name, "times", &ratios(&saver.rates, &floor.rates), 0.85, Better::More);
        }
        if let Some(qemu) = best(savers, |how| matches!(how, How::Qemu(_))) {
            let name = format!("save: {} against {}", saver.name, qemu.name);
            bar(table, &name, "times", &ratios(&saver.rates, &qemu.rates), 2.0, Better::More);
        }
    }
}
