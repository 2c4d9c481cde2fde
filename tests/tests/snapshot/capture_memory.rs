// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that writes more than there is memory for pages that were captured before its writes.

use pageferry_client::{Phase, SnapshotMode, SnapshotOptions};
use pageferry_protocol::control::job::MIN_CAPTURE_MEMORY;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{assert_completed, background, endless};
use pageferry_tests::scenario::{Guest, Host, SOON};

/// Pages of the guest: four times what there is memory for.
const PAGES: u64 = 4 * MIN_CAPTURE_MEMORY / PAGE_SIZE;

#[test]
fn a_guest_writes_more_than_the_capture_memory() {
    if !require::uffd() {
        return;
    }
    for cached in [false, true] {
        let host = Host::start();
        let guest = Guest::full(&host, PAGES);
        let before = guest.bytes();
        let (workers, capture_memory) = (1, MIN_CAPTURE_MEMORY);
        let options = SnapshotOptions { cached, workers, capture_memory, ..background() };
        // The workers save almost nothing by themselves.
        let job = guest.snapshot(&host.images.path("image"), &endless(options));
        guest.reaches(Phase::Saving);
        let memory = guest.memory.clone();
        let writing = std::thread::spawn(move || {
            let block = &memory.blocks()[0];
            // All pages, in an order in which neighbours are far from each other.
            for page in (0..PAGES).map(|at| at * 1021 % PAGES) {
                block.store(page * PAGE_SIZE + 8, page).unwrap();
            }
        });
        wait_until("all to be written", SOON, || writing.is_finished()).unwrap();
        writing.join().unwrap();
        let status = guest.wait(job);
        assert_completed(&status);
        let captured = status.counters.copied_before_write_pages;
        assert!(captured > PAGES / 2, "only {captured} pages were captured");
        let chain = pageferry_agent::image::Chain::open(&host.images.seen("image")).unwrap();
        let mut saved = vec![0; before.len()];
        chain.read(0, PageRange::new(0, PAGES), &mut saved).unwrap();
        assert!(saved == before, "the image is not as of the instant");
        guest.assert_free();
    }
}

/// Only a background snapshot needs it, but it is checked for all.
#[test]
fn too_little_capture_memory_is_refused_by_name() {
    let host = Host::start();
    let guest = Guest::new(&host, 8);
    for mode in [SnapshotMode::Background, SnapshotMode::Paused] {
        let capture_memory = MIN_CAPTURE_MEMORY - 1;
        let options = SnapshotOptions { mode, capture_memory, ..SnapshotOptions::default() };
        let refused = guest.client.start_snapshot(&host.images.path("image"), &options);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("capture_memory") && text.contains("4 MiB"), "{text}");
    }
}
