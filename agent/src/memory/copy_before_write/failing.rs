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

/// A disk that is broken.
#[derive(Debug)]
struct Broken;

impl Sink for Broken {
    fn put(&self, _: usize, _: PageRange, _: &[u8]) -> Result<u64, SinkError> {
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
    let range = PageRange::new(0, PAGES);
    is_broken(copier.sweep(&memory.readers, 0, 0, range, &mut copier.batch().unwrap()).map(drop));
    assert!(!copier.has_failed());
}

#[test]
fn write_continues_although_its_page_cannot_be_put() {
    let (memory, _fd) = memory();
    let copier = all_pending(&memory);
    let mut into = vec![0; PAGE_SIZE as usize];
    let pages = copier.write_fault(&memory.readers, (0, 7), &mut into).unwrap().unwrap();
    assert_eq!((pages, &into[..]), (PageRange::new(7, 1), &[5; PAGE_SIZE as usize][..]));
    is_broken(copier.put_run(0, pages, &into));
    // A second fault finds that the page is no longer pending.
    assert_eq!(copier.write_fault(&memory.readers, (0, 7), &mut into).unwrap(), None);
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
