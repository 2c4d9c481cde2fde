//! Failures at every moment of a migration: the other side hears of it in bounded time, the source's guest runs on and migrates at the next
//! try; and once ownership was given up, it stands still.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{At, Passing, Ram, Relay, SOON, Side, Vmm, VmmHooks, migrates_next_time, passes};
use pageferry_client::{
    Client, Config, Error, ErrorCode, HookError, IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase, Punch,
    Target,
};
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::request::{Reply, Request, decode_reply};
use pageferry_protocol::control::{Frame, FrameSocket};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::AgentProcess;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGES: u64 = 200;
/// A deadline that a test waits for.
const SHORT: Duration = Duration::from_millis(400);
/// Within this, a deadline of [`SHORT`] was kept, on a machine with other things to do.
const BOUND: Duration = Duration::from_secs(10);

fn filled() -> Side {
    let side = Side::new(Ram::odd(PAGES));
    for page in 0..PAGES {
        side.ram.write(page, 1000 + page);
    }
    side
}

/// A migration through a relay.
struct Scene {
    relay: Relay,
    source: Side,
    destination: Option<Side>,
    outgoing: u64,
    incoming: u64,
}

impl Scene {
    fn start(options: &OutgoingOptions) -> Self {
        let (relay, source, destination) = (Relay::new(), filled(), Side::new(Ram::odd(PAGES)));
        Self::start_with(relay, source, destination, options)
    }

    fn start_with(relay: Relay, source: Side, destination: Side, options: &OutgoingOptions) -> Self {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = *options;
        let incoming = destination.listen(&relay.destination(), &IncomingOptions { peer_timeout, hook_timeout });
        let outgoing = source.send(&relay.path(), options);
        Self { relay, source, destination: Some(destination), outgoing, incoming }
    }

    fn destination(&self) -> &Side {
        self.destination.as_ref().unwrap()
    }

    /// The destination's VMM and agent are gone.
    fn kill_destination(&mut self) {
        self.relay.cut();
        drop(self.destination.take());
    }

    /// The source's job failed, and its guest runs.
    fn assert_source_failed(&self) -> JobStatus {
        let status = self.source.wait(self.outgoing);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error);
        assert!(!status.error.is_empty());
        assert!(!self.source.vmm.is_paused(), "the guest stands still");
        assert_eq!(self.source.client.ownership(), Ownership::Ours);
        status
    }

    /// The destination's job failed, and nothing runs there.
    fn assert_destination_failed(&self) -> JobStatus {
        let status = self.destination().wait(self.incoming);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error);
        assert!(!status.error.is_empty());
        assert_eq!(self.destination().vmm.resumes(), 0);
        assert_ne!(self.destination().client.ownership(), Ownership::Ours);
        status
    }
}

