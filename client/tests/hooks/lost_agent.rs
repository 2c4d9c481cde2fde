// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent that dies or hangs does not keep the guest paused.

use crate::support::*;
use crate::*;
use pageferry_client::{Dispatch, Error, Ownership};
use pageferry_protocol::control::SocketError;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::request::MAX_RANGES;
use std::sync::mpsc::channel;

#[test]
fn frame_that_cannot_be_followed_ends_the_agent_and_resumes_the_guest() {
    let (client, mut channel, mut agent) = connected();
    let mut vmm = Vmm::default();
    agent.send_hook(&Hook::Pause, Vec::new());
    rustix::io::write(&agent.hooks, &[0xff; 12]).unwrap();
    assert!(matches!(channel.dispatch(&mut vmm), Err(Error::HookChannel { .. })));
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_lost(client.status());
}

#[test]
fn agent_that_dies_while_the_guest_is_paused_leaves_it_running() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_eq!(client.ownership(), Ownership::Ours);
}

#[test]
fn hanging_agent_that_is_given_up_does_not_keep_the_guest_paused() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_lost(attached.client.status());
    // The agent still holds both of its sockets.
    let vmm = attached.thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    drop(attached.agent);
}

/// A VMM with an agent that is silent from now on, after these hooks; both sockets stay open.
fn silent_after(hooks: &[Hook]) -> Attached {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    for hook in hooks {
        assert_eq!(attached.hook(hook), Ok(()), "{}", hook.name());
    }
    attached
}

/// Returns what was called when a silent agent has been given up, though nobody asks it anything.
#[track_caller]
fn given_up(silent: Attached) -> Vec<String> {
    let Attached { client, thread, agent, .. } = silent;
    let (says, calls) = channel();
    std::thread::spawn(move || says.send(thread.join().calls()).unwrap());
    let calls = calls.recv_timeout(LONG).expect("the guest is paused for ever");
    assert_eq!(client.ownership(), Ownership::Ours);
    drop(agent);
    calls
}

#[test]
fn hanging_agent_does_not_keep_the_guest_paused_though_nobody_asks_it_anything() {
    assert_eq!(given_up(silent_after(&[Hook::Pause])), ["pause", "resume", "lost Ours"]);
}

#[test]
fn silent_agent_is_not_given_up_where_the_guest_runs_or_may_run_elsewhere() {
    let relinquish = Hook::Relinquish { session: [0; 16], release: false };
    let silent = [vec![Hook::Pause, RESUME], vec![Hook::Pause, relinquish.clone()]]
        .map(|hooks| silent_after(&hooks));
    // These two were silent before the first one that hangs, and the second hangs only when the
    // first was found: that is how long it takes, and as long again.
    for _ in 0..2 {
        given_up(silent_after(&[Hook::Pause]));
    }
    for mut attached in silent {
        assert!(!attached.thread.is_finished());
        assert_eq!(attached.hook(&RESUME), Ok(()), "it has its say");
        assert_eq!(attached.calls(), ["pause", "resume"]);
        attached.lose_agent();
    }
}

#[test]
fn dropped_channel_is_closed_at_the_agents_end() {
    let (client, channel, mut agent) = connected();
    drop(channel);
    assert!(matches!(agent.hooks.recv(soon()), Err(SocketError::Closed)));
    drop(client);
}

#[test]
fn client_dropped_while_the_guest_is_paused_resumes_it() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    drop(attached.client);
    let vmm = attached.thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
}

#[test]
fn an_agent_that_dies_while_it_tracks_and_throttles_leaves_neither_on() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [START, Hook::Throttle { percent: 30 }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["start", "throttle 30", "stop", "throttle 0", "lost Ours"]);
}

#[test]
fn a_pause_that_failed_or_panicked_is_undone_when_the_agent_dies() {
    let vmms =
        [Vmm { fails: "pause", ..Vmm::default() }, Vmm { panics: "pause", ..Vmm::default() }];
    for vmm in vmms {
        let mut attached = Attached::new(vmm);
        assert!(attached.hook(&Hook::Pause).is_err());
        let (client, vmm) = attached.lose_agent();
        let calls = vmm.calls();
        assert_eq!(
            (&calls[0], &calls[calls.len() - 2..]),
            (&"pause".into(), &["resume".into(), "lost Ours".into()][..])
        );
        assert_eq!(client.ownership(), Ownership::Ours);
    }
}

#[test]
fn an_agent_that_hangs_after_a_pause_that_failed_is_found_as_after_one_that_did_not() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let vmm = Vmm { fails: "pause", ..Vmm::default() };
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), vmm);
    assert!(attached.hook(&Hook::Pause).is_err());
    assert_eq!(given_up(attached), ["pause", "resume", "lost Ours"]);
}
