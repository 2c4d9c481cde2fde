// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads and writes of the configuration space, of any size and at any place.

use pageferry_tests::front_end::DeviceHost;
use pageferry_tests::front_end::host::{MEM_BLOCK, PLUGGABLE_GPA};

#[test]
fn any_write_changes_at_most_the_numbers_of_the_driver() {
    let mut host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    host.balloon_status(&["1M"]);
    let front_end = &mut balloon.driver.front_end;
    front_end.wait_for_config_change();
    for offset in (0..20).chain([255, 256, 257, 4095]) {
        for size in [1u32, 2, 3, 4, 5, 8, 16, 17, 256] {
            // The library may refuse it. The device lives and keeps what is not the driver's.
            let _ = front_end.write_config(offset, &vec![0xff; size as usize]);
            assert_eq!(front_end.config_u32(0), 256, "target after {size} bytes at {offset}");
            assert_eq!(front_end.config_u32(8), 0, "command after {size} bytes at {offset}");
        }
    }
    assert_eq!(front_end.config(4, 4).unwrap(), [0xff; 4]);
    front_end.write_config(4, &[1, 0, 0, 0]).unwrap();
    assert_eq!(host.balloon_now().actual, 4096);
    host.assert_alive();
}

#[test]
fn reads_have_exactly_what_is_there() {
    let mut host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    let front_end = &mut balloon.driver.front_end;
    let whole = front_end.config(0, 16).unwrap();
    for offset in 0..16u32 {
        for size in 1..=16 - offset {
            let end = (offset + size) as usize;
            assert_eq!(front_end.config(offset, size).unwrap(), whole[offset as usize..end]);
        }
    }
    assert!(front_end.config(0, 17).is_none());
    assert!(front_end.config(16, 1).is_none());
    assert_eq!(front_end.config(0, 16).unwrap(), whole, "the connection goes on");
    host.assert_alive();
}

#[test]
fn configuration_of_virtio_mem_is_read_only() {
    let host = DeviceHost::with_pluggable(16 * MEM_BLOCK);
    let mut mem = host.mem();
    let whole = mem.driver.front_end.config(0, 56).unwrap();
    let _ = mem.driver.front_end.write_config(0, &[0xff; 56]);
    assert_eq!(mem.driver.front_end.config(0, 56).unwrap(), whole);
    assert_eq!(mem.driver.front_end.config_u64(16), PLUGGABLE_GPA);
    assert_eq!(mem.driver.front_end.config_u64(24), 16 * MEM_BLOCK);
}
