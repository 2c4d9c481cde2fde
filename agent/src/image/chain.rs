// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A chain: an increment and the images that it builds on, down to a full image.
//!
//! [`Chain::open`] first opens all images and reads only their headers and contents. It compares
//! the id of each base with the id that the increment names: a file that was replaced by another
//! image has another id. It also compares the blocks. Only when all of that fits does it read the
//! states of the pages, which can be a gigabyte for each image. Then it decides for each page which
//! image has its content.
//!
//! All images of a chain are sealed with one key, or none is sealed. Otherwise whoever has no key
//! could make the base of an image that is sealed.
//!
//! A chain has at most [`MAX_IMAGES`] images. If one of them is missing, damaged, or another image
//! than expected, the error names that image and the images that build on it.

use super::blocks::compare;
use super::error::{ImageError, ImageFault};
use super::reader::{Image, States};
use super::seal::ImageKey;
use crate::memory::runs::{NEAR, join_near_runs};
use crate::opener;
use crate::store;
use pageferry_protocol::image::{EXTENT_PAGES, StateWord};
use pageferry_protocol::memory::{BlockTable, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use std::path::{Path, PathBuf};

/// Most images of a chain.
pub const MAX_IMAGES: usize = 256;

/// An image and the images that it builds on.
#[derive(Debug)]
pub struct Chain {
    /// The images, the newest first.
    layers: Vec<Layer>,
    /// For each block, the pages that are discarded in the guest of the newest image.
    discarded: Vec<MappedBitmap>,
    /// For each block, the pages that have content in the guest of the newest image.
    present: Vec<MappedBitmap>,
}

/// An image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub image: Image,
    /// For each block, the pages whose content is read from this image: they are present here, and
    /// unchanged in all newer images.
    pub pages: Vec<MappedBitmap>,
}

