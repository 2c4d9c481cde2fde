// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Watched writes and write-protect scanning share the mappings.

use crate::support::*;
use crate::*;
use pageferry_client::{ErrorCode, Trackers};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::userfault::{RegisterMode, UserfaultError};
use std::thread::spawn;

const SCAN: Hook = Hook::StartTracking { sources: Trackers::WRITE_PROTECT };
const NO_SCAN: Hook = Hook::StopTracking { sources: Trackers::WRITE_PROTECT };

/// True if no userfaultfd has the mapping registered. Leaves it unregistered.
fn is_free(ram: &Ram) -> bool {
    let other = uffd().unwrap();
    match other.register(ram.all(), RegisterMode::WriteProtect) {
        Ok(()) => true,
        Err(UserfaultError::Register { source: rustix::io::Errno::BUSY, .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A VMM with a mapped block. `None` if there is no userfaultfd.
fn tracked() -> Option<(Attached, Ram)> {
    uffd()?;
    let mut attached = Attached::new(Vmm::default());
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    Some((attached, ram))
}

#[test]
fn watching_borrows_the_mappings_of_write_protect_tracking() {
    let Some((mut attached, ram)) = tracked() else { return };
    assert!(is_free(&ram), "nothing is registered before the agent tracks");
    assert_eq!(attached.hook(&SCAN), Ok(()));
    assert!(!is_free(&ram));
    let watched = watch(&mut attached.agent);
    watched.protect(ram.all()).unwrap();
    let done = ram.writer(3);
    assert_waits_at(&watched, ram.page(3));
    assert_eq!(attached.hook(&Hook::UnwatchWrites), Ok(()));
    done.recv_timeout(SOON).unwrap();
    assert!(!is_free(&ram), "write-protect tracking is on again");
    // Once more. This time tracking is stopped while writes are watched.
    drop(watch(&mut attached.agent));
    assert_eq!(attached.hook(&NO_SCAN), Ok(()));
    assert_eq!(attached.hook(&Hook::UnwatchWrites), Ok(()));
    assert!(is_free(&ram));
    assert_eq!(
        attached.calls(),
        ["watched", "unwatched", "watched", "unwatched"],
        "the VMM's own tracker is none"
    );
    attached.lose_agent();
}

#[test]
fn block_that_is_removed_is_no_longer_registered_and_the_others_are() {
    let Some((mut attached, ram)) = tracked() else { return };
    let other = Ram::new();
    add_block(&attached.client, &mut attached.agent, &other, 3);
    assert_eq!(attached.hook(&SCAN), Ok(()));
    // As after a snapshot with `track`: no job runs, and the registration stays.
    let added = Ram::new();
    add_block(&attached.client, &mut attached.agent, &added, 1);
    assert!(is_free(&added), "the agent scans it only after it has started anew");
    let client = attached.client.clone();
    let removed = spawn(move || client.remove_block(2).unwrap());
    let (request, _) = attached.agent.request().unwrap();
    attached.agent.done(&request);
    removed.join().unwrap();
    assert!(is_free(&ram) && !is_free(&other));
    assert_eq!(attached.hook(&SCAN), Ok(()));
    assert!(is_free(&ram) && !is_free(&other) && !is_free(&added));
    // An agent that is lost does not end its scan by itself.
    let client = attached.client.clone();
    client.end_agent().unwrap();
    client.remove_block(3).unwrap();
    assert!(is_free(&other));
    attached.lose_agent();
}

#[test]
fn agent_that_dies_in_a_scan_leaves_nothing_registered() {
    for watches in [false, true] {
        let Some((mut attached, ram)) = tracked() else { return };
        assert_eq!(attached.hook(&SCAN), Ok(()));
        if watches {
            drop(watch(&mut attached.agent));
        }
        let (_client, _vmm) = attached.lose_agent();
        assert!(is_free(&ram), "watches: {watches}");
    }
}

#[test]
fn refused_watch_leaves_write_protect_tracking_as_it_was() {
    let Some((mut attached, ram)) = tracked() else { return };
    assert_eq!(attached.hook(&SCAN), Ok(()));
    let client = attached.client.clone();
    let added = spawn(move || client.add_block(spec(3, 3 << 20, &written(1))).unwrap());
    attached.agent.accept_block();
    added.join().unwrap();
    assert_eq!(
        attached.refused(&Hook::WatchWrites),
        ErrorCode::System,
        "block 3 is mapped nowhere"
    );
    // Tracking cannot start again either. The agent learns that from the error of its next hook.
    assert_eq!(attached.hook(&NO_SCAN), Ok(()));
    assert!(is_free(&ram));
    assert!(attached.hook(&SCAN).unwrap_err().sentence.contains("block 3 has no vmm_address"));
    assert!(is_free(&ram), "either all blocks are registered or none");
    attached.lose_agent();
}

#[test]
fn a_vmm_learns_at_its_start_whether_there_is_userfaultfd() {
    let (client, _channel, _agent) = connected();
    match client.check_userfaultfd() {
        Ok(()) => assert!(uffd().is_some()),
        Err(error) => eprintln!("skipped: {}", pageferry_client::error::chain(&error)),
    }
}
