// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Maps of a guest's memory: its pages counted by their state, and drawn as a picture.
//!
//! [`View`] chooses one image, or the guest that a chain describes. A block is divided into cells
//! of the same number of pages, and [`Tally`] counts the pages of a cell. [`Picture`] draws each
//! cell as one pixel. A picture has at most [`MAX_WIDTH`] times [`MAX_HEIGHT`] pixels; for a large
//! guest a pixel stands for more pages.

use super::chain::Chain;
use super::reader::Image;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PageRange};
use png::{BitDepth, ColorType, Encoder, EncodingError};

/// Largest width of a picture, in pixels.
pub const MAX_WIDTH: u32 = 4096;
/// Largest height of a picture, in pixels.
pub const MAX_HEIGHT: u32 = 8192;
/// Smallest width of a picture in pixels, also of a small guest, unless the caller wants less.
const MIN_WIDTH: u32 = 16;
/// Empty rows of pixels between two blocks.
const GAP: u64 = 4;

/// A colour: red, green and blue.
pub type Colour = [u8; 3];

/// Colour of the pixels that stand for no page.
const BACKGROUND: Colour = [0xff; 3];

/// The memory that a map shows.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// The states of one image, without its base.
    Image(&'a Image),
    /// The guest of the newest image of a chain.
    Guest(&'a Chain),
}

/// State of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The page has content.
    Content,
    /// In an increment: the page has content that differs from the base.
    Changed,
    /// The page is zero.
    Zero,
    /// The page is discarded.
    Discarded,
    /// In an increment: the page is as in the base.
    Unchanged,
}

impl Kind {
    /// Its name for operators.
    pub fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::Changed => "changed",
            Self::Zero => "zero",
            Self::Discarded => "discarded",
            Self::Unchanged => "as in the base",
        }
    }

    /// Its colour. All colours differ also in lightness, and not in hue alone.
    pub fn colour(self) -> Colour {
        match self {
            Self::Content => [0x1f, 0x5f, 0xbf],
            Self::Changed => [0xd9, 0x4f, 0x04],
            Self::Zero => [0xdd, 0xdd, 0xdd],
            Self::Discarded => [0x33, 0x33, 0x33],
            Self::Unchanged => [0x8c, 0xb8, 0xa6],
        }
    }
}

/// Numbers of pages by their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Pages with content.
    pub present: u64,
    /// Zero pages.
    pub zero: u64,
    /// Discarded pages.
    pub discarded: u64,
    /// Pages that are as in the base.
    pub unchanged: u64,
}

impl Tally {
    /// The number of all pages.
    pub fn pages(&self) -> u64 {
        self.present + self.zero + self.discarded + self.unchanged
    }

    /// The numbers by kind. Pages with content are [`Kind::Changed`] in an increment.
    pub fn kinds(&self, increment: bool) -> impl Iterator<Item = (Kind, u64)> + use<> {
        let content = if increment { Kind::Changed } else { Kind::Content };
        let unchanged = increment.then_some((Kind::Unchanged, self.unchanged));
        [(content, self.present), (Kind::Zero, self.zero), (Kind::Discarded, self.discarded)]
            .into_iter()
            .chain(unchanged)
    }

    /// The mean of the colours of all pages.
    pub fn colour(&self, increment: bool) -> Colour {
        let pages = self.pages().max(1);
        let mixed = |channel: usize| {
            let sum: u64 = self
                .kinds(increment)
                .map(|(kind, count)| u64::from(kind.colour()[channel]) * count)
                .sum();
            // The mean of bytes fits in a byte.
            ((sum + pages / 2) / pages) as u8
        };
        [mixed(0), mixed(1), mixed(2)]
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.present += other.present;
        self.zero += other.zero;
        self.discarded += other.discarded;
        self.unchanged += other.unchanged;
    }
}