impl Chain {
    /// Opens the image at `path` and all images that it builds on.
    ///
    /// # Errors
    /// If one of them is missing, damaged, sealed, or another image than expected.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::open_with(path, None)
    }

    /// The same with the key with which all of them are sealed.
    ///
    /// # Errors
    /// If one of them is missing, damaged, or another image than expected, or if the key does not
    /// fit one of them.
    pub fn open_with(path: &Path, key: Option<&ImageKey>) -> Result<Self, ImageError> {
        let mut images = lineage(path, key)?;
        read_states(&mut images)?;
        Self::fold(images).map_err(|fault| fault.of(path))
    }

    /// Decides for each page whether it is present or discarded, and which image has its content.
    fn fold(images: Vec<Image>) -> Result<Self, ImageFault> {
        let table = images[0].contents().table.clone();
        let bitmaps = || -> Result<Vec<MappedBitmap>, ImageFault> {
            Ok(table
                .blocks()
                .iter()
                .map(|block| MappedBitmap::private(block.pages()))
                .collect::<Result<_, _>>()?)
        };
        let (discarded, present) = (bitmaps()?, bitmaps()?);
        let mut layers = Vec::with_capacity(images.len());
        for image in images {
            layers.push(Layer { image, pages: bitmaps()? });
        }
        for at in 0..table.blocks().len() {
            let all = present[at].all();
            // In an increment most pages are unchanged and must be looked up in the base, so all
            // words are visited. In a full image most words are zero and are skipped.
            let words: Box<dyn Iterator<Item = u64>> = match &layers[..] {
                [only] => Box::new(nonzero_words(&only.image.states()[at], all)),
                _ => Box::new(0..all.count.div_ceil(WORD_BITS)),
            };
            for word in words {
                let mut open = word_mask(0, (all.count - word * WORD_BITS).min(WORD_BITS));
                for layer in &layers {
                    let state: StateWord = layer.image.states()[at].word(word);
                    layer.pages[at].or_word(word, open & state.present);
                    present[at].or_word(word, open & state.present);
                    discarded[at].or_word(word, open & state.discarded);
                    open &= state.unchanged;
                    if open == 0 {
                        break;
                    }
                }
            }
        }
        Ok(Self { layers, discarded, present })
    }

    /// The images, the newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The newest image.
    pub fn newest(&self) -> &Image {
        &self.layers[0].image
    }

    /// The blocks of the guest.
    pub fn table(&self) -> &BlockTable {
        &self.newest().contents().table
    }

    /// The pages of the block at index `at` that are discarded.
    pub fn discarded(&self, at: usize) -> &MappedBitmap {
        &self.discarded[at]
    }

    /// The pages that are discarded, for each block.
    pub fn discards(&self) -> &[MappedBitmap] {
        &self.discarded
    }

    /// The pages of the block at index `at` that have content.
    pub fn present(&self, at: usize) -> &MappedBitmap {
        &self.present[at]
    }

    /// Reads the pages `range` of the block at index `at`. Pages without content are zero in
    /// `into`.
    ///
    /// # Errors
    /// If a page cannot be read, or is damaged.
    pub fn read(&self, at: usize, range: PageRange, into: &mut [u8]) -> Result<(), ImageError> {
        into.fill(0);
        let mut rest = into;
        for part in in_extents(range) {
            let (into, after) = rest.split_at_mut(part.bytes() as usize);
            self.read_extent(at, part, into)?;
            rest = after;
        }
        Ok(())
    }

    /// Reads the pages `range`, which lie in one extent of the block at index `at`. For pages
    /// without content, `into` is left unchanged. Checks each page, and the checksum of the extent
    /// in each image that has one of the pages.
    ///
    /// # Errors
    /// If a page cannot be read, or is damaged.
    pub fn read_extent(
        &self, at: usize, range: PageRange, into: &mut [u8],
    ) -> Result<(), ImageError> {
        let extent = (at, range.first / EXTENT_PAGES);
        for layer in &self.layers {
            let mut runs = layer.pages[at].runs(range).peekable();
            if runs.peek().is_some() {
                layer.image.read_extent(extent, runs, range.first, into)?;
            }
        }
        Ok(())
    }

    /// Asks the kernel to read the pages `range`, which lie in one extent, into the page cache.
    /// Does not wait.
    pub fn will_need(&self, at: usize, range: PageRange) {
        for layer in &self.layers {
            join_near_runs(layer.pages[at].runs(range), NEAR)
                .for_each(|run| layer.image.will_need(at, run));
        }
    }
}

/// The image at `path` and the images that it builds on, the newest first. If one of them cannot be
/// opened, returns those that build on it, and the error.
pub fn images(path: &Path, key: Option<&ImageKey>) -> (Vec<Image>, Result<(), ImageError>) {
    let (mut images, opened) = open_all(path, key);
    let read = read_states(&mut images);
    (images, read.and(opened))
}

/// Reads the states of all images. If the states of an image cannot be read, removes that image and
/// all that it builds on.
fn read_states(images: &mut Vec<Image>) -> Result<(), ImageError> {
    let failed = images
        .iter_mut()
        .enumerate()
        .find_map(|(at, image)| Some((at, image.read_states().err()?)));
    let Some((at, error)) = failed else { return Ok(()) };
    images.truncate(at);
    Err(as_base(images, error))
}

/// Turns the error of the next image into an error of the last of `images`, which builds on it.
fn as_base(images: &[Image], error: ImageError) -> ImageError {
    match images.last() {
        Some(last) => ImageFault::UnusableBase(Box::new(error)).of(last.path()),
        None => error,
    }
}

/// Splits a run of pages at the ends of extents.
pub fn in_extents(run: PageRange) -> impl Iterator<Item = PageRange> {
    let extents = if run.is_empty() {
        0..0
    } else {
        run.first / EXTENT_PAGES..run.end().div_ceil(EXTENT_PAGES)
    };
    extents
        .map(move |extent| PageRange::new(extent * EXTENT_PAGES, EXTENT_PAGES).intersection(&run))
}

