// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discards and frees that are queued: when the agent gets them, and what no agent gets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    BlockRange, BlockSpec, Client, Error, ErrorCode, IncomingOptions, OutgoingOptions, Punch,
    SnapshotOptions, Target, Trackers,
};
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::request::{DISCARD_PUNCH, MAX_RANGES, Request};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread::spawn;
use support::*;

fn range(first: u64, count: u64) -> BlockRange {
    BlockRange { block: 2, offset: first * PAGE, length: count * PAGE }
}

/// A VMM with 8 pages in block 2, on a fake agent.
fn attached() -> Attached {
    let mut attached = Attached::new(Vmm::default());
    attached.add_block(0, 8);
    attached
}

/// Runs `call` of the client on a thread. The test plays the agent meanwhile.
fn while_calling<T: Send + 'static>(
    attached: &mut Attached, call: impl FnOnce(&Client) -> T + Send + 'static,
    agent: impl FnOnce(&mut FakeAgent),
) -> T {
    let client = attached.client.clone();
    let called = spawn(move || call(&client));
    agent(&mut attached.agent);
    called.join().unwrap()
}

/// The agent gets the free of these pages next.
#[track_caller]
fn expect_free(agent: &mut FakeAgent, ranges: &[BlockRange]) {
    let (request, _) = agent.request().unwrap();
    assert_eq!(request, Request::Free { ranges: ranges.to_vec() });
    agent.changed(&request, ranges.iter().map(|range| range.length / PAGE).sum());
}

#[test]
fn a_flush_sends_one_request_of_each_kind_and_counts_the_pages() {
    let mut attached = attached();
    let client = attached.client.clone();
    for page in [3, 5, 4, 0, 4] {
        client.free_later(&[range(page, 1)]).unwrap();
    }
    client.discard_later(&[range(6, 1), range(2, 1)], Punch::Yes).unwrap();
    client.discard_later(&[range(7, 1)], Punch::Yes).unwrap();
    client.discard_later(&[range(1, 1)], Punch::No).unwrap();
    client.free_later(&[]).unwrap();
    // Two halves of a page are a page.
    for offset in [7 * PAGE, 7 * PAGE + PAGE / 2] {
        client.free_later(&[BlockRange { block: 2, offset, length: PAGE / 2 }]).unwrap();
    }
    let flushed = while_calling(
        &mut attached,
        |client| client.flush().unwrap(),
        |agent| {
            for (flags, ranges, changed) in
                [(DISCARD_PUNCH, vec![range(2, 1), range(6, 2)], 3), (0, vec![range(1, 1)], 1)]
            {
                let (request, _) = agent.request().unwrap();
                assert_eq!(request, Request::Discard { flags, ranges });
                agent.changed(&request, changed);
            }
            let (request, _) = agent.request().unwrap();
            let ranges = vec![range(0, 1), range(3, 3), range(7, 1)];
            assert_eq!(request, Request::Free { ranges });
            agent.changed(&request, 4);
        },
    );
    assert_eq!(flushed, 3 + 1 + 4);
    assert_eq!(client.flush().unwrap(), 0, "nothing is left, and nothing is sent");
    // Less than a page alone gives nothing.
    client.free_later(&[BlockRange { block: 2, offset: 1, length: PAGE }]).unwrap();
    assert_eq!(client.flush().unwrap(), 0);
    drop(client);
    attached.lose_agent();
}

#[test]
fn wrong_ranges_are_refused_when_they_are_queued() {
    let attached = attached();
    let client = &attached.client;
    let unknown = BlockRange { block: 9, ..range(0, 1) };
    for wrong in [range(8, 1), unknown, BlockRange { length: u64::MAX, ..range(1, 1) }] {
        let outcomes = [
            client.free_later(&[range(0, 1), wrong]),
            client.discard_later(&[range(0, 1), wrong], Punch::Yes),
        ];
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            let named = matches!(error, Error::UnknownBlock { id: 9 } | Error::Range { .. });
            assert!(named, "{error}");
        }
    }
    assert_eq!(client.flush().unwrap(), 0);
    attached.lose_agent();
}

