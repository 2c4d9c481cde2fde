// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connecting, losing an agent, and getting a new one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    Client, Config, Error, ErrorCode, IncomingOptions, OutgoingOptions, Ownership, Phase, Target,
    Trackers,
};
use pageferry_protocol::control::job::{JobKind, JobStatus};
use pageferry_protocol::control::reply::{RemoteError, encode_reply};
use pageferry_protocol::control::request::{BLOCK_DISCARDED, MAX_RANGES, Request, code};
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};
use support::*;

fn identity(fd: &OwnedFd) -> (u64, u64) {
    let stat = fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}

/// Answers the hello with `answer`, and returns the client's error.
fn hello_answered_by(answer: impl FnOnce(u32) -> Frame + Send + 'static) -> Error {
    let (ours, agents) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || {
        let mut control = FrameSocket::from(OwnedFd::from(agents));
        let hello = control.recv(soon()).unwrap();
        control.send(&answer(hello.request), soon()).unwrap();
        // The client ends the connection.
        assert!(matches!(control.recv(soon()), Err(SocketError::Closed)));
    });
    let error = Client::from_socket(ours.into(), Config::default()).unwrap_err();
    agent.join().unwrap();
    error
}

#[test]
fn refused_hello_surfaces_the_agents_sentence() {
    let error = hello_answered_by(|request| {
        let refused = Err::<(), _>(RemoteError::new(
            ErrorCode::Unsupported,
            "version 1 to 1 offered, spoken is 7",
        ));
        Frame::reply(request, encode_reply(&refused, |(), encoder| encoder))
    });
    assert!(matches!(&error, Error::Refused { code: ErrorCode::Unsupported, .. }), "{error:?}");
    assert!(error.to_string().contains("spoken is 7"), "{error}");
}

#[test]
fn malformed_or_nonsensical_hello_is_the_end_of_the_agent() {
    let short = hello_answered_by(|request| Frame::reply(request, vec![0; 7]));
    assert!(short.to_string().contains("malformed"), "{short}");
    let other = hello_answered_by(|request| Frame::reply(request + 1, hello_reply(5)));
    assert!(other.to_string().contains("0x1001"), "{other}");
    let request = hello_answered_by(|request| Frame::request(request, hello_reply(5)));
    assert_lost(Err::<(), _>(request));
    let none = hello_answered_by(|request| Frame::reply(request, hello_reply(0)));
    assert!(none.to_string().contains("max_ranges"), "{none}");
}

#[test]
fn path_without_an_agent_is_an_error_that_names_it() {
    let error = Client::connect("/nonexistent/agent.sock".as_ref(), Config::default()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/agent.sock"), "{error}");
}

#[test]
fn log_and_bitmaps_are_sealed_at_their_size() {
    let config = Config { log_covers: (1 << 30) + 1, ..quiet() };
    let (client, _hooks, agent) = client_with(config, MAX_RANGES, |mut agent| {
        let (_, mut fds) = agent.accept_block();
        (agent, fds.remove(1))
    });
    client.add_block(spec(1, 0, &written(70))).unwrap();
    let (agent, bitmap) = agent.join().unwrap();
    // A page of log covers 128 MiB.
    assert_eq!(fstat(&agent.log).unwrap().st_size, 9 * 4096);
    assert_eq!(identity(&agent.log), identity(&client.log_fd().try_clone_to_owned().unwrap()));
    assert_eq!(fstat(&bitmap).unwrap().st_size, 16);
    for fd in [&agent.log, &bitmap] {
        assert_eq!(
            fcntl_get_seals(fd).unwrap(),
            SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
        );
    }
}

#[test]
fn refusal_surfaces_code_and_sentence_and_the_agent_stays() {
    let (client, _hooks, agent) = client(|mut agent| {
        let (request, _) = agent.request().unwrap();
        agent.refuse(
            &request,
            ErrorCode::System,
            "block 1: length 0x3000 is over the file's 0x2000",
        );
        agent.accept_block();
    });
    let memory = written(2);
    match client.add_block(spec(1, 0, &memory)) {
        Err(Error::Refused { code: ErrorCode::System, sentence }) => {
            assert!(sentence.contains("0x2000"))
        }
        other => panic!("{other:?}"),
    }
    assert!(client.discarded(1).is_none());
    let added = client.add_block(spec(1, 0, &memory)).unwrap();
    assert_eq!((added.host_page_size, added.sealed), (4096, true));
    agent.join().unwrap();
}

#[test]
fn blocks_are_checked_before_the_agent_sees_them() {
    let config = Config { log_covers: 1 << 30, ..quiet() };
    let (client, _hooks, agent) = client_with(config, MAX_RANGES, |mut agent| {
        agent.accept_block();
        assert!(agent.request().is_none(), "nothing else was asked");
    });
    let memory = written(4);
    client.add_block(spec(1, 0x10000, &memory)).unwrap();
    assert!(matches!(client.add_block(spec(2, 0x11000, &memory)), Err(Error::Geometry(_))));
    assert!(matches!(client.add_block(spec(1, 0x90000, &memory)), Err(Error::Geometry(_))));
    let outside = client.add_block(spec(2, 1 << 30, &memory)).unwrap_err();
    assert!(matches!(outside, Error::OutsideLog { id: 2, covers: 0x4000_0000, .. }), "{outside}");
    assert!(matches!(client.remove_block(9), Err(Error::UnknownBlock { id: 9 })));
    drop(client);
    agent.join().unwrap();
}

#[test]
fn silent_agent_is_lost_and_later_calls_fail_at_once() {
    let (client, _hooks, agent) = client_with(impatient(), MAX_RANGES, |mut agent| {
        agent.request().unwrap();
        assert!(agent.request().is_none(), "the client ended the connection");
    });
    assert_lost(client.status());
    agent.join().unwrap();
    let before = Instant::now();
    assert_lost(client.status());
    assert_lost(client.cancel());
    assert_lost(
        client.start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default()),
    );
    assert_eq!(client.ownership(), Ownership::Ours, "nothing was sent");
    assert_lost(
        client.start_outgoing(Target::Address("tcp:[::]:0".into()), &OutgoingOptions::default()),
    );
    assert!(before.elapsed() < Duration::from_secs(5));
}

