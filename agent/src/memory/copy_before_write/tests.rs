// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::GuestMemory;
use crate::memory::mappings::Mappings;
use crate::memory::test_support::{let_others_run, memfd, memory};
use pageferry_protocol::control::request::BlockRange;

const PAGES: u64 = 8;
/// Room for captured pages.
const ROOM: usize = 1 << 20;

/// Accepts all pages, and keeps nothing.
#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    fn put(&self, _: Vec<Run<'_>>) -> Result<u64, SinkError> {
        Ok(0)
    }
}

/// A block of eight pages. Page 3 is pending.
fn copier() -> (GuestMemory, CopyBeforeWrite) {
    copier_with(None)
}

/// The same, of a VMM that frees memory without a request. Nothing is protected: the descriptor is
/// no userfaultfd.
fn copier_of_unannounced_frees() -> (GuestMemory, CopyBeforeWrite) {
    let memory = memory(&[PAGES]);
    let mappings = Mappings::of(memory.blocks());
    let uffd = memfd(0).into();
    copier_with(Some(Arc::new(Protection { uffd, mappings, unannounced_frees: true })))
}

fn copier_with(protection: Option<Arc<Protection>>) -> (GuestMemory, CopyBeforeWrite) {
    let memory = memory(&[PAGES]);
    let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    pending.add(0, 0, 1 << 3);
    let copier = CopyBeforeWrite::new(
        memory.blocks(),
        Arc::new(pending),
        protection,
        Arc::new(Nowhere),
        ROOM,
        Arc::default(),
    );
    (memory, copier)
}

#[test]
fn finish_waits_for_a_fault_that_reads() {
    let (memory, copier) = copier();
    let reading = memory.readers.reading(FAULTS, 0, 0);
    assert_ne!(copier.pending.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let finished = scope.spawn(|| copier.finish(&memory.readers));
        let_others_run();
        assert!(!finished.is_finished());
        drop(reading);
        finished.join().unwrap().unwrap();
    });
}

/// What a page of this content is found to be when it is read: its error.
fn read_error(content: Option<[u8; PAGE_SIZE as usize]>) -> CaptureError {
    let (memory, copier) = copier_of_unannounced_frees();
    if let Some(content) = content {
        memory.blocks()[0].backing.write(3 * PAGE_SIZE, &content).unwrap();
    }
    let mut batch = copier.batch().unwrap();
    copier.sweep(&memory.readers, 0, (0, 0), &mut batch).unwrap_err()
}

#[test]
fn page_that_was_punched_before_it_was_read_fails_the_snapshot() {
    let punched = read_error(None);
    assert!(matches!(punched, CaptureError::Freed { id: 0 }), "{punched}");
    // A page that exists is captured, whatever it has: only its protection cannot be removed here.
    for content in [0, 7] {
        let captured = read_error(Some([content; PAGE_SIZE as usize]));
        assert!(matches!(captured, CaptureError::Protection { .. }), "{captured}");
    }
}

#[test]
fn removal_of_a_captured_page_costs_nothing_and_of_a_pending_one_the_snapshot() {
    let (_, copier) = copier_of_unannounced_frees();
    copier.freed_unannounced(0, PageRange::new(4, 4));
    copier.check().unwrap();
    copier.freed_unannounced(0, PageRange::new(2, 2));
    assert!(matches!(copier.check(), Err(CaptureError::Freed { id: 0 })));
    assert_eq!(copier.pending.remaining_pages(), 0);
}

#[test]
fn failed_snapshot_reads_no_pending_page() {
    let (memory, copier) = copier();
    let room = copier.room(0, Duration::ZERO).unwrap();
    copier.stop_faults();
    // The page may have been discarded since, and nobody has captured it.
    copier.write_fault(&memory.readers, (0, 3), room).unwrap();
    assert_eq!(copier.pending.remaining_pages(), 1);
}

