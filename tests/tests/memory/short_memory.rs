// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that comes to an agent whose control group has little more memory than the guest: it
//! comes, nothing is killed, and no memory is allocated twice.

use pageferry_client::{
    Client, Config, IncomingOptions, JobStatus, OutgoingOptions, Phase, Placing, RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::memory_group::MemoryGroup;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::usage::Usage;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use std::path::Path;
use std::sync::Arc;

/// Bytes of the guest, which uses all of it.
const SIZE: u64 = 96 << 20;
/// Pages of a huge page.
const HUGE: u64 = 512;

fn full_source() -> MockSide {
    let source = MockSide::new(vec![BlockLayout::ram(SIZE)]);
    source.block(0).fill(PageRange::new(0, SIZE / PAGE_SIZE), 7).unwrap();
    source.vmm.start().unwrap();
    source
}

/// A VMM of this process whose agent is a process in a control group of `limit` bytes. `None` if
/// this machine has none. Fields drop in order: the group goes when its process has ended.
struct Limited {
    vmm: MockVmm,
    _agent: AgentProcess,
    group: MemoryGroup,
}

impl Limited {
    fn new(folder: &Path, limit: u64) -> Option<Self> {
        let group = require::memory_group(limit)?;
        let mut agent = AgentProcess::spawn(program(), folder, "agent").unwrap();
        group.add(agent.process().id()).unwrap();
        let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
        let memory = TestMemory::new(vec![BlockLayout::ram(SIZE)]).unwrap();
        let usage = Usage::new(Arc::new(memory)).unwrap();
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
        Some(Self { vmm, _agent: agent, group })
    }

    /// Has `source` send its guest here. Returns the status of the job here.
    fn receive(&self, source: &MockSide) -> JobStatus {
        let options = IncomingOptions::default();
        let (incoming, address) = self.vmm.start_incoming("tcp:127.0.0.1:0", &options).unwrap();
        let streams = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
        let outgoing = source.vmm.start_outgoing(&address, &streams).unwrap();
        let sent = source.vmm.wait_job(outgoing, PATIENCE).unwrap();
        assert_eq!(sent.phase, Phase::Completed, "{}", sent.error_text());
        self.vmm.wait_job(incoming, PATIENCE).unwrap()
    }

    #[track_caller]
    fn has_same_memory_as(&self, source: &MockSide) {
        same_memory(source.vmm.memory(), source.client(), self.vmm.memory()).unwrap();
        assert_eq!(self.vmm.memory().allocated().unwrap(), source.allocated());
        assert_eq!(self.group.kills().unwrap(), 0);
    }
}

/// Checks that huge pages ended in time.
#[track_caller]
fn assert_ended_early(status: &JobStatus) {
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let reason = status.placing_reason.as_deref().unwrap_or_default();
    if !reason.contains("memory is short: the control group ") {
        // Memory of the machine is in pieces.
        assert!(reason.starts_with("the kernel made none"), "{reason}");
        eprintln!("skipped: {reason}");
    }
    assert_eq!(status.placing, Placing::Pages);
    assert!(status.counters.huge_pages < SIZE / PAGE_SIZE / HUGE, "{:?}", status.counters);
}

#[test]
fn a_guest_fits_a_control_group_that_is_hardly_larger() {
    let folder = tempfile::tempdir().unwrap();
    let source = full_source();
    // What the agent itself needs, and little more.
    let Some(limited) = Limited::new(folder.path(), SIZE + (20 << 20)) else { return };
    let status = limited.receive(&source);
    assert_ended_early(&status);
    limited.has_same_memory_as(&source);
}

#[test]
fn a_restored_guest_fits_a_control_group_that_is_hardly_larger() {
    let folder = tempfile::tempdir().unwrap();
    let source = full_source();
    let image = folder.path().join("image");
    let job = source.vmm.start_snapshot(&image, &paused()).unwrap();
    assert_eq!(source.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    let Some(limited) = Limited::new(folder.path(), SIZE + (20 << 20)) else { return };
    let job = limited.vmm.start_restore(&image, &RestoreOptions::default()).unwrap();
    assert_ended_early(&limited.vmm.wait_job(job, PATIENCE).unwrap());
    limited.has_same_memory_as(&source);
}

#[test]
fn huge_pages_take_no_memory_but_the_guests() {
    let folder = tempfile::tempdir().unwrap();
    let source = full_source();
    let Some(limited) = Limited::new(folder.path(), SIZE + (400 << 20)) else { return };
    let before = limited.group.peak().unwrap();
    let status = limited.receive(&source);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    limited.has_same_memory_as(&source);
    // The buffers of the streams, and one page beside each huge page that is being made.
    let more = limited.group.peak().unwrap().saturating_sub(before + SIZE);
    assert!(more < 24 << 20, "{} MiB beside the guest", more >> 20);
    if status.placing_reason.is_none() {
        assert_eq!(status.counters.huge_pages, SIZE / PAGE_SIZE / HUGE);
    }
}
