// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tracker by write-protect scanning, against the real kernel.

use pageferry_agent::pagemap::{Huge, Pagemap, PagemapError};
use pageferry_client::error::chain;
use pageferry_client::tracking::uffd::{UffdError, UserfaultError, WriteProtect};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files::{mapped, memfd};
use pageferry_tests::guest_mapping::GuestMapping;
use pageferry_tests::huge_pages::{HUGE_PAGE, hugetlb_memfd, make_all_huge};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use rustix::fs::{FallocateFlags, fallocate, fstat};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

type Memory = GuestMemoryMmap<()>;

fn memory(regions: &[(u64, u64)]) -> Memory {
    mapped(regions).unwrap()
}

fn start_of(memory: &Memory) -> u64 {
    memory.get_host_address(GuestAddress(0)).unwrap() as u64
}

/// One mapping that is tracked by write protection.
struct Tracked {
    memory: Memory,
    file: File,
    address: u64,
    length: u64,
    write_protect: Option<WriteProtect>,
    pagemap: Pagemap,
}

impl Tracked {
    /// `None` if it cannot be tracked.
    fn new(pages: u64) -> Option<Self> {
        require::uffd().then(|| Self::over(memfd(pages * PAGE_SIZE).unwrap(), pages * PAGE_SIZE))
    }

    /// A mapping of which all pages were written, as the scan reports.
    fn scanned(pages: u64) -> Option<Self> {
        let tracked = Self::new(pages)?;
        (0..pages).for_each(|page| tracked.write(page));
        tracked.scan();
        Some(tracked)
    }

    fn over(fd: OwnedFd, length: u64) -> Self {
        let file = File::from(fd);
        let backing = Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let memory =
            Memory::from_ranges_with_files([(GuestAddress(0), length as usize, backing)]).unwrap();
        let address = start_of(&memory);
        let write_protect = WriteProtect::register(&[(address, length)]).unwrap();
        let pagemap = Pagemap::new(write_protect.pagemap().try_clone_to_owned().unwrap()).unwrap();
        Self { memory, file, address, length, write_protect: Some(write_protect), pagemap }
    }

    fn write(&self, page: u64) {
        self.memory.store(1u32, GuestAddress(page * PAGE_SIZE), Ordering::SeqCst).unwrap();
    }

    /// The written pages.
    fn scan(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        self.pagemap
            .scan(self.address, self.length, |start, end| {
                assert!(self.address <= start && start < end && end <= self.address + self.length);
                pages.extend((start - self.address) / PAGE_SIZE..(end - self.address) / PAGE_SIZE);
            })
            .unwrap();
        pages
    }

    fn blocks(&self) -> i64 {
        fstat(&self.file).unwrap().st_blocks
    }

    fn punch(&self, offset: u64, length: u64) {
        fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length,
        )
        .unwrap();
    }
}

#[test]
fn a_write_through_the_mapping_is_reported_exactly_once() {
    let Some(tracked) = Tracked::new(2048) else { return };
    (0..2048).for_each(|page| tracked.write(page));
    assert_eq!(
        tracked.scan(),
        Vec::from_iter(0..2048),
        "what exists at the start counts as written"
    );
    assert_eq!(tracked.scan(), [0; 0]);
    for page in [0, 7, 8, 511, 512, 2047] {
        tracked.write(page);
        tracked.write(page);
    }
    assert_eq!(tracked.scan(), [0, 7, 8, 511, 512, 2047]);
    assert_eq!(tracked.scan(), [0; 0]);
    tracked.write(7);
    assert_eq!(tracked.scan(), [7]);
}

#[test]
fn a_read_is_no_write() {
    let Some(tracked) = Tracked::scanned(64) else { return };
    for page in 0..64 {
        let _: u32 = tracked.memory.load(GuestAddress(page * PAGE_SIZE), Ordering::SeqCst).unwrap();
    }
    assert_eq!(tracked.scan(), [0; 0]);
}

#[test]
fn first_writes_to_holes_are_reported() {
    let Some(tracked) = Tracked::new(4096) else { return };
    tracked.write(3);
    tracked.scan();
    assert_eq!(tracked.scan(), [0; 0]);
    // Next to an existing page, and megabytes away from any.
    tracked.write(4);
    tracked.write(2000);
    let found = tracked.scan();
    assert!(found.contains(&4) && found.contains(&2000), "{found:?}");
    assert!(!found.contains(&3), "{found:?}");
    assert_eq!(tracked.scan(), [0; 0]);
}

