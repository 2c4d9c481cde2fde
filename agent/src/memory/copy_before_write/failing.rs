// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk that fails: what it does to sweeps, write faults and discards.

use super::*;
use crate::image::ImageFault;
use crate::memory::Backing;
use crate::memory::GuestMemory;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable};
use std::os::fd::OwnedFd;
use std::path::Path;

const PAGES: u64 = 200;
/// Room for captured pages.
const ROOM: usize = 1 << 20;

/// A disk that is broken.
#[derive(Debug)]
struct Broken;

impl Sink for Broken {
    fn put(&self, _: Vec<Run<'_>>) -> Result<u64, SinkError> {
        Err(ImageFault::KernelAt { what: "write", at: 0x5000, source: Errno::IO }
            .of(Path::new("/image"))
            .into())
    }
}

fn memory() -> (GuestMemory, OwnedFd) {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&fd, &[5; (PAGES * PAGE_SIZE) as usize]).unwrap();
    let length = PAGES * PAGE_SIZE;
    let geometry =
        BlockGeometry { id: 3, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
    let mut table = BlockTable::new();
    table.insert(geometry.clone(), 512).unwrap();
    let backing = Backing::new(fd.try_clone().unwrap(), 0, length).unwrap();
    let block = Arc::new(Block::new(geometry, backing, 0, None).unwrap());
    (GuestMemory::new(vec![block], table, None), fd)
}

fn all_pending(memory: &GuestMemory) -> Arc<CopyBeforeWrite> {
    let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    (0..PAGES).for_each(|page| pending.add(0, page / WORD_BITS, 1 << (page % WORD_BITS)));
    Arc::new(CopyBeforeWrite::new(
        memory.blocks(),
        Arc::new(pending),
        None,
        Arc::new(Broken),
        ROOM,
        Arc::default(),
    ))
}

#[track_caller]
fn is_broken(outcome: Result<(), CaptureError>) {
    let text = crate::error::chain(&outcome.unwrap_err());
    assert!(
        text.starts_with("image /image: cannot write at byte 0x5000: Input/output error"),
        "{text}"
    );
}

#[test]
fn failing_disk_fails_a_sweep() {
    let (memory, _fd) = memory();
    let copier = all_pending(&memory);
    let mut batch = copier.batch().unwrap();
    is_broken(copier.sweep(&memory.readers, 0, (0, 0), &mut batch).map(drop));
    assert!(!copier.has_failed());
}

#[test]
fn write_continues_although_its_page_cannot_be_put() {
    let (memory, _fd) = memory();
    let copier = all_pending(&memory);
    let room = || copier.room(0, Duration::ZERO).unwrap();
    copier.write_fault(&memory.readers, (0, 7), room()).unwrap();
    // A second fault finds that the page is no longer pending.
    copier.write_fault(&memory.readers, (0, 7), room()).unwrap();
    assert_eq!(copier.pending.remaining_pages(), PAGES - 1);
    is_broken(copier.finish(&memory.readers));
}

#[test]
fn discard_succeeds_although_its_pages_cannot_be_put() {
    let (memory, fd) = memory();
    let copier = all_pending(&memory);
    memory.marking.take_instant(|| Ok::<_, CaptureError>(copier.clone())).unwrap();
    let range = BlockRange { block: 3, offset: 0, length: 50 * PAGE_SIZE };
    assert_eq!(memory.discard(&[range], true).unwrap(), 50);
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_blocks as u64 * 512, 150 * PAGE_SIZE);
    assert!(copier.has_failed());
    is_broken(copier.finish(&memory.readers));
    // The error is returned once. Later callers only learn that the snapshot is over.
    assert!(matches!(copier.check(), Err(CaptureError::GivenUp)));
}
