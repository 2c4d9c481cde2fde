// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of restores into memory of this process, with a thread as the VMM.

mod eager;
mod fault_reads;
mod lazy;
mod working_set;

use super::*;
use crate::hooks::Hooks;
use crate::hooks::state_file_of;
use crate::image::writer::{Base, ImageMetadata};
use crate::image::{ImageKey, ImageWriter};
use crate::job::CommonOptions;
use crate::memory::PageBuffer;
use crate::memory::test_support::has_userfaultfd;
use crate::memory::{Backing, Block, GuestMemory};
use crate::restore::reset::{DiscardsSinceRequest, RecordDiscards};
use pageferry_protocol::control::FrameSocket;
use pageferry_protocol::control::frame::FLAG_REPLY;
use pageferry_protocol::control::hook_reply::encode_hook_reply;
use pageferry_protocol::control::job::{JobKind, JobStatus};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::mapping::MappedWords;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd, feature};
use rustix::fs::MemfdFlags;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const PAGE: usize = PAGE_SIZE as usize;
/// Number of words in a page.
const WORDS: usize = PAGE / 8;

/// The state of a page in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Zero,
    Discarded,
    Content,
    /// As in the base.
    Unchanged,
}

/// The value of every word of page `page` of block `id`.
fn word_of(id: u32, page: u64) -> u64 {
    (u64::from(id) << 40 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// The blocks of a guest, in the order in which a VMM might add them.
fn geometries(pages: &[u64]) -> Vec<BlockGeometry> {
    let block = |(id, pages): (u32, &u64)| BlockGeometry {
        id,
        name: format!("ram{id}"),
        // The block added last comes first in the guest.
        gpa: u64::from(9 - id) << 40,
        length: pages * PAGE_SIZE,
        granularity: PAGE_SIZE,
    };
    (0..).zip(pages).map(block).collect()
}

fn table(geometries: &[BlockGeometry]) -> BlockTable {
    let mut table = BlockTable::new();
    geometries.iter().for_each(|block| table.insert(block.clone(), 512).unwrap());
    table
}

/// Writes an image. `page(id, page)` is the state of each page. The words of a page with content
/// are [`word_of`] plus `version`.
fn write_image(
    path: &Path, geometries: &[BlockGeometry], base: &Base, version: u64,
    page: impl Fn(u32, u64) -> Page,
) -> Base {
    let table = table(geometries);
    let writer = ImageWriter::create(path, &table, true, true).unwrap();
    let mut buffer = PageBuffer::new(2 << 20);
    let (mut discarded, mut changed) = (Vec::new(), Vec::new());
    for (at, block) in table.blocks().iter().enumerate() {
        discarded.push(MappedBitmap::private(block.pages()).unwrap());
        changed.push(MappedBitmap::private(block.pages()).unwrap());
        for first in (0..block.pages()).step_by(512) {
            let count = (block.pages() - first).min(512);
            for page_index in first..first + count {
                let kind = page(block.id, page_index);
                let word = if kind == Page::Content {
                    word_of(block.id, page_index).wrapping_add(version)
                } else {
                    0
                };
                let start = (page_index - first) as usize * PAGE;
                buffer[start..start + PAGE]
                    .chunks_mut(8)
                    .for_each(|bytes| bytes.copy_from_slice(&word.to_le_bytes()));
                let one = PageRange::new(page_index, 1);
                if kind == Page::Discarded {
                    discarded[at].set(one);
                }
                if kind != Page::Unchanged {
                    changed[at].set(one);
                }
            }
            writer
                .put(at, PageRange::new(first, count), &mut buffer[..count as usize * PAGE])
                .unwrap();
        }
    }
    let id = writer.id();
    let changed = (*base != Base::default()).then_some(changed.as_slice());
    let pieces = vec![PieceSize { name: "devices".into(), length: 3 }];
    let state = state_file_of([&b"abc"[..]]).unwrap();
    writer
        .finish(
            ImageMetadata { guest: RunState::Running, discarded: &discarded, changed },
            base,
            pieces,
            Some(state.as_fd()),
        )
        .unwrap();
    Base { id, name: path.to_str().unwrap().into() }
}

/// An image, and empty memory with the same blocks.
struct Saved {
    folder: tempfile::TempDir,
    path: PathBuf,
    ram: Arc<Ram>,
}

impl Saved {
    /// Blocks of these numbers of pages. `page(id, page)` is the state of each page.
    fn new(pages: &[u64], page: impl Fn(u32, u64) -> Page) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let geometries = geometries(pages);
        write_image(&path, &geometries, &Base::default(), 0, page);
        Self { folder, path, ram: Arc::new(Ram::new(&geometries)) }
    }
}

/// The memory of a VMM, and the VMM's own mappings of it.
struct Ram {
    memory: Arc<GuestMemory>,
    mappings: Vec<MappedWords>,
}

impl Ram {
    fn new(geometries: &[BlockGeometry]) -> Self {
        let mut mappings = Vec::new();
        let block = |geometry: &BlockGeometry| {
            let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, geometry.length).unwrap();
            let mapping = MappedWords::shared(fd.as_fd(), 0, geometry.length).unwrap();
            let address = mapping.address_range().start as u64;
            mappings.push(mapping);
            let backing = Backing::new(fd, 0, geometry.length).unwrap();
            Arc::new(Block::new(geometry.clone(), backing, address, None).unwrap())
        };
        let blocks = geometries.iter().map(block).collect();
        Self { memory: Arc::new(GuestMemory::new(blocks, table(geometries), None)), mappings }
    }

    fn block(&self, at: usize) -> &Block {
        &self.memory.blocks()[at]
    }

    /// Touches a page like the guest does. Returns its first word.
    fn touch(&self, at: usize, page: u64) -> u64 {
        self.mappings[at][page as usize * WORDS].load(Ordering::Acquire)
    }

    fn allocated(&self, at: usize) -> Vec<PageRange> {
        let block = self.block(at);
        let mut found: Vec<PageRange> = Vec::new();
        let mut rest = block.all();
        // Page by page, because the walk over runs counts small holes as data.
        while let Some(page) = block.backing.first_data(rest).unwrap() {
            match found.last_mut() {
                Some(last) if last.end() == page => last.count += 1,
                _ => found.push(PageRange::new(page, 1)),
            }
            rest = PageRange::new(page + 1, block.geometry.pages() - page - 1);
        }
        found
    }

    /// Checks that content is in its place, that all other pages are holes, and that exactly the
    /// discarded pages are marked as discarded.
    fn check(&self, model: impl Fn(u32, u64) -> (Page, u64)) {
        for (at, block) in self.memory.blocks().iter().enumerate() {
            let (id, mut bytes) = (block.geometry.id, vec![0; PAGE]);
            let allocated: u64 = self.allocated(at).iter().map(|run| run.count).sum();
            let pages = 0..block.geometry.pages();
            let expected = pages.clone().filter(|page| model(id, *page).0 == Page::Content).count();
            assert_eq!(allocated, expected as u64, "allocated pages of block {id}");
            for page in pages {
                let (kind, version) = model(id, page);
                block.backing.read(page * PAGE_SIZE, &mut bytes).unwrap();
                let word =
                    if kind == Page::Content { word_of(id, page).wrapping_add(version) } else { 0 };
                assert!(
                    bytes.chunks(8).all(|bytes| bytes == word.to_le_bytes()),
                    "page {page} of block {id}: {kind:?}"
                );
                assert_eq!(
                    block.discarded.contains(page),
                    kind == Page::Discarded,
                    "page {page} of block {id}"
                );
            }
        }
    }

    /// Checks that all memory is empty, and that exactly the pages for which `discarded` holds are
    /// marked as discarded.
    fn check_empty(&self, discarded: impl Fn(u32, u64) -> bool) {
        for (at, block) in self.memory.blocks().iter().enumerate() {
            assert_eq!(self.allocated(at), []);
            let id = block.geometry.id;
            for page in 0..block.geometry.pages() {
                assert_eq!(
                    block.discarded.contains(page),
                    discarded(id, page),
                    "page {page} of block {id}"
                );
            }
        }
    }

    fn discard(&self, id: u32, range: PageRange) {
        let range = BlockRange { block: id, offset: range.offset(), length: range.bytes() };
        self.memory.discard(&[range], true).unwrap();
    }
}

