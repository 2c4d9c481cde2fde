// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Layouts that follow from the length of the file.
//!
//! The file has the memory of the guest and no gaps. The guest's addresses do have gaps, which
//! belong to devices. Each VMM has them at fixed addresses, so the length of the file says which
//! addresses are in use.

use super::layout::{LayoutError, RawBlock, RawLayout};
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use std::ops::Range;

/// All guest addresses.
const ANY: Range<u64> = 0..u64::MAX;

/// 1 GiB.
const GIB: u64 = 1 << 30;

/// A layout with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedLayout {
    /// Firecracker 1.13 and later on x86-64.
    Firecracker,
    /// Firecracker up to 1.12 on x86-64.
    Firecracker1_12,
    /// Firecracker on aarch64.
    FirecrackerAarch64,
    /// One block at guest address 0.
    Raw,
}

impl NamedLayout {
    /// All layouts, by their names.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("firecracker", Self::Firecracker),
        ("firecracker-1.12", Self::Firecracker1_12),
        ("firecracker-aarch64", Self::FirecrackerAarch64),
        ("raw", Self::Raw),
    ];

    /// The guest addresses that can be memory, in their order.
    ///
    /// Those of Firecracker are in its `src/vmm/src/arch/*/layout.rs`: the constants `MMIO32_MEM_*`
    /// and `MMIO64_MEM_*`, up to 1.12 `MEM_32BIT_GAP_SIZE`, and `DRAM_MEM_START` of aarch64.
    fn memory(self) -> &'static [Range<u64>] {
        match self {
            Self::Firecracker => &[0..3 * GIB, 4 * GIB..256 * GIB, 512 * GIB..u64::MAX],
            Self::Firecracker1_12 => &[0..3 * GIB + GIB / 4, 4 * GIB..u64::MAX],
            Self::FirecrackerAarch64 => &[2 * GIB..256 * GIB, 512 * GIB..u64::MAX],
            Self::Raw => &[ANY],
        }
    }

    /// The layout of a file of `length` bytes. Its blocks have the ids 0, 1 and so on, and the
    /// names `ram0`, `ram1` and so on.
    ///
    /// # Errors
    /// If memory cannot have this length.
    pub fn layout(self, length: u64, granularity: u64) -> Result<RawLayout, LayoutError> {
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::NoMemory { length });
        }
        let (mut blocks, mut offset) = (Vec::new(), 0);
        for (id, memory) in (0..).zip(self.memory()) {
            if offset == length {
                break;
            }
            let (gpa, name) = (memory.start, format!("ram{id}"));
            let length = (length - offset).min(memory.end - memory.start);
            blocks.push(RawBlock {
                block: BlockGeometry { id, name, gpa, length, granularity },
                offset,
            });
            offset += length;
        }
        RawLayout::new(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The blocks of a layout: address, length and offset in the file.
    fn blocks(layout: NamedLayout, length: u64) -> Vec<(u64, u64, u64)> {
        let layout = layout.layout(length, PAGE_SIZE).unwrap();
        assert_eq!(layout.length(), length);
        layout.parts().iter().map(|part| (part.gpa, part.length, part.offset)).collect()
    }

    #[test]
    fn firecracker_has_gaps_below_4_gib_and_from_256_gib_on() {
        let of = |length| blocks(NamedLayout::Firecracker, length);
        assert_eq!(of(128 << 20), [(0, 128 << 20, 0)]);
        assert_eq!(of(0xc000_0000), [(0, 0xc000_0000, 0)]);
        let page = PAGE_SIZE;
        assert_eq!(
            of(0xc000_0000 + page),
            [(0, 0xc000_0000, 0), (0x1_0000_0000, page, 0xc000_0000)]
        );
        assert_eq!(
            of(256 * GIB),
            [(0, 3 * GIB, 0), (4 * GIB, 252 * GIB, 3 * GIB), (512 * GIB, GIB, 255 * GIB)]
        );
    }

    #[test]
    fn an_older_firecracker_has_its_gap_from_3_25_gib_on() {
        assert_eq!(
            blocks(NamedLayout::Firecracker1_12, 4 * GIB),
            [(0, 0xd000_0000, 0), (0x1_0000_0000, 0x3000_0000, 0xd000_0000)]
        );
    }

    #[test]
    fn firecracker_on_aarch64_begins_at_2_gib() {
        let of = |length| blocks(NamedLayout::FirecrackerAarch64, length);
        assert_eq!(of(GIB), [(2 * GIB, GIB, 0)]);
        assert_eq!(of(255 * GIB), [(2 * GIB, 254 * GIB, 0), (512 * GIB, GIB, 254 * GIB)]);
    }

    #[test]
    fn memory_has_whole_pages() {
        for length in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1] {
            for (_, layout) in NamedLayout::NAMES {
                assert_eq!(layout.layout(length, PAGE_SIZE), Err(LayoutError::NoMemory { length }));
            }
        }
        assert_eq!(blocks(NamedLayout::Raw, 8 * GIB), [(0, 8 * GIB, 0)]);
    }
}
