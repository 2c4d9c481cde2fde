// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::userfault::feature;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nobody reads that a range is being removed: whoever removes it waits for that, and nobody
/// else does.
#[test]
fn mappings_that_stay_in_a_change_are_not_waited_for_for_ever() {
    const EVENT_REMOVE: u64 = 1 << 3;
    const LENGTH: u64 = 16 << 12;
    let features = EVENT_REMOVE | feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED;
    let uffd = match Userfaultfd::open(features) {
        Ok(uffd) => uffd,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, LENGTH).unwrap();
    let memory = crate::shm::mapping::MappedWords::shared(fd.as_fd(), 0, LENGTH).unwrap();
    let (start, pointer) = (memory.address_range().start as u64, memory.address_range().start);
    let all = AddressRange { start, length: LENGTH };
    uffd.register(all, RegisterMode::WriteProtect).unwrap();
    std::thread::scope(|scope| {
        let remover = scope.spawn(move || {
            let pointer = std::ptr::with_exposed_provenance_mut(pointer);
            // SAFETY: the range is mapped as long as this thread runs, and what it holds is of
            // no interest.
            unsafe {
                rustix::mm::madvise(pointer, LENGTH as usize, rustix::mm::Advice::LinuxRemove)
            }
        });
        // Until the remover is there.
        while uffd.protect(all).is_ok() {}
        assert_eq!(
            (uffd.protect(all), uffd.unprotect(all)),
            (Err(Errno::AGAIN), Err(Errno::AGAIN))
        );
        // Hears of it, so that the remover goes on.
        let (mut events, mut removed) = (Events::default(), Vec::new());
        while !remover.is_finished() {
            uffd.read_events(&mut events).unwrap();
            removed.extend_from_slice(events.removed());
        }
        assert_eq!(removed, [all]);
        remover.join().unwrap().unwrap();
    });
    assert_eq!(uffd.protect(all), Ok(()));
}

/// Somebody touches a missing page just as the registration is taken back. The window is
/// narrow: without a second wake-up about one touch in a hundred waits for ever.
#[test]
fn a_touch_that_meets_the_end_of_a_registration_goes_on() {
    const ROUNDS: u64 = 10_000;
    const LENGTH: u64 = 64 << 12;
    const STUCK: Duration = Duration::from_secs(30);
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, LENGTH).unwrap();
    let memory = crate::shm::mapping::MappedWords::shared(fd.as_fd(), 0, LENGTH).unwrap();
    let all = AddressRange { start: memory.address_range().start as u64, length: LENGTH };
    let (asked, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let pause = |turns: u64| (0..turns).for_each(|_| std::hint::spin_loop());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                while asked.load(Ordering::Acquire) < round {
                    std::thread::yield_now();
                }
                pause(round * 7919 % 997);
                std::hint::black_box(memory[0].load(Ordering::Relaxed));
                done.store(round, Ordering::Release);
            }
        });
        for round in 1..=ROUNDS {
            let hole =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&fd, hole, 0, LENGTH).unwrap();
            let uffd = match Userfaultfd::open(feature::MISSING_SHMEM) {
                Ok(uffd) => uffd,
                Err(error) => {
                    eprintln!("skipped: {error}");
                    return asked.store(ROUNDS, Ordering::Release);
                }
            };
            uffd.register(all, RegisterMode::Missing).unwrap();
            asked.store(round, Ordering::Release);
            pause(round * 6271 % 1511);
            uffd.unregister(all).unwrap();
            let begun = Instant::now();
            while done.load(Ordering::Acquire) < round {
                if begun.elapsed() > STUCK {
                    asked.store(ROUNDS, Ordering::Release);
                    // Closing it lets the other thread end, and so the test.
                    drop(uffd);
                    panic!("the touch of round {round} waits for ever");
                }
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn what_is_not_mapped_is_refused_with_its_numbers() {
    let uffd = match Userfaultfd::open(feature::MISSING_SHMEM) {
        Ok(uffd) => uffd,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let error = uffd
        .register(AddressRange { start: 0x1000, length: 0x3000 }, RegisterMode::Missing)
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot register 0x1000 + 0x3000 for missing pages");
    let placed = uffd.copy(0x1000, &[0; 4096]).unwrap_err();
    assert_eq!((placed.done, placed.errno), (0, Errno::NOENT));
}
