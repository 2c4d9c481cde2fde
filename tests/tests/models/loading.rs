// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that works while its memory is loaded, by a restore or a postcopy. The model is a map
//! from a page to what it holds. Where the memory is made of huge pages, these are the pages.

use crate::blocks::{self, LOG_COVERS, Page};
use crate::killer::agent;
use pageferry_client::{
    BlockRange, Client, Config, HookError, Hooks, Punch, RunState, StatePiece, Supervisor,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::huge_pages::HUGE_PAGE;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory, of_clone};
use pageferry_tests::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const SOON: Duration = Duration::from_secs(60);

/// The state of a page. A page without one holds zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Is {
    Discarded,
    Holds(u64),
}

pub type Model = BTreeMap<Page, Is>;

/// Of what pages the memory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Small,
    /// So many that the guest does not touch all of them for minutes.
    Many,
    /// Of hugetlbfs.
    Huge,
    /// Small ones, in private mappings of the base of an image.
    Clones,
}

impl Pages {
    pub fn layouts(self) -> Vec<BlockLayout> {
        let mut layouts = blocks::layouts(if self == Self::Many { 50_000 } else { 1177 });
        if self == Self::Huge {
            for (layout, (gpa, length)) in layouts.iter_mut().zip([(64, 3), (128, 1), (8, 9)]) {
                layout.backing = Backing::HugePages;
                layout.granularity = HUGE_PAGE;
                layout.gpa = gpa * HUGE_PAGE;
                layout.length = length * HUGE_PAGE;
                layout.fd_offset = layout.fd_offset.next_multiple_of(HUGE_PAGE);
            }
        }
        layouts
    }

    /// The layouts of a VMM whose guest comes from `image`.
    fn layouts_for(self, client: &Client, image: Option<&Path>) -> Vec<BlockLayout> {
        match self {
            Self::Clones => of_clone(client, image.unwrap(), self.layouts()).unwrap(),
            _ => self.layouts(),
        }
    }

    /// Size of a page of the model, in bytes.
    fn size(self) -> u64 {
        match self {
            Self::Small | Self::Many | Self::Clones => PAGE_SIZE,
            Self::Huge => HUGE_PAGE,
        }
    }

    /// The huge pages that a VMM needs of the pool.
    pub fn of_pool(self) -> u64 {
        match self {
            Self::Small | Self::Many | Self::Clones => 0,
            Self::Huge => {
                self.layouts().iter().map(|one| one.fd_offset + one.length).sum::<u64>() / HUGE_PAGE
            }
        }
    }

    /// Pages of this block.
    fn count(self, layout: &BlockLayout) -> u64 {
        layout.length / self.size()
    }

    pub fn some(self, chance: &mut Random) -> (u32, PageRange) {
        let layouts = self.layouts();
        let layout = &layouts[chance.below(layouts.len() as u64) as usize];
        let pages = self.count(layout);
        let first = chance.below(pages);
        let longest = (pages - first).min(1 + chance.below(120));
        (layout.id, PageRange::new(first, 1 + chance.below(longest)))
    }

    /// A page of the largest block.
    pub fn one(self, chance: &mut Random) -> Page {
        let layouts = self.layouts();
        let largest = layouts.iter().max_by_key(|layout| layout.length).unwrap();
        (largest.id, chance.below(self.count(largest)))
    }

    pub fn bytes(self, (id, range): (u32, PageRange)) -> [BlockRange; 1] {
        let size = self.size();
        [BlockRange { block: id, offset: range.first * size, length: range.count * size }]
    }

    fn all(self) -> impl Iterator<Item = Page> {
        let layouts = self.layouts().into_iter();
        layouts.flat_map(move |one| pages_of((one.id, PageRange::new(0, self.count(&one)))))
    }
}

pub fn pages_of((id, range): (u32, PageRange)) -> impl Iterator<Item = Page> {
    (range.first..range.end()).map(move |page| (id, page))
}

#[derive(Default)]
pub struct Record {
    pub runs: AtomicBool,
    pub lost: AtomicBool,
    pub complete: AtomicBool,
    pub state: Mutex<Vec<StatePiece>>,
}