/// Notes the runs of each put, and checks that each page has its own content: its number.
#[derive(Debug)]
struct Notes {
    preferred: usize,
    puts: Mutex<Vec<Vec<PageRange>>>,
}

impl Sink for Notes {
    fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError> {
        for run in &runs {
            assert_eq!(run.bytes.len() as u64, run.pages.bytes());
            let pages = run.bytes.chunks(PAGE_SIZE as usize);
            for (page, bytes) in (run.pages.first..).zip(pages) {
                assert!(bytes.iter().all(|byte| *byte == page as u8), "page {page}");
            }
        }
        self.puts.lock().unwrap().push(runs.iter().map(|run| run.pages).collect());
        Ok(runs.iter().map(|run| run.pages.count).sum())
    }

    fn batch(&self) -> usize {
        self.preferred
    }
}

/// Pages of a piece.
const PIECE: u64 = 64;

/// A guest of four pieces. All pages are pending, and their content is their number. There is room
/// for `room` captured pages.
fn four_pieces(room: u64) -> (GuestMemory, Arc<Notes>, CopyBeforeWrite) {
    let memory = memory(&[4 * PIECE]);
    let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    (0..4 * PIECE / WORD_BITS).for_each(|word| pending.add(0, word, u64::MAX));
    for page in 0..4 * PIECE {
        let bytes = [page as u8; PAGE_SIZE as usize];
        memory.blocks()[0].backing.write(page * PAGE_SIZE, &bytes).unwrap();
    }
    let (preferred, puts) = ((PIECE * PAGE_SIZE) as usize, Mutex::default());
    let sink = Arc::new(Notes { preferred, puts });
    let copier = CopyBeforeWrite::new(
        memory.blocks(),
        Arc::new(pending),
        None,
        sink.clone(),
        (room * PAGE_SIZE) as usize,
        Arc::default(),
    );
    (memory, sink, copier)
}

impl Notes {
    fn take(&self) -> Vec<Vec<PageRange>> {
        std::mem::take(&mut self.puts.lock().unwrap())
    }
}

/// A fault captures the page, and then the guest writes to it.
fn write(memory: &GuestMemory, copier: &CopyBeforeWrite, page: u64) {
    let room = copier.room(0, Duration::ZERO).unwrap();
    copier.write_fault(&memory.readers, (0, page), room).unwrap();
    memory.blocks()[0].backing.write(page * PAGE_SIZE, &[0xee; PAGE_SIZE as usize]).unwrap();
}

/// Sweeps until no piece is left. Returns the numbers of the pieces in their order.
fn sweep_all(memory: &GuestMemory, copier: &CopyBeforeWrite) -> Vec<u64> {
    let mut batch = copier.batch().unwrap();
    let claims = std::iter::from_fn(|| copier.claim());
    let sweep = |claim: Claim<'_>| {
        copier.sweep(&memory.readers, 0, claim.piece, &mut batch).unwrap();
        claim.piece.1
    };
    claims.map(sweep).collect()
}

#[test]
fn captured_pages_leave_with_their_pieces_the_fullest_first() {
    let (memory, sink, copier) = four_pieces(64);
    let captured = [2 * PIECE + 9, 5, 2 * PIECE, 4 * PIECE - 1, 2 * PIECE + 8];
    captured.into_iter().for_each(|page| write(&memory, &copier, page));
    let mut order = sweep_all(&memory, &copier);
    assert_eq!(order[0], 2);
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3]);
    let mut puts = sink.take();
    puts.sort_by_key(|runs| runs[0].first);
    let whole = |number| vec![PageRange::new(number * PIECE, PIECE)];
    assert_eq!(puts, [0, 1, 2, 3].map(whole), "each piece is put once, as a whole");
    copier.finish(&memory.readers).unwrap();
    assert_eq!(sink.take().len(), 0);
}