#[test]
fn a_write_after_a_punch_of_a_protected_page_is_reported() {
    let Some(tracked) = Tracked::scanned(1024) else { return };
    tracked.punch(100 * PAGE_SIZE, 600 * PAGE_SIZE);
    let blocks = tracked.blocks();
    let after_punch = tracked.scan();
    assert!(after_punch.iter().all(|page| (100..700).contains(page)), "{after_punch:?}");
    assert_eq!(tracked.blocks(), blocks, "the scan allocates nothing");
    for page in [100, 300, 699] {
        tracked.write(page);
    }
    assert_eq!(tracked.scan(), [100, 300, 699]);
    assert_eq!(tracked.scan(), [0; 0]);
}

#[test]
fn a_scan_allocates_no_page() {
    let Some(tracked) = Tracked::new(1 << 16) else { return };
    (0..1 << 16).step_by(1000).for_each(|page| tracked.write(page));
    let blocks = tracked.blocks();
    tracked.scan();
    tracked.scan();
    assert_eq!(tracked.blocks(), blocks);
}

#[test]
fn more_runs_than_the_buffer_holds_are_all_reported() {
    // Every second page is a run of its own. The runs fill several buffers.
    let Some(tracked) = Tracked::scanned(30_000) else { return };
    (0..30_000).step_by(2).for_each(|page| tracked.write(page));
    assert_eq!(tracked.scan(), Vec::from_iter((0..30_000).step_by(2)));
    assert_eq!(tracked.scan(), [0; 0]);
}

#[test]
fn writes_around_the_mapping_need_the_shared_log() {
    let Some(tracked) = Tracked::scanned(64) else { return };
    tracked.file.write_all_at(&[1], 5 * PAGE_SIZE).unwrap();
    assert_eq!(tracked.scan(), [0; 0]);
}

#[test]
fn no_write_is_lost_while_scans_run() {
    no_write_is_lost(1);
}

/// The threads of a sync scan different parts of the mapping at once.
#[test]
fn no_write_is_lost_while_several_threads_scan() {
    no_write_is_lost(3);
}

fn no_write_is_lost(threads: u64) {
    const PAGES: u64 = 516;
    let Some(tracked) = Tracked::new(PAGES) else { return };
    let counter = |page: u64| -> u32 {
        tracked.memory.load(GuestAddress(page * PAGE_SIZE), Ordering::SeqCst).unwrap()
    };
    let stop = AtomicBool::new(false);
    let copy: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    // Number of scans that found something. It is large enough that scans and writes meet
    // everywhere, whatever the order.
    let found = AtomicU32::new(0);
    // Scans every part of the mapping but those of other threads, and copies what was written.
    let scan = |thread: u64| {
        let part = PAGES / threads;
        let start = tracked.address + thread * part * PAGE_SIZE;
        let copy_run = |from: u64, to: u64| {
            found.fetch_add(1, Ordering::Relaxed);
            let page = |address: u64| (address - tracked.address) / PAGE_SIZE;
            (page(from)..page(to))
                .for_each(|page| copy[page as usize].store(counter(page), Ordering::Relaxed));
        };
        tracked.pagemap.scan(start, part * PAGE_SIZE, copy_run).unwrap();
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut random = Random::new(1);
            while !stop.load(Ordering::Relaxed) {
                let page = random.below(PAGES);
                tracked
                    .memory
                    .store(counter(page) + 1, GuestAddress(page * PAGE_SIZE), Ordering::SeqCst)
                    .unwrap();
            }
        });
        let scanners: Vec<_> = (0..threads)
            .map(|thread| {
                let (scan, found) = (&scan, &found);
                scope.spawn(move || {
                    while found.load(Ordering::Relaxed) < 5000 {
                        scan(thread);
                    }
                })
            })
            .collect();
        scanners.into_iter().for_each(|scanner| scanner.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    (0..threads).for_each(scan);
    let copy: Vec<u32> = copy.into_iter().map(AtomicU32::into_inner).collect();
    let actual: Vec<u32> = (0..PAGES).map(counter).collect();
    assert_eq!(copy, actual, "the copies after each report equal the memory");
}

