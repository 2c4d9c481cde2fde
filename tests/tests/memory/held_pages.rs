// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stays with the agent of the destination, or with others, of the pages that it places: the
//! memory of huge pages to which somebody has a reference, and the agent's own mappings.

use pageferry_client::{
    BlockRange, Client, Config, HugePages, IncomingOptions, OutgoingOptions, Parameters, Phase,
    Punch,
};
use pageferry_protocol::control::job::MIN_BANDWIDTH;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::memfd;
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{MockSide, SOON, passes};
use pageferry_tests::usage::Usage;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use rustix::pipe::{SpliceFlags, pipe, splice};
use std::fs::File;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// The kernel frees no part of a huge page to which somebody has a reference, such as a transfer to
/// a disk. What the source gives back meanwhile is a hole all the same.
#[test]
fn what_is_given_back_of_a_huge_page_that_somebody_holds_is_a_hole() {
    const SIZE: u64 = 64 * MIB;
    let tmpfs = require::huge_tmpfs();
    let huge = tmpfs.as_ref().map(|tmpfs| tmpfs.file("huge=always,size=80M", SIZE).unwrap());
    let memfd = File::from(memfd(SIZE).unwrap());
    for (file, makes_them_itself) in [(Some(memfd), false), (huge, true)] {
        let Some(file) = file else { continue };
        let file = Arc::new(file);
        let from = MockSide::new(vec![BlockLayout::ram(SIZE)]);
        from.block(0).fill(PageRange::new(0, SIZE / PAGE_SIZE), 9).unwrap();
        from.vmm.start().unwrap();
        let backing = Backing::File(file.clone());
        let to = MockSide::new(vec![BlockLayout { backing, ..BlockLayout::ram(SIZE) }]);
        let (incoming, address) = to.listen(&IncomingOptions::default());
        // So that much is left when the first huge page has come. Then nearly nothing comes, until
        // the pages are given back.
        let options = OutgoingOptions { streams: 1, bandwidth: 20 * MIB, ..passes(3) };
        let outgoing = from.vmm.start_outgoing(&address, &options).unwrap();
        wait_until("the first huge page", SOON, || to.allocated() > 3 * MIB).unwrap();
        from.client().set_parameters(&Parameters::bandwidth(MIN_BANDWIDTH)).unwrap();
        let came = to.block(0).extents().unwrap()[0];
        assert!(came.first == 0 && came.count >= 512, "{came:?}");
        let (reader, writer) = pipe().unwrap();
        let held = 8 * PAGE_SIZE as usize;
        splice(&*file, Some(&mut 0), &writer, None, held, SpliceFlags::empty()).unwrap();
        let offset = 20 * PAGE_SIZE;
        let given_back = BlockRange { block: 0, offset, length: 30 * PAGE_SIZE };
        from.client().discard(&[given_back], Punch::Yes).unwrap();
        assert_eq!(from.client().status().unwrap().phase, Phase::Passes);
        from.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
        let sent = from.vmm.wait_job(outgoing, PATIENCE).unwrap();
        assert_eq!(sent.phase, Phase::Completed, "{}", sent.error_text());
        let arrived = to.vmm.wait_job(incoming, PATIENCE).unwrap();
        assert_eq!(arrived.phase, Phase::Completed, "{}", arrived.error_text());
        let reason = arrived.placing_reason.unwrap_or_default();
        if reason.contains("the kernel made none") {
            eprintln!("skipped: {reason}");
            continue;
        }
        assert!(makes_them_itself || arrived.counters.huge_pages > 0, "{reason}");
        assert!(to.block(0).is_hole(PageRange::new(20, 30)).unwrap());
        same_memory(from.vmm.memory(), from.client(), to.vmm.memory()).unwrap();
        assert_eq!(from.allocated(), to.allocated());
        drop((reader, writer));
    }
}

/// The peak of a process's memory, in bytes.
fn peak(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// What the agent has mapped counts as its memory. That must not grow with the number of blocks.
#[test]
fn an_agent_stays_small_however_many_blocks_it_fills() {
    const BLOCKS: u32 = 32;
    const LENGTH: u64 = 7 * MIB;
    let layouts = |offset: u64| {
        let of = |id: u32| {
            let (name, gpa) = (format!("ram{id}"), u64::from(id) * 64 * MIB);
            BlockLayout { id, name, gpa, fd_offset: offset, ..BlockLayout::ram(LENGTH) }
        };
        (0..BLOCKS).map(of).collect::<Vec<_>>()
    };
    for (huge_pages, offset) in
        [(HugePages::Never, 0), (HugePages::Auto, 0), (HugePages::Auto, PAGE_SIZE)]
    {
        let folder = tempfile::tempdir().unwrap();
        let source = MockSide::new(layouts(0));
        for block in source.vmm.memory().blocks() {
            block.fill(PageRange::new(0, LENGTH / PAGE_SIZE), 7).unwrap();
        }
        source.vmm.start().unwrap();
        let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
        let id = agent.process().id();
        let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
        let memory = Arc::new(TestMemory::new(layouts(offset)).unwrap());
        let usage = Usage::new(memory).unwrap();
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
        let before = peak(id);
        let incoming = IncomingOptions { huge_pages, ..IncomingOptions::default() };
        let (incoming, address) = vmm.start_incoming("tcp:127.0.0.1:0", &incoming).unwrap();
        let options = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
        let outgoing = source.vmm.start_outgoing(&address, &options).unwrap();
        for (vmm, job) in [(&source.vmm, outgoing), (&vmm, incoming)] {
            let status = vmm.wait_job(job, PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        }
        let grown = peak(id) - before;
        // 224 MiB came.
        assert!(
            grown < 32 * MIB,
            "{huge_pages:?}, offset {offset:#x}: grew by {} MiB",
            grown / MIB
        );
        assert_eq!(vmm.memory().allocated().unwrap(), source.allocated());
    }
}