#[test]
fn events_between_request_and_answer_are_skipped() {
    let status = JobStatus {
        job: 3,
        kind: JobKind::Outgoing,
        phase: Phase::Completed,
        ..JobStatus::default()
    };
    let expected = status.clone();
    let (client, _hooks, agent) = client(move |mut agent| {
        let (request, _) = agent.request().unwrap();
        let event = status.encode(Default::default()).finish();
        agent.control.send(&Frame::request(code::EVENT, event), soon()).unwrap();
        agent.reply(&request, &Ok(status), JobStatus::encode);
    });
    assert_eq!(client.status().unwrap(), expected);
    agent.join().unwrap();
}

#[test]
fn wait_ends_with_its_job_or_at_the_deadline() {
    let (client, _hooks, agent) = client(|mut agent| {
        let phases = [Phase::Passes, Phase::Passes, Phase::Failed, Phase::Failed, Phase::Passes];
        for phase in phases {
            let (request, _) = agent.request().unwrap();
            assert_eq!(request, Request::QueryStatus);
            let status = JobStatus { job: 1, phase, ..JobStatus::default() };
            agent.reply(&request, &Ok(status), JobStatus::encode);
        }
    });
    assert_eq!(client.wait(1, Duration::from_secs(10)).unwrap().phase, Phase::Failed);
    assert!(matches!(client.wait(2, Duration::ZERO), Err(Error::UnknownJob { job: 2, last: 1 })));
    assert!(matches!(
        client.wait(1, Duration::ZERO),
        Err(Error::JobNotEnded { job: 1, phase: "passes", .. })
    ));
    agent.join().unwrap();
}

#[test]
fn requests_carry_their_descriptors() {
    let (client, _hooks, agent) = client(|mut agent| {
        let (request, fds) = agent.request().unwrap();
        let sources = Trackers::HOOKS | Trackers::WRITE_PROTECT;
        assert_eq!((&request, fds.len()), (&Request::SetTrackers { sources }, 1));
        agent.done(&request);
        let (request, fds) = agent.request().unwrap();
        assert!(matches!(&request, Request::StartOutgoing { target, .. } if target == "fd"));
        assert_eq!(fds.len(), 1);
        agent.started(&request);
    });
    client.set_trackers(Trackers::HOOKS | Trackers::WRITE_PROTECT).unwrap();
    let started =
        client.start_outgoing(Target::Socket(written(1)), &OutgoingOptions::default()).unwrap();
    assert_eq!((started.job, started.address.as_str()), (1, "here"));
    let long = Target::Address("x".repeat(5000));
    assert!(matches!(
        client.start_outgoing(long, &OutgoingOptions::default()),
        Err(Error::AddressTooLong { length: 5000 })
    ));
    agent.join().unwrap();
}

