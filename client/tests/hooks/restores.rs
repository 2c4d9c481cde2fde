// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores that an operator starts.

use crate::support::*;
use crate::*;
use pageferry_client::{Ownership, Phase};
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::hook_reply::decode_hook_reply;
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::control::reply::ErrorCode;

/// The hook for an operator's restore.
fn accept_guest() -> Hook {
    Hook::AcceptGuest { origin: GuestOrigin::Image { path: "/images/golden".into() } }
}

/// The agent brings a guest.
fn load_state(attached: &mut Attached) {
    let file = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let load = Hook::LoadState { pieces: Vec::new() };
    let answer = attached.agent.hook_frame(&load, vec![file]);
    assert_eq!(decode_hook_reply(&answer.body).unwrap(), Ok(()));
}

/// The agent gives the restore up before it has changed memory: the resume comes without a state.
#[test]
fn guest_that_was_given_up_for_none_goes_on() {
    for before in [RunState::Running, RunState::Paused] {
        let mut attached = Attached::new(Vmm { run_state: before, ..Vmm::default() });
        assert_eq!(attached.hook(&accept_guest()), Ok(()));
        assert_eq!(attached.client.ownership(), Ownership::Awaiting);
        assert_eq!(attached.hook(&RESUME), Ok(()));
        assert_eq!(attached.client.ownership(), Ownership::Ours);
        let returned = if before == RunState::Paused { "stay paused" } else { "resume" };
        assert_eq!(attached.calls(), ["accept the image /images/golden", returned]);
    }
}

#[test]
fn allowed_restore_makes_the_guest_awaited() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_eq!(attached.hook(&accept_guest()), Ok(()));
    assert_eq!(attached.client.ownership(), Ownership::Awaiting);
    assert_eq!(attached.refused(&Hook::WatchWrites), ErrorCode::State, "there is nothing to save");
    attached.agent.send_hook(&event(JobKind::Restore, Phase::Cancelled), Vec::new());
    assert_eq!(attached.hook(&accept_guest()), Ok(()), "another attempt");
    load_state(&mut attached);
    assert_eq!(attached.hook(&RESUME), Ok(()));
    assert_eq!(attached.client.ownership(), Ownership::Ours);
    let expected = [
        "pause",
        "accept the image /images/golden",
        "event cancelled",
        "accept the image /images/golden",
        "load",
        "resume",
    ];
    assert_eq!(attached.calls(), expected);

    assert_eq!(attached.hook(&accept_guest()), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(client.ownership(), Ownership::Awaiting);
    assert_eq!(
        vmm.calls(),
        ["accept the image /images/golden", "lost Awaiting"],
        "no half-restored guest runs"
    );
}

#[test]
fn restore_that_the_vmm_refuses_changes_nothing() {
    let mut attached = Attached::new(Vmm { fails: "accept", ..Vmm::default() });
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let error = attached.hook(&accept_guest()).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    assert_eq!(attached.client.ownership(), Ownership::Ours);
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "accept the image /images/golden", "resume", "lost Ours"]);
}

#[test]
fn restore_over_a_relinquished_guest_is_refused_without_a_hook() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [Hook::Pause, Hook::Relinquish { session: [0; 16], release: false }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(attached.refused(&accept_guest()), ErrorCode::State);
    assert_eq!(
        (attached.calls(), attached.client.ownership()),
        (vec!["pause".to_owned()], Ownership::Relinquished)
    );
    assert_eq!(attached.hook(&RESUME), Ok(()), "the agent that asked to relinquish is still heard");
    attached.lose_agent();
}

#[test]
fn vmm_without_a_restore_hook_refuses_operators() {
    let (client, mut channel, mut agent) = connected();
    agent.send_hook(&accept_guest(), Vec::new());
    channel.dispatch(&mut Least).unwrap();
    let answer = agent.hooks.recv(soon()).unwrap();
    let error = decode_hook_reply(&answer.body).unwrap().unwrap_err();
    assert_eq!(
        error.sentence,
        "this VMM takes no guest that an operator brings: the image /images/golden"
    );
    assert_eq!(client.ownership(), Ownership::Ours);
}
