// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where guest memory is: in QEMU's process, and in the guest's address space.
//!
//! QEMU has no command that says so. This module puts it together from four answers, which the
//! caller fetches by QMP:
//!
//! - `ram_blocks`: `info ramblock` has the name and HVA of each RAM block, and no guest address;
//! - `flat_view`: `info mtree -f` has the guest addresses of memory regions, by another name;
//! - `memory_objects`: `query-memory-devices` has the addresses of devices whose memory the flat
//!   view may not show; `query-memdev` is for checks.
//!
//! # Memory that the flat view hides
//!
//! The flat view shows what the guest sees now. Parts of a RAM block may be hidden: by the VGA
//! window, by ROM, by system management memory, or because virtio-mem is not plugged. They may come
//! back while the guest runs, so they belong to its memory. [`guest_ram`] gives each block as few
//! ranges as possible. In one range, GPA minus offset is constant:
//!
//! 1. Visible ranges with the same GPA minus offset are one span, and so is what is hidden between
//!    them.
//! 2. A span inside another one is an alias, as QEMU makes for system management memory. It is left
//!    out.
//! 3. What is hidden between two spans belongs to the lower one: firmware hides the end of the
//!    memory below 4 GiB, and the memory above begins at 4 GiB. What is hidden before the first and
//!    after the last span belongs to these.
//!
//! So the result depends on the machine and not on what firmware and guest did to it. Both ends of
//! a migration get the same ranges.

mod error;
mod flat_view;
mod memory_objects;
mod ram_blocks;

pub use error::Error;
pub use flat_view::{FlatRange, parse as parse_flat_view};
pub use memory_objects::{MemoryBackend, MemoryDevice, parse_backends, parse_devices};
pub use ram_blocks::{RamBlock, parse as parse_ram_blocks};

/// Guest memory that is contiguous in the guest's address space and in QEMU's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRam {
    /// Name of QEMU's RAM block.
    pub block: String,
    /// Offset in the block.
    pub block_offset: u64,
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub length: u64,
    /// Address in QEMU's process.
    pub hva: u64,
    /// Size in bytes of the pages of the block's file.
    pub page_size: u64,
}

/// Finds the guest's memory, in the order of guest physical addresses.
///
/// `is_shared` says whether the memory at an HVA is in a file that the caller shares; other RAM
/// blocks, as ROM and video memory, are not guest memory. A block without name is memory that no
/// device uses; it is left out, too.
///
/// # Errors
///
/// Fails if a block has no address in the guest, or more than one.
pub fn guest_ram(
    blocks: &[RamBlock], flat_view: &[FlatRange], devices: &[MemoryDevice],
    is_shared: impl Fn(u64) -> bool,
) -> Result<Vec<GuestRam>, Error> {
    let mut guest_ram = Vec::new();
    for block in blocks {
        if block.name.is_empty() || !is_shared(block.hva) {
            continue;
        }
        let visible = visible_pieces(block, blocks, flat_view, devices)?;
        let spans = spans(block, visible)?;
        guest_ram.extend(cover(block, &spans)?);
    }
    guest_ram.sort_by_key(|range| range.gpa);
    refuse_overlap(&guest_ram)?;
    Ok(guest_ram)
}

/// A part of a block with a guest address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    length: u64,
    gpa: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// GPA minus offset, of which the difference to that of another piece is all that matters.
    fn displacement(&self) -> u64 {
        self.gpa.wrapping_sub(self.offset)
    }

    fn contains(&self, other: &Piece) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }
}

/// The parts of a block whose addresses QEMU tells, each inside the block.
fn visible_pieces(
    block: &RamBlock, blocks: &[RamBlock], flat_view: &[FlatRange], devices: &[MemoryDevice],
) -> Result<Vec<Piece>, Error> {
    let mut pieces = Vec::new();
    for range in flat_view.iter().filter(|range| range.is_memory) {
        if is_region_of(&range.region, block) {
            refuse_second_block(&range.region, block, blocks)?;
            pieces.push(Piece { offset: range.offset, length: range.length, gpa: range.gpa });
        }
    }
    for device in devices {
        let object = device.memdev.rsplit('/').next().unwrap_or_default();
        if !object.is_empty() && is_region_of(object, block) {
            refuse_second_block(object, block, blocks)?;
            pieces.push(Piece { offset: 0, length: device.length, gpa: device.gpa });
        }
    }
    pieces.retain(|piece| piece.length > 0);
    for piece in &pieces {
        let in_block = piece.offset.checked_add(piece.length);
        let in_guest = piece.gpa.checked_add(piece.length);
        if in_block.is_none_or(|end| end > block.max_length) || in_guest.is_none() {
            return Err(Error::OutsideBlock {
                block: block.name.clone(),
                offset: piece.offset,
                length: piece.length,
                gpa: piece.gpa,
                block_length: block.max_length,
            });
        }
    }
    Ok(pieces)
}

