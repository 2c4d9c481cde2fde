//! An increment with the images that it builds on, down to one that stands alone.
//!
//! All images are opened by their contents first: who they are, and of which blocks. The states of
//! their pages, which may be a gigabyte each, are read when all of that fits.
//!
//! Who is what is checked by identity: an increment names the id of its base, and a file that was
//! replaced by another image has another.

use super::blocks::compare;
use super::reader::States;
use super::{Fault, Image, ImageError};
use crate::memory::runs::{NEAR, join_near_runs};
use pageferry_protocol::image::{EXTENT_PAGES, StateWord};
use pageferry_protocol::memory::{BlockTable, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use std::path::{Path, PathBuf};

/// Most images of a chain.
pub const MAX_IMAGES: usize = 256;

/// An image, and those that it builds on.
#[derive(Debug)]
pub struct Chain {
    /// The newest first.
    layers: Vec<Layer>,
    /// What is discarded in the end, of each block.
    discarded: Vec<MappedBitmap>,
    /// What has content in the end, of each block.
    present: Vec<MappedBitmap>,
}

/// An image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub image: Image,
    /// The pages of each block whose content is taken from it: those that no newer one says
    /// anything of.
    pub pages: Vec<MappedBitmap>,
}

impl Chain {
    /// Opens the image at `path` and all that it builds on.
    ///
    /// # Errors
    /// If one of them is not there, is damaged, or is another than it should be.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let mut images = lineage(path)?;
        read_states(&mut images)?;
        Self::fold(images).map_err(|fault| fault.of(path))
    }

    fn fold(images: Vec<Image>) -> Result<Self, Fault> {
        let table = images[0].contents().table.clone();
        let bitmaps = || -> Result<Vec<MappedBitmap>, Fault> {
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
            // All that an increment says nothing of is looked for in its base: there is no way
            // around looking at each word. One that stands alone is mostly zero.
            let words: Box<dyn Iterator<Item = u64>> = match &layers[..] {
                [only] => Box::new(said(&only.image.states()[at], all)),
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

    /// The newest.
    pub fn newest(&self) -> &Image {
        &self.layers[0].image
    }

    /// The blocks.
    pub fn table(&self) -> &BlockTable {
        &self.newest().contents().table
    }

    /// The pages of the block at index `at` that are discarded.
    pub fn discarded(&self, at: usize) -> &MappedBitmap {
        &self.discarded[at]
    }

    /// The pages of each block that are discarded.
    pub fn discards(&self) -> &[MappedBitmap] {
        &self.discarded
    }

    /// The pages of the block at index `at` that have content.
    pub fn present(&self, at: usize) -> &MappedBitmap {
        &self.present[at]
    }

    /// Reads the pages `range` of the block at index `at`; those that have no content are zero.
    ///
    /// # Errors
    /// If one cannot be read, or is damaged.
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

    /// Reads those of the pages `range`, which lie in one extent of the block at index `at`, that
    /// have content; the places of the others in `into` are left as they are. Checks the sum of the
    /// extent, too, in each image that it is read from.
    ///
    /// # Errors
    /// If one cannot be read, or is damaged.
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

    /// Has the disk read what is to be read of the pages `range`, which lie in one extent, if it is
    /// not in memory. Nobody waits for it.
    pub fn will_need(&self, at: usize, range: PageRange) {
        for layer in &self.layers {
            join_near_runs(layer.pages[at].runs(range), NEAR)
                .for_each(|run| layer.image.will_need(at, run));
        }
    }
}

/// The image at `path` and those that it builds on, the newest first, as far as they can be opened;
/// and why no more of them.
pub fn images(path: &Path) -> (Vec<Image>, Result<(), ImageError>) {
    let (mut images, opened) = open_all(path);
    let read = read_states(&mut images);
    (images, read.and(opened))
}

/// Reads the states of all. If those of one cannot be read, it is left out, and so are those that
/// it builds on.
fn read_states(images: &mut Vec<Image>) -> Result<(), ImageError> {
    let failed = images
        .iter_mut()
        .enumerate()
        .find_map(|(at, image)| Some((at, image.read_states().err()?)));
    let Some((at, error)) = failed else { return Ok(()) };
    images.truncate(at);
    Err(as_base(images, error))
}

/// The error of an image that the last of `images` builds on, as one of that.
fn as_base(images: &[Image], error: ImageError) -> ImageError {
    match images.last() {
        Some(last) => Fault::NoBase(Box::new(error)).of(last.path()),
        None => error,
    }
}

/// A run of pages, cut where extents end.
pub fn in_extents(run: PageRange) -> impl Iterator<Item = PageRange> {
    let extents = if run.is_empty() {
        0..0
    } else {
        run.first / EXTENT_PAGES..run.end().div_ceil(EXTENT_PAGES)
    };
    extents
        .map(move |extent| PageRange::new(extent * EXTENT_PAGES, EXTENT_PAGES).intersection(&run))
}

/// The words of a block with a page that is not zero; some twice.
fn said(states: &States, all: PageRange) -> impl Iterator<Item = u64> + '_ {
    let words = states.present.nonzero_words(all).chain(states.discarded.nonzero_words(all));
    words.map(|(word, _)| word)
}

/// The base of the last of `images`, if it has one: who it is, and that it is of the same blocks.
fn next_base(images: &[Image]) -> Result<Option<Image>, ImageError> {
    let Some(last) = images.last().filter(|last| last.header().is_increment()) else {
        return Ok(None);
    };
    if images.len() == MAX_IMAGES {
        return Err(Fault::Chain(MAX_IMAGES).of(images[0].path()));
    }
    let id = last.header().base;
    if images.iter().any(|image| image.header().id == id) {
        return Err(Fault::Circle { id }.of(last.path()));
    }
    let path = base_path(last);
    let base = Image::open_contents(&path).map_err(|error| as_base(images, error))?;
    let (found, expected) = (base.header().id, last.header().base);
    if found != expected {
        return Err(Fault::Base { path, found, expected }.of(last.path()));
    }
    compare(&last.contents().table, &base.contents().table, true)
        .map_err(|source| Fault::BaseBlocks { path, source }.of(last.path()))?;
    Ok(Some(base))
}

/// The image at `path` and all that it builds on, the newest first, as [`Image::open_contents`]
/// opens them: who they are, and not what is in them.
///
/// # Errors
/// If one of them is not there, is damaged, or is another than it should be.
pub fn lineage(path: &Path) -> Result<Vec<Image>, ImageError> {
    let (images, opened) = open_all(path);
    opened.map(|()| images)
}

fn open_all(path: &Path) -> (Vec<Image>, Result<(), ImageError>) {
    let mut images = Vec::new();
    let mut open_one = || -> Result<(), ImageError> {
        images.push(Image::open_contents(path)?);
        while let Some(base) = next_base(&images)? {
            images.push(base);
        }
        Ok(())
    };
    let opened = open_one();
    (images, opened)
}

/// Where the base of an increment is: its name is a path from the folder of the increment's file,
/// whatever link leads there.
pub fn base_path(image: &Image) -> PathBuf {
    let file = file_of(image.path());
    file.parent().unwrap_or(Path::new("")).join(&image.contents().base_name)
}

/// The file that `path` leads to, without links on the way; `path` itself if there is none.
fn file_of(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// What an increment at `path` calls its base at `base`: images that lie together can be moved
/// together, and a link that leads to another image later leads nobody astray.
pub fn name_of_base(base: &Path, path: &Path) -> String {
    let (file, folder) = (file_of(base), file_of(path.parent().unwrap_or(Path::new("/"))));
    // What is not UTF-8 cannot be written down: the link can.
    let name = file.strip_prefix(folder).unwrap_or(&file).to_str();
    name.map_or_else(|| base.to_string_lossy().into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_extents_end() {
        let parts: Vec<_> = in_extents(PageRange::new(500, 600)).collect();
        assert_eq!(
            parts,
            [PageRange::new(500, 12), PageRange::new(512, 512), PageRange::new(1024, 76)]
        );
        assert_eq!(in_extents(PageRange::new(5, 0)).count(), 0);
    }
}
