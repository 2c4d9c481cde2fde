// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The region of the device in the session's memory: a block, whose discarded pages are the
//! unplugged ones.

use super::region::{MemoryRefused, PluggableMemory, Region};
use crate::lock::lock;
use crate::memory::GuestMemory;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::error::size;
use pageferry_protocol::memory::PageRange;
use std::sync::{Arc, Mutex};

/// The memory, and the id of the block.
type Block = (Arc<GuestMemory>, u32);

/// The block of the region, while a call needs it.
#[derive(Debug, Clone, Default)]
pub struct PluggedBlock(Arc<Mutex<Option<Block>>>);

/// The block is in reach until this is dropped.
#[derive(Debug)]
pub struct InReach<'a>(&'a PluggedBlock);

impl PluggedBlock {
    /// Has the methods work on the block with this id.
    pub fn reach(&self, memory: &Arc<GuestMemory>, id: u32) -> InReach<'_> {
        *lock(&self.0) = Some((memory.clone(), id));
        InReach(self)
    }

    fn block(&self) -> Option<Block> {
        lock(&self.0).clone()
    }
}

impl Drop for InReach<'_> {
    fn drop(&mut self) {
        *lock(&self.0.0) = None;
    }
}

/// The region that is the block with this name, and the block's id. `None` if there is none.
pub fn region_of(
    memory: &GuestMemory, name: &str, block_size: u64,
) -> Option<Result<(Region, u32), String>> {
    let block = memory.blocks().iter().find(|block| block.geometry.name == name)?;
    let unit = block.discard_unit();
    if !block_size.is_multiple_of(unit) {
        let sentence = format!(
            "block_size is {}, allowed: multiples of {} on this memory",
            size(block_size),
            size(unit)
        );
        return Some(Err(sentence));
    }
    let (addr, region_size) = (block.geometry.gpa, block.geometry.length);
    let region = Region { block_size, addr, region_size, node_id: None };
    let checked = region.check().map_err(|error| error.to_string());
    Some(checked.map(|()| (region, block.geometry.id)))
}

fn range_of(id: u32, pages: PageRange) -> BlockRange {
    BlockRange { block: id, offset: pages.offset(), length: pages.bytes() }
}

impl PluggableMemory for PluggedBlock {
    fn first_unplugged(&self, range: PageRange) -> Option<PageRange> {
        let Some((memory, id)) = self.block() else { return Some(range) };
        let Some((_, block)) = memory.find(id) else { return Some(range) };
        block.discarded.runs(range).next()
    }

    fn plug(&self, range: PageRange) -> Result<(), MemoryRefused> {
        let (memory, id) = self.block().ok_or(MemoryRefused::Missing)?;
        let plugged = memory.populate(&[range_of(id, range)]);
        plugged.map(drop).map_err(|_| MemoryRefused::Missing)
    }

    fn unplug(&self, range: PageRange) -> Result<(), MemoryRefused> {
        let (memory, id) = self.block().ok_or(MemoryRefused::Missing)?;
        let unplugged = memory.discard(&[range_of(id, range)], true);
        unplugged.map(drop).map_err(|_| MemoryRefused::Missing)
    }
}
