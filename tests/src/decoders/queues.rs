// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Queues of the agent's devices, as a guest may write them.
//!
//! An input is a descriptor table and the bytes of a buffer. It lies in guest memory, whose other
//! pages are filled, and the device takes it as from a driver. Afterwards a page may be freed only
//! if the buffer names it, found by a model that follows descriptors naively.

use super::heap::within;
use pageferry_agent::devices::access::SessionMemory;
use pageferry_agent::devices::back_end::Connection;
use pageferry_agent::devices::balloon::Balloon;
use pageferry_agent::devices::device::Device;
use pageferry_agent::devices::mem::port::{MemDevice, MemOptions};
use pageferry_agent::devices::mem::wire::{FEATURE_UNPLUGGED_INACCESSIBLE, REQUEST_SIZE};
use pageferry_agent::devices::port::DevicePort;
use pageferry_agent::devices::queues::Memory;
use pageferry_agent::memory::{Backing, Block, GuestMemory};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Pages of guest memory. A second block of as many is the region of virtio-mem.
const PAGES: u64 = 64;
/// The first of them have the queue and its buffer.
const OWN: u64 = 4;
/// Descriptors of the queue.
const SIZE: u16 = 16;
/// Guest physical addresses of the parts of the queue, and of the buffer's bytes.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const BYTES: u64 = 0x1000;
/// Most bytes of a buffer.
const MOST_BYTES: usize = 0x2000;
/// Guest physical address of the second block.
const REGION: u64 = 1 << 30;
/// Most memory that a device takes for a buffer: a list of 1 MiB of page numbers, and its runs.
const FAIR: usize = 32 << 20;

/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What the buffers of a queue do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// They have numbers of pages that are freed.
    Inflate,
    /// They free the pieces that the device may write.
    Report,
    /// An answer is written to the pieces that the device may write.
    Answer,
    /// They change nothing.
    Other,
}

#[derive(Debug)]
struct Session(Arc<GuestMemory>);

impl SessionMemory for Session {
    fn with_memory(&self, act: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
        act(&self.0);
        true
    }

    fn memory(&self) -> Option<Arc<GuestMemory>> {
        Some(self.0.clone())
    }
}

/// A device with a driver, which outlasts an input.
struct Scene {
    connection: Connection,
    device: Arc<dyn Device>,
    memory: Arc<GuestMemory>,
    rings: Vec<VringMutex<Memory>>,
    file: File,
    features: u64,
}

fn block(id: u32, gpa: u64, name: &str) -> Option<(Arc<Block>, OwnedFd)> {
    let length = PAGES * PAGE_SIZE;
    let fd = crate::files::memfd(length).ok()?;
    let backing = Backing::new(fd.try_clone().ok()?, 0, length).ok()?;
    let geometry = BlockGeometry { id, name: name.into(), gpa, length, granularity: PAGE_SIZE };
    Some((Arc::new(Block::new(geometry, backing, 0, None).ok()?), fd))
}

impl Scene {
    /// `None` if the kernel refuses.
    fn new(features: u64, device: fn(Arc<Session>) -> Arc<dyn Device>) -> Option<Self> {
        let (ram, file) = block(0, 0, "ram")?;
        let (region, _) = block(1, REGION, "region")?;
        region.discarded.set(region.all());
        let memory = Arc::new(GuestMemory::new(vec![ram, region], BlockTable::new(), None));
        let session = Arc::new(Session(memory.clone()));
        let device = device(session.clone());
        let port = DevicePort::new(device.clone(), session).ok()?;
        let (connection, _) = Connection::new(port);
        let file = File::from(file);
        let offset = FileOffset::new(file.try_clone().ok()?, 0);
        let length = (PAGES * PAGE_SIZE) as usize;
        let region = (GuestAddress(0), length, Some(offset));
        let mapped = Memory::new(GuestMemoryMmap::from_ranges_with_files([region]).ok()?);
        connection.update_memory(mapped.clone()).ok()?;
        let rings = (0..device.max_queues()).map(|_| VringMutex::new(mapped.clone(), 1024).ok());
        let rings: Vec<_> = rings.collect::<Option<_>>()?;
        for ring in &rings {
            ring.set_queue_size(SIZE);
            ring.set_queue_info(0, AVAILABLE, USED).ok()?;
            ring.set_queue_ready(true);
            ring.set_enabled(true);
        }
        for page in OWN..PAGES {
            file.write_all_at(&[0xee; PAGE_SIZE as usize], page * PAGE_SIZE).ok()?;
        }
        Some(Self { connection, device, memory, rings, file, features })
    }

