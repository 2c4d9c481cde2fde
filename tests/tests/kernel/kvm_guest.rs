// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The KVM guest of the harness: it works as the other tests expect, and the trackers see all its
//! writes.

use pageferry_agent::pagemap::Pagemap;
use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::DirtyLog;
use pageferry_tests::files::{mapped, memfd};
use pageferry_tests::guest::kvm::{
    FIRMWARE_PAGES, GuestError, KvmGuest, Sweep, check_consistent, counters,
};
use pageferry_tests::require;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Memory = GuestMemoryMmap<()>;

const LONG: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

fn memory(regions: &[(u64, u64)]) -> Memory {
    mapped(regions).unwrap()
}

fn booted(memory: &Memory, sweep: Sweep) -> KvmGuest {
    let mut guest = KvmGuest::new(memory.clone(), sweep).unwrap();
    guest.boot().unwrap();
    guest
}

fn bytes(memory: &Memory) -> Vec<Vec<u8>> {
    let read = |region: &vm_memory::GuestRegionMmap<()>| {
        let mut bytes = vec![0; region.len() as usize];
        region.file_offset().unwrap().file().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    memory.iter().map(read).collect()
}

#[test]
fn a_paused_guest_writes_no_more_and_is_consistent() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 16 * MIB)]);
    let sweep = Sweep::all(&memory);
    assert_eq!(sweep.pages(), 16 * MIB / PAGE_SIZE - FIRMWARE_PAGES);
    let mut guest = booted(&memory, sweep.clone());
    let mut before = 0;
    for _ in 0..50 {
        // One more sweep may be the rest of the one in which it was paused.
        guest.run_for_sweeps(2, LONG).unwrap();
        let first = counters(&memory, &sweep).unwrap();
        let progress = check_consistent(first.iter().copied()).unwrap();
        assert!(progress.sweeps > before, "{progress:?} after {before}");
        before = progress.sweeps;
        assert_eq!(counters(&memory, &sweep).unwrap(), first, "nothing changes while it is paused");
    }
}

#[test]
fn a_guest_sweeps_all_of_its_regions_also_above_4_gib() {
    if !require::kvm() {
        return;
    }
    let memory =
        memory(&[(5 * PAGE_SIZE, 3 * MIB), (64 * MIB, MIB), ((6 << 30) + 7 * PAGE_SIZE, 2 * MIB)]);
    let sweep = Sweep::all(&memory);
    let mut guest = booted(&memory, sweep.clone());
    guest.run_for_sweeps(3, LONG).unwrap();
    let progress = check_consistent(counters(&memory, &sweep).unwrap()).unwrap();
    assert!(progress.sweeps >= 3);
    assert_eq!(guest.slots().len(), 3);
}

#[test]
fn a_saved_guest_goes_on_where_it_stood_in_another_vm() {
    if !require::kvm() {
        return;
    }
    let layout = [(0, 4 * MIB), (16 * MIB, 4 * MIB)];
    let source = memory(&layout);
    let sweep = Sweep::all(&source).spins(50);
    let mut guest = booted(&source, sweep.clone());
    guest.run_for_sweeps(5, LONG).unwrap();
    let stopped = check_consistent(counters(&source, &sweep).unwrap()).unwrap();

    let saved = guest.save().unwrap();
    let destination = memory(&layout);
    for (region, content) in destination.iter().zip(bytes(&source)) {
        region.file_offset().unwrap().file().write_all_at(&content, 0).unwrap();
    }
    drop(guest);
    let mut guest = KvmGuest::new(destination.clone(), sweep.clone()).unwrap();
    guest.load(&saved).unwrap();
    assert_eq!(guest.save().unwrap(), saved);
    guest.run_for_sweeps(5, LONG).unwrap();
    let progress = check_consistent(counters(&destination, &sweep).unwrap()).unwrap();
    assert!(progress.sweeps >= stopped.sweeps + 4, "{progress:?} after {stopped:?}");
    assert_eq!(
        check_consistent(counters(&source, &sweep).unwrap()).unwrap(),
        stopped,
        "the source is paused"
    );
}

#[test]
fn one_page_of_an_older_moment_is_found() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 2 * MIB)]);
    let sweep = Sweep::all(&memory);
    let mut guest = booted(&memory, sweep.clone());
    guest.run_for_sweeps(3, LONG).unwrap();
    let address = GuestAddress(sweep.addresses().nth(100).unwrap());
    let counter: u32 = memory.load(address, Ordering::SeqCst).unwrap();
    memory.store(counter - 2, address, Ordering::SeqCst).unwrap();
    let error = check_consistent(counters(&memory, &sweep).unwrap()).unwrap_err();
    assert!(matches!(error, GuestError::Torn { page: 100 | 101, .. }), "{error}");
}

#[test]
fn a_guest_that_leaves_its_loop_is_an_error() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 2 * MIB)]);
    let mut guest = booted(&memory, Sweep::all(&memory));
    // `hlt` is a privileged instruction, and nothing handles the fault.
    memory.write_slice(&[0xf4; 64], GuestAddress(0)).unwrap();
    guest.resume().unwrap();
    let error = guest.wait_for_sweeps(1, LONG).unwrap_err();
    assert!(matches!(error, GuestError::Exit(_)), "{error}");
    assert!(!guest.is_running());
}

