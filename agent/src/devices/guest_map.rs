// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages of which blocks a guest physical address is, for a device.
//!
//! The front-end of a device has a memory table of its own, and it need not be the one that the VMM
//! has given to the agent: other regions, and parts of files. So a page is found by its place in
//! the file, and the file by its inode.

use super::buffer::Mapped;
use crate::memory::GuestMemory;
use crate::memory::backing::BackingKind;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::fs::fstat;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Device and inode of a file.
type FileId = (u64, u64);

fn file_id(file: impl AsFd) -> Option<FileId> {
    let stat = fstat(file).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// A region of the front-end's table, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    gpa: u64,
    length: u64,
    file: FileId,
    /// Where the region begins in the file.
    offset: u64,
}

/// The memory table of a front-end.
#[derive(Debug, Default)]
pub struct FrontEndTable(Vec<Region>);

impl FrontEndTable {
    /// The regions of `memory`. One that is no file has no pages for us.
    pub fn of(memory: &Mapped) -> Self {
        let mut table = Self::default();
        for region in memory.iter() {
            if let Some(file) = region.file_offset() {
                table.add(region.start_addr().raw_value(), region.len(), file.file(), file.start());
            }
        }
        table
    }

    /// Adds a region that is this part of a file. One that has no whole pages, or ends nowhere, is
    /// left out: it is no memory of a guest.
    pub fn add(&mut self, gpa: u64, length: u64, file: impl AsFd, offset: u64) {
        let is_whole = [gpa, length, offset].iter().all(|value| value.is_multiple_of(PAGE_SIZE));
        let ends = gpa.checked_add(length).is_some() && offset.checked_add(length).is_some();
        if let Some(file) = file_id(file).filter(|_| is_whole && ends) {
            self.0.push(Region { gpa, length, file, offset });
        }
    }

    /// Removes the region at this address.
    pub fn remove(&mut self, gpa: u64) {
        self.0.retain(|region| region.gpa != gpa);
    }
}

/// A piece of guest physical memory that is a piece of a block, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    length: u64,
    /// Index of the block.
    at: usize,
    /// Where the piece begins in the block.
    offset: u64,
}

/// Pieces by their guest physical addresses, for one table and one set of blocks.
#[derive(Debug, Default)]
pub struct GuestMap {
    pieces: Vec<Piece>,
    /// The set of blocks for which this holds.
    blocks: Weak<GuestMemory>,
}

impl GuestMap {
    /// Brings the map up to date. `is_new` says that the table has changed.
    pub fn update(&mut self, table: &FrontEndTable, memory: &Arc<GuestMemory>, is_new: bool) {
        // The address of a set is not used again while this has it.
        if !is_new && std::ptr::eq(self.blocks.as_ptr(), Arc::as_ptr(memory)) {
            return;
        }
        self.blocks = Arc::downgrade(memory);
        self.pieces.clear();
        for (at, block) in memory.blocks().iter().enumerate() {
            // Nobody but its VMM has the memory of a clone: the file is its base.
            if block.backing.kind() == BackingKind::Clone {
                continue;
            }
            let Some(file) = file_id(block.backing.fd()) else { continue };
            let (start, length) = (block.backing.file_offset(0), block.geometry.length);
            for region in table.0.iter().filter(|region| region.file == file) {
                let first = region.offset.max(start);
                let end = (region.offset + region.length).min(start + length);
                if first < end {
                    let gpa = region.gpa + (first - region.offset);
                    self.pieces.push(Piece { gpa, length: end - first, at, offset: first - start });
                }
            }
        }
        self.pieces.sort_unstable_by_key(|piece| (piece.gpa, piece.at));
        // A front-end that lies has regions that overlap, and a VMM can hand over a file twice. The
        // first one counts.
        let mut end = 0;
        self.pieces.retain_mut(|piece| {
            let skip = end.max(piece.gpa) - piece.gpa;
            if skip >= piece.length {
                return false;
            }
            piece.gpa += skip;
            piece.offset += skip;
            piece.length -= skip;
            end = piece.gpa + piece.length;
            true
        });
    }

    /// Calls `found` with the parts of `length` bytes from `gpa` that lie in blocks: index of the
    /// block, offset in the block, and length. Returns how many bytes lie in none.
    fn locate(&self, gpa: u64, length: u64, mut found: impl FnMut(usize, u64, u64)) -> u64 {
        // No piece ends behind the last address.
        let end = gpa.saturating_add(length);
        let first = self.pieces.partition_point(|piece| piece.gpa + piece.length <= gpa);
        let mut left = end - gpa;
        for piece in self.pieces[first..].iter().take_while(|piece| piece.gpa < end) {
            let (from, to) = (piece.gpa.max(gpa), (piece.gpa + piece.length).min(end));
            found(piece.at, piece.offset + (from - piece.gpa), to - from);
            left -= to - from;
        }
        left
    }
}

/// The memory of the session as a device sees it.
#[derive(Debug, Clone, Copy)]
pub struct DeviceMemory<'a> {
    memory: &'a Arc<GuestMemory>,
    map: &'a GuestMap,
}

impl<'a> DeviceMemory<'a> {
    /// `map` is up to date.
    pub fn new(memory: &'a Arc<GuestMemory>, map: &'a GuestMap) -> Self {
        Self { memory, map }
    }