pub struct Vmm(Arc<Record>);

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
pub struct Side {
    pub pages: Pages,
    pub memory: TestMemory,
    pub client: Client,
    pub record: Arc<Record>,
    /// Replaces its agents, if they are processes.
    pub supervisor: Option<Supervisor<Vmm>>,
    _agent: Option<InProcessAgent>,
}

impl Side {
    /// For a guest that comes from `image`, or for one that is to be saved or sent.
    pub fn new(pages: Pages, image: Option<&Path>) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let config = Config { log_covers: LOG_COVERS, ..Config::default() };
        let (client, channel) = Client::from_socket(socket, config).unwrap();
        let record = Arc::new(Record::default());
        channel.spawn(Vmm(record.clone())).unwrap();
        Self::of((pages, image), client, record, None, Some(agent))
    }

    /// With agents that can die.
    pub fn supervised(pages: Pages, image: Option<&Path>) -> Self {
        // Short, because a frozen agent is found after it.
        let request_timeout = Duration::from_secs(2);
        let config = Config { log_covers: LOG_COVERS, request_timeout, ..Config::default() };
        let record = Arc::new(Record::default());
        // The first one may take longer to start, if the machine is busy. Later ones are tried
        // again by the supervisor.
        let start = || Supervisor::spawn(agent, config.clone(), Vmm(record.clone())).ok();
        let (client, supervisor) = wait_for("the first agent", SOON, start).unwrap();
        Self::of((pages, image), client, record, Some(supervisor), None)
    }

    /// With an agent that listens at this path, and can be upgraded.
    pub fn connected(pages: Pages, image: Option<&Path>, path: &Path) -> Self {
        let config = Config { log_covers: LOG_COVERS, ..Config::default() };
        let record = Arc::new(Record::default());
        let (client, supervisor) = Supervisor::connect(path, config, Vmm(record.clone())).unwrap();
        Self::of((pages, image), client, record, Some(supervisor), None)
    }

    fn of(
        (pages, image): (Pages, Option<&Path>), client: Client, record: Arc<Record>,
        supervisor: Option<Supervisor<Vmm>>, agent: Option<InProcessAgent>,
    ) -> Self {
        let memory = TestMemory::new(pages.layouts_for(&client, image)).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { pages, memory, client, record, supervisor, _agent: agent }
    }

    /// Where the content of this page is.
    fn at(&self, page: u64) -> u64 {
        // In a huge page, not at its start.
        page * self.pages.size() + self.pages.size() / 2 + 16
    }

    fn load(&self, (id, page): Page) -> u64 {
        self.memory.block(id).unwrap().load(self.at(page)).unwrap()
    }

    pub fn store(&self, (id, page): Page, value: u64) {
        let block = self.memory.block(id).unwrap();
        let at = self.at(page);
        block.store(at, value).unwrap();
        block.mark(PageRange::new(at / PAGE_SIZE, 1));
    }

    /// Frees pages. Discarded pages stay discarded, and the others are zero until they are written.
    pub fn free(&self, pages: (u32, PageRange), model: &mut Model) {
        let discarded = |page: &Page| model.get(page) == Some(&Is::Discarded);
        let freed: Vec<_> = pages_of(pages).filter(|page| !discarded(page)).collect();
        let small = freed.len() as u64 * (self.pages.size() / PAGE_SIZE);
        assert_eq!(self.client.free(&self.pages.bytes(pages)).unwrap(), small);
        model.extend(freed.into_iter().map(|page| (page, Is::Holds(0))));
    }

    /// Huge pages do not tell: see [`check`].
    fn may_be_hole(&self, (id, page): Page) -> bool {
        if self.pages == Pages::Huge {
            return true;
        }
        self.memory.block(id).unwrap().is_hole(PageRange::new(page, 1)).unwrap()
    }

    pub fn allocated(&self) -> BTreeSet<Page> {
        self.pages.all().filter(|page| !self.may_be_hole(*page)).collect()
    }
}

/// Pages of a huge page.
const HUGE: u64 = 512;

/// The guest uses all of a transparent huge page of the largest block.
pub fn fill_huge_page(chance: &mut Random, side: &Side, model: &mut Model) {
    if side.pages == Pages::Huge {
        return;
    }
    let pages = (9, PageRange::new(chance.below(2) * HUGE, HUGE));
    side.client.populate(&side.pages.bytes(pages)).unwrap();
    for page in pages_of(pages) {
        let value = 1 + chance.below(1 << 40);
        side.store(page, value);
        model.insert(page, Is::Holds(value));
    }
}

