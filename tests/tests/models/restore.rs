// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A restored guest finds the memory that was saved, eager or lazy, whatever it touches, writes,
//! discards, frees and populates while its memory is loaded. The model is a map.
//!
//! A guest with random memory is saved, once or as an increment. Then several VMMs at once restore
//! it from the same image, repeatedly. They discard before their guests run, and the guests do
//! random things as soon as they run. Only pages are allocated that were allocated in the saved
//! guest or touched since (`never-populate`). Discarded pages are holes (`same-memory`).
//!
//! In one of the tests the agents are killed or frozen as soon as a guest runs whose memory is not
//! here yet, and others continue.

use crate::blocks::{self, LOG_COVERS, Page};
use crate::killer::{Deaths, Killer, agent};
use crate::seeds;
use pageferry_client::{
    BlockRange, Client, Config, HookError, Hooks, Parameters, Phase, Punch, RestoreMode,
    RestoreOptions, RunState, SnapshotMode, SnapshotOptions, StatePiece, Supervisor,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
/// Number of VMMs at once.
const VMMS: u64 = 3;

/// The state of a page. A page without one holds zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Discarded,
    Holds(u64),
}

type Model = BTreeMap<Page, Is>;

fn layouts() -> Vec<BlockLayout> {
    blocks::layouts(1177)
}

fn some_pages(chance: &mut Random) -> (u32, PageRange) {
    let layouts = layouts();
    let layout = &layouts[chance.below(layouts.len() as u64) as usize];
    let pages = layout.length / PAGE_SIZE;
    let first = chance.below(pages);
    let longest = (pages - first).min(1 + chance.below(120));
    (layout.id, PageRange::new(first, 1 + chance.below(longest)))
}

fn pages_of((id, range): (u32, PageRange)) -> impl Iterator<Item = Page> {
    (range.first..range.end()).map(move |page| (id, page))
}

fn range_of((id, range): (u32, PageRange)) -> [BlockRange; 1] {
    [BlockRange { block: id, offset: range.offset(), length: range.bytes() }]
}

#[derive(Default)]
struct Record {
    runs: AtomicBool,
    lost: AtomicBool,
    complete: AtomicBool,
    state: Mutex<Vec<StatePiece>>,
}

struct Vmm(Arc<Record>);

impl Hooks for Vmm {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(vec![StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }])
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        *self.0.state.lock().unwrap() = state;
        Ok(())
    }

    fn memory_complete(&mut self) {
        self.0.complete.store(true, Ordering::SeqCst);
    }

    fn memory_lost(&mut self) {
        self.0.lost.store(true, Ordering::SeqCst);
    }
}

/// A VMM with its agent. Fields drop in order, so the connection is closed before the drop waits
/// for the agent.
struct Side {
    memory: TestMemory,
    client: Client,
    record: Arc<Record>,
    _agent: Agent,
}

#[expect(dead_code, reason = "held, not looked at")]
enum Agent {
    InProcess(InProcessAgent),
    /// Processes, one after the other.
    Supervised(Supervisor<Vmm>),
}

/// How the agents of a case die.
const DEATHS: Deaths = Deaths { count: 12, apart: Duration::from_millis(40) };