#[test]
fn a_scan_after_the_registration_is_dropped_is_an_error() {
    let Some(mut tracked) = Tracked::scanned(64) else { return };
    tracked.write_protect = None;
    let error = tracked.pagemap.scan(tracked.address, tracked.length, |_, _| ()).unwrap_err();
    assert!(matches!(error, PagemapError::NotRegistered { .. }), "{error}");
    tracked.write(3); // no longer protected, so the write does not wait
}

#[test]
fn a_mapping_that_is_added_or_removed_leaves_the_others_as_they_are() {
    let Some(mut tracked) = Tracked::scanned(64) else { return };
    let more = memory(&[(0, 32 * PAGE_SIZE)]);
    let address = start_of(&more);
    let write = |page: u64| more.store(1u32, GuestAddress(page * PAGE_SIZE), Ordering::SeqCst);
    let scan = |tracked: &Tracked| {
        let mut pages = Vec::new();
        let scanned = tracked.pagemap.scan(address, 32 * PAGE_SIZE, |start, end| {
            pages.extend((start - address) / PAGE_SIZE..(end - address) / PAGE_SIZE);
        });
        scanned.map(|()| pages)
    };
    tracked.write(5);
    write(1).unwrap();
    assert!(scan(&tracked).is_err(), "it is not registered yet");
    let registered = tracked.write_protect.as_mut().unwrap();
    registered.add(address, 32 * PAGE_SIZE).unwrap();
    assert_eq!(scan(&tracked).unwrap(), Vec::from_iter(0..32), "the first scan protects them");
    write(1).unwrap();
    write(7).unwrap();
    assert_eq!((scan(&tracked).unwrap(), scan(&tracked).unwrap()), (vec![1, 7], vec![]));
    assert_eq!(tracked.scan(), [5]);

    let registered = tracked.write_protect.as_mut().unwrap();
    registered.remove(address, 32 * PAGE_SIZE).unwrap();
    assert!(scan(&tracked).is_err());
    write(1).unwrap();
    tracked.write(6);
    assert_eq!(tracked.scan(), [6]);
    // Whoever needs the mapping next can have it.
    let _next = WriteProtect::register(&[(address, 32 * PAGE_SIZE)]).unwrap();
}

/// True if this process has a mapping that reaches into these addresses.
fn is_mapped_within(start: u64, end: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |hex| u64::from_str_radix(hex, 16).unwrap();
    let mut ranges =
        maps.lines().map(|line| line.split(' ').next().unwrap().split_once('-').unwrap());
    ranges.any(|(from, to)| number(from) < end && number(to) > start)
}

#[test]
fn a_mapping_is_added_and_removed_as_a_whole_or_not_at_all() {
    let Some(mut tracked) = Tracked::scanned(64) else { return };
    let (address, length) = (tracked.address, tracked.length);
    let registered = tracked.write_protect.as_mut().unwrap();
    // It reaches into what is registered.
    for (start, length) in
        [(address, length), (address - PAGE_SIZE, 2 * PAGE_SIZE), (address + PAGE_SIZE, PAGE_SIZE)]
    {
        let error = registered.add(start, length).unwrap_err();
        assert!(matches!(error, UffdError::Overlap { other, .. } if other == address), "{error}");
    }
    // It is no mapping that was registered, but a part of one, or more.
    for (start, length) in [(address, PAGE_SIZE), (address, 2 * length), (address + 1, length)] {
        let error = registered.remove(start, length).unwrap_err();
        assert!(matches!(error, UffdError::NotRegistered { .. }), "{error}");
    }
    // Another userfaultfd has a part.
    let more = memory(&[(0, 16 * PAGE_SIZE)]);
    let start = start_of(&more);
    let other = WriteProtect::register(&[(start + 8 * PAGE_SIZE, PAGE_SIZE)]).unwrap();
    let error = registered.add(start, 16 * PAGE_SIZE).unwrap_err();
    let busy = UserfaultError::Register {
        address: start,
        length: 16 * PAGE_SIZE,
        purpose: "write protection",
        source: rustix::io::Errno::BUSY,
    };
    assert_eq!(format!("{error:?}"), format!("{:?}", UffdError::Userfault(busy)));
    let mut third = WriteProtect::register(&[(start, 8 * PAGE_SIZE)]).unwrap();
    assert!(third.add(start + 8 * PAGE_SIZE, PAGE_SIZE).is_err(), "the other still has its part");
    drop((other, third));
    // A part is not mapped.
    let (one, other) = (memory(&[(0, PAGE_SIZE)]), memory(&[(0, 1 << 40)]));
    let (start, end) = (start_of(&other), start_of(&one) + PAGE_SIZE);
    assert!(start + (1 << 40) < end, "the kernel looks for room from the top");
    drop(other);
    let error = chain(&registered.add(start, end - start).unwrap_err());
    // Another test of this process may have memory in between, which is refused for another reason.
    if !is_mapped_within(start, end - PAGE_SIZE) {
        assert!(error.ends_with("for write protection: Bad address (os error 14)"), "{error}");
    }
    let mut third = WriteProtect::register(&[(start_of(&one), PAGE_SIZE)]).unwrap();
    // It is unmapped before it is removed.
    let start = start_of(&one);
    drop(one);
    third.remove(start, PAGE_SIZE).unwrap();
    assert!(third.remove(start, PAGE_SIZE).is_err());

    tracked.write(9);
    assert_eq!(tracked.scan(), [9], "what was refused changed nothing");
}