/// A VMM that answers hooks with `answer`, and records their names.
struct Vmm {
    hooks: Arc<Hooks>,
    asked: Arc<Mutex<Vec<&'static str>>>,
    _thread: std::thread::JoinHandle<()>,
}

impl Vmm {
    fn new(
        ram: &Arc<Ram>, mut answer: impl FnMut(&Ram, &Hook) -> Reply<()> + Send + 'static,
    ) -> Self {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let asked: Arc<Mutex<Vec<&'static str>>> = Arc::default();
        let (log, ram) = (asked.clone(), ram.clone());
        let run = move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            let far = || Instant::now() + Duration::from_secs(60);
            // Dropping it unregisters the memory.
            let mut registered = None;
            while let Ok(frame) = socket.recv(far()) {
                let (sequence, hook) = Hook::decode(frame.request, &frame.body).unwrap().unwrap();
                if matches!(hook, Hook::Event { .. }) {
                    continue;
                }
                // This hook comes before all others and changes nothing, so it is not recorded.
                if !matches!(hook, Hook::ProbeFaults) {
                    log.lock().unwrap().push(hook.name());
                }
                let reply = answer(&ram, &hook);
                match hook {
                    Hook::RegisterFaults if reply.is_ok() => registered = Some(register(&ram)),
                    // A real client would stop a guest that lost memory. The test goes on with it.
                    Hook::UnregisterFaults { .. } => registered = unregister(&ram, registered),
                    _ => {}
                }
                let fds = registered
                    .iter()
                    .filter(|_| matches!(hook, Hook::RegisterFaults))
                    .map(AsFd::as_fd);
                let fds: Vec<_> = fds.collect();
                let body = encode_hook_reply(sequence, &reply);
                socket.send_parts(frame.request, FLAG_REPLY, &body, &fds, far()).unwrap();
            }
        };
        let thread = std::thread::spawn(run);
        Self { hooks: Arc::new(Hooks::new(Some(ours.into()))), asked, _thread: thread }
    }

    /// A VMM that agrees to every hook.
    fn willing(ram: &Arc<Ram>) -> Self {
        Self::new(ram, |_, _| Ok(()))
    }

    fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().unwrap().clone()
    }
}

