// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of regions as blocks, and blocks found by the addresses of devices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{BlockRange, BlockSpec, Client, Error, ErrorCode, MemoryRegion};
use pageferry_protocol::control::request::Request;
use std::os::fd::{AsFd, OwnedFd};
use support::*;

/// Where the regions of the tests are mapped, as far as a fake agent can tell.
const HOST: u64 = 0x7f00_0000_0000;

/// Two pages of `memory` at `gpa`, from page `first` of the file.
fn region(gpa: u64, vmm_address: u64, memory: &OwnedFd, first: u64) -> MemoryRegion<'_> {
    let (length, memory, fd_offset) = (2 * PAGE, memory.as_fd(), first * PAGE);
    MemoryRegion { gpa, length, vmm_address, memory, fd_offset }
}

/// Three regions. The first and the last are adjacent in the guest, the last two in the VMM.
fn regions(memory: &OwnedFd) -> [MemoryRegion<'_>; 3] {
    [
        region(0x12000, HOST, memory, 4),
        region(0x40000, HOST + 4 * PAGE, memory, 2),
        region(0x10000, HOST + 2 * PAGE, memory, 0),
    ]
}

fn is_known(client: &Client, ids: std::ops::Range<u32>) -> Vec<u32> {
    ids.filter(|id| client.discarded(*id).is_some()).collect()
}

#[test]
fn regions_get_the_lowest_unused_ids_in_the_order_of_their_addresses() {
    let (client, _hooks, agent) = client(|mut agent| {
        let requests: Vec<_> = (0..5).map(|_| agent.accept_block().0).collect();
        requests.into_iter().map(|request| match request {
            Request::AddBlock { geometry, fd_offset, vmm_address, flags: 0 } => {
                assert_eq!(geometry.granularity, PAGE);
                (geometry.id, geometry.name, vmm_address, fd_offset / PAGE)
            }
            other => panic!("{other:?}"),
        })
    });
    let (memory, more) = (written(6), written(4));
    client.add_block(spec(1, 0, &written(1))).unwrap();
    assert_eq!(client.add_blocks(&regions(&memory)).unwrap(), [2, 3, 0]);
    assert_eq!(client.add_blocks(&[]).unwrap(), [0u32; 0]);
    assert_eq!(client.add_blocks(&[region(0x20000, 0, &more, 2)]).unwrap(), [4]);
    let added: Vec<_> = agent.join().unwrap().collect();
    let name = |gpa: &str| format!("ram@{gpa}");
    assert_eq!(
        added,
        [
            (1, "one".to_owned(), 0, 0),
            (2, name("0x12000"), HOST, 4),
            (3, name("0x40000"), HOST + 4 * PAGE, 2),
            (0, name("0x10000"), HOST + 2 * PAGE, 0),
            (4, name("0x20000"), 0, 2),
        ]
    );
}

#[test]
fn a_list_with_a_wrong_region_reaches_no_agent() {
    let (client, _hooks, agent) = client(|mut agent| {
        (0..3).for_each(|_| drop(agent.accept_block()));
        assert!(agent.request().is_none());
    });
    let memory = written(6);
    let [first, second, third] = regions(&memory);
    for (wrong, sentence) in [
        (MemoryRegion { gpa: 0x11000, ..second }, "block 1: 0x11000 + 0x2000 overlaps block 0"),
        (MemoryRegion { fd_offset: 5 * PAGE, ..second }, "block 2"),
        (MemoryRegion { gpa: 1 << 60, ..second }, "ends outside the dirty log"),
        (
            MemoryRegion { vmm_address: HOST + PAGE, ..second },
            "block 2: vmm_address 0x7f0000001000 + length 0x2000 overlaps the mapping of block 0",
        ),
        (MemoryRegion { vmm_address: !0xfff, ..second }, "block 2: vmm_address 0xfffffffffffff000"),
    ] {
        let error = client.add_blocks(&[third, first, wrong]).unwrap_err().to_string();
        assert!(error.contains(sentence), "{error}");
        assert_eq!(is_known(&client, 0..3), [0u32; 0]);
        assert!(client.guest_ranges(0x10000, 1).is_err());
    }
    assert_eq!(client.add_blocks(&[first, second, third]).unwrap(), [1, 2, 0]);
    drop(client);
    agent.join().unwrap();
}

#[test]
fn a_list_of_which_the_agent_refuses_one_is_taken_back() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        let (request, _) = agent.request().unwrap();
        agent.refuse(&request, ErrorCode::Busy, "a job runs");
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::RemoveBlock { id: 1 });
        agent.done(&request);
        agent.accept_block();
    });
    let memory = written(6);
    let error = client.add_blocks(&regions(&memory)).unwrap_err();
    assert!(matches!(error, Error::Refused { code: ErrorCode::Busy, .. }), "{error}");
    assert_eq!(is_known(&client, 0..3), [0u32; 0]);
    assert_eq!(client.add_blocks(&[region(0x10000, HOST, &memory, 0)]).unwrap(), [0]);
    agent.join().unwrap();
}

#[test]
fn addresses_of_a_device_are_freed_in_each_block_that_they_touch() {
    let (client, _hooks, agent) = client(|mut agent| {
        (0..4).for_each(|_| drop(agent.accept_block()));
        let (request, _) = agent.request().unwrap();
        let half = |block, first| BlockRange { block, offset: first * PAGE, length: PAGE };
        assert_eq!(request, Request::Free { ranges: vec![half(0, 1), half(1, 0)] });
        agent.changed(&request, 2);
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::RemoveBlock { id: 0 });
        agent.done(&request);
    });
    let memory = written(6);
    client.add_blocks(&regions(&memory)).unwrap();
    let unmapped = written(1);
    client.add_block(BlockSpec { vmm_address: 0, ..spec(3, 0x50000, &unmapped) }).unwrap();
    let freed = client.guest_ranges(0x11000, 2 * PAGE).unwrap();
    assert_eq!(client.free(&freed).unwrap(), 2);
    let range = |block, offset, length| BlockRange { block, offset, length };
    assert_eq!(
        client.host_ranges(HOST + 1, 6 * PAGE - 2).unwrap(),
        [range(1, 1, 2 * PAGE - 1), range(0, 0, 2 * PAGE), range(2, 0, 2 * PAGE - 1)]
    );
    assert_eq!(client.guest_ranges(0x50000, PAGE).unwrap(), [range(3, 0, PAGE)]);
    assert_eq!(client.guest_ranges(0x99999, 0).unwrap(), []);
    client.remove_block(0).unwrap();
    assert_eq!(
        client.host_ranges(HOST, 5 * PAGE).unwrap_err().to_string(),
        "host address 0x7f0000000000 + 0x5000: 0x7f0000002000 + 0x2000 is in no block"
    );
    assert_eq!(
        client.guest_ranges(0x10000, 8 * PAGE).unwrap_err().to_string(),
        "guest address 0x10000 + 0x8000: 0x10000 + 0x2000 is in no block"
    );
    agent.join().unwrap();
}