    /// The blocks.
    pub fn memory(&self) -> &'a Arc<GuestMemory> {
        self.memory
    }

    /// Adds the parts of `length` bytes from `gpa` that lie in blocks to `ranges`. Returns how many
    /// bytes lie in none.
    pub fn ranges(&self, gpa: u64, length: u64, ranges: &mut Vec<BlockRange>) -> u64 {
        self.map.locate(gpa, length, |at, offset, length| {
            let block = self.memory.blocks()[at].geometry.id;
            match ranges.last_mut() {
                Some(last) if last.block == block && last.offset + last.length == offset => {
                    last.length += length;
                }
                _ => ranges.push(BlockRange { block, offset, length }),
            }
        })
    }

    /// The pages that `length` bytes from `gpa` touch: index of the block, and pages.
    pub fn pages(&self, gpa: u64, length: u64) -> Vec<(usize, PageRange)> {
        let mut pages = Vec::new();
        self.map.locate(gpa, length, |at, offset, length| {
            let first = offset / PAGE_SIZE;
            let end = (offset + length).div_ceil(PAGE_SIZE);
            pages.push((at, PageRange::new(first, end - first)));
        });
        pages
    }
}

/// Tables for tests.
#[cfg(test)]
pub mod test_support {
    use super::FrontEndTable;
    use crate::memory::GuestMemory;

    /// The table of a front-end that has the block at index `at` at its address.
    pub fn whole_table(memory: &GuestMemory, at: usize) -> FrontEndTable {
        let block = &memory.blocks()[at];
        let mut table = FrontEndTable::default();
        let (gpa, length) = (block.geometry.gpa, block.geometry.length);
        table.add(gpa, length, block.backing.fd(), block.backing.file_offset(0));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use std::fs::File;
    use vm_memory::{FileOffset, GuestAddress};

    fn table(memory: &GuestMemory, regions: &[(u64, usize, u64, u64)]) -> FrontEndTable {
        let regions = regions.iter().map(|&(gpa, at, offset, length)| {
            let file = memory.blocks()[at].backing.fd().try_clone_to_owned().unwrap();
            let file = FileOffset::new(File::from(file), offset);
            (GuestAddress(gpa), length as usize, Some(file))
        });
        let regions: Vec<_> = regions.collect();
        FrontEndTable::of(&Mapped::from_ranges_with_files(regions).unwrap())
    }

    #[test]
    fn addresses_are_found_by_the_place_in_the_file() {
        let memory = Arc::new(memory(&[16, 8]));
        // The front-end maps a part of the first block, and the second one elsewhere.
        let table = table(
            &memory,
            &[(0x10_0000, 0, 4 * PAGE_SIZE, 8 * PAGE_SIZE), (0x20_0000, 1, 0, 8 * PAGE_SIZE)],
        );
        let mut map = GuestMap::default();
        map.update(&table, &memory, true);
        let view = DeviceMemory::new(&memory, &map);
        let found = |gpa, length| {
            let mut ranges = Vec::new();
            let outside = view.ranges(gpa, length, &mut ranges);
            let short = |range: &BlockRange| (range.block, range.offset, range.length);
            (ranges.iter().map(short).collect::<Vec<_>>(), outside)
        };
        let ids: Vec<u32> = memory.blocks().iter().map(|block| block.geometry.id).collect();
        let p = PAGE_SIZE;
        assert_eq!(found(0x10_0000 + p, p), (vec![(ids[0], 5 * p, p)], 0));
        assert_eq!(found(0x10_0000 + 7 * p, 2 * p), (vec![(ids[0], 11 * p, p)], p));
        assert_eq!(found(0x20_0000 - p, 2 * p), (vec![(ids[1], 0, p)], p));
        assert_eq!(found(0, p), (vec![], p));
        assert_eq!(found(u64::MAX - p, 2 * p), (vec![], p));
        assert_eq!(view.pages(0x20_0000 + 10, 1), [(1, PageRange::new(0, 1))]);
        assert_eq!(view.pages(0x20_0000 + p - 1, 2), [(1, PageRange::new(0, 2))]);
    }

    #[test]
    fn pieces_that_overlap_count_once() {
        let memory = Arc::new(memory(&[16]));
        let p = PAGE_SIZE;
        let mut table = FrontEndTable::default();
        let file = memory.blocks()[0].backing.fd();
        for (gpa, length, offset) in
            [(0, 8 * p, 0), (2 * p, 2 * p, 0), (6 * p, 4 * p, 4 * p), (0, 8 * p, 8 * p)]
        {
            table.add(gpa, length, file, offset);
        }
        let mut map = GuestMap::default();
        map.update(&table, &memory, true);
        let view = DeviceMemory::new(&memory, &map);
        let mut ranges = Vec::new();
        assert_eq!(view.ranges(0, 12 * p, &mut ranges), 2 * p);
        assert_eq!(ranges.iter().map(|range| range.length).sum::<u64>(), 10 * p);
        assert!(map.pieces.windows(2).all(|two| two[0].gpa + two[0].length <= two[1].gpa));
    }

    #[test]
    fn regions_that_cannot_be_guest_memory_are_left_out() {
        let memory = Arc::new(memory(&[16]));
        let file = memory.blocks()[0].backing.fd();
        let p = PAGE_SIZE;
        for (gpa, length, offset) in [
            (1, p, 0),
            (0, p + 1, 0),
            (0, p, 1),
            (u64::MAX - p + 1, p, 0),
            (0, p, u64::MAX - p + 1),
            (u64::MAX, u64::MAX, u64::MAX),
        ] {
            let mut table = FrontEndTable::default();
            table.add(gpa, length, file, offset);
            let mut map = GuestMap::default();
            map.update(&table, &memory, true);
            assert_eq!(map.pieces, [], "{gpa:#x} {length:#x} {offset:#x}");
        }
    }
}
