// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Drivers that break the rules: the agent lives, other queues and later buffers are served where
//! that is possible, and a reset device is as good as new.

use crate::scene::Victim;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::{bytes, pages};
use pageferry_tests::front_end::driver::QUEUE_SIZE;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::queue::{INDIRECT, NEXT, WRITE, descriptor};
use pageferry_tests::front_end::{DeviceHost, DriverQueue, Piece, Rings};
use pageferry_tests::memory::BlockLayout;

const FIRST: u64 = FIRST_FREE_PAGE;
const PAGES: u64 = 4096;
const END: u64 = PAGES * PAGE_SIZE;

/// Addresses and lengths where a device must look twice.
const PIECES: [(u64, u32); 9] = [
    (END, 4096),
    (END - 4, 8),
    (END - 4, u32::MAX),
    (0, u32::MAX),
    (1 << 40, 16),
    (u64::MAX, 1),
    (u64::MAX - 3, 8),
    (u64::MAX - 4095, 4096),
    (1 << 63, u32::MAX),
];

/// Every queue gets these buffers, and each buffer alone.
fn every_queue_survives(what: &str, pieces: impl Fn(usize) -> Vec<Piece>) {
    let mut victim = Victim::new(PAGES);
    for queue in 0..5 {
        let balloon = &mut victim.balloon.driver;
        balloon.queue(queue).put(&pieces(queue));
        balloon.queue(queue).kick();
        victim.is_looked_at(queue);
        victim.is_as_good_as_new(&format!("{what} in queue {queue}"));
    }
}

#[test]
fn buffers_outside_of_memory_do_no_harm() {
    for (gpa, length) in PIECES {
        every_queue_survives(&format!("{length:#x} bytes at {gpa:#x}"), |_| {
            vec![Piece::readable(gpa, length), Piece::writable(gpa, length)]
        });
    }
}

#[test]
fn buffers_of_the_wrong_direction_do_no_harm() {
    every_queue_survives("only writable", |_| vec![Piece::writable(FIRST * PAGE_SIZE, 64)]);
    every_queue_survives("only readable", |_| vec![Piece::readable(FIRST * PAGE_SIZE, 64)]);
}

#[test]
fn empty_pieces_do_no_harm() {
    every_queue_survives("nothing", |_| vec![Piece::readable(0, 0), Piece::writable(0, 0)]);
    every_queue_survives("nothing, outside", |_| vec![Piece::writable(1 << 50, 0)]);
}

#[test]
fn whole_memory_in_one_buffer_does_no_harm() {
    // A driver can free what holds its own queues, and must live with the consequences.
    let mut victim = Victim::alone(PAGES);
    let area = FIRST * PAGE_SIZE;
    victim.balloon.report(&[(area, END - area)]);
    victim.is_as_good_as_new("all of memory in one report");
    let queue = victim.balloon.report_queue();
    victim.balloon.driver.queue(queue).put(&[Piece::writable(0, END as u32)]);
    victim.balloon.driver.queue(queue).kick();
    victim.is_as_good_as_new("the queues themselves");
}

#[test]
fn descriptors_in_a_circle_end() {
    let mut victim = Victim::new(PAGES);
    for queue in 0..5 {
        let ring = victim.balloon.driver.queue(queue);
        ring.write_descriptor(0, FIRST * PAGE_SIZE, 4, NEXT, 1);
        ring.write_descriptor(1, FIRST * PAGE_SIZE, 4, NEXT, 0);
        ring.offer(0);
        ring.kick();
        victim.is_looked_at(queue);
        victim.is_as_good_as_new(&format!("a circle of two in queue {queue}"));
        let ring = victim.balloon.driver.queue(queue);
        ring.write_descriptor(5, FIRST * PAGE_SIZE, 4096, NEXT | WRITE, 5);
        ring.offer(5);
        ring.kick();
        victim.is_looked_at(queue);
        victim.is_as_good_as_new(&format!("a descriptor behind itself in queue {queue}"));
    }
}

