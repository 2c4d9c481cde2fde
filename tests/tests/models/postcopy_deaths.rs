// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that has moved by postcopy finds its memory, although the agents of its destination are
//! killed and frozen before all of it is there. The model is that of restores ([`loading`]).
//!
//! The source's operator recovers the migration whenever it is paused.
//!
//! [`loading`]: crate::loading

use crate::blocks::Page;
use crate::killer::{Deaths, Killer};
use crate::loading::{Model, SOON, Side, check, fill, fill_huge_page, work};
use crate::seeds;
use pageferry_client::{
    IncomingOptions, Mode, OutgoingOptions, Ownership, Parameters, Phase, Target,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const DEATHS: Deaths = Deaths { count: 12, apart: Duration::from_millis(60) };

/// How many agents have died in all cases.
static KILLED: AtomicU64 = AtomicU64::new(0);

fn run_case(seed: u64) {
    let mut chance = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = (Side::new(), Side::supervised());
    let mut model = Model::new();
    fill(&mut chance, &source, &mut model);
    fill_huge_page(&mut chance, &source, &mut model);
    // Memory that an earlier guest left.
    (0..50).for_each(|_| destination.store((9, chance.below(1177)), u64::MAX));
    let allocated: BTreeSet<Page> = source.allocated();
    let listen = match chance.one_in(2) {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", folder.path().join("guest").display()),
    };
    let incoming =
        destination.client.start_incoming(Target::Address(listen), &IncomingOptions::default());
    let options = OutgoingOptions {
        mode: Mode::Postcopy,
        streams: 1 + chance.below(2) as u16,
        // So slow that the guest works before all memory is here.
        bandwidth: 2 << 20,
        release: chance.one_in(2),
        ..OutgoingOptions::default()
    };
    let target = Target::Address(incoming.unwrap().address);
    let sent = source.client.start_outgoing(target, &options).unwrap();
    let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
    wait_until("the guest to run", SOON, || is_set(&destination.record.runs)).unwrap();
    let killer = Killer::start(destination.client.downgrade(), DEATHS, seed);
    let ended = AtomicBool::new(false);
    let touched = std::thread::scope(|scope| {
        // The source's operator. It goes faster when enough agents have died.
        scope.spawn(|| {
            while !is_set(&ended) {
                let status = source.client.status().unwrap();
                if status.phase == Phase::PostcopyPaused {
                    let _ = source.client.recover(None, &options);
                }
                if killer.deaths.load(Ordering::SeqCst) == DEATHS.count {
                    let _ = source.client.set_parameters(&Parameters::bandwidth(0));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let touched = work(&mut chance, &destination, &mut model);
        wait_until("the memory to be complete", SOON, || {
            is_set(&destination.record.complete) || is_set(&destination.record.lost)
        })
        .unwrap();
        wait_until("the source to hear of it", SOON, || {
            source.client.status().unwrap().phase.is_final()
        })
        .unwrap();
        ended.store(true, Ordering::SeqCst);
        touched
    });
    KILLED.fetch_add(killer.deaths.load(Ordering::SeqCst), Ordering::Relaxed);
    drop(killer);
    assert!(!is_set(&destination.record.lost));
    let status = source.client.wait(sent.job, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(source.client.ownership(), Ownership::Gone);
    check(&destination, &model, &allocated, &touched);
}

proptest! {
    #![proptest_config(seeds::cases(30))]

    #[test]
    fn a_guest_survives_the_agents_of_its_destination(seed in any::<u64>()) {
        if require::uffd() {
            run_case(seeds::repeated(seed));
            eprintln!("{} agents have died so far", KILLED.load(Ordering::Relaxed));
        }
    }
}
