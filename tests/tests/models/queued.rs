// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Queued discards and frees against a model of each page, while the agent is killed and replaced
//! at any moment.
//!
//! The guest of one thread writes, and gives pages of its block back in any way, at once or queued.
//! A second thread frees pages of another block by the same queue all the time. In the end the
//! guest moves, with pages in the queue.

use crate::seeds;
use pageferry_client::{Client, Error, Punch};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::random::Random;
use pageferry_tests::scenario::{Attached, Ram, migrates_next_time};
use proptest::prelude::*;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const CASES: u32 = 12;
const PAGES: u64 = 150;
const STEPS: u64 = 150;

/// A page as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Page {
    /// What it holds; 0 is a hole.
    stamp: u64,
    discarded: bool,
    /// The ways in which it was queued: for a free, for a discard.
    queued: [bool; 2],
}

impl Page {
    fn is_queued(self) -> bool {
        self.queued != [false; 2]
    }

    /// The queue is flushed.
    fn flush(&mut self) {
        if self.is_queued() {
            self.discarded |= self.queued[1];
            (self.stamp, self.queued) = (0, [false; 2]);
        }
    }
}

/// A VMM with its agent in another process, and what its memory must be.
struct Scene<'a> {
    folder: &'a Path,
    agent: AgentProcess,
    vmm: Attached,
    model: Vec<Page>,
    chance: Random,
    stamps: u64,
    agents: u64,
}

impl Scene<'_> {
    fn step(&mut self) {
        let (first, count) = self.some_pages();
        let pages = first as usize..(first + count) as usize;
        let range = [self.vmm.ram.range(first, count)];
        let client = self.vmm.client.clone();
        match self.chance.below(100) {
            // A guest writes to pages that it has.
            0..30 => {
                for page in pages {
                    let entry = &mut self.model[page];
                    if !entry.discarded && !entry.is_queued() {
                        self.stamps += 1;
                        entry.stamp = self.stamps;
                        self.vmm.write(page as u64, self.stamps);
                    }
                }
            }
            30..50 => {
                client.free_later(&range).unwrap();
                self.model[pages].iter_mut().for_each(|page| page.queued[0] = true);
            }
            50..65 => {
                client.discard_later(&range, Punch::Yes).unwrap();
                self.model[pages].iter_mut().for_each(|page| page.queued[1] = true);
            }
            65..75 => {
                client.flush().unwrap();
                self.flushed();
            }
            75..85 => {
                let discarded = client.populate(&range).unwrap();
                self.flushed();
                let pages = &mut self.model[pages];
                assert_eq!(discarded, pages.iter().filter(|page| page.discarded).count() as u64);
                pages.iter_mut().for_each(|page| page.discarded = false);
            }
            85..89 => {
                client.free(&range).unwrap();
                self.model[pages].iter_mut().for_each(|page| page.queued[0] = true);
                self.flushed();
            }
            89..93 => {
                client.discard(&range, Punch::Yes).unwrap();
                self.model[pages].iter_mut().for_each(|page| page.queued[1] = true);
                self.flushed();
            }
            93..97 => self.agent.process().kill().unwrap(),
            _ => self.reattach(),
        }
        self.check();
    }

    fn some_pages(&mut self) -> (u64, u64) {
        let first = self.chance.below(PAGES);
        (first, 1 + self.chance.below((PAGES - first).min(9)))
    }

    fn flushed(&mut self) {
        self.model.iter_mut().for_each(Page::flush);
    }

    /// The next agent. The one before may still live.
    fn reattach(&mut self) {
        self.agents += 1;
        let name = format!("agent{}", self.agents);
        let next = AgentProcess::spawn(program(), self.folder, &name).unwrap();
        self.vmm.reattach(next.socket());
        self.agent = next;
        // Any agent gets what is queued.
        self.flushed();
    }

    fn check(&self) {
        for (page, is) in (0..).zip(&self.model) {
            let (stamp, hole) = (self.vmm.ram.stamp(page), self.vmm.ram.is_hole(page));
            let discarded = is_discarded(&self.vmm, page);
            if is.is_queued() {
                // The other thread may have flushed it, also between two steps that queued it.
                let known = stamp == is.stamp || (stamp == 0 && hole);
                let marked = discarded == is.discarded || (discarded && is.queued[1]);
                assert!(known && marked, "page {page} is {is:?}: {stamp}, {discarded}");
            } else {
                assert_eq!((stamp, discarded), (is.stamp, is.discarded), "page {page} is {is:?}");
                assert!(stamp != 0 || hole, "page {page} is {is:?}, and allocated");
            }
        }
    }
}