#[test]
fn descriptors_that_are_not_there_do_no_harm() {
    let mut victim = Victim::new(PAGES);
    for head in [QUEUE_SIZE, u16::MAX] {
        let ring = victim.balloon.driver.queue(0);
        ring.offer(head);
        ring.kick();
        victim.is_looked_at(0);
        victim.is_as_good_as_new(&format!("head {head}"));
        let ring = victim.balloon.driver.queue(0);
        ring.write_descriptor(0, FIRST * PAGE_SIZE, 4, NEXT, head);
        ring.offer(0);
        ring.kick();
        victim.is_looked_at(0);
        victim.is_as_good_as_new(&format!("next descriptor {head}"));
    }
}

#[test]
fn indirect_tables_are_not_followed_without_end() {
    let mut victim = Victim::new(PAGES);
    let table = FIRST * PAGE_SIZE;
    // 65535 descriptors, each of which has numbers of pages that are not there. Zeroes would free
    // the queues.
    let numbers = table + (2 << 20);
    victim.balloon.driver.write(numbers, &[0xff; 4096]);
    let entry = descriptor(numbers, 4096, NEXT, 0);
    let mut bytes = Vec::new();
    for next in 1..=u16::MAX {
        bytes.extend_from_slice(&entry[..14]);
        bytes.extend_from_slice(&next.to_le_bytes());
    }
    for chunk in bytes.chunks(4096).enumerate() {
        victim.balloon.driver.write(table + 4096 * chunk.0 as u64, chunk.1);
    }
    for (queue, length) in [(0, 16 * 65535), (0, 16), (1, 17), (3, 0), (4, u32::MAX)] {
        let ring = victim.balloon.driver.queue(queue);
        ring.write_descriptor(0, table, length, INDIRECT, 0);
        ring.offer(0);
        ring.kick();
        victim.is_looked_at(queue);
        victim.is_as_good_as_new(&format!("a table of {length} bytes in queue {queue}"));
    }
    // A table in a table.
    victim.balloon.driver.write(table, &descriptor(table, 16, INDIRECT, 0));
    let ring = victim.balloon.driver.queue(0);
    ring.write_descriptor(0, table, 16, INDIRECT, 0);
    ring.offer(0);
    ring.kick();
    victim.is_looked_at(0);
    victim.is_as_good_as_new("a table in itself");
}

#[test]
fn available_index_far_ahead_does_no_harm() {
    let mut victim = Victim::new(PAGES);
    for ahead in [QUEUE_SIZE + 1, 0x8000, u16::MAX] {
        let ring = victim.balloon.driver.queue(0);
        ring.set_available_index(ring.available_index().wrapping_add(ahead));
        ring.kick();
        victim.is_looked_at(0);
        victim.is_as_good_as_new(&format!("{ahead} buffers that are not there"));
    }
}

#[test]
fn queues_of_any_size_do_no_harm() {
    let mut victim = Victim::new(PAGES);
    let area = victim.balloon.driver.area_of(0);
    for size in [0, 3, 1, 1024, 1025, 32768] {
        victim.begin_without_queues();
        let rings = Rings::at(area, size.max(1));
        // The size is that of the front-end's message.
        let (queue, rings) =
            (DriverQueue::new(victim.host.memory(), rings), Rings { size, ..rings });
        // It may be refused, or not served.
        let _ = victim.balloon.driver.front_end.start_rings(0, rings, &queue, 0);
        queue.kick();
        victim.is_as_good_as_new(&format!("a queue of size {size}"));
    }
}

#[test]
fn rings_at_any_place_do_no_harm() {
    let mut victim = Victim::new(PAGES);
    let good = Rings::at(victim.balloon.driver.area_of(0), QUEUE_SIZE);
    let last = END - 8;
    let places = [
        Rings { descriptors: END, ..good },
        Rings { descriptors: END - 16, ..good },
        Rings { available: 1 << 50, ..good },
        Rings { available: END - 2, ..good },
        Rings { used: u64::MAX - 7, ..good },
        Rings { descriptors: good.descriptors + 1, ..good },
        Rings { available: good.available + 1, ..good },
        Rings { used: good.used + 2, ..good },
        Rings { used: last, ..good },
        Rings { used: good.descriptors, ..good },
        Rings { descriptors: last - 8, available: last - 8, used: last - 8, ..good },
    ];
    for rings in places {
        victim.begin_without_queues();
        let mut queue = DriverQueue::new(victim.host.memory(), good);
        let _ = victim.balloon.driver.front_end.start_rings(0, rings, &queue, 0);
        queue.put(&[Piece::readable(FIRST * PAGE_SIZE, 4)]);
        queue.kick();
        victim.is_as_good_as_new(&format!("{rings:x?}"));
    }
}

