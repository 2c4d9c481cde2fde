//! Postcopy between two VMMs whose guests touch memory by their mappings: threads, devices, and a real one under KVM, on small and huge pages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use pageferry_client::{Client, Config, IncomingOptions, Mode, OutgoingOptions, Phase};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::{Pattern, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::usage::{Path, Usage};
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// Two blocks at odd places.
fn memory() -> Arc<TestMemory> {
    let low = BlockLayout { fd_offset: 0x3000, ..BlockLayout::ram(8 * MIB) };
    let high = BlockLayout { id: 1, name: "high".into(), gpa: 64 * MIB, ..BlockLayout::ram(8 * MIB) };
    Arc::new(TestMemory::new(vec![low, high]).unwrap())
}

struct Side {
    vmm: MockVmm,
    _agent: InProcessAgent,
}

impl Side {
    fn new(memory: Arc<TestMemory>) -> Self {
        let usage = Usage::new(memory).unwrap();
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
        Self { vmm, _agent: agent }
    }

    fn threads(&self) -> impl Fn() -> u64 + use<> {
        let options = ThreadGuestOptions {
            rate: Some(20_000),
            pattern: Pattern::Uniform,
            path: Path::MappingAndLog,
            ..Default::default()
        };
        let guest = ThreadGuest::new(self.vmm.usage(), options).unwrap();
        let writes = guest.watch_writes();
        self.vmm.set_guest(guest);
        writes
    }
}

#[test]
fn a_guest_of_threads_counts_on_before_its_memory_is_there() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (Side::new(memory()), Side::new(memory()));
    let block = source.vmm.memory().block(0).unwrap();
    block.fill(PageRange::new(100, 1000), 7).unwrap();
    let wrote = source.threads();
    let writes = destination.threads();
    source.vmm.start().unwrap();
    wait_until("writes", PATIENCE, || wrote() > 5000).unwrap();
    let (job, address) = destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    let options =
        OutgoingOptions { streams: 2, mode: Mode::Postcopy, bandwidth: 20 << 20, ..OutgoingOptions::default() };
    let outgoing = source.vmm.start_outgoing(&address, &options).unwrap();
    let status = source.vmm.wait_job(outgoing, std::time::Duration::from_secs(3)).unwrap_or_else(|error| {
        panic!("{error}: {:?} {:?}", source.vmm.client().status(), destination.vmm.client().status())
    });
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    let arrived = destination.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(arrived.phase, Phase::Completed, "{}", arrived.error);
    assert!(writes() > 0);
    destination.vmm.stop().unwrap();
    assert!(destination.vmm.usage().check().unwrap() > 1000);
}

#[test]
fn a_page_whose_push_is_held_back_comes_when_it_is_asked_for() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (Side::new(memory()), Side::new(memory()));
    let block = source.vmm.memory().block(0).unwrap();
    block.fill(block.all(), 7).unwrap();
    let (job, address) = destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    // The first piece may go, and the next not within the day: what the push has taken by then it never sends.
    let options = OutgoingOptions { streams: 2, mode: Mode::Postcopy, bandwidth: 1, ..OutgoingOptions::default() };
    let outgoing = source.vmm.start_outgoing(&address, &options).unwrap();
    destination.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
    let guest = destination.vmm.memory().clone();
    let touches = std::thread::spawn(move || {
        let block = guest.block(0).unwrap();
        for page in 0..block.pages() {
            block.store(page * 4096, page).unwrap();
        }
    });
    wait_until("every page", PATIENCE, || touches.is_finished()).unwrap();
    touches.join().unwrap();
    // What is held back goes as soon as it may.
    source.vmm.client().set_parameters(&OutgoingOptions { bandwidth: 0, ..options }).unwrap();
    assert_eq!(source.vmm.wait_job(outgoing, PATIENCE).unwrap().phase, Phase::Completed);
    assert_eq!(destination.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    let theirs = destination.vmm.memory().block(0).unwrap();
    for page in 0..block.pages() {
        let mut expected = block.read_page(page).unwrap();
        expected[..8].copy_from_slice(&page.to_ne_bytes());
        assert!(theirs.read_page(page).unwrap() == expected, "page {page} is not what was sent");
    }
}