#[test]
fn refused_incoming_leaves_the_guest_ours() {
    let (client, _hooks, agent) = client(|mut agent| {
        let (request, _) = agent.request().unwrap();
        agent.refuse(&request, ErrorCode::Busy, "job 1 runs");
        let (request, _) = agent.request().unwrap();
        agent.started(&request);
    });
    let listen = || Target::Address("tcp:[::]:0".into());
    assert!(client.start_incoming(listen(), &IncomingOptions::default()).is_err());
    assert_eq!(client.ownership(), Ownership::Ours);
    client.start_incoming(listen(), &IncomingOptions::default()).unwrap();
    assert_eq!(client.ownership(), Ownership::Awaiting);
    let outgoing = client.start_outgoing(listen(), &OutgoingOptions::default());
    assert!(matches!(outgoing, Err(Error::NotOurs { ownership: Ownership::Awaiting })));
    client.take_by_force().unwrap();
    assert_eq!(client.ownership(), Ownership::Ours);
    agent.join().unwrap();
}

#[test]
fn new_agent_is_handed_the_same_log_blocks_bitmaps_and_trackers() {
    let script = |mut agent: FakeAgent| {
        let mut added: Vec<_> = (0..2).map(|_| agent.accept_block()).collect();
        let (request, _) = agent.request().unwrap();
        agent.done(&request);
        let files: Vec<_> =
            added.iter_mut().map(|(_, fds)| fds.iter().map(identity).collect::<Vec<_>>()).collect();
        let requests: Vec<_> = added.into_iter().map(|(request, _)| request).collect();
        (identity(&agent.log), requests, files, request)
    };
    let (client, hooks, first) = client(script);
    let (low, high) = (written(4), written(2));
    client.add_block(pageferry_client::BlockSpec { discarded: true, ..spec(2, 0, &low) }).unwrap();
    client.add_block(spec(1, 0x10000, &high)).unwrap();
    client.set_trackers(Trackers::HOOKS).unwrap();
    // The first agent is gone. The following changes are made without it.
    let (log, mut requests, mut files, trackers) = first.join().unwrap();
    client.populate(&[range(2, 0, 1)]).unwrap();
    client.discard(&[range(1, 1, 1)], Default::default()).unwrap();

    let (ours, agents) = UnixStream::pair().unwrap();
    let second =
        std::thread::spawn(move || script(FakeAgent::shake_hands(agents.into(), MAX_RANGES)));
    let new_hooks = client.reattach_socket(ours.into()).unwrap();
    let again = second.join().unwrap();

    // The client adds the blocks again in the order of their ids, and without the flag that a block
    // starts discarded.
    requests.reverse();
    files.reverse();
    match &mut requests[1] {
        Request::AddBlock { flags, .. } => {
            assert_eq!(*flags, BLOCK_DISCARDED);
            *flags = 0;
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(again, (log, requests, files, trackers));
    assert_eq!(discarded(&client, 2), [1, 2, 3]);
    assert_eq!(discarded(&client, 1), [1]);
    drop((hooks, new_hooks));
}

#[test]
fn block_removed_without_an_agent_is_not_handed_to_the_next() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
    });
    client.add_block(spec(1, 0, &written(1))).unwrap();
    agent.join().unwrap();
    client.remove_block(1).unwrap();
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = std::thread::spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        assert!(agent.request().is_none());
    });
    let _hooks = client.reattach_socket(ours.into()).unwrap();
    drop(client);
    second.join().unwrap();
}

#[test]
fn last_clone_of_the_client_ends_the_connection() {
    let (client, hooks, agent) = client(|mut agent| assert!(agent.request().is_none()));
    let clone = client.clone();
    drop(client);
    assert!(!agent.is_finished());
    drop(clone);
    agent.join().unwrap();
    drop(hooks);
}

#[test]
fn spawned_program_that_ends_at_once_is_noticed() {
    // If this process still had the agent's end of the socket open, the client would notice only at
    // the request timeout.
    let error = Client::spawn(&mut Command::new("true"), Config::default()).unwrap_err();
    assert!(error.to_string().contains("it closed the connection"), "{error}");
}