/// The words of a block with a page that is not zero. A word may come twice.
fn nonzero_words(states: &States, all: PageRange) -> impl Iterator<Item = u64> + '_ {
    let words = states.present.nonzero_words(all).chain(states.discarded.nonzero_words(all));
    words.map(|(word, _)| word)
}

/// Opens the base of the last of `images`, if it has one, and checks its id and its blocks.
fn next_base(images: &[Image], key: Option<&ImageKey>) -> Result<Option<Image>, ImageError> {
    let Some(last) = images.last().filter(|last| last.header().is_increment()) else {
        return Ok(None);
    };
    if images.len() == MAX_IMAGES {
        return Err(ImageFault::ChainTooLong(MAX_IMAGES).of(images[0].path()));
    }
    let id = last.header().base;
    if images.iter().any(|image| image.header().id == id) {
        return Err(ImageFault::ChainLoop { id }.of(last.path()));
    }
    let path = base_path(last);
    if store::is_stored(&path) {
        store::client::check(&path).map_err(|error| ImageFault::from(error).of(last.path()))?;
    } else if opener::is_named(&path, false) == Ok(false) {
        return Err(ImageFault::BaseNotNamed(path).of(last.path()));
    }
    let base = Image::open_contents(&path, key).map_err(|error| as_base(images, error))?;
    let (found, expected) = (base.header().id, last.header().base);
    if found != expected {
        return Err(ImageFault::BaseReplaced { path, found, expected }.of(last.path()));
    }
    compare(&last.contents().table, &base.contents().table, true)
        .map_err(|source| ImageFault::BaseBlocks { path, source }.of(last.path()))?;
    Ok(Some(base))
}

/// The image at `path` and all images that it builds on, the newest first. Only their headers and
/// contents are read, as by [`Image::open_contents`].
///
/// # Errors
/// If one of them is missing, damaged, or another image than expected.
pub fn lineage(path: &Path, key: Option<&ImageKey>) -> Result<Vec<Image>, ImageError> {
    let (images, opened) = open_all(path, key);
    opened.map(|()| images)
}

/// Opens the chain without states. If an image cannot be opened, returns those that build on it,
/// and the error.
fn open_all(path: &Path, key: Option<&ImageKey>) -> (Vec<Image>, Result<(), ImageError>) {
    let mut images = Vec::new();
    let mut open_one = || -> Result<(), ImageError> {
        images.push(Image::open_contents(path, key)?);
        while let Some(base) = next_base(&images, key)? {
            images.push(base);
        }
        Ok(())
    };
    let opened = open_one();
    (images, opened)
}

/// The path of the base of an increment. The name in the increment is relative to the folder of the
/// increment's file, also if the increment was opened through a link in another folder.
pub fn base_path(image: &Image) -> PathBuf {
    let (file, name) = (file_of(image.path()), Path::new(&image.contents().base_name));
    if store::is_stored(name) {
        return name.to_owned();
    }
    file.parent().unwrap_or(Path::new("")).join(name)
}

/// `path` with all links resolved; `path` itself if there is no such file.
fn file_of(path: &Path) -> PathBuf {
    if store::is_stored(path) {
        return path.to_owned();
    }
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// The name of the base at `base` for an increment at `path`.
///
/// The name is relative if the base is in the folder of the increment or below, so images in one
/// folder can be moved together. Links are resolved, so the name stays right if a link is changed
/// later.
pub fn name_of_base(base: &Path, path: &Path) -> String {
    let (file, folder) = (file_of(base), file_of(path.parent().unwrap_or(Path::new("/"))));
    // An image can store only UTF-8. If the resolved path is not UTF-8, the path as given is used.
    let name = file.strip_prefix(folder).unwrap_or(&file).to_str();
    name.map_or_else(|| base.to_string_lossy().into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_split_at_the_ends_of_extents() {
        let parts: Vec<_> = in_extents(PageRange::new(500, 600)).collect();
        assert_eq!(
            parts,
            [PageRange::new(500, 12), PageRange::new(512, 512), PageRange::new(1024, 76)]
        );
        assert_eq!(in_extents(PageRange::new(5, 0)).count(), 0);
    }
}
