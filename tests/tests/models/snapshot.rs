// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A background snapshot is a consistent cut: every page is as it was at the instant, and none is
//! newer, whatever the guest writes, discards, frees and populates meanwhile. So is each increment
//! to it, also after cancelled attempts. The model is a few maps.
//!
//! Several threads write stamps through the protected mapping, each to its own pages. Another
//! thread discards, frees and populates. When the VMM is asked to pause, the model records what
//! every page holds: the image must hold the same. Discards, frees and populates that are under way
//! at that moment may be in the image or not.

use crate::blocks::{self, LOG_COVERS, Page};
use crate::seeds;
use pageferry_agent::image::Chain;
use pageferry_client::{
    BlockRange, Client, Config, HookError, HookThread, Hooks, Phase, Punch, RestoreOptions,
    RunState, SnapshotMode, SnapshotOptions, StatePiece,
};
use pageferry_protocol::control::job::MIN_CAPTURE_MEMORY;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory, of_clone};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
/// Number of threads that write.
const WRITERS: u64 = 2;
/// A bandwidth limit in bytes per second that makes a snapshot slow.
const SLOW: u64 = 64 << 20;

fn layouts() -> Vec<BlockLayout> {
    blocks::layouts(1577)
}

fn all_pages() -> impl Iterator<Item = Page> {
    layouts()
        .into_iter()
        .flat_map(|layout| (0..layout.length / PAGE_SIZE).map(move |page| (layout.id, page)))
}

/// The writer of a page.
fn writer_of((id, page): Page) -> u64 {
    (u64::from(id) + page / 3) % WRITERS
}

/// A state that a page may have in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Is {
    Discarded,
    /// The stamp, or 0 for a zero page.
    Holds(u64),
}

/// The pages of one writer.
#[derive(Debug, Default)]
struct Part {
    /// Settled pages. A page that is not here was never written.
    pages: BTreeMap<Page, Is>,
    /// Other states that a page may have because of discards, frees and populates that are under
    /// way or began while the guest was paused.
    unsettled: BTreeMap<Page, BTreeSet<Is>>,
    /// Pages that are being discarded, freed or populated. No thread writes to them.
    busy: BTreeSet<Page>,
}

/// The expected image: the allowed states of each page.
type Cut = BTreeMap<Page, BTreeSet<Is>>;

/// A guest whose writes, discards, frees and populates are known.
struct World {
    memory: TestMemory,
    parts: Vec<Mutex<Part>>,
    paused: AtomicBool,
    stamp: AtomicU64,
    cut: Mutex<Cut>,
}

impl World {
    fn new(memory: TestMemory, pages: BTreeMap<Page, Is>) -> Self {
        let mut parts: Vec<Part> = (0..WRITERS).map(|_| Part::default()).collect();
        let stamp = AtomicU64::new(pages.len() as u64);
        for (page, is) in pages {
            parts[writer_of(page) as usize].pages.insert(page, is);
        }
        let parts = parts.into_iter().map(Mutex::new).collect();
        let (paused, cut) = (AtomicBool::new(false), Mutex::default());
        Self { memory, parts, paused, stamp, cut }
    }

