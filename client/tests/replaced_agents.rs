// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two hook channels at once: what the old channel may still do when its agent is dead or the next
//! agent is attached.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    Dispatch, HookError, Hooks, IncomingOptions, JobStatus, Ownership, Phase, StatePiece, Target,
    Trackers,
};
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::hook_reply::decode_hook_reply;
use pageferry_protocol::control::job::{JobKind, RunState};
use std::time::{Duration, Instant};
use support::*;

const RESUME: Hook = Hook::Resume { force: false, paused: false };
const START: Hook = Hook::StartTracking { sources: Trackers::HOOKS };
const RELINQUISH: Hook = Hook::Relinquish { session: [0; 16], release: false };

#[test]
fn the_end_of_an_agent_keeps_the_tracking_of_the_next_one() {
    let (client, mut old, mut first) = connected();
    let mut vmm = Vmm::default();
    first.send_hook(&START, Vec::new());
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    let (mut new, mut second) = attach_next(&client);
    second.send_hook(&START, Vec::new());
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    // The old channel notices late that it was replaced.
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["start", "start", "lost Ours"]);
    drop(second);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["stop", "lost Ours"]);
}

/// A VMM with a slow resume, which checks for a while whether another hook pauses the guest
/// meanwhile.
struct SlowToResume(Vmm);

impl Hooks for SlowToResume {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        self.0.run_state()
    }
    fn pause(&mut self) -> Result<(), HookError> {
        self.0.pause()
    }
    fn resume(&mut self) -> Result<(), HookError> {
        self.0.resume()?;
        let until = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until {
            let calls = self.0.calls.lock().unwrap().clone();
            assert_eq!(
                calls.last().map(String::as_str),
                Some("resume"),
                "something was called meanwhile"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        self.0.calls.lock().unwrap().push("resumed".to_owned());
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.0.save_state()
    }
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.0.load_state(state)
    }
}

