// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem with a driver of our own.

use pageferry_protocol::control::request::Request;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::driver::Driver;
use pageferry_tests::front_end::host::{MEM_AREA, MEM_BLOCK, PLUGGABLE_GPA};
use pageferry_tests::front_end::mem::{Answer, request};
use pageferry_tests::front_end::{DeviceHost, MemDriver, Piece};
use pageferry_tests::on_drop::OnDrop;
use pageferry_tests::scenario::RawClient;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const ACK: Answer = Answer::Ack(0);
const UNPLUGGED: Answer = Answer::Ack(1);
const MIXED: Answer = Answer::Ack(2);
const BLOCKS: u64 = 16;
/// Pages of a block.
const PAGES: u64 = MEM_BLOCK / PAGE_SIZE;

/// A guest that is to have this many blocks.
fn requested(blocks: u64) -> (DeviceHost, MemDriver) {
    let host = DeviceHost::with_pluggable(BLOCKS * MEM_BLOCK);
    let mut mem = host.mem();
    request_blocks(&host, &mut mem, blocks);
    (host, mem)
}

fn request_blocks(host: &DeviceHost, mem: &mut MemDriver, blocks: u64) {
    host.mem_status(&["--requested", &(blocks * MEM_BLOCK).to_string()]);
    mem.driver.front_end.wait_for_config_change();
    assert_eq!(mem.requested(), blocks * MEM_BLOCK);
}

/// Where plugged blocks were written, by pages of the region.
fn write_block(host: &DeviceHost, block: u64) {
    host.block(1).fill(PageRange::new(block * PAGES, PAGES), block).unwrap();
}

#[test]
fn blocks_are_plugged_and_unplugged_as_the_driver_asks() {
    let (host, mut mem) = requested(4);
    assert_eq!(mem.state(0, 4), UNPLUGGED);
    assert_eq!(mem.plug(0, 2), ACK);
    assert_eq!((mem.state(0, 2), mem.state(1, 2), mem.state(2, 1)), (ACK, MIXED, UNPLUGGED));
    assert_eq!(mem.plugged(), 2 * MEM_BLOCK);
    assert_eq!(host.mem_now().plugged, 2 * MEM_BLOCK);
    assert_eq!(host.block(1).allocated().unwrap(), 0, "plugging allocates nothing");
    write_block(&host, 0);
    write_block(&host, 1);
    assert_eq!(mem.unplug(0, 1), ACK);
    assert_eq!(host.block(1).allocated().unwrap(), MEM_BLOCK);
    let discarded = host.vmm.client().discarded(1).unwrap();
    assert!(discarded.contains(0) && !discarded.contains(PAGES));
    assert_eq!(mem.unplug_all(), ACK);
    assert_eq!(host.block(1).allocated().unwrap(), 0);
    assert_eq!(mem.state(0, 4), UNPLUGGED);
    assert_eq!(mem.plugged(), 0);
}

/// Linux compares the plugged size with its own count, and warns if they differ.
#[test]
fn driver_reads_what_it_was_told_whoever_asks_meanwhile() {
    let (host, mut mem) = requested(4);
    let path = host.agent.socket().to_owned();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut operator = RawClient::connect(&path);
                while !stop.load(Ordering::Relaxed) {
                    let ask = Request::PluggedMemory { requested: None };
                    operator.ask(&ask, Vec::new()).unwrap();
                }
            });
        }
        let _stop = OnDrop(|| stop.store(true, Ordering::Relaxed));
        for round in 0..500 {
            assert_eq!(mem.plug(0, 2), ACK, "round {round}");
            assert_eq!(mem.plugged(), 2 * MEM_BLOCK, "round {round}");
            assert_eq!(mem.unplug(0, 2), ACK, "round {round}");
            assert_eq!(mem.plugged(), 0, "round {round}");
        }
    });
}

#[test]
fn more_than_the_requested_size_is_refused() {
    let (host, mut mem) = requested(2);
    assert_eq!(mem.plug(0, 3), Answer::Nack);
    assert_eq!(mem.state(0, 3), UNPLUGGED, "nothing of it is plugged");
    assert_eq!(mem.plug(1, 2), ACK);
    assert_eq!(mem.plug(0, 1), Answer::Nack);
    // Less than it has is only a wish.
    request_blocks(&host, &mut mem, 1);
    assert_eq!(mem.state(1, 2), ACK);
    assert_eq!(mem.unplug(1, 1), ACK);
    assert_eq!(mem.plug(0, 1), Answer::Nack);
    request_blocks(&host, &mut mem, 2);
    assert_eq!(mem.plug(0, 1), ACK);
}