#[test]
fn calls_that_must_not_overtake_the_queue_flush_it_first() {
    let mut attached = attached();
    let first = |call: fn(&Client), attached: &mut Attached, then: fn(&Request) -> bool| {
        attached.client.free_later(&[range(3, 1)]).unwrap();
        while_calling(attached, call, |agent| {
            expect_free(agent, &[range(3, 1)]);
            let (request, _) = agent.request().unwrap();
            assert!(then(&request), "{request:?}");
            agent.refuse(&request, ErrorCode::Other, "no");
        });
    };
    first(
        |client| drop(client.populate(&[range(3, 1)]).unwrap_err()),
        &mut attached,
        |request| matches!(request, Request::Populate { .. }),
    );
    first(
        |client| assert_eq!(client.free(&[range(5, 1)]).unwrap(), 1),
        &mut attached,
        |request| matches!(request, Request::Free { .. }),
    );
    first(
        |client| assert_eq!(client.discard(&[range(5, 1)], Punch::Yes).unwrap(), 1),
        &mut attached,
        |request| matches!(request, Request::Discard { .. }),
    );
    first(
        |client| drop(client.add_block(spec(3, 1 << 20, &written(1))).unwrap_err()),
        &mut attached,
        |request| matches!(request, Request::AddBlock { .. }),
    );
    first(
        |client| drop(client.remove_block(2).unwrap_err()),
        &mut attached,
        |request| matches!(request, Request::RemoveBlock { .. }),
    );
    first(
        |client| {
            let target = Target::Address("tcp:127.0.0.1:1".into());
            drop(client.start_outgoing(target, &OutgoingOptions::default()).unwrap_err());
        },
        &mut attached,
        |request| matches!(request, Request::StartOutgoing { .. }),
    );
    first(
        |client| {
            let options = SnapshotOptions::default();
            drop(client.start_snapshot("/image".as_ref(), &options).unwrap_err());
        },
        &mut attached,
        |request| matches!(request, Request::StartSnapshot { .. }),
    );
    first(
        |client| {
            let listen = Target::Address("tcp:127.0.0.1:1".into());
            drop(client.start_incoming(listen, &IncomingOptions::default()).unwrap_err());
        },
        &mut attached,
        |request| matches!(request, Request::StartIncoming { .. }),
    );
    attached.lose_agent();
}

#[test]
fn hooks_after_which_a_job_reads_flush_the_queue_first() {
    let mut attached = attached();
    for (hook, flushes) in [
        (Hook::StartTracking { sources: Trackers::HOOKS }, true),
        (Hook::SyncTracker, true),
        (Hook::Pause, true),
        // A guest that is paused does not wait for a flush.
        (Hook::SaveState, false),
        (Hook::Resume { force: false, paused: false }, false),
        (Hook::SaveState, true),
    ] {
        attached.client.free_later(&[range(4, 2)]).unwrap();
        attached.agent.send_hook(&hook, Vec::new());
        if flushes {
            expect_free(&mut attached.agent, &[range(4, 2)]);
        }
        let answer = attached.agent.hooks.recv(soon()).unwrap();
        assert_eq!((answer.request, answer.is_reply()), (hook.code(), true));
    }
    // Nothing is queued any more, so nothing is sent.
    assert_eq!(attached.hook(&Hook::SyncTracker), Ok(()));
    attached.lose_agent();
}

#[test]
fn a_hook_does_not_wait_long_for_a_request_that_takes_its_time() {
    let mut attached = attached();
    let client = attached.client.clone();
    let asked = spawn(move || client.status());
    let (request, _) = attached.agent.request().unwrap();
    attached.client.free_later(&[range(4, 2)]).unwrap();
    assert_eq!(attached.hook(&Hook::SyncTracker), Ok(()));
    attached.agent.refuse(&request, ErrorCode::Other, "later");
    asked.join().unwrap().unwrap_err();
    while_calling(
        &mut attached,
        |client| assert_eq!(client.flush().unwrap(), 2),
        |agent| expect_free(agent, &[range(4, 2)]),
    );
    attached.lose_agent();
}

#[test]
fn another_guest_finds_an_empty_queue() {
    let mut attached = attached();
    attached.client.free_later(&[range(4, 2)]).unwrap();
    let origin = GuestOrigin::Image { path: "/image".into() };
    attached.agent.send_hook(&Hook::AcceptGuest { origin }, Vec::new());
    expect_free(&mut attached.agent, &[range(4, 2)]);
    let answer = attached.agent.hooks.recv(soon()).unwrap();
    assert!(answer.is_reply());
    assert!(attached.calls()[0].starts_with("accept "), "the VMM has stopped its guest before");
    assert_eq!(attached.client.flush().unwrap(), 2);
    attached.lose_agent();
}

#[test]
fn a_thread_that_queues_waits_for_no_agent() {
    let mut attached = attached();
    let client = attached.client.clone();
    // This thread holds the session until the agent answers.
    let asked = spawn(move || client.status());
    let (request, _) = attached.agent.request().unwrap();
    for page in 0..8 {
        attached.client.free_later(&[range(page, 1)]).unwrap();
        attached.client.discard_later(&[range(page, 1)], Punch::No).unwrap();
    }
    attached.agent.refuse(&request, ErrorCode::Other, "later");
    asked.join().unwrap().unwrap_err();
    attached.lose_agent();
}