/// Whether a region is that of a block. The name of a block is the region's name, behind the path
/// of the device that has it, as `0000:00:02.0/mem1`.
fn is_region_of(region: &str, block: &RamBlock) -> bool {
    block.name == region || block.name.strip_suffix(region).is_some_and(|path| path.ends_with('/'))
}

fn refuse_second_block(region: &str, block: &RamBlock, blocks: &[RamBlock]) -> Result<(), Error> {
    match blocks.iter().find(|other| other.name != block.name && is_region_of(region, other)) {
        None => Ok(()),
        Some(other) => Err(Error::TwoBlocks {
            region: region.to_owned(),
            first: block.name.clone(),
            second: other.name.clone(),
        }),
    }
}

/// Joins pieces of one displacement, removes aliases, and sorts by offset.
fn spans(block: &RamBlock, mut pieces: Vec<Piece>) -> Result<Vec<Piece>, Error> {
    pieces.sort_by_key(|piece| (piece.displacement(), piece.offset));
    let mut spans: Vec<Piece> = Vec::new();
    for piece in pieces {
        match spans.last_mut() {
            Some(span) if span.displacement() == piece.displacement() => {
                span.length = span.end().max(piece.end()) - span.offset;
            }
            _ => spans.push(piece),
        }
    }
    // The longer of two spans at one offset comes first, so that only what was kept may contain it.
    spans.sort_by_key(|span| (span.offset, u64::MAX - span.length, span.gpa));
    let mut kept: Vec<Piece> = Vec::new();
    for span in spans {
        match kept.last() {
            // Two spans of one place and length: neither is an alias of the other.
            Some(last) if last.contains(&span) && !span.contains(last) => {}
            Some(last) if last.end() > span.offset => {
                return Err(Error::TwoAddresses {
                    block: block.name.clone(),
                    offset: span.offset,
                    first: last.gpa + (span.offset - last.offset),
                    second: span.gpa,
                });
            }
            _ => kept.push(span),
        }
    }
    Ok(kept)
}

/// Extends the spans until they cover the whole block.
fn cover(block: &RamBlock, spans: &[Piece]) -> Result<Vec<GuestRam>, Error> {
    if spans.is_empty() {
        return Err(Error::NoAddress { block: block.name.clone() });
    }
    let mut covered = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let start = if index == 0 { 0 } else { span.offset };
        let end = spans.get(index + 1).map_or(block.max_length, |next| next.offset);
        let overflow = |offset| Error::AddressOverflow { block: block.name.clone(), offset };
        let gpa = span.gpa.checked_sub(span.offset - start).ok_or_else(|| overflow(start))?;
        let length = end - start;
        gpa.checked_add(length).ok_or_else(|| overflow(end))?;
        let hva = block.hva.checked_add(start).ok_or_else(|| overflow(start))?;
        covered.push(GuestRam {
            block: block.name.clone(),
            block_offset: start,
            gpa,
            length,
            hva,
            page_size: block.page_size,
        });
    }
    Ok(covered)
}

/// Compares neighbours in a list that is sorted by address.
fn refuse_overlap(guest_ram: &[GuestRam]) -> Result<(), Error> {
    match guest_ram.windows(2).find(|pair| pair[0].gpa + pair[0].length > pair[1].gpa) {
        None => Ok(()),
        Some(pair) => Err(Error::Overlap {
            first: pair[0].block.clone(),
            second: pair[1].block.clone(),
            gpa: pair[1].gpa,
        }),
    }
}

#[cfg(test)]
mod tests;
