// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every hook answered with an error, and with bytes that are no answer. [`super::handover`] has
//! every hook answered with success.

use super::bodies::{
    Status, incoming, outgoing, outgoing_at, phase, restore, snapshot, with_options,
};
use super::bytes::Body;
use super::handover::Pair;
use super::hook_thread::{Instead, code as hook};
use super::vmm::{Host, Vmm, ask, code};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

const SENTENCE: &str = "this VMM does not";

/// An error, as a VMM answers it.
fn error() -> Instead {
    Instead::Error(8, SENTENCE)
}

#[track_caller]
fn assert_failed(status: &Status, words: &str) {
    assert_eq!(status.phase, phase::FAILED, "{status:?}");
    assert!(status.error.contains(words), "\"{words}\" is not in: {}", status.error);
}

/// A precopy that asks the source's tracker, with this answer to a hook of the source.
fn migrate_with(hook: u32, instead: Instead, options: &Body) -> (Pair, [Status; 2]) {
    let pair = Pair::new();
    pair.source.track(1);
    pair.source.hooked().writes = 3;
    pair.source.hooked().instead.insert(hook, instead);
    let ended = pair.migrate(options);
    (pair, ended)
}

#[test]
fn a_source_that_refuses_a_hook_keeps_its_guest() {
    let hooks = [
        (hook::START_TRACKING, "hook \"start tracking\" failed in the VMM: "),
        (hook::SYNC_TRACKER, "hook \"sync tracker\" failed in the VMM: "),
        (hook::CLEAR_TRACKER, "hook \"clear tracker\" failed in the VMM: "),
        (hook::PAUSE, "hook \"pause\" failed in the VMM: "),
        (hook::SAVE_STATE, "hook \"save state\" failed in the VMM: "),
        (hook::RELINQUISH, "hook \"relinquish\" failed in the VMM: "),
    ];
    for (refused, words) in hooks {
        let (pair, [sent, received]) = migrate_with(refused, error(), &outgoing());
        assert_failed(&sent, &format!("{words}{SENTENCE}"));
        assert_failed(&received, SENTENCE);
        let Pair { source, destination, .. } = &pair;
        let codes = source.hooked().codes();
        let after = codes.iter().position(|code| *code == refused).unwrap();
        // What was begun is undone, also by a VMM that has just refused it.
        assert_eq!(codes.last(), Some(&hook::STOP_TRACKING), "{codes:x?}");
        let paused = codes.contains(&hook::PAUSE);
        assert_eq!(codes[after..].contains(&hook::RESUME), paused, "{codes:x?}");
        assert!(!source.paused() && !destination.hooked().codes().contains(&hook::RESUME));
        assert_eq!(received.arrived, 0);
    }
}

#[test]
fn a_refused_stop_of_the_tracker_does_not_fail_a_job() {
    let pair = Pair::new();
    pair.source.track(1);
    pair.source.hooked().instead.insert(hook::STOP_TRACKING, error());
    let ended = pair.migrate(&outgoing());
    assert!(ended.iter().all(|status| status.phase == phase::COMPLETED), "{ended:?}");
}

#[test]
fn a_vmm_that_cannot_throttle_refuses_that_policy_before_the_job_connects() {
    let pair = Pair::new();
    pair.source.track(1);
    pair.source.hooked().instead.insert(hook::THROTTLE, error());
    let (from, _to) = UnixStream::pair().unwrap();
    let target = with_options("fd", &outgoing().with(outgoing_at::POLICY, &[1]));
    pair.source.start(code::START_OUTGOING, &target, &[from.as_fd()]);
    let ended = pair.source.end();
    assert_failed(&ended, "policy is throttle, and the VMM cannot throttle its guest");
    assert_failed(&ended, SENTENCE);
    assert_eq!(pair.source.hooked().codes(), [hook::THROTTLE]);
}

#[test]
fn a_state_that_does_not_load_leaves_the_guest_at_the_source() {
    let pair = Pair::new();
    pair.destination.hooked().instead.insert(hook::LOAD_STATE, error());
    let [sent, received] = pair.migrate(&outgoing());
    assert_failed(&received, &format!("hook \"load state\" failed in the VMM: {SENTENCE}"));
    assert_failed(&sent, SENTENCE);
    assert_eq!(pair.source.hooked().codes().last(), Some(&hook::RESUME));
    assert_eq!((received.arrived, pair.source.paused()), (0, false));
}

#[test]
fn a_guest_that_is_not_resumed_has_arrived_all_the_same() {
    let pair = Pair::new();
    pair.destination.hooked().instead.insert(hook::RESUME, error());
    let [sent, received] = pair.migrate(&outgoing());
    assert_failed(&received, &format!("hook \"resume\" failed in the VMM: {SENTENCE}"));
    assert_eq!(received.arrived, 1);
    assert_eq!(sent.phase, 18, "unconfirmed: {sent:?}");
    assert!(pair.source.paused(), "it is not resumed here");
}