    fn part(&self, page: Page) -> MutexGuard<'_, Part> {
        self.parts[writer_of(page) as usize].lock().unwrap()
    }

    fn is(part: &Part, page: Page) -> Is {
        part.pages.get(&page).copied().unwrap_or(Is::Holds(0))
    }

    fn is_hole(&self, page: Page) -> bool {
        self.memory.block(page.0).unwrap().is_hole(PageRange::new(page.1, 1)).unwrap()
    }

    /// A thread writes to one of its pages, unless the guest is paused.
    fn write(&self, chance: &mut Random, page: Page) {
        let mut part = self.part(page);
        if self.paused.load(Ordering::SeqCst)
            || Self::is(&part, page) == Is::Discarded
            || part.busy.contains(&page)
        {
            return;
        }
        let stamp =
            if chance.one_in(8) { 0 } else { self.stamp.fetch_add(1, Ordering::SeqCst) + 1 };
        let block = self.memory.block(page.0).unwrap();
        block.store(page.1 * PAGE_SIZE, stamp).unwrap();
        block.store((page.1 + 1) * PAGE_SIZE - 8, stamp).unwrap();
        block.mark(PageRange::new(page.1, 1));
        part.pages.insert(page, Is::Holds(stamp));
    }

    /// Discards, frees or populates pages. Until the acknowledgement both states are allowed.
    fn change(&self, chance: &mut Random, client: &Client) {
        let layouts = layouts();
        let layout = &layouts[chance.below(layouts.len() as u64) as usize];
        let pages = layout.length / PAGE_SIZE;
        let first = chance.below(pages);
        let longest = (pages - first).min(1 + chance.below(200));
        let range = PageRange::new(first, 1 + chance.below(longest));
        let all = || (range.first..range.end()).map(|page| (layout.id, page));
        let way = chance.below(3);
        let after = |before: Is| match before {
            _ if way == 0 => Is::Discarded,
            // Discarded pages stay discarded.
            before if way == 1 => {
                if before == Is::Discarded {
                    before
                } else {
                    Is::Holds(0)
                }
            }
            Is::Discarded => Is::Holds(0),
            holds @ Is::Holds(_) => holds,
        };
        for page in all() {
            let mut part = self.part(page);
            let before = Self::is(&part, page);
            part.unsettled.entry(page).or_default().extend([before, after(before)]);
            part.busy.insert(page);
        }
        let given =
            [BlockRange { block: layout.id, offset: range.offset(), length: range.bytes() }];
        match way {
            0 => client.discard(&given, Punch::Yes).unwrap(),
            1 => client.free(&given).unwrap(),
            _ => client.populate(&given).unwrap(),
        };
        if way == 1 {
            // No thread writes there yet.
            all().for_each(|page| assert!(self.is_hole(page), "page {page:?} was freed"));
        }
        for page in all() {
            let mut part = self.part(page);
            let now = after(Self::is(&part, page));
            part.pages.insert(page, now);
            part.busy.remove(&page);
            if !self.paused.load(Ordering::SeqCst) {
                part.unsettled.remove(&page);
            }
        }
    }

    fn pause(&self) {
        let parts: Vec<_> = self.parts.iter().map(|part| part.lock().unwrap()).collect();
        self.paused.store(true, Ordering::SeqCst);
        drop(parts);
    }

    /// Changes that are under way may be in the image or not. All other pages must be as in the
    /// model.
    fn resume(&self) {
        let mut parts: Vec<_> = self.parts.iter().map(|part| part.lock().unwrap()).collect();
        let cut = all_pages().map(|page| {
            let part = &parts[writer_of(page) as usize];
            let mut may = part.unsettled.get(&page).cloned().unwrap_or_default();
            may.insert(Self::is(part, page));
            (page, may)
        });
        *self.cut.lock().unwrap() = cut.collect();
        // Changes that are still under way stay unsettled. Their acknowledgement removes them.
        for part in &mut parts {
            let Part { unsettled, busy, .. } = &mut **part;
            unsettled.retain(|page, _| busy.contains(page));
        }
        self.paused.store(false, Ordering::SeqCst);
    }
}

struct Vmm(Arc<OnceLock<World>>);

impl Hooks for Vmm {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.0.get().unwrap().pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.get().unwrap().resume();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(vec![StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }])
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}

/// Saves a guest in which some pages have stamps. Returns the stamps.
fn save_stamps(chance: &mut Random, path: &Path) -> BTreeMap<Page, Is> {
    let world = Arc::new(OnceLock::new());
    let (_agent, client, hooks) = attach(Vmm(world.clone()));
    let memory = TestMemory::new(layouts()).unwrap();
    let world = world.get_or_init(|| World::new(memory, BTreeMap::new()));
    world.memory.add_to(&client).unwrap();
    for page in all_pages() {
        if chance.one_in(2) {
            world.write(chance, page);
        }
    }
    client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let started = client.start_snapshot(path, &options).unwrap();
    assert_eq!(client.wait(started.job, SOON).unwrap().phase, Phase::Completed);
    drop(client);
    hooks.join();
    world.parts.iter().flat_map(|part| part.lock().unwrap().pages.clone()).collect()
}