impl Side {
    fn new() -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let config = Config { log_covers: LOG_COVERS, ..Config::default() };
        let (client, channel) = Client::from_socket(socket, config).unwrap();
        let record = Arc::new(Record::default());
        channel.spawn(Vmm(record.clone())).unwrap();
        Self::of(client, record, Agent::InProcess(agent))
    }

    /// With agents that can die.
    fn supervised() -> Self {
        // Short, because a frozen agent is found after it.
        let request_timeout = Duration::from_secs(2);
        let config = Config { log_covers: LOG_COVERS, request_timeout, ..Config::default() };
        let record = Arc::new(Record::default());
        let (client, supervisor) = Supervisor::spawn(agent, config, Vmm(record.clone())).unwrap();
        Self::of(client, record, Agent::Supervised(supervisor))
    }

    fn of(client: Client, record: Arc<Record>, agent: Agent) -> Self {
        let memory = TestMemory::new(layouts()).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { memory, client, record, _agent: agent }
    }

    fn load(&self, (id, page): Page) -> u64 {
        self.memory.block(id).unwrap().load(page * PAGE_SIZE + 16).unwrap()
    }

    fn store(&self, (id, page): Page, value: u64) {
        let block = self.memory.block(id).unwrap();
        block.store(page * PAGE_SIZE + 16, value).unwrap();
        block.mark(PageRange::new(page, 1));
    }

    /// Frees pages. Discarded pages stay discarded, and the others are zero until they are written.
    fn free(&self, pages: (u32, PageRange), model: &mut Model) {
        let discarded = |page: &Page| model.get(page) == Some(&Is::Discarded);
        let freed: Vec<_> = pages_of(pages).filter(|page| !discarded(page)).collect();
        assert_eq!(self.client.free(&range_of(pages)).unwrap(), freed.len() as u64);
        model.extend(freed.into_iter().map(|page| (page, Is::Holds(0))));
    }

    fn is_hole(&self, (id, page): Page) -> bool {
        self.memory.block(id).unwrap().is_hole(PageRange::new(page, 1)).unwrap()
    }

    fn allocated(&self) -> BTreeSet<Page> {
        let all = layouts()
            .into_iter()
            .flat_map(|layout| pages_of((layout.id, PageRange::new(0, layout.length / PAGE_SIZE))));
        all.filter(|page| !self.is_hole(*page)).collect()
    }
}

/// Pages of a huge page.
const HUGE: u64 = 512;

/// The guest uses all of a huge page of the largest block.
fn fill_huge_page(chance: &mut Random, side: &Side, model: &mut Model) {
    let pages = (9, PageRange::new(chance.below(2) * HUGE, HUGE));
    side.client.populate(&range_of(pages)).unwrap();
    for page in pages_of(pages) {
        let value = 1 + chance.below(1 << 40);
        side.store(page, value);
        model.insert(page, Is::Holds(value));
    }
}

/// A guest with random memory.
fn fill(chance: &mut Random, side: &Side, model: &mut Model) {
    for _ in 0..30 {
        let pages = some_pages(chance);
        match chance.below(5) {
            0 => {
                side.client.discard(&range_of(pages), Punch::Yes).unwrap();
                model.extend(pages_of(pages).map(|page| (page, Is::Discarded)));
            }
            4 => side.free(pages, model),
            1 => {
                side.client.populate(&range_of(pages)).unwrap();
                let gained = pages_of(pages).filter(|page| model.get(page) == Some(&Is::Discarded));
                let gained: Vec<_> = gained.map(|page| (page, Is::Holds(0))).collect();
                model.extend(gained);
            }
            _ => {
                for page in pages_of(pages)
                    .filter(|page| model.get(page) != Some(&Is::Discarded))
                    .collect::<Vec<_>>()
                {
                    let value = if chance.one_in(6) { 0 } else { chance.below(u64::MAX) };
                    side.store(page, value);
                    model.insert(page, Is::Holds(value));
                }
            }
        }
    }
}