type Moment = (&'static str, fn(&Passing) -> bool);

/// Records at which a migration is interrupted, one for each phase: what comes there is not delivered.
const MOMENTS: [Moment; 11] = [
    ("before the hello", |record| record.kind == Kind::Hello),
    ("before the accept", |record| record.kind == Kind::Accept),
    ("at the start of pass 0", |record| record.kind == Kind::Data),
    ("in pass 0", |record| record.carries(PAGES - 1)),
    ("at the end of pass 0", |record| record.is(Kind::PassEnd, 0) && record.to_destination),
    ("between the passes", |record| record.is(Kind::PassDone, 0)),
    ("after the state", |record| record.kind == Kind::State),
    ("at the end of the last pass", |record| record.is(Kind::PassDone, 2)),
    ("before the end", |record| record.kind == Kind::End),
    ("before loaded", |record| record.kind == Kind::Loaded),
    ("in the last pass", |record| record.is(Kind::PassEnd, 2)),
];

#[test]
fn a_destination_that_dies_leaves_the_guest_running_and_able_to_migrate() {
    for (moment, is_there) in MOMENTS {
        eprintln!("destination dies {moment}");
        let mut scene = Scene::start(&passes(2));
        let _record = scene.relay.until(is_there);
        scene.source.write(7, 77);
        let started = Instant::now();
        scene.kill_destination();
        scene.assert_source_failed();
        assert!(started.elapsed() < BOUND);
        scene.source.write(8, 88);
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_connection_that_is_cut_fails_both_sides_and_both_migrate_next_time() {
    for (moment, is_there) in MOMENTS {
        eprintln!("cut {moment}");
        let mut scene = Scene::start(&passes(2));
        let record = scene.relay.until(is_there);
        // The middle of a record, where it has one.
        let part = record.bytes().len() / 2;
        let started = Instant::now();
        scene.relay.cut_in(&record, part);
        scene.assert_source_failed();
        if moment == "before the hello" {
            // What never said hello is not the job's end: it waits for another.
            assert_eq!(scene.destination().client.status().unwrap().phase, Phase::Connecting);
            scene.destination().client.cancel().unwrap();
            assert_eq!(scene.destination().wait(scene.incoming).phase, Phase::Cancelled);
        } else {
            scene.assert_destination_failed();
        }
        assert!(started.elapsed() < BOUND);
        // The same two sides, without the relay.
        let destination = scene.destination();
        let path = scene.relay.folder.path().join("again");
        let incoming = destination.listen(&path, &IncomingOptions::default());
        let outgoing = scene.source.send(&path, &passes(1));
        assert_eq!(scene.source.wait(outgoing).phase, Phase::Completed);
        assert_eq!(destination.wait(incoming).phase, Phase::Completed);
        assert_eq!(destination.vmm.resumes(), 1);
        common::assert_same(&scene.source.ram, &destination.ram);
    }
}

#[test]
fn one_of_several_streams_that_is_cut_fails_both_sides_in_bounded_time() {
    for pass in 0..3 {
        for part in [0, 16] {
            let mut scene = Scene::start(&OutgoingOptions { streams: 4, ..passes(2) });
            // The second to end the pass, while others have ended it and others have not.
            let mut ended = 0;
            let record = scene.relay.until(|record| {
                ended += u32::from(record.is(Kind::PassEnd, pass));
                ended == 2
            });
            let started = Instant::now();
            scene.relay.cut_one(&record, part);
            let status = scene.relay.finish(&scene.source, scene.outgoing);
            assert_eq!(status.phase, Phase::Failed, "{}", status.error);
            scene.assert_source_failed();
            scene.assert_destination_failed();
            assert!(started.elapsed() < BOUND);
            migrates_next_time(&scene.source);
        }
    }
}

#[test]
fn a_file_that_is_truncated_under_the_agent_fails_the_job_and_the_session_goes_on() {
    for (moment, is_there) in [MOMENTS[0], MOMENTS[5]] {
        eprintln!("truncated {moment}");
        let source = Side::new(Ram::unsealed(PAGES));
        for page in 0..PAGES {
            source.ram.write(page, 1000 + page);
        }
        let mut scene = Scene::start_with(Relay::new(), source, Side::new(Ram::odd(PAGES)), &passes(2));
        let record = scene.relay.until(is_there);
        let ram = scene.source.ram.clone();
        let whole = ram.fd_offset + PAGES * PAGE_SIZE;
        rustix::fs::ftruncate(&ram.fd, whole - 10 * PAGE_SIZE).unwrap();
        scene.source.client.log().mark(PageRange::new(ram.gpa / PAGE_SIZE + PAGES - 5, 1));
        scene.relay.pass(record);
        let status = scene.relay.finish(&scene.source, scene.outgoing);
        assert!(status.error.contains("block 3") && status.error.contains("truncated"), "{}", status.error);
        scene.assert_source_failed();
        let there = scene.assert_destination_failed();
        assert!(there.error.contains("truncated"), "the destination is told: {}", there.error);
        // A discard of what is not there any more is no less a discard.
        assert_eq!(scene.source.client.discard(&[ram.range(PAGES - 5, 5)], Punch::Yes).unwrap(), 5);
        rustix::fs::ftruncate(&ram.fd, whole).unwrap();
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_destination_that_dies_before_it_has_the_commit_leaves_an_unconfirmed_guest_that_stands_still() {
    let mut scene = Scene::start(&passes(1));
    let _commit = scene.relay.until(|record| record.kind == Kind::Commit);
    scene.kill_destination();
    let status = scene.source.wait(scene.outgoing);
    assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error);
    assert!(scene.source.vmm.is_paused());
    assert_eq!(scene.source.vmm.resumes(), 0);
}

#[test]
fn a_peer_that_falls_silent_is_an_error_within_its_timeout() {
    for (moment, is_there) in MOMENTS {
        eprintln!("silent {moment}");
        let options = OutgoingOptions { peer_timeout: SHORT, hook_timeout: SHORT, ..passes(2) };
        let mut scene = Scene::start(&options);
        // From now on nothing is passed on, and nothing is closed.
        let _record = scene.relay.until(is_there);
        let started = Instant::now();
        let status = scene.assert_source_failed();
        // Whichever the source was at: waiting for an answer, or for room to send.
        let words = ["was silent for 400ms", "took nothing for 400ms"];
        assert!(words.iter().any(|words| status.error.contains(words)), "{}", status.error);
        assert!(started.elapsed() < BOUND);
        if moment != "before the hello" {
            let status = scene.assert_destination_failed();
            assert!(status.error.contains("silent") || status.error.contains("closed"), "{}", status.error);
        }
        assert!(started.elapsed() < BOUND);
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_peer_that_does_not_accept_the_connection_is_an_error_within_its_timeout() {
    let source = filled();
    let folder = tempfile::tempdir().unwrap();
    let options = OutgoingOptions { peer_timeout: SHORT, ..passes(1) };
    // Nobody is there.
    let outgoing = source.send(&folder.path().join("nobody"), &options);
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error.contains("nobody"), "{}", status.error);
    // One that listens, and does nothing more.
    let path = folder.path().join("deaf");
    let _listener = UnixListener::bind(&path).unwrap();
    let started = Instant::now();
    let outgoing = source.send(&path, &options);
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error.contains("silent"), "{}", status.error);
    assert!(started.elapsed() < BOUND);
    assert!(!source.vmm.is_paused());
    migrates_next_time(&source);
}

#[test]
fn a_hook_that_never_answers_fails_the_job_and_the_guest_runs_on() {
    for (name, at) in
        [("pause", At::Pause), ("save state", At::SaveState), ("relinquish", At::phase(Phase::Committing))]
    {
        let source = filled();
        let hold = source.vmm.block(at);
        let options = OutgoingOptions { hook_timeout: SHORT, ..passes(1) };
        let mut scene = Scene::start_with(Relay::new(), source, Side::new(Ram::odd(PAGES)), &options);
        let started = Instant::now();
        let status = scene.relay.finish(&scene.source, scene.outgoing);
        assert_eq!(status.phase, Phase::Failed, "{name}: {}", status.error);
        assert!(status.error.contains(&format!("\"{name}\"")), "{name}: {}", status.error);
        assert!(started.elapsed() < BOUND);
        scene.assert_destination_failed();
        // The VMM comes back to itself, answers what it was asked, too late, and finds that it is to run.
        scene.source.vmm.off(at);
        drop(hold);
        let runs = || !scene.source.vmm.is_paused() && scene.source.client.ownership() == Ownership::Ours;
        wait_until("the guest to run on", SOON, || scene.source.vmm.resumes() > 0 && runs()).unwrap();
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_hook_that_fails_fails_the_job_with_its_sentence_and_the_guest_runs_on() {
    for at in [At::Pause, At::SaveState] {
        let source = filled();
        source.vmm.on(at, || Err(HookError::new("the vCPU is stuck")));
        let mut scene = Scene::start_with(Relay::new(), source, Side::new(Ram::odd(PAGES)), &passes(1));
        let status = scene.relay.finish(&scene.source, scene.outgoing);
        assert!(status.error.contains("the vCPU is stuck"), "{}", status.error);
        scene.assert_source_failed();
        let there = scene.assert_destination_failed();
        assert!(there.error.contains("the vCPU is stuck"), "{}", there.error);
        scene.source.vmm.off(at);
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_destination_that_cannot_load_the_state_fails_both_sides_and_the_guest_runs_on() {
    for (never, words) in [(false, "no such device"), (true, "\"load state\"")] {
        let destination = Side::new(Ram::odd(PAGES));
        let hold = never.then(|| destination.vmm.block(At::LoadState));
        if !never {
            destination.vmm.on(At::LoadState, || Err(HookError::new("no such device")));
        }
        let options = OutgoingOptions { hook_timeout: SHORT, ..passes(1) };
        let mut scene = Scene::start_with(Relay::new(), filled(), destination, &options);
        let status = scene.relay.finish(&scene.source, scene.outgoing);
        assert!(status.error.contains(words), "the source says why, too: {}", status.error);
        scene.assert_source_failed();
        let there = scene.assert_destination_failed();
        assert!(there.error.contains(words), "{}", there.error);
        drop(hold);
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_cancel_leaves_the_guest_running_at_every_moment_before_the_line() {
    for (moment, is_there) in MOMENTS {
        eprintln!("cancelled {moment}");
        let mut scene = Scene::start(&passes(2));
        let record = scene.relay.until(is_there);
        scene.source.client.cancel().unwrap();
        scene.relay.pass(record);
        let status = scene.relay.finish(&scene.source, scene.outgoing);
        assert_eq!(status.phase, Phase::Cancelled, "{}", status.error);
        assert!(!scene.source.vmm.is_paused());
        migrates_next_time(&scene.source);
    }
}

// ---- After the line.

/// An agent that listens, for a VMM and its operator.
struct Listening {
    path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Listening {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let mut server = pageferry_agent::server::Server::new().unwrap();
        server.listen(&path).unwrap();
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        server.stop_on(stopped).unwrap();
        let thread = std::thread::spawn(move || server.run().unwrap());
        Self { path, stop, thread: Some(thread), _folder: folder }
    }

    /// Asks as an operator does, on a connection of its own.
    fn ask(&self, request: &Request) -> Reply<()> {
        let mut socket = FrameSocket::from(OwnedFd::from(UnixStream::connect(&self.path).unwrap()));
        socket.send(&Frame::request(request.code(), request.encode()), Instant::now() + SOON).unwrap();
        let reply = socket.recv(Instant::now() + SOON).unwrap();
        decode_reply(&reply.body, |decoder| {
            decoder.remainder();
            Ok::<_, DecodeError>(())
        })
        .unwrap()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &[1]).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_link_that_dies_after_the_commit_leaves_a_guest_that_only_force_resumes() {
    let agent = Listening::new();
    let config = Config { log_covers: 1 << 30, ..Config::default() };
    let (client, channel) = Client::connect(&agent.path, config).unwrap();
    let vmm = Vmm::new();
    channel.spawn(VmmHooks(vmm.clone())).unwrap();
    let ram = Ram::odd(PAGES);
    ram.add_to(&client);
    ram.write(3, 33);
    let destination = Side::new(Ram::odd(PAGES));
    let mut relay = Relay::new();
    let incoming = destination.listen(&relay.destination(), &IncomingOptions::default());
    let target = || Target::Address(format!("unix:{}", relay.folder.path().join("relay").display()));
    let outgoing = client.start_outgoing(target(), &passes(1)).unwrap().job;
    let again = target();

    let _resumed = relay.until(|record| record.kind == Kind::Resumed);
    assert!(client.cancel().is_err(), "after the line it is too late to cancel");
    relay.cut();
    let status = client.wait(outgoing, SOON).unwrap();
    assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error);
    assert!(status.error.contains("did not confirm"), "{}", status.error);
    assert_eq!(destination.wait(incoming).phase, Phase::Completed);
    assert_eq!(destination.vmm.resumes(), 1, "it runs there");
    assert!(vmm.is_paused());
    assert_eq!(vmm.resumes(), 0);
    assert_eq!(client.ownership(), Ownership::Relinquished);

    // Neither the VMM nor an operator gets it to run or to migrate here by mistake.
    assert!(matches!(client.start_outgoing(again, &passes(1)), Err(Error::NotOurs { .. })));
    let start = Request::StartOutgoing { target: "unix:/nowhere".into(), options: passes(1) };
    assert_eq!(agent.ask(&start).unwrap_err().code, ErrorCode::State);
    let refused = agent.ask(&Request::Resume { force: false }).unwrap_err();
    assert_eq!(refused.code, ErrorCode::State);
    assert!(refused.sentence.contains("force"), "{refused}");
    assert_eq!(vmm.resumes(), 0);
    assert!(vmm.is_paused());

    // An operator who looked at both sides does.
    agent.ask(&Request::Resume { force: true }).unwrap();
    assert_eq!(vmm.resumes(), 1);
    assert!(!vmm.is_paused());
    assert_eq!(client.ownership(), Ownership::Ours);
    // Before the agent is waited for.
    drop(client);
}

#[test]
fn after_the_commit_neither_the_end_of_the_agent_nor_a_resume_runs_the_guest_at_the_source() {
    let mut scene = Scene::start(&passes(1));
    let status = scene.relay.finish(&scene.source, scene.outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    assert_eq!(scene.destination().wait(scene.incoming).phase, Phase::Completed);
    wait_until("the guest to be gone", SOON, || scene.source.client.ownership() == Ownership::Gone).unwrap();
    assert!(matches!(
        scene.source.client.start_outgoing(Target::Address("unix:/nowhere".into()), &passes(1)),
        Err(Error::NotOurs { .. })
    ));
    let Side { client, vmm, ram: _ram, agent } = scene.source;
    drop(client);
    drop(agent);
    assert!(vmm.is_paused());
    assert_eq!(vmm.resumes(), 0);
}

// ---- Agents and VMMs that die.

/// An agent that ends in good order, or is killed.
enum Agent {
    Stopped(Listening),
    Killed(AgentProcess, tempfile::TempDir),
}

impl Agent {
    fn process() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = env!("CARGO_BIN_EXE_pageferry-test-process");
        Self::Killed(AgentProcess::spawn(program.as_ref(), folder.path(), "agent").unwrap(), folder)
    }

    fn socket(&self) -> &Path {
        match self {
            Self::Stopped(agent) => &agent.path,
            Self::Killed(agent, _) => agent.socket(),
        }
    }

    fn end(self) {
        if let Self::Killed(mut agent, _folder) = self {
            agent.process().kill().unwrap();
        }
    }
}

/// A VMM on an agent that listens.
struct Attached {
    client: Client,
    vmm: Arc<Vmm>,
    ram: Ram,
}

impl Attached {
    fn new(socket: &Path) -> Self {
        let config = Config { log_covers: 1 << 30, ..Config::default() };
        let (client, channel) = Client::connect(socket, config).unwrap();
        let vmm = Vmm::new();
        channel.spawn(VmmHooks(vmm.clone())).unwrap();
        let ram = Ram::odd(PAGES);
        ram.add_to(&client);
        for page in 0..PAGES {
            ram.write(page, 1000 + page);
        }
        Self { client, vmm, ram }
    }

    fn send(&self, path: &Path, options: &OutgoingOptions) -> u64 {
        self.client.start_outgoing(Target::Address(format!("unix:{}", path.display())), options).unwrap().job
    }

    /// Sends the guest, and checks that it arrived.
    fn migrates(&self) -> Side {
        let there = Side::new(Ram::odd(PAGES));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("next");
        let incoming = there.listen(&path, &IncomingOptions::default());
        let outgoing = self.send(&path, &passes(1));
        let status = self.client.wait(outgoing, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error);
        assert_eq!(there.wait(incoming).phase, Phase::Completed);
        common::assert_same(&self.ram, &there.ram);
        assert_eq!(there.vmm.resumes(), 1);
        there
    }
}

/// The source's agent dies at every moment; the VMM goes on without it, and with the next one.
fn lose_the_source_agent(agent: fn() -> Agent) {
    for (moment, is_there) in MOMENTS {
        eprintln!("source agent dies {moment}");
        let first = agent();
        let Attached { client, vmm, ram } = &Attached::new(first.socket());
        let mut relay = Relay::new();
        let destination = Side::new(Ram::odd(PAGES));
        let incoming = destination.listen(&relay.destination(), &IncomingOptions::default());
        let target = Target::Address(format!("unix:{}", relay.path().display()));
        client.start_outgoing(target, &passes(2)).unwrap();
        let _record = relay.until(is_there);
        client.discard(&[ram.range(20, 10)], Punch::Yes).unwrap();

        let started = Instant::now();
        first.end();
        wait_until("the agent to be lost", SOON, || client.status().is_err()).unwrap();
        wait_until("the guest to run", SOON, || !vmm.is_paused()).unwrap();
        assert_eq!(client.ownership(), Ownership::Ours);
        relay.cut();
        if moment != "before the hello" {
            assert_eq!(destination.wait(incoming).phase, Phase::Failed);
            assert_eq!(destination.vmm.resumes(), 0);
        }
        assert!(started.elapsed() < BOUND);
        // Discards go on without an agent.
        assert_eq!(client.discard(&[ram.range(25, 10)], Punch::Yes).unwrap(), 5);
        assert!((20..35).all(|page| ram.is_hole(page)));
        ram.write_and_mark(client, 5, 55);

        let next = agent();
        client.reattach(next.socket()).unwrap().spawn(VmmHooks(vmm.clone())).unwrap();
        let there = Side::new(Ram::odd(PAGES));
        let path = relay.folder.path().join("next");
        let incoming = there.listen(&path, &IncomingOptions::default());
        let target = Target::Address(format!("unix:{}", path.display()));
        let outgoing = client.start_outgoing(target, &passes(1)).unwrap().job;
        let status = client.wait(outgoing, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error);
        assert_eq!(there.wait(incoming).phase, Phase::Completed);
        common::assert_same(ram, &there.ram);
        let bitmap = there.client.discarded(there.ram.id).unwrap();
        assert!((20..35).all(|page| there.ram.is_hole(page) && bitmap.contains(page)));
        assert_eq!(there.vmm.resumes(), 1);
    }
}

#[test]
fn a_source_agent_that_is_stopped_leaves_the_guest_running_and_the_next_agent_migrates_it() {
    lose_the_source_agent(|| Agent::Stopped(Listening::new()));
}

#[test]
fn a_source_agent_that_is_killed_leaves_the_guest_running_and_the_next_agent_migrates_it() {
    lose_the_source_agent(Agent::process);
}

#[test]
fn a_source_agent_that_is_killed_after_the_commit_leaves_a_guest_that_stands_still() {
    for held in [Kind::Commit, Kind::Resumed] {
        let agent = Agent::process();
        let source = Attached::new(agent.socket());
        let mut relay = Relay::new();
        let destination = Side::new(Ram::odd(PAGES));
        destination.listen(&relay.destination(), &IncomingOptions::default());
        source.send(&relay.path(), &passes(1));
        let _record = relay.until(|record| record.kind == held);
        agent.end();
        wait_until("the agent to be lost", SOON, || source.client.status().is_err()).unwrap();
        // A new agent does not know of the commit, and gets the guest to run as little as the VMM does.
        let next = Agent::process();
        source.client.reattach(next.socket()).unwrap().spawn(VmmHooks(source.vmm.clone())).unwrap();
        assert_eq!(source.client.ownership(), Ownership::Relinquished);
        assert!(source.vmm.is_paused());
        assert_eq!(source.vmm.resumes(), 0);
        let again = source.client.start_outgoing(Target::Address("unix:/nowhere".into()), &passes(1));
        assert!(matches!(again, Err(Error::NotOurs { .. })));
        assert_eq!(destination.vmm.resumes(), u64::from(held == Kind::Resumed));
    }
}

#[test]
fn a_destination_agent_that_is_killed_leaves_the_guest_running_at_the_source_alone() {
    for (moment, is_there) in MOMENTS {
        eprintln!("destination agent killed {moment}");
        let agent = Agent::process();
        let there = Attached::new(agent.socket());
        let mut relay = Relay::new();
        let source = filled();
        let listen = Target::Address(format!("unix:{}", relay.destination().display()));
        there.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        let outgoing = source.send(&relay.path(), &passes(2));
        let _record = relay.until(is_there);
        let started = Instant::now();
        agent.end();
        let status = relay.finish(&source, outgoing);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error);
        assert!(started.elapsed() < BOUND);
        assert!(!source.vmm.is_paused());
        wait_until("the agent to be lost", SOON, || there.client.status().is_err()).unwrap();
        assert_eq!(there.vmm.resumes(), 0);
        assert_eq!(there.client.ownership(), Ownership::Awaiting);
        migrates_next_time(&source);
    }
}

#[test]
fn a_vmm_that_dies_ends_its_migration_and_the_agent_serves_the_next() {
    for (moment, is_there) in MOMENTS {
        eprintln!("source VMM dies {moment}");
        let agent = Listening::new();
        let source = Attached::new(&agent.path);
        let mut relay = Relay::new();
        let destination = Side::new(Ram::odd(PAGES));
        let incoming = destination.listen(&relay.destination(), &IncomingOptions::default());
        source.send(&relay.path(), &passes(2));
        let record = relay.until(is_there);
        let started = Instant::now();
        drop(source);
        if moment != "before the hello" {
            relay.pass(record);
            let status = relay.finish(&destination, incoming);
            assert_eq!(status.phase, Phase::Failed, "{}", status.error);
            assert_eq!(destination.vmm.resumes(), 0);
        }
        assert!(started.elapsed() < BOUND);
        Attached::new(&agent.path).migrates();
    }
}
