// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Watching writes, and what the VMM learns of it.

use crate::support::*;
use crate::*;
use pageferry_client::{ErrorCode, JobStatus};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::userfault::RegisterMode;
use std::thread::spawn;

#[test]
fn write_waits_until_the_agent_lifts_the_protection() {
    let Some(mut watched) = Watched::new() else { return };
    let before = watched.ram.read(3);
    let done = watched.writer(3);
    assert_eq!(watched.ram.read(3), before, "a read does not wait");
    watched.uffd.unprotect(watched.ram.page(3)).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(watched.ram.read(3), u64::MAX);

    let other = watched.writer(4);
    assert_eq!(watched.attached.hook(&Hook::UnwatchWrites), Ok(()));
    other.recv_timeout(SOON).unwrap();
    watched.assert_unwatched();
    assert_eq!(
        watched.attached.hook(&Hook::UnwatchWrites),
        Ok(()),
        "a second unwatch does no harm"
    );
    // Once more from the start.
    let uffd = watch(&mut watched.attached.agent);
    uffd.protect(watched.ram.all()).unwrap();
    let done = watched.ram.writer(3);
    assert_waits_at(&uffd, watched.ram.page(3));
    watched.attached.lose_agent();
    done.recv_timeout(SOON).unwrap();
}

#[test]
fn hole_is_protected_too() {
    let Some(watched) = Watched::new() else { return };
    let ram = Ram::new();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*ram.memory, flags, 0, PAGES * PAGE).unwrap();
    let Watched { mut attached, uffd: first, .. } = watched;
    add_block(&attached.client, &mut attached.agent, &ram, 3);
    attached.hook(&Hook::UnwatchWrites).unwrap();
    drop(first);
    let uffd = watch(&mut attached.agent);
    uffd.protect(ram.all()).unwrap();
    assert_eq!(allocated_pages(&ram.memory), 0, "protecting allocates nothing");
    let done = ram.writer(5);
    assert_waits_at(&uffd, ram.page(5));
    uffd.unprotect(ram.page(5)).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(allocated_pages(&ram.memory), 1);
    attached.lose_agent();
}

#[test]
fn mapping_of_another_userfaultfd_is_refused_with_advice() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm::default());
    let (first, second) = (Ram::new(), Ram::new());
    add_block(&attached.client, &mut attached.agent, &first, 1);
    add_block(&attached.client, &mut attached.agent, &second, 2);
    other.register(second.all(), RegisterMode::WriteProtect).unwrap();
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    let expected = "block 2 is registered with another userfaultfd already, and a mapping can have only one: background \
                    snapshots, write-protect tracking, postcopy and lazy restore need it (a snapshot of mode paused \
                    does not)";
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::System, expected));
    other.register(first.all(), RegisterMode::WriteProtect).expect("nothing is left registered");

    for ram in [&first, &second] {
        other.unregister(ram.all()).unwrap();
    }
    watch(&mut attached.agent);
    attached.lose_agent();
}

#[test]
fn watching_needs_mappings_and_an_unwatched_guest_of_ours() {
    let Some(mut watched) = Watched::new() else { return };
    assert_eq!(watched.attached.refused(&Hook::WatchWrites), ErrorCode::State, "watched already");
    let done = watched.writer(1);
    assert_eq!(watched.attached.hook(&Hook::UnwatchWrites), Ok(()));
    done.recv_timeout(SOON).unwrap();

    watched.attached.start_incoming();
    let error = watched.attached.hook(&Hook::WatchWrites).unwrap_err();
    assert_eq!(error.code, ErrorCode::State);
    assert!(error.sentence.contains("Awaiting"), "{error}");
    // The agent replies that no job runs, so the client does not give it up.
    let taking = watched.attached.client.clone();
    let taken = spawn(move || taking.take_by_force());
    let (request, _) = watched.attached.agent.request().unwrap();
    assert_eq!(request, Request::QueryStatus);
    watched.attached.agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode);
    taken.join().unwrap().unwrap();

    let Watched { mut attached, .. } = watched;
    let adding = attached.client.clone();
    let added = spawn(move || adding.add_block(spec(3, 3 << 20, &written(1))).unwrap());
    attached.agent.accept_block();
    added.join().unwrap();
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    assert!(error.sentence.contains("block 3 has no vmm_address"), "{error}");
    attached.lose_agent();
}

#[test]
fn vmm_learns_of_the_start_and_the_end_of_a_watch() {
    let Some(mut watched) = Watched::new() else { return };
    assert_eq!(watched.attached.calls(), ["watched"]);
    assert_eq!(watched.attached.refused(&Hook::WatchWrites), ErrorCode::State);
    assert_eq!(watched.attached.calls(), [""; 0], "a refused watch calls no hook");
    for hook in [
        Hook::Pause,
        Hook::Resume { force: false, paused: false },
        Hook::UnwatchWrites,
        Hook::UnwatchWrites,
    ] {
        assert_eq!(watched.attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(watched.attached.calls(), ["pause", "resume", "unwatched"]);
    // The agent is lost while the guest is paused. Writes must not wait any more when the VMM
    // resumes it.
    drop(watch(&mut watched.attached.agent));
    assert_eq!(watched.attached.hook(&Hook::Pause), Ok(()));
    let (_client, vmm) = watched.attached.lose_agent();
    assert_eq!(vmm.calls(), ["watched", "pause", "unwatched", "resume", "lost Ours"]);
}

#[test]
fn vmm_that_refuses_a_watch_stays_unwatched() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm { fails: "watched", ..Vmm::default() });
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    other.register(ram.all(), RegisterMode::WriteProtect).expect("nothing is registered");
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["watched", "lost Ours"], "nothing was watched");
}

#[test]
fn vmm_learns_that_a_watch_failed_after_all() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm::default());
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    other.register(ram.all(), RegisterMode::WriteProtect).unwrap();
    assert_eq!(attached.refused(&Hook::WatchWrites), ErrorCode::System);
    assert_eq!(attached.calls(), ["watched", "unwatched"]);
    attached.lose_agent();
}
