// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that has moved by postcopy finds its memory, although its agents are killed before all
//! of it is there: at the destination, where they are also frozen or upgraded, or at both ends.
//! Meanwhile the connections between the agents are cut. The model is that of restores
//! ([`loading`]).
//!
//! The source's VMM recovers the migration whenever it is paused, with another agent if it has lost
//! its own.
//!
//! [`loading`]: crate::loading

use crate::blocks::Page;
use crate::killer::{By, Deaths, Killer};
use crate::loading::{Model, Pages, SOON, Side, check, fill, fill_huge_page, work};
use crate::seeds;
use pageferry_client::{
    IncomingOptions, Mode, OutgoingOptions, Ownership, Parameters, Phase, Target,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::proxy::Proxy;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const DEATHS: Deaths = Deaths { count: 12, apart: Duration::from_millis(60), by: By::KillOrFreeze };
/// At the source. A frozen agent is not found there: the guest may depend on it.
const AT_SOURCE: Deaths = Deaths { count: 6, apart: Duration::from_millis(120), by: By::Kill };
/// How often the connections are cut, if they are, and the longest time between two cuts.
const CUTS: (u64, Duration) = (8, Duration::from_millis(80));

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

/// Cuts the connections from time to time.
fn cut(proxy: &Proxy, seed: u64) {
    let mut chance = Random::new(seed);
    let (cuts, apart) = CUTS;
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
    /// What ends the agents of the destination.
    by: By,
    /// Those of the source are killed.
    at_source: bool,
    pages: Pages,
}

const KILLED_THERE: How = How { by: By::KillOrFreeze, at_source: false, pages: Pages::Small };

fn run_case(seed: u64, how: How) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let How { by, at_source, pages } = how;
    let source = if at_source { Side::supervised(pages) } else { Side::new(pages) };
    let mut service = None;
    let destination = match by {
        By::Upgrade => {
            let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
            Side::connected(pages, service.insert(agent).socket())
        }
        By::Kill | By::KillOrFreeze => Side::supervised(pages),
    };
    let mut model = Model::new();
    fill(&mut chance, &source, &mut model);
    fill_huge_page(&mut chance, &source, &mut model);
    // Memory that an earlier guest left.
    (0..50).for_each(|_| destination.store(pages.one(&mut chance), u64::MAX));
    let allocated: BTreeSet<Page> = source.allocated();
    let is_cut = chance.one_in(2);
    let listen = match is_cut || chance.one_in(2) {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", folder.path().join("guest").display()),
    };
    let incoming =
        destination.client.start_incoming(Target::Address(listen), &IncomingOptions::default());
    let options = OutgoingOptions {
        mode: Mode::Postcopy,
        streams: 1 + chance.below(2) as u16,
        // So slow that the guest works before all memory is here.
        bandwidth: if pages == Pages::Huge { 8 << 20 } else { 2 << 20 },
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
    let deaths = Deaths { by, ..DEATHS };
    let killer = Killer::start(destination.client.downgrade(), deaths, seed);
    let other = at_source.then(|| Killer::start(source.client.downgrade(), AT_SOURCE, !seed));
    let killers: Vec<&Killer> = other.iter().chain([&killer]).collect();
    let ended = AtomicBool::new(false);
    let touched = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_set(&ended) {
                // It looks from time to time, as an operator does.
                see_to_the_source(&source, &address, &options, &killers);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        scope.spawn(|| proxy.iter().for_each(|proxy| cut(proxy, seed)));
        let touched = work(&mut chance, &destination, &mut model);
        wait_until("the memory to be complete", SOON, || {
            is_set(&destination.record.complete) || is_set(&destination.record.lost)
        })
        .unwrap();
        wait_until("the source to hear of it", SOON, || {
            source.client.ownership() == Ownership::Gone
        })
        .unwrap();
        ended.store(true, Ordering::SeqCst);
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
            run_case(seeds::repeated(seed), How { at_source: true, ..KILLED_THERE });
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }
}

proptest! {
    #![proptest_config(seeds::cases(5))]

    #[test]
    fn a_guest_survives_upgrades_at_its_destination(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed), How { by: By::Upgrade, ..KILLED_THERE });
        }
    }

    #[test]
    fn a_guest_of_huge_pages_survives_the_agents_of_both_ends(seed in any::<u64>()) {
        let pages = Pages::Huge;
        let pool = require::hugetlb(2 * pages.of_pool());
        if require::uffd() && pool.is_some() {
            run_case(seeds::repeated(seed), How { at_source: true, pages, ..KILLED_THERE });
        }
    }
}