fn is_discarded(vmm: &Attached, page: u64) -> bool {
    vmm.client.discarded(vmm.ram.id).unwrap().count(PageRange::new(page, 1)) == 1
}

/// Writes to pages, frees them by the queue, and checks that they are holes when a flush has
/// returned. Counts them in `freed`.
fn balloon(client: &Client, ram: &Ram, seed: u64, stop: &AtomicBool, freed: &AtomicU64) {
    let mut chance = Random::new(seed);
    while !stop.load(Ordering::Relaxed) {
        let pages: Vec<u64> = (0..1 + chance.below(20)).map(|_| chance.below(PAGES)).collect();
        for page in &pages {
            ram.write_and_mark(client, *page, 1);
        }
        for page in &pages {
            client.free_later(&[ram.range(*page, 1)]).unwrap();
        }
        // The guest is told only then.
        while let Err(error) = client.flush() {
            assert!(matches!(error, Error::AgentStillRunning { .. }), "{error}");
        }
        for page in &pages {
            assert!(ram.stamp(*page) == 0 && ram.is_hole(*page), "page {page} was freed");
        }
        freed.fetch_add(pages.len() as u64, Ordering::Relaxed);
    }
}

fn run_case(seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let vmm = Attached::new(agent.socket(), Ram::odd(PAGES));
    let model = vec![Page { stamp: 0, discarded: false, queued: [false; 2] }; PAGES as usize];
    let chance = Random::new(seed);
    let (folder, stamps, agents) = (folder.path(), 1, 0);
    let mut scene = Scene { folder, agent, vmm, model, chance, stamps, agents };
    let other = Ram::new(7, 1 << 28, PAGES, 0);
    other.add_to(&scene.vmm.client);
    let (client, stop, freed) =
        (scene.vmm.client.clone(), AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let freeing = scope.spawn(|| balloon(&client, &other, seed ^ 1, &stop, &freed));
        // Also if a step fails.
        let _stops = Stop(&stop);
        for _ in 0..STEPS {
            scene.step();
            assert!(!freeing.is_finished());
        }
    });
    assert!(freed.into_inner() > 0);

    scene.reattach();
    scene.vmm.client.remove_block(other.id).unwrap();
    scene.vmm.write(0, 1);
    scene.vmm.client.populate(&[scene.vmm.ram.range(0, PAGES)]).unwrap();
    (10..PAGES).for_each(|page| scene.vmm.write(page, page));
    scene.vmm.client.free_later(&[scene.vmm.ram.range(10, 90)]).unwrap();
    scene.vmm.client.discard_later(&[scene.vmm.ram.range(90, 20)], Punch::Yes).unwrap();
    let next = migrates_next_time(&scene.vmm);
    assert!((10..110).all(|page| next.ram.is_hole(page)), "they were given up before the start");
    assert!((110..PAGES).all(|page| next.ram.stamp(page) == page));
    assert!((0..PAGES).all(|page| is_discarded(&next, page) == (90..110).contains(&page)));
}

/// Stops the other thread when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

proptest! {
    #![proptest_config(seeds::cases(CASES))]

    #[test]
    fn what_is_queued_is_done_once_and_in_time(seed in any::<u64>()) {
        run_case(seeds::repeated(seed));
    }
}