#[test]
fn what_the_guest_cannot_do_is_refused() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 2 * MIB), (4 * MIB, MIB)]);
    for range in [
        (0, 1),
        (15 * PAGE_SIZE, 2),
        (MIB, 257),
        (3 * MIB, 1),
        (MIB + 1, 1),
        (MIB, 0),
        (MIB, u64::MAX),
    ] {
        let error =
            KvmGuest::new(memory.clone(), Sweep { ranges: vec![range], spins: 0 }).unwrap_err();
        assert!(matches!(error, GuestError::Range { gpa, .. } if gpa == range.0), "{error}");
    }
    let mut guest = booted(&memory, Sweep::all(&memory));
    assert!(matches!(guest.load(&[0; 7]), Err(GuestError::State { length: 7 })));
    guest.resume().unwrap();
    assert!(matches!(guest.save(), Err(GuestError::Running)));
    assert!(matches!(guest.set_spins(1), Err(GuestError::Running)));
}

#[test]
fn spins_slow_the_guest_down_and_can_be_changed_in_a_pause() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 8 * MIB)]);
    // 2,032 pages of at least 4 ms each.
    let mut guest = booted(&memory, Sweep::all(&memory).spins(1 << 24));
    guest.resume().unwrap();
    assert!(matches!(
        guest.wait_for_sweeps(1, Duration::from_millis(100)),
        Err(GuestError::Slow { .. })
    ));
    guest.pause().unwrap();
    guest.set_spins(0).unwrap();
    guest.resume().unwrap();
    guest.wait_for_sweeps(2, LONG).unwrap();
}

/// Waits until the guest has written to the page at `gpa` once more.
fn wait_for_write(memory: &Memory, gpa: u64) {
    let counter = || memory.load::<u32>(GuestAddress(gpa), Ordering::SeqCst).unwrap();
    let (before, started) = (counter(), Instant::now());
    while counter() == before {
        assert!(started.elapsed() < LONG, "the guest does not reach {gpa:#x}");
        std::thread::yield_now();
    }
}

#[test]
fn both_trackers_report_all_changed_pages_and_few_others() {
    if !require::kvm() || !require::uffd() {
        return;
    }
    let memory = memory(&[(3 * PAGE_SIZE, 32 * MIB), (64 * MIB, 16 * MIB)]);
    let sweep = Sweep::all(&memory);
    let addresses: Vec<u64> = sweep.addresses().collect();
    let mut guest = booted(&memory, sweep);
    guest.run_for_sweeps(1, LONG).unwrap();
    guest.set_spins(10_000).unwrap();

    let kvm = guest.dirty_log().unwrap();
    kvm.start().unwrap();
    let mappings: Vec<(u64, u64)> =
        guest.slots().iter().map(|slot| (slot.userspace_addr, slot.length)).collect();
    let write_protect = WriteProtect::register(&mappings).unwrap();
    let pagemap = Pagemap::new(write_protect.pagemap().try_clone_to_owned().unwrap()).unwrap();
    let slots = guest.slots().to_vec();
    let scan = || {
        let mut pages = BTreeSet::new();
        for slot in &slots {
            let page = |address: u64| (slot.gpa + address - slot.userspace_addr) / PAGE_SIZE;
            pagemap
                .scan(slot.userspace_addr, slot.length, |start, end| {
                    pages.extend(page(start)..page(end))
                })
                .unwrap();
        }
        pages
    };
    scan();

    let log_length = (80 * MIB / PAGE_SIZE / 8).next_multiple_of(PAGE_SIZE);
    let mut before = bytes(&memory);
    for turn in 0..6 {
        // From the guest's present page to one a quarter, or three quarters, further: a part of the
        // memory, or nearly all.
        let stood = check_consistent(counters(&memory, guest.sweep()).unwrap()).unwrap().pages;
        let target = (stood + addresses.len() / 4 * (1 + turn % 3)) % addresses.len();
        guest.resume().unwrap();
        wait_for_write(&memory, addresses[target]);
        guest.pause().unwrap();

        let after = bytes(&memory);
        let changed: BTreeSet<u64> = slots
            .iter()
            .zip(before.iter().zip(&after))
            .flat_map(|(slot, (before, after))| {
                let pages = before.chunks(PAGE_SIZE as usize).zip(after.chunks(PAGE_SIZE as usize));
                pages
                    .enumerate()
                    .filter(|(_, (a, b))| a != b)
                    .map(|(page, _)| slot.gpa / PAGE_SIZE + page as u64)
            })
            .collect();

        let log = DirtyLog::map(memfd(log_length).unwrap().as_fd(), 0, log_length).unwrap();
        kvm.sync(&log).unwrap();
        let by_kvm: BTreeSet<u64> = log
            .bits()
            .runs(PageRange::new(0, log.pages()))
            .flat_map(|run| run.first..run.end())
            .collect();
        let words: Vec<u64> = (0..log.pages() / 64).map(|index| log.bits().word(index)).collect();
        kvm.clear(0, &words).unwrap();
        let by_scan = scan();

        assert!(
            changed.len() >= addresses.len() / 4,
            "turn {turn}: {} pages changed",
            changed.len()
        );
        for (tracker, reported) in [("KVM's log", &by_kvm), ("the scan", &by_scan)] {
            let missed: Vec<_> = changed.difference(reported).collect();
            assert!(missed.is_empty(), "turn {turn}: {tracker} missed {missed:x?}");
            let others: Vec<_> = reported.difference(&changed).collect();
            assert!(
                others.len() as u64 <= FIRMWARE_PAGES,
                "turn {turn}: {tracker} also reported {others:x?}"
            );
        }
        before = after;
    }
}