/// Saves the guest, perhaps several times. Returns the name of the last image.
fn save(chance: &mut Random, side: &Side, folder: &Path, model: &mut Model) -> String {
    let mut options =
        SnapshotOptions { mode: SnapshotMode::Paused, track: true, ..SnapshotOptions::default() };
    for number in 0..1 + chance.below(3) {
        fill(chance, side, model);
        if chance.one_in(2) {
            fill_huge_page(chance, side, model);
        }
        let path = folder.join(format!("image{number}"));
        let started = side.client.start_snapshot(&path, &options).unwrap();
        let status = side.client.wait(started.job, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        path.to_str().unwrap().clone_into(&mut options.base);
    }
    options.base
}

/// Restores into a VMM whose guest works meanwhile.
fn restore(
    seed: u64, image: &str, saved: &Model, allocated: &BTreeSet<Page>, how: How, working_set: &str,
) {
    let mode = if how == How::Eager { RestoreMode::Eager } else { RestoreMode::Lazy };
    let dies = how == How::LazyWithDeaths;
    let side = if dies { Side::supervised() } else { Side::new() };
    let (mut chance, mut model) = (Random::new(seed), saved.clone());
    // Memory that an earlier guest left.
    (0..50).for_each(|_| side.store((9, chance.below(1177)), u64::MAX));
    // Discards of that guest do not count for the new one, unless the pages are discarded once
    // more.
    let before: Vec<_> = (0..chance.below(4)).map(|_| some_pages(&mut chance)).collect();
    for pages in &before {
        side.client.discard(&range_of(*pages), Punch::Yes).unwrap();
    }
    let options = RestoreOptions {
        mode,
        workers: 1 + chance.below(3) as u16,
        // So slow that the guest works before all memory is here.
        bandwidth: if chance.one_in(2) && !dies { 0 } else { 4 << 20 },
        working_set: if mode == RestoreMode::Lazy { working_set.to_owned() } else { String::new() },
        ..RestoreOptions::default()
    };
    if chance.one_in(2) {
        // Allocated and never written: it reads like a hole but is not one.
        let reserve = rustix::fs::FallocateFlags::KEEP_SIZE;
        let block = side.memory.block(2).unwrap();
        rustix::fs::fallocate(
            block.file(),
            reserve,
            block.layout().fd_offset,
            block.layout().length,
        )
        .unwrap();
    }
    let started = side.client.start_restore(Path::new(image), &options).unwrap();
    let mut touched = BTreeSet::new();
    // Discards since the request count, whatever the image says of these pages.
    let again = before.into_iter().filter(|_| chance.one_in(2)).collect::<Vec<_>>();
    for pages in (0..chance.below(4)).map(|_| some_pages(&mut chance)).chain(again) {
        side.client.discard(&range_of(pages), Punch::Yes).unwrap();
        model.extend(pages_of(pages).map(|page| (page, Is::Discarded)));
    }
    // Pages that are freed meanwhile are not loaded. They are ordinary memory, even if the earlier
    // guest had discarded them, unless the image or a discard meanwhile says that they are
    // discarded.
    for pages in (0..chance.below(6)).map(|_| some_pages(&mut chance)) {
        side.client.free(&range_of(pages)).unwrap();
        for page in pages_of(pages)
            .filter(|page| model.get(page) != Some(&Is::Discarded))
            .collect::<Vec<_>>()
        {
            model.insert(page, Is::Holds(0));
        }
    }
    let runs = || side.record.runs.load(Ordering::SeqCst);
    wait_until("the guest to run", SOON, || {
        runs() || side.client.status().is_ok_and(|status| status.phase.is_final())
    })
    .unwrap();
    assert!(runs(), "{:?}", side.client.status());
    let killer = dies.then(|| Killer::start(side.client.downgrade(), DEATHS, seed));
    for _ in 0..60 {
        let pages = some_pages(&mut chance);
        match chance.below(9) {
            8 => {
                side.free(pages, &mut model);
                for page in pages_of(pages) {
                    touched.remove(&page);
                    assert!(
                        side.is_hole(page),
                        "an acknowledged discard or free has freed {page:?}"
                    );
                }
            }
            0 => {
                side.client.discard(&range_of(pages), Punch::Yes).unwrap();
                for page in pages_of(pages) {
                    model.insert(page, Is::Discarded);
                    touched.remove(&page);
                    assert!(
                        side.is_hole(page),
                        "an acknowledged discard or free has freed {page:?}"
                    );
                }
            }
            1 => {
                side.client.populate(&range_of(pages)).unwrap();
                for page in pages_of(pages)
                    .filter(|page| model.get(page) == Some(&Is::Discarded))
                    .collect::<Vec<_>>()
                {
                    model.insert(page, Is::Holds(0));
                }
            }
            2..5 => {
                for page in pages_of(pages)
                    .filter(|page| model.get(page) != Some(&Is::Discarded))
                    .collect::<Vec<_>>()
                {
                    let value = chance.below(u64::MAX);
                    side.store(page, value);
                    model.insert(page, Is::Holds(value));
                    touched.insert(page);
                }
            }
            _ => {
                for page in pages_of(pages)
                    .filter(|page| model.get(page) != Some(&Is::Discarded))
                    .collect::<Vec<_>>()
                {
                    let Some(Is::Holds(expected)) = model.get(&page).or(Some(&Is::Holds(0))) else {
                        continue;
                    };
                    assert_eq!(side.load(page), *expected, "page {page:?} when it is touched");
                    touched.insert(page);
                }
            }
        }
    }
    if let Some(killer) = killer {
        let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        wait_until("the memory to be complete", SOON, || {
            // Each agent begins with the limit of the job.
            let killed = killer.deaths.load(Ordering::SeqCst) == DEATHS.count;
            let _ = killed.then(|| side.client.set_parameters(&Parameters::bandwidth(0)));
            is_set(&side.record.complete) || is_set(&side.record.lost)
        })
        .unwrap();
        KILLED.fetch_add(killer.deaths.load(Ordering::SeqCst), Ordering::Relaxed);
    } else {
        let _ = side.client.set_parameters(&Parameters::bandwidth(0));
        let status = side.client.wait(started.job, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
    assert!(!side.record.lost.load(Ordering::SeqCst));
    assert_eq!(
        *side.record.state.lock().unwrap(),
        [StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }]
    );
    for layout in layouts() {
        let block = side.memory.block(layout.id).unwrap();
        let discarded = side.client.discarded(layout.id).unwrap();
        for page in pages_of((layout.id, block.all())) {
            let is = model.get(&page).copied().unwrap_or(Is::Holds(0));
            assert_eq!(discarded.contains(page.1), is == Is::Discarded, "page {page:?}: discarded");
            match is {
                Is::Discarded => {
                    assert!(side.is_hole(page), "discarded page {page:?} is not a hole")
                }
                Is::Holds(value) => {
                    assert_eq!(
                        block.read_word(page.1 * PAGE_SIZE + 16).unwrap(),
                        value,
                        "page {page:?}"
                    );
                }
            }
        }
    }
    // `never-populate`.
    let more: Vec<_> = side
        .allocated()
        .into_iter()
        .filter(|page| !allocated.contains(page) && !touched.contains(page))
        .collect();
    assert!(more.is_empty(), "allocated pages that were not allocated before: {more:?}");
}

/// How a case restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Eager,
    Lazy,
    /// Its agents are killed and frozen.
    LazyWithDeaths,
}

/// How many agents have died in all cases.
static KILLED: AtomicU64 = AtomicU64::new(0);

fn run_case(seed: u64, how: How) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let (side, mut model) = (Side::new(), Model::new());
    let image = save(&mut chance, &side, folder.path(), &mut model);
    let allocated = side.allocated();
    drop(side);
    let images = || {
        let names = (0..3).map(|number| folder.path().join(format!("image{number}")));
        names.filter_map(|name| std::fs::read(name).ok()).collect::<Vec<_>>()
    };
    let before = images();
    let working_set = folder.path().join("working-set").to_str().unwrap().to_owned();
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for vmm in 0..VMMS {
                let (image, model, allocated, working_set) =
                    (&image, &model, &allocated, &working_set);
                let seed = chance.below(u64::MAX) ^ vmm;
                scope.spawn(move || restore(seed, image, model, allocated, how, working_set));
            }
        });
    }
    assert!(images() == before, "an image is never written to");
}

/// Number of cases of each test, unless `PAGEFERRY_CASES` sets it.
const CASES: u32 = 12;

proptest! {
    #![proptest_config(seeds::cases(CASES))]

    #[test]
    fn a_guest_that_is_restored_lazily_finds_what_was_saved(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How::Lazy);
        }
    }

    #[test]
    fn a_guest_that_is_restored_lazily_survives_its_agents(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How::LazyWithDeaths);
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn a_guest_that_is_restored_eagerly_finds_what_was_saved(seed in any::<u64>()) {
        run_case(seeds::repeated(seed), How::Eager);
    }
}
