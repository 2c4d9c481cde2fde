//! Folding an increment and all that it builds on into one image that stands alone.
//!
//! The merged image is the same guest at the same instant as the newest of the chain, so it has its
//! id and its time: what builds on the newest builds on the merged one as well, and it can be put
//! in the place of the newest. Whatever is read is checked before it is written, and what is
//! written gets checksums of its own.

use super::bytes::write_at;
use super::workers::{Extents, Progress, share};
use super::writer::{Base, Rest, Totals};
use super::{Chain, Fault, Image, ImageError, ImageWriter, PageBuffer, kernel};
use pageferry_protocol::image::{EXTENT_SIZE, ImageId};
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// The id of the merged image, and of the newest of the chain.
    pub id: ImageId,
    /// Images that it was made of.
    pub images: usize,
    /// What it came to.
    pub totals: Totals,
}

/// Writes the guest that the image at `path` and all that it builds on are of to a new image at
/// `into`, on so many threads. With `replace` it takes the place of what is there, which may be an
/// image of the chain: that is replaced only once all of it was read. `show` is told the pages that
/// are done, and all.
///
/// # Errors
/// If an image is not there or damaged, or the new one cannot be written. Nothing is left of it
/// then, and what is at `into` is as it was.
pub fn merge(
    path: &Path, into: &Path, replace: bool, threads: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Result<Merged, ImageError> {
    let chain = Chain::open(path)?;
    let newest = chain.newest();
    let writer =
        ImageWriter::create(into, chain.table(), replace, false)?.standing_for(newest.header());
    copy_pages(&chain, &writer, threads, show)?;
    let state = copy_state(newest)?;
    let rest = Rest { guest: newest.header().guest, discarded: chain.discards(), changed: None };
    let id = writer.id();
    let totals = writer.finish(
        rest,
        &Base::default(),
        newest.contents().pieces.clone(),
        Some(state.as_fd()),
    )?;
    Ok(Merged { id, images: chain.layers().len(), totals })
}

fn copy_pages(
    chain: &Chain, writer: &ImageWriter, threads: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ImageError> {
    let blocks = 0..chain.table().blocks().len();
    let total = blocks.map(|at| chain.present(at).count(chain.present(at).all())).sum();
    let (extents, progress) = (Extents::of(chain.newest()), Progress::new(total, show));
    let buffer = || PageBuffer::new(EXTENT_SIZE as usize);
    share(threads, extents.count, buffer, |buffer, number| {
        let (at, extent) = extents.locate(number);
        let pages = extents.pages((at, extent));
        let count = chain.present(at).count(pages);
        if count == 0 {
            return Ok(());
        }
        let bytes = &mut buffer[..pages.bytes() as usize];
        // Those without content come as zero, and what is zero is not written.
        chain.read(at, pages, bytes)?;
        writer.put(at, pages, bytes)?;
        progress.add(count);
        Ok(())
    })
}

/// The state of the VMM in a file of its own, checked.
fn copy_state(image: &Image) -> Result<OwnedFd, ImageError> {
    let create = rustix::fs::memfd_create("pageferry-state", MemfdFlags::CLOEXEC);
    let state = create
        .map_err(kernel("keep the state of the VMM"))
        .map_err(|fault: Fault| fault.of(image.path()))?;
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