    /// The device takes the input from a queue. True if it has returned or kept the buffer, and
    /// has freed something if that is what the buffers of the queue are for: a report is never
    /// wrong.
    fn run(&self, queue: usize, input: &Input<'_>, kind: Kind) -> bool {
        let mut own = vec![0; (OWN * PAGE_SIZE) as usize];
        own[..input.table.len()].copy_from_slice(input.table);
        own[BYTES as usize..BYTES as usize + input.bytes.len()].copy_from_slice(input.bytes);
        // One buffer is available, the one with head 0.
        own[AVAILABLE as usize + 2] = 1;
        let _ = self.file.write_all_at(&own, 0);
        // The driver sets the device up.
        self.connection.acked_features(self.features);
        let ring = &self.rings[queue];
        ring.set_queue_next_avail(0);
        ring.set_queue_next_used(0);
        let event = within(FAIR, || {
            self.connection.handle_event(queue as u16, EventSet::IN, &self.rings, 0)
        });
        assert!(event.is_ok(), "the thread of the queues would end: {event:?}");
        let freed = self.check_pages(&own, kind);
        let mut used = [0; 2];
        let _ = self.file.read_exact_at(&mut used, USED + 2);
        let is_taken = used != [0; 2] || self.device.forget_kept(queue) > 0;
        is_taken && (kind != Kind::Report || freed > 0)
    }

    /// Only what the buffer names is freed. It is filled again. Returns how many pages.
    fn check_pages(&self, own: &[u8], kind: Kind) -> u64 {
        let (named, mut freed) = (named(own, kind), 0);
        for page in OWN..PAGES {
            let mut word = [0; 8];
            let _ = self.file.read_exact_at(&mut word, page * PAGE_SIZE);
            if word != [0xee; 8] {
                assert!(named.contains(&page), "page {page} is changed: {named:?}");
                assert!(word == [0; 8] || kind == Kind::Answer, "page {page} is written");
                let _ = self.file.write_all_at(&[0xee; PAGE_SIZE as usize], page * PAGE_SIZE);
                freed += 1;
            }
        }
        freed
    }
}

/// A descriptor table, and the bytes of a buffer.
struct Input<'a> {
    table: &'a [u8],
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// The first byte says how many descriptors there are.
    fn of(data: &'a [u8]) -> Self {
        let (first, rest) = super::choice(data);
        let table = (usize::from(first % SIZE as u8) + 1) * 16;
        let (table, bytes) = rest.split_at(table.min(rest.len()));
        Self { table, bytes: &bytes[..bytes.len().min(MOST_BYTES)] }
    }
}

/// The pages that a buffer names: those of every descriptor that can be reached, however wrong the
/// buffer is.
fn named(own: &[u8], kind: Kind) -> BTreeSet<u64> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut at = 0;
    for _ in 0..SIZE {
        let bytes = &own[usize::from(at) * 16..][..16];
        let number = |from: usize, length: usize| {
            bytes[from..from + length].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
        };
        let (gpa, length, flags, next) =
            (number(0, 8), number(8, 4), number(12, 2) as u16, number(14, 2) as u16);
        if flags & WRITE == 0 { &mut readable } else { &mut writable }.push((gpa, length));
        if flags & NEXT == 0 || next >= SIZE {
            break;
        }
        at = next;
    }
    match kind {
        Kind::Other => BTreeSet::new(),
        Kind::Report | Kind::Answer => writable
            .iter()
            .flat_map(|(gpa, length)| {
                let end = gpa.saturating_add(*length).min(PAGES * PAGE_SIZE);
                gpa / PAGE_SIZE..end.div_ceil(PAGE_SIZE)
            })
            .collect(),
        Kind::Inflate => {
            let filled = |page: u64| if page < OWN { None } else { Some(0xee) };
            let byte = |at: u64| filled(at / PAGE_SIZE).unwrap_or_else(|| own[at as usize]);
            let bytes: Vec<u8> = readable
                .iter()
                .flat_map(|(gpa, length)| *gpa..gpa.saturating_add(*length))
                .take_while(|at| *at < PAGES * PAGE_SIZE)
                .map(byte)
                .collect();
            let (numbers, _) = bytes.as_chunks::<4>();
            numbers.iter().map(|number| u32::from_le_bytes(*number).into()).collect()
        }
    }
}

/// All features of the balloon, so that each queue has its number in the specification.
const BALLOON: u64 = 0x3e | 1 << 32;

thread_local! {
    static BALLOON_SCENE: RefCell<Option<Scene>> = const { RefCell::new(None) };
    static MEM_SCENE: RefCell<Option<Scene>> = const { RefCell::new(None) };
}

fn balloon(data: &[u8], queue: usize, kind: Kind) -> bool {
    BALLOON_SCENE.with_borrow_mut(|scene| {
        if scene.is_none() {
            *scene = Scene::new(BALLOON, |_| Arc::new(Balloon::default()));
        }
        scene.as_ref().is_some_and(|scene| scene.run(queue, &Input::of(data), kind))
    })
}

/// Buffers with pages that go into the balloon.
pub fn balloon_inflate(data: &[u8]) -> bool {
    balloon(data, 0, Kind::Inflate)
}

/// Buffers with pages that come out of the balloon.
pub fn balloon_deflate(data: &[u8]) -> bool {
    balloon(data, 1, Kind::Other)
}

/// Buffers with statistics.
pub fn balloon_statistics(data: &[u8]) -> bool {
    balloon(data, 2, Kind::Other)
}

