// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent process with a balloon and a virtio-mem device, and the mock VMM whose memory it has.

use super::{BalloonDriver, MemDriver};
use crate::linux_guest::Operator;
use crate::memory::{BlockLayout, TestBlock, TestMemory};
use crate::process::{AgentProcess, program};
use crate::scenario::{RawClient, SOON};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{IncomingOptions, JobStatus, OutgoingOptions, Phase};
use pageferry_protocol::control::codec::{DecodeError, Decoder};
use pageferry_protocol::control::devices::{BalloonStatus, MemStatus};
use pageferry_protocol::control::request::Request;
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

/// The name of the block that virtio-mem plugs.
pub const PLUGGABLE: &str = "pluggable";
/// Guest physical address of that block.
pub const PLUGGABLE_GPA: u64 = 4 << 30;
/// Where the queues of virtio-mem lie, behind those of the balloon.
pub const MEM_AREA: u64 = 5 * super::driver::QUEUE_AREA;
/// The first page that no queue uses.
pub const FIRST_FREE_PAGE: u64 = 256;
/// Bytes of a block of virtio-mem.
pub const MEM_BLOCK: u64 = 2 << 20;

/// The block that virtio-mem plugs, discarded.
pub fn pluggable(length: u64) -> BlockLayout {
    BlockLayout {
        id: 1,
        name: PLUGGABLE.into(),
        gpa: PLUGGABLE_GPA,
        discarded: true,
        ..BlockLayout::ram(length)
    }
}

/// An agent with devices, and its VMM. Fields drop in order, so the connection is closed before the
/// agent ends.
pub struct DeviceHost {
    /// The VMM.
    pub vmm: MockVmm,
    /// The agent.
    pub agent: AgentProcess,
    /// An operator of the agent.
    pub operator: Operator,
    folder: TempDir,
}

impl DeviceHost {
    /// Starts an agent, and hands empty blocks of these layouts to it.
    pub fn start(layouts: Vec<BlockLayout>) -> Self {
        Self::over(Arc::new(TestMemory::new(layouts).unwrap()))
    }

    /// Starts an agent, and hands this memory to it.
    pub fn over(memory: Arc<TestMemory>) -> Self {
        Self::with_tracker(memory, Tracker::Log)
    }

    /// Like [`DeviceHost::over`], with this tracker of the guest's writes.
    pub fn with_tracker(memory: Arc<TestMemory>, tracker: Tracker) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = agent_in(folder.path());
        let operator = Operator::new(agent.socket().to_owned());
        let usage = Usage::new(memory).unwrap();
        let vmm = MockVmm::connect(agent.socket(), usage, tracker).unwrap();
        Self { vmm, agent, operator, folder }
    }

    /// One block of this many pages.
    pub fn ram(pages: u64) -> Self {
        Self::start(vec![BlockLayout::ram(pages * PAGE_SIZE)])
    }

    /// A block of memory for queues, and one of this size that virtio-mem plugs.
    pub fn with_pluggable(bytes: u64) -> Self {
        let layouts = vec![BlockLayout::ram(2 * FIRST_FREE_PAGE * PAGE_SIZE), pluggable(bytes)];
        Self::start(layouts)
    }

    /// Where the balloon listens.
    pub fn balloon_socket(&self) -> PathBuf {
        self.folder.path().join("balloon")
    }

    /// Where virtio-mem listens.
    pub fn mem_socket(&self) -> PathBuf {
        self.folder.path().join("mem")
    }

    /// A folder that ends with this.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A driver of the balloon with all features.
    pub fn balloon(&self) -> BalloonDriver {
        BalloonDriver::of(&self.balloon_socket(), self.memory())
    }

    /// A driver of virtio-mem.
    pub fn mem(&self) -> MemDriver {
        MemDriver::start(&self.mem_socket(), self.memory(), MEM_AREA)
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<TestMemory> {
        self.vmm.memory()
    }

    /// The block with this id.
    pub fn block(&self, id: u32) -> &TestBlock {
        self.memory().block(id).unwrap()
    }

    /// What an operator sees of the balloon.
    pub fn balloon_now(&self) -> BalloonStatus {
        self.ask(&Request::Balloon { target: None, ask_stats: false }, BalloonStatus::decode)
    }

    /// What an operator sees of virtio-mem.
    pub fn mem_now(&self) -> MemStatus {
        self.ask(&Request::PluggedMemory { requested: None }, MemStatus::decode)
    }

    fn ask<T>(
        &self, request: &Request, decode: fn(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> T {
        let body = RawClient::connect(self.agent.socket()).ask(request, Vec::new()).unwrap();
        decode(&mut Decoder::new(&body)).unwrap()
    }

    /// What `pageferry balloon` says, with more arguments.
    pub fn balloon_status(&self, more: &[&str]) -> Value {
        self.operator.run("balloon", more).unwrap()
    }

    /// What `pageferry mem` says, with more arguments.
    pub fn mem_status(&self, more: &[&str]) -> Value {
        self.operator.run("mem", more).unwrap()
    }

    /// Starts to move the guest to `destination`. Returns the jobs, the source's first.
    pub fn start_move(&self, destination: &Self, options: &OutgoingOptions) -> [u64; 2] {
        let address = format!("unix:{}", destination.folder.path().join("stream").display());
        let (incoming, address) =
            destination.vmm.start_incoming(&address, &IncomingOptions::default()).unwrap();
        [self.vmm.start_outgoing(&address, options).unwrap(), incoming]
    }

    /// Waits for the ends of such jobs, which must be good.
    #[track_caller]
    pub fn arrives_at(&self, destination: &Self, jobs: [u64; 2]) -> JobStatus {
        let [ours, theirs] = [(self, jobs[0]), (destination, jobs[1])]
            .map(|(host, job)| host.vmm.wait_job(job, SOON).unwrap());
        assert_eq!(ours.phase, Phase::Completed, "{}", ours.error_text());
        assert_eq!(theirs.phase, Phase::Completed, "{}", theirs.error_text());
        ours
    }

    /// Moves the guest to `destination`.
    #[track_caller]
    pub fn moves_to(&self, destination: &Self, options: &OutgoingOptions) -> JobStatus {
        let jobs = self.start_move(destination, options);
        self.arrives_at(destination, jobs)
    }

    /// Kills the agent, and hands everything to another one.
    pub fn replace_agent(&mut self) {
        self.agent.process().kill().unwrap();
        self.agent = agent_in(self.folder.path());
        self.vmm.reattach(self.agent.socket()).unwrap();
    }

    /// The agent hangs, and the VMM hands everything to another one, whose sockets are elsewhere.
    pub fn replace_hanging_agent(&mut self) {
        self.agent.process().freeze().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let next = agent_in(folder.path());
        self.vmm.reattach(next.socket()).unwrap();
        self.operator = Operator::new(next.socket().to_owned());
        (self.agent, self.folder) = (next, folder);
    }

    /// The agent is the same one as at the start of the test.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        let ended = self.agent.process().has_ended();
        assert!(!ended, "the agent has ended:\n{}", self.agent.process().lines().join("\n"));
        self.operator.status().unwrap();
    }
}

fn agent_in(folder: &Path) -> AgentProcess {
    let [balloon, mem] = ["balloon", "mem"].map(|name| folder.join(name).display().to_string());
    let options = ["--balloon", &balloon, "--mem", &mem, "--mem-block", PLUGGABLE];
    AgentProcess::start_with(&mut Command::new(program()), folder, "agent", &options).unwrap()
}
