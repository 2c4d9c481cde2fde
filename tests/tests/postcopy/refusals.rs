// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that postcopy cannot fill is refused when the source connects, and not only at the
//! switchover.

use crate::scene::{Pages, Switch, memory, side_with, small};
use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_client::{Client, Config, IncomingOptions, OutgoingOptions, Phase};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// Checks that the source is refused in all modes with postcopy, with these words, before it sends
/// a page. The destination continues to wait, and its operator reads the same words. If
/// `takes_precopy`, a precopy then succeeds.
fn refused_at_accept(source: &MockSide, destination: &MockVmm, words: &str, takes_precopy: bool) {
    source
        .vmm
        .memory()
        .blocks()
        .iter()
        .for_each(|block| block.fill(PageRange::new(0, 64), 7).unwrap());
    let (incoming, address) =
        destination.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    for switch in [Switch::AtOnce, Switch::AfterPasses(1), Switch::OnRequest] {
        let outgoing = source.vmm.start_outgoing(&address, &switch.options(0)).unwrap();
        let status = source.vmm.wait_job(outgoing, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Failed, "{switch:?}");
        assert!(status.error_text().contains(words), "{switch:?}: {}", status.error_text());
        assert_eq!((status.counters.pages_sent, status.counters.passes), (0, 0));
        let there = destination.client().status().unwrap();
        assert_eq!((there.job, there.phase), (incoming, Phase::Connecting));
        wait_until("the note", PATIENCE, || {
            destination.client().status().unwrap().error_text().contains(words)
        })
        .unwrap();
    }
    if takes_precopy {
        let outgoing = source.vmm.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
        assert_eq!(source.vmm.wait_job(outgoing, PATIENCE).unwrap().phase, Phase::Completed);
        assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Completed);
    } else {
        destination.client().cancel().unwrap();
        assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Cancelled);
    }
}

fn one_block(backing: Backing) -> Arc<TestMemory> {
    Arc::new(TestMemory::new(vec![BlockLayout { backing, ..BlockLayout::ram(4 * MIB) }]).unwrap())
}

#[test]
fn a_file_on_a_disk_takes_precopy_alone() {
    let Some(file) = require::file_on_disk(Path::new(env!("CARGO_TARGET_TMPDIR")), 4 * MIB) else {
        return;
    };
    let destination = side_with(one_block(Backing::File(Arc::new(file))));
    refused_at_accept(
        &side_with(one_block(Backing::Memfd)),
        &destination.vmm,
        "block 0 is a file on a disk",
        true,
    );
}

#[test]
fn a_mapping_that_cannot_be_registered_takes_precopy_only() {
    if !require::uffd() {
        return;
    }
    // The VMM itself has registered the memory.
    let memory = memory(Pages::Small, 4);
    let ranges: Vec<_> =
        memory.blocks().iter().map(|block| (block.address(), block.layout().length)).collect();
    let registered = WriteProtect::register(&ranges).unwrap();
    let (agent, socket) = InProcessAgent::start().unwrap();
    let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
    let destination =
        MockVmm::new(client, channel, Usage::new(memory).unwrap(), Tracker::Log).unwrap();
    let words = "block 0 cannot be registered for missing pages";
    refused_at_accept(&small(4), &destination, words, true);
    drop(destination);
    drop(agent);
    drop(registered);
}

#[test]
fn memory_that_is_sealed_against_writing_takes_no_guest() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let fd = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, 4 * MIB).unwrap();
    let file = Arc::new(std::fs::File::from(fd));
    // Mapped before it is sealed, like a VMM that wants no other process to write.
    let memory = one_block(Backing::File(file.clone()));
    fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
    let destination = side_with(memory);
    let source = side_with(one_block(Backing::Memfd));
    refused_at_accept(&source, &destination.vmm, "block 0 is sealed against writing", false);
    let (incoming, address) =
        destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    let outgoing = source.vmm.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
    let status = source.vmm.wait_job(outgoing, PATIENCE).unwrap();
    assert!(
        status.error_text().contains("block 0 is sealed against writing"),
        "{}",
        status.error_text()
    );
    destination.client().cancel().unwrap();
    assert_eq!(destination.vmm.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Cancelled);
}
