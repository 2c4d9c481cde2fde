// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How pages are placed, as the status tells it: on each kind of memory, without userfaultfd, and
//! if an end of the migration wants no huge pages.

use pageferry_client::{
    HugePages, IncomingOptions, JobStatus, Mode, OutgoingOptions, Phase, Placing, RestoreMode,
    RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::seccomp::without_userfaultfd;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::PATIENCE;
use std::sync::Arc;

/// Pages of a huge page.
const HUGE: u64 = 512;
const HUGE_PAGES: u64 = 4;
/// Why pages are written if userfaultfd(2) fails with EPERM.
const REFUSED: &str =
    "block 0: cannot place single pages: cannot open a userfaultfd: Operation not permitted";
const SIZE: u64 = HUGE_PAGES * HUGE * PAGE_SIZE;

fn side(backing: Backing) -> MockSide {
    MockSide::new(vec![BlockLayout { backing, ..BlockLayout::ram(SIZE) }])
}

/// A guest that uses all of its memory.
fn source(backing: Backing) -> MockSide {
    let side = side(backing);
    side.block(0).fill(PageRange::new(0, SIZE / PAGE_SIZE), 3).unwrap();
    side.vmm.start().unwrap();
    side
}

/// Moves the guest, and checks its memory. Returns the status of the job at the destination.
fn moved(
    from: &MockSide, to: &MockSide, outgoing: &OutgoingOptions, incoming: &IncomingOptions,
) -> JobStatus {
    let (job, address) = to.listen(incoming);
    let sent = from.vmm.start_outgoing(&address, outgoing).unwrap();
    let sent = from.vmm.wait_job(sent, PATIENCE).unwrap();
    assert_eq!(sent.phase, Phase::Completed, "{}", sent.error_text());
    // Only a job that places says how.
    assert_eq!((sent.placing, sent.placing_reason), (Placing::None, None));
    let status = to.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    same_memory(from.vmm.memory(), from.client(), to.vmm.memory()).unwrap();
    assert_eq!(from.allocated(), to.allocated());
    status
}

/// Moves a guest with the usual options.
fn usually_moved(backing: Backing) -> JobStatus {
    let (from, to) = (source(Backing::Memfd), side(backing));
    moved(&from, &to, &OutgoingOptions::default(), &IncomingOptions::default())
}

/// Checks the way, a part of the reason, and whether there are huge pages.
#[track_caller]
fn assert_placed(status: &JobStatus, placing: Placing, reason: &str) {
    let why = status.placing_reason.as_deref().unwrap_or_default();
    if placing == Placing::HugePages && why.contains("the kernel made none") {
        eprintln!("skipped: {why}");
        return;
    }
    assert_eq!(status.placing, placing, "{why}");
    assert!(why.contains(reason) && why.is_empty() == reason.is_empty(), "{why}");
    let expected = if placing == Placing::HugePages { HUGE_PAGES } else { 0 };
    assert_eq!(status.counters.huge_pages, expected);
}

#[test]
fn shared_memory_gets_huge_pages_however_its_tmpfs_is_mounted() {
    assert_placed(&usually_moved(Backing::Memfd), Placing::HugePages, "");
    let Some(tmpfs) = require::tmpfs() else { return };
    for huge in ["never", "advise"] {
        let file = tmpfs.file(&format!("size=64M,huge={huge}"), SIZE).unwrap();
        let status = usually_moved(Backing::File(Arc::new(file)));
        assert_placed(&status, Placing::HugePages, "");
    }
}

#[test]
fn either_end_can_do_without_huge_pages() {
    let never = HugePages::Never;
    let outgoing = OutgoingOptions { huge_pages: never, ..OutgoingOptions::default() };
    let (from, to) = (source(Backing::Memfd), side(Backing::Memfd));
    let status = moved(&from, &to, &outgoing, &IncomingOptions::default());
    assert_placed(&status, Placing::Pages, "no huge pages: the source was told so");

    let incoming = IncomingOptions { huge_pages: never, ..IncomingOptions::default() };
    let (from, to) = (source(Backing::Memfd), side(Backing::Memfd));
    let status = moved(&from, &to, &OutgoingOptions::default(), &incoming);
    assert_placed(&status, Placing::Pages, "the job was told to make none");
}

#[test]
fn postcopy_places_page_by_page() {
    if !require::uffd() {
        return;
    }
    let outgoing = OutgoingOptions { mode: Mode::Postcopy, ..OutgoingOptions::default() };
    let (from, to) = (source(Backing::Memfd), side(Backing::Memfd));
    let status = moved(&from, &to, &outgoing, &IncomingOptions::default());
    assert_placed(&status, Placing::Pages, "postcopy asks for single pages");
}

#[test]
fn without_userfaultfd_pages_are_written() {
    let status = without_userfaultfd(|| usually_moved(Backing::Memfd));
    assert_placed(&status, Placing::Write, REFUSED);
}

#[test]
fn files_on_disks_are_written_and_hugetlbfs_is_mapped() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if let Some(file) = require::file_on_disk(folder.path(), SIZE) {
        let status = usually_moved(Backing::File(Arc::new(file)));
        assert_placed(&status, Placing::Write, "block 0: its file is on a disk");
    }
    if let Some(_pool) = require::hugetlb(HUGE_PAGES) {
        assert_placed(&usually_moved(Backing::HugePages), Placing::Pages, "");
    }
}

#[test]
fn a_small_part_of_the_memory_without_huge_pages_is_named() {
    let layouts = || {
        let odd = BlockLayout { id: 3, name: "odd".into(), gpa: 1 << 32, ..BlockLayout::ram(SIZE) };
        let small =
            BlockLayout { id: 4, name: "rom".into(), gpa: 1 << 33, ..BlockLayout::ram(8192) };
        vec![BlockLayout::ram(SIZE), BlockLayout { fd_offset: PAGE_SIZE, ..odd }, small]
    };
    let (from, to) = (MockSide::new(layouts()), MockSide::new(layouts()));
    from.block(0).fill(PageRange::new(0, SIZE / PAGE_SIZE), 3).unwrap();
    from.vmm.start().unwrap();
    let status = moved(&from, &to, &OutgoingOptions::default(), &IncomingOptions::default());
    let why = "block 3: it does not begin at a multiple of 2 MiB of its file";
    assert_placed(&status, Placing::HugePages, why);
}

#[test]
fn a_restore_says_how_it_places() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let from = source(Backing::Memfd);
    let saved = from.vmm.start_snapshot(&image, &paused()).unwrap();
    assert_eq!(from.vmm.wait_job(saved, PATIENCE).unwrap().phase, Phase::Completed);
    let restored = |options: &RestoreOptions| {
        let to = side(Backing::Memfd);
        let job = to.vmm.start_restore(&image, options).unwrap();
        let status = to.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        same_memory(from.vmm.memory(), from.client(), to.vmm.memory()).unwrap();
        status
    };
    let usual = RestoreOptions::default();
    assert_placed(&restored(&usual), Placing::HugePages, "");
    let never = RestoreOptions { huge_pages: HugePages::Never, ..usual.clone() };
    let why = "the job was told to make none";
    assert_placed(&restored(&never), Placing::Pages, why);
    let status = without_userfaultfd(|| restored(&usual));
    assert_placed(&status, Placing::Write, REFUSED);
    if require::uffd() {
        let lazy = RestoreOptions { mode: RestoreMode::Lazy, ..usual };
        let why = "the guest runs before its memory is there";
        assert_placed(&restored(&lazy), Placing::Pages, why);
    }
}
