// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that has moved by postcopy finds its memory, although its agents are killed before all
//! of it is there: at the destination, where they are also frozen or upgraded, or at both ends.
//! Meanwhile the connections between the agents are cut. The model is that of restores
//! ([`loading`]).
//!
//! One of the tests is a soak of minutes, which CI does not run: `PAGEFERRY_SOAK=1`.
//!
//! The source's VMM recovers the migration whenever it is paused, with another agent if it has lost
//! its own.
//!
//! [`loading`]: crate::loading

use crate::blocks::Page;
use crate::killer::{By, Deaths, Killer};
use crate::loading::{
    Model, Pages, SOON, Side, check, fill, fill_huge_page, fill_largest_block, step,
};
use crate::seeds;
use pageferry_client::{
    IncomingOptions, Mode, OutgoingOptions, Ownership, Parameters, Phase, Target,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::on_drop::OnDrop;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::proxy::Proxy;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How many agents have died in all cases.
static KILLED: AtomicU64 = AtomicU64::new(0);

/// The VMM at the source recovers the migration until it has completed.
fn see_to_the_source(source: &Side, address: &str, options: &OutgoingOptions, killers: &[&Killer]) {
    let Side { client, supervisor, .. } = source;
    match (client.status(), supervisor) {
        (Err(_), Some(supervisor)) => {
            // Fails if that one dies, too.
            let _ = supervisor.replace_agent();
            let _ = client.recover(Some(address), options);
        }
        (Ok(status), _) if status.phase == Phase::PostcopyPaused => {
            let _ = client.recover(Some(address), options);
        }
        (status, _) => {
            // It goes faster when enough agents have died.
            let _ = killers
                .iter()
                .all(|killer| killer.has_ended())
                .then(|| client.set_parameters(&Parameters::bandwidth(0)));
            assert!(status.is_ok(), "{status:?}");
        }
    }
}

/// Cuts the connections so often, with at most this time between two cuts.
fn cut(proxy: &Proxy, (cuts, apart): (u64, Duration), seed: u64) {
    let mut chance = Random::new(seed);
    for _ in 0..cuts {
        // The moment is chance, and nothing is waited for.
        std::thread::sleep(Duration::from_micros(chance.below(apart.as_micros() as u64)));
        if chance.one_in(2) {
            proxy.cut();
        } else {
            proxy.cut_one(chance.next());
        }
    }
}

/// What a case does.
#[derive(Debug, Clone, Copy)]
struct How {
    pages: Pages,
    /// So slow that the guest works before all memory is here.
    bandwidth: u64,
    /// How the agents of the destination end.
    there: Deaths,
    /// How those of the source end, if they do. A frozen one is not found there: the guest may
    /// depend on it.
    here: Option<Deaths>,
    /// How often the connections are cut, in some of the cases, and the longest time between two
    /// cuts.
    cuts: (u64, Duration),
    /// The guest works for as long as agents end, with this pause after each step. Otherwise it
    /// does a number of steps.
    pace: Option<Duration>,
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const KILLED_THERE: How = How {
    pages: Pages::Small,
    bandwidth: 2 << 20,
    there: Deaths { count: 12, apart: millis(60), by: By::KillOrFreeze },
    here: None,
    cuts: (8, millis(80)),
    pace: None,
};

const KILLED_AT_BOTH_ENDS: How =
    How { here: Some(Deaths { count: 6, apart: millis(120), by: By::Kill }), ..KILLED_THERE };

/// Several minutes.
const SOAK: How = How {
    pages: Pages::Many,
    bandwidth: 1 << 20,
    there: Deaths { count: 200, apart: millis(2000), by: By::KillOrFreeze },
    here: Some(Deaths { count: 200, apart: millis(2000), by: By::Kill }),
    cuts: (150, millis(2000)),
    pace: Some(millis(200)),
};

/// The guest at the destination works while its agents end.
fn work(
    how: How, chance: &mut Random, side: &Side, model: &mut Model, killers: &[&Killer],
) -> BTreeSet<Page> {
    let mut touched = BTreeSet::new();
    for _ in 0..60 {
        step(chance, side, model, &mut touched);
    }
    while let Some(pace) = how.pace
        && !killers.iter().all(|killer| killer.has_ended())
    {
        step(chance, side, model, &mut touched);
        std::thread::sleep(pace);
    }
    touched
}

fn run_case(seed: u64, how: How) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let pages = how.pages;
    let source =
        if how.here.is_some() { Side::supervised(pages, None) } else { Side::new(pages, None) };
    let mut service = None;
    let destination = match how.there.by {
        By::Upgrade => {
            let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
            Side::connected(pages, None, service.insert(agent).socket())
        }
        By::Kill | By::KillOrFreeze => Side::supervised(pages, None),
    };
    let mut model = Model::new();
    fill(&mut chance, &source, &mut model);
    match pages {
        Pages::Many => fill_largest_block(&source, &mut model),
        Pages::Small | Pages::Huge | Pages::Clones => {
            fill_huge_page(&mut chance, &source, &mut model)
        }
    }
    // Memory that an earlier guest left.
    (0..50).for_each(|_| destination.store(pages.one(&mut chance), u64::MAX));
    let allocated: BTreeSet<Page> = source.allocated();
    let is_cut = chance.one_in(2) || how.pace.is_some();
    let listen = match is_cut || chance.one_in(2) {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", folder.path().join("guest").display()),
    };
    let incoming =
        destination.client.start_incoming(Target::Address(listen), &IncomingOptions::default());
    let options = OutgoingOptions {
        mode: Mode::Postcopy,
        streams: 1 + chance.below(2) as u16,
        bandwidth: how.bandwidth,
        release: chance.one_in(2),
        ..OutgoingOptions::default()
    };
    let mut address = incoming.unwrap().address;
    let proxy = is_cut.then(|| Proxy::to(&address).unwrap());
    if let Some(proxy) = &proxy {
        proxy.address().clone_into(&mut address);
    }
    source.client.start_outgoing(Target::Address(address.clone()), &options).unwrap();
    let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
    wait_until("the guest to run", SOON, || is_set(&destination.record.runs)).unwrap();
    let killer = Killer::start(destination.client.downgrade(), how.there, seed);
    let other = how.here.map(|deaths| Killer::start(source.client.downgrade(), deaths, !seed));
    let killers: Vec<&Killer> = other.iter().chain([&killer]).collect();
    let ended = AtomicBool::new(false);
    let touched = std::thread::scope(|scope| {
        // Also if this thread fails: the other one is waited for.
        let _ends = OnDrop(|| ended.store(true, Ordering::SeqCst));
        scope.spawn(|| {
            while !is_set(&ended) {
                // It looks from time to time, as an operator does.
                see_to_the_source(&source, &address, &options, &killers);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        scope.spawn(|| proxy.iter().for_each(|proxy| cut(proxy, how.cuts, seed)));
        let touched = work(how, &mut chance, &destination, &mut model, &killers);
        wait_until("the memory to be complete", SOON, || {
            is_set(&destination.record.complete) || is_set(&destination.record.lost)
        })
        .unwrap();
        wait_until("the source to hear of it", SOON, || {
            source.client.ownership() == Ownership::Gone
        })
        .unwrap();
        touched
    });
    KILLED.fetch_add(killers.iter().map(|killer| killer.deaths()).sum(), Ordering::Relaxed);
    assert!(!is_set(&destination.record.lost));
    check(&destination, &model, &allocated, &touched);
}

proptest! {
    #![proptest_config(seeds::cases(15))]

    #[test]
    fn a_guest_survives_the_agents_of_its_destination(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), KILLED_THERE);
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn a_guest_survives_the_agents_of_both_ends(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), KILLED_AT_BOTH_ENDS);
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }
}

proptest! {
    #![proptest_config(seeds::cases(5))]

    #[test]
    fn a_guest_survives_upgrades_at_its_destination(seed in any::<u64>()) {
        if require::uffd() {
            let there = Deaths { by: By::Upgrade, ..KILLED_THERE.there };
            run_case(seeds::repeated(seed), How { there, ..KILLED_THERE });
        }
    }

    #[test]
    fn a_guest_of_huge_pages_survives_the_agents_of_both_ends(seed in any::<u64>()) {
        let pages = Pages::Huge;
        let pool = require::hugetlb(2 * pages.of_pool());
        if require::uffd() && pool.is_some() {
            let how = How { pages, bandwidth: 8 << 20, ..KILLED_AT_BOTH_ENDS };
            run_case(seeds::repeated(seed), how);
        }
    }
}

#[test]
fn a_guest_survives_minutes_in_which_agents_at_both_ends_die() {
    if std::env::var_os("PAGEFERRY_SOAK").is_none() {
        eprintln!("skipped: a long scenario, which PAGEFERRY_SOAK=1 runs");
    } else if require::uffd() {
        let seed = seeds::given().unwrap_or_else(|| u64::from(std::process::id()));
        eprintln!("PAGEFERRY_SEED={seed}");
        run_case(seed, SOAK);
        eprintln!("{} agents have died", KILLED.load(Ordering::Relaxed));
    }
}
