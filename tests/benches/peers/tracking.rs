// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the trackers cost a guest that writes, while nothing is sent.

use super::Bench;
use super::image::{Image, warm_large_pages};
use super::live::{Count, map, sweeps_of};
use super::table::{Better, Table, median};
use pageferry_agent::pagemap::{Huge, Pagemap};
use pageferry_client::DirtyLog;
use pageferry_client::tracking::kvm::KvmDirtyLog;
use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep};
use pageferry_tests::guest_mapping::GuestMapping;
use pageferry_tests::huge_pages::{HUGE_PAGE, make_all_huge};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;

/// How much a vCPU's sweeps slow down when its writes are tracked and synced, at intervals like
/// those of short and long passes, while nothing is sent.
pub fn tracking(bench: &Bench, table: &mut Table) {
    for period in [100, 1000] {
        let period = Duration::from_millis(period / bench.shrink.min(10));
        tracking_alone(bench, table, period);
        for stride in [1, 97] {
            huge_entries(bench, table, period, stride);
        }
    }
}

fn tracking_alone(bench: &Bench, table: &mut Table, period: Duration) {
    let work = &format!(
        "tracking alone: a vCPU that sweeps 256 MiB, asked every {} ms",
        period.as_millis()
    );
    let size = GIB / 4 / bench.shrink.min(16);
    let image = Image::new(&bench.folder, "tracked", size);
    image.fill(0, size);
    image.zero_counters();
    let pages = PageRange::new(FIRMWARE_PAGES, size / PAGE_SIZE - FIRMWARE_PAGES);
    let memory = map(&image);
    let sweep = Sweep { ranges: vec![(pages.first * PAGE_SIZE, pages.count)], spins: 0 };
    let guest = KvmGuest::new(memory.guest().clone(), sweep);
    let mut guest = match guest.and_then(|mut guest| guest.boot().map(|()| guest)) {
        Ok(guest) => guest,
        Err(error) => {
            table.note(format!("{work}: skipped: {error}"));
            return;
        }
    };
    let count: Count = {
        let image = Image::again(&image);
        Box::new(move || sweeps_of(&image, pages))
    };
    let fd: OwnedFd = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size / PAGE_SIZE / 8).unwrap();
    let log = DirtyLog::map_sparse(fd, 0, size / PAGE_SIZE / 8).unwrap();
    let address = memory.blocks()[0].address();
    let mut rates: [(&str, Vec<f64>); 4] = [
        ("untracked", Vec::new()),
        ("shared log", Vec::new()),
        ("KVM's log", Vec::new()),
        ("write protection", Vec::new()),
    ];
    for _ in 0..bench.rounds {
        for (who, rates) in &mut rates {
            guest.pause().unwrap();
            let mut kvm = (*who == "KVM's log").then(|| guest.dirty_log().unwrap());
            let registered = (*who == "write protection")
                .then(|| WriteProtect::register(&[(address, size)]).unwrap());
            let pagemap = registered.as_ref().map(|registered| {
                Pagemap::new(registered.pagemap().try_clone_to_owned().unwrap()).unwrap()
            });
            if let Some(kvm) = &mut kvm {
                KvmDirtyLog::start(kvm).unwrap();
            }
            guest.resume().unwrap();
            let (writes, started) = (count(), Instant::now());
            while started.elapsed() < 2 * period.max(Duration::from_millis(500)) {
                std::thread::sleep(period);
                if let Some(kvm) = &mut kvm {
                    KvmDirtyLog::sync(kvm, &log).unwrap();
                    let words: Vec<u64> =
                        (0..size / PAGE_SIZE / 64).map(|word| log.bits().take_word(word)).collect();
                    KvmDirtyLog::clear(kvm, 0, &words).unwrap();
                }
                if let Some(pagemap) = &pagemap {
                    pagemap.scan(address, size, |_, _| ()).unwrap();
                }
                log.bits().clear(log.bits().all());
            }
            rates.push((count() - writes) as f64 / started.elapsed().as_secs_f64() / 1e6);
            guest.pause().unwrap();
            if let Some(kvm) = &mut kvm {
                KvmDirtyLog::stop(kvm).unwrap();
            }
            guest.resume().unwrap();
        }
    }
    guest.pause().unwrap();
    for (who, rates) in &rates {
        table.add(work, who, "M pages/s", rates, String::new());
        if *who != "untracked" {
            table.compare(work, who, "untracked", Better::More);
        }
    }
    table.compare(work, "write protection", "KVM's log", Better::More);
}

