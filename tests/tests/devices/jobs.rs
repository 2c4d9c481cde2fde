// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's jobs and its devices: states and memory arrive together.

use pageferry_agent::image::Chain;
use pageferry_client::{
    MIN_BANDWIDTH, Mode, OutgoingOptions, Parameters, Phase, RestoreMode, RestoreOptions,
    SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::files::memfd;
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::driver::{QUEUE_AREA, QUEUE_SIZE};
use pageferry_tests::front_end::host::{FIRST_FREE_PAGE, MEM_AREA, MEM_BLOCK};
use pageferry_tests::front_end::mem::Answer;
use pageferry_tests::front_end::{DeviceHost, Rings};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use pageferry_tests::vmm::Tracker;
use std::sync::Arc;

const ACK: Answer = Answer::Ack(0);
const FIRST: u64 = FIRST_FREE_PAGE;
/// All features of the balloon.
const ALL: u64 = 0x3e;
/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;
/// Pages of a block of virtio-mem.
const BLOCK_PAGES: u64 = MEM_BLOCK / PAGE_SIZE;

#[test]
fn devices_move_with_their_guest() {
    let source = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let destination = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let (mut balloon, mut mem) = (source.balloon(), source.mem());
    source.balloon_status(&["1M"]);
    balloon.inflate(&pages(FIRST, 200));
    balloon.set_actual(200);
    source.mem_status(&["--requested", &(6 * MEM_BLOCK).to_string()]);
    assert_eq!(mem.plug(1, 3), ACK);
    source.block(1).fill(PageRange::new(2 * BLOCK_PAGES, 8), 3).unwrap();
    source.moves_to(&destination, &OutgoingOptions::default());

    let here = destination.balloon_now();
    assert_eq!((here.target, here.actual), (1 << 20, 200 * PAGE_SIZE));
    let there = destination.mem_now();
    assert_eq!((there.plugged, there.requested), (3 * MEM_BLOCK, 6 * MEM_BLOCK));
    assert_eq!(there.usable_size, source.mem_now().usable_size);
    // The drivers go on, with the queues that they have.
    let memory = destination.memory().clone();
    let mut balloon = balloon.moved_to(&destination.balloon_socket(), &memory);
    let mut mem = mem.moved_to(&destination.mem_socket(), &memory);
    assert_eq!(balloon.target(), 256);
    balloon.inflate(&pages(FIRST + 200, 56));
    assert!(destination.block(0).is_hole(PageRange::new(FIRST, 256)).unwrap());
    assert_eq!(mem.state(1, 3), ACK);
    assert_eq!(mem.state(4, 1), Answer::Ack(1));
    assert_eq!(mem.plug(4, 3), ACK);
    assert_eq!(mem.plug(7, 1), Answer::Nack);
    assert_eq!(destination.block(1).allocated().unwrap(), 8 * PAGE_SIZE);
}

#[test]
fn devices_are_saved_with_their_guest() {
    let source = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let (mut balloon, mut mem) = (source.balloon(), source.mem());
    source.balloon_status(&["1M"]);
    balloon.inflate(&pages(FIRST, 200));
    balloon.set_actual(200);
    source.mem_status(&["--requested", &(6 * MEM_BLOCK).to_string()]);
    assert_eq!(mem.plug(1, 3), ACK);
    source.block(1).fill(PageRange::new(2 * BLOCK_PAGES, 8), 3).unwrap();
    let image = source.folder().join("image");
    let job =
        source.vmm.start_snapshot(&image, &pageferry_tests::scenario::images::paused()).unwrap();
    completes(&source, job);
    for mode in [RestoreMode::Eager, RestoreMode::Lazy] {
        if mode == RestoreMode::Lazy && !require::uffd() {
            continue;
        }
        let restored = DeviceHost::with_pluggable(16 * MEM_BLOCK);
        let options = RestoreOptions { mode, ..RestoreOptions::default() };
        let job = restored.vmm.start_restore(&image, &options).unwrap();
        completes(&restored, job);
        let status = restored.balloon_now();
        assert_eq!((status.target, status.actual), (1 << 20, 200 * PAGE_SIZE));
        let status = restored.mem_now();
        assert_eq!((status.plugged, status.requested), (3 * MEM_BLOCK, 6 * MEM_BLOCK));
        let mut mem = restored.mem();
        assert_eq!((mem.state(1, 3), mem.state(4, 1)), (ACK, Answer::Ack(1)));
        assert_eq!(mem.unplug(2, 1), ACK);
        assert_eq!(restored.block(1).allocated().unwrap(), 0);
    }
}

#[track_caller]
fn completes(host: &DeviceHost, job: u64) {
    let status = host.vmm.wait_job(job, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
}

#[test]
fn what_a_device_writes_is_in_the_front_ends_dirty_log() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    let size = 512 / 8;
    let log = memfd(4096).unwrap();
    balloon.driver.front_end.set_log(&log, size).unwrap();
    balloon.driver.front_end.choose_features(ALL | LOG_ALL).unwrap();
    let mut bits = vec![0; 64];
    balloon.deflate(&pages(FIRST, 1));
    rustix::io::pread(&log, &mut bits, 0).unwrap();
    let page = balloon.driver.area_of(1) / PAGE_SIZE;
    let is_marked = bits[page as usize / 8] & (1 << (page % 8)) != 0;
    assert!(is_marked, "the used ring is in page {page}: {bits:x?}");
}

#[test]
fn what_a_device_writes_during_a_migration_arrives() {
    let source = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let destination = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    // The first pass takes 16 seconds: it cannot end before the device has written.
    source.block(0).fill(PageRange::new(FIRST, 256), 1).unwrap();
    let mut mem = source.mem();
    source.mem_status(&["--requested", &(8 * MEM_BLOCK).to_string()]);
    let slow = OutgoingOptions { bandwidth: MIN_BANDWIDTH, ..OutgoingOptions::default() };
    let jobs = source.start_move(&destination, &slow);
    source.vmm.wait_phase(Phase::Passes, SOON).unwrap();
    // The queue itself may be sent already. The driver's writes are marked in the log, as a
    // guest's are. Those of the device nobody marks but the agent.
    let mut plugged = 0;
    for round in 0..100 {
        if mem.plug(round % 8, 1) == ACK {
            plugged += 1;
        }
        mem.unplug(round % 8, 1);
    }
    assert_eq!(plugged, 100);
    assert_eq!(mem.plug(3, 2), ACK);
    source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    source.arrives_at(&destination, jobs);
    let area = |host: &DeviceHost| {
        let mut bytes = vec![0; QUEUE_AREA as usize];
        host.block(0).read(MEM_AREA, &mut bytes).unwrap();
        bytes
    };
    assert!(area(&source) == area(&destination), "rings and answers");
    let memory = destination.memory().clone();
    let mut mem = mem.moved_to(&destination.mem_socket(), &memory);
    assert_eq!((mem.state(3, 2), mem.plugged()), (ACK, 2 * MEM_BLOCK));
}

#[test]
fn queues_that_have_not_arrived_yet_are_fetched() {
    if !require::uffd() {
        return;
    }
    let [source, destination] = [(), ()].map(|()| DeviceHost::with_pluggable(16 * MEM_BLOCK));
    source.block(0).fill(PageRange::new(FIRST, 256), 1).unwrap();
    let (mut balloon, mut mem) = (source.balloon(), source.mem());
    source.mem_status(&["--requested", &(8 * MEM_BLOCK).to_string()]);
    assert_eq!(mem.plug(0, 2), ACK);
    // What the source does not handle any more.
    let numbers: Vec<u8> = pages(FIRST, 4).iter().flat_map(|page| page.to_le_bytes()).collect();
    let gpa = balloon.driver.write_buffer(0, &numbers);
    let bases = balloon.driver.stop();
    mem.driver.stop();
    balloon.driver.queue(0).put(&[pageferry_tests::front_end::Piece::readable(gpa, 16)]);
    source.block(0).mark(source.block(0).all());
    // Hardly any page is pushed.
    let options = OutgoingOptions {
        mode: Mode::Postcopy,
        bandwidth: MIN_BANDWIDTH,
        ..OutgoingOptions::default()
    };
    let jobs = source.start_move(&destination, &options);
    destination.vmm.wait_phase(Phase::Postcopy, SOON).unwrap();
    assert_eq!(bases[&0], 0);
    let memory = destination.memory().clone();
    let mut balloon = balloon.moved_to(&destination.balloon_socket(), &memory);
    balloon.driver.queue(0).kick();
    balloon.driver.queue(0).wait_used();
    let mut mem = mem.moved_to(&destination.mem_socket(), &memory);
    assert_eq!((mem.state(0, 2), mem.plug(2, 1)), (ACK, ACK));
    let status = destination.vmm.client().status().unwrap();
    assert_eq!(status.phase, Phase::Postcopy, "too late to show anything");
    source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    source.arrives_at(&destination, jobs);
    assert!(destination.block(0).is_hole(PageRange::new(FIRST, 4)).unwrap());
    for page in FIRST + 4..FIRST + 256 {
        let here = destination.block(0).read_page(page).unwrap();
        assert!(here == source.block(0).read_page(page).unwrap(), "page {page:#x}");
    }
}

#[test]
fn background_snapshot_has_the_memory_of_its_instant() {
    if !require::uffd() {
        return;
    }
    let memory = Arc::new(TestMemory::ram(2048 * PAGE_SIZE).unwrap());
    let host = DeviceHost::with_tracker(memory, Tracker::WriteProtect);
    host.block(0).fill(PageRange::new(FIRST, 2048 - FIRST), 1).unwrap();
    let mut balloon = host.balloon();
    // The last instant at which it is known what memory has: the guest is paused.
    let image = host.folder().join("image");
    let (sent, instant) = std::sync::mpsc::channel();
    let block = host.memory().clone();
    host.vmm.before_pause(move || {
        let mut bytes = vec![0; 2048 * PAGE_SIZE as usize];
        block.block(0)?.read(0, &mut bytes)?;
        let _ = sent.send(bytes);
        Ok(())
    });
    let options = SnapshotOptions { bandwidth: MIN_BANDWIDTH, ..SnapshotOptions::default() };
    let job = host.vmm.start_snapshot(&image, &options).unwrap();
    let instant = instant.recv_timeout(SOON).unwrap();
    host.vmm.wait_phase(Phase::Saving, SOON).unwrap();
    // The device writes used rings, and frees pages that are not saved yet.
    for page in (FIRST..2048).step_by(8).collect::<Vec<_>>().into_iter().rev() {
        balloon.inflate(&pages(page, 8));
    }
    assert!(host.vmm.client().status().unwrap().phase < Phase::Completed, "too late");
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 2048 - FIRST)).unwrap());
    host.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    completes(&host, job);
    let chain = Chain::open(&image).unwrap();
    let mut saved = vec![0; 2048 * PAGE_SIZE as usize];
    chain.read(0, PageRange::new(0, 2048), &mut saved).unwrap();
    for page in 0..2048 {
        let at = page * PAGE_SIZE as usize..(page + 1) * PAGE_SIZE as usize;
        assert!(saved[at.clone()] == instant[at], "page {page:#x}");
    }
}

#[test]
fn queue_in_plugged_memory_lives_until_that_is_unplugged() {
    let mut host = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let mut mem = host.mem();
    host.mem_status(&["--requested", &(8 * MEM_BLOCK).to_string()]);
    assert_eq!(mem.plug(0, 2), ACK);
    let mut balloon = host.balloon();
    balloon.driver.stop();
    let gpa = pageferry_tests::front_end::host::PLUGGABLE_GPA + MEM_BLOCK;
    balloon.driver.begin_queue(0, Rings::at(gpa, QUEUE_SIZE));
    balloon.inflate(&pages(FIRST, 1));
    assert_eq!(mem.unplug(1, 1), ACK);
    balloon.driver.queues[&0].kick();
    host.assert_alive();
    assert_eq!(mem.state(1, 1), Answer::Ack(1));
    assert_eq!(host.block(1).allocated().unwrap(), 0, "a look at the queue allocates nothing");
}
