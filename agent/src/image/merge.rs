// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Merging a chain, an increment and all images that it builds on, into one full image.
//!
//! [`merge()`] reads the content of each page from the image of the chain that has it, checks it,
//! and writes it to the new image with a new checksum. Then it copies the state of the VMM from the
//! newest image.
//!
//! The merged image shows the same guest at the same instant as the newest image, and gets its id
//! and its time. So images that build on the newest image also build on the merged one, and the
//! merged image can replace the newest.
//!
//! If anything fails, nothing is left of the new image, and an existing file is unchanged.

use super::bytes::write_at;
use super::chain::Chain;
use super::error::{ImageError, ImageFault, kernel};
use super::reader::Image;
use super::workers::{Extents, Progress, share_among_threads};
use super::writer::{Base, ImageMetadata, ImageWriter, Totals};
use crate::memory::PageBuffer;
use pageferry_protocol::image::{EXTENT_SIZE, ImageId};
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The outcome of a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// The id of the merged image, which is that of the newest image of the chain.
    pub id: ImageId,
    /// Number of images in the chain.
    pub images: usize,
    /// Pages and bytes of the merged image.
    pub totals: Totals,
}

/// Merges the image at `path` and all images that it builds on into a new image at `into`, on
/// `threads` threads.
///
/// With `replace`, the new image replaces an image at `into`. That may be an image of the chain: it
/// is replaced only after all of it was read. `show` is called with the pages that are done and
/// with all pages.
///
/// # Errors
/// If an image is missing or damaged, or the new one cannot be written. Then nothing is left of the
/// new image, and a file at `into` is unchanged.
pub fn merge(
    path: &Path, into: &Path, replace: bool, threads: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Result<Merged, ImageError> {
    let chain = Chain::open(path)?;
    let newest = chain.newest();
    let writer =
        ImageWriter::create(into, chain.table(), replace, false)?.with_identity_of(newest.header());
    copy_pages(&chain, &writer, threads, show)?;
    let state = copy_state(newest)?;
    let rest =
        ImageMetadata { guest: newest.header().guest, discarded: chain.discards(), changed: None };
    let id = writer.id();
    let totals = writer.finish(
        rest,
        &Base::default(),
        newest.contents().pieces.clone(),
        Some(state.as_fd()),
    )?;
    Ok(Merged { id, images: chain.layers().len(), totals })
}

/// Copies the pages that have content.
fn copy_pages(
    chain: &Chain, writer: &ImageWriter, threads: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ImageError> {
    let blocks = 0..chain.table().blocks().len();
    let total = blocks.map(|at| chain.present(at).count(chain.present(at).all())).sum();
    let (extents, progress) = (Extents::of(chain.newest()), Progress::new(total, show));
    let buffer = || PageBuffer::new(EXTENT_SIZE as usize);
    share_among_threads(threads, extents.count, buffer, |buffer, number| {
        let (at, extent) = extents.locate(number);
        let pages = extents.pages((at, extent));
        let count = chain.present(at).count(pages);
        if count == 0 {
            return Ok(());
        }
        let bytes = &mut buffer[..pages.bytes() as usize];
        // Pages without content are read as zero, and the writer does not write zero pages.
        chain.read(at, pages, bytes)?;
        writer.put(at, pages, bytes)?;
        progress.add(count);
        Ok(())
    })
}

/// Copies the state of the VMM to a temporary file in memory, and checks it. The writer must not
/// get a state that is not checked.
fn copy_state(image: &Image) -> Result<OwnedFd, ImageError> {
    let create = rustix::fs::memfd_create("pageferry-state", MemfdFlags::CLOEXEC);
    let state = create
        .map_err(kernel("make a file for the state of the VMM"))
        .map_err(|fault: ImageFault| fault.of(image.path()))?;
    let mut end = 0;
    image.state_parts(|part| {
        write_at(state.as_fd(), part, end)?;
        end += part.len() as u64;
        Ok(())
    })?;
    Ok(state)
}

#[cfg(test)]
mod tests;
