// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest at the destination: threads that touch its memory, and a naive record of the content
//! that they may find.
//!
//! A touch begins when a thread gets it and ends when the thread's report is read. So the value
//! that it found is checked against everything that the page may have held in between.

use crate::source::{Memory, Model, Page, all_pages};
use pageferry_client::{Client, Mode};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::scenario::SOON;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

const THREADS: usize = 3;

/// One page of the guest.
struct Cell {
    /// The values that a read may find now. There are several if the order of events is not known.
    values: BTreeSet<u64>,
    discarded: bool,
    /// May be allocated.
    may_hold: bool,
    /// Written after its discard at the source, so that content may still arrive, unless the page
    /// is discarded here, too.
    stray: bool,
    /// Was touched at any time.
    touched: bool,
    /// Touches under way, by thread.
    flights: BTreeMap<usize, Flight>,
    /// The events of the page, which a failure prints.
    story: Vec<Event>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "printed by a failure")]
enum Event {
    /// The guest moved here. The page may hold these values.
    Arrived(Vec<u64>),
    /// A device read this.
    Device(u64),
    /// A thread begins to read, or to write this value.
    Begin(usize, Option<u64>),
    /// A thread has read or written this value.
    End(usize, u64),
    /// Discarded. If it holds a value, it was not punched.
    Discard(Option<u64>),
    Populate,
    /// Punched by the VMM.
    Punch,
    /// Freed. The guest may use it again.
    Free,
}

/// A touch under way.
struct Flight {
    /// The value that it writes, if it is a write.
    writes: Option<u64>,
    /// For a read: the values that the page may have held since it began. For a write: the values
    /// that may have followed it.
    meanwhile: BTreeSet<u64>,
    /// True if nothing changed the page meanwhile.
    alone: bool,
}

impl Cell {
    fn new(values: BTreeSet<u64>, discarded: bool, may_hold: bool) -> Self {
        let stray = discarded && may_hold;
        let story = vec![Event::Arrived(values.iter().copied().collect())];
        Self { values, discarded, may_hold, stray, touched: false, flights: BTreeMap::new(), story }
    }

    fn in_flight(&self) -> BTreeSet<u64> {
        self.flights.values().filter_map(|flight| flight.writes).collect()
    }

    fn begin(&mut self, thread: usize, writes: Option<u64>) {
        self.story.push(Event::Begin(thread, writes));
        let others = self.in_flight();
        let alone = others.is_empty();
        if let Some(value) = writes {
            self.values.insert(value);
            for flight in self.flights.values_mut() {
                flight.meanwhile.insert(value);
                flight.alone = false;
            }
        }
        let meanwhile = if writes.is_some() { others } else { self.values.clone() };
        self.flights.insert(thread, Flight { writes, meanwhile, alone });
        (self.touched, self.may_hold) = (true, true);
    }

    fn end(&mut self, page: Page, thread: usize, found: u64) {
        self.story.push(Event::End(thread, found));
        let flight = self.flights.remove(&thread).unwrap();
        match flight.writes {
            Some(value) => {
                self.values = flight.meanwhile;
                self.values.insert(value);
            }
            None => {
                assert!(
                    flight.meanwhile.contains(&found),
                    "page {page:?}: {found} read, {:?} expected: {self}",
                    flight.meanwhile
                );
                if flight.alone {
                    self.values = [found].into();
                }
            }
        }
    }

    /// The page was freed.
    fn freed(&mut self) {
        for flight in self.flights.values_mut() {
            flight.meanwhile.insert(0);
            flight.alone = false;
        }
        self.values = self.in_flight();
        self.values.insert(0);
        self.may_hold = !self.flights.is_empty();
    }

    /// The page was discarded and not punched. It holds `content` now, or is a hole.
    fn kept(&mut self, page: Page, content: Option<u64>) {
        match content {
            None => self.freed(),
            Some(content) => {
                // Content that is still missing does not arrive any more, and a thread that waits
                // for it finds zero.
                let waits = !self.flights.is_empty();
                assert!(self.may_hold, "page {page:?} is allocated: {self}");
                let possible = self.values.contains(&content) || waits && content == 0;
                assert!(possible, "page {page:?} holds {content}: {self}");
                for flight in self.flights.values_mut() {
                    flight.meanwhile.insert(0);
                    flight.alone = false;
                }
                self.values = self.in_flight();
                self.values.insert(content);
            }
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { values, discarded, story, .. } = self;
        write!(formatter, "expected {values:?}, discarded {discarded}, after {story:?}")
    }
}

struct Touch {
    page: Page,
    writes: Option<u64>,
}

/// The end of a touch.
struct Report {
    thread: usize,
    found: u64,
}

/// The threads of the guest.
struct Threads {
    orders: Vec<Sender<Touch>>,
    reports: Receiver<Report>,
    joined: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(memory: &Arc<Memory>) -> Self {
        let (report, reports) = channel();
        let mut threads = Self { orders: Vec::new(), reports, joined: Vec::new() };
        for thread in 0..THREADS {
            let (order, orders) = channel::<Touch>();
            let (memory, report) = (memory.clone(), report.clone());
            threads.orders.push(order);
            threads.joined.push(std::thread::spawn(move || {
                for Touch { page: (id, page), writes } in orders {
                    let found = match writes {
                        Some(value) => {
                            memory.block(id).store(page * PAGE_SIZE, value).unwrap();
                            value
                        }
                        None => memory.block(id).load(page * PAGE_SIZE).unwrap(),
                    };
                    // The receiver is gone if the test has failed.
                    let _ = report.send(Report { thread, found });
                }
            }));
        }
        threads
    }
}

/// The guest.
pub struct Guest {
    cells: BTreeMap<Page, Cell>,
    threads: Threads,
    /// The page that each thread touches.
    busy: BTreeMap<usize, Page>,
}

impl Guest {
    /// The guest of `model`, whose source is paused, begins to run in `memory`.
    pub fn new(model: &Model, mode: Mode, memory: &Arc<Memory>, client: &Client) -> Self {
        let cell = |page: Page| {
            let discarded = client.discarded(page.0).unwrap().contains(page.1);
            let allocated = model.allocated.contains(&page);
            // Without passes it is not known when a discarded page was written.
            let stray = model.stray.get(&page).filter(|_| mode != Mode::Postcopy);
            let cell = match (model.late.get(&page), model.discarded.contains(&page)) {
                (Some(before), _) => {
                    let values = before.iter().copied().chain([0]).collect();
                    return (page, Cell::new(values, discarded, !before.is_empty()));
                }
                (None, true) => {
                    let values = stray.into_iter().flatten().copied().chain([0]).collect();
                    Cell::new(values, true, stray.is_some())
                }
                (None, false) => {
                    let value = model.content.get(&page).copied().unwrap_or(0);
                    Cell::new([value].into(), false, allocated)
                }
            };
            assert_eq!(
                discarded, cell.discarded,
                "the destination's bitmap, page {page:?}, stray {stray:?}"
            );
            (page, cell)
        };
        let cells = all_pages().into_iter().map(cell).collect();
        Self { cells, threads: Threads::start(memory), busy: BTreeMap::new() }
    }