#[test]
fn wrong_requests_are_errors_and_change_nothing() {
    let (_host, mut mem) = requested(8);
    assert_eq!(mem.plug(2, 2), ACK);
    let addr = PLUGGABLE_GPA;
    for kind in [0, 1, 3] {
        assert_eq!(mem.ask(kind, addr, 0), Answer::Error, "no blocks");
        assert_eq!(mem.ask(kind, addr + 1, 1), Answer::Error, "in the middle of a block");
        assert_eq!(mem.ask(kind, addr - MEM_BLOCK, 2), Answer::Error, "before the region");
        assert_eq!(mem.ask(kind, addr, BLOCKS as u16 + 1), Answer::Error, "behind the region");
        assert_eq!(mem.ask(kind, addr + BLOCKS * MEM_BLOCK, 1), Answer::Error);
        assert_eq!(mem.ask(kind, u64::MAX - MEM_BLOCK + 1, 2), Answer::Error);
        assert_eq!(mem.ask(kind, addr, u16::MAX), Answer::Error);
        assert_eq!(mem.ask(kind, 0, 1), Answer::Error);
    }
    for kind in [4, 0x100, u16::MAX] {
        assert_eq!(mem.ask(kind, addr, 1), Answer::Error);
    }
    assert_eq!(mem.plug(1, 2), Answer::Error, "one is plugged");
    assert_eq!(mem.unplug(3, 2), Answer::Error, "one is not plugged");
    assert_eq!((mem.state(1, 1), mem.state(2, 2), mem.state(4, 1)), (UNPLUGGED, ACK, UNPLUGGED));
}

#[test]
fn requests_in_strange_buffers_do_no_harm() {
    let (mut host, mut mem) = requested(8);
    let plug = request(0, PLUGGABLE_GPA, 1);
    let at = mem.driver.write_buffer(0, &plug);
    let answer = mem.driver.write_buffer(0, &[0xff; 10]);
    // In pieces of one byte.
    let mut pieces: Vec<Piece> = (0..24).map(|byte| Piece::readable(at + byte, 1)).collect();
    pieces.extend((0..10).map(|byte| Piece::writable(answer + byte, 1)));
    assert_eq!(mem.driver.queue(0).round_trip(&pieces), 10);
    assert_eq!(Answer::of(&mem.driver.read(answer, 10)), ACK);
    let whole = [Piece::readable(at, 24), Piece::writable(answer, 10)];
    let strange = [
        vec![Piece::readable(at, 23), Piece::writable(answer, 10)],
        vec![Piece::readable(at, 24), Piece::writable(answer, 9)],
        vec![Piece::readable(at, 24)],
        vec![Piece::writable(answer, 10)],
        vec![Piece::readable(u64::MAX - 23, 24), Piece::writable(answer, 10)],
        vec![Piece::readable(at, 24), Piece::writable(1 << 50, 10)],
        // The answer is to go to memory that is not plugged.
        vec![Piece::readable(at, 24), Piece::writable(PLUGGABLE_GPA + 9 * MEM_BLOCK, 10)],
    ];
    for pieces in strange {
        let queue = mem.driver.queue(0);
        queue.put(&pieces);
        queue.kick();
        // The queue may be left alone from then on. A reset driver is served again.
        queue.wait_within(Duration::from_millis(100));
        host.assert_alive();
        mem.driver.reset();
        mem.driver.write(answer, &[0xff; 10]);
        mem.driver.write(at, &request(3, PLUGGABLE_GPA, 1));
        assert_eq!(mem.driver.queue(0).round_trip(&whole), 10, "after {pieces:x?}");
        assert_eq!(Answer::of(&mem.driver.read(answer, 10)), ACK, "it is still plugged");
        mem.driver.write(at, &plug);
    }
    assert_eq!(host.block(1).allocated().unwrap(), 0, "unplugged memory stays a hole");
}

#[test]
fn reset_keeps_what_is_plugged() {
    let (host, mut mem) = requested(4);
    assert_eq!(mem.plug(1, 2), ACK);
    write_block(&host, 1);
    mem.driver.reset();
    assert_eq!((mem.state(1, 2), mem.plugged()), (ACK, 2 * MEM_BLOCK));
    assert_eq!(mem.requested(), 4 * MEM_BLOCK);
    assert_eq!(host.block(1).allocated().unwrap(), MEM_BLOCK);
}

