// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory for unit tests.

use super::block::GuestLog;
use super::{Backing, Block, GuestMemory};
use crate::hooks::Hooks;
use crate::job::{Job, notifier};
use pageferry_protocol::control::job::{IncomingOptions, JobKind};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::mapping::MappedWords;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd, feature};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Memory with one block for each entry of `pages`, not mapped. The id of a block is its index.
pub(crate) fn memory(pages: &[u64]) -> GuestMemory {
    let block = |(id, pages): (u32, &u64)| {
        let length = pages * PAGE_SIZE;
        let backing = Backing::new(memfd(length), 0, length).unwrap();
        Arc::new(Block::new(geometry(id, length), backing, 0, None).unwrap())
    };
    GuestMemory::new((0..).zip(pages).map(block).collect(), BlockTable::new(), None)
}

/// Memory with a dirty log. The blocks lie side by side from guest address 0 on.
pub(crate) fn memory_with_log(pages: &[u64], log: GuestLog) -> GuestMemory {
    let mut gpa = 0;
    let block = |(id, pages): (u32, &u64)| {
        let length = pages * PAGE_SIZE;
        let geometry = BlockGeometry { gpa, ..geometry(id, length) };
        gpa += length;
        let backing = Backing::new(memfd(length), 0, length).unwrap();
        Arc::new(Block::new(geometry, backing, 0, None).unwrap())
    };
    let blocks = (0..).zip(pages).map(block).collect();
    GuestMemory::new(blocks, BlockTable::new(), Some(Arc::new(log)))
}

/// A job of a VMM without hooks. Its memory counts as one host page of 1 GiB.
pub(crate) fn gigantic() -> Arc<Job> {
    huge(1 << 30)
}

/// A job whose memory counts as one host page of `size` bytes.
pub(crate) fn huge(size: u64) -> Arc<Job> {
    let backing = Backing::new(memfd(size), 0, size).unwrap().with_huge_pages(size);
    let block = Block::new(geometry(0, size), backing, size, None).unwrap();
    job(GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None))
}

/// A job of a VMM without hooks.
pub(crate) fn job(memory: GuestMemory) -> Arc<Job> {
    job_of(JobKind::Incoming, Arc::new(memory))
}

/// A job of this kind, of a VMM without hooks.
pub(crate) fn job_of(kind: JobKind, memory: Arc<GuestMemory>) -> Arc<Job> {
    let (hooks, options) = (Arc::new(Hooks::new(None)), (&IncomingOptions::default()).into());
    Arc::new(Job::new(1, kind, memory, hooks, options, notifier().unwrap()).unwrap())
}

pub(crate) fn memfd(length: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    fd
}

fn geometry(id: u32, length: u64) -> BlockGeometry {
    let (name, gpa) = (format!("{id}"), u64::from(id) << 40);
    BlockGeometry { id, name, gpa, length, granularity: PAGE_SIZE }
}

/// A block that is mapped in this process and registered for missing faults.
pub(crate) struct Registered {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) uffd: Userfaultfd,
    mapping: MappedWords,
}

impl Registered {
    /// A registered block of `pages` pages. `None` if this process must not open a userfaultfd.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Self::with_features(pages, feature::MISSING_SHMEM)
    }

    /// The same, with these features of the userfaultfd.
    pub(crate) fn with_features(pages: u64, features: u64) -> Option<Self> {
        if !has_userfaultfd() {
            return None;
        }
        let length = pages * PAGE_SIZE;
        let fd = memfd(length);
        let mapping = MappedWords::shared(fd.as_fd(), 0, length).unwrap();
        let address = mapping.address_range().start as u64;
        let backing = Backing::new(fd, 0, length).unwrap();
        let block = Block::new(geometry(0, length), backing, address, None).unwrap();
        let uffd = Userfaultfd::open(features).unwrap();
        uffd.register(AddressRange { start: address, length }, RegisterMode::Missing).unwrap();
        let memory = GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None);
        Some(Self { memory: Arc::new(memory), uffd, mapping })
    }

    /// A duplicate of the userfaultfd, as an agent receives it.
    pub(crate) fn for_agent(&self) -> OwnedFd {
        self.uffd.as_fd().try_clone_to_owned().unwrap()
    }

    /// Frees a page as a VMM does that tells nobody: it punches the file, and gives up its mapping.
    #[allow(unsafe_code)]
    pub(crate) fn free_unannounced(&self, page: u64) {
        self.memory.blocks()[0].backing.punch(PageRange::new(page, 1)).unwrap();
        let start = self.mapping.address_range().start + (page * PAGE_SIZE) as usize;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the page is mapped as long as `self`, and its words are atomics, so that another
        // content is as good as a write of another thread.
        unsafe {
            rustix::mm::madvise(start, PAGE_SIZE as usize, rustix::mm::Advice::LinuxDontNeed)
        }
        .unwrap();
    }

    /// Touches a page as a guest does. Returns its first word.
    pub(crate) fn touch(&self, page: u64) -> u64 {
        self.mapping[(page * PAGE_SIZE / 8) as usize].load(Ordering::Relaxed)
    }

    /// The first word of a page, read from the file: nothing is touched.
    pub(crate) fn word(&self, page: u64) -> u64 {
        let mut word = [0; 8];
        self.memory.blocks()[0].backing.read(page * PAGE_SIZE, &mut word).unwrap();
        u64::from_le_bytes(word)
    }
}

/// True if this process can open a userfaultfd.
///
/// # Panics
/// If it cannot, and `PAGEFERRY_REQUIRE` names `uffd`.
pub(crate) fn has_userfaultfd() -> bool {
    let Err(error) = Userfaultfd::open(feature::MISSING_SHMEM) else { return true };
    assert!(!std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default().contains("uffd"), "{error}");
    eprintln!("skipped: {error}");
    false
}

/// Gives other threads time to go on when they should wait.
pub(crate) fn let_others_run() {
    (0..1000).for_each(|_| std::thread::yield_now());
}
