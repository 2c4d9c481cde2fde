// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest of the models at the source: memory in odd blocks, the steps of the guest and its VMM,
//! and a naive record of what must hold.

use pageferry_client::{BlockRange, Client, HookError, Hooks, Punch, RunState, StatePiece};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::files;
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// The id of a block, and a page of it.
pub type Page = (u32, u64);

pub struct Layout {
    pub id: u32,
    pub gpa: u64,
    pub pages: u64,
    pub fd_offset: u64,
}

/// Pages of a huge page.
pub const HUGE: u64 = 512;
/// The block that may have a huge page.
pub const LARGEST: u32 = 4;

/// Blocks at odd places: no GPA, offset or length fits a word of the bitmaps. The largest begins
/// where its file may have a huge page.
pub fn layouts() -> Vec<Layout> {
    vec![
        Layout { id: 7, gpa: 0x3000, pages: 150, fd_offset: 0x5000 },
        Layout { id: 2, gpa: 0x1_0000_0000, pages: 64, fd_offset: 0 },
        Layout { id: 9, gpa: 0x20_1000, pages: 77, fd_offset: 0x1000 },
        Layout { id: LARGEST, gpa: 0x30_1000, pages: HUGE + 35, fd_offset: 0x20_0000 },
    ]
}

/// Bytes of guest address space that the log must cover for these blocks.
pub const LOG_COVERS: u64 = 0x1_0010_0000;

pub fn all_pages() -> Vec<Page> {
    layouts().iter().flat_map(|layout| (0..layout.pages).map(|page| (layout.id, page))).collect()
}

/// A few consecutive pages of one block.
pub fn some_pages(chance: &mut Random) -> (u32, PageRange) {
    let layouts = layouts();
    let layout = &layouts[chance.below(layouts.len() as u64) as usize];
    let first = chance.below(layout.pages);
    let longest = (layout.pages - first).min(1 + chance.below(40));
    (layout.id, PageRange::new(first, 1 + chance.below(longest)))
}

pub fn pages_of(id: u32, range: PageRange) -> impl Iterator<Item = Page> {
    (range.first..range.end()).map(move |page| (id, page))
}

pub fn whole(id: u32, range: PageRange) -> BlockRange {
    BlockRange { block: id, offset: range.offset(), length: range.bytes() }
}

/// The byte range of these pages, perhaps with a part of a page on either side, which does not
/// matter for a discard.
pub fn ragged(chance: &mut Random, id: u32, range: PageRange) -> BlockRange {
    let pages = layouts().iter().find(|layout| layout.id == id).unwrap().pages;
    let mut exact = whole(id, range);
    if chance.one_in(3) && range.first > 0 && range.end() < pages {
        exact.offset -= 1234;
        exact.length += 2345;
    }
    exact
}

/// The memory of one VMM. Reads and writes here use the files.
pub struct Memory(TestMemory);

impl Memory {
    pub fn new() -> Self {
        let block = |layout: Layout| {
            // The file is longer than the block.
            let file = files::memfd(layout.fd_offset + layout.pages * PAGE_SIZE + 0x3000).unwrap();
            BlockLayout {
                id: layout.id,
                name: format!("block{}", layout.id),
                gpa: layout.gpa,
                fd_offset: layout.fd_offset,
                backing: Backing::File(Arc::new(file.into())),
                ..BlockLayout::ram(layout.pages * PAGE_SIZE)
            }
        };
        Self(TestMemory::new(layouts().into_iter().map(block).collect()).unwrap())
    }

    pub fn add_to(&self, client: &Client) {
        self.0.add_to(client).unwrap();
    }

    pub fn block(&self, id: u32) -> &TestBlock {
        self.0.block(id).unwrap()
    }

    pub fn write(&self, (id, page): Page, stamp: u64) {
        self.block(id).write(page * PAGE_SIZE, &stamp.to_le_bytes()).unwrap();
    }