/// The guest uses all of its largest block.
pub fn fill_largest_block(side: &Side, model: &mut Model) {
    let layouts = side.pages.layouts();
    let largest = layouts.iter().max_by_key(|layout| layout.length).unwrap();
    let pages = (largest.id, PageRange::new(0, side.pages.count(largest)));
    side.client.populate(&side.pages.bytes(pages)).unwrap();
    for page in pages_of(pages) {
        side.store(page, 1 + page.1);
        model.insert(page, Is::Holds(1 + page.1));
    }
}

/// A guest with random memory.
pub fn fill(chance: &mut Random, side: &Side, model: &mut Model) {
    for _ in 0..30 {
        let pages = side.pages.some(chance);
        match chance.below(5) {
            0 => {
                side.client.discard(&side.pages.bytes(pages), Punch::Yes).unwrap();
                model.extend(pages_of(pages).map(|page| (page, Is::Discarded)));
            }
            4 => side.free(pages, model),
            1 => {
                side.client.populate(&side.pages.bytes(pages)).unwrap();
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

/// The guest reads, writes, discards, frees and populates. Returns the pages that it touched.
pub fn work(chance: &mut Random, side: &Side, model: &mut Model) -> BTreeSet<Page> {
    let mut touched = BTreeSet::new();
    (0..60).for_each(|_| step(chance, side, model, &mut touched));
    touched
}

/// One thing that the guest does. Adds the pages that it touches to `touched`.
pub fn step(chance: &mut Random, side: &Side, model: &mut Model, touched: &mut BTreeSet<Page>) {
    let pages = side.pages.some(chance);
    match chance.below(9) {
        8 => {
            side.free(pages, model);
            for page in pages_of(pages) {
                touched.remove(&page);
                assert!(
                    side.may_be_hole(page),
                    "an acknowledged discard or free has freed {page:?}"
                );
            }
        }
        0 => {
            side.client.discard(&side.pages.bytes(pages), Punch::Yes).unwrap();
            for page in pages_of(pages) {
                model.insert(page, Is::Discarded);
                touched.remove(&page);
                assert!(
                    side.may_be_hole(page),
                    "an acknowledged discard or free has freed {page:?}"
                );
            }
        }
        1 => {
            side.client.populate(&side.pages.bytes(pages)).unwrap();
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

/// Checks the memory of a guest that has worked. In the guest that was saved or sent, the pages
/// `allocated` were.
pub fn check(side: &Side, model: &Model, allocated: &BTreeSet<Page>, touched: &BTreeSet<Page>) {
    let layouts = side.pages.layouts();
    let discarded: BTreeMap<u32, _> = layouts
        .iter()
        .map(|layout| (layout.id, side.client.discarded(layout.id).unwrap()))
        .collect();
    let small = side.pages.size() / PAGE_SIZE;
    for page in side.pages.all() {
        let is = model.get(&page).copied().unwrap_or(Is::Holds(0));
        for small in page.1 * small..(page.1 + 1) * small {
            let is_discarded = discarded[&page.0].contains(small);
            assert_eq!(is_discarded, is == Is::Discarded, "page {page:?}: discarded");
        }
        match is {
            Is::Discarded => {
                assert!(side.may_be_hole(page), "discarded page {page:?} is not a hole")
            }
            Is::Holds(value) => {
                let block = side.memory.block(page.0).unwrap();
                assert_eq!(block.read_word(side.at(page.1)).unwrap(), value, "page {page:?}");
            }
        }
    }
    // `never-populate`.
    if side.pages == Pages::Huge {
        // The file tells only how many there are.
        let held = model.iter().filter(|(_, is)| matches!(is, Is::Holds(_))).map(|(page, _)| page);
        let held = held.chain(touched).collect::<BTreeSet<_>>().len() as u64;
        let allocated = side.memory.allocated().unwrap() / HUGE_PAGE;
        assert!(allocated <= held, "{allocated} huge pages are allocated, {held} hold something");
        return;
    }
    let more: Vec<_> = side
        .allocated()
        .into_iter()
        .filter(|page| !allocated.contains(page) && !touched.contains(page))
        .collect();
    assert!(more.is_empty(), "allocated pages that were not allocated before: {more:?}");
}
