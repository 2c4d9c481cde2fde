// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages, page ranges and blocks: the units that everything else is counted in.
//!
//! - [`range`]: [`PageRange`] and the rounding of discards and populates
//!   ([`round-safely`](crate::invariants#round-safely));
//! - [`mod@file`]: what the file under guest memory must be;
//! - [`geometry`]: what a block is and when a set of blocks is valid.

pub mod file;
pub mod geometry;
pub mod range;

pub use geometry::{BlockGeometry, BlockTable, GeometryError, MAX_BLOCKS, MAX_MEM_SLOTS};
pub use range::{PageRange, RangeError, pages_in};

/// Size of a page in bytes: the unit of dirty tracking on every backing.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a huge page of x86-64, which is what one page table maps.
pub const HUGE_PAGE: u64 = 2 << 20;

/// `log2(PAGE_SIZE)`.
pub const PAGE_SHIFT: u32 = 12;