#[test]
fn captured_pages_leave_in_sorted_batches_if_room_is_scarce() {
    let (memory, sink, copier) = four_pieces(16);
    std::thread::scope(|scope| {
        scope.spawn(|| copier.put_while_scarce().unwrap());
        let _end = OnDrop(|| copier.end_batches());
        // More pages than there is room for, and no worker.
        let order = (0..4 * PIECE).map(|at| at * 37 % (4 * PIECE));
        for page in order {
            let room = copier.room(0, Duration::from_secs(60)).unwrap();
            assert!(room.is_some(), "page {page} gets room");
            copier.write_fault(&memory.readers, (0, page), room).unwrap();
        }
    });
    copier.finish(&memory.readers).unwrap();
    let puts = sink.take();
    for runs in &puts {
        assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first), "{runs:?}");
        assert!(runs.iter().map(|run| run.count).sum::<u64>() <= 16);
    }
    let pages: u64 = puts.iter().flatten().map(|run| run.count).sum();
    assert_eq!((pages, copier.claim().is_some()), (4 * PIECE, false));
}

/// Runs a function on drop.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn pages_that_were_captured_and_then_discarded_stay_as_of_the_instant() {
    let (memory, sink, copier) = four_pieces(64);
    let copier = Arc::new(copier);
    memory.marking.take_instant(|| Ok::<_, CaptureError>(copier.clone())).unwrap();
    (0..10).for_each(|page| write(&memory, &copier, page));
    // The discard saves what is pending. The captured pages need nothing from the memory any more.
    let range = BlockRange { block: 0, offset: 0, length: 20 * PAGE_SIZE };
    memory.discard(&[range], true).unwrap();
    assert_eq!(sink.take(), [vec![PageRange::new(10, 10)]]);
    sweep_all(&memory, &copier);
    copier.finish(&memory.readers).unwrap();
    let mut first = sink.take().into_iter().find(|runs| runs[0].first == 0).unwrap();
    first.sort_by_key(|run| run.first);
    assert_eq!(first, [PageRange::new(0, 10), PageRange::new(20, PIECE - 20)]);
}

#[test]
fn a_worker_waits_for_a_fault_that_took_a_page_of_its_piece() {
    let (memory, sink, copier) = four_pieces(64);
    let mut room = copier.room(0, Duration::ZERO).unwrap().unwrap();
    let reading = memory.readers.reading(FAULTS, 0, 0);
    assert_ne!(copier.pending.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let swept = scope.spawn(|| {
            let mut batch = copier.batch().unwrap();
            copier.sweep(&memory.readers, 0, (0, 0), &mut batch).unwrap()
        });
        let_others_run();
        assert!(!swept.is_finished());
        room.bytes().fill(3);
        room.keep(0, PageRange::new(3, 1));
        drop(reading);
        assert_eq!(swept.join().unwrap(), PIECE - 1);
    });
    assert_eq!(sink.take(), [vec![PageRange::new(0, PIECE)]]);
}

#[test]
fn sink_gets_pieces_of_the_size_it_prefers() {
    for pages in [64, 128, 256] {
        let memory = memory(&[4 * PIECE]);
        let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
        (0..4 * PIECE / WORD_BITS).for_each(|word| pending.add(0, word, u64::MAX));
        let sink =
            Arc::new(Sizes { preferred: (pages * PAGE_SIZE) as usize, puts: Mutex::default() });
        let copier = CopyBeforeWrite::new(
            memory.blocks(),
            Arc::new(pending),
            None,
            sink.clone(),
            ROOM,
            Arc::default(),
        );
        sweep_all(&memory, &copier);
        assert!(sink.puts.lock().unwrap().iter().all(|count| *count == pages));
    }
}

/// Notes how many pages each put has.
#[derive(Debug)]
struct Sizes {
    preferred: usize,
    puts: Mutex<Vec<u64>>,
}

impl Sink for Sizes {
    fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError> {
        let pages = runs.iter().map(|run| run.pages.count).sum();
        self.puts.lock().unwrap().push(pages);
        Ok(pages)
    }

    fn batch(&self) -> usize {
        self.preferred
    }
}