    pub fn stamp(&self, (id, page): Page) -> u64 {
        let bytes = self.block(id).read_page(page).unwrap();
        assert!(
            bytes[8..].iter().all(|byte| *byte == 0),
            "page {:?} holds more than its stamp",
            (id, page)
        );
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }

    pub fn punch(&self, (id, page): Page) {
        self.block(id).punch(PageRange::new(page, 1)).unwrap();
    }

    pub fn is_hole(&self, (id, page): Page) -> bool {
        let block = self.block(id);
        files::is_hole(block.file(), block.layout().fd_offset + page * PAGE_SIZE).unwrap()
    }

    pub fn allocated(&self) -> BTreeSet<Page> {
        all_pages().into_iter().filter(|page| !self.is_hole(*page)).collect()
    }
}

/// A naive model of the source.
#[derive(Default)]
pub struct Model {
    /// What the guest last wrote, for pages that it may use.
    pub content: BTreeMap<Page, u64>,
    pub discarded: BTreeSet<Page>,
    /// Discarded pages that were written afterwards, with all these writes. The last write may
    /// arrive or not. If the VMM then freed the page without telling the agent, an earlier write
    /// may stay.
    pub stray: BTreeMap<Page, Vec<u64>>,
    /// Pages that were discarded while the guest was paused, with their old content. The
    /// destination may or may not know of the discard.
    pub late: BTreeMap<Page, Vec<u64>>,
    /// Pages that are allocated at the source.
    pub allocated: BTreeSet<Page>,
    pub paused: bool,
    pub next_stamp: u64,
}

impl Model {
    pub fn stamp(&mut self) -> u64 {
        self.next_stamp += 1;
        self.next_stamp
    }

    /// The page loses its content. If the guest is paused, the destination may still get any of it.
    fn drop_content(&mut self, page: Page) {
        let content = self.content.remove(&page);
        let stray = self.stray.remove(&page);
        if self.paused {
            let held = content.into_iter().chain(stray.into_iter().flatten());
            self.late.entry(page).or_default().extend(held);
        }
    }

    /// The guest runs at the source. Pages that were discarded while it was paused are now ordinary
    /// discarded pages.
    pub fn runs(&mut self) {
        self.paused = false;
        self.late.clear();
    }
}

/// The source: its memory and its model. The lock of the model excludes a pause during a step of
/// the guest.
pub struct World {
    pub memory: Memory,
    pub model: Mutex<Model>,
}

impl World {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { memory: Memory::new(), model: Mutex::default() })
    }
}

/// One step of the guest or its VMM.
pub fn step(chance: &mut Random, world: &World, client: &Client) {
    let (id, range) = some_pages(chance);
    let given = ragged(chance, id, range);
    let action = chance.below(13);
    let punch = if chance.one_in(4) { Punch::No } else { Punch::Yes };
    let mut model = world.model.lock().unwrap();
    match action {
        0..5 if !model.paused => write(chance, &mut model, world, id, range),
        5..7 => discard(&mut model, world, client, given, pages_of(id, range), punch),
        7 | 8 => populate(&mut model, world, client, id, range),
        10 | 11 => free(&mut model, world, client, given, pages_of(id, range)),
        12 => {
            // A tracker may report a page that was not written. If the page is discarded but still
            // allocated, that counts as a stray write. If it was punched, the report is old and has
            // no effect.
            let is_stray =
                |page: &Page| model.discarded.contains(page) && model.allocated.contains(page);
            for page in pages_of(id, range).filter(|page| !is_stray(page)) {
                world.memory.block(id).mark(PageRange::new(page.1, 1));
            }
        }
        9 => {
            // A VMM may do this with memory that its guest gave back.
            for page in pages_of(id, range)
                .filter(|page| model.discarded.contains(page))
                .collect::<Vec<_>>()
            {
                world.memory.punch(page);
                model.allocated.remove(&page);
            }
        }
        _ => {}
    }
}