    /// A device read this value while it loaded its state.
    pub fn device_read(&mut self, page: Page, found: u64) {
        let cell = self.cells.get_mut(&page).unwrap();
        assert!(cell.values.contains(&found), "page {page:?}: a device read {found}: {cell}");
        cell.story.push(Event::Device(found));
        cell.values = [found].into();
        (cell.touched, cell.may_hold) = (true, true);
    }

    /// A thread that is idle.
    pub fn idle(&self) -> Option<usize> {
        (0..THREADS).find(|thread| !self.busy.contains_key(thread))
    }

    /// The pages that are being touched.
    pub fn touching(&self) -> impl Iterator<Item = Page> + '_ {
        self.busy.values().copied()
    }

    pub fn touch(&mut self, thread: usize, page: Page, writes: Option<u64>) {
        self.cells.get_mut(&page).unwrap().begin(thread, writes);
        self.busy.insert(thread, page);
        self.threads.orders[thread].send(Touch { page, writes }).unwrap();
    }

    fn ended(&mut self, Report { thread, found }: Report) -> Page {
        let page = self.busy.remove(&thread).unwrap();
        self.cells.get_mut(&page).unwrap().end(page, thread, found);
        page
    }

    /// Takes the next report, if there is one. Returns its page.
    pub fn done(&mut self) -> Option<Page> {
        let report = self.threads.reports.try_recv().ok()?;
        Some(self.ended(report))
    }

    /// Waits until no page is being touched.
    pub fn rest(&mut self) {
        while !self.busy.is_empty() {
            let report = self.threads.reports.recv_timeout(SOON);
            let report = report.unwrap_or_else(|_| panic!("touches do not end: {:?}", self.busy));
            self.ended(report);
        }
    }

    pub fn was_touched(&self, page: Page) -> bool {
        self.cells[&page].touched
    }

    pub fn is_discarded(&self, page: Page) -> bool {
        self.cells[&page].discarded
    }

    /// The page was discarded, and punched unless it holds `content`.
    pub fn discarded(&mut self, page: Page, content: Option<u64>) {
        let cell = self.cells.get_mut(&page).unwrap();
        (cell.discarded, cell.stray) = (true, false);
        cell.story.push(Event::Discard(content));
        cell.kept(page, content);
    }

    pub fn populated(&mut self, page: Page) {
        let cell = self.cells.get_mut(&page).unwrap();
        cell.story.push(Event::Populate);
        cell.discarded = false;
    }

    /// The page was freed. It is a hole until it is touched. A free of a discarded page discards it
    /// once more.
    pub fn frees(&mut self, page: Page) {
        let cell = self.cells.get_mut(&page).unwrap();
        cell.stray = false;
        cell.story.push(Event::Free);
        cell.freed();
    }

    /// The VMM itself punched a discarded page.
    pub fn freed(&mut self, page: Page) {
        let cell = self.cells.get_mut(&page).unwrap();
        cell.story.push(Event::Punch);
        let to_come = if cell.stray { cell.values.clone() } else { BTreeSet::new() };
        cell.freed();
        cell.values.extend(to_come);
        cell.may_hold |= cell.stray;
    }

    /// Checks all memory. No page may be touched meanwhile.
    pub fn check(&self, memory: &Memory, client: &Client) {
        for (page, cell) in &self.cells {
            assert_eq!(
                client.discarded(page.0).unwrap().contains(page.1),
                cell.discarded,
                "bitmap, page {page:?}"
            );
            assert!(cell.may_hold || memory.is_hole(*page), "page {page:?} is allocated: {cell}");
            let stamp = memory.stamp(*page);
            assert!(cell.values.contains(&stamp), "page {page:?} holds {stamp}: {cell}");
        }
    }

    /// Ends the threads.
    pub fn stop(mut self) {
        self.threads.orders.clear();
        self.threads.joined.drain(..).for_each(|thread| thread.join().unwrap());
    }
}