#[test]
fn rings_in_freed_memory_do_no_harm() {
    let mut victim = Victim::new(PAGES);
    // The pages of the queue of inflation itself.
    let (first, _) = (victim.balloon.driver.area_of(0) / PAGE_SIZE, ());
    let queue = victim.balloon.report_queue();
    let (gpa, length) = bytes(first, 4);
    victim.balloon.driver.queue(queue).round_trip(&[Piece::writable(gpa, length as u32)]);
    assert!(victim.host.block(0).is_hole(PageRange::new(first + 3, 1)).unwrap());
    victim.balloon.driver.queue(0).kick();
    victim.is_as_good_as_new("a queue that was freed");
}

#[test]
fn used_ring_in_the_last_bytes_of_memory_is_served() {
    let host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    balloon.driver.stop();
    let size = 8u16;
    let used = END - 4 - 8 * u64::from(size) - 2;
    // The event index behind the ring is not used, and lies in the last two bytes.
    let used = used / 4 * 4;
    let rings = Rings { used, ..Rings::at(balloon.driver.area_of(0), size) };
    balloon.driver.begin_queue(0, rings);
    for page in 0..100 {
        balloon.inflate(&pages(FIRST + page, 1));
    }
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 100)).unwrap());
}

#[test]
fn ranges_over_two_blocks_are_freed_in_both() {
    let next = BlockLayout { id: 1, name: "next".into(), gpa: END, ..BlockLayout::ram(END) };
    let behind =
        BlockLayout { id: 2, name: "behind".into(), gpa: 3 * END, ..BlockLayout::ram(END) };
    let host = DeviceHost::start(vec![BlockLayout::ram(END), next, behind]);
    for (id, first) in [(0, PAGES - 8), (1, 0), (1, PAGES - 8), (2, 0)] {
        host.block(id).fill(PageRange::new(first, 8), 1).unwrap();
    }
    let mut balloon = host.balloon();
    // Over the edge of two blocks, over a hole between two, and by numbers over an edge.
    balloon.report(&[(END - 2 * PAGE_SIZE, 4 * PAGE_SIZE)]);
    balloon.report(&[(2 * END - 2 * PAGE_SIZE, END + 4 * PAGE_SIZE)]);
    balloon.inflate(&pages(PAGES - 3, 6));
    for (id, given, kept) in [
        (0, PageRange::new(PAGES - 3, 3), PAGES - 4),
        (1, PageRange::new(0, 3), 3),
        (1, PageRange::new(PAGES - 2, 2), PAGES - 3),
        (2, PageRange::new(0, 2), 2),
    ] {
        assert!(host.block(id).is_hole(given).unwrap(), "{given:?} of block {id}");
        assert!(!host.block(id).is_hole(PageRange::new(kept, 1)).unwrap());
    }
    assert_eq!(host.balloon_now().outside, END);
}

#[test]
fn queue_and_buffer_may_lie_over_the_edge_of_two_blocks() {
    let next = BlockLayout { id: 1, name: "next".into(), gpa: END, ..BlockLayout::ram(END) };
    let mut host = DeviceHost::start(vec![BlockLayout::ram(END), next]);
    host.block(0).fill(PageRange::new(FIRST, 4), 1).unwrap();
    let mut balloon = host.balloon();
    let numbers: Vec<u8> = pages(FIRST, 2).iter().flat_map(|page| page.to_le_bytes()).collect();
    balloon.driver.write(END - 4, &numbers);
    balloon.driver.queue(0).round_trip(&[Piece::readable(END - 4, 8)]);
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 2)).unwrap());
    balloon.driver.stop();
    let rings = Rings::at(END - 1024, QUEUE_SIZE);
    balloon.driver.begin_queue(0, rings);
    balloon.inflate(&pages(FIRST + 2, 2));
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 4)).unwrap());
    host.assert_alive();
}
