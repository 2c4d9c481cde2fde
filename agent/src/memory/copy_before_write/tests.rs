// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::GuestMemory;
use crate::memory::test_support::{let_others_run, memfd, memory};

const PAGES: u64 = 8;

/// Accepts all pages, and keeps nothing.
#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    fn put(&self, _: usize, _: PageRange, _: &[u8]) -> Result<u64, SinkError> {
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
    copier.sweep(&memory.readers, 0, 0, PageRange::new(0, PAGES), &mut batch).unwrap_err()
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
    let mut into = vec![0; PAGE_SIZE as usize];
    copier.stop_faults();
    // The page may have been discarded since, and nobody has captured it.
    assert_eq!(copier.write_fault(&memory.readers, (0, 3), &mut into).unwrap(), None);
    assert_eq!(copier.pending.remaining_pages(), 1);
}

/// Notes each range that is put.
#[derive(Debug)]
struct Notes {
    preferred: usize,
    puts: Mutex<Vec<PageRange>>,
}

impl Sink for Notes {
    fn put(&self, _: usize, range: PageRange, bytes: &[u8]) -> Result<u64, SinkError> {
        assert_eq!(bytes.len() as u64, range.bytes());
        self.puts.lock().unwrap().push(range);
        Ok(range.count)
    }

    fn batch(&self) -> usize {
        self.preferred
    }
}

#[test]
fn sink_gets_batches_of_the_size_it_prefers() {
    const PAGES: u64 = 1024;
    for words in [1, 3, 8] {
        let memory = memory(&[PAGES]);
        let pending = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
        (0..PAGES / WORD_BITS).for_each(|word| pending.add(0, word, u64::MAX));
        let (preferred, puts) = ((words * WORD_BITS * PAGE_SIZE) as usize, Mutex::default());
        let sink = Arc::new(Notes { preferred, puts });
        let copier = CopyBeforeWrite::new(
            memory.blocks(),
            Arc::new(pending),
            None,
            sink.clone(),
            Arc::default(),
        );
        let mut batch = copier.batch().unwrap();
        assert_eq!(
            copier.sweep(&memory.readers, 0, 0, PageRange::new(0, PAGES), &mut batch).unwrap(),
            PAGES
        );
        let puts = sink.puts.lock().unwrap();
        let counts: Vec<u64> = puts.iter().map(|range| range.count).collect();
        let (last, whole) = counts.split_last().unwrap();
        assert!(whole.iter().all(|count| *count == words * WORD_BITS), "{words} words: {counts:?}");
        assert_eq!(whole.iter().sum::<u64>() + last, PAGES);
    }
}