/// Checks that every page of the image has one of its allowed states.
fn check_cut(cut: &Cut, path: &Path) {
    let chain = Chain::open(path).unwrap();
    let mut bytes = vec![0; PAGE_SIZE as usize];
    for (at, block) in chain.table().blocks().iter().enumerate() {
        for page in 0..block.pages() {
            chain.read(at, PageRange::new(page, 1), &mut bytes).unwrap();
            let (head, tail) = (&bytes[..8], &bytes[PAGE_SIZE as usize - 8..]);
            assert_eq!(head, tail, "page {page:#x} of block {} is torn", block.id);
            let stamp = u64::from_le_bytes(head.try_into().unwrap());
            let is =
                if chain.discarded(at).contains(page) { Is::Discarded } else { Is::Holds(stamp) };
            let may = &cut[&(block.id, page)];
            assert!(
                may.contains(&is),
                "page {page:#x} of block {}: is {is:?}, may be {may:?}",
                block.id
            );
            assert!(
                is != Is::Discarded || stamp == 0,
                "page {page:#x} of block {}: discarded, and {stamp}",
                block.id
            );
        }
    }
    let state = chain.newest().state().unwrap();
    assert_eq!(state, vec![5; 3000]);
}

/// Checks that the memory holds what was written, and that nothing is protected any more.
fn check_guest(world: &World) {
    for page in all_pages() {
        let part = world.part(page);
        let block = world.memory.block(page.0).unwrap();
        match World::is(&part, page) {
            Is::Holds(stamp) => {
                assert_eq!(block.read_word(page.1 * PAGE_SIZE).unwrap(), stamp, "page {page:?}")
            }
            Is::Discarded => assert!(world.is_hole(page), "page {page:?}"),
        }
    }
}

/// Pages that were saved before a write and before a discard, in all cases.
#[derive(Default)]
struct Aside {
    captured: AtomicU64,
    rescued: AtomicU64,
    /// Snapshots whose memory for captured pages was too little for all of them at once.
    scarce: AtomicU64,
}

/// A VMM on an agent of its own, without its blocks. The agent ends after its client.
fn attach(vmm: Vmm) -> (InProcessAgent, Client, HookThread<Vmm>) {
    let (agent, socket) = InProcessAgent::start().unwrap();
    let config = Config { log_covers: LOG_COVERS, ..Config::default() };
    let (client, channel) = Client::from_socket(socket, config).unwrap();
    let hooks = channel.spawn(vmm).unwrap();
    (agent, client, hooks)
}

