// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! VMM processes that are killed: their agents survive, end the job, release the memory and serve
//! the next VMM.

use super::scene::{MOMENTS, Moment};
use pageferry_client::{Error, IncomingOptions, JobStatus, OutgoingOptions, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::guest::threads::{ThreadGuest, ThreadGuestOptions};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::process::{AgentProcess, Process, mock_vmm, program};
use pageferry_tests::scenario::{Listening, RawClient, Relay, SOON, WIRES, Wire};
use pageferry_tests::usage::Usage;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{MockVmm, Tracker};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PAGES: u64 = 256;
const SIZE: u64 = PAGES * PAGE_SIZE;

/// The [`MOMENTS`] that occur in a migration with two passes.
fn moments() -> [Moment; 8] {
    [0, 1, 2, 4, 5, 6, 8, 9].map(|at| MOMENTS[at])
}

fn for_all(what: &str, test: impl Fn(Wire, Moment)) {
    for wire in WIRES {
        for moment in moments() {
            eprintln!("{wire:?}: {what} {}", moment.0);
            test(wire, moment);
        }
    }
}

/// A VMM process, its memory, and its agent, which is another process.
struct Killed {
    agent: AgentProcess,
    memory: PathBuf,
    _folder: tempfile::TempDir,
}

impl Killed {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
        let memory = folder.path().join("memory");
        File::create_new(&memory).unwrap().set_len(SIZE).unwrap();
        Self { agent, memory, _folder: folder }
    }

    fn start(&self, side: &str, more: [&str; 2]) -> Process {
        let mut command = mock_vmm(side, SIZE, self.agent.socket(), &self.memory);
        Process::spawn(side, command.args(more)).unwrap()
    }

    /// A source whose memory is half full.
    fn source(&self, to: &str) -> Process {
        let file = File::options().write(true).open(&self.memory).unwrap();
        file.write_all_at(&[7; (SIZE / 2) as usize], 0).unwrap();
        self.start("source", ["--to", to])
    }

    /// A destination behind the relay.
    fn destination(&self, relay: &mut Relay) -> Process {
        let mut process = self.start("destination", ["--listen", &relay.place()]);
        let line = process.wait_for_line("listening at ", SOON).unwrap();
        relay.leads_to(line.split_once("listening at ").unwrap().1);
        process
    }

    /// The final status of the job, as an operator sees it.
    fn job(&self) -> JobStatus {
        let mut operator = RawClient::connect(self.agent.socket());
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }

    /// Checks that the agent survived its VMM, ended the job, and released the memory.
    fn assert_agent_is_free(&mut self) {
        let job = self.job();
        assert_eq!(job.job, 1);
        // Either the session sees first that its VMM is gone and cancels, or a hook that the job
        // waits for fails first.
        let said = match job.phase {
            Phase::Cancelled => "the VMM is gone",
            Phase::Failed => "hook \"",
            other => panic!("{other:?}: {}", job.error_text()),
        };
        assert!(job.error_text().contains(said), "{:?}: {}", job.phase, job.error_text());
        let descriptors = format!("/proc/{}/fd", self.agent.process().id());
        wait_until("the agent to release the memory", SOON, || {
            let mut links = std::fs::read_dir(&descriptors).unwrap().flatten();
            // A descriptor that is closed meanwhile does not count.
            !links.any(|link| std::fs::read_link(link.path()).is_ok_and(|file| file == self.memory))
        })
        .unwrap();
    }
}

/// A VMM in this process.
fn vmm(agent: &Path, writes_per_second: u64) -> MockVmm {
    let usage = Usage::new(Arc::new(TestMemory::ram(SIZE).unwrap())).unwrap();
    let options =
        ThreadGuestOptions { rate: Some(writes_per_second), ..ThreadGuestOptions::default() };
    let guest = ThreadGuest::new(&usage, options).unwrap();
    let vmm = MockVmm::connect(agent, usage, Tracker::Log).unwrap();
    vmm.set_guest(guest);
    vmm
}