/// The running guest writes to a random page. Call this before a PASS_DONE is passed on, because a
/// guest without dirty pages after a pass is stopped.
pub fn keep_busy(chance: &mut Random, world: &World) {
    let (id, range) = some_pages(chance);
    let mut model = world.model.lock().unwrap();
    if !model.paused {
        write(chance, &mut model, world, id, range);
    }
}

/// The guest uses all of the huge page of the largest block.
pub fn fill_huge_page(world: &World, client: &Client) {
    let mut model = world.model.lock().unwrap();
    let all = PageRange::new(0, HUGE);
    populate(&mut model, world, client, LARGEST, all);
    world.memory.block(LARGEST).mark(all);
    for page in pages_of(LARGEST, all) {
        let stamp = model.stamp();
        world.memory.write(page, stamp);
        model.allocated.insert(page);
        model.content.insert(page, stamp);
    }
}

fn write(chance: &mut Random, model: &mut Model, world: &World, id: u32, range: PageRange) {
    for page in pages_of(id, range).take(5) {
        // A zero page is allocated, too.
        let stamp = if chance.one_in(8) { 0 } else { model.stamp() };
        world.memory.write(page, stamp);
        world.memory.block(id).mark(PageRange::new(page.1, 1));
        model.allocated.insert(page);
        if model.discarded.contains(&page) {
            model.stray.entry(page).or_default().push(stamp);
        } else {
            model.content.insert(page, stamp);
        }
    }
}

fn discard(
    model: &mut Model, world: &World, client: &Client, given: BlockRange,
    pages: impl Iterator<Item = Page>, punch: Punch,
) {
    client.discard(&[given], punch).unwrap();
    for page in pages {
        model.drop_content(page);
        model.discarded.insert(page);
        if punch == Punch::Yes {
            assert!(world.memory.is_hole(page), "an acknowledged discard has freed page {page:?}");
            model.allocated.remove(&page);
        }
    }
}

/// Frees pages. They are holes until the guest writes to them.
fn free(
    model: &mut Model, world: &World, client: &Client, given: BlockRange,
    pages: impl Iterator<Item = Page>,
) {
    let freed = client.free(&[given]).unwrap();
    let mut expected = 0;
    for page in pages {
        assert!(world.memory.is_hole(page), "an acknowledged free has freed page {page:?}");
        expected += u64::from(!model.discarded.contains(&page));
        model.allocated.remove(&page);
        // A free of a discarded page discards it once more.
        model.drop_content(page);
    }
    assert_eq!(freed, expected);
}

/// Populates pages. While the guest is paused the agent may refuse that.
fn populate(model: &mut Model, world: &World, client: &Client, id: u32, range: PageRange) {
    let gained: Vec<Page> =
        pages_of(id, range).filter(|page| model.discarded.contains(page)).collect();
    match client.populate(&[whole(id, range)]) {
        Ok(changed) => {
            assert_eq!(changed, gained.len() as u64);
            for page in gained {
                model.discarded.remove(&page);
                model.late.remove(&page);
                model.stray.remove(&page);
                // Its content is not guaranteed, but it is the same on both sides.
                match world.memory.stamp(page) {
                    0 => model.content.remove(&page),
                    stamp => model.content.insert(page, stamp),
                };
            }
        }
        Err(error) => {
            let why = error.to_string();
            assert!(
                why.contains("past its last sync") || why.contains("the guest has left"),
                "{why}"
            );
            let bitmap = client.discarded(id).unwrap();
            for page in pages_of(id, range) {
                let before = model.discarded.contains(&page);
                assert_eq!(bitmap.contains(page.1), before, "a refused populate changes nothing");
            }
        }
    }
}

/// The hooks of the source's VMM.
pub struct SourceHooks(pub Arc<World>);

impl Hooks for SourceHooks {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.0.model.lock().unwrap().paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.model.lock().unwrap().runs();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(vec![StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }])
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Err(HookError::new("this is the source"))
    }
}
