// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tracker for KVM's dirty log, against the real kernel.

use pageferry_client::tracking::kvm::KvmDirtyLog;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::DirtyLog;
use pageferry_tests::files::{mapped, memfd};
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Memory = GuestMemoryMmap<()>;

const LONG: Duration = Duration::from_secs(30);

fn memory(regions: &[(u64, u64)]) -> Memory {
    mapped(regions).unwrap()
}

fn shared_log(memory: &Memory) -> DirtyLog {
    let length = memory.last_addr().0.div_ceil(PAGE_SIZE * 8).next_multiple_of(8);
    DirtyLog::map(memfd(length).unwrap().as_fd(), 0, length).unwrap()
}

/// The dirty pages of KVM, in a log that was empty. The guest's code is left out: KVM may report a
/// page as dirty when it first maps it writable, although the guest only reads it.
fn synced(kvm: &KvmDirtyLog, memory: &Memory) -> BTreeSet<u64> {
    let log = shared_log(memory);
    kvm.sync(&log).unwrap();
    let bits = log.bits();
    let first = memory.iter().next().unwrap().start_addr().0 / PAGE_SIZE + FIRMWARE_PAGES;
    assert_eq!(
        bits.count(PageRange::new(0, first - FIRMWARE_PAGES)),
        0,
        "nothing is marked below the slots"
    );
    bits.runs(PageRange::new(first, bits.pages() - first))
        .flat_map(|run| run.first..run.end())
        .collect()
}

/// A guest that writes to exactly the pages of `ranges` (GPA, pages), in each [`round`].
fn guest(memory: &Memory, ranges: &[(u64, u64)]) -> (KvmGuest, BTreeSet<u64>) {
    let sweep = Sweep { ranges: ranges.to_vec(), spins: 0 };
    let swept = sweep.addresses().map(|gpa| gpa / PAGE_SIZE).collect();
    let mut guest = KvmGuest::new(memory.clone(), sweep).unwrap();
    guest.boot().unwrap();
    (guest, swept)
}

/// Lets the guest write to all its pages.
fn round(guest: &mut KvmGuest) {
    guest.run_for_sweeps(2, LONG).unwrap();
}

#[test]
fn kvm_sync_reports_guest_writes_and_clears_nothing() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 1 << 20)]);
    let (mut guest, swept) =
        guest(&memory, &[(20 * PAGE_SIZE, 3), (90 * PAGE_SIZE, 70), (255 * PAGE_SIZE, 1)]);
    round(&mut guest);
    let kvm = guest.dirty_log().unwrap();
    assert!(kvm.sync(&shared_log(&memory)).is_err(), "the log is not started");
    kvm.start().unwrap();
    assert_eq!(
        synced(&kvm, &memory),
        BTreeSet::new(),
        "what was written before the start is not dirty"
    );
    round(&mut guest);
    assert_eq!(synced(&kvm, &memory), swept);
    assert_eq!(synced(&kvm, &memory), swept, "the sync cleared nothing");
    kvm.stop().unwrap();
    assert!(kvm.sync(&shared_log(&memory)).is_err());
    kvm.start().unwrap();
    assert_eq!(synced(&kvm, &memory), BTreeSet::new(), "after the next start the log is clean");
    round(&mut guest);
    assert_eq!(synced(&kvm, &memory), swept);
}

#[test]
fn a_clear_across_a_discarded_range_loses_no_write() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(0, 1 << 20)]);
    let (mut guest, swept) = guest(&memory, &[(16 * PAGE_SIZE, 240)]);
    let kvm = guest.dirty_log().unwrap();
    kvm.start().unwrap();
    round(&mut guest);

    // Pages 70..130 are discarded. They begin and end inside a word. The chunk is the whole memory,
    // and the clear names only these pages.
    let mut bitmap = [0u64; 4];
    (70..130).for_each(|page| bitmap[page / 64] |= 1 << (page % 64));
    kvm.clear(0, &bitmap).unwrap();
    let expected: BTreeSet<u64> =
        swept.iter().copied().filter(|page| !(70..130).contains(page)).collect();
    assert_eq!(synced(&kvm, &memory), expected);

    // The other way around: all pages except the discarded ones.
    round(&mut guest);
    bitmap.iter_mut().for_each(|word| *word = !*word);
    kvm.clear(0, &bitmap).unwrap();
    assert_eq!(synced(&kvm, &memory), (70..130).collect());

    // Cleared pages are protected, so KVM sees the next write.
    round(&mut guest);
    assert_eq!(synced(&kvm, &memory), swept);
}

#[test]
fn kvm_clears_exactly_what_it_is_asked_to() {
    if !require::kvm() {
        return;
    }
    // Slots whose limits are not multiples of 64 pages, some adjacent and some with a gap. The last
    // one is small.
    let slots = [(5, 137), (142, 70), (300, 200), (1000, 3)];
    let memory = memory(&slots.map(|(first, pages)| (first * PAGE_SIZE, pages * PAGE_SIZE)));
    let mut ranges = slots;
    ranges[0] = (5 + FIRMWARE_PAGES, 137 - FIRMWARE_PAGES);
    let (mut guest, swept) =
        guest(&memory, &ranges.map(|(first, pages)| (first * PAGE_SIZE, pages)));
    let kvm = guest.dirty_log().unwrap();
    kvm.start().unwrap();

    let mut random = Random::new(7);
    let mut next = move || random.next();
    for turn in 0..60 {
        round(&mut guest);
        assert_eq!(
            synced(&kvm, &memory),
            swept,
            "turn {turn}: every page is written in every round"
        );
        let mut expected = swept.clone();
        for _ in 0..4 {
            let first = next() % 1100;
            let bitmap: Vec<u64> = (0..next() % 12)
                .map(|_| [next(), next() & next() & next(), 0, !0][next() as usize % 4])
                .collect();
            kvm.clear(first, &bitmap).unwrap();
            for (index, word) in bitmap.iter().enumerate() {
                (0..64).filter(|bit| word >> bit & 1 == 1).for_each(|bit| {
                    expected.remove(&(first + index as u64 * 64 + bit));
                });
            }
            assert_eq!(synced(&kvm, &memory), expected, "turn {turn}: {first} {bitmap:x?}");
        }
    }
}

#[test]
fn a_clear_outside_of_all_slots_or_of_nothing_does_nothing() {
    if !require::kvm() {
        return;
    }
    let memory = memory(&[(64 * PAGE_SIZE, 1 << 20)]);
    let (mut guest, swept) = guest(&memory, &[(100 * PAGE_SIZE, 100)]);
    let kvm = guest.dirty_log().unwrap();
    kvm.start().unwrap();
    round(&mut guest);
    kvm.clear(0, &[!0]).unwrap();
    kvm.clear(64 + 256, &[!0; 8]).unwrap();
    kvm.clear(u64::MAX, &[!0; 2]).unwrap();
    kvm.clear(64, &[0; 4]).unwrap();
    kvm.clear(64, &[]).unwrap();
    assert_eq!(synced(&kvm, &memory), swept);
    assert_eq!(memory.iter().next().unwrap().len(), 1 << 20);
}
