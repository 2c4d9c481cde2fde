// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A raw file becomes an image.
//!
//! [`import`] reads the pages of the raw file that have data and puts them into a new full image.
//! Holes are never read. They and pages of zeroes become zero pages, which take no space in the
//! image. Nothing is discarded, because a raw file does not say so.
//!
//! If anything fails, nothing is left of the image, and an existing file is unchanged.

use super::Output;
use super::error::{RawError, RawFault};
use super::file::RawFile;
use super::layout::{Chunks, PlacedPart, RawLayout};
use super::pieces::{Piece, read_pieces};
use crate::image::bytes::read_at;
use crate::image::workers::{Progress, share_among_threads};
use crate::image::writer::{Base, ImageMetadata, Totals};
use crate::image::{ImageFault, ImageKey, ImageWriter};
use crate::memory::PageBuffer;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::image::{EXTENT_SIZE, ImageId};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use pageferry_protocol::shm::MappedBitmap;
use std::os::fd::AsFd;

/// The image that an import has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The id of the image, which is new.
    pub id: ImageId,
    /// Pages and bytes of the image.
    pub totals: Totals,
}

/// Makes a new full image of the raw file `memory`. With a key it is sealed.
///
/// The guest counts as running: it was paused for its memory to be saved, and such a pause does not
/// count. The progress counts the pages that have data.
///
/// # Errors
/// If the raw file does not have the layout, cannot be read or was changed meanwhile, if a piece of
/// state cannot be read, or the image cannot be written.
pub fn import(
    memory: &RawFile, layout: &RawLayout, pieces: &[Piece], key: Option<&ImageKey>,
    output: Output<'_>,
) -> Result<Imported, RawError> {
    let of_memory = |fault: RawFault| fault.of(memory.path());
    let (found, expected) = (memory.length(), layout.length());
    if found != expected {
        return Err(of_memory(RawFault::Length { found, expected }));
    }
    let parts = layout.place(layout.table()).map_err(|error| of_memory(error.into()))?;
    let (pieces, state) = read_pieces(pieces)?;
    let writer = ImageWriter::create_with(output.path, layout.table(), output.replace, false, key)?;
    copy_pages(memory, &parts, &writer, output)?;
    memory.check_unchanged().map_err(of_memory)?;

    let discarded =
        layout.table().blocks().iter().map(|block| MappedBitmap::private(block.pages()));
    let discarded = discarded
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ImageFault::from(error).of(output.path))?;
    let metadata = ImageMetadata { guest: RunState::Running, discarded: &discarded, changed: None };
    let id = writer.id();
    let totals = writer.finish(metadata, &Base::default(), pieces, Some(state.as_fd()))?;
    Ok(Imported { id, totals })
}

/// Copies the pages of the raw file that have data.
fn copy_pages(
    memory: &RawFile, parts: &[PlacedPart], writer: &ImageWriter, output: Output<'_>,
) -> Result<(), RawError> {
    let of_memory = |fault: ImageFault| RawFault::from(fault).of(memory.path());
    let data = memory.pages_with_data().map_err(of_memory)?;
    let in_file = |part: &PlacedPart| PageRange::new(pages_in(part.offset), part.pages.count);
    let total = parts.iter().map(|part| data.count(in_file(part))).sum();
    let (chunks, progress) = (Chunks::of(parts), Progress::new(total, output.show));
    let buffer = || PageBuffer::new(EXTENT_SIZE as usize);
    share_among_threads(output.threads, chunks.count, buffer, |buffer, number| {
        let chunk = chunks.get(number);
        let pages = in_file(&chunk);
        let mut runs = Vec::new();
        let mut rest = &mut buffer[..pages.bytes() as usize];
        for run in data.runs(pages) {
            let (bytes, after) = rest.split_at_mut(run.bytes() as usize);
            read_at(memory.as_fd(), bytes, run.first * PAGE_SIZE).map_err(of_memory)?;
            let first = chunk.pages.first + (run.first - pages.first);
            runs.push((chunk.at, PageRange::new(first, run.count), bytes));
            rest = after;
        }
        if !runs.is_empty() {
            writer.put_runs(runs)?;
            progress.add(data.count(pages));
        }
        Ok(())
    })
}