#[test]
fn bytes_that_are_no_answer_fail_the_hook() {
    let success = Body::new().u32(0);
    let state =
        |guest: u32, length: u64| success.clone().u32(guest).u32(1).u64(length).text("vcpu");
    let twice = success.clone().u32(0).u32(2).u64(0).text("vcpu").u64(0).text("vcpu");
    let cases = [
        (hook::PAUSE, Body::new(), "the answer to hook \"pause\" is malformed"),
        (hook::PAUSE, success.clone().u32(0), "malformed"),
        (hook::PAUSE, Body::new().u32(2), "malformed"),
        (hook::PAUSE, Body::new().u32(10).text("boo"), "hook \"pause\" panicked in the VMM: boo"),
        // A code that nobody knows is an error like any other.
        (hook::PAUSE, Body::new().u32(99).text("what"), "failed in the VMM: what"),
        (hook::SAVE_STATE, state(2, 0), "guest is 0x2"),
        (hook::SAVE_STATE, state(0, 5), "has 0 file descriptors, expected 1"),
        (hook::SAVE_STATE, state(0, 2 << 30), "1 GiB"),
        (hook::SAVE_STATE, twice, "twice"),
        (hook::SAVE_STATE, success.clone().u32(0).u32(1025), "at most 1024"),
    ];
    for (refused, bytes, words) in cases {
        let (pair, [sent, _]) = migrate_with(refused, Instead::Bytes(bytes.0), &outgoing());
        let causes = sent.error.replace(": ", " ");
        assert!(sent.error.contains(words) || causes.contains(words), "{words}: {}", sent.error);
        assert_eq!(sent.phase, phase::FAILED);
        assert!(!pair.source.paused());
    }
    // State without bytes needs no file. The destination takes it without a look.
    let pair = Pair::new();
    pair.source.hooked().instead.insert(hook::SAVE_STATE, Instead::Bytes(state(1, 0).0));
    pair.destination.hooked().instead.insert(hook::LOAD_STATE, Instead::Bytes(success.0));
    let [sent, received] = pair.migrate(&outgoing());
    assert_eq!((sent.phase, received.phase), (phase::COMPLETED, phase::COMPLETED), "{sent:?}");
    assert_eq!((sent.guest, received.guest), (2, 2), "paused by its operator");
    assert!(pair.destination.paused());
    // Nor does the answer to another hook, or to an event, count as the answer to this one.
    let pair = Pair::new();
    pair.source.hooked().answers_events = true;
    pair.source.hooked().instead.insert(hook::PAUSE, Instead::AfterAnother);
    let [sent, received] = pair.migrate(&outgoing());
    assert_eq!((sent.phase, received.phase), (phase::COMPLETED, phase::COMPLETED), "{sent:?}");
}

#[test]
fn a_hook_without_an_answer_fails_in_time_and_is_undone() {
    let brief = outgoing().with(outgoing_at::HOOK_TIMEOUT, &200_000u64.to_le_bytes());
    let (pair, [sent, _]) = migrate_with(hook::PAUSE, Instead::Silence, &brief);
    assert_failed(&sent, "hook \"pause\": the VMM has not answered within 200 ms");
    // The agent does not wait for these, because the VMM answers in order.
    let called = || pair.source.hooked().codes().ends_with(&[hook::RESUME, hook::STOP_TRACKING]);
    wait_until("the hooks that undo", SOON, called).unwrap();
    // Its answers are read and ignored, and the next attempt succeeds.
    pair.source.hooked().instead.clear();
    let ended = pair.migrate(&outgoing());
    assert!(ended.iter().all(|status| status.phase == phase::COMPLETED), "{ended:?}");
}

#[test]
fn a_vmm_that_refuses_a_restore_keeps_its_guest() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let image = host.path("image").display().to_string();
    vmm.start(code::START_SNAPSHOT, &with_options(&image, &snapshot(1)), &[]);
    assert_eq!(vmm.end().phase, phase::COMPLETED);
    vmm.ram.write(1, 77);
    vmm.hooked().instead.insert(hook::ACCEPT_GUEST, error());
    let operator = host.connect();
    ask(&operator, code::START_RESTORE, &with_options(&image, &restore(0)), &[]).unwrap();
    assert_failed(&vmm.end(), SENTENCE);
    assert_eq!(vmm.ram.pages()[..5], [0, 77, 2, 3, 4]);
    assert_eq!(vmm.hooked().codes().last(), Some(&hook::ACCEPT_GUEST));
    // A state that does not load leaves no guest, and memory that is empty.
    vmm.hooked().instead.clear();
    vmm.hooked().instead.insert(hook::LOAD_STATE, error());
    vmm.start(code::START_RESTORE, &with_options(&image, &restore(0)), &[]);
    assert_failed(&vmm.end(), &format!("hook \"load state\" failed in the VMM: {SENTENCE}"));
    assert!(vmm.ram.pages().iter().all(|byte| *byte == 0));
}