fn run_case(seed: u64, (mode, is_clone): (SnapshotMode, bool), aside: &Aside) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let world = Arc::new(OnceLock::new());
    let (agent, client, hooks) = attach(Vmm(world.clone()));
    let cloned = folder.path().join("cloned");
    let world = world.get_or_init(|| match is_clone {
        false => World::new(TestMemory::new(layouts()).unwrap(), BTreeMap::new()),
        true => {
            let pages = save_stamps(&mut chance, &cloned);
            let layouts = of_clone(&client, &cloned, layouts()).unwrap();
            World::new(TestMemory::new(layouts).unwrap(), pages)
        }
    });
    world.memory.add_to(&client).unwrap();
    client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
    if is_clone {
        let options = RestoreOptions { shared_base: true, ..RestoreOptions::default() };
        let started = client.start_restore(&cloned, &options).unwrap();
        assert_eq!(client.wait(started.job, SOON).unwrap().phase, Phase::Completed);
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _over = Over(&over);
        for writer in 0..WRITERS {
            let mut chance = Random::new(seed ^ writer << 32 ^ 1);
            let own: Vec<Page> = all_pages().filter(|page| writer_of(*page) == writer).collect();
            let (world, over) = (world, &over);
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let page = own[chance.below(own.len() as u64) as usize];
                    world.write(&mut chance, page);
                }
            });
        }
        let mut changes = Random::new(seed ^ 2);
        let (changer, over) = (client.clone(), &over);
        let changing = world;
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                changing.change(&mut changes, &changer);
            }
        });
        let mut base = String::new();
        for number in 0..4 {
            let path = folder.path().join(format!("image{number}"));
            // With the least, captured pages also leave in batches.
            let is_scarce = chance.one_in(2);
            let capture_memory = if is_scarce { MIN_CAPTURE_MEMORY } else { 64 << 20 };
            let options = SnapshotOptions {
                mode,
                workers: 1 + chance.below(3) as u16,
                base: base.clone(),
                track: true,
                cached: chance.one_in(2),
                capture_memory,
                // Half of the background snapshots last about 100 ms, so that the guest writes and
                // discards pages that are not saved yet.
                bandwidth: if seed.is_multiple_of(2) && mode == SnapshotMode::Background {
                    SLOW
                } else {
                    0
                },
                ..SnapshotOptions::default()
            };
            let started = client.start_snapshot(&path, &options).unwrap();
            if chance.one_in(3) {
                std::thread::sleep(Duration::from_micros(chance.below(3000)));
                // It may be too late for a cancel. The agent decides that.
                let _ = client.cancel();
            }
            // An fsync waits for everything that other processes have written to the same disk.
            let status = client.wait(started.job, 4 * SOON).unwrap();
            aside.captured.fetch_add(status.counters.copied_before_write_pages, Ordering::Relaxed);
            if is_scarce
                && status.counters.copied_before_write_pages * PAGE_SIZE >= MIN_CAPTURE_MEMORY
            {
                aside.scarce.fetch_add(1, Ordering::Relaxed);
            }
            aside.rescued.fetch_add(status.counters.copied_before_discard_pages, Ordering::Relaxed);
            match status.phase {
                Phase::Completed => {
                    check_cut(&world.cut.lock().unwrap(), &path);
                    path.to_str().unwrap().clone_into(&mut base);
                }
                Phase::Cancelled => assert!(!path.exists()),
                phase => panic!("{phase:?}: {}", status.error_text()),
            }
            assert!(!world.paused.load(Ordering::SeqCst), "the guest keeps running");
        }
    });
    check_guest(world);
    drop(client);
    hooks.join();
    drop(agent);
}

/// Number of cases of each test, unless `PAGEFERRY_CASES` sets it.
const CASES: u32 = 60;

#[test]
fn a_background_snapshot_is_a_consistent_cut() {
    if !require::uffd() {
        return;
    }
    let aside = Aside::default();
    proptest!(seeds::cases(CASES), |(seed in any::<u64>())| run_case(seeds::repeated(seed), (SnapshotMode::Background, false), &aside));
    let (captured, rescued) = (aside.captured.into_inner(), aside.rescued.into_inner());
    let scarce = aside.scarce.into_inner();
    // In a few cases, or in one repeated case, perhaps no snapshot is slow.
    let many = seeds::cases(CASES).cases >= 20 && seeds::given().is_none();
    let found = format!(
        "{captured} pages for writes, {rescued} for discards; {scarce} times scarce memory"
    );
    // Whether memory becomes scarce depends on the host's load. `snapshot/capture_memory.rs` makes
    // sure of it.
    assert!(!many || (captured > 0 && rescued > 0), "nothing was tried: {found}");
    eprintln!("copied aside: {found}");
}

proptest! {
    #![proptest_config(seeds::cases(CASES))]

    #[test]
    fn a_snapshot_of_a_paused_guest_is_what_it_holds(seed in any::<u64>()) {
        run_case(seeds::repeated(seed), (SnapshotMode::Paused, false), &Aside::default());
    }
}

proptest! {
    #![proptest_config(seeds::cases(CASES / 6))]

    #[test]
    fn a_background_snapshot_of_a_clone_is_a_consistent_cut(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), (SnapshotMode::Background, true), &Aside::default());
        }
    }

    #[test]
    fn a_snapshot_of_a_paused_clone_is_what_it_holds(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), (SnapshotMode::Paused, true), &Aside::default());
        }
    }
}
