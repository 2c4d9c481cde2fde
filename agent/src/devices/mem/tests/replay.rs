// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first request to a new agent, which an earlier one may have carried out.

use super::*;

/// The agent after the one that had `device`: the same memory and sizes.
fn next_agent<'a>(device: &VirtioMem<&'a Memory>, memory: &'a Memory) -> VirtioMem<&'a Memory> {
    let mut next = VirtioMem::new(REGION, memory).unwrap();
    next.load(&device.save()).unwrap();
    next.connected();
    next
}

#[test]
fn first_request_may_have_been_carried_out_and_later_ones_not() {
    let memory = Memory::new();
    let mut first = device(&memory, 2);
    assert_eq!(first.process(plug(0, 2)), Response::Ack);
    let mut second = next_agent(&first, &memory);
    assert_eq!(second.process(plug(0, 2)), Response::Ack);
    assert_eq!(sizes(&second), (2, 2 + EXTENT, 2));
    assert_eq!(second.process(plug(0, 2)), Response::Error);
    assert_eq!(second.process(unplug(1, 1)), Response::Ack);
    let mut third = next_agent(&second, &memory);
    let unplugs = memory.unplugs.get();
    assert_eq!(third.process(unplug(1, 1)), Response::Ack);
    assert_eq!(memory.unplugs.get(), unplugs + 1, "the agent may have died before the punch");
    assert_eq!(sizes(&third).2, 1);
    assert_eq!(third.process(unplug(1, 1)), Response::Error);
}

#[test]
fn plug_was_within_the_requested_size_of_its_time() {
    let memory = Memory::new();
    let mut first = device(&memory, 2);
    first.process(plug(0, 2));
    first.set_requested_size(BLOCK).unwrap();
    assert_eq!(next_agent(&first, &memory).process(plug(0, 2)), Response::Ack);
}

#[test]
fn any_first_request_ends_it_and_so_does_a_reset() {
    let memory = Memory::new();
    let mut device = device(&memory, 2);
    device.process(plug(0, 1));
    device.connected();
    assert_eq!(state(&mut device, 0, 1), Response::State(BlockState::Plugged));
    assert_eq!(device.process(plug(0, 1)), Response::Error);
    device.connected();
    device.reset();
    assert_eq!(device.process(plug(0, 1)), Response::Error);
}

#[test]
fn part_of_a_plug_is_undone_if_the_rest_is_refused() {
    let memory = Memory::new();
    let mut first = device(&memory, 4);
    first.process(plug(6, 1));
    for (busy, requested, answer) in [(true, 4, Response::Busy), (false, 2, Response::Nack)] {
        // An agent has died after the first of three blocks and a part of the second.
        memory.set(PageRange::new(0, (UNITS + 1) * UNIT), true);
        memory.busy.set(busy);
        let mut second = next_agent(&first, &memory);
        second.set_requested_size(requested * BLOCK).unwrap();
        assert_eq!(sizes(&second).2, 2);
        assert_eq!(second.process(plug(0, 3)), answer);
        assert_eq!(memory.blocks()[..3], [false; 3]);
        assert_eq!(sizes(&second).2, 1);
    }
}

#[test]
fn lost_sizes_never_make_the_usable_region_smaller_than_what_is_plugged() {
    let memory = Memory::new();
    device(&memory, BLOCKS).process(plug(BLOCKS - 1, 1));
    let mut device = device(&memory, 1);
    assert_eq!(sizes(&device), (1, BLOCKS, 1));
    assert_eq!(device.process(unplug(BLOCKS - 1, 1)), Response::Ack);
}

#[test]
fn an_agent_that_knows_no_sizes_wants_what_is_plugged() {
    let memory = Memory::new();
    device(&memory, 4).process(plug(0, 3));
    let mut next = VirtioMem::new(REGION, &memory).unwrap();
    assert_eq!(sizes(&next), (3, BLOCKS, 3));
    next.connected();
    assert_eq!(next.process(plug(3, 1)), Response::Nack);
    // A driver that knows a larger usable region gets no error for a block in it.
    let empty = Memory::new();
    let mut next = VirtioMem::new(REGION, &empty).unwrap();
    next.forget_sizes();
    assert_eq!(next.process(plug(3, 1)), Response::Nack);
    assert_eq!(next.process(Request::UnplugAll), Response::Ack);
    assert_eq!(state(&mut next, 3, 1), Response::State(BlockState::Unplugged));
    next.set_requested_size(0).unwrap();
    assert_eq!(next.process(Request::UnplugAll), Response::Ack);
    assert_eq!(state(&mut next, 3, 1), Response::Error);
    assert_eq!(sizes(&VirtioMem::new(REGION, &empty).unwrap()), (0, 0, 0));
}

proptest! {
    #[test]
    fn interrupted_request_is_completed_by_the_next_agent(
        plugged in prop::collection::vec(any::<bool>(), BLOCKS as usize),
        first in 0..BLOCKS, count in 1..=BLOCKS, plugs: bool, done in 0..=BLOCKS * UNITS,
    ) {
        let count = count.min(BLOCKS - first);
        let memory = Memory::new();
        let pages = |block: u64, count: u64| {
            PageRange::new(block * UNITS * UNIT, count * UNITS * UNIT)
        };
        (0..BLOCKS).zip(&plugged).for_each(|(block, set)| memory.set(pages(block, 1), *set));
        // The blocks of the request are in the state that it expects.
        memory.set(pages(first, count), !plugs);
        let before = device(&memory, BLOCKS);
        let units = done.min(count * UNITS);
        memory.set(PageRange::new(first * UNITS * UNIT, units * UNIT), plugs);

        let mut next = next_agent(&before, &memory);
        let request = if plugs { plug } else { unplug }(first, count as u16);
        prop_assert_eq!(next.process(request), Response::Ack);

        let mut expected = plugged;
        expected[first as usize..(first + count) as usize].fill(plugs);
        prop_assert_eq!(&memory.blocks(), &expected);
        let size = expected.iter().filter(|set| **set).count() as u64;
        prop_assert_eq!(sizes(&next).2, size);
    }
}