#[test]
fn a_snapshot_fails_without_its_hooks_and_the_guest_goes_on() {
    if !require::uffd() {
        return;
    }
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let image = host.path("image").display().to_string();
    let cases = [
        (hook::WATCH_WRITES, error(), "hook \"watch writes\" failed in the VMM: "),
        (hook::WATCH_WRITES, Instead::Bytes(vec![0; 4]), "has 0 file descriptors, expected 1"),
        (hook::PAUSE, error(), "hook \"pause\" failed in the VMM: "),
        (hook::RESUME, error(), "hook \"resume\" failed in the VMM: "),
        (hook::UNWATCH_WRITES, error(), "hook \"unwatch writes\" failed in the VMM: "),
    ];
    for (refused, instead, words) in cases {
        vmm.hooked().called.clear();
        vmm.hooked().instead.insert(refused, instead);
        vmm.start(code::START_SNAPSHOT, &with_options(&image, &snapshot(0)), &[]);
        assert_failed(&vmm.end(), words);
        vmm.hooked().instead.clear();
        assert!(vmm.hooked().codes().contains(&hook::UNWATCH_WRITES));
        assert!(!host.path("image").exists(), "an image is there whole or not at all");
        // This VMM did nothing for the hook that it has refused.
        vmm.hooked().forget_registration();
    }
}

#[test]
fn a_vmm_that_cannot_register_faults_gets_no_postcopy() {
    if !require::uffd() {
        return;
    }
    let postcopy = outgoing().with(outgoing_at::MODE, &[1]);
    let tcp = with_options("tcp:127.0.0.1:0", &incoming());
    for (refused, instead, words) in [
        (hook::PROBE_FAULTS, error(), "hook \"probe faults\" failed in the VMM: "),
        (hook::REGISTER_FAULTS, error(), "hook \"register faults\" failed in the VMM: "),
        (hook::REGISTER_FAULTS, Instead::Bytes(vec![0; 4]), "0 file descriptors, expected 1"),
    ] {
        let pair = Pair::new();
        let Pair { source, destination, .. } = &pair;
        destination.hooked().instead.insert(refused, instead);
        let (_, address) = destination.start(code::START_INCOMING, &tcp, &[]);
        source.start(code::START_OUTGOING, &with_options(&address, &postcopy), &[]);
        assert_failed(&source.end(), words);
        assert!(!source.paused() && !destination.hooked().codes().contains(&hook::RESUME));
        if refused == hook::PROBE_FAULTS {
            // It still waits for a source that fits, and says why this one did not.
            let waiting = destination.wait_for_phase(phase::CONNECTING);
            assert!(waiting.error.contains(SENTENCE), "{waiting:?}");
            destination.does(code::CANCEL, &Body::new());
            assert_eq!(destination.end().phase, phase::CANCELLED);
        } else {
            assert_failed(&destination.end(), words);
            let codes = destination.hooked().codes();
            assert_eq!(codes.last(), Some(&hook::UNREGISTER_FAULTS), "{codes:x?}");
            let unregister = destination.hooked().last(hook::UNREGISTER_FAULTS);
            assert_eq!(unregister[8..], [0; 4], "not complete");
        }
    }
    // All memory is here, so the last hook may fail.
    let pair = Pair::new();
    let Pair { source, destination, .. } = &pair;
    destination.hooked().instead.insert(hook::UNREGISTER_FAULTS, error());
    let (_, address) = destination.start(code::START_INCOMING, &tcp, &[]);
    source.start(code::START_OUTGOING, &with_options(&address, &postcopy), &[]);
    assert_eq!(source.end().phase, phase::COMPLETED);
    assert_eq!(destination.end().phase, phase::COMPLETED);
}

#[test]
fn bytes_that_are_no_frame_end_the_hook_channel() {
    let pair = Pair::new();
    let source = &pair.source;
    // Version 2 in the flags.
    source.hook_socket().send_bytes(&super::frames::header(hook::PAUSE, 2, 0), &[]);
    let [sent, _] = pair.migrate(&outgoing());
    assert_eq!(sent.phase, phase::FAILED, "{sent:?}");
    let again = with_options("/nowhere", &snapshot(1));
    source.start(code::START_SNAPSHOT, &again, &[]);
    assert_eq!(source.end().phase, phase::FAILED);
    assert_eq!(source.status().job, 2, "requests are still answered");
}
