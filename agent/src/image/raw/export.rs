// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An image becomes a raw file.
//!
//! [`export`] reads the content of each page from the chain, checks it, and writes it to its place
//! in the raw file. All other pages are holes. Pieces of the VMM's state become files of their own.
//!
//! No page with content is lost: if the layout has no place for one, the export is refused. The
//! files appear under their names only when all of them are complete and safe on the disk.

use super::Output;
use super::error::{PieceFault, RawError, RawFault};
use super::layout::{Chunks, LayoutError, PlacedPart, RawLayout};
use super::pieces::{Piece, write_pieces};
use crate::image::bytes::write_at;
use crate::image::error::kernel;
use crate::image::new_file::{FileKind, NewFile};
use crate::image::workers::{Progress, share_among_threads};
use crate::image::{Chain, ImageFault};
use crate::memory::PageBuffer;
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::PAGE_SIZE;
use std::collections::BTreeSet;
use std::os::fd::AsFd;

/// The raw file that an export has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Pages with content.
    pub present: u64,
    /// Length of the file in bytes, with its holes.
    pub length: u64,
}

/// Writes the guest of `chain` to a new raw file, and pieces of the VMM's state to files of their
/// own.
///
/// With `partial`, blocks that the layout does not name are left out. If the output may replace
/// files, the raw file replaces only one of the same length, and nothing replaces an image. The
/// progress counts the pages that have content.
///
/// # Errors
/// If the layout has no place for a page with content, the image cannot be read or is damaged, or a
/// file exists or cannot be written.
pub fn export(
    chain: &Chain, layout: &RawLayout, partial: bool, pieces: &[Piece], output: Output<'_>,
) -> Result<Exported, RawError> {
    let Output { path: into, replace, .. } = output;
    check_paths(pieces, output)?;
    let of_memory = |fault: RawFault| fault.of(into);
    let parts = layout.place(chain.table()).map_err(|error| of_memory(error.into()))?;
    check_complete(chain, &parts, partial).map_err(|error| of_memory(error.into()))?;
    let io = |fault: ImageFault| of_memory(fault.into());
    let memory = NewFile::create(into, FileKind::memory(layout.length()), replace).map_err(io)?;
    let state = write_pieces(chain, pieces, replace)?;
    rustix::fs::ftruncate(&memory, layout.length())
        .map_err(kernel("set the length of the file"))
        .map_err(io)?;
    let present = copy_pages(chain, &parts, &memory, output)?;
    memory.sync().map_err(io)?;
    for (piece, file) in pieces.iter().zip(state) {
        file.persist().map_err(|fault| PieceFault::from(fault).of(&piece.name, &piece.path))?;
    }
    memory.persist().map_err(io)?;
    Ok(Exported { present, length: layout.length() })
}

/// Checks that no two files get the same name: the last would replace the others.
fn check_paths(pieces: &[Piece], output: Output<'_>) -> Result<(), RawError> {
    let mut paths = BTreeSet::from([output.path]);
    match pieces.iter().find(|piece| !paths.insert(&piece.path)) {
        Some(Piece { name, path }) => Err(PieceFault::SamePath.of(name, path)),
        None => Ok(()),
    }
}

/// Checks that each page with content lies in a part, or in a block that is left out.
fn check_complete(chain: &Chain, parts: &[PlacedPart], partial: bool) -> Result<(), LayoutError> {
    for (at, block) in chain.table().blocks().iter().enumerate() {
        let of_block = || parts.iter().filter(|part| part.at == at);
        if partial && of_block().next().is_none() {
            continue;
        }
        let present = chain.present(at);
        let placed: u64 = of_block().map(|part| present.count(part.pages)).sum();
        let pages = present.count(present.all()) - placed;
        if pages > 0 {
            return Err(LayoutError::LeftOut { id: block.id, name: block.name.clone(), pages });
        }
    }
    Ok(())
}

/// Copies the pages that have content. Returns their number.
fn copy_pages(
    chain: &Chain, parts: &[PlacedPart], memory: &NewFile, output: Output<'_>,
) -> Result<u64, RawError> {
    let total = parts.iter().map(|part| chain.present(part.at).count(part.pages)).sum();
    let (chunks, progress) = (Chunks::of(parts), Progress::new(total, output.show));
    let buffer = || PageBuffer::new(EXTENT_SIZE as usize);
    share_among_threads(output.threads, chunks.count, buffer, |buffer, number| {
        let chunk = chunks.get(number);
        let present = chain.present(chunk.at);
        let count = present.count(chunk.pages);
        if count == 0 {
            return Ok(());
        }
        // Only pages with content are read, and only those are written.
        chain.read_extent(chunk.at, chunk.pages, &mut buffer[..chunk.pages.bytes() as usize])?;
        for run in present.runs(chunk.pages) {
            let start = ((run.first - chunk.pages.first) * PAGE_SIZE) as usize;
            let bytes = &buffer[start..start + run.bytes() as usize];
            write_at(memory.as_fd(), bytes, chunk.offset_of(run.first))
                .map_err(|fault| RawFault::from(fault).of(memory.path()))?;
        }
        progress.add(count);
        Ok::<_, RawError>(())
    })?;
    Ok(total)
}
