// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::MissingPages;
use crate::memory::test_support::memfd;
use crate::restore::fault_reads::FaultWorker;
use crate::restore::image_pages::ImagePages;
use crate::restore::source::Source;

/// Number of pages in the aligned range that is read around a touched page.
const NEAR: u64 = 16;
const PAGES: u64 = 512;

/// All pages except 16 to 19 have content.
fn page_of(_: u32, page: u64) -> Page {
    if (16..20).contains(&page) { Page::Zero } else { Page::Content }
}

/// Calls `what` with the missing pages. Host pages have `unit` pages and are placed through `uffd`.
fn with_pages(
    unit: u64, uffd: impl FnOnce(&Ram) -> OwnedFd, what: impl FnOnce(&ImagePages<'_>, &Ram),
) {
    let Saved { folder: _folder, path, ram } = Saved::new(&[PAGES], page_of);
    let job = new_job(&ram, &Vmm::willing(&ram), 0);
    let source = Source::open(&path, &ram.memory, None).unwrap();
    let missing = HostPageSet::empty(ram.memory.blocks(), &[unit * PAGE_SIZE]).unwrap();
    let present = source.present(0);
    present.nonzero_words(present.all()).for_each(|(word, bits)| missing.add_pages(0, word, bits));
    let (unread, missing) = (missing.try_clone().unwrap(), Arc::new(missing));
    let (uffd, live) = (uffd(&ram), job.live.clone());
    let missing_pages = MissingPages::new(ram.memory.blocks(), missing, uffd, false, live).unwrap();
    what(&ImagePages::new(&job, &source, &missing_pages, unread), &ram);
}

/// A descriptor for a restore that places nothing.
fn no_uffd(_: &Ram) -> OwnedFd {
    memfd(0)
}

#[test]
fn unread_pages_around_a_second_touch_are_claimed() {
    with_pages(1, no_uffd, |pages, _| {
        let worker = FaultWorker::new(pages, false, 0);
        let claimed = |page| worker.claim_around(0, page);
        assert_eq!(claimed(37), PageRange::new(37, 1), "nothing near it was read");
        assert_eq!(claimed(39), PageRange::new(32, NEAR), "37 was");
        assert_eq!(claimed(48), PageRange::new(48, NEAR), "the page before it was");
        assert_eq!(claimed(50), PageRange::new(50, 1), "all around it was");
        // Page 19 has no content, and page 99 is unread.
        assert_eq!(claimed(20), PageRange::new(20, 1));
        assert_eq!(claimed(100), PageRange::new(100, 1));
    });
}

#[test]
fn pages_claimed_around_a_page_are_placed_with_it() {
    if !has_userfaultfd() {
        return;
    }
    let mut registered = None;
    let uffd = |ram: &Ram| {
        let uffd = registered.insert(register(ram));
        uffd.as_fd().try_clone_to_owned().unwrap()
    };
    with_pages(1, uffd, |pages, ram| {
        let mut worker = FaultWorker::new(pages, false, 0);
        worker.serve_fault((0, 37)).unwrap();
        assert_eq!(ram.allocated(0), [PageRange::new(37, 1)]);
        worker.serve_fault((0, 39)).unwrap();
        assert_eq!(ram.allocated(0), [PageRange::new(32, NEAR)]);
        (32..32 + NEAR).for_each(|page| assert_eq!(ram.touch(0, page), word_of(0, page)));
        let left = PAGES - 4 - NEAR;
        assert_eq!(
            (pages.unread.remaining_pages(), pages.missing_pages.missing().remaining_pages()),
            (left, left)
        );
    });
}

/// The buffer holds old bytes, which must not be placed.
#[test]
fn a_page_without_content_is_zero_in_a_larger_host_page() {
    with_pages(8, no_uffd, |pages, _| {
        let mut buffer = vec![0xff; 8 * PAGE];
        let content = pages.read(0, PageRange::new(16, 8), &mut buffer).unwrap();
        assert!(content[..4 * PAGE].iter().all(|byte| *byte == 0));
        assert_eq!(content[4 * PAGE..][..8], word_of(0, 20).to_le_bytes());
    });
}
