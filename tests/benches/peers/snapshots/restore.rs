// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The speed of restores: eager, with all memory first, and lazy, with the guest first.
//!
//! An eager restore is measured from the request until the guest runs, with the image in the page
//! cache and without. It is compared with a program that only copies, and with QEMU's load of its
//! own file. For a lazy restore two times count: until the guest runs, and until all its memory is
//! there. Its guest touches scattered pages as soon as it runs, the same in each round. The first
//! restore records them, and the second reads them ahead.

use super::super::Bench;
use super::super::image::{Image, WarmPool, warm_large_pages};
use super::super::table::{Better, Table, median};
use super::{GIB, LIMIT, MIB, Shelf, Vmm, bar, qemu, ratios};
use pageferry_client::{
    JobStatus, Phase, RestoreMode, RestoreOptions, SnapshotMode, SnapshotOptions,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::program;
use pageferry_tests::random::Random;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Pages that the guest of a lazy restore touches.
const TOUCHED: u64 = 4000;

/// Whether the image is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    Warm,
    Cold,
}

impl Cache {
    fn prepare(self, path: &Path) {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        match self {
            Self::Cold => fadvise(&file, 0, None, Advice::DontNeed).unwrap(),
            Self::Warm => {
                let mut buffer = vec![0; MIB as usize];
                let mut at = 0;
                while let Ok(count @ 1..) = file.read_at(&mut buffer, at) {
                    at += count as u64;
                }
            }
        }
    }
}

/// Saves `source`. Returns the path of the image.
pub(super) fn save(source: &Image, shelf: &Shelf) -> PathBuf {
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    Vmm::new(source, program()).save(&shelf.path(), &options);
    shelf.path()
}

fn restore(
    vmm: &Vmm, path: &Path, options: &RestoreOptions, meanwhile: impl FnOnce(),
) -> JobStatus {
    let job = vmm.client.start_restore(path, options).unwrap().job;
    let runs = || {
        let status = vmm.client.status().unwrap();
        (status.counters.time_to_run_us > 0 || status.phase.is_final()).then_some(())
    };
    wait_for("the guest to run", LIMIT, runs).unwrap();
    meanwhile();
    let status = vmm.client.wait(job, LIMIT).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    status
}

/// The simplest program: it reads the file and writes it to the memory. Returns GB/s.
fn floor(path: &Path, target: &Image, threads: usize) -> f64 {
    let file = File::open(path).unwrap();
    let started = Instant::now();
    let share = target.size / threads as u64;
    std::thread::scope(|scope| {
        for thread in 0..threads as u64 {
            let file = &file;
            scope.spawn(move || {
                let mut buffer = vec![0; MIB as usize];
                for at in (thread * share..(thread + 1) * share).step_by(MIB as usize) {
                    // The pages begin after 2 MiB of the file.
                    file.read_exact_at(&mut buffer, at + 2 * MIB).unwrap();
                    target.file.write_all_at(&buffer, at).unwrap();
                }
            });
        }
    });
    target.size as f64 / started.elapsed().as_secs_f64() / 1e9
}

/// 2 GiB, eager.
pub fn eager(bench: &Bench, table: &mut Table) {
    let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
    let Some(theirs) = Shelf::new(bench, &bench.disk, table) else { return };
    let source = Image::new(&bench.folder, "source", 2 * GIB / bench.shrink);
    source.fill(0, source.size);
    let path = save(&source, &shelf);
    let with_qemu = bench.qemu.is_some() && qemu::can(&bench.folder);
    if with_qemu {
        qemu::save(&source, &theirs.path(), qemu::MODES[1].1);
    }
    let target = Image::new(&bench.folder, "target", source.size);
    let _warm = WarmPool::new(&bench.folder, source.size);
    let vmm = Vmm::new(&target, program());
    for cache in [Cache::Warm, Cache::Cold] {
        let mut loaders = loaders(with_qemu);
        // The order changes from round to round, as in `save`.
        for round in 0..bench.rounds {
            let count = loaders.len();
            for turn in 0..count {
                let loader = &mut loaders[(turn + round) % count];
                let file =
                    if matches!(loader.how, How::Qemu(_)) { theirs.path() } else { path.clone() };
                target.clear();
                cache.prepare(&file);
                warm_large_pages(&bench.folder, target.size + target.size / 16);
                let rate = loader.how.load(&vmm, &file, &target);
                loader.rates.push(rate);
            }
        }
        let from = if cache == Cache::Warm { "from the page cache" } else { "from the disk" };
        let work = format!("restore: {} MiB, eager, {from}", target.size >> 20);
        let [ours, others @ ..] = &loaders[..] else { return };
        table.add(&work, &ours.name, "GB/s", &ours.rates, String::new());
        for other in others {
            table.add(&work, &other.name, "GB/s", &other.rates, String::new());
            table.compare_rounds(&work, &ours.name, &other.name, Better::More);
        }
        let qemu = others.iter().filter(|other| matches!(other.how, How::Qemu(_)));
        if let Some(best) =
            qemu.max_by(|one, other| median(&one.rates).total_cmp(&median(&other.rates)))
        {
            let name = format!("{work}: against {}", best.name);
            bar(table, &name, "times", &ratios(&ours.rates, &best.rates), 2.0, Better::More);
        }
    }
}

