// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fencing: an agent that was given up can do no harm before another agent, or an operator, takes
//! over the guest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{Client, Config, Error, Ownership, Punch};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::reply::{HelloReply, encode_reply};
use pageferry_protocol::control::request::{FEATURE_FENCE, MAX_RANGES};
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;
use support::*;

/// A process that a lying agent claims to be.
struct Victim(Child);

impl Victim {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn pidfd(&self) -> OwnedFd {
        pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty()).unwrap()
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A client whose agent claims to be the victim's process.
fn lied_to(victim: &Victim, config: Config) -> (Client, pageferry_client::HookChannel, FakeAgent) {
    let (ours, agents) = UnixStream::pair().unwrap();
    let process = victim.pidfd();
    let agent =
        std::thread::spawn(move || FakeAgent::shake_hands_as(agents.into(), MAX_RANGES, process));
    let (client, channel) = Client::from_socket(ours.into(), config).unwrap();
    (client, channel, agent.join().unwrap())
}

#[test]
fn only_the_agent_that_has_the_memory_is_current() {
    let (client, _channel, first) = client(|agent| agent);
    let first = first.join().unwrap();
    first.fence.check().unwrap();
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = std::thread::spawn(move || {
        let (control, fence) = FakeAgent::say_hello(agents.into(), MAX_RANGES, own_process());
        // The fence word changes before the old agent can see the end of its connection.
        let replaced = first.fence.check().unwrap_err();
        // The next agent may become current at any moment from here on.
        assert!([0, replaced.number + 1].contains(&replaced.current), "{replaced:?}");
        (first, FakeAgent::take_over(control, fence))
    });
    let _channel = client.reattach_socket(ours.into()).unwrap();
    let (mut first, second) = second.join().unwrap();
    assert!(first.request().is_none());
    assert!(first.fence.check().unwrap_err().current > 0);
    drop(client);
    assert_eq!(second.fence.check().unwrap_err().current, 0);
}

#[test]
fn given_up_agent_is_not_current() {
    let (hangs, _channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let agent = agent.join().unwrap();
    assert_lost(hangs.status());
    assert_eq!(agent.fence.check().unwrap_err().current, 0);

    let (_client, mut channel, agent) = connected();
    rustix::io::write(&agent.hooks, &[0xff; 12]).unwrap();
    channel.dispatch(&mut Vmm::default()).unwrap_err();
    assert_eq!(agent.fence.check().unwrap_err().current, 0);
}

#[test]
fn no_agent_is_attached_before_the_last_process_has_ended() {
    let mut victim = Victim::new();
    let (client, _channel, mut first) = lied_to(&victim, impatient());
    for _ in 0..2 {
        let (ours, agents) = UnixStream::pair().unwrap();
        let next = std::thread::spawn(move || {
            let (mut control, fence) =
                FakeAgent::say_hello(agents.into(), MAX_RANGES, own_process());
            // The new agent gets no memory and never becomes current.
            assert!(matches!(control.recv(soon()), Err(SocketError::Closed)));
            assert_eq!(fence.check().unwrap_err().current, 0);
        });
        let error = client.reattach_socket(ours.into()).unwrap_err();
        assert!(matches!(&error, Error::AgentStillRunning { .. }), "{error:?}");
        assert!(error.to_string().contains("does not confirm"), "{error}");
        next.join().unwrap();
        assert_lost(client.status());
    }
    // The kernel reports that another process answered the hello. So the client may not kill this
    // process.
    assert!(victim.lives());
    assert!(first.request().is_none());
    drop(victim);
    let (ours, agents) = UnixStream::pair().unwrap();
    let next = std::thread::spawn(move || FakeAgent::shake_hands(agents.into(), MAX_RANGES));
    let _channel = client.reattach_socket(ours.into()).unwrap();
    next.join().unwrap().fence.check().unwrap();
}

#[test]
fn guest_is_not_taken_by_force_while_a_commit_may_leave() {
    let mut victim = Victim::new();
    let (client, channel, mut agent) = lied_to(&victim, impatient());
    let hooks = channel.spawn(Vmm::default()).unwrap();
    agent.hook(&Hook::Pause).unwrap();
    agent.hook(&Hook::Relinquish { session: [0; 16], release: false }).unwrap();
    for _ in 0..2 {
        let error = client.take_by_force().unwrap_err();
        assert!(matches!(error, Error::AgentStillRunning { .. }), "{error:?}");
        assert_eq!(client.ownership(), Ownership::Relinquished);
        assert_eq!(agent.fence.check().unwrap_err().current, 0);
    }
    assert!(victim.lives());
    drop(victim);
    client.end_agent().unwrap();
    assert_eq!(client.ownership(), Ownership::Relinquished);
    client.take_by_force().unwrap();
    assert_eq!(client.ownership(), Ownership::Ours);
    // Only the operator that took the guest resumes it.
    assert!(!hooks.join().calls().contains(&"resume".to_owned()));
}

#[test]
fn an_agent_without_a_fence_or_a_process_is_refused_by_name() {
    let answered = |features, fds: fn() -> Vec<OwnedFd>| {
        let (ours, agents) = UnixStream::pair().unwrap();
        let agent = std::thread::spawn(move || {
            let mut control = FrameSocket::from(OwnedFd::from(agents));
            let hello = control.recv(soon()).unwrap();
            let reply =
                HelloReply { version: 1, features, max_body: 1 << 20, max_ranges: 7, pid: 1 };
            let body = encode_reply(&Ok(reply), HelloReply::encode);
            let reply = Frame { fds: fds(), ..Frame::reply(hello.request, body) };
            control.send(&reply, soon()).unwrap();
        });
        let error = Client::from_socket(ours.into(), Config::default()).unwrap_err();
        agent.join().unwrap();
        error.to_string()
    };
    let without = answered(0, Vec::new);
    assert!(without.contains("features is 0x0, expected is 0x1, fence"), "{without}");
    let none = answered(FEATURE_FENCE, Vec::new);
    assert!(none.contains("0 file descriptors, expected is 1, a pidfd"), "{none}");
    let two = answered(FEATURE_FENCE, || vec![own_process(), own_process()]);
    assert!(two.contains("2 file descriptors"), "{two}");
}

/// A memory change without an agent waits for the end of the lost agent's process. A discard cannot
/// fail, so it is done after a timeout. Other changes fail until the process has ended: otherwise
/// the guest could use memory that a late discard of that agent destroys.
#[test]
fn lost_agents_process_blocks_all_memory_changes_but_discards() {
    let victim = Victim::new();
    let (client, _channel, mut agent) = lied_to(&victim, impatient());
    let accepts = std::thread::spawn(move || {
        agent.accept_block();
    });
    let memory = written(4);
    client.add_block(spec(1, 0, &memory)).unwrap();
    accepts.join().unwrap();
    let range = pageferry_client::BlockRange { block: 1, offset: PAGE, length: 2 * PAGE };
    for changed in [2, 0] {
        assert_eq!(client.discard(&[range], Punch::Yes).unwrap(), changed);
    }
    assert_eq!(allocated_pages(&memory), 2);
    let last = pageferry_client::BlockRange { block: 1, offset: 3 * PAGE, length: PAGE };
    let runs =
        |outcome: Result<u64, Error>| matches!(outcome, Err(Error::AgentStillRunning { .. }));
    assert!(runs(client.populate(&[range])) && runs(client.free(&[last])));
    assert!(runs(client.remove_block(1).map(|()| 0)));
    assert_eq!(
        client.discarded(1).unwrap().count(pageferry_protocol::memory::PageRange::new(0, 4)),
        2
    );
    assert_eq!(allocated_pages(&memory), 2, "the refused free kept the pages");
    drop(victim);
    assert_eq!(client.populate(&[range]).unwrap(), 2);
    assert_eq!(client.free(&[last]).unwrap(), 1);
    client.remove_block(1).unwrap();
}

/// A new agent that refuses the connection does not change that the old agent may still read
/// memory.
#[test]
fn refused_reattach_still_waits_for_the_old_agent() {
    let victim = Victim::new();
    let (client, _channel, mut agent) = lied_to(&victim, impatient());
    let accepts = std::thread::spawn(move || {
        agent.accept_block();
        agent
    });
    let memory = written(4);
    client.add_block(spec(1, 0, &memory)).unwrap();
    let _agent = accepts.join().unwrap();
    let (ours, refuses) = UnixStream::pair().unwrap();
    drop(refuses);
    assert_lost(client.reattach_socket(ours.into()));
    let error = client.remove_block(1).unwrap_err();
    assert!(matches!(error, Error::AgentStillRunning { .. }), "{error:?}");
    drop(victim);
    client.remove_block(1).unwrap();
}

/// A relinquished guest may run elsewhere, and get its memory from an agent whose VMM has lost it.
/// That agent is not killed, and still reads the memory here.
#[test]
fn relinquished_memory_is_not_removed_while_its_agent_lives() {
    let victim = Victim::new();
    let (client, channel, mut agent) = lied_to(&victim, impatient());
    let hooks = channel.spawn(Vmm::default()).unwrap();
    let memory = written(4);
    let agent = std::thread::scope(|scope| {
        let accepts = scope.spawn(move || {
            agent.accept_block();
            agent
        });
        client.add_block(spec(1, 0, &memory)).unwrap();
        accepts.join().unwrap()
    });
    let mut agent = agent;
    agent.hook(&Hook::Pause).unwrap();
    agent.hook(&Hook::Relinquish { session: [0; 16], release: false }).unwrap();
    drop(agent);
    let error = client.remove_block(1).unwrap_err().to_string();
    assert!(error.contains("the guest may run elsewhere, and depends on it"), "{error}");
    drop(victim);
    client.remove_block(1).unwrap();
    hooks.join();
}

#[test]
fn agent_that_sends_all_but_the_reply_is_lost_in_time() {
    let (client, _channel, agent) = client_with(impatient(), MAX_RANGES, |mut agent| {
        agent.request().expect("status");
        // The agent sends events until the client closes the connection.
        let event = Frame::request(pageferry_protocol::control::request::code::EVENT, Vec::new());
        while agent.control.send(&event, soon()).is_ok() {}
    });
    assert_lost(client.status());
    agent.join().unwrap();
}

#[test]
fn descriptor_that_is_not_a_pidfd_is_refused() {
    let (ours, agents) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || {
        FakeAgent::say_hello(
            agents.into(),
            MAX_RANGES,
            std::fs::File::open("/dev/null").unwrap().into(),
        )
    });
    let error = Client::from_socket(ours.into(), Config::default()).unwrap_err().to_string();
    assert!(error.contains("its file descriptor is no pidfd"), "{error}");
    let _ = agent.join();
}

#[test]
fn vmm_learns_of_a_lost_agent_before_its_process_ends() {
    let victim = Victim::new();
    // A client that waited for the end of the process would wait for an hour.
    let patient = Config { request_timeout: Duration::from_secs(3600), ..quiet() };
    let (client, channel, agent) = lied_to(&victim, patient);
    let mut attached = Attached::over(client, channel, agent, Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (says, lost) = std::sync::mpsc::channel();
    std::thread::spawn(move || says.send(attached.lose_agent().1.calls()));
    let calls =
        lost.recv_timeout(Duration::from_secs(60)).expect("the channel waits for the process");
    assert_eq!(calls, ["pause", "resume", "lost Ours"]);
    drop(victim);
}
