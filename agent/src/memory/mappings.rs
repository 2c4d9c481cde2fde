// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's mappings of the blocks: translates between addresses in the VMM and host pages.

use super::block::Block;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::userfault::AddressRange;
use std::sync::Arc;

/// The mappings of all blocks, in the order of the memory's blocks.
#[derive(Debug)]
pub struct Mappings(Vec<Mapping>);

/// The mapping of one block.
#[derive(Debug)]
pub struct Mapping {
    /// The block.
    pub id: u32,
    /// Address of the first byte of the block.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Size of a host page in bytes.
    pub unit: u64,
}

impl Mappings {
    /// The mappings of `blocks`.
    pub fn of(blocks: &[Arc<Block>]) -> Self {
        let mapping = |block: &Arc<Block>| Mapping {
            id: block.geometry.id,
            start: block.vmm_address,
            length: block.geometry.length,
            unit: block.backing.host_page_size(),
        };
        Self(blocks.iter().map(mapping).collect())
    }

    /// The mappings, in the order of the blocks.
    pub fn all(&self) -> &[Mapping] {
        &self.0
    }

    /// The block and host page of an address in the VMM. `None` if it is not guest memory.
    pub fn locate(&self, address: u64) -> Option<(usize, u64)> {
        let found = |mapping: &Mapping| {
            address.checked_sub(mapping.start).is_some_and(|at| at < mapping.length)
        };
        let at = self.0.iter().position(found)?;
        Some((at, (address - self.0[at].start) / self.0[at].unit))
    }

    /// The blocks and host pages that lie in a range of addresses of the VMM.
    pub fn locate_range(&self, range: AddressRange) -> impl Iterator<Item = (usize, PageRange)> {
        let end = range.start.saturating_add(range.length);
        self.0.iter().enumerate().filter_map(move |(at, mapping)| {
            let first = range.start.saturating_sub(mapping.start).div_ceil(mapping.unit);
            let end = end.saturating_sub(mapping.start).min(mapping.length) / mapping.unit;
            (first < end).then(|| (at, PageRange::new(first, end - first)))
        })
    }

    /// The addresses of host pages of the block at index `at`.
    pub fn addresses(&self, at: usize, host_pages: PageRange) -> AddressRange {
        let mapping = &self.0[at];
        let (start, length) =
            (mapping.start + host_pages.first * mapping.unit, host_pages.count * mapping.unit);
        AddressRange { start, length }
    }
}
