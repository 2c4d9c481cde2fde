use super::*;
use crate::memory::test_support::{let_others_run, memory};

const PAGES: u64 = 8;

/// Takes all, and keeps nothing.
#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    fn put(&self, _: usize, _: PageRange, _: &[u8]) -> Result<u64, ImageError> {
        Ok(0)
    }
}

/// A block of eight pages, of which page 3 is pending.
fn copier() -> (GuestMemory, CopyBeforeWrite) {
    let memory = memory(&[PAGES]);
    let pending = HostPageSet::empty(&memory, &[PAGE_SIZE]).unwrap();
    pending.add(0, 0, 1 << 3);
    let copier =
        CopyBeforeWrite::new(&memory, Arc::new(pending), None, Arc::new(Nowhere), Arc::default());
    (memory, copier)
}

#[test]
fn nothing_is_settled_while_a_fault_reads_what_it_took() {
    let (memory, copier) = copier();
    let reading = memory.readers.reading(FAULTS, 0, 0);
    assert_ne!(copier.pending.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let settled = scope.spawn(|| copier.finish(&memory.readers));
        let_others_run();
        assert!(!settled.is_finished());
        drop(reading);
        settled.join().unwrap().unwrap();
    });
}

#[test]
fn what_is_pending_of_a_snapshot_that_failed_is_not_read_any_more() {
    let (memory, copier) = copier();
    let mut into = vec![0; PAGE_SIZE as usize];
    copier.stop_faults();
    // It may have been discarded, and nobody has saved it.
    assert_eq!(copier.write_fault(&memory, (0, 3), &mut into).unwrap(), None);
    assert_eq!(copier.pending.remaining_pages(), 1);
}

/// Notes what is put at once.
#[derive(Debug)]
struct Notes {
    likes: usize,
    puts: Mutex<Vec<PageRange>>,
}

impl Sink for Notes {
    fn put(&self, _: usize, range: PageRange, bytes: &[u8]) -> Result<u64, ImageError> {
        assert_eq!(bytes.len() as u64, range.bytes());
        self.puts.lock().unwrap().push(range);
        Ok(range.count)
    }

    fn batch(&self) -> usize {
        self.likes
    }
}

#[test]
fn a_sink_gets_as_much_at_once_as_it_likes() {
    const PAGES: u64 = 1024;
    for words in [1, 3, 8] {
        let memory = memory(&[PAGES]);
        let pending = HostPageSet::empty(&memory, &[PAGE_SIZE]).unwrap();
        (0..PAGES / WORD_BITS).for_each(|word| pending.add(0, word, u64::MAX));
        let (likes, puts) = ((words * WORD_BITS * PAGE_SIZE) as usize, Mutex::default());
        let sink = Arc::new(Notes { likes, puts });
        let copier =
            CopyBeforeWrite::new(&memory, Arc::new(pending), None, sink.clone(), Arc::default());
        let mut batch = copier.batch(&memory).unwrap();
        assert_eq!(
            copier.sweep(&memory, 0, 0, PageRange::new(0, PAGES), &mut batch).unwrap(),
            PAGES
        );
        let puts = sink.puts.lock().unwrap();
        let counts: Vec<u64> = puts.iter().map(|range| range.count).collect();
        let (last, whole) = counts.split_last().unwrap();
        assert!(whole.iter().all(|count| *count == words * WORD_BITS), "{words} words: {counts:?}");
        assert_eq!(whole.iter().sum::<u64>() + last, PAGES);
    }
}

/// What a sink likes if nothing else speaks for it, and what an image does.
#[test]
fn an_image_without_the_page_cache_is_written_in_larger_pieces() {
    let likes = |sink: Arc<dyn Sink>| {
        let memory = memory(&[PAGES]);
        let pending = Arc::new(HostPageSet::empty(&memory, &[PAGE_SIZE]).unwrap());
        CopyBeforeWrite::new(&memory, pending, None, sink, Arc::default())
            .batch(&memory)
            .unwrap()
            .full
    };
    assert_eq!(likes(Arc::new(Nowhere)), 1 << 20);
    let folder = tempfile::tempdir().unwrap();
    for cached in [false, true] {
        let path = folder.path().join(format!("{cached}"));
        let table = crate::image::test_support::table(&[PAGES]);
        let writer = ImageWriter::create(&path, &table, false, cached).unwrap();
        assert!(!(cached && writer.is_direct()));
        // Not every file system can do without.
        let expected = if writer.is_direct() { 2 << 20 } else { 1 << 20 };
        assert_eq!(likes(Arc::new(writer)), expected, "cached: {cached}");
    }
}
