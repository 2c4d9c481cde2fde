// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::Backing;
use crate::memory::block::GuestLog;
use crate::memory::copy_before_write::{CopyBeforeWrite, Run, Sink, SinkError};
use crate::memory::discard_recorder::DiscardRecorder;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::test_support::{let_others_run, memfd};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE};
use pageferry_protocol::shm::DirtyLog;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::yield_now;

const PAGES: u64 = 150;
/// Guest page of the first page.
const FIRST: u64 = 3;

/// A block whose pages are all written.
fn memory() -> Arc<GuestMemory> {
    let length = PAGES * PAGE_SIZE;
    let geometry = BlockGeometry {
        id: 7,
        name: "ram".into(),
        gpa: FIRST * PAGE_SIZE,
        length,
        granularity: PAGE_SIZE,
    };
    let block =
        Block::new(geometry, Backing::new(memfd(length), 0, length).unwrap(), 0, None).unwrap();
    block.backing.write(0, &vec![5; length as usize]).unwrap();
    let log = DirtyLog::map(memfd(4096).as_fd(), 0, 4096).unwrap();
    Arc::new(GuestMemory::new(
        vec![Arc::new(block)],
        BlockTable::new(),
        Some(Arc::new(GuestLog::new(log))),
    ))
}

fn range(first: u64, count: u64) -> [BlockRange; 1] {
    [BlockRange { block: 7, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }]
}

fn holes(memory: &GuestMemory) -> Vec<u64> {
    let backing = &memory.blocks()[0].backing;
    (0..PAGES)
        .filter(|page| backing.first_data(PageRange::new(*page, 1)).unwrap().is_none())
        .collect()
}

fn logged(memory: &GuestMemory) -> Vec<u64> {
    let log = memory.log.as_ref().unwrap().log.bits();
    (0..PAGES).filter(|page| log.contains(FIRST + page)).collect()
}

#[test]
fn freed_page_is_a_dirty_hole_and_discarded_stays_discarded() {
    let memory = memory();
    let block = &memory.blocks()[0];
    memory.discard(&range(61, 2), true).unwrap();
    block.backing.write(62 * PAGE_SIZE, &[1]).unwrap();
    // A free rounds inward, as a discard does.
    let ragged = BlockRange { offset: 59 * PAGE_SIZE + 1, length: 7 * PAGE_SIZE, ..range(0, 0)[0] };
    assert_eq!(memory.free(&[ragged]).unwrap(), 4);
    assert_eq!(holes(&memory), [60, 61, 62, 63, 64, 65]);
    assert_eq!(logged(&memory), [60, 63, 64, 65]);
    assert_eq!(block.discarded.runs(block.all()).collect::<Vec<_>>(), [PageRange::new(61, 2)]);
    assert_eq!(block.unsettled.count(block.all()), 0);
    assert!(memory.free(&[BlockRange { block: 8, ..range(0, 1)[0] }]).is_err());
}

#[test]
fn hole_is_known_until_the_page_is_written() {
    let memory = memory();
    let block = &memory.blocks()[0];
    memory.free(&range(60, 10)).unwrap();
    block.backing.write(66 * PAGE_SIZE, &[1]).unwrap();
    for _ in 0..2 {
        assert_eq!(block.known_holes(0, u64::MAX).unwrap(), 0xf << 60);
        assert_eq!(block.known_holes(1, 0x3d).unwrap(), 0x39);
        assert_eq!(block.known_holes(1, u64::MAX).unwrap(), 0x3b);
    }
    // The same pages are removed from a bitmap of allocated pages.
    let allocated = MappedBitmap::private(PAGES).unwrap();
    allocated.set(allocated.all());
    block.take_known_holes(&allocated).unwrap();
    let left: Vec<_> = allocated.runs(allocated.all()).collect();
    assert_eq!(left, [PageRange::new(0, 60), PageRange::new(66, 1), PageRange::new(70, 80)]);
}

#[test]
fn free_waits_for_earlier_readers() {
    let memory = memory();
    let reading = memory.readers.reading(3, 0, 1);
    std::thread::scope(|scope| {
        let free = scope.spawn(|| memory.free(&range(64, 1)).unwrap());
        let_others_run();
        assert!(!free.is_finished() && holes(&memory).is_empty());
        drop(reading);
        free.join().unwrap();
    });
    assert_eq!(holes(&memory), [64]);
}

#[test]
fn recorder_notes_discards_and_frees() {
    let memory = memory();
    let recorder = DiscardRecorder::start(&memory, || ()).unwrap();
    memory.discard(&range(3, 2), true).unwrap();
    memory.free(&range(4, 2)).unwrap();
    let runs = |bits: &MappedBitmap| bits.runs(bits.all()).collect::<Vec<_>>();
    assert_eq!(runs(recorder.recorded().discarded(0)), [PageRange::new(3, 2)]);
    assert_eq!(runs(recorder.recorded().freed(0)), [PageRange::new(4, 2)]);
    drop(recorder);
    assert!(memory.recorded().is_none());
}

