// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Blocks of the model tests of snapshots and restores.

use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::BlockLayout;

/// The id of a block, and a page of it.
pub type Page = (u32, u64);

/// Bytes of guest address space that the log must cover for these blocks.
pub const LOG_COVERS: u64 = 1 << 30;

/// Blocks at odd places, and not in the order of their addresses. The largest one has `largest`
/// pages, which is more than 512, and begins where its file may have a huge page.
pub fn layouts(largest: u64) -> Vec<BlockLayout> {
    let block = |id: u32, gpa: u64, pages: u64, fd_offset: u64| BlockLayout {
        id,
        name: format!("block{id}"),
        gpa,
        fd_offset,
        ..BlockLayout::ram(pages * PAGE_SIZE)
    };
    vec![
        block(7, 0x3000, 150, 0x5000),
        block(2, 0x1000_0000, 64, 0),
        block(9, 0x200_1000, largest, 0x20_0000),
    ]
}