#[test]
fn spawned_program_that_does_not_answer_is_killed() {
    let error = Client::spawn(Command::new("sleep").arg("1000"), impatient()).unwrap_err();
    assert_lost(Err::<(), _>(error));
    let error =
        Client::spawn(&mut Command::new("/nonexistent/pageferry"), Config::default()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/pageferry"), "{error}");
}

fn range(block: u32, first: u64, count: u64) -> pageferry_client::BlockRange {
    pageferry_client::BlockRange { block, offset: first * PAGE, length: count * PAGE }
}

#[test]
fn settings_made_without_an_agent_reach_the_next() {
    let (client, _hooks, agent) = client(drop);
    agent.join().unwrap();
    assert_lost(client.status());
    let (low, high) = (written(4), written(2));
    let added = client
        .add_block(pageferry_client::BlockSpec { discarded: true, ..spec(2, 0, &low) })
        .unwrap();
    assert_eq!((added.host_page_size, added.sealed), (4096, false));
    client.add_block(spec(1, 0x10000, &high)).unwrap();
    let short = client
        .add_block(pageferry_client::BlockSpec { fd_offset: PAGE, ..spec(3, 0x90000, &high) })
        .unwrap_err();
    let short = pageferry_client::error::chain(&short);
    assert_eq!(
        short,
        "block 3: file of 0x2000 bytes is shorter than fd_offset 0x1000 + length 0x2000"
    );
    let append = written(2);
    rustix::fs::fcntl_setfl(&append, rustix::fs::OFlags::APPEND).unwrap();
    let append = client.add_block(spec(3, 0x90000, &append)).unwrap_err();
    assert!(pageferry_client::error::chain(&append).contains("O_APPEND"), "{append}");
    client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
    assert_eq!(client.trackers(), Trackers::LOG_IS_COMPLETE);
    assert!(matches!(client.set_trackers(Trackers::default()), Err(Error::EmptyTrackers)));
    client.populate(&[range(2, 0, 1)]).unwrap();

    let (ours, agents) = UnixStream::pair().unwrap();
    let second = std::thread::spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        let blocks = [agent.accept_block().0, agent.accept_block().0];
        let (request, _) = agent.request().unwrap();
        agent.done(&request);
        (blocks, request)
    });
    let _hooks = client.reattach_socket(ours.into()).unwrap();
    let (blocks, trackers) = second.join().unwrap();
    let ids = blocks.map(|request| match request {
        Request::AddBlock { geometry, .. } => geometry.id,
        other => panic!("{other:?}"),
    });
    assert_eq!(ids, [1, 2]);
    assert_eq!(trackers, Request::SetTrackers { sources: Trackers::LOG_IS_COMPLETE });
    assert_eq!(discarded(&client, 2), [1, 2, 3]);
}

#[test]
fn removal_cancels_the_job_and_waits_for_its_end() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        for cancelled in [
            Ok(()),
            Err((ErrorCode::State, "too late")),
            Err((ErrorCode::NotFound, "no job is running")),
        ] {
            let (request, _) = agent.request().unwrap();
            assert_eq!(request, Request::RemoveBlock { id: 1 });
            agent.refuse(&request, ErrorCode::Busy, "job 1 is running");
            let (request, _) = agent.request().unwrap();
            assert_eq!(request, Request::Cancel);
            match cancelled {
                Ok(()) => agent.done(&request),
                Err((code, sentence)) => agent.refuse(&request, code, sentence),
            }
        }
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::RemoveBlock { id: 1 });
        agent.done(&request);
    });
    client.add_block(spec(1, 0, &written(1))).unwrap();
    client.remove_block(1).unwrap();
    assert!(client.discarded(1).is_none());
    agent.join().unwrap();
}

#[test]
fn idle_agent_that_hangs_is_found_without_a_request() {
    let config = Config { heartbeat: Duration::from_millis(50), ..impatient() };
    let (client, channel, agent) = client_with(config, MAX_RANGES, |mut agent| {
        for _ in 0..2 {
            let (request, _) = agent.request().unwrap();
            assert_eq!(request, Request::QueryStatus);
            agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode);
        }
        agent
    });
    let hooks = channel.spawn(Vmm::default()).unwrap();
    // The agent keeps its sockets open.
    let _agent = agent.join().unwrap();
    assert_eq!(hooks.join().calls(), ["lost Ours"]);
    assert_lost(client.status());
}

#[test]
fn a_weak_client_does_not_keep_the_connection() {
    let (client, _channel, agent) = client(|mut agent| agent.request());
    let weak = client.downgrade();
    assert_eq!(weak.upgrade().unwrap().agent_pid(), std::process::id());
    drop(client);
    assert!(weak.upgrade().is_none());
    assert!(agent.join().unwrap().is_none(), "the connection has ended");
}

/// The sentence of the lost agent.
fn lost_because(error: Error) -> String {
    match error {
        Error::AgentLost { reason } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lost_agent_is_told_with_the_request_and_the_time() {
    let (silent, _channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let kept = agent.join().unwrap();
    let reason = lost_because(silent.status().unwrap_err());
    let waited = reason.strip_prefix("it has not answered QUERY_STATUS within ");
    let waited = waited.and_then(|rest| rest.strip_suffix(" ms")).map(str::parse::<u64>);
    // The time that it waited, which a busy machine makes longer.
    assert!(matches!(waited, Some(Ok(500..))), "{reason}");
    assert_eq!(lost_because(silent.cancel().unwrap_err()), reason, "for every later request");
    drop(kept);

    let (closed, _channel, agent) = client(drop);
    agent.join().unwrap();
    let reason = lost_because(closed.cancel().unwrap_err());
    assert_eq!(reason, "it closed the connection and has not answered CANCEL");
}