/// Keeps the ranges that are put, and counts the pages that are not zero.
#[derive(Debug, Default)]
struct Kept {
    pages: Mutex<Vec<PageRange>>,
    nonzero: AtomicU64,
}

impl Sink for Kept {
    fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError> {
        self.pages.lock().unwrap().extend(runs.iter().map(|run| run.pages));
        let pages = runs.iter().flat_map(|run| run.bytes.chunks(PAGE_SIZE as usize));
        let nonzero = pages.filter(|page| page[0] != 0).count() as u64;
        self.nonzero.fetch_add(nonzero, Ordering::SeqCst);
        Ok(nonzero)
    }
}

fn capture(memory: &GuestMemory, kept: &Arc<Kept>, pages: u64) -> Arc<CopyBeforeWrite> {
    let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    pending.add(0, 0, pages);
    let copier = Arc::new(CopyBeforeWrite::new(
        memory.blocks(),
        Arc::new(pending),
        None,
        kept.clone(),
        1 << 20,
        Arc::default(),
    ));
    memory.marking.take_instant(|| Ok::<_, ()>(copier.clone())).unwrap();
    copier
}

#[test]
fn page_freed_after_the_instant_is_saved_first() {
    let memory = memory();
    let kept = Arc::new(Kept::default());
    let copier = capture(&memory, &kept, 0b1111);
    memory.free(&range(1, 2)).unwrap();
    assert_eq!(*kept.pages.lock().unwrap(), [PageRange::new(1, 2)]);
    assert_eq!((kept.nonzero.load(Ordering::SeqCst), copier.pending().remaining_pages()), (2, 2));
}

#[test]
fn page_freed_across_the_instant_is_not_saved_later() {
    let memory = memory();
    let kept = Arc::new(Kept::default());
    let reading = memory.readers.reading(3, 0, 0);
    let recorder = DiscardRecorder::start(&memory, || ()).unwrap();
    let copier = std::thread::scope(|scope| {
        // The free has looked for a snapshot, and found none.
        let free = scope.spawn(|| memory.free(&range(1, 2)).unwrap());
        while recorder.recorded().freed(0).count(PageRange::new(0, 64)) < 2 {
            yield_now();
        }
        let_others_run();
        assert!(!free.is_finished());
        let copier = capture(&memory, &kept, 0b1111);
        drop(reading);
        free.join().unwrap();
        copier
    });
    assert_eq!(copier.pending().block(0).bits().word(0), 0b1001);
    let mut batch = copier.batch().unwrap();
    assert_eq!(copier.sweep(&memory.readers, 0, (0, 0), &mut batch).unwrap(), 2);
    assert_eq!(*kept.pages.lock().unwrap(), [PageRange::new(0, 1), PageRange::new(3, 1)]);
}

/// On a disk, space that was reserved and never written is reported as a hole, too.
#[test]
fn free_works_on_a_disk_that_can_punch() {
    let file: OwnedFd = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap().into();
    rustix::fs::ftruncate(&file, 8 * PAGE_SIZE).unwrap();
    let geometry = BlockGeometry {
        id: 7,
        name: "ram".into(),
        gpa: 0,
        length: 8 * PAGE_SIZE,
        granularity: PAGE_SIZE,
    };
    let backing = Backing::new(file.try_clone().unwrap(), 0, 8 * PAGE_SIZE).unwrap();
    if backing.punch(PageRange::new(0, 8)).is_err() {
        eprintln!("skipped: the file system cannot punch");
        return;
    }
    let block = Block::new(geometry, backing, 0, None).unwrap();
    let memory = GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None);
    let block = &memory.blocks()[0];
    block.backing.write(0, &[5; 8 * PAGE_SIZE as usize]).unwrap();
    assert_eq!(memory.free(&range(2, 4)).unwrap(), 4);
    let mut bytes = [1; 4 * PAGE_SIZE as usize];
    block.backing.read(2 * PAGE_SIZE, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    // Where the file system does not report holes, no hole is known.
    let reports_holes = block.backing.first_data(PageRange::new(2, 1)).unwrap().is_none();
    assert_eq!(block.known_holes(0, u64::MAX).unwrap(), if reports_holes { 0b11_1100 } else { 0 });
    block.backing.write(3 * PAGE_SIZE, &[1]).unwrap();
    assert_eq!(block.known_holes(0, u64::MAX).unwrap() & 0b1000, 0);
}