/// How a mapping by entries for 2 MiB is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scan {
    Never,
    /// One write reports 512 pages.
    AsItIs,
    /// As the agent does.
    Split,
}

impl Scan {
    fn name(self) -> &'static str {
        match self {
            Self::Never => "untracked",
            Self::AsItIs => "entries stay",
            Self::Split => "entries are split",
        }
    }
}

/// A thread that writes to every page of 256 MiB in huge pages, or to one of `stride`, as fast as
/// it can: how much slower it becomes, and how many pages are reported for each that was written.
fn huge_entries(bench: &Bench, table: &mut Table, period: Duration, stride: u64) {
    let size = GIB / 4 / bench.shrink.min(16);
    let work = &format!(
        "tracking huge pages: a thread that writes to 1 of {stride} pages of {} MiB, asked every \
         {} ms",
        size >> 20,
        period.as_millis()
    );
    let mut scans = [Scan::Never, Scan::AsItIs, Scan::Split]
        .map(|scan| (scan, Vec::<f64>::new(), Vec::<f64>::new()));
    for _ in 0..bench.rounds {
        for (scan, rates, reports) in &mut scans {
            warm_large_pages(&bench.folder, size);
            let image = Image::new(&bench.folder, "huge-tracked", size);
            if !make_all_huge(&image.file).unwrap() {
                return table.note(format!("{work}: skipped: no huge pages"));
            }
            let memory = GuestMapping::new(&image.file, size as usize).unwrap();
            (0..size).step_by(HUGE_PAGE as usize).for_each(|byte| memory.count(byte as usize));
            let registered = WriteProtect::register(&[(memory.address(), size)]).unwrap();
            let pagemap = Pagemap::new(registered.pagemap().try_clone_to_owned().unwrap()).unwrap();
            let (written, ends) = (AtomicU64::new(0), AtomicBool::new(false));
            let started = Instant::now();
            let mut reported = 0;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !ends.load(Ordering::Relaxed) {
                        for byte in (0..size).step_by((PAGE_SIZE * stride) as usize) {
                            memory.count(byte as usize);
                        }
                        written.fetch_add(size / PAGE_SIZE / stride, Ordering::Relaxed);
                    }
                });
                while started.elapsed() < 3 * period.max(Duration::from_millis(300)) {
                    if *scan == Scan::Split {
                        let mut entries = Vec::new();
                        let found = |from, to| entries.push((from, to));
                        pagemap.huge(Huge::Written, memory.address(), size, found).unwrap();
                        for (from, to) in entries {
                            let entries = (from..to).step_by(HUGE_PAGE as usize);
                            entries.for_each(|entry| pagemap.split(entry).unwrap());
                        }
                    }
                    if *scan != Scan::Never {
                        let found = |from, to| reported += (to - from) / PAGE_SIZE;
                        pagemap.scan(memory.address(), size, found).unwrap();
                    }
                    std::thread::sleep(period);
                }
                ends.store(true, Ordering::Relaxed);
            });
            let elapsed = started.elapsed().as_secs_f64();
            rates.push(written.load(Ordering::Relaxed) as f64 / elapsed / 1e6);
            reports.push(reported as f64 / elapsed);
        }
    }
    for (scan, rates, reports) in &scans {
        let remark = match scan {
            Scan::Never => String::new(),
            _ => format!("{:.0} pages/s reported", median(reports)),
        };
        table.add(work, scan.name(), "M pages/s", rates, remark);
    }
    table.compare(work, "entries are split", "untracked", Better::More);
    table.compare(work, "entries stay", "untracked", Better::More);
}