/// Such a VMM with a running guest.
fn running(agent: &Path) -> MockVmm {
    let vmm = vmm(agent, 2000);
    vmm.memory().block(0).unwrap().fill(PageRange::new(0, PAGES / 2), 1).unwrap();
    vmm.start().unwrap();
    vmm
}

fn moves(source: &MockVmm, destination: &MockVmm) {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("next").display());
    let (incoming, _) = destination.start_incoming(&address, &IncomingOptions::default()).unwrap();
    let outgoing = source.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
    let status = source.wait_job(outgoing, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.wait_job(incoming, SOON).unwrap().phase, Phase::Completed);
    assert!(destination.record().runs && !source.record().runs);
    same_memory(source.memory(), source.client(), destination.memory()).unwrap();
}

#[test]
fn after_a_killed_source_vmm_both_agents_serve_the_next() {
    for_all("source VMM killed", |wire, (moment, is_there)| {
        let mut here = Killed::new();
        let agent = Listening::start();
        let destination = vmm(&agent.path, 0);
        let mut relay = Relay::over(wire);
        let incoming = relay.listen(destination.client(), &IncomingOptions::default());
        let mut source = here.source(&relay.address());
        let record = relay.until(is_there);
        source.kill().unwrap();
        here.assert_agent_is_free();
        if moment == MOMENTS[0].0 {
            relay.cut();
            destination.client().cancel().unwrap();
            assert_eq!(destination.wait_job(incoming, SOON).unwrap().phase, Phase::Cancelled);
        } else {
            relay.pass(record);
            let status = relay.finish(destination.client(), incoming);
            assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
            assert!(status.error.is_some());
        }
        assert!(!destination.record().runs);
        moves(&running(here.agent.socket()), &destination);
    });
}

#[test]
fn a_source_vmm_killed_after_the_commit_leaves_the_guest_there() {
    for held in [Kind::Commit, Kind::Resumed] {
        let here = Killed::new();
        let agent = Listening::start();
        let destination = vmm(&agent.path, 0);
        let mut relay = Relay::unix();
        let incoming = relay.listen(destination.client(), &IncomingOptions::default());
        let mut source = here.source(&relay.address());
        let record = relay.until(|record| record.kind == held);
        source.kill().unwrap();
        relay.pass(record);
        let status = relay.finish(destination.client(), incoming);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        assert!(destination.record().runs);
        assert_eq!(here.job().phase, Phase::Completed);
    }
}

#[test]
fn a_killed_destination_vmm_leaves_guest_and_agent_running() {
    for_all("destination VMM killed", |wire, (_, is_there)| {
        let mut there = Killed::new();
        let agent = Listening::start();
        let source = running(&agent.path);
        let mut relay = Relay::over(wire);
        let mut destination = there.destination(&mut relay);
        let outgoing = relay.send(source.client(), &OutgoingOptions::default());
        let _record = relay.until(is_there);
        destination.kill().unwrap();
        let status = relay.finish(source.client(), outgoing);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        assert!(status.error.is_some());
        assert!(source.record().runs);
        there.assert_agent_is_free();
        moves(&source, &vmm(there.agent.socket(), 0));
    });
}

#[test]
fn a_destination_vmm_killed_at_the_commit_is_unconfirmed() {
    for held in [Kind::Commit, Kind::Resumed] {
        let there = Killed::new();
        let agent = Listening::start();
        let source = running(&agent.path);
        let mut relay = Relay::unix();
        let mut destination = there.destination(&mut relay);
        let outgoing = relay.send(source.client(), &OutgoingOptions::default());
        let _record = relay.until(|record| record.kind == held);
        destination.kill().unwrap();
        let status = relay.finish(source.client(), outgoing);
        assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error_text());
        assert!(!source.record().runs);
        let again = source.start_outgoing("unix:/nowhere", &OutgoingOptions::default());
        assert!(matches!(again, Err(pageferry_tests::Error::Client(Error::NotOurs { .. }))));
    }
}
