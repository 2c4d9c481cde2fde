// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A restored guest finds the memory that was saved, eager or lazy, whatever it touches, writes,
//! discards, frees and populates while its memory is loaded. The model is a map.
//!
//! A guest with random memory is saved, once or as an increment. Then several VMMs at once restore
//! it from the same image, repeatedly. They discard before their guests run, and the guests do
//! random things as soon as they run. Only pages are allocated that were allocated in the saved
//! guest or touched since (`never-populate`). Discarded pages are holes (`same-memory`).
//!
//! In some of the tests the agents are killed, frozen or upgraded as soon as a guest runs whose
//! memory is not here yet, and others continue.

use crate::blocks::Page;
use crate::killer::{By, Deaths, Killer};
use crate::loading::{Is, Model, Pages, SOON, Side, check, fill, fill_huge_page, pages_of, work};
use crate::seeds;
use pageferry_client::{
    Parameters, Phase, Punch, RestoreMode, RestoreOptions, SnapshotMode, SnapshotOptions,
    StatePiece,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Number of VMMs at once.
const VMMS: u64 = 3;

/// How the agents of a case die.
const DEATHS: Deaths = Deaths { count: 12, apart: Duration::from_millis(40), by: By::KillOrFreeze };

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
    let How { mode, ends, pages } = how;
    let dies = ends.is_some();
    // Dropped after the side.
    let folder = tempfile::tempdir().unwrap();
    let mut service = None;
    let from = Some(Path::new(image));
    let side = match ends {
        Some(By::Upgrade) => {
            let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
            Side::connected(pages, from, service.insert(agent).socket())
        }
        Some(_) => Side::supervised(pages, from),
        None => Side::new(pages, from),
    };
    let (mut chance, mut model) = (Random::new(seed), saved.clone());
    // Memory that an earlier guest left.
    (0..50).for_each(|_| side.store(pages.one(&mut chance), u64::MAX));
    // Discards of that guest do not count for the new one, unless the pages are discarded once
    // more.
    let before: Vec<_> = (0..chance.below(4)).map(|_| pages.some(&mut chance)).collect();
    for pages in &before {
        side.client.discard(&side.pages.bytes(*pages), Punch::Yes).unwrap();
    }
    let options = RestoreOptions {
        mode,
        workers: 1 + chance.below(3) as u16,
        // So slow that the guest works before all memory is here.
        bandwidth: match pages {
            _ if chance.one_in(2) && !dies => 0,
            Pages::Small | Pages::Many | Pages::Clones => 4 << 20,
            Pages::Huge => 32 << 20,
        },
        shared_base: pages == Pages::Clones,
        working_set: if mode == RestoreMode::Lazy { working_set.to_owned() } else { String::new() },
        ..RestoreOptions::default()
    };
    if chance.one_in(2) && pages != Pages::Clones {
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
    // Discards since the request count, whatever the image says of these pages.
    let again = before.into_iter().filter(|_| chance.one_in(2)).collect::<Vec<_>>();
    for pages in (0..chance.below(4)).map(|_| pages.some(&mut chance)).chain(again) {
        side.client.discard(&side.pages.bytes(pages), Punch::Yes).unwrap();
        model.extend(pages_of(pages).map(|page| (page, Is::Discarded)));
    }
    // Pages that are freed meanwhile are not loaded. They are ordinary memory, even if the earlier
    // guest had discarded them, unless the image or a discard meanwhile says that they are
    // discarded.
    for pages in (0..chance.below(6)).map(|_| pages.some(&mut chance)) {
        side.client.free(&side.pages.bytes(pages)).unwrap();
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
    let deaths = ends.map(|by| Deaths { by, ..DEATHS });
    let killer = deaths.map(|deaths| Killer::start(side.client.downgrade(), deaths, seed));
    let touched = work(&mut chance, &side, &mut model);
    if let Some(killer) = killer {
        let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        wait_until("the memory to be complete", SOON, || {
            // Each agent begins with the limit of the job.
            let killed = killer.has_ended();
            let _ = killed.then(|| side.client.set_parameters(&Parameters::bandwidth(0)));
            is_set(&side.record.complete) || is_set(&side.record.lost)
        })
        .unwrap();
        KILLED.fetch_add(killer.deaths(), Ordering::Relaxed);
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
    check(&side, &model, allocated, &touched);
}

/// How a case restores.
#[derive(Debug, Clone, Copy)]
struct How {
    mode: RestoreMode,
    /// What ends its agents, if they end.
    ends: Option<By>,
    pages: Pages,
}

const LAZY: How = How { mode: RestoreMode::Lazy, ends: None, pages: Pages::Small };
const CLONES: How = How { pages: Pages::Clones, ..LAZY };

/// How many agents have died in all cases.
static KILLED: AtomicU64 = AtomicU64::new(0);

fn run_case(seed: u64, how: How) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let pages = if how.pages == Pages::Clones { Pages::Small } else { how.pages };
    let (side, mut model) = (Side::new(pages, None), Model::new());
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
            run_case(seeds::repeated(seed), LAZY);
        }
    }

    #[test]
    fn a_guest_that_is_restored_lazily_survives_its_agents(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How { ends: Some(By::KillOrFreeze), ..LAZY });
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn a_guest_that_is_restored_eagerly_finds_what_was_saved(seed in any::<u64>()) {
        run_case(seeds::repeated(seed), How { mode: RestoreMode::Eager, ..LAZY });
    }
}

proptest! {
    #![proptest_config(seeds::cases(CASES / 3))]

    #[test]
    fn a_guest_that_is_restored_lazily_survives_upgrades(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How { ends: Some(By::Upgrade), ..LAZY });
        }
    }

    #[test]
    fn a_guest_of_huge_pages_survives_its_agents(seed in any::<u64>()) {
        let pages = Pages::Huge;
        let pool = require::hugetlb(pages.of_pool() * (VMMS + 1));
        if require::uffd() && pool.is_some() {
            let how = How { ends: Some(By::KillOrFreeze), pages, ..LAZY };
            run_case(seeds::repeated(seed), how);
        }
    }
}

proptest! {
    #![proptest_config(seeds::cases(CASES / 2))]

    #[test]
    fn clones_of_one_image_find_what_was_saved_and_see_nothing_of_each_other(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), CLONES);
        }
    }

    #[test]
    fn clones_survive_their_agents(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How { ends: Some(By::KillOrFreeze), ..CLONES });
        }
    }

    #[test]
    fn clones_survive_upgrades_of_their_agents(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How { ends: Some(By::Upgrade), ..CLONES });
        }
    }
}