fn ranges(ram: &Ram) -> impl Iterator<Item = AddressRange> + '_ {
    let blocks = ram.memory.blocks().iter();
    blocks.map(|block| AddressRange { start: block.vmm_address, length: block.geometry.length })
}

fn register(ram: &Ram) -> Userfaultfd {
    let uffd = Userfaultfd::open(feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS).unwrap();
    ranges(ram).for_each(|range| uffd.register(range, RegisterMode::Missing).unwrap());
    uffd
}

/// Unregisters the memory. Threads that wait look again, and find a hole where no page was placed.
fn unregister(ram: &Ram, registered: Option<Userfaultfd>) -> Option<Userfaultfd> {
    let uffd = registered?;
    ranges(ram).for_each(|range| uffd.unregister(range).unwrap());
    None
}

fn new_job(ram: &Ram, vmm: &Vmm, bandwidth: u64) -> Arc<Job> {
    job_with(ram, vmm, CommonOptions { bandwidth, hook_timeout: Duration::from_secs(10) })
}

fn job_with(ram: &Ram, vmm: &Vmm, options: CommonOptions) -> Arc<Job> {
    let notify = crate::job::notifier().unwrap();
    let job = Job::new(1, JobKind::Restore, ram.memory.clone(), vmm.hooks.clone(), options, notify)
        .unwrap();
    job.refuse_populates();
    Arc::new(job)
}

/// A restore for a VMM that did not discard since the request.
fn plan(path: impl Into<PathBuf>, options: RestoreOptions) -> RestorePlan {
    RestorePlan {
        path: path.into(),
        options,
        needs_vmm_consent: false,
        record_discards: RecordDiscards::FromPause,
        checkpoint: Default::default(),
    }
}

fn restore_from(path: &Path, ram: &Ram, vmm: &Vmm, options: RestoreOptions) -> JobStatus {
    let job = new_job(ram, vmm, options.bandwidth);
    run(&job, &plan(path, options));
    job.status()
}

/// The same of an agent with a key.
fn restore_sealed(
    path: &Path, ram: &Ram, vmm: &Vmm, options: RestoreOptions, key: &ImageKey,
) -> JobStatus {
    let job = Arc::into_inner(new_job(ram, vmm, options.bandwidth)).unwrap();
    let job = Arc::new(job.with_image_key(Some(key.clone())));
    run(&job, &plan(path, options));
    job.status()
}
