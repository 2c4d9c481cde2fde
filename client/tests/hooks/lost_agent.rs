// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that die or hang while the guest is paused: the client resumes it.

use crate::support::*;
use crate::*;
use pageferry_client::{Dispatch, Error, Ownership};
use pageferry_protocol::control::SocketError;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::request::MAX_RANGES;
use std::sync::mpsc::channel;

#[test]
fn malformed_frame_ends_the_agent_and_resumes_the_guest() {
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
fn dead_agent_does_not_keep_the_guest_paused() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_eq!(client.ownership(), Ownership::Ours);
}

#[test]
fn given_up_agent_does_not_keep_the_guest_paused() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_lost(attached.client.status());
    // The agent still holds both of its sockets.
    let vmm = attached.thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    drop(attached.agent);
}

/// A VMM with an agent that sends these hooks and is then silent. Both sockets stay open.
fn silent_after(hooks: &[Hook]) -> Attached {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    for hook in hooks {
        assert_eq!(attached.hook(hook), Ok(()), "{}", hook.name());
    }
    attached
}

/// Waits until a silent agent is given up, without any request. Returns the hooks that were called.
#[track_caller]
fn given_up(silent: Attached) -> Vec<String> {
    let Attached { client, thread, agent, .. } = silent;
    let (says, calls) = channel();
    std::thread::spawn(move || says.send(thread.join().calls()).unwrap());
    let calls = calls.recv_timeout(LONG).expect("the guest stays paused");
    assert_eq!(client.ownership(), Ownership::Ours);
    drop(agent);
    calls
}

#[test]
fn hanging_agent_is_found_without_a_request_while_paused() {
    assert_eq!(given_up(silent_after(&[Hook::Pause])), ["pause", "resume", "lost Ours"]);
}

#[test]
fn silent_agent_is_kept_unless_the_guest_waits_for_it() {
    let relinquish = Hook::Relinquish { session: [0; 16], release: false };
    let silent = [vec![Hook::Pause, RESUME], vec![Hook::Pause, relinquish.clone()]]
        .map(|hooks| silent_after(&hooks));
    // The two agents above are silent from the start. Meanwhile two hanging agents are found, one
    // after the other. So the silent ones have had twice the time after which a hanging agent is
    // given up.
    for _ in 0..2 {
        given_up(silent_after(&[Hook::Pause]));
    }
    for mut attached in silent {
        assert!(!attached.thread.is_finished());
        assert_eq!(attached.hook(&RESUME), Ok(()), "the silent agent is still heard");
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
fn dead_agent_leaves_no_tracking_and_no_throttle() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [START, Hook::Throttle { percent: 30 }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["start", "throttle 30", "stop", "throttle 0", "lost Ours"]);
}

#[test]
fn failed_pause_is_undone_when_the_agent_dies() {
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
fn hanging_agent_is_found_also_after_a_failed_pause() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let vmm = Vmm { fails: "pause", ..Vmm::default() };
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), vmm);
    assert!(attached.hook(&Hook::Pause).is_err());
    assert_eq!(given_up(attached), ["pause", "resume", "lost Ours"]);
}
