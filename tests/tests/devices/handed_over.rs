// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections that the VMM hands to its agent, which has no path for devices.

use pageferry_agent::devices::mem::wire::FEATURE_UNPLUGGED_INACCESSIBLE;
use pageferry_client::Device;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::front_end::driver::Driver;
use pageferry_tests::front_end::host::{FIRST_FREE_PAGE, PLUGGABLE, pluggable};
use pageferry_tests::front_end::{FrontEnd, PATIENCE, Piece};
use pageferry_tests::memory::BlockLayout;
use pageferry_tests::scenario::MockSide;

const FIRST: u64 = FIRST_FREE_PAGE;
const MIB: u64 = 1 << 20;

fn side() -> MockSide {
    MockSide::new(vec![BlockLayout::ram(512 * PAGE_SIZE), pluggable(16 * MIB)])
}

fn connect(side: &MockSide, device: Device<'_>) -> Driver {
    let socket = side.client().device_socket(device).unwrap();
    Driver::over(FrontEnd::over(socket, side.vmm.memory()), 0)
}

#[test]
fn device_is_made_when_the_vmm_asks_for_it() {
    let side = side();
    side.block(0).fill(PageRange::new(FIRST, 2), 1).unwrap();
    for round in 0..3 {
        let mut balloon = connect(&side, Device::Balloon);
        balloon.begin(0, &[0, 1]);
        let gpa = balloon.write_buffer(0, &(FIRST as u32).to_le_bytes());
        balloon.queue(0).round_trip(&[Piece::readable(gpa, 4)]);
        assert!(side.block(0).is_hole(PageRange::new(FIRST, 1)).unwrap(), "round {round}");
        side.block(0).fill(PageRange::new(FIRST, 1), 1).unwrap();
    }
    assert!(!side.block(0).is_hole(PageRange::new(FIRST + 1, 1)).unwrap());
}

#[test]
fn next_connection_is_served_when_the_one_before_has_ended() {
    let side = side();
    let mut first = connect(&side, Device::Balloon);
    first.begin(0, &[0]);
    let waiting = side.client().device_socket(Device::Balloon).unwrap();
    let third = side.client().device_socket(Device::Balloon).unwrap_err().to_string();
    assert!(!third.is_empty());
    let gpa = first.write_buffer(0, &(FIRST as u32).to_le_bytes());
    first.queue(0).round_trip(&[Piece::readable(gpa, 4)]);
    drop(first);
    let mut second = Driver::over(FrontEnd::over(waiting, side.vmm.memory()), 0);
    second.begin(0, &[0]);
    second.queue(0).round_trip(&[Piece::readable(gpa, 4)]);
}

#[test]
fn virtio_mem_keeps_its_block_and_block_size() {
    let side = side();
    let device = |block_size| Device::Mem { block: PLUGGABLE, block_size };
    let mut mem = connect(&side, device(Some(MIB)));
    mem.begin(FEATURE_UNPLUGGED_INACCESSIBLE, &[0]);
    assert_eq!(mem.front_end.config_u64(0), MIB);
    assert_eq!(mem.front_end.config_u64(24), 16 * MIB);
    side.client().device_socket(device(None)).unwrap_err();
    side.client().device_socket(Device::Mem { block: "ram", block_size: None }).unwrap_err();
}

#[test]
fn connection_ends_with_its_agent() {
    let side = side();
    let balloon = connect(&side, Device::Balloon);
    // The drop waits for the agent, which must not wait for the front-end.
    drop(side);
    let is_closed = || balloon.front_end.is_closed_within(std::time::Duration::ZERO);
    wait_until("the end of the connection", PATIENCE, is_closed).unwrap();
}