/// A program that loads, and its rates.
struct Loader {
    name: String,
    how: How,
    /// GB/s of each round.
    rates: Vec<f64>,
}

#[derive(Debug, Clone, Copy)]
enum How {
    Pageferry,
    Floor { threads: usize },
    Qemu(qemu::Mode),
}

/// All programs, pageferry first.
fn loaders(with_qemu: bool) -> Vec<Loader> {
    let mut all = vec![("pageferry".to_owned(), How::Pageferry)];
    all.extend([1, 2].map(|threads| (format!("floor, {threads} threads"), How::Floor { threads })));
    if with_qemu {
        let with_channels = qemu::MODES.into_iter().filter(|(_, mode)| mode.channels > 0);
        all.extend(with_channels.map(|(name, mode)| (name.to_owned(), How::Qemu(mode))));
    }
    all.into_iter().map(|(name, how)| Loader { name, how, rates: Vec::new() }).collect()
}

impl How {
    /// Loads `file` into `target`, which is empty. Returns GB/s.
    fn load(self, vmm: &Vmm, file: &Path, target: &Image) -> f64 {
        let seconds = match self {
            Self::Pageferry => {
                restore(vmm, file, &RestoreOptions::default(), || ()).counters.time_to_run_us as f64
                    / 1e6
            }
            Self::Floor { threads } => return floor(file, target, threads),
            Self::Qemu(mode) => qemu::load(target, file, mode).as_secs_f64(),
        };
        target.size as f64 / seconds / 1e9
    }
}

/// Lazy: 2 GiB, and 64 GiB of which 1 GiB is allocated.
pub fn lazy(bench: &Bench, table: &mut Table) {
    for (name, size, content) in
        [("2 GiB", 2 * GIB, 2 * GIB), ("64 GiB, 1 GiB allocated", 64 * GIB, GIB)]
    {
        let Some(shelf) = Shelf::new(bench, &bench.disk, table) else { return };
        let (size, content) = (size / bench.shrink, content / bench.shrink);
        let source = Image::new(&bench.folder, "source", size);
        // In pieces, as in real guests.
        (0..64).for_each(|piece| source.fill(piece * (size / 64), content / 64));
        let path = save(&source, &shelf);
        drop(source);
        let target = Image::new(&bench.folder, "target", size);
        let _warm = WarmPool::new(&bench.folder, content);
        let vmm = Vmm::new(&target, program());
        let touch = || {
            let (block, mut chance) = (&vmm.memory.blocks()[0], Random::new(7));
            for _ in 0..TOUCHED {
                let (piece, page) = (chance.below(64), chance.below(content / 64 / PAGE_SIZE));
                block.load(piece * (size / 64) + page * PAGE_SIZE).unwrap();
            }
        };
        let mut runs = [Vec::new(), Vec::new()];
        let mut loaded = [Vec::new(), Vec::new()];
        let mut faults = [Vec::new(), Vec::new()];
        for round in 0..bench.rounds {
            let working_set = shelf.path().with_extension(format!("touched-{round}"));
            for pass in 0..2 {
                target.clear();
                Cache::Cold.prepare(&path);
                let working_set = working_set.to_str().unwrap().to_owned();
                let options = RestoreOptions {
                    mode: RestoreMode::Lazy,
                    working_set,
                    ..RestoreOptions::default()
                };
                let counters = restore(&vmm, &path, &options, touch).counters;
                runs[pass].push(counters.time_to_run_us as f64 / 1e3);
                loaded[pass].push(counters.total_us as f64 / 1e3);
                faults[pass].push(counters.faults as f64);
            }
        }
        let work = format!("restore: {name}, lazy, from the disk");
        for (pass, who) in
            ["pageferry, the first time", "pageferry, with the working set"].into_iter().enumerate()
        {
            let remark = format!(
                "all of it there after {:.0} ms; {:.0} faults of {TOUCHED} touches",
                median(&loaded[pass]),
                median(&faults[pass])
            );
            table.add(&work, who, "ms", &runs[pass], remark);
            bar(
                table,
                &format!("{work}: {who}, until it runs"),
                "ms",
                &runs[pass],
                20.0,
                Better::Less,
            );
        }
        let fewer =
            ratios(&faults[0], &faults[1].iter().map(|faults| faults.max(1.0)).collect::<Vec<_>>());
        bar(
            table,
            &format!("{work}: faults, without the working set and with it"),
            "times",
            &fewer,
            3.0,
            Better::More,
        );
    }
}