impl View<'_> {
    /// The blocks of the guest.
    pub fn table(&self) -> &BlockTable {
        match self {
            Self::Image(image) => &image.contents().table,
            Self::Guest(chain) => chain.table(),
        }
    }

    /// True if pages can be as in a base.
    pub fn is_increment(&self) -> bool {
        matches!(self, Self::Image(image) if image.header().is_increment())
    }

    /// Counts the pages `range` of the block at index `at`. Pages after the end of the block are
    /// not counted.
    pub fn tally(&self, at: usize, range: PageRange) -> Tally {
        let (present, discarded, unchanged) = match self {
            Self::Image(image) => {
                let states = &image.states()[at];
                (&states.present, &states.discarded, states.unchanged.count(range))
            }
            Self::Guest(chain) => (chain.present(at), chain.discarded(at), 0),
        };
        let pages = range.intersection(&present.all()).count;
        let (present, discarded) = (present.count(range), discarded.count(range));
        Tally { present, zero: pages - present - discarded - unchanged, discarded, unchanged }
    }

    /// Counts all pages of the block at index `at`.
    pub fn block(&self, at: usize) -> Tally {
        self.tally(at, PageRange::new(0, self.table().blocks()[at].pages()))
    }

    /// Counts the pages of all blocks.
    pub fn all(&self) -> Tally {
        let mut all = Tally::default();
        (0..self.table().blocks().len()).for_each(|at| all += self.block(at));
        all
    }

    /// The cells of the block at index `at`, each of `per_cell` pages; the last cell may have
    /// fewer.
    pub fn cells(&self, at: usize, per_cell: u64) -> impl Iterator<Item = Tally> + '_ {
        let (per_cell, pages) = (per_cell.max(1), self.table().blocks()[at].pages());
        (0..pages.div_ceil(per_cell))
            .map(move |cell| self.tally(at, PageRange::new(cell * per_cell, per_cell)))
    }
}

/// The smallest power of two, as the number of pages of a cell, with which `pages` pages make at
/// most `cells` cells.
pub fn pages_per_cell(pages: u64, cells: u64) -> u64 {
    // A guest has at most 2^38 pages, so this does not overflow.
    pages.div_ceil(cells.max(1)).next_power_of_two()
}

/// A picture of all blocks, one below the other. The cells of a block go from left to right, row by
/// row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Pages that one pixel stands for.
    pub pages_per_pixel: u64,
    /// The colours of the pixels, three bytes each, row by row.
    pixels: Vec<u8>,
}

impl Picture {
    /// Draws `view`. The picture is at most `width` pixels wide, but at least one, and at most
    /// [`MAX_HEIGHT`] pixels high.
    pub fn paint(view: &View<'_>, width: u32) -> Self {
        let blocks = view.table().blocks();
        let pages: u64 = blocks.iter().map(BlockGeometry::pages).sum();
        // A small guest gets a square picture. With the full width it would be one row.
        let square = u32::try_from(pages.isqrt().next_power_of_two()).unwrap_or(MAX_WIDTH);
        let width = width.min(square.max(MIN_WIDTH)).clamp(1, MAX_WIDTH);
        let rows = |pages: u64, per_pixel: u64| pages.div_ceil(per_pixel).div_ceil(width.into());
        let gaps = GAP * (blocks.len() as u64).saturating_sub(1);
        let height = |per_pixel| {
            gaps + blocks.iter().map(|block| rows(block.pages(), per_pixel)).sum::<u64>()
        };
        // This ends: with the largest number of blocks, each one row high, the height is far below
        // the limit.
        let mut pages_per_pixel = 1;
        while height(pages_per_pixel) > u64::from(MAX_HEIGHT) {
            pages_per_pixel *= 2;
        }
        let height = height(pages_per_pixel).max(1) as u32;
        let mut pixels = vec![BACKGROUND; width as usize * height as usize];
        let mut next = 0;
        for (at, block) in blocks.iter().enumerate() {
            let cells =
                view.cells(at, pages_per_pixel).map(|cell| cell.colour(view.is_increment()));
            pixels[next..].iter_mut().zip(cells).for_each(|(pixel, colour)| *pixel = colour);
            next += (rows(block.pages(), pages_per_pixel) + GAP) as usize * width as usize;
        }
        Self { width, height, pages_per_pixel, pixels: pixels.into_flattened() }
    }

    /// The picture as the bytes of a PNG file.
    ///
    /// # Errors
    /// If the picture cannot be encoded.
    pub fn png(&self) -> Result<Vec<u8>, EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The colour of a pixel; `None` outside of the picture.
    pub fn pixel(&self, x: u32, y: u32) -> Option<Colour> {
        let at = (y as usize * self.width as usize + x as usize) * 3;
        let colour = self.pixels.get(at..at + 3).filter(|_| x < self.width)?;
        colour.try_into().ok()
    }
}

#[cfg(test)]
mod tests;