#[test]
fn huge_pages_are_reported_whole_and_none_is_allocated() {
    const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(4) else { return };
    let tracked = Tracked::over(hugetlb_memfd(4 * HUGE_PAGE).unwrap(), 4 * HUGE_PAGE);
    tracked.write(0);
    tracked.write(2 * HUGE + 5);
    let blocks = tracked.blocks();
    let first = tracked.scan();
    assert!(
        (0..HUGE).chain(2 * HUGE..3 * HUGE).all(|page| first.binary_search(&page).is_ok()),
        "{first:?}"
    );
    tracked.scan();
    assert_eq!(tracked.scan(), [0; 0]);
    assert_eq!(tracked.blocks(), blocks);
    tracked.write(2 * HUGE + 6);
    tracked.write(3 * HUGE);
    assert_eq!(tracked.scan(), Vec::from_iter(2 * HUGE..4 * HUGE));
    assert_eq!(tracked.scan(), [0; 0]);
    tracked.punch(0, HUGE_PAGE);
    tracked.scan();
    tracked.write(1);
    assert_eq!(tracked.scan(), Vec::from_iter(0..HUGE));
}

/// Memory in huge pages of shared memory, mapped by entries for 2 MiB.
struct HugeMemory {
    guest: GuestMapping,
    length: u64,
    pagemap: Pagemap,
    _write_protect: WriteProtect,
}

impl HugeMemory {
    const PAGES: u64 = HUGE_PAGE / PAGE_SIZE;

    fn new(huge_pages: u64) -> Option<Self> {
        if !require::uffd() {
            return None;
        }
        let length = huge_pages * HUGE_PAGE;
        let file = File::from(memfd(length).unwrap());
        if !make_all_huge(&file).unwrap() {
            return None;
        }
        let guest = GuestMapping::new(&file, length as usize).unwrap();
        let write_protect = WriteProtect::register(&[(guest.address(), length)]).unwrap();
        let pagemap = Pagemap::new(write_protect.pagemap().try_clone_to_owned().unwrap()).unwrap();
        Some(Self { guest, length, pagemap, _write_protect: write_protect })
    }

    fn write(&self, page: u64) {
        self.guest.count((page * PAGE_SIZE) as usize);
    }

    fn address(&self, page: u64) -> u64 {
        self.guest.address() + page * PAGE_SIZE
    }

    fn pages(&self, start: u64, end: u64) -> std::ops::Range<u64> {
        let page = |address: u64| (address - self.guest.address()) / PAGE_SIZE;
        page(start)..page(end)
    }

    fn scan(&self) -> Vec<u64> {
        let mut found = Vec::new();
        let add = |start, end| found.extend(self.pages(start, end));
        self.pagemap.scan(self.guest.address(), self.length, add).unwrap();
        found
    }

    fn huge(&self, which: Huge) -> Vec<u64> {
        let mut found = Vec::new();
        let add = |start, end| found.extend(self.pages(start, end));
        self.pagemap.huge(which, self.guest.address(), self.length, add).unwrap();
        found
    }
}