/// Buffers with hints.
pub fn balloon_hints(data: &[u8]) -> bool {
    balloon(data, 3, Kind::Other)
}

/// Buffers with reports.
pub fn balloon_reports(data: &[u8]) -> bool {
    balloon(data, 4, Kind::Report)
}

/// Buffers with requests to plug memory.
pub fn mem_requests(data: &[u8]) -> bool {
    MEM_SCENE.with_borrow_mut(|scene| {
        if scene.is_none() {
            let made = Scene::new(FEATURE_UNPLUGGED_INACCESSIBLE | 1 << 32, |session| {
                let options = MemOptions { block: "region".into(), block_size: PAGE_SIZE };
                let device = MemDevice::new(options, session);
                let _ = device.set_requested_size(PAGES / 2 * PAGE_SIZE);
                Arc::new(device)
            });
            *scene = made;
        }
        let Some(scene) = scene else { return false };
        let accepted = scene.run(0, &Input::of(data), Kind::Answer);
        // The operator's limit holds, and all bookkeeping agrees.
        let discarded = &scene.memory.blocks()[1].discarded;
        let plugged = (0..PAGES).filter(|page| !discarded.contains(*page)).count() as u64;
        assert!(plugged <= PAGES / 2, "{plugged} pages are plugged");
        let config = scene.device.config();
        let (fields, _) = config.as_chunks::<8>();
        assert_eq!(
            fields.get(5).map(|field| u64::from_le_bytes(*field)),
            Some(plugged * PAGE_SIZE)
        );
        // The next input finds it as this one did.
        discarded.set(PageRange::new(0, PAGES));
        accepted
    })
}

/// An input of these descriptors: address, length, and whether the device writes.
fn input(pieces: &[(u64, u32, bool)], bytes: &[u8]) -> Vec<u8> {
    let mut all = vec![pieces.len() as u8 - 1];
    for (at, (gpa, length, is_writable)) in (1u16..).zip(pieces) {
        let next = if usize::from(at) < pieces.len() { NEXT } else { 0 };
        let flags = next | if *is_writable { WRITE } else { 0 };
        all.extend_from_slice(&gpa.to_le_bytes());
        all.extend_from_slice(&length.to_le_bytes());
        all.extend_from_slice(&flags.to_le_bytes());
        all.extend_from_slice(&at.to_le_bytes());
    }
    all.extend_from_slice(bytes);
    all
}

/// Numbers of pages: some here, some not, in one piece and in two.
pub fn page_number_seeds() -> Vec<Vec<u8>> {
    let numbers: Vec<u8> = [5u32, 4, 6, 9, 63, 64, 1 << 20, u32::MAX]
        .iter()
        .flat_map(|page| page.to_le_bytes())
        .collect();
    vec![
        input(&[(BYTES, 32, false)], &numbers),
        input(&[(BYTES, 14, false), (BYTES + 14, 18, false)], &numbers),
        input(&[(BYTES, 0, false), (BYTES, 8, false), (BYTES, 8, true)], &numbers),
    ]
}

/// Three values.
pub fn statistics_seeds() -> Vec<Vec<u8>> {
    let values = [[4, 0, 0, 16, 0, 0, 0, 0, 0, 0], [5, 0, 1, 0, 0, 0, 0, 0, 0, 0], [99; 10]];
    vec![input(&[(BYTES, 30, false)], &values.concat()), input(&[(BYTES, 7, false)], &[1; 7])]
}

/// The number of a round, and pages.
pub fn hint_seeds() -> Vec<Vec<u8>> {
    vec![
        input(&[(BYTES, 4, false)], &2u32.to_le_bytes()),
        input(&[(8 * PAGE_SIZE, 2 * PAGE_SIZE as u32, true)], &[]),
        input(&[(BYTES, 4, false), (8 * PAGE_SIZE + 7, 4096, true)], &2u32.to_le_bytes()),
    ]
}

/// Pages, parts of pages, and pages that are not there.
pub fn report_seeds() -> Vec<Vec<u8>> {
    let page = PAGE_SIZE as u32;
    vec![
        input(&[(8 * PAGE_SIZE, 4 * page, true), (20 * PAGE_SIZE, page, true)], &[]),
        input(&[(8 * PAGE_SIZE + 7, page, true), ((PAGES - 1) * PAGE_SIZE, 2 * page, true)], &[]),
    ]
}

/// A request of each type.
pub fn mem_request_seeds() -> Vec<Vec<u8>> {
    let request = |kind: u8, count: u8| {
        let mut bytes = vec![0; REQUEST_SIZE];
        bytes[0] = kind;
        bytes[8..16].copy_from_slice(&(REGION + 3 * PAGE_SIZE).to_le_bytes());
        bytes[16] = count;
        let answer = (BYTES + 0x800, 10, true);
        input(&[(BYTES, REQUEST_SIZE as u32, false), answer], &bytes)
    };
    [(0, 4), (1, 4), (2, 0), (3, 4), (0, 40), (9, 1)]
        .map(|(kind, count)| request(kind, count))
        .into()
}
