// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a handle tells, and whom it never mistakes for another.

use super::child::{GUEST_OFFSET, GUEST_SIZE, Role};
use crate::process::target::{ProcessError, TargetProcess};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn the_memory_of_a_guest_is_found_by_its_mapping() {
    let role = Role::start("guest");
    let start = role.board.guest.load(Ordering::SeqCst);
    let mappings = role.target.mappings().unwrap();
    let ram = mappings.iter().find(|mapping| mapping.start == start).unwrap();
    assert_eq!((ram.offset, ram.shared, ram.writable), (GUEST_OFFSET, true, true));
    assert_eq!(ram.path.as_deref(), Some("/memfd:guest ram".as_ref()));
    assert!(ram.deleted && mappings.is_mapped(start, GUEST_SIZE));
    let copy = role.target.descriptor_of(ram.device, ram.inode).unwrap();
    let (copy, own) = (rustix::fs::fstat(&copy).unwrap(), rustix::fs::fstat(&role.file).unwrap());
    assert_eq!((copy.st_dev, copy.st_ino), (own.st_dev, own.st_ino));
    role.target.pagemap().unwrap();
    assert!(role.target.is_dumpable().unwrap());
}

#[test]
fn a_process_that_has_ended_is_gone() {
    let mut role = Role::start("guest");
    assert!(!role.target.has_exited().unwrap());
    assert!(matches!(role.target.file(9999), Err(ProcessError::NoDescriptor { .. })));
    role.kill();
    assert!(role.target.wait(Some(Duration::from_secs(9))).unwrap());
    let gone = |error| matches!(error, ProcessError::Gone { .. });
    assert!(gone(role.target.status().unwrap_err()));
    assert!(gone(role.target.mappings().unwrap_err()));
    assert!(gone(role.target.pagemap().unwrap_err()));
    assert!(gone(role.target.file(0).unwrap_err()));
    assert!(gone(role.target.descriptor_of(1, 1).unwrap_err()));
    assert!(gone(TargetProcess::open(role.pid()).unwrap_err()));
    assert!(gone(TargetProcess::open(0).unwrap_err()));
}

/// The heaps of these threads grow and shrink all the time.
#[test]
fn mappings_that_change_meanwhile_are_read_all_the_same() {
    const READS: usize = 300;
    let process = TargetProcess::open(std::process::id()).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    // Small enough for the thread's own heap, and touched.
                    let blocks: Vec<Vec<u8>> = (0..400).map(|_| vec![1; 60_000]).collect();
                    std::hint::black_box(blocks);
                }
            });
        }
        let failed = (0..READS).find_map(|_| process.mappings().err());
        is_over.store(true, Ordering::Relaxed);
        assert!(failed.is_none(), "{failed:?}");
    });
}
