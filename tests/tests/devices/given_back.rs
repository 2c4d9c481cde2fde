// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that gives most of its memory back by the balloon, before it moves and while it moves:
//! only what it has left is sent.

use pageferry_client::{NonConvergence, OutgoingOptions, Parameters, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost};
use pageferry_tests::scenario::SOON;
use std::time::Duration;

const MIB: u64 = (1 << 20) / PAGE_SIZE;

/// `PAGEFERRY_SOAK=1` moves 8 GiB, as CONTRIBUTING.md says. The usual run has an eighth of it.
fn guest_mib() -> u64 {
    if std::env::var_os("PAGEFERRY_SOAK").is_some() { 8192 } else { 1024 }
}

fn inflate(balloon: &mut BalloonDriver, given: PageRange) {
    for first in (given.first..given.end()).step_by(1024) {
        balloon.inflate(&pages(first, 1024.min(given.end() - first)));
    }
}

#[test]
fn memory_in_the_balloon_is_not_sent() {
    let all = guest_mib() * MIB;
    let (source, destination) = (DeviceHost::ram(all), DeviceHost::ram(all));
    // One word in each page tells them apart.
    let content = vec![0x5a; 1 << 20];
    let block = source.block(0);
    for first in (FIRST_FREE_PAGE..all).step_by(MIB as usize) {
        let length = (all - first).min(MIB) * PAGE_SIZE;
        block.write(first * PAGE_SIZE, &content[..length as usize]).unwrap();
    }
    for page in FIRST_FREE_PAGE..all {
        block.write(page * PAGE_SIZE, &page.to_le_bytes()).unwrap();
    }
    let mut balloon = source.balloon();
    // Three eighths before, and three while it moves: the rest is a quarter.
    let eighth = all / 8;
    let before = PageRange::new(2 * eighth, 3 * eighth);
    let during = PageRange::new(5 * eighth, 3 * eighth);
    inflate(&mut balloon, before);
    let slow = OutgoingOptions {
        streams: 2,
        bandwidth: 1 << 20,
        max_passes: 0,
        policy: NonConvergence::KeepGoing,
        ..OutgoingOptions::default()
    };
    let jobs = source.start_move(&destination, &slow);
    source.vmm.wait_phase(Phase::Passes, SOON).unwrap();
    inflate(&mut balloon, during);
    balloon.set_actual((before.count + during.count) as u32);
    assert_eq!(source.block(0).allocated().unwrap() / PAGE_SIZE, 2 * eighth - FIRST_FREE_PAGE + 80);
    source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    // 8 GiB may take their time on a busy machine.
    let patience = Duration::from_secs(600);
    let ended = source.vmm.wait_job(jobs[0], patience).unwrap();
    assert_eq!(ended.phase, Phase::Completed, "{}", ended.error_text());
    let ended = source.arrives_at(&destination, jobs);
    let sent = ended.counters.wire_bytes / PAGE_SIZE;
    eprintln!(
        "{} of {} MiB given back, {} MiB sent",
        (before.count + during.count) / MIB,
        all / MIB,
        sent / MIB
    );
    assert!(sent < 2 * eighth + eighth / 8, "{} MiB are sent", sent / MIB);
    let there = destination.block(0);
    for page in FIRST_FREE_PAGE..2 * eighth {
        assert_eq!(there.read_word(page * PAGE_SIZE).unwrap(), page);
    }
    for given in [before, during] {
        assert!(there.is_hole(given).unwrap());
    }
    assert_eq!(destination.balloon_now().actual, 6 * eighth * PAGE_SIZE);
}