#[test]
fn driver_that_would_read_unplugged_memory_is_refused() {
    let host = DeviceHost::with_pluggable(BLOCKS * MEM_BLOCK);
    host.mem_status(&["--requested", "8M"]);
    let mut driver = Driver::connect(&host.mem_socket(), host.memory(), MEM_AREA);
    driver.begin(0, &[0]);
    let at = driver.write_buffer(0, &request(0, PLUGGABLE_GPA, 1));
    let answer = driver.write_buffer(0, &[0xff; 10]);
    let queue = driver.queue(0);
    queue.put(&[Piece::readable(at, 24), Piece::writable(answer, 10)]);
    queue.kick();
    assert_eq!(queue.wait_within(Duration::from_millis(300)), None);
    assert_eq!(host.mem_now().plugged, 0);
}

#[test]
fn next_agent_answers_what_was_carried_out_and_not_answered() {
    // Plugged by the agent that died, or unplugged by it, or all unplugged.
    for kind in [0, 1, 2] {
        let (mut host, mut mem) = requested(4);
        if kind > 0 {
            assert_eq!(mem.plug(0, 2), ACK);
            write_block(&host, 0);
        }
        let answer = mem.put(kind, PLUGGABLE_GPA, if kind == 2 { 0 } else { 2 });
        assert_eq!(mem.wait_answer(answer), ACK);
        host.agent.process().kill().unwrap();
        mem.driver.queue(0).take_back_last_used();
        mem.driver.write(answer, &[0xff; 10]);
        host.replace_agent();
        let memory = host.memory().clone();
        let mut mem = mem.moved_to(&host.mem_socket(), &memory);
        assert_eq!(mem.wait_answer(answer), ACK, "kind {kind}");
        assert_eq!(mem.state(0, 2), if kind == 0 { ACK } else { UNPLUGGED }, "kind {kind}");
        assert_eq!(mem.plugged(), if kind == 0 { 2 * MEM_BLOCK } else { 0 });
        // Only the first request may be a replay.
        let again = if kind == 0 { mem.plug(0, 2) } else { mem.unplug(0, 2) };
        assert_eq!(again, Answer::Error, "kind {kind}");
    }
}

#[test]
fn next_agent_requests_what_is_plugged() {
    let (mut host, mut mem) = requested(8);
    assert_eq!(mem.plug(2, 3), ACK);
    write_block(&host, 2);
    host.replace_agent();
    let memory = host.memory().clone();
    let mut mem = mem.moved_to(&host.mem_socket(), &memory);
    assert_eq!(mem.plugged(), 3 * MEM_BLOCK);
    assert!(mem.requested() >= 3 * MEM_BLOCK, "otherwise Linux unplugs: {:#x}", mem.requested());
    assert_eq!(host.mem_now().requested, mem.requested());
    assert_eq!(mem.state(2, 3), ACK);
    let usable = host.mem_now().usable_size;
    assert!(usable >= 5 * MEM_BLOCK, "a plugged block is outside: {usable:#x}");
    assert_eq!(host.block(1).allocated().unwrap(), MEM_BLOCK);
    // An operator's word counts again.
    request_blocks(&host, &mut mem, 1);
    assert_eq!(mem.unplug(2, 2), ACK);
}

#[test]
fn driver_that_knows_an_earlier_size_is_not_given_up() {
    // Nothing is plugged yet when the agent dies, and the driver is about to plug.
    let (mut host, mem) = requested(4);
    host.replace_agent();
    let memory = host.memory().clone();
    let mut mem = mem.moved_to(&host.mem_socket(), &memory);
    // Linux gives up the device after ERROR. After these it asks again.
    let answer = mem.plug(0, 1);
    assert!(matches!(answer, Answer::Nack | Answer::Busy | ACK), "{answer:?}");
    // Otherwise it asks without end.
    mem.driver.front_end.wait_for_config_change();
    request_blocks(&host, &mut mem, 4);
    assert_eq!(mem.plug(0, 1), ACK);
}

#[test]
fn request_waits_while_the_agent_waits_for_a_guest() {
    let (host, mut mem) = requested(4);
    let folder = host.folder().join("stream");
    let address = format!("unix:{}", folder.display());
    host.vmm.start_incoming(&address, &Default::default()).unwrap();
    let answer = mem.put_plug(0, 1);
    let early = mem.driver.queue(0).wait_within(Duration::from_millis(300));
    if early.is_some() {
        // BUSY is as good: Linux asks again.
        assert_eq!(Answer::of(&mem.driver.read(answer, 10)), Answer::Busy);
        return;
    }
    host.vmm.client().cancel().unwrap();
    assert_eq!(mem.wait_answer(answer), ACK);
    assert_eq!(host.mem_now().plugged, MEM_BLOCK);
}