#[test]
fn a_write_to_a_huge_page_reports_all_of_it_until_it_is_split() {
    const HUGE: u64 = HugeMemory::PAGES;
    let Some(memory) = HugeMemory::new(4) else { return };
    memory.write(0);
    memory.write(3 * HUGE);
    memory.scan();
    assert_eq!(memory.scan(), [0; 0]);
    memory.write(3 * HUGE + 5);
    assert_eq!(memory.scan(), Vec::from_iter(3 * HUGE..4 * HUGE));
    assert_eq!(memory.huge(Huge::All), Vec::from_iter((0..HUGE).chain(3 * HUGE..4 * HUGE)));
    // The kernel does not split what is protected.
    memory.pagemap.split(memory.address(3 * HUGE)).unwrap();
    assert_eq!(memory.huge(Huge::All), Vec::from_iter((0..HUGE).chain(3 * HUGE..4 * HUGE)));
    assert_eq!(memory.huge(Huge::Written), [0; 0]);
    memory.write(3 * HUGE + 6);
    assert_eq!(memory.huge(Huge::Written), Vec::from_iter(3 * HUGE..4 * HUGE));
    memory.pagemap.split(memory.address(3 * HUGE)).unwrap();
    assert_eq!(memory.huge(Huge::All), Vec::from_iter(0..HUGE));
    assert_eq!(memory.scan(), [0; 0], "what was written before the split is not reported");
    for page in [0, 255, 256, 511] {
        memory.write(3 * HUGE + page);
        assert_eq!(memory.scan(), [3 * HUGE + page]);
    }
}

/// A part of an entry for 2 MiB that is protected is single pages for ever, whatever the guest
/// touches.
#[test]
fn no_huge_page_comes_where_a_part_of_one_is_protected() {
    const HUGE: u64 = HugeMemory::PAGES;
    for touched_before in [true, false] {
        let Some(memory) = HugeMemory::new(2) else { return };
        if touched_before {
            memory.write(3);
            memory.write(HUGE);
        }
        memory.pagemap.protect_all(memory.address(HUGE / 2), HUGE / 2 * PAGE_SIZE).unwrap();
        memory.write(7);
        memory.write(HUGE / 2 + 7);
        let huge = if touched_before { HUGE..2 * HUGE } else { 0..0 };
        assert_eq!(memory.huge(Huge::All), Vec::from_iter(huge));
        let found = memory.scan();
        assert!([7, HUGE / 2 + 7].iter().all(|page| found.contains(page)), "{found:?}");
        memory.write(HUGE / 2 + 8);
        memory.write(8);
        assert_eq!(memory.scan(), [8, HUGE / 2 + 8]);
    }
}

const CHILD: &str = "PAGEFERRY_TEST_TRACKED_CHILD";
const CHILD_PAGES: u64 = 300;

/// Not a test of its own, but the VMM of `a_scan_works_from_another_process`. Its standard input
/// says which page to write.
#[test]
fn tracked_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let tracked = Tracked::new(CHILD_PAGES).unwrap();
    let mut out = std::io::stdout();
    writeln!(out, "\nmapped {}", tracked.address).unwrap();
    for line in std::io::stdin().lines() {
        tracked.write(line.unwrap().parse().unwrap());
        writeln!(out, "\nwritten").unwrap();
    }
}

#[test]
fn a_scan_works_from_another_process() {
    if !require::uffd() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tracking::tracked_child", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let commands = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap());
    let mut answer = |to: &str| loop {
        let mut line = String::new();
        assert_ne!(answers.read_line(&mut line).unwrap(), 0, "the child ended before it said {to}");
        if let Some(rest) = line.strip_prefix(to) {
            return rest.trim().to_owned();
        }
    };
    let address: u64 = answer("mapped").parse().unwrap();
    let pagemap =
        Pagemap::new(File::open(format!("/proc/{}/pagemap", child.id())).unwrap().into()).unwrap();
    let scan = || {
        let mut pages = Vec::new();
        let found =
            |start, end| pages.extend((start - address) / PAGE_SIZE..(end - address) / PAGE_SIZE);
        pagemap.scan(address, CHILD_PAGES * PAGE_SIZE, found).unwrap();
        pages
    };
    let mut write = |page: u64| {
        writeln!(&commands, "{page}").unwrap();
        answer("written");
    };
    write(0);
    assert!(scan().contains(&0));
    assert_eq!(scan(), [0; 0]);
    write(17);
    write(299);
    assert_eq!(scan(), [17, 299]);
    assert_eq!(scan(), [0; 0]);
    write(42);

    drop(commands);
    let mut rest = Vec::new();
    answers.read_to_end(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(scan(), [0; 0], "a VMM that has exited has nothing to report");
}