#[test]
fn the_call_that_finds_the_queue_full_flushes_it() {
    const EACH: u64 = 4096;
    let mut attached = Attached::new(Vmm::default());
    attached.add_block(0, 2 * EACH + 2);
    let client = attached.client.clone();
    for even in 0..EACH {
        client.free_later(&[range(2 * even, 1)]).unwrap();
    }
    let full: Vec<BlockRange> = (0..EACH).map(|even| range(2 * even, 1)).collect();
    while_calling(
        &mut attached,
        |client| client.free_later(&[range(1, 1)]).unwrap(),
        |agent| expect_free(agent, &full),
    );
    // More than the queue holds goes at once, after what is queued.
    let more: Vec<BlockRange> = (0..EACH + 1).map(|even| range(2 * even, 1)).collect();
    let sent = more.clone();
    while_calling(
        &mut attached,
        move |client| client.free_later(&sent).unwrap(),
        |agent| {
            expect_free(agent, &[range(1, 1)]);
            expect_free(agent, &more);
        },
    );
    assert_eq!(client.flush().unwrap(), EACH + 1 + EACH + 1, "all of them count");
    drop(client);
    attached.lose_agent();
}

#[test]
fn a_lost_agent_loses_no_queued_range() {
    let mut attached = Attached::new(Vmm::default());
    let memory = written(8);
    let (adding, fd) = (attached.client.clone(), memory.try_clone().unwrap());
    let added = spawn(move || adding.add_block(BlockSpec { id: 2, ..spec(2, 0, &fd) }).unwrap());
    attached.agent.accept_block();
    added.join().unwrap();
    attached.client.free_later(&[range(0, 2)]).unwrap();
    attached.client.discard_later(&[range(4, 1)], Punch::Yes).unwrap();
    // The next agent is attached before anybody flushes.
    let (client, _vmm) = attached.lose_agent();
    let (ours, agents) = UnixStream::pair().unwrap();
    let next = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::Discard { flags: DISCARD_PUNCH, ranges: vec![range(4, 1)] });
        agent.changed(&request, 1);
        // And dies again, in the middle.
        agent.request().unwrap();
    });
    let _channel = client.reattach_socket(ours.into()).unwrap();
    next.join().unwrap();
    assert_eq!(client.flush().unwrap(), 1 + 2);
    assert_eq!(allocated_pages(&memory), 6, "the client has freed what the agent did not");
    // Without an agent the client does all of it.
    client.free_later(&[range(1, 3)]).unwrap();
    client.discard_later(&[range(5, 1)], Punch::Yes).unwrap();
    assert_eq!(allocated_pages(&memory), 6);
    assert_eq!(client.flush().unwrap(), 1 + 3);
    assert_eq!((allocated_pages(&memory), discarded(&client, 2)), (3, vec![5]));
}

/// The agent claims to be a process that the client may not kill.
#[test]
fn frees_wait_in_the_queue_until_the_process_of_a_lost_agent_has_exited() {
    let mut victim = Command::new("sleep").arg("1000").spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&victim), PidfdFlags::empty()).unwrap();
    let (ours, agents) = UnixStream::pair().unwrap();
    let agent = spawn(move || {
        FakeAgent::shake_hands_as(agents.into(), MAX_RANGES, process).accept_block();
    });
    let (client, _channel) = Client::from_socket(ours.into(), impatient()).unwrap();
    let memory = written(8);
    client.add_block(spec(2, 0, &memory)).unwrap();
    agent.join().unwrap();
    let runs = |error: Error| assert!(matches!(error, Error::AgentStillRunning { .. }), "{error}");

    client.free_later(&[range(0, 2)]).unwrap();
    client.discard_later(&[range(4, 1)], Punch::Yes).unwrap();
    runs(client.flush().unwrap_err());
    assert_eq!((allocated_pages(&memory), discarded(&client, 2)), (7, vec![4]));
    // The queue goes on, and a populate does not overtake it.
    client.free_later(&[range(2, 1)]).unwrap();
    runs(client.populate(&[range(0, 1)]).unwrap_err());
    assert_eq!(client.discard(&[range(5, 1)], Punch::Yes).unwrap(), 1);
    assert_eq!(allocated_pages(&memory), 6);
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert_eq!(client.flush().unwrap(), 1 + 3);
    assert_eq!(allocated_pages(&memory), 3);
    assert_eq!(client.populate(&[range(4, 1)]).unwrap(), 1);
    assert_eq!(client.flush().unwrap(), 0, "what was populated is not discarded again");
    assert_eq!(discarded(&client, 2), [5]);
}

#[test]
fn ranges_of_a_removed_block_reach_no_other_block() {
    let mut attached = attached();
    // Queued after the removal has flushed, and before the agent has removed the block.
    let client = attached.client.clone();
    let removed = spawn(move || client.remove_block(2).unwrap());
    let (request, _) = attached.agent.request().unwrap();
    attached.client.free_later(&[range(0, 8)]).unwrap();
    attached.agent.done(&request);
    removed.join().unwrap();
    attached.client.free_later(&[range(0, 1)]).unwrap_err();
    attached.add_block(0, 8);
    assert_eq!(attached.client.flush().unwrap(), 0);
    attached.lose_agent();
}
