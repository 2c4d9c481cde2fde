// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a virtio-mem device: where it is, which sizes are valid, and which of its blocks
//! are plugged.

use super::wire::BlockRun;
use pageferry_protocol::error::size;
use pageferry_protocol::memory::geometry::MAX_BLOCK_LENGTH;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};

/// How much larger than the requested size the usable region is, in bytes, if the region is large
/// enough: twice the largest section of Linux, 512 MiB on arm64 with pages of 64 KiB.
///
/// The specification demands only that the usable region is not smaller than the requested size.
/// But Linux adds whole sections that end inside the usable region, and plugs parts of them. QEMU
/// adds two sections for this reason, of the size that the guest's architecture has. The device
/// does not know the architecture, and a region that is larger does no harm: the requested size
/// still limits what the driver plugs.
pub const USABLE_EXTENT: u64 = 1 << 30;

/// The pages of the region. Page 0 is the first page of the region.
///
/// The methods get ranges inside the region only. Nobody but the device discards or populates pages
/// of the region: a page that someone else discards makes its block unplugged.
pub trait PluggableMemory {
    /// The first run of unplugged pages in `range`, cut at its ends; `None` if all are plugged.
    /// Pages that are not there count as unplugged.
    fn first_unplugged(&self, range: PageRange) -> Option<PageRange>;

    /// Plugs pages. Pages that are plugged already stay as they are.
    ///
    /// # Errors
    /// If the pages cannot be plugged now, or are not there. Nothing is changed then.
    fn plug(&self, range: PageRange) -> Result<(), MemoryRefused>;

    /// Unplugs pages. Pages that are unplugged already are freed once more: an agent may have died
    /// before it had freed them.
    ///
    /// # Errors
    /// [`MemoryRefused::Missing`] if the pages are not there, and for no other reason
    /// ([`discard-cannot-fail`](crate::invariants#discard-cannot-fail)). Nothing is changed then.
    fn unplug(&self, range: PageRange) -> Result<(), MemoryRefused>;
}

/// Why memory was not plugged or unplugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryRefused {
    /// A job cannot take memory that is plugged while it runs. Linux tries again after 50 seconds
    /// or more. It tries at once after a configuration interrupt, so send one when the job has
    /// ended.
    #[error("the memory cannot be plugged now, because of a job that runs")]
    Busy,
    /// There is no memory yet, or no more.
    #[error("the memory of the region is not there")]
    Missing,
}

/// A field of the device that is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// The block size is not a power of two, or too small or too large.
    #[error(
        "block_size is {}, allowed: powers of two from {} to {}",
        size(*value), size(PAGE_SIZE), size(MAX_BLOCK_LENGTH)
    )]
    BlockSize {
        /// The block size in bytes.
        value: u64,
    },
    /// The value is not a multiple of the block size.
    #[error(
        "{field} is {}, allowed: multiples of the block_size {}",
        shown(field, *value), size(*block_size)
    )]
    Unaligned {
        /// The field.
        field: &'static str,
        /// Its value in bytes.
        value: u64,
        /// The block size in bytes.
        block_size: u64,
    },
    /// The value is too small or too large.
    #[error(
        "{field} is {}, allowed: {} to {}",
        shown(field, *value), shown(field, *min), shown(field, *max)
    )]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// Its value in bytes.
        value: u64,
        /// Smallest value that is allowed.
        min: u64,
        /// Largest value that is allowed.
        max: u64,
    },
}

/// A size in units; the address as a number.
fn shown(field: &str, value: u64) -> String {
    if field == "addr" { format!("{value:#x}") } else { size(value) }
}

/// What does not change during the life of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Size and alignment of a block in bytes: a power of two of at least a page. It must be a
    /// multiple of the unit in which the agent can discard pages.
    pub block_size: u64,
    /// Guest physical address of the first byte: a multiple of the block size.
    pub addr: u64,
    /// Size in bytes: a multiple of the block size.
    pub region_size: u64,
    /// Proximity domain of ACPI that the memory belongs to; `None` if the guest has none.
    pub node_id: Option<u16>,
}

impl Region {
    /// Checks the fields.
    ///
    /// # Errors
    /// What is wrong with the first field that is not valid.
    pub fn check(&self) -> Result<(), FieldError> {
        let valid = PAGE_SIZE..=MAX_BLOCK_LENGTH;
        if !self.block_size.is_power_of_two() || !valid.contains(&self.block_size) {
            return Err(FieldError::BlockSize { value: self.block_size });
        }
        self.check_size("region_size", self.region_size, self.block_size..=MAX_BLOCK_LENGTH)?;
        self.check_size("addr", self.addr, 0..=u64::MAX - self.region_size)
    }

    /// Checks that a size or an address is a multiple of the block size and in a range.
    pub(super) fn check_size(
        &self, field: &'static str, value: u64, allowed: std::ops::RangeInclusive<u64>,
    ) -> Result<(), FieldError> {
        if !value.is_multiple_of(self.block_size) {
            return Err(FieldError::Unaligned { field, value, block_size: self.block_size });
        }
        if !allowed.contains(&value) {
            let (min, max) = allowed.into_inner();
            return Err(FieldError::OutOfRange { field, value, min, max });
        }
        Ok(())
    }

    /// All pages.
    pub(super) fn all(&self) -> PageRange {
        PageRange::new(0, pages_in(self.region_size))
    }

    /// The usable region that a requested size needs, in bytes.
    pub(super) fn usable_for(&self, requested_size: u64) -> u64 {
        if requested_size == 0 {
            return 0;
        }
        let wanted = requested_size.saturating_add(USABLE_EXTENT).min(self.region_size);
        // Cannot overflow: the size of the region is a multiple of the block size.
        wanted.next_multiple_of(self.block_size)
    }

    /// The pages of blocks that the driver names. `None` if there are no blocks, the address is not
    /// that of a block, or a block is outside the first `usable` bytes of the region.
    pub(super) fn pages_of(&self, blocks: BlockRun, usable: u64) -> Option<PageRange> {
        let offset = blocks.addr.checked_sub(self.addr)?;
        let length = u64::from(blocks.count).checked_mul(self.block_size)?;
        let end = offset.checked_add(length)?;
        let valid = length > 0 && end <= usable && offset.is_multiple_of(self.block_size);
        valid.then(|| PageRange::new(pages_in(offset), pages_in(length)))
    }

    /// Bytes of the blocks in `range` that are plugged. `range` is one of whole blocks.
    pub(super) fn plugged_in(&self, memory: &impl PluggableMemory, range: PageRange) -> u64 {
        let (block, end) = (pages_in(self.block_size), range.end());
        let (mut plugged, mut first) = (0, range.first);
        while first < end {
            let Some(run) = memory.first_unplugged(PageRange::new(first, end - first)) else {
                plugged += (end - first) / block;
                break;
            };
            plugged += run.first.saturating_sub(first) / block;
            // A block with an unplugged page is unplugged: continue after the block in which the
            // run ends. With `max` the loop ends even if a memory returns empty runs.
            first = run.end().max(first + 1).min(end).next_multiple_of(block);
        }
        plugged * self.block_size
    }
}
