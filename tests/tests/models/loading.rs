// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that works while its memory is loaded, by a restore or a postcopy. The model is a map.

use crate::blocks::{self, LOG_COVERS, Page};
use crate::killer::agent;
use pageferry_client::{
    BlockRange, Client, Config, HookError, Hooks, Punch, RunState, StatePiece, Supervisor,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::random::Random;
use std::collections::{BTreeMap, BTreeSet};
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

pub fn layouts() -> Vec<BlockLayout> {
    blocks::layouts(1177)
}

pub fn some_pages(chance: &mut Random) -> (u32, PageRange) {
    let layouts = layouts();
    let layout = &layouts[chance.below(layouts.len() as u64) as usize];
    let pages = layout.length / PAGE_SIZE;
    let first = chance.below(pages);
    let longest = (pages - first).min(1 + chance.below(120));
    (layout.id, PageRange::new(first, 1 + chance.below(longest)))
}

pub fn pages_of((id, range): (u32, PageRange)) -> impl Iterator<Item = Page> {
    (range.first..range.end()).map(move |page| (id, page))
}

pub fn range_of((id, range): (u32, PageRange)) -> [BlockRange; 1] {
    [BlockRange { block: id, offset: range.offset(), length: range.bytes() }]
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
    pub memory: TestMemory,
    pub client: Client,
    pub record: Arc<Record>,
    /// Replaces its agents, if they are processes.
    pub supervisor: Option<Supervisor<Vmm>>,
    _agent: Option<InProcessAgent>,
}

impl Side {
    pub fn new() -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let config = Config { log_covers: LOG_COVERS, ..Config::default() };
        let (client, channel) = Client::from_socket(socket, config).unwrap();
        let record = Arc::new(Record::default());
        channel.spawn(Vmm(record.clone())).unwrap();
        Self::of(client, record, None, Some(agent))
    }

    /// With agents that can die.
    pub fn supervised() -> Self {
        // Short, because a frozen agent is found after it.
        let request_timeout = Duration::from_secs(2);
        let config = Config { log_covers: LOG_COVERS, request_timeout, ..Config::default() };
        let record = Arc::new(Record::default());
        // The first one may take longer to start, if the machine is busy. Later ones are tried
        // again by the supervisor.
        let start = || Supervisor::spawn(agent, config.clone(), Vmm(record.clone())).ok();
        let (client, supervisor) = wait_for("the first agent", SOON, start).unwrap();
        Self::of(client, record, Some(supervisor), None)
    }

    fn of(
        client: Client, record: Arc<Record>, supervisor: Option<Supervisor<Vmm>>,
        agent: Option<InProcessAgent>,
    ) -> Self {
        let memory = TestMemory::new(layouts()).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { memory, client, record, supervisor, _agent: agent }
    }

    fn load(&self, (id, page): Page) -> u64 {
        self.memory.block(id).unwrap().load(page * PAGE_SIZE + 16).unwrap()
    }

    pub fn store(&self, (id, page): Page, value: u64) {
        let block = self.memory.block(id).unwrap();
        block.store(page * PAGE_SIZE + 16, value).unwrap();
        block.mark(PageRange::new(page, 1));
    }

    /// Frees pages. Discarded pages stay discarded, and the others are zero until they are written.
    pub fn free(&self, pages: (u32, PageRange), model: &mut Model) {
        let discarded = |page: &Page| model.get(page) == Some(&Is::Discarded);
        let freed: Vec<_> = pages_of(pages).filter(|page| !discarded(page)).collect();
        assert_eq!(self.client.free(&range_of(pages)).unwrap(), freed.len() as u64);
        model.extend(freed.into_iter().map(|page| (page, Is::Holds(0))));
    }

    fn is_hole(&self, (id, page): Page) -> bool {
        self.memory.block(id).unwrap().is_hole(PageRange::new(page, 1)).unwrap()
    }

    pub fn allocated(&self) -> BTreeSet<Page> {
        let all = layouts()
            .into_iter()
            .flat_map(|layout| pages_of((layout.id, PageRange::new(0, layout.length / PAGE_SIZE))));
        all.filter(|page| !self.is_hole(*page)).collect()
    }
}

/// Pages of a huge page.
const HUGE: u64 = 512;

/// The guest uses all of a huge page of the largest block.
pub fn fill_huge_page(chance: &mut Random, side: &Side, model: &mut Model) {
    let pages = (9, PageRange::new(chance.below(2) * HUGE, HUGE));
    side.client.populate(&range_of(pages)).unwrap();
    for page in pages_of(pages) {
        let value = 1 + chance.below(1 << 40);
        side.store(page, value);
        model.insert(page, Is::Holds(value));
    }
}

/// A guest with random memory.
pub fn fill(chance: &mut Random, side: &Side, model: &mut Model) {
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

/// The guest reads, writes, discards, frees and populates. Returns the pages that it touched.
pub fn work(chance: &mut Random, side: &Side, model: &mut Model) -> BTreeSet<Page> {
    let mut touched = BTreeSet::new();
    for _ in 0..60 {
        let pages = some_pages(chance);
        match chance.below(9) {
            8 => {
                side.free(pages, model);
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
    touched
}

/// Checks the memory of a guest that has worked. In the guest that was saved or sent, the pages
/// `allocated` were.
pub fn check(side: &Side, model: &Model, allocated: &BTreeSet<Page>, touched: &BTreeSet<Page>) {
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
