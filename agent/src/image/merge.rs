// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Merging a chain, an increment and all images that it builds on, into one full image.
//!
//! [`merge()`] reads the content of each page from the image of the chain that has it, checks it,
//! and writes it to the new image with a new checksum or seal. Then it copies the state of the VMM
//! from the newest image.
//!
//! The merged image shows the same guest at the same instant as the newest image, and gets its id
//! and its time. So images that build on the newest image also build on the merged one, and the
//! merged image can replace the newest.
//!
//! With a new key, a merge is also how images get another key, or their first one.
//!
//! If anything fails, nothing is left of the new image, and an existing file is unchanged.

use super::chain::Chain;
use super::error::ImageError;
use super::seal::ImageKey;
use super::workers::{Extents, Progress, share_among_threads};
use super::writer::{Base, ImageMetadata, ImageWriter, Totals};
use crate::memory::PageBuffer;
use pageferry_protocol::image::{EXTENT_SIZE, ImageId};
use std::os::fd::AsFd;
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

/// The keys of a merge.
#[derive(Debug, Clone, Copy, Default)]
pub struct MergeKeys<'a> {
    /// The key of the chain; `None` if it is in plain text.
    pub old: Option<&'a ImageKey>,
    /// The key of the new image. `None` for that of the chain.
    pub new: Option<&'a ImageKey>,
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
    merge_with(path, MergeKeys::default(), into, replace, threads, show)
}

/// As [`merge()`]. With a key the new image is sealed. So it is never in plain text if the chain is
/// sealed.
///
/// # Errors
/// As [`merge()`], or if the key does not fit the chain.
pub fn merge_with(
    path: &Path, keys: MergeKeys<'_>, into: &Path, replace: bool, threads: usize,
    show: &(dyn Fn(u64, u64) + Sync),
) -> Result<Merged, ImageError> {
    let chain = Chain::open_with(path, keys.old)?;
    let newest = chain.newest();
    let writer =
        ImageWriter::create_with(into, chain.table(), replace, false, keys.new.or(keys.old))?
            .with_identity_of(newest.header());
    copy_pages(&chain, &writer, threads, show)?;
    // The writer must not get a state that is not checked.
    let state = newest.state_file()?;
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

#[cfg(test)]
mod tests;