#[test]
fn the_next_agent_does_not_pause_in_the_resume_of_the_last() {
    let (client, channel, mut first) = connected();
    let vmm = Vmm::default();
    let old = channel.spawn(SlowToResume(vmm.clone())).unwrap();
    assert_eq!(first.hook(&Hook::Pause), Ok(()));
    drop(first);
    let resumes = || vmm.calls.lock().unwrap().iter().any(|call| call == "resume");
    let until = soon();
    while !resumes() {
        assert!(Instant::now() < until, "the end of the agent did not resume the guest");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (channel, mut second) = attach_next(&client);
    let new = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(second.hook(&Hook::Pause), Ok(()));
    assert_eq!(second.hook(&RELINQUISH), Ok(()));
    old.join();
    // The guest is now paused for a commit that may be sent.
    let calls = vmm.calls();
    assert_eq!(calls[..4], ["pause", "resume", "resumed", "pause"], "{calls:?}");
    assert!(!calls[4..].contains(&"resume".into()), "{calls:?}");
    drop(second);
    new.join();
    assert_eq!(client.ownership(), Ownership::Relinquished);
}

#[test]
fn a_late_resume_does_not_undo_the_next_agents_pause() {
    for force in [false, true] {
        let (client, mut old, mut first) = connected();
        let mut vmm = Vmm::default();
        queue(&mut first, &[Hook::Pause]);
        assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
        queue(&mut first, &[Hook::Resume { force, paused: false }]);
        let (mut new, mut second) = attach_next(&client);
        queue(&mut second, &[Hook::Pause, RELINQUISH]);
        assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
        assert_eq!(client.ownership(), Ownership::Relinquished);
        // The old channel notices late that it was replaced.
        old.dispatch(&mut vmm).unwrap();
        assert_eq!(vmm.calls(), ["pause", "pause", "lost Relinquished"]);
        assert_eq!(client.ownership(), Ownership::Relinquished);
    }
}

/// Hooks that start something. None of them may run for an agent that is gone.
fn beginnings() -> [Hook; 12] {
    [
        Hook::Pause,
        START,
        Hook::StartTracking { sources: Trackers::WRITE_PROTECT },
        Hook::SyncTracker,
        Hook::ClearTracker { block: 2, first: 0, bitmap: vec![1] },
        Hook::WatchWrites,
        Hook::RegisterFaults,
        Hook::LoadState { pieces: Vec::new() },
        Hook::AcceptGuest { origin: GuestOrigin::Image { path: "/images/golden".into() } },
        RELINQUISH,
        Hook::Throttle { percent: 30 },
        Hook::SaveState,
    ]
}

#[test]
fn no_hook_starts_anything_for_a_dead_or_replaced_agent() {
    for replaced in [false, true] {
        for hook in beginnings() {
            let (client, mut old, mut first) = connected();
            let mut vmm = Vmm::default();
            queue(&mut first, std::slice::from_ref(&hook));
            let next = replaced.then(|| attach_next(&client));
            drop(first);
            assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
            assert_eq!(vmm.calls(), ["lost Ours"], "{} replaced: {replaced}", hook.name());
            drop(next);
        }
    }
}

#[test]
fn a_late_unregister_keeps_the_memory_of_the_next_agent() {
    if uffd().is_none() {
        return;
    }
    let (client, mut old, mut first) = connected();
    let mut vmm = Vmm::default();
    queue(&mut first, &[Hook::UnregisterFaults { complete: true }]);
    let (mut new, mut second) = attach_next(&client);
    let starting = client.clone();
    let started = std::thread::spawn(move || {
        starting
            .start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default())
            .unwrap()
    });
    let (request, _) = second.request().unwrap();
    second.started(&request);
    started.join().unwrap();
    queue(&mut second, &[Hook::RegisterFaults]);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    assert_eq!(decode_hook_reply(&second.hooks.recv(soon()).unwrap().body), Ok(Ok(())));
    // The old channel notices late that it was replaced.
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    queue(&mut second, &[Hook::RegisterFaults]);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    let error = decode_hook_reply(&second.hooks.recv(soon()).unwrap().body).unwrap().unwrap_err();
    assert!(error.sentence.contains("registered already"), "{error}");
}

/// The event says that no commit was sent. No other process knows that, so without the event only
/// an operator's force would help.
#[test]
fn failure_event_of_a_dead_or_replaced_agent_counts() {
    for replaced in [false, true] {
        let (client, mut old, mut first) = connected();
        let mut vmm = Vmm::default();
        queue(&mut first, &[Hook::Pause, RELINQUISH]);
        assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
        assert_eq!(client.ownership(), Ownership::Relinquished);
        let status = JobStatus {
            job: 1,
            kind: JobKind::Outgoing,
            phase: Phase::Failed,
            ..JobStatus::default()
        };
        queue(&mut first, &[Hook::Event { status: Box::new(status) }, RESUME]);
        let next = replaced.then(|| attach_next(&client));
        drop(first);
        assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
        assert_eq!(
            vmm.calls(),
            ["pause", "event failed", "resume", "lost Ours"],
            "replaced: {replaced}"
        );
        assert_eq!(client.ownership(), Ownership::Ours);
        drop(next);
    }
}

#[test]
fn a_throttle_of_the_next_agent_outlives_the_one_before() {
    let (client, mut old, mut first) = connected();
    let mut vmm = Vmm::default();
    queue(&mut first, &[Hook::Throttle { percent: 30 }]);
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    queue(&mut first, &[Hook::Throttle { percent: 0 }]);
    let (mut new, mut second) = attach_next(&client);
    queue(&mut second, &[Hook::Throttle { percent: 50 }]);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    old.dispatch(&mut vmm).unwrap();
    assert_eq!(vmm.calls(), ["throttle 30", "throttle 50", "lost Ours"]);
    drop(second);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["throttle 0", "lost Ours"]);
}
